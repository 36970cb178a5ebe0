"""sac_pixel_real.py: what it learns from, by hand, and a short working day on the simulated robot."""

import contextlib
import dataclasses
import json
import os
import re
import signal
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import (
    free_port,
    held_elsewhere,
    one_line,
    popen_script,
    read_checkpoint,
    read_csv,
    run_script,
    wait_until,
)
from state_runs import AllAtOnce, stored

import robot_client as rc
import sac_pixel_real as real
import sac_pixel_sim as sim
from common import envs, recording, setup, tensors
from common.episodes import Recorder
from common.pixels import FrameFile, Views
from common.recording import Recording, dataset_folder
from common.tensors import pack_step

PEG = rc.TASKS["peg"]
CPU = torch.device("cpu")
SMALL = {"latent_dim": 8, "small_channels": (4, 4), "image_size": 16, "batch_size": 4, "hidden_dims": (16,)}


def small_args(**flags) -> real.Args:
    return real.Args(**(SMALL | flags))


def small_agent(device: torch.device = CPU, **flags) -> real.Agent:
    args = small_args(**flags)
    env = real.wrap_env(real.make_env(args), args)
    return real.Agent(real.views_of(env), env.action_space, args, device)


def some_obs(agent: real.Agent, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (agent.views.stack, *agent.views.frame_shape), np.uint8)
    return {"images": images, "state": rng.normal(size=(1, agent.views.state_dim)).astype(np.float32)}


# --- Gripper ----------------------------------------------------------------------------------------------------------
def test_grasp_target_is_double_dqn():
    agent = small_agent(gamma=0.9)
    agent.actor.sample = lambda seen, eps: (None, None)
    agent.target_critic = lambda seen, actions, generator: torch.zeros(2, 2)
    values = {
        "next": torch.tensor([[1.0, 3.0, 2.0], [5.0, 0.0, 0.0]]),  # this critic chooses stay, and open
        "now": torch.tensor([[0.0, 0.0, 4.0], [2.0, 0.0, 0.0]]),
    }
    agent.encode = lambda observation: observation
    agent.grasp_critic = values.get
    agent.target_grasp_critic = lambda _: torch.tensor([[10.0, 20.0, 30.0], [7.0, 8.0, 9.0]])
    actions = torch.tensor([[0.0] * 6 + [0.9], [0.0] * 6 + [-0.6]])  # close, open
    batch = real.Batch("now", actions, torch.tensor([0.5, 1.0]), "next", torch.tensor([0.0, 1.0]))
    _, target_q = agent.target_q(batch, None, torch.arange(2))
    loss = agent.grasp_loss("now", actions[:, -1:], target_q)
    targets = [0.5 + 0.9 * 20.0, 1.0]  # the target critic values what this one chose; an end has no value
    assert loss.item() == pytest.approx(((4 - targets[0]) ** 2 + (2 - targets[1]) ** 2) / 2)


def test_learned_rewards_are_scaled_and_penalties_with_them():
    agent = small_agent(reward_scale=5.0)
    states = torch.zeros(3, agent.views.state_dim)
    rewards = torch.tensor([0.0, 1.0, 1 - 0.02])
    batch = real.Batch(states, torch.zeros(3, 7), rewards, states, torch.tensor([0.0, 1.0, 1.0]))
    frames = torch.zeros(3, 2, *agent.views.frame_shape, dtype=torch.uint8)
    prepared = agent.prepare(batch, frames)
    assert prepared.rewards.tolist() == pytest.approx([0.0, 5.0, 4.9])
    eps, subset = torch.zeros(3, 6), torch.arange(2)
    for target_q in agent.target_q(prepared, eps, subset):
        assert target_q[1:].tolist() == pytest.approx([5.0, 4.9])  # nothing comes after an end


def test_gripper_is_told_the_same_by_critic_and_environment():
    for value in (-1.0, -0.5, -0.4999, 0.0, 0.4999, 0.5, 1.0):
        index = real.grasp_index(torch.tensor([value])).item()
        for closure in (0.0, 1.0):
            assert rc.closure_after(np.float32(value), closure, "binary") == (0.0, closure, 1.0)[index]
    agent = small_agent()
    for motion, value in ((0, -1.0), (1, 0.0), (2, 1.0)):
        agent.grasp_critic = lambda _, best=motion: torch.nn.functional.one_hot(torch.tensor([best]), 3)
        action = agent.act(some_obs(agent), deterministic=True)
        assert action.shape == (7,) and action[-1] == value
        assert real.grasp_index(torch.from_numpy(action[-1:])).item() == motion


def test_gripper_may_be_left_alone_or_be_the_actors():
    for gripper, decided in (("fixed", 6), ("continuous", 7)):
        agent = small_agent(gripper=gripper)
        assert agent.arm_dim == decided and agent.grasp_critic is None
        for action in (agent.act(some_obs(agent), deterministic=False), agent.random_action()):
            assert action.shape == (7,) and (action[-1] == 0) == (gripper == "fixed")


@pytest.mark.parametrize("gripper", ["binary", "continuous", "fixed"])
def test_penalties_of_demonstrations_are_the_environments(gripper):
    actions = np.zeros((6, 7))
    actions[:, -1] = [0.9, 0.2, 0.9, -0.9, -0.4, 0.6]
    env = rc.FrankaEnv(dataclasses.replace(rc.PEG, gripper=gripper, gripper_penalty=0.02))
    pose = rc.pose_from_euler(rc.PEG.reset_pose)
    env.state, env.target = {"reference": pose, "tcp_pose": pose}, pose
    env.client = SimpleNamespace(target=lambda *_: {"result": None})
    for closure in (0.0, 1.0):
        env.closure, expected = closure, []
        for action in actions:
            info = {}
            env.command(action, info)
            expected.append(info["grasp_penalty"])
        assert real.grasp_penalties(actions, closure, env.config) == pytest.approx(expected)
    unknown = [0, 0, 0, -0.02, 0, -0.02] if gripper == "binary" else [0] * 6  # closed or not before
    assert real.grasp_penalties(actions, None, env.config) == unknown


def test_demonstrations_of_a_gripper_are_rewarded_as_live_steps_are(tmp_path, monkeypatch):
    """The penalty of closing it is among their rewards; it is open at first."""
    record_demos(tmp_path, [True], monkeypatch, config=rc.TASKS["pick"])
    args = small_args(task="pick")
    _, _, demos = real.start_learner(args, new_run(tmp_path, args), CPU)
    assert demos.rows.rewards[:5].tolist() == pytest.approx([-args.gripper_penalty, 0, 0, 0, 1])


# --- Learning ---------------------------------------------------------------------------------------------------------
def both_buffers(folder: Path, module, agent, seed: int) -> object:
    """20 transitions of random pictures, in episodes of 5, in a buffer of either script."""
    frames = FrameFile(folder / f"{module.__name__}{seed}", agent.views.frame_shape, CPU)
    buffer = module.FrameBuffer(20, agent.views, agent.action_dim, frames, 3, 0.9)
    rng = np.random.default_rng(seed)
    for number in range(24):
        action = rng.uniform(-1, 1, agent.action_dim).astype(np.float32) if number % 6 else None
        obs = some_obs(agent, 100 * seed + number)
        buffer.add(pack_step(agent.step_type, action, obs, rng.normal(), number % 12 == 5))
    return buffer


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 6, "actor_ema": 0.75, "demo_ratio": 0.34},
        {"backup_entropy": True, "dropout": 0.2, "num_qs": 3, "policy_delay": 2, "lr_warmup": 3, "lr_decay": 5},
        {"grad_accum_steps": 2, "augment": ("crop", "flip"), "image_size": 64, "bc_weight": 2.0, "weight_decay": 0.1},
    ],
)
def test_learns_and_acts_as_the_script_for_simulations(tmp_path, changes):
    """To the bit, where the gripper is the actor's and rewards are not scaled."""
    ours = small_agent(gripper="continuous", reward_scale=1.0, gamma=0.9, lr=0.01, **changes)
    names, known = ({field.name for field in dataclasses.fields(script.Args)} for script in (sim, real))
    args = sim.Args(**{name: getattr(ours.args, name) for name in names & known})
    theirs = sim.Agent(ours.views, gym.spaces.Box(-1, 1, (7,)), args, CPU)
    metrics = []
    for module, agent in ((real, ours), (sim, theirs)):
        replay, demos = (both_buffers(tmp_path, module, agent, seed) for seed in (1, 2))
        agent.normalizer.fit(replay.rows.observations)
        metrics.append(agent.update(replay, demos, 2) | agent.update(replay, demos, 3))
    assert metrics[0] == metrics[1]
    for name in ("encoder", "ema_encoder", "actor", "ema_actor", "critic", "target_critic"):
        modules = [getattr(agent, name).state_dict() for agent in (ours, theirs)]
        assert [key for key, value in modules[0].items() if not torch.equal(value, modules[1][key])] == [], name
    assert ours.alpha == theirs.alpha and ours.owed(200) == theirs.owed(200)
    for deterministic in (True, False):
        assert np.array_equal(*(agent.act(some_obs(ours), deterministic) for agent in (ours, theirs)))
    assert np.array_equal(ours.random_action(), theirs.random_action())


