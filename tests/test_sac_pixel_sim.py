"""sac_pixel_sim.py: what images add, against SERL's arrays, numbered frames, cases by hand, and as a user."""

import dataclasses
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import probe_envs
import pytest
import torch
from conftest import REPO, popen_script, read_csv, run_script, script_env, wait_until
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
from test_sac_distributed import finish, free_port
from test_vision import Malicious
from torch import Tensor, nn

import sac_pixel_sim
from common import vision
from common.vision import MobileNetTrunk, ResNetTrunk, SpatialEmbeddings, Standardize
from sac_pixel_sim import (
    Agent,
    Args,
    Bottleneck,
    Classifier,
    FrameBuffer,
    Layout,
    Observation,
    allocate_frames,
    make_env,
    transition,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
SCRIPT, CPU = "sac_pixel_sim.py", torch.device("cpu")
TASKS = {"PYTHONPATH": str(Path(probe_envs.__file__).parent)}
SMALL = {"hidden_dims": (16, 16), "batch_size": 8, "demos": 0, "compile": False, "threads": 1, "latent_dim": 12}
SMALL |= {"small_channels": (4, 6), "proprio_dim": 5, "image_size": 20}


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


def small_layout(size: int = 20, stack: int = 1, cameras: tuple[str, ...] = ("front", "wrist")) -> Layout:
    return Layout(cameras, size, {"gripper": (0, 1), "state": (1, 4)}, stack)


def box(action_dim: int) -> gym.spaces.Box:
    return gym.spaces.Box(-1, 1, (action_dim,), np.float32)


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
    head = Agent(small_layout(), box(2), small_args(pooling="average"), CPU).critic.encoder.heads[0]
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
    args = small_args(encoder="resnet10", pretrained=str(path), image_size=64, latent_dim=24, proprio_dim=64)
    args = dataclasses.replace(args, hidden_dims=(32, 32), activation="tanh", num_qs=3, normalize_observations=False)
    layout = Layout(("front", "wrist"), 64, {"state": (0, 5)}, 1)
    agent = Agent(layout, box(4), args, CPU)
    for k, camera in enumerate(layout.cameras):
        pool, bottleneck = SpatialEmbeddings(64, 2, 2, 4), Bottleneck(256, 24)  # with 4 embeddings, not 8
        agent.critic.encoder.heads[k] = nn.Sequential(pool, bottleneck)
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
    seen = Observation(agent.trunk_maps(torch.from_numpy(frames)), states[:, 0])
    obs = agent.critic.encode(seen)
    mean, std = agent.actor(obs)
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
    assert all(parameter.grad is None for parameter in agent.critic.parameters())
    packed = agent.layout.pack(states[:, 0], torch.from_numpy(frames))
    agent.mean_encoder, agent.mean_actor = agent.critic.encoder, agent.actor
    assert_close(agent.act(packed[1].numpy(), deterministic=True), np.tanh(encoders["drq/out/mean"][1]))


# --- Images -----------------------------------------------------------------------------------------------------------
def test_pack_and_unpack_are_each_others_reverse():
    layout = small_layout(stack=3)
    states, frames = torch.randn(5, 12), torch.randint(256, (5, 3, 2, 20, 20, 3), dtype=torch.uint8)
    packed = layout.pack(states, frames)
    assert packed.shape == (5, 3 * layout.step_dim) and packed.isfinite().all()
    for ours, theirs in zip(layout.unpack(packed), (states, frames)):
        assert torch.equal(ours, theirs)
    white = layout.pack(states, torch.full_like(frames, 255))
    assert white.isfinite().all() and torch.equal(layout.unpack(white)[1], torch.full_like(frames, 255))


def pixel_env(**changes):
    options = {"env_id": "probe_envs:PixelPoint-v0", "image_size": 32, "small_channels": (4,)}
    return make_env(Args(**options | changes))


def test_make_env_packs_states_and_images():
    env, plain = pixel_env(), gym.make("probe_envs:PixelPoint-v0")
    layout = env.observation_space
    assert (layout.cameras, layout.columns, layout.size) == (("front", "wrist"), {"state": (0, 2)}, 32)
    packed, obs = env.reset(seed=3)[0], plain.reset(seed=3)[0]
    assert packed.shape == env.observation_space.shape and packed.dtype == np.float32
    for _ in range(3):
        states, frames = layout.unpack(torch.from_numpy(packed)[None])
        assert np.array_equal(states[0], np.float32(obs["state"]))
        assert np.array_equal(frames[0, 0, 0], obs["front"]) and np.array_equal(frames[0, 0, 1], obs["wrist"])
        action = np.float32([0.5, -0.5, 0])
        packed, obs = env.step(action)[0], plain.step(2 * action)[0]


def test_one_camera_and_a_stack_of_frames():
    env = pixel_env(cameras=("wrist",), frame_stack=3)
    plain = gym.make("probe_envs:PixelPoint-v0")
    layout = env.observation_space
    seen = [plain.reset(seed=3)[0]["wrist"]] * 3
    packed = env.reset(seed=3)[0]
    for _ in range(4):
        assert np.array_equal(layout.unpack(torch.from_numpy(packed)[None])[1][0, :, 0], seen[-3:])
        packed = env.step(np.float32([0.5, -0.5, 0]))[0]
        seen.append(plain.step(np.float32([1, -1, 0]))[0]["wrist"])


def test_images_are_resized_by_area():
    env = pixel_env(image_size=8)
    frame = gym.make("probe_envs:PixelPoint-v0").reset(seed=1)[0]["front"].astype(float)
    small = env.observation_space.unpack(torch.from_numpy(env.reset(seed=1)[0])[None])[1][0, 0, 0]
    assert np.abs(frame.reshape(8, 4, 8, 4, 3).mean((1, 3)) - small.numpy()).max() <= 0.5


def test_grey_images_of_another_shape_without_states():
    env = make_env(Args(env_id="probe_envs:GreyImages-v0", image_size=20, demos=0, small_channels=(4,)))
    states, frames = env.observation_space.unpack(torch.from_numpy(env.reset(seed=1)[0])[None])
    assert states.shape == (1, 0) and frames.shape == (1, 1, 1, 20, 20, 3)
    assert frames.max() > 200 and torch.equal(frames[..., 0], frames[..., 2])


# --- Replay buffer ----------------------------------------------------------------------------------------------------
def numbered_layout(stack: int) -> Layout:
    return Layout(("a", "b"), 4, {"state": (0, 3)}, stack)


def new_buffer(layout: Layout, capacity: int, frames: int, folder: Path | None = None) -> FrameBuffer:
    room = torch.zeros(frames, *layout.frame_shape, dtype=torch.uint8)
    return FrameBuffer(capacity, room, layout, 2, CPU, folder or Path("unused"))


def numbered_rows(layout: Layout, generator: np.random.Generator, count: int, lengths=(1, 12), whole: float = 0.7):
    """Rows whose frames and states carry a running number; segments of random length, of which some begin mid-episode.

    As a wrapper would stack them: at an episode's start the first frame is repeated, mid-episode there are older ones.
    """
    rows, number = [], 0
    while len(rows) < count:
        older = 0 if generator.random() < whole else int(generator.integers(1, 5))
        length = int(generator.integers(*lengths))
        numbers = list(range(number, number + older + length + 1))
        number = numbers[-1] + 1

        def observation(t: int, numbers=numbers) -> Tensor:
            steps = torch.tensor([numbers[max(t - i, 0)] for i in reversed(range(layout.stack))])
            frames = (steps.view(-1, 1, 1, 1, 1) + torch.zeros(layout.stack, *layout.frame_shape)).to(torch.int64)
            frames = torch.stack([frames[..., 0] % 256, frames[..., 1] // 256, frames[..., 2] * 7 % 256], -1)
            frames[:, 1] += 1  # another camera
            states = steps.float()[:, None].expand(-1, 3).reshape(-1)
            return layout.pack(states[None], (frames % 256).to(torch.uint8)[None])[0]

        for t in range(older, older + length):
            middle = torch.tensor([len(rows), -len(rows), 0.5])
            end = torch.tensor([float(t == older + length - 1 and generator.random() < 0.5)])
            rows.append(torch.cat([observation(t), middle, observation(t + 1), end]))
    return torch.stack(rows[:count])


def assert_holds(buffer: FrameBuffer, rows: Tensor) -> None:
    """Everything that can be sampled is one of the rows, image by image, and it is the newest ones."""
    whole = buffer.last(len(buffer))
    assert torch.equal(whole.view(torch.int32), rows[buffer.total - len(buffer) : buffer.total].view(torch.int32))
    states, frames = buffer.layout.unpack(whole[:, : buffer.obs_dim])
    next_states, next_frames = buffer.layout.unpack(whole[:, -buffer.obs_dim - 1 : -1])
    slots = torch.arange(buffer.first, buffer.total) % len(buffer.rows)
    compact, sampled = buffer.rows[slots], buffer.look_up(buffer.windows[slots], buffer.features)
    assert torch.equal(sampled, torch.cat([frames, next_frames], 1))
    assert torch.equal(
        compact, torch.cat([states, whole[:, buffer.obs_dim : -buffer.obs_dim - 1], next_states, whole[:, -1:]], 1)
    )


@pytest.mark.parametrize("stack", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_buffer_returns_what_was_put_in(stack, seed):
    """Episode starts, truncation, termination, segments from mid-episode, wrap-around of either ring; any portions."""
    layout, generator = numbered_layout(stack), np.random.default_rng(seed)
    rows = numbered_rows(layout, generator, 150)
    for capacity, frames in ((40, 200), (200, 47), (30, 41)):  # rows wrap, frames wrap, both
        buffer, total = new_buffer(layout, capacity, frames), 0
        while total < len(rows):
            count = int(generator.integers(1, 9))
            buffer.add(rows[total : total + count])
            total = min(total + count, len(rows))
            assert buffer.total == total and 0 < len(buffer) <= capacity
            assert_holds(buffer, rows)
        # Not a row is lost without need: one more would need a frame that is gone.
        oldest = max(buffer.frame_total - frames, 0)
        if len(buffer) < capacity and buffer.first:
            assert buffer.oldest[(buffer.first - 1) % capacity] < oldest


@pytest.mark.parametrize("stack", [1, 3])
def test_each_frame_is_stored_once(stack):
    rows = numbered_rows(numbered_layout(stack), np.random.default_rng(0), 200, lengths=(100, 101), whole=1)
    buffer = new_buffer(numbered_layout(stack), 1000, 1000)
    buffer.add(rows)
    assert buffer.frame_total == 202  # two episodes of 100 steps and their first frames
    mid_episode = numbered_rows(numbered_layout(stack), np.random.default_rng(0), 90, lengths=(30, 31), whole=0)
    buffer.add(mid_episode)
    assert buffer.frame_total <= 202 + 90 + 3 * stack


def test_stacks_of_frames_that_move_by_several(tmp_path):
    """With chunks of actions, a stack's next one may have two or three new frames."""
    args = Args(env_id="probe_envs:PixelPoint-v0", image_size=32, small_channels=(4,), frame_stack=3, action_chunk=2)
    env = make_env(args)
    layout = env.observation_space
    rows, buffer = (
        [],
        FrameBuffer(50, torch.zeros(99, *layout.frame_shape, dtype=torch.uint8), layout, 6, CPU, tmp_path),
    )
    for episode in range(3):
        obs, done = env.reset(seed=episode)[0], False
        while not done:
            action = env.action_space.sample()
            next_obs, reward, terminated, truncated, _ = env.step(action)
            rows.append(torch.from_numpy(transition(obs, action, reward, next_obs, terminated)))
            obs, done = next_obs, terminated or truncated
    buffer.add(torch.stack(rows[:17]))
    buffer.add(torch.stack(rows[17:]))
    assert_holds(buffer, torch.stack(rows))
    assert buffer.frame_total <= 3 + 2 * len(rows)


def test_memory_per_transition(capsys, monkeypatch):
    """At most 0.51 of storing observation and next observation; 200,000 transitions of two 128 x 128 cameras: 20 GB."""
    args = small_args(image_size=128, buffer_size=200_000, run_dir="r", small_channels=(4,))
    agent = Agent(Layout(("front", "wrist"), 128, {"state": (0, 7)}, 1), box(4), args, CPU)
    monkeypatch.setattr(sac_pixel_sim, "available_memory", lambda: 24_000_000_000)
    buffer = agent.make_buffer(args.buffer_size, Path("replay"))  # pages of memory that nobody touches cost nothing
    assert buffer.frames.nbytes <= 20e9
    assert "203,126 frames of 2 x 128 x 128 pixels, 20 GB, memory" in capsys.readouterr().out
    small = (buffer.rows.nbytes + buffer.windows.nbytes + buffer.oldest.nbytes) / len(buffer.rows)
    both = 2 * math.prod(buffer.layout.frame_shape) + 4 * sum(agent.row_splits)
    assert buffer.frames.nbytes / len(buffer.rows) + small <= 0.51 * both


def test_a_buffer_that_does_not_fit_says_what_to_lower(monkeypatch, tmp_path):
    layout = Layout(("front", "wrist"), 128, {}, 1)
    monkeypatch.setattr(sac_pixel_sim, "available_memory", lambda: 16_000_000_000)
    with pytest.raises(SystemExit) as error:
        allocate_frames(200_000, layout, small_args(buffer_size=200_000, run_dir="r"), CPU, "buffer")
    assert re.search(
        "--buffer-size 200000: needs 19.7 GB, memory has 16; lower --buffer-size or --image-size, or give --buffer-dir",
        str(error.value),
    )
    args = small_args(buffer_dir=str(tmp_path), buffer_size=10**12, run_dir="r")
    with pytest.raises(SystemExit, match="lower --buffer-size or --image-size"):
        allocate_frames(10**12, layout, args, CPU, "buffer")


def test_frames_in_a_memory_mapped_file(tmp_path):
    layout = numbered_layout(2)
    args = small_args(buffer_dir=str(tmp_path / "new"), run_dir="r")
    frames = allocate_frames(50, layout, args, CPU, "buffer")
    assert list((tmp_path / "new").iterdir()) == []  # nothing is left behind, not even after a crash
    maps = Path("/proc/self/maps").read_text()
    assert re.search(rf"{tmp_path}/new/r-buffer.frames", maps)
    buffer = FrameBuffer(40, frames, layout, 2, CPU, tmp_path)
    rows = numbered_rows(layout, np.random.default_rng(0), 100)
    buffer.add(rows)
    assert_holds(buffer, rows)


@pytest.mark.parametrize("case", ["stack1", "stack1_mid", "stack2", "stack2_mid", "stack3_mid", "quirk"])
def test_serl_memory_efficient_buffer(case):
    """All that SERL's buffer may return, ours returns too, and the same, except where SERL's is wrong."""
    arrays = {
        k.removeprefix(f"{case}/"): v
        for k, v in np.load(FIXTURES / "memory_buffer.npz").items()
        if k.startswith(case + "/")
    }
    stack = int(arrays["in/frame_stack"])
    layout, count = Layout(("image",), 4, {"state": (0, 3)}, stack), len(arrays["in/actions"])

    def observations(prefix: str) -> Tensor:
        states = torch.from_numpy(arrays[f"{prefix}_state"]).flatten(1)
        return layout.pack(states, torch.from_numpy(arrays[f"{prefix}_image"])[:, :, None])

    middle = np.concatenate([arrays["in/actions"], arrays["in/rewards"][:, None]], 1)
    end = torch.from_numpy(arrays["in/dones"] * (1 - arrays["in/masks"]))[:, None]  # terminated, not truncated
    rows = torch.cat([observations("in/obs"), torch.from_numpy(middle), observations("in/next_obs"), end], 1).float()
    buffer, wrong = new_buffer(layout, int(arrays["in/capacity"]), 2 * int(arrays["in/capacity"])), 0
    for i in range(count):
        buffer.add(rows[i : i + 1])
        assert_holds(buffer, rows)
        if i + 1 not in arrays["in/snapshots"]:
            continue
        out = {
            name: arrays[f"out/after{i + 1}/{name}"]
            for name in ("transition", "consistent", "obs_image", "next_obs_image")
        }
        assert set(out["transition"]) <= set(range(buffer.first, buffer.total))
        slots = torch.from_numpy(out["transition"]).long() % len(buffer.rows)
        compact, frames = buffer.rows[slots], buffer.look_up(buffer.windows[slots], buffer.frames)
        same = (frames[:, :stack, 0].numpy() == out["obs_image"]).all((1, 2, 3, 4))
        same &= (frames[:, stack:, 0].numpy() == out["next_obs_image"]).all((1, 2, 3, 4))
        assert np.array_equal(same, out["consistent"].astype(bool))
        wrong += (~same).sum()
        for name, columns in (("actions", slice(3 * stack, 3 * stack + 2)), ("rewards", 3 * stack + 2), ("masks", -1)):
            ours = compact[:, columns] if name != "masks" else 1 - compact[:, -1]
            assert np.array_equal(ours, arrays[f"out/after{i + 1}/{name}"])
    assert (wrong > 0) == (case == "quirk")


def test_samples_are_uniform_over_what_is_whole():
    layout = numbered_layout(2)
    rows = numbered_rows(layout, np.random.default_rng(1), 100)
    buffer, generator = new_buffer(layout, 30, 35), torch.Generator().manual_seed(0)
    buffer.add(rows)
    assert len(buffer) < 30  # some rows have lost a frame
    compact, _ = buffer.sample(20_000, generator)
    numbers, counts = compact[:, 6].unique(return_counts=True)
    assert numbers.tolist() == list(range(buffer.first, buffer.total))
    expected = 20_000 / len(buffer)
    assert (counts - expected).abs().max() < 5 * math.sqrt(expected)


@pytest.mark.parametrize("stack", [1, 2])
def test_rows_of_several_steps_end_with_the_last_ones_frames(stack):
    layout = numbered_layout(stack)
    rows = numbered_rows(layout, np.random.default_rng(3), 100)
    buffer = new_buffer(layout, 60, 70)  # rows and frames wrap
    buffer.n_step, buffer.gamma = 3, 0.9
    buffer.add(rows)
    rows, frames = buffer.sample(2000, torch.Generator().manual_seed(0))
    whole, number, lengths = buffer.last(len(buffer)), rows[:, 3 * stack].long() - buffer.first, set()
    obs, next_obs = whole[:, : buffer.obs_dim], whole[:, -buffer.obs_dim - 1 : -1]
    for i, row, images in zip(number.tolist(), rows, frames, strict=True):
        last = i
        while last < i + 2 and last + 1 < len(whole) and torch.equal(next_obs[last].view(-1), obs[last + 1].view(-1)):
            last += 1
        lengths.add(last - i + 1)
        assert torch.equal(images[:stack], layout.unpack(obs[i : i + 1])[1][0])
        states, last_images = layout.unpack(next_obs[last : last + 1])
        assert torch.equal(images[stack:], last_images[0]) and torch.equal(row[-3 * stack - 1 : -1], states[0])
        assert float(row[3 * stack + 2]) == pytest.approx(sum(0.5 * 0.9**k for k in range(last - i + 1)))
        assert 1 - float(row[-1]) == pytest.approx(0.9 ** (last - i) * (1 - float(whole[last, -1])))
    assert lengths == {1, 2, 3}


def test_goals_are_the_last_frames_of_segments():
    layout = numbered_layout(2)
    rows = numbered_rows(layout, np.random.default_rng(2), 50)
    buffer = new_buffer(layout, 100, 300)
    buffer.add(rows)
    obs, next_obs = rows[:, : buffer.obs_dim], rows[:, -buffer.obs_dim - 1 : -1]
    last = [i for i in range(50) if i == 49 or not torch.equal(obs[i + 1], next_obs[i])]
    assert len(last) > 3
    assert torch.equal(buffer.segment_ends(), layout.unpack(next_obs[last])[1])


# --- Replay buffer: checkpoints ---------------------------------------------------------------------------------------
def reload(buffer: FrameBuffer, state: dict, folder: Path) -> FrameBuffer:
    other = new_buffer(buffer.layout, len(buffer.rows), len(buffer.frames), folder)
    other.load_state_dict(state)
    return other


def test_checkpoints_write_each_frame_once_and_can_be_loaded(tmp_path):
    """Over several wraps: the newest two checkpoints can always be read, and files that neither needs go."""
    layout, generator = numbered_layout(2), np.random.default_rng(0)
    rows, states, written = numbered_rows(layout, generator, 400), [], {}
    buffer = new_buffer(layout, 60, 90, tmp_path / "frames")
    for start in range(0, 400, 25):
        buffer.add(rows[start : start + 25])
        states.append(buffer.state_dict())
        for path in (tmp_path / "frames").iterdir():
            assert path.suffix == ".u8"
            assert written.setdefault(path.name, path.stat().st_mtime_ns) == path.stat().st_mtime_ns  # never again
        for state in states[-2:]:
            other = reload(buffer, state, tmp_path / "frames")
            assert_holds(other, rows)
        assert sum(path.stat().st_size for path in (tmp_path / "frames").iterdir()) < 3 * buffer.frames.nbytes
    frames = sorted(tuple(map(int, Path(name).stem.split("-"))) for name in written)
    assert [stop for _, stop in frames[:-1]] == [start for start, _ in frames[1:]]  # each frame in one file
    # After loading it goes on as the other does.
    other = reload(buffer, states[-1], tmp_path / "frames")
    more = numbered_rows(layout, np.random.default_rng(5), 70)
    for one in (buffer, other):
        one.add(more)
    assert torch.equal(buffer.last(len(buffer)), other.last(len(other)))


def test_resume_in_the_middle_of_a_segment_stores_no_frame_twice(tmp_path):
    layout = numbered_layout(3)
    rows = numbered_rows(layout, np.random.default_rng(0), 40, lengths=(40, 41), whole=1)
    buffer = new_buffer(layout, 100, 150, tmp_path)
    buffer.add(rows[:20])
    other = reload(buffer, buffer.state_dict(), tmp_path)
    other.add(rows[20:])
    assert other.frame_total == 41
    assert_holds(other, rows)


def test_a_kill_between_frames_and_checkpoint_loses_nothing(tmp_path):
    layout = numbered_layout(1)
    rows = numbered_rows(layout, np.random.default_rng(0), 300)
    buffer = new_buffer(layout, 50, 70, tmp_path)
    buffer.add(rows[:30])
    state = buffer.state_dict()
    buffer.add(rows[30:80])
    buffer.state_dict()  # its checkpoint was never written
    other = reload(buffer, state, tmp_path)
    assert_holds(other, rows)
    rows = torch.cat([rows[:30], numbered_rows(layout, np.random.default_rng(7), 270)])  # what happens now is another
    for start in range(30, 300, 30):
        other.add(rows[start : start + 30])
        before, state = state, other.state_dict()
        for one in (before, state):
            assert_holds(reload(other, one, tmp_path), rows)


def test_missing_and_damaged_files_of_frames(tmp_path):
    layout = numbered_layout(1)
    rows = numbered_rows(layout, np.random.default_rng(0), 60)
    buffer = new_buffer(layout, 100, 100, tmp_path)
    for start in (0, 20, 40):
        buffer.add(rows[start : start + 20])
        state = buffer.state_dict()
    files = [path for _, _, path in buffer.files()]
    data = files[1].read_bytes()
    files[1].write_bytes(data[:-1])
    with pytest.raises(SystemExit, match=rf"{files[1]}: has {len(data) - 1} bytes, not {len(data)}"):
        reload(buffer, state, tmp_path)
    files[1].unlink()
    with pytest.raises(SystemExit, match=r"frames \d+ to \d+ are missing"):
        reload(buffer, state, tmp_path)


# --- Agent: every encoder trains --------------------------------------------------------------------------------------
def random_inputs(agent: Agent, batch: int = 8, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """rows, frames, eps and subset for `update_once`."""
    generator, layout = torch.Generator().manual_seed(seed), agent.layout
    rows = torch.randn(batch, sum(agent.row_splits), generator=generator)
    rows[:, -1] = 0
    shape = (batch, 2 * layout.stack, *layout.frame_shape)
    frames = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    return rows, frames, torch.randn(2, batch, agent.action_dim, generator=generator), torch.tensor([0, 1])


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
    options = {"augment": (), "critic_lr": 3e-3, "actor_ema": 0.5}
    args = small_args(encoder=encoder, pooling=pooling, film=film, image_size=size, **options)
    agent = Agent(small_layout(size), box(2), args, CPU)
    networks = (agent.critic, agent.actor, agent.target_critic, agent.mean_actor, agent.mean_encoder)
    before, inputs = copies(*networks), random_inputs(agent)
    for _ in range(3):  # FiLM's weights move what is before them from the second step on
        metrics = agent.update_once(*inputs, with_actor=False)
    still = {name for name in before if name[0] in "134"}
    assert moved(before, *networks) == before.keys() - still  # critics, encoder and their targets, nothing else
    before = copies(*networks)
    metrics |= agent.update_once(*inputs, with_actor=True)
    assert moved(before, *networks) == before.keys()
    assert all(value.isfinite() for value in metrics.values())
    inputs[0][:, -1] = 1  # all terminated: the targets are the rewards
    losses = [agent.update_once(*inputs, with_actor=False)["losses/critic_loss"] for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("encoder", ["resnet10", "mobilenet"])
def test_pretrained_trunks_stay_or_train(encoder, freeze, tmp_path, monkeypatch):
    monkeypatch.setattr(vision, "ResNetTrunk", lambda channels: ResNetTrunk(channels, (8, 8, 16, 16)))
    fit_torchvision()
    path, layout = tmp_path / "trunk.pt", small_layout(40, stack=2)
    trunk = vision.ResNetTrunk(3) if encoder == "resnet10" else MobileNetTrunk(3, pretrained=True)
    torch.save(trunk.state_dict(), path)
    args = small_args(encoder=encoder, pretrained=str(path), freeze=freeze, film="state", image_size=40)
    agent = Agent(layout, box(2), args, CPU)
    inputs = random_inputs(agent)
    trunks = [agent.trunk] if freeze else list(agent.critic.encoder.trunks)
    assert len(trunks) == (1 if freeze else 2)  # frozen: one for all cameras
    for one in trunks:
        assert all(torch.equal(value, trunk.state_dict()[name]) for name, value in one.state_dict().items())
    before, heads = copies(*trunks), copies(agent.critic.encoder.heads, agent.critic.encoder.films)
    for _ in range(3):
        agent.update_once(*inputs, with_actor=True)
    parameters = {f"{i}.{name}" for i, one in enumerate(trunks) for name, _ in one.named_parameters()}
    assert moved(before, *trunks) == (set() if freeze else parameters)  # never the statistics of BatchNorm
    assert moved(heads, agent.critic.encoder.heads, agent.critic.encoder.films) == heads.keys()
    # A checkpoint holds them: the file is not needed again, unless a run goes on that has none yet.
    again = Agent(layout, box(2), dataclasses.replace(args, resume="run", run_dir=str(tmp_path)), CPU)
    trunks = [again.trunk] if freeze else list(again.critic.encoder.trunks)
    assert all(
        torch.equal(value, trunk.state_dict()[name]) for one in trunks for name, value in one.state_dict().items()
    )
    path.unlink()
    (tmp_path / "checkpoint.previous").touch()
    other = Agent(layout, box(2), dataclasses.replace(args, resume="run", run_dir=str(tmp_path)), CPU)
    other.load_state_dict(agent.state_dict())
    obs = agent.layout.pack(inputs[0][:, : agent.row_splits[0]], inputs[1][:, :2])[0].numpy()
    assert np.array_equal(agent.act(obs, deterministic=True), other.act(obs, deterministic=True))


def test_a_camera_has_an_encoder_of_its_own():
    agent = Agent(small_layout(), box(2), small_args(), CPU)
    images = torch.randint(256, (1, 1, 2, 20, 20, 3), dtype=torch.uint8)
    features = agent.critic.encoder(Observation(images, torch.zeros(1, 4)))
    images[:, :, 1] = 0
    other = agent.critic.encoder(Observation(images, torch.zeros(1, 4)))
    assert torch.equal(features[:, :12], other[:, :12]) and not torch.equal(features[:, 12:], other[:, 12:])


def test_stacked_frames_are_told_apart():
    agent = Agent(small_layout(stack=3), box(2), small_args(frame_stack=3), CPU)
    images, states = torch.randint(256, (1, 3, 2, 20, 20, 3), dtype=torch.uint8), torch.zeros(1, 12)
    one, other = (agent.critic.encoder(Observation(x, states)) for x in (images, images.flip(1)))
    assert not torch.allclose(one, other)


def test_film_sees_the_state_that_it_is_given(monkeypatch):
    agent = Agent(small_layout(stack=2), box(2), small_args(film="state", frame_stack=2), CPU)
    for film in agent.critic.encoder.films:
        nn.init.normal_(film.scale.weight)
    images = torch.randint(256, (1, 2, 2, 20, 20, 3), dtype=torch.uint8)
    changed = []
    for i in range(8):  # states of two steps: gripper, then state (3,)
        states = torch.zeros(1, 8)
        states[0, i] = 1
        one, other = (agent.critic.encoder(Observation(images, x)) for x in (states, torch.zeros(1, 8)))
        changed.append(not torch.equal(one, other))
    assert changed == [False, True, True, True] * 2


def test_actor_gradients_stop_at_the_features():
    agent = Agent(small_layout(), box(2), small_args(bc_weight=1.0, demos=1, actor_ema=0.0), CPU)
    before, inputs = copies(agent.critic), random_inputs(agent)
    agent.step_critic = lambda: None
    actor = copies(agent.actor)
    agent.update_once(*inputs, with_actor=True)
    assert moved(before, agent.critic) == set() and moved(actor, agent.actor) == actor.keys()


def test_the_target_is_made_by_the_target_critics_encoder():
    """And the next action by the policy on the critic's encoder; Q(s, a) is not asked for it."""
    agent = Agent(small_layout(), box(2), small_args(gamma=0.5, augment=()), CPU)
    batch, eps, subset = agent.prepare(*random_inputs(agent)[:2]), torch.zeros(8, 2), torch.tensor([0, 1])
    actions, _ = agent.actor.sample(agent.critic.encode(batch.next_observations), eps)
    values = agent.target_critic(agent.target_critic.encode(batch.next_observations), actions).amin(0)
    assert_close(agent.target_q(batch, eps, subset), (batch.rewards + 0.5 * values).detach())
    target = agent.target_q(batch, eps, subset)
    with torch.no_grad():
        for parameter in agent.target_critic.encoder.parameters():
            parameter.mul_(1.5)
    assert not torch.allclose(agent.target_q(batch, eps, subset), target)


def test_target_encoder_follows_slowly():
    agent = Agent(small_layout(), box(2), small_args(tau=0.25), CPU)
    before = copies(agent.target_critic)
    agent.update_once(*random_inputs(agent), with_actor=False)
    after, critic = copies(agent.target_critic), copies(agent.critic)
    for name, value in before.items():
        assert_close(after[name], 0.75 * value + 0.25 * critic[name], 1e-6)


def gradients(agent: Agent, inputs, with_actor: bool = True) -> dict[str, Tensor]:
    """Of all parameters, from one update that changes nothing."""
    agent.step_critic = agent.step_actor = lambda: None
    agent.update_once(*inputs, with_actor=with_actor)
    named = [*agent.critic.named_parameters(prefix="critic"), *agent.actor.named_parameters(prefix="actor")]
    return {name: parameter.grad.clone() for name, parameter in named} | {"alpha": agent.raw_alpha.grad.clone()}


@pytest.mark.parametrize(
    "changes", [{"grad_accum_steps": 4}, {"activation_checkpointing": True}, {"threads": 2}, {"grad_accum_steps": 8}]
)
def test_ways_to_compute_the_same_gradients(changes):
    options = {"augment": (), "demos": 1, "batch_size": 16, "film": "state"}
    whole, other = (Agent(small_layout(), box(2), small_args(**options | more), CPU) for more in ({}, changes))
    torch.set_num_threads(1)
    inputs = random_inputs(whole, 16)
    ours, theirs = gradients(whole, inputs), gradients(other, inputs)
    for name, gradient in ours.items():
        np.testing.assert_allclose(theirs[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max(), err_msg=name)


def test_cached_features_are_what_the_trunk_makes(tmp_path, monkeypatch):
    """And a buffer with them resumes as one without."""
    monkeypatch.setattr(vision, "ResNetTrunk", lambda channels: ResNetTrunk(channels, (8, 8, 16, 16)))
    torch.save(ResNetTrunk(3, (8, 8, 16, 16)).state_dict(), tmp_path / "trunk.pt")
    options = {"encoder": "resnet10", "pretrained": str(tmp_path / "trunk.pt"), "augment": (), "image_size": 36}
    options |= {"run_dir": str(tmp_path), "frame_stack": 2}
    layout = small_layout(36, stack=2)
    plain, cached = (Agent(layout, box(2), small_args(**options, cache_features=cache), CPU) for cache in (False, True))
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(256, (32, *layout.frame_shape), dtype=torch.uint8, generator=generator)
    obs = layout.pack(torch.randn(31, 8, generator=generator), torch.stack([frames[:-1], frames[1:]], 1))
    rows = torch.cat([obs[:-1], torch.randn(30, 3, generator=generator), obs[1:], torch.zeros(30, 1)], 1)
    buffers = [agent.make_buffer(25, tmp_path / f"buffer{i}") for i, agent in enumerate((plain, cached))]
    for buffer in buffers:
        buffer.add(rows)
    other = cached.make_buffer(25, tmp_path / "buffer1")
    other.load_state_dict(buffers[1].state_dict())
    batches = []
    for agent, buffer in ((plain, buffers[0]), (cached, buffers[1]), (cached, other)):
        batches.append(agent.prepare(*buffer.sample(16, torch.Generator().manual_seed(1))))
        assert torch.equal(buffer.last(20), rows[-20:])
    for batch in batches[1:]:
        assert_close(batch.observations.images, batches[0].observations.images)
        assert_close(batch.next_observations.images, batches[0].next_observations.images)
        assert torch.equal(batch.actions, batches[0].actions)


# --- VICE and success classifiers -------------------------------------------------------------------------------------
def vice_agent(**changes) -> Agent:
    args = small_args(reward="vice", demos=1, demo_ratio=0.25, vice_lr=3e-3, augment=("crop",), crop_padding=1)
    agent = Agent(small_layout(), box(2), dataclasses.replace(args, **changes), CPU)
    agent.goals = torch.full((3, 1, *agent.layout.frame_shape), 200, dtype=torch.uint8)
    return agent


def dark_inputs(agent: Agent):
    """Replay images are dark, and the last in the batch, from demonstrations, bright as the goals are."""
    rows, frames, *others = random_inputs(agent)
    frames[:6] //= 8
    frames[6:] = 200
    return rows, frames, *others


def test_vice_tells_goals_from_replay_and_rewards():
    agent = vice_agent()
    inputs = dark_inputs(agent)
    first = agent.update_once(*inputs, with_actor=True)
    for _ in range(150):
        last = agent.update_once(*inputs, with_actor=True)
    assert last["losses/vice_loss"] < first["losses/vice_loss"]
    images = torch.stack([inputs[1][0, 1:], agent.goals[0]])
    dark, bright = agent.classifier(Observation(images, None)).sigmoid()
    assert dark < 0.4 and bright > 0.6
    assert bright < 0.97  # smoothed labels are 0.9 and 0.1


def test_vice_rewards_replace_the_tasks(monkeypatch):
    agent, seen = vice_agent(), []
    original = agent.critic_loss
    target_q = agent.target_q
    monkeypatch.setattr(agent, "target_q", lambda batch, *rest: seen.append(batch) or target_q(batch, *rest))
    monkeypatch.setattr(agent, "critic_loss", original)
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


def test_gradient_penalty_pulls_the_slope_towards_one():
    slopes = []
    for penalty in (0.0, 10.0):
        agent = vice_agent(gradient_penalty=penalty, mixup=False, label_smoothing=0.0)
        inputs = dark_inputs(agent)
        for _ in range(100):
            agent.update_once(*inputs, with_actor=True)
        features = agent.classifier.encoder(Observation(torch.cat([inputs[1][:4, 1:], agent.goals]), None)).detach()
        features = (0.5 * (features[:3] + features[4:])).requires_grad_()
        (slope,) = torch.autograd.grad(agent.classifier.logit(features).sum(), features)
        slopes.append(slope.norm(dim=1).mean().item())
    assert abs(slopes[1] - 1) < 0.3 < abs(slopes[0] - 1)


def test_label_smoothing_and_mixup_change_the_loss_as_they_should():
    """A classifier that says p everywhere has a loss that is known."""
    for changes, expected in (
        ({"label_smoothing": 0.0, "mixup": False}, 0.5 * (math.log1p(math.exp(-2)) + math.log1p(math.exp(2)))),
        ({"label_smoothing": 1.0, "mixup": False}, 0.5 * (math.log1p(math.exp(-2)) + math.log1p(math.exp(2)))),
    ):
        agent = vice_agent(**changes)
        agent.classifier.logit = lambda features: features.sum(1) * 0 + 2
        loss = agent.classifier_gradient(torch.zeros(6, 1, *agent.layout.frame_shape))["losses/vice_loss"]
        assert loss == pytest.approx(expected, abs=1e-5)
    # A perfect one: smoothed labels keep its loss up, mixed features too.
    losses = {}
    for smoothing, mixup in ((0.0, False), (0.4, False), (0.0, True)):
        agent = vice_agent(label_smoothing=smoothing, mixup=mixup)
        images = torch.zeros(400, 1, *agent.layout.frame_shape, dtype=torch.uint8)
        agent.classifier.encoder = MeanImage()
        scale = nn.Parameter(torch.tensor(1.0))
        agent.classifier.logit = lambda features, scale=scale: (features.squeeze(1) - 100) * scale / 10
        losses[smoothing, mixup] = agent.classifier_gradient(images)["losses/vice_loss"].item()
    assert losses[0.0, False] < 0.001
    assert losses[0.4, False] == pytest.approx(0.2 * 10, abs=0.01)  # -0.2 log sigmoid(-10)
    assert 0.1 < losses[0.0, True] < 3


class MeanImage(nn.Module):
    def forward(self, obs: Observation) -> Tensor:
        return obs.images.float().flatten(1).mean(1, keepdim=True)


def classifier_file(path: Path, layout: Layout, args: Args, bias: float) -> Path:
    classifier = Classifier(layout, args)
    nn.init.zeros_(classifier.out.weight)
    nn.init.constant_(classifier.out.bias, bias)
    flags = sac_pixel_sim.classifier_flags(layout, args)
    torch.save({"flags": flags, "classifier": classifier.state_dict()}, path)
    return path


@pytest.mark.parametrize("bias", [-1.0, 1.0])
def test_classifier_replaces_rewards(tmp_path, bias):
    layout = small_layout()
    path = classifier_file(tmp_path / "c.pt", layout, small_args(latent_dim=7, pooling="softmax"), bias)
    agent = Agent(layout, box(2), small_args(reward="classifier", classifier=str(path)), CPU)
    rows = torch.zeros(5, sum(agent.splits))
    rows[:, agent.splits[0] + 2] = 0.3
    agent.observe(rows)
    assert (rows[:, agent.splits[0] + 2] == float(bias > 0)).all() and rows.sum() == 5 * (bias > 0)
    assert all(not parameter.requires_grad for parameter in agent.classifier.parameters())


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (small_layout(cameras=("front", "side")), "was trained with cameras ('front', 'wrist'), the task has"),
        (small_layout(24), "was trained with image_size 20, the task has 24"),
    ],
)
def test_classifier_of_other_images_is_refused(tmp_path, layout, words):
    path = classifier_file(tmp_path / "c.pt", small_layout(), small_args(), 0)
    with pytest.raises(SystemExit, match=re.escape(f"--classifier {path}: refused: {words}")):
        Agent(layout, box(2), small_args(reward="classifier", classifier=str(path)), CPU)


def test_malicious_classifier_is_refused(tmp_path):
    path = write_pickle(tmp_path / "c.pt", Malicious(tmp_path / "marker"), 2)
    with pytest.raises(SystemExit, match="refused"):
        Agent(small_layout(), box(2), small_args(reward="classifier", classifier=str(path)), CPU)
    assert not (tmp_path / "marker").exists()


# --- Runs -------------------------------------------------------------------------------------------------------------
TINY = "--env-id probe_envs:PixelPoint-v0 --image-size 32 --small-channels 4 6 --latent-dim 16 --hidden-dims 32 32"
TINY += " --batch-size 16 --utd-ratio 1 --demos 2 --threads 1 --buffer-size 1000 --learning-starts 50 --log-every 50"
TINY += " --eval-every 100 --eval-episodes 1 --final-eval-episodes 2 --save-every 60 --no-capture-video"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", REPO / SCRIPT]


def run(*flags: object, cwd: Path, **options):
    """The script with small networks and budgets; later flags win."""
    return run_forked(SCRIPT, *TINY.split(), *flags, cwd=cwd, env=TASKS, **options)


def checkpoint(run_dir: Path) -> dict:
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def leaves(tree: object, path: str = "") -> dict[str, object]:
    """All that a checkpoint holds, but for what depends on time."""
    if isinstance(tree, dict):
        tree = {k: v for k, v in tree.items() if k not in ("elapsed", "best")}
        return {name: leaf for k, v in tree.items() for name, leaf in leaves(v, f"{path}/{k}").items()}
    return {path: tree}


def differences(one: Path, other: Path) -> list[str]:
    """Names of what differs between two runs: in their checkpoints, and in the frames that belong to them."""
    ours, theirs = (leaves(checkpoint(run_dir)) for run_dir in (one, other))
    assert ours.keys() == theirs.keys()
    same = {k: torch.equal(v, theirs[k]) if isinstance(v, Tensor) else v == theirs[k] for k, v in ours.items()}
    frames = [b"".join(path.read_bytes() for path in frame_files(run_dir)) for run_dir in (one, other)]
    return [name for name, equal in same.items() if not equal] + ["frames"] * (frames[0] != frames[1])


def frame_files(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "replay").glob("*.u8"), key=lambda path: int(path.stem.split("-")[0]))


@pytest.mark.parametrize(
    ("first", "flags"),
    [
        (70, "--threads 2"),
        (
            75,
            "--frame-stack 2 --action-chunk 3 --buffer-size 50 --dropout 0.1 --film state --augment crop jitter flip"
            " --n-step 3",
        ),
        (70, "--reward vice --buffer-dir frames --pooling softmax --amp"),
    ],
    ids=["mid-episode", "everything-and-wrap-around", "vice-in-bfloat16-and-buffer-in-a-file"],
)
def test_resume_is_exact(tmp_path, first, flags):
    flags = flags.split()
    run(*flags, "--total-timesteps", 140, "--run-dir", "whole", cwd=tmp_path)
    run(*flags, "--total-timesteps", first, "--run-dir", "parts", cwd=tmp_path)
    before = {path: path.stat().st_mtime_ns for path in frame_files(tmp_path / "parts")}
    resumed = run_forked(SCRIPT, "--resume", "parts", "--total-timesteps", 140, cwd=tmp_path, env=TASKS)
    assert "does not repeat itself" not in resumed.stderr
    if "50" not in flags:  # no frame has left the buffer
        assert before and all(path.stat().st_mtime_ns == time for path, time in before.items())  # never written again
        assert differences(tmp_path / "whole", tmp_path / "parts") == []
    else:
        assert [name for name in differences(tmp_path / "whole", tmp_path / "parts") if name != "frames"] == []
    columns = read_csv(tmp_path / "parts", "train.csv")
    assert columns["global_step"] == [50, 100] and all(map(math.isfinite, columns["losses/critic_loss"][1:]))
    if "vice" in flags:
        assert 0 < columns["losses/vice_reward"][-1] < 1 and math.isfinite(columns["losses/vice_loss"][-1])


def test_kill_at_any_moment(tmp_path):
    """Killed at ten moments, also inside a checkpoint; it always goes on, and ends as if nothing had been."""
    flags = ("--total-timesteps", 400, "--save-every", 10, "--eval-every", 1000)
    run(*flags, "--run-dir", "whole", cwd=tmp_path)
    generator, moments = np.random.default_rng(0), 0
    while moments < 10:
        resume = ("--resume", "run") if (tmp_path / "run").exists() else (*TINY.split(), *flags, "--run-dir", "run")
        with popen_forked(SCRIPT, *resume, cwd=tmp_path, env=TASKS) as process:
            started = lambda: (tmp_path / "run" / "checkpoint.pt").exists() or not process.is_alive()  # noqa: E731
            wait_until(started)
            process.join(float(generator.uniform(0.3, 1.5)))
            process.kill()
        saved = (tmp_path / "run" / "checkpoint.pt").exists()  # not between a checkpoint's two renames
        finished = saved and checkpoint(tmp_path / "run")["progress"]["finished"]
        if finished:
            break
        assert process.exitcode == -signal.SIGKILL, process.stderr_path.read_text()
        moments += 1
    assert moments > 1
    if not finished:
        run_forked(SCRIPT, "--resume", "run", cwd=tmp_path, env=TASKS)
    assert differences(tmp_path / "whole", tmp_path / "run") == []


def test_a_run_shows_its_work(tmp_path):
    result = run("--total-timesteps", 120, "--capture-video", "--run-dir", "run", cwd=tmp_path)
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"args.json", SCRIPT, "train.csv", "eval.csv", "checkpoint.pt", "curve.png", "video.mp4"} <= files
    assert "replay: 1,016 frames of 2 x 32 x 32 pixels" in result.stdout
    state = checkpoint(tmp_path / "run")
    assert len(state["buffer"]["rows"]) == 120 and len(state["demos"]["rows"]) == 40
    shutil.rmtree(tmp_path / "run" / "replay")  # evaluation needs no frames
    evaluated = run_forked(SCRIPT, "--eval-only", "run", cwd=tmp_path, env=TASKS)
    last = next(line for line in result.stdout.splitlines() if line.startswith("last: "))
    assert last.removeprefix("last: ") in evaluated.stdout


def test_recorded_dataset_becomes_demonstrations(tmp_path):
    run("--total-timesteps", 60, "--record-dataset", "pixels/point-v0", cwd=tmp_path)
    flags = ("--demo-dataset", "pixels/point-v0", "--total-timesteps", 60, "--run-dir", "learned")
    run(*flags, cwd=tmp_path)
    assert len(checkpoint(tmp_path / "learned")["demos"]["rows"]) > 20
    other = run(*flags[:-1], "other", "--env-id", "probe_envs:OtherCameras-v0", cwd=tmp_path, check=False)
    assert other.returncode == 1 and "--demo-dataset pixels/point-v0: does not fit" in other.stderr.splitlines()[-1]
    assert "'wrist'" in other.stderr and "'side'" in other.stderr


def test_the_classifier_of_a_vice_run_gives_rewards(tmp_path):
    run("--total-timesteps", 80, "--reward", "vice", "--run-dir", "vice", cwd=tmp_path)
    flags = ("--reward", "classifier", "--classifier", "vice/checkpoint.pt", "--total-timesteps", 80)
    run(*flags, "--run-dir", "classified", cwd=tmp_path)
    (tmp_path / "vice" / "checkpoint.pt").rename(tmp_path / "elsewhere.pt")
    run_forked(SCRIPT, "--resume", "classified", "--total-timesteps", 90, cwd=tmp_path, env=TASKS)
    (tmp_path / "elsewhere.pt").rename(tmp_path / "vice" / "checkpoint.pt")
    rewards = checkpoint(tmp_path / "classified")["buffer"]["rows"][:, 2 + 3]
    assert set(rewards.tolist()) <= {0.0, 1.0}
    theirs, ours = (checkpoint(tmp_path / name)["agent"]["classifier"] for name in ("vice", "classified"))
    assert all(torch.equal(value, ours[name]) for name, value in theirs.items())


def test_learns_actions_that_follow_the_image(tmp_path):
    """The best action, +0.6 or -0.6, stands in the image alone."""
    flags = "--env-id probe_envs:GreyImages-v0 --demos 0 --total-timesteps 400 --eval-every 1000 --gamma 0.5"
    flags += " --critic-lr 3e-3 --actor-lr 3e-3 --tau 0.05 --utd-ratio 2 --run-dir run --image-size 20"
    run(*flags.split(), cwd=tmp_path)
    assert read_csv(tmp_path / "run", "eval.csv")["eval/episodic_return"][-1] > -0.05  # doing nothing: -0.36


@pytest.mark.parametrize("processes", [1, 2])
def test_learner_and_actor(tmp_path, processes):
    """Rows with images cross the wire and the actor's file unharmed; the actor follows the learner's policy, of one
    process or of two under torchrun."""
    flags = [*TINY.split(), "--demos", 0, "--port", free_port(), "--actor-ahead", 40, "--publish-every", 20]
    learner = [*flags, "--role", "learner", "--run-dir", "learner", "--total-timesteps", 120]
    actor = [*flags, "--role", "actor", "--run-dir", "actor"]
    with popen_script(SCRIPT, *actor, cwd=tmp_path, env=TASKS) as one:
        if processes == 1:
            run_script(SCRIPT, *learner, cwd=tmp_path, env=TASKS)
        else:
            command = [*map(str, [*TORCHRUN, *learner])]
            env = script_env(tmp_path, TASKS)
            result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
            assert result.returncode == 0, result.stderr[-3000:]
        finish(one)
    state, layout = checkpoint(tmp_path / "learner"), Layout(("front", "wrist"), 32, {"state": (0, 2)}, 1)
    width, total = 2 * layout.step_dim + 3 + 2, state["buffer"]["total"]
    journal = torch.from_numpy(np.fromfile(tmp_path / "actor" / "transitions.f32", np.float32).reshape(-1, width))
    assert total >= 120 and state["agent"]["critic_updates"] == total - 50
    room = torch.zeros(1500, *layout.frame_shape, dtype=torch.uint8)
    buffer = FrameBuffer(1000, room, layout, 3, CPU, tmp_path / "learner" / "replay")
    buffer.load_state_dict(state["buffer"])
    assert torch.equal(buffer.last(total), journal[:total])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--env-id Pendulum-v1", "--env-id Pendulum-v1: observes no images; use sac_state_sim.py, or --render-obs"),
        ("--cameras front top", "--cameras top: PixelPoint-v0 has front wrist"),
        ("--image-size 6", "--image-size 6: too small for --encoder small with --pooling embeddings"),
        ("--encoder resnet10 --image-size 16", "--image-size 16: too small for --encoder resnet10"),
        ("--pretrained nowhere.pkl --encoder resnet10 --image-size 64", "--pretrained nowhere.pkl: refused: "),
        ("--reward vice --demos 0", "--reward vice: has no goal images"),
        ("--reward vice --n-step 3", "--n-step 3: --reward vice knows the rewards of single steps only"),
        ("--reward classifier", "--reward classifier and --classifier FILE: give both or neither"),
        ("--film gripper", "--film gripper: the observation has no such state, only: state"),
        ("--cache-features", "--cache-features: needs --pretrained FILE"),
        ("--grad-accum-steps 3", "--grad-accum-steps 3: must divide --batch-size"),
        ("--buffer-size 1000000000000", "--buffer-size 1000000000000: needs 6.24e+06 GB, memory has "),
        ("--env-id probe_envs:NoOpenGL-v0", "Images need OpenGL, run: apt-get install -y libegl1"),
    ],
)
def test_bad_input(tmp_path, flags, words):
    result = run(*flags.split(), "--total-timesteps", 60, cwd=tmp_path, check=False, timeout=60)
    assert result.returncode == 1
    assert words in result.stderr.splitlines()[-1] and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("flags", "env"), [("FrankaPickCube-v0", {"MUJOCO_GL": "glfw"}), ("Hopper-v5 --render-obs --demos 0", {})]
)
def test_without_opengl_the_message_names_the_package(tmp_path, flags, env):
    result = run_forked(SCRIPT, "--env-id", *flags.split(), cwd=tmp_path, env=env, check=False)
    last = result.stderr.splitlines()[-1]
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert last.startswith("sac_pixel_sim.py: --env-id") and "apt-get install -y libegl1" in last


