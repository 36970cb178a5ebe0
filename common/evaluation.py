"""Seeded roll-outs of a policy, side by side; their tables, curve and video."""

import contextlib
import math
import random
import sys
import tempfile
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from torch import Tensor

from common.envs import episode_seed, say_once, with_remedy
from common.setup import Fault

# Actions (N, A), or chunks of H actions (N, H * A) or (N, H, A), for the observations of N episodes, as a list; the
# generators, one an episode, are for noise, so that an episode does not depend on what else runs beside it.
Policy = Callable[[list, list[np.random.Generator]], np.ndarray]


def picture(env: gym.Env, option: str = "") -> np.ndarray:
    """The newest frame (H, W, 3) that a task renders; some give a list.

    Raises Fault when it is something else, which begins with the `option` that asks for pictures.
    """
    image = env.render()
    image = image[-1] if isinstance(image, list | tuple) and image else image
    if np.shape(image)[2:] != (3,) or np.asarray(image).dtype != np.uint8:
        what = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise Fault(f"{option}render() gives {what}, not an image (H, W, 3) of bytes")
    return image


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
            self.frame(picture(self.env))

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
    before = random.getstate(), np.random.get_state()  # noqa: NPY002  which each reset seeds, see envs.Checked
    rollouts = roll_out(policy, envs, episodes, seed, stop)
    random.setstate(before[0])
    np.random.set_state(before[1])  # noqa: NPY002  an episode of training goes on
    if not rollouts:
        return {}
    verdicts = [success(rollout.info) for rollout in rollouts]
    rate = success_rate(verdicts)
    names = [name for name in rollouts[0].info if "succ" in str(name).lower()]
    if names and math.isnan(rate):
        say_once(f"whether episodes succeed is unknown; the task's info has {names}: read one of them in success()")
    return {
        "eval/episodic_return": float(np.mean([sum(rollout.rewards) for rollout in rollouts])),
        "eval/episodic_length": float(np.mean([len(rollout.rewards) for rollout in rollouts])),
        "eval/success_rate": rate,
        "eval/episodes": float(episodes),
    }


def report(name: str, scalars: dict[str, float]) -> None:
    """One line for the terminal about an evaluation."""
    known = ("success_rate", "episodic_return", "validation_loss", "normalized_score")
    shown = [key for start in known for key in scalars if key.removeprefix("eval/").startswith(start)]
    numbers = ", ".join(f"{key} {scalars[key]:.5g}" for key in shown if math.isfinite(scalars[key]))
    episodes = scalars.get("eval/episodes", scalars.get("episodes", 0))
    print(f"{name}: {numbers or 'no evaluation'} over {episodes:.0f} episodes")


def success_rate(verdicts: list[float]) -> float:
    """Their mean; NaN where none is known. Where some are, the others have failed: many tasks say success only."""
    unknown = np.isnan(verdicts)
    if unknown.all():
        return math.nan
    if unknown.any():
        say_once("episodes whose last info does not say whether they succeeded count as failures")
    return float(np.mean(np.nan_to_num(verdicts)))


def quality(scalars: dict[str, float], prefix: str = "eval/") -> tuple[float, float]:
    """What makes an evaluation better than another: success, then return; unknown is worst."""
    values = [scalars.get(prefix + key, math.nan) for key in ("success_rate", "episodic_return")]
    return tuple(-math.inf if math.isnan(value) else value for value in values)


def record_video(policy: Policy, make: Callable[[], gym.Env], path: Path, seed: int, episodes: int = 4) -> None:
    """Writes the first evaluation episodes as an mp4, of the task that `make` makes; says so when it cannot."""
    import imageio.v2 as imageio

    unfinished = path.with_name(f"new_{path.name}")
    try:
        env = make()
        video = imageio.get_writer(unfinished, fps=env.metadata.get("render_fps", 30), macro_block_size=2)
        with contextlib.closing(video):  # its own `with` leaves it open after an error
            roll_out(policy, [env], episodes, seed, frame=video.append_data)
        env.close()
        unfinished.replace(path)
    except (Exception, SystemExit) as error:  # noqa: BLE001  rendering fails in many ways; what was learned is saved
        say_no_video(error, path.parent)
    finally:
        if unfinished.exists():  # else a read-only disk would complain
            unfinished.unlink()


