"""Stands for robosuite: `make`, and a task with robosuite's raw observation names, step and horizon."""

import numpy as np

__version__ = "1.5.2"
made = []


def make(env_name, **kwargs):
    made.append((env_name, kwargs))
    return Lift(**kwargs)


class Lift:
    """The gripper's height follows the third action; solved above 0.5. It never ends by itself."""

    action_spec = (np.full(7, -1.0), np.full(7, 1.0))
    action_dim = 7

    def __init__(self, horizon=1000, ignore_done=False, seed=None, has_offscreen_renderer=True, **kwargs):
        self.horizon, self.ignore_done, self.rng = horizon, ignore_done, np.random.default_rng(seed)
        if has_offscreen_renderer:
            self.sim = self

    def render(self, camera_name, width, height):
        """The sim's, as OpenGL has it: the lowest row first. Dark above, bright below."""
        assert camera_name == "agentview"
        return np.broadcast_to(np.linspace(255, 0, height)[:, None, None], (height, width, 3)).astype(np.uint8)

    def _get_observations(self, force_update=False):
        return {
            "robot0_joint_pos": np.zeros(7),
            "robot0_eef_pos": np.array([0.0, 0.0, self.z]),
            "robot0_eef_quat": np.array([1.0, 0.0, 0.0, 0.0]),
            "robot0_gripper_qpos": np.array([0.02, -0.02]),
            "object-state": np.full(10, self.goal),
        }

    def reset(self):
        self.t, self.z, self.goal = 0, 0.0, float(self.rng.uniform(0.4, 0.6))
        return self._get_observations()

    def step(self, action):
        assert np.shape(action) == (7,) and np.all(np.abs(action) <= 1)
        self.t, self.z = self.t + 1, self.z + 0.2 * float(action[2])
        done = self.t >= self.horizon and not self.ignore_done
        return self._get_observations(), float(self._check_success()), done, {}

    def _check_success(self):
        return self.z > 0.5

    def close(self):
        pass
