"""bc_flow_offline.py: against Q-chunking's arrays, cases by hand, tasks of known answer, and as a user runs it."""

import contextlib
import copy
import dataclasses
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import imageio.v2 as imageio
import minari
import numpy as np
import probe_envs
import pytest
import torch
from conftest import REPO, Finished, popen_script, read_csv, read_scalars, run_script, script_env, wait_until
from forked import popen_forked, run_forked
from offline_data import Steps, write_minari
from torch import distributions, nn
from torch.nn import functional as F

import bc_flow_offline
from bc_flow_offline import (
    Args,
    BCAgent,
    BCAgentConfig,
    Dataset,
    FourierFeatures,
    PolicyInput,
    dataset_ids,
    evaluate,
    make_batches,
    make_env_and_datasets,
    process_train_dataset,
)
from common.evaluation import CsvLogger, LoggingHelper, video_grid
from common.run import drop_rows_after
from common.setup import parse
from common.vision import pad_same

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:minari")
SCRIPT, CPU = "bc_flow_offline.py", torch.device("cpu")
FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(autouse=True, scope="module")
def _exact_and_on_one_thread():
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


def read_args(argv: list[str]) -> Args:
    return parse(Args, "", Args.MAY_CHANGE, argv)


def small_args(**changes) -> Args:
    return Args(**{"hidden_dims": (16, 16), "batch_size": 8, "compile": False, "threads": 1} | changes)


def small_agent(obs_dim: int = 3, action_dim: int = 2, **changes) -> BCAgent:
    return BCAgent.create((obs_dim,), action_dim, small_args(**changes))


def toy_dataset(size: int = 40, ends: tuple[int, ...] = (9, 22, 39), obs_dim: int = 3, action_dim: int = 2) -> Dataset:
    """Random rows; episodes end at `ends`, the second one by termination."""
    rng = np.random.default_rng(0)
    terminals, masks = np.zeros(size, np.float32), np.ones(size, np.float32)
    terminals[list(ends)], masks[ends[1]] = 1, 0
    obs, next_obs = rng.standard_normal((2, size, obs_dim), np.float32)
    actions, rewards = rng.uniform(-0.9, 0.9, (size, action_dim)), rng.standard_normal(size)
    return Dataset.create(
        observations=obs,
        actions=np.float32(actions),
        rewards=np.float32(rewards),
        terminals=terminals,
        masks=masks,
        next_observations=next_obs,
    )


def toy_batch(agent: BCAgent, size: int = 8, seed: int = 0) -> dict:
    """Rows, or chunks for an agent with chunks, that begin at given rows of the toy data."""
    idxs = np.random.default_rng(seed).integers(0, 35, size)
    if agent.args.action_chunking:
        return toy_dataset().sample_sequence(size, agent.args.horizon_length, 0.99, idxs=idxs)
    return toy_dataset().sample(size, idxs=idxs)


def arguments(agent: BCAgent, batch: dict) -> tuple:
    """What `agent.update(batch)` hands to the loss: observations, x_1, valid."""
    handed, spy = [], copy.copy(agent)
    spy.learn = lambda samples: handed.append(samples) or {}
    spy.update(batch)
    return tuple(part[0] for part in handed[0])


def parameters_of(module: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in module.parameters()])


def assert_close(ours, theirs, tolerance: float = 1e-5):
    """|ours - theirs| <= tolerance * (1 + |theirs|)."""
    ours = ours.detach().numpy() if isinstance(ours, torch.Tensor) else ours
    np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


# --- Q-chunking's numbers ---------------------------------------------------------------------------------------------
CASES = ["chunk", "chunk_fourier", "single", "single_fourier"]


@pytest.fixture(scope="module")
def qc() -> dict[str, np.ndarray]:
    return dict(np.load(FIXTURES / "qc_flow_bc.npz"))


@pytest.fixture(scope="module")
def sequences() -> dict[str, np.ndarray]:
    return dict(np.load(FIXTURES / "qc_sample_sequence.npz"))


def qc_agent(qc: dict[str, np.ndarray], case: str) -> BCAgent:
    """An agent with the original's parameters, none left over, none missing."""
    config = BCAgentConfig(
        hidden_dims=(128,) * 4,
        action_chunking=case.startswith("chunk"),
        horizon_length=int(qc[f"{case}/in/horizon_length"]),
        flow_steps=int(qc[f"{case}/in/flow_steps"]),
        use_fourier_features=case.endswith("fourier"),
        compile=False,
    )
    agent = BCAgent.create(qc[f"{case}/in/obs"].shape[1:], qc[f"{case}/in/actions"].shape[-1], config)
    ours, theirs = qc_parameters(agent), set()
    for name, parameter in ours.items():
        key = f"{case}/params/{name}" if f"{case}/params/{name}" in qc else f"chunk/params/{name}"
        array = torch.from_numpy(qc[key])
        parameter.data.copy_(array.T if array.ndim == 2 else array)
        theirs.add(name)
    assert theirs == {key.split("/grad/")[1] for key in qc if key.startswith(f"{case}/grad/")}
    return agent


def qc_parameters(agent: BCAgent) -> dict[str, nn.Parameter]:
    """The original's names of the actor's parameters."""
    linears = [module for module in agent.actor.modules() if isinstance(module, nn.Linear)]
    assert sum(p.numel() for m in linears for p in m.parameters()) == sum(p.numel() for p in agent.actor.parameters())
    names = [(f"actor_bc_flow/mlp/Dense_{i}", linear) for i, linear in enumerate(linears)]
    return {f"{n}/kernel": linear.weight for n, linear in names} | {f"{n}/bias": linear.bias for n, linear in names}


def qc_inputs(qc: dict[str, np.ndarray], case: str) -> tuple[torch.Tensor, ...]:
    """Arguments of the loss: observations, x_1, valid, x_0, t."""
    obs, x_1, valid, x_0, t = (torch.from_numpy(qc[f"{case}/in/{k}"]) for k in ("obs", "x_1", "valid", "x_0", "t"))
    return obs, x_1, valid if case.startswith("chunk") else torch.ones(len(obs), 1), x_0, t


@pytest.mark.parametrize("case", CASES)
def test_qc_velocity_field(qc, case):
    agent, (obs, x_1, _, x_0, t) = qc_agent(qc, case), qc_inputs(qc, case)
    assert_close(agent.actor.head(obs, (1 - t) * x_0 + t * x_1, t), qc[f"{case}/out/pred"])


@pytest.mark.parametrize("case", CASES)
def test_qc_loss_and_gradients(qc, case):
    agent = qc_agent(qc, case)
    loss = agent.loss(*qc_inputs(qc, case))
    assert_close(loss, qc[f"{case}/out/bc_flow_loss"])
    loss.backward()
    for name, parameter in qc_parameters(agent).items():
        gradient, stored = parameter.grad.numpy().T, qc[f"{case}/grad/{name}"]
        norm = qc[f"{case}/norm/grad/{name}"]
        np.testing.assert_allclose(np.linalg.norm(gradient.astype(np.float64)), norm, rtol=1e-5, err_msg=name)
        kept = gradient[::8] if gradient.shape == (128, 128) else gradient
        np.testing.assert_allclose(kept, stored, rtol=0, atol=1e-5 * abs(stored).max(), err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_qc_batch_becomes_the_arguments_of_the_loss(qc, case):
    """From the dictionaries that Dataset.sample and sample_sequence return: chunks flattened step by step."""
    agent, (obs, x_1, valid, _, _) = qc_agent(qc, case), qc_inputs(qc, case)
    batch = {key: qc[f"{case}/in/{key}"] for key in ("actions", "valid")} | {"observations": qc[f"{case}/in/obs"]}
    batches = [batch]
    if case.startswith("single"):  # the first action of a chunk, or Dataset.sample
        batches += [{"observations": batch["observations"], "actions": batch["actions"][:, 0]}]
    for given in batches:
        for ours, theirs in zip(arguments(agent, given), (obs, x_1, valid)):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("case", CASES)
def test_qc_euler_sampling(qc, case):
    agent, noise = qc_agent(qc, case), qc[f"{case}/in/noise"]
    actions = agent.sample_actions(qc[f"{case}/in/obs"], noise=noise)
    assert_close(actions, qc[f"{case}/out/actions"])
    assert abs(actions).max() == 1  # clipped, at the end only: the path in between matters
    one = agent.sample_actions(qc[f"{case}/in/obs"][3], noise=noise[3])
    assert one.shape == noise[3].shape
    assert_close(one, qc[f"{case}/out/actions"][3])


def test_qc_fourier_features(qc):
    features = FourierFeatures(int(qc["fourier/in/output_size"]))
    assert_close(features(torch.from_numpy(qc["fourier/in/t"])), qc["fourier/out"])


@pytest.mark.parametrize("length", [3, 5])
def test_qc_sample_sequence(sequences, length):
    names = ("observations", "next_observations", "actions", "rewards", "terminals", "masks")
    dataset = Dataset.create(**{name: sequences[f"in/{name}"] for name in names})
    idxs = sequences[f"L{length}/in/idxs"]
    assert sequences["in/discount"] == np.float32(0.99)
    batch = dataset.sample_sequence(len(idxs), length, 0.99, idxs=idxs)
    theirs = {key.split("/out/")[1]: v for key, v in sequences.items() if key.startswith(f"L{length}/out/")}
    assert theirs.keys() <= batch.keys()
    for key, array in theirs.items():
        if key == "rewards":  # stored as float32
            np.testing.assert_array_equal(np.float32(batch[key]), array)
        else:
            np.testing.assert_array_equal(batch[key], array, err_msg=key)


def test_sample_sequence_by_hand():
    """Episodes of 4 (terminated) and 3 steps, rewards 1 to 7, discount 1/2: sums run on, `valid` ends at the end."""
    terminals, masks = np.array([0, 0, 0, 1, 0, 0, 1.0]), np.array([1, 1, 1, 0, 1, 1, 1.0])
    columns = {"observations": np.zeros((7, 1)), "actions": np.arange(7.0)[:, None], "rewards": np.arange(1, 8.0)}
    dataset = Dataset.create(**columns, terminals=terminals, masks=masks, next_observations=np.zeros((7, 1)))
    batch = dataset.sample_sequence(4, 3, 0.5, idxs=np.array([1, 2, 3, 4]))
    assert batch["rewards"].tolist() == [[2, 3.5, 4.5], [3, 5, 6.25], [4, 6.5, 8], [5, 8, 9.75]]
    assert batch["valid"].tolist() == [[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]]
    assert batch["masks"].tolist() == [[1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 1]]
    assert batch["actions"][..., 0].tolist() == [[1, 2, 3], [2, 3, 4], [3, 4, 5], [4, 5, 6]]
    assert batch["next_actions"][..., 0].tolist() == [[2, 3, 4], [3, 4, 5], [4, 5, 6], [5, 6, 6]]


def test_sampling_is_uniform_over_all_rows_and_all_full_chunks():
    dataset, numbers = toy_dataset(), np.arange(40)
    dataset["actions"] = numbers[:, None].astype(np.float32)
    np.random.seed(0)  # noqa: NPY002  the generator that the original draws from
    drawn = dataset.sample(40_000)["actions"][:, 0]
    counts = np.bincount(drawn.astype(int), minlength=40)
    assert counts.min() > 850 and counts.max() < 1150
    first = dataset.sample_sequence(36_000, 5, 0.99)["actions"][:, 0, 0]
    counts = np.bincount(first.astype(int), minlength=40)
    assert (counts[36:] == 0).all() and counts[:36].min() > 850 and counts[:36].max() < 1150
    np.random.seed(0)  # noqa: NPY002
    assert np.array_equal(dataset.sample(40_000)["actions"][:, 0], drawn)


# --- Flags ------------------------------------------------------------------------------------------------------------
NOTE = {
    "run_group": "BC",
    "seed": 0,
    "save_dir": "runs/fbc/",
    "offline_steps": 1_000_000,
    "log_interval": 5_000,
    "eval_interval": 100_000,
    "save_interval": -1,
    "discount": 0.99,
    "horizon_length": 5,
    "eval_episodes": 50,
    "video_episodes": 0,
    "video_frame_skip": 3,
    "dataset_proportion": 1.0,
    "sparse": False,
    "lr": 3e-4,
    "batch_size": 256,
    "flow_steps": 10,
    "weight_decay": 0.0,
    "action_chunking": False,
    "use_fourier_features": False,
    "encoder": None,
}


def test_the_flags_of_the_note_have_its_defaults():
    args = read_args(["--env-name", "halfcheetah-medium-v2"])
    assert {name: getattr(args, name) for name in NOTE} == NOTE


def test_no_flag_at_all():
    args = read_args([])
    assert args.env_name == "FrankaPickCube-v0" and args.offline_steps < 1_000_000 and args.action_chunking


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--env_name=halfcheetah-medium-v2", {"env_name": "halfcheetah-medium-v2"}),
        ("--env-name halfcheetah-medium-v2", {"env_name": "halfcheetah-medium-v2"}),
        ("--env_name x-v0 --action_chunking=True --horizon_length=10", {"action_chunking": True, "horizon_length": 10}),
        ("--env_name x-v0 --action-chunking", {"action_chunking": True}),
        ("--env_name x-v0 --action_chunking", {"action_chunking": True}),
        ("--env_name x-v0 --action-chunking True --seed 3", {"action_chunking": True, "seed": 3}),
        ("--env_name x-v0 --action_chunking=true", {"action_chunking": True}),
        ("--action_chunking=False", {"action_chunking": False}),
        ("--action-chunking False", {"action_chunking": False}),
        ("--no-action-chunking", {"action_chunking": False}),
        ("--no_action_chunking", {"action_chunking": False}),
        ("--action-chunking --no-action-chunking", {"action_chunking": False}),
        ("--dataset_path=a=b_c.hdf5", {"dataset_path": "a=b_c.hdf5"}),
        ("--save_dir=my_runs/x_y", {"save_dir": "my_runs/x_y"}),
        ("--save-interval=-1 --weight_decay 1e-2", {"save_interval": -1, "weight_decay": 0.01}),
        ("--hidden_dims 16 32", {"hidden_dims": (16, 32)}),
    ],
)
def test_all_spellings_of_flags(flags, expected):
    args = read_args(flags.split())
    assert {name: getattr(args, name) for name in expected} == expected


