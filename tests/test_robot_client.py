"""Tests of robot_client.py: rotations against scipy, the client against a server that misbehaves, cameras,
teleoperation, and the environment against robot_server.py on the simulated arm."""

import contextlib
import dataclasses
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import gymnasium as gym
import msgpack
import numpy as np
import pytest
import zmq
from conftest import REPO, free_port, popen_script, run_script, wait_until
from scipy.spatial.transform import Rotation

import robot_client as rc
import robot_server
from robot_client import CameraConfig, FrankaEnv, Intervention, RobotClient, TaskConfig

RNG = np.random.default_rng(0)


def test_nothing_heavy_is_imported():
    """A laptop beside the robot needs no torch; SDKs are imported where they are used."""
    code = "import sys, robot_client; print(*{'torch', 'mujoco', 'pyrealsense2', 'pyspacemouse'} & set(sys.modules))"
    assert run_python(code).stdout.strip() == ""


# --- Poses ------------------------------------------------------------------------------------------------------------
def quaternions(count: int = 50) -> np.ndarray:
    return Rotation.random(count, random_state=1).as_quat()


def same_rotation(quaternion: np.ndarray, rotation: Rotation) -> None:
    assert (Rotation.from_quat(quaternion) * rotation.inv()).magnitude() < 1e-7
    assert np.linalg.norm(quaternion) == pytest.approx(1)


def test_motion_leads_from_one_pose_to_the_other():
    """Both parts in the axes of the base; a quarter turn about z leaves the translation along x alone."""
    down = np.array([0.5, 0, 0.2, 1, 0, 0, 0])
    turned = rc.moved(down, np.array([0.1, 0, 0, 0, 0, np.pi / 2]))
    np.testing.assert_allclose(turned, [0.6, 0, 0.2, 0.5**0.5, 0.5**0.5, 0, 0], atol=1e-12)
    for a, b in zip(quaternions(), quaternions()[::-1]):
        a, b = np.append(RNG.normal(size=3), a), np.append(RNG.normal(size=3), b)
        motion = rc.difference(a, b)
        assert np.linalg.norm(motion[3:]) <= np.pi
        np.testing.assert_allclose(rc.moved(b, motion)[:3], a[:3], atol=1e-12)
        same_rotation(rc.moved(b, motion)[3:], Rotation.from_quat(a[3:]))


def test_euler_angles_are_about_the_fixed_axes_in_turn():
    """Roll first, then pitch, which SERL's own turns around, then yaw."""
    for roll, pitch, yaw in RNG.uniform(-1.5, 1.5, (20, 3)):
        pose = rc.pose_from_euler((1, 2, 3, roll, pitch, yaw))
        in_turn = [Rotation.from_rotvec(angle * axis) for angle, axis in zip((roll, pitch, yaw), np.eye(3))]
        assert pose[:3].tolist() == [1, 2, 3]
        same_rotation(pose[3:], in_turn[2] * in_turn[1] * in_turn[0])


def test_relative_pose_agrees_with_homogeneous_matrices():
    def matrix(pose: np.ndarray) -> np.ndarray:
        return np.block([[Rotation.from_quat(pose[3:]).as_matrix(), pose[:3, None]], [0, 0, 0, 1]])

    for a, b in zip(quaternions(), quaternions()[::-1], strict=True):
        pose, origin = np.append(RNG.normal(size=3), a), np.append(RNG.normal(size=3), b)
        relative = rc.relative_pose(pose, origin)
        np.testing.assert_allclose(matrix(relative), np.linalg.inv(matrix(origin)) @ matrix(pose), atol=1e-9)
        assert relative[6] >= 0


# --- Pace -------------------------------------------------------------------------------------------------------------
@pytest.fixture
def clock(monkeypatch):
    """A clock that only sleep and `clock.now +=` move."""
    clock = types.SimpleNamespace(now=100.0, slept=[])
    monkeypatch.setattr(rc.time, "monotonic", lambda: clock.now)

    def sleep(seconds: float) -> None:
        assert seconds >= 0
        clock.slept.append(seconds)
        clock.now += seconds + 0.001  # it wakes up late

    monkeypatch.setattr(rc.time, "sleep", sleep)
    return clock


def test_whoever_keeps_the_beat_goes_first_where_that_is_allowed():
    """Before programs such as the learner; neither the threads that it starts nor other programs inherit it."""

    def scheduler() -> int:
        return os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK

    def keep_the_beat():
        rc.keep_the_beat()
        seen.append(scheduler())
        child = threading.Thread(target=lambda: seen.append(scheduler()))
        child.start()
        child.join()

    def is_allowed():
        try:
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(5))
        except PermissionError:
            return
        allowed.append(True)

    seen, allowed = [], []
    for work in (keep_the_beat, is_allowed):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert seen == [os.SCHED_FIFO if allowed else os.SCHED_OTHER, os.SCHED_OTHER]


def test_pace_does_not_drift_and_tells_how_late_it_woke_up(clock):
    pace = rc.Pace(10, lambda: clock.now)
    for k in range(1, 101):
        clock.now += 0.03  # work
        period, late = pace.wait()
        assert late == pytest.approx(0.001)
        assert period == pytest.approx(0.1 if k > 1 else 0.101)
        assert clock.now == pytest.approx(100 + 0.1 * k + 0.001)
    assert pace.overruns == 0


def test_pace_catches_up_a_little_and_starts_anew_after_much(clock):
    pace = rc.Pace(10, lambda: clock.now)
    clock.now += 0.12
    assert pace.wait() == pytest.approx((0.12, 0.02))
    clock.now += 0.01
    assert pace.wait() == pytest.approx((0.081, 0.001))  # on the old schedule
    clock.now += 0.499
    assert pace.wait() == pytest.approx((0.499, 0.4))
    pace.wait()
    assert clock.now == pytest.approx(100.801)  # a whole period after the late beat, not one burst of four
    assert pace.overruns == 2


def test_pace_by_a_clock_that_runs_faster_or_is_set_back(clock):
    """A simulated robot at four times real time; and one that lost time: the beat waits for its clock."""
    pace = rc.Pace(10, lambda: 4 * (clock.now - 100), speed=4.0)
    period, late = pace.wait()
    assert clock.slept == [pytest.approx(0.025)]
    assert (period, late) == pytest.approx((0.104, 0.004))
    lost = iter([0.0, 0.0, 0.05, 0.05, 0.05, 0.05])
    pace = rc.Pace(10, lambda: clock.now - next(lost))
    start = clock.now
    pace.wait()
    assert clock.now - start > 0.15
    back = [0.0]
    pace = rc.Pace(10, lambda: clock.now - back[0])
    back[0] = 1e6  # the robot was started anew
    start = clock.now
    assert pace.wait() == pytest.approx((0.101, 0.001))
    assert clock.now - start == pytest.approx(0.101)


# --- Client -----------------------------------------------------------------------------------------------------------
class FakeServer:
    """A ROUTER that answers as `answer(request)` says: a map that is merged into a good reply, bytes, or None: not."""

    def __init__(self, address: str = "tcp://127.0.0.1:*"):
        self.answer, self.requests, self.running = lambda request: {}, [], True
        self.socket = zmq.Context.instance().socket(zmq.ROUTER)
        self.socket.linger = 0
        self.socket.bind(address)
        self.address = self.socket.last_endpoint.decode()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self) -> None:
        while self.running:
            if not self.socket.poll(20):
                continue
            *envelope, body = self.socket.recv_multipart()
            request = msgpack.unpackb(body)
            self.requests.append(request)
            answer = self.answer(request)
            if isinstance(answer, dict):
                reply = {"v": 2, "id": request["id"], "op": request["op"], "ok": True, "error": None, "result": {}}
                reply |= {"mode": "streaming", "reference": [0, 0, 0, 0, 0, 0, 1], "fault": None, "lease": None}
                reply |= {"robot_time": 7.0, "state_age": 0.002, "jobs": {"arm": None, "gripper": None}}
                answer = msgpack.packb(reply | answer)
            if answer is not None:
                self.socket.send_multipart([*envelope, *(answer if isinstance(answer, list) else [answer])])
        self.socket.close()

    def close(self) -> None:
        self.running = False
        self.thread.join()


HELLO = {"robot": {"speed": 1.0}}


def hello_of(request: dict) -> dict:
    return {"result": HELLO if request["op"] == "hello" else {}}


@pytest.fixture
def fake():
    with contextlib.closing(FakeServer()) as server:
        yield server


@pytest.fixture
def client(fake):
    with contextlib.closing(RobotClient(fake.address, name="test", timeout_s=0.2)) as client:
        yield client


def test_lost_replies_are_asked_for_again_and_late_ones_dropped(fake, client):
    def answer(request):
        count = len(fake.requests)
        if count == 1:
            return None  # lost
        if count == 2:
            time.sleep(0.3)  # late: arrives while the client waits for its third try
        return {"result": {"count": count}}

    fake.answer = answer
    assert client.call("state")["result"] == {"count": 3}
    assert [request["id"] for request in fake.requests] == [1, 1, 1]
    assert client.call("state")["result"] == {"count": 4}  # and the late one does not answer the next request


def test_dead_server_is_told_from_refused_command(fake, client):
    fake.answer = lambda request: {"ok": False, "error": {"code": "fault", "message": "reflex: collision"}}
    with pytest.raises(rc.RefusedError, match="fault: reflex: collision") as refusal:
        client.target(np.zeros(7))
    assert refusal.value.code == "fault" and len(fake.requests) == 1  # a no is not asked again
    fake.close()
    start = time.monotonic()
    with pytest.raises(rc.UnreachableError, match=r"no answer from .*robot_server.py running"):
        client.target(np.zeros(7))
    assert 0.5 < time.monotonic() - start < 1.0  # 3 tries of 0.2 s


def test_a_server_of_another_version_is_named(fake, client):
    """It cannot tell which request it refuses."""
    refusal = {"ok": False, "error": {"code": "version", "message": "this server speaks version 3"}}
    fake.answer = lambda request: refusal | {"id": None}
    with pytest.raises(rc.RefusedError, match="version: this server speaks version 3"):
        client.call("state")


def test_no_server_at_all():
    with (
        contextlib.closing(RobotClient("tcp://127.0.0.1:9", timeout_s=0.1, tries=2)) as client,
        pytest.raises(rc.UnreachableError, match="2 tries of 0.1 s"),
    ):
        client.hello()


def test_no_stale_command_reaches_a_server_that_comes_back(fake, client):
    client.call("state")
    fake.close()
    with pytest.raises(rc.UnreachableError):
        client.target(np.zeros(7))
    with contextlib.closing(FakeServer(fake.address)) as back:
        back.answer = hello_of
        assert client.hello(wait_s=5.0) == HELLO
        assert {request["op"] for request in back.requests} == {"hello"}


def test_waiting_for_a_server_may_be_given_up():
    asked = []

    def give_up() -> bool:
        asked.append(time.monotonic())
        return len(asked) == 2

    with contextlib.closing(RobotClient("tcp://127.0.0.1:9", timeout_s=0.1, tries=2)) as client:
        start = time.monotonic()
        with pytest.raises(rc.UnreachableError, match="no answer from"):
            client.hello(60.0, give_up)
    assert len(asked) == 2 and time.monotonic() - start < 10


class Cable:
    """A TCP connection through us to `port`, which can be cut: nothing passes, nobody is told."""

    def __init__(self, port: int):
        self.cut, self.port, self.listener = False, port, socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, far = self.listener.accept()[0], socket.create_connection(("127.0.0.1", self.port))
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self.pump, args=pair, daemon=True).start()

    def pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(4096):
                if self.cut:
                    return  # this connection never carries anything again, but stays open
                sink.sendall(data)
            sink.close()

    def close(self) -> None:
        self.listener.close()


def test_cut_cable_is_noticed_and_a_mended_one_works_again(fake):
    fake.answer = hello_of
    with (
        contextlib.closing(Cable(int(fake.address.rsplit(":")[-1]))) as cable,
        contextlib.closing(RobotClient(cable.address, timeout_s=0.2)) as client,
    ):
        client.call("state")
        for _ in range(2):
            cable.cut = True
            with pytest.raises(rc.UnreachableError, match="is the cable in"):
                client.target(np.zeros(7))
            cable.cut = False
            start, sent = time.monotonic(), len(fake.requests)
            client.hello(wait_s=5.0)
            assert time.monotonic() - start < 4.0
            assert {request["op"] for request in fake.requests[sent:]} == {
                "hello"
            }  # the old target does not arrive now


def test_target_that_arrived_but_whose_answer_was_lost(fake, client):
    """The second try is refused as stale: the first one is in force. A first try that is stale is an error."""

    def answer(request):
        if len(fake.requests) == 1:
            return None
        return {"ok": False, "error": {"code": "stale", "message": "seq 1"}, "result": {"limited": []}}

    fake.answer = answer
    assert client.target(np.arange(7.0))["reference"] == [0, 0, 0, 0, 0, 0, 1]
    with pytest.raises(rc.RefusedError, match="stale"):
        client.target(np.arange(7.0))
    assert [request["args"]["seq"] for request in fake.requests] == [1, 1, 2]
    assert fake.requests[0]["args"]["pose"] == [0, 1, 2, 3, 4, 5, 6]
    held = {"ok": False, "error": {"code": "held", "message": "start again"}}
    fake.answer = lambda request: None if len(fake.requests) == 4 else held
    with pytest.raises(rc.RefusedError, match="held"):  # also at a second try
        client.target(np.arange(7.0))


@pytest.mark.parametrize("last", ["idle", "fault", "hold"])
def test_stop_waits_until_the_arm_is_at_rest(fake, client, last):
    modes = ["hold", "stopping"]
    fake.answer = lambda request: {"mode": (modes.pop(0) if modes else last)} if request["op"] == "state" else {}
    if last == "hold":
        with pytest.raises(rc.RobotError, match="after 0.2 s; use the stop button"):
            client.stop(timeout_s=0.2)
    else:
        client.stop(timeout_s=10.0)
        assert not modes
    assert fake.requests[0]["op"] == "stop"


