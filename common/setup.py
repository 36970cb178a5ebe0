"""What a script starts and ends with: flags and --help, how it says no, whole files, a process beside it."""

import ast
import contextlib
import ctypes
import dataclasses
import errno
import fcntl
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeVar

import tyro
from tqdm import tqdm

T = TypeVar("T")
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


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
    """CPU threads for PyTorch; two share an update"""
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
    """The command line; with --resume or --eval-only the run's own flags, of which `may_change` (x y z) may differ.

    Exits with one line when flags contradict each other or the run. --help shows `doc`, then the flags in groups.
    """
    argv = absl_flags(Args, sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(argv):
        print(help_text(Args, doc))
        raise SystemExit(0)
    recipe = Args.recipe(dict(zip(argv, argv[1:], strict=False))) if issubclass(Args, RunArgs) else {}
    args = tyro.cli(Args, args=argv, default=Args(**recipe))
    resume, eval_only = (getattr(args, name, None) for name in ("resume", "eval_only"))  # not every script has them
    if (resume and eval_only) or "" in (resume, eval_only):  # as of a shell's variable that is not set
        fail(f"--resume {resume}, --eval-only {eval_only}: give one of them, and the folder of a run")
    if run_dir := resume or eval_only:
        run_dir = str(Path(run_dir).parent) if os.path.isfile(run_dir) else run_dir  # or a checkpoint in its folder
        saved = read_flags(Args, run_dir, "--resume" if resume else "--eval-only")
        args = tyro.cli(Args, args=argv, default=saved)
        if args.run_dir not in (None, run_dir):
            fail(f"--run-dir {args.run_dir}: the run stays in {run_dir}; to go on elsewhere, copy that folder first")
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
        dataset = saved.pop("record_dataset", None)  # may be there by now
        args = Args(**{name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()})
        args.check()
        if dataset and option == "--resume":  # else that was the training's last evaluation
            args.record_dataset = dataset
    except (OSError, ValueError, TypeError, AttributeError) as error:
        fail(f"{option} {run_dir}: no run of this script there ({error})")
    return args


def check_numbers(args: object, may_be_zero: set[str], fractions: set[str], any_sign: set[str] = frozenset()) -> None:
    """Exits with one line about a whole number below 1, a negative or no finite number, or a fraction above 1."""
    for name, value in vars(args).items():
        least = 0 if name in may_be_zero else 1
        if args.__annotations__.get(name) == tuple[int, ...] and min(value, default=0) < least:  # widths of layers
            fail(f"{flag(name)} {value}: give one number or more, each at least {least}")
        if type(value) is int and name not in any_sign and not least <= value < 2**63:
            fail(f"{flag(name)} {value}: give at least {least}, and less than 2**63")
        lowest = -sys.float_info.max if name in any_sign else 0
        if type(value) is float and not lowest <= value <= sys.float_info.max:
            fail(f"{flag(name)} {value}: give a number that is {'finite' if lowest else 'not negative'}")
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
            text = textwrap.indent(textwrap.fill(" ".join(ast.literal_eval(meaning.value).split()), 92), " " * 8)
            first_group = entries[name][0] if name in entries else group
            entries[name] = (first_group, f"  {entry}\n{text}")
    parts = [doc.strip()]
    for group in dict.fromkeys(group for group, _ in entries.values()):
        parts.append(f"{group}:\n" + "\n".join(text for where, text in entries.values() if where == group))
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
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if "args.json" in names:
        fail(f"--run-dir {folder}: has a run; --resume it, or give another name")
    if names - {"lost+found", "run.json.tmp", "run.lock"} and "run.json" not in names:  # with it: one that was killed
        fail(f"--run-dir {folder}: is not empty; give another name")
    parent = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        fail(f"--run-dir {folder}: cannot be written, for {parent} takes no files; give another folder")


@contextlib.contextmanager
def ends_well(args: RunArgs) -> Iterator[None]:
    """Ctrl-C, SIGTERM, a task's fault or exit, a full or read-only disk end the program with one line: how to go on."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # also gives the terminal back
    try:
        try:
            yield
        finally:
            for bar in list(getattr(tqdm, "_instances", [])):  # so that what is said next has a line of its own
                bar.close()
    except KeyboardInterrupt:
        raise SystemExit(f"stopped; {go_on(args)}") from None
    except Fault as error:
        fail(f"{error}; then {go_on(args)}")
    except SystemExit as error:
        if str(error.code).startswith(f"{Path(sys.argv[0]).name}: "):  # from `fail`
            raise
        fail(f"the task ended the program by sys.exit({error.code!r}); {go_on(args)}")
    except Exception as error:
        error.add_note(f"{Path(sys.argv[0]).name}: {go_on(args)}")  # below the traceback of a task's own bug
        if not isinstance(error, OSError):
            raise
        if error.errno in (errno.EPIPE, errno.EBADF):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes it once more
            fail(f"stdout was closed ({error}); {go_on(args)}")
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            fail(f"{error}; make room, then {go_on(args)}")
        ours = args.run_dir and error.filename and Path(args.run_dir).absolute() in Path(error.filename).parents
        if ours and error.errno in (errno.EROFS, errno.EACCES):
            fail(f"{error}; make the folder writable, then {go_on(args)}")
        raise


def has_checkpoint(run_dir: str | Path | None) -> bool:
    """Whether a run has saved something to go on with."""
    return run_dir is not None and any(os.path.exists(f"{run_dir}/checkpoint.{name}") for name in ("pt", "previous"))


def go_on(args: RunArgs) -> str:
    """How an ended run is continued."""
    if args.run_dir is None or args.eval_only or not os.path.exists(f"{args.run_dir}/args.json"):
        return "run the same command again"
    if has_checkpoint(args.run_dir):
        return f"go on with --resume {args.run_dir}"
    return f"begin again with --resume {args.run_dir}, nothing was saved yet"


# --- Files ------------------------------------------------------------------------------------------------------------
def write_atomically(path: Path, data: bytes) -> None:
    """The file is the old one or the new one, whenever the program or the machine stops."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def hold(path: Path, message: str) -> typing.IO[str]:
    """The open file `path`, locked while this process lives. Exits with `message`, PID being its holder's, if taken."""
    file = path.open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, what was forked does not have it
    except BlockingIOError:
        fail(message.replace("PID", path.read_text()))
    except OSError as error:  # a network drive that knows no locks
        print(f"{path}: {error.strerror}; see to it that no second process works there", file=sys.stderr)
    file.truncate(0)
    print(os.getpid(), end="", file=file, flush=True)
    return file


def git_commit(folder: Path) -> str:
    """Commit that `folder` belongs to, with a + when files differ from it."""
    git = ["git", "describe", "--always", "--dirty=+", "--exclude=*", "--abbrev=40"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):  # no git, or no repository
        return subprocess.run(git, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    return "unknown"


# --- Processes --------------------------------------------------------------------------------------------------------
class Child:
    """`python SCRIPT` beside this process, at a lower priority; started again when it is killed, ended with this one.

    With the flags `new`, or `again` once there is a run in `folder`; its output goes to a file beside that.
    """

    def __init__(self, script: str, new: list[str], again: list[str], folder: Path):
        self.script, self.new, self.again, self.folder = script, new, again, folder
        self.log = folder.with_suffix(".log")
        self.lock = folder.with_suffix(".lock")
        self.start()

    def start(self) -> None:
        """Waits for one whose parent was killed, and which may still be saving: it holds the lock while it lives."""
        with self.log.open("ab") as log, self.lock.open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for the {self.folder.name} of an earlier start, which has not ended", file=sys.stderr)
                fcntl.flock(lock, fcntl.LOCK_EX)
            flags = self.again if (self.folder / "args.json").exists() else self.new
            self.process = subprocess.Popen(
                [sys.executable, os.path.abspath(self.script), *flags],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                pass_fds=[lock.fileno()],
                preexec_fn=end_with_parent,
                start_new_session=True,
            )

    def finished(self) -> bool:
        """Whether it has ended well; one that was killed is started again, one that gave up ends this, too."""
        code = self.process.poll()
        if code is None or code == 0:
            return code == 0
        if code > 0:
            last = self.log.read_text(errors="replace").strip().splitlines()[-1]
            both = f"--resume {self.folder.parent}"  # what goes on with parent and child
            why = (last.partition(".py: ")[2] or last).replace(f"--resume {self.folder}", both)
            fail(f"the {self.folder.name} ended: {why} (see {self.log})")
        print(f"the {self.folder.name} was ended by signal {-code} and is started again", file=sys.stderr, flush=True)
        self.start()
        return False

    def end(self) -> None:
        """Asks it to end, and waits until it has saved and done so."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.process.wait()


def end_with_parent() -> None:
    """In the child, before it runs: a lower priority, and SIGTERM when its parent dies (Linux)."""
    os.nice(10)
    if LIBC:
        LIBC.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