@pytest.mark.parametrize("removed", ["ogbench_dataset_dir", "dataset_replace_interval", "online_steps", "utd_ratio"])
def test_flags_that_the_note_removed_are_refused(removed, capsys):
    with pytest.raises(SystemExit) as error:
        read_args([f"--{removed}=1"])
    assert error.value.code == 2 and removed.replace("_", "-") in "".join(capsys.readouterr())


# --- Agent ------------------------------------------------------------------------------------------------------------
def test_initialisation_is_xavier_uniform_with_zero_biases():
    """Every kernel, the last one too (qc networks.py:53-80), whatever came before in the process."""
    agent = small_agent(hidden_dims=(400, 300))
    linears = [module for module in agent.actor.modules() if isinstance(module, nn.Linear)]
    assert [tuple(linear.weight.shape) for linear in linears] == [(400, 3 + 2 + 1), (300, 400), (2, 300)]
    for linear in linears:
        bound = math.sqrt(6 / sum(linear.weight.shape))
        assert abs(linear.weight).max() <= bound
        assert linear.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
        assert not linear.bias.any()
    torch.manual_seed(123)
    again = small_agent(hidden_dims=(400, 300))
    assert torch.equal(parameters_of(agent.actor), parameters_of(again.actor))
    other = small_agent(hidden_dims=(400, 300), seed=1)
    assert not torch.equal(parameters_of(agent.actor), parameters_of(other.actor))


def test_parameter_counts_of_the_original():
    """bc.md: HalfCheetah 803,846 with one action, 828,446 with five; robomimic (23, 7), ten: 872,518."""
    for obs_dim, action_dim, horizon, count in ((17, 6, 1, 803_846), (17, 6, 5, 828_446), (23, 7, 10, 872_518)):
        config = BCAgentConfig(action_chunking=horizon > 1, horizon_length=horizon, compile=False)
        agent = BCAgent.create((obs_dim,), action_dim, config)
        assert parameters_of(agent.actor).numel() == count


def test_update_is_in_place_and_reports_the_loss():
    """Adam's first step is lr * sign(gradient); the info is of the loss before it."""
    agent = small_agent(action_chunking=True, horizon_length=3, lr=1e-3)
    before = parameters_of(agent.actor)
    reference = copy.deepcopy(agent)
    info = agent.update(toy_batch(agent))
    generator = torch.Generator().manual_seed(agent.args.seed)  # the same draws as the update's
    x_0, t = torch.randn(8, 6, generator=generator), torch.rand(8, 1, generator=generator)
    loss = reference.loss(*arguments(reference, toy_batch(agent)), x_0, t)
    loss.backward()
    assert info["actor/actor_loss"] == info["actor/bc_flow_loss"] == pytest.approx(loss.item(), rel=1e-6)
    gradient = torch.cat([p.grad.flatten() for p in reference.actor.parameters()])
    moved = parameters_of(agent.actor) - before
    clear = abs(gradient) > 1e-5
    assert clear.float().mean() > 0.9
    assert_close(moved[clear], -1e-3 * gradient[clear].sign(), 1e-5)
    norms = [p.grad.norm().item() for p in reference.actor.parameters()]
    assert info["grad/norm"] == pytest.approx(sum(norms), rel=1e-5)  # of leaves, summed, as qc flax_utils.py:145
    assert info["grad/max"] == pytest.approx(gradient.max().item()) and info["grad/min"] == pytest.approx(
        gradient.min().item()
    )
    assert all(isinstance(value, float) for value in info.values())


