"""Other people's data as local Minari datasets, whatever its format; its rows; the tasks that it is of.

find_dataset       ids of the local datasets that a name means: D4RL, robomimic, OGBench, Minari, a file of one's own
store              writes episodes as a local Minari dataset, all of it or nothing
make_task          the environment of a dataset; reference_scores: the returns that count as 0 and 100
read_rows          episodes as rows in the layout of Q-chunking, images in memory or as StoredImages on disk
Batches            the samples of each update
"""

import contextlib
import dataclasses
import difflib
import errno
import fcntl
import hashlib
import http.client
import importlib
import json
import math
import os
import re
import shutil
import signal
import socket
import struct
import sys
import threading
import time
import traceback
import urllib.error
import urllib.parse
import urllib.request
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.utils.data
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from torch import Tensor

from common.envs import HUGE, Checked, looks_like_image, say_once, time_limited, with_opengl
from common.recording import check_fingerprint, layout
from common.setup import Fault, fail, write_atomically
from common.tensors import free_memory, ignore_ctrl_c, rank, world_size


# --- Whether data can be learned --------------------------------------------------------------------------------------
class Misfit(Exception):  # noqa: N818  of the data, not of the program
    """What is wrong with data, in words for its owner."""


def each(function: Callable, *xs):
    """`function` of arrays, or, of dicts of arrays, entry by entry."""
    return {k: each(function, *(x[k] for x in xs)) for k in xs[0]} if isinstance(xs[0], dict) else function(*xs)


def arrays(x) -> list:
    """The arrays in dicts of dicts of arrays."""
    return [array for part in x.values() for array in arrays(part)] if isinstance(x, dict) else [x]


def unreadable(error: Exception) -> str:
    """Why a file of data cannot be read, and what helps."""
    number = getattr(error, "errno", None)
    if number == errno.EAGAIN:
        return "is being written by another process; wait until that ends"
    if number is not None:
        return f"cannot be read: {os.strerror(number)}"
    return f"is damaged, cannot be read ({one_line(error)}); fetch or make it again"


def sound(where: str, observations, actions, rewards, terminations, truncations) -> tuple:
    """An episode's parts, rewards and ends (T,). Exits with one line when they are no numbers that can be learned."""
    try:
        steps = len(actions)
        parts = {"observations": observations, "actions": actions}
        parts["rewards"] = per_step("rewards", rewards, steps)
        for name, part in parts.items():
            for x in arrays(part):
                check_values(name, np.asarray(x))
        lengths = {len(x) for x in arrays(observations)}
        if not steps or lengths - {steps + 1}:  # images that stay on disk are not among them
            raise Misfit(f"{steps} actions need {steps + 1} observations, there are {sorted(lengths)}")
        ends = {"terminations": terminations, "truncations": truncations}
        ends = [as_flags(name, per_step(name, x, steps)) for name, x in ends.items()]
    except Misfit as error:
        fail(f"{where} of the data: {error}; repair or leave out that episode")
    actions = np.asarray(actions)
    suspect([np.asarray(x) for x in arrays(observations)], actions)
    return observations, actions, parts["rewards"], *ends


def suspect(observations: list[np.ndarray], actions: np.ndarray) -> None:
    """Says once what is seldom meant: observations that never change, pictures that are black."""
    if observations and all((x == x[:1]).all() for x in observations) and (actions != actions[:1]).any():
        say_once("the data has episodes whose observations never change; were they kept without a copy?")
    pictures = [x for x in observations if x.dtype == np.uint8 and x.ndim > 2]
    if any(x.max() <= 1 for x in pictures):
        say_once("the data has pictures without a byte above 1: black; were floats of 0 to 1 stored as bytes?")


def check_values(name: str, x: np.ndarray) -> None:
    """Raises Misfit when these are no numbers, not finite, or so large that they are no measurements."""
    if x.dtype.kind not in "fiub":
        example = x.ravel()[:1].tolist() or [x.dtype]
        raise Misfit(f"{name} hold {example[0]!r}, not numbers")
    if x.dtype.itemsize > 1:
        wrong = ~(np.abs(x, dtype=float) <= HUGE)  # NaN as well; in float16 HUGE would be infinite
        if wrong.any():
            where = np.argwhere(wrong)[0]
            column = "" if len(where) < 2 else f" (number {' '.join(map(str, where[1:]))} of each)"
            value = float(x[tuple(where)])
            what = "that are too large to be measurements" if math.isfinite(value) else "that are not finite"
            raise Misfit(f"{name} hold numbers {what}: {value:.4g} at step {where[0]}{column}")


def per_step(name: str, x, steps: int) -> np.ndarray:
    """One value per step, (T,), also of (T, 1). Raises Misfit for other shapes."""
    x = np.asarray(x)
    if x.size != steps or len(x) != steps:
        raise Misfit(f"{name} have shape {x.shape}, not one value for each of {steps} steps")
    return x.reshape(steps)


def as_flags(name: str, x: np.ndarray) -> np.ndarray:
    """Ends of episodes as bool. Raises Misfit unless all are true or false, 0 or 1: text is never false."""
    wrong = x if x.dtype.kind not in "fiub" else x[~np.isin(x, (0, 1))]
    if wrong.size:
        raise Misfit(f"{name} hold {wrong[0].item()!r}, not true or false")
    return x.astype(bool)


# --- Local datasets ---------------------------------------------------------------------------------------------------
def minari_root() -> Path:
    """The folder of local datasets. Exits with one line when it can neither be found nor made."""
    from minari.storage.datasets_root_dir import get_dataset_path

    try:
        return get_dataset_path()
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}; give a folder that can be written: MINARI_DATASETS_PATH")


def local_dataset(option: str, source: str):
    """A local Minari dataset, or that in the folder `episodes` of a run. Exits with one line when it cannot be read."""
    import minari

    folder = Path(source, "episodes", "data")
    try:
        return minari.MinariDataset(folder) if folder.is_dir() else minari.load_dataset(source)
    except FileNotFoundError:
        ways = f"record_demos.py records, `minari download {source}` fetches a public one"
        fail(f"{option} {source}: is not here; `minari list local` shows what is, {ways}")
    except Exception as error:  # noqa: BLE001  another version's files raise what they like
        said = f"this Minari ({minari.__version__}) cannot read it: {one_line(error)}"
        fail(f"{option} {source}: {said}; if it is incomplete, delete its folder and fetch or record it again")


def is_here(dataset_id: str) -> bool:
    return (minari_root() / dataset_id / "data").exists()


def id_for(namespace: str, name: str, contents: str) -> str:
    """A dataset id for what is made here of `contents`; the same contents have the same id."""
    digest = hashlib.sha256(contents.encode()).hexdigest()[:8]
    return f"{namespace}/{re.sub(r'-v[0-9]+$|[^-_a-zA-Z0-9]', '', name)}-{digest}-v0"


def as_stored(episode) -> tuple:
    """An episode of Recorder as `store` takes it."""
    observations = each(lambda *steps: np.stack(steps), *episode.observations)
    return observations, episode.actions, episode.rewards, episode.terminations, episode.truncations


def storable(spec: EnvSpec) -> EnvSpec:
    """What makes the task, by its name: so Minari wants it."""
    entry = spec.entry_point
    if hasattr(entry, "__name__"):
        entry = f"{entry.__module__}:{entry.__name__}"
    named = dataclasses.replace(spec, entry_point=entry)
    try:
        named.to_json()
    except (TypeError, ValueError):  # a partial, as shimmy's, or options that are no JSON: it is made by its id
        module = entry.partition(":")[0] if isinstance(entry, str) else entry.func.__module__
        options = {}
        for key, value in spec.kwargs.items():
            with contextlib.suppress(TypeError, ValueError):
                options[key] = json.loads(json.dumps(value))
        if lost := spec.kwargs.keys() - options:
            say_once(f"{spec.id}: options {sorted(lost)} are no JSON; its data has those it is registered with")
        options["task"] = f"{module}:{spec.id}"
        by_id = {"entry_point": "common.envs:made_again", "vector_entry_point": None, "kwargs": options}
        named = dataclasses.replace(spec, **by_id)
    return named


