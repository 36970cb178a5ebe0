"""Small data sets in the formats that bc_flow_offline.py reads, and a server that hands them out or fails half way."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import gymnasium as gym
import h5py
import minari
import numpy as np
from forked import SLOW_IMPORTS
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer

SLOW_IMPORTS += ["bc_flow_offline", "offline_data", "h5py"]  # what the fork server imports once


class Steps(gym.Env):
    """Observation [draw, step], the draw by the seed; the reward of a step is its action; `length` steps. The info has
    the draw; its picture is a grey level, the step."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = spaces.Box(-1, 1, (1,), np.float32)
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, render_mode: str | None = None, length: int = 7):
        self.render_mode, self.length, self.taken, self.resets = render_mode, length, [], []

    def observe(self):
        return np.array([self.draw, self.t], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.draw = 0, self.np_random.uniform()
        self.resets.append(seed)
        return self.observe(), {}

    def step(self, action):
        self.taken.append(float(action[0]))
        self.t += 1
        info = {"success": self.draw > 0.5, "draw": self.draw, "name": "text"}
        return self.observe(), float(action[0]), False, self.t == self.length, info

    def render(self):
        return np.full((20, 30, 3), 20 * self.t, np.uint8)


class Ordered(Steps):
    """Its observations are in no alphabetical order."""

    observation_space = spaces.Dict(zeta=spaces.Box(-9, 9, (1,)), alpha=spaces.Box(-9, 9, (1,)))

    def observe(self):
        return {"zeta": np.full(1, 7, np.float32), "alpha": np.full(1, 3, np.float32)}


class Tall(Steps):
    """Actions in 0..10 and -2..2."""

    action_space = spaces.Box(np.array([0, -2], np.float32), np.array([10, 2], np.float32))


class Camera(gym.Env):
    """A bright square on a dark image, left or right; the action is its side. State: one number that says nothing."""

    size = 40
    observation_space = spaces.Dict(
        {"front": spaces.Box(0, 255, (40, 40, 3), np.uint8), "state": spaces.Box(-1, 1, (1,), np.float32)}
    )
    action_space = spaces.Box(-1, 1, (1,), np.float32)
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, render_mode: str | None = None):
        self.render_mode = render_mode

    def observe(self):
        image = np.zeros((self.size, self.size, 3), np.uint8)
        column = self.size // 2 + int(self.side) * self.size // 4
        image[15:25, column - 6 : column + 6] = 255
        return {"front": image, "state": np.zeros(1, np.float32)}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.right, self.side = 0, 0, self.np_random.choice([-1, 1])
        return self.observe(), {}

    def expert_action(self):
        return np.array([0.7 * self.side], np.float32)

    def step(self, action):
        self.t, self.right = self.t + 1, self.right + (action[0] * self.side > 0.2)
        self.side = self.np_random.choice([-1, 1])
        return self.observe(), float(action[0]), False, self.t == 10, {"success": bool(self.right >= 9)}

    def render(self):
        return self.observe()["front"]


class Pictures(Camera):
    """Nothing else is observed."""

    observation_space = Camera.observation_space["front"]

    def observe(self):
        return super().observe()["front"]

    def render(self):
        return self.observe()


for task in (Steps, Ordered, Tall, Camera, Pictures):
    gym.register(f"{task.__name__}-v0", f"offline_data:{task.__name__}", disable_env_checker=True)


# (steps, how it ends) of the episodes in a D4RL file; the last one is cut off by the end of the file
EPISODES = ((6, "timeout"), (3, "terminal"), (5, "timeout"), (4, "both"), (2, "cut"))


def d4rl_rows(
    episodes=EPISODES, obs_dim: int = 17, action_dim: int = 6, next_observations: bool = True
) -> dict[str, np.ndarray]:
    """Rows as D4RL's files hold them, every number telling where it is from: code = 100 * episode + step, observation =
    code + column / 100, action = observation / 1000, reward = step + 1."""
    names = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")
    columns = {name: [] for name in names}
    for number, (length, end) in enumerate(episodes):
        for step in range(length):
            code = 100 * number + step
            last = step == length - 1
            columns["observations"].append(code + np.arange(obs_dim) / 100)
            columns["next_observations"].append(code + 1 + np.arange(obs_dim) / 100)
            columns["actions"].append((code + np.arange(action_dim) / 100) / 1000)
            columns["rewards"].append(step + 1.0)
            columns["terminals"].append(last and end in ("terminal", "both"))
            columns["timeouts"].append(last and end in ("timeout", "both"))
    arrays = {name: np.array(values) for name, values in columns.items()}
    arrays = {name: a if a.dtype == bool else a.astype(np.float32) for name, a in arrays.items()}
    return arrays if next_observations else {k: v for k, v in arrays.items() if k != "next_observations"}