def test_invalid_steps_do_not_count():
    """Chunks that cross an episode's end: the loss is the mean over all entries of the valid ones' errors."""
    agent = small_agent(action_chunking=True, horizon_length=4)
    batch = toy_dataset().sample_sequence(2, 4, 0.99, idxs=np.array([7, 30]))
    assert batch["valid"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    obs, x_1, valid = arguments(agent, batch)
    x_0, t = torch.randn(2, 8), torch.rand(2, 1)
    error = (agent.actor.head(obs, (1 - t) * x_0 + t * x_1, t) - (x_1 - x_0)).square()
    error[0, 6:] = 0
    assert_close(agent.loss(obs, x_1, valid, x_0, t), error.mean().item())


def test_batch_update_is_one_update_after_the_other():
    one, other = small_agent(), small_agent()
    batches = [toy_batch(one, seed=i) for i in range(3)]
    infos = [one.update(batch) for batch in batches]
    stacked = {key: np.stack([batch[key] for batch in batches]) for key in batches[0]}
    info = other.batch_update(stacked)
    assert torch.equal(parameters_of(one.actor), parameters_of(other.actor)) and int(other.updates) == 3
    assert info.keys() == infos[0].keys()
    assert info["actor/actor_loss"] == pytest.approx(np.mean([i["actor/actor_loss"] for i in infos]))


def test_many_updates_at_once_are_single_updates():
    """However updates are grouped into launches, the same numbers come out: a resumed run may group them otherwise."""
    one, other = small_agent(), small_agent()
    batches = make_batches(toy_dataset(), small_args(), CPU)
    one.learn(batches.take(0, 6, CPU))
    for step, count in ((0, 1), (1, 3), (4, 2)):
        other.learn(batches.take(step, count, CPU))
    assert torch.equal(parameters_of(one.actor), parameters_of(other.actor))


def test_learns_a_distribution_with_two_modes():
    """A flow keeps both actions of the data, -0.5 and 0.5, where a mean would be 0."""
    options = {"lr": 1e-2, "lr_schedule": "cosine", "hidden_dims": (64, 64), "offline_steps": 700, "flow_steps": 20}
    agent, rng = small_agent(1, 1, **options), np.random.default_rng(0)
    for _ in range(700):
        actions = rng.choice([-0.5, 0.5], (256, 1)).astype(np.float32)
        agent.update({"observations": np.zeros((256, 1), np.float32), "actions": actions})
    actions = agent.sample_actions(np.zeros((500, 1), np.float32))
    assert (abs(abs(actions) - 0.5) < 0.15).mean() > 0.85 and 0.4 < (actions > 0).mean() < 0.6


def test_weight_decay_is_decoupled_and_on_all_parameters():
    """optax.adamw: p - lr * (Adam's step + decay * p); without a gradient only the decay is left."""
    agent, plain = small_agent(weight_decay=0.1, lr=1e-2), small_agent(lr=1e-2)
    batch = toy_batch(agent)
    before = parameters_of(agent.actor)
    agent.update(batch)
    plain.update(batch)
    assert_close(parameters_of(agent.actor), (parameters_of(plain.actor) - 1e-2 * 0.1 * before).numpy(), 1e-6)


def test_cosine_schedule():
    agent = small_agent(lr=1e-3, lr_schedule="cosine", offline_steps=10)
    rates = [agent.update(toy_batch(agent))["lr"] for _ in range(12)]
    expected = [1e-3 * 0.5 * (1 + math.cos(math.pi * min(i, 10) / 10)) for i in range(12)]
    assert_close(np.array(rates), expected, 1e-8)
    before = parameters_of(agent.actor)
    agent.update(toy_batch(agent))
    assert_close(parameters_of(agent.actor), before.numpy(), 1e-9)  # the rate reaches the optimizer
    assert small_agent(lr=1e-3).update(toy_batch(agent))["lr"] == pytest.approx(1e-3)


def test_ema_is_what_acts():
    """A plain mean at first, then decay 0.9 per update; sample_actions uses it, learning does not."""
    agent, plain = small_agent(ema=0.9, lr=1e-2), small_agent(lr=1e-2)
    mean = 0
    for i in range(1, 25):
        agent.update(toy_batch(agent, seed=i))
        plain.update(toy_batch(plain, seed=i))
        weight = max(1 / i, 0.1)
        mean = (1 - weight) * mean + weight * parameters_of(agent.actor)
    assert torch.equal(parameters_of(agent.actor), parameters_of(plain.actor))
    assert_close(parameters_of(agent.ema_actor), mean.numpy(), 1e-6)
    noise, obs = np.ones((1, 2), np.float32), np.ones((1, 3), np.float32)
    averaged = copy.deepcopy(plain)
    for parameter, value in zip(averaged.actor.parameters(), agent.ema_actor.parameters()):
        parameter.data.copy_(value)
    assert np.array_equal(agent.sample_actions(obs, noise=noise), averaged.sample_actions(obs, noise=noise))
    assert not np.array_equal(agent.sample_actions(obs, noise=noise), plain.sample_actions(obs, noise=noise))


@pytest.mark.parametrize("options", [{}, {"action_chunking": True}, {"policy": "gaussian"}, {"amp": True}])
def test_gradient_accumulation_is_one_batch(options):
    one = small_agent(lr=1e-3, **options)
    parts = small_agent(lr=1e-3, grad_accum_steps=4, **options)
    infos = [agent.update(toy_batch(agent)) for agent in (one, parts)]
    tolerance = 2e-2 if "amp" in options else 1e-5
    assert infos[0]["actor/actor_loss"] == pytest.approx(infos[1]["actor/actor_loss"], rel=tolerance)
    gradients = [torch.cat([p.grad.flatten() for p in agent.actor.parameters()]) for agent in (one, parts)]
    assert_close(gradients[1], gradients[0].numpy(), tolerance)


@pytest.mark.parametrize("options", [{}, {"grad_accum_steps": 2, "action_chunking": True}, {"policy": "gaussian"}])
def test_two_threads_learn_what_one_does(options):
    one, two = small_agent(**options), small_agent(threads=2, **options)
    for i in range(3):
        infos = [agent.update(toy_batch(agent, seed=i)) for agent in (one, two)]
        assert infos[0] == pytest.approx(infos[1], rel=1e-4, abs=1e-6)
    assert_close(parameters_of(two.actor), parameters_of(one.actor).numpy(), 1e-5)


@pytest.mark.parametrize("size", [1, 7, 20])
def test_batches_of_any_size(size):
    """Not only of the batch_size in the settings: the mean is over all rows, in however many parts."""
    one, two, parts = small_agent(), small_agent(threads=2), small_agent(grad_accum_steps=4)
    losses = [agent.update(toy_batch(agent, size))["actor/actor_loss"] for agent in (one, two, parts)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
    assert_close(parameters_of(two.actor), parameters_of(one.actor).numpy(), 1e-5)
    assert_close(parameters_of(parts.actor), parameters_of(one.actor).numpy(), 1e-5)


def test_normalized_observations_reach_the_network():
    """Mean 0 and deviation 1 of what was observed, the same for learning and acting; constant columns do no harm."""
    states = np.random.default_rng(0).normal([5.0, -2.0, 3.0], [2.0, 0.1, 0.0], (5000, 3)).astype(np.float32)
    agent, plain = small_agent(normalize_observations=True, ema=0.9), small_agent(ema=0.9)
    agent.observe(torch.from_numpy(states))
    for actor in (agent.actor, agent.ema_actor):
        features = actor.encoder(torch.from_numpy(states))
        assert_close(features.mean(0), np.zeros(3), 1e-3)
        assert_close(features.std(0), [1, 1, 0], 1e-3)
    scaled, noise = (states[:4] - [5.0, -2.0, 3.0]) / [2.0, 0.1, 1.0], np.ones((4, 2))
    assert_close(agent.sample_actions(states[:4], noise=noise), plain.sample_actions(scaled, noise=noise), 0.05)
    assert not np.allclose(agent.sample_actions(states[:4], noise=noise), plain.sample_actions(states[:4], noise=noise))


def test_few_observations_are_normalized_too():
    """One short demonstration: there will be no more of them to wait for."""
    states = np.random.default_rng(0).normal(50, 2, (20, 3)).astype(np.float32)
    agent = small_agent(normalize_observations=True)
    agent.observe(torch.from_numpy(states))
    features = agent.actor.encoder(torch.from_numpy(states))
    assert_close(features.mean(0), np.zeros(3), 1e-4)
    assert_close(features.std(0, correction=0), np.ones(3), 1e-4)


def test_one_spike_does_not_flatten_a_feature():
    """S4's kind in data: 1e5 once in 5000 rows; the others stay as far apart as without it."""
    states = np.random.default_rng(0).normal(0, 1, (5000, 3)).astype(np.float32)
    states[77, 1] = 1e5
    agent = small_agent(normalize_observations=True)
    agent.observe(torch.from_numpy(states))
    features = agent.actor.encoder(torch.from_numpy(np.delete(states, 77, 0)))
    assert features.std(0).min() > 0.6


def test_validation_loss_is_of_the_averaged_policy_with_noise_of_its_own():
    """The same number at every call, and training does not notice."""
    agent = small_agent(ema=0.9, lr=1e-2)
    samples = make_batches(toy_dataset(), small_args(batch_size=64), CPU).take(0, 3, CPU)
    before = agent.generator.get_state()
    first = agent.validation_loss(samples)
    assert agent.validation_loss(samples) == first and torch.equal(agent.generator.get_state(), before)
    for i in range(20):
        agent.update(toy_batch(agent, seed=i))
    averaged = agent.validation_loss(samples)
    assert averaged != first and all(p.requires_grad for p in agent.actor.parameters())
    agent.actor.load_state_dict(agent.ema_actor.state_dict())
    assert agent.validation_loss(samples) == averaged


def test_bfloat16_comes_near_float32():
    exact, fast = small_agent(hidden_dims=(64, 64)), small_agent(hidden_dims=(64, 64), amp=True)
    one, other = (agent.update(toy_batch(agent, 64))["actor/actor_loss"] for agent in (exact, fast))
    assert one != other and one == pytest.approx(other, rel=0.02)
    assert all(p.dtype == torch.float32 for p in fast.actor.parameters())


# --- Sampling ---------------------------------------------------------------------------------------------------------
class Velocity(nn.Module):
    """A known velocity in place of the network, which notes the times it is asked at."""

    def __init__(self, function):
        super().__init__()
        self.function, self.times = function, []

    def forward(self, features, x, t):
        self.times.append(t.flatten()[0].item())
        return self.function(x, t)


def with_velocity(function, **changes) -> BCAgent:
    agent = small_agent(**changes)
    agent.ema_actor.head = Velocity(function)
    return agent


def test_euler_and_heun_on_known_velocities():
    """dx/dt = -x: Euler multiplies by 1 - dt, Heun by 1 - dt + dt^2 / 2, but in its last step as Euler."""
    noise, obs = np.ones((1, 2)), np.zeros((1, 3))
    for steps in (1, 4, 10):
        euler = with_velocity(lambda x, t: -x, flow_steps=steps)
        heun = with_velocity(lambda x, t: -x, flow_steps=steps, flow_solver="heun")
        dt = 1 / steps
        assert_close(euler.sample_actions(obs, noise=noise), np.full((1, 2), (1 - dt) ** steps), 1e-6)
        assert_close(
            heun.sample_actions(obs, noise=noise),
            np.full((1, 2), (1 - dt + dt * dt / 2) ** (steps - 1) * (1 - dt)),
            1e-6,
        )
        assert euler.ema_actor.head.times == pytest.approx([i / steps for i in range(steps)])
        assert len(heun.ema_actor.head.times) == 2 * steps - 1
        heun = with_velocity(lambda x, t: 2 * t * torch.ones_like(x), flow_steps=steps, flow_solver="heun")
        assert_close(heun.sample_actions(obs, noise=0 * noise), np.full((1, 2), 1 - dt * dt), 1e-6)


def test_actions_are_clipped_at_the_end_only():
    """Out to 3 and back to 0.5: a path clipped at every step would end elsewhere."""
    agent = with_velocity(lambda x, t: torch.where(t < 0.45, 6.0, -5.0) * torch.ones_like(x), flow_steps=10)
    actions = agent.sample_actions(np.zeros(3), noise=np.zeros(2))
    assert_close(actions, np.full(2, 0.5), 1e-5)
    agent = with_velocity(lambda x, t: 9 * torch.ones_like(x))
    assert agent.sample_actions(np.zeros(3), noise=np.zeros(2)).tolist() == [1, 1]


def test_sample_actions_of_one_observation_and_of_a_batch():
    agent = small_agent(action_chunking=True, horizon_length=4)
    obs = np.random.default_rng(0).standard_normal((6, 3))  # float64, as gymnasium gives
    noise = np.random.default_rng(1).standard_normal((6, 8))
    batch = agent.sample_actions(obs, noise=noise)
    assert batch.shape == (6, 8) and batch.dtype == np.float32 and abs(batch).max() <= 1
    for i in range(6):
        one = agent.sample_actions(obs[i], noise=noise[i])
        assert one.shape == (8,)
        assert_close(one, batch[i], 1e-6)
    assert not agent.actor.training or all(p.grad is None for p in agent.actor.parameters())


def test_each_episodes_generator_gives_its_noise():
    agent = with_velocity(lambda x, t: 0 * x, action_chunking=True, horizon_length=4, execution_horizon=3)
    chunks = agent.act([np.zeros(3)] * 2, [np.random.default_rng(seed) for seed in (1, 2)])
    noise = [np.random.default_rng(seed).standard_normal(8).reshape(4, 2)[:3] for seed in (1, 2)]
    assert_close(chunks, np.clip(noise, -1, 1))


def test_noise_is_standard_normal_and_from_the_generator():
    agent = with_velocity(lambda x, t: -0.9 * torch.ones_like(x) * 0 - 0.0 * x)  # actions = clipped noise
    actions = agent.sample_actions(np.zeros((4000, 3)))
    inside = abs(actions) < 1
    assert inside.mean() == pytest.approx(0.683, abs=0.02) and actions[inside].std() == pytest.approx(0.54, abs=0.02)
    drawn = [agent.sample_actions(np.zeros(3), torch.Generator().manual_seed(s)).tolist() for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert agent.sample_actions(np.zeros(3)).tolist() != agent.sample_actions(np.zeros(3)).tolist()


@pytest.mark.parametrize("options", [{"action_chunking": True, "use_fourier_features": True}, {"policy": "gaussian"}])
def test_the_loss_compiles_as_a_whole(options):
    """Without graph breaks, as a GPU's CUDA graph needs it; the same loss and gradients."""
    agent = small_agent(**options)
    inputs = (*arguments(agent, toy_batch(agent)), torch.randn(8, 2 * agent.horizon), torch.rand(8, 1))
    results = []
    for loss in (agent.loss, torch.compile(agent.loss, backend="aot_eager", fullgraph=True)):
        value = loss(*inputs)
        results.append((value.item(), torch.cat([g.flatten() for g in torch.autograd.grad(value, agent.parameters)])))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    assert_close(results[0][1], results[1][1].numpy(), 1e-5)


# --- Gaussian policy --------------------------------------------------------------------------------------------------
def test_gaussian_loss_is_the_log_density_of_torch_distributions():
    agent = small_agent(policy="gaussian", action_chunking=True, horizon_length=3)
    obs, x_1, valid = arguments(agent, toy_batch(agent))
    mean, log_std = agent.actor.head(obs)
    base = distributions.Normal(mean.double(), log_std.double().exp())
    squashed = distributions.TransformedDistribution(base, [distributions.TanhTransform()])
    log_pi = squashed.log_prob(x_1.double()).unflatten(-1, (3, 2)) * valid.unsqueeze(-1)
    assert_close(agent.loss(obs, x_1, valid, None, None), -log_pi.mean().item())


def test_gaussian_acts_with_its_mode_and_learns_it():
    agent = small_agent(1, 1, policy="gaussian", lr=3e-3, hidden_dims=(64, 64), batch_size=256)
    rng = np.random.default_rng(0)
    for _ in range(400):
        obs = rng.choice([-1.0, 1.0], (256, 1)).astype(np.float32)
        noise = 0.3 * rng.standard_normal((256, 1))
        info = agent.update({"observations": obs, "actions": np.tanh(0.8 * obs + noise).astype(np.float32)})
    actions = agent.sample_actions(np.array([[-1.0], [1.0]]))
    assert_close(actions, np.tanh([[-0.8], [0.8]]), 0.03)
    assert np.array_equal(actions, agent.sample_actions(np.array([[-1.0], [1.0]])))  # no noise
    _, log_std = agent.actor.head(torch.tensor([[-1.0], [1.0]]))
    assert_close(log_std.exp(), np.full((2, 1), 0.3), 0.05)
    assert "actor/bc_nll_loss" in info and info["actor/bc_nll_loss"] < -0.2


def test_gaussian_learns_hard_actions_beside_certain_ones():
    """Without a least standard deviation the likelihood of the constant action grows without end, and wins."""
    agent = small_agent(1, 2, policy="gaussian", lr=3e-3, hidden_dims=(64, 64), batch_size=256)
    rng = np.random.default_rng(0)
    for _ in range(2000):
        obs = rng.uniform(-1, 1, (256, 1)).astype(np.float32)
        agent.update({"observations": obs, "actions": np.concatenate([0.5 + 0 * obs, 0.8 * np.sin(6 * obs)], 1)})
    obs = np.linspace(-0.9, 0.9, 20, dtype=np.float32)[:, None]
    assert_close(agent.sample_actions(obs)[:, 1:], 0.8 * np.sin(6 * obs), 0.1)
    assert_close(agent.actor.head(torch.from_numpy(obs))[1].exp()[:, 0], np.full(20, math.exp(-2)), 1e-3)


def test_gaussian_takes_actions_at_the_bounds():
    agent = small_agent(policy="gaussian")
    batch = toy_batch(agent) | {"actions": np.ones((8, 2), np.float32)}
    wild = copy.deepcopy(agent.actor.head)
    wild.mlp[-1].bias.data.fill_(99)
    assert wild(torch.zeros(1, 3))[1].tolist() == [[2, 2]]
    assert math.isfinite(agent.update(batch)["actor/actor_loss"])
    assert all(p.isfinite().all() for p in agent.actor.parameters())


# --- The note's contract (B17) ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--env_name=x-v0 --sparse=1", True),
        ("--env_name=x-v0 --sparse=0", False),
        ("--env_name=x-v0 --nosparse", False),
        ("--env_name=x-v0 --sparse --nosparse", False),
        ("--env_name=x-v0 --sparse=true", True),
    ],
)
def test_b17_switches_as_absl_takes_them(flags, expected):
    assert read_args(flags.split()).sparse is expected


def test_b17_an_observation_shape_that_is_a_number():
    one, other = BCAgent.create(3, 2, small_args()), BCAgent.create((3,), 2, small_args())
    assert one.shape == (3,) and torch.equal(parameters_of(one.actor), parameters_of(other.actor))
    assert one.sample_actions(np.zeros(3)).shape == (2,)


@pytest.mark.parametrize("encoder", ["small", "resnet10", "impala_small"])
def test_b17_an_encoder_for_states_is_refused(encoder):
    """Ignored, it would be taken for the reason of the result."""
    with pytest.raises(SystemExit, match=f"--encoder {encoder}.*states"):
        small_agent(encoder=encoder)


def test_b17_process_train_dataset_takes_the_data_only():
    """As in the note's main(), whose flags the data was made with: first half, then -1 where the reward is not 0."""
    ds = toy_dataset()
    ds["rewards"] = np.arange(40.0) % 2
    ds.args = small_args(dataset_proportion=0.5, sparse=True)
    assert process_train_dataset(ds)["rewards"].tolist() == [0, -1] * 10
    plain = toy_dataset()
    assert process_train_dataset(plain).size == 40


# --- Saving -----------------------------------------------------------------------------------------------------------
NOTE_KEYS = {"actor", "critic", "target_critic", "actor_optimizer", "critic_optimizer", "config", "step"}


@pytest.mark.parametrize(
    "options", [{}, {"ema": 0.9, "lr_schedule": "cosine", "offline_steps": 40}, {"policy": "gaussian"}]
)
def test_save_and_load_go_on_exactly(tmp_path, options):
    options = {"action_chunking": True, "normalize_observations": True} | options
    agent = small_agent(**options)
    for i in range(5):
        agent.update(toy_batch(agent, seed=i))
    agent.save(tmp_path / "checkpoint.pt")
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state.keys() >= NOTE_KEYS and state["step"] == 5
    assert state["config"] == json.loads(json.dumps(dataclasses.asdict(agent.args))) | {"hidden_dims": (16, 16)}
    other = small_agent(**options, seed=7)
    other.load(tmp_path / "checkpoint.pt")
    obs, noise = np.ones((2, 3)), np.ones((2, 10))
    assert np.array_equal(agent.sample_actions(obs, noise=noise), other.sample_actions(obs, noise=noise))
    for i in range(5, 10):
        one, two = (a.update(toy_batch(a, seed=i)) for a in (agent, other))
        assert one == two
    assert torch.equal(parameters_of(agent.actor), parameters_of(other.actor))
    assert torch.equal(parameters_of(agent.ema_actor), parameters_of(other.ema_actor))
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_an_averaged_policy_stays_averaged_with_default_settings(tmp_path):
    """The note's snippet does not know of ema: what acts is what was evaluated."""
    agent = small_agent(ema=0.9, lr=1e-2)
    for i in range(20):
        agent.update(toy_batch(agent, seed=i))
    agent.save(tmp_path / "final_model.pt")
    other, obs, noise = small_agent(), np.ones((2, 3)), np.ones((2, 2))
    other.load(tmp_path / "final_model.pt")
    assert np.array_equal(agent.sample_actions(obs, noise=noise), other.sample_actions(obs, noise=noise))
    other.ema_actor = other.actor
    assert not np.array_equal(agent.sample_actions(obs, noise=noise), other.sample_actions(obs, noise=noise))


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_dims": (16, 8)},
        {"hidden_dims": (16, 16, 16)},
        {"action_chunking": True},
        {"use_fourier_features": True},
        {"policy": "gaussian"},
        {"normalize_observations": True},
        {"obs_dim": 4},
        {"action_dim": 3},
    ],
    ids=str,
)
def test_checkpoint_of_another_shape(tmp_path, changes):
    small_agent().save(tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="checkpoint.pt") as error:
        small_agent(**changes).load(tmp_path / "checkpoint.pt")
    assert "\n" not in str(error.value)