def store(dataset_id: str, episodes: Iterable[tuple], metadata: dict | None = None, **about) -> str:
    """Writes episodes (observations (T + 1, ...), actions, rewards, terminations, truncations) as a local Minari
    dataset, see `write`. What another process stored under the id meanwhile is left."""
    from minari.data_collector import EpisodeBuffer

    clear_leftovers(minari_root())

    def buffers() -> Iterator[EpisodeBuffer]:
        number = -1
        for number, parts in enumerate(episodes):
            yield EpisodeBuffer(number, None, None, *sound(f"episode {number}", *parts))
        if number < 0:
            raise Misfit("holds no episode")

    write(dataset_id, buffers(), metadata or {}, **about)
    return dataset_id


def write(dataset_id: str, buffers: Iterable, metadata: dict, **about) -> None:
    """Makes a local Minari dataset in a hidden folder that is then renamed: all of it is there, or nothing. Its task is
    metadata["env_spec"]; given an `env`, Minari would make it, which may not run here, or own a port."""
    import minari

    root = minari_root()
    with hidden_root(root) as temporary:
        with warnings.catch_warnings(action="ignore"):  # about author and permalink
            dataset = minari.create_dataset_from_buffers(dataset_id, buffers, jpeg_encoding=False, **about)
        dataset.storage.update_metadata(metadata)
        publish(temporary, root)


def publish(temporary: Path, root: Path) -> None:
    """Moves a hidden folder's datasets to where Minari finds them, each at once, and their namespaces."""
    for file in list(temporary.rglob("data/metadata.json")):
        folder = file.parent.parent
        target = root / folder.relative_to(temporary)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.rename(target)
        except OSError:
            if not (target / "data").exists():  # else another process was faster
                raise
    for file in temporary.rglob("namespace_metadata.json"):
        target = root / file.relative_to(temporary)
        if not target.exists():
            shutil.copy(file, target)