def test_job_keeps_its_handle_over_retries_and_reports_failure(fake, client):
    def answer(request):
        if request["op"] == "move_joints" and len(fake.requests) == 1:
            return None
        done = len(fake.requests) > 4
        return {"result": {"op": "move_joints", "status": "failed" if done else "running", "error": "joint limit"}}

    fake.answer = answer
    with pytest.raises(rc.RefusedError, match="failed: move_joints: joint limit"):
        client.job("move_joints", q=list(range(7)))
    assert len({request["args"]["handle"] for request in fake.requests}) == 1
    assert [request["op"] for request in fake.requests] == ["move_joints", "move_joints", "job", "job", "job"]


def test_job_without_end_holds_the_arm(fake, client):
    fake.answer = lambda request: {"result": {"op": "reset", "status": "running", "error": None}}
    with pytest.raises(rc.RefusedError, match="longer than 0.1 s; the arm holds"):
        client.job("reset", timeout_s=0.1)
    assert fake.requests[-1]["op"] == "hold"


def test_lease_token_is_sent_only_while_held(fake, client):
    client.state = lambda: client.call("state")
    client.state()
    client.acquire(ttl_s=2.0)
    client.state()
    client.acquire()
    client.release()
    client.state()
    tokens = [request.get("token") for request in fake.requests]
    assert tokens[0] is None and tokens[-1] is None and len(set(tokens[1:-1])) == 1 and len(tokens[1]) >= 16
    assert fake.requests[1]["args"] == {"name": "test", "token": tokens[1], "ttl": 2.0, "takeover": False}
    fake.answer = lambda request: {"ok": False, "error": {"code": "lease_taken", "message": "by anna"}}
    with pytest.raises(rc.RefusedError, match="lease_taken: by anna"):
        client.acquire()
    assert client.token is None


def test_another_lease_that_is_about_to_end_is_waited_for(fake, client):
    taken = {"ok": False, "error": {"code": "lease_taken", "message": "by anna"}}
    answers = iter([taken, taken])
    fake.answer = lambda request: next(answers, {})
    client.acquire(wait_s=60.0)
    assert client.token and len({request["args"]["token"] for request in fake.requests}) == 1


OTHER = {"id": 99, "result": HELLO}  # the answer to another question


@pytest.mark.parametrize("answer", [b"\xc1", b"", b"\x81" * 50, *map(msgpack.packb, ([1], {"id": 1})), OTHER])
def test_nonsense_from_a_server_is_one_clear_error(fake, client, answer):
    fake.answer = lambda request: answer
    with pytest.raises(rc.RobotError, match=r"does not speak the protocol of robot_server\.py"):
        client.hello()


def test_robots_clock_goes_on_between_replies(fake, client):
    fake.answer = lambda request: {"result": {"robot": {"speed": 4.0}}, "robot_time": 50.0, "state_age": 0.01}
    client.hello()
    client.call("state")
    began = time.monotonic()
    assert 50.04 <= client.robot_time() < 50.3
    time.sleep(0.1)
    assert client.robot_time() - 50.04 == pytest.approx(4 * (time.monotonic() - began), abs=0.2)


def test_target_carries_the_closure_of_the_gripper(fake, client):
    client.target(np.arange(7.0))
    client.target(np.arange(7.0), 0.25)
    assert [request["args"]["closure"] for request in fake.requests] == [None, 0.25]


def test_ipv6():
    """An address in brackets, as `robot_server.py --bind ::1` prints it."""
    probe = zmq.Context.instance().socket(zmq.ROUTER)
    probe.ipv6 = True
    try:
        probe.bind("tcp://[::1]:*")
    except zmq.ZMQError:
        pytest.skip("no IPv6 here")
    address = probe.last_endpoint.decode()
    with contextlib.closing(RobotClient(address, timeout_s=2.0, tries=1)) as client:
        answers = threading.Thread(target=answer_hello, args=(probe,))
        answers.start()
        assert client.hello() == HELLO
        answers.join()
    probe.close(0)


def answer_hello(router: zmq.Socket) -> None:
    *envelope, body = router.recv_multipart()
    reply = {"id": msgpack.unpackb(body)["id"], "ok": True, "result": HELLO, "robot_time": 0.0, "state_age": 0.0}
    router.send_multipart([*envelope, msgpack.packb(reply)])


@pytest.mark.parametrize("server", ["robot", "tcp://robot", "::1", "http://127.0.0.1:5600"])
def test_bad_addresses(server):
    with pytest.raises(rc.RobotError, match=r"--server .*; give it as tcp://HOST:PORT or tcp://\[IPV6\]:PORT"):
        RobotClient(server)


@pytest.fixture
def keys(tmp_path):
    zmq.auth.create_certificates(tmp_path, "server")
    zmq.auth.create_certificates(tmp_path, "client")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("client.key_secret", None),
        ("client.key_secret", ""),
        ("client.key_secret", "garbage \x00 \xff"),
        ("client.key_secret", 'curve\n    public-key = "short"\n    secret-key = "short"\n'),
        ("client.key_secret", "the public one"),
        ("server.key", None),
        ("server.key", ""),
        ("server.key", "curve\n    public-key"),
    ],
)
def test_bad_keys_are_one_line_that_names_the_file(keys, name, content):
    assert len(rc.load_keys(keys)) == 3
    if content is None:
        (keys / name).unlink()
    elif content == "the public one":
        (keys / name).write_text((keys / "client.key").read_text())
    else:
        (keys / name).write_bytes(content.encode("latin1"))
    with pytest.raises(rc.RobotError, match=f"--keys {keys}: .*{name}") as error:
        RobotClient(keys=str(keys))
    assert "\n" not in str(error.value)


# --- Cameras ----------------------------------------------------------------------------------------------------------
class DriverError(Exception):
    """As cv2.error is one."""


class PatternCamera(rc.Camera):
    """A moving pattern; `mode` makes it freeze (the same picture again and again), drop all, or raise."""

    mode = "run"
    number = 0

    def grab(self):
        time.sleep(1 / self.config.fps)
        if self.mode == "raise":
            raise RuntimeError("the test camera raises")
        if self.mode == "driver":
            raise DriverError("no buffer")
        if self.mode == "drop":
            self._stop.wait(self.config.timeout_s)
            raise rc.RobotError(f"no picture for {self.config.timeout_s} s")
        self.number += self.mode == "run"
        image = np.zeros((self.config.height, self.config.width, 3), np.uint8)
        image[:, : self.config.width // 2] = self.number % 256
        return image, self.number

    def open(self):
        pass


@pytest.fixture(autouse=True)
def a_kind_of_camera_of_our_own(monkeypatch):
    monkeypatch.setitem(rc.CAMERAS, "test", PatternCamera)


@pytest.fixture
def camera():
    config = CameraConfig("front", "test", width=16, height=12, fps=50, timeout_s=0.1)
    with contextlib.closing(PatternCamera(config, size=8)) as camera:
        yield camera.start()


def test_camera_keeps_the_newest_frame(camera):
    numbers = []
    for _ in range(5):
        time.sleep(0.1)
        frame = camera.read(max_age_s=0.05)
        assert frame.image.shape == (8, 8, 3) and frame.image.dtype == np.uint8
        assert frame.image[0, 0, 0] == frame.number % 256 and frame.image[0, 7, 0] == 0
        numbers.append(frame.number)
    assert all(3 <= step <= 7 for step in np.diff(numbers)), numbers  # 50 Hz, read at 10 Hz
    assert camera.restarts == 0


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("freeze", "delivers picture .* over and over"),
        ("drop", "no picture for 0.1 s"),
        ("raise", "test camera raises"),
        ("driver", "no buffer"),
    ],
)
def test_camera_that_fails_is_noticed_restarted_and_comes_back(camera, mode, reason):
    camera.shut = mock.Mock()
    camera.mode = mode
    wait_until(lambda: camera.restarts >= 3, 5.0)
    with pytest.raises(rc.RobotError, match=f"camera front: newest picture is .* s old: .*{reason}"):
        camera.read(max_age_s=0.1)
    assert [call.kwargs["hard"] for call in camera.shut.call_args_list[:3]] == [False, True, True]
    with pytest.raises(rc.RobotError, match="no new picture within 0.2 s"):
        camera.start(0.2)
    camera.mode = "run"
    camera.start(5.0)
    assert camera.read(max_age_s=0.1).image[0, 0, 0] == camera.number % 256


def test_a_new_picture_is_one_that_was_taken_later(camera):
    asked = time.monotonic()
    camera.wait_newer(asked, 2.0)
    assert camera.frame.time > asked
    camera.mode = "freeze"
    time.sleep(0.05)
    with pytest.raises(rc.RobotError, match="camera front: no new picture within 0.3 s: it delivers picture"):
        camera.wait_newer(time.monotonic(), 0.3)


def test_unknown_kinds_of_camera_and_simulated_ones_without_a_simulation():
    with pytest.raises(rc.RobotError, match="camera top: no kind 'webcam' here, but realsense, test, sim of"):
        rc.make_camera(CameraConfig("top", "webcam"), 64, None)
    with pytest.raises(rc.RobotError, match="camera top: no kind 'sim' here, but .*, sim of a simulated robot"):
        rc.make_camera(CameraConfig("top"), 64, None)


def test_simulated_cameras_draw_the_state_that_they_are_given():
    """Nothing of the server's physics: two scenes in the same state give the same picture, and crops are sharp."""
    import franka_sim  # noqa: F401

    env = gym.make("FrankaPegInsert-v0").unwrapped
    env.reset(seed=4)
    told = {name: value.tolist() for name, value in env.sim.get_state().items()}
    scene = rc.Scene("FrankaPegInsert-v0")
    camera = rc.make_camera(CameraConfig("front"), 64, scene).start()
    before = camera.read(1.0).image
    scene.put(told)
    after = camera.read(1.0)
    assert np.abs(after.image.astype(int) - before).max() > 50 and after.number == 1
    np.testing.assert_array_equal(after.image, env.sim.render("front", 64, 64))
    right = rc.make_camera(CameraConfig("front", crop=(0.5, 0.5, 1.0, 1.0)), 64, scene).read(1.0).image
    np.testing.assert_array_equal(right, env.sim.render("front", 128, 128)[64:, 64:])
    with pytest.raises(rc.RobotError, match="no camera 'side'; there are: .*front.*wrist"):
        rc.make_camera(CameraConfig("side"), 64, scene).start()
    env.close()
    scene.close()


def test_crop_and_resize():
    image = np.zeros((12, 16, 3), np.uint8)
    image[:, 2:14] = RNG.integers(0, 255, (12, 12, 3))
    fit = PatternCamera(CameraConfig("a"), size=4)._fit(image)  # the square in the middle, 3 x 3 pixels into one
    np.testing.assert_allclose(fit, image[:, 2:14].reshape(4, 3, 4, 3, 3).mean((1, 3)), atol=1)
    fit = PatternCamera(CameraConfig("a", crop=(0.5, 0.0, 1.0, 1.0)), size=4)._fit(image)
    np.testing.assert_allclose(fit, image[:, 8:].reshape(4, 3, 4, 2, 3).mean((1, 3)), atol=1)
    small = image[:4, 4:8]
    fit = PatternCamera(CameraConfig("a"), size=4)._fit(small)
    assert np.array_equal(fit, small) and not np.shares_memory(fit, small)


# --- RealSense: the real module as far as it goes without a camera, then a double of it -------------------------------
def run_python(code: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, env=os.environ | env, capture_output=True, text=True, timeout=60
    )


def test_realsense_loads_without_the_systems_libusb_and_names_what_is_missing():
    pytest.importorskip("libusb_package")
    code = "import robot_client as rc; rs = rc.import_realsense(); print(rs.__version__, rc.realsense_devices(rs))"
    assert run_python(code).stdout.split()[0].startswith("2.")
    hidden = "import sys; sys.modules['pyrealsense2'] = None; import robot_client as rc; "
    hidden += "camera = rc.RealSense(rc.CameraConfig('wrist', 'realsense')); camera.start(1.0)"
    run = run_python(hidden)
    assert "camera wrist: no new picture within 1.0 s: RealSense: " in run.stderr
    assert "run: pip install pyrealsense2 libusb-package" in run.stderr
    assert "in thread" not in run.stderr  # which goes on trying


def test_missing_realsense_is_said_at_once():
    """pipeline.start() would wait 15 s."""
    pytest.importorskip("libusb_package")
    camera, start = rc.RealSense(CameraConfig("wrist", "realsense", "128422270000", timeout_s=0.1)), time.monotonic()
    with (
        contextlib.closing(camera),
        pytest.raises(rc.RobotError, match="no RealSense has serial number '128422270000'; there: none"),
    ):
        camera.start(1.0)
    assert time.monotonic() - start < 4


@pytest.fixture
def realsense(monkeypatch):
    """A D435-like device whose every object has just the attributes of pyrealsense2's, by `spec`."""
    pytest.importorskip("libusb_package")
    rs = rc.import_realsense()
    fake = mock.Mock(spec=rs, stream=rs.stream, format=rs.format, option=rs.option, camera_info=rs.camera_info)
    state = types.SimpleNamespace(rs=fake, log=[], frame=0, arrives=True, longest=10_000.0)
    sensors = []
    state.streams = {"stereo": [rs.stream.depth], "rgb": [rs.stream.color]}
    for name in state.streams:
        sensor = mock.Mock(spec=rs.sensor)
        sensor.get_stream_profiles.side_effect = lambda name=name: [
            mock.Mock(spec=rs.stream_profile, **{"stream_type.return_value": stream}) for stream in state.streams[name]
        ]
        sensor.get_option_range.side_effect = lambda option: types.SimpleNamespace(
            min=0.0, max=state.longest if option == rs.option.exposure else 1.0
        )
        sensor.set_option.side_effect = lambda option, value, name=name: state.log.append((name, option.name, value))
        sensors.append(sensor)
    device = mock.Mock(spec=rs.device)
    device.get_info.return_value = "42"
    device.query_sensors.return_value = sensors
    device.hardware_reset.side_effect = lambda: state.log.append("hardware_reset")
    fake.context.return_value = mock.Mock(spec=rs.context, **{"query_devices.return_value": [device]})
    fake.config.side_effect = lambda: mock.Mock(spec=rs.config)
    image = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)

    def wait_for_frames(timeout_ms):
        time.sleep(0.01 if state.arrives else timeout_ms / 1000)
        state.frame += state.arrives
        colour = mock.Mock(spec=rs.video_frame)
        colour.get_data.return_value, colour.get_frame_number.return_value = image, state.frame
        return state.arrives, mock.Mock(spec=rs.composite_frame, **{"get_color_frame.return_value": colour})

    def new_pipeline():
        pipeline = mock.Mock(spec=rs.pipeline)
        pipeline.start.side_effect = lambda settings: (
            state.log.append("start") or mock.Mock(spec=rs.pipeline_profile, **{"get_device.return_value": device})
        )
        pipeline.stop.side_effect = lambda: state.log.append("stop")
        pipeline.try_wait_for_frames.side_effect = wait_for_frames
        return pipeline

    fake.pipeline.side_effect = new_pipeline
    monkeypatch.setattr(rc, "import_realsense", lambda: fake)
    state.camera = rc.RealSense(
        CameraConfig("wrist", "realsense", "42", exposure=8000.0, warmup_frames=5, timeout_s=0.1), 4
    )
    state.image = image
    with contextlib.closing(state.camera):
        yield state