def test_load_of_nothing_and_of_something_else(tmp_path):
    """B17: errors that a program can catch, not SystemExit."""
    with pytest.raises(FileNotFoundError, match="none"):
        small_agent().load(tmp_path / "none")
    for name, content in (("empty", b""), ("text", b"no checkpoint")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            small_agent().load(tmp_path / name)
    for content in ({"a": 1}, [1, 2], {"actor": {}, "config": {}}):
        torch.save(content, tmp_path / "other")
        with pytest.raises(ValueError, match="other"):
            small_agent().load(tmp_path / "other")


# --- Evaluation -------------------------------------------------------------------------------------------------------
class Recorded(BCAgent):
    """An agent whose chunks are known, 0.1, 0.2, ... plus the observation's draw / 100, and which notes its calls."""

    calls: list

    def sample_actions(self, observations, rng=None, noise=None):
        self.calls.append(np.array(observations))
        steps = 0.1 * np.arange(1, self.horizon + 1)
        return np.repeat(np.asarray(observations)[:, :1] / 100 + steps, 1, axis=0).astype(np.float32)


def recorded_agent(**changes) -> Recorded:
    agent = Recorded.create((2,), 1, small_args(**changes))
    agent.calls = []
    return agent


def test_chunks_are_executed_to_their_end_and_the_policy_is_asked_only_then():
    """Chunks of 3 in episodes of 7 steps: asked at steps 0, 3, 6, and the rest of the last chunk does not leak."""
    agent, env = recorded_agent(action_chunking=True, horizon_length=3), Steps()
    stats, trajectories, renders = evaluate(agent, env, 1, num_eval_episodes=2)
    assert [call[:, 1].tolist() for call in agent.calls] == [[0], [3], [6]] * 2
    draws = [call[0, 0] for call in agent.calls[::3]]
    for draw, taken in zip(draws, (env.taken[:7], env.taken[7:])):
        assert taken == pytest.approx([x + draw / 100 for x in (0.1, 0.2, 0.3, 0.1, 0.2, 0.3, 0.1)], abs=1e-6)
    assert stats["episodic_return"] == pytest.approx(sum(env.taken) / 2)
    assert stats["episodic_length"] == 7 and stats["episodes"] == 2 and renders == []
    assert stats["success_rate"] == np.mean([draw > 0.5 for draw in draws])
    assert stats["draw"] == pytest.approx(np.mean(draws)) and "name" not in stats
    assert [len(trajectory["reward"]) for trajectory in trajectories] == [7, 7]
    assert np.array(trajectories[1]["action"]).ravel() == pytest.approx(env.taken[7:])
    assert np.array(trajectories[0]["observation"])[:, 1].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert np.array(trajectories[0]["next_observation"])[:, 1].tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert trajectories[0]["done"] == [0] * 6 + [1]


def test_execution_horizon_is_shorter_than_the_chunk():
    agent, env = recorded_agent(action_chunking=True, horizon_length=4, execution_horizon=2), Steps()
    evaluate(agent, env, 1, num_eval_episodes=1)
    assert [call[0, 1] for call in agent.calls] == [0, 2, 4, 6]
    draw = agent.calls[0][0, 0] / 100
    assert env.taken == pytest.approx([x + draw for x in (0.1, 0.2, 0.1, 0.2, 0.1, 0.2, 0.1)], abs=1e-6)


def test_parallel_episodes_ask_in_one_batch():
    agent, envs = recorded_agent(action_chunking=True, horizon_length=3), [Steps() for _ in range(4)]
    evaluate(agent, envs, 1, num_eval_episodes=10)
    assert [len(call) for call in agent.calls] == [4, 4, 4] * 2 + [2, 2, 2]
    assert sum(len(env.resets) for env in envs) == 10


@pytest.mark.parametrize("count", [1, 3, 8])
def test_parallel_episodes_are_those_of_one_after_the_other(count):
    """Lengths differ between the environments, so that episodes end and begin at different times."""
    agent = small_agent(2, 1, action_chunking=True, horizon_length=3)
    envs = [Steps(length=5 + (i > 1)) for i in range(count)]
    stats, trajectories, _ = evaluate(agent, [Steps() for _ in range(count)], 1, 6, seed=5)
    one, alone, _ = evaluate(agent, Steps(), 1, 6, seed=5)
    assert {k: pytest.approx(v, abs=1e-6) for k, v in one.items()} == stats
    for ours, theirs in zip(trajectories, alone):
        assert_close(np.array(ours["observation"]), np.array(theirs["observation"]), 1e-6)
        assert_close(np.array(ours["action"]), np.array(theirs["action"]), 1e-6)
    assert evaluate(agent, envs, 1, 6, seed=5)[0]["episodes"] == 6


def test_evaluation_is_seeded_and_apart_from_training():
    agent = small_agent(2, 1)
    state = agent.generator.get_state()
    np.random.seed(3)  # noqa: NPY002
    before = np.random.get_state()[1].tolist()  # noqa: NPY002
    env = Steps()
    one, other = (evaluate(agent, env, 1, 3, seed=4)[0] for _ in range(2))
    assert one == other and env.resets[:3] == env.resets[3:] and len(set(env.resets)) == 3
    assert evaluate(agent, Steps(), 1, 3, seed=5)[0] != one
    assert torch.equal(agent.generator.get_state(), state)
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002


def test_video_episodes_are_beside_the_counted_ones():
    """Every third frame and the last one (qc evaluation.py:100), of episodes that do not count."""
    agent, env = recorded_agent(), Steps(render_mode="rgb_array")
    stats, trajectories, renders = evaluate(agent, env, 1, 2, num_video_episodes=2, video_frame_skip=3)
    assert stats["episodes"] == len(trajectories) == 2 and len(env.resets) == 4
    assert len(renders) == 2 and [frame[0, 0, 0] for frame in renders[0]] == [60, 120, 140]


def test_video_of_an_environment_that_does_not_render():
    with pytest.raises((SystemExit, ValueError), match="render"):
        evaluate(recorded_agent(), Steps(), 1, 1, num_video_episodes=1)


def test_video_grid():
    """qc log_utils.py:101: ceil(sqrt(n)) columns, a border of one pixel, the last frame goes on at half brightness."""
    renders = [np.full((length, 4, 6, 3), 100 + 10 * i, np.uint8) for i, length in enumerate((3, 5, 2))]
    grid = video_grid(renders)
    assert grid.shape == (5, 12, 16, 3)
    assert (
        grid[0, 1:5, 1:7].min() == grid[0, 1:5, 1:7].max() == 100 and grid[2, 2, 2, 0] == 100 and grid[3, 2, 2, 0] == 50
    )
    assert grid[4, 2, 10, 0] == 110 and grid[1, 8, 2, 0] == 120 and grid[2, 8, 2, 0] == 60
    assert grid[:, 6:, 8:].max() == 0 and grid[:, 0].max() == 0 and grid[:, :, 7:9].max() == 0


# --- Logs -------------------------------------------------------------------------------------------------------------
class Messages:
    """Stands for wandb: keeps what is logged."""

    def __init__(self):
        self.logged = []

    def log(self, data, step=None):
        self.logged.append((data, step))


def test_csv_logger_keeps_numbers_and_its_columns(tmp_path):
    logger, row = (
        CsvLogger(tmp_path / "x.csv"),
        {"a": 1, "b": np.float32(0.5), "video": object(), "c": torch.tensor(2.0)},
    )
    kept = dict(row)
    logger.log(row, 10)
    logger.log({"a": 1e-20, "d": 3.0}, 1_000_000)
    assert row == kept  # the original writes `step` into the caller's dict
    text = (tmp_path / "x.csv").read_text()  # every row is there at once
    assert text.splitlines() == ["step,a,b,c", "10,1,0.5,2", "1000000,1e-20,,"]
    logger.close()


@pytest.mark.parametrize(
    ("content", "last", "expected"),
    [
        ("step,a\n1,2\n3,4\n5,6\n", 3, ["step,a", "1,2", "3,4", "7,8"]),
        ("step,a\n1,2\n3,", 3, ["step,a", "1,2", "7,8"]),
        ("step,a\n", 0, ["step,a", "7,8"]),
        ("step,", 0, ["step,a", "7,8"]),
        ("", 0, ["step,a", "7,8"]),
    ],
)
def test_csv_logger_goes_on_behind_a_checkpoint(tmp_path, content, last, expected):
    (tmp_path / "x.csv").write_text(content)
    drop_rows_after(tmp_path / "x.csv", last)
    logger = CsvLogger(tmp_path / "x.csv")
    logger.log({"a": 8}, 7)
    logger.close()
    assert (tmp_path / "x.csv").read_text().splitlines() == expected


def test_logging_helper_writes_to_csv_and_wandb(tmp_path):
    wandb = Messages()
    logger = LoggingHelper(csv_loggers={"eval": CsvLogger(tmp_path / "eval.csv")}, wandb_logger=wandb)
    video = object()
    logger.log({"success": 0.5, "video": video}, "eval", step=3)
    assert (tmp_path / "eval.csv").read_text() == "step,success\n3,0.5\n"
    assert wandb.logged == [({"eval/success": 0.5, "eval/video": video}, 3)]


# --- process_train_dataset --------------------------------------------------------------------------------------------
def test_proportion_keeps_the_first_rows():
    ds = process_train_dataset(toy_dataset(), small_args(dataset_proportion=0.33))
    whole = toy_dataset()
    assert ds.keys() == whole.keys()
    for key in ds:
        np.testing.assert_array_equal(ds[key], whole[key][:13], err_msg=key)
    assert ds.sample_sequence(1, 3, 0.99, idxs=np.array([9]))["valid"].tolist() == [[1, 0, 0]]
    _, _, valid = make_batches(ds, small_args(action_chunking=True, horizon_length=3), CPU).gather(
        torch.tensor([9, 10])
    )
    assert valid.tolist() == [[1, 0, 0], [1, 1, 1]]


@pytest.mark.parametrize(
    ("name", "sparse", "expected"),
    [
        ("x", False, [0, 1, 2, 0]),
        ("x", True, [0, -1, -1, 0]),
        ("lift-mh-low_dim", False, [-1, 0, 1, -1]),
        ("lift-mh-low_dim", True, [-1, 0, -1, -1]),  # robomimic's - 1 comes before sparse; qc main.py:108-136
    ],
)
def test_rewards_are_processed_in_the_order_of_the_original(name, sparse, expected):
    ds = toy_dataset(4, (0, 1, 3))
    ds["rewards"] = np.array([0, 1, 2, 0], np.float32)
    ds = process_train_dataset(ds, small_args(env_name=name, sparse=sparse))
    assert ds["rewards"].tolist() == expected


def test_sparse_on_a_dense_task_warns(capsys):
    process_train_dataset(toy_dataset(), small_args(sparse=True))
    assert "--sparse" in capsys.readouterr().err
    ds = toy_dataset()
    ds["rewards"] = (ds["rewards"] > 0).astype(np.float32)
    process_train_dataset(ds, small_args(sparse=True))
    process_train_dataset(toy_dataset(), small_args())
    assert capsys.readouterr().err == ""


def test_proportion_that_leaves_nothing():
    with pytest.raises(SystemExit, match="--dataset-proportion 0.01"):
        process_train_dataset(toy_dataset(), small_args(dataset_proportion=0.01))


# --- Batches ----------------------------------------------------------------------------------------------------------
def test_batches_depend_on_seed_and_update_only():
    batches = make_batches(toy_dataset(), small_args(), CPU)
    one, later = batches.take(0, 6, CPU), batches.take(4, 2, CPU)
    for ours, theirs in zip(one, later):
        assert torch.equal(ours[4:], theirs)
    assert not torch.equal(one[0][0], one[0][1])
    other = make_batches(toy_dataset(), small_args(seed=1), CPU).take(0, 6, CPU)
    assert not torch.equal(one[0], other[0])


def test_batches_are_chunks_of_the_dataset():
    """What sample_sequence gives for the same rows."""
    dataset, args = toy_dataset(), small_args(action_chunking=True, horizon_length=5, batch_size=500)
    batches = make_batches(dataset, args, CPU)
    rows = batches.rows(3)
    assert rows.min() == 0 and rows.max() == 35 and np.bincount(rows, minlength=36).min() > 2
    observations, actions, valid = batches.take(3, 1, CPU)
    theirs = dataset.sample_sequence(len(rows), 5, 0.99, idxs=rows)
    np.testing.assert_array_equal(observations[0], theirs["observations"])
    np.testing.assert_array_equal(actions[0], theirs["actions"].reshape(500, -1))
    np.testing.assert_array_equal(valid[0], theirs["valid"])


def test_frame_stacks_stop_at_the_episodes_start():
    dataset = toy_dataset()
    dataset["observations"] = np.arange(40, dtype=np.float32)[:, None]
    observations, _, _ = make_batches(dataset, small_args(frame_stack=3), CPU).gather(
        torch.tensor([0, 1, 9, 10, 11, 25])
    )
    assert observations.tolist() == [[0, 0, 0], [0, 0, 1], [7, 8, 9], [10, 10, 10], [10, 10, 11], [23, 24, 25]]


def test_rows_from_python_are_stacked_as_those_of_a_run():
    dataset = toy_dataset()
    dataset["observations"] = np.arange(40, dtype=np.float32)[:, None]
    dataset["next_observations"] = dataset["observations"] + 1
    dataset.args = small_args(frame_stack=3)
    rows = np.array([0, 1, 9, 10, 11, 25])
    expected = [[0, 0, 0], [0, 0, 1], [7, 8, 9], [10, 10, 10], [10, 10, 11], [23, 24, 25]]
    batch = dataset.sample(6, rows)
    assert batch["observations"].tolist() == expected
    assert batch["next_observations"].tolist() == [[*stack[1:], stack[2] + 1] for stack in expected]
    assert dataset.sample_sequence(6, 2, 0.9, rows)["observations"].tolist() == expected


class Told(gym.Env):
    """Observes how often it was stepped, and keeps the actions."""

    observation_space = gym.spaces.Box(0, 99, (1,), np.float32)
    action_space = gym.spaces.Box(np.float32([-1.5, 0]), np.float32([1.5, 1]))

    def reset(self, *, seed=None, options=None):
        self.actions = []
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.actions.append(action.tolist())
        return np.full(1, len(self.actions), np.float32), 0.0, False, False, {}


def test_a_task_sees_the_datas_actions_and_the_policy_a_stack_of_frames():
    env = PolicyInput(Told(), gym.spaces.Box(np.float32([-2, 0]), np.float32([2, 1])), frame_stack=3)
    stacks = [env.reset()[0].tolist()]
    for action in ([0, 0], [0.5, 1], [-1, -1], [1, -0.5]):
        stacks.append(env.step(np.float32(action))[0].tolist())
    assert env.unwrapped.actions == [[0, 0.5], [1, 1], [-1.5, 0], [1.5, 0.25]]  # within the task's bounds
    assert stacks == [[0, 0, 0], [0, 0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4]]


def test_data_shorter_than_a_chunk():
    args = small_args(action_chunking=True, horizon_length=5)
    _, actions, valid = make_batches(toy_dataset(6, (0, 5)), args, CPU).gather(
        torch.tensor([1])
    )  # episodes of 1 and 5 steps
    assert actions.shape == (1, 10) and valid.tolist() == [[1, 1, 1, 1, 1]]
    with pytest.raises(SystemExit, match="--horizon-length 5: the longest episode of the data has 3 steps"):
        make_batches(toy_dataset(5, (0, 1, 4)), args, CPU)


def test_padding_is_flaxs_same():
    """Kernel 3, stride 2: on even sizes all of it behind, on odd sizes one on each side."""
    for size, expected in ((4, [[10, 11], [14, 15]]), (5, [[6, 8, 9], [16, 18, 19], [21, 23, 24]])):
        x = torch.arange(size * size, dtype=torch.float32).reshape(1, 1, size, size)
        assert torch.nn.functional.max_pool2d(pad_same(x, 3, 2, -math.inf), 3, 2)[0, 0].tolist() == expected


# --- Runs -------------------------------------------------------------------------------------------------------------
TINY = "--threads 1 --hidden-dims 64 64 --batch-size 64 --offline-steps 300 --log-interval 50 --eval-interval 100"
TINY += " --save-interval 150 --eval-episodes 10 --lr 3e-3 --lr-schedule cosine --no-capture-video"
POINT = ("--env-name", "point/expert-v0", "--action-chunking", "--horizon-length", 3)
TIMES = {"seconds", "SPS"}


@pytest.fixture(scope="module")
def point_data(tmp_path_factory) -> Path:
    """A folder with the data set point/expert-v0: 20 episodes of the task's expert."""
    root = tmp_path_factory.mktemp("minari")
    before = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = str(root)
    write_minari("point/expert-v0", gym.make("probe_envs:Point-v0"), episodes=20)
    os.environ.pop("MINARI_DATASETS_PATH")
    os.environ |= {"MINARI_DATASETS_PATH": before} if before else {}
    return root


def run(*flags: object, cwd: Path, data: Path | None = None, **options) -> Finished:
    """The script with small networks and budgets; later flags win."""
    if data:
        options["env"] = {"MINARI_DATASETS_PATH": str(data)} | options.get("env", {})
    return run_forked(SCRIPT, *TINY.split(), *flags, cwd=cwd, **options)


def checkpoint(run_dir: Path, name: str = "final_model.pt") -> dict:
    """The agent's state."""
    state = torch.load(run_dir / name, weights_only=True)
    return state.get("agent", state)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, point_data) -> Finished:
    """A run to read; tests that change it copy it first."""
    cwd = tmp_path_factory.mktemp("finished")
    return run(*POINT, "--capture-video", "--run-dir", "run", cwd=cwd, data=point_data)


