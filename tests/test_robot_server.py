"""robot_server.py: its protocol, and what it promises about motion, on the simulated arm."""

import errno
import io
import logging
import math
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import msgpack
import numpy as np
import pytest
import tyro
import zmq
from conftest import REPO, run_script, wait_until
from robot_wire import TOKEN, Wire, follow, fronts, memory_mb, moved, serving, subscribe, watch

import robot_server

OTHER = "b" * 16
HIDDEN = ("Traceback", ".py", "/")  # what an answer never tells


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One simulated arm for the tests that leave it as they find it."""
    with serving(tmp_path_factory.mktemp("server")) as process:
        yield process


@pytest.fixture
def wire(server):
    """A connection to an arm that stands still at its start, lease free, no fault."""
    with Wire(server.requests) as wire:
        wire.take()
        wire.ask("stop")
        wire.wait_for(mode="idle")
        if math.dist(wire.state()["q"], wire.hello["reset_joints"]) > 0.02:
            wire.done("reset", speed=1.0)
        wire.ask("release")
        yield wire


def distance(a: list[float], b: list[float]) -> float:
    return math.dist(a[:3], b[:3])


# --- Hello, state ----------------------------------------------------------------------------------------------------
def test_hello(wire):
    hello = wire.hello
    assert hello["protocol"] == robot_server.PROTOCOL_VERSION == 2
    assert hello["robot"]["kind"] == "sim" and hello["robot"]["task"] == "FrankaPickCube-v0"
    assert hello["gripper"]["kind"] == "sim" and hello["gripper"]["max_width"] == pytest.approx(0.08)
    assert hello["watchdog"] == {"hold_s": 0.3, "stop_s": 2.0, "frozen_s": 0.05}
    assert hello["server"]["control_hz"] >= 200 and hello["server"]["publish_hz"] == 100
    limits = hello["limits"]
    positive = {"max_speed", "max_acceleration", "max_rotation_speed", "max_rotation_acceleration", "max_jump"}
    positive |= {"max_rotation_jump", "max_tilt", "max_stiffness", "max_rotational_stiffness", "max_clip"}
    assert all(limits[name] > 0 for name in positive)
    assert all(low < high for low, high in zip(limits["workspace_low"], limits["workspace_high"], strict=True))
    assert len(hello["reset_joints"]) == 7


def test_state(wire):
    state = wire.state()
    sizes = {"tcp_pose": 7, "tcp_vel": 6, "tcp_force": 3, "tcp_torque": 3, "q": 7, "dq": 7, "reference": 7}
    assert {name: len(state[name]) for name in sizes} == sizes
    assert np.linalg.norm(state["tcp_pose"][3:]) == pytest.approx(1)
    assert distance(state["tcp_pose"], state["reference"]) < 0.005
    assert state["robot_mode"] == "idle" and state["errors"] == [] and state["fault"] is None
    assert 0 <= state["state_age"] < 0.5 and 0 <= state["success_rate"] <= 1
    assert np.abs(state["tcp_vel"]).max() < 1e-2 and np.abs(state["tcp_force"]).max() < 1


def test_time_is_real(wire):
    first, start = wire.state(), time.monotonic()
    time.sleep(1)
    second, elapsed = wire.state(), time.monotonic() - start
    for clock in ("robot_time", "server_time"):
        assert second[clock] - first[clock] == pytest.approx(elapsed, abs=0.2)


def test_published_states(server, wire):
    states = watch(server.states, 1.0)
    assert 50 <= len(states) <= 130
    assert {"server_id", "robot_time", "state_age", "mode", "reference", "lease", "fault"} <= set(states[0])
    assert states[0]["op"] == "state" and states[0]["ok"] and set(states[0]["result"]) <= set(wire.state())
    times = [state["robot_time"] for state in states]
    assert times == sorted(times) and times[-1] > times[0]


def test_slow_subscriber_gets_the_newest_state(server, wire):
    with subscribe(server.states) as socket:
        socket.recv()  # poll() would take one out and keep it
        time.sleep(1)
        newest = msgpack.unpackb(socket.recv())
    assert wire.state()["server_time"] - newest["server_time"] < 0.3


def test_replies_carry_what_was_sent(wire):
    wire.socket.send(msgpack.packb({"v": 2, "op": "state", "id": "abc"}))
    reply = msgpack.unpackb(wire.socket.recv())
    assert reply["ok"] and reply["id"] == "abc" and reply["op"] == "state" and reply["v"] == 2


def test_dealer_with_many_requests_in_flight(server):
    with zmq.Context.instance().socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(server.requests)
        for number in range(200):
            socket.send_multipart([b"", msgpack.packb({"v": 2, "op": "state", "id": number})])
        for number in range(200):
            assert socket.poll(10_000)
            assert msgpack.unpackb(socket.recv_multipart()[1])["id"] == number


# --- Messages that make no sense --------------------------------------------------------------------------------------
def message(**changes: object) -> bytes:
    return msgpack.packb({"v": 2, "op": "state", "id": 1, "args": {}} | changes)


def nested(depth: int) -> object:
    return [nested(depth - 1)] if depth else 1


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (b"", "malformed"),
        (b"\xc1", "malformed"),
        (b"hello", "malformed"),
        (b'{"v": 1, "op": "state"}', "malformed"),
        (b"\x80\x04\x95\x10\x00\x00\x00", "malformed"),  # a pickle
        (msgpack.packb([1, "state"]), "malformed"),
        (msgpack.packb(3), "malformed"),
        (message() + b"\x00", "malformed"),
        (message()[:-1], "malformed"),
        (msgpack.packb({1: 2}), "malformed"),
        (msgpack.packb({"v": 2, "op": "state", "args": {"x": nested(20)}}), None),
        (msgpack.packb({"v": 2, "op": "state", "args": {"x": b"bytes"}}), "malformed"),
        (msgpack.packb({"v": 2, "op": "state", "args": {"x": msgpack.ExtType(1, b"x")}}), "malformed"),
        (msgpack.packb({"v": 2, "op": "state", "args": {"x": msgpack.Timestamp(1)}}), "malformed"),
        (msgpack.packb({"v": 2, "op": "state", "args": {"x": "y" * 10_000}}), "malformed"),
        (msgpack.packb({"v": 2, "op": "state", "args": {"x": [0] * 1000}}), "malformed"),
        (b"\xdf\xff\xff\xff\xff", "malformed"),  # a map that claims four billion entries
        (b"\x81\xa1v\xdd\xff\xff\xff\xff", "malformed"),  # a list that does
        (message(op="x" * 300), "malformed"),
        (msgpack.packb({"op": "state"}), "version"),
        (message(v=1), "version"),
        (message(v="1"), "version"),
        (message(v=None), "version"),
        (message(op="__init__"), "unknown_op"),
        (message(op="shutdown"), "unknown_op"),
        (msgpack.packb({"v": 2}), None),
        (msgpack.packb({"v": 2, "op": "state", "to": "x"}), "malformed"),
        (message(op=3), None),
        (message(op=["state"]), None),
        (message(id=1.5), None),
        (message(id="x" * 300), "malformed"),
        (message(id="x" * 65), "malformed"),
        (message(id=True), "malformed"),
        (message(id=[1]), None),
        (message(args=[1]), None),
        (message(args={"x": 1}), "bad_argument"),
        (message(token=3), None),
        (message(token=["a" * 16]), None),
        (message(op="acquire", args={"name": "x"}), "bad_argument"),
    ],
)
def test_messages_that_make_no_sense(wire, frame, code):
    wire.socket.send(frame)
    assert wire.socket.poll(10_000)
    reply = msgpack.unpackb(wire.socket.recv())
    assert not reply["ok"] and reply["result"] is None
    assert reply["error"]["code"] == (code or reply["error"]["code"])
    assert reply["error"]["code"] in ("malformed", "version", "unknown_op", "bad_argument", "no_lease")
    assert not any(word in reply["error"]["message"] for word in HIDDEN[:2])
    assert wire.state()["mode"] == "idle"


def test_a_huge_message_costs_its_sender_the_connection(server, wire):
    before = memory_mb(server.pid)
    for size in (70_000, 20_000_000):
        with Wire(server.requests, timeout=0.3) as rude:
            rude.socket.send(b"x" * size)
            assert not rude.socket.poll(300)
    with zmq.Context.instance().socket(zmq.DEALER) as rude:
        rude.setsockopt(zmq.LINGER, 0)
        rude.connect(server.requests)
        rude.send_multipart([b"", message(), b"extra", b"frames"])
        assert rude.poll(10_000)
        assert msgpack.unpackb(rude.recv_multipart()[-1])["error"]["code"] == "malformed"
    assert wire.state()["mode"] == "idle"
    assert memory_mb(server.pid) < before + 15


def test_sockets_of_other_kinds_do_no_harm(server, wire):
    host, port = server.requests.removeprefix("tcp://").split(":")
    for data in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 64, b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f" + b"\x00" * 60):
        with socket.create_connection((host, int(port))) as plain:
            plain.sendall(data)
            assert wire.state()["mode"] == "idle"


# --- Lease ------------------------------------------------------------------------------------------------------------
def test_commands_need_the_lease(wire):
    pose = wire.state()["tcp_pose"]
    commands = {
        "target": {"pose": pose},
        "gains": {"stiffness": 100.0},
        "start": {"handle": "x" * 8},
        "move_joints": {"handle": "x" * 8, "q": wire.state()["q"]},
        "reset": {"handle": "x" * 8},
        "recover": {"handle": "x" * 8},
        "gripper": {"handle": "x" * 8, "action": "open"},
        "release": {},
        "reset_task": {"handle": "x" * 8, "seed": 0},
    }
    for op, args in commands.items():
        assert wire.refused(op, **args) == "no_lease", op
    wire.take()
    for op, args in commands.items():
        assert wire.refused(op, token=OTHER, **args) == "no_lease", op
    assert wire.refused("job", handle="x" * 8) == "unknown_handle"


def test_one_commander(wire):
    assert wire.ask("acquire", name="first", token=TOKEN, ttl=5.0)["lease"] == "first"
    assert wire.refused("acquire", name="second", token=OTHER) == "lease_taken"
    assert wire.ask("state", token=OTHER)["lease"] == "first"  # anyone may look
    assert wire.ask("acquire", name="first", token=TOKEN, ttl=5.0)["lease"] == "first"  # renewed
    assert wire.ask("acquire", name="second", token=OTHER, takeover=True)["lease"] == "second"
    assert wire.refused("gains", stiffness=100.0) == "no_lease"
    wire.ask("release", token=OTHER)
    assert wire.state()["lease"] is None


def test_lease_ends(wire):
    wire.ask("acquire", name="test", token=TOKEN, ttl=0.3)
    for _ in range(6):  # every request renews it
        time.sleep(0.15)
        assert wire.ask("state")["lease"] == "test"
    time.sleep(0.5)
    assert wire.state()["lease"] is None
    assert wire.refused("gains", stiffness=100.0) == "no_lease"


@pytest.mark.parametrize(
    "args",
    [
        {"name": ""},
        {"name": "x" * 33},
        {"name": 3},
        {"name": "\x1b[2J"},  # which would clear the server's terminal
        {"token": "short"},
        {"token": "x" * 65},
        {"token": "\u0141" * 16},  # longer in bytes
        {"token": 5},
        {"ttl": 0.0},
        {"ttl": 60.0},
        {"ttl": -1.0},
        {"ttl": math.nan},
        {"ttl": math.inf},
        {"ttl": "1"},
        {"ttl": True},
        {"takeover": "yes"},
        {"takeover": 1},
        {"force": True},
    ],
)
def test_acquire_is_checked(wire, args):
    request = {"name": "test", "token": TOKEN, "ttl": 1.0} | args
    wire.socket.send(message(op="acquire", args=request))
    reply = msgpack.unpackb(wire.socket.recv())
    assert reply["error"] is not None and reply["error"]["code"] == "bad_argument"
    assert wire.state()["lease"] is None


# --- Targets ----------------------------------------------------------------------------------------------------------
def test_a_target_is_reached(wire):
    wire.take()
    assert wire.refused("target", pose=wire.state()["tcp_pose"]) == "not_streaming"
    start = wire.stream()
    assert wire.state()["mode"] == "streaming" and wire.wait_for(robot_mode="move", timeout=0.25)
    goal = moved(start, x=0.03, y=-0.04, z=0.02)
    replies = follow(wire, lambda t: goal, 2.0)
    assert replies[-1]["result"]["limited"] == []
    assert distance(replies[-1]["reference"], goal) < 1e-4
    assert distance(wire.state()["tcp_pose"], goal) < 0.004
    times = [reply["robot_time"] for reply in replies]
    assert times == sorted(times) and times[-1] - times[0] > 1


def test_a_turn_is_reached(wire):
    start = wire.stream()
    half = 0.15
    x, y, z, w = start[3:]
    c, s = math.cos(half), math.sin(half)  # about the base's z axis
    turned = [*start[:3], c * x - s * y, c * y + s * x, c * z + s * w, c * w - s * z]
    follow(wire, lambda t: turned, 2.0)
    reached = wire.state()
    assert abs(np.dot(reached["reference"][3:], turned[3:])) > 1 - 1e-6
    assert abs(np.dot(reached["tcp_pose"][3:], turned[3:])) > math.cos(0.02 / 2)
    # the same rotation with the other sign is the same target
    reply = wire.ask("target", pose=[*turned[:3], *(-value for value in turned[3:])])
    assert abs(np.dot(reply["reference"][3:], turned[3:])) > 1 - 1e-6


def bad_poses(pose: list[float]) -> dict[str, tuple[object, str]]:
    x, y, z, *quaternion = pose
    turn = robot_server.quat_from_rotvec([0.0, 0.0, 1.0])
    return {
        "NaN": ([math.nan, y, z, *quaternion], "refused"),
        "NaN quaternion": ([x, y, z, math.nan, 0.0, 0.0, 0.0], "refused"),
        "infinity": ([x, math.inf, z, *quaternion], "refused"),
        "minus infinity": ([x, y, -math.inf, *quaternion], "refused"),
        "huge": ([x, y, 1e308, *quaternion], "refused"),
        "a huge quaternion": ([x, y, z, 1e308, 0.0, 0.0, 0.0], "refused"),
        "no rotation": ([x, y, z, 0.0, 0.0, 0.0, 0.0], "refused"),
        "not a unit quaternion": ([x, y, z, *(2 * value for value in quaternion)], "refused"),
        "a jump": (moved(pose, x=0.5), "refused"),
        "a small jump": (moved(pose, z=0.26), "refused"),
        "upside down": ([x, y, z, 0.0, 0.0, 0.0, 1.0], "refused"),
        "a turn by 1 rad": ([x, y, z, *robot_server.quat_multiply(turn, quaternion).tolist()], "refused"),
        "6 numbers": (pose[:6], "bad_argument"),
        "8 numbers": ([*pose, 0.0], "bad_argument"),
        "empty": ([], "bad_argument"),
        "text": ("pose", "bad_argument"),
        "texts": (["0"] * 7, "bad_argument"),
        "nothing": (None, "bad_argument"),
        "truths": ([True] * 7, "bad_argument"),
        "lists": ([[0.0]] * 7, "bad_argument"),
        "a number": (0.0, "bad_argument"),
        "an integer beyond floats": ([x, y, 2**63, *quaternion], "refused"),
    }


def test_bad_targets_are_refused(wire):
    start = wire.stream()
    for name, (pose, code) in bad_poses(start).items():
        before = wire.ask("target", pose=start)
        reply = wire.call("target", pose=pose)
        assert not reply["ok"], name
        assert reply["error"]["code"] == code, f"{name}: {reply['error']}"
        assert 8 < len(reply["error"]["message"]) < 150, reply["error"]  # 1e308 has 309 digits
        assert distance(reply["reference"], start) < 1e-6, name
        assert before["mode"] == reply["mode"] == "streaming", name
    assert distance(wire.state()["tcp_pose"], start) < 0.003


def test_stale_targets_are_refused(wire):
    start = wire.stream()
    assert wire.ask("target", pose=start, seq=5)["seq"] == 5
    assert wire.refused("target", pose=start, seq=5) == "stale"
    assert wire.refused("target", pose=start, seq=4) == "stale"
    assert wire.ask("target", pose=start, seq=6)["seq"] == 6
    for seq in ("7", 7.5, True, 2**70 if False else -(2**62)):
        assert wire.refused("target", pose=start, seq=seq) in ("bad_argument", "stale")
    wire.take()
    wire.ask("acquire", name="other", token=OTHER, takeover=True)  # another lease counts anew
    wire.token = OTHER
    wire.done("start")
    assert wire.ask("target", pose=start, seq=1)["seq"] == 1
    wire.ask("release")


def test_box(wire):
    """A target outside is followed to the walls, into an edge of the box, and no further."""
    limits, start = wire.hello["limits"], wire.stream()
    low, high = limits["workspace_low"], limits["workspace_high"]
    reference = start
    for _ in range(400):
        reply = wire.ask("target", pose=moved(reference, y=0.1, z=-0.08))
        reference = reply["reference"]
        assert all(a - 1e-9 <= v <= b + 1e-9 for a, v, b in zip(low, reference, high))
        if "box" in reply["result"]["limited"] and math.dist(reference[1:3], (high[1], low[2])) < 1e-6:
            break
        time.sleep(0.02)
    else:
        raise AssertionError(f"the edge was not reached: {reference}")
    assert wire.state()["tcp_pose"][1] < high[1] + 0.005 and wire.state()["tcp_pose"][2] > low[2] - 0.005


def test_tilt(wire):
    """The tool leans as far as allowed and no further."""
    max_tilt, start = wire.hello["limits"]["max_tilt"], wire.stream()
    tilt, reached = 0.0, 0.0
    for _ in range(400):
        tilt = min(tilt + 0.02, reached + 0.2)
        half = tilt / 2  # from straight down, about the base's x axis
        reply = wire.ask("target", pose=[*start[:3], math.cos(half), 0.0, 0.0, -math.sin(half)])
        x, y = reply["reference"][3:5]
        reached = math.acos(max(-1.0, min(1.0, 2 * (x * x + y * y) - 1)))
        assert reached <= max_tilt + 1e-6
        if "tilt" in reply["result"]["limited"] and reached > max_tilt - 1e-3:
            break
        time.sleep(0.02)
    else:
        raise AssertionError(f"tilted by {reached} of {max_tilt}")


# --- Speed and force --------------------------------------------------------------------------------------------------
def test_speed_and_acceleration_of_the_reference(server, wire):
    """Targets that leap to and fro at random: reference and arm stay within their limits, to 5%."""
    limits, start = wire.hello["limits"], wire.stream()
    states: list[dict] = []
    watcher = threading.Thread(target=lambda: states.extend(watch(server.states, 4.0)))
    watcher.start()
    random = np.random.default_rng(0)
    jump = 0.9 * limits["max_jump"]

    def targets(t: float) -> list[float]:
        reference = wire.state()["reference"]
        offset = random.choice((-1, 1), 3) * jump / math.sqrt(3)
        back = [0.3 * (a - b) for a, b in zip(start[:3], reference[:3])]
        step = 0.7 * (offset + back)
        return moved(reference, *(step * min(1.0, jump / np.linalg.norm(step))).tolist())

    follow(wire, targets, 3.5, hz=30)
    watcher.join()
    measured = max(np.linalg.norm(state["result"]["tcp_vel"][:3]) for state in states)
    assert 0.2 * limits["max_speed"] < measured <= 1.05 * limits["max_speed"]
    times = np.array([state["robot_time"] for state in states])
    references = np.array([state["reference"][:3] for state in states])
    keep = np.flatnonzero(np.diff(times) > 0.004)
    speeds = np.linalg.norm(np.diff(references, axis=0)[keep], axis=1) / np.diff(times)[keep]
    assert speeds.max() <= 1.05 * limits["max_speed"]
    assert wire.state()["fault"] is None


def test_full_speed_is_reached_and_not_exceeded(server, wire):
    limits, start = wire.hello["limits"], wire.stream()
    states: list[dict] = []
    watcher = threading.Thread(target=lambda: states.extend(watch(server.states, 3.0)))
    watcher.start()
    sign = 1.0

    def targets(t: float) -> list[float]:
        nonlocal sign
        reference = wire.state()["reference"]
        if abs(reference[1] - start[1]) > 0.12:
            sign = math.copysign(1.0, start[1] - reference[1])
        return moved(reference, y=sign * 0.6 * limits["max_jump"])

    follow(wire, targets, 2.8, hz=50)
    watcher.join()
    speeds = [float(np.linalg.norm(state["result"]["tcp_vel"][:3])) for state in states]
    assert 0.6 * limits["max_speed"] < max(speeds) <= 1.05 * limits["max_speed"]


def test_the_reference_never_leaves_the_arm(tmp_path):
    """Pressed on the table, the target stays within the clip of the measured pose, and the force below K x clip."""
    flags = "--workspace-low", 0.2, -0.3, -0.2, "--collision-force", 1000  # the impact is above the static force
    with serving(tmp_path, *flags) as process, Wire(process.requests) as wire:
        start = wire.stream()
        assert wire.hello["limits"]["workspace_low"][2] == pytest.approx(-0.2)
        gains = wire.hello["gains"]
        bound = gains["stiffness"] * gains["clip"][2]
        press = 0.0
        forces, goal = [], start
        for _ in range(600):
            reference = wire.state()["reference"]
            goal = moved([*start[:2], reference[2], *start[3:]], z=-0.05)
            reply = wire.ask("target", pose=goal)
            state = wire.state()
            forces.append(state["tcp_force"][2])
            gap = state["tcp_pose"][2] - reply["reference"][2]
            press = max(press, gap)
            assert gap <= 1.05 * gains["clip"][2] + 0.003
            if "clip" in reply["result"]["limited"] and state["tcp_pose"][2] < 0.03:
                break
            time.sleep(0.01)
        else:
            raise AssertionError(f"no clip: {reply}, {state}")
        time.sleep(0.2)
        follow(wire, lambda t: moved(wire.state()["reference"], z=-0.05), 1.0)
        states = watch(process.states, 0.5)
        still = np.array([state["result"]["tcp_force"] for state in states])
        assert 0.3 * bound < np.abs(still[:, 2]).mean() <= 1.05 * bound


# --- Watchdog, hold, stop ---------------------------------------------------------------------------------------------
def test_watchdog_holds_then_stops(server, wire):
    start = wire.stream()
    follow(wire, lambda t: moved(start, y=0.14), 0.2)  # still on its way
    states = watch(server.states, 3.0)
    first = states[0]["robot_time"]
    modes = [state["mode"] for state in states]
    changes = [mode for mode, before in zip(modes, [None, *modes]) if mode != before]
    changes = [mode for mode in changes if mode != "stopping"]  # while it comes to rest
    assert changes in (["streaming", "hold", "idle"], ["hold", "idle"])
    held = [state for state in states if state["mode"] == "hold"]
    assert held[0]["robot_time"] - first < 0.6 and 1.2 < held[-1]["robot_time"] - held[0]["robot_time"] < 2.2
    assert distance(held[-1]["reference"], held[0]["reference"]) < 0.02  # it ran out, at its own deceleration
    assert distance(held[-1]["reference"], held[len(held) // 2]["reference"]) < 1e-9
    assert distance(held[-1]["reference"], start) < 0.135
    assert wire.wait_for(robot_mode="idle", timeout=2)["mode"] == "idle"


def test_streaming_goes_on_after_a_pause(wire):
    start = wire.stream()
    wire.ask("target", pose=start)
    wire.wait_for(mode="hold", timeout=5)
    wire.ask("target", pose=moved(start, y=0.01))
    wire.wait_for(mode="streaming", timeout=0.25)


def test_anyone_may_hold(server, wire):
    start = wire.stream()
    follow(wire, lambda t: moved(start, y=0.1), 0.3)
    wire.ask("hold", token=OTHER)
    wire.wait_for(mode="hold", timeout=0.25)  # before the watchdog would
    for _ in range(5):
        assert wire.refused("target", pose=moved(start, y=0.1)) == "held"
    assert wire.state()["mode"] == "hold"
    time.sleep(0.3)
    stands = wire.state()
    assert np.linalg.norm(stands["tcp_vel"][:3]) < 0.03
    wire.done("start")
    wire.ask("target", pose=stands["tcp_pose"])
    assert wire.state()["mode"] == "streaming"
    assert distance(wire.state()["reference"], stands["tcp_pose"]) < 0.005


def test_anyone_may_stop(wire):
    start = wire.stream()
    follow(wire, lambda t: moved(start, y=0.1), 0.3)
    wire.ask("stop", token=OTHER)
    state = wire.wait_for(mode="idle", timeout=3)
    assert state["robot_mode"] == "idle"
    assert wire.refused("target", pose=start) == "not_streaming"
    assert wire.ask("hold", token=OTHER)["mode"] == "idle"  # nothing to hold


def test_the_end_of_a_lease_holds(wire):
    start = wire.stream()
    wire.ask("target", pose=moved(start, y=0.05))
    wire.ask("release")
    assert wire.wait_for(mode="hold", timeout=0.25)["lease"] is None
    wire.wait_for(mode="idle", timeout=5)


def test_a_takeover_holds(wire):
    start = wire.stream()
    follow(wire, lambda t: moved(start, y=0.1), 0.3)
    wire.ask("acquire", name="other", token=OTHER, takeover=True)
    wire.wait_for(mode="hold", timeout=0.25)
    assert wire.refused("target", pose=start) == "no_lease"
    reference = wire.state()["reference"]
    reply = wire.call("target", token=OTHER, pose=moved(reference, y=0.001))
    if reply["ok"]:
        assert distance(reply["reference"], reference) < 0.02  # it may still come to rest
    wire.ask("release", token=OTHER)


# --- Jobs -------------------------------------------------------------------------------------------------------------
def test_move_joints(wire):
    wire.take()
    q = wire.state()["q"]
    goal = [value + 0.1 for value in q]
    result = wire.done("move_joints", q=goal, speed=0.5)
    assert result["op"] == "move_joints" and result["error"] is None and result["seconds"] > 0.1
    assert np.abs(np.subtract(wire.state()["q"], goal)).max() < 0.01
    assert wire.state()["mode"] == "idle"
    wire.done("reset", speed=0.5)
    assert np.abs(np.subtract(wire.state()["q"], wire.hello["reset_joints"])).max() < 0.01


def test_a_joint_motion_stops_where_it_leaves_the_workspace(wire):
    """It bends, and its speed is one of the joints': the server looks where the tcp is, and comes in again."""
    wire.take()
    q = wire.state()["q"]
    wire.ask("move_joints", handle="far-aside", q=[q[0] + 2.0, *q[1:]], speed=1.0)
    wait_until(lambda: wire.ask("job", handle="far-aside")["result"]["status"] == "failed", 20)
    assert "left --workspace-low" in wire.ask("job", handle="far-aside")["result"]["error"]
    state = wire.wait_for(mode="idle", timeout=5)
    low, high = (np.array(wire.hello["limits"][f"workspace_{name}"]) for name in ("low", "high"))
    position = np.array(state["tcp_pose"][:3])
    outside = max((low - position).max(), (position - high).max())
    assert 0.02 < outside < 0.15 and state["fault"] is None
    wire.done("reset", speed=1.0)


