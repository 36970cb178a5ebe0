"""Flow-matching behaviour cloning, with action chunks, from any offline dataset, in one file.

    python bc_flow_offline.py                                    # a Franka picks up a cube as a scripted expert does
    python bc_flow_offline.py --env-name halfcheetah-medium-v2   # needs a network, once, for the D4RL file
    python bc_flow_offline.py --env-name halfcheetah-medium-v2 --dataset-path FILE         # needs that file
    python bc_flow_offline.py --env-name mujoco/halfcheetah/medium-v0 --action-chunking    # needs a network, once
    python bc_flow_offline.py --env-name lift-mh-low_dim --action-chunking --horizon-length 10  # needs robomimic's file
    python bc_flow_offline.py --env-name cube-single-play-singletask-v0  # needs `pip install ogbench` and a network
    python bc_flow_offline.py --env-name franka/pick-v0 --action-chunking  # needs a recording of that name
    python bc_flow_offline.py --resume RUN_DIR                   # go on after Ctrl-C or a crash
    python bc_flow_offline.py --eval-only RUN_DIR --eval-episodes 100

Expect: success_rate >= 0.98, wall_s <= 300 (2 CPU cores) [benchmarks/results/bc_pick_default.csv]

Sources: flow matching arXiv:2210.02747; action chunks and names: Q-chunking arXiv:2507.07969 (ColinQiyangLi/qc, commit
48283b4, its behaviour-cloning part); FQL arXiv:2502.02538; D4RL arXiv:2004.07219; Minari; tanh-Gaussian cloning: SERL.
Differs from Q-chunking: no critic; a chunk is sampled only when the last one is used up; episodes run side by side and
are seeded; the last evaluation is at offline_steps (there: one step earlier); D4RL's MuJoCo robots are tasks, too.
Numbers are comparable only with numbers from the same data: Minari's medium is not D4RL's, so each run prints its data.
New experiment: copy this file; `grep -n TASK: my_task.py` lists the places to edit. common/ holds what is not learning.
"""

import contextlib
import copy
import dataclasses
import io
import math
import os
import random
import re
import shutil
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: spinning threads starve others

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn  # now: later its defaults would keep a process group: aborts at exit
import torch.nn.functional as F
import torch.utils.checkpoint
from gymnasium import spaces
from torch import Tensor, nn

from common import datasets, envs, tensors
from common.datasets import Batches, StoredImages, each
from common.episodes import collect
from common.evaluation import CsvLogger, LoggingHelper, Watched, film, means, plot_curves, record_grid, report, roll_out
from common.run import Run, quality, write_atomically
from common.setup import Fault, RunArgs, check_new_folder, check_numbers, ends_well, fail, flag, parse
from common.tensors import Follower, Graphed, RunningNormalizer, load_generator, rank, set_up_torch, world_size
from common.vision import ResNetTrunk, SmallTrunk, pad_same, random_crop

try:
    import franka_sim  # noqa: F401  registers the Franka tasks  # TASK: import what registers yours
except ImportError as error:  # its tasks are missing then, others run
    print(error, file=sys.stderr)

ACTION_CLIP_EPS = 1e-5  # dataset actions stay this far inside [-1, 1]; qc envs/env_utils.py:150
CROP_PADDING = 4  # training images are shifted by up to this many pixels
UPDATES_PER_LAUNCH = 20  # for which batches are gathered at once; on a GPU they are one CUDA graph


# --- Args -------------------------------------------------------------------------------------------------------------
@dataclass
class Args(RunArgs):
    # experiment
    seed: int = 0
    """seed of everything: networks, batches, noise, evaluation episodes"""
    run_group: str = "BC"
    """group of runs: part of the run directory, group and tag in Weights & Biases"""
    save_dir: str = "runs/fbc/"
    """runs are written to SAVE_DIR/robot-learning/RUN_GROUP/ENV_NAME/sdSEED_TIME"""
    # data and environment
    env_name: str = "FrankaPickCube-v0"  # TASK: your task or dataset
    """D4RL name, Minari id (namespace/name-v0), robomimic (lift-mh-low_dim), OGBench
    (...-singletask-v0), or gymnasium id of a task with a scripted expert, whose demonstrations are
    collected; RECIPES has other defaults for some"""
    dataset_path: str | None = None
    """HDF5 file of D4RL's or robomimic's layout to read; with a name of your own it is your data"""
    dataset_proportion: float = 1.0
    """use only this first part of the data"""
    sparse: bool = False
    """rewards become -1 where they are not 0"""
    top_fraction: float = 1.0
    """use only this fraction of the episodes, those of the highest return"""
    validation_fraction: float = 0.0
    """fraction of the episodes held out for eval/validation_loss; robomimic's own choice where its file has one
    (OGBench has validation data apart from this)"""
    action_bounds: Literal["task", "clip", "data"] = "task"
    """actions of the data outside the task's bounds are refused (task) or clipped; data: the bounds are the least and
    largest that the data holds, which fits absolute actions (positions instead of changes)"""
    demos: int = 200
    """demonstrations to collect from a task's scripted expert"""
    frame_stack: int = 1
    """observations of this many steps are stacked"""
    data_loading: Literal["auto", "memory", "workers"] = "auto"
    """images in memory, which is faster, or read from disk by workers; auto: by the free memory"""
    num_workers: int = 2
    """worker processes that read images"""
    # training
    offline_steps: int = 1_000_000
    """updates"""
    log_interval: int = 5_000
    """updates between rows of offline_agent.csv; also between checkpoints to resume from"""
    eval_interval: int = 100_000
    """updates between evaluations (0: only the last)"""
    save_interval: int = -1
    """updates between files checkpoint_STEP.pt that are kept (0 or less: none)"""
    eval_episodes: int = 50
    """episodes per evaluation"""
    eval_envs: int = 50
    """episodes that run side by side, their actions computed as one batch"""
    video_episodes: int = 0
    """episodes with video in each evaluation, beside eval_episodes"""
    video_frame_skip: int = 3
    """steps per video frame"""
    lr: float = 3e-4
    """learning rate"""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """cosine: the learning rate falls to 0 at offline_steps"""
    batch_size: int = 256
    """samples per update, over all processes and gradient accumulation steps"""
    grad_accum_steps: int = 1
    """an update's batch is computed in this many parts"""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay (0: Adam)"""
    ema: float = 0.0
    """the average of learned policies is evaluated: its decay per update (0: no averaging)"""
    # algorithm
    policy: Literal["flow", "gaussian"] = "flow"
    """flow matching, or SERL's tanh-Gaussian by maximum likelihood, which acts with its mode"""
    discount: float = 0.99
    """discount of the rewards that sample_sequence adds up (cloning does not use them)"""
    action_chunking: bool = False
    """predict horizon_length actions at once"""
    horizon_length: int = 5
    """actions in a chunk"""
    execution_horizon: int = 0
    """actions of a chunk that are executed before the next is sampled (0: all)"""
    flow_steps: int = 10
    """steps of the integration from noise to action"""
    flow_solver: Literal["euler", "heun"] = "euler"
    """integrator; heun evaluates the network twice per step"""
    use_fourier_features: bool = False
    """64 fixed sines and cosines of the flow's time instead of the time itself"""
    hidden_dims: tuple[int, ...] = (512, 512, 512, 512)
    """units of the hidden layers"""
    normalize_observations: bool = False
    """scale states by the data's mean and standard deviation"""
    encoder: Literal["small", "resnet10", "impala_small"] | None = None
    """network for images (default: impala_small where there are images)"""
    checkpoint_activations: bool = False
    """compute the encoders' activations twice instead of keeping them: less memory, more time"""

    MAY_CHANGE = "run_dir resume eval_only capture_video track compile threads offline_steps "
    MAY_CHANGE += "eval_episodes eval_envs video_episodes video_frame_skip save_interval num_workers "
    MAY_CHANGE += "data_loading dataset_path save_dir execution_horizon flow_steps flow_solver"

    @classmethod
    def recipe(cls, given: dict[str, str]) -> dict[str, Any]:
        """Defaults of the task that the command line names."""
        return RECIPES.get(given.get("--env-name", cls.env_name), {})

    @property
    def horizon(self) -> int:
        """Actions that are predicted at once."""
        return self.horizon_length if self.action_chunking else 1

    def check(self) -> None:
        """Exits with one line about a flag that makes no sense."""
        may_be_zero = {"seed", "eval_interval", "video_episodes", "execution_horizon", "num_workers"}
        fractions = {"dataset_proportion", "top_fraction", "validation_fraction", "ema", "discount"}
        check_numbers(self, may_be_zero, fractions, any_sign={"save_interval"})
        for name, nothing in (("dataset_proportion", 0), ("top_fraction", 0), ("validation_fraction", 1), ("ema", 1)):
            if getattr(self, name) == nothing:
                fail(f"{flag(name)} {getattr(self, name)}: leaves nothing to learn from")
        if self.batch_size % (self.grad_accum_steps * world_size()):
            parts = f"--grad-accum-steps {self.grad_accum_steps} on {world_size()} processes"
            fail(f"--batch-size {self.batch_size}: does not divide into {parts}; give a multiple")
        if self.dataset_path and Path(self.dataset_path).exists():  # for --resume in another folder
            self.dataset_path = str(Path(self.dataset_path).absolute())
        if self.execution_horizon > self.horizon:
            fail(f"--execution-horizon {self.execution_horizon}: a chunk has {self.horizon} actions (--horizon-length)")


