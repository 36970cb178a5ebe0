"""sac_state_sim.py: against SERL's arrays, torch.distributions, cases by hand, tasks of known value, and as a user."""

import contextlib
import copy
import dataclasses
import io
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import socket
import time
from pathlib import Path

import gymnasium as gym
import imageio.v2 as imageio
import minari
import numpy as np
import probe_envs
import pytest
import torch
from conftest import REPO, Finished, popen_script, read_csv, read_scalars, run_script, wait_until
from forked import popen_forked, run_forked
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer
from torch import distributions

from sac_state_sim import (
    MLP,
    ActionChunk,
    Agent,
    Args,
    Batch,
    GripperPenalty,
    Normalizer,
    ReplayBuffer,
    episode_seed,
    load_demos,
    make_env,
    parse_args,
    split_rows,
    transition,
    write_atomically,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:minari")
SCRIPT, CPU = "sac_state_sim.py", torch.device("cpu")
SPLITS = (3, 2, 1, 3, 1)  # of the rows of small agents
TASKS = {"PYTHONPATH": str(Path(probe_envs.__file__).parent)}
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
    return Args(**{"hidden_dims": (16, 16), "batch_size": 8, "demos": 0, "compile": False, "threads": 1} | changes)


def small_agent(obs_dim: int = 3, action_dim: int = 2, **changes) -> Agent:
    return Agent(box(obs_dim), box(action_dim), small_args(**changes), CPU)


def random_batch(size: int, obs_dim: int = 3, action_dim: int = 2, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    obs, next_obs = torch.randn(2, size, obs_dim, generator=generator)
    actions = torch.rand(size, action_dim, generator=generator) * 2 - 1
    rewards, ends = torch.randn(size, generator=generator), torch.rand(size, generator=generator) < 0.3
    return Batch(obs, actions, rewards, next_obs, ends.float())


def filled_buffer(size: int = 64, obs_dim: int = 3, action_dim: int = 2, capacity: int = 100) -> ReplayBuffer:
    batch, splits = random_batch(size, obs_dim, action_dim), (obs_dim, action_dim, 1, obs_dim, 1)
    buffer = ReplayBuffer(capacity, splits, CPU)
    columns = [batch.observations, batch.actions, batch.rewards[:, None], batch.next_observations]
    buffer.add(torch.cat([*columns, batch.terminations[:, None]], 1))
    return buffer


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
    "actor_q": "mean",
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
        changes |= {"gamma": losses["in/discount"].item(), "tau": losses["in/tau"].item()}
        changes |= {"critic_lr": losses["in/lr"].item()}
    agent = small_agent(obs.shape[1], actions.shape[1], **SERL_FLAGS | changes)
    for actor in (agent.actor, agent.mean_actor):
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
    assert agent.raw_alpha.item() - before == pytest.approx(-sign * agent.args.alpha_lr, rel=1e-3)  # Adam's first step


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
        agent.make_optimizer([parameter], agent.args.critic_lr, 0.0).step()
        after_adam = losses[f"out/params_after_adam/critic/{name}"]
        np.testing.assert_allclose(parameter.detach().numpy(), after_adam, rtol=0, atol=1.5e-7, err_msg=name)
        # the script's whole step; where the gradient is nearly 0, the direction of Adam's first step is not determined
        clear = abs(stored) > 1e-3 * abs(stored).max()
        ours, ours_target = (kept_rows(x[name].detach().numpy(), stored) for x in (critic, target))
        np.testing.assert_allclose(ours[clear], after_adam[clear], rtol=0, atol=2e-6, err_msg=name)
        target_after = losses[f"out/target_after_update/critic/{name}"]
        np.testing.assert_allclose(ours_target[clear], target_after[clear], rtol=0, atol=3e-7, err_msg=name)
        moved = kept_rows(old_target[name].numpy(), stored) + agent.args.tau * (
            ours - kept_rows(old_target[name].numpy(), stored)
        )
        np.testing.assert_allclose(ours_target, moved, rtol=0, atol=1.2e-7, err_msg=name)


@pytest.mark.parametrize(("case", "warmup"), [("plain", 0), ("warmup", 5)])
def test_serl_optimizer_and_warm_up(losses, case, warmup):
    """Eight ticks from 0 with warm-up counted from a first learning rate of 0."""
    agent, parameter = small_agent(lr_warmup=warmup), torch.nn.Parameter(torch.zeros(losses["optim/grads"].shape[1]))
    agent.actor_optimizer = agent.make_optimizer([parameter], agent.args.actor_lr, 0.0)
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


def test_std_by_exp_and_softplus():
    for name, function in (("exp", np.exp), ("softplus", lambda raw: np.log1p(np.exp(raw)))):
        actor = small_agent(std_parameterization=name, std_min=0.3, std_max=1.5).actor
        actor.log_std.bias.data.copy_(torch.tensor([-3.0, 0.2]))
        actor.log_std.weight.data.zero_()
        _, std = actor(torch.randn(4, 3))
        np.testing.assert_allclose(
            std.detach(), np.tile(np.clip(function(np.array([-3, 0.2])), 0.3, 1.5), (4, 1)), 1e-6
        )


def test_std_as_one_vector_or_a_constant():
    actor = small_agent(std_parameterization="uniform").actor
    _, std = actor(torch.randn(4, 3))
    assert torch.equal(std, torch.ones(4, 2))
    std.sum().backward()
    assert torch.equal(actor.log_std.grad, torch.full((2,), 4.0))
    actor = small_agent(std_parameterization="fixed", fixed_std=0.25).actor
    torch.testing.assert_close(actor(torch.randn(4, 3))[1], torch.full((4, 2), 0.25))
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
    """Subset minimum, entropy, termination, discount and reward scale; REDQ's algorithm 1 written out."""
    agent = small_agent(
        num_qs=3, num_min_qs=2, gamma=0.9, reward_scale=2.0, alpha_init=0.5, backup_entropy=backup_entropy
    )
    next_q = torch.tensor([[1.0, 2.0], [5.0, -9.0], [0.5, 7.0]])  # (E, B)
    agent.actor.sample = lambda obs, eps: (torch.zeros(2, 2), torch.tensor([-1.0, 3.0]))
    agent.target_critic.forward = lambda obs, actions, generator=None: next_q
    agent.critic.forward = lambda obs, actions, generator=None: torch.zeros(3, 2)
    zeros = torch.zeros(2, 3)
    batch = Batch(zeros, zeros[:, :2], torch.tensor([3.0, -1.0]), zeros, torch.tensor([0.0, 1.0]))
    loss, _ = agent.critic_loss(batch, torch.zeros(2, 2), torch.tensor([0, 2]))
    entropy = 0.5 * -1.0 if backup_entropy else 0.0
    targets = [2 * 3.0 + 0.9 * (min(1.0, 0.5) - entropy), 2 * -1.0]
    assert loss.item() == pytest.approx(np.mean(np.square(targets)), rel=1e-5)


def test_update_draws_distinct_critics_uniformly():
    agent, buffer, pairs = small_agent(num_qs=4, num_min_qs=2), filled_buffer(), []
    agent.critic_gradient = lambda batch, eps, subset: pairs.append(tuple(sorted(subset.tolist()))) or {}
    agent.actor_gradient, agent.step_critic, agent.step_actor = (lambda *_: {}, *[lambda: None] * 2)
    agent.update(buffer, None, 600)
    counts = {pair: pairs.count(pair) for pair in set(pairs)}
    assert set(counts) == {(i, j) for j in range(4) for i in range(j)}  # all six pairs, no repeated critic
    assert min(counts.values()) > 60  # 100 expected, standard deviation 9


@pytest.mark.parametrize("actor_q", ["mean", "min"])
def test_actor_maximises_mean_or_minimum(actor_q):
    agent, batch = small_agent(actor_q=actor_q, num_qs=3), random_batch(5)
    actions, log_pi = agent.actor.sample(batch.observations, eps := torch.randn(5, 2))
    q_values = agent.critic(batch.observations, actions).detach().numpy()
    expected = (agent.args.alpha_init * log_pi.detach().numpy() - getattr(q_values, actor_q)(0)).mean()
    assert agent.actor_loss(batch, eps)[0].item() == pytest.approx(expected, rel=1e-5)


def test_actor_imitates_the_demonstrations_of_its_batch():
    """bc_weight times the squared distance of the mode to the last rows' actions, beside the loss without it."""
    agent, batch, eps = (
        small_agent(bc_weight=3.0, demos=1, batch_size=6, demo_ratio=1 / 3),
        random_batch(6),
        torch.randn(6, 2),
    )
    modes = np.array([agent.act(obs, deterministic=True) for obs in batch.observations.numpy()])
    distances = np.square(modes - batch.actions.numpy()).sum(1)
    without = [small_agent(bc_weight=0.0, demos=1), small_agent(demos=0)]
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


def test_temperature_follows_the_entropy_or_stays():
    batch, eps = random_batch(64), torch.randn(64, 2)
    for target_entropy_per_dim, rises in ((-50.0, False), (50.0, True)):
        agent = small_agent(target_entropy_per_dim=target_entropy_per_dim)
        before = agent.alpha.item()
        update_actor(agent, batch, eps)
        assert (agent.alpha.item() > before) is rises
    agent = small_agent(autotune=False, alpha_init=0.2)
    update_actor(agent, batch, eps)
    assert agent.alpha.item() == pytest.approx(0.2, rel=1e-6)


def test_evaluation_acts_with_the_averaged_actor():
    obs = np.array([0.1, -0.2, 0.3])
    agent, buffer, decay = small_agent(actor_ema=0.75, policy_delay=1, actor_lr=0.01), filled_buffer(), 0.75
    average = parameters_of(agent.actor)
    for number in range(1, 8):
        agent.update(buffer, None, 1)
        weight = max(1 - decay, 1 / number)  # a plain mean at first
        average = (1 - weight) * average + weight * parameters_of(agent.actor)
    torch.testing.assert_close(parameters_of(agent.mean_actor), average, rtol=1e-5, atol=1e-6)
    mode = agent.mean_actor(agent.normalizer(torch.tensor(obs, dtype=torch.float32)[None]))[0].tanh()[0]
    assert_close(agent.act(obs, deterministic=True), mode.detach().numpy())
    agent = small_agent(actor_ema=0.0, policy_delay=1)
    agent.update(buffer, None, 5)
    assert torch.equal(parameters_of(agent.mean_actor), parameters_of(agent.actor))


def test_both_steps_start_from_the_same_parameters_on_one_thread_or_two():
    one, two, alone = small_agent(policy_delay=1), small_agent(policy_delay=1, threads=2), small_agent()
    batch, eps, subset = random_batch(8), torch.randn(2, 8, 2), torch.tensor([0, 1])
    rows = [batch.observations, batch.actions, batch.rewards[:, None], batch.next_observations]
    rows = torch.cat([*rows, batch.terminations[:, None]], 1)
    for agent in (one, two):
        agent.update_once(rows, eps, subset, with_actor=True)
    batch = batch._replace(observations=alone.normalizer(batch.observations))
    update_actor(alone, batch, eps[1])  # with the critics of before their step
    assert torch.equal(parameters_of(one.actor), parameters_of(alone.actor))
    assert not torch.equal(parameters_of(one.critic), parameters_of(alone.critic))
    for name in ("actor", "critic", "target_critic", "mean_actor"):
        assert torch.equal(parameters_of(getattr(one, name)), parameters_of(getattr(two, name)))
    assert all(parameter.grad is not None for parameter in two.critic.parameters())


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
    options = {"std_parameterization": "fixed", "fixed_std": 1e-4, "action_chunk": chunk}
    agent = small_agent(action_dim=2 * chunk, explore_prob=0.05, explore_steps=10, **options)
    obs = np.array([0.1, -0.2, 0.3])
    mode = agent.act(obs, deterministic=True).reshape(chunk, 2)
    actions = np.array([agent.act(obs, deterministic=False) for _ in range(4000)]).reshape(4000, chunk, 2)
    held = (abs(actions - mode) > 1e-2).any(1)  # (N, 2)
    assert held.mean(0) == pytest.approx(10 / (10 + 1 / 0.05), abs=0.07)
    assert (held[:, 0] & held[:, 1]).mean() == pytest.approx(held.mean(0).prod(), abs=0.04)  # each on its own
    for dim in range(2):
        starts = np.flatnonzero(np.diff(held[:, dim].astype(int)) == 1) + 1
        values = actions[starts, 0, dim]
        assert -1 < values.min() < -0.8 and 0.8 < values.max() < 1
        for start, value in list(zip(starts, values, strict=True))[:-1]:
            assert (actions[start : start + 10, :, dim] == value).all()  # ten times, through all of a chunk
    assert np.array_equal(agent.act(obs, deterministic=True).reshape(chunk, 2), mode)


def test_target_critic_follows_by_tau():
    agent, batch = small_agent(tau=0.25), random_batch(8)
    target = parameters_of(agent.target_critic)
    update_critic(agent, batch, torch.randn(8, 2), torch.tensor([0, 1]))
    expected = 0.75 * target + 0.25 * parameters_of(agent.critic)
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
    agent, seen = small_agent(batch_size=10, demos=1, demo_ratio=0.3, normalize_observations=False), []
    agent.critic_gradient = lambda batch, eps, subset: seen.append(batch.rewards) or {}
    agent.actor_gradient, agent.step_critic, agent.step_actor = (lambda *_: {}, *[lambda: None] * 2)
    buffer, demos = ReplayBuffer(50, SPLITS, CPU), ReplayBuffer(5, SPLITS, CPU)
    buffer.add(torch.zeros(20, 10))
    demos.add(torch.ones(5, 10))
    agent.update(buffer, demos, 20)
    assert [rewards.tolist() for rewards in seen] == [[0] * 7 + [1] * 3] * 20  # the last rows are the demonstrations


def test_learning_rate_warm_up_and_cosine():
    agent = small_agent(lr_warmup=4, lr_decay=10, actor_lr=1e-3, critic_lr=2e-3)
    for update in range(1, 14):
        agent.critic_updates = update
        agent.schedule_lr()
        factor = min(1, (update - 1) / 4) * 0.5 * (1 + math.cos(math.pi * min(1, update / 10)))
        assert float(agent.actor_optimizer.param_groups[0]["lr"]) == pytest.approx(1e-3 * factor, rel=1e-5, abs=1e-10)
        assert float(agent.critic_optimizer.param_groups[0]["lr"]) == pytest.approx(2e-3 * factor, rel=1e-5, abs=1e-10)
        assert float(agent.alpha_optimizer.param_groups[0]["lr"]) == pytest.approx(agent.args.alpha_lr)
    assert float(agent.actor_optimizer.param_groups[0]["lr"]) == pytest.approx(0, abs=1e-10)


def test_weight_decay_is_decoupled_and_spares_the_temperature():
    agent = small_agent(weight_decay=0.1, actor_lr=0.01, critic_lr=0.02)
    for module, optimizer, lr in (
        (agent.actor, agent.actor_optimizer, 0.01),
        (agent.critic, agent.critic_optimizer, 0.02),
    ):
        before = parameters_of(module)
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        torch.testing.assert_close(parameters_of(module), before * (1 - lr * 0.1))
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
    [{}, {"dropout": 0.1, "backup_entropy": True, "lr_warmup": 5, "weight_decay": 0.01}, {"threads": 2}, {"amp": True}],
    ids=["plain", "many", "threads", "amp"],
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
    options = {"dropout": 0.1, "lr_warmup": 20, "policy_delay": 3}
    one, buffer = small_agent(**options), filled_buffer()
    one.observe(torch.randn(50, 3))
    one.update(buffer, None, 7)
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    other = small_agent(seed=9, **options)
    other.load_state_dict(torch.load(file, weights_only=True))
    for agent in (one, other):
        agent.update(buffer, None, 5)
    for ours, theirs in zip(flat_tensors(one.state_dict()), flat_tensors(other.state_dict())):
        assert ours[0] == theirs[0] and equal(ours[1], theirs[1]), ours[0]


def flat_tensors(state, path: str = "") -> list[tuple[str, object]]:
    """(path, leaf) of every leaf of nested dicts and lists."""
    if isinstance(state, dict):
        return [leaf for key in state for leaf in flat_tensors(state[key], f"{path}/{key}")]
    if isinstance(state, list | tuple):
        return [leaf for i, value in enumerate(state) for leaf in flat_tensors(value, f"{path}/{i}")]
    return [(path, state)]


def equal(a, b) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b or a != a and b != b


# --- Replay buffer and normalizer -------------------------------------------------------------------------------------
def numbered(first: int, count: int) -> torch.Tensor:
    """Rows (count, 10) that hold their number."""
    return torch.arange(first, first + count).float()[:, None].expand(-1, 10)


def test_buffer_keeps_the_newest_rows():
    buffer, total = ReplayBuffer(10, SPLITS, CPU), 0
    for count in (3, 0, 4, 1, 5, 10, 2, 7, 13, 9, 10, 45):
        buffer.add(numbered(total, count))
        total += count
        held = list(range(max(0, total - 10), total))
        assert len(buffer) == len(held) and sorted(buffer.rows[: len(held), 0].tolist()) == held
        assert buffer.last(len(held))[:, 0].tolist() == held
        assert buffer.last(2)[:, 0].tolist() == held[-2:]
        assert len(buffer.last(0)) == 0
        sampled = buffer.sample((400,), torch.Generator().manual_seed(total))[:, 0]
        assert sorted(set(sampled.tolist())) == held
        other = ReplayBuffer(10, SPLITS, CPU)
        other.load_state_dict(buffer.state_dict())
        assert len(other) == len(buffer) and other.last(len(held))[:, 0].tolist() == held
        for one in (other, copy.deepcopy(buffer)):  # goes on in the same places
            one.add(numbered(1000, 4))
            assert one.last(min(10, len(held) + 4))[:, 0].tolist() == [*held, 1000, 1001, 1002, 1003][-10:]
            assert torch.equal(one.rows[: len(one)], other.rows[: len(other)])


def test_buffer_samples_uniformly():
    buffer = ReplayBuffer(20, SPLITS, CPU)
    buffer.add(numbered(0, 8))
    sampled = buffer.sample((40, 200), torch.Generator().manual_seed(0))
    assert sampled.shape == (40, 200, 10)
    counts = torch.bincount(sampled[..., 0].flatten().long(), minlength=20)
    assert counts[8:].sum() == 0
    assert (counts[:8] - 1000).abs().max() < 130  # standard deviation 30


@pytest.mark.parametrize("n_step", [1, 2, 3, 5])
def test_steps_that_follow_are_added_up_within_their_episode(n_step):
    """Against a loop over the episodes; ends by termination and truncation, wrap-around, alternating actors."""
    generator, gamma, episodes = np.random.default_rng(n_step), 0.9, []
    for _ in range(12):
        length, terminates = int(generator.integers(1, 9)), generator.random() < 0.5
        observations, rewards = generator.normal(size=(length + 1, 3)), generator.normal(size=length)
        ends = [terminates and t == length - 1 for t in range(length)]
        episodes.append((observations.astype(np.float32), rewards.astype(np.float32), ends))
    actors = [[(i, t) for i in range(first, 6, 2) for t in range(len(episodes[i][1]))] for first in (0, 1)]
    steps = []
    while any(actors):  # the first six episodes are of two actors, three rows at a time
        for queue in actors:
            steps += [queue.pop(0) for _ in range(min(3, len(queue)))]
    steps += [(i, t) for i in range(6, 12) for t in range(len(episodes[i][1]))]
    rows, numbers = [], {}
    for number, (i, t) in enumerate(steps):
        observations, rewards, ends = episodes[i]
        rows.append(transition(observations[t], np.zeros(2), rewards[t], observations[t + 1], ends[t]))
        numbers[observations[t].tobytes()] = number
    capacity = len(steps) - 7  # the first rows are overwritten
    buffer = ReplayBuffer(capacity, SPLITS, CPU)
    buffer.n_step, buffer.gamma = n_step, gamma
    for part in torch.from_numpy(np.stack(rows)).split(4):
        buffer.add(part)
    sampled, lengths = buffer.follow_up(torch.arange(capacity))[0], set()
    for row in sampled:
        batch, length = split_rows(row, SPLITS), 1
        number = numbers[batch.observations.numpy().tobytes()]
        i, t = steps[number]
        observations, rewards, ends = episodes[i]
        while length < n_step and steps[number + length : number + length + 1] == [(i, t + length)]:
            length += 1
        lengths.add(length)
        expected = sum(gamma**k * rewards[t + k] for k in range(length))
        assert float(batch.rewards) == pytest.approx(expected, abs=1e-5)
        assert np.array_equal(batch.next_observations.numpy(), observations[t + length])
        weight = gamma**length * (1 - ends[t + length - 1])  # of the next observation's value, in the critics' target
        assert gamma * (1 - float(batch.terminations)) == pytest.approx(weight, abs=1e-6)
    assert lengths == set(range(1, n_step + 1))
    if n_step == 1:
        assert torch.equal(sampled, buffer.rows)


def test_rows_and_columns():
    row = transition(np.array([1, 2, 3.0]), np.array([4, 5], np.float32), 6.0, np.array([7, 8, 9.0]), True)
    assert row.dtype == np.float32 and row.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 1]
    batch = split_rows(torch.from_numpy(row)[None], SPLITS)
    expected = ([[1, 2, 3]], [[4, 5]], [6], [[7, 8, 9]], [1])
    assert [column.tolist() for column in batch] == list(expected)


def test_normalizer_is_numpys_mean_and_variance():
    normalizer, data = Normalizer(4), np.random.default_rng(0).normal([0, 5, -100, 2], [1, 0.1, 30, 0], (1000, 4))
    x = torch.tensor(data, dtype=torch.float32)
    assert_close(normalizer(x[:3]).clamp(-10, 10), data[:3].clip(-10, 10))  # the identity, but for the clamp
    for chunk in torch.split(x, [1, 1, 300, 7, 500, 191]):
        normalizer.update(chunk)
    np.testing.assert_allclose(normalizer.mean, data.mean(0), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(normalizer.var, data.var(0), rtol=1e-3, atol=1e-4)
    normal = normalizer(x)
    assert_close(normal[:, :3].mean(0), np.zeros(3), 1e-3)
    assert_close(normal[:, :3].std(0), np.ones(3), 5e-3)
    assert normalizer(torch.tensor([1e9, -1e9, 0, 2]))[:2].tolist() == [10, -10]
    assert normalizer.count == 1000


def test_normalized_agent_sees_normalized_observations():
    agent, scale, shift = small_agent(), torch.tensor([10.0, 0.1, 3.0]), torch.tensor([5.0, -1.0, 100.0])
    plain, obs = small_agent(normalize_observations=False), torch.randn(2000, 3)
    agent.observe(torch.cat([obs * scale + shift, torch.full((2000, 7), 1e3)], 1))  # rows: only the first 3 count
    for row in ((obs[:5] - obs.mean(0)) / obs.std(0)).numpy():
        shifted = row * (scale * obs.std(0)).numpy() + (shift + scale * obs.mean(0)).numpy()
        np.testing.assert_allclose(agent.act(shifted, True), plain.act(row, True), atol=2e-3)
    seen, buffer = [], filled_buffer()
    agent.critic_gradient = lambda batch, eps, subset: seen.append(batch) or {}
    agent.actor_gradient, agent.step_critic, agent.step_actor = (lambda *_: {}, *[lambda: None] * 2)
    agent.update(buffer, None, 1)
    rows = split_rows(buffer.rows[: buffer.total], agent.splits)
    for sampled, raw in (
        (seen[0].observations, rows.observations),
        (seen[0].next_observations, rows.next_observations),
    ):
        known = {tuple(row) for row in agent.normalizer(raw).tolist()}
        assert {tuple(row) for row in sampled.tolist()} <= known


# --- Environment ------------------------------------------------------------------------------------------------------
def point_env(**changes) -> gym.Env:
    return make_env(Args(env_id="probe_envs:Point-v0", **changes))


def test_make_env_flattens_and_rescales():
    env = point_env()
    obs, _ = env.reset(seed=3)
    inner = env.unwrapped
    assert np.allclose(obs, [*inner.goal, *inner.point])  # keys in gymnasium's order
    assert env.action_space.low.tolist() == [-1] * 3 and env.action_space.high.tolist() == [1] * 3
    before = inner.point.copy()
    env.step(np.array([0.5, -1, 0], np.float32))
    np.testing.assert_allclose(inner.point - before, [0.1, -0.2], atol=1e-6)  # 0.1 * 2 * action
    env = point_env(frame_stack=3)
    first, _ = env.reset(seed=3)
    assert first.shape == (12,) and np.allclose(first, np.tile(obs, 3))
    second = env.step(np.array([0.5, -1, 0], np.float32))[0]
    assert np.allclose(second[:8], first[4:]) and not np.allclose(second[8:], obs)


def test_gripper_penalty():
    env = GripperPenalty(gym.make("probe_envs:Point-v0"), 0.1)
    penalties = []
    for episode in range(2):
        env.reset(seed=episode)
        for gripper in (1, 0.2, 0.9, -0.3, -0.9, -1, 0.6):
            _, reward, *_ = env.step(np.array([0, 0, gripper], np.float32))
            distance = np.linalg.norm(env.unwrapped.goal - env.unwrapped.point)
            penalties.append(round(-distance - reward, 6))
    # the first command is free, small ones count for nothing, each switch costs once; a new episode starts afresh
    assert penalties == [0, 0, 0, 0, 0.1, 0, 0.1] * 2


def test_action_chunk_sums_rewards_and_stops_at_the_end():
    actions = np.random.default_rng(0).uniform(-1, 1, (20, 3)).astype(np.float32)
    actions[:, 0] = abs(actions[:, 0])  # away from the termination
    one, chunked = point_env(), ActionChunk(point_env(), 8)
    assert chunked.action_space.shape == (24,)
    obs, _ = one.reset(seed=1)
    assert np.array_equal(obs, chunked.reset(seed=1)[0])
    steps = [one.step(action) for action in actions]
    for first, count in ((0, 8), (8, 8), (16, 4)):
        chunk = np.resize(actions[first : first + count], (8, 3))
        obs, reward, terminated, truncated, info = chunked.step(chunk.ravel())
        assert np.array_equal(obs, steps[first + count - 1][0])
        assert reward == pytest.approx(sum(step[1] for step in steps[first : first + count]))
        assert (terminated, truncated) == (False, first == 16)
        assert info["success"] == steps[first + count - 1][4]["success"]


def test_episode_seeds_of_all_streams_differ():
    keys = [(seed, stream, episode) for seed in (1, 2) for stream in range(3) for episode in range(500)]
    assert len({episode_seed(*key) for key in keys}) == len(keys)
    assert episode_seed(1, 0, 7) == episode_seed(1, 0, 7)


@pytest.mark.parametrize(
    "changes",
    [{}, {"frame_stack": 3}, {"gripper_penalty": 0.3}, {"action_chunk": 4}, {"frame_stack": 2, "action_chunk": 3}],
)
def test_demonstrations_are_the_rows_that_live_steps_would_store(changes):
    plain = Args(env_id="probe_envs:Point-v0", demos=3)
    columns = split_rows(torch.from_numpy(load_demos(plain)), (4, 3, 1, 4, 1))
    episodes = columns.actions.numpy().reshape(3, 20, 3)  # the expert's actions; its episodes last 20 steps
    args = dataclasses.replace(plain, **changes)
    env, chunk, expected = make_env(args), args.action_chunk, []
    for i, actions in enumerate(episodes):
        obs, _ = env.reset(seed=episode_seed(args.seed, 2, i))
        for first in range(0, 20, chunk):
            action = np.concatenate([actions, np.repeat(actions[-1:], chunk, 0)])[first : first + chunk].ravel()
            next_obs, reward, terminated, truncated, _ = env.step(action)
            expected.append(transition(obs, action, reward, next_obs, terminated))
            obs = next_obs
        assert truncated
    rows = load_demos(args)
    assert rows.dtype == np.float32 and rows.shape == np.shape(expected)
    np.testing.assert_allclose(rows, expected, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 4])
def test_a_demonstration_that_terminates(monkeypatch, chunk):
    """The last transition of an episode that terminates keeps its termination, also inside a chunk."""
    to_the_left = np.array([-2, 0, 0], np.float32)
    monkeypatch.setattr(probe_envs.Point, "expert_action", lambda self: to_the_left)
    args = Args(env_id="probe_envs:Point-v0", demos=1, demo_noise=0, action_chunk=chunk, seed=3)
    rows, env = load_demos(args), gym.make("probe_envs:Point-v0")
    env.reset(seed=episode_seed(args.seed, 2, 0))
    steps = 1
    while not env.step(to_the_left)[2]:
        steps += 1
    assert steps % 4  # so that the last chunk is cut short
    assert len(rows) == math.ceil(steps / chunk)
    assert rows[:, -1].tolist() == [0] * (len(rows) - 1) + [1]
    assert rows[-1, 4 + 3 * chunk] < -1  # the reward of the termination is there


def write_minari(name: str, env: gym.Env, episodes: int = 2, seed: int = 0) -> None:
    """A dataset of the task's expert, or of random actions; Minari's own collector needs JAX."""
    buffers = []
    for i in range(episodes):
        (obs, _), steps = env.reset(seed=episode_seed(seed, 2, i)), []
        observations, done = [obs], False
        while not done:
            action = getattr(env.unwrapped, "expert_action", env.action_space.sample)()
            obs, reward, terminated, truncated, _ = env.step(action)
            observations.append(obs)
            steps.append((action, reward, terminated, truncated))
            done = terminated or truncated
        actions, rewards, terminations, truncations = (np.array(column) for column in zip(*steps))
        if isinstance(obs, dict):
            observations = {key: np.array([o[key] for o in observations]) for key in obs}
        buffers.append(EpisodeBuffer(i, None, None, observations, actions, rewards, terminations, truncations, {}))
    both = {"observation_space": env.observation_space, "action_space": env.action_space}
    minari.create_dataset_from_buffers(name, buffers, env=env.spec, **both)


def test_demonstrations_from_a_minari_dataset(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    write_minari("point/expert-v0", gym.make("probe_envs:Point-v0"), episodes=3, seed=5)
    from_expert = load_demos(Args(env_id="probe_envs:Point-v0", demos=3, seed=5, demo_noise=0))
    from_dataset = load_demos(Args(env_id="probe_envs:Point-v0", demo_dataset="point/expert-v0"))
    assert len(from_dataset) == 60 and np.array_equal(from_dataset, from_expert)


class OtherKeys(probe_envs.Point):
    observation_space = gym.spaces.Dict(
        {"place": gym.spaces.Box(-1, 1, (2,), np.float64), "goal": gym.spaces.Box(-1, 1, (2,), np.float64)}
    )

    def observe(self):
        return {"place": self.point.copy(), "goal": self.goal.copy()}


class OtherBounds(probe_envs.Point):
    action_space = gym.spaces.Box(-1, 1, (3,), np.float32)

    def expert_action(self):
        return super().expert_action() / 2


@pytest.mark.parametrize("env", [probe_envs.OtherPoint, probe_envs.TwoSteps, OtherKeys, OtherBounds])
def test_demonstrations_of_another_task_are_refused(tmp_path, monkeypatch, env):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    write_minari("other/expert-v0", env())
    with pytest.raises(SystemExit, match="--demo-dataset other/expert-v0: "):
        load_demos(Args(env_id="probe_envs:Point-v0", demo_dataset="other/expert-v0"))


def test_noise_on_the_expert_is_seeded_and_of_the_given_size():
    args = Args(env_id="probe_envs:IdleExpert-v0", demos=20, demo_noise=0.2)
    rows = load_demos(args)
    assert np.array_equal(rows, load_demos(args))
    noise = rows[:, 4:7]  # its expert always says 0
    assert noise.std(0) == pytest.approx([0.2] * 3, rel=0.15) and abs(noise.mean(0)).max() < 0.05
    assert not np.array_equal(rows[0], load_demos(dataclasses.replace(args, seed=2))[0])


# --- Runs: tasks of known value ---------------------------------------------------------------------------------------
TINY = (
    "--threads 1 --hidden-dims 32 32 --batch-size 32 --utd-ratio 1 --policy-delay 2 --learning-starts 50 --log-every 50"
)
TINY += " --save-every 100 --eval-every 100 --eval-episodes 2 --final-eval-episodes 2 --no-capture-video --demos 0"
POINT = ("--env-id", "probe_envs:Point-v0")


def run(*flags: object, cwd: Path, **options) -> Finished:
    """The script with small networks and budgets; later flags win."""
    options["env"] = TASKS | options.get("env", {})
    return run_forked(SCRIPT, *TINY.split(), *flags, cwd=cwd, **options)


def checkpoint(run_dir: Path) -> dict:
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def trained_agent(run_dir: Path, obs_dim: int, action_dim: int) -> Agent:
    args = json.loads((run_dir / "args.json").read_text())
    agent = Agent(
        box(obs_dim), box(action_dim), Args(**args | {"hidden_dims": tuple(args["hidden_dims"]), "cuda": False}), CPU
    )
    agent.load_state_dict(checkpoint(run_dir)["agent"])
    return agent


LEARN = "--total-timesteps 450 --utd-ratio 2 --critic-lr 3e-3 --actor-lr 3e-3 --tau 0.05 --gamma 0.5 --eval-every 1000"


def learn(task: str, cwd: Path) -> Agent:
    flags = ("--env-id", f"probe_envs:{task}-v0", *LEARN.split(), "--run-dir", "run")
    return trained_agent(run(*flags, cwd=cwd).run_dir, 1, 1)


def value(agent: Agent, obs: float, action: float = 0.0) -> float:
    with torch.no_grad():
        return agent.critic(agent.normalizer(torch.tensor([[obs]])), torch.tensor([[action]])).mean().item()


def test_learns_the_value_of_a_constant_reward(tmp_path):
    assert value(learn("ConstantReward", tmp_path), 0) == pytest.approx(1, abs=0.05)


def test_truncation_does_not_cut_the_bootstrap(tmp_path):
    assert value(learn("TruncatedReward", tmp_path), 0) == pytest.approx(1 / (1 - 0.5), abs=0.1)


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


# --- Runs: what they leave behind -------------------------------------------------------------------------------------
WITH_DEMOS = (*POINT, "--demos", 3, "--total-timesteps", 300)
GO_ON = ("--resume", "run", "--no-capture-video", "--total-timesteps")
TIMES = {"wall_s", "charts/SPS", "time/act_ms", "time/env_ms", "time/update_ms"}
TRAIN_KEYS = (
    "charts/episodic_return charts/episodic_length charts/success charts/SPS losses/critic_loss losses/q_values "
)
TRAIN_KEYS += "losses/actor_loss losses/entropy losses/alpha time/act_ms time/env_ms time/update_ms"
EVAL_KEYS = "eval/episodic_return eval/episodic_length eval/success_rate eval/episodes"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Finished:
    """A run to read; tests that change it copy it first."""
    return run(*WITH_DEMOS, "--capture-video", "--run-dir", "run", cwd=tmp_path_factory.mktemp("finished"))


def copy_run(finished: Finished, cwd: Path) -> Path:
    return Path(shutil.copytree(finished.run_dir, cwd / "run"))


def leaves(run_dir: Path) -> dict[str, object]:
    """All that a checkpoint holds, but for the time that it took."""
    return {path: leaf for path, leaf in flat_tensors(checkpoint(run_dir)) if path != "/progress/elapsed"}


def differences(one: Path, other: Path) -> list[str]:
    """Names of what differs between two checkpoints."""
    ours, theirs = leaves(one), leaves(other)
    assert ours.keys() == theirs.keys()
    return [path for path in ours if not equal(ours[path], theirs[path])]


def table(run_dir: Path, name: str) -> dict[str, list[float]]:
    """A CSV without the columns that measure time, comparable with ==."""
    return {key: [f"{x}" for x in column] for key, column in read_csv(run_dir, name).items() if key not in TIMES}


def test_checkpoint_holds_everything(finished):
    state = checkpoint(finished.run_dir)
    paths = " ".join(leaves(finished.run_dir))
    for part in ("actor/", "critic/", "target_critic/", "normalizer/", "generator", "raw_alpha", "exp_avg"):
        assert part in paths, part
    assert len(state["buffer"]["rows"]) == 300
    assert len(state["demos"]["rows"]) == 60


def test_train_csv_has_the_promised_keys_and_is_finite(finished):
    columns = read_csv(finished.run_dir, "train.csv")
    assert {"global_step", "wall_s", *TRAIN_KEYS.split()} <= columns.keys()
    assert columns["global_step"] == [50, 100, 150, 200, 250, 300]
    for key in TRAIN_KEYS.split():
        assert all(math.isfinite(x) for x in columns[key][1:]), key  # from the first update on
    assert columns["wall_s"] == sorted(columns["wall_s"])


def test_eval_csv_has_the_promised_keys_and_is_finite(finished):
    columns = read_csv(finished.run_dir, "eval.csv")
    assert {"global_step", "wall_s", *EVAL_KEYS.split()} <= columns.keys()
    assert columns["global_step"] == [100, 200, 300]
    assert all(math.isfinite(x) for key in EVAL_KEYS.split() for x in columns[key])
    assert columns["eval/episodes"] == [2, 2, 2] and columns["eval/episodic_length"][0] <= 20


def test_the_printed_numbers_are_those_of_eval_csv(finished):
    columns = read_csv(finished.run_dir, "eval.csv")
    for word, episodic_return in (
        ("last", columns["eval/episodic_return"][-1]),
        ("best", max(columns["eval/episodic_return"])),
    ):
        line = next(line for line in finished.stdout.splitlines() if line.startswith(word))
        assert f"{episodic_return:.3g}" in line and "over 2 episodes" in line


def test_tensorboard_has_the_numbers_of_the_csv_files(finished):
    scalars = read_scalars(finished.run_dir)
    for name in ("train", "eval"):
        columns = read_csv(finished.run_dir, f"{name}.csv")
        for key in columns.keys() - {"global_step", "wall_s"}:
            ours = [pair for pair in zip(columns["global_step"], columns[key]) if math.isfinite(pair[1])]
            theirs = [pair for pair in scalars[key] if math.isfinite(pair[1])]
            np.testing.assert_allclose(theirs, ours, rtol=1e-6, err_msg=key)


def test_run_directory_names_its_origin(finished):
    run_dir, about = finished.run_dir, json.loads((finished.run_dir / "run.json").read_text())
    assert about["command"][1:] == [*TINY.split(), *map(str, WITH_DEMOS), "--capture-video", "--run-dir", "run"]
    assert about["versions"]["torch"] == torch.__version__ and about["versions"]["numpy"] == np.__version__
    assert about["git_commit"] == "unknown" or re.fullmatch("[0-9a-f]{40}[+]?", about["git_commit"])
    args = json.loads((run_dir / "args.json").read_text())
    assert args.keys() == {field.name for field in dataclasses.fields(Args)}
    assert (args["env_id"], args["demos"], args["hidden_dims"]) == ("probe_envs:Point-v0", 3, [32, 32])
    for script in (SCRIPT, "franka_sim.py"):
        assert (run_dir / script).read_bytes() == (REPO / script).read_bytes()


def test_curve_shows_a_line(finished):
    image = imageio.imread(finished.run_dir / "curve.png")[..., :3].astype(int)
    assert min(image.shape[:2]) > 200
    assert (np.ptp(image, axis=-1) > 100).sum() > 100  # coloured pixels: a curve, not only axes and text


def test_video_shows_the_policy(finished):
    frames = np.array(imageio.mimread(finished.run_dir / "video.mp4", memtest=False))
    assert len(frames) >= 20 and frames.shape[1:] == (64, 64, 3)
    assert (frames[..., 1] > 150).sum(axis=(1, 2)).min() > 4  # the goal, in green
    assert abs(frames[0].astype(int) - frames[19]).max() > 100  # the point moves


def test_training_changes_every_weight(finished):
    env = point_env()
    args = json.loads((finished.run_dir / "args.json").read_text())
    new = Agent(env.observation_space, env.action_space, Args(**args | {"hidden_dims": (32, 32)}), CPU)
    trained = trained_agent(finished.run_dir, 4, 3)
    for part in ("actor", "critic", "target_critic"):
        for (name, one), other in zip(getattr(new, part).named_parameters(), getattr(trained, part).parameters()):
            assert not torch.equal(one, other), f"{part}.{name}"
    assert trained.critic_updates == 250 and trained.alpha.item() != pytest.approx(args["alpha_init"])
    assert trained.normalizer.count == 360  # 300 steps and 60 rows of demonstrations


def test_same_seed_same_numbers_other_seed_other_numbers(finished, tmp_path):
    again = run(*WITH_DEMOS, "--run-dir", "again", cwd=tmp_path)
    assert differences(finished.run_dir, again.run_dir) == []
    for name in ("train.csv", "eval.csv"):
        assert table(finished.run_dir, name) == table(again.run_dir, name)
    other = run(*WITH_DEMOS, "--seed", 2, "--run-dir", "other", cwd=tmp_path)
    different = differences(finished.run_dir, other.run_dir)
    assert {"/buffer/rows", "/agent/generator", "/demos/rows", "/agent/raw_alpha"} <= set(different)
    assert table(finished.run_dir, "eval.csv") != table(other.run_dir, "eval.csv")


def test_the_copied_script_runs_again_elsewhere(finished, tmp_path):
    """The run directory is enough: its script with its command, in another folder, gives the same numbers."""
    script = copy_run(finished, tmp_path) / SCRIPT
    command = json.loads((finished.run_dir / "run.json").read_text())["command"][1:]
    run_script(str(script), *command, cwd=tmp_path / "elsewhere", env=TASKS)
    again = tmp_path / "elsewhere" / "run"
    assert table(again, "train.csv") == table(finished.run_dir, "train.csv")
    assert (again / SCRIPT).read_bytes() == script.read_bytes()


def test_a_run_gets_a_directory_of_its_own(tmp_path):
    first = run(*POINT, "--total-timesteps", 60, "--exp-name", "mine", cwd=tmp_path)
    assert first.run_dir.parent == tmp_path / "runs"
    assert re.fullmatch(r"probe_envs-Point-v0__mine__1__\d+", first.run_dir.name)
    assert str(first.run_dir.relative_to(tmp_path)) in first.stdout


def test_eval_only_repeats_the_last_evaluation(finished, tmp_path):
    run_dir = copy_run(finished, tmp_path)
    before = {path.name: path.read_bytes() for path in run_dir.iterdir()}
    (run_dir / "video.mp4").unlink()
    result = run_forked(SCRIPT, "--eval-only", "run", cwd=tmp_path, env=TASKS)
    numbers = {line.split(": ", 1)[0]: line.split(": ", 1)[1] for line in result.stdout.splitlines() if ": " in line}
    last = next(line for line in finished.stdout.splitlines() if line.startswith("last: "))
    assert numbers["checkpoint"] == last.removeprefix("last: ")
    assert len(imageio.mimread(run_dir / "video.mp4", memtest=False)) >= 20
    assert {path.name: path.read_bytes() for path in run_dir.iterdir() if path.name != "video.mp4"} == {
        name: data for name, data in before.items() if name != "video.mp4"
    }


def test_demos_zero_ratio_and_all_options_at_once(tmp_path):
    """Every switch that the other runs leave alone, in a run that reaches gradient steps."""
    flags = "--frame-stack 2 --action-chunk 2 --gripper-penalty 0.1 --demos 2 --demo-ratio 0.25 --activation gelu"
    flags += " --no-layer-norm --dropout 0.1 --no-normalize-observations --num-qs 5 --num-min-qs 3 --actor-q min"
    flags += " --backup-entropy --std-parameterization softplus --no-autotune --target-entropy-per-dim -1"
    flags += " --reward-scale 2 --lr-warmup 10 --lr-decay 200 --weight-decay 0.01 --hidden-dims 16 24 32 --run-dir run"
    run(*POINT, *flags.split(), "--total-timesteps", 150, cwd=tmp_path)
    columns = read_csv(tmp_path / "run", "train.csv")
    assert all(math.isfinite(x) for key in columns if "losses" in key for x in columns[key][1:])
    assert checkpoint(tmp_path / "run")["buffer"]["rows"].shape == (150, 8 + 6 + 1 + 8 + 1)
    assert checkpoint(tmp_path / "run")["agent"]["actor"]["trunk.linears.2.weight"].shape == (1, 24, 32)


@pytest.mark.parametrize("std_parameterization", ["uniform", "fixed"])
def test_runs_with_other_standard_deviations(tmp_path, std_parameterization):
    run(
        *POINT, "--std-parameterization", std_parameterization, "--total-timesteps", 120, "--run-dir", "r", cwd=tmp_path
    )
    assert math.isfinite(read_csv(tmp_path / "r", "train.csv")["losses/actor_loss"][-1])


@pytest.mark.slow
def test_wandb_mirrors_offline(tmp_path):
    flags = (*POINT, "--total-timesteps", 100, "--track", "--run-dir", "run")
    run_script(SCRIPT, *TINY.split(), *flags, cwd=tmp_path, env=TASKS | {"WANDB_MODE": "offline"})
    assert list((tmp_path / "run").glob("wandb/offline-run-*/*.wandb"))


# --- Runs: stop, kill, resume -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("first", "total", "flags"),
    [
        (
            2000,
            4000,
            "--env-id Pendulum-v1 --learning-starts 500 --eval-every 2000 --eval-episodes 1 --save-every 1000",
        ),
        (300, 650, "--env-id HalfCheetah-v5 --eval-every 1000 --eval-episodes 1 --save-every 1000"),
        (130, 200, "--env-id FrankaPickCube-v0 --demos 1 --eval-every 1000 --eval-episodes 1"),
        (
            75,
            150,
            "--env-id probe_envs:Point-v0 --frame-stack 2 --action-chunk 3 --gripper-penalty 0.1 --demos 2"
            " --dropout 0.1 --lr-warmup 100 --lr-decay 200 --buffer-size 90 --explore-prob 0.2 --n-step 3",
        ),
    ],
    ids=["Pendulum", "HalfCheetah-mid-episode", "FrankaPickCube-mid-episode", "all-wrappers-mid-episode"],
)
def test_resume_is_exact(tmp_path, first, total, flags):
    flags = [*flags.split(), "--final-eval-episodes", 1]
    run(*flags, "--total-timesteps", total, "--run-dir", "whole", cwd=tmp_path)
    run(*flags, "--total-timesteps", first, "--run-dir", "parts", cwd=tmp_path)
    assert checkpoint(tmp_path / "parts")["progress"]["global_step"] == first
    resumed = run_forked(SCRIPT, "--resume", "parts", "--total-timesteps", total, cwd=tmp_path, env=TASKS)
    assert "does not repeat itself" not in resumed.stderr
    assert [path for path in differences(tmp_path / "whole", tmp_path / "parts") if "/progress/best" not in path] == []
    whole, parts = (table(tmp_path / name, "train.csv") for name in ("whole", "parts"))
    steps = [str(float(step)) for step in range(50, total + 1, 50)]
    assert whole["global_step"] == parts["global_step"] == steps
    for key in whole:
        assert whole[key] == parts[key], key


def interrupt(process, run_dir: Path, step: int) -> None:
    """Ctrl-C when train.csv has reached `step`."""
    train_csv = run_dir / "train.csv"
    wait_until(lambda: train_csv.exists() and f"\n{step}," in train_csv.read_text())
    os.kill(process.pid, signal.SIGINT)


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    flags = [*TINY.split(), *POINT, "--demos", 2, "--save-every", 10_000, "--eval-every", 500]
    with popen_script(
        SCRIPT, *flags, "--total-timesteps", 1500, "--run-dir", "run", cwd=tmp_path, env=TASKS
    ) as process:
        interrupt(process, tmp_path / "run", 100)
        assert process.wait(20) not in (0, None)
    errors = process.stderr_path.read_text()
    assert "--resume run" in errors and "Traceback" not in errors
    stopped_at = checkpoint(tmp_path / "run")["progress"]["global_step"]
    assert 100 <= stopped_at < 1500
    columns, scalars = read_csv(tmp_path / "run", "train.csv"), read_scalars(tmp_path / "run")
    assert [step for step, _ in scalars["losses/critic_loss"]] == columns["global_step"]  # nothing is left behind
    run_forked(SCRIPT, "--resume", "run", cwd=tmp_path, env=TASKS)
    run_forked(SCRIPT, *flags, "--total-timesteps", 1500, "--run-dir", "whole", cwd=tmp_path, env=TASKS)
    assert differences(tmp_path / "run", tmp_path / "whole") == []
    for name in ("train.csv", "eval.csv"):
        assert table(tmp_path / "run", name) == table(tmp_path / "whole", name)
    scalars = read_scalars(tmp_path / "run")
    assert [step for step, _ in scalars["losses/critic_loss"]] == list(range(50, 1501, 50))


def test_ctrl_c_during_the_last_evaluation(tmp_path):
    flags = (*POINT, "--total-timesteps", 100, "--run-dir", "run")
    with popen_forked(
        SCRIPT, *TINY.split(), *flags, "--final-eval-episodes", 10**6, cwd=tmp_path, env=TASKS
    ) as process:
        wait_until(lambda: (tmp_path / "run" / "checkpoint.pt").exists())
        time.sleep(0.5)
        os.kill(process.pid, signal.SIGINT)
        process.join(5)
        assert process.exitcode, "goes on for minutes"
    assert "Traceback" not in process.stderr_path.read_text() and "--resume run" in process.stderr_path.read_text()
    run_forked(SCRIPT, "--resume", "run", "--final-eval-episodes", 2, cwd=tmp_path, env=TASKS)
    assert read_csv(tmp_path / "run", "eval.csv")["eval/episodes"][-1] == 2


def test_kill_during_the_last_evaluation(tmp_path):
    flags = (*POINT, "--total-timesteps", 100, "--run-dir", "run")
    with popen_forked(
        SCRIPT, *TINY.split(), *flags, "--final-eval-episodes", 10**6, cwd=tmp_path, env=TASKS
    ) as process:
        wait_until(lambda: (tmp_path / "run" / "checkpoint.pt").exists())
        time.sleep(0.5)
        process.kill()
    run_forked(SCRIPT, "--resume", "run", "--final-eval-episodes", 2, cwd=tmp_path, env=TASKS)
    run(*flags[:-1], "whole", cwd=tmp_path)
    assert table(tmp_path / "run", "eval.csv") == table(tmp_path / "whole", "eval.csv")
    assert (tmp_path / "run" / "curve.png").exists()
    assert differences(tmp_path / "run", tmp_path / "whole") == []


def test_kill_at_twenty_moments(tmp_path):
    """kill -9, twenty times in a row on one run; then it finishes as if nothing had happened."""
    flags = [*TINY.split(), *POINT, "--demos", 2, "--save-every", 30, "--eval-every", 70, "--eval-episodes", 1]
    flags += ["--total-timesteps", 2500]
    moments, run_dir, kills, steps = random.Random(0), tmp_path / "run", 0, []
    while kills < 20:
        go_on = ["--resume", "run"] if run_dir.exists() else [*flags, "--run-dir", "run"]
        with popen_forked(SCRIPT, *go_on, cwd=tmp_path, env=TASKS) as process:
            process.join(moments.uniform(0, 0.7))
            killed = process.exitcode is None
        errors = process.stderr_path.read_text()
        assert "Traceback" not in errors and "--resume" not in errors, errors
        if not killed:
            break  # a fast machine has finished by now
        kills += 1
        if (run_dir / "checkpoint.pt").exists():
            steps.append(checkpoint(run_dir)["progress"]["global_step"])
    assert kills > 5 and steps == sorted(steps)
    if killed:
        run_forked(SCRIPT, "--resume", "run", cwd=tmp_path, env=TASKS)
    run_forked(SCRIPT, *flags, "--run-dir", "whole", cwd=tmp_path, env=TASKS)
    assert differences(run_dir, tmp_path / "whole") == []
    for name in ("train.csv", "eval.csv"):
        assert table(run_dir, name) == table(tmp_path / "whole", name)


def test_files_are_replaced_never_overwritten(tmp_path):
    path, link = tmp_path / "file", tmp_path / "link"
    path.write_bytes(b"old")
    os.link(path, link)
    write_atomically(path, b"new and longer")
    assert (path.read_bytes(), link.read_bytes()) == (b"new and longer", b"old")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "link"]


