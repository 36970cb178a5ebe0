"""Images on their way from a task to the networks: in observations of any form, and as frames in a file.

env = ImagesAndState(env, "MyTask-v0", cameras=(), size=48)   # {"images": (K, 48, 48, 3), "state": (S,)}
file = FrameFile(run_dir / "replay.frames", (K, 48, 48, 3), device)
slot = file.put(frame)                                        # what a checkpoint refers to stays
"""

import math
import os
import shutil
from collections import deque
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from gymnasium import spaces
from torch import Tensor

from common import envs
from common.envs import looks_like_image
from common.evaluation import picture
from common.setup import Fault, fail
from common.tensors import check_memory


# --- Observations -----------------------------------------------------------------------------------------------------
class Rendered(gym.ObservationWrapper):
    """The rendered picture, called "render", in the place of a task's observation."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.reset()
        self.observation_space = spaces.Box(0, 255, self.observation(None).shape, np.uint8)

    def observation(self, obs) -> np.ndarray:
        return picture(self.env, "--cameras render: ")


def make_with_images(env_id: str, cameras: tuple[str, ...], render: bool = False, **options) -> gym.Env:
    """`envs.make`, where `cameras` are ("render",) with the picture as observation; reset once, as some tasks first
    need OpenGL there."""
    rendered = cameras == ("render",)

    def made() -> gym.Env:
        env = envs.make(env_id, render or rendered, **options)
        env = Rendered(env) if rendered else env
        env.reset()
        return env

    return envs.with_opengl(made, f"--env-id {env_id}", render or rendered)


def image_axes(space: spaces.Space) -> str | None:
    """HW, HWC or CHW, if a Box is an image: bytes, or float in [0, 1]; grey or colours; else None."""
    if not isinstance(space, spaces.Box) or not looks_like_image(space):
        return None
    as_floats = space.dtype.kind == "f" and (space.low == 0).all() and (space.high == 1).all()
    if space.dtype != np.uint8 and not as_floats:
        return None
    shape = space.shape
    if len(shape) == 2:
        return "HW" if min(shape) >= 8 else None
    if len(shape) == 3 and shape[2] in (1, 3) and min(shape[:2]) >= 8:
        return "HWC"
    if len(shape) == 3 and shape[0] in (1, 3) and min(shape[1:]) >= 8:
        return "CHW"
    return None


class ImagesAndState(gym.ObservationWrapper):
    """Any observation with images -> {"images": (K, size, size, 3) uint8, "state": (S,) float32}.

    Images may be anywhere, channels first or last, grey, bytes or floats in [0, 1]; other sizes are resized.
    `cameras` (K) are their paths, such as pixels/front; `columns` says where each of the other parts is in the state.
    """

    def __init__(self, env: gym.Env, env_id: str, cameras: tuple[str, ...], size: int):
        """Of the images only `cameras`, if there are any. Exits with one line that names what cannot be taken."""
        super().__init__(env)
        self.size = size
        leaves = envs.leaves(env.observation_space)
        parts = {"/".join(map(str, path)) or "image": (path, space) for path, space in leaves}
        if cameras == ("render",):
            parts = {"render": parts.get("image", parts.get("render"))}
        images = {name: image_axes(space) for name, (_, space) in parts.items() if image_axes(space)}
        if unknown := [name for name in cameras if name not in images]:
            fail(f"--cameras {' '.join(unknown)}: {env_id} has {' '.join(images) or 'no images'}")
        self.cameras = cameras or tuple(images)
        self.axes = {name: images[name] for name in self.cameras}
        self.paths = {name: path for name, (path, _) in parts.items()}
        self.spaces = {name: parts[name][1] for name in self.cameras}
        self.states: dict[str, spaces.Space] = {}
        self.columns: dict[str, tuple[int, int]] = {}
        start = 0
        for name, (_, space) in parts.items():
            if name in images or (cameras and looks_like_image(space)):
                continue
            if looks_like_image(space) or not space.is_np_flattenable or isinstance(space, spaces.Text):
                what = "images are (H, W), (H, W, 3) or (3, H, W), of 8 pixels or more, bytes or floats in [0, 1]"
                ways = "choose some with --cameras, or change it in a wrapper (make_env)"
                fail(f"--env-id {env_id}: cannot take {name}, {space}; {what}; {ways}")
            self.states[name] = space
            self.columns[name] = (start, start + spaces.flatdim(space))
            start = self.columns[name][1]
        if not images:
            fail(f"--env-id {env_id}: observes no images; use sac_state_sim.py, or --cameras render")
        self.observation_space = spaces.Dict(
            {
                "images": spaces.Box(0, 255, (len(self.cameras), size, size, 3), np.uint8),
                "state": spaces.Box(-np.inf, np.inf, (start,), np.float32),
            }
        )
        self.squeezed = [name for name in self.cameras if len(set(self.sides(parts[name][1], name))) > 1]

    def sides(self, space: spaces.Box, name: str) -> tuple[int, int]:
        return space.shape[1:] if self.axes[name] == "CHW" else space.shape[:2]

    def part(self, obs, name: str):
        for key in self.paths[name]:
            obs = obs[key]
        return obs

    def observation(self, obs) -> dict[str, np.ndarray]:
        images = [self.image(self.in_bytes(obs, name), self.axes[name]) for name in self.cameras]
        states = [spaces.flatten(space, self.part(obs, name)) for name, space in self.states.items()]
        state = np.concatenate([np.zeros(0, np.float32), *states], dtype=np.float32)
        return {"images": np.stack(images), "state": state}

    def in_bytes(self, obs, name: str) -> np.ndarray:
        """An image as bytes, bright where its space ends. Raises Fault when it holds something else."""
        image, space = self.part(obs, name), self.spaces[name]
        high = float(space.high.max())  # 1 of a mask
        if image.dtype == space.dtype == np.uint8 and high == 255:
            return image
        least, most = float(image.min()), float(image.max())
        if least < 0 or most > high or (space.dtype == np.uint8 and image.dtype.kind == "f"):
            said = f"{space.dtype} in 0 ... {high:g}"
            raise Fault(f"image {name} holds {image.dtype} in {least:g} ... {most:g}, its space says {said}")
        return np.round(image * (255.0 / high)).astype(np.uint8)

    def image(self, image: np.ndarray, axes: str) -> np.ndarray:
        """(size, size, 3) uint8; of other sizes the mean over the area that becomes a pixel."""
        image = image[..., None] if axes == "HW" else image
        image = image if axes == "CHW" else image.transpose(2, 0, 1)
        if image.shape[1:] != (self.size, self.size):
            pixels = torch.from_numpy(np.ascontiguousarray(image))[None].float()
            resized = F.interpolate(pixels, (self.size, self.size), mode="area").round()
            image = resized[0].to(torch.uint8).numpy()
        return np.broadcast_to(image.transpose(1, 2, 0), (self.size, self.size, 3))


class Views(NamedTuple):
    """What an observation consists of."""

    cameras: tuple[str, ...]  # K names
    size: int  # H = W
    stack: int  # T steps
    columns: dict[str, tuple[int, int]]  # of each state, the first and the last + 1 in a step's S numbers

    @property
    def frame_shape(self) -> tuple[int, ...]:
        """All cameras' images of one step: (K, H, W, 3)."""
        return len(self.cameras), self.size, self.size, 3

    @property
    def state_dim(self) -> int:
        """T * S"""
        return self.stack * sum(stop - start for start, stop in self.columns.values())


