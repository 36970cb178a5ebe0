"""The robot as a gymnasium environment: client of robot_server.py, cameras, teleoperation; no ROS.

    python robot_client.py                             # needs a server; checks all, shows live values
    python robot_client.py --teleop keyboard --drive   # needs a server; first motion, by hand
    python robot_client.py --snapshots pictures        # needs a server; a picture of every camera

The environment, in a script of your own (`FrankaEnv` tells what it takes and gives):

    import gymnasium
    from robot_client import PEG, Intervention, Keyboard

    env = gymnasium.make("robot_client:FrankaReal-v0", config=PEG)
    env = Intervention(env, Keyboard())    # a person may take over at any step

Keys of the keyboard, typed into the terminal:
    w s  forward, back     a d  left, right      r f  up, down      (in the axes of the robot's base)
    j l  roll              i k  pitch            u o  yaw
    c v  close, open the gripper                 space  take over and stand still
    y success   n failure   x discard   z undo the last   t label   p pause   Enter go on   q quit

A tap moves at a quarter of the speed for 0.75 s, as long as terminals wait before a held key
repeats; a key that is held moves at full speed and stops 0.15 s after it was let go. The opposite
key and space stop at once.

Expect: mean_period_ms <= 100.1, late_p99_ms <= 3 [benchmarks/results/robot_period.csv contender=ours]

Sources: SERL arXiv:2401.16013 (serl_robot_infra, commit cd5f7e7) and HIL-SERL arXiv:2410.21845
(commit 5d02aed): observation, action, gains, resets, interventions.
Differs from them: the target moves on from the last reference, not from the measured pose, which sags under load;
the relative frame turns vectors (their adjoint adds a rotation to every translation); an absolute schedule by the
robot's clock, so that work between two steps does not add up, and no step waits for the gripper; time limits truncate;
a reflex ends the episode and is counted instead of being cleared unseen before every command; a camera that stands
still ends the episode instead of waiting for Enter; a person who pauses for a moment keeps control.
New task: copy `PEG` or `PICK` and name the copy in TASKS; `grep -n TASK: robot_client.py` shows the other places.
"""

import atexit
import collections
import contextlib
import ctypes
import importlib.metadata
import json
import math
import os
import platform
import select
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, Self

import gymnasium as gym
import msgpack
import numpy as np
import tyro
import zmq
import zmq.auth
from gymnasium import spaces
from PIL import Image, ImageOps
from scipy.spatial.transform import Rotation

from robot_server import PROTOCOL_VERSION, Gains, difference, fail, go_first, shortened, tell

SERVER = "tcp://127.0.0.1:5600"
KEYS = __doc__[__doc__.index("Keys of the keyboard") : __doc__.index("Expect:")].strip()


# --- Args -------------------------------------------------------------------------------------------------------------
@dataclass
class Args:
    server: str = SERVER
    """address of robot_server.py; an IPv6 one stands in brackets"""
    keys: str | None = None
    """folder with server.key and client.key_secret, as robot_server.py --keygen made them"""
    teleop: Literal["none", "keyboard", "spacemouse"] = "none"
    """device whose readings are shown"""
    drive: bool = False
    """let it move the arm, 1 cm and 0.05 rad per step at most, within 10 cm of where it stands"""
    seconds: float = 10.0
    """how long live values are shown (0: until Ctrl-C)"""
    snapshots: Path | None = None
    """write one PNG of every camera into this folder"""


# --- Poses ------------------------------------------------------------------------------------------------------------
# A pose (7,) is a position, m, and a quaternion x, y, z, w. Euler angles are roll, pitch, yaw about the fixed axes
# x, y, z: "xyz". (SERL's own euler_2_quat turns the pitch around, serl_robot_infra/franka_env/utils/rotations.py:11.)
def rotation(pose: np.ndarray) -> Rotation:
    return Rotation.from_quat(pose[3:])


def pose_from_euler(pose: Sequence[float]) -> np.ndarray:
    """(7,) of x, y, z, roll, pitch, yaw."""
    return np.append(pose[:3], Rotation.from_euler("xyz", pose[3:]).as_quat())


def moved(pose: np.ndarray, motion: np.ndarray) -> np.ndarray:
    """(7,) `pose` after a motion (6,): translation and rotation vector, both in base axes."""
    turned = Rotation.from_rotvec(motion[3:]) * rotation(pose)
    return np.append(pose[:3] + motion[:3], turned.as_quat())


def relative_pose(pose: np.ndarray, origin: np.ndarray) -> np.ndarray:
    """(7,) `pose` seen from the frame `origin`, with w >= 0."""
    position = rotation(origin).apply(pose[:3] - origin[:3], inverse=True)
    turned = rotation(origin).inv() * rotation(pose)
    return np.append(position, turned.as_quat(canonical=True))


class Pace:
    """Beats by an absolute schedule of a clock, so that neither work nor late wake-ups add up.

    `speed`: by how much it is faster than ours. `overruns`: beats for which no time was left.
    """

    def __init__(self, hz: float, clock: Callable[[], float] = time.monotonic, speed: float = 1.0) -> None:
        self.period = 1 / hz
        self.clock = clock
        self.speed = speed
        self.overruns = 0
        self.restart()

    def restart(self) -> None:
        """Count from now on."""
        self.deadline = self.beat = self.clock()

    def wait(self) -> tuple[float, float]:
        """Wait for the next beat. Returns the time since the last one and how late this one is, s,
        as seen after waking up. A beat half a period late starts a new schedule: no burst."""
        self.deadline += self.period
        left = self.deadline - self.clock()
        if left > 2 * self.period:  # the clock was set back: another robot
            self.restart()
            return self.wait()
        self.overruns += left <= 0
        while left > 0:
            time.sleep(left / self.speed)
            left = self.deadline - self.clock()
        period = self.deadline - left - self.beat
        self.beat = self.deadline - left
        if -left > self.period / 2:
            self.deadline = self.beat
        return period, -left


def keep_the_beat() -> None:
    """This thread, which steps the robot, before other programs, where that is allowed."""
    go_first(priority=5)  # the server has 10


# --- Client -----------------------------------------------------------------------------------------------------------
class RobotError(RuntimeError):
    """Something is wrong with robot, server, camera or teleoperation; the message names the remedy.
    `code` and `reply` are the server's, where it is the one that says so."""

    def __init__(self, message: str, code: str = "", reply: dict | None = None):
        super().__init__(f"{code}: {message}" if code else message)
        self.code = code
        self.reply = reply or {}


class UnreachableError(RobotError):
    """No answer within the deadline: dead, stopped, another address, or the cable."""


class RefusedError(RobotError):
    """The server said no. `code` is one of the protocol's, or "failed": a job that went wrong."""


class StoppedError(RobotError):
    """A person stopped the robot, with its button or by another client's `hold` or `stop`, or must look at it."""

    def __init__(self, fault: str, who: str = "a person stopped the robot"):
        super().__init__(f"{fault}: {who}; call reset() again when it may move")


def by_person(fault: str) -> bool:
    return "user_stopped" in fault or "a client asked to" in fault


RECOVER = "look at the robot, then call client.job('recover')"
ACTIVATE = "then call client.job('gripper', action='activate')"
SOCKET_OPTIONS = {
    zmq.REQ_RELAXED: 1,
    zmq.REQ_CORRELATE: 1,
    zmq.LINGER: 0,
    zmq.IMMEDIATE: 1,
    zmq.MAXMSGSIZE: 1 << 20,
    zmq.RECONNECT_IVL: 50,  # ms, as those below
    zmq.RECONNECT_IVL_MAX: 400,
    zmq.HEARTBEAT_IVL: 500,
    zmq.HEARTBEAT_TIMEOUT: 1500,
}
CURVE_OPTIONS = (zmq.CURVE_PUBLICKEY, zmq.CURVE_SECRETKEY, zmq.CURVE_SERVERKEY)


def load_keys(folder: str | Path) -> tuple[bytes, bytes, bytes]:
    """The client's public and secret key, the server's public one. RobotError names a bad file."""
    client, server = Path(folder) / "client.key_secret", Path(folder) / "server.key"
    keys = []
    for path, wanted in ((client, 2), (server, 1)):
        try:
            pair = zmq.auth.load_certificate(path)[:wanted]
            if not all(key and len(key) == 40 for key in pair):
                raise ValueError("no key of 40 characters")
        except (OSError, LookupError, ValueError) as error:
            raise RobotError(f"--keys {folder}: {path.name}: {error}; copy it from the server's machine") from error
        keys += pair
    return tuple(keys)


