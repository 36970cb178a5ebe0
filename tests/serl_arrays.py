"""What tests of images share: SERL's arrays (tests/fixtures), ways to put them into our layers, and torchvision."""

import functools
import pickle
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from common.vision import SmallTrunk, SpatialEmbeddings

FIXTURES = Path(__file__).parent / "fixtures"


@functools.cache
def fit_torchvision() -> None:
    """Lets torchvision be imported beside a torch of another build (CPU and CUDA), whose operators it cannot load.

    It asks for these two at once; MobileNet needs neither.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        fit_torchvision.library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            fit_torchvision.library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def assert_close(ours, theirs, tolerance: float = 1e-5):
    """|ours - theirs| <= tolerance * (1 + |theirs|)."""
    ours = ours.detach().numpy() if isinstance(ours, Tensor) else ours
    np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


def nchw(maps: np.ndarray) -> Tensor:
    return torch.from_numpy(maps).permute(0, 3, 1, 2)


def nhwc(maps: Tensor) -> np.ndarray:
    return maps.detach().permute(0, 2, 3, 1).numpy()


@functools.cache
def encoder_arrays() -> dict[str, np.ndarray]:
    return dict(np.load(FIXTURES / "encoders.npz"))


@functools.cache
def resnet_arrays() -> dict[str, np.ndarray]:
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


def set_bottleneck(bottleneck: nn.Sequential, tree: dict) -> None:
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
