"""Other people's data as local Minari datasets, whatever its format, and the task that a dataset is of.

find_dataset       ids of the local datasets that a name means: D4RL, robomimic, OGBench, Minari; converts or downloads
store              writes episodes as a local Minari dataset, all of it or nothing
make_task          the environment to evaluate in
reference_scores   the returns that count as 0 and as 100
read_episodes      the arrays of a dataset's episodes; StoredImages: images that stay on disk
"""

import contextlib
import dataclasses
import difflib
import errno
import hashlib
import http.client
import json
import math
import os
import re
import shutil
import socket
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class Family(NamedTuple):
    """One of D4RL's robots; scores 0 and 100 are the returns of a random policy and of an expert, d4rl/infos.py:106."""

    task: str | None  # of today
    steps: int  # per episode
    worst: float
    best: float


D4RL_FAMILIES = {
    "halfcheetah": Family("HalfCheetah-v5", 1000, -280.178953, 12135.0),
    "hopper": Family("Hopper-v5", 1000, -20.272305, 3234.3),
    "walker2d": Family("Walker2d-v5", 1000, 1.629008, 4592.3),
    "ant": Family("Ant-v5", 1000, -325.6, 3879.7),
    "antmaze": Family(None, 1000, 0.0, 1.0),
    "kitchen": Family(None, 280, 0.0, 4.0),
    "pen": Family("gymnasium_robotics:AdroitHandPen-v1", 100, 96.262799, 3076.8331),
    "hammer": Family("gymnasium_robotics:AdroitHandHammer-v1", 200, -274.856578, 12794.1348),
    "relocate": Family("gymnasium_robotics:AdroitHandRelocate-v1", 200, -6.425911, 4233.8778),
    "door": Family("gymnasium_robotics:AdroitHandDoor-v1", 200, -56.512833, 2880.5693),
    "maze2d-umaze": Family(None, 300, 23.85, 161.86),
    "maze2d-medium": Family(None, 600, 13.13, 277.39),
    "maze2d-large": Family(None, 800, 6.7, 273.99),
    "maze2d-umaze-dense": Family(None, 300, 68.537689, 193.662856),
    "maze2d-medium-dense": Family(None, 600, 44.264742, 297.455274),
    "maze2d-large-dense": Family(None, 800, 30.569041, 303.485738),
}
D4RL_URL = "http://rail.eecs.berkeley.edu/datasets/offline_rl"
ROBOMIMIC = re.compile(r"(lift|can|square|transport|tool_hang)-(mh|ph|mg)-low_dim")
ROBOMIMIC_KEYS = ("eef_pos", "eef_quat", "gripper_qpos")  # of each arm, then object; qc robomimic_utils.py:27
WAYS_ON = (
    "three ways on: {}; "
    "name a dataset that is here (`minari list local`); leave --env-name out, the default makes its own data"
)


def fail(message: str) -> NoReturn:
    """Ends the program with one line on stderr and exit code 1."""
    raise SystemExit(f"{Path(sys.argv[0]).name}: {message}")


def each(function: Callable, *xs):
    """`function` of arrays, or, of dicts of arrays, entry by entry."""
    return {k: each(function, *(x[k] for x in xs)) for k in xs[0]} if isinstance(xs[0], dict) else function(*xs)