class RobotClient:
    """Any operation of robot_server.py, whose header describes them: `call("hold")`; those that take
    long by `job`, which waits for the end: `job("gripper", action="open")`.

    A request without an answer is sent again, `tries` times in all ("Lazy Pirate"; REQ_CORRELATE
    drops late answers). That is safe for every operation: reading has no effect, a target carries a
    sequence number, a job a handle. Belongs to the thread that made it.
    Raises UnreachableError when nobody answers, RefusedError when the server says no.
    """

    def __init__(
        self,
        server: str = SERVER,
        keys: str | None = None,
        name: str = "",
        timeout_s: float = 0.5,
        tries: int = 3,
    ):
        self.server = server
        self.timeout_s = timeout_s
        self.tries = tries
        self.name = (name or f"{Path(sys.argv[0]).stem}-{os.getpid()}")[-32:]
        self.token: str | None = None
        self.seq = 0
        self.attempts = 0  # of the newest request
        self.speed = 1.0  # of the robot's clock, robot seconds per second
        self._requests = 0
        self._clock = 0.0  # robot's time minus speed x ours, of the newest reply
        options = dict(SOCKET_OPTIONS)
        if keys:
            options |= zip(CURVE_OPTIONS, load_keys(keys))
        self.socket = zmq.Context.instance().socket(zmq.REQ)
        try:
            for option, value in options.items():
                self.socket.setsockopt(option, value)
            self.socket.ipv6 = server.count(":") > 2  # only then: with it, localhost may mean ::1
            self.socket.connect(server)
        except zmq.ZMQError as error:
            self.socket.close()
            raise RobotError(f"--server {server}: {error}; give it as tcp://HOST:PORT or tcp://[IPV6]:PORT") from error

    def call(self, op: str, **args: Any) -> dict:
        """Ask for `op` and return the reply's map: "ok", "result", "mode", "jobs" and so on."""
        self._requests += 1
        request = {"v": PROTOCOL_VERSION, "op": op, "id": self._requests, "args": args}
        if self.token:
            request["token"] = self.token
        message = msgpack.packb(request, default=lambda x: x.tolist())
        for attempt in range(1, self.tries + 1):
            self.attempts = attempt
            deadline = time.monotonic() + self.timeout_s
            with contextlib.suppress(zmq.Again):  # not connected, and nothing is kept for later
                self._wait(zmq.POLLOUT, deadline)
                self.socket.send(message, zmq.NOBLOCK)
            if self._wait(zmq.POLLIN, deadline):
                return self._checked(self.socket.recv_multipart()[0])
        raise UnreachableError(
            f"no answer from {self.server} to {op!r}, {self.tries} tries of {self.timeout_s} s: "
            "is robot_server.py running there, is the cable in, are address, port and --keys right?"
        )

    def _wait(self, event: int, deadline: float) -> bool:
        return bool(self.socket.poll(max(round(1000 * (deadline - time.monotonic())), 0), event))

    def _checked(self, message: bytes) -> dict:
        """The reply, if it is a good one to the newest request."""
        arrived = time.monotonic()
        try:
            reply = msgpack.unpackb(message)
            if not reply["ok"]:  # first: what is of another version has no id
                raise RefusedError(reply["error"]["message"], reply["error"]["code"], reply)
            if reply["id"] != self._requests:
                raise ValueError(f"answers request {reply['id']}, not {self._requests}")
            self._clock = reply["robot_time"] + self.speed * (reply["state_age"] - arrived)
        except (ValueError, KeyError, TypeError, msgpack.UnpackException) as error:
            raise RobotError(f"{self.server} does not speak the protocol of robot_server.py: {error!r}") from error
        return reply

    def robot_time(self) -> float:
        """What the robot's clock shows now, s, by the newest reply and our own clock since then."""
        return self._clock + self.speed * time.monotonic()

    def pace(self, hz: float) -> Pace:
        """Beats by the robot's clock, so that a simulated robot may be faster than real time."""
        return Pace(hz, self.robot_time, self.speed)

    def hello(self, wait_s: float = 0.0, give_up: Callable[[], bool] = lambda: False) -> dict:
        """Robot, gripper, limits, watchdog, versions. Waits up to `wait_s` for a server, or until
        `give_up` says so."""
        end = time.monotonic() + wait_s
        while True:
            try:
                hello = self.call("hello")["result"]
                break
            except UnreachableError:
                if time.monotonic() > end or give_up():
                    raise
        # Without a word about it: real time. 0: as fast as it can; then sleep less and look again.
        self.speed = hello["robot"].get("speed", 1.0) or 10.0
        return hello

    def state(self) -> dict:
        """What is measured, as arrays in the base frame, m, rad, N; and what every reply has."""
        state = self.call("state")
        state |= state.pop("result")
        for key in ("tcp_pose", "tcp_vel", "tcp_force", "tcp_torque", "q", "dq", "reference"):
            state[key] = np.array(state[key])
        return state

    def acquire(self, ttl_s: float = 1.0, takeover: bool = False, wait_s: float = 0.0) -> None:
        """Become the one commander, or stay it. Any later call renews; without one for `ttl_s` it
        ends, the arm holds. Waits up to `wait_s` for another's lease to end: a dead one's does."""
        self.token = self.token or uuid.uuid4().hex
        end = time.monotonic() + wait_s
        while True:
            try:
                self.call("acquire", name=self.name, token=self.token, ttl=ttl_s, takeover=takeover)
                return
            except RefusedError as refusal:
                if refusal.code != "lease_taken" or time.monotonic() > end:
                    self.token = None
                    raise
                time.sleep(0.1)

    def release(self) -> None:
        if self.token:
            with contextlib.suppress(RefusedError):  # it has ended already
                self.call("release")
            self.token = None

    def target(self, pose: np.ndarray, closure: float | None = None) -> dict:
        """Stream a pose (7,) and the gripper's closure, 0 (open) to 1 (None: as it is). Waits for
        neither. Returns the reply; its "reference" is what is in force."""
        self.seq += 1
        try:
            return self.call("target", pose=pose, closure=closure, seq=self.seq)
        except RefusedError as refusal:
            if refusal.code == "stale" and self.attempts > 1:  # the first try's answer was lost
                return refusal.reply
            raise

    def stop(self, timeout_s: float = 2.0) -> None:
        """Stop softly, whoever commands, and wait until the robot is idle, or a fault is latched."""
        deadline = time.monotonic() + timeout_s
        self.call("stop")
        while (mode := self.call("state")["mode"]) not in ("idle", "fault"):
            if time.monotonic() > deadline:
                raise RobotError(f"stop: still {mode} after {timeout_s} s; use the stop button")
            time.sleep(0.02)

    def job(self, op: str, timeout_s: float = 60.0, **args: Any) -> None:
        """Start what takes long, and wait for its end. Raises RefusedError if it fails."""
        handle = uuid.uuid4().hex
        deadline = time.monotonic() + timeout_s
        self.call(op, handle=handle, **args)
        while (job := self.call("job", handle=handle)["result"])["status"] != "done":
            if job["status"] == "failed":
                raise RefusedError(f"{op}: {job['error']}", "failed")
            if time.monotonic() > deadline:
                self.call("hold")
                raise RefusedError(f"{op} took longer than {timeout_s} s; the arm holds", "failed")
            time.sleep(0.02)

    def close(self) -> None:
        with contextlib.suppress(RobotError):
            self.release()
        self.socket.close()


def check_server(address: str, keys: str | None) -> None:
    """Exits with one line at once when there is no server; later on, FrankaEnv waits a while for one that is away."""
    try:
        with contextlib.closing(RobotClient(address, keys)) as client:
            client.hello(wait_s=3.0)
    except RobotError as error:
        fail(f"--server: {error}")


# --- Cameras ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class CameraConfig:
    name: str  # of the image in the observation
    kind: str = "sim"  # the camera of this name in the simulated scene; or one of CAMERAS
    serial: str = ""  # RealSense: serial number, `python robot_client.py` lists them
    width: int = 640
    height: int = 480
    fps: int = 30
    exposure: float | None = 10_000.0  # us, fixed: always the same brightness (None: automatic)
    gain: float | None = None  # None: as it is
    white_balance: float | None = None  # K (None: automatic)
    # left, upper, right, lower edge, from 0 to 1 (None: the square in the middle)
    crop: tuple[float, float, float, float] | None = None
    warmup_frames: int = 30  # dropped after every start
    timeout_s: float = 0.5  # without a new frame for this long, the camera is started anew


class Frame(NamedTuple):
    image: np.ndarray  # (size, size, 3) uint8 RGB
    time: float  # monotonic s when it arrived
    number: int  # counted by the camera


class Camera:
    """The newest frame of a camera, kept by a thread: a slow or dead one never blocks the loop.

    A kind of camera has three methods: `open` starts the device; `grab` waits for the next frame,
    (H, W, 3) uint8 RGB, and returns it and its number, or raises RobotError after `timeout_s`; `shut`
    stops the device, `hard` by what helps when it failed again after it was started anew.
    """

    def __init__(self, config: CameraConfig, size: int = 128):
        self.config = config
        self.size = size
        self.frame: Frame | None = None
        self.error = "not started"
        self.restarts = 0
        self._stop = threading.Event()
        self._arrived = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=f"camera-{config.name}", daemon=True)

    def shut(self, hard: bool = False) -> None:
        """Nothing to stop."""

    def start(self, timeout_s: float = 10.0) -> Self:
        """Start the thread, or see that it still delivers; RobotError without a new frame."""
        if not self._thread.is_alive():
            self._thread.start()
        self.wait_newer(time.monotonic(), timeout_s)
        return self

    def wait_newer(self, than: float, timeout_s: float) -> None:
        """Wait for a frame that arrived after this time, monotonic s; RobotError if none comes."""
        with self._arrived:
            if not self._arrived.wait_for(lambda: self.frame and self.frame.time > than, timeout_s):
                self.complain(f"no new picture within {timeout_s} s")

    def read(self, max_age_s: float) -> Frame:
        """The newest frame. Raises RobotError if it is older than `max_age_s`."""
        age = time.monotonic() - self.frame.time if self.frame else math.inf
        if age > max_age_s:
            self.complain(f"newest picture is {age:.2f} s old")
        return self.frame

    def complain(self, what: str) -> NoReturn:
        raise RobotError(f"camera {self.config.name}: {what}: {self.error or 'it stands still'}")

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
                    image, number = self.grab()
                    now = time.monotonic()
                    if self.frame is None or number != self.frame.number:
                        self._keep(Frame(self._fit(image), now, number))
                        failures = 0
                    elif now - max(self.frame.time, started) > self.config.timeout_s:
                        raise RobotError(f"it delivers picture {number} over and over")
            except Exception as error:  # noqa: BLE001  a driver raises what it likes
                self.error = str(error) or repr(error)
                failures += 1
                self.restarts += 1
            with contextlib.suppress(Exception):
                self.shut(hard=failures >= 2)
            self._stop.wait(min(0.1 * failures, 1.0))

    def _keep(self, frame: Frame) -> None:
        with self._arrived:
            self.frame = frame
            self.error = ""
            self._arrived.notify_all()

    def _fit(self, image: np.ndarray) -> np.ndarray:
        """(size, size, 3): cropped and averaged over the pixels that fall together."""
        picture = Image.fromarray(image)
        size = (self.size, self.size)
        if self.config.crop is None:
            return np.asarray(ImageOps.fit(picture, size, Image.Resampling.BOX))
        box = np.array(self.config.crop) * (picture.size * 2)
        return np.asarray(picture.resize(size, Image.Resampling.BOX, tuple(box)))


