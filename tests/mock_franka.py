"""A mock of Franka's controller interface, so that the real SDKs (franky, panda-py: libfranka) run without a robot.

    with MockFranka(version=10) as robot:   # a process of its own
        franky.Robot(robot.address, ...)
        robot.ask("reflex")                 # what else can be asked: methods `do_...` of Controller

Version 10 is what an FR3 speaks to libfranka 0.18 and later, version 5 what a Panda speaks to libfranka 0.9. The arm is
a FrankaSim without its controller: libfranka's torques act on it, its positions are obeyed exactly. It looks at its
limits as the real one does: too large an external force, too large a joint step, a user stop and (where asked for) lost
commands end a motion, and nothing moves until the error is recovered. Time is its own: one tick is 1 ms.
The messages are those of frankarobotics/libfranka-common, service_types.h and rbk_types.h, packed and little-endian.
"""

import contextlib
import ctypes
import json
import math
import os
import queue
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from pathlib import Path

import mujoco
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from franka_sim import (
    DH_A,
    DH_ALPHA,
    DH_D,
    FLANGE,
    INERTIAL,
    MAX_JOINT_POSITION,
    MAX_JOINT_TORQUE,
    MAX_JOINT_VELOCITY,
    MIN_JOINT_POSITION,
    TCP,
    FrankaSim,
)

ROBOT_PORT, HAND_PORT, HAND_VERSION = 1337, 1338, 3
COMMON = ["Connect", "Move", "StopMove", "SetCollisionBehavior", "SetJointImpedance", "SetCartesianImpedance"]
COMMON += ["SetGuidingMode", "SetEEToK", "SetNEToEE", "SetLoad", "AutomaticErrorRecovery"]
COMMANDS = {  # by number
    5: [*COMMON[:3], "GetCartesianLimit", *COMMON[3:10], "SetFilters", *COMMON[10:], "LoadModelLibrary"],
    10: [*COMMON, "GetRobotModel"],
}
MOVE_STATUS = {  # what Move is answered with
    5: {"ok": 0, "started": 1, "preempted": 2, "rejected": 3, "reflex": 6, "stopped": 7},
    10: {"ok": 0, "started": 1, "preempted": 2, "safety": 3, "rejected": 5, "reflex": 8, "stopped": 9},
}
ROBOT_MODES = ["other", "idle", "move", "guiding", "reflex", "user_stopped", "automatic_error_recovery"]
MOTIONS = ["joint_position", "joint_velocity", "cartesian_position", "cartesian_velocity", "none"]
ERRORS = {"joint_velocity_violation": 3, "cartesian_reflex": 7, "joint_motion_generator_velocity_discontinuity": 14}
ERRORS |= {"communication_constraints_violation": 25}
MAX_JOINT_STEP = 0.1  # rad between two position commands; the real robot allows far less, but loses no time to others


# --- Messages ---------------------------------------------------------------------------------------------------------
POSES = ["O_T_EE", "O_T_EE_d", "F_T_EE", "EE_T_K", "F_T_NE", "NE_T_EE"]
STATE = [(name, 16) for name in POSES]
STATE += [("m_ee", 1), ("I_ee", 9), ("F_x_Cee", 3), ("m_load", 1), ("I_load", 9), ("F_x_Cload", 3)]
STATE += [("elbow", 2), ("elbow_d", 2)]
STATE += [(name, 7) for name in ("tau_J", "tau_J_d", "dtau_J", "q", "q_d", "dq", "dq_d", "ddq_d")]
STATE += [("joint_contact", 7), ("cartesian_contact", 6), ("joint_collision", 7), ("cartesian_collision", 6)]
STATE += [("tau_ext_hat_filtered", 7), ("O_F_ext_hat_K", 6), ("K_F_ext_hat_K", 6), ("O_dP_EE_d", 6), ("O_ddP_O", 3)]
STATE += [("elbow_c", 2), ("delbow_c", 2), ("ddelbow_c", 2)]
STATE += [("O_T_EE_c", 16), ("O_dP_EE_c", 6), ("O_ddP_EE_c", 6), ("theta", 7), ("dtheta", 7)]


