"""SAC from camera images: DrQ, RLPD with demonstrations, VICE, in one file.

    python sac_pixel_sim.py --seed 1                                # a Franka learns to pick up a cube that it sees
    python sac_pixel_sim.py --env-id FrankaPegInsert-v0
    python sac_pixel_sim.py --resume RUN_DIR                        # go on after Ctrl-C or a crash
    python sac_pixel_sim.py --eval-only RUN_DIR
    python sac_pixel_sim.py --encoder resnet10 --image-size 128 --pretrained resnet10_params.pkl  # needs SERL's file
    python sac_pixel_sim.py --reward vice                           # the reward is learned from images of success
    python sac_pixel_sim.py --env-id Hopper-v5 --render-obs --demos 0   # needs MUJOCO_GL=egl without a display
    python sac_pixel_sim.py --role learner                          # needs an actor; SERL's two processes
    python sac_pixel_sim.py --role actor --learner 127.0.0.1        # needs a learner; as many as you like

Expect: eval/success_rate >= 0.9, wall_s <= 1800 (2 CPU cores) [benchmarks/results/pixel_pick_default.csv]

Sources: everything that sac_state_sim.py names; DrQ arXiv:2004.13649, DrQ-v2 arXiv:2107.09645; SERL arXiv:2401.16013;
VICE arXiv:1805.11686, arXiv:1904.07854; FiLM arXiv:1709.07871; spatial softmax arXiv:1504.00702; MobileNetV3
arXiv:1905.02244.
Differs from SERL (serl_launcher, commit cd5f7e7), beside what sac_state_sim.py says: every frame has a crop of its own;
actor and critics each have a layer of their own for the robot's state; each critic has a last layer of its own; no
dropout; actor and critics see the same augmented images; VICE's reward is the classifier's probability, and mixup and
gradient penalty act on the encoder's output.
New experiment: copy this file; `grep -n TASK: my_task.py` lists the places to edit.
"""

import contextlib
import copy
import ctypes
import dataclasses
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: spinning threads starve each other on few cores

import gymnasium as gym
import numpy as np
import torch
import torch.distributed.nn  # now: later its default arguments would keep a process group, and that aborts at exit
import torch.nn.functional as F
import tyro
from gymnasium import spaces
from torch import Tensor, distributed, nn
from torch.utils.checkpoint import checkpoint

import franka_sim  # registers the Franka tasks  # TASK: import the module that registers yours
from common import vision

PROTOCOL = "sac-rows-1"  # of the messages between actor and learner


# --- Args -------------------------------------------------------------------------------------------------------------
@dataclass
class Args:
    # experiment
    exp_name: str = "sac_pixel_sim"
    """name of this experiment, part of the run directory's name"""
    seed: int = 1
    """seed of everything: networks, sampling, exploration, training and evaluation episodes"""
    run_dir: str | None = None
    """directory to write to (default: runs/ENV__EXP__SEED__TIME)"""
    resume: str | None = None
    """run directory to continue; its own flags are used, only a few (such as total_timesteps) may change"""
    eval_only: str | None = None
    """run directory to evaluate: final_eval_episodes episodes and a video, no training"""
    record_dataset: str | None = None
    """store the last evaluation's episodes as this local Minari dataset, e.g. franka/pick-v0"""
    capture_video: bool = True
    """write an mp4 of the policy at the end (needs OpenGL: EGL or OSMesa)"""
    track: bool = False
    """mirror the TensorBoard scalars to Weights & Biases"""
    wandb_project_name: str = "robot-learning"
    """Weights & Biases project"""
    cuda: bool = True
    """use a GPU when there is one"""
    compile: bool = True
    """on a GPU: compile the losses and replay each update as one CUDA graph (a CPU is faster without)"""
    threads: int = 2
    """CPU threads for PyTorch: half of them for targets and actor, half for the critics, side by side"""
    amp: bool = False
    """bfloat16 matrix products: faster on a GPU, and on CPUs with AVX512-BF16 or AMX"""
    # environment
    env_id: str = "FrankaPickCube-v0"  # TASK: your task
    """gymnasium id, also module:Env-v0, with images (uint8) as Box or in a Dict, and bounded Box actions"""
    image_size: int = 48
    """height and width that all images are rendered at, or resized to (pixels)"""
    cameras: tuple[str, ...] = ()
    """names of the images in a Dict observation to learn from (default: all)"""
    render_obs: bool = False
    """learn from the rendered image of a task that has no images itself"""
    reward: Literal["env", "classifier", "vice"] = "env"
    """of the task, of a trained success classifier, or of one that learns along from the demonstrations' last images"""
    classifier: str | None = None
    """reward classifier: its file, such as checkpoint.pt of a run with --reward vice"""
    frame_stack: int = 1
    """observations of this many steps are concatenated"""
    action_chunk: int = 1
    """actions chosen at once and executed one after the other; rewards are summed"""
    gripper_penalty: float = 0.0
    """subtracted from the reward when the gripper (last action) switches between opening and closing (SERL: 0.1)"""
    # training
    total_timesteps: int = 12_000
    """environment steps"""
    learning_starts: int = 500
    """environment steps with random actions before learning starts"""
    buffer_size: int = 100_000
    """transitions kept"""
    buffer_dir: str | None = None
    """keep the frames in a memory-mapped file in this directory instead of memory"""
    batch_size: int = 64
    """transitions per critic update, demonstrations included"""
    grad_accum_steps: int = 1
    """parts that a batch is computed in, one after the other, to save memory"""
    utd_ratio: int = 2
    """critic updates per environment step"""
    policy_delay: int = 1
    """critic updates per update of actor and temperature"""
    demos: int = 20
    """demonstrations collected from the task's scripted expert before training (0: none)"""
    demo_dataset: str | None = None
    """Minari dataset with demonstrations, instead of the scripted expert"""
    demo_ratio: float = 0.5
    """fraction of each batch that is drawn from the demonstrations (RLPD: 0.5)"""
    demo_noise: float = 0.1
    """standard deviation of noise on the scripted expert's actions, in [-1, 1]: shows how to recover"""
    eval_every: int = 1_000
    """environment steps between evaluations"""
    eval_episodes: int = 10
    """episodes per evaluation during training"""
    final_eval_episodes: int = 50
    """episodes of the last evaluation"""
    log_every: int = 500
    """environment steps between rows of train.csv"""
    save_every: int = 2_000
    """environment steps between checkpoints"""
    # images
    encoder: Literal["small", "resnet10", "mobilenet"] = "small"
    """convolutions: a few (SERL's small encoder), ResNet-10 with GroupNorm, or MobileNetV3-small"""
    small_channels: tuple[int, ...] = (16, 32, 64)
    """encoder small: channels of its convolutions, each of which halves the image (SERL: 32 64 128 256)"""
    pooling: Literal["embeddings", "softmax", "average"] = "embeddings"
    """spatial learned embeddings, spatial softmax, or the mean over all places"""
    latent_dim: int = 128
    """features per camera (SERL: 256)"""
    proprio_dim: int = 64
    """features of the robot's state"""
    film: str | None = None
    """name of a state in the observation, such as state or task, that scales and shifts the images' channels"""
    pretrained: str | None = None
    """file with the encoder's parameters: SERL's resnet10_params.pkl, torchvision's for mobilenet, or any state dict"""
    freeze: bool = True
    """leave pretrained parameters as they are"""
    cache_features: bool = False
    """keep what a frozen encoder makes of each frame, instead of computing it in every update; without augment"""
    activation_checkpointing: bool = False
    """compute the encoder's activations again in the backward pass, to save memory"""
    augment: tuple[Literal["crop", "jitter", "blur", "flip"], ...] = ("crop",)
    """what is done to the images of each batch at random; none with --augment and nothing behind"""
    crop_padding: int = 2
    """crop: pixels that an image is shifted at most (SERL: 4 of 128)"""
    # success classifier of --reward vice
    vice_lr: float = 3e-4
    """its learning rate"""
    label_smoothing: float = 0.2
    """how far its labels are moved from 0 and 1 towards 0.5, relative (SERL: 0.2)"""
    mixup: bool = True
    """train it on random mixtures of pairs of features and labels"""
    gradient_penalty: float = 10.0
    """weight of (gradient norm - 1)^2 between pairs of features (SERL: 10)"""
    # algorithm
    gamma: float = 0.97
    """discount factor per environment step"""
    n_step: int = 1
    """steps whose rewards a critic's target sums before it bootstraps (SAC: 1)"""
    tau: float = 0.005
    """target critic's step towards the critic after each critic update"""
    hidden_dims: tuple[int, ...] = (256, 256)
    """units of the hidden layers"""
    activation: Literal["relu", "tanh", "silu", "gelu"] = "relu"
    """activation of the hidden layers"""
    layer_norm: bool = True
    """LayerNorm before each activation"""
    dropout: float = 0.0
    """dropout probability in the critics (DroQ: 0.01)"""
    normalize_observations: bool = True
    """scale observations by their running mean and standard deviation"""
    num_qs: int = 2
    """critics"""
    num_min_qs: int = 2
    """critics in a random subset whose minimum is the target (REDQ)"""
    actor_q: Literal["mean", "min"] = "mean"
    """what the actor maximises: mean (SERL, REDQ) or minimum (SAC) over all critics"""
    backup_entropy: bool = False
    """add the policy's entropy to the target (SAC: yes, SERL: no)"""
    std_parameterization: Literal["exp", "softplus", "uniform", "fixed"] = "exp"
    """the policy's standard deviation: of the network by exp or softplus, one learned vector, or a constant"""
    fixed_std: float = 0.1
    """standard deviation before tanh for std_parameterization fixed"""
    std_min: float = 1e-5
    """smallest standard deviation"""
    std_max: float = 5.0
    """largest standard deviation"""
    explore_prob: float = 0.0
    """probability per step, for each dimension of the action, to hold a random value for explore_steps steps"""
    explore_steps: int = 20
    """how long it is held"""
    actor_ema: float = 0.9995
    """the actor that is evaluated averages the learned one, with this decay per actor update (0: no averaging)"""
    autotune: bool = True
    """adjust the temperature so that the entropy stays at its target"""
    alpha_init: float = 0.01
    """temperature at the start, or always with --no-autotune"""
    target_entropy_per_dim: float = -0.5
    """target entropy divided by the number of action dimensions (SERL, RLPD: -0.5; SAC: -1)"""
    bc_weight: float = 50.0
    """weight of the squared distance between policy and demonstrations in the actor's loss (SERL, RLPD: 0)"""
    reward_scale: float = 1.0
    """factor on the reward that the critics learn"""
    actor_lr: float = 3e-4
    """learning rate of the actor"""
    critic_lr: float = 3e-4
    """learning rate of the critics"""
    alpha_lr: float = 3e-4
    """learning rate of the temperature"""
    lr_warmup: int = 0
    """updates over which actor's and critics' learning rates rise from 0 (SERL: 2,000)"""
    lr_decay: int = 0
    """updates after which these learning rates reach 0 along a cosine (0: constant)"""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay of actor and critics (0: Adam)"""
    # actor and learner
    role: Literal["both", "learner", "actor"] = "both"
    """one process, or one of SERL's two"""
    learner: str = "127.0.0.1"
    """actor: host of the learner"""
    port: int = 5588
    """port for transitions; weights are published on the next one"""
    bind: str = "127.0.0.1"
    """learner: address to listen on; other than loop-back needs curve_keys or insecure_lan"""
    curve_keys: str | None = None
    """directory with CURVE keys, the same on all machines; made when the learner finds none there"""
    insecure_lan: bool = False
    """learner: listen on a network without encryption and authentication"""
    paced: bool = True
    """learner: utd_ratio updates per received step; otherwise it updates without a pause"""
    actor_ahead: int = 100
    """actor: steps that it may be ahead of a paced learner before it waits"""
    publish_every: int = 50
    """learner: updates between two publications of the weights"""
    learner_timeout_s: float = 60.0
    """actor: gives up when no learner has answered for this long (s)"""

    MAY_CHANGE = "run_dir resume eval_only record_dataset capture_video track cuda compile threads total_timesteps "
    MAY_CHANGE += "eval_episodes final_eval_episodes learner port bind curve_keys insecure_lan learner_timeout_s"
    SHAPING = "env_id image_size cameras render_obs encoder small_channels pooling latent_dim proprio_dim film "
    SHAPING += "frame_stack action_chunk gripper_penalty hidden_dims activation layer_norm normalize_observations "
    SHAPING += "std_parameterization fixed_std std_min std_max"

    def check(self) -> None:
        """Exits with one line when a value is out of its range or contradicts another."""
        for name, value in vars(self).items():
            least = 0 if name in ("seed", "demos", "lr_warmup", "lr_decay") else 1
            if type(value) is int and value < least:
                fail(f"{flag(name)} {value}: give at least {least}")
            if type(value) is float and name != "target_entropy_per_dim" and not 0 <= value < math.inf:
                fail(f"{flag(name)} {value}: give a number that is not negative")
            if name in ("gamma", "tau") and value > 1 or name in ("demo_ratio", "dropout", "actor_ema") and value >= 1:
                fail(f"{flag(name)} {value}: give a number from 0 to 1")
        if self.num_min_qs > self.num_qs:
            fail(f"--num-min-qs {self.num_min_qs}: there are only --num-qs {self.num_qs} critics to choose from")
        if not self.hidden_dims or min(self.hidden_dims) < 1 or not self.alpha_init or not self.fixed_std:
            fail("--hidden-dims, --alpha-init and --fixed-std must be above 0")
        demos = self.demos or self.demo_dataset
        if self.reward == "vice" and not demos:
            fail("--reward vice: has no goal images, the demonstrations' last; give --demos N or --demo-dataset ID")
        if self.reward == "vice" and self.n_step > 1:
            fail(f"--n-step {self.n_step}: --reward vice knows the rewards of single steps only; leave it at 1")
        if (self.reward == "classifier") != bool(self.classifier):
            fail("--reward classifier and --classifier FILE: give both or neither")
        if self.cache_features and (not (self.pretrained and self.freeze) or self.augment):
            fail("--cache-features: needs --pretrained FILE, not --no-freeze, and --augment without anything behind")
        num_demos = round(self.demo_ratio * self.batch_size) if demos else 0
        ranks = int(os.environ.get("WORLD_SIZE", 1))
        if self.batch_size % (parts := ranks * self.grad_accum_steps) or num_demos % parts:
            what = f"--grad-accum-steps {self.grad_accum_steps}" + f", times {ranks} processes," * (ranks > 1)
            fail(f"{what}: must divide --batch-size and its demonstrations, {num_demos}")
        if self.cache_features and ranks > 1:
            fail("--cache-features: not with several processes")
        if not self.small_channels or min(self.small_channels) < 1:
            fail("--small-channels must be above 0")

    def shared(self) -> dict[str, object]:
        """What shapes task and policy, and so must be the same in actor and learner."""
        return json.loads(json.dumps({name: getattr(self, name) for name in Args.SHAPING.split()}))


