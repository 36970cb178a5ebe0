"""What can go wrong between a policy and a robot: each case ends in hold or stop, with a reason, and nothing crashes.

The real SDKs drive mock_franka.py, the real Modbus driver mock_robotiq.py; the rest happens to the simulated arm.
"""

import contextlib
import importlib.util
import json
import math
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import msgpack
import numpy as np
import pytest
import zmq
from conftest import REPO, run_script, script_env, wait_until
from mock_franka import MockFranka
from mock_robotiq import MockRobotiq
from robot_wire import TOKEN, Wire, follow, fronts, moved, serving, watch

import robot_server
from robot_server import rotation_between

OTHER = "b" * 16
SDKS = {"franky": ("franky", 10), "panda-py": ("panda_py", 5)}  # --robot: module, protocol version


# --- The real SDKs ----------------------------------------------------------------------------------------------------
@pytest.fixture(params=SDKS)
def sdk(request):
    module, version = SDKS[request.param]
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"there is no wheel of {request.param} for this Python")
    return request.param, version


def real(address: str, name: str) -> tuple[str, ...]:
    return "--robot", name, "--robot-ip", address


@contextlib.contextmanager
def arm_on(folder: Path, sdk: tuple[str, int]):
    """A mock robot, and a client of a server that drives it through this SDK, without a gripper."""
    name, version = sdk
    with (
        MockFranka(version=version) as robot,
        serving(folder, *real(robot.address, name), "--gripper", "none") as process,
        Wire(process.requests) as wire,
    ):
        yield robot, wire


def test_sdk(tmp_path, sdk):
    """A day at the robot: connect, stream, change gains, a collision, recover, joints, gripper, a user stop."""
    name, version = sdk
    with (
        MockFranka(version=version, object_width=0.04) as robot,
        serving(tmp_path, *real(robot.address, name), "--gripper", "franka-hand") as process,
        Wire(process.requests) as wire,
    ):
        assert wire.hello["robot"]["kind"] == name and wire.hello["robot"]["firmware"] == version
        assert wire.hello["robot"]["libfranka"] and wire.hello["gripper"]["kind"] == "franka-hand"
        assert wire.state()["tcp_pose"] == pytest.approx(robot.ask("status")["pose"], abs=2e-3)
        assert wire.state()["robot_mode"] == "idle" and wire.refused("task") == "unavailable"

        start = wire.stream()
        assert wire.state()["mode"] == "streaming"
        wait_until(lambda: robot.ask("status")["motion"] == "torque", 5)
        robot.ask("forget")
        goal = moved(start, x=0.04, y=0.06)
        follow(wire, lambda t: goal, 1.5)
        wire.ask("gains", stiffness=1200.0, clip=[0.008] * 3)
        follow(wire, lambda t: goal, 0.5)
        seen = robot.ask("status")
        assert math.dist(seen["pose"][:3], goal[:3]) < 0.005
        assert seen["max_speed"] <= 1.05 * wire.hello["limits"]["max_speed"]
        assert wire.state()["tcp_pose"][:3] == pytest.approx(seen["pose"][:3], abs=2e-3)

        robot.ask("reflex")
        fault = wire.wait_for(mode="fault", timeout=3)["fault"]
        assert fault["code"] == "reflex" and "cartesian_reflex" in fault["message"] and fault["count"] == 1
        for _ in range(20):  # refused until someone recovers; nothing recovers by itself
            assert wire.refused("target", pose=goal) == "fault"
            time.sleep(0.02)
        assert wire.refused("start", handle="no-start") == "fault" and robot.ask("status")["mode"] == "reflex"
        assert wire.state()["robot_mode"] == "reflex" and wire.state()["errors"] == ["cartesian_reflex"]
        wire.done("recover")
        state = wire.wait_for(fault=None, mode="idle")
        assert math.dist(state["reference"][:3], state["tcp_pose"][:3]) < 1e-3 and state["reflexes"] == 1

        wire.done("start")
        assert wire.ask("target", pose=moved(wire.state()["reference"], y=-0.01))["mode"] == "streaming"
        wire.ask("stop")
        wire.wait_for(mode="idle", timeout=5)
        q = [value + 0.1 for value in robot.ask("status")["q"]]
        wire.done("move_joints", q=q, speed=0.5)
        assert np.abs(np.subtract(robot.ask("status")["q"], q)).max() < 0.02

        wire.done("gripper", action="open")
        assert wire.state()["gripper_width"] == pytest.approx(0.08, abs=0.002)
        wire.done("gripper", action="close")
        wait_until(lambda: wire.state()["gripper_holding"], 5)
        assert wire.state()["gripper_width"] == pytest.approx(0.04, abs=0.002)
        wire.done("gripper", action="move", width=0.06)

        wire.stream()
        robot.ask("user_stop")
        fault = wire.wait_for(mode="fault", timeout=3)["fault"]
        assert fault["code"] == "user_stopped"  # no next reset recovers by itself
        failed = wire.job("recover")
        assert failed["status"] == "failed" and failed["error"] and wire.state()["fault"] is not None
        robot.ask("release")
        wire.done("recover")
        wire.stream()
        process.send_signal(signal.SIGINT)
        assert process.wait(15) in (0, 130, -signal.SIGINT)
        assert "Traceback" not in process.stderr_path.read_text()
        assert robot.ask("status")["log"].count("AutomaticErrorRecovery") <= 4