def state_dtype(version: int) -> np.dtype:
    """RobotState: doubles up to version 9; floats and two accelerometers from version 10 on."""
    number = "<f4" if version >= 10 else "<f8"
    fields = [("message_id", "<u8"), *((name, number, (size,)) for name, size in STATE)]
    if version >= 10:
        fields += [("accelerometer_top", number, (18,)), ("accelerometer_bottom", number, (18,))]
    fields += [("motion", "u1"), ("controller", "u1"), ("errors", "u1", (41,)), ("reflex_reason", "u1", (41,))]
    return np.dtype([*fields, ("robot_mode", "u1"), ("success_rate", number)])


def command_dtype(version: int) -> np.dtype:
    """RobotCommand; version 8 added `torque_finished`."""
    fields = [("message_id", "<u8"), ("q", "<f8", (7,)), ("dq", "<f8", (7,)), ("pose", "<f8", (16,))]
    fields += [("twist", "<f8", (6,)), ("elbow", "<f8", (2,)), ("valid_elbow", "?"), ("finished", "?")]
    return np.dtype([*fields, ("tau", "<f8", (7,)), *([("torque_finished", "?")] if version >= 8 else [])])


def hand_on_flange() -> np.ndarray:
    """(4, 4) pose of the tcp in the flange's frame: the hand is turned by -45 degrees."""
    pose, half = np.eye(4), np.sqrt(0.5)
    pose[:2, :2], pose[2, 3] = [[half, half], [-half, half]], TCP
    return pose


# --- Models that the robot sends --------------------------------------------------------------------------------------
def urdf() -> str:
    """What version 10 sends: the arm up to the flange, `link8`."""
    text = '<robot name="fr3"><link name="base"/><link name="link0"/>'
    text += '<joint name="base_joint" type="fixed"><parent link="base"/><child link="link0"/></joint>'
    for i, (mass, com, inertia) in enumerate(INERTIAL):
        values = dict(zip(("ixx", "iyy", "izz", "ixy", "ixz", "iyz"), inertia.split()))
        tensor = " ".join(f'{name}="{value}"' for name, value in values.items())
        place = f'xyz="{DH_A[i]} {-np.sin(DH_ALPHA[i]) * DH_D[i]} {np.cos(DH_ALPHA[i]) * DH_D[i]}"'
        limits = f'lower="{MIN_JOINT_POSITION[i]}" upper="{MAX_JOINT_POSITION[i]}"'
        limits += f' effort="{MAX_JOINT_TORQUE[i]}" velocity="{MAX_JOINT_VELOCITY[i]}"'
        text += f'<link name="link{i + 1}"><inertial><origin xyz="{com}" rpy="0 0 0"/><mass value="{mass}"/>'
        text += f'<inertia {tensor}/></inertial></link><joint name="joint{i + 1}" type="revolute">'
        text += f'<origin {place} rpy="{DH_ALPHA[i]} 0 0"/><parent link="link{i}"/><child link="link{i + 1}"/>'
        text += f'<axis xyz="0 0 1"/><limit {limits}/>'
        text += '<position_based_velocity_limits velocity_offset="0.2" deceleration_limit="6.0"/></joint>'
    text += '<link name="link8"/><joint name="joint8" type="fixed"><parent link="link7"/><child link="link8"/>'
    return text + f'<origin xyz="0 0 {FLANGE}" rpy="0 0 0"/></joint></robot>'


