"""Runs a script as a user does, but from a process that has already imported what it imports: 0.2 s a start, not 3.

The fork server (multiprocessing's own) imports once; every run is a fresh fork of it with flags, folder, environment
and output files of its own, and ends as Python ends a script: SystemExit's message, exit code, traceback.
"""

import contextlib
import multiprocessing
import os
import resource
import runpy
import sys
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

from conftest import REPO, Finished, find_run_dir, script_env

SLOW_IMPORTS = [
    "common.envs",
    "common.evaluation",
    "common.link",
    "common.run",
    "franka_sim",
    "probe_envs",
    "gymnasium.envs.mujoco",
    "torch.utils.tensorboard",
    "tqdm",
    "minari",
]
SLOW_IMPORTS += ["matplotlib.pyplot", "imageio.v2", "imageio.plugins.ffmpeg", "torch._dynamo"]


def child(name: str, flags: list[str], cwd: str, env: dict[str, str], outputs: list[str], max_file_bytes: int) -> None:
    """What `python name *flags` does, in a fork."""
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for number, output in enumerate(outputs, start=1):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout.reconfigure(line_buffering=True)
    sys.stderr.reconfigure(line_buffering=True)
    sys.argv = [str(REPO / name), *flags]
    if max_file_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
    runpy.run_module(Path(name).stem, run_name="__main__", alter_sys=True)


def context() -> multiprocessing.context.ForkServerContext:
    """The fork server, started in a script's environment."""
    fork_server = multiprocessing.get_context("forkserver")
    fork_server.set_forkserver_preload(SLOW_IMPORTS)
    before = dict(os.environ)
    wait_passively = {"OMP_WAIT_POLICY": "passive"}  # as the scripts do
    os.environ.update(script_env(Path("/nonexistent"), wait_passively))
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return fork_server


@contextlib.contextmanager
def popen_forked(
    name: str, *flags: object, cwd: Path, env: dict[str, str] | None = None, max_file_bytes: int = 0
) -> Iterator[BaseProcess]:
    """`conftest.popen_script` from the fork server; `max_file_bytes` stands for a disk that is full."""
    cwd.mkdir(parents=True, exist_ok=True)
    stem = f".{Path(name).stem}.{time.time_ns()}"
    outputs = [str(cwd / f"{stem}.stdout"), str(cwd / f"{stem}.stderr")]
    for output in outputs:
        Path(output).touch()
    arguments = (name, [str(flag) for flag in flags], str(cwd), script_env(cwd, env), outputs, max_file_bytes)
    process = context().Process(target=child, args=arguments)
    process.stdout_path, process.stderr_path = map(Path, outputs)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def run_forked(
    name: str, *flags: object, cwd: Path, timeout: float = 120.0, check: bool = True, **options: object
) -> Finished:
    """`conftest.run_script` from the fork server."""
    with popen_forked(name, *flags, cwd=cwd, **options) as process:
        process.join(timeout)
        code = process.exitcode
    stdout, stderr = process.stdout_path.read_text(), process.stderr_path.read_text()
    fault = f"did not end within {timeout} s" if code is None else f"exited with {code}" if check and code else None
    if fault:
        shown = " ".join(map(str, (name, *flags)))
        raise AssertionError(f"`python {shown}` {fault}\n--- stdout\n{stdout[-4000:]}\n--- stderr\n{stderr[-6000:]}")
    return Finished(code, stdout, stderr, find_run_dir(cwd, [str(flag) for flag in flags]))