def test_resume_after_a_kill_between_the_last_evaluation_and_its_checkpoint(finished, tmp_path):
    run_dir = copy_run(finished, tmp_path)
    (run_dir / "checkpoint.previous").replace(run_dir / "checkpoint.pt")  # from just before that evaluation
    run_forked(SCRIPT, "--resume", "run", cwd=tmp_path, env=TASKS)
    assert table(run_dir, "eval.csv") == table(finished.run_dir, "eval.csv")
    assert differences(run_dir, finished.run_dir) == []


@pytest.mark.parametrize("content", ["", "global_st", "global_step,wall_s\n", "global_step,wall_s\n5"])
def test_resume_after_a_kill_while_a_csv_was_begun(finished, tmp_path, content):
    run_dir = copy_run(finished, tmp_path)
    state = checkpoint(run_dir)
    (run_dir / "train.csv").write_text(content)
    run_forked(SCRIPT, *GO_ON, 350, cwd=tmp_path, env=TASKS)
    if not content.endswith("5"):
        assert read_csv(run_dir, "train.csv")["global_step"][-1] == 350
    assert checkpoint(run_dir)["progress"]["global_step"] == 350 > state["progress"]["global_step"]


def test_resume_between_the_two_renames_of_a_checkpoint(finished, tmp_path):
    run_dir = copy_run(finished, tmp_path)
    (run_dir / "checkpoint.pt").rename(run_dir / "checkpoint.previous")
    run_forked(SCRIPT, *GO_ON, 350, cwd=tmp_path, env=TASKS)
    assert checkpoint(run_dir)["progress"]["global_step"] == 350


