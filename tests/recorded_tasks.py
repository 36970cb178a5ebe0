"""Tiny tasks with pictures to record from: `--env-id recorded_tasks:NAME-v0` with this folder in PYTHONPATH."""

import errno
import time

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from robot_client import RobotError

FAR = 0.6  # where an episode starts: on a sphere of this radius
STEP = 0.1  # how far an action of 1 moves the point
NEAR = 0.12  # success


class Reach(gym.Env):
    """A point goes to the origin and may stay there; its picture has one bright pixel."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}
    observation_space = spaces.Dict(
        state=spaces.Box(-10, 10, (3,), np.float32), front=spaces.Box(0, 255, (16, 24, 3), np.uint8)
    )
    action_space = spaces.Box(-1, 1, (3,), np.float32)
    resets = 0

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def render(self):
        return self.observe()["front"]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        Reach.resets += 1
        direction = self.np_random.normal(size=3)
        self.point = FAR * direction / np.linalg.norm(direction)
        return self.observe(), {"success": False}

    def step(self, action):
        self.point = self.point + STEP * np.clip(action, -1, 1)
        info = {"success": bool(np.linalg.norm(self.point) < NEAR)}
        return self.observe(), float(info["success"]), False, False, info

    def observe(self):
        picture = np.full((16, 24, 3), 60, np.uint8)
        row, column = np.clip(np.round(8 + 10 * self.point[:2]), 0, (15, 23)).astype(int)
        picture[row, column] = 255
        return {"state": self.point.astype(np.float32), "front": picture}

    def expert_action(self):
        return np.clip(-self.point / STEP, -1, 1).astype(np.float32)


class Slow(Reach):
    """A reset takes a while, as a robot's does."""

    def reset(self, **options):
        time.sleep(1.0)
        return super().reset(**options)


class Faulty(Reach):
    """The third step of the second episode ends with a camera that stands still."""

    def reset(self, **options):
        self.steps = 0
        return super().reset(**options)

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        self.steps += 1
        if Reach.resets == 2 and self.steps == 3:
            return obs, reward, False, True, info | {"fault": "camera front: newest picture is 0.4 s old"}
        return obs, reward, terminated, truncated, info


class FullDisk(Reach):
    """After the second episode's reset the disk is full."""

    def reset(self, **options):
        import shutil

        result = super().reset(**options)
        if Reach.resets == 2:
            usage = shutil.disk_usage("/")._replace(free=1_000_000)
            shutil.disk_usage = lambda path: usage
        return result


class DiskFills(Reach):
    """The disk fills up during the second episode."""

    def reset(self, **options):
        from common import recording

        def full(path, data):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

        result = super().reset(**options)
        if Reach.resets == 2:
            recording.write_atomically = full
        return result


class Stuck(Reach):
    """In the second episode nothing moves."""

    def step(self, action):
        return super().step(action * (Reach.resets != 2))


class Stopped(Reach):
    """Before the second episode somebody has pressed the robot's stop button."""

    def reset(self, **options):
        result = super().reset(**options)
        if Reach.resets == 2:
            raise RobotError("the stop button is pressed")
        return result


class Silent(Reach):
    """Says nothing about success."""

    def step(self, action):
        *step, _ = super().step(action)
        return *step, {}


class Gripper(Reach):
    """With a gripper, the last action, that nobody uses."""

    action_space = spaces.Box(-1, 1, (4,), np.float32)

    def step(self, action):
        return super().step(action[:3])

    def expert_action(self):
        return np.append(super().expert_action(), np.float32(-1))


class Boxed(Reach):
    """Executes at most half of what is asked for, and says so, as the robot does at the edge of its box."""

    def step(self, action):
        executed = np.clip(action, -0.5, 0.5)
        *step, info = super().step(executed)
        return *step, info | {"executed_action": executed, "asked_action": action}


class Square(Reach):
    """With pictures that a classifier takes."""

    observation_space = spaces.Dict(
        state=spaces.Box(-10, 10, (3,), np.float32), front=spaces.Box(0, 255, (32, 32, 3), np.uint8)
    )

    def observe(self):
        return super().observe() | {"front": np.full((32, 32, 3), 100, np.uint8)}


class Uninstalled(Reach):
    """A package is missing, such as what renders."""

    def __init__(self):
        raise gym.error.DependencyNotInstalled("pygame is not installed")


class TwoCameras(Reach):
    """A second picture."""

    observation_space = spaces.Dict(Reach.observation_space.spaces | {"side": Reach.observation_space["front"]})

    def observe(self):
        obs = super().observe()
        return obs | {"side": obs["front"]}


class TwoSizes(Reach):
    """A second picture, which is higher."""

    observation_space = spaces.Dict(Reach.observation_space.spaces | {"side": Square.observation_space["front"]})

    def observe(self):
        return super().observe() | {"side": np.full((32, 32, 3), 100, np.uint8)}


SETTINGS = (Boxed, Square, TwoCameras, TwoSizes)
for task in (Reach, Slow, Faulty, FullDisk, DiskFills, Stuck, Stopped, Silent, Gripper, Uninstalled, *SETTINGS):
    gym.register(f"{task.__name__}-v0", f"{__name__}:{task.__name__}", max_episode_steps=30)