def test_many_joint_motions_leave_the_workspace_no_further_than_one(wire):
    """Each of them ends less than 2 cm further out than it began; one that fails is not much further than that."""
    wire.take()
    wire.done("reset", speed=1.0)
    q = wire.state()["q"]
    high = wire.hello["limits"]["workspace_high"][1]
    failed = 0
    for angle in np.arange(0.7, 1.2, 0.05):
        failed += wire.job("move_joints", q=[angle, *q[1:]], speed=0.5)["status"] == "failed"
        wire.wait_for(mode="idle", timeout=5)
    far = wire.state()["tcp_pose"][1] - high
    assert failed >= 2 and 0.01 < far < 0.03 + 0.008 * failed < 0.09
    wire.done("reset", speed=1.0)


def test_joints_are_no_faster_than_allowed(tmp_path):
    with serving(tmp_path, "--max-joint-speed", 0.1) as process, Wire(process.requests) as wire:
        wire.take()
        q = wire.state()["q"]
        seconds = wire.done("move_joints", q=[q[0] + 0.2, *q[1:]], speed=1.0)["seconds"]
        assert seconds > 1.5  # 1.875 * 0.2 / (0.1 * 2.175)


def test_a_log_file_on_a_full_disk_is_said_once(tmp_path, capsys):
    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    handler = robot_server.LogFile(tmp_path / "server.log")
    handler.setStream(Full())
    for number in range(3):
        handler.handle(logging.LogRecord("server", logging.INFO, "", 0, f"event {number}", None, None))
    said = capsys.readouterr().err
    assert said.count("No space left") == 1 and "Traceback" not in said and "events are lost" in said


