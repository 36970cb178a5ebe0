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
are seeded; the last evaluation is at offline_steps (there: one step earlier); HalfCheetah, Hopper, Walker2d and Ant.
Numbers are comparable only with numbers from the same data: Minari's medium is not D4RL's, so each run prints its data.
New experiment: copy this file; `grep -n TASK: my_task.py` lists the places to edit.
"""

import contextlib
import copy
import ctypes
import dataclasses
import hashlib
import io
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import defaultdict, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: spinning threads starve each other on few cores

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn  # now: later its default arguments would keep a process group, and that aborts at exit
import torch.nn.functional as F
import torch.utils.checkpoint
import tyro
from gymnasium import spaces
from torch import Tensor, nn

import franka_sim  # registers the Franka tasks  # TASK: import the module that registers yours
from common.datasets import (
    D4RL_URL,
    ROBOMIMIC,
    StoredImages,
    d4rl_files,
    each,
    episode_rewards,
    fail,
    find_dataset,
    image_spaces,
    is_image,
    make_task,
    read_episodes,
    reference_scores,
    store,
)

MAY_BE_ZERO = {"seed", "eval_interval", "video_episodes", "execution_horizon", "num_workers"}  # whole numbers
MAY_CHANGE = "run_dir resume eval_only capture_video track cuda compile threads offline_steps eval_episodes eval_envs "
MAY_CHANGE += "video_episodes video_frame_skip save_interval num_workers data_loading save_dir updates_per_launch "
MAY_CHANGE += "dataset_path d4rl_url"  # flags that may change in a run that goes on
ACTION_CLIP_EPS = 1e-5  # dataset actions stay this far inside [-1, 1]; qc envs/env_utils.py:150


# --- Args -------------------------------------------------------------------------------------------------------------
@dataclass
class Args:
    # experiment
    run_group: str = "BC"
    """group of runs: part of the run directory, group and tag in Weights & Biases"""
    seed: int = 0
    """seed of everything: networks, batches, noise, evaluation episodes"""
    save_dir: str = "runs/fbc/"
    """runs are written to SAVE_DIR/WANDB_PROJECT_NAME/RUN_GROUP/ENV_NAME/sdSEED_TIME"""
    run_dir: str | None = None
    """write to this directory instead"""
    resume: str | None = None
    """run directory to continue; its own flags are used, only a few (such as offline_steps) may change"""
    eval_only: str | None = None
    """run directory or checkpoint file to evaluate: eval_episodes episodes and a video, no training"""
    capture_video: bool = True
    """write an mp4 of the policy at the end (needs OpenGL: EGL or OSMesa)"""
    track: bool = False
    """log to Weights & Biases as well"""
    wandb_project_name: str = "robot-learning"
    """Weights & Biases project"""
    cuda: bool = True
    """use a GPU when there is one"""
    compile: bool = True
    """on a GPU: compile the loss and launch updates_per_launch updates as one CUDA graph (a CPU is faster without)"""
    updates_per_launch: int = 20
    """updates in one CUDA graph; batches are gathered for as many at once"""
    threads: int = 2
    """CPU threads for PyTorch"""
    amp: bool = False
    """bfloat16 matrix products: faster on a GPU, and on CPUs with AVX512-BF16 or AMX"""
    # data and environment
    env_name: str = "FrankaPickCube-v0"  # TASK: your task or dataset
    """D4RL name, Minari id (namespace/name-v0), robomimic (lift-mh-low_dim), OGBench (...-singletask-v0), or gymnasium
    id of a task with a scripted expert, whose demonstrations are collected; RECIPES has other defaults for some"""
    dataset_path: str | None = None
    """HDF5 file of D4RL's or robomimic's layout to read instead of downloading it"""
    d4rl_url: str = D4RL_URL
    """where D4RL's files are"""
    dataset_proportion: float = 1.0
    """use only this first part of the data"""
    sparse: bool = False
    """rewards become -1 where they are not 0"""
    top_fraction: float = 1.0
    """use only this fraction of the episodes, those of the highest return"""
    validation_fraction: float = 0.0
    """fraction of the episodes held out for eval/validation_loss; robomimic's own choice where its file has one
    (OGBench has validation data apart from this)"""
    clip_actions: bool = False
    """clip dataset actions that are outside the task's bounds, instead of refusing the data"""
    demos: int = 200
    """demonstrations to collect from a task's scripted expert"""
    demo_noise: float = 0.0
    """standard deviation of the noise on what the expert executes; what is learned is its choice without noise"""
    frame_stack: int = 1
    """observations of this many steps are stacked"""
    data_loading: Literal["auto", "memory", "workers"] = "auto"
    """keep images in memory, which is faster, or let workers read them from disk; auto: by the memory that is free"""
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
    """the policy that is evaluated averages the learned one with this decay per update (0: no averaging)"""
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
    layer_norm: bool = False
    """LayerNorm after each activation"""
    normalize_observations: bool = False
    """scale states by the data's mean and standard deviation"""
    encoder: Literal["small", "resnet10", "impala_small"] | None = None
    """network for images (default: impala_small where there are images)"""
    random_crop: bool = True
    """shift training images by up to 4 pixels"""
    checkpoint_activations: bool = False
    """compute the encoders' activations twice instead of keeping them: less memory, more time"""


BCAgentConfig = Args  # an agent needs no other settings than these
RECIPES: dict[str, dict[str, Any]] = {  # TASK: defaults of your task where they differ from the above
    "FrankaPickCube-v0": {"offline_steps": 5_000, "log_interval": 500, "eval_interval": 2_500, "action_chunking": True}
    | {"lr": 1e-3, "lr_schedule": "cosine", "ema": 0.995, "normalize_observations": True, "hidden_dims": (256,) * 3},
}


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def normalize_flags(argv: list[str]) -> list[str]:
    """`--x_y=v` as `--x-y v`; `--x=True`, `--x True` and `--x=False` as tyro's `--x` and `--no-x`."""
    tokens, bools = [], {flag(field.name) for field in dataclasses.fields(Args) if field.type is bool}
    for token in argv:
        name, equals, value = token.partition("=")
        is_flag = re.fullmatch(r"--[A-Za-z][\w-]*", name)
        tokens += [flag(name[2:]), *([value] if equals else [])] if is_flag else [token]
        if len(tokens) > 1 and tokens[-2] in bools and tokens[-1].lower() in ("true", "false"):
            tokens[-2:] = [tokens[-2] if tokens[-1].lower() == "true" else f"--no-{tokens[-2][2:]}"]
    return tokens


def read_args(argv: list[str] | None = None) -> Args:
    """The command line, over the defaults of the task's recipe, or of the run that --resume or --eval-only names.

    Exits with one line when flags contradict each other or the run.
    """
    tokens = normalize_flags(sys.argv[1:] if argv is None else argv)
    given = dict(zip(tokens, [*tokens[1:], ""], strict=False))
    args = Args(**RECIPES.get(given.get("--env-name", Args.env_name), {}))
    if run_dir := given.get("--resume") or given.get("--eval-only"):
        path = Path(run_dir).parent if Path(run_dir).is_file() else Path(run_dir)
        try:
            saved = json.loads((path / "flags.json").read_text())
            args = Args(**{name: tuple(v) if isinstance(v, list) else v for name, v in saved.items()})
            check_args(args)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            name = "--resume" if "--resume" in given else "--eval-only"
            fail(f"{name} {run_dir}: no run of this script there ({error})")
    saved, args = args, tyro.cli(Args, args=tokens, description=__doc__, default=args)
    if run_dir:
        may_change = MAY_CHANGE + " execution_horizon flow_steps flow_solver" * bool(args.eval_only)
        for name in vars(saved).keys() - set(may_change.split()):
            if getattr(args, name) != (theirs := getattr(saved, name)):
                fail(f"{flag(name)}: {path} has {theirs}; leave the flag out, or start a new run")
        args.run_dir = str(path)
    check_args(args)
    return args


def check_args(args: Args) -> None:
    """Exits with one line about a flag that makes no sense."""
    for name, value in vars(args).items():
        least = 1 if type(value) is int and name not in MAY_BE_ZERO else 0
        if type(value) in (int, float) and name != "save_interval" and not least <= value < math.inf:
            fail(f"{flag(name)} {value}: give at least {least}")
        if name in ("dataset_proportion", "top_fraction", "validation_fraction", "ema", "discount") and value > 1:
            fail(f"{flag(name)} {value}: give at most 1")
    for name, value in (("dataset_proportion", 0), ("top_fraction", 0), ("validation_fraction", 1), ("ema", 1)):
        if getattr(args, name) == value:
            fail(f"{flag(name)} {value}: leaves nothing to learn from")
    if args.batch_size % (args.grad_accum_steps * world_size()):
        parts = f"--grad-accum-steps {args.grad_accum_steps} on {world_size()} processes"
        fail(f"--batch-size {args.batch_size}: does not divide into {parts}; give a multiple")
    if not args.hidden_dims or min(args.hidden_dims) < 1:
        fail(f"--hidden-dims {args.hidden_dims}: give at least one layer of at least one unit")
    if args.execution_horizon > (horizon := args.horizon_length if args.action_chunking else 1):
        fail(f"--execution-horizon {args.execution_horizon}: a chunk has {horizon} actions (--horizon-length)")


