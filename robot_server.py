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
            stands; busy: a job moves the arm; fault: latched until `recover`
error codes malformed version unknown_op bad_argument: the request; no_lease lease_taken; fault held not_streaming busy:
            the server's mode; refused: by the limiter, with the reason; stale; unavailable; unknown_handle; internal

operation (L: needs the lease's token, J: a job, see below)
hello {}    -> protocol, server_id, server, robot, gripper, cameras, limits, watchdog, gains, reset_joints
state {}    -> tcp_pose (7), tcp_vel (6), tcp_force (3), tcp_torque (3): of the surroundings on the tcp, in base axes;
            q (7), dq (7), gripper_width, gripper_moving, gripper_holding, gripper_fault (text or None), robot_mode
            (idle move guiding reflex user_stopped error_recovery other), errors (texts), success_rate, overruns
            (control ticks over 5 ms late), reflexes (since the start), limited (limits that act: box tilt speed clip)
acquire {name, token, ttl=1, takeover=False} -> ttl. The client makes up the token (16 to 64 characters); the same one
            again renews the lease, as any request with the token does. Without any for `ttl` s: hold, no lease.
release {}  L; the arm holds, and after 2 s stops.
target {pose, seq=None}  L, streaming or in the watchdog's hold -> limited. A seq must be above the last one of this lease.
gains {stiffness, damping, rotational_stiffness, rotational_damping, clip (3), rotational_clip (3), nullspace_stiffness}
            L, any of them -> all. The controller's force is at most stiffness x clip.
hold {}     from anyone: reference stands, a job is broken off; targets are refused until `start`
stop {}     from anyone: soft stop, then idle
start {handle, any gains}  L J: streaming, from the measured pose
move_joints {handle, q (7), speed=0.2}  L J: speed is a fraction of the joints' limits; idle after it
reset {handle, speed=0.2}  L J: move_joints to --reset-joints
recover {handle}  L J: ends fault and reflex, re-seeds the reference at the measured pose; idle after it
gripper {handle, action: open close move activate stop, width, speed=1.0, force=0.5}  L J: speed and force are
            fractions; beside arm jobs; a newer one supersedes
job {handle} -> handle, op, status: queued running done failed, error (text or None), seconds
frames {cameras=all} -> arrays: [{name, shape, dtype, seq, robot_time, age}], one raw frame each. Simulated robot only.
task {}     -> env_id, success, observation, expert: {pose (7), close} where the task's scripted expert goes next. Simulated
            robot only.
reset_task {handle, seed=None}  L J, idle: the task's reset, arm included. Simulated robot only.
A job's handle is made up by the client (8 to 64 characters). The same handle again does not start anything again but
answers as `job` does: so every request but `target` with a seq may be repeated. A job ends when the lease does.

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

PROTOCOL = 1
log = logging.getLogger("robot_server")


# --- Args -------------------------------------------------------------------------------------------------------------
@dataclass
class Gains:
    """Of the Cartesian impedance controller; the defaults are SERL's. Force <= stiffness x clip."""

    stiffness: float = 2000.0
    """N/m"""
    damping: float = 89.0
    """Ns/m"""
    rotational_stiffness: float = 150.0
    """Nm/rad"""
    rotational_damping: float = 7.0
    """Nms/rad"""
    clip: tuple[float, float, float] = (0.01, 0.01, 0.01)
    """largest distance of the reference from the measured position, per base axis, m"""
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
    workspace_low: tuple[float, float, float] = (0.2, -0.4, 0.01)  # TASK: the box in which the tcp may move
    """smallest x, y, z of the reference, m"""
    workspace_high: tuple[float, float, float] = (0.7, 0.4, 0.6)
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
    """the robot's time stands still for this long: fault"""
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
    numbers = [(name, value) for name, value in vars(args).items() if type(value) in (int, float, tuple)]
    numbers += [(f"gains.{name}", value) for name, value in vars(args.gains).items()]
    for name, value in numbers:
        values = [x for x in np.ravel(value).tolist() if not isinstance(x, str)]
        low = -math.inf if name in ("reset_joints", "workspace_low", "workspace_high") else 0
        if not all(math.isfinite(x) and x >= low for x in values):
            fail(f"{flag(name)} {value}: give finite numbers{', not negative ones' if low == 0 else ''}")
        if name.startswith("max_") and name != "max_force" and not value:
            fail(f"{flag(name)} 0: nothing could move")
    if not all(low < high for low, high in zip(args.workspace_low, args.workspace_high)):
        fail(f"--workspace-low {args.workspace_low}: must be below --workspace-high {args.workspace_high}")
    if not 200 <= args.control_hz <= 1000:
        fail(f"--control-hz {args.control_hz}: give 200 to 1000")
    if not args.frozen_after_s > 0 or not 0 < args.hold_after_s <= args.stop_after_s:
        fail("--frozen-after-s, --hold-after-s, --stop-after-s: give numbers above 0, hold before stop")
    if args.sim_speed and args.sim_speed < 0.1:
        fail(f"--sim-speed {args.sim_speed}: give 0 (as fast as it can) or at least 0.1")
    if not 8 <= args.image_size <= 1280 or not 0 <= args.port <= 65534:
        fail(f"--image-size {args.image_size} --port {args.port}: give 8 to 1280 pixels and a port from 0 to 65534")
    if args.gripper == "sim" and args.robot != "sim":
        fail("--gripper sim: only with --robot sim")
    if args.gripper == "franka-hand" and args.robot == "sim":
        fail("--gripper franka-hand: needs --robot franky or panda-py")
    try:
        check_gains(asdict(args.gains), args)
    except Refused as error:
        fail(f"--gains: {error}")
    if args.bind not in ("127.0.0.1", "localhost", "::1") and not args.keys and not args.insecure_lan:
        fail(f"--bind {args.bind}: a network needs --keys DIR (make them with --keygen), or --insecure-lan")
    if args.keygen and not args.keys:
        fail("--keygen: name the folder to make, --keys DIR")


class Refused(Exception):  # noqa: N818
    """A request that is not carried out: error code, and what to tell the client."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


def check_gains(gains: dict[str, Any], args: Args) -> None:
    """Raises Refused for gains beyond the limits, or damped so weakly or strongly that the arm would oscillate."""
    bounds = {"": (args.max_stiffness, args.max_clip), "rotational_": (args.max_stiffness / 10, args.max_clip * 10)}
    for prefix, (max_stiffness, max_clip) in bounds.items():
        stiffness, damping, clip = (gains[prefix + name] for name in ("stiffness", "damping", "clip"))
        if not 0 < stiffness <= max_stiffness:
            raise Refused("bad_argument", f"{prefix}stiffness {stiffness}: give more than 0, at most {max_stiffness:g}")
        if not 0.25 <= damping / (2 * math.sqrt(stiffness)) <= 2:  # of unit mass; SERL: 1 and 0.29
            low, high = 0.5 * math.sqrt(stiffness), 4 * math.sqrt(stiffness)
            raise Refused(
                "bad_argument", f"{prefix}damping {damping}: give {low:.1f} to {high:.1f} with this stiffness"
            )
        fastest = args.max_rotation_speed if prefix else args.max_speed  # that the spring reaches against the damper
        if max(clip) * stiffness / damping > fastest:
            raise Refused(
                "bad_argument", f"{prefix}stiffness x clip / damping: at most {fastest:g}, the speed it allows"
            )
        if not all(0 < c <= max_clip for c in clip):
            raise Refused("bad_argument", f"{prefix}clip {clip}: give more than 0, at most {max_clip:g}")
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


def quat_from_matrix(m: np.ndarray) -> np.ndarray:
    """(4,) x, y, z, w of a (3, 3) rotation matrix: the column of the largest entry in Shepperd's table."""
    t = [
        1 + m[0, 0] - m[1, 1] - m[2, 2],
        1 - m[0, 0] + m[1, 1] - m[2, 2],
        1 - m[0, 0] - m[1, 1] + m[2, 2],
        1 + m.trace(),
    ]
    xy, xz, yz = m[0, 1] + m[1, 0], m[0, 2] + m[2, 0], m[1, 2] + m[2, 1]
    wx, wy, wz = m[2, 1] - m[1, 2], m[0, 2] - m[2, 0], m[1, 0] - m[0, 1]
    table = ([t[0], xy, xz, wx], [xy, t[1], yz, wy], [xz, yz, t[2], wz], [wx, wy, wz, t[3]])
    quat = np.array(table[int(np.argmax(t))])
    return quat / np.linalg.norm(quat)


class Limiter:
    """Turns the target, whatever it is, into a reference that an arm may follow. Used from the robot thread only."""

    def __init__(self, args: Args):
        self.args, self.limited = args, []
        self.low, self.high = np.array(args.workspace_low), np.array(args.workspace_high)
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
        if (jump := float(np.linalg.norm(target[:3] - reference[:3]))) > self.args.max_jump:
            return f"the target jumps {jump:.3f} m from the reference, --max-jump is {self.args.max_jump}"
        turn = float(np.linalg.norm(rotation_between(target[3:] / length, reference[3:])))
        if turn > self.args.max_rotation_jump:
            return f"the target turns {turn:.2f} rad from the reference, --max-rotation-jump is {self.args.max_rotation_jump}"
        return None

    def step(self, target: np.ndarray | None, measured: np.ndarray, gains: Gains, dt: float) -> None:
        """Moves the reference by `dt` towards the target (7,), or lets it stand (None), within all limits.

        In this order: box and tilt for the goal; speed and acceleration for the way there; then per axis not further
        than the clip from the measured pose, so that the controller's force is bounded and nothing winds up.
        """
        old, self.limited = self.reference, []
        new = old.copy()
        if target is None or dt <= 0 or not np.isfinite(target).all():
            self.velocity = np.zeros(6)
        else:
            position = np.clip(target[:3], self.low, self.high)
            quat, tilted = self.upright(target[3:] / np.linalg.norm(target[3:]))
            self.limited = ["box"] * bool((position != target[:3]).any()) + ["tilt"] * tilted
            a, (v, w) = self.args, (self.velocity[:3], self.velocity[3:])
            v, fast = approach(position - old[:3], v, a.max_speed, a.max_acceleration, dt)
            turn = rotation_between(quat, old[3:])
            w, spins = approach(turn, w, a.max_rotation_speed, a.max_rotation_acceleration, dt)
            self.limited += ["speed"] * (fast or spins)
            self.velocity = np.concatenate([v, w])
            new[:3] = np.clip(old[:3] + v * dt, np.minimum(self.low, old[:3]), np.maximum(self.high, old[:3]))
            new[3:] = quat_multiply(quat_from_rotvec(w * dt), old[3:])
        lag = np.concatenate([new[:3] - measured[:3], rotation_between(new[3:], measured[3:])])
        bound = np.array([*gains.clip, *gains.rotational_clip])
        if (np.abs(lag) > bound).any():
            self.limited.append("clip")
            lag = np.clip(lag, -bound, bound)
            new[:3] = measured[:3] + lag[:3]
            new[3:] = quat_multiply(quat_from_rotvec(lag[3:]), measured[3:])
            if dt > 0:  # go on from how the reference really moved, but never faster than before
                moved = np.concatenate([new[:3] - old[:3], rotation_between(new[3:], old[3:])]) / dt
                for part in (slice(0, 3), slice(3, 6)):
                    speed, limit = np.linalg.norm(moved[part]), np.linalg.norm(self.velocity[part])
                    self.velocity[part] = moved[part] * min(1.0, limit / max(speed, 1e-9))
        new[3:] /= np.linalg.norm(new[3:])
        self.reference = new

    def upright(self, quat: np.ndarray) -> tuple[np.ndarray, bool]:
        """The rotation (4,), tilted back as far as --max-tilt needs, and whether it needs."""
        x, y, z, w = quat.tolist()
        tool = np.array([2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)])  # the tool's z axis
        tilt = math.acos(min(max(-tool[2], -1.0), 1.0))
        if tilt <= self.args.max_tilt:
            return quat, False
        axis = np.cross(tool, (0, 0, -1))
        axis = axis / np.linalg.norm(axis) if np.linalg.norm(axis) > 1e-6 else np.array([1.0, 0, 0])
        return quat_multiply(quat_from_rotvec(axis * (tilt - self.args.max_tilt)), quat), True


