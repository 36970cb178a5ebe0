"""Helpers for tests that run a script as a user does and read back what it wrote.

    from conftest import REPO, popen_script, read_csv, read_scalars, run_script

    def test_learns(tmp_path):
        run = run_script("sac_state_sim.py", "--total-timesteps", 300, cwd=tmp_path)
        assert read_csv(run.run_dir, "eval.csv")["global_step"][-1] == 300

Tests that need minutes, a GPU or other packages carry @pytest.mark.slow, gpu or ecosystem and run only when asked for.
"""

import contextlib
import csv
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
WORKERS = 2  # processes that share the whole suite, a file at a time
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell, and their children, ignore it
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # what nohup starts, ignores it
sys.path.insert(0, str(REPO))  # so that tests import from the scripts: `from sac_state_sim import Actor`


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """`pytest` without a file runs in WORKERS processes, if pytest-xdist is there; `pytest -n 0` in this one."""
    alone = hasattr(config, "workerinput") or config.option.file_or_dir or config.option.usepdb
    if config.pluginmanager.hasplugin("xdist") and not alone and config.option.numprocesses is None:
        config.option.numprocesses, config.option.dist = WORKERS, "loadfile"
        config.option.maxworkerrestart = "0"  # loadfile of 3.8.0 waits forever for a worker that replaces a crashed one


@dataclass(frozen=True)
class Finished:
    """A script that has ended."""

    returncode: int
    stdout: str
    stderr: str
    run_dir: Path | None
    """--run-dir, or the newest folder under runs/; None if there is none"""


def script_env(cwd: Path, env: dict[str, str] | None = None) -> dict[str, str]:
    """The caller's environment without GPU, display, wandb and the user's own data sets, plus `env`."""
    removed = ("DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL", "PYTHONPATH")
    result = {name: value for name, value in os.environ.items() if name not in removed}
    result |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    result |= {"CUDA_VISIBLE_DEVICES": "", "WANDB_MODE": "disabled", "PYTHONUNBUFFERED": "1", "COLUMNS": "120"}
    result |= {"MINARI_DATASETS_PATH": str(cwd / "minari")}
    return result | (env or {})


@contextlib.contextmanager
def popen_script(
    name: str, *flags: object, cwd: Path, env: dict[str, str] | None = None, stdin: int = subprocess.DEVNULL
) -> Iterator[subprocess.Popen]:
    """Start `python name *flags` in `cwd`, for tests that signal or kill it; it and its children end with the block.

    Its output goes to the files `process.stdout_path` and `process.stderr_path`, so that it never waits for a reader.
    """
    cwd.mkdir(parents=True, exist_ok=True)
    stem = f".{Path(name).stem}.{time.time_ns()}"
    stdout_path, stderr_path = cwd / f"{stem}.stdout", cwd / f"{stem}.stderr"
    command = [sys.executable, str(REPO / name), *map(str, flags)]  # REPO / "/absolute" is "/absolute"
    with stdout_path.open("wb") as out, stderr_path.open("wb") as err:
        process = subprocess.Popen(
            command, cwd=cwd, env=script_env(cwd, env), stdin=stdin, stdout=out, stderr=err, start_new_session=True
        )
    process.stdout_path, process.stderr_path = stdout_path, stderr_path
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdin:
            process.stdin.close()


def run_script(
    name: str, *flags: object, cwd: Path, timeout: float = 120.0, env: dict[str, str] | None = None, check: bool = True
) -> Finished:
    """Run `python name *flags` in `cwd` to its end.

    Raises AssertionError with the script's last output if it takes longer than `timeout` seconds or, with `check`,
    if it does not exit with 0.
    """
    with popen_script(name, *flags, cwd=cwd, env=env) as process:
        try:
            process.wait(timeout)
            fault = f"exited with {process.returncode}" if check and process.returncode else None
        except subprocess.TimeoutExpired:
            fault = f"did not end within {timeout} s"
    stdout, stderr = process.stdout_path.read_text(), process.stderr_path.read_text()
    if fault:
        shown = " ".join(map(str, (name, *flags)))
        raise AssertionError(f"`python {shown}` {fault}\n--- stdout\n{stdout[-4000:]}\n--- stderr\n{stderr[-6000:]}")
    return Finished(process.returncode, stdout, stderr, find_run_dir(cwd, [str(flag) for flag in flags]))


