"""sac_state_sim.py: against SERL's arrays, torch.distributions, cases by hand, tasks of known value, and as a user."""

import contextlib
import copy
import dataclasses
import io
import json
import math
import os
import re
import shutil
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import probe_envs
import pytest
import torch
from conftest import REPO, leaves, read_checkpoint, read_csv, run_script, same
from gymnasium import spaces
from state_runs import POINT, SCRIPT, TASKS, TINY, AllAtOnce, run
from torch import distributions

import sac_state_sim
from common import envs
from common.episodes import spread_starts
from common.tensors import pack_step, pack_tensors, step_type, unpack_tensors
from sac_state_sim import (
    MLP,
    TAU,
    Agent,
    Args,
    Batch,
    ReplayBuffer,
    load_demos,
    make_env,
    wrap_env,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:minari")
CPU = torch.device("cpu")
STEP = step_type(3, 2)  # of small agents
FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(autouse=True, scope="module")
def _exact_and_on_one_thread():
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


def box(size: int) -> spaces.Box:
    return spaces.Box(-1, 1, (size,), np.float32)


def small_args(**changes) -> Args:
    return Args(**{"hidden_dims": (16, 16), "batch_size": 8, "demos": "0", "compile": False, "threads": 1} | changes)


def small_agent(obs_dim: int = 3, action_dim: int = 2, **changes) -> Agent:
    return Agent(box(obs_dim), box(action_dim), small_args(**changes), CPU)


def random_batch(size: int, obs_dim: int = 3, action_dim: int = 2, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    obs, next_obs = torch.randn(2, size, obs_dim, generator=generator)
    actions = torch.rand(size, action_dim, generator=generator) * 2 - 1
    rewards, ends = torch.randn(size, generator=generator), torch.rand(size, generator=generator) < 0.3
    return Batch(obs, actions, rewards, next_obs, ends.float())


def fill(buffer: ReplayBuffer, batch: Batch) -> ReplayBuffer:
    """Adds transitions, each an episode of its own."""
    dtype = step_type(batch.observations.shape[1], batch.actions.shape[1])
    for obs, action, reward, next_obs, end in zip(*(column.cpu().numpy() for column in batch)):
        buffer.add(pack_step(dtype, None, obs))
        buffer.add(pack_step(dtype, action, next_obs, reward, end))
    return buffer


def filled_buffer(size: int = 64, obs_dim: int = 3, action_dim: int = 2, capacity: int = 100) -> ReplayBuffer:
    return fill(ReplayBuffer(capacity, obs_dim, action_dim, CPU), random_batch(size, obs_dim, action_dim))


def parameters_of(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in module.parameters()])


def assert_close(ours, theirs, tolerance: float = 1e-5):
    """|ours - theirs| <= tolerance * (1 + |theirs|)."""
    ours = ours.detach().numpy() if isinstance(ours, torch.Tensor) else ours
    np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


def update_critic(agent: Agent, batch: Batch, eps: torch.Tensor, subset: torch.Tensor) -> dict[str, torch.Tensor]:
    metrics = agent.critic_gradient(batch, eps, subset)
    agent.step_critic()
    return metrics


def update_actor(agent: Agent, batch: Batch, eps: torch.Tensor) -> dict[str, torch.Tensor]:
    metrics = agent.actor_gradient(batch, eps)
    agent.step_actor()
    return metrics


# --- SERL's numbers ---------------------------------------------------------------------------------------------------
SERL_FLAGS = {
    "hidden_dims": (256, 256),
    "activation": "tanh",
    "num_qs": 4,
    "num_min_qs": 2,
    "normalize_observations": False,
    "backup_entropy": False,
    "target_entropy_per_dim": -0.5,
}


@pytest.fixture(scope="module")
def networks() -> dict[str, np.ndarray]:
    return dict(np.load(FIXTURES / "sac_networks.npz"))


@pytest.fixture(scope="module")
def losses() -> dict[str, np.ndarray]:
    return {k: v for name in ("sac_losses", "sac_losses_targets") for k, v in np.load(FIXTURES / f"{name}.npz").items()}


def flax_name(name: str, head: str) -> str:
    """Our parameter's name in the arrays of the original."""
    name = name.replace("trunk.linears.", "network/Dense_").replace("trunk.norms.", "network/LayerNorm_")
    name = name.replace(".weight", "/scale" if "LayerNorm" in name else "/kernel").replace(".bias", "/bias")
    return name.replace("log_std/", "Dense_1/").replace(f"{head}/", "Dense_0/")


def flax_parameters(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    head = "mean" if hasattr(module, "mean") else "q"
    return {flax_name(name, head): parameter for name, parameter in module.named_parameters()}


def load_flax(module: torch.nn.Module, arrays: dict[str, np.ndarray], prefix: str) -> None:
    """Takes over every array under `prefix`, none left over, none missing."""
    ours = flax_parameters(module)
    assert ours.keys() == {key.removeprefix(prefix) for key in arrays if key.startswith(prefix)}
    for name, parameter in ours.items():
        parameter.data.copy_(torch.from_numpy(arrays[prefix + name]).reshape(parameter.shape))


def serl_agent(networks: dict[str, np.ndarray], losses: dict[str, np.ndarray] | None = None, **changes) -> Agent:
    obs, actions = networks["in/obs"], networks["in/actions"]
    if losses:
        assert losses["in/tau"].item() == pytest.approx(TAU)
        changes |= {"gamma": losses["in/discount"].item(), "lr": losses["in/lr"].item()}
    agent = small_agent(obs.shape[1], actions.shape[1], **SERL_FLAGS | changes)
    for actor in (agent.actor, agent.ema_actor):
        load_flax(actor, networks, "params/actor/")
    load_flax(agent.critic, networks, "params/critic/")
    if losses:
        load_flax(agent.target_critic, losses, "target_params/critic/")
    agent.raw_alpha.data.fill_(networks["params/temperature/lagrange"].item())
    return agent


def serl_batch(losses: dict[str, np.ndarray]) -> Batch:
    names = ("observations", "actions", "rewards", "next_observations")
    return Batch(*(torch.from_numpy(losses[f"in/{name}"]) for name in names), 1 - torch.from_numpy(losses["in/masks"]))


def critic_loss_of_serl(agent: Agent, losses: dict[str, np.ndarray], batch: Batch | None = None):
    """The script's critic loss with the original's next actions and subset."""
    drawn = torch.from_numpy(losses["in/next_actions"]), torch.from_numpy(losses["in/next_log_probs"])
    agent.actor.sample = lambda obs, eps: drawn
    batch = batch or serl_batch(losses)
    return agent.critic_loss(batch, torch.zeros_like(batch.actions), torch.from_numpy(losses["in/subset"]).long())


def kept_rows(array: np.ndarray, stored: np.ndarray) -> np.ndarray:
    """The part of one of our parameters or gradients that the fixtures keep; fixtures/README.md."""
    array = array[..., ::8, :] if array.shape[-2:] == (256, 256) else array
    return array.reshape(stored.shape)


def assert_gradients(module: torch.nn.Module, losses: dict[str, np.ndarray], prefix: str) -> None:
    for name, parameter in flax_parameters(module).items():
        gradient, stored = parameter.grad.numpy(), losses[prefix + name]
        norm = losses[f"norm/{prefix}{name}"]
        np.testing.assert_allclose(np.linalg.norm(gradient.astype(np.float64)), norm, rtol=1e-5, err_msg=name)
        kept = kept_rows(gradient, stored)
        np.testing.assert_allclose(kept, stored, rtol=0, atol=1e-5 * abs(stored).max(), err_msg=name)


def test_serl_policy(networks):
    agent = serl_agent(networks)
    obs, eps = torch.from_numpy(networks["in/obs"]), torch.from_numpy(networks["in/eps"])
    mean, std = agent.actor(obs)
    assert_close(mean, networks["out/mean"])
    assert_close(std, networks["out/std"])
    assert networks["out/std"].max() == 5.0 == std.max()  # the upper clip is reached
    actions, log_pi = agent.actor.sample(obs, eps)
    assert_close(actions, networks["out/sample"])
    assert_close(log_pi, networks["out/sample_log_prob"])
    for row, mode in zip(networks["in/obs"], networks["out/mode"]):
        assert_close(agent.act(row, deterministic=True), mode)


def test_serl_log_density_of_given_actions(networks):
    agent = serl_agent(networks)
    obs, actions = torch.from_numpy(networks["in/obs"]), torch.from_numpy(networks["in/actions"])
    mean, std = agent.actor(obs)
    sampled, log_pi = agent.actor.sample(obs, (actions.double().atanh().float() - mean) / std)
    assert_close(sampled, networks["in/actions"])
    assert_close(log_pi, networks["out/log_prob"], 3e-5)  # the way through atanh costs a digit


def test_serl_lower_clip_of_std(networks):
    agent = serl_agent(networks)
    agent.actor.log_std.bias.data.copy_(torch.from_numpy(networks["clip/log_std_bias"]).reshape(1, 1, -1))
    _, std = agent.actor(torch.from_numpy(networks["in/obs"]))
    assert std.min().item() == np.float32(1e-5) == networks["clip/std"].min()
    np.testing.assert_allclose(std.detach().numpy(), networks["clip/std"], rtol=2e-5)


def test_serl_critics(networks):
    agent = serl_agent(networks)
    obs, actions = torch.from_numpy(networks["in/obs"]), torch.from_numpy(networks["in/actions"])
    assert_close(agent.critic(obs, actions), networks["out/q"])
    for i in range(networks["in/multi_actions"].shape[1]):
        q_values = agent.critic(obs, torch.from_numpy(networks["in/multi_actions"][:, i]))
        assert_close(q_values, networks["out/q_multi"][:, :, i])


def test_serl_temperature_and_target_entropy(networks):
    agent = serl_agent(networks)
    assert_close(agent.alpha, networks["out/temperature"], 1e-6)
    assert agent.target_entropy == networks["out/target_entropy"]


def test_a_temperature_of_any_size():
    for alpha in (1e-4, 0.01, 1000.0):
        assert small_agent(alpha_init=alpha).alpha.item() == pytest.approx(alpha, rel=1e-5)


def test_serl_critic_target(networks, losses):
    """The target itself: a critic that answers 0 has the mean of its squares as loss, a critic per row its own."""
    agent, target_q = serl_agent(networks, losses), losses["out/target_q"]
    agent.critic.forward = lambda obs, actions, generator=None: torch.zeros(4, len(obs))
    for row in range(len(target_q)):
        drawn = torch.from_numpy(losses["in/next_actions"])[row : row + 1], torch.zeros(1)
        agent.actor.sample = lambda obs, eps, drawn=drawn: drawn
        batch = Batch(*(column[row : row + 1] for column in serl_batch(losses)))
        loss, _ = agent.critic_loss(batch, torch.zeros(1, 4), torch.from_numpy(losses["in/subset"]).long())
        assert_close(loss.sqrt(), abs(target_q[row]))
    q_values = serl_agent(networks, losses).target_critic(
        torch.from_numpy(losses["in/next_observations"]), torch.from_numpy(losses["in/next_actions"])
    )
    assert_close(q_values, losses["out/target_next_qs"])


def test_serl_critic_loss_and_gradients(networks, losses):
    agent = serl_agent(networks, losses)
    loss, metrics = critic_loss_of_serl(agent, losses)
    assert_close(loss, losses["out/critic_loss"])
    assert_close(metrics["losses/critic_loss"], losses["out/critic_loss"])
    assert_close(metrics["losses/q_values"], losses["out/predicted_qs"].mean())
    loss.backward()
    assert_gradients(agent.critic, losses, "grad/critic/")
    assert all(p.grad is None for p in [*agent.target_critic.parameters(), *agent.actor.parameters()])


def test_serl_actor_loss_and_gradients(networks, losses):
    agent = serl_agent(networks, losses)
    batch, eps = serl_batch(losses), torch.from_numpy(losses["in/eps"])
    actions, log_pi = agent.actor.sample(batch.observations, eps)
    assert_close(actions, losses["out/actor_actions"])
    assert_close(log_pi, losses["out/actor_log_probs"])
    loss, metrics = agent.actor_loss(batch, eps)
    assert_close(loss, losses["out/actor_loss"])
    assert_close(metrics["losses/entropy"], -losses["out/actor_log_probs"].mean())
    loss.backward()
    assert_gradients(agent.actor, losses, "grad/actor/")
    assert agent.raw_alpha.grad is None  # the temperature is a constant to the actor


def test_serl_temperature_gradient(networks, losses):
    agent = serl_agent(networks, losses)
    batch, eps = serl_batch(losses), torch.from_numpy(losses["in/eps"])
    loss, metrics = agent.actor_loss(batch, eps)
    entropy = torch.tensor(losses["in/entropy"].item())
    agent.actor_loss = lambda *_: (loss, metrics | {"losses/entropy": entropy})
    assert_close(agent.alpha * (entropy - agent.target_entropy), losses["out/temperature_loss"])
    before = agent.raw_alpha.item()
    update_actor(agent, batch, eps)
    assert_close(agent.raw_alpha.grad, losses["grad/temperature/lagrange"])
    sign = np.sign(losses["grad/temperature/lagrange"])
    assert agent.raw_alpha.item() - before == pytest.approx(-sign * agent.args.lr, rel=1e-3)  # Adam's first step


def test_serl_adam_step_then_target_update(networks, losses):
    agent = serl_agent(networks, losses)
    critic, target = flax_parameters(agent.critic), flax_parameters(agent.target_critic)
    old_critic = {name: parameter.detach().clone() for name, parameter in critic.items()}
    old_target = {name: parameter.detach().clone() for name, parameter in target.items()}
    drawn = torch.from_numpy(losses["in/next_actions"]), torch.from_numpy(losses["in/next_log_probs"])
    agent.actor.sample = lambda obs, eps: drawn
    subset = torch.from_numpy(losses["in/subset"]).long()
    update_critic(agent, serl_batch(losses), torch.zeros(16, 4), subset)
    for name in critic:
        # exactly the stored gradients through the script's optimizer, then its target update's rule
        stored = losses[f"grad/critic/{name}"]
        parameter = torch.nn.Parameter(torch.from_numpy(kept_rows(old_critic[name].numpy(), stored).copy()))
        parameter.grad = torch.from_numpy(stored)
        agent.make_optimizer([parameter], 0.0).step()
        after_adam = losses[f"out/params_after_adam/critic/{name}"]
        np.testing.assert_allclose(parameter.detach().numpy(), after_adam, rtol=0, atol=1.5e-7, err_msg=name)
        # the script's whole step; where the gradient is nearly 0, the direction of Adam's first step is not determined
        clear = abs(stored) > 1e-3 * abs(stored).max()
        ours, ours_target = (kept_rows(x[name].detach().numpy(), stored) for x in (critic, target))
        np.testing.assert_allclose(ours[clear], after_adam[clear], rtol=0, atol=2e-6, err_msg=name)
        target_after = losses[f"out/target_after_update/critic/{name}"]
        np.testing.assert_allclose(ours_target[clear], target_after[clear], rtol=0, atol=3e-7, err_msg=name)
        before = kept_rows(old_target[name].numpy(), stored)
        moved = before + TAU * (ours - before)
        np.testing.assert_allclose(ours_target, moved, rtol=0, atol=1.2e-7, err_msg=name)


@pytest.mark.parametrize(("case", "warmup"), [("plain", 0), ("warmup", 5)])
def test_serl_optimizer_and_warm_up(losses, case, warmup):
    """Eight ticks from 0 with warm-up counted from a first learning rate of 0."""
    agent, parameter = small_agent(lr_warmup=warmup), torch.nn.Parameter(torch.zeros(losses["optim/grads"].shape[1]))
    agent.actor_optimizer = agent.make_optimizer([parameter], 0.0)
    for tick, gradient in enumerate(losses["optim/grads"]):
        agent.critic_updates += 1
        agent.schedule_lr()
        parameter.grad = torch.from_numpy(gradient.copy())
        agent.actor_optimizer.step()
        lr = float(agent.actor_optimizer.param_groups[0]["lr"])
        assert lr == pytest.approx(losses[f"optim/{case}/lr"][tick], rel=1e-6, abs=1e-12)
        expected = losses[f"optim/{case}/params"][tick]
        np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-5, atol=3e-9)


# --- Policy -----------------------------------------------------------------------------------------------------------
def test_log_density_is_that_of_torch_distributions():
    agent = small_agent()
    obs = torch.randn(500, 3, generator=torch.Generator().manual_seed(0)) * 10  # far into tanh's tails
    eps = torch.randn(500, 2, generator=torch.Generator().manual_seed(1)) * 2
    actions, log_pi = agent.actor.sample(obs, eps)
    mean, std = (x.double() for x in agent.actor(obs))
    gaussian = distributions.Independent(distributions.Normal(mean, std), 1)
    squashed = distributions.TransformedDistribution(gaussian, [distributions.TanhTransform(cache_size=1)])
    u = mean + std * eps
    transform = distributions.TanhTransform()
    expected = gaussian.log_prob(u) - transform.log_abs_det_jacobian(u, u.tanh()).sum(-1)
    torch.testing.assert_close(log_pi.double(), expected, rtol=1e-5, atol=1e-4)
    moderate = u.abs().amax(-1) < 3  # there the distribution itself can invert tanh
    assert moderate.sum() > 100
    torch.testing.assert_close(log_pi.double()[moderate], squashed.log_prob(u.tanh())[moderate], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(actions, u.tanh().float(), rtol=1e-5, atol=1e-6)
    assert torch.isfinite(agent.actor.sample(obs * 1e4, eps * 1e4)[1]).all()


@pytest.mark.parametrize(
    ("name", "function"), [("exp", np.exp), ("softplus", lambda raw: np.log1p(np.exp(raw)))], ids=["exp", "softplus"]
)
def test_std_by_exp_and_softplus(name, function):
    actor, raw = small_agent(std_parameterization=name).actor, np.array([-20.0, 0.2])
    actor.log_std.bias.data.copy_(torch.tensor(raw))
    actor.log_std.weight.data.zero_()
    _, std = actor(torch.randn(4, 3))
    np.testing.assert_allclose(std.detach(), np.tile(np.clip(function(raw), 1e-5, 5), (4, 1)), 1e-6)


def test_std_as_one_vector_or_a_constant():
    actor = small_agent(std_parameterization="uniform").actor
    _, std = actor(torch.randn(4, 3))
    assert torch.equal(std, torch.ones(4, 2))
    std.sum().backward()
    assert torch.equal(actor.log_std.grad, torch.full((2,), 4.0))
    actor = small_agent(std_parameterization="fixed").actor
    torch.testing.assert_close(actor(torch.randn(4, 3))[1], torch.full((4, 2), 0.1))
    assert not any("std" in name for name, _ in actor.named_parameters())


def test_act_is_a_sample_or_the_mode():
    agent, obs = small_agent(), np.array([0.1, -0.2, 0.3])
    mean, std = (x[0].detach() for x in agent.actor(torch.tensor(obs, dtype=torch.float32)[None]))
    assert_close(agent.act(obs, deterministic=True), mean.tanh())
    assert np.array_equal(agent.act(obs, deterministic=True), agent.act(obs, deterministic=True))
    drawn = np.arctanh(np.array([agent.act(obs, deterministic=False) for _ in range(3000)], float))
    np.testing.assert_allclose(drawn.mean(0), mean, atol=4 * std.max().item() / 3000**0.5)
    np.testing.assert_allclose(drawn.std(0), std, rtol=0.06)


def test_initialisation_is_xavier_uniform_and_independent():
    agent = small_agent(hidden_dims=(64, 64), num_qs=3)
    weight = agent.critic.trunk.linears[1].weight.detach()  # (E, 64, 64)
    bound = math.sqrt(6 / 128)
    assert weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    assert not torch.equal(weight[0], weight[1])
    assert all(torch.equal(*pair) for pair in zip(agent.critic.parameters(), agent.target_critic.parameters()))
    assert not torch.equal(parameters_of(agent.actor), parameters_of(small_agent(hidden_dims=(64, 64), seed=2).actor))
    assert agent.alpha.item() == pytest.approx(agent.args.alpha_init, rel=1e-5)


def test_no_layer_norm_is_a_plain_mlp():
    agent = small_agent(layer_norm=False, activation="silu", num_qs=2)
    plain = torch.nn.Sequential(
        *(torch.nn.Linear(5, 16), torch.nn.SiLU(), torch.nn.Linear(16, 16), torch.nn.SiLU(), torch.nn.Linear(16, 1))
    )
    obs, actions = torch.randn(7, 3), torch.randn(7, 2)
    for e in range(2):
        for linear, ours in zip(plain[::2], [*agent.critic.trunk.linears, agent.critic.q]):
            linear.weight.data, linear.bias.data = ours.weight[e].T, ours.bias[e].flatten()
        torch.testing.assert_close(plain(torch.cat([obs, actions], 1))[:, 0], agent.critic(obs, actions)[e])


# --- Losses -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backup_entropy", [False, True])
def test_critic_target_by_hand(backup_entropy):
    """Subset minimum, entropy, termination and discount; REDQ's algorithm 1 written out."""
    agent = small_agent(num_qs=3, num_min_qs=2, gamma=0.9, alpha_init=0.5, backup_entropy=backup_entropy)
    next_q = torch.tensor([[1.0, 2.0], [5.0, -9.0], [0.5, 7.0]])  # (E, B)
    agent.actor.sample = lambda obs, eps: (torch.zeros(2, 2), torch.tensor([-1.0, 3.0]))
    agent.target_critic.forward = lambda obs, actions, generator=None: next_q
    agent.critic.forward = lambda obs, actions, generator=None: torch.zeros(3, 2)
    zeros = torch.zeros(2, 3)
    batch = Batch(zeros, zeros[:, :2], torch.tensor([3.0, -1.0]), zeros, torch.tensor([0.0, 1.0]))
    loss, _ = agent.critic_loss(batch, torch.zeros(2, 2), torch.tensor([0, 2]))
    entropy = 0.5 * -1.0 if backup_entropy else 0.0
    targets = [3.0 + 0.9 * (min(1.0, 0.5) - entropy), -1.0]
    assert loss.item() == pytest.approx(np.mean(np.square(targets)), rel=1e-5)


def test_update_draws_distinct_critics_uniformly():
    agent, buffer, pairs = small_agent(num_qs=4, num_min_qs=2), filled_buffer(), []
    agent.critic_gradient = lambda batch, eps, subset: pairs.append(tuple(sorted(subset.tolist()))) or {}
    agent.actor_gradient, agent.step_critic, agent.step_actor = (lambda *_: {}, *[lambda: None] * 2)
    agent.update(buffer, None, 600)
    counts = {pair: pairs.count(pair) for pair in set(pairs)}
    assert set(counts) == {(i, j) for j in range(4) for i in range(j)}  # all six pairs, no repeated critic
    assert min(counts.values()) > 60  # 100 expected, standard deviation 9


def test_actor_maximises_the_mean():
    agent, batch = small_agent(num_qs=3), random_batch(5)
    actions, log_pi = agent.actor.sample(batch.observations, eps := torch.randn(5, 2))
    q_values = agent.critic(batch.observations, actions).detach().numpy()
    expected = (agent.args.alpha_init * log_pi.detach().numpy() - q_values.mean(0)).mean()
    assert agent.actor_loss(batch, eps)[0].item() == pytest.approx(expected, rel=1e-5)


def test_actor_imitates_the_demonstrations_of_its_batch():
    """bc_weight times the squared distance of the mode to the last rows' actions, beside the loss without it."""
    agent = small_agent(bc_weight=3.0, demos="1", batch_size=6, demo_ratio=1 / 3)
    batch, eps = random_batch(6), torch.randn(6, 2)
    modes = np.array([agent.act(obs, deterministic=True) for obs in batch.observations.numpy()])
    distances = np.square(modes - batch.actions.numpy()).sum(1)
    without = [small_agent(bc_weight=0.0, demos="1"), small_agent(demos="0")]
    without, also = (other.actor_loss(batch, eps)[0].item() for other in without)
    assert without == also
    assert agent.actor_loss(batch, eps)[0].item() - without == pytest.approx(3 * distances[-2:].mean(), rel=1e-4)


def test_actor_step_leaves_the_critics_alone():
    agent, batch, eps = small_agent(), random_batch(8), torch.randn(8, 2)
    critic, actor = parameters_of(agent.critic), parameters_of(agent.actor)
    update_actor(agent, batch, eps)
    assert torch.equal(parameters_of(agent.critic), critic)
    assert all(parameter.grad is None for parameter in agent.critic.parameters())
    assert not torch.equal(parameters_of(agent.actor), actor)


def test_temperature_follows_the_entropy():
    batch, eps = random_batch(64), torch.randn(64, 2)
    for target_entropy_per_dim, rises in ((-50.0, False), (50.0, True)):
        agent = small_agent(target_entropy_per_dim=target_entropy_per_dim)
        before = agent.alpha.item()
        update_actor(agent, batch, eps)
        assert (agent.alpha.item() > before) is rises


def test_evaluation_acts_with_the_averaged_actor():
    obs = np.array([0.1, -0.2, 0.3])
    agent, buffer, decay = small_agent(actor_ema=0.75, policy_delay=2, lr=0.01), filled_buffer(), 0.75
    average = parameters_of(agent.actor)
    for number in range(1, 8):
        agent.update(buffer, None, 2)
        weight = max(1 - decay, 1 / number)  # a plain mean at first
        average = (1 - weight) * average + weight * parameters_of(agent.actor)
    torch.testing.assert_close(parameters_of(agent.ema_actor), average, rtol=1e-5, atol=1e-6)
    mode = agent.ema_actor(agent.normalizer(torch.tensor(obs, dtype=torch.float32)[None]))[0].tanh()[0]
    assert_close(agent.act(obs, deterministic=True), mode.detach().numpy())
    agent = small_agent(actor_ema=0.0, policy_delay=1)
    agent.update(buffer, None, 5)
    assert torch.equal(parameters_of(agent.ema_actor), parameters_of(agent.actor))


def test_both_steps_start_from_the_same_parameters():
    one, alone = small_agent(policy_delay=1), small_agent()
    batch, eps, subset = random_batch(8), torch.randn(2, 8, 2), torch.tensor([0, 1])
    one.update_once(*batch, eps, subset, with_actor=True)
    batch = batch._replace(observations=alone.normalizer(batch.observations))
    update_actor(alone, batch, eps[1])  # with the critics of before their step
    assert torch.equal(parameters_of(one.actor), parameters_of(alone.actor))
    assert not torch.equal(parameters_of(one.critic), parameters_of(alone.critic))
    alone = small_agent()
    update_critic(alone, batch._replace(next_observations=alone.normalizer(batch.next_observations)), eps[0], subset)
    assert torch.equal(parameters_of(one.critic), parameters_of(alone.critic))  # with noise of its own
    assert all(parameter.grad is None for parameter in alone.actor.parameters())  # nor does the target train the actor
    assert all(parameter.grad is not None for parameter in one.critic.parameters())


def test_bfloat16_comes_near_float32():
    losses = []
    for amp in (False, True):
        agent, batch, eps = small_agent(amp=amp, hidden_dims=(64, 64)), random_batch(32), torch.ones(32, 2)
        metrics = update_critic(agent, batch, eps, torch.tensor([0, 1])) | update_actor(agent, batch, eps)
        losses.append(
            [float(metrics[f"losses/{name}"]) for name in ("critic_loss", "q_values", "actor_loss", "entropy")]
        )
        assert all(p.dtype == torch.float32 for p in [*agent.critic.parameters(), *agent.actor.parameters()])
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.03, abs=0.02)


@pytest.mark.parametrize("chunk", [1, 3])
def test_exploration_holds_dimensions_for_a_while(chunk):
    agent = small_agent(action_dim=2 * chunk, explore_prob=0.025, action_chunk=chunk)
    for actor in (agent.actor, agent.ema_actor):  # hardly any other noise
        actor.log_std.weight.data.zero_()
        actor.log_std.bias.data.fill_(-9)
    obs = np.array([0.1, -0.2, 0.3])
    mode = agent.act(obs, deterministic=True).reshape(chunk, 2)
    actions = np.array([agent.act(obs, deterministic=False) for _ in range(4000)]).reshape(4000, chunk, 2)
    held = (abs(actions - mode) > 1e-2).any(1)  # (N, 2)
    assert held.mean(0) == pytest.approx(20 / (20 + 1 / 0.025), abs=0.07)
    assert (held[:, 0] & held[:, 1]).mean() == pytest.approx(held.mean(0).prod(), abs=0.04)  # each on its own
    for dim in range(2):
        starts = np.flatnonzero(np.diff(held[:, dim].astype(int)) == 1) + 1
        values = actions[starts, 0, dim]
        assert -1 < values.min() < -0.8 and 0.8 < values.max() < 1
        for start, value in list(zip(starts, values, strict=True))[:-1]:
            assert (actions[start : start + 20, :, dim] == value).all()  # 20 times, through all of a chunk
    assert np.array_equal(agent.act(obs, deterministic=True).reshape(chunk, 2), mode)


def test_target_critic_follows_by_tau():
    agent, batch = small_agent(lr=0.1), random_batch(8)
    target = parameters_of(agent.target_critic)
    update_critic(agent, batch, torch.randn(8, 2), torch.tensor([0, 1]))
    expected = 0.995 * target + 0.005 * parameters_of(agent.critic)
    assert (expected - target).abs().max() > 1e-4
    torch.testing.assert_close(parameters_of(agent.target_critic), expected, rtol=1e-5, atol=1e-7)


def test_policy_delay_counts_across_calls():
    agent, buffer, actor_updates = small_agent(policy_delay=3), filled_buffer(), []
    step_actor = agent.step_actor
    agent.step_actor = lambda: actor_updates.append(agent.critic_updates) or step_actor()
    metrics = [agent.update(buffer, None, count) for count in (2, 2, 5, 1)]
    assert agent.critic_updates == 10
    assert actor_updates == [3, 6, 9]
    assert "losses/actor_loss" not in metrics[0] and "losses/actor_loss" in metrics[1]
    assert not any(value.requires_grad for values in metrics for value in values.values())


def test_demonstrations_fill_their_share_of_each_batch():
    agent, seen = small_agent(batch_size=10, demos="1", demo_ratio=0.3, normalize_observations=False), []
    agent.critic_gradient = lambda batch, eps, subset: seen.append(batch.rewards) or {}
    agent.actor_gradient, agent.step_critic, agent.step_actor = (lambda *_: {}, *[lambda: None] * 2)
    buffer = fill(ReplayBuffer(50, 3, 2, CPU), random_batch(20)._replace(rewards=torch.zeros(20)))
    demos = fill(ReplayBuffer(5, 3, 2, CPU), random_batch(5)._replace(rewards=torch.ones(5)))
    agent.update(buffer, demos, 20)
    assert [rewards.tolist() for rewards in seen] == [[0] * 7 + [1] * 3] * 20  # the last rows are the demonstrations


def test_half_of_what_is_learned_is_seen_in_a_mirror():
    """Of each transition observation, action and what followed, or nothing."""
    agent, seen = small_agent(mirror=(0, 2, 4), normalize_observations=False), []
    agent.update_once = lambda *inputs, with_actor: seen.append(Batch(*inputs[:5])) or {}
    batch = random_batch(64)
    agent.update(fill(ReplayBuffer(64, 3, 2, CPU), batch), None, 100)
    seen = Batch(*map(torch.cat, zip(*seen, strict=True)))  # (800, ...)
    places = (seen.rewards[:, None] == batch.rewards).int().argmax(1)
    mirrored = seen.actions[:, 1] != batch.actions[places, 1]
    signs = torch.where(mirrored[:, None], torch.tensor([-1, 1, -1, 1, -1]), 1)
    assert torch.equal(seen.observations, batch.observations[places] * signs[:, :3])
    assert torch.equal(seen.next_observations, batch.next_observations[places] * signs[:, :3])
    assert torch.equal(seen.actions, batch.actions[places] * signs[:, 3:])
    assert torch.equal(seen.terminations, batch.terminations[places])
    assert 0.4 < mirrored.float().mean() < 0.6


def test_a_mirror_of_entries_that_do_not_exist():
    assert small_agent(mirror=(0, 4)).mirror_signs.tolist() == [-1, 1, 1, 1, -1]
    with pytest.raises(SystemExit, match=r"--mirror \(0, 5\): observation and action have the entries 0 to 4"):
        small_agent(mirror=(0, 5))


def test_the_cube_lies_in_a_world_that_a_mirror_leaves_as_it_is():
    """The entries that --help gives for it: the same reward for mirrored actions, and what is seen is mirrored."""
    named = re.search(r"FrankaPickCube-v0: ([\d ]+),", (REPO / SCRIPT).read_text())[1]
    signs = np.ones(14)
    signs[[int(entry) for entry in named.split()]] = -1
    actions = np.random.default_rng(0).uniform(-1, 1, (6, 4)).repeat(10, 0)
    seen = []
    for side in (1, -1):
        env = gym.wrappers.FlattenObservation(gym.make("FrankaPickCube-v0"))
        env.reset(seed=0)
        env.unwrapped.sim.data.qpos[9:11] = 0.45, side * 0.1
        turned = actions if side == 1 else actions * signs[10:]
        obs, rewards, *_ = zip(*(env.step(action.astype(np.float32)) for action in turned), strict=True)
        seen.append((np.array(obs), np.array(rewards)))
    (obs, rewards), (other_obs, other_rewards) = seen
    assert np.ptp(obs[:, 5]) > 0.1  # it moves
    np.testing.assert_allclose(other_obs[:, :7], (obs * signs[:10])[:, :7], atol=3e-3)  # m, and the gripper
    np.testing.assert_allclose(other_obs[:, 7:], (obs * signs[:10])[:, 7:], atol=5e-2)  # m/s
    np.testing.assert_allclose(rewards, other_rewards, atol=3e-3)


class MirroredStart:
    """In the place of a task's random numbers: a peg's and a hole's start, y and yaw on one `side` (1, -1)."""

    def __init__(self, side: int):
        self.rng, self.side = np.random.default_rng(3), side

    def uniform(self, low: tuple[float, ...], high: tuple[float, ...]) -> np.ndarray:
        value = self.rng.uniform(low, high)
        value[[1, -1]] *= self.side  # x, y, (z,) yaw
        return value


def test_the_peg_lies_in_such_a_world_too():
    """The entries of the row sac_peg_mirror: what is seen of pushing and turning, and of the expert, is mirrored."""
    named = re.search(r"FrankaPegInsert-v0 --mirror ([\d ]+)\"", (REPO / "benchmarks" / "run.py").read_text())[1]
    signs = np.ones(30)
    signs[[int(entry) for entry in named.split()]] = -1
    actions = np.random.default_rng(1).uniform(-0.5, 0.5, (3, 6)).repeat(6, 0)
    seen = []
    for side in (1, -1):
        env = gym.make("FrankaPegInsert-v0")
        env.reset(seed=0)
        env.unwrapped._np_random = MirroredStart(side)
        env.unwrapped.place()
        rows, total = [], 0.0
        for step in range(90):
            action = env.unwrapped.expert_action()
            if step < len(actions):
                action = action / 2 + (actions[step] if side == 1 else actions[step] * signs[24:])
            obs, reward, *_ = env.step(action.astype(np.float32))
            rows.append(spaces.flatten(env.observation_space, obs))
            total += reward
        seen.append((np.array(rows), total))
    (obs, total), (other_obs, other_total) = seen
    assert min(total, other_total) > 10 and abs(total - other_total) <= 3  # steps in the hole
    pose, speed = [*range(1, 5), *range(8, 15)], range(18, 24)
    np.testing.assert_allclose(other_obs[:, pose], (obs * signs[:24])[:, pose], atol=1e-2)  # m, quaternion
    np.testing.assert_allclose(other_obs[:, speed], (obs * signs[:24])[:, speed], atol=1e-1)  # m/s, rad/s
    for entry in (6, 7, 16, 17):  # forces and torques of contacts are noisy
        assert np.corrcoef(other_obs[:, entry], obs[:, entry] * signs[entry])[0, 1] > 0, entry


def test_learning_rate_warm_up_and_cosine():
    agent = small_agent(lr_warmup=4, lr_decay=10, lr=1e-3)
    for update in range(1, 14):
        agent.critic_updates = update
        agent.schedule_lr()
        factor = min(1, (update - 1) / 4) * 0.5 * (1 + math.cos(math.pi * min(1, update / 10)))
        for optimizer in (agent.actor_optimizer, agent.critic_optimizer):
            assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(1e-3 * factor, rel=1e-5, abs=1e-10)
        assert float(agent.alpha_optimizer.param_groups[0]["lr"]) == pytest.approx(1e-3)
    assert float(agent.actor_optimizer.param_groups[0]["lr"]) == pytest.approx(0, abs=1e-10)


def test_weight_decay_is_decoupled_and_spares_the_temperature():
    agent = small_agent(weight_decay=0.1, lr=0.01)
    for module, optimizer in ((agent.actor, agent.actor_optimizer), (agent.critic, agent.critic_optimizer)):
        before = parameters_of(module)
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        torch.testing.assert_close(parameters_of(module), before * (1 - 0.01 * 0.1))
    before = agent.raw_alpha.item()
    agent.raw_alpha.grad = torch.zeros(())
    agent.alpha_optimizer.step()
    assert agent.raw_alpha.item() == before


def test_dropout_only_with_a_generator_and_reproducible():
    agent, obs, actions = small_agent(dropout=0.5, hidden_dims=(64, 64)), torch.randn(9, 3), torch.randn(9, 2)
    plain = small_agent(dropout=0.0, hidden_dims=(64, 64))
    assert torch.equal(agent.critic(obs, actions), plain.critic(obs, actions))
    first, second = (agent.critic(obs, actions, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.allclose(first, agent.critic(obs, actions))
    assert not torch.equal(first, agent.critic(obs, actions, torch.Generator().manual_seed(4)))
    trunk = MLP(2, 5, (64,), "relu", norm=False, dropout=0.5)  # each unit is 0 or doubled
    x = torch.randn(2, 100, 5)
    ratio = trunk(x, torch.Generator().manual_seed(0)) / trunk(x)
    kept = ratio[trunk(x) > 0]
    assert set(kept.round(decimals=4).tolist()) == {0.0, 2.0}
    assert kept.mean().item() == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize(
    "options",
    [{}, {"dropout": 0.1, "backup_entropy": True, "lr_warmup": 5, "weight_decay": 0.01}, {"amp": True}],
    ids=["plain", "many", "amp"],
)
def test_updates_depend_on_the_seed_only(options):
    agents = [small_agent(seed=seed, **options) for seed in (1, 1, 2)]
    for i, agent in enumerate(agents):
        torch.manual_seed(i)  # the global generator plays no part
        agent.update(filled_buffer(), None, 6)
    a, b, c = (parameters_of(agent.critic) for agent in agents)
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(parameters_of(agents[0].actor), parameters_of(agents[1].actor))


def test_agent_state_round_trip_is_exact():
    options = {"dropout": 0.1, "lr_warmup": 20, "policy_delay": 3, "explore_prob": 0.5}
    one, buffer = small_agent(**options), filled_buffer()
    one.normalizer.update(buffer.newest_observations(50))
    one.update(buffer, None, 7)
    for _ in range(5):
        one.act(np.zeros(3), deterministic=False)
    assert one.held_steps.any()
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    other = small_agent(seed=9, **options)
    other.load_state_dict(torch.load(file, weights_only=True))
    for agent in (one, other):
        agent.update(buffer, None, 5)
    ours, theirs = leaves(one.state_dict()), leaves(other.state_dict())
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not same(ours[name], theirs[name])] == []


def test_an_actor_has_its_learners_policy():
    learner, actor, obs = small_agent(), small_agent(seed=2), torch.randn(9, 3)
    learner.normalizer.update(3 + 2 * torch.randn(100, 3))
    unpack_tensors(pack_tensors(learner.policy_tensors()), actor.policy_tensors())
    ours, theirs = (agent.actor(agent.normalizer(obs)) for agent in (learner, actor))
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


# --- Replay buffer ----------------------------------------------------------------------------------------------------
def add_numbered(buffer: ReplayBuffer, first: int, count: int) -> None:
    """Transitions that hold their number, as they come in long episodes."""
    for number in range(first, first + count):
        if number % 7 == 0:
            buffer.add(pack_step(STEP, None, np.full(3, number)))
        buffer.add(pack_step(STEP, np.full(2, number), np.full(3, number + 1), number, False))


def test_buffer_keeps_the_newest_transitions():
    buffer, total = ReplayBuffer(10, 3, 2, CPU), 0
    for count in (3, 0, 4, 1, 5, 10, 2, 7, 13, 9, 10, 45):
        add_numbered(buffer, total, count)
        total += count
        held = list(range(max(0, total - 10), total))
        assert len(buffer) == len(held) and sorted(buffer.rows.rewards[: len(held)].tolist()) == held
        assert buffer.newest_observations(len(held))[:, 0].tolist() == held
        assert len(buffer.newest_observations(0)) == 0
        batch = buffer.sample((400,), torch.Generator().manual_seed(total))
        assert sorted(set(batch.rewards.tolist())) == held
        for column in (batch.observations[:, 2], batch.actions[:, 1], batch.next_observations[:, 0] - 1):
            assert torch.equal(column, batch.rewards)
        other = ReplayBuffer(10, 3, 2, CPU)
        other.load_state_dict(buffer.state_dict())
        for one in (other, copy.deepcopy(buffer)):  # goes on in the same places
            add_numbered(one, total, 4)
            assert one.newest_observations(min(10, len(held) + 4))[:, 0].tolist() == list(range(total + 4))[-10:]
            assert torch.equal(one.rows.rewards[: len(one)], other.rows.rewards[: len(other)])


def test_a_buffers_steps_are_those_of_the_flags():
    buffer = small_agent(n_step=4, gamma=0.8).make_buffer(10)
    assert (buffer.n_step, buffer.gamma) == (4, 0.8)


def test_buffer_samples_uniformly():
    buffer = ReplayBuffer(20, 3, 2, CPU)
    add_numbered(buffer, 0, 8)
    batch = buffer.sample((40, 200), torch.Generator().manual_seed(0))
    assert [tuple(field.shape) for field in batch] == [(40, 200, 3), (40, 200, 2), (40, 200), (40, 200, 3), (40, 200)]
    counts = torch.bincount(batch.rewards.flatten().long(), minlength=20)
    assert counts[8:].sum() == 0
    assert (counts[:8] - 1000).abs().max() < 130  # standard deviation 30


@pytest.mark.parametrize("n_step", [1, 2, 3, 5])
def test_steps_that_follow_are_added_up_within_their_episode(n_step):
    """Against a loop over the episodes; ends by termination and truncation, wrap-around, alternating actors, one that
    resets only, a buffer that is loaded now and then."""
    generator, gamma, episodes = np.random.default_rng(n_step), 0.9, []
    for _ in range(12):
        length, terminates = int(generator.integers(1, 9)), generator.random() < 0.5
        observations, rewards = generator.normal(size=(length + 1, 3)), generator.normal(size=length)
        ends = [terminates and t == length - 1 for t in range(length)]
        episodes.append((observations.astype(np.float32), rewards.astype(np.float32), ends))
    actors = [[(i, t) for i in range(first, 6, 2) for t in range(len(episodes[i][1]))] for first in (0, 1)]
    steps = []
    while any(actors):  # the first six episodes are of two actors, three transitions at a time
        for queue in actors:
            steps += [queue.pop(0) for _ in range(min(3, len(queue)))]
    steps += [(i, t) for i in range(6, 12) for t in range(len(episodes[i][1]))]
    capacity = len(steps) - 7  # the first ones are overwritten
    buffer, numbers = ReplayBuffer(capacity, 3, 2, CPU, n_step, gamma), {}
    for number, (i, t) in enumerate(steps):
        observations, rewards, ends = episodes[i]
        actor = str(i % 2) if i < 6 else "0"
        buffer.add(pack_step(STEP, None, observations[0]), "resets only")
        if number % 3 == 0:
            saved, buffer = buffer.state_dict(), ReplayBuffer(capacity, 3, 2, CPU, n_step, gamma)
            buffer.load_state_dict(saved)
        if t == 0:
            assert buffer.add(pack_step(STEP, None, observations[0]), actor) == 0
        assert buffer.add(pack_step(STEP, np.zeros(2), observations[t + 1], rewards[t], ends[t]), actor) == 1
        numbers[observations[t].tobytes()] = number
    (batch, _), lengths = buffer.n_step_transitions(torch.arange(capacity)), set()
    for slot in range(capacity):
        number = numbers[batch.observations[slot].numpy().tobytes()]
        i, t = steps[number]
        observations, rewards, ends = episodes[i]
        length = 1
        while length < n_step and steps[number + length : number + length + 1] == [(i, t + length)]:
            length += 1
        lengths.add(length)
        expected = sum(gamma**k * rewards[t + k] for k in range(length))
        assert float(batch.rewards[slot]) == pytest.approx(expected, abs=1e-5)
        assert np.array_equal(batch.next_observations[slot].numpy(), observations[t + length])
        weight = gamma**length * (1 - ends[t + length - 1])  # of the next observation's value, in the critics' target
        assert gamma * (1 - float(batch.terminations[slot])) == pytest.approx(weight, abs=1e-6)
    assert lengths == set(range(1, n_step + 1))


def test_steps_as_they_are_sent():
    step = pack_step(STEP, np.array([4, 5.0]), np.array([1, 2, 3.0]), 6.0, True)
    sent = np.frombuffer(step.tobytes(), STEP)[0]
    assert sent["action"].tolist() == [4, 5] and sent["observation"].tolist() == [1, 2, 3]
    assert (sent["reward"], sent["terminated"], sent["first"]) == (6, True, False)
    reset = pack_step(STEP, None, np.array([1, 2, 3.0]))
    assert reset["first"] and not reset["action"].any() and reset["observation"].tolist() == [1, 2, 3]
    assert STEP.itemsize == 4 * (2 + 1 + 3) + 2


# --- Normalizer -------------------------------------------------------------------------------------------------------
def test_normalized_agent_sees_normalized_observations():
    agent, scale, shift = small_agent(), torch.tensor([10.0, 0.1, 3.0]), torch.tensor([5.0, -1.0, 100.0])
    plain, obs = small_agent(normalize_observations=False), torch.randn(2000, 3)
    batch = random_batch(2000)._replace(observations=obs * scale + shift)
    agent.normalizer.update(batch.observations)
    for row in ((obs[:5] - obs.mean(0)) / obs.std(0)).numpy():
        shifted = row * (scale * obs.std(0)).numpy() + (shift + scale * obs.mean(0)).numpy()
        np.testing.assert_allclose(agent.act(shifted, True), plain.act(row, True), atol=2e-3)
    seen, buffer = [], filled_buffer()
    agent.critic_gradient = lambda batch, eps, subset: seen.append(batch) or {}
    agent.actor_gradient, agent.step_critic, agent.step_actor = (lambda *_: {}, *[lambda: None] * 2)
    agent.update(buffer, None, 1)
    for sampled, raw in (
        (seen[0].observations, buffer.rows.observations),
        (seen[0].next_observations, buffer.rows.next_observations),
    ):
        known = {tuple(row) for row in agent.normalizer(raw[: buffer.total]).tolist()}
        assert {tuple(row) for row in sampled.tolist()} <= known


# --- Environment ------------------------------------------------------------------------------------------------------
def wrapped(args: Args) -> gym.Env:
    return wrap_env(make_env(args), args)


def demos_of(args: Args) -> ReplayBuffer:
    """What `load_demos` makes of a task and its flags."""
    task, wrap = make_env(args), partial(wrap_env, args=args)
    env = wrap(task)
    return load_demos(args, Agent(env.observation_space, env.action_space, args, CPU), task, wrap)


def point_args(**changes) -> Args:
    return small_args(**{"env_id": "probe_envs:Point-v0", "demos": "3"} | changes)


def test_make_env_flattens_and_rescales():
    env = wrapped(point_args())
    obs, _ = env.reset(seed=3)
    inner = env.unwrapped
    assert np.allclose(obs, [*inner.goal, *inner.point])  # keys in gymnasium's order
    assert env.action_space.low.tolist() == [-1] * 3 and env.action_space.high.tolist() == [1] * 3
    before = inner.point.copy()
    env.step(np.array([0.5, -1, 0], np.float32))
    np.testing.assert_allclose(inner.point - before, [0.1, -0.2], atol=1e-6)  # 0.1 * 2 * action


@pytest.mark.parametrize("changes", [{}, {"gripper_penalty": 0.3}, {"action_chunk": 4}, {"action_chunk": 3}])
def test_demonstrations_are_the_transitions_that_live_steps_would_store(changes):
    actions = demos_of(point_args()).rows.actions.numpy().reshape(3, 20, 3)  # the expert's; its episodes last 20 steps
    args = point_args(**changes)
    env, chunk = wrapped(args), args.action_chunk
    dtype, count = step_type(4, 3 * chunk), 3 * math.ceil(20 / chunk)
    expected = ReplayBuffer(count, 4, 3 * chunk, CPU)
    numbers = spread_starts(3, make_env(args), args.seed)
    for number, episode in zip(numbers, actions, strict=True):
        obs, _ = env.reset(seed=envs.episode_seed(args.seed, 2, number))
        expected.add(pack_step(dtype, None, obs))
        for first in range(0, 20, chunk):
            action = np.concatenate([episode, np.repeat(episode[-1:], chunk, 0)])[first : first + chunk].ravel()
            obs, reward, terminated, truncated, _ = env.step(action)
            expected.add(pack_step(dtype, action, obs, reward, terminated))
        assert truncated
    demos = demos_of(args)
    assert demos.total == demos.capacity == count
    assert torch.equal(demos.continues, expected.continues)
    for ours, theirs in zip(demos.rows, expected.rows):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 4])