def approach(
    error: np.ndarray, velocity: np.ndarray, max_speed: float, max_acceleration: float, dt: float
) -> tuple[np.ndarray, bool]:
    """Next velocity (3,) towards a goal at distance `error` (3,), which it reaches at rest; whether the speed is capped."""
    distance, change = float(np.linalg.norm(error)), max_acceleration * dt
    braking = change * (math.sqrt(0.25 + 2 * distance / (change * dt)) - 0.5)  # stops within `distance` in steps of dt
    wanted = error * (min(braking, max_speed) / max(distance, 1e-12))
    step = wanted - velocity
    return velocity + step * min(1.0, change / max(float(np.linalg.norm(step)), 1e-12)), braking > max_speed


# --- Arms -------------------------------------------------------------------------------------------------------------
class ArmError(Exception):
    """The robot or its SDK is at fault; `code` is what clients read: reflex, user_stopped, frozen, sdk."""

    def __init__(self, code: str, message: str):
        super().__init__(" ".join(message.split()))
        self.code = code


@dataclass
class ArmState:
    """One measurement; base frame, SI units, quaternions x, y, z, w."""

    time: float
    """the robot's own clock, s"""
    tcp_pose: np.ndarray  # (7,)
    tcp_vel: np.ndarray  # (6,) linear, angular
    wrench: np.ndarray  # (6,) force, torque of the surroundings on the tcp
    q: np.ndarray  # (7,)
    dq: np.ndarray  # (7,)
    robot_mode: str = "idle"
    errors: tuple[str, ...] = ()
    success_rate: float = 1.0
    """share of the last 100 control commands that reached the robot in time"""


class Arm(ABC):
    """A robot arm. Constructed and used by the robot thread alone; no method but `recover` may block for long.

    Every method raises ArmError when the robot or its SDK is at fault.
    """

    has_task = False  # whether there is a simulated scene
    waits = True  # whether ticks follow the clock

    def __init__(self, args: Args):
        self.args = args
        self.info: dict[str, Any] = {"kind": args.robot, "sdk": "", "firmware": None, "task": None}
        self.controlling = False  # whether the impedance controller runs

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
        """Clear errors and reflexes, connect again if need be; may block for seconds."""

    def reset(self, speed: float) -> None:
        """Begin to move to the joint positions of --reset-joints."""
        self.move_to_joint_positions(np.array(self.args.reset_joints), speed)

    def close(self) -> None:
        """Let go of the robot."""


JOINT_STIFFNESS = (600.0, 600.0, 600.0, 600.0, 250.0, 150.0, 50.0)  # Nm/rad, libfranka's joint impedance example
JOINT_DAMPING = (50.0, 50.0, 50.0, 50.0, 30.0, 25.0, 15.0)  # Nms/rad


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
        self.sim, self.downwards = self.env.sim, franka_sim.downwards
        self.max_speed = np.array(franka_sim.MAX_JOINT_VELOCITY)
        self.limits = np.array(franka_sim.MIN_JOINT_POSITION), np.array(franka_sim.MAX_JOINT_POSITION)
        self.sim.model.opt.timestep = self.dt
        known = [self.sim.model.camera(i).name for i in range(self.sim.model.ncam)]
        if not set(args.cameras) <= set(known):
            raise ArmError("sdk", f"--cameras {args.cameras}: there are {known}")
        self.info |= {"sdk": f"mujoco {mujoco.__version__}", "task": args.env_id}
        self.waits, self.time, self.reflex, self.task = args.sim_speed > 0, 0.0, "", {}
        self.gripper_command: tuple[float, float, float] | None = None  # width, force, speed
        self.scene, self.scene_wanted, self.scene_ready = {}, threading.Event(), threading.Event()
        self.reset_task(args.seed)

    def reset_task(self, seed: int | None) -> None:
        self.env.reset(seed=seed)
        self.wrench, self.motion, self.task_time = np.zeros(6), None, -math.inf
        self.began, self.done = time.monotonic(), 0  # of stepping in real time
        self.hold_joints()

    def hold_joints(self) -> None:
        model, data = self.sim.model, self.sim.data
        model.actuator_biasprm[:12], data.ctrl[:12], self.controlling = 0, 0, False
        model.jnt_stiffness[:7], model.dof_damping[:7] = JOINT_STIFFNESS, JOINT_DAMPING
        model.qpos_spring[:7] = self.sim.q

    def get_state(self) -> ArmState:
        """Steps the physics up to now, first."""
        sim, due = self.sim, round(1 / (self.args.control_hz * self.dt))
        if self.waits:
            due = int((time.monotonic() - self.began) * self.args.sim_speed / self.dt) - self.done
            if due > 50 * max(self.args.sim_speed, 1):  # the machine stood still: do not run after it
                self.began, self.done, due = time.monotonic(), 0, round(50 * max(self.args.sim_speed, 1))
            else:
                self.done += due
        if command := self.gripper_command:
            sim.set_gripper(*command)
            self.gripper_command = None
        if due > 0:
            sim.step(due)
            self.time += due * self.dt
            self.wrench += (sim.tcp_wrench - self.wrench) * (1 - math.exp(-due * self.dt / 0.02))
            force = float(np.linalg.norm(self.wrench[:3]))
            if force > self.args.collision_force and not self.reflex and (self.controlling or self.motion):
                self.reflex, self.motion = f"cartesian_reflex: {force:.0f} N", None
                self.hold_joints()
        if self.time - self.task_time > 0.05:
            self.task, self.task_time = self.look_at_task(), self.time
        if self.scene_wanted.is_set():
            self.scene_wanted.clear()
            self.scene = sim.get_state() | {"time": self.time}
            self.scene_ready.set()
        mode = "reflex" if self.reflex else "move" if self.controlling or self.motion else "idle"
        errors = (self.reflex,) if self.reflex else ()
        return ArmState(self.time, sim.tcp_pose, sim.tcp_velocity, self.wrench.copy(), sim.q, sim.dq, mode, errors)

    def look_at_task(self) -> dict[str, Any]:
        env, pose = self.env, self.sim.target_pose if self.controlling else self.sim.tcp_pose
        observation = {name: value.tolist() for name, value in env.task_observation().items()}
        env.target = [*pose[:3].tolist(), 0.0, 0.0, 2 * math.atan2(pose[4], pose[3])][: len(env.target)]
        action = env.expert_action().tolist()  # for this target
        goal = [x + scale * a for x, scale, a in zip(env.target, env.action_scale, action)]
        close = len(action) == len(goal) or action[-1] > 0
        expert = {"pose": [*goal[:3], *self.downwards(*goal[3:]).tolist()], "close": close}
        return {"success": bool(env.evaluate()[0]), "observation": observation, "expert": expert}

    def start(self, pose: np.ndarray, q: np.ndarray, gains: Gains) -> None:
        model = self.sim.model
        model.jnt_stiffness[:7], model.dof_damping[:7], model.qpos_spring[:7] = 0, 0.5, q
        self.controlling = True
        self.sim.set_target_pose(pose[:3], pose[3:])
        self.set_gains(gains)

    def stream(self, pose: np.ndarray) -> None:
        self.sim.set_target_pose(pose[:3], pose[3:])

    def set_gains(self, gains: Gains) -> None:
        self.sim.set_impedance(**asdict(gains))

    def stop(self) -> None:
        self.motion = None
        self.hold_joints()

    def move_to_joint_positions(self, q: np.ndarray, speed: float) -> None:
        if (q < self.limits[0]).any() or (q > self.limits[1]).any():
            raise ArmError("refused", f"joint positions {q.tolist()} are beyond the joints' limits")
        self.hold_joints()
        start = self.sim.q
        duration = (
            1.875 * float(np.max(np.abs(q - start) / (speed * self.max_speed))) + 1e-3
        )  # peak speed of the quintic
        self.motion = start, q, self.time, duration

    def moving(self) -> bool:
        if self.motion is None:
            return bool(np.abs(self.sim.dq).max() > 0.02) and not self.reflex
        start, goal, began, duration = self.motion
        s = min((self.time - began) / duration, 1.0)
        self.sim.model.qpos_spring[:7] = start + (10 * s**3 - 15 * s**4 + 6 * s**5) * (goal - start)
        if s == 1 and np.abs(self.sim.q - goal).max() < 2e-3:
            self.motion = None
        elif self.time - began > duration + 3:
            self.motion = None
            raise ArmError("refused", "the arm did not arrive: something is in its way")
        return self.motion is not None

    def recover(self) -> None:
        self.reflex, self.wrench = "", np.zeros(6)
        self.hold_joints()