def test_without_mujoco(tmp_path, point_data):
    """R7: where MuJoCo cannot be imported one line says so, and data of a task without it is learned from."""
    flags = (*TINY.split(), *POINT, "--offline-steps", 60, "--run-dir", "run")
    env = {"MUJOCO_GL": "foo", "MINARI_DATASETS_PATH": str(point_data)}
    result = run_script(SCRIPT, *flags, cwd=tmp_path, env=env | {"PYTHONPATH": str(REPO / "tests")})
    assert "Traceback" not in result.stderr and "MUJOCO_GL=foo does not load" in result.stderr
    assert read_csv(tmp_path / "run", "eval.csv")["episodes"] == [10]


def leaves(state, path: str = "") -> dict[str, object]:
    """All that a checkpoint holds, but for the time that it took."""
    if isinstance(state, dict | list | tuple):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return {k: v for key, part in items for k, v in leaves(part, f"{path}/{key}").items()}
    return {} if path == "/config/run_dir" else {path: state}


def differences(one: dict, other: dict) -> list[str]:
    """Names of what differs between two checkpoints."""
    ours, theirs = leaves(one), leaves(other)
    assert ours.keys() == theirs.keys()

    def equal(a, b) -> bool:
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b or a != a and b != b

    return [path for path in ours if not equal(ours[path], theirs[path])]


def table(run_dir: Path, name: str) -> dict[str, list[str]]:
    """A CSV without the columns that measure time, comparable with ==."""
    return {key: [f"{x}" for x in column] for key, column in read_csv(run_dir, name).items() if key not in TIMES}


def test_a_run_learns_the_task(finished):
    columns = read_csv(finished.run_dir, "eval.csv")
    assert columns["step"] == [100, 200, 300] and columns["episodes"] == [10, 10, 10]
    assert columns["success_rate"][-1] >= 0.5 and columns["episodic_return"][-1] > -7  # doing nothing: -20
    losses = read_csv(finished.run_dir, "offline_agent.csv")
    assert losses["step"] == [50, 100, 150, 200, 250, 300]
    assert losses["actor/actor_loss"][-1] < 0.7 * losses["actor/actor_loss"][0]
    assert losses["lr"][0] == pytest.approx(3e-3 * 0.5 * (1 + math.cos(math.pi * 49 / 300)), rel=1e-5)


def test_a_run_leaves_the_files_of_the_note(finished):
    run_dir = finished.run_dir
    names = {path.name for path in run_dir.iterdir()}
    assert (run_dir / "args.json").read_bytes() == (run_dir / "flags.json").read_bytes()
    assert {"flags.json", "offline_agent.csv", "eval.csv", "final_model.pt", "token.tk"} <= names
    assert {name for name in names if name.startswith("checkpoint_")} == {"checkpoint_150.pt", "checkpoint_300.pt"}
    assert not [name for name in names if name.endswith((".tmp", ".new"))]
    assert (run_dir / "token.tk").read_text() == str(run_dir)
    flags = json.loads((run_dir / "flags.json").read_text())
    assert flags.keys() == {field.name for field in dataclasses.fields(Args)}
    assert (flags["env_name"], flags["horizon_length"], flags["hidden_dims"]) == ("point/expert-v0", 3, [64, 64])
    for name, step in (("checkpoint_150.pt", 150), ("checkpoint_300.pt", 300), ("final_model.pt", 300)):
        state = checkpoint(run_dir, name)
        assert state.keys() >= NOTE_KEYS and state["step"] == step
    assert differences(checkpoint(run_dir, "checkpoint_300.pt"), checkpoint(run_dir)) == []
    assert differences(checkpoint(run_dir, "checkpoint.pt"), checkpoint(run_dir)) == []
    about = json.loads((run_dir / "run.json").read_text())
    assert about["command"][-2:] == ["--run-dir", "run"] and about["versions"]["torch"] == torch.__version__
    for script in (SCRIPT, "franka_sim.py", "common/datasets.py", "common/run.py"):
        assert (run_dir / script).read_bytes() == (REPO / script).read_bytes()


def test_b17_the_time_in_all_is_that_of_the_command(tmp_path):
    """Collecting demonstrations counts: they are what a short run waits for."""
    flags = "--demos 100 --offline-steps 5 --eval-interval 0 --eval-episodes 1 --hidden-dims 8 --threads 1"
    done = run_forked(SCRIPT, *flags.split(), "--no-capture-video", "--run-dir", "run", cwd=tmp_path)
    minutes, seconds = re.search(r"100/100 \[(\d+):(\d+)<", done.stderr).groups()
    collecting = 60 * int(minutes) + int(seconds)
    assert int(re.search(r"(\d+) s in all", done.stdout)[1]) >= collecting >= 1


def test_a_run_prints_what_the_data_is(finished, point_data):
    line = next(line for line in finished.stdout.splitlines() if "mean return" in line)
    os.environ["MINARI_DATASETS_PATH"] = str(point_data)
    returns = [episode.rewards.sum() for episode in minari.load_dataset("point/expert-v0").iterate_episodes()]
    os.environ.pop("MINARI_DATASETS_PATH")
    assert f"mean return {np.mean(returns):.6g}" in line and f"best {max(returns):.6g}" in line
    assert "no reference scores" in line and "point/expert-v0" in finished.stdout


def test_the_printed_numbers_are_those_of_eval_csv(finished):
    columns = read_csv(finished.run_dir, "eval.csv")
    best = max(range(3), key=lambda i: (columns["success_rate"][i], columns["episodic_return"][i]))
    for word, row in (("last", 2), ("best", best)):
        line = next(line for line in finished.stdout.splitlines() if line.startswith(f"{word}: "))
        assert f"episodic_return {columns['episodic_return'][row]:.5g}" in line and "over 10 episodes" in line


def test_tensorboard_has_the_numbers_of_the_csv_files(finished):
    scalars = read_scalars(finished.run_dir)
    for name in ("offline_agent", "eval"):
        columns = read_csv(finished.run_dir, f"{name}.csv")
        for key in columns.keys() - {"step"}:
            ours = list(zip(columns["step"], columns[key]))
            np.testing.assert_allclose(scalars[f"{name}/{key}"], ours, rtol=1e-6, err_msg=key)


def test_curve_and_video(finished):
    image = imageio.imread(finished.run_dir / "curve.png")[..., :3].astype(int)
    assert min(image.shape[:2]) > 200 and (np.ptp(image, axis=-1) > 100).sum() > 100  # coloured: a curve
    frames = np.array(imageio.mimread(finished.run_dir / "video.mp4", memtest=False))
    assert len(frames) == 7 and frames.shape[1:] == (132, 132, 3)  # 20 steps, every third and the last; 2 x 2 episodes
    assert abs(frames[0].astype(int) - frames[-1]).max() > 100


def test_same_seed_same_numbers_other_seed_other_numbers(finished, tmp_path, point_data):
    again = run(*POINT, "--run-dir", "again", cwd=tmp_path, data=point_data)
    changed = differences(checkpoint(finished.run_dir), checkpoint(again.run_dir))
    assert changed == ["/config/capture_video"]
    for name in ("offline_agent.csv", "eval.csv"):
        assert table(finished.run_dir, name) == table(again.run_dir, name)
    other = run(*POINT, "--seed", 1, "--run-dir", "other", cwd=tmp_path, data=point_data)
    for name in ("offline_agent.csv", "eval.csv"):
        assert table(finished.run_dir, name) != table(other.run_dir, name)


def test_a_run_gets_a_directory_of_its_own(tmp_path, point_data):
    """SAVE_DIR/PROJECT/RUN_GROUP/ENV_NAME/EXP_NAME, as qc main.py:71."""
    flags = ("--offline-steps", 10, "--run-group", "mine", "--save-dir", "out", "--seed", 7)
    runs = [run(*POINT, *flags, cwd=tmp_path, data=point_data) for _ in range(2)]
    found = sorted(path.parent for path in tmp_path.glob("out/**/flags.json"))
    assert len(found) == 2
    for run_dir in found:
        project, group, env_name, exp_name = run_dir.relative_to(tmp_path / "out").parts
        assert (project, group, env_name) == ("robot-learning", "mine", "point-expert-v0")
        assert re.fullmatch(r"sd007\d{8}_\d{6}\S*", exp_name)
        assert any(str(run_dir.relative_to(tmp_path)) in finished.stdout for finished in runs)
        assert (run_dir / "token.tk").read_text() == str(run_dir)