def world_size() -> int:
    """Processes that learn together: `torchrun --nproc-per-node N bc_flow_offline.py ...`."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    return int(os.environ.get("RANK", 0))


# --- Environment ------------------------------------------------------------------------------------------------------
def arrange(space: spaces.Space, observations):
    """Observations with a leading time axis as the policy takes them: states (T, O) float32, everything flat, in the
    order of sorted names; with images {"state": (T, S), NAME: (T, H, W, C) uint8}. TASK: choose entries here."""
    flat, images = [], {}

    def walk(space: spaces.Space, x, path: str) -> None:
        if isinstance(space, spaces.Dict):
            for key in sorted(space):
                walk(space[key], x[key], f"{path}/{key}")
        elif is_image(space):
            images[image_name(path)] = np.asarray(x)
        else:
            flat.append(np.asarray(x, np.float32).reshape(len(x), -1))

    walk(space, observations, "observations")
    states = {"state": np.concatenate(flat, -1)} if flat else {}
    return states | images if images or not flat else states["state"]


def image_name(path: str) -> str:
    """observations/front/rgb -> front_rgb, observations -> image."""
    return re.sub(r"\W", "_", path.partition("/")[2]) or "image"


class PolicyInput(gym.Wrapper):
    """Observations as `arrange` gives them, the last ones stacked; actions (A,) in [-1, 1] of the data's box."""

    def __init__(self, env: gym.Env, actions: spaces.Box, frame_stack: int = 1):
        super().__init__(env)
        self.stored, self.action_space = actions, spaces.Box(-1, 1, (math.prod(actions.shape),), np.float32)
        self.raw_space, self.frames = env.observation_space, deque(maxlen=frame_stack)

    def reset(self, **kwargs):
        obs, info = self.env.reset(**kwargs)
        self.frames.extend([self.arranged(obs)] * self.frames.maxlen)
        return each(lambda *frames: np.concatenate(frames, -1), *self.frames), info

    def step(self, action):
        box, task = self.stored, self.env.action_space
        action = box.low + (action.reshape(box.shape) + 1) / 2 * (box.high - box.low)
        obs, *ends, info = self.env.step(action.clip(task.low, task.high).astype(task.dtype))
        self.frames.append(self.arranged(obs))
        return each(lambda *frames: np.concatenate(frames, -1), *self.frames), *ends, info

    def arranged(self, obs):
        return each(lambda x: x[0], arrange(self.raw_space, each(lambda x: np.asarray(x)[None], obs)))


def make_env(dataset, args: Args, render: bool = False) -> gym.Env | None:
    """The task that a Minari dataset is of, as the policy sees it; None, with a line, where there is none to run."""
    env = make_task(dataset, render)
    return env and PolicyInput(env, dataset.action_space, args.frame_stack)


