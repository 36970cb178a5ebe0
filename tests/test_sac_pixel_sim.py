"""sac_pixel_sim.py: what images add. Against SERL's arrays, buffers of numbered frames, cases by hand, and as a user."""

import dataclasses
import importlib
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import gymnasium as gym
import numpy as np
import probe_envs
import pytest
import torch
from conftest import REPO, popen_script, read_csv, wait_until
from forked import popen_forked, run_forked
from test_sac_distributed import finish, free_port
from torch import Tensor, nn

import sac_pixel_sim
from sac_pixel_sim import (
    Agent,
    Args,
    Bottleneck,
    Classifier,
    FiLM,
    FrameBuffer,
    Layout,
    MobileNetTrunk,
    Observation,
    PackImages,
    ResNetTrunk,
    SmallTrunk,
    SpatialEmbeddings,
    SpatialSoftmax,
    allocate_frames,
    augment,
    blur,
    color_jitter,
    load_trunk,
    make_env,
    pad_same,
    random_crop,
    read_pickle,
    standardize,
    transition,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
SCRIPT, CPU = "sac_pixel_sim.py", torch.device("cpu")
TASKS = {"PYTHONPATH": str(Path(probe_envs.__file__).parent)}
FIXTURES = Path(__file__).parent / "fixtures"
SMALL = {"hidden_dims": (16, 16), "batch_size": 8, "demos": 0, "compile": False, "threads": 1, "latent_dim": 12}
SMALL |= {"small_channels": (4, 6, 8), "proprio_dim": 5, "image_size": 20}


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


def assert_close(ours, theirs, tolerance: float = 1e-5):
    """|ours - theirs| <= tolerance * (1 + |theirs|)."""
    ours = ours.detach().numpy() if isinstance(ours, Tensor) else ours
    np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


def nchw(maps: np.ndarray) -> Tensor:
    return torch.from_numpy(maps).permute(0, 3, 1, 2)


def nhwc(maps: Tensor) -> np.ndarray:
    return maps.detach().permute(0, 2, 3, 1).numpy()


# --- Networks against SERL's arrays -----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def encoders() -> dict[str, np.ndarray]:
    return dict(np.load(FIXTURES / "encoders.npz"))


@pytest.fixture(scope="module")
def resnet() -> dict[str, np.ndarray]:
    arrays = dict(np.load(FIXTURES / "resnet.npz")) | dict(np.load(FIXTURES / "resnet_block3.npz"))
    halves = [np.load(FIXTURES / f"resnet_block3_conv1_{i}.npz") for i in range(2)]
    name = halves[0].files[0]
    return arrays | {name: np.concatenate([half[name] for half in halves], -1)}


def tree_of(arrays: dict[str, np.ndarray], prefix: str) -> dict:
    """The arrays whose names begin with prefix, as a tree of dictionaries."""
    tree = {}
    for name in [name for name in arrays if name.startswith(prefix)]:
        *folders, leaf = name.removeprefix(prefix).split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[leaf] = arrays[name]
    return tree


def write_pickle(path: Path, tree: object, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(tree, protocol))
    return path


def set_linear(linear: nn.Linear, tree: dict) -> None:
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(tree["kernel"]).T)
        linear.bias.copy_(torch.from_numpy(tree["bias"]))


def set_bottleneck(bottleneck: Bottleneck, tree: dict) -> None:
    set_linear(bottleneck[0], tree["Dense_0"])
    with torch.no_grad():
        bottleneck[1].weight.copy_(torch.from_numpy(tree["LayerNorm_0"]["scale"]))
        bottleneck[1].bias.copy_(torch.from_numpy(tree["LayerNorm_0"]["bias"]))


def set_embeddings(embeddings: SpatialEmbeddings, kernel: np.ndarray) -> None:
    with torch.no_grad():
        embeddings.kernel.copy_(torch.from_numpy(kernel).flatten(0, 1))