def copy_run(finished: Finished, cwd: Path) -> Path:
    return Path(shutil.copytree(finished.run_dir, cwd / "run"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_eval_only_repeats_the_last_evaluation(finished, tmp_path, point_data):
    run_dir = copy_run(finished, tmp_path)
    (run_dir / "video.mp4").unlink()
    before = contents(run_dir)
    last = next(line for line in finished.stdout.splitlines() if line.startswith("last: "))
    env = {"MINARI_DATASETS_PATH": str(point_data)}
    for path in ("run", "run/checkpoint_300.pt"):
        result = run_forked(SCRIPT, "--eval-only", path, cwd=tmp_path, env=env)
        assert last.removeprefix("last: ") in result.stdout
        assert len(imageio.mimread(run_dir / "video.mp4", memtest=False)) == 7
    (run_dir / "video.mp4").unlink()
    assert contents(run_dir) == before
    flags = ("--eval-episodes", 11, "--no-capture-video")
    result = run_forked(SCRIPT, "--eval-only", "run/checkpoint_150.pt", *flags, cwd=tmp_path, env=env)
    assert "over 11 episodes" in result.stdout and "150" in result.stdout
    assert not (run_dir / "video.mp4").exists()


def test_load_and_evaluate_from_python(finished, point_data, monkeypatch):
    """The note's own snippet."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(point_data))
    config = BCAgentConfig(action_chunking=True, horizon_length=3, hidden_dims=(64, 64))
    env, _, train_dataset, _ = make_env_and_datasets("point/expert-v0")
    example_batch = train_dataset.sample(4)
    agent = BCAgent.create(example_batch["observations"].shape[1:], example_batch["actions"].shape[-1], config)
    agent.load(finished.run_dir / "final_model.pt")
    stats, _, _ = evaluate(agent, env, 3, num_eval_episodes=10)
    columns = read_csv(finished.run_dir, "eval.csv")
    assert stats["episodic_return"] == pytest.approx(columns["episodic_return"][-1], rel=1e-6)
    assert stats["success_rate"] == columns["success_rate"][-1]


def test_training_in_python_as_the_note_does(point_data, monkeypatch):
    """Its loop: sample, update; batches of chunks and of single rows."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(point_data))
    _, eval_env, train_dataset, val_dataset = make_env_and_datasets("point/expert-v0")
    assert val_dataset is None
    agent = BCAgent.create((4,), 3, small_args(action_chunking=True, horizon_length=5, lr=3e-3, hidden_dims=(64, 64)))
    np.random.seed(0)  # noqa: NPY002
    losses = [
        agent.update(train_dataset.sample_sequence(64, sequence_length=5, discount=0.99))["actor/bc_flow_loss"]
        for _ in range(300)
    ]
    assert np.mean(losses[-20:]) < 0.5 * np.mean(losses[:20])
    stats, trajectories, renders = evaluate(agent=agent, env=eval_env, action_dim=3, num_eval_episodes=5)
    assert stats["success_rate"] > 0.5 and len(trajectories) == 5 and renders == []


# --- Runs: stop, kill, resume -----------------------------------------------------------------------------------------
ALL_AT_ONCE = "--ema 0.98 --normalize-observations --frame-stack 2 --weight-decay 0.01 --grad-accum-steps 2"
ALL_AT_ONCE += " --validation-fraction 0.2 --top-fraction 0.9 --use-fourier-features --flow-solver heun"
ALL_AT_ONCE += " --execution-horizon 2 --dataset-proportion 0.9"


def env_of(data: Path) -> dict[str, dict[str, str]]:
    """Options of run_forked and popen_script: where the data sets and their tasks are."""
    return {"env": {"MINARI_DATASETS_PATH": str(data), "PYTHONPATH": str(Path(probe_envs.__file__).parent)}}


@pytest.mark.parametrize(
    ("first", "total", "flags"),
    [
        (110, 230, ""),
        (110, 230, ALL_AT_ONCE),
        (35, 70, "--policy gaussian"),
    ],
    ids=["plain", "all at once", "gaussian"],
)
def test_resume_is_exact(tmp_path, point_data, first, total, flags):
    """Also from a step at which a whole run would log nothing, and whatever the schedule's end was at first."""
    flags = [*flags.split(), "--lr-schedule", "constant", "--eval-interval", 100, "--eval-episodes", 2]
    run(*POINT, *flags, "--offline-steps", total, "--run-dir", "whole", cwd=tmp_path, data=point_data)
    run(*POINT, *flags, "--offline-steps", first, "--run-dir", "parts", cwd=tmp_path, data=point_data)
    assert checkpoint(tmp_path / "parts")["step"] == first
    go_on = ("--resume", "parts", "--offline-steps", total)
    run_forked(SCRIPT, *go_on, cwd=tmp_path, **env_of(point_data))
    changed = differences(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "parts"))
    assert [path for path in changed if path != "/config/resume"] == []
    assert table(tmp_path / "whole", "offline_agent.csv") == table(tmp_path / "parts", "offline_agent.csv")
    whole, parts = (read_csv(tmp_path / name, "eval.csv") for name in ("whole", "parts"))
    assert parts["step"] == sorted({*whole["step"], first})
    for key in whole.keys() - TIMES:
        ours = dict(zip(parts["step"], parts[key]))
        assert [f"{ours[step]}" for step in whole["step"]] == [f"{x}" for x in whole[key]], key


def test_ctrl_c_gives_the_tasks_back(tmp_path, point_data, monkeypatch):
    """A robot, or a simulator that draws: both have to be closed, also when an evaluation is given up."""
    ends = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(point_data))
    monkeypatch.setattr(bc_flow_offline.Evaluation, "close", lambda self: ends.append("closed"))

    def stop(*_):
        ends.append("stopped")
        raise KeyboardInterrupt

    monkeypatch.setattr(bc_flow_offline, "train", stop)
    argv = [*TINY.split(), *map(str, POINT), "--run-dir", "run"]
    threads = torch.get_num_threads()
    with pytest.raises(SystemExit, match="stopped; begin again with --resume run"):
        bc_flow_offline.main(parse(Args, bc_flow_offline.__doc__, Args.MAY_CHANGE, argv))
    torch.set_num_threads(threads)
    assert ends == ["stopped", "closed"]


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, point_data):
    flags = [*TINY.split(), *POINT, "--lr-schedule", "constant", "--eval-interval", 150, "--eval-episodes", 2]
    env = env_of(point_data)
    with popen_script(SCRIPT, *flags, "--offline-steps", 10**6, "--run-dir", "run", cwd=tmp_path, **env) as process:
        log = tmp_path / "run" / "offline_agent.csv"
        wait_until(lambda: log.exists() and log.read_text().count("\n") > 4)
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(20) not in (0, None)
    errors = process.stderr_path.read_text()
    assert "--resume run" in errors and "Traceback" not in errors
    stopped_at = checkpoint(tmp_path / "run", "checkpoint.pt")["step"]
    assert stopped_at >= 200 and not (tmp_path / "run" / "final_model.pt").exists()
    total = ("--offline-steps", stopped_at + 180)
    run_forked(SCRIPT, "--resume", "run", *total, cwd=tmp_path, **env)
    run_forked(SCRIPT, *flags, *total, "--run-dir", "whole", cwd=tmp_path, **env)
    changed = differences(checkpoint(tmp_path / "run"), checkpoint(tmp_path / "whole"))
    assert [path for path in changed if path != "/config/resume"] == []
    for name in ("offline_agent.csv", "eval.csv"):
        assert table(tmp_path / "run", name) == table(tmp_path / "whole", name)
    scalars = read_scalars(tmp_path / "run")
    logged = [step for step, _ in scalars["offline_agent/actor/actor_loss"]]
    assert logged == list(range(50, stopped_at + 181, 50))


def test_kill_at_many_moments(tmp_path, point_data):
    """kill -9, again and again on one run; then it finishes as if nothing had happened."""
    flags = [*TINY.split(), *POINT, "--offline-steps", 2000, "--eval-interval", 350, "--eval-episodes", 2]
    moments, run_dir, env, kills, steps = random.Random(0), tmp_path / "run", env_of(point_data), 0, []

    def go_on() -> list[object]:
        if not (run_dir / "args.json").exists():  # written last of a new folder's
            shutil.rmtree(run_dir, ignore_errors=True)
        return ["--resume", "run"] if run_dir.exists() else [*flags, "--run-dir", "run"]

    while kills < 15:
        with popen_forked(SCRIPT, *go_on(), cwd=tmp_path, **env) as process:
            process.join(moments.uniform(0.1, 0.8))
            killed = process.exitcode is None
        errors = process.stderr_path.read_text()
        assert "Traceback" not in errors and "--resume" not in errors, errors
        if not killed:
            break  # a fast machine has finished by now
        kills += 1
        if (run_dir / "checkpoint.pt").exists():
            steps.append(checkpoint(run_dir, "checkpoint.pt")["step"])
    assert kills > 1 and steps == sorted(steps)
    newest = run_dir / "checkpoint.pt"
    if not newest.exists() or not torch.load(newest, weights_only=True)["run"]["finished"]:
        run_forked(SCRIPT, *go_on(), cwd=tmp_path, **env)
    run_forked(SCRIPT, *flags, "--run-dir", "whole", cwd=tmp_path, **env)
    changed = differences(checkpoint(run_dir), checkpoint(tmp_path / "whole"))
    assert [path for path in changed if path != "/config/resume"] == []
    for name in ("offline_agent.csv", "eval.csv"):
        assert table(run_dir, name) == table(tmp_path / "whole", name)


@pytest.mark.parametrize(
    "missing", ["final_model.pt curve.png video.mp4 token.tk", "curve.png video.mp4 token.tk", "token.tk"]
)
def test_kill_after_the_last_evaluation(finished, tmp_path, point_data, missing):
    """Whatever was not written yet is written by --resume, and nothing twice."""
    run_dir = copy_run(finished, tmp_path)
    for name in missing.split():
        (run_dir / name).unlink()
    state = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    state["run"]["finished"] = False  # which is written last
    torch.save(state, run_dir / "checkpoint.pt")
    run_forked(SCRIPT, "--resume", "run", cwd=tmp_path, **env_of(point_data))
    assert all((run_dir / name).stat().st_size for name in missing.split())
    assert table(run_dir, "eval.csv") == table(finished.run_dir, "eval.csv")
    assert set(differences(checkpoint(run_dir), checkpoint(finished.run_dir))) <= {"/config/resume"}


def test_kill_during_the_last_evaluation_of_a_continued_run(finished, tmp_path, point_data):
    """The final model of the first part is not taken for that of the second."""
    run_dir = copy_run(finished, tmp_path)
    go_on = (SCRIPT, "--resume", "run", "--offline-steps", 350, "--no-capture-video")

    def learned() -> bool:
        with contextlib.suppress(FileNotFoundError):  # between its two renames
            return checkpoint(run_dir, "checkpoint.pt")["step"] == 350
        return False

    with popen_forked(*go_on, "--eval-episodes", 10**6, cwd=tmp_path, **env_of(point_data)) as process:
        wait_until(learned)
        time.sleep(0.3)
        process.kill()
    run_forked(*go_on, "--eval-episodes", 2, cwd=tmp_path, **env_of(point_data))  # it remembers the million
    assert checkpoint(run_dir)["step"] == 350 and read_csv(run_dir, "eval.csv")["step"] == [100, 200, 300, 350]


# --- Runs: several processes ------------------------------------------------------------------------------------------
def ranks(count: int, port: int) -> list[dict[str, str]]:
    """The environment that torchrun gives to each process."""
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [shared | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(count)]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_two_processes_learn_what_one_does(tmp_path, point_data):
    """torchrun with gloo: the same global batch, the same losses and parameters; one of them logs and saves."""
    flags = [*TINY.split(), *POINT, *["--ema", "0.9", "--normalize-observations", "--grad-accum-steps", "2"]]
    flags += ["--offline-steps", 120, "--run-dir"]
    run_forked(SCRIPT, *flags, "one", cwd=tmp_path, **env_of(point_data))
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", free_port(), REPO / SCRIPT]
    command = [sys.executable, *map(str, launch), *map(str, flags), "two"]
    env = script_env(tmp_path, env_of(point_data)["env"])
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run directory two") == done.stdout.count("last: ") == 1
    one, two = (read_csv(tmp_path / name, "offline_agent.csv") for name in ("one", "two"))
    assert one["step"] == two["step"] == [50, 100]
    for key in one.keys() - TIMES:
        np.testing.assert_allclose(two[key], one[key], rtol=2e-3 if "grad" in key else 1e-4, err_msg=key)
    ours, theirs = (leaves(checkpoint(tmp_path / name)) for name in ("two", "one"))
    for path in ours:
        if path.startswith(("/actor/", "/ema_actor/")):
            np.testing.assert_allclose(ours[path], theirs[path], rtol=1e-3, atol=1e-4, err_msg=path)
    written = [{p.name for p in (tmp_path / name).iterdir() if p.suffix != ".py"} for name in ("one", "two")]
    assert {name for name in written[0] if "events" not in name} <= written[1]
    assert len(list((tmp_path / "two").glob("events*"))) == 1


def test_a_seed_of_any_size(monkeypatch):
    """numpy's old generator takes 32 bits."""
    monkeypatch.setattr(bc_flow_offline, "set_up_torch", lambda *_: CPU)
    for seed in (5_000_000_000, 2**63 - 1):
        assert bc_flow_offline.prepare_torch(Args(seed=seed)) == CPU