@contextlib.contextmanager
def hidden_root(root: Path) -> Iterator[Path]:
    """A folder that Minari writes to inside, which is gone afterwards. It is locked as long as this process lives."""
    temporary = root / f".storing-{os.getpid()}-{time.time_ns()}"
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        fail(f"{root}: {error.strerror}; give a folder that can be written: MINARI_DATASETS_PATH")
    before = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = str(temporary)
    try:
        with (temporary / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield temporary
    finally:
        del os.environ["MINARI_DATASETS_PATH"]
        if before is not None:
            os.environ["MINARI_DATASETS_PATH"] = before
        shutil.rmtree(temporary, ignore_errors=True)


def clear_leftovers(root: Path) -> None:
    """Removes the hidden folders of processes that were killed: their locks are gone."""
    for left in root.glob(".storing-*"):
        with contextlib.suppress(OSError):  # somebody else's, or just removed
            if time.time() - left.stat().st_mtime < 5 and not (left / ".lock").exists():
                continue  # it begins
            with (left / ".lock").open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: it is written to
                shutil.rmtree(left, ignore_errors=True)


def check_space(folder: Path, size: float, what: str) -> None:
    """Exits with one line when `size` bytes are not free: HDF5 does not survive a full disk."""
    free = shutil.disk_usage(folder).free
    if free < size:
        fail(f"{folder}: {free / 1e6:.0f} MB are free, {what} needs {size / 1e6:.0f}; make room")


ROBOMIMIC = re.compile(r"(lift|can|square|transport|tool_hang)-(mh|ph|mg)-low_dim")
ROBOMIMIC_KEYS = ("eef_pos", "eef_quat", "gripper_qpos")  # of each arm, then object; qc robomimic_utils.py:27
ROBOSUITE_NAMES = {
    "lift": "Lift",
    "can": "PickPlaceCan",
    "square": "NutAssemblySquare",
    "transport": "TwoArmTransport",
    "tool_hang": "ToolHang",
}
LAYOUTS = "give an HDF5 file of D4RL's layout (observations, actions, rewards, terminals, timeouts) or robomimic's"
NO_SPACE = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
WAYS_ON = "three ways on: {}; name a dataset that is here (`minari list local`); "
WAYS_ON += "leave --env-name out, the default makes its own data"


# --- Which data a name means ------------------------------------------------------------------------------------------
def find_dataset(
    env_name: str, dataset_path: str | None = None, also_known: Iterable[str] = ()
) -> tuple[str, str | None]:
    """Ids of the local Minari datasets, for training and for validation, that `env_name` means. Converts or downloads
    what is not there yet; exits with one line when that cannot be done, which may suggest what is `also_known`."""
    if dataset_path:
        return convert_hdf5(env_name, Path(dataset_path)), None
    if env_name in d4rl_files():
        return convert_hdf5(env_name, download_d4rl(env_name)), None
    if ROBOMIMIC.fullmatch(env_name):
        return convert_hdf5(env_name, robomimic_path(env_name)), None
    if is_here(env_name):
        return env_name, None
    if "singletask" in env_name:
        return convert_ogbench(env_name)
    if re.fullmatch(r"[-_\w]+(/[-_\w]+)+-v\d+", env_name):
        return download_minari(env_name, also_known), None
    way = "a file of your own is read with --dataset-path FILE; "
    way += "Minari's names end in -v0 or the like, OGBench's in -singletask-v0"
    fail(f"--env-name {env_name}: no dataset of that name is known{nearest(env_name, also_known)}; {way}")


def nearest(name: str, also_known: Iterable[str]) -> str:
    """What the user may have meant, as the end of a message."""
    root = minari_root()  # Minari's own list raises TypeError for a folder such as pick-v0-old
    here = [path.parent.relative_to(root).as_posix() for path in root.glob("**/data")]
    known = [*(folder for folder in here if re.fullmatch(r"[-_/\w]+-v\d+", folder)), *d4rl_files(), *also_known]
    known += [f"{task}-{kind}-low_dim" for task in ROBOSUITE_NAMES for kind in ("mh", "ph")]
    near = difflib.get_close_matches(name, known, 3, 0.5)
    return f"; did you mean {' or '.join(near)}?" if near else ""


# --- D4RL -------------------------------------------------------------------------------------------------------------
class Family(NamedTuple):
    """One of D4RL's robots; scores 0 and 100 are the returns of a random policy and of an expert, d4rl/infos.py:106."""

    dims: tuple[int, int]  # numbers in an observation and in an action
    steps: int  # per episode
    worst: float
    best: float
    task: str | None = None  # today's environment with the same robot, to be made D4RL's by `d4rl_robot`


# Compared body by body with D4RL's own models. Not v5: Hopper and Walker2d lack the alive bonus of the step that falls,
# Walker2d has another foot, Ant observes other forces. No environment of today has D4RL's mazes and kitchen.
FAMILIES = {
    "halfcheetah": Family((17, 6), 1000, -280.178953, 12135.0, "HalfCheetah-v4"),
    "hopper": Family((11, 3), 1000, -20.272305, 3234.3, "Hopper-v4"),
    "walker2d": Family((17, 6), 1000, 1.629008, 4592.3, "Walker2d-v4"),
    # -325.6 is a random policy's return over 1,000 steps whose falls do not end the episode (measured here: -342 +- 8,
    # 1 alive and -1.33 control per step). As the task is defined, they do end it: -70 +- 16, a score of 6, not of 0.
    "ant": Family((111, 8), 1000, -325.6, 3879.7, "Ant-v4"),
    "antmaze": Family((29, 8), 1000, 0.0, 1.0),
    "kitchen": Family((60, 9), 280, 0.0, 4.0),
    "pen": Family((45, 24), 100, 96.262799, 3076.8331, "gymnasium_robotics:AdroitHandPen-v1"),
    "hammer": Family((46, 26), 200, -274.856578, 12794.1348, "gymnasium_robotics:AdroitHandHammer-v1"),
    "relocate": Family((39, 30), 200, -6.425911, 4233.8778, "gymnasium_robotics:AdroitHandRelocate-v1"),
    "door": Family((39, 28), 200, -56.512833, 2880.5693, "gymnasium_robotics:AdroitHandDoor-v1"),
    "maze2d-umaze": Family((4, 2), 300, 23.85, 161.86),
    "maze2d-medium": Family((4, 2), 600, 13.13, 277.39),
    "maze2d-large": Family((4, 2), 800, 6.7, 273.99),
    "maze2d-umaze-dense": Family((4, 2), 300, 68.537689, 193.662856),
    "maze2d-medium-dense": Family((4, 2), 600, 44.264742, 297.455274),
    "maze2d-large-dense": Family((4, 2), 800, 30.569041, 303.485738),
}


def d4rl_files() -> dict[str, str]:
    """D4RL's names and the paths of their files on its server; Farama-Foundation/D4RL d4rl/infos.py."""
    found = {}
    for robot in ("halfcheetah", "hopper", "walker2d", "ant"):
        for kind in ("random", "medium", "expert", "medium-replay", "full-replay", "medium-expert"):
            for version in ("v1", "v2"):
                file = f"{robot}_{kind.replace('-', '_')}-{version}.hdf5"
                found[f"{robot}-{kind}-{version}"] = f"gym_mujoco_{version}/{file}"
    for task in ("pen", "hammer", "relocate", "door"):
        for kind in ("human", "cloned", "expert"):
            found[f"{task}-{kind}-v1"] = f"hand_dapg_v1/{task}-{kind}-v1.hdf5"
    mazes = {
        "umaze": "u-maze_noisy_multistart_False_multigoal_False",
        "umaze-diverse": "u-maze_noisy_multistart_True_multigoal_True",
        "medium-play": "big-maze_noisy_multistart_True_multigoal_False",
        "medium-diverse": "big-maze_noisy_multistart_True_multigoal_True",
        "large-play": "hardest-maze_noisy_multistart_True_multigoal_False",
        "large-diverse": "hardest-maze_noisy_multistart_True_multigoal_True",
    }
    for kind, file in mazes.items():
        found[f"antmaze-{kind}-v2"] = f"ant_maze_v2/Ant_maze_{file}_sparse_fixed.hdf5"
    for maze in ("umaze", "medium", "large"):
        found[f"maze2d-{maze}-v1"] = f"maze2d/maze2d-{maze}-sparse-v1.hdf5"
        found[f"maze2d-{maze}-dense-v1"] = f"maze2d/maze2d-{maze}-dense-v1.hdf5"
    kitchens = {
        "complete": "mini_kitchen_microwave_kettle_light_slider",
        "partial": "kitchen_microwave_kettle_light_slider",
        "mixed": "kitchen_microwave_kettle_bottomburner_light",
    }
    for kind, file in kitchens.items():
        found[f"kitchen-{kind}-v0"] = f"kitchen/{file}-v0.hdf5"
    return found


def d4rl_kind(name: str) -> str | None:
    """hopper-medium-v2 -> hopper; maze2d-umaze-dense-v1 -> maze2d-umaze-dense; None where D4RL has no such name, of
    any version."""
    if name.rpartition("-v")[0] not in {known.rpartition("-v")[0] for known in d4rl_files()}:
        return None
    return name.rpartition("-")[0] if name.startswith("maze2d") else name.partition("-")[0]


def d4rl_robot(kind: str, contact_forces: bool, options: dict) -> gym.Env:
    """The task of a D4RL family in today's simulator; `contact_forces`: Ant's are not 0 in the data.

    Raises gymnasium's error where there is none.
    """
    family = FAMILIES[kind]
    if family.task is None:
        raise gym.error.UnregisteredEnv(f"no environment of today is that of D4RL's {kind}")
    module, _, _ = family.task.rpartition(":")
    if module:
        importlib.import_module(module)
    if contact_forces:
        options = options | {"use_contact_forces": True}
    env = gym.make(family.task, max_episode_steps=family.steps, **options)
    if not module:
        weigh_as_mujoco_2_0(env)
    return AsD4RL(env, "" if contact_forces else kind)


def weigh_as_mujoco_2_0(env: gym.Env) -> None:
    """Masses and inertias of before MuJoCo 2.1.2 (its changelog: "Computed capsule inertias are now exact"): a capsule
    was a cylinder with half a radius more at each end. D4RL's data is from 2.0; today's limbs weigh up to 8% more."""
    import mujoco

    spec = mujoco.MjSpec.from_file(env.unwrapped.fullpath)
    for geom in spec.geoms:
        if geom.type == mujoco.mjtGeom.mjGEOM_CAPSULE:
            geom.type = mujoco.mjtGeom.mjGEOM_CYLINDER
            radius = geom.size[0]
            start, end = geom.fromto[:3], geom.fromto[3:]
            if np.isfinite(start).all():
                longer = radius / 2 * (end - start) / np.linalg.norm(end - start)
                geom.fromto = np.concatenate([start - longer, end + longer])
            else:
                geom.size = geom.size + [0, radius / 2, 0]
    old = spec.compile()
    model = env.unwrapped.model
    for name in ("body_mass", "body_inertia", "body_ipos", "body_iquat"):
        getattr(model, name)[:] = getattr(old, name)
    mujoco.mj_setConst(model, env.unwrapped.data)


class AsD4RL(gym.Wrapper):
    """What D4RL's tasks do otherwise: Ant's observations end in 84 contact forces, all 0; Adroit's rewards take off a
    tenth of the hand's distance, where gymnasium-robotics adds it (its PR 220); a pen that falls ends the episode."""

    def __init__(self, env: gym.Env, kind: str):
        super().__init__(env)
        self.kind = kind
        if kind == "ant":
            self.observation_space = spaces.Box(-np.inf, np.inf, (111,), np.float64)

    def reset(self, **kwargs):
        obs, info = self.env.reset(**kwargs)
        return self.observed(obs), info

    def observed(self, obs: np.ndarray) -> np.ndarray:
        return np.concatenate([obs, np.zeros(84)]) if self.kind == "ant" else obs

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        hand = {
            "door": lambda: obs[35:38],
            "hammer": lambda: obs[33:36] - obs[36:39],
            "relocate": lambda: obs[30:33],
        }
        if self.kind in hand:
            reward -= 0.2 * np.linalg.norm(hand[self.kind]())
        terminated = terminated or (self.kind == "pen" and obs[26] < 0.075)
        return self.observed(obs), reward, terminated, truncated, info


# --- HDF5 files of D4RL's and robomimic's layout ----------------------------------------------------------------------
def convert_hdf5(env_name: str, path: Path) -> str:
    """A file as a local Minari dataset, named by the file's contents; its layout says how it is read."""
    import h5py

    if not path.is_file():
        what = "is a folder" if path.is_dir() else "there is no such file"
        fail(f"--dataset-path {path}: {what}; {LAYOUTS}")
    kind = "robomimic" if ROBOMIMIC.fullmatch(env_name) else "d4rl" if d4rl_kind(env_name) else "file"
    theirs = {file.rpartition("/")[2]: name for name, file in d4rl_files().items()}.get(path.name, env_name)
    if kind == "d4rl" and theirs != env_name:
        fail(f"--dataset-path {path}: is D4RL's {theirs}; give that as --env-name, or rename the file")
    plain = re.sub(r"[^-_a-zA-Z0-9]", "-", env_name)
    name, version = re.fullmatch(r"(.*?)(?:-v([0-9]+))?", plain).groups("15" if kind == "robomimic" else "0")
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
        if kind == "file" and env_name in gym.registry:  # the dataset will name the task
            digest.update(storable(gym.spec(env_name)).to_json().encode())
        dataset_id = f"{kind}/{name}-{digest.hexdigest()[:8]}-v{version}"
        if is_here(dataset_id):
            return dataset_id
        check_space(minari_root(), 1.5 * path.stat().st_size, dataset_id)
        with h5py.File(path) as file:
            is_robomimic = kind == "robomimic" or (kind == "file" and "data" in file)
            print(f"converting {path} to the Minari dataset {dataset_id}", flush=True)
            return (store_robomimic if is_robomimic else store_d4rl)(dataset_id, env_name, file)
    except Misfit as error:
        fail(f"{path}: {error}")
    except (OSError, KeyError, TypeError, ValueError, IndexError, AttributeError) as error:  # h5py's for damaged parts
        if getattr(error, "errno", None) in NO_SPACE:
            raise
        if "signature not found" in str(error):
            fail(f"{path}: is no HDF5 file; {LAYOUTS}")
        fail(f"{path}: {unreadable(error)}")


def column(file, key: str) -> np.ndarray:
    """The rows (N, ...) of a D4RL file's dataset. Raises Misfit when it has none of that name."""
    import h5py

    if not isinstance(file.get(key), h5py.Dataset) or not file[key].shape:
        raise Misfit(f"is not of D4RL's layout: it has no {key} with one row per step (but {', '.join(file)})")
    return file[key][:]


def store_d4rl(dataset_id: str, name: str, file) -> str:
    """Rows (N, ...) of D4RL cut into episodes, d4rl/__init__.py:69-140 and qc d4rl_utils.py:16-58."""
    observations, actions = (as_rows(key, column(file, key)) for key in ("observations", "actions"))
    if file["actions"].dtype.kind != "f":
        raise Misfit(f"actions are {file['actions'].dtype}: choices cannot be cloned here, store quantities as floats")
    count = len(observations)
    if len(actions) != count or not count:
        raise Misfit(f"observations and actions are not of one length above 0: {count} and {len(actions)}")
    rewards = per_step("rewards", column(file, "rewards"), count)
    terminals = as_flags("terminals", per_step("terminals", column(file, "terminals"), count))
    following = as_rows("next_observations", column(file, "next_observations")) if "next_observations" in file else None
    if following is not None and following.shape != observations.shape:
        raise Misfit(f"next_observations have shape {following.shape}, observations {observations.shape}")
    kind = d4rl_kind(name)
    family = FAMILIES.get(kind)
    dims = (math.prod(observations.shape[1:]), math.prod(actions.shape[1:]))
    if family and dims != family.dims:
        theirs = "{} numbers per observation and {} per action".format(*family.dims)
        raise Misfit(f"{name} has {theirs}, this file {dims[0]} and {dims[1]}; give a file of your own its own name")
    ends = episode_ends(file, kind, observations, terminals, following)
    check_space(minari_root(), 1.2 * (observations.nbytes + actions.nbytes + rewards.nbytes), dataset_id)

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

    metadata = {"env_spec": storable(gym.spec(name)).to_json()} if name in gym.registry else {}
    if family:
        metadata |= {"ref_min_score": family.worst, "ref_max_score": family.best, "reference": "D4RL", "d4rl": kind}
        metadata["contact_forces"] = kind == "ant" and bool(observations[:, 27:].any())
    low, high = (0, 255) if observations.dtype == np.uint8 else (-np.inf, np.inf)
    box = spaces.Box(low, high, observations.shape[1:], observations.dtype)
    action_box = spaces.Box(-1, 1, actions.shape[1:], np.float32)
    return store(dataset_id, episodes(), metadata, observation_space=box, action_space=action_box)


def as_rows(key: str, x: np.ndarray) -> np.ndarray:
    """Rows (N, ...), at least 2-D, of bytes or floats. Raises Misfit when they are no numbers."""
    if x.dtype.kind not in "fiub":
        check_values(key, x)
    if x.dtype != np.uint8:
        x = x.astype(np.float64 if x.dtype.itemsize > 4 else np.float32, copy=False)
    return x[:, None] if x.ndim == 1 else x


def episode_ends(file, kind: str | None, observations, terminals, following) -> np.ndarray:
    """(N,) bool, the last rows of episodes. Raises Misfit where the file does not tell: chunks must not cross ends."""
    family = FAMILIES.get(kind)
    ends = np.zeros_like(terminals) if kind == "antmaze" else terminals.copy()  # a goal does not end antmaze
    told = bool(terminals[-1])
    timeouts = np.zeros_like(terminals)
    if "timeouts" in file:
        timeouts = as_flags("timeouts", per_step("timeouts", column(file, "timeouts"), len(ends)))
        ends |= timeouts
    if following is not None:
        types = [file[key].dtype for key in ("observations", "next_observations")]
        rounding = max(np.finfo(np.result_type(x, np.float16)).eps for x in types)  # the coarser one's
        jumps = np.zeros(len(ends) - 1, bool)
        for row in range(0, len(jumps), 1000):  # as float64 pictures take eight times their memory
            here, after = observations[1:][row : row + 1000].astype(float), following[:-1][row : row + 1000]
            distance = np.abs(here - after)
            wrong = distance > 1e-6 + rounding * np.abs(after)
            jumps[row : row + 1000] = wrong.reshape(len(wrong), -1).any(-1)
        told = told or jumps.any()  # else they may be the rows shifted by one, over every end
        ends[:-1] |= jumps
    ends[-1] = True
    if timeouts.any() or (told and not family):
        return ends
    if not family:
        raise Misfit(
            "tells neither by timeouts nor by next_observations where episodes end; add timeouts, 1 at each end"
        )
    first = 0
    for row in range(len(ends)):  # cut where the time limit must have been
        ends[row] |= row - first + 1 == family.steps
        if ends[row]:
            first = row + 1
    return ends


def robomimic_path(env_name: str) -> Path:
    """Where robomimic's own download puts a file. Exits, with the command for it, when it is not there."""
    task, kind = ROBOMIMIC.fullmatch(env_name).groups()
    hdf5_type = "low_dim_sparse" if kind == "mg" else "low_dim"
    path = Path.home() / ".robomimic" / task / kind / f"{hdf5_type}_v15.hdf5"
    if not path.exists():
        way = f"python -m robomimic.scripts.download_datasets --tasks {task} --dataset_types {kind}"
        way += f" --hdf5_types {hdf5_type} --download_dir ~/.robomimic"
        fail(f"--env-name {env_name}: there is no {path}; `{way}` (robomimic 0.5), or give --dataset-path FILE")
    return path


def store_robomimic(dataset_id: str, name: str, file) -> str:
    """data/demo_I of robomimic: low-dimensional observations in one vector, qc robomimic_utils.py:111-137. With the
    environment's settings, and the numbers of the validation episodes where the file names some."""
    if "data" not in file:
        raise Misfit(f"is not of robomimic's layout: it has no data/demo_0 (but {', '.join(file)})")
    data = file["data"]
    odd = [name for name in data if not re.fullmatch(r"demo_\d+", name)]
    if odd or not len(data):
        raise Misfit(f"data has {odd[0] if odd else 'no demonstrations'}, not only demo_0, demo_1, ...; rename it")
    names = sorted(data, key=lambda demo: int(demo.removeprefix("demo_")))
    first = data[names[0]]
    if "obs" not in first and "states" in first:
        raise Misfit(states_only(file.filename, raw="env_args" not in data.attrs))
    arms = [arm for arm in ("robot0", "robot1") if f"{arm}_eef_pos" in first["obs"]]
    keys = [f"{arm}_{key}" for arm in arms for key in ROBOMIMIC_KEYS] + ["object"]
    for demo in names:
        for key in ("actions", "rewards", "dones"):
            if not hasattr(data[demo].get(key), "shape"):
                raise Misfit(f"{demo} has no {key} with one row per step (but {', '.join(data[demo])})")
        missing = [key for key in keys if key not in data[demo]["obs"]] or ([] if arms else ["robot0_eef_pos"])
        if missing:
            there = ", ".join(data[demo]["obs"])
            raise Misfit(f"{demo}/obs has no {missing[0]} (but {there}); give robomimic's low_dim file")
    env_args = json.loads(data.attrs.get("env_args", "{}"))
    expected = ROBOSUITE_NAMES.get(name.partition("-")[0]) if ROBOMIMIC.fullmatch(name) else None
    if expected and "env_name" not in env_args:
        raise Misfit("does not say of which task it is (data has no attribute env_args); give it a name of your own")
    if expected and env_args["env_name"] != expected:
        raise Misfit(f"is of {env_args['env_name']}, {name} means {expected}; give the other name or the other file")
    settings = {
        "env_args": {key: env_args.get(key) for key in ("env_name", "env_kwargs", "env_version")},
        "keys": keys,
        "longest": max(len(data[demo]["actions"]) for demo in names),
    }
    about = {"robomimic": json.dumps(settings)} if "env_name" in env_args else {}
    if "mask/valid" in file:
        held_out = [demo.decode() for demo in file["mask/valid"][:]]
        if absent := set(held_out) - set(names):
            raise Misfit(f"mask/valid names {min(absent)}, which is not among its demonstrations")
        about["validation"] = [names.index(demo) for demo in held_out]

    def episodes() -> Iterator[tuple]:
        for demo in (data[name] for name in names):
            obs = np.concatenate([demo["obs"][key][:] for key in keys], -1)  # (T, O)
            last = demo["next_obs"] if "next_obs" in demo else demo["obs"]
            obs = np.concatenate([obs, np.concatenate([last[key][-1:] for key in keys], -1)])
            steps = len(demo["actions"])
            terminations = as_flags("dones", per_step("dones", demo["dones"][:], steps))
            truncations = np.arange(1, steps + 1) == steps
            yield obs, demo["actions"][:], demo["rewards"][:], terminations, truncations & ~terminations

    size = sum(first["obs"][key].shape[-1] for key in keys)
    box = spaces.Box(-np.inf, np.inf, (size,), np.float64)
    action_box = spaces.Box(-1, 1, first["actions"].shape[1:], np.float32)
    return store(dataset_id, episodes(), about, observation_space=box, action_space=action_box)


def states_only(path: str, raw: bool) -> str:
    """What to do with demonstrations as robosuite or robomimic collect them."""
    convert = f"`python -m robomimic.scripts.conversion.convert_robosuite --dataset {path}`, then " if raw else ""
    observe = f"`python -m robomimic.scripts.dataset_states_to_obs --dataset {path} --output_name low_dim.hdf5"
    return f"holds the simulator's states, no observations; make them: {convert}{observe} --done_mode 2`"


# --- OGBench ----------------------------------------------------------------------------------------------------------
def convert_ogbench(env_name: str) -> tuple[str, str]:
    """Training and validation part of an OGBench dataset, through its own package, as local Minari datasets."""
    name, _, version = env_name.rpartition("-")
    ids = f"ogbench/{name}-{version}", f"ogbench/{name}-val-{version}"
    if all(map(is_here, ids)):
        return ids
    try:
        import ogbench

        env, *parts = ogbench.make_env_and_datasets(env_name)
    except ImportError as error:
        fail(f"--env-name {env_name}: {one_line(error)}; pip install {pip_name(error.name or 'ogbench')}")
    except Exception as error:  # noqa: BLE001  it downloads and makes a task: errors of several libraries
        ways_on = WAYS_ON.format("load it on another machine, and copy ~/.ogbench/data from there")
        fail(f"--env-name {env_name}: ogbench says {one_line(error)}; {ways_on}")

    def episodes(part: dict) -> Iterator[tuple]:
        first = 0
        for last in np.flatnonzero(part["terminals"]):
            rows = slice(first, last + 1)
            obs = np.concatenate([part["observations"][rows], part["next_observations"][last : last + 1]])
            terminations = part["masks"][rows] == 0
            truncations = (np.arange(1, len(terminations) + 1) == len(terminations)) & ~terminations
            yield obs, part["actions"][rows], part["rewards"][rows], terminations, truncations
            first = last + 1

    size = sum(part[key].nbytes for part in parts for key in ("observations", "actions", "rewards"))
    check_space(minari_root(), 1.2 * size, ids[0])
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


def download_d4rl(env_name: str) -> Path:
    """The file of a D4RL dataset, in the folder where the d4rl package keeps it too; downloaded once, from D4RL's
    server or from the mirror that D4RL_URL names."""
    import h5py
    from tqdm import tqdm

    server = os.environ.get("D4RL_URL", "http://rail.eecs.berkeley.edu/datasets/offline_rl")
    url = f"{server}/{d4rl_files()[env_name]}"
    folder = Path(os.environ.get("D4RL_DATASET_DIR", Path.home() / ".d4rl" / "datasets"))
    target = folder / url.rpartition("/")[2]
    if target.exists():
        return target
    ways_on = WAYS_ON.format("fetch the file on another machine and give it with --dataset-path FILE")
    if not reachable(url):
        fail(f"--env-name {env_name}: {url} cannot be reached; {ways_on}")
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    written = 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=20) as response, part.open("wb") as file:
            size = int(response.headers.get("Content-Length", 0))
            check_space(folder, 2.5 * size, f"{target.name}, with its conversion,")
            with tqdm(total=size or None, desc=target.name, unit="B", unit_scale=True) as bar:
                while block := response.read(1 << 20):
                    written += file.write(block)
                    bar.update(len(block))
        if written != size != 0:
            fail(f"{url}: the connection ended after {written} of {size} bytes; run the command again")
        h5py.File(part).close()  # raises where it is cut off, or a page that says what is wrong
        part.replace(target)
    except (OSError, http.client.HTTPException, ValueError) as error:
        if getattr(error, "errno", None) in NO_SPACE:
            raise
        fail(f"--env-name {env_name}: {url}: {one_line(error)}; {ways_on}")
    finally:
        with contextlib.suppress(OSError):  # where there is no such folder, too
            part.unlink()
    return target