def test_resume_of_a_task_that_does_not_repeat_itself(tmp_path):
    flags = ("--env-id", "probe_envs:NeverTwiceTheSame-v0", "--total-timesteps", 110, "--run-dir", "run")
    run(*flags, cwd=tmp_path)
    rows = checkpoint(tmp_path / "run")["buffer"]["rows"]
    resumed = run_forked(SCRIPT, "--resume", "run", "--total-timesteps", 150, cwd=tmp_path, env=TASKS)
    assert "does not repeat itself" in resumed.stderr
    assert torch.equal(checkpoint(tmp_path / "run")["buffer"]["rows"][:110], rows)
    assert len(checkpoint(tmp_path / "run")["buffer"]["rows"]) == 150


# --- Runs: Minari datasets --------------------------------------------------------------------------------------------
def test_recorded_dataset_becomes_demonstrations(finished, tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    copy_run(finished, tmp_path)
    record = ("--eval-only", "run", "--record-dataset", "point/mine-v0", "--final-eval-episodes", 7)
    result = run_forked(SCRIPT, *record, cwd=tmp_path, env=TASKS)
    assert "over 7 episodes" in result.stdout
    dataset = minari.load_dataset("point/mine-v0")
    episodes = list(dataset.iterate_episodes())
    assert len(episodes) == dataset.total_episodes == 7
    scores = dataset.storage.metadata
    mean_return = np.mean([episode.rewards.sum() for episode in episodes])
    assert f"{mean_return:.3g}" in result.stdout and scores["ref_max_score"] == pytest.approx(mean_return, rel=1e-5)
    assert math.isfinite(scores["ref_min_score"]) and scores["ref_min_score"] != scores["ref_max_score"]
    assert isinstance(dataset.recover_environment().unwrapped, probe_envs.Point)
    assert isinstance(dataset.recover_environment(eval_env=True).unwrapped, probe_envs.Point)
    env = gym.make("probe_envs:Point-v0")
    for i, episode in enumerate(episodes):  # real episodes: the same actions lead to the same observations
        obs, _ = env.reset(seed=episode_seed(1, 1, i))
        assert np.array_equal(obs["goal"], episode.observations["goal"][0])
        for t, action in enumerate(episode.actions):
            obs, reward, terminated, truncated, _ = env.step(action)
            assert np.array_equal(obs["point"], episode.observations["point"][t + 1]) and reward == episode.rewards[t]
        assert (terminated, truncated) == (episode.terminations[-1], episode.truncations[-1])
    learned = ("--demo-dataset", "point/mine-v0", "--total-timesteps", 120, "--run-dir", "learned")
    run(*POINT, *learned, cwd=tmp_path)
    assert len(checkpoint(tmp_path / "learned")["demos"]["rows"]) == dataset.total_steps
    for name in ("point/mine-v0", "no version"):  # taken, malformed: said before the work, not after it
        error = refused("--eval-only", "run", "--record-dataset", name, "--final-eval-episodes", 10**6, cwd=tmp_path)
        assert "--record-dataset" in error and name in error


# --- Bad input --------------------------------------------------------------------------------------------------------
def refused(*flags: object, cwd: Path, **options) -> str:
    """The error of a run that must fail: one line, no traceback."""
    result = run_forked(SCRIPT, *flags, cwd=cwd, check=False, timeout=15, env=TASKS | options.pop("env", {}), **options)
    assert result.returncode not in (0, None)
    assert "Traceback" not in result.stderr, result.stderr
    errors = [line for line in re.split("[\r\n]", result.stderr) if line.strip() and "step/s]" not in line]
    assert len(errors) == 1 and errors[0].startswith("sac_state_sim.py: "), result.stderr
    return errors[0]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--env-id NoSuchTask-v0", "--env-id NoSuchTask"),
        ("--env-id no_such_module:Task-v0", "--env-id no_such_module"),
        ("--env-id CartPole-v1", "--env-id CartPole-v1 actions Discrete"),
        ("--env-id probe_envs:Images-v0", "--env-id probe_envs:Images-v0 sac_pixel_sim.py"),
        ("--env-id probe_envs:DictImages-v0", "--env-id probe_envs:DictImages-v0 sac_pixel_sim.py"),
        ("--env-id probe_envs:Unbounded-v0", "--env-id probe_envs:Unbounded-v0 bounded"),
        ("--env-id probe_envs:Sequences-v0", "--env-id probe_envs:Sequences-v0 observations"),
        ("--env-id Pendulum-v1 --demos 5", "--demos 5 Pendulum-v1 expert"),
        ("--env-id probe_envs:Point-v0 --demo-dataset no/such-v0", "--demo-dataset no/such-v0"),
        ("--num-qs 2 --num-min-qs 3", "--num-min-qs 3 --num-qs 2"),
        ("--num-min-qs 0", "--num-min-qs"),
        ("--demo-ratio 1.5", "--demo-ratio 1.5"),
        ("--batch-size 0", "--batch-size"),
        ("--utd-ratio 0", "--utd-ratio"),
        ("--total-timesteps 0", "--total-timesteps"),
        ("--buffer-size 0", "--buffer-size"),
        ("--frame-stack 0", "--frame-stack"),
        ("--action-chunk 0", "--action-chunk"),
        ("--eval-every 0", "--eval-every"),
        ("--eval-episodes 0", "--eval-episodes"),
        ("--log-every 0", "--log-every"),
        ("--save-every 0", "--save-every"),
        ("--demos -1", "--demos"),
        ("--dropout 1", "--dropout"),
        ("--alpha-init 0", "--alpha-init"),
        ("--gamma 1.5", "--gamma"),
        ("--hidden-dims 0", "--hidden-dims"),
        ("--resume nowhere", "--resume nowhere"),
        ("--eval-only nowhere", "--eval-only nowhere"),
        ("--role actor --learner-timeout-s 1 --port {port} --env-id probe_envs:Point-v0", "127.0.0.1:{port} --learner"),
        ("--role learner --bind 0.0.0.0 --demos 0", "--bind 0.0.0.0 --curve-keys --insecure-lan"),
    ],
)
def test_bad_flags(tmp_path, flags, words):
    port = free_port()
    error = refused(*flags.format(port=port).split(), "--threads", 1, cwd=tmp_path)
    for word in words.format(port=port).split():
        assert word in error