def test_realsense_fixes_the_exposure_of_the_colour_sensor(realsense):
    frame = realsense.camera.start().read(0.5)
    assert frame.number >= 6  # warm-up
    np.testing.assert_array_equal(frame.image, realsense.image)
    options = ["enable_auto_exposure", "exposure", "enable_auto_white_balance"]  # automatic off, before the value
    values = (0.0, 80.0, 1.0)  # a colour sensor counts 100 us
    assert realsense.log == ["start", *(("rgb", option, value) for option, value in zip(options, values))]


def test_realsense_that_has_colour_in_the_stereo_module_counts_microseconds(realsense):
    """A D405."""
    realsense.streams = {"stereo": [*realsense.streams["stereo"], *realsense.streams["rgb"]], "rgb": []}
    realsense.camera.start()
    assert ("stereo", "exposure", 8000.0) in realsense.log


def test_realsense_frames_are_copied_out_of_the_cameras_pool():
    """With frames of the real library, from its software device."""
    pytest.importorskip("libusb_package")
    rs = rc.import_realsense()
    sensor, queue, stream = rs.software_device().add_sensor("colour"), rs.frame_queue(1), rs.video_stream()
    stream.type, stream.uid, stream.width, stream.height, stream.fps, stream.bpp = rs.stream.color, 1, 4, 3, 30, 3
    stream.fmt = rs.format.rgb8
    profile = sensor.add_video_stream(stream)
    sensor.open(profile)
    sensor.start(queue)
    video, image = rs.software_video_frame(), RNG.integers(0, 255, (3, 4, 3), dtype=np.uint8)
    video.pixels, video.stride, video.bpp, video.frame_number, video.profile = (
        image,
        12,
        3,
        7,
        profile.as_video_stream_profile(),
    )
    sensor.on_video_frame(video)
    frames = mock.Mock(
        spec=rs.composite_frame, **{"get_color_frame.return_value": queue.wait_for_frame().as_video_frame()}
    )
    camera = rc.RealSense(CameraConfig("wrist", "realsense"))
    camera.pipeline = mock.Mock(spec=rs.pipeline, **{"try_wait_for_frames.return_value": (True, frames)})
    copy, number = camera.grab()
    np.testing.assert_array_equal(copy, image)
    assert copy.flags.owndata and copy.dtype == np.uint8 and number == 7


def test_realsense_names_an_impossible_exposure(realsense):
    realsense.longest = 50.0
    with pytest.raises(
        rc.RobotError, match="camera wrist: no new picture .*Exposure 8000.0: this camera takes 0.0 to 5000.0"
    ):
        realsense.camera.start(0.5)


def test_realsense_ladder_pipeline_first_then_hardware(realsense):
    camera = realsense.camera.start()
    camera._stop = mock.Mock(wraps=camera._stop)
    camera._stop.wait.side_effect = lambda seconds: time.sleep(min(seconds, 0.01))  # a reset takes 5 s
    realsense.log.clear()
    realsense.arrives = False
    wait_until(lambda: "hardware_reset" in realsense.log, 5.0)
    actions = [entry for entry in realsense.log if isinstance(entry, str)]
    assert actions[:3] == ["stop", "start", "hardware_reset"]  # no stop() before the reset, which can deadlock
    realsense.arrives = True
    camera.start(5.0)
    assert camera.read(0.5).image.shape == (4, 4, 3)


# --- Teleoperation ----------------------------------------------------------------------------------------------------
class Hand(rc.Teleop):
    moves = (np.zeros(6), 0.0)

    def motion(self):
        return self.moves


class Echo(gym.Env):
    """Keeps its actions."""

    observation_space = gym.spaces.Box(-1, 1, (1,))

    def __init__(self, size: int):
        self.action_space, self.actions = gym.spaces.Box(-1, 1, (size,), np.float32), []

    def step(self, action):
        self.actions.append(action)
        return np.zeros(1, np.float32), 0.0, False, False, {}


@pytest.mark.parametrize("size", [3, 4, 6, 7])
def test_person_takes_over_and_keeps_control_for_a_while(size):
    """Buttons are near +-1; what is executed is what is reported; between two nudges the policy does not act."""
    hand, env = Hand(), Echo(size)
    wrapped, policy = Intervention(env, hand, hold_s=0.4), np.full(size, 0.3, np.float32)
    info = wrapped.step(policy)[-1]
    assert not info["intervened"] and "intervene_action" not in info
    np.testing.assert_array_equal(info["executed_action"], policy)
    motion = np.array([0.5, -0.2, 0.1, 0.4, 0.6, 1.5])
    hand.moves = (motion, 0.0)
    info = wrapped.step(policy)[-1]
    axes = 6 if size >= 6 else 3
    expected = np.clip(np.append(motion[:axes], [0.0] * (size in (4, 7))), -1, 1).astype(np.float32)
    for action in (info["executed_action"], info["intervene_action"], env.actions[-1]):
        np.testing.assert_array_equal(action, expected)
    np.testing.assert_array_equal(info["policy_action"], policy)
    hand.moves = (np.zeros(6), -1.0)  # a button alone
    executed = wrapped.step(policy)[-1]["executed_action"]
    assert not executed[:axes].any() and (size in (3, 6) or -1 < executed[-1] <= -0.9)
    hand.moves = (np.zeros(6), 0.0)  # let go: 0.4 s at 10 Hz in which the arm stands still,
    for _ in range(4):
        info = wrapped.step(policy)[-1]
        assert info["intervened"] and not info["intervene_action"].any()
    assert not wrapped.step(policy)[-1]["intervened"]  # then the policy acts again
    assert wrapped.step(np.full(size, 3.0))[-1]["executed_action"].max() == 1.0  # what is stored fits the action space
    hand.held = True  # a dead man's key
    for _ in range(10):
        info = wrapped.step(policy)[-1]
        assert info["intervened"] and not info["executed_action"].any()
    hand.held = False
    assert [wrapped.step(policy)[-1]["intervened"] for _ in range(5)] == [True] * 4 + [False]


def test_reset_ends_a_take_over_and_forgets_what_was_typed():
    hand, env = Hand(), Echo(4)
    env.reset = lambda **_: (np.zeros(1, np.float32), {})
    hand.forget = mock.Mock()
    wrapped = Intervention(env, hand)
    hand.moves = (np.ones(6), 0.0)
    wrapped.step(np.zeros(4))
    hand.moves = (np.zeros(6), 0.0)
    wrapped.reset(seed=1)
    assert hand.forget.call_count == 1
    assert not wrapped.step(np.zeros(4))[-1]["intervened"]


@pytest.mark.parametrize("probability", [0.0, 0.05, 1.0])
def test_scripted_person_takes_over_for_segments(probability):
    """On any task with an expert; the same seed, the same segments."""
    env = Echo(4)
    env.expert_action = lambda: np.full(4, 0.7, np.float32)
    runs = []
    for _ in range(2):
        wrapped = Intervention(env, rc.ScriptedExpert(probability, steps=10, seed=1), hold_s=0.0)
        runs.append([wrapped.step(np.zeros(4))[-1]["intervened"] for _ in range(400)])
    assert runs[0] == runs[1]
    assert env.actions[-1].tolist() == pytest.approx([0.7 * runs[1][-1]] * 4)
    segments = [len(segment) for segment in "".join("x" if taken else " " for taken in runs[0]).split()]
    if probability == 0.05:
        assert 5 < len(segments) < 30 and all(length % 10 == 0 for length in segments[:-1])
    else:
        assert sum(segments) == 400 * probability


def test_scripted_person_leaves_it_to_the_step_to_tell_that_the_server_is_gone():
    env = Echo(4)
    env.expert_action = mock.Mock(side_effect=rc.UnreachableError("no answer"))
    info = Intervention(env, rc.ScriptedExpert()).step(np.zeros(4))[-1]
    assert not info["intervened"] and info["teleop_fault"] == "no answer"
    env.expert_action = lambda: np.zeros(4, np.float32)
    info = Intervention(env, rc.ScriptedExpert()).step(np.zeros(4))[-1]
    assert info["intervened"] and info["teleop_fault"] == ""


def test_scripted_person_solves_the_simulated_task():
    env = Intervention(gym.make("franka_sim:FrankaPickCube-v0"), rc.ScriptedExpert())
    env.reset(seed=0)
    assert any(env.step(np.zeros(4))[-1]["success"] for _ in range(60))
    env.close()


@pytest.fixture
def terminal():
    ours, theirs = os.openpty()
    yield ours, theirs
    os.close(ours)
    os.close(theirs)


@pytest.fixture
def keyboard(terminal):
    with contextlib.closing(rc.Keyboard(0.5, rc.Terminal(terminal[1]))) as keyboard:
        yield keyboard


def typed(ours: int, terminal: rc.Terminal, keys: str) -> None:
    """Type, and wait until the last key has been read."""
    before = time.monotonic()
    os.write(ours, keys.encode())
    wait_until(lambda: terminal.pressed_at(keys[-1]) >= before, 5.0)


def test_keyboard_moves_and_leaves_the_terminal_as_it_was(terminal):
    import termios

    ours, theirs = terminal
    before = termios.tcgetattr(theirs)
    keyboard = rc.Keyboard(0.8, rc.Terminal(theirs))
    assert not keyboard.motion()[0].any() and keyboard.motion()[1] == 0.0
    typed(ours, keyboard.terminal, "wauc")
    motion, gripper = keyboard.motion()
    assert motion.tolist() == pytest.approx([0.2, 0.2, 0, 0, 0, 0.2]) and gripper == 1.0  # a tap is slow
    typed(ours, keyboard.terminal, "sdv")  # the opposite keys count from now on
    motion, gripper = keyboard.motion()
    assert motion.tolist() == pytest.approx([-0.2, -0.2, 0, 0, 0, 0.2]) and gripper == -1.0
    typed(ours, keyboard.terminal, " ")
    motion, gripper = keyboard.motion()
    assert not motion.any() and gripper == 0.0 and keyboard.held  # stands still, and the person keeps control
    typed(ours, keyboard.terminal, "r")
    assert keyboard.motion()[0].tolist() == pytest.approx([0, 0, 0.2, 0, 0, 0])
    wait_until(lambda: not keyboard.motion()[0].any() and not keyboard.held, 2.0)
    keyboard.close()
    assert termios.tcgetattr(theirs) == before


@pytest.mark.parametrize("delay_s", [0.25, 0.5, 0.66])  # of the Linux console, of GNOME, of X without settings
def test_holding_a_key_does_not_stutter_while_the_terminals_repeat_sets_in(terminal, keyboard, delay_s):
    """Slow from the first press on, without a gap, then at full speed, and it stops when the key is let go."""
    ours, _ = terminal
    for _ in range(5):
        seen, typed_at = hold_a_key(ours, keyboard, delay_s)
        gaps = np.diff(typed_at)
        if gaps[0] < delay_s + 0.05 and gaps[1:].max() < 0.1:
            break  # otherwise the machine stood still, and the key was let go for all that a terminal tells
    pressed, released = typed_at[0], typed_at[-1]
    held = [speed for at, speed in seen if pressed < at < released]
    assert min(held) == 0.125 and max(held) == 0.5  # never 0
    assert held == sorted(held)  # slow first, then fast
    assert {speed for at, speed in seen if at > released + 0.3} == {0.0}


def hold_a_key(ours: int, keyboard: rc.Keyboard, delay_s: float) -> tuple[list[tuple[float, float]], list[float]]:
    """(when, what the keyboard said), every 5 ms; and when the terminal sent each character."""
    keyboard.forget()
    seen, stop, typed_at = [], threading.Event(), []

    def watch() -> None:
        while not stop.wait(0.005):
            seen.append((time.monotonic(), keyboard.motion()[0][0]))

    watcher = threading.Thread(target=watch)
    typed(ours, keyboard.terminal, "w")
    typed_at.append(time.monotonic())
    watcher.start()
    time.sleep(delay_s)
    for _ in range(20):
        os.write(ours, b"w")
        typed_at.append(time.monotonic())
        time.sleep(0.03)
    time.sleep(0.5)
    stop.set()
    watcher.join()
    return seen, typed_at


def test_keys_for_the_script(terminal, keyboard):
    """Each is one command, however long it is held; what arrow keys send is none; a reset throws them away."""
    ours, _ = terminal
    keys = keyboard.terminal
    assert keys.commands() == []
    typed(ours, keys, "ynxztpq")
    assert keys.commands() == ["success", "failure", "discard", "undo", "label", "pause", "quit"]
    assert keys.commands() == [] and not keyboard.motion()[0].any()
    typed(ours, keys, "p")
    time.sleep(0.3)
    for _ in range(10):
        os.write(ours, b"p")
        time.sleep(0.03)
    assert keys.commands() == []  # held down since the line before
    time.sleep(0.8)
    typed(ours, keys, "p\n")
    assert keys.commands() == ["pause", "go on"]
    os.write(ours, b"\xe4")  # half of a character
    os.write(ours, b"\x1b[A\x1bOq")
    time.sleep(0.8)
    typed(ours, keys, "yw")
    keyboard.forget()
    assert keys.commands() == [] and not keyboard.motion()[0].any()
    for _ in range(10):
        os.write(ours, b"y")  # held down during the reset
        time.sleep(0.03)
    assert keys.commands() == []


