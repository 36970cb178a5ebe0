"""SAC from camera images: DrQ, RLPD with demonstrations, VICE, in one file.

    python sac_pixel_sim.py --seed 1                                # a Franka learns to pick up a cube that it sees
    python sac_pixel_sim.py --env-id FrankaPegInsert-v0 --total-timesteps 12000   # a sparse reward
    python sac_pixel_sim.py --resume RUN_DIR                        # go on after Ctrl-C or a crash
    python sac_pixel_sim.py --encoder resnet10 --image-size 128 --pretrained resnet10_params.pkl  # needs SERL's file
    python sac_pixel_sim.py --reward vice                           # the reward is learned from images of success
    python sac_pixel_sim.py --env-id Hopper-v5 --cameras render --demos 0   # needs a task that renders
    python sac_pixel_sim.py --role learner                          # needs an actor; SERL's two processes
    python sac_pixel_sim.py --role actor --address 127.0.0.1:5588   # needs a learner; as many as you like

Expect: eval/success_rate >= 0.95, wall_s <= 600 (2 CPU cores) [benchmarks/results/pixel_pick_default.csv]

Sources: everything that sac_state_sim.py names; DrQ arXiv:2004.13649, DrQ-v2 arXiv:2107.09645; SERL arXiv:2401.16013;
VICE arXiv:1805.11686, arXiv:1904.07854; FiLM arXiv:1709.07871; spatial softmax arXiv:1504.00702; MobileNetV3
arXiv:1905.02244.
Differs from SERL (serl_launcher, commit cd5f7e7), beside what sac_state_sim.py says: every frame has a crop of its own;
actor and critics each have a layer of their own for the robot's state; each critic has a last layer of its own; no
dropout; actor and critics see the same augmented images; targets are made with the one encoder, as in DrQ-v2; imitation
trains it, too; VICE's reward is the classifier's probability, mixup and gradient penalty act on the encoder's output.
New experiment: copy this file; `grep -n TASK: my_task.py` lists the places to edit. common/ holds what is not learning.
"""

import copy
import math
import os
import sys
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: spinning threads starve others

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from gymnasium import spaces
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common import envs, link, pixels, setup, tensors, vision
from common.episodes import as_live_steps, demonstrations, last_evaluation, summary
from common.evaluation import evaluate, record_video, report
from common.pixels import FrameFile, Views, views_of
from common.recording import check_new_dataset, file_hash
from common.run import Run
from common.setup import RunArgs, check_new_folder, ends_well, fail, flag, has_checkpoint, parse
from common.success import rewarded
from common.tensors import RunningNormalizer, check_steps, pack_step, step_type

try:
    import franka_sim  # noqa: F401  registers the Franka tasks  # TASK: import what registers yours
except ImportError as error:  # its tasks are missing then, others run
    print(error, file=sys.stderr)

TAU = 0.005  # the target critic's step towards the critic after each critic update
STD_MIN, STD_MAX = 1e-5, 5.0  # of the policy, before tanh; SERL
FIXED_STD = 0.1  # of --std-parameterization fixed
EXPLORE_STEPS = 20  # how long --explore-prob holds a value
PUBLISH_EVERY = 50  # learner: updates between two publications of the policy
ACTOR_AHEAD = 100  # actor: steps that it may be ahead of the learner before it waits
ALPHA_INIT = 0.01  # temperature at the start
TARGET_ENTROPY = -0.5  # that the temperature seeks, per dimension of the action; SERL, RLPD
DEMO_NOISE = 0.1  # standard deviation on the expert's actions, in [-1, 1]: shows how to recover
PROPRIO_DIM = 64  # features of the robot's state; SERL
ENCODER_IMITATION = 10.0  # weight of imitation beside the critics' loss in what trains the encoder
CROP = 1 / 32  # of an image's side that it is shifted at most; SERL: 4 pixels of 128
LABEL_SMOOTHING = 0.2  # VICE: how far labels are moved from 0 and 1 towards 0.5, relative; SERL
GRADIENT_PENALTY = 10.0  # VICE: weight of (gradient norm - 1)^2 between pairs of features; SERL


