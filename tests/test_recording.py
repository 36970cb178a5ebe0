"""common/recording.py: a dataset that is whole after every write; fingerprints that name what differs."""

import dataclasses
import errno
import os
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import imageio.v3 as imageio
import minari
import numpy as np
import pytest
import recorded_tasks  # noqa: F401  registers its tasks
from conftest import held_elsewhere

from common import envs, recording
from common.recording import (
    Recording,
    Step,
    cameras_of,
    dataset_folder,
    fields_of,
    settled,
    stacked,
    write_sheet,
    write_video,
)

ABOUT = {"mode": "demos", "classes": 2}


@pytest.fixture
def env(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    return envs.make("recorded_tasks:Reach-v0")


def opened(env, about: dict = ABOUT) -> Recording:
    return Recording(dataset_folder("hil/x-v0", "--dataset"), "hil/x-v0", env, about)


def fields(env, length: int) -> dict:
    """An episode whose rewards are its length."""
    observations = [env.reset(seed=t)[0] for t in range(length + 1)]
    return {
        "observations": stacked(observations),
        "actions": np.zeros((length, 3), np.float32),
        "rewards": np.full(length, float(length)),
        "terminations": np.zeros(length, bool),
        "truncations": np.arange(length) == length - 1,
        "infos": {"success": np.zeros(length, bool), "label": np.full(length, length % 3 - 1, np.int8)},
    }


def lengths() -> list[int]:
    """Of the episodes as Minari reads them; each is checked to be whole."""
    dataset = minari.load_dataset("hil/x-v0")
    found = []
    for episode in dataset.iterate_episodes():
        assert episode.observations["front"].shape == (len(episode) + 1, 16, 24, 3)
        assert episode.rewards.tolist() == [len(episode)] * len(episode)
        found.append(len(episode))
    assert dataset.total_steps == sum(found)
    return found


def test_episodes_come_back_without_loss(env):
    store = opened(env)
    written = [fields(env, length) for length in (3, 5)]
    for number, episode in enumerate(written):
        store.add(episode, {"verdict": "success", "seed": 7 + number})
        assert lengths() == [3, 5][: number + 1]  # after each
    dataset = minari.load_dataset("hil/x-v0")
    for episode, before in zip(dataset.iterate_episodes(), written, strict=True):
        assert np.array_equal(episode.observations["front"], before["observations"]["front"])
        assert np.array_equal(episode.observations["state"], before["observations"]["state"])
        assert episode.truncations.tolist() == before["truncations"].tolist()
        assert np.array_equal(episode.infos["label"], before["infos"]["label"])
    about = list(dataset.storage.get_episode_metadata([0, 1]))
    assert [(a["verdict"], a["seed"], a["total_steps"]) for a in about] == [("success", 7, 3), ("success", 8, 5)]
    again = dataset.recover_environment()
    assert again.spec.id == "Reach-v0" and again.spec.max_episode_steps == 30
    assert dataset.storage.metadata["mode"] == "demos"


class Killed(BaseException):
    pass


def cut(monkeypatch, writes: int) -> None:
    """The process ends at this write, counted from 0: the file is not there yet."""
    real, left = recording.write_atomically, [writes]

    def write(path, data):
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        real(path, data)

    monkeypatch.setattr(recording, "write_atomically", write)


def reopened(store: Recording, env, monkeypatch) -> Recording:
    monkeypatch.undo()
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(store.folder.parent.parent))
    store.lock.close()
    return opened(env)


@pytest.mark.parametrize("writes", range(4))
def test_end_at_any_write_of_an_episode(env, monkeypatch, writes):
    store = opened(env)
    store.add(fields(env, 3), {})
    cut(monkeypatch, writes)
    if writes < 3:  # the episode, the links, the totals
        with pytest.raises(Killed):
            store.add(fields(env, 5), {})
    else:
        store.add(fields(env, 5), {})
    assert lengths() == ([3, 5] if writes == 3 else [3])  # as others read it at once
    store = reopened(store, env, monkeypatch)
    assert lengths() == ([3, 5] if writes > 0 else [3])  # what is on disk is not lost
    store.add(fields(env, 4), {})
    assert lengths()[-1] == 4 and [episode["id"] for episode in store.episodes] == list(range(len(lengths())))