def import_realsense() -> Any:
    """The module pyrealsense2. Its wheel lacks libusb; PyPI's libusb-package has it."""
    try:
        with contextlib.suppress(ImportError):
            import libusb_package

            ctypes.CDLL(str(libusb_package.get_library_path()), ctypes.RTLD_GLOBAL)
        import pyrealsense2
    except (ImportError, OSError) as error:
        raise RobotError(f"RealSense: {error}; run: pip install pyrealsense2 libusb-package") from error
    return pyrealsense2


def realsense_devices(rs: Any) -> dict[str, Any]:
    """Serial number -> device, of all that are plugged in."""
    number = rs.camera_info.serial_number
    return {device.get_info(number): device for device in rs.context().query_devices()}


class RealSense(Camera):
    """Colour pictures of an Intel RealSense, with fixed exposure."""

    rs: Any = None  # the module, once it is there
    pipeline: Any = None

    def open(self) -> None:
        self.rs = import_realsense()
        config = self.config
        devices = realsense_devices(self.rs)  # pipeline.start waits 15 s for one that is not there
        if config.serial not in devices:
            there = ", ".join(sorted(devices)) or "none"
            raise RobotError(f"no RealSense has serial number {config.serial!r}; there: {there}")
        settings = self.rs.config()
        settings.enable_device(config.serial)
        settings.enable_stream(self.rs.stream.color, config.width, config.height, self.rs.format.rgb8, config.fps)
        self.pipeline = self.rs.pipeline()
        self.set_options(self.pipeline.start(settings).get_device())
        for _ in range(config.warmup_frames):
            self.pipeline.try_wait_for_frames(round(1000 * config.timeout_s))

    def set_options(self, device: Any) -> None:
        """Of the sensor that gives the colour (D405: the stereo module)."""
        option, config = self.rs.option, self.config
        for sensor in device.query_sensors():
            streams = [profile.stream_type() for profile in sensor.get_stream_profiles()]
            if self.rs.stream.color in streams:
                break
        # A colour sensor of its own counts exposure in 100 us, librealsense issue 8243.
        exposure_unit = 1 if self.rs.stream.depth in streams else 100  # us
        for name, value, unit in (  # what is automatic is switched off before its value is set
            (option.enable_auto_exposure, float(config.exposure is None), 1),
            (option.exposure, config.exposure, exposure_unit),
            (option.gain, config.gain, 1),
            (option.enable_auto_white_balance, float(config.white_balance is None), 1),
            (option.white_balance, config.white_balance, 1),
        ):
            if value is not None and sensor.supports(name):
                limits = sensor.get_option_range(name)
                if not limits.min <= value / unit <= limits.max:
                    raise RobotError(f"{name} {value}: this camera takes {limits.min * unit} to {limits.max * unit}")
                sensor.set_option(name, value / unit)

    def grab(self) -> tuple[np.ndarray, int]:
        arrived, frames = self.pipeline.try_wait_for_frames(round(1000 * self.config.timeout_s))
        if not arrived:
            raise RobotError(f"no picture for {self.config.timeout_s} s; cable, USB port, or another program?")
        frame = frames.get_color_frame()
        image = np.array(frame.get_data())  # a copy: held frames starve the camera's pool
        return image, frame.get_frame_number()

    def shut(self, hard: bool = False) -> None:
        pipeline, self.pipeline = self.pipeline, None
        if pipeline and not hard:
            pipeline.stop()  # and then a reset can deadlock, librealsense issue 7252
        devices = realsense_devices(self.rs) if self.rs and hard else {}
        if device := devices.get(self.config.serial):
            device.hardware_reset()
            self._stop.wait(5.0)


class Scene:
    """The simulated robot's scene, drawn here: a copy of its physics, put where the server's is. So
    the server needs no OpenGL, and a picture shows the very state that is observed."""

    def __init__(self, env_id: str):
        try:
            import franka_sim  # noqa: F401  # TASK: import what registers yours

            self.sim = gym.make(env_id).unwrapped.sim
        except (ImportError, gym.error.Error) as error:
            remedy = "pip install mujoco, and franka_sim.py beside this file"
            raise RobotError(f"simulated cameras: {error}; {remedy}") from error
        model = self.sim.model
        self.cameras = [model.camera(i).name for i in range(model.ncam)]
        self.seen = 0

    def put(self, scene: dict[str, list[float]]) -> None:
        """Move everything to where it is now; `scene` is what `task` gives."""
        self.sim.set_state({name: np.array(values) for name, values in scene.items()})
        self.seen += 1

    def close(self) -> None:
        self.sim.close()


class SimCamera(Camera):
    """A camera of the simulated scene; it has no thread, `read` draws."""

    def __init__(self, config: CameraConfig, size: int, scene: Scene):
        super().__init__(config, size)
        self.scene = scene
        left, upper, right, lower = config.crop or (0, 0, 1, 1)
        self.pixels = min(math.ceil(size / min(right - left, lower - upper)), 1280)

    def start(self, timeout_s: float = 10.0) -> Self:
        """Draw once. Raises RobotError for an unknown camera, or without OpenGL."""
        if self.config.name not in self.scene.cameras:
            there = ", ".join(self.scene.cameras)
            raise RobotError(f"the scene has no camera {self.config.name!r}; there are: {there}")
        self.read(timeout_s)
        return self

    def wait_newer(self, than: float, timeout_s: float) -> None:
        """Nothing to wait for: `read` draws anew."""

    def read(self, max_age_s: float) -> Frame:
        try:
            image = self.scene.sim.render(self.config.name, self.pixels, self.pixels)
        except RuntimeError as error:
            raise RobotError(f"camera {self.config.name}: {error}") from error
        self._keep(Frame(self._fit(image), time.monotonic(), self.scene.seen))
        return self.frame


CAMERAS = {"realsense": RealSense}  # TASK: add a kind of camera of your own, a class like RealSense


def make_camera(config: CameraConfig, size: int, scene: Scene | None) -> Camera:
    """Raises RobotError for an unknown kind, and for a simulated one without a simulated robot."""
    if config.kind == "sim" and scene:
        return SimCamera(config, size, scene)
    if config.kind not in CAMERAS:
        kinds = ", ".join([*CAMERAS, "sim of a simulated robot"])
        raise RobotError(f"camera {config.name}: no kind {config.kind!r} here, but {kinds}")
    return CAMERAS[config.kind](config, size)


# --- Teleoperation ----------------------------------------------------------------------------------------------------
HOLD_S = 0.75  # how long a typed key counts: the longest usual wait until the terminal repeats it
REPEAT_S = 0.15  # a key that repeats counts for this long after its last repetition
COMMANDS = {
    "y": "success", "n": "failure", "x": "discard", "z": "undo",
    "t": "label", "p": "pause", "\n": "go on", "q": "quit",
}  # fmt: skip