# --- Args -------------------------------------------------------------------------------------------------------------
@dataclass
class Args(RunArgs):
    record_dataset: str | None = None
    """store the last evaluation's episodes as this local Minari dataset, e.g. franka/pick-v0"""
    # environment
    env_id: str = "FrankaPickCube-v0"  # TASK: your task
    """gymnasium id, also module:Env-v0 or module:namespace/Env-v0, with images as a Box or anywhere
    in a Dict, and bounded Box actions"""
    image_size: int = 48
    """height and width that all images are rendered at, or resized to (pixels)"""
    cameras: tuple[str, ...] = ()
    """names of the images to learn from (default: all); render: the rendered picture of the task"""
    reward: str = "env"
    """env: the task's; vice: of a classifier that learns along from the demonstrations' last images;
    or the file of one that reward_classifier.py has trained"""
    frame_stack: int = 1
    """observations of this many steps are seen at once"""
    action_chunk: int = 1
    """actions chosen at once and executed one after the other, rewards summed; for all other flags that is one step"""
    gripper_penalty: float = 0.0
    """subtracted from the reward when the gripper (last action) reverses its motion (SERL: 0.1)"""
    # training
    total_timesteps: int = 6_000
    """environment steps"""
    learning_starts: int = 500
    """environment steps with random actions before learning starts"""
    buffer_size: int = 100_000
    """transitions kept"""
    frames_dir: str | None = None
    """directory for the frames' files (default: the run's), e.g. on a disk of this machine"""
    batch_size: int = 64
    """transitions per critic update, demonstrations included"""
    grad_accum_steps: int = 1
    """parts that a batch is computed in, one after the other, to save memory"""
    utd_ratio: int = 2
    """critic updates per environment step; 0, for a learner only: as many as time allows"""
    policy_delay: int = 1
    """critic updates per update of actor and temperature"""
    demos: str = "20"
    """demonstrations to collect from the scripted expert (0: none), or a Minari dataset of them"""
    demo_ratio: float = 0.5
    """fraction of each batch that is drawn from the demonstrations (RLPD: 0.5)"""
    eval_every: int = 1_000
    """steps between evaluations; twice as often a row of train.csv, half as often a checkpoint"""
    eval_episodes: int = 10
    """episodes per evaluation during training"""
    final_eval_episodes: int = 50
    """episodes of the last evaluation"""
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
    # algorithm
    gamma: float = 0.97
    """discount factor per environment step"""
    n_step: int = 0
    """steps whose rewards a critic's target sums before it bootstraps (SAC: 1; 0: 3, with --reward vice 1)"""
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
    explore_prob: float = 0.0
    """probability per step, for each dimension of the action, to hold a random value for a while"""
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
    """one process, or one of SERL's two"""
    address: str = "127.0.0.1:5588"
    """HOST:PORT of the learner; its policy is published on the next port"""
    curve_keys: str | None = None
    """directory with CURVE keys, the same on all machines, beyond loop-back; a learner can make it"""

    MAY_CHANGE = "run_dir resume eval_only record_dataset capture_video track compile threads amp "
    MAY_CHANGE += "total_timesteps eval_every eval_episodes final_eval_episodes address curve_keys frames_dir"
    SHAPING = "env_id image_size cameras encoder small_channels pooling latent_dim film freeze "
    SHAPING += "frame_stack action_chunk gripper_penalty hidden_dims activation layer_norm "
    SHAPING += "normalize_observations std_parameterization"

    def check(self) -> None:
        """Exits with one line when a value is out of its range or contradicts another."""
        may_be_zero = {"seed", "lr_warmup", "lr_decay", "utd_ratio", "n_step"}
        fractions = {"gamma", "demo_ratio", "dropout", "explore_prob", "actor_ema"}
        setup.check_numbers(self, may_be_zero, fractions)
        if self.num_min_qs > self.num_qs:
            fail(f"--num-min-qs {self.num_min_qs}: there are only --num-qs {self.num_qs} critics to choose from")
        if self.dropout == 1:
            fail("--dropout 1: drops everything; give less")
        if self.reward == "vice" and self.demos == "0":
            fail("--reward vice: has no goal images, the last of successful demonstrations; give --demos")
        if self.reward == "vice" and self.n_step > 1:
            fail(f"--n-step {self.n_step}: --reward vice knows the rewards of single steps only; leave it out")
        if self.reward == "vice" and self.num_demos() == self.batch_size:
            fail(f"--demo-ratio {self.demo_ratio}: --reward vice also learns from what is no demonstration; give less")
        if self.batch_size % self.grad_accum_steps or self.num_demos() % self.grad_accum_steps:
            what = f"--batch-size {self.batch_size} and its demonstrations, {self.num_demos()}"
            fail(f"--grad-accum-steps {self.grad_accum_steps}: must divide {what}")
        if self.total_timesteps <= self.learning_starts:
            fail(f"--total-timesteps {self.total_timesteps}: learning starts after {self.learning_starts}; give more")
        if self.utd_ratio == 0 and self.role == "both":
            fail("--utd-ratio 0: is for --role learner, which learns while an actor acts")
        if self.record_dataset:
            check_new_dataset(self.record_dataset)

    def target_steps(self) -> int:
        """Steps of a critic's target."""
        return self.n_step or (1 if self.reward == "vice" else 3)

    def num_demos(self) -> int:
        """Demonstrations in each batch."""
        return round(self.demo_ratio * self.batch_size) if self.demos != "0" else 0

    def shared(self) -> dict[str, object]:
        """What shapes task and policy and must be equal in actor and learner; of a file its hash."""
        flags = {flag(name): getattr(self, name) for name in Args.SHAPING.split()}
        flags["--reward"] = file_hash(self.reward)
        flags["--pretrained"] = file_hash(self.pretrained)
        return flags