BCAgentConfig = Args  # an agent needs no other settings than these
RECIPES: dict[str, dict[str, Any]] = {  # TASK: defaults of your task where they differ from the above
    "FrankaPickCube-v0": {
        "offline_steps": 5_000,
        "log_interval": 500,
        "eval_interval": 2_500,
        "action_chunking": True,
        "lr": 1e-3,
        "lr_schedule": "cosine",
        "ema": 0.995,
        "normalize_observations": True,
        "hidden_dims": (256, 256, 256),
    },
}


# --- Environment ------------------------------------------------------------------------------------------------------
def arrange(space: spaces.Space, observations):
    """Observations with a leading time axis as the policy takes them: states (T, O) float32, flat, by
    sorted names; with images {"state": (T, S), NAME: (T, H, W, C) uint8}. TASK: choose entries."""
    states = []
    images = {}
    for path, box, x in datasets.entries(space, observations):
        if envs.looks_like_image(box):
            images[datasets.image_name(path)] = datasets.as_images(path, box, x)
        else:
            states.append(np.asarray(x, np.float32).reshape(len(x), -1))
    if not images:
        return np.concatenate(states, -1)
    return images | ({"state": np.concatenate(states, -1)} if states else {})


class PolicyInput(gym.Wrapper):
    """Observations as `arrange` gives them, the last ones stacked; actions (A,) in [-1, 1] of the data's box."""

    def __init__(self, env: gym.Env, actions: spaces.Box, frame_stack: int = 1):
        super().__init__(env)
        self.stored = actions  # those of the data
        self.raw_space = env.observation_space
        self.action_space = spaces.Box(-1, 1, (math.prod(actions.shape),), np.float32)
        self.frames = deque(maxlen=frame_stack)

    def reset(self, **kwargs):
        obs, info = self.env.reset(**kwargs)
        self.frames.extend([self.arranged(obs)] * self.frames.maxlen)
        return self.stacked(), info

    def step(self, action):
        low, high = self.stored.low, self.stored.high
        action = low + (action.reshape(low.shape) + 1) / 2 * (high - low)
        task = self.env.action_space
        obs, *ends, info = self.env.step(action.clip(task.low, task.high).astype(task.dtype))
        self.frames.append(self.arranged(obs))
        return self.stacked(), *ends, info

    def arranged(self, obs):
        batch = each(lambda x: np.asarray(x)[None], obs)
        return each(lambda x: x[0], arrange(self.raw_space, batch))

    def stacked(self):
        return each(lambda *frames: np.concatenate(frames, -1), *self.frames)


def make_env(dataset: "Dataset", args: Args, render: bool = False) -> gym.Env | None:
    """The data's task, as the policy sees it; None, with a line, where there is none to run."""
    env = datasets.make_task(dataset.source, dataset.box, render)
    return None if env is None else PolicyInput(env, dataset.box, args.frame_stack)


def success(info: dict) -> float:
    """Whether the episode whose last info this is was a success, NaN where the task does not say.
    Where any step's success counts: `envs.AnySuccess(env, success)` in make_env."""
    return envs.truth(info, "success", "is_success", "succeed")  # TASK: yours