def test_a_log_that_is_full_is_renamed_for_the_front_too(tmp_path):
    """What it has to say stands in the new one."""
    log = tmp_path / "robot_server.log"
    log.write_text("x" * 4_999_990 + "\n")
    with serving(tmp_path) as process, Wire(process.requests) as wire:
        wire.take()
        wait_until(lambda: "lease: test" in log.read_text(), 10)
    assert (tmp_path / "robot_server.log.1").exists()


def test_a_folder_of_the_log_that_is_removed_ends_no_front(tmp_path):
    (tmp_path / "logs").mkdir()
    with serving(tmp_path, "--log-file", "logs/server.log") as process, Wire(process.requests) as wire:
        shutil.rmtree(tmp_path / "logs")
        wire.take()  # which is logged
        time.sleep(0.5)
        assert process.poll() is None and wire.ask("hello")["result"]["server"]["fronts"] == 1


def test_a_job_is_started_once(wire):
    wire.take()
    q = wire.state()["q"]
    first = wire.ask("move_joints", handle="only-once", q=[q[0] + 0.1, *q[1:]], speed=0.5)
    again = wire.ask("move_joints", handle="only-once", q=[q[0] + 0.1, *q[1:]], speed=0.5)
    assert first["result"]["status"] == "queued" and again["result"]["status"] in ("queued", "running")
    wait_until(lambda: wire.ask("job", handle="only-once")["result"]["status"] == "done")
    reached = wire.state()["q"]
    assert wire.ask("move_joints", handle="only-once", q=[q[0] - 0.5, *q[1:]])["result"]["status"] == "done"
    assert np.abs(np.subtract(wire.state()["q"], reached)).max() < 1e-3 and wire.state()["mode"] == "idle"