def download_minari(name: str, also_known: Iterable[str]) -> str:
    """A dataset of Minari's public collection, or of the one that MINARI_REMOTE names."""
    import minari

    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    ways_on = WAYS_ON.format(f"`minari download {name}` on another machine, copy ~/.minari/datasets/{name} from there")
    if not os.environ.get("MINARI_REMOTE") and not reachable(hub):
        fail(f"--env-name {name}: is not here, and {hub} cannot be reached{nearest(name, also_known)}; {ways_on}")
    root = minari_root()
    clear_leftovers(root)
    try:
        with hidden_root(root) as temporary:
            minari.load_dataset(name, download=True)
            publish(temporary, root)
    except ImportError as error:
        cause = error.__cause__ or error.__context__ or error
        missing = pip_name(getattr(cause, "name", None) or "huggingface_hub")
        fail(f"--env-name {name}: Minari downloads with huggingface_hub; pip install {missing}, which is missing")
    except Exception as error:  # noqa: BLE001  the hub's client raises errors of several libraries
        fail(f"--env-name {name}: {one_line(error, 200)}{nearest(name, also_known)}; {ways_on}")
    return name


# --- What a dataset is of ---------------------------------------------------------------------------------------------
class Foreign(gym.Wrapper):
    """Somebody else's task: whatever its code raises becomes a Fault, in one line with the place that raised it."""

    def reset(self, **kwargs):
        return self.guarded(self.env.reset, **kwargs)

    def step(self, action):
        return self.guarded(self.env.step, action)

    def guarded(self, function: Callable, *args, **kwargs):
        try:
            return function(*args, **kwargs)
        except Fault:
            raise
        except Exception as error:
            raise Fault(f"the task fails: {where_raised(error)}") from error


