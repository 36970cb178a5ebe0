"""Keeps what every script promises (STYLE of this repository in executable form).

Each rule is a function that takes text and returns a list of faults. It is applied to the real files, and then to a
broken example, so that a rule that no longer sees anything fails too.
"""

import ast
import dataclasses
import functools
import graphlib
import importlib
import importlib.metadata
import operator
import re
import shlex
import statistics
import subprocess
import sys
import types
import typing
from collections.abc import Iterator
from csv import DictReader
from pathlib import Path

import pytest
import tyro
from conftest import REPO, run_script

# Those in README's table: others beside them are copies that somebody edits.
SCRIPTS = sorted(re.findall(r"^\| `(\w+\.py)` \|", (REPO / "README.md").read_text(), re.M))
MODULES = sorted(str(path.relative_to(REPO)) for path in REPO.glob("common/*.py"))
BENCHMARKS = sorted(str(path.relative_to(REPO)) for path in REPO.glob("benchmarks/*.py"))
OWN_PYTHON = [*SCRIPTS, *MODULES, *BENCHMARKS]
WITH_ARGS = [name for name in (*SCRIPTS, *BENCHMARKS) if name != "benchmarks/speed.py"]
MAY_DIFFER = {"Args", "make_env", "wrap_env", "load_demos", "Agent", "evaluate"}
MAY_DIFFER |= {"start", "train", "learner", "actor", "main"}
SECTIONS = ["Args", "Environment", "Networks", "Replay buffer", "Dataset", "Agent", "Evaluation", "Main"]
FOOTER = 'if __name__ == "__main__":\n    main({})'
# The second with --resume; the third where tyro is imported late.
CALLS = ("tyro.cli(Args, description=__doc__)", "parse(Args, __doc__, Args.MAY_CHANGE)", "parse_args()")
BANNER_LENGTH = 120
MAX_LINES, MAX_MODULE_LINES, MAX_FUNCTION_LINES = 800, 350, 60
LONGER = {  # limits, not goals
    "sac_state_sim.py": 874,
    "sac_pixel_sim.py": 1231,
    "sac_pixel_real.py": 1686,
    "bc_flow_offline.py": 1069,
    "robot_server.py": 2926,  # runs alone: three arms, four grippers, limiter, watchdog, and a front that survives
    "robot_client.py": 1734,  # client, cameras, teleoperation, environment
    "common/datasets.py": 1415,
}
MAX_FLAGS = {"sac_state_sim.py": 49, "sac_pixel_sim.py": 60}

# Appended to every command that the README or a header shows, to run it in seconds. tyro takes the last of two flags.
# Commands with a comment that says `# needs ...` (a GPU, hardware, a network, another process) are parsed, not run.
# RUN_DIR stands for a finished run of the same script; such commands take their flags from that run, and --resume goes
# a little further.
TINY = {
    "reward_classifier.py": "--simulated-episodes 10 --test-episodes 5 --updates 40 --image-size 32",
    "sac_state_sim.py": "--total-timesteps 300 --learning-starts 100 --batch-size 32 --eval-every 150 --eval-episodes 1"
    " --final-eval-episodes 1 --no-capture-video",
    "sac_pixel_sim.py": "--total-timesteps 80 --learning-starts 50 --batch-size 8 --utd-ratio 1 --eval-every 1000"
    " --final-eval-episodes 1 --no-capture-video --demos 2 --buffer-size 1000 --latent-dim 16 --image-size 36"
    " --small-channels 4 8 8",
    "bc_flow_offline.py": "--run-dir run --offline-steps 60 --log-interval 20 --demos 3 --eval-episodes 2"
    " --no-capture-video",
}
GO_ON = {
    "reward_classifier.py": "--updates 60",
    "sac_state_sim.py": "--total-timesteps 400",
    "sac_pixel_sim.py": "--total-timesteps 100",
    "bc_flow_offline.py": "--offline-steps 80",
}


def text(name: str) -> str:
    return (REPO / name).read_text()


def test_there_are_scripts():
    assert {"franka_sim.py", "sac_state_sim.py", "sac_pixel_sim.py"} <= set(SCRIPTS)


