"""What robot_server.py does while its network, its clients or its own front fail, measured on the simulated arm.

    python benchmarks/robot_survival.py                    # all four files
    python benchmarks/robot_survival.py --only hostile --messages 20000

robot_hold.csv: how long after an event the arm held, and when it had begun its soft stop (s), by the server's own log.
An arm that streams loses its client (SIGSTOP, SIGKILL), its front (SIGKILL with a client that falls silent, SIGSTOP) or
the network (the interface goes down, in a network of its own).
robot_front_kills.csv: the front is killed over and over under load while a client streams at 50 Hz and asks again after
0.5 s; longest_gap_ms is the longest time without an answer, jump_mm how far the reference went in 10 ms at most.
robot_hostile.csv: what peers can do to a client that streams at 50 Hz, and to memory (robot process and front).
`nobody` is the same without them; what the others use of the machine's processors is part of what they do.
robot_lateness.csv: how late the control loop's ticks are (ms), alone, and with 20 clients at 20 Hz each beside one that
floods; `machine` is a process that only sleeps, at the same priority at the same time.
"""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from robot_latency import write
from run import REPO, RESULTS

sys.path.insert(0, str(REPO))
sys.path.insert(0, str(REPO / "tests"))
from robot_wire import Wire, fronts, memory_mb, serving, watch

PRELUDE = f"import sys; sys.path[:0] = {[str(REPO), str(REPO / 'tests')]}\n"
# Streams to and fro and prints what each request took (ms), what was refused and in which modes the server was.
CLIENT = """
import json, math, signal, time
from robot_wire import Wire, moved
wire = Wire(sys.argv[1], token=sys.argv[3] * 16)
start = wire.stream()
wire.timeout = float(sys.argv[2])
ending = []
signal.signal(signal.SIGTERM, lambda *_: ending.append(1))
print("streaming", flush=True)
times, errors, modes = [], [], set()
due = time.monotonic()
while not ending:
    asked = time.monotonic()
    try:
        reply = wire.call("target", pose=moved(start, y=0.04 * math.sin(2 * asked)))
        modes.add(reply["mode"])
        if not reply["ok"]:
            errors.append(reply["error"]["code"])
    except TimeoutError:
        errors.append("timeout")
    times.append(1000 * (time.monotonic() - asked))
    due = max(due + 0.02, asked)
    time.sleep(max(due - time.monotonic(), 0))
print(json.dumps({"times": times, "errors": errors, "modes": sorted(modes)}))
"""
CROWD = """
import threading, time
from robot_wire import Wire
def look():
    with Wire(sys.argv[1], token="observer" * 2, timeout=0.5, tries=1000) as wire:
        while True:
            wire.call("state")
            time.sleep(0.05)
for _ in range(20):
    threading.Thread(target=look, daemon=True).start()
time.sleep(1e6)
"""
ATTACKS = {
    "nobody": "time.sleep(8)",
    "messages": "attack(requests, MESSAGES, seed=1)",
    "flood_and_close": """
for _ in range(6):
    peers = [raw_peer(requests) for _ in range(60)]
    push(peers, (REQUEST + PING) * 20, 1.0)
    for peer in peers:
        peer.close()
""",
    "message_without_end": """
end = time.monotonic() + 9
while time.monotonic() < end:
    frame = b"\\x03" + struct.pack(">Q", 60_000) + bytes(60_000)
    push([raw_peer(requests) for _ in range(4)], frame, 1.0)
""",
    "thousands_of_frames": """
context = zmq.Context()
peer = context.socket(zmq.DEALER)
peer.linger, peer.sndhwm = 0, 10
peer.connect(requests)
end = time.monotonic() + 8
while time.monotonic() < end:
    with contextlib.suppress(zmq.Again):
        peer.send_multipart([b"x"] * 3000, zmq.NOBLOCK)
    time.sleep(0.005)
""",
    "never_read": """
peers = [raw_peer(states, b"SUB") for _ in range(60)]
for peer in peers:
    peer.sendall(b"\\x00\\x01\\x01")
push([raw_peer(requests) for _ in range(60)], REQUEST, 8.0)
""",
    "1100_connections": """
host, port = requests.removeprefix("tcp://").split(":")
idle = [socket.create_connection((host, int(port))) for _ in range(1100)]
time.sleep(6)
""",
    "flood": """
os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))  # else, after `chrt -f`, it would never give way
context = zmq.Context()
peer = context.socket(zmq.DEALER)
peer.linger = 0
peer.connect(requests)
end = time.monotonic() + SECONDS
while time.monotonic() < end:
    with contextlib.suppress(zmq.Again):
        peer.send_multipart([b"", message("state")], zmq.NOBLOCK)
    while peer.poll(0):
        peer.recv_multipart()
""",
}
ATTACKER = """
import contextlib, os, random, resource, socket, struct, time
import zmq
from robot_peers import PING, REQUEST, attack, push, raw_peer
from robot_wire import message
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
requests, states = sys.argv[1:3]
"""
# robot_server.py, but every tick's start is noted and written at the end.
TIMED = """
import os, time
import robot_server, tyro
starts = []
class Timed(robot_server.Control):
    def tick(self):
        starts.append(time.monotonic())
        super().tick()
class TimedRobot(robot_server.Robot):
    def shut_down(self):
        open(os.environ["TICKS"], "w").write("\\n".join(map(repr, starts)))
        super().shut_down()
robot_server.Control, robot_server.Robot = Timed, TimedRobot
sys.argv[0] = "robot_server.py"
robot_server.main(tyro.cli(robot_server.Args))
"""
SLEEPER = """
import contextlib, os, time
with contextlib.suppress(PermissionError):
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))
due, starts = time.monotonic(), []
end = due + float(sys.argv[1])
while due < end:
    due += 0.004
    time.sleep(max(due - time.monotonic(), 0))
    starts.append(time.monotonic())
print("\\n".join(map(repr, starts)))
"""


