"""Learning on the robot with a person at hand: SAC from camera images, demonstrations and interventions (HIL-SERL).

    python sac_pixel_real.py --demos hil/demos-v0                   # needs robot_server.py, a terminal, demonstrations
    python sac_pixel_real.py --demos hil/demos-v0 --reward classifier.pt --teleop spacemouse   # needs a robot
    python sac_pixel_real.py --resume RUN_DIR                       # needs robot_server.py; after Ctrl-C or a crash
    python sac_pixel_real.py --eval-only RUN_DIR                    # needs robot_server.py
    python sac_pixel_real.py --role learner --address 0.0.0.0:5588 --curve-keys keys    # needs an actor
    python sac_pixel_real.py --role actor --address HOST:5588 --curve-keys keys         # needs a robot, and a learner

One command starts both processes: this one acts, at the robot's rate, and takes keys; the learner trains beside it at
a lower priority, and is started again when it is killed. record_demos.py records demonstrations, reward_classifier.py
trains a classifier; README's "A day with the robot" has the whole way, which also goes on a simulated robot.

Keys, typed into the terminal; those of --teleop keyboard that move the arm are shown at the start:
    y success   n failure   x discard the episode   p pause   Enter go on   q quit

A person who moves takes over, and what is done then goes to both buffers. A person's verdict ends an episode; where
nobody gives one, classifier or task decides, and for a second a person may overrule them. The learner makes --utd-ratio
updates for each new transition, catches up during resets, and stands still while no actor collects.

Expect: success >= 0.95, intervention_rate <= 0.05 (simulated robot) [benchmarks/results/hil_rehearsal.csv]
Expect: late_p99_ms <= 3 (2 CPU cores) [benchmarks/results/hil_rehearsal.csv]

Sources: everything that sac_pixel_sim.py names; HIL-SERL arXiv:2410.21845 (commit 5d02aed, examples/train_rlpd.py,
serl_launcher/agents/continuous/sac_hybrid_single.py).
Differs from HIL-SERL, beside what sac_pixel_sim.py says: the gripper's critic shares the encoder, and the penalty on
its motions is part of the reward of all critics; demonstrations are never evicted; a person keeps control between two
nudges; a success is worth what it would earn if it lasted (--reward-scale); nothing is saved or sent in a way that an
action waits for; evaluation is deterministic and without help.
New task: copy an entry of TASKS in robot_client.py; `grep -n TASK: sac_pixel_real.py` shows the other places.
"""

import copy
import dataclasses
import io
import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: spinning threads starve others

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from gymnasium import spaces
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import robot_client as rc
from common import envs, link, pixels, recording, setup, tensors, vision
from common.episodes import Recorder, as_live_steps, minari_episodes, summary
from common.pixels import FrameFile, Views, views_of
from common.recording import Recording, Step, fields_of, write_video
from common.run import Run
from common.setup import RunArgs, ends_well, fail, flag, parse, write_atomically
from common.success import SuccessReward, open_detector
from common.tensors import RunningNormalizer, check_steps, pack_step, step_type

TAU = 0.005  # the target critic's step towards the critic after each critic update
STD_MIN, STD_MAX = 1e-5, 5.0  # of the policy, before tanh; SERL
FIXED_STD = 0.1  # of --std-parameterization fixed
UPDATES_AT_ONCE = 50  # learner: then it looks for what has come
PUBLISH_S = 2.0  # learner: between two publications of the policy
ALPHA_INIT = 0.01  # temperature at the start
TARGET_ENTROPY = -0.5  # that the temperature seeks, per dimension of the action; SERL, RLPD
PROPRIO_DIM = 64  # features of the robot's state; SERL
ENCODER_IMITATION = 10.0  # weight of imitation beside the critics' loss in what trains the encoder
CROP = 1 / 32  # of an image's side that it is shifted at most; SERL: 4 pixels of 128
SAVE_EVERY = 1_000  # transitions between two checkpoints of the learner
RECENT = 20  # episodes that the status line's success and interventions are of
LATE_S = 0.003  # a step later than this after its beat counts as late
VERDICT_KEYS = "keys: y success   n failure   x discard   p pause   Enter go on   q quit"
OVERRULE_S = 1.0  # how long a person may overrule classifier or task when they end an episode
REWARDS = ("task", "pose", "person")  # or a classifier's file
VERDICTS = ("success", "failure", "discard")  # of a person
HELP_AFTER = (20, 30)  # steps of an episode after which a scripted person takes over
WRONG_KEY_PROB = 0.0005  # scripted person: of pressing a wrong key at a step
WAITS_S = 5.0  # what is waited for is said after so long


# --- Args -------------------------------------------------------------------------------------------------------------
@dataclass
class Args(RunArgs):
    policy: Literal["newest", "best"] = "newest"
    """eval_only: the policy to evaluate: the learner's newest, or the most successful without help"""
    final_eval_episodes: int = 50
    """eval_only: episodes"""
    threads: int = 1
    """CPU threads for PyTorch; a second one waits for robot and cameras more than it helps"""
    # robot
    task: str = "peg"  # TASK: yours
    """which task: one of TASKS in robot_client.py"""
    server: str = rc.SERVER
    """address of robot_server.py"""
    server_keys: str | None = None
    """directory with the CURVE keys of robot_server.py --keygen"""
    teleop: Literal["keyboard", "spacemouse", "scripted", "none"] = "keyboard"
    """who may intervene; scripted: the simulated task's expert, ever less, for rehearsals"""
    help_until: int = 4_000
    """teleop scripted: steps over which it intervenes in ever fewer episodes, down to none"""
    reward: str = "task"
    """what success is: task: what the simulated robot's task says; pose: the tcp at the configuration's goal_pose;
    person: verdicts only; or the file of a classifier"""
    gripper: Literal["critic", "continuous", "fixed"] = "critic"
    """who decides about the gripper: a critic over open, stay and close (HIL-SERL); the action's last entry; nobody"""
    gripper_penalty: float = 0.02
    """subtracted from the reward when the gripper is told to change (HIL-SERL: 0.02)"""
    # environment
    image_size: int = 64
    """height and width that all images are resized to (pixels)"""
    cameras: tuple[str, ...] = ()
    """names of the images to learn from (default: all)"""
    frame_stack: int = 1
    """observations of this many steps are seen at once"""
    # training
    total_timesteps: int = 30_000
    """transitions to learn from"""
    learning_starts: int = 100
    """transitions before learning starts, collected with random motions"""
    buffer_size: int = 100_000
    """transitions kept; demonstrations and interventions are all kept"""
    frames_dir: str | None = None
    """directory for the frames' files (default: the run's), e.g. on a disk of this machine"""
    batch_size: int = 64
    """transitions per critic update, demonstrations included"""
    utd_ratio: int = 2
    """critic updates per transition"""
    policy_delay: int = 1
    """critic updates per update of actor and temperature"""
    demos: str = "hil/demos-v0"
    """Minari dataset of demonstrations, as record_demos.py writes it; only successes are used"""
    demo_ratio: float = 0.5
    """fraction of each batch that is drawn from demonstrations and interventions (RLPD: 0.5)"""
    # images
    encoder: Literal["small", "resnet10", "mobilenet"] = "small"
    """convolutions: a few (SERL's small encoder), ResNet-10 with GroupNorm, or MobileNetV3-small"""
    small_channels: tuple[int, ...] = (16, 32, 64)
    """encoder small: channels of its convolutions; each halves the image (SERL: 32 64 128 256)"""
    pooling: Literal["embeddings", "softmax", "average"] = "embeddings"
    """spatial learned embeddings, spatial softmax, or the mean over all places"""
    latent_dim: int = 128
    """features per camera (SERL: 256)"""
    film: str | None = None
    """a state of the observation, such as state or task, that scales and shifts image channels"""
    pretrained: str | None = None
    """encoder's parameters: SERL's resnet10_params.pkl, torchvision's mobilenet, any state dict"""
    freeze: bool = True
    """leave pretrained parameters as they are"""
    activation_checkpointing: bool = False
    """compute the encoder's activations again in the backward pass, to save memory"""
    augment: tuple[Literal["crop", "jitter", "blur", "flip"], ...] = ("crop",)
    """what is done to the images of each batch at random; none with --augment and nothing behind"""
    grad_accum_steps: int = 1
    """parts that a batch is computed in, one after the other, to save memory"""
    # algorithm
    gamma: float = 0.97
    """discount factor per environment step"""
    reward_scale: float = 33.0
    """factor on rewards: 1 / (1 - gamma), so that a success is worth what it would earn if it lasted (HIL-SERL: 1)"""
    n_step: int = 3
    """steps whose rewards a critic's target sums before it bootstraps (SAC: 1); success is one reward, at the end"""
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
    """critics; the actor maximises their mean"""
    num_min_qs: int = 2
    """critics in a random subset whose minimum is the target (REDQ)"""
    backup_entropy: bool = False
    """add the policy's entropy to the target (SAC: yes, SERL: no)"""
    std_parameterization: Literal["exp", "softplus", "uniform", "fixed"] = "exp"
    """the policy's standard deviation: a network's by exp or softplus, learned vector, constant"""
    actor_ema: float = 0.9995
    """the average of learned actors is evaluated: its decay per actor update (0: no averaging)"""
    bc_weight: float = 50.0
    """weight of the squared distance to demonstrations in the actor's loss (SERL, RLPD: 0)"""
    lr: float = 3e-4
    """learning rate of actor, critics and temperature"""
    lr_warmup: int = 0
    """updates over which actor's and critics' learning rates rise from 0 (SERL: 2,000)"""
    lr_decay: int = 0
    """updates after which these learning rates reach 0 along a cosine (0: constant)"""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay of actor and critics (0: Adam)"""
    # actor and learner
    role: Literal["both", "learner", "actor"] = "both"
    """both processes on this machine, or one of them"""
    address: str = "127.0.0.1:5588"
    """HOST:PORT of the learner; its policy is published on the next port"""
    curve_keys: str | None = None
    """directory with CURVE keys, the same on all machines, beyond loop-back; a learner can make it"""

    MAY_CHANGE = "run_dir resume eval_only capture_video track compile threads total_timesteps final_eval_episodes "
    MAY_CHANGE += "policy server server_keys teleop help_until reward role address curve_keys frames_dir"
    SHAPING = "task image_size cameras encoder small_channels pooling latent_dim film freeze frame_stack "
    SHAPING += "gripper hidden_dims activation layer_norm normalize_observations std_parameterization"

    def check(self) -> None:
        """Exits with one line when a value is out of its range or contradicts another."""
        may_be_zero = {"seed", "lr_warmup", "lr_decay", "help_until"}
        setup.check_numbers(self, may_be_zero, {"gamma", "demo_ratio", "dropout", "actor_ema"})
        rc.task_named(self.task)
        if self.num_min_qs > self.num_qs:
            fail(f"--num-min-qs {self.num_min_qs}: there are only --num-qs {self.num_qs} critics to choose from")
        if self.dropout == 1:
            fail("--dropout 1: drops everything; give less")
        if self.batch_size % self.grad_accum_steps or self.num_demos() % self.grad_accum_steps:
            what = f"--batch-size {self.batch_size} and its demonstrations, {self.num_demos()}"
            fail(f"--grad-accum-steps {self.grad_accum_steps}: must divide {what}")
        if self.gripper == "critic" and rc.TASKS[self.task].gripper == "continuous":
            fail(f"--gripper critic: the gripper of --task {self.task} is continuous; give --gripper continuous")
        if self.total_timesteps <= self.learning_starts:
            fail(f"--total-timesteps {self.total_timesteps}: learning starts after {self.learning_starts}; give more")

    def num_demos(self) -> int:
        """Demonstrations in each batch."""
        return round(self.demo_ratio * self.batch_size)

    def shared(self, *also: str) -> dict[str, object]:
        """What shapes task and policy, and `also`, by names: must be the same in actor and learner."""
        flags = {flag(name): getattr(self, name) for name in [*Args.SHAPING.split(), *also]}
        flags["the fingerprint of --task"] = rc.TASKS[self.task].fingerprint()
        flags["--pretrained"] = recording.file_hash(self.pretrained)
        return json.loads(json.dumps(flags))


# --- Environment ------------------------------------------------------------------------------------------------------
def make_env(args: Args) -> gym.Env:
    """The robot's task, as it is demonstrated; nothing is contacted before the first reset."""
    config = rc.task_named(
        args.task,  # TASK: your configuration
        server=args.server,
        keys=args.server_keys,
        reward=args.reward if args.reward in ("task", "pose") else "none",
        gripper_penalty=args.gripper_penalty,
    )
    # No TimeLimit: FrankaEnv itself ends an episode, after config.max_episode_steps.
    return envs.make("robot_client:FrankaReal-v0", config=config, max_episode_steps=10**9)