@pytest.mark.parametrize("writes", range(3))
def test_end_at_any_write_of_an_undo(env, monkeypatch, writes):
    store = opened(env)
    store.add(fields(env, 3), {})
    store.add(fields(env, 5), {"verdict": "failure"})
    cut(monkeypatch, writes)
    if writes < 2:  # the totals, the links
        with pytest.raises(Killed):
            store.undo()
    else:
        assert store.undo()["verdict"] == "failure"
    assert lengths() == ([3] if writes > 0 else [3, 5])
    store = reopened(store, env, monkeypatch)
    assert lengths() == ([3] if writes == 2 else [3, 5])  # undone as a whole or not at all
    assert [part.tolist() for part in store.labels] == [[-1] * 3, [1] * 5][: len(lengths())]


def test_end_while_the_dataset_is_made(env, monkeypatch, tmp_path):
    (tmp_path / "hil/x-v0/.new").mkdir(parents=True)
    (tmp_path / "hil/x-v0/.new/metadata.json").write_text("{")
    store = opened(env)
    store.add(fields(env, 3), {})
    assert lengths() == [3]


def test_missing_file_is_named(env):
    store = opened(env)
    for length in (3, 4, 5):
        store.add(fields(env, length), {})
    (store.data / "episode_1.hdf5").unlink()
    store.lock.close()
    with pytest.raises(SystemExit, match=r"episode_1.hdf5 cannot be read .*numbered without gaps"):
        opened(env)


def test_lock(env):
    opened(env)
    with (
        held_elsewhere(dataset_folder("hil/x-v0", "--dataset") / "record.lock") as pid,
        pytest.raises(SystemExit, match=f"hil/x-v0: process {pid} is recording to it"),
    ):
        opened(env)
    opened(env)


@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC])
def test_disk_that_takes_no_files(env, monkeypatch, code):
    def taken(*_) -> None:
        raise OSError(code, os.strerror(code))

    if code == errno.EROFS:
        monkeypatch.setattr(recording, "hold", taken)
    else:
        monkeypatch.setattr(Recording, "create", taken)
    with pytest.raises(SystemExit, match=rf"hil/x-v0: cannot be written \(.*{os.strerror(code)}\); make room, or"):
        opened(env)


@pytest.mark.parametrize("folder", ["file/datasets", "/proc/datasets"])
def test_a_folder_of_datasets_that_cannot_be_made(tmp_path, monkeypatch, folder):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / folder))
    with pytest.raises(SystemExit, match=f"--dataset hil/x-v0: .*{folder}.*; set MINARI_DATASETS_PATH to a folder"):
        dataset_folder("hil/x-v0", "--dataset")


def test_other_uses_of_the_name_are_refused(env):
    opened(env).lock.close()
    with pytest.raises(SystemExit, match="hil/x-v0: its mode is demos, not classifier"):
        opened(env, ABOUT | {"mode": "classifier"})
    with pytest.raises(SystemExit, match=r'is of another set-up: .*task is "Reach-v0" there, "Gripper-v0" here'):
        opened(envs.make("recorded_tasks:Gripper-v0"))
    for name in ("x", "hil/x", "hil x-v0"):
        with pytest.raises(SystemExit, match=f"--dataset {name}: is no name that Minari takes"):
            dataset_folder(name, "--dataset")


def test_foreign_dataset_is_left_alone(env, tmp_path):
    foreign = tmp_path / "hil/x-v0/data/metadata.json"
    foreign.parent.mkdir(parents=True)
    foreign.write_text('{"dataset_id": "hil/x-v0", "total_episodes": 3}')
    with pytest.raises(SystemExit, match="hil/x-v0: exists, and was not recorded here; give another name"):
        opened(env)
    assert [path.name for path in foreign.parent.iterdir()] == ["metadata.json"]