def fail(message: str) -> NoReturn:
    """Ends the program with one line on stderr and exit code 1."""
    raise SystemExit(f"{Path(sys.argv[0]).name}: {message}")


def parse_args(argv: list[str] | None = None) -> Args:
    """The command line; with --resume or --eval-only the run's own flags are the defaults.

    Exits with one line when flags contradict each other or the run.
    """
    args = tyro.cli(Args, args=argv, description=__doc__)
    if run_dir := args.resume or args.eval_only:
        try:
            saved = json.loads((Path(run_dir) / "args.json").read_text())
            saved = Args(**{name: tuple(v) if isinstance(v, list) else v for name, v in saved.items()})
            saved.check()
        except (OSError, ValueError, TypeError, AttributeError) as error:
            fail(f"--{'resume' if args.resume else 'eval-only'} {run_dir}: no run of this script there ({error})")
        args = tyro.cli(Args, args=argv, description=__doc__, default=saved)
        for name in vars(saved).keys() - set(Args.MAY_CHANGE.split()):
            if getattr(args, name) != (theirs := getattr(saved, name)):
                fail(f"{flag(name)}: {run_dir} has {theirs}; leave the flag out, or start a new run")
        args.run_dir = run_dir
    args.check()
    if args.record_dataset:
        check_new_dataset(args.record_dataset)
    return args


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def check_new_dataset(dataset_id: str) -> None:
    """Exits with one line when Minari would refuse this name after the training."""
    import minari
    from minari.dataset.minari_dataset import parse_dataset_id

    try:
        parse_dataset_id(dataset_id)
    except ValueError as error:
        fail(f"--record-dataset: {error}")
    if dataset_id in minari.list_local_datasets():
        fail(f"--record-dataset {dataset_id}: exists; `minari delete` it, or give another name or version")


# --- Environment ------------------------------------------------------------------------------------------------------
class GripperPenalty(gym.Wrapper):
    """Subtracts a penalty when the gripper command, the last action, switches between opening and closing."""

    def __init__(self, env: gym.Env, penalty: float):
        super().__init__(env)
        self.penalty, self.command = penalty, 0.0

    def reset(self, **kwargs):
        self.command = 0.0
        return self.env.reset(**kwargs)

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        if abs(action[-1]) > 0.5:
            reward -= self.penalty * (action[-1] * self.command < 0)
            self.command = action[-1]
        return obs, reward, terminated, truncated, info


class ActionChunk(gym.Wrapper):
    """Executes several actions, given as one vector (length * A,), one after the other; rewards are summed."""

    def __init__(self, env: gym.Env, length: int):
        super().__init__(env)
        self.length = length
        low, high = (np.tile(bound, length) for bound in (env.action_space.low, env.action_space.high))
        self.action_space = spaces.Box(low, high, dtype=env.action_space.dtype)

    def step(self, actions):
        rewards = 0.0
        for action in np.split(np.asarray(actions), self.length):
            obs, reward, terminated, truncated, info = self.env.step(action)
            rewards += reward
            if terminated or truncated:
                break
        return obs, rewards, terminated, truncated, info


class Recorder(gym.Wrapper):
    """Keeps every episode: its observations, and its steps (action, reward, terminated, truncated)."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.episodes = []

    def reset(self, **kwargs):
        obs, info = self.env.reset(**kwargs)
        self.episodes.append(([obs], []))
        return obs, info

    def step(self, action):
        obs, *ends, info = self.env.step(action)
        self.episodes[-1][0].append(obs)
        self.episodes[-1][1].append((action, *ends))
        return obs, *ends, info


class Playback(gym.Env):
    """A recorded episode as an environment, so that demonstrations pass through the same wrappers as live steps."""

    def __init__(self, env: gym.Env, observations: list, rewards: np.ndarray, terminations: np.ndarray):
        self.observation_space, self.action_space = env.observation_space, env.action_space
        self.observations, self.rewards, self.terminations = observations, rewards, terminations

    def reset(self, **kwargs):
        self.t = 0
        return self.observations[0], {}

    def step(self, action):
        reward, terminated = float(self.rewards[self.t]), bool(self.terminations[self.t])
        self.t += 1
        return self.observations[self.t], reward, terminated, self.t == len(self.rewards), {}


class Layout(spaces.Box):
    """The space of observations (stack * (S + P),): of each step the states (S,), then the images, packed (P,).

    Packed images are (K, H, W, 4) bytes, red green blue and 0, read as float32: always finite numbers, so that
    observations with images pass through wrappers, rows, files and sockets like any other observation.
    """

    def __init__(self, cameras: tuple[str, ...], size: int, columns: dict[str, tuple[int, int]], stack: int):
        """K cameras, H = W = size, the first and last + 1 column of each state in S, steps."""
        self.cameras, self.size, self.columns, self.stack = cameras, size, columns, stack
        self.frame_shape = (len(cameras), size, size, 3)  # all cameras' images of one step
        self.state_dim = sum(stop - start for start, stop in columns.values())
        self.step_dim = self.state_dim + math.prod(self.frame_shape) // 3  # S + P
        super().__init__(-np.inf, np.inf, (stack * self.step_dim,), np.float32)

    def unpack(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """States (N, stack * S) and frames (N, stack, K, H, W, 3) of observations (N, stack * (S + P))."""
        steps = obs.unflatten(1, (self.stack, self.step_dim))
        states, pixels = steps.split([self.state_dim, self.step_dim - self.state_dim], 2)
        frames = pixels.contiguous().view(torch.uint8).unflatten(2, (*self.frame_shape[:3], 4))
        return states.flatten(1), frames[..., :3]

    def pack(self, states: Tensor, frames: Tensor) -> Tensor:
        """The reverse of `unpack`."""
        pixels = F.pad(frames, (0, 1)).flatten(2).view(torch.float32)  # (N, stack, P)
        return torch.cat([states.unflatten(1, (self.stack, -1)), pixels], 2).flatten(1)


class PackImages(gym.ObservationWrapper):
    """Packs the images (uint8) of a Box or Dict observation, resized, and its states, as `Layout` says."""

    def __init__(self, env: gym.Env, cameras: tuple[str, ...], size: int):
        super().__init__(env)
        space = env.observation_space
        boxes = space.spaces if isinstance(space, spaces.Dict) else {"image": space}
        bytes_of = {k: box.shape for k, box in boxes.items() if isinstance(box, spaces.Box) and box.dtype == np.uint8}
        images = [k for k, shape in bytes_of.items() if len(shape) > 1 and shape[2:] in ((), (1,), (3,))]
        states = {k: box for k, box in boxes.items() if k not in images}
        env_id = env.spec.id if env.spec else env.unwrapped
        if not images:
            fail(f"--env-id {env_id}: observes no images; use sac_state_sim.py, or --render-obs")
        if unknown := set(cameras) - set(images):
            fail(f"--cameras {' '.join(sorted(unknown))}: {env_id} has {' '.join(images)}")
        if not all(box.is_np_flattenable for box in states.values()):
            fail(f"--env-id {env_id}: beside images there must be flattenable states, not {space}")
        columns, start = {}, 0
        for name, box in states.items():
            columns[name] = (start, start := start + spaces.flatdim(box))
        self.states, self.single = states, not isinstance(space, spaces.Dict)
        self.observation_space = self.layout = Layout(tuple(cameras or images), size, columns, 1)

    def observation(self, obs: np.ndarray | dict[str, np.ndarray]) -> np.ndarray:
        obs, size = {"image": obs} if self.single else obs, self.layout.size
        pixels = np.zeros((len(self.layout.cameras), size, size, 4), np.uint8)
        for k, name in enumerate(self.layout.cameras):
            image = obs[name] if obs[name].ndim == 3 else obs[name][..., None]
            if image.shape[:2] != (size, size):  # mean over the area that becomes a pixel
                resized = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float()
                resized = F.interpolate(resized, (size, size), mode="area").round()
                image = resized[0].permute(1, 2, 0).to(torch.uint8).numpy()
            pixels[k, ..., :3] = image
        states = [spaces.flatten(space, obs[name]) for name, space in self.states.items()]
        return np.concatenate([*states, pixels.reshape(-1).view(np.float32)], dtype=np.float32)


def make_env(args: Args, render: bool = False, base: gym.Env | None = None, wrap: bool = True) -> gym.Env:
    """The task, or `base`, with observations (O,) of `Layout` and actions in [-1, 1] (A,), or as it is without `wrap`.

    Exits with one line when this script cannot learn it.
    """
    try:
        options = {"render_mode": "rgb_array"} if render or args.render_obs else {}
        if args.env_id.startswith("Franka") and not args.render_obs:  # TASK: keyword options of your task
            options |= {"image_obs": True, "image_size": args.image_size}
        env = base or gym.make(args.env_id, **options)
        if not base:
            env = gym.wrappers.AddRenderObservation(env) if args.render_obs else env
            env.reset()  # fails without OpenGL
    except (gym.error.Error, ModuleNotFoundError, RuntimeError) as error:
        fail(f"--env-id {args.env_id}: {error}")
    except franka_sim.mujoco.FatalError as error:  # gymnasium's MuJoCo tasks do not choose a way to render themselves
        fail(f"--env-id {args.env_id}: {error}. Set MUJOCO_GL=egl. {franka_sim.OPENGL_HELP}")
    if not isinstance(env.action_space, spaces.Box) or not env.action_space.is_bounded():
        fail(f"--env-id {args.env_id}: actions must be a bounded Box, not {env.action_space}")
    if not wrap:
        return env
    env = gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))
    if args.gripper_penalty:
        env = GripperPenalty(env, args.gripper_penalty)
    env = PackImages(env, args.cameras, args.image_size)  # TASK: wrappers of your own
    layout = Layout(env.layout.cameras, args.image_size, env.layout.columns, args.frame_stack)
    if args.film and args.film not in layout.columns:
        fail(f"--film {args.film}: the observation has no such state, only: {' '.join(layout.columns) or 'images'}")
    if not base:
        map_shape(args, args.image_size, 3)  # exits when the images are too small
    if args.frame_stack > 1:
        env = gym.wrappers.FlattenObservation(gym.wrappers.FrameStackObservation(env, args.frame_stack))
        env.observation_space = layout
    if args.action_chunk > 1:
        env = ActionChunk(env, args.action_chunk)
    return env


def episode_seed(seed: int, stream: int, episode: int) -> int:
    """The seed of an episode's reset; streams keep training (0), evaluation (1), demonstrations (2) apart."""
    return int(np.random.SeedSequence([seed, stream, episode]).generate_state(1)[0])


def expert_episodes(args: Args, env: gym.Env) -> Iterator[tuple]:
    """The task's scripted expert: T+1 observations, actions (T, A), rewards (T,), terminations (T,) of each episode.

    Exits when the task has none, which would be a method `expert_action() -> action` of the unwrapped environment.
    """
    if not hasattr(env.unwrapped, "expert_action"):
        fail(f"--demos {args.demos}: {args.env_id} has no expert_action(); use --demo-dataset ID or --demos 0")
    recorder, rng, space = Recorder(env), np.random.default_rng(args.seed), env.action_space
    for episode in range(args.demos):
        recorder.reset(seed=episode_seed(args.seed, 2, episode))
        done = False
        while not done:
            noise = args.demo_noise * (space.high - space.low) / 2 * rng.standard_normal(space.shape)
            action = np.clip(env.unwrapped.expert_action() + noise, space.low, space.high).astype(space.dtype)
            _, _, terminated, truncated, _ = recorder.step(action)
            done = terminated or truncated
        observations, steps = recorder.episodes[-1]
        actions, rewards, terminations, _ = (np.array(values) for values in zip(*steps, strict=True))
        yield observations, actions, rewards, terminations


def minari_episodes(args: Args, env: gym.Env) -> Iterator[tuple]:
    """The episodes of a local Minari dataset, as `expert_episodes` gives them. Exits when they do not fit the task."""
    import minari

    def layout(space: spaces.Space) -> object:
        return {k: layout(v) for k, v in space.items()} if isinstance(space, spaces.Dict) else space.shape

    try:
        dataset = minari.load_dataset(args.demo_dataset)
    except (FileNotFoundError, ValueError) as error:
        fail(f"--demo-dataset {args.demo_dataset}: {error}; `minari list local` shows what is there")
    ours, theirs = env.action_space, dataset.action_space
    same_actions = ours.shape == theirs.shape and np.allclose([ours.low, ours.high], [theirs.low, theirs.high])
    if not same_actions or layout(env.observation_space) != layout(dataset.observation_space):
        spaces_of = f"{dataset.observation_space}, {theirs}; the task's are {env.observation_space}, {ours}"
        fail(f"--demo-dataset {args.demo_dataset}: does not fit {args.env_id}; its spaces are {spaces_of}")
    for episode in dataset.iterate_episodes():
        observations = episode.observations
        if isinstance(observations, dict):
            observations = [{k: v[t] for k, v in observations.items()} for t in range(len(episode) + 1)]
        yield observations, episode.actions, episode.rewards, episode.terminations