@pytest.mark.parametrize(
    "flags", ["--seed one", "--hidden-dims 32 x", "--activation sigmoid", "--gamma", "--no-such-flag 1"]
)
def test_wrong_types(tmp_path, flags):
    """tyro's own message: it may frame the line, but names the flag and has no traceback."""
    result = run_forked(SCRIPT, *flags.split(), cwd=tmp_path, check=False)
    assert result.returncode not in (0, None)
    assert "Traceback" not in result.stderr and flags.split()[0] in result.stderr + result.stdout


def free_port() -> int:
    """A port with a free one above it."""
    while True:
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            with contextlib.suppress(OSError):
                other.bind(("127.0.0.1", one.getsockname()[1] + 1))
                return one.getsockname()[1]


def test_run_dir_that_is_not_empty(finished, tmp_path):
    run_dir = copy_run(finished, tmp_path)
    before = sorted((path.name, path.read_bytes()) for path in run_dir.iterdir())
    assert "--run-dir run" in refused(*POINT, "--run-dir", "run", cwd=tmp_path)
    assert sorted((path.name, path.read_bytes()) for path in run_dir.iterdir()) == before


def test_resume_of_a_finished_run_asks_for_more_steps(finished, tmp_path):
    copy_run(finished, tmp_path)
    assert "--total-timesteps 300" in refused("--resume", "run", cwd=tmp_path)


