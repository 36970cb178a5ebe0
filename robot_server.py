"""Serves one robot arm and its gripper over ZeroMQ: a simulated Franka, or with --robot franky or panda-py a real one.

    python robot_server.py                                              # needs Ctrl-C to end; simulated, in real time
    python robot_server.py --doctor                                     # is this machine ready? One line per check
    python robot_server.py --robot franky --robot-ip 172.16.0.2 --gripper robotiq   # needs an FR3 and a gripper
    python robot_server.py --robot panda-py --robot-ip 172.16.0.2       # needs a Panda
    python robot_server.py --keygen --keys keys                         # needs a folder that is not there yet
    python robot_server.py --bind 0.0.0.0 --keys keys                   # needs these keys on the client's machine too

Two processes. The robot process has the arm's SDK, the gripper, the limiter, the watchdog and the faults, and nothing
that could read what comes from outside. The front has sockets, msgpack, keys and leases; it sends the robot process
small messages of a fixed form and hears its state in every tick. Whatever a network does to the front,
the arm holds and stops; a spare front takes over within a few hundredths of a second, and clients go on.
Nothing that a client sends is trusted: commands are refused or limited in the thread that talks to the robot. A client
that falls silent means hold, then stop. Faults stay until a person has looked and a client sends `recover`.

Units are m, rad, s, N, Nm; poses are x, y, z and a quaternion x, y, z, w, in the frame of the robot's base; the tcp is
libfranka's end effector frame. Requests go to port 5600 (ROUTER), the state is published on the next one (PUB).

A request is one frame, a msgpack map {v: 2, op, id, token, args: {...}}, of at most 64 KiB, 64 entries per map or list,
256 bytes per text, text keys, no binary data. Frames before an empty one are the sender's envelope and come back, so
that REQ with REQ_RELAXED and REQ_CORRELATE works. The reply is one msgpack map:
    v, id, op, ok; error: {code, message} or None; result: map or None; and always, of the last control tick:
    server_id (new at every start), server_time (s), robot_time (s), state_age (s), mode, held (who asked to hold or
    stop since the last job, or what else holds the arm until `start`; text or None), stops (how often others than the
    lease's holder asked to, since the server's start), reference (7; the pose that is commanded after all limits, the
    measured one when idle), lease (its holder's name or None), seq (the last accepted), fault: {code, message, count}
    or None; jobs: {arm, gripper}, the one that goes on or else the last one, {handle, op, status: queued running done
    failed, error (text or None), seconds}, or None
Every 10 ms the same map as of `state` is published in a single frame; subscribe to b"" with CONFLATE.
A connection is cut that has 256 KiB of requests under way, sends a message of more than 8 frames, does not read its
answers for 2 s, or is one more than 128: then one that never asked, or was silent for longest. A client's own
heartbeats are answered.

modes       idle: no controller runs, the robot holds itself; streaming; hold: the controller runs, the reference
            stands; busy: a job moves the arm; stopping: it comes to rest; fault: latched until `recover`
error codes malformed version unknown_op bad_argument: the request; no_lease lease_taken; fault held not_streaming busy:
            the server's mode; frozen: the robot process does not go on; refused: by the limiter, with the reason;
            stale; unavailable; unknown_handle; handle_used: by another operation; internal

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
move_joints {handle, q (7), speed=0.2}  L J: speed is a fraction of the joints' limits, at most --max-joint-speed; it
            fails when the measured tcp leaves the workspace by 2 cm, as streaming then holds; idle after it
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
import errno
import importlib.metadata
import ipaddress
import json
import logging
import logging.handlers
import math
import multiprocessing
import os
import platform
import queue
import re
import resource
import secrets
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

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
    max_joint_speed: float = 0.5
    """of move_joints and reset: fraction of the joints' limits"""
    max_rotation_speed: float = 1.2
    """rad/s"""
    max_rotation_acceleration: float = 8.0
    """rad/s2"""
    max_jump: float = 0.15
    """a target further from the reference than this is refused, m"""
    max_rotation_jump: float = 0.8
    """the same, rad"""
    max_force: float = 0.0
    """hold, or end a joint motion, when the external force exceeds this, N (0: no guard but the robot's own reflex)"""
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