# --- Environment ------------------------------------------------------------------------------------------------------
def make_env(args: Args, render: bool = False) -> gym.Env:
    """The task, as it is demonstrated and recorded."""
    options = {}
    if args.env_id.startswith("Franka") and args.cameras != ("render",):  # TASK: options of your task
        options = {"image_obs": True, "image_size": args.image_size}
    env = pixels.make_with_images(args.env_id, args.cameras, render, **options)
    return env  # TASK: wrappers of your own; one that changes actions has its own expert_action()


def wrap_env(env: gym.Env, args: Args) -> gym.Env:
    """The task with observations {"images": (T, K, H, W, 3) uint8, "state": (T, S)}, where T is
    --frame-stack, and actions (A,) in [-1, 1]. Exits when this script cannot learn it."""
    env = envs.learnable(env, args.env_id)
    if args.reward not in ("env", "vice"):
        env = rewarded(env, args.reward)
    env = envs.ScaledActions(env)
    if args.gripper_penalty:
        env = envs.GripperPenalty(env, args.gripper_penalty)
    env = pixels.ImagesAndState(env, args.env_id, args.cameras, args.image_size)
    env = gym.wrappers.FrameStackObservation(env, args.frame_stack)
    if args.action_chunk > 1:
        env = envs.ActionChunk(env, args.action_chunk)
    return gym.wrappers.RecordEpisodeStatistics(env)


def success(info: dict) -> float:
    """Whether the episode whose last info this is was a success, NaN where the task does not say.
    Where any step's success counts: `envs.AnySuccess(env, success)` in make_env."""
    return envs.truth(info, "success", "is_success", "succeed")  # TASK: yours


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


class Classifier(nn.Module):
    """VICE's: probability of success, as a logit, from images alone."""

    def __init__(self, views: Views, args: Args, load: bool = True):
        super().__init__()
        self.encoder = Encoder(views, replace(args, film=None), load)
        self.hidden = nn.Linear(self.encoder.out_dim, args.latent_dim)
        self.norm = nn.LayerNorm(args.latent_dim)
        self.out = nn.Linear(args.latent_dim, 1)

    def logit(self, features: Tensor) -> Tensor:
        """(B, F) -> (B,)"""
        return self.out(self.norm(self.hidden(features)).relu()).squeeze(-1)

    def forward(self, obs: Observation) -> Tensor:
        return self.logit(self.encoder(obs))


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


def load_demos(args: Args, agent: "Agent", task: gym.Env, wrap: envs.Wrap) -> list[np.ndarray]:
    """Demonstrations as live steps; VICE's goals are the last images of those that succeed."""
    steps, episodes, goals = [], [], []
    for episode in demonstrations(args.demos, task, args.seed, DEMO_NOISE):
        for action, obs, reward, terminated in as_live_steps(episode, task, wrap, args.action_chunk):
            steps.append(pack_step(agent.step_type, action, obs, reward, terminated))
        if success(episode.info) != 0:  # also where the task does not say
            goals.append(torch.from_numpy(obs["images"]))
        episodes.append(episode._replace(observations=[]))
    print(f"demonstrations: {summary(episodes, success)}", flush=True)
    if args.reward == "vice" and not goals:
        fail(f"--reward vice: none of the demonstrations of --demos {args.demos} ends in success")
    if args.reward == "vice":
        agent.goals = torch.stack(goals).to(agent.device)
    return steps


