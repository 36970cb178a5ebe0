"""Local Minari datasets: written all or nothing, opened, and read as rows, with or without their images."""

import contextlib
import fcntl
import hashlib
import math
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from gymnasium import spaces

from common.envs import HUGE, Episode, looks_like_image
from common.setup import fail


class Misfit(Exception):  # noqa: N818  of the data, not of the program
    """What is wrong with data, in words for its owner."""


def each(function: Callable, *xs):
    """`function` of arrays, or, of dicts of arrays, entry by entry."""
    return {k: each(function, *(x[k] for x in xs)) for k in xs[0]} if isinstance(xs[0], dict) else function(*xs)


def arrays(x) -> list:
    """The arrays in dicts of dicts of arrays."""
    return [array for part in x.values() for array in arrays(part)] if isinstance(x, dict) else [x]


def local_datasets() -> list[str]:
    import minari

    with warnings.catch_warnings(action="ignore"):  # about folders that are no datasets
        return list(minari.list_local_datasets())


def is_local(dataset_id: str) -> bool:
    from minari.storage.datasets_root_dir import get_dataset_path

    return (get_dataset_path() / dataset_id / "data").exists()


def open_dataset(dataset_id: str):
    """A local Minari dataset. Exits with one line when this Minari cannot read it."""
    import minari

    try:
        return minari.load_dataset(dataset_id)
    except Exception as error:  # noqa: BLE001  another version's files raise what they like
        fail(f"{dataset_id}: this Minari ({minari.__version__}) cannot read it: {one_line(error)}")


def one_line(error: BaseException, length: int = 300) -> str:
    """The message of an error of somebody else's code, or its name where it has none."""
    return " ".join(str(error).split())[:length] or type(error).__name__


def id_for(namespace: str, name: str, contents: str) -> str:
    """A dataset id for what is made here of `contents`; the same contents have the same id."""
    digest = hashlib.sha256(contents.encode()).hexdigest()[:8]
    return f"{namespace}/{re.sub(r'-v[0-9]+$|[^-_a-zA-Z0-9]', '', name)}-{digest}-v0"


def as_stored(episode: Episode) -> tuple:
    """An episode of envs.Recorder as `store` takes it."""
    observations = each(lambda *steps: np.stack(steps), *episode.observations)
    return observations, episode.actions, episode.rewards, episode.terminations, episode.truncations


def store(dataset_id: str, episodes: Iterable[tuple], metadata: dict | None = None, **about) -> str:
    """Writes episodes (observations (T + 1, ...), actions, rewards, terminations, truncations) as a local Minari
    dataset, in a hidden folder that is then renamed: all of it is there, or nothing. An id that exists is left."""
    import minari
    from minari.data_collector import EpisodeBuffer
    from minari.storage.datasets_root_dir import get_dataset_path

    root = get_dataset_path()
    clear_leftovers(root)
    if is_local(dataset_id):
        return dataset_id

    def buffers() -> Iterator[EpisodeBuffer]:
        for number, parts in enumerate(episodes):
            yield EpisodeBuffer(number, None, None, *checked(f"episode {number}", *parts))

    with hidden_root(root) as temporary:
        with warnings.catch_warnings(action="ignore"):  # about author and permalink
            dataset = minari.create_dataset_from_buffers(dataset_id, buffers(), **about)
        dataset.storage.update_metadata(metadata or {})
        (root / dataset_id).parent.mkdir(parents=True, exist_ok=True)
        for file in temporary.rglob("namespace_metadata.json"):
            target = root / file.relative_to(temporary)
            if not target.exists():
                shutil.copy(file, target)
        try:
            (temporary / dataset_id).rename(root / dataset_id)
        except OSError:
            if not (root / dataset_id).exists():  # else another process was faster
                raise
    return dataset_id