def is_local(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def check(args: Args) -> None:
    """Exits with one line when a flag makes no sense, or a network would be served without protection."""
    signed = ("reset_joints", "workspace_low", "workspace_high")
    for name, value in vars(args).items():
        flag = f"--{name.replace('_', '-')}"
        if type(value) in (int, float, tuple):
            if not np.isfinite(value).all() or (np.min(value) < 0 and name not in signed):
                fail(f"{flag} {value}: give finite numbers{'' if name in signed else ', not negative ones'}")
            if name.startswith("max_") and name != "max_force" and not value:
                fail(f"{flag} 0: nothing could move")
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
        allowed_gains(asdict(args.gains), args)
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


def allowed_gains(gains: dict[str, Any], args: Args) -> Gains:
    """Raises Refused for gains that are missing or beyond the limits, too weakly or strongly damped, or with which a
    spring that is let go outruns the limiter: it reaches stiffness x clip / damping."""
    if None in gains.values():
        raise Refused("bad_argument", "gains: some are missing")
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
    return Gains(**gains)


# --- Reference limiter ------------------------------------------------------------------------------------------------
LINEAR, ANGULAR = slice(0, 3), slice(3, 6)  # of a twist


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


def shortened(vector: np.ndarray, most: float) -> np.ndarray:
    """The vector, or one in its direction of length `most`."""
    return vector * min(1.0, most / max(norm(vector), 1e-12))


def refusal(target: Sequence[float], reference: Sequence[float], args: Args) -> str | None:
    """Why a target (7,) is refused, not limited: None if it is not."""
    if not all(map(math.isfinite, target)):
        return "the target is not finite"
    length = math.hypot(*target[3:])
    if abs(length - 1) > 0.01:
        return f"the quaternion of the target has length {length:.4g}, not 1"
    jump = math.dist(target[:3], reference[:3])
    if jump > args.max_jump:
        return f"the target jumps {jump:.4g} m from the reference, --max-jump is {args.max_jump}"
    cos = sum(a * b for a, b in zip(target[3:], reference[3:])) / length  # of half the angle, either way round
    turn = 2 * math.acos(min(abs(cos), 1.0))
    if turn > args.max_rotation_jump:
        return f"the target turns {turn:.3g} rad from the reference, --max-rotation-jump is {args.max_rotation_jump}"
    return None


class Limiter:
    """Turns the target, whatever it is, into a reference that an arm may follow. Used by the robot thread only."""

    def __init__(self, args: Args):
        self.args = args
        self.low = np.array(args.workspace_low)
        self.high = np.array(args.workspace_high)
        self.seed(np.array([0, 0, 0, 1.0, 0, 0, 0]))

    def seed(self, pose: np.ndarray) -> None:
        """Start from this pose (7,), at rest."""
        self.reference = pose.copy()
        self.velocity = np.zeros(6)
        self.limited: list[str] = []

    def outside(self, pose: np.ndarray) -> float:
        """How far (m) a pose (7,) is out of the box, along one axis."""
        return max(0.0, (self.low - pose[:3]).max(), (pose[:3] - self.high).max())

    def step(self, target: np.ndarray | None, state: "ArmState", gains: Gains, dt: float) -> None:
        """Moves the reference by `dt` towards the target (7,), or lets it come to rest (None), within all limits: first
        those of the goal and of the way there, then those of the distance to the measured pose."""
        self.limited = []
        new = self.advance(target, dt) if dt > 0 else self.reference.copy()
        new = self.keep_near(new, state, gains, dt)
        new[3:] /= norm(new[3:])
        self.reference = new

    def advance(self, target: np.ndarray | None, dt: float) -> np.ndarray:
        """The next reference (7,): box and tilt for the goal, speed and acceleration for the way there."""
        args = self.args
        old = self.reference
        if target is None or not np.isfinite(target).all():
            target = old
        low = np.minimum(self.low, old[:3])  # inward as far as wanted, only
        high = np.maximum(self.high, old[:3])
        most_tilt = max(args.max_tilt, tilt(old[3:]))
        position = np.clip(target[:3], low, high)
        if (position != target[:3]).any():
            self.limited.append("box")
        quat = self.upright(target[3:] / norm(target[3:]), most_tilt)
        way = position - old[:3]
        turn = rotation_between(quat, old[3:])
        v, fast = approach(way, self.velocity[LINEAR], args.max_speed, args.max_acceleration, dt)
        w, spins = approach(turn, self.velocity[ANGULAR], args.max_rotation_speed, args.max_rotation_acceleration, dt)
        end = old[:3] + v * (dt + norm(v) / args.max_acceleration) / 2  # where it can stop; if not inside, brake now
        if np.abs(np.clip(end, low, high) - end).max() > 1e-6:
            v = self.velocity[LINEAR] - shortened(self.velocity[LINEAR], args.max_acceleration * dt)
        if fast or spins:
            self.limited.append("speed")
        self.velocity = np.concatenate([v, w])
        new_position = np.clip(old[:3] + v * dt, low, high)
        new_quat = self.upright(quat_multiply(quat_from_rotvec(w * dt), old[3:]), most_tilt)
        return np.concatenate([new_position, new_quat])

    def keep_near(self, new: np.ndarray, state: "ArmState", gains: Gains, dt: float) -> np.ndarray:
        """`new` (7,), but per axis not further than the clip from the measured pose, so that the controller's force is
        bounded and nothing winds up, and in all not further than its damper holds at the maximum speed, less when that
        is near: so the arm keeps to it, too."""
        args = self.args
        measured = state.tcp_pose
        lag = difference(new, measured)
        bound = np.array([*gains.clip, *gains.rotational_clip])
        clipped = np.clip(lag, -bound, bound)
        speed = norm(state.tcp_vel[LINEAR]) / args.max_speed
        spin = norm(state.tcp_vel[ANGULAR]) / args.max_rotation_speed
        brake = min(max(5.5 - 5 * max(speed, spin), 0.0), 1.0)  # less from 0.9 of the speed on, nothing from 1.1 on
        held = 0.9 * brake * args.max_speed * gains.damping / gains.stiffness
        held_turn = 0.9 * brake * args.max_rotation_speed * gains.rotational_damping / gains.rotational_stiffness
        clipped[LINEAR] = shortened(clipped[LINEAR], held)
        clipped[ANGULAR] = shortened(clipped[ANGULAR], held_turn)
        if (clipped == lag).all():
            return new
        self.limited.append("clip")
        position = measured[:3] + clipped[LINEAR]
        quat = quat_multiply(quat_from_rotvec(clipped[ANGULAR]), measured[3:])
        near = np.concatenate([position, quat])
        moved = difference(near, self.reference) / max(dt, 1e-3)
        for part in (LINEAR, ANGULAR):  # go on from how it really moved, but not faster than before
            self.velocity[part] = shortened(moved[part], norm(self.velocity[part]))
        return near

    def upright(self, quat: np.ndarray, most: float) -> np.ndarray:
        """The rotation (4,), tilted back as far as needed to stay below `most` rad."""
        excess = tilt(quat) - most
        if excess <= 0:
            return quat
        if "tilt" not in self.limited:
            self.limited.append("tilt")
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


def approach(
    error: np.ndarray, velocity: np.ndarray, max_speed: float, max_acceleration: float, dt: float
) -> tuple[np.ndarray, bool]:
    """Next velocity (3,) towards a goal at `error` (3,), which it reaches at rest; whether its speed is capped."""
    distance = norm(error)
    change = max_acceleration * dt
    braking = change * (math.sqrt(0.25 + 2 * distance / (change * dt)) - 0.5)  # stops within `distance` in steps of dt
    wanted = error * (min(braking, max_speed) / max(distance, 1e-12))
    return velocity + shortened(wanted - velocity, change), braking > max_speed


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
    at: float = field(default_factory=lambda: time.monotonic())  # this machine's clock


class Arm(ABC):
    """A robot arm. Constructed and used by the robot thread alone; only `start` and `recover` may block for long.
    Every method raises ArmError."""

    waits = True  # whether ticks follow the clock
    task: str | None = None  # what `task` answers, as JSON; a simulated arm also has `reset_task`

    def __init__(self, args: Args):
        self.args = args
        self.controlling = False  # whether the impedance controller runs
        self.info: dict[str, Any] = {"kind": args.robot, "sdk": None, "libfranka": None, "firmware": None, "task": None}
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


PACKAGES = {  # of a --robot or a --gripper
    "sim": ("mujoco==3.8.1", "gymnasium==1.4.0"),
    "franky": ("franky-control==2.0.0",),
    "panda-py": ("panda-python==1.1.1",),
    "robotiq": ("pymodbus==3.16.1", "pyserial==3.5"),
}
JOINT_STIFFNESS = (600.0, 600.0, 600.0, 600.0, 250.0, 150.0, 50.0)  # Nm/rad, libfranka's joint impedance example
JOINT_DAMPING = (50.0, 50.0, 50.0, 50.0, 30.0, 25.0, 15.0)  # Nms/rad
BLOCKED = "the arm did not arrive: something is in its way"


class SimArm(Arm):
    """franka_sim's Franka with a task's scene, at 1 kHz in real time. While no impedance controller runs, joint springs
    hold the arm, as the real one's own position controller does; moving their rest positions moves the arm."""

    dt = 0.001

    def __init__(self, args: Args):
        super().__init__(args)
        os.environ["MUJOCO_GL"] = "disable"  # whoever wants images renders them from what `task` gives
        try:
            import gymnasium as gym
            import mujoco

            import franka_sim  # registers the tasks  # TASK: import the module that registers yours
        except ImportError as error:
            raise ArmError("sdk", f"--robot sim: {error}; pip install {' '.join(PACKAGES['sim'])}") from error
        try:
            self.env = gym.make(args.env_id).unwrapped
        except (gym.error.Error, ModuleNotFoundError) as error:
            raise ArmError("sdk", f"--env-id {args.env_id}: {error}") from error
        self.sim = self.env.sim
        self.sim.model.opt.timestep = self.dt
        self.downwards = franka_sim.downwards
        self.max_speed = np.array(franka_sim.MAX_JOINT_VELOCITY)
        self.info |= {"sdk": f"mujoco {mujoco.__version__}", "task": args.env_id, "speed": args.sim_speed}
        self.waits = args.sim_speed > 0
        self.time = 0.0
        self.reflex: tuple[str, ...] = ()
        self.gripper_command: tuple[float, float, float] | None = None  # width, force, speed
        self.reset_task(args.seed)

    def reset_task(self, seed: int | None) -> None:
        self.env.reset(seed=seed)
        self.wrench = np.zeros(6)
        self.motion: tuple[np.ndarray, np.ndarray, float, float] | None = None  # from, to, began, duration
        self.task_time = -math.inf
        self.stepped_to = time.monotonic()  # in real time
        self.stop()

    def steps_due(self) -> int:
        """How many steps of the physics bring it up to now."""
        if not self.waits:
            return round(1 / (self.args.control_hz * self.dt))
        step_s = self.dt / self.args.sim_speed
        now = time.monotonic()
        self.stepped_to = max(self.stepped_to, now - max(0.05, 50 * step_s))  # the machine stood still: no catching up
        due = int((now - self.stepped_to) / step_s)
        self.stepped_to += due * step_s
        return due

    def get_state(self) -> ArmState:
        """Steps the physics up to now, first."""
        sim = self.sim
        if self.gripper_command:
            sim.set_gripper(*self.gripper_command)
            self.gripper_command = None
        due = self.steps_due()
        if due > 0:
            sim.step(due)
            self.time += due * self.dt
            self.wrench += (sim.tcp_wrench - self.wrench) * (1 - math.exp(-due * self.dt / 0.05))  # s
        force = norm(self.wrench[:3])
        if force > self.args.collision_force and (self.controlling or self.motion):
            self.reflex = (f"cartesian_reflex: {force:.0f} N",)
            self.stop()
        if self.time - self.task_time >= 0.02:
            self.task = json.dumps(self.look_at_task())
            self.task_time = self.time
        mode = "reflex" if self.reflex else "move" if self.controlling or self.motion else "idle"
        return ArmState(self.time, sim.tcp_pose, sim.tcp_velocity, self.wrench.copy(), sim.q, sim.dq, mode, self.reflex)

    def look_at_task(self) -> dict[str, Any]:
        env = self.env
        pose = (self.sim.target_pose if self.controlling else self.sim.tcp_pose).tolist()
        yaw = 2 * math.atan2(pose[4], pose[3])
        env.target = [*pose[:3], 0.0, 0.0, yaw][: len(env.target)]
        action = env.expert_action().tolist()  # for this target
        goal = [x + scale * a for x, scale, a in zip(env.target, env.action_scale, action)]
        return {
            "env_id": self.args.env_id,
            "robot_time": self.time,
            "success": bool(env.evaluate()[0]),
            "observation": {name: value.tolist() for name, value in env.task_observation().items()},
            "expert": {
                "pose": [*goal[:3], *self.downwards(*goal[3:]).tolist()],
                "close": len(action) == len(goal) or action[-1] > 0,
            },
            "scene": {name: value.tolist() for name, value in self.sim.get_state().items()},
        }

    def start(self, pose: np.ndarray, q: np.ndarray, gains: Gains) -> None:
        model = self.sim.model
        model.jnt_stiffness[:7] = 0
        model.dof_damping[:7] = 0.5
        model.qpos_spring[:7] = q
        self.controlling = True
        self.stream(pose)
        self.set_gains(gains)

    def stream(self, pose: np.ndarray) -> None:
        self.sim.set_target_pose(pose[:3], pose[3:])

    def set_gains(self, gains: Gains) -> None:
        self.sim.set_impedance(**asdict(gains))

    def stop(self) -> None:
        model = self.sim.model
        self.controlling = False
        self.motion = None
        model.actuator_biasprm[:12] = 0
        model.qpos_spring[:7] = self.sim.q
        model.jnt_stiffness[:7] = JOINT_STIFFNESS
        model.dof_damping[:7] = JOINT_DAMPING

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
        self.reflex = ()
        self.wrench = np.zeros(6)
        self.stop()


NO_ROBOT = "--robot-ip {}: {} (brakes open, FCI active, cable in the cabinet?)"
FRANKY_FOR = "pip install --force-reinstall franky-control --extra-index-url "
FRANKY_FOR += "https://timschneider42.github.io/franky/whl/by-robot-server-version/{}/"


class SdkArm(Arm):
    """What franky and panda-py share: both wrap libfranka, and a wheel of either speaks one version to the robot. Each
    has `load`, which imports the SDK and sets `errors`, what that raises, and `wrong_version`, one of them; and `open`,
    which connects to the robot with the collision thresholds of the flags."""

    def __init__(self, args: Args):
        super().__init__(args)
        package = PACKAGES[args.robot][0]
        try:
            self.load()
        except ImportError as error:
            message = f"--robot {args.robot}: {error}; pip install {package} (Linux x86-64, Python 3.11 to 3.13)"
            raise ArmError("sdk", message) from error
        self.info |= sdk_versions(package.partition("==")[0])
        self.connect()

    def connect(self) -> None:
        version = reach(self.args.robot_ip)
        try:
            self.open()
        except self.wrong_version as error:
            message = f"{error} With --robot franky: {FRANKY_FOR.format(version)}"
            raise ArmError("sdk", message) from error
        except self.errors as error:
            raise ArmError("sdk", NO_ROBOT.format(self.args.robot_ip, error)) from error
        self.info["firmware"] = version

    @contextlib.contextmanager
    def faults(self) -> Iterator[None]:
        """The SDK's exceptions as ours."""
        try:
            yield
        except self.errors as error:
            text = str(error)  # of what ended libfranka's control loop
            person = "User Stop" in text or "safety function" in text
            code = "user_stopped" if person else "reflex" if "reflex" in text else "sdk"
            raise ArmError(code, text) from error


class FrankyArm(SdkArm):
    """Through franky 2 (MIT), on its impedance controller: PyPI's wheel for an FR3 with system 5.9 or newer, others in
    franky's own index. libfranka makes the thread that constructs `Robot` a real-time one, and franky's control thread
    inherits from the one that starts a motion: so both happen in the robot thread."""

    resting = False  # a soft stop goes on

    def load(self) -> None:
        import franky

        self.franky = franky
        # Some do not derive from franky.Exception; a lost network is a RuntimeError.
        self.errors = (franky.Exception, franky.InvalidMotionTypeException, RuntimeError)
        self.wrong_version = franky.IncompatibleVersionException

    def open(self) -> None:
        self.robot = self.franky.Robot(self.args.robot_ip, realtime_config=self.franky.RealtimeConfig.Ignore)
        self.robot.set_collision_behavior(self.args.collision_torque, self.args.collision_force)
        self.model = self.robot.model
        self.forget_motion()

    def forget_motion(self) -> None:
        self.motion = None
        self.controlling = False
        self.resting = False

    @contextlib.contextmanager
    def faults(self) -> Iterator[None]:
        with super().faults():
            try:
                yield
            except self.franky.ControlException as error:  # the motion has ended
                self.forget_motion()
                if "preempted!" not in str(error):  # by a motion of ours; a safety function gives its name
                    raise

    def get_state(self) -> ArmState:
        with self.faults():
            if self.motion is not None:
                self.robot.poll_motion()  # raises what ended the motion
        with self.faults():
            s = self.robot.state
            velocity = self.model.zero_jacobian(self.franky.Frame.EndEffector, s) @ s.dq  # (6, 7) @ (7,)
            pose = np.concatenate([s.O_T_EE.translation, s.O_T_EE.quaternion])
            wrench = -np.array(s.O_F_ext_hat_K)  # libfranka's is of the robot on its surroundings, its issue 26
            return ArmState(s.time.to_msec() / 1e3, pose, velocity, wrench, s.q, s.dq, *health(s))

    def start(self, pose: np.ndarray, q: np.ndarray, gains: Gains) -> None:
        self.pose = pose
        self.posture = q
        self.gains = gains
        self.set_gains(gains)

    def set_gains(self, gains: Gains) -> None:
        """Starts a new motion, because clips are fixed at construction; it takes over from the old one at once, with
        the old gains, and the control loop smooths the way to the new ones."""
        franky = self.franky
        with self.faults():
            self.motion = franky.CartesianImpedanceTrackingMotion(
                translational_stiffness=self.gains.stiffness,
                rotational_stiffness=self.gains.rotational_stiffness,
                posture_task=franky.PostureTask(self.posture, stiffness=gains.nullspace_stiffness),
                translational_error_clip=np.array(gains.clip),
                rotational_error_clip=np.array(gains.rotational_clip),
                max_delta_tau=1.0,
                gains_time_constant=0.1,
            )
            self.controlling = True
            self.resting = False
            self.stream(self.pose)
            self.motion.set_gains(self.impedance(self.gains))
            self.robot.move(self.motion, asynchronous=True)
            self.motion.set_gains(self.impedance(gains))
            self.gains = gains

    def impedance(self, gains: Gains) -> Any:
        return self.franky.CartesianImpedanceGains.isotropic(
            gains.stiffness, gains.rotational_stiffness, gains.damping, gains.rotational_damping
        )

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
        return False  # it was preempted

    def recover(self) -> None:
        self.forget_motion()
        try:
            if self.robot.is_in_control:
                self.robot.stop()
            with contextlib.suppress(self.franky.ControlException):  # what ended the last motion
                self.robot.join_motion(5.0)
            self.robot.recover_from_errors()  # what it returns may be of an old state: Control.recover looks itself
        except (self.franky.NetworkException, RuntimeError):  # no connection any more
            self.connect()
        except self.franky.Exception as error:
            raise ArmError("sdk", str(error)) from error


class PandaPyArm(SdkArm):
    """Through panda-py (Apache-2.0) on its impedance controller; PyPI's wheel: Panda with system 4.2.1 or newer. It
    clips nothing itself, and aborts the process on NaN: everything that it gets has passed the limiter. It has a single
    damping ratio, which is that of the translation."""

    motion: Any = None  # the trajectory to joint positions
    last: ArmState | None = None

    def load(self) -> None:
        import panda_py
        import panda_py.controllers
        import panda_py.motion

        self.panda_py = panda_py
        self.errors = (RuntimeError,)
        self.wrong_version = panda_py.IncompatibleVersionError
        self.kept: list[Any] = []

    def open(self) -> None:
        torque = [self.args.collision_torque] * 7
        force = [self.args.collision_force] * 6
        self.panda = self.panda_py.Panda(self.args.robot_ip)
        self.kept.append(self.panda)  # a Panda that is destroyed without connection aborts the process
        self.panda.get_robot().set_collision_behavior(torque, torque, force, force)
        self.model = self.panda.get_model()

    def get_state(self) -> ArmState:
        try:
            with self.faults():
                self.panda.raise_error()  # the only place that tells of a reflex: the state just stands still
                s = self.panda.get_state()
        except ArmError as error:
            if "another control or read operation" in str(error) and self.last:  # a race inside panda-py: next tick
                return self.last
            raise
        jacobian = self.model.zero_jacobian(self.panda_py.libfranka.Frame.kEndEffector, s)  # (42,) column by column
        velocity = np.reshape(jacobian, (7, 6)).T @ s.dq
        matrix = np.reshape(s.O_T_EE, (4, 4)).T
        pose = np.concatenate([matrix[:3, 3], quat_from_matrix(matrix[:3, :3])])
        wrench = -np.array(s.O_F_ext_hat_K)  # libfranka's is of the robot on its surroundings, its issue 26
        arrays = pose, velocity, wrench, np.array(s.q), np.array(s.dq)
        self.last = ArmState(s.time.to_msec() / 1e3, *arrays, *health(s))
        return self.last

    def start(self, pose: np.ndarray, q: np.ndarray, gains: Gains) -> None:
        self.controller = self.panda_py.controllers.CartesianImpedance(filter_coeff=0.2)
        self.posture = q
        self.set_gains(gains)
        with self.faults():
            self.panda.start_controller(self.controller)
        self.controlling = True
        self.stream(pose)

    def stream(self, pose: np.ndarray) -> None:
        if not np.isfinite(pose).all():
            raise ArmError("internal", f"a reference that is not finite: {pose}")
        self.controller.set_control(pose[:3], pose[3:], self.posture)

    def set_gains(self, gains: Gains) -> None:
        stiffness = [gains.stiffness] * 3 + [2 * gains.rotational_stiffness] * 3  # panda-py's error is half the angle
        self.controller.set_impedance(np.diag(stiffness))
        self.controller.set_damping_ratio(gains.damping / (2 * math.sqrt(gains.stiffness)))  # there is only one
        self.controller.set_nullspace_stiffness(gains.nullspace_stiffness)

    def stop(self) -> None:
        self.controlling = False
        self.motion = None
        with self.faults():
            self.panda.stop_controller()

    def move_to_joint_positions(self, q: np.ndarray, speed: float) -> None:
        """Streams panda-py's own trajectory: its blocking call could not be broken off."""
        try:
            self.motion = self.panda_py.motion.JointTrajectory([self.last.q, q], speed_factor=speed)
        except RuntimeError as error:
            raise ArmError("refused", str(error)) from error
        self.controller = self.panda_py.controllers.JointPosition(JOINT_STIFFNESS, JOINT_DAMPING, filter_coeff=0.2)
        with self.faults():
            self.panda.start_controller(self.controller)
        self.goal = q
        self.began = self.last.time
        self.controller.set_control(self.last.q, np.zeros(7))

    def moving(self) -> bool:
        if self.motion is None:
            return False
        elapsed = self.last.time - self.began
        duration = self.motion.get_duration()
        t = min(max(elapsed, 0.0), duration)
        dq = self.motion.get_joint_velocities(t) if t < duration else np.zeros(7)
        self.controller.set_control(self.motion.get_joint_positions(t), dq)
        if elapsed > duration and np.abs(self.last.q - self.goal).max() < 0.01:
            self.motion = None
        elif elapsed > duration + 3:
            raise ArmError("refused", BLOCKED)
        return self.motion is not None

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


def health(state: Any) -> tuple[str, tuple[str, ...], float]:
    """Mode, names of the errors and rate of success in libfranka's RobotState, from either SDK."""
    mode = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", state.robot_mode.name.removeprefix("k")).lower()
    errors = state.current_errors
    names = tuple(n for n in dir(errors) if n[0] != "_" and getattr(errors, n) is True) if errors else ()
    return mode, names, state.control_command_success_rate if mode == "move" else 1.0


def quat_from_matrix(m: np.ndarray) -> np.ndarray:
    """(4,) x, y, z, w of a (3, 3) rotation matrix: the row of the largest diagonal entry of 4 q q^T (Shepperd)."""
    x = m[2, 1] - m[1, 2]
    y = m[0, 2] - m[2, 0]
    z = m[1, 0] - m[0, 1]
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
        raise ArmError("sdk", NO_ROBOT.format(ip, getattr(error, "strerror", None) or error)) from error


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
    """A gripper with a thread of its own: `submit` from anywhere, everything else runs in that thread. Widths in m,
    speeds in m/s, forces in N. Methods begin a motion and return; `poll` tells when it has ended. All raise
    GripperError."""

    kind, max_width, max_force, max_speed, hz = "none", 0.0, 0.0, 0.0, 50.0

    def __init__(self, args: Args):
        self.args = args
        self.state = GripperState()
        self.job: Job | None = None  # the last one that was submitted
        self.orders: queue.SimpleQueue[tuple[Job, float, Callable[[], None]]] = queue.SimpleQueue()
        self.late = ""  # why the last order was given up
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self.run, name="gripper", daemon=True)

    @abstractmethod
    def move(self, width: float, speed: float, force: float) -> None:
        """Move the fingers to this distance."""

    def close(self, speed: float, force: float) -> None:
        """Close on whatever is there."""
        self.move(0.0, speed, force)

    def activate(self) -> None:  # noqa: B027
        """What the gripper needs before its first motion: the fingers may move."""

    @abstractmethod
    def stop(self) -> None:
        """Stop the fingers where they are."""

    @abstractmethod
    def poll(self) -> GripperState:
        """The newest measurement."""

    def submit(self, job: "Job", action: str, width: float | None, speed: float, force: float) -> None:
        """Any thread: carry out an action instead of what is going on; `speed` and `force` are fractions. Raises
        Refused."""
        if self.kind == "none":
            raise Refused("unavailable", "there is no gripper")
        if action == "move" and (width is None or width > self.max_width):
            raise Refused("bad_argument", f"width: give a number from 0 to {self.max_width:g}")
        speed *= self.max_speed
        force *= self.max_force
        calls = {
            "open": lambda: self.move(self.max_width, speed, force),
            "close": lambda: self.close(speed, force),
            "move": lambda: self.move(width, speed, force),
            "activate": self.activate,
            "stop": self.stop,
        }
        way = self.max_width / max(speed, 0.01)  # s from one end to the other
        self.job = job
        self.orders.put((job, 30.0 if action == "activate" else 3.0 + way, calls[action]))

    def follow(self, closure: float) -> None:
        """Any thread: the closure of a target, 0 (open) to 1 (closed). Raises Refused."""
        action = {0.0: "open", 1.0: "close"}.get(closure, "move")
        self.submit(Job("", "target"), action, (1 - closure) * self.max_width, 1.0, 0.5)

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
    goal = 0.08  # m
    steady = 0  # polls without motion

    def move(self, width: float, speed: float, force: float) -> None:
        self.goal = width
        self.steady = 0
        self.arm.gripper_command = width, max(force, 1.0), max(speed, 0.01)

    def stop(self) -> None:
        self.move(self.state.width, self.max_speed, 0.5 * self.max_force)

    def poll(self) -> GripperState:
        width = float(self.arm.sim.gripper_width) if self.arm else self.max_width
        self.steady = self.steady + 1 if abs(width - self.state.width) < 2e-4 else 0
        moving = self.steady < 6
        return GripperState(width, moving, not moving and width > self.goal + 2e-3)


