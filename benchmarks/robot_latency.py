"""Round trips, step periods and load of robot_server.py with the simulated arm, measured on one machine.

    python benchmarks/robot_latency.py                                       # everything but Flask
    python benchmarks/robot_latency.py --flask-python FLASK_VENV/bin/python  # with SERL's way of serving beside it
    python benchmarks/robot_latency.py --rounds 1 --requests 500 --episodes 1 --minutes 0.2    # a quick look

robot_round_trip.csv: what it costs a client on the server's machine to send a target and to learn the state while the
arm moves in real time, its physics at 1 kHz. Contender `ours` is RobotClient.target, whose answer brings the state. The
others ask a Flask development server in JSON, which has no arm at all to move: `flask` with POST /pose and POST
/getstate, as SERL does (serl_robot_infra/robot_servers/franka_server.py), `flask_single` with one POST for both, by
Python's own http.client over a connection that stays open, which is as fast as this way can be.
robot_period.csv: the period of FrankaReal-v0's steps at 10 Hz with two cameras and a random policy that opens and
closes the gripper, over episodes of 100 steps: as the environment itself reports it (mean_period_ms, late_*_ms,
overruns), and as a clock outside saw the ends of the steps (jitter_*_ms; drift_ms, the whole episode's length against
its schedule). `serl_loop` waits 0.6 s for the gripper, 1/hz after each command, and then reads state and images, as
SERL's env does (franka_env/envs/franka_env.py:229). `machine` waits for the same beats and does nothing else: what the
machine itself adds.
robot_load.csv: CPU of one core and memory of the server while it streams with all its publications, and how many of its
control ticks came more than 5 ms late; `machine_late` counts the same in a process that only sleeps.
On a machine that others use, too, start it with `chrt -f 20`: all contenders then go before the others. The column
`priority` says so. server_mb is the server's largest resident memory, with OpenGL where there are cameras.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import tyro
from run import REPO, RESULTS, commit, hardware
from speed import write_anew

sys.path.insert(0, str(REPO))
import robot_client

# SERL's server without ROS and robot: it answers with the fields and sizes of the original. Prints its port.
FLASK = """
import logging, threading
from flask import Flask, jsonify, request
from werkzeug.serving import make_server
app, pose = Flask(__name__), [0.45, 0.0, 0.3, 1.0, 0.0, 0.0, 0.0]
logging.getLogger("werkzeug").setLevel(logging.ERROR)

@app.route("/pose", methods=["POST"])
def set_pose():
    pose[:] = request.json["arr"]
    return "Moved"

@app.route("/both", methods=["POST"])
def both():
    set_pose()
    return get_state()

@app.route("/getstate", methods=["POST"])
def get_state():
    state = dict(pose=pose, vel=[0.123456789] * 6, force=[1.23456789] * 3, torque=[0.123456789] * 3)
    state |= dict(q=[0.123456789] * 7, dq=[0.123456789] * 7, jacobian=[[0.123456789] * 7] * 6, gripper_pos=0.5)
    return jsonify(state)

server = make_server("127.0.0.1", 0, app, threaded=True)  # what `flask run` and app.run() use
print(server.server_port, flush=True)
server.serve_forever()
"""
# Its client. Asks as often as standard input says and prints what each time took, in ms.
FLASK_CLIENT = """
import http.client, json, sys, time
import requests
url, single = f"http://127.0.0.1:{sys.argv[1]}/", sys.argv[2] == "flask_single"
connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]))
headers, target = {"Content-Type": "application/json"}, {"arr": [0.45, 0.0, 0.3, 1.0, 0.0, 0.0, 0.0]}
for line in sys.stdin:
    times = []
    for _ in range(int(line)):
        start = time.perf_counter()
        if single:
            connection.request("POST", "/both", json.dumps(target), headers)
            json.loads(connection.getresponse().read())
        else:
            requests.post(url + "pose", json=target)
            requests.post(url + "getstate").json()
        times.append(1000 * (time.perf_counter() - start))
    print(json.dumps(times), flush=True)
"""
LATE_S = 0.005


# --- Args -------------------------------------------------------------------------------------------------------------
@dataclass
class Args:
    flask_python: str | None = None
    """interpreter that can import flask and requests"""
    rounds: int = 5
    """measurements of each contender; they take turns"""
    requests: int = 2000
    """targets and states in each measurement"""
    episodes: int = 5
    """episodes of 100 steps, of each kind"""
    minutes: float = 10.0
    """how long the load is watched"""
    output: Path = RESULTS
    """folder for the three files"""


# --- The server -------------------------------------------------------------------------------------------------------
@contextmanager
def server(*flags: str) -> Iterator[tuple[str, int]]:
    """robot_server.py on free ports: its address and process id."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as output:
        command = [sys.executable, REPO / "robot_server.py", "--port", "0", *flags]
        with subprocess.Popen(command, cwd=folder, stdout=output, stderr=subprocess.STDOUT) as process:
            try:
                yield serving_at(process, output), process.pid
            finally:
                process.send_signal(signal.SIGTERM)


