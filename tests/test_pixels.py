"""common/pixels.py: observations of any form with images in them, and frames in a memory-mapped file."""

import re
import shutil
import types
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

from common import pixels as module
from common.pixels import (
    FrameFile,
    ImagesAndState,
    Rendered,
    Views,
    frame_file,
    image_axes,
    size_text,
)
from common.setup import Fault
from common.tensors import step_type

CPU = torch.device("cpu")


# --- Observations -----------------------------------------------------------------------------------------------------
class Shows(gym.Env):
    """Observes whatever it is given."""

    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, space: spaces.Space, obs, picture=None):
        self.observation_space, self.obs, self.picture = space, obs, picture

    def reset(self, *, seed=None, options=None):
        return self.obs, {}

    def render(self):
        return self.picture


def image(*shape: int) -> spaces.Box:
    return spaces.Box(0, 255, shape, np.uint8)


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


VECTOR = spaces.Box(-1, 1, (2,), np.float64)
DEPTH = spaces.Box(0, 10, (16, 17, 1), np.float32)


def test_images_at_any_depth_are_named_by_their_path():
    """The layouts of SERL, HIL-SERL, LeRobot and gym-hil [S2]."""
    front, wrist = pixels(16, 16, 3), pixels(16, 16, 3)[::-1]
    space = spaces.Dict(
        {"pixels": spaces.Dict({"front": image(16, 16, 3), "wrist": image(16, 16, 3)}), "agent_pos": VECTOR}
    )
    obs = {"pixels": {"front": front, "wrist": wrist}, "agent_pos": np.array([0.5, -0.25])}
    env = ImagesAndState(Shows(space, obs), "T-v0", (), 16)
    assert env.cameras == ("pixels/front", "pixels/wrist") and env.columns == {"agent_pos": (0, 2)}
    seen = env.reset()[0]
    assert env.observation_space.contains(seen)
    assert np.array_equal(seen["images"], [front, wrist]) and seen["state"].tolist() == [0.5, -0.25]
    only = ImagesAndState(Shows(space, obs), "T-v0", ("pixels/wrist",), 16)
    assert only.cameras == ("pixels/wrist",) and np.array_equal(only.reset()[0]["images"], wrist[None])
    state, other = {"robot": np.ones(3), "object": np.zeros(1)}, pixels(16, 16)
    space = spaces.Dict(
        {
            "state": spaces.Dict({"robot": spaces.Box(-1, 1, (3,)), "object": spaces.Box(-1, 1, (1,))}),
            "images": spaces.Dict({"grey": image(16, 16)}),
            "mode": spaces.Discrete(3),
        }
    )
    env = ImagesAndState(Shows(space, {"state": state, "images": {"grey": other}, "mode": 1}), "T-v0", (), 16)
    seen = env.reset()[0]
    assert env.columns == {"mode": (0, 3), "state/object": (3, 4), "state/robot": (4, 7)}
    assert seen["state"].tolist() == [0, 1, 0, 0, 1, 1, 1]
    assert all(np.array_equal(seen["images"][0, ..., channel], other) for channel in range(3))


def test_images_in_tuples():
    """S2, S3: they became thousands of states beside another camera, or none of the scripts took them."""
    space = spaces.Tuple([image(16, 16, 3), spaces.Dict({"side": image(16, 16, 3), "q": VECTOR})])
    front, side = pixels(16, 16, 3), pixels(16, 16, 3)[::-1]
    env = ImagesAndState(Shows(space, (front, {"side": side, "q": np.float32([1, 2])})), "T-v0", (), 16)
    seen = env.reset()[0]
    assert env.cameras == ("0", "1/side") and env.columns == {"1/q": (0, 2)}
    assert np.array_equal(seen["images"], [front, side]) and seen["state"].tolist() == [1, 2]


@pytest.mark.parametrize("form", ["HWC", "CHW", "HW", "HW1", "floats", "CHW-floats", "negative-strides"])
def test_images_in_any_form_become_the_same(form):
    """Channels first or last, grey, floats in [0, 1] [S3]."""
    original = pixels(20, 20, 3) if form not in ("HW", "HW1") else np.repeat(pixels(20, 20, 1), 3, 2)
    given = {
        "HWC": original,
        "CHW": original.transpose(2, 0, 1),
        "HW": original[..., 0],
        "HW1": original[..., :1],
        "floats": np.float32(original) / 255,
        "CHW-floats": (np.float64(original) / 255).transpose(2, 0, 1),
        "negative-strides": original[::-1, ::-1].copy()[::-1, ::-1],
    }[form]
    high = 255 if given.dtype == np.uint8 else 1
    space = spaces.Dict({"cam": spaces.Box(0, high, given.shape, given.dtype), "state": VECTOR})
    env = ImagesAndState(Shows(space, {"cam": given, "state": np.zeros(2)}), "T-v0", (), 20)
    assert np.array_equal(env.reset()[0]["images"], original[None])