class FrankaHand(Gripper):
    """Franka's own hand, through the SDK that drives the arm. Its calls block, so they have a thread for themselves."""

    kind, max_width, max_force, max_speed = "franka-hand", 0.08, 70.0, 0.1

    def __init__(self, args: Args):
        super().__init__(args)
        reach(args.robot_ip)  # not later: a robot has one connection, then the arm's
        self.connect()

    def connect(self) -> None:
        ip = self.args.robot_ip
        try:
            socket.create_connection((ip, 1338), timeout=3).close()  # libfranka would wait for a minute
            if self.args.robot == "franky":
                import franky

                self.hand = franky.Gripper(ip)
                self.read = lambda: self.hand.state
            else:
                from panda_py import libfranka

                self.hand = libfranka.Gripper(ip)
                self.read = self.hand.read_once
            self.max_width = self.read().max_width or self.max_width
        except Exception as error:
            raise GripperError(f"{error} (--gripper franka-hand; there are also robotiq and none)") from error
        self.pool = ThreadPoolExecutor(1, "hand")
        self.future: Future = Future()
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
        try:
            self.poll()
        except GripperError:  # no connection any more
            self.connect()
        self.begin(self.hand.homing)

    def stop(self) -> None:
        self.begin(self.hand.stop)

    def poll(self) -> GripperState:
        moving = not self.future.done()
        fault = None
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
    requested: int | None = None  # position
    active_by = 0.0  # until when an activation may take

    def __init__(self, args: Args):
        super().__init__(args)
        try:
            import pymodbus.client
            from pymodbus.exceptions import ModbusException
        except ImportError as error:
            raise GripperError(f"--gripper robotiq: {error}; pip install {' '.join(PACKAGES['robotiq'])}") from error
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
        if reply.isError() or len(reply.registers) != options.get("count", 0):  # or a late one, of another request
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
        self.requested = position
        self.active_by = 0.0
        self.write(0x09, position, round(255 * speed / self.max_speed), round(255 * force / self.max_force))

    def activate(self) -> None:
        if self.status()[-1]:
            self.write(0x00)
            self.write(0x01)
        self.requested = None
        self.active_by = time.monotonic() + 8.0

    def stop(self) -> None:
        self.requested = None
        self.active_by = 0.0
        self.write(0x01)  # without "go to": stands

    def poll(self) -> GripperState:
        active, contact, echo, position, fault = self.status()
        moving = False
        if self.active_by:
            moving = active != 3
            if moving:
                fault = None if time.monotonic() < self.active_by else "the activation did not end within 8 s"
            if fault or not moving:
                self.active_by = 0.0
        elif self.requested is not None and not fault:  # until the echo is this request's, contact is the last one's
            moving = echo != self.requested or contact == 0
        width = self.max_width * min(max((position - self.closed_at) / (self.open_at - self.closed_at), 0.0), 1.0)
        return GripperState(width, moving, not moving and contact in (1, 2), fault)


