"""A Minari dataset that grows by whole episodes, whatever happens; its pictures; fingerprints of set-ups."""

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from common import envs
from common.setup import fail, hold, write_atomically

SPARE_BYTES = 100e6  # disk that is left free, for videos and for other programs


# --- Dataset ----------------------------------------------------------------------------------------------------------
def dataset_folder(dataset_id: str, option: str) -> Path:
    """Where Minari keeps this dataset. Exits with one line when it is no name for one."""
    from minari.dataset.minari_dataset import parse_dataset_id
    from minari.storage.datasets_root_dir import get_dataset_path

    try:
        parse_dataset_id(dataset_id)
        return get_dataset_path(dataset_id)  # makes the folder of all datasets
    except OSError as error:
        fail(f"{option} {dataset_id}: {error}; set MINARI_DATASETS_PATH to a folder that can be written")
    except (ValueError, TypeError):  # TypeError: no version
        fail(f"{option} {dataset_id}: is no name that Minari takes; give one such as hil/demos-v0")


def check_new_dataset(dataset_id: str) -> None:
    """Exits with one line when Minari would refuse this name, which it would do after the training."""
    if dataset_folder(dataset_id, "--record-dataset").exists():
        fail(f"--record-dataset {dataset_id}: exists; `minari delete` it, or give another name or version")


class Recording:
    """A Minari dataset in `folder`, one file for each episode; the file that Minari reads holds links to them.

    Every file is replaced as a whole, so that at any moment, also after kill -9, the dataset is one that Minari reads,
    and holds every episode whose `add` returned. `episodes` are their attributes, in order; `labels` their infos/label.
    """

    def __init__(self, folder: Path, dataset_id: str, env: gym.Env, about: dict):
        """Begins the dataset or goes on with it; `about` is kept with it, and must be the same. Exits with one line if
        another process records to it, it is of another set-up, or it cannot be written."""
        import minari

        self.name = dataset_id
        self.folder = folder
        self.data = folder / "data"
        about = about | {"fingerprint": fingerprint(env)}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            occupied = f"{dataset_id}: process PID is recording to it; end that one, or give another name"
            self.lock = hold(folder / "record.lock", occupied)
            if not self.data.exists():
                self.create(env, about | {"dataset_id": dataset_id, "minari_version": minari.__version__})
        except OSError as error:
            fail(f"{dataset_id}: cannot be written ({error}); make room, or see to it that {folder} can be written")
        self.check(about)
        self.find_episodes()

    def create(self, env: gym.Env, about: dict) -> None:
        from minari.dataset.minari_storage import MinariStorage

        new = self.folder / ".new"
        shutil.rmtree(new, ignore_errors=True)  # of one that was killed right here
        new.mkdir()
        task = dataclasses.replace(env.unwrapped.spec, max_episode_steps=env.spec.max_episode_steps)
        spaces = (env.observation_space, env.action_space)
        storage = MinariStorage.new(new, *spaces, env_spec=task, jpeg_encoding=False)
        storage.update_metadata(about)
        new.rename(self.data)

    def check(self, about: dict) -> None:
        """Exits with one line unless the dataset is of this set-up."""
        self.metadata = json.loads((self.data / "metadata.json").read_text())
        if "fingerprint" not in self.metadata:
            fail(f"{self.name}: exists, and was not recorded here; give another name or version")
        check_fingerprint(f"--dataset {self.name}", self.metadata["fingerprint"], about["fingerprint"])
        for name, value in about.items():
            if self.metadata[name] != value:
                fail(f"{self.name}: its {name} is {self.metadata[name]}, not {value}; give another name")

    def find_episodes(self) -> None:
        """Reads what is there, and links what a crash left without a link."""
        import h5py

        self.episodes: list[dict] = []
        self.labels: list[np.ndarray] = []
        for number in range(len(list(self.data.glob("episode_*.hdf5")))):
            path = self.data / f"episode_{number}.hdf5"
            try:
                with h5py.File(path) as file:
                    self.labels.append(file["infos/label"][:] if "infos/label" in file else np.zeros(0, np.int8))
                    self.episodes.append(dict(file.attrs))
            except OSError as error:
                fail(f"{self.name}: {path} cannot be read ({error}); episodes are numbered without gaps")
        self.write_links()
        self.write_totals()

    def add(self, fields: dict, attributes: dict) -> None:
        """One more episode: arrays by name, at any depth, in Minari's layout; and what is said about it."""
        number = len(self.episodes)
        attributes = {"id": number, "total_steps": len(fields["rewards"])} | attributes
        self.write(f"episode_{number}.hdf5", lambda file: put(file, fields, attributes))
        self.labels.append(fields["infos"].get("label", np.zeros(0, np.int8)))
        self.episodes.append(attributes)
        self.write_links()
        self.write_totals()

    def undo(self) -> dict:
        """Removes the last episode. Returns its attributes."""
        undone = self.episodes.pop()
        self.labels.pop()
        self.write_totals()
        self.write_links()
        (self.data / f"episode_{undone['id']}.hdf5").unlink()
        return undone

    def write_links(self) -> None:
        import h5py

        def link(file: h5py.File) -> None:
            for number in range(len(self.episodes)):
                file[f"episode_{number}"] = h5py.ExternalLink(f"episode_{number}.hdf5", "/")

        self.write("main_data.hdf5", link)

    def write_totals(self) -> None:
        self.metadata["total_episodes"] = len(self.episodes)
        self.metadata["total_steps"] = int(sum(episode["total_steps"] for episode in self.episodes))
        self.metadata["dataset_size"] = round(sum(path.stat().st_size for path in self.data.iterdir()) / 1e6, 1)  # MB
        write_atomically(self.data / "metadata.json", json.dumps(self.metadata).encode())

    def write(self, name: str, fill: Callable) -> None:
        """An HDF5 file, put together in memory."""
        import h5py

        with h5py.File(name, "w", driver="core", backing_store=False) as file:
            fill(file)
            file.flush()
            image = file.id.get_file_image()
        write_atomically(self.data / name, image)

    def check_disk(self, env: gym.Env) -> None:
        """Exits with one line when the disk has no room for the longest episode."""
        steps = min(env.spec.max_episode_steps or math.inf, 1000)
        step_bytes = sum(math.prod(box.shape) * box.dtype.itemsize for _, box in envs.leaves(env.observation_space))
        needed = steps * step_bytes + SPARE_BYTES
        free = shutil.disk_usage(self.data).free
        if free < needed:
            fail(
                f"{self.name}: {free / 1e6:.0f} MB are free in {self.data}, an episode may take {needed / 1e6:.0f} MB; "
                f"make room, then go on: the {len(self.episodes)} episodes that have ended are there"
            )

    def write_pictures(self, episodes: list, env: gym.Env) -> Path | None:
        """A video of each of Minari's `episodes`, with the cameras side by side, and a contact sheet of the newest: six
        pictures of each, or of each of their labels. Returns the sheet's path; None when no pictures are observed."""
        if not (heights := cameras_of(env.observation_space)):
            return None
        rows = []
        for episode in episodes:
            views = []
            for name, height in heights.items():  # black below a picture that is less high than others
                below = (0, max(heights.values()) - height)
                views.append(np.pad(episode.observations[name], ((0, 0), below, (0, 0), (0, 0))))
            frames = np.concatenate(views, axis=2)  # (T + 1, H, sum of widths, 3)
            path = self.folder / f"episode_{episode.id}.mp4"
            source = self.data / f"episode_{episode.id}.hdf5"
            if not path.exists() or path.stat().st_mtime < source.stat().st_mtime:  # new, or recorded after an undo
                write_video(frames, path, env.metadata.get("render_fps", 10))
            kinds = {self.episodes[episode.id]["verdict"]: np.arange(len(frames))}
            if "label" in episode.infos:
                labels = episode.infos["label"]
                kinds = {}
                for label in np.unique(labels):
                    name = "left out" if label < 0 else f"label {label}"
                    kinds[name] = 1 + np.flatnonzero(labels == label)
            for kind, numbers in kinds.items():
                shown = numbers[np.linspace(0, len(numbers) - 1, 6).round().astype(int)]
                rows.append((f"{episode.id} {kind}", frames[shown]))
        write_sheet(rows[-60:], self.folder / "contact_sheet.png")
        return self.folder / "contact_sheet.png"