@pytest.mark.parametrize(
    "flags", ["FrankaPickCube-v0", "FrankaPegInsert-v0 --film state", "Hopper-v5 --render-obs --demos 0"]
)
def test_rendered_tasks(tmp_path, flags):
    """With OpenGL: the Franka's cameras, and the picture of a task that has no images of its own."""
    flags = ("--env-id", *flags.split(), "--image-size", 24, "--total-timesteps", 60, "--run-dir", "run")
    flags += ("--eval-every", 1000, "--final-eval-episodes", 1)
    gl = {"MUJOCO_GL": os.environ.get("MUJOCO_GL", "egl")} if "Hopper-v5" in flags else {}
    result = run_forked(SCRIPT, *TINY.split(), *flags, cwd=tmp_path, env=gl)
    cameras = 1 if gl else 2
    assert f"frames of {cameras} x 24 x 24 pixels" in result.stdout
    (path,) = frame_files(tmp_path / "run")[:1]
    frames = np.fromfile(path, np.uint8).reshape(-1, cameras, 24, 24, 3)
    assert frames.std((2, 3, 4)).min() > 5 and frames.astype(int).std(0).max() > 5  # something is seen, and it moves


# --- Several processes ------------------------------------------------------------------------------------------------
def test_torchrun_learns_as_one_process_does(tmp_path):
    """Two processes, of which each has half of every batch: what one process computes, but for rounding."""
    flags = [*TINY.split(), "--augment", "--total-timesteps", 80, "--save-every", 80, "--std-parameterization", "fixed"]
    flags += ["--fixed-std", 1e-3, "--actor-lr", 1e-5, "--no-autotune"]
    run(*flags[len(TINY.split()) :], "--run-dir", "one", cwd=tmp_path)
    command = [*map(str, [*TORCHRUN, *flags]), "--run-dir"]
    env = script_env(tmp_path, TASKS)
    result = subprocess.run([*command, "two"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]
    one, two = (checkpoint(tmp_path / name) for name in ("one", "two"))
    assert two["agent"]["critic_updates"] == 30
    for part in ("critic", "target_critic", "actor"):
        for name, value in one["agent"][part].items():
            assert_close(two["agent"][part][name], value.numpy(), 2e-3)
    moved = max((value - one["agent"]["target_critic"][k]).abs().max() for k, value in one["agent"]["critic"].items())
    assert moved > 5e-3  # more than the tolerance
    # The other process ends with the first, and the run goes on.
    command[-1:] = ["--resume", "two"]
    command[command.index("--total-timesteps") + 1] = "90"
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]
    assert checkpoint(tmp_path / "two")["agent"]["critic_updates"] == 40