@pytest.mark.parametrize(
    ("high", "stored", "given", "words"),
    [
        (255, np.uint8, np.int64([0, 200, 255]), None),
        (51, np.uint8, np.uint8([0, 40, 51]), None),
        (1, np.uint8, np.uint8([0, 200, 255]), "cam holds uint8 in 0 ... 255, its space says uint8 in 0 ... 1"),
        (1, np.float32, np.float32([0, 200 / 255, 1]), None),
        (255, np.uint8, np.float32([0, 0.8, 1]), "cam holds float32 in 0 ... 1, its space says uint8 in 0 ... 255"),
        (255, np.uint8, np.int64([0, 200, 256]), "cam holds int64 in 0 ... 256, its space says uint8"),
        (1, np.float32, np.float32([0, 200, 255]), "cam holds float32 in 0 ... 255, its space says float32 in 0 ... 1"),
        (1, np.float32, np.uint8([0, 200, 255]), "cam holds uint8 in 0 ... 255, its space says float32"),
        (1, np.float32, np.float32([-1, 0.5, 1]), "cam holds float32 in -1 ... 1"),
    ],
)
def test_images_that_are_not_what_their_space_says(high, stored, given, words):
    """S3: taken where it is sure what they are, else named; they would be black, or turn over."""
    space = spaces.Dict({"cam": spaces.Box(0, high, (12, 12, 3), stored), "state": VECTOR})
    obs = {"cam": np.tile(np.repeat(given, 3), (12, 4)).reshape(12, 12, 3), "state": np.zeros(2)}
    env = ImagesAndState(Shows(space, obs), "T-v0", (), 12)
    if words:
        with pytest.raises(Fault, match=re.escape(words)):
            env.reset()
    else:
        assert sorted(set(env.reset()[0]["images"].ravel())) == [0, 200, 255]


def test_images_are_resized_by_area_and_a_squeezed_one_is_told(capsys):
    """P6"""
    wide, square = pixels(16, 32, 3), pixels(32, 32, 3)
    space = spaces.Dict({"wide": image(16, 32, 3), "square": image(32, 32, 3)})
    env = ImagesAndState(Shows(space, {"wide": wide, "square": square}), "T-v0", (), 8)
    assert env.cameras == ("square", "wide") and env.squeezed == ["wide"]
    small = env.reset()[0]["images"].astype(float)
    means = [square.reshape(8, 4, 8, 4, 3).mean((1, 3)), wide.reshape(8, 2, 8, 4, 3).mean((1, 3))]
    assert np.abs(small - means).max() <= 0.5
    assert env.reset()[0]["state"].shape == (0,)
    module.views_of(gym.wrappers.FrameStackObservation(env, 1))
    assert capsys.readouterr().out == "wide is not square: it is squeezed to 8 x 8\n"


@pytest.mark.parametrize(
    ("space", "words"),
    [
        (
            spaces.Dict({"rgb": image(16, 16, 3), "depth": spaces.Box(0, 10, (16, 17, 1), np.float32)}),
            "cannot take depth",
        ),
        (spaces.Dict({"rgb": image(16, 16, 3), "rgba": image(16, 16, 4)}), "cannot take rgba"),
        (spaces.Dict({"rgb": image(16, 16, 3), "stacked": image(4, 16, 16, 3)}), "cannot take stacked"),
        (spaces.Dict({"rgb": image(16, 16, 3), "grid": image(7, 7, 3)}), "cannot take grid.*8 pixels.*in a wrapper"),
        (spaces.Dict({"state": VECTOR}), "observes no images; use sac_state_sim.py, or --cameras render"),
        (VECTOR, "observes no images"),
        (image(16, 16, 4), "cannot take image.*8 pixels.*in a wrapper"),
        (spaces.Box(-1, 1, (10, 30)), "cannot take image"),
        (spaces.Box(0, 255, (16, 16, 3)), "cannot take image.*bytes or floats in .0, 1."),
        (spaces.Box(0, 65535, (20, 20, 1), np.uint16), "cannot take image"),
        (spaces.Dict({"rgb": image(16, 16, 3), "map": spaces.MultiBinary((32, 32))}), "cannot take map"),
        (spaces.Tuple([image(16, 16, 3), image(16, 16, 4)]), "cannot take 1"),
    ],
)
def test_what_cannot_be_taken_is_named(space, words):
    """Nothing with rows and columns becomes a state in silence [S3]; with --cameras it is left out."""
    with pytest.raises(SystemExit, match=words):
        ImagesAndState(Shows(space, None), "T-v0", (), 16)
    if isinstance(space, spaces.Dict) and "rgb" in space:
        obs = {name: np.zeros(part.shape, part.dtype) for name, part in space.items()}
        env = ImagesAndState(Shows(space, obs), "T-v0", ("rgb",), 16)
        assert env.reset()[0]["state"].shape == (0,) and env.cameras == ("rgb",)