# --- Same name, same code ---------------------------------------------------------------------------------------------
def definitions(source: str) -> Iterator[tuple[str, str]]:
    """(name, source) of every top-level function, class and CONSTANT."""
    lines = source.splitlines()
    for node in ast.parse(source).body:
        first, last = node.lineno, node.end_lineno
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            first, names = min([first, *(decorator.lineno for decorator in node.decorator_list)]), [node.name]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [target.id for target in targets if isinstance(target, ast.Name) and target.id.isupper()]
        else:
            continue
        for name in names:
            yield name, "\n".join(lines[first - 1 : last])


def drift_faults(sources: dict[str, str]) -> list[str]:
    """A top-level name that stands in two scripts has the same source in both."""
    seen: dict[str, tuple[str, str]] = {}
    faults = []
    for script, source in sources.items():
        for name, code in definitions(source):
            first_script, first_code = seen.setdefault(name, (script, code))
            if code != first_code and name not in MAY_DIFFER:
                faults.append(f"{name} differs between {first_script} and {script}: make it equal, or rename it")
    return faults


def test_same_name_same_code():
    assert drift_faults({name: text(name) for name in SCRIPTS}) == []


@pytest.mark.parametrize(
    ("one", "two", "fault"),
    [
        ("def f():\n    return 1", "def f():\n    return 2", "f differs"),
        ("def f():\n    return 1", "def f():\n    return 1  # why", "f differs"),
        ("@cache\ndef f(): ...", "def f(): ...", "f differs"),
        ("class Net:\n    a = 1", "class Net:\n    a = 2", "Net differs"),
        ("LIMIT = 1", "LIMIT: int = 1", "LIMIT differs"),
    ],
)
def test_drift_is_seen(one, two, fault):
    assert fault in "".join(drift_faults({"a.py": one, "b.py": two}))
    assert drift_faults({"a.py": one, "b.py": one}) == []
    assert drift_faults({"a.py": "def main(): return 1", "b.py": "def main(): return 2"}) == []


# Of Agent: methods that stand in both of two scripts and are not the same to the letter.
STATES_TO_IMAGES = (
    "__init__ make_buffer act choose critic_loss actor_loss actor_gradient step_actor update_once update "
)
STATES_TO_IMAGES += "policy_tensors state_dict load_state_dict"
IMAGES_TO_ROBOT = "__init__ make_buffer act random_action prepare target_q gradients update_once update "
IMAGES_TO_ROBOT += "policy_tensors state_dict load_state_dict"


def methods(script: str) -> dict[str, str]:
    """Name and source of the methods of a script's Agent."""
    (agent,) = [code for name, code in definitions(text(script)) if name == "Agent"]
    (tree,) = ast.parse(agent).body
    return {node.name: ast.get_source_segment(agent, node) for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize(
    ("one", "other", "differing"),
    [
        ("sac_state_sim.py", "sac_pixel_sim.py", STATES_TO_IMAGES),
        ("sac_pixel_sim.py", "sac_pixel_real.py", IMAGES_TO_ROBOT),
    ],
)
def test_methods_of_an_agent_that_a_task_does_not_change(one, other, differing):
    ours, theirs = methods(one), methods(other)
    assert {name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]} == set(differing.split())