def test_a_demonstration_that_terminates(monkeypatch, chunk):
    """The last transition of an episode that terminates keeps its termination, also inside a chunk."""
    to_the_left = np.array([-2, 0, 0], np.float32)
    monkeypatch.setattr(probe_envs.Point, "expert_action", lambda self: to_the_left)
    args = point_args(demos="1", demo_noise=0, action_chunk=chunk, seed=3)
    demos, env = demos_of(args), gym.make("probe_envs:Point-v0")
    env.reset(seed=envs.episode_seed(args.seed, 2, 0))
    steps = 1
    while not env.step(to_the_left)[2]:
        steps += 1
    assert steps % 4  # so that the last chunk is cut short
    assert len(demos) == math.ceil(steps / chunk)
    assert demos.rows.terminations.tolist() == [0] * (len(demos) - 1) + [1]
    assert demos.rows.rewards[-1] < -1  # the reward of the termination is there


def test_what_is_said_about_demonstrations(capsys):
    demos_of(point_args())
    assert capsys.readouterr().out == "demonstrations: 3 episodes, 60 steps, 3 successful\n"
    demos_of(point_args(env_id="probe_envs:IdleExpert-v0"))
    assert capsys.readouterr().out == "demonstrations: 3 episodes, 60 steps, 0 successful\n"