def test_sdk_collision(tmp_path, sdk):
    """Someone pushes hard: the arm's reflex ends the motion, at the thresholds of the flags; the server says so."""
    with arm_on(tmp_path, sdk) as (robot, wire):
        start, args, limits = wire.stream(), robot_server.Args(), robot.ask("status")
        assert limits["torque_limit"] == [args.collision_torque] * 7
        assert limits["force_limit"] == [args.collision_force] * 6
        robot.ask("push", wrench=[0.0, 5.0, 0.0, 0.0, 0.0, 0.0], seconds=0.5)
        follow(wire, lambda t: start, 0.4)
        assert wire.state()["tcp_force"][1] == pytest.approx(5.0, abs=1.0) and wire.state()["fault"] is None
        robot.ask("push", wrench=[0.0, 300.0, 0.0, 0.0, 0.0, 0.0], seconds=1.0)
        assert wire.wait_for(mode="fault", timeout=5)["fault"]["code"] == "reflex"


@pytest.mark.parametrize("moves", ["streaming", "move_joints"])
def test_fr3_whose_safety_function_ends_a_motion(tmp_path, moves):
    """That is a person's doing: no motion that is done, and none that the next reset begins by itself."""
    pytest.importorskip("franky")
    with arm_on(tmp_path, ("franky", 10)) as (robot, wire):
        start = wire.stream()
        if moves == "streaming":
            follow(wire, lambda t: start, 0.3)
        else:
            q = wire.state()["q"]
            wire.ask("move_joints", handle="a-long-way", q=[q[0] + 1.0, *q[1:]], speed=0.1)
            wait_until(lambda: robot.ask("status")["motion"] == "joint_position", 5)
        robot.ask("safety")
        fault = wire.wait_for(mode="fault", timeout=3)["fault"]
        assert fault["code"] == "user_stopped" and "activated safety function" in fault["message"]
        if moves == "move_joints":
            assert wire.ask("job", handle="a-long-way")["result"]["status"] == "failed"
        wire.done("recover")
        wire.done("start")


@pytest.mark.parametrize(
    ("stiffness", "damping", "clip", "newton"), [(100.0, 20.0, 0.05, 3.0), (2000.0, 89.0, 0.01, 12.0)]
)
def test_sdk_new_gains_go_on_from_the_old_ones(tmp_path, sdk, stiffness, damping, clip, newton):
    """A small change, while somebody leans on the arm: it stays where it is."""
    with arm_on(tmp_path, sdk) as (robot, wire):
        wire.take()
        wire.done("start", stiffness=stiffness, damping=damping, clip=[clip] * 3)
        start = wire.state()["reference"]
        robot.ask("push", wrench=[0.0, -newton, 0.0, 0.0, 0.0, 0.0], seconds=30.0)
        follow(wire, lambda t: start, 3.0)
        before = robot.ask("status")["pose"][1]
        assert abs(before - start[1]) > 0.8 * newton / stiffness
        wire.ask("gains", stiffness=0.99 * stiffness)
        moves = []
        for _ in range(80):
            follow(wire, lambda t: start, 0.01)
            moves.append(abs(robot.ask("status")["pose"][1] - before))
        assert max(moves) < 0.002


def test_sdk_rotational_stiffness_is_what_it_says(tmp_path, sdk):
    with arm_on(tmp_path, sdk) as (robot, wire):
        start = wire.stream()
        follow(wire, lambda t: start, 0.5)
        before = robot.ask("status")["pose"][3:]
        robot.ask("push", wrench=[0.0, 0.0, 0.0, 0.0, 0.0, 3.0], seconds=30.0)
        follow(wire, lambda t: start, 2.5)
        turn = rotation_between(robot.ask("status")["pose"][3:], before)
        expected = 3.0 / wire.ask("gains")["result"]["rotational_stiffness"]
        assert np.linalg.norm(turn) == pytest.approx(expected, rel=0.15)