def test_one_arm_job_at_a_time(wire):
    wire.take()
    q = wire.state()["q"]
    wire.ask("move_joints", handle="first-job", q=[q[0] + 0.3, *q[1:]], speed=0.1)
    wire.wait_for(mode="busy", timeout=5)
    assert wire.refused("move_joints", handle="second-job", q=q) == "busy"
    assert wire.refused("start", handle="third-job") == "busy"
    assert wire.refused("target", pose=wire.state()["reference"]) in ("busy", "not_streaming")
    wire.ask("hold", token=OTHER)  # ends it
    wait_until(lambda: wire.ask("job", handle="first-job")["result"]["status"] == "failed", 5)
    assert "hold" in wire.ask("job", handle="first-job")["result"]["error"]
    assert np.linalg.norm(wire.wait_for(mode="idle", timeout=5)["dq"]) < 0.05


def test_a_job_stops_when_its_lease_ends(wire):
    wire.ask("acquire", name="test", token=TOKEN, ttl=0.3)
    q = wire.state()["q"]
    wire.ask("move_joints", handle="abandoned", q=[q[0] + 1.0, *q[1:]], speed=0.1)
    state = wire.wait_for(lease=None, timeout=5)
    wire.wait_for(mode="idle", timeout=5)
    wire.take()
    assert wire.ask("job", handle="abandoned")["result"]["status"] == "failed"
    assert abs(wire.state()["q"][0] - q[0]) < 0.5 and state["fault"] is None