class Terminal:
    """What a person types into the terminal, without Enter and without waiting; needs no display.

    A thread notes when each key was typed, so that a script sees it however seldom it looks.
    """

    def __init__(self, fd: int | None = None):
        """Raises RobotError where standard input is no terminal."""
        import termios
        import tty

        self.fd = sys.stdin.fileno() if fd is None else fd
        if not os.isatty(self.fd):
            raise RobotError("keyboard: standard input is no terminal; start the script in one")
        self.fault = ""
        self._typed: dict[str, float] = {}  # key -> when it came last, monotonic s
        self._repeats: dict[str, bool] = {}  # whether a key is held down
        self._commands: collections.deque[str] = collections.deque()
        settings = termios.tcgetattr(self.fd)

        def restore() -> None:
            with contextlib.suppress(termios.error):  # the terminal may be gone
                termios.tcsetattr(self.fd, termios.TCSADRAIN, settings)

        self._restore = restore
        tty.setcbreak(self.fd)
        atexit.register(self._restore)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="terminal", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                if select.select([self.fd], [], [], 0.1)[0]:
                    typed = os.read(self.fd, 64)
                    if not typed:
                        raise OSError("the terminal was closed")
                    for key in typed.decode(errors="ignore").split("\x1b")[0]:  # not what arrow and function keys send
                        self._note(key.lower(), time.monotonic())  # also with Caps Lock
        except OSError as error:
            self.fault = f"keyboard: {error}"

    def _note(self, key: str, now: float) -> None:
        gap = now - self.pressed_at(key)
        self._typed[key] = now
        self._repeats[key] = gap < REPEAT_S
        if key in COMMANDS and gap > HOLD_S:  # a key that is held is one command
            self._commands.append(COMMANDS[key])

    def commands(self, most: float = math.inf) -> list[str]:
        """Those of COMMANDS since the last call, in their order, `most` of them; the rest waits."""
        return [self._commands.popleft() for _ in range(min(most, len(self._commands)))]

    def pressed_at(self, key: str) -> float:
        """When this key was typed last, monotonic s."""
        return self._typed.get(key, -math.inf)

    def strength(self, key: str) -> float:
        """1 while the key is held, 0.25 after it was typed, while it may be held, else 0."""
        since = time.monotonic() - self.pressed_at(key)
        if self._repeats.get(key):
            return float(since < REPEAT_S)
        return 0.25 if since < HOLD_S else 0.0

    def quits(self) -> bool:
        """Whether "quit" is among the commands that nobody has asked for yet."""
        return "quit" in self._commands

    def forget(self) -> list[str]:
        """Throw away what was typed, such as during a reset; but not what says that it shall stop:
        pause, unless it was taken back, and quit. Returns the commands that are lost."""
        typed = self.commands()
        self._typed = {key: self.pressed_at(key) for key in COMMANDS}  # which may still be held
        pauses = [command for command in typed if command in ("pause", "go on")]
        kept = ["pause"] if pauses[-1:] == ["pause"] else []
        if "quit" in typed:
            kept.append("quit")
        self._commands.extend(kept)
        return [command for command in typed if command not in kept]

    def close(self) -> None:
        self._stop.set()
        self._thread.join(timeout=2.0)
        atexit.unregister(self._restore)
        self._restore()


class Teleop:
    """A person's hand: `motion` of the device, made into the environment's actions by `read`."""

    fault = ""  # what is wrong with the device; it does not move anything meanwhile
    held = False  # whether the person keeps control although nothing moves
    rng = np.random.default_rng(0)

    def motion(self) -> tuple[np.ndarray, float]:
        """(6,) in [-1, 1]: forward, left, up, rotations about these; and +1 to close, -1 to open."""
        return np.zeros(6), 0.0

    def read(self, env: gym.Env) -> np.ndarray | None:
        """The action to execute instead of the policy's, or None while the input is zero."""
        motion, gripper = self.motion()
        if not (self.held or gripper) and np.linalg.norm(motion) <= 0.001:
            return None
        size = env.action_space.shape[0]
        turn = getattr(env.unwrapped, "base_to_action", np.asarray)  # into the relative frame
        action = turn(motion)[: 6 if size >= 6 else 3]
        if size in (4, 7):  # HIL-SERL: near 1, where a tanh policy needs no infinite mean
            action = np.append(action, gripper * self.rng.uniform(0.9, 1.0))
        return np.clip(action, -1, 1).astype(np.float32)

    def forget(self) -> None:
        """Throw away what came during a reset."""

    def close(self) -> None:
        """Let go of the device."""


class Keyboard(Teleop):
    """Keys typed into the terminal, see KEYS."""

    AXES = ("ws", "ad", "rf", "jl", "ik", "uo")  # key for +, key for -
    GRIPPER = "cv"

    def __init__(self, speed: float = 0.5, terminal: Terminal | None = None):
        """`speed`: while a key is held, 1 at most. Raises RobotError without a terminal."""
        self.speed = speed
        self.terminal = terminal or Terminal()

    @property
    def fault(self) -> str:
        return self.terminal.fault

    @property
    def held(self) -> bool:
        """Space: the person takes over, and stands still."""
        return self.terminal.strength(" ") > 0

    def motion(self) -> tuple[np.ndarray, float]:
        motion = np.array([self.along(pair) for pair in self.AXES])
        return self.speed * motion, float(np.sign(self.along(self.GRIPPER)))

    def along(self, pair: str) -> float:
        """-1 to 1, by the newer one of two opposite keys."""
        plus, minus = pair
        newer = max(pair, key=self.terminal.pressed_at)
        if self.terminal.pressed_at(newer) < self.terminal.pressed_at(" "):
            return 0.0
        return self.terminal.strength(newer) * (1.0 if newer == plus else -1.0)

    def forget(self) -> None:
        self.terminal.forget()

    def close(self) -> None:
        self.terminal.close()


UDEV_RULE = 'KERNEL=="hidraw*", ATTRS{idVendor}=="256f", MODE="0666"'


def hid_devices(folder: Path = Path("/sys/class/hidraw")) -> list[str]:
    """The names of all mice, keyboards, joysticks that Linux sees, also those we may not open."""
    names = []
    for path in sorted(folder.glob("*/device/uevent")):
        facts = dict(line.split("=", 1) for line in path.read_text().splitlines())
        names.append(f"{facts.get('HID_NAME', '?')} ({path.parent.parent.name})")
    return names


class SpaceMouse(Teleop):
    """3Dconnexion SpaceMouse: the cap moves the arm; the left button closes, the right one opens the
    gripper, both together keep control while the cap is let go."""

    def __init__(self):
        """Raises RobotError if there is none."""
        self._state = np.zeros(6), 0.0
        self._device = self._open()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="spacemouse", daemon=True)
        self._thread.start()

    def _open(self) -> Any:
        try:
            import pyspacemouse

            return pyspacemouse.open(axis_convention="ros")  # x forward, y left, z up
        except (ImportError, RuntimeError, OSError) as error:
            there = ", ".join(hid_devices()) or "none"
            problem = f"{error} Devices that are plugged in: {there}"
            remedy = "pip install pyspacemouse, apt-get install libhidapi-hidraw0, and allow its use: "
            remedy += f"{UDEV_RULE} in /etc/udev/rules.d/99-spacemouse.rules, then plug it in again"
            raise RobotError(f"SpaceMouse: {problem}; run: {remedy}") from error

    def _run(self) -> None:
        from pyspacemouse.device import HIDException  # unplugged

        while not self._stop.wait(0.005):
            try:
                if self._device is None:
                    self._device = self._open()
                    self.fault = ""
                state, before = self._device.read(), None
                # One report per read: without draining them the arm lags behind the hand.
                while state.t != before:
                    before, state = state.t, self._device.read()
            except (HIDException, RobotError) as error:
                self._device = None
                self.fault = f"SpaceMouse: {error}"
                self.held = False
                self._state = np.zeros(6), 0.0
                self._stop.wait(1.0)
                continue
            motion = np.array([state.x, state.y, state.z, state.roll, state.pitch, state.yaw])
            left, right = [*state.buttons, 0, 0][:2]
            self.held = bool(left and right)
            self._state = np.clip(motion, -1, 1), float(left) - float(right)

    def motion(self) -> tuple[np.ndarray, float]:
        return self._state

    def close(self) -> None:
        self._stop.set()
        self._thread.join(timeout=2.0)


def open_teleop(name: str, terminal: Terminal | None = None) -> Teleop:
    """The device "keyboard" or "spacemouse". Raises RobotError when it is not there."""
    return SpaceMouse() if name == "spacemouse" else Keyboard(terminal=terminal)


class ScriptedExpert(Teleop):
    """Stands in for a person in tests and rehearsals: now and then it takes over for a while, with
    the actions of the task's scripted expert (`expert_action` of the unwrapped environment).

    `probability`: per step, to take over for `steps`. `noise` on its actions: as a standard deviation in [-1, 1].
    """

    def __init__(self, probability: float = 1.0, steps: int = 20, seed: int = 0, noise: float = 0.0):
        self.probability = probability
        self.steps = steps
        self.noise = noise
        self.left = 0
        self.rng = np.random.default_rng(seed)

    def read(self, env: gym.Env) -> np.ndarray | None:
        self.left -= self.left > 0
        if not self.left and self.rng.random() < self.probability:
            self.left = self.steps
        if not self.left:
            return None
        try:
            action = env.unwrapped.expert_action()
        except RobotError as error:  # the step itself will say so, too
            self.fault = str(error)
            return None
        self.fault = ""
        space = env.action_space
        eps = self.noise * (space.high - space.low) / 2 * self.rng.standard_normal(space.shape)
        return np.clip(action + eps, space.low, space.high).astype(space.dtype)


class Intervention(gym.Wrapper):
    """A person may take over, and keeps control for `hold_s` after the last input, in which the arm
    stands still: between two nudges the policy does not act. (HIL-SERL takes over only while the
    input is not zero, serl_robot_infra/franka_env/envs/wrappers.py:230.)

    `info`: "intervened"; "policy_action", what the policy wanted; "executed_action", what a replay
    buffer must store; "intervene_action", the same, if it is the person's; "teleop_fault".
    """

    def __init__(self, env: gym.Env, teleop: Teleop, hold_s: float = 0.4):
        super().__init__(env)
        self.teleop = teleop
        self.hold_steps = round(hold_s * env.metadata.get("render_fps", 10))
        self.left = 0  # steps for which the person keeps control

    def reset(self, **options: Any) -> tuple:
        result = self.env.reset(**options)
        self.teleop.forget()
        self.left = 0
        return result

    def step(self, action: np.ndarray) -> tuple:
        human = self.teleop.read(self.env)
        if human is not None:
            self.left = self.hold_steps
        elif self.left:
            self.left -= 1
            human = np.zeros(self.action_space.shape, self.action_space.dtype)
        asked = action if human is None else human
        *step, info = self.env.step(asked)
        if "executed_action" not in info:  # a task that does not tell
            space = self.action_space
            info["executed_action"] = np.clip(asked, space.low, space.high).astype(space.dtype)
        info["intervened"] = human is not None
        info["policy_action"] = action
        info["teleop_fault"] = self.teleop.fault
        if human is not None:
            info["intervene_action"] = info["executed_action"]
        return *step, info

    def close(self) -> None:
        self.teleop.close()
        super().close()