def test_sdk_arm_let_go(tmp_path, sdk):
    """Someone pulls the arm aside, below its reflex, and lets go: it returns within the speed, whatever the gains."""
    with arm_on(tmp_path, sdk) as (robot, wire):
        limits, start = wire.hello["limits"], wire.stream()
        for gains in ({}, {"stiffness": 3000.0, "damping": 60.0, "clip": [limits["max_clip"]] * 3}):
            reply = wire.call("gains", **gains)
            assert reply["ok"] or reply["error"]["code"] == "bad_argument"
            robot.ask("push", wrench=[0.0, 30.0, 0.0, 0.0, 0.0, 0.0], seconds=0.4)
            follow(wire, lambda t: start, 0.35)
            away = math.dist(wire.state()["tcp_pose"][:3], start[:3])
            time.sleep(0.12)
            robot.ask("forget")
            follow(wire, lambda t: start, 1.0)
            assert away > 0.005 and robot.ask("status")["max_speed"] <= 1.05 * limits["max_speed"]
            assert wire.state()["fault"] is None and math.dist(wire.state()["tcp_pose"][:3], start[:3]) < 0.01


def test_sdk_frozen_robot(tmp_path, sdk):
    """The robot falls silent while the connection stays open; panda-py alone would not notice."""
    with arm_on(tmp_path, sdk) as (robot, wire):
        start = wire.stream()
        follow(wire, lambda t: start, 0.3)
        robot.ask("freeze", seconds=2.0)
        frozen = time.monotonic()
        assert wire.wait_for(mode="fault", timeout=3)["fault"]["code"] in ("frozen", "sdk")
        assert time.monotonic() - frozen < 0.6
        assert wire.refused("target", pose=start) == "fault"
        assert wire.state()["state_age"] > 0.02  # it does not pretend that the old state is new
        time.sleep(max(frozen + 2.1 - time.monotonic(), 0))
        wire.take()
        wire.done("recover")
        wire.done("start")
        assert wire.ask("target", pose=wire.state()["reference"])["mode"] == "streaming"


def test_sdk_robot_without_power(tmp_path, sdk):
    """It is gone. The server stays, says so, and ends when asked to."""
    name, version = sdk
    with (
        MockFranka(version=version) as robot,
        serving(tmp_path, *real(robot.address, name), "--gripper", "none") as process,
        Wire(process.requests) as wire,
    ):
        start = wire.stream()
        follow(wire, lambda t: start, 0.3)
        robot.kill()
        fault = wire.wait_for(mode="fault", timeout=5)["fault"]
        assert fault["code"] in ("frozen", "sdk") and fault["message"]
        time.sleep(1.5)  # libfranka's own timeout comes after 1 s
        assert wire.state()["fault"]["code"] in ("frozen", "sdk") and process.poll() is None
        assert wire.refused("target", pose=start) in ("fault", "no_lease")
        wire.take()
        assert wire.job("recover", timeout=40)["status"] == "failed"
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) is not None
        assert "Traceback" not in process.stderr_path.read_text()


def test_a_franka_hand_that_was_away(sdk):
    """Its power was cut: activating it finds it again, also beside the arm, which has the robot's own connection."""
    name, version = sdk

    def do(action: str) -> str | None:
        job = robot_server.Job("handle-0", "gripper")
        hand.submit(job, action, None, 1.0, 0.5)
        wait_until(lambda: job.ended is not None, 20)
        return job.error

    with MockFranka(version=version) as robot:
        hand = robot_server.FrankaHand(robot_server.Args(robot=name, robot_ip=robot.address))
        hand.thread.start()
        assert do("open") is None
    wait_until(lambda: hand.state.fault, 10)
    assert do("close")
    with MockFranka(version=version, address=robot.address):
        arm = robot_server.ARMS[name](hand.args)
        assert do("activate") is None and arm.get_state()
        assert do("close") is None and hand.state.width == pytest.approx(0.0, abs=1e-3) and hand.state.fault is None
        hand.stopping.set()
        hand.thread.join(5)