# --- Which data a name means ------------------------------------------------------------------------------------------
def d4rl_files() -> dict[str, str]:
    """D4RL's names and the paths of their files on its server; Farama-Foundation/D4RL d4rl/infos.py."""
    files = {}
    for robot in ("halfcheetah", "hopper", "walker2d", "ant"):
        for kind in ("random", "medium", "expert", "medium-replay", "full-replay", "medium-expert"):
            for version in ("v1", "v2"):
                file = f"{robot}_{kind.replace('-', '_')}-{version}.hdf5"
                files[f"{robot}-{kind}-{version}"] = f"gym_mujoco_{version}/{file}"
    for task in ("pen", "hammer", "relocate", "door"):
        for kind in ("human", "cloned", "expert"):
            files[f"{task}-{kind}-v1"] = f"hand_dapg_v1/{task}-{kind}-v1.hdf5"
    mazes = {
        "umaze": "u-maze_noisy_multistart_False_multigoal_False",
        "umaze-diverse": "u-maze_noisy_multistart_True_multigoal_True",
        "medium-play": "big-maze_noisy_multistart_True_multigoal_False",
        "medium-diverse": "big-maze_noisy_multistart_True_multigoal_True",
        "large-play": "hardest-maze_noisy_multistart_True_multigoal_False",
        "large-diverse": "hardest-maze_noisy_multistart_True_multigoal_True",
    }
    for kind, file in mazes.items():
        files[f"antmaze-{kind}-v2"] = f"ant_maze_v2/Ant_maze_{file}_sparse_fixed.hdf5"
    for maze in ("umaze", "medium", "large"):
        files[f"maze2d-{maze}-v1"] = f"maze2d/maze2d-{maze}-sparse-v1.hdf5"
        files[f"maze2d-{maze}-dense-v1"] = f"maze2d/maze2d-{maze}-dense-v1.hdf5"
    kitchens = {
        "complete": "mini_kitchen_microwave_kettle_light_slider",
        "partial": "kitchen_microwave_kettle_light_slider",
        "mixed": "kitchen_microwave_kettle_bottomburner_light",
    }
    for kind, file in kitchens.items():
        files[f"kitchen-{kind}-v0"] = f"kitchen/{file}-v0.hdf5"
    return files


def find_dataset(
    env_name: str, dataset_path: str | None = None, d4rl_url: str = D4RL_URL, also_known: Iterable[str] = ()
) -> tuple[str, str | None]:
    """Ids of the local Minari datasets, for training and for validation, that `env_name` means. Converts or downloads
    what is not there yet; exits with one line when that cannot be done, which may suggest what is `also_known`."""
    import minari

    files = d4rl_files()
    if env_name in files:
        path = Path(dataset_path) if dataset_path else download_d4rl(env_name, f"{d4rl_url}/{files[env_name]}")
        return convert_hdf5(env_name, path), None
    if ROBOMIMIC.fullmatch(env_name):
        return convert_hdf5(env_name, Path(dataset_path or robomimic_path(env_name))), None
    if dataset_path:
        fail(f"--dataset-path {dataset_path}: goes with a D4RL or robomimic name, {env_name} is none")
    if env_name in minari.list_local_datasets():
        return env_name, None
    if "singletask" in env_name:
        return convert_ogbench(env_name)
    if re.fullmatch(r"[-_\w]+(/[-_\w]+)+-v\d+", env_name):
        return download_minari(env_name, also_known), None
    fail(f"--env-name {env_name}: no dataset of that name is known{nearest(env_name, also_known)}")


def nearest(name: str, also_known: Iterable[str]) -> str:
    """What the user may have meant, as the end of a message."""
    import minari

    known = [*minari.list_local_datasets(), *d4rl_files(), *also_known]
    known += [f"{task}-{kind}-low_dim" for task in RobosuiteTask.HORIZON for kind in ("mh", "ph")]
    near = difflib.get_close_matches(name, known, 3, 0.5)
    return f"; did you mean {' or '.join(near)}?" if near else ""


# --- Storing ----------------------------------------------------------------------------------------------------------
def store(dataset_id: str, episodes: Iterable[tuple], metadata: dict | None = None, **about) -> str:
    """Writes episodes (observations (T + 1, ...), actions, rewards, terminations, truncations) as a local Minari
    dataset, in a hidden folder that is then renamed: all of it is there, or nothing. An id that exists is left."""
    import minari
    from minari.data_collector import EpisodeBuffer
    from minari.storage.datasets_root_dir import get_dataset_path

    root = get_dataset_path()
    for left in root.glob(".storing-*"):  # by a process that was killed
        if time.time() - left.stat().st_mtime > 86_400:
            shutil.rmtree(left, ignore_errors=True)
    if dataset_id in minari.list_local_datasets():
        return dataset_id

    def buffers() -> Iterator[EpisodeBuffer]:
        for number, parts in enumerate(episodes):
            yield EpisodeBuffer(number, None, None, *checked(f"episode {number}", *parts))

    temporary = root / f".storing-{os.getpid()}-{time.time_ns()}"
    with minari_root(temporary):
        with warnings.catch_warnings(action="ignore"):  # about author and permalink
            dataset = minari.create_dataset_from_buffers(dataset_id, buffers(), **about)
        dataset.storage.update_metadata(metadata or {})
        (root / dataset_id).parent.mkdir(parents=True, exist_ok=True)
        for file in temporary.rglob("namespace_metadata.json"):
            target = root / file.relative_to(temporary)
            if not target.exists():
                shutil.copy(file, target)
        try:
            (temporary / dataset_id).rename(root / dataset_id)
        except OSError:
            if not (root / dataset_id).exists():  # else another process was faster
                raise
    return dataset_id