FREE = "run_dir resume eval_only record_dataset capture_video track wandb_project_name cuda compile threads"
FREE += " total_timesteps eval_every eval_episodes final_eval_episodes log_every save_every role learner port bind"
FREE += " curve_keys insecure_lan paced publish_every learner_timeout_s exp_name amp actor_ahead"


@pytest.mark.parametrize("flag", ["--resume", "--eval-only"])
def test_resume_with_other_flags(tmp_path, monkeypatch, capsys, flag):
    """Each flag that shapes what is learned is kept: the same value passes, another one is named and refused."""
    monkeypatch.setattr("sys.argv", [SCRIPT])
    saved = Args(env_id="probe_envs:Point-v0", demo_dataset="point/expert-v0")
    (tmp_path / "args.json").write_text(json.dumps(dataclasses.asdict(saved)))
    other = {"std_parameterization": "fixed", "activation": "tanh", "actor_q": "min", "hidden_dims": (7,)}
    for field in dataclasses.fields(Args):
        if field.name in FREE.split():
            continue
        value, name = getattr(saved, field.name), field.name.replace("_", "-")
        if isinstance(value, bool):
            changed, same = [f"--{'no-' * value}{name}"], [f"--{'no-' * (not value)}{name}"]
        else:
            new = other.get(field.name) or (f"{value}x" if isinstance(value, str) else value + 1)
            changed, same = ([f"--{name}", *map(str, x if isinstance(x, tuple) else (x,))] for x in (new, value))
        assert getattr(parse_args([flag, str(tmp_path), *same]), field.name) == value
        with pytest.raises(SystemExit) as error:
            parse_args([flag, str(tmp_path), *changed])
        assert f"--{name}" in str(error.value) and str(tmp_path) in str(error.value)
    args = parse_args([flag, str(tmp_path), "--total-timesteps", "77", "--threads", "1"])
    assert dataclasses.replace(saved, total_timesteps=77, threads=1) == dataclasses.replace(
        args, resume=None, eval_only=None, run_dir=None
    )


