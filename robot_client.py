"""The robot as a gymnasium environment: client of robot_server.py, cameras, teleoperation; no ROS, no torch.

    python robot_client.py                                      # needs a server; checks everything, shows live values
    python robot_client.py --teleop keyboard --drive            # needs a server; first motion, by hand
    python robot_client.py --snapshots pictures                 # needs a server; one picture of every camera

    env = gym.make("robot_client:FrankaReal-v0", config=TaskConfig(...))   # in a script of your own
    env = Intervention(env, SpaceMouse())                                  # a person may take over at any step

Expect: jitter_p99_ms <= 2 (real-time priority) [benchmarks/results/robot_period.csv contender=ours]

Sources: SERL arXiv:2401.16013 (serl_robot_infra, commit cd5f7e7) and HIL-SERL arXiv:2410.21845 (commit 5d02aed):
observation, action, gains, resets, interventions.
Differs from them: the target moves on from the last reference, not from the measured pose, which sags under load; the
relative frame turns vectors (their adjoint adds a rotation to every translation); an absolute schedule, so that work
between two steps does not add up; time limits truncate; a reflex ends the episode and is counted instead of being
cleared unseen before every command; a camera that stands still ends the episode instead of waiting for Enter.
New task: copy `PEG` or `PICK` into your script; `grep -n TASK: robot_client.py` lists the places to edit.
"""

import atexit
import collections
import contextlib
import ctypes
import importlib.metadata
import math
import os
import platform
import select
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, Self

import gymnasium as gym
import msgpack
import numpy as np
import tyro
import zmq
import zmq.auth
from gymnasium import spaces
from PIL import Image

PROTOCOL_VERSION = 1
SERVER = "tcp://127.0.0.1:5600"


# --- Args -------------------------------------------------------------------------------------------------------------
@dataclass
class Args:
    server: str = SERVER
    """address of robot_server.py"""
    keys: str | None = None
    """folder with the CURVE keys that robot_server.py --keygen made (server.key, client.key_secret)"""
    teleop: Literal["none", "keyboard", "spacemouse"] = "none"
    """device whose readings are shown"""
    drive: bool = False
    """let this device move the arm, 1 cm and 0.05 rad per step at most, within 10 cm of where it stands"""
    seconds: float = 10.0
    """how long live values are shown (0: until Ctrl-C)"""
    snapshots: Path | None = None
    """write one PNG of every camera into this folder"""


def fail(message: str) -> NoReturn:
    """Ends the program with one line on stderr and exit code 1."""
    raise SystemExit(f"{Path(sys.argv[0]).name}: {message}")


# --- Rotations --------------------------------------------------------------------------------------------------------
# Quaternions are x, y, z, w; Euler angles are roll, pitch, yaw about the fixed axes x, y, z: scipy's "xyz". (SERL's own
# euler_2_quat turns the pitch around, serl_robot_infra/franka_env/utils/rotations.py:11.)
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


def quat_inverse(quaternion: np.ndarray) -> np.ndarray:
    return quaternion * np.array([-1.0, -1.0, -1.0, 1.0])