def one_line(error: BaseException, length: int = 300) -> str:
    """The message of an error of somebody else's code, or its name where it has none."""
    return " ".join(str(error).split())[:length] or type(error).__name__


def where_raised(error: Exception) -> str:
    """An error of somebody else's code in one line, with the place that raised it."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {'/'.join(Path(place.filename).parts[-2:])}:{place.lineno}: {one_line(error)}"


class RobosuiteTask(gym.Env):
    """A robosuite task as a robomimic file describes it: low-dimensional observations, success ends the episode."""

    # Steps; qc robomimic_utils.py:34. Other tasks get twice the longest demonstration.
    HORIZONS = {"Lift": 300, "PickPlaceCan": 300, "NutAssemblySquare": 400, "TwoArmTransport": 800, "ToolHang": 1000}

    def __init__(self, env_args: dict, keys: list[str], longest: int = 250, render_mode: str | None = None):
        import robosuite

        name = env_args["env_name"]
        theirs, ours = env_args.get("env_version"), robosuite.__version__
        if theirs and theirs.split(".")[:2] != ours.split(".")[:2]:
            raise Misfit(f"the data is of robosuite {theirs}, here is {ours}, whose controllers and scenes differ")
        if os.environ.get("CUDA_VISIBLE_DEVICES") == "":  # no GPU for PyTorch; robosuite's EGL wants a number there
            os.environ.setdefault("MUJOCO_EGL_DEVICE_ID", "0")
        options = {"has_renderer": False, "has_offscreen_renderer": render_mode is not None}
        options |= {"use_camera_obs": False, "ignore_done": True}
        settings = env_args["env_kwargs"] or {}
        self.sim = robosuite.make(name, **settings | options)
        self.keys = keys
        self.horizon = self.HORIZONS.get(name, 2 * longest)
        self.render_mode = render_mode
        self.metadata = {"render_fps": 20}
        low, high = self.sim.action_spec
        text = json.dumps(settings)
        if '"control_delta": false' in text or '"input_type": "absolute"' in text:  # metres, not to be cut at 1
            low, high = np.full_like(low, -np.inf), np.full_like(high, np.inf)
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
        return self.observe(self.sim.reset()), {"success": False}

    def step(self, action):
        raw, reward, *_ = self.sim.step(action)
        self.steps += 1
        success = bool(self.sim._check_success())
        return self.observe(raw), float(reward), success, self.steps >= self.horizon, {"success": success}

    def render(self):
        return self.sim.sim.render(camera_name="agentview", width=256, height=256)[::-1]


def make_task(dataset, box: spaces.Box, render: bool = False) -> gym.Env | None:
    """The task that a Minari dataset is of, for actions in `box`; None, with a line that says why, where none runs.

    Somebody else's code may raise anything, and learning goes on all the same.
    """
    options = {"render_mode": "rgb_array"} if render else {}
    try:
        task = with_opengl(lambda: recover(dataset, options), f"the task of {dataset.id}", render)
        env = Foreign(Checked(task, f"the task of {dataset.id}"))
        env.reset(seed=0)
    except Exception as error:  # noqa: BLE001
        remedy = f"; pip install {pip_name(error.name)}" if isinstance(error, ImportError) and error.name else ""
        plain = isinstance(error, ImportError | gym.error.Error | Misfit | Fault)
        said = one_line(error) if plain else where_raised(error)
        print(f"no evaluation: the task of {dataset.id} does not run here ({said}{remedy})", file=sys.stderr)
        return None
    for what in ("observation", "action"):
        ours, theirs = (getattr(owner, f"{what}_space") for owner in (env, dataset))
        if layout(ours) != layout(theirs):
            print(f"no evaluation: {dataset.id} has {what}s {theirs}, the task here {ours}", file=sys.stderr)
            return None
    task = env.action_space
    if (box.low < task.low - 1e-3).any() or (box.high > task.high + 1e-3).any():
        cut = f"the task takes {bounds_of(task)}, where they are cut"
        say_once(f"{dataset.id}: the policy's actions are in {bounds_of(box)}, {cut}")
    return env


def recover(dataset, options: dict) -> gym.Env:
    """The environment of a dataset, as whoever made the dataset described it."""
    about = dataset.storage.metadata
    if "robomimic" in about:
        return RobosuiteTask(**json.loads(about["robomimic"]), **options)
    if "ogbench" in about:
        import ogbench

        return ogbench.make_env_and_datasets(about["ogbench"], env_only=True, **options)
    if dataset.env_spec is None and "d4rl" not in about:
        raise Misfit("the data names no task of gymnasium's; --env-name may, beside --dataset-path")
    with warnings.catch_warnings(action="ignore"):  # other versions of mujoco than the data was made with
        if "d4rl" in about:
            return d4rl_robot(about["d4rl"], about["contact_forces"], options)
        return time_limited(dataset.recover_environment(eval_env=True, **options), f"the task of {dataset.id}")


def pip_name(module: str) -> str:
    """What to install for a module that is missing; robosuite in the version that takes the other pins."""
    return {"robosuite": "robosuite==1.5.1"}.get(module, module.partition(".")[0].replace("_", "-"))


def reference_scores(dataset) -> tuple[tuple[float, float], str]:
    """Returns that count as 0 and 100, and whose they are: the dataset's own, or those of D4RL's like robot."""
    about = dataset.storage.metadata
    worst, best = about.get("ref_min_score"), about.get("ref_max_score")
    if worst is not None and best is not None:
        if worst == best:  # recorded by a policy that is no better than a random one
            return (math.nan, math.nan), ""
        return (worst, best), about.get("reference", "Minari")
    robot = dataset.env_spec.id.rpartition("-")[0] if dataset.env_spec else ""
    for family in FAMILIES.values():
        if family.task and family.task.rpartition("-")[0] == robot:
            return (family.worst, family.best), "D4RL_scale"  # another version of the robot: not D4RL's score
    return (math.nan, math.nan), ""


def print_facts(dataset, returns: list[float], episodes: int, steps: int, where: str) -> None:
    """Says what the data is; `returns` of the episodes that are used. Numbers are comparable only on the same data."""
    (worst, best), source = reference_scores(dataset)
    owner = {"D4RL_scale": "D4RL's scale, another version of its robot"}.get(source, f"{source}'s references")
    scores = f"{owner}: score 0 is {worst:.6g}, 100 is {best:.6g}" if source else "no reference scores"
    size = f"{dataset.storage.get_size():.0f} MB, {where}"
    print(f"data: {dataset.id}, {size}, {len(returns)} of {episodes} episodes, {steps:,} steps")
    print(f"data: mean return {np.mean(returns):.6g}, best {max(returns):.6g}; {scores}", flush=True)


def remember(path: Path, rows) -> None:
    """Writes what a run learns from. Exits with one line when its file says that it was other data."""
    facts = {"id": rows.source.id, "steps": rows.size, "actions": [rows.box.low.tolist(), rows.box.high.tolist()]}
    if path.exists():
        check_fingerprint(f"{path.parent}: the data of this run", json.loads(path.read_text()), facts)
    else:
        write_atomically(path, json.dumps(facts).encode())


def choose_episodes(
    dataset, returns: dict[int, float], validation_fraction: float, top_fraction: float, seed: int
) -> tuple[list[int], list[int]]:
    """Numbers of episodes to learn from, the best `top_fraction` by return, and of those held out for validation.

    A file that names its own held-out ones, as robomimic's, is followed. Exits with one line when nothing is left.
    """
    held_out = []
    if validation_fraction:
        order = np.random.default_rng(seed).permutation(list(returns)).tolist()
        count = math.ceil(validation_fraction * len(order) - 1e-9)
        held_out = dataset.storage.metadata.get("validation") or order[:count]
    best_first = sorted(set(returns) - set(held_out), key=lambda number: (-returns[number], number))
    kept = best_first[: math.ceil(top_fraction * len(best_first) - 1e-9)]  # 0.56 * 25 is a little more than 14
    if not kept:
        fail(f"{dataset.id}: no episode is left to learn from; --validation-fraction {validation_fraction}")
    return sorted(kept), sorted(held_out)


# --- Rows -------------------------------------------------------------------------------------------------------------
def entries(
    space: spaces.Space, observations, path: str = "observations"
) -> Iterator[tuple[str, spaces.Space, object]]:
    """(path, space, numbers (T, ...)) of what observations hold, in the order of sorted names; choices as one-hot.

    Exits with one line at what is no numbers.
    """
    if isinstance(space, spaces.Dict):
        for key in sorted(space):
            yield from entries(space[key], observations[key], f"{path}/{key}")
    elif isinstance(space, spaces.Discrete):
        choices = np.asarray(observations, int) - int(space.start)
        if not ((choices >= 0) & (choices < space.n)).all():
            fail(f"{path} hold choices that are not in {space}; repair the data")
        one_hot = np.eye(int(space.n), dtype=np.float32)[choices]
        yield path, spaces.Box(0, 1, one_hot.shape[1:]), one_hot
    elif isinstance(space, spaces.Box | spaces.MultiBinary):
        yield path, space, observations
    else:
        fail(f"{path} are {space}, neither numbers nor images; leave them out of the data")


def image_name(path: str) -> str:
    """observations/front/rgb -> front_rgb, observations -> image; "state" is that of what is no image."""
    name = re.sub(r"\W", "_", path.partition("/")[2]) or "image"
    return "state_image" if name == "state" else name


def image_spaces(space: spaces.Space, path: str = "observations") -> dict[str, spaces.Box]:
    """Paths of the images in an episode, with their spaces."""
    if isinstance(space, spaces.Dict):
        return {k: v for key, part in space.items() for k, v in image_spaces(part, f"{path}/{key}").items()}
    return {path: space} if looks_like_image(space) else {}


CHANNELS = (1, 2, 3, 4, 6, 9, 12)  # grey, RGB, depth, and stacks of them


def as_images(path: str, space: spaces.Box, x: np.ndarray) -> np.ndarray:
    """Images (N, *space.shape) as (N, H, W, C) uint8: with channels first or last, grey, or of float in 0 ... 1.

    Exits with one line where rows, columns, channels or the range cannot be told; raises Fault where they are others.
    """
    if isinstance(space, spaces.MultiBinary):
        space = spaces.Box(0, 1, space.shape, space.dtype)
    shape = space.shape
    order = None
    if len(shape) == 2:
        x, order = x[..., None], (0, 1, 2)
    elif len(shape) == 3 and shape[2] in CHANNELS and (shape[0] not in CHANNELS or shape[2] <= shape[0]):
        order = (0, 1, 2)
    elif len(shape) == 3 and shape[0] in CHANNELS:
        order = (1, 2, 0)
    low, high = float(space.low.min()), float(space.high.max())
    if order is None or (space.dtype != np.uint8 and (low, high) not in ((0, 1), (0, 255))):
        what = f"{path} of shape {shape} and {space.dtype} in {low:g} ... {high:g}"
        fail(f"{what}: no state, and no image of a known kind; make it uint8 (H, W, C), or choose in arrange() (TASK)")
    x = x.transpose(0, *(axis + 1 for axis in order))
    if x.dtype == space.dtype == np.uint8:
        return x
    least, most = float(x.min()), float(x.max())
    if not 0 <= least <= most <= high or (space.dtype == np.uint8 and x.dtype.kind == "f"):
        what = f"{path} hold {x.dtype} in {least:g} ... {most:g}, their space says {space.dtype} in 0 ... {high:g}"
        raise Fault(f"{what}; change them in the data, or in arrange() (TASK)")
    if 0 < most <= 1 < high:
        say_once(f"{path}: numbers up to 1 in a space up to {high:g} are black pictures; is the space 0 ... 1?")
    return np.round(x * (255 / high)).astype(np.uint8)


def hdf5_file(dataset) -> Path:
    return Path(dataset.storage.data_path) / "main_data.hdf5"


def episode_rewards(dataset) -> dict[int, np.ndarray]:
    """The rewards (T,) of every episode, where possible without reading the rest."""
    import h5py

    try:
        if dataset.storage.FORMAT != "hdf5":
            found = {int(episode.id): np.asarray(episode.rewards) for episode in dataset.iterate_episodes()}
        else:
            with h5py.File(hdf5_file(dataset)) as file:
                found = {int(i): file[f"episode_{i}/rewards"][:] for i in dataset.episode_indices}
        if not found:
            raise Misfit("holds no episodes")
        for rewards in found.values():
            check_values("rewards", rewards)
        return {number: per_step("rewards", rewards, len(rewards)) for number, rewards in found.items()}
    except Misfit as error:
        fail(f"{dataset.id}: {error}; repair the data, or leave those episodes out")
    except (OSError, KeyError, ValueError, TypeError) as error:
        fail(f"{dataset.id}: {unreadable(error)}")


def read_episodes(dataset, numbers: Iterable[int], images: bool = True) -> Iterator[tuple]:
    """(number, space, observations, actions, rewards, terminations) of episodes, with or without their images."""
    space = dataset.observation_space
    if images:
        found = (
            (int(e.id), e.observations, e.actions, e.rewards, e.terminations, e.truncations)
            for e in dataset.iterate_episodes(numbers)
        )
    else:
        space = without_images(space)
        found = episodes_without_images(dataset, space, numbers)
    try:
        for number, *parts in found:
            where = f"{dataset.id}, episode {number}"
            for path, part, x in entries(space, parts[0]):
                check_shapes(f"{where} of the data: {path}", part, x)
            observations, actions, rewards, terminations, _ = sound(where, *parts)
            check_shapes(f"{where} of the data: actions", dataset.action_space, actions)
            yield number, space, observations, actions, rewards, terminations
    except (OSError, KeyError, ValueError, TypeError) as error:
        fail(f"{dataset.id}: {unreadable(error)}")


def check_shapes(what: str, space: spaces.Space, x) -> None:
    """Exits with one line when numbers (T, ...) are not of their space's shape: they might broadcast."""
    if np.shape(x)[1:] != space.shape:
        fail(f"{what} have shape {np.shape(x)[1:]}, the dataset says {space.shape}; repair the data")