FRANKY_INDEX = "https://timschneider42.github.io/franky/whl/by-robot-server-version/"
NO_SDK = "--robot {}: {}; pip install {} (Linux x86-64, Python 3.11 to 3.13)"


class FrankyArm(Arm):
    """Through franky 2 (MIT), on its impedance controller: PyPI's wheel for an FR3 with system 5.9 or newer, others from
    franky's own index. libfranka makes the thread that constructs `Robot` a real-time one, and franky's control thread
    inherits from the one that starts a motion: so both happen in the robot thread."""

    def __init__(self, args: Args):
        super().__init__(args)
        try:
            import franky
        except ImportError as error:
            raise ArmError("sdk", NO_SDK.format("franky", error, "franky-control==2.0.0")) from error
        self.franky, self.motion, self.clips = franky, None, None
        self.errors = franky.Exception, RuntimeError, franky.InvalidMotionTypeException, franky.MotionReuseException
        self.info |= {"sdk": f"franky-control {importlib.metadata.version('franky-control')}"}
        self.connect()

    def connect(self) -> None:
        franky, ip = self.franky, self.args.robot_ip
        try:
            self.robot = franky.Robot(ip, realtime_config=franky.RealtimeConfig.Ignore)
            self.robot.set_collision_behavior(self.args.collision_torque, self.args.collision_force)
            self.model, self.motion = self.robot.model, None
        except franky.IncompatibleVersionException as error:
            version = firmware_version(ip)
            line = f"pip install --force-reinstall franky-control --extra-index-url {FRANKY_INDEX}{version or 'N'}/"
            raise ArmError("sdk", f"{error} (the robot speaks version {version}): {line}") from error
        except franky.Exception as error:
            raise ArmError(
                "sdk", f"--robot-ip {ip}: {error} (brakes open, FCI active, cable in the cabinet?)"
            ) from error

    @contextlib.contextmanager
    def faults(self) -> Iterator[None]:
        """franky's exceptions as ours."""
        try:
            yield
        except self.franky.ControlException as error:
            self.motion, self.controlling = None, False
            if "preempted" not in str(error):
                raise ArmError("user_stopped" if "User Stop" in str(error) else "reflex", str(error)) from error
        except self.errors as error:
            raise ArmError("sdk", f"{type(error).__name__}: {error}") from error

    def get_state(self) -> ArmState:
        with self.faults():
            if self.motion is not None:
                self.robot.poll_motion()  # raises what ended the motion
        with self.faults():
            s = self.robot.state
            velocity = self.model.zero_jacobian(self.franky.Frame.EndEffector, s) @ s.dq  # (6, 7) @ (7,)
            mode, errors = s.robot_mode.name, named_errors(s.current_errors)
            pose = np.concatenate([s.O_T_EE.translation, s.O_T_EE.quaternion])
            rate = s.control_command_success_rate if mode == "Move" else 1.0
            wrench = np.array(s.O_F_ext_hat_K)
            return ArmState(s.time.to_msec() / 1e3, pose, velocity, wrench, s.q, s.dq, ROBOT_MODES[mode], errors, rate)

    def start(self, pose: np.ndarray, q: np.ndarray, gains: Gains) -> None:
        self.pose, self.posture, self.gains = pose, q, gains
        self.swap(gains)

    def swap(self, gains: Gains) -> None:
        """A new motion, because clips are fixed at construction; it goes over from the old one without a gap."""
        franky, old = self.franky, self.gains
        with self.faults():
            motion = franky.CartesianImpedanceTrackingMotion(
                translational_stiffness=old.stiffness,
                rotational_stiffness=old.rotational_stiffness,
                posture_task=franky.PostureTask(self.posture, stiffness=gains.nullspace_stiffness),
                max_delta_tau=1.0,
                translational_error_clip=np.array(gains.clip),
                rotational_error_clip=np.array(gains.rotational_clip),
                gains_time_constant=0.1,
            )
            motion.set_gains(self.franky_gains(old))
            motion.set_reference(franky.CartesianReference(target=franky.Affine(self.pose[:3], self.pose[3:])))
            self.robot.move(motion, asynchronous=True)
            motion.set_gains(self.franky_gains(gains))  # smoothed by the control loop
            self.motion, self.controlling, self.gains = motion, True, gains

    def franky_gains(self, gains: Gains):
        stiffness = gains.stiffness, gains.rotational_stiffness
        return self.franky.CartesianImpedanceGains.isotropic(*stiffness, gains.damping, gains.rotational_damping)

    def stream(self, pose: np.ndarray) -> None:
        self.pose = pose
        with self.faults():
            self.motion.set_reference(self.franky.CartesianReference(target=self.franky.Affine(pose[:3], pose[3:])))

    def set_gains(self, gains: Gains) -> None:
        old = self.gains
        if (old.clip, old.rotational_clip, old.nullspace_stiffness) != (
            gains.clip,
            gains.rotational_clip,
            gains.nullspace_stiffness,
        ):
            return self.swap(gains)
        with self.faults():
            self.motion.set_gains(self.franky_gains(gains))
            self.gains = gains

    def stop(self) -> None:
        with self.faults():
            if self.motion is not None and self.robot.is_in_control:
                self.motion = self.franky.TorqueStopMotion() if self.controlling else self.franky.JointStopMotion()
                self.robot.move(self.motion, asynchronous=True)
        self.controlling = False

    def move_to_joint_positions(self, q: np.ndarray, speed: float) -> None:
        with self.faults():
            self.motion = self.franky.JointMotion(q.tolist(), relative_dynamics_factor=speed)
            self.robot.move(self.motion, asynchronous=True)

    def moving(self) -> bool:
        with self.faults():
            self.robot.poll_motion()  # raises what ended the motion; returns True when there is none
            if not self.robot.is_in_control:
                self.motion = None
        return self.motion is not None

    def recover(self) -> None:
        self.controlling = False
        try:
            if self.robot.is_in_control:
                self.robot.stop()
            with contextlib.suppress(self.franky.ControlException):  # what ended the last motion
                self.robot.join_motion(5.0)
            self.motion = None
            if not self.robot.recover_from_errors():
                raise ArmError("reflex", "the robot did not recover: look at Desk (user stop, brakes, guiding mode?)")
        except (self.franky.NetworkException, RuntimeError):  # no connection any more
            self.connect()
        except self.franky.Exception as error:
            raise ArmError("sdk", f"{type(error).__name__}: {error}") from error


class PandaPyArm(Arm):
    """Through panda-py (Apache-2.0) on its impedance controller; PyPI's wheel serves the Panda with system 4.2.1 or newer.
    It clips nothing itself, and aborts the process on NaN: everything that it gets has passed the limiter."""

    def __init__(self, args: Args):
        super().__init__(args)
        try:
            import panda_py
            import panda_py.controllers
            import panda_py.libfranka
            import panda_py.motion
        except ImportError as error:
            raise ArmError("sdk", NO_SDK.format("panda-py", error, "panda-python==1.1.1")) from error
        self.panda_py, self.trajectory, self.last, self.kept = panda_py, None, None, []
        self.info |= {"sdk": f"panda-python {panda_py.__version__}"}
        self.connect()

    def connect(self) -> None:
        a, libfranka = self.args, self.panda_py.libfranka
        try:
            self.panda = self.panda_py.Panda(a.robot_ip)
            self.kept.append(self.panda)  # a destroyed Panda without connection aborts the process
            robot, torque, force = self.panda.get_robot(), [a.collision_torque] * 7, [a.collision_force] * 6
            robot.set_collision_behavior(torque, torque, force, force)
            self.model, self.frame = self.panda.get_model(), libfranka.Frame.kEndEffector
            self.info["firmware"], self.controlling = robot.server_version(), False
        except self.panda_py.IncompatibleVersionError as error:
            hint = (
                f"or --robot franky: pip install franky-control --extra-index-url {FRANKY_INDEX}{error.server_version}/"
            )
            raise ArmError("sdk", f"{error} {hint}") from error
        except RuntimeError as error:
            message = f"--robot-ip {a.robot_ip}: {error} (brakes open, FCI active, cable in the cabinet?)"
            raise ArmError("sdk", message) from error

    def get_state(self) -> ArmState:
        try:
            self.panda.raise_error()  # the only place that tells of a reflex: the state just stands still
        except RuntimeError as error:
            self.controlling, self.trajectory = False, None
            raise ArmError("reflex", str(error)) from error
        try:
            s = self.panda.get_state()
        except RuntimeError as error:
            if "another control or read operation" in str(error) and self.last:  # a race inside panda-py: next tick
                return self.last
            raise ArmError("sdk", str(error)) from error
        matrix = np.array(s.O_T_EE).reshape(4, 4).T
        pose = np.concatenate([matrix[:3, 3], quat_from_matrix(matrix[:3, :3])])
        velocity = np.array(self.model.zero_jacobian(self.frame, s)).reshape(7, 6).T @ s.dq  # (6, 7) @ (7,)
        mode, errors = s.robot_mode.name.removeprefix("k"), named_errors(s.current_errors)
        rate = s.control_command_success_rate if mode == "Move" else 1.0
        seconds, wrench, q, dq = s.time.to_msec() / 1e3, np.array(s.O_F_ext_hat_K), np.array(s.q), np.array(s.dq)
        self.last = ArmState(seconds, pose, velocity, wrench, q, dq, ROBOT_MODES[mode], errors, rate)
        return self.last

    def run(self, controller) -> None:
        try:
            self.panda.start_controller(controller)
        except RuntimeError as error:
            raise ArmError("sdk", str(error)) from error

    def start(self, pose: np.ndarray, q: np.ndarray, gains: Gains) -> None:
        self.posture = q
        impedance, ratio = self.panda_gains(gains)
        self.controller = self.panda_py.controllers.CartesianImpedance(
            impedance=impedance, damping_ratio=ratio, nullspace_stiffness=gains.nullspace_stiffness, filter_coeff=0.2
        )
        self.run(self.controller)
        self.controlling = True
        self.stream(pose)

    def panda_gains(self, gains: Gains) -> tuple[np.ndarray, float]:
        """(6, 6) stiffness, and its one damping ratio, that of the translation."""
        impedance = np.diag([gains.stiffness] * 3 + [gains.rotational_stiffness] * 3)
        return impedance, gains.damping / (2 * math.sqrt(gains.stiffness))

    def stream(self, pose: np.ndarray) -> None:
        if not np.isfinite(pose).all():
            raise ArmError("internal", f"a reference that is not finite: {pose}")
        self.controller.set_control(pose[:3], pose[3:], self.posture)

    def set_gains(self, gains: Gains) -> None:
        impedance, ratio = self.panda_gains(gains)
        self.controller.set_impedance(impedance)
        self.controller.set_damping_ratio(ratio)
        self.controller.set_nullspace_stiffness(gains.nullspace_stiffness)

    def stop(self) -> None:
        self.controlling, self.trajectory = False, None
        self.panda.stop_controller()

    def move_to_joint_positions(self, q: np.ndarray, speed: float) -> None:
        """Streams panda-py's own trajectory: its blocking call could not be broken off."""
        try:
            self.trajectory = self.panda_py.motion.JointTrajectory([self.last.q, q], speed_factor=speed)
        except RuntimeError as error:
            raise ArmError("refused", str(error)) from error
        self.controller = self.panda_py.controllers.JointPosition(
            stiffness=JOINT_STIFFNESS, damping=JOINT_DAMPING, filter_coeff=0.2
        )
        self.run(self.controller)
        self.controller.set_control(self.last.q, np.zeros(7))
        self.goal, self.began = q, self.last.time

    def moving(self) -> bool:
        if self.trajectory is None:
            return False
        elapsed, duration = self.last.time - self.began, self.trajectory.get_duration()
        t = min(max(elapsed, 0.0), duration)
        q, dq = self.trajectory.get_joint_positions(t), self.trajectory.get_joint_velocities(t)
        self.controller.set_control(q, dq if t < duration else np.zeros(7))
        if elapsed > duration and np.abs(self.last.q - self.goal).max() < 0.01:
            self.stop()
        elif elapsed > duration + 3:
            self.stop()
            raise ArmError("refused", "the arm did not arrive: something is in its way")
        return self.trajectory is not None

    def recover(self) -> None:
        self.controlling, self.trajectory = False, None
        try:
            self.panda.stop_controller()
            self.panda.recover()
        except RuntimeError:  # no connection any more
            self.connect()


