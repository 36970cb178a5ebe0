"""Images: augmentation, convolutional trunks, pooling, FiLM, and files of pretrained parameters.

Images are (N, H, W, C), uint8 or float in 0 ... 255; maps are (N, C, h, w), stored channels last.
"""

import hashlib
import io
import math
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

JITTER_STRENGTH = 0.2  # largest relative change of brightness, contrast and saturation
BLUR_LEAST, BLUR_RANGE = 0.1, 1.0  # of a blur's standard deviation, in pixels
OUR_NAMES = {"Conv_0": "conv1", "Conv_1": "conv2", "MyGroupNorm_0": "norm1", "MyGroupNorm_1": "norm2"}
OUR_NAMES |= {"kernel": "weight", "scale": "weight"}  # of what SERL's parameters are called


# --- Augmentation -----------------------------------------------------------------------------------------------------
def random_crop(images: Tensor, offsets: Tensor, padding: int) -> Tensor:
    """Images (N, H, W, C) padded with their edge, then cut at offsets (N, 2) = row, column in 0 ... 2 * padding.

    DrQ arXiv:2004.13649, SERL vision/data_augmentations.py:7.
    """
    count, height, width, channels = images.shape
    rows = (torch.arange(height, device=images.device) + offsets[:, :1] - padding).clamp(0, height - 1)  # (N, H)
    rows = rows + height * torch.arange(count, device=images.device)[:, None]  # of all images, one below the other
    padded = torch.cat([images[:, :, :1]] * padding + [images] + [images[:, :, -1:]] * padding, 2)
    cuts = padded.flatten().unfold(0, width * channels, channels)  # a row of the result may begin at any pixel
    return cuts.index_select(0, (rows * padded.shape[2] + offsets[:, 1:]).flatten()).view_as(images)


def color_jitter(images: Tensor, strength: float, draws: Tensor) -> Tensor:
    """Images (N, H, W, 3) with brightness, contrast, saturation times 1 +- strength; draws (N, 3) in 0 ... 1."""
    factors = 1 + strength * (2 * draws.T - 1)  # (3, N)
    brightness, contrast, saturation = factors[..., None, None, None]  # (N, 1, 1, 1) each
    images = images * brightness
    mean = images.mean((1, 2, 3), keepdim=True)
    images = (images - mean) * contrast + mean
    grey = 0.299 * images[..., :1] + 0.587 * images[..., 1:2] + 0.114 * images[..., 2:]  # (N, H, W, 1)
    return ((images - grey) * saturation + grey).clamp(0, 255)


def blur(images: Tensor, sigmas: Tensor) -> Tensor:
    """Images (N, H, W, 3), each blurred by a Gaussian of its own standard deviation (N,), in pixels."""
    taps = torch.arange(-2, 3, device=images.device)
    weights = torch.softmax(-0.5 * (taps / sigmas[:, None]).square(), 1)  # (N, 5)
    for dim in (1, 2):
        places = torch.arange(images.shape[dim], device=images.device)
        shifted = [images.index_select(dim, (places + tap).clamp(0, len(places) - 1)) for tap in taps]
        images = sum(image * weight[:, None, None, None] for image, weight in zip(shifted, weights.T, strict=True))
    return images


def augment(frames: Tensor, kinds: tuple[str, ...], padding: int, generator: torch.Generator) -> Tensor:
    """All frames (B, N, H, W, 3) of a batch at once: each crop, jitter and blur is a frame's own, a flip a sample's.

    `kinds` are of crop (by at most `padding` pixels), jitter, blur, flip; without any the frames come back.
    """
    batch, count = frames.shape[:2]
    images = frames.flatten(0, 1)
    if "crop" in kinds:
        offsets = torch.randint(2 * padding + 1, (len(images), 2), generator=generator, device=frames.device)
        images = random_crop(images, offsets, padding)
    if "jitter" in kinds:
        draws = torch.rand(len(images), 3, generator=generator, device=frames.device)
        images = color_jitter(images.float(), JITTER_STRENGTH, draws)
    if "blur" in kinds:
        sigmas = BLUR_LEAST + BLUR_RANGE * torch.rand(len(images), generator=generator, device=frames.device)
        images = blur(images.float(), sigmas)
    images = images.unflatten(0, (batch, count))
    if "flip" in kinds:
        flips = torch.rand(batch, 1, 1, 1, 1, generator=generator, device=frames.device) < 0.5
        images = torch.where(flips, images.flip(3), images)
    return images


