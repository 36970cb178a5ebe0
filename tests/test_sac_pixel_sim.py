"""sac_pixel_sim.py: what images add, against SERL's arrays, numbered frames, cases by hand, and as a user."""

import contextlib
import dataclasses
import inspect
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import types
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import probe_envs
import pytest
import torch
from conftest import REPO, popen_script, read_csv, run_script, wait_until
from forked import popen_forked, run_forked
from serl_arrays import (
    FIXTURES,
    assert_close,
    encoder_arrays,
    fit_torchvision,
    nchw,
    set_bottleneck,
    set_embeddings,
    small_trunk,
    tree_of,
    write_pickle,
)
from test_vision import Malicious
from torch import Tensor, nn

import sac_pixel_sim
import sac_state_sim
from common import vision
from common.pixels import FrameFile, Views, views_of
from common.success import SuccessClassifier, SuccessDetector
from common.tensors import pack_step, pack_tensors, step_type, unpack_tensors
from common.vision import MobileNetTrunk, ResNetTrunk, SpatialEmbeddings, Standardize
from sac_pixel_sim import (
    Agent,
    Args,
    Batch,
    Bottleneck,
    FrameBuffer,
    Observation,
    load_demos,
    make_env,
    start,
    wrap_env,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
SCRIPT, CPU = "sac_pixel_sim.py", torch.device("cpu")
TASKS = {"PYTHONPATH": str(Path(probe_envs.__file__).parent)}
SMALL = {"hidden_dims": (16, 16), "batch_size": 8, "demos": "0", "compile": False, "threads": 1, "latent_dim": 12}
SMALL |= {"small_channels": (4, 6), "image_size": 20}


@pytest.fixture(autouse=True, scope="module")
def _exact_and_on_one_thread():
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


def small_args(**changes) -> Args:
    return Args(**SMALL | changes)


def small_views(size: int = 20, stack: int = 1, cameras: tuple[str, ...] = ("front", "wrist")) -> Views:
    return Views(cameras, size, stack, {"gripper": (0, 1), "state": (1, 4)})


def box(action_dim: int) -> gym.spaces.Box:
    return gym.spaces.Box(-1, 1, (action_dim,), np.float32)


# --- Networks against SERL's arrays -----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def encoders() -> dict[str, np.ndarray]:
    return encoder_arrays()


def test_serl_pooling(encoders):
    features = nchw(encoders["head/in/features"])
    embeddings = SpatialEmbeddings(48, 4, 4)
    set_embeddings(embeddings, encoders["head/sle/params/kernel"])
    assert_close(embeddings(features), encoders["head/sle/out"])
    tree = tree_of(encoders, "head/bottleneck/params/")
    set_embeddings(embeddings, tree["SpatialLearnedEmbeddings_0"]["kernel"])
    bottleneck = Bottleneck(384, 32)
    set_bottleneck(bottleneck, tree)
    assert_close(bottleneck(embeddings(features)), encoders["head/bottleneck/out"])
    head = Agent(small_views(), box(2), small_args(pooling="average"), CPU).encoder.heads[0]
    assert_close(head[0](features), encoders["head/avg/out"])


def test_serl_small_encoder(encoders):
    trunk = small_trunk(encoders, "small/params/", (2, 2, 2, 2), 0)
    bottleneck = Bottleneck(256, 256)
    set_bottleneck(bottleneck, tree_of(encoders, "small/params/"))
    maps = trunk(torch.from_numpy(encoders["small/in/images"]))
    assert_close(bottleneck(maps.mean((2, 3))), encoders["small/out"])


def test_serl_small_encoder_with_embeddings(encoders):
    trunk = small_trunk(encoders, "small_sle/params/", (1, 2, 1), 1)
    maps, tree = trunk(torch.from_numpy(encoders["small_sle/in/images"])), tree_of(encoders, "small_sle/params/")
    embeddings, bottleneck = SpatialEmbeddings(*maps.shape[1:]), Bottleneck(128, 32)
    set_embeddings(embeddings, tree["SpatialLearnedEmbeddings_0"]["kernel"])
    set_bottleneck(bottleneck, tree)
    assert_close(bottleneck(embeddings(maps)), encoders["small_sle/out"])


def test_serl_mobilenet_wrapper(encoders):
    """The wrapper's normalisation of images and its head, around its stand-in for a trunk."""
    tree, conv = tree_of(encoders, "mobilenet_wrapper/params/"), nn.Conv2d(3, 10, 3, 4)
    with torch.no_grad():
        kernel = encoders["mobilenet_wrapper/trunk_params/Conv_0/kernel"]
        conv.weight.copy_(torch.from_numpy(kernel).permute(3, 2, 0, 1))
        conv.bias.copy_(torch.from_numpy(encoders["mobilenet_wrapper/trunk_params/Conv_0/bias"]))
    maps = conv(Standardize(3)(torch.from_numpy(encoders["mobilenet_wrapper/in/images"]))).relu()
    embeddings, bottleneck = SpatialEmbeddings(10, 5, 5), Bottleneck(80, 24)
    set_embeddings(embeddings, tree["SpatialLearnedEmbeddings_0"]["kernel"])
    set_bottleneck(bottleneck, tree)
    assert_close(bottleneck(embeddings(maps)), encoders["mobilenet_wrapper/out"])


def drq_agent(arrays: dict[str, np.ndarray], monkeypatch, tmp_path) -> Agent:
    """SERL's whole pixel actor and critic: frozen narrow ResNet, a head per camera, states, policy and critics."""
    tree = tree_of(arrays, "drq/params/")
    encoder = tree["actor"]["encoder"]
    monkeypatch.setattr(vision, "ResNetTrunk", lambda channels: ResNetTrunk(channels, (8, 16, 32, 64)))
    path = write_pickle(tmp_path / "trunk.pkl", encoder["encoder_front"]["pretrained_encoder"])
    args = small_args(encoder="resnet10", pretrained=str(path), image_size=64, latent_dim=24)
    args = dataclasses.replace(args, hidden_dims=(32, 32), activation="tanh", num_qs=3, normalize_observations=False)
    views = Views(("front", "wrist"), 64, 1, {"state": (0, 5)})
    agent = Agent(views, box(4), args, CPU)
    for k, camera in enumerate(views.cameras):
        pool, bottleneck = SpatialEmbeddings(64, 2, 2, 4), Bottleneck(256, 24)  # with 4 embeddings, not 8
        agent.encoder.heads[k] = nn.Sequential(pool, bottleneck)
        set_embeddings(pool, encoder[f"encoder_{camera}"]["SpatialLearnedEmbeddings_0"]["kernel"])
        set_bottleneck(bottleneck, encoder[f"encoder_{camera}"])
    for network, name in ((agent.actor, "actor"), (agent.critic, "critic")):
        set_bottleneck(network.proprio, encoder)
        for i in range(2):
            linear, norm = tree[name]["network"][f"Dense_{i}"], tree[name]["network"][f"LayerNorm_{i}"]
            with torch.no_grad():
                for parameter, values in (
                    (network.trunk.linears[i].weight, linear["kernel"]),
                    (network.trunk.linears[i].bias, linear["bias"]),
                    (network.trunk.norms[i].weight, norm["scale"]),
                    (network.trunk.norms[i].bias, norm["bias"]),
                ):
                    parameter.copy_(torch.from_numpy(values).reshape(parameter.shape))
    with torch.no_grad():
        heads = ((agent.actor.mean, "actor", "Dense_0"), (agent.actor.log_std, "actor", "Dense_1"))
        for layer, name, dense in (*heads, (agent.critic.q, "critic", "Dense_0")):  # one last layer for all critics
            layer.weight.copy_(torch.from_numpy(tree[name][dense]["kernel"]).expand_as(layer.weight))
            layer.bias.copy_(torch.from_numpy(tree[name][dense]["bias"]).expand_as(layer.bias))
    return agent


def test_serl_pixel_actor_and_critic(encoders, monkeypatch, tmp_path):
    agent = drq_agent(encoders, monkeypatch, tmp_path)
    frames = np.stack([encoders["drq/in/front"], encoders["drq/in/wrist"]], 2)  # (B, 1, K, H, W, 3)
    states, actions = (torch.from_numpy(encoders[f"drq/in/{name}"]) for name in ("state", "actions"))
    obs = agent.encode(agent.observation(torch.from_numpy(frames), states[:, 0]))
    mean, std = agent.actor(sac_pixel_sim.Features(obs.images.detach(), obs.states))
    assert_close(mean, encoders["drq/out/mean"])
    assert_close(std, encoders["drq/out/std"])
    assert_close(agent.critic(obs, actions), encoders["drq/out/q"])
    mean.sum().backward()  # reaches the states' layer, not the images' encoder
    prefix = "drq/grad_mean_sum/actor/encoder/"
    linear, norm, _ = agent.actor.proprio
    for gradient, name in (
        (linear.weight.grad.T, "Dense_0/kernel"),
        (linear.bias.grad, "Dense_0/bias"),
        (norm.weight.grad, "LayerNorm_0/scale"),
        (norm.bias.grad, "LayerNorm_0/bias"),
    ):
        stored = encoders[prefix + name]
        np.testing.assert_allclose(gradient, stored, rtol=0, atol=1e-5 * abs(stored).max(), err_msg=name)
    assert all(parameter.grad is None for parameter in agent.value_parameters)
    agent.ema_encoder, agent.ema_actor = agent.encoder, agent.actor
    action = agent.act({"images": frames[1], "state": states[1].numpy()}, deterministic=True)
    assert_close(action, np.tanh(encoders["drq/out/mean"][1]))


# --- Images -----------------------------------------------------------------------------------------------------------
def pixel_env(**changes):
    args = Args(**{"env_id": "probe_envs:PixelPoint-v0", "image_size": 32, "small_channels": (4,)} | changes)
    return wrap_env(make_env(args), args)


def test_observations_are_images_and_states():
    env, plain = pixel_env(), gym.make("probe_envs:PixelPoint-v0")
    views = views_of(env)
    assert views == Views(("front", "wrist"), 32, 1, {"state": (0, 2)}) and views.state_dim == 2
    ours, obs = env.reset(seed=3)[0], plain.reset(seed=3)[0]
    for _ in range(3):
        assert env.observation_space.contains(ours)
        assert np.array_equal(ours["state"], np.float32(obs["state"])[None])
        assert np.array_equal(ours["images"], np.stack([obs["front"], obs["wrist"]])[None])
        action = np.float32([0.5, -0.5, 0])
        ours, obs = env.step(action)[0], plain.step(2 * action)[0]


def test_one_camera_and_a_stack_of_frames():
    env = pixel_env(cameras=("wrist",), frame_stack=3)
    plain = gym.make("probe_envs:PixelPoint-v0")
    seen = [plain.reset(seed=3)[0]["wrist"]] * 3
    ours = env.reset(seed=3)[0]
    for _ in range(4):
        assert np.array_equal(ours["images"][:, 0], seen[-3:])
        ours = env.step(np.float32([0.5, -0.5, 0]))[0]
        seen.append(plain.step(np.float32([1, -1, 0]))[0]["wrist"])


def test_grey_images_of_another_shape_without_states():
    env = pixel_env(env_id="probe_envs:GreyImages-v0", image_size=20)
    obs = env.reset(seed=1)[0]
    assert obs["state"].shape == (1, 0) and obs["images"].shape == (1, 1, 20, 20, 3)
    assert obs["images"].max() > 200 and np.array_equal(obs["images"][..., 0], obs["images"][..., 2])


class PixelsInPlace(probe_envs.PixelPoint):
    """Writes every observation into the same arrays."""

    arrays = None

    def observe(self):
        new = super().observe()
        self.arrays = self.arrays or new
        for name, value in new.items():
            self.arrays[name][:] = value
        return self.arrays


class LostExpert(probe_envs.PixelPoint):
    """Its expert stands still."""

    def expert_action(self):
        return np.zeros(3, np.float32)


class LongEpisodes(probe_envs.PixelPoint):
    """60 steps, never terminated."""

    def step(self, action):
        obs, reward, _, _, info = super().step(action)
        return obs, reward, False, self.t == 60, info


for task in (PixelsInPlace, LostExpert, LongEpisodes):
    gym.register(f"{task.__name__}-v0", task, disable_env_checker=True, max_episode_steps=100)


def demonstrations(tmp_path: Path, **changes) -> tuple[Agent, FrameBuffer]:
    args = small_args(**{"env_id": "PixelPoint-v0", "demos": "3", "image_size": 32} | changes)
    wrap, task = partial(wrap_env, args=args), make_env(args)
    agent = Agent(views_of(wrap(task)), wrap(task).action_space, args, CPU)
    demos = agent.make_buffer("demonstrations", 1000, run_stub(tmp_path), 4000)
    for step in load_demos(args, agent, task, wrap):
        demos.add(step)
    return agent, demos


def test_demonstrations_of_a_task_that_writes_in_place_are_copied(tmp_path):
    """[S1]"""
    one, other = (demonstrations(tmp_path / name, env_id=f"{name}-v0")[1] for name in ("PixelsInPlace", "PixelPoint"))
    images, same = (demos.frames.get(demos.windows) for demos in (one, other))
    assert torch.equal(images, same) and len({image.numpy().tobytes() for image in images}) > 10


def test_every_row_that_was_asked_for_has_room(tmp_path):
    """[P1]: stacks of frames that move by several with each chunk of actions."""
    for stack, chunk in ((3, 4), (4, 8), (2, 2), (3, 2)):
        changes = {"env_id": "LongEpisodes-v0", "frame_stack": stack, "action_chunk": chunk}
        agent, demos = demonstrations(tmp_path, **changes)
        assert len(demos) == 3 * math.ceil(60 / chunk)
        buffer = agent.make_buffer("replay", 40, types.SimpleNamespace(dir=tmp_path, state=None), 50)
        assert (buffer.n_step, buffer.gamma) == (3, 0.97)
        env, args = pixel_env(**changes), agent.args
        for episode in range(6):
            obs, done = env.reset(seed=episode)[0], False
            buffer.add(pack_step(agent.step_type, None, obs))
            while not done:
                before = obs
                action = env.action_space.sample()
                obs, reward, terminated, truncated, _ = env.step(action)
                buffer.add(pack_step(agent.step_type, action, obs, reward, terminated))
                done = terminated or truncated
                window = buffer.frames.get(buffer.windows[(buffer.total - 1) % 40])
                assert np.array_equal(window, [before["images"], obs["images"]])
        assert len(buffer) == 40 and args.frame_stack == stack


def test_only_successful_demonstrations_become_goals(tmp_path, capsys):
    """[P4]"""
    agent, demos = demonstrations(tmp_path, reward="vice", demos="6")
    assert demos.n_step == 1
    told = re.search(r"demonstrations: 6 episodes, (\d+) steps, (\d) successful", capsys.readouterr().out)
    assert int(told[1]) == len(demos) and 0 < int(told[2]) == len(agent.goals) <= 6
    # A goal is the last image of its episode: where the next step begins another one.
    ends = [i for i in range(len(demos)) if i == len(demos) - 1 or not demos.continues[i + 1]]
    last = demos.frames.get(demos.windows[ends, 1])
    assert all(any(torch.equal(goal, image) for image in last) for goal in agent.goals)
    with pytest.raises(SystemExit, match="--reward vice: none of the demonstrations of --demos 6 ends in success"):
        demonstrations(tmp_path, reward="vice", demos="6", env_id="LostExpert-v0")


# --- Replay buffer ----------------------------------------------------------------------------------------------------
def numbered_views(stack: int) -> Views:
    return Views(("a", "b"), 4, stack, {"state": (0, 3)})


def new_buffer(views: Views, capacity: int, folder: Path, n_step: int = 1, gamma: float = 1.0) -> FrameBuffer:
    file = FrameFile(folder / "replay.frames", views.frame_shape, CPU)
    return FrameBuffer(capacity, views, 2, file, n_step, gamma)


def numbered_frame(number: int) -> np.ndarray:
    frame = np.zeros((2, 4, 4, 3), np.uint8)
    frame[...] = number % 256, number // 256, number * 7 % 256
    frame[1] += 1  # another camera
    return frame


class Stream:
    """Steps of one actor whose frames and states carry a running number, in segments of random length."""

    def __init__(self, views: Views, generator: np.random.Generator, lengths=(1, 12), first: int = 0, frames: int = 1):
        self.views, self.generator, self.lengths = views, generator, lengths
        self.number, self.to_go = first, 0
        self.dtype = step_type(views.state_dim, 2, (frames, *views.frame_shape))

    def observation(self) -> dict[str, np.ndarray]:
        images = np.stack([numbered_frame(number) for number in self.window])
        return {"images": images, "state": np.repeat(np.float32(self.window)[:, None], 3, 1)}

    def step(self, label: float) -> tuple[np.ndarray, dict | None]:
        """The next step, and the transition that it makes."""
        self.number += 1
        if self.to_go == 0:
            self.to_go = int(self.generator.integers(*self.lengths))
            self.window = [self.number] * self.views.stack
            return pack_step(self.dtype, None, self.observation()), None
        before, self.window = self.window, [*self.window[1:], self.number]
        self.to_go -= 1
        terminated = self.to_go == 0 and self.generator.random() < 0.5
        step = pack_step(self.dtype, np.float32([label, -label]), self.observation(), 0.5, terminated)
        return step, {"windows": [before, self.window], "label": label, "end": terminated, "last": self.to_go == 0}


def fill(buffer: FrameBuffer, stream: Stream, count: int, rows: list, actor: str = "") -> None:
    """Until `count` more transitions are added to the buffer and to `rows`."""
    goal = len(rows) + count
    while len(rows) < goal:
        step, row = stream.step(float(len(rows)))
        assert buffer.add(step, actor) == (row is not None)
        if row:
            rows.append(row)


def assert_holds(buffer: FrameBuffer, rows: list[dict]) -> None:
    """The newest rows, as many as were asked for, number by number and image by image."""
    assert buffer.total == len(rows) and len(buffer) == min(len(rows), buffer.capacity)
    for number in range(len(rows) - len(buffer), len(rows)):
        row, slot = rows[number], number % buffer.capacity
        images = buffer.frames.get(buffer.windows[slot]).numpy()
        assert np.array_equal(images, [[numbered_frame(n) for n in window] for window in row["windows"]])
        assert buffer.rows.observations[slot].tolist() == np.repeat(row["windows"][0], 3).tolist()
        assert buffer.rows.next_observations[slot].tolist() == np.repeat(row["windows"][1], 3).tolist()
        assert buffer.rows.actions[slot].tolist() == [row["label"], -row["label"]]
        assert bool(buffer.rows.terminations[slot]) == row["end"] and buffer.rows.rewards[slot] == 0.5


@pytest.mark.parametrize("stack", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_buffer_returns_what_was_put_in(stack, seed, tmp_path):
    """Episode starts, truncation, termination, wrap-around, several actors whose steps come in any order."""
    views, generator = numbered_views(stack), np.random.default_rng(seed)
    buffer, rows = new_buffer(views, 40, tmp_path), []
    streams = [Stream(views, generator, first=10_000 * actor) for actor in range(3)]
    while len(rows) < 150:
        actor = int(generator.integers(3))
        fill(buffer, streams[actor], int(generator.integers(1, 5)), rows, str(actor))
        assert_holds(buffer, rows)
    held = {number for row in rows[-40:] for window in row["windows"] for number in window}
    newest = {number for stream in streams for number in stream.window}
    assert np.count_nonzero(buffer.frames.uses) == len(held | newest)  # each frame once, and none for nothing


def test_a_reset_stores_the_frame_that_its_stack_repeats_once(tmp_path):
    """With --action-chunk, where each step brings its whole stack."""
    views = numbered_views(3)
    buffer, stream = new_buffer(views, 10, tmp_path), Stream(views, np.random.default_rng(0), frames=3)
    buffer.add(stream.step(0)[0])
    assert np.count_nonzero(buffer.frames.uses) == 1


def test_a_segment_that_begins_in_the_middle_of_an_episode_has_its_own_first_frame(tmp_path):
    """As when only interventions are kept: the image of its first observation is not the last segment's (SERL's is)."""
    views = numbered_views(1)
    stream, buffer, rows = Stream(views, np.random.default_rng(0), (30, 31)), new_buffer(views, 100, tmp_path), []
    fill(buffer, stream, 5, rows)
    for _ in range(4):
        stream.step(0)  # not kept
    buffer.add(pack_step(stream.dtype, None, stream.observation()))
    fill(buffer, stream, 5, rows)
    assert_holds(buffer, rows)
    assert rows[5]["windows"][0] == [rows[4]["windows"][1][0] + 4] and not buffer.continues[5]


def run_stub(folder: Path) -> types.SimpleNamespace:
    return types.SimpleNamespace(dir=folder, state=None)


def test_memory_disk_and_wire_are_announced_before_they_are_taken(tmp_path, monkeypatch, capsys):
    """200,000 transitions of two cameras of 128 x 128: 20 GB of disk, 98 kB a step [P3]."""
    made, views = [], Views(("front", "wrist"), 128, 1, {"state": (0, 7)})
    agent = Agent(views, box(4), small_args(image_size=128, small_channels=(4,)), CPU)
    monkeypatch.setattr(FrameFile, "make_room", lambda self, slots: made.append((slots, capsys.readouterr().out)))
    usage = shutil._ntuple_diskusage(0, 0, 24_000_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    buffer = agent.make_buffer("replay", 200_000, run_stub(tmp_path), 203_126)
    (slots, announced), images = made[0], 2 * 128 * 128 * 3
    assert slots == 203_126 and slots * images <= 20e9
    assert "replay: 200,000 transitions of 2 x 128 x 128 pixels, 203,126 frames; 98.4 kB each on a wire" in announced
    assert re.search(rf"[\d.]+ MB of memory, 20 GB of disk in {tmp_path}", announced)
    small = [*buffer.rows, buffer.continues, buffer.windows]
    told = float(re.search(r"([\d.]+) MB of memory", announced)[1])
    assert sum(tensor.nbytes for tensor in small) / 1e6 == pytest.approx(told, rel=0.02)
    assert agent.step_type.itemsize <= images + 64  # 3 bytes per pixel, of one frame
    usage = shutil._ntuple_diskusage(0, 0, 16_000_000_000)
    line = f"{tmp_path}/replay.frames needs 20 GB of disk, there are 16 GB; give a smaller --buffer-size"
    with pytest.raises(SystemExit, match=re.escape(line)):
        agent.make_buffer("replay", 200_000, run_stub(tmp_path), 203_126)
    assert len(made) == 1


def test_no_more_frames_are_asked_for_than_a_run_can_make(tmp_path, monkeypatch):
    """Whatever --eval-every is, such as one that turns evaluations off."""
    asked = []
    monkeypatch.setattr(Agent, "make_buffer", lambda self, what, capacity, run, slots: asked.append(slots))
    for name, eval_every in (("often", 50), ("never", 10**9)):
        flags = {"buffer_size": 300, "total_timesteps": 1000, "eval_every": eval_every, "demos": "0"}
        args = small_args(env_id="PixelPoint-v0", run_dir=str(tmp_path / name), **flags)
        start(args, make_env(args), partial(wrap_env, args=args))
    assert asked == [300 + 4 + 200 + 1, 300 + 4 + 700 + 1]


def test_frames_in_another_place(tmp_path):
    args = small_args(frames_dir=str(tmp_path / "disk"))
    agent = Agent(small_views(), box(2), args, CPU)
    agent.make_buffer("replay", 10, run_stub(tmp_path / "runs" / "mine"), 12)
    agent.make_buffer("replay", 10, run_stub(tmp_path / "others" / "mine"), 12)
    names = sorted(path.name for path in (tmp_path / "disk").iterdir())
    assert names == ["others-mine-replay.frames", "runs-mine-replay.frames"]


@pytest.mark.parametrize("case", ["stack1", "stack1_mid", "stack2", "stack2_mid", "stack3_mid", "quirk"])
def test_serl_memory_efficient_buffer(case, tmp_path):
    """All that SERL's buffer may return, ours returns too, and the same, except where SERL's is wrong."""
    arrays = {
        k.removeprefix(f"{case}/"): v
        for k, v in np.load(FIXTURES / "memory_buffer.npz").items()
        if k.startswith(case + "/")
    }
    stack, count = int(arrays["in/frame_stack"]), len(arrays["in/actions"])
    views = Views(("image",), 4, stack, {"state": (0, 3)})
    # Segments that begin with older frames bring them.
    dtype = step_type(views.state_dim, 2, (stack, *views.frame_shape))

    def observation(prefix: str, i: int) -> dict[str, np.ndarray]:
        return {"images": arrays[f"{prefix}_image"][i][:, None], "state": arrays[f"{prefix}_state"][i]}

    buffer, wrong, before = new_buffer(views, int(arrays["in/capacity"]), tmp_path), 0, None
    for i in range(count):
        obs, next_obs = observation("in/obs", i), observation("in/next_obs", i)
        if before is None or not all(np.array_equal(obs[name], before[name]) for name in obs):
            buffer.add(pack_step(dtype, None, obs))
        terminated = arrays["in/dones"][i] * (1 - arrays["in/masks"][i])  # not truncated
        buffer.add(pack_step(dtype, arrays["in/actions"][i], next_obs, arrays["in/rewards"][i], terminated))
        before = next_obs
        if i + 1 not in arrays["in/snapshots"]:
            continue
        names = ("transition", "consistent", "obs_image", "next_obs_image")
        out = {name: arrays[f"out/after{i + 1}/{name}"] for name in names}
        assert set(out["transition"]) <= set(range(buffer.total - len(buffer), buffer.total))
        slots = torch.from_numpy(out["transition"]).long() % buffer.capacity
        images = buffer.frames.get(buffer.windows[slots])[:, :, :, 0].numpy()  # (N, 2, T, 4, 4, 3)
        same = (images[:, 0] == out["obs_image"]).all((1, 2, 3, 4))
        same &= (images[:, 1] == out["next_obs_image"]).all((1, 2, 3, 4))
        assert np.array_equal(same, out["consistent"].astype(bool))
        wrong += (~same).sum()
        assert np.array_equal(buffer.rows.actions[slots], arrays[f"out/after{i + 1}/actions"])
        assert np.array_equal(buffer.rows.rewards[slots], arrays[f"out/after{i + 1}/rewards"])
        assert np.array_equal(1 - buffer.rows.terminations[slots], arrays[f"out/after{i + 1}/masks"])
    assert (wrong > 0) == (case == "quirk")


def test_samples_are_uniform_over_all_rows(tmp_path):
    views = numbered_views(2)
    stream, buffer, rows = Stream(views, np.random.default_rng(1)), new_buffer(views, 30, tmp_path), []
    fill(buffer, stream, 100, rows)
    batch, frames = buffer.sample_frames(20_000, torch.Generator().manual_seed(0))
    numbers, counts = batch.actions[:, 0].unique(return_counts=True)
    assert numbers.tolist() == list(range(70, 100)) and frames.shape == (20_000, 4, 2, 4, 4, 3)
    expected = 20_000 / 30
    assert (counts - expected).abs().max() < 5 * math.sqrt(expected)


@pytest.mark.parametrize("stack", [1, 2])
def test_transitions_of_several_steps_end_with_the_last_ones_frames(stack, tmp_path):
    views = numbered_views(stack)
    stream, buffer, rows = Stream(views, np.random.default_rng(3)), new_buffer(views, 60, tmp_path, 3, 0.9), []
    fill(buffer, stream, 100, rows)
    batch, frames = buffer.sample_frames(2000, torch.Generator().manual_seed(0))
    lengths = set()
    for i, label in enumerate(batch.actions[:, 0].int().tolist()):
        last = label
        while last < label + 2 and last + 1 < len(rows) and not rows[last]["last"]:
            last += 1
        steps = last - label
        lengths.add(steps + 1)
        window = [*rows[label]["windows"][0], *rows[last]["windows"][1]]
        assert np.array_equal(frames[i], [numbered_frame(number) for number in window])
        assert batch.next_observations[i].tolist() == np.repeat(rows[last]["windows"][1], 3).tolist()
        assert float(batch.rewards[i]) == pytest.approx(sum(0.5 * 0.9**k for k in range(steps + 1)))
        assert 1 - float(batch.terminations[i]) == pytest.approx(0.9**steps * (1 - rows[last]["end"]))
    assert lengths == {1, 2, 3}


def test_a_checkpoint_at_any_moment_goes_on_as_if_nothing_had_been(tmp_path):
    """Over several wraps, in the middle of segments of two actors: the newest two checkpoints can always be read."""
    views, generator = numbered_views(2), np.random.default_rng(0)
    buffer, rows, states = new_buffer(views, 60, tmp_path), [], []
    streams = [Stream(views, generator, first=10_000 * actor) for actor in range(2)]
    for i in range(40):
        fill(buffer, streams[i % 2], int(generator.integers(1, 15)), rows, str(i % 2))
        for state, count in states[-2:]:
            other = new_buffer(views, 60, tmp_path)
            other.load_state_dict(state)
            assert_holds(other, rows[:count])
        if generator.random() < 0.5:
            states.append((buffer.state_dict(), len(rows)))
    # After loading it goes on as the other does, in the middle of both segments.
    state = buffer.state_dict()
    other = new_buffer(views, 60, tmp_path)
    other.load_state_dict(state)
    for i in range(6):
        fill(other, streams[i % 2], 20, rows, str(i % 2))
    assert_holds(other, rows)
    assert len(other.frames) < 300  # of 460 that were put in


# --- Agent: every encoder trains --------------------------------------------------------------------------------------
REWARDS, TERMINATIONS, FRAMES = 2, 4, 5  # among the inputs of an update


def random_inputs(agent: Agent, batch: int = 8, seed: int = 0) -> list[Tensor]:
    """The fields of a batch, frames, eps and subset for `update_once`."""
    generator, views = torch.Generator().manual_seed(seed), agent.views
    states, next_states = torch.randn(2, batch, views.state_dim, generator=generator)
    actions = torch.randn(batch, agent.action_dim, generator=generator)
    fields = [states, actions, torch.randn(batch, generator=generator), next_states, torch.zeros(batch)]
    shape = (batch, 2 * views.stack, *views.frame_shape)
    frames = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    return [*fields, frames, torch.randn(batch, 2, agent.action_dim, generator=generator), torch.tensor([0, 1])]


def prepared(agent: Agent, inputs: list[Tensor]) -> Batch:
    return agent.prepare(Batch(*inputs[:FRAMES]), inputs[FRAMES])


def copies(*modules: nn.Module) -> dict[str, Tensor]:
    return {f"{i}.{k}": v.clone() for i, module in enumerate(modules) for k, v in module.state_dict().items()}


def moved(before: dict[str, Tensor], *modules: nn.Module) -> set[str]:
    after = copies(*modules)
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


@pytest.mark.parametrize("film", [None, "state"])
@pytest.mark.parametrize("pooling", ["embeddings", "softmax", "average"])
@pytest.mark.parametrize("encoder", ["small", "resnet10", "mobilenet"])
def test_every_encoder_trains(encoder, pooling, film, monkeypatch):
    monkeypatch.setattr(vision, "ResNetTrunk", lambda channels: ResNetTrunk(channels, (8, 8, 16, 16)))
    fit_torchvision()
    size = 32 if encoder == "small" else 40
    options = {"augment": (), "lr": 3e-3, "actor_ema": 0.5}
    args = small_args(encoder=encoder, pooling=pooling, film=film, image_size=size, **options)
    agent = Agent(small_views(size), box(2), args, CPU)
    networks = (agent.critic, agent.actor, agent.target_critic, agent.ema_actor, agent.ema_encoder, agent.encoder)
    before, inputs = copies(*networks), random_inputs(agent)
    for _ in range(3):  # FiLM's weights move what is before them from the second step on
        metrics = agent.update_once(*inputs, with_actor=False)
    still = {name for name in before if name[0] in "134"}
    assert moved(before, *networks) == before.keys() - still  # critics, their targets and encoder, nothing else
    before = copies(*networks)
    metrics |= agent.update_once(*inputs, with_actor=True)
    assert moved(before, *networks) == before.keys()
    for parameter in (*agent.critic.parameters(), *agent.actor.parameters(), *agent.encoder.parameters()):
        both = zip(parameter.grad.stride(), parameter.stride(), parameter.shape)
        assert all(one == other for one, other, size in both if size > 1)  # fused AdamW looks at memory only
    assert all(value.isfinite() for value in metrics.values())
    inputs[TERMINATIONS][:] = 1  # all terminated: the targets are the rewards
    losses = [agent.update_once(*inputs, with_actor=False)["losses/critic_loss"] for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("encoder", ["resnet10", "mobilenet"])
def test_pretrained_trunks_stay_or_train(encoder, freeze, tmp_path, monkeypatch):
    monkeypatch.setattr(vision, "ResNetTrunk", lambda channels: ResNetTrunk(channels, (8, 8, 16, 16)))
    fit_torchvision()
    path, views = tmp_path / "trunk.pt", small_views(40, stack=2)
    trunk = vision.ResNetTrunk(3) if encoder == "resnet10" else MobileNetTrunk(3, pretrained=True)
    torch.save(trunk.state_dict(), path)
    args = small_args(encoder=encoder, pretrained=str(path), freeze=freeze, film="state", image_size=40)
    agent = Agent(views, box(2), args, CPU)
    inputs = random_inputs(agent)
    trunks = [agent.trunk] if freeze else list(agent.encoder.trunks)
    assert len(trunks) == (1 if freeze else 2)  # frozen: one for all cameras
    for one in trunks:
        assert all(torch.equal(value, trunk.state_dict()[name]) for name, value in one.state_dict().items())
    before, heads = copies(*trunks), copies(agent.encoder.heads, agent.encoder.films)
    for _ in range(3):
        agent.update_once(*inputs, with_actor=True)
    parameters = {f"{i}.{name}" for i, one in enumerate(trunks) for name, _ in one.named_parameters()}
    assert moved(before, *trunks) == (set() if freeze else parameters)  # never the statistics of BatchNorm
    assert moved(heads, agent.encoder.heads, agent.encoder.films) == heads.keys()
    # A checkpoint holds them: the file is not needed again.
    path.unlink()
    state = agent.state_dict()
    other = Agent(views, box(2), args, CPU, load=False)
    other.load_state_dict(state)
    obs = {"images": inputs[FRAMES][0, :2].numpy(), "state": inputs[0][0].numpy()}
    assert np.array_equal(agent.act(obs, deterministic=True), other.act(obs, deterministic=True))
    with pytest.raises(SystemExit, match=f"--pretrained {path}: refused"):
        Agent(views, box(2), args, CPU)


def test_a_frozen_trunk_with_bfloat16(tmp_path, monkeypatch):
    """Its maps in bfloat16 would not fit the layers behind it, which act in float32."""
    monkeypatch.setattr(vision, "ResNetTrunk", lambda channels: ResNetTrunk(channels, (8, 8, 16, 16)))
    torch.save(vision.ResNetTrunk(3).state_dict(), tmp_path / "trunk.pt")
    args = small_args(encoder="resnet10", pretrained=str(tmp_path / "trunk.pt"), image_size=40, amp=True)
    agent = Agent(small_views(40), box(2), args, CPU)
    obs = {"images": np.zeros((1, 2, 40, 40, 3), np.uint8), "state": np.zeros((1, 4), np.float32)}
    assert np.isfinite(agent.act(obs, deterministic=True)).all()
    agent.update_once(*random_inputs(agent), with_actor=True)


def test_actor_and_learner_have_the_same_pretrained_parameters(tmp_path):
    """The files are compared, wherever they lie."""
    contents = {"a": b"1", "b": b"1", "c": b"2"}
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    a, b, c = (small_args(pretrained=str(tmp_path / name)).shared() for name in contents)
    assert a == b != c
    assert small_args(freeze=False).shared() != small_args().shared()


def test_flags_that_may_change_are_those_of_states():
    """Not the role: an actor's checkpoint holds no networks."""
    theirs = sac_state_sim.Args.MAY_CHANGE.split()
    assert sorted(Args.MAY_CHANGE.split()) == sorted([*theirs, "frames_dir"])


def test_an_actor_has_its_learners_policy():
    learner, actor = (Agent(small_views(), box(2), small_args(seed=seed), CPU) for seed in (1, 2))
    learner.normalizer.update(3 + 2 * torch.randn(100, 4))
    unpack_tensors(pack_tensors(learner.policy_tensors()), actor.policy_tensors())
    images, states = torch.randint(256, (5, 1, 2, 20, 20, 3), dtype=torch.uint8), torch.randn(5, 4)
    policies = []
    for agent in (learner, actor):
        mean, std = agent.actor(agent.encode(agent.observation(images, agent.normalizer(states))))
        policies.append(torch.cat([mean, std]))
    assert torch.equal(*policies)


def test_averages_are_evaluated_and_the_learned_policy_explores():
    agent = Agent(small_views(), box(2), small_args(), CPU)
    with torch.no_grad():
        for parameter in agent.ema_parameters:
            parameter.add_(0.1 * torch.randn(parameter.shape))
    images, states = torch.randint(256, (1, 1, 2, 20, 20, 3), dtype=torch.uint8), torch.randn(1, 4)
    seen, obs = Observation(images, states), {"images": images[0].numpy(), "state": states.numpy()}
    mean, _ = agent.ema_actor(sac_pixel_sim.Features(agent.ema_encoder(seen), states))
    assert_close(agent.act(obs, deterministic=True), mean.tanh()[0].detach())
    mean, std = agent.actor(sac_pixel_sim.Features(agent.encoder(seen), states))
    noise = torch.randn((1, 2), generator=torch.Generator().manual_seed(agent.args.seed))
    assert_close(agent.act(obs, deterministic=False), (mean + std * noise).tanh()[0].detach())


def test_a_batch_is_prepared(monkeypatch):
    """The first half of the frames is what was seen; states are scaled; images are shifted by 1/32 of their side."""
    agent = Agent(small_views(stack=2), box(2), small_args(frame_stack=2, augment=()), CPU)
    agent.normalizer.update(3 + 2 * torch.randn(100, 8))
    frames, (states, next_states) = torch.randint(256, (5, 4, 2, 20, 20, 3), dtype=torch.uint8), torch.randn(2, 5, 8)
    batch = agent.prepare(Batch(states, torch.zeros(5, 2), torch.zeros(5), next_states, torch.zeros(5)), frames)
    now, then = (batch.observations, frames[:, :2], states), (batch.next_observations, frames[:, 2:], next_states)
    for seen, images, raw in (now, then):
        assert torch.equal(seen.images, images) and torch.equal(seen.states, agent.normalizer(raw))
    shifts = []
    monkeypatch.setattr(vision, "augment", lambda images, kinds, padding, _: shifts.append((kinds, padding)) or images)
    for size in (20, 64, 128):
        agent.views, agent.args.augment = small_views(size), ("crop", "jitter")
        agent.augmented(frames)
    assert shifts == [(("crop", "jitter"), padding) for padding in (1, 2, 4)]


def test_divergence_is_named():
    """The task is not blamed for the actions of a policy that is NaN, and nothing of it is saved."""
    agent = Agent(small_views(), box(2), small_args(), CPU)
    agent.actor_parameters[0].data.fill_(np.nan)
    obs = {"images": np.zeros((1, 2, 20, 20, 3), np.uint8), "state": np.zeros((1, 4), np.float32)}
    for call in (lambda: agent.act(obs, deterministic=False), agent.state_dict):
        with pytest.raises(SystemExit, match="diverged; give a smaller --lr"):
            call()


def test_a_camera_has_an_encoder_of_its_own():
    agent = Agent(small_views(), box(2), small_args(), CPU)
    images = torch.randint(256, (1, 1, 2, 20, 20, 3), dtype=torch.uint8)
    features = agent.encoder(Observation(images, torch.zeros(1, 4)))
    images[:, :, 1] = 0
    other = agent.encoder(Observation(images, torch.zeros(1, 4)))
    assert torch.equal(features[:, :12], other[:, :12]) and not torch.equal(features[:, 12:], other[:, 12:])


def test_stacked_frames_are_told_apart():
    agent = Agent(small_views(stack=3), box(2), small_args(frame_stack=3), CPU)
    images, states = torch.randint(256, (1, 3, 2, 20, 20, 3), dtype=torch.uint8), torch.zeros(1, 12)
    one, other = (agent.encoder(Observation(x, states)) for x in (images, images.flip(1)))
    assert not torch.allclose(one, other)


def test_film_sees_the_state_that_it_is_given(monkeypatch):
    agent = Agent(small_views(stack=2), box(2), small_args(film="state", frame_stack=2), CPU)
    for film in agent.encoder.films:
        nn.init.normal_(film.scale.weight)
    images = torch.randint(256, (1, 2, 2, 20, 20, 3), dtype=torch.uint8)
    changed = []
    for i in range(8):  # states of two steps: gripper, then state (3,)
        states = torch.zeros(1, 8)
        states[0, i] = 1
        one, other = (agent.encoder(Observation(images, x)) for x in (states, torch.zeros(1, 8)))
        changed.append(not torch.equal(one, other))
    assert changed == [False, True, True, True] * 2


def test_actor_gradients_stop_at_the_features():
    agent = Agent(small_views(), box(2), small_args(bc_weight=1.0, demos="1", actor_ema=0.0), CPU)
    before, inputs = copies(agent.critic), random_inputs(agent)
    agent.step_critic = lambda: None
    actor = copies(agent.actor)
    agent.update_once(*inputs, with_actor=True)
    assert moved(before, agent.critic) == set() and moved(actor, agent.actor) == actor.keys()


def test_without_averaging_the_learned_policy_is_evaluated():
    """Its encoder, too, which the critics' step moves."""
    agent = Agent(small_views(), box(2), small_args(actor_ema=0.0), CPU)
    agent.update_once(*random_inputs(agent), with_actor=True)
    for mean, learned in ((agent.ema_actor, agent.actor), (agent.ema_encoder, agent.encoder)):
        assert all(torch.equal(*pair) for pair in zip(mean.parameters(), learned.parameters(), strict=True))


def test_imitation_trains_the_encoder_beside_the_critics():
    """The critics learn from their loss alone, the actor from its own."""
    options = {"demos": "1", "augment": ()}
    agent, without = (Agent(small_views(), box(2), small_args(**options, bc_weight=w), CPU) for w in (1.0, 0.0))
    inputs = random_inputs(agent)
    batch = prepared(agent, inputs)
    mean, _ = agent.actor(agent.encode(batch.observations))
    count = agent.num_demos
    distance = (mean[-count:].tanh() - batch.actions[-count:]).square().sum(1).mean()
    named = dict(agent.encoder.named_parameters(prefix="encoder"))
    added = dict(zip(named, torch.autograd.grad(distance, named.values()), strict=True))
    with_it, critics = gradients(agent, inputs), gradients(without, inputs)
    assert any(gradient.abs().max() > 1e-4 for gradient in added.values())
    for name, gradient in critics.items():
        if name.startswith(("critic.", "encoder.")):
            expected = gradient + sac_pixel_sim.ENCODER_IMITATION * added.get(name, 0)
            assert_close(with_it[name], expected, 1e-5)


def test_the_target_is_the_target_critics_on_the_one_encoder():
    """Q(s, a) is not asked for it; nothing of it reaches a gradient."""
    agent = Agent(small_views(), box(2), small_args(gamma=0.5, augment=()), CPU)
    batch, eps, subset = prepared(agent, random_inputs(agent)), torch.zeros(8, 2), torch.tensor([0, 1])
    actions, _ = agent.actor.sample(agent.encode(batch.next_observations), eps)
    values = agent.target_critic(agent.encode(batch.next_observations), actions).amin(0)
    assert_close(agent.target_q(batch, eps, subset), (batch.rewards + 0.5 * values).detach())
    target = agent.target_q(batch, eps, subset)
    with torch.no_grad():
        for parameter in agent.critic.parameters():
            parameter.mul_(1.5)
    assert torch.equal(agent.target_q(batch, eps, subset), target) and not target.requires_grad
    with torch.no_grad():
        for parameter in agent.target_critic.parameters():
            parameter.mul_(1.5)
    assert not torch.allclose(agent.target_q(batch, eps, subset), target)


def gradients(agent: Agent, inputs, with_actor: bool = True) -> dict[str, Tensor]:
    """Of all parameters, from one update that changes nothing."""
    agent.step_critic = agent.step_actor = lambda: None
    agent.update_once(*inputs, with_actor=with_actor)
    parts = ("encoder", "critic", "actor")
    named = [named for part in parts for named in getattr(agent, part).named_parameters(prefix=part)]
    return {name: parameter.grad.clone() for name, parameter in named} | {"alpha": agent.raw_alpha.grad.clone()}


@pytest.mark.parametrize(
    ("changes", "dropout"),
    [
        ({"grad_accum_steps": 4}, 0),
        ({"activation_checkpointing": True}, 0),
        ({"grad_accum_steps": 8}, 0),
        ({"threads": 2}, 0.3),
        ({"threads": 2, "grad_accum_steps": 2}, 0),
    ],
)
def test_ways_to_compute_the_same_gradients(changes, dropout):
    options = {"augment": (), "demos": "1", "batch_size": 16, "film": "state", "dropout": dropout}
    whole, other = (Agent(small_views(), box(2), small_args(**options | more), CPU) for more in ({}, changes))
    torch.set_num_threads(1)
    inputs = random_inputs(whole, 16)
    ours, theirs = gradients(whole, inputs), gradients(other, inputs)
    for name, gradient in ours.items():
        np.testing.assert_allclose(theirs[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max(), err_msg=name)


@pytest.mark.parametrize("reward", ["env", "vice"])
def test_losses_of_a_batch_in_parts_are_the_whole_batchs(reward):
    options = {"augment": (), "demos": "1", "batch_size": 16, "reward": reward}
    logged = []
    for grad_accum_steps in (1, 4):
        agent = Agent(small_views(), box(2), small_args(**options, grad_accum_steps=grad_accum_steps), CPU)
        agent.goals = torch.full((3, 1, *agent.views.frame_shape), 200, dtype=torch.uint8)
        logged.append(agent.update_once(*random_inputs(agent, 16), with_actor=True))
    whole, parts = logged
    assert whole.keys() == parts.keys()
    for name in whole.keys() - {"losses/vice_loss"}:  # mixes other images
        np.testing.assert_allclose(parts[name], whole[name], rtol=1e-4, err_msg=name)


def test_each_part_of_a_batch_has_its_share_in_the_classifiers_gradient():
    images, gradients = torch.zeros(4, 1, *small_views().frame_shape, dtype=torch.uint8), []
    for grad_accum_steps in (1, 4):
        options = {"reward": "vice", "demos": "1", "batch_size": 16, "grad_accum_steps": grad_accum_steps}
        agent = Agent(small_views(), box(2), small_args(**options), CPU)
        agent.goals = torch.full((3, *images.shape[1:]), 200, dtype=torch.uint8)
        agent.classifier_gradient(images)
        gradients.append([p.grad for p in agent.classifier.parameters()])
    for whole, part in zip(*gradients, strict=True):
        np.testing.assert_allclose(4 * part, whole, rtol=1e-4, atol=1e-6)
    assert any(whole.abs().max() > 1e-3 for whole in gradients[0])


class Flat(nn.Module):
    """In the place of an encoder: images are the features, as numbers."""

    frozen = False

    def __init__(self, *_):
        super().__init__()

    def forward(self, obs: Observation) -> Tensor:
        return obs.images.float().flatten(1) / 255


def flat_steps(views: Views, seed: int) -> list[np.ndarray]:
    """20 transitions in episodes of 5; the reward tells the seed."""
    rng, steps = np.random.default_rng(seed), []
    dtype = step_type(views.state_dim, 3, (1, *views.frame_shape))
    for number in range(24):
        obs = {"images": rng.integers(0, 256, (1, *views.frame_shape), np.uint8), "state": np.zeros((1, 0), np.float32)}
        action = rng.uniform(-1, 1, 3) if number % 6 else None
        steps.append(pack_step(dtype, action, obs, 10 * seed + rng.random(), number % 12 == 5))
    return steps


@pytest.mark.parametrize(
    "changes",
    [
        {"actor_ema": 0.75, "policy_delay": 2, "lr_warmup": 3, "lr_decay": 5, "num_qs": 3},
        {"backup_entropy": True, "dropout": 0.2, "bc_weight": 2.0, "demo_ratio": 0.25, "weight_decay": 0.1},
    ],
)
def test_learns_as_the_script_for_states(changes, monkeypatch, tmp_path):
    """Where the encoder is none."""
    monkeypatch.setattr(sac_pixel_sim, "Encoder", Flat)
    views = Views(("front",), 2, 1, {})
    options = {"demos": "1", "lr": 0.01, "gamma": 0.9, "normalize_observations": False} | changes
    ours = Agent(views, box(3), small_args(**options, augment=()), CPU)
    plain = {name: SMALL[name] for name in ("hidden_dims", "batch_size", "compile", "threads")}
    theirs = sac_state_sim.Agent(box(12), box(3), sac_state_sim.Args(**plain | options), CPU)
    for name in ("actor", "ema_actor", "critic", "target_critic"):
        getattr(theirs, name).load_state_dict(getattr(ours, name).state_dict())
    buffers = []
    for seed in (0, 1):
        file = FrameFile(tmp_path / f"{seed}.frames", views.frame_shape, CPU)
        buffers.append(FrameBuffer(20, views, 3, file, 3, 0.9))
        for step in flat_steps(views, seed):
            buffers[-1].add(step)
    delay, update_once = ours.args.policy_delay, ours.update_once

    def both(*inputs: Tensor, with_actor: bool) -> dict:
        batch, (frames, noise, subset) = Batch(*inputs[:5]), inputs[5:]
        assert (batch.rewards > 9).tolist() == [False] * (8 - ours.num_demos) + [True] * ours.num_demos
        obs, next_obs = (frames.flatten(2).float() / 255).unbind(1)
        batch = batch._replace(observations=obs, next_observations=next_obs)
        theirs.critic_updates += 1
        theirs.schedule_lr()
        theirs.ema_weight.fill_(max(1 - ours.args.actor_ema, delay / theirs.critic_updates))
        theirs.generator.set_state(ours.generator.get_state())
        assert with_actor == (theirs.critic_updates % delay == 0)
        expected = theirs.update_once(*batch, noise.transpose(0, 1), subset, with_actor=with_actor)
        got = update_once(*inputs, with_actor=with_actor)
        assert got.keys() == expected.keys()
        for name, value in got.items():
            assert_close(value, expected[name], 1e-4)
        return got

    ours.update_once = both
    ours.update(*buffers, 3)
    ours.update(*buffers, 1)
    for name in ("actor", "ema_actor", "critic", "target_critic"):
        expected = getattr(theirs, name).state_dict()
        for key, value in getattr(ours, name).state_dict().items():
            assert_close(value, expected[key], 1e-5)
    assert_close(ours.alpha, theirs.alpha.detach())
    assert not torch.equal(ours.alpha, Agent(views, box(3), small_args(), CPU).alpha)


# --- VICE and success classifiers -------------------------------------------------------------------------------------
def vice_agent(**changes) -> Agent:
    args = small_args(reward="vice", demos="1", demo_ratio=0.25, lr=3e-3)
    agent = Agent(small_views(), box(2), dataclasses.replace(args, **changes), CPU)
    agent.goals = torch.full((3, 1, *agent.views.frame_shape), 200, dtype=torch.uint8)
    return agent


def dark_inputs(agent: Agent):
    """Replay images are dark, and the last in the batch, from demonstrations, bright as the goals are."""
    inputs = random_inputs(agent)
    inputs[FRAMES][:6] //= 8
    inputs[FRAMES][6:] = 200
    return inputs


def test_vice_tells_goals_from_replay_and_rewards():
    agent = vice_agent()
    inputs = dark_inputs(agent)
    first = agent.update_once(*inputs, with_actor=True)
    for _ in range(150):
        last = agent.update_once(*inputs, with_actor=True)
    assert last["losses/vice_loss"] < first["losses/vice_loss"]
    images = torch.stack([inputs[FRAMES][0, 1:], agent.goals[0]])
    dark, bright = agent.classifier(Observation(images, None)).sigmoid()
    assert dark < 0.4 and bright > 0.6
    assert bright < 0.97  # smoothed labels are 0.9 and 0.1


def test_vice_compares_augmented_goals_with_what_followed():
    """In the transitions of its own, not in demonstrations."""
    agent = vice_agent()
    agent.goals[1:] = 100
    agent.augmented = lambda frames: frames // 2
    seen: list[Tensor] = []
    agent.classifier.encoder.register_forward_pre_hook(lambda _, given: seen.append(given[0].images))
    inputs = random_inputs(agent)
    agent.update_once(*inputs, with_actor=True)
    (goals, replay), *_ = [images.split(6) for images in seen if len(images) == 12]
    assert goals.unique().tolist() == [50, 100] and torch.equal(replay, inputs[FRAMES][:6, 1:] // 2)


def test_vice_rewards_replace_the_tasks(monkeypatch):
    agent, seen = vice_agent(), []
    target_q = agent.target_q
    monkeypatch.setattr(agent, "target_q", lambda batch, *rest: seen.append(batch) or target_q(batch, *rest))
    metrics = agent.update_once(*random_inputs(agent), with_actor=False)
    (batch,) = seen
    probability = agent.classifier(batch.next_observations).sigmoid()
    assert_close(batch.rewards, probability.detach())
    assert_close(metrics["losses/vice_reward"], probability.detach().mean())


def test_vice_trains_the_classifier_only_and_only_with_the_actor():
    agent = vice_agent()
    inputs, before = random_inputs(agent), copies(agent.classifier)
    agent.update_once(*inputs, with_actor=False)
    assert moved(before, agent.classifier) == set()
    agent.classifier_optimizer.zero_grad()
    critic = copies(agent.critic, agent.actor)
    agent.step_critic = agent.step_actor = lambda: None
    agent.update_once(*inputs, with_actor=True)
    assert moved(before, agent.classifier) == before.keys() and moved(critic, agent.critic, agent.actor) == set()


def test_gradient_penalty_pulls_the_slope_towards_one(monkeypatch):
    slopes = []
    for penalty in (0.0, 10.0):
        monkeypatch.setattr(sac_pixel_sim, "GRADIENT_PENALTY", penalty)
        agent = vice_agent()
        inputs = dark_inputs(agent)
        for _ in range(100):
            agent.update_once(*inputs, with_actor=True)
        images = torch.cat([inputs[FRAMES][:4, 1:], agent.goals])
        features = agent.classifier.encoder(Observation(images, None)).detach()
        features = (0.5 * (features[:3] + features[4:])).requires_grad_()
        (slope,) = torch.autograd.grad(agent.classifier.logit(features).sum(), features)
        slopes.append(slope.norm(dim=1).mean().item())
    assert abs(slopes[1] - 1) < 0.3 < abs(slopes[0] - 1)


def test_label_smoothing_and_mixup_change_the_loss_as_they_should(monkeypatch):
    """A classifier that says p everywhere has a loss that is known, whatever is mixed and smoothed."""
    agent = vice_agent()
    agent.classifier.logit = lambda features: features.sum(1) * 0 + 2
    loss = agent.classifier_gradient(torch.zeros(6, 1, *agent.views.frame_shape))["losses/vice_loss"]
    assert loss == pytest.approx(0.5 * (math.log1p(math.exp(-2)) + math.log1p(math.exp(2))), abs=1e-5)
    # One whose logit follows the share of goal in a mixture: labels that are smoothed by s raise its loss by what
    # they are off, times the logit.
    losses, logits = [], []
    for smoothing in (0.0, 0.4):
        monkeypatch.setattr(sac_pixel_sim, "LABEL_SMOOTHING", smoothing)
        agent = vice_agent()
        agent.classifier.encoder = MeanImage()
        scale = nn.Parameter(torch.tensor(1.0))

        def logit(features, scale=scale):
            logits.append((features.squeeze(1) - 100) * scale / 10)
            return logits[-1]

        agent.classifier.logit = logit
        images = torch.zeros(400, 1, *agent.views.frame_shape, dtype=torch.uint8)
        losses.append(agent.classifier_gradient(images)["losses/vice_loss"].item())
    shares = logits[0] / 20 + 0.5  # of goal, in each mixture
    assert shares.min() < 0.3 and shares.max() > 0.7 and ((shares > 0.01) & (shares < 0.99)).any()
    assert 0 < losses[0] < losses[1]
    assert losses[1] - losses[0] == pytest.approx(0.4 * ((shares - 0.5) * logits[0]).mean().item(), abs=1e-3)
    # The slope is penalised somewhere between the two halves.
    one, other = (half.detach() for half in logits[0].chunk(2))
    weights = ((logits[1].detach() - other) / (one - other))[(one - other).abs() > 0.1]
    assert weights.min() < 0.1 and weights.max() > 0.9 and weights.mean() == pytest.approx(0.5, abs=0.1)


class MeanImage(nn.Module):
    def forward(self, obs: Observation) -> Tensor:
        return obs.images.float().flatten(1).mean(1, keepdim=True)


# --- Runs -------------------------------------------------------------------------------------------------------------
TINY = "--env-id probe_envs:PixelPoint-v0 --image-size 32 --small-channels 4 6 --latent-dim 16 --hidden-dims 32 32"
TINY += " --batch-size 16 --utd-ratio 1 --demos 2 --threads 1 --buffer-size 1000 --learning-starts 50"
TINY += " --eval-every 100 --eval-episodes 1 --final-eval-episodes 2 --no-capture-video"


def run(*flags: object, cwd: Path, timeout: float = 600, **options):
    """The script with small networks and budgets; later flags win."""
    return run_forked(SCRIPT, *TINY.split(), *flags, cwd=cwd, env=TASKS, timeout=timeout, **options)


def checkpoint(run_dir: Path) -> dict:
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def stored_frames(run_dir: Path, name: str = "replay", folder: Path | None = None) -> Tensor:
    """The frames (N, 2, T, K, H, W, 3) of all transitions of a finished run, in their order in the buffer."""
    args = sac_pixel_sim.setup.read_flags(Args, str(run_dir), "--resume")
    wrapped = wrap_env(make_env(args), args)
    shape = views_of(wrapped).frame_shape
    file_name = f"{run_dir.parent.name}-{run_dir.name}-{name}.frames"
    path = folder / file_name if folder else run_dir / f"{name}.frames"
    state = checkpoint(run_dir)["buffer" if name == "replay" else "demos"]
    file = FrameFile(path, shape, CPU)
    file.load_state_dict(state["frames"])
    return file.get(state["windows"])


def leaves(tree: object, path: str = "") -> dict[str, object]:
    """All that a checkpoint holds, but for times and for where frames lie."""
    places = ("elapsed", "best", "windows", "newest_windows", "frames")
    if isinstance(tree, list) and any(isinstance(item, Tensor) for item in tree):
        tree = dict(enumerate(tree))
    if isinstance(tree, dict):
        return {
            name: leaf for k, v in tree.items() if k not in places for name, leaf in leaves(v, f"{path}/{k}").items()
        }
    return {path: tree}


def differences(one: Path, other: Path, folder: Path | None = None) -> list[str]:
    """Names of what differs between two finished runs: tables, checkpoints, and the frames that belong to them."""
    ours, theirs = (leaves(checkpoint(run_dir)) for run_dir in (one, other))
    assert ours.keys() == theirs.keys()
    same = {k: torch.equal(v, theirs[k]) if isinstance(v, Tensor) else v == theirs[k] for k, v in ours.items()}
    for name in ("replay", "demonstrations"):
        same[name] = torch.equal(*(stored_frames(run_dir, name, folder) for run_dir in (one, other)))
    for table in ("train.csv", "eval.csv"):
        ours, theirs = read_csv(one, table), read_csv(other, table)
        for column in ours:
            if column not in ("wall_s", "charts/SPS") and not column.startswith("time/"):
                same[f"{table} {column}"] = repr(ours[column]) == repr(theirs[column])  # NaN is NaN
    return [name for name, equal in same.items() if not equal]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--frame-stack 2 --action-chunk 3 --buffer-size 50 --dropout 0.1 --film state --augment crop jitter flip"
        " --n-step 3",
        "--reward vice --frames-dir frames --pooling softmax",
    ],
    ids=["plain", "everything-and-wrap-around", "vice-and-frames-in-another-place"],
)
def test_resume_is_exact(tmp_path, flags):
    """Stopped by Ctrl-C twice, a run ends as one that was not."""
    flags = [*flags.split(), "--total-timesteps", 300]
    run(*flags, "--run-dir", "whole", cwd=tmp_path)
    stopped, command = 0, [*TINY.split(), *flags, "--run-dir", "parts"]
    for rows in (2, 4):
        with popen_forked(SCRIPT, *command, cwd=tmp_path, env=TASKS) as process:
            table = tmp_path / "parts" / "train.csv"
            wait_until(
                lambda t=table, n=rows: (t.exists() and t.read_text().count("\n") > n) or not process.is_alive(), 600
            )
            os.kill(process.pid, signal.SIGINT)
            process.join(600)
        stopped += "stopped; go on with --resume" in process.stderr_path.read_text()
        command = ["--resume", "parts"]
    assert stopped >= 1
    run_forked(SCRIPT, "--resume", "parts", cwd=tmp_path, env=TASKS, timeout=600)
    folder = tmp_path / "frames" if "frames" in flags else None
    assert differences(tmp_path / "whole", tmp_path / "parts", folder) == []
    columns = read_csv(tmp_path / "parts", "train.csv")
    assert columns["global_step"] == [50, 100, 150, 200, 250, 300]
    assert all(map(math.isfinite, columns["losses/critic_loss"][1:]))
    if "vice" in flags:
        assert 0 < columns["losses/vice_reward"][-1] < 1 and math.isfinite(columns["losses/vice_loss"][-1])


@pytest.mark.timeout(1200)
def test_kill_at_any_moment(tmp_path):
    """Killed at ten moments, also inside a checkpoint, images and wrap-around included: it always goes on, and ends as
    if nothing had been."""
    flags = ("--total-timesteps", 600, "--eval-every", 10, "--buffer-size", 120)
    run(*flags, "--run-dir", "whole", cwd=tmp_path)
    generator, moments, finished, allowed = np.random.default_rng(0), 0, False, set()
    while moments < 10 and not finished:
        resume = ("--resume", "run") if (tmp_path / "run").exists() else (*TINY.split(), *flags, "--run-dir", "run")
        with popen_forked(SCRIPT, *resume, cwd=tmp_path, env=TASKS) as process:
            started = lambda: (tmp_path / "run" / "checkpoint.pt").exists() or not process.is_alive()  # noqa: E731
            wait_until(started)
            process.join(float(generator.uniform(0.3, 1.5)))
            process.kill()
        saved = (tmp_path / "run" / "checkpoint.pt").exists()  # not between a checkpoint's two renames
        state = checkpoint(tmp_path / "run")["run"] if saved else {"finished": False, "step": 0}
        finished = state["finished"]
        if not finished:
            assert process.exitcode == -signal.SIGKILL, process.stderr_path.read_text()
            moments += 1
            if state["step"] == 600:  # it begins an episode, and then sees that only an evaluation is left
                allowed = {"/buffer/newest/", "/buffer/open"}
    assert moments > 1
    if not finished:
        run_forked(SCRIPT, "--resume", "run", cwd=tmp_path, env=TASKS, timeout=600)
    assert set(differences(tmp_path / "whole", tmp_path / "run")) <= allowed


def test_a_run_shows_its_work(tmp_path):
    result = run("--total-timesteps", 120, "--capture-video", "--run-dir", "run", cwd=tmp_path)
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"args.json", SCRIPT, "train.csv", "eval.csv", "checkpoint.pt", "curve.png", "video.mp4"} <= files
    assert "replay: 120 transitions of 2 x 32 x 32 pixels" in result.stdout
    state = checkpoint(tmp_path / "run")
    assert state["buffer"]["total"] == 120 and state["demos"]["total"] > 10
    (tmp_path / "run" / "replay.frames").unlink()  # evaluation needs no frames
    evaluated = run_forked(SCRIPT, "--eval-only", "run", cwd=tmp_path, env=TASKS)
    last = next(line for line in result.stdout.splitlines() if line.startswith("last: "))
    assert last.removeprefix("last: ") in evaluated.stdout
    result = run_forked(SCRIPT, "--resume", "run", "--total-timesteps", 140, cwd=tmp_path, env=TASKS, check=False)
    line = result.stderr.splitlines()[-1]
    assert result.returncode == 1 and "run/replay.frames: has 0 bytes of" in line
    assert "bring the whole file back" in line


def test_a_run_goes_on_for_longer_than_it_was_meant_to(tmp_path):
    """The buffer, made for 60 steps, gets room for 200."""
    run("--total-timesteps", 60, "--run-dir", "run", cwd=tmp_path)
    run_forked(SCRIPT, "--resume", "run", "--total-timesteps", 200, cwd=tmp_path, env=TASKS)
    frames = stored_frames(tmp_path / "run")
    assert len(frames) == 200
    continues = checkpoint(tmp_path / "run")["buffer"]["columns"][-1]
    assert all(torch.equal(frames[i, 1], frames[i + 1, 0]) for i in range(199) if continues[i + 1])
    assert 0 < (~continues).sum() < 30


def test_recorded_dataset_becomes_demonstrations(tmp_path):
    run("--total-timesteps", 60, "--record-dataset", "pixels/point-v0", cwd=tmp_path)
    flags = ("--demos", "pixels/point-v0", "--total-timesteps", 60, "--run-dir", "learned")
    run(*flags, cwd=tmp_path)
    assert checkpoint(tmp_path / "learned")["demos"]["total"] > 20
    other = run(*flags[:-1], "other", "--env-id", "probe_envs:OtherCameras-v0", cwd=tmp_path, check=False)
    assert other.returncode == 1 and "--demos pixels/point-v0: is not of this task" in other.stderr.splitlines()[-1]
    assert "'wrist'" in other.stderr and "'side'" in other.stderr


def detector_file(path: Path, bias: float, cameras: tuple[str, ...] = ("front", "wrist")) -> str:
    """A file of reward_classifier.py that sees success always, or with a negative `bias` never."""
    classifier = SuccessClassifier(cameras, 32)
    torch.nn.init.constant_(classifier.together[-1].weight, 0.0)
    classifier.together[-1].bias.data = torch.tensor([0.0, bias])
    fingerprint = {"observations": {camera: [32, 32, 3] for camera in cameras}}
    torch.save(SuccessDetector(classifier, 0.5, 2, fingerprint, {}).contents(), path)
    return str(path)


@pytest.mark.parametrize(("bias", "rewards"), [(50.0, [1.0] * 5), (-50.0, [0.0] * 5)])
def test_a_file_of_reward_classifier_gives_rewards(tmp_path, bias, rewards):
    """Ends and success of the episodes stay the task's."""
    flags = {"env_id": "probe_envs:PixelPoint-v0", "image_size": 32}
    plain = small_args(**flags)
    args = small_args(**flags, reward=detector_file(tmp_path / "c.pt", bias))
    results = []
    for one in (args, plain):
        env = wrap_env(make_env(one), one)
        env.reset(seed=3)
        results.append([env.step(np.zeros(env.action_space.shape, np.float32))[1:] for _ in range(5)])
    assert [step[0] for step in results[0]] == rewards
    assert [step[1:3] for step in results[0]] == [step[1:3] for step in results[1]]
    assert [step[3].get("success") for step in results[0]] == [step[3].get("success") for step in results[1]]


def test_a_run_with_a_file_of_reward_classifier(tmp_path):
    """It goes on, and is evaluated, as any other; its buffer holds the classifier's rewards."""
    run("--total-timesteps", 70, "--reward", detector_file(tmp_path / "c.pt", 50.0), "--run-dir", "run", cwd=tmp_path)
    run_forked(SCRIPT, "--resume", "run", "--total-timesteps", 80, cwd=tmp_path, env=TASKS)
    rewards = checkpoint(tmp_path / "run")["buffer"]["columns"][REWARDS]
    assert rewards.tolist() == [1.0] * 80
    result = run_forked(SCRIPT, "--eval-only", "run", cwd=tmp_path, env=TASKS)
    assert "checkpoint: eval/success_rate" in result.stdout


def test_files_that_give_no_rewards(tmp_path):
    """A run with vice keeps its classifier to itself; a hostile file is not executed."""
    agent = Agent(small_views(), box(2), small_args(reward="vice"), CPU)
    torch.save({"agent": agent.state_dict()}, tmp_path / "checkpoint.pt")
    write_pickle(tmp_path / "hostile.pt", Malicious(tmp_path / "marker"), 2)
    for name in ("checkpoint.pt", "hostile.pt"):
        args = small_args(env_id="probe_envs:PixelPoint-v0", reward=str(tmp_path / name))
        with pytest.raises(SystemExit, match=f"--reward {tmp_path}/{name}: no .*; reward_classifier.py trains one"):
            wrap_env(make_env(args), args)
    assert not (tmp_path / "marker").exists()


def test_a_file_of_reward_classifier_for_other_cameras_is_refused(tmp_path):
    path = detector_file(tmp_path / "c.pt", 1.0, ("front", "side"))
    args = small_args(env_id="probe_envs:PixelPoint-v0", image_size=32, reward=path)
    with pytest.raises(SystemExit, match="--reward .*: was trained on other pictures: observations.side is only there"):
        wrap_env(make_env(args), args)


def test_learns_actions_that_follow_the_image(tmp_path):
    """The best action, +0.6 or -0.6, stands in the image alone."""
    flags = "--env-id probe_envs:GreyImages-v0 --demos 0 --total-timesteps 1200 --eval-every 2000 --gamma 0.5"
    flags += " --lr 3e-3 --utd-ratio 2 --actor-ema 0.99 --run-dir run --image-size 20"
    run(*flags.split(), cwd=tmp_path)
    assert read_csv(tmp_path / "run", "eval.csv")["eval/episodic_return"][-1] > -0.05  # doing nothing: -0.36


def free_port() -> int:
    """A port with a free one above it."""
    while True:
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            with contextlib.suppress(OSError):
                other.bind(("127.0.0.1", one.getsockname()[1] + 1))
                return one.getsockname()[1]


def test_learner_and_actors(tmp_path):
    """Steps with images cross the wire and the actors' journals unharmed; two actors' frames are kept apart."""
    flags = [*TINY.split(), "--demos", 0, "--address", f"127.0.0.1:{free_port()}"]
    learner = [*flags, "--role", "learner", "--run-dir", "learner", "--total-timesteps", 240]
    actor = [*flags, "--role", "actor", "--total-timesteps", 240, "--run-dir"]
    with (
        popen_script(SCRIPT, *actor, "one", cwd=tmp_path, env=TASKS) as one,
        popen_script(SCRIPT, *actor, "two", cwd=tmp_path, env=TASKS) as two,
    ):
        for name in ("one", "two"):  # both have begun, and wait for the learner after 100 steps
            wait_until(lambda name=name: [*(tmp_path / name).glob("journal/*.records")], 600)
        run_script(SCRIPT, *learner, cwd=tmp_path, env=TASKS)
        for process in (one, two):
            assert process.wait(120) == 0, process.stderr_path.read_text()
    state, frames = checkpoint(tmp_path / "learner"), stored_frames(tmp_path / "learner")
    assert state["buffer"]["total"] == 240 and state["agent"]["critic_updates"] == 240 - 50
    views = Views(("front", "wrist"), 32, 1, {"state": (0, 2)})
    dtype = step_type(views.state_dim, 3, (1, *views.frame_shape))
    sent = []  # (observation's frame, action, next frame) of what the actors journalled
    for name in ("one", "two"):
        data = b"".join(path.read_bytes() for path in sorted((tmp_path / name / "journal").glob("*.records")))
        steps = np.frombuffer(data, dtype)
        assert len(data) < len(steps) * (2 * 32 * 32 * 3 + 64)  # 3 bytes per pixel
        sent += [(b, a) for b, a in zip(steps[:-1], steps[1:]) if not a["first"]]
    for window, action in zip(frames, state["buffer"]["columns"][1]):
        before, after = next(pair for pair in sent if np.array_equal(pair[1]["action"], action))
        assert np.array_equal(window[0], before["frames"]) and np.array_equal(window[1], after["frames"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--env-id Pendulum-v1", "--env-id Pendulum-v1: observes no images; use sac_state_sim.py, or --cameras render"),
        ("--cameras front top", "--cameras top: probe_envs:PixelPoint-v0 has front wrist"),
        ("--image-size 6", "--image-size 6: too small for --encoder small with --pooling embeddings"),
        ("--encoder resnet10 --image-size 16", "--image-size 16: too small for --encoder resnet10"),
        ("--pretrained nowhere.pkl --encoder resnet10 --image-size 64", "--pretrained nowhere.pkl: refused: "),
        ("--reward vice --demos 0", "--reward vice: has no goal images"),
        ("--reward vice --demo-ratio 1", "--demo-ratio 1.0: --reward vice also learns from what is no demonstration"),
        ("--dropout 1", "--dropout 1: drops everything"),
        ("--learning-starts 60", "--total-timesteps 60: learning starts after 60; give more"),
        ("--reward vice --n-step 3", "--n-step 3: --reward vice knows the rewards of single steps only"),
        ("--reward nowhere.pt", "--reward nowhere.pt: not there; reward_classifier.py trains one"),
        ("--film gripper", "--film gripper: the observation has no such state, only: state"),
        ("--grad-accum-steps 3", "--grad-accum-steps 3: must divide --batch-size"),
        ("--small-channels 4 0", "--small-channels (4, 0): give one number or more, each at least 1"),
        ("--demos nowhere/point-v0", "--demos nowhere/point-v0: "),
        ("--env-id probe_envs:NoOpenGL-v0", "Images need OpenGL, run: apt-get install -y libegl1"),
    ],
)
def test_bad_input(tmp_path, flags, words):
    result = run(*flags.split(), "--total-timesteps", 60, cwd=tmp_path, check=False)
    assert result.returncode == 1
    assert words in result.stderr.splitlines()[-1] and "Traceback" not in result.stderr
    assert not (tmp_path / "runs").exists()


def test_without_mujoco(tmp_path):
    """R7: where MuJoCo cannot be imported one line says so, and a task without it trains."""
    flags = [*TINY.split(), "--demos", 0, "--total-timesteps", 60, "--run-dir", "run"]
    result = run_script(SCRIPT, *flags, cwd=tmp_path, env=TASKS | {"MUJOCO_GL": "foo"})
    assert "Traceback" not in result.stderr and "MUJOCO_GL=foo does not load" in result.stderr
    assert checkpoint(tmp_path / "run")["run"]["step"] == 60


@pytest.mark.parametrize("flags", ["FrankaPickCube-v0", "Hopper-v5 --cameras render --demos 0"])
def test_without_opengl_the_message_names_the_package(tmp_path, flags):
    gl = {"MUJOCO_GL": "glfw"}  # without a display
    result = run_forked(SCRIPT, "--env-id", *flags.split(), cwd=tmp_path, env=gl, check=False)
    last = result.stderr.splitlines()[-1]
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert last.startswith("sac_pixel_sim.py: --env-id") and "apt-get install -y libegl1" in last


@pytest.mark.parametrize(
    "flags", ["FrankaPickCube-v0", "FrankaPegInsert-v0 --film state", "Hopper-v5 --cameras render --demos 0"]
)
def test_rendered_tasks(tmp_path, flags):
    """With OpenGL: the Franka's cameras, and the picture of a task that has no images of its own."""
    flags = ("--env-id", *flags.split(), "--image-size", 24, "--total-timesteps", 60, "--run-dir", "run")
    flags += ("--eval-every", 1000, "--final-eval-episodes", 1)
    result = run_forked(SCRIPT, *TINY.split(), *flags, cwd=tmp_path)
    cameras = 1 if "Hopper-v5" in flags else 2
    assert f"60 transitions of {cameras} x 24 x 24 pixels" in result.stdout
    frames = np.fromfile(tmp_path / "run" / "replay.frames", np.uint8).reshape(-1, cameras, 24, 24, 3)[:60]
    assert frames.std((2, 3, 4)).min() > 5 and frames.astype(int).std(0).max() > 5  # something is seen, and it moves


# --- GPU --------------------------------------------------------------------------------------------------------------
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("encoder", ["small", "resnet10", "mobilenet"])
@pytest.mark.parametrize(
    "changes", [{}, {"reward": "vice", "augment": ("crop", "jitter", "blur", "flip"), "amp": True}]
)
def test_graphed_updates_on_a_gpu(encoder, changes, tmp_path):
    """Compiled and graphed updates do what plain ones do, on frames that lie on the GPU."""
    if encoder == "mobilenet":
        fit_torchvision()
    device, views = torch.device("cuda"), small_views(40)
    options = {"encoder": encoder, "image_size": 40, "augment": (), "demos": "1"}
    options |= {"policy_delay": 2, **changes}
    agents = [Agent(views, box(2), small_args(**options, compile=compiled), device) for compiled in (True, False)]
    losses, before = ([], []), copies(agents[0].critic, agents[0].actor)
    for agent, lot in zip(agents, losses):
        generator, folder = np.random.default_rng(0), run_stub(tmp_path)
        buffer, demos = agent.make_buffer("replay", 300, folder, 310), agent.make_buffer("demos", 50, folder, 60)
        agent.goals = torch.full((3, 1, *views.frame_shape), 200, dtype=torch.uint8, device=device)
        assert buffer.frames.on_gpu is not None
        for i in range(200):
            images = generator.integers(0, 256, (1, *views.frame_shape), np.uint8)
            obs = {"images": images, "state": generator.standard_normal((1, 4), np.float32)}
            step = pack_step(agent.step_type, None if i == 0 else generator.standard_normal(2), obs, float(i % 3))
            buffer.add(step)
            if i <= 50:
                demos.add(step)
        for _ in range(30):
            lot.append(float(agent.update(buffer, demos, 1)["losses/critic_loss"]))
    assert len(agents[0].update_once.graphs) == 2
    agents[1].load_state_dict(agents[0].state_dict())
    acted = [[agent.act(obs, deterministic=True) for _ in range(3)][-1] for agent in agents]
    np.testing.assert_allclose(*acted, atol=1e-2)
    assert not np.allclose(*(agents[0].act(obs, deterministic=False) for _ in range(2)))
    assert all(map(math.isfinite, losses[0])) and len(set(losses[0][-15:])) == 15  # a fresh batch each time
    assert moved(before, agents[0].critic, agents[0].actor) == before.keys()
    if not changes:  # whose random numbers a graph draws in another order
        assert losses[0] == pytest.approx(losses[1], rel=0.1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_run_on_a_gpu(tmp_path):
    """As a user: trains with graphs, resumes there, and its checkpoint is evaluated on a CPU."""
    env = TASKS | {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")}
    flags = [*TINY.split(), "--run-dir", "run", "--amp"]
    run_script(SCRIPT, *flags, "--total-timesteps", 100, cwd=tmp_path, env=env, timeout=280)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["gpu"]
    run_script(SCRIPT, "--resume", "run", "--total-timesteps", 150, cwd=tmp_path, env=env, timeout=280)
    columns = read_csv(tmp_path / "run", "train.csv")
    assert columns["global_step"] == [50, 100, 150] and all(map(math.isfinite, columns["losses/critic_loss"][1:]))
    run_script(SCRIPT, "--eval-only", "run", cwd=tmp_path, env=TASKS)  # without the GPU


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"reward": "vice", "amp": True, "grad_accum_steps": 2, "num_qs": 3},
        {"encoder": "resnet10", "image_size": 40, "activation_checkpointing": True},
    ],
)
def test_what_a_gpu_compiles_is_whole_and_compiled_before_it_is_captured(changes):
    """No graph breaks, and nothing is compiled anew after the updates that `replay` runs before it captures one."""
    views = small_views(changes.get("image_size", 20))
    agent = Agent(views, box(2), small_args(demos="1", policy_delay=2, **changes), CPU)
    agent.goals = random_inputs(agent)[FRAMES][:, :1]
    whole = partial(torch.compile, backend="aot_eager", fullgraph=True)
    for name in ("target_q", "critic_loss", "actor_loss"):
        setattr(agent, name, whole(getattr(agent, name)))
    agent.encode = whole(agent.encode)
    for i in range(3 * agent.args.policy_delay + 4):
        with torch._dynamo.config.patch(error_on_recompile=i >= 3 * agent.args.policy_delay):
            metrics = agent.update_once(*random_inputs(agent, seed=i), with_actor=i % agent.args.policy_delay == 1)
    assert math.isfinite(metrics["losses/actor_loss"])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")
def test_compiled_losses_are_the_eager_ones():
    agent = Agent(small_views(), box(2), small_args(augment=(), demos="1"), CPU)
    inputs = random_inputs(agent)
    eager = gradients(agent, inputs)
    for name in ("target_q", "critic_loss", "actor_loss"):
        setattr(agent, name, torch.compile(getattr(agent, name)))
    agent.encode = torch.compile(agent.encode)
    for name, gradient in gradients(agent, inputs).items():
        assert (gradient - eager[name]).abs().max() <= 1e-4 * eager[name].abs().max(), name


# --- README -----------------------------------------------------------------------------------------------------------
def test_images_change_no_loop():
    """`diff` shows that acting, learning and sending are as they are from states."""
    differing = {}
    for name in ("train", "learner", "actor"):
        ours, theirs = (inspect.getsource(getattr(script, name)) for script in (sac_pixel_sim, sac_state_sim))
        differing[name] = len(set(ours.splitlines()) - set(theirs.splitlines()))
    assert differing == {"train": 1, "learner": 0, "actor": 1}  # an evaluation loads no frames; an agent's arguments


def test_readme_says_how_long_the_diff_is():
    command = ["diff", "sac_state_sim.py", "sac_pixel_sim.py"]
    diff = subprocess.run(command, cwd=REPO, capture_output=True, text=True).stdout
    changed = {sign: sum(line.startswith(sign) for line in diff.splitlines()) for sign in "<>"}
    readme = (REPO / "README.md").read_text()
    diff_size = r"`diff sac_state_sim.py sac_pixel_sim.py` drops ([\d,]+) lines and adds ([\d,]+) lines"
    stated = re.search(diff_size, readme)
    assert stated and [int(number.replace(",", "")) for number in stated.groups()] == [changed["<"], changed[">"]]