def test_a_newer_order_does_not_wait_for_the_hand_to_arrive():
    """The SDK's call for the older one blocks until the fingers stand."""
    hand, stopped = robot_server.FrankaHand.__new__(robot_server.FrankaHand), threading.Event()
    hand.hand = SimpleNamespace(stop=stopped.set)
    hand.future = Future()
    hand.future.set_result(True)
    with ThreadPoolExecutor(1) as hand.pool:
        hand.begin(stopped.wait, 5.0)
        older = hand.future
        hand.begin(lambda: True)
        assert hand.future.result() and older.result() is True  # not False, as after 5 s


@pytest.mark.parametrize(("stiffness", "damping", "ratio"), [(400.0, 40.0, 1.0), (2500.0, 50.0, 0.5)])
def test_pandas_damping_ratio_is_that_of_the_translation(stiffness, damping, ratio):
    """Critical, at 1, is 2 sqrt(stiffness): too much of it is slow, too little swings."""
    arm = robot_server.PandaPyArm.__new__(robot_server.PandaPyArm)
    arm.controller = mock.Mock()
    arm.set_gains(robot_server.Gains(stiffness=stiffness, damping=damping))
    arm.controller.set_damping_ratio.assert_called_once_with(ratio)


def test_new_gains_of_an_fr3_begin_as_the_old_ones():
    """Also the damping, which a motion does not take as it is constructed: its control loop goes on from there."""
    arm = robot_server.FrankyArm.__new__(robot_server.FrankyArm)
    arm.franky, arm.robot, arm.errors = mock.MagicMock(ControlException=RuntimeError), mock.Mock(), (RuntimeError,)
    gains = arm.franky.CartesianImpedanceGains.isotropic
    gains.side_effect = lambda stiffness, _, damping, __: (stiffness, damping)
    motion = arm.franky.CartesianImpedanceTrackingMotion.return_value
    arm.robot.move = motion.move
    old, new = robot_server.Gains(damping=60.0), robot_server.Gains(stiffness=900.0, damping=50.0)
    arm.pose, arm.posture, arm.gains = np.zeros(7), np.zeros(7), old
    arm.set_gains(new)
    calls = [(call[0], call.args[0]) for call in motion.method_calls if call[0] in ("set_gains", "move")]
    assert calls == [("set_gains", (2000.0, 60.0)), ("move", motion), ("set_gains", (900.0, 50.0))]


def test_a_panda_gets_no_reference_that_is_not_finite():
    """panda-py would abort the process."""
    arm = robot_server.PandaPyArm.__new__(robot_server.PandaPyArm)
    arm.controller = mock.Mock()
    with pytest.raises(robot_server.ArmError, match="not finite"):
        arm.stream(np.full(7, math.nan))
    assert not arm.controller.set_control.called


def test_a_joint_motion_that_is_blocked_ends():
    """3 s after the arm should be there, while it stands far from it; until then it may be late."""
    q, goal = np.zeros(7), np.full(7, 0.5)
    panda = robot_server.PandaPyArm.__new__(robot_server.PandaPyArm)
    panda.motion, panda.controller = mock.Mock(**{"get_duration.return_value": 1.0}), mock.Mock()
    panda.goal, panda.began = goal, 5.0
    sim = robot_server.SimArm.__new__(robot_server.SimArm)
    sim.sim = SimpleNamespace(q=q, model=SimpleNamespace(qpos_spring=np.zeros(9)))
    sim.motion = q, goal, 5.0, 1.0
    for arm in (panda, sim):
        arm.time, arm.last = 8.9, SimpleNamespace(time=8.9, q=q)
        assert arm.moving()
        arm.time = arm.last.time = 9.1
        with pytest.raises(robot_server.ArmError, match="something is in its way") as blocked:
            arm.moving()
        assert blocked.value.code == "refused"


def test_the_simulated_arms_reflex(monkeypatch):
    """It stops what moves the arm; after a recovery what had caused it is forgotten. At rest there is none."""
    monkeypatch.setenv("MUJOCO_GL", os.environ.get("MUJOCO_GL", ""))  # which it changes
    arm = robot_server.SimArm(robot_server.Args(sim_speed=0.0))
    state = arm.get_state()
    for begin in (
        lambda: arm.start(state.tcp_pose, state.q, arm.args.gains),
        lambda: arm.move_to_joint_positions(state.q + 0.1, 0.2),
    ):
        arm.wrench[:] = 1000.0
        assert arm.get_state().robot_mode == "idle"
        begin()
        seen = arm.get_state()
        assert seen.robot_mode == "reflex" and "cartesian_reflex" in seen.errors[0]
        assert not arm.controlling and arm.motion is None
        arm.recover()
        begin()
        assert arm.get_state().robot_mode == "move"
        arm.stop()
        assert arm.get_state().robot_mode == "idle"


