"""Serves one robot arm and its gripper over ZeroMQ: a simulated Franka, or with --robot franky or panda-py a real one.

    python robot_server.py                                              # needs Ctrl-C to end; simulated, in real time
    python robot_server.py --doctor                                     # is this machine ready? One line per check
    python robot_server.py --robot franky --robot-ip 172.16.0.2 --gripper robotiq   # needs an FR3 and a gripper
    python robot_server.py --robot panda-py --robot-ip 172.16.0.2       # needs a Panda
    python robot_server.py --keygen --keys keys                         # needs a folder that is not there yet
    python robot_server.py --bind 0.0.0.0 --keys keys                   # needs these keys on the client's machine too

Nothing that a client sends is trusted: commands are refused or limited here, in the thread that talks to the robot. A
client that falls silent means hold, then stop. Faults stay until a person has looked and a client sends `recover`.

Units are m, rad, s, N, Nm; poses are x, y, z and a quaternion x, y, z, w, in the frame of the robot's base; the tcp is
libfranka's end effector frame. Requests go to port 5600 (ROUTER), the state is published on the next one (PUB).

A request is one frame, a msgpack map {v: 1, op, id, token, args: {...}}, of at most 64 KiB, 64 entries per map or list,
256 bytes per text, text keys, no binary data. Frames before an empty one are the sender's envelope and come back, so
that REQ with REQ_RELAXED and REQ_CORRELATE works. The reply is a msgpack map, followed by the raw frames of `frames`:
    v, id, op, ok; error: {code, message} or None; result: map or None; and always, of the last control tick:
    server_id (new at every start), server_time (s), robot_time (s), state_age (s), mode, reference (7; the pose that
    is commanded after all limits, the measured one when idle), lease (its holder's name or None), seq (the last
    accepted), fault: {code, message, count} or None
Every 10 ms the same map as of `state` is published in a single frame; subscribe to b"" with CONFLATE.

modes       idle: no controller runs, the robot holds itself; streaming; hold: the controller runs, the reference
            stands; busy: a job moves the arm, or it comes to rest; fault: latched until `recover`
error codes malformed version unknown_op bad_argument: the request; no_lease lease_taken; fault held not_streaming busy:
            the server's mode; refused: by the limiter, with the reason; stale; unavailable; unknown_handle; internal

operation (L: needs the lease's token, J: a job, see below)
hello {}    -> protocol, server_id, server, robot, gripper, cameras, limits, watchdog, gains, reset_joints
state {}    -> tcp_pose (7), tcp_vel (6), tcp_force (3), tcp_torque (3): of the surroundings on the tcp, in base axes;
            q (7), dq (7), gripper_width, gripper_moving, gripper_holding, gripper_fault (text or None), robot_mode
            (idle move guiding reflex user_stopped automatic_error_recovery other), errors (texts), success_rate,
            overruns (control ticks over 5 ms late), reflexes (since the start), limited (limits that act: box tilt
            speed clip)
acquire {name, token, ttl=1, takeover=False} -> ttl. The client makes up the token (16 to 64 characters); the same one
            again renews the lease, as any request with the token does. Without any for `ttl` s: hold, no lease.
release {}  L; the arm holds, and after 2 s stops.
target {pose, seq=None}  L, streaming or in the watchdog's hold -> as state. A seq must be above this lease's last one.
gains {stiffness, damping, rotational_stiffness, rotational_damping, clip (3), rotational_clip (3),
            nullspace_stiffness}  L, any of them -> all. Force is at most stiffness x clip, speed that over damping.
hold {}     from anyone: reference stands, a job is broken off; targets are refused until `start`
stop {}     from anyone: soft stop, then idle
start {handle, any gains}  L J: streaming, from the measured pose
move_joints {handle, q (7), speed=0.2}  L J: speed is a fraction of the joints' limits; idle after it
reset {handle, speed=0.2}  L J: move_joints to --reset-joints
recover {handle}  L J: ends fault and reflex, re-seeds the reference at the measured pose; idle after it
gripper {handle, action: open close move activate stop, width (for move), speed=1.0, force=0.5}  L J: speed and force
            are fractions; beside arm jobs; a newer one supersedes
job {handle} -> handle, op, status: queued running done failed, error (text or None), seconds
frames {cameras=all} -> arrays: [{name, shape, dtype, seq, robot_time, age}], one raw frame each. Simulated robot only.
task {}     -> env_id, success, observation, expert: {pose (7), close}, where the task's scripted expert goes next.
            Simulated robot only.
reset_task {handle, seed=None}  L J: the task's reset, arm included. Simulated robot only.
A job's handle is made up by the client (8 to 64 characters). The same handle again does not start anything again but
answers as `job` does: so every request but `target` with a seq may be repeated. An arm's job ends when the lease does.

Expect: p50_ms <= 0.3, p99_ms <= 2 (real-time priority) [benchmarks/results/robot_round_trip.csv contender=ours]
Expect: cpu_percent_of_a_core <= 25, server_mb <= 300 [benchmarks/results/robot_load.csv contender=ours]

Sources: watchdog, limits and leases answer what SERL's server lacks (serl_robot_infra/robot_servers/franka_server.py,
commit cd5f7e7: no deadline, no limit, errors cleared before every pose); impedance and gains are SERL's.
"""

import contextlib
import functools
import importlib.metadata
import inspect
import logging
import logging.handlers
import math
import os
import platform
import queue
import re
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

import msgpack
import numpy as np
import tyro
import zmq
import zmq.auth
from zmq.auth.thread import ThreadAuthenticator

PROTOCOL_VERSION = 1
log = logging.getLogger("robot_server")


# --- Args -------------------------------------------------------------------------------------------------------------
@dataclass
class Gains:
    """Of the Cartesian impedance controller; the defaults are SERL's."""

    stiffness: float = 2000.0
    """N/m"""
    damping: float = 89.0
    """Ns/m"""
    rotational_stiffness: float = 150.0
    """Nm/rad"""
    rotational_damping: float = 7.0
    """Nms/rad"""
    clip: tuple[float, float, float] = (0.01, 0.01, 0.01)
    """largest distance of the reference from the measured position, per base axis, m; force <= stiffness x clip"""
    rotational_clip: tuple[float, float, float] = (0.05, 0.05, 0.05)
    """the same for the rotation vector between them, rad"""
    nullspace_stiffness: float = 10.0
    """Nm/rad towards the posture in which the controller started"""


@dataclass
class Args:
    # robot
    robot: Literal["sim", "franky", "panda-py"] = "sim"
    """arm: simulated, FR3 (or any Franka whose franky wheel is installed), Panda"""
    robot_ip: str = "172.16.0.2"
    """address of the robot's control cabinet"""
    gripper: Literal["auto", "sim", "franka-hand", "robotiq", "none"] = "auto"
    """auto: the simulated one with --robot sim, otherwise the Franka Hand"""
    gripper_port: str = "/dev/ttyUSB0"
    """serial port of the Robotiq 2F-85"""
    reset_joints: tuple[float, float, float, float, float, float, float] = (0.0, -0.26, 0.0, -2.43, 0.0, 2.17, 0.7854)
    """joint positions of `reset`, rad"""  # TASK: where your episodes start
    gains: Gains = field(default_factory=Gains)
    """gains until a client changes them"""
    collision_torque: float = 40.0
    """external torque in a joint at which the robot's own reflex stops it, Nm"""
    collision_force: float = 60.0
    """external force at which the robot's own reflex stops it, N; also of the simulated one"""
    # simulation
    env_id: str = "FrankaPickCube-v0"
    """task of franka_sim whose scene is served"""
    sim_speed: float = 1.0
    """simulated time per real time; 0: as fast as it can"""
    seed: int = 0
    """seed of the first scene"""
    cameras: tuple[str, ...] = ("front", "wrist")
    """cameras of the scene that are served"""
    image_size: int = 128
    """height and width of their images, pixels"""
    # limits, whatever a client asks for
    workspace_low: tuple[float, float, float] = (0.2, -0.35, 0.012)  # TASK: the box in which the tcp may move
    """smallest x, y, z of the reference, m"""
    workspace_high: tuple[float, float, float] = (0.65, 0.35, 0.5)
    """largest x, y, z of the reference, m"""
    max_tilt: float = 0.8
    """largest angle between the tool's z axis and straight down, rad"""
    max_speed: float = 0.25
    """m/s"""
    max_acceleration: float = 2.0
    """m/s2"""
    max_rotation_speed: float = 1.2
    """rad/s"""
    max_rotation_acceleration: float = 8.0
    """rad/s2"""
    max_jump: float = 0.15
    """a target further from the reference than this is refused, m"""
    max_rotation_jump: float = 0.8
    """the same, rad"""
    max_force: float = 0.0
    """hold when the external force exceeds this, N (0: no guard; the robot's own reflex stays)"""
    max_stiffness: float = 3000.0
    """largest stiffness that a client may set, N/m; the rotational one: a tenth of it, Nm/rad"""
    max_clip: float = 0.05
    """largest clip that a client may set, m; the rotational one: ten times as many rad"""
    hold_after_s: float = 0.3
    """streaming without a target for this long: hold"""
    stop_after_s: float = 2.0
    """without a target for this long: soft stop"""
    frozen_after_s: float = 0.05
    """the robot's clock stands still for this long: fault"""
    control_hz: float = 250.0
    """rate at which the state is read and the reference is limited"""
    # server
    bind: str = "127.0.0.1"
    """address to listen on; other than loop-back needs keys or insecure_lan"""
    port: int = 5600
    """port for requests, the state is published on the next one; 0: any two that are free"""
    keys: str | None = None
    """directory with CURVE keys; clients need server.key, client.key and client.key_secret from it"""
    keygen: bool = False
    """make these keys and end"""
    insecure_lan: bool = False
    """listen on a network without encryption and authentication"""
    log_file: str = "robot_server.log"
    """events are appended here"""
    doctor: bool = False
    """check this machine and the way to the robot, and end"""


def fail(message: str) -> NoReturn:
    """Ends the program with one line on stderr and exit code 1."""
    raise SystemExit(f"{Path(sys.argv[0]).name}: {message}")


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def check(args: Args) -> None:
    """Exits with one line when a flag makes no sense, or a network would be served without protection."""
    signed = ("reset_joints", "workspace_low", "workspace_high")
    for name, value in (vars(args) | {f"gains.{name}": value for name, value in vars(args.gains).items()}).items():
        if type(value) in (int, float, tuple) and name != "cameras":
            if not np.isfinite(value).all() or (np.min(value) < 0 and name not in signed):
                fail(f"{flag(name)} {value}: give finite numbers{'' if name in signed else ', not negative ones'}")
            if name.startswith("max_") and name != "max_force" and not value:
                fail(f"{flag(name)} 0: nothing could move")
    local = args.bind in ("127.0.0.1", "localhost", "::1")
    for wrong, message in (
        (not np.less(args.workspace_low, args.workspace_high).all(), "--workspace-low: must be below --workspace-high"),
        (not 200 <= args.control_hz <= 1000, f"--control-hz {args.control_hz}: give 200 to 1000"),
        (not args.frozen_after_s, "--frozen-after-s 0: give a time"),
        (not 0 < args.hold_after_s <= args.stop_after_s, "--hold-after-s: more than 0, at most --stop-after-s"),
        (0 < args.sim_speed < 0.1, f"--sim-speed {args.sim_speed}: give 0 (as fast as it can) or at least 0.1"),
        (not 8 <= args.image_size <= 1280, f"--image-size {args.image_size}: give 8 to 1280 pixels"),
        (args.port > 65534, f"--port {args.port}: give at most 65534"),
        (args.gripper == "sim" and args.robot != "sim", "--gripper sim: only with --robot sim"),
        (args.gripper == "franka-hand" and args.robot == "sim", "--gripper franka-hand: not with --robot sim"),
        (not within_joint_limits(np.array(args.reset_joints)), f"--reset-joints: {JOINT_LIMITS_TEXT}"),
        (args.keygen and not args.keys, "--keygen: name the folder to make, --keys DIR"),
        (
            not (local or args.keys or args.insecure_lan),
            f"--bind {args.bind}: a network needs --keys DIR (make them with --keygen), or --insecure-lan",
        ),
    ):
        if wrong:
            fail(message)
    try:
        check_gains(asdict(args.gains), args)
    except Refused as error:
        fail(f"--gains: {error}")