def without_images(space: spaces.Space) -> spaces.Dict:
    """What is left of observations that are images, or hold some."""
    parts = {}
    for key, part in space.items() if isinstance(space, spaces.Dict) else ():
        if not looks_like_image(part):
            parts[key] = without_images(part) if isinstance(part, spaces.Dict) else part
    return spaces.Dict(parts)


def episodes_without_images(dataset, space: spaces.Dict, numbers: Iterable[int]) -> Iterator[tuple]:
    import h5py

    def read(space: spaces.Space, group):
        if isinstance(space, spaces.Dict):
            return {k: read(v, group[k]) for k, v in space.items()}
        return group[:] if isinstance(group, h5py.Dataset) else group  # a Tuple's, which `entries` refuses

    with h5py.File(hdf5_file(dataset)) as file:
        for number in numbers:
            group = file[f"episode_{number}"]
            parts = (group[key][:] for key in ("actions", "rewards", "terminations", "truncations"))
            yield number, read(space, group["observations"]), *parts


class StoredImages:
    """Images (N, H, W, C) that stay in a Minari dataset's HDF5 file; indexed like an array, in any worker process."""

    def __init__(self, dataset, path: str, space: spaces.Box, lengths: dict[int, int]):
        from minari.dataset.minari_storage import is_image_space

        self.file_path = hdf5_file(dataset)
        self.path = path
        self.space = space
        self.jpeg = dataset.storage.jpeg_encoding and is_image_space(space)
        self.episodes = list(lengths)
        self.firsts = np.cumsum([0, *lengths.values()])
        self.pid, self.file = 0, None
        for row, length in zip(self.firsts, lengths.values()):
            self.check(row, length)
        zeros = np.zeros((1, *space.shape), space.dtype)
        self.shape = (sum(lengths.values()), *as_images(path, space, zeros).shape[1:])

    def __getstate__(self) -> dict:
        return self.__dict__ | {"pid": 0, "file": None}

    def check(self, row: int, length: int) -> None:
        """Exits with one line when an episode has not `length` + 1 images, or they are of another kind."""
        number, count, image = self.read(row)
        if (count, image.shape, image.dtype) != (length + 1, self.space.shape, self.space.dtype):
            what = f"{count} images of {image.shape} and {image.dtype}"
            wanted = f"{length + 1} of {self.space.shape} and {self.space.dtype}"
            fail(f"{self.file_path}, episode {number}: {self.path} are {what}, not {wanted}; repair the data")

    def read(self, row: int) -> tuple[int, int, np.ndarray]:
        """(number of a row's episode, how many images it has, the row's). Raises Fault where they cannot be read."""
        import h5py
        from imageio.v3 import imread

        if self.pid != os.getpid():  # a handle must not be used in two processes
            self.pid, self.file = os.getpid(), h5py.File(self.file_path)
        i = np.searchsorted(self.firsts, row, "right") - 1
        number = self.episodes[i]
        try:
            images = self.file[f"episode_{number}/{self.path}"]
            image = images[row - self.firsts[i]]
            image = imread(image.tobytes(), extension=".jpg") if self.jpeg else image
        except (OSError, KeyError, IndexError, SyntaxError, struct.error) as error:  # the last: Pillow
            raise Fault(f"{self.file_path}, episode {number}: {self.path} {unreadable(error)}") from error
        return number, len(images), image

    def __getitem__(self, rows) -> np.ndarray:
        rows = np.asarray(rows)
        images = np.empty((rows.size, *self.space.shape), self.space.dtype)
        for out, row in zip(images, rows.flat, strict=True):
            *_, out[:] = self.read(row)
        return as_images(self.path, self.space, images).reshape(*rows.shape, *self.shape[1:])