# --- Args -------------------------------------------------------------------------------------------------------------
@dataclass
class Args:
    only: Literal["all", "hold", "front_kills", "hostile", "lateness"] = "all"
    """which of the four files"""
    rounds: int = 3
    """repetitions of each event of robot_hold.csv"""
    kills: int = 50
    """how often the front is killed"""
    messages: int = 200_000
    """hostile messages"""
    seconds: float = 20.0
    """how long ticks are watched"""
    output: Path = RESULTS
    """folder for the files"""


@contextlib.contextmanager
def python(code: str, *arguments: object) -> Iterator[subprocess.Popen]:
    """Another process, which ends with the block."""
    command = [sys.executable, "-c", PRELUDE + code, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


@contextlib.contextmanager
def client(address: str, timeout: float = 1.0) -> Iterator[subprocess.Popen]:
    """A client that streams, once it does."""
    with python(CLIENT, address, timeout, "h") as process:
        if process.stdout.readline() != "streaming\n":
            raise SystemExit("the client does not stream")
        yield process


def told(process: subprocess.Popen) -> dict:
    """What the client has seen."""
    process.terminate()
    return json.loads(process.communicate(timeout=30)[0])


def log_time(folder: Path, words: str) -> float:
    """When the log's newest line with these words was written."""
    lines = [line for line in (folder / "robot_server.log").read_text().splitlines() if words in line]
    if not lines:
        raise SystemExit(f"the log says nothing of {words!r}")
    return datetime.strptime(lines[-1][:23], "%Y-%m-%d %H:%M:%S,%f").timestamp()


# --- Hold and stop ----------------------------------------------------------------------------------------------------
def hold(args: Args) -> list[dict[str, object]]:
    events = {
        "client_sigstop": lambda client, process: os.kill(client.pid, signal.SIGSTOP),
        "client_sigkill": lambda client, process: os.kill(client.pid, signal.SIGKILL),
        "front_sigkill": front_and_client,
        "front_sigstop": lambda client, process: os.kill(fronts(process.pid)[0], signal.SIGSTOP),
        "cable": lambda client, process: subprocess.run(["ip", "link", "set", "lo", "down"], check=True),
    }
    lines = []
    for _ in range(args.rounds):
        for name, event in events.items():
            if name == "cable":
                line = in_a_network_of_its_own()
            else:
                line = one_event(name, event)
            lines.append(line)
            print(line)
    return lines


def front_and_client(client: subprocess.Popen, process: subprocess.Popen) -> None:
    """The front is killed, and the client with it: one that goes on would stream again."""
    os.kill(fronts(process.pid)[0], signal.SIGKILL)
    os.kill(client.pid, signal.SIGKILL)


def one_event(name: str, event) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as name_of_folder:
        folder = Path(name_of_folder)
        with serving(folder) as process, client(process.requests) as streaming:
            time.sleep(1.0)
            happened = time.time()
            event(streaming, process)
            time.sleep(3.0)
            held = log_time(folder, "hold: no target") - happened
            stopped = log_time(folder, "soft stop: no target") - happened
            fault = "fault" in (folder / "robot_server.log").read_text()
            process.terminate()
            process.wait(20)
    return {"contender": name, "hold_s": round(held, 3), "stop_s": round(stopped, 3), "fault": fault}


def in_a_network_of_its_own() -> dict[str, object]:
    code = "import subprocess; subprocess.run(['ip', 'link', 'set', 'lo', 'up'], check=True)\n"
    code += f"import json; sys.path.insert(0, {str(REPO / 'benchmarks')!r}); import robot_survival\n"
    code += "event = lambda *_: subprocess.run(['ip', 'link', 'set', 'lo', 'down'], check=True)\n"
    code += "print(json.dumps(robot_survival.one_event('cable', event)))"
    command = ["unshare", "--map-root-user", "--net", sys.executable, "-c", PRELUDE + code]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


# --- A front that is killed over and over -----------------------------------------------------------------------------
def front_kills(args: Args) -> list[dict[str, object]]:
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder)) as process:
        with python(CROWD, process.requests), client(process.requests, timeout=0.5) as streaming:
            states: list[dict] = []
            for _ in range(args.kills):
                states += watch(process.states, 1.5)
                os.kill(fronts(process.pid)[0], signal.SIGKILL)
            states += watch(process.states, 1.0)
            seen = told(streaming)
        with Wire(process.requests, timeout=1, tries=9) as wire:
            state, number = wire.state(), wire.hello["server"]["fronts"]
        line = {"contender": "ours", "kills": args.kills, "restarts": number - 1, "fault": state["fault"] is not None}
    times = np.array([state["robot_time"] for state in states])
    references = np.array([state["reference"][:3] for state in states])
    steps = np.linalg.norm(np.diff(references, axis=0), axis=1) / np.maximum(np.diff(times), 0.01)
    line |= {"errors": len(seen["errors"]), "refused": len([e for e in seen["errors"] if e != "timeout"])}
    line |= {"requests": len(seen["times"]), "longest_gap_ms": round(max(seen["times"]), 1)}
    line |= {"jump_mm": round(10 * float(steps.max()), 3), "modes": " ".join(seen["modes"])}
    print(line)
    return [line]