# What a Panda and an FR3 can both reach, rad (robot_specifications.html of frankarobotics.github.io/docs)
MIN_JOINTS = np.array([-2.7437, -1.7628, -2.8973, -3.0421, -2.8065, 0.5445, -2.8973])
MAX_JOINTS = np.array([2.7437, 1.7628, 2.8973, -0.1518, 2.8065, 3.7525, 2.8973])
JOINT_LIMITS_TEXT = f"give joint positions from {MIN_JOINTS.tolist()} to {MAX_JOINTS.tolist()} rad"


def within_joint_limits(q: np.ndarray) -> bool:
    return bool(((q > MIN_JOINTS) & (q < MAX_JOINTS)).all())


class Refused(Exception):  # noqa: N818
    """A request that is not carried out: error code, and what to tell the client."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


def check_gains(gains: dict[str, Any], args: Args) -> None:
    """Raises Refused for gains beyond the limits, too weakly or strongly damped, or with which a spring that is let go
    outruns the limiter: it reaches stiffness x clip / damping."""
    problem = ""
    for prefix, most, most_clip, fastest in (
        ("", args.max_stiffness, args.max_clip, args.max_speed),
        ("rotational_", args.max_stiffness / 10, args.max_clip * 10, args.max_rotation_speed),
    ):
        stiffness, damping, clip = (gains[prefix + name] for name in ("stiffness", "damping", "clip"))
        low, high = 0.5 * math.sqrt(max(stiffness, 0)), 4 * math.sqrt(max(stiffness, 0))  # a quarter of critical, twice
        if not 0 < stiffness <= most:
            problem = f"stiffness {stiffness:g}: give more than 0, at most {most:g}"
        elif not low <= damping <= high:
            problem = f"damping {damping:g}: give {low:.1f} to {high:.1f} with this stiffness"
        elif not all(0 < c <= min(most_clip, fastest * damping / stiffness) for c in clip):
            limit = math.floor(1e4 * min(most_clip, fastest * damping / stiffness)) / 1e4
            problem = f"clip {clip}: more than 0, at most {limit:g} with this stiffness and damping"
        if problem:
            raise Refused("bad_argument", prefix + problem)
    if not 0 <= gains["nullspace_stiffness"] <= 50:
        raise Refused("bad_argument", f"nullspace_stiffness {gains['nullspace_stiffness']}: give 0 to 50")


# --- Reference limiter ------------------------------------------------------------------------------------------------
def quat_multiply(a: Sequence[float], b: Sequence[float]) -> np.ndarray:
    """(4,) rotation b, then a; x, y, z, w."""
    (ax, ay, az, aw), (bx, by, bz, bw) = map(float, a), map(float, b)
    return np.array(
        [
            aw * bx + ax * bw + ay * bz - az * by,
            aw * by - ax * bz + ay * bw + az * bx,
            aw * bz + ax * by - ay * bx + az * bw,
            aw * bw - ax * bx - ay * by - az * bz,
        ]
    )


def quat_from_rotvec(rotvec: Sequence[float]) -> np.ndarray:
    x, y, z = map(float, rotvec)
    angle = math.sqrt(x * x + y * y + z * z)
    scale = 0.5 if angle < 1e-8 else math.sin(angle / 2) / angle
    return np.array([x * scale, y * scale, z * scale, math.cos(angle / 2)])


def rotation_between(a: Sequence[float], b: Sequence[float]) -> np.ndarray:
    """(3,) rotation vector in base axes that turns quaternion b into a, the short way round, rad."""
    x, y, z, w = quat_multiply(a, (-b[0], -b[1], -b[2], b[3])).tolist()
    if w < 0:
        x, y, z, w = -x, -y, -z, -w
    sin = math.sqrt(x * x + y * y + z * z)
    scale = 2.0 if sin < 1e-8 else 2 * math.atan2(sin, w) / sin
    return np.array([x * scale, y * scale, z * scale])


def norm(vector: np.ndarray) -> float:
    return math.hypot(*vector.tolist())


class Limiter:
    """Turns the target, whatever it is, into a reference that an arm may follow. Used by the robot thread only."""

    def __init__(self, args: Args):
        self.args, self.low, self.high = args, np.array(args.workspace_low), np.array(args.workspace_high)
        self.seed(np.array([0, 0, 0, 1.0, 0, 0, 0]))

    def seed(self, pose: np.ndarray) -> None:
        """Start from this pose (7,), at rest."""
        self.reference, self.velocity, self.limited = pose.copy(), np.zeros(6), []

    def refusal(self, target: np.ndarray, reference: np.ndarray) -> str | None:
        """Why a target (7,) is refused, not limited: None if it is not."""
        if not np.isfinite(target).all():
            return f"the target is not finite: {target.tolist()}"
        if abs((length := float(np.linalg.norm(target[3:]))) - 1) > 0.01:
            return f"the quaternion of the target has length {length:.3f}, not 1"
        if (jump := norm(target[:3] - reference[:3])) > (most := self.args.max_jump):
            return f"the target jumps {jump:.3f} m from the reference, --max-jump is {most}"
        if (turn := norm(rotation_between(target[3:] / length, reference[3:]))) > (most := self.args.max_rotation_jump):
            return f"the target turns {turn:.2f} rad from the reference, --max-rotation-jump is {most}"
        return None

    def step(self, target: np.ndarray | None, state: "ArmState", gains: Gains, dt: float) -> None:
        """Moves the reference by `dt` towards the target (7,), or lets it come to rest (None), within all limits.

        In this order: box and tilt for the goal; speed and acceleration for the way there; then per axis not further
        than the clip from the measured pose, so that the controller's force is bounded and nothing winds up, and in all
        not further than its damper holds at the maximum speed, less when that is near: so the arm keeps to it, too.
        """
        measured, old, new, args, self.limited = state.tcp_pose, self.reference, self.reference.copy(), self.args, []
        target = old if target is None or not np.isfinite(target).all() else target
        if dt > 0:
            low, high = np.minimum(self.low, old[:3]), np.maximum(self.high, old[:3])  # inward as far as wanted, only
            most_tilt = max(args.max_tilt, tilt(old[3:]))
            position, quat = np.clip(target[:3], low, high), self.upright(target[3:] / norm(target[3:]), most_tilt)
            if (position != target[:3]).any():
                self.limited.append("box")
            most, change = args.max_speed, args.max_acceleration
            v, fast = approach(position - old[:3], self.velocity[:3], most, change, dt)
            most, change = args.max_rotation_speed, args.max_rotation_acceleration
            w, spins = approach(rotation_between(quat, old[3:]), self.velocity[3:], most, change, dt)
            if fast or spins:
                self.limited.append("speed")
            self.velocity = np.concatenate([v, w])
            new[:3] = np.clip(old[:3] + v * dt, low, high)
            new[3:] = self.upright(quat_multiply(quat_from_rotvec(w * dt), old[3:]), most_tilt)
        lag, bound = difference(new, measured), np.array([*gains.clip, *gains.rotational_clip])
        clipped, parts = np.clip(lag, -bound, bound), (slice(0, 3), slice(3, 6))
        speeds = args.max_speed, args.max_rotation_speed
        nearness = max(norm(state.tcp_vel[part]) / speed for part, speed in zip(parts, speeds))
        brake = min(max(5.5 - 5 * nearness, 0.0), 1.0)  # less from 0.9 of the speed on, nothing from 1.1 on
        dampers = gains.damping / gains.stiffness, gains.rotational_damping / gains.rotational_stiffness
        for part, speed, damper in zip(parts, speeds, dampers):
            clipped[part] *= min(1.0, 0.9 * brake * speed * damper / max(norm(clipped[part]), 1e-12))
        if (clipped != lag).any():
            self.limited.append("clip")
            new[:3], new[3:] = measured[:3] + clipped[:3], quat_multiply(quat_from_rotvec(clipped[3:]), measured[3:])
            moved = difference(new, old) / max(dt, 1e-3)  # go on from how it really moved, but not faster than before
            for part in parts:
                self.velocity[part] = moved[part] * min(1.0, norm(self.velocity[part]) / max(norm(moved[part]), 1e-9))
        new[3:] /= norm(new[3:])
        self.reference = new

    def upright(self, quat: np.ndarray, most: float) -> np.ndarray:
        """The rotation (4,), tilted back as far as needed to stay below `most` rad."""
        if (excess := tilt(quat) - most) <= 0:
            return quat
        self.limited = sorted({*self.limited, "tilt"})
        axis = np.cross(tool_axis(quat), (0, 0, -1))
        axis = axis / norm(axis) if norm(axis) > 1e-6 else np.array([1.0, 0, 0])
        return quat_multiply(quat_from_rotvec(axis * excess), quat)


def tool_axis(quat: np.ndarray) -> np.ndarray:
    x, y, z, w = quat.tolist()
    return np.array([2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)])


def tilt(quat: np.ndarray) -> float:
    """Angle between the tool's z axis and straight down, rad."""
    x, y, z = tool_axis(quat).tolist()
    return math.atan2(math.hypot(x, y), -z)


def difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(6,) from pose b (7,) to pose a (7,): translation, rotation vector."""
    return np.concatenate([a[:3] - b[:3], rotation_between(a[3:], b[3:])])


def approach(error: np.ndarray, velocity: np.ndarray, max_speed: float, max_acceleration: float, dt: float):
    """Next velocity (3,) towards a goal at `error` (3,), which it reaches at rest; whether its speed is capped."""
    distance, change = norm(error), max_acceleration * dt
    braking = change * (math.sqrt(0.25 + 2 * distance / (change * dt)) - 0.5)  # stops within `distance` in steps of dt
    step = error * (min(braking, max_speed) / max(distance, 1e-12)) - velocity
    return velocity + step * min(1.0, change / max(norm(step), 1e-12)), braking > max_speed


# --- Arms -------------------------------------------------------------------------------------------------------------
class ArmError(Exception):
    """The robot or its SDK is at fault: `code` and message for clients. Code refused: only what was asked for is."""

    def __init__(self, code: str, message: str):
        super().__init__(" ".join(message.split()))
        self.code = code


@dataclass
class ArmState:
    """One measurement; base frame, SI units, quaternions x, y, z, w."""

    time: float  # the robot's own clock
    tcp_pose: np.ndarray  # (7,)
    tcp_vel: np.ndarray  # (6,) linear, angular
    wrench: np.ndarray  # (6,) force, torque of the surroundings on the tcp
    q: np.ndarray  # (7,)
    dq: np.ndarray  # (7,)
    robot_mode: str = "idle"
    errors: tuple[str, ...] = ()
    success_rate: float = 1.0  # share of the last 100 control commands that reached the robot in time
    at: float = field(default_factory=time.monotonic)  # this machine's clock


class Arm(ABC):
    """A robot arm. Constructed and used by the robot thread alone; only `start` and `recover` may block for long.
    Every method raises ArmError."""

    has_task = False  # whether there is a simulated scene
    waits = True  # whether ticks follow the clock

    def __init__(self, args: Args):
        self.args, self.controlling = args, False  # controlling: whether the impedance controller runs
        self.info: dict[str, Any] = dict.fromkeys(("sdk", "libfranka", "firmware", "task"))
        self.info["kind"] = args.robot

    @abstractmethod
    def get_state(self) -> ArmState:
        """The newest measurement."""

    @abstractmethod
    def start(self, pose: np.ndarray, q: np.ndarray, gains: Gains) -> None:
        """Start the impedance controller with its target at `pose` (7,) and its posture at `q` (7,)."""

    @abstractmethod
    def stream(self, pose: np.ndarray) -> None:
        """Move the target to `pose` (7,), which has passed the limiter."""

    @abstractmethod
    def set_gains(self, gains: Gains) -> None:
        """Change stiffness, damping and clips of the running controller."""

    @abstractmethod
    def stop(self) -> None:
        """Begin to end whatever runs, softly; `moving` is False when the arm holds itself."""

    @abstractmethod
    def move_to_joint_positions(self, q: np.ndarray, speed: float) -> None:
        """Begin to move to `q` (7,) at a fraction of the joints' speed; `moving` is False on arrival."""

    @abstractmethod
    def moving(self) -> bool:
        """Whether what `stop` or `move_to_joint_positions` began goes on; call it in every tick meanwhile."""

    @abstractmethod
    def recover(self) -> None:
        """Clear errors and reflexes, connect again if need be."""

    def reset(self, speed: float) -> None:
        """Begin to move to the joint positions of --reset-joints."""
        self.move_to_joint_positions(np.array(self.args.reset_joints), speed)


JOINT_STIFFNESS = (600.0, 600.0, 600.0, 600.0, 250.0, 150.0, 50.0)  # Nm/rad, libfranka's joint impedance example
JOINT_DAMPING = (50.0, 50.0, 50.0, 50.0, 30.0, 25.0, 15.0)  # Nms/rad
BLOCKED = "the arm did not arrive: something is in its way"


class SimArm(Arm):
    """franka_sim's Franka with a task's scene, at 1 kHz in real time. While no impedance controller runs, joint springs
    hold the arm, as the real one's own position controller does; moving their rest positions moves the arm."""

    has_task, dt = True, 0.001

    def __init__(self, args: Args):
        super().__init__(args)
        try:
            import gymnasium as gym
            import mujoco

            import franka_sim  # registers the tasks  # TASK: import the module that registers yours
        except ImportError as error:
            raise ArmError("sdk", f"--robot sim: {error}; pip install mujoco==4.0.0 gymnasium==1.4.0") from error
        try:
            self.env = gym.make(args.env_id).unwrapped
        except (gym.error.Error, ModuleNotFoundError) as error:
            raise ArmError("sdk", f"--env-id {args.env_id}: {error}") from error
        self.sim, self.downwards, model = self.env.sim, franka_sim.downwards, self.env.sim.model
        self.max_speed, model.opt.timestep = np.array(franka_sim.MAX_JOINT_VELOCITY), self.dt
        if not set(args.cameras) <= (known := {model.camera(i).name for i in range(model.ncam)}):
            raise ArmError("sdk", f"--cameras {args.cameras}: there are {sorted(known)}")
        self.info |= {"sdk": f"mujoco {mujoco.__version__}", "task": args.env_id}
        self.waits, self.time, self.reflex, self.task = args.sim_speed > 0, 0.0, (), {}
        self.gripper_command: tuple[float, float, float] | None = None  # width, force, speed
        self.scene, self.scene_wanted, self.scene_ready = {}, threading.Event(), threading.Event()
        self.reset_task(args.seed)

    def reset_task(self, seed: int | None) -> None:
        self.env.reset(seed=seed)
        self.wrench, self.motion, self.task_time = np.zeros(6), None, -math.inf
        self.began, self.done = time.monotonic(), 0  # of stepping in real time
        self.stop()

    def get_state(self) -> ArmState:
        """Steps the physics up to now, first."""
        sim, speed, due = self.sim, self.args.sim_speed, round(1 / (self.args.control_hz * self.dt))
        if self.waits:
            due = int((time.monotonic() - self.began) * speed / self.dt) - self.done
            if due > (most := round(50 * max(speed, 1))):  # the machine stood still: do not run after it
                self.began, self.done, due = time.monotonic(), -most, most
            self.done += due
        if command := self.gripper_command:
            sim.set_gripper(*command)
            self.gripper_command = None
        if due > 0:
            sim.step(due)
            self.time += due * self.dt
            self.wrench += (sim.tcp_wrench - self.wrench) * (1 - math.exp(-due * self.dt / 0.05))  # s
            if norm(self.wrench[:3]) > self.args.collision_force and (self.controlling or self.motion):
                self.reflex = (f"cartesian_reflex: {norm(self.wrench[:3]):.0f} N",)
                self.stop()
        if self.time - self.task_time > 0.05:
            self.task, self.task_time = self.look_at_task(), self.time
        if self.scene_wanted.is_set():
            self.scene = sim.get_state() | {"time": self.time}
            self.scene_wanted.clear()
            self.scene_ready.set()
        mode = "reflex" if self.reflex else "move" if self.controlling or self.motion else "idle"
        return ArmState(self.time, sim.tcp_pose, sim.tcp_velocity, self.wrench.copy(), sim.q, sim.dq, mode, self.reflex)

    def look_at_task(self) -> dict[str, Any]:
        env, pose = self.env, (self.sim.target_pose if self.controlling else self.sim.tcp_pose).tolist()
        env.target = [*pose[:3], 0.0, 0.0, 2 * math.atan2(pose[4], pose[3])][: len(env.target)]
        action = env.expert_action().tolist()  # for this target
        goal = [x + scale * a for x, scale, a in zip(env.target, env.action_scale, action)]
        expert = {"pose": [*goal[:3], *self.downwards(*goal[3:]).tolist()]}
        expert["close"] = len(action) == len(goal) or action[-1] > 0
        observation = {name: value.tolist() for name, value in env.task_observation().items()}
        return {"success": bool(env.evaluate()[0]), "observation": observation, "expert": expert}

    def start(self, pose: np.ndarray, q: np.ndarray, gains: Gains) -> None:
        model, self.controlling = self.sim.model, True
        model.jnt_stiffness[:7], model.dof_damping[:7], model.qpos_spring[:7] = 0, 0.5, q
        self.stream(pose)
        self.set_gains(gains)

    def stream(self, pose: np.ndarray) -> None:
        self.sim.set_target_pose(pose[:3], pose[3:])

    def set_gains(self, gains: Gains) -> None:
        self.sim.set_impedance(**asdict(gains))

    def stop(self) -> None:
        model, self.controlling, self.motion = self.sim.model, False, None
        model.actuator_biasprm[:12], model.qpos_spring[:7] = 0, self.sim.q
        model.jnt_stiffness[:7], model.dof_damping[:7] = JOINT_STIFFNESS, JOINT_DAMPING

    def move_to_joint_positions(self, q: np.ndarray, speed: float) -> None:
        self.stop()
        start = self.sim.q
        duration = 1.875 * np.max(np.abs(q - start) / (speed * self.max_speed)) + 1e-3  # the quintic's peak is at 1.875
        self.motion = start, q, self.time, float(duration)

    def moving(self) -> bool:
        if self.motion is None:
            return not self.reflex and bool(np.abs(self.sim.dq).max() > 0.02)
        start, goal, began, duration = self.motion
        s = min((self.time - began) / duration, 1.0)
        self.sim.model.qpos_spring[:7] = start + (10 * s**3 - 15 * s**4 + 6 * s**5) * (goal - start)
        if s == 1 and np.abs(self.sim.q - goal).max() < 2e-3:
            self.motion = None
        elif self.time - began > duration + 3:
            raise ArmError("refused", BLOCKED)
        return self.motion is not None

    def recover(self) -> None:
        self.reflex, self.wrench = (), np.zeros(6)
        self.stop()


NO_SDK = "--robot {}: {}; pip install {} (Linux x86-64, Python 3.11 to 3.13)"
NO_ROBOT = "--robot-ip {}: {} (brakes open, FCI active, cable in the cabinet?)"
FRANKY_FOR = "pip install --force-reinstall franky-control --extra-index-url "
FRANKY_FOR += "https://timschneider42.github.io/franky/whl/by-robot-server-version/{}/"


class FrankyArm(Arm):
    """Through franky 2 (MIT), on its impedance controller: PyPI's wheel for an FR3 with system 5.9 or newer, others in
    franky's own index. libfranka makes the thread that constructs `Robot` a real-time one, and franky's control thread
    inherits from the one that starts a motion: so both happen in the robot thread."""

    def __init__(self, args: Args):
        super().__init__(args)
        try:
            import franky
        except ImportError as error:
            raise ArmError("sdk", NO_SDK.format("franky", error, "franky-control==2.0.0")) from error
        self.franky, self.info = franky, self.info | sdk_versions("franky-control")
        self.connect()

    def connect(self) -> None:
        version = reach(self.args.robot_ip)
        try:
            self.robot = self.franky.Robot(self.args.robot_ip, realtime_config=self.franky.RealtimeConfig.Ignore)
            self.robot.set_collision_behavior(self.args.collision_torque, self.args.collision_force)
            self.model, self.motion, self.info["firmware"] = self.robot.model, None, version
        except self.franky.IncompatibleVersionException as error:
            message = f"{error} The robot speaks version {version}: {FRANKY_FOR.format(version)}"
            raise ArmError("sdk", message) from error
        except self.franky.Exception as error:
            raise ArmError("sdk", NO_ROBOT.format(self.args.robot_ip, error)) from error

    @contextlib.contextmanager
    def faults(self) -> Iterator[None]:
        """franky's exceptions as ours. Some do not derive from franky.Exception; a lost network is a RuntimeError."""
        try:
            yield
        except self.franky.ControlException as error:
            self.motion, self.controlling = None, False
            if "preempted" not in str(error):
                raise ArmError(fault_code(str(error)), str(error)) from error
        except (self.franky.Exception, self.franky.InvalidMotionTypeException, RuntimeError) as error:
            raise ArmError("sdk", f"{type(error).__name__}: {error}") from error

    def get_state(self) -> ArmState:
        with self.faults():
            if self.motion is not None:
                self.robot.poll_motion()  # raises what ended the motion
        with self.faults():
            s = self.robot.state
            velocity = self.model.zero_jacobian(self.franky.Frame.EndEffector, s) @ s.dq  # (6, 7) @ (7,)
            pose = np.concatenate([s.O_T_EE.translation, s.O_T_EE.quaternion])
            return ArmState(s.time.to_msec() / 1e3, pose, velocity, np.array(s.O_F_ext_hat_K), s.q, s.dq, *health(s))

    def start(self, pose: np.ndarray, q: np.ndarray, gains: Gains) -> None:
        self.pose, self.posture, self.gains = pose, q, gains
        self.set_gains(gains)

    def set_gains(self, gains: Gains) -> None:
        """Starts a new motion, because clips are fixed at construction; it takes over from the old one at once."""
        franky, old = self.franky, self.gains
        with self.faults():
            self.motion = franky.CartesianImpedanceTrackingMotion(
                posture_task=franky.PostureTask(self.posture, stiffness=gains.nullspace_stiffness),
                translational_error_clip=np.array(gains.clip),
                rotational_error_clip=np.array(gains.rotational_clip),
                max_delta_tau=1.0,
                gains_time_constant=0.1,
            )
            self.controlling, self.gains = True, gains
            self.stream(self.pose)
            for g in (old, gains):  # from the old gains on, smoothed by the control loop
                stiffness = g.stiffness, g.rotational_stiffness
                isotropic = franky.CartesianImpedanceGains.isotropic
                self.motion.set_gains(isotropic(*stiffness, g.damping, g.rotational_damping))
                if g is old:
                    self.robot.move(self.motion, asynchronous=True)

    def stream(self, pose: np.ndarray) -> None:
        self.pose = pose
        with self.faults():
            self.motion.set_reference(self.franky.CartesianReference(target=self.franky.Affine(pose[:3], pose[3:])))

    def stop(self) -> None:
        with self.faults():
            if self.robot.is_in_control:
                self.motion = self.franky.TorqueStopMotion() if self.controlling else self.franky.JointStopMotion()
                self.robot.move(self.motion, asynchronous=True)
        self.controlling = False

    def move_to_joint_positions(self, q: np.ndarray, speed: float) -> None:
        with self.faults():
            self.motion = self.franky.JointMotion(q.tolist(), relative_dynamics_factor=speed)
            self.robot.move(self.motion, asynchronous=True)

    def moving(self) -> bool:
        with self.faults():
            self.robot.poll_motion()
            return self.robot.is_in_control
        return False

    def recover(self) -> None:
        self.controlling = False
        try:
            if self.robot.is_in_control:
                self.robot.stop()
            with contextlib.suppress(self.franky.ControlException):  # what ended the last motion
                self.robot.join_motion(5.0)
            self.motion = None
            self.robot.recover_from_errors()  # what it returns may be of an old state: Control.recover looks itself
        except (self.franky.NetworkException, RuntimeError):  # no connection any more
            self.connect()
        except self.franky.Exception as error:
            raise ArmError("sdk", f"{type(error).__name__}: {error}") from error