# --- Environment ------------------------------------------------------------------------------------------------------
@dataclass
class TaskConfig:
    """A task on the real or simulated robot; defaults: SERL's peg insertion (peg_env/config.py), in a wider box."""

    name: str = "peg"
    env_id: str | None = None  # the task that a simulated server must serve (None: any)
    server: str = SERVER
    keys: str | None = None  # folder with CURVE keys
    hz: float = 10.0  # steps per second; below 4 the server's watchdog holds the arm between two
    max_episode_steps: int = 100  # then the episode is truncated

    # where an episode starts: x, y, z (m), roll, pitch, yaw (rad); shifted by up to this: x, y, yaw
    reset_pose: tuple[float, ...] = (0.5, 0.0, 0.14, np.pi, 0.0, 0.0)
    random_reset: tuple[float, float, float] = (0.05, 0.05, np.pi / 6)
    reset_tolerance: tuple[float, float] = (0.01, 0.1)  # so near must it come (m per axis, rad),
    reset_still_s: float = 0.3  # and stand still there for this long
    reset_speed: float = 0.1  # m/s on the way there
    reset_joints_every: int = 200  # episodes between two moves to reset_joints (0: never)
    reset_joints: tuple[float, ...] = (0.0, -0.26, 0.0, -2.43, 0.0, 2.17, np.pi / 4)  # rad
    recover_at_reset: bool = True  # else reset() raises after a fault: see RECOVER
    wait_s: float = 60.0  # how long reset() waits for a server or a camera that is away

    # what an action of 1 adds to the target: m, and rad (three entries: a task without rotation)
    action_scale: tuple[float, ...] = (0.02, 0.02, 0.02, 0.1, 0.1, 0.1)
    # safety box of the target: x, y, z (m); from reset_pose: roll, pitch, yaw (rad), base's axes
    workspace: tuple[tuple[float, float], ...] = (
        (0.4, 0.6), (-0.1, 0.1), (0.05, 0.2), (-0.1, 0.1), (-0.1, 0.1), (-0.8, 0.8)
    )  # fmt: skip
    # actions and observations in the tcp's frame, its pose from where the episode began
    relative_frame: bool = True
    compliance: Gains = field(
        default_factory=lambda: Gains(clip=(0.003, 0.003, 0.01), rotational_clip=(0.02, 0.02, 0.02))
    )  # gains during the episode
    # gains on the way to its start: SERL's, damped, so that no speed is above 0.25 m/s and 1 rad/s
    precision: Gains = field(default_factory=lambda: Gains(3000.0, 120.0, 300.0, 15.0))

    # binary: its action closes (+) or opens (-) beyond +-0.5; continuous: it is added to the closure
    gripper: Literal["fixed", "binary", "continuous"] = "binary"
    gripper_at_reset: Literal["open", "close", "keep"] = "keep"
    gripper_penalty: float = 0.0  # per change of closure: info["grasp_penalty"] (HIL-SERL: 0.02)
    gripper_wait_s: float = 0.0  # a step waits at most this long for it, and is late (SERL: 0.6)

    # what is observed, `proprio` in "state"
    proprio: tuple[str, ...] = ("gripper", "tcp_force", "tcp_pose", "tcp_torque", "tcp_vel")
    cameras: tuple[CameraConfig, ...] = (CameraConfig("front"), CameraConfig("wrist"))
    image_size: int = 128  # pixels
    max_image_age_s: float = 0.3  # an older picture ends the episode

    # 1 at success: tcp within `tolerance` (m along each axis, rad) of `goal_pose`; or what the
    # simulated robot's task says; or nothing
    reward: Literal["pose", "task", "none"] = "pose"
    terminate_on_success: bool = True  # else it goes on, as when frames of success are collected
    goal_pose: tuple[float, ...] = (0.5, 0.0, 0.06, np.pi, 0.0, 0.0)
    tolerance: tuple[float, float] = (0.01, 0.2)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """From what `asdict` made, also by way of JSON: so a dataset knows its environment."""
        parts = {name: Gains(**values[name]) for name in ("compliance", "precision")}
        parts["cameras"] = tuple(CameraConfig(**camera) for camera in values["cameras"])
        return cls(**(values | parts))

    def check(self) -> None:
        """Raises ValueError when settings contradict each other."""
        axes = len(self.action_scale)
        if axes not in (3, 6) or len(self.workspace) != axes or min(self.action_scale) <= 0:
            raise ValueError("TaskConfig: action_scale and workspace have 3 entries, or 6 with rotation, all above 0")
        low, high = np.array(self.workspace).T
        start = np.array([*self.reset_pose[:3], 0, 0, 0])[:axes]  # the angles count from there
        spread = np.array([*self.random_reset[:2], 0, 0, 0, self.random_reset[2]])[:axes] - 1e-9  # 0.3 - 0.1 < 0.2
        if (low > high).any() or (start - spread < low).any() or (start + spread > high).any():
            raise ValueError("TaskConfig: workspace must be from low to high, and hold reset_pose, shifted at most")
        if self.hz < 4 or not set(self.proprio) <= set(PROPRIO):
            raise ValueError(f"TaskConfig: hz is at least 4, and proprio names some of {sorted(PROPRIO)}")
        names = ["state", *(camera.name for camera in self.cameras)]
        serials = [camera.serial for camera in self.cameras if camera.kind == "realsense"]
        if len(set(names)) < len(names) or len(set(serials)) < len(serials):
            raise ValueError("TaskConfig: each camera needs its own name, not 'state', and its own serial number")
        for camera in self.cameras:
            left, upper, right, lower = camera.crop or (0, 0, 1, 1)
            if not (0 <= left < right <= 1 and 0 <= upper < lower <= 1):
                raise ValueError(f"TaskConfig: crop of camera {camera.name}: give left, upper, right, lower, 0 to 1")

    def observation_space(self) -> spaces.Dict:
        sizes = PROPRIO | {"tcp_vel": len(self.action_scale)}
        size = sum(sizes[name] for name in self.proprio)
        parts = {"state": spaces.Box(-np.inf, np.inf, (size,), np.float32)}
        for camera in self.cameras:
            parts[camera.name] = spaces.Box(0, 255, (self.image_size, self.image_size, 3), np.uint8)
        return spaces.Dict(parts)

    def fingerprint(self) -> dict[str, Any]:
        """What gives actions and observations their meaning, in plain JSON values. Data, classifier
        and policy belong together only where it is the same."""
        values = {name: value for name, value in asdict(self).items() if name in MEANING}
        return json.loads(json.dumps({"version": 1} | values))


MEANING = ("name", "hz", "reset_pose", "random_reset", "action_scale", "workspace", "relative_frame")
MEANING += ("compliance", "gripper", "proprio", "cameras", "image_size")
PROPRIO = {"gripper": 1, "tcp_force": 3, "tcp_pos": 3, "tcp_pose": 7, "tcp_torque": 3, "tcp_vel": 6}
MAX_STATE_AGE_S = 0.5
RESET_HZ = 20  # targets per second on the way to the start pose
LEASE_S = 3.0  # outlives a front of the server; without targets the arm holds long before
GRIPPER_THRESHOLD = 0.5  # of a binary gripper's action
# TASK: two examples to copy; their spaces are those of franka_sim's tasks with pixels.
PEG = TaskConfig(
    env_id="FrankaPegInsert-v0",
    cameras=(
        CameraConfig("front", crop=(0.46, 0.58, 0.74, 0.86)),
        CameraConfig("wrist", crop=(0.2, 0.4, 0.8, 1.0)),
    ),
)
PICK = TaskConfig(
    name="pick",
    env_id="FrankaPickCube-v0",
    reset_pose=(0.45, 0.0, 0.3, np.pi, 0.0, 0.0),
    random_reset=(0.0, 0.0, 0.0),
    workspace=((0.2, 0.6), (-0.3, 0.3), (0.012, 0.5)),
    action_scale=(0.02, 0.02, 0.02),
    relative_frame=False,
    proprio=("gripper", "tcp_pos", "tcp_vel"),
    gripper_at_reset="open",
    compliance=Gains(),
    reward="task",
)
TASKS = {"peg": PEG, "pick": PICK}


def task_named(name: str, **changes: Any) -> TaskConfig:
    """An entry of TASKS, with these changes. Exits with one line when there is none."""
    if name not in TASKS:
        fail(f"--task {name}: there are {', '.join(TASKS)}; add yours to TASKS in robot_client.py")
    return replace(TASKS[name], **changes)


def closure_after(value: float, closure: float | None, gripper: str) -> float | None:
    """The gripper's closure, 0 to 1, that the last number of an action asks for (None: not known)."""
    if gripper == "continuous" and closure is not None:
        return float(np.clip(closure + value, 0, 1))
    if gripper == "binary" and abs(value) >= GRIPPER_THRESHOLD:
        return float(value > 0)
    return closure