def test_text_is_no_state():
    space = spaces.Dict({"rgb": image(16, 16, 3), "task": spaces.Text(5)})
    with pytest.raises(SystemExit, match=r"cannot take task, Text.*in a wrapper"):
        ImagesAndState(Shows(space, None), "T-v0", (), 16)


def test_unknown_cameras_and_small_tables():
    space = spaces.Dict({"cam": image(16, 16, 3), "switches": spaces.Box(0, 1, (8,), np.uint8)})
    env = ImagesAndState(Shows(space, {"cam": pixels(16, 16, 3), "switches": np.ones(8, np.uint8)}), "T-v0", (), 16)
    assert env.reset()[0]["state"].tolist() == [1] * 8
    with pytest.raises(SystemExit, match="--cameras top: T-v0 has cam"):
        ImagesAndState(Shows(space, None), "T-v0", ("top",), 16)
    assert image_axes(spaces.Box(0, 255, (2, 8), np.uint8)) is None


@pytest.mark.parametrize("as_list", [False, True])
def test_the_rendered_picture_as_observation(as_list):
    """Also of a task whose render() returns a list [P2]."""
    picture = pixels(24, 24, 3)
    env = Rendered(Shows(VECTOR, np.zeros(2), [picture[::-1], picture] if as_list else picture))
    assert np.array_equal(env.reset()[0], picture) and env.observation_space.shape == (24, 24, 3)
    seen = ImagesAndState(env, "T-v0", ("render",), 24)
    assert seen.cameras == ("render",) and np.array_equal(seen.reset()[0]["images"], picture[None])
    with pytest.raises(Fault, match="--cameras render: render\\(\\) gives NoneType"):
        Rendered(Shows(VECTOR, np.zeros(2), None))


# --- Files ------------------------------------------------------------------------------------------------------------
def frame(number: int) -> np.ndarray:
    return np.full((2, 3), number, np.uint8)


def new_file(path: Path, slots: int = 0) -> FrameFile:
    file = FrameFile(path / "f.frames", (2, 3), CPU)
    if slots:
        file.make_room(slots)
    return file


def numbers(file: FrameFile, slots: list[int]) -> list[int]:
    return file.get(torch.tensor(slots))[:, 0, 0].tolist()


def test_slots_are_reused_only_two_checkpoints_after_their_last_use(tmp_path):
    file = new_file(tmp_path, 4)
    slots = [file.put(frame(n)) for n in range(4)]
    file.keep(slots)
    file.state_dict()
    file.drop(slots[:2])
    assert not file.free  # the newest checkpoint refers to them
    file.state_dict()
    assert not file.free  # the one before the newest
    file.state_dict()
    assert list(file.free) == slots[:2]
    assert {file.put(frame(9)), file.put(frame(10))} == set(slots[:2]) and len(file) == 4
    file.put(frame(11))  # grows
    assert len(file) > 4 and numbers(file, slots) == [9, 10, 2, 3]


def test_a_slot_that_is_used_twice_is_dropped_twice(tmp_path):
    file = new_file(tmp_path, 2)
    slot = file.put(frame(1))
    file.keep([slot, slot])
    file.drop([slot])
    assert file.dropped == []
    file.drop([slot])
    assert file.dropped == [slot]