class PandaPyArm(Arm):
    """Through panda-py (Apache-2.0) on its impedance controller; PyPI's wheel: Panda with system 4.2.1 or newer. It
    clips nothing itself, and aborts the process on NaN: everything that it gets has passed the limiter."""

    def __init__(self, args: Args):
        super().__init__(args)
        try:
            import panda_py
            import panda_py.controllers
            import panda_py.motion
        except ImportError as error:
            raise ArmError("sdk", NO_SDK.format("panda-py", error, "panda-python==1.1.1")) from error
        self.panda_py, self.trajectory, self.last, self.kept = panda_py, None, None, []
        self.info |= sdk_versions("panda-python")
        self.connect()

    def connect(self) -> None:
        version = reach(self.args.robot_ip)
        torque, force = [self.args.collision_torque] * 7, [self.args.collision_force] * 6
        try:
            self.panda = self.panda_py.Panda(self.args.robot_ip)
            self.kept.append(self.panda)  # a Panda that is destroyed without connection aborts the process
            self.panda.get_robot().set_collision_behavior(torque, torque, force, force)
            self.model, self.info["firmware"] = self.panda.get_model(), version
        except self.panda_py.IncompatibleVersionError as error:
            message = f"{error} Or, with --robot franky: {FRANKY_FOR.format(error.server_version)}"
            raise ArmError("sdk", message) from error
        except RuntimeError as error:
            raise ArmError("sdk", NO_ROBOT.format(self.args.robot_ip, error)) from error

    def get_state(self) -> ArmState:
        try:
            self.panda.raise_error()  # the only place that tells of a reflex: the state just stands still
        except RuntimeError as error:
            self.controlling, self.trajectory = False, None
            raise ArmError(fault_code(str(error)), str(error)) from error
        try:
            s = self.panda.get_state()
        except RuntimeError as error:
            if "another control or read operation" in str(error) and self.last:  # a race inside panda-py: next tick
                return self.last
            raise ArmError("sdk", str(error)) from error
        jacobian = self.model.zero_jacobian(self.panda_py.libfranka.Frame.kEndEffector, s)  # (42,) column by column
        matrix, velocity = np.reshape(s.O_T_EE, (4, 4)).T, np.reshape(jacobian, (7, 6)).T @ s.dq
        pose = np.concatenate([matrix[:3, 3], quat_from_matrix(matrix[:3, :3])])
        arrays = pose, velocity, np.array(s.O_F_ext_hat_K), np.array(s.q), np.array(s.dq)
        self.last = ArmState(s.time.to_msec() / 1e3, *arrays, *health(s))
        return self.last

    def run(self, controller) -> None:
        try:
            self.panda.start_controller(controller)
        except RuntimeError as error:
            raise ArmError("sdk", str(error)) from error
        self.controller = controller

    def start(self, pose: np.ndarray, q: np.ndarray, gains: Gains) -> None:
        controller = self.panda_py.controllers.CartesianImpedance(filter_coeff=0.2)
        self.controller, self.posture = controller, q
        self.set_gains(gains)
        self.run(controller)
        self.controlling = True
        self.stream(pose)

    def stream(self, pose: np.ndarray) -> None:
        if not np.isfinite(pose).all():
            raise ArmError("internal", f"a reference that is not finite: {pose}")
        self.controller.set_control(pose[:3], pose[3:], self.posture)

    def set_gains(self, gains: Gains) -> None:
        self.controller.set_impedance(np.diag([gains.stiffness] * 3 + [gains.rotational_stiffness] * 3))
        self.controller.set_damping_ratio(gains.damping / (2 * math.sqrt(gains.stiffness)))  # there is only one
        self.controller.set_nullspace_stiffness(gains.nullspace_stiffness)

    def stop(self) -> None:
        self.controlling, self.trajectory = False, None
        try:
            self.panda.stop_controller()
        except RuntimeError as error:
            raise ArmError("sdk", str(error)) from error

    def move_to_joint_positions(self, q: np.ndarray, speed: float) -> None:
        """Streams panda-py's own trajectory: its blocking call could not be broken off."""
        try:
            self.trajectory = self.panda_py.motion.JointTrajectory([self.last.q, q], speed_factor=speed)
        except RuntimeError as error:
            raise ArmError("refused", str(error)) from error
        self.run(self.panda_py.controllers.JointPosition(JOINT_STIFFNESS, JOINT_DAMPING, filter_coeff=0.2))
        self.goal, self.began = q, self.last.time
        self.controller.set_control(self.last.q, np.zeros(7))

    def moving(self) -> bool:
        if self.trajectory is None:
            return False
        elapsed, duration = self.last.time - self.began, self.trajectory.get_duration()
        t = min(max(elapsed, 0.0), duration)
        dq = self.trajectory.get_joint_velocities(t) if t < duration else np.zeros(7)
        self.controller.set_control(self.trajectory.get_joint_positions(t), dq)
        if elapsed > duration and np.abs(self.last.q - self.goal).max() < 0.01:
            self.stop()
        elif elapsed > duration + 3:
            raise ArmError("refused", BLOCKED)
        return self.trajectory is not None

    def recover(self) -> None:
        try:
            self.stop()
            self.panda.recover()
        except (ArmError, RuntimeError):  # no connection any more
            self.connect()


def sdk_versions(distribution: str) -> dict[str, str | None]:
    """Of the wheel, and of the libfranka in it: its file's name tells."""
    names = [file.name for file in importlib.metadata.files(distribution) or [] if "libfranka" in file.name]
    versions = [match[1] for name in names if (match := re.search(r"\.so\.([\d.]+)$", name))]
    sdk = f"{distribution} {importlib.metadata.version(distribution)}"
    return {"sdk": sdk, "libfranka": versions[0] if versions else None}


def fault_code(message: str) -> str:
    """Of what ended libfranka's control loop."""
    return "user_stopped" if "User Stop" in message else "reflex" if "reflex" in message else "sdk"


def health(state) -> tuple[str, tuple[str, ...], float]:
    """Mode, names of the errors and rate of success in libfranka's RobotState, from either SDK."""
    mode = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", state.robot_mode.name.removeprefix("k")).lower()
    errors = state.current_errors
    names = tuple(n for n in dir(errors) if n[0] != "_" and getattr(errors, n) is True) if errors else ()
    return mode, names, state.control_command_success_rate if mode == "move" else 1.0


def quat_from_matrix(m: np.ndarray) -> np.ndarray:
    """(4,) x, y, z, w of a (3, 3) rotation matrix: the row of the largest diagonal entry of 4 q q^T (Shepperd)."""
    x, y, z = m[2, 1] - m[1, 2], m[0, 2] - m[2, 0], m[1, 0] - m[0, 1]
    s = m + m.T
    outer = np.array([[0, s[0, 1], s[0, 2], x], [0, 0, s[1, 2], y], [0, 0, 0, z], [0] * 4])
    outer += outer.T + np.diag([*(1 + 2 * np.diag(m) - np.trace(m)), 1 + np.trace(m)])
    quat = outer[np.argmax(np.diag(outer))]
    return quat / norm(quat)


def reach(ip: str) -> int:
    """The version of Franka's interface that the robot speaks, from how it refuses version 0. Raises ArmError within
    seconds where libfranka would wait for a minute."""
    try:
        with socket.create_connection((ip, 1337), timeout=3) as tcp:
            tcp.sendall(struct.pack("<IIIHH", 0, 0, 16, 0, 0))  # Connect: command, id, size, version, UDP port
            return struct.unpack("<IIIBH", tcp.recv(15, socket.MSG_WAITALL))[-1]
    except (OSError, struct.error) as error:
        raise ArmError("sdk", NO_ROBOT.format(ip, error)) from error


# TASK: an arm of your own: subclass Arm, and name it here and in Args.robot.
ARMS: dict[str, type[Arm]] = {"sim": SimArm, "franky": FrankyArm, "panda-py": PandaPyArm}


# --- Grippers ---------------------------------------------------------------------------------------------------------
class GripperError(Exception):
    """The gripper does not answer, or is at fault."""


@dataclass
class GripperState:
    width: float = 0.0  # m between the fingers
    moving: bool = False
    holding: bool = False  # an object stopped the fingers
    fault: str | None = None


