"""common/vision.py: augmentation, trunks and pooling against SERL's arrays, and files of parameters."""

import math
import os
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from serl_arrays import (
    FIXTURES,
    assert_close,
    encoder_arrays,
    fit_torchvision,
    nchw,
    nhwc,
    resnet_arrays,
    set_embeddings,
    set_linear,
    tree_of,
    write_pickle,
)
from torch import nn

from common.vision import (
    ArrayUnpickler,
    FiLM,
    MobileNetTrunk,
    ResNetTrunk,
    SpatialSoftmax,
    augment,
    blur,
    color_jitter,
    load_trunk,
    make_pooling,
    make_trunk,
    map_shape,
    pad_same,
    random_crop,
    trunk_hash,
)


@pytest.fixture(scope="module")
def encoders() -> dict[str, np.ndarray]:
    return encoder_arrays()


@pytest.fixture(scope="module")
def resnet() -> dict[str, np.ndarray]:
    return resnet_arrays()


def test_serl_resnet_from_its_pickle(resnet, tmp_path):
    trunk = ResNetTrunk(3)
    load_trunk(trunk, str(write_pickle(tmp_path / "resnet10_params.pkl", tree_of(resnet, "resnet/params/"))))
    images = torch.from_numpy(resnet["resnet/in/images"])
    x = trunk.conv_init(trunk.standardize(images))
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
    embeddings, count = make_pooling("embeddings", (48, 4, 4))
    set_embeddings(embeddings, encoders["head/sle/params/kernel"])
    assert_close(embeddings(features), encoders["head/sle/out"])
    average, other = make_pooling("average", (48, 4, 4))
    assert_close(average(features), encoders["head/avg/out"])
    assert (count, other) == (embeddings(features).shape[1], 48)


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


def test_serl_random_crop():
    arrays = np.load(FIXTURES / "drq_random_crop.npz")
    for prefix in ("", "stack/"):
        images, offsets, out = (
            torch.from_numpy(arrays[prefix + name]) for name in ("in/images", "in/offsets", "out/images")
        )
        shape = images.shape
        images, offsets = images.reshape(-1, *shape[-3:]), offsets.reshape(-1, 2)
        assert torch.equal(random_crop(images, offsets, int(arrays["in/padding"])).view(shape), out)


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
    cropped = augment(frames, ("crop",), 2, generator)
    assert cropped.dtype == torch.uint8 and cropped.shape == frames.shape
    assert len({image.numpy().tobytes() for image in cropped.flatten(0, 1)}) == 25  # all offsets
    assert any(not torch.equal(sample[0], sample[1]) for sample in cropped)
    for kind in ("jitter", "blur"):
        changed = augment(frames, (kind,), 2, generator)
        assert len({image.numpy().tobytes() for image in changed.flatten(0, 1)}) == 64 * 4
    flipped = augment(frames, ("flip",), 2, generator)
    kinds = [tuple(torch.equal(image, frame.flip(1)) for image in sample) for sample in flipped]
    assert set(kinds) == {(True,) * 4, (False,) * 4}
    assert torch.equal(augment(frames, (), 2, generator), frames)
    every = augment(frames, ("crop", "jitter", "blur", "flip"), 2, generator)
    assert every.shape == frames.shape and every.min() >= 0 and every.max() < 255.1 and every.std() > 1
    again = augment(frames, ("crop",), 2, torch.Generator().manual_seed(0))
    assert torch.equal(again, cropped)  # the generator decides


# --- Pretrained parameters --------------------------------------------------------------------------------------------
TREE = {
    "conv_init": {"kernel": np.arange(24, dtype=np.float32).reshape(2, 3, 1, 4)},
    "ResNetBlock_0": {
        "MyGroupNorm_0": {"scale": np.float64([1, 2]), "bias": np.asfortranarray(np.eye(3, dtype=">f4"))}
    },
}


def arrays_of(path: Path) -> object:
    return ArrayUnpickler(path.open("rb")).load()


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
        assert array.dtype.kind == original.dtype.kind and np.array_equal(array, original)
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
        with pytest.raises(ValueError, match=f"{path}: refused: .+; give a file"):
            load_trunk(ResNetTrunk(3), str(path))
    assert not marker.exists()
    pickle.loads(path.read_bytes())  # noqa: S301  what the test is about: Python's own unpickler runs it
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
        with pytest.raises(ValueError, match="refused"):
            load_trunk(ResNetTrunk(3), str(path))
    loop = {}
    loop["self"] = loop
    for tree in (loop, {"a": "text"}, {"a": [np.ones(2)]}, {"a": np.array(["text"])}, {"a": np.ones(2, complex)}):
        write_pickle(path, tree)
        with pytest.raises(ValueError, match="refused"):
            load_trunk(ResNetTrunk(3), str(path))