def say_no_video(error: Exception, run_dir: str | Path) -> None:
    """One line with the way to get it later."""
    reason = " ".join(with_remedy(error).split())
    print(f"no video: {reason}; once that is mended, --eval-only {run_dir} writes it", file=sys.stderr)


def means(rollouts: list[Rollout], success: Callable[[dict], float]) -> dict[str, float]:
    """Return, length, success, and the numbers of the last info, as qc evaluation.py:120."""
    scalars = []
    for rollout in rollouts:
        known = {
            "episodic_return": sum(rollout.rewards),
            "episodic_length": len(rollout.rewards),
            "success_rate": success(rollout.info),
        }
        for key, value in rollout.info.items():
            if isinstance(value, int | float | np.number | np.bool_):
                known.setdefault(key, float(value))
        scalars.append(known)
    stats = {key: float(np.mean([x.get(key, math.nan) for x in scalars])) for key in (scalars or [{}])[0]}
    if scalars:
        stats["success_rate"] = success_rate([x["success_rate"] for x in scalars])
    return stats | {"episodes": float(len(rollouts))}


class Watched(gym.Wrapper):
    """Keeps what happens in the episodes that end: `trajectories`; with `frame_skip` also pictures, `renders`."""

    def __init__(self, env: gym.Env, frame_skip: int = 0):
        super().__init__(env)
        self.frame_skip = frame_skip  # steps per picture
        self.trajectories: list[dict[str, list]] = []
        self.renders: list[np.ndarray] = []

    def reset(self, **kwargs):
        self.obs, info = self.env.reset(**kwargs)
        self.trajectory = defaultdict(list)
        self.frames = []
        return self.obs, info

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        done = terminated or truncated
        step = {"observation": self.obs, "next_observation": obs, "action": action, "reward": float(reward)}
        for key, value in (step | {"done": float(done), "info": info}).items():
            self.trajectory[key].append(value)
        self.obs = obs
        if self.frame_skip and (done or len(self.trajectory["done"]) % self.frame_skip == 0):
            self.frames.append(picture(self.env))
        if done:
            self.trajectories.append(dict(self.trajectory))
            self.renders.append(np.stack(self.frames) if self.frames else None)
        return obs, reward, terminated, truncated, info


def film(policy: Policy, env: gym.Env, episodes: int, frame_skip: int, seed: int) -> list[np.ndarray]:
    """Pictures (T, H, W, 3), one of `frame_skip` steps, of the first evaluation episodes."""
    camera = Watched(env, frame_skip)
    roll_out(policy, [camera], episodes, seed)
    return camera.renders