def test_both_newest_checkpoints_can_be_read_whatever_comes_after(tmp_path):
    """Random steps, checkpoints and kills: a copy of the file taken at any moment has what either checkpoint needs."""
    generator = np.random.default_rng(0)
    file, held, states = new_file(tmp_path, 8), {}, []
    for step in range(400):
        slot = file.put(frame(step % 251))
        file.keep([slot])
        held[slot] = step % 251
        if len(held) > 10:
            oldest = next(iter(held))
            file.drop([oldest])
            del held[oldest]
        if generator.random() < 0.1:
            states.append((file.state_dict(), dict(held)))
        for state, wanted in states[-2:]:
            other = new_file(tmp_path)
            other.load_state_dict(state)
            assert numbers(other, list(wanted)) == list(wanted.values())
            assert not set(other.free) & set(wanted)
    assert len(file) < 80  # it grew, but does not grow for ever


def test_going_on_reuses_what_the_checkpoint_before_does_not_need(tmp_path):
    file = new_file(tmp_path, 6)
    slots = [file.put(frame(n)) for n in range(5)]
    file.keep(slots)
    file.state_dict()
    file.drop(slots[:2])
    state = file.state_dict()
    other = new_file(tmp_path)
    other.load_state_dict(state)
    assert list(other.free) == [5]  # 0 and 1 belong to the checkpoint before
    other.state_dict()
    assert list(other.free) == [5, 0, 1]


def test_a_file_that_is_gone_or_cut_is_named(tmp_path):
    file = new_file(tmp_path, 6)
    file.put(frame(1))
    state = file.state_dict()
    data = file.path.read_bytes()
    file.path.write_bytes(data[:-1])
    with pytest.raises(SystemExit, match=rf"{file.path}: has 35 bytes of 36; bring the whole file back"):
        new_file(tmp_path).load_state_dict(state)
    file.path.unlink()
    with pytest.raises(SystemExit, match="has 0 bytes of 36"):
        new_file(tmp_path).load_state_dict(state)


def test_a_run_that_begins_anew_does_not_take_an_old_file_for_its_own(tmp_path):
    new_file(tmp_path, 6).put(frame(7))
    file = new_file(tmp_path, 3)
    assert len(file) == 3 and file.path.stat().st_size == 18 and not file.frames.any()


def test_disk_is_announced_and_refused_before_it_is_taken(tmp_path, monkeypatch, capsys):
    file = FrameFile(tmp_path / "new" / "f.frames", (2, 128, 128, 3), CPU)
    file.check_disk(200, "replay", "lower it")
    assert f"replay, 19.7 MB of disk in {tmp_path / 'new'}" in capsys.readouterr().out
    assert not file.path.exists()
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 10_000_000))
    with pytest.raises(SystemExit, match=r"f.frames needs 19.7 MB of disk, there are 10 MB; lower it"):
        file.check_disk(200, "replay", "lower it")
    (tmp_path / "taken").touch()
    with pytest.raises(SystemExit, match=f"--frames-dir {tmp_path}/taken: File exists; give another folder"):
        FrameFile(tmp_path / "taken" / "f.frames", (2, 128, 128, 3), CPU).check_disk(200, "replay", "lower it")
    monkeypatch.setattr(module.os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(SystemExit, match=f"--frames-dir {tmp_path}/new: takes no files; give another folder"):
        file.check_disk(200, "replay", "lower it")


def test_frames_of_another_run_are_not_written_over(tmp_path):
    """Of one whose folders are called the same, in another place: its frames would be this run's, in silence."""
    views = Views(("front",), 8, 1, {"state": (0, 1)})
    dtype = step_type(1, 2, (1, *views.frame_shape))

    def frames_of(place: str, resume: str | None = None) -> FrameFile:
        folder = tmp_path / place / "runs" / "mine"
        run = types.SimpleNamespace(dir=folder, state=None, args=types.SimpleNamespace(resume=resume))
        return frame_file("replay", 3, 4, views, dtype, run, str(tmp_path / "disk"), CPU)

    one = frames_of("one")
    one.put(np.full(views.frame_shape, 7, np.uint8))
    (tmp_path / "other" / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "other" / "runs" / "mine" / "args.json").touch()
    with pytest.raises(SystemExit, match="disk: has runs-mine-replay.frames, another run's; delete it if that is gone"):
        frames_of("other")
    assert not list((tmp_path / "other" / "runs" / "mine").iterdir())  # nothing that --resume takes
    assert one.frames[0].min() == 7
    frames_of("one", resume="runs/mine")  # killed before its first checkpoint, it begins anew


def test_sizes_for_people():
    assert [size_text(n) for n in (12, 98_304, 19_660_800_000, 6.24e15)] == [
        "12 B",
        "98.3 kB",
        "19.7 GB",
        "6.24e+03 TB",
    ]