@pytest.mark.parametrize(("mode", "rate"), [("Move", 0.4), ("kIdle", 1.0), ("UserStopped", 1.0)])
def test_only_an_arm_that_moves_can_lose_commands(mode, rate):
    mode_of = SimpleNamespace(name=mode)
    state = SimpleNamespace(robot_mode=mode_of, current_errors=None, control_command_success_rate=0.4)
    name = {"Move": "move", "kIdle": "idle", "UserStopped": "user_stopped"}[mode]
    assert robot_server.health(state) == (name, (), rate)


def test_sdk_start_during_the_soft_stop(tmp_path, sdk):
    """The end of one episode and the beginning of the next: a stop, and at once a start, or a reset; two stops."""
    name, version = sdk
    with (
        MockFranka(version=version) as robot,
        serving(tmp_path, *real(robot.address, name), "--gripper", "none", "--frozen-after-s", 0.5) as process,
        Wire(process.requests) as wire,
    ):
        for op in ("start", "reset", "start", "reset"):
            start = wire.stream()
            follow(wire, lambda t, start=start: moved(start, y=0.05), 0.3)
            wire.ask("stop")
            time.sleep(0.01)
            wire.ask("stop")
            result = wire.done(op, **({"speed": 1.0} if op == "reset" else {}))
            assert result["error"] is None
            state = wire.state()
            assert state["fault"] is None and state["mode"] == ("streaming" if op == "start" else "idle")


def test_panda_that_takes_its_time_to_end_a_motion(tmp_path):
    """panda-py waits for that end, longer than a robot may be silent otherwise."""
    pytest.importorskip("panda_py")
    with (
        MockFranka(version=5, end_s=0.15) as robot,
        serving(tmp_path, *real(robot.address, "panda-py"), "--gripper", "none") as process,
        Wire(process.requests) as wire,
    ):
        wire.take()
        q = wire.state()["q"]
        wire.done("move_joints", q=[q[0] + 0.1, *q[1:]], speed=0.5)
        state = wire.state()
        assert state["mode"] == "idle" and state["fault"] is None
        wire.done("start")


def test_sdk_of_another_version(tmp_path, sdk):
    name, version = sdk
    with MockFranka(version=15 - version) as robot:
        flags = *real(robot.address, name), "--gripper", "none"
        result = run_script("robot_server.py", *flags, cwd=tmp_path, timeout=30, check=False)
    output = result.stdout + result.stderr
    assert result.returncode not in (0, None) and "Traceback" not in output
    assert "pip install" in output and "10" in output and "5" in output


def test_sdk_nobody_there(tmp_path, sdk):
    flags = *real("127.8.8.8", sdk[0]), "--gripper", "none"
    result = run_script("robot_server.py", *flags, cwd=tmp_path, timeout=60, check=False)
    assert result.returncode not in (0, None)
    assert "127.8.8.8" in result.stdout + result.stderr and "Traceback" not in result.stderr