class Gripper(ABC):
    """A gripper with a thread of its own: `submit` from anywhere, everything else runs in that thread. Speeds in m/s,
    forces in N. Methods begin a motion and return; `poll` tells when it has ended. All raise GripperError."""

    kind, max_width, max_force, max_speed, hz = "none", 0.0, 0.0, 0.0, 50.0

    def __init__(self, args: Args):
        self.args, self.state, self.orders = args, GripperState(), queue.SimpleQueue()
        self.stopping, self.thread = threading.Event(), threading.Thread(target=self.run, name="gripper", daemon=True)

    def open(self, speed: float, force: float) -> None:
        self.move(self.max_width, speed, force)

    def close(self, speed: float, force: float) -> None:
        """Close on whatever is there."""
        self.move(0.0, speed, force)

    @abstractmethod
    def move(self, width: float, speed: float, force: float) -> None:
        """Move the fingers to this distance, m."""

    def activate(self) -> None:  # noqa: B027
        """What the gripper needs before its first motion: the fingers may move."""

    @abstractmethod
    def stop(self) -> None:
        """Stop the fingers where they are."""

    @abstractmethod
    def poll(self) -> GripperState:
        """The newest measurement."""

    def submit(self, job: "Job", action: str, width: float, speed: float, force: float) -> None:
        """Any thread: carry out an action instead of what is going on; `speed` and `force` are fractions."""
        values = {"open": (), "close": (), "move": (width,)}.get(action)
        values = () if values is None else (*values, speed * self.max_speed, force * self.max_force)
        self.orders.put((job, functools.partial(getattr(self, action), *values)))

    def run(self) -> None:
        job: Job | None = None
        while not self.stopping.wait(1 / self.hz):
            try:
                while not self.orders.empty():
                    if job:
                        job.finish("superseded by a newer one")
                    job, call = self.orders.get()
                    job.status, self.state = "running", replace(self.state, fault=None)
                    if self.orders.empty():
                        call()
                state = self.poll()
            except GripperError as error:
                state = replace(self.state, moving=False, fault=str(error))
            except Exception as error:  # a bug must not end the thread
                log.exception("gripper")
                state = replace(self.state, moving=False, fault=f"internal: {error!r:.60}, see the log")
            if state.fault and state.fault != self.state.fault:
                log.error("gripper: %s", state.fault)
            self.state = state
            if job and (state.fault or not state.moving):
                job.finish(state.fault)
                job = None


class NoGripper(Gripper):
    def move(self, width: float, speed: float, force: float) -> None: ...

    def stop(self) -> None: ...

    def poll(self) -> GripperState:
        return GripperState()


class SimGripper(Gripper):
    """The simulated arm's own."""

    kind, max_width, max_force, max_speed = "sim", 0.08, 70.0, 0.3
    arm: SimArm | None = None  # set by the robot thread
    goal, steady = 0.08, 0  # m, polls without motion

    def move(self, width: float, speed: float, force: float) -> None:
        self.goal, self.steady = width, 0
        self.arm.gripper_command = width, max(force, 1.0), max(speed, 0.01)

    def stop(self) -> None:
        self.move(self.state.width, self.max_speed, 0.5 * self.max_force)

    def poll(self) -> GripperState:
        width = self.arm.sim.gripper_width if self.arm else self.max_width
        self.steady = self.steady + 1 if abs(width - self.state.width) < 2e-4 else 0
        moving = self.steady < 6
        return GripperState(width, moving, not moving and width > self.goal + 2e-3)


class FrankaHand(Gripper):
    """Franka's own hand, through the SDK that drives the arm. Its calls block, so they have a thread for themselves."""

    kind, max_width, max_force, max_speed = "franka-hand", 0.08, 70.0, 0.1

    def __init__(self, args: Args):
        super().__init__(args)
        try:
            reach(args.robot_ip)
            if args.robot == "franky":
                import franky

                self.hand = franky.Gripper(args.robot_ip)
                self.read = lambda: self.hand.state
            else:
                from panda_py import libfranka

                self.hand = libfranka.Gripper(args.robot_ip)
                self.read = self.hand.read_once
            self.max_width = self.read().max_width or self.max_width
        except Exception as error:
            raise GripperError(f"{error} (--gripper franka-hand; there are also robotiq and none)") from error
        self.pool, self.future = ThreadPoolExecutor(1, "hand"), Future()
        self.future.set_result(True)

    def begin(self, call: Callable, *values: float) -> None:
        if not self.future.done():
            self.hand.stop()  # ends the call that blocks the other thread
        self.future = self.pool.submit(call, *values)

    def close(self, speed: float, force: float) -> None:
        self.begin(self.hand.grasp, 0.0, speed, force, self.max_width, self.max_width)

    def move(self, width: float, speed: float, force: float) -> None:
        self.begin(self.hand.move, min(width, self.max_width), speed)

    def activate(self) -> None:
        self.begin(self.hand.homing)

    def stop(self) -> None:
        self.begin(self.hand.stop)

    def poll(self) -> GripperState:
        moving, fault = not self.future.done(), None
        if not moving and (error := self.future.exception()):
            fault = f"{type(error).__name__}: {error}"
        elif not moving and not self.future.result():
            fault = "the hand did not reach its goal"
        try:
            state = self.read()
        except Exception as error:
            raise GripperError(f"{type(error).__name__}: {error}") from error
        return GripperState(state.width, moving, state.is_grasped and state.width > 1e-3, fault)


class Robotiq(Gripper):
    """Robotiq 2F-85, Modbus RTU on a serial port. Registers have two bytes: from 0x03E8 on action, position, speed and
    force are written; from 0x07D0 on status, fault and echo, position and current are read (instruction manual)."""

    kind, max_width, max_force, max_speed, hz = "robotiq", 0.085, 235.0, 0.15, 100.0
    open_at, closed_at = 3, 228  # positions at max_width and at 0  # TASK: measure yours, with your finger tips
    requested, active_by = None, 0.0  # position; until when an activation may take

    def __init__(self, args: Args):
        super().__init__(args)
        try:
            import pymodbus.client
            from pymodbus.exceptions import ModbusException
        except ImportError as error:
            raise GripperError(f"--gripper robotiq: {error}; pip install pymodbus==3.16.1 pyserial==3.5") from error
        logging.getLogger("pymodbus").setLevel(logging.CRITICAL)
        settings = {"baudrate": 115200, "bytesize": 8, "parity": "N", "stopbits": 1, "timeout": 0.1, "retries": 1}
        self.client = pymodbus.client.ModbusSerialClient(args.gripper_port, **settings)
        self.error = ModbusException
        if not self.client.connect():
            raise GripperError(f"--gripper-port {args.gripper_port}: cannot be opened (plugged in? in group dialout?)")
        self.state = self.poll()

    def ask(self, call: str, *values: Any, **options: Any) -> list[int]:
        try:
            if not self.client.connected:
                self.client.connect()
            reply = getattr(self.client, call)(*values, device_id=9, **options)
        except (self.error, OSError) as error:
            raise GripperError(f"no answer on {self.args.gripper_port} (cable, 24 V?): {error}") from error
        if reply.isError():
            raise GripperError(f"refused on {self.args.gripper_port}: {reply}")
        return reply.registers

    def write(self, action: int, position: int = 0, speed: int = 0, force: int = 0) -> None:
        self.ask("write_registers", 0x03E8, [action << 8, position, speed << 8 | force])

    def status(self) -> tuple[int, int, int, int, str | None]:
        """gSTA (3: active), gOBJ (0: moving, 1, 2: an object), echo of the requested position, position, fault."""
        status, echo, position = self.ask("read_holding_registers", 0x07D0, count=3)
        fault = f"fault 0x{echo >> 8:02X}: send activate" if echo >> 8 else None
        if (active := status >> 12 & 3) != 3:
            fault = "not activated: send activate, the fingers will move"
        return active, status >> 14 & 3, echo & 255, position >> 8, fault

    def close(self, speed: float, force: float) -> None:
        self.go(255, speed, force)

    def move(self, width: float, speed: float, force: float) -> None:
        self.go(round(self.closed_at + width / self.max_width * (self.open_at - self.closed_at)), speed, force)

    def go(self, position: int, speed: float, force: float) -> None:
        if fault := self.status()[-1]:
            raise GripperError(fault)
        self.requested, self.active_by = position, 0.0
        self.write(0x09, position, round(255 * speed / self.max_speed), round(255 * force / self.max_force))

    def activate(self) -> None:
        if self.status()[-1]:
            self.write(0x00)
            self.write(0x01)
        self.requested, self.active_by = None, time.monotonic() + 8.0

    def stop(self) -> None:
        self.requested, self.active_by = None, 0.0
        self.write(0x01)  # without "go to": stands

    def poll(self) -> GripperState:
        active, contact, echo, position, fault = self.status()
        moving = False
        if self.active_by:
            moving, fault = active != 3, None if active != 3 else fault
            if moving and time.monotonic() > self.active_by:
                fault = "the activation did not end within 8 s"
            self.active_by = self.active_by if moving and not fault else 0.0
        elif self.requested is not None and not fault:  # until the echo is this request's, contact is the last one's
            moving = echo != self.requested or contact == 0
        width = self.max_width * min(max((position - self.closed_at) / (self.open_at - self.closed_at), 0.0), 1.0)
        return GripperState(width, moving, not moving and contact in (1, 2), fault)


# TASK: a gripper of your own: subclass Gripper, and name it here and in Args.gripper.
GRIPPERS = {"sim": SimGripper, "franka-hand": FrankaHand, "robotiq": Robotiq, "none": NoGripper}


# --- Robot thread -----------------------------------------------------------------------------------------------------
class Job:
    """A long operation; its handle is made up by the client."""

    def __init__(self, handle: str, op: str, steps: Iterator[None]):
        self.handle, self.op, self.status, self.error = handle, op, "queued", None
        self.began, self.ended, self.steps = time.monotonic(), None, steps

    def finish(self, error: str | None = None) -> None:
        self.error, self.ended, self.status = error, time.monotonic(), "failed" if error else "done"
        log.log(logging.WARNING if error else logging.INFO, "%s %s %s", self.op, self.status, error or "")

    def report(self) -> dict[str, Any]:
        report = {name: getattr(self, name) for name in ("handle", "op", "status", "error")}
        return report | {"seconds": (self.ended or time.monotonic()) - self.began}