def test_the_grasp_critic_learns_from_the_actions_last_entry(tmp_path):
    """The others from the rest; its target follows it."""
    agent = small_agent()
    seen = {}
    for name in ("critic_loss", "grasp_loss"):

        def told(features, actions, target_q, name=name):
            seen[name] = actions
            return getattr(real.Agent, name)(agent, features, actions, target_q)

        setattr(agent, name, told)
    update_once = agent.update_once
    agent.update_once = lambda *inputs, **options: seen.update(all=inputs[1]) or update_once(*inputs, **options)
    before = [parameter.detach().clone() for parameter in agent.grasp_critic.parameters()]
    agent.update(*(both_buffers(tmp_path, real, agent, seed) for seed in (1, 2)), 1)
    assert torch.equal(torch.cat([seen["critic_loss"], seen["grasp_loss"]], 1), seen["all"])
    critics = zip(before, agent.grasp_critic.parameters(), agent.target_grasp_critic.parameters())
    for then, now, target in critics:
        assert not torch.equal(then, now) and torch.allclose(target, then.lerp(now, real.TAU), rtol=0, atol=1e-7)


# --- Interventions ----------------------------------------------------------------------------------------------------
VIEWS = Views(("front",), 2, 1, {"state": (0, 1)})


def frame_buffer(folder: Path, name: str, capacity: int, views: Views) -> real.FrameBuffer:
    return real.FrameBuffer(capacity, views, 2, FrameFile(folder / name, views.frame_shape, CPU))


def steps_of(text: str, first: int, views: Views = VIEWS) -> list[np.ndarray]:
    """Steps whose observation and frame are numbers from `first` on: r reset, p the policy's, h a person's."""
    steps = []
    for number, kind in enumerate(text, first):
        history = [max(number - back, first) for back in range(views.stack - 1, -1, -1)]
        images = np.array(history, np.uint8)[:, None, None, None, None] * np.ones((1, *views.frame_shape), np.uint8)
        obs = {"images": images, "state": np.array(history, np.float32)[:, None]}
        action = None if kind == "r" else np.full(2, number, np.float32)
        step = pack_step(real.robot_step_type(views, 2), action, obs, reward=number)
        step["intervened"] = kind == "h"
        steps.append(step)
    return steps


def contents(buffer: real.FrameBuffer) -> list[tuple]:
    """Of each transition: newest number of the observation, all of its frames, the action, the frame that followed."""
    slots = torch.arange(len(buffer))
    frames = buffer.frames.get(buffer.windows[slots])[..., 0, 0, 0, 0].tolist()  # (N, 2, T)
    columns = (buffer.rows.observations[: len(buffer), -1], buffer.rows.actions[: len(buffer), 0])
    newest, actions = (column.tolist() for column in columns)
    return [(newest[i], frames[i][0], actions[i], frames[i][1][-1]) for i in range(len(buffer))]


def add_to_both(replay: real.FrameBuffer, demos: real.FrameBuffer, step: np.ndarray, actor: str = "a") -> int:
    """As the learner does."""
    real.add_intervention(demos, replay, step, actor)
    return replay.add(step, actor)


def test_interventions_go_to_both_buffers_as_segments_of_their_own(tmp_path):
    replay = frame_buffer(tmp_path, "replay", 20, VIEWS)
    demos = frame_buffer(tmp_path, "demos", 20, VIEWS)
    one, other = steps_of("rpphhphr", 0), steps_of("rhhp", 100)
    order = [*zip("a" * 4, one[:4]), *zip("b" * 2, other[:2]), *zip("a" * 4, one[4:]), *zip("b" * 2, other[2:])]
    assert [add_to_both(replay, demos, step, actor) for actor, step in order] == [0, 1, 1, 1, 0, 1, 1, 1, 1, 0, 1, 1]
    persons = [(2, [2], 3, 3), (100, [100], 101, 101), (3, [3], 4, 4), (5, [5], 6, 6), (101, [101], 102, 102)]
    assert contents(demos) == persons
    assert all(step in contents(replay) for step in persons) and len(replay) == 9
    # A segment goes on from the slot before only where nothing came between; the next one does not.
    assert demos.continues[: len(demos)].tolist() == [False, False, False, False, False]


def test_segments_begin_with_the_history_that_was_seen(tmp_path):
    views = VIEWS._replace(stack=3)
    replay = frame_buffer(tmp_path, "replay", 20, views)
    demos = frame_buffer(tmp_path, "demos", 20, views)
    for step in steps_of("rpppph", 0, views) + steps_of("rh", 50, views):
        add_to_both(replay, demos, step)
    assert contents(demos) == [(4, [2, 3, 4], 5, 5), (50, [50, 50, 50], 51, 51)]


def test_interventions_go_on_in_the_middle_of_a_segment(tmp_path):
    """A learner that is killed goes on from its checkpoint, and its actor sends from there on."""
    steps = steps_of("rpphhhphh", 0)
    replay = frame_buffer(tmp_path, "whole replay", 20, VIEWS)
    expected = frame_buffer(tmp_path, "whole demos", 20, VIEWS)
    for step in steps:
        add_to_both(replay, expected, step)
    assert len(expected) == 5
    for at in range(1, len(steps)):
        before = [frame_buffer(tmp_path, f"{name}{at}", 20, VIEWS) for name in ("replay", "demos")]
        for step in steps[:at]:
            add_to_both(*before, step)
        after = [frame_buffer(tmp_path, f"{name}{at}", 20, VIEWS) for name in ("replay", "demos")]
        for buffer, same in zip(after, before):
            buffer.load_state_dict(same.state_dict())
        for step in steps[at:]:
            add_to_both(*after, step)
        assert contents(after[0]) == contents(replay)
        demos = after[1]
        assert contents(demos) == contents(expected)
        assert torch.equal(demos.continues[:5], expected.continues[:5])


# --- Demonstrations ---------------------------------------------------------------------------------------------------
def record_demos(
    folder: Path, verdicts: list[bool], monkeypatch, config=PEG, gripper: float = 1.0, length=5, motion=0.0
) -> None:
    """hil/demos-v0, without a robot: the state counts steps, the pictures are grey, all motions are the same."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(folder))
    env = envs.make("robot_client:FrankaReal-v0", config=config, max_episode_steps=100)
    about = {"mode": "demos", "classes": 2}
    recording = Recording(dataset_folder("hil/demos-v0", "--dataset"), "hil/demos-v0", env, about)
    space = env.observation_space
    for won in verdicts:
        last = np.arange(length) == length - 1
        observations = {name: np.zeros((length + 1, *space[name].shape), space[name].dtype) for name in space}
        observations["state"][:, 0] = np.arange(length + 1)
        actions = np.zeros((length, *env.action_space.shape), np.float32)
        actions[:, :-1] = motion
        actions[:, -1] = gripper
        fields = {"observations": observations, "actions": actions, "rewards": (last & won).astype(np.float32)}
        fields |= {"terminations": last & won, "truncations": last & (not won), "infos": {"success": last & won}}
        recording.add(fields, {"success": won, "verdict": "success" if won else "failure", "attempt": 0})


def new_run(folder: Path, args: real.Args) -> real.Run:
    args.run_dir = str(folder / "run")
    return real.Run(args, "peg", real.__file__)


def test_demonstrations_are_never_overwritten(tmp_path, monkeypatch):
    record_demos(tmp_path, [True, False, True], monkeypatch)
    args = small_args(total_timesteps=30, buffer_size=10)
    run = new_run(tmp_path, args)
    agent, replay, demos = real.start_learner(args, run, CPU)
    assert len(demos) == 10 and len(agent.probe["images"]) == 1  # of the two successes
    assert demos.rows.rewards[:10].tolist() == [0, 0, 0, 0, 1] * 2
    assert agent.normalizer.waiting == 10
    assert [(buffer.n_step, buffer.gamma) for buffer in (replay, demos)] == [(3, 0.97)] * 2
    demonstrated = demos.rows.observations[:10].clone()
    run.keep(agent=agent, buffer=replay, demos=demos)

    def intervene(count: int) -> None:
        for _ in range(count):
            step = pack_step(agent.step_type, np.zeros(7), some_obs(agent))
            step["intervened"] = True
            add_to_both(replay, demos, step)

    add_to_both(replay, demos, pack_step(agent.step_type, None, some_obs(agent)))
    intervene(20)
    run.writer = None
    run.save()
    run.state = torch.load(run.dir / "checkpoint.pt", weights_only=True)
    agent, replay, demos = real.start_learner(args, run, CPU)  # goes on
    run.keep(agent=agent, buffer=replay, demos=demos)
    intervene(10)
    assert len(replay) == 10 and len(demos) == 40
    assert torch.equal(demos.rows.observations[:10], demonstrated)


@pytest.mark.parametrize(
    ("flags", "demos", "message"),
    [
        ({}, {"verdicts": [False, False]}, "--demos hil/demos-v0: none of its episodes is a success"),
        ({"demos": "20"}, {"verdicts": [True]}, "--demos 20: "),  # the expert's: the learner drives no robot
        ({"demos": "hil/none-v0"}, {"verdicts": [True]}, "--demos hil/none-v0: is not here; `minari list local` shows"),
        (
            {},
            {"verdicts": [True], "config": dataclasses.replace(PEG, hz=20.0)},
            "--demos hil/demos-v0: is of another set-up: hz is 20.0 there, 10.0 here",
        ),
        (
            {},
            {"verdicts": [True], "config": dataclasses.replace(PEG, cameras=PEG.cameras[:1])},
            "--demos hil/demos-v0: is not of this task; its observations are",
        ),
    ],
)
def test_demonstrations_that_teach_nothing_are_refused(tmp_path, monkeypatch, flags, demos, message):
    record_demos(tmp_path, monkeypatch=monkeypatch, **demos)
    args = small_args(**flags)
    with pytest.raises(SystemExit, match=re.escape(message)):
        real.start_learner(args, new_run(tmp_path, args), CPU)


def test_gripper_that_never_closes_is_noticed(tmp_path, monkeypatch, capsys):
    record_demos(tmp_path, [True], monkeypatch, gripper=-1.0)
    args = small_args()
    real.start_learner(args, new_run(tmp_path, args), CPU)
    assert "the gripper is never told to close in them" in capsys.readouterr().err


def test_runs_that_share_a_folder_of_frames_share_no_file(tmp_path):
    """With --role both all learners' folders are called learner."""
    agent = small_agent(frames_dir=str(tmp_path / "fast disk"))
    for name in ("one", "two"):
        run = SimpleNamespace(dir=tmp_path / name / "learner", state=None)
        agent.make_buffer("replay", 10, run, 10)
    files = sorted(path.name for path in (tmp_path / "fast disk").iterdir())
    assert files == ["one-learner-replay.frames", "two-learner-replay.frames"]