def video_grid(renders: list[np.ndarray]) -> np.ndarray:
    """Videos (T, H, W, 3) side by side as one; shorter ones end in their last frame, darker. qc log_utils.py:101."""
    length = max(map(len, renders))
    columns = math.ceil(math.sqrt(len(renders)))
    padded = []
    for render in renders:
        rest = np.repeat(render[-1:] // 2, length - len(render), 0)
        padded.append(np.pad(np.concatenate([render, rest]), ((0, 0), (1, 1), (1, 1), (0, 0))))
    padded += [np.zeros_like(padded[0])] * (-len(padded) % columns)
    rows = [np.concatenate(padded[i : i + columns], 2) for i in range(0, len(padded), columns)]
    return np.concatenate(rows, 1)


def write_grid(renders: list[np.ndarray], path: Path, fps: int) -> None:
    import imageio.v2 as imageio

    with imageio.get_writer(path, fps=fps, macro_block_size=2) as video:
        for frame in video_grid(renders):
            video.append_data(frame)


def record_grid(
    policy: Policy, env: gym.Env, episodes: int, frame_skip: int, seed: int, path: Path, track: bool
) -> None:
    """Writes the first evaluation episodes side by side as an mp4, to `track` also to Weights & Biases; says so when it
    cannot."""
    try:
        renders = film(policy, env, episodes, frame_skip, seed)
        fps = max(int(30 / frame_skip), 1)
        if track:
            import wandb

            wandb.log({"eval/video": get_wandb_video(renders, fps, path)})
        else:
            write_grid(renders, path, fps)
    except Exception as error:  # noqa: BLE001  OpenGL fails in many ways; training goes on
        say_no_video(error, path.parent)


def get_wandb_video(renders: list[np.ndarray], fps: int = 15, path: Path | None = None):
    """A grid of videos for Weights & Biases, written to `path`, or to a temporary file."""
    import wandb

    path = path or Path(tempfile.mkdtemp(), "video.mp4")
    write_grid(renders, path, fps)
    return wandb.Video(str(path), format="mp4")


def plot_curves(folder: Path, tables: dict[str, tuple[str, ...]], x: str, seconds: float) -> None:
    """Writes curve.png: the columns of `tables` (files NAME.csv) that hold numbers, over their first column, `x`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves = []
    for name, columns in tables.items():
        path = folder / f"{name}.csv"
        if path.exists() and path.stat().st_size:
            table = np.genfromtxt(path, delimiter=",", names=True, deletechars="", ndmin=1)
            known = [key for key in columns if key in table.dtype.names and np.isfinite(table[key]).any()]
            curves += [(key, table[table.dtype.names[0]], table[key]) for key in known]
    width = max(len(curves), 1)
    figure, axes = plt.subplots(1, width, figsize=(5 * width, 3.5), squeeze=False, layout="constrained")
    for axis, (key, steps, values) in zip(axes[0], curves, strict=False):
        axis.plot(steps, values, marker="o", markersize=3)
        axis.set(xlabel=x, ylabel=key.removeprefix("eval/").replace("_", " "))
        axis.grid(alpha=0.3)
        if key.endswith("success_rate"):
            axis.set_ylim(-0.03, 1.03)
    figure.suptitle(f"{folder.name}, {seconds / 60:.1f} min", fontsize=9, parse_math=False)
    figure.savefig(folder / "curve.png", dpi=150)
    plt.close(figure)


# --- Tables -----------------------------------------------------------------------------------------------------------
class CsvLogger:
    """Rows of numbers; the first row fixes the columns. Goes on with a file that is there."""

    def __init__(self, path: str | Path):
        self.file = Path(path).open("a+")  # noqa: SIM115  closed by close()
        self.file.seek(0)
        header = self.file.readline().strip()
        self.columns = header.split(",") if header else []

    def log(self, row: dict, step: int) -> None:
        numbers = {"step": step} | only_numbers(row) | {"step": step}  # whatever a task calls step
        if not self.columns:
            self.columns = list(numbers)
            self.file.write(",".join(self.columns) + "\n")
        cells = [f"{numbers[key]:.9g}" if key in numbers else "" for key in self.columns]
        self.file.write(",".join(cells) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def only_numbers(row: dict) -> dict[str, float]:
    return {key: float(x) for key, x in row.items() if isinstance(x, int | float | np.number | Tensor)}


@dataclass
class LoggingHelper:
    """A CSV file for each prefix, and the same numbers as PREFIX/NAME to Weights & Biases and TensorBoard."""

    csv_loggers: dict[str, CsvLogger]
    wandb_logger: Any = None  # the module, or a run
    writer: Any = None  # TensorBoard's SummaryWriter

    def log(self, data: dict, prefix: str, step: int) -> None:
        self.csv_loggers[prefix].log(data, step)
        if self.wandb_logger is not None:
            self.wandb_logger.log({f"{prefix}/{key}": value for key, value in data.items()}, step=step)
        if self.writer is not None:
            for key, value in only_numbers(data).items():
                self.writer.add_scalar(f"{prefix}/{key}", value, step)