# TASK: a gripper of your own: subclass Gripper, and name it here and in Args.gripper.
GRIPPERS = {"sim": SimGripper, "franka-hand": FrankaHand, "robotiq": Robotiq, "none": NoGripper}


# --- Operations and their arguments -----------------------------------------------------------------------------------
REQUIRED = object()
WANTED = {
    "number": "a number from {low:g} to {high:g}",
    "whole": "a whole number from {low:g} to {high:g}",
    "vector": "{size} numbers",  # which may be anything, NaN too: whoever uses them looks
    "text": "a text of {low:g} to {high:g} characters",
    "ascii": "a text of {low:g} to {high:g} ASCII characters",
    "choice": "one of {names}",
    "truth": "true or false",
}


@dataclass(frozen=True)
class Argument:
    """What one argument of an operation must be, and as how many numbers the robot process gets it."""

    kind: str
    low: float = -math.inf  # of a number, or of the length of a text
    high: float = math.inf
    default: Any = REQUIRED
    size: int = 1  # 0: it is a text, or only the front needs it
    choices: tuple[str, ...] = ()

    def fits(self, value: Any) -> bool:
        is_number = type(value) in (int, float) and self.low <= value <= self.high  # NaN is not
        is_text = isinstance(value, str) and value.isprintable() and self.low <= len(value) <= self.high
        match self.kind:
            case "number":
                return is_number
            case "whole":
                return is_number and value == int(value)
            case "vector":
                is_long_enough = isinstance(value, list | tuple) and len(value) == self.size
                return is_long_enough and all(type(x) in (int, float) for x in value)
            case "text":
                return is_text
            case "ascii":
                return is_text and value.isascii()
            case "choice":
                return value in self.choices
            case _:
                return type(value) is bool

    def check(self, name: str, value: object) -> None:
        """Raises Refused."""
        is_left_out = value is None and self.default is None
        if not is_left_out and not self.fits(value):
            wanted = WANTED[self.kind].format(**vars(self), names=" ".join(self.choices))
            raise Refused("bad_argument", f"{name}: give {wanted}, not {value!r:.40}")

    def to_numbers(self, value: Any) -> list[float]:
        """NaN stands for None, a choice goes by its place."""
        if value is None:
            return [math.nan] * self.size
        if self.choices:
            value = self.choices.index(value)
        return list(value) if self.size > 1 else [value] * self.size

    def from_numbers(self, numbers: Sequence[float]) -> Any:
        if all(map(math.isnan, numbers)):
            return None
        if self.choices:
            return dict(enumerate(self.choices)).get(numbers[0])
        return numbers if self.size > 1 else numbers[0]


HANDLE = {"handle": Argument("ascii", 8, 64, size=0)}
SPEED = {"speed": Argument("number", 0.01, 1.0, default=0.2)}
GAIN = Argument("number", 0.0, 1e5, default=None)
CLIP = Argument("vector", size=3, default=None)
GAINS = {name: CLIP if "clip" in name else GAIN for name in Gains.__dataclass_fields__}
OPERATIONS: dict[str, dict[str, Argument]] = {
    "hello": {},
    "state": {},
    "acquire": {
        "name": Argument("text", 1, 32, size=0),
        "token": Argument("ascii", 16, 64, size=0),
        "ttl": Argument("number", 0.2, 10.0, default=1.0),
        "takeover": Argument("truth", default=False, size=0),
    },
    "release": {},
    "target": {
        "pose": Argument("vector", size=7),
        "seq": Argument("whole", 0, 2**53, default=None),
        "closure": Argument("number", 0.0, 1.0, default=None),
    },
    "gains": GAINS,
    "hold": {},
    "stop": {},
    "start": HANDLE | GAINS,
    "move_joints": HANDLE | {"q": Argument("vector", size=7)} | SPEED,
    "reset": HANDLE | SPEED,
    "recover": HANDLE,
    "gripper": HANDLE
    | {
        "action": Argument("choice", choices=("open", "close", "move", "activate", "stop")),
        "width": Argument("number", 0.0, 1.0, default=None),
        "speed": Argument("number", 0.0, 1.0, default=1.0),
        "force": Argument("number", 0.0, 1.0, default=0.5),
    },
    "job": HANDLE,
    "task": {},
    "reset_task": HANDLE | {"seed": Argument("whole", 0, 2**31, default=None)},
}
JOBS = ("start", "move_joints", "reset", "recover", "gripper", "reset_task")
LEASED = ("release", "target", "gains", *JOBS)  # need the lease's token


def checked(op: str, given: dict[str, Any]) -> dict[str, Any]:
    """All arguments of an operation, defaults filled in; raises Refused."""
    arguments = {}
    for name, argument in OPERATIONS[op].items():
        value = given.get(name, argument.default)
        if value is REQUIRED:
            raise Refused("bad_argument", f"{op} needs {name!r}")
        argument.check(name, value)
        arguments[name] = value
    for name in given:
        if name not in arguments:
            raise Refused("bad_argument", f"{op} has no {name!r:.40}, it has {[*arguments]}")
    return arguments


def to_numbers(op: str, arguments: dict[str, Any]) -> list[float]:
    """All arguments but texts, for the robot process."""
    numbers = []
    for name, argument in OPERATIONS[op].items():
        numbers += argument.to_numbers(arguments[name])
    return numbers


def from_numbers(op: str, numbers: Sequence[float]) -> dict[str, Any]:
    """The other way round, and checked again; raises Refused."""
    arguments = {}
    for name, argument in OPERATIONS[op].items():
        if argument.size:
            arguments[name] = argument.from_numbers(numbers[: argument.size])
            argument.check(name, arguments[name])
            numbers = numbers[argument.size :]
    return arguments


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


# --- What may follow what ---------------------------------------------------------------------------------------------
# The error code with which an operation is refused in a mode, "" where it may be carried out. held: a hold that someone
# asked for, or the force guard; hold: the watchdog's. `hold`, `stop` and what only the gripper does may always be.
MODES = ("idle", "streaming", "hold", "held", "busy", "stopping", "fault")
MOVES = ("", "", "", "", "busy", "", "fault")
FOLLOWS = {
    "target": ("not_streaming", "", "", "held", "busy", "not_streaming", "fault"),
    "start": MOVES,
    "move_joints": MOVES,
    "reset": MOVES,
    "reset_task": MOVES,
    "recover": ("", "", "", "", "busy", "", ""),
}


def check_mode(op: str, step: str, why: str) -> None:
    """Raises Refused, with `why` the server is in mode `step`, if that does not allow `op`."""
    if code := FOLLOWS[op][MODES.index(step)]:
        raise Refused(code, why)


# --- Between the two processes ----------------------------------------------------------------------------------------
COMMAND = struct.Struct("<BQd12d64s128s")
OP_NUMBERS = {op: number for number, op in enumerate(OPERATIONS)}