def test_weights_that_are_not_finite_reach_neither_robot_nor_checkpoint(tmp_path, monkeypatch):
    """They may come in an update whose loss is still finite."""
    record_demos(tmp_path, [True], monkeypatch)
    args = small_args(role="learner", total_timesteps=120, run_dir=str(tmp_path / "run"))
    agent = small_agent()
    steps = [pack_step(agent.step_type, np.zeros(7) if i else None, some_obs(agent)) for i in range(121)]
    actors = AllAtOnce(steps)
    published = []
    monkeypatch.setattr(actors, "publish", lambda *given, **_: published.append(given), raising=False)
    monkeypatch.setattr(real.link, "Learner", lambda *_: actors)
    monkeypatch.setattr(real.tensors, "set_up_torch", lambda *_: CPU)

    def diverge(self: real.Agent, buffer: real.FrameBuffer, demos: real.FrameBuffer, count: int) -> dict:
        self.critic_updates += count
        self.actor_parameters[0].data.fill_(float("nan"))
        return {"losses/critic_loss": torch.tensor(1e9)}

    monkeypatch.setattr(real.Agent, "update", diverge)
    with contextlib.ExitStack() as stack:
        for number in (signal.SIGINT, signal.SIGTERM):
            stack.callback(signal.signal, number, signal.getsignal(number))
        with pytest.raises(SystemExit, match="training has diverged after 40 updates"):
            real.learner(args)
    assert not published and not (tmp_path / "run" / "checkpoint.pt").exists()


def test_a_learner_that_is_behind_answers(tmp_path, monkeypatch):
    """And asks for nothing, until it has learned from what it has: minutes without an answer would end its actors."""
    record_demos(tmp_path, [True], monkeypatch)
    args = small_args(total_timesteps=80, learning_starts=5, utd_ratio=2, run_dir=str(tmp_path / "run"))
    agent = small_agent()
    steps = [pack_step(agent.step_type, None if i == 0 else np.zeros(7), some_obs(agent, i)) for i in range(81)]
    for step in steps[31:35]:
        step["intervened"] = True
    actors = AllAtOnce(steps)
    monkeypatch.setattr(real.link, "Learner", lambda *_: actors)
    monkeypatch.setattr(real, "UPDATES_AT_ONCE", 10)
    monkeypatch.setattr(real.tensors, "set_up_torch", lambda *_: CPU)
    with contextlib.ExitStack() as stack:
        for number in (signal.SIGINT, signal.SIGTERM):
            stack.callback(signal.signal, number, signal.getsignal(number))
        real.learner(args)
    assert actors.asked == [(100, 80, True)] + [(0, 0, False)] * 14  # 150 updates, 10 at a time
    state = read_checkpoint(tmp_path / "run")
    assert state["agent"]["critic_updates"] == 150 and state["agent"]["normalizer"]["count"] == 5 + 80
    both = zip(*(stored(state, part).values() for part in ("buffer", "demos")))
    assert state["demos"]["total"] == 5 + 4 and all(torch.equal(one[30:34], other[5:]) for one, other in [*both][:-1])


# --- Policies ---------------------------------------------------------------------------------------------------------
def test_policy_is_the_same_after_loading(tmp_path):
    agent, other = small_agent(), small_agent(seed=2)
    agent.probe = {name: torch.from_numpy(value) for name, value in some_obs(agent).items()}
    real.save_policy(agent, 7, tmp_path / "newest.policy")
    assert not np.allclose(agent.act(some_obs(agent, 3), True), other.act(some_obs(agent, 3), True), atol=1e-3)
    assert real.load_policy(other, tmp_path / "newest.policy") == 7
    assert np.array_equal(agent.act(some_obs(agent, 3), True), other.act(some_obs(agent, 3), True))
    saved = torch.load(tmp_path / "newest.policy", weights_only=True)
    stranger = small_agent(seed=3)  # such as an actor that stayed random
    count = len(stranger.actor_parameters)
    saved["tensors"][:count] = [parameter.detach() for parameter in stranger.actor_parameters]
    torch.save(saved, tmp_path / "wrong.policy")
    with pytest.raises(SystemExit, match="the policy answers .* and was saved when it answered"):
        real.load_policy(small_agent(), tmp_path / "wrong.policy")
    with pytest.raises(SystemExit, match="--frame-stack is 1 there, 2 here"):
        real.load_policy(small_agent(frame_stack=2), tmp_path / "newest.policy")
    with pytest.raises(SystemExit, match=r"best.policy: is not there yet; .* best.policy after 20 episodes"):
        real.load_policy(other, tmp_path / "best.policy")


def test_grasp_critic_sees_what_it_is_trained_on():
    """The critics' encoder, also where the average of learned actors acts."""
    agent = small_agent()
    with torch.no_grad():
        for parameter in agent.ema_encoder.parameters():
            parameter.add_(0.1)
    seen = []
    agent.grasp_critic = lambda features: seen.append(features.images) or torch.zeros(1, 3)
    averaged = agent.act(some_obs(agent), deterministic=True)
    agent.act(some_obs(agent), deterministic=False)
    assert torch.equal(seen[0], seen[1])
    mean_features = agent.ema_encoder(agent.one_observation(some_obs(agent)))
    assert not torch.allclose(seen[0], mean_features)
    states = agent.one_observation(some_obs(agent)).states
    mean, _ = agent.ema_actor(real.Features(mean_features, states))
    assert np.allclose(averaged[:6], mean.tanh()[0].detach().numpy(), atol=1e-6)


def test_agent_is_the_same_after_loading():
    agent, other = small_agent(), small_agent(seed=2)
    agent.probe = {name: torch.from_numpy(value) for name, value in some_obs(agent).items()}
    state = agent.state_dict()
    other.load_state_dict(state)
    assert torch.equal(other.answers(), agent.answers())
    with pytest.raises(ValueError, match="the policy answers"):
        small_agent().load_state_dict(state | {"actor": small_agent(seed=3).actor.state_dict()})
    with pytest.raises(ValueError, match="the task is another one: hz is 20"):
        small_agent().load_state_dict(state | {"fingerprint": dataclasses.replace(PEG, hz=20).fingerprint()})
    del state["encoder"]["heads.0.1.0.weight"]  # strictly
    with pytest.raises(RuntimeError, match="Missing key"):
        small_agent().load_state_dict(state)


def test_wilson_interval():
    """Values of Agresti and Coull 1998 and of R's binom.confint(method="wilson")."""
    assert real.wilson(50, 50) == pytest.approx((0.9287, 1.0), abs=1e-4)
    assert real.wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert real.wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert real.wilson(95, 100) == pytest.approx((0.8882, 0.9785), abs=1e-4)


# --- The person -------------------------------------------------------------------------------------------------------
class Desk:
    """A terminal at which somebody types one list of commands after the other, and the robot that stands still."""

    def __init__(self, *typed: list[str]):
        self.typed = list(typed)
        self.terminal = self
        self.still = 0
        self.quit = False
        self.device_fault = ""
        self.run = SimpleNamespace(signals=0, on_signal=self.on_signal)
        self.unwrapped = self

    def command(self) -> str:
        """ "" at the end of each list."""
        command = self.typed[0].pop(0) if self.typed and self.typed[0] else ""
        self.quit |= command == "quit"
        self.typed = self.typed if command else self.typed[1:]
        return command

    def quits(self) -> bool:
        return self.quit or "quit" in sum(self.typed[:1], [])

    def fault(self) -> str:
        return self.device_fault

    wait = real.Person.wait

    def forget(self) -> None:
        self.typed = [[command for command in commands if command in ("pause", "quit")] for commands in self.typed]

    def stand_still(self) -> None:
        self.still += 1

    def on_signal(self) -> None:
        self.run.signals += 1

    def heed(self, ended: bool = False) -> str:
        return real.heed(self, self, ended, partial(real.stop_asked, self.run, self))


def test_verdict_is_heeded_at_once():
    assert Desk([]).heed() == ""
    for verdict in ("success", "failure", "discard"):
        assert Desk(["label", verdict]).heed() == verdict


def test_robot_stands_still_during_a_pause(capsys):
    desk = Desk(["pause"], [], [], ["undo"], ["go on"])
    assert desk.heed() == "" and desk.still == 4
    assert capsys.readouterr().out.count("paused, the robot stands still: Enter goes on") == 1
    desk = Desk(["pause"], [], ["failure"])
    assert desk.heed() == "failure" and desk.still == 2
    desk = Desk(["pause"], ["quit"])
    assert desk.heed() == "" and desk.run.signals == 1