def small_trunk(arrays: dict[str, np.ndarray], prefix: str, strides: tuple[int, ...], padding: int) -> SmallTrunk:
    kernels = [arrays[f"{prefix}Conv_{i}/kernel"] for i in range(len(strides))]
    trunk = SmallTrunk(3, tuple(kernel.shape[-1] for kernel in kernels), strides, padding)
    with torch.no_grad():
        for i, (conv, kernel) in enumerate(zip(trunk.convs, kernels)):
            conv.weight.copy_(torch.from_numpy(kernel).permute(3, 2, 0, 1))
            conv.bias.copy_(torch.from_numpy(arrays[f"{prefix}Conv_{i}/bias"]))
    return trunk


def test_serl_resnet_from_its_pickle(resnet, tmp_path):
    trunk = ResNetTrunk(3)
    load_trunk(trunk, str(write_pickle(tmp_path / "resnet10_params.pkl", tree_of(resnet, "resnet/params/"))))
    images = torch.from_numpy(resnet["resnet/in/images"])
    x = trunk.conv_init(standardize(images))
    assert_close(nhwc(x[..., ::8, ::8]), resnet["resnet/out/conv_init_s8"], 5e-5)
    x = trunk.norm_init(x)
    assert_close(nhwc(x[..., ::8, ::8]), resnet["resnet/out/norm_init_s8"], 5e-5)
    x = torch.nn.functional.max_pool2d(pad_same(x.relu(), 3, 2, -math.inf), 3, 2)
    for i, block in enumerate(trunk.blocks):
        x = block(x)
        name = f"resnet/out/block{i}" if i < 3 else "resnet/out/features"
        assert_close(nhwc(x), resnet[name], 5e-5)
    assert torch.equal(trunk(images), x)
    assert trunk(images).is_contiguous(memory_format=torch.channels_last)


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
    head = Agent(small_layout(), 2, small_args(pooling="average"), CPU).critic.encoder.heads[0]
    assert_close(head[0](features), encoders["head/avg/out"])


def test_serl_spatial_softmax(encoders):
    softmax = SpatialSoftmax()
    maps = nchw(encoders["spatial_softmax/square/in"])
    assert_close(softmax(maps), encoders["spatial_softmax/square/out"])
    with torch.no_grad():
        softmax.temperature.copy_(torch.from_numpy(encoders["spatial_softmax/square_temp/params/softmax_temperature"]))
    assert_close(softmax(maps), encoders["spatial_softmax/square_temp/out"])


def test_spatial_softmax_of_a_map_that_is_not_square():
    """x of all channels, then y, each from -1 to 1 along its own side."""
    maps = torch.zeros(1, 2, 3, 5)
    maps[0, 0, 0, 4] = maps[0, 1, 2, 1] = 100
    assert_close(SpatialSoftmax()(maps), [[1, -0.5, -1, 1]])


def test_serl_film(encoders):
    film, params = FiLM(6, 9), tree_of(encoders, "film/params/")
    features, condition = nchw(encoders["film/in/features"]), torch.from_numpy(encoders["film/in/cond"])
    assert torch.equal(film(features, condition), features)  # at first it changes nothing
    set_linear(film.scale, params["Dense_0"])
    set_linear(film.shift, params["Dense_1"])
    assert_close(nhwc(film(features, condition)), encoders["film/out"])


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
    maps = conv(standardize(torch.from_numpy(encoders["mobilenet_wrapper/in/images"]))).relu()
    embeddings, bottleneck = SpatialEmbeddings(10, 5, 5), Bottleneck(80, 24)
    set_embeddings(embeddings, tree["SpatialLearnedEmbeddings_0"]["kernel"])
    set_bottleneck(bottleneck, tree)
    assert_close(bottleneck(embeddings(maps)), encoders["mobilenet_wrapper/out"])


def drq_agent(arrays: dict[str, np.ndarray], monkeypatch, tmp_path) -> Agent:
    """SERL's whole pixel actor and critic: frozen narrow ResNet, a head per camera, states, policy and critics."""
    tree = tree_of(arrays, "drq/params/")
    encoder = tree["actor"]["encoder"]
    monkeypatch.setattr(sac_pixel_sim, "ResNetTrunk", lambda channels: ResNetTrunk(channels, (8, 16, 32, 64)))
    path = write_pickle(tmp_path / "trunk.pkl", encoder["encoder_front"]["pretrained_encoder"])
    args = small_args(encoder="resnet10", pretrained=str(path), image_size=64, latent_dim=24, proprio_dim=64)
    args = dataclasses.replace(args, hidden_dims=(32, 32), activation="tanh", num_qs=3, normalize_observations=False)
    layout = Layout(("front", "wrist"), 64, {"state": (0, 5)}, 1)
    agent = Agent(layout, 4, args, CPU)
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