class FrankaEnv(gym.Env):
    """The robot behind robot_server.py as SERL's FrankaEnv; `reset` is the first to contact it.

    Observation: `state`, the values that `proprio` names, and (size, size, 3) uint8 of each camera. In the base frame
    or, with `relative_frame`, in the tcp's: gripper 0 (open) to 1 (closed); force and torque of the surroundings on the
    tcp, N, Nm; tcp_pose m and quaternion; tcp_vel m/s, rad/s.
    Action in [-1, 1]: translation, rotation vector, gripper (+ closes, as in franka_sim).
    `info`: "success"; "fault", why the episode ended early, if it did; "reflexes" so far; "asked_action" and
    "executed_action", what the box left of it; "limited" by the server; "grasp_penalty"; "robot_time" of the
    observation, s; "period_s" since the last step and "late_s" after its beat, both by the robot's clock and as they
    really were; "overruns", steps of this episode for which no time was left.
    A reflex terminates; a lost server, lease or camera, any other fault, and time's end truncate.
    `reset` then waits for what is missing; if that does not come back, RobotError names the remedy.
    """

    # alone: a second environment on the same robot would take it away from this one
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10, "alone": True}

    def __init__(self, config: TaskConfig | dict | None = None, render_mode: str | None = None):
        """Raises ValueError for settings that contradict each other."""
        if isinstance(config, dict):
            config = TaskConfig.from_dict(config)
        self.config = config or TaskConfig()
        self.config.check()
        self.render_mode = render_mode
        self.metadata = self.metadata | {"render_fps": self.config.hz}
        self.axes = len(self.config.action_scale)
        self.observation_space = self.config.observation_space()
        self.action_space = spaces.Box(-1, 1, (self.axes + (self.config.gripper != "fixed"),), np.float32)
        self.reset_pose = pose_from_euler(self.config.reset_pose)
        self.goal_pose = pose_from_euler(self.config.goal_pose)
        self.scale = np.array(self.config.action_scale)
        self.low, self.high = np.array(self.config.workspace).T
        self.client: RobotClient | None = None
        self.scene: Scene | None = None
        self.cameras: list[Camera] = []
        self.episodes = 0
        self.reflexes = 0
        self.elapsed_steps = 0
        self.origin = self.reset_pose  # of the observed pose, in a relative frame
        self.closure = 0.0  # of the gripper, as commanded
        self.ordered: float | None = None  # the closure in targets: none until an action changes it
        self.executed = np.zeros(self.action_space.shape, np.float32)  # the last action, as far as the box allowed it
        self.stops = "", 0  # the server's id, and how often others had asked to stop when `told`
        self.told = True  # whether who stopped the robot was asked, since; starting a script is an answer, too
        self.give_up: Callable[[], bool] = lambda: False  # whether a reset shall end on its way

    # Reset
    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        """`options`: {"keep_scene": True} leaves a simulated scene as it is; {"give_up": function} is
        asked on the way: when it says so, the arm holds where it is, and RobotError is raised."""
        super().reset(seed=seed)
        options = options or {}
        self.give_up = options.get("give_up", lambda: False)
        scene_seed = int(self.np_random.integers(2**31))
        x, y, yaw = self.np_random.uniform(-1, 1, 3) * self.config.random_reset
        start_pose = moved(self.reset_pose, np.array([x, y, 0, 0, 0, yaw]))
        for attempt in range(3):
            self.connect()
            try:
                self.prepare(start_pose, None if options.get("keep_scene") else scene_seed)
                break
            except (RefusedError, UnreachableError) as error:  # a reflex, a server just started again
                if by_person(str(error)):
                    raise self.stopped(str(error)) from error
                if "move_joints: the tcp left" in str(error):  # another try would move the arm out again
                    raise RobotError(f"{error} to reset_joints; change one of the three", "bad_argument") from error
                if attempt == 2 and any(why in str(error) for why in ("reflex", "in its way", "tcp left", "max-force")):
                    raise self.stopped(str(error), "three times on the way to the start") from error
                if attempt == 2 or not self.config.recover_at_reset:
                    raise
        arrived = time.monotonic()
        for camera in self.cameras:
            camera.wait_newer(arrived, 1.0)
        self.look()
        self.origin = self.state["tcp_pose"]
        self.target = self.state["reference"]
        self.elapsed_steps = 0
        self.closure = self.measured_closure()
        if self.config.gripper == "binary":
            self.closure = float(self.state["gripper_holding"] or self.closure > 0.5)  # what it holds may be wide
        self.ordered = None
        self.executed = np.zeros_like(self.executed)
        self.episodes += 1
        obs, fault = self.observe()
        if fault:
            raise RobotError(fault)
        self.pace = self.client.pace(self.config.hz)
        info = {"success": False, "fault": None, "reflexes": self.reflexes}
        return obs, info | {"robot_time": self.state["robot_time"]}

    def stopped(self, *why: str) -> StoppedError:
        """To be raised, once: with the next reset() the robot may move."""
        self.told = True
        return StoppedError(*why)

    def ask_first(self) -> dict:
        """The state, before the arm moves. StoppedError when a person has stopped it since the last `told`."""
        state = self.client.state()
        fault = state.get("fault")
        stop = f"{fault['code']}: {fault['message']}" if fault else state.get("held") or ""
        stops = state.get("server_id"), state.get("stops", 0)
        if self.told or stops[0] != self.stops[0]:  # a server that was started again counts anew
            self.stops = stops
        if by_person(stop) and not self.told:
            raise self.stopped(stop)
        if stops[1] > self.stops[1]:  # a request of ours overtook it
            self.client.call("hold")
            raise self.stopped("a client asked to hold or to stop")
        return state

    def connect(self) -> None:
        """Find server and cameras, check that the task fits, become the robot's commander."""
        config = self.config
        self.client = self.client or RobotClient(config.server, config.keys)
        self.hello = self.client.hello(config.wait_s, self.give_up)
        if wrong := self.misfit():
            raise RobotError(f"TaskConfig does not fit {config.server}: {wrong}")
        served = self.hello["robot"]["task"]
        if self.scene is None and served and any(camera.kind == "sim" for camera in config.cameras):
            self.scene = Scene(served)
        if not self.cameras:
            self.cameras = [make_camera(camera, config.image_size, self.scene) for camera in config.cameras]
        for camera in self.cameras:
            camera.start(config.wait_s)
        self.client.acquire(LEASE_S, wait_s=LEASE_S + 1)

    def misfit(self) -> str:
        """What the server cannot do that the task asks for, if there is something."""
        config = self.config
        limits = self.hello["limits"]
        low, high = limits["workspace_low"], limits["workspace_high"]
        served = self.hello["robot"]["task"]
        if np.linalg.norm(self.scale[:3]) > limits["max_jump"] / 2:
            return f"action_scale {config.action_scale[:3]} is too large for --max-jump"
        if np.linalg.norm(self.scale[3:]) > limits["max_rotation_jump"] / 2:
            return f"action_scale {config.action_scale[3:]} is too large for --max-rotation-jump"
        if np.any(self.low[:3] < low) or np.any(self.high[:3] > high):
            return f"the workspace reaches beyond {low}, {high}"
        if config.reward == "task" and not served:
            return "reward='task' needs a simulated robot"
        if config.env_id and served and served != config.env_id:
            return f"the task {config.name!r} is not {served}; start robot_server.py --env-id {config.env_id}"
        if config.gripper != "fixed" and self.hello["gripper"]["kind"] == "none":
            return "without a gripper it must be 'fixed'"
        return ""

    def prepare(self, start_pose: np.ndarray, scene_seed: int | None) -> None:
        """Bring all to where an episode starts. TASK: regrasp, lift, clear the way."""
        config, client = self.config, self.client
        state = self.ask_first()
        if self.told:
            client.call("hold")  # from here on only another stop is another's
            self.told = False
        if fault := state["fault"]:
            if not config.recover_at_reset:
                raise RefusedError(f"{fault['message']}; {RECOVER}", "fault")
            client.job("recover")
        if client.state()["mode"] != "idle":
            client.stop()
        if state["gripper_fault"] and config.gripper != "fixed":
            raise RobotError(f"{state['gripper_fault']}; {ACTIVATE}")
        self.ask_first()
        if self.hello["robot"]["task"] and scene_seed is not None:
            client.job("reset_task", seed=scene_seed)
        if config.gripper_at_reset != "keep":
            client.job("gripper", action=config.gripper_at_reset)
        self.ask_first()
        client.job("start", **asdict(config.precision))
        lifted = client.state()["reference"]
        lifted[2] = max(lifted[2], self.reset_pose[2])  # out of whatever the tcp is in
        self.go_to(lifted)
        every = config.reset_joints_every
        if every and self.episodes % every == every - 1:
            client.stop()
            self.ask_first()
            client.job("move_joints", q=config.reset_joints)
            client.job("start", **asdict(config.precision))
        self.go_to(start_pose)
        client.call("gains", **asdict(config.compliance))
        self.go_to(start_pose, config.reset_still_s)

    def go_to(self, pose: np.ndarray, still_s: float = 0.0) -> None:
        """Stream targets on a straight line to `pose`, no faster than the arm follows, until it has
        stood still there for this long. RefusedError if it does not, RobotError if given up."""
        near, aligned = self.config.reset_tolerance
        start = self.client.state()["reference"]
        motion = difference(pose, start)
        way = max(np.linalg.norm(motion[:3]), np.linalg.norm(motion[3:]) / 5)  # 5 rad for each m
        steps = max(math.ceil(RESET_HZ * way / self.config.reset_speed), 1)
        pace = self.client.pace(RESET_HZ)
        step = 1
        still = 0  # beats
        for _ in range(3 * steps + 120):
            target = moved(start, motion * min(step / steps, 1))
            self.client.target(target)
            pace.wait()
            if self.give_up():
                self.client.call("hold")
                raise RobotError("the reset was given up, the arm holds")
            state = self.ask_first()
            lag = difference(target, state["reference"])
            if np.linalg.norm(lag[:3]) < 0.05 and np.linalg.norm(lag[3:]) < 0.25:
                step += 1
            off = difference(state["tcp_pose"], pose)
            turn = np.linalg.norm(off[3:])
            speed = np.abs(state["tcp_vel"])
            there = step > steps and np.abs(off[:3]).max() < near and turn < aligned
            still = still + 1 if there and speed[:3].max() < 0.01 and speed[3:].max() < 0.05 else 0
            if still > RESET_HZ * still_s:
                return
        raise RefusedError(
            f"reset: the tcp stands {np.round(off[:3], 3)} m and {turn:.2f} rad off, "
            f"or moves at {speed[:3].max():.3f} m/s; is something in its way?",
            "failed",
        )

    # Step
    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        asked = self.checked(action)
        info: dict[str, Any] = {"limited": [], "grasp_penalty": 0.0, "period_s": 0.0, "late_s": 0.0}
        info["asked_action"] = asked.astype(np.float32)
        info["executed_action"] = np.zeros(asked.shape, np.float32)
        try:
            info["executed_action"] = self.executed = self.command(asked, info).astype(np.float32)
            info["period_s"], info["late_s"] = self.pace.wait()
            self.look()
            latched = self.state["fault"]
            fault = self.failed_order()
            if self.config.gripper != "fixed":
                fault = self.state["gripper_fault"] or fault
            if latched:
                fault = latched["message"]
        except RobotError as error:
            latched = error.reply.get("fault")
            fault = str(error)
        reflex = bool(latched) and latched["code"] == "reflex"
        if reflex:  # also one that came before this action: the last that moved the arm led to it
            info["executed_action"] = self.executed
        self.reflexes += reflex
        self.elapsed_steps += 1
        obs, camera_fault = self.observe()
        fault = fault or camera_fault
        success = not fault and self.is_success()
        terminated = reflex or (success and self.config.terminate_on_success)
        truncated = bool(fault) or self.elapsed_steps >= self.config.max_episode_steps
        info["success"] = success
        info["fault"] = fault or None
        info["reflexes"] = self.reflexes
        info["overruns"] = self.pace.overruns
        info["robot_time"] = self.state["robot_time"]
        return obs, float(success), terminated, truncated and not terminated, info

    def checked(self, action: np.ndarray) -> np.ndarray:
        """Within -1..1. ValueError for another shape, NaN, infinity: the arm then holds."""
        values = np.asarray(action, dtype=np.float64)
        if values.shape != self.action_space.shape or not np.isfinite(values).all():
            raise ValueError(f"the action must be {self.action_space.shape} finite numbers, not {values}")
        return np.clip(values, -1, 1)

    def command(self, values: np.ndarray, info: dict) -> np.ndarray:
        """Move target and gripper on. Returns the action as far as the box allows it."""
        motion = np.zeros(6)
        motion[: self.axes] = values[: self.axes] * self.scale
        start = self.last_target()
        self.target = self.inside_box(moved(start, self.action_to_base(motion)))
        closure = closure_after(values[-1], self.closure, self.config.gripper)
        change = abs(closure - self.closure)
        if change:
            self.closure = self.ordered = closure
        told = self.client.target(self.target, self.ordered)["result"]
        info["grasp_penalty"] = -self.config.gripper_penalty * change  # of what was not refused
        info["limited"] = told["limited"] if told else []  # nothing is told if an answer was lost
        if change and self.config.gripper_wait_s:
            self.wait_for_gripper()
        executed = self.base_to_action(difference(self.target, start))[: self.axes] / self.scale
        return np.clip(np.append(executed, values[self.axes :]), -1, 1)

    def last_target(self) -> np.ndarray:
        """(7,) what an action moves on from: the last target, at most half an action ahead of the
        server's reference. So single actions are carried out in full although the server takes its
        time, and where the arm is blocked or too slow, the target waits for it."""
        reference = self.state["reference"]
        lead = difference(self.target, reference)
        lead[:3] = shortened(lead[:3], self.scale[:3].max() / 2)
        lead[3:] = shortened(lead[3:], self.scale[3:].max(initial=0.0) / 2)
        return moved(reference, lead)

    def inside_box(self, pose: np.ndarray) -> np.ndarray:
        """(7,) the nearest pose in the workspace; its angles count from the reset pose."""
        position = np.clip(pose[:3], self.low[:3], self.high[:3])
        turn = rotation(pose)
        if self.axes == 6:
            reset = rotation(self.reset_pose)
            euler = (turn * reset.inv()).as_euler("xyz")
            turn = Rotation.from_euler("xyz", np.clip(euler, self.low[3:], self.high[3:])) * reset
        return np.append(position, turn.as_quat())

    def wait_for_gripper(self) -> None:
        """Until the fingers stand, at most `gripper_wait_s`; targets keep the watchdog content."""
        end = self.client.robot_time() + self.config.gripper_wait_s
        while self.client.robot_time() < end:
            time.sleep(0.02)
            job = self.client.target(self.target, self.ordered)["jobs"]["gripper"]
            if not job or job["status"] in ("done", "failed"):
                return

    def failed_order(self) -> str:
        """Why the gripper did not do what an action of this episode asked for, if so."""
        job = self.state["jobs"]["gripper"]
        if self.ordered is None or not job or job["op"] != "target" or job["status"] != "failed":
            return ""
        return f"gripper: {job['error']}"

    def stand_still(self) -> tuple[dict[str, np.ndarray], str]:
        """Instead of a step, while a script pauses: keep arm and gripper as they are until the next
        beat. Returns as `observe` does then. Raises RobotError if the robot does not, or before a reset."""
        if not self.episodes:
            raise RobotError("nothing moves before the first reset")
        self.target = self.last_target()  # it stays where a person pushed it, as in the server's hold
        self.client.target(self.target, self.ordered)
        self.pace.wait()
        self.look()
        return self.observe()

    # What is observed
    def look(self) -> None:
        """Ask for state and, on a simulated robot, task and scene. RobotError for an old state."""
        self.state = self.client.state()
        if (age := self.state["state_age"]) > MAX_STATE_AGE_S:
            raise RobotError(f"the robot's newest state is {age:.2f} s old: does its SDK hang?")
        self.task: dict[str, Any] = {}
        if self.scene or self.config.reward == "task":
            self.task = self.client.call("task")["result"]
        if self.scene:
            self.scene.put(self.task["scene"])

    def observe(self) -> tuple[dict[str, np.ndarray], str]:
        """The observation, and what is wrong with a camera."""
        state = self.state
        fault = ""
        if self.config.relative_frame:
            pose = relative_pose(state["tcp_pose"], self.origin)
        else:
            pose = state["tcp_pose"].copy()
            if pose[3:] @ self.reset_pose[3:] < 0:
                pose[3:] *= -1  # one sign, or the network sees jumps
        wrench = self.base_to_action(np.concatenate([state["tcp_force"], state["tcp_torque"]]))
        values = {
            "gripper": [self.measured_closure()],
            "tcp_pos": pose[:3],
            "tcp_pose": pose,
            "tcp_force": wrench[:3],
            "tcp_torque": wrench[3:],
            "tcp_vel": self.base_to_action(state["tcp_vel"])[: self.axes],
        }
        proprio = np.concatenate([values[name] for name in self.config.proprio])
        obs = {"state": proprio.astype(np.float32)}
        for camera in self.cameras:
            try:
                frame = camera.read(self.config.max_image_age_s)
            except RobotError as error:
                frame = camera.frame
                fault = str(error)
            obs[camera.config.name] = frame.image.copy()
        return obs, fault

    def measured_closure(self) -> float:
        width = self.hello["gripper"]["max_width"]
        return 1 - self.state["gripper_width"] / width if width else 0.0

    def action_to_base(self, motion: np.ndarray) -> np.ndarray:
        """(6,) translation and rotation vector from the action's frame to the base's, both turned.
        SERL's adjoint (franka_env/utils/transformations.py:19) adds a rotation to translations."""
        return self.frame().apply(motion.reshape(2, 3)).ravel()

    def base_to_action(self, motion: np.ndarray) -> np.ndarray:
        """(6,) the other way round, for what a person does in the base frame."""
        return self.frame().apply(motion.reshape(2, 3), inverse=True).ravel()

    def frame(self) -> Rotation:
        """Of actions, seen from the base."""
        return rotation(self.state["tcp_pose"]) if self.config.relative_frame else Rotation.identity()

    def is_success(self) -> bool:
        """TASK: what success is, where no classifier around this environment says so."""
        if self.config.reward == "task":
            return self.task["success"]
        if self.config.reward == "none":
            return False
        near, aligned = self.config.tolerance
        off = np.abs(difference(self.state["tcp_pose"], self.goal_pose))
        return bool(off[:3].max() < near and off[3:].max() < aligned)

    def expert_action(self) -> np.ndarray:
        """(A,) action of the simulated task's scripted expert; RefusedError on a real robot."""
        expert = (self.task or self.client.call("task")["result"])["expert"]
        motion = self.base_to_action(difference(np.array(expert["pose"]), self.last_target()))
        action = np.append(motion[: self.axes] / self.scale, 2 * expert["close"] - 1)
        return np.clip(action, -1, 1)[: self.action_space.shape[0]].astype(np.float32)

    def render(self) -> np.ndarray | None:
        """The newest pictures side by side, (size, cameras x size, 3) uint8."""
        images = [camera.frame.image for camera in self.cameras if camera.frame]
        return np.concatenate(images, axis=1) if images and self.render_mode else None

    def close(self) -> None:
        """Stop the cameras and give the robot back: it holds, and is idle two seconds later."""
        for closing in (*self.cameras, self.scene, self.client):
            if closing:
                closing.close()
        self.cameras, self.scene, self.client = [], None, None


