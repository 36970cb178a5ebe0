"""The safety of robot_server.py, tick by tick: random sequences of requests, faults, pushes and pauses on an arm made
for it, with a clock of our own and without any thread, so that every tick can be looked at and a failure repeated."""

import math
import random
import socket
import threading
import time
from collections import deque
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
from conftest import REPO  # noqa: F401  puts the scripts on the path
from scipy.spatial.transform import Rotation

import robot_server
from robot_server import COMMAND, Arm, ArmError, ArmState, Command, Control, Front, Refused, SimGripper

DT, TOKENS = 0.004, ("a" * 16, "b" * 16)
DOWN = np.array([1.0, 0.0, 0.0, 0.0])


class FakeArm(Arm):
    """Follows its reference with a lag, at 4 ms a tick; a test pushes it, freezes it, makes its calls fail."""

    follows = 0.1  # share of its way to the reference that it goes in a tick

    def __init__(self, args: robot_server.Args):
        super().__init__(args)
        self.clock, self.pose, self.goal, self.mode = 10.0, np.array([0.45, 0.0, 0.3, *DOWN]), None, "idle"
        self.twist, self.wrench = np.zeros(6), np.zeros(6)
        self.frozen, self.failing, self.busy, self.calls = 0, {}, 0, []
        self.rests, self.began_stops, self.moves = 0, 0, False  # ticks that a soft stop takes

    def called(self, name: str) -> None:
        self.calls.append(name)
        if name in self.failing:
            raise self.failing.pop(name)

    def get_state(self) -> ArmState:
        self.called("get_state")
        before, self.twist = self.pose.copy(), np.zeros(6)
        if self.frozen:
            self.frozen -= 1
        else:
            self.clock += DT
            if self.controlling and self.goal is not None:
                self.pose[:3] += self.follows * (self.goal[:3] - self.pose[:3])
                self.pose[3:] = self.goal[3:]
                self.twist = np.append(self.pose[:3] - before[:3], np.zeros(3)) / DT
        zero = np.zeros(7)
        return ArmState(self.clock, self.pose.copy(), self.twist, self.wrench.copy(), zero, zero, self.mode)

    def start(self, pose, q, gains) -> None:
        self.called("start")
        self.controlling, self.goal = True, pose.copy()

    def stream(self, pose) -> None:
        self.called("stream")
        assert self.controlling, "a reference without a controller"
        self.goal = pose.copy()

    def set_gains(self, gains) -> None:
        self.called("set_gains")

    def stop(self) -> None:
        self.called("stop")
        if self.busy == 0 or self.controlling or self.moves:
            self.began_stops += 1
            self.busy = self.rests if self.controlling else 0
        self.controlling, self.moves = False, False

    def move_to_joint_positions(self, q, speed) -> None:
        self.called("move")
        self.busy, self.moves = 50, True

    def moving(self) -> bool:
        self.called("moving")
        self.busy = max(self.busy - 1, 0)
        self.moves = self.moves and self.busy > 0
        return self.busy > 0

    def recover(self) -> None:
        self.called("recover")
        self.mode, self.controlling, self.busy, self.moves = "idle", False, 0, False


