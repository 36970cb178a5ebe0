"""Tiny tasks of known value, and tasks that misbehave: `--env-id probe_envs:NAME-v0` with this folder in PYTHONPATH."""

import sys
import time

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class Probe(gym.Env):
    """Base of one-number tasks: observation and action Box(-1, 1, (1,)), one step unless said otherwise."""

    observation_space = spaces.Box(-1, 1, (1,), np.float32)
    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def observe(self) -> np.ndarray:
        return np.zeros(1, np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        self.draw = float(self.np_random.choice([-1.0, 1.0]))
        return self.observe(), {}


class ConstantReward(Probe):
    """Reward 1, then the episode terminates: Q = 1."""

    def step(self, action):
        return self.observe(), 1.0, True, False, {}


class TruncatedReward(Probe):
    """Reward 1, then the episode is truncated: Q = 1 / (1 - gamma)."""

    def step(self, action):
        return self.observe(), 1.0, False, True, {}


class ObservedReward(Probe):
    """Reward = observation, -1 or 1: Q(obs, .) = obs."""

    def observe(self):
        return np.array([self.draw], np.float32)

    def step(self, action):
        return self.observe(), self.draw, True, False, {}


class TwoSteps(Probe):
    """Observation 0 then 1, reward 0 then 1: Q(0, .) = gamma, Q(1, .) = 1."""

    def observe(self):
        return np.array([self.t], np.float32)

    def step(self, action):
        self.t += 1
        return self.observe() * (self.t < 2), float(self.t == 2), self.t == 2, False, {}


class ActionReward(Probe):
    """Reward 1 - (action - 0.5)^2: the best action is 0.5, Q(., a) = 1 - (a - 0.5)^2."""

    def step(self, action):
        return self.observe(), 1 - float(action[0] - 0.5) ** 2, True, False, {}


class ObservedAction(ObservedReward):
    """Reward -(action - 0.6 * observation)^2: the best action follows the observation, +0.6 or -0.6."""

    def step(self, action):
        return self.observe(), -(float(action[0] - 0.6 * self.draw) ** 2), True, False, {}


class Point(gym.Env):
    """A point in the unit square goes to a goal: Dict observations, actions in [-2, 2] at 20 steps, success, an expert.

    Truncated after 20 steps, terminated early in the left tenth of the square; draws itself without OpenGL.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    action_space = spaces.Box(-2, 2, (3,), np.float32)  # x, y, gripper
    observation_space = spaces.Dict(
        {"point": spaces.Box(-1, 1, (2,), np.float64), "goal": spaces.Box(-1, 1, (2,), np.float64)}
    )

    def __init__(self, render_mode: str | None = None, length: int = 20):
        self.render_mode, self.length = render_mode, length

    def observe(self) -> dict[str, np.ndarray]:
        return {"point": self.point.copy(), "goal": self.goal.copy()}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.point, self.goal = 0, self.np_random.uniform(-0.7, 1, 2), self.np_random.uniform(-0.7, 1, 2)
        return self.observe(), {}

    def expert_action(self) -> np.ndarray:
        return np.append(np.clip(10 * (self.goal - self.point), -2, 2), 2).astype(np.float32)

    def step(self, action):
        self.t += 1
        self.point = np.clip(self.point + 0.1 * np.asarray(action[:2], float), -1, 1)
        distance = float(np.linalg.norm(self.goal - self.point))
        terminated, info = bool(self.point[0] < -0.8), {"success": distance < 0.15}
        return self.observe(), -distance - terminated, terminated, self.t == self.length, info

    def render(self):
        image = np.zeros((64, 64, 3), np.uint8)
        for position, colour in ((self.goal, (0, 255, 0)), (self.point, (255, 0, 0))):
            x, y = (31 * (position + 1)).astype(int)
            image[y : y + 4, x : x + 4] = colour
        return image


class NeverTwiceTheSame(Point):
    """Takes its start from the clock, as a real robot does; ends after 20 steps only."""

    def reset(self, *, seed=None, options=None):
        return super().reset(seed=np.random.SeedSequence().generate_state(1).item())

    def step(self, action):
        obs, reward, _, truncated, info = super().step(action)
        return obs, reward, False, truncated, info


class IdleExpert(Point):
    """Its expert stands still."""

    def expert_action(self):
        return np.zeros(3, np.float32)


class NanReward(Point):
    """Reward NaN in the 130th step of the process."""

    steps = 0

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        NanReward.steps += 1
        return obs, float("nan") if NanReward.steps == 130 else reward, terminated, truncated, info


class NanObservation(Point):
    """Observation NaN in the 130th step of the process."""

    steps = 0

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        NanObservation.steps += 1
        if NanObservation.steps == 130:
            obs["goal"][1] = np.nan
        return obs, reward, terminated, truncated, info


class NanReset(Point):
    """Observation NaN after the fifth reset of the process."""

    resets = 0

    def reset(self, *, seed=None, options=None):
        obs, info = super().reset(seed=seed)
        NanReset.resets += 1
        if NanReset.resets == 5:
            obs["point"][0] = np.nan
        return obs, info


class Crashes(Point):
    """A bug of its own in the 130th step of the process."""

    steps = 0

    def step(self, action):
        Crashes.steps += 1
        if Crashes.steps == 130:
            self.end()
        return super().step(action)

    def end(self):
        raise RuntimeError("the task's own bug")


class Exits(Crashes):
    """Ends the program in the 130th step of the process, as if all were well."""

    def end(self):
        sys.exit(0)


class OddSuccess(Point):
    """Says in words whether it succeeded, from the 130th step of the process on."""

    steps = 0

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        OddSuccess.steps += 1
        return obs, reward, terminated, truncated, {"success": "yes"} if OddSuccess.steps >= 130 else info


class CannotClose(Point):
    """Raises when it is closed, and notes that."""

    def close(self):
        with open("closed.txt", "a") as file:
            file.write("closed\n")
        raise RuntimeError("cannot be closed")


class Images(Probe):
    """Camera images."""

    observation_space = spaces.Box(0, 255, (32, 32, 3), np.uint8)

    def observe(self):
        return np.zeros((32, 32, 3), np.uint8)


class DictImages(Images):
    """A camera image beside the state."""

    observation_space = spaces.Dict({"state": Probe.observation_space, "front": Images.observation_space})


class Unbounded(Probe):
    """Actions without bounds."""

    action_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)


class Sequences(Probe):
    """Observations of changing length."""

    observation_space = spaces.Sequence(spaces.Box(-1, 1, (2,)))


class InPlace(Point):
    """Point that writes its observation into the same arrays and the same dict in each step."""

    def __init__(self, render_mode: str | None = None):
        super().__init__(render_mode)
        self.kept = {"point": np.zeros(2), "goal": np.zeros(2)}

    def observe(self):
        self.kept["point"][:] = self.point
        self.kept["goal"][:] = self.goal
        return self.kept


class OnlyOne(Point):
    """Owns something, such as a robot or a port: there may be one at a time. Each is noted in instances.txt."""

    alive = 0

    def __init__(self, render_mode: str | None = None):
        super().__init__(render_mode)
        if OnlyOne.alive:
            raise RuntimeError("the robot is in use")
        OnlyOne.alive = 1
        with open("instances.txt", "a") as file:
            file.write("made\n")

    def close(self):
        OnlyOne.alive = 0


class Endless(ConstantReward):
    """Never ends an episode, and has no registered time limit; 5 ms a step."""

    def step(self, action):
        time.sleep(0.005)
        return self.observe(), 1.0, False, False, {}


class Spiky(Point):
    """One observation of 1e5 in the 60th step of the process; success under an unusual name."""

    steps = 0

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        Spiky.steps += 1
        if Spiky.steps == 60:
            obs["goal"][1] = 1e5
        return obs, reward, terminated, truncated, {"task_succeeded": info["success"]}


class NanStart(Point):
    """Its very first observation is NaN."""

    def observe(self):
        return super().observe() | {"goal": np.full(2, np.nan)}


class OtherPoint(Point):
    """Point with one more number in the observation."""

    observation_space = spaces.Dict(Point.observation_space.spaces | {"wind": spaces.Box(-1, 1, (1,), np.float64)})

    def observe(self):
        return super().observe() | {"wind": np.zeros(1)}


class PixelPoint(Point):
    """Point whose goal stands only in two images; the last step is truncated."""

    observation_space = spaces.Dict(
        {
            "front": spaces.Box(0, 255, (32, 32, 3), np.uint8),
            "state": spaces.Box(-1, 1, (2,), np.float64),
            "wrist": spaces.Box(0, 255, (32, 32, 3), np.uint8),
        }
    )

    def observe(self):
        image = self.render()[::2, ::2]
        return {"front": image.copy(), "state": self.point.copy(), "wrist": image[::-1].copy()}


class OtherCameras(PixelPoint):
    """PixelPoint with another name for a camera."""

    observation_space = spaces.Dict({k.replace("wrist", "side"): v for k, v in PixelPoint.observation_space.items()})

    def observe(self):
        return {name.replace("wrist", "side"): value for name, value in super().observe().items()}


class GreyImages(Probe):
    """One grey image, 40 x 50, of a bright spot; no states. The best action follows the spot."""

    observation_space = spaces.Box(0, 255, (40, 50), np.uint8)

    def observe(self):
        image = np.zeros((40, 50), np.uint8)
        image[10:30, 30:45] = 250 if self.draw > 0 else 0
        image[10:30, 5:20] = 250 if self.draw < 0 else 0
        return image

    def step(self, action):
        return self.observe(), -(float(action[0] - 0.6 * self.draw) ** 2), True, False, {}


class NoOpenGL(DictImages):
    """As FrankaPickCube-v0 where OpenGL is not installed."""

    def reset(self, *, seed=None, options=None):
        raise RuntimeError("Images need OpenGL, run: apt-get install -y libegl1")


for task in (
    *(ConstantReward, TruncatedReward, ObservedReward, TwoSteps, ActionReward, ObservedAction),
    *(Point, OtherPoint, IdleExpert, NeverTwiceTheSame, NanReward, NanObservation, NanReset, NanStart, InPlace, Spiky),
    *(OnlyOne, Endless, Crashes, Exits, OddSuccess, CannotClose),
    *(Images, DictImages, Unbounded, Sequences, PixelPoint, OtherCameras, GreyImages, NoOpenGL),
):
    limit = None if task is Endless else 1000
    entry_point = f"probe_envs:{task.__name__}"
    gym.register(f"{task.__name__}-v0", entry_point, max_episode_steps=limit, disable_env_checker=True)