def test_pretrained_parameters_of_other_shape_or_name(tmp_path):
    narrow, path = ResNetTrunk(3, (8, 16, 32, 64)), tmp_path / "resnet.pt"
    torch.save(narrow.state_dict(), path)
    with pytest.raises(ValueError, match=r"conv_init.weight must have shape \(64, 3, 7, 7\), is \(8, 3, 7, 7\)"):
        load_trunk(ResNetTrunk(3), str(path))
    fit_torchvision()
    with pytest.raises(ValueError, match=r"features.0.0.weight must have shape .* is not in the file"):
        load_trunk(MobileNetTrunk(3, True), str(path))
    with pytest.raises(ValueError, match=r"nowhere.pt: refused: .*No such file"):
        load_trunk(ResNetTrunk(3), str(tmp_path / "nowhere.pt"))


def test_pretrained_parameters_that_are_not_finite(tmp_path):
    """Else the policy's actions would be blamed, once it acts."""
    trunk, path = ResNetTrunk(3, (8, 16, 32, 64)), tmp_path / "resnet.pt"
    trunk.norm_init.bias.data[3] = torch.nan
    torch.save(trunk.state_dict(), path)
    with pytest.raises(ValueError, match=r"resnet.pt: refused: norm_init.bias holds numbers that are not finite"):
        load_trunk(trunk, str(path))


@pytest.mark.parametrize("wrap", ["", "state_dict", "params", "module."])
def test_plain_state_dict(tmp_path, wrap):
    """P5: what the file holds beside the trunk's parameters is left out; training loops store them inside something."""
    path, one, other = tmp_path / "resnet.pt", ResNetTrunk(3, (8, 8, 8, 8)), ResNetTrunk(3, (8, 8, 8, 8))
    state = one.state_dict() | {"classifier.weight": torch.ones(2)}
    if wrap == "module.":
        state = {wrap + name: tensor for name, tensor in state.items()}
    torch.save({wrap: state, "epoch": 3} if wrap in ("params", "state_dict") else state, path)
    load_trunk(other, str(path))
    for name, value in one.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def test_flax_parameters_inside_params(tmp_path, resnet):
    path = write_pickle(tmp_path / "resnet.pkl", {"params": tree_of(resnet, "resnet/params/")})
    trunk = make_trunk("resnet10", 3, str(path))
    kernel = torch.from_numpy(resnet["resnet/params/conv_init/kernel"])
    assert torch.equal(trunk.conv_init.weight, kernel.permute(3, 2, 0, 1))


# --- Trunks by name ---------------------------------------------------------------------------------------------------
def test_mobilenet_is_torchvisions(tmp_path):
    """927,008 parameters as in arXiv:1905.02244's small net; its file is loaded, its statistics never move."""
    fit_torchvision()
    trunk = MobileNetTrunk(3, pretrained=True)
    assert sum(parameter.numel() for parameter in trunk.parameters()) == 927_008
    for module in trunk.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
    state = {name: tensor.clone() for name, tensor in trunk.state_dict().items()}
    torch.save(state | {"classifier.0.weight": torch.ones(1024, 576)}, tmp_path / "mobilenet.pth")
    other = make_trunk("mobilenet", 3, str(tmp_path / "mobilenet.pth")).train()
    images = torch.randint(256, (2, 64, 64, 3))
    maps = other(images)
    assert maps.shape == (2, 576, 2, 2)
    assert_close(maps, trunk(images).detach())
    assert_close(other(images[:1]), maps[:1].detach())  # an image's maps do not depend on the others
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())


def test_mobilenet_from_scratch_sees_a_stack_of_frames_as_channels():
    fit_torchvision()
    trunk = make_trunk("mobilenet", 6)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in trunk.modules())
    images = torch.randint(256, (2, 40, 40, 6))
    assert not torch.allclose(trunk(images), trunk(images.flip(3)))


def test_mobilenet_without_torchvision(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.models", None)  # its import raises ImportError
    with pytest.raises(ValueError, match="mobilenet needs the torchvision of torch .*: pip install torchvision"):
        make_trunk("mobilenet", 3)


@pytest.mark.parametrize(("name", "channels"), [("small", 64), ("resnet10", 512), ("mobilenet", 576)])
def test_shapes_and_pooling_by_name(name, channels):
    fit_torchvision()
    trunk = make_trunk(name, 3)
    shape = map_shape(trunk, 3, 64)
    maps = trunk(torch.randint(256, (3, 64, 64, 3)))
    assert maps.shape[1:] == shape and shape[0] == channels
    for pooling, count in (("embeddings", 8 * channels), ("softmax", 2 * channels), ("average", channels)):
        layer, features = make_pooling(pooling, shape)
        assert layer(maps).shape == (3, count) and features == count


def test_images_that_are_too_small_have_no_maps():
    assert map_shape(make_trunk("small", 3), 3, 7) == (0, 0, 0)


def test_fingerprint_is_of_the_parameters(tmp_path):
    one, other = ResNetTrunk(3, (8, 8, 8, 8)), ResNetTrunk(3, (8, 8, 8, 8))
    assert trunk_hash(one) != trunk_hash(other)
    other.load_state_dict(one.state_dict())
    assert trunk_hash(one) == trunk_hash(other.to(memory_format=torch.channels_last))
    with torch.no_grad():
        other.norm_init.bias[3] += 1e-3
    assert trunk_hash(one) != trunk_hash(other)