def load_demos(args: Args) -> np.ndarray:
    """Demonstrations as rows (N, W) of the replay buffer, from a Minari dataset or the task's scripted expert."""
    env, rows = make_env(args, wrap=False), []
    low, high, length = env.action_space.low, env.action_space.high, args.action_chunk
    for observations, actions, *ends in (minari_episodes if args.demo_dataset else expert_episodes)(args, env):
        playback = make_env(args, base=Playback(env, observations, *ends))
        actions = np.clip(2 * (actions - low) / (high - low) - 1, -1, 1)  # (T, A) in [-1, 1]
        padding = np.repeat(actions[-1:], -len(actions) % length, 0)  # the last chunk's, not executed
        obs, _ = playback.reset()
        for action in np.concatenate([actions, padding]).reshape(-1, length * actions.shape[1]):
            next_obs, reward, terminated, truncated, _ = playback.step(action)
            rows.append(transition(obs, action, reward, next_obs, terminated))
            obs = next_obs
            if terminated or truncated:
                break
    if not np.isfinite(rows).all():
        fail(f"--demo-dataset {args.demo_dataset}: holds numbers that are not finite")
    return np.stack(rows)


# --- Networks ---------------------------------------------------------------------------------------------------------
class EnsembleLinear(nn.Module):
    """E linear layers in one batched product: (E, B, in) -> (E, B, out); weights as in flax, (E, in, out)."""

    def __init__(self, num: int, in_dim: int, out_dim: int):
        super().__init__()
        bound = math.sqrt(6 / (in_dim + out_dim))  # xavier uniform
        self.weight = nn.Parameter(torch.empty(num, in_dim, out_dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(num, 1, out_dim))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class EnsembleLayerNorm(nn.Module):
    """LayerNorm with scale and offset of its own for each of E networks, (E, B, H)."""

    def __init__(self, num: int, dim: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(num, 1, dim)), nn.Parameter(torch.zeros(num, 1, dim))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias, F.layer_norm(x, x.shape[-1:], eps=1e-6), self.weight)  # flax's eps


class MLP(nn.Module):
    """E trunks [linear, dropout, LayerNorm, activation] * len(hidden_dims): (E, B, in) -> (E, B, H)."""

    def __init__(self, num: int, in_dim: int, hidden_dims: tuple[int, ...], activation: str, norm: bool, dropout=0.0):
        super().__init__()
        dims = (in_dim, *hidden_dims)
        self.linears = nn.ModuleList(EnsembleLinear(num, *pair) for pair in zip(dims[:-1], dims[1:], strict=True))
        self.norms = nn.ModuleList(EnsembleLayerNorm(num, dim) if norm else nn.Identity() for dim in hidden_dims)
        self.activation = getattr(torch, activation) if hasattr(torch, activation) else getattr(F, activation)
        self.dropout = dropout

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        for linear, norm in zip(self.linears, self.norms, strict=True):
            x = linear(x)
            if self.dropout and generator is not None:  # only in the critics' training pass
                x = x * (torch.rand(x.shape, generator=generator, device=x.device) >= self.dropout) / (1 - self.dropout)
            x = self.activation(norm(x))
        return x