def test_caps_lock_changes_no_key(terminal, keyboard):
    os.write(terminal[0], b"PW")
    wait_until(lambda: keyboard.terminal.pressed_at("w") > 0, 5.0)
    assert keyboard.terminal.commands() == ["pause"] and keyboard.motion()[0][0] > 0


@pytest.mark.parametrize(
    ("keys", "kept", "lost"),
    [
        ("yp", ["pause"], ["success"]),
        ("p\n", [], ["pause", "go on"]),  # taken back
        ("\np", ["pause"], ["go on"]),
        ("nq", ["quit"], ["failure"]),
        ("pqx", ["pause", "quit"], ["discard"]),
    ],
)
def test_what_says_stop_outlives_a_reset(terminal, keyboard, keys, kept, lost):
    typed(terminal[0], keyboard.terminal, keys)
    assert keyboard.terminal.quits() == ("q" in keys)
    assert keyboard.terminal.forget() == lost
    assert keyboard.terminal.forget() == []  # asked again, as a wrapper and its script both do
    assert keyboard.terminal.quits() == ("q" in keys)
    assert keyboard.terminal.commands() == kept
    assert not keyboard.terminal.quits()


def test_every_key_stands_on_the_screen(tmp_path):
    listed = set(rc.KEYS.split())
    assert {key for pair in (*rc.Keyboard.AXES, rc.Keyboard.GRIPPER) for key in pair} <= listed
    for key, command in rc.COMMANDS.items():
        assert f"{key.replace(chr(10), 'Enter')} {command}" in rc.KEYS
    shown = run_script("robot_client.py", "--help", cwd=tmp_path).stdout
    assert "Keys of the keyboard" in shown and "success" in shown


def test_keyboard_whose_terminal_goes_away(terminal):
    ours, theirs = terminal
    terminal = rc.Terminal(os.dup(theirs))
    os.write(ours, b"w")
    wait_until(lambda: terminal.strength("w"), 2.0)
    os.close(terminal.fd)
    wait_until(lambda: terminal.fault.startswith("keyboard: "), 2.0)
    wait_until(lambda: not terminal.strength("w"), 2.0)
    terminal.close()


def test_keyboard_whose_window_is_closed():
    ours, theirs = os.openpty()
    terminal = rc.Terminal(theirs)
    os.close(ours)
    wait_until(lambda: terminal.fault.startswith("keyboard: "), 2.0)
    wait_until(lambda: not terminal._thread.is_alive(), 2.0)  # no busy loop
    terminal.close()
    os.close(theirs)


def test_keyboard_without_a_terminal(tmp_path):
    with (tmp_path / "pipe").open("w") as file, pytest.raises(rc.RobotError, match="standard input is no terminal"):
        rc.Terminal(file.fileno())


class FakeHid:
    """What the USB library gives pyspacemouse, reports of a SpaceMouse Wireless: 1 = the cap, 3 = its buttons."""

    product_string = manufacturer_string = serial_number = "test"
    release_number = 1

    def __init__(self):
        self.reports, self.unplugged = [], False

    def open(self):
        pass

    close = open

    def set_nonblocking(self, _):
        pass

    def read(self, _):
        if self.unplugged:
            from pyspacemouse.device import HIDException

            raise HIDException("Failed to read from HID device: -1")
        return self.reports.pop(0) if self.reports else bytearray()


@pytest.fixture
def hid(monkeypatch):
    """pyspacemouse itself, with a device of ours."""
    pyspacemouse = pytest.importorskip("pyspacemouse")
    from pyspacemouse.api import _create_and_open_device

    spec, hid = pyspacemouse.get_device_specs()["SpaceMouseWirelessNew"], FakeHid()

    def connect(axis_convention):
        if hid.unplugged:
            raise RuntimeError("No connected or supported devices found.")
        return _create_and_open_device(spec, hid, axis_convention=axis_convention)

    monkeypatch.setattr(pyspacemouse, "open", connect)
    return hid


def report(*axes: int) -> bytearray:
    return bytearray(b"\x01" + np.array(axes, "<i2").tobytes())


def test_spacemouse(hid):
    mouse = rc.SpaceMouse()
    try:
        hid.reports += [report(0, 0, 0, 0, 0, 0)] * 500 + [report(35, -350, -70, 0, 0, 0), bytearray([3, 1, 0])]
        wait_until(lambda: mouse.motion()[1] == 1.0, 2.0)  # 500 reports do not make it lag
        np.testing.assert_allclose(mouse.motion()[0], [1.0, -0.1, 0.2, 0, 0, 0])  # pushed away, to the right, lifted
        hid.reports += [report(0, 0, 0, 0, 350, 175), bytearray([3, 2, 0])]
        wait_until(lambda: mouse.motion()[1] == -1.0, 2.0)
        assert not mouse.motion()[0][:3].any() and np.abs(mouse.motion()[0][3:]).max() == 1.0
        hid.unplugged = True
        wait_until(lambda: mouse.fault, 2.0)
        assert "SpaceMouse" in mouse.fault
        assert not mouse.motion()[0].any() and mouse.motion()[1] == 0.0  # nothing goes on moving
        hid.unplugged = False
        wait_until(lambda: not mouse.fault, 5.0)
        hid.reports += [report(0, 0, 350, 0, 0, 0)]
        wait_until(lambda: mouse.motion()[0][2] == -1.0, 2.0)
        hid.reports += [report(0, 0, 0, 0, 0, 0), bytearray([3, 3, 0])]  # both buttons: keep control, stand still
        wait_until(lambda: mouse.held, 2.0)
        assert not mouse.motion()[0].any() and mouse.motion()[1] == 0.0
        hid.unplugged = True
        wait_until(lambda: mouse.fault, 2.0)
        assert not mouse.held
    finally:
        mouse.close()


def test_spacemouse_that_is_missing_lists_what_is_there_and_the_udev_rule(tmp_path, monkeypatch):
    pytest.importorskip("pyspacemouse")
    for number, name in ((0, "Logitech USB Receiver"), (1, "3Dconnexion SpaceMouse Compact")):
        folder = tmp_path / f"hidraw{number}" / "device"
        folder.mkdir(parents=True)
        (folder / "uevent").write_text(f"DRIVER=hid-generic\nHID_NAME={name}\nHID_UNIQ=\n")
    names = ["Logitech USB Receiver (hidraw0)", "3Dconnexion SpaceMouse Compact (hidraw1)"]
    assert rc.hid_devices(tmp_path) == names
    assert rc.hid_devices(tmp_path / "none") == []
    monkeypatch.setattr(rc, "hid_devices", lambda: names)
    with pytest.raises(
        rc.RobotError, match=r"plugged in: Logitech .*hidraw1\); run: .*libhidapi-hidraw0.*256f.*rules\.d"
    ):
        rc.SpaceMouse()


# --- Environment: what needs no robot ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("env_id", "config", "options"),
    [
        ("FrankaPegInsert-v0", rc.PEG, {"gripper_action": True}),
        ("FrankaPegInsert-v0", replace(rc.PEG, gripper="fixed"), {}),
        ("FrankaPickCube-v0", rc.PICK, {}),
        ("FrankaPickCube-v0", replace(rc.PICK, image_size=64, cameras=(CameraConfig("wrist"),)),
         {"image_size": 64, "cameras": ("wrist",)}),
    ],
)  # fmt: skip
def test_spaces_are_those_of_the_simulated_pixel_tasks(env_id, config, options):
    """And can be had without any robot, as a learner on another machine needs them."""
    import franka_sim

    sim = gym.make(f"{franka_sim.__name__}:{env_id}", image_obs=True, **options)
    real = gym.make("robot_client:FrankaReal-v0", config=config, disable_env_checker=True)
    assert real.observation_space == sim.observation_space
    assert list(real.observation_space) == list(sim.observation_space)
    assert real.action_space == sim.action_space
    sim.close()
    real.close()


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"action_scale": (0.1, 0.1)}, "3 entries, or 6"),
        ({"action_scale": (0.1, 0.1, 0.1)}, "3 entries, or 6"),
        ({"action_scale": (0.1, 0.1, 0.1, 0.1, 0.0, 0.1)}, "all above 0"),
        ({"hz": 2.0}, "hz is at least 4"),
        ({"proprio": ("tcp_pose", "heat")}, "proprio names some of"),
        ({"cameras": (CameraConfig("a"), CameraConfig("a"))}, "its own name"),
        ({"cameras": (CameraConfig("state"),)}, "not 'state'"),
        ({"cameras": [CameraConfig(name, "realsense", "42") for name in "ab"]}, "its own serial number"),
        ({"cameras": (CameraConfig("a", crop=(0, 0, 480, 480)),)}, "crop of camera a: give left, upper, right, lower"),
        ({"cameras": (CameraConfig("a", crop=(0.2, 0.5, 0.8, 0.5)),)}, "crop of camera a: give left"),
    ],
)
def test_settings_that_contradict_each_other(changes, fault):
    with pytest.raises(ValueError, match=fault):
        FrankaEnv(replace(rc.PEG, **changes))


def posed_env(pose: np.ndarray, relative: bool = True) -> FrankaEnv:
    """An environment that was told its state."""
    env = FrankaEnv(replace(rc.PEG, relative_frame=relative, cameras=()))
    env.hello = {"gripper": {"max_width": 0.08}}
    zeros = {key: np.zeros(3) for key in ("tcp_force", "tcp_torque")}
    env.target, env.pace = pose, rc.Pace(10)
    env.state = {"tcp_pose": pose, "reference": pose, "gripper_width": 0.02, "tcp_vel": np.zeros(6)} | zeros
    env.state |= {"jobs": {"arm": None, "gripper": None}, "state_age": 0.004, "robot_time": 5.0}
    return env


def test_relative_frame_turns_and_nothing_else():
    """A translation stays one (with SERL's adjoint it does not), lengths stay, and there and back is the identity."""
    for quaternion in quaternions(20):
        env = posed_env(np.append(RNG.normal(size=3), quaternion))
        rotation, motion = Rotation.from_quat(quaternion), RNG.normal(size=6)
        base = env.action_to_base(motion)
        np.testing.assert_allclose(base, [*rotation.apply(motion[:3]), *rotation.apply(motion[3:])], atol=1e-12)
        np.testing.assert_allclose(env.base_to_action(base), motion, atol=1e-12)
        assert not env.action_to_base(np.array([0, 1, 0, 0, 0, 0]))[3:].any()
    env = posed_env(np.append(np.zeros(3), quaternion), relative=False)
    np.testing.assert_array_equal(env.action_to_base(motion), motion)


def test_observation_in_both_frames():
    origin, pose = (
        np.array([0.5, 0, 0.2, 1, 0, 0, 0]),
        np.array([0.5, 0.1, 0.3, 1, 0, 0, 0]),
    )  # tool down: y, z reversed
    env = posed_env(pose)
    env.origin = origin
    env.state |= {"tcp_force": np.array([1.0, 2, 3]), "tcp_torque": np.array([4.0, 5, 6]), "tcp_vel": np.arange(6.0)}
    state = env.observe()[0]["state"]
    expected = [0.75, 1, -2, -3, 0, -0.1, -0.1, 0, 0, 0, 1, 4, -5, -6, 0, -1, -2, 3, -4, -5]
    np.testing.assert_allclose(state, expected, atol=1e-6)
    env = posed_env(-pose, relative=False)  # the same rotation, the other sign
    np.testing.assert_allclose(env.observe()[0]["state"][4:11], [-0.5, -0.1, -0.3, 1, 0, 0, 0], atol=1e-6)


TARGET = {"result": {"limited": []}, "jobs": {"arm": None, "gripper": None}}


def target_of(env: FrankaEnv, action: np.ndarray) -> np.ndarray:
    """The pose that this action sends to the server."""
    env.client = mock.Mock()
    env.client.target.return_value = TARGET
    env.command(np.asarray(action, float), {})
    return env.client.target.call_args[0][0]


def test_target_moves_on_from_the_reference_not_from_the_sagging_arm():
    reference = np.array([0.5, 0, 0.14, 1, 0, 0, 0])
    env = posed_env(reference, relative=False)
    env.state["tcp_pose"] = reference - [0, 0, 0.02, 0, 0, 0, 0]
    np.testing.assert_allclose(target_of(env, np.zeros(7)), reference, atol=1e-12)
    np.testing.assert_allclose(target_of(env, [1, 0, -0.5, 0, 0, 0, 0])[:3], [0.52, 0, 0.13], atol=1e-12)
    env.state["reference"] = reference + [0.01, 0, -0.01, 0, 0, 0, 0]  # the server is on its way: nothing is lost
    np.testing.assert_allclose(target_of(env, [1, 0, 0, 0, 0, 0, 0])[:3], [0.54, 0, 0.13], atol=1e-12)


def test_target_does_not_run_away_from_an_arm_that_is_blocked():
    reference = np.array([0.5, 0, 0.1, 1, 0, 0, 0])
    env = posed_env(reference, relative=False)
    for _ in range(20):
        target = target_of(env, [0, 0, -1, 0, 0, -1, 0])
    np.testing.assert_allclose(target[:3], [0.5, 0, 0.1 - 1.5 * 0.02], atol=1e-12)
    same_rotation(target[3:], Rotation.from_euler("z", -0.15) * Rotation.from_quat([1, 0, 0, 0]))
    np.testing.assert_allclose(target_of(env, [0, 0, 1, 0, 0, 0, 0])[2], 0.11, atol=1e-12)  # and comes back at once


def test_actions_in_the_relative_frame():
    """Tool pointing down and turned by 30 degrees: its z is down, its rotations are about its own axes."""
    tool = Rotation.from_euler("z", 30, degrees=True) * Rotation.from_euler("x", 180, degrees=True)
    env = posed_env(np.append([0.5, 0, 0.14], tool.as_quat()))
    np.testing.assert_allclose(target_of(env, [0, 0, 1, 0, 0, 0, 0])[:3], [0.5, 0, 0.12], atol=1e-9)
    env.target = env.state["reference"]
    np.testing.assert_allclose(
        target_of(env, [1, 0, 0, 0, 0, 0, 0])[:3], [0.5 + 0.02 * 0.75**0.5, 0.01, 0.14], atol=1e-9
    )
    env.target = env.state["reference"]
    turned = target_of(env, [0, 0, 0, 0.5, 0.25, 1, 0])
    same_rotation(turned[3:], tool * Rotation.from_rotvec([0.05, 0.025, 0.1]))