def test_serl_random_crop():
    arrays = np.load(FIXTURES / "drq_random_crop.npz")
    for prefix in ("", "stack/"):
        images, offsets, out = (
            torch.from_numpy(arrays[prefix + name]) for name in ("in/images", "in/offsets", "out/images")
        )
        shape = images.shape
        images, offsets = images.reshape(-1, *shape[-3:]), offsets.reshape(-1, 2)
        assert torch.equal(random_crop(images, offsets, int(arrays["in/padding"])).view(shape), out)


# --- Pretrained parameters --------------------------------------------------------------------------------------------
TREE = {
    "conv_init": {"kernel": np.arange(24, dtype=np.float32).reshape(2, 3, 1, 4)},
    "ResNetBlock_0": {
        "MyGroupNorm_0": {"scale": np.float64([1, 2]), "bias": np.asfortranarray(np.eye(3, dtype=">f4"))}
    },
}


def arrays_of(path: Path) -> object:
    return sac_pixel_sim.pickled_arrays(read_pickle(path))


@pytest.fixture
def _jax_and_flax(monkeypatch):
    """Modules with the names by which jax and flax pickle their arrays and dictionaries."""
    for name in ("jax", "jax._src", "jax._src.array", "flax", "flax.core", "flax.core.frozen_dict"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))

    def _reconstruct_array(fun, args, arr_state, aval_state):
        raise AssertionError("called")

    class FrozenDict(dict):
        def __reduce__(self):
            return FrozenDict, (dict(self),)

    _reconstruct_array.__module__, _reconstruct_array.__qualname__ = "jax._src.array", "_reconstruct_array"
    FrozenDict.__module__, FrozenDict.__qualname__ = "flax.core.frozen_dict", "FrozenDict"
    sys.modules["jax._src.array"]._reconstruct_array = _reconstruct_array
    sys.modules["flax.core.frozen_dict"].FrozenDict = FrozenDict


class JaxArray:
    """Pickles as jax.Array does (jax/_src/array.py, __reduce__)."""

    def __init__(self, array: np.ndarray):
        self.array = array

    def __reduce__(self):
        fun, args, state = self.array.__reduce__()
        return sys.modules["jax._src.array"]._reconstruct_array, (fun, args, state, {"weak_type": False})


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", ["numpy", "jax"])
@pytest.mark.usefixtures("_jax_and_flax")
def test_pickles_of_arrays_are_read(tmp_path, protocol, kind):
    def convert(tree):
        if isinstance(tree, np.ndarray):
            return JaxArray(tree) if kind == "jax" else tree
        items = {name: convert(value) for name, value in tree.items()}
        return sys.modules["flax.core.frozen_dict"].FrozenDict(items) if kind == "jax" else items

    read = arrays_of(write_pickle(tmp_path / "p.pkl", convert(TREE), protocol))
    assert read.keys() == TREE.keys()
    for array, original in (
        (read["conv_init"]["kernel"], TREE["conv_init"]["kernel"]),
        *((read["ResNetBlock_0"]["MyGroupNorm_0"][k], v) for k, v in TREE["ResNetBlock_0"]["MyGroupNorm_0"].items()),
    ):
        assert array.dtype == original.dtype and np.array_equal(array, original)
    # An array that stands in two places is written once, and referred to.
    kernel = TREE["conv_init"]["kernel"]
    read = arrays_of(write_pickle(tmp_path / "p.pkl", {"a": kernel, "b": {"c": kernel}}, protocol))
    assert np.array_equal(read["a"], kernel) and np.array_equal(read["b"]["c"], kernel)