class Actor(nn.Module):
    """Gaussian policy squashed by tanh; SERL networks/actor_critic_nets.py:156-272."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.std_parameterization, self.std_min, self.std_max = args.std_parameterization, args.std_min, args.std_max
        self.trunk = MLP(1, obs_dim, args.hidden_dims, args.activation, args.layer_norm)
        self.mean = EnsembleLinear(1, args.hidden_dims[-1], action_dim)
        if args.std_parameterization in ("exp", "softplus"):
            self.log_std = EnsembleLinear(1, args.hidden_dims[-1], action_dim)
        elif args.std_parameterization == "uniform":
            self.log_std = nn.Parameter(torch.zeros(action_dim))
        else:
            self.register_buffer("log_std", torch.full((action_dim,), math.log(args.fixed_std)))

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation before tanh, (B, A) each, of observations (B, O)."""
        features = self.trunk(obs.unsqueeze(0))  # (1, B, H)
        mean = self.mean(features).squeeze(0)
        raw = self.log_std(features).squeeze(0) if isinstance(self.log_std, nn.Module) else self.log_std.expand_as(mean)
        std = F.softplus(raw) if self.std_parameterization == "softplus" else raw.exp()
        return mean, std.clamp(self.std_min, self.std_max)

    def sample(self, obs: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """Actions (B, A) with noise eps (B, A), and their log density (B,)."""
        return squash(*self(obs), eps)


def squash(mean: Tensor, std: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """Actions tanh(mean + std * eps) and their log density, summed over the last dimension."""
    u = mean + std * eps
    log_pi = -0.5 * eps.square() - std.log() - 0.5 * math.log(2 * math.pi)
    log_pi = log_pi - 2 * (math.log(2) - u - F.softplus(-2 * u))  # log |d tanh/du|, stable: arXiv:1812.05905 appendix C
    return u.tanh(), log_pi.sum(-1)


class Critic(nn.Module):
    """E independent Q functions."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.num = args.num_qs
        dims = args.hidden_dims
        self.trunk = MLP(self.num, obs_dim + action_dim, dims, args.activation, args.layer_norm, args.dropout)
        self.q = EnsembleLinear(self.num, dims[-1], 1)

    def forward(self, obs: Tensor, actions: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Values (E, B) of observations (B, O) and actions (B, A)."""
        x = torch.cat([obs, actions], -1).expand(self.num, -1, -1)
        features = self.trunk(x, generator)  # (E, B, H)
        return (features * self.q.weight.mT).sum(-1) + self.q.bias.squeeze(-1)  # a product with one column is slow


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


class Observation(NamedTuple):
    """What the networks see. `images` are in turn uint8 images, a frozen trunk's maps, and features (B, F)."""

    images: Tensor  # (B, T, K, H, W, 3) or (B, T, K, C, h, w) or (B, F)
    states: Tensor  # (B, T * S)


def make_trunk(args: Args, in_channels: int) -> nn.Module:
    """The convolutions of --encoder: images (N, H, W, in_channels) -> maps (N, C, h, w). TASK: add yours here."""
    try:
        load = own_checkpoint(args) is None
        return vision.make_trunk(args.encoder, in_channels, args.pretrained, load, args.small_channels)
    except ValueError as error:
        fail(f"--pretrained {error}" if args.pretrained else f"--encoder {args.encoder}: {error}")


def own_checkpoint(args: Args) -> Path | None:
    """The checkpoint of a run that goes on: what other files gave it at first is in there."""
    paths = [Path(args.run_dir or "", f"checkpoint.{suffix}") for suffix in ("pt", "previous")]
    return next((path for path in paths if path.exists()), None) if args.resume or args.eval_only else None


class Bottleneck(nn.Sequential):
    """Linear layer, LayerNorm, tanh."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__(nn.Linear(in_dim, out_dim), nn.LayerNorm(out_dim, eps=1e-6), nn.Tanh())


class Encoder(nn.Module):
    """Images of all cameras -> features (B, K * latent_dim); SERL common/encoding.py.

    Each camera has a trunk of its own, that sees a stack of frames as channels. Pretrained trunks see one frame at a
    time; a frozen one is the same for all cameras, the agent's, and this encoder begins with its maps.
    """

    def __init__(self, layout: Layout, args: Args):
        super().__init__()
        self.frozen, self.apart = bool(args.pretrained) and args.freeze, bool(args.pretrained)
        self.checkpoint = args.activation_checkpointing
        in_channels = 3 if self.apart else 3 * layout.stack
        self.condition = layout.columns[args.film] if args.film else None
        self.trunks, self.films, self.heads = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        channels, height, width = map_shape(args, layout.size, in_channels)
        channels *= layout.stack if self.apart else 1
        for _ in layout.cameras:
            if not self.frozen:
                self.trunks.append(make_trunk(args, in_channels))
            if args.film:
                self.films.append(vision.FiLM(channels, layout.stack * (self.condition[1] - self.condition[0])))
            pool, pooled = vision.make_pooling(args.pooling, (channels, height, width))
            self.heads.append(nn.Sequential(pool, Bottleneck(pooled, args.latent_dim)))
        self.out_dim = len(layout.cameras) * args.latent_dim

    def maps(self, images: Tensor, k: int) -> Tensor:
        """Images (B, T, H, W, 3), or a frozen trunk's maps (B, T, C, h, w), of camera k -> maps (B, C, h, w)"""
        if self.frozen:
            return images.flatten(1, 2)
        frames = images.flatten(0, 1) if self.apart else images.permute(0, 2, 3, 1, 4).flatten(3)  # (N, H, W, 3 * T)
        if self.checkpoint and torch.is_grad_enabled():
            maps = checkpoint(self.trunks[k], frames, use_reentrant=False)
        else:
            maps = self.trunks[k](frames)
        return maps.unflatten(0, (len(images), -1)).flatten(1, 2)

    def forward(self, obs: Observation) -> Tensor:
        features, stack = [], obs.images.shape[1]
        for k, head in enumerate(self.heads):
            maps = self.maps(obs.images[:, :, k], k)
            if self.condition:
                condition = obs.states.unflatten(1, (stack, -1))[..., slice(*self.condition)].flatten(1)
                maps = self.films[k](maps, condition)
            features.append(head(maps))
        return torch.cat(features, -1)


def map_shape(args: Args, size: int, in_channels: int) -> tuple[int, int, int]:
    """Channels, height and width of the trunk's maps. Exits with one line when the images are too small for it."""
    trunk = make_trunk(dataclasses.replace(args, pretrained=None), in_channels)
    shape = vision.map_shape(trunk, in_channels, size)
    if min(shape[1:]) < (1 if args.pooling == "average" else 2):
        fail(f"--image-size {size}: too small for --encoder {args.encoder} with --pooling {args.pooling}")
    return shape


def proprioception(layout: Layout, args: Args) -> nn.Module:
    """States (B, T * S) -> (B, proprio_dim), or as they are, (B, 0), where there are none."""
    return Bottleneck(layout.stack * layout.state_dim, args.proprio_dim) if layout.state_dim else nn.Identity()


def feature_dim(layout: Layout, args: Args) -> int:
    """What actor and critics see: the features of all cameras, and of the states."""
    return len(layout.cameras) * args.latent_dim + (args.proprio_dim if layout.state_dim else 0)


class PixelActor(Actor):
    """The policy on an encoder's features and the states; its gradients stop at the features."""

    def __init__(self, layout: Layout, action_dim: int, args: Args):
        super().__init__(feature_dim(layout, args), action_dim, args)
        self.proprio = proprioception(layout, args)

    def forward(self, obs: Observation) -> tuple[Tensor, Tensor]:
        return super().forward(torch.cat([obs.images.detach(), self.proprio(obs.states)], -1))


class PixelCritic(Critic):
    """E Q functions on the features of one encoder, which they train together, and the states."""

    def __init__(self, layout: Layout, action_dim: int, args: Args):
        super().__init__(feature_dim(layout, args), action_dim, args)
        self.encoder, self.proprio = Encoder(layout, args), proprioception(layout, args)

    def encode(self, obs: Observation) -> Observation:
        """The observation with features (B, F) in the images' place."""
        return Observation(self.encoder(obs), obs.states)  # torch 2.11 compiles `_replace` to an empty tuple

    def forward(self, obs: Observation, actions: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return super().forward(torch.cat([obs.images, self.proprio(obs.states)], -1), actions, generator)


class Classifier(nn.Module):
    """Probability of success, as a logit, from images alone."""

    def __init__(self, layout: Layout, args: Args):
        super().__init__()
        self.encoder = Encoder(layout, dataclasses.replace(args, film=None))
        self.hidden, self.norm = nn.Linear(self.encoder.out_dim, args.latent_dim), nn.LayerNorm(args.latent_dim)
        self.out = nn.Linear(args.latent_dim, 1)

    def logit(self, features: Tensor) -> Tensor:
        """(B, F) -> (B,)"""
        return self.out(self.norm(self.hidden(features)).relu()).squeeze(-1)

    def forward(self, obs: Observation) -> Tensor:
        return self.logit(self.encoder(obs))


def classifier_flags(layout: Layout, args: Args) -> dict[str, object]:
    """What a classifier's file says about its images and its shape."""
    names = ("encoder", "small_channels", "pooling", "latent_dim")
    flags = {name: getattr(args, name) for name in names} | {"frozen": bool(args.pretrained) and args.freeze}
    return flags | {"cameras": layout.cameras, "image_size": layout.size, "frame_stack": layout.stack}


def load_classifier(layout: Layout, args: Args) -> Classifier:
    """The success classifier of --classifier: a file with `flags` and `classifier`, or the checkpoint of a VICE run.

    Exits with one line when it was trained on other images.
    """
    try:
        saved = torch.load(own_checkpoint(args) or args.classifier, map_location="cpu", weights_only=True)
        saved = saved.get("agent", saved)
        theirs, ours = saved["flags"], classifier_flags(layout, args)
        for name in ("cameras", "image_size", "frame_stack", "frozen"):
            if theirs[name] != ours[name]:
                raise ValueError(f"was trained with {name} {theirs[name]}, the task has {ours[name]}")
        shape = {name: theirs[name] for name in ("encoder", "small_channels", "pooling", "latent_dim")}
        classifier = Classifier(layout, dataclasses.replace(args, **shape))
        classifier.load_state_dict(saved["classifier"])
    except Exception as error:  # noqa: BLE001  a damaged or hostile file raises what it likes
        fail(f"--classifier {args.classifier}: refused: {str(error).splitlines()[0]}")
    return classifier


# --- Replay buffer ----------------------------------------------------------------------------------------------------
class Batch(NamedTuple):
    observations: Tensor  # (B, O)
    actions: Tensor  # (B, A)
    rewards: Tensor  # (B,)
    next_observations: Tensor  # (B, O)
    terminations: Tensor  # (B,) 1 where the episode terminated (not: was truncated); see `ReplayBuffer.follow_up`


def transition(obs: np.ndarray, action: np.ndarray, reward: float, next_obs: np.ndarray, terminated: bool):
    """One transition as a float32 row (O + A + 1 + O + 1,): the unit of the buffer, the journal and the wire."""
    return np.concatenate([obs, action, [reward], next_obs, [terminated]], dtype=np.float32, casting="same_kind")


def split_rows(rows: Tensor, splits: tuple[int, ...]) -> Batch:
    """Rows (B, W) by their meaning."""
    observations, actions, rewards, next_observations, terminations = rows.split(splits, -1)
    return Batch(observations, actions, rewards.squeeze(-1), next_observations, terminations.squeeze(-1))


class ReplayBuffer:
    """Uniform ring buffer of rows; lives on the device, so that sampling is one gather per step."""

    n_step, gamma = 1, 1.0  # of what is sampled

    def __init__(self, capacity: int, splits: tuple[int, ...], device: torch.device):
        self.rows, self.splits = torch.empty(capacity, sum(splits), device=device), splits
        self.total = 0  # rows ever added

    def __len__(self) -> int:
        return min(self.total, len(self.rows))

    def add(self, rows: Tensor) -> None:
        """Appends rows (N, W), oldest first."""
        capacity = len(self.rows)
        self.total += len(rows)
        rows = rows[-capacity:]
        start = (self.total - len(rows)) % capacity
        head = min(len(rows), capacity - start)
        self.rows[start : start + head] = rows[:head]
        self.rows[: len(rows) - head] = rows[head:]

    def sample(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Rows (*shape, W) of n_step steps, uniformly with replacement."""
        return self.follow_up(torch.randint(len(self), shape, generator=generator, device=self.rows.device))[0]

    def follow_up(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Rows in `slots` (...), each n_step steps long (..., W), and the slots (...) of their last steps.

        Rewards are summed with their discounts; `terminated` becomes the part of the next observation's value that the
        target loses. Rows are shorter where the episode or the buffer ends, or another actor's rows come between.
        """
        rows, last, reward = self.rows[slots], slots, sum(self.splits[:2])
        for _ in range(1, self.n_step):
            after, discount = (last + 1) % len(self.rows), self.gamma * (1 - rows[..., -1:])
            goes_on = self.joined(last, after) & (last != (self.total - 1) % len(self.rows))  # (...)
            _, rewards, next_obs, end = self.rows[after].split([reward, 1, self.splits[3], 1], -1)
            sums = rows[..., reward : reward + 1] + discount * rewards
            longer = torch.cat([rows[..., :reward], sums, next_obs, 1 - discount * (1 - end)], -1)
            rows, last = torch.where(goes_on[..., None], longer, rows), torch.where(goes_on, after, last)
        return rows, last

    def joined(self, before: Tensor, after: Tensor) -> Tensor:
        """Whether the rows in slots `after` begin with what those in slots `before` end with (...)."""
        obs_dim = self.splits[0]
        return (self.rows[after][..., :obs_dim] == self.rows[before][..., -obs_dim - 1 : -1]).all(-1)

    def last(self, count: int) -> Tensor:
        """The newest `count` rows, oldest first."""
        return self.rows[torch.arange(self.total - count, self.total, device=self.rows.device) % len(self.rows)]

    def state_dict(self) -> dict:
        return {"rows": self.rows[: len(self)].clone(), "total": self.total}

    def load_state_dict(self, state: dict) -> None:
        self.rows[: len(state["rows"])] = state["rows"]
        self.total = state["total"]


def allocate_frames(count: int, layout: Layout, args: Args, device: torch.device, name: str) -> Tensor:
    """Room for frames (count, K, H, W, 3): on the GPU if they fit, else in memory; with --buffer-dir in a file there.

    Says how much that is before it takes it. Exits with one line when there is not so much.
    """
    shape = (count, *layout.frame_shape)
    size, place, free = math.prod(shape), "memory", available_memory()
    if args.buffer_dir:
        Path(args.buffer_dir).mkdir(parents=True, exist_ok=True)
        place, free = args.buffer_dir, shutil.disk_usage(args.buffer_dir).free
    elif device.type == "cuda" and size < 0.8 * torch.cuda.mem_get_info()[0]:
        place, free = "GPU memory", torch.cuda.mem_get_info()[0]
    pixels = f"{len(layout.cameras)} x {layout.size} x {layout.size}"
    print(
        f"{name}: {count:,} frames of {pixels} pixels, {size / 1e9:.3g} GB, {place}; checkpoints take as much disk",
        flush=True,
    )
    if size > free:
        remedy = "lower --buffer-size or --image-size" + ("" if args.buffer_dir else ", or give --buffer-dir DIR")
        fail(f"--buffer-size {args.buffer_size}: needs {size / 1e9:.3g} GB, {place} has {free / 1e9:.3g}; {remedy}")
    if args.buffer_dir:
        file = Path(args.buffer_dir) / f"{Path(args.run_dir).name}-{name}.frames"
        with file.open("wb") as handle:
            os.posix_fallocate(handle.fileno(), 0, size)  # a full disk is noticed now, not in a page fault
        frames = torch.from_file(str(file), shared=True, size=size, dtype=torch.uint8).view(shape)
        file.unlink()  # it is gone with this process; checkpoints have files of their own
        return frames
    if place == "GPU memory":
        return torch.empty(shape, dtype=torch.uint8, device=device)
    return torch.empty(shape, dtype=torch.uint8, pin_memory=device.type == "cuda")


def available_memory() -> int:
    """Bytes of memory that can be taken without swapping."""
    with contextlib.suppress(OSError):
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return 1024 * int(lines["MemAvailable"].split()[0])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class FrameBuffer(ReplayBuffer):
    """Ring buffer of transitions that holds each frame once, as uint8.

    Rows without their images stand in one ring, frames in another, and with each row the numbers of its frames: `stack`
    of the observation, `stack` of the next one. A row whose observation is the row before's next observation shares its
    frames; any other begins a segment (an episode, a piece of one, another actor's) and brings all its own. Of the next
    observation those frames are new that have not moved up from the observation. Rows of which a frame has been
    overwritten are not sampled.
    """

    def __init__(
        self, capacity: int, frames: Tensor, layout: Layout, action_dim: int, device: torch.device, folder: Path | None
    ):
        self.layout, self.frames, self.folder, self.middle = layout, frames, folder, action_dim + 1
        self.state_dim, self.obs_dim = layout.stack * layout.state_dim, layout.stack * layout.step_dim
        super().__init__(capacity, (self.state_dim, action_dim, 1, self.state_dim, 1), device)
        self.windows = torch.zeros(capacity, 2 * layout.stack, dtype=torch.long, device=device)  # numbers of frames
        self.oldest = np.zeros(capacity, np.int64)  # windows[:, 0], known without asking the GPU
        self.first = self.frame_total = 0  # number of the oldest row that is whole; frames ever added
        self.latest = []  # numbers of the newest next observation's frames
        self.encode, self.features = None, frames  # what is sampled: the frames, or what `cache` makes of them
        self.saved = self.needed = 0  # frames in files, and the oldest that the last checkpoint needs

    def __len__(self) -> int:
        return self.total - self.first

    def add(self, rows: Tensor) -> None:
        """Appends rows (N, O + A + 1 + O + 1), oldest first."""
        obs, middle, next_obs, end = rows.split([self.obs_dim, self.middle, self.obs_dim, 1], 1)
        before = torch.cat([self.last(1)[:, -self.obs_dim - 1 : -1] if len(self) else next_obs[:0], next_obs[:-1]])
        same = (obs[len(obs) - len(before) :].view(torch.int32) == before.view(torch.int32)).all(1).tolist()
        begins = [True] * (len(obs) - len(same)) + [not value for value in same]
        (states, frames), (next_states, next_frames) = self.layout.unpack(obs), self.layout.unpack(next_obs)
        for row in zip(torch.cat([states, middle, next_states, end], 1), frames, next_frames, begins, strict=True):
            self.add_row(*row)

    def add_row(self, row: Tensor, frames: Tensor, next_frames: Tensor, begins: bool) -> None:
        """Appends a row (W,) without images and the frames (stack, K, H, W, 3) of its two observations."""
        stack = len(frames)
        if begins:
            self.latest = [self.add_frame(frames[0])]
            for before, frame in zip(frames[:-1], frames[1:], strict=True):  # a reset repeats the first frame
                self.latest.append(self.latest[-1] if torch.equal(before, frame) else self.add_frame(frame))
        new = next(k for k in range(1, stack + 1) if torch.equal(frames[k:], next_frames[: stack - k]))
        window = self.latest + self.latest[new:] + [self.add_frame(frame) for frame in next_frames[stack - new :]]
        slot, self.latest = self.total % len(self.rows), window[stack:]
        self.rows[slot], self.oldest[slot] = row, window[0]
        self.windows[slot] = torch.tensor(window)
        self.total += 1
        self.first = max(self.first, self.total - len(self.rows))
        while self.oldest[self.first % len(self.rows)] < self.frame_total - len(self.frames):
            self.first += 1

    def add_frame(self, frame: Tensor) -> int:
        """Appends a frame (K, H, W, 3); its number."""
        self.write([self.frame_total % len(self.frames)], frame[None])
        self.frame_total += 1
        return self.frame_total - 1

    def write(self, slots: list[int] | Tensor, frames: Tensor) -> None:
        self.frames[slots] = frames.to(self.frames.device)
        if self.encode:
            self.features[slots] = self.encode(frames[:, None].to(self.rows.device)).squeeze(1)

    def cache(self, encode: Callable[[Tensor], Tensor]) -> None:
        """From now on samples hold what `encode` makes of frames (N, 1, K, H, W, 3), computed once, not the frames."""
        example = encode(torch.zeros(1, 1, *self.layout.frame_shape, device=self.rows.device))
        self.encode, self.features = encode, example.new_empty(len(self.frames), *example.shape[2:])
        print(f"and {self.features.nbytes / 1e9:.3g} GB for what the encoder makes of them")

    def look_up(self, numbers: Tensor, source: Tensor) -> Tensor:
        """Frames of `source` (N, T, K, H, W, 3) by their numbers (N, T)."""
        frames = source.index_select(0, (numbers % len(source)).flatten().to(source.device))
        return frames.to(self.rows.device).unflatten(0, numbers.shape)

    def joined(self, before: Tensor, after: Tensor) -> Tensor:
        """Whether the rows in slots `after` begin with what those in slots `before` end with (...)."""
        stack = self.layout.stack
        return (self.windows[after][..., :stack] == self.windows[before][..., stack:]).all(-1)

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Rows (N, W) of n_step steps without images, and their frames (N, 2 * stack, K, H, W, 3), uniformly."""
        draws = torch.randint(len(self), (count,), generator=generator, device=self.rows.device)
        slots, stack = (self.first + draws) % len(self.rows), self.layout.stack
        rows, last = self.follow_up(slots)
        windows = torch.cat([self.windows[slots, :stack], self.windows[last, stack:]], 1)
        return rows, self.look_up(windows, self.features)

    def last(self, count: int) -> Tensor:
        """The newest `count` rows as they were added (count, O + A + 1 + O + 1), oldest first."""
        slots = torch.arange(self.total - count, self.total, device=self.rows.device) % len(self.rows)
        states, middle, next_states, end = self.rows[slots].split([self.state_dim, self.middle, self.state_dim, 1], 1)
        frames = self.look_up(self.windows[slots], self.frames)
        obs, next_obs = map(self.layout.pack, (states, next_states), frames.chunk(2, 1))
        return torch.cat([obs, middle, next_obs, end], 1)

    def segment_ends(self) -> Tensor:
        """Frames (G, stack, K, H, W, 3) of the last next observation of each segment."""
        slots = torch.arange(self.first, self.total, device=self.rows.device) % len(self.rows)
        inside = self.joined(slots[:-1], slots[1:])
        ends = slots[torch.cat([~inside, inside.new_ones(1)])]
        return self.look_up(self.windows[ends, self.layout.stack :], self.features)

    def files(self) -> list[tuple[int, int, Path]]:
        """The files of frames, as (first number, last number + 1, path), in order."""
        return sorted((*map(int, path.stem.split("-")), path) for path in self.folder.glob("*-*.u8"))

    def state_dict(self) -> dict:
        """Everything but the frames; those that are new go to a file of their own, which never changes again.

        So a checkpoint costs what is new since the last one, which can be read until this one is complete. Files go
        when neither needs them.
        """
        oldest = max(self.frame_total - len(self.frames), 0)
        self.folder.mkdir(parents=True, exist_ok=True)
        for _, stop, path in self.files():
            if stop > self.saved or stop <= self.needed:  # of a crash between file and checkpoint, or too old
                path.unlink()
        if self.frame_total > self.saved:
            numbers = torch.arange(max(self.saved, oldest), self.frame_total, device=self.frames.device)
            new = self.frames[numbers % len(self.frames)].cpu().numpy()
            write_atomically(self.folder / f"{numbers[0]}-{self.frame_total}.u8", new.data)
        self.saved, self.needed = self.frame_total, oldest
        filled = min(self.total, len(self.rows))
        state = {"rows": self.rows[:filled].clone(), "windows": self.windows[:filled].clone()}
        return state | {"first": self.first, "total": self.total, "frame_total": self.frame_total}

    def load_state_dict(self, state: dict) -> None:
        """Exits with one line when a file of frames is missing or has another size. Without a folder nothing is loaded:
        evaluation needs none."""
        if not self.folder:
            return
        filled = len(state["rows"])
        self.rows[:filled], self.windows[:filled] = state["rows"], state["windows"]
        self.oldest[:filled] = state["windows"][:, 0].cpu().numpy()
        self.first, self.total, self.frame_total = state["first"], state["total"], state["frame_total"]
        self.latest = self.windows[(self.total - 1) % len(self.rows), self.layout.stack :].tolist()
        self.saved, frame_bytes = self.frame_total, math.prod(self.layout.frame_shape)
        wanted = self.needed = max(self.frame_total - len(self.frames), 0)  # the next frame to be read
        for start, stop, path in self.files():
            if stop <= wanted or start > wanted or stop > self.frame_total:
                continue
            data = np.fromfile(path, np.uint8)
            if len(data) != (stop - start) * frame_bytes:
                fail(f"{path}: has {len(data)} bytes, not {(stop - start) * frame_bytes}; start a new run")
            numbers = torch.arange(wanted, stop, device=self.frames.device)
            new = torch.from_numpy(data).view(stop - start, *self.layout.frame_shape)[wanted - start :]
            for some, part in zip(numbers.split(256), new.split(256), strict=True):
                self.write(some % len(self.frames), part)
            wanted = stop
        if wanted != self.frame_total:
            fail(f"{self.folder}: frames {wanted} to {self.frame_total} are missing; start a new run")


# --- Agent ------------------------------------------------------------------------------------------------------------
class Agent:
    """SAC from images with the options of DrQ, RLPD, VICE and SERL."""

    PARTS = ("normalizer", "actor", "mean_actor", "mean_encoder", "critic", "target_critic", "trunk", "classifier")
    PARTS += ("actor_optimizer", "critic_optimizer", "alpha_optimizer", "classifier_optimizer")
    LOSSES = ("critic_loss", "q_values", "actor_loss", "entropy", "alpha", "vice_loss", "vice_reward")  # of train.csv

    def __init__(self, observation_space: Layout, action_space: spaces.Box, args: Args, device: torch.device):
        layout, action_dim = observation_space, action_space.shape[0]
        self.args, self.device, self.layout, self.action_dim = args, device, layout, action_dim
        self.generator = torch.Generator(device).manual_seed(args.seed)
        torch.manual_seed(args.seed)  # the networks' initialisation
        state_dim, obs_dim = layout.stack * layout.state_dim, layout.stack * layout.step_dim
        self.normalizer = (Normalizer(state_dim) if args.normalize_observations else nn.Identity()).to(device)
        self.actor = PixelActor(layout, action_dim, args).to(device)
        self.mean_actor = copy.deepcopy(self.actor).requires_grad_(False)
        self.critic = PixelCritic(layout, action_dim, args).to(device)
        self.mean_encoder = copy.deepcopy(self.critic.encoder).requires_grad_(False)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        frozen = args.pretrained and args.freeze
        self.trunk = make_trunk(args, 3).to(device).requires_grad_(False) if frozen else None  # for all cameras
        # The temperature is softplus(raw_alpha), SERL networks/lagrange.py:77.
        self.raw_alpha = nn.Parameter(torch.tensor(math.log(math.expm1(args.alpha_init)), device=device))
        self.target_entropy = args.target_entropy_per_dim * action_dim
        self.actor_optimizer = self.make_optimizer(self.actor.parameters(), args.actor_lr, args.weight_decay)
        self.critic_optimizer = self.make_optimizer(self.critic.parameters(), args.critic_lr, args.weight_decay)
        self.alpha_optimizer = self.make_optimizer([self.raw_alpha], args.alpha_lr, 0.0)
        self.actor_parameters, self.critic_parameters = list(self.actor.parameters()), list(self.critic.parameters())
        self.target_parameters = list(self.target_critic.parameters())
        self.mean_parameters = [*self.mean_actor.parameters(), *self.mean_encoder.parameters()]
        self.meant_parameters = [*self.actor_parameters, *self.critic.encoder.parameters()]
        self.classifier = self.classifier_optimizer = self.goals = None
        if args.reward == "classifier":
            self.classifier = load_classifier(layout, args).to(device).requires_grad_(False)
        elif args.reward == "vice":
            self.classifier = Classifier(layout, args).to(device)
            self.classifier_optimizer = self.make_optimizer(self.classifier.parameters(), args.vice_lr, 0.0)
        self.splits = (obs_dim, action_dim, 1, obs_dim, 1)
        self.row_splits = (state_dim, action_dim, 1, state_dim, 1)  # without images
        self.num_demos = round(args.demo_ratio * args.batch_size) if args.demos or args.demo_dataset else 0  # per batch
        self.mean_weight = torch.tensor(1 - args.actor_ema, device=device)
        # Of `explore`: steps to go and value of each dimension.
        self.held_steps, self.held = np.zeros((2, action_dim // args.action_chunk), np.float32)
        self.critic_updates, self.eager_updates, self.graphs, self.pool = 0, 0, {}, None
        self.ranks = distributed.get_world_size() if distributed.is_initialized() else 1  # processes of torchrun
        self.shared = False  # whether they have the first one's state
        if self.ranks > 1:
            self.generator.manual_seed(args.seed + 1000 * distributed.get_rank())
        if args.threads > 1 and device.type == "cpu" and not args.dropout:  # whose random numbers have one order
            self.pool = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(args.threads // 2,))
        if args.compile and device.type == "cuda":
            self.target_q, self.critic.encode = torch.compile(self.target_q), torch.compile(self.critic.encode)
            self.critic_loss, self.actor_loss = torch.compile(self.critic_loss), torch.compile(self.actor_loss)

    def make_buffer(self, capacity: int, folder: Path) -> FrameBuffer:
        """A buffer for this agent's rows, whose checkpoints keep their frames in `folder`.

        Beside one frame per transition there is room for the first frames of episodes of 64 transitions on average, in
        demonstrations of 1; shorter ones leave room for fewer transitions.
        """
        idle = bool(self.args.eval_only) or self.args.role == "actor"
        capacity = 1 if idle else capacity
        count = capacity + (capacity if folder.name == "demos" else capacity // 64) + self.layout.stack
        frames = allocate_frames(count, self.layout, self.args, self.device, folder.name)
        buffer = FrameBuffer(capacity, frames, self.layout, self.action_dim, self.device, None if idle else folder)
        buffer.n_step, buffer.gamma = self.args.n_step, self.args.gamma
        if self.args.cache_features:
            buffer.cache(self.trunk_maps)
        return buffer

    def make_optimizer(self, parameters, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        lr_tensor = torch.tensor(lr, device=self.device)  # a tensor, so that a CUDA graph follows the schedule
        capturable = self.device.type == "cuda"
        return torch.optim.AdamW(parameters, lr_tensor, weight_decay=weight_decay, fused=True, capturable=capturable)

    @torch.inference_mode()
    def act(self, obs: np.ndarray, deterministic: bool) -> np.ndarray:
        """Action (A,) in [-1, 1] for one observation (O,)."""
        states, frames = self.layout.unpack(torch.as_tensor(obs, dtype=torch.float32, device=self.device)[None])
        actor, encoder = (self.mean_actor, self.mean_encoder) if deterministic else (self.actor, self.critic.encoder)
        seen = Observation(self.trunk_maps(frames), self.normalizer(states))
        mean, std = actor(seen._replace(images=encoder(seen)))
        if not deterministic:
            mean = mean + std * torch.randn(mean.shape, generator=self.generator, device=self.device)
        action = mean.tanh()[0].cpu().numpy()
        return action if deterministic or not self.args.explore_prob else self.explore(action)

    def explore(self, action: np.ndarray) -> np.ndarray:
        """Now and then a dimension is held at a random value for a while, each on its own; after arXiv:2006.01782."""
        start, value = torch.rand(2, len(self.held), generator=self.generator, device=self.device).cpu().numpy()
        starts = (self.held_steps == 0) & (start < self.args.explore_prob)
        self.held_steps[starts], self.held[starts] = self.args.explore_steps, 2 * value[starts] - 1
        holds = self.held_steps > 0
        self.held_steps[holds] -= 1
        action.reshape(self.args.action_chunk, -1)[:, holds] = self.held[holds]
        return action

    @torch.no_grad()
    def trunk_maps(self, frames: Tensor) -> Tensor:
        """Maps (B, T, K, C, h, w) that a frozen trunk makes of frames (B, T, K, H, W, 3); without one, the frames."""
        if self.trunk is None:
            return frames
        with self.autocast():
            return self.trunk(frames.flatten(0, 2)).unflatten(0, frames.shape[:3])

    @torch.no_grad()
    def observe(self, rows: Tensor) -> None:
        """Takes the states of rows (N, W) into the running statistics; a classifier's reward replaces theirs."""
        if self.args.normalize_observations:
            self.normalizer.update(self.layout.unpack(rows[:, : self.splits[0]])[0])
        if self.args.reward == "classifier":
            for part in rows.split(256):
                states, frames = self.layout.unpack(part[:, -self.splits[0] - 1 : -1])
                success = self.classifier(Observation(self.trunk_maps(frames), states)) > 0
                part[:, -self.splits[0] - 2] = success.float()

    def random_action(self) -> np.ndarray:
        """Action (A,) uniform in [-1, 1]."""
        return (torch.rand(self.action_dim, generator=self.generator, device=self.device) * 2 - 1).cpu().numpy()

    @property
    def alpha(self) -> Tensor:
        return F.softplus(self.raw_alpha)

    def submit(self, function: Callable, *inputs) -> Callable:
        """Runs a function in the other thread, or now if there is none; what is returned waits for its result."""
        if self.pool:
            return self.pool.submit(function, *inputs).result
        result = function(*inputs)
        return lambda: result

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.amp)

    @torch.no_grad()
    def target_q(self, batch: Batch, eps: Tensor, subset: Tensor) -> Tensor:
        """Soft Bellman target (B,) with noise eps (B, A) and target critics `subset` (M,)."""
        generator = self.generator if self.args.dropout else None
        with self.autocast():  # arXiv:1812.05905 eq. 3; subsets: arXiv:2101.05982 alg. 1
            next_actions, next_log_pi = self.actor.sample(self.critic.encode(batch.next_observations), eps)
            next_features = self.target_critic.encode(batch.next_observations)
            next_q = self.target_critic(next_features, next_actions, generator)[subset].amin(0)  # (E, B), (B,)
            if self.args.backup_entropy:
                next_q = next_q - self.alpha * next_log_pi
            rewards = self.args.reward_scale * batch.rewards
            return rewards + self.args.gamma * (1 - batch.terminations) * next_q

    def critic_loss(self, batch: Batch, target_q: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared soft Bellman error; the batch's observations are encoded."""
        generator = self.generator if self.args.dropout else None
        q_values = self.critic(batch.observations, batch.actions, generator)  # (E, B)
        loss = (q_values - target_q).square().mean()  # mean over E and B, SERL agents/continuous/sac.py:183
        return loss, {"losses/critic_loss": loss.detach(), "losses/q_values": q_values.detach().mean()}

    def actor_loss(self, batch: Batch, eps: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Soft policy improvement, and imitation of the demonstrations, which are the batch's last rows."""
        mean, std = self.actor(batch.observations)  # (B, A)
        actions, log_pi = squash(mean, std, eps)  # (B, A), (B,)
        q_values = self.critic(batch.observations, actions)  # (E, B)
        q = q_values.mean(0) if self.args.actor_q == "mean" else q_values.amin(0)
        loss = (self.alpha.detach() * log_pi - q).mean()
        if self.num_demos and self.args.bc_weight:  # arXiv:1709.10089 eq. 2, arXiv:2106.06860 eq. 3
            num_demos = self.num_demos // (self.args.grad_accum_steps * self.ranks)
            error = mean[-num_demos:].tanh() - batch.actions[-num_demos:]  # (D, A)
            loss = loss + self.args.bc_weight * error.square().sum(-1).mean()
        return loss, {"losses/actor_loss": loss.detach(), "losses/entropy": -log_pi.detach().mean()}

    def step_critic(self) -> None:
        self.critic_optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.target_parameters, self.critic_parameters, self.args.tau)

    def actor_gradient(self, batch: Batch, eps: Tensor) -> dict[str, Tensor]:
        with self.autocast():
            loss, metrics = self.actor_loss(batch, eps)
        (loss / self.args.grad_accum_steps).backward(inputs=self.actor_parameters)  # spares the critics' gradients
        if self.args.autotune:
            alpha_loss = self.alpha * (metrics["losses/entropy"] - self.target_entropy)
            (alpha_loss / self.args.grad_accum_steps).backward()
        return metrics | {"losses/alpha": self.alpha.detach()}

    def step_actor(self) -> None:
        self.actor_optimizer.step()
        if self.args.autotune:
            self.alpha_optimizer.step()
        with torch.no_grad():
            for mean, parameter in zip(self.mean_parameters, self.meant_parameters, strict=True):
                mean.lerp_(parameter, self.mean_weight)

    def classifier_gradient(self, replay: Tensor) -> dict[str, Tensor]:
        """VICE, arXiv:1904.07854: tells goal images from images (B, T, K, ...) of the replay buffer.

        With label smoothing, mixup and a gradient penalty, as SERL agents/continuous/vice.py:347.
        """
        args, count, draw = self.args, len(replay), partial(torch.rand, generator=self.generator, device=self.device)
        picks = torch.randint(len(self.goals), (count,), generator=self.generator, device=self.device)
        goals = self.see(self.goals[picks])
        labels = torch.cat([torch.ones(count, device=self.device), torch.zeros(count, device=self.device)])
        labels = labels * (1 - args.label_smoothing) + 0.5 * args.label_smoothing
        with self.autocast():
            features = self.classifier.encoder(Observation(torch.cat([goals, replay]), None))  # (2 * B, F)
        features, pairs = features.float(), draw(2 * count).argsort()
        if args.mixup:  # SERL's beta(1, 1) distribution is uniform
            weight = draw(1)
            features = weight * features + (1 - weight) * features[pairs]
            labels = weight * labels + (1 - weight) * labels[pairs]  # the same as mixing the losses
        loss = F.binary_cross_entropy_with_logits(self.classifier.logit(features), labels)
        weight = draw(count, 1)
        between = (weight * features[:count] + (1 - weight) * features[count:]).detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.classifier.logit(between).sum(), between, create_graph=True)
        penalty = (slope.square().sum(1) + 1e-6).sqrt().sub(1).square().mean()
        ((loss + args.gradient_penalty * penalty) / args.grad_accum_steps).backward()
        return {"losses/vice_loss": loss.detach()}

    def see(self, frames: Tensor) -> Tensor:
        """Frames (B, N, K, H, W, 3), augmented, and their maps if the trunk is frozen; cached maps as they are."""
        if self.args.cache_features:
            return frames
        frames_in, kinds = frames.flatten(1, 2), self.args.augment
        images = vision.augment(frames_in, kinds, self.args.crop_padding, self.generator)
        return self.trunk_maps(images.unflatten(1, frames.shape[1:3]))

    def prepare(self, rows: Tensor, frames: Tensor) -> Batch:
        """The batch that rows (B, W) and frames (B, 2 * T, K, H, W, 3) of the buffer make: augmented, normalised."""
        batch = split_rows(rows, self.row_splits)
        images = self.see(frames).chunk(2, 1)  # two of (B, T, K, H, W, 3)
        states = map(self.normalizer, (batch.observations, batch.next_observations))
        observations, next_observations = map(Observation, images, states)
        return batch._replace(observations=observations, next_observations=next_observations)

    def update_once(self, rows: Tensor, frames: Tensor, eps: Tensor, subset: Tensor, with_actor: bool):
        """One critic step on rows (B, W) and frames of the buffer and, `with_actor`, one step of actor and temperature.

        `eps` (2, B, A) is noise for the two steps, `subset` (M,) chooses critics for the target. Both gradients are of
        the same parameters, as SERL takes them (agents/continuous/sac.py:276): the actor's needs no encoder, and two
        threads share the work.
        """
        metrics, parts = {}, self.args.grad_accum_steps
        vice = self.args.reward == "vice"
        for optimizer in (self.critic_optimizer, self.actor_optimizer, self.alpha_optimizer, self.classifier_optimizer):
            if optimizer:
                optimizer.zero_grad()
        for i in range(parts):  # each has its share of demonstrations at its end
            batch = self.prepare(rows[i::parts], frames[i::parts])
            if vice:
                with torch.no_grad():
                    batch = batch._replace(rewards=self.classifier(batch.next_observations).float().sigmoid())
                metrics["losses/vice_reward"] = batch.rewards.mean()
            target_q = self.submit(self.target_q, batch, eps[0, i::parts], subset)
            with self.autocast():
                batch = batch._replace(observations=self.critic.encode(batch.observations))
                loss, new = self.critic_loss(batch, target_q())
            seen = batch.observations._replace(images=batch.observations.images.detach())
            actor_batch = batch._replace(observations=seen)
            actor = self.submit(self.actor_gradient, actor_batch, eps[1, i::parts]) if with_actor else dict
            (loss / parts).backward()
            metrics |= new | actor()
            if with_actor and vice:
                online = len(batch.rewards) - self.num_demos // (parts * self.ranks)
                metrics |= self.classifier_gradient(batch.next_observations.images[:online])
        self.average_gradients()
        if with_actor:
            self.step_actor()
            if vice:
                self.classifier_optimizer.step()
        self.step_critic()
        return metrics

    def average_gradients(self) -> None:
        """Over the processes of torchrun, each of which has computed those of its share of the batch."""
        if self.ranks > 1:
            parameters = [*self.actor_parameters, *self.critic_parameters, self.raw_alpha]
            parameters += self.classifier.parameters() if self.classifier_optimizer else []
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            flat = torch.cat([gradient.flatten() for gradient in gradients]) / self.ranks
            distributed.all_reduce(flat)
            for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(mean.view_as(gradient))

    def share(self, batch: list[Tensor] | None = None) -> list[Tensor]:
        """This process's share of a batch (rows, frames, eps, subset), which the first process gives to all."""
        size, layout = self.args.batch_size // self.ranks, self.layout
        subset = batch[3] if batch else torch.empty(self.args.num_min_qs, dtype=torch.long, device=self.device)
        for tensor in (subset, *self.normalizer.state_dict().values()):
            distributed.broadcast(tensor, 0)
        rows = torch.empty(size, sum(self.row_splits), device=self.device)
        shape = (size, 2 * layout.stack, *layout.frame_shape)
        frames = torch.empty(shape, dtype=torch.uint8, device=self.device)
        eps = torch.empty(size, 2, self.action_dim, device=self.device)
        wholes = [batch[0], batch[1], batch[2].transpose(0, 1)] if batch else [None] * 3
        for mine, whole in zip((rows, frames, eps), wholes, strict=True):  # each has its demonstrations at its end
            parts = [whole[rank :: self.ranks].contiguous() for rank in range(self.ranks)] if batch else None
            distributed.scatter(mine, parts, 0)
        return [rows, frames, eps.transpose(0, 1), subset]

    def share_state(self) -> None:
        """All processes take over the first one's networks and optimizers, as a checkpoint has them, and its goals."""
        data = io.BytesIO()
        torch.save(self.state_dict() | {"goals": self.goals}, data)
        size = torch.tensor(data.tell(), device=self.device)
        distributed.broadcast(size, 0)
        content = torch.frombuffer(bytearray(data.getvalue()), dtype=torch.uint8).to(self.device)
        content = content if distributed.get_rank() == 0 else content.new_empty(int(size))
        distributed.broadcast(content, 0)
        if distributed.get_rank():
            generator = self.generator.get_state()
            state = torch.load(io.BytesIO(content.cpu().numpy().tobytes()), self.device, weights_only=True)
            self.load_state_dict(state)
            self.generator.set_state(generator)
            self.goals = state["goals"]

    def assist(self) -> None:
        """The loop of torchrun's other processes: a share of every update, until the first process has ended."""
        while True:
            what, with_actor, self.critic_updates = announce(self.device)
            if what == "end":
                return
            if what == "state":
                self.share_state()
            else:
                self.begin_update()
                self.update_once(*self.share(), with_actor=bool(with_actor))

    def begin_update(self) -> None:
        self.schedule_lr()
        # A plain mean of all actors at first, so that the random one it began with does not stay in it.
        self.mean_weight.fill_(max(1 - self.args.actor_ema, self.args.policy_delay / self.critic_updates))

    def update(self, buffer: FrameBuffer, demos: FrameBuffer | None, count: int) -> dict[str, Tensor]:
        """`count` critic updates and the actor updates that fall due; the newest metrics, as detached tensors."""
        metrics = {}
        if self.args.reward == "vice" and self.goals is None:
            self.goals = demos.segment_ends()  # (G, T, K, H, W, 3)
        if self.ranks > 1 and not self.shared:
            announce(self.device, "state")
            self.share_state()
            self.shared = True
        eps = torch.randn(count, 2, self.args.batch_size, self.action_dim, generator=self.generator, device=self.device)
        draws = torch.rand(count, self.args.num_qs, generator=self.generator, device=self.device)
        for inputs in zip(eps, draws.topk(self.args.num_min_qs).indices, strict=True):
            batch = buffer.sample(self.args.batch_size - self.num_demos, self.generator)
            if self.num_demos:
                batch = map(torch.cat, zip(batch, demos.sample(self.num_demos, self.generator), strict=True))
            self.critic_updates += 1
            self.begin_update()
            batch, with_actor = [*batch, *inputs], self.critic_updates % self.args.policy_delay == 0
            if self.ranks > 1:
                announce(self.device, "update", with_actor, self.critic_updates)
                batch = self.share(batch)
            graphs = self.args.compile and self.device.type == "cuda" and self.ranks == 1
            metrics |= (self.replay if graphs else self.update_once)(*batch, with_actor=with_actor)
        return metrics

    def replay(self, *inputs: Tensor, with_actor: bool) -> dict[str, Tensor]:
        """`update_once` as one CUDA graph: losses, gradients, optimizers and targets are launched together.

        The first updates run as usual on a side stream (they compile, and fill the optimizers), then one is captured.
        """
        if self.eager_updates < 3 * self.args.policy_delay:
            self.eager_updates += 1
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                metrics = self.update_once(*inputs, with_actor)
            torch.cuda.current_stream().wait_stream(stream)
            return metrics
        if with_actor not in self.graphs:
            graph, static_inputs = torch.cuda.CUDAGraph(), [tensor.clone() for tensor in inputs]
            graph.register_generator_state(self.generator)  # for augmentation
            with torch.cuda.graph(graph):
                metrics = self.update_once(*static_inputs, with_actor)
            self.graphs[with_actor] = graph, static_inputs, metrics
        graph, static_inputs, metrics = self.graphs[with_actor]
        for static, tensor in zip(static_inputs, inputs, strict=True):
            static.copy_(tensor)
        graph.replay()
        return metrics

    def schedule_lr(self) -> None:
        """Linear warm-up and cosine decay of actor's and critics' learning rates, counted in critic updates."""
        warmup, decay = self.args.lr_warmup, self.args.lr_decay
        if warmup or decay:
            factor = min(1.0, (self.critic_updates - 1) / warmup) if warmup else 1.0
            factor *= 0.5 * (1 + math.cos(math.pi * min(1.0, self.critic_updates / decay))) if decay else 1.0
            self.actor_optimizer.param_groups[0]["lr"].fill_(self.args.actor_lr * factor)
            self.critic_optimizer.param_groups[0]["lr"].fill_(self.args.critic_lr * factor)

    def policy_tensors(self) -> list[Tensor]:
        """What acting needs: the parameters of actor and encoder, and the normalizer's statistics."""
        parameters = [parameter.detach() for parameter in self.meant_parameters]
        return [*parameters, *self.normalizer.state_dict().values()]

    def state_dict(self) -> dict:
        state = {name: getattr(self, name).state_dict() for name in self.PARTS if getattr(self, name) is not None}
        state |= {"raw_alpha": self.raw_alpha.detach(), "critic_updates": self.critic_updates}
        state |= {"flags": classifier_flags(self.layout, self.args)} if self.classifier is not None else {}
        return state | {"generator": self.generator.get_state(), "held": (self.held_steps.tolist(), self.held.tolist())}

    def load_state_dict(self, state: dict) -> None:
        """Raises KeyError, ValueError or RuntimeError when the state is of other networks."""
        for name in self.PARTS:
            if getattr(self, name) is not None:
                getattr(self, name).load_state_dict(state[name])
        with torch.no_grad():
            self.raw_alpha.copy_(state["raw_alpha"])
        self.critic_updates = state["critic_updates"]
        self.held_steps, self.held = np.array(state["held"], np.float32)
        for optimizer in (self.actor_optimizer, self.critic_optimizer, self.alpha_optimizer, self.classifier_optimizer):
            if optimizer:
                optimizer.param_groups[0]["capturable"] = self.device.type == "cuda"
        if state["generator"].shape == self.generator.get_state().shape:
            self.generator.set_state(state["generator"].cpu())
        else:  # written on a GPU and read on a CPU, or the other way: the run goes on, with other random numbers
            self.generator.manual_seed(self.args.seed + self.critic_updates)


# --- Evaluation -------------------------------------------------------------------------------------------------------
def success(info: dict) -> float:
    """Whether the episode whose last info this is was a success, NaN where the task does not say. TASK: yours."""
    return float(info.get("success", info.get("is_success", math.nan)))


def evaluate_agent(agent: Agent, env: gym.Env, episodes: int, seed: int, video=None) -> dict[str, float]:
    """Means over seeded episodes of the deterministic policy; `video` takes the rendered frames."""
    results = []
    for episode in range(episodes):
        obs, _ = env.reset(seed=episode_seed(seed, 1, episode))
        episodic_return, length, done = 0.0, 0, False
        while not done:
            if video is not None:
                video.append_data(env.render())
            obs, reward, terminated, truncated, info = env.step(agent.act(obs, deterministic=True))
            episodic_return, length, done = episodic_return + float(reward), length + 1, terminated or truncated
        results.append((episodic_return, length, success(info), episodes))
    names = ("eval/episodic_return", "eval/episodic_length", "eval/success_rate", "eval/episodes")
    return dict(zip(names, np.mean(results, 0, dtype=float).tolist(), strict=True))


def record_video(agent: Agent, args: Args, path: Path, episodes: int = 4) -> None:
    """Writes the first evaluation episodes as an mp4; without OpenGL it says what is missing."""
    import imageio.v2 as imageio

    try:
        env = make_env(args, render=True)
        with imageio.get_writer(path, fps=env.metadata.get("render_fps", 30), macro_block_size=1) as video:
            evaluate_agent(agent, env, episodes, args.seed, video)
        env.close()
    except Exception as error:  # noqa: BLE001  OpenGL fails in many ways; the policy is trained and saved all the same
        print(f"no video: {error}; afterwards --eval-only {path.parent} writes it", file=sys.stderr)


def record_dataset(agent: Agent, args: Args) -> dict[str, float]:
    """`evaluate_agent`, with the episodes stored as a Minari dataset that knows its task and its reference scores."""
    import minari
    from gymnasium.vector.utils import concatenate, create_empty_array
    from minari.data_collector import EpisodeBuffer

    recorder, random, random_env = Recorder(make_env(args, wrap=False)), copy.copy(agent), make_env(args)
    scalars = evaluate_agent(agent, make_env(args, base=recorder), args.final_eval_episodes, args.seed)
    random_env.action_space.seed(args.seed)
    random.act = lambda obs, deterministic: random_env.action_space.sample()
    space, buffers = recorder.observation_space, []
    for observations, steps in recorder.episodes:
        stacked = concatenate(space, observations, create_empty_array(space, len(observations)))
        steps = [np.array(values) for values in zip(*steps, strict=True)]
        buffers.append(EpisodeBuffer(len(buffers), None, None, stacked, *steps))
    minari.create_dataset_from_buffers(
        args.record_dataset,
        buffers,
        env=recorder.env.spec,
        algorithm_name=args.exp_name,
        ref_min_score=evaluate_agent(random, random_env, 10, args.seed)["eval/episodic_return"],
        ref_max_score=scalars["eval/episodic_return"],
        description="Reference scores: mean return of 10 episodes of random actions, and of this dataset.",
    )
    return scalars


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


class Run:
    """A directory that can be read, resumed and run again: scripts, flags, CSV, TensorBoard, checkpoints, pictures."""

    bar = None  # the progress bar

    def __init__(self, args: Args):
        suffix = f"__{args.role}-{uuid.uuid4().hex[:6]}" if args.role != "both" else ""
        name = f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}{suffix}"
        self.dir = Path(args.run_dir or f"runs/{name.replace('/', '-').replace(':', '-')}")
        if not (args.resume or args.eval_only):
            self.create(args)
        args.run_dir = str(self.dir)
        self.seconds, self.steps, self.csv_files, self.signals = defaultdict(float), 0, {}, 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.stop)

    def create(self, args: Args) -> None:
        """Fills the directory under another name and renames it, so that every run directory can be resumed."""
        if self.dir.exists() and any(self.dir.iterdir()):
            fail(f"--run-dir {self.dir}: is not empty; --resume it, or give another name")
        temporary = self.dir.with_name(self.dir.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for source in (__file__, franka_sim.__file__):
            shutil.copy(source, temporary)
        versions = {m.__name__: m.__version__ for m in (torch, np, gym)} | {"python": sys.version.split()[0]}
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        about = {"command": sys.argv, "git_commit": git_commit(), "versions": versions}
        about |= {"cpus": os.cpu_count(), "gpu": gpu}
        (temporary / "run.json").write_text(json.dumps(about, indent=2))
        (temporary / "args.json").write_text(json.dumps(dataclasses.asdict(args) | {"run_dir": None}, indent=2))
        temporary.replace(self.dir)

    def stop(self, *_) -> None:
        """Ctrl-C and SIGTERM end the loop after the current step; a second one ends the program at once."""
        self.signals += 1
        if self.signals > 1:
            raise KeyboardInterrupt

    def open_logs(self, args: Args, progress: "Progress") -> None:
        """Opens TensorBoard, wandb and the progress bar; CSV rows from after the checkpoint are removed."""
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        if args.track:
            import wandb  # WANDB_MODE=offline keeps the files here, for `wandb sync`

            options = {"project": args.wandb_project_name, "name": self.dir.name, "config": dataclasses.asdict(args)}
            wandb.init(dir=self.dir, sync_tensorboard=True, **options)
        self.writer = SummaryWriter(self.dir, purge_step=progress.global_step + 1)
        last = progress.global_step >= args.total_timesteps  # the last evaluation comes after the checkpoint
        for path in self.dir.glob("*.csv"):
            header, *rows = [*path.read_text().split("\n")[:-1], ""]  # without what follows the last newline: cut off
            newest = progress.global_step - (last and path.stem == "eval")
            rows = [row for row in rows if row and int(row.split(",")[0]) <= newest]
            write_atomically(path, "".join(row + "\n" for row in (header, *rows) if row).encode())
        self.started, self.logged = time.perf_counter() - progress.elapsed, time.perf_counter()
        interval = 0.2 if sys.stderr.isatty() else 30.0
        Run.bar = tqdm(total=args.total_timesteps, initial=progress.global_step, unit="step", mininterval=interval)

    def elapsed(self) -> float:
        """Seconds spent on this run, its resumed parts together."""
        return time.perf_counter() - self.started

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to this phase."""
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start

    def read_timer(self) -> dict[str, float]:
        """Steps per second, and milliseconds per step of each phase, since the last call, apart from evaluating."""
        seconds, steps, now = self.seconds, max(self.steps, 1), time.perf_counter()
        scalars = {"charts/SPS": self.steps / (now - self.logged - seconds["eval"])}
        scalars |= {f"time/{name}_ms": 1e3 * seconds[name] / steps for name in ("act", "env", "update")}
        self.seconds, self.steps, self.logged = defaultdict(float), 0, now
        return scalars

    def due(self, every: int, before: int, progress: "Progress") -> bool:
        """Whether a multiple of `every` lies in (before, global_step]."""
        return progress.global_step // every > before // every

    def log_training(self, progress: "Progress", metrics: dict[str, Tensor]) -> None:
        """A row of train.csv. Exits when the losses are not finite any more."""
        means = np.mean(progress.episodes or [(math.nan,) * 3], 0, dtype=float).tolist()
        names = ("charts/episodic_return", "charts/episodic_length", "charts/success")
        scalars = dict(zip(names, means, strict=True)) | self.read_timer()
        losses = {f"losses/{name}": float(metrics.get(f"losses/{name}", math.nan)) for name in Agent.LOSSES}
        self.log("train", progress.global_step, scalars | losses)
        progress.episodes.clear()
        if metrics and not math.isfinite(losses["losses/critic_loss"]):
            fail(f"the critic's loss is {losses['losses/critic_loss']}; lower --critic-lr or --reward-scale")

    def log_evaluation(self, progress: "Progress", scalars: dict[str, float]) -> None:
        """A row of eval.csv; keeps the best."""
        self.log("eval", progress.global_step, scalars)
        if scalars["eval/episodic_return"] >= progress.best.get("eval/episodic_return", -math.inf):
            progress.best = scalars
        shown = ("eval/episodic_return", "eval/success_rate")
        self.bar.set_postfix({k.split("/")[1]: f"{scalars[k]:.2f}" for k in shown if math.isfinite(scalars[k])})

    def log(self, name: str, step: int, scalars: dict[str, float]) -> None:
        """Writes a row of NAME.csv, and the same numbers to TensorBoard."""
        row = {"global_step": step, "wall_s": self.elapsed()} | scalars
        if name not in self.csv_files:
            self.csv_files[name] = (self.dir / f"{name}.csv").open("a")
            if self.csv_files[name].tell() == 0:
                self.csv_files[name].write(",".join(row) + "\n")
        self.csv_files[name].write(",".join(f"{value:.9g}" for value in row.values()) + "\n")
        self.csv_files[name].flush()
        for key, value in scalars.items():
            self.writer.add_scalar(key, value, step)

    def save(self, state: dict) -> None:
        """Writes checkpoint.pt, and keeps the one before as checkpoint.previous."""
        data, path = io.BytesIO(), self.dir / "checkpoint.pt"
        torch.save(state, data)
        write_atomically(path.with_suffix(".new"), data.getbuffer())
        if path.exists():
            path.replace(path.with_suffix(".previous"))
        path.with_suffix(".new").replace(path)

    def load(self, device: torch.device) -> dict | None:
        """The newest checkpoint, or None when the run has none yet. Exits when it cannot be read."""
        path, previous = self.dir / "checkpoint.pt", self.dir / "checkpoint.previous"
        path = path if path.exists() or not previous.exists() else previous  # killed between `save`'s two renames
        try:
            with warnings.catch_warnings(action="ignore"):  # it advises to load without weights_only
                return torch.load(path, map_location=device, weights_only=True) if path.exists() else None
        except Exception as error:  # noqa: BLE001  a damaged file raises what it likes
            remedy = f"delete it to go on from {previous}" if previous.exists() else "start a new run"
            fail(f"{path}: damaged, cannot be read ({type(error).__name__}); {remedy}")

    def plot(self) -> None:
        """Writes curve.png: return and success rate of the evaluations over environment steps."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        table = np.genfromtxt(self.dir / "eval.csv", delimiter=",", names=True, deletechars="", ndmin=1)
        keys = [k for k in ("eval/episodic_return", "eval/success_rate") if np.isfinite(table[k]).any()]
        figure, axes = plt.subplots(1, len(keys), figsize=(5 * len(keys), 3.5), squeeze=False, layout="constrained")
        for axis, key in zip(axes[0], keys, strict=True):
            axis.plot(table["global_step"], table[key], marker="o", markersize=3)
            axis.set(xlabel="environment steps", ylabel=key.removeprefix("eval/").replace("_", " "))
            axis.grid(alpha=0.3)
            axis.set_ylim(*((-0.03, 1.03) if key == "eval/success_rate" else (None, None)))
        figure.suptitle(f"{self.dir.name}, {table['wall_s'][-1] / 60:.1f} min", fontsize=9)
        figure.savefig(self.dir / "curve.png", dpi=150)
        plt.close(figure)


# --- Actor and learner ------------------------------------------------------------------------------------------------
# A message is a JSON header {protocol, flags, actor, first, count} and `count` rows of float32, the actor's rows from
# number `first` on; the reply is JSON, the number of this actor's rows that the learner holds. An actor keeps its rows
# in a file. A learner that lost some in a crash answers with a smaller number and the actor goes back to there; rows
# that arrive twice are known by their number. So each row is learned from exactly once, whichever side is killed.
def make_socket(kind: int, args: Args):
    """A ZeroMQ socket, encrypted and authenticated with CURVE when there are keys."""
    import zmq.auth

    socket = zmq.Context.instance().socket(kind)
    socket.linger, socket.maxmsgsize, socket.conflate = 1000, 1 << 26, kind == zmq.SUB  # conflate: newest weights only
    if args.curve_keys:
        keys = Path(args.curve_keys)
        try:
            certificate = zmq.auth.load_certificate(keys / f"{args.role}.key_secret")
            socket.curve_publickey, socket.curve_secretkey = certificate
            if args.role == "learner":
                socket.curve_server = True
            else:
                socket.curve_serverkey = zmq.auth.load_certificate(keys / "learner.key")[0]
        except OSError as error:
            fail(f"--curve-keys {keys}: {error}; the learner makes the keys, copy its folder to every actor")
    return socket


class LearnerServer:
    """The learner's end: receives rows, publishes the policy."""

    def __init__(self, args: Args, row_width: int, held: dict[str, int]):
        import zmq.auth
        from zmq.auth.thread import ThreadAuthenticator

        self.row_width, self.held, self.published = row_width, held, 0
        self.no_rows, self.flags = np.empty((0, row_width), np.float32), args.shared()
        if args.bind not in ("127.0.0.1", "localhost") and not args.curve_keys and not args.insecure_lan:
            fail(f"--bind {args.bind}: a network needs --curve-keys DIR (encrypted), or --insecure-lan")
        if args.curve_keys:
            keys = Path(args.curve_keys)
            if not (keys / "learner.key").exists():
                keys.mkdir(parents=True, exist_ok=True, mode=0o700)
                for name in ("learner", "actor"):
                    zmq.auth.create_certificates(keys, name)
                    (keys / f"{name}.key_secret").chmod(0o600)
            self.authenticator = ThreadAuthenticator(zmq.Context.instance())
            self.authenticator.start()
            self.authenticator.configure_curve(domain="*", location=str(keys))
        self.router, self.publisher = make_socket(zmq.ROUTER, args), make_socket(zmq.PUB, args)
        try:
            self.router.bind(f"tcp://{args.bind}:{args.port}")
            self.publisher.bind(f"tcp://{args.bind}:{args.port + 1}")
        except zmq.ZMQError as error:
            fail(f"--bind {args.bind} --port {args.port}: {error}")

    def receive(self, timeout_ms: int) -> np.ndarray:
        """New rows (N, W) of all actors, N may be 0; waits at most `timeout_ms` for the first message."""
        new = [self.no_rows]
        for _ in range(100):  # then learning has its turn
            if not self.router.poll(timeout_ms):
                break
            identity, *frames = self.router.recv_multipart()
            try:
                header = json.loads(frames[0])
                actor, first, count = str(header["actor"]), int(header["first"]), int(header["count"])
                if first < 0 or count < 0:
                    raise ValueError("negative numbers")
                rows = np.frombuffer(frames[1], np.float32).reshape(count, self.row_width)
                if header["protocol"] != PROTOCOL or not np.isfinite(rows).all():
                    raise ValueError(f"protocol is {header['protocol']}, not {PROTOCOL}, or numbers are not finite")
                if differ := [flag(k) for k, v in self.flags.items() if header["flags"].get(k) != v]:
                    raise ValueError(f"{', '.join(differ)} of the learner and of the actor differ")
            except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
                reply = {"error": f"refused: {error}; give actor and learner the same script and flags"}
            else:
                held = self.held.get(actor, 0)
                if first <= held < first + count:
                    new.append(rows[held - first :])
                    self.held[actor] = first + count
                reply = {"held": self.held.get(actor, 0)}
            self.router.send_multipart([identity, json.dumps(reply).encode()])
            timeout_ms = 0
        return np.concatenate(new)

    def publish(self, agent: Agent, done: bool = False) -> None:
        header = {"protocol": PROTOCOL, "version": agent.critic_updates, "done": done}
        vector = torch.cat([tensor.flatten() for tensor in agent.policy_tensors()]).cpu().numpy()
        self.publisher.send(json.dumps(header).encode() + b"\n" + vector.tobytes())
        self.published = agent.critic_updates


class ActorLink:
    """The actor's end: a file with all its rows, sent in order, and the newest policy."""

    def __init__(self, args: Args, run: Run, row_width: int):
        import zmq

        self.args, self.run, self.row_bytes, self.version, self.done = args, run, 4 * row_width, 0, False
        name_file = run.dir / "actor_name"
        if not name_file.exists():
            write_atomically(name_file, uuid.uuid4().hex.encode())
        self.name = name_file.read_text()
        self.number = int(self.name[:8], 16)
        self.file = (run.dir / "transitions.f32").open("a+b")
        self.written = self.file.seek(0, os.SEEK_END) // self.row_bytes
        self.file.truncate(self.written * self.row_bytes)  # a row that a crash cut off
        self.held, self.waiting, self.answered, self.sent, self.zmq = 0, False, time.monotonic(), 0.0, zmq
        self.dealer, self.subscriber = make_socket(zmq.DEALER, args), make_socket(zmq.SUB, args)
        self.dealer.connect(f"tcp://{args.learner}:{args.port}")
        self.subscriber.connect(f"tcp://{args.learner}:{args.port + 1}")
        self.subscriber.subscribe(b"")

    def write(self, rows: np.ndarray) -> None:
        """Appends rows; they survive this process from here on."""
        self.file.write(rows.tobytes())
        self.file.flush()
        self.written += len(rows)

    def exchange(self, agent: Agent) -> None:
        """`exchange_once`, and waits while a paced learner is more than `actor_ahead` steps behind."""
        self.exchange_once(agent, 0)
        ahead = self.args.actor_ahead if self.args.paced else math.inf
        while self.written - self.held > ahead and not (self.done or self.run.signals):
            self.exchange_once(agent, 100)
            if not self.waiting:  # nothing could be sent
                time.sleep(0.1)

    def exchange_once(self, agent: Agent, wait_ms: int) -> None:
        """Takes the learner's answer and policy if they are there, and sends rows. Exits when it is silent too long."""
        if self.waiting and self.dealer.poll(wait_ms):
            reply = json.loads(self.dealer.recv())
            if "error" in reply:
                fail(f"the learner says: {reply['error']}")
            self.held, self.waiting, self.answered = reply["held"], False, time.monotonic()
        if (silence := time.monotonic() - self.answered) > self.args.learner_timeout_s:
            address = f"{self.args.learner}:{self.args.port}"
            fail(f"no learner at {address} for {silence:.0f} s; start one there with --role learner, or give --learner")
        if not self.waiting or time.monotonic() - self.sent > 2:  # a message to a learner that was killed is lost
            count = min(self.written - self.held, 4096, max(1, (1 << 25) // self.row_bytes))  # at most 32 MB
            self.file.seek(self.held * self.row_bytes)
            header = {"protocol": PROTOCOL, "flags": self.args.shared(), "actor": self.name}
            header |= {"first": self.held, "count": count}
            message = [json.dumps(header).encode(), self.file.read(count * self.row_bytes)]
            with contextlib.suppress(self.zmq.Again):  # no learner to queue it for; never wait for one in here
                self.dealer.send_multipart(message, self.zmq.NOBLOCK)
                self.waiting, self.sent = True, time.monotonic()
        if self.subscriber.poll(0):
            header, _, data = self.subscriber.recv().partition(b"\n")
            vector, tensors = torch.frombuffer(bytearray(data), dtype=torch.float32), agent.policy_tensors()
            if len(vector) != sum(tensor.numel() for tensor in tensors):
                fail("the learner's policy has another size; give actor and learner the same flags")
            for tensor, values in zip(tensors, vector.split([t.numel() for t in tensors]), strict=True):
                tensor.copy_(values.reshape(tensor.shape))
            header = json.loads(header)
            self.version, self.done = header["version"], header["done"]


# --- Main -------------------------------------------------------------------------------------------------------------
@dataclass
class Progress:
    """Where a run stands; part of its checkpoint."""

    global_step: int = 0
    episode: int = 0
    episode_length: int = 0  # steps of the unfinished episode
    episodes: list = dataclasses.field(default_factory=list)  # (return, length, success) since the last train.csv row
    best: dict[str, float] = dataclasses.field(default_factory=dict)  # evaluation with the highest return
    held: dict[str, int] = dataclasses.field(default_factory=dict)  # learner: rows of each actor
    elapsed: float = 0.0  # s
    finished: bool = False  # with the last evaluation


def set_up_torch(args: Args) -> torch.device:
    """Precision, threads and memory for speed; the device."""
    torch.set_num_threads(max(1, args.threads // 2))
    torch.set_float32_matmul_precision("medium")  # a GPU's TF32; on a CPU oneDNN, on AMD twice as fast as MKL
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD: keep freed activations, rather than have the
        libc.mallopt(-3, 1 << 25)  # system map them anew in every update
    return torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")


def start(args: Args, env: gym.Env) -> tuple[Run, Progress, Agent, ReplayBuffer, ReplayBuffer | None]:
    """A new run, or one that stands where its newest checkpoint does."""
    device, run, progress = set_up_torch(args), Run(args), Progress()
    agent, demos = Agent(env.observation_space, env.action_space, args, device), None
    buffer = agent.make_buffer(args.buffer_size, run.dir / "replay")
    state = run.load(device) if args.resume or args.eval_only else None
    if state:
        try:
            agent.load_state_dict(state["agent"])
            buffer.load_state_dict(state["buffer"])
            if state["demos"]:
                demos = agent.make_buffer(state["demos"]["total"], run.dir / "demos")
                demos.load_state_dict(state["demos"])
            progress = Progress(**state["progress"])
        except (KeyError, RuntimeError, TypeError) as error:
            fail(f"{run.dir}/checkpoint.pt: is not of this script and flags ({str(error).splitlines()[0]})")
    elif args.eval_only:
        fail(f"--eval-only {run.dir}: stopped before its first checkpoint; --resume it")
    elif (args.demos or args.demo_dataset) and args.role != "actor":
        rows = torch.from_numpy(load_demos(args)).to(device)
        agent.observe(rows)
        demos = agent.make_buffer(len(rows), run.dir / "demos")
        demos.add(rows)
    return run, progress, agent, buffer, demos


def resume_episode(env: gym.Env, progress: Progress, agent: Agent, buffer: ReplayBuffer) -> tuple[np.ndarray, float]:
    """Repeats the unfinished episode's actions, which leads to where it was: its observation (O,) and return so far."""
    obs, _ = env.reset(seed=episode_seed(agent.args.seed, 0, progress.episode))
    episodic_return, batch = 0.0, split_rows(buffer.last(progress.episode_length).cpu(), agent.splits)
    for action, stored_obs in zip(batch.actions.numpy(), batch.next_observations.numpy(), strict=True):
        obs, reward, *_ = env.step(action)
        episodic_return += float(reward)
        if not np.array_equal(np.float32(obs), stored_obs):
            print("this task does not repeat itself: the unfinished episode is given up", file=sys.stderr)
            progress.episode, progress.episode_length = progress.episode + 1, 0
            return env.reset(seed=episode_seed(agent.args.seed, 0, progress.episode))[0], 0.0
    return obs, episodic_return


def final_evaluation(args: Args, agent: Agent, run: Run) -> dict[str, float]:
    """The last evaluation, with its dataset and its video."""
    if args.record_dataset:
        scalars = record_dataset(agent, args)
    else:
        scalars = evaluate_agent(agent, make_env(args), args.final_eval_episodes, args.seed)
    if args.capture_video:
        record_video(agent, args, run.dir / "video.mp4")
    return scalars


def report(name: str, scalars: dict[str, float]) -> None:
    """One line for the terminal about an evaluation."""
    numbers = ", ".join(f"{key} {scalars[key]:.3g}" for key in ("eval/success_rate", "eval/episodic_return"))
    print(f"{name}: {numbers} over {scalars['eval/episodes']:.0f} episodes")


def save(run: Run, progress: Progress, agent: Agent, buffer: ReplayBuffer, demos: ReplayBuffer | None) -> None:
    progress.elapsed = run.elapsed()
    state = {"agent": agent.state_dict(), "buffer": buffer.state_dict(), "progress": dataclasses.asdict(progress)}
    run.save(state | {"demos": demos.state_dict() if demos else None})


def finish(run: Run, progress: Progress, agent: Agent, buffer: ReplayBuffer, demos: ReplayBuffer | None) -> None:
    """A checkpoint; then, unless the run was stopped, the last evaluation, curve, video and checkpoint."""
    args = agent.args
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)  # from here on they end the program at once
    run.writer.flush()
    if args.role != "actor":
        save(run, progress, agent, buffer, demos)
    if run.signals:
        raise KeyboardInterrupt
    if args.role != "actor":
        scalars = final_evaluation(args, agent, run)
        run.log_evaluation(progress, scalars)
        run.plot()
        progress.finished = True
        save(run, progress, agent, buffer, demos)
        report("last", scalars)
        report("best", progress.best)
    run.writer.close()
    print(f"{run.elapsed():.0f} s in all; see {run.dir}")


def train(args: Args) -> None:
    """The loop of all roles: an actor leaves out learning, a learner receives instead of acting."""
    env, eval_env, acts, learns = make_env(args), make_env(args), args.role != "learner", args.role != "actor"
    run, progress, agent, buffer, demos = start(args, env)
    if args.eval_only:
        return report("checkpoint", final_evaluation(args, agent, run))
    if progress.finished and progress.global_step >= args.total_timesteps:
        fail(f"--total-timesteps {args.total_timesteps}: {run.dir} is at {progress.global_step}; give a larger number")
    progress.finished = False
    run.open_logs(args, progress)
    print(f"run directory {run.dir}", flush=True)
    server = None if acts else LearnerServer(args, sum(agent.splits), progress.held)
    link = None if learns else ActorLink(args, run, sum(agent.splits))
    if link:  # what it wrote before gives an actor its seeds, so that no two episodes are the same
        args.seed, progress.global_step, progress.episode = args.seed + link.number, link.written, link.written
        agent.generator.manual_seed(episode_seed(args.seed, 0, link.written))
    if acts:
        obs, episodic_return = resume_episode(env, progress, agent, buffer)

    def owed() -> int:
        """Critic updates that the ratio to the environment's steps still asks for."""
        steps = progress.global_step - args.learning_starts
        return max(args.utd_ratio * steps - agent.critic_updates, 0) if learns and args.paced else 0

    metrics = {}
    while not (run.signals or (link.done if link else progress.global_step >= args.total_timesteps and not owed())):
        before = progress.global_step
        if acts:
            # Act: uniformly at random until something is learned.
            with run.phase("act"):
                learned = link.version if link else before >= args.learning_starts
                action = agent.act(obs, deterministic=False) if learned else agent.random_action()
            # Step the environment.
            with run.phase("env"):
                next_obs, reward, terminated, truncated, info = env.step(action)
            # Store: `terminated` cuts the bootstrap, `truncated` does not.
            rows = transition(obs, action, reward, next_obs, terminated)[None]  # (1, W)
            if not np.isfinite(rows).all():
                save(run, progress, agent, buffer, demos)
                what = "reward" if np.isfinite([obs, next_obs]).all() else "observation"
                fail(f"{args.env_id}: the {what} of step {before} is not finite; saved, --resume {run.dir} goes on")
            obs, episodic_return = next_obs, episodic_return + float(reward)
            progress.episode_length += 1
            # Reset: each episode has a seed of its own, so that a resumed run can repeat the unfinished one.
            if terminated or truncated:
                progress.episodes.append((episodic_return, progress.episode_length, success(info)))
                progress.episode, progress.episode_length, episodic_return = progress.episode + 1, 0, 0.0
                obs, _ = env.reset(seed=episode_seed(args.seed, 0, progress.episode))
        else:
            # Receive: a paced learner first does what the rows that it has ask for; another never waits.
            with run.phase("env"):
                rows = server.no_rows if owed() else server.receive(100 if args.paced else 0)
        progress.global_step += len(rows)
        if link:
            link.write(rows)
            link.exchange(agent)
        elif len(rows):
            rows = torch.from_numpy(rows).to(agent.device)
            agent.observe(rows)
            buffer.add(rows)
        # Learn: several critic updates, and actor updates, per step.
        if learns and progress.global_step > args.learning_starts:
            if not metrics:
                run.read_timer()  # keeps the warm-up out of charts/SPS
            with run.phase("update"):
                count = min(owed(), args.publish_every) if server and args.paced else args.utd_ratio
                metrics |= agent.update(buffer, demos, count)
            if server and agent.critic_updates - server.published >= args.publish_every:
                server.publish(agent)
        # Log.
        run.steps += len(rows)
        run.bar.update(len(rows))
        if run.due(args.log_every, before, progress):
            run.log_training(progress, metrics)
        # Evaluate and save.
        if learns and run.due(args.eval_every, before, progress) and progress.global_step < args.total_timesteps:
            with run.phase("eval"):
                run.log_evaluation(progress, evaluate_agent(agent, eval_env, args.eval_episodes, args.seed))
        if learns and run.due(args.save_every, before, progress):
            with run.phase("eval"):
                save(run, progress, agent, buffer, demos)

    if server:
        server.publish(agent, done=not run.signals)
    finish(run, progress, agent, buffer, demos)


def announce(device: torch.device, what: str = "end", *numbers: int) -> tuple[str, int, int]:
    """What torchrun's processes do next, as the first one says: "state", "update", or "end"; with two numbers."""
    words = ("end", "state", "update")
    message = torch.tensor([words.index(what), *numbers, 0, 0][:3], device=device)
    distributed.broadcast(message, 0)
    word, *numbers = message.tolist()
    return words[word], *numbers


def main(args: Args) -> None:
    ranks = int(os.environ.get("WORLD_SIZE", 1))  # more than 1: started by torchrun
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    if ranks > 1:
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=1))
    try:
        if ranks > 1 and distributed.get_rank():  # takes part in the first one's updates
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            env = make_env(args)
            Agent(env.observation_space, env.action_space, args, set_up_torch(args)).assist()
        else:
            train(args)
    except KeyboardInterrupt:
        raise SystemExit(f"stopped; go on with --resume {args.run_dir}") from None
    except OSError as error:  # a full disk, above all; the newest checkpoint is whole
        fail(f"{error}; make room, then go on with --resume {args.run_dir}")
    finally:
        if Run.bar:
            Run.bar.close()
        if ranks > 1:
            if distributed.get_rank() == 0:
                announce(device)
            distributed.destroy_process_group()


if __name__ == "__main__":
    main(parse_args())