class Control(threading.Thread):
    """The robot thread: constructs the arm, reads it, limits the reference, watches. Other threads only leave wishes in
    attributes (a single assignment each) and read what is there; nobody ever waits for this thread."""

    def __init__(self, args: Args, gripper: Gripper):
        super().__init__(name="robot", daemon=True)
        self.args, self.gripper, self.limiter = args, gripper, Limiter(args)
        self.gains = self.wanted_gains = args.gains  # in force, to be in force
        self.arm: Arm | None = None
        self.state: ArmState | None = None
        self.failure, self.ready, self.stopping = "", threading.Event(), threading.Event()
        self.phase, self.held = "idle", ""  # idle streaming hold busy stopping; why it is held until `start`
        self.fault: dict[str, Any] | None = None  # code, message, count
        self.job: Job | None = None
        self.faults = self.reflexes = self.overruns = 0
        self.target, self.target_at, self.lease_began, self.lease_until = None, -math.inf, -math.inf, -math.inf
        self.hold_wish = self.stop_wish = self.hold_seen = self.stop_seen = ("", -math.inf)  # why, and when
        self.may_block_until = 0.0  # a call into the SDK that takes longer counts as frozen
        self.robot_time = self.advanced = self.ticked = -math.inf  # robot's clock, when it went on, start of last tick

    @property
    def mode(self) -> str:
        return "fault" if self.fault else "busy" if self.phase in ("breaking", "stopping") else self.phase

    def run(self) -> None:
        try:
            self.arm = ARMS[self.args.robot](self.args)
            if isinstance(self.gripper, SimGripper):
                self.gripper.arm = self.arm
            self.advanced, self.state = time.monotonic(), self.arm.get_state()
            self.limiter.seed(self.state.tcp_pose)
        except Exception as error:
            log.exception("the arm does not start")
            self.failure = str(error) if isinstance(error, ArmError) else repr(error)
        self.ready.set()
        due = time.monotonic()
        while not self.failure and not self.stopping.is_set():
            due += 1 / self.args.control_hz
            self.tick()
            early = due - time.monotonic()
            if early > 0 or not self.arm.waits:
                time.sleep(early if self.arm.waits else 0)
            elif early < -0.005:
                self.overruns, due = self.overruns + 1, time.monotonic()
        with contextlib.suppress(ArmError):
            if not self.failure:
                for _ in self.settle():
                    self.arm.get_state()
                    time.sleep(0.005)

    def tick(self) -> None:
        """Measure, watch, act; whatever goes wrong ends as a fault, never as an exception."""
        now, dt = time.monotonic(), 0.0
        try:
            try:
                dt = self.measure(now)
            except ArmError:
                if not self.recovering():
                    raise
            self.watch(now)
            self.act(dt)
        except ArmError as error:
            self.latch(error.code, str(error))
        except Exception as error:  # a bug must not end the thread
            if self.fault is None:
                log.exception("robot thread")
            self.latch("internal", f"{type(error).__name__} in the control loop, see the log")
        self.ticked = now

    def measure(self, now: float) -> float:
        """Reads the arm; how far the robot's clock went on since the last tick, at most 20 ms."""
        state = self.arm.get_state()
        if not np.isfinite(np.concatenate([state.tcp_pose, state.tcp_vel, state.wrench, state.q, state.dq])).all():
            raise ArmError("sdk", "the robot's state is not finite")
        if (dt := state.time - self.robot_time) != 0:
            self.robot_time, self.advanced = state.time, now
        else:
            state.at = self.state.at
        if now - self.advanced > self.args.frozen_after_s:
            raise ArmError("frozen", f"the robot's clock stands still at {state.time:.3f} s: connection lost?")
        if self.phase not in ("streaming", "hold"):
            self.limiter.seed(state.tcp_pose)
        self.state = state
        if state.robot_mode in ("reflex", "user_stopped") and not self.recovering():
            raise ArmError(state.robot_mode, ", ".join(state.errors) or f"the robot reports {state.robot_mode}")
        return min(max(dt, 0.0), 0.02)

    def recovering(self) -> bool:
        return self.job is not None and self.job.op == "recover"

    def watch(self, now: float) -> None:
        """The watchdog's ladder, and the wishes of other threads."""
        (hold, hold_at), (stop, stop_at) = wishes = self.hold_wish, self.stop_wish
        hold, stop = hold * (wishes[0] is not self.hold_seen), stop * (wishes[1] is not self.stop_seen)
        self.hold_seen, self.stop_seen = wishes
        args, silent, lost = self.args, now - self.target_at, now > self.lease_until
        if (job := self.job) and (job.began < max(hold_at, stop_at, self.lease_began) or lost):
            self.end_job(f"broken off: {hold or stop or 'the lease ended'}")
        if self.phase not in ("streaming", "hold"):
            return
        if 0 < args.max_force < (force := norm(self.state.wrench[:3])) and not self.held:
            hold = f"an external force of {force:.0f} N exceeded --max-force {args.max_force:g}"
            self.limiter.seed(self.state.tcp_pose)
        if stop or silent > args.stop_after_s:
            log.warning("soft stop: %s", stop or f"no target for {silent:.1f} s")
            self.phase, self.held = "breaking", ""
        elif hold:
            log.warning("hold: %s", hold)
            self.phase, self.held = "hold", hold
        elif self.phase == "streaming" and (silent > args.hold_after_s or lost):
            log.warning("hold: %s", "the lease ended" if lost else f"no target for {silent:.2f} s")
            self.phase = "hold"
        elif not self.held and silent <= args.hold_after_s and not lost:
            self.phase = "streaming"

    def act(self, dt: float) -> None:
        """One step of the job, or of the reference."""
        arm, job = self.arm, self.job
        if job and self.fault and not self.recovering():
            self.end_job(f"{self.fault['code']}: {self.fault['message']}")
        elif job:
            try:
                job.status = "running"
                next(job.steps)
            except StopIteration:
                self.job = None
                job.finish()
            except ArmError as error:
                self.end_job(str(error))
                if error.code != "refused":
                    raise
            except Exception:  # a bug; the generator is dead
                self.end_job("internal: see the log")
                raise
        elif self.phase in ("streaming", "hold") and not self.fault:
            if (gains := self.wanted_gains) is not self.gains:
                arm.set_gains(gains)
                self.gains = gains
            target = self.target if self.phase == "streaming" else None
            self.limiter.step(target, self.state, self.gains, dt)
            arm.stream(self.limiter.reference)
        elif arm.controlling or self.phase in ("streaming", "hold", "breaking"):  # nothing must run, or a fault came
            self.phase = "stopping"
            arm.stop()
        elif self.phase == "stopping" and not arm.moving():
            self.phase = "idle"

    def end_job(self, error: str) -> None:
        job, self.job, self.phase = self.job, None, "breaking"
        if job:
            job.finish(error)

    def latch(self, code: str, message: str) -> None:
        """The first fault stays until `recover`."""
        if not self.recovering():
            self.end_job(f"{code}: {message}")
        if self.fault is None:
            self.faults, self.reflexes = self.faults + 1, self.reflexes + (code == "reflex")
            self.fault, self.held = {"code": code, "message": message, "count": self.faults}, ""
            log.error("fault %d, %s: %s", self.faults, code, message)

    # Jobs: generators, one step per tick
    def settle(self) -> Iterator[None]:
        """Until the arm holds itself."""
        self.phase = "busy"
        self.arm.stop()
        give_up = time.monotonic() + 3
        while self.arm.moving():
            if time.monotonic() > give_up:
                raise ArmError("sdk", "the arm does not come to rest")
            yield

    def start_streaming(self, gains: Gains) -> Iterator[None]:
        self.wanted_gains = gains
        yield from self.settle()
        state, self.gains, self.may_block_until = self.state, self.wanted_gains, time.monotonic() + 2
        self.limiter.seed(state.tcp_pose)
        self.arm.start(state.tcp_pose, state.q, self.gains)
        self.target, self.target_at, self.phase, self.held = None, time.monotonic(), "streaming", ""
        self.may_block_until = 0.0
        log.info("streaming with %s", self.gains)

    def move_joints(self, q: np.ndarray | None, speed: float) -> Iterator[None]:
        yield from self.settle()
        self.arm.reset(speed) if q is None else self.arm.move_to_joint_positions(q, speed)
        while self.arm.moving():
            yield
        yield
        self.phase = "idle"

    def recover(self) -> Iterator[None]:
        self.may_block_until = time.monotonic() + 20
        self.arm.recover()
        self.may_block_until, before, give_up = 0.0, self.robot_time, time.monotonic() + 2
        while (still := self.robot_time == before) or self.state.robot_mode in ("reflex", "user_stopped"):
            if time.monotonic() > give_up:
                reason = "its clock stands still" if still else f"it reports {self.state.robot_mode}"
                raise ArmError("sdk", f"the robot is not ready: {reason}")
            yield
        yield from self.settle()
        self.fault, self.held, self.phase = None, "", "idle"

    def reset_task(self, seed: int | None) -> Iterator[None]:
        yield from self.settle()
        self.arm.reset_task(seed)
        yield
        self.phase = "idle"


# --- Cameras of the simulation ----------------------------------------------------------------------------------------
class Renderer(threading.Thread):
    """Renders the scene on request, in a copy of the physics: the robot thread never waits for OpenGL."""

    def __init__(self, args: Args, control: Control, wake: Callable[[], None]):
        super().__init__(name="cameras", daemon=True)
        self.args, self.control, self.wake, self.twin, self.seq = args, control, wake, None, 0
        self.requests, self.done = queue.SimpleQueue(), queue.SimpleQueue()

    def run(self) -> None:
        while True:
            batch = [self.requests.get()]
            while not self.requests.empty():  # all that came meanwhile share the next images
                batch.append(self.requests.get())
            try:
                shot, fault = self.shoot({name for _, _, names in batch for name in names}), None
            except Exception as error:
                if self.seq >= 0:  # the first time
                    log.exception("cameras")
                shot, fault, self.seq = {}, str(error), -1
            for envelope, request, names in batch:
                arrays, images = zip(*(shot[name] for name in names)) if shot and names else ((), ())
                self.done.put((envelope, request, fault, arrays, images))
            self.wake()

    def shoot(self, names: set[str]) -> dict[str, tuple[dict[str, Any], bytes]]:
        """Camera -> description and bytes of one image; raises RuntimeError where there is no OpenGL."""
        if self.twin is None:
            import gymnasium as gym

            self.twin = gym.make(self.args.env_id).unwrapped.sim
        arm, size = self.control.arm, self.args.image_size
        arm.scene_ready.clear()
        arm.scene_wanted.set()
        if not arm.scene_ready.wait(1.0):
            raise RuntimeError("the simulation stands still")
        taken, scene, self.seq = time.monotonic(), dict(arm.scene), self.seq + 1
        about = {"dtype": "|u1", "shape": [size, size, 3], "seq": self.seq, "robot_time": scene.pop("time")}
        self.twin.set_state(scene)
        images = {name: self.twin.render(name, size, size).tobytes() for name in names}
        age = time.monotonic() - taken
        return {name: (about | {"name": name, "age": age}, image) for name, image in images.items()}


# --- Server -----------------------------------------------------------------------------------------------------------
def number(name: str, value: object, low: float, high: float) -> float:
    """A finite float within bounds; raises Refused otherwise."""
    if type(value) not in (int, float) or not low <= value <= high:  # NaN fails, too
        raise Refused("bad_argument", f"{name}: give a number from {low:g} to {high:g}, not {value!r:.40}")
    return float(value)


def vector(name: str, value: object, size: int) -> np.ndarray:
    """(size,) floats, maybe not finite; raises Refused for anything else."""
    if not isinstance(value, list) or len(value) != size or any(type(x) not in (int, float) for x in value):
        raise Refused("bad_argument", f"{name}: give {size} numbers")
    return np.array(value, np.float64)


def text(name: str, value: object, low: int, high: int) -> str:
    if not isinstance(value, str) or not low <= len(value) <= high or not value.isprintable():
        raise Refused("bad_argument", f"{name}: give a text of {low} to {high} characters")
    return value


def nests_deeper(value: object, levels: int) -> bool:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels == 0 or any(nests_deeper(item, levels - 1) for item in items if isinstance(item, dict | list))


