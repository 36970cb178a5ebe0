"""Stands for the ogbench package: its one function that the scripts use, with rows of its layout (ogbench/utils.py).

Trajectories of 4 steps; `terminals` marks their last row, `masks` is 0 where the task is solved, rewards are masks - 1.
"""

import gymnasium as gym
import numpy as np
from gymnasium import spaces

LENGTH = 4
calls = []


class Reach(gym.Env):
    """One number goes to 0.5: the action is added to it; solved within 0.1."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = spaces.Box(-1, 1, (1,), np.float32)
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, render_mode=None, **options):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.x = 0, self.np_random.uniform(-0.5, 0.3)
        return np.array([self.x, 1.0]), {}

    def step(self, action):
        self.t, self.x = self.t + 1, self.x + float(action[0])
        solved = abs(self.x - 0.5) < 0.1
        return np.array([self.x, 1.0]), float(solved) - 1, solved, self.t == 10, {"success": float(solved)}

    def render(self):
        return np.full((32, 32, 3), int(np.clip(255 * self.x, 0, 255)), np.uint8)


def rows(trajectories: int, seed: int) -> dict[str, np.ndarray]:
    """Each step goes a third of what is left, the last one all of it."""
    names = ("observations", "actions", "next_observations", "terminals", "rewards", "masks")
    columns = {name: [] for name in names}
    rng = np.random.default_rng(seed)
    for _ in range(trajectories):
        x = rng.uniform(-0.5, 0.3)
        for t in range(LENGTH):
            action = (0.5 - x) * (1.0 if t == LENGTH - 1 else 1 / 3)
            solved = float(abs(x + action - 0.5) < 0.1)
            step = ([x, 1.0], [action], [x + action, 1.0], float(t == LENGTH - 1), solved - 1, 1 - solved)
            for column, value in zip(columns.values(), step, strict=True):
                column.append(value)
            x += action
    return {name: np.array(values, np.float32) for name, values in columns.items()}


def make_env_and_datasets(dataset_name, dataset_dir="~/.ogbench/data", dataset_path=None, env_only=False, **options):
    calls.append((dataset_name, dataset_dir, env_only))
    if dataset_name != "reach-play-singletask-v0":
        raise ValueError(f"{dataset_name} is not a data set")
    env = gym.wrappers.TimeLimit(Reach(options.get("render_mode")), 10)
    return env if env_only else (env, rows(30, 0), rows(5, 1))