def test_robot_that_fails_does_not_end_a_pause(monkeypatch):
    """Else the next reset moves it, although nobody pressed Enter."""
    monkeypatch.setattr(real.time, "sleep", lambda _: None)
    for last, said in (("go on", ""), ("discard", "discard"), ("quit", "")):
        desk = Desk(["pause"], [], [], [last], ["undo"])
        desk.stand_still = lambda: (_ for _ in ()).throw(rc.RobotError("the server is gone"))
        assert desk.heed() == said
        assert ["undo"] in desk.typed and ["go on"] not in desk.typed and len(desk.typed) <= 2
    assert desk.heed(ended=True) == ""  # without a pause nobody is waited for


def test_device_that_fails_is_a_pause(capsys):
    desk = Desk([], ["go on"], [], ["go on"])
    desk.device_fault = "SpaceMouse: unplugged"

    def stand_still() -> None:
        desk.still += 1
        desk.device_fault = "" if desk.still == 3 else desk.device_fault

    desk.stand_still = stand_still
    assert desk.heed() == "" and desk.still == 3
    said = "\rSpaceMouse: unplugged: paused, Enter goes on, y n x end the episode\n"
    assert capsys.readouterr().out == 2 * said  # as long as it fails


def test_device_that_fails_without_a_terminal_ends_the_run():
    person = real.Person(small_args(), "none")
    person.teleop = SimpleNamespace(fault="SpaceMouse: unplugged")
    with pytest.raises(rc.RobotError, match="SpaceMouse: unplugged"):
        person.fault()
    person.terminal = SimpleNamespace(fault="")
    assert person.fault() == "SpaceMouse: unplugged"
    person.terminal.fault = "keyboard: the terminal was closed"
    with pytest.raises(rc.RobotError, match="the terminal was closed"):
        person.fault()
    person.terminal = None
    person.scripted = True  # the step says what is wrong with the robot
    assert person.fault() == ""


@pytest.fixture
def keyboard(monkeypatch):
    """What a person's terminal would be; `type` waits until the keys have been read."""
    ours, theirs = os.openpty()
    terminal = rc.Terminal(theirs)

    def type_keys(keys: str) -> None:
        terminal._typed.clear()
        os.write(ours, keys.encode())
        wait_until(lambda: keys[-1] in terminal._typed, 5)

    terminal.type = type_keys
    monkeypatch.setattr(rc, "Terminal", lambda: terminal)
    yield terminal
    terminal.close()
    os.close(ours)
    os.close(theirs)


def test_keys_after_a_verdict_are_not_lost(keyboard, capsys):
    person = real.Person(small_args(), "keyboard")
    desk = Desk()
    heed = partial(real.heed, person, desk, False, partial(real.stop_asked, desk.run, person))
    keyboard.type("yq")
    assert heed() == "success" and desk.run.signals == 0
    assert heed() == "" and desk.run.signals == 1 and person.quits()  # it is remembered
    person = real.Person(small_args(), "keyboard")
    keyboard.type("np")
    assert heed.func(person, desk, False, person.quits) == "failure"
    person.forget()  # the next reset
    capsys.readouterr()
    still = desk.stand_still

    def go_on() -> None:
        still()
        keyboard.type("\n")

    desk.stand_still = go_on
    assert heed.func(person, desk, False, person.quits) == "" and desk.still == 1
    assert "paused, the robot stands still" in capsys.readouterr().out


def test_keys_that_have_an_effect_are_shown(keyboard, capsys):
    real.Person(small_args(), "keyboard")
    shown = capsys.readouterr().out
    assert "w s  forward, back" in shown and "space  take over" in shown
    assert real.VERDICT_KEYS.removeprefix("keys: ") in shown
    assert "undo" not in shown and "label" not in shown and shown.count("success") == 1


def test_keys_that_the_wrapper_throws_away_are_named(keyboard, capsys):
    person = real.Person(small_args(), "keyboard")
    env = rc.Intervention(gym.Env(), person.teleop)
    env.env.reset = lambda **_: (None, {})
    keyboard.type("wyp")
    capsys.readouterr()
    env.reset()
    person.forget()
    assert capsys.readouterr().out == "\rpressed during the reset, so without effect: success\n"
    assert not person.teleop.motion()[0].any() and person.command() == "pause"


def test_verdicts_need_somebody_who_gives_them(monkeypatch):
    for teleop in ("none", "scripted"):
        with pytest.raises(SystemExit, match="--reward person: nobody is there, standard input is no terminal"):
            real.Person(small_args(reward="person"), teleop)
    monkeypatch.setattr(rc, "Terminal", lambda: "a terminal")
    monkeypatch.setattr(real.sys, "stdin", SimpleNamespace(isatty=lambda: True))
    assert real.Person(small_args(reward="person"), "none").terminal == "a terminal"


def test_end_of_an_episode_may_be_overruled(monkeypatch):
    monkeypatch.setattr(real, "OVERRULE_S", 0.2)
    desk = Desk([], [], ["failure"])
    assert desk.heed(ended=True) == "failure" and desk.still == 2
    desk = Desk()
    desk.stand_still = lambda: time.sleep(0.02)
    start = time.monotonic()
    assert desk.heed(ended=True) == "" and 0.2 <= time.monotonic() - start < 2
    desk.terminal = None  # nobody is there
    assert desk.heed(ended=True) == "" and time.monotonic() - start < 2


def test_keys_that_a_reset_throws_away_are_named(monkeypatch, capsys):
    person = real.Person(small_args(), "none")
    person.terminal = SimpleNamespace(forget=lambda: ["success", "undo"])
    person.forget()
    assert capsys.readouterr().out == "\rpressed during the reset, so without effect: success, undo\n"
    person.terminal.forget = list
    person.forget()
    assert capsys.readouterr().out == ""


class Learner:
    """It answers the third time."""

    address = "127.0.0.1:5588"
    done = False
    answered = 0.0
    held = 7
    journal = SimpleNamespace(written=7)
    waiting = True
    times = 0

    def exchange(self, wait_ms: int) -> None:
        self.times += 1
        self.answered = time.monotonic() if self.times == 3 else 0.0


def test_learner_that_is_waited_for_is_named(monkeypatch, capsys):
    desk = Desk()
    child = SimpleNamespace(log=Path("run/learner.log"), finished=lambda: False)
    for beside, patience, said in (
        (None, -1.0, "\rwaiting for the learner, at 127.0.0.1:5588 (with the same --curve-keys?)\n"),
        (child, -1.0, "\rwaiting for the learner, see run/learner.log\n"),
        (None, 60.0, ""),
    ):
        monkeypatch.setattr(real, "WAITS_S", patience)
        learner = Learner()
        real.catch_up(desk.run, learner, desk, beside)
        assert learner.times == 3 and capsys.readouterr().out == said


class Way:
    """A robot on its way to the start of an episode: it asks five times whether that is given up."""

    def __init__(self, desk: Desk, pressed: list[str]):
        self.desk = desk
        self.pressed = pressed  # at the third time
        self.asked = 0
        self.unwrapped = SimpleNamespace(episodes=0, stand_still=desk.stand_still)

    def reset(self, seed: int, options: dict) -> tuple[dict, dict]:
        for _ in range(5):
            self.asked += 1
            if self.asked == 3:
                self.desk.typed.append(self.pressed)
            if options["give_up"]():
                raise rc.RobotError("the reset was given up, the arm holds")
        return {"seed": seed}, {}


def test_quit_ends_a_reset_on_its_way():
    desk = Desk()
    way = Way(desk, ["success", "quit"])
    assert real.reset_robot(way, 1, desk, partial(real.stop_asked, desk.run, desk)) is None
    assert way.asked == 3 and desk.run.signals == 1  # as Ctrl-C, once
    desk = Desk()
    way = Way(desk, ["quit"])
    assert real.reset_robot(way, 1, desk, desk.quits) is None and way.asked == 3  # an evaluation


def test_verdict_during_a_reset_has_no_effect():
    desk = Desk()
    way = Way(desk, ["success"])
    assert real.reset_robot(way, 7, desk, partial(real.stop_asked, desk.run, desk)) == {"seed": 7}
    assert way.asked == 5 and desk.command() == "" and desk.run.signals == 0


def test_pause_during_a_reset_begins_before_the_first_step():
    for after, obs in ((["go on"], {"seed": 7}), (["quit"], None)):
        desk = Desk()
        way = Way(desk, ["success", "pause"])
        still = desk.stand_still

        def stand_still(desk=desk, after=after, still=still) -> None:
            still()
            if desk.still == 3:
                desk.typed.append(after)

        way.unwrapped.stand_still = stand_still
        assert real.reset_robot(way, 7, desk, desk.quits) == obs and desk.still == 3


def test_pause_before_a_reset_keeps_the_robot_where_it_is(monkeypatch):
    asked = []
    desk = Desk(["failure", "pause"], [], [], ["go on"])
    way = Way(desk, [])
    monkeypatch.setattr(desk, "stand_still", lambda: asked.append(way.asked))
    way.unwrapped.stand_still = desk.stand_still
    assert real.reset_robot(way, 7, desk, desk.quits) == {"seed": 7}
    assert asked == [0, 0, 0] and way.asked == 5


class Stopped(Way):
    """A person stops this robot on its way, at the first two times."""

    times = 0

    def reset(self, seed: int, options: dict) -> tuple[dict, dict]:
        self.times += 1
        if self.times < 3:
            raise rc.StoppedError("held: a client asked to hold; start again")
        return {"seed": seed}, {}