class Link:
    """One end of the line between front and robot thread, in one process. `then` is done when something was sent."""

    def __init__(self, then):
        self.then = then
        self.queue: deque[bytes] = deque(maxlen=300)
        self.other = self

    def send(self, data: bytes) -> None:
        self.other.queue.append(data)
        self.then()

    def recv(self, size: int) -> bytes:
        if not self.queue:
            raise BlockingIOError
        return self.queue.popleft()

    def recv_into(self, buffer: memoryview) -> int:
        data = self.recv(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class World:
    """A front without sockets and a robot thread that is none, around a FakeArm; `tick` is one of its periods."""

    def __init__(self, monkeypatch, **flags):
        self.now = 1000.0
        monkeypatch.setattr(robot_server.time, "monotonic", lambda: self.now)
        self.args, self.handles = robot_server.Args(**flags), 0
        self.gripper = SimGripper(self.args)
        self.control = Control(self.args, self.gripper)
        self.arm = self.control.arm = FakeArm(self.args)
        self.control.state = self.arm.get_state()
        self.control.advanced = self.control.ticked = self.now
        self.control.limiter.seed(self.control.state.tcp_pose)
        self.front = self.new_front()

    def new_front(self) -> Front:
        """What it says is heard at once, and acted on in the next tick."""
        control = self.control
        control.link = Link(lambda: None)
        theirs = Link(lambda: (control.listen(self.now), control.publish()))
        control.link.other = theirs
        theirs.other = control.link
        control.publish()
        return Front(self.args, theirs, {"server_id": "x"})

    def ask(self, op: str, token: str = TOKENS[0], **args: object) -> dict:
        """The result; raises Refused."""
        args |= {"token": token} if op == "acquire" else {}
        return self.front.carry_out({"v": 2, "op": op, "token": token, "args": args})

    def job(self, op: str, token: str = TOKENS[0], **args: object) -> str:
        self.handles += 1
        self.ask(op, token, handle=f"handle-{self.handles}", **args)
        return f"handle-{self.handles}"

    def tick(self, count: int = 1) -> None:
        for _ in range(count):
            self.now += DT
            self.control.tick()

    def streaming(self) -> np.ndarray:
        """Streaming with the first token's lease; the reference."""
        self.ask("acquire", name="test", ttl=10.0, takeover=True)
        self.job("start")
        self.tick(3)
        assert self.control.mode == "streaming"
        return self.reference

    @property
    def reference(self) -> np.ndarray:
        return self.control.limiter.reference.copy()


@pytest.fixture
def world(monkeypatch):
    return World(monkeypatch)


def near(reference: np.ndarray, *offset: float) -> list[float]:
    return [*(reference[:3] + offset).tolist(), *reference[3:].tolist()]


def test_a_start_that_meets_a_fault(world):
    """The main thread notes one just after the robot thread has seen that there is none."""
    world.ask("acquire", name="test")
    handle = world.job("start")
    world.control.note_fault("frozen", "for this test")
    world.tick(5)
    assert world.control.mode == "fault" and world.control.fault["code"] == "frozen" and "start" not in world.arm.calls
    assert world.ask("job", handle=handle)["status"] == "failed"


def test_a_frozen_robot(world):
    """Its clock stands still for more than 50 ms: a fault, which stays when it goes on."""
    world.streaming()
    world.arm.frozen = 11
    world.tick(11)
    assert world.control.mode == "streaming"
    assert world.now - world.front.status()["at"] == pytest.approx(11 * DT)  # an old state is not told as new
    world.arm.frozen = 30
    world.tick(2)
    assert world.control.fault["code"] == "frozen"
    world.tick(100)
    assert world.arm.frozen == 0 and world.control.mode == "fault" and not world.arm.controlling


@pytest.mark.parametrize("name", ["tcp_pose", "tcp_vel", "wrench", "q", "dq"])
def test_a_state_that_is_not_finite(world, monkeypatch, name):
    """A fault that stops the controller, once, also while nothing better is read; recovering needs a good one."""
    reference = world.streaming()
    read = world.arm.get_state

    def garbled() -> ArmState:
        state = read()
        setattr(state, name, np.append(getattr(state, name)[:-1], math.nan))
        return state

    monkeypatch.setattr(world.arm, "get_state", garbled)
    stops = world.arm.began_stops
    world.tick(100)
    assert world.control.fault["message"] == "the robot's state is not finite" and world.control.mode == "fault"
    assert not world.arm.controlling and world.arm.began_stops == stops + 1
    assert np.allclose(world.reference, reference, atol=1e-3)
    assert np.isfinite(getattr(world.control.state, name)).all()
    handle = world.job("recover")
    world.tick(600)
    assert world.ask("job", handle=handle)["status"] == "failed" and world.control.mode == "fault"
    world.arm.get_state = read
    world.job("recover")
    world.tick(100)
    assert world.control.mode == "idle"


@pytest.mark.parametrize("job", ["move_joints", "start"])
def test_a_fault_amid_a_job_stays(world, job):
    world.ask("acquire", name="test")
    world.job(job, **({"q": [0.0, -0.3, 0.0, -2.0, 0.0, 2.0, 0.0]} if job == "move_joints" else {}))
    world.tick(1)
    world.control.latch("frozen", "for this test")
    world.tick(100)
    assert world.control.mode == "fault" and world.control.fault is not None and not world.arm.controlling


@pytest.mark.parametrize("error", [ArmError("reflex", "for this test"), ZeroDivisionError("for this test")])
def test_a_job_that_meets_an_error_ends_with_a_fault(world, error):
    world.ask("acquire", name="test", ttl=10.0)
    handle = world.job("move_joints", q=[0.0, -0.3, 0.0, -2.0, 0.0, 2.0, 0.0])
    world.tick(5)
    world.arm.failing["moving"] = error
    world.tick(5)
    assert world.control.fault["code"] == getattr(error, "code", "internal") and not world.arm.moves
    assert world.ask("job", handle=handle)["status"] == "failed"


def test_a_controller_that_runs_although_nothing_should_is_stopped(world):
    world.arm.controlling = True
    world.tick()
    assert not world.arm.controlling and world.control.mode == "stopping"


def test_new_gains_are_set_once(world):
    world.streaming()
    world.ask("gains", stiffness=900.0)
    world.tick(3)
    assert world.arm.calls.count("set_gains") == 1 and world.control.gains.stiffness == 900.0


def test_a_state_that_cannot_be_told_is_a_fault(world, monkeypatch, caplog):
    """And the arm is stopped all the same; the bug stands in the log, once."""
    world.streaming()
    monkeypatch.setattr(world.control, "report", lambda: 1 / 0)
    world.tick(5)
    assert "while telling the state" in world.control.fault["message"] and not world.arm.controlling
    assert caplog.text.count("Traceback") == 1


def test_reflexes_are_counted(world):
    """A person's stop is none."""
    for mode, count in (("reflex", 1), ("user_stopped", 1), ("reflex", 2)):
        world.streaming()
        world.arm.mode = mode
        world.tick(3)
        assert world.control.fault["code"] == mode and world.ask("state")["reflexes"] == count
        world.arm.mode = "idle"
        world.job("recover")
        world.tick(5)


def test_a_bug_during_a_recovery_ends_it(world):
    """The fault stays, or there is one."""
    world.ask("acquire", name="test", ttl=10.0)
    world.job("recover")
    world.control.link.queue.append(b"\xff" * COMMAND.size)
    world.tick(20)
    assert world.control.fault["code"] == "internal" and world.control.mode == "fault"


def test_a_takeover_ends_the_job_of_the_other(world):
    world.ask("acquire", name="first", ttl=10.0)
    handle = world.job("move_joints", q=[0.0, -0.3, 0.0, -2.0, 0.0, 2.0, 0.0])
    world.tick(10)
    assert world.control.mode == "busy" and world.arm.busy > 0
    world.ask("acquire", TOKENS[1], name="second", takeover=True)
    world.tick(2)
    assert world.ask("job", handle=handle)["status"] == "failed" and world.arm.busy == 0


def test_a_lease_that_comes_again_moves_nothing(world):
    """Its holder let it go and takes it again at once: the old target is no target any more."""
    start = world.streaming()
    world.ask("target", pose=near(start, 0.0, 0.05, 0.0), seq=8)
    world.tick(2)
    world.ask("release")
    world.tick(2)
    assert world.control.mode == "hold"  # at once, also so soon after the SDK's start
    world.ask("acquire", name="test", ttl=10.0)
    world.tick(60)
    assert world.control.mode == "hold" and world.control.lease["seq"] is None
    world.ask("target", pose=near(world.reference, 0.0, 0.01, 0.0), seq=1)
    world.tick()
    assert world.control.mode == "streaming"


def test_only_another_closure_is_an_order(world):
    """Each would begin the fingers' way anew, and the time that they have for it."""
    start, orders = world.streaming(), []
    for closure in (1.0, 1.0, None, 1.0, 0.0):
        world.ask("target", pose=near(start, 0, 0, 0), closure=closure)
        orders.append(world.gripper.job)
    assert orders[0] and all(job is orders[0] for job in orders[:4]) and orders[4] is not orders[0]
    world.arm.info["task"], world.arm.reset_task = "a task", lambda seed: None
    for job in ("recover", "reset_task"):  # after which nobody knows how it stands
        world.job(job)
        world.tick(5)
        world.streaming()
        world.ask("target", pose=near(start, 0, 0, 0), closure=0.0)
        orders.append(world.gripper.job)
        assert orders[-1] is not orders[-2]


def test_the_reference_of_an_arm_that_is_led_by_hand_is_where_it_is(world):
    world.arm.pose[1] = 0.1
    world.tick()
    assert np.array_equal(world.front.status()["reply"]["reference"], world.arm.pose)


def test_the_end_of_the_program_waits_for_the_soft_stop(world):
    world.streaming()
    world.arm.rests, world.arm.waits = 20, False
    world.control.stopping.set()
    world.control.beat()
    assert not world.arm.controlling and world.arm.busy == 0 and world.control.mode == "idle"


def test_the_arm_rests_before_the_program_ends(monkeypatch):
    robot, ended, stopping = robot_server.Robot.__new__(robot_server.Robot), [], threading.Event()
    robot.control = threading.Thread(target=lambda: stopping.wait() and (time.sleep(0.2), ended.append("arm")))
    robot.control.stopping, robot.gripper = stopping, mock.Mock()
    robot.front = robot.spare = mock.Mock(**{"end.side_effect": lambda: ended.append("front")})
    monkeypatch.setattr(robot_server.signal, "alarm", lambda _: None)
    monkeypatch.setattr(robot_server.os, "_exit", ended.append)
    robot.control.start()
    robot.shut_down()
    assert ended == ["arm", "front", "front", 0]


def test_without_a_gripper_what_it_should_do_is_refused(world):
    start, world.control.gripper = world.streaming(), robot_server.NoGripper(world.args)
    for order in (
        lambda: world.job("gripper", action="close"),
        lambda: world.ask("target", pose=near(start, 0, 0, 0), closure=1.0),
    ):
        with pytest.raises(Refused) as refused:
            order()
        assert refused.value.code == "unavailable"


def test_a_start_outside_the_box_moves_nothing(world):
    world.arm.pose[:3] = 0.45, 0.0, -0.2
    start = world.streaming()
    world.tick(60)
    assert np.abs(world.reference - start).max() < 1e-6
    for _ in range(50):  # and then it goes as far as it is told
        world.ask("target", pose=near(start, 0.0, 0.02, -0.01))
        world.tick()
    assert world.reference[2] == pytest.approx(start[2]) and world.reference[1] == pytest.approx(0.02)
    for _ in range(150):
        world.ask("target", pose=near(start, 0.0, 0.0, 0.03))
        world.tick()
    assert world.reference[2] == pytest.approx(start[2] + 0.03, abs=1e-3)


def test_a_start_with_a_tilted_tool_turns_nothing(world):
    half = (world.args.max_tilt + 0.3) / 2
    world.arm.pose[3:] = math.cos(half), 0.0, 0.0, math.sin(half)
    start = world.streaming()
    world.tick(60)
    assert np.abs(world.reference - start).max() < 1e-6


def test_the_way_to_a_target(world):
    """Up to the largest speed, with no more than the largest acceleration, to rest at the target without overshoot."""
    world.arm.follows = 1.0
    args, start = world.args, world.streaming()
    goal, references, limited = near(start, 0.08, -0.06, 0.06), [start], []
    for _ in range(400):
        world.ask("target", pose=goal)
        world.tick()
        references.append(world.reference)
        limited.append(world.control.limiter.limited)
    positions = np.array(references)[:, :3]
    velocities = np.diff(positions, axis=0, prepend=positions[:1]) / DT
    speeds = np.linalg.norm(velocities, axis=1)
    assert 0.85 * args.max_speed < speeds.max() <= args.max_speed * 1.001
    assert np.linalg.norm(np.diff(velocities, axis=0), axis=1).max() <= args.max_acceleration * DT * 1.001
    distances = np.linalg.norm(positions - goal[:3], axis=1)
    assert distances[-1] < 1e-6 and (np.diff(distances) < 1e-9).all()
    assert "speed" in limited[0] and not limited[-1]


def test_the_turn_to_a_target():
    """As the way: up to the largest speed, with no more than the largest acceleration."""
    args, twists = robot_server.Args(), []
    limiter = robot_server.Limiter(args)
    limiter.seed(np.array([0.45, 0.0, 0.3, *DOWN]))
    goal = np.array([0.45, 0.0, 0.3, *robot_server.quat_multiply(robot_server.quat_from_rotvec([0, 0, 0.7]), DOWN)])
    for _ in range(400):
        new = limiter.advance(goal, DT)
        twists.append(robot_server.difference(new, limiter.reference)[3:] / DT)
        limiter.reference = new
    speeds = np.linalg.norm(twists, axis=1)
    assert 0.85 * args.max_rotation_speed < speeds.max() <= args.max_rotation_speed * 1.001
    changes = np.linalg.norm(np.diff(twists, axis=0, prepend=0), axis=1)
    assert changes.max() <= args.max_rotation_acceleration * DT * 1.001
    assert np.abs(robot_server.difference(goal, new)).max() < 1e-6


@pytest.mark.parametrize(
    ("speed", "spin", "brake"), [(0, 0, 1), (0.9, 0, 1), (1, 0, 0.5), (0, 1, 0.5), (1.1, 0, 0), (0, 1.2, 0)]
)
def test_how_far_the_reference_may_lead(speed, spin, brake):
    """The clip per axis, in all what the damper holds at the largest speed, less where the arm moves as fast; and after
    that the reference does not go on faster than it came."""
    args, zero = robot_server.Args(), np.zeros(7)
    pose = np.array([0.45, 0.0, 0.3, *DOWN])
    twist = np.array([speed * args.max_speed, 0, 0, 0, 0, spin * args.max_rotation_speed])
    state = ArmState(0.0, pose, twist, zero[:6], zero, zero)
    limiter = robot_server.Limiter(args)
    limiter.seed(pose)
    turned = robot_server.quat_multiply(robot_server.quat_from_rotvec([0.1, 0.1, 0.1]), DOWN)
    far = np.array([0.47, 0.02, 0.32, *turned])
    for clip in (0.01, 0.001):
        gains = robot_server.Gains(clip=(clip,) * 3, rotational_clip=(5 * clip,) * 3)
        lead = robot_server.difference(limiter.keep_near(far, state, gains, DT), pose)
        held = 0.9 * brake * args.max_speed * gains.damping / gains.stiffness
        held_turn = 0.9 * brake * args.max_rotation_speed * gains.rotational_damping / gains.rotational_stiffness
        assert np.linalg.norm(lead[:3]) == pytest.approx(min(held, clip * 3**0.5), abs=1e-9)
        assert np.linalg.norm(lead[3:]) == pytest.approx(min(held_turn, 5 * clip * 3**0.5), abs=1e-9)
        assert np.allclose(limiter.velocity, 0) and limiter.limited
    limiter.velocity[:] = 0.1
    limiter.keep_near(far, replace(state, tcp_pose=far), gains, DT)
    assert np.allclose(limiter.velocity, 0.1)  # not clipped
    limiter.reference = limiter.keep_near(far, state, gains, DT)
    limiter.keep_near(far, state, gains, DT)
    assert np.allclose(limiter.velocity, 0)  # it stands


@pytest.mark.parametrize("seed", range(3))
def test_the_acceleration_is_limited_also_at_walls(seed):
    """Whatever targets come, and when: turned aside just before a wall, told to stand."""
    args, choose = robot_server.Args(), random.Random(seed)
    limiter = robot_server.Limiter(args)
    limiter.seed(np.array([0.45, 0.0, 0.3, *DOWN]))
    target, before = None, np.zeros(3)
    for _ in range(8000):
        old = limiter.reference
        if choose.random() < 0.03:
            offset = [choose.uniform(-0.14, 0.14) for _ in range(3)]
            target = None if choose.random() < 0.1 else np.array([*(old[:3] + offset), *DOWN])
        new = limiter.advance(target, DT)
        velocity = (new - old)[:3] / DT
        assert np.linalg.norm(velocity - before) / DT <= 1.2 * args.max_acceleration, limiter.limited
        assert limiter.outside(new) < 1e-9
        limiter.reference, limiter.limited, before = new, [], velocity


def test_a_target_that_is_no_pose_moves_nothing():
    """It would have been refused before; and a measured rotation is one only to some digits."""
    limiter = robot_server.Limiter(robot_server.Args())
    for value in (math.nan, math.inf):
        limiter.seed(np.array([0.45, 0.0, 0.3, *DOWN]))
        assert np.array_equal(limiter.advance(np.full(7, value), DT), limiter.reference)
    zero = np.zeros(7)
    state = ArmState(0.0, np.array([0.45, 0.0, 0.3, *1.001 * DOWN]), zero[:6], zero[:6], zero, zero)
    limiter.seed(state.tcp_pose)
    limiter.step(None, state, robot_server.Gains(), DT)
    assert np.linalg.norm(limiter.reference[3:]) == pytest.approx(1, abs=1e-12)


def tilted(args: robot_server.Args, direction: float, roll: float) -> np.ndarray:
    """(4,) the largest tilt, in this direction, turned about the tool's axis."""
    tilt = args.max_tilt * np.array([np.cos(direction), np.sin(direction), 0])
    turned = robot_server.quat_multiply(robot_server.quat_from_rotvec(tilt), DOWN)
    return robot_server.quat_multiply(turned, robot_server.quat_from_rotvec(np.array([0, 0, roll])))


def test_turns_from_largest_tilt_to_largest_tilt_arrive():
    """The straight way may lead over the cone of what is allowed: then along it."""
    args, choose = robot_server.Args(), random.Random(1)
    limiter = robot_server.Limiter(args)
    for _ in range(40):
        start, goal = (tilted(args, choose.uniform(-3, 3), choose.uniform(-3, 3)) for _ in range(2))
        if not 0.2 < np.linalg.norm(robot_server.rotation_between(goal, start)) < args.max_rotation_jump:
            continue
        limiter.seed(np.array([0.45, 0.0, 0.3, *start]))
        for _ in range(2000):
            limiter.reference = limiter.advance(np.array([0.45, 0.0, 0.3, *goal]), DT)
            assert robot_server.tilt(limiter.reference[3:]) <= args.max_tilt + 1e-6
        assert np.linalg.norm(robot_server.rotation_between(goal, limiter.reference[3:])) < 1e-3


def test_a_tool_that_points_straight_up_is_turned_back_too():
    """Any axis will do."""
    limiter = robot_server.Limiter(robot_server.Args())
    assert robot_server.tilt(limiter.upright(np.array([0.0, 0.0, 0.0, 1.0]), 0.8)) == pytest.approx(0.8)
    assert limiter.limited == ["tilt"]


@pytest.mark.parametrize("asked", [["hold"], ["stop"], ["hold", "stop"], ["stop", "hold"], ["stop", "stop"]])
def test_a_hold_among_targets_is_not_lost(world, asked):
    """All in one tick, from two clients; a stop counts more than a hold."""
    start = world.streaming()
    for op in asked:
        world.ask("target", pose=near(start, 0.0, 0.0, 0.0))
        world.ask(op, TOKENS[1])
        world.ask("target", pose=near(start, 0.0, 0.0, 0.0))
    world.tick(5)
    assert world.control.mode == ("idle" if "stop" in asked else "hold")
    assert world.arm.calls.count("stop") <= 2  # the one of `start`, and one soft stop
    with pytest.raises(Refused) as refused:
        world.ask("target", pose=near(start, 0.0, 0.0, 0.0))
    assert refused.value.code == ("not_streaming" if "stop" in asked else "held")
    assert str(refused.value).startswith("a client asked to")  # so that a program asks a person before it goes on
    world.job("start")
    world.tick(5)
    assert world.control.mode == "streaming" and world.control.held == ""


@pytest.mark.parametrize(("token", "who"), [(TOKENS[0], "test"), (TOKENS[1], "a client")])
@pytest.mark.parametrize("asked", ["hold", "stop"])
@pytest.mark.parametrize("streams", [True, False])
def test_who_asked_to_hold_is_told_until_the_next_job(world, asked, token, who, streams):
    """Also when nothing moves, and after the watchdog has stopped an arm that was held."""
    world.streaming()
    if not streams:
        world.tick(600)
        assert world.control.mode == "idle" and world.control.held == ""
    world.ask(asked, token)
    world.tick(600)
    world.ask("state")
    assert world.control.mode == "idle"
    assert world.front.newest["reply"]["held"] == f"{who} asked to {asked}"
    world.job("start")
    world.tick(5)
    world.ask("state")
    assert world.front.newest["reply"]["held"] is None


def test_who_asked_to_hold_is_told_beside_a_fault(world):
    world.streaming()
    world.ask("hold", TOKENS[1])
    world.tick(3)
    world.control.note_fault("frozen", "for this test")
    world.tick(3)
    assert world.control.held == "a client asked to hold"


@pytest.mark.parametrize("tokens", [TOKENS[:2], TOKENS[1::-1]])
def test_another_clients_word_is_not_hidden_by_the_commanders(world, tokens):
    """Both in one tick."""
    world.streaming()
    for token in tokens:
        world.ask("stop", token)
    world.tick(3)
    assert world.control.held == "a client asked to stop"


@pytest.mark.parametrize("what", ["stop", "fault"])
def test_what_came_during_a_long_call_of_the_sdk_is_heeded_before_the_arm_moves(world, what):
    """panda-py's stop lasts as long as the cable is out."""
    world.ask("acquire", name="test", ttl=10.0)
    stop = world.arm.stop

    def long_stop() -> None:
        stop()
        world.now += 1.0
        world.arm.stop = stop
        if what == "stop":
            world.ask("stop", TOKENS[1])
        else:
            world.control.note_fault("frozen", "for this test")

    world.arm.stop = long_stop
    job = world.job("move_joints", q=[0.0, -0.3, 0.0, -2.0, 0.0, 2.0, 0.0])
    world.tick(10)
    assert "move" not in world.arm.calls and world.ask("job", handle=job)["status"] == "failed"


@pytest.mark.parametrize("mode", ["reflex", "user_stopped"])
@pytest.mark.parametrize("asked", ["hold", "stop"])
def test_what_was_asked_during_a_fault_does_not_break_off_its_recovery(world, asked, mode):
    world.streaming()
    world.arm.mode = mode
    world.tick(3)
    world.control.note_fault("frozen", "the first one stays")
    assert world.control.fault["code"] == mode
    world.ask(asked)
    world.tick(500)
    job = world.job("recover")
    world.tick(20)
    assert world.ask("job", handle=job)["status"] == "done" and world.control.fault is None


@pytest.mark.parametrize("why", ["it reports user_stopped", "a client asked to stop"])
def test_a_recovery_that_fails_leaves_the_fault(world, monkeypatch, why):
    """The robot does not recover, or somebody stops it before it is at rest."""
    world.streaming()
    world.arm.mode = "user_stopped"
    world.tick(3)
    if "stop" in why.split():
        world.arm.stop = lambda: setattr(world.arm, "busy", 20)
    else:
        monkeypatch.setattr(world.arm, "recover", lambda: None)
    handle = world.job("recover")
    world.tick(10)
    if "stop" in why.split():
        world.ask("stop", TOKENS[1])
    world.tick(600)
    assert why in world.ask("job", handle=handle)["error"]
    assert world.control.fault["code"] == "user_stopped" and world.control.faults == 1


def test_a_lease_that_is_renewed_during_a_long_call_of_the_sdk_does_not_end(world, monkeypatch):
    """The front's queue is full after 1.7 s of beats; what it says then is heard too late."""
    world.streaming()
    world.arm.mode = "reflex"
    world.tick(3)
    recover = world.arm.recover

    def slow_recover() -> None:
        beats_until = world.now + 1.0
        while world.now < beats_until:
            world.now += 0.01
            world.front.link.other.queue.append(
                robot_server.Command("state", world.front.number, world.now + 1.0).pack()
            )
        world.now += 3.0  # nothing more fits into the queue
        recover()

    monkeypatch.setattr(world.arm, "recover", slow_recover)
    job = world.job("recover")
    world.tick(1)
    world.front.lease_until = world.now + 1.0  # the client renewed it all the time
    for _ in range(20):
        world.tick()
        world.front.send("state", world.front.lease_until)
    assert world.ask("job", handle=job)["status"] == "done" and world.control.fault is None


@pytest.mark.parametrize("seconds", [0.01, 1.5])
def test_a_lease_that_ended_before_a_call_of_the_sdk_has_ended(world, monkeypatch, seconds):
    world.streaming()
    monkeypatch.setattr(world.arm, "set_gains", lambda gains: setattr(world, "now", world.now + seconds))
    world.ask("gains", stiffness=900.0)
    world.ask("release")
    world.tick(2)
    assert world.control.mode == "hold"


def test_nothing_is_accepted_that_will_not_be_heard(world, monkeypatch):
    """The robot thread has been in its SDK for so long that its queue is full: a stop is refused, not lost."""
    world.streaming()

    def full(_: bytes) -> None:
        raise BlockingIOError

    monkeypatch.setattr(world.front.link, "send", full)
    number = world.front.number
    for op, args in (("stop", {}), ("hold", {}), ("gains", {"stiffness": 900.0}), ("release", {})):
        with pytest.raises(Refused, match="the robot's SDK takes its time") as refused:
            world.ask(op, **args)
        assert refused.value.code == "busy"
    with pytest.raises(Refused, match="takes its time"):
        world.ask("target", pose=near(world.reference, 0, 0, 0))
    with pytest.raises(Refused, match="takes its time"):
        world.ask("acquire", TOKENS[1], name="another", ttl=1.0, takeover=True)
    assert world.front.holder() == "test" and world.front.number == number


# --- Rotations --------------------------------------------------------------------------------------------------------
def same_rotation(quaternion: np.ndarray, rotation: Rotation) -> None:
    assert (Rotation.from_quat(quaternion) * rotation.inv()).magnitude() < 1e-7
    assert np.linalg.norm(quaternion) == pytest.approx(1)


def test_quaternions_agree_with_scipy():
    quaternions = Rotation.random(50, random_state=1).as_quat()
    for a, b in zip(quaternions, quaternions[::-1]):
        same_rotation(robot_server.quat_multiply(a, b), Rotation.from_quat(a) * Rotation.from_quat(b))
        turn = Rotation.from_rotvec(robot_server.rotation_between(a, b))
        same_rotation(a, turn * Rotation.from_quat(b))


def test_quaternions_of_matrices_agree_with_scipy():
    """A tool that points down is turned by half a turn: w is 0."""
    for quaternion in (*np.eye(4), *Rotation.random(50, random_state=1).as_quat()):
        rotation = Rotation.from_quat(quaternion)
        same_rotation(robot_server.quat_from_matrix(rotation.as_matrix()), rotation)


@pytest.mark.parametrize("angle", [0.0, 1e-13, 1e-6, 1.0, np.pi - 1e-6, np.pi])
def test_rotation_vectors_of_all_sizes(angle):
    rotvec = angle * np.array([0.36, 0.48, 0.8])
    quaternion = robot_server.quat_from_rotvec(rotvec)
    np.testing.assert_allclose(quaternion, Rotation.from_rotvec(rotvec).as_quat(), atol=1e-15)
    for sign in (1, -1):
        found = robot_server.rotation_between(sign * quaternion, np.array([0, 0, 0, 1.0]))
        np.testing.assert_allclose(found, rotvec if angle < np.pi or sign > 0 else found, atol=1e-12)


# --- What may follow what ---------------------------------------------------------------------------------------------
def in_mode(world: World, mode: str) -> None:
    if mode in ("streaming", "hold", "held", "stopping"):
        world.streaming()
        world.arm.rests = 20
    else:
        world.ask("acquire", name="test", ttl=10.0, takeover=True)
    if mode == "hold":
        world.tick(80)
    elif mode in ("held", "stopping"):
        world.ask("hold" if mode == "held" else "stop")
        world.tick()
    elif mode == "busy":
        world.job("move_joints", q=[0.0, -0.3, 0.0, -2.0, 0.0, 2.0, 0.0])
        world.tick()
    elif mode == "fault":
        world.control.latch("sdk", "for this test")
        world.tick(3)
    assert world.control.step == mode


def test_nothing_moves_the_arm_amid_a_job_or_before_a_fault_is_recovered():
    """And no target ends a person's hold."""
    refused = {
        op: {mode: code for mode, code in zip(robot_server.MODES, codes) if code}
        for op, codes in robot_server.FOLLOWS.items()
    }
    moves = {"busy": "busy", "fault": "fault"}
    stands = {"idle": "not_streaming", "held": "held", "stopping": "not_streaming"}
    assert refused.pop("target") == moves | stands and refused.pop("recover") == {"busy": "busy"}
    assert refused == dict.fromkeys(["start", "move_joints", "reset", "reset_task"], moves)


@pytest.mark.parametrize("mode", robot_server.MODES)
@pytest.mark.parametrize("op", robot_server.FOLLOWS)
def test_what_may_follow_what(world, op, mode):
    """As the table says, and what may be done ends well; both processes look at the table."""
    in_mode(world, mode)
    code = robot_server.FOLLOWS[op][robot_server.MODES.index(mode)]
    q = {"q": [0.0, -0.3, 0.0, -2.0, 0.0, 2.0, 0.0]}
    if op == "reset_task":
        world.arm.info["task"] = "a task"
        world.arm.reset_task = lambda seed: None
    args = {"target": {"pose": near(world.reference, 0, 0, 0)}, "move_joints": q}.get(op, {})
    if code:
        with pytest.raises(Refused) as refused:
            (world.ask if op == "target" else world.job)(op, **args)
        assert refused.value.code == code
        handle = {} if op == "target" else {"handle": "straight-to-it"}
        values = robot_server.to_numbers(op, robot_server.checked(op, args | handle))
        world.control.link.queue.append(Command(op, 99, world.now + 1, values, "straight-to-it", "").pack())
        world.control.listen(world.now)
        assert world.control.answer["code"] == code
        return
    if op == "target":
        assert world.ask(op, **args) and world.control.target is not None
        return
    handle = world.job(op, **args)
    for _ in range(30):
        world.tick(10)
        world.ask("state")  # keeps the lease
    assert world.ask("job", handle=handle)["status"] == "done"
    assert world.control.fault is None and world.control.mode in ("idle", "hold")


def test_start_waits_for_the_soft_stop(world):
    """Two stops are one, and a start amid it comes after its end."""
    world.streaming()
    world.arm.rests = 30
    world.ask("stop")
    world.tick(3)
    world.ask("stop")
    world.tick(3)
    assert world.control.mode == "stopping"
    handle = world.job("start")
    world.tick(5)
    assert world.ask("job", handle=handle)["status"] == "running" and not world.arm.controlling
    world.tick(30)
    assert world.ask("job", handle=handle)["status"] == "done" and world.control.mode == "streaming"
    assert world.arm.began_stops == 2  # that of the first start, with nothing to stop, and one


def test_start_forgets_the_target_of_before(world):
    start = world.streaming()
    world.ask("target", pose=near(start, 0.0, 0.1, 0.0))
    world.tick(20)
    world.job("start")
    world.tick(2)
    begins = world.arm.pose.copy()
    world.tick(20)
    assert world.control.mode == "streaming" and np.abs(world.reference - begins).max() < 1e-6


def test_an_arm_that_does_not_come_to_rest(world):
    world.streaming()
    world.arm.rests = 100_000
    handle = world.job("start")
    world.tick(700)
    assert world.ask("job", handle=handle)["status"] == "running"
    world.tick(100)
    job = world.ask("job", handle=handle)
    assert job["status"] == "failed" and "does not come to rest" in job["error"]
    assert world.control.fault["code"] == "sdk"


def test_the_controller_of_a_joint_motion_is_ended(world):
    world.ask("acquire", name="test", ttl=10.0)
    handle = world.job("move_joints", q=[0.0, -0.3, 0.0, -2.0, 0.0, 2.0, 0.0])
    world.tick(80)
    assert world.ask("job", handle=handle)["status"] == "done"
    assert [call for call in world.arm.calls if call in ("move", "stop")] == ["stop", "move", "stop"]


def test_a_call_that_blocks_is_no_frozen_robot(world, monkeypatch):
    """Two seconds in the SDK's start, while the robot's clock goes on."""
    world.ask("acquire", name="test", ttl=10.0, takeover=True)
    start = world.arm.start

    def slow_start(*values) -> None:
        assert world.control.may_block_until >= world.now + 2
        seen = world.front.status()
        assert seen["overdue"] >= world.now + 2 and seen["step"] == "busy"
        world.now += 1.9
        world.arm.clock += 1.9
        start(*values)

    monkeypatch.setattr(world.arm, "start", slow_start)
    handle = world.job("start")
    world.tick(5)
    assert world.ask("job", handle=handle)["status"] == "done"
    assert world.control.mode == "streaming" and world.control.fault is None


# --- Jobs -------------------------------------------------------------------------------------------------------------
def test_what_goes_on_is_never_forgotten(world):
    world.ask("acquire", name="test", ttl=10.0)
    goal = {"q": [0.0, -0.3, 0.0, -2.0, 0.0, 2.0, 0.0]}
    world.ask("move_joints", handle="first-one", **goal)
    world.tick(2)
    world.arm.busy = 10_000
    for number in range(600):
        world.ask("gripper", handle=f"gripper-{number}", action="open")
        world.gripper.job.finish("superseded by a newer one")
    assert len(world.control.jobs) <= 257
    world.tick(2)
    status = world.front.status()
    jobs = status["reply"]["jobs"]
    assert jobs["arm"]["handle"] == "first-one" and jobs["gripper"]["handle"] == "gripper-599"
    assert world.ask("job", handle="first-one")["status"] == "running"
    assert world.ask("move_joints", handle="first-one", **goal)["status"] == "running"  # not busy, not again
    world.ask("stop")
    world.tick(3)
    calls = world.arm.calls.count("move")
    assert world.ask("move_joints", handle="first-one", **goal)["status"] == "failed"
    world.tick(3)
    assert world.arm.calls.count("move") == calls and world.control.mode == "idle"


def test_a_handle_belongs_to_one_operation(world):
    world.ask("acquire", name="test", ttl=10.0)
    world.ask("start", handle="only-once")
    for op, args in {"reset": {}, "gripper": {"action": "close"}, "recover": {}}.items():
        with pytest.raises(Refused) as refused:
            world.ask(op, handle="only-once", **args)
        assert refused.value.code == "handle_used" and "start" in str(refused.value)


# --- Front ------------------------------------------------------------------------------------------------------------
def test_another_front_goes_on_with_the_lease(world):
    start = world.streaming()
    world.ask("target", pose=near(start, 0, 0.01, 0), seq=7)
    world.tick(2)
    world.front = world.new_front()
    assert world.front.holder() == "test"
    with pytest.raises(Refused) as refused:
        world.ask("target", pose=near(start, 0, 0.01, 0), seq=7)
    assert refused.value.code == "stale"
    world.ask("target", pose=near(start, 0, 0.01, 0), seq=8)
    world.tick(2)
    assert world.control.mode == "streaming"


def test_a_lease_that_is_renewed_keeps_count_of_its_targets(world):
    start = world.streaming()
    world.ask("target", pose=near(start, 0, 0, 0), seq=7)
    world.ask("acquire", name="test", ttl=10.0)
    with pytest.raises(Refused) as refused:
        world.ask("target", pose=near(start, 0, 0.01, 0), seq=7)
    assert refused.value.code == "stale"


def test_gains_that_may_still_be_refused_are_not_answered_as_set(world, monkeypatch):
    """The robot thread is in its SDK, and looks at them only later; a stop is heard then, in any case."""
    world.streaming()
    world.front.link.then = lambda: None
    monkeypatch.setattr(robot_server.select, "select", lambda *given: setattr(world, "now", world.now + given[-1]))
    with pytest.raises(Refused, match="the robot's SDK takes its time") as refused:
        world.ask("gains", stiffness=900.0)
    assert refused.value.code == "busy" and world.ask("stop") == {}


def test_who_ends_the_watchdogs_hold_is_told_so(world, monkeypatch):
    start = world.streaming()
    world.tick(80)
    assert world.control.mode == "hold"
    world.front.link.then = lambda: None
    monkeypatch.setattr(robot_server.select, "select", lambda *_: world.tick())
    world.ask("target", pose=near(start, 0, 0, 0))
    assert world.front.newest["reply"]["mode"] == "streaming"


def test_a_front_that_falls_silent(world):
    """Killed, stopped: hold, then the soft stop; no lease lives for ever."""
    start = world.streaming()
    world.ask("target", pose=near(start, 0, 0.1, 0))
    for _ in range(700):
        before, mode = world.reference, world.control.mode
        world.tick()
        if mode == "idle":
            break
        silent = world.now - world.control.target_at
        assert world.control.mode == "streaming" or silent > 0.3
        assert world.control.mode in ("streaming", "hold") or silent > 2.0
        assert np.linalg.norm(world.reference - before) <= world.args.max_speed * DT * 1.05
    assert mode == "idle" and world.now - world.control.target_at < 2.1
    assert world.reference[1] - start[1] < 0.08


@pytest.mark.parametrize("data", [b"", b"x", b"\xff" * COMMAND.size, bytes(COMMAND.size)])
def test_the_robot_thread_survives_a_mad_front(world, data):
    """What is no command is not heard, as from one that has ended; an operation that there is not is a fault."""
    world.streaming()
    world.control.link.queue.append(data)
    world.tick(3)
    assert world.control.mode == ("fault" if data[:1] == b"\xff" else "streaming")


def test_nothing_that_the_front_says_is_believed(world):
    """Straight to the robot thread, past the front's checks."""
    start = world.streaming()
    bad = [math.nan] * 12, [math.inf] * 12, [1e308] * 12, [0.0] * 12, [-1.0] * 12
    for kind in ("target", "gains", "start", "move_joints"):
        for values in bad:
            command = Command(kind, 5, math.inf, values, f"bad-{kind}-{values[0]}", "x")
            world.control.link.queue.append(command.pack())
            world.control.listen(world.now)
            assert world.control.answer["code"] in ("refused", "bad_argument", "busy"), (kind, values)
    assert world.control.lease_until <= world.now + 10
    world.tick(3)
    assert np.linalg.norm(world.reference - start) < 1e-3 and world.control.fault is None


def test_a_command_after_years():
    """The front's beat alone counts 100 in a second."""
    command = Command("state", 2**40, 1.0, (0.0,) * 12)
    assert Command.unpack(command.pack()) == command


def test_the_newest_state_is_read(world):
    """Over a real line: nobody reads for long, which never makes the robot thread wait; then the newest is there."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (ours, theirs):
        end.setblocking(False)
    with ours, theirs:
        world.control.link = ours
        world.front.link = theirs
        began = time.perf_counter()
        world.tick(2000)
        assert time.perf_counter() - began < 20
        assert world.front.status()["ticked"] < world.now  # what had room
        world.tick()
        assert world.front.status()["ticked"] == world.now
        assert world.front.status() is world.front.status()
        ours.close()
        world.front.status()
        assert world.front.alone  # the robot process has ended
        world.tick(3)
        assert world.control.fault is None


def test_a_robot_thread_that_hangs_in_the_sdk(world):
    """The main thread latches the fault and tells the front, but for a call that may take long."""
    robot = robot_server.Robot.__new__(robot_server.Robot)
    robot.control, robot.stale, robot.seen = world.control, 0.0, 0.0
    world.streaming()

    def passes(seconds: float) -> dict | None:
        for _ in range(round(100 * seconds)):
            world.now += 0.01
            robot.watch_control(0.01)
        return world.front.status()["reply"]["fault"]

    world.control.may_block_until = world.now + 1.005
    assert passes(1.04) is None
    assert passes(0.04)["code"] == "frozen" and world.control.fault["code"] == "frozen"
    world.tick()
    assert not world.arm.controlling


def test_a_robot_thread_that_stands_still(world):
    """Nobody gets an ok for a target whom it does not reach; who looks is answered, and sees how old the state is."""
    start = world.streaming()
    world.ask("target", pose=near(start, 0, 0.01, 0))
    world.tick()
    world.front.link.then = lambda: None
    world.now += world.args.frozen_after_s + 0.001
    with pytest.raises(Refused) as refused:
        world.ask("target", pose=near(start, 0, 0.01, 0))
    assert refused.value.code == "frozen"
    assert world.ask("state")["q"] and world.now - world.front.status()["at"] > world.args.frozen_after_s
    world.arm.clock += world.args.frozen_after_s  # the robot itself had gone on
    world.tick()
    assert world.ask("target", pose=near(start, 0, 0.01, 0)) and world.control.fault is None


@pytest.mark.parametrize("wrench", [(0, 0, 20, 0, 0, 0), (9, -9, 9, 0, 0, 0)])
def test_the_force_guard(monkeypatch, caplog, wrench):
    """It is about the force's length; torques do not count."""
    world = World(monkeypatch, max_force=15.0)
    start = world.streaming()
    world.arm.wrench[:] = 8, -8, 8, 20, 0, 0
    world.tick(2)
    assert world.control.mode == "streaming"
    world.arm.wrench[:] = wrench
    world.tick(50)
    assert world.control.mode == "hold" and sum("max-force" in r.getMessage() for r in caplog.records) <= 2
    with pytest.raises(Refused) as refused:
        world.ask("target", pose=near(start, 0, 0.01, 0))
    assert refused.value.code == "held" and "15" in str(refused.value)


def test_there_is_no_force_guard_unless_asked_for(world):
    world.streaming()
    world.arm.wrench[:] = 0, 0, 50, 0, 0, 0
    world.tick(2)
    assert world.control.mode == "streaming"


def test_the_force_guard_ends_a_joint_motion(monkeypatch):
    world = World(monkeypatch, max_force=15.0)
    world.ask("acquire", name="test", ttl=10.0)
    job = world.job("move_joints", q=[0.0, -0.3, 0.0, -2.0, 0.0, 2.0, 0.0])
    world.tick(5)
    assert world.arm.moves
    world.arm.wrench[:] = 0, 0, 20, 0, 0, 0
    world.tick(3)
    failed = world.ask("job", handle=job)
    assert failed["status"] == "failed" and "exceeded --max-force 15" in failed["error"]
    assert not world.arm.moves and world.control.mode == "idle" and world.control.fault is None


@pytest.mark.parametrize("side", [-1, 1])
def test_an_arm_that_leaves_the_workspace_holds(world, side):
    """Weak gains that its rotation overcomes, a joint at its limit, a push: whatever the reference says. It may come
    in, but not go out by a little more with every start."""
    edge = (world.args.workspace_low, world.args.workspace_high)[side > 0][1]
    start = world.streaming()
    world.arm.pose[1] = edge + side * 0.015
    world.tick(2)
    assert world.control.mode == "streaming"
    world.arm.follows = 0.0
    world.arm.pose[1] = edge + side * 0.025
    world.tick(2)
    assert world.control.mode == "hold" and world.reference[1] == pytest.approx(edge + side * 0.025)
    with pytest.raises(Refused, match="left --workspace-low") as refused:
        world.ask("target", pose=near(start, 0, 0.01, 0))
    assert refused.value.code == "held"
    world.streaming()
    world.arm.pose[1] = edge + side * 0.022
    world.tick(2)
    assert world.control.mode == "streaming"
    world.arm.pose[1] = edge + side * 0.032
    world.tick(2)
    assert world.control.mode == "hold"
    world.arm.pose[1] = edge + side * 0.1  # by hand, before a person recovers
    world.job("recover")
    world.tick(5)
    world.streaming()
    world.arm.pose[1] = edge + side * 0.115
    world.tick(2)
    assert world.control.mode == "streaming"


def test_wall_clock_jumps_do_not_matter(world, monkeypatch):
    start = world.streaming()
    monkeypatch.setattr(robot_server.time, "time", lambda: 0.0)
    world.ask("target", pose=near(start, 0, 0.01, 0))
    world.tick(20)
    assert world.control.mode == "streaming" and world.control.fault is None


@pytest.mark.parametrize("jump", [0.04, -5.0])
def test_a_clock_of_the_robot_that_jumps(world, monkeypatch, jump):
    """What was late is not caught up with; a robot that was started again counts anew."""
    world.arm.follows = 1.0
    start = world.streaming()
    for _ in range(60):
        world.ask("target", pose=near(start, 0, 0.14, 0))
        world.tick()
    before, step, passed = world.reference, world.control.limiter.step, []
    monkeypatch.setattr(world.control.limiter, "step", lambda *given: passed.append(given[-1]) or step(*given))
    world.arm.clock += jump
    world.now += max(jump, 0.0)
    world.tick()
    assert passed == [0.02 if jump > 0 else 0.0]
    assert np.linalg.norm(world.reference - before) < 1.01 * 0.02 * world.args.max_speed
    world.tick(20)
    assert world.control.fault is None and np.linalg.norm(world.reference - before) > 0.01


def test_a_pause_of_the_machine(world):
    """A second in which nothing ran: hold, and no catching up."""
    start = world.streaming()
    world.ask("target", pose=near(start, 0, 0.1, 0))
    world.tick(10)
    before = world.reference
    world.now += 1.0
    world.arm.clock += 1.0
    world.tick(2)
    assert world.control.mode == "hold" and np.linalg.norm(world.reference - before) < 0.01


# --- Random sequences -------------------------------------------------------------------------------------------------
def some_pose(choose: random.Random, reference: np.ndarray) -> list[float]:
    kind = choose.random()
    if kind < 0.05:
        return [choose.choice([math.nan, math.inf, -math.inf, 1e300, 0.0, 1.0]) for _ in range(7)]
    far = choose.choice([0.005, 0.05, 0.14, 0.3])
    offset = [choose.uniform(-far, far) for _ in range(3)]
    turn = [choose.gauss(0, choose.choice([0.0, 0.1, 0.4])) for _ in range(3)]
    quaternion = robot_server.quat_multiply(robot_server.quat_from_rotvec(turn), reference[3:])
    quaternion = quaternion * choose.choice([1, 1, -1])
    return [*(reference[:3] + offset).tolist(), *quaternion.tolist()]


def some_request(choose: random.Random, world: World) -> tuple[str, dict]:
    """An operation and its arguments; about half of them targets."""
    gains = {"stiffness": choose.choice([100.0, 2000.0, 3000.0, 1e9]), "damping": choose.choice([20.0, 89.0, 200.0])}
    gains |= {"clip": [choose.choice([0.002, 0.01, 0.05, 1.0]) for _ in range(3)]}
    joints = {"q": [0.0, -0.26, 0.0, -2.43, 0.0, 2.17, choose.uniform(-3, 3)], "speed": choose.choice([0.2, 1.0])}
    requests = [("target", {"pose": some_pose(choose, world.reference)})] * 12
    requests += [
        ("acquire", {"name": "x", "ttl": choose.choice([0.2, 1.0, 10.0]), "takeover": choose.random() < 0.5})
    ] * 4
    requests += [("start", {}), ("start", gains), ("start", {}), ("gains", gains), ("gains", {"stiffness": 500.0})]
    requests += [("hold", {}), ("stop", {}), ("recover", {}), ("recover", {}), ("move_joints", joints), ("release", {})]
    return choose.choice(requests)


def disturb(choose: random.Random, world: World) -> None:
    """Something that the robot or the machine does."""
    arm = world.arm
    kind = choose.randrange(7)
    if kind == 0:
        arm.pose[:3] += [choose.uniform(-0.03, 0.03) for _ in range(3)]
    elif kind == 1:
        arm.frozen = choose.choice([5, 30, 400])
    elif kind == 2:
        call = choose.choice(["get_state", "stream", "start", "stop", "moving", "recover", "set_gains", "move"])
        errors = [ArmError("reflex", "x"), ArmError("sdk", "x"), ArmError("refused", "x"), ZeroDivisionError("x")]
        arm.failing[call] = choose.choice(errors)
    elif kind == 3:
        arm.mode = choose.choice(["reflex", "user_stopped", "idle"])
        arm.controlling = arm.controlling and arm.mode == "idle"
    elif kind == 4:
        world.now += choose.choice([0.02, 0.06, 0.4, 3.0])
    elif kind == 5:
        world.control.note_fault("frozen", "the main thread says so")
    else:
        arm.wrench[:3] = [choose.uniform(-30, 30) for _ in range(3)]


class Watcher:
    """Looks at every tick; an AssertionError names what does not hold."""

    def __init__(self, world: World):
        self.world, self.fault, self.latched, self.accepted = world, None, False, -math.inf
        self.recovering = False

    def before(self) -> None:
        world, control = self.world, self.world.control
        self.old, self.measured, self.clock = world.reference, world.arm.pose.copy(), world.arm.clock
        self.mode, self.held = control.mode, control.held
        self.speed = float(np.linalg.norm(control.limiter.velocity[:3]))
        self.recovering = control.job is not None and control.job.op == "recover"
        world.arm.calls.clear()

    def after(self) -> None:
        world, control, args = self.world, self.world.control, self.world.args
        new, arm, now = world.reference, world.arm, world.now
        assert np.isfinite(new).all() and abs(np.linalg.norm(new[3:]) - 1) < 1e-9
        streamed = "stream" in arm.calls
        if self.fault is not None and control.fault is not self.fault:
            assert self.recovering, "a fault went away without recover"
        if control.fault is not None:
            assert control.mode == "fault", f"mode {control.mode} with a fault"
            assert "start" not in arm.calls or self.fault is None
            assert not streamed or self.fault is None, "a reference in spite of a fault"
        self.fault = control.fault
        if not streamed:
            return
        assert self.mode in ("streaming", "hold") or control.mode in ("streaming", "hold")
        dt, clipped = arm.clock - self.clock, "clip" in control.limiter.limited
        clip = np.array(control.gains.clip)
        assert (np.abs(new[:3] - arm.pose[:3]) <= clip + 1e-9).all(), "the reference is further away than the clip"
        turn = robot_server.rotation_between(new[3:], arm.pose[3:])
        assert (np.abs(turn) <= np.array(control.gains.rotational_clip) + 1e-9).all()
        step = float(np.linalg.norm(new[:3] - self.old[:3]))
        let_go = not self.held and "max-force" in control.held  # the guard moves the reference to where the arm is
        if not clipped and not let_go:
            assert step <= args.max_speed * max(dt, 0) * 1.05 + 1e-12, f"the reference moves by {step} in {dt}"
            spin = float(np.linalg.norm(robot_server.rotation_between(new[3:], self.old[3:])))
            assert spin <= args.max_rotation_speed * max(dt, 0) * 1.05 + 1e-9
            low, high = np.array(args.workspace_low), np.array(args.workspace_high)
            outside = np.maximum(low - new[:3], new[:3] - high).max()
            was = np.maximum(low - self.old[:3], self.old[:3] - high).max()
            assert outside <= max(was, 0) + 1e-9, "the reference leaves the box"
            if self.mode == "hold" and control.mode == "hold":  # it comes to rest, at the largest deceleration
                rest = max(self.speed - args.max_acceleration * max(dt, 0), 0.0)
                assert step <= rest * max(dt, 0) * 1.01 + 1e-12, f"in hold the reference moves by {step}"
        assert now - self.accepted <= args.stop_after_s + 1e-9, "no soft stop"
        if control.mode == "streaming":
            lease_until = max(control.lease_until, control.deaf_until)
            assert now <= lease_until + 1e-9 and now - self.accepted <= args.hold_after_s + 1e-9, "no watchdog"
            assert not self.latched, "streaming after a hold without a start"


def run(world: World, seed: int, ticks: int) -> dict[str, int]:
    """A random day at the robot; how often it was in each mode."""
    choose, watcher, modes = random.Random(seed), Watcher(world), {}
    holds: list[str] = []
    world.arm.follows = choose.choice([0.1, 0.3, 1.0])
    for _ in range(ticks):
        for _ in range(choose.choice([0, 0, 1, 1, 2])):
            op, args = some_request(choose, world)
            token = choose.choice(TOKENS)
            ask = world.job if op in ("start", "recover", "move_joints") else world.ask
            try:
                ask(op, token, **args)
            except Refused:  # any other exception would be a bug
                continue
            if op == "target":
                watcher.accepted = world.now
            if op == "hold" and world.control.mode in ("streaming", "hold") and world.control.job is None:
                holds.append(op)
            if op == "start":
                watcher.accepted, watcher.latched = world.now + 5.0, False  # it takes a few ticks
                holds.clear()
        if choose.random() < 0.02:
            disturb(choose, world)
        watcher.before()
        world.tick()
        if watcher.accepted > world.now and "start" in world.arm.calls:
            watcher.accepted = world.now
        watcher.after()
        if holds and world.control.mode in ("hold", "idle", "fault"):
            watcher.latched = world.control.mode == "hold"
            holds.clear()
        modes[world.control.mode] = modes.get(world.control.mode, 0) + 1
        if world.control.fault is not None and choose.random() < 0.02:
            world.arm.mode = "idle"  # someone looks after it
    return modes


@pytest.mark.parametrize("seed", range(8))
def test_random_sequences(monkeypatch, seed):
    world = World(monkeypatch, max_force=25.0 if seed % 2 else 0.0)
    modes = run(world, seed, 4000)
    assert modes["streaming"] > 50 and modes["fault"] > 100 and modes["hold"] > 25, modes


@pytest.mark.slow
def test_many_random_sequences(monkeypatch):
    for seed in range(100, 200):
        with monkeypatch.context() as patch:
            run(World(patch, max_force=25.0 if seed % 2 else 0.0), seed, 4000)