# `__name__`, because this file is a script, too.
gym.register("FrankaReal-v0", f"{__name__}:FrankaEnv")


# --- Main -------------------------------------------------------------------------------------------------------------
@dataclass
class Doctor:
    """Checks what a script on the robot needs, a line each, as robot_server.py --doctor does.
    Keeps what works, `client`, `scene`, `cameras` and `teleop`, and counts what does not."""

    args: Args
    failed: int = 0
    client: RobotClient | None = None
    scene: Scene | None = None
    cameras: list[Camera] = field(default_factory=list)
    teleop: Teleop | None = None

    def say(self, fine: bool | None, name: str, text: str, remedy: str = "") -> None:
        self.failed += tell(fine, name, text, remedy)

    def examine(self) -> None:
        names = ("numpy", "gymnasium", "pyzmq", "msgpack")
        packages = [f"{name} {importlib.metadata.version(name)}" for name in names]
        self.say(True, "python", f"{platform.python_version()}, {', '.join(packages)}")
        self.attempt("server", self.examine_server)
        self.attempt("realsense", self.examine_realsense, wrong=None)  # in simulation there is none
        for camera in list(self.cameras):
            if not self.attempt("cameras", camera.start):
                self.cameras.remove(camera)
        self.attempt("teleop", self.open_teleop)

    def attempt(self, name: str, check: Callable[[], object], wrong: bool | None = False) -> bool:
        """Whether a check ends well; else a line that says why not."""
        try:
            check()
        except RobotError as error:
            self.say(wrong, name, str(error))
            return False
        return True

    def examine_server(self) -> None:
        """What the server says about itself."""
        if self.args.keys and (secret := Path(self.args.keys) / "client.key_secret").exists():
            private = not secret.stat().st_mode & 0o077
            self.say(private or None, "keys", str(secret), f"others can read it: chmod 600 {secret}")
        client = RobotClient(self.args.server, self.args.keys)
        hello = client.hello()
        self.client = client
        times = []
        for _ in range(200):
            start = time.perf_counter()
            state = client.state()
            times.append(1000 * (time.perf_counter() - start))
        median, slow = np.percentile(times, (50, 99))
        robot, gripper, fault = hello["robot"], hello["gripper"], state["fault"]
        self.say(True, "server", f"{client.server}, commanded by {hello['lease'] or 'nobody'}")
        facts = [robot[name] for name in ("kind", "sdk", "firmware", "task") if robot[name]]
        self.say(True, "robot", f"{', '.join(map(str, facts))}, mode {state['mode']}")
        text = f"{median:.2f} ms, 99 % below {slow:.2f} ms"
        self.say(slow < 20 or None, "round trip", text, "a cable, no WLAN?")
        self.say(not fault, "fault", fault["message"] if fault else "none", RECOVER)
        text = f"{gripper['kind']}, {1000 * state['gripper_width']:.0f} mm open"
        broken = state["gripper_fault"]
        self.say(not broken, "gripper", broken or text, f"power, cable; {ACTIVATE}")
        text = f"{state['success_rate']:.0%} of the packets arrive"
        self.say(state["success_rate"] >= 0.95, "control", text, "robot_server.py --doctor")
        if robot["task"]:
            self.scene = Scene(robot["task"])
            self.cameras += [SimCamera(CameraConfig(name), 128, self.scene) for name in self.scene.cameras]

    def examine_realsense(self) -> None:
        """The RealSense cameras that are plugged in; none is fine, too."""
        rs = import_realsense()
        devices = realsense_devices(rs)
        self.say(True, "realsense", f"pyrealsense2 {rs.__version__}, {len(devices)} plugged in")
        for serial, device in devices.items():
            name = device.get_info(rs.camera_info.name)
            usb = device.get_info(rs.camera_info.usb_type_descriptor)
            self.say(usb.startswith("3"), f"camera {serial}", f"{name}, USB {usb}", "USB 3 needs its cable and port")
            self.cameras.append(RealSense(CameraConfig(serial, "realsense", serial)))

    def open_teleop(self) -> None:
        if self.args.teleop != "none":
            self.teleop = open_teleop(self.args.teleop)
            self.say(True, "teleop", self.args.teleop)

    def look(self) -> None:
        """Put the simulated cameras where the simulated robot is."""
        if self.scene:
            self.scene.put(self.client.call("task")["result"]["scene"])

    def save_pictures(self, folder: Path) -> None:
        """One of each camera."""
        self.look()
        folder.mkdir(parents=True, exist_ok=True)
        for camera in self.cameras:
            path = folder / f"{camera.config.name}.png"
            Image.fromarray(camera.read(1.0).image).save(path)
            print(f"wrote {path}")

    def watch(self, end: float) -> None:
        """Show live values until then."""
        while time.monotonic() < end:
            self.look()
            self.show(self.cameras)
            time.sleep(0.2)

    def show(self, cameras: Sequence[Camera]) -> None:
        """Print what is measured in one line, over the last one in a terminal."""
        parts = []
        if self.client:
            state = self.client.state()
            pose = state["tcp_pose"]
            euler = rotation(pose).as_euler("xyz", degrees=True)
            parts.append("{:.3f} {:.3f} {:.3f} m".format(*pose))
            parts.append("{:.0f} {:.0f} {:.0f} deg".format(*euler))
            parts.append("{:.1f} {:.1f} {:.1f} N".format(*state["tcp_force"]))
            parts.append(f"gripper {1000 * state['gripper_width']:.0f} mm")
            parts.append(" ".join([state["mode"], *state["limited"], state["lease"] or "nobody"]))
        for camera in cameras:
            try:
                frame = camera.read(1.0)
                age_ms = 1000 * (time.monotonic() - frame.time)
                parts.append(f"{camera.config.name} {frame.number} {age_ms:.0f} ms")
            except RobotError as error:
                parts.append(str(error))
        if self.teleop:
            motion, gripper = self.teleop.motion()
            parts.append(self.teleop.fault or f"hand {np.round(motion, 2)} {gripper:+.0f}")
        print(f"\r{' | '.join(parts)}\033[K", end="" if sys.stdout.isatty() else "\n", flush=True)

    def drive(self, end: float) -> None:
        """Let a person move the arm slowly, near where it stands, to feel gains and directions."""
        hello = self.client.hello()
        limits = hello["limits"]
        gains = Gains(**hello["gains"])
        pose = self.client.state()["tcp_pose"]
        if (pose[:3] < limits["workspace_low"]).any() or (pose[:3] > limits["workspace_high"]).any():
            where = f"the tcp stands at {pose[:3].round(3).tolist()} m, outside of the server's workspace"
            raise RobotError(f"--drive: {where}, into which it would move by itself; guide it in by hand first")
        around = [pose[:3] - 0.1, pose[:3] + 0.1]
        box = np.clip(around, limits["workspace_low"], limits["workspace_high"]).T
        config = TaskConfig(
            server=self.args.server,
            keys=self.args.keys,
            reset_pose=(*pose[:3], *rotation(pose).as_euler("xyz")),
            random_reset=(0, 0, 0),
            reset_joints_every=0,
            recover_at_reset=False,
            workspace=(*map(tuple, box), *[(-0.3, 0.3)] * 3),
            compliance=gains,
            precision=gains,
            action_scale=(0.01,) * 3 + (0.05,) * 3,
            relative_frame=False,
            gripper="fixed" if hello["gripper"]["kind"] == "none" else "binary",
            cameras=(),
            reward="none",
            max_episode_steps=sys.maxsize,
        )
        terminal = getattr(self.teleop, "terminal", None)
        with contextlib.closing(Intervention(FrankaEnv(config), self.teleop)) as env:
            env.reset(options={"keep_scene": True})
            while time.monotonic() < end and not (terminal and terminal.quits()):
                _, _, terminated, truncated, info = env.step(np.zeros(env.action_space.shape, np.float32))
                self.show(cameras=())
                if terminated or truncated:
                    raise RobotError(info["fault"])

    def close(self) -> None:
        for closing in filter(None, (*self.cameras, self.scene, self.teleop, self.client)):
            closing.close()


def main(args: Args) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # which also gives the terminal back
    doctor = Doctor(args)
    end = None
    try:
        doctor.examine()
        if args.drive and not (doctor.teleop and doctor.client):
            fail("--drive needs a server, and --teleop keyboard or spacemouse, and both to be ok above")
        if args.snapshots:
            doctor.save_pictures(args.snapshots)
        if args.teleop == "keyboard":
            print(KEYS)
        end = time.monotonic() + (args.seconds or math.inf)
        if args.drive:
            doctor.drive(end)
        elif doctor.client or doctor.cameras or doctor.teleop:
            doctor.watch(end)
    except (RobotError, OSError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        if end is None:
            fail("stopped before all was looked at")
    finally:
        if sys.stdout.isatty():
            print()  # below the line that was written over and over
        doctor.close()
    if doctor.failed:
        fail(f"{doctor.failed} to fix, see above")
    print("ready")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