def test_what_answers_is_no_robot(tmp_path):
    """A web server on the robot's port."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.77", 1337))
        listener.listen(8)
        asked: list[bytes] = []

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    peer, _ = listener.accept()
                    with peer:
                        asked.append(peer.recv(100))
                        peer.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")

        threading.Thread(target=serve, daemon=True).start()
        flags = "--robot", "franky", "--robot-ip", "127.0.0.77"
        doctor = run_script("robot_server.py", "--doctor", *flags, cwd=tmp_path, timeout=60, check=False)
        server = run_script("robot_server.py", *flags, "--port", 0, cwd=tmp_path, timeout=60, check=False)
        listener.shutdown(socket.SHUT_RDWR)
    assert "FAIL  robot at 127.0.0.77: what answers on port 1337 is no robot; " in doctor.stdout
    assert doctor.returncode == 1 and server.returncode == 1 and server.stderr.count("\n") == 1
    command, number, size, version, udp_port = struct.unpack("<IIIHH", asked[0])
    assert (command, size, version) == (0, 16, 0) and udp_port > 0  # 0 ends franky-sim


# --- Gripper over a serial line ---------------------------------------------------------------------------------------
def test_robotiq(tmp_path):
    port = tmp_path / "ttyUSB0"
    with (
        MockRobotiq(port, object_at=120) as gripper,
        serving(tmp_path, "--gripper", "robotiq", "--gripper-port", port) as process,
        Wire(process.requests) as wire,
    ):
        assert wire.hello["gripper"]["kind"] == "robotiq"
        assert wire.hello["gripper"]["max_width"] == pytest.approx(0.085, abs=0.001)
        wire.take()
        wire.done("gripper", action="activate")
        wire.done("gripper", action="open")
        assert gripper.position == 3 and gripper.writes[-1][3] <= 3  # all the way; SERL's 175 leaves it half closed
        assert wire.state()["gripper_width"] == pytest.approx(0.085, abs=0.003)
        wire.done("gripper", action="close", speed=1.0, force=0.5)
        assert gripper.writes[-1][4:] == [255, 128]
        assert gripper.position == 120 and wire.state()["gripper_holding"] is True
        assert wire.state()["gripper_width"] == pytest.approx(0.085 * (228 - 120) / 225, abs=0.002)
        wire.done("gripper", action="move", width=0.06)
        assert wire.state()["gripper_width"] == pytest.approx(0.06, abs=0.002)
        assert wire.state()["gripper_holding"] is False
        reads, start = gripper.reads, time.monotonic()
        time.sleep(1)
        assert (gripper.reads - reads) / (time.monotonic() - start) > 20  # 30 Hz, but for a busy machine

        stands = gripper.position
        gripper.silent = True
        wait_until(lambda: wire.state()["gripper_fault"], 10)
        assert wire.job("gripper", action="open")["status"] == "failed"
        assert wire.state()["mode"] == "idle" and wire.state()["fault"] is None  # the arm is well
        gripper.silent = False
        wait_until(lambda: not wire.state()["gripper_fault"], 10)
        time.sleep(0.5)
        assert gripper.position == pytest.approx(stands, abs=2)  # what has failed is not done later

        wire.stream()
        gripper.unplug()
        wait_until(lambda: wire.state()["gripper_fault"], 10)
        assert str(port) in wire.state()["gripper_fault"] or "serial" in wire.state()["gripper_fault"].lower()
        assert wire.job("gripper", action="close")["status"] == "failed"
        assert wire.refused("gripper", handle="x" * 8, action="fly") == "bad_argument"
        gripper.plug()
        wait_until(lambda: not wire.state()["gripper_fault"], 20)
        wire.done("gripper", action="move", width=0.07)
        assert process.poll() is None and "Traceback" not in process.stderr_path.read_text()


def test_robotiq_that_was_reset(tmp_path):
    """Its power fails for a moment: not activated any more, and a command says so instead of waiting for ever."""
    port = tmp_path / "ttyUSB0"
    with (
        MockRobotiq(port) as gripper,
        serving(tmp_path, "--gripper", "robotiq", "--gripper-port", port) as process,
        Wire(process.requests) as wire,
    ):
        wire.take()
        wire.done("gripper", action="activate")
        wire.done("gripper", action="open")
        gripper.power_up()
        writes = len(gripper.writes)
        result = wire.job("gripper", action="close", timeout=20)
        assert result["status"] == "failed" and "activat" in result["error"]
        assert len(gripper.writes) == writes  # it is told nothing that it might do once it is active
        wire.done("gripper", action="activate")
        wire.done("gripper", action="open")
        assert gripper.position == 3


def test_a_robotiq_that_answers_another_request(tmp_path, monkeypatch):
    """As when an answer comes after its time was out."""
    with MockRobotiq(tmp_path / "ttyUSB0") as gripper:
        robotiq = robot_server.Robotiq(robot_server.Args(gripper_port=str(tmp_path / "ttyUSB0")))
        monkeypatch.setattr(gripper, "reply", lambda frame: bytes([9, 16, 0x03, 0xE8, 0, 3]))
        with pytest.raises(robot_server.GripperError, match="refused on"):
            robotiq.poll()


def test_a_gripper_that_never_arrives(tmp_path):
    """Its job ends with an error in time, the arm streams on; the next order may go well."""
    port = tmp_path / "ttyUSB0"
    with (
        MockRobotiq(port) as gripper,
        serving(tmp_path, "--gripper", "robotiq", "--gripper-port", port) as process,
        Wire(process.requests) as wire,
    ):
        start = wire.stream()
        wire.done("gripper", action="activate")
        wire.done("gripper", action="open")
        wire.stream()
        gripper.stuck = True
        asked = time.monotonic()
        wire.ask("gripper", handle="never-there", action="close", speed=1.0)
        replies = follow(wire, lambda t: start, 5.5)
        assert {reply["mode"] for reply in replies} == {"streaming"}
        job = replies[-1]["jobs"]["gripper"]
        assert job["status"] == "failed" and "did not arrive" in job["error"] and 3 < job["seconds"] < 5
        assert gripper.writes[-1][0] == 1  # active, without "go to": it does not try for ever
        assert "did not arrive" in wire.state()["gripper_fault"] and time.monotonic() - asked < 20
        gripper.stuck = False
        wire.done("gripper", action="open")
        assert wire.state()["gripper_fault"] is None and process.poll() is None


# --- Clients and servers that die -------------------------------------------------------------------------------------
CLIENT = """
import math, sys
sys.path.insert(0, sys.argv[1])
from robot_wire import Wire, follow, moved
wire = Wire(sys.argv[2], token="c" * 16)
start = wire.stream()
wire.take(ttl=0.5)
print("streaming", flush=True)
follow(wire, lambda t: moved(start, y=0.07 * math.sin(4 * t)), 60)
"""


def test_client_killed(tmp_path):
    """In the middle of a motion: hold within 0.3 s, lease free, idle after 2 s, and the next one can begin."""
    with serving(tmp_path) as process, Wire(process.requests) as wire:
        command = [sys.executable, "-c", CLIENT, str(REPO / "tests"), process.requests]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client:
            assert client.stdout.readline() == "streaming\n"
            time.sleep(0.2)
            killed = wire.state()
            assert client.poll() is None
            client.kill()
        states = watch(process.states, 3.0)
        holds = [state for state in states if state["mode"] == "hold"]
        assert killed["mode"] == "streaming" and holds
        assert holds[0]["robot_time"] - killed["robot_time"] < 0.8
        assert states[-1]["mode"] == "idle" and states[-1]["lease"] is None and states[-1]["fault"] is None
        assert math.dist(states[-1]["result"]["tcp_pose"][:3], holds[-1]["reference"][:3]) < 0.01
        assert wire.stream()


def free_pair() -> int:
    """A port that is free, as the next one is; below those that the system gives to outgoing connections."""
    for port in range(20_000 + os.getpid() % 10_000, 32_000, 2):
        with contextlib.suppress(OSError), socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", port))
            two.bind(("127.0.0.1", port + 1))
            return port
    raise AssertionError("no free ports")


def test_server_killed_and_restarted(tmp_path):
    """The client's socket finds the new server; the old lease is worth nothing there."""
    port = free_pair()
    with serving(tmp_path, "--port", port) as process, Wire(process.requests, timeout=0.5) as wire:
        start = wire.stream()
        wire.ask("target", pose=start, seq=1)
        first, children = wire.state()["server_id"], fronts(process.pid)
        process.kill()
        process.wait()
        wait_until(lambda: not any(Path(f"/proc/{pid}/fd/0").exists() for pid in children), 20)
        with pytest.raises(TimeoutError):
            wire.ask("state")
        with serving(tmp_path, "--port", port):
            wire.timeout = 20
            assert wire.state()["server_id"] != first
            assert wire.refused("target", pose=start, seq=2) == "no_lease"
            assert wire.state()["mode"] == "idle" and wire.state()["lease"] is None
            wire.stream()