class Command(NamedTuple):
    """What the front tells the robot process: a message of always the same size, with nothing in it to be parsed."""

    op: str
    number: int  # counted by the front; the robot process says which one it has seen last
    lease_until: float  # monotonic s
    values: Sequence[float] = ()  # up to 12
    text: str = ""  # a job's handle, or the lease's token
    name: str = ""  # of the lease's holder

    def pack(self) -> bytes:
        values = (*self.values, *(0.0,) * (12 - len(self.values)))
        texts = self.text.encode(), self.name.encode()
        return COMMAND.pack(OP_NUMBERS[self.op], self.number, self.lease_until, *values, *texts)

    @classmethod
    def unpack(cls, data: bytes) -> "Command":
        op, number, lease_until, *values, text, name = COMMAND.unpack(data)
        texts = (part.rstrip(b"\0").decode(errors="replace") for part in (text, name))
        return cls(tuple(OPERATIONS)[op], number, lease_until, tuple(values), *texts)


# --- Robot thread -----------------------------------------------------------------------------------------------------
def go_first(priority: int = 10) -> None:
    """This thread before those of other programs, where that is allowed (root, rtprio). All threads of the robot
    process do so, because each has to wait for whoever holds the interpreter's lock. libfranka does it itself."""
    if hasattr(os, "sched_setscheduler") and os.sched_getscheduler(0) == os.SCHED_OTHER:  # macOS has none
        with contextlib.suppress(PermissionError):
            os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(priority))


@dataclass
class Job:
    """A long operation; its handle is made up by the client."""

    handle: str
    op: str
    steps: Iterator[None] | None = None
    status: str = "queued"
    error: str | None = None
    began: float = field(default_factory=lambda: time.monotonic())
    ended: float | None = None

    def finish(self, error: str | None = None) -> None:
        self.error = error
        self.ended = time.monotonic()
        self.status = "failed" if error else "done"
        log.log(logging.WARNING if error else logging.INFO, "%s %s %s", self.op, self.status, error or "")

    def report(self) -> dict[str, Any]:
        return {
            "handle": self.handle or None,
            "op": self.op,
            "status": self.status,
            "error": self.error,
            "seconds": (self.ended or time.monotonic()) - self.began,
        }


class Control(threading.Thread):
    """The robot thread: constructs the arm, reads it, obeys the front, limits the reference, watches. The front's
    commands come through `link`, and the state goes the other way; where nobody reads, it is dropped."""

    def __init__(self, args: Args, gripper: "Gripper"):
        super().__init__(name="robot", daemon=True)
        self.args = args
        self.gripper = gripper
        self.link: socket.socket | None = None  # there is no front, for a moment
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
        self.deaf_until = -math.inf  # after such a call: that the lease was renewed meanwhile is still to be heard
        # mode
        self.phase = "idle"  # idle streaming hold busy breaking stopping
        self.held = ""  # why it is held, or was stopped, until the next job
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
        self.answer: dict[str, Any] | None = None  # to the last command
        self.asked = ""  # hold or stop
        self.asker = ""  # who did: the lease's holder, by its name, or a client
        self.stops = 0  # how often others than the holder asked: a job forgets `held`, not this
        self.lease = {"name": None, "token": "", "ttl": 1.0, "seq": None}
        self.lease_until = -math.inf
        self.target: np.ndarray | None = None
        self.target_at = -math.inf
        self.closure: float | None = None
        self.allowed_outside = math.inf  # m that the tcp may be out of the box; less after it was further in
        self.limit = math.inf  # the same, of a motion that comes in from further out
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

    @property
    def why(self) -> str:
        """What a client is told whom that table refuses."""
        if self.job:
            return f"{self.job.op} is going on"
        if self.fault:
            return f"{self.fault['code']}: {self.fault['message']}; look at the robot, then recover"
        return f"{self.held}; start again" if self.held else "start first: the controller does not run"

    @property
    def patience(self) -> float:
        """How long (s) this thread may be silent without being hung; on a simulation a busy machine is no fault."""
        return 0.5 if self.phase == "idle" or self.arm.info["task"] else self.args.frozen_after_s

    def run(self) -> None:
        try:
            self.arm = ARMS[self.args.robot](self.args)
            if isinstance(self.gripper, SimGripper):
                self.gripper.arm = self.arm
            self.state = self.arm.get_state()
            self.advanced = time.monotonic()
            self.limiter.seed(self.state.tcp_pose)
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
                self.tell()
                time.sleep(0.005)
            self.phase = "idle"
            self.tell()

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
        except Exception as error:  # noqa: BLE001  a bug must not end the thread; the fault logs it
            self.latch("internal", f"{type(error).__name__} in the control loop, see the log")
        self.ticked = now
        self.tell()

    # What the front says
    def listen(self, now: float) -> None:
        """Obeys all commands that have come."""
        for _ in range(200):
            link = self.link
            if link is None:
                return
            try:
                data = link.recv(COMMAND.size)
            except OSError:  # nothing there, or the front is being replaced
                return
            if len(data) != COMMAND.size:
                return
            command = Command.unpack(data)
            self.front_heard = now
            self.answer = {"code": "", "message": "", "job": None}
            try:
                job = self.obey(command, now)
                self.answer["job"] = job and job.report()
            except Refused as error:
                self.answer |= {"code": error.code, "message": str(error)}
            self.lease_until = min(now + 10, command.lease_until)
            self.number = command.number

    def obey(self, command: Command, now: float) -> Job | None:
        """One command; its job, if it has one. Raises Refused. What the front has checked is checked again."""
        op = command.op
        arguments = from_numbers(op, command.values)
        if op in ("hold", "stop"):
            if not (self.asked and command.name):  # in one tick another's word counts more than the commander's
                self.asker = command.name or "a client"
            self.asked = "stop" if self.asked == "stop" else op
            self.stops += not command.name
        elif op == "release":
            self.deaf_until = -math.inf
        elif op == "acquire":
            self.grant(command, arguments["ttl"], now)
        elif op == "target":
            self.follow(now, **arguments)
        elif op == "gains":
            self.wanted_gains = allowed_gains(arguments, self.args)
        elif op in JOBS or op == "job":
            return self.begin(op, command.text, arguments)
        return None

    def grant(self, command: Command, ttl: float, now: float) -> None:
        """A new lease, or the same one with another duration. The old one's job ends, or its target."""
        seq = self.lease["seq"]
        if command.text != self.lease["token"] or now > self.lease_until:
            seq = None
            self.target_at = min(self.target_at, now - self.args.hold_after_s - 0.001)
            if self.job:
                self.end_job(f"broken off: {command.name} took the lease")
        self.lease = {"name": command.name, "token": command.text, "ttl": ttl, "seq": seq}

    def follow(self, now: float, pose: Sequence[float], seq: float | None, closure: float | None) -> None:
        """A new target, and where wanted the gripper's closure."""
        check_mode("target", self.step, self.why)
        if reason := refusal(pose, self.limiter.reference, self.args):
            raise Refused("refused", reason)
        if closure not in (None, self.closure):
            self.gripper.follow(closure)
            self.closure = closure
        self.target = np.array(pose)
        self.target_at = now
        if seq is not None:
            self.lease = self.lease | {"seq": int(seq)}

    def begin(self, op: str, handle: str, arguments: dict[str, Any]) -> Job:
        """A new job, or with a known handle that one, which does not start again."""
        known = self.jobs.get(handle)
        if known and op not in (known.op, "job"):
            raise Refused("handle_used", f"{handle} is the handle of {known.op}: make up a new one")
        if known:
            return known
        if op == "job":
            raise Refused("unknown_handle", f"no job {handle}")
        if op == "gripper":
            job = Job(handle, op)
            self.gripper.submit(job, **arguments)
            self.closure = None
        else:
            check_mode(op, self.step, self.why)
            job = self.job = self.last_job = Job(handle, op, self.steps_of(op, **arguments))
        self.jobs[handle] = job
        ended = [name for name, other in self.jobs.items() if other.ended is not None]
        for name in ended[: max(len(self.jobs) - 256, 0)]:
            del self.jobs[name]
        return job

    def steps_of(self, op: str, **arguments: Any) -> Iterator[None]:
        if op == "recover":
            return self.recover()
        if op == "start":
            return self.start_streaming(allowed_gains(arguments, self.args))
        if op == "reset_task":
            if not self.arm.info["task"]:
                raise Refused("unavailable", "only the simulated robot has this")
            return self.reset_task(**arguments)
        q = np.array(arguments.get("q", self.args.reset_joints))
        if not within_joint_limits(q):
            raise Refused("bad_argument", f"q: {JOINT_LIMITS_TEXT}")
        return self.move_joints(q, min(arguments["speed"], self.args.max_joint_speed))

    # Measure, watch, act
    def measure(self, now: float) -> float:
        """Reads the arm; how far the robot's clock went on since the last tick, at most 20 ms."""
        state = self.arm.get_state()
        if not np.isfinite(np.concatenate([state.tcp_pose, state.tcp_vel, state.wrench, state.q, state.dq])).all():
            if self.fault is None:
                self.latch("sdk", "the robot's state is not finite")
            return 0.0  # the fault stops the controller
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
        asked = self.asked
        self.asked = ""
        hold = f"{self.asker} asked to hold" if asked == "hold" else ""
        stop = f"{self.asker} asked to stop" if asked == "stop" else ""
        silent = now - self.target_at
        lost = now > max(self.lease_until, self.deaf_until)
        if self.job and (asked or lost):
            self.end_job(f"broken off: {hold or stop or 'the lease ended'}")
        self.held = hold or stop or self.held
        if self.phase not in ("streaming", "hold"):
            return
        if not self.held and (reason := self.guard()):
            self.held = hold = reason
            self.limiter.seed(self.state.tcp_pose)
        if stop or silent > args.stop_after_s:
            log.warning("soft stop: %s", stop or f"no target for {silent:.1f} s")
            self.phase = "breaking"
        elif hold:
            log.warning("hold: %s", hold)
            self.phase = "hold"
        elif self.phase == "streaming" and (silent > args.hold_after_s or lost):
            log.warning("hold: %s", "the lease ended" if lost else f"no target for {silent:.2f} s")
            self.phase = "hold"
        elif not self.held and silent <= args.hold_after_s and not lost:
            self.phase = "streaming"

    def guard(self) -> str:
        """Why the arm must hold, or end its way to joint positions, although nobody asked to, if so."""
        force = norm(self.state.wrench[:3])
        if 0 < self.args.max_force < force:
            return f"an external force of {force:.0f} N exceeded --max-force {self.args.max_force:g}"
        return self.has_left()

    def has_left(self) -> str:
        """What is wrong when the measured tcp is more than 2 cm out of the box. From further out a motion may only come
        in, and where one came in from stays behind."""
        outside = self.limiter.outside(self.state.tcp_pose)
        self.limit = min(self.limit, max(self.allowed_outside, outside + 0.005))
        self.allowed_outside = min(self.allowed_outside, outside + 0.02)
        return "the tcp left --workspace-low and --workspace-high on its way" if outside > self.limit else ""

    def act(self, dt: float) -> None:
        """One step of the job, or of the reference."""
        arm = self.arm
        if self.job and self.fault and not self.recovering():
            self.end_job(f"{self.fault['code']}: {self.fault['message']}")
        elif self.job:
            self.step_job(self.job)
        elif self.phase in ("streaming", "hold") and not self.fault:
            if self.wanted_gains is not self.gains:
                with self.blocking():
                    arm.set_gains(self.wanted_gains)
                self.gains = self.wanted_gains
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
        self.asked = ""  # the arm stops anyway; it must not break off what comes later
        self.end_job(f"{code}: {message}")
        self.note_fault(code, message)

    def note_fault(self, code: str, message: str) -> None:
        """From any thread: the robot thread itself may hang."""
        if self.fault is None:
            self.faults += 1
            self.reflexes += code == "reflex"
            self.fault = {"code": code, "message": message, "count": self.faults}
            log.error("fault %d, %s: %s", self.faults, code, message, exc_info=code == "internal")

    @contextlib.contextmanager
    def blocking(self, seconds: float = 2.0) -> Iterator[None]:
        """Around a call into the SDK that may take this long without being a frozen robot."""
        began = time.monotonic()
        self.may_block_until = began + seconds
        self.tell()  # what has just begun is seen meanwhile
        try:
            yield
        finally:
            self.advanced = time.monotonic()
            self.deaf_until = self.advanced + 0.1 if began <= self.lease_until else -math.inf
            self.may_block_until = 0.0

    # Jobs: generators, one step per tick
    def settle(self) -> Iterator[None]:
        """Until the arm holds itself; a stop that goes on already is not begun again."""
        self.phase = "busy"
        self.held = ""
        with self.blocking():
            self.arm.stop()
        self.limit = math.inf
        yield  # that may have taken long: first listen, measure and watch
        give_up = time.monotonic() + 3
        while self.arm.moving():
            if time.monotonic() > give_up:
                raise ArmError("sdk", "the arm does not come to rest")
            yield

    def start_streaming(self, gains: Gains) -> Iterator[None]:
        self.wanted_gains = gains
        yield from self.settle()
        self.gains = self.wanted_gains
        self.limiter.seed(self.state.tcp_pose)
        with self.blocking():
            self.arm.start(self.state.tcp_pose, self.state.q, self.gains)
        self.target = None
        self.target_at = time.monotonic()
        self.phase = "streaming"
        log.info("streaming with %s", self.gains)

    def move_joints(self, q: np.ndarray, speed: float) -> Iterator[None]:
        yield from self.settle()
        with self.blocking():
            self.arm.move_to_joint_positions(q, speed)
        while self.arm.moving():
            if reason := self.guard():
                raise ArmError("refused", reason)
            yield
        yield from self.settle()  # a controller that followed the way is still to be ended
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
        self.closure = None
        self.allowed_outside = math.inf
        self.phase = "idle"

    def reset_task(self, seed: float | None) -> Iterator[None]:
        yield from self.settle()
        with self.blocking():
            self.arm.reset_task(None if seed is None else int(seed))
        self.closure = None  # the scene's gripper stands where the task puts it
        yield
        self.phase = "idle"

    # What the front may know
    def tell(self) -> None:
        """Publishes; a bug there must not keep the arm from being stopped, either."""
        try:
            self.publish()
        except Exception as error:  # noqa: BLE001
            self.note_fault("internal", f"{type(error).__name__} while telling the state, see the log")

    def publish(self) -> None:
        """Tells the front how things are."""
        link = self.link
        if link is None:
            return
        jobs = {"arm": self.last_job, "gripper": self.gripper.job}
        status = {
            "reply": {  # part of every reply
                "robot_time": self.state.time,
                "mode": self.mode,
                "held": self.held or None,
                "stops": self.stops,
                "reference": self.limiter.reference.tolist(),
                "fault": self.fault,
                "jobs": {mover: job and job.report() for mover, job in jobs.items()},
            },
            "state": self.report(),
            "task": self.arm.task,
            "gains": vars(self.wanted_gains),
            "step": self.step,
            "why": self.why,
            "lease": self.lease,
            "lease_until": self.lease_until,
            "number": self.number,
            "answer": self.answer,
            "at": self.state.at,
            "ticked": self.ticked,
            "overdue": max(self.ticked + self.patience, self.may_block_until),
        }
        with contextlib.suppress(OSError):  # it does not read, or is gone
            link.send(json.dumps(status).encode())

    def report(self) -> dict[str, Any]:
        """What `state` answers."""
        state = self.state
        arrays = {name: getattr(state, name).tolist() for name in ("tcp_pose", "tcp_vel", "q", "dq")}
        gripper = {f"gripper_{name}": value for name, value in vars(self.gripper.state).items()}
        return {
            **arrays,
            "tcp_force": state.wrench[:3].tolist(),
            "tcp_torque": state.wrench[3:].tolist(),
            **gripper,
            "gripper_closure": self.closure,
            "robot_mode": state.robot_mode,
            "errors": state.errors,
            "success_rate": state.success_rate,
            "overruns": self.overruns,
            "reflexes": self.reflexes,
            "limited": self.limiter.limited,
        }