ROBOT_MODES = {
    "Idle": "idle",
    "Move": "move",
    "Guiding": "guiding",
    "Reflex": "reflex",
    "UserStopped": "user_stopped",
    "AutomaticErrorRecovery": "error_recovery",
    "Other": "other",
}


def named_errors(errors: object) -> tuple[str, ...]:
    """Names of the flags that are set in libfranka's Errors."""
    return tuple(name for name in dir(errors) if name[0] != "_" and getattr(errors, name) is True) if errors else ()


def firmware_version(ip: str) -> int | None:
    """The version of Franka's protocol that the robot speaks, from how it refuses version 0; None: no answer."""
    try:
        with socket.create_connection((ip, 1337), timeout=2) as tcp:
            tcp.sendall(struct.pack("<IIIHH", 0, 0, 16, 0, 0))  # Connect: command, id, size, version, UDP port
            return struct.unpack("<IIIBH", tcp.recv(15, socket.MSG_WAITALL))[-1]
    except (OSError, struct.error):
        return None


# TASK: an arm of your own: subclass Arm, and name it here and in Args.robot.
ARMS: dict[str, type[Arm]] = {"sim": SimArm, "franky": FrankyArm, "panda-py": PandaPyArm}


# --- Grippers ---------------------------------------------------------------------------------------------------------
class GripperError(Exception):
    """The gripper does not answer, or is at fault."""


@dataclass
class GripperState:
    width: float = 0.0
    """distance between the fingers, m"""
    moving: bool = False
    holding: bool = False
    """an object stopped the fingers"""
    fault: str | None = None


class Gripper(ABC):
    """A gripper with a thread of its own: `submit` from anywhere, everything else runs in that thread.

    Methods begin a motion and return; `poll` says when it has ended. All raise GripperError.
    """

    kind, max_width, max_force, max_speed = "none", 0.0, 0.0, 0.0  # m, N, m/s
    hz = 50.0

    def __init__(self, args: Args):
        self.args, self.state, self.orders = args, GripperState(), queue.SimpleQueue()
        self.stopping, self.thread = threading.Event(), threading.Thread(target=self.run, name="gripper", daemon=True)

    def open(self, speed: float, force: float) -> None:
        """Begin to open; `speed` (m/s) and `force` (N) are within what the gripper can."""
        self.move(self.max_width, speed, force)

    @abstractmethod
    def close(self, speed: float, force: float) -> None:
        """Begin to close on whatever is there."""

    @abstractmethod
    def move(self, width: float, speed: float, force: float) -> None:
        """Begin to move the fingers to this distance, m."""

    def activate(self) -> None:
        """Begin what the gripper needs before its first motion: the fingers may move."""

    @abstractmethod
    def stop(self) -> None:
        """Stop the fingers where they are."""

    @abstractmethod
    def poll(self) -> GripperState:
        """The newest measurement."""

    def submit(self, job: "Job", action: str, width: float, speed: float, force: float) -> None:
        """Any thread: carry out an action (see the protocol) instead of what is going on; speed, force: 0 to 1."""
        speed, force = speed * self.max_speed, force * self.max_force
        call = {
            "open": functools.partial(self.open, speed, force),
            "close": functools.partial(self.close, speed, force),
            "move": functools.partial(self.move, width, speed, force),
            "activate": self.activate,
            "stop": self.stop,
        }[action]
        self.orders.put((job, call))

    def run(self) -> None:
        current: Job | None = None
        while not self.stopping.wait(1 / self.hz):
            try:
                while not self.orders.empty():
                    if current:
                        current.finish("superseded by a newer one")
                    current, call = self.orders.get()
                    current.status = "running"
                    if self.orders.empty():
                        call()
                if current is None and self.state.fault:
                    self.revive()
                self.state = self.poll()
                if current and (self.state.fault or not self.state.moving):
                    current.finish(self.state.fault)
                    current = None
            except GripperError as error:
                if self.state.fault != str(error):
                    log.error("gripper: %s", error)
                self.state = replace(self.state, moving=False, fault=str(error))
                if current:
                    current.finish(str(error))
                    current = None
            except Exception as error:  # a bug must not end the thread
                log.exception("gripper")
                self.state = replace(self.state, moving=False, fault=f"internal: {type(error).__name__}")
                if current:
                    current.finish(self.state.fault)
                    current = None

    def revive(self) -> None:
        """Called now and then while there is a fault."""


class NoGripper(Gripper):
    close = move = stop = lambda self, *_: None

    def poll(self) -> GripperState:
        return GripperState()


class SimGripper(Gripper):
    """The simulated arm's own."""

    kind, max_width, max_force, max_speed = "sim", 0.08, 70.0, 0.3
    arm: SimArm | None = None  # set by the robot thread

    def close(self, speed: float, force: float) -> None:
        self.move(0.0, speed, force)

    def move(self, width: float, speed: float, force: float) -> None:
        self.goal, self.steady = width, 0
        self.arm.gripper_command = width, max(force, 1.0), max(speed, 0.01)

    def stop(self) -> None:
        self.move(self.state.width, self.max_speed, 0.5 * self.max_force)

    def poll(self) -> GripperState:
        if self.arm is None:
            return self.state
        width = self.arm.sim.gripper_width
        still = abs(width - self.state.width) < 2e-4  # per 20 ms
        self.steady = self.steady + 1 if still else 0
        moving = self.steady < 6
        return GripperState(width, moving, not moving and width > self.goal + 2e-3)

    goal, steady = 0.08, 0


class FrankaHand(Gripper):
    """Franka's own hand, through the SDK that drives the arm. Its calls block, so they have a thread for themselves."""

    kind, max_width, max_force, max_speed = "franka-hand", 0.08, 70.0, 0.1

    def __init__(self, args: Args):
        super().__init__(args)
        try:
            if args.robot == "franky":
                import franky

                self.hand, self.read = franky.Gripper(args.robot_ip), lambda: self.hand.state
            else:
                from panda_py import libfranka

                self.hand = libfranka.Gripper(args.robot_ip)
                self.read = self.hand.read_once
            self.max_width = self.read().max_width or self.max_width
        except ImportError as error:
            raise GripperError(f"--gripper franka-hand: {error}") from error
        except Exception as error:
            raise GripperError(f"--gripper franka-hand: {error} (or --gripper robotiq, or none)") from error
        self.pool, self.future = ThreadPoolExecutor(1, "hand"), Future()
        self.future.set_result(True)

    def begin(self, call: Callable, *values: float) -> None:
        if not self.future.done():
            self.hand.stop()  # ends the call that blocks the other thread
        self.state = replace(self.state, fault=None)
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
        fault = self.state.fault
        try:
            state, moving = self.read(), not self.future.done()
            if not moving:
                fault = None if self.future.result() else "the hand did not reach its goal"
        except Exception as error:
            self.future = Future()
            self.future.set_result(True)
            raise GripperError(f"{type(error).__name__}: {error}") from error
        return GripperState(state.width, moving, state.is_grasped and state.width > 1e-3, fault)