def test_a_dead_process_ends_the_others(tmp_path, point_data):
    """One line that says so, in seconds; the checkpoint is whole and the run goes on with one process."""
    flags = [*TINY.split(), *POINT, "--offline-steps", 100_000, "--eval-interval", 0, "--run-dir", "run"]
    with contextlib.ExitStack() as stack:
        options = [{"env": env_of(point_data)["env"] | rank} for rank in ranks(2, free_port())]
        lead, other = (stack.enter_context(popen_forked(SCRIPT, *flags, cwd=tmp_path, **o)) for o in options)
        log = tmp_path / "run" / "offline_agent.csv"
        wait_until(lambda: log.exists() and log.read_text().count("\n") > 2)
        other.kill()
        lead.join(20)
        assert lead.exitcode not in (0, None)
    errors = lead.stderr_path.read_text()
    assert "Traceback" not in errors and "--resume run" in errors, errors
    step = checkpoint(tmp_path / "run", "checkpoint.pt")["step"]
    run_forked(SCRIPT, "--resume", "run", "--offline-steps", step + 20, cwd=tmp_path, **env_of(point_data))
    assert checkpoint(tmp_path / "run")["step"] == step + 20


def test_the_others_know_where_the_first_process_writes(tmp_path, point_data):
    """Killed, it says nothing; the name that it gave its folder has the time in it."""
    flags = [*TINY.split(), *POINT, "--offline-steps", 100_000, "--eval-interval", 0]
    with contextlib.ExitStack() as stack:
        options = [{"env": env_of(point_data)["env"] | rank} for rank in ranks(2, free_port())]
        lead, other = (stack.enter_context(popen_forked(SCRIPT, *flags, cwd=tmp_path, **o)) for o in options)
        wait_until(lambda: list(tmp_path.glob("runs/**/checkpoint.pt")))
        lead.kill()
        other.join(20)
    (path,) = tmp_path.glob("runs/**/checkpoint.pt")
    assert f"go on with --resume {path.parent.relative_to(tmp_path)}" in other.stderr_path.read_text()


def test_ctrl_c_reaches_all_processes_at_one_update(tmp_path, point_data):
    """torchrun hands the signal to every process; here only one gets it."""
    flags = [*TINY.split(), *POINT, "--offline-steps", 100_000, "--eval-interval", 0, "--run-dir", "run"]
    with contextlib.ExitStack() as stack:
        options = [{"env": env_of(point_data)["env"] | rank} for rank in ranks(2, free_port())]
        processes = [stack.enter_context(popen_forked(SCRIPT, *flags, cwd=tmp_path, **o)) for o in options]
        log = tmp_path / "run" / "offline_agent.csv"
        wait_until(lambda: log.exists() and log.read_text().count("\n") > 2)
        os.kill(processes[1].pid, signal.SIGINT)
        for process in processes:
            process.join(20)
            assert process.exitcode is not None and "Traceback" not in process.stderr_path.read_text()
    assert processes[0].exitcode != 0 and "--resume run" in processes[0].stderr_path.read_text()
    assert checkpoint(tmp_path / "run", "checkpoint.pt")["step"] >= 100


def test_a_process_count_that_does_not_divide_the_batch(tmp_path, point_data, monkeypatch):
    monkeypatch.setattr("sys.argv", [SCRIPT])
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SystemExit, match="--batch-size 256.*3 processes"):
        read_args([])


# --- Runs: policies, options, images ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "flags",
    [
        "--policy gaussian",
        "--no-action-chunking --use-fourier-features --flow-solver heun --flow-steps 2",
        ALL_AT_ONCE
        + " --video-episodes 1 --video-frame-skip 40 --capture-video --action-bounds clip --sparse --discount 0.9",
    ],
)
def test_options_run(tmp_path, point_data, flags):
    """Every switch that the other runs leave alone, in runs that reach gradient steps."""
    flags = [*POINT, *flags.split(), "--offline-steps", 40, "--log-interval", 10, "--eval-interval", 20]
    done = run(*flags, "--run-dir", "run", cwd=tmp_path, data=point_data)
    losses, evaluations = (read_csv(done.run_dir, f"{name}.csv") for name in ("offline_agent", "eval"))
    assert losses["step"] == [10, 20, 30, 40] and evaluations["step"] == [20, 40]
    assert all(math.isfinite(x) for key, column in losses.items() for x in column)
    assert ("actor/bc_nll_loss" in losses) == ("gaussian" in flags)
    if "--validation-fraction" in flags:
        assert all(0 < x < 10 for x in evaluations["validation_loss"])
        videos = {p.name: imageio.mimread(p, memtest=False) for p in done.run_dir.glob("video*.mp4")}
        assert videos.keys() == {"video.mp4", "video_20.mp4", "video_40.mp4"} and all(map(len, videos.values()))


def test_normalization_is_of_the_training_rows_only(tmp_path, point_data, monkeypatch):
    """Not of validation episodes, of those that top_fraction leaves out, or of rows behind dataset_proportion."""
    options = {"validation_fraction": 0.3, "top_fraction": 0.5, "dataset_proportion": 0.7}
    flags = [x for name, value in options.items() for x in (f"--{name.replace('_', '-')}", value)]
    flags += ["--normalize-observations", "--offline-steps", 20, "--run-dir", "run"]
    run(*POINT, *flags, cwd=tmp_path, data=point_data)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(point_data))
    args = Args(env_name="point/expert-v0", **options)
    whole = make_env_and_datasets(args.env_name)[2]
    train = process_train_dataset(make_env_and_datasets(args.env_name, args)[2], args)
    assert whole.size == 400 and train.size == 98
    actor = checkpoint(tmp_path / "run")["actor"]
    mean, var = (
        next(value for key, value in actor.items() if key.endswith(f"normalizer.{k}")) for k in ("mean", "var")
    )
    assert_close(mean, train["observations"].mean(0), 1e-5)
    assert_close(var, train["observations"].var(0), 1e-5)
    assert abs(mean - whole["observations"].mean(0)).max() > 0.01


@pytest.fixture(scope="module")
def camera_data(tmp_path_factory) -> Path:
    """A folder with the data set own/camera-v0: images that say where to go."""
    root = tmp_path_factory.mktemp("minari")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(root))
        write_minari("own/camera-v0", gym.make("offline_data:Camera-v0"), episodes=20)
    return root


CAMERA = "--env-name own/camera-v0 --batch-size 16 --eval-episodes 5 --lr-schedule constant --lr 1e-3 --eval-interval 0"


@pytest.mark.parametrize("encoder", ["small", "resnet10", "impala_small"])
def test_encoders_learn(tmp_path, camera_data, encoder):
    """All parameters of each encoder change, on images in memory."""
    flags = [*CAMERA.split(), "--encoder", encoder, "--offline-steps", 12, "--log-interval", 4, "--run-dir", "run"]
    run(*flags, "--save-interval", 4, cwd=tmp_path, data=camera_data)
    one, other = (checkpoint(tmp_path / "run", f"checkpoint_{step}.pt")["actor"] for step in (4, 12))
    still = [name for name in one if torch.equal(one[name], other[name]) and "normalizer" not in name]
    assert [name for name in still if not name.endswith(("mean", "std", ".w"))] == []
    assert all(map(math.isfinite, read_csv(tmp_path / "run", "offline_agent.csv")["actor/actor_loss"]))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("encoder", ["small", "resnet10", "impala_small"])
def test_an_update_from_images_is_that_of_a_plain_optimizer(encoder, threads):
    """Gradients of convolutions lie in memory in another order than their weights, which fused AdamW does not see."""
    args = small_args(encoder=encoder, threads=threads)
    agent = BCAgent.create({"front": (64, 64, 3), "state": (1,)}, 1, args)
    plain = copy.deepcopy(agent.actor)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8, 64, 64, 3), generator=generator, dtype=torch.uint8)
    observations = {"front": images, "state": torch.randn(8, 1, generator=generator)}
    agent.step(observations, torch.rand(8, 1, generator=generator), torch.ones(8, 1))
    for parameter, other in zip(plain.parameters(), agent.parameters, strict=True):
        parameter.grad = other.grad.contiguous()
        parameter.data = parameter.data.contiguous()
    options = {"lr": args.lr, "weight_decay": args.weight_decay}
    torch.optim.AdamW(plain.parameters(), fused=False, foreach=False, **options).step()
    for (name, parameter), other in zip(plain.named_parameters(), agent.parameters, strict=True):
        assert torch.allclose(parameter, other, rtol=0, atol=1e-3 * args.lr), name


def test_impala_is_qcs():
    """utils/encoders.py: stages of convolution, max pooling and one residual block; ReLU, a layer, GELU."""
    encoder = BCAgent.create({"front": (16, 16, 3)}, 1, small_args()).actor.encoder.images["front"]
    images = torch.randint(256, (2, 16, 16, 3), dtype=torch.uint8)
    x = (images / 255).permute(0, 3, 1, 2)
    for first, second, third in encoder.trunk.stages:
        x = F.max_pool2d(F.pad(first(x), (0, 1, 0, 1), value=-math.inf), 3, 2)
        x = x + third(second(x.relu()).relu())
    x = encoder.linear(x.relu().flatten(1))
    expected = 0.5 * x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())  # flax's GELU
    assert_close(encoder(images), expected.detach().numpy())
    small = BCAgent.create({"front": (64, 64, 3)}, 1, small_args(encoder="small")).actor.encoder.images["front"]
    assert small.linear.in_features == 256 * 3 * 3


def test_training_images_are_shifted_by_up_to_four_pixels():
    """Each sample by its own draw, all cameras by the same."""
    agent, seen = BCAgent.create(dict.fromkeys(("front", "wrist"), (16, 16, 3)), 1, small_args()), []
    agent.gradient = lambda observations, *_: seen.append(observations) or (torch.zeros(()), list(agent.parameters))
    images = torch.zeros(600, 16, 16, 3, dtype=torch.uint8)
    images[:, 8, 8] = 255
    agent.step({"front": images, "wrist": images}, torch.zeros(600, 1), torch.ones(600, 1))
    places = seen[0]["front"][..., 0].nonzero()[:, 1:]  # (600, 2)
    assert [set(numbers) for numbers in places.T.tolist()] == [set(range(4, 13))] * 2
    assert torch.equal(seen[0]["front"], seen[0]["wrist"])


def test_states_beside_images_are_normalized_too():
    args = small_args(normalize_observations=True, frame_stack=2)
    agent = BCAgent.create({"front": (16, 16, 3), "state": (4,)}, 1, args)
    states = torch.randn(500, 2) * torch.tensor([3.0, 0.5]) + 7
    agent.observe(states)
    features = agent.actor.encoder({"front": torch.zeros(500, 16, 16, 3), "state": states.repeat(1, 2)})[:, :4]
    assert_close(features.mean(0), np.zeros(4), 1e-3)
    assert_close(features.std(0), np.ones(4), 1e-2)


def test_images_are_learned(tmp_path, camera_data):
    """The side is only in the image."""
    flags = [*CAMERA.split(), "--encoder", "impala_small", "--offline-steps", 120, "--run-dir", "run"]
    run(*flags, cwd=tmp_path, data=camera_data)
    assert read_csv(tmp_path / "run", "eval.csv")["success_rate"][-1] >= 0.8


def test_workers_and_checkpointed_activations_change_no_number(tmp_path, camera_data):
    """Images read by workers, activations computed twice: the losses of images in memory."""
    flags = [*CAMERA.split(), "--encoder", "impala_small", "--frame-stack", 2]
    flags += ["--offline-steps", 12, "--log-interval", 4]
    variants = {"memory": [], "workers": ["--data-loading", "workers"], "twice": ["--checkpoint-activations"]}
    tables = {}
    for name, more in variants.items():
        done = run(*flags, *more, "--run-dir", name, cwd=tmp_path, data=camera_data)
        tables[name] = table(tmp_path / name, "offline_agent.csv")
        assert ("workers" in done.stdout) == (name == "workers")
    assert tables["memory"] == tables["workers"] == tables["twice"]


def test_run_with_workers_resumes_exactly(tmp_path, camera_data):
    flags = [*CAMERA.split(), "--data-loading", "workers", "--num-workers", 1, "--log-interval", 5]
    flags += ["--save-interval", -1]
    run(*flags, "--offline-steps", 20, "--run-dir", "whole", cwd=tmp_path, data=camera_data)
    run(*flags, "--offline-steps", 10, "--run-dir", "parts", cwd=tmp_path, data=camera_data)
    go_on = ("--resume", "parts", "--offline-steps", 20)
    run_forked(SCRIPT, *go_on, cwd=tmp_path, **env_of(camera_data))
    assert not list(tmp_path.glob("*/checkpoint_*.pt"))  # --save-interval -1 keeps none
    assert table(tmp_path / "whole", "offline_agent.csv") == table(tmp_path / "parts", "offline_agent.csv")


@pytest.mark.parametrize("how", ["ctrl-c", "a worker is killed"])
def test_a_run_with_workers_ends_with_one_line(tmp_path, camera_data, how):
    flags = [*CAMERA.split(), "--data-loading", "workers", "--num-workers", 2, "--log-interval", 5]
    env = env_of(camera_data)
    with popen_script(SCRIPT, *flags, "--offline-steps", 10**6, "--run-dir", "run", cwd=tmp_path, **env) as process:
        wait_until(lambda: (tmp_path / "run" / "checkpoint.pt").exists())
        if how == "ctrl-c":
            os.killpg(process.pid, signal.SIGINT)  # a terminal's goes to the workers, too
        else:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            os.kill(int(children[0]), signal.SIGKILL)
        assert process.wait(30) not in (0, None)
    errors = process.stderr_path.read_text()
    assert "in learn_offline" not in errors  # a traceback; the other worker's, which was handing over, may be there
    if how == "ctrl-c":
        assert "go on with --resume run" in errors and errors.count("stopping: the update ends first") == 1
    else:
        assert re.search("DataLoader worker .*--num-workers 0 .*go on with --resume run", errors)