def rotate(quaternion: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """(..., 3) vectors, each turned."""
    return vectors + 2 * np.cross(quaternion[:3], np.cross(quaternion[:3], vectors) + quaternion[3] * vectors)


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


def quat_from_euler(euler: Sequence[float]) -> np.ndarray:
    roll, pitch, yaw = (quat_from_rotvec(angle * axis) for angle, axis in zip(euler, np.eye(3)))
    return quat_multiply(yaw, quat_multiply(pitch, roll))


def pose_from_euler(pose: Sequence[float]) -> np.ndarray:
    """(7,) position and quaternion of x, y, z, roll, pitch, yaw."""
    return np.append(pose[:3], quat_from_euler(pose[3:]))


def euler_from_quat(quaternion: np.ndarray) -> np.ndarray:
    """(3,) roll, pitch, yaw; yaw is 0 where the pitch is +-pi/2 and only the difference of the two others counts."""
    x, y, z = rotate(quaternion, np.eye(3))  # the columns of the rotation matrix
    pitch = np.arcsin(np.clip(-x[2], -1, 1))
    if abs(x[2]) > 1 - 1e-9:
        return np.array([np.arctan2(-z[1], y[1]), pitch, 0.0])
    return np.array([np.arctan2(y[2], z[2]), pitch, np.arctan2(x[1], x[0])])


def shortened(vector: np.ndarray, length: float) -> np.ndarray:
    """`vector`, at most this long."""
    return vector * min(length / max(float(np.linalg.norm(vector)), 1e-9), 1.0)


def relative_pose(pose: np.ndarray, origin: np.ndarray) -> np.ndarray:
    """(7,) `pose` seen from the frame `origin`, with w >= 0."""
    quaternion = quat_multiply(quat_inverse(origin[3:]), pose[3:])
    position = rotate(quat_inverse(origin[3:]), pose[:3] - origin[:3])
    return np.append(position, quaternion if quaternion[3] >= 0 else -quaternion)


class Rate:
    """Beats at a fixed rate by an absolute schedule, so that neither work nor late wake-ups add up."""

    def __init__(self, hz: float) -> None:
        self.period, self.overruns, self.deadline = 1 / hz, 0, time.monotonic()

    def sleep(self) -> float:
        """Wait for the next beat. Returns how late it is (s): 0 when there was time left. A beat later than half a
        period starts a new schedule, so that no burst of short periods follows."""
        self.deadline += self.period
        late = time.monotonic() - self.deadline
        if late <= 0:
            time.sleep(-late)
            return 0.0
        self.overruns += 1
        self.deadline += late if late > self.period / 2 else 0.0
        return late


# --- Client -----------------------------------------------------------------------------------------------------------
class RobotError(RuntimeError):
    """Something is wrong with robot, server, camera or teleoperation; the message names the remedy.
    `code` and `reply` are the server's, where it is the one that says so."""

    def __init__(self, message: str, code: str = "", reply: dict | None = None):
        super().__init__(f"{code}: {message}" if code else message)
        self.code, self.reply = code, reply or {}


class UnreachableError(RobotError):
    """No answer within the deadline: dead, stopped, another address, or the cable."""


class RefusedError(RobotError):
    """The server is alive and said no. `code` is one of the protocol's, or "failed" for a job that went wrong."""


class RobotClient:
    """One call per operation of robot_server.py (its header describes them), each with a deadline.

    A request without an answer is sent again, `tries` times in all ("Lazy Pirate"; REQ_CORRELATE drops answers that
    come late). That is safe for every operation: reading has no effect, a target carries a sequence number, and what
    takes long carries a handle by which the server knows it again. Belongs to the thread that made it.
    Raises UnreachableError when nobody answers, RefusedError when the server says no.
    """

    def __init__(
        self, server: str = SERVER, keys: str | None = None, name: str = "", timeout_s: float = 0.5, tries: int = 3
    ):
        self.server, self.timeout_s, self.tries = server, timeout_s, tries
        self.name = (name or f"{Path(sys.argv[0]).stem}-{os.getpid()}")[-32:]
        self.token: str | None = None
        self.seq = self.attempts = self._requests = 0
        self.socket = zmq.Context.instance().socket(zmq.REQ)
        options = {"REQ_RELAXED": 1, "REQ_CORRELATE": 1, "LINGER": 0, "IMMEDIATE": 1, "MAXMSGSIZE": 1 << 26}
        options |= {"RECONNECT_IVL": 50, "RECONNECT_IVL_MAX": 400, "HEARTBEAT_IVL": 500, "HEARTBEAT_TIMEOUT": 1500}
        for option, value in options.items():
            self.socket.setsockopt(getattr(zmq, option), value)
        try:
            if keys:
                public, secret = zmq.auth.load_certificate(Path(keys) / "client.key_secret")
                self.socket.curve_publickey, self.socket.curve_secretkey = public, secret
                self.socket.curve_serverkey = zmq.auth.load_certificate(Path(keys) / "server.key")[0]
            self.socket.connect(server)
        except (OSError, ValueError, zmq.ZMQError) as error:
            self.socket.close()
            raise RobotError(f"--server {server} --keys {keys}: {error}") from error

    def call(self, op: str, timeout_s: float | None = None, tries: int | None = None, **args: Any) -> dict:
        """Ask for `op` and return the reply's map, "ok", "result", "mode" and so on, with raw frames under "frames"."""
        self._requests += 1
        request = {"v": PROTOCOL_VERSION, "op": op, "id": self._requests, "args": args}
        message = msgpack.packb(request | ({"token": self.token} if self.token else {}), default=lambda x: x.tolist())
        timeout_s, tries = timeout_s or self.timeout_s, tries or self.tries
        for self.attempts in range(1, tries + 1):
            deadline = time.monotonic() + timeout_s
            with contextlib.suppress(zmq.Again):  # not connected, and nothing is kept for later
                self._wait(zmq.POLLOUT, deadline)
                self.socket.send(message, zmq.NOBLOCK)
            if self._wait(zmq.POLLIN, deadline):
                break
        else:
            raise UnreachableError(
                f"no answer from {self.server} to {op!r}, {tries} tries of {timeout_s} s: is robot_server.py running "
                "there, is the cable in, are address, port and --keys right?"
            )
        head, *frames = self.socket.recv_multipart()
        try:
            reply = msgpack.unpackb(head)
            if reply["id"] != self._requests:
                raise ValueError(f"answers request {reply['id']}, not {self._requests}")
            if not reply["ok"]:
                raise RefusedError(reply["error"]["message"], reply["error"]["code"], reply)
        except (ValueError, KeyError, TypeError, msgpack.UnpackException) as error:
            raise RobotError(f"{self.server} does not speak the protocol of robot_server.py: {error}") from error
        return reply | {"frames": frames}

    def _wait(self, event: int, deadline: float) -> bool:
        return bool(self.socket.poll(max(round(1000 * (deadline - time.monotonic())), 0), event))

    def hello(self, wait_s: float = 0.0) -> dict:
        """Robot, gripper, cameras, limits, watchdog, versions. Waits up to `wait_s` for a server to be there."""
        return self.call("hello", tries=max(self.tries, round(wait_s / self.timeout_s)))["result"]

    def state(self) -> dict:
        """The measured state (arrays in the base frame; m, rad, N) with "mode", "reference", "fault" and times."""
        reply = self.call("state")
        keys = ("mode", "fault", "lease", "robot_time", "server_time", "server_id", "state_age", "reference")
        state = reply["result"] | {key: reply[key] for key in keys}
        arrays = ("tcp_pose", "tcp_vel", "tcp_force", "tcp_torque", "q", "dq", "reference")
        return state | {key: np.array(state[key]) for key in arrays}

    def acquire(self, ttl_s: float = 1.0, takeover: bool = False) -> None:
        """Become the one commander, or stay it. Any later call renews; `ttl_s` without one ends it, the arm holds."""
        self.token = self.token or uuid.uuid4().hex
        try:
            self.call("acquire", name=self.name, token=self.token, ttl=ttl_s, takeover=takeover)
        except RefusedError:
            self.token = None
            raise

    def release(self) -> None:
        if self.token:
            with contextlib.suppress(RefusedError):  # it has ended already
                self.call("release")
            self.token = None

    def target(self, pose: np.ndarray) -> dict:
        """Stream one target pose (7,), m and quaternion. Returns the reply; its "reference" is what is in force."""
        self.seq += 1
        try:
            return self.call("target", pose=pose, seq=self.seq)
        except RefusedError as refusal:
            if refusal.code == "stale" and self.attempts > 1:  # the first try had arrived, its answer was lost
                return refusal.reply
            raise

    def start(self, **gains: float | Sequence[float]) -> None:
        """Start streaming at the measured pose, with these fields of `Impedance`."""
        self.job("start", **gains)

    def set_gains(self, **gains: float | Sequence[float]) -> dict:
        return self.call("gains", **gains)["result"]

    def hold(self) -> None:
        """Freeze the arm where it is, whoever commands it."""
        self.call("hold")

    def stop(self, timeout_s: float = 2.0) -> None:
        """Stop the controller softly, whoever commands it, and wait until it is idle (or a fault is latched)."""
        deadline = time.monotonic() + timeout_s
        self.call("stop")
        while (mode := self.call("state")["mode"]) not in ("idle", "fault"):
            if time.monotonic() > deadline:
                raise RobotError(f"stop: the robot is still in mode {mode!r} after {timeout_s} s")
            time.sleep(0.02)

    def move_joints(self, q: Sequence[float], speed: float = 0.2) -> None:
        """Move to joint positions (7,), rad; `speed` is a fraction of the largest."""
        self.job("move_joints", q=list(q), speed=speed)

    def reset(self) -> None:
        """Move to the server's own reset joint positions."""
        self.job("reset")

    def recover(self) -> None:
        """Clear a latched fault or reflex; look at the robot first."""
        self.job("recover")

    def gripper(self, action: Literal["open", "close", "move", "activate", "stop"], wait=True, **options: float) -> str:
        """Options: `width` in m for "move"; `speed`, `force` as fractions of the largest. Returns the job's handle."""
        return self.job("gripper", wait=wait, action=action, **options)

    def reset_task(self, seed: int | None = None) -> None:
        """Simulated robot: arrange the scene anew."""
        self.job("reset_task", seed=seed)

    def task(self) -> dict:
        """Simulated robot: "success", "observation" and "expert" of the task."""
        return self.call("task")["result"]

    def frames(self, cameras: Sequence[str]) -> list[dict]:
        """Simulated robot: per camera "image" (h, w, 3) uint8 RGB, "seq", "robot_time", "age" (s)."""
        reply = self.call("frames", cameras=list(cameras), timeout_s=max(self.timeout_s, 2.0))
        arrays = reply["result"]["arrays"]
        if [math.prod(array["shape"]) for array in arrays] != [len(frame) for frame in reply["frames"]]:
            raise RobotError(f"{self.server}: frames do not have the sizes that they announce")
        images = [np.frombuffer(f, np.uint8).reshape(a["shape"]) for f, a in zip(reply["frames"], arrays)]
        return [array | {"image": image} for array, image in zip(arrays, images)]

    def job(self, op: str, timeout_s: float = 60.0, wait: bool = True, **args: Any) -> str:
        """Start what takes long, under a handle of our own, and wait for its end. Returns the handle."""
        handle = uuid.uuid4().hex
        self.call(op, handle=handle, **args)
        deadline = time.monotonic() + timeout_s
        while wait and self.job_running(handle):
            if time.monotonic() > deadline:
                self.hold()
                raise RefusedError(f"{op} took longer than {timeout_s} s; the arm holds", "failed")
            time.sleep(0.02)
        return handle

    def job_running(self, handle: str) -> bool:
        """Whether a job goes on. Raises RefusedError if it failed."""
        job = self.call("job", handle=handle)["result"]
        if job["status"] == "failed":
            raise RefusedError(f"{job['op']}: {job['error']}", "failed")
        return job["status"] != "done"

    def close(self) -> None:
        with contextlib.suppress(RobotError):
            self.release()
        self.socket.close()


# --- Cameras ----------------------------------------------------------------------------------------------------------
class CameraError(RobotError):
    """A camera that is missing, stands still or fails; the message names it."""


@dataclass(frozen=True)
class CameraConfig:
    name: str  # of the image in the observation
    kind: Literal["sim", "realsense", "test"] = "sim"  # sim: the simulated server's camera of this name
    serial: str = ""  # RealSense: serial number, `python robot_client.py` lists them
    width: int = 640
    height: int = 480
    fps: int = 30
    exposure: float | None = 10_000.0  # us, fixed so that the policy always sees the same brightness (None: automatic)
    gain: float | None = None  # None: as it is
    white_balance: float | None = None  # K (None: automatic)
    crop: tuple[float, float, float, float] | None = None  # left, upper, right, lower edge from 0 to 1 (None: square)
    warmup_frames: int = 30  # dropped after every start
    timeout_s: float = 0.5  # without a new frame for this long, the camera is started anew


class Frame(NamedTuple):
    image: np.ndarray  # (size, size, 3) uint8 RGB
    time: float  # monotonic s when it arrived
    number: int  # counted by the camera


class Camera:
    """The newest frame of one camera, kept by a thread of its own, so that a slow or dead one never blocks the loop.

    A camera that fails or stands still is started anew, from the second time on after a reset of its hardware.
    """

    def __init__(self, config: CameraConfig, size: int = 128):
        self.config, self.size, self.error, self.restarts = config, size, "not started", 0
        self.frame: Frame | None = None
        self._stop, self._arrived = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"camera-{config.name}", daemon=True)

    def open(self) -> None:
        """Start the device; raises CameraError or RuntimeError."""
        raise NotImplementedError

    def grab(self) -> tuple[np.ndarray, int, float]:
        """Wait for a frame: (H, W, 3) uint8 RGB, its number, its age in s. Raises CameraError after `timeout_s`."""
        raise NotImplementedError

    def shut(self) -> None:
        """Stop the device."""

    def reset_hardware(self) -> None:
        """What helps when starting anew did not."""
        self.shut()

    def start(self, timeout_s: float = 10.0) -> Self:
        """Start the thread, or see that it still delivers. Raises CameraError without a fresh frame in `timeout_s`."""
        if not self._thread.is_alive():
            self._thread.start()
        self._arrived.clear()
        if not self._arrived.wait(timeout_s):
            raise CameraError(f"camera {self.config.name}: no picture within {timeout_s} s: {self.error}")
        return self

    def read(self, max_age_s: float) -> Frame:
        """The newest frame. Raises CameraError if it is older than `max_age_s`."""
        age = time.monotonic() - self.frame.time if self.frame else math.inf
        if age > max_age_s:
            error = self.error or "it stands still"
            raise CameraError(f"camera {self.config.name}: newest picture is {age:.2f} s old: {error}")
        return self.frame

    def close(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2.0)

    def _run(self) -> None:
        failures = 0
        while not self._stop.is_set():
            try:
                self.open()
                started = time.monotonic()
                while not self._stop.is_set():
                    image, number, age = self.grab()
                    now = time.monotonic()
                    if self.frame is None or number != self.frame.number:
                        self.frame, self.error, failures = Frame(self._fit(image), now - age, number), "", 0
                        self._arrived.set()
                    elif now - max(self.frame.time, started) > self.config.timeout_s:
                        raise CameraError(f"it delivers picture {number} over and over")
            except (RuntimeError, OSError, ValueError, zmq.ZMQError) as error:  # pyrealsense2 raises RuntimeError
                self.error, failures, self.restarts = str(error) or repr(error), failures + 1, self.restarts + 1
            with contextlib.suppress(RuntimeError, OSError):
                self.reset_hardware() if failures >= 2 else self.shut()
            self._stop.wait(min(0.1 * failures, 1.0))

    def _fit(self, image: np.ndarray) -> np.ndarray:
        """(size, size, 3): cropped and averaged over the pixels that fall together."""
        height, width, _ = image.shape
        if self.config.crop:
            box = tuple(np.array(self.config.crop) * (width, height, width, height))
        else:
            side = min(height, width)
            box = ((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2)
        size = (self.size, self.size)
        if image.shape[:2] == size and box == (0, 0, *size):
            return image.copy()
        return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX, box=box))


