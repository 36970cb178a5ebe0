"""Episodes: kept as they happen, demonstrated, played again through a script's wrappers, stored with Minari."""

import contextlib
import copy
import dataclasses
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from tqdm import tqdm

from common import datasets
from common.datasets import as_stored, each, id_for, is_here, local_dataset, sound, storable, store, unreadable, write
from common.envs import Checked, Wrap, episode_seed, leaves, looks_like_image, make, say_once
from common.evaluation import Policy, evaluate
from common.recording import check_fingerprint, check_new_dataset, fingerprint, layout
from common.setup import fail

SPREAD = 5  # starts that are looked at for each demonstration


class Episode(NamedTuple):
    """A recorded episode of T steps, in the task's own observations and actions."""

    observations: list  # T + 1
    actions: np.ndarray  # (T, A)
    rewards: np.ndarray  # (T,)
    terminations: np.ndarray  # (T,) bool
    truncations: np.ndarray  # (T,) bool
    info: dict  # of the last step


class Recorder(gym.Wrapper):
    """Keeps every episode that ends, in `episodes`."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.episodes: list[Episode] = []

    def reset(self, **kwargs):
        obs, info = self.env.reset(**kwargs)
        self.observations = [copy.deepcopy(obs)]
        self.steps = []
        return obs, info

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        self.observations.append(copy.deepcopy(obs))
        self.steps.append((np.array(action), float(reward), bool(terminated), bool(truncated)))
        if terminated or truncated:
            columns = [np.array(column) for column in zip(*self.steps)]
            self.episodes.append(Episode(self.observations, *columns, info))
        return obs, reward, terminated, truncated, info


class Playback(gym.Env):
    """A recorded episode as an environment, so that demonstrations pass through the same wrappers as live steps."""

    def __init__(self, env: gym.Env, episode: Episode):
        self.observation_space = env.observation_space
        self.action_space = env.action_space
        self.spec = env.spec
        self.episode = episode

    def reset(self, **kwargs):
        self.t = 0
        return self.episode.observations[0], {}

    def step(self, action):
        reward = float(self.episode.rewards[self.t])
        terminated = bool(self.episode.terminations[self.t])
        self.t += 1
        return self.episode.observations[self.t], reward, terminated, self.t == len(self.episode.rewards), {}


# --- Demonstrations ---------------------------------------------------------------------------------------------------
def demonstrations(source: str, env: gym.Env, seed: int, noise: float) -> Iterator[Episode]:
    """Episodes for the task `env`: `source` of them by its scripted expert, from starts far from each other, or those
    of the Minari dataset `source`.

    `noise` is the standard deviation on the expert's actions, relative to their range [-1, 1]. Exits with one line when
    the task has no expert, or the dataset is not of this task.
    """
    if not source.isdecimal() or not int(source):
        return minari_episodes(source, env)
    option = f"--demos {source}"
    expert_of(env, option)
    return expert_episodes(spread_starts(int(source), env, seed), env, seed, noise, option)


def spread_starts(count: int, env: gym.Env, seed: int) -> list[int]:
    """Numbers of `count` episodes that start far from each other, of SPREAD times as many: few of them cover the task.

    Farthest first (Gonzalez 1985), by the numbers of the first observations, in their standard deviations. Images do
    not count: by them the cubes farthest from all others are those near the camera. What images show, a task may tell
    as an array, info["start"] of its reset. Exits with one line when that is no array of numbers.
    """
    parts = leaves(env.observation_space)
    counts = np.concatenate([np.full(spaces.flatdim(part), not looks_like_image(part)) for _, part in parts])
    starts, told = [], []
    for number in range(SPREAD * count):
        obs, info = env.reset(seed=episode_seed(seed, 2, number))
        starts.append(spaces.flatten(env.observation_space, obs)[counts].astype(float))
        told.append(np.ravel(info.get("start", ())))
    numbers = all(start.dtype.kind in "biuf" and np.isfinite(start).all() for start in told)
    if not numbers or len({start.size for start in told}) > 1:
        fail(f'--demos {count}: info["start"] of a reset must be numbers, always as many, not {info.get("start")}')
    starts = np.hstack([starts, told])
    scaled = starts / (np.std(starts, 0) + 1e-3)
    chosen = [0]
    nearest = np.full(len(scaled), np.inf)
    while len(chosen) < count:
        to_last = np.linalg.norm(scaled - scaled[chosen[-1]], axis=1)
        nearest = np.minimum(nearest, to_last)
        nearest[chosen] = -1  # where all starts are the same
        chosen.append(int(nearest.argmax()))
    return chosen


def expert_of(env: gym.Env, option: str) -> Callable[[], np.ndarray]:
    """The method expert_action() of the task or of a wrapper of one's own. Exits with one line when there is none.

    A wrapper that changes actions must have one of its own: the task's are not what the wrapper takes.
    """
    layer = env
    while True:
        if "expert_action" in dir(type(layer)):
            try:
                inspect.signature(layer.expert_action).bind()
            except TypeError as error:
                fail(f"{option}: {type(layer).__name__}.expert_action() is called without arguments ({error})")
            return layer.expert_action
        changes = isinstance(layer, gym.ActionWrapper) or (
            isinstance(layer, gym.Wrapper) and layer.action_space != layer.env.action_space
        )
        if changes:
            name = type(layer).__name__
            fail(f"{option}: {name} changes actions, so it needs an expert_action() of its own; or give a dataset")
        if not isinstance(layer, gym.Wrapper):
            name = layer.spec.id if layer.spec else layer
            fail(f"{option}: {name} has no expert_action(); give a dataset, or --demos 0")
        layer = layer.env


def expert_episodes(numbers: Sequence[int], env: gym.Env, seed: int, noise: float, option: str) -> Iterator[Episode]:
    """The scripted expert's, of these numbers, with standard deviation `noise` on its actions; `option` asks for it."""
    expert = expert_of(env, option)
    recorder, space = Recorder(env), env.action_space
    rng = np.random.default_rng(seed)
    for number in numbers:
        recorder.reset(seed=episode_seed(seed, 2, number))
        done = False
        while not done:
            eps = noise * (space.high - space.low) / 2 * rng.standard_normal(space.shape)
            said = expert()
            try:
                action = np.asarray(said, float)
            except (TypeError, ValueError):  # text, or a pair
                action = np.zeros(0)
            if action.shape != space.shape or not np.isfinite(action).all():
                fail(f"{option}: expert_action() gives {said!r}, actions are {space}")
            action = np.clip(action + eps, space.low, space.high).astype(space.dtype)
            _, _, terminated, truncated, _ = recorder.step(action)
            done = terminated or truncated
        yield recorder.episodes.pop()