def wrap_env(env: gym.Env, args: Args) -> gym.Env:
    """The task: {"images": (T, K, H, W, 3) uint8, "state": (T, S)}, T = --frame-stack; actions (A,) in [-1, 1]."""
    env = pixels.ImagesAndState(env, args.task, args.cameras, args.image_size)
    return gym.wrappers.FrameStackObservation(env, args.frame_stack)


def with_classifier(env: gym.Env, args: Args) -> gym.Env:
    """The task with the classifier's reward, if --reward names one. Exits with one line when it is of another task."""
    if args.reward in REWARDS:
        return env
    if not Path(args.reward).exists():
        fail(f"--reward {args.reward}: no such file; give {', '.join(REWARDS)}, or a file of reward_classifier.py")
    return SuccessReward(env, open_detector(args.reward, "--reward", env))


def success(info: dict) -> float:
    """Whether the episode whose last info this is was a success, NaN where the task does not say.
    Where any step's success counts: `envs.AnySuccess(env, success)` in make_env."""
    return envs.truth(info, "success", "is_success", "succeed")  # TASK: yours


def reset_robot(env: gym.Env, seed: int, person: "Person", ends: Callable[[], bool]) -> dict | None:
    """The first observation of an episode; None when `ends` says so, which the robot heeds on its way there.

    What a person types meanwhile is thrown away, but for pause, which begins there, and quit. Waits for a robot that
    refuses, or was there; when a person stopped it, or must look, for Enter. Raises RobotError, in one line with the
    remedy, when it has not been there yet, refuses the task's gains or joints, or nobody can press Enter.
    """
    while heed(person, env, ended=False, stopped=ends):  # in a pause from before the robot must not move
        pass
    while not ends():
        try:
            obs, _ = env.reset(seed=seed, options={"give_up": ends})
        except rc.StoppedError as error:
            person.wait(error, ends)
        except rc.RobotError as error:
            if ends():
                break
            never_there = env.unwrapped.episodes == 0 and not isinstance(error, rc.RefusedError)
            if never_there or error.code == "bad_argument":
                raise
            print(f"waiting for the robot: {error}", file=sys.stderr, flush=True)
            time.sleep(1)
        else:
            person.forget()
            heed(person, env, ended=False, stopped=ends)
            return None if ends() else obs
    return None


class Person:
    """Whoever stands beside the robot: the teleoperation that may take over, and commands from the keyboard."""

    def __init__(self, args: Args, teleop: str):
        """Raises RobotError when there is no such device. Exits with one line when nobody can give the verdicts."""
        self.help_until = args.help_until
        self.quit = False
        self.paused = False  # in the last `heed`: what was seen before is old
        self.terminal = rc.Terminal() if sys.stdin.isatty() or teleop == "keyboard" else None
        self.rng = np.random.default_rng(args.seed)
        self.scripted = teleop == "scripted"
        self.teleop: rc.Teleop | None = None
        if args.reward == "person" and not self.terminal:
            fail("--reward person: nobody is there, standard input is no terminal; start the script in one")
        if self.terminal:
            keys_here = rc.KEYS.replace("z undo the last   t label   ", "")  # those are record_demos.py's
            print(keys_here if teleop == "keyboard" else VERDICT_KEYS, flush=True)
        if self.scripted:
            self.teleop = rc.ScriptedExpert(0.0, 1, args.seed)
        elif teleop != "none":
            self.teleop = rc.open_teleop(teleop, self.terminal)
            self.teleop.forget = self.forget  # names what the wrapper throws away at a reset

    def begin(self, step: int) -> None:
        """An episode begins at this step of the run. A scripted person lets the policy try, then helps to the end: in
        all episodes at first, then in ever fewer, as HIL-SERL advises (docs/franka_walkthrough.md)."""
        helps = step < self.help_until and self.rng.random() >= step / self.help_until
        self.helps_after = self.rng.integers(*HELP_AFTER, endpoint=True) if helps else math.inf

    def watch(self, t: int) -> None:
        """Before step `t` of the episode."""
        if self.scripted:
            self.teleop.probability = float(t >= self.helps_after)

    def command(self) -> str:
        """The next one that was typed, or ""; a scripted person presses a wrong key now and then."""
        if self.scripted and self.rng.random() < WRONG_KEY_PROB:
            return str(self.rng.choice(["failure", "discard"]))
        self.quits()  # which is remembered
        return "".join(self.terminal.commands(most=1)) if self.terminal else ""

    def quits(self) -> bool:
        """Whether "quit" was typed, now or before."""
        self.quit |= self.terminal is not None and self.terminal.quits()
        return self.quit

    def fault(self) -> str:
        """What is wrong with the device. Raises RobotError when there is no terminal, or none any more."""
        device_fault = self.teleop.fault if self.teleop and not self.scripted else ""
        fault = self.terminal.fault if self.terminal else device_fault
        if fault:
            raise rc.RobotError(fault)
        return device_fault

    def wait(self, error: rc.RobotError, ends: Callable[[], bool]) -> None:
        """For Enter, or until `ends` says so. Raises the error where nobody can press it."""
        if self.terminal is None:
            raise error
        print(f"\r{error}; Enter goes on", flush=True)
        while not ends() and self.command() != "go on":
            time.sleep(0.1)

    def forget(self) -> None:
        """Throws away what was typed, but for pause and quit."""
        lost = self.terminal.forget() if self.terminal else []
        if lost:
            print(f"\rpressed during the reset, so without effect: {', '.join(lost)}", flush=True)

    def close(self) -> None:
        if self.teleop:
            self.teleop.close()
        if self.terminal:
            self.terminal.close()


# --- Networks ---------------------------------------------------------------------------------------------------------
class EnsembleLinear(nn.Module):
    """E linear layers in one product, (E, B, in) -> (E, B, out); flax's weights, (E, in, out)."""

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
        self.weight = nn.Parameter(torch.ones(num, 1, dim))
        self.bias = nn.Parameter(torch.zeros(num, 1, dim))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias, F.layer_norm(x, x.shape[-1:], eps=1e-6), self.weight)  # flax's eps


class MLP(nn.Module):
    """E trunks [linear, dropout, LayerNorm, activation] * depth: (E, B, in) -> (E, B, H)."""

    def __init__(self, num: int, in_dim: int, hidden_dims: tuple[int, ...], activation: str, norm: bool, dropout=0.0):
        super().__init__()
        dims = (in_dim, *hidden_dims)
        self.linears = nn.ModuleList(EnsembleLinear(num, *pair) for pair in zip(dims, hidden_dims))
        norms = (EnsembleLayerNorm(num, dim) if norm else nn.Identity() for dim in hidden_dims)
        self.norms = nn.ModuleList(norms)
        self.activation = getattr(torch if hasattr(torch, activation) else F, activation)
        self.dropout = dropout

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        for linear, norm in zip(self.linears, self.norms, strict=True):
            x = linear(x)
            if self.dropout and generator is not None:  # only in the critics' training pass
                kept = torch.rand(x.shape, generator=generator, device=x.device) >= self.dropout
                x = x * kept / (1 - self.dropout)
            x = self.activation(norm(x))
        return x