# Up to version 9 the robot sends a shared library. Matrices are column-major; frames 0 to 6 are the joints', 7 is the
# flange, 8 the end effector. Coriolis forces are left out (they are small); masses and gravity, which no client of ours
# asks for, are NaN.
MODEL_C = """
#include <math.h>
#include <string.h>
static const double dh[7][3] = {%s}; /* a, d, alpha */

static void times(double *left, const double *right) {
  double product[16];
  for (int col = 0; col < 4; col++)
    for (int row = 0; row < 4; row++) {
      product[4 * col + row] = 0;
      for (int k = 0; k < 4; k++) product[4 * col + row] += left[4 * k + row] * right[4 * col + k];
    }
  memcpy(left, product, sizeof product);
}

static void forward(const double *q, int frame, const double *tool, double *pose, double axes[7][16]) {
  memset(pose, 0, 16 * sizeof *pose);
  for (int i = 0; i < 4; i++) pose[5 * i] = 1;
  for (int i = 0; i < 7 && i <= frame; i++) {
    const double a = dh[i][0], d = dh[i][1], ca = cos(dh[i][2]), sa = sin(dh[i][2]), c = cos(q[i]), s = sin(q[i]);
    const double link[16] = {c, s * ca, s * sa, 0, -s, c * ca, c * sa, 0, 0, -sa, ca, 0, a, -sa * d, ca * d, 1};
    times(pose, link);
    if (axes) memcpy(axes[i], pose, 16 * sizeof *pose);
  }
  const double flange[16] = {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, %r, 1};
  if (frame >= 7) times(pose, flange);
  if (frame == 8) times(pose, tool);
}

static void jacobian(const double *q, int frame, const double *tool, int in_body, double *out) {
  double pose[16], axes[7][16];
  forward(q, frame, tool, pose, axes);
  memset(out, 0, 42 * sizeof *out);
  for (int i = 0; i < 7 && i <= frame; i++) {
    const double *z = axes[i] + 8, x = pose[12] - axes[i][12], y = pose[13] - axes[i][13], h = pose[14] - axes[i][14];
    const double twist[6] = {z[1] * h - z[2] * y, z[2] * x - z[0] * h, z[0] * y - z[1] * x, z[0], z[1], z[2]};
    for (int row = 0; row < 6; row++)
      if (in_body)
        for (int k = 0; k < 3; k++) out[6 * i + row] += pose[4 * (row %% 3) + k] * twist[row / 3 * 3 + k];
      else out[6 * i + row] = twist[row];
  }
}

static const double zero[7] = {0};
#define JOINT(n) \\
  void O_T_J##n(const double *q, double *out) { forward(q, n - 1, 0, out, 0); }
#define JACOBIANS(n) \\
  void O_J_J##n(const double *q, double *out) { jacobian(q, n - 1, 0, 0, out); } \\
  void Ji_J_J##n(const double *q, double *out) { jacobian(q, n - 1, 0, 1, out); }
JOINT(1) JOINT(2) JOINT(3) JOINT(4) JOINT(5) JOINT(6) JOINT(7) JOINT(8)
JACOBIANS(2) JACOBIANS(3) JACOBIANS(4) JACOBIANS(5) JACOBIANS(6) JACOBIANS(7) JACOBIANS(8)
void O_J_J1(double *out) { jacobian(zero, 0, 0, 0, out); }
void Ji_J_J1(double *out) { jacobian(zero, 0, 0, 1, out); }
void O_T_J9(const double *q, const double *tool, double *out) { forward(q, 8, tool, out, 0); }
void O_J_J9(const double *q, const double *tool, double *out) { jacobian(q, 8, tool, 0, out); }
void Ji_J_J9(const double *q, const double *tool, double *out) { jacobian(q, 8, tool, 1, out); }
static void fill(double *out, int size, double value) { for (int i = 0; i < size; i++) out[i] = value; }
#define V const double *
void M_NE(V q, V inertia, double mass, V center, double *out) { fill(out, 49, NAN); }
void c_NE(V q, V dq, V inertia, double mass, V center, double *out) { fill(out, 7, 0); }
void g_NE(V q, V gravity, double mass, V center, double *out) { fill(out, 7, NAN); }
"""


def model_library() -> bytes:
    """What versions up to 9 send; needs gcc."""
    rows = ", ".join(f"{{{a!r}, {d!r}, {float(alpha)!r}}}" for a, d, alpha in zip(DH_A, DH_D, DH_ALPHA))
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "model.c"), Path(folder, "libmodel.so")
        source.write_text(MODEL_C % (rows, FLANGE))
        subprocess.run(["gcc", "-shared", "-fPIC", "-O2", "-o", library, source, "-lm"], check=True)
        return library.read_bytes()


# --- The controller ---------------------------------------------------------------------------------------------------
@dataclass
class Options:
    """What a test may ask of a mock."""

    version: int = 10
    """of the protocol: 10 or 5"""
    address: str = "127.0.0.1"
    max_lost: int = 0
    """ticks without a command that end a motion, 20 on the real robot; 0: any number"""
    end_s: float = 0.0
    """from a client's last command until its motion has ended"""
    hand: bool = True
    object_width: float = 0.0
    """of something between the fingers, m"""
    scene: str = ""
    """MJCF bodies around the arm"""
    q: list[float] = field(default_factory=list)
    """where the arm starts (7, rad); default: FrankaSim's home"""