@contextlib.contextmanager
def hidden_root(root: Path) -> Iterator[Path]:
    """A folder that Minari writes to inside, which is gone afterwards. It is locked as long as this process lives."""
    temporary = root / f".storing-{os.getpid()}-{time.time_ns()}"
    temporary.mkdir(parents=True)
    before = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = str(temporary)
    try:
        with (temporary / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield temporary
    finally:
        del os.environ["MINARI_DATASETS_PATH"]
        if before is not None:
            os.environ["MINARI_DATASETS_PATH"] = before
        shutil.rmtree(temporary, ignore_errors=True)


def clear_leftovers(root: Path) -> None:
    """Removes the hidden folders of processes that were killed: their locks are gone."""
    for left in root.glob(".storing-*"):
        with contextlib.suppress(OSError):  # somebody else's, or just removed
            if time.time() - left.stat().st_mtime < 5 and not (left / ".lock").exists():
                continue  # it begins
            with (left / ".lock").open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: it is written to
                shutil.rmtree(left, ignore_errors=True)


def checked(where: str, observations, actions, rewards, terminations, truncations) -> tuple:
    """An episode's parts, rewards and ends (T,). Exits with one line when they are no numbers that can be learned."""
    try:
        steps = len(actions)
        parts = {"observations": observations, "actions": actions}
        parts["rewards"] = per_step("rewards", rewards, steps)
        for name, part in parts.items():
            for x in arrays(part):
                check_numbers(name, np.asarray(x))
        lengths = {len(x) for x in arrays(observations)}
        if not steps or lengths != {steps + 1}:
            raise Misfit(f"{steps} actions need {steps + 1} observations, there are {sorted(lengths)}")
        ends = (per_step("terminations", terminations, steps), per_step("truncations", truncations, steps))
        return observations, actions, parts["rewards"], *map(as_flags, ("terminations", "truncations"), ends)
    except Misfit as error:
        fail(f"{where} of the data: {error}; repair or leave out that episode")


def check_numbers(name: str, x: np.ndarray) -> None:
    """Raises Misfit when these are no numbers, not finite, or so large that they are no measurements."""
    if x.dtype.kind not in "fiub":
        example = x.flat[0] if x.size else x.dtype
        raise Misfit(f"{name} hold {example!r}, not numbers")
    if x.dtype.kind == "f":
        wrong = ~(np.abs(x) <= HUGE)  # NaN as well
        if wrong.any():
            where = np.argwhere(wrong)[0]
            column = "" if len(where) < 2 else f" (number {' '.join(map(str, where[1:]))} of each)"
            value = float(x[tuple(where)])
            what = "that are too large to be measurements" if math.isfinite(value) else "that are not finite"
            raise Misfit(f"{name} hold numbers {what}: {value:.4g} at step {where[0]}{column}")


def per_step(name: str, x, steps: int) -> np.ndarray:
    """One value per step, (T,), also of (T, 1). Raises Misfit for other shapes."""
    x = np.asarray(x)
    if x.size != steps or len(x) != steps:
        raise Misfit(f"{name} have shape {x.shape}, not one value for each of {steps} steps")
    return x.reshape(steps)


def as_flags(name: str, x: np.ndarray) -> np.ndarray:
    """Ends of episodes as bool. Raises Misfit unless all are true or false, 0 or 1: text is never false."""
    if x.dtype.kind not in "fiub" or not np.isin(x, (0, 1)).all():
        raise Misfit(f"{name} hold {x.flat[0]!r} and the like, not true or false")
    return x.astype(bool)


def entries(
    space: spaces.Space, observations, path: str = "observations"
) -> Iterator[tuple[str, spaces.Space, object]]:
    """(path, space, numbers (T, ...)) of what observations hold, in the order of sorted names; choices as one-hot.

    Exits with one line at what is no numbers.
    """
    if isinstance(space, spaces.Dict):
        for key in sorted(space):
            yield from entries(space[key], observations[key], f"{path}/{key}")
    elif isinstance(space, spaces.Discrete):
        one_hot = np.eye(int(space.n), dtype=np.float32)[np.asarray(observations, int) - int(space.start)]
        yield path, spaces.Box(0, 1, one_hot.shape[1:]), one_hot
    elif isinstance(space, spaces.Box | spaces.MultiBinary):
        yield path, space, observations
    else:
        fail(f"{path} are {space}, neither numbers nor images; leave them out of the data, or in arrange() (TASK)")


def image_name(path: str) -> str:
    """observations/front/rgb -> front_rgb, observations -> image."""
    return re.sub(r"\W", "_", path.partition("/")[2]) or "image"


def image_spaces(space: spaces.Space, path: str = "observations") -> dict[str, spaces.Box]:
    """Paths of the images in an episode, with their spaces."""
    if isinstance(space, spaces.Dict):
        return {k: v for key, part in space.items() for k, v in image_spaces(part, f"{path}/{key}").items()}
    return {path: space} if looks_like_image(space) else {}


CHANNELS = (1, 2, 3, 4, 6, 9, 12)  # grey, RGB, depth, and stacks of them


def as_images(path: str, space: spaces.Box, x: np.ndarray) -> np.ndarray:
    """Images (N, *space.shape) as (N, H, W, C) uint8: with channels first or last, grey, or of float in 0 ... 1.

    Exits with one line where rows, columns, channels or the range cannot be told.
    """
    shape = space.shape
    order = None
    if len(shape) == 2:
        x, order = x[..., None], (0, 1, 2)
    elif len(shape) == 3 and shape[2] in CHANNELS and (shape[0] not in CHANNELS or shape[2] <= shape[0]):
        order = (0, 1, 2)
    elif len(shape) == 3 and shape[0] in CHANNELS:
        order = (1, 2, 0)
    low, high = float(space.low.min()), float(space.high.max())
    if order is None or (space.dtype != np.uint8 and (low, high) not in ((0, 1), (0, 255))):
        what = f"{path} of shape {shape} and {space.dtype} in {low:g} ... {high:g}"
        fail(f"{what}: no state, and no image of a known kind; make it uint8 (H, W, C), or choose in arrange() (TASK)")
    x = x.transpose(0, *(axis + 1 for axis in order))
    return x if space.dtype == np.uint8 else np.round(x * (255 / high)).astype(np.uint8)


def hdf5_file(dataset) -> Path:
    return Path(dataset.storage.data_path) / "main_data.hdf5"


def episode_rewards(dataset) -> dict[int, np.ndarray]:
    """The rewards (T,) of every episode, where possible without reading the rest."""
    import h5py

    try:
        if dataset.storage.FORMAT != "hdf5":
            found = {int(episode.id): np.asarray(episode.rewards) for episode in dataset.iterate_episodes()}
        else:
            with h5py.File(hdf5_file(dataset)) as file:
                found = {int(i): file[f"episode_{i}/rewards"][:] for i in dataset.episode_indices}
        for rewards in found.values():
            check_numbers("rewards", rewards)
        return {number: per_step("rewards", rewards, len(rewards)) for number, rewards in found.items()}
    except Misfit as error:
        fail(f"{dataset.id}: {error}; repair the data, or leave those episodes out")
    except (OSError, KeyError, ValueError, TypeError) as error:
        fail(f"{dataset.id}: is damaged, cannot be read ({one_line(error)}); fetch or record it again")


def read_episodes(dataset, numbers: Iterable[int], images: bool = True) -> Iterator[tuple]:
    """(number, space, observations, actions, rewards, terminations) of episodes, with or without their images."""
    space = dataset.observation_space
    if images:
        found = (
            (int(e.id), e.observations, e.actions, e.rewards, e.terminations, e.truncations)
            for e in dataset.iterate_episodes(numbers)
        )
    else:
        space = without_images(space)
        found = episodes_without_images(dataset, space, numbers)
    try:
        for number, *parts in found:
            where = f"{dataset.id}, episode {number}"
            observations, actions, rewards, terminations, _ = checked(where, *parts)
            check_shapes(f"{where} of the data: actions", dataset.action_space, actions)
            for path, part, x in entries(space, observations):
                check_shapes(f"{where} of the data: {path}", part, x)
            yield number, space, observations, actions, rewards, terminations
    except (OSError, KeyError, ValueError, TypeError) as error:
        fail(f"{dataset.id}: is damaged, cannot be read ({one_line(error)}); fetch or record it again")


def check_shapes(what: str, space: spaces.Space, x) -> None:
    """Exits with one line when numbers (T, ...) are not of their space's shape: they might broadcast."""
    if np.shape(x)[1:] != space.shape:
        fail(f"{what} have shape {np.shape(x)[1:]}, the dataset says {space.shape}; repair the data")


def without_images(space: spaces.Space) -> spaces.Dict:
    """What is left of observations that are images, or hold some."""
    parts = {}
    for key, part in space.items() if isinstance(space, spaces.Dict) else ():
        if not looks_like_image(part):
            parts[key] = without_images(part) if isinstance(part, spaces.Dict) else part
    return spaces.Dict(parts)


def episodes_without_images(dataset, space: spaces.Dict, numbers: Iterable[int]) -> Iterator[tuple]:
    import h5py

    def read(space: spaces.Space, group):
        return {k: read(v, group[k]) for k, v in space.items()} if isinstance(space, spaces.Dict) else group[:]

    with h5py.File(hdf5_file(dataset)) as file:
        for number in numbers:
            group = file[f"episode_{number}"]
            parts = (group[key][:] for key in ("actions", "rewards", "terminations", "truncations"))
            yield number, read(space, group["observations"]), *parts


class StoredImages:
    """Images (N, H, W, C) that stay in a Minari dataset's HDF5 file; indexed like an array, in any worker process."""

    def __init__(self, dataset, path: str, space: spaces.Box, lengths: dict[int, int]):
        from minari.dataset.minari_storage import is_image_space

        self.file_path = hdf5_file(dataset)
        self.path = path
        self.space = space
        self.jpeg = dataset.storage.jpeg_encoding and is_image_space(space)
        self.episodes = list(lengths)
        self.firsts = np.cumsum([0, *lengths.values()])
        self.pid, self.file = 0, None
        zeros = np.zeros((1, *space.shape), space.dtype)
        self.shape = (sum(lengths.values()), *as_images(path, space, zeros).shape[1:])

    def __getstate__(self) -> dict:
        return self.__dict__ | {"pid": 0, "file": None}

    def __getitem__(self, rows) -> np.ndarray:
        import h5py
        from imageio.v3 import imread

        if self.pid != os.getpid():  # a handle must not be used in two processes
            self.pid, self.file = os.getpid(), h5py.File(self.file_path)
        rows = np.asarray(rows)
        images = np.empty((rows.size, *self.space.shape), self.space.dtype)
        for out, row in zip(images, rows.flat, strict=True):
            number = np.searchsorted(self.firsts, row, "right") - 1
            data = self.file[f"episode_{self.episodes[number]}/{self.path}"][row - self.firsts[number]]
            if self.jpeg:
                data = imread(data.tobytes(), extension=".jpg")
            out[:] = data.reshape(out.shape)
        return as_images(self.path, self.space, images).reshape(*rows.shape, *self.shape[1:])


def action_range(dataset) -> tuple[np.ndarray, np.ndarray]:
    """The least and the largest value of each dimension of the actions."""
    low, high = math.inf, -math.inf
    for episode in dataset.iterate_episodes():
        low = np.minimum(low, episode.actions.min(0))
        high = np.maximum(high, episode.actions.max(0))
    return low, high


def to_unit(actions: np.ndarray, box: spaces.Box) -> np.ndarray:
    """Actions (T, ...) of a box as (T, A) in [-1, 1]; a dimension without width becomes 0."""
    low = box.low.astype(float)
    width = box.high.astype(float) - low
    unit = 2 * (actions - low) / np.where(width > 0, width, 1) - 1
    return np.where(width > 0, unit, 0).reshape(len(actions), -1)


def read_rows(
    dataset, lengths: dict[int, int], arrange: Callable, box: spaces.Box, clip: bool, on_disk: bool, margin: float
) -> dict:
    """Episodes {number: length} as rows (N, ...) in Q-chunking's layout; `arrange(space, observations)` chooses what is
    observed, actions of `box` become [-1, 1], and stay `margin` inside. Images are StoredImages when they stay on_disk.

    Exits with one line when actions are outside, unless they are to be clipped.
    """
    total = sum(lengths.values())
    fields = {}
    row = 0
    for number, space, observations, actions, rewards, terminations in read_episodes(dataset, lengths, not on_disk):
        steps = len(rewards)
        unit = to_unit(actions, box)
        reach = np.abs(unit).max()
        if reach > 1.001 and not clip:
            where = f"{dataset.id}, episode {number}: actions reach {reach:.3g} times the bounds {bounds_of(box)}"
            ways = "--action-bounds clip clips slips; --action-bounds data takes the data's own (absolute actions)"
            fail(f"{where}; {ways}")
        arranged = arrange(space, observations)  # (T + 1, ...)
        values = {
            "observations": each(lambda x: x[:-1], arranged),
            "actions": unit.clip(margin - 1, 1 - margin),
            "rewards": rewards,
            "terminals": np.arange(1, steps + 1) == steps,
            "masks": 1.0 - terminations,
        }
        if not isinstance(arranged, dict):
            values["next_observations"] = arranged[1:]
        if not fields:
            fields = each(lambda x: room(total, x), values)
        for field, x in zip(arrays(fields), arrays(values), strict=True):
            field[row : row + steps] = x
        row += steps
    if on_disk:
        states = fields["observations"]
        fields.pop("next_observations", None)
        fields["observations"] = states if isinstance(states, dict) else {"state": states}
        for path, image in image_spaces(dataset.observation_space).items():
            fields["observations"][image_name(path)] = StoredImages(dataset, path, image, lengths)
    return fields


def room(count: int, like: np.ndarray) -> np.ndarray:
    """Rows to fill, of images or of numbers."""
    return np.empty((count, *like.shape[1:]), np.uint8 if like.dtype == np.uint8 else np.float32)


def bounds_of(box: spaces.Box) -> str:
    """In one line, however many dimensions there are."""
    low, high = box.low.ravel(), box.high.ravel()
    if len(set(low)) == 1 and len(set(high)) == 1:
        return f"{low[0]:g} to {high[0]:g}"
    return " ".join(f"{a:g}:{b:g}" for a, b in zip(low[:8], high[:8])) + (" ..." if len(low) > 8 else "")


def action_box(dataset, own_bounds: bool) -> spaces.Box:
    """The actions that become -1 and 1: the dataset's bounds, or the least and largest that it holds."""
    space = dataset.action_space
    if not isinstance(space, spaces.Box):
        fail(f"{dataset.id}: actions must be a bounded Box, not {space}")
    if own_bounds:
        return spaces.Box(*action_range(dataset), dtype=space.dtype)
    width = space.high.astype(float) - space.low
    if not (width <= HUGE).all():
        way = "--action-bounds data takes the data's own"
        fail(f"{dataset.id}: actions must be a bounded Box, its are {bounds_of(space)}; {way}")
    return space


def images_stay_on_disk(dataset, data_loading: str) -> bool:
    """By --data-loading; auto: when the images would take more than half of the free memory."""
    pixels = sum(math.prod(space.shape) for space in image_spaces(dataset.observation_space).values())
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # bytes
    too_large = data_loading == "auto" and pixels * int(dataset.total_steps) > free / 2
    on_disk = pixels > 0 and (too_large or data_loading == "workers")
    if on_disk and dataset.storage.FORMAT != "hdf5":
        fail(f"{dataset.id}: is stored as {dataset.storage.FORMAT}, workers read hdf5; --data-loading memory")
    return on_disk
