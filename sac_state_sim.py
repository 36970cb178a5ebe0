"""SAC from states, from plain SAC to the options of SERL, REDQ and RLPD, in one file.

    python sac_state_sim.py --seed 1                                # a Franka learns to pick up a cube
    python sac_state_sim.py --env-id HalfCheetah-v5 --demos 0       # benchmarks/run.py has good settings for it
    python sac_state_sim.py --resume RUN_DIR                        # go on after Ctrl-C or a crash
    python sac_state_sim.py --eval-only RUN_DIR --record-dataset franka/pick-v0
    python sac_state_sim.py --role learner                          # needs an actor; SERL's two processes
    python sac_state_sim.py --role actor --address 127.0.0.1:5588   # needs a learner; as many as you like

Expect: mean eval/success_rate >= 0.98, eval/success_rate >= 0.95 [benchmarks/results/sac_pick_default.csv]
Expect: wall_s <= 215, peak_mb <= 1000 (2 CPU cores) [benchmarks/results/sac_pick_default.csv]
Expect: eval/episodic_return >= 6000 [benchmarks/results/sac_halfcheetah_100k.csv]

Sources: SAC arXiv:1812.05905; random subsets of an ensemble, many updates per step: REDQ arXiv:2101.05982; LayerNorm
and 50/50 demonstration sampling: RLPD arXiv:2302.02948; imitation in the actor's loss: arXiv:1709.10089; targets over
several steps: Rainbow arXiv:1710.02298; mirrored transitions: arXiv:1909.10707; actor and learner: SERL
arXiv:2401.16013, agentlace.
Differs from SERL (serl_launcher, commit cd5f7e7): an optimizer steps only when its network is updated (SERL feeds zero
gradients through Adam, so that an actor updated every N-th tick moves about sqrt(N) times further per gradient); the
entropy for the temperature is that of the actor's own batch, not of next_observations; subsets are drawn without
replacement; the ratio of updates to steps is kept exactly, also with two processes; the policy that is evaluated is an
average of the learned ones.
New experiment: copy this file; `grep -n TASK: my_task.py` lists the places to edit. common/ holds what is not learning.
"""

import copy
import math
import os
import sys
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: spinning threads starve others

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from gymnasium import spaces
from torch import Tensor, nn

from common import envs, link, setup, tensors
from common.episodes import as_live_steps, demonstrations, last_evaluation, summary
from common.evaluation import evaluate, record_video, report
from common.recording import check_new_dataset
from common.run import Run
from common.setup import RunArgs, ends_well, fail, flag, has_checkpoint, parse
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