class Server:
    """Answers requests and publishes the state, in the main thread. Methods `op_*` are the operations of the header."""

    LEASED = ("release", "target", "gains", "start", "move_joints", "reset", "recover", "gripper", "reset_task")

    def __init__(self, args: Args):
        self.args, self.id, self.stopping, self.seen, self.stale = args, secrets.token_hex(4), False, 0.0, 0.0
        self.name, self.token, self.ttl, self.seq = None, b"", 1.0, None  # of the lease
        self.jobs: OrderedDict[str, Job] = OrderedDict()
        self.refusals, self.complained = Counter(), 0.0
        self.open_sockets()  # before the robot thread: theirs must not inherit its real-time priority
        hand = "sim" if args.robot == "sim" else "franka-hand"
        try:
            self.gripper = GRIPPERS[hand if args.gripper == "auto" else args.gripper](args)
        except GripperError as error:
            fail(str(error))
        self.control = Control(args, self.gripper)
        self.renderer = Renderer(args, self.control, lambda: self.waker.send(b""))
        for thread in (self.gripper.thread, self.renderer, self.control):
            thread.start()
        self.control.ready.wait()
        if self.control.failure:
            fail(self.control.failure)
        self.ops = {name[3:]: getattr(self, name) for name in dir(self) if name.startswith("op_")}
        self.parameters = {name: dict(inspect.signature(op).parameters) for name, op in self.ops.items()}
        for parameters in self.parameters.values():
            if parameters.pop("changes", None):
                parameters |= {f.name: f for f in fields(Gains)}

    def open_sockets(self) -> None:
        args, context = self.args, zmq.Context.instance()
        self.router, self.publisher = sockets = context.socket(zmq.ROUTER), context.socket(zmq.PUB)
        if args.keys:
            try:
                public, secret = zmq.auth.load_certificate(Path(args.keys) / "server.key_secret")
            except OSError as error:
                fail(f"--keys {args.keys}: {error}; make them with --keygen")
            self.authenticator = ThreadAuthenticator(context)
            self.authenticator.start()
            self.authenticator.configure_curve(domain="*", location=args.keys)  # every *.key in there may connect
        try:
            for i, s in enumerate(sockets):
                s.linger, s.maxmsgsize, s.rcvhwm, s.sndhwm, s.tcp_keepalive = 0, 1 << 16, 100, 100, 1
                s.heartbeat_ivl, s.heartbeat_timeout = 1000, 3000  # ms: forgets peers whose cable was pulled
                if args.keys:
                    s.curve_publickey, s.curve_secretkey, s.curve_server = public, secret, True
                s.bind(f"tcp://{args.bind}:{args.port + i if args.port else '*'}")
        except zmq.ZMQError as error:
            fail(f"--bind {args.bind} --port {args.port}: {error}; does another server run?")
        self.ports = [int(s.last_endpoint.rsplit(b":", 1)[1]) for s in sockets]
        self.woken, self.waker = context.socket(zmq.PULL), context.socket(zmq.PUSH)
        self.woken.bind("inproc://wake")
        self.waker.connect("inproc://wake")

    def serve(self) -> None:
        """Until a signal."""
        for number_ in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number_, self.signalled)
        print(f"serving on tcp://{self.args.bind}:{self.ports[0]} (state: {self.ports[1]})", flush=True)
        log.info("serving %s on %s %s", self.args.robot, self.args.bind, self.ports)
        poller, due, shown = zmq.Poller(), time.monotonic(), 0.0
        poller.register(self.router, zmq.POLLIN)
        poller.register(self.woken, zmq.POLLIN)
        while not self.stopping:
            before = time.monotonic()
            poller.poll(max(0, math.ceil((due - before) * 1000)))
            for _ in range(20):  # then the state has its turn
                if not self.answer():
                    break
            if time.monotonic() - self.control.ticked > 0.01:  # the robot thread must not starve in a flood of requests
                time.sleep(0.002)
            while self.woken.poll(0):
                self.woken.recv()
            while not self.renderer.done.empty():
                envelope, request, fault, arrays, images = self.renderer.done.get()
                self.reply(envelope, request, {"arrays": arrays}, fault and Refused("unavailable", fault), images)
            now = time.monotonic()
            self.watch(now - before)
            if now >= due:
                due = max(due + 0.01, now)
                self.publisher.send(self.packed({"op": "state"}, self.op_state()), zmq.DONTWAIT)
            if now - shown > 0.25:
                shown = now
                self.show(now)
        self.shut_down()

    def signalled(self, number_: int, _) -> None:
        if self.stopping:
            os._exit(1)
        self.stopping = True
        log.info("%s", signal.Signals(number_).name)

    def shut_down(self) -> None:
        self.control.stopping.set()
        self.gripper.stopping.set()
        self.control.join(8)
        self.router.close(0)
        self.publisher.close(0)
        if hangs := self.control.is_alive():
            log.error("the robot's SDK does not return")
            print("\nthe robot's SDK does not return: use the stop button", file=sys.stderr)
        log.info("end")
        logging.shutdown()
        print(end="\n" * sys.stdout.isatty(), flush=True)
        os._exit(1 if hangs else 0)  # not through the SDKs' destructors: they may abort

    def watch(self, passed: float) -> None:
        """The robot thread itself may hang inside an SDK. Only time in which this thread ran counts."""
        c, tick = self.control, self.control.ticked
        self.stale, self.seen = 0.0 if tick != self.seen else self.stale + min(passed, 0.012), tick
        limit = 0.5 if c.phase == "idle" or c.arm.has_task else self.args.frozen_after_s  # a busy machine is no fault
        if self.stale > limit and time.monotonic() > c.may_block_until and c.fault is None:
            c.latch("frozen", "the robot thread hangs in the SDK: connection lost?")

    def answer(self) -> bool:
        """Receives one request and answers it; False when there is none."""
        try:
            frames = self.router.recv_multipart(zmq.DONTWAIT)
        except zmq.Again:
            return False
        cut = frames.index(b"", 1) + 1 if b"" in frames[1:4] else 1
        envelope, request, result, refused = frames[:cut], {}, None, None
        try:
            request = self.parse(frames[cut:])
            result = self.carry_out(envelope, request)
            if result is None:
                return True  # answered later
        except Refused as error:
            refused = error
        except Exception:
            log.exception("request")
            refused = Refused("internal", "a bug, see the server's log")
        self.reply(envelope, request, result, refused)
        return True

    def parse(self, body: list[bytes]) -> dict[str, Any]:
        """The request, with fields of the right types; raises Refused."""
        if len(body) != 1:
            raise Refused("malformed", f"{len(body)} frames, send one")
        limits = {"max_str_len": 256, "max_bin_len": 0, "max_ext_len": 0, "max_array_len": 64, "max_map_len": 64}
        try:
            request = msgpack.unpackb(body[0], **limits)
        except (ValueError, RecursionError) as error:
            raise Refused("malformed", f"no msgpack within the limits: {str(error)[:80]}") from None
        if not isinstance(request, dict):
            raise Refused("malformed", "not a map")
        if type(request.get("v")) is not int or request["v"] != PROTOCOL_VERSION:
            raise Refused("version", f"this server speaks version {PROTOCOL_VERSION}")
        types = {"v": int, "op": str, "id": (int, str), "token": str, "args": dict}
        for key, value in request.items():
            if key not in types or not isinstance(value, types[key]) or isinstance(value, bool):
                raise Refused("malformed", f"{key!r:.40}: unknown, or of the wrong type")
        if len(str(request.get("id", ""))) > 64:
            raise Refused("malformed", "id: at most 64 characters")
        if nests_deeper(request, 8):
            raise Refused("malformed", "nested too deep")
        return request

    def carry_out(self, envelope: list[bytes], request: dict[str, Any]) -> dict[str, Any] | None:
        """The result, None when the renderer will have it; raises Refused."""
        op, arguments, token = request.get("op"), request.get("args", {}), request.get("token", "").encode()
        if op not in self.ops:
            raise Refused("unknown_op", f"{op!r:.40}: there are {' '.join(self.ops)}")
        known = self.parameters[op]
        if wrong := arguments.keys() - known.keys():
            raise Refused("bad_argument", f"{op} has no {min(wrong, key=str)!r:.40}, it has {[*known]}")
        if missing := [n for n, p in known.items() if n not in arguments and p.default is inspect.Parameter.empty]:
            raise Refused("bad_argument", f"{op} needs {missing[0]!r}")
        if (holder := self.holder()) and secrets.compare_digest(token, self.token):
            self.control.lease_until = time.monotonic() + self.ttl
        elif op in self.LEASED:
            raise Refused("no_lease", f"the lease is {holder}'s" if holder else "acquire a lease first: yours ended")
        if op != "frames":
            return self.ops[op](**arguments)
        self.renderer.requests.put((envelope, request, self.op_frames(**arguments)))
        return None

    def holder(self) -> str | None:
        return self.name if time.monotonic() <= self.control.lease_until else None

    def packed(self, request: dict[str, Any], result: Any, error: Refused | None = None) -> bytes:
        if error:
            self.refusals[error.code] += 1
        c, now = self.control, time.monotonic()
        return msgpack.packb(
            {
                "v": PROTOCOL_VERSION,
                "id": request.get("id"),
                "op": request.get("op"),
                "ok": error is None,
                "error": {"code": error.code, "message": str(error)} if error else None,
                "result": None if error else result,
                "server_id": self.id,
                "server_time": now,
                "robot_time": c.state.time,
                "state_age": now - c.state.at,
                "mode": c.mode,
                "reference": c.limiter.reference.tolist(),
                "lease": self.holder(),
                "fault": c.fault,
                "seq": self.seq,
            }
        )

    def reply(self, envelope, request: dict[str, Any], result: Any, error: Refused | None = None, raw=()) -> None:
        with contextlib.suppress(zmq.ZMQError):  # a peer that is gone, or does not read
            self.router.send_multipart([*envelope, self.packed(request, result, error), *raw], zmq.DONTWAIT)

    def show(self, now: float) -> None:
        """The terminal's status line; refusals go to the log, in sums."""
        c, s = self.control, self.control.state
        if self.refusals and now - self.complained > 10:
            log.warning("refused: %s", dict(self.refusals))
            self.refusals, self.complained = Counter(), now
        if sys.stdout.isatty():
            x, y, z = s.tcp_pose[:3]
            line = (
                f"{c.mode:9} lease {self.holder() or '-':8} {s.time:8.2f} s  xyz {x:6.3f} {y:6.3f} {z:6.3f} m  force "
            )
            line += (
                f"{norm(s.wrench[:3]):4.1f} N  width {self.gripper.state.width:5.3f} m  link {s.success_rate:4.0%}  "
            )
            line += f"late {c.overruns}  " + (f"{c.fault['code']}: {c.fault['message']}" if c.fault else c.held)
            print("\r" + line[: shutil.get_terminal_size().columns - 1] + "\x1b[K", end="", flush=True)

    # Operations
    def op_hello(self) -> dict[str, Any]:
        args, g = self.args, self.gripper
        limits = {name: value for name, value in vars(args).items() if name.startswith(("max_", "workspace_"))}
        limits |= {"max_rotational_stiffness": args.max_stiffness / 10, "max_rotational_clip": args.max_clip * 10}
        versions = {"python": platform.python_version(), "platform": platform.platform(), "pyzmq": zmq.__version__}
        cameras = args.cameras if self.control.arm.has_task else ()
        return {
            "protocol": PROTOCOL_VERSION,
            "server_id": self.id,
            "server": versions | {"control_hz": args.control_hz, "publish_hz": 100.0},
            "robot": self.control.arm.info,
            "gripper": {"kind": g.kind, "max_width": g.max_width, "max_force": g.max_force, "max_speed": g.max_speed},
            "cameras": [{"name": name, "height": args.image_size, "width": args.image_size} for name in cameras],
            "limits": limits,
            "watchdog": {"hold_s": args.hold_after_s, "stop_s": args.stop_after_s, "frozen_s": args.frozen_after_s},
            "gains": asdict(self.control.wanted_gains),
            "reset_joints": list(args.reset_joints),
            "lease": self.holder(),
        }

    def op_state(self) -> dict[str, Any]:
        c, g, s = self.control, self.gripper.state, self.control.state
        return {
            **{name: getattr(s, name).tolist() for name in ("tcp_pose", "tcp_vel", "q", "dq")},
            "tcp_force": s.wrench[:3].tolist(),
            "tcp_torque": s.wrench[3:].tolist(),
            **{f"gripper_{name}": value for name, value in vars(g).items()},
            **{"robot_mode": s.robot_mode, "errors": s.errors, "success_rate": s.success_rate},
            **{"overruns": c.overruns, "reflexes": c.reflexes, "limited": c.limiter.limited},
        }

    def op_acquire(self, name, token, ttl=1.0, takeover=False) -> dict[str, Any]:
        text("name", name, 1, 32)
        token, ttl, holder = text("token", token, 16, 64).encode(), number("ttl", ttl, 0.2, 10), self.holder()
        if type(takeover) is not bool:
            raise Refused("bad_argument", "takeover: give true or false")
        if holder is None or not secrets.compare_digest(token, self.token):
            if holder and not takeover:
                raise Refused("lease_taken", f"{holder} has the lease; takeover=true takes it")
            log.info("lease: %s%s", name, f", taken from {holder}" if holder else "")
            self.seq, c = None, self.control
            c.lease_began, c.target_at = time.monotonic(), min(c.target_at, time.monotonic() - self.args.hold_after_s)
            self.let_tick()  # the old one's job ends, or its target
        self.name, self.token, self.ttl, self.control.lease_until = name, token, ttl, time.monotonic() + ttl
        return {"ttl": ttl}

    def let_tick(self) -> None:
        """Waits, not for long, until the robot thread has seen what was just asked for, so that the reply shows it."""
        asked = time.monotonic()
        while self.control.ticked < asked and time.monotonic() < asked + 0.02:
            time.sleep(0.0005)

    def op_release(self) -> dict[str, Any]:
        self.control.lease_until = -math.inf
        self.let_tick()
        return {}

    def op_target(self, pose, seq=None) -> dict[str, Any]:
        c, target = self.control, vector("pose", pose, 7)
        self.ready_for("target")
        if seq is not None:
            if type(seq) is not int:
                raise Refused("bad_argument", "seq: give a whole number")
            if self.seq is not None and seq <= self.seq:
                raise Refused("stale", f"seq {seq} after {self.seq}")
        if reason := c.limiter.refusal(target, c.limiter.reference):
            raise Refused("refused", reason)
        self.seq, c.target, c.target_at = self.seq if seq is None else seq, target, time.monotonic()
        if c.phase == "hold":
            self.let_tick()
        return self.op_state()

    def ready_for(self, op: str) -> None:
        """Raises Refused if the mode does not allow `op`: target, or an arm's job."""
        c = self.control
        if c.job is not None:
            raise Refused("busy", f"{c.job.op} is going on")
        if c.fault is not None and op != "recover":
            raise Refused("fault", f"{c.fault['code']}: {c.fault['message']}; look at the robot, then recover")
        if op == "target" and c.held:
            raise Refused("held", f"{c.held}; start again")
        if op == "target" and c.phase not in ("streaming", "hold"):
            raise Refused("not_streaming", "start first: the controller does not run")

    def op_gains(self, **changes) -> dict[str, Any]:
        self.control.wanted_gains = gains = self.changed_gains(changes)
        return asdict(gains)

    def changed_gains(self, changes: dict[str, Any]) -> Gains:
        values = asdict(self.control.wanted_gains)
        for name, value in changes.items():
            clip = name.endswith("clip")
            values[name] = tuple(vector(name, value, 3).tolist()) if clip else number(name, value, 0, 1e5)
        check_gains(values, self.args)
        return Gains(**values)

    def op_hold(self) -> dict[str, Any]:
        self.control.hold_wish = "a client asked to hold", time.monotonic()
        self.let_tick()
        return {}

    def op_stop(self) -> dict[str, Any]:
        self.control.stop_wish = "a client asked to stop", time.monotonic()
        self.let_tick()
        return {}

    def op_job(self, handle) -> dict[str, Any]:
        if text("handle", handle, 8, 64) not in self.jobs:
            raise Refused("unknown_handle", f"no job {handle}")
        return self.jobs[handle].report()

    def begin(
        self, handle: object, op: str, steps: Iterator[None], submit: Callable[[Job], None] | None = None
    ) -> dict:
        """A new job of the arm, or with `submit` of the gripper; with a known handle how that one goes."""
        if text("handle", handle, 8, 64) not in self.jobs:
            job = Job(handle, op, steps)
            if submit:
                submit(job)
            else:
                self.ready_for(op)
                self.control.job = job
            self.jobs[handle] = job
            if len(self.jobs) > 256:
                self.jobs.popitem(last=False)
        return self.jobs[handle].report()

    def op_start(self, handle, **changes) -> dict[str, Any]:
        gains = self.changed_gains(changes)
        return self.begin(handle, "start", self.control.start_streaming(gains))

    def op_move_joints(self, handle, q, speed=0.2) -> dict[str, Any]:
        q, speed = vector("q", q, 7), number("speed", speed, 0.01, 1)
        if not within_joint_limits(q):  # nor is NaN
            raise Refused("bad_argument", f"q: {JOINT_LIMITS_TEXT}")
        return self.begin(handle, "move_joints", self.control.move_joints(q, speed))

    def op_reset(self, handle, speed=0.2) -> dict[str, Any]:
        speed = number("speed", speed, 0.01, 1)
        return self.begin(handle, "reset", self.control.move_joints(None, speed))

    def op_recover(self, handle) -> dict[str, Any]:
        return self.begin(handle, "recover", self.control.recover())

    def op_gripper(self, handle, action, width=None, speed=1.0, force=0.5) -> dict[str, Any]:
        if self.gripper.kind == "none":
            raise Refused("unavailable", "there is no gripper")
        if action not in ("open", "close", "move", "activate", "stop"):
            raise Refused("bad_argument", "action: give open, close, move, activate or stop")
        width = number("width", width, 0, self.gripper.max_width) if action == "move" or width is not None else 0.0
        speed, force = number("speed", speed, 0, 1), number("force", force, 0, 1)
        return self.begin(
            handle, "gripper", iter(()), lambda job: self.gripper.submit(job, action, width, speed, force)
        )

    def need_scene(self) -> None:
        if not self.control.arm.has_task:
            raise Refused("unavailable", "only the simulated robot has this")

    def op_frames(self, cameras=None) -> list[str]:
        self.need_scene()
        names = list(self.args.cameras) if cameras is None else cameras
        if not isinstance(names, list) or not all(isinstance(n, str) and n in self.args.cameras for n in names):
            raise Refused("bad_argument", f"cameras: give some of {list(self.args.cameras)}")
        if self.renderer.requests.qsize() > 100:
            raise Refused("busy", "too many requests for frames are waiting")
        return names

    def op_task(self) -> dict[str, Any]:
        self.need_scene()
        return {"env_id": self.args.env_id} | self.control.arm.task

    def op_reset_task(self, handle, seed=None) -> dict[str, Any]:
        self.need_scene()
        seed = None if seed is None else int(number("seed", seed, 0, 2**31))
        return self.begin(handle, "reset_task", self.control.reset_task(seed))