def test_safety_box_of_position_and_rotation():
    """The box is that of SERL's clip_safety_box, without its trouble where roll is +-pi."""
    down = np.array([1.0, 0, 0, 0])
    env = posed_env(np.append([0.595, 0.095, 0.052], down), relative=False)
    target = target_of(env, [1, 1, -1, 1, -1, 1, 0])
    np.testing.assert_allclose(target[:3], [0.6, 0.1, 0.05])
    for turn, allowed in (((0.3, 0, 0), (0.1, 0, 0)), ((-0.3, 0.05, 0), (-0.1, 0.05, 0)), ((0, 0, -1.0), (0, 0, -0.8))):
        start = Rotation.from_euler("xyz", turn) * Rotation.from_quat(down)
        env = posed_env(np.append([0.5, 0, 0.1], start.as_quat()), relative=False)
        target = target_of(env, np.zeros(7))
        same_rotation(target[3:], Rotation.from_euler("xyz", allowed) * Rotation.from_quat(down))


@pytest.mark.parametrize("action", [np.full(7, np.nan), [np.inf] + [0] * 6, np.zeros(6), np.zeros((1, 7)), 0.5])
def test_wild_actions_never_reach_the_robot(action):
    env = posed_env(np.array([0.5, 0, 0.14, 1, 0, 0, 0]))
    env.client = mock.Mock()
    with pytest.raises(ValueError, match=r"the action must be \(7,\) finite numbers"):
        env.step(action)
    assert env.client.method_calls == []
    assert np.abs(env.checked(np.full(7, 1e9))).max() == 1.0


def test_executed_action_is_what_the_box_leaves():
    env = posed_env(np.array([0.595, 0, 0.14, 1, 0, 0, 0]))
    env.client = mock.Mock(**{"target.return_value": TARGET})
    asked = np.array([1.0, -0.5, 0.25, 0.0, 0.0, 0.5, 1.0])
    executed = env.command(asked, {})
    np.testing.assert_allclose(executed, [0.25, -0.5, 0.25, 0, 0, 0.5, 1.0], atol=1e-9)  # 5 of 20 mm to the edge
    np.testing.assert_allclose(env.target[:3], [0.6, 0.01, 0.135], atol=1e-9)
    env = posed_env(np.array([0.5, 0, 0.14, 1, 0, 0, 0]))
    env.client = mock.Mock(**{"target.return_value": TARGET, "state.side_effect": rc.UnreachableError("gone")})
    info = env.step(np.full(7, 2.0))[-1]
    assert info["asked_action"].tolist() == [1] * 7 and info["executed_action"].dtype == np.float32
    assert info["fault"] == "gone"


def test_gripper_modes():
    """Binary: beyond +-0.5, only when it changes, with the penalty; continuous: closure adds up. Targets carry the
    closure from the first change on, and nothing is waited for."""
    env = posed_env(np.array([0.5, 0, 0.14, 1, 0, 0, 0]))
    env.config = replace(env.config, gripper_penalty=0.02)
    env.client = mock.Mock(**{"target.return_value": TARGET})
    sent = []
    for value in (0.4, -1.0, 0.6, 1.0, 0.0, -0.4, -0.6):
        info = {}
        env.command(np.array([0, 0, 0, 0, 0, 0, value]), info)
        sent.append((info["grasp_penalty"], env.client.target.call_args.args[1]))
    assert sent == [(0, None), (0, None), (-0.02, 1), (0, 1), (0, 1), (0, 1), (-0.02, 0)]
    env.config, env.closure = replace(env.config, gripper="continuous"), 0.75
    closures = []
    for value in (0.0, -0.25, -0.25, 0.0, 1.0, 1.0, -0.5):
        env.command(np.array([0, 0, 0, 0, 0, 0, value]), info)
        closures.append(env.client.target.call_args.args[1])
    np.testing.assert_allclose(closures[1:], [0.5, 0.25, 0.25, 1.0, 1.0, 0.5])
    assert info["grasp_penalty"] == pytest.approx(-0.01)  # half a closure
    assert {call[0] for call in env.client.method_calls} == {"target"}


def test_waiting_for_the_gripper_is_an_option_that_counts_as_late(clock):
    env = posed_env(np.array([0.5, 0, 0.14, 1, 0, 0, 0]))
    env.config = replace(env.config, gripper_wait_s=0.6)
    env.pace = rc.Pace(10, lambda: clock.now)
    done = clock.now + 0.35

    def target(pose, closure):
        status = "running" if clock.now < done else "done"
        return TARGET | {"jobs": {"arm": None, "gripper": {"op": "target", "status": status, "error": None}}}

    env.client = mock.Mock(**{"robot_time.side_effect": lambda: clock.now, "target.side_effect": target})
    env.client.state.return_value = env.state | {"fault": None, "gripper_fault": None}
    info = env.step(np.array([0, 0, 0, 0, 0, 0, 1.0]))[-1]
    assert info["period_s"] == pytest.approx(0.36, abs=0.02)
    assert info["late_s"] == pytest.approx(0.26, abs=0.02) and info["overruns"] == 1
    info = env.step(np.array([0, 0, 0, 0, 0, 0, 1.0]))[-1]  # closed already: no wait
    assert info["period_s"] == pytest.approx(0.1, abs=0.005) and info["late_s"] < 0.002 and info["overruns"] == 1
    done = math.inf
    info = env.step(np.array([0, 0, 0, 0, 0, 0, -1.0]))[-1]
    assert info["period_s"] == pytest.approx(0.6, abs=0.03)  # at most


def test_gripper_that_does_not_arrive_is_a_fault_of_the_episode_that_ordered_it():
    failed = {"op": "target", "status": "failed", "error": "the fingers did not arrive"}
    env = scripted_env(jobs={"arm": None, "gripper": failed})
    assert env.step(np.zeros(7))[-1]["fault"] is None  # an older episode's
    _, _, terminated, truncated, info = env.step(np.array([0, 0, 0, 0, 0, 0, 1.0]))
    assert truncated and not terminated and info["fault"] == "gripper: the fingers did not arrive"
    failed["op"] = "gripper"  # which no action asked for
    assert env.step(np.array([0, 0, 0, 0, 0, 0, 1.0]))[-1]["fault"] is None


def test_fingerprint_is_plain_and_tells_what_data_depend_on():
    fingerprint = rc.PEG.fingerprint()
    assert json.loads(json.dumps(fingerprint)) == fingerprint
    assert replace(rc.PEG, server="tcp://elsewhere:1", wait_s=1.0, max_episode_steps=7).fingerprint() == fingerprint
    crop = CameraConfig("wrist", crop=(0.1, 0.0, 0.9, 1.0))
    for change in (
        {"action_scale": (0.01,) * 6},
        {"hz": 20.0},
        {"image_size": 64},
        {"cameras": (CameraConfig("front"), crop)},
        {"reset_pose": (0.5, 0.0, 0.15, np.pi, 0.0, 0.0)},
        {"relative_frame": False},
        {"gripper": "fixed"},
        {"name": "plug"},
    ):
        assert replace(rc.PEG, **change).fingerprint() != fingerprint, change
    assert fingerprint["cameras"][0]["name"] == "front" and fingerprint["hz"] == 10.0
    assert rc.TASKS == {"peg": rc.PEG, "pick": rc.PICK}


def test_pausing_stands_still_at_the_rate_of_the_steps(clock):
    env = posed_env(np.array([0.5, 0, 0.14, 1, 0, 0, 0]))
    env.client, env.pace, env.ordered = mock.Mock(), rc.Pace(10, lambda: clock.now), 1.0
    env.look, env.observe = mock.Mock(), mock.Mock(return_value=("what is seen now", ""))
    with pytest.raises(rc.RobotError, match="nothing moves before the first reset"):
        env.stand_still()
    env.episodes = 1
    for _ in range(5):
        assert env.stand_still() == ("what is seen now", "")
    assert clock.now == pytest.approx(100.501)
    for call in env.client.target.call_args_list:
        np.testing.assert_allclose(call.args[0], env.target)
        assert call.args[1] == 1.0
    env.client.target.side_effect = rc.RefusedError("reflex", "fault")
    with pytest.raises(rc.RefusedError):
        env.stand_still()


def test_an_arm_that_is_pushed_aside_while_a_script_pauses_does_not_come_back(clock):
    """By no more than half an action: whoever pushed it may have a hand there."""
    env = posed_env(np.array([0.5, 0, 0.14, 1, 0, 0, 0]))
    env.client, env.pace, env.episodes = mock.Mock(), rc.Pace(10, lambda: clock.now), 1
    env.look, env.observe = mock.Mock(), mock.Mock(return_value=("what is seen now", ""))
    env.state["reference"] = rc.moved(env.target, np.array([0, 0.1, 0, 0, 0, 0]))
    for _ in range(20):
        env.stand_still()
        env.state["reference"] = env.client.target.call_args.args[0]
    assert env.state["reference"][1] == pytest.approx(0.1 - env.scale[0] / 2)


def resting_env(clock, **state) -> FrankaEnv:
    env = posed_env(np.array([0.5, 0, 0.14, 1, 0, 0, 0]))
    env.client = mock.Mock(**{"state.side_effect": lambda: env.state | state})
    env.client.pace.side_effect = lambda hz: rc.Pace(hz, lambda: clock.now)
    return env


def test_way_to_the_start_does_not_run_ahead_of_an_arm_that_is_slow(clock):
    """Otherwise the server refuses a target that is too far from the arm."""
    env = resting_env(clock)
    pose, leads = env.state["tcp_pose"], []

    def target(goal):
        leads.append(np.linalg.norm(goal[:3] - pose[:3]))
        pose[:3] += rc.shortened(goal[:3] - pose[:3], 0.002)  # 4 cm/s
        env.state["reference"] = pose.copy()

    env.state["reference"] = pose.copy()
    env.client.target.side_effect = target
    goal = pose + [0.0, 0.1, 0.1, 0, 0, 0, 0]
    env.go_to(goal)
    assert max(leads) < 0.06
    np.testing.assert_allclose(pose[:3], goal[:3], atol=0.01)


def test_way_to_the_start_does_not_turn_ahead_of_an_arm_that_does_not_turn(clock):
    env = resting_env(clock)
    pose = env.state["tcp_pose"]
    with pytest.raises(rc.RefusedError, match="1.00 rad off"):
        env.go_to(rc.moved(pose, np.array([0, 0, 0, 0, 0, 1.0])))
    targets = [call.args[0] for call in env.client.target.call_args_list]
    assert 0.2 < max(np.linalg.norm(rc.difference(target, pose)[3:]) for target in targets) < 0.3


def test_way_to_a_start_nearby_is_gone_to_its_end(clock):
    env = resting_env(clock)
    goal = rc.moved(env.state["tcp_pose"], np.array([0, 0.009, 0, 0, 0, 0]))
    env.go_to(goal)
    np.testing.assert_allclose(env.client.target.call_args.args[0], goal)


@pytest.mark.parametrize(
    ("state", "fault"),
    [
        ({"tcp_vel": np.array([0, 0, 0, 0, 0, 0.1])}, "moves at 0.000 m/s"),
        ({"tcp_pose": np.array([0.5, 0.02, 0.14, 1, 0, 0, 0])}, r"reset: the tcp stands \[0. +0.02 +0. *\] m"),
        ({"tcp_pose": np.array([0.5, 0, 0.14, np.cos(0.1), np.sin(0.1), 0, 0])}, "0.20 rad off"),
        ({"tcp_vel": np.array([0.03, 0, 0, 0, 0, 0])}, "moves at 0.030 m/s"),
    ],
)
def test_reset_is_verified(clock, state, fault):
    """It ends where the episode shall start, at rest, or it fails."""
    env = resting_env(clock)
    goal = env.state["tcp_pose"]
    start = clock.now
    env.go_to(goal, 0.3)
    assert 0.3 < clock.now - start < 0.5
    with pytest.raises(rc.RefusedError, match=fault):
        resting_env(clock, **state).go_to(goal, 0.3)


def test_the_way_of_a_reset_ends_where_someone_stops_the_arm(clock):
    """Told that it was given up, the server holds at once, not when its watchdog sees that nothing comes."""
    env = resting_env(clock)
    env.give_up = lambda: True
    with pytest.raises(rc.RobotError, match="given up"):
        env.go_to(env.state["tcp_pose"])
    assert env.client.call.call_args_list == [mock.call("hold")] and env.client.target.call_count == 1
    env = resting_env(clock, held="a client asked to hold")
    env.told = False
    with pytest.raises(rc.StoppedError, match="a client asked to hold"):
        env.go_to(env.state["tcp_pose"])
    assert env.client.target.call_count == 1


def test_pose_reward_is_serls():
    env = posed_env(np.array([0.505, 0.005, 0.065, 1, 0, 0, 0]))
    assert env.is_success()
    env.state["tcp_pose"] = np.array([0.511, 0, 0.06, 1, 0, 0, 0])
    assert not env.is_success()
    turned = Rotation.from_euler("z", 0.25) * Rotation.from_quat([1, 0, 0, 0])
    env.state["tcp_pose"] = np.array([0.5, 0, 0.06, *turned.as_quat()])
    assert not env.is_success()
    env.state["tcp_pose"] = env.goal_pose
    assert env.is_success()
    env.config = replace(env.config, reward="none")
    assert not env.is_success()


def scripted_env(*, refused: dict | None = None, **state) -> FrankaEnv:
    """An environment whose client answers with this state, or refuses the target."""
    env = posed_env(np.array([0.5, 0, 0.14, 1, 0, 0, 0]))
    env.client = mock.Mock()
    env.client.target.return_value = TARGET
    env.client.state.return_value = env.state | {"fault": None, "held": None, "gripper_fault": None} | state
    if refused:
        env.client.target.side_effect = rc.RefusedError(refused["message"], refused["code"], {"fault": refused})
    return env