@pytest.mark.parametrize(
    "q",
    [
        *([0.0] * 6, [math.nan] * 7, [0.0] * 7, "home", [True] * 7, None),
        *([0.0, -0.26, 0.0, -2.43, 0.0, 2.17, last] for last in (9.0, -9.0)),
    ],
)
def test_joint_goals_are_checked(wire, q):
    """A joint beyond its limits (joint 4 at 0 is), or what is no goal at all."""
    wire.take()
    before = wire.state()["q"]
    assert wire.refused("move_joints", handle="bad-goal", q=q) in ("bad_argument", "refused")
    assert wire.state()["mode"] == "idle" and math.dist(wire.state()["q"], before) < 1e-3


@pytest.mark.parametrize("speed", [0.0, -1.0, 5.0, math.nan, "fast", True])
def test_job_speeds_are_checked(wire, speed):
    wire.take()
    assert wire.refused("reset", handle="bad-speed", speed=speed) == "bad_argument"


@pytest.mark.parametrize("handle", ["short", "x" * 65, 3, None, ["x" * 8], "\u0141" * 64, "x" * 8 + "\n"])
def test_handles_are_checked(wire, handle):
    wire.take()
    assert wire.refused("start", handle=handle) == "bad_argument"
    assert wire.refused("job", handle=handle) in ("bad_argument", "unknown_handle")


def test_recover_without_a_fault(wire):
    wire.take()
    wire.done("recover")
    assert wire.state()["mode"] == "idle" and wire.state()["fault"] is None


# --- Gains ------------------------------------------------------------------------------------------------------------
def test_gains(wire):
    wire.take()
    before = wire.ask("gains")["result"]
    after = wire.ask("gains", stiffness=700.0, clip=[0.004, 0.005, 0.006])["result"]
    assert after == before | {"stiffness": 700.0, "clip": [0.004, 0.005, 0.006]}
    start = wire.stream()
    assert wire.ask("gains", stiffness=1200.0)["result"]["stiffness"] == 1200.0
    assert wire.ask("target", pose=start)["mode"] == "streaming"
    wire.ask("gains", **before)


@pytest.mark.parametrize(
    "gains",
    [
        {"stiffness": -1.0},
        {"stiffness": 0.001, "damping": 0.05},
        {"rotational_stiffness": 5e-324, "rotational_damping": 1e-162},
        {"clip": [5e-324] * 3},
        {"rotational_clip": [5e-324] * 3},
        {"stiffness": math.nan},
        {"stiffness": 1e6},
        {"damping": -5.0},
        {"rotational_stiffness": math.inf},
        {"clip": [0.01, 0.01]},
        {"clip": [0.01, 0.01, 5.0]},
        {"clip": [-0.01, 0.01, 0.01]},
        {"clip": 0.01},
        {"rotational_clip": [math.nan] * 3},
        {"stiffness": "stiff"},
        {"stiffness": True},
        {"stiff": 3.0},
        {"handle": "x" * 8},
        # with nothing else wrong: too stiff, too little and too much damping, a clip that is let go too fast, too long
        {"stiffness": 1e4, "damping": 200.0, "clip": [0.001] * 3},
        {"damping": 20.0, "clip": [0.002] * 3},
        {"damping": 200.0},
        {"clip": [0.012] * 3},
        {"stiffness": 100.0, "damping": 40.0, "clip": [0.06] * 3},
        {"rotational_stiffness": 400.0, "rotational_damping": 20.0, "rotational_clip": [0.01] * 3},
        {"rotational_clip": [0.06] * 3},
        {"nullspace_stiffness": 60.0},
    ],
)
def test_gains_are_checked(wire, gains):
    wire.take()
    before = wire.ask("gains")["result"]
    reply = wire.call("gains", **gains)
    assert reply["error"]["code"] == "bad_argument" and len(reply["error"]["message"]) < 160
    assert wire.ask("gains")["result"] == before


# --- Gripper, cameras, task -------------------------------------------------------------------------------------------
def test_gripper(wire):
    wire.take()
    wire.done("gripper", action="close")
    assert wire.state()["gripper_width"] < 0.003
    wire.done("gripper", action="open")
    assert wire.state()["gripper_width"] > 0.077
    wire.done("gripper", action="move", width=0.04, speed=0.5)
    assert wire.state()["gripper_width"] == pytest.approx(0.04, abs=0.003)
    wire.ask("gripper", handle="older-one", action="move", width=0.0, speed=0.05)
    wire.done("gripper", action="open")
    older = wire.ask("job", handle="older-one")["result"]
    assert older["status"] == "failed" and "superseded" in older["error"]