def import_realsense() -> Any:
    """The module pyrealsense2. Its wheel lacks libusb, which PyPI's libusb-package has: load that one first."""
    try:
        with contextlib.suppress(ImportError):
            import libusb_package

            ctypes.CDLL(str(libusb_package.get_library_path()), ctypes.RTLD_GLOBAL)
        import pyrealsense2
    except (ImportError, OSError) as error:
        raise CameraError(f"RealSense: {error}; run: pip install pyrealsense2 libusb-package") from error
    return pyrealsense2


def realsense_devices(rs: Any) -> dict[str, Any]:
    """Serial number -> device, of all that are plugged in."""
    return {device.get_info(rs.camera_info.serial_number): device for device in rs.context().query_devices()}


class RealSense(Camera):
    """Colour pictures of an Intel RealSense, with fixed exposure."""

    def open(self) -> None:
        self.rs, config = import_realsense(), self.config
        devices = realsense_devices(self.rs)  # pipeline.start waits 15 s for one that is not there
        if config.serial not in devices:
            raise CameraError(
                f"no RealSense has serial number {config.serial!r}; there are {sorted(devices) or 'none'}"
            )
        settings = self.rs.config()
        settings.enable_device(config.serial)
        settings.enable_stream(self.rs.stream.color, config.width, config.height, self.rs.format.rgb8, config.fps)
        self.pipeline = self.rs.pipeline()
        device = self.pipeline.start(settings).get_device()
        self.set_options(device)
        for _ in range(config.warmup_frames):
            self.pipeline.try_wait_for_frames(round(1000 * config.timeout_s))

    def set_options(self, device: Any) -> None:
        """Exposure, gain and white balance on the sensor that gives the colour (D405: the stereo module)."""
        option, config = self.rs.option, self.config
        for sensor in device.query_sensors():
            if self.rs.stream.color in [profile.stream_type() for profile in sensor.get_stream_profiles()]:
                break
        for name, value in (  # what is automatic is switched off before its value is set
            (option.enable_auto_exposure, float(config.exposure is None)),
            (option.exposure, config.exposure),
            (option.gain, config.gain),
            (option.enable_auto_white_balance, float(config.white_balance is None)),
            (option.white_balance, config.white_balance),
        ):
            if value is not None and sensor.supports(name):
                limits = sensor.get_option_range(name)
                if not limits.min <= value <= limits.max:
                    raise CameraError(f"{name} {value}: this camera takes {limits.min} to {limits.max}")
                sensor.set_option(name, value)

    def grab(self) -> tuple[np.ndarray, int, float]:
        arrived, frames = self.pipeline.try_wait_for_frames(round(1000 * self.config.timeout_s))
        if not arrived:
            raise CameraError(f"no picture for {self.config.timeout_s} s; cable, USB port, or another program?")
        frame = frames.get_color_frame()
        return np.array(frame.get_data()), frame.get_frame_number(), 0.0  # a copy: held frames starve the camera's pool

    def shut(self) -> None:
        if pipeline := getattr(self, "pipeline", None):
            self.pipeline = None
            pipeline.stop()

    def reset_hardware(self) -> None:
        self.pipeline = None  # stop() and then a reset can deadlock, librealsense issue 7252
        if device := realsense_devices(self.rs).get(self.config.serial):
            device.hardware_reset()
            self._stop.wait(5.0)