class Malicious:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("suffix", ["pkl", "pt"])
def test_malicious_pickle_is_refused(tmp_path, resnet, protocol, suffix):
    """Also inside a file that is otherwise right; nothing in it is run."""
    marker, path = tmp_path / "marker", tmp_path / f"p.{suffix}"
    for tree in (Malicious(marker), tree_of(resnet, "resnet/params/") | {"output": Malicious(marker)}):
        write_pickle(path, tree, protocol)
        with pytest.raises(SystemExit, match=f"--pretrained {path}: refused: .+; give a file"):
            load_trunk(ResNetTrunk(3), str(path))
    assert not marker.exists()
    pickle.loads(path.read_bytes())  # what the test is about: Python's own unpickler runs it
    assert marker.exists()


def test_pickles_that_are_damaged_or_hold_something_else_are_refused(tmp_path, resnet):
    data = write_pickle(tmp_path / "whole.pkl", tree_of(resnet, "resnet/params/")).read_bytes()
    path = tmp_path / "p.pkl"
    for damaged in (
        b"",
        data[:1000],
        data[:-1],
        b"." + data,
        b"0" + data,
        data.replace(b"kernel", b"kernol"),
        b"\x80\x04].",
    ):
        path.write_bytes(damaged)
        with pytest.raises(SystemExit, match="refused"):
            load_trunk(ResNetTrunk(3), str(path))
    loop = {}
    loop["self"] = loop
    for tree in (loop, {"a": "text"}, {"a": [np.ones(2)]}, {"a": np.array(["text"])}, {"a": np.ones(2, complex)}):
        write_pickle(path, tree)
        with pytest.raises(SystemExit, match="refused"):
            load_trunk(ResNetTrunk(3), str(path))


def test_pretrained_parameters_of_other_shape_or_name(tmp_path):
    narrow, path = ResNetTrunk(3, (8, 16, 32, 64)), tmp_path / "resnet.pt"
    torch.save(narrow.state_dict(), path)
    with pytest.raises(SystemExit, match=r"conv_init.weight must have shape \(64, 3, 7, 7\), is \(8, 3, 7, 7\)"):
        load_trunk(ResNetTrunk(3), str(path))
    with pytest.raises(SystemExit, match=r"features.0.0.weight must have shape .* is not in the file"):
        load_trunk(MobileNetTrunk(3, True), str(path))
    with pytest.raises(SystemExit, match=r"nowhere.pt: refused: .*No such file"):
        load_trunk(ResNetTrunk(3), str(tmp_path / "nowhere.pt"))


def test_plain_state_dict(tmp_path):
    """What the file holds beside the trunk's parameters is left out."""
    path, one, other = tmp_path / "resnet.pt", ResNetTrunk(3, (8, 8, 8, 8)), ResNetTrunk(3, (8, 8, 8, 8))
    torch.save(one.state_dict() | {"classifier.weight": torch.ones(2)}, path)
    load_trunk(other, str(path))
    for name, value in one.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def test_mobilenet_is_torchvisions(tmp_path):
    """Names, number of parameters and shapes of mobilenet_v3_small's features, 927,008 parameters in all."""
    trunk = MobileNetTrunk(3, pretrained=True)
    assert sum(parameter.numel() for parameter in trunk.parameters()) == 927_008
    state = trunk.state_dict()
    for name, shape in (
        ("features.0.0.weight", (16, 3, 3, 3)),
        ("features.0.1.running_var", (16,)),
        ("features.1.block.0.0.weight", (16, 1, 3, 3)),  # expands nothing: depthwise, squeeze and excite, project
        ("features.1.block.1.fc1.weight", (8, 16, 1, 1)),
        ("features.1.block.2.0.weight", (16, 16, 1, 1)),
        ("features.2.block.0.0.weight", (72, 16, 1, 1)),
        ("features.2.block.2.1.num_batches_tracked", ()),
        ("features.4.block.2.fc1.bias", (24,)),
        ("features.4.block.2.fc2.weight", (96, 24, 1, 1)),
        ("features.5.block.2.fc1.weight", (64, 240, 1, 1)),
        ("features.9.block.1.0.weight", (288, 1, 5, 5)),
        ("features.11.block.3.0.weight", (96, 576, 1, 1)),
        ("features.12.0.weight", (576, 96, 1, 1)),
        ("features.12.1.bias", (576,)),
    ):
        assert state[name].shape == shape, name
    torch.save(state | {"classifier.0.weight": torch.ones(1024, 576)}, tmp_path / "mobilenet.pth")
    load_trunk(MobileNetTrunk(3, pretrained=True), str(tmp_path / "mobilenet.pth"))
    images = torch.randint(256, (2, 64, 64, 3))
    assert trunk(images).shape == (2, 576, 2, 2)
    before = trunk(images)
    assert torch.equal(before[:1], trunk(images[:1])) or torch.allclose(before[:1], trunk(images[:1]), atol=1e-5)
    assert all(torch.equal(value, state[name]) for name, value in trunk.train().state_dict().items())


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
    return make_env(Args(**{"env_id": "probe_envs:PixelPoint-v0", "image_size": 32} | changes))