# --- Doctor -----------------------------------------------------------------------------------------------------------
def examine(args: Args) -> Iterator[tuple[bool | None, str, str]]:
    """(whether it is all right, None for advice; what was looked at; the fix) for every check."""
    yield sys.version_info >= (3, 11), f"Python {platform.python_version()}", "Python 3.11 or newer"
    packages = {"sim": ["mujoco==4.0.0", "gymnasium==1.4.0"], "franky": ["franky-control==2.0.0"]}
    wanted = ["msgpack", "pyzmq", "numpy", *packages.get(args.robot, ["panda-python==1.1.1"])]
    for package in wanted + ["pymodbus==3.16.1", "pyserial==3.5"] * (args.gripper == "robotiq"):
        name = package.partition("==")[0]
        try:
            yield True, f"{name} {importlib.metadata.version(name)}", ""
        except importlib.metadata.PackageNotFoundError:
            yield False, f"{name} is not installed", f"pip install {package}"
    with socket.socket() as probe:
        taken = bool(args.port) and probe.connect_ex(("127.0.0.1", args.port)) == 0
        yield None if taken else True, f"port {args.port} is {'taken' if taken else 'free'}", "another server? --port"
    if args.gripper == "robotiq":
        port = args.gripper_port
        yield os.path.exists(port), f"serial port {port}", "is missing: plug in the gripper's USB adapter"
        access = os.access(port, os.R_OK | os.W_OK)
        yield access, f"permission for {port}", "sudo usermod -aG dialout $USER, log in again"
    if args.robot != "sim":
        yield from examine_robot(args.robot_ip)


def examine_robot(ip: str) -> Iterator[tuple[bool | None, str, str]]:
    """The parts of `examine` that only a real arm needs."""
    import resource

    realtime = "PREEMPT_RT" in platform.version().replace(" ", "_")
    fix = "a real-time kernel: sudo pro enable realtime-kernel (Ubuntu), apt install linux-image-rt-amd64 (Debian)"
    yield realtime or None, f"kernel {platform.release()} {'with' if realtime else 'without'} PREEMPT_RT", fix
    limit = resource.getrlimit(resource.RLIMIT_RTPRIO)[0]
    allowed = os.geteuid() == 0 or limit == resource.RLIM_INFINITY or limit >= 99
    fix = "/etc/security/limits.conf: @realtime - rtprio 99; sudo groupadd realtime; sudo usermod -aG realtime $USER"
    yield allowed, f"real-time priority {'allowed' if allowed else 'not allowed'}", fix
    files = Path("/sys/devices/system/cpu").glob("cpu*/cpufreq/scaling_governor")
    governors = {path.read_text().strip() for path in files}
    fix = "sudo cpupower frequency-set -g performance"
    yield governors <= {"performance"} or None, f"CPU governor {' '.join(governors) or 'not shown'}", fix
    fix = "cable into the control cabinet, this PC in its subnet, brakes open, FCI activated in Desk"
    try:
        yield True, f"robot at {ip}: interface version {reach(ip)}", fix
    except ArmError:
        yield False, f"robot at {ip} does not answer", fix
    if not shutil.which("ping"):
        yield None, "round trip not measured", "sudo apt install iputils-ping"
        return
    ping = subprocess.run(["ping", "-q", "-c", "20", "-i", "0.2", "-s", "1200", ip], capture_output=True, text=True)
    times = re.search(r"= [\d.]+/([\d.]+)/([\d.]+)", ping.stdout)
    fix = "a cable of its own without a switch; energy saving off: sudo ethtool --set-eee INTERFACE eee off"
    good = times is not None and float(times[2]) < 1
    yield good, f"round trip: mean {times[1]} ms, longest {times[2]} ms" if times else "no answer to ping", fix


def run_doctor(args: Args) -> int:
    """Prints a line per check; the number of those that failed."""
    failed = 0
    for good, what, fix in examine(args):
        failed += good is False
        print(f"ok    {what}" if good else f"{'note' if good is None else 'FIX '}  {what}: {fix}", flush=True)
    print(f"{failed} to fix" if failed else "ready")
    return failed


# --- Main -------------------------------------------------------------------------------------------------------------
def make_keys(folder: Path) -> None:
    if folder.exists():
        fail(f"--keygen: {folder} exists; take another folder, or remove it and give every client the new keys")
    folder.mkdir(parents=True, mode=0o700)
    for name in ("server", "client"):
        os.chmod(zmq.auth.create_certificates(folder, name)[1], 0o600)
    print(f"wrote {folder}: copy server.key, client.key and client.key_secret to the client's machine, nothing else")


def main(args: Args) -> None:
    check(args)
    if args.keygen:
        return make_keys(Path(args.keys))
    if args.doctor:
        raise SystemExit(1 if run_doctor(args) else 0)
    try:
        handler = logging.handlers.RotatingFileHandler(args.log_file, maxBytes=5_000_000, backupCount=3)
    except OSError as error:
        fail(f"--log-file {args.log_file}: {error}")
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO, handlers=[handler])
    sys.setswitchinterval(5e-4)  # a thread that computes gives way to the robot thread after 0.5 ms
    Server(args).serve()


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