# --- Trunks -----------------------------------------------------------------------------------------------------------
class Standardize(nn.Module):
    """Images (N, H, W, 3 * T) -> (N, 3 * T, H, W), scaled by ImageNet's mean and deviation; memory stays NHWC."""

    def __init__(self, channels: int):
        super().__init__()
        mean, std = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
        self.register_buffer("mean", 255 * mean.repeat(channels // 3), persistent=False)
        self.register_buffer("std", 255 * std.repeat(channels // 3), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return ((images - self.mean) / self.std).permute(0, 3, 1, 2)


class SmallTrunk(nn.Module):
    """Convolutions 3x3 with ReLU; SERL vision/small_encoders.py."""

    def __init__(self, in_channels: int, channels: tuple[int, ...], strides: tuple[int, ...], padding: int = 0):
        super().__init__()
        self.convs = nn.ModuleList()
        for out_channels, stride in zip(channels, strides, strict=True):
            self.convs.append(nn.Conv2d(in_channels, out_channels, 3, stride, padding))
            in_channels = out_channels

    def forward(self, images: Tensor) -> Tensor:
        x = images.permute(0, 3, 1, 2) / 255
        for conv in self.convs:
            x = conv(x).relu_()
        return x


def pad_same(x: Tensor, kernel: int, stride: int, value: float = 0.0) -> Tensor:
    """Padding like flax's SAME, where it differs from PyTorch's: (0, 1) for kernel 3 with stride 2 on even sizes."""
    sides = []
    for size in (x.shape[3], x.shape[2]):
        total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
        sides += [total // 2, total - total // 2]
    return F.pad(x, sides, value=value)


class ResNetBlock(nn.Module):
    """Two convolutions 3x3 beside a shortcut; SERL vision/resnet_v1.py:131."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.stride = stride
        self.project = stride != 1 or in_channels != channels
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(4, channels)
        self.norm2 = nn.GroupNorm(4, channels)
        if self.project:
            self.conv_proj = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.norm_proj = nn.GroupNorm(4, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.conv1(pad_same(x, 3, self.stride))).relu()
        y = self.norm2(self.conv2(y))
        shortcut = self.norm_proj(self.conv_proj(x)) if self.project else x
        return (shortcut + y).relu()


class ResNetTrunk(nn.Module):
    """ResNet-10 with GroupNorm, without its last pooling and layer; SERL vision/resnet_v1.py:189."""

    def __init__(self, in_channels: int, channels: tuple[int, ...] = (64, 128, 256, 512)):
        super().__init__()
        self.standardize = Standardize(in_channels)
        self.conv_init = nn.Conv2d(in_channels, channels[0], 7, 2, 3, bias=False)
        self.norm_init = nn.GroupNorm(4, channels[0])
        self.blocks = nn.ModuleList([ResNetBlock(channels[0], channels[0], 1)])
        for before, after in zip(channels[:-1], channels[1:], strict=True):
            self.blocks.append(ResNetBlock(before, after, 2))

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm_init(self.conv_init(self.standardize(images))).relu()
        x = F.max_pool2d(pad_same(x, 3, 2, -math.inf), 3, 2)
        for block in self.blocks:
            x = block(x)
        return x


class MobileNetTrunk(nn.Module):
    """torchvision's MobileNetV3-small without its classifier, arXiv:1905.02244.

    `pretrained`: BatchNorm with the statistics of its file; from scratch GroupNorm, as one acts on single images.
    """

    def __init__(self, in_channels: int, pretrained: bool = False):
        super().__init__()
        try:
            from torchvision.models import mobilenet_v3_small
        except (ImportError, RuntimeError) as error:  # RuntimeError: operators that were built for another torch
            what = f"mobilenet needs the torchvision of torch {torch.__version__}, from where torch comes"
            raise ValueError(f"{what}: pip install torchvision ({error})") from error
        norm = partial(nn.BatchNorm2d, eps=1e-3) if pretrained else partial(nn.GroupNorm, 4)
        self.standardize = Standardize(in_channels)
        self.features = mobilenet_v3_small(weights=None, norm_layer=norm).features
        if in_channels != 3:
            self.features[0][0] = nn.Conv2d(in_channels, 16, 3, 2, 1, bias=False)
        self.eval()

    def train(self, mode: bool = True) -> "MobileNetTrunk":
        return super().train(False)  # the stored statistics stay

    def forward(self, images: Tensor) -> Tensor:
        return self.features(self.standardize(images))


def make_trunk(
    name: str, in_channels: int, pretrained: str | None = None, load: bool = True, channels: tuple = (16, 32, 64)
) -> nn.Module:
    """The convolutions `name`, small, resnet10 or mobilenet: images (N, H, W, in_channels) -> maps (N, C, h, w).

    `pretrained` names the file of their parameters; without `load` it is not read, as a checkpoint brings them.
    `channels` are those of small. Raises ValueError when the file, or a package, is not there or does not fit.
    """
    if name == "small":
        trunk = SmallTrunk(in_channels, channels, (2,) * len(channels))
    elif name == "resnet10":
        trunk = ResNetTrunk(in_channels)
    else:
        trunk = MobileNetTrunk(in_channels, pretrained is not None)
    if pretrained and load:
        load_trunk(trunk, pretrained)
    return trunk.to(memory_format=torch.channels_last)


@torch.no_grad()
def map_shape(trunk: nn.Module, in_channels: int, size: int) -> tuple[int, int, int]:
    """Channels, height and width of the maps of images of `size`; zeros when these are too small for the trunk."""
    try:
        return tuple(trunk(torch.zeros(1, size, size, in_channels)).shape[1:])
    except RuntimeError:  # a convolution without a place to stand
        return (0, 0, 0)


def trunk_hash(trunk: nn.Module) -> str:
    """A hash of a trunk's parameters: the same for the same trunk, wherever its file was."""
    parameters = sorted(trunk.state_dict().items())
    data = [name.encode() + tensor.cpu().contiguous().numpy().tobytes() for name, tensor in parameters]
    return hashlib.sha256(b"".join(data)).hexdigest()


# --- Pooling ----------------------------------------------------------------------------------------------------------
class SpatialEmbeddings(nn.Module):
    """Weighted sums over the places of each channel, 8 of each; SERL vision/spatial.py."""

    def __init__(self, channels: int, height: int, width: int, count: int = 8):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(height * width, channels, count) / math.sqrt(height * width))

    def forward(self, maps: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C * 8)"""
        return torch.einsum("bcs,scf->bcf", maps.flatten(2), self.kernel).flatten(1)


class SpatialSoftmax(nn.Module):
    """Where each channel is largest: expected x of all channels, then y, in -1 ... 1; arXiv:1504.00702."""

    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(1))

    def forward(self, maps: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, 2 * C)"""
        height, width = maps.shape[2:]
        attention = (maps.flatten(2) / self.temperature).softmax(2).unflatten(2, (height, width))
        x = torch.linspace(-1, 1, width, device=maps.device)
        y = torch.linspace(-1, 1, height, device=maps.device)
        return torch.cat([(attention.sum(2) * x).sum(2), (attention.sum(3) * y).sum(2)], 1)


def make_pooling(name: str, shape: tuple[int, int, int]) -> tuple[nn.Module, int]:
    """The layer from maps (B, *shape) to numbers (B, F), embeddings, softmax or average, and F."""
    channels, height, width = shape
    if name == "embeddings":
        return SpatialEmbeddings(channels, height, width), 8 * channels
    if name == "softmax":
        return SpatialSoftmax(), 2 * channels
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), channels


class FiLM(nn.Module):
    """Scales and shifts the channels of maps as a vector says, at first not at all; arXiv:1709.07871."""

    def __init__(self, channels: int, condition_dim: int):
        super().__init__()
        self.scale = nn.Linear(condition_dim, channels)
        self.shift = nn.Linear(condition_dim, channels)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, maps: Tensor, condition: Tensor) -> Tensor:
        """Maps (B, C, h, w), condition (B, D)"""
        return maps * (1 + self.scale(condition)[..., None, None]) + self.shift(condition)[..., None, None]


# --- Pretrained parameters --------------------------------------------------------------------------------------------
def jax_array(function: Callable, arguments: tuple, state: tuple, _: object) -> np.ndarray:
    """The numpy array that a jax array was pickled as; jax/_src/array.py, __reduce__."""
    array = function(*arguments)
    array.__setstate__(state)
    return array


class ArrayUnpickler(pickle.Unpickler):
    """Reads dictionaries of numpy and jax arrays; no other name is looked up, so nothing foreign is run."""

    ALLOWED = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("numpy", "_reconstruct"): np._core.multiarray._reconstruct,
        ("numpy", "_frombuffer"): np._core.numeric._frombuffer,
        ("_codecs", "encode"): lambda text, _: text.encode("latin1"),
        ("jax", "_reconstruct_array"): jax_array,
        ("flax", "FrozenDict"): dict,
    }

    def find_class(self, module: str, name: str) -> Callable:
        package = module.split(".")[0]
        if (package, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"calls {module}.{name}")
        return self.ALLOWED[package, name]


def torch_parameters(tree: dict, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The parameters of SERL's ResNet by our names, in PyTorch's order of dimensions: (out, in, height, width)."""
    for theirs, value in tree.items():
        name = prefix + OUR_NAMES.get(theirs, theirs.replace("ResNetBlock_", "blocks."))
        if isinstance(value, dict):
            yield from torch_parameters(value, name + ".")
        elif isinstance(value, np.ndarray) and value.dtype.kind in "fiu":
            tensor = torch.from_numpy(value.astype(np.float32))
            yield name, tensor.permute(3, 2, 0, 1) if tensor.ndim == 4 else tensor
        else:
            raise ValueError(f"{name} is no array of numbers")


def read_parameters(path: str) -> dict[str, Tensor]:
    """Parameters by our names: of a pickle of SERL's, or a file of torch.save, also inside "params" or "state_dict"."""
    if Path(path).suffix == ".pkl":
        tree = ArrayUnpickler(io.BytesIO(Path(path).read_bytes())).load()
        parameters = dict(torch_parameters(tree.get("params", tree)))
    else:
        tree = torch.load(path, map_location="cpu", weights_only=True)
        parameters = tree.get("state_dict", tree.get("params", tree))
    return {name.removeprefix("module."): tensor for name, tensor in parameters.items()}  # of DataParallel


def load_trunk(trunk: nn.Module, path: str) -> None:
    """Loads pretrained parameters: SERL's resnet10_params.pkl, or a file of torch.save with a dict of tensors.

    What the file holds beside the trunk's parameters (a classifier) is left out. Raises ValueError when it cannot.
    """
    try:
        given = read_parameters(path)
        for name, tensor in trunk.state_dict().items():
            shape = tuple(given[name].shape) if name in given else "not in the file"
            if shape != tuple(tensor.shape):
                raise ValueError(f"{name} must have shape {tuple(tensor.shape)}, is {shape}")
            if not given[name].isfinite().all():
                raise ValueError(f"{name} holds numbers that are not finite")
        trunk.load_state_dict({name: given[name] for name in trunk.state_dict()})
    except Exception as error:  # a damaged or hostile file raises what it likes
        what = (str(error) or type(error).__name__).splitlines()[0].partition(". ")[0]  # no advice of PyTorch's
        raise ValueError(f"{path}: refused: {what}; give a file of the encoder's parameters") from error