@pytest.mark.parametrize("refused", [False, True])
def test_reflex_ends_the_episode_and_is_counted(refused):
    reflex = {"code": "reflex", "message": "reflex: cartesian collision", "count": 1}
    env = scripted_env(refused=reflex) if refused else scripted_env(fault=reflex)
    env.config = replace(env.config, gripper_penalty=0.02)
    env.executed = before = np.full(7, 0.5, np.float32)
    closing = np.array([0, 0, 0, 0, 0, 0, 1.0])
    _, reward, terminated, truncated, info = env.step(closing)
    assert np.array_equal(info["executed_action"], before if refused else closing)  # what led to it
    assert info["grasp_penalty"] == (0 if refused else -0.02)
    assert terminated and not truncated and reward == 0.0
    assert "cartesian collision" in info["fault"] and info["reflexes"] == 1
    assert env.step(np.zeros(7))[-1]["reflexes"] == 2
    assert not env.client.job.called and not env.client.acquire.called  # never inside a step


@pytest.mark.parametrize(
    ("trouble", "fault"),
    [
        ({"fault": {"code": "frozen", "message": "robot time stands still", "count": 1}}, "robot time stands still"),
        ({"gripper_fault": "gripper: no answer on /dev/ttyUSB0"}, "no answer on /dev/ttyUSB0"),
        ({"refused": {"code": "held", "message": "a client asked to hold; start again"}}, "a client asked to hold"),
    ],
)
def test_other_faults_truncate(trouble, fault):
    env = scripted_env(**trouble)
    env.state["tcp_pose"] = env.client.state.return_value["tcp_pose"] = env.goal_pose  # which is then no success
    _, reward, terminated, truncated, info = env.step(np.zeros(7))
    assert truncated and not terminated and fault in info["fault"] and info["reflexes"] == 0
    assert reward == 0 and not info["success"]


STOPS = {
    "held": "a client asked to hold; start again",
    "not_streaming": "a client asked to stop; start again",
    "fault": "user_stopped: the robot reports user_stopped; look at the robot, then recover",
}


def on_its_way(env: FrankaEnv, monkeypatch) -> list[str]:
    """What a reset of a scripted environment does, after its first."""
    done: list[str] = []
    env.config = dataclasses.replace(env.config, recover_at_reset=True, cameras=())
    env.hello = {"robot": {"task": None}, "gripper": {"max_width": 0.08}}
    env.told = False
    env.client.state.return_value |= {"gripper_width": 0.08, "gripper_holding": False, "state_age": 0.0}
    state = env.client.state.return_value

    def job(op: str, **_) -> None:
        done.append(op)
        state.update(fault=None, held=None)

    env.client.job.side_effect = job
    env.client.call.side_effect = lambda op, **_: state.update(held="test asked to hold") if op == "hold" else None
    monkeypatch.setattr(env, "connect", lambda: None)
    monkeypatch.setattr(env, "go_to", lambda *_: done.append("moves"))
    return done


@pytest.mark.parametrize(
    "state",
    [
        {"held": "a client asked to hold", "mode": "hold"},
        {"held": "a client asked to stop", "mode": "idle"},
        {"fault": {"code": "user_stopped", "message": "the robot reports user_stopped", "count": 1}, "mode": "fault"},
    ],
)
def test_whoever_stopped_the_robot_is_asked_before_the_next_reset(state, monkeypatch):
    """Whenever that was: in a step, in a pause, or while nothing moved."""
    env = scripted_env(**state)
    done = on_its_way(env, monkeypatch)
    for _ in range(2):
        env.client.state.return_value.update(state)
        with pytest.raises(rc.StoppedError, match=r"a person stopped the robot; call reset\(\) again when it may move"):
            env.reset()
        assert not done and not env.client.stop.called and not env.client.call.called
        env.reset()
        assert env.client.call.call_args_list[0] == mock.call("hold")  # so that a new stop can be told from this one
        assert "moves" in done
        env.client.stop.reset_mock()
        env.client.call.reset_mock()
        done.clear()


@pytest.mark.parametrize("held", ["an external force of 31 N exceeded --max-force 30", "record_demos-7 asked to stop"])
def test_what_no_other_person_held_is_not_asked_about(held, monkeypatch):
    env = scripted_env(held=held, mode="hold")
    done = on_its_way(env, monkeypatch)
    env.reset()
    assert "moves" in done


def test_nothing_of_an_episode_goes_on_in_the_next(monkeypatch):
    """Neither an order for the gripper nor the action that a reflex would be laid to."""
    env = scripted_env(mode="idle")
    on_its_way(env, monkeypatch)
    env.client.pace.side_effect = rc.Pace
    env.reset()
    assert env.step(np.array([1, 0, 0, 0, 0, 0, 1.0]))[-1]["executed_action"].any() and env.ordered == 1
    env.reset()
    env.client.target.side_effect = rc.RefusedError("a reflex", "fault", {"fault": {"code": "reflex"}})
    info = env.step(np.zeros(7))[-1]
    assert info["reflexes"] == 1 and not info["executed_action"].any() and env.elapsed_steps == 1
    assert env.client.target.call_args.args[1] is None
    env.client.state.return_value |= {"gripper_width": 0.06, "gripper_holding": True}
    env.reset()
    assert env.closure == 1  # what it holds may be wide


def test_a_reset_leads_up_first_and_ends_with_the_gains_of_the_episode(monkeypatch):
    env = scripted_env(mode="idle")
    on_its_way(env, monkeypatch)
    low = np.array([0.45, 0.02, 0.06, 1, 0, 0, 0])
    env.client.state.return_value["reference"] = low.copy()
    seen = []
    monkeypatch.setattr(env, "go_to", lambda pose, *_: seen.append((pose, env.client.call.call_args)))
    env.reset()
    np.testing.assert_allclose(seen[0][0], [*low[:2], env.reset_pose[2], *low[3:]])
    gains = mock.call("gains", **dataclasses.asdict(env.config.compliance))
    assert [call == gains for _, call in seen] == [False, False, True]


def test_an_episode_begins_with_pictures_of_its_start(monkeypatch):
    env = scripted_env(mode="idle")
    on_its_way(env, monkeypatch)
    camera = mock.Mock()
    env.cameras, arrived = [camera], []
    monkeypatch.setattr(env, "go_to", lambda *_: arrived.append(time.monotonic()))
    env.reset()
    (than, _), _ = camera.wait_newer.call_args
    assert than >= arrived[-1]
    camera.read.side_effect = rc.RobotError("camera front: newest picture is 0.40 s old")
    with pytest.raises(rc.RobotError, match=r"newest picture is 0\.40 s old"):
        env.reset()


def test_after_three_reflexes_on_the_way_to_the_start_a_person_must_look(monkeypatch):
    env = scripted_env(fault={"code": "reflex", "message": "cartesian collision", "count": 1}, mode="fault")
    done = on_its_way(env, monkeypatch)

    def collides(*_) -> None:
        env.client.state.return_value.update(fault={"code": "reflex", "message": "cartesian collision", "count": 2})
        raise rc.RefusedError("reflex: cartesian collision; look at the robot, then recover", "fault")

    monkeypatch.setattr(env, "go_to", collides)
    with pytest.raises(rc.StoppedError, match="cartesian collision.*three times on the way to the start; call reset"):
        env.reset()
    assert done.count("recover") == 3


def test_after_three_tries_against_an_obstacle_a_person_must_look(monkeypatch):
    """It would be pressed on without end."""
    env = scripted_env(mode="idle")
    on_its_way(env, monkeypatch)
    tried = []

    def blocked(*_) -> None:
        tried.append(1)
        raise rc.RefusedError("reset: the tcp stands 0.05 m off; is something in its way?", "failed")

    monkeypatch.setattr(env, "go_to", blocked)
    with pytest.raises(rc.StoppedError, match="in its way.*three times on the way to the start; call reset"):
        env.reset()
    assert len(tried) == 3


def joint_motion_ended(why: str, monkeypatch) -> tuple[FrankaEnv, list]:
    """An environment whose server ends each joint motion of a reset, and a list with an entry for each."""
    env = scripted_env(mode="idle")
    env.config = dataclasses.replace(env.config, reset_joints_every=1)
    on_its_way(env, monkeypatch)
    tried = []

    def job(op: str, **_) -> None:
        if op == "move_joints":
            tried.append(1)
            raise rc.RefusedError(f"move_joints: {why}", "failed")

    env.client.job.side_effect = job
    return env, tried


def test_after_three_tries_against_the_force_guard_a_person_must_look(monkeypatch):
    """The next reset would push whoever is in its way again, without end."""
    env, tried = joint_motion_ended("an external force of 31 N exceeded --max-force 30", monkeypatch)
    with pytest.raises(rc.StoppedError, match="--max-force 30: three times on the way to the start; call reset"):
        env.reset()
    assert len(tried) == 3


@pytest.mark.parametrize("times", [1, 3])
def test_an_arm_that_was_pushed_out_of_the_workspace_on_its_way_is_brought_back(times, monkeypatch):
    """By the next try; after three a person must look."""
    env = scripted_env(mode="idle")
    on_its_way(env, monkeypatch)
    tried = []

    def pushed(*_) -> None:
        tried.append(1)
        if len(tried) <= times:
            left = "the tcp left --workspace-low and --workspace-high on its way"
            raise rc.RefusedError(f"{left}; start again", "held")

    monkeypatch.setattr(env, "go_to", pushed)
    if times < 3:
        env.reset()
        return
    with pytest.raises(rc.StoppedError, match="held: the tcp left.*three times on the way to the start; call reset"):
        env.reset()
    assert len(tried) == 3


def test_a_joint_motion_out_of_the_workspace_is_not_tried_again(monkeypatch):
    why = "the tcp left --workspace-low and --workspace-high on its way"
    env, tried = joint_motion_ended(why, monkeypatch)
    with pytest.raises(rc.RobotError, match="bad_argument: .*--workspace-high on its way to reset_joints") as caught:
        env.reset()
    assert len(tried) == 1 and caught.value.code == "bad_argument"  # which sac_pixel_real.py does not wait for


def test_stops_are_counted_anew_when_the_server_was_started_again():
    env = scripted_env(server_id="first", stops=3)
    env.ask_first()
    env.told = False
    env.client.state.return_value |= {"server_id": "second", "stops": 1}
    env.ask_first()
    env.client.state.return_value |= {"stops": 2}  # a request of ours overtook it: nothing is held
    with pytest.raises(rc.StoppedError, match="a client asked to hold or to stop"):
        env.ask_first()


@pytest.mark.parametrize("code", STOPS)
def test_a_reset_does_not_go_on_when_a_person_stops_the_robot(code, monkeypatch):
    env = scripted_env()
    env.config = dataclasses.replace(env.config, recover_at_reset=True)
    tried = []

    def prepare(*_) -> None:
        tried.append(1)
        raise rc.RefusedError(STOPS[code], code)

    monkeypatch.setattr(env, "connect", lambda: None)
    monkeypatch.setattr(env, "prepare", prepare)
    with pytest.raises(rc.StoppedError):
        env.reset()
    assert len(tried) == 1


def test_a_gripper_that_no_action_moves_may_be_broken(monkeypatch):
    env = scripted_env(gripper_fault="gripper: not activated", mode="idle")
    done = on_its_way(env, monkeypatch)
    assert env.step(np.zeros(7))[-1]["fault"] == "gripper: not activated"
    with pytest.raises(rc.RobotError, match="gripper: not activated; then call .*action='activate'"):
        env.reset()
    assert not done
    env.config = dataclasses.replace(env.config, gripper="fixed")
    assert env.step(np.zeros(7))[-1]["fault"] is None


def test_a_stop_just_before_the_joint_motion_of_a_reset_is_heard(monkeypatch):
    env = scripted_env(mode="idle")
    env.config = dataclasses.replace(env.config, reset_joints_every=1)
    done = on_its_way(env, monkeypatch)
    env.client.stop.side_effect = lambda: env.client.state.return_value.update(held="a client asked to stop")
    with pytest.raises(rc.StoppedError, match="a client asked to stop"):
        env.reset()
    assert env.client.stop.called and "move_joints" not in done


def test_a_stop_just_before_the_gripper_opens_for_a_reset_is_heard(monkeypatch):
    env = scripted_env(mode="hold")
    env.config = dataclasses.replace(env.config, gripper_at_reset="open")
    done = on_its_way(env, monkeypatch)
    env.client.stop.side_effect = lambda: env.client.state.return_value.update(held="a client asked to stop")
    with pytest.raises(rc.StoppedError, match="a client asked to stop"):
        env.reset()
    assert env.client.stop.called and not done


def test_every_so_many_resets_go_to_joint_positions(monkeypatch):
    env = scripted_env(mode="idle")
    env.config = dataclasses.replace(env.config, reset_joints_every=3)
    done, joints = on_its_way(env, monkeypatch), []
    for _ in range(6):
        env.reset()
        joints.append("move_joints" in done)
        done.clear()
    assert joints == [False, False, True] * 2


def test_a_picture_that_is_too_old_ends_the_episode():
    """The observation has the last one, so that its shape stays."""
    env = scripted_env()
    frame = rc.Frame(np.full((4, 4, 3), 7, np.uint8), 0.0, 1)
    camera = mock.Mock(frame=frame, config=CameraConfig("front"))
    camera.read.side_effect = rc.RobotError("camera front: newest picture is 0.40 s old")
    env.cameras = [camera]
    env.state["state_age"] = 0.0
    obs, reward, terminated, truncated, info = env.step(np.zeros(7))
    assert truncated and not terminated and info["fault"] == "camera front: newest picture is 0.40 s old"
    assert not info["success"] and reward == 0 and np.array_equal(obs["front"], frame.image)


def test_who_closes_the_environment_gives_the_robot_back():
    env = scripted_env()
    client = env.client
    env.close()
    assert client.close.called and env.client is None


def test_step_goes_on_when_the_answer_to_its_target_was_lost():
    """The second try is refused as stale, without a result: the first one had arrived."""
    env = rc.FrankaEnv(rc.PEG)
    pose = rc.pose_from_euler(rc.PEG.reset_pose)
    env.state, env.target = {"reference": pose, "tcp_pose": pose}, pose
    for result, limited in ((None, []), ({"limited": ["speed"]}, ["speed"])):
        env.client = SimpleNamespace(target=lambda pose, closure, result=result: {"result": result})
        info = {}
        env.command(np.zeros(7), info)
        assert info["limited"] == limited


