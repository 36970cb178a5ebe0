"""Serves one robot arm and its gripper over ZeroMQ: a simulated Franka, or with --robot franky or panda-py a real one.

    python robot_server.py                                              # needs Ctrl-C to end; simulated, in real time
    python robot_server.py --doctor                                     # is this machine ready? One line per check
    python robot_server.py --robot franky --robot-ip 172.16.0.2 --gripper robotiq   # needs an FR3 and a gripper
    python robot_server.py --robot panda-py --robot-ip 172.16.0.2       # needs a Panda
    python robot_server.py --keygen --keys keys                         # needs a folder that is not there yet
    python robot_server.py --bind 0.0.0.0 --keys keys                   # needs these keys on the client's machine too

Two processes. The robot process has the arm's SDK, the gripper, the limiter, the watchdog and the faults, and nothing
that could read what comes from outside. The front has sockets, msgpack, keys and leases; it sends the robot process
small messages of a fixed form and reads its state from memory that both share. Whatever a network does to the front,
the arm holds and stops; a spare front takes over within a few hundredths of a second, and clients go on.
Nothing that a client sends is trusted: commands are refused or limited in the thread that talks to the robot. A client
that falls silent means hold, then stop. Faults stay until a person has looked and a client sends `recover`.

Units are m, rad, s, N, Nm; poses are x, y, z and a quaternion x, y, z, w, in the frame of the robot's base; the tcp is
libfranka's end effector frame. Requests go to port 5600 (ROUTER), the state is published on the next one (PUB).

A request is one frame, a msgpack map {v: 2, op, id, token, args: {...}}, of at most 64 KiB, 64 entries per map or list,
256 bytes per text, text keys, no binary data. Frames before an empty one are the sender's envelope and come back, so
that REQ with REQ_RELAXED and REQ_CORRELATE works. The reply is one msgpack map:
    v, id, op, ok; error: {code, message} or None; result: map or None; and always, of the last control tick:
    server_id (new at every start), server_time (s), robot_time (s), state_age (s), mode, reference (7; the pose that
    is commanded after all limits, the measured one when idle), lease (its holder's name or None), seq (the last
    accepted), fault: {code, message, count} or None; jobs: {arm, gripper}, the one that goes on or else the last one,
    {handle, op, status: queued running done failed, error (text or None), seconds}, or None
Every 10 ms the same map as of `state` is published in a single frame; subscribe to b"" with CONFLATE.
A connection is cut that has 256 KiB of requests under way, sends a message of more than 8 frames, does not read its
answers for 2 s, or is one more than 128: then one that never asked, or was silent for longest. A client's own
heartbeats are answered.

modes       idle: no controller runs, the robot holds itself; streaming; hold: the controller runs, the reference
            stands; busy: a job moves the arm; stopping: it comes to rest; fault: latched until `recover`
error codes malformed version unknown_op bad_argument: the request; no_lease lease_taken; fault held not_streaming busy:
            the server's mode; refused: by the limiter, with the reason; stale; unavailable; unknown_handle;
            handle_used: by another operation; internal

operation (L: needs the lease's token, J: a job, see below)
hello {}    -> protocol, server_id, server, robot, gripper, limits, watchdog, gains, reset_joints, lease
state {}    -> tcp_pose (7), tcp_vel (6), tcp_force (3), tcp_torque (3): of the surroundings on the tcp, in base axes;
            q (7), dq (7), gripper_width, gripper_moving, gripper_holding, gripper_fault (text or None),
            gripper_closure (the last one that a target gave, None after a `gripper`), robot_mode (idle move guiding
            reflex user_stopped automatic_error_recovery other), errors (texts), success_rate, overruns (control ticks
            over 5 ms late), reflexes (since the start), limited (limits that act: box tilt speed clip)
acquire {name, token, ttl=1, takeover=False} -> ttl. The client makes up the token (16 to 64 characters); the same one
            again renews the lease, as any request with the token does. Without any for `ttl` s: hold, no lease.
release {}  L; the arm holds, and after 2 s stops.
target {pose, seq=None, closure=None}  L, streaming or in the watchdog's hold -> as state. A seq must be above this
            lease's last one. closure: 0 (open) to 1 (closed) of the gripper; only another one than the last is an
            order, which never makes the arm wait and is shown in jobs, with op target and no handle
gains {stiffness, damping, rotational_stiffness, rotational_damping, clip (3), rotational_clip (3),
            nullspace_stiffness}  L, any of them -> all. Force is at most stiffness x clip, speed that over damping.
hold {}     from anyone: reference stands, a job is broken off; targets are refused until `start`
stop {}     from anyone: soft stop, then idle
start {handle, any gains}  L J: streaming, from the measured pose; during a soft stop it waits for its end
move_joints {handle, q (7), speed=0.2}  L J: speed is a fraction of the joints' limits; idle after it
reset {handle, speed=0.2}  L J: move_joints to --reset-joints
recover {handle}  L J: ends fault and reflex, re-seeds the reference at the measured pose; idle after it
gripper {handle, action: open close move activate stop, width (for move), speed=1.0, force=0.5}  L J: speed and force
            are fractions; beside arm jobs; a newer one supersedes; fails when the fingers do not arrive in time
job {handle} -> handle, op, status, error, seconds, as in jobs
task {}     -> env_id, robot_time, success, observation, expert: {pose (7), close}, where the task's scripted expert
            goes next; scene: {name: numbers}, at most 20 ms old, for whoever has franka_sim and wants images:
            sim.set_state({name: np.array(numbers)}), sim.render(camera, height, width). Simulated robot only.
reset_task {handle, seed=None}  L J: the task's reset, arm included. Simulated robot only.
A job's handle is made up by the client (8 to 64 ASCII characters). The same handle again does not start anything again
but answers as `job` does: so every request but `target` with a seq may be repeated. An arm's job ends when the lease
does. What goes on is never forgotten, of what has ended the last 256.

Expect: p50_ms <= 0.4, p99_ms <= 1 (real-time priority) [benchmarks/results/robot_round_trip.csv contender=ours]
Expect: cpu_percent_of_a_core <= 25, server_mb <= 300 [benchmarks/results/robot_load.csv contender=ours]

Sources: watchdog, limits and leases answer what SERL's server lacks (serl_robot_infra/robot_servers/franka_server.py,
commit cd5f7e7: no deadline, no limit, errors cleared before every pose); impedance and gains are SERL's.
"""

import contextlib
import functools
import importlib.metadata
import ipaddress
import json
import logging
import logging.handlers
import math
import mmap
import os
import platform
import queue
import re
import secrets
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
import zlib
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np

PROTOCOL_VERSION = 2
LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"
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