def find_run_dir(cwd: Path, flags: list[str]) -> Path | None:
    """The folder that `--run-dir` names, else the newest under cwd/runs."""
    for i, flag in enumerate(flags):
        if flag.replace("_", "-").startswith("--run-dir"):
            return cwd / (flag.split("=", 1)[1] if "=" in flag else flags[i + 1])
    run_dirs = [path for path in cwd.glob("runs/*") if path.is_dir()]
    return max(run_dirs, key=lambda path: path.stat().st_mtime, default=None)


def read_csv(run_dir: Path, name: str) -> dict[str, list[float]]:
    """Column name -> numbers, one per line; an empty cell is NaN."""
    with (run_dir / name).open(newline="") as file:
        reader = csv.DictReader(file)
        lines = list(reader)
    return {column: [float(line[column] or "nan") for line in lines] for column in reader.fieldnames or []}


def read_scalars(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag -> (step, value) pairs, from the TensorBoard event files in `run_dir`."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def wait_until(condition: Callable[[], object], timeout: float = 120.0) -> None:
    """Poll until `condition()` is true; AssertionError after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout} s in vain"
        time.sleep(0.05)


@contextlib.contextmanager
def held_elsewhere(path: Path) -> Iterator[int]:
    """Another process has this lock; its number."""
    code = "import pathlib, sys; from common.setup import hold; file = hold(pathlib.Path(sys.argv[1]), ''); "
    command = [sys.executable, "-c", code + "print(flush=True); input()", path]
    with subprocess.Popen(command, cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"\n"
        yield process.pid
        process.kill()


# --- Runs read back ---------------------------------------------------------------------------------------------------
TIMES = ("wall_s", "charts/SPS", "time/act_ms", "time/env_ms", "time/update_ms")


def read_checkpoint(run_dir: Path) -> dict:
    import torch

    return torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=True)


def leaves(state: object, path: str = "") -> dict[str, object]:
    """Path -> leaf, of nested dicts and lists."""
    if isinstance(state, dict):
        parts = state.items()
    elif isinstance(state, list | tuple):
        parts = enumerate(state)
    else:
        return {path: state}
    return {name: leaf for key, part in parts for name, leaf in leaves(part, f"{path}/{key}").items()}


def same(one: object, other: object) -> bool:
    """Equal numbers or tensors; NaN is NaN."""
    import torch

    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return one == other or (one != one and other != other)


def differences(one: Path, other: Path) -> list[str]:
    """Names of what differs between two runs' checkpoints, but for the time that they took."""
    ours, theirs = (leaves(read_checkpoint(run_dir)) for run_dir in (one, other))
    names = (ours.keys() | theirs.keys()) - {"/run/elapsed"}
    return sorted(
        name for name in names if name not in ours or name not in theirs or not same(ours[name], theirs[name])
    )


def table(run_dir: Path, name: str) -> dict[str, list[str]]:
    """A CSV without the columns that measure time; comparable with ==, NaN is NaN."""
    return {key: [str(x) for x in column] for key, column in read_csv(run_dir, name).items() if key not in TIMES}


def one_line(result: Finished, name: str) -> str:
    """The error of script `name`, which must have ended with one line on stderr and no traceback."""
    assert result.returncode not in (0, None), result.stdout
    assert "Traceback" not in result.stderr, result.stderr
    lines = re.split("[\r\n]", result.stderr)
    errors = [line for line in lines if line.strip() and not re.search(r"(step|update)/s|s/(step|update)", line)]
    assert len(errors) == 1 and errors[0].startswith(f"{name}: "), result.stderr
    return errors[0]


def free_port() -> int:
    """The first of two free ports that the system does not hand out by itself: they are still free later."""
    for port in random.Random().sample(range(20_000, 32_000), 100):
        with contextlib.suppress(OSError):
            for number in (port, port + 1):
                socket.create_server(("127.0.0.1", number)).close()
            return port
    raise AssertionError("no free ports")


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Finished:
    """A run of sac_state_sim.py to read; tests that change it copy it first."""
    from state_runs import WITH_DEMOS, run

    return run(*WITH_DEMOS, "--capture-video", "--run-dir", "run", cwd=tmp_path_factory.mktemp("finished"))