def to_unit(actions: np.ndarray, box: spaces.Box) -> np.ndarray:
    """Actions (T, ...) of a box as (T, A) in [-1, 1]; a dimension without width becomes 0."""
    low = box.low.astype(float)
    width = box.high.astype(float) - low
    unit = 2 * (actions - low) / np.where(width > 0, width, 1) - 1
    return np.where(width > 0, unit, 0).reshape(len(actions), -1)


def read_rows(
    dataset,
    lengths: dict[int, int],
    arrange: Callable,
    box: spaces.Box,
    action_bounds: str,
    data_loading: str,
    margin: float,
) -> dict:
    """Episodes {number: length} as rows (N, ...) in Q-chunking's layout; the actions in `box` become [-1, 1].
    `arrange(space, observations)` chooses what is observed, actions stay `margin` inside [-1, 1].

    Exits with one line when actions are outside the task's bounds, unless they are to be clipped (--action-bounds).
    """
    on_disk = images_stay_on_disk(dataset, data_loading)
    total = sum(lengths.values())
    fields = {}
    row = 0
    for number, space, observations, actions, rewards, terminations in read_episodes(dataset, lengths, not on_disk):
        steps = len(rewards)
        unit = to_unit(actions, box)
        reach = np.abs(unit).max()
        if reach > 1.001 and action_bounds == "task":
            where = f"{dataset.id}, episode {number}: actions reach {reach:.3g} times the bounds {bounds_of(box)}"
            ways = "--action-bounds clip clips slips; --action-bounds data takes the data's own (absolute actions)"
            fail(f"{where}; {ways}")
        arranged = arrange(space, observations) if arrays(observations) else {}  # (T + 1, ...)
        values = {
            "observations": each(lambda x: x[:-1], arranged),
            "actions": unit.clip(margin - 1, 1 - margin),
            "rewards": rewards,
            "terminals": np.arange(1, steps + 1) == steps,
            "masks": 1.0 - terminations,
        }
        if not isinstance(arranged, dict):
            values["next_observations"] = arranged[1:]
        if not fields:
            fields = each(lambda x: room(total, x), values)
        for field, x in zip(arrays(fields), arrays(values), strict=True):
            field[row : row + steps] = x
        row += steps
    if on_disk:
        states = fields["observations"]
        fields.pop("next_observations", None)
        fields["observations"] = states if isinstance(states, dict) else {"state": states}
        for path, image in image_spaces(dataset.observation_space).items():
            fields["observations"][image_name(path)] = StoredImages(dataset, path, image, lengths)
    return fields