# --- Environment against robot_server.py on the simulated arm ---------------------------------------------------------
@contextlib.contextmanager
def served(folder, *flags, port: int = 0):
    """The address of a running server, and its process."""
    with popen_script("robot_server.py", "--port", port, *flags, cwd=folder) as process:

        def line() -> str:
            return process.stdout_path.read_text()

        wait_until(lambda: "serving on" in line() or process.poll() is not None, 60.0)
        assert process.poll() is None, process.stderr_path.read_text()
        yield line().split("serving on ")[1].split()[0], process


@pytest.fixture(scope="module")
def peg(tmp_path_factory):
    with served(tmp_path_factory.mktemp("server"), "--env-id", "FrankaPegInsert-v0") as (address, _):
        yield address


@contextlib.contextmanager
def environment(address: str, config: TaskConfig = rc.PEG, **changes):
    """The environment, by default without cameras and without moving the start around."""
    changes = {"cameras": (), "reward": "none", "random_reset": (0, 0, 0), "wait_s": 10.0} | changes
    env = gym.make("robot_client:FrankaReal-v0", config=replace(config, server=address, **changes))
    with contextlib.closing(env):
        yield env


ZERO = np.zeros(7, np.float32)


def test_scripted_person_inserts_the_peg_in_view_of_two_cameras(peg):
    """From reset to success, through every part: the stored action is what moves the arm, and time does not drift."""
    changes = {
        "reward": "task",
        "random_reset": (0.02, 0.02, 0.3),
        "max_image_age_s": 2.0,
    }  # a busy machine may be slow
    with environment(peg, cameras=rc.PEG.cameras, **changes) as env:
        env = Intervention(env, rc.ScriptedExpert())
        obs, info = env.reset(seed=3)
        assert env.observation_space.contains(obs) and not info["success"]
        assert info["fault"] is None and info["reflexes"] == 0
        np.testing.assert_allclose(obs["state"][4:11], [0, 0, 0, 0, 0, 0, 1], atol=1e-6)  # where the episode began
        beats, periods, done = [], [], False
        while not done:
            obs, reward, terminated, truncated, info = env.step(ZERO)
            beats.append(time.monotonic())
            periods.append(info["period_s"])
            assert env.observation_space.contains(obs)
            np.testing.assert_array_equal(info["intervene_action"], info["executed_action"])
            done = terminated or truncated
        assert terminated and not truncated and reward == 1.0 and info["success"] and info["fault"] is None
        assert 5 < len(beats) < 60
        assert sum(periods[1:]) == pytest.approx(beats[-1] - beats[0], abs=0.2)  # what it reports is true
        assert not np.array_equal(obs["front"], obs["wrist"]) and obs["front"].std() > 5
        assert obs["state"][0] > 0.7  # the gripper still holds the peg


def test_random_policy_with_gripper_keeps_the_rate(peg):
    """And the environment tells the truth about it. The bound for lateness is one for busy machines."""
    with environment(peg) as env:
        env.reset(seed=0)
        rng, periods, late, clock = np.random.default_rng(0), [], [], []
        for _ in range(30):
            action = np.append(rng.uniform(-0.3, 0.3, 6), rng.choice([-1, 1])).astype(np.float32)
            info = env.step(action)[-1]
            clock.append(time.monotonic())
            assert info["fault"] is None
            assert info["robot_time"] == env.unwrapped.state["robot_time"]
            periods.append(info["period_s"])
            late.append(info["late_s"])
        assert env.unwrapped.ordered is not None  # the gripper had orders
        assert np.median(periods) == pytest.approx(0.1, abs=0.02) and np.mean(periods) < 0.15
        assert np.median(late) < 0.03 and min(late) >= 0
        assert sum(periods[1:]) == pytest.approx(clock[-1] - clock[0], abs=0.1)  # as a clock outside saw it
        env.unwrapped.config.gripper_wait_s = 0.6  # as SERL does: an option, and late
        closing = np.array([0] * 6 + [1 - 2 * env.unwrapped.closure], np.float32)
        info = env.step(closing)[-1]
        assert info["period_s"] > 0.15 and info["late_s"] > 0.05
        assert info["late_s"] == pytest.approx(info["period_s"] - 0.1, abs=0.03)


def test_gripper_opens_in_every_episode(peg):
    """Although the last order of the episode before was the same: the reset has closed it on the peg again."""
    with environment(peg) as env:
        for _ in range(2):
            env.reset(seed=0)
            assert env.unwrapped.measured_closure() > 0.5
            for _ in range(6):
                info = env.step(np.array([0, 0, 0, 0, 0, 0, -1], np.float32))[-1]
                assert info["fault"] is None
            assert env.unwrapped.measured_closure() < 0.3


def test_simulated_robot_may_be_faster_than_real_time(tmp_path):
    """Paced by the robot's clock: 20 steps of 0.1 s take half a second of ours."""
    with (
        served(tmp_path, "--env-id", "FrankaPegInsert-v0", "--sim-speed", 4) as (address, _),
        environment(address) as env,
    ):
        env.reset(seed=0)
        began, robot_began = time.monotonic(), env.unwrapped.state["robot_time"]
        periods = [env.step(ZERO)[-1]["period_s"] for _ in range(20)]
        elapsed = time.monotonic() - began
        robot_elapsed = env.unwrapped.state["robot_time"] - robot_began
        assert 1.9 < sum(periods) < 4.0  # on a busy machine some are longer
        assert robot_elapsed == pytest.approx(sum(periods), abs=0.4)
        assert elapsed < robot_elapsed / 2


def test_time_limit_truncates_and_nothing_creeps(peg):
    with environment(peg, max_episode_steps=20) as env:
        env.reset(seed=0)
        start = env.unwrapped.state["reference"]
        ends = [env.step(ZERO)[1:] for _ in range(20)]
        assert [(terminated, truncated) for _, terminated, truncated, _ in ends] == [(False, False)] * 19 + [
            (False, True)
        ]
        assert not any(reward for reward, *_ in ends)
        np.testing.assert_allclose(env.unwrapped.state["reference"], start, atol=1e-6)


def test_reset_goes_where_it_should_and_starts_are_seeded(peg):
    starts = []
    with environment(peg, random_reset=(0.05, 0.05, 0.5), relative_frame=False, reset_joints_every=2) as env:
        jobs = mock.Mock(wraps=rc.RobotClient.job)
        with mock.patch.object(rc.RobotClient, "job", lambda self, op, **args: jobs(self, op, **args)):
            for seed in (5, 6, 5):
                obs, _ = env.reset(seed=seed)
                starts.append(obs["state"][4:11])
        asked = [call.args[1] for call in jobs.call_args_list]
        assert asked.count("move_joints") == 1  # before the second episode
        x, y, yaw = np.random.Generator(np.random.PCG64(5)).uniform(size=3)
    np.testing.assert_allclose(starts[0], starts[2], atol=0.005)
    assert np.abs(starts[0] - starts[1])[:2].max() > 0.01
    for start in starts:
        off, turn = start[:3] - [0.5, 0, 0.14], Rotation.from_quat(start[3:]) * Rotation.from_euler("x", -np.pi)
        assert np.abs(off[:2]).max() < 0.055 and abs(off[2]) < 0.005
        roll, pitch, yaw = turn.as_euler("xyz")
        assert abs(roll) < 0.02 and abs(pitch) < 0.02 and abs(yaw) < 0.52


def test_reset_that_is_given_up_leaves_the_arm_where_it_is(peg):
    with environment(peg, reset_speed=0.05) as env, contextlib.closing(RobotClient(peg)) as observer:
        env.reset(seed=0)
        for _ in range(10):
            env.step(np.array([1, 1, 0, 0, 0, 0, 0], np.float32))
        asked = []

        def give_up() -> bool:
            asked.append(observer.state()["tcp_pose"][:3])
            return len(asked) == 5

        with pytest.raises(rc.RobotError, match="the reset was given up, the arm holds"):
            env.reset(seed=0, options={"keep_scene": True, "give_up": give_up})
        wait_until(lambda: observer.state()["mode"] in ("hold", "idle"), 2.0)
        assert len(asked) == 5
        away = np.abs(observer.state()["tcp_pose"][:2] - [0.5, 0.0])
        assert away.max() > 0.03  # far from the start
        env.reset(seed=0)
        assert env.step(ZERO)[-1]["fault"] is None


def test_person_moves_the_arm_in_the_base_frame(peg):
    """With a relative frame: what is stored is in the tool's frame, the arm goes where the person pushes."""
    with environment(peg) as env:
        hand = Hand()
        env = Intervention(env, hand)
        env.reset(seed=0)
        start = env.unwrapped.state["tcp_pose"]
        hand.moves = (np.array([0, 0.5, 0.5, 0, 0, 0]), 0.0)  # left and up
        for _ in range(5):
            info = env.step(ZERO)[-1]
        moved = env.unwrapped.state["tcp_pose"] - start
        assert moved[1] > 0.015 and moved[2] > 0.025 and abs(moved[0]) < 0.01, moved
        np.testing.assert_allclose(info["executed_action"][:3], [0, -0.5, -0.5], atol=0.05)  # its y and z are reversed


def test_two_commanders_hold_and_takeover(peg):
    with environment(peg) as env, contextlib.closing(RobotClient(peg, name="anna")) as anna:
        env.reset(seed=0)
        with pytest.raises(rc.RefusedError, match="lease_taken"):
            anna.acquire()
        assert anna.state()["mode"] == "streaming"  # anyone may look,
        anna.call("hold")  # and anyone may stop it
        wait_until(lambda: anna.state()["mode"] == "hold", 1.0)
        _, _, terminated, truncated, info = env.step(ZERO)
        assert truncated and not terminated and info["fault"].startswith("held")
        with pytest.raises(rc.RobotError, match=r"a person stopped the robot; call reset\(\) again"):
            env.reset(seed=0)  # not without being asked again
        env.reset(seed=0)
        assert env.step(ZERO)[-1]["fault"] is None
        anna.acquire(takeover=True)
        info = env.step(ZERO)[-1]
        assert info["fault"].startswith("no_lease")
        anna.acquire(ttl_s=10.0)
        with pytest.raises(rc.RefusedError, match="lease_taken: anna"):
            env.reset(seed=0)
        anna.acquire(ttl_s=1.5)  # and now she dies: her place is free
        env.reset(seed=0)
        assert env.step(ZERO)[-1]["fault"] is None


def test_wild_or_slow_policies_end_in_hold_and_stop(peg):
    with environment(peg) as env, contextlib.closing(RobotClient(peg)) as observer:
        env.reset(seed=0)
        with pytest.raises(ValueError, match="finite numbers"):
            env.step(np.full(7, np.nan, np.float32))
        wait_until(lambda: observer.state()["mode"] == "hold", 1.0)
        assert env.step(ZERO)[-1]["fault"] is None  # half a second late: the watchdog's hold ends by itself,
        time.sleep(0.45)
        info = env.step(ZERO)[-1]
        assert info["fault"] is None and info["overruns"] >= 1 and info["late_s"] > 0.3  # and is reported
        time.sleep(2.5)
        wait_until(lambda: observer.state()["mode"] == "idle", 1.0)
        _, _, _, truncated, info = env.step(ZERO)
        assert truncated and info["fault"]
        env.reset(seed=0)
        assert env.step(ZERO)[-1]["fault"] is None