# --- Front ------------------------------------------------------------------------------------------------------------
MAX_CONNECTIONS = 128
MAX_FRAMES = 8  # of a message
MAX_UNDERWAY = 1 << 18  # bytes that a connection has sent and that no message here has brought
MAX_ALL_UNDERWAY = 1 << 20  # the same of all together
MAX_GROWTH = 40 << 20  # bytes of memory of a front; then another one takes over


class Connection:
    """What Linux tells of a connection, beside what libzmq does."""

    def __init__(self, fd: int, now: float):
        self.socket = socket.socket(fileno=os.dup(fd))  # ours is the same connection, whatever becomes of the number
        self.address = self.socket.getpeername()[0]
        self.received = 0  # bytes
        self.taken = 0  # bytes received that messages have brought
        self.heard = False  # a message came since the last look
        self.served = False  # a message came ever
        self.silent_ms = 0  # since the peer last sent something
        self.acked = 0  # bytes that the peer has taken
        self.acked_at = now
        self.was_cut = False

    @property
    def underway(self) -> int:
        return self.received - self.taken

    def look(self, now: float, drained: bool) -> None:
        """Asks Linux: struct tcp_info. Raises OSError when the connection has just ended."""
        info = self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        self.silent_ms = struct.unpack_from("<I", info, 52)[0]
        acked, self.received = struct.unpack_from("<QQ", info, 120)
        waiting = struct.unpack_from("<I", info, 144)[0]  # bytes that the peer has not taken yet
        if self.heard and drained:
            self.taken = self.received
        self.taken = min(self.taken + 10, self.received)  # what is of no message, as heartbeats, does not add up
        self.heard = False
        if acked != self.acked or not waiting:
            self.acked = acked
            self.acked_at = now


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
        connections = []
        for connection in self.connections.values():
            with contextlib.suppress(OSError):
                connection.look(now, drained)
                connections.append(connection)
        for connection in connections:
            if now - connection.acked_at > 2:
                self.cut(connection, "does not read")
        total = self.left + sum(connection.underway for connection in connections)
        for connection in sorted(connections, key=lambda c: -c.underway):
            too_much = total >= MAX_ALL_UNDERWAY and connection.underway >= 4096
            if connection.underway >= MAX_UNDERWAY or too_much:
                total -= connection.underway
                self.cut(connection, "sends more than can be read")
        alive = [connection for connection in connections if not connection.was_cut]
        alive.sort(key=lambda c: (c.served, -c.silent_ms))  # who never asked, then who was silent for longest
        for connection in alive[: max(len(alive) - MAX_CONNECTIONS, 0)]:
            self.cut(connection, "too many connections")

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
                    address = connection.address if connection else "somebody who was gone at once"
                    if self.failed and not (connection and connection.served):
                        self.strangers[f"{address}: {self.failed.pop()}"] += 1
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


MAX_UNHEARD = 50  # commands, while the robot thread is in its SDK; its queue holds 167, the rest is for requests
EAGER_S = 2e-4  # after a request: looking costs the processor, sleeping and being woken costs the client
SDK_BUSY = "the robot's SDK takes its time: ask again"