class Step(NamedTuple):
    """What is remembered of a step until its episode is over."""

    action: np.ndarray  # executed
    asked: np.ndarray
    reward: float  # before penalties
    terminated: bool
    intervened: bool  # by a person
    suggested: bool  # success, by classifier or task
    period_s: float
    late_s: float
    label: int = 0  # a person's, of the frame that followed


def fields_of(observations: list, steps: list[Step], won: bool) -> dict:
    """An episode of T steps, and its T + 1 observations, in Minari's layout; success rewards and ends its last step."""
    last = np.arange(len(steps)) == len(steps) - 1  # (T,)
    return {
        "observations": stacked(observations),
        "actions": np.array([step.action for step in steps]),
        "rewards": (last & won).astype(float),
        "terminations": last & won,
        "truncations": last & (not won),
        "infos": {
            "asked_action": np.array([step.asked for step in steps]),
            "intervened": np.array([step.intervened for step in steps]),
            "success": last & won,
            "suggestion": np.array([step.suggested for step in steps]),
            "time_s": np.cumsum([step.period_s for step in steps]),
            "late_s": np.array([step.late_s for step in steps]),
        },
    }


def put(group, fields: dict, attributes: dict) -> None:
    """Arrays and attributes into an HDF5 group; pictures are compressed one by one, without loss."""
    group.attrs.update(attributes)
    for name, value in fields.items():
        if isinstance(value, dict):
            put(group.create_group(name), value, {})
        elif value.dtype == np.uint8 and value.ndim == 4:
            group.create_dataset(name, data=value, chunks=(1, *value.shape[1:]), compression="gzip", compression_opts=1)
        else:
            group.create_dataset(name, data=value)