@contextlib.contextmanager
def minari_root(folder: Path) -> Iterator[None]:
    """Minari writes to this folder, which is gone afterwards."""
    before = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = str(folder)
    try:
        yield
    finally:
        os.environ.pop("MINARI_DATASETS_PATH")
        if before:
            os.environ["MINARI_DATASETS_PATH"] = before
        shutil.rmtree(folder, ignore_errors=True)


def leaves(x) -> list[np.ndarray]:
    """The arrays in dicts of dicts of arrays."""
    return [leaf for part in x.values() for leaf in leaves(part)] if isinstance(x, dict) else [x]


def checked(where: str, observations, actions, rewards, *ends) -> tuple:
    """An episode's parts. Exits with one line when they hold numbers that are not finite."""
    for what, part in (("observations", observations), ("actions", actions), ("rewards", rewards)):
        for x in leaves(part):
            if x.dtype.kind == "f" and not np.isfinite(x).all():
                numbers = f"{what} hold numbers that are not finite (NaN)"
                fail(f"{where} of the data: {numbers}; repair or leave out that episode")
    return observations, actions, rewards, *ends


def check_space(folder: Path, size: float, what: str) -> None:
    """Exits with one line when `size` bytes are not free: HDF5 does not survive a full disk."""
    free = shutil.disk_usage(folder).free
    if free < size:
        fail(f"{folder}: {free / 1e6:.0f} MB are free, {what} needs {size / 1e6:.0f}; make room")


# --- D4RL and robomimic: HDF5 files -----------------------------------------------------------------------------------
def convert_hdf5(env_name: str, path: Path) -> str:
    """A file of D4RL's or robomimic's layout as a local Minari dataset, named by the file's contents."""
    import h5py
    import minari
    from minari.storage.datasets_root_dir import get_dataset_path

    kind, name, version, convert = "robomimic", env_name, "v15", store_robomimic
    if not ROBOMIMIC.fullmatch(env_name):
        kind, (name, version), convert = "d4rl", env_name.rsplit("-", 1), store_d4rl
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()[:8]
        dataset_id = f"{kind}/{name}-{digest}-{version}"
        if dataset_id in minari.list_local_datasets():
            return dataset_id
        check_space(get_dataset_path(), 1.5 * path.stat().st_size, dataset_id)
        print(f"converting {path} to the Minari dataset {dataset_id}", flush=True)
        with h5py.File(path) as file:
            return convert(dataset_id, env_name, file)
    except FileNotFoundError:
        fail(f"--dataset-path {path}: there is no such file")
    except (OSError, KeyError, TypeError, ValueError, IndexError) as error:  # h5py's for missing or damaged parts
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise
        fail(f"{path}: is cut off, damaged or not of {kind}'s layout ({error}); delete it and fetch it again")


def d4rl_family(name: str) -> Family:
    """hopper-medium-v2 -> hopper's; maze2d-umaze-dense-v1 -> maze2d-umaze-dense's."""
    return D4RL_FAMILIES[name.rpartition("-")[0] if name.startswith("maze2d") else name.partition("-")[0]]