def steps_until_fault(env, seconds: float) -> str:
    """What ends the episode, within this time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        _, _, terminated, truncated, info = env.step(ZERO)
        if truncated:
            assert not terminated
            return info["fault"]
    raise AssertionError(f"no fault within {seconds} s")


@pytest.mark.parametrize("asked", ["hold", "stop"])
def test_a_person_stops_the_arm_while_its_gripper_moves_before_the_start(tmp_path, asked):
    """Nothing moves the arm then, and nothing may until that person says so."""
    with (
        served(tmp_path, "--env-id", "FrankaPegInsert-v0") as (address, _),
        environment(address, gripper_at_reset="open") as env,
        contextlib.closing(RobotClient(address, name="person")) as person,
    ):
        env.reset(seed=0)
        for _ in range(8):
            env.step(np.append(np.zeros(6), 1.0))
        job = env.unwrapped.client.job

        def stopped_on_the_way(op: str, **args) -> None:
            job(op, **args)
            if op == "gripper":
                person.call(asked)

        env.unwrapped.client.job = stopped_on_the_way
        with pytest.raises(rc.StoppedError, match=f"a client asked to {asked}"):
            env.reset(seed=1)
        env.unwrapped.client.job = job
        env.reset(seed=1)
        assert env.step(ZERO)[-1]["fault"] is None


@pytest.mark.parametrize("before", ["stop", "reset_task", "start"])
def test_stop_between_two_requests_of_a_reset_is_heard(tmp_path, before):
    with (
        served(tmp_path, "--env-id", "FrankaPegInsert-v0") as (address, _),
        environment(address) as env,
        contextlib.closing(RobotClient(address, name="person")) as person,
    ):
        env.reset(seed=0)
        env.step(ZERO)
        client, call = env.unwrapped.client, env.unwrapped.client.call

        def overtaken(op: str, **args) -> dict:
            if op == before:
                client.call = call
                person.call("hold")
                time.sleep(0.02)  # some ticks
            return call(op, **args)

        client.call = overtaken
        with pytest.raises(rc.StoppedError, match="a client asked to"):
            env.reset(seed=1)
        assert person.state()["mode"] != "streaming"
        env.reset(seed=1)


def test_dead_frozen_and_restarted_server(tmp_path):
    flags, port = ("--env-id", "FrankaPegInsert-v0"), free_port()
    with served(tmp_path, *flags, port=port) as (address, process), environment(address) as env:
        env.reset(seed=0)
        assert env.step(ZERO)[-1]["fault"] is None
        os.kill(process.pid, signal.SIGSTOP)  # the process that owns the robot; the other one still answers
        assert re.search(r"newest state is .* s old|has not answered", steps_until_fault(env, 3.0))
        os.kill(process.pid, signal.SIGCONT)
        for signal_number in (signal.SIGSTOP, signal.SIGKILL):  # both
            env.reset(seed=0)
            assert env.step(ZERO)[-1]["fault"] is None
            os.killpg(process.pid, signal_number)
            assert "no answer from tcp://127.0.0.1" in steps_until_fault(env, 3.0)
            if signal_number == signal.SIGSTOP:
                os.killpg(process.pid, signal.SIGCONT)
        env.unwrapped.config.wait_s = 1.0
        with pytest.raises(rc.UnreachableError, match=r"is robot_server\.py running"):
            env.reset(seed=0)
        env.unwrapped.config.wait_s = 20.0
        with popen_script("robot_server.py", "--port", port, *flags, cwd=tmp_path):
            env.reset(seed=0)
            assert env.step(ZERO)[-1]["fault"] is None


def test_episode_goes_on_when_the_front_is_killed(tmp_path):
    """The process with the sockets is started again, lease and target stay. On a machine so busy that a client gives
    up before, the episode ends, and the next one begins."""
    with served(tmp_path, "--env-id", "FrankaPegInsert-v0") as (address, process), environment(address) as env:
        went_on = 0
        for _ in range(4):
            env.reset(seed=0)
            start = env.unwrapped.state["reference"]
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            os.kill(int(children[0]), signal.SIGKILL)
            infos = [env.step(ZERO)[-1] for _ in range(10)]
            if any(info["fault"] for info in infos):
                assert "no answer" in next(info["fault"] for info in infos if info["fault"])
                continue
            went_on += 1
            assert infos[-1]["late_s"] < 0.1
            np.testing.assert_allclose(env.unwrapped.state["reference"], start, atol=1e-4)
        assert went_on


def test_old_state_is_no_state():
    env = scripted_env(state_age=0.6)
    assert "newest state is 0.60 s old" in env.step(ZERO)[-1]["fault"]


def test_reflex_of_the_simulated_arm_latches_until_reset(tmp_path):
    """The closed gripper presses on the cube, harder than --collision-force."""
    with (
        served(tmp_path, "--env-id", "FrankaPickCube-v0", "--collision-force", 10) as (address, _),
        environment(address, rc.PICK, gripper_at_reset="close") as env,
        contextlib.closing(RobotClient(address)) as observer,
    ):
        env.reset(seed=0)
        cube = np.array(observer.call("task")["result"]["observation"]["cube_pos"])
        for _ in range(100):
            goal = cube[:2] - env.unwrapped.state["tcp_pose"][:2]
            down = -0.5 if np.abs(goal).max() < 0.01 else 0.0
            action = np.array([*np.clip(goal / 0.05, -0.5, 0.5), down, 0], np.float32)
            _, _, terminated, truncated, info = env.step(action)
            if terminated or truncated:
                break
        assert terminated and info["reflexes"] == 1 and "reflex" in info["fault"]
        time.sleep(0.3)
        assert observer.state()["fault"]["code"] == "reflex"
        assert env.step(np.zeros(4, np.float32))[-1]["reflexes"] == 2  # still latched
        env.unwrapped.config.recover_at_reset = False
        with pytest.raises(rc.RefusedError, match=r"look at the robot, then call client\.job\('recover'\)"):
            env.reset()
        env.unwrapped.config.recover_at_reset = True
        env.reset(seed=1)
        assert env.step(np.zeros(4, np.float32))[-1]["fault"] is None


def test_frozen_camera_ends_the_episode_and_reset_waits_for_it(peg):
    camera = CameraConfig("front", "test", fps=50, timeout_s=0.1)
    with environment(peg, cameras=(camera,), wait_s=0.5) as env:
        env.reset(seed=0)
        (camera,) = env.unwrapped.cameras
        assert env.step(ZERO)[-1]["fault"] is None
        camera.mode = "freeze"
        ends = [env.step(ZERO)[2:] for _ in range(4)]
        assert ends[-1][1] and not ends[-1][0] and "camera front" in ends[-1][2]["fault"]
        with pytest.raises(rc.RobotError, match="camera front: no new picture within 0.5 s"):
            env.reset(seed=0)
        camera.mode = "run"
        env.reset(seed=0)
        assert env.step(ZERO)[-1]["fault"] is None


@pytest.mark.parametrize(
    ("changes", "hello", "fault"),
    [
        ({"workspace": ((0.1, 0.6), *rc.PEG.workspace[1:])}, {}, "the workspace reaches beyond"),
        ({"workspace": ((0.4, 0.9), *rc.PEG.workspace[1:])}, {}, "the workspace reaches beyond"),
        ({"action_scale": (0.05, 0.05, 0.05, 0.1, 0.1, 0.1)}, {}, "too large for --max-jump"),
        ({"action_scale": (0.02, 0.02, 0.02, 0.25, 0.25, 0.25)}, {}, "too large for --max-rotation-jump"),
        ({"reward": "task"}, {"robot": {"task": None}}, "needs a simulated robot"),
        ({"env_id": "FrankaPickCube-v0"}, {}, "is not FrankaPegInsert-v0; start robot_server.py --env-id FrankaPick"),
        ({}, {"gripper": {"kind": "none"}}, "without a gripper it must be 'fixed'"),
    ],
)
def test_task_that_does_not_fit_the_server(peg, changes, hello, fault):
    with environment(peg, **changes) as env, contextlib.closing(RobotClient(peg)) as client:
        env.unwrapped.client = mock.Mock(**{"hello.return_value": client.hello() | hello})
        with pytest.raises(rc.RobotError, match=f"TaskConfig does not fit .*{fault}"):
            env.reset()


# --- Command line -----------------------------------------------------------------------------------------------------
DOCTOR = re.compile(r"^(ok    [^:;]+: [^;]+|(warn|FAIL)  [^:;]+: [^;]+(; .+)?)$")


def checks(stdout: str) -> dict[str, str]:
    """Name -> level of every line of the doctor."""
    lines = [line for line in stdout.splitlines() if re.match(r"ok|warn|FAIL", line)]
    assert lines and all(DOCTOR.match(line) for line in lines), lines
    return {line[6:].partition(":")[0]: line[:6].strip() for line in lines}


def test_doctor_and_live_values(peg, tmp_path):
    run = run_script("robot_client.py", "--server", peg, "--seconds", 1, "--snapshots", "shots", cwd=tmp_path)
    found = checks(run.stdout)
    names = {"python", "server", "robot", "round trip", "fault", "gripper", "control"}
    assert names <= set(found) and "FAIL" not in found.values() and "None" not in run.stdout
    assert f"server: {peg}, commanded by nobody" in run.stdout and "fault: none" in run.stdout
    assert re.search(r"gripper: sim, \d+ mm open", run.stdout)
    assert " N | gripper " in run.stdout and " | front " in run.stdout
    assert {"front.png", "wrist.png"} <= {path.name for path in (tmp_path / "shots").iterdir()}
    assert run.stdout.splitlines()[-1] == "ready"
    assert "Traceback" not in run.stderr  # such as OpenGL's, which was not let go


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_doctor_that_is_interrupted_gives_the_terminal_back(peg, terminal, number):
    """What had not looked at everything is not ready."""
    import termios

    ours, theirs = terminal
    before = termios.tcgetattr(theirs)
    for address, said, code in ((peg, b" N | gripper ", 0), ("tcp://127.0.0.1:9", b"python", 1)):
        command = [sys.executable, REPO / "robot_client.py", "--server", address, "--teleop", "keyboard"]
        with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs) as process:
            heard = b""
            while said not in heard:
                heard += os.read(ours, 10_000)
            process.send_signal(number)
            assert process.wait(20) == code
        assert termios.tcgetattr(theirs) == before


def test_doctor_without_server_and_devices_says_what_to_do(tmp_path):
    flags = ("--server", "tcp://127.0.0.1:9", "--seconds", 0.5)
    run = run_script("robot_client.py", *flags, "--teleop", "keyboard", cwd=tmp_path, check=False)
    found = checks(run.stdout)
    assert run.returncode == 1 and found["server"] == found["teleop"] == "FAIL"
    assert "FAIL  server: no answer from tcp://127.0.0.1:9" in run.stdout
    assert "FAIL  teleop: keyboard: standard input is no terminal" in run.stdout
    assert run.stderr.splitlines()[-1] == "robot_client.py: 2 to fix, see above"
    run = run_script("robot_client.py", *flags, "--drive", cwd=tmp_path, check=False)
    assert "--drive needs a server, and --teleop" in run.stderr and "Traceback" not in run.stderr


def test_doctor_names_bad_keys_and_warns_of_open_ones(keys, tmp_path):
    (keys / "client.key_secret").chmod(0o644)
    flags = ("--server", "tcp://127.0.0.1:9", "--seconds", 0.1, "--keys", keys)
    run = run_script("robot_client.py", *flags, cwd=tmp_path, check=False)
    assert re.search(r"^warn  keys: .*client.key_secret; others can read it: chmod 600", run.stdout, re.MULTILINE)
    (keys / "server.key").write_text("")
    run = run_script("robot_client.py", *flags, cwd=tmp_path, check=False)
    assert re.search(r"^FAIL  server: --keys .*server.key: ", run.stdout, re.MULTILINE)
    assert "Traceback" not in run.stderr


def test_first_motion_by_keyboard(peg, tmp_path, terminal):
    ours, theirs = terminal
    flags = ("--server", peg, "--teleop", "keyboard", "--drive", "--seconds", 60)
    with (
        contextlib.closing(RobotClient(peg)) as observer,
        popen_script("robot_client.py", *flags, cwd=tmp_path, stdin=theirs) as process,
    ):
        wait_until(lambda: " N | gripper " in process.stdout_path.read_text() or process.poll() is not None, 90.0)
        start = observer.state()["tcp_pose"]
        for _ in range(60):
            os.write(ours, b"r")
            time.sleep(0.03)
        assert observer.state()["tcp_pose"][2] - start[2] > 0.03
        assert "space  take over and stand still" in process.stdout_path.read_text()  # the keys are on the screen
        os.write(ours, b"q")
        process.wait(60)
        assert process.returncode == 0, process.stderr_path.read_text()


def test_first_motion_without_a_gripper(tmp_path, terminal):
    _, theirs = terminal
    with served(tmp_path, "--gripper", "none") as (address, _):
        flags = ("--server", address, "--teleop", "keyboard", "--drive", "--seconds", 1)
        with popen_script("robot_client.py", *flags, cwd=tmp_path / "client", stdin=theirs) as process:
            assert process.wait(60) == 0, process.stderr_path.read_text()


def test_first_motion_begins_inside_the_workspace(tmp_path, terminal):
    """From outside it would move in by itself, without a key."""
    _, theirs = terminal
    with (
        served(tmp_path, "--workspace-high", 0.65, 0.35, 0.1) as (address, _),
        contextlib.closing(RobotClient(address)) as observer,
    ):
        start = observer.state()["tcp_pose"]
        flags = ("--server", address, "--teleop", "keyboard", "--drive", "--seconds", 5)
        with popen_script("robot_client.py", *flags, cwd=tmp_path / "client", stdin=theirs) as process:
            assert process.wait(60) == 1
            assert "outside of the server's workspace" in process.stderr_path.read_text()
        assert np.abs(observer.state()["tcp_pose"][:3] - start[:3]).max() < 1e-3


@pytest.mark.parametrize(("z", "outside"), [(0.05, False), (0.005, True), (0.51, True)])
def test_first_motion_stays_near_and_leaves_faults_to_the_person(monkeypatch, z, outside):
    """Within 10 cm and the server's workspace, never to joint positions, and not on after a fault."""
    low, high = robot_server.Args().workspace_low, robot_server.Args().workspace_high
    hello = {"limits": {"workspace_low": low, "workspace_high": high}, "gripper": {"kind": "none"}}
    hello["gains"] = dataclasses.asdict(rc.Gains())
    pose = np.array([0.5, 0.0, z, 1.0, 0.0, 0.0, 0.0])
    env = mock.Mock(action_space=rc.spaces.Box(-1, 1, (6,)))
    env.step.return_value = None, 0.0, False, True, {"fault": "a fault for this test"}
    made = mock.Mock()
    monkeypatch.setattr(rc, "FrankaEnv", made)
    monkeypatch.setattr(rc, "Intervention", lambda *_: env)
    doctor = rc.Doctor(rc.Args(), client=mock.Mock(), teleop=mock.Mock(terminal=None))
    doctor.client.hello.return_value, doctor.client.state.return_value = hello, {"tcp_pose": pose}
    monkeypatch.setattr(doctor, "show", lambda **_: None)
    with pytest.raises(rc.RobotError, match="outside of the server's" if outside else "a fault for this test"):
        doctor.drive(time.monotonic() + 5)
    assert made.called != outside
    if not outside:
        (config,) = made.call_args.args
        config.check()
        np.testing.assert_allclose(config.workspace[:3], [(0.4, 0.6), (-0.1, 0.1), (low[2], 0.15)])
        assert not config.recover_at_reset and config.reset_joints_every == 0 and env.step.call_count == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"workspace": ((0.6, 0.4), *rc.PEG.workspace[1:])},
        {"workspace": (*rc.PEG.workspace[:2], (0.05, 0.08), *rc.PEG.workspace[3:])},
        {"workspace": ((0.4, 0.52), *rc.PEG.workspace[1:])},  # with its shifts
        {"workspace": ((0.48, 0.6), *rc.PEG.workspace[1:])},
        {"random_reset": (0.0, 0.0, 0.9)},
        {"workspace": (*rc.PEG.workspace[:3], (0.05, 0.1), *rc.PEG.workspace[4:])},
    ],
)
def test_a_workspace_that_does_not_hold_its_start(changes):
    """Actions of zero would move the arm in."""
    with pytest.raises(ValueError, match="workspace must be from low to high, and hold reset_pose"):
        dataclasses.replace(rc.PEG, **changes).check()


def test_a_workspace_that_ends_where_its_starts_end():
    workspace = ((0.2, 0.4), *rc.PEG.workspace[1:])  # 0.3 - 0.1 is less than 0.2
    reset_pose = (0.3, *rc.PEG.reset_pose[1:])
    dataclasses.replace(rc.PEG, workspace=workspace, reset_pose=reset_pose, random_reset=(0.1, 0, 0)).check()


def test_encrypted_connection(tmp_path):
    run_script("robot_server.py", "--keygen", "--keys", "keys", cwd=tmp_path)
    with served(tmp_path, "--keys", "keys") as (address, _):
        with contextlib.closing(RobotClient(address, keys=str(tmp_path / "keys"))) as client:
            assert client.hello()["protocol"] == rc.PROTOCOL_VERSION
        with (
            contextlib.closing(RobotClient(address, timeout_s=0.3, tries=2)) as client,
            pytest.raises(rc.UnreachableError, match="and --keys right"),
        ):
            client.hello()