def test_room_for_the_longest_episode(env, monkeypatch):
    store = opened(env)
    needed = 30 * (12 + 16 * 24 * 3) + recording.SPARE_BYTES
    usage = recording.shutil.disk_usage("/")
    monkeypatch.setattr(recording.shutil, "disk_usage", lambda path: usage._replace(free=int(needed)))
    store.check_disk(env)
    monkeypatch.setattr(recording.shutil, "disk_usage", lambda path: usage._replace(free=int(needed) - 1))
    with pytest.raises(SystemExit, match=r"100 MB are free in .*, an episode may take 100 MB; make room"):
        store.check_disk(env)


def test_pictures(tmp_path, monkeypatch):
    frames = np.zeros((4, 32, 48, 3), np.uint8)
    frames[2, :, :24] = 200
    write_video(frames, tmp_path / "v.mp4", 10)
    video = np.stack(list(imageio.imiter(tmp_path / "v.mp4")))
    assert video.shape == frames.shape and abs(video.astype(int) - frames).mean() < 6

    def is_stopped(path, *_, **__):
        Path(path).write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr("imageio.v2.mimwrite", is_stopped)
    for name in ("v.mp4", "new.mp4"):
        with pytest.raises(KeyboardInterrupt):
            write_video(frames, tmp_path / name, 10)
    assert len(list(imageio.imiter(tmp_path / "v.mp4"))) == len(frames) and not (tmp_path / "new.mp4").exists()
    write_sheet([("a", frames), ("b", frames[2:3])], tmp_path / "s.png", height=32)
    sheet = imageio.imread(tmp_path / "s.png")
    assert sheet.shape == (68, 90 + 4 * 50, 3)
    assert (sheet[:32, 190:238] == frames[2]).all() and (sheet[34:66, 90:138] == frames[2]).all()
    assert (sheet[34:66, 140:] == 255).all()


def test_pictures_of_two_heights_stand_side_by_side(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    env = envs.make("recorded_tasks:TwoSizes-v0")
    store = opened(env)
    store.add(fields(env, 3), {"verdict": "success"})
    store.write_pictures(list(minari.load_dataset("hil/x-v0").iterate_episodes()), env)
    video = np.stack(list(imageio.imiter(store.folder / "episode_0.mp4")))
    assert video.shape == (4, 32, 24 + 32, 3)
    assert abs(video[:, :, 30:].astype(int) - 100).mean() < 10 and video[:, 20:, :20].mean() < 10
    store.undo()
    store.add(fields(env, 5), {"verdict": "success"})
    store.write_pictures(list(minari.load_dataset("hil/x-v0").iterate_episodes()), env)
    assert len(list(imageio.imiter(store.folder / "episode_0.mp4"))) == 6  # not that of the one before


def test_a_sheet_of_the_newest_by_their_labels(env, monkeypatch):
    """A label is that of the frame after its step."""
    rows = []
    monkeypatch.setattr(recording, "write_sheet", lambda shown, path: rows.append(shown))
    monkeypatch.setattr(recording, "write_video", lambda *_: None)
    store = opened(env)
    store.episodes = [{"verdict": "success"}] * 62
    seen = {"front": np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((16, 24, 3), np.uint8)}
    labels = {"label": np.array([0, 0, 1, -1], np.int8)}
    store.write_pictures([SimpleNamespace(id=0, observations=seen, infos=labels)], env)
    shown = {title: frames[:, 0, 0, 0].tolist() for title, frames in rows[0]}
    assert shown == {"0 left out": [4] * 6, "0 label 0": [1] * 3 + [2] * 3, "0 label 1": [3] * 6}
    store.write_pictures([SimpleNamespace(id=i, observations=seen, infos={}) for i in range(62)], env)
    assert [title for title, _ in rows[1]] == [f"{i} success" for i in range(2, 62)]


# --- Labels -----------------------------------------------------------------------------------------------------------
def test_labels_near_a_change_are_left_out():
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 1, 1, 0], np.int8)
    assert settled(labels, 0).tolist() == labels.tolist()
    assert settled(labels, 1).tolist() == [0, 0, 0, -1, -1, 1, 1, 1, -1, -1]
    assert settled(labels, 2).tolist() == [0, 0, -1, -1, -1, -1, 1, -1, -1, -1]
    assert settled(np.array([0, 0], np.int8), 3).tolist() == [0, 0]