# --- Networks ---------------------------------------------------------------------------------------------------------
class FourierFeatures(nn.Module):
    """(B, 1) -> (B, 64): cosines and sines of fixed frequencies, qc utils/networks.py:26-42."""

    def __init__(self, size: int = 64):
        super().__init__()
        half = size // 2
        self.register_buffer("w", torch.exp(torch.arange(half) * -(math.log(10_000) / (half - 1))), persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        return torch.cat([(t * self.w).cos(), (t * self.w).sin()], -1)


class FeedForward(nn.Sequential):
    """[linear, GELU] * len(hidden_dims), linear; (B, in) -> (B, out); qc utils/networks.py:53-80."""

    def __init__(self, in_dim: int, hidden_dims: tuple[int, ...], out_dim: int):
        layers = []
        for dim in hidden_dims:
            layers += [nn.Linear(in_dim, dim), nn.GELU(approximate="tanh")]  # flax's GELU
            in_dim = dim
        super().__init__(*layers, nn.Linear(in_dim, out_dim))
        self.apply(xavier)


def xavier(layer: nn.Module) -> None:
    """flax's variance_scaling(1, fan_avg, uniform), and no bias."""
    if isinstance(layer, nn.Linear | nn.Conv2d):
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)


class ActorVectorField(nn.Module):
    """The flow's velocity (B, A) at features (B, F), point x_t (B, A) and time t (B, 1); qc utils/networks.py:217."""

    def __init__(self, in_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.time = FourierFeatures() if args.use_fourier_features else nn.Identity()
        time_dim = 64 if args.use_fourier_features else 1
        self.mlp = FeedForward(in_dim + action_dim + time_dim, args.hidden_dims, action_dim)

    def forward(self, features: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return self.mlp(torch.cat([features, x_t, self.time(t)], -1))


class GaussianPolicy(nn.Module):
    """Mean and log standard deviation before tanh, (B, A) each, of features (B, F); SERL agents/continuous/bc.py."""

    def __init__(self, in_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.mlp = FeedForward(in_dim, args.hidden_dims, 2 * action_dim)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.mlp(features).chunk(2, -1)
        return mean, log_std.clamp(-2, 2)  # smaller, a noiseless expert's easy actions outweigh all


class ImpalaTrunk(nn.Module):
    """(B, H, W, C) uint8 -> (B, 32, H / 8, W / 8); impala_small of qc utils/encoders.py: one residual block a stage."""

    def __init__(self, in_channels: int):
        super().__init__()
        self.stages = nn.ModuleList()
        for channels in (16, 32, 32):
            convs = [nn.Conv2d(width, channels, 3, padding=1) for width in (in_channels, channels, channels)]
            self.stages.append(nn.ModuleList(convs))
            in_channels = channels
        self.apply(xavier)

    def forward(self, images: Tensor) -> Tensor:
        x = images.permute(0, 3, 1, 2) / 255
        for first, second, third in self.stages:
            x = F.max_pool2d(pad_same(first(x), 3, 2, -math.inf), 3, 2)
            x = x + third(second(x.relu()).relu())
        return x.relu()


class ImageEncoder(nn.Module):
    """(B, H, W, C) uint8 -> (B, 512): a trunk and one layer over its whole map."""

    def __init__(self, shape: tuple[int, ...], args: Args):
        super().__init__()
        if args.encoder == "small":
            self.trunk = SmallTrunk(shape[-1], (32, 64, 128, 256), (2, 2, 2, 2))  # SERL agents/continuous/drq.py:140
        elif args.encoder == "resnet10":
            self.trunk = ResNetTrunk(shape[-1])
        else:
            self.trunk = ImpalaTrunk(shape[-1])
        try:
            size = self.trunk(torch.zeros(1, *shape, dtype=torch.uint8)).numel()
        except RuntimeError:  # too small, or not RGB
            fail(f"--encoder {args.encoder}: cannot take images of {shape}; --encoder impala_small takes any")
        self.linear = nn.Linear(size, 512)
        self.linear.apply(xavier)

    def forward(self, images: Tensor) -> Tensor:
        return F.gelu(self.linear(self.trunk(images).flatten(1)), approximate="tanh")


class ObservationEncoder(nn.Module):
    """States (B, O), or dicts with images, -> features (B, dim)."""

    def __init__(self, shape: tuple[int, ...] | dict[str, tuple[int, ...]], args: Args):
        super().__init__()
        shapes = shape if isinstance(shape, dict) else {"state": shape}
        state_dim = shapes["state"][0] if "state" in shapes else 0
        cameras = [name for name in shapes if name != "state"]
        if args.encoder and not cameras:
            fail(f"--encoder {args.encoder}: the observations are states, without images; leave it out")
        self.images = nn.ModuleDict({name: ImageEncoder(shapes[name], args) for name in cameras})
        normalize = args.normalize_observations and state_dim
        self.normalizer = RunningNormalizer(state_dim) if normalize else nn.Identity()
        self.dim = state_dim + 512 * len(cameras)
        self.checkpointing = args.checkpoint_activations

    def forward(self, observations) -> Tensor:
        if not self.images:
            return self.normalizer(observations)
        features = [self.normalizer(observations["state"])] if "state" in observations else []
        for name, network in self.images.items():
            if self.checkpointing and torch.is_grad_enabled():
                features.append(torch.utils.checkpoint.checkpoint(network, observations[name], use_reentrant=False))
            else:
                features.append(network(observations[name]))
        return torch.cat(features, -1)


class Policy(nn.Module):
    """Encoder and head: a flow or a Gaussian over chunks of actions."""

    def __init__(self, observation_shape, action_dim: int, args: Args):
        super().__init__()
        self.encoder = ObservationEncoder(observation_shape, args)
        head = ActorVectorField if args.policy == "flow" else GaussianPolicy
        self.head = head(self.encoder.dim, action_dim, args)


# --- Dataset ----------------------------------------------------------------------------------------------------------
class Dataset(dict):
    """Rows in Q-chunking's layout: observations, actions, rewards, terminals (1 where an episode
    ends), masks (0 where it terminated), next_observations unless they are images; all (N, ...)."""

    source = None  # the Minari dataset that it was read from
    box = None  # the actions of that dataset that are -1 and 1 here
    args = None  # the flags that it was read with

    @classmethod
    def create(cls, **fields) -> "Dataset":
        return cls(fields)

    @property
    def size(self) -> int:
        return len(self["actions"])

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """(N,) each: the first and the last row of every row's episode."""
        last = np.flatnonzero(np.append(self["terminals"][:-1], 1))
        first = np.concatenate([[0], last[:-1] + 1])
        return np.repeat(first, last - first + 1), np.repeat(last, last - first + 1)

    def stacked(self, idxs: np.ndarray):
        """Observations (B, ...) of rows, those of the last steps of the episode stacked; qc utils/datasets.py:74."""
        frames = self.args.frame_stack if self.args else 1
        if frames == 1:
            return each(lambda x: x[idxs], self["observations"])
        first, _ = self.bounds()
        rows = np.maximum(idxs[:, None] - np.arange(frames)[::-1], first[idxs][:, None])
        return each(lambda x: np.concatenate([x[row] for row in rows.T], -1), self["observations"])

    def sample(self, batch_size: int, idxs: np.ndarray | None = None) -> dict:
        """A batch of rows, uniformly with replacement; qc utils/datasets.py:66."""
        if idxs is None:
            idxs = np.random.randint(self.size, size=batch_size)  # noqa: NPY002  seeded by main
        batch = {key: each(lambda x: x[idxs], value) for key, value in self.items() if key != "observations"}
        batch["observations"] = self.stacked(idxs)
        if "next_observations" in batch:
            following = batch["next_observations"]
            kept = batch["observations"][..., following.shape[-1] :]  # all but the oldest
            batch["next_observations"] = np.concatenate([kept, following], -1)
        return batch

    def sample_sequence(
        self, batch_size: int, sequence_length: int, discount: float, idxs: np.ndarray | None = None
    ) -> dict:
        """Chunks that begin at any row, also near an episode's end; qc utils/datasets.py:92-154.

        observations (B, O) of the first step; full_observations, next_observations (B, L, O); actions, next_actions
        (B, L, A); rewards (B, L) discounted sums that run on over an end; masks running minimum; terminals running
        maximum; valid (B, L): 0 after an end.
        """
        if sequence_length > self.size:
            fail(f"--horizon-length {sequence_length}: the data has only {self.size} steps")
        if idxs is None:
            idxs = np.random.randint(self.size - sequence_length + 1, size=batch_size)  # noqa: NPY002
        rows = idxs[:, None] + np.arange(sequence_length)  # (B, L)
        batch = {key: each(lambda x: x[rows], value) for key, value in self.items()}
        batch["full_observations"] = batch["observations"]
        batch["observations"] = self.stacked(idxs)
        batch["next_actions"] = self["actions"][np.minimum(rows + 1, self.size - 1)]
        batch["rewards"] = (batch["rewards"] * discount ** np.arange(sequence_length)).cumsum(-1)
        batch["masks"] = np.minimum.accumulate(batch["masks"], -1)
        batch["terminals"] = np.maximum.accumulate(batch["terminals"], -1)
        batch["valid"] = 1.0 - np.pad(batch["terminals"][:, :-1], ((0, 0), (1, 0)))
        return batch


def dataset_ids(args: Args) -> tuple[str, str | None]:
    """Ids of the local Minari datasets, for training and for validation, that `env_name` means."""
    is_task = args.env_name in gym.registry and not args.dataset_path
    if is_task and not datasets.is_here(args.env_name):
        return collect(args.env_name, args.demos, args.seed, success), None
    return datasets.find_dataset(args.env_name, args.dataset_path, also_known=RECIPES)


def load_rows(dataset, rewards: dict[int, np.ndarray], numbers: list[int], box: spaces.Box, args: Args) -> Dataset:
    """Episodes of a Minari dataset as rows, the actions in `box` in [-1, 1]. Exits if they break the bounds."""
    lengths = {number: len(rewards[number]) for number in numbers}
    bounds, loading = args.action_bounds, args.data_loading
    rows = Dataset(datasets.read_rows(dataset, lengths, arrange, box, bounds, loading, ACTION_CLIP_EPS))
    rows.source = dataset
    rows.box = box
    rows.args = args
    return rows


def load_datasets(args: Args) -> tuple[Dataset, Dataset | None]:
    """Training and validation rows of what `env_name` means; prints what the data is."""
    train_id, validation_id = dataset_ids(args)
    dataset = datasets.local_dataset("--env-name", train_id)
    rewards = datasets.episode_rewards(dataset)
    returns = {number: float(values.sum()) for number, values in rewards.items()}
    fraction = args.validation_fraction if validation_id is None else 0.0
    kept, held_out = datasets.choose_episodes(dataset, returns, fraction, args.top_fraction, args.seed)
    box = datasets.action_box(dataset, own_bounds=args.action_bounds == "data")  # for validation, too
    train = load_rows(dataset, rewards, kept, box, args)
    val = None
    if validation_id is not None:
        other = datasets.local_dataset("--env-name", validation_id)
        other_rewards = datasets.episode_rewards(other)
        val = load_rows(other, other_rewards, list(other_rewards), box, args)
    elif held_out:
        val = load_rows(dataset, rewards, held_out, box, args)
    if rank() == 0:
        where = "in memory"
        if datasets.images_stay_on_disk(dataset, args.data_loading):
            short = ", for memory is short" if args.data_loading == "auto" else ""
            where = f"images read by {args.num_workers} workers{short}"
        datasets.print_facts(dataset, [returns[number] for number in kept], len(returns), train.size, where)
    return train, val


def make_env_and_datasets(env_name: str, args: Args | None = None):
    """(env, eval_env, train_dataset, val_dataset) of a name; environments are None where the task
    cannot run here, val_dataset where there is none. eval_env can render. qc envs/env_utils.py:91."""
    args = dataclasses.replace(args or Args(), env_name=env_name)
    train_dataset, val_dataset = load_datasets(args)
    env = make_env(train_dataset, args)
    eval_env = None if env is None else make_env(train_dataset, args, render=True)
    return env, eval_env, train_dataset, val_dataset


def process_train_dataset(ds: Dataset, args: Args | None = None) -> Dataset:
    """First part only, robomimic's reward, sparse reward, in the order of qc main.py:108-136."""
    args = args or ds.args or Args()
    if args.dataset_proportion < 1:
        size = int(ds.size * args.dataset_proportion)
        if size == 0:
            fail(f"--dataset-proportion {args.dataset_proportion}: leaves nothing of {ds.size} steps")
        for key, value in ds.items():
            ds[key] = each(lambda x: x if isinstance(x, StoredImages) else x[:size], value)
    if datasets.ROBOMIMIC.fullmatch(args.env_name) or datasets.d4rl_kind(args.env_name) == "antmaze":
        ds["rewards"] = ds["rewards"] - 1
    if args.sparse:
        if len(np.unique(ds["rewards"][:1000])) > 2:
            print("--sparse on a task with a dense reward: nearly every reward becomes -1", file=sys.stderr)
        ds["rewards"] = (ds["rewards"] != 0) * -1.0
    return ds


def make_batches(dataset: Dataset, args: Args, device: torch.device, learns: bool = True) -> Batches:
    """The samples of each update, or of a validation."""
    sizes = (args.horizon, args.frame_stack, args.batch_size)
    return Batches(dataset, *sizes, args.seed, args.num_workers, device, learns)


# --- Agent ------------------------------------------------------------------------------------------------------------
class BCAgent:
    """Behaviour cloning of action chunks, as a flow (qc agents/acfql.py:54-81, 207-223) or a tanh-Gaussian."""

    SHAPING = "policy action_chunking horizon_length use_fourier_features hidden_dims encoder frame_stack "
    SHAPING += "normalize_observations"  # flags that a checkpoint must share

    def __init__(self, observation_shape, action_dim: int, args: Args, device: torch.device):
        self.args = args
        self.device = device
        self.shape = observation_shape
        self.action_dim = action_dim
        self.horizon = args.horizon
        self.generator = torch.Generator(device).manual_seed(args.seed)
        torch.manual_seed(args.seed)  # the network's initialisation
        self.actor = Policy(observation_shape, self.horizon * action_dim, args).to(device)
        self.ema_actor = copy.deepcopy(self.actor).requires_grad_(False) if args.ema else self.actor
        self.parameters = list(self.actor.parameters())
        self.lr = torch.tensor(args.lr, device=device)  # tensors: a CUDA graph follows them
        self.updates = torch.zeros((), device=device)  # float32 counts exactly up to 16 million
        options = {"weight_decay": args.weight_decay, "fused": True, "capturable": device.type == "cuda"}
        self.actor_optimizer = torch.optim.AdamW(self.parameters, self.lr, **options)
        self.parts = args.grad_accum_steps
        self.pool = None
        threads = max(1, args.threads // world_size())
        # Parts of a batch side by side beat threads inside each product.
        if threads > 1 and device.type == "cpu":
            self.pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
            self.parts *= threads
        self.learn_launch = self.learn_eagerly
        if args.compile and device.type == "cuda":
            self.loss = torch.compile(self.loss)
            if world_size() == 1:
                self.learn_launch = Graphed(self.learn_eagerly, self.generator, eager=2)

    @classmethod
    def create(cls, observation_shape, action_dim: int, config: Args, device: torch.device | None = None) -> "BCAgent":
        """`observation_shape`: O, (O,), or {"state": (S,), NAME: (H, W, C)} with images; `config`: BCAgentConfig()."""
        if isinstance(observation_shape, int):
            observation_shape = (observation_shape,)
        return cls(observation_shape, action_dim, config, device or torch.device("cpu"))

    def observe(self, states: Tensor) -> None:
        """Takes the mean and standard deviation of states (N, S) for normalize_observations."""
        states = states.to(self.device).repeat(1, self.args.frame_stack)
        for actor in {self.actor, self.ema_actor}:
            actor.encoder.normalizer.fit(states)

    def loss(self, observations, x_1: Tensor, valid: Tensor, x_0: Tensor, t: Tensor) -> Tensor:
        """Mean over all entries of chunks x_1 (B, h * A), where `valid` (B, h) counts; noise x_0 like x_1, t (B, 1)."""
        features = self.actor.encoder(observations)  # (B, F)
        if self.args.policy == "gaussian":
            mean, log_std = self.actor.head(features)  # (B, h * A)
            u = x_1.clamp(ACTION_CLIP_EPS - 1, 1 - ACTION_CLIP_EPS).atanh()
            log_pi = -0.5 * ((u - mean) / log_std.exp()).square() - log_std - 0.5 * math.log(2 * math.pi)
            # -log pi(x_1), arXiv:1812.05905 appendix C.
            error = 2 * (math.log(2) - u - F.softplus(-2 * u)) - log_pi
        else:
            x_t = (1 - t) * x_0 + t * x_1
            error = (self.actor.head(features, x_t, t) - (x_1 - x_0)).square()  # arXiv:2210.02747 eq. 23
        return (error.unflatten(-1, (self.horizon, -1)) * valid.unsqueeze(-1)).mean()

    def step(self, observations, x_1: Tensor, valid: Tensor) -> Tensor:
        """One update; the loss. Noise is drawn for the samples of all processes, and each takes its own."""
        own = slice(rank(), None, world_size())
        count = len(x_1) * world_size()
        noise = {"generator": self.generator, "device": self.device}
        x_0 = torch.randn(count, x_1.shape[1], **noise)[own]
        t = torch.rand(count, 1, **noise)[own]
        if isinstance(observations, dict):
            offsets = torch.randint(0, 2 * CROP_PADDING + 1, (count, 2), **noise)[own]
            for name, x in observations.items():
                if name != "state":
                    observations = observations | {name: random_crop(x, offsets, CROP_PADDING)}
        loss, gradients = self.gradient(observations, x_1, valid, x_0, t)
        loss, *gradients = tensors.mean_over_processes([loss, *gradients])
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = torch.empty_like(parameter).copy_(gradient)  # in its layout: fused AdamW sees memory only
        if self.args.lr_schedule == "cosine":
            done = (self.updates / self.args.offline_steps).clamp(max=1)
            self.lr.copy_(self.args.lr * 0.5 * (1 + torch.cos(math.pi * done)))
        self.actor_optimizer.step()
        self.updates += 1
        if self.args.ema:  # a plain mean at first, in which the random first policy does not stay
            weight = (1 / self.updates).clamp(min=1 - self.args.ema)
            for mean, parameter in zip(self.ema_actor.parameters(), self.parameters, strict=True):
                mean.lerp_(parameter.detach(), weight)
        return loss

    def gradient(self, *inputs) -> tuple[Tensor, list[Tensor]]:
        """Loss and gradient of a batch, in parts: one by one, or side by side on CPU threads."""
        size = len(inputs[1])
        count = min(self.parts, size)

        def part(i: int) -> tuple[Tensor, tuple[Tensor, ...]]:
            samples = [each(lambda x: x.tensor_split(count)[i], x) for x in inputs]
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.amp):
                loss = len(samples[1]) / size * self.loss(*samples)
            return loss.detach(), torch.autograd.grad(loss, self.parameters)

        run = self.pool.map if self.pool else map
        losses, gradients = zip(*run(part, range(count)))
        sums = [sum(terms[1:], terms[0]) for terms in zip(*gradients)]
        return torch.stack(losses).sum(), sums

    def learn(self, samples: tuple) -> dict[str, Tensor]:
        """K updates from `Batches.take`; their mean loss and the last gradient's size, detached."""
        observations, chunks, valid = samples
        whole = len(chunks) == UPDATES_PER_LAUNCH
        learn = self.learn_launch if whole else self.learn_eagerly
        return learn(*datasets.arrays(observations), chunks, valid)

    def learn_eagerly(self, *inputs: Tensor) -> dict[str, Tensor]:
        """`inputs`, tensors as a CUDA graph takes them: observations (K, B, ...), in the order of their names where
        they are several; chunks (K, B, h * A); valid (K, B, h)."""
        *observations, chunks, valid = inputs
        losses = []
        for k in range(len(chunks)):
            obs = [x[k] for x in observations]
            obs = dict(zip(self.shape, obs, strict=True)) if isinstance(self.shape, dict) else obs[0]
            losses.append(self.step(obs, chunks[k], valid[k]))
        loss = torch.stack(losses).mean()
        gradients = [p.grad for p in self.parameters]
        return {
            "actor/actor_loss": loss,
            "actor/bc_flow_loss" if self.args.policy == "flow" else "actor/bc_nll_loss": loss.clone(),
            "lr": self.lr.clone(),
            "grad/norm": torch.stack(torch._foreach_norm(gradients)).sum(),  # of leaves, qc utils/flax_utils.py:145
            "grad/max": torch.stack([g.max() for g in gradients]).max(),
            "grad/min": torch.stack([g.min() for g in gradients]).min(),
        }

    def update(self, batch: dict) -> dict[str, float]:
        """One update, in place, from a batch (B, ...) of Dataset.sample, or of .sample_sequence."""
        actions = torch.as_tensor(np.asarray(batch["actions"]), dtype=torch.float32, device=self.device)
        valid = torch.ones(len(actions), 1, device=self.device)
        if self.args.action_chunking:
            valid = torch.as_tensor(np.asarray(batch["valid"]), dtype=torch.float32, device=self.device)
        elif actions.ndim == 3:
            actions = actions[:, 0]  # qc agents/acfql.py:59
        samples = (self.on_device(batch["observations"]), actions.flatten(1), valid)
        info = self.learn(tuple(each(lambda x: x.unsqueeze(0), x) for x in samples))
        return {key: float(value) for key, value in info.items()}

    def batch_update(self, batch: dict) -> dict[str, float]:
        """As many updates as the batch's leading axis is long, (U, B, ...); the mean of their infos."""
        infos = [self.update(each(lambda x, k=k: x[k], batch)) for k in range(len(batch["actions"]))]
        return {key: float(np.mean([info[key] for info in infos])) for key in infos[0]}

    def on_device(self, observations):
        """Observations on the device, states as float32, in the order of their shapes."""
        if isinstance(self.shape, dict):
            observations = {name: observations[name] for name in self.shape}
        tensors = each(lambda x: torch.as_tensor(np.asarray(x), device=self.device), observations)
        return each(lambda x: x if x.dtype == torch.uint8 else x.float(), tensors)

    @torch.inference_mode()
    def sample_actions(self, observations, rng: torch.Generator | None = None, noise=None) -> np.ndarray:
        """Chunks (..., h * A) in [-1, 1] of one observation or a batch, from `noise`, drawn if None."""
        x = self.on_device(observations)
        single = len(datasets.arrays(x)[0].shape) == len(datasets.arrays(self.shape)[0])
        if single:
            x = each(lambda x: x.unsqueeze(0), x)
        features = self.ema_actor.encoder(x)  # (B, F)
        if self.args.policy == "gaussian":
            actions = self.ema_actor.head(features)[0].tanh()
        else:
            shape = (len(features), self.horizon * self.action_dim)
            if noise is None:
                noise = torch.randn(shape, generator=rng or self.generator, device=self.device)
            x_0 = torch.as_tensor(noise, dtype=torch.float32, device=self.device).reshape(shape)
            actions = self.integrate(features, x_0).clamp(-1, 1)
        return (actions[0] if single else actions).cpu().numpy()

    def integrate(self, features: Tensor, x: Tensor) -> Tensor:
        """From noise (B, h * A) along the velocity to actions, by Euler's or Heun's method."""
        dt = 1 / self.args.flow_steps
        velocity_at = self.ema_actor.head
        for i in range(self.args.flow_steps):
            velocity = velocity_at(features, x, torch.full_like(x[:, :1], i * dt))
            # The last step is Euler's: the field is not smooth at t = 1; arXiv:2206.00364 algorithm 1.
            if self.args.flow_solver == "heun" and i + 1 < self.args.flow_steps:
                t_next = torch.full_like(x[:, :1], (i + 1) * dt)
                ahead = velocity_at(features, x + dt * velocity, t_next)
                velocity = (velocity + ahead) / 2
            x = x + dt * velocity
        return x

    def act(self, observations: list, rngs: list[np.random.Generator]) -> np.ndarray:
        """Actions (N, k, A) to execute next in N episodes, whose generators give the noise."""
        noise = np.stack([rng.standard_normal(self.horizon * self.action_dim) for rng in rngs])
        chunks = self.sample_actions(each(lambda *xs: np.stack(xs), *observations), noise=noise)
        return chunks.reshape(len(rngs), self.horizon, -1)[:, : self.args.execution_horizon or None]

    @torch.inference_mode()
    def validation_loss(self, samples: tuple) -> float:
        """The loss of the averaged policy on samples (K, B, ...), with the same noise at every call."""
        noise = {"generator": torch.Generator(self.device).manual_seed(0), "device": self.device}
        losses = []
        learned, self.actor = self.actor, self.ema_actor
        for k, x_1 in enumerate(samples[1]):
            x_0 = torch.randn(x_1.shape, **noise)
            t = torch.rand(len(x_1), 1, **noise)
            batch = [each(lambda x: x[k], part) for part in samples]  # noqa: B023
            losses.append(self.loss(*batch, x_0, t))
        self.actor = learned
        return float(torch.stack(losses).mean())

    def state_dict(self) -> dict:
        """The note's keys, critics empty as there are none, and what an exact continuation needs."""
        return {
            "actor": self.actor.state_dict(),
            "critic": {},
            "target_critic": {},
            "actor_optimizer": self.actor_optimizer.state_dict(),
            "critic_optimizer": {},
            "config": dataclasses.asdict(self.args),
            "step": int(self.updates),
            "generator": self.generator.get_state(),
            "ema_actor": self.ema_actor.state_dict() if self.args.ema else {},
        }

    def load_state_dict(self, state: dict) -> None:
        """Raises KeyError, ValueError or RuntimeError when the state is of another network."""
        for name in self.SHAPING.split():
            theirs, ours = state["config"][name], getattr(self.args, name)
            if theirs != ours:
                raise ValueError(f"was saved with {flag(name)} {theirs}, not {ours}")
        self.actor.load_state_dict(state["actor"])
        # A config without ema: what is evaluated is averaged.
        if state["ema_actor"] and self.ema_actor is self.actor:
            self.ema_actor = copy.deepcopy(self.actor).requires_grad_(False)
            self.args = dataclasses.replace(self.args, ema=state["config"]["ema"])
        self.ema_actor.load_state_dict(state["ema_actor"] or state["actor"])
        self.actor_optimizer.load_state_dict(state["actor_optimizer"])
        group = self.actor_optimizer.param_groups[0]
        self.lr.copy_(torch.as_tensor(group["lr"]))
        group["lr"] = self.lr
        group["capturable"] = self.device.type == "cuda"
        self.updates.fill_(state["step"])
        load_generator(self.generator, state["generator"], self.args.seed + state["step"])

    def save(self, path: str | Path) -> None:
        """Writes a checkpoint that loads with weights_only=True."""
        data = io.BytesIO()
        torch.save(self.state_dict(), data)
        write_atomically(Path(path), data.getbuffer())

    def load(self, path: str | Path) -> None:
        """Takes over a checkpoint of `save`. Raises OSError when it is not there, ValueError when it is damaged or of
        another network."""
        try:
            with warnings.catch_warnings(action="ignore"):  # it advises to load without weights_only
                state = torch.load(path, map_location=self.device, weights_only=True)
        except OSError:
            raise
        except Exception as error:  # a damaged file raises what it likes
            raise ValueError(f"{path}: damaged, cannot be read ({type(error).__name__}); use another one") from error
        try:
            self.load_state_dict(state)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            what = " ".join(str(error).split())[:300]
            raise ValueError(f"{path}: does not fit this task and these flags ({what})") from error


# --- Evaluation -------------------------------------------------------------------------------------------------------
def evaluate(
    agent: BCAgent,
    env: gym.Env | list[gym.Env],
    action_dim: int,
    num_eval_episodes: int = 50,
    num_video_episodes: int = 0,
    video_frame_skip: int = 3,
    seed: int = 0,
) -> tuple[dict[str, float], list[dict], list[np.ndarray]]:
    """Means over seeded episodes, their trajectories, and frames (T, H, W, 3) of video episodes beside them.

    With several environments episodes run side by side; the policy is asked only for those whose
    queue of actions is used up, in one batch. No episode's outcome depends on the others.
    """
    environments = env if isinstance(env, list) else [env]
    if action_dim != agent.action_dim:
        raise ValueError(f"action_dim is {action_dim}, the agent's actions have {agent.action_dim} numbers")
    watched = [Watched(env) for env in environments]
    rollouts = roll_out(agent.act, watched, num_eval_episodes, seed)
    trajectories = [rollout.env.trajectories.pop(0) for rollout in rollouts]  # each environment's in their order
    renders = []
    if num_video_episodes:
        if environments[0].render_mode != "rgb_array":
            raise ValueError("num_video_episodes needs an environment made with render_mode='rgb_array'")
        renders = film(agent.act, environments[0], num_video_episodes, video_frame_skip, seed)
    return means(rollouts, success), trajectories, renders


class Evaluation:
    """A run's evaluations. Environments are made when needed; learning goes on if they fail."""

    def __init__(self, args: Args, dataset: Dataset, env: gym.Env | None, validation: tuple | None):
        self.args = args
        self.dataset = dataset
        self.envs = [env] if env else []  # the first can render
        self.validation = validation  # samples
        alone = bool(self.envs) and env.metadata.get("alone")  # a robot
        self.count = 1 if alone else min(args.eval_envs, args.eval_episodes)  # environments side by side
        (self.worst, self.best), self.reference = datasets.reference_scores(dataset.source)

    def scores(self, agent: BCAgent, stop: Callable[[], bool] = lambda: False) -> dict[str, float]:
        """Means over eval_episodes, unless it cannot run or `stop` gives it up; validation_loss."""
        started = time.perf_counter()
        rollouts = []
        try:
            while self.envs and len(self.envs) < self.count:
                another = make_env(self.dataset, self.args)
                if another is None:  # it may own a port
                    print(f"evaluated all the same, {len(self.envs)} at a time", file=sys.stderr)
                    self.count = len(self.envs)
                else:
                    self.envs.append(another)
            if self.envs:
                rollouts = roll_out(agent.act, self.envs, self.args.eval_episodes, self.args.seed, stop)
        except Fault as error:
            print(f"no evaluation: {error}", file=sys.stderr)
            self.envs = []
        if self.envs and not rollouts:
            return {}  # given up
        stats = {}
        if rollouts:
            stats = means(rollouts, success) | {"seconds": time.perf_counter() - started}
            if self.reference:  # the name says whose scores 0 and 100 are
                score = 100 * (stats["episodic_return"] - self.worst) / (self.best - self.worst)
                stats[f"normalized_score_{self.reference.lower()}"] = score
        if self.validation:
            stats["validation_loss"] = agent.validation_loss(self.validation)
        return stats

    def video(self, agent: BCAgent, episodes: int, path: Path) -> None:
        """Writes a video of the first evaluation episodes; a line says so where that fails."""
        args = self.args
        if self.envs and episodes:
            track = args.track and not args.eval_only
            record_grid(agent.act, self.envs[0], episodes, args.video_frame_skip, args.seed, path, track)

    def log(self, agent: BCAgent, run: Run, logger: LoggingHelper) -> dict[str, float]:
        """A row of eval.csv, with video_episodes a video beside it."""
        stats = self.scores(agent, run.impatient)
        if not stats:
            return stats
        if quality(stats, "") >= quality(run.best, ""):
            run.best = stats
        known = [key for key in ("success_rate", "episodic_return") if math.isfinite(stats.get(key, math.nan))]
        run.bar.set_postfix({key: f"{stats[key]:.3g}" for key in known})
        logger.log(stats, "eval", run.step)
        self.video(agent, self.args.video_episodes, run.dir / f"video_{run.step}.mp4")
        return stats

    def close(self) -> None:
        for env in self.envs:
            env.close()


# --- Main -------------------------------------------------------------------------------------------------------------
def prepare_torch(args: Args) -> torch.device:
    """Seeds, precision, threads and memory for speed, the group of processes; the device."""
    random.seed(args.seed)
    np.random.seed(args.seed % 2**32)  # noqa: NPY002  for Dataset.sample, as the original
    torch.manual_seed(args.seed)
    device = set_up_torch(args.threads // world_size(), args.amp)
    tensors.join_processes(device)
    return device


def prepare(args: Args, device: torch.device) -> tuple[BCAgent, Batches, Evaluation]:
    """The agent before its first update, its batches, and its evaluation."""
    if rank() > 0:
        dist.barrier()  # rank 0 collects, converts or downloads
    train_dataset, val_dataset = load_datasets(args)
    eval_env = make_env(train_dataset, args, render=True)
    if world_size() > 1 and rank() == 0:
        dist.barrier()
    train_dataset = process_train_dataset(train_dataset)
    batches = make_batches(train_dataset, args, device)
    example_batch = train_dataset.sample_sequence(1, args.horizon, args.discount)  # for its shapes
    observation_shape = each(lambda x: x.shape[1:], example_batch["observations"])
    agent = BCAgent.create(observation_shape, example_batch["actions"].shape[-1], args, device)
    observations = train_dataset["observations"]
    states = observations.get("state") if isinstance(observations, dict) else observations
    if args.normalize_observations and states is not None:
        agent.observe(torch.from_numpy(states))
    validation = None
    if val_dataset is not None:
        validation = make_batches(val_dataset, args, device, learns=False).fixed(10, device)
    return agent, batches, Evaluation(args, train_dataset, eval_env, validation)


def get_exp_name(seed: int) -> str:
    """sdSEED[s_SLURM-JOB.]TIME, qc log_utils.py:40; milliseconds, so that no two runs share it."""
    job = "".join(f"s_{os.environ[name]}." for name in ("SLURM_JOB_ID", "SLURM_PROCID") if name in os.environ)
    return f"sd{seed:03d}{job}{datetime.now():%Y%m%d_%H%M%S_%f}"[:-3]


def evaluate_only(args: Args, run: Run, agent: BCAgent, evaluation: Evaluation) -> None:
    """--eval-only: scalars on the terminal, video.mp4 in the run directory."""
    path = Path(args.eval_only)
    if path.is_file():
        try:
            agent.load(path)
        except (OSError, ValueError) as error:
            fail(str(error))
    stats = evaluation.scores(agent)
    evaluation.video(agent, (args.video_episodes or 4) * args.capture_video, run.dir / "video.mp4")
    report(f"{path.name}, update {int(agent.updates)}", stats)


def train(
    args: Args, run: Run, agent: BCAgent, batches: Batches, evaluation: Evaluation, logger: LoggingHelper | None
) -> None:
    """The loop. Only the first process has a logger."""
    intervals = [every for every in (args.log_interval, args.eval_interval, args.save_interval) if every > 0]
    while run.step < args.offline_steps and not tensors.any_process(run.signals > 0, agent.device):
        # Learn: until something is logged, evaluated or saved, but no more updates than one launch has.
        to_event = min(args.offline_steps - run.step, *(every - run.step % every for every in intervals))
        count = min(to_event, UPDATES_PER_LAUNCH - run.step % UPDATES_PER_LAUNCH)
        offline_info = agent.learn(batches.take(run.step, count, agent.device))
        run.advance(count)
        # Log.
        if count == to_event and not math.isfinite(loss := float(offline_info["actor/actor_loss"])):
            fail(f"the loss is {loss} after {run.step} updates; lower --lr ({args.run_dir} has the checkpoint before)")
        if logger and run.due(args.log_interval):
            logger.log(offline_info | {"SPS": run.speed()["charts/SPS"]}, "offline_agent", run.step)
        # Evaluate.
        if logger and args.eval_interval and run.due(args.eval_interval) and run.step < args.offline_steps:
            with run.phase("eval"):
                evaluation.log(agent, run, logger)
        # Save.
        if logger and args.save_interval > 0 and run.due(args.save_interval):
            agent.save(run.dir / f"checkpoint_{run.step}.pt")
        if run.due(args.log_interval):
            run.save()
    batches.close()


def complete(args: Args, run: Run, agent: BCAgent, evaluation: Evaluation, logger: LoggingHelper) -> None:
    """The last evaluation, final_model.pt, curve, video, token.tk."""
    last = evaluation.log(agent, run, logger)
    agent.save(run.dir / "final_model.pt")
    tables = {"eval": ("success_rate", "episodic_return", "validation_loss")}
    tables["offline_agent"] = ("actor/actor_loss",)
    plot_curves(run.dir, tables, "updates", run.elapsed())
    evaluation.video(agent, (args.video_episodes or 4) * args.capture_video, run.dir / "video.mp4")
    for csv_logger in logger.csv_loggers.values():
        csv_logger.close()
    url = None
    if args.track:
        import wandb

        url = wandb.run.url  # None offline
    write_atomically(run.dir / "token.tk", (url or str(run.dir.resolve())).encode())
    run.save(finished=True)
    run.close()
    report("last", last)
    report("best", run.best)
    print(f"{run.elapsed():.0f} s in all; see {args.run_dir}")


def learn_offline(args: Args) -> None:
    begun = time.perf_counter()
    if args.run_dir is None:
        name = re.sub(r"[^-\w.]", "-", args.env_name)
        args.run_dir = str(Path(args.save_dir, "robot-learning", args.run_group, name, get_exp_name(args.seed)))
    if not (args.resume or args.eval_only):
        check_new_folder(args.run_dir)
    device = prepare_torch(args)
    args.run_dir = tensors.as_the_first_says(args.run_dir, device)  # its name has the time
    agent, batches, evaluation = prepare(args, device)
    run = (Run if rank() == 0 else Follower)(args, args.env_name, __file__, device)
    run.keep(agent=agent)
    if rank() == 0:
        datasets.remember(run.dir / "data.json", evaluation.dataset)
    if args.eval_only:
        with contextlib.closing(evaluation):
            return evaluate_only(args, run, agent, evaluation)
    if run.state and run.state["finished"] and run.step >= args.offline_steps:
        fail(f"--offline-steps {args.offline_steps}: {args.run_dir} is at {run.step}; give a larger number")
    os.environ.setdefault("WANDB_RUN_GROUP", args.run_group)
    os.environ.setdefault("WANDB_TAGS", args.run_group)
    run.open(args.offline_steps, unit="update", waits_for="the update")
    run.started = begun  # collecting and converting data counts, too
    batches.open(run.step, args.offline_steps, device.type == "cuda", UPDATES_PER_LAUNCH)
    with contextlib.closing(run.bar), contextlib.closing(evaluation):
        if rank() > 0:
            return train(args, run, agent, batches, evaluation, None)
        shutil.copy(run.dir / "args.json", run.dir / "flags.json")  # the note's name
        (run.dir / "token.tk").unlink(missing_ok=True)
        csv_loggers = {name: CsvLogger(run.dir / f"{name}.csv") for name in ("eval", "offline_agent")}
        logger = LoggingHelper(csv_loggers, writer=run.writer)  # wandb mirrors the writer
        train(args, run, agent, batches, evaluation, logger)
        run.end_of_training()
        if run.step < args.offline_steps:
            raise KeyboardInterrupt  # another process was asked to stop
        complete(args, run, agent, evaluation, logger)


def main(args: Args) -> None:
    try:
        with tensors.others_end_well(args), ends_well(args):
            learn_offline(args)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main(parse(Args, __doc__, Args.MAY_CHANGE))