def test_make_env_packs_states_and_images():
    env, plain = pixel_env(), gym.make("probe_envs:PixelPoint-v0")
    layout = env.get_wrapper_attr("layout")
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
    layout = dataclasses.replace(env.get_wrapper_attr("layout"), stack=3)
    seen = [plain.reset(seed=3)[0]["wrist"]] * 3
    packed = env.reset(seed=3)[0]
    for _ in range(4):
        assert np.array_equal(layout.unpack(torch.from_numpy(packed)[None])[1][0, :, 0], seen[-3:])
        packed = env.step(np.float32([0.5, -0.5, 0]))[0]
        seen.append(plain.step(np.float32([1, -1, 0]))[0]["wrist"])


def test_images_are_resized_by_area():
    env = pixel_env(image_size=8)
    frame = gym.make("probe_envs:PixelPoint-v0").reset(seed=1)[0]["front"].astype(float)
    small = env.get_wrapper_attr("layout").unpack(torch.from_numpy(env.reset(seed=1)[0])[None])[1][0, 0, 0]
    assert np.abs(frame.reshape(8, 4, 8, 4, 3).mean((1, 3)) - small.numpy()).max() <= 0.5


def test_grey_images_of_another_shape_without_states():
    env = make_env(Args(env_id="probe_envs:GreyImages-v0", image_size=20, demos=0))
    states, frames = env.get_wrapper_attr("layout").unpack(torch.from_numpy(env.reset(seed=1)[0])[None])
    assert states.shape == (1, 0) and frames.shape == (1, 1, 1, 20, 20, 3)
    assert frames.max() > 200 and torch.equal(frames[..., 0], frames[..., 2])


def test_color_jitter():
    images = torch.randint(256, (4, 6, 6, 3)).float()
    assert_close(color_jitter(images, 0.5, torch.full((4, 3), 0.5)), images)  # the middle changes nothing
    brighter = color_jitter(images / 4, 0.5, torch.tensor([[1, 0.5, 0.5]] * 4))
    assert_close(brighter, images / 4 * 1.5)
    flat = color_jitter(images, 1.0, torch.tensor([[0.5, 0, 0.5]] * 4))
    assert flat.flatten(1).std(1).max() < 1e-2  # without contrast
    grey = color_jitter(images, 1.0, torch.tensor([[0.5, 0.5, 0]] * 4))
    assert_close(grey[..., 0], grey[..., 2], 1e-4)
    assert_close(grey[..., 0], images @ torch.tensor([0.299, 0.587, 0.114]), 1e-4)


def test_blur():
    images = torch.zeros(2, 9, 9, 3)
    images[:, 4, 4] = 100
    sharp, soft = blur(images, torch.tensor([0.1, 1.0]))
    assert_close(sharp, images[0], 1e-4)
    kernel = torch.exp(-0.5 * torch.arange(-2, 3) ** 2)
    kernel = kernel / kernel.sum()
    assert_close(soft[2:7, 2:7, 0], 100 * kernel[:, None] * kernel)
    assert_close(blur(torch.full((2, 9, 9, 3), 7.0), torch.ones(2)), torch.full((2, 9, 9, 3), 7.0))  # edges too