def test_server_stopped_for_a_while(tmp_path):
    """A laptop lid, a debugger: the process stands still for a second amid a motion. The arm must not leap after it."""
    with serving(tmp_path) as process, Wire(process.requests) as wire:
        start = wire.stream()
        limits = wire.hello["limits"]
        follow(wire, lambda t: moved(start, y=0.1), 0.3)
        before = wire.state()
        process.send_signal(signal.SIGSTOP)
        time.sleep(1.2)
        process.send_signal(signal.SIGCONT)
        states = watch(process.states, 1.0)
        assert states[-1]["mode"] in ("hold", "fault", "idle")
        assert math.dist(states[-1]["reference"][:3], before["reference"][:3]) < 0.06
        speeds = [np.linalg.norm(state["result"]["tcp_vel"][:3]) for state in states]
        assert max(speeds) <= 1.05 * limits["max_speed"]
        assert wire.state()["mode"] != "streaming"


NETWORK = """
import json, subprocess, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from robot_wire import Wire, follow, moved, serving
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
with serving(Path(sys.argv[2]), "--log-file", "server.log") as process, Wire(process.requests) as wire:
    start = wire.stream()
    wire.take(ttl=0.5)
    follow(wire, lambda t: moved(start, y=0.14), 0.2)
    before = wire.state()
    subprocess.run(["ip", "link", "set", "lo", "down"], check=True)
    time.sleep(1.0)
    wire.timeout = 0.3
    try:
        wire.ask("state")
        reached = True
    except TimeoutError:
        reached = False
    time.sleep(2.0)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    for attempt in range(60):
        try:
            after = wire.state()
            break
        except TimeoutError:
            pass
    wire.timeout = 20
    refused = wire.refused("target", pose=start)
    wire.stream()
    print(json.dumps({"before": before, "reached": reached, "after": after, "refused": refused}))
"""