# --- Agent ------------------------------------------------------------------------------------------------------------
class Agent:
    """SAC from images with the options of DrQ, RLPD, VICE and SERL."""

    PARTS = ("normalizer", "encoder", "ema_encoder", "actor", "ema_actor", "critic", "target_critic", "trunk")
    PARTS += ("classifier", "actor_optimizer", "critic_optimizer", "alpha_optimizer", "classifier_optimizer")
    # Columns of train.csv, NaN in the rows before learning starts.
    METRICS = ("losses/critic_loss", "losses/q_values", "losses/actor_loss", "losses/entropy", "losses/alpha")
    METRICS += ("losses/vice_loss", "losses/vice_reward")

    def __init__(self, views: Views, action_space: spaces.Box, args: Args, device: torch.device, load=True):
        """Without `load`, --pretrained is not read: a state will be loaded that has its parameters."""
        self.args = args
        self.device = device
        self.views = views
        self.action_dim = action_space.shape[0]
        self.new_frames = 1 if args.action_chunk == 1 else views.stack  # of a stack, in each step
        self.step_type = step_type(views.state_dim, self.action_dim, (self.new_frames, *views.frame_shape))
        self.generator = torch.Generator(device).manual_seed(args.seed)
        torch.manual_seed(args.seed)  # the networks' initialisation
        self.normalizer = RunningNormalizer(views.state_dim, args.normalize_observations).to(device)
        self.encoder = Encoder(views, args, load).to(device)
        self.ema_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.actor = PixelActor(views, self.action_dim, args).to(device)
        self.ema_actor = copy.deepcopy(self.actor).requires_grad_(False)
        self.critic = PixelCritic(views, self.action_dim, args).to(device)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.trunk = None  # the frozen one, for all cameras
        if self.encoder.frozen:
            self.trunk = encoder_trunk(args, 3, load).to(device).requires_grad_(False)
        # The temperature is softplus(raw_alpha), SERL networks/lagrange.py:77.
        self.raw_alpha = nn.Parameter(torch.tensor(ALPHA_INIT + math.log(-math.expm1(-ALPHA_INIT)), device=device))
        self.target_entropy = TARGET_ENTROPY * self.action_dim
        self.actor_parameters = list(self.actor.parameters())
        self.acting_parameters = [*self.actor.parameters(), *self.encoder.parameters()]
        self.ema_parameters = [*self.ema_actor.parameters(), *self.ema_encoder.parameters()]
        self.critic_parameters = list(self.critic.parameters())
        self.target_parameters = list(self.target_critic.parameters())
        self.value_parameters = [*self.encoder.parameters(), *self.critic_parameters]
        self.actor_optimizer = self.make_optimizer(self.actor_parameters, args.weight_decay)
        self.critic_optimizer = self.make_optimizer(self.value_parameters, args.weight_decay)
        self.alpha_optimizer = self.make_optimizer([self.raw_alpha], 0.0)
        self.optimizers = [self.actor_optimizer, self.critic_optimizer, self.alpha_optimizer]
        self.classifier = self.classifier_optimizer = None
        # Goal images (G, T, K, H, W, 3).
        self.goals = torch.empty(0, *views.frame_shape, dtype=torch.uint8, device=device)
        if args.reward == "vice":
            self.classifier = Classifier(views, args, load).to(device)
            self.classifier_optimizer = self.make_optimizer(self.classifier.parameters(), 0.0)
            self.optimizers.append(self.classifier_optimizer)
        self.num_demos = args.num_demos()
        self.imitates = self.num_demos > 0 and args.bc_weight > 0
        self.ema_weight = torch.tensor(1 - args.actor_ema, device=device)
        # For `explore`: how many more steps each dimension of the action is held, and at which value.
        self.held_steps, self.held = np.zeros((2, self.action_dim // args.action_chunk), np.float32)
        self.critic_updates = 0
        # A frozen trunk, most of the work then, has all threads to itself.
        self.second_thread = tensors.SecondThread(1 if self.trunk else args.threads, device)
        if args.compile and device.type == "cuda":  # an update, and a choice, are one CUDA graph each
            self.target_q = torch.compile(self.target_q)
            self.encode = torch.compile(self.encode)
            self.critic_loss = torch.compile(self.critic_loss)
            self.actor_loss = torch.compile(self.actor_loss)
            self.update_once = tensors.Graphed(self.update_once, self.generator, eager=3 * args.policy_delay)
            self.choose = tensors.Graphed(self.choose, self.generator, eager=1)

    def make_buffer(self, name: str, capacity: int, run: Run, slots: int) -> FrameBuffer:
        """A buffer of this agent's transitions, with a file of `slots` frames unless the run goes on, which
        has one. Exits with one line when there is no room."""
        args = self.args
        file = pixels.frame_file(name, capacity, slots, self.views, self.step_type, run, args.frames_dir, self.device)
        return FrameBuffer(capacity, self.views, self.action_dim, file, args.target_steps(), args.gamma)

    def make_optimizer(self, parameters, weight_decay: float) -> torch.optim.Optimizer:
        lr = torch.tensor(self.args.lr, device=self.device)  # a tensor: a CUDA graph follows it
        options = {"fused": True, "capturable": self.device.type == "cuda"}
        return torch.optim.AdamW(parameters, lr, weight_decay=weight_decay, **options)

    @torch.inference_mode()
    def act(self, obs: dict, deterministic: bool) -> np.ndarray:
        """Action (A,) in [-1, 1] for one observation of `wrap_env`."""
        images = torch.as_tensor(obs["images"], device=self.device)[None]  # (1, T, K, H, W, 3)
        states = torch.as_tensor(obs["state"], device=self.device)[None].flatten(1)  # (1, T * S)
        action = self.choose(images, states, deterministic=deterministic)[0].cpu().numpy()
        if not np.isfinite(action).all():
            fail(f"the policy's actions are {action}: training has diverged; give a smaller --lr or smaller rewards")
        if self.args.explore_prob and not deterministic:
            self.explore(action)
        return action

    def choose(self, images: Tensor, states: Tensor, deterministic: bool) -> Tensor:
        """Actions (B, A) in [-1, 1] for images and states (B, ...): the averaged policy's mean, or a sample."""
        obs = self.observation(images, self.normalizer(states))
        actor = self.ema_actor if deterministic else self.actor
        encoder = self.ema_encoder if deterministic else self.encoder
        mean, std = actor(Features(encoder(obs), obs.states))
        if not deterministic:
            mean = mean + std * torch.randn(mean.shape, generator=self.generator, device=self.device)
        return mean.tanh()

    def explore(self, action: np.ndarray) -> None:
        """Now and then holds a single dimension at a random value; after arXiv:2006.01782."""
        draws = torch.rand(2, len(self.held), generator=self.generator, device=self.device)
        start, value = draws.cpu().numpy()
        starts = (self.held_steps == 0) & (start < self.args.explore_prob)
        self.held_steps[starts] = EXPLORE_STEPS
        self.held[starts] = 2 * value[starts] - 1
        holds = self.held_steps > 0
        self.held_steps[holds] -= 1
        action.reshape(self.args.action_chunk, -1)[:, holds] = self.held[holds]

    def random_action(self) -> np.ndarray:
        """Action (A,) uniform in [-1, 1]."""
        uniform = torch.rand(self.action_dim, generator=self.generator, device=self.device)
        return (uniform * 2 - 1).cpu().numpy()

    def policy(self, observations: list, rngs: list) -> np.ndarray:
        """The deterministic actions (N, A) that are evaluated."""
        return np.stack([self.act(obs, deterministic=True) for obs in observations])

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
        )

    @torch.no_grad()
    def target_q(self, batch: Batch, eps: Tensor, subset: Tensor) -> Tensor:
        """Soft Bellman target (B,) with noise eps (B, A) and target critics `subset` (M,)."""
        generator = self.generator if self.args.dropout else None
        # arXiv:1812.05905 eq. 3; subsets: arXiv:2101.05982 alg. 1; the encoder has no target: arXiv:2107.09645
        next_features = self.encode(batch.next_observations)
        next_actions, next_log_pi = self.actor.sample(next_features, eps)  # (B, A), (B,)
        next_q_values = self.target_critic(next_features, next_actions, generator)  # (E, B)
        next_q = next_q_values[subset].amin(0)  # (B,)
        if self.args.backup_entropy:
            next_q = next_q - self.alpha * next_log_pi
        return batch.rewards + self.args.gamma * (1 - batch.terminations) * next_q

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

    def gradients(self, batch: Batch, eps: Tensor, subset: Tensor, with_actor: bool) -> dict[str, Tensor]:
        """Of critics and encoder, which imitation trains, too; `with_actor` also of actor and temperature, from the
        same features. The second thread computes the targets, then the actor's gradient."""
        target_q = self.second_thread(self.autocast()(self.target_q), batch, eps[:, 0], subset)
        with self.autocast():
            features = self.encode(batch.observations)
        if with_actor:
            detached = Features(features.images.detach(), features.states)
            actor_metrics = self.second_thread(self.actor_gradient, detached, batch.actions, eps[:, 1])
        with self.autocast():
            loss, metrics = self.critic_loss(features, batch.actions, target_q())
            if self.imitates:
                mean, _ = self.actor(features)
                loss = loss + ENCODER_IMITATION * self.imitation_loss(mean, batch.actions)
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

    def classifier_gradient(self, replay: Tensor) -> dict[str, Tensor]:
        """VICE, arXiv:1904.07854: tells goal images from those in replay, (B, T, K, H, W, 3).
        Label smoothing, mixup and a gradient penalty: as SERL agents/continuous/vice.py:347."""
        count = len(replay)
        draw = partial(torch.rand, generator=self.generator, device=self.device)
        picks = torch.randint(len(self.goals), (count,), generator=self.generator, device=self.device)
        obs = self.observation(torch.cat([self.augmented(self.goals[picks]), replay]), None)
        with self.autocast():
            features = self.classifier.encoder(obs).float()  # (2 * B, F)
        ones = torch.ones(count, device=self.device)
        labels = torch.cat([ones, torch.zeros_like(ones)])
        labels = labels * (1 - LABEL_SMOOTHING) + 0.5 * LABEL_SMOOTHING
        pairs = draw(2 * count).argsort()
        weight = draw(1)  # SERL's beta(1, 1) distribution is uniform
        features = weight * features + (1 - weight) * features[pairs]
        labels = weight * labels + (1 - weight) * labels[pairs]  # the same as mixing the losses
        loss = F.binary_cross_entropy_with_logits(self.classifier.logit(features), labels)
        weight = draw(count, 1)
        between = weight * features[:count] + (1 - weight) * features[count:]
        between = between.detach().requires_grad_()
        total = self.classifier.logit(between).sum()
        (slope,) = torch.autograd.grad(total, between, create_graph=True)
        penalty = (slope.square().sum(1) + 1e-6).sqrt().sub(1).square().mean()
        ((loss + GRADIENT_PENALTY * penalty) / self.args.grad_accum_steps).backward()
        return {"losses/vice_loss": loss.detach()}

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
        """One critic step on a batch and, `with_actor`, one of actor, temperature and classifier. `inputs`, one by one
        as a CUDA graph takes them: the batch's fields (B, ...), its frames (B, 2 * T, K, H, W, 3), noise for the two
        steps (B, 2, A), critics for the target (M,). Both gradients are of the same parameters (SERL sac.py:276)."""
        *parts, subset = inputs
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        logged = []
        for i in range(self.args.grad_accum_steps):  # each has its share of demonstrations last
            *fields, frames, eps = [part[i :: self.args.grad_accum_steps] for part in parts]
            batch = self.prepare(Batch(*fields), frames)
            metrics = {}
            if self.args.reward == "vice":
                with torch.no_grad():
                    rewards = self.classifier(batch.next_observations).float().sigmoid()
                batch = batch._replace(rewards=rewards)
                metrics["losses/vice_reward"] = batch.rewards.mean()
            metrics |= self.gradients(batch, eps, subset, with_actor)
            if with_actor and self.args.reward == "vice":
                online = len(batch.rewards) - self.num_demos // self.args.grad_accum_steps
                metrics |= self.classifier_gradient(batch.next_observations.images[:online])
            logged.append(metrics)
        self.step_critic()
        if with_actor:
            self.step_actor()
            if self.classifier_optimizer:
                self.classifier_optimizer.step()
        return {name: torch.stack([part[name] for part in logged]).mean() for name in metrics}

    def update(self, buffer: FrameBuffer, demos: FrameBuffer | None, count: int) -> dict[str, Tensor]:
        """`count` critic updates and the actor updates then due; the newest metrics, detached."""
        shape = (count, 2, self.args.batch_size, self.action_dim)
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
        """What acting needs: parameters of actor and encoder, and the normalizer's statistics."""
        parameters = [parameter.detach() for parameter in self.acting_parameters]
        return [*parameters, *self.normalizer.state_dict().values()]

    def state_dict(self) -> dict:
        """Exits with one line, so that it is not saved, when training has diverged."""
        parameters = [*self.value_parameters, *self.actor_parameters]
        if not all(torch.isfinite(parameter).all() for parameter in parameters):
            fail("the networks' weights are not finite: training has diverged; give a smaller --lr or smaller rewards")
        parts = [name for name in self.PARTS if getattr(self, name) is not None]
        state = {name: getattr(self, name).state_dict() for name in parts}
        state["raw_alpha"] = self.raw_alpha.detach()
        state["critic_updates"] = self.critic_updates
        state["generator"] = self.generator.get_state()
        state["held"] = (self.held_steps.tolist(), self.held.tolist())
        state["goals"] = self.goals
        return state

    def load_state_dict(self, state: dict) -> None:
        """Raises KeyError, ValueError or RuntimeError when the state is of other networks."""
        for name in self.PARTS:
            if getattr(self, name) is not None:
                getattr(self, name).load_state_dict(state[name])
        with torch.no_grad():
            self.raw_alpha.copy_(state["raw_alpha"])
        self.critic_updates = state["critic_updates"]
        self.held_steps, self.held = np.array(state["held"], np.float32)
        self.goals = state["goals"]
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["capturable"] = self.device.type == "cuda"
        tensors.load_generator(self.generator, state["generator"], self.args.seed + self.critic_updates)


# --- Evaluation -------------------------------------------------------------------------------------------------------
def log_and_evaluate(args: Args, run: Run, agent: Agent, env: gym.Env, metrics: dict[str, Tensor]) -> None:
    """Rows of train.csv and eval.csv, where they are due."""
    if run.due(max(args.eval_every // 2, 1)):
        run.log("train", run.episodes() | run.speed() | metrics)
    if run.due(args.eval_every) and run.step < args.total_timesteps:
        with run.phase("eval"):
            run.log("eval", evaluate(agent.policy, [env], args.eval_episodes, args.seed, success, run.impatient))


def final_evaluation(args: Args, agent: Agent, run: Run, wrap: envs.Wrap) -> dict[str, float]:
    """The last evaluation, with its dataset and its video."""
    episodes, dataset_id = args.final_eval_episodes, args.record_dataset
    scalars = last_evaluation(agent.policy, make_env(args), wrap, episodes, args.seed, success, dataset_id)
    if args.capture_video:
        record_video(agent.policy, lambda: wrap(make_env(args, render=True)), run.dir / "video.mp4", args.seed)
    return scalars


# --- Main -------------------------------------------------------------------------------------------------------------
def start(args: Args, task: gym.Env, wrap: envs.Wrap) -> tuple[Run, Agent, FrameBuffer, FrameBuffer | None]:
    """Parts of a new run, with demonstrations, or of one that goes on: then `Run.keep` loads them."""
    device = tensors.set_up_torch(args.threads, args.amp)
    env = wrap(task)
    saved = has_checkpoint(args.run_dir)
    agent = Agent(views_of(env), env.action_space, args, device, load=not saved)
    if args.run_dir and not (args.resume or args.eval_only):
        check_new_folder(args.run_dir)  # demonstrations take a while
    steps = load_demos(args, agent, task, wrap) if args.demos != "0" and not saved else []
    run = Run(args, args.env_id, __file__, device)  # a new one once all is checked
    capacity = min(args.buffer_size, args.total_timesteps)
    slots = capacity * agent.new_frames + capacity // 64 + args.frame_stack  # also for resets; the file can grow
    if capacity < args.total_timesteps:  # what two checkpoints refer to is kept
        slots += min(4 * args.eval_every, args.total_timesteps - capacity) * agent.new_frames
    buffer = agent.make_buffer("replay", capacity, run, slots)
    demos = None
    if args.demos != "0":
        count = sum(not step["first"] for step in steps)  # 0 where a run goes on: it grows when it is loaded
        demos = agent.make_buffer("demonstrations", max(count, 1), run, max(len(steps), 1) * agent.new_frames)
        for step in steps:
            demos.add(step)
        agent.normalizer.update(demos.newest_observations(len(demos)))  # its first statistics
    return run, agent, buffer, demos


def train(args: Args) -> None:
    """One process that acts and learns."""
    wrap = partial(wrap_env, args=args)
    task = make_env(args)
    run, agent, buffer, demos = start(args, task, wrap)
    if args.eval_only:
        run.keep(agent=agent)  # without its frames
        task.close()
        return report("checkpoint", final_evaluation(args, agent, run, wrap))
    run.keep(agent=agent, buffer=buffer, demos=demos)
    env = wrap(task)
    # A second one only where it is needed: a task may own a robot or a port.
    eval_env = wrap(make_env(args)) if args.eval_every < args.total_timesteps else None
    run.open(args.total_timesteps)
    metrics = dict.fromkeys(Agent.METRICS, math.nan)
    obs, _ = env.reset(seed=envs.episode_seed(args.seed, 0, run.episode))
    buffer.add(pack_step(agent.step_type, None, obs))

    while run.step < args.total_timesteps:
        # Act: uniformly at random until something is learned.
        with run.phase("act"):
            if run.step < args.learning_starts:
                action = agent.random_action()
            else:
                action = agent.act(obs, deterministic=False)
        # Step the environment.
        with run.phase("env"):
            obs, reward, terminated, truncated, info = env.step(action)
        # Store: `terminated` cuts the bootstrap, `truncated` does not.
        buffer.add(pack_step(agent.step_type, action, obs, reward, terminated))
        agent.normalizer.update(buffer.newest_observations(1))
        run.advance()
        # Reset: each episode has its own seed, so that a run goes on here as if it had not ended.
        episode_over = terminated or truncated or run.impatient()
        if episode_over:
            with run.phase("env"):
                run.end_episode(info, success(info))
                obs, _ = env.reset(seed=envs.episode_seed(args.seed, 0, run.episode))
            buffer.add(pack_step(agent.step_type, None, obs))
        # Learn: several critic updates, and actor updates, per step.
        if run.step == args.learning_starts + 1:
            run.restart_timer()
        if run.step > args.learning_starts:
            with run.phase("update"):
                metrics |= agent.update(buffer, demos, args.utd_ratio)
        # Log and evaluate.
        log_and_evaluate(args, run, agent, eval_env, metrics)
        # Save, where an episode has ended.
        if episode_over and run.should_save(2 * args.eval_every):
            run.save()
            if run.signals:
                break

    run.end_of_training(env, eval_env)
    run.finish(final_evaluation(args, agent, run, wrap))


def learner(args: Args) -> None:
    """Receives steps, learns, publishes the policy: SERL's learner."""
    wrap = partial(wrap_env, args=args)
    task = make_env(args)  # for its spaces, demonstrations, evaluation
    run, agent, buffer, demos = start(args, task, wrap)
    eval_env = wrap(task)
    if args.eval_every >= args.total_timesteps:
        task.close()
    size = agent.step_type.itemsize
    actors = link.Learner(args.address, args.curve_keys, args.shared(), size, partial(check_steps, agent.step_type))
    run.keep(agent=agent, buffer=buffer, demos=demos, actors=actors)
    run.open(args.total_timesteps, waits_for="the update")
    metrics = dict.fromkeys(Agent.METRICS, math.nan)
    published = -math.inf

    while not run.signals and (run.step < args.total_timesteps or agent.owed(run.step)):
        # Receive: while it owes updates it asks for no steps, but answers; with --utd-ratio 0 it never waits.
        with run.phase("env"):
            owed = agent.owed(run.step)
            wait_ms = 0 if owed or not args.utd_ratio else 100
            received = actors.receive(wait_ms, args.total_timesteps - run.step, asks=not owed)
        # Store.
        count = sum(buffer.add(np.frombuffer(data, agent.step_type)[0], name) for name, data in received)
        if count:
            agent.normalizer.update(buffer.newest_observations(count))
        run.advance(count)
        # Learn.
        updates = min(agent.owed(run.step), PUBLISH_EVERY) if args.utd_ratio else PUBLISH_EVERY
        if updates and run.step > args.learning_starts:
            with run.phase("update"):
                metrics |= agent.update(buffer, demos, updates)
        if agent.critic_updates >= max(published + PUBLISH_EVERY, 1):
            actors.publish(agent.critic_updates, tensors.pack_tensors(agent.policy_tensors()))
            published = agent.critic_updates
        log_and_evaluate(args, run, agent, eval_env, metrics)
        # Save: actors may then forget what they sent.
        if run.should_save(2 * args.eval_every):
            run.save()
            actors.saved()

    actors.publish(agent.critic_updates, tensors.pack_tensors(agent.policy_tensors()), done=not run.signals)
    run.end_of_training(eval_env)
    run.finish(final_evaluation(args, agent, run, wrap))


def actor(args: Args) -> None:
    """Acts with the learner's newest policy and sends every step: SERL's actor."""
    env = wrap_env(make_env(args), args)
    device = tensors.set_up_torch(args.threads, args.amp)
    agent = Agent(views_of(env), env.action_space, args, device)
    run = Run(args, args.env_id, __file__, device)
    run.keep()
    shared, size = args.shared(), agent.step_type.itemsize
    ahead = ACTOR_AHEAD if args.utd_ratio else math.inf
    sender = link.Actor(args.address, args.curve_keys, shared, size, run.dir, ahead, lambda: run.signals > 0)
    run.open(args.total_timesteps)
    # Seeds follow from what its journal holds, so that no two episodes are the same, also after a restart.
    written, seed = sender.journal.written, args.seed + sender.number
    agent.generator.manual_seed(envs.episode_seed(seed, 0, written))
    run.episode = max(run.episode, written)
    version = 0
    obs, _ = env.reset(seed=envs.episode_seed(seed, 0, run.episode))
    sender.send(pack_step(agent.step_type, None, obs).tobytes())

    while not sender.done:
        # Act: uniformly at random until something is learned.
        with run.phase("act"):
            newer = sender.weights()
            if newer:
                version, weights = newer
                tensors.unpack_tensors(weights, agent.policy_tensors())
            action = agent.act(obs, deterministic=False) if version else agent.random_action()
        # Step the environment.
        with run.phase("env"):
            obs, reward, terminated, truncated, info = env.step(action)
        # Send.
        with run.phase("update"):
            sender.send(pack_step(agent.step_type, action, obs, reward, terminated).tobytes())
        run.advance()
        # Reset.
        if terminated or truncated or run.impatient():
            run.end_episode(info, success(info))
            if run.signals:
                break
            with run.phase("env"):
                obs, _ = env.reset(seed=envs.episode_seed(seed, 0, run.episode))
            sender.send(pack_step(agent.step_type, None, obs).tobytes())
            if run.should_save(2 * args.eval_every):
                run.save()
        # Log.
        if run.due(max(args.eval_every // 2, 1)):
            run.log("train", run.episodes() | run.speed())

    run.end_of_training(env)
    run.close()


def main(args: Args) -> None:
    if args.eval_only and args.role == "actor":
        fail(f"--eval-only {args.eval_only}: is an actor's run; give its learner's")
    role = "both" if args.eval_only else args.role
    with ends_well(args):
        {"both": train, "learner": learner, "actor": actor}[role](args)


if __name__ == "__main__":
    main(parse(Args, __doc__, Args.MAY_CHANGE))
