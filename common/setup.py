"""What a script starts and ends with: flags and --help, how it says no, whole files, PyTorch on this machine."""

import ast
import contextlib
import ctypes
import dataclasses
import errno
import inspect
import json
import os
import re
import subprocess
import sys
import textwrap
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeVar

import torch
import tyro
from torch import Tensor

T = TypeVar("T")
INDENT = {"initial_indent": " " * 8, "subsequent_indent": " " * 8}


class Fault(Exception):  # noqa: N818  it is the task's, not the program's
    """A task broke its rules, in one line that names the culprit. The run is saved, then it ends."""


@dataclass
class RunArgs:
    # experiment
    seed: int = 1
    """seed of everything: networks, sampling, exploration, training and evaluation episodes"""
    run_dir: str | None = None
    """directory to write to (default: a new one under runs/)"""
    resume: str | None = None
    """run directory to continue; its own flags are used, only a few (such as the number of steps) may change"""
    eval_only: str | None = None
    """run directory to evaluate: the last evaluation's episodes and a video, no training"""
    capture_video: bool = True
    """write an mp4 of the policy at the end (needs OpenGL: EGL or OSMesa)"""
    track: bool = False
    """mirror the TensorBoard scalars to Weights & Biases (WANDB_MODE=offline keeps them here)"""
    compile: bool = True
    """on a GPU: compile the losses and replay each update as one CUDA graph (a CPU is faster without)"""
    threads: int = 2
    """CPU threads for PyTorch"""
    amp: bool = False
    """bfloat16 matrix products: faster on a GPU, and on CPUs with AVX512-BF16 or AMX"""

    @classmethod
    def recipe(cls, given: dict[str, str]) -> dict[str, object]:
        """Defaults that depend on other flags, by name; `given`: what the command line says, --FLAG to value."""
        return {}

    def check(self) -> None:
        """Exits with one line when a value is out of its range or contradicts another."""


