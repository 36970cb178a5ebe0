"""--robot franky on franky-sim (PyPI, Apache-2.0), which others wrote: the whole way, in a network of its own, because
both ports are fixed. `python -m pytest -m franky_sim` after `pip install franky-sim==1.0.4`."""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPO, run_script, script_env, wait_until
from robot_wire import Wire, follow, moved, serving

ENTER = ["unshare", "--map-root-user", "--net"]
CONTROLLER = """
import contextlib, os, sys
with contextlib.suppress(PermissionError):  # where allowed: in time on a busy machine, too
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(5))
sys.argv = ["franky-sim", "-s", "mujoco", "--hostname", "127.0.0.1"]
from franky_sim.run_server import main
main()
"""
FRANKY = "--robot", "franky", "--robot-ip", "127.0.0.1", "--frozen-after-s", 0.5  # it is written in Python itself


@contextlib.contextmanager
def controller(folder: Path) -> Iterator[subprocess.Popen]:
    """The simulated control cabinet, once it listens for arm and hand."""
    with (folder / "franky-sim.txt").open("ab") as output:
        process = subprocess.Popen([sys.executable, "-c", CONTROLLER], stdout=output, stderr=output)
    try:

        def listens() -> bool:
            return all(f":{port:04X} 00000000:0000 0A" in Path("/proc/net/tcp").read_text() for port in (1337, 1338))

        wait_until(listens, 60)
        yield process
    finally:
        process.kill()
        process.wait()


def a_day(folder: Path) -> dict[str, object]:
    """What a robot is used for, and what goes wrong; what was seen. In a network of its own."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    with controller(folder) as cabinet:
        doctor = run_script("robot_server.py", *FRANKY, "--doctor", cwd=folder, timeout=60, check=False).stdout
        with serving(folder, *FRANKY) as process, Wire(process.requests) as wire:
            seen = normal_day(wire) | {"doctor": doctor}
            seen |= frozen_controller(wire, cabinet)
            cabinet.kill()
            cabinet.wait()
            seen["killed"] = wire.wait_for(mode="fault", timeout=10)["fault"]["code"]
            with controller(folder):
                wire.take()
                seen["recovered"] = wire.done("recover")["status"]
                wire.stream()
                seen["streams again"] = wire.ask("target", pose=wire.state()["reference"])["mode"]
                process.send_signal(signal.SIGTERM)
                seen["exit code"] = process.wait(20)
    return seen


def normal_day(wire: Wire) -> dict[str, object]:
    seen: dict[str, object] = {"robot": wire.hello["robot"]}
    start = wire.stream()
    goal = moved(start, x=0.03)
    replies = follow(wire, lambda t: goal, 2.0)
    seen["reached"] = abs(replies[-1]["result"]["tcp_pose"][0] - goal[0])
    seen["gains"] = wire.ask("gains", stiffness=1000.0, damping=63.0)["result"]["stiffness"]
    follow(wire, lambda t: goal, 0.3)
    widths = []
    for closure in (1, 0):
        wire.ask("target", pose=goal, closure=closure)
        end = time.monotonic() + 15
        job = None
        while not (job and job["status"] == "done" and wire.state()["gripper_closure"] == closure):
            assert time.monotonic() < end, job
            job = wire.ask("target", pose=goal)["jobs"]["gripper"]
            time.sleep(0.05)
        widths.append(wire.state()["gripper_width"])
    seen["widths"] = widths
    faults = []
    for op in ("start", "reset", "start", "start"):  # at the end of an episode, and at once the next one's beginning
        wire.stream()
        follow(wire, lambda t: wire.state()["reference"], 0.2)
        wire.ask("stop")
        wire.job(op, **({"speed": 0.5} if op == "reset" else {}))
        faults.append(wire.state()["fault"])
    seen["faults of stop, then start or reset"] = [fault for fault in faults if fault]
    wire.stream()
    modes = []
    end = time.monotonic() + 6
    while (mode := wire.state()["mode"]) != "idle" and time.monotonic() < end:
        modes += [mode] if mode not in modes else []
        time.sleep(0.01)
    seen["silent"] = [*modes, mode]
    wire.take()
    q = [value + 0.1 for value in wire.state()["q"]]
    wire.done("move_joints", q=q, speed=0.3)
    seen["joints"] = max(abs(a - b) for a, b in zip(wire.state()["q"], q))
    return seen


def frozen_controller(wire: Wire, cabinet: subprocess.Popen) -> dict[str, object]:
    start = wire.stream()
    follow(wire, lambda t: start, 0.5)
    os.kill(cabinet.pid, signal.SIGSTOP)
    frozen = time.monotonic()
    code = wire.wait_for(mode="fault", timeout=10)["fault"]["code"]
    after = time.monotonic() - frozen
    os.kill(cabinet.pid, signal.SIGCONT)
    time.sleep(1.0)
    wire.take()
    wire.done("recover")
    wire.stream()
    return {"frozen": code, "frozen after": after, "mode after recover": wire.state()["mode"]}


@pytest.mark.franky_sim
def test_a_day_with_franky_sim(tmp_path):
    if importlib.util.find_spec("franky_sim") is None or importlib.util.find_spec("franky") is None:
        pytest.skip("needs pip install franky-control==2.0.0 franky-sim==1.0.4")
    if not (shutil.which("unshare") and shutil.which("ip")) or subprocess.run([*ENTER, "true"]).returncode:
        pytest.skip("network namespaces are not allowed here")
    command = [*ENTER, sys.executable, __file__, str(tmp_path)]
    environment = script_env(tmp_path) | {"PYTHONPATH": f"{REPO}/tests"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280, cwd=tmp_path)
    assert result.returncode == 0, f"{result.stderr[-3000:]}\n{(tmp_path / 'robot_server.log').read_text()[-2000:]}"
    seen = json.loads(result.stdout.splitlines()[-1])
    assert "ok    robot at 127.0.0.1: interface version 10" in seen["doctor"]
    assert seen["robot"]["firmware"] == 10 and seen["robot"]["libfranka"]
    assert seen["reached"] < 0.005 and seen["gains"] == 1000.0 and seen["joints"] < 0.02
    assert seen["widths"][0] < 0.01 and seen["widths"][1] > 0.07
    assert seen["faults of stop, then start or reset"] == []
    assert seen["silent"] == ["streaming", "hold", "stopping", "idle"]
    assert seen["frozen"] in ("frozen", "sdk") and seen["frozen after"] < 1.5
    assert seen["mode after recover"] == seen["streams again"] == "streaming"
    assert seen["killed"] in ("frozen", "sdk") and seen["recovered"] == "done" and seen["exit code"] == 0


if __name__ == "__main__":
    socket.setdefaulttimeout(30)
    print(json.dumps(a_day(Path(sys.argv[1]))))