class Front:
    """Answers requests and publishes the state. Methods `op_*` are the operations that want more than a message to the
    robot process."""

    def __init__(self, args: Args, link: socket.socket, facts: dict[str, Any]):
        self.args = args
        self.link = link
        self.buffer = memoryview(bytearray(1 << 18))
        self.newest = json.loads(link.recv(len(self.buffer)))
        self.facts = facts  # what `hello` tells
        self.alone = False  # the robot process has ended
        self.answered = -math.inf  # when it last answered
        self.unanswered: dict[str, dict[str, Any]] = {}  # a job that the robot thread has not heard of yet
        self.refusals: Counter[str] = Counter()
        self.complained = 0.0
        self.number = self.newest["number"]  # of the front before this one
        self.lease = self.newest["lease"]
        self.lease_until = self.newest["lease_until"]

    # Sockets
    def open_sockets(self, fds: Sequence[int]) -> None:
        import msgpack
        import zmq

        args = self.args
        context = zmq.Context.instance()
        self.router = context.socket(zmq.ROUTER)
        self.publisher = context.socket(zmq.PUB)
        sockets = self.router, self.publisher
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
        self.packer = msgpack.Packer()

    def serve(self) -> None:
        """Until the robot process ends. Between two requests, every 10 ms, all that has a beat."""
        import zmq

        heap = memory_bytes()
        due = time.monotonic()
        while not self.alone:
            self.router.rcvtimeo = max(math.ceil(1000 * (due - time.monotonic())), 0)
            self.answer()
            now = time.monotonic()
            if now < due:
                continue
            due = max(due + 0.01, now)
            if self.number - self.status()["number"] < MAX_UNHEARD:
                with contextlib.suppress(Refused):
                    self.send("state", self.lease_until)  # anything tells that the front is alive
            with contextlib.suppress(zmq.Again):
                self.publisher.send(self.packed({"op": "state"}, self.op_state()), zmq.DONTWAIT)
            self.doors.look(now, drained=not self.router.events & zmq.POLLIN)
            self.complain(now)
            if (grown := memory_bytes() - heap) > MAX_GROWTH:
                log.error("the front has grown by %d MB: another one takes over", grown >> 20)
                return

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
        """The newest that the robot process has told; every request looks once."""
        size = 0
        with contextlib.suppress(BlockingIOError):
            while not self.alone:
                size = self.link.recv_into(self.buffer)
                self.alone = size == 0
        if size:
            self.newest = json.loads(bytes(self.buffer[:size]))
        return self.newest

    def send(self, op: str, lease_until: float, **arguments: Any) -> None:
        """For the robot thread to hear; raises Refused when its queue is full, after long in its SDK."""
        text = arguments.get("handle") or arguments.get("token", "")
        values = to_numbers(op, arguments)
        command = Command(op, self.number + 1, lease_until, values, text, arguments.get("name", ""))
        try:
            self.link.send(command.pack())
        except BlockingIOError:
            raise Refused("busy", SDK_BUSY) from None
        except ConnectionError:
            self.alone = True
        self.number += 1

    def command(self, op: str, lease_until: float, **arguments: Any) -> dict[str, Any] | None:
        """Sends it and waits until the robot thread has acted on it, so that the reply shows it. Its answer, or None
        while it is busy in its SDK and will act later; raises Refused."""
        self.send(op, lease_until, **arguments)
        give_up = time.monotonic() + 0.05
        while (status := self.status())["number"] < self.number:
            left = give_up - time.monotonic()
            if left <= 0:
                return None
            select.select([self.link], [], [], left)
        answer = status["answer"]
        if answer["code"]:
            raise Refused(answer["code"], answer["message"])
        return answer

    # Requests
    def answer(self) -> None:
        """Answers a request if there is one, or one comes while the socket waits. Requests come in bursts, and to look
        takes less time than to be woken: so for a moment after each it only looks."""
        import zmq

        is_eager = time.monotonic() < self.answered + EAGER_S
        try:
            first = self.router.recv(zmq.DONTWAIT if is_eager else 0, copy=False)
        except zmq.Again:
            os.sched_yield()
            return
        frames = [first.bytes, *self.router.recv_multipart()]  # a ROUTER's message has more than its sender
        fd = first.get(zmq.SRCFD)
        self.doors.came(fd, frames[1:])
        if len(frames) > MAX_FRAMES:
            if connection := self.doors.connections.get(fd):
                self.doors.cut(connection, f"sends messages of {len(frames)} frames")
            return
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
        reply = self.packed(request, result, refused)
        with contextlib.suppress(zmq.ZMQError):  # a peer that is gone, or does not read
            for frame in frames[:cut]:
                self.router.send(frame, zmq.DONTWAIT | zmq.SNDMORE)
            self.router.send(reply, zmq.DONTWAIT)
        self.answered = time.monotonic()

    def carry_out(self, request: dict[str, Any]) -> dict[str, Any]:
        """The result; raises Refused."""
        self.status()
        op = request.get("op")
        if op not in OPERATIONS:
            raise Refused("unknown_op", f"{op!r:.40}: there are {' '.join(OPERATIONS)}")
        arguments = checked(op, request.get("args", {}))
        holder = self.holder()
        is_commander = holder and self.is_holders(request.get("token", ""))
        if is_commander:
            self.lease_until = time.monotonic() + self.lease["ttl"]
        elif op in LEASED:
            raise Refused("no_lease", f"the lease is {holder}'s" if holder else "acquire a lease first: yours ended")
        if op in ("start", "gains"):  # those that are not given stay as they are
            gains = self.newest["gains"]
            arguments |= {name: value for name, value in gains.items() if arguments[name] is None}
        if op in JOBS:
            return self.begin(op, arguments)
        if op in ("gains", "hold", "stop"):
            asker = holder if is_commander else ""
            if not self.command(op, self.lease_until, **arguments, name=asker) and op == "gains":
                raise Refused("busy", SDK_BUSY)
            return arguments
        return getattr(self, f"op_{op}")(**arguments)

    def holder(self) -> str | None:
        return self.lease["name"] if time.monotonic() <= self.lease_until else None

    def is_holders(self, token: str) -> bool:
        return secrets.compare_digest(token.encode(), self.lease["token"].encode())

    def packed(self, request: dict[str, Any], result: Any, error: Refused | None = None) -> bytes:
        if error:
            self.refusals[error.code] += 1
        status = self.newest
        now = time.monotonic()
        return self.packer.pack(
            {
                "v": PROTOCOL_VERSION,
                "id": request.get("id"),
                "op": request.get("op"),
                "ok": error is None,
                "error": {"code": error.code, "message": str(error)} if error else None,
                "result": result,
                "server_id": self.facts["server_id"],
                "server_time": now,
                "state_age": now - status["at"],
                "lease": self.holder(),
                "seq": self.lease["seq"],
                **status["reply"],
            }
        )

    # Operations
    def op_hello(self) -> dict[str, Any]:
        return self.facts | {"gains": self.newest["gains"], "lease": self.holder()}

    def op_state(self) -> dict[str, Any]:
        return self.newest["state"]

    def op_task(self) -> dict[str, Any]:
        task = self.newest["task"]
        if task is None:
            raise Refused("unavailable", "only the simulated robot has this")
        return json.loads(task)

    def op_acquire(self, name: str, token: str, ttl: float, takeover: bool) -> dict[str, Any]:
        holder = self.holder()
        is_new = holder is None or not self.is_holders(token)
        if is_new and holder and not takeover:
            raise Refused("lease_taken", f"{holder} has the lease; takeover=true takes it")
        if is_new:
            log.info("lease: %s%s", name, f", taken from {holder}" if holder else "")
        until = time.monotonic() + ttl
        self.command("acquire", until, name=name, token=token, ttl=ttl, takeover=takeover)
        self.lease = {"name": name, "token": token, "ttl": ttl, "seq": None if is_new else self.lease["seq"]}
        self.lease_until = until
        return {"ttl": ttl}

    def op_release(self) -> dict[str, Any]:
        self.command("release", -math.inf)
        self.lease_until = -math.inf
        return {}

    def op_target(self, pose: list[float], seq: int | None, closure: float | None) -> dict[str, Any]:
        """Answered from what the robot process told last, so that nobody waits for its next tick; it looks again. Where
        a target changes more than the reference, its answer is waited for."""
        status = self.newest
        check_mode("target", status["step"], status["why"])
        now = time.monotonic()
        if now > status["overdue"]:
            age = now - status["at"]
            raise Refused("frozen", f"the newest state is {age:.2f} s old: the robot process does not go on")
        last = self.lease["seq"]
        if seq is not None and last is not None and seq <= last:
            raise Refused("stale", f"seq {seq} after {last}")
        if reason := refusal(pose, status["reply"]["reference"], self.args):
            raise Refused("refused", reason)
        is_more = status["step"] == "hold" or closure not in (None, status["state"]["gripper_closure"])
        tell = self.command if is_more else self.send
        tell("target", self.lease_until, pose=pose, seq=seq, closure=closure)
        if seq is not None:
            self.lease = self.lease | {"seq": int(seq)}
        return self.op_state()

    def op_job(self, handle: str) -> dict[str, Any]:
        for job in self.newest["reply"]["jobs"].values():
            if job and job["handle"] == handle:
                return job
        waits = self.unanswered.get(handle)
        try:
            answer = self.command("job", self.lease_until, handle=handle)
        except Refused as error:
            if not waits:
                raise
            return waits | {"status": "failed", "error": f"not begun: {error}"}
        if answer:
            return answer["job"]
        if not waits:
            raise Refused("busy", SDK_BUSY)
        return waits

    def begin(self, op: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """The report of a new job, or of the one with that handle."""
        handle = arguments["handle"]
        status = self.newest
        known = {job["handle"] for job in (*status["reply"]["jobs"].values(), *self.unanswered.values()) if job}
        if op in FOLLOWS and handle not in known and time.monotonic() - status["ticked"] > 0.05:
            check_mode(op, status["step"], status["why"])  # no job waits for the end of a long call of the SDK
        if answer := self.command(op, self.lease_until, **arguments):
            return answer["job"]
        if len(self.unanswered) > 16:
            self.unanswered.clear()
        self.unanswered[handle] = {"handle": handle, "op": op, "status": "queued", "error": None, "seconds": 0.0}
        return self.unanswered[handle]


def memory_bytes() -> int:
    """Resident memory of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def run_front(order: str) -> None:
    """A front's main program: a spare one waits here until the robot process sends the facts."""
    import msgpack  # noqa: F401  so that a spare front has everything
    import zmq.utils.monitor

    order = json.loads(order)
    log_file = logging.handlers.WatchedFileHandler(order["args"]["log_file"])  # which the robot process renames
    log_file.addFilter(lambda record: Path(log_file.baseFilename).parent.exists())  # else it raises, the front ends
    if order["args"]["keys"]:
        import zmq.auth.thread  # noqa: F401
    logging.basicConfig(format=LOG_FORMAT, level=logging.INFO, handlers=[log_file])
    link = socket.socket(fileno=order["link"])
    facts = link.recv(1 << 16)
    if facts:
        args = Args(**order["args"] | {"gains": Gains(**order["args"]["gains"])})
        front = Front(args, link, json.loads(facts))
        link.setblocking(False)
        front.open_sockets(order["listening"])
        front.serve()
    os._exit(0)  # not through libzmq's end, which waits for its peers


# --- Robot process ----------------------------------------------------------------------------------------------------
END_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # the robot process decides when it is over


class FrontProcess:
    """A front, or a spare one, as the robot process sees it."""

    def __init__(self, args: Args, listening: Sequence[socket.socket]):
        self.link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        fds = [theirs.fileno(), *(s.fileno() for s in listening)]
        order = {"link": fds[0], "listening": fds[1:], "args": asdict(args)}
        script = Path(__file__).resolve()
        program = f"import sys; sys.path.insert(0, {str(script.parent)!r}); server = __import__({script.stem!r})"
        command = [sys.executable, "-c", f"{program}; server.run_front(sys.argv[1])", json.dumps(order)]
        signal.pthread_sigmask(signal.SIG_BLOCK, END_SIGNALS)  # a new process starts with what is blocked
        with open(args.log_file, "ab") as output:
            nothing = subprocess.DEVNULL
            self.process = subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=output, pass_fds=fds)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, END_SIGNALS)
        theirs.close()
        self.link.setblocking(False)

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
        try:
            self.listening = listen_on(args.bind, args.port)
        except OSError as error:
            fail(f"--bind {args.bind} --port {args.port}: {error}; does another server run?")
        self.ports = [s.getsockname()[1] for s in self.listening]
        hand = "sim" if args.robot == "sim" else "franka-hand"
        try:
            self.gripper = GRIPPERS[hand if args.gripper == "auto" else args.gripper](args)
        except (ArmError, GripperError) as error:
            fail(str(error))
        self.control = Control(args, self.gripper)
        self.front = FrontProcess(args, self.listening)
        self.spare = FrontProcess(args, self.listening)
        self.gripper.thread.start()
        self.control.start()
        self.control.ready.wait()
        if self.control.failure:
            fail(self.control.failure)
        self.enter(self.front)

    def enter(self, front: FrontProcess) -> None:
        """From now on the robot thread listens to this one, and it learns how things are."""
        self.fronts += 1
        self.silent = 0.0
        with contextlib.suppress(OSError):  # it has ended: the next look sees that
            front.link.send(json.dumps(self.facts()).encode())
        self.control.link = front.link
        self.control.publish()

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
        """Until a signal; whatever goes wrong, the arm comes to rest."""
        failure = ""
        for number in END_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as with nohup
                signal.signal(number, self.signalled)
        threading.Thread(target=self.show, name="terminal", daemon=True).start()
        go_first()
        try:
            self.look_after()
        except Exception as error:
            log.exception("robot process")
            failure = f"internal: {error!r}, see {self.args.log_file}"
        self.shut_down(failure)

    def look_after(self) -> None:
        before = time.monotonic()
        while not self.ending:
            time.sleep(0.01)
            now = time.monotonic()
            passed = min(now - before, 0.012)  # only time in which this thread ran counts
            before = now
            self.watch_front(passed)
            self.watch_control(passed)

    def show(self) -> None:
        """On the terminal: where it serves, how it goes. A thread of its own, as Ctrl-S or a stalled ssh hold it up."""
        go_first()
        while self.control.front_heard < 0:
            time.sleep(0.01)
        host = f"[{self.args.bind}]" if ":" in self.args.bind else self.args.bind
        log.info("serving %s on %s %s", self.args.robot, host, self.ports)
        with contextlib.suppress(OSError):  # the terminal may have been closed
            print(f"serving on tcp://{host}:{self.ports[0]} (state: {self.ports[1]})", flush=True)
            while sys.stdout.isatty() and not self.ending:
                print("\r" + self.status_line() + "\x1b[K", end="", flush=True)
                time.sleep(0.25)

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
        self.spare = FrontProcess(self.args, self.listening)

    def watch_control(self, passed: float) -> None:
        """The robot thread itself may hang inside an SDK."""
        c = self.control
        may_block = time.monotonic() < c.may_block_until
        self.stale = 0.0 if c.ticked != self.seen or may_block else self.stale + passed
        self.seen = c.ticked
        if self.stale > c.patience and c.fault is None:
            c.note_fault("frozen", "the robot thread hangs in the SDK: connection lost?")
            c.publish()

    def signalled(self, number: int, _) -> None:
        if self.ending and number == signal.SIGINT:  # a terminal that is closed brings SIGHUP twice
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
        log.info("end")
        signal.alarm(2)  # whatever a terminal that takes nothing holds up
        with contextlib.suppress(OSError):  # the terminal may have been closed
            print(end="\n" * sys.stdout.isatty(), flush=True)
            if failure:
                print(failure, file=sys.stderr)
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
    for number in (port, port + 1 if port else 0):
        found = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)
        family, *_, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)  # as a client takes a name
        both = family == socket.AF_INET6  # `::` takes IPv4, too
        sockets.append(socket.create_server(address, family=family, backlog=4096, dualstack_ipv6=both))
    return sockets