class SimCamera(Camera):
    """Pictures that the simulated server renders, over a connection of its own."""

    def __init__(self, config: CameraConfig, size: int = 128, server: str = SERVER, keys: str | None = None):
        super().__init__(config, size)
        self.server, self.keys = server, keys

    def open(self) -> None:
        self.client, self.rate = RobotClient(self.server, self.keys), Rate(self.config.fps)

    def grab(self) -> tuple[np.ndarray, int, float]:
        self.rate.sleep()
        (frame,) = self.client.frames([self.config.name])
        return frame["image"], frame["seq"], frame["age"]

    def shut(self) -> None:
        if client := getattr(self, "client", None):
            client.close()


class TestCamera(Camera):
    """A moving pattern; `mode` makes it freeze (the same picture again and again), drop all, or raise."""

    __test__ = False  # for pytest
    mode: Literal["run", "freeze", "drop", "raise"] = "run"
    number = 0

    def open(self) -> None:
        self.rate = Rate(self.config.fps)

    def grab(self) -> tuple[np.ndarray, int, float]:
        self.rate.sleep()
        if self.mode == "raise":
            raise RuntimeError("the test camera raises")
        if self.mode == "drop":
            self._stop.wait(self.config.timeout_s)
            raise CameraError(f"no picture for {self.config.timeout_s} s")
        self.number += self.mode == "run"
        image = np.zeros((self.config.height, self.config.width, 3), np.uint8)
        image[:, : self.config.width // 2] = self.number % 256
        return image, self.number, 0.0


# --- Teleoperation ----------------------------------------------------------------------------------------------------
class Teleop:
    """A person's hand: `motion` of the device, made into the environment's actions by `read`."""

    fault = ""  # what is wrong with the device; it does not move anything meanwhile
    rng = np.random.default_rng(0)

    def motion(self) -> tuple[np.ndarray, float]:
        """(6,) in [-1, 1]: forward, left, up, and rotations about these axes; and the gripper: +1 close, -1 open, 0."""
        raise NotImplementedError

    def read(self, env: gym.Env) -> np.ndarray | None:
        """The action to execute instead of the policy's, or None while the person lets go: HIL-SERL takes over just as
        long as the input is not zero (serl_robot_infra/franka_env/envs/wrappers.py:230)."""
        motion, gripper = self.motion()
        if not gripper and np.linalg.norm(motion) <= 0.001:
            return None
        size = env.action_space.shape[0]
        turn = getattr(env.unwrapped, "base_to_action", None)  # into the relative frame, where there is one
        action = (turn(motion) if turn else motion)[: 6 if size >= 6 else 3]
        if size in (4, 7):  # as HIL-SERL: near 1, not at it, where a tanh policy would need an infinite mean
            action = np.append(action, gripper * self.rng.uniform(0.9, 1.0))
        return np.clip(action, -1, 1).astype(np.float32)

    def close(self) -> None:
        """Let go of the device."""


class SpaceMouse(Teleop):
    """3Dconnexion SpaceMouse: the cap moves the arm; the left button closes, the right one opens the gripper."""

    def __init__(self, gain: float = 1.0):
        """Raises RobotError if there is none."""
        self.gain, self._stop, self._state = gain, threading.Event(), (np.zeros(6), 0.0)
        self._device = self._open()
        self._thread = threading.Thread(target=self._run, name="spacemouse", daemon=True)
        self._thread.start()

    def _open(self) -> Any:
        try:
            import pyspacemouse

            return pyspacemouse.open(axis_convention="ros")  # x forward, y left, z up
        except (ImportError, RuntimeError, OSError) as error:
            raise RobotError(
                f"SpaceMouse: {error} Run: pip install pyspacemouse, apt-get install libhidapi-hidraw0, and allow its "
                'use: KERNEL=="hidraw*", ATTRS{idVendor}=="256f", MODE="0666" in /etc/udev/rules.d/99-spacemouse.rules'
            ) from error

    def _run(self) -> None:
        from pyspacemouse.device import HIDException  # unplugged

        while not self._stop.wait(0.005):
            try:
                if self._device is None:
                    self._device, self.fault = self._open(), ""
                state, before = self._device.read(), None
                while state.t != before:  # one report per read: without draining them the arm lags behind the hand
                    before, state = state.t, self._device.read()
            except (HIDException, RobotError) as error:
                self._device, self.fault, self._state = None, f"SpaceMouse: {error}", (np.zeros(6), 0.0)
                self._stop.wait(1.0)
                continue
            motion = np.array([state.x, state.y, state.z, state.roll, state.pitch, state.yaw])
            left, right = [*state.buttons, 0, 0][:2]
            self._state = (np.clip(self.gain * motion, -1, 1), float(left) - float(right))

    def motion(self) -> tuple[np.ndarray, float]:
        return self._state

    def close(self) -> None:
        self._stop.set()
        self._thread.join(timeout=2.0)


class Keyboard(Teleop):
    """Keys typed into the terminal, which needs no display. A key counts for `hold_s`, and longer while it repeats:
    w s forward, back; a d left, right; r f up, down; j l roll; i k pitch; u o yaw; c close, v open the gripper.
    Other keys are kept in `keys` for the script."""

    AXES = {key: (i // 2, 1 - 2 * (i % 2)) for i, key in enumerate("wsadrfjlikuocv")}  # the seventh is the gripper

    def __init__(self, speed: float = 0.5, hold_s: float = 0.15, fd: int | None = None):
        """`speed`: size of the motion. Raises RobotError where standard input is no terminal."""
        import termios
        import tty

        self.fd = sys.stdin.fileno() if fd is None else fd
        if not os.isatty(self.fd):
            raise RobotError("keyboard: standard input is no terminal; start the script in one, without a pipe")
        self.speed, self.hold_s, self.keys, self._pressed, self._read = speed, hold_s, collections.deque(), {}, 0.0
        settings = termios.tcgetattr(self.fd)
        self._restore = lambda: termios.tcsetattr(self.fd, termios.TCSADRAIN, settings)
        tty.setcbreak(self.fd)
        atexit.register(self._restore)

    def motion(self) -> tuple[np.ndarray, float]:
        values, now, last = np.zeros(7), time.monotonic(), self._read
        self._read = now
        try:
            while select.select([self.fd], [], [], 0)[0] and (typed := os.read(self.fd, 1).decode(errors="ignore")):
                if typed not in self.AXES:
                    self.keys.append(typed)
                elif now - last < 1.0:  # what was typed during a pause, such as a reset, moves nothing after it
                    self._pressed[typed] = now
        except OSError as error:
            self.fault = f"keyboard: {error}"
        for key in [key for key, pressed in self._pressed.items() if now - pressed < self.hold_s]:
            axis, sign = self.AXES[key]
            values[axis] += sign
        return self.speed * values[:6], float(values[6])

    def close(self) -> None:
        atexit.unregister(self._restore)
        self._restore()


class ScriptedExpert(Teleop):
    """Stands in for a person in tests and rehearsals: now and then it takes over for a while, with the actions of the
    task's scripted expert (`expert_action` of the unwrapped environment). `probability`: per step, to take over."""

    def __init__(self, probability: float = 1.0, steps: int = 20, seed: int = 0):
        self.probability, self.steps, self.left, self.rng = probability, steps, 0, np.random.default_rng(seed)

    def motion(self) -> tuple[np.ndarray, float]:
        return np.zeros(6), 0.0

    def read(self, env: gym.Env) -> np.ndarray | None:
        self.left -= self.left > 0
        if not self.left and self.rng.random() < self.probability:
            self.left = self.steps
        return env.unwrapped.expert_action() if self.left else None


class Intervention(gym.Wrapper):
    """A person may take over. What is executed, and so what a replay buffer must store, is `info["executed_action"]`;
    `info["intervene_action"]` is there only when it is the person's, as in HIL-SERL."""

    def __init__(self, env: gym.Env, teleop: Teleop):
        super().__init__(env)
        self.teleop = teleop

    def step(self, action: np.ndarray) -> tuple:
        human = self.teleop.read(self.env)
        low, high = self.action_space.low, self.action_space.high
        executed = np.clip(action if human is None else human, low, high).astype(self.action_space.dtype)
        *step, info = self.env.step(executed)
        info |= {"executed_action": executed, "intervened": human is not None, "teleop_fault": self.teleop.fault}
        return *step, info | ({} if human is None else {"intervene_action": executed})

    def close(self) -> None:
        self.teleop.close()
        super().close()


# --- Environment ------------------------------------------------------------------------------------------------------
@dataclass
class Impedance:
    """Gains of the Cartesian impedance controller; the defaults are SERL's on the real arm."""

    stiffness: float = 2000.0
    """N/m"""
    damping: float = 89.0
    """Ns/m"""
    rotational_stiffness: float = 150.0
    """Nm/rad"""
    rotational_damping: float = 7.0
    """Nms/rad"""
    clip: Sequence[float] = (0.01, 0.01, 0.01)
    """largest position error that counts, per base axis, m: force <= stiffness x clip, speed <= that / damping"""
    rotational_clip: Sequence[float] = (0.05, 0.05, 0.05)
    """the same for the rotation error, per target axis, rad"""
    nullspace_stiffness: float = 10.0
    """Nm/rad of joint 3 towards its place at home, which holds the elbow; its damping is 2 sqrt(stiffness)"""


@dataclass
class TaskConfig:
    """One task on the real or the simulated robot; the defaults are SERL's peg insertion (peg_env/config.py)."""

    server: str = SERVER
    keys: str | None = None  # folder with CURVE keys
    hz: float = 10.0  # steps per second; below 4 the server's watchdog would hold the arm between two steps
    max_episode_steps: int = 100  # then the episode is truncated
    reset_pose: tuple[float, ...] = (0.5, 0.0, 0.14, np.pi, 0.0, 0.0)  # start: x, y, z (m), roll, pitch, yaw (rad)
    random_reset: tuple[float, float, float] = (0.05, 0.05, np.pi / 6)  # shifted by up to this: x, y (m), yaw (rad)
    # safety box of the target: x, y, z (m); roll, pitch, yaw (rad) about the base's axes, from reset_pose's
    workspace: tuple[tuple[float, float], ...] = (
        (0.4, 0.6), (-0.1, 0.1), (0.05, 0.2), (-0.1, 0.1), (-0.1, 0.1), (-0.8, 0.8)
    )  # fmt: skip
    # what an action of 1 adds to the target: m, and rad (three entries: a task without rotation)
    action_scale: tuple[float, ...] = (0.02, 0.02, 0.02, 0.1, 0.1, 0.1)
    relative_frame: bool = True  # actions and observations in the tcp's frame, its pose from where the episode began
    proprio: tuple[str, ...] = ("gripper", "tcp_force", "tcp_pose", "tcp_torque", "tcp_vel")  # what `state` holds
    # fixed: no gripper action; binary: beyond +-0.5 it closes (+) or opens (-); continuous: the closure moves on by it
    gripper: Literal["fixed", "binary", "continuous"] = "binary"
    gripper_at_reset: Literal["open", "close", "keep"] = "keep"
    gripper_penalty: float = 0.0  # minus this is info["grasp_penalty"] when the gripper moves (HIL-SERL: 0.02)
    gripper_wait_s: float = 0.6  # binary: a step that moves it waits until it stands, at most this long (SERL: 0.6)
    compliance: Impedance = field(
        default_factory=lambda: Impedance(clip=(0.003, 0.003, 0.01), rotational_clip=(0.02, 0.02, 0.02))
    )  # gains during the episode
    # gains on the way to the reset pose; SERL's, but damped, so that the arm cannot go faster than 0.25 m/s and 1 rad/s
    precision: Impedance = field(default_factory=lambda: Impedance(3000.0, 120.0, 300.0, 15.0))
    reset_speed: float = 0.1  # m/s on this way
    reset_joints_every: int = 200  # episodes between two moves to reset_joints, which bring the elbow back (0: never)
    reset_joints: tuple[float, ...] = (0.0, -0.26, 0.0, -2.43, 0.0, 2.17, np.pi / 4)  # rad
    recover_at_reset: bool = True  # else reset() raises after a fault, and a person calls `client.recover()`
    cameras: tuple[CameraConfig, ...] = (CameraConfig("front"), CameraConfig("wrist"))
    image_size: int = 128  # pixels
    max_image_age_s: float = 0.3  # an older picture ends the episode
    # 1 at success: tcp within `tolerance` (m along each axis, rad) of `goal_pose` (x, y, z, roll, pitch, yaw); or
    # what the simulated robot's task says; or nothing
    reward: Literal["pose", "task", "none"] = "pose"
    goal_pose: tuple[float, ...] = (0.5, 0.0, 0.06, np.pi, 0.0, 0.0)
    tolerance: tuple[float, float] = (0.01, 0.2)
    wait_s: float = 60.0  # how long reset() waits for a server or a camera that is away


PROPRIO = {"gripper": 1, "tcp_force": 3, "tcp_pos": 3, "tcp_pose": 7, "tcp_torque": 3, "tcp_vel": 6}  # tcp_vel: or 3
# TASK: two examples to copy; observation and action spaces are those of franka_sim's tasks with pixels.
PEG = TaskConfig()
PICK = TaskConfig(
    reset_pose=(0.45, 0.0, 0.3, np.pi, 0.0, 0.0),
    random_reset=(0.0, 0.0, 0.0),
    workspace=((0.2, 0.6), (-0.3, 0.3), (0.012, 0.5)),
    action_scale=(0.02, 0.02, 0.02),
    relative_frame=False,
    proprio=("gripper", "tcp_pos", "tcp_vel"),
    gripper_at_reset="open",
    compliance=Impedance(),
    reward="task",
)


class FrankaEnv(gym.Env):
    """The robot behind robot_server.py as SERL's FrankaEnv; nothing is contacted before the first `reset`.

    Observation: `state`, the values that `proprio` names, and one (size, size, 3) uint8 image per camera. In the base
    frame, or, with `relative_frame`, in the tcp's: gripper 0 (open) to 1 (closed); force and torque of the surroundings
    on the tcp, N and Nm; tcp_pose m and quaternion x, y, z, w; tcp_vel m/s and rad/s.
    Action in [-1, 1]: translation, rotation (as a rotation vector), gripper (+ closes, as in franka_sim).
    `info`: "success"; "fault", why the episode ended early, if it did; "reflexes", how many since the environment was
    made; "overruns" of the episode and "late_s" of this step; "limited" by the server; "grasp_penalty".
    A reflex terminates; a lost server, lease or camera, any other fault, and the time limit truncate. `reset` then
    waits for what is missing, and raises RobotError with the remedy when it does not come back.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(
        self,
        config: TaskConfig | None = None,
        success: Callable[[dict], bool] | None = None,
        render_mode: str | None = None,
    ) -> None:
        """`success`: of an observation, instead of `config.reward`, for example a classifier. Raises ValueError for
        settings that contradict each other."""
        self.config = config = config or TaskConfig()
        self.success, self.render_mode, self.metadata = success, render_mode, self.metadata | {"render_fps": config.hz}
        if len(config.action_scale) not in (3, 6) or len(config.workspace) != len(config.action_scale):
            raise ValueError("TaskConfig: action_scale and workspace have 3 entries each, or 6 with rotation")
        if config.hz < 4 or not set(config.proprio) <= set(PROPRIO):
            raise ValueError(f"TaskConfig: hz is at least 4, and proprio names some of {sorted(PROPRIO)}")
        self.axes = len(config.action_scale)
        sizes = PROPRIO | {"tcp_vel": self.axes}
        state = spaces.Box(-np.inf, np.inf, (sum(sizes[name] for name in config.proprio),), np.float32)
        image = spaces.Box(0, 255, (config.image_size, config.image_size, 3), np.uint8)
        self.observation_space = spaces.Dict({"state": state} | {camera.name: image for camera in config.cameras})
        self.action_space = spaces.Box(-1, 1, (self.axes + (config.gripper != "fixed"),), np.float32)
        self.reset_pose, self.goal_pose = pose_from_euler(config.reset_pose), pose_from_euler(config.goal_pose)
        self.low, self.high = np.array(config.workspace).T
        self.client: RobotClient | None = None
        self.cameras: list[Camera] = []
        self.episodes = self.reflexes = self.elapsed_steps = 0
        self.origin, self.closure, self.task_success, self.stopped = self.reset_pose, 0.0, False, ""

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        super().reset(seed=seed)
        if self.stopped:
            stopped, self.stopped = self.stopped, ""
            raise RobotError(f"{stopped}: a person stopped the robot; call reset() again when it may move")
        for attempt in range(3):
            self.connect()
            try:
                self.prepare()
                break
            except (RefusedError, UnreachableError):  # a reflex on the way, a server that was just started again
                if attempt == 2 or not self.config.recover_at_reset:
                    raise
        self.state = self.client.state()
        self.origin, self.target, self.elapsed_steps = self.state["tcp_pose"], self.state["reference"], 0
        self.closure = self.measured_closure()
        if self.config.gripper == "binary":
            self.closure = round(self.closure)
        self.episodes += 1
        self.rate = Rate(self.config.hz)
        return self.observe()[0], {"success": False, "fault": None, "reflexes": self.reflexes}

    def connect(self) -> None:
        """Find the server and the cameras, check that the task fits, become the robot's commander."""
        config = self.config
        if self.client is None:
            self.client = RobotClient(config.server, config.keys)
        self.hello = hello = self.client.hello(config.wait_s)
        limits, scale = hello["limits"], config.action_scale[:3]
        low, high = limits["workspace_low"], limits["workspace_high"]
        for wrong, what in (
            (np.linalg.norm(scale) > limits["max_jump"] / 2, f"action_scale {scale} is too large for --max-jump"),
            (np.any(self.low[:3] < low) or np.any(self.high[:3] > high), f"the workspace reaches beyond {low}, {high}"),
            (config.reward == "task" and not hello["robot"]["task"], "reward='task' needs a simulated robot"),
            (config.gripper != "fixed" and hello["gripper"]["kind"] == "none", "without a gripper it must be 'fixed'"),
        ):
            if wrong:
                raise RobotError(f"TaskConfig does not fit {config.server}: {what}")
        self.cameras = self.cameras or [make_camera(camera, config) for camera in config.cameras]
        for camera in self.cameras:
            camera.start(config.wait_s)
        self.client.acquire()

    def prepare(self) -> None:
        """Bring gripper, arm and (simulated) scene to where an episode starts. TASK: regrasp, lift, clear the way."""
        config, client = self.config, self.client
        if fault := client.state()["fault"]:
            if not config.recover_at_reset:
                raise RefusedError(f"{fault['message']}; look at the robot, then call client.recover()", "fault")
            client.recover()
        if client.state()["mode"] != "idle":
            client.stop()
        if client.state()["gripper_fault"] and config.gripper != "fixed":
            raise RobotError(f"{client.state()['gripper_fault']}; then call client.gripper('activate')")
        if self.hello["robot"]["task"]:
            client.reset_task(int(self.np_random.integers(2**31)))
        if config.gripper_at_reset != "keep":
            client.gripper(config.gripper_at_reset)
        x, y, yaw = self.np_random.uniform(-1, 1, 3) * config.random_reset
        turned = quat_multiply(quat_from_euler((0, 0, yaw)), self.reset_pose[3:])
        client.start(**asdict(config.precision))
        lifted = client.state()["reference"]
        lifted[2] = max(lifted[2], self.reset_pose[2])  # out of whatever the tcp is in
        self.go_to(lifted)
        if config.reset_joints_every and self.episodes % config.reset_joints_every == config.reset_joints_every - 1:
            client.stop()
            client.move_joints(config.reset_joints)
            client.start(**asdict(config.precision))
        self.go_to(np.append(self.reset_pose[:3] + (x, y, 0), turned))
        client.set_gains(**asdict(config.compliance))

    def go_to(self, pose: np.ndarray) -> None:
        """Stream targets along a straight line to `pose` and wait until the arm is there. Raises RobotError if not."""
        start, rate, speed = self.client.state()["reference"], Rate(20), self.config.reset_speed  # 5 rad for each m
        move, turn = pose[:3] - start[:3], rotation_between(pose[3:], start[3:])
        steps = math.ceil(20 * max(np.linalg.norm(move) / speed, np.linalg.norm(turn) / (5 * speed), 0.05))
        for t in np.append(np.arange(1, steps + 1) / steps, np.ones(40)):  # and at most 2 s to settle
            self.client.target(np.append(start[:3] + t * move, quat_multiply(quat_from_rotvec(t * turn), start[3:])))
            rate.sleep()
            state = self.client.state()
            off = state["tcp_pose"][:3] - pose[:3]
            if t == 1 and np.abs(off).max() < 0.01 and np.abs(state["tcp_vel"]).max() < 0.01:
                return
        raise RefusedError(f"reset: the tcp stands {np.round(off, 3)} m off; is something in its way?", "failed")

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        values = self.checked(action)
        info: dict[str, Any] = {"executed_action": values.astype(np.float32), "late_s": 0.0, "grasp_penalty": 0.0}
        code = ""
        try:
            self.command(values, info)
            info["late_s"] = self.rate.sleep()
            self.state = self.client.state()
            if self.config.reward == "task":
                self.task_success = self.client.task()["success"]
            latched = self.state["fault"]
            fault = latched["message"] if latched else self.state["gripper_fault"] or ""
        except RobotError as error:
            latched, fault, code = error.reply.get("fault"), str(error), error.code
        reflex, user_stopped = (bool(latched) and latched["code"] == kind for kind in ("reflex", "user_stopped"))
        self.stopped = fault if user_stopped or code == "held" else ""
        self.reflexes, self.elapsed_steps = self.reflexes + reflex, self.elapsed_steps + 1
        obs, camera_fault = self.observe()
        fault = fault or camera_fault
        success = not fault and self.is_success(obs)
        truncated = bool(fault) or self.elapsed_steps >= self.config.max_episode_steps
        info |= {"success": success, "fault": fault or None}
        info |= {"reflexes": self.reflexes, "overruns": self.rate.overruns}
        return obs, float(success), success or reflex, truncated and not (success or reflex), info

    def checked(self, action: np.ndarray) -> np.ndarray:
        """The action within -1..1; raises ValueError for another shape, NaN or infinity. The arm then holds."""
        values = np.asarray(action, dtype=np.float64)
        if values.shape != self.action_space.shape or not np.isfinite(values).all():
            raise ValueError(f"the action must be {self.action_space.shape} finite numbers, not {values}")
        return np.clip(values, -1, 1)

    def command(self, values: np.ndarray, info: dict) -> None:
        """Move the target on, and the gripper if the action says so."""
        motion = np.zeros(6)
        motion[: self.axes] = values[: self.axes] * self.config.action_scale
        motion, start = self.action_to_base(motion), self.last_target()
        position, quaternion = np.clip(start[:3] + motion[:3], self.low[:3], self.high[:3]), start[3:]
        if self.axes == 6:
            turned = quat_multiply(quat_from_rotvec(motion[3:]), quaternion)
            euler = euler_from_quat(quat_multiply(turned, quat_inverse(self.reset_pose[3:])))
            inside = quat_from_euler(np.clip(euler, self.low[3:], self.high[3:]))
            quaternion = quat_multiply(inside, self.reset_pose[3:])
        self.target = np.append(position, quaternion / np.linalg.norm(quaternion))
        info["limited"] = self.client.target(self.target)["result"]["limited"]
        if self.config.gripper != "fixed":
            self.command_gripper(values[-1], info)

    def last_target(self) -> np.ndarray:
        """(7,) what an action moves on from: the last target, but no further than half an action ahead of the reference
        that the server has in force. So single actions are carried out in full although the server takes its time, and
        where the arm is blocked or too slow, the target waits for it."""
        scale, reference = np.array(self.config.action_scale), self.state["reference"]
        lead, turn = self.target[:3] - reference[:3], rotation_between(self.target[3:], reference[3:])
        lead, turn = shortened(lead, scale[:3].max() / 2), shortened(turn, scale[3:].max(initial=0.0) / 2)
        return np.append(reference[:3] + lead, quat_multiply(quat_from_rotvec(turn), reference[3:]))

    def command_gripper(self, value: float, info: dict) -> None:
        binary = self.config.gripper == "binary"
        closure = float(value > 0) if binary else float(np.clip(self.closure + value, 0, 1))
        if closure == self.closure or (binary and abs(value) < 0.5):
            return
        self.closure, info["grasp_penalty"] = closure, -self.config.gripper_penalty
        if not binary:
            width = (1 - closure) * self.hello["gripper"]["max_width"]
            self.client.gripper("move", wait=False, width=width)
            return
        handle = self.client.gripper("close" if closure else "open", wait=False)
        deadline = time.monotonic() + self.config.gripper_wait_s
        while time.monotonic() < deadline and self.client.job_running(handle):
            time.sleep(0.05)
            self.client.target(self.target)  # the watchdog wants to hear from us
        self.rate.deadline = time.monotonic()

    def action_to_base(self, motion: np.ndarray) -> np.ndarray:
        """(6,) translation and rotation vector from the action's frame to the base's: both are turned, and no more.
        SERL's adjoint (franka_env/utils/transformations.py:19) also adds a rotation to each translation."""
        return rotate(self.frame(), motion.reshape(2, 3)).ravel()

    def base_to_action(self, motion: np.ndarray) -> np.ndarray:
        """(6,) the other way round, for what a person does in the base frame."""
        return rotate(quat_inverse(self.frame()), motion.reshape(2, 3)).ravel()

    def frame(self) -> np.ndarray:
        return self.state["tcp_pose"][3:] if self.config.relative_frame else np.array([0.0, 0.0, 0.0, 1.0])

    def measured_closure(self) -> float:
        width = self.hello["gripper"]["max_width"]
        return 1 - self.state["gripper_width"] / width if width else 0.0

    def observe(self) -> tuple[dict[str, np.ndarray], str]:
        """The observation, and what is wrong with a camera."""
        state, fault = self.state, ""
        pose = relative_pose(state["tcp_pose"], self.origin) if self.config.relative_frame else state["tcp_pose"].copy()
        if not self.config.relative_frame and pose[3:] @ self.reset_pose[3:] < 0:
            pose[3:] *= -1  # one sign, or the network sees jumps
        wrench = self.base_to_action(np.concatenate([state["tcp_force"], state["tcp_torque"]]))
        values = {"gripper": [self.measured_closure()], "tcp_pos": pose[:3], "tcp_pose": pose}
        values |= {"tcp_force": wrench[:3], "tcp_torque": wrench[3:]}
        values["tcp_vel"] = self.base_to_action(state["tcp_vel"])[: self.axes]
        obs = {"state": np.concatenate([values[name] for name in self.config.proprio]).astype(np.float32)}
        for camera in self.cameras:
            try:
                frame = camera.read(self.config.max_image_age_s)
            except CameraError as error:
                frame, fault = camera.frame, str(error)
            obs[camera.config.name] = frame.image.copy()
        return obs, fault

    def is_success(self, obs: dict[str, np.ndarray]) -> bool:
        """TASK: what success is, unless a classifier says so."""
        if self.success:
            return bool(self.success(obs))
        if self.config.reward == "task":
            return self.task_success
        pose, (near, aligned) = self.state["tcp_pose"], self.config.tolerance
        turned = np.abs(rotation_between(pose[3:], self.goal_pose[3:])).max()
        return self.config.reward == "pose" and np.abs(pose[:3] - self.goal_pose[:3]).max() < near and turned < aligned

    def expert_action(self) -> np.ndarray:
        """(A,) action of the simulated task's scripted expert. Raises RefusedError on a real robot, which has none."""
        expert = self.client.task()["expert"]
        goal, start = np.array(expert["pose"]), self.last_target()
        motion = np.concatenate([goal[:3] - start[:3], rotation_between(goal[3:], start[3:])])
        action = np.append(self.base_to_action(motion)[: self.axes] / self.config.action_scale, 2 * expert["close"] - 1)
        return np.clip(action, -1, 1)[: self.action_space.shape[0]].astype(np.float32)

    def render(self) -> np.ndarray | None:
        """The newest pictures side by side, (size, cameras x size, 3) uint8."""
        images = [camera.frame.image for camera in self.cameras if camera.frame]
        return np.concatenate(images, axis=1) if images and self.render_mode else None

    def close(self) -> None:
        """Stop the cameras and give the robot back: it holds, and is idle two seconds later."""
        for camera in self.cameras:
            camera.close()
        if self.client:
            self.client.close()
        self.cameras, self.client = [], None


def make_camera(camera: CameraConfig, config: TaskConfig) -> Camera:
    """TASK: add a kind of camera of your own."""
    if camera.kind == "sim":
        return SimCamera(camera, config.image_size, config.server, config.keys)
    return {"realsense": RealSense, "test": TestCamera}[camera.kind](camera, config.image_size)


# `__name__`, because this file is a script, too.
gym.register("FrankaReal-v0", f"{__name__}:FrankaEnv")


# --- Main -------------------------------------------------------------------------------------------------------------
def say(fine: object, what: str, remedy: str = "") -> bool:
    """Print a line of the doctor: ok, or what to do."""
    print(f"ok   {what}" if fine else f"FIX  {what}{f': {remedy}' if remedy else ''}", flush=True)
    return bool(fine)


def examine_server(client: RobotClient) -> tuple[dict, bool]:
    """What the server says about itself, and whether all of it is well."""
    hello, times = client.hello(), []
    for _ in range(200):
        start = time.perf_counter()
        state = client.state()
        times.append(1000 * (time.perf_counter() - start))
    robot, gripper, fault, arriving = hello["robot"], hello["gripper"], state["fault"], state["success_rate"]
    say(True, f"{client.server}: {robot['kind']}, {robot['sdk']}, firmware {robot['firmware']}, task {robot['task']}")
    say(True, f"commander: {hello['lease'] or 'nobody'}; mode: {state['mode']}")
    say(True, "round trip {:.2f} ms, 99 % below {:.2f} ms".format(*np.percentile(times, (50, 99))))
    fine = say(not fault, f"fault: {fault and fault['message']}", "look at the robot, then call client.recover()")
    fine &= say(not state["gripper_fault"], f"gripper {gripper['kind']}: {state['gripper_fault']}", "power, cable")
    fine &= say(arriving >= 0.95, f"{arriving:.0%} of the control packets arrive", "robot_server.py --doctor")
    return hello, fine


def examine_realsense() -> tuple[list[Camera], bool]:
    """The RealSense cameras that are plugged in, and whether all is well."""
    rs, fine = import_realsense(), True
    devices = realsense_devices(rs)
    say(True, f"pyrealsense2 {rs.__version__}, {len(devices)} cameras")
    for serial, device in devices.items():
        name, usb = (device.get_info(key) for key in (rs.camera_info.name, rs.camera_info.usb_type_descriptor))
        fine &= say(usb.startswith("3"), f"{name}, serial {serial}, USB {usb}", "USB 3 needs its cable and port")
    return [RealSense(CameraConfig(serial, "realsense", serial)) for serial in devices], fine


def doctor(args: Args) -> tuple[RobotClient | None, list[Camera], Teleop | None, bool]:
    """Check what a real-robot script needs, a line each: ok, or what to do. Returns what works, and if all does."""
    packages = [f"{name} {importlib.metadata.version(name)}" for name in ("numpy", "gymnasium", "pyzmq", "msgpack")]
    say(True, f"Python {platform.python_version()}, {', '.join(packages)}")
    client, cameras, teleop, fine = None, [], None, True
    try:
        client = RobotClient(args.server, args.keys)
        hello, fine = examine_server(client)
        cameras += [SimCamera(CameraConfig(c["name"]), 128, args.server, args.keys) for c in hello["cameras"]]
    except RobotError as error:
        fine, client = say(False, str(error)), None
    try:
        found, well = examine_realsense()
        cameras, fine = cameras + found, fine and well
    except CameraError as error:
        say(True, f"{error} (only for such cameras)")
    for camera in list(cameras):
        try:
            camera.start()
        except CameraError as error:
            fine = say(False, str(error))
            cameras.remove(camera)
    try:
        teleop = {"none": lambda: None, "keyboard": Keyboard, "spacemouse": SpaceMouse}[args.teleop]()
    except RobotError as error:
        fine = say(False, str(error))
    return client, cameras, teleop, fine


def show(client: RobotClient | None, cameras: list[Camera], teleop: Teleop | None) -> None:
    """Print state, cameras and teleoperation in one line, over the last one in a terminal."""
    parts = []
    if client:
        state = client.state()
        numbers = [*state["tcp_pose"][:3], *np.degrees(euler_from_quat(state["tcp_pose"][3:])), *state["tcp_force"]]
        parts.append("{:.3f} {:.3f} {:.3f} m, {:.0f} {:.0f} {:.0f} deg, {:.1f} {:.1f} {:.1f} N".format(*numbers))
        parts.append(f"gripper {1000 * state['gripper_width']:.0f} mm")
        parts.append(f"{state['mode']} {' '.join(state['limited'])} {state['lease'] or 'nobody'}")
    for camera in cameras:
        age = 1000 * (time.monotonic() - camera.frame.time)
        parts.append(f"{camera.config.name} {camera.frame.number} {age:.0f} ms {camera.error}")
    if teleop:
        motion, gripper = teleop.motion()
        parts.append(teleop.fault or f"hand {np.round(motion, 2)} {gripper:+.0f}")
    print(f"\r{' | '.join(parts)}\033[K", end="" if sys.stdout.isatty() else "\n", flush=True)


def drive(args: Args, teleop: Teleop) -> None:
    """Let a person move the arm slowly, within 10 cm of where it stands, to feel gains and directions."""
    with contextlib.closing(RobotClient(args.server, args.keys)) as client:
        limits, pose = client.hello()["limits"], client.state()["tcp_pose"]
    box = np.clip([pose[:3] - 0.1, pose[:3] + 0.1], limits["workspace_low"], limits["workspace_high"]).T
    config = TaskConfig(
        server=args.server, keys=args.keys, reset_pose=(*pose[:3], *euler_from_quat(pose[3:])), random_reset=(0, 0, 0),
        workspace=(*map(tuple, box), *[(-0.3, 0.3)] * 3), action_scale=(0.01,) * 3 + (0.05,) * 3, relative_frame=False,
        reset_joints_every=0, recover_at_reset=False, cameras=(), reward="none", max_episode_steps=sys.maxsize,
    )  # fmt: skip
    env, end = Intervention(FrankaEnv(config), teleop), time.monotonic() + (args.seconds or math.inf)
    with contextlib.closing(env):
        env.reset()
        while time.monotonic() < end:
            _, _, terminated, truncated, info = env.step(np.zeros(7, np.float32))
            show(env.unwrapped.client, [], teleop)
            if terminated or truncated:
                raise RobotError(info["fault"])


def main(args: Args) -> None:
    client, cameras, teleop, fine = doctor(args)
    try:
        if args.drive and not (teleop and client):
            fail("--drive needs a server, and --teleop keyboard or spacemouse")
        for camera in cameras if args.snapshots else []:
            args.snapshots.mkdir(parents=True, exist_ok=True)
            path = args.snapshots / f"{camera.config.name}.png"
            Image.fromarray(camera.read(1.0).image).save(path)
            print(f"wrote {path}")
        if args.drive:
            drive(args, teleop)
        end = time.monotonic() + (args.seconds or math.inf)
        while (client or cameras or teleop) and not args.drive and time.monotonic() < end:
            show(client, cameras, teleop)
            time.sleep(0.2)
    except (RobotError, OSError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        pass
    finally:
        print()
        for closing in (*cameras, *filter(None, (teleop, client))):
            closing.close()
    if not fine:
        fail("something above needs fixing")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