class Robotiq(Gripper):
    """Robotiq 2F-85, Modbus RTU on a serial port. Two bytes per register: from 1000 on action, position, speed and force
    are written; from 2000 on status, fault and position echo, position and current are read (instruction manual)."""

    kind, max_width, max_force, max_speed = "robotiq", 0.085, 235.0, 0.15
    device, write_at, read_at = 9, 0x03E8, 0x07D0
    open_at, closed_at = 3, 228  # gPO at max_width and at 0  # TASK: measure yours, with your finger tips

    def __init__(self, args: Args):
        super().__init__(args)
        try:
            from pymodbus import FramerType
            from pymodbus.client import ModbusSerialClient
            from pymodbus.exceptions import ModbusException
        except ImportError as error:
            raise GripperError(f"--gripper robotiq: {error}; pip install pymodbus==3.16.1 pyserial==3.5") from error
        logging.getLogger("pymodbus").setLevel(logging.CRITICAL)
        self.client = ModbusSerialClient(
            args.gripper_port, framer=FramerType.RTU, baudrate=115200, bytesize=8, parity="N", stopbits=1, timeout=0.1,
            retries=1,
        )  # fmt: skip
        self.error, self.requested = ModbusException, None
        if not self.client.connect():
            raise GripperError(f"--gripper-port {args.gripper_port}: cannot be opened (plugged in? in group dialout?)")
        self.state = self.poll()

    def ask(self, call: Callable, *values: Any, **options: Any) -> list[int]:
        try:
            reply = call(*values, device_id=self.device, **options)
        except (self.error, OSError) as error:
            raise GripperError(f"no answer on {self.args.gripper_port} (cable, 24 V?): {error}") from error
        if reply.isError():
            raise GripperError(f"refused on {self.args.gripper_port}: {reply}")
        return reply.registers

    def write(self, action: int, position: int = 0, speed: int = 0, force: int = 0) -> None:
        self.ask(self.client.write_registers, self.write_at, [action << 8, position, speed << 8 | force])

    def close(self, speed: float, force: float) -> None:
        self.go(255, speed, force)

    def move(self, width: float, speed: float, force: float) -> None:
        share = 1 - min(max(width / self.max_width, 0.0), 1.0)
        self.go(round(self.open_at + share * (self.closed_at - self.open_at)), speed, force)

    def go(self, position: int, speed: float, force: float) -> None:
        if (status := self.status())["gSTA"] != 3:
            raise GripperError("not activated: send activate, the fingers will move")
        if status["gFLT"]:
            raise GripperError(f"fault 0x{status['gFLT']:02X}: send activate")
        self.requested, self.activating = position, False
        fraction = speed / self.max_speed, force / self.max_force
        self.write(0x09, position, *(min(max(round(255 * x), 0), 255) for x in fraction))

    def activate(self) -> None:
        status = self.status()
        self.requested = None
        if status["gSTA"] != 3 or status["gFLT"]:
            self.write(0x00)
            self.write(0x01)
        self.activating = time.monotonic() + 8.0

    def stop(self) -> None:
        self.requested, self.activating = None, 0.0
        self.write(0x01)  # without "go to": stands

    activating = 0.0  # until when the activation may take

    def status(self) -> dict[str, int]:
        status, echo, position = self.ask(self.client.read_holding_registers, self.read_at, count=3)
        bits = {"gACT": status >> 8 & 1, "gSTA": status >> 12 & 3, "gOBJ": status >> 14 & 3}
        return bits | {"gFLT": echo >> 8, "gPR": echo & 255, "gPO": position >> 8}

    def poll(self) -> GripperState:
        s, fault, moving = self.status(), None, False
        if self.activating:
            moving = s["gSTA"] != 3
            if not moving:
                self.activating = 0.0
            elif time.monotonic() > self.activating:
                self.activating = 0.0
                raise GripperError("the activation did not end within 8 s")
        elif s["gSTA"] != 3:
            fault = "not activated: send activate, the fingers will move"
        elif s["gFLT"]:
            fault = f"fault 0x{s['gFLT']:02X}: send activate"
        elif self.requested is not None:  # until the echo shows this request, gOBJ is still the last one's
            moving = s["gPR"] != self.requested or s["gOBJ"] == 0
        share = (s["gPO"] - self.open_at) / (self.closed_at - self.open_at)
        width = self.max_width * min(max(1 - share, 0.0), 1.0)
        return GripperState(width, moving, not moving and s["gOBJ"] in (1, 2), fault)

    def revive(self) -> None:
        if not self.client.connected:
            self.client.connect()


# TASK: a gripper of your own: subclass Gripper, and name it here and in Args.gripper.
GRIPPERS: dict[str, type[Gripper]] = {
    "sim": SimGripper,
    "franka-hand": FrankaHand,
    "robotiq": Robotiq,
    "none": NoGripper,
}


# --- Robot thread -----------------------------------------------------------------------------------------------------
@dataclass
class Fault:
    code: str
    message: str
    count: int


class Job:
    """A long operation; its handle is made up by the client."""

    def __init__(self, handle: str, op: str):
        self.handle, self.op, self.status, self.error = handle, op, "queued", None
        self.began = self.ended = time.monotonic()
        self.steps: Iterator[None] = iter(())

    def finish(self, error: str | None = None) -> None:
        self.error, self.ended, self.status = error, time.monotonic(), "failed" if error else "done"
        log.log(logging.WARNING if error else logging.INFO, "%s %s %s", self.op, self.status, error or "")

    def report(self) -> dict[str, Any]:
        open_end = self.status in ("queued", "running")
        seconds = (time.monotonic() if open_end else self.ended) - self.began
        return {"handle": self.handle, "op": self.op, "status": self.status, "error": self.error, "seconds": seconds}


@dataclass
class Snapshot:
    """What the robot thread knows after a tick."""

    at: float
    """server's monotonic time of the measurement"""
    state: ArmState
    reference: np.ndarray  # (7,)
    limited: list[str]


NO_WISH = ("", -math.inf)  # why, and when


class Control(threading.Thread):
    """The robot thread: constructs the arm, reads it, limits the reference, watches. Other threads only leave wishes in
    attributes (a single assignment each) and read `snapshot`, `mode`, `fault`; nobody ever waits for this thread."""

    def __init__(self, args: Args, gripper: Gripper):
        super().__init__(name="robot", daemon=True)
        self.args, self.gripper, self.limiter = args, gripper, Limiter(args)
        self.arm: Arm | None = None
        self.snapshot: Snapshot | None = None
        self.failure, self.ready, self.stopping = "", threading.Event(), threading.Event()
        self.mode, self.fault, self.faults, self.reflexes, self.overruns = "idle", None, 0, 0, 0
        self.gains, self.new_gains = args.gains, None
        self.target, self.target_at, self.lease_until = None, -math.inf, -math.inf
        self.hold_wish = self.stop_wish = NO_WISH
        self.held, self.job = "", None  # why it is held until `start`; empty: it is not
        self.patience = math.inf  # until when a call into the SDK may block: a longer one counts as frozen
        self.robot_time, self.advanced = -math.inf, math.inf  # the robot's clock, and when it last went on

    def run(self) -> None:
        try:
            self.arm = ARMS[self.args.robot](self.args)
            if isinstance(self.gripper, SimGripper):
                self.gripper.arm = self.arm
            self.advanced = time.monotonic()
            state = self.arm.get_state()
            self.limiter.seed(state.tcp_pose)
            self.snapshot = Snapshot(time.monotonic(), state, state.tcp_pose, [])
        except Exception as error:
            if not isinstance(error, ArmError):
                log.exception("the arm does not start")
            self.failure = str(error) or type(error).__name__
        self.ready.set()
        due = time.monotonic()
        while not self.failure and not self.stopping.is_set():
            due += 1 / self.args.control_hz
            self.tick()
            late = time.monotonic() - due
            if late < 0 or not self.arm.waits:
                time.sleep(max(-late, 0) if self.arm.waits else 0)
            elif late > 0.005:
                self.overruns, due = self.overruns + 1, time.monotonic()
        if self.arm is not None and not self.failure:
            with contextlib.suppress(ArmError):
                self.arm.stop()
                give_up = time.monotonic() + 3
                while self.arm.moving() and time.monotonic() < give_up:
                    self.arm.get_state()
                    time.sleep(0.005)
            self.arm.close()

    def tick(self) -> None:
        """Measure, watch, act; whatever goes wrong ends as a fault, never as an exception."""
        now = time.monotonic()
        try:
            try:
                dt = self.measure(now)
            except ArmError:
                if not self.recovering():
                    raise
                dt = 0.0
            self.watch(now)
            self.act(dt)
        except ArmError as error:
            self.latch(error.code, str(error))
        except Exception as error:  # a bug must not end the thread
            if self.fault is None:
                log.exception("robot thread")
            self.latch("internal", f"{type(error).__name__} in the control loop, see the log")
        if self.snapshot.at < now:
            self.snapshot.limited = self.limiter.limited

    def measure(self, now: float) -> float:
        """Reads the arm; how far the robot's clock went on since the last tick, at most 20 ms."""
        state = self.arm.get_state()
        if not all(np.isfinite(x).all() for x in (state.tcp_pose, state.tcp_vel, state.wrench, state.q, state.dq)):
            raise ArmError("sdk", "the robot's state is not finite")
        dt = state.time - self.robot_time
        if dt != 0:
            self.robot_time, self.advanced = state.time, now
        elif now - self.advanced > self.args.frozen_after_s:
            raise ArmError("frozen", f"the robot's clock stands still at {state.time:.3f} s: connection lost?")
        if self.mode in ("idle", "busy"):
            self.limiter.seed(state.tcp_pose)
        self.snapshot = Snapshot(time.monotonic(), state, self.limiter.reference, self.limiter.limited)
        if state.robot_mode in ("reflex", "user_stopped") and not self.recovering():
            raise ArmError(state.robot_mode, ", ".join(state.errors) or f"the robot reports {state.robot_mode}")
        return min(max(dt, 0.0), 0.02)

    def recovering(self) -> bool:
        return self.job is not None and self.job.op == "recover"

    def watch(self, now: float) -> None:
        """The watchdog's ladder, and the wishes of other threads."""
        (hold, hold_at), self.hold_wish = self.hold_wish, NO_WISH
        (stop, stop_at), self.stop_wish = self.stop_wish, NO_WISH
        force = float(np.linalg.norm(self.snapshot.state.wrench[:3]))
        if self.mode in ("streaming", "hold") and 0 < self.args.max_force < force:
            hold = f"an external force of {force:.0f} N exceeded --max-force {self.args.max_force:g}"
            self.limiter.seed(self.snapshot.state.tcp_pose)
        if self.job and (self.job.began < max(hold_at, stop_at) or now > self.lease_until):
            self.break_off("hold" if hold else "stop" if stop else "the lease ended")
        if self.mode in ("streaming", "hold"):
            silent = now - self.target_at
            if stop or silent > self.args.stop_after_s:
                log.warning("soft stop: %s", stop or f"no target for {silent:.1f} s")
                self.mode, self.held = "idle", ""
            elif hold:
                self.mode, self.held = "hold", hold
                log.warning("hold: %s", hold)
            elif self.mode == "streaming" and (silent > self.args.hold_after_s or now > self.lease_until):
                self.mode = "hold"
                log.warning(
                    "hold: %s", "the lease ended" if now > self.lease_until else f"no target for {silent:.2f} s"
                )
            elif self.mode == "hold" and not self.held and silent <= self.args.hold_after_s and now <= self.lease_until:
                self.mode = "streaming"

    def act(self, dt: float) -> None:
        """One step of the job, or of the reference."""
        arm, job = self.arm, self.job
        if job:
            try:
                job.status = "running"
                next(job.steps)
            except StopIteration:
                self.job = None
                job.finish()
            except (ArmError, Refused) as error:
                self.job, self.mode = None, "idle" if self.mode == "busy" else self.mode
                job.finish(str(error))
                if error.code not in ("refused", "unavailable") and not self.fault:
                    raise
        elif self.mode in ("streaming", "hold"):
            if gains := self.new_gains:
                self.new_gains = None
                arm.set_gains(gains)
                self.gains = gains
            target = self.target if self.mode == "streaming" else None
            self.limiter.step(target, self.snapshot.state.tcp_pose, self.gains, dt)
            arm.stream(self.limiter.reference)
            self.snapshot.reference = self.limiter.reference
        elif arm.controlling:  # idle or fault: nothing must run
            arm.stop()
        elif not self.fault:
            arm.moving()

    def break_off(self, why: str) -> None:
        job, self.job, self.mode = self.job, None, "fault" if self.fault else "idle"
        job.finish(f"broken off: {why}")
        self.arm.stop()

    def latch(self, code: str, message: str) -> None:
        """The first fault stays until `recover`."""
        job = self.job
        if job and not self.recovering():
            self.job = None
            job.finish(f"{code}: {message}")
        if self.fault is None:
            self.faults, self.reflexes = self.faults + 1, self.reflexes + (code == "reflex")
            self.fault, self.mode, self.held = Fault(code, message, self.faults), "fault", ""
            log.error("fault %d, %s: %s", self.faults, code, message)

    # Jobs: generators, one step per tick.
    def begin(self, job: Job, steps: Iterator[None]) -> None:
        """Any thread: only while no other job runs."""
        job.steps, self.job = steps, job

    def settle(self) -> Iterator[None]:
        """Until the arm holds itself."""
        if self.arm.controlling:
            self.arm.stop()
        give_up = time.monotonic() + 5
        while self.arm.moving():
            if time.monotonic() > give_up:
                raise ArmError("sdk", "the arm does not come to rest")
            yield

    def start_streaming(self, gains: Gains) -> Iterator[None]:
        yield from self.settle()
        state = self.snapshot.state
        self.limiter.seed(state.tcp_pose)
        self.gains, self.new_gains, self.held = gains, None, ""
        self.patience = time.monotonic() + 2
        self.arm.start(state.tcp_pose, state.q, gains)
        self.patience = math.inf
        self.target, self.target_at, self.mode = state.tcp_pose, time.monotonic(), "streaming"
        yield

    def move_joints(self, q: np.ndarray | None, speed: float) -> Iterator[None]:
        self.mode = "busy"
        yield from self.settle()
        self.arm.reset(speed) if q is None else self.arm.move_to_joint_positions(q, speed)
        while self.arm.moving():
            yield
        self.mode = "idle"

    def recover(self) -> Iterator[None]:
        self.mode = "busy" if not self.fault else "fault"
        self.patience = time.monotonic() + 20
        try:
            self.arm.recover()
        finally:
            self.patience, self.advanced = math.inf, time.monotonic()
        before, give_up = self.robot_time, time.monotonic() + 2
        while self.robot_time == before or self.snapshot.state.robot_mode in (
            "reflex",
            "user_stopped",
            "error_recovery",
        ):
            if time.monotonic() > give_up:
                raise ArmError("sdk", f"still not ready: the robot reports {self.snapshot.state.robot_mode}")
            yield
        yield from self.settle()
        self.fault, self.held, self.mode = None, "", "idle"
        log.warning("recovered")

    def reset_task(self, seed: int | None) -> Iterator[None]:
        self.mode = "busy"
        yield from self.settle()
        self.arm.reset_task(seed)
        yield
        self.mode = "idle"