# --- Args -------------------------------------------------------------------------------------------------------------
@dataclass
class Args(RunArgs):
    record_dataset: str | None = None
    """store the last evaluation's episodes as this local Minari dataset, e.g. franka/pick-v0"""
    # environment
    env_id: str = "FrankaPickCube-v0"  # TASK: your task
    """gymnasium id, also module:Env-v0 or module:namespace/Env-v0, with Box or flattenable Dict
    observations and bounded Box actions"""
    action_chunk: int = 1
    """actions chosen at once and executed one after the other, rewards summed; for all other flags that is one step"""
    gripper_penalty: float = 0.0
    """subtracted from the reward when the gripper (last action) reverses its motion (SERL: 0.1)"""
    # training
    total_timesteps: int = 6_000
    """environment steps"""
    learning_starts: int = 500
    """environment steps with random actions before learning starts"""
    buffer_size: int = 1_000_000
    """transitions kept"""
    batch_size: int = 128
    """transitions per critic update, demonstrations included"""
    utd_ratio: int = 6
    """critic updates per environment step; 0, for a learner only: as many as time allows"""
    policy_delay: int = 2
    """critic updates per update of actor and temperature"""
    demos: str = "20"
    """demonstrations to collect from the scripted expert (0: none), or a Minari dataset of them"""
    demo_ratio: float = 0.5
    """fraction of each batch that is drawn from the demonstrations (RLPD: 0.5)"""
    demo_noise: float = 0.1
    """standard deviation of noise on the expert's actions, in [-1, 1]: shows how to recover"""
    eval_every: int = 1_000
    """steps between evaluations; twice as often a row of train.csv, half as often a checkpoint"""
    eval_episodes: int = 10
    """episodes per evaluation during training"""
    final_eval_episodes: int = 50
    """episodes of the last evaluation"""
    mirror: tuple[int, ...] = ()
    """entries of observation and action, numbered in one row, that change their sign in a mirror which leaves the task
    as it is: half of each batch is seen in it; FrankaPickCube-v0: 1 5 8 11, what points to the left"""
    # algorithm
    gamma: float = 0.97
    """discount factor per environment step"""
    n_step: int = 1
    """steps whose rewards a critic's target sums before it bootstraps (SAC: 1)"""
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
    alpha_init: float = 0.01
    """temperature at the start"""
    target_entropy_per_dim: float = -0.5
    """entropy per dimension of the action that the temperature seeks (SERL, RLPD: -0.5; SAC: -1)"""
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
    MAY_CHANGE += "total_timesteps eval_every eval_episodes final_eval_episodes address curve_keys"
    SHAPING = "env_id action_chunk gripper_penalty hidden_dims activation layer_norm "
    SHAPING += "normalize_observations std_parameterization"

    def check(self) -> None:
        """Exits with one line when a value is out of its range or contradicts another."""
        may_be_zero = {"seed", "mirror", "lr_warmup", "lr_decay", "utd_ratio"}
        fractions = {"gamma", "demo_ratio", "dropout", "explore_prob", "actor_ema"}
        setup.check_numbers(self, may_be_zero, fractions, any_sign={"target_entropy_per_dim"})
        if self.num_min_qs > self.num_qs:
            fail(f"--num-min-qs {self.num_min_qs}: there are only --num-qs {self.num_qs} critics to choose from")
        if not self.alpha_init or self.dropout == 1:
            fail("--alpha-init must be above 0, --dropout below 1")
        if self.total_timesteps <= self.learning_starts:
            fail(f"--total-timesteps {self.total_timesteps}: learning starts after {self.learning_starts}; give more")
        if self.utd_ratio == 0 and self.role == "both":
            fail("--utd-ratio 0: is for --role learner, which learns while an actor acts")
        if self.record_dataset:
            check_new_dataset(self.record_dataset)

    def shared(self) -> dict[str, object]:
        """What shapes task and policy, and so must be the same in actor and learner."""
        return {flag(name): getattr(self, name) for name in Args.SHAPING.split()}


# --- Environment ------------------------------------------------------------------------------------------------------
def make_env(args: Args, render: bool = False) -> gym.Env:
    """The task, as it is demonstrated and recorded."""
    env = envs.make(args.env_id, render)  # TASK: keyword options of your task
    return env  # TASK: wrappers of your own; one that changes actions has its own expert_action()


def wrap_env(env: gym.Env, args: Args) -> gym.Env:
    """The task: flat observations (O,), actions (A,) in [-1, 1]. Exits if it cannot be learned."""
    space = env.observation_space
    for _, box in envs.leaves(space):
        if envs.looks_like_image(box):
            fail(f"--env-id {args.env_id}: {box.shape} looks like images; use sac_pixel_sim.py, or flatten it (TASK)")
        if isinstance(box, spaces.Text):
            fail(f"--env-id {args.env_id}: observations hold {box}; leave it out in a wrapper (make_env)")
    if not space.is_np_flattenable or not spaces.flatdim(space):
        fail(f"--env-id {args.env_id}: observations must be a Box or a flattenable Dict, not {space}")
    env = envs.learnable(env, args.env_id)
    env = envs.ScaledActions(env)
    if args.gripper_penalty:
        env = envs.GripperPenalty(env, args.gripper_penalty)
    env = gym.wrappers.FlattenObservation(env)
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


def load_demos(args: Args, agent: "Agent", task: gym.Env, wrap: envs.Wrap) -> ReplayBuffer:
    """Demonstrations, stored as live steps; the normalizer begins with their observations."""
    episodes = list(demonstrations(args.demos, task, args.seed, args.demo_noise))
    steps = []
    for episode in episodes:
        for step in as_live_steps(episode, task, wrap, args.action_chunk):
            steps.append(pack_step(agent.step_type, *step))
    demos = agent.make_buffer(len(steps) - len(episodes))  # a reset is no transition
    for step in steps:
        demos.add(step)
    agent.normalizer.update(demos.newest_observations(len(demos)))
    print(f"demonstrations: {summary(episodes, success)}", flush=True)
    return demos