def serving_at(process: subprocess.Popen, output: Any) -> str:
    for _ in range(600):
        output.seek(0)
        if found := re.search(r"serving on (tcp://\S+)", text := output.read()):
            return found[1]
        if process.poll() is not None:
            break
        time.sleep(0.1)
    raise SystemExit(f"robot_server.py did not start:\n{text}")


def usage(pid: int) -> tuple[float, float]:
    """CPU time of a server's processes so far (s) and their largest resident memory (MB)."""
    seconds = megabytes = 0.0
    for process in (pid, *Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        seconds += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        megabytes += int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process}/status").read_text())[1]) / 1024
    return seconds, megabytes


# --- Round trips ------------------------------------------------------------------------------------------------------
def ours(client: robot_client.RobotClient) -> Callable[[int], list[float]]:
    """Moves the arm to and fro at up to 0.1 m/s and measures what a target and the state cost, in ms."""
    start = client.state()["tcp_pose"]

    def measure(count: int) -> list[float]:
        client.acquire(ttl_s=10.0)  # anew: the others' turns were longer than that
        client.job("start")
        times = []
        for _ in range(count):
            pose = start.copy()
            pose[1] += 0.05 * np.sin(2 * time.monotonic())
            asked = time.perf_counter()
            assert "tcp_pose" in client.target(pose)["result"]
            times.append(1000 * (time.perf_counter() - asked))
        return times

    return measure