def store_d4rl(dataset_id: str, name: str, file) -> str:
    """Rows (N, ...) of D4RL cut into episodes, d4rl/__init__.py:69-140 and qc d4rl_utils.py:16-58."""
    keys = ("observations", "actions", "rewards", "terminals")
    if missing := [key for key in keys if key not in file]:
        raise KeyError(f"there is no {', '.join(missing)}")
    observations, actions, rewards, terminals = (file[key][:] for key in keys)
    rewards = rewards.reshape(-1)
    terminals = terminals.reshape(-1).astype(bool)
    if len({len(x) for x in (observations, actions, rewards, terminals)}) > 1 or not len(rewards):
        raise ValueError(f"{', '.join(keys)} are not of one length above 0")
    family = d4rl_family(name)
    following = file["next_observations"][:] if "next_observations" in file else None
    ends = np.zeros_like(terminals) if name.startswith("antmaze") else terminals.copy()  # a goal does not end antmaze
    if "timeouts" in file:
        ends |= file["timeouts"][:].reshape(-1).astype(bool)
    if following is not None:
        ends[:-1] |= np.abs(observations[1:] - following[:-1]).max(-1) > 1e-6
    ends[-1] = True
    if "timeouts" not in file:
        cut_at_time_limit(ends, family.steps)

    def episodes() -> Iterator[tuple]:
        first = 0
        for last in np.flatnonzero(ends):
            # Nothing follows the last row. A terminated episode does not need it; another one loses its last action,
            # as in D4RL, unless the file has next_observations.
            known = following is not None or terminals[last]
            stop = last + 1 if known else last  # rows first ... stop - 1 are the episode's steps
            if stop > first:
                after = following[last] if following is not None else observations[last]
                obs = np.concatenate([observations[first:stop], after[None]])
                rows = slice(first, stop)
                truncations = np.arange(first, stop) == stop - 1
                yield obs, actions[rows], rewards[rows], terminals[rows], truncations & ~terminals[rows]
            first = last + 1

    spec = None
    if family.task:
        with contextlib.suppress(gym.error.Error, ImportError):  # no gymnasium-robotics: no evaluation
            spec = dataclasses.replace(gym.spec(family.task), max_episode_steps=family.steps)
    high = np.ones(actions.shape[1:], np.float32)
    return store(
        dataset_id,
        episodes(),
        {"ref_min_score": family.worst, "ref_max_score": family.best, "reference": "D4RL"},
        env=spec,
        observation_space=spaces.Box(-np.inf, np.inf, observations.shape[1:], observations.dtype),
        action_space=spaces.Box(-high, high),
    )


def cut_at_time_limit(ends: np.ndarray, steps: int) -> None:
    """Marks, in place, the rows (N,) at which the time limit must have ended an episode."""
    first = 0
    for row in range(len(ends)):
        ends[row] |= row - first + 1 == steps
        if ends[row]:
            first = row + 1


def robomimic_path(env_name: str) -> Path:
    """Where robomimic's own download puts a file. Exits, with the command for it, when it is not there."""
    task, kind = ROBOMIMIC.fullmatch(env_name).groups()
    sparse = "sparse_" if kind == "mg" else ""
    path = Path.home() / ".robomimic" / task / kind / f"low_dim_{sparse}v15.hdf5"
    if not path.exists():
        way = f"python -m robomimic.scripts.download_datasets --tasks {task} --dataset_types {kind}"
        way += " --hdf5_types low_dim --download_dir ~/.robomimic"
        fail(f"--env-name {env_name}: there is no {path}; `{way}` (robomimic 0.5), or give --dataset-path FILE")
    return path


def store_robomimic(dataset_id: str, name: str, file) -> str:
    """data/demo_I of robomimic: low-dimensional observations in one vector, qc robomimic_utils.py:111-137. With the
    environment's settings, and the numbers of the validation episodes where the file names some."""
    names = sorted(file["data"], key=lambda demo: int(demo.removeprefix("demo_")))
    if not names:
        raise ValueError("it has no demonstrations")
    first = file["data"][names[0]]
    arms = [arm for arm in ("robot0", "robot1") if f"{arm}_eef_pos" in first["obs"]]
    keys = [f"{arm}_{key}" for arm in arms for key in ROBOMIMIC_KEYS] + ["object"]
    env_args = json.loads(file["data"].attrs["env_args"])
    settings = {
        "task": name.partition("-")[0],
        "env_args": {key: env_args[key] for key in ("env_name", "env_kwargs")},
        "keys": keys,
    }
    about = {"robomimic": json.dumps(settings)}
    if "mask/valid" in file:
        about["validation"] = [names.index(demo.decode()) for demo in file["mask/valid"][:]]

    def episodes() -> Iterator[tuple]:
        for demo in (file["data"][demo] for demo in names):
            obs = np.concatenate([demo["obs"][key][:] for key in keys], -1)  # (T, O)
            last = demo["next_obs"] if "next_obs" in demo else demo["obs"]
            obs = np.concatenate([obs, np.concatenate([last[key][-1:] for key in keys], -1)])
            terminations = demo["dones"][:].astype(bool)
            truncations = np.arange(1, len(terminations) + 1) == len(terminations)
            yield obs, demo["actions"][:], demo["rewards"][:], terminations, truncations & ~terminations

    size = sum(first["obs"][key].shape[-1] for key in keys)
    high = np.ones(first["actions"].shape[1:], np.float32)
    box = spaces.Box(-np.inf, np.inf, (size,), np.float64)
    return store(dataset_id, episodes(), about, observation_space=box, action_space=spaces.Box(-high, high))