# --- Doctor -----------------------------------------------------------------------------------------------------------
Finding = tuple[bool | None, str, str, str]  # whether it is fine (None: it could be better), name, text, remedy


def examine(args: Args) -> Iterator[Finding]:
    """One after the other, because some take seconds."""
    yield sys.version_info >= (3, 11), "python", platform.python_version(), "take Python 3.11 or newer"
    packages = ("pyzmq", "msgpack", "numpy", "tyro", *PACKAGES[args.robot], *PACKAGES.get(args.gripper, ()))
    for package in dict.fromkeys(packages):
        name = package.partition("==")[0]
        try:
            yield True, name, importlib.metadata.version(name), ""
        except importlib.metadata.PackageNotFoundError:
            yield False, name, "not installed", f"pip install {package}"
    try:
        sockets = listen_on(args.bind, args.port)
        ports = " and ".join(str(s.getsockname()[1]) for s in sockets)
        for s in sockets:
            s.close()
        yield True, "ports", f"{ports} at {args.bind} are free", ""
    except OSError as error:
        text = f"--bind {args.bind} --port {args.port} (and the next one): {error.strerror}"
        wrong = None if error.errno == errno.EADDRINUSE else False  # by a server that runs already, mostly
        yield wrong, "ports", text, "end the other server, or take another port or --bind"
    if args.gripper == "robotiq":
        port = args.gripper_port
        if not os.path.exists(port):
            yield False, "gripper", f"{port} is missing", "plug in its USB adapter, or name its --gripper-port"
        elif not os.access(port, os.R_OK | os.W_OK):
            yield False, "gripper", f"no permission for {port}", "sudo usermod -aG dialout $USER, then log in again"
        else:
            yield True, "gripper", f"robotiq at {port}", ""
    if args.robot != "sim":
        yield from examine_machine()
        yield from examine_robot(args.robot_ip)


def examine_machine() -> Iterator[Finding]:
    """What a control loop at 1 kHz needs."""
    realtime = "PREEMPT_RT" in platform.version().replace(" ", "_")
    text = f"{platform.release()} {'with' if realtime else 'without'} PREEMPT_RT"
    remedy = "sudo pro enable realtime-kernel (Ubuntu), sudo apt install linux-image-rt-amd64 (Debian)"
    yield realtime or None, "kernel", text, remedy
    limit = resource.getrlimit(resource.RLIMIT_RTPRIO)[0]
    allowed = os.geteuid() == 0 or limit == resource.RLIM_INFINITY or limit >= 99
    remedy = "add a line `@realtime - rtprio 99` to /etc/security/limits.conf, "
    remedy += "sudo groupadd realtime, sudo usermod -aG realtime $USER, then log in again"
    yield allowed, "real-time priority", "allowed" if allowed else "not allowed", remedy
    files = Path("/sys/devices/system/cpu").glob("cpu*/cpufreq/scaling_governor")
    governors = {path.read_text().strip() for path in files}
    text = " ".join(sorted(governors)) or "not shown here, as in a virtual machine"
    yield governors <= {"performance"} or None, "CPU governor", text, "sudo cpupower frequency-set -g performance"


def examine_robot(ip: str) -> Iterator[Finding]:
    remedy = "cable into the control cabinet, this PC in its subnet, brakes open, FCI activated in Desk"
    try:
        yield True, f"robot at {ip}", f"interface version {reach(ip)}", ""
    except ArmError as error:
        reason = str(error).removeprefix(f"--robot-ip {ip}: ").partition(" (")[0]
        yield False, f"robot at {ip}", reason, remedy
    if not shutil.which("ping"):
        yield None, "round trip", "not measured, there is no ping", "sudo apt install iputils-ping"
        return
    ping = subprocess.run(["ping", "-q", "-c", "20", "-i", "0.2", "-s", "1200", ip], capture_output=True, text=True)
    times = re.search(r"= [\d.]+/([\d.]+)/([\d.]+)", ping.stdout)
    text = f"mean {times[1]} ms, longest {times[2]} ms" if times else "no answer to ping"
    remedy = "a cable of its own without a switch; energy saving off: sudo ethtool --set-eee INTERFACE eee off"
    yield times is not None and float(times[2]) < 1, "round trip", text, remedy


def tell(fine: bool | None, name: str, text: str, remedy: str = "") -> bool:
    """Prints a finding as one line: ok, or what is wrong (None: what could be better) and what to do. Whether it
    has to be mended."""
    mark = "warn" if fine is None else "ok  " if fine else "FAIL"
    cure = f"; {remedy}" if remedy and not fine else ""
    print(f"{mark}  {name}: {text}{cure}", flush=True)
    return fine is False


def run_doctor(args: Args) -> int:
    """The number of checks that failed."""
    failed = sum(tell(*finding) for finding in examine(args))
    print(f"{failed} to fix" if failed else "ready", flush=True)
    return failed


# --- Keys -------------------------------------------------------------------------------------------------------------
def make_keys(folder: Path) -> None:
    import zmq.auth

    if folder.exists():
        fail(f"--keygen: {folder} exists; take another folder, or remove it and give every client the new keys")
    try:
        folder.mkdir(parents=True, mode=0o700)
    except OSError as error:
        fail(f"--keygen: {folder}: {error.strerror}")
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
        except (OSError, ValueError, LookupError, struct.error, zmq.ZMQError) as error:
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
    if (folder / "server.key_secret").stat().st_mode & 0o077:
        message = f"--keys {folder}: others can read server.key_secret: chmod 600 {folder}/server.key_secret"
        print(message, file=sys.stderr)
        log.warning(message)


# --- Main -------------------------------------------------------------------------------------------------------------
class LogFile(logging.handlers.RotatingFileHandler):
    """A disk that is full is said once, in one line."""

    told = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        if not self.told:
            self.told = True
            print(f"\n--log-file {self.baseFilename}: {sys.exc_info()[1]}; events are lost", file=sys.stderr)


def main(args: Args) -> None:
    check(args)
    if args.keygen:
        return make_keys(Path(args.keys))
    try:
        handler = LogFile(args.log_file, maxBytes=5_000_000, backupCount=3)
    except OSError as error:
        fail(f"--log-file {args.log_file}: {error}")
    logging.basicConfig(format=LOG_FORMAT, level=logging.INFO, handlers=[handler])
    if args.keys:  # in a process of its own, so that this one never has ZeroMQ
        child = multiprocessing.get_context("fork").Process(target=check_keys, args=(Path(args.keys),))
        child.start()
        child.join()
        if child.exitcode:
            raise SystemExit(1)
    if args.doctor:
        raise SystemExit(1 if run_doctor(args) else 0)
    sys.setswitchinterval(5e-4)  # a thread that computes gives way to the robot thread after 0.5 ms
    Robot(args).run()


def parse_args() -> Args:
    import tyro  # here, so that a front need not wait for it

    if {"-h", "--help"} & set(sys.argv):  # tyro would join the tables' lines
        print(__doc__)
    return tyro.cli(Args, description="")


if __name__ == "__main__":
    main(parse_args())