@contextmanager
def flask(python: str) -> Iterator[dict[str, Callable[[int], list[float]]]]:
    """Two ways of asking a Flask server."""
    processes = [subprocess.Popen([python, "-c", FLASK], stdout=subprocess.PIPE, text=True)]
    port = processes[0].stdout.readline().strip()
    contenders = {}
    for name in ("flask", "flask_single"):
        command = [python, "-c", FLASK_CLIENT, port, name]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        processes.append(process)

        def measure(count: int, process: subprocess.Popen = process) -> list[float]:
            process.stdin.write(f"{count}\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        contenders[name] = measure
    try:
        yield contenders
    finally:
        for process in processes:
            process.kill()
            process.wait()


def round_trips(args: Args) -> list[dict[str, object]]:
    lines = []
    with server() as (address, _):
        client = robot_client.RobotClient(address)
        contenders = {"ours": ours(client)}

        def go() -> None:
            for number in range(args.rounds):
                for name, measure in contenders.items():
                    times = measure(args.requests)
                    values = {f"p{p}_ms": round(float(np.percentile(times, p)), 4) for p in (50, 90, 99)}
                    lines.append({"contender": name, "round": number, "requests": args.requests, **values})
                    lines[-1]["max_ms"] = round(max(times), 3)
                    print(f"{name:14} {values}")

        if args.flask_python:
            with flask(shutil.which(args.flask_python) or args.flask_python) as others:
                contenders |= others
                go()
        else:
            go()
        client.close()
    return lines


# --- Periods ----------------------------------------------------------------------------------------------------------
def periods(times: list[float], hz: float) -> dict[str, float]:
    """Jitter and drift of the ends of steps (s), in ms."""
    jitter = 1000 * np.abs(np.diff(times) - 1 / hz)
    names = {f"jitter_p{p}_ms": round(float(np.percentile(jitter, p)), 4) for p in (50, 99)}
    drift = 1000 * (times[-1] - times[0] - (len(times) - 1) / hz)
    return names | {"jitter_max_ms": round(float(jitter.max()), 3), "drift_ms": round(drift, 3)}


def reported(beats: list[tuple[float, float]]) -> dict[str, float]:
    """Of the periods and latenesses (s) that a loop reports, in ms."""
    period, late = 1000 * np.array(beats).T
    percentiles = {f"late_p{p}_ms": round(float(np.percentile(late, p)), 4) for p in (50, 99)}
    return {"mean_period_ms": round(float(period.mean()), 4), **percentiles, "late_max_ms": round(float(late.max()), 3)}


def serl_step(robot: robot_client.FrankaEnv, action: np.ndarray) -> None:
    closed = float(action[-1] > 0)
    if abs(action[-1]) > robot_client.GRIPPER_THRESHOLD and closed != robot.closure:
        robot.closure = robot.ordered = closed
        robot.client.target(robot.client.state()["reference"], closed)
        time.sleep(0.6)
    robot.client.target(robot.client.state()["reference"], robot.ordered)
    time.sleep(1 / robot.config.hz)
    robot.look()
    robot.observe()


def episodes(args: Args) -> list[dict[str, object]]:
    lines = []
    with server("--env-id", "FrankaPegInsert-v0") as (address, pid):
        config = replace(robot_client.PEG, server=address)
        env = gym.make("robot_client:FrankaReal-v0", config=config)
        robot, actions = env.unwrapped, np.random.default_rng(0)
        for episode in range(args.episodes):
            for name in ("ours", "serl_loop", "machine"):
                env.reset(seed=episode)
                pace, beats, times = robot_client.Pace(config.hz), [], []
                for _ in range(100):
                    action = actions.uniform(-1, 1, env.action_space.shape).astype(np.float32)
                    action[:-1] *= 0.3
                    if name == "ours":
                        *_, info = env.step(action)
                        if info["fault"]:
                            raise SystemExit(f"the episode broke off: {info['fault']}")
                        beats.append((info["period_s"], info["late_s"]))
                    elif name == "serl_loop":
                        serl_step(robot, action)
                    else:
                        beats.append(pace.wait())
                    times.append(time.perf_counter())
                line = {"contender": name, "episode": episode, "steps": 100, "hz": config.hz, "cameras": 2}
                line |= reported(beats) if beats else dict.fromkeys(reported([(0, 0)]), "")
                line["overruns"] = info["overruns"] if name == "ours" else ""
                line |= periods(times, config.hz) | {"server_mb": round(usage(pid)[1], 1)}
                lines.append(line)
                print(f"{name:14} {line}")
        env.close()
    return lines


# --- Load -------------------------------------------------------------------------------------------------------------
LATE = """
import sys, time
due, late, worst = time.monotonic(), 0, 0.0
end = due + float(sys.argv[1])
while due < end:
    due += 0.004
    time.sleep(max(due - time.monotonic(), 0))
    behind = time.monotonic() - due
    late, worst = late + (behind > float(sys.argv[2])), max(worst, behind)
    due = max(due, time.monotonic() - 0.004)
print(late, worst)
"""


def load(args: Args) -> list[dict[str, object]]:
    """A client streams at 10 Hz for `minutes`, while another process only sleeps."""
    seconds = 60 * args.minutes
    with server() as (address, pid):
        client = robot_client.RobotClient(address)
        client.acquire()
        client.job("start")
        start, before, (cpu, _) = client.state()["reference"], client.state(), usage(pid)
        command = [sys.executable, "-c", LATE, str(seconds), str(LATE_S)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as sleeper:
            pace, began = robot_client.Pace(10), time.monotonic()
            while sleeper.poll() is None:
                pose = start.copy()
                pose[:2] += 0.05 * np.sin(2 * pace.deadline), 0.05 * np.cos(2 * pace.deadline) - 0.05
                client.target(pose)
                pace.wait()
            machine_late, machine_worst = map(float, sleeper.stdout.read().split())
        elapsed, after, (cpu_after, peak_mb) = time.monotonic() - began, client.state(), usage(pid)
        client.close()
    line = {"contender": "ours", "minutes": round(elapsed / 60, 2), "mode_at_end": after["mode"]}
    line |= {"cpu_percent_of_a_core": round(100 * (cpu_after - cpu) / elapsed, 2), "server_mb": round(peak_mb, 1)}
    line |= {"late_ticks": int(after["overruns"] - before["overruns"]), "machine_late": int(machine_late)}
    line |= {"machine_worst_ms": round(1000 * machine_worst, 2)}
    line |= {"robot_time_error_ms": round(1000 * (after["robot_time"] - before["robot_time"] - elapsed), 1)}
    print(line)
    return [line]


def write(path: Path, lines: list[dict[str, object]], command: str = "python benchmarks/robot_latency.py") -> None:
    """The file anew, each line with where and when it was measured."""
    facts = {
        "version": ", ".join(f"{name} {version(name)}" for name in ("pyzmq", "msgpack", "mujoco")),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit(),
        "hardware": hardware(),
        "priority": {os.SCHED_FIFO: "real-time", os.SCHED_OTHER: f"nice {os.nice(0)}"}[os.sched_getscheduler(0)],
        "command": command,
    }
    write_anew(path, [line | facts for line in lines])


# --- Main -------------------------------------------------------------------------------------------------------------
def main(args: Args) -> None:
    if args.rounds < 1 or args.episodes < 1 or args.requests < 100 or args.minutes <= 0:
        raise SystemExit("--rounds and --episodes: at least 1, --requests: at least 100, --minutes: more than 0")
    write(args.output / "robot_round_trip.csv", round_trips(args))
    write(args.output / "robot_period.csv", episodes(args))
    write(args.output / "robot_load.csv", load(args))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