def test_the_gripper_follows_the_target(wire):
    """Its closure is part of the target; only a change is an order, and nobody waits for it."""
    wire.take()
    wire.done("gripper", action="open")
    start = wire.stream()
    assert wire.state()["gripper_closure"] is None
    slowest = 0.0
    for closure, width in ((1, 0.0), (0.5, 0.04), (0, 0.08)):
        asked = time.monotonic()
        first = wire.ask("target", pose=start, closure=closure)
        slowest = max(slowest, time.monotonic() - asked)
        replies = [first, *follow(wire, lambda t: start, 0.1)]
        wire.ask("target", pose=start, closure=closure)  # no new order
        replies += follow(wire, lambda t: start, 1.2)
        assert {reply["mode"] for reply in replies} == {"streaming"}
        job = replies[-1]["jobs"]["gripper"]
        assert (job["op"], job["handle"], job["status"]) == ("target", None, "done"), job
        assert job["seconds"] < 1.2 and replies[-1]["result"]["gripper_closure"] == closure
        assert replies[-1]["result"]["gripper_width"] == pytest.approx(width, abs=0.003)
    assert slowest < 0.3
    for closure in (-0.1, 1.1, math.nan, "shut", True):
        assert wire.refused("target", pose=start, closure=closure) == "bad_argument"
    wire.done("gripper", action="close")  # an order of its own: then any closure is a change again
    wire.done("start")
    wire.ask("target", pose=start, closure=0)
    follow(wire, lambda t: start, 1.2)
    assert wire.state()["gripper_width"] > 0.077


def test_jobs_are_in_every_reply(server, wire):
    wire.take()
    wire.ask("reset", handle="shown-everywhere", speed=0.05)
    seen = wire.ask("state", token=OTHER)["jobs"]["arm"]
    assert (seen["handle"], seen["op"], seen["error"]) == ("shown-everywhere", "reset", None)
    assert seen["status"] in ("queued", "running", "done")
    assert wire.refused("start", handle="shown-everywhere") == "handle_used"
    assert wire.refused("gripper", handle="shown-everywhere", action="open") == "handle_used"
    assert watch(server.states, 0.3)[-1]["jobs"]["arm"]["handle"] == "shown-everywhere"
    wire.ask("stop")
    wire.wait_for(mode="idle")


@pytest.mark.parametrize(
    "args",
    [
        {"action": "explode"},
        {"action": "move"},
        {"action": "move", "width": math.nan},
        {"action": "move", "width": 1.0},
        {"action": "move", "width": -0.1},
        {"action": "close", "force": 2.0},
        {"action": "close", "speed": -1.0},
        {"action": None},
        {},
    ],
)
def test_gripper_commands_are_checked(wire, args):
    wire.take()
    assert wire.refused("gripper", handle="bad-grip", **args) == "bad_argument"


def test_images_from_what_task_gives(server, wire):
    """The client renders: the same pixels as of the scene itself, and no OpenGL in the server."""
    gym = pytest.importorskip("gymnasium")
    import franka_sim  # noqa: F401

    wire.take()
    wire.done("reset_task", seed=3)
    assert wire.refused("frames") == "unknown_op"
    time.sleep(0.1)
    task = wire.ask("task")["result"]
    assert task["robot_time"] == pytest.approx(wire.state()["robot_time"], abs=0.3)
    twin = gym.make(task["env_id"]).unwrapped
    scene = {name: np.array(numbers) for name, numbers in task["scene"].items()}
    twin.sim.set_state(scene)
    assert twin.sim.q == pytest.approx(wire.state()["q"], abs=1e-3)
    seen = twin.task_observation()
    assert seen["cube_pos"].tolist() == pytest.approx(task["observation"]["cube_pos"], abs=1e-9)
    twin.close()
    for pid in (server.pid, *fronts(server.pid)):
        maps = Path(f"/proc/{pid}/maps").read_text()
        assert not any(library in maps for library in ("libEGL", "libGL.", "libOSMesa", "OpenGL"))


def test_task_and_its_reset(wire):
    wire.take()
    places = []
    for seed in (3, 4, 3):
        wire.done("reset_task", seed=seed)
        task = wire.ask("task")["result"]
        places.append(task["observation"]["cube_pos"])
        assert task["env_id"] == "FrankaPickCube-v0" and task["success"] is False
    assert places[0][:2] == pytest.approx(places[2][:2], abs=1e-4) and distance(places[0], places[1]) > 0.01
    wire.stream()
    wire.done("reset_task", seed=4)  # stops what runs, first
    assert wire.state()["mode"] == "idle"


def test_pick_up_the_cube(wire):
    """Through the wire alone: go there, grasp, lift."""
    wire.take()
    wire.done("reset_task", seed=0)
    cube = wire.ask("task")["result"]["observation"]["cube_pos"]
    pose = wire.stream()
    wire.ask("gripper", handle="open-first", action="open")

    def go(goal: list[float]) -> None:
        for _ in range(400):
            reference = wire.state()["reference"]
            step = [min(max(a - b, -0.03), 0.03) for a, b in zip(goal, reference)]
            wire.ask("target", pose=moved([*reference[:3], *pose[3:]], *step))
            state = wire.state()
            if distance(state["tcp_pose"], [*goal, 0]) < 0.008 and np.linalg.norm(state["tcp_vel"][:3]) < 0.02:
                return
            time.sleep(0.02)
        raise AssertionError(f"{goal} not reached: {state}")

    go([cube[0], cube[1], 0.12])
    go([cube[0], cube[1], max(cube[2], wire.hello["limits"]["workspace_low"][2] + 0.001)])
    wire.ask("gripper", handle="grasp-it", action="close")
    reference = wire.state()["reference"]
    for _ in range(100):
        wire.ask("target", pose=reference)
        if wire.ask("job", handle="grasp-it")["result"]["status"] == "done":
            break
        time.sleep(0.02)
    assert wire.state()["gripper_holding"] and wire.state()["gripper_width"] == pytest.approx(0.04, abs=0.004)
    go([cube[0], cube[1], 0.2])
    assert wire.ask("task")["result"]["success"] is True
    wire.ask("stop")
    wire.wait_for(mode="idle", timeout=5)
    wire.done("reset_task", seed=0)


# --- The program ------------------------------------------------------------------------------------------------------
def test_as_fast_as_it_can(tmp_path):
    with serving(tmp_path, "--sim-speed", 0) as process, Wire(process.requests) as wire:
        speeds = []
        while not speeds or (max(speeds) < 2 and len(speeds) < 20):  # a busy machine may need a few
            first, start = wire.state()["robot_time"], time.monotonic()
            time.sleep(1)
            speeds.append((wire.state()["robot_time"] - first) / (time.monotonic() - start))
        if max(speeds) < 2 and os.getloadavg()[0] > 4 * os.cpu_count():
            pytest.skip(f"the machine is too busy: {max(speeds):.1f} times real time")
        assert max(speeds) > 2


def test_peg_task(tmp_path):
    flags = "--env-id", "FrankaPegInsert-v0"
    with serving(tmp_path, *flags) as process, Wire(process.requests) as wire:
        task = wire.ask("task")["result"]
        assert task["env_id"] == "FrankaPegInsert-v0" and len(task["observation"]["hole_pose"]) == 4
        start = wire.stream()
        follow(wire, lambda t: moved(start, z=0.03), 1.0)
        assert wire.state()["tcp_pose"][2] - start[2] > 0.02