def collect(env_name: str, count: int, seed: int, success: Callable[[dict], float]) -> str:
    """`count` successful demonstrations of a task's scripted expert as a local Minari dataset; its id. They are
    collected once, and anew when the file that holds the task has changed."""
    env = make(env_name, option="--env-name")
    spec = storable(gym.spec(env_name))
    settings = f"{env_name}, {count} successes, noise 0.0, seed {seed}"
    code = Path(inspect.getfile(type(env.unwrapped))).read_bytes()
    dataset_id = id_for("scripted", env_name, f"{settings} {spec.to_json()} {code}")
    if is_here(dataset_id):
        env.close()
        return dataset_id
    if not hasattr(env.unwrapped, "expert_action"):
        fail(f"--env-name {env_name}: has no expert_action(); name a dataset of it (`minari list local`)")

    def successes() -> Iterator[tuple]:
        attempts = 10 * count
        with tqdm(total=count, desc="demonstrations", unit="episode") as bar:
            for episode in expert_episodes(range(attempts), env, seed, 0.0, f"--demos {count}"):
                if success(episode.info) != 0:
                    yield as_stored(episode)
                    bar.update()
                if bar.n == count:
                    return
        fail(f"--env-name {env_name}: its scripted expert succeeds in {bar.n} of {attempts} episodes only")

    about = {"observation_space": env.observation_space, "action_space": env.action_space}
    about |= {"algorithm_name": "scripted expert", "description": settings}
    with contextlib.closing(env):  # it may own a port
        return store(dataset_id, successes(), {"env_spec": spec.to_json()}, **about)


def minari_episodes(dataset_id: str, env: gym.Env) -> Iterator[Episode]:
    dataset = local_dataset("--demos", dataset_id)
    if not dataset.total_episodes:
        fail(f"--demos {dataset_id}: has no steps")
    if isinstance(dataset.observation_space, spaces.Tuple):
        fail(f"--demos {dataset_id}: its observations are a Tuple; make them a Dict in make_env, and record again")
    ours, theirs = env.action_space, dataset.action_space
    same_actions = isinstance(theirs, spaces.Box) and ours.shape == theirs.shape
    if not same_actions or not np.allclose([ours.low, ours.high], [theirs.low, theirs.high]):
        fail(f"--demos {dataset_id}: is not of this task; its actions are {theirs}, the task's {ours}")
    if layout(env.observation_space) != layout(dataset.observation_space):
        spaces_of = f"{dataset.observation_space}, the task's {env.observation_space}"
        fail(f"--demos {dataset_id}: is not of this task; its observations are {spaces_of}")
    recorded, here = (spec.id if spec else None for spec in (dataset.spec.env_spec, env.spec))
    if recorded and recorded != here:
        say_once(f"--demos {dataset_id}: was recorded in {recorded}, the task is {here}")
    if recorded_in := dataset.storage.metadata.get("fingerprint"):
        check_fingerprint(f"--demos {dataset_id}", recorded_in, fingerprint(env))
    try:
        for episode in dataset.iterate_episodes():
            yield minari_episode(f"--demos {dataset_id}: episode {episode.id}", episode, ours)
    except (OSError, KeyError, TypeError, ValueError, IndexError) as error:  # h5py's, for damaged parts
        fail(f"--demos {dataset_id}: {unreadable(error)}")