def test_noise_on_the_expert_is_seeded_and_of_the_given_size():
    args = point_args(env_id="probe_envs:IdleExpert-v0", demos="20", demo_noise=0.2)
    actions = demos_of(args).rows.actions  # its expert always says 0
    assert torch.equal(actions, demos_of(args).rows.actions)
    assert actions.std(0).tolist() == pytest.approx([0.2] * 3, rel=0.15) and actions.mean(0).abs().max() < 0.05
    assert not torch.equal(actions, demos_of(dataclasses.replace(args, seed=2)).rows.actions)


@pytest.mark.parametrize("chunk", [1, 2])
def test_a_task_that_writes_in_place(chunk):
    """S1: demonstrations and live steps keep what was seen then; a demonstration held 1 distinct observation of 20."""
    kept, live = [], []
    for task in ("Point", "InPlace"):
        args = point_args(env_id=f"probe_envs:{task}-v0", action_chunk=chunk)
        kept.append(demos_of(args))
        env, rows = wrapped(args), []
        rows.append(env.reset(seed=1)[0])
        for t in range(8):
            rows.append(env.step(np.full(3 * chunk, 0.2 - 0.1 * t, np.float32))[0])
        live.append(np.array(rows))
    assert torch.equal(kept[0].rows.observations, kept[1].rows.observations)
    assert torch.equal(kept[0].rows.next_observations, kept[1].rows.next_observations)
    assert len(np.unique(kept[1].rows.observations[: 20 // chunk].numpy(), axis=0)) == 20 // chunk
    assert np.array_equal(live[0], live[1]) and len(np.unique(live[1], axis=0)) > 5


class Sized(probe_envs.Probe):
    """A task with the spaces that a test gives."""

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space = probe_envs.Probe.action_space):
        self.observation_space, self.action_space = observation_space, action_space

    def observe(self):
        return self.observation_space.sample()

    def step(self, action):
        assert self.action_space.contains(action)
        return self.observe(), 0.0, False, False, {}


CAMERA = spaces.Box(0, 255, (32, 32, 3), np.uint8)


@pytest.mark.parametrize(
    "space",
    [
        CAMERA,
        spaces.Box(0, 255, (3, 32, 32), np.uint8),
        spaces.Box(0, 255, (40, 50), np.uint8),
        spaces.Box(0, 1, (64, 64, 3), np.float32),
        spaces.Box(0, 1, (3, 64, 64), np.float32),
        spaces.Dict({"state": box(3), "front": CAMERA}),
        spaces.Dict({"pixels": spaces.Dict({"front": CAMERA, "wrist": CAMERA}), "agent_pos": box(3)}),
        spaces.Dict({"state": spaces.Dict({"q": box(3)}), "images": spaces.Tuple([CAMERA])}),
        spaces.MultiBinary((64, 64)),
    ],
    ids=["uint8", "channels-first", "grey", "float", "float-channels-first", "beside", "nested", "tuple", "bits"],
)
def test_images_are_for_the_other_script(space):
    """S2, S3: at any depth, of any layout; no image becomes thousands of states."""
    with pytest.raises(SystemExit, match=r"--env-id X-v0: .*images; use sac_pixel_sim.py, or flatten it \(TASK\)"):
        wrap_env(Sized(space), small_args(env_id="X-v0"))


@pytest.mark.parametrize(
    ("space", "size"),
    [
        (spaces.Box(-1, 1, (1, 12)), 12),
        (spaces.Box(-1, 1, (12, 1)), 12),
        (spaces.Box(0, 255, (1, 12), np.uint8), 12),
        (spaces.Box(-1, 1, (3, 3)), 9),
        (spaces.Box(-1, 1, (4096,)), 4096),
        (spaces.Box(-5, 5, (3,), np.int64), 3),
        (spaces.Box(0, 1, (), np.float64), 1),
        (spaces.MultiBinary(4), 4),
        (spaces.Dict({"q": box(3), "mode": spaces.Discrete(3), "arm": spaces.Dict({"p": box(2)})}), 8),
        (spaces.Tuple([box(3), spaces.Discrete(2)]), 5),
    ],
    ids=["row", "column", "bytes", "matrix", "wide", "ints", "scalar", "binary", "nested", "tuple"],
)
def test_states_of_every_kind(space, size):
    """S9: a row vector is a state; numbers of other types, at any depth, become one float vector."""
    args = small_args(env_id="X-v0")
    env = wrap_env(Sized(space), args)
    assert env.observation_space.shape == (size,)
    agent = Agent(env.observation_space, env.action_space, args, CPU)
    obs, _ = env.reset(seed=0)
    step = pack_step(agent.step_type, agent.act(obs, deterministic=True), obs)
    np.testing.assert_allclose(step["observation"], np.asarray(obs, np.float32))


@pytest.mark.parametrize(
    ("space", "word"),
    [
        (spaces.Discrete(3), "Discrete"),
        (spaces.Box(-1, 1, ()), "shape"),
        (spaces.Box(-1, 1, (2, 3)), "shape"),
        (spaces.Box(-1, 1, (0,)), "shape"),
        (spaces.Box(0, 10, (2,), np.int64), "floats"),
        (spaces.MultiBinary(3), "MultiBinary"),
        (spaces.Dict({"arm": box(2)}), "Dict"),
        (spaces.Box(-np.inf, np.inf, (2,)), "bounds"),
        (spaces.Box(np.float32([-1, -np.inf]), np.float32([1, 1])), "bounds"),
        (spaces.Box(-3.4e38, 3.4e38, (2,)), "bounds"),
        (spaces.Box(-1e20, 0, (2,), np.float64), "bounds"),
    ],
)
def test_actions_that_cannot_be_learned(space, word):
    """S7, S8: one line; bounds as large as the type allows are none."""
    with pytest.raises(SystemExit, match=f"--env-id X-v0: actions .*{word}.*make_env"):
        wrap_env(Sized(box(3), space), small_args(env_id="X-v0"))


@pytest.mark.parametrize("wrapper", [gym.wrappers.NormalizeObservation, gym.wrappers.NormalizeReward])
def test_wrappers_whose_statistics_no_checkpoint_keeps(wrapper):
    """R1: an evaluation, and a run that goes on, would see other numbers than training did."""
    wrapped = gym.wrappers.TransformReward(wrapper(Sized(box(3), box(2))), lambda reward: 2 * reward)
    with pytest.raises(SystemExit, match=f"--env-id X-v0: no checkpoint keeps what {wrapper.__name__} learns"):
        wrap_env(wrapped, small_args(env_id="X-v0"))


def test_observations_that_cannot_be_learned():
    """S2's kind: a sentence would become the numbers of its letters; of nothing nothing is learned."""
    for space, words in (
        (spaces.Dict(), "must be"),
        (spaces.Box(-1, 1, (0,)), "must be"),
        (spaces.Sequence(box(2)), "must be"),
        (spaces.Dict(q=box(2), task=spaces.Text(9)), "hold Text"),
    ):
        with pytest.raises(SystemExit, match=f"--env-id X-v0: observations {words}"):
            wrap_env(Sized(space), small_args(env_id="X-v0"))


class Broken(gym.ObservationWrapper):
    """A wrapper of one's own that divides by zero."""

    def observation(self, observation):
        return {"goal": observation["goal"], "point": observation["point"] / np.zeros(2)}


def test_wrappers_of_ones_own_are_checked():
    """S6: what a wrapper in make_env does wrong is named as what the task does wrong."""
    env = wrap_env(Broken(make_env(point_args())), point_args())
    with np.errstate(divide="ignore"), pytest.raises(envs.Fault, match=r"Point-v0: the observation\['point'\]\[0\] is"):
        env.reset(seed=0)


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ({"success": True}, 1),
        ({"is_success": 0.0}, 0),
        ({"succeed": np.True_}, 1),
        ({}, math.nan),
        ({"x": 1}, math.nan),
    ],
)
def test_success_by_its_usual_names(info, expected):
    assert sac_state_sim.success(info) == pytest.approx(expected, nan_ok=True)