def write_hdf5(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    """A D4RL file: one HDF5 dataset per column, and the groups that real files have beside them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            file.create_dataset(name, data=values, compression="gzip")
        file.create_dataset("infos/qpos", data=np.zeros((len(next(iter(arrays.values()))), 9), np.float32))
        file["metadata/algorithm"] = "SAC"
    return path


ENV_ARGS = {
    "env_name": "Lift",
    "env_version": "1.5.1",
    "type": 1,
    "env_kwargs": {
        "has_renderer": False,
        "has_offscreen_renderer": False,
        "ignore_done": True,
        "use_object_obs": True,
        "use_camera_obs": False,
        "control_freq": 20,
        "controller_configs": {"type": "BASIC", "body_parts": {}},
        "robots": ["Panda"],
        "camera_depths": False,
        "camera_heights": 84,
        "camera_widths": 84,
        "reward_shaping": False,
    },
}
ROBOMIMIC_KEYS = {"robot0_eef_pos": 3, "robot0_eef_quat": 4, "robot0_gripper_qpos": 2, "object": 10}


def robomimic_demos(demos: int = 12, seed: int = 0) -> Iterator[dict[str, np.ndarray]]:
    """Demonstrations of the stand-in's Lift: up until solved, and held there. Demo i has i % 3 + 4 steps."""
    rng = np.random.default_rng(seed)
    for i in range(demos):
        length, goal = i % 3 + 4, rng.uniform(0.4, 0.6)
        heights = np.append(np.linspace(0, 0.6, length), 0.6)
        actions = np.zeros((length, 7))
        actions[:, 2] = np.diff(heights) / 0.2
        actions[:, 6] = i / 100  # tells which demonstration a row is from
        obs = {
            "robot0_eef_pos": np.stack([0 * heights, 0 * heights, heights], -1),
            "robot0_eef_quat": np.tile([1.0, 0, 0, 0], (length + 1, 1)),
            "robot0_gripper_qpos": np.tile([0.02, -0.02], (length + 1, 1)),
            "object": np.full((length + 1, 10), goal),
            "robot0_joint_pos": np.full((length + 1, 7), 9.0),  # stored, not used
        }
        solved = heights[1:] > 0.5
        yield {"obs": obs, "actions": actions, "rewards": solved.astype(float), "dones": solved.astype(int)}


def write_robomimic(path: Path, demos: int = 12, env_args: dict = ENV_ARGS, masks: bool = True) -> Path:
    """A low-dimensional robomimic file (v15) as its dataset_states_to_obs.py writes it with --done_mode 2: `dones` is 1
    in every step that leaves the task solved, and in the last."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        total = 0
        for i, demo in enumerate(robomimic_demos(demos)):
            group = data.create_group(f"demo_{i}")
            for name in ("actions", "rewards", "dones"):
                group[name] = demo[name]
            group["states"] = np.zeros((len(demo["actions"]), 32))
            group["action_dict/rel_pos"] = demo["actions"][:, :3]
            for key, values in demo["obs"].items():
                group[f"obs/{key}"], group[f"next_obs/{key}"] = values[:-1], values[1:]
            group.attrs["model_file"], group.attrs["ep_meta"] = "<mujoco/>", "{}"
            group.attrs["num_samples"] = len(demo["actions"])
            total += len(demo["actions"])
        data.attrs["total"], data.attrs["env_args"] = total, json.dumps(env_args, indent=4)
        if masks:
            names = [f"demo_{i}".encode() for i in range(demos)]
            file["mask/valid"], file["mask/train"] = names[::6], [n for i, n in enumerate(names) if i % 6]
            file["mask/20_percent"] = names[: demos // 5]
    return path


def write_minari(name: str, env: gym.Env, episodes: int = 4, policy=None, **options) -> minari.MinariDataset:
    """A local Minari data set: the task's expert, or `policy(env, obs) -> action`, or random actions."""
    env.action_space.seed(0)
    buffers = []
    for i in range(episodes):
        (obs, _), steps = env.reset(seed=1000 + i), []
        observations, done = [obs], False
        while not done:
            if policy:
                action = policy(env, obs)
            else:
                action = getattr(env.unwrapped, "expert_action", env.action_space.sample)()
            obs, reward, terminated, truncated, _ = env.step(action)
            observations.append(obs)
            steps.append((action, reward, terminated, truncated))
            done = terminated or truncated
        actions, rewards, terminations, truncations = (np.array(column) for column in zip(*steps))
        if isinstance(obs, dict):
            observations = {key: np.array([o[key] for o in observations]) for key in obs}
        buffers.append(EpisodeBuffer(i, None, None, observations, actions, rewards, terminations, truncations, {}))
    spaces = {"observation_space": env.observation_space, "action_space": env.action_space}
    return minari.create_dataset_from_buffers(name, buffers, env=env.spec, **spaces | options)


class FileServer(ThreadingHTTPServer):
    """Hands out `files` (path below the root -> bytes) on 127.0.0.1.

    `cut`: so many bytes are sent, then the connection ends, `cuts` times; `silent`: takes requests and says nothing.
    """

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.requests, self.cut, self.cuts, self.silent, self.extra = files, [], None, 0, False, 0
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.do_GET(head=True)

    def do_GET(self, head: bool = False):
        server = self.server
        server.requests.append((self.command, self.path, self.headers.get("Range")))
        if server.silent:
            time.sleep(60)
            return
        found = next((data for path, data in server.files.items() if self.path.endswith(path)), None)
        if found is None:
            return self.send_error(404)
        first = int((self.headers.get("Range") or "bytes=0-").split("=")[1].split("-")[0])
        body = found[first:]
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(body) + server.extra))
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(found) - 1}/{len(found)}")
        self.end_headers()
        if not head:
            if server.cuts and server.cut is not None:
                server.cuts -= 1
                body = body[: server.cut]
            with contextlib.suppress(OSError):
                self.wfile.write(body)
        return None

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serve(files: dict[str, bytes]) -> Iterator[FileServer]:
    server = FileServer(files)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