class Controller:
    """The robot's side of the connection, one client at a time. Attributes of a motion: `motion` and `move_id`."""

    def __init__(self, options: Options):
        self.options = options
        kind = 10 if options.version >= 10 else 5
        self.commands, self.move_status = COMMANDS[kind], MOVE_STATUS[kind]
        self.model = urdf().encode() if kind == 10 else model_library()
        self.sim = FrankaSim(options.scene, dt=0.001)
        self.sim.set_impedance(stiffness=0, damping=0, rotational_stiffness=0, rotational_damping=0)
        self.sim.set_impedance(nullspace_stiffness=0)
        if options.q:
            self.sim.reset_joints(options.q)
        self.state, self.command_dtype = np.zeros((), state_dtype(options.version)), command_dtype(options.version)
        for name in POSES:
            self.state[name] = np.eye(4).ravel()
        self.state["F_T_EE"] = self.state["F_T_NE"] = hand_on_flange().ravel(order="F")
        self.state["m_ee"], self.state["success_rate"] = 0.73, 1.0
        self.mode, self.motion, self.move_id = "idle", None, None
        self.torque_limit, self.force_limit = np.full(7, np.inf), np.full(6, np.inf)
        self.command, self.lost, self.arrived = None, 0, deque([1] * 100, maxlen=100)
        self.ends_at = math.inf
        self.frozen_until, self.push, self.push_until = 0.0, np.zeros(6), 0.0
        self.log: list[str] = []
        self.forget()
        self.questions: queue.Queue = queue.Queue()
        self.tcp, self.udp, self.client, self.buffer = None, None, None, b""

    def forget(self) -> None:
        """Start the records of `do_status` anew."""
        self.ticks = self.received = self.late = 0
        self.max_speed = self.max_force = self.max_torque = 0.0

    # --- what tests ask
    def do_status(self) -> dict:
        """Where it is and what was seen since the start or the last `forget`."""
        records = {name: getattr(self, name) for name in ("ticks", "received", "late", "max_speed", "max_force")}
        records |= {"max_torque": self.max_torque, "mode": self.mode, "motion": self.motion, "log": self.log}
        records |= {"connected": self.client is not None, "success_rate": float(self.state["success_rate"])}
        records |= {"torque_limit": self.torque_limit.tolist(), "force_limit": self.force_limit.tolist()}
        return records | {"q": self.sim.q.tolist(), "dq": self.sim.dq.tolist(), "pose": self.sim.tcp_pose.tolist()}

    def do_forget(self) -> None:
        self.forget()

    def do_reflex(self, error: str = "cartesian_reflex") -> None:
        """A collision, say."""
        self.abort("reflex", error)

    def do_user_stop(self) -> None:
        """Someone presses the button."""
        self.abort("user_stopped")

    def do_safety(self) -> None:
        """Someone steps into a scanner's field, say: a safety function of version 10 ends the motion."""
        self.end("safety")

    def do_release(self) -> None:
        """... and releases it."""
        self.mode = "idle"

    def do_freeze(self, seconds: float) -> None:
        """Say nothing for a while; the connections stay open."""
        self.frozen_until = time.monotonic() + seconds

    def do_push(self, wrench: list[float], seconds: float) -> None:
        """Push the tcp with a force (N) and torque (Nm)."""
        self.push, self.push_until = np.array(wrench), time.monotonic() + seconds

    # --- motions
    def begin(self, command_id: int, body: bytes) -> None:
        controller, motion = struct.unpack_from("<II", body)
        if self.mode != "idle":
            self.answer("Move", command_id, self.move_status["rejected"])
            return
        self.mode, self.motion, self.move_id = "move", "torque" if controller == 2 else MOTIONS[motion], command_id
        self.state["motion"], self.state["controller"] = motion + 1, controller
        self.command, self.lost = None, 0
        self.answer("Move", command_id, self.move_status["started"])

    def end(self, status: str) -> None:
        """The motion is over, and the arm stands still."""
        if self.move_id is not None:
            self.answer("Move", self.move_id, self.move_status[status])
        self.motion, self.move_id, self.command, self.ends_at = None, None, None, math.inf
        self.state["motion"], self.state["controller"] = 0, 3
        self.mode = "idle"

    def abort(self, mode: str, error: str | None = None) -> None:
        if error is not None:
            self.state["errors"][ERRORS[error]] = self.state["reflex_reason"][ERRORS[error]] = 1
        self.send()  # the reason, before the motion's end
        self.end("reflex" if mode == "reflex" else "stopped")
        self.mode = mode

    # --- messages
    def answer(self, name: str, command_id: int, status: int, payload: bytes = b"") -> None:
        number = self.commands.index(name)
        self.tcp.sendall(struct.pack("<IIIB", number, command_id, 13 + len(payload), status) + payload)

    def handle(self, name: str, command_id: int, body: bytes) -> None:
        """One request over TCP."""
        self.log.append(name)
        if name == "Connect":
            version, port = struct.unpack("<HH", body)
            fits = version == self.options.version
            self.answer(name, command_id, 0 if fits else 1, struct.pack("<H", self.options.version))
            self.client = (self.tcp.getpeername()[0], port) if fits else None
        elif name == "Move":
            self.begin(command_id, body)
        elif name == "StopMove":
            self.answer(name, command_id, 0 if self.mode in ("idle", "move") else 1)
            if self.mode == "move":
                self.end("preempted")
        elif name == "AutomaticErrorRecovery":
            possible = self.mode in ("idle", "reflex")
            if possible:
                self.state["errors"], self.state["reflex_reason"], self.mode = 0, 0, "idle"
                self.state["message_id"] += 1
                self.send()  # before the answer: who has recovered finds no error in the newest state
            self.answer(name, command_id, 0 if possible else 1)
        elif name in ("GetRobotModel", "LoadModelLibrary"):
            self.answer(name, command_id, 0, self.model)
        elif self.mode == "move":
            self.answer(name, command_id, 1)  # settings change between motions only
        else:
            if name == "SetCollisionBehavior":
                values = np.frombuffer(body, "<f8")
                self.torque_limit, self.force_limit = values[21:28], values[46:52]
            self.answer(name, command_id, 0)

    def listen(self) -> bool:
        """Handle what has come in; False once the client has gone."""
        with contextlib.suppress(BlockingIOError):
            data = self.tcp.recv(1 << 16, socket.MSG_DONTWAIT)
            if not data:
                return False
            self.buffer += data
        while len(self.buffer) >= 12:
            number, command_id, size = struct.unpack_from("<III", self.buffer)
            if len(self.buffer) < size:
                break
            body, self.buffer = self.buffer[12:size], self.buffer[size:]
            self.handle(self.commands[number], command_id, body)
        came = False
        with contextlib.suppress(BlockingIOError):
            while True:
                data = self.udp.recv(4096)
                if len(data) != self.command_dtype.itemsize:
                    raise ValueError(f"a command of {len(data)} bytes, not {self.command_dtype.itemsize}")
                command, came = np.frombuffer(data, self.command_dtype)[0], True
                self.received += 1
                if self.motion is not None:
                    if command["finished"] or (self.options.version >= 8 and command["torque_finished"]):
                        self.ends_at = min(self.ends_at, time.monotonic() + self.options.end_s)
                    else:
                        self.command = command
        if time.monotonic() >= self.ends_at:
            self.end("ok")
        if self.motion is not None:
            self.arrived.append(came)
            self.lost = 0 if came else self.lost + 1
            self.late += not came
            if 0 < self.options.max_lost <= self.lost:
                self.abort("reflex", "communication_constraints_violation")
        return True

    def send(self) -> None:
        if self.client is not None and time.monotonic() >= self.frozen_until:
            state = self.state
            state["robot_mode"] = ROBOT_MODES.index(self.mode)
            state["success_rate"] = sum(self.arrived) / len(self.arrived)
            self.udp.sendto(state.tobytes(), self.client)

    # --- physics
    def move(self) -> None:
        """1 ms of the arm."""
        sim, data, tau = self.sim, self.sim.data, np.zeros(7)
        if self.motion == "torque":
            if self.command is not None:
                tau = np.clip(self.command["tau"], np.negative(MAX_JOINT_TORQUE), MAX_JOINT_TORQUE)
            data.qfrc_applied[:7] = tau
            data.xfrc_applied[sim.model.body("hand").id] = self.push if time.monotonic() < self.push_until else 0
            sim.step()
        else:
            old, new = data.qpos[:7].copy(), data.qpos[:7].copy()
            if self.command is not None:
                new = self.command["q"] if self.motion == "joint_position" else old + 0.001 * self.command["dq"]
            if np.abs(new - old).max() > MAX_JOINT_STEP:
                self.abort("reflex", "joint_motion_generator_velocity_discontinuity")
                new = old
            data.qpos[:7], data.qvel[:7] = new, (new - old) / 0.001
            sim._refresh()
        self.measure(tau)

    def measure(self, tau: np.ndarray) -> None:
        sim, data, state = self.sim, self.sim.data, self.state
        state["message_id"] += 1
        self.ticks += 1
        pose = np.eye(4)
        pose[:3, :3], pose[:3, 3] = data.site_xmat[sim.tcp].reshape(3, 3), sim.tcp_position
        state["O_T_EE"] = state["O_T_EE_d"] = state["O_T_EE_c"] = pose.ravel(order="F")
        state["q"] = state["q_d"] = state["theta"] = data.qpos[:7]
        state["dq"] = state["dq_d"] = state["dtheta"] = data.qvel[:7]
        state["tau_J"] = state["tau_J_d"] = tau
        state["elbow"] = state["elbow_d"] = state["elbow_c"] = data.qpos[2], -1.0
        self.max_torque = max(self.max_torque, float(np.abs(tau).max()))
        self.max_speed = max(self.max_speed, float(np.linalg.norm(sim.tcp_velocity[:3])))
        external = np.zeros(7)
        if self.motion == "torque":  # what torque, gravity and friction do not explain
            external = data.qfrc_smooth + data.qfrc_constraint + data.qfrc_bias - data.qfrc_passive
            external = (external - data.qfrc_applied - data.qfrc_actuator)[:7]
        if not external.any():
            state["tau_ext_hat_filtered"], state["O_F_ext_hat_K"], state["K_F_ext_hat_K"] = 0, 0, 0
        elif self.ticks % 4 == 0:
            jacobian = np.empty((6, sim.model.nv))
            mujoco.mj_jacSite(sim.model, data, jacobian[:3], jacobian[3:], sim.tcp)
            external = -external  # as libfranka tells it: of the robot on its surroundings
            wrench = np.linalg.lstsq(jacobian[:, :7].T, external, rcond=1e-3)[0]
            in_hand = np.concatenate([pose[:3, :3].T @ wrench[:3], pose[:3, :3].T @ wrench[3:]])
            state["tau_ext_hat_filtered"], state["O_F_ext_hat_K"], state["K_F_ext_hat_K"] = external, wrench, in_hand
            self.max_force = max(self.max_force, float(np.linalg.norm(wrench[:3])))
            if np.any(np.abs(in_hand) > self.force_limit) or np.any(np.abs(external) > self.torque_limit):
                self.abort("reflex", "cartesian_reflex")
            elif np.any(np.abs(data.qvel[:7]) > 1.1 * np.array(MAX_JOINT_VELOCITY)):
                self.abort("reflex", "joint_velocity_violation")

    # --- the process
    def serve(self) -> None:
        """Clients, one after the other, until standard input ends."""
        with socket.create_server((self.options.address, ROBOT_PORT)) as server:
            print(json.dumps({"ready": True}), flush=True)
            while True:
                self.reply_to_tests()
                if select.select([server], [], [], 0.02)[0]:
                    with server.accept()[0] as self.tcp, socket.socket(type=socket.SOCK_DGRAM) as self.udp:
                        self.tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                        self.udp.bind((self.options.address, 0))
                        self.udp.setblocking(False)
                        with contextlib.suppress(ConnectionError):
                            self.session()
                    self.client, self.buffer, self.motion, self.move_id = None, b"", None, None
                    self.mode = "idle" if self.mode == "move" else self.mode
                    self.state["motion"], self.state["controller"] = 0, 3

    def session(self) -> None:
        self.state["motion"], self.state["controller"] = 0, 3
        due = time.perf_counter()
        while True:
            self.reply_to_tests()
            if time.monotonic() >= self.frozen_until:
                if not self.listen():
                    return
                self.move()
                self.send()
            due += 0.001
            rest = due - time.perf_counter()
            if rest > 0:
                time.sleep(rest)
            elif rest < -0.05:  # the machine was busy; do not hurry after it
                due = time.perf_counter()

    def reply_to_tests(self) -> None:
        while not self.questions.empty():
            question = self.questions.get()
            answer = getattr(self, f"do_{question.pop('do')}")(**question)
            print(json.dumps({"answer": answer}), flush=True)

    def read_questions(self) -> None:
        for line in sys.stdin:
            self.questions.put(json.loads(line))
        os._exit(0)  # the test has gone