# --- Cameras of the simulation ----------------------------------------------------------------------------------------
class Renderer(threading.Thread):
    """Renders the scene on request, in a copy of the physics: the robot thread never waits for OpenGL."""

    def __init__(self, args: Args, control: Control, wake: Callable[[], None]):
        super().__init__(name="cameras", daemon=True)
        self.args, self.control, self.wake = args, control, wake
        self.requests, self.done, self.seq = queue.SimpleQueue(), queue.SimpleQueue(), 0

    def run(self) -> None:
        twin = None
        while True:
            batch = [self.requests.get()]
            while not self.requests.empty():  # all that came meanwhile share the next images
                batch.append(self.requests.get())
            images, fault = {}, None
            try:
                if twin is None:
                    import gymnasium as gym

                    import franka_sim  # noqa: F401  registers the tasks

                    twin = gym.make(self.args.env_id).unwrapped.sim
                arm = self.control.arm
                arm.scene_ready.clear()
                arm.scene_wanted.set()
                if not arm.scene_ready.wait(1.0):
                    raise RuntimeError("the simulation stands still")
                taken, scene = time.monotonic(), dict(arm.scene)
                robot_time = scene.pop("time")
                twin.set_state(scene)
                for name in {name for _, _, names in batch for name in names}:
                    images[name] = twin.render(name, self.args.image_size, self.args.image_size)
                self.seq += 1
            except Exception as error:
                log.exception("cameras")
                fault = str(error)
            for envelope, request, names in batch:
                arrays = [
                    {
                        "name": n,
                        "shape": list(images[n].shape),
                        "dtype": "|u1",
                        "seq": self.seq,
                        "robot_time": robot_time,
                    }
                    | {"age": time.monotonic() - taken}
                    for n in (names if not fault else ())
                ]
                self.done.put((envelope, request, fault, arrays, [images[a["name"]].tobytes() for a in arrays]))
            self.wake()


# --- Server -----------------------------------------------------------------------------------------------------------
def number(name: str, value: object, low: float, high: float) -> float:
    """A finite float within bounds; raises Refused otherwise."""
    if type(value) not in (int, float) or not low <= value <= high:  # NaN fails, too
        raise Refused("bad_argument", f"{name}: give a number from {low:g} to {high:g}, not {str(value)[:40]}")
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