# --- OGBench ----------------------------------------------------------------------------------------------------------
def convert_ogbench(env_name: str) -> tuple[str, str]:
    """Training and validation part of an OGBench dataset, through its own package, as local Minari datasets."""
    import minari

    name, version = env_name.rsplit("-", 1)
    ids = f"ogbench/{name}-{version}", f"ogbench/{name}-val-{version}"
    if set(ids) <= set(minari.list_local_datasets()):
        return ids
    try:
        import ogbench

        env, *parts = ogbench.make_env_and_datasets(env_name)
    except ImportError:
        fail(f"--env-name {env_name}: pip install ogbench")
    except (OSError, ValueError, KeyError, gym.error.Error) as error:
        ways_on = WAYS_ON.format("load it on another machine, and copy ~/.ogbench/data from there")
        fail(f"--env-name {env_name}: ogbench says {error}; {ways_on}")

    def episodes(part: dict) -> Iterator[tuple]:
        first = 0
        for last in np.flatnonzero(part["terminals"]):
            rows = slice(first, last + 1)
            obs = np.concatenate([part["observations"][rows], part["next_observations"][last : last + 1]])
            terminations = part["masks"][rows] == 0
            truncations = (np.arange(1, len(terminations) + 1) == len(terminations)) & ~terminations
            yield obs, part["actions"][rows], part["rewards"][rows], terminations, truncations
            first = last + 1

    box = {"observation_space": env.observation_space, "action_space": env.action_space}
    for dataset_id, part in zip(ids, parts, strict=True):
        store(dataset_id, episodes(part), {"ogbench": env_name}, **box)
    return ids


# --- Downloads --------------------------------------------------------------------------------------------------------
def reachable(url: str, timeout_s: float = 4.0) -> bool:
    """Whether the server of this address takes connections; True without a try where a proxy is set."""
    parts = urllib.parse.urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    if urllib.request.getproxies().get(parts.scheme):
        return True
    answers = []

    def connect() -> None:
        with contextlib.suppress(OSError):
            answers.append(socket.create_connection((parts.hostname, port), timeout_s))

    thread = threading.Thread(target=connect, daemon=True)  # looking up a name has no time limit of its own
    thread.start()
    thread.join(timeout_s)
    for connection in answers:
        connection.close()
    return bool(answers)


def download_d4rl(env_name: str, url: str) -> Path:
    """The file of a D4RL dataset, in the folder where the d4rl package keeps it too; downloaded once."""
    from tqdm import tqdm

    folder = Path(os.environ.get("D4RL_DATASET_DIR", Path.home() / ".d4rl" / "datasets"))
    target = folder / url.rpartition("/")[2]
    if target.exists():
        return target
    ways_on = WAYS_ON.format("fetch the file on another machine and give it with --dataset-path FILE")
    if not reachable(url):
        fail(f"--env-name {env_name}: {url} cannot be reached; {ways_on}")
    folder.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    written = 0
    try:
        with urllib.request.urlopen(url, timeout=20) as response, part.open("wb") as file:
            size = int(response.headers.get("Content-Length", 0))
            check_space(folder, 2.5 * size, f"{target.name}, with its conversion,")
            with tqdm(total=size or None, desc=target.name, unit="B", unit_scale=True) as bar:
                while block := response.read(1 << 20):
                    written += file.write(block)
                    bar.update(len(block))
        if written != size != 0:
            fail(f"{url}: the connection ended after {written} of {size} bytes; run the command again")
        part.replace(target)
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        fail(f"--env-name {env_name}: {url}: {' '.join(str(error).split())}; {ways_on}")
    finally:
        part.unlink(missing_ok=True)
    return target