def test_who_stopped_the_robot_is_asked_before_it_moves_again(monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(real.time, "sleep", waited.append)
    desk = Desk([], ["success"], ["go on"], [], ["go on"])
    assert real.reset_robot(Stopped(desk, []), 7, desk, desk.quits) == {"seed": 7}
    assert len(waited) > 2 and set(waited) == {0.1}  # not for "success"
    said = "held: a client asked to hold; start again: a person stopped the robot; call reset() again when it may move"
    assert capsys.readouterr().out == f"\r{said}; Enter goes on\n" * 2
    desk = Desk([], [], ["quit"])
    way = Stopped(desk, [])
    assert real.reset_robot(way, 7, desk, desk.quits) is None and way.times == 1
    desk = Desk()
    desk.terminal = None  # nobody can press Enter
    with pytest.raises(rc.StoppedError, match="a person stopped the robot"):
        real.reset_robot(Stopped(desk, []), 7, desk, desk.quits)


def test_gains_that_the_server_will_never_take_are_not_waited_for():
    desk = Desk([])

    def reset(**_) -> None:
        raise rc.RefusedError("clip 0.01 0.01 0.01: give 0.0001 to 0.002", "bad_argument")

    way = SimpleNamespace(unwrapped=SimpleNamespace(episodes=0), reset=reset)
    with pytest.raises(rc.RefusedError, match="bad_argument: clip"):
        real.reset_robot(way, 7, desk, lambda: False)


def test_scripted_person_helps_ever_less(monkeypatch):
    person = real.Person(small_args(help_until=100), "scripted")
    for step, least, most in ((0, 200, 200), (50, 70, 130), (100, 0, 0), (200, 0, 0)):
        helped = 0
        for _ in range(200):
            person.begin(step)
            probabilities = []
            for t in range(40):
                person.watch(t)
                probabilities.append(person.teleop.probability)
            start = 40 - int(sum(probabilities))
            assert probabilities == [0.0] * start + [1.0] * (40 - start)  # to the end
            assert 20 <= start <= 30 or start == 40
            helped += start < 40
        assert least <= helped <= most
    monkeypatch.setattr(real, "WRONG_KEY_PROB", 0.5)
    keys = [person.command() for _ in range(100)]
    assert 20 < sum(map(bool, keys)) < 80 and set(keys) == {"", "failure", "discard"}
    person = real.Person(small_args(help_until=0), "scripted")
    person.begin(0)
    assert person.helps_after == float("inf")


# --- Episodes ---------------------------------------------------------------------------------------------------------
class Robot:
    """Three steps without anything, then one with `last`: reward, terminated, truncated, what differs in the info."""

    def __init__(self, agent: real.Agent, last: tuple):
        self.agent, self.last, self.steps = agent, last, 0
        self.unwrapped = SimpleNamespace(stand_still=lambda: None)

    def step(self, action: np.ndarray) -> tuple:
        self.steps += 1
        info = {"success": False, "fault": None, "grasp_penalty": 0.0, "period_s": 0.1, "late_s": 0.0}
        info |= {"executed_action": action / 2, "asked_action": action, "intervened": self.steps == 2}
        outcome = (0.0, False, False)
        if self.steps == 4:
            *outcome, special = self.last
            info |= special
        return some_obs(self.agent, self.steps), *outcome, info


SUCCESS = (1.0, True, False, {"success": True, "grasp_penalty": -0.02})
FAULT = {"fault": "camera front: newest picture is 0.4 s old"}


@pytest.mark.parametrize(
    ("last", "said", "verdict", "reward", "terminated"),
    [
        (SUCCESS, [], "success", 0.98, True),  # decided before the penalty
        (SUCCESS, ["failure"], "failure", -0.02, False),
        (SUCCESS, ["discard"], "discard", 0.98, True),
        ((0.0, False, True, {}), [], "time limit", 0.0, False),
        ((0.0, False, True, {}), ["success"], "success", 1.0, True),
        ((0.0, False, False, {}), ["failure"], "failure", 0.0, False),
        ((0.0, True, False, FAULT | {"fault": "reflex"}), [], "failure", 0.0, True),
        ((0.0, False, True, FAULT), [], "fault", None, None),  # what follows the action was not seen
        ((0.0, False, True, FAULT), ["success"], "success", None, None),
        ((0.0, False, True, FAULT), ["failure"], "failure", None, None),
    ],
)
def test_what_an_episode_leaves(last, said, verdict, reward, terminated):
    agent = small_agent()
    sent: list[bytes] = []
    policy = SimpleNamespace(agent=agent, sender=SimpleNamespace(stage=sent.append), take=lambda: None)
    policy.act = lambda obs: np.full(7, 0.5, np.float32)
    person = SimpleNamespace(terminal=None, paused=False, watch=lambda t: None, fault=str, quits=bool)
    robot = Robot(agent, last)
    keys = list(said)
    person.command = lambda: keys.pop() if keys and robot.steps == 4 else ""
    run = SimpleNamespace(step=0, signals=0, advance=lambda: None)
    steps, got, _ = real.episode(run, robot, policy, person, some_obs(agent))
    stored = np.frombuffer(b"".join(sent), agent.step_type)
    assert got == verdict and len(steps) == 4
    assert stored["first"].tolist() == [True] + [False] * (len(stored) - 1)
    assert stored["intervened"][:4].tolist() == [False, False, True, False]
    assert (stored["action"][1:4] == 0.25).all()  # as it was executed
    assert np.array_equal(stored["observation"][2], some_obs(agent, 2)["state"][0])
    if reward is None:
        assert len(stored) == 4
    else:
        assert len(stored) == 5
        assert stored["reward"].tolist() == pytest.approx([0, 0, 0, 0, reward])
        assert stored["terminated"].tolist() == [False] * 4 + [terminated]


def test_standing_still_is_no_demonstration():
    """A person keeps control for a moment after the last motion; policies are not to imitate that."""
    agent = small_agent()
    sent: list[bytes] = []
    policy = SimpleNamespace(agent=agent, sender=SimpleNamespace(stage=sent.append), take=lambda: None)
    policy.act = lambda obs: np.zeros(7, np.float32)
    robot = Robot(agent, (0.0, False, True, {}))
    run = SimpleNamespace(step=0, signals=0, advance=lambda: None)
    person = SimpleNamespace(terminal=None, paused=False, watch=lambda t: None, command=str, fault=str, quits=bool)
    steps, _, _ = real.episode(run, robot, policy, person, some_obs(agent))
    assert [step.intervened for step in steps] == [False, True, False, False]
    assert not np.frombuffer(b"".join(sent), agent.step_type)["intervened"].any()


def test_what_a_reflex_ended_is_no_demonstration():
    """It may be the policy's: the last motion before a person took over, when the reflex came between the two."""
    agent = small_agent()
    sent: list[bytes] = []
    policy = SimpleNamespace(agent=agent, sender=SimpleNamespace(stage=sent.append), take=lambda: None)
    policy.act = lambda obs: np.full(7, 0.5, np.float32)
    robot = Robot(agent, (0.0, True, False, {"fault": "reflex", "intervened": True}))
    run = SimpleNamespace(step=0, signals=0, advance=lambda: None)
    person = SimpleNamespace(terminal=None, paused=False, watch=lambda t: None, command=str, fault=str, quits=bool)
    steps, verdict, _ = real.episode(run, robot, policy, person, some_obs(agent))
    stored = np.frombuffer(b"".join(sent), agent.step_type)
    assert verdict == "failure" and [step.intervened for step in steps] == [False, True, False, True]
    assert stored["intervened"].tolist() == [False, False, True, False, False] and stored["terminated"][-1]


def test_after_a_pause_the_robot_only_looks():
    """A person may have changed the scene: no policy acts on what was seen before, none learns from it."""
    agent = small_agent()
    sent: list[bytes] = []
    acted_on: list[float] = []
    policy = SimpleNamespace(agent=agent, sender=SimpleNamespace(stage=sent.append), take=lambda: None)
    policy.act = lambda obs: acted_on.append(obs["state"][0, 0]) or np.full(7, 0.5, np.float32)
    robot = Robot(agent, (0.0, False, True, {}))
    person = SimpleNamespace(terminal=None, paused=False, watch=lambda t: None, fault=str, quits=bool)
    keys = ["go on", "", "pause"]
    person.command = lambda: keys.pop() if keys and robot.steps == 2 else ""
    run = SimpleNamespace(step=0, signals=0, advance=lambda: None)
    _, verdict, _ = real.episode(run, robot, policy, person, some_obs(agent))
    stored = np.frombuffer(b"".join(sent), agent.step_type)
    assert verdict == "time limit" and not keys
    assert acted_on == [some_obs(agent, number)["state"][0, 0] for number in (0, 1, 3)]
    assert stored["first"].tolist() == [True, False, False, True, False]
    assert stored["action"][:, 0].tolist() == [0, 0.25, 0.25, 0, 0.25]
    for number, observation in enumerate(stored["observation"]):
        assert np.array_equal(observation, some_obs(agent, number)["state"][0])


def test_status_line_says_what_is_logged(capsys):
    agent = small_agent()
    rows: list[dict] = []
    log = real.Log(SimpleNamespace(episode=4, log=lambda table, scalars: rows.append(scalars)), None)
    action = np.zeros(7, np.float32)

    def steps(helped: int) -> list[real.Step]:
        kinds = [k < helped for k in range(10)]
        return [real.Step(action, action, 0.1, False, kind, False, 0.1, 0.002 + 0.002 * kind) for kind in kinds]

    log.add("fault", steps(0), agent, 0, float("nan"))
    assert capsys.readouterr().out == (
        "\repisode 4 fault | return 1.00 in 10 steps | without help 0 of 0 | helped - | updates 0.00 | late 0, p99 "
        "2.0 ms | no weights yet | replay 0, demos 0 | overruled 0\n"
    )
    log.add("failure", steps(0), agent, 0, float("nan"))
    log.add("success", steps(0), agent, 0, float("nan"))
    capsys.readouterr()
    agent.counts.copy_(torch.tensor([50, 40, 30]))
    log.disagreements = 1
    log.add("success", steps(5), agent, 100, 3.4)
    assert capsys.readouterr().out == (
        "\repisode 4 success | return 1.00 in 10 steps | without help 1 of 2 | helped 17% | updates 2.00 | late 5, p99 "
        "4.0 ms | weights 3 s old | replay 40, demos 30 | overruled 1\n"
    )
    assert rows[0]["charts/weights_age_s"] != rows[0]["charts/weights_age_s"]  # NaN: there are none
    expected = {"episodic_return": 1, "episodic_length": 10, "success": 1, "success_without_help": 0.5}
    expected |= {"intervention_rate": 0.5 / 3, "updates_per_transition": 2, "disagreements": 1, "replay": 40}
    expected |= {"demonstrations": 30, "weights_age_s": 3.4}
    row = {name.removeprefix("charts/"): value for name, value in rows[-1].items() if name.startswith("charts/")}
    assert row == pytest.approx(expected)
    times = {name.removeprefix("time/"): value for name, value in rows[-1].items() if name.startswith("time/")}
    assert times == pytest.approx({"late_steps": 5, "late_p99_ms": 4, "cycle_s": 1})


def test_best_policy_is_of_an_episode_that_says_so():
    """Of the last 20 without help; not of one that a person helped in, or that does not count."""
    agent = small_agent()
    log = real.Log(SimpleNamespace(episode=4, log=lambda *_: None), None)
    action = np.zeros(7, np.float32)
    alone, helped = ([real.Step(action, action, 0.0, False, kind, False, 0.1, 0.0)] for kind in (False, True))
    assert not any(log.add("success", alone, agent, 1, 0.0) for _ in range(real.RECENT - 1))
    assert not log.add("success", helped, agent, 1, 0.0)
    assert not log.add("discard", alone, agent, 1, 0.0)
    assert log.add("failure", alone, agent, 1, 0.0) and log.best == 0.95
    assert not log.add("success", helped, agent, 1, 0.0) and not log.add("fault", alone, agent, 1, 0.0)
    assert not log.add("failure", alone, agent, 1, 0.0)  # worse
    assert log.best == 0.95


class Collector:
    """What `collect` needs of a learner that has what it asked for; its last policy comes when the child has ended."""

    def __init__(self):
        self.weights_of = small_agent(seed=2)
        self.done = True
        self.number = 0
        self.journal = SimpleNamespace(written=0)
        self.newer: list[tuple] = []
        self.process = self

    def wait(self) -> None:
        self.newer.append((9, tensors.pack_tensors(self.weights_of.policy_tensors())))

    def weights(self) -> tuple | None:
        return self.newer.pop() if self.newer else None


def test_last_policy_is_saved_also_when_no_episode_was_needed(tmp_path):
    args = small_args()
    env = real.wrap_env(real.make_env(args), args)
    collector = Collector()
    agent = small_agent()
    policy = real.Newest(agent, collector, tmp_path / "newest.policy")
    log = SimpleNamespace(run=SimpleNamespace(signals=0), task=None)
    real.collect(args, log, env, policy, Desk(), collector)
    other = small_agent(seed=3)
    assert real.load_policy(other, tmp_path / "newest.policy") == 9
    obs = some_obs(agent)
    assert np.array_equal(other.act(obs, True), collector.weights_of.act(obs, True))


def test_motions_are_random_until_there_are_weights_and_then_explore(tmp_path):
    agent, collector = small_agent(), Collector()
    agent.act = lambda obs, deterministic: "the mode" if deterministic else "a sample"
    agent.random_action = lambda: "random"
    policy = real.Newest(agent, collector, tmp_path / "newest.policy")
    policy.take()
    assert policy.act({}) == "random"
    collector.wait()
    policy.take()
    assert policy.act({}) == "a sample"


def test_run_that_still_runs_is_not_gone_on_with(tmp_path, monkeypatch):
    """It says so before a second learner waits for the first one's end."""
    args = small_args(teleop="none")
    new_run(tmp_path, args)
    args.resume = args.run_dir
    monkeypatch.setattr(rc, "check_server", lambda *_: None)
    monkeypatch.setattr(real, "learner_beside", lambda *_: pytest.fail("a learner was started"))
    with (
        held_elsewhere(tmp_path / "run" / "run.lock") as pid,
        pytest.raises(SystemExit, match=f"process {pid} works there; end that one first"),
    ):
        real.actor(args)


def test_actor_and_learner_agree_about_the_grippers_penalty(tmp_path, monkeypatch):
    """It is in the actor's rewards, and in those that the learner gives demonstrations; not in what a policy is."""
    record_demos(tmp_path, [True], monkeypatch)
    hellos: list[dict] = []

    def tell(address: str, keys: str | None, hello: dict, *_, **__) -> None:
        hellos.append(hello)
        raise SystemExit

    for name in ("Learner", "Actor"):
        monkeypatch.setattr(real.link, name, tell)
    monkeypatch.setattr(rc, "check_server", lambda *_: None)
    monkeypatch.setattr(real.tensors, "set_up_torch", lambda *_: CPU)
    for number, (role, penalty) in enumerate([("learner", 0.1), ("actor", 0.1), ("actor", 0.02)]):
        args = small_args(role=role, teleop="none", gripper_penalty=penalty, run_dir=str(tmp_path / str(number)))
        with pytest.raises(SystemExit):
            getattr(real, role)(args)
    assert hellos[0] == hellos[1] != hellos[2]
    assert small_args(gripper_penalty=0.1).shared() == small_args(gripper_penalty=0.02).shared()


def test_actor_compiles_nothing(tmp_path, monkeypatch):
    """On a GPU the first policy's first step would take so long that the robot's lease ends."""
    args = small_args(teleop="none", role="actor", run_dir=str(tmp_path / "run"))
    agents: list[real.Agent] = []
    monkeypatch.setattr(rc, "check_server", lambda *_: None)
    monkeypatch.setattr(real, "collect", lambda args, log, env, policy, *_: agents.append(policy.agent))
    with contextlib.ExitStack() as stack:
        for number in (signal.SIGINT, signal.SIGTERM):
            stack.callback(signal.signal, number, signal.getsignal(number))
        real.actor(args)
    assert args.compile and not agents[0].args.compile


# --- Evaluation -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["--resume", "--eval-only"])
def test_another_judge_of_success_may_take_over(tmp_path, kind):
    """A classifier that was taught more; in an evaluation the task's own word, or a person's."""
    saved = dataclasses.asdict(small_args(reward="pose", task="pick"))
    (tmp_path / "args.json").write_text(json.dumps(saved))
    parse = partial(setup.parse, real.Args, real.__doc__, real.Args.MAY_CHANGE)
    assert parse([kind, str(tmp_path)]).reward == "pose"
    assert parse([kind, str(tmp_path), "--reward", "task"]).reward == "task"
    (tmp_path / "args.json").write_text(json.dumps(saved | {"reward": "classifier that was.pt"}))
    assert parse([kind, str(tmp_path), "--reward", "task"]).reward == "task"
    with pytest.raises(SystemExit, match="--reward classifier that was.pt: no such file; give task, pose, person"):
        real.with_classifier(None, parse([kind, str(tmp_path)]))
    with pytest.raises(SystemExit, match=f"--task: {tmp_path} has pick; leave the flag out"):
        parse([kind, str(tmp_path), "--task", "peg"])


def test_stopped_evaluation_keeps_what_has_ended(tmp_path, monkeypatch, capsys):
    outcomes = [real.Outcome("success", 2.0, True), real.Outcome("discard", 1.0, False)]
    outcomes.append(real.Outcome("failure", 3.0, True))

    def evaluate_episode(*_):
        if not outcomes:
            raise KeyboardInterrupt
        if len(outcomes) < 3:  # after each episode: a crash loses nothing
            assert (tmp_path / "evaluation_newest.csv").read_text().count("\n") == 2
        return outcomes.pop(0)

    monkeypatch.setattr(real, "evaluate_episode", evaluate_episode)
    monkeypatch.setattr(real.rc, "check_server", lambda *_: None)
    monkeypatch.setattr(real, "load_policy", lambda *_: 7)
    real.main(small_args(eval_only=str(tmp_path), capture_video=False))
    assert (tmp_path / "evaluation_newest.csv").read_text() == (
        "episode,success,cycle_s,suggested\n0,1,2.000,1\n1,0,3.000,1\n"
    )
    output = capsys.readouterr().out
    assert "stopped: what has ended counts" in output and "success 1 of 2, 95% 0.09 to 0.91" in output
    assert "cycle time 2.0 s on average" in output
    assert "--reward task against the verdicts: 1 false successes, 0 missed" in output
    with pytest.raises(SystemExit, match="no episode has ended, so nothing is written"):
        real.main(small_args(eval_only=str(tmp_path), capture_video=False))
    assert (tmp_path / "evaluation_newest.csv").read_text().count("\n") == 3


def test_evaluation_that_faults_again_and_again_asks(tmp_path, monkeypatch):
    """As resets do: an episode is not tried without end. Faults that are not one after the other are only repeated."""
    kinds = ["success", "fault", "fault", "discard", "fault", "fault", "failure", "fault", "fault", "fault", "success"]
    outcomes = [real.Outcome(kind, 1.0, False) for kind in kinds]
    asked: list[tuple] = []
    monkeypatch.setattr(real, "evaluate_episode", lambda *_: outcomes.pop(0))
    monkeypatch.setattr(real.rc, "check_server", lambda *_: None)
    monkeypatch.setattr(real, "load_policy", lambda *_: 7)
    evaluate = partial(real.main, small_args(eval_only=str(tmp_path), capture_video=False, final_eval_episodes=3))
    with monkeypatch.context() as attended:
        attended.setattr(real.Person, "wait", lambda _, error, ends: asked.append((str(error), len(outcomes))))
        evaluate()
    assert asked == [("three faults in episode 2: remove their cause", 1)] and not outcomes
    rows = (tmp_path / "evaluation_newest.csv").read_text().splitlines()
    assert rows[1:] == ["0,1,1.000,0", "1,0,1.000,0", "2,1,1.000,0"]
    outcomes += [real.Outcome("fault", 1.0, False)] * 9
    with pytest.raises(
        SystemExit, match="three faults in episode 0: remove their cause; then run the same command again"
    ):
        evaluate()  # nobody is there
    assert len(outcomes) == 6


def test_fault_in_an_evaluation_is_named(capsys):
    agent = small_agent()
    obs = some_obs(agent)
    info = {"success": False, "period_s": 0.1, "fault": "camera front: newest picture is 0.4 s old"}
    env = SimpleNamespace(
        reset=lambda **_: (obs, {}),
        step=lambda action: (obs, 0.0, False, True, info),
        unwrapped=SimpleNamespace(episodes=1),
    )
    outcome = real.evaluate_episode(agent, env, 1, real.Person(small_args(), "none"), [])
    assert outcome == ("fault", 0.1, False)
    assert capsys.readouterr().err == "the episode was ended: camera front: newest picture is 0.4 s old\n"
    env.step = lambda action: (obs, 0.0, True, False, info | {"fault": "reflex"})  # the policy ran into something
    outcome = real.evaluate_episode(agent, env, 1, real.Person(small_args(), "none"), [])
    assert outcome == ("failure", 0.1, False)
    assert capsys.readouterr().err == "the episode was ended: reflex\n"


def test_pause_in_an_evaluation_ends_with_a_look(monkeypatch):
    monkeypatch.setattr(real, "OVERRULE_S", 0.0)
    agent = small_agent()
    agent.act = lambda obs, deterministic: np.full(7, float(deterministic))
    obs = some_obs(agent)
    still = []
    info = {"success": False, "period_s": 0.1, "fault": None}

    def step(action: np.ndarray) -> tuple:
        still.append(not action.any())
        return obs, 0.0, False, len(still) == 5, info

    env = SimpleNamespace(reset=lambda **_: (obs, {}), step=step)
    desk = Desk([], ["pause"], [], ["go on"], [], ["pause"], ["go on"])  # during the reset, then after two steps
    desk.forget = lambda: None
    env.unwrapped = SimpleNamespace(episodes=1, stand_still=desk.stand_still)
    assert real.evaluate_episode(agent, env, 1, desk, []).verdict == "failure"
    assert still == [True, False, True, False, False] and desk.still == 3


def test_person_may_overrule_the_classifier_in_an_evaluation(monkeypatch):
    """Else no false success would ever be counted: the classifier's success ends the episode."""
    agent = small_agent()
    obs = some_obs(agent)
    info = {"success": True, "period_s": 0.1, "fault": None}
    for typed, verdict in (
        ([[], [], [], ["failure"]], "failure"),
        ([], "success"),
        ([[], [], [], ["quit"]], "quit"),
    ):
        monkeypatch.setattr(real, "OVERRULE_S", 0.05)
        desk = Desk(*typed)
        env = SimpleNamespace(
            reset=lambda **_: (obs, {}),
            step=lambda action: (obs, 1.0, True, False, info),
            unwrapped=SimpleNamespace(episodes=1, stand_still=lambda: time.sleep(0.001)),
        )
        desk.forget = lambda: None
        assert real.evaluate_episode(agent, env, 1, desk, []) == (verdict, 0.1, True)


def test_disagreements_become_data_of_the_classifier(tmp_path):
    import reward_classifier
    from common.success import SuccessClassifier, SuccessDetector

    env = real.make_env(small_args())
    detector = SuccessDetector(SuccessClassifier(("front", "wrist"), 128), 0.5, 1, recording.fingerprint(env), {})
    torch.save(detector.contents(), tmp_path / "classifier.pt")
    args = small_args(reward=str(tmp_path / "classifier.pt"))
    task = Recorder(real.with_classifier(real.make_env(args), args))
    run = SimpleNamespace(dir=tmp_path / "run", episode=5)
    run.dir.mkdir()
    log = real.Log(run, task)
    for verdict, length in (("failure", 6), ("success", 8)):
        frames = np.zeros((length + 1, 128, 128, 3), np.uint8)
        task.observations = [
            {"front": frame, "wrist": frame, "state": np.full(20, t, np.float32)} for t, frame in enumerate(frames)
        ]
        action = np.zeros(7, np.float32)
        steps = [real.Step(action, action, 0.0, False, False, verdict == "failure", 0.1, 0.0)] * length
        log.record_disagreement(steps, verdict)
    clips = reward_classifier.recorded_clips("--add", str(run.dir), detector.classifier, detector.fingerprint)
    assert [len(clip.labels) for clip in clips] == [7, 9]
    assert [int(clip.labels.max()) for clip in clips] == [0, 1] and all(clip.added for clip in clips)


def test_success_is_what_the_flag_says(tmp_path):
    """Demonstrations of the scripted expert end in the simulated task's success, not at a pose."""
    for reward, config in (("task", "task"), ("pose", "pose"), ("person", "none"), (str(tmp_path), "none")):
        assert real.make_env(small_args(reward=reward)).unwrapped.config.reward == config


# --- Bad input --------------------------------------------------------------------------------------------------------
def refusal(folder: Path, *flags: object, **options) -> str:
    return one_line(run_script("sac_pixel_real.py", *flags, cwd=folder, check=False, **options), "sac_pixel_real.py")


def test_wrong_flags_are_refused(tmp_path):
    for flags, message in (
        (("--task", "pig"), "--task pig: there are peg, pick"),
        (("--reward", "none.pt"), "--reward none.pt: no such file"),
        (("--reward", "person", "--teleop", "none"), "--reward person: nobody is there"),
        (("--eval-only", "nowhere"), "--eval-only nowhere: no run of this script"),
        (("--num-min-qs", 3), "--num-min-qs 3: there are only"),
        (("--total-timesteps", 100), "--total-timesteps 100: learning starts after 100; give more"),
    ):
        argv = list(map(str, flags))
        with contextlib.chdir(tmp_path), pytest.raises(SystemExit, match=re.escape(message)):
            real.main(real.parse(real.Args, real.__doc__, real.Args.MAY_CHANGE, argv))
    assert not (tmp_path / "runs").exists()


def test_hands_that_are_absent_are_one_line(tmp_path):
    assert "keyboard: standard input is no terminal" in refusal(tmp_path)
    line = refusal(tmp_path, "--teleop", "spacemouse")
    assert not (tmp_path / "runs").exists()
    assert "SpaceMouse: " in line and "that are plugged in: " in line and 'ATTRS{idVendor}=="256f"' in line


def test_classifier_of_other_cameras_is_refused(tmp_path):
    from common.success import SuccessClassifier, SuccessDetector

    for cameras, message in ((("side",), "cameras"), (("front",), "")):
        fingerprint = PEG.fingerprint()
        fingerprint["cameras"] = [fingerprint["cameras"][0] | {"name": cameras[0]}]
        detector = SuccessDetector(SuccessClassifier(cameras, 128), 0.5, 1, fingerprint, {})
        torch.save(detector.contents(), tmp_path / "classifier.pt")
        args = small_args(reward=str(tmp_path / "classifier.pt"))
        if message:
            with pytest.raises(SystemExit, match="--reward .*classifier.pt: was trained on other pictures: .*side"):
                real.with_classifier(real.make_env(args), args)
        else:
            assert isinstance(real.with_classifier(real.make_env(args), args), real.SuccessReward)


def test_server_that_does_not_run_is_one_line(tmp_path, monkeypatch):
    line = refusal(tmp_path, "--teleop", "none", "--server", "tcp://127.0.0.1:9")  # before there is a run
    assert "--server: no answer from tcp://127.0.0.1:9 " in line and "is robot_server.py running there" in line
    assert not (tmp_path / "runs").exists()
    monkeypatch.setitem(rc.TASKS, "peg", dataclasses.replace(PEG, wait_s=0.5))
    args = small_args(teleop="none", server="tcp://127.0.0.1:9", run_dir=str(tmp_path / "run"))
    env = real.wrap_env(real.make_env(args), args)
    with pytest.raises(rc.UnreachableError, match=r"no answer from tcp://127.0.0.1:9 .*is robot_server\.py running"):
        real.reset_robot(env, 1, Desk(), ends=lambda: False)
    env.unwrapped.episodes = 1  # it was there: it is waited for, until the run is to end
    waited = []
    monkeypatch.setattr(real.time, "sleep", waited.append)
    assert real.reset_robot(env, 1, Desk(), ends=lambda: len(waited) > 0) is None


# --- A working day on the simulated robot -----------------------------------------------------------------------------
TINY = "--latent-dim 8 --small-channels 4 4 --image-size 32 --batch-size 8 --hidden-dims 32 --utd-ratio 1 --threads 1"
TINY += " --learning-starts 60 --teleop scripted --gripper fixed --no-capture-video"


class Day:
    """A robot, an actor with its learner, and a hand that kills them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.port = free_port()
        self.run_dir = folder / "run"
        self.flags = ("--server", f"tcp://127.0.0.1:{self.port}")
        self.record_bytes = small_record_type().itemsize

    def robot(self):
        flags = ("--port", self.port, "--env-id", "FrankaPegInsert-v0", "--sim-speed", 0)
        return popen_script("robot_server.py", *flags, cwd=self.folder)

    def script(self, *flags: object):
        return popen_script("sac_pixel_real.py", *flags, *self.flags, cwd=self.folder)

    def sent(self) -> np.ndarray:
        """What the actor has journalled; the first file is dropped only after 1,024 of them."""
        data = (self.run_dir / "journal" / f"{0:012d}.records").read_bytes()
        return np.frombuffer(data[: len(data) // self.record_bytes * self.record_bytes], small_record_type())

    def held_back(self) -> np.ndarray:
        """What it has staged of the running episode."""
        path = self.run_dir / "staged.records"
        data = path.read_bytes()[8:] if path.exists() else b""
        return np.frombuffer(data[: len(data) // self.record_bytes * self.record_bytes], small_record_type())

    def episodes(self) -> int:
        path = self.run_dir / "train.csv"
        return len(path.read_text().splitlines()) - 1 if path.exists() else 0

    def learner_pid(self, actor) -> int:
        children = Path(f"/proc/{actor.pid}/task/{actor.pid}/children").read_text().split()
        (pid,) = [child for child in children if "learner" in Path(f"/proc/{child}/cmdline").read_text()]
        return int(pid)


def small_record_type() -> np.dtype:
    args = real.Args(image_size=32)
    env = real.wrap_env(real.make_env(args), args)
    return real.robot_step_type(real.views_of(env), env.action_space.shape[0])


def test_quit_during_the_first_reset_ends_the_run(tmp_path, monkeypatch):
    """The keys of a person at the terminal, the robot on its way; nothing of an episode is there yet."""
    record_demos(tmp_path / "minari", [True], monkeypatch)
    ours, theirs = os.openpty()
    flags = ("--teleop", "keyboard", "--run-dir", "run", "--address", f"127.0.0.1:{free_port()}")
    with popen_script("robot_server.py", "--port", 0, "--env-id", "FrankaPegInsert-v0", cwd=tmp_path) as robot:
        wait_until(lambda: "serving on" in robot.stdout_path.read_text() or robot.poll() is not None)
        server = robot.stdout_path.read_text().split("serving on ")[1].split()[0]
        with (
            contextlib.closing(rc.RobotClient(server)) as observer,
            popen_script(
                "sac_pixel_real.py", *TINY.split(), *flags, "--server", server, cwd=tmp_path, stdin=theirs
            ) as actor,
        ):
            moving = lambda: observer.state()["mode"] == "streaming" or actor.poll() is not None  # noqa: E731
            wait_until(moving, 200)
            os.write(ours, b"yq")
            assert actor.wait(60) == 1
            wait_until(lambda: observer.state()["mode"] in ("hold", "idle"), 5)
    error = actor.stderr_path.read_text()
    assert "Traceback" not in error and "stopped; go on with --resume run" in error
    assert not (tmp_path / "run" / "train.csv").exists()
    os.close(ours)
    os.close(theirs)


def test_working_day_with_everything_killed_once(tmp_path):
    """Demonstrations, training, kill -9 of learner, server, actor; nothing is lost, nothing doubled; evaluation."""
    day = Day(tmp_path)
    with contextlib.ExitStack() as robots:
        robot = robots.enter_context(day.robot())
        wait_until(lambda: "serving on" in robot.stdout_path.read_text() or robot.poll() is not None)
        for _ in range(3):  # on a machine that is busy the simulated arm may be refused a reset
            flags = ("--teleop", "expert", "--episodes", 2, *day.flags)
            demos = run_script("record_demos.py", *flags, cwd=tmp_path, timeout=400, check=False)
            if demos.returncode == 0:
                break
        assert demos.returncode == 0, demos.stderr
        where = ("--run-dir", day.run_dir, "--address", f"127.0.0.1:{free_port()}")
        with day.script(*TINY.split(), *where, "--total-timesteps", 10_000) as actor:
            ended = lambda: f"{actor.stderr_path.read_text()}\n{actor.stdout_path.read_text()}"  # noqa: E731
            wait_until(lambda: day.episodes() >= 2 or actor.poll() is not None, 400)
            assert actor.poll() is None, ended()
            os.kill(day.learner_pid(actor), signal.SIGKILL)
            wait_until(lambda: "ended by signal 9 and is started again" in actor.stderr_path.read_text())
            wait_until(lambda: day.episodes() >= 3 or actor.poll() is not None, 400)
            os.killpg(robot.pid, signal.SIGKILL)
            robots.enter_context(day.robot())
            faults = day.episodes()
            wait_until(lambda: day.episodes() >= faults + 2 or actor.poll() is not None, 400)
            assert actor.poll() is None, ended()
            wait_until(lambda: len(day.held_back()) > 3, 400)  # in the middle of an episode
            learner = day.learner_pid(actor)
            os.kill(actor.pid, signal.SIGKILL)
            actor.wait()
            sent, held_back = day.sent(), day.held_back()
            wait_until(lambda: not Path(f"/proc/{learner}").exists())  # its learner saves, and ends by itself
        transitions = int((~sent["first"]).sum() + (~held_back["first"]).sum())
        total = transitions + 20
        flags = ("--resume", day.run_dir, "--total-timesteps", total)
        finished = run_script("sac_pixel_real.py", *flags, *day.flags, cwd=tmp_path, timeout=500)
        assert f"evaluate it: python sac_pixel_real.py --eval-only {day.run_dir}" in finished.stdout
        flags = ("--eval-only", day.run_dir, "--final-eval-episodes", 2, "--capture-video")
        evaluated = run_script("sac_pixel_real.py", *flags, *day.flags, cwd=tmp_path, timeout=400)
    journal = day.sent()
    assert (journal[: len(sent)] == sent).all()
    assert (journal[len(sent) : len(sent) + len(held_back)] == held_back).all()  # what the crash left of an episode
    checkpoint = torch.load(day.run_dir / "learner" / "checkpoint.pt", weights_only=True)
    learned = checkpoint["buffer"]["columns"]
    steps = journal[~journal["first"]][:total]
    assert len(learned[0]) == total == len(steps)  # none lost, none doubled
    assert np.array_equal(learned[1].numpy(), steps["action"])
    assert np.array_equal(learned[2].numpy(), steps["reward"])
    assert np.array_equal(learned[3].numpy(), steps["observation"])
    assert checkpoint["agent"]["critic_updates"] == total - 60
    shown = read_csv(day.run_dir, "train.csv")
    assert shown["charts/demonstrations"][-1] > 0 and max(shown["charts/intervention_rate"]) > 0
    assert re.search(r"newest policy, update \d+: success \d of 2, 95% 0\.\d\d to [01]\.\d\d", evaluated.stdout)
    assert f"update {total - 60}:" in evaluated.stdout  # the last policy
    rows = read_csv(day.run_dir, "evaluation_newest.csv")
    assert rows["episode"] == [0, 1] and min(rows["cycle_s"]) > 0
    assert (day.run_dir / "evaluation_newest.mp4").stat().st_size > 1000


# --- GPU --------------------------------------------------------------------------------------------------------------
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_graphed_updates_on_a_gpu(tmp_path):
    """Graphed updates, the grasp critic's too, do what plain ones do; the policy answers as before in a file."""
    device = torch.device("cuda")
    agents = [small_agent(device, augment=(), compile=compiled) for compiled in (True, False)]
    losses = ([], [])
    for agent, lot in zip(agents, losses):
        rng = np.random.default_rng(0)
        folder = SimpleNamespace(dir=tmp_path, state=None)
        buffer, demos = agent.make_buffer("replay", 100, folder, 110), agent.make_buffer("demos", 50, folder, 60)
        for i in range(80):
            action = None if i == 0 else rng.uniform(-1, 1, agent.action_dim)
            step = pack_step(agent.step_type, action, some_obs(agent, i), float(i % 3 == 0))
            buffer.add(step)
            if i <= 40:
                demos.add(step)
        for _ in range(30):
            metrics = agent.update(buffer, demos, 1)
            lot.append((float(metrics["losses/critic_loss"]), float(metrics["losses/grasp_loss"])))
    assert len(agents[0].update_once.graphs) == 1 and not hasattr(agents[1].update_once, "graphs")
    assert np.isfinite(losses[0]).all() and len(set(losses[0][-15:])) == 15  # a fresh batch each time
    np.testing.assert_allclose(losses[0], losses[1], rtol=0.1)
    agents[0].probe = {name: torch.from_numpy(value) for name, value in some_obs(agents[0]).items()}
    real.save_policy(agents[0], 30, tmp_path / "newest.policy")
    other = small_agent(CPU, augment=(), compile=True)
    assert real.load_policy(other, tmp_path / "newest.policy") == 30