def fail(message: str) -> NoReturn:
    """Ends the program with one line on stderr and exit code 1."""
    raise SystemExit(f"{Path(sys.argv[0]).name}: {message}")


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def parse(Args: type[T], doc: str, may_change: str, argv: list[str] | None = None) -> T:  # noqa: N803
    """The command line; with --resume or --eval-only the run's own flags are the defaults.

    `may_change` names, separated by spaces, the flags that may differ from the run's. Exits with one line when flags
    contradict each other or the run. --help shows `doc`, then the flags in groups.
    """
    argv = absl_flags(Args, sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(argv):
        print(help_text(Args, doc))
        raise SystemExit(0)
    given = dict(zip(argv, argv[1:], strict=False))
    recipe = Args.recipe(given) if issubclass(Args, RunArgs) else {}
    args = tyro.cli(Args, args=argv, default=Args(**recipe))
    resume, eval_only = (getattr(args, name, None) for name in ("resume", "eval_only"))  # not every script has them
    run_dir = resume or eval_only
    if run_dir:
        if Path(run_dir).is_file():  # a checkpoint in the run's folder
            run_dir = str(Path(run_dir).parent)
        saved = read_flags(Args, run_dir, "--resume" if resume else "--eval-only")
        args = tyro.cli(Args, args=argv, default=saved)
        for name in vars(saved).keys() - set(may_change.split()):
            theirs = getattr(saved, name)
            if getattr(args, name) != theirs:
                fail(f"{flag(name)}: {run_dir} has {theirs}; leave the flag out, or start a new run")
        args.run_dir = run_dir
    args.check()
    return args


def absl_flags(Args: type, argv: list[str]) -> list[str]:  # noqa: N803
    """`--x_y=v` as `--x-y v`; for switches `--x=True` or `=1` as `--x`, `--x=False` or `=0` or `--nox` as `--no-x`."""
    switches = {flag(field.name) for field in dataclasses.fields(Args) if field.type is bool}
    tokens: list[str] = []
    for token in argv:
        name, equals, value = token.partition("=")
        if re.fullmatch(r"--[A-Za-z][\w-]*", name):
            name = flag(name[2:])
            if name.startswith("--no") and "--" + name[4:] in switches:
                name = "--no-" + name[4:]
            tokens += [name, value] if equals else [name]
        else:
            tokens.append(token)
        if len(tokens) > 1 and tokens[-2] in switches and tokens[-1].lower() in ("true", "1", "false", "0"):
            value = tokens.pop().lower()
            if value in ("false", "0"):
                tokens[-1] = f"--no-{tokens[-1][2:]}"
    return tokens


def read_flags(Args: type[T], run_dir: str, option: str) -> T:  # noqa: N803
    """The flags in `run_dir`. Exits with one line that names `option` when there are none."""
    try:
        saved = json.loads((Path(run_dir) / "args.json").read_text())
        if option == "--eval-only" and saved.get("record_dataset"):
            saved["record_dataset"] = None  # that was the training's last evaluation
        args = Args(**{name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()})
        args.check()
    except (OSError, ValueError, TypeError, AttributeError) as error:
        fail(f"{option} {run_dir}: no run of this script there ({error})")
    return args


def check_numbers(args: object, may_be_zero: set[str], fractions: set[str], any_sign: set[str] = frozenset()) -> None:
    """Exits with one line about a whole number below 1, a negative or infinite number, or a fraction above 1."""
    for name, value in vars(args).items():
        least = 0 if name in may_be_zero else 1
        if type(value) is int and value < least:
            fail(f"{flag(name)} {value}: give at least {least}")
        if type(value) is float and name not in any_sign and not 0 <= value < float("inf"):
            fail(f"{flag(name)} {value}: give a number that is not negative")
        if name in fractions and value > 1:
            fail(f"{flag(name)} {value}: give a number from 0 to 1")


def to_flags(args: object) -> list[str]:
    """The command line that gives these arguments."""
    tokens = []
    for name, value in vars(args).items():
        if isinstance(value, bool):
            tokens.append(flag(name) if value else f"--no-{flag(name)[2:]}")
        elif isinstance(value, tuple):
            tokens += [flag(name), *map(str, value)]
        elif value is not None:
            tokens += [flag(name), str(value)]
    return tokens


def help_text(Args: type, doc: str) -> str:  # noqa: N803
    """`doc`, then every flag with type, default and meaning, in the groups that comment lines in the class name."""
    entries: dict[str, tuple[str, str]] = {}  # of each flag, its group and its lines
    group = "flags"
    for owner in reversed([c for c in Args.__mro__ if dataclasses.is_dataclass(c)]):
        source = textwrap.dedent(inspect.getsource(owner))
        comments = [(i, line.strip()[2:]) for i, line in enumerate(source.splitlines(), 1) if line.startswith("    # ")]
        body = ast.parse(source).body[0].body
        for field, meaning in zip(body, body[1:], strict=False):
            if not (isinstance(field, ast.AnnAssign) and isinstance(meaning, ast.Expr)):
                continue
            group = [group, *(name for line, name in comments if line < field.lineno)][-1]
            name = field.target.id
            entry = usage(name, typing.get_type_hints(Args)[name], getattr(Args, name))
            text = textwrap.fill(" ".join(ast.literal_eval(meaning.value).split()), 100, **INDENT)
            first_group = entries[name][0] if name in entries else group
            entries[name] = (first_group, f"  {entry}\n{text}")
    parts = [doc.strip()]
    for group in dict.fromkeys(group for group, _ in entries.values()):
        lines = [text for where, text in entries.values() if where == group]
        parts.append(f"{group}:\n" + "\n".join(lines))
    return "\n\n".join(parts)


def usage(name: str, hint: object, default: object) -> str:
    """A flag with what it takes: `--utd-ratio INT (6)`."""
    if hint is bool:
        return f"{flag(name)} | --no-{flag(name)[2:]}  ({'on' if default else 'off'})"
    choices = re.findall(r"'(\w+)'", str(hint)) if "Literal" in str(hint) else []
    kinds = re.findall(r"\b(int|float|str)\b", str(hint))
    value = "{" + ",".join(choices) + "}" if choices else kinds[0].upper()
    if isinstance(default, tuple):
        return f"{flag(name)} [{value} ...]  ({' '.join(map(str, default)) or 'none'})"
    return f"{flag(name)} {value}  ({'none' if default is None else default})"


def check_new_folder(folder: str | Path) -> None:
    """Exits with one line when a run cannot be written there; makes nothing."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        fail(f"--run-dir {folder}: cannot be written, it is a file; give another name")
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if "args.json" in names:
        fail(f"--run-dir {folder}: has a run; --resume it, or give another name")
    if names - {"lost+found", "run.json.tmp"} and "run.json" not in names:  # with it: a run that was killed in there
        fail(f"--run-dir {folder}: is not empty; give another name")
    parent = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        fail(f"--run-dir {folder}: cannot be written, for {parent} takes no files; give another folder")


@contextlib.contextmanager
def ends_well(args: RunArgs) -> Iterator[None]:
    """Ctrl-C, a task's fault and a full or read-only disk end the program with one line that says how to go on."""
    try:
        with bar_closed():
            yield
    except KeyboardInterrupt:
        raise SystemExit(f"stopped; {go_on(args)}") from None
    except Fault as error:
        fail(f"{error}; then {go_on(args)}")
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            fail(f"{error}; make room, then {go_on(args)}")
        ours = args.run_dir and error.filename and Path(args.run_dir) in Path(error.filename).parents
        if ours and error.errno in (errno.EROFS, errno.EACCES):
            fail(f"{error}; make the folder writable, then {go_on(args)}")
        raise


@contextlib.contextmanager
def bar_closed() -> Iterator[None]:
    """Ends the progress bar's line, so that what is said next has one of its own."""
    from tqdm import tqdm

    try:
        yield
    finally:
        for bar in list(getattr(tqdm, "_instances", [])):
            bar.close()


def has_checkpoint(run_dir: str | Path | None) -> bool:
    """Whether a run has saved something to go on with."""
    return run_dir is not None and any((Path(run_dir) / f"checkpoint.{name}").exists() for name in ("pt", "previous"))


def go_on(args: RunArgs) -> str:
    """How an ended run is continued."""
    run_dir = args.run_dir
    if run_dir is None or not (Path(run_dir) / "args.json").exists():
        return "run the same command again"
    if has_checkpoint(run_dir):
        return f"go on with --resume {run_dir}"
    return f"begin again with --resume {run_dir}, nothing was saved yet"


# --- Files ------------------------------------------------------------------------------------------------------------
def write_atomically(path: Path, data: bytes) -> None:
    """The file is the old one or the new one, whenever the program or the machine stops."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def git_commit(folder: Path) -> str:
    """Commit that `folder` belongs to, with a + when files differ from it."""
    git = ["git", "describe", "--always", "--dirty=+", "--exclude=*", "--abbrev=40"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):  # no git, or no repository
        return subprocess.run(git, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    return "unknown"


# --- PyTorch ----------------------------------------------------------------------------------------------------------
def set_up_torch(threads: int, amp: bool) -> torch.device:
    """Precision, threads and memory for speed; the device: a GPU if there is one.

    Exits with one line when `amp` asks for bfloat16 of a CPU that would have to emulate it.
    """
    torch.set_num_threads(max(1, threads))
    torch.set_float32_matmul_precision("medium")  # a GPU's TF32; on a CPU oneDNN, on AMD twice as fast as MKL
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD: keep freed activations, rather than have the
        libc.mallopt(-3, 1 << 25)  # system map them anew in every update
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if amp and device.type == "cpu" and not cpu_has_bfloat16():
        fail("--amp: this CPU has no bfloat16 units (AVX512-BF16, AMX), which makes it 14 times slower; leave it out")
    return device


def cpu_has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 matrices itself; Linux, elsewhere no."""
    with contextlib.suppress(OSError):
        return bool(re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", Path("/proc/cpuinfo").read_text()))
    return False


def check_memory(needed: int, what: str, remedy: str) -> None:
    """Says what takes more than 1 GB (bytes) before it is taken. Exits with one line when there is not enough."""
    if needed < 1 << 30:
        return
    print(f"{what}: {needed / 1e9:.1f} GB", flush=True)
    free = free_memory()
    if needed > free:
        fail(f"{what} needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; {remedy}")


def free_memory() -> float:
    """Bytes that can still be taken, swap and other programs apart; infinite where the system does not say."""
    with contextlib.suppress(OSError):
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        return 1024.0 * int(found[1])
    return float("inf")


def pack_tensors(tensors: list[Tensor]) -> bytes:
    """Tensors one after the other, as float32."""
    return torch.cat([tensor.flatten() for tensor in tensors]).cpu().numpy().tobytes()


def unpack_tensors(data: bytes, tensors: list[Tensor]) -> None:
    """Fills `tensors` with what `pack_tensors` made of such. Exits with one line when they are not of these shapes."""
    vector = torch.frombuffer(bytearray(data), dtype=torch.float32)
    sizes = [tensor.numel() for tensor in tensors]
    if len(vector) != sum(sizes):
        fail("the learner's policy has another size; give actor and learner the same flags")
    for tensor, values in zip(tensors, vector.split(sizes), strict=True):
        tensor.copy_(values.reshape(tensor.shape))


def load_generator(generator: torch.Generator, state: Tensor, other_seed: int) -> None:
    """The generator as it was; `other_seed` when the state is a GPU's and is read on a CPU, or vice versa."""
    if state.shape == generator.get_state().shape:
        generator.set_state(state.cpu())
    else:
        generator.manual_seed(other_seed)


class Graphed:
    """A function of tensors on a GPU as one CUDA graph: everything that it launches is launched together.

    Its first `eager` calls run as usual on a side stream (they compile, and fill the optimizers), then one is captured
    for each value of the keyword arguments. The results are the same tensors in every call.
    """

    def __init__(self, function: Callable[..., dict[str, Tensor]], generator: torch.Generator, eager: int):
        self.function, self.generator, self.eager = function, generator, eager
        self.calls = 0
        self.graphs: dict[tuple, tuple] = {}

    def __call__(self, *inputs: Tensor, **options: bool) -> dict[str, Tensor]:
        self.calls += 1
        if self.calls <= self.eager:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                results = self.function(*inputs, **options)
            torch.cuda.current_stream().wait_stream(stream)
            return results
        key = tuple(options.items())
        if key not in self.graphs:
            graph = torch.cuda.CUDAGraph()
            static_inputs = [tensor.clone() for tensor in inputs]
            graph.register_generator_state(self.generator)
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # a loader pins memory meanwhile
                results = self.function(*static_inputs, **options)
            self.graphs[key] = graph, static_inputs, results
        graph, static_inputs, results = self.graphs[key]
        for static, tensor in zip(static_inputs, inputs, strict=True):
            static.copy_(tensor)
        graph.replay()
        return results
