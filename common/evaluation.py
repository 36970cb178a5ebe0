"""Seeded roll-outs of a policy, side by side; their video, and their recording as a Minari dataset."""

import math
import sys
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path

import gymnasium as gym
import numpy as np

from common.envs import Episode, Recorder, episode_seed
from common.setup import fail

# Actions (N, A), or chunks of H actions (N, H * A) or (N, H, A), for the observations of N episodes, as a list; the
# generators, one an episode, are for noise, so that an episode does not depend on what else runs beside it.
Policy = Callable[[list, list[np.random.Generator]], np.ndarray]


class Rollout:
    """One episode: `rewards`, `info` of its last step, and what it executes next."""

    def __init__(self, env: gym.Env, number: int, seed: int, frame: Callable[[np.ndarray], None] | None):
        self.env = env
        self.number = number
        self.rng = np.random.default_rng(episode_seed(seed, 1, number))
        self.obs, self.info = env.reset(seed=episode_seed(seed, 1, number))
        self.queue: deque[np.ndarray] = deque()
        self.rewards: list[float] = []
        self.done = False
        self.frame = frame
        self.show()

    def show(self) -> None:
        if self.frame is not None:
            image = self.env.render()
            self.frame(image[-1] if isinstance(image, list) else image)

    def step(self) -> None:
        """Executes the next action of the queue."""
        self.obs, reward, terminated, truncated, self.info = self.env.step(self.queue.popleft())
        self.rewards.append(float(reward))
        self.done = terminated or truncated
        self.show()


def roll_out(
    policy: Policy,
    envs: list[gym.Env],
    episodes: int,
    seed: int,
    stop: Callable[[], bool] = lambda: False,
    frame: Callable[[np.ndarray], None] | None = None,
) -> list[Rollout]:
    """`episodes` finished roll-outs, by number; each has a seed of its own. None when `stop` says so in between.

    With several environments the episodes run side by side; the policy is asked only for those whose queue of actions
    is used up, for all of them in one batch. `frame` takes the rendered images (H, W, 3), of one environment.
    """
    (action_dim,) = envs[0].action_space.shape
    waiting = iter(range(episodes))
    running = [Rollout(env, number, seed, frame) for env, number in zip(envs, waiting, strict=False)]
    finished = []
    while running:
        if stop():
            return []
        asking = [rollout for rollout in running if not rollout.queue]
        if asking:
            chunks = policy([rollout.obs for rollout in asking], [rollout.rng for rollout in asking])
            for rollout, chunk in zip(asking, np.reshape(chunks, (len(asking), -1, action_dim)), strict=True):
                rollout.queue.extend(chunk)
        for i, rollout in enumerate(running):
            rollout.step()
            if rollout.done:
                finished.append(rollout)
                number = next(waiting, None)
                running[i] = None if number is None else Rollout(rollout.env, number, seed, frame)
        running = [rollout for rollout in running if rollout is not None]
    return sorted(finished, key=lambda rollout: rollout.number)


def evaluate(
    policy: Policy,
    envs: list[gym.Env],
    episodes: int,
    seed: int,
    success: Callable[[dict], float],
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Means over seeded episodes, as `eval/...`; empty when `stop` gave them up. `success` reads the last info."""
    rollouts = roll_out(policy, envs, episodes, seed, stop)
    if not rollouts:
        return {}
    return {
        "eval/episodic_return": float(np.mean([sum(rollout.rewards) for rollout in rollouts])),
        "eval/episodic_length": float(np.mean([len(rollout.rewards) for rollout in rollouts])),
        "eval/success_rate": float(np.mean([success(rollout.info) for rollout in rollouts])),
        "eval/episodes": float(episodes),
    }


def check_new_dataset(dataset_id: str) -> None:
    """Exits with one line when Minari would refuse this name, which it would do after the training."""
    import minari
    from minari.dataset.minari_dataset import parse_dataset_id

    try:
        parse_dataset_id(dataset_id)
    except ValueError as error:
        fail(f"--record-dataset: {error}")
    if dataset_id in minari.list_local_datasets():
        fail(f"--record-dataset {dataset_id}: exists; `minari delete` it, or give another name or version")


def record(
    dataset_id: str, episodes: Iterable[Episode], env: gym.Env, success: Callable[[dict], float], **about
) -> None:
    """Stores episodes of the task `env` as a local Minari dataset that knows its task; `about` as Minari names it."""
    import minari
    from gymnasium.vector.utils import concatenate, create_empty_array
    from minari.data_collector import EpisodeBuffer

    space, buffers = env.observation_space, []
    for episode in episodes:
        stacked = concatenate(space, episode.observations, create_empty_array(space, len(episode.observations)))
        columns = (episode.actions, episode.rewards, episode.terminations, episode.truncations)
        verdict = success(episode.info)
        infos = None
        if not math.isnan(verdict):  # known at the end only
            infos = {"success": np.array([False] * len(episode.rewards) + [bool(verdict)])}
        buffers.append(EpisodeBuffer(len(buffers), None, None, stacked, *columns, infos))
    minari.create_dataset_from_buffers(dataset_id, buffers, env=env.unwrapped.spec, **about)


def store_evaluation(
    dataset_id: str, recorder: Recorder, env: gym.Env, seed: int, success: Callable[[dict], float]
) -> None:
    """Stores what `recorder` kept as a Minari dataset; random actions in `env`, which wraps it, are its lower score."""
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


def record_video(policy: Policy, make: Callable[[], gym.Env], path: Path, seed: int, episodes: int = 4) -> None:
    """Writes the first evaluation episodes as an mp4, of the task that `make` makes; without OpenGL it says so."""
    import imageio.v2 as imageio

    try:
        env = make()
        with imageio.get_writer(path, fps=env.metadata.get("render_fps", 30), macro_block_size=1) as video:
            roll_out(policy, [env], episodes, seed, frame=video.append_data)
        env.close()
    except Exception as error:  # noqa: BLE001  OpenGL fails in many ways; the policy is trained and saved all the same
        print(f"no video: {error}; afterwards --eval-only {path.parent} writes it", file=sys.stderr)