def test_cameras_are_the_pictures_among_the_observations():
    from gymnasium import spaces

    front, depth = spaces.Box(0, 255, (16, 24, 3), np.uint8), spaces.Box(0, 255, (16, 24, 1), np.uint8)
    state = spaces.Box(-1, 1, (3,), np.float32)
    assert cameras_of(spaces.Dict(front=front, depth=depth, state=state)) == {"front": 16}
    assert cameras_of(state) == {}


@pytest.mark.parametrize("won", [True, False])
def test_fields_of_an_episode(won):
    steps = []
    for t in range(3):
        steps.append(Step(np.full(2, t), np.full(2, 2 * t), 0.5, False, t == 1, t == 2, 0.1, 0.01 * t))
    fields = fields_of([{"state": np.array([t])} for t in range(4)], steps, won)
    assert fields["observations"]["state"].tolist() == [[0], [1], [2], [3]]
    assert fields["actions"].tolist() == [[0, 0], [1, 1], [2, 2]]
    assert fields["rewards"].tolist() == [0, 0, won]
    assert fields["terminations"].tolist() == [False, False, won]
    assert fields["truncations"].tolist() == [False, False, not won]
    infos = fields["infos"]
    assert infos["asked_action"].tolist() == [[0, 0], [2, 2], [4, 4]] and infos["success"].tolist() == [0, 0, won]
    assert infos["intervened"].tolist() == [0, 1, 0] and infos["suggestion"].tolist() == [0, 0, 1]
    assert infos["time_s"].tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert infos["late_s"].tolist() == pytest.approx([0, 0.01, 0.02])


# --- Fingerprints -----------------------------------------------------------------------------------------------------
def test_fingerprint_of_a_simulated_task(env):
    assert recording.fingerprint(env) == {
        "version": 1,
        "task": "Reach-v0",
        "options": {},
        "hz": 20,
        "observations": {"front": [16, 24, 3], "state": [3]},
        "actions": [[-1.0] * 3, [1.0] * 3],
    }
    filmed = gym.make("recorded_tasks:Reach-v0", render_mode="rgb_array", disable_env_checker=True)
    assert recording.fingerprint(filmed) == recording.fingerprint(env)


def test_fingerprint_of_the_robot_names_what_differs():
    from robot_client import PEG, CameraConfig, FrankaEnv

    ours = recording.fingerprint(FrankaEnv(PEG))
    assert ours == PEG.fingerprint()
    recording.check_fingerprint("x", ours, ours)
    cameras = (CameraConfig("front", crop=(0.1, 0.0, 0.9, 1.0)), CameraConfig("side"))
    other = recording.fingerprint(FrankaEnv(dataclasses.replace(PEG, hz=20.0, cameras=cameras)))
    with pytest.raises(SystemExit) as refused:
        recording.check_fingerprint("--demos x", ours, other)
    assert str(refused.value).endswith(
        "--demos x: is of another set-up: "
        "cameras.front.crop is [0.46, 0.58, 0.74, 0.86] there, [0.1, 0.0, 0.9, 1.0] here; "
        "cameras.side is only here; cameras.wrist is only there; hz is 10.0 there, 20.0 here"
    )


def test_robot_task_comes_back_from_a_dataset(env):
    """A recorded dataset knows the robot's task with all of its settings."""
    from robot_client import PEG

    robot = gym.make("robot_client:FrankaReal-v0", config=PEG, disable_env_checker=True)
    Recording(dataset_folder("hil/x-v0", "--dataset"), "hil/x-v0", robot, ABOUT)
    again = minari.load_dataset("hil/x-v0").recover_environment().unwrapped
    assert again.config.fingerprint() == PEG.fingerprint()
    assert again.config.compliance == PEG.compliance or list(again.config.compliance.clip) == list(PEG.compliance.clip)
    assert again.observation_space == robot.observation_space and again.action_space == robot.action_space