def episode_seed(seed: int, stream: int, episode: int) -> int:
    """The seed of an episode's reset; streams keep training (0), evaluation (1), demonstrations (2) apart."""
    return int(np.random.SeedSequence([seed, stream, episode]).generate_state(1)[0])


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
    """[linear, GELU, LayerNorm] * len(hidden_dims), linear; (B, in) -> (B, out); qc utils/networks.py:53-80."""

    def __init__(self, in_dim: int, hidden_dims: tuple[int, ...], out_dim: int, layer_norm: bool):
        layers, dims = [], (in_dim, *hidden_dims)
        for pair in zip(dims[:-1], dims[1:], strict=True):
            layers += [nn.Linear(*pair), nn.GELU(approximate="tanh")]  # flax's GELU
            layers += [nn.LayerNorm(pair[1], eps=1e-6)] if layer_norm else []  # flax's eps
        super().__init__(*layers, nn.Linear(dims[-1], out_dim))
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
        self.time, time_dim = (FourierFeatures(), 64) if args.use_fourier_features else (nn.Identity(), 1)
        self.mlp = FeedForward(in_dim + action_dim + time_dim, args.hidden_dims, action_dim, args.layer_norm)

    def forward(self, features: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return self.mlp(torch.cat([features, x_t, self.time(t)], -1))


class GaussianPolicy(nn.Module):
    """Mean and log standard deviation before tanh, (B, A) each, of features (B, F); SERL agents/continuous/bc.py."""

    def __init__(self, in_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.mlp = FeedForward(in_dim, args.hidden_dims, 2 * action_dim, args.layer_norm)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.mlp(features).chunk(2, -1)
        return mean, log_std.clamp(-2, 2)  # an expert without noise: smaller, the easiest actions outweigh all others


class Normalizer(nn.Module):
    """Running mean and variance of observations; the identity until the first `update`."""

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("var", torch.ones(dim))

    def update(self, obs: Tensor) -> None:
        """Takes in observations (N, O); Chan et al. 1979, parallel variance."""
        total = self.count + len(obs)
        delta, weight = obs.mean(0) - self.mean, len(obs) / total
        self.var += weight * (obs.var(0, correction=0) - self.var + (1 - weight) * delta.square())
        self.mean += weight * delta
        self.count.copy_(total)

    def forward(self, obs: Tensor) -> Tensor:
        return ((obs - self.mean) * (self.var + 1e-6).rsqrt()).clamp(-10, 10)


def random_crop(images: Tensor, offsets: Tensor, padding: int) -> Tensor:
    """Images (N, H, W, C) padded with their edge, then cut at offsets (N, 2) = row, column in 0 ... 2 * padding.

    DrQ arXiv:2004.13649, SERL vision/data_augmentations.py:7.
    """
    n, height, width, channels = images.shape
    number, device = torch.arange(n, device=images.device), images.device
    rows = (torch.arange(height, device=device) + offsets[:, :1] - padding).clamp(0, height - 1)  # (N, H)
    columns = (torch.arange(width, device=device) + offsets[:, 1:] - padding).clamp(0, width - 1)  # (N, W)
    pixels = (number[:, None] * height + rows)[..., None] * width + columns[:, None]  # (N, H, W)
    return images.reshape(-1, channels).index_select(0, pixels.flatten()).view_as(images)


class Standardize(nn.Module):
    """Images (N, H, W, 3 * T) -> (N, 3 * T, H, W), scaled by ImageNet's mean and deviation; memory stays NHWC."""

    def __init__(self, channels: int):
        super().__init__()
        for name, values in (("mean", (0.485, 0.456, 0.406)), ("std", (0.229, 0.224, 0.225))):
            self.register_buffer(name, 255 * torch.tensor(values).repeat(channels // 3), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return ((images - self.mean) / self.std).permute(0, 3, 1, 2)


class SmallTrunk(nn.Module):
    """Convolutions 3x3 with ReLU; SERL vision/small_encoders.py."""

    def __init__(self, in_channels: int, channels: tuple[int, ...], strides: tuple[int, ...], padding: int = 0):
        super().__init__()
        pairs = zip((in_channels, *channels[:-1]), channels, strides, strict=True)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, stride, padding) for a, b, stride in pairs)

    def forward(self, images: Tensor) -> Tensor:
        x = images.permute(0, 3, 1, 2) / 255
        for conv in self.convs:
            x = conv(x).relu()
        return x


def pad_same(x: Tensor, kernel: int, stride: int, value: float = 0.0) -> Tensor:
    """Padding like flax's SAME, where it differs from PyTorch's: (0, 1) for kernel 3 with stride 2 on even sizes."""
    totals = [max((math.ceil(size / stride) - 1) * stride + kernel - size, 0) for size in (x.shape[3], x.shape[2])]
    return F.pad(x, [side for total in totals for side in (total // 2, total - total // 2)], value=value)


class ResNetBlock(nn.Module):
    """Two convolutions 3x3 beside a shortcut; SERL vision/resnet_v1.py:131."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.stride, self.project = stride, stride != 1 or in_channels != channels
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.GroupNorm(4, channels), nn.GroupNorm(4, channels)
        if self.project:
            self.conv_proj = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.norm_proj = nn.GroupNorm(4, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.conv1(pad_same(x, 3, self.stride))).relu()
        y = self.norm2(self.conv2(y))
        return ((self.norm_proj(self.conv_proj(x)) if self.project else x) + y).relu()


class ResNetTrunk(nn.Module):
    """ResNet-10 with GroupNorm, without its last pooling and layer; SERL vision/resnet_v1.py:189."""

    def __init__(self, in_channels: int, channels: tuple[int, ...] = (64, 128, 256, 512)):
        super().__init__()
        self.standardize, self.conv_init = (
            Standardize(in_channels),
            nn.Conv2d(in_channels, channels[0], 7, 2, 3, bias=False),
        )
        self.norm_init = nn.GroupNorm(4, channels[0])
        pairs = zip((channels[0], *channels[:-1]), channels, strict=True)
        self.blocks = nn.ModuleList(ResNetBlock(a, b, 2 if i else 1) for i, (a, b) in enumerate(pairs))

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm_init(self.conv_init(self.standardize(images))).relu()
        x = F.max_pool2d(pad_same(x, 3, 2, -math.inf), 3, 2)
        for block in self.blocks:
            x = block(x)
        return x


class ImpalaTrunk(nn.Module):
    """(B, H, W, C) uint8 -> (B, 32, H / 8, W / 8); impala_small of qc utils/encoders.py: one residual block a stage."""

    def __init__(self, in_channels: int):
        super().__init__()
        dims = ((in_channels, 16), (16, 32), (32, 32))
        convs = ([nn.Conv2d(width, b, 3, padding=1) for width in (a, b, b)] for a, b in dims)
        self.stages = nn.ModuleList(map(nn.ModuleList, convs))
        self.apply(xavier)

    def forward(self, images: Tensor) -> Tensor:
        x = images.permute(0, 3, 1, 2) / 255
        for first, *block in self.stages:
            x = F.max_pool2d(pad_same(first(x), 3, 2, -math.inf), 3, 2)
            x = x + block[1](block[0](x.relu()).relu())
        return x.relu()


class ImageEncoder(nn.Module):
    """(B, H, W, C) uint8 -> (B, 512): a trunk and one layer over its whole map."""

    def __init__(self, shape: tuple[int, ...], args: Args):
        super().__init__()
        if args.encoder == "small":
            self.trunk = SmallTrunk(shape[-1], (32, 64, 128, 256), (2, 2, 2, 2))  # SERL agents/continuous/drq.py:140
        else:
            self.trunk = ResNetTrunk(shape[-1]) if args.encoder == "resnet10" else ImpalaTrunk(shape[-1])
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
        cameras = [name for name in shapes if name != "state"]
        self.images = nn.ModuleDict({name: ImageEncoder(shapes[name], args) for name in cameras})
        dim = shapes["state"][0] if "state" in shapes else 0
        self.normalizer = Normalizer(dim) if args.normalize_observations and dim else nn.Identity()
        self.dim, self.checkpointing = dim + 512 * len(cameras), args.checkpoint_activations

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
        self.head = {"flow": ActorVectorField, "gaussian": GaussianPolicy}[args.policy](
            self.encoder.dim, action_dim, args
        )


# --- Dataset ----------------------------------------------------------------------------------------------------------
def dataset_ids(args: Args) -> tuple[str, str | None]:
    """Ids of the local Minari datasets, for training and for validation, that `env_name` means."""
    import minari

    if args.env_name in gym.registry and args.env_name not in minari.list_local_datasets() and not args.dataset_path:
        return collect_demos(args), None
    return find_dataset(args.env_name, args.dataset_path, args.d4rl_url, RECIPES)


def collect_demos(args: Args) -> str:
    """Demonstrations of the task's scripted expert, successes only. It executes its choice plus noise, so that the data
    shows how to recover; the choice itself is stored (DART, arXiv:1703.09327)."""
    import minari
    from tqdm import tqdm

    settings = f"{args.env_name}, {args.demos} successes, noise {args.demo_noise}, seed {args.seed}"
    digest = hashlib.sha256(settings.encode()).hexdigest()[:8]
    dataset_id = f"scripted/{re.sub(r'-v[0-9]+$|[^-_a-zA-Z0-9]', '', args.env_name)}-{digest}-v0"
    if dataset_id in minari.list_local_datasets():
        return dataset_id
    try:
        env = gym.make(args.env_name)
    except (gym.error.Error, ImportError) as error:
        fail(f"--env-name {args.env_name}: {error}")
    if not hasattr(env.unwrapped, "expert_action"):
        fail(f"--env-name {args.env_name}: has no expert_action(); name a dataset of it (`minari list local`)")
    rng, space = np.random.default_rng(args.seed), env.action_space

    def demonstration(attempt: int) -> tuple | None:
        observations, steps, done = [env.reset(seed=episode_seed(args.seed, 2, attempt))[0]], [], False
        while not done:
            action = np.asarray(env.unwrapped.expert_action(), space.dtype)
            noise = args.demo_noise * (space.high - space.low) / 2 * rng.standard_normal(space.shape)
            executed = np.clip(action + noise, space.low, space.high).astype(space.dtype)
            obs, reward, terminated, truncated, info = env.step(executed)
            observations.append(obs)
            steps.append((action, float(reward), terminated, truncated))
            done = terminated or truncated
        parts = (each(lambda *xs: np.stack(xs), *observations), *map(np.array, zip(*steps, strict=True)))
        return None if success(info) == 0 else parts

    def demonstrations() -> Iterator[tuple]:
        with tqdm(total=args.demos, desc="demonstrations", unit="episode") as bar:
            for attempt in range(10 * args.demos):
                if parts := demonstration(attempt):
                    yield parts
                    bar.update()
                if bar.n == args.demos:
                    return
        fail(f"--demo-noise {args.demo_noise}: the scripted expert fails too often; lower it")

    return store(dataset_id, demonstrations(), env=env.spec, algorithm_name="scripted expert", description=settings)


class Dataset(dict):
    """Rows in the layout of Q-chunking: observations, actions, rewards, terminals (1 where an episode ends), masks
    (0 where it terminated), and next_observations where observations are not images; all (N, ...)."""

    source, frame_stack = None, 1  # the Minari dataset that it was read from; steps in an observation

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
        if self.frame_stack == 1:
            return each(lambda x: x[idxs], self["observations"])
        rows = np.maximum(idxs[:, None] - np.arange(self.frame_stack)[::-1], self.bounds()[0][idxs][:, None])
        return each(lambda x: np.concatenate([x[row] for row in rows.T], -1), self["observations"])

    def sample(self, batch_size: int, idxs: np.ndarray | None = None) -> dict:
        """A batch of rows, uniformly with replacement; qc utils/datasets.py:66."""
        if idxs is None:
            idxs = np.random.randint(self.size, size=batch_size)  # noqa: NPY002  seeded by main, as the original
        batch = {key: each(lambda x: x[idxs], value) for key, value in self.items() if key != "observations"}
        batch["observations"] = self.stacked(idxs)
        if self.frame_stack > 1 and "next_observations" in batch:
            following = batch["next_observations"]
            kept = batch["observations"][..., following.shape[-1] :]
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
        batch["full_observations"], batch["observations"] = batch["observations"], self.stacked(idxs)
        batch["next_actions"] = self["actions"][np.minimum(rows + 1, self.size - 1)]
        batch["rewards"] = (batch["rewards"] * discount ** np.arange(sequence_length)).cumsum(-1)
        batch["masks"] = np.minimum.accumulate(batch["masks"], -1)
        batch["terminals"] = np.maximum.accumulate(batch["terminals"], -1)
        batch["valid"] = 1.0 - np.pad(batch["terminals"][:, :-1], ((0, 0), (1, 0)))
        return batch


def load_rows(dataset, lengths: dict[int, int], args: Args, on_disk: bool) -> Dataset:
    """Episodes {number: length} of a Minari dataset as rows, actions in [-1, 1]. Exits when they break the bounds."""
    space, fields, row, total = dataset.action_space, {}, 0, sum(lengths.values())
    low, high = space.low.astype(float), space.high.astype(float)

    def put(field: np.ndarray, x: np.ndarray) -> None:
        field[row : row + len(x)] = x

    parts = read_episodes(dataset, lengths, images=not on_disk)
    for number, (space, observations, actions, rewards, terminations) in zip(lengths, parts, strict=True):
        actions = (2 * (actions - low) / (high - low) - 1).reshape(len(rewards), -1)  # (T, A)
        if (reach := np.abs(actions).max()) > 1.001 and not args.clip_actions:
            where = f"{dataset.id}, episode {number}: actions reach {reach:.3g} times the bounds {low} to {high}"
            fail(f"{where}; --clip-actions clips them")
        arranged = arrange(space, observations)  # (T + 1, ...)
        values = {"observations": each(lambda x: x[:-1], arranged)}
        values |= {} if isinstance(arranged, dict) else {"next_observations": arranged[1:]}
        values |= {"actions": actions.clip(ACTION_CLIP_EPS - 1, 1 - ACTION_CLIP_EPS), "rewards": rewards}
        values |= {"terminals": np.arange(1, len(rewards) + 1) == len(rewards), "masks": 1.0 - terminations}
        dtypes = each(lambda x: np.uint8 if x.dtype == np.uint8 else np.float32, values)
        fields = fields or each(lambda x, dtype: np.empty((total, *x.shape[1:]), dtype), values, dtypes)
        each(put, fields, values)
        row += len(rewards)
    if on_disk:
        states, _ = fields["observations"], fields.pop("next_observations", None)
        fields["observations"] = states if isinstance(states, dict) else {"state": states}
        for key, image in image_spaces(dataset.observation_space).items():
            fields["observations"][image_name(key)] = StoredImages(dataset, key, image, lengths)
    rows = Dataset.create(**fields)
    rows.source, rows.frame_stack = dataset, args.frame_stack
    return rows


def images_stay_on_disk(dataset, args: Args) -> bool:
    """By --data-loading; auto: when the images would take more than half of the free memory."""
    pixels = sum(math.prod(space.shape) for space in image_spaces(dataset.observation_space).values())
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # bytes
    too_large = args.data_loading == "auto" and pixels * int(dataset.total_steps) > free / 2
    on_disk = pixels > 0 and (too_large or args.data_loading == "workers")
    if on_disk and dataset.storage.FORMAT != "hdf5":
        fail(f"{dataset.id}: is stored as {dataset.storage.FORMAT}, workers read hdf5; --data-loading memory")
    return on_disk


def load_datasets(args: Args) -> tuple[Dataset, Dataset | None]:
    """Training and validation rows of what `env_name` means; prints what the data is."""
    import minari

    dataset, validation = (minari.load_dataset(name) if name else None for name in dataset_ids(args))
    space = dataset.action_space
    if not isinstance(space, spaces.Box) or not space.is_bounded():
        fail(f"--env-name {args.env_name}: actions must be a bounded Box, {dataset.id} has {space}")
    rewards, on_disk = episode_rewards(dataset), images_stay_on_disk(dataset, args)
    returns = {number: float(values.sum()) for number, values in rewards.items()}
    held_out = []
    if args.validation_fraction and validation is None:
        order = np.random.default_rng(args.seed).permutation(list(returns)).tolist()
        count = math.ceil(args.validation_fraction * len(order))
        held_out = dataset.storage.metadata.get("validation") or order[:count]
    kept = sorted(set(returns) - set(held_out), key=lambda number: (-returns[number], number))
    kept = sorted(kept[: math.ceil(args.top_fraction * len(kept))])
    if not kept:
        fail(f"{dataset.id}: no episode is left to learn from; --validation-fraction {args.validation_fraction}")
    train, val = load_rows(dataset, {i: len(rewards[i]) for i in kept}, args, on_disk), None
    if validation is not None:
        val = load_rows(validation, {i: len(x) for i, x in episode_rewards(validation).items()}, args, on_disk)
    elif held_out:
        val = load_rows(dataset, {i: len(rewards[i]) for i in sorted(held_out)}, args, on_disk)
    if rank() == 0:
        (worst, best), source = reference_scores(dataset)
        scores = (
            f"{source}'s references: score 0 is {worst:.6g}, 100 is {best:.6g}" if source else "no reference scores"
        )
        where = f"images read by {args.num_workers} workers" if on_disk else "in memory"
        where += ", for memory is short" if on_disk and args.data_loading == "auto" else ""
        size, used = f"{dataset.storage.get_size():.0f} MB, {where}", [returns[number] for number in kept]
        print(f"data: {dataset.id}, {size}, {len(used)} of {len(returns)} episodes, {train.size:,} steps")
        print(f"data: mean return {np.mean(used):.6g}, best {max(used):.6g}; {scores}", flush=True)
    return train, val


def make_env_and_datasets(env_name: str, args: Args | None = None):
    """(env, eval_env, train_dataset, val_dataset) of a name; environments are None where the data's task cannot run
    here, val_dataset where there is none. eval_env can render. qc envs/env_utils.py:91."""
    args = dataclasses.replace(args or Args(), env_name=env_name)
    train_dataset, val_dataset = load_datasets(args)
    env = make_env(train_dataset.source, args)
    return env, make_env(train_dataset.source, args, render=True) if env else None, train_dataset, val_dataset


def process_train_dataset(ds: Dataset, args: Args) -> Dataset:
    """First part only, robomimic's reward, sparse reward, in the order of qc main.py:108-136."""
    if args.dataset_proportion < 1:
        size = int(ds.size * args.dataset_proportion)
        if size == 0:
            fail(f"--dataset-proportion {args.dataset_proportion}: leaves nothing of {ds.size} steps")
        for key, value in ds.items():
            ds[key] = each(lambda x: x if isinstance(x, StoredImages) else x[:size], value)
    if ROBOMIMIC.fullmatch(args.env_name) or (args.env_name.startswith("antmaze") and args.env_name in d4rl_files()):
        ds["rewards"] = ds["rewards"] - 1
    if args.sparse:
        if len(np.unique(ds["rewards"][:1000])) > 2:
            print("--sparse on a task with a dense reward: nearly every reward becomes -1", file=sys.stderr)
        ds["rewards"] = (ds["rewards"] != 0) * -1.0
    return ds


class Batches(torch.utils.data.Dataset):
    """The training samples of each update. Which rows they are depends on seed and update only, so that a resumed run,
    worker processes and several GPUs all draw the same."""

    def __init__(self, dataset: Dataset, args: Args, device: torch.device):
        self.args, self.horizon = args, args.horizon_length if args.action_chunking else 1
        self.count = dataset.size - self.horizon + 1  # rows that a chunk can begin at; qc utils/datasets.py:93
        if self.count < 1:
            fail(f"--horizon-length {self.horizon}: the data has only {dataset.size} steps")
        observations = dataset["observations"]
        arrays = list(observations.values()) if isinstance(observations, dict) else [observations]
        self.on_disk = any(isinstance(x, StoredImages) for x in arrays)
        size = 0 if self.on_disk else sum(x.nbytes for x in (*arrays, dataset["actions"]))
        fits = device.type == "cuda" and not self.on_disk and size < torch.cuda.mem_get_info()[0] / 2
        self.device = device if fits else torch.device("cpu")

        def tensor(x):
            return x if isinstance(x, StoredImages) else torch.from_numpy(x).to(self.device)

        self.observations, self.actions = each(tensor, dataset["observations"]), tensor(dataset["actions"])
        self.starts, self.ends = map(tensor, dataset.bounds())

    def rows(self, step: int) -> np.ndarray:
        """(B,) the rows of an update's samples, of this process."""
        rng = np.random.default_rng([self.args.seed, step])
        return rng.integers(self.count, size=self.args.batch_size)[rank() :: world_size()]

    def gather(self, rows: Tensor) -> tuple:
        """Observations (..., O), chunks (..., h * A) and their valid steps (..., h) at rows (...)."""
        chunk = rows.unsqueeze(-1) + torch.arange(self.horizon, device=self.device)  # (..., h)
        back = torch.arange(self.args.frame_stack - 1, -1, -1, device=self.device)
        stack = torch.maximum(rows.unsqueeze(-1) - back, self.starts[rows].unsqueeze(-1))  # (..., N)

        def stacked(x) -> Tensor:
            frames = torch.from_numpy(x[stack.numpy()]) if isinstance(x, StoredImages) else x[stack]
            return frames.movedim(rows.ndim, -2).flatten(-2)  # (..., H, W, N * C)

        valid = (chunk <= self.ends[rows].unsqueeze(-1)).float()
        return each(stacked, self.observations), self.actions[chunk].flatten(-2), valid

    def __getitem__(self, step: int) -> tuple:
        return self.gather(torch.from_numpy(self.rows(step)))

    def open(self, start: int, stop: int, pin_memory: bool) -> None:
        """Starts the workers, if images are on disk, for updates `start` to `stop`."""
        if self.on_disk:
            workers = self.args.num_workers
            options = {"prefetch_factor": 4, "persistent_workers": True} if workers else {}
            options |= {"batch_size": None, "sampler": range(start, stop), "num_workers": workers}
            self.loader = iter(torch.utils.data.DataLoader(self, pin_memory=pin_memory, **options))

    def take(self, step: int, count: int, device: torch.device) -> tuple:
        """Samples of `count` updates from `step` on: observations (K, B, ...), chunks (K, B, hA), valid (K, B, h)."""
        if self.on_disk:
            samples = zip(*(next(self.loader) for _ in range(count)), strict=True)

            def moved(*xs: Tensor) -> Tensor:  # from pinned memory, so before they are stacked
                return torch.stack([x.to(device, non_blocking=True) for x in xs])

            return tuple(each(moved, *parts) for parts in samples)
        rows = torch.from_numpy(np.stack([self.rows(step + k) for k in range(count)])).to(self.device)
        return tuple(each(lambda x: x.to(device), part) for part in self.gather(rows))


# --- Agent ------------------------------------------------------------------------------------------------------------
class BCAgent:
    """Behaviour cloning of action chunks, as a flow (qc agents/acfql.py:54-81, 207-223) or a tanh-Gaussian."""

    def __init__(self, observation_shape, action_dim: int, args: Args, device: torch.device):
        self.args, self.device, self.action_dim = args, device, action_dim
        self.shape, self.horizon = observation_shape, args.horizon_length if args.action_chunking else 1
        self.generator = torch.Generator(device).manual_seed(args.seed)
        torch.manual_seed(args.seed)  # the network's initialisation
        self.actor = Policy(observation_shape, self.horizon * action_dim, args).to(device)
        self.mean_actor = copy.deepcopy(self.actor).requires_grad_(False) if args.ema else self.actor
        self.parameters = list(self.actor.parameters())
        self.lr = torch.tensor(args.lr, device=device)  # tensors, so that a CUDA graph follows the schedule
        self.updates = torch.zeros((), device=device)  # float32 counts exactly up to 16 million
        options = {"weight_decay": args.weight_decay, "fused": True, "capturable": device.type == "cuda"}
        self.actor_optimizer = torch.optim.AdamW(self.parameters, self.lr, **options)
        self.use_graph = args.compile and device.type == "cuda" and world_size() == 1
        self.graph, self.launches, self.pool, self.parts = None, 0, None, args.grad_accum_steps
        threads = max(1, args.threads // world_size())
        if threads > 1 and device.type == "cpu":
            self.pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
            self.parts *= threads  # a CPU computes parts side by side, which beats threads inside each product
        if args.compile and device.type == "cuda":
            self.loss = torch.compile(self.loss)

    @classmethod
    def create(cls, observation_shape, action_dim: int, config: Args, device: torch.device | None = None) -> "BCAgent":
        """`observation_shape`: (O,), or {"state": (S,), NAME: (H, W, C)} with images; `config`: BCAgentConfig()."""
        return cls(observation_shape, action_dim, config, device or torch.device("cpu"))

    def observe(self, states: Tensor) -> None:
        """Takes the mean and standard deviation of states (N, S) for normalize_observations."""
        for actor in {self.actor, self.mean_actor}:
            actor.encoder.normalizer.update(states.to(self.device).repeat(1, self.args.frame_stack))

    def loss(self, observations, x_1: Tensor, valid: Tensor, x_0: Tensor, t: Tensor) -> Tensor:
        """Mean over all entries of chunks x_1 (B, h * A), where `valid` (B, h) counts; noise x_0 like x_1, t (B, 1)."""
        features = self.actor.encoder(observations)  # (B, F)
        if self.args.policy == "gaussian":
            mean, log_std = self.actor.head(features)  # (B, h * A)
            u = x_1.clamp(ACTION_CLIP_EPS - 1, 1 - ACTION_CLIP_EPS).atanh()
            log_pi = -0.5 * ((u - mean) / log_std.exp()).square() - log_std - 0.5 * math.log(2 * math.pi)
            error = 2 * (math.log(2) - u - F.softplus(-2 * u)) - log_pi  # -log pi(x_1), arXiv:1812.05905 appendix C
        else:
            x_t = (1 - t) * x_0 + t * x_1
            error = (self.actor.head(features, x_t, t) - (x_1 - x_0)).square()  # arXiv:2210.02747 eq. 23
        return (error.unflatten(-1, (self.horizon, -1)) * valid.unsqueeze(-1)).mean()

    def step(self, observations, x_1: Tensor, valid: Tensor) -> Tensor:
        """One update; the loss. Noise is drawn for the samples of all processes, and each takes its own."""
        shape = (len(x_1) * world_size(), x_1.shape[1])
        noise = {"generator": self.generator, "device": self.device}
        draws = [torch.randn(shape, **noise), torch.rand(shape[0], 1, **noise)]
        if isinstance(observations, dict) and self.args.random_crop:
            offsets = torch.randint(0, 9, (shape[0], 2), **noise)[rank() :: world_size()]
            observations = {k: v if k == "state" else random_crop(v, offsets, 4) for k, v in observations.items()}
        inputs = (observations, x_1, valid, *(draw[rank() :: world_size()] for draw in draws))
        count = min(self.parts, len(x_1))
        parts = [tuple(each(lambda x, i=i: x.tensor_split(count)[i], x) for x in inputs) for i in range(count)]
        weights = [len(part[1]) / len(x_1) for part in parts]
        losses, gradients = zip(*(self.pool.map if self.pool else map)(self.gradient, parts, weights), strict=True)
        loss = torch.stack(losses).sum()
        for parameter, *terms in zip(self.parameters, *gradients, strict=True):
            parameter.grad = sum(terms[1:], terms[0])
        if world_size() > 1:
            loss = self.average_gradients(loss)
        if self.args.lr_schedule == "cosine":
            done = (self.updates / self.args.offline_steps).clamp(max=1)
            self.lr.copy_(self.args.lr * 0.5 * (1 + torch.cos(math.pi * done)))
        self.actor_optimizer.step()
        self.updates += 1
        if self.args.ema:  # a plain mean at first, so that the random policy it began with does not stay in it
            weight = (1 / self.updates).clamp(min=1 - self.args.ema)
            for mean, parameter in zip(self.mean_actor.parameters(), self.parameters, strict=True):
                mean.lerp_(parameter.detach(), weight)
        return loss

    def gradient(self, samples: tuple, weight: float) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss of a part of the batch times its weight, and its gradient."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.amp):
            loss = weight * self.loss(*samples)
        return loss.detach(), torch.autograd.grad(loss, self.parameters)

    def average_gradients(self, loss: Tensor) -> Tensor:
        """Mean of gradients and loss over the processes, in one message."""
        flat = torch.cat([loss.view(1), *(p.grad.view(-1) for p in self.parameters)])
        dist.all_reduce(flat)
        loss, *gradients = (flat / world_size()).split([1, *(p.numel() for p in self.parameters)])
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad.copy_(gradient.view_as(parameter))
        return loss[0]

    def learn(self, samples: tuple) -> dict[str, Tensor]:
        """K updates from `Batches.take`; their mean loss, and the size of the last gradient, as detached tensors."""
        return (self.replay if self.use_graph else self.learn_eagerly)(samples)

    def learn_eagerly(self, samples: tuple) -> dict[str, Tensor]:
        losses = [self.step(*(each(lambda x, k=k: x[k], x) for x in samples)) for k in range(len(samples[1]))]
        loss, gradients = torch.stack(losses).mean(), [p.grad for p in self.parameters]
        name = "actor/bc_flow_loss" if self.args.policy == "flow" else "actor/bc_nll_loss"
        info = {"actor/actor_loss": loss, name: loss.clone(), "lr": self.lr.clone()}
        info["grad/norm"] = torch.stack(torch._foreach_norm(gradients)).sum()  # of leaves, qc utils/flax_utils.py:145
        info["grad/max"] = torch.stack([g.max() for g in gradients]).max()
        return info | {"grad/min": torch.stack([g.min() for g in gradients]).min()}

    def replay(self, samples: tuple) -> dict[str, Tensor]:
        """`learn_eagerly` as one CUDA graph; the first launches run as usual on a side stream, then one is captured."""
        if len(samples[1]) != self.args.updates_per_launch or self.launches < 2:
            self.launches += 1
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                info = self.learn_eagerly(samples)
            torch.cuda.current_stream().wait_stream(stream)
            return info
        if self.graph is None:
            static_samples, graph = tuple(each(torch.clone, x) for x in samples), torch.cuda.CUDAGraph()
            graph.register_generator_state(self.generator)
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # the loader pins memory meanwhile
                info = self.learn_eagerly(static_samples)
            self.graph = graph, static_samples, info
        graph, static_samples, info = self.graph
        for static, x in zip(static_samples, samples, strict=True):
            each(lambda a, b: a.copy_(b), static, x)
        graph.replay()
        return info

    def update(self, batch: dict) -> dict[str, float]:
        """One update, in place, from a batch (B, ...) of Dataset.sample, or with chunks of Dataset.sample_sequence."""
        observations = self.tensors(batch["observations"])
        actions = torch.as_tensor(np.asarray(batch["actions"]), dtype=torch.float32, device=self.device)
        valid = torch.ones(len(actions), 1, device=self.device)
        if self.args.action_chunking:
            valid = torch.as_tensor(np.asarray(batch["valid"]), dtype=torch.float32, device=self.device)
        elif actions.ndim == 3:
            actions = actions[:, 0]  # qc agents/acfql.py:59
        samples = (each(lambda x: x.unsqueeze(0), x) for x in (observations, actions.flatten(1), valid))
        return {key: float(value) for key, value in self.learn(tuple(samples)).items()}

    def batch_update(self, batch: dict) -> dict[str, float]:
        """As many updates as the batch's leading axis is long, (U, B, ...); the mean of their infos."""
        infos = [self.update(each(lambda x, k=k: x[k], batch)) for k in range(len(batch["actions"]))]
        return {key: float(np.mean([info[key] for info in infos])) for key in infos[0]}

    def tensors(self, observations):
        """Observations on the device, states as float32."""
        tensors = each(lambda x: torch.as_tensor(np.asarray(x), device=self.device), observations)
        return each(lambda x: x if x.dtype == torch.uint8 else x.float(), tensors)

    @torch.inference_mode()
    def sample_actions(self, observations, rng: torch.Generator | None = None, noise=None) -> np.ndarray:
        """Chunks (..., h * A) in [-1, 1] for one observation or a batch. A flow starts at `noise`, drawn if None."""
        x, name = self.tensors(observations), next(iter(observations)) if isinstance(observations, dict) else None
        single = x[name].ndim == len(self.shape[name]) if name else x.ndim == len(self.shape)
        features = self.mean_actor.encoder(each(lambda x: x.unsqueeze(0), x) if single else x)  # (B, F)
        if self.args.policy == "gaussian":
            actions = self.mean_actor.head(features)[0].tanh()
        else:
            shape = (len(features), self.horizon * self.action_dim)
            if noise is None:
                noise = torch.randn(shape, generator=rng or self.generator, device=self.device)
            x = torch.as_tensor(noise, dtype=torch.float32, device=self.device).reshape(shape)
            actions = self.integrate(features, x).clamp(-1, 1)
        return (actions[0] if single else actions).cpu().numpy()

    def integrate(self, features: Tensor, x: Tensor) -> Tensor:
        """From noise (B, h * A) along the velocity to actions, by Euler's or Heun's method."""
        dt, velocity_at = 1 / self.args.flow_steps, self.mean_actor.head
        for i in range(self.args.flow_steps):
            velocity = velocity_at(features, x, torch.full_like(x[:, :1], i * dt))
            # The last step is Euler's, as the field is not smooth at t = 1; arXiv:2206.00364 algorithm 1.
            if self.args.flow_solver == "heun" and i + 1 < self.args.flow_steps:
                ahead = velocity_at(features, x + dt * velocity, torch.full_like(x[:, :1], (i + 1) * dt))
                velocity = (velocity + ahead) / 2
            x = x + dt * velocity
        return x

    @torch.inference_mode()
    def validation_loss(self, samples: tuple) -> float:
        """The loss of the averaged policy on samples (K, B, ...), with the same noise at every call."""
        noise, losses = {"generator": torch.Generator(self.device).manual_seed(0), "device": self.device}, []
        learned, self.actor = self.actor, self.mean_actor
        for k, x_1 in enumerate(samples[1]):
            draws = torch.randn(x_1.shape, **noise), torch.rand(len(x_1), 1, **noise)
            losses.append(self.loss(*(each(lambda x, k=k: x[k], x) for x in samples), *draws))
        self.actor = learned
        return float(torch.stack(losses).mean())

    def state_dict(self) -> dict:
        """The note's keys, critics empty as there are none, and what an exact continuation needs."""
        state = {"actor": self.actor.state_dict(), "critic": {}, "target_critic": {}, "critic_optimizer": {}}
        state |= {"actor_optimizer": self.actor_optimizer.state_dict(), "step": int(self.updates)}
        state |= {"config": dataclasses.asdict(self.args), "generator": self.generator.get_state()}
        return state | {"mean_actor": self.mean_actor.state_dict() if self.args.ema else {}}

    def load_state_dict(self, state: dict) -> None:
        """Raises KeyError, ValueError or RuntimeError when the state is of another network."""
        names = "policy action_chunking horizon_length use_fourier_features hidden_dims layer_norm encoder frame_stack"
        for name in [*names.split(), "normalize_observations"]:
            if (theirs := state["config"][name]) != (ours := getattr(self.args, name)):
                raise ValueError(f"was saved with {flag(name)} {theirs}, not {ours}")
        self.actor.load_state_dict(state["actor"])
        if state["mean_actor"] and self.mean_actor is self.actor:  # a config without ema: what is evaluated is averaged
            self.mean_actor = copy.deepcopy(self.actor).requires_grad_(False)
            self.args = dataclasses.replace(self.args, ema=state["config"]["ema"])
        self.mean_actor.load_state_dict(state["mean_actor"] or state["actor"])
        self.actor_optimizer.load_state_dict(state["actor_optimizer"])
        group = self.actor_optimizer.param_groups[0]
        self.lr.copy_(torch.as_tensor(group["lr"]))
        group["lr"], group["capturable"] = self.lr, self.device.type == "cuda"
        self.updates.fill_(state["step"])
        if state["generator"].shape == self.generator.get_state().shape:
            self.generator.set_state(state["generator"].cpu())
        else:  # written on a GPU and read on a CPU, or the other way: the run goes on, with other random numbers
            self.generator.manual_seed(self.args.seed + state["step"])

    def save(self, path: str | Path, **more) -> None:
        """Writes a checkpoint that loads with weights_only=True; `more`: plain entries beside the agent's."""
        data = io.BytesIO()
        torch.save(self.state_dict() | more, data)
        write_atomically(Path(path), data.getbuffer())

    def load(self, path: str | Path) -> dict:
        """Takes over a checkpoint, and returns it. Exits when it is damaged or of another network."""
        try:
            with warnings.catch_warnings(action="ignore"):  # it advises to load without weights_only
                state = torch.load(path, map_location=self.device, weights_only=True)
        except FileNotFoundError:
            fail(f"{path}: there is no such checkpoint")
        except Exception as error:  # noqa: BLE001  a damaged file raises what it likes
            fail(f"{path}: damaged, cannot be read ({type(error).__name__}); use an older one, or start a new run")
        try:
            self.load_state_dict(state)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            fail(f"{path}: does not fit this task and these flags ({' '.join(str(error).split())[:300]})")
        return state


# --- Evaluation -------------------------------------------------------------------------------------------------------
def success(info: dict) -> float:
    """Whether the episode whose last info this is was a success, NaN where the task does not say. TASK: yours."""
    return float(info.get("success", info.get("is_success", math.nan)))


class Episode:
    """One evaluation episode in progress; `frame_skip`: steps per rendered frame, 0 for no video."""

    def __init__(self, env: gym.Env, number: int, seed: int, frame_skip: int):
        self.env, self.number, self.frame_skip = env, number, frame_skip
        self.rng = np.random.default_rng(episode_seed(seed, 1, number))  # noise, whatever else runs side by side
        self.obs, _ = env.reset(seed=episode_seed(seed, 1, number))
        self.queue, self.done, self.frames, self.trajectory = deque(), False, [], defaultdict(list)

    def step(self, keep_observations: bool) -> None:
        """Executes the next action of the queue."""
        action = self.queue.popleft()
        next_obs, reward, terminated, truncated, self.info = self.env.step(action)
        self.done = terminated or truncated
        step = {"action": action, "reward": float(reward), "done": float(self.done)}
        if keep_observations:
            step |= {"observation": self.obs, "next_observation": next_obs, "info": self.info}
        for key, value in step.items():
            self.trajectory[key].append(value)
        if self.frame_skip and (len(self.trajectory["done"]) % self.frame_skip == 0 or self.done):
            self.frames.append(self.env.render())
        self.obs = next_obs

    def scalars(self) -> dict[str, float]:
        """Return, length and success, and the numbers of the last info, as qc evaluation.py:120."""
        rewards, number = self.trajectory["reward"], (int, float, np.number, np.bool_)
        known = {"episodic_return": sum(rewards), "episodic_length": len(rewards), "success_rate": success(self.info)}
        return known | {key: float(value) for key, value in self.info.items() if isinstance(value, number)}


def evaluate(
    agent: BCAgent,
    env: gym.Env | list[gym.Env],
    action_dim: int,
    num_eval_episodes: int = 50,
    num_video_episodes: int = 0,
    video_frame_skip: int = 3,
    seed: int = 0,
    keep_observations: bool = True,
) -> tuple[dict[str, float], list[dict], list[np.ndarray]]:
    """Means over seeded episodes, their trajectories, and frames (T, H, W, 3) of the video episodes after them.

    With several environments the episodes run side by side; the policy is asked only for those whose queue of actions
    is used up, for all of them in one batch. The outcome of an episode does not depend on the others.
    """
    envs, total = env if isinstance(env, list) else [env], num_eval_episodes + num_video_episodes
    if num_video_episodes and envs[0].render_mode != "rgb_array":
        fail("evaluate: num_video_episodes needs an environment made with render_mode='rgb_array'")
    waiting, finished = iter(range(total)), []

    def begin(free: gym.Env) -> list[Episode]:
        numbers = [] if (number := next(waiting, None)) is None else [number]
        return [Episode(free, n, seed, video_frame_skip if n >= num_eval_episodes else 0) for n in numbers]

    running = [episode for free in envs for episode in begin(free)]
    while running:
        if asking := [episode for episode in running if not episode.queue]:
            observations = each(lambda *xs: np.stack(xs), *(episode.obs for episode in asking))
            noise = np.stack([episode.rng.standard_normal(agent.horizon * action_dim) for episode in asking])
            chunks = agent.sample_actions(observations, noise=noise).reshape(len(asking), -1, action_dim)
            for episode, chunk in zip(asking, chunks, strict=True):
                episode.queue.extend(chunk[: agent.args.execution_horizon or None])
        for episode in running:
            episode.step(keep_observations)
        finished += [episode for episode in running if episode.done]
        running = [new for old in running for new in (begin(old.env) if old.done else [old])]
    finished.sort(key=lambda episode: episode.number)
    counted, shown = finished[:num_eval_episodes], finished[num_eval_episodes:]
    scalars = [episode.scalars() for episode in counted]
    stats = {key: float(np.mean([x.get(key, math.nan) for x in scalars])) for key in (scalars or [{}])[0]}
    trajectories = [dict(episode.trajectory) for episode in counted]
    return stats | {"episodes": float(len(counted))}, trajectories, [np.stack(episode.frames) for episode in shown]


def video_grid(renders: list[np.ndarray]) -> np.ndarray:
    """Videos (T, H, W, 3) side by side as one; shorter ones end in their last frame, darker. qc log_utils.py:101."""
    length, columns = max(map(len, renders)), math.ceil(math.sqrt(len(renders)))
    renders = [np.concatenate([r, np.repeat(r[-1:] // 2, length - len(r), 0)]) for r in renders]
    renders = [np.pad(r, ((0, 0), (1, 1), (1, 1), (0, 0))) for r in renders]
    renders += [np.zeros_like(renders[0])] * (-len(renders) % columns)
    rows = [np.concatenate(renders[i : i + columns], 2) for i in range(0, len(renders), columns)]
    return np.concatenate(rows, 1)


def write_video(renders: list[np.ndarray], path: Path, fps: int) -> None:
    import imageio.v2 as imageio

    with imageio.get_writer(path, fps=fps, macro_block_size=1) as video:
        for frame in video_grid(renders):
            video.append_data(frame)


def get_wandb_video(renders: list[np.ndarray], fps: int = 15, path: Path | None = None):
    """A grid of videos for Weights & Biases, written to `path`, or to a temporary file."""
    import wandb

    path = path or Path(tempfile.mkdtemp(), "video.mp4")
    write_video(renders, path, fps)
    return wandb.Video(str(path), format="mp4")


# --- Run directory ----------------------------------------------------------------------------------------------------
def write_atomically(path: Path, data: bytes) -> None:
    """The file is the old one or the new one, whenever the program or the machine stops."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def git_commit() -> str:
    """Commit that this script belongs to, with a + when files differ from it."""
    git = ["git", "describe", "--always", "--dirty=+", "--exclude=*", "--abbrev=40"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):  # no git, or no repository
        here = Path(__file__).resolve().parent
        return subprocess.run(git, cwd=here, capture_output=True, text=True, check=True).stdout.strip()
    return "unknown"


def get_exp_name(seed: int) -> str:
    """sdSEED[s_SLURM-JOB.]TIME, qc log_utils.py:40; with milliseconds, so that no two runs share it."""
    job = "".join(f"s_{os.environ[name]}." for name in ("SLURM_JOB_ID", "SLURM_PROCID") if name in os.environ)
    return f"sd{seed:03d}{job}{datetime.now():%Y%m%d_%H%M%S_%f}"[:-3]


class CsvLogger:
    """Rows of numbers; the first row fixes the columns. Goes on with a file that is there, up to `last_step`."""

    def __init__(self, path: str | Path, last_step: int = 0):
        self.path, self.columns = Path(path), []
        if self.path.exists():
            header, *rows = [*self.path.read_text().split("\n")[:-1], ""]  # without what a crash cut off
            rows = [row for row in rows if row and int(row.split(",")[0]) <= last_step]
            write_atomically(self.path, "".join(row + "\n" for row in (header, *rows) if row).encode())
            self.columns = header.split(",") if header else []
        self.file = self.path.open("a")

    def log(self, row: dict, step: int) -> None:
        numbers = {"step": step} | {k: v for k, v in row.items() if isinstance(v, int | float | np.number | Tensor)}
        if not self.columns:
            self.columns = list(numbers)
            self.file.write(",".join(self.columns) + "\n")
        self.file.write(",".join(f"{float(numbers[k]):.9g}" if k in numbers else "" for k in self.columns) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


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
        for key, value in data.items() if self.writer else ():
            if isinstance(value, int | float | np.number | Tensor):
                self.writer.add_scalar(f"{prefix}/{key}", float(value), step)


class RunFolder:
    """A directory that can be read, resumed and run again: scripts, flags, CSV, TensorBoard, checkpoints, pictures."""

    def __init__(self, args: Args):
        name = re.sub(r"[^-\w.]", "-", args.env_name)
        default = Path(args.save_dir, args.wandb_project_name, args.run_group, name, get_exp_name(args.seed))
        self.dir, self.signals, self.wandb_run = Path(args.run_dir or default), 0, None
        if not (args.resume or args.eval_only) and self.dir.exists() and any(self.dir.iterdir()):
            fail(f"--run-dir {self.dir}: is not empty; --resume it, or give another name")
        self.dir.parent.mkdir(parents=True, exist_ok=True)
        args.run_dir = str(self.dir)

    def create(self, args: Args) -> None:
        """Fills the directory under another name and renames it, so that every run directory can be resumed."""
        temporary = self.dir.with_name(self.dir.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for source in (__file__, franka_sim.__file__):
            shutil.copy(source, temporary)
        versions = {m.__name__: m.__version__ for m in (torch, np, gym)} | {"python": sys.version.split()[0]}
        about = {"command": sys.argv, "git_commit": git_commit(), "versions": versions, "cpus": os.cpu_count()}
        about["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        (temporary / "run.json").write_text(json.dumps(about, indent=2))
        (temporary / "flags.json").write_text(json.dumps(dataclasses.asdict(args) | {"run_dir": None}, indent=2))
        temporary.replace(self.dir)

    def catch_signals(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.stop)

    def stop(self, *_) -> None:
        """Ctrl-C and SIGTERM end the loop after the current updates; a second one ends the program at once."""
        self.signals += 1
        if self.signals > 1:
            raise KeyboardInterrupt

    def open_logs(self, args: Args, step: int) -> LoggingHelper:
        """CSV files, TensorBoard, wandb; what was written after the checkpoint at `step` is removed."""
        from torch.utils.tensorboard import SummaryWriter

        if args.track:
            import wandb  # WANDB_MODE=offline keeps the files here, for `wandb sync`

            options = {"project": args.wandb_project_name, "group": args.run_group, "tags": [args.run_group]}
            config = dataclasses.asdict(args)
            self.wandb_run = wandb.init(name=self.dir.name, config=config, dir=self.dir, **options)
        evaluated = step - (step == args.offline_steps)  # the last evaluation comes after the checkpoint
        csv_loggers = {"eval": CsvLogger(self.dir / "eval.csv", evaluated)}
        csv_loggers["offline_agent"] = CsvLogger(self.dir / "offline_agent.csv", step)
        return LoggingHelper(csv_loggers, self.wandb_run, SummaryWriter(self.dir, purge_step=step + 1))

    def save(self, agent: BCAgent, **more) -> None:
        """Writes checkpoint.pt, and keeps the one before as checkpoint.previous."""
        path = self.dir / "checkpoint.pt"
        agent.save(path.with_suffix(".new"), **more)
        if path.exists():
            path.replace(path.with_suffix(".previous"))
        path.with_suffix(".new").replace(path)

    def newest(self) -> Path | None:
        """The checkpoint to go on from, if there is one; killed between `save`'s renames it is the one before."""
        paths = [self.dir / f"checkpoint.{suffix}" for suffix in ("pt", "previous")]
        return next((path for path in paths if path.exists()), None)

    def plot(self) -> None:
        """Writes curve.png: the evaluations and the training loss over updates."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        keys = {"eval": ("success_rate", "episodic_return", "validation_loss"), "offline_agent": ("actor/actor_loss",)}
        curves = []
        for name, columns in keys.items():
            if (self.dir / f"{name}.csv").stat().st_size:
                table = np.genfromtxt(self.dir / f"{name}.csv", delimiter=",", names=True, deletechars="", ndmin=1)
                known = [key for key in columns if key in table.dtype.names and np.isfinite(table[key]).any()]
                curves += [(key, table["step"], table[key]) for key in known]
        figure, axes = plt.subplots(1, max(len(curves), 1), figsize=(5 * len(curves), 3.5), squeeze=False)
        for axis, (key, steps, values) in zip(axes[0], curves, strict=False):
            axis.plot(steps, values, marker="o", markersize=3)
            axis.set(xlabel="updates", ylabel=key.replace("_", " "))
            axis.grid(alpha=0.3)
        figure.suptitle(self.dir.name, fontsize=9)
        figure.tight_layout()
        figure.savefig(self.dir / "curve.png", dpi=150)
        plt.close(figure)


# --- Main -------------------------------------------------------------------------------------------------------------
def prepare_torch(args: Args) -> torch.device:
    """Seeds, precision, threads and memory for speed, the group of processes; the device."""
    random.seed(args.seed)
    np.random.seed(args.seed)  # noqa: NPY002  for Dataset.sample, as the original
    torch.manual_seed(args.seed)
    torch.set_num_threads(max(1, args.threads // world_size()))
    torch.set_float32_matmul_precision("medium")  # a GPU's TF32; on a CPU oneDNN, on AMD twice as fast as MKL
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD: keep freed activations, rather than have the
        libc.mallopt(-3, 1 << 25)  # system map them anew in every update
    on_gpu = args.cuda and torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if world_size() > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(hours=2))  # rank 0 may evaluate long
    return device


class Evaluation:
    """The environments of a run's evaluations, made when first needed."""

    def __init__(self, args: Args, dataset, eval_env: gym.Env | None):
        self.args, self.dataset, self.envs = args, dataset, [eval_env] if eval_env else []
        self.reference_scores, self.reference = reference_scores(dataset)

    def __call__(self, agent: BCAgent, video_episodes: int = 0, scalars: bool = True) -> tuple[dict[str, Any], list]:
        """Scalars by name, and videos (T, H, W, 3); nothing where the task cannot run here."""
        args, stats, renders, started = self.args, {}, [], time.perf_counter()
        if not self.envs:
            return stats, renders
        action_dim = math.prod(self.envs[0].action_space.shape)
        if scalars:
            while len(self.envs) < min(args.eval_envs, args.eval_episodes):
                self.envs.append(make_env(self.dataset, args))
            stats = evaluate(agent, self.envs, action_dim, args.eval_episodes, 0, 3, args.seed, False)[0]
            stats["seconds"] = time.perf_counter() - started
            if self.reference:  # the name says whose scores 0 and 100 are
                worst, best = self.reference_scores
                score = 100 * (stats["episodic_return"] - worst) / (best - worst)
                stats[f"normalized_score_{self.reference.lower()}"] = score
        if video_episodes:
            try:
                options = (0, video_episodes, args.video_frame_skip, args.seed, False)
                renders = evaluate(agent, self.envs[0], action_dim, *options)[2]
            except Exception as error:  # noqa: BLE001  OpenGL fails in many ways; the policy is trained all the same
                print(f"no video: {error}; afterwards --eval-only {args.run_dir} writes it", file=sys.stderr)
        return stats, renders


class Meter:
    """Clock, progress bar, and best evaluation of a run."""

    bar = None

    def __init__(self, args: Args, state: dict, step: int):
        from tqdm import tqdm

        self.best, self.begun = state.get("best", {}), time.perf_counter() - state.get("elapsed", 0.0)
        self.step, self.since, self.paused = step, time.perf_counter(), 0.0
        interval, quiet = 0.2 if sys.stderr.isatty() else 30.0, rank() > 0
        Meter.bar = tqdm(
            total=args.offline_steps, initial=step, unit="update", mininterval=interval, smoothing=0.05, disable=quiet
        )

    def state(self) -> dict:
        """What a checkpoint holds of it."""
        return {"best": self.best, "elapsed": time.perf_counter() - self.begun}

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Time inside does not count as learning."""
        started = time.perf_counter()
        yield
        self.paused += time.perf_counter() - started

    def updates_per_second(self, step: int) -> float:
        """Since the last call."""
        now = time.perf_counter()
        rate = (step - self.step) / (now - self.since - self.paused)
        self.step, self.since, self.paused = step, now, 0.0
        return rate

    def evaluated(self, stats: dict[str, float]) -> None:
        """Keeps the best, by success rate or return."""
        rank_of = [self.rank_of(x) for x in (stats, self.best)]
        self.best = stats if rank_of[0] >= rank_of[1] else self.best
        shown = {k: f"{v:.3g}" for k, v in stats.items() if k in ("success_rate", "episodic_return") and v == v}
        self.bar.set_postfix(shown)

    @staticmethod
    def rank_of(stats: dict[str, float]) -> tuple[float, float]:
        known = [stats.get(key, math.nan) for key in ("success_rate", "episodic_return")]
        return tuple(-math.inf if math.isnan(value) else value for value in known)


def prepare(args: Args, device: torch.device) -> tuple[BCAgent, Batches, Evaluation, tuple | None]:
    """The agent before its first update, its batches, evaluation, and validation samples if the data has some."""
    if rank() > 0:
        dist.barrier()  # rank 0 collects, converts or downloads
    _, eval_env, train_dataset, val_dataset = make_env_and_datasets(args.env_name, args)
    if world_size() > 1 and rank() == 0:
        dist.barrier()
    train_dataset = process_train_dataset(train_dataset, args)
    batches, observations = Batches(train_dataset, args, device), train_dataset["observations"]
    if args.action_chunking:
        example_batch = train_dataset.sample_sequence(args.batch_size, args.horizon_length, args.discount)
    else:
        example_batch = train_dataset.sample(args.batch_size)
    observation_shape = each(lambda x: x.shape[1:], example_batch["observations"])
    agent = BCAgent.create(observation_shape, example_batch["actions"].shape[-1], args, device)
    states = observations.get("state") if isinstance(observations, dict) else observations
    if args.normalize_observations and states is not None:
        agent.observe(torch.from_numpy(states))
    validation = None
    if val_dataset is not None:
        validation = Batches(val_dataset, args, device)
        rows = np.random.default_rng(0).integers(validation.count, size=(10, args.batch_size))
        samples = validation.gather(torch.from_numpy(rows).to(validation.device))
        validation = tuple(each(lambda x: x.to(device), part) for part in samples)
    return agent, batches, Evaluation(args, train_dataset.source, eval_env), validation


def next_event(step: int, args: Args) -> int:
    """The next update after `step` at which something is logged, evaluated or saved, or training ends."""
    intervals = [every for every in (args.log_interval, args.eval_interval, args.save_interval) if every > 0]
    return min(args.offline_steps, *(step - step % every + every for every in intervals))


def stopped(run: RunFolder, device: torch.device) -> bool:
    """Whether any process was asked to stop; all of them learn it after the same update."""
    if world_size() == 1:
        return run.signals > 0
    signals = torch.tensor(float(run.signals), device=device)
    dist.all_reduce(signals)
    return bool(signals > 0)


def summarize(name: str, stats: dict[str, Any]) -> None:
    """One line for the terminal about an evaluation."""
    keys = [
        k for k in stats if k in ("success_rate", "episodic_return", "validation_loss") or k.startswith("normalized")
    ]
    numbers = ", ".join(f"{key} {stats[key]:.4g}" for key in keys if math.isfinite(stats[key]))
    print(f"{name}: {numbers or 'no evaluation'} over {stats.get('episodes', 0):.0f} episodes")


def frames_per_second(args: Args) -> int:
    return max(int(30 / args.video_frame_skip), 1)


def evaluate_only(args: Args, run: RunFolder, agent: BCAgent, evaluation: Evaluation) -> None:
    """--eval-only: scalars on the terminal, video.mp4 in the run directory."""
    path = Path(args.eval_only)
    if path.is_dir():
        path = path / "final_model.pt" if (path / "final_model.pt").exists() else run.newest()
    if path is None:
        fail(f"--eval-only {run.dir}: stopped before its first checkpoint; --resume it")
    agent.load(path)
    stats, renders = evaluation(agent, (args.video_episodes or 4) * args.capture_video)
    if renders:
        write_video(renders, run.dir / "video.mp4", frames_per_second(args))
    summarize(f"{path.name}, update {int(agent.updates)}", stats)


def log_evaluation(
    args: Args, run: RunFolder, progress: Meter, agent: BCAgent, evaluation: Evaluation, validation, logger
) -> dict[str, float]:
    """A row of eval.csv, with video_episodes a video beside it."""
    step = int(agent.updates)
    eval_info, renders = evaluation(agent, args.video_episodes)
    if validation:
        eval_info["validation_loss"] = agent.validation_loss(validation)
    progress.evaluated(eval_info)
    if renders:
        fps, path = frames_per_second(args), run.dir / f"video_{step}.mp4"
        if run.wandb_run:
            eval_info = eval_info | {"video": get_wandb_video(renders, fps, path)}
        else:
            write_video(renders, path, fps)
    if eval_info:
        logger.log(eval_info, "eval", step)
    return eval_info


def complete(
    args: Args, run: RunFolder, progress: Meter, agent: BCAgent, evaluation: Evaluation, validation, logger
) -> None:
    """The last evaluation, final_model.pt, curve, video, token.tk."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)  # from here on they end the program at once
    last = log_evaluation(args, run, progress, agent, evaluation, validation, logger)
    agent.save(run.dir / "final_model.pt", progress=progress.state())
    run.plot()
    renders = evaluation(agent, args.video_episodes or 4, scalars=False)[1] if args.capture_video else []
    if renders:
        write_video(renders, run.dir / "video.mp4", frames_per_second(args))
    for csv_logger in logger.csv_loggers.values():
        csv_logger.close()
    logger.writer.close()
    url = getattr(run.wandb_run, "url", None)  # None offline
    write_atomically(run.dir / "token.tk", (url or str(run.dir.resolve())).encode())
    summarize("last", last)
    summarize("best", progress.best)
    print(f"{progress.state()['elapsed']:.0f} s in all; see {run.dir}")


def learn_offline(args: Args) -> None:
    device, run, state = prepare_torch(args), RunFolder(args), {}
    agent, batches, evaluation, validation = prepare(args, device)
    if args.eval_only:
        return evaluate_only(args, run, agent, evaluation)
    if rank() == 0 and not args.resume:
        run.create(args)
    run.catch_signals()
    if args.resume and (path := run.newest()):
        state = agent.load(path)["progress"]
    step = int(agent.updates)
    if step >= args.offline_steps and (run.dir / "token.tk").exists():  # which is written last
        fail(f"--offline-steps {args.offline_steps}: {run.dir} is at {step}; give a larger number")
    (run.dir / "token.tk").unlink(missing_ok=True)
    logger = run.open_logs(args, step) if rank() == 0 else None
    print(f"run directory {run.dir}" if logger else "", end="\n" * bool(logger), flush=True)
    progress = Meter(args, state, step)
    batches.open(step, args.offline_steps, device.type == "cuda")

    while step < args.offline_steps and not stopped(run, device):
        # Learn: as many updates as until the next event, at most one launch's.
        count = args.updates_per_launch - step % args.updates_per_launch
        count = min(count, next_event(step, args) - step)
        offline_info = agent.learn(batches.take(step, count, device))
        step += count
        progress.bar.update(count)
        # Log.
        if step == next_event(step - 1, args) and not math.isfinite(loss := float(offline_info["actor/actor_loss"])):
            fail(f"the loss is {loss} after {step} updates; lower --lr ({run.dir} has the checkpoint before)")
        if logger and step % args.log_interval == 0:
            offline_info = {key: float(value) for key, value in offline_info.items()}
            offline_info["SPS"] = progress.updates_per_second(step)
            logger.log(offline_info, "offline_agent", step)
        # Evaluate and save.
        with progress.pause():
            if logger and args.eval_interval and step % args.eval_interval == 0 and step < args.offline_steps:
                log_evaluation(args, run, progress, agent, evaluation, validation, logger)
            if logger and args.save_interval > 0 and step % args.save_interval == 0:
                agent.save(run.dir / f"checkpoint_{step}.pt", progress=progress.state())
            if logger and step % args.log_interval == 0:
                run.save(agent, progress=progress.state())

    batches.loader = None  # ends its workers
    if logger:
        run.save(agent, progress=progress.state())
        if step < args.offline_steps:
            raise KeyboardInterrupt
        complete(args, run, progress, agent, evaluation, validation, logger)


def go_on(args: Args) -> str:
    begun = Path(args.run_dir or "", "flags.json").exists() and args.run_dir
    return f"go on with --resume {args.run_dir}" if begun else "run the same command again"


def main(args: Args) -> None:
    try:
        learn_offline(args)
    except KeyboardInterrupt:
        raise SystemExit(f"stopped; {go_on(args)}") from None
    except OSError as error:  # a full disk, above all; the newest checkpoint is whole
        fail(f"{error}; make room, then {go_on(args)}")
    except RuntimeError as error:
        if world_size() == 1 or not any(word in str(error).lower() for word in ("gloo", "nccl", "peer")):
            raise
        fail(f"process {rank()}: another process of this job has ended, see its message; {go_on(args)}")
    finally:
        if Meter.bar:
            Meter.bar.close()
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main(read_args())