def test_augmentation_is_per_frame_and_a_flip_per_sample():
    generator = torch.Generator().manual_seed(0)
    frame = torch.randint(256, (20, 20, 3), dtype=torch.uint8)
    frames = frame.expand(64, 4, 20, 20, 3)  # all the same
    args = small_args(augment=("crop",), crop_padding=2)
    cropped = augment(frames, args, generator)
    assert cropped.dtype == torch.uint8 and cropped.shape == frames.shape
    assert len({image.numpy().tobytes() for image in cropped.flatten(0, 1)}) == 25  # all offsets
    assert any(not torch.equal(sample[0], sample[1]) for sample in cropped)
    flipped = augment(frames, small_args(augment=("flip",)), generator)
    kinds = [tuple(torch.equal(image, frame.flip(1)) for image in sample) for sample in flipped]
    assert set(kinds) == {(True,) * 4, (False,) * 4}
    assert torch.equal(augment(frames, small_args(augment=()), generator), frames)
    every = augment(frames, small_args(augment=("crop", "jitter", "blur", "flip")), generator)
    assert every.shape == frames.shape and 0 <= every.min() and every.max() <= 255 and every.std() > 1
    again = augment(frames, args, torch.Generator().manual_seed(0))
    assert torch.equal(again, cropped)  # the generator decides


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
    numbers = torch.arange(buffer.first, buffer.total)
    compact, sampled = buffer.gather(numbers, buffer.features)
    assert torch.equal(sampled[:, :-1], frames) and torch.equal(sampled[:, 1:], next_frames)
    assert torch.equal(
        compact, torch.cat([states, whole[:, buffer.obs_dim : -buffer.obs_dim - 1], next_states, whole[:, -1:]], 1)
    )


@pytest.mark.parametrize("stack", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_buffer_returns_what_was_put_in(stack, seed):
    """Episode starts, truncation and termination, segments from mid-episode, wrap-around of either ring; any portions."""
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
            assert buffer.ends[(buffer.first - 1) % capacity] - stack < oldest


def test_each_frame_is_stored_once():
    layout = numbered_layout(1)
    rows = numbered_rows(layout, np.random.default_rng(0), 200, lengths=(100, 101), whole=1)
    buffer = new_buffer(layout, 1000, 1000)
    buffer.add(rows)
    assert buffer.frame_total == 202  # two episodes of 100 steps and their first frames
    stacked = numbered_rows(numbered_layout(3), np.random.default_rng(0), 200, lengths=(100, 101), whole=1)
    buffer = new_buffer(numbered_layout(3), 1000, 1000)
    buffer.add(stacked)
    assert buffer.frame_total == 206  # and its stack at each start


def test_memory_per_transition(capsys, monkeypatch):
    """At most 0.51 of storing observation and next observation; 200,000 transitions of two 128 x 128 cameras: 20 GB."""
    args = small_args(image_size=128, buffer_size=200_000, run_dir="r", small_channels=(4,))
    agent = Agent(Layout(("front", "wrist"), 128, {"state": (0, 7)}, 1), 4, args, CPU)
    monkeypatch.setattr(sac_pixel_sim, "available_memory", lambda: 24_000_000_000)
    buffer = agent.make_buffer("buffer", args.buffer_size)  # pages of memory that nobody touches cost nothing
    assert buffer.frames.nbytes <= 20e9
    assert "203,126 frames of 2 x 128 x 128 pixels, 20 GB, memory" in capsys.readouterr().out
    small = (buffer.rows.nbytes + buffer.newest.nbytes + buffer.ends.nbytes) / len(buffer.rows)
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
        compact, frames = buffer.gather(torch.from_numpy(out["transition"]).long(), buffer.frames)
        same = (frames[:, :-1, 0].numpy() == out["obs_image"]).all((1, 2, 3, 4))
        same &= (frames[:, 1:, 0].numpy() == out["next_obs_image"]).all((1, 2, 3, 4))
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
    assert other.frame_total == 43
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
    other.add(rows[30:60])  # now another number of frames
    state = other.state_dict()
    assert_holds(reload(other, state, tmp_path), rows)
    for start in range(60, 300, 30):
        other.add(rows[start : start + 30])
        state = other.state_dict()
        assert_holds(reload(other, state, tmp_path), rows)


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