def stacked(observations: list):
    """Observations with a leading time axis, at any depth."""
    if isinstance(observations[0], dict):
        return {name: stacked([obs[name] for obs in observations]) for name in observations[0]}
    return np.stack(observations)


def settled(labels: np.ndarray, margin: int) -> np.ndarray:
    """Labels (T,), -1 (left out) for those less than `margin` frames before or after a change."""
    result = labels.copy()
    for change in np.flatnonzero(np.diff(labels)) + 1:
        result[max(change - margin, 0) : change + margin] = -1
    return result


# --- Pictures ---------------------------------------------------------------------------------------------------------
def cameras_of(space: gym.Space) -> dict[str, int]:
    """Names of the cameras in a space of observations, and the height of their pictures."""
    parts = getattr(space, "spaces", {})
    pictures = {name: part for name, part in parts.items() if envs.looks_like_image(part) and part.shape[2:] == (3,)}
    return {name: part.shape[0] for name, part in pictures.items()}


def write_video(frames: np.ndarray, path: Path, hz: float) -> None:
    """Frames (T, H, W, 3) as an mp4."""
    import imageio.v2 as imageio

    partial = path.with_name(f".{path.name}")  # a video that is there is whole
    imageio.mimwrite(partial, frames, fps=hz, macro_block_size=2)
    partial.replace(path)


def write_sheet(rows: list[tuple[str, np.ndarray]], path: Path, height: int = 96) -> None:
    """A PNG with a row for each (title, frames (N, H, W, 3))."""
    from PIL import Image, ImageDraw

    frames = rows[0][1]
    width = round(height * frames.shape[2] / frames.shape[1])
    columns = max(len(frames) for _, frames in rows)
    sheet = Image.new("RGB", (90 + columns * (width + 2), len(rows) * (height + 2)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (title, frames) in enumerate(rows):
        top = i * (height + 2)
        draw.text((4, top + height // 2 - 6), title, "black")
        for k, frame in enumerate(frames):
            sheet.paste(Image.fromarray(frame).resize((width, height)), (90 + k * (width + 2), top))
    sheet.save(path)


# --- Fingerprints -----------------------------------------------------------------------------------------------------
def fingerprint(env: gym.Env) -> dict:
    """What gives a task's observations and actions their meaning, in plain JSON values.

    A task says it itself (`config.fingerprint()`, as FrankaEnv does), or it is gymnasium's id and options, the rate,
    and the shapes and bounds of its spaces. Data, classifier and policy belong together only where it is the same.
    """
    config = getattr(env.unwrapped, "config", None)
    if hasattr(config, "fingerprint"):
        return config.fingerprint()
    task = env.unwrapped.spec
    options = {name: value for name, value in task.kwargs.items() if name != "render_mode"}
    values = {
        "version": 1,
        "task": task.id,
        "options": options,
        "hz": env.metadata.get("render_fps"),
        "observations": layout(env.observation_space),
        "actions": [env.action_space.low.tolist(), env.action_space.high.tolist()],
    }
    return json.loads(json.dumps(values, default=str))


def file_hash(path: str | None) -> str | None:
    """What tells a file's contents from others; what is no file's path, as it is."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path and Path(path).is_file() else path


def check_fingerprint(what: str, theirs: dict, ours: dict) -> None:
    """Exits with one line that names what differs between the fingerprint of `what` and that of the task here."""
    if wrong := list(differences(theirs, ours)):
        fail(f"{what}: is of another set-up: {'; '.join(wrong)}")


def differences(theirs: object, ours: object, name: str = "") -> Iterator[str]:
    """What differs between two fingerprints, at any depth: "cameras.wrist.fps is 30 there, 60 here"."""
    theirs, ours = by_name(theirs), by_name(ours)
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in sorted(theirs.keys() | ours.keys()):
            part = f"{name}.{key}" if name else key
            if key not in ours:
                yield f"{part} is only there"
            elif key not in theirs:
                yield f"{part} is only here"
            else:
                yield from differences(theirs[key], ours[key], part)
    elif theirs != ours:
        yield f"{name} is {json.dumps(theirs)} there, {json.dumps(ours)} here"


def by_name(value: object) -> object:
    """A list of dicts with names, such as cameras, as a dict; other values as they are."""
    if isinstance(value, list) and value and all(isinstance(part, dict) and "name" in part for part in value):
        return {part["name"]: part for part in value}
    return value


def layout(space: spaces.Space) -> object:
    """The shapes of a space's parts, or how many choices they have, to compare two spaces by."""
    shape = str(space) if isinstance(space, spaces.Discrete | spaces.MultiDiscrete) else space.shape
    return {key: layout(part) for key, part in space.items()} if isinstance(space, spaces.Dict) else shape