def views_of(env: gym.Env) -> Views:
    """Of a task with ImagesAndState and FrameStackObservation; says which images will not keep their shape."""
    stack, _, size = env.observation_space["images"].shape[:3]
    for name in env.get_wrapper_attr("squeezed"):
        print(f"{name} is not square: it is squeezed to {size} x {size}")
    return Views(env.get_wrapper_attr("cameras"), size, stack, env.get_wrapper_attr("columns"))


# --- Files ------------------------------------------------------------------------------------------------------------
class FrameFile:
    """Frames, equal arrays of bytes, in slots of a memory-mapped file: storage and checkpoint in one.

    A slot is taken by `put`, counted by `keep` and given back by `drop`. What a checkpoint refers to is written over
    only when two newer ones are there, so that the newest two can be read whenever the program is killed. The file
    grows when all slots are taken. On a GPU frames are read from a copy there, if it fits.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], device: torch.device):
        self.path = path
        self.shape = shape
        self.frame_bytes = math.prod(shape)
        self.device = device
        self.frames = np.empty((0, *shape), np.uint8)
        self.on_gpu: Tensor | None = None
        self.uses = np.zeros(0, np.int32)  # of each slot
        self.free: deque[int] = deque()
        self.dropped: list[int] = []  # since the newest checkpoint, which refers to them
        self.dropped_before: list[int] = []  # before it; the checkpoint before refers to them

    def __len__(self) -> int:
        return len(self.frames)

    def check_disk(self, slots: int, what: str, remedy: str) -> None:
        """Says how much disk they take. Exits with one line when there is not so much."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fail(f"--frames-dir {self.path.parent}: {error.strerror}; give another folder")
        if not os.access(self.path.parent, os.W_OK):
            fail(f"--frames-dir {self.path.parent}: takes no files; give another folder")
        needed, free = slots * self.frame_bytes, shutil.disk_usage(self.path.parent).free
        print(f"{what}, {size_text(needed)} of disk in {self.path.parent}", flush=True)
        if needed > free:
            fail(f"{self.path} needs {size_text(needed)} of disk, there are {size_text(free)}; {remedy}")

    def make_room(self, slots: int) -> None:
        """The file gets so many slots; what is in it stays, unless it has not been opened yet."""
        before = len(self)
        with self.path.open("r+b" if before else "wb") as file:
            if hasattr(os, "posix_fallocate"):  # a full disk shows now, not in a page fault
                os.posix_fallocate(file.fileno(), 0, slots * self.frame_bytes)
            else:
                file.truncate(slots * self.frame_bytes)
        self.open(slots)
        self.free.extend(range(before, slots))

    def open(self, slots: int) -> None:
        before = len(self)
        self.frames = np.memmap(self.path, np.uint8, "r+", shape=(slots, *self.shape))
        self.uses = np.concatenate([self.uses, np.zeros(slots - before, np.int32)])
        if self.device.type != "cuda":
            return
        copied, self.on_gpu = self.on_gpu, None
        if slots * self.frame_bytes < 0.8 * torch.cuda.mem_get_info()[0]:
            self.on_gpu = torch.empty((slots, *self.shape), dtype=torch.uint8, device=self.device)
            stored = torch.from_numpy(self.frames[:before]) if copied is None else copied
            self.on_gpu[: len(stored)] = stored

    def put(self, frame: np.ndarray) -> int:
        """Stores a frame in a slot that is free; which."""
        if not self.free:
            self.make_room(len(self) + max(len(self) // 16, 64))
        slot = self.free.popleft()
        self.frames[slot] = frame
        if self.on_gpu is not None:
            self.on_gpu[slot] = torch.from_numpy(self.frames[slot])
        return slot

    def keep(self, slots: list[int]) -> None:
        for slot in slots:
            self.uses[slot] += 1

    def drop(self, slots: list[int]) -> None:
        for slot in slots:
            self.uses[slot] -= 1
            if self.uses[slot] == 0:
                self.dropped.append(slot)

    def get(self, slots: Tensor) -> Tensor:
        """The frames in slots (...), on the device: (..., *shape)."""
        source = torch.from_numpy(self.frames) if self.on_gpu is None else self.on_gpu
        frames = source.index_select(0, slots.flatten().to(source.device))
        return frames.to(self.device).unflatten(0, slots.shape)

    def state_dict(self) -> dict:
        """What a checkpoint needs beside the file, whose contents are on the disk from here on."""
        if len(self):
            self.frames.flush()
        self.free.extend(self.dropped_before)
        self.dropped_before, self.dropped = self.dropped, []
        return {"uses": torch.from_numpy(self.uses.copy()), "dropped": list(self.dropped_before)}

    def load_state_dict(self, state: dict) -> None:
        """Exits with one line when the file is not there, or shorter than it was."""
        slots = len(state["uses"])
        needed = slots * self.frame_bytes
        size = self.path.stat().st_size if self.path.exists() else 0
        if size < needed:
            fail(f"{self.path}: has {size} bytes of {needed}; bring the whole file back, or start anew")
        if not slots:
            return
        self.open(size // self.frame_bytes)
        if self.on_gpu is not None:
            self.on_gpu.copy_(torch.from_numpy(self.frames))
        self.uses[:slots] = state["uses"].cpu().numpy()
        self.dropped, self.dropped_before = [], list(state["dropped"])
        self.free = deque(sorted(set(np.flatnonzero(self.uses == 0).tolist()) - set(self.dropped_before)))


def frame_file(
    name: str,
    capacity: int,
    slots: int,
    views: Views,
    step_type: np.dtype,
    run,
    frames_dir: str | None,
    device: torch.device,
) -> FrameFile:
    """The file of the buffer `name` in the run's folder, or in `frames_dir`, with `slots` frames or as a run left it.

    Says how much memory and disk the buffer of `capacity` takes before it is taken. Exits when there is not so much.
    """
    numbers = 2 * views.state_dim + step_type["action"].shape[0] + 2
    memory = 4 * capacity * numbers + 16 * capacity * views.stack
    check_memory(memory, f"{name} of {capacity:,} transitions", "give a smaller --buffer-size")
    path = run.dir / f"{name}.frames"
    if frames_dir:
        path = Path(frames_dir, "-".join((*run.dir.parts[-2:], path.name))).absolute()
    file = FrameFile(path, views.frame_shape, device)
    if frames_dir and path.exists() and not (run.state or run.args.resume):
        (run.dir / "args.json").unlink(missing_ok=True)  # no run yet: --resume would write over that file
        fail(f"--frames-dir {frames_dir}: has {path.name}, another run's; delete it if that is gone, or give another")
    if run.state is None:
        pictures = f"{len(views.cameras)} x {views.size} x {views.size} pixels"
        what = f"{name}: {capacity:,} transitions of {pictures}, {slots:,} frames"
        what += f"; {size_text(step_type.itemsize)} each on a wire, {size_text(memory)} of memory"
        file.check_disk(slots, what, "give a smaller --buffer-size, or another --frames-dir")
        file.make_room(slots)
    return file


def size_text(count: float) -> str:
    """Bytes for people: 19.7 GB."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while count >= 1000 and len(units) > 1:
        count /= 1000
        units.pop(0)
    return f"{count:.3g} {units[0]}"