def download_minari(name: str, also_known: Iterable[str]) -> str:
    """A dataset of Minari's public collection, or of the one that MINARI_REMOTE names."""
    import minari

    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    ways_on = f"`minari download {name}` on another machine, and copy ~/.minari/datasets/{name} from there"
    ways_on = WAYS_ON.format(ways_on)
    if not os.environ.get("MINARI_REMOTE") and not reachable(hub):
        near = nearest(name, also_known)
        fail(f"--env-name {name}: is not here, and {hub} cannot be reached{near}; {ways_on}")
    try:
        minari.load_dataset(name, download=True)
    except ImportError:
        fail(f"--env-name {name}: pip install huggingface_hub, Minari downloads with it")
    except Exception as error:  # noqa: BLE001  the hub's client raises errors of several libraries
        said = " ".join(str(error).split())[:200]
        fail(f"--env-name {name}: {said}{nearest(name, also_known)}; {ways_on}")
    return name


# --- What a dataset is of ---------------------------------------------------------------------------------------------
class RobosuiteTask(gym.Env):
    """A robosuite task as a robomimic file describes it: low-dimensional observations, success ends the episode."""

    HORIZON = {"lift": 300, "can": 300, "square": 400, "transport": 800, "tool_hang": 1000}  # qc robomimic_utils.py:34

    def __init__(self, task: str, env_args: dict, keys: list[str], render_mode: str | None = None):
        import robosuite

        options = {"has_renderer": False, "has_offscreen_renderer": False, "use_camera_obs": False, "ignore_done": True}
        self.sim = robosuite.make(env_args["env_name"], **env_args["env_kwargs"] | options)
        self.keys = keys
        self.horizon = self.HORIZON[task]
        self.render_mode = render_mode
        self.metadata = {"render_fps": 20}
        low, high = self.sim.action_spec
        self.action_space = spaces.Box(np.float32(low), np.float32(high))
        self.observation_space = spaces.Box(-np.inf, np.inf, self.observe(self.sim.reset()).shape, np.float32)

    def observe(self, raw: dict) -> np.ndarray:
        names = {"object": "object-state"}  # robomimic's name: robosuite's
        return np.concatenate([np.float32(raw[names.get(key, key)]).ravel() for key in self.keys])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            np.random.seed(seed)  # noqa: NPY002  robosuite before 1.5 places objects with numpy's global generator
            self.sim.rng = np.random.default_rng(seed)
        self.steps = 0
        self.renderer = None
        return self.observe(self.sim.reset()), {"success": False}

    def step(self, action):
        raw, reward, *_ = self.sim.step(action)
        self.steps += 1
        success = bool(self.sim._check_success())
        return self.observe(raw), float(reward), success, self.steps >= self.horizon, {"success": success}

    def render(self):
        from franka_sim import new_renderer

        if self.renderer is None:
            self.renderer = new_renderer(self.sim.sim.model._model, 256, 256)
        self.renderer.update_scene(self.sim.sim.data._data, "agentview")
        return self.renderer.render()


def make_task(dataset, render: bool = False) -> gym.Env | None:
    """The task that a Minari dataset is of; None, with a line that says why, where there is none to run."""
    about = dataset.storage.metadata
    options = {"render_mode": "rgb_array"} if render else {}
    try:
        if "robomimic" in about:
            env = RobosuiteTask(**json.loads(about["robomimic"]), **options)
        elif "ogbench" in about:
            import ogbench

            env = ogbench.make_env_and_datasets(about["ogbench"], env_only=True, **options)
        else:
            with warnings.catch_warnings(action="ignore"):  # other versions of mujoco than the data was made with
                env = dataset.recover_environment(eval_env=True, **options)
    except (gym.error.Error, ImportError, KeyError, ValueError) as error:
        remedy = f"; pip install {error.name}" if isinstance(error, ImportError) and error.name else ""
        print(f"no evaluation: the task of {dataset.id} does not run here ({error}{remedy})", file=sys.stderr)
        return None
    theirs, ours = dataset.observation_space, env.observation_space
    if layout(theirs) != layout(ours) or dataset.action_space.shape != env.action_space.shape:
        print(f"no evaluation: {dataset.id} has observations {theirs}, the task here {ours}", file=sys.stderr)
        return None
    return env


def layout(space: spaces.Space) -> object:
    return {k: layout(v) for k, v in space.items()} if isinstance(space, spaces.Dict) else space.shape