# --- GPU --------------------------------------------------------------------------------------------------------------
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("encoder", ["small", "resnet10", "mobilenet"])
@pytest.mark.parametrize(
    "changes", [{}, {"reward": "vice", "augment": ("crop", "jitter", "blur", "flip"), "amp": True}]
)
def test_graphed_updates_on_a_gpu(encoder, changes, tmp_path):
    """Compiled and graphed updates do what plain ones do, on frames that lie on the GPU."""
    device, layout = torch.device("cuda"), small_layout(40)
    options = {"encoder": encoder, "image_size": 40, "augment": (), "demos": 1, "run_dir": str(tmp_path)}
    options |= {"policy_delay": 2, **changes}
    agents = [Agent(layout, box(2), small_args(**options, compile=compiled), device) for compiled in (True, False)]
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(256, (200, 1, *layout.frame_shape), dtype=torch.uint8, generator=generator)
    obs = layout.pack(torch.randn(200, 4, generator=generator), frames)
    rows = torch.cat([obs[:-1], torch.randn(199, 3, generator=generator), obs[1:], torch.zeros(199, 1)], 1).to(device)
    losses, before = ([], []), copies(agents[0].critic, agents[0].actor)
    for agent, lot in zip(agents, losses):
        buffer, demos = agent.make_buffer(300, tmp_path / "replay"), agent.make_buffer(50, tmp_path / "demos")
        assert buffer.frames.is_cuda
        buffer.add(rows)
        demos.add(rows[:50])
        for _ in range(30):
            lot.append(float(agent.update(buffer, demos, 1)["losses/critic_loss"]))
    assert set(agents[0].graphs) == {False, True} and not agents[1].graphs
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
    result = run_script(SCRIPT, *flags, "--total-timesteps", 100, cwd=tmp_path, env=env, timeout=280)
    assert "GPU memory" in result.stdout
    run_script(SCRIPT, "--resume", "run", "--total-timesteps", 150, cwd=tmp_path, env=env, timeout=280)
    columns = read_csv(tmp_path / "run", "train.csv")
    assert columns["global_step"] == [50, 100, 150] and all(map(math.isfinite, columns["losses/critic_loss"][1:]))
    run_script(SCRIPT, "--eval-only", "run", "--no-cuda", cwd=tmp_path, env=TASKS)