# --- Args: documented, used, of their type ----------------------------------------------------------------------------
def args_faults(source: str) -> list[str]:
    """Every field of Args has a docstring below it and is read as args.x; every args.x is a field."""
    tree = ast.parse(source)
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args"]
    if len(classes) != 1:
        return ["there is no top-level class Args"]
    body = classes[0].body
    faults, known = [], {node.name for node in body if isinstance(node, ast.FunctionDef)}
    if any(ast.unparse(base) == "RunArgs" for base in classes[0].bases):
        known |= inherited_flags()
    read = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value).split(".")[-1] == "args":
            read |= {node.attr} if isinstance(node.ctx, ast.Load) else set()
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self" and inside(node, classes[0]):
            read.add(node.attr)  # a check in Args itself, __post_init__
    for field, below in zip(body, [*body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign):
            known.add(field.target.id)
            if not (isinstance(below, ast.Expr) and isinstance(getattr(below.value, "value", None), str)):
                faults.append(f"Args.{field.target.id} has no docstring below it")
            if field.target.id not in read:
                faults.append(f"Args.{field.target.id} is never used")
    return faults + [f"args.{name} is not a field of Args" for name in sorted(read - known)]


def inherited_flags() -> set[str]:
    from common.setup import RunArgs

    return {*RunArgs.__annotations__, "check"}


def inside(node: ast.AST, outer: ast.AST) -> bool:
    return outer.lineno <= node.lineno <= outer.end_lineno


def fits(value: object, hint: object) -> bool:
    """Whether `value` is of the annotated type, strictly: an int is no float, True is no int."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return fits(value, parts[0])
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    if origin is typing.Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if origin is tuple:
        parts = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
        return type(value) is tuple and len(value) == len(parts) and all(map(fits, value, parts))
    if origin is list:
        return type(value) is list and all(fits(item, parts[0]) for item in value)
    if hint in (None, type(None)):
        return value is None
    return type(value) is hint or (isinstance(hint, type) and issubclass(hint, Path) and isinstance(value, hint))


def default_faults(args_class: type) -> list[str]:
    """Every default of the dataclass is of its annotated type."""
    hints = typing.get_type_hints(args_class, include_extras=True)
    faults = []
    for field in dataclasses.fields(args_class):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if default is not dataclasses.MISSING and not fits(default, hints[field.name]):
            faults.append(f"Args.{field.name}: {hints[field.name]} has the default {default!r}")
    return faults


def args_of(script: str) -> type:
    """The Args of a script; importing it must not start anything."""
    folder, stem = (REPO / script).parent, Path(script).stem
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    return importlib.import_module(stem).Args


@pytest.mark.parametrize("script", WITH_ARGS)
def test_args(script):
    assert args_faults(text(script)) == []
    assert default_faults(args_of(script)) == []
    assert len(dataclasses.fields(args_of(script))) <= MAX_FLAGS.get(script, 80)


@pytest.mark.parametrize(
    ("field", "use", "fault"),
    [
        ("lr: float = 1.0", "args.lr", "no docstring"),
        ("lr: float = 1.0\n    '''rate'''", "args.seed + args.lr", "args.seed is not a field"),
        ("lr: float = 1.0\n    '''rate'''", "self.args.seed + args.lr", "args.seed is not a field"),
        ("lr: float = 1.0\n    '''rate'''", "None", "lr is never used"),
        ("lr: float = 1.0\n    '''rate'''", "args.lr = 2", "lr is never used"),
    ],
)
def test_bad_args_are_seen(field, use, fault):
    source = "class Args:\n    {}\ndef main(args):\n    {}"
    assert fault in "".join(args_faults(source.format(field, use)))
    assert args_faults(source.format("lr: float = 1.0\n    '''rate'''", "self.args.lr")) == []


@pytest.mark.parametrize(
    ("hint", "good", "bad"),
    [
        (float, 1.0, 1),
        (int, 5_000, 5e3),
        (int, 1, True),
        (str, "a", None),
        (str | None, None, 1),
        (typing.Literal["a", "b"], "b", "c"),
        (tuple[int, ...], (1, 2), (1, 2.0)),
        (tuple[float, float], (1.0, 2.0), (1.0,)),
        (list[str], ["a"], [1]),
        (Path | None, Path("a"), "a"),
    ],
)
def test_bad_defaults_are_seen(hint, good, bad):
    def faults(default: object) -> list[str]:
        field = dataclasses.field(default_factory=lambda: default)
        return default_faults(dataclasses.make_dataclass("Args", [("x", hint, field)]))

    assert faults(good) == []
    assert "Args.x" in "".join(faults(bad))


# --- Layout -----------------------------------------------------------------------------------------------------------
def layout_faults(source: str, max_lines: int = MAX_LINES) -> list[str]:
    """Header, sections in order, two-line footer, line budget; # TASK: markers where there is an Agent to copy."""
    tree = ast.parse(source)
    faults = [] if ast.get_docstring(tree) else ["no header docstring"]
    banners = re.findall(r"^# --- (.+?) -+$", source, re.M)
    sections = [banner for banner in banners if banner in SECTIONS]
    if sections != sorted(set(sections), key=SECTIONS.index):
        faults.append(f"sections are {sections}, the order is {SECTIONS}")
    if {"Args", "Main"} - set(sections):
        faults.append("the banners `# --- Args ---...` and `# --- Main ---...` are missing")
    lengths = {len(line) for line in source.splitlines() if line.startswith("# --- ")}
    if lengths - {BANNER_LENGTH}:
        faults.append(f"banner lines have lengths {sorted(lengths)}, not {BANNER_LENGTH}")
    if not source.endswith(tuple("\n\n\n" + FOOTER.format(call) + "\n" for call in CALLS)):
        faults.append(f"the last two lines are not\n{FOOTER.format(CALLS[0])}")
    if not re.search(r"^def main\(args: Args\)", source, re.M):
        faults.append("there is no def main(args: Args)")
    if (lines := source.count("\n")) > max_lines:
        faults.append(f"{lines} lines, the budget is {max_lines}")
    tasks = len(re.findall(r"# TASK:", source))
    if any(isinstance(node, ast.ClassDef) and node.name == "Agent" for node in tree.body) and not 3 <= tasks <= 8:
        faults.append(f"{tasks} `# TASK:` markers, a training script has 3 to 8")
    return faults


@pytest.mark.parametrize("script", SCRIPTS)
def test_layout(script):
    assert layout_faults(text(script), LONGER.get(script, MAX_LINES)) == []


def banner(name: str) -> str:
    return f"# --- {name} ".ljust(BANNER_LENGTH, "-")


GOOD_SCRIPT = f'''"""Header."""
{banner("Args")}
class Args: ...  # TASK: 1


{banner("Agent")}
class Agent: ...  # TASK: 2


{banner("Main")}
def main(args: Args) -> None: ...  # TASK: 3


{FOOTER.format(CALLS[0])}
'''


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ('"""Header."""', "", "no header"),
        (banner("Main"), banner("Networks"), "order is"),
        (banner("Main"), "", "missing"),
        (banner("Main"), banner("Main") + "-", "lengths"),
        ("description=__doc__", "", "last two lines"),
        ("def main(args: Args)", "def main(args)", "no def main"),
        ("class Args", "\n" * 800 + "class Args", "budget"),
        ("# TASK: 3", "", "2 `# TASK:` markers"),
        ("# TASK: 3", "# TASK:" * 7, "9 `# TASK:` markers"),
    ],
)
def test_bad_layout_is_seen(old, new, fault):
    assert layout_faults(GOOD_SCRIPT) == []
    assert fault in "".join(layout_faults(GOOD_SCRIPT.replace(old, new)))