# --- Hostile peers ----------------------------------------------------------------------------------------------------
def hostile(args: Args) -> list[dict[str, object]]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))  # what a server has by default
    lines = []
    for name, code in ATTACKS.items():
        code = code.replace("MESSAGES", str(args.messages)).replace("SECONDS", "8")
        with tempfile.TemporaryDirectory() as folder, serving(Path(folder)) as process:
            with client(process.requests) as streaming:
                time.sleep(1.0)
                first, before, most = fronts(process.pid)[0], memory_mb(process.pid), 0.0
                with python(ATTACKER + code, process.requests, process.states) as attacker:
                    while attacker.poll() is None:
                        with contextlib.suppress(OSError, IndexError, StopIteration):  # a front that has just died
                            most = max(most, memory_mb(process.pid))
                        time.sleep(0.1)
                time.sleep(0.5)
                seen = told(streaming)
            with Wire(process.requests, timeout=1, tries=9) as wire:
                state, number = wire.state(), wire.hello["server"]["fronts"]
            times = seen["times"]
            lines.append({"contender": name, "requests": len(times), "errors": len(seen["errors"])})
            lines[-1] |= {f"p{p}_ms": round(float(np.percentile(times, p)), 3) for p in (50, 99)}
            lines[-1] |= {"max_ms": round(max(times), 1), "grown_mb": round(most - before, 1)}
            lines[-1] |= {"fronts_lost": number - 1, "same_front": fronts(process.pid)[0] == first}
            lines[-1] |= {"fault": state["fault"] is not None, "modes": " ".join(seen["modes"])}
            print(lines[-1])
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return lines


# --- Lateness of the control loop -------------------------------------------------------------------------------------
def lateness(args: Args) -> list[dict[str, object]]:
    lines = []
    for load in ("alone", "crowd and flood"):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "timed_server.py").write_text(PRELUDE + TIMED)
            os.environ["TICKS"] = str(folder / "ticks")
            with serving(folder, script=folder / "timed_server.py") as process:
                with contextlib.ExitStack() as others:
                    others.enter_context(client(process.requests))
                    if load != "alone":
                        others.enter_context(python(CROWD, process.requests))
                        flood = ATTACKS["flood"].replace("SECONDS", str(args.seconds + 20))
                        others.enter_context(python(ATTACKER + flood, process.requests, process.states))
                        time.sleep(2.0)
                    began = time.monotonic()
                    sleeper = others.enter_context(python(SLEEPER, args.seconds))
                    slept = sleeper.communicate()[0]
                    ended = time.monotonic()
                process.terminate()
                process.wait(20)
            ticks = [float(line) for line in (folder / "ticks").read_text().split()]
            ticks = [tick for tick in ticks if began + 0.5 < tick < ended]
        for contender, starts in (("ours", ticks), ("machine", [float(line) for line in slept.split()])):
            late = 1000 * (np.diff(starts) - 0.004)
            line = {"contender": contender, "load": load, "ticks": len(late)}
            line |= {f"late_p{p}_ms": round(float(np.percentile(late, p)), 4) for p in (50, 99, 99.9)}
            lines.append(line | {"late_max_ms": round(float(late.max()), 3)})
            print(lines[-1])
    return lines


# --- Main -------------------------------------------------------------------------------------------------------------
def main(args: Args) -> None:
    for name, measure in (("hold", hold), ("front_kills", front_kills), ("hostile", hostile), ("lateness", lateness)):
        if args.only in ("all", name):
            lines = measure(args)
            write(args.output / f"robot_{name}.csv", lines, "python benchmarks/robot_survival.py")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