@pytest.mark.parametrize("changes", [{}, {"reward": "vice", "amp": True, "grad_accum_steps": 2, "num_qs": 3}])
def test_what_a_gpu_compiles_is_whole_and_compiled_before_it_is_captured(changes):
    """No graph breaks, and nothing is compiled anew after the updates that `replay` runs before it captures one."""
    agent = Agent(small_layout(), box(2), small_args(demos=1, policy_delay=2, **changes), CPU)
    agent.goals = random_inputs(agent)[1][:, :1]
    whole = partial(torch.compile, backend="aot_eager", fullgraph=True)
    for name in ("target_q", "critic_loss", "actor_loss"):
        setattr(agent, name, whole(getattr(agent, name)))
    agent.critic.encode = whole(agent.critic.encode)
    for i in range(3 * agent.args.policy_delay + 4):
        with torch._dynamo.config.patch(error_on_recompile=i >= 3 * agent.args.policy_delay):
            metrics = agent.update_once(*random_inputs(agent, seed=i), with_actor=i % agent.args.policy_delay == 1)
    assert math.isfinite(metrics["losses/actor_loss"])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")
def test_compiled_losses_are_the_eager_ones():
    agent = Agent(small_layout(), box(2), small_args(augment=(), demos=1), CPU)
    inputs = random_inputs(agent)
    eager = gradients(agent, inputs)
    for name in ("target_q", "critic_loss", "actor_loss"):
        setattr(agent, name, torch.compile(getattr(agent, name)))
    agent.critic.encode = torch.compile(agent.critic.encode)
    for name, gradient in gradients(agent, inputs).items():
        assert (gradient - eager[name]).abs().max() <= 1e-4 * eager[name].abs().max(), name


# --- README -----------------------------------------------------------------------------------------------------------
def test_readme_says_how_long_the_diff_is():
    command = ["diff", "sac_state_sim.py", "sac_pixel_sim.py"]
    diff = subprocess.run(command, cwd=REPO, capture_output=True, text=True).stdout
    changed = {sign: sum(line.startswith(sign) for line in diff.splitlines()) for sign in "<>"}
    readme = (REPO / "README.md").read_text()
    diff_size = r"`diff sac_state_sim.py sac_pixel_sim.py` drops ([\d,]+) lines and adds ([\d,]+) lines"
    stated = re.search(diff_size, readme)
    assert stated and [int(number.replace(",", "")) for number in stated.groups()] == [changed["<"], changed[">"]]