@pytest.mark.parametrize("content", ["", '{"seed": 1', "[1, 2]", '{"no_such_flag": 1}', '{"hidden_dims": 3}'])
def test_damaged_args_json(finished, tmp_path, content):
    (copy_run(finished, tmp_path) / "args.json").write_text(content)
    assert "--resume run" in refused("--resume", "run", "--total-timesteps", 400, cwd=tmp_path)


class Malicious:
    def __reduce__(self):
        return os.system, ("touch executed",)


def damage(path: Path, how: str) -> None:
    if how == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "random bytes":
        path.write_bytes(random.Random(0).randbytes(5000))
    elif how == "malicious":
        torch.save(torch.load(path) | {"agent": Malicious()}, path)
    elif how == "malicious pickle":
        path.write_bytes(pickle.dumps(Malicious()))
    else:
        torch.save({"a list": [1, 2]} if how == "other content" else [1, 2], path)


@pytest.mark.parametrize(
    "how", ["truncated", "empty", "random bytes", "malicious", "malicious pickle", "other content", "list"]
)
def test_damaged_checkpoint(finished, tmp_path, how):
    run_dir = copy_run(finished, tmp_path)
    damage(run_dir / "checkpoint.pt", how)
    for flags in (("--resume", "run", "--total-timesteps", 400), ("--eval-only", "run")):
        error = refused(*flags, cwd=tmp_path)
        assert "checkpoint.pt" in error
        if how not in ("other content", "list"):
            assert "checkpoint.previous" in error
    assert not (tmp_path / "executed").exists()
    (run_dir / "checkpoint.pt").unlink()  # as the message says
    run_forked(SCRIPT, *GO_ON, 400, cwd=tmp_path, env=TASKS)
    assert checkpoint(run_dir)["progress"]["global_step"] == 400