class Hand:
    """The Franka Hand's own server: it answers a command when the fingers have come to rest."""

    def __init__(self, options: Options):
        self.options, self.width, self.goal, self.speed, self.grasped = options, 0.05, 0.05, 0.1, False
        self.pending: tuple[int, int, tuple[float, float] | None] | None = None

    def serve(self) -> None:
        with socket.create_server((self.options.address, HAND_PORT)) as server:
            while True:
                with server.accept()[0] as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
                    tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    udp.bind((self.options.address, 0))
                    with contextlib.suppress(ConnectionError):
                        self.session(tcp, udp)
                self.pending = None

    def session(self, tcp: socket.socket, udp: socket.socket) -> None:
        client, buffer, message_id = None, b"", 0
        while True:
            if select.select([tcp], [], [], 0.01)[0]:
                data = tcp.recv(4096)
                if not data:
                    return
                buffer += data
            while len(buffer) >= 10:
                command, command_id, size = struct.unpack_from("<HII", buffer)
                if len(buffer) < size:
                    break
                body, buffer = buffer[10:size], buffer[size:]
                if command == 0:  # Connect
                    version, port = struct.unpack("<HH", body)
                    status, client = version != HAND_VERSION, (tcp.getpeername()[0], port)
                    tcp.sendall(struct.pack("<HIIHH", command, command_id, 14, status, HAND_VERSION))
                else:
                    self.start(tcp, command, command_id, body)
            self.move(tcp)
            if client is not None:
                message_id += 1
                udp.sendto(struct.pack("<Idd?H", message_id, self.width, 0.08, self.grasped, 30), client)

    def start(self, tcp: socket.socket, command: int, command_id: int, body: bytes) -> None:
        if self.pending is not None:  # the newer command wins
            tcp.sendall(struct.pack("<HIIH", *self.pending[:2], 12, 1))
        self.grasped, within = False, None
        if command == 1:  # Homing
            self.goal, self.speed = 0.08, 0.1
        elif command == 2:  # Grasp
            goal, inner, outer, self.speed, _ = struct.unpack("<5d", body)
            self.goal, within = 0.0, (goal - inner, goal + outer)
        elif command == 3:  # Move
            self.goal, self.speed = struct.unpack("<2d", body)
        else:  # Stop
            self.goal = self.width
        self.pending = command, command_id, within

    def move(self, tcp: socket.socket) -> None:
        """10 ms of the fingers."""
        low = self.options.object_width if self.width >= self.options.object_width else 0.0
        goal = max(self.goal, low)
        self.width += float(np.clip(goal - self.width, -0.01 * self.speed, 0.01 * self.speed))
        if self.pending is not None and abs(self.width - goal) < 1e-6:
            command, command_id, within = self.pending
            self.grasped = within is not None and within[0] < self.width < within[1] and self.options.object_width > 0
            failed = 2 if within is not None and not within[0] < self.width < within[1] else 0
            failed = failed or (1 if command == 3 and goal > self.goal + 1e-6 else 0)
            tcp.sendall(struct.pack("<HIIH", command, command_id, 12, failed))
            self.pending = None