class Actor(nn.Module):
    """Gaussian policy squashed by tanh; SERL networks/actor_critic_nets.py:156-272."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.std_parameterization = args.std_parameterization
        self.trunk = MLP(1, obs_dim, args.hidden_dims, args.activation, args.layer_norm)
        self.mean = EnsembleLinear(1, args.hidden_dims[-1], action_dim)
        if args.std_parameterization in ("exp", "softplus"):
            self.log_std = EnsembleLinear(1, args.hidden_dims[-1], action_dim)
        elif args.std_parameterization == "uniform":
            self.log_std = nn.Parameter(torch.zeros(action_dim))
        else:
            self.register_buffer("log_std", torch.full((action_dim,), math.log(FIXED_STD)))

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation before tanh, (B, A) each, of observations (B, O)."""
        features = self.trunk(obs.unsqueeze(0))  # (1, B, H)
        mean = self.mean(features).squeeze(0)
        if isinstance(self.log_std, nn.Module):
            raw = self.log_std(features).squeeze(0)
        else:
            raw = self.log_std.expand_as(mean)
        std = F.softplus(raw) if self.std_parameterization == "softplus" else raw.exp()
        return mean, std.clamp(STD_MIN, STD_MAX)

    def sample(self, obs: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """Actions (B, A) with noise eps (B, A), and their log density (B,)."""
        return squash(*self(obs), eps)


def squash(mean: Tensor, std: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """Actions tanh(mean + std * eps) and their log density, summed over the last dimension."""
    u = mean + std * eps
    log_pi = -0.5 * eps.square() - std.log() - 0.5 * math.log(2 * math.pi)
    log_slope = 2 * (math.log(2) - u - F.softplus(-2 * u))  # of tanh; arXiv:1812.05905 appendix C
    return u.tanh(), (log_pi - log_slope).sum(-1)


class Critic(nn.Module):
    """E independent Q functions."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        dims = args.hidden_dims
        self.num = args.num_qs
        self.trunk = MLP(self.num, obs_dim + action_dim, dims, args.activation, args.layer_norm, args.dropout)
        self.q = EnsembleLinear(self.num, dims[-1], 1)

    def forward(self, obs: Tensor, actions: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Values (E, B) of observations (B, O) and actions (B, A)."""
        x = torch.cat([obs, actions], -1).expand(self.num, -1, -1)
        features = self.trunk(x, generator)  # (E, B, H)
        return (features * self.q.weight.mT).sum(-1) + self.q.bias.squeeze(-1)  # matmul is slower


class Observation(NamedTuple):
    """What an encoder sees."""

    images: Tensor  # (B, T, K, H, W, 3)
    states: Tensor  # (B, T * S)
    maps: Tensor | None = None  # (B, T, K, C, h, w), what a frozen trunk makes of the images


class Features(NamedTuple):
    """What actor and critics see."""

    images: Tensor  # (B, F), what the encoder makes of them
    states: Tensor  # (B, T * S)


class Bottleneck(nn.Sequential):
    """Linear layer, LayerNorm, tanh."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__(nn.Linear(in_dim, out_dim), nn.LayerNorm(out_dim, eps=1e-6), nn.Tanh())


def encoder_trunk(args: Args, in_channels: int, load: bool = True) -> nn.Module:
    """Convolutions of --encoder: images (N, H, W, in) -> maps (N, C, h, w). TASK: add yours."""
    try:
        return vision.make_trunk(args.encoder, in_channels, args.pretrained, load, args.small_channels)
    except ValueError as error:
        fail(f"--pretrained {error}" if args.pretrained else f"--encoder {args.encoder}: {error}")


class Encoder(nn.Module):
    """Images of all cameras -> features (B, K * latent_dim); SERL common/encoding.py.
    Each camera has a trunk of its own, that sees a stack of frames as channels. Pretrained trunks
    see one frame at a time; a frozen one is the same for all cameras and encoders: the agent's, and
    this encoder begins with its maps."""

    def __init__(self, views: Views, args: Args, load: bool = True):
        super().__init__()
        self.pretrained = args.pretrained is not None
        self.frozen = self.pretrained and args.freeze
        self.checkpoint = args.activation_checkpointing
        if args.film and args.film not in views.columns:
            fail(f"--film {args.film}: the observation has no such state, only: {' '.join(views.columns) or 'images'}")
        self.film_columns = views.columns.get(args.film)
        in_channels = 3 if self.pretrained else 3 * views.stack
        trunk = encoder_trunk(args, in_channels, load=False)  # to know its maps
        channels, height, width = vision.map_shape(trunk, in_channels, views.size)
        if min(height, width) < (1 if args.pooling == "average" else 2):
            fail(f"--image-size {views.size}: too small for --encoder {args.encoder} with --pooling {args.pooling}")
        if self.pretrained:
            channels *= views.stack
        self.trunks = nn.ModuleList()
        self.films = nn.ModuleList()
        self.heads = nn.ModuleList()
        for _ in views.cameras:
            if not self.frozen:
                self.trunks.append(encoder_trunk(args, in_channels, load))
            if self.film_columns:
                start, stop = self.film_columns
                self.films.append(vision.FiLM(channels, views.stack * (stop - start)))
            pooling, pooled = vision.make_pooling(args.pooling, (channels, height, width))
            self.heads.append(nn.Sequential(pooling, Bottleneck(pooled, args.latent_dim)))
        self.out_dim = len(views.cameras) * args.latent_dim

    def camera_maps(self, obs: Observation, k: int) -> Tensor:
        """Maps (B, C, h, w) of camera k."""
        if self.frozen:
            return obs.maps[:, :, k].flatten(1, 2)
        images = obs.images[:, :, k]  # (B, T, H, W, 3)
        frames = images.flatten(0, 1) if self.pretrained else images.permute(0, 2, 3, 1, 4).flatten(3)
        if self.checkpoint and torch.is_grad_enabled():
            maps = checkpoint(self.trunks[k], frames, use_reentrant=False, preserve_rng_state=False)
        else:
            maps = self.trunks[k](frames)
        return maps.unflatten(0, (len(images), -1)).flatten(1, 2)

    def forward(self, obs: Observation) -> Tensor:
        features = []
        for k, head in enumerate(self.heads):
            maps = self.camera_maps(obs, k)
            if self.film_columns:
                steps = obs.states.unflatten(1, (obs.images.shape[1], -1))  # (B, T, S)
                maps = self.films[k](maps, steps[..., slice(*self.film_columns)].flatten(1))
            features.append(head(maps))
        return torch.cat(features, -1)


def feature_dim(views: Views, args: Args) -> int:
    """What actor and critics see: the features of all cameras, and of the states."""
    return len(views.cameras) * args.latent_dim + (PROPRIO_DIM if views.state_dim else 0)


def proprioception(views: Views) -> nn.Module:
    """States (B, T * S) -> (B, PROPRIO_DIM), or as they are, (B, 0), where there are none."""
    return Bottleneck(views.state_dim, PROPRIO_DIM) if views.state_dim else nn.Identity()


class PixelActor(Actor):
    """The policy on an encoder's features and the states."""

    def __init__(self, views: Views, action_dim: int, args: Args):
        super().__init__(feature_dim(views, args), action_dim, args)
        self.proprio = proprioception(views)

    def forward(self, features: Features) -> tuple[Tensor, Tensor]:
        return super().forward(torch.cat([features.images, self.proprio(features.states)], -1))


class PixelCritic(Critic):
    """E Q functions on the encoder's features, which they train together, and the states."""

    def __init__(self, views: Views, action_dim: int, args: Args):
        super().__init__(feature_dim(views, args), action_dim, args)
        self.proprio = proprioception(views)

    def forward(self, features: Features, actions: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return super().forward(torch.cat([features.images, self.proprio(features.states)], -1), actions, generator)


class GraspCritic(nn.Module):
    """Values (B, 3) of opening the gripper, leaving it, and closing it; HIL-SERL networks/actor_critic_nets.py."""

    def __init__(self, views: Views, args: Args):
        super().__init__()
        self.proprio = proprioception(views)
        self.trunk = MLP(1, feature_dim(views, args), args.hidden_dims, args.activation, args.layer_norm)
        self.q = EnsembleLinear(1, args.hidden_dims[-1], 3)

    def forward(self, features: Features) -> Tensor:
        x = torch.cat([features.images, self.proprio(features.states)], -1)
        hidden = self.trunk(x.unsqueeze(0))  # (1, B, H)
        with torch.autocast(hidden.device.type, enabled=False):  # values in float32, as the critics'
            return self.q(hidden.float()).squeeze(0)


def grasp_index(actions: Tensor) -> Tensor:
    """Which of open, stay and close the gripper's entry of actions (...) in [-1, 1] means to the environment."""
    return (actions >= rc.GRIPPER_THRESHOLD).long() - (actions <= -rc.GRIPPER_THRESHOLD).long() + 1


# --- Replay buffer ----------------------------------------------------------------------------------------------------
class Batch(NamedTuple):
    observations: Tensor  # (B, O)
    actions: Tensor  # (B, A)
    rewards: Tensor  # (B,)
    next_observations: Tensor  # (B, O)
    terminations: Tensor  # (B,) 1 where terminated, not truncated; see `n_step_transitions`


class ReplayBuffer:
    """Uniform ring buffer of transitions on the device: sampling is one gather per field."""

    def __init__(self, capacity: int, obs_dim: int, action_dim: int, device: torch.device, n_step=1, gamma=1.0):
        """Batches are of `n_step` steps, whose rewards are discounted by `gamma`."""
        self.capacity = capacity
        self.device = device
        self.n_step = n_step
        self.gamma = gamma
        shapes = Batch((obs_dim,), (action_dim,), (), (obs_dim,), ())
        self.rows = Batch(*(torch.empty(capacity, *shape, device=device) for shape in shapes))
        self.continues = torch.empty(capacity, dtype=torch.bool, device=device)  # the episode of the slot before
        self.total = 0  # transitions ever added
        self.newest: dict[str, Tensor] = {}  # each actor's newest observation (O,)
        self.open_episode: str | None = None  # the newest transition's actor, until an episode ends

    def __len__(self) -> int:
        return min(self.total, self.capacity)

    def add(self, step: np.ndarray, actor: str = "") -> int:
        """Stores an actor's next step; returns how many transitions that makes: 0 for a reset, else 1."""
        obs = torch.tensor(step["observation"], device=self.device)
        before = self.newest.get(actor)
        self.newest[actor] = obs
        if step["first"] or before is None:
            self.open_episode = None if self.open_episode == actor else self.open_episode
            return 0
        slot = self.total % self.capacity
        action = torch.tensor(step["action"], device=self.device)
        values = Batch(before, action, float(step["reward"]), obs, float(step["terminated"]))
        for column, value in zip(self.rows, values):
            column[slot] = value
        self.continues[slot] = self.open_episode == actor
        self.open_episode = actor
        self.total += 1
        return 1

    def sample(self, shape: tuple[int, ...], generator: torch.Generator) -> Batch:
        """Transitions (*shape, ...) of n_step steps, uniformly with replacement."""
        slots = torch.randint(len(self), shape, generator=generator, device=self.device)
        return self.n_step_transitions(slots)[0]

    def n_step_transitions(self, slots: Tensor) -> tuple[Batch, Tensor]:
        """The transitions that begin in `slots` (...), n_step steps long, and the slots (...) of their last steps.
        Rewards are discounted and summed; `terminations` is 1 - gamma^(n - 1) where the episode goes on, so that a
        target's factor gamma * (1 - terminations) is gamma^n. Shorter where the episode or the buffer ends, or
        another actor's steps come between."""
        batch = Batch(*(column[slots] for column in self.rows))
        newest = (self.total - 1) % self.capacity
        last = slots
        for _ in range(1, self.n_step):
            after = (last + 1) % self.capacity
            goes_on = self.continues[after] & (last != newest)  # (...)
            discounts = self.gamma * (1 - batch.terminations)
            longer = batch._replace(
                rewards=batch.rewards + discounts * self.rows.rewards[after],
                next_observations=self.rows.next_observations[after],
                terminations=1 - discounts * (1 - self.rows.terminations[after]),
            )
            pairs = zip(longer, batch)
            batch = Batch(*(torch.where(tensors.expand(goes_on, new), new, old) for new, old in pairs))
            last = torch.where(goes_on, after, last)
        return batch, last

    def newest_observations(self, count: int) -> Tensor:
        """Observations (count, O) of the newest transitions, oldest first."""
        slots = torch.arange(self.total - count, self.total, device=self.device) % self.capacity
        return self.rows.observations[slots]

    def state_dict(self) -> dict:
        columns = [column[: len(self)].clone() for column in (*self.rows, self.continues)]
        return {"columns": columns, "total": self.total, "newest": dict(self.newest), "open": self.open_episode}

    def load_state_dict(self, state: dict) -> None:
        """Takes the place of what is there; a buffer that is too small grows."""
        *rows, continues = state["columns"]
        self.capacity = max(self.capacity, len(continues))
        self.rows = Batch(*(tensors.fill(column, saved) for column, saved in zip(self.rows, rows)))
        self.continues = tensors.fill(self.continues, continues)
        self.total = state["total"]
        self.newest = dict(state["newest"])
        self.open_episode = state["open"]


class FrameBuffer(ReplayBuffer):
    """Ring buffer of transitions with images, each of whose frames is stored once, in a FrameFile.
    `observations` are the states; `windows` (capacity, 2, T) say where in that file a transition's frames
    are: the observation's stack and the next one's. Successive steps of an actor share frames, whatever
    other actors add in between."""

    def __init__(self, capacity: int, views: Views, action_dim: int, frames: FrameFile, n_step=1, gamma=1.0):
        super().__init__(capacity, views.state_dim, action_dim, frames.device, n_step, gamma)
        self.stack = views.stack
        self.frames = frames
        self.windows = torch.zeros(capacity, 2, views.stack, dtype=torch.long, device=frames.device)
        self.newest_windows: dict[str, list[int]] = {}  # of each actor's newest observation

    def add(self, step: np.ndarray, actor: str = "") -> int:
        """Stores an actor's next step; returns how many transitions that makes: 0 for a reset, else 1."""
        before = self.newest_windows.get(actor, [])
        window = [] if step["first"] else list(before)
        for i, frame in enumerate(step["frames"]):
            repeated = step["first"] and i > 0 and np.array_equal(frame, step["frames"][i - 1])
            window.append(window[-1] if repeated else self.frames.put(frame))
        older = [window[0]] * (self.stack - len(window))  # a reset's stack repeats the first one
        window = (older + window)[-self.stack :]
        self.frames.keep(window)
        slot = self.total % self.capacity
        overwritten = self.windows[slot].flatten().tolist() if self.total >= self.capacity else []
        count = super().add(step, actor)
        if count:
            self.windows[slot] = torch.tensor([before, window])
            self.frames.keep(before + window)
            self.frames.drop(overwritten)
        self.frames.drop(before)
        self.newest_windows[actor] = window
        return count

    def sample_frames(self, count: int, generator: torch.Generator) -> tuple[Batch, Tensor]:
        """Uniformly: transitions (count, ...) of n_step steps, frames (count, 2 * T, K, H, W, 3)."""
        slots = torch.randint(len(self), (count,), generator=generator, device=self.device)
        batch, last = self.n_step_transitions(slots)
        windows = torch.cat([self.windows[slots, 0], self.windows[last, 1]], 1)
        return batch, self.frames.get(windows)

    def state_dict(self) -> dict:
        return super().state_dict() | {
            "windows": self.windows[: len(self)].clone(),
            "newest_windows": dict(self.newest_windows),
            "frames": self.frames.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.windows = tensors.fill(self.windows, state["windows"])
        self.newest_windows = dict(state["newest_windows"])
        self.frames.load_state_dict(state["frames"])


def robot_step_type(views: Views, action_dim: int) -> np.dtype:
    """One step as it is journalled and sent: what was executed and what followed, or a reset; whether by a person."""
    return np.dtype([*step_type(views.state_dim, action_dim, (1, *views.frame_shape)).descr, ("intervened", "?")])


def add_intervention(demos: FrameBuffer, replay: FrameBuffer, step: np.ndarray, actor: str) -> None:
    """Adds what a person did to the demonstrations, as episodes that begin where the person took over: with what the
    replay buffer saw last, which takes in the step afterwards."""
    before = replay.newest.get(actor)
    if step["first"] or before is None or not step["intervened"]:
        demos.newest.pop(actor, None)
        return
    if actor not in demos.newest:  # the person takes over: a segment with its own frames begins
        frames = replay.frames.get(torch.tensor(replay.newest_windows[actor]))
        reset = {"first": True, "observation": before.cpu().numpy(), "frames": frames.cpu().numpy()}
        demos.add(reset, actor)
    demos.add(step, actor)


def load_demos(args: Args, agent: "Agent", run: Run) -> FrameBuffer:
    """Successful demonstrations, stored as live steps. Exits with one line when there are none."""
    task = make_env(args)
    config = task.unwrapped.config
    closure = {"open": 0.0, "close": 1.0}.get(config.gripper_at_reset)  # None: as it is
    steps = []
    episodes = []
    for episode in minari_episodes(args.demos, task):
        if success(episode.info) != 1:
            continue
        penalties = grasp_penalties(episode.actions, closure, config)
        replayed = as_live_steps(episode, task, partial(wrap_env, args=args))
        for (action, obs, reward, terminated), extra in zip(replayed, [0.0, *penalties]):
            steps.append(pack_step(agent.step_type, action, obs, reward + extra, terminated))
        episodes.append(episode._replace(observations=[]))
    if not episodes:
        fail(f"--demos {args.demos}: none of its episodes is a success; record some with record_demos.py")
    if not any((episode.rewards > 0).any() for episode in episodes):
        fail(f"--demos {args.demos}: none of its steps has a reward above 0")
    motions = np.concatenate([episode.actions[:, -1] for episode in episodes])
    if agent.grasp_critic is not None and motions.max() < rc.GRIPPER_THRESHOLD:
        print(f"--demos {args.demos}: the gripper is never told to close in them", file=sys.stderr)
    demos = agent.make_buffer("demonstrations", len(steps) - len(episodes) + args.total_timesteps, run, len(steps))
    for step in steps:
        demos.add(step)
    agent.normalizer.update(demos.newest_observations(len(demos)))
    agent.probe = {"images": torch.from_numpy(obs["images"]), "state": torch.from_numpy(obs["state"])}
    print(f"demonstrations: {summary(episodes, success)}", flush=True)
    return demos


def grasp_penalties(actions: np.ndarray, closure: float | None, config: rc.TaskConfig) -> list[float]:
    """Of the steps (T,) of an episode with actions (T, A), as FrankaEnv counts them; `closure` before it, if known."""
    rewards = []
    for value in actions[:, -1]:
        asked = rc.closure_after(value, closure, config.gripper)
        rewards.append(0.0 if closure is None else -config.gripper_penalty * abs(asked - closure))
        closure = asked
    return rewards


# --- Agent ------------------------------------------------------------------------------------------------------------
class Agent:
    """SAC from images for the arm and double DQN for the gripper, with the options of DrQ, RLPD and SERL."""

    PARTS = ("normalizer", "encoder", "ema_encoder", "actor", "ema_actor", "critic", "target_critic")
    PARTS += ("trunk", "grasp_critic", "target_grasp_critic", "actor_optimizer", "critic_optimizer", "alpha_optimizer")
    # Columns of train.csv, NaN in the rows before learning starts.
    METRICS = ("losses/critic_loss", "losses/q_values", "losses/actor_loss", "losses/entropy", "losses/alpha")
    METRICS += ("losses/grasp_loss",)

    def __init__(self, views: Views, action_space: spaces.Box, args: Args, device: torch.device, load=True):
        """Without `load`, --pretrained is not read: a state will be loaded that has its parameters."""
        self.args = args
        self.device = device
        self.views = views
        self.action_dim = action_space.shape[0]
        with_gripper = rc.TASKS[args.task].gripper != "fixed"
        self.arm_dim = self.action_dim - (with_gripper and args.gripper != "continuous")  # what the actor decides
        self.step_type = robot_step_type(views, self.action_dim)
        self.generator = torch.Generator(device).manual_seed(args.seed)
        torch.manual_seed(args.seed)  # the networks' initialisation
        self.normalizer = RunningNormalizer(views.state_dim, args.normalize_observations).to(device)
        self.encoder = Encoder(views, args, load).to(device)
        self.ema_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.actor = PixelActor(views, self.arm_dim, args).to(device)
        self.ema_actor = copy.deepcopy(self.actor).requires_grad_(False)
        self.critic = PixelCritic(views, self.arm_dim, args).to(device)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.trunk = None  # the frozen one, for all cameras
        if self.encoder.frozen:
            self.trunk = encoder_trunk(args, 3, load).to(device).requires_grad_(False)
        # The temperature is softplus(raw_alpha), SERL networks/lagrange.py:77.
        self.raw_alpha = nn.Parameter(torch.tensor(ALPHA_INIT + math.log(-math.expm1(-ALPHA_INIT)), device=device))
        self.target_entropy = TARGET_ENTROPY * self.arm_dim
        self.actor_parameters = list(self.actor.parameters())
        self.acting_parameters = [*self.actor.parameters(), *self.encoder.parameters()]
        self.ema_parameters = [*self.ema_actor.parameters(), *self.ema_encoder.parameters()]
        self.critic_parameters = list(self.critic.parameters())
        self.target_parameters = list(self.target_critic.parameters())
        self.grasp_critic = self.target_grasp_critic = None
        if with_gripper and args.gripper == "critic":
            self.grasp_critic = GraspCritic(views, args).to(device)
            self.target_grasp_critic = copy.deepcopy(self.grasp_critic).requires_grad_(False)
            self.critic_parameters += self.grasp_critic.parameters()
            self.target_parameters += self.target_grasp_critic.parameters()
        self.value_parameters = [*self.encoder.parameters(), *self.critic_parameters]
        self.actor_optimizer = self.make_optimizer(self.actor_parameters, args.weight_decay)
        self.critic_optimizer = self.make_optimizer(self.value_parameters, args.weight_decay)
        self.alpha_optimizer = self.make_optimizer([self.raw_alpha], 0.0)
        self.optimizers = [self.actor_optimizer, self.critic_optimizer, self.alpha_optimizer]
        self.num_demos = args.num_demos()
        self.imitates = self.num_demos > 0 and args.bc_weight > 0
        self.ema_weight = torch.tensor(1 - args.actor_ema, device=device)
        self.critic_updates = 0
        self.counts = torch.zeros(3, device=device)  # transitions learned from, in the replay buffer, in the other
        self.probe: dict[str, Tensor] | None = None  # an observation by which a loaded policy is checked
        # A frozen trunk, most of the work then, has all threads to itself.
        self.second_thread = tensors.SecondThread(1 if self.trunk else args.threads, device)
        if args.compile and device.type == "cuda":
            self.target_q = torch.compile(self.target_q)
            self.encode = torch.compile(self.encode)
            self.critic_loss = torch.compile(self.critic_loss)
            self.actor_loss = torch.compile(self.actor_loss)
            self.update_once = tensors.Graphed(self.update_once, self.generator, eager=3 * args.policy_delay)

    def make_buffer(self, name: str, capacity: int, run: Run, slots: int) -> FrameBuffer:
        """A buffer of this agent's transitions, with a file of `slots` frames unless the run goes on, which
        has one. Exits with one line when there is no room."""
        args = self.args
        file = pixels.frame_file(name, capacity, slots, self.views, self.step_type, run, args.frames_dir, self.device)
        return FrameBuffer(capacity, self.views, self.action_dim, file, args.n_step, args.gamma)

    def make_optimizer(self, parameters, weight_decay: float) -> torch.optim.Optimizer:
        lr = torch.tensor(self.args.lr, device=self.device)  # a tensor: a CUDA graph follows it
        options = {"fused": True, "capturable": self.device.type == "cuda"}
        return torch.optim.AdamW(parameters, lr, weight_decay=weight_decay, **options)

    @torch.inference_mode()
    def act(self, obs: dict, deterministic: bool) -> np.ndarray:
        """Action (A,) in [-1, 1] for one observation of `wrap_env`; the gripper's is the grasp critic's best."""
        obs = self.one_observation(obs)
        features = self.encode(obs)  # which the grasp critic is trained on
        if deterministic:
            mean, _ = self.ema_actor(Features(self.ema_encoder(obs), obs.states))
        else:
            mean, std = self.actor(features)
            mean = mean + std * torch.randn(mean.shape, generator=self.generator, device=self.device)
        action = mean.tanh()[0].cpu().numpy()
        gripper = np.zeros(self.action_dim - self.arm_dim, np.float32)
        if self.grasp_critic is not None:
            gripper += self.grasp_critic(features).argmax().item() - 1
        return np.concatenate([action, gripper])

    def random_action(self) -> np.ndarray:
        """Action (A,) uniform in [-1, 1]; a gripper that the actor does not decide about is left alone."""
        arm = torch.rand(self.arm_dim, generator=self.generator, device=self.device) * 2 - 1
        return np.append(arm.cpu().numpy(), np.zeros(self.action_dim - self.arm_dim, np.float32))

    @torch.inference_mode()
    def answers(self) -> Tensor:
        """What the policy and its average, and the grasp critic, make of the stored observation."""
        obs = self.one_observation(self.probe)
        features = self.encode(obs)
        answers = [self.actor(features)[0].tanh()]
        answers += [self.ema_actor(Features(self.ema_encoder(obs), obs.states))[0].tanh()]
        if self.grasp_critic is not None:
            answers.append(self.grasp_critic(features))
        return torch.cat(answers, 1).clone()

    def one_observation(self, obs: dict) -> Observation:
        """As networks see it, in a batch of one."""
        images = torch.as_tensor(obs["images"], device=self.device)[None]
        states = torch.as_tensor(obs["state"], device=self.device)[None]
        return self.observation(images, self.normalizer(states.flatten(1)))

    @property
    def alpha(self) -> Tensor:
        return F.softplus(self.raw_alpha)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.amp)

    def observation(self, images: Tensor, states: Tensor | None) -> Observation:
        """What encoders take: images (B, T, K, H, W, 3), normalised states, a frozen trunk's maps."""
        maps = None
        if self.trunk is not None:
            with torch.no_grad(), self.autocast():
                maps = self.trunk(images.flatten(0, 2)).float().unflatten(0, images.shape[:3])
        return Observation(images, states, maps)

    def encode(self, obs: Observation) -> Features:
        return Features(self.encoder(obs), obs.states)

    def augmented(self, frames: Tensor) -> Tensor:
        """Frames (B, N, K, H, W, 3) with --augment."""
        padding = max(1, round(CROP * self.views.size))
        images = vision.augment(frames.flatten(1, 2), self.args.augment, padding, self.generator)
        return images.unflatten(1, frames.shape[1:3])

    def prepare(self, batch: Batch, frames: Tensor) -> Batch:
        """The batch with Observations: augmented frames (B, 2 * T, K, H, W, 3), normalised states."""
        images, next_images = self.augmented(frames).chunk(2, 1)
        return batch._replace(
            observations=self.observation(images, self.normalizer(batch.observations)),
            next_observations=self.observation(next_images, self.normalizer(batch.next_observations)),
            rewards=self.args.reward_scale * batch.rewards,
        )

    @torch.no_grad()
    def target_q(self, batch: Batch, eps: Tensor, subset: Tensor) -> tuple[Tensor, Tensor | None]:
        """Soft Bellman target (B,) with noise eps (B, A) and target critics `subset` (M,); the grasp critic's (B,)."""
        generator = self.generator if self.args.dropout else None
        # arXiv:1812.05905 eq. 3; subsets: arXiv:2101.05982 alg. 1; the encoder has no target: arXiv:2107.09645
        next_features = self.encode(batch.next_observations)
        next_actions, next_log_pi = self.actor.sample(next_features, eps)  # (B, A), (B,)
        next_q_values = self.target_critic(next_features, next_actions, generator)  # (E, B)
        next_q = next_q_values[subset].amin(0)  # (B,)
        if self.args.backup_entropy:
            next_q = next_q - self.alpha * next_log_pi
        discounts = self.args.gamma * (1 - batch.terminations)  # (B,)
        grasp_target = None
        if self.grasp_critic is not None:  # double DQN, arXiv:1509.06461 eq. 4: it chooses, its target values
            best = self.grasp_critic(next_features).argmax(-1, keepdim=True)  # (B, 1)
            next_grasp_q = self.target_grasp_critic(next_features).gather(1, best).squeeze(1)  # (B,)
            grasp_target = batch.rewards + discounts * next_grasp_q
        return batch.rewards + discounts * next_q, grasp_target

    def critic_loss(self, features: Features, actions: Tensor, target_q: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared soft Bellman error."""
        generator = self.generator if self.args.dropout else None
        q_values = self.critic(features, actions, generator)  # (E, B)
        loss = (q_values - target_q).square().mean()  # over E, B; SERL agents/continuous/sac.py:183
        return loss, {"losses/critic_loss": loss.detach(), "losses/q_values": q_values.detach().mean()}

    def imitation_loss(self, mean: Tensor, actions: Tensor) -> Tensor:
        """Squared distance of the policy (B, A) to demonstrations, the batch's last rows.
        arXiv:1709.10089 eq. 2, arXiv:2106.06860 eq. 3"""
        num_demos = self.num_demos // self.args.grad_accum_steps
        error = mean[-num_demos:].tanh() - actions[-num_demos:]  # (D, A)
        return error.square().sum(-1).mean()

    def actor_loss(self, features: Features, actions: Tensor, eps: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Soft policy improvement, and imitation of demonstrations."""
        mean, std = self.actor(features)  # (B, A)
        new_actions, log_pi = squash(mean, std, eps)  # (B, A), (B,)
        q = self.critic(features, new_actions).mean(0)  # (B,)
        loss = (self.alpha.detach() * log_pi - q).mean()
        if self.imitates:
            loss = loss + self.args.bc_weight * self.imitation_loss(mean, actions)
        return loss, {"losses/actor_loss": loss.detach(), "losses/entropy": -log_pi.detach().mean()}

    def grasp_loss(self, features: Features, grasps: Tensor, target_q: Tensor) -> Tensor:
        """Squared Bellman error of what the gripper was told, (B, 1) in [-1, 1]."""
        q = self.grasp_critic(features).gather(1, grasp_index(grasps)).squeeze(1)  # (B,)
        return (q - target_q).square().mean()

    def gradients(self, batch: Batch, eps: Tensor, subset: Tensor, with_actor: bool) -> dict[str, Tensor]:
        """Of critics and encoder, which imitation trains, too; `with_actor` also of actor and temperature, from the
        same features. The second thread computes the targets, then the actor's gradient."""
        actions = batch.actions[:, : self.arm_dim]  # (B, A) of the arm
        targets = self.second_thread(self.autocast()(self.target_q), batch, eps[:, 0], subset)
        with self.autocast():
            features = self.encode(batch.observations)
        if with_actor:
            detached = Features(features.images.detach(), features.states)
            actor_metrics = self.second_thread(self.actor_gradient, detached, actions, eps[:, 1])
        with self.autocast():
            target_q, grasp_target = targets()
            loss, metrics = self.critic_loss(features, actions, target_q)
            if self.imitates:
                mean, _ = self.actor(features)
                loss = loss + ENCODER_IMITATION * self.imitation_loss(mean, actions)
            if self.grasp_critic is not None:
                grasp_loss = self.grasp_loss(features, batch.actions[:, -1:], grasp_target)
                metrics["losses/grasp_loss"] = grasp_loss.detach()
                loss = loss + grasp_loss
        (loss / self.args.grad_accum_steps).backward(inputs=self.value_parameters)
        return metrics | actor_metrics() if with_actor else metrics

    def actor_gradient(self, features: Features, actions: Tensor, eps: Tensor) -> dict[str, Tensor]:
        with self.autocast():
            loss, metrics = self.actor_loss(features, actions, eps)
        # Spares the critics' weight gradients.
        (loss / self.args.grad_accum_steps).backward(inputs=self.actor_parameters)
        alpha_loss = self.alpha * (metrics["losses/entropy"] - self.target_entropy)
        (alpha_loss / self.args.grad_accum_steps).backward()
        return metrics | {"losses/alpha": self.alpha.detach()}

    def step_critic(self) -> None:
        self.critic_optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.target_parameters, self.critic_parameters, TAU)

    def step_actor(self) -> None:
        self.actor_optimizer.step()
        self.alpha_optimizer.step()
        with torch.no_grad():
            for average, parameter in zip(self.ema_parameters, self.acting_parameters, strict=True):
                average.lerp_(parameter, self.ema_weight)

    def update_once(self, *inputs: Tensor, with_actor: bool) -> dict[str, Tensor]:
        """One critic step on a batch and, `with_actor`, one step of actor and temperature. `inputs`, one by one as
        a CUDA graph takes them: the batch's fields (B, ...), its frames (B, 2 * T, K, H, W, 3), noise for the two
        steps (B, 2, A), critics for the target (M,). Both gradients are of the same parameters (SERL sac.py:276)."""
        *parts, subset = inputs
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        logged = []
        for i in range(self.args.grad_accum_steps):  # each has its share of demonstrations last
            *fields, frames, eps = [part[i :: self.args.grad_accum_steps] for part in parts]
            batch = self.prepare(Batch(*fields), frames)
            logged.append(self.gradients(batch, eps, subset, with_actor))
        self.step_critic()
        if with_actor:
            self.step_actor()
        return {name: torch.stack([part[name] for part in logged]).mean() for name in logged[0]}

    def update(self, buffer: FrameBuffer, demos: FrameBuffer, count: int) -> dict[str, Tensor]:
        """`count` critic updates and the actor updates then due; the newest metrics, detached."""
        shape = (count, 2, self.args.batch_size, self.arm_dim)
        eps = torch.randn(shape, generator=self.generator, device=self.device)
        draws = torch.rand(count, self.args.num_qs, generator=self.generator, device=self.device)
        subsets = draws.topk(self.args.num_min_qs).indices  # (count, M), distinct
        metrics = {}
        for i in range(count):
            batch, frames = buffer.sample_frames(self.args.batch_size - self.num_demos, self.generator)
            if self.num_demos:
                demo_batch, demo_frames = demos.sample_frames(self.num_demos, self.generator)
                batch = Batch(*(torch.cat(pair) for pair in zip(batch, demo_batch)))
                frames = torch.cat([frames, demo_frames])
            self.critic_updates += 1
            self.schedule_lr()
            # A plain mean of all actors at first, so that the random first one does not stay in it.
            self.ema_weight.fill_(max(1 - self.args.actor_ema, self.args.policy_delay / self.critic_updates))
            with_actor = self.critic_updates % self.args.policy_delay == 0
            noise = eps[i].transpose(0, 1)  # (B, 2, A)
            metrics |= self.update_once(*batch, frames, noise, subsets[i], with_actor=with_actor)
        return metrics

    def schedule_lr(self) -> None:
        """Linear warm-up and cosine decay of the two learning rates, counted in critic updates."""
        warmup, decay = self.args.lr_warmup, self.args.lr_decay
        if warmup or decay:
            factor = min(1.0, (self.critic_updates - 1) / warmup) if warmup else 1.0
            if decay:
                factor *= 0.5 * (1 + math.cos(math.pi * min(1.0, self.critic_updates / decay)))
            self.actor_optimizer.param_groups[0]["lr"].fill_(self.args.lr * factor)
            self.critic_optimizer.param_groups[0]["lr"].fill_(self.args.lr * factor)

    def owed(self, step: int) -> int:
        """Critic updates that the ratio to the environment's steps still asks for."""
        return max(self.args.utd_ratio * (step - self.args.learning_starts) - self.critic_updates, 0)

    def policy_tensors(self) -> list[Tensor]:
        """Parameters of actor, encoder, their averages, grasp critic; statistics; how much they have learned from."""
        parameters = [*self.acting_parameters, *self.ema_parameters]
        if self.grasp_critic is not None:
            parameters += self.grasp_critic.parameters()
        detached = [parameter.detach() for parameter in parameters]
        return [*detached, *self.normalizer.state_dict().values(), self.counts]

    def state_dict(self) -> dict:
        parts = [name for name in self.PARTS if getattr(self, name) is not None]
        state = {name: getattr(self, name).state_dict() for name in parts}
        state["raw_alpha"] = self.raw_alpha.detach()
        state["critic_updates"] = self.critic_updates
        state["generator"] = self.generator.get_state()
        state["probe"] = self.probe
        state["answers"] = self.answers()
        state["fingerprint"] = rc.TASKS[self.args.task].fingerprint()
        return state

    def load_state_dict(self, state: dict) -> None:
        """Raises KeyError, ValueError or RuntimeError when the state is of other networks or of another task."""
        wrong = list(recording.differences(state["fingerprint"], rc.TASKS[self.args.task].fingerprint()))
        if wrong:
            raise ValueError(f"the task is another one: {'; '.join(wrong)}")
        for name in self.PARTS:
            if getattr(self, name) is not None:
                getattr(self, name).load_state_dict(state[name])
        with torch.no_grad():
            self.raw_alpha.copy_(state["raw_alpha"])
        self.critic_updates = state["critic_updates"]
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["capturable"] = self.device.type == "cuda"
        tensors.load_generator(self.generator, state["generator"], self.args.seed + self.critic_updates)
        self.probe = state["probe"]
        self.check_answers(state["answers"])

    def check_answers(self, before: Tensor) -> None:
        """Raises ValueError when the policy does not make of the stored observation what it made of it `before`."""
        now = self.answers()
        if now.shape != before.shape or not torch.allclose(now, before.to(now.device), rtol=5e-3, atol=5e-3):
            raise ValueError(f"the policy answers {now.tolist()}, and was saved when it answered {before.tolist()}")


# --- Evaluation -------------------------------------------------------------------------------------------------------
def wilson(successes: int, episodes: int) -> tuple[float, float]:
    """95% interval of a success rate, Wilson 1927."""
    z, n, p = 1.96, max(episodes, 1), successes / max(episodes, 1)
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(centre - half, 0.0), min(centre + half, 1.0)  # rounding may go beyond


class Outcome(NamedTuple):
    """Of an evaluated episode."""

    verdict: str  # success, failure, discard, fault, or quit
    seconds: float
    suggested: bool  # by classifier or task


def evaluate_episode(agent: Agent, env: gym.Env, seed: int, person: Person, frames: list[np.ndarray]) -> Outcome:
    """Deterministic and without help; a person may abort it, or judge it. Its pictures go to `frames`."""
    obs = reset_robot(env, seed, person, ends=person.quits)
    if obs is None:
        return Outcome("quit", 0.0, False)
    seconds = 0.0
    suggested = False
    while True:
        action = np.zeros(agent.action_dim, np.float32) if person.paused else agent.act(obs, deterministic=True)
        obs, _, terminated, truncated, info = env.step(action)
        frames.append(np.concatenate(list(obs["images"][-1]), 1))  # (H, K * W, 3)
        seconds += info["period_s"]
        suggested |= bool(info["success"])
        if info["fault"]:
            print(f"the episode was ended: {info['fault']}", file=sys.stderr, flush=True)
        verdict = default_verdict(terminated, truncated, info)
        if verdict == "fault":
            return Outcome(verdict, seconds, suggested)
        said = heed(person, env, bool(verdict), person.quits)
        if person.quits() and not said:
            return Outcome("quit", seconds, suggested)
        if said or verdict:
            return Outcome(said or ("success" if verdict == "success" else "failure"), seconds, suggested)


def evaluate_policy(args: Args) -> None:
    """--eval-only: seeded start poses; a row of evaluation_POLICY.csv for each episode, a summary, a video."""
    rc.keep_the_beat()
    env = wrap_env(with_classifier(make_env(args), args), args)
    agent = Agent(views_of(env), env.action_space, args, tensors.set_up_torch(args.threads, args.amp))
    folder = Path(args.eval_only)
    version = load_policy(agent, folder / f"{args.policy}.policy")
    rc.check_server(args.server, args.server_keys)
    person = Person(args, "none")
    outcomes: list[Outcome] = []
    faults = 0  # one after the other
    table = "episode,success,cycle_s,suggested\n"
    frames: list[np.ndarray] = []
    try:
        while len(outcomes) < args.final_eval_episodes:
            number = len(outcomes)  # one that a fault or a person ended is tried again
            seen: list[np.ndarray] = []
            outcome = evaluate_episode(agent, env, envs.episode_seed(args.seed, 1, number), person, seen)
            print(f"episode {number}: {outcome.verdict} after {outcome.seconds:.1f} s", flush=True)
            if outcome.verdict == "quit":
                break
            faults = faults + 1 if outcome.verdict == "fault" else 0
            if faults and faults % 3 == 0:
                person.wait(rc.RobotError(f"three faults in episode {number}: remove their cause"), person.quits)
            if outcome.verdict in ("discard", "fault"):
                continue
            outcomes.append(outcome)
            table += f"{number},{outcome.verdict == 'success':d},{outcome.seconds:.3f},{outcome.suggested:d}\n"
            write_atomically(folder / f"evaluation_{args.policy}.csv", table.encode())
            if len(outcomes) <= 4:
                frames += seen
    except KeyboardInterrupt:
        print("stopped: what has ended counts", flush=True)
    finally:
        person.close()
        env.close()
    if not outcomes:
        fail(f"--eval-only {folder}: no episode has ended, so nothing is written")
    if args.capture_video and frames:
        write_video(np.stack(frames), folder / f"evaluation_{args.policy}.mp4", env.metadata["render_fps"])
    report_outcomes(args, version, outcomes)


def report_outcomes(args: Args, version: int, outcomes: list[Outcome]) -> None:
    won = [outcome.seconds for outcome in outcomes if outcome.verdict == "success"]
    false = sum(outcome.suggested and outcome.verdict == "failure" for outcome in outcomes)
    missed = sum(not outcome.suggested and outcome.verdict == "success" for outcome in outcomes)
    low, high = wilson(len(won), len(outcomes))
    successes = f"success {len(won)} of {len(outcomes)}, 95% {low:.2f} to {high:.2f}"
    print(f"{args.policy} policy, update {version}: {successes}")
    if won:
        print(f"cycle time {np.mean(won):.1f} s on average, where it succeeds")
    if args.reward != "person":
        print(f"--reward {args.reward} against the verdicts: {false} false successes, {missed} missed")


def save_policy(agent: Agent, version: int, path: Path) -> None:
    """The policy in a file of its own, with what it makes of the newest observation that it saw."""
    contents = {"version": version, "tensors": agent.policy_tensors(), "probe": agent.probe}
    contents |= {"answers": agent.answers(), "flags": agent.args.shared()}
    data = io.BytesIO()
    torch.save(contents, data)
    write_atomically(path, data.getvalue())


def load_policy(agent: Agent, path: Path) -> int:
    """A policy that was saved, and its number of updates. Exits with one line when there is none, or another one."""
    if not path.exists():
        when = f"newest.policy comes with the first updates, best.policy after {RECENT} episodes without help"
        fail(f"{path}: is not there yet; {when}")
    try:
        saved = torch.load(path, map_location=agent.device, weights_only=True)
        wrong = list(recording.differences(saved["flags"], agent.args.shared()))
        if wrong:
            raise ValueError("; ".join(wrong))
        for ours, theirs in zip(agent.policy_tensors(), saved["tensors"], strict=True):
            ours.copy_(theirs)
        agent.probe = saved["probe"]
        agent.check_answers(saved["answers"])
    except Exception as error:  # noqa: BLE001  a damaged file raises what it likes
        fail(f"{path}: is no policy of this script and flags ({str(error).splitlines()[0]})")
    return saved["version"]


# --- Main -------------------------------------------------------------------------------------------------------------
def start_learner(args: Args, run: Run, device: torch.device) -> tuple[Agent, FrameBuffer, FrameBuffer]:
    """The agent, and the buffers of replay and of demonstrations, of a new run or of the one to go on with."""
    env = wrap_env(make_env(args), args)  # for its spaces: no robot is contacted
    agent = Agent(views_of(env), env.action_space, args, device, load=run.state is None)
    capacity = min(args.buffer_size, args.total_timesteps)
    spare = 4 * SAVE_EVERY if capacity < args.total_timesteps else 0  # for what the newest two checkpoints refer to
    buffer = agent.make_buffer("replay", capacity, run, capacity + capacity // 50 + args.frame_stack + spare)
    if not run.state:
        return agent, buffer, load_demos(args, agent, run)
    stored = len(run.state["demos"]["columns"][0])
    return agent, buffer, agent.make_buffer("demonstrations", stored + args.total_timesteps, run, 1)


def learner(args: Args) -> None:
    """Receives steps, learns, publishes the policy."""
    device = tensors.set_up_torch(args.threads, args.amp)
    run = Run(args, args.task, __file__, device)
    agent, buffer, demos = start_learner(args, run, device)
    shared, size = args.shared("gripper_penalty"), agent.step_type.itemsize
    actors = link.Learner(args.address, args.curve_keys, shared, size, partial(check_steps, agent.step_type))
    run.keep(agent=agent, buffer=buffer, demos=demos, actors=actors)
    run.open(args.total_timesteps, waits_for="the update")
    metrics = dict.fromkeys(Agent.METRICS, math.nan)
    published_at = -math.inf

    while not run.signals and (run.step < args.total_timesteps or agent.owed(run.step)):
        # Receive: what was taken in is learned from first, no more is asked for: an episode ahead at most.
        count = 0
        with run.phase("env"):
            owed = agent.owed(run.step)
            received = actors.receive(0 if owed else 100, args.total_timesteps - run.step, asks=not owed)
        # Store: what a person did goes to the demonstrations as well.
        for actor_name, data in received:
            step = np.frombuffer(data, agent.step_type)[0]
            add_intervention(demos, buffer, step, actor_name)
            count += buffer.add(step, actor_name)
        if count:
            agent.normalizer.update(buffer.newest_observations(count))
        run.advance(count)
        # Learn.
        updates = min(agent.owed(run.step), UPDATES_AT_ONCE)
        if updates:
            with run.phase("update"):
                metrics |= agent.update(buffer, demos, updates)
            learned = [metrics["losses/critic_loss"], *agent.value_parameters, *agent.actor_parameters]
            if not all(torch.isfinite(numbers).all() for numbers in learned):
                fail(f"training has diverged after {agent.critic_updates} updates; {args.run_dir} has what was before")
        # Publish: also for an actor that has just come.
        agent.counts.copy_(torch.tensor([run.step, len(buffer), len(demos)]))
        if agent.critic_updates and time.monotonic() - published_at > PUBLISH_S:
            actors.publish(agent.critic_updates, tensors.pack_tensors(agent.policy_tensors()))
            published_at = time.monotonic()
        # Log.
        if run.due(500):
            sizes = {"charts/replay": len(buffer), "charts/demonstrations": len(demos)}
            run.log("train", run.speed() | metrics | sizes)
        # Save: actors may then forget what they sent.
        if run.should_save(SAVE_EVERY):
            run.save()
            actors.saved()

    run.end_of_training()
    actors.publish(agent.critic_updates, tensors.pack_tensors(agent.policy_tensors()), done=True)
    run.save(finished=True)
    run.close()


def learner_beside(args: Args, run: Run) -> setup.Child:
    """The learner of `run` as a process of its own."""
    folder = run.dir / "learner"
    flags = dataclasses.replace(args, role="learner", track=False, resume=None, run_dir=str(folder))
    again = dataclasses.replace(flags, resume=str(folder), run_dir=None)
    return setup.Child(__file__, setup.to_flags(flags), setup.to_flags(again), folder)


class Log:
    """What an actor knows of its episodes: a status line and a row of train.csv for each, the best policy."""

    def __init__(self, run: Run, task: Recorder):
        self.run = run
        self.task = task
        self.unaided: deque[bool] = deque(maxlen=RECENT)  # success of the last episodes without help
        self.helped: deque[float] = deque(maxlen=RECENT)  # share of steps with help
        self.disagreements = 0
        self.best = -1.0

    def add(self, verdict: str, steps: list[Step], agent: Agent, version: int, age_s: float) -> bool:
        """Takes in an episode; those that were discarded, stopped, or ended by a fault count for nothing.

        Whether with it the last RECENT without help are as good as any before. `version` and age are those of the
        newest weights, 0 and NaN while there are none.
        """
        share = float(np.mean([step.intervened for step in steps]))
        late = np.array([step.late_s for step in steps])
        won = verdict == "success"
        counts = verdict not in ("discard", "fault", "stopped")
        unaided = counts and share == 0
        if counts:
            self.helped.append(share)
        if unaided:
            self.unaided.append(won)
        is_best = unaided and len(self.unaided) == RECENT and self.rate() >= self.best
        if is_best:
            self.best = self.rate()
        transitions, replay, demos = agent.counts.tolist()
        scalars = {
            "charts/episodic_return": sum(step.reward for step in steps),
            "charts/episodic_length": len(steps),
            "charts/success": won,
            "charts/success_without_help": self.rate(),
            "charts/intervention_rate": float(np.mean(self.helped or [math.nan])),
            "charts/updates_per_transition": version / max(transitions, 1),
            "charts/disagreements": self.disagreements,
            "charts/replay": replay,
            "charts/demonstrations": demos,
            "charts/weights_age_s": age_s,
            "time/late_steps": int((late > LATE_S).sum()),
            "time/late_p99_ms": 1e3 * float(np.quantile(late, 0.99)),
            "time/cycle_s": sum(step.period_s for step in steps),
        }
        self.run.log("train", scalars)
        value = {name.split("/")[1]: number for name, number in scalars.items()}
        helped = f"{value['intervention_rate']:.0%}" if self.helped else "-"
        weights = f"weights {age_s:.0f} s old" if version else "no weights yet"
        print(
            f"\repisode {self.run.episode} {verdict} | return {value['episodic_return']:.2f} in {len(steps)} steps | "
            f"without help {sum(self.unaided)} of {len(self.unaided)} | helped {helped} | "
            f"updates {value['updates_per_transition']:.2f} | late {value['late_steps']}, p99 "
            f"{value['late_p99_ms']:.1f} ms | {weights} | replay {replay:.0f}, demos {demos:.0f} | "
            f"overruled {self.disagreements}",
            flush=True,
        )
        return is_best

    def rate(self) -> float:
        return float(np.mean(self.unaided or [math.nan]))

    def record_disagreement(self, steps: list[Step], verdict: str) -> None:
        """The episode in which person and classifier disagree, for `reward_classifier.py --add RUN`."""
        won = verdict == "success"
        attributes = {
            "verdict": verdict,
            "success": won,
            "decided_by": "person",
            "suggested": not won,
            "disagreement": True,
            "attempt": self.run.episode,
        }
        dataset = Recording(self.run.dir / "episodes", "run/episodes-v0", self.task, {"mode": "demos", "classes": 2})
        dataset.add(fields_of(self.task.observations, steps, won), attributes)

    def state_dict(self) -> dict:
        return {"unaided": list(self.unaided), "helped": list(self.helped), "best": self.best, "n": self.disagreements}

    def load_state_dict(self, state: dict) -> None:
        self.unaided.extend(state["unaided"])
        self.helped.extend(state["helped"])
        self.best, self.disagreements = state["best"], state["n"]


class Newest:
    """The learner's newest policy, in the actor's networks."""

    def __init__(self, agent: Agent, sender: link.Actor, path: Path):
        """Begins with the one in the file `path`, if that is there."""
        self.agent = agent
        self.sender = sender
        self.path = path
        self.version = load_policy(agent, path) if path.exists() else 0
        self.came = time.monotonic() if self.version else math.nan

    def take(self) -> None:
        newer = self.sender.weights()
        if newer:
            self.version, weights = newer
            tensors.unpack_tensors(weights, self.agent.policy_tensors())
            self.came = time.monotonic()

    def act(self, obs: dict) -> np.ndarray:
        """A random motion, until something is learned."""
        return self.agent.act(obs, deterministic=False) if self.version else self.agent.random_action()

    def save(self, obs: dict, best: bool) -> None:
        """With an observation to check it by."""
        if not self.version:
            return
        self.agent.probe = {name: torch.from_numpy(value) for name, value in obs.items()}
        save_policy(self.agent, self.version, self.path)
        if best:
            save_policy(self.agent, self.version, self.path.with_name("best.policy"))


def actor(args: Args) -> None:
    """Acts at the robot's rate, heeds the person, sends each episode; with --role both beside its learner."""
    rc.keep_the_beat()
    device = tensors.set_up_torch(1, args.amp)
    task = with_classifier(make_env(args), args)
    person = Person(args, args.teleop)
    child = None
    try:
        rc.check_server(args.server, args.server_keys)
        task = Recorder(rc.Intervention(task, person.teleop) if person.teleop else task)
        env = wrap_env(task, args)
        plain = dataclasses.replace(args, compile=False)  # compiling takes longer than the robot waits for a step
        agent = Agent(views_of(env), env.action_space, plain, device)
        run = Run(args, args.task, __file__, device)
        log = Log(run, task)
        run.keep(log=log)
        shared, size = args.shared("gripper_penalty"), agent.step_type.itemsize
        sender = link.Actor(args.address, args.curve_keys, shared, size, run.dir, timeout_s=600.0)
        sender.release()  # what a crash left of an episode
        child = learner_beside(args, run) if args.role == "both" else None
        run.open(args.total_timesteps)
        collect(args, log, env, Newest(agent, sender, run.dir / "newest.policy"), person, child)
    finally:
        person.close()
        task.close()
        if child:
            child.end()
    run.plot(name="train", keys=("charts/success_without_help", "charts/intervention_rate"))
    run.end_of_training()
    run.close()
    print(f"see {args.run_dir}; evaluate it: python {Path(__file__).name} --eval-only {args.run_dir}")


def collect(args: Args, log: Log, env: gym.Env, policy: Newest, person: Person, child: setup.Child | None) -> None:
    """Episode after episode, until the learner has what it asked for."""
    run, sender, agent = log.run, policy.sender, policy.agent
    seed = args.seed + sender.number
    agent.generator.manual_seed(envs.episode_seed(seed, 0, sender.journal.written))
    obs = env.observation_space.sample()  # a policy's answer is saved with it, until there is a real one
    while True:
        catch_up(run, sender, person, child)
        if sender.done:  # the learner's last policy is on its way
            if child:
                child.process.wait()
            else:
                time.sleep(1)
            policy.take()
            policy.save(obs, best=False)
        if run.signals or sender.done:
            return
        # Reset.
        episode_seed = envs.episode_seed(seed, 0, sender.journal.written + run.episode)  # grows, also after a crash
        obs = reset_robot(env, episode_seed, person, partial(stop_asked, run, person))
        person.begin(run.step)
        if obs is None:
            return
        # Act, step, store.
        steps, verdict, obs = episode(run, env, policy, person, obs)
        # Send: a discarded episode is forgotten.
        if verdict == "discard":
            sender.discard()
        else:
            sender.release()
        # Log and save.
        suggested = any(step.suggested for step in steps)
        if args.reward != "person" and verdict in VERDICTS[:2] and suggested != (verdict == "success"):
            log.disagreements += 1
            if args.reward not in REWARDS:
                log.record_disagreement(steps, verdict)
        is_best = log.add(verdict, steps, agent, policy.version, time.monotonic() - policy.came)
        policy.save(obs, is_best)
        run.episode += 1
        run.save()
        log.task.episodes.clear()


def stop_asked(run: Run, person: Person) -> bool:
    """Whether the run is to end: by Ctrl-C, or by a person's key, which counts as that."""
    if person.quits() and not run.signals:
        run.on_signal()
    return run.signals > 0


def catch_up(run: Run, sender: link.Actor, person: Person, child: setup.Child | None) -> None:
    """Waits until the learner has heard of all that was sent: it is one episode behind at most."""
    asked = time.monotonic()
    told = False
    while not (stop_asked(run, person) or sender.done):
        if not told and time.monotonic() - asked > WAITS_S:
            where = f"see {child.log}" if child else f"at {sender.address} (with the same --curve-keys?)"
            print(f"\rwaiting for the learner, {where}", flush=True)
            told = True
        sender.exchange(100)
        if sender.answered > asked and sender.held == sender.journal.written:
            return
        if child and child.finished():
            sender.done = True


def episode(run: Run, env: gym.Env, policy: Newest, person: Person, obs: dict) -> tuple[list[Step], str, dict]:
    """An episode at the robot's rate: its steps, the verdict, the last observation.

    The verdict is one of VERDICTS, "time limit", "stopped", or "fault": the robot, its server, or a camera failed.
    """
    sender, dtype = policy.sender, policy.agent.step_type
    sender.stage(pack_step(dtype, None, obs).tobytes())
    steps: list[Step] = []
    verdict = ""
    while not verdict:
        # Act, with the newest policy; after a pause, in which all may have changed, only look.
        policy.take()
        anew = person.paused
        action = np.zeros(policy.agent.action_dim, np.float32) if anew else policy.act(obs)
        # Step: a person may take over.
        person.watch(len(steps))
        obs, reward, terminated, truncated, info = env.step(action)
        run.advance()
        # Heed the person, whose verdict comes before that of classifier or task. Who quits ends the episode at once.
        seen = terminated or not info["fault"]  # what followed the action; after a reflex, too
        ended = (terminated or truncated) and not info["fault"]
        said = heed(person, env, ended, partial(stop_asked, run, person))
        if said in ("success", "failure"):
            reward = float(said == "success")
            terminated = said == "success" or bool(terminated and info["fault"])  # a reflex is an end in any case
        verdict = said or default_verdict(terminated, truncated, info) or ("stopped" if run.signals else "")
        # Store: success was decided before the penalty. A person's motion is a demonstration, unless a reflex ended it.
        executed = info["executed_action"]
        asked = info["asked_action"]
        intervened = bool(info.get("intervened", False))
        if seen:
            step = pack_step(dtype, None if anew else executed, obs, reward + info["grasp_penalty"], terminated)
            step["intervened"] = intervened and asked.any() and not info["fault"]
            sender.stage(step.tobytes())
        suggested = bool(info["success"])
        times = (info["period_s"], info["late_s"])
        steps.append(Step(executed, asked, reward, terminated, intervened, suggested, *times))
    if info["fault"]:
        print(f"\nthe episode was ended: {info['fault']}", file=sys.stderr, flush=True)
    return steps, verdict, obs


def default_verdict(terminated: bool, truncated: bool, info: dict) -> str:
    """The verdict where no person gives one. A reflex ends an episode: a failure of whoever acts, not of the robot."""
    if terminated:
        return "success" if success(info) == 1 else "failure"
    if info["fault"]:
        return "fault"
    return "time limit" if truncated else ""


def heed(person: Person, env: gym.Env, ended: bool, stopped: Callable[[], bool]) -> str:
    """A person's verdict, if there is one.

    A pause lasts until Enter or a verdict, or until `stopped`; meanwhile the robot stands still, also one that fails:
    what comes next would move it. So it does for a moment when the episode has `ended`, for a person who sees it
    differently. A device that fails is a pause. Raises RobotError when there is no terminal to go on in.
    """
    paused = False
    person.paused = False
    until = time.monotonic() + OVERRULE_S if ended and person.terminal else -math.inf
    while True:
        while command := person.command():
            if command in VERDICTS:
                return command
            if command == "pause":
                print("\rpaused, the robot stands still: Enter goes on, y n x end the episode", flush=True)
            if command in ("pause", "go on"):
                paused = command == "pause"
        fault = person.fault()
        if fault and not paused:
            print(f"\r{fault}: paused, Enter goes on, y n x end the episode", flush=True)
            paused = True
        if stopped() or not (paused or time.monotonic() < until):
            return ""
        person.paused |= paused
        try:
            env.unwrapped.stand_still()
        except rc.RobotError:  # the next step says what is wrong
            if not paused:
                return ""
            time.sleep(0.1)


def main(args: Args) -> None:
    with ends_well(args):
        try:
            if args.eval_only:
                evaluate_policy(args)
            elif args.role == "learner":
                learner(args)
            else:
                actor(args)
        except rc.RobotError as error:
            fail(f"{error}; then {setup.go_on(args)}")


if __name__ == "__main__":
    main(parse(Args, __doc__, Args.MAY_CHANGE))