def test_the_default_needs_no_flag_and_no_network(tmp_path):
    """Demonstrations of the scripted expert are collected once, learned from, and the robot is filmed."""
    flags = "--demos 3 --offline-steps 40 --log-interval 20 --eval-interval 0 --eval-episodes 2 --hidden-dims 32 32"
    flags = [*flags.split(), "--threads", 1, "--run-dir"]
    done = run_forked(SCRIPT, *flags, "run", cwd=tmp_path)
    assert "3/3" in done.stderr  # a progress bar
    (name,) = [p.parent.parent.relative_to(tmp_path / "minari") for p in (tmp_path / "minari").rglob("main_data.hdf5")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
        dataset = minari.load_dataset(str(name))
        assert (
            dataset.total_episodes == 3 and type(dataset.recover_environment().unwrapped).__name__ == "FrankaPickCube"
        )
        heights = [episode.observations["cube_pos"][:, 2] for episode in dataset.iterate_episodes()]
    assert min(height[-1] for height in heights) > 0.12  # every demonstration lifts the cube
    assert read_csv(done.run_dir, "eval.csv")["episodes"] == [2]
    assert len(imageio.mimread(done.run_dir / "video.mp4", memtest=False)) >= 33
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "minari").rglob("*") if p.is_file()}
    again = run_forked(SCRIPT, *flags, "again", "--no-capture-video", cwd=tmp_path)
    assert "demonstrations" not in again.stderr
    assert files == {p: p.stat().st_mtime_ns for p in (tmp_path / "minari").rglob("*") if p.is_file()}
    assert table(tmp_path / "run", "offline_agent.csv") == table(tmp_path / "again", "offline_agent.csv")


class TwoFingers(probe_envs.Point):
    """Its expert gives actions of another size."""

    def expert_action(self):
        return np.zeros(2)


gym.register("TwoFingers-v0", f"{__name__}:TwoFingers", disable_env_checker=True, max_episode_steps=20)


def test_an_expert_that_is_no_help_is_named_with_the_flag_that_was_given():
    with pytest.raises(SystemExit, match=r"--demos 3: expert_action\(\) gives array"):
        dataset_ids(Args(env_name="TwoFingers-v0", demos=3))


def test_a_run_makes_its_task_once(point_data, monkeypatch):
    """With pictures; it may own a port or a robot."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(point_data))
    made = []
    make = bc_flow_offline.make_env
    monkeypatch.setattr(bc_flow_offline, "make_env", lambda *a, **k: made.append(make(*a, **k)) or made[-1])
    *_, evaluation = bc_flow_offline.prepare(Args(env_name="point/expert-v0", hidden_dims=(8,)), CPU)
    assert evaluation.envs == made and made[0].render_mode == "rgb_array"


def test_kill_while_demonstrations_are_collected(tmp_path):
    """Half a data set is never taken for a whole one."""
    flags = "--demos 40 --offline-steps 5 --eval-interval 0 --eval-episodes 1 --hidden-dims 8 --threads 1"
    flags = [*flags.split(), "--no-capture-video", "--run-dir", "run"]
    with popen_forked(SCRIPT, *flags, cwd=tmp_path) as process:
        wait_until(lambda: list((tmp_path / "minari").glob(".*/**/main_data.hdf5")))
        time.sleep(0.1)
        process.kill()
    done = run_forked(SCRIPT, *flags, cwd=tmp_path)
    assert "40/40" in done.stderr and "40 of 40 episodes" in done.stdout


@pytest.mark.slow
def test_the_default_run_picks_the_cube(tmp_path):
    done = run_script(SCRIPT, cwd=tmp_path, timeout=900)
    (eval_csv,) = tmp_path.glob("runs/**/eval.csv")
    assert read_csv(eval_csv.parent, "eval.csv")["success_rate"][-1] >= 0.98, done.stdout


@pytest.mark.slow
def test_wandb_mirrors_offline(tmp_path, point_data):
    """And token.tk holds the run directory, as an offline run has no address."""
    flags = [*TINY.split(), *POINT, "--offline-steps", 100, "--video-episodes", 1, "--track", "--run-dir", "run"]
    run_script(SCRIPT, *flags, cwd=tmp_path, env=env_of(point_data)["env"] | {"WANDB_MODE": "offline"})
    assert list((tmp_path / "run").glob("wandb/offline-run-*/*.wandb"))
    assert (tmp_path / "run" / "token.tk").read_text() == str(tmp_path / "run")


# --- Bad input --------------------------------------------------------------------------------------------------------
def refused(*flags: object, cwd: Path, **options) -> str:
    """The error of a run that must fail: one line, no traceback."""
    result = run_forked(SCRIPT, *flags, cwd=cwd, check=False, timeout=30, **options)
    assert result.returncode not in (0, None)
    assert "Traceback" not in result.stderr, result.stderr
    lines = [line for line in re.split("[\r\n]", result.stderr) if line.strip()]
    errors = [line for line in lines if "update/s]" not in line and "WARNING" not in line]
    assert len(errors) == 1 and errors[0].startswith("bc_flow_offline.py: "), result.stderr
    return errors[0]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--horizon-length 0", "--horizon-length 0"),
        ("--horizon-length -1", "--horizon-length"),
        ("--env-name halfcheetah-medum-v2", "--env-name halfcheetah-medum-v2 halfcheetah-medium-v2"),
        ("--batch-size 0", "--batch-size"),
        ("--batch-size 10 --grad-accum-steps 4", "--batch-size 10 --grad-accum-steps 4"),
        ("--offline-steps 0", "--offline-steps"),
        ("--flow-steps 0", "--flow-steps"),
        ("--eval-episodes 0", "--eval-episodes"),
        ("--eval-interval -1", "--eval-interval"),
        ("--log-interval 0", "--log-interval"),
        ("--video-frame-skip 0", "--video-frame-skip"),
        ("--frame-stack 0", "--frame-stack"),
        ("--demos 0", "--demos"),
        ("--hidden-dims 0", "--hidden-dims"),
        ("--dataset-proportion 0", "--dataset-proportion"),
        ("--dataset-proportion 1.5", "--dataset-proportion 1.5"),
        ("--top-fraction 0", "--top-fraction"),
        ("--validation-fraction 1", "--validation-fraction"),
        ("--ema 1", "--ema 1"),
        ("--lr -1", "--lr -1"),
        ("--lr nan", "--lr nan"),
        ("--weight-decay inf", "--weight-decay"),
        ("--discount 2 --env-name no-such-name", "--discount 2"),
        ("--execution-horizon 6 --action-chunking --horizon-length 5", "--execution-horizon 6 5"),
        ("--execution-horizon 2 --no-action-chunking", "--execution-horizon 2"),
        ("--resume nowhere", "--resume nowhere"),
        ("--eval-only nowhere", "--eval-only nowhere"),
    ],
)
def test_bad_flags(flags, words, monkeypatch):
    monkeypatch.setattr("sys.argv", [SCRIPT])
    with pytest.raises(SystemExit) as error:
        dataset_ids(read_args(flags.split()))
    message = str(error.value.code)
    assert message.startswith("bc_flow_offline.py: ") and "\n" not in message
    for word in words.split():
        assert word in message


def test_run_dir_is_checked_before_the_work(finished, tmp_path):
    """No data is collected for a run that cannot be written."""
    copy_run(finished, tmp_path)
    assert "--run-dir run" in refused("--demos", 3, "--run-dir", "run", cwd=tmp_path)
    (tmp_path / "file").write_text("")
    assert "file" in refused("--demos", 3, "--run-dir", "file/run", cwd=tmp_path)
    assert not list((tmp_path / "minari").glob("*/*"))


def test_resume_of_a_finished_run_asks_for_more_steps(finished, tmp_path, point_data):
    copy_run(finished, tmp_path)
    assert "--offline-steps 300" in refused("--resume", "run", cwd=tmp_path, **env_of(point_data))


def test_resume_with_other_flags(finished, tmp_path, monkeypatch):
    """What shapes the run is kept: another value is named and refused; the rest may change."""
    monkeypatch.setattr("sys.argv", [SCRIPT])
    run_dir = str(copy_run(finished, tmp_path))
    for flags in ("--lr 1", "--seed 3", "--batch-size 8", "--hidden-dims 8", "--no-action-chunking", "--ema 0.5"):
        for how in ("--resume", "--eval-only"):
            with pytest.raises(SystemExit, match=flags.split()[0].replace("--no-", "--")):
                read_args([how, run_dir, *flags.split()])
    args = read_args(["--resume", run_dir, "--offline-steps", "400", "--eval_episodes=3"])
    assert (args.offline_steps, args.eval_episodes, args.lr, args.hidden_dims) == (400, 3, 3e-3, (64, 64))
    args = read_args([f"--eval_only={run_dir}/checkpoint_150.pt", "--flow-steps", "5", "--lr", "3e-3"])
    assert (args.flow_steps, args.run_dir, args.env_name) == (5, run_dir, "point/expert-v0")


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, point_data):
    """Also when it is never logged; no model that cannot act is called final."""
    for interval in (10, 5000):
        flags = (*POINT, "--lr", 1e12, "--log-interval", interval, "--run-dir", f"run{interval}")
        error = refused(*TINY.split(), *flags, cwd=tmp_path, **env_of(point_data))
        assert "--lr" in error and not (tmp_path / f"run{interval}" / "final_model.pt").exists()


def test_full_disk(tmp_path, point_data):
    """Files may not grow beyond what a checkpoint needs: the message names the way on, the checkpoint stays."""
    flags = [*TINY.split(), *POINT, "--hidden-dims", 256, 256, "--offline-steps", 100, "--run-dir"]
    run_forked(SCRIPT, *flags, "whole", cwd=tmp_path, **env_of(point_data))
    space = (tmp_path / "whole" / "checkpoint.pt").stat().st_size - 1000
    error = refused(*flags, "run", cwd=tmp_path, max_file_bytes=space, **env_of(point_data))
    assert "--resume run" in error and ("too large" in error or "No space" in error)
    run_forked(SCRIPT, "--resume", "run", cwd=tmp_path, **env_of(point_data))
    assert table(tmp_path / "run", "offline_agent.csv") == table(tmp_path / "whole", "offline_agent.csv")


# --- GPU --------------------------------------------------------------------------------------------------------------
def on_gpu(**changes) -> BCAgent:
    return BCAgent.create((3,), 2, small_args(**{"hidden_dims": (64, 64)} | changes), torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("policy", ["flow", "gaussian"])
def test_graphed_updates_on_a_gpu(policy, monkeypatch):
    """Five updates a launch: the losses are those of the eager agent, fresh data and noise reach every replay."""
    monkeypatch.setattr(bc_flow_offline, "UPDATES_PER_LAUNCH", 5)
    options = {"policy": policy, "lr_schedule": "cosine", "offline_steps": 60, "ema": 0.9}
    graphed, eager = on_gpu(compile=True, **options), on_gpu(**options)
    batches = make_batches(toy_dataset(), graphed.args, torch.device("cuda"))
    before, losses = parameters_of(graphed.actor), []
    for step in range(0, 40, 5):
        infos = [agent.learn(batches.take(step, 5, torch.device("cuda"))) for agent in (graphed, eager)]
        losses.append([float(info["actor/actor_loss"]) for info in infos])
        assert float(infos[0]["lr"]) == pytest.approx(float(infos[1]["lr"]), rel=1e-5)
    assert len(graphed.learn_launch.graphs) == 1 and int(graphed.updates) == 40
    assert not hasattr(eager.learn_launch, "graphs")
    assert len({one for one, _ in losses}) == 8
    if policy == "gaussian":  # draws no noise, whose order may differ
        assert [one for one, _ in losses] == pytest.approx([other for _, other in losses], rel=0.02, abs=0.02)
    assert (parameters_of(graphed.actor) - before).abs().mean() > 1e-4
    graphed.learn(batches.take(40, 3, torch.device("cuda")))  # a launch of another length, eagerly
    graphed.learn(batches.take(43, 17, torch.device("cuda")))
    still = parameters_of(graphed.actor)
    graphed.learn(batches.take(60, 5, torch.device("cuda")))  # the schedule has reached 0
    assert torch.equal(parameters_of(graphed.actor), still)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_run_on_a_gpu(tmp_path, point_data):
    """As a user: trains with graphs, resumes there, and its checkpoint is evaluated on a CPU."""
    env = env_of(point_data)["env"]
    gpu = env | {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")}
    flags = [*TINY.split(), *POINT, "--lr-schedule", "constant", "--run-dir", "run"]
    run_script(SCRIPT, *flags, "--offline-steps", 200, cwd=tmp_path, env=gpu, timeout=280)
    run_script(SCRIPT, "--resume", "run", "--offline-steps", 300, cwd=tmp_path, env=gpu, timeout=280)
    losses = read_csv(tmp_path / "run", "offline_agent.csv")
    assert losses["step"] == [50, 100, 150, 200, 250, 300]
    assert all(math.isfinite(x) for column in losses.values() for x in column)
    last = read_csv(tmp_path / "run", "eval.csv")["episodic_return"][-1]
    result = run_script(SCRIPT, "--eval-only", "run", "--no-capture-video", cwd=tmp_path, env=env)
    measured = float(re.search(r"episodic_return ([-\d.e+]+)", result.stdout)[1])
    assert measured == pytest.approx(last, rel=0.02, abs=0.02)