def is_local(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def check(args: Args) -> None:
    """Exits with one line when a flag makes no sense, or a network would be served without protection."""
    signed = ("reset_joints", "workspace_low", "workspace_high")
    for name, value in (vars(args) | {f"gains.{name}": value for name, value in vars(args.gains).items()}).items():
        if type(value) in (int, float, tuple):
            if not np.isfinite(value).all() or (np.min(value) < 0 and name not in signed):
                fail(f"{flag(name)} {value}: give finite numbers{'' if name in signed else ', not negative ones'}")
            if name.startswith("max_") and name != "max_force" and not value:
                fail(f"{flag(name)} 0: nothing could move")
    for wrong, message in (
        (not np.less(args.workspace_low, args.workspace_high).all(), "--workspace-low: must be below --workspace-high"),
        (not 200 <= args.control_hz <= 1000, f"--control-hz {args.control_hz}: give 200 to 1000"),
        (not args.frozen_after_s, "--frozen-after-s 0: give a time"),
        (not 0 < args.hold_after_s <= args.stop_after_s, "--hold-after-s: more than 0, at most --stop-after-s"),
        (0 < args.sim_speed < 0.1, f"--sim-speed {args.sim_speed}: give 0 (as fast as it can) or at least 0.1"),
        (args.port > 65534, f"--port {args.port}: give at most 65534"),
        (args.gripper == "sim" and args.robot != "sim", "--gripper sim: only with --robot sim"),
        (args.gripper == "franka-hand" and args.robot == "sim", "--gripper franka-hand: not with --robot sim"),
        (not within_joint_limits(np.array(args.reset_joints)), f"--reset-joints: {JOINT_LIMITS_TEXT}"),
        (args.keygen and not args.keys, "--keygen: name the folder to make, --keys DIR"),
        (
            not (is_local(args.bind) or args.keys or args.insecure_lan),
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
    for prefix, least, most, least_clip, most_clip, fastest in (
        ("", 10.0, args.max_stiffness, 1e-4, args.max_clip, args.max_speed),
        ("rotational_", 1.0, args.max_stiffness / 10, 1e-3, args.max_clip * 10, args.max_rotation_speed),
    ):
        stiffness, damping, clip = (gains[prefix + name] for name in ("stiffness", "damping", "clip"))
        low, high = 0.5 * math.sqrt(max(stiffness, 0)), 4 * math.sqrt(max(stiffness, 0))  # a quarter of critical, twice
        if not least <= stiffness <= most:
            problem = f"stiffness {stiffness:g}: give {least:g} to {most:g}"
        elif not low <= damping <= high:
            problem = f"damping {damping:g}: give {low:.1f} to {high:.1f} with this stiffness"
        elif not all(least_clip <= c <= min(most_clip, fastest * damping / stiffness) for c in clip):
            limit = math.floor(1e4 * min(most_clip, fastest * damping / stiffness)) / 1e4
            shown = " ".join(f"{c:g}" for c in clip)
            problem = f"clip {shown}: give {least_clip:g} to {limit:g} with this stiffness and damping"
        if problem:
            raise Refused("bad_argument", prefix + problem)
    if not 0 <= gains["nullspace_stiffness"] <= 50:
        raise Refused("bad_argument", f"nullspace_stiffness {gains['nullspace_stiffness']:g}: give 0 to 50")


def gain_values(gains: dict[str, Any]) -> list[float]:
    """All gains as 11 numbers, in the order of Gains."""
    values = []
    for name in Gains.__dataclass_fields__:
        values += gains[name] if "clip" in name else [gains[name]]
    return values


def gains_from(values: Sequence[float], args: Args) -> Gains:
    """The other way round; raises Refused for gains beyond the limits."""
    numbers = iter(values)
    gains = {}
    for name in Gains.__dataclass_fields__:
        gains[name] = tuple(next(numbers) for _ in range(3)) if "clip" in name else next(numbers)
    check_gains(gains, args)
    return Gains(**gains)


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
            return "the target is not finite"
        if abs((length := norm(target[3:])) - 1) > 0.01:
            return f"the quaternion of the target has length {length:.4g}, not 1"
        if (jump := norm(target[:3] - reference[:3])) > (most := self.args.max_jump):
            return f"the target jumps {jump:.4g} m from the reference, --max-jump is {most}"
        if (turn := norm(rotation_between(target[3:] / length, reference[3:]))) > (most := self.args.max_rotation_jump):
            return f"the target turns {turn:.3g} rad from the reference, --max-rotation-jump is {most}"
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
    task_news = False  # whether `task` has changed
    waits = True  # whether ticks follow the clock

    def __init__(self, args: Args):
        self.args, self.controlling = args, False  # controlling: whether the impedance controller runs
        self.info: dict[str, Any] = dict.fromkeys(("sdk", "libfranka", "firmware", "task"))
        self.info["kind"] = args.robot
        self.info["speed"] = 1.0  # of its clock, robot seconds per second

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
        """Begin to end whatever runs, softly; `moving` is False when the arm holds itself. Twice is once."""

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
        os.environ["MUJOCO_GL"] = "disable"  # whoever wants images renders them from what `task` gives
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
        self.info |= {"sdk": f"mujoco {mujoco.__version__}", "task": args.env_id, "speed": args.sim_speed}
        self.waits, self.time, self.reflex, self.task = args.sim_speed > 0, 0.0, (), {}
        self.gripper_command: tuple[float, float, float] | None = None  # width, force, speed
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
        if self.time - self.task_time >= 0.02:
            self.task = self.look_at_task()
            self.task_time = self.time
            self.task_news = True
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
        return {
            "env_id": self.args.env_id,
            "robot_time": self.time,
            "success": bool(env.evaluate()[0]),
            "observation": observation,
            "expert": expert,
            "scene": {name: value.tolist() for name, value in self.sim.get_state().items()},
        }

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
        self.franky = franky
        self.info |= sdk_versions("franky-control")
        self.connect()

    def connect(self) -> None:
        version = reach(self.args.robot_ip)
        try:
            self.robot = self.franky.Robot(self.args.robot_ip, realtime_config=self.franky.RealtimeConfig.Ignore)
            self.robot.set_collision_behavior(self.args.collision_torque, self.args.collision_force)
            self.model = self.robot.model
            self.motion = None
            self.resting = False  # a soft stop goes on
            self.info["firmware"] = version
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
            self.motion = None
            self.controlling = False
            self.resting = False
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
            self.controlling = True
            self.resting = False
            self.gains = gains
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
        """A stop that goes on is left alone: franky takes no joint stop over a running torque stop."""
        with self.faults():
            if not self.robot.is_in_control:
                self.resting = False
            elif not self.resting:
                self.motion = self.franky.TorqueStopMotion() if self.controlling else self.franky.JointStopMotion()
                self.robot.move(self.motion, asynchronous=True)
                self.resting = True
        self.controlling = False

    def move_to_joint_positions(self, q: np.ndarray, speed: float) -> None:
        with self.faults():
            self.resting = False
            self.motion = self.franky.JointMotion(q.tolist(), relative_dynamics_factor=speed)
            self.robot.move(self.motion, asynchronous=True)

    def moving(self) -> bool:
        with self.faults():
            self.robot.poll_motion()
            return self.robot.is_in_control
        return False

    def recover(self) -> None:
        self.controlling = False
        self.resting = False
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
    """The version of Franka's interface that the robot speaks, from how it answers version 0. Raises ArmError within
    seconds where libfranka would wait for a minute, and for whatever else answers on that port."""
    try:
        with socket.create_connection((ip, 1337), timeout=3) as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
            udp.bind((tcp.getsockname()[0], 0))  # where a robot that accepts sends its state
            port = udp.getsockname()[1]
            tcp.sendall(struct.pack("<IIIHH", 0, 1, 16, 0, port))  # Connect: command, its number, size, version, port
            command, number, size = struct.unpack("<III", tcp.recv(12, socket.MSG_WAITALL))
            if (command, number) != (0, 1) or size not in (15, 20):
                raise OSError("what answers on port 1337 is no robot")
            body = tcp.recv(size - 12, socket.MSG_WAITALL)
            return struct.unpack_from("<H", body, 1 if size == 15 else 2)[0]  # after a byte; franky-sim pads
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
        self.args = args
        self.state = GripperState()
        self.job: Job | None = None  # the last one that was submitted
        self.orders: queue.SimpleQueue[tuple[Job, float, Callable[[], None]]] = queue.SimpleQueue()
        self.late = ""  # why the last order was given up
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self.run, name="gripper", daemon=True)

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
        way = self.max_width / max(speed * self.max_speed, 0.01)  # s from one end to the other
        self.job = job
        self.orders.put(
            (job, 30.0 if action == "activate" else 3.0 + way, functools.partial(getattr(self, action), *values))
        )

    def follow(self, closure: float) -> None:
        """Any thread: the closure of a target, 0 (open) to 1 (closed)."""
        action = {0.0: "open", 1.0: "close"}.get(closure, "move")
        self.submit(Job("", "target", iter(())), action, (1 - closure) * self.max_width, 1.0, 0.5)

    def run(self) -> None:
        go_first()
        job: Job | None = None
        give_up = 0.0
        while not self.stopping.wait(1 / self.hz):
            try:
                while not self.orders.empty():
                    if job:
                        job.finish("superseded by a newer one")
                    job, seconds, call = self.orders.get()
                    job.status = "running"
                    give_up = time.monotonic() + seconds
                    self.late = ""
                    self.state = replace(self.state, fault=None)
                    if self.orders.empty():
                        call()
                state = self.poll()
                if job and state.moving and time.monotonic() > give_up:
                    self.late = f"the fingers did not arrive within {seconds:.1f} s"
                    self.stop()
                    state = replace(state, moving=False)
                state = replace(state, fault=state.fault or self.late or None)
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


# --- What may follow what ---------------------------------------------------------------------------------------------
# The error code with which an operation is refused in a mode, "" where it may be carried out. held: a hold that someone
# asked for, or the force guard; hold: the watchdog's. `hold`, `stop` and what only the gripper does may always be.
MODES = ("idle", "streaming", "hold", "held", "busy", "stopping", "fault")
FOLLOWS = {
    "target": ("not_streaming", "", "", "held", "busy", "not_streaming", "fault"),
    "start": ("", "", "", "", "busy", "", "fault"),
    "move_joints": ("", "", "", "", "busy", "", "fault"),
    "reset": ("", "", "", "", "busy", "", "fault"),
    "reset_task": ("", "", "", "", "busy", "", "fault"),
    "recover": ("", "", "", "", "busy", "", ""),
}


def check_mode(op: str, status: dict[str, Any]) -> None:
    """Raises Refused if the mode in `status` (step, held, fault, jobs) does not allow `op`."""
    code = FOLLOWS[op][MODES.index(status["step"])]
    if code == "busy":
        raise Refused(code, f"{status['jobs']['arm']['op']} is going on")
    if code == "fault":
        fault = status["fault"]
        raise Refused(code, f"{fault['code']}: {fault['message']}; look at the robot, then recover")
    if code == "held":
        raise Refused(code, f"{status['held']}; start again")
    if code:
        raise Refused(code, "start first: the controller does not run")


# --- Between the two processes ----------------------------------------------------------------------------------------
class Command:
    """What the front tells the robot process: a message of always the same size, with nothing in it to be parsed."""

    KINDS = ("alive", "lease", "target", "gains", "hold", "stop", "job", "gripper", *FOLLOWS)
    FORM = struct.Struct("<BId12d64s128s")

    def __init__(self, kind: str, number: int, lease_until: float, values: Sequence[float], text: str, name: str):
        self.kind = kind
        self.number = number  # counted by the front; the robot process says which one it has seen last
        self.lease_until = lease_until  # monotonic s
        self.values = tuple(values)  # up to 12
        self.text = text  # a job's handle, or the lease's token
        self.name = name  # of the lease's holder

    def pack(self) -> bytes:
        values = (*self.values, *(0.0,) * (12 - len(self.values)))
        texts = self.text.encode(), self.name.encode()
        return self.FORM.pack(self.KINDS.index(self.kind), self.number, self.lease_until, *values, *texts)

    @classmethod
    def unpack(cls, data: bytes) -> "Command":
        kind, number, lease_until, *values, text, name = cls.FORM.unpack(data)
        texts = (part.rstrip(b"\0").decode(errors="replace") for part in (text, name))
        return cls(cls.KINDS[kind], number, lease_until, values, *texts)


# What the robot process tells in every tick, as numbers: names, and how many. The rest, which changes seldom, is JSON.
NUMBERS = {"tcp_pose": 7, "tcp_vel": 6, "tcp_force": 3, "tcp_torque": 3, "q": 7, "dq": 7, "reference": 7}
NUMBERS |= dict.fromkeys(("robot_time", "at", "ticked", "number", "lease_until", "success_rate", "gripper_width"), 1)
STATE = ("tcp_pose", "tcp_vel", "tcp_force", "tcp_torque", "q", "dq", "gripper_width", "gripper_moving")
STATE += ("gripper_holding", "gripper_fault", "gripper_closure", "robot_mode", "errors", "success_rate")
STATE += ("overruns", "reflexes", "limited")  # what `state` answers


class Board:
    """A dictionary in memory that two processes share: one writes, the other reads the newest one. There are two
    places in turn, each with a checksum, so that what is half written is never taken for whole."""

    HEAD = struct.Struct("<QII")  # sequence, length, checksum
    SIZE = 1 << 17  # bytes, both places

    def __init__(self, memory: mmap.mmap, start: int, numbers: dict[str, int]):
        self.memory = memory
        self.starts = (start, start + self.SIZE // 2)
        self.numbers = numbers
        self.form = struct.Struct(f"<{sum(numbers.values())}d")
        self.sequence = 0
        self.rest: dict[str, Any] = {}
        self.text = b"{}"  # the same as JSON
        self.newest: dict[str, Any] = {}
        self.lock = threading.Lock()

    def write(self, values: dict[str, Any]) -> None:
        numbers: list[float] = []
        for name, size in self.numbers.items():
            numbers += values[name] if size > 1 else [values[name]]
        rest = {name: value for name, value in values.items() if name not in self.numbers}
        with self.lock:
            if rest != self.rest:
                self.rest = rest
                self.text = json.dumps(rest).encode()
            data = self.form.pack(*numbers) + self.text
            if len(data) > self.SIZE // 2 - self.HEAD.size:
                raise ValueError(f"{len(data)} bytes of state are too many")
            self.sequence += 1
            start = self.starts[self.sequence % 2]
            body = start + self.HEAD.size
            self.memory[body : body + len(data)] = data
            self.HEAD.pack_into(self.memory, start, self.sequence, len(data), zlib.crc32(data, self.sequence))

    def read(self) -> dict[str, Any]:
        """The newest dictionary; the same one again until there is a newer one."""
        for _ in range(100):
            heads = [(self.HEAD.unpack_from(self.memory, start), start) for start in self.starts]
            (sequence, length, checksum), start = max(heads)
            if sequence == self.sequence:
                return self.newest
            body = start + self.HEAD.size
            data = self.memory[body : body + length]
            if length and zlib.crc32(data, sequence) == checksum:
                self.sequence = sequence
                self.newest = self.unpack(data)
                return self.newest
            time.sleep(0.0002)  # it is being written
        raise OSError("the robot process's state cannot be read")

    def unpack(self, data: bytes) -> dict[str, Any]:
        numbers = self.form.unpack_from(data)
        if self.text != data[self.form.size :]:
            self.text = data[self.form.size :]
            self.rest = json.loads(self.text)
        values = dict(self.rest)
        position = 0
        for name, size in self.numbers.items():
            values[name] = numbers[position] if size == 1 else numbers[position : position + size]
            position += size
        return values


# --- Robot thread -----------------------------------------------------------------------------------------------------
def go_first() -> None:
    """This thread before those of other programs, where that is allowed (root, rtprio). All threads of the robot
    process do so, because each has to wait for whoever holds the interpreter's lock. libfranka does it itself."""
    if os.sched_getscheduler(0) == os.SCHED_OTHER:
        with contextlib.suppress(PermissionError):
            os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(10))


class Job:
    """A long operation; its handle is made up by the client."""

    def __init__(self, handle: str, op: str, steps: Iterator[None]):
        self.handle = handle
        self.op = op
        self.steps = steps
        self.status = "queued"
        self.error: str | None = None
        self.began = time.monotonic()
        self.ended: float | None = None

    def finish(self, error: str | None = None) -> None:
        self.error = error
        self.ended = time.monotonic()
        self.status = "failed" if error else "done"
        log.log(logging.WARNING if error else logging.INFO, "%s %s %s", self.op, self.status, error or "")

    def report(self) -> dict[str, Any]:
        report = {name: getattr(self, name) for name in ("op", "status", "error")}
        seconds = (self.ended or time.monotonic()) - self.began
        return {"handle": self.handle or None, **report, "seconds": seconds}


NO_LEASE = {"name": None, "token": "", "ttl": 1.0, "seq": None}


class Control(threading.Thread):
    """The robot thread: constructs the arm, reads it, obeys the front, limits the reference, watches. `link` is where
    the front's commands come from, `board` where the state goes."""

    def __init__(self, args: Args, gripper: "Gripper", board: Board, scene: Board):
        super().__init__(name="robot", daemon=True)
        self.args = args
        self.gripper = gripper
        self.board = board
        self.scene = scene
        self.link: socket.socket | None = None
        self.limiter = Limiter(args)
        self.arm: Arm | None = None
        self.state: ArmState | None = None
        self.gains = args.gains  # in force
        self.wanted_gains = args.gains
        # threads
        self.failure = ""  # why there is no arm
        self.ready = threading.Event()
        self.stopping = threading.Event()
        self.may_block_until = 0.0  # a call into the SDK that takes longer counts as frozen
        # mode
        self.phase = "idle"  # idle streaming hold busy breaking stopping
        self.held = ""  # why it is held until `start`
        self.fault: dict[str, Any] | None = None  # code, message, count
        self.faults = 0
        self.reflexes = 0
        self.overruns = 0
        # jobs: of the arm the one that goes on, of both the last one, all that are known
        self.job: Job | None = None
        self.last_job: Job | None = None
        self.jobs: dict[str, Job] = {}
        # what the front said
        self.front_heard = -math.inf
        self.number = 0
        self.answer: dict[str, Any] | None = None  # to the last command that wants one
        self.asked = ""  # hold or stop
        self.lease = NO_LEASE
        self.lease_until = -math.inf
        self.target: np.ndarray | None = None
        self.target_at = -math.inf
        self.closure: float | None = None
        # clocks
        self.robot_time = -math.inf  # the robot's own
        self.advanced = -math.inf  # when that last went on
        self.ticked = -math.inf  # start of the last tick

    @property
    def mode(self) -> str:
        phase = "stopping" if self.phase == "breaking" else self.phase
        return "fault" if self.fault else phase

    @property
    def step(self) -> str:
        """The mode for the table of what may follow what."""
        if self.job:
            return "busy"
        return "held" if self.held and self.mode == "hold" else self.mode

    def run(self) -> None:
        try:
            self.arm = ARMS[self.args.robot](self.args)
            if isinstance(self.gripper, SimGripper):
                self.gripper.arm = self.arm
            self.state = self.arm.get_state()
            self.advanced = time.monotonic()
            self.limiter.seed(self.state.tcp_pose)
            self.publish()
        except Exception as error:
            log.exception("the arm does not start")
            self.failure = str(error) if isinstance(error, ArmError) else repr(error)
        self.ready.set()
        if not self.failure:
            self.beat()

    def beat(self) -> None:
        """Ticks until the program ends, then lets the arm come to rest."""
        if self.arm.waits:
            go_first()
        due = time.monotonic()
        while not self.stopping.is_set():
            due += 1 / self.args.control_hz
            self.tick()
            early = due - time.monotonic()
            if not self.arm.waits:
                time.sleep(0)
            elif early > 0:
                time.sleep(early)
            elif early < -0.005:
                self.overruns += 1
                due = time.monotonic()
        with contextlib.suppress(ArmError):
            for _ in self.settle():
                self.state = self.arm.get_state()
                self.publish()
                time.sleep(0.005)
            self.phase = "idle"
            self.publish()

    def tick(self) -> None:
        """Listen, measure, watch, act, tell; whatever goes wrong ends as a fault, never as an exception."""
        now = time.monotonic()
        dt = 0.0
        try:
            self.listen(now)
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
        try:
            self.publish()
        except Exception as error:  # nor may one here
            if self.fault is None:
                log.exception("state")
            self.note_fault("internal", f"{type(error).__name__} while telling the state, see the log")

    # What the front says
    def listen(self, now: float) -> None:
        """Obeys all commands that have come."""
        for _ in range(200):
            link = self.link
            if link is None:
                return
            try:
                data = link.recv(Command.FORM.size)
            except OSError:  # nothing there, or the front is being replaced
                return
            if len(data) != Command.FORM.size:
                return
            command = Command.unpack(data)
            self.front_heard = now
            self.lease_until = min(command.lease_until, now + 10)
            self.answer = {"number": command.number, "code": "", "message": "", "job": None}
            try:
                self.obey(command, now)
            except Refused as error:
                self.answer |= {"code": error.code, "message": str(error)}
            self.number = command.number

    def obey(self, command: Command, now: float) -> None:
        """One command; raises Refused. What the front has checked is checked again."""
        kind, values = command.kind, command.values
        if kind in ("hold", "stop"):
            self.asked = "stop" if self.asked == "stop" else kind
        elif kind == "lease":
            self.grant(command, now)
        elif kind == "target":
            self.follow(np.array(values[:7]), *values[7:9], now)
        elif kind == "gains":
            self.wanted_gains = gains_from(values, self.args)
        elif kind == "job":
            self.answer["job"] = self.known(command.text).report()
        elif kind != "alive":
            self.answer["job"] = self.begin(kind, command.text, values).report()

    def grant(self, command: Command, now: float) -> None:
        """A new lease, or the same one with another duration. The old one's job ends, or its target."""
        ttl, is_new = command.values[:2]
        if is_new:
            self.target_at = min(self.target_at, now - self.args.hold_after_s)
            if self.job:
                self.end_job(f"broken off: {command.name} took the lease")
        seq = None if is_new else self.lease["seq"]
        self.lease = {"name": command.name, "token": command.text, "ttl": ttl, "seq": seq}

    def follow(self, pose: np.ndarray, closure: float, seq: float, now: float) -> None:
        """A new target, with the gripper's closure (NaN: none) and a number (-1: none)."""
        check_mode("target", self.status())
        if reason := self.limiter.refusal(pose, self.limiter.reference):
            raise Refused("refused", reason)
        self.target = pose
        self.target_at = now
        if seq >= 0:
            self.lease = self.lease | {"seq": int(seq)}
        if 0 <= closure <= 1 and closure != self.closure and self.gripper.kind != "none":
            self.closure = closure
            self.gripper.follow(closure)

    def known(self, handle: str) -> Job:
        if handle not in self.jobs:
            raise Refused("unknown_handle", f"no job {handle}")
        return self.jobs[handle]

    def begin(self, op: str, handle: str, values: Sequence[float]) -> Job:
        """A new job, or with a known handle that one, which does not start again."""
        if handle in self.jobs:
            if self.jobs[handle].op != op:
                raise Refused("handle_used", f"{handle} is the handle of {self.jobs[handle].op}: make up a new one")
            return self.jobs[handle]
        if op == "gripper":
            job = self.begin_gripper(handle, GRIPPER_ACTIONS[int(values[0])], *values[1:4])
        else:
            check_mode(op, self.status())
            job = self.job = self.last_job = Job(handle, op, self.steps_of(op, values))
        self.jobs[handle] = job
        ended = [name for name, other in self.jobs.items() if other.ended is not None]
        for name in ended[: max(len(self.jobs) - 256, 0)]:
            del self.jobs[name]
        return job

    def begin_gripper(self, handle: str, action: str, width: float, speed: float, force: float) -> Job:
        most = self.gripper.max_width
        if self.gripper.kind == "none":
            raise Refused("unavailable", "there is no gripper")
        if action == "move" and not 0 <= width <= most:  # nor NaN
            raise Refused("bad_argument", f"width: give a number from 0 to {most:g}")
        job = Job(handle, "gripper", iter(()))
        self.closure = None
        self.gripper.submit(job, action, width, speed, force)
        return job

    def steps_of(self, op: str, values: Sequence[float]) -> Iterator[None]:
        if op == "start":
            return self.start_streaming(gains_from(values, self.args))
        if op == "move_joints":
            q = np.array(values[:7])
            if not within_joint_limits(q):
                raise Refused("bad_argument", f"q: {JOINT_LIMITS_TEXT}")
            return self.move_joints(q, values[7])
        if op == "reset":
            return self.move_joints(None, values[0])
        if op == "reset_task" and not self.arm.has_task:
            raise Refused("unavailable", "only the simulated robot has this")
        if op == "reset_task":
            return self.reset_task(None if math.isnan(values[0]) else int(values[0]))
        return self.recover()

    # Measure, watch, act
    def measure(self, now: float) -> float:
        """Reads the arm; how far the robot's clock went on since the last tick, at most 20 ms."""
        state = self.arm.get_state()
        if not np.isfinite(np.concatenate([state.tcp_pose, state.tcp_vel, state.wrench, state.q, state.dq])).all():
            raise ArmError("sdk", "the robot's state is not finite")
        dt = state.time - self.robot_time
        if dt != 0:
            self.robot_time = state.time
            self.advanced = now
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
        """The watchdog's ladder, and what clients asked for."""
        args = self.args
        asked, self.asked = self.asked, ""
        hold = "a client asked to hold" if asked == "hold" else ""
        stop = "a client asked to stop" if asked == "stop" else ""
        silent = now - self.target_at
        lost = now > self.lease_until
        if self.job and (asked or lost):
            self.end_job(f"broken off: {hold or stop or 'the lease ended'}")
        if self.phase not in ("streaming", "hold"):
            return
        force = norm(self.state.wrench[:3])
        if 0 < args.max_force < force and not self.held:
            hold = f"an external force of {force:.0f} N exceeded --max-force {args.max_force:g}"
            self.limiter.seed(self.state.tcp_pose)
        if stop or silent > args.stop_after_s:
            log.warning("soft stop: %s", stop or f"no target for {silent:.1f} s")
            self.phase = "breaking"
            self.held = ""
        elif hold:
            log.warning("hold: %s", hold)
            self.phase = "hold"
            self.held = hold
        elif self.phase == "streaming" and (silent > args.hold_after_s or lost):
            log.warning("hold: %s", "the lease ended" if lost else f"no target for {silent:.2f} s")
            self.phase = "hold"
        elif not self.held and silent <= args.hold_after_s and not lost:
            self.phase = "streaming"

    def act(self, dt: float) -> None:
        """One step of the job, or of the reference."""
        arm = self.arm
        if self.job and self.fault and not self.recovering():
            self.end_job(f"{self.fault['code']}: {self.fault['message']}")
        elif self.job:
            self.step_job(self.job)
        elif self.phase in ("streaming", "hold") and not self.fault:
            if self.wanted_gains is not self.gains:
                gains = self.wanted_gains
                with self.blocking():
                    arm.set_gains(gains)
                self.gains = gains
            target = self.target if self.phase == "streaming" else None
            self.limiter.step(target, self.state, self.gains, dt)
            arm.stream(self.limiter.reference)
        elif arm.controlling or self.phase in ("streaming", "hold", "breaking"):  # nothing must run, or a fault came
            self.phase = "stopping"
            with self.blocking():
                arm.stop()
        elif self.phase == "stopping" and not arm.moving():
            self.phase = "idle"

    def step_job(self, job: Job) -> None:
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

    def end_job(self, error: str) -> None:
        job, self.job = self.job, None
        self.phase = "breaking"
        if job:
            job.finish(error)

    def latch(self, code: str, message: str) -> None:
        """The first fault stays until `recover`."""
        if not self.recovering():
            self.end_job(f"{code}: {message}")
        self.note_fault(code, message)

    def note_fault(self, code: str, message: str) -> None:
        """From any thread: the robot thread itself may hang."""
        if self.fault is None:
            self.faults += 1
            self.reflexes += code == "reflex"
            self.fault = {"code": code, "message": message, "count": self.faults}
            self.held = ""
            log.error("fault %d, %s: %s", self.faults, code, message)

    @contextlib.contextmanager
    def blocking(self, seconds: float = 2.0) -> Iterator[None]:
        """Around a call into the SDK that may take this long without being a frozen robot."""
        self.may_block_until = time.monotonic() + seconds
        self.publish()  # what has just begun is seen meanwhile
        try:
            yield
        finally:
            self.advanced = time.monotonic()
            self.may_block_until = 0.0

    # Jobs: generators, one step per tick
    def settle(self) -> Iterator[None]:
        """Until the arm holds itself; a stop that goes on already is not begun again."""
        self.phase = "busy"
        with self.blocking():
            self.arm.stop()
        give_up = time.monotonic() + 3
        while self.arm.moving():
            if time.monotonic() > give_up:
                raise ArmError("sdk", "the arm does not come to rest")
            yield

    def start_streaming(self, gains: Gains) -> Iterator[None]:
        self.wanted_gains = gains
        yield from self.settle()
        state = self.state
        self.gains = self.wanted_gains
        self.limiter.seed(state.tcp_pose)
        with self.blocking():
            self.arm.start(state.tcp_pose, state.q, self.gains)
        self.target = None
        self.target_at = time.monotonic()
        self.phase = "streaming"
        self.held = ""
        log.info("streaming with %s", self.gains)

    def move_joints(self, q: np.ndarray | None, speed: float) -> Iterator[None]:
        yield from self.settle()
        with self.blocking():
            if q is None:
                self.arm.reset(speed)
            else:
                self.arm.move_to_joint_positions(q, speed)
        while self.arm.moving():
            yield
        yield
        self.phase = "idle"

    def recover(self) -> Iterator[None]:
        with self.blocking(20):
            self.arm.recover()
        before = self.robot_time
        give_up = time.monotonic() + 2
        while (still := self.robot_time == before) or self.state.robot_mode in ("reflex", "user_stopped"):
            if time.monotonic() > give_up:
                reason = "its clock stands still" if still else f"it reports {self.state.robot_mode}"
                raise ArmError("sdk", f"the robot is not ready: {reason}")
            yield
        yield from self.settle()
        self.fault = None
        self.held = ""
        self.closure = None
        self.phase = "idle"

    def reset_task(self, seed: int | None) -> Iterator[None]:
        yield from self.settle()
        with self.blocking():
            self.arm.reset_task(seed)
        self.closure = None  # the scene's gripper stands where the task puts it
        yield
        self.phase = "idle"

    # What the front may know
    def status(self) -> dict[str, Any]:
        """Mode and jobs, as `check_mode` wants them."""
        arm_job = self.job or self.last_job
        gripper_job = self.gripper.job
        return {
            "mode": self.mode,
            "step": self.step,
            "held": self.held,
            "fault": self.fault,
            "jobs": {
                "arm": arm_job.report() if arm_job else None,
                "gripper": gripper_job.report() if gripper_job else None,
            },
        }

    def publish(self) -> None:
        state, gripper = self.state, self.gripper.state
        self.board.write(
            {
                **self.status(),
                "answer": self.answer,
                "lease": self.lease,
                "gains": vars(self.wanted_gains),
                "number": self.number,
                "lease_until": self.lease_until,
                "ticked": self.ticked,
                "at": state.at,
                "robot_time": state.time,
                "reference": self.limiter.reference.tolist(),
                "tcp_pose": state.tcp_pose.tolist(),
                "tcp_vel": state.tcp_vel.tolist(),
                "tcp_force": state.wrench[:3].tolist(),
                "tcp_torque": state.wrench[3:].tolist(),
                "q": state.q.tolist(),
                "dq": state.dq.tolist(),
                "gripper_width": gripper.width,
                "gripper_moving": gripper.moving,
                "gripper_holding": gripper.holding,
                "gripper_fault": gripper.fault,
                "gripper_closure": self.closure,
                "robot_mode": state.robot_mode,
                "errors": state.errors,
                "success_rate": state.success_rate,
                "overruns": self.overruns,
                "reflexes": self.reflexes,
                "limited": self.limiter.limited,
            }
        )
        if self.arm.task_news:
            self.scene.write(self.arm.task)
            self.arm.task_news = False


# --- Operations and their arguments -----------------------------------------------------------------------------------
REQUIRED = object()
GRIPPER_ACTIONS = ("open", "close", "move", "activate", "stop")


@dataclass(frozen=True)
class Argument:
    """What one argument of an operation must be."""

    kind: Literal["number", "whole", "vector", "text", "choice", "truth"]
    low: float = -math.inf  # of numbers, and of the length of texts
    high: float = math.inf
    size: int = 0  # of a vector, whose numbers may be anything
    choices: tuple[str, ...] = ()
    default: Any = REQUIRED

    def check(self, name: str, value: object) -> Any:
        """The value, in the type that is wanted; raises Refused."""
        if value is None and self.default is None:
            return None
        is_number = type(value) in (int, float)
        wanted = f"one of {' '.join(self.choices)}"
        if self.kind == "number":
            wanted = f"a number from {self.low:g} to {self.high:g}"
            if is_number and self.low <= value <= self.high:  # NaN is not
                return float(value)
        elif self.kind == "whole":
            wanted = f"a whole number from {self.low:g} to {self.high:g}"
            if type(value) is int and self.low <= value <= self.high:
                return value
        elif self.kind == "vector":
            wanted = f"{self.size} numbers"
            is_list = isinstance(value, list) and len(value) == self.size
            if is_list and all(type(x) in (int, float) for x in value):
                return [float(x) for x in value]
        elif self.kind == "text":
            wanted = f"a text of {self.low:g} to {self.high:g} characters"
            is_text = isinstance(value, str) and value.isprintable() and (name == "name" or value.isascii())
            if is_text and self.low <= len(value) <= self.high:
                return value
        elif self.kind == "truth":
            wanted = "true or false"
            if type(value) is bool:
                return value
        elif isinstance(value, str) and value in self.choices:
            return value
        raise Refused("bad_argument", f"{name}: give {wanted}, not {value!r:.40}")


@dataclass(frozen=True)
class Operation:
    arguments: dict[str, Argument]
    leased: bool = False  # needs the lease's token
    values: Callable[..., Sequence[float]] | None = None  # of a job: what the robot process gets of the arguments


HANDLE = Argument("text", 8, 64)
FRACTION = {"low": 0.0, "high": 1.0}
JOINT_SPEED = Argument("number", 0.01, 1.0, default=0.2)
GAINS = {
    "stiffness": Argument("number", 0, 1e5, default=None),
    "damping": Argument("number", 0, 1e5, default=None),
    "rotational_stiffness": Argument("number", 0, 1e5, default=None),
    "rotational_damping": Argument("number", 0, 1e5, default=None),
    "nullspace_stiffness": Argument("number", 0, 1e5, default=None),
    "clip": Argument("vector", size=3, default=None),
    "rotational_clip": Argument("vector", size=3, default=None),
}
OPERATIONS = {
    "hello": Operation({}),
    "state": Operation({}),
    "acquire": Operation(
        {
            "name": Argument("text", 1, 32),
            "token": Argument("text", 16, 64),
            "ttl": Argument("number", 0.2, 10.0, default=1.0),
            "takeover": Argument("truth", default=False),
        }
    ),
    "release": Operation({}, leased=True),
    "target": Operation(
        {
            "pose": Argument("vector", size=7),
            "seq": Argument("whole", 0, 2**53, default=None),
            "closure": Argument("number", **FRACTION, default=None),
        },
        leased=True,
    ),
    "gains": Operation(GAINS, leased=True),
    "hold": Operation({}),
    "stop": Operation({}),
    "start": Operation({"handle": HANDLE} | GAINS, leased=True),
    "move_joints": Operation(
        {"handle": HANDLE, "q": Argument("vector", size=7), "speed": JOINT_SPEED},
        leased=True,
        values=lambda q, speed: (*q, speed),
    ),
    "reset": Operation({"handle": HANDLE, "speed": JOINT_SPEED}, leased=True, values=lambda speed: (speed,)),
    "recover": Operation({"handle": HANDLE}, leased=True, values=tuple),
    "gripper": Operation(
        {
            "handle": HANDLE,
            "action": Argument("choice", choices=GRIPPER_ACTIONS),
            "width": Argument("number", 0.0, 1.0, default=None),
            "speed": Argument("number", **FRACTION, default=1.0),
            "force": Argument("number", **FRACTION, default=0.5),
        },
        leased=True,
        values=lambda action, width, speed, force: (
            GRIPPER_ACTIONS.index(action),
            math.nan if width is None else width,
            speed,
            force,
        ),
    ),
    "job": Operation({"handle": HANDLE}),
    "task": Operation({}),
    "reset_task": Operation(
        {"handle": HANDLE, "seed": Argument("whole", 0, 2**31, default=None)},
        leased=True,
        values=lambda seed: (math.nan if seed is None else seed,),
    ),
}


def checked(op: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """All arguments of an operation, defaults filled in; raises Refused."""
    known = OPERATIONS[op].arguments
    values = {}
    for name, argument in known.items():
        if name in arguments:
            values[name] = argument.check(name, arguments[name])
        elif argument.default is REQUIRED:
            raise Refused("bad_argument", f"{op} needs {name!r}")
        else:
            values[name] = argument.default
    for name in arguments:
        if name not in known:
            raise Refused("bad_argument", f"{op} has no {name!r:.40}, it has {[*known]}")
    return values


def parse(body: list[bytes]) -> dict[str, Any]:
    """The request, with fields of the right types; raises Refused."""
    import msgpack

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
    return request


# --- Front ------------------------------------------------------------------------------------------------------------
MAX_CONNECTIONS = 128
MAX_FRAMES = 8  # of a message
MAX_UNDERWAY = 1 << 18  # bytes that a connection has sent and that no message here has brought
MAX_ALL_UNDERWAY = 1 << 20  # the same of all together
MAX_GROWTH = 40 << 20  # bytes of memory of a front; then another one takes over


class Connection:
    def __init__(self, fd: int, now: float):
        self.socket = socket.socket(fileno=os.dup(fd))  # ours is the same connection, whatever becomes of the number
        self.address = self.socket.getpeername()[0]
        self.since = now
        self.taken = 0  # bytes received that messages have brought
        self.heard = False  # a message came since the last look
        self.served = False  # a message came ever
        self.received = 0
        self.was_cut = False
        self.acked = 0  # bytes that the peer has taken
        self.acked_at = now

    def facts(self) -> tuple[int, int, int, int]:
        """Bytes taken by the peer, bytes received, bytes that wait for the peer, ms since it last sent something:
        Linux's struct tcp_info."""
        info = self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        silent_ms = struct.unpack_from("<I", info, 52)[0]
        acked, received = struct.unpack_from("<QQ", info, 120)
        waiting = struct.unpack_from("<I", info, 144)[0]
        return acked, received, waiting, silent_ms


class Doors:
    """Who is connected, and who must go. libzmq bounds the length of a frame and the answers that wait, but not what
    comes in: frames of a message without end pile up, and a bound on messages (RCVHWM) lets a peer that closes amid a
    flood abort the process (libzmq 4841). So there is no such bound, and connections are looked at from outside:
    Linux counts what came through each of them, libzmq says which one brought a message. Whoever has sent much more
    than arrived here as messages is cut."""

    def __init__(self, sockets: Sequence[Any], encrypted: bool):
        import zmq

        events = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED
        failed = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
        failed |= zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
        self.monitors = [s.get_monitor_socket(events | failed) for s in sockets]
        self.overhead = 33 if encrypted else 0  # bytes per frame, of CURVE
        self.connections: dict[int, Connection] = {}
        self.left = 0  # bytes that connections which are gone have left in libzmq
        self.failed: deque[str] = deque(maxlen=100)  # handshakes whose connection is not gone yet
        self.strangers: Counter[str] = Counter()
        self.cuts: Counter[str] = Counter()

    def came(self, fd: int, frames: Sequence[bytes]) -> None:
        """A message has been read from this connection."""
        size = sum(len(frame) + (2 if len(frame) < 256 else 9) + self.overhead for frame in frames)
        if connection := self.connections.get(fd):
            connection.heard = True
            connection.served = True
            connection.taken += size
        else:
            self.left = max(self.left - size, 0)

    def look(self, now: float, drained: bool) -> None:
        """Learns who came and went, and cuts whom it must. `drained`: all that libzmq has read is here."""
        self.hear_monitors(now)
        if drained:
            self.left = 0
        underway: list[tuple[int, Connection]] = []
        silent: list[tuple[int, Connection]] = []
        for connection in self.connections.values():
            try:
                acked, connection.received, waiting, silent_ms = connection.facts()
            except OSError:
                continue
            if connection.heard and drained:
                connection.taken = connection.received  # what is not of messages, as heartbeats, does not add up
            connection.heard = False
            if acked != connection.acked or not waiting:
                connection.acked = acked
                connection.acked_at = now
            elif now - connection.acked_at > 2:
                self.cut(connection, "does not read")
            underway.append((connection.received - connection.taken, connection))
            if not connection.was_cut:
                silent.append((silent_ms, connection))
        self.limit_underway(underway)
        silent.sort(key=lambda pair: (not pair[1].served, pair[0]), reverse=True)
        for _, connection in silent[: max(len(silent) - MAX_CONNECTIONS, 0)]:
            self.cut(connection, "too many connections")

    def limit_underway(self, underway: list[tuple[int, Connection]]) -> None:
        underway.sort(key=lambda pair: pair[0], reverse=True)
        total = self.left + sum(size for size, _ in underway)
        for size, connection in underway:
            if size < MAX_UNDERWAY and (total < MAX_ALL_UNDERWAY or size < 4096):
                return
            total -= size
            self.cut(connection, "sends more than can be read")

    def hear_monitors(self, now: float) -> None:
        import zmq
        from zmq.utils.monitor import recv_monitor_message

        for monitor in self.monitors:
            while monitor.poll(0):
                message = recv_monitor_message(monitor)
                event, fd = message["event"], message["value"]
                if event == zmq.EVENT_ACCEPTED:
                    self.forget(int(fd))
                    with contextlib.suppress(OSError):  # it is gone already, or there are no descriptors left
                        self.connections[int(fd)] = Connection(int(fd), now)
                elif event in (zmq.EVENT_DISCONNECTED, zmq.EVENT_CLOSED):
                    connection = self.connections.get(int(fd))
                    if connection and not connection.taken and self.failed:
                        self.strangers[f"{connection.address} {self.failed.pop()}"] += 1
                    self.forget(int(fd))
                else:  # then comes the end of that connection
                    refused = event == zmq.EVENT_HANDSHAKE_FAILED_AUTH
                    self.failed.append("keys refused" if refused else "no handshake: no keys, or no ZeroMQ")

    def forget(self, fd: int) -> None:
        if connection := self.connections.pop(fd, None):
            self.left += max(connection.received - connection.taken, 0)
            connection.socket.close()

    def cut(self, connection: Connection, why: str) -> None:
        if connection.was_cut:
            return
        connection.was_cut = True
        self.cuts[f"{connection.address} {why}"] += 1
        with contextlib.suppress(OSError):
            connection.socket.shutdown(socket.SHUT_RDWR)


class Front:
    """Answers requests and publishes the state. Methods `op_*` are the operations that only the front carries out, or
    that want more than a look at their arguments."""

    def __init__(self, args: Args, link: socket.socket, board: Board, scene: Board, facts: dict[str, Any]):
        self.args = args
        self.link = link
        self.board = board
        self.scene = scene
        self.facts = facts  # what `hello` tells
        self.limiter = Limiter(args)
        self.number = int(board.read()["number"])
        self.unanswered: dict[str, dict[str, Any]] = {}  # a job that the robot thread has not heard of yet
        self.refusals: Counter[str] = Counter()
        self.complained = 0.0
        lease = board.read()["lease"]  # of the front before this one
        self.name = lease["name"]
        self.token = lease["token"]
        self.ttl = lease["ttl"]
        self.seq = lease["seq"]
        self.lease_until = board.read()["lease_until"]

    # Sockets
    def open_sockets(self, fds: Sequence[int]) -> None:
        import zmq

        args = self.args
        context = zmq.Context.instance()
        self.router, self.publisher = sockets = context.socket(zmq.ROUTER), context.socket(zmq.PUB)
        if args.keys:
            import zmq.auth
            from zmq.auth.thread import ThreadAuthenticator

            public, secret = zmq.auth.load_certificate(Path(args.keys) / "server.key_secret")
            self.authenticator = ThreadAuthenticator(context)
            self.authenticator.start()
            self.authenticator.configure_curve(domain="*", location=args.keys)  # every *.key in there may connect
        for s, fd, longest, waiting in zip(sockets, fds, (1 << 16, 256), (200, 20)):
            s.linger = 0
            s.maxmsgsize = longest
            s.rcvhwm = 0  # see Doors
            s.sndhwm = waiting  # messages that wait for a peer; more are dropped
            s.handshake_ivl = 1000  # ms
            s.tcp_keepalive = 1
            s.tcp_keepalive_idle = 5  # s
            s.tcp_maxrt = 5000  # ms until a pulled cable ends a connection
            s.ipv6 = True
            if args.keys:
                s.curve_publickey = public
                s.curve_secretkey = secret
                s.curve_server = True
            s.use_fd = fd  # the robot process listens, so that nobody is turned away while there is no front
            s.bind("tcp://127.0.0.1:1")  # a name only
        self.doors = Doors(sockets, bool(args.keys))
        self.poller = zmq.Poller()
        for s in (self.router, self.link.fileno(), *self.doors.monitors):
            self.poller.register(s, zmq.POLLIN)

    def serve(self) -> None:
        """Until the robot process ends."""
        due = looked = time.monotonic()
        heap = memory_bytes()
        while True:
            wait = due - time.monotonic()
            events = dict(self.poller.poll(max(0, math.ceil(wait * 1000))))
            if self.link.fileno() in events and not self.link.recv(1):
                return
            drained = False
            for _ in range(20):  # then the state has its turn
                if not self.answer():
                    drained = True
                    break
            now = time.monotonic()
            if now >= due:
                due = max(due + 0.01, now)
                self.send("alive")
                self.publish()
            if now - looked > 0.01:
                looked = now
                self.doors.look(now, drained)
                if (grown := memory_bytes() - heap) > MAX_GROWTH:
                    log.error("the front has grown by %d MB: another one takes over", grown >> 20)
                    return
                self.complain(now)

    def complain(self, now: float) -> None:
        """What was refused goes to the log in sums."""
        if now - self.complained > 5:
            for what in (self.refusals, self.doors.strangers, self.doors.cuts):
                if what:
                    self.complained = now
                    log.warning("refused: %s", dict(what.most_common(10)))
                    what.clear()

    # The robot process
    def status(self) -> dict[str, Any]:
        return self.board.read()

    def send(self, kind: str, values: Sequence[float] = (), text: str = "", name: str = "") -> None:
        self.number += 1
        command = Command(kind, self.number, self.lease_until, values, text, name)
        with contextlib.suppress(BlockingIOError):  # the robot thread is busy in its SDK; the watchdog looks after it
            self.link.send(command.pack())

    def command(self, kind: str, values: Sequence[float] = (), text: str = "", name: str = "") -> dict[str, Any]:
        """Sends it and waits until the robot thread has acted on it, so that the reply shows it, but not while that is
        busy in its SDK. Its answer; raises Refused."""
        self.send(kind, values, text, name)
        while (status := self.status())["number"] < self.number:
            if time.monotonic() - status["ticked"] > 0.05:
                return {"job": None}
            time.sleep(0.0005)
        answer = status["answer"]
        if answer["code"]:
            raise Refused(answer["code"], answer["message"])
        return answer

    # Requests
    def answer(self) -> bool:
        """Receives one request and answers it; False when there is none."""
        import zmq

        try:
            first = self.router.recv(zmq.DONTWAIT, copy=False)
        except zmq.Again:
            return False
        frames = [first.bytes]
        fd = first.get(zmq.MessageOption.SRCFD)
        count = 1
        while self.router.getsockopt(zmq.RCVMORE):
            frame = self.router.recv(zmq.DONTWAIT)
            count += 1
            if count <= MAX_FRAMES:
                frames.append(frame)
        self.doors.came(fd, frames[1:])
        if count > MAX_FRAMES:
            if connection := self.doors.connections.get(fd):
                self.doors.cut(connection, f"sends messages of {count} frames")
            return True
        cut = frames.index(b"", 1) + 1 if b"" in frames[1:4] else 1
        request: dict[str, Any] = {}
        result = refused = None
        try:
            request = parse(frames[cut:])
            result = self.carry_out(request)
        except Refused as error:
            refused = error
        except Exception:
            log.exception("request")
            refused = Refused("internal", "a bug, see the server's log")
        with contextlib.suppress(zmq.ZMQError):  # a peer that is gone, or does not read
            self.router.send_multipart([*frames[:cut], self.packed(request, result, refused)], zmq.DONTWAIT)
        return True

    def carry_out(self, request: dict[str, Any]) -> dict[str, Any]:
        """The result; raises Refused."""
        op = request.get("op")
        if op not in OPERATIONS:
            raise Refused("unknown_op", f"{op!r:.40}: there are {' '.join(OPERATIONS)}")
        arguments = checked(op, request.get("args", {}))
        token = request.get("token", "")
        holder = self.holder()
        if holder and secrets.compare_digest(token.encode(), self.token.encode()):
            self.lease_until = time.monotonic() + self.ttl
        elif OPERATIONS[op].leased:
            raise Refused("no_lease", f"the lease is {holder}'s" if holder else "acquire a lease first: yours ended")
        if values := OPERATIONS[op].values:
            handle = arguments.pop("handle")
            return self.begin(op, handle, values(**arguments))
        return getattr(self, f"op_{op}")(**arguments)

    def holder(self) -> str | None:
        return self.name if time.monotonic() <= self.lease_until else None

    def packed(self, request: dict[str, Any], result: Any, error: Refused | None = None) -> bytes:
        import msgpack

        if error:
            self.refusals[error.code] += 1
        status = self.status()
        now = time.monotonic()
        return msgpack.packb(
            {
                "v": PROTOCOL_VERSION,
                "id": request.get("id"),
                "op": request.get("op"),
                "ok": error is None,
                "error": {"code": error.code, "message": str(error)} if error else None,
                "result": None if error else result,
                "server_id": self.facts["server_id"],
                "server_time": now,
                "robot_time": status["robot_time"],
                "state_age": now - status["at"],
                "mode": status["mode"],
                "reference": status["reference"],
                "lease": self.holder(),
                "fault": status["fault"],
                "seq": self.seq,
                "jobs": status["jobs"],
            }
        )

    def publish(self) -> None:
        import zmq

        with contextlib.suppress(zmq.Again):
            self.publisher.send(self.packed({"op": "state"}, self.op_state()), zmq.DONTWAIT)

    # Operations
    def op_hello(self) -> dict[str, Any]:
        return self.facts | {"gains": self.status()["gains"], "lease": self.holder()}

    def op_state(self) -> dict[str, Any]:
        status = self.status()
        return {name: status[name] for name in STATE}

    def op_acquire(self, name: str, token: str, ttl: float, takeover: bool) -> dict[str, Any]:
        holder = self.holder()
        is_new = holder is None or not secrets.compare_digest(token.encode(), self.token.encode())
        if is_new and holder and not takeover:
            raise Refused("lease_taken", f"{holder} has the lease; takeover=true takes it")
        if is_new:
            log.info("lease: %s%s", name, f", taken from {holder}" if holder else "")
            self.seq = None
        self.name = name
        self.token = token
        self.ttl = ttl
        self.lease_until = time.monotonic() + ttl
        self.command("lease", (ttl, is_new), token, name)
        return {"ttl": ttl}

    def op_release(self) -> dict[str, Any]:
        self.lease_until = -math.inf
        self.command("alive")
        return {}

    def op_target(self, pose: list[float], seq: int | None, closure: float | None) -> dict[str, Any]:
        status = self.status()
        check_mode("target", status)
        if closure is not None and self.facts["gripper"]["kind"] == "none":
            raise Refused("unavailable", "there is no gripper")
        if seq is not None and self.seq is not None and seq <= self.seq:
            raise Refused("stale", f"seq {seq} after {self.seq}")
        if reason := self.limiter.refusal(np.array(pose), np.array(status["reference"])):
            raise Refused("refused", reason)
        values = (*pose, math.nan if closure is None else closure, -1 if seq is None else seq)
        if status["mode"] == "hold" or closure not in (None, status["gripper_closure"]):
            self.command("target", values)
        else:
            self.send("target", values)
        self.seq = self.seq if seq is None else seq
        return self.op_state()

    def op_gains(self, **changes: Any) -> dict[str, Any]:
        gains = self.changed_gains(changes)
        self.command("gains", gain_values(gains))
        return gains

    def changed_gains(self, changes: dict[str, Any]) -> dict[str, Any]:
        """All gains; raises Refused for those beyond the limits."""
        gains = self.status()["gains"] | {name: value for name, value in changes.items() if value is not None}
        check_gains(gains, self.args)
        return gains

    def op_hold(self) -> dict[str, Any]:
        self.command("hold")
        return {}

    def op_stop(self) -> dict[str, Any]:
        self.command("stop")
        return {}

    def op_job(self, handle: str) -> dict[str, Any]:
        for job in self.status()["jobs"].values():
            if job and job["handle"] == handle:
                return job
        waits = self.unanswered.get(handle)
        try:
            job = self.command("job", text=handle)["job"]
        except Refused as error:
            if not waits:
                raise
            return waits | {"status": "failed", "error": f"not begun: {error}"}
        if job is None and not waits:
            raise Refused("busy", "the robot's SDK takes its time: ask again")
        return job or waits

    def begin(self, op: str, handle: str, values: Sequence[float] = ()) -> dict[str, Any]:
        """The report of a new job, or of the one with that handle."""
        status = self.status()
        known = {job["handle"] for job in (*status["jobs"].values(), *self.unanswered.values()) if job}
        if op in FOLLOWS and handle not in known and time.monotonic() - status["ticked"] > 0.05:
            check_mode(op, status)  # no job waits for the end of a long call of the SDK
        if job := self.command(op, values, handle)["job"]:
            return job
        if len(self.unanswered) > 16:
            self.unanswered.clear()
        self.unanswered[handle] = {"handle": handle, "op": op, "status": "queued", "error": None, "seconds": 0.0}
        return self.unanswered[handle]

    def op_start(self, handle: str, **changes: Any) -> dict[str, Any]:
        return self.begin("start", handle, gain_values(self.changed_gains(changes)))

    def op_task(self) -> dict[str, Any]:
        if not self.facts["robot"]["task"]:
            raise Refused("unavailable", "only the simulated robot has this")
        return self.scene.read()


def memory_bytes() -> int:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def run_front(order: str) -> None:
    """A front's main program: a spare one waits here until the robot process sends the facts."""
    import msgpack  # noqa: F401  so that a spare front has everything
    import zmq.utils.monitor

    order = json.loads(order)
    if order["args"]["keys"]:
        import zmq.auth.thread  # noqa: F401
    logging.basicConfig(format=LOG_FORMAT, level=logging.INFO)
    link = socket.socket(fileno=order["link"])
    memory = mmap.mmap(order["memory"], 2 * Board.SIZE, prot=mmap.PROT_READ)
    facts = link.recv(1 << 16)
    if facts:
        link.setblocking(False)
        args = Args(**order["args"] | {"gains": Gains(**order["args"]["gains"])})
        boards = Board(memory, 0, NUMBERS), Board(memory, Board.SIZE, {})
        front = Front(args, link, *boards, json.loads(facts))
        front.open_sockets(order["listening"])
        front.serve()
    os._exit(0)  # not through libzmq's end, which waits for its peers


# --- Robot process ----------------------------------------------------------------------------------------------------
class FrontProcess:
    """A front, or a spare one, as the robot process sees it."""

    def __init__(self, args: Args, memory: int, listening: Sequence[socket.socket]):
        self.link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        fds = [s.fileno() for s in listening]
        order = {"link": theirs.fileno(), "memory": memory, "listening": fds, "args": asdict(args)}
        script = Path(__file__).resolve()
        program = f"import sys; sys.path.insert(0, {str(script.parent)!r}); import {script.stem} as server"
        command = [sys.executable, "-c", f"{program}; server.run_front(sys.argv[1])", json.dumps(order)]
        end_signals = {signal.SIGINT, signal.SIGTERM}  # the robot process decides when it is over
        signal.pthread_sigmask(signal.SIG_BLOCK, end_signals)  # a new process starts with what is blocked
        with open(args.log_file, "ab") as output:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=output,
                pass_fds=(theirs.fileno(), memory, *fds),
            )
        signal.pthread_sigmask(signal.SIG_UNBLOCK, end_signals)
        theirs.close()
        self.link.setblocking(False)

    def go(self, facts: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # it has ended: the next look sees that
            self.link.send(json.dumps(facts).encode())

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.link.close()


class Robot:
    """The robot process's main thread: starts everything, puts a spare front in the place of one that ends or hangs,
    looks after the robot thread, and shows on the terminal how it goes."""

    def __init__(self, args: Args):
        self.args = args
        self.id = secrets.token_hex(4)
        self.ending = False
        self.silent = 0.0  # s for which the front has said nothing
        self.heard = -math.inf
        self.stale = 0.0  # s for which the robot thread has not ticked
        self.seen = 0.0
        self.fronts = 0
        self.listening = listen_on(args.bind, args.port)
        self.ports = [s.getsockname()[1] for s in self.listening]
        self.memory = os.memfd_create("robot")
        os.ftruncate(self.memory, 2 * Board.SIZE)
        memory = mmap.mmap(self.memory, 2 * Board.SIZE)
        hand = "sim" if args.robot == "sim" else "franka-hand"
        try:
            self.gripper = GRIPPERS[hand if args.gripper == "auto" else args.gripper](args)
        except GripperError as error:
            fail(str(error))
        boards = Board(memory, 0, NUMBERS), Board(memory, Board.SIZE, {})
        self.control = Control(args, self.gripper, *boards)
        self.front = self.new_front()
        self.spare = self.new_front()
        self.gripper.thread.start()
        self.control.start()
        self.control.ready.wait()
        if self.control.failure:
            fail(self.control.failure)
        self.enter(self.front)

    def new_front(self) -> FrontProcess:
        return FrontProcess(self.args, self.memory, self.listening)

    def enter(self, front: FrontProcess) -> None:
        """From now on the robot thread listens to this one."""
        self.fronts += 1
        self.silent = 0.0
        front.go(self.facts())
        self.control.link = front.link

    def facts(self) -> dict[str, Any]:
        """What `hello` tells."""
        args, g = self.args, self.gripper
        limits = {name: value for name, value in vars(args).items() if name.startswith(("max_", "workspace_"))}
        limits |= {"max_rotational_stiffness": args.max_stiffness / 10, "max_rotational_clip": args.max_clip * 10}
        versions = {"python": platform.python_version(), "platform": platform.platform()}
        versions["pyzmq"] = importlib.metadata.version("pyzmq")
        return {
            "protocol": PROTOCOL_VERSION,
            "server_id": self.id,
            "server": versions | {"control_hz": args.control_hz, "publish_hz": 100.0, "fronts": self.fronts},
            "robot": self.control.arm.info,
            "gripper": {"kind": g.kind, "max_width": g.max_width, "max_force": g.max_force, "max_speed": g.max_speed},
            "limits": limits,
            "watchdog": {"hold_s": args.hold_after_s, "stop_s": args.stop_after_s, "frozen_s": args.frozen_after_s},
            "reset_joints": list(args.reset_joints),
        }

    def run(self) -> None:
        """Until a signal."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.signalled)
        go_first()
        shown = 0.0
        before = time.monotonic()
        told = False
        while not self.ending:
            time.sleep(0.01)
            now = time.monotonic()
            passed = min(now - before, 0.012)  # only time in which this thread ran counts
            before = now
            self.watch_front(passed)
            self.watch_control(passed)
            if not told and self.control.front_heard > 0:
                told = True
                host = f"[{self.args.bind}]" if ":" in self.args.bind else self.args.bind
                print(f"serving on tcp://{host}:{self.ports[0]} (state: {self.ports[1]})", flush=True)
                log.info("serving %s on %s %s", self.args.robot, host, self.ports)
            if now - shown > 0.25 and sys.stdout.isatty():
                shown = now
                print("\r" + self.status_line() + "\x1b[K", end="", flush=True)
        self.shut_down()

    def watch_front(self, passed: float) -> None:
        """One that has ended, or says nothing for 3 s, is replaced by the spare one."""
        heard = self.control.front_heard
        listens = self.control.ticked != self.seen  # not while the robot thread is busy in its SDK
        self.silent = 0.0 if heard != self.heard else self.silent + passed * listens
        self.heard = heard
        hangs = self.silent > (3.0 if heard > 0 else 30.0)
        if self.front.process.poll() is None and not hangs:
            return
        if self.heard < 0:
            self.shut_down(f"the front does not start: see {self.args.log_file}")
        code = "hangs" if hangs else f"ended with {self.front.process.returncode}"
        log.error("front %d %s: the next one takes over", self.fronts, code)
        self.control.link = None
        self.front.end()
        self.front = self.spare
        self.enter(self.front)
        self.spare = self.new_front()

    def watch_control(self, passed: float) -> None:
        """The robot thread itself may hang inside an SDK."""
        c = self.control
        may_block = time.monotonic() < c.may_block_until
        self.stale = 0.0 if c.ticked != self.seen or may_block else self.stale + passed
        self.seen = c.ticked
        limit = 0.5 if c.phase == "idle" or c.arm.has_task else self.args.frozen_after_s  # a busy machine is no fault
        if self.stale > limit and c.fault is None:
            c.note_fault("frozen", "the robot thread hangs in the SDK: connection lost?")
            c.publish()

    def signalled(self, number: int, _) -> None:
        if self.ending:
            os._exit(1)
        self.ending = True
        log.info("%s", signal.Signals(number).name)

    def shut_down(self, failure: str = "") -> None:
        self.control.stopping.set()
        self.gripper.stopping.set()
        self.control.join(8)
        for front in (self.front, self.spare):
            front.end()
        if self.control.is_alive():
            failure = "the robot's SDK does not return: use the stop button"
        if failure:
            log.error(failure)
            print(f"\n{failure}", file=sys.stderr)
        log.info("end")
        logging.shutdown()
        print(end="\n" * sys.stdout.isatty(), flush=True)
        os._exit(1 if failure else 0)  # not through the SDKs' destructors: they may abort

    def status_line(self) -> str:
        c, s = self.control, self.control.state
        x, y, z = s.tcp_pose[:3]
        holder = c.lease["name"] if time.monotonic() < c.lease_until else "-"
        line = f"{c.mode:9} lease {holder:8} {s.time:8.2f} s  xyz {x:6.3f} {y:6.3f} {z:6.3f} m  "
        line += f"force {norm(s.wrench[:3]):4.1f} N  width {self.gripper.state.width:5.3f} m  "
        line += f"link {s.success_rate:4.0%}  late {c.overruns}  fronts {self.fronts}  "
        line += f"{c.fault['code']}: {c.fault['message']}" if c.fault else c.held
        return line[: shutil.get_terminal_size().columns - 1]


def listen_on(host: str, port: int) -> list[socket.socket]:
    """Listening sockets for requests and for the state, on `port` and the next one (0: any two that are free)."""
    sockets = []
    try:
        for number in (port, port + 1 if port else 0):
            family, kind, protocol, _, address = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0]
            s = socket.socket(family, kind, protocol)
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            s.bind(address)
            s.listen(4096)
            sockets.append(s)
    except OSError as error:
        fail(f"--bind {host} --port {port}: {error}; does another server run?")
    return sockets


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
    except ArmError as error:
        yield False, "robot at " + str(error).removeprefix("--robot-ip ").partition(" (")[0], fix
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


# --- Keys -------------------------------------------------------------------------------------------------------------
def make_keys(folder: Path) -> None:
    import zmq.auth

    if folder.exists():
        fail(f"--keygen: {folder} exists; take another folder, or remove it and give every client the new keys")
    folder.mkdir(parents=True, mode=0o700)
    for name in ("server", "client"):
        os.chmod(zmq.auth.create_certificates(folder, name)[1], 0o600)
    print(f"wrote {folder}: copy server.key, client.key and client.key_secret to the client's machine, nothing else")


def check_keys(folder: Path) -> None:
    """Exits with one line when a key file is missing, unreadable or does not belong to the others."""
    import zmq
    import zmq.auth

    remedy = f"make new ones with --keygen --keys {folder}-new"
    files = sorted(folder.glob("*.key"))
    keys: dict[str, bytes] = {}
    for path in [folder / "server.key_secret", *files]:
        try:
            public, secret = zmq.auth.load_certificate(path)
            valid = len(zmq.utils.z85.decode(public)) == 32
            if secret is not None:
                valid = valid and zmq.curve_public(secret) == public
        except (OSError, ValueError, KeyError, struct.error, zmq.ZMQError) as error:
            fail(f"--keys {folder}: {path.name}: {error or 'no key'}; {remedy}")
        if not valid or (path.suffix == ".key_secret" and secret is None):
            fail(f"--keys {folder}: {path.name} holds no key, or a secret of another one; {remedy}")
        if path.suffix == ".key" and secret is not None:
            fail(f"--keys {folder}: {path.name} holds a secret, it should be in {path.name}_secret; {remedy}")
        keys[path.name] = public
    if keys.get("server.key") != keys["server.key_secret"]:
        fail(f"--keys {folder}: server.key and server.key_secret do not belong together; {remedy}")
    if len(files) < 2:
        fail(f"--keys {folder}: there is no client's key, nobody could connect; {remedy}")
    mode = (folder / "server.key_secret").stat().st_mode
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        message = f"--keys {folder}: others can read server.key_secret: chmod 600 {folder}/server.key_secret"
        print(message, file=sys.stderr)
        log.warning(message)


def in_a_child(function: Callable[..., None], *values: Any) -> None:
    """Calls it in a process of its own, so that this one never has ZeroMQ; exits as that one does."""
    child = os.fork()
    if child == 0:
        try:
            function(*values)
        except SystemExit as error:
            print(error, file=sys.stderr)
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        raise SystemExit(1)


# --- Main -------------------------------------------------------------------------------------------------------------
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
    logging.basicConfig(format=LOG_FORMAT, level=logging.INFO, handlers=[handler])
    if args.keys:
        in_a_child(check_keys, Path(args.keys))
    sys.setswitchinterval(5e-4)  # a thread that computes gives way to the robot thread after 0.5 ms
    Robot(args).run()


def parse_args() -> Args:
    import tyro  # here, so that a front need not wait for it

    return tyro.cli(Args, description=__doc__)


if __name__ == "__main__":
    main(parse_args())