def test_checkpoint_of_other_networks(finished, tmp_path):
    run_dir = copy_run(finished, tmp_path)
    for name, flags in (("narrow", ("--hidden-dims", 16, 16)), ("deep", ("--hidden-dims", 32, 32, 32)), ("env", ())):
        task = ("--env-id", "probe_envs:OtherPoint-v0") if name == "env" else POINT
        run(*task, *flags, "--total-timesteps", 60, "--run-dir", name, cwd=tmp_path)
        shutil.copy(tmp_path / name / "checkpoint.pt", run_dir)
        error = refused("--resume", "run", "--total-timesteps", 400, cwd=tmp_path)
        assert "checkpoint.pt" in error


@pytest.mark.parametrize(
    ("task", "step"), [("NanReward", 129), ("NanObservation", 129), ("NanReset", 79)], ids=["reward", "obs", "reset"]
)
def test_nan_from_the_environment(tmp_path, task, step):
    """The step before is saved: nothing is lost, nothing poisoned, and the run goes on when the task is mended."""
    flags = ("--env-id", f"probe_envs:{task}-v0", "--save-every", 10_000, "--eval-every", 10_000, "--run-dir", "run")
    error = refused(*TINY.split(), *flags, "--total-timesteps", 300, cwd=tmp_path)
    assert f"probe_envs:{task}-v0" in error and "finite" in error and str(step) in error
    state = checkpoint(tmp_path / "run")
    assert all(torch.isfinite(leaf).all() for _, leaf in flat_tensors(state) if isinstance(leaf, torch.Tensor))
    assert step - 1 <= len(state["buffer"]["rows"]) <= step + 1 and state["progress"]["global_step"] == len(
        state["buffer"]["rows"]
    )
    if task != "NanReset":
        assert len(state["buffer"]["rows"]) == step
        run_forked(SCRIPT, "--resume", "run", "--total-timesteps", step + 50, cwd=tmp_path, env=TASKS)
        assert len(checkpoint(tmp_path / "run")["buffer"]["rows"]) == step + 50