def test_network_cut(tmp_path):
    """The cable is pulled amid a motion, in a network of its own, and put back: the arm held, then stopped."""
    enter = ["unshare", "--map-root-user", "--net"]
    if not (shutil.which("unshare") and shutil.which("ip")) or subprocess.run([*enter, "true"]).returncode:
        pytest.skip("network namespaces are not allowed here")
    command = [*enter, sys.executable, "-c", NETWORK, str(REPO / "tests"), str(tmp_path)]
    environment = script_env(tmp_path)
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    seen = json.loads(result.stdout.splitlines()[-1])
    before, after = seen["before"], seen["after"]
    assert not seen["reached"] and seen["refused"] == "no_lease"
    assert before["mode"] == "streaming" and after["mode"] == "idle" and after["lease"] is None
    assert after["server_id"] == before["server_id"] and after["fault"] is None
    assert math.dist(after["tcp_pose"][:3], before["reference"][:3]) < 0.12  # 0.3 s on, and it stood
    assert "hold" in (tmp_path / "server.log").read_text()


def test_client_is_stopped_for_a_while(tmp_path):
    """A client whose connection stalls, and all of whose targets then arrive at once, late."""
    with serving(tmp_path) as process, Wire(process.requests) as wire:
        start = wire.stream()
        with zmq.Context.instance().socket(zmq.DEALER) as dealer:
            dealer.setsockopt(zmq.LINGER, 0)
            dealer.connect(process.requests)
            for number in range(500):
                target = {"pose": moved(start, y=0.0003 * number), "seq": number + 1}
                dealer.send_multipart(
                    [b"", msgpack.packb({"v": 2, "op": "target", "id": number, "token": TOKEN, "args": target})]
                )
            limit = wire.hello["limits"]["max_speed"]
            states = watch(process.states, 1.0)
        assert max(np.linalg.norm(state["result"]["tcp_vel"][:3]) for state in states) <= 1.05 * limit
        wire.wait_for(mode="idle", timeout=10)


# --- Two commanders ---------------------------------------------------------------------------------------------------
def test_two_commanders(tmp_path):
    """Two that take the lease from each other all the time: never are targets of both accepted in turn without a
    takeover between them, and the arm stays within its limits."""
    with serving(tmp_path) as process, Wire(process.requests) as wire:
        start = wire.stream()
        limits = wire.hello["limits"]
        log: list[tuple[str, str, bool]] = []
        lock, end = threading.Lock(), time.monotonic() + 3

        def commander(token: str, side: float, seed: int) -> None:
            choose = random.Random(seed)
            with Wire(process.requests, token=token) as mine:
                while time.monotonic() < end:
                    with lock:  # so that the log's order is the server's
                        if choose.random() < 0.1:
                            mine.ask("acquire", name=token[:4], token=token, takeover=True)
                            log.append((token, "acquire", True))
                        else:
                            reference = mine.call("state")["reference"]
                            reply = mine.call("target", pose=moved(reference, y=side))
                            log.append((token, "target", reply["ok"]))
                            assert reply["ok"] or reply["error"]["code"] in ("no_lease", "not_streaming", "held")
                    time.sleep(0.001)

        threads = [
            threading.Thread(target=commander, args=("d" * 16, 0.04, 1)),
            threading.Thread(target=commander, args=("e" * 16, -0.04, 2)),
        ]
        for thread in threads:
            thread.start()
        states = watch(process.states, 3.0)
        for thread in threads:
            thread.join()
        holder = None
        for token, what, accepted in log:
            holder = token if what == "acquire" else holder
            assert not accepted or token == holder
        assert sum(accepted for *_, accepted in log) > 10
        assert max(np.linalg.norm(state["result"]["tcp_vel"][:3]) for state in states) <= 1.05 * limits["max_speed"]
        assert math.dist(wire.state()["tcp_pose"][:3], start[:3]) < 0.4