def test_a_server_in_a_file_of_another_name(tmp_path):
    """As a browser names what it has downloaded before."""
    script = tmp_path / "robot_server (1).py"
    shutil.copy(REPO / "robot_server.py", script)
    shutil.copy(REPO / "franka_sim.py", tmp_path)
    with serving(tmp_path, script=script) as process, Wire(process.requests) as wire:
        assert wire.state()["mode"] == "idle"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_end_it_cleanly(tmp_path, number):
    with serving(tmp_path, "--log-file", tmp_path / "server.log") as process, Wire(process.requests) as wire:
        start = wire.stream()
        wire.ask("target", pose=moved(start, y=0.05))
        os.killpg(process.pid, number)  # as a terminal does: also to the fronts, which must not end before
        assert process.wait(10) in (0, 128 + number, -number)
        output = process.stdout_path.read_text() + process.stderr_path.read_text()
        assert "Traceback" not in output
        log = (tmp_path / "server.log").read_text()
        assert not any(word in log for word in ("Traceback", "takes over")) and signal.Signals(number).name in log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_comes_twice_lets_the_arm_come_to_rest(tmp_path, number):
    """As where a terminal is closed: the shell sends SIGHUP, and so does the system when the shell has ended."""
    with serving(tmp_path) as process, Wire(process.requests) as wire:
        start = wire.stream()
        follow(wire, lambda t: moved(start, y=0.1), 0.5)
        for _ in range(2):
            process.send_signal(number)
            time.sleep(0.02)
        assert process.wait(10) == 0
    assert (tmp_path / "robot_server.log").read_text().endswith(" INFO end\n")