def test_full_disk(tmp_path):
    """Files may not grow beyond what the first checkpoint needs: the message names it, the checkpoint stays."""
    flags = [*TINY.split(), *POINT, "--total-timesteps", 900, "--save-every", 300, "--eval-every", 10_000]
    run_forked(SCRIPT, *flags, "--total-timesteps", 300, "--run-dir", "short", cwd=tmp_path, env=TASKS)
    space = (tmp_path / "short" / "checkpoint.pt").stat().st_size + 5_000
    error = refused(*flags, "--run-dir", "run", cwd=tmp_path, max_file_bytes=space)
    assert "--resume" in error and ("too large" in error or "No space" in error)
    assert checkpoint(tmp_path / "run")["progress"]["global_step"] == 300
    run_forked(SCRIPT, "--resume", "run", cwd=tmp_path, env=TASKS)
    run_forked(SCRIPT, *flags, "--run-dir", "whole", cwd=tmp_path, env=TASKS)
    assert differences(tmp_path / "run", tmp_path / "whole") == []
    assert table(tmp_path / "run", "train.csv") == table(tmp_path / "whole", "train.csv")


def test_run_dir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    assert "file" in refused(*TINY.split(), *POINT, "--run-dir", "file/run", cwd=tmp_path)


def test_losses_that_explode_end_the_run(tmp_path):
    error = refused(
        *TINY.split(), *POINT, "--reward-scale", 1e30, "--total-timesteps", 300, "--run-dir", "run", cwd=tmp_path
    )
    assert "--reward-scale" in error or "--critic-lr" in error


# --- GPU and compiler -------------------------------------------------------------------------------------------------
def test_a_run_of_a_gpu_goes_on_without(finished, tmp_path):
    """A checkpoint as a GPU writes it: its generator's state has 16 bytes, its optimizers are capturable."""
    run_dir = copy_run(finished, tmp_path)
    state = checkpoint(run_dir)
    state["agent"]["generator"] = torch.zeros(16, dtype=torch.uint8)
    for part in ("actor_optimizer", "critic_optimizer", "alpha_optimizer"):
        state["agent"][part]["param_groups"][0]["capturable"] = True
    torch.save(state, run_dir / "checkpoint.pt")
    result = run_forked(SCRIPT, "--eval-only", "run", "--no-capture-video", cwd=tmp_path, env=TASKS)
    last = next(line for line in finished.stdout.splitlines() if line.startswith("last: "))
    assert last.removeprefix("last: ") in result.stdout
    run_forked(SCRIPT, *GO_ON, 350, cwd=tmp_path, env=TASKS)
    assert math.isfinite(read_csv(run_dir, "train.csv")["losses/actor_loss"][-1])


@pytest.mark.parametrize("changes", [{}, {"num_qs": 3, "backup_entropy": True, "amp": True}])
def test_what_a_gpu_compiles_is_whole_and_compiled_before_it_is_captured(changes):
    """No graph breaks, and nothing is compiled anew after the updates that `replay` runs before it captures one."""
    agent, buffer = small_agent(demos=1, policy_delay=2, **changes), filled_buffer()
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


def on_gpu(agent_args: Args, rows: torch.Tensor) -> tuple[Agent, ReplayBuffer]:
    device = torch.device("cuda")
    agent, buffer = Agent(box(3), box(2), agent_args, device), ReplayBuffer(5000, SPLITS, device)
    buffer.add(rows.to(device))
    agent.observe(rows.to(device))
    return agent, buffer


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_graphed_updates_on_a_gpu(dropout):
    """Losses finite, weights move, the graph follows the learning rate and the buffer, and resumes."""
    rows = filled_buffer(200, capacity=200).rows
    rows[:, 5] = 0  # rewards
    args = small_args(compile=True, cuda=True, dropout=dropout, lr_decay=60, hidden_dims=(64, 64), batch_size=64)
    agent, buffer = on_gpu(args, rows)
    eager, eager_buffer = on_gpu(dataclasses.replace(args, compile=False), rows)
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
    assert set(agent.graphs) == {False, True} and not eager.graphs
    assert all(math.isfinite(value) for loss in losses for value in loss.values())
    assert len({loss["losses/critic_loss"] for loss in losses[-20:]}) == 20  # a fresh batch each time
    for name, old in before.items():
        moved = (parameters_of(getattr(agent, name)) - old).abs().mean()
        assert moved > 1e-5, name
        if not dropout:
            gap = (parameters_of(getattr(agent, name)) - parameters_of(getattr(eager, name))).abs().mean()
            assert gap < 0.2 * moved, name
    # the buffer grows: high rewards, which the graph has not seen
    new = rows.repeat(10, 1)
    new[:, 5] = 100
    buffer.add(new.cuda())
    assert float(agent.update(buffer, None, 1)["losses/critic_loss"]) > 100 * losses[-1]["losses/critic_loss"]
    # state: through a file into another agent, which goes on as the first one does
    file = io.BytesIO()
    torch.save(agent.state_dict(), file)
    file.seek(0)
    other, _ = on_gpu(dataclasses.replace(args, seed=7), rows)
    other.load_state_dict(torch.load(file, weights_only=True, map_location="cuda"))
    for name in before:
        assert torch.equal(parameters_of(getattr(other, name)), parameters_of(getattr(agent, name)))
    one, two = (float(each.update(buffer, None, 1)["losses/critic_loss"]) for each in (agent, other))
    if not dropout:
        assert one == pytest.approx(two, rel=1e-3)
    other.update(buffer, None, 7)  # its own graphs too
    agent.update(buffer, None, 7)
    assert agent.critic_updates == other.critic_updates == 59
    assert set(other.graphs) <= {False, True}
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
    flags = [*TINY.split(), *POINT, "--demos", 2, "--run-dir", "run"]
    run_script(SCRIPT, *flags, "--total-timesteps", 200, cwd=tmp_path, env=env, timeout=280)
    run_script(SCRIPT, "--resume", "run", "--total-timesteps", 300, cwd=tmp_path, env=env, timeout=280)
    columns = read_csv(tmp_path / "run", "train.csv")
    assert columns["global_step"] == [50, 100, 150, 200, 250, 300]
    assert all(math.isfinite(x) for key in columns if "losses" in key for x in columns[key][1:])
    assert torch.load(tmp_path / "run" / "checkpoint.pt", map_location="cpu")["agent"]["critic_updates"] == 250
    last = read_csv(tmp_path / "run", "eval.csv")["eval/episodic_return"][-1]
    result = run_script(SCRIPT, "--eval-only", "run", "--no-cuda", "--no-capture-video", cwd=tmp_path, env=TASKS)
    measured = float(re.search(r"eval/episodic_return ([-\d.e+]+)", result.stdout)[1])
    assert measured == pytest.approx(last, rel=0.02, abs=0.02)