class Server:
    """Answers requests and publishes the state, in the main thread. Methods `op_*` are the operations of the header."""

    LEASED = frozenset(
        ["release", "target", "gains", "start", "move_joints", "reset", "recover", "gripper", "reset_task"]
    )

    def __init__(self, args: Args):
        self.args, self.id = args, secrets.token_hex(4)
        self.name, self.token, self.ttl, self.seq = None, "", 1.0, None  # of the lease
        self.jobs: OrderedDict[str, Job] = OrderedDict()
        self.counts, self.complained, self.stopping = Counter(), 0.0, False
        self.open_sockets()  # before the robot thread: theirs must not inherit its real-time priority
        try:
            kind = {"sim": "sim"}.get(args.robot, "franka-hand") if args.gripper == "auto" else args.gripper
            self.gripper = GRIPPERS[kind](args)
        except GripperError as error:
            fail(str(error))
        self.gripper.thread.start()
        self.control = Control(args, self.gripper)
        self.renderer = Renderer(args, self.control, lambda: self.waker.send(b""))
        self.renderer.start()
        self.control.start()
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
        self.router, self.publisher = context.socket(zmq.ROUTER), context.socket(zmq.PUB)
        for s in (self.router, self.publisher):
            s.linger, s.maxmsgsize, s.rcvhwm, s.sndhwm, s.tcp_keepalive = 0, 1 << 16, 100, 100, 1
            s.heartbeat_ivl, s.heartbeat_timeout = 1000, 3000  # ms: forgets peers whose cable was pulled
        if args.keys:
            try:
                public, secret = zmq.auth.load_certificate(Path(args.keys) / "server.key_secret")
            except OSError as error:
                fail(f"--keys {args.keys}: {error}; make them with --keygen")
            self.authenticator = ThreadAuthenticator(context)
            self.authenticator.start()
            self.authenticator.configure_curve(domain="*", location=args.keys)  # every *.key in there may connect
            for s in (self.router, self.publisher):
                s.curve_publickey, s.curve_secretkey, s.curve_server = public, secret, True
        self.woken, self.waker = context.socket(zmq.PULL), context.socket(zmq.PUSH)
        self.woken.bind("inproc://wake")
        self.waker.connect("inproc://wake")
        try:
            if args.port:
                self.router.bind(f"tcp://{args.bind}:{args.port}")
                self.publisher.bind(f"tcp://{args.bind}:{args.port + 1}")
            else:
                self.router.bind(f"tcp://{args.bind}:*")
                self.publisher.bind(f"tcp://{args.bind}:*")
        except zmq.ZMQError as error:
            fail(f"--bind {args.bind} --port {args.port}: {error}; does another server run?")
        self.ports = [int(s.last_endpoint.rsplit(b":", 1)[1]) for s in (self.router, self.publisher)]

    def serve(self) -> None:
        """Until a signal."""
        for number_ in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number_, self.signalled)
        print(f"serving on tcp://{self.args.bind}:{self.ports[0]} (state: {self.ports[1]})", flush=True)
        log.info("serving %s on %s %s", self.args.robot, self.args.bind, self.ports)
        poller, due, shown, self.stale = zmq.Poller(), time.monotonic(), 0.0, 0.0
        poller.register(self.router, zmq.POLLIN)
        poller.register(self.woken, zmq.POLLIN)
        while not self.stopping:
            before = time.monotonic()
            poller.poll(max(0, math.ceil((due - before) * 1000)))
            for _ in range(20):  # then the state has its turn
                if not self.answer():
                    break
            while self.woken.poll(0):
                self.woken.recv()
            while not self.renderer.done.empty():
                envelope, request, fault, arrays, images = self.renderer.done.get()
                error = Refused("unavailable", fault) if fault else None
                self.reply(envelope, request, {"arrays": arrays}, error, images)
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
        self.gripper.thread.join(2)
        for s in (self.router, self.publisher):
            s.close(0)
        log.info("end")
        if self.control.is_alive():
            log.error("the robot's SDK does not return: use the stop button")
            print("\nthe robot's SDK does not return: use the stop button", file=sys.stderr, flush=True)
            os._exit(1)
        if self.args.robot != "sim":  # the SDKs' destructors may abort
            logging.shutdown()
            os._exit(0)

    def watch(self, passed: float) -> None:
        """The robot thread itself may hang inside an SDK. Only time in which this thread ran counts."""
        control, at = self.control, self.control.snapshot.at
        self.stale = 0.0 if at != getattr(self, "seen", None) else self.stale + min(passed, 0.012)
        self.seen = at
        limit = self.args.frozen_after_s if control.mode != "idle" else 0.5
        if self.stale > limit and control.patience == math.inf and control.fault is None:
            control.latch("frozen", "the robot thread hangs in the SDK: connection lost?")

    def answer(self) -> bool:
        """Receives one request and answers it; False when there is none."""
        try:
            frames = self.router.recv_multipart(zmq.DONTWAIT)
        except zmq.Again:
            return False
        envelope, body = frames[:1], frames[1:]
        if b"" in frames[1:4]:
            cut = frames.index(b"", 1) + 1
            envelope, body = frames[:cut], frames[cut:]
        request: dict[str, Any] = {}
        try:
            request = self.parse(body)
            result = self.carry_out(envelope, request)
            if result is None:
                return True  # answered later
            self.reply(envelope, request, result)
        except Refused as error:
            self.counts[error.code] += 1
            self.reply(envelope, request, None, error)
        except Exception:
            self.counts["internal"] += 1
            log.exception("request")
            self.reply(envelope, request, None, Refused("internal", "a bug, see the server's log"))
        return True

    def parse(self, body: list[bytes]) -> dict[str, Any]:
        if len(body) != 1:
            raise Refused("malformed", f"{len(body)} frames, send one")
        try:
            limits = {"max_str_len": 256, "max_bin_len": 0, "max_ext_len": 0, "max_array_len": 64, "max_map_len": 64}
            request = msgpack.unpackb(body[0], **limits)
        except (ValueError, RecursionError) as error:
            raise Refused("malformed", f"no msgpack within the limits: {str(error)[:80]}") from None
        if not isinstance(request, dict):
            raise Refused("malformed", "not a map")
        if request.get("v") != PROTOCOL or type(request["v"]) is not int:
            raise Refused("version", f"this server speaks version {PROTOCOL}")
        types = {"v": int, "op": str, "id": (int, str), "token": str, "args": dict}
        for key, value in request.items():
            if key not in types or not isinstance(value, types[key]) or isinstance(value, bool):
                request.pop("id") if key == "id" else None
                raise Refused("malformed", f"{key!r:.40}: unknown, or of the wrong type")
        return request

    def carry_out(self, envelope: list[bytes], request: dict[str, Any]) -> dict[str, Any] | None:
        op, arguments, token = request.get("op"), request.get("args", {}), request.get("token", "")
        if op not in self.ops:
            raise Refused("unknown_op", f"{op!r:.40}: there are {' '.join(self.ops)}")
        known = self.parameters[op]
        if unknown := arguments.keys() - known.keys():
            raise Refused("bad_argument", f"{op} has no {sorted(unknown)[0]!r:.40}, it has {[*known]}")
        for name, parameter in known.items():
            if name not in arguments and parameter.default is inspect.Parameter.empty:
                raise Refused("bad_argument", f"{op} needs {name!r}")
        now = time.monotonic()
        mine = bool(token) and now <= self.control.lease_until and secrets.compare_digest(token.encode(), self.token)
        if mine:
            self.control.lease_until = now + self.ttl
        elif op in self.LEASED:
            holder = self.holder()
            raise Refused("no_lease", f"the lease is {holder}'s" if holder else "acquire a lease first: yours ended")
        if op == "frames":
            self.renderer.requests.put((envelope, request, self.op_frames(**arguments)))
            return None
        return self.ops[op](**arguments)

    def holder(self) -> str | None:
        return self.name if time.monotonic() <= self.control.lease_until else None

    def packed(self, request: dict[str, Any], result: Any, error: Refused | None = None) -> bytes:
        control, now = self.control, time.monotonic()
        snapshot, fault = control.snapshot, control.fault
        return msgpack.packb(
            {
                "v": PROTOCOL,
                "id": request.get("id"),
                "op": request.get("op"),
                "ok": error is None,
                "error": {"code": error.code, "message": str(error)} if error else None,
                "result": result if error is None else None,
                "server_id": self.id,
                "server_time": now,
                "robot_time": snapshot.state.time,
                "state_age": now - snapshot.at,
                "mode": control.mode,
                "reference": snapshot.reference.tolist(),
                "lease": self.holder(),
                "fault": asdict(fault) if fault else None,
                "seq": self.seq,
            }
        )

    def reply(
        self, envelope: list[bytes], request: dict, result: Any, error: Refused | None = None, raw: Sequence[bytes] = ()
    ) -> None:
        with contextlib.suppress(zmq.Again, zmq.ZMQError):  # a peer that is gone, or does not read
            self.router.send_multipart([*envelope, self.packed(request, result, error), *raw], zmq.DONTWAIT)

    def show(self, now: float) -> None:
        """The terminal's status line; refusals go to the log, in sums."""
        c, s = self.control, self.control.snapshot.state
        if self.counts and now - self.complained > 10:
            log.warning("refused: %s", dict(self.counts))
            self.counts.clear()
            self.complained = now
        if sys.stdout.isatty():
            fault = f"FAULT {c.fault.code}: {c.fault.message}" if c.fault else c.held and f"held: {c.held}"
            line = f"{c.mode:9} lease {self.holder() or '-':10} t {s.time:9.2f}  xyz {s.tcp_pose[0]:6.3f} {s.tcp_pose[1]:6.3f} "
            line += f"{s.tcp_pose[2]:6.3f}  force {np.linalg.norm(s.wrench[:3]):5.1f} N  width "
            line += f"{self.gripper.state.width:5.3f}  link {s.success_rate:4.2f}  late {c.overruns}  {fault or ''}"
            print("\r" + line[: shutil.get_terminal_size().columns - 1] + "\x1b[K", end="", flush=True)

    # Operations
    def op_hello(self) -> dict[str, Any]:
        a, g = self.args, self.gripper
        names = "max_tilt max_speed max_acceleration max_rotation_speed max_rotation_acceleration max_jump "
        names += "max_rotation_jump max_force max_stiffness max_clip"
        limits = {name: getattr(a, name) for name in names.split()}
        limits |= {"max_rotational_stiffness": a.max_stiffness / 10, "max_rotational_clip": a.max_clip * 10}
        limits |= {"workspace_low": list(a.workspace_low), "workspace_high": list(a.workspace_high)}
        size = {"height": a.image_size, "width": a.image_size}
        return {
            "protocol": PROTOCOL,
            "server_id": self.id,
            "server": {"python": platform.python_version(), "platform": platform.platform(), "pyzmq": zmq.__version__}
            | {"msgpack": ".".join(map(str, msgpack.version)), "control_hz": a.control_hz, "publish_hz": 100.0},
            "robot": self.control.arm.info,
            "gripper": {"kind": g.kind, "max_width": g.max_width, "max_force": g.max_force, "max_speed": g.max_speed},
            "cameras": [{"name": name} | size for name in (a.cameras if self.control.arm.has_task else ())],
            "limits": limits,
            "watchdog": {"hold_s": a.hold_after_s, "stop_s": a.stop_after_s, "frozen_s": a.frozen_after_s},
            "gains": asdict(self.control.gains),
            "reset_joints": list(a.reset_joints),
            "lease": self.holder(),
        }

    def op_state(self) -> dict[str, Any]:
        snapshot, g, c = self.control.snapshot, self.gripper.state, self.control
        s = snapshot.state
        return {
            "tcp_pose": s.tcp_pose.tolist(),
            "tcp_vel": s.tcp_vel.tolist(),
            "tcp_force": s.wrench[:3].tolist(),
            "tcp_torque": s.wrench[3:].tolist(),
            "q": s.q.tolist(),
            "dq": s.dq.tolist(),
            "gripper_width": g.width,
            "gripper_moving": g.moving,
            "gripper_holding": g.holding,
            "gripper_fault": g.fault,
            "robot_mode": s.robot_mode,
            "errors": list(s.errors),
            "success_rate": s.success_rate,
            "overruns": c.overruns,
            "reflexes": c.reflexes,
            "limited": snapshot.limited,
        }

    def op_acquire(self, name, token, ttl=1.0, takeover=False) -> dict[str, Any]:
        text("name", name, 1, 32)
        encoded = text("token", token, 16, 64).encode()
        ttl = number("ttl", ttl, 0.2, 10)
        if type(takeover) is not bool:
            raise Refused("bad_argument", "takeover: give true or false")
        holder = self.holder()
        if holder is None or not secrets.compare_digest(encoded, self.token):
            if holder is not None and not takeover:
                raise Refused("lease_taken", f"{holder} has the lease; takeover=true takes it")
            log.info("lease: %s%s", name, f", taken from {holder}" if holder else "")
            self.seq, self.control.target_at = (
                None,
                min(self.control.target_at, time.monotonic() - self.args.hold_after_s),
            )
        self.name, self.token, self.ttl = name, encoded, ttl
        self.control.lease_until = time.monotonic() + ttl
        return {"ttl": ttl}

    def op_release(self) -> dict[str, Any]:
        self.control.lease_until, self.token = -math.inf, b""
        log.info("lease released by %s", self.name)
        return {}

    def op_target(self, pose, seq=None) -> dict[str, Any]:
        c, target = self.control, vector("pose", pose, 7)
        self.ready_for("target")
        if seq is not None:
            if type(seq) is not int:
                raise Refused("bad_argument", "seq: give a whole number")
            if self.seq is not None and seq <= self.seq:
                raise Refused("stale", f"seq {seq} after {self.seq}")
        if reason := c.limiter.refusal(target, c.snapshot.reference):
            raise Refused("refused", reason)
        self.seq = self.seq if seq is None else seq
        c.target, c.target_at = target, time.monotonic()
        return {"limited": c.snapshot.limited}

    def ready_for(self, op: str) -> None:
        """Raises Refused if the mode does not allow `op`: target, or an arm's job."""
        c = self.control
        if c.fault is not None and op != "recover":
            raise Refused("fault", f"{c.fault.code}: {c.fault.message}; look at the robot, then recover")
        if c.job is not None:
            raise Refused("busy", f"{c.job.op} is going on")
        if op == "target":
            if c.held:
                raise Refused("held", f"{c.held}; start again")
            if c.mode not in ("streaming", "hold"):
                raise Refused("not_streaming", "start first: the controller does not run")
        if op == "reset_task" and c.mode != "idle":
            raise Refused("busy", "the controller runs: stop first")

    def op_gains(self, **changes) -> dict[str, Any]:
        self.control.new_gains = gains = self.changed_gains(changes)
        if self.control.mode not in ("streaming", "hold"):
            self.control.gains = gains
        return asdict(gains)

    def changed_gains(self, changes: dict[str, Any]) -> Gains:
        values = asdict(self.control.new_gains or self.control.gains)
        for name, value in changes.items():
            clip = name.endswith("clip")
            values[name] = tuple(vector(name, value, 3).tolist()) if clip else number(name, value, 0, 1e5)
        check_gains(values, self.args)
        return Gains(**values)

    def op_hold(self) -> dict[str, Any]:
        self.control.hold_wish = "a client asked for it", time.monotonic()
        return {}

    def op_stop(self) -> dict[str, Any]:
        self.control.stop_wish = "a client asked for it", time.monotonic()
        return {}

    def op_job(self, handle) -> dict[str, Any]:
        job = self.jobs.get(text("handle", handle, 8, 64))
        if job is None:
            raise Refused("unknown_handle", f"no job {handle}")
        return job.report()

    def begin(self, handle: object, op: str, steps: Callable[[], Iterator[None]] | None) -> dict[str, Any]:
        """A new arm's job, or with a known handle how that one goes; steps None: a gripper's job."""
        handle = text("handle", handle, 8, 64)
        if handle not in self.jobs:
            if steps:
                self.ready_for(op)
            self.jobs[handle] = job = Job(handle, op)
            if len(self.jobs) > 256:
                self.jobs.popitem(last=False)
            if steps:
                self.control.begin(job, steps())
        return self.jobs[handle].report()

    def op_start(self, handle, **changes) -> dict[str, Any]:
        gains = self.changed_gains(changes)
        return self.begin(handle, "start", lambda: self.control.start_streaming(gains))

    def op_move_joints(self, handle, q, speed=0.2) -> dict[str, Any]:
        q, speed = vector("q", q, 7), number("speed", speed, 0.01, 1)
        if not np.isfinite(q).all() or np.abs(q).max() > 4:
            raise Refused("bad_argument", "q: give 7 finite angles, rad")
        return self.begin(handle, "move_joints", lambda: self.control.move_joints(q, speed))

    def op_reset(self, handle, speed=0.2) -> dict[str, Any]:
        speed = number("speed", speed, 0.01, 1)
        return self.begin(handle, "reset", lambda: self.control.move_joints(None, speed))

    def op_recover(self, handle) -> dict[str, Any]:
        return self.begin(handle, "recover", self.control.recover)

    def op_gripper(self, handle, action, width=0.0, speed=1.0, force=0.5) -> dict[str, Any]:
        if action not in ("open", "close", "move", "activate", "stop"):
            raise Refused("bad_argument", "action: give open, close, move, activate or stop")
        if self.gripper.kind == "none":
            raise Refused("unavailable", "there is no gripper")
        width = number("width", width, 0, self.gripper.max_width)
        speed, force = number("speed", speed, 0, 1), number("force", force, 0, 1)
        new = handle not in self.jobs
        report = self.begin(handle, "gripper", None)
        if new:
            self.gripper.submit(self.jobs[handle], action, width, speed, force)
        return report

    def op_frames(self, cameras=None) -> list[str]:
        names = list(self.args.cameras) if cameras is None else cameras
        self.need_scene()
        if not isinstance(names, list) or not all(isinstance(n, str) and n in self.args.cameras for n in names):
            raise Refused("bad_argument", f"cameras: give some of {list(self.args.cameras)}")
        if self.renderer.requests.qsize() > 100:
            raise Refused("busy", "too many requests for frames are waiting")
        return names

    def need_scene(self) -> None:
        if not self.control.arm.has_task:
            raise Refused("unavailable", "only the simulated robot has this")

    def op_task(self) -> dict[str, Any]:
        self.need_scene()
        return {"env_id": self.args.env_id} | self.control.arm.task

    def op_reset_task(self, handle, seed=None) -> dict[str, Any]:
        self.need_scene()
        seed = None if seed is None else int(number("seed", seed, 0, 2**31))
        return self.begin(handle, "reset_task", lambda: self.control.reset_task(seed))