def room(count: int, like: np.ndarray) -> np.ndarray:
    """Rows to fill, of images or of numbers."""
    return np.empty((count, *like.shape[1:]), np.uint8 if like.dtype == np.uint8 else np.float32)


def bounds_of(box: spaces.Box) -> str:
    """In one line, however many dimensions there are."""
    low, high = box.low.ravel(), box.high.ravel()
    if len(set(low)) == 1 and len(set(high)) == 1:
        return f"{low[0]:g} to {high[0]:g}"
    return " ".join(f"{a:g}:{b:g}" for a, b in zip(low[:8], high[:8])) + (" ..." if len(low) > 8 else "")


def action_box(dataset, own_bounds: bool) -> spaces.Box:
    """The actions that become -1 and 1: the dataset's bounds, or the least and largest that it holds."""
    space = dataset.action_space
    if not isinstance(space, spaces.Box) or space.dtype.kind != "f":
        fail(f"{dataset.id}: actions must be a bounded Box of floats, not {space}")
    if own_bounds:
        low, high = math.inf, -math.inf
        for _, _, _, actions, *_ in read_episodes(dataset, dataset.episode_indices, dataset.storage.FORMAT != "hdf5"):
            low, high = np.minimum(low, actions.min(0)), np.maximum(high, actions.max(0))
        return spaces.Box(*np.array([low, high], space.dtype), dtype=space.dtype)
    width = space.high.astype(float) - space.low
    if not (width <= HUGE).all():
        way = "--action-bounds data takes the data's own"
        fail(f"{dataset.id}: actions must be a bounded Box, its are {bounds_of(space)}; {way}")
    return space


def images_stay_on_disk(dataset, data_loading: str) -> bool:
    """By --data-loading; auto: when the images would take more than half of the free memory."""
    images = image_spaces(dataset.observation_space)
    names = [image_name(path) for path in images]
    if len(set(names)) < len(names):
        fail(f"{dataset.id}: {', '.join(images)} would share a name; rename one in the data")
    pixels = world_size() * sum(math.prod(space.shape) for space in images.values())  # each process loads a copy
    too_large = data_loading == "auto" and pixels * int(dataset.total_steps) > free_memory() / 2
    on_disk = pixels > 0 and (too_large or data_loading == "workers")
    if on_disk and dataset.storage.FORMAT != "hdf5":
        fail(f"{dataset.id}: is stored as {dataset.storage.FORMAT}, workers read hdf5; --data-loading memory")
    return on_disk


# --- Batches ----------------------------------------------------------------------------------------------------------
class Batches(torch.utils.data.Dataset):
    """The training samples of each update. Which rows they are depends on seed and update only, so that a resumed run,
    worker processes and several GPUs all draw the same."""

    def __init__(
        self,
        data,
        horizon: int,
        frame_stack: int,
        batch_size: int,
        seed: int,
        num_workers: int,
        device: torch.device,
        learns: bool = True,
    ):
        """Chunks of `horizon` actions, and observations of `frame_stack` steps, of rows in Q-chunking's layout; batches
        of `batch_size` over all processes. `num_workers` processes read the images that are on disk.

        Exits with one line when no episode is as long as a chunk, where something `learns` from them.
        """
        self.horizon = horizon
        self.frame_stack = frame_stack
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.count = max(data.size - horizon + 1, 1)  # rows that a chunk can begin at; qc utils/datasets.py:93
        starts, ends = data.bounds()
        longest = (ends - starts).max() + 1
        if learns and horizon > longest:  # nothing would teach a chunk's last actions
            fail(f"--horizon-length {horizon}: the longest episode of the data has {longest} steps")
        parts = [data["actions"], *arrays(data["observations"])]
        self.on_disk = any(isinstance(x, StoredImages) for x in parts)
        fits = device.type == "cuda" and not self.on_disk
        fits = fits and sum(x.nbytes for x in parts) < torch.cuda.mem_get_info()[0] / 2
        self.device = device if fits else torch.device("cpu")
        self.observations = each(self.tensor, data["observations"])
        self.actions = self.tensor(data["actions"])
        self.starts, self.ends = self.tensor(starts), self.tensor(ends)

    def tensor(self, x):
        return x if isinstance(x, StoredImages) else torch.from_numpy(x).to(self.device)

    def rows(self, step: int) -> np.ndarray:
        """(B,) the rows of an update's samples, of this process."""
        rng = np.random.default_rng([self.seed, step])
        return rng.integers(self.count, size=self.batch_size)[rank() :: world_size()]

    def gather(self, rows: Tensor) -> tuple:
        """Observations (..., O), chunks (..., h * A) and their valid steps (..., h) at rows (...)."""
        chunk = rows.unsqueeze(-1) + torch.arange(self.horizon, device=self.device)  # (..., h)
        back = torch.arange(self.frame_stack - 1, -1, -1, device=self.device)
        stack = torch.maximum(rows.unsqueeze(-1) - back, self.starts[rows].unsqueeze(-1))  # (..., N)

        def stacked(x) -> Tensor:
            frames = torch.from_numpy(x[stack.numpy()]) if isinstance(x, StoredImages) else x[stack]
            return frames.movedim(rows.ndim, -2).flatten(-2)  # (..., H, W, N * C)

        valid = (chunk <= self.ends[rows].unsqueeze(-1)).float()
        return each(stacked, self.observations), self.actions[chunk.clamp(max=len(self.actions) - 1)].flatten(-2), valid

    def __getitem__(self, step: int) -> tuple:
        return self.gather(torch.from_numpy(self.rows(step)))

    def open(self, start: int, stop: int, pin_memory: bool, held: int = 1) -> None:
        """Starts the workers, if images are on disk, for updates `start` to `stop`, of which one `take` has `held`.

        Exits with one line when their samples do not fit into the memory that they share: they would wait forever.
        """
        if not self.on_disk:
            return
        options = {"batch_size": None, "sampler": range(start, stop), "num_workers": self.num_workers}
        if self.num_workers:
            options |= {"prefetch_factor": 4, "persistent_workers": True, "worker_init_fn": ignore_ctrl_c}
            if (shared := Path("/dev/shm")).is_dir():
                size = sum(x.nbytes for part in self[start] for x in arrays(part))
                size *= min(stop - start, 4 * self.num_workers + held) * world_size()
                check_space(shared, size, f"--num-workers {self.num_workers} (0 needs none)")
        self.loader = iter(torch.utils.data.DataLoader(self, pin_memory=pin_memory, **options))
        if self.num_workers:  # PyTorch's handler raises wherever the program is; `take` sees a killed one within 5 s
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def close(self) -> None:
        """Ends the workers."""
        self.loader = None

    def take(self, step: int, count: int, device: torch.device) -> tuple:
        """Of `count` updates from `step`: observations (K, B, ...), chunks (K, B, hA), valid (K, B, h)."""
        if self.on_disk:
            try:
                parts = zip(*[next(self.loader) for _ in range(count)])  # of each update
            except Fault as error:  # a worker's has the traceback before it
                raise Fault(str(error).rpartition("Fault: ")[2].strip()) from error
            except (ConnectionError, EOFError, FileNotFoundError) as error:
                raise RuntimeError(f"DataLoader worker (pid unknown) was killed amid a batch: {error!r}") from error

            def moved(*xs: Tensor) -> Tensor:  # from pinned memory, so before they are stacked
                return torch.stack([x.to(device, non_blocking=True) for x in xs])

            return tuple(each(moved, *part) for part in parts)
        rows = np.stack([self.rows(step + k) for k in range(count)])
        samples = self.gather(torch.from_numpy(rows).to(self.device))
        return tuple(each(lambda x: x.to(device), part) for part in samples)

    def fixed(self, count: int, device: torch.device) -> tuple:
        """The same samples (count, B, ...) at every call, to validate on."""
        rows = np.random.default_rng(0).integers(self.count, size=(count, self.batch_size))
        samples = self.gather(torch.from_numpy(rows).to(self.device))
        return tuple(each(lambda x: x.to(device), part) for part in samples)