def test_divergence_is_named(monkeypatch):
    """The task is not blamed for the actions of a policy that is NaN, and nothing of it is saved."""
    agent = small_agent()
    agent.actor_parameters[0].data.fill_(np.nan)
    for call in (lambda: agent.act(np.zeros(3), deterministic=False), agent.state_dict):
        with pytest.raises(SystemExit, match="diverged; give a smaller --lr"):
            call()


@pytest.fixture
def in_process(tmp_path, monkeypatch):
    """A run in this process leaves its signals and threads as they are."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sac_state_sim.tensors, "set_up_torch", lambda *_: CPU)
    with contextlib.ExitStack() as stack:
        for number in (signal.SIGINT, signal.SIGTERM):
            stack.callback(signal.signal, number, signal.getsignal(number))
        yield


@pytest.mark.usefixtures("in_process")
def test_a_learner_that_owes_updates_answers(tmp_path, monkeypatch):
    """It asks for nothing then, but an actor that hears nothing for long gives up."""
    steps = [pack_step(step_type(4, 3), None if i == 0 else np.zeros(3), np.ones(4)) for i in range(121)]
    actors = AllAtOnce(steps)
    monkeypatch.setattr(sac_state_sim.link, "Learner", lambda *_: actors)
    args = point_args(role="learner", total_timesteps=120, learning_starts=20, utd_ratio=2, final_eval_episodes=1)
    sac_state_sim.learner(dataclasses.replace(args, run_dir="run", capture_video=False))
    assert actors.asked == [(100, 120, True)] + [(0, 0, False)] * 3  # 200 updates, 50 at a time
    state = read_checkpoint(tmp_path / "run")
    assert state["agent"]["critic_updates"] == 200
    assert state["agent"]["normalizer"]["count"] == 120 + state["demos"]["total"]


@pytest.fixture
def done(monkeypatch) -> list[str]:
    """What agents do: r a random action, s a sample, m the mode, u an update."""
    letters: list[str] = []
    for method, letter in ((Agent.random_action, "r"), (Agent.act, "s"), (Agent.update, "u")):

        def told(self, *given, method=method, letter=letter, **options):
            letters.append("m" if options.get("deterministic") else letter)
            return method(self, *given, **options)

        monkeypatch.setattr(Agent, method.__name__, told)
    return letters


@pytest.mark.usefixtures("in_process")
def test_a_run_explores_and_learns_from_each_step_after_the_first_ones(done, tmp_path):
    args = point_args(total_timesteps=5, learning_starts=2, final_eval_episodes=1, run_dir="run", capture_video=False)
    sac_state_sim.train(args)
    assert "".join(done).rstrip("m") == "rrsususu"
    state = read_checkpoint(tmp_path / "run")
    assert state["agent"]["normalizer"]["count"] == 5 + state["demos"]["total"]


@pytest.mark.usefixtures("in_process")
def test_an_actor_explores_as_soon_as_there_are_weights(done, monkeypatch):
    args = point_args(role="actor", run_dir="run", capture_video=False)
    env = wrapped(args)
    policy = pack_tensors(Agent(env.observation_space, env.action_space, args, CPU).policy_tensors())
    coming = [None, None, (1, policy), None]

    class Sender:
        number, journal = 0, SimpleNamespace(written=0)
        done = property(lambda _: not coming)

        def weights(self) -> tuple | None:
            return coming.pop(0)

        def send(self, step: bytes) -> None: ...

    monkeypatch.setattr(sac_state_sim.link, "Actor", lambda *_: Sender())
    sac_state_sim.actor(args)
    assert done == ["r", "r", "s", "s"]


# --- Runs: tasks of known value ---------------------------------------------------------------------------------------
LEARN = "--total-timesteps 450 --utd-ratio 2 --lr 3e-3 --gamma 0.5 --eval-every 1000"


def trained_agent(run_dir: Path, obs_dim: int, action_dim: int) -> Agent:
    args = json.loads((run_dir / "args.json").read_text())
    agent = Agent(box(obs_dim), box(action_dim), Args(**args | {"hidden_dims": tuple(args["hidden_dims"])}), CPU)
    agent.load_state_dict(read_checkpoint(run_dir)["agent"])
    return agent


def learn(task: str, cwd: Path, *more: object) -> Agent:
    flags = ("--env-id", f"probe_envs:{task}-v0", *LEARN.split(), *more, "--run-dir", "run")
    return trained_agent(run(*flags, cwd=cwd).run_dir, 1, 1)


def value(agent: Agent, obs: float, action: float = 0.0) -> float:
    with torch.no_grad():
        return agent.critic(agent.normalizer(torch.tensor([[obs]])), torch.tensor([[action]])).mean().item()


def test_learns_the_value_of_a_constant_reward(tmp_path):
    assert value(learn("ConstantReward", tmp_path), 0) == pytest.approx(1, abs=0.05)


def test_truncation_does_not_cut_the_bootstrap(tmp_path):
    assert value(learn("TruncatedReward", tmp_path, "--utd-ratio", 4), 0) == pytest.approx(1 / (1 - 0.5), abs=0.1)


def test_learns_values_that_depend_on_the_observation(tmp_path):
    agent = learn("ObservedReward", tmp_path)
    assert value(agent, -1) == pytest.approx(-1, abs=0.1) and value(agent, 1) == pytest.approx(1, abs=0.1)


def test_discounts_the_second_step(tmp_path):
    agent = learn("TwoSteps", tmp_path)
    assert value(agent, 0) == pytest.approx(0.5, abs=0.08) and value(agent, 1) == pytest.approx(1, abs=0.08)


def test_learns_the_best_action(tmp_path):
    agent = learn("ActionReward", tmp_path)
    assert agent.act(np.zeros(1), deterministic=True) == pytest.approx(0.5, abs=0.15)
    for action in (-0.5, 0.0, 0.5):
        assert value(agent, 0, action) == pytest.approx(1 - (action - 0.5) ** 2, abs=0.15)


def test_learns_actions_that_follow_the_observation(tmp_path):
    agent = learn("ObservedAction", tmp_path)
    for obs in (-1, 1):
        assert agent.act(np.array([obs]), deterministic=True) == pytest.approx(0.6 * obs, abs=0.2)


# --- GPU and compiler -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("changes", [{}, {"num_qs": 3, "backup_entropy": True, "amp": True}])
def test_what_a_gpu_compiles_is_whole_and_compiled_before_it_is_captured(changes):
    """No graph breaks, and nothing is compiled anew after the updates that `replay` runs before it captures one."""
    agent, buffer = small_agent(demos="1", policy_delay=2, **changes), filled_buffer()
    for name in ("critic_loss", "actor_loss"):
        setattr(agent, name, torch.compile(getattr(agent, name), backend="aot_eager", fullgraph=True))
    agent.update(buffer, buffer, 3 * agent.args.policy_delay)
    with torch._dynamo.config.patch(error_on_recompile=True):
        metrics = agent.update(buffer, buffer, 4)
    assert math.isfinite(metrics["losses/actor_loss"])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")
def test_compiled_losses_are_the_eager_ones():
    agent, batch, eps = small_agent(num_qs=3, hidden_dims=(32, 32)), random_batch(16), torch.randn(16, 2)
    for loss, inputs in ((agent.critic_loss, (batch, eps, torch.tensor([2, 0]))), (agent.actor_loss, (batch, eps))):
        for module in (agent.actor, agent.critic):
            module.zero_grad()
        eager, _ = loss(*inputs)
        eager.backward()
        gradients = [
            p.grad.clone() for p in [*agent.critic.parameters(), *agent.actor.parameters()] if p.grad is not None
        ]
        for module in (agent.actor, agent.critic):
            module.zero_grad()
        compiled, _ = torch.compile(loss)(*inputs)
        compiled.backward()
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)
        again = [p.grad for p in [*agent.critic.parameters(), *agent.actor.parameters()] if p.grad is not None]
        for one, other in zip(again, gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def on_gpu(agent_args: Args, batch: Batch) -> tuple[Agent, ReplayBuffer]:
    device = torch.device("cuda")
    agent, buffer = Agent(box(3), box(2), agent_args, device), fill(ReplayBuffer(5000, 3, 2, device), batch)
    agent.normalizer.update(buffer.newest_observations(len(buffer)))
    return agent, buffer


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_graphed_updates_on_a_gpu(dropout):
    """Losses finite, weights move, the graph follows the learning rate and the buffer, and resumes."""
    batch = random_batch(200)._replace(rewards=torch.zeros(200))
    args = small_args(compile=True, dropout=dropout, lr_decay=60, hidden_dims=(64, 64), batch_size=64)
    agent, buffer = on_gpu(args, batch)
    eager, eager_buffer = on_gpu(dataclasses.replace(args, compile=False), batch)
    before = {name: parameters_of(getattr(agent, name)) for name in ("actor", "critic", "target_critic")}
    losses = []
    for _ in range(50):
        metrics = agent.update(buffer, None, 1)
        losses.append({name: float(value) for name, value in metrics.items()})
        eager_metrics = eager.update(eager_buffer, None, 1)
        if not dropout:  # whose draws differ
            assert losses[-1]["losses/critic_loss"] == pytest.approx(
                float(eager_metrics["losses/critic_loss"]), rel=0.05
            )
    captured = {dict(key)["with_actor"] for key in agent.update_once.graphs}
    assert captured == {False, True} and not hasattr(eager.update_once, "graphs")
    assert all(math.isfinite(value) for loss in losses for value in loss.values())
    assert len({loss["losses/critic_loss"] for loss in losses[-20:]}) == 20  # a fresh batch each time
    for name, old in before.items():
        moved = (parameters_of(getattr(agent, name)) - old).abs().mean()
        assert moved > 1e-5, name
        if not dropout:
            gap = (parameters_of(getattr(agent, name)) - parameters_of(getattr(eager, name))).abs().mean()
            assert gap < 0.2 * moved, name
    for _ in range(2):  # the graph of acting follows the weights, and draws anew
        obs, deterministic = batch.observations[0].numpy(), {"deterministic": True}
        acted = [agent.act(obs, **deterministic) for _ in range(3)]
        with torch.inference_mode():
            expected = agent.choose.function(torch.tensor(obs, device="cuda")[None], **deterministic)
        assert_close(acted[-1], expected[0].cpu(), 1e-3)
        assert not np.allclose(agent.act(obs, deterministic=False), agent.act(obs, deterministic=False))
        agent.ema_actor.load_state_dict(agent.actor.state_dict())
    # the buffer grows: high rewards, which the graph has not seen
    for _ in range(10):
        fill(buffer, batch._replace(rewards=torch.full((200,), 100.0)))
    assert float(agent.update(buffer, None, 1)["losses/critic_loss"]) > 100 * losses[-1]["losses/critic_loss"]
    # state: through a file into another agent, which goes on as the first one does
    file = io.BytesIO()
    torch.save(agent.state_dict(), file)
    file.seek(0)
    other, _ = on_gpu(dataclasses.replace(args, seed=7), batch)
    other.load_state_dict(torch.load(file, weights_only=True, map_location="cuda"))
    for name in before:
        assert torch.equal(parameters_of(getattr(other, name)), parameters_of(getattr(agent, name)))
    one, two = (float(each.update(buffer, None, 1)["losses/critic_loss"]) for each in (agent, other))
    if not dropout:
        assert one == pytest.approx(two, rel=1e-3)
    other.update(buffer, None, 7)  # its own graphs too
    agent.update(buffer, None, 7)
    assert agent.critic_updates == other.critic_updates == 59
    # the schedule has reached 0: nothing moves any more
    agent.update(buffer, None, 1)
    before = [parameters_of(agent.actor), parameters_of(agent.critic)]
    agent.update(buffer, None, 4)
    assert torch.equal(before[0], parameters_of(agent.actor)) and torch.equal(before[1], parameters_of(agent.critic))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_run_on_a_gpu(tmp_path):
    """As a user: trains with graphs, resumes there, and its checkpoint is evaluated on a CPU."""
    env = TASKS | {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")}
    flags = [*TINY.split(), *POINT, "--demos", 2, "--eval-every", 100, "--run-dir", "run"]
    run_script(SCRIPT, *flags, "--total-timesteps", 200, cwd=tmp_path, env=env, timeout=280)
    run_script(SCRIPT, "--resume", "run", "--total-timesteps", 300, cwd=tmp_path, env=env, timeout=280)
    columns = read_csv(tmp_path / "run", "train.csv")
    assert columns["global_step"] == [50, 100, 150, 200, 250, 300]
    assert all(math.isfinite(x) for key in columns if "losses" in key for x in columns[key][1:])
    assert torch.load(tmp_path / "run" / "checkpoint.pt", map_location="cpu")["agent"]["critic_updates"] == 250
    last = read_csv(tmp_path / "run", "eval.csv")["eval/episodic_return"][-1]
    result = run_script(SCRIPT, "--eval-only", "run", "--no-capture-video", cwd=tmp_path, env=TASKS)
    measured = float(re.search(r"eval/episodic_return ([-\d.e+]+)", result.stdout)[1])
    assert measured == pytest.approx(last, rel=0.02, abs=0.02)