# --- Doctor -----------------------------------------------------------------------------------------------------------
def examine(args: Args) -> Iterator[tuple[bool | None, str, str]]:
    """(whether it is all right, None for advice; what was looked at; the fix) for every check."""
    version = sys.version_info[:2]
    yield version >= (3, 11), f"Python {platform.python_version()}", "Python 3.11 or newer"
    wanted = {"msgpack": "", "pyzmq": "", "numpy": ""}
    wanted |= {"sim": {"mujoco": "", "gymnasium": ""}, "franky": {"franky-control": "==2.0.0"}}.get(
        args.robot, {"panda-python": "==1.1.1"}
    )
    wanted |= {"pymodbus": "==3.16.1", "pyserial": "==3.5"} if args.gripper == "robotiq" else {}
    for name, pin in wanted.items():
        try:
            yield True, f"{name} {importlib.metadata.version(name)}", ""
        except importlib.metadata.PackageNotFoundError:
            yield False, f"{name} is not installed", f"pip install {name}{pin}"
    with contextlib.suppress(OSError), socket.socket() as probe:
        busy = args.port and probe.connect_ex(("127.0.0.1", args.port)) == 0
        yield not busy, f"port {args.port} is {'taken' if busy else 'free'}", "end the other server, or --port"
    if args.gripper == "robotiq":
        port = Path(args.gripper_port)
        yield (
            port.exists(),
            f"{port} {'exists' if port.exists() else 'is missing'}",
            "plug in the gripper's USB adapter",
        )
        if port.exists():
            may = os.access(port, os.R_OK | os.W_OK)
            yield may, f"{port} {'may' if may else 'may not'} be opened", "sudo usermod -aG dialout $USER, log in again"
    if args.robot != "sim":
        yield from examine_robot(args.robot_ip)


def examine_robot(ip: str) -> Iterator[tuple[bool | None, str, str]]:
    """The parts of `examine` that only a real arm needs."""
    import resource

    release, version = platform.release(), platform.version()
    realtime = Path("/sys/kernel/realtime")
    rt = "PREEMPT_RT" in version or "PREEMPT RT" in version or realtime.exists() and realtime.read_text().strip() == "1"
    kernel_fix = (
        "a real-time kernel: sudo pro enable realtime-kernel (Ubuntu), apt install linux-image-rt-amd64 (Debian)"
    )
    yield bool(rt) or None, f"kernel {release}{' with' if rt else ' without'} PREEMPT_RT", kernel_fix
    limit = resource.getrlimit(resource.RLIMIT_RTPRIO)[0]
    allowed = os.geteuid() == 0 or limit in (-1, resource.RLIM_INFINITY) or limit >= 99
    yield (
        allowed,
        f"real-time priority limit {limit}",
        "/etc/security/limits.conf: @realtime - rtprio 99, and join that group",
    )
    governors = {
        path.read_text().strip() for path in Path("/sys/devices/system/cpu").glob("cpu*/cpufreq/scaling_governor")
    }
    slow = governors - {"performance"}
    yield (
        not slow or None,
        f"CPU governor {sorted(governors) or 'not shown'}",
        "sudo cpupower frequency-set -g performance",
    )
    firmware = firmware_version(ip)
    yield (
        firmware is not None,
        f"robot at {ip}: protocol version {firmware}",
        "cable into the control cabinet, brakes open, FCI on",
    )
    if shutil.which("ping"):
        flags = ["-c", "200", "-i", "0.01", "-s", "1200", "-q", ip]
        output = subprocess.run(["ping", *flags], capture_output=True, text=True, timeout=30).stdout
        if times := re.search(r"= ([\d.]+)/([\d.]+)/([\d.]+)", output):
            good = float(times[3]) < 1.0
            fix = "a cable of its own, no switch; energy saving off: sudo ethtool --set-eee IFACE eee off"
            yield good, f"round trip {times[2]} ms, longest {times[3]} ms", fix
        else:
            yield False, f"no answer to ping from {ip}", "same subnet? ip addr"


def doctor(args: Args) -> int:
    """Prints a line per check; the number of those that failed."""
    failed = 0
    for good, what, fix in examine(args):
        failed += good is False
        print(
            f"{'ok  ' if good else 'FIX ' if good is False else 'note'}  {what}{'' if good else ': ' + fix}", flush=True
        )
    print("ready" if not failed else f"{failed} to fix")
    return failed


# --- Main -------------------------------------------------------------------------------------------------------------
def make_keys(folder: Path) -> None:
    if folder.exists():
        fail(f"--keygen: {folder} exists; take another folder, or remove it and give every client the new keys")
    folder.mkdir(parents=True, mode=0o700)
    for name in ("server", "client"):
        zmq.auth.create_certificates(folder, name)
    print(f"wrote {folder}: copy server.key, client.key and client.key_secret to the client's machine, nothing else")


def main(args: Args) -> None:
    check(args)
    if args.keygen:
        return make_keys(Path(args.keys))
    if args.doctor:
        raise SystemExit(1 if doctor(args) else 0)
    try:
        handler = logging.handlers.RotatingFileHandler(args.log_file, maxBytes=5_000_000, backupCount=3)
    except OSError as error:
        fail(f"--log-file {args.log_file}: {error}")
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO, handlers=[handler])
    sys.setswitchinterval(5e-4)  # a thread that computes gives way to the robot thread after 0.5 ms
    Server(args).serve()


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