# --- Agent ------------------------------------------------------------------------------------------------------------
class Agent:
    """SAC with the options of REDQ, RLPD, DroQ and SERL."""

    PARTS = ("normalizer", "actor", "ema_actor", "critic", "target_critic")
    PARTS += ("actor_optimizer", "critic_optimizer", "alpha_optimizer")
    # Columns of train.csv, NaN in the rows before learning starts.
    METRICS = ("losses/critic_loss", "losses/q_values", "losses/actor_loss", "losses/entropy", "losses/alpha")

    def __init__(self, observation_space: spaces.Box, action_space: spaces.Box, args: Args, device: torch.device):
        self.args = args
        self.device = device
        (self.obs_dim,) = observation_space.shape
        (self.action_dim,) = action_space.shape
        self.step_type = step_type(self.obs_dim, self.action_dim)
        self.generator = torch.Generator(device).manual_seed(args.seed)
        torch.manual_seed(args.seed)  # the networks' initialisation
        self.normalizer = RunningNormalizer(self.obs_dim, args.normalize_observations).to(device)
        self.actor = Actor(self.obs_dim, self.action_dim, args).to(device)
        self.ema_actor = copy.deepcopy(self.actor).requires_grad_(False)
        self.critic = Critic(self.obs_dim, self.action_dim, args).to(device)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        # The temperature is softplus(raw_alpha), SERL networks/lagrange.py:77.
        raw_alpha = args.alpha_init + math.log(-math.expm1(-args.alpha_init))
        self.raw_alpha = nn.Parameter(torch.tensor(raw_alpha, device=device))
        self.target_entropy = args.target_entropy_per_dim * self.action_dim
        self.actor_optimizer = self.make_optimizer(self.actor.parameters(), args.weight_decay)
        self.critic_optimizer = self.make_optimizer(self.critic.parameters(), args.weight_decay)
        self.alpha_optimizer = self.make_optimizer([self.raw_alpha], 0.0)
        self.actor_parameters = list(self.actor.parameters())
        self.ema_parameters = list(self.ema_actor.parameters())
        self.critic_parameters = list(self.critic.parameters())
        self.target_parameters = list(self.target_critic.parameters())
        self.num_demos = round(args.demo_ratio * args.batch_size) if args.demos != "0" else 0
        self.ema_weight = torch.tensor(1 - args.actor_ema, device=device)
        entries = range(self.obs_dim + self.action_dim)
        if not set(args.mirror) <= set(entries):
            fail(f"--mirror {args.mirror}: observation and action have the entries 0 to {entries[-1]}")
        self.mirror_signs = torch.tensor([-1.0 if i in args.mirror else 1.0 for i in entries], device=device)
        # For `explore`: how many more steps each dimension of the action is held, and at which value.
        self.held_steps, self.held = np.zeros((2, self.action_dim // args.action_chunk), np.float32)
        self.critic_updates = 0
        self.second_thread = tensors.SecondThread(args.threads, device)
        if args.compile and device.type == "cuda":  # an update, and a choice, are one CUDA graph each
            self.critic_loss = torch.compile(self.critic_loss)
            self.actor_loss = torch.compile(self.actor_loss)
            self.update_once = tensors.Graphed(self.update_once, self.generator, eager=3 * args.policy_delay)
            self.choose = tensors.Graphed(self.choose, self.generator, eager=1)

    def make_buffer(self, capacity: int) -> ReplayBuffer:
        """A buffer of this agent's transitions. Exits with one line where memory is too small."""
        size = 8 * capacity * (2 * self.obs_dim + self.action_dim + 2)
        tensors.check_memory(size, f"buffer of {capacity:,} transitions and checkpoint", "give a smaller --buffer-size")
        return ReplayBuffer(capacity, self.obs_dim, self.action_dim, self.device, self.args.n_step, self.args.gamma)

    def make_optimizer(self, parameters, weight_decay: float) -> torch.optim.Optimizer:
        lr = torch.tensor(self.args.lr, device=self.device)  # a tensor: a CUDA graph follows it
        options = {"fused": True, "capturable": self.device.type == "cuda"}
        return torch.optim.AdamW(parameters, lr, weight_decay=weight_decay, **options)

    @torch.inference_mode()
    def act(self, obs: np.ndarray, deterministic: bool) -> np.ndarray:
        """Action (A,) in [-1, 1] for one observation (O,)."""
        observations = torch.as_tensor(obs, dtype=torch.float32, device=self.device)[None]  # (1, O)
        action = self.choose(observations, deterministic=deterministic)[0].cpu().numpy()
        if not np.isfinite(action).all():
            fail(f"the policy's actions are {action}: training has diverged; give a smaller --lr or smaller rewards")
        if self.args.explore_prob and not deterministic:
            self.explore(action)
        return action

    def choose(self, observations: Tensor, deterministic: bool) -> Tensor:
        """Actions (B, A) in [-1, 1] for observations (B, O): the averaged policy's mean, or a sample."""
        actor = self.ema_actor if deterministic else self.actor
        mean, std = actor(self.normalizer(observations))
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

    def critic_loss(self, batch: Batch, eps: Tensor, subset: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared soft Bellman error with noise eps (B, A) and target critics `subset` (M,)."""
        generator = self.generator if self.args.dropout else None
        with torch.no_grad():  # target, arXiv:1812.05905 eq. 3; subsets: arXiv:2101.05982 alg. 1
            next_actions, next_log_pi = self.actor.sample(batch.next_observations, eps)  # (B, A), (B,)
            next_q_values = self.target_critic(batch.next_observations, next_actions, generator)  # (E, B)
            next_q = next_q_values[subset].amin(0)  # (B,)
            if self.args.backup_entropy:
                next_q = next_q - self.alpha * next_log_pi
            target_q = batch.rewards + self.args.gamma * (1 - batch.terminations) * next_q  # (B,)
        q_values = self.critic(batch.observations, batch.actions, generator)  # (E, B)
        loss = (q_values - target_q).square().mean()  # over E, B; SERL agents/continuous/sac.py:183
        return loss, {"losses/critic_loss": loss.detach(), "losses/q_values": q_values.detach().mean()}

    def actor_loss(self, batch: Batch, eps: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Soft policy improvement, and imitation of demonstrations, the batch's last rows."""
        mean, std = self.actor(batch.observations)  # (B, A)
        actions, log_pi = squash(mean, std, eps)  # (B, A), (B,)
        q = self.critic(batch.observations, actions).mean(0)  # (B,)
        loss = (self.alpha.detach() * log_pi - q).mean()
        if self.num_demos and self.args.bc_weight:  # arXiv:1709.10089 eq. 2, arXiv:2106.06860 eq. 3
            error = mean[-self.num_demos :].tanh() - batch.actions[-self.num_demos :]  # (D, A)
            loss = loss + self.args.bc_weight * error.square().sum(-1).mean()
        return loss, {"losses/actor_loss": loss.detach(), "losses/entropy": -log_pi.detach().mean()}

    def critic_gradient(self, batch: Batch, eps: Tensor, subset: Tensor) -> dict[str, Tensor]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.amp):
            loss, metrics = self.critic_loss(batch, eps, subset)
        self.critic_optimizer.zero_grad()
        loss.backward()
        return metrics

    def actor_gradient(self, batch: Batch, eps: Tensor) -> dict[str, Tensor]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.amp):
            loss, metrics = self.actor_loss(batch, eps)
        self.actor_optimizer.zero_grad()
        loss.backward(inputs=self.actor_parameters)  # spares the critics' weight gradients
        self.alpha_optimizer.zero_grad()
        (self.alpha * (metrics["losses/entropy"] - self.target_entropy)).backward()
        return metrics | {"losses/alpha": self.alpha.detach()}

    def step_critic(self) -> None:
        self.critic_optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.target_parameters, self.critic_parameters, TAU)

    def step_actor(self) -> None:
        self.actor_optimizer.step()
        self.alpha_optimizer.step()
        with torch.no_grad():
            for average, parameter in zip(self.ema_parameters, self.actor_parameters, strict=True):
                average.lerp_(parameter, self.ema_weight)

    def update_once(self, *inputs: Tensor, with_actor: bool) -> dict[str, Tensor]:
        """One critic step on a batch and, `with_actor`, one step of actor and temperature.
        `inputs`, one by one as a CUDA graph takes them: the batch's fields (B, ...), noise for the two
        steps (2, B, A), critics for the target (M,). Both gradients are of the same parameters, as SERL takes them
        (agents/continuous/sac.py:276), so that two threads share the work."""
        *fields, eps, subset = inputs
        batch = Batch(*fields)
        batch = batch._replace(
            observations=self.normalizer(batch.observations),
            next_observations=self.normalizer(batch.next_observations),
        )
        if with_actor:
            actor_metrics = self.second_thread(self.actor_gradient, batch, eps[1])
        metrics = self.critic_gradient(batch, eps[0], subset)
        if with_actor:
            metrics |= actor_metrics()
            self.step_actor()
        self.step_critic()
        return metrics

    def mirror(self, batches: Batch) -> Batch:
        """Transitions (C, B), each with even chances as it is or as a mirror shows it."""
        draws = torch.rand(batches.rewards.shape, generator=self.generator, device=self.device)
        signs = torch.where(draws[..., None] < 0.5, self.mirror_signs, 1.0)  # (C, B, O + A)
        obs_signs, action_signs = signs.split([self.obs_dim, self.action_dim], -1)
        return batches._replace(
            observations=batches.observations * obs_signs,
            actions=batches.actions * action_signs,
            next_observations=batches.next_observations * obs_signs,
        )

    def update(self, buffer: ReplayBuffer, demos: ReplayBuffer | None, count: int) -> dict[str, Tensor]:
        """`count` critic updates and the actor updates then due; the newest metrics, detached."""
        batches = buffer.sample((count, self.args.batch_size - self.num_demos), self.generator)
        if self.num_demos:
            demo_batches = demos.sample((count, self.num_demos), self.generator)
            batches = Batch(*(torch.cat(pair, 1) for pair in zip(batches, demo_batches)))  # (count, B, ...)
        if self.args.mirror:
            batches = self.mirror(batches)
        shape = (count, 2, self.args.batch_size, self.action_dim)
        eps = torch.randn(shape, generator=self.generator, device=self.device)
        draws = torch.rand(count, self.args.num_qs, generator=self.generator, device=self.device)
        subsets = draws.topk(self.args.num_min_qs).indices  # (count, M), distinct
        metrics = {}
        for i in range(count):
            self.critic_updates += 1
            self.schedule_lr()
            # A plain mean of all actors at first, so that the random first one does not stay in it.
            self.ema_weight.fill_(max(1 - self.args.actor_ema, self.args.policy_delay / self.critic_updates))
            with_actor = self.critic_updates % self.args.policy_delay == 0
            batch = [field[i] for field in batches]
            metrics |= self.update_once(*batch, eps[i], subsets[i], with_actor=with_actor)
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
        """What acting needs: the actor's parameters and the normalizer's statistics."""
        return [*self.actor.state_dict().values(), self.normalizer.mean, self.normalizer.var]

    def state_dict(self) -> dict:
        """Exits with one line, so that it is not saved, when training has diverged."""
        parameters = [*self.critic_parameters, *self.actor_parameters]
        if not all(torch.isfinite(parameter).all() for parameter in parameters):
            fail("the networks' weights are not finite: training has diverged; give a smaller --lr or smaller rewards")
        state = {name: getattr(self, name).state_dict() for name in self.PARTS}
        state["raw_alpha"] = self.raw_alpha.detach()
        state["critic_updates"] = self.critic_updates
        state["generator"] = self.generator.get_state()
        state["held"] = (self.held_steps.tolist(), self.held.tolist())
        return state

    def load_state_dict(self, state: dict) -> None:
        """Raises KeyError, ValueError or RuntimeError when the state is of other networks."""
        for name in self.PARTS:
            getattr(self, name).load_state_dict(state[name])
        with torch.no_grad():
            self.raw_alpha.copy_(state["raw_alpha"])
        self.critic_updates = state["critic_updates"]
        self.held_steps, self.held = np.array(state["held"], np.float32)
        for optimizer in (self.actor_optimizer, self.critic_optimizer, self.alpha_optimizer):
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
def start(args: Args, task: gym.Env, wrap: envs.Wrap) -> tuple[Run, Agent, ReplayBuffer, ReplayBuffer | None]:
    """Parts of a new run, with demonstrations, or of one that goes on: then `Run.keep` loads them."""
    device = tensors.set_up_torch(args.threads, args.amp)
    env = wrap(task)
    agent = Agent(env.observation_space, env.action_space, args, device)
    buffer = agent.make_buffer(min(args.buffer_size, args.total_timesteps))
    demos = None
    if args.demos != "0" and has_checkpoint(args.run_dir):
        demos = agent.make_buffer(1)  # grows when it is loaded
    elif args.demos != "0":
        demos = load_demos(args, agent, task, wrap)
    return Run(args, args.env_id, __file__, device), agent, buffer, demos


def train(args: Args) -> None:
    """One process that acts and learns."""
    wrap = partial(wrap_env, args=args)
    task = make_env(args)
    run, agent, buffer, demos = start(args, task, wrap)
    run.keep(agent=agent, buffer=buffer, demos=demos)
    if args.eval_only:
        task.close()
        return report("checkpoint", final_evaluation(args, agent, run, wrap))
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
    agent = Agent(env.observation_space, env.action_space, args, device)
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