# --- For tests --------------------------------------------------------------------------------------------------------
class MockFranka:
    """A mock in a process of its own. Keyword arguments: see Options."""

    started = 0

    def __init__(self, **options):
        if options.get("version", 10) < 10 and shutil.which("gcc") is None:
            import pytest

            pytest.skip("the mock of a Panda needs gcc")
        MockFranka.started += 1
        pid = os.getpid()
        self.address = f"127.{1 + (pid >> 8) % 250}.{pid % 256}.{MockFranka.started % 250 + 1}"
        self.options = Options(address=self.address) if not options else Options(**{"address": self.address} | options)

    def __enter__(self):
        command = [sys.executable, __file__, json.dumps(asdict(self.options))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert json.loads(self.process.stdout.readline()) == {"ready": True}
        return self

    def ask(self, what: str, **arguments) -> dict | None:
        """Call a `do_...` method of Controller; its answer."""
        self.process.stdin.write(json.dumps({"do": what, **arguments}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())["answer"]

    def kill(self) -> None:
        """As if its power were cut."""
        self.process.kill()
        self.process.wait()

    def __exit__(self, *_):
        self.kill()
        self.process.stdin.close()
        self.process.stdout.close()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with the test
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))  # where allowed: keep time on a busy machine
    chosen = Options(**json.loads(sys.argv[1]))
    controller = Controller(chosen)
    threading.Thread(target=controller.read_questions, daemon=True).start()
    if chosen.hand:
        threading.Thread(target=Hand(chosen).serve, daemon=True).start()
    controller.serve()