# --- Modules: flat, and they know no script ---------------------------------------------------------------------------
def module_faults(sources: dict[str, str]) -> list[str]:
    """Modules of common/ import neither scripts nor each other in a circle, and are read in one sitting."""
    graph = {}
    faults = []
    for path, source in sources.items():
        graph[Path(path).stem] = {name for name in imported_modules(source) if f"common/{name}.py" in sources}
        scripts = imported(source) & {Path(name).stem for name in SCRIPTS}
        faults += [f"{path} imports the script {name}" for name in sorted(scripts)]
        lines, most = source.count("\n"), LONGER.get(path, MAX_MODULE_LINES)
        if lines > most:
            faults.append(f"{path}: {lines} lines, the budget is {most}")
    try:
        tuple(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        faults.append(f"circle of imports: {' -> '.join(error.args[1])}")
    return faults


def imported_modules(source: str) -> set[str]:
    """Modules of common/ that a source imports: `from common.x import y`, `from common import x`."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "common":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("common."):
            names.add(node.module.split(".")[1])
    return names


def test_modules():
    assert module_faults({path: text(path) for path in MODULES}) == []
    assert len(MODULES) - 1 <= 12  # the package's own file is empty
    assert not imported_modules(text("robot_server.py")) | imported_modules(text("franka_sim.py"))


@pytest.mark.parametrize(
    ("a", "b", "fault"),
    [
        ("from sac_state_sim import Agent", "", "imports the script sac_state_sim"),
        ("from common import b", "from common.a import f", "circle of imports: "),
        ("x = 1\n" * 351, "", "351 lines"),
    ],
)
def test_bad_modules_are_seen(a, b, fault):
    assert fault in "".join(module_faults({"common/a.py": a, "common/b.py": b}))
    assert module_faults({"common/a.py": "from common.b import f\n", "common/b.py": "import os\n"}) == []


# --- Code that no script contains -------------------------------------------------------------------------------------
PICKLERS = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "torch.multiprocessing"}


def code_faults(source: str) -> list[str]:
    """No bare except, no pickle in any form, no function that does not fit on a screen and a half."""
    faults = []
    for node in ast.walk(ast.parse(source)):
        at = f"line {getattr(node, 'lineno', 0)}:"
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            faults.append(f"{at} bare except")
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None)]
            faults += [f"{at} imports {name}" for name in names if name in PICKLERS]
        elif isinstance(node, ast.Call):
            function = ast.unparse(node.func)
            flags = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if function == "torch.load" and flags.get("weights_only") != "True":
                faults.append(f"{at} torch.load without weights_only=True")
            if flags.get("allow_pickle", "False") != "False" or function.endswith(("_pyobj", ".__reduce__")):
                faults.append(f"{at} {function} unpickles")
        elif isinstance(node, ast.FunctionDef) and (size := node.end_lineno - node.lineno + 1) > MAX_FUNCTION_LINES:
            faults.append(f"{at} {node.name} has {size} lines, the budget is {MAX_FUNCTION_LINES}")
    return faults


@pytest.mark.parametrize("script", OWN_PYTHON)
def test_code(script):
    faults = code_faults(text(script))
    if script == "common/vision.py":  # whose Unpickler looks up nothing but arrays; hostile files are tested there
        faults = [fault for fault in faults if not fault.endswith("imports pickle")]
    assert faults == []


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("try:\n    f()\nexcept:\n    pass", "bare except"),
        ("import pickle", "imports pickle"),
        ("def f():\n    from pickle import loads", "imports pickle"),
        ("torch.load(path)", "weights_only"),
        ("torch.load(path, weights_only=False)", "weights_only"),
        ("np.load(path, allow_pickle=True)", "unpickles"),
        ("socket.send_pyobj(x)", "unpickles"),
        ("def f():\n" + "    x = 1\n" * 60, "f has 61 lines"),
    ],
)
def test_bad_code_is_seen(source, fault):
    assert fault in "".join(code_faults(source))
    assert (
        code_faults("torch.load(p, weights_only=True)\nnp.load(p, allow_pickle=False)\ndef f():\n" + "    x\n" * 59)
        == []
    )


def tracked_files() -> list[Path]:
    """What git tracks; in a copy without git, everything but what .gitignore names."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=REPO, capture_output=True, text=True)
    if listing.returncode == 0 and listing.stdout:
        return [REPO / name for name in listing.stdout.split("\0") if name and (REPO / name).is_file()]
    skipped = {".git", ".venv", "venv", "runs", "wandb", "__pycache__", ".pytest_cache", ".ruff_cache"}
    return [path for path in REPO.rglob("*") if path.is_file() and not skipped & set(path.relative_to(REPO).parts)]


def path_faults(content: str) -> list[str]:
    """Folders of the machine that something was written on."""
    return re.findall(r"(?<![\w.])/(?:work|root|tmp/w|home/\w+)/\S*", content)


def test_no_machine_paths():
    faults = {}
    for path in tracked_files():
        try:
            found = path_faults(path.read_text())
        except UnicodeDecodeError:  # an image or an array
            continue
        if found:
            faults[str(path.relative_to(REPO))] = found
    assert faults == {}


def test_machine_paths_are_seen():
    assert path_faults("see /" + "work/main and '/" + "root/x'") == ["/" + "work/main", "/" + "root/x'"]
    assert path_faults("https://example.org/" + "work/x runs/" + "work/y") == []


@pytest.mark.parametrize(
    "command", [["check", "--output-format=concise"], ["format", "--check", "--output-format=concise"]]
)
def test_ruff(command):
    ruff_command = [sys.executable, "-m", "ruff", *command, *OWN_PYTHON, "tests"]
    ruff = subprocess.run(ruff_command, cwd=REPO, capture_output=True, text=True)
    assert ruff.returncode == 0, ruff.stdout + ruff.stderr


# --- Requirements -----------------------------------------------------------------------------------------------------
NOT_IMPORTED = {"pytest-xdist", "ruff", "pytest-timeout", "imageio-ffmpeg", "pyserial"}  # tools; what others import
OPTIONAL = {"ogbench", "robosuite"}  # imported where used, behind a line that names the pip command
PEERS = {
    "gym",
    "jax",
    "lerobot",
    "sbx",
    "serl_launcher",
    "stable_baselines3",
}  # of benchmarks/peers.py, in interpreters of their own


def imported(source: str) -> set[str]:
    """The top-level packages that a source imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def test_requirements_are_what_is_imported():
    lines = [line.partition("#")[0].strip() for line in text("requirements.txt").splitlines()]
    pins = [re.fullmatch(r"([\w.-]+)==[\w.]+(?: *;.+)?", line) for line in lines if line]
    assert all(pins), "every line of requirements.txt is NAME==VERSION"
    pinned = {pin[1].lower() for pin in pins}
    files = [*map(REPO.joinpath, OWN_PYTHON), *REPO.glob("tests/*.py")]
    local = {path.stem for path in files} | {"common"} | set(sys.stdlib_module_names)
    third_party = set.union(*(imported(path.read_text()) for path in files)) - local - OPTIONAL - PEERS
    distributions = importlib.metadata.packages_distributions()
    providers = {name: {d.lower() for d in distributions.get(name, [name])} for name in third_party}
    missing = {name for name in third_party if not providers[name] & pinned}
    assert not missing, f"imported, but not in requirements.txt: {sorted(missing)}"
    unused = pinned - NOT_IMPORTED - set.union(*providers.values())
    assert not unused, f"in requirements.txt, but imported nowhere: {sorted(unused)}"


ONE_PROCESS = """
import os, sys
sys.path.insert(0, sys.argv[1])
__import__(sys.argv[2])
from torch import distributed, nn, ones, optim
distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
optim.Adam([nn.Parameter(ones(1))]).step()
distributed.all_reduce(ones(1))
distributed.destroy_process_group()
print(sorted(open(f"/proc/self/task/{thread}/comm").read() for thread in os.listdir("/proc/self/task")))
"""


@pytest.mark.parametrize("script", [name for name in SCRIPTS if "destroy_process_group" in (REPO / name).read_text()])
def test_a_process_group_ends_when_it_is_destroyed(script):
    """Its threads otherwise drop tensors while Python ends, and then and again abort the program."""
    command = [sys.executable, "-c", ONE_PROCESS, REPO, Path(script).stem]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and "python" in result.stdout and "gloo" not in result.stdout, result


# --- Numbers that a header or the README promises ---------------------------------------------------------------------
# A header promises results in lines of this form and nowhere else, and the file shows that it holds for every seed
# (or for their mean or median, where the line says so):
#   Expect: eval/success_rate >= 0.95, mean wall_s <= 180 (2 CPU cores) [benchmarks/results/sac_pick_default.csv]
#   Expect: median steps_per_second >= 3000 [benchmarks/results/franka_sim_speed.csv contender=franka_sim]
PROMISE = re.compile(r"(?:\b(mean|median) )?([A-Za-z_]\w*(?:/[A-Za-z_]+)?) (<=|>=|<|>) ([\d_.]*\d)")
SOURCE = re.compile(r"\[(benchmarks/results/[\w/-]+\.csv)((?: \w+=[^\s\]]+)*)\]")
RATES = r"(?:steps|updates|frames|it)/s|fps|SPS|(?:x|times) (?:as )?(?:fast|slow)"
UNITS = rf"%|percent|min\b|minutes?\b|hours?\b|[MG]B\b|{RATES}"
RESULT = re.compile(rf"\d[\d.,_]*\s?(?:{UNITS})")
COMPARE = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}


def header_faults(header: str, folder: Path) -> list[str]:
    """Every number that a header promises is shown by the file it names."""
    faults = []
    for line in header.splitlines():
        if line.startswith("Expect:"):
            faults += expect_faults(line, folder)
        elif RESULT.search(line):
            faults.append(f"a result outside an `Expect:` line: {line.strip()}")
    return faults


def expect_faults(line: str, folder: Path) -> list[str]:
    source, promises = SOURCE.search(line), PROMISE.findall(line)
    if not source or not promises:
        return [f"`{line}` does not read `Expect: NAME >= NUMBER, ... [benchmarks/results/ROW.csv]`"]
    rest = re.sub(r"\([^)]*\)", "", PROMISE.sub("", SOURCE.sub("", line)))  # hardware may stand in parentheses
    faults = [f"`{line}` holds a number that is not compared"] if re.search(r"\d", rest) or RESULT.search(rest) else []
    if not (folder / source[1]).exists():
        return [*faults, f"`{line}`: there is no {source[1]}"]
    with (folder / source[1]).open(newline="") as file:
        rows = list(DictReader(file))
    for condition in source[2].split():
        key, _, value = condition.partition("=")
        rows = [row for row in rows if row.get(key) == value]
    for statistic, name, sign, number in promises:
        cells = [row["value"] if row.get("metric") == name else row.get(name) for row in rows]
        if not cells or None in cells or "" in cells:
            faults.append(f"`{line}`: {source[1]} shows no {name}")
            continue
        values = [float(cell) for cell in cells]
        values = [getattr(statistics, statistic)(values)] if statistic else values
        if not all(COMPARE[sign](value, float(number)) for value in values):
            faults.append(f"`{line}`: {name} is {values}")
    return faults


@pytest.mark.parametrize("script", OWN_PYTHON)
def test_header_promises_nothing_unmeasured(script):
    assert header_faults(ast.get_docstring(ast.parse(text(script))) or "", REPO) == []


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("Expect: eval/success_rate >= 0.9 [benchmarks/results/row.csv]", None),
        ("Expect: mean eval/success_rate >= 0.94, wall_s <= 180 (2 cores) [benchmarks/results/row.csv]", None),
        ("Expect: eval/success_rate >= 1 [benchmarks/results/row.csv seed=2]", None),
        ("Expect: eval/success_rate >= 0.95 [benchmarks/results/row.csv]", "is [0.9, 1.0]"),
        ("Expect: mean eval/success_rate >= 0.96 [benchmarks/results/row.csv]", "is [0.95]"),
        ("Expect: wall_s < 100 [benchmarks/results/row.csv]", "is [100.0, 150.0]"),
        ("Expect: peak_mb <= 900 [benchmarks/results/row.csv]", "shows no peak_mb"),
        ("Expect: wall_s <= 180 [benchmarks/results/row.csv seed=3]", "shows no wall_s"),
        ("Expect: wall_s <= 180 [benchmarks/results/none.csv]", "there is no"),
        ("Expect: wall_s <= 180", "does not read"),
        ("Expect: success in 3 minutes [benchmarks/results/row.csv]", "does not read"),
        ("Expect: wall_s <= 180 in 12000 steps [benchmarks/results/row.csv]", "not compared"),
        ("It learns in 3 minutes.", "outside"),
        ("This reaches 95 % success.", "outside"),
        ("3,000 steps/s on one core", "outside"),
        ("50 Hz control, 2 ms physics, 100 steps, arXiv:1812.05905", None),
    ],
)
def test_unmeasured_promises_are_seen(tmp_path, line, fault):
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    rows = "seed,metric,value,wall_s\n1,eval/success_rate,0.9,100\n2,eval/success_rate,1.0,150\n"
    (tmp_path / "benchmarks/results/row.csv").write_text(rows)
    faults = header_faults(f"Title.\n\n{line}\n", tmp_path)
    assert faults == [] if fault is None else fault in "".join(faults)


# --- README -----------------------------------------------------------------------------------------------------------
def number_faults(readme: str) -> list[str]:
    """Paragraphs, outside the generated tables, that state a result without a file, a paper or a page that shows it."""
    written_by_hand = re.sub(r"<!-- results -->.*?<!-- /results -->", "", readme, flags=re.S)
    paragraphs = re.split(r"\n\s*\n|\n(?=[-|*] )", written_by_hand)
    sources = ("benchmarks/", "arXiv:", "https://")
    return [p.strip() for p in paragraphs if RESULT.search(p) and not any(source in p for source in sources)]


def test_readme_states_no_number_without_a_source():
    assert number_faults(text("README.md")) == []


def test_numbers_without_a_source_are_seen():
    assert number_faults("Fine.\n\nIt learns in 3 minutes.\n") == ["It learns in 3 minutes."]
    assert number_faults("- 95 % (`benchmarks/results/x.csv`)\n- 97 %\n") == ["- 97 %"]
    assert number_faults("<!-- results -->\n97 %\n<!-- /results -->\n") == []


def test_readme_is_short_and_lists_every_script():
    readme = text("README.md")
    assert re.sub(r"<!-- results -->.*<!-- /results -->", "", readme, flags=re.S).count("\n") <= 250
    tested = {path.name.removeprefix("test_") for path in REPO.glob("tests/test_*.py")}
    assert [name for name in tested - set(SCRIPTS) if (REPO / name).exists()] == []


def test_readme_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)[^)]*\)|`((?:benchmarks|tests|assets)/[\w/.-]+)`", text("README.md"))
    paths = [link or path for link, path in links]
    assert [path for path in paths if not path.startswith("http") and not (REPO / path).exists()] == []


def test_readme_has_the_two_commands():
    setup = "python3 -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt && "
    lines = [line for line in text("README.md").splitlines() if "-m venv" in line]
    assert lines == [setup + "python sac_state_sim.py --seed 1", setup + "python -m pytest"]
    assert "grep -m 1 'python -m pytest$'" in text(".ci/run")


# --- Commands of the README and the headers ---------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Command:
    script: str
    flags: tuple[str, ...]
    needs: str
    """what it needs beyond this machine; empty: it runs here"""


def commands_in(block: str) -> list[Command]:
    """`python SCRIPT.py FLAGS  # comment`, one per line, also behind `VAR=value` or in a chain with && or &."""
    found = []
    for line in block.replace("\\\n", " ").splitlines():
        if not re.match(r"\s*(?:\w+=\S* )*(?:python3? )", line):
            continue
        code, _, comment = line.partition(" #")
        tokens = shlex.split(code.replace("&&", " & ").replace(";", " & "))
        parts = " ".join(map(shlex.quote, tokens)).split("'&'")
        for part in map(shlex.split, parts):
            while part and re.match(r"\w+=", part[0]):
                part = part[1:]
            if len(part) > 1 and part[0].startswith("python") and part[1].endswith(".py"):
                needs = re.search(r"needs (.+)", comment)
                found.append(Command(part[1], tuple(part[2:]), needs[1] if needs else ""))
    return found


def all_commands() -> list[Command]:
    readme = (REPO / "README.md").read_text() if (REPO / "README.md").exists() else ""
    blocks = re.findall(r"^```(?:bash|sh)?\n(.*?)^```", readme, re.M | re.S)
    blocks += [ast.get_docstring(ast.parse(text(script))) or "" for script in OWN_PYTHON]
    return sorted({command for block in blocks for command in commands_in(block)}, key=str)


def command_name(command: Command) -> str:
    return " ".join([command.script, *command.flags])


def command_faults(command: Command, args_class: type) -> list[str]:
    try:
        tyro.cli(args_class, args=command.flags, console_outputs=False)
    except SystemExit:
        return [f"`python {command_name(command)}` is not accepted"]
    return []


def test_commands_are_found():
    block = """
        python a.py --x 1  # needs a GPU
        W=1 python b.py \\
            --y 'two words' && python c.py & python d.py
        python -m pytest
        Run python e.py by hand.
    """
    assert commands_in(block) == [
        Command("a.py", ("--x", "1"), "a GPU"),
        Command("b.py", ("--y", "two words"), ""),
        Command("c.py", (), ""),
        Command("d.py", (), ""),
    ]


def test_bad_commands_are_seen():
    @dataclasses.dataclass
    class Args:
        autotune: bool = True
        """tune the temperature"""

    assert command_faults(Command("a.py", ("--no-autotune",), ""), Args) == []
    assert command_faults(Command("a.py", ("--autotune", "False"), ""), Args) != []
    assert command_faults(Command("a.py", ("--autotone",), ""), Args) != []


@pytest.mark.parametrize("command", all_commands(), ids=command_name)
def test_command_parses(command):
    assert (REPO / command.script).exists()
    assert command_faults(command, args_of(command.script)) == []


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """Finished tiny runs, one per script, for the commands that say RUN_DIR."""

    @functools.cache
    def run_dir(script: str) -> Path:
        return run_script(script, *TINY[script].split(), cwd=tmp_path_factory.mktemp("finished")).run_dir

    return run_dir


@pytest.mark.parametrize(
    "command", [c for c in all_commands() if c.script in SCRIPTS and not c.needs], ids=command_name
)
def test_command_runs(command, finished_run, tmp_path):
    if "RUN_DIR" in command.flags:
        run_dir = finished_run(command.script)
        flags = [str(run_dir) if flag == "RUN_DIR" else flag for flag in command.flags]
        flags += GO_ON[command.script].split() if "--resume" in flags else []
    else:
        flags = [*command.flags, *TINY.get(command.script, "").split()]
    run_script(command.script, *flags, cwd=tmp_path)