def test_a_terminal_that_is_closed_ends_it_cleanly(tmp_path):
    """Not through the SDKs' destructors, although the last words have nobody to read them."""
    ours, theirs = os.openpty()
    command = [sys.executable, REPO / "robot_server.py", "--port", "0"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        said = b""
        while b"serving" not in said:
            said += os.read(ours, 10_000)
        os.close(ours)
        process.send_signal(signal.SIGHUP)
        assert process.wait(20) == 0


def test_a_terminal_that_takes_nothing_holds_nothing_up(tmp_path):
    """As after Ctrl-S, or with ssh over a network that is gone."""
    ours, theirs = os.openpty()
    command = [sys.executable, REPO / "robot_server.py", "--port", "0"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=theirs, stderr=theirs) as process:
        said = b""
        while b"serving" not in said:
            said += os.read(ours, 10_000)
        termios.tcflow(theirs, termios.TCOOFF)  # Ctrl-S
        time.sleep(0.6)
        first = fronts(process.pid)[0]
        os.kill(first, signal.SIGKILL)
        try:
            wait_until(lambda: first not in fronts(process.pid) and len(fronts(process.pid)) == 2, 10)
            process.terminate()
            assert process.wait(10) in (0, -signal.SIGALRM)
        finally:
            process.kill()
    assert (tmp_path / "robot_server.log").read_text().endswith(" INFO end\n")
    os.close(ours)
    os.close(theirs)


def test_nohup_is_heeded(tmp_path):
    script = tmp_path / "ignoring.py"
    program = f"import signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); sys.path.insert(0, {str(REPO)!r}); "
    script.write_text(program + "import robot_server; robot_server.main(robot_server.parse_args())")
    with serving(tmp_path, script=script) as process, Wire(process.requests) as wire:
        process.send_signal(signal.SIGHUP)
        time.sleep(0.3)
        assert process.poll() is None and wire.state()["mode"] == "idle"


def test_a_bug_in_the_main_thread_lets_the_arm_come_to_rest(tmp_path):
    script = tmp_path / "broken.py"
    script.write_text(
        f"import os, sys; sys.path.insert(0, {str(REPO)!r})\nimport robot_server\n"
        "def look(robot, passed):\n"
        "    if os.path.exists('now'):\n"
        "        raise OSError('no room for a new front')\n"
        "robot_server.Robot.watch_control = look\n"
        "robot_server.main(robot_server.parse_args())\n"
    )
    with serving(tmp_path, "--log-file", tmp_path / "server.log", script=script) as process:
        with Wire(process.requests) as wire:
            wire.stream()
            (tmp_path / "now").touch()
            assert process.wait(10) == 1
        assert "internal: OSError('no room for a new front'), see" in process.stderr_path.read_text()
        log = (tmp_path / "server.log").read_text()
        assert "no room for a new front" in log and log.rstrip().endswith("end")


def test_the_port_is_taken(tmp_path):
    with serving(tmp_path) as process:
        port = process.requests.rsplit(":", 1)[1]
        second = run_script("robot_server.py", "--port", port, cwd=tmp_path / "second", timeout=30, check=False)
    assert second.returncode not in (0, None) and "--port" in second.stderr + second.stdout
    assert "Traceback" not in second.stderr


BAD_FLAGS = {  # flags: what the message names
    "--gripper franka-hand": "--gripper",
    "--gripper sim --robot franky": "--gripper",
    "--bind 0.0.0.0": "--insecure-lan",
    "--bind 192.0.2.1": "--keys",
    "--bind robot-pc": "--keys",
    "--keygen": "--keys",
    "--control-hz 50": "--control-hz",
    "--max-speed -1": "--max-speed",
    "--max-speed 0": "--max-speed",
    "--max-speed nan": "--max-speed",
    "--sim-speed -1": "--sim-speed",
    "--port 70000": "--port",
    "--log-file nowhere/x.log": "--log-file",
    "--workspace-low 1 1 1": "--workspace",
    "--reset-joints 0 0 0 0 0 0 0": "--reset-joints",
    "--hold-after-s 3": "--hold-after-s",
    "--hold-after-s 0": "--hold-after-s",
    "--frozen-after-s 0": "--frozen-after-s",
    "--gains.stiffness 1e6": "--gains",
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags_are_named(tmp_path, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(robot_server, "Robot", lambda args: pytest.fail(f"{flags} were accepted"))
    with pytest.raises(SystemExit) as ended:
        robot_server.main(tyro.cli(robot_server.Args, args=flags.split()))
    assert BAD_FLAGS[flags] in str(ended.value)


@pytest.mark.parametrize("flags", ["--env-id FrankaFly-v0", "--keys nowhere"])
def test_a_bad_flag_ends_the_program(tmp_path, flags):
    result = run_script("robot_server.py", "--port", 0, *flags.split(), cwd=tmp_path, timeout=60, check=False)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith(f"robot_server.py: {flags.split()[0]}") and result.stderr.count("\n") == 1


def test_doctor(tmp_path):
    result = run_script("robot_server.py", "--doctor", cwd=tmp_path, timeout=60)
    assert "mujoco" in result.stdout and result.stdout.rstrip().endswith("ready")
    # a robot that nobody answers for, a port that is not there
    flags = ("--robot", "franky", "--robot-ip", "127.8.8.8", "--gripper", "robotiq", "--gripper-port", "/nowhere")
    result = run_script("robot_server.py", "--doctor", *flags, cwd=tmp_path, timeout=60, check=False)
    text = result.stdout.lower()
    for word in ("franky-control", "pymodbus", "preempt_rt", "governor", "priority", "127.8.8.8", "/nowhere"):
        assert word in text, result.stdout
    assert result.returncode == 1 and "Traceback" not in result.stderr
    checks = [line for line in result.stdout.splitlines() if line[:4] in ("ok  ", "FAIL", "warn")]
    assert len(checks) >= 10 and all(": " in line for line in checks)
    assert all("; " in line for line in checks if line[:2] != "ok")  # each with its remedy
    assert result.stdout.splitlines()[-1] == f"{result.stdout.count('FAIL')} to fix"


# --- Keys -------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    for name in ("good", "other"):
        run_script("robot_server.py", "--keygen", "--keys", folder / name, cwd=folder, timeout=30)
    return folder


def test_keygen(keys):
    names = {path.name for path in (keys / "good").iterdir()}
    assert {"server.key", "server.key_secret", "client.key", "client.key_secret"} <= names
    for name in ("server.key_secret", "client.key_secret"):
        assert stat.S_IMODE((keys / "good" / name).stat().st_mode) == 0o600, "others may read it"
    before = (keys / "good" / "server.key_secret").read_bytes()
    inside = keys / "good" / "server.key" / "keys"  # in a file
    wrong = run_script("robot_server.py", "--keygen", "--keys", inside, cwd=keys, timeout=30, check=False)
    assert (
        wrong.returncode == 1
        and wrong.stderr.startswith("robot_server.py: --keygen: ")
        and "Traceback" not in wrong.stderr
    )
    again = run_script("robot_server.py", "--keygen", "--keys", keys / "good", cwd=keys, timeout=30, check=False)
    assert again.returncode != 0 and (keys / "good" / "server.key_secret").read_bytes() == before


def test_only_those_with_keys_are_heard(tmp_path, keys):
    with serving(tmp_path, "--keys", keys / "good") as process, Wire(process.requests, keys=keys / "good") as wire:
        assert wire.hello["protocol"] == 2
        for stranger in (None, keys / "other"):
            with Wire(process.requests, keys=stranger, timeout=0.7) as deaf, pytest.raises(TimeoutError):
                deaf.ask("hello")
        mixed = tmp_path / "mixed"  # the server's key is no secret; the client's must be known
        mixed.mkdir()
        (mixed / "server.key").write_bytes((keys / "good" / "server.key").read_bytes())
        (mixed / "client.key_secret").write_bytes((keys / "other" / "client.key_secret").read_bytes())
        with Wire(process.requests, keys=mixed, timeout=0.7) as deaf, pytest.raises(TimeoutError):
            deaf.ask("hello")
        assert watch(process.states, 0.5) == []
        assert wire.state()["mode"] == "idle"


def swapped_keys(folder: Path) -> None:
    for suffix in (".key", ".key_secret"):
        server, client = folder / f"server{suffix}", folder / f"client{suffix}"
        server_text = server.read_text()
        server.write_text(client.read_text())
        client.write_text(server_text)
    (folder / "server.key").write_text((folder / "client.key").read_text())


WRONG_KEYS = {  # what is done to the folder, and the file that the message names
    "empty": (lambda folder: (folder / "server.key_secret").write_bytes(b""), "server.key_secret"),
    "garbled": (lambda folder: (folder / "server.key_secret").write_bytes(b"\xff\x00" * 300), "server.key_secret"),
    "cut": (lambda folder: (folder / "client.key").write_text('curve\n    public-key = "abc"\n'), "client.key"),
    "cut in a word": (lambda folder: (folder / "client.key").write_text("curve\n    public-key"), "client.key"),
    "empty client": (lambda folder: (folder / "client.key").write_bytes(b""), "client.key"),
    "missing": (lambda folder: (folder / "server.key_secret").unlink(), "server.key_secret"),
    "no client": (lambda folder: (folder / "client.key").unlink(), "client"),
    "public as secret": (
        lambda folder: (folder / "server.key_secret").write_text((folder / "server.key").read_text()),
        "server.key_secret",
    ),
    "secret as public": (
        lambda folder: (folder / "client.key").write_text((folder / "client.key_secret").read_text()),
        "client.key",
    ),
    "another's secret": (swapped_keys, "server.key"),
}


@pytest.mark.parametrize("case", WRONG_KEYS)
def test_wrong_keys_are_named(tmp_path, keys, case):
    folder = tmp_path / "keys"
    shutil.copytree(keys / "good", folder)
    spoil, file = WRONG_KEYS[case]
    spoil(folder)
    flags = "--keys", folder, "--port", 0
    for doctor in ((), ("--doctor",)):
        result = run_script("robot_server.py", *flags, *doctor, cwd=tmp_path, timeout=60, check=False)
        assert result.returncode == 1 and result.stderr.count("\n") == 1, result.stderr
        assert result.stderr.startswith(f"robot_server.py: --keys {folder}") and file in result.stderr


def test_a_secret_that_others_can_read(tmp_path, keys):
    folder = tmp_path / "keys"
    shutil.copytree(keys / "good", folder)
    (folder / "server.key_secret").chmod(0o644)
    with serving(tmp_path, "--keys", folder) as process, Wire(process.requests, keys=folder) as wire:
        assert wire.state()["mode"] == "idle"
        assert "others can read server.key_secret: chmod 600" in process.stderr_path.read_text()


def test_refused_keys_are_logged(tmp_path, keys):
    log = tmp_path / "robot_server.log"
    with serving(tmp_path, "--keys", keys / "good") as process:
        mixed = tmp_path / "mixed"
        mixed.mkdir()
        (mixed / "server.key").write_bytes((keys / "good" / "server.key").read_bytes())
        (mixed / "client.key_secret").write_bytes((keys / "other" / "client.key_secret").read_bytes())
        for stranger in (mixed, None):
            with Wire(process.requests, keys=stranger, timeout=0.5) as deaf, pytest.raises(TimeoutError):
                deaf.ask("hello")
            words = "keys refused" if stranger else "no handshake"
            with Wire(process.requests, keys=stranger):
                wait_until(lambda words=words: words in log.read_text(), 30)
        host, port = process.requests.removeprefix("tcp://").split(":")
        with socket.create_connection(
            (host, int(port))
        ):  # says nothing, and stays long enough to be asked for its name
            wait_until(lambda: "127.0.0.1: no handshake" in log.read_text(), 30)


def test_a_name_with_addresses_of_both_kinds(monkeypatch):
    """Such as localhost in many systems: a client takes the IPv4 one."""
    found = [(socket.AF_INET6, 1, 6, "", ("::1", 0, 0, 0)), (socket.AF_INET, 1, 6, "", ("127.0.0.1", 0))]
    monkeypatch.setattr(robot_server.socket, "getaddrinfo", lambda *_, **__: found)
    for one in robot_server.listen_on("localhost", 0):
        assert one.getsockname()[0] == "127.0.0.1"
        one.close()


def test_the_other_loop_back(tmp_path):
    if not socket.has_ipv6 or not Path("/proc/net/if_inet6").exists():
        pytest.skip("there is no IPv6 here")
    with serving(tmp_path, "--bind", "::1") as process, Wire(process.requests) as wire:
        assert process.requests.startswith("tcp://[::1]:") and wire.state()["mode"] == "idle"


def test_nothing_is_pickled_or_evaluated():
    source = (REPO / "robot_server.py").read_text()
    assert not any(word in source for word in ("import pickle", "recv_pyobj", "send_pyobj", "eval(", "exec("))


def test_help_is_the_header(tmp_path):
    result = run_script("robot_server.py", "--help", cwd=tmp_path, timeout=30)
    assert robot_server.__doc__.strip() in result.stdout and "--max-joint-speed" in result.stdout