def reference_scores(dataset) -> tuple[tuple[float, float], str]:
    """Returns that count as 0 and 100, and whose they are: the dataset's own, or D4RL's for the same robot."""
    about = dataset.storage.metadata
    if about.get("ref_max_score") is not None and about.get("ref_min_score") is not None:
        return (about["ref_min_score"], about["ref_max_score"]), about.get("reference", "Minari")
    task = dataset.env_spec.id if dataset.env_spec else ""
    for family in D4RL_FAMILIES.values():
        if family.task and task and family.task.rpartition("-")[0] == task.rpartition("-")[0]:
            return (family.worst, family.best), "D4RL"
    return (math.nan, math.nan), ""


# --- Reading ----------------------------------------------------------------------------------------------------------
def is_image(space: spaces.Space) -> bool:
    return isinstance(space, spaces.Box) and len(space.shape) == 3 and space.dtype == np.uint8


def image_spaces(space: spaces.Space, path: str = "observations") -> dict[str, spaces.Box]:
    """Paths of the images in an episode, with their spaces."""
    if isinstance(space, spaces.Dict):
        return {k: v for key, part in space.items() for k, v in image_spaces(part, f"{path}/{key}").items()}
    return {path: space} if is_image(space) else {}


def hdf5_file(dataset) -> Path:
    return Path(dataset.storage.data_path) / "main_data.hdf5"


def episode_rewards(dataset) -> dict[int, np.ndarray]:
    """The rewards (T,) of every episode, where possible without reading the rest."""
    if dataset.storage.FORMAT != "hdf5":
        return {int(episode.id): np.asarray(episode.rewards) for episode in dataset.iterate_episodes()}
    import h5py

    with h5py.File(hdf5_file(dataset)) as file:
        return {int(i): file[f"episode_{i}/rewards"][:] for i in dataset.episode_indices}


def read_episodes(dataset, numbers: Iterable[int], images: bool = True) -> Iterator[tuple]:
    """(space, observations, actions, rewards, terminations) of episodes, with or without their images."""
    if images:
        for episode in dataset.iterate_episodes(numbers):
            parts = (episode.observations, episode.actions, episode.rewards, episode.terminations)
            yield dataset.observation_space, *checked(f"{dataset.id}, episode {episode.id}", *parts)
        return
    import h5py

    def without_images(space: spaces.Space) -> spaces.Dict:
        parts = {k: without_images(v) if isinstance(v, spaces.Dict) else v for k, v in getattr(space, "items", dict)()}
        return spaces.Dict({k: v for k, v in parts.items() if not is_image(v)})

    def read(space: spaces.Space, group):
        return {k: read(v, group[k]) for k, v in space.items()} if isinstance(space, spaces.Dict) else group[:]

    space = without_images(dataset.observation_space)
    with h5py.File(hdf5_file(dataset)) as file:
        for number in numbers:
            group = file[f"episode_{number}"]
            observations = read(space, group["observations"])
            parts = (group[key][:] for key in ("actions", "rewards", "terminations"))
            yield space, *checked(f"{dataset.id}, episode {number}", observations, *parts)


class StoredImages:
    """Images (N, H, W, C) that stay in a Minari dataset's HDF5 file; indexed like an array, in any worker process."""

    def __init__(self, dataset, key: str, space: spaces.Box, lengths: dict[int, int]):
        self.path = hdf5_file(dataset)
        self.key = key
        self.shape = (sum(lengths.values()), *space.shape)
        self.jpeg = dataset.storage.jpeg_encoding and min(space.shape[:2]) >= 32  # as Minari decides
        self.episodes = list(lengths)
        self.firsts = np.cumsum([0, *lengths.values()])
        self.pid, self.file = 0, None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"pid": 0, "file": None}

    def __getitem__(self, rows) -> np.ndarray:
        import h5py
        from imageio.v3 import imread

        if self.pid != os.getpid():  # a handle must not be used in two processes
            self.pid, self.file = os.getpid(), h5py.File(self.path)
        rows = np.asarray(rows)
        images = np.empty((rows.size, *self.shape[1:]), np.uint8)
        for out, row in zip(images, rows.flat, strict=True):
            number = np.searchsorted(self.firsts, row, "right") - 1
            data = self.file[f"episode_{self.episodes[number]}/{self.key}"][row - self.firsts[number]]
            out[:] = imread(data.tobytes(), extension=".jpg") if self.jpeg else data
        return images.reshape(*rows.shape, *self.shape[1:])