def minari_episode(name: str, episode, box: spaces.Box) -> Episode:
    """An episode of Minari's. Exits with one line when its parts do not fit together, or are no finite numbers."""
    parts = (episode.observations, episode.actions, episode.rewards, episode.terminations, episode.truncations)
    observations, actions, *columns = sound(name, *parts)
    if actions.shape[1:] != box.shape:  # they might broadcast
        fail(f"{name}: actions have shape {actions.shape[1:]}, the task's {box.shape}; leave it out")
    width = np.where(box.high > box.low, box.high - box.low, 1)
    if (np.maximum(actions - box.high, box.low - actions) > 1e-3 * width).any():
        fail(f"{name}: actions from {actions.min():.4g} to {actions.max():.4g} are outside {box}; scale or clip them")
    infos = episode.infos or {}
    info = {key: values[-1] for key, values in infos.items() if not isinstance(values, dict) and len(values)}
    steps = [each(lambda x, t=t: x[t], observations) for t in range(len(actions) + 1)]
    return Episode(steps, actions, *columns, info)


def summary(episodes: list[Episode], success: Callable[[dict], float]) -> str:
    """Episodes, steps and successes, in words."""
    verdicts = [success(episode.info) for episode in episodes]
    known = "success unknown" if all(map(math.isnan, verdicts)) else f"{verdicts.count(1)} successful"
    return f"{len(episodes)} episodes, {sum(len(episode.rewards) for episode in episodes)} steps, {known}"


def as_live_steps(episode: Episode, env: gym.Env, wrap: Wrap, chunk: int = 1) -> Iterator[tuple]:
    """An episode of the task `env` as the wrapped task would give it: (action, obs, reward, terminated), from the reset
    on, whose action is None. Actions are in [-1, 1]; with `chunk` > 1 the last chunk is filled up by its last action.
    """
    playback = wrap(Checked(Playback(env, episode), "a demonstration"))
    low, high = env.action_space.low, env.action_space.high
    width = np.where(high > low, high - low, 1)
    actions = np.clip(2 * (episode.actions - low) / width - 1, -1, 1)  # (T, A)
    padding = np.repeat(actions[-1:], -len(actions) % chunk, 0)
    obs, _ = playback.reset()
    yield None, obs, 0.0, False
    for action in np.concatenate([actions, padding]).reshape(-1, chunk * actions.shape[1]):
        obs, reward, terminated, truncated, _ = playback.step(action)
        yield action, obs, reward, terminated
        if terminated or truncated:
            return


# --- Minari datasets --------------------------------------------------------------------------------------------------
def record(
    dataset_id: str, episodes: Iterable[Episode], env: gym.Env, success: Callable[[dict], float], **about
) -> None:
    """Stores episodes of the task `env` as a local Minari dataset that knows its task; `about` as Minari names it."""
    from gymnasium.vector.utils import concatenate, create_empty_array
    from minari.data_collector import EpisodeBuffer

    check_new_dataset(dataset_id)  # another run may have recorded meanwhile
    space, buffers = env.observation_space, []
    for episode in episodes:
        stacked = concatenate(space, episode.observations, create_empty_array(space, len(episode.observations)))
        columns = (episode.actions, episode.rewards, episode.terminations, episode.truncations)
        verdict = success(episode.info)
        infos = None
        if not math.isnan(verdict):  # known at the end only
            infos = {"success": np.array([False] * len(episode.rewards) + [bool(verdict)])}
        buffers.append(EpisodeBuffer(len(buffers), None, None, stacked, *columns, infos))
    spec = dataclasses.replace(env.unwrapped.spec, max_episode_steps=env.spec.max_episode_steps)  # the wrapper's limit
    about["env_spec"] = storable(spec).to_json()
    boxes = [part for _, part in leaves(space) if isinstance(part, spaces.Box)]
    size = sum(math.prod(box.shape) * box.dtype.itemsize for box in boxes) * sum(len(x.rewards) + 1 for x in buffers)
    datasets.check_space(datasets.minari_root(), 1e6 + 1.2 * size, f"--record-dataset {dataset_id}")
    write(dataset_id, buffers, about, observation_space=space, action_space=env.action_space)


def last_evaluation(
    policy: Policy,
    task: gym.Env,
    wrap: Wrap,
    count: int,
    seed: int,
    success: Callable[[dict], float],
    dataset_id: str | None,
) -> dict[str, float]:
    """`evaluate` in `task`, which is closed. With a name for it the episodes become a Minari dataset, whose lower score
    is that of random actions."""
    recorder = Recorder(task) if dataset_id else task
    env = wrap(recorder)
    scalars = evaluate(policy, [env], count, seed, success)
    if dataset_id:
        episodes = list(recorder.episodes)
        random = evaluate(lambda _, rngs: rngs[0].uniform(-1, 1, env.action_space.shape), [env], 10, seed, success)
        record(
            dataset_id,
            episodes,
            recorder,
            success,
            algorithm_name="SAC",
            ref_min_score=random["eval/episodic_return"],
            ref_max_score=float(np.mean([episode.rewards.sum() for episode in episodes])),
            description="Reference scores: mean return of 10 episodes of random actions, and of this dataset.",
        )
    task.close()
    return scalars
