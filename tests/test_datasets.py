"""common/datasets.py, through bc_flow_offline.py: formats from small files of their layout, and what goes wrong."""

import contextlib
import copy
import errno
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
import types
from collections.abc import Iterator
from pathlib import Path

import gymnasium as gym
import h5py
import minari
import numpy as np
import offline_data
import pytest
import torch
from conftest import popen_script, read_csv, wait_until
from forked import run_forked
from gymnasium import spaces
from offline_data import EPISODES, d4rl_rows, serve, write_hdf5, write_minari, write_robomimic

import bc_flow_offline
from bc_flow_offline import Args, make_batches, make_env_and_datasets, process_train_dataset
from common import datasets, envs
from common.setup import Fault

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:minari")
SCRIPT, CPU = "bc_flow_offline.py", torch.device("cpu")
STAND_INS = Path(offline_data.__file__).parent / "stand_ins"


@pytest.fixture(autouse=True)
def _folders(tmp_path, monkeypatch):
    """Data sets go to a folder of the test's own, and nothing is looked for elsewhere."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("D4RL_URL", "http://127.0.0.1:9")  # where nothing listens
    monkeypatch.setattr("sys.argv", [SCRIPT])


@pytest.fixture
def stand_ins(monkeypatch):
    """The stand-ins for packages that are not installed, fresh for this test."""
    monkeypatch.syspath_prepend(STAND_INS)
    for name in ("ogbench", "robosuite"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_datasets_that_cannot_be_had_are_one_line(monkeypatch):
    with pytest.raises(SystemExit, match="--data hil/none-v0: is not here; .* shows what is, record_demos.py records"):
        datasets.local_dataset("--data", "hil/none-v0")

    def newer(_):
        raise ValueError("of a newer\nMinari")

    monkeypatch.setattr(minari, "load_dataset", newer)
    with pytest.raises(
        SystemExit, match="--demos a/b-v0: this Minari .* cannot read it: of a newer Minari; .*record it again"
    ):
        datasets.local_dataset("--demos", "a/b-v0")


def train_rows(name: str, **changes):
    return make_env_and_datasets(name, Args(**changes))[2]


def assert_no_chunk_crosses(dataset, episode_of: np.ndarray, horizon: int) -> None:
    """Of every chunk, exactly the steps of the first one's episode are valid."""
    rows = np.arange(dataset.size - horizon + 1)
    inside = episode_of[rows[:, None] + np.arange(horizon)] == episode_of[rows][:, None]
    batch = dataset.sample_sequence(len(rows), horizon, 0.99, idxs=rows)
    np.testing.assert_array_equal(batch["valid"], inside)
    args = Args(action_chunking=True, horizon_length=horizon)
    _, actions, valid = make_batches(dataset, args, CPU).gather(torch.from_numpy(rows))
    np.testing.assert_array_equal(valid, inside)
    np.testing.assert_array_equal(actions, batch["actions"].reshape(len(rows), -1))


# --- D4RL -------------------------------------------------------------------------------------------------------------
def codes(observations: np.ndarray) -> list[int]:
    """100 * episode + step of each row."""
    return np.asarray(observations)[:, 0].round().astype(int).tolist()


def test_d4rl_file_with_next_observations(tmp_path):
    """Every row is used; episodes end at timeouts, terminals and the end of the file; only terminals cut the mask."""
    rows = d4rl_rows()
    path = write_hdf5(tmp_path / "x.hdf5", rows)
    train = train_rows("halfcheetah-medium-v2", dataset_path=str(path))
    for key in ("observations", "next_observations", "rewards"):
        np.testing.assert_array_equal(train[key], rows[key])
    np.testing.assert_allclose(train["actions"], rows["actions"], atol=1e-7)
    last = np.cumsum([length for length, _ in EPISODES]) - 1
    assert np.flatnonzero(train["terminals"]).tolist() == last.tolist()
    assert np.flatnonzero(train["masks"] == 0).tolist() == [8, 17]  # terminal; terminal and timeout at once
    for horizon in (1, 2, 3, 5):
        assert_no_chunk_crosses(train, np.array(codes(train["observations"])) // 100, horizon)


def test_d4rl_file_without_next_observations(tmp_path):
    """A row whose next observation is not in the file is left out, unless the episode terminated, as in D4RL."""
    rows = d4rl_rows(next_observations=False)
    train = train_rows("halfcheetah-medium-v2", dataset_path=str(write_hdf5(tmp_path / "x.hdf5", rows)))
    used = codes(train["observations"])
    kept = [c for c in codes(rows["observations"]) if c not in (5, 204, 401)]
    assert used == kept
    for row, code in enumerate(used):
        if train["masks"][row]:
            assert codes(train["next_observations"][row : row + 1]) == [code + 1]
        else:
            assert code in (102, 303)
        assert train["rewards"][row] == code % 100 + 1
        assert train["actions"][row, 0] == pytest.approx(code / 1000, abs=1e-7)
    assert [used[i] for i in np.flatnonzero(train["terminals"])] == [4, 102, 203, 303, 400]
    assert_no_chunk_crosses(train, np.array(used) // 100, 3)


def test_d4rl_file_whose_jumps_are_the_only_sign_of_a_new_episode(tmp_path):
    """Neither timeouts nor terminals: where next_observations and the next row differ, an episode ends."""
    rows = {k: v for k, v in d4rl_rows(((4, "timeout"), (3, "timeout"), (5, "cut"))).items() if k != "timeouts"}
    rows["observations"][:, 1] = rows["next_observations"][:, 1] = 7  # a goal, as if it were
    train = train_rows("halfcheetah-medium-v2", dataset_path=str(write_hdf5(tmp_path / "x.hdf5", rows)))
    assert np.flatnonzero(train["terminals"]).tolist() == [3, 6, 11] and train["masks"].all()


def test_d4rl_v0_file_without_timeouts_is_cut_at_the_time_limit(tmp_path):
    """d4rl/__init__.py cuts such files at max_episode_steps, 1000 for a Hopper."""
    rows = d4rl_rows(((2300, "cut"),), obs_dim=11, action_dim=3, next_observations=False)
    rows["actions"] *= 0.1
    rows = {k: v for k, v in rows.items() if k != "timeouts"}
    train = train_rows("hopper-medium-v2", dataset_path=str(write_hdf5(tmp_path / "x.hdf5", rows)))
    assert [codes(train["observations"])[i] for i in np.flatnonzero(train["terminals"])] == [998, 1998, 2298]


def test_d4rl_file_becomes_a_minari_dataset_once(tmp_path, capsys):
    path = write_hdf5(tmp_path / "x.hdf5", d4rl_rows())
    train = train_rows("halfcheetah-medium-v2", dataset_path=str(path))
    (name,) = minari.list_local_datasets()
    dataset = minari.load_dataset(name)
    assert "halfcheetah-medium" in name and dataset.total_episodes == 5 and dataset.total_steps == 20
    episodes = list(dataset.iterate_episodes())
    assert [len(episode.rewards) for episode in episodes] == [length for length, _ in EPISODES]
    assert [episode.truncations[-1] for episode in episodes] == [True, False, True, False, True]
    assert dataset.observation_space.dtype == episodes[0].observations.dtype == np.float32
    assert datasets.make_task(dataset, train.box).spec.id == "HalfCheetah-v4"
    about = dataset.storage.metadata
    assert (about["ref_min_score"], about["ref_max_score"]) == (-280.178953, 12135.0)
    assert "converting" in capsys.readouterr().out
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "minari").rglob("*.hdf5")}
    again = train_rows("halfcheetah-medium-v2", dataset_path=str(path))
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "minari").rglob("*.hdf5")}
    assert "converting" not in capsys.readouterr().out
    assert all(np.array_equal(again[key], train[key]) for key in train)
    other = d4rl_rows(((7, "timeout"),))  # another file of the same name is other data
    assert train_rows("halfcheetah-medium-v2", dataset_path=str(write_hdf5(path, other))).size == 7


def test_a_file_of_ones_own_for_a_task_of_ones_own(tmp_path, capsys):
    """Also one that is registered after the first try, and by a class: Minari wants a text."""
    path = str(write_hdf5(tmp_path / "own.hdf5", d4rl_rows()))
    before = train_rows("Own-v0", dataset_path=path)
    assert before.source.env_spec is None
    gym.register("Own-v0", offline_data.Steps)
    after = train_rows("Own-v0", dataset_path=path)
    assert after.source.env_spec.entry_point == "offline_data:Steps"
    np.testing.assert_array_equal(before["actions"], after["actions"])


class Unlicensed(offline_data.Steps):
    """Does not run here."""

    def __init__(self, render_mode: str | None = None):
        raise ValueError("no licence")


def test_a_file_for_a_task_that_does_not_run_here(tmp_path, capsys):
    """The file is learned from, and is not called damaged: nothing but an evaluation needs the task."""
    gym.register("Unlicensed-v0", Unlicensed)
    path = write_hdf5(tmp_path / "own.hdf5", d4rl_rows(((4, "timeout"),), 2, 1))
    env, _, train, _ = make_env_and_datasets("Unlicensed-v0", Args(dataset_path=str(path)))
    assert env is None and train.size == 4 and "no licence" in no_evaluation(capsys)


class Configured(offline_data.Steps):
    """An option is an array, as targets often are, or holds some."""

    def __init__(self, lengths: dict | np.ndarray, render_mode: str | None = None):
        super().__init__(render_mode, length=int(np.max(lengths["all"] if isinstance(lengths, dict) else lengths)))


@pytest.mark.parametrize("lengths", [np.array([2, 3]), {"all": np.array([2, 3])}])
def test_a_file_for_a_task_whose_options_are_no_json(tmp_path, capsys, lengths):
    envs.say_once.cache_clear()
    gym.register("Configured-v0", Configured, kwargs={"lengths": lengths})
    path = write_hdf5(tmp_path / "own.hdf5", d4rl_rows(((4, "timeout"),), 2, 1))
    env = make_env_and_datasets("Configured-v0", Args(dataset_path=str(path)))[0]
    env.reset(seed=0)
    assert [env.step(np.zeros(1))[3] for _ in range(3)] == [False, False, True]
    assert "Configured-v0: options ['lengths'] are no JSON" in capsys.readouterr().err


class Only(offline_data.Steps):
    """There is one at a time: it owns a port."""

    there = 0

    def __init__(self, render_mode: str | None = None):
        if Only.there:
            raise OSError("Address already in use")
        Only.there += 1
        super().__init__(render_mode)

    def expert_action(self):
        return np.full(1, 0.5, np.float32)

    def close(self):
        Only.there -= 1


gym.register("Only-v0", f"{__name__}:Only", disable_env_checker=True)


def test_a_task_of_which_there_is_one_at_a_time(capsys):
    """Demonstrations are collected in it, and episodes evaluated one after the other."""
    args = Args(env_name="Only-v0", demos=2, eval_episodes=3, hidden_dims=(8,))
    agent, _, evaluation = bc_flow_offline.prepare(args, CPU)
    assert [evaluation.scores(agent)["episodes"] for _ in range(2)] == [3, 3]
    evaluation.close()
    assert Only.there == 0 and capsys.readouterr().err.count("1 at a time") == 1


@pytest.mark.parametrize(
    ("name", "kind", "worst", "best"),
    [
        ("halfcheetah-medium-replay-v2", "halfcheetah", -280.178953, 12135.0),
        ("hopper-medium-expert-v2", "hopper", -20.272305, 3234.3),
        ("walker2d-random-v2", "walker2d", 1.629008, 4592.3),
        ("ant-expert-v2", "ant", -325.6, 3879.7),
        ("antmaze-large-diverse-v2", "antmaze", 0.0, 1.0),
        ("kitchen-mixed-v0", "kitchen", 0.0, 4.0),
        ("pen-human-v1", "pen", 96.262799, 3076.8331),
        ("hammer-cloned-v1", "hammer", -274.856578, 12794.1348),
        ("relocate-expert-v1", "relocate", -6.425911, 4233.8778),
        ("door-human-v1", "door", -56.512833, 2880.5693),
        ("maze2d-umaze-v1", "maze2d-umaze", 23.85, 161.86),
        ("maze2d-medium-v1", "maze2d-medium", 13.13, 277.39),
        ("maze2d-large-v1", "maze2d-large", 6.7, 273.99),
        ("maze2d-umaze-dense-v1", "maze2d-umaze-dense", 68.54, 193.66),
        ("maze2d-medium-dense-v1", "maze2d-medium-dense", 44.26, 297.46),
        ("maze2d-large-dense-v1", "maze2d-large-dense", 30.57, 303.49),
    ],
)
def test_d4rl_reference_scores(tmp_path, name, kind, worst, best, capsys):
    """D4RL infos.py:106-295, printed with the data; the data's returns are sums of its rewards."""
    dims = datasets.FAMILIES[kind].dims
    path = write_hdf5(tmp_path / "x.hdf5", d4rl_rows(((4, "timeout"), (2, "timeout")), *dims))
    bc_flow_offline.load_datasets(Args(env_name=name, dataset_path=str(path)))
    (dataset_id,) = minari.list_local_datasets()
    about = minari.load_dataset(dataset_id).storage.metadata
    assert about["ref_min_score"] == pytest.approx(worst, abs=5e-3)
    assert about["ref_max_score"] == pytest.approx(best, abs=5e-3)
    printed = capsys.readouterr().out
    assert "D4RL" in printed and "mean return 6.5" in printed and "best 10" in printed and dataset_id in printed


def test_antmaze_episodes_go_on_behind_the_goal(tmp_path):
    """`terminals`, floats, marks the goal, where the episode does not end; rewards - 1 (qc d4rl_utils.py:16-58).
    There are no next_observations."""
    rows = d4rl_rows(((7, "timeout"), (6, "timeout")), obs_dim=29, action_dim=8, next_observations=False)
    rows["terminals"] = np.isin(np.arange(13), (3, 4)).astype(np.float32)
    rows["rewards"] = rows["terminals"]
    args = Args(env_name="antmaze-umaze-v2", dataset_path=str(write_hdf5(tmp_path / "x.hdf5", rows)))
    train = process_train_dataset(make_env_and_datasets(args.env_name, args)[2], args)
    assert np.flatnonzero(train["terminals"]).tolist() == [5, 10]
    assert np.flatnonzero(train["masks"] == 0).tolist() == [3, 4]
    assert train["rewards"].tolist() == [-1, -1, -1, 0, 0, -1] + [-1] * 5


def test_kitchen_episodes_end_where_a_demonstration_does(tmp_path):
    """Neither timeouts nor next_observations; `terminals`, floats, ends each demonstration (D4RL's
    generate_kitchen_datasets.py), `infos` is one column; after 280 steps D4RL cuts."""
    rows = d4rl_rows(((5, "terminal"), (300, "terminal"), (4, "terminal")), 60, 9, next_observations=False)
    del rows["timeouts"]
    rows |= {"terminals": rows["terminals"].astype(np.float32), "actions": rows["actions"] / 10}
    path = write_hdf5(tmp_path / "x.hdf5", rows)
    with h5py.File(path, "a") as file:
        del file["infos"]
        file["infos"] = np.zeros(309, int)
    train = train_rows("kitchen-mixed-v0", dataset_path=str(path))
    used = codes(train["observations"])
    assert [used[i] for i in np.flatnonzero(train["terminals"])] == [4, 378, 399, 203] and train.size == 308


# --- Files that are not what they should be ---------------------------------------------------------------------------
def refused(capsys, name: str, **changes) -> str:
    """The one line that loading ends with."""
    with pytest.raises(SystemExit) as error:
        make_env_and_datasets(name, Args(**changes))
    message = str(error.value.code)
    assert message.startswith(f"{SCRIPT}: ") and "\n" not in message
    assert not minari.list_local_datasets(), "half a data set is left"
    return message


def broken_file(path: Path, how: str) -> Path:
    rows = d4rl_rows()
    if how == "truncated":
        write_hdf5(path, d4rl_rows(((3000, "timeout"),)))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how in ("empty", "text"):
        path.write_text("" if how == "empty" else "<html>404 Not Found</html>")
    elif how == "group":
        with h5py.File(path, "w") as file:
            file["observations/joints"] = rows["observations"]
            for key in ("actions", "rewards", "terminals"):
                file[key] = rows[key]
    elif how == "scalar":
        with h5py.File(write_hdf5(path, rows), "a") as file:
            del file["rewards"]
            file["rewards"] = 1.0
    elif how == "other length":
        write_hdf5(path, rows | {"actions": rows["actions"][:-1]})
    elif how == "no rows":
        write_hdf5(path, {key: values[:0] for key, values in rows.items()})
    elif how == "damaged":  # a flipped byte within the compressed actions
        write_hdf5(path, d4rl_rows(((3000, "timeout"),)))
        with h5py.File(path) as file:
            chunk = file["actions"].id.get_chunk_info(0)
        data = bytearray(path.read_bytes())
        for offset in range(50, 60):
            data[chunk.byte_offset + offset] ^= 0xFF
        path.write_bytes(data)
    else:  # a key is missing
        write_hdf5(path, {key: values for key, values in rows.items() if key != how})
    return path


@pytest.mark.parametrize(
    ("how", "word"),
    [
        ("truncated", "again"),
        ("empty", "layout"),
        ("text", "layout"),
        ("damaged", "again"),
        ("group", "layout"),
        ("scalar", "layout"),
        ("other length", "length"),
        ("no rows", ""),
        ("observations", "observations"),
        ("actions", "actions"),
        ("rewards", "rewards"),
        ("terminals", "terminals"),
    ],
)
def test_broken_d4rl_files(tmp_path, capsys, how, word):
    path = broken_file(tmp_path / "broken.hdf5", how)
    message = refused(capsys, "halfcheetah-medium-v2", dataset_path=str(path))
    assert "broken.hdf5" in message and word in message
    assert list((tmp_path / "minari").glob(".*")) == []


def test_dataset_path_that_does_not_exist(tmp_path, capsys):
    assert "none.hdf5" in refused(capsys, "halfcheetah-medium-v2", dataset_path=str(tmp_path / "none.hdf5"))
    assert "--dataset-path" in refused(capsys, "mujoco/hopper/expert-v0", dataset_path="x.hdf5")


@pytest.mark.parametrize("column", ["observations", "actions", "rewards"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite(tmp_path, capsys, column, value):
    rows = d4rl_rows()
    rows[column][9 if column == "rewards" else (9, 2)] = value
    path = write_hdf5(tmp_path / "x.hdf5", rows)
    message = refused(capsys, "halfcheetah-medium-v2", dataset_path=str(path))
    assert column in message and "finite" in message and "episode 2" in message


@pytest.mark.parametrize("value", [1.5, -1.01])
def test_an_action_out_of_bounds(tmp_path, value):
    rows = d4rl_rows()
    rows["actions"][10, 3] = value
    path = write_hdf5(tmp_path / "x.hdf5", rows)
    with pytest.raises(SystemExit, match=r"episode 2.*--action-bounds clip"):
        train_rows("halfcheetah-medium-v2", dataset_path=str(path))
    train = train_rows("halfcheetah-medium-v2", dataset_path=str(path), action_bounds="clip")
    assert train["actions"][10, 3] == pytest.approx(np.sign(value) * (1 - 1e-5))


def test_actions_stay_just_inside_their_bounds(tmp_path):
    """qc env_utils.py:150: clipped to 1 - 1e-5."""
    rows = d4rl_rows()
    rows["actions"][:2, 0] = -1, 1
    train = train_rows("halfcheetah-medium-v2", dataset_path=str(write_hdf5(tmp_path / "x.hdf5", rows)))
    assert train["actions"][:2, 0].tolist() == [np.float32(1e-5 - 1), np.float32(1 - 1e-5)]


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("halfcheeta-medium-v2", "halfcheetah-medium-v2"),
        ("hopper-medium-reply-v2", "hopper-medium-replay-v2"),
        ("halfcheetah-medium-v3", "halfcheetah-medium-v"),
        ("antmaze-umaze-play-v2", "antmaze-umaze"),
        ("FrankaPickCub-v0", "FrankaPickCube-v0"),
        ("lift-mh-lowdim", "lift-mh-low_dim"),
        ("outdoor-thing", ""),
    ],
)
def test_unknown_names_suggest_the_nearest(capsys, name, near):
    message = refused(capsys, name)
    assert name in message and near in message
    assert "did you mean" in message if near else True


def test_a_folder_beside_the_datasets_that_is_none():
    """A copy of one, whose name Minari cannot read."""
    for folder in ("sim/pick-v0", "sim/pick-v0-old"):
        (datasets.minari_root() / folder / "data").mkdir(parents=True)
    with pytest.raises(SystemExit, match=r"did you mean sim/pick-v0\?"):
        make_env_and_datasets("sim/pik-v0", Args())


def test_a_local_dataset_is_suggested_too(capsys):
    write_minari("point/expert-v0", gym.make("probe_envs:Point-v0"), episodes=1)
    with pytest.raises(SystemExit, match="point/expert-v0"):
        make_env_and_datasets("pont/expert-v0", Args())


# --- robomimic --------------------------------------------------------------------------------------------------------
def test_robomimic_file(tmp_path, stand_ins):
    """demo_2 before demo_10; observations: eef_pos, eef_quat, gripper_qpos, object (qc robomimic_utils.py:27).
    An episode ends where its demonstration does, the mask is 0 in every step that leaves the task solved."""
    path = write_robomimic(tmp_path / "x.hdf5")
    args = Args(env_name="lift-mh-low_dim", dataset_path=str(path))
    train = make_env_and_datasets(args.env_name, args)[2]
    train_demos = list(offline_data.robomimic_demos())
    keys = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "object")
    obs = [np.concatenate([demo["obs"][key] for key in keys], -1) for demo in train_demos]
    np.testing.assert_array_equal(train["observations"], np.float32(np.concatenate([o[:-1] for o in obs])))
    np.testing.assert_array_equal(train["next_observations"], np.float32(np.concatenate([o[1:] for o in obs])))
    np.testing.assert_allclose(
        train["actions"], np.concatenate([d["actions"] for d in train_demos]).clip(1e-5 - 1, 1 - 1e-5), atol=1e-7
    )
    lengths = [len(demo["actions"]) for demo in train_demos]
    last = np.cumsum(lengths) - 1
    assert np.flatnonzero(train["terminals"]).tolist() == last.tolist()
    dones = np.concatenate([demo["dones"] for demo in train_demos])
    assert train["masks"].tolist() == (1 - dones).tolist() and dones.sum() == 2 * len(train_demos)
    assert process_train_dataset(train, args)["rewards"].tolist() == (dones - 1.0).tolist()
    assert_no_chunk_crosses(train, np.repeat(np.arange(len(lengths)), lengths), 4)


def test_robomimic_file_of_failures_without_next_observations(tmp_path):
    """dataset_states_to_obs.py with --done_mode 0, as for mg, where a failure has no done, and --exclude-next-obs."""

    def change(file):
        for demo in file["data"].values():
            demo["dones"][:], demo["rewards"][:] = 0, 0
            del demo["next_obs"]

    path = edit(write_robomimic(tmp_path / "x.hdf5"), change)
    train = train_rows("my-lift-v0", dataset_path=str(path))
    last = np.flatnonzero(train["terminals"])
    assert len(last) == 12 and train["masks"].all()
    assert all(episode.truncations[-1] for episode in train.source.iterate_episodes())
    following = np.append(train["observations"][1:], train["observations"][-1:], 0)
    following[last] = train["observations"][last]
    np.testing.assert_array_equal(train["next_observations"], following)


def test_robomimic_file_of_two_arms(tmp_path):
    """Both arms are observed, where qc leaves out the second."""

    def change(file):
        for demo in file["data"].values():
            for key in offline_data.ROBOMIMIC_KEYS:
                if key != "object":
                    for group in (demo["obs"], demo["next_obs"]):
                        group[key.replace("robot0", "robot1")] = group[key][:] + 1

    env_args = offline_data.ENV_ARGS | {"env_name": "TwoArmTransport"}
    path = edit(write_robomimic(tmp_path / "x.hdf5", env_args=env_args), change)
    train = train_rows("transport-mh-low_dim", dataset_path=str(path))
    first, second = train["observations"][:, :9], train["observations"][:, 9:18]
    np.testing.assert_allclose(second, first + 1)
    assert train["observations"].shape[1] == 28


def test_robomimic_file_in_the_usual_place(tmp_path, stand_ins):
    write_robomimic(tmp_path / ".robomimic" / "lift" / "mh" / "low_dim_v15.hdf5")
    assert train_rows("lift-mh-low_dim")["observations"].shape[1] == 19


def test_robomimic_file_is_missing(capsys):
    message = refused(capsys, "can-ph-low_dim")
    for word in (".robomimic/can/ph/low_dim_v15.hdf5", "download_datasets", "--hdf5_types low_dim ", "--dataset-path"):
        assert word in message
    message = refused(capsys, "can-mg-low_dim")  # of which robomimic's DATASET_REGISTRY has no low_dim
    assert ".robomimic/can/mg/low_dim_sparse_v15.hdf5" in message and "--hdf5_types low_dim_sparse " in message


def test_robomimic_task_is_made_from_the_file(tmp_path, stand_ins):
    import robosuite

    path = write_robomimic(tmp_path / "x.hdf5")
    env, eval_env, train, _ = make_env_and_datasets("lift-mh-low_dim", Args(dataset_path=str(path)))
    name, options = robosuite.made[0]
    assert name == "Lift" and options["robots"] == ["Panda"] and options["controller_configs"]["type"] == "BASIC"
    assert not options["use_camera_obs"] and options["control_freq"] == 20
    assert [made["has_offscreen_renderer"] for _, made in robosuite.made] == [False, True]
    obs, _ = env.reset(seed=3)
    again, _ = eval_env.reset(seed=3)
    assert obs.dtype == np.float32 and obs.shape == train["observations"].shape[1:]
    np.testing.assert_array_equal(obs, again)  # seeded
    assert not np.array_equal(obs, env.reset(seed=4)[0])
    np.testing.assert_allclose(obs[:9], [0, 0, 0, 1, 0, 0, 0, 0.02, -0.02])
    up = np.array([0, 0, 1, 0, 0, 0, 0], np.float32)
    steps = [env.step(up) for _ in range(3)]
    assert [step[1:4] for step in steps] == [(0, False, False), (0, False, False), (1, True, False)]
    assert steps[-1][4]["success"] and not steps[0][4]["success"]
    env.reset(seed=0)
    ends = [env.step(0 * up)[2:4] for _ in range(300)]  # qc robomimic_utils.py:34: a lift has 300 steps
    assert ends.index((False, True)) == 299 and not any(terminated for terminated, _ in ends)


def test_robosuite_is_seen_the_right_way_up(tmp_path, stand_ins):
    path = write_robomimic(tmp_path / "x.hdf5")
    eval_env = make_env_and_datasets("lift-mh-low_dim", Args(dataset_path=str(path)))[1]
    eval_env.reset(seed=0)
    picture = eval_env.render()
    assert picture.shape == (256, 256, 3) and picture[0].max() == 0 and picture[-1].min() == 255


def test_robosuite_of_before_1_5_is_seeded_too(tmp_path, stand_ins, monkeypatch):
    """It places objects with numpy's global generator. The data's own version, but for the last number, is enough."""
    import robosuite

    def reset(self):
        self.t, self.z, self.goal = 0, 0.0, float(np.random.uniform(0.4, 0.6))  # noqa: NPY002
        return self._get_observations()

    monkeypatch.setattr(robosuite, "__version__", "1.4.1")
    monkeypatch.setattr(robosuite.Lift, "reset", reset)
    path = write_robomimic(tmp_path / "x.hdf5", env_args=offline_data.ENV_ARGS | {"env_version": "1.4.0"})
    env = make_env_and_datasets("lift-mh-low_dim", Args(dataset_path=str(path)))[0]
    first, other, again = (env.reset(seed=seed)[0].tolist() for seed in (1, 2, 1))
    assert first == again != other


def test_a_robosuite_task_of_ones_own(tmp_path, stand_ins):
    """Without settings; it has twice the steps of the longest demonstration."""
    env_args = {"env_name": "Stack", "type": 1}
    path = write_robomimic(tmp_path / "x.hdf5", env_args=env_args)
    env = make_env_and_datasets("my-stack-v0", Args(dataset_path=str(path)))[0]
    env.reset(seed=0)
    ends = [env.step(np.zeros(7, np.float32))[3] for _ in range(12)]
    assert ends == [False] * 11 + [True]


def test_robomimic_without_robosuite(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "robosuite", None)
    env, _, train, _ = make_env_and_datasets(
        "lift-mh-low_dim", Args(dataset_path=str(write_robomimic(tmp_path / "x.hdf5")))
    )
    assert env is None and train.size == 60 and "robosuite" in capsys.readouterr().err


def edit(path: Path, change) -> Path:
    with h5py.File(path, "a") as file:
        change(file)
    return path


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda file: file["data"].attrs.__delitem__("env_args"), "env_args"),
        (lambda file: file["data"].attrs.__setitem__("env_args", "{"), ""),
        (lambda file: file["data/demo_3"].__delitem__("actions"), "actions"),
        (lambda file: file["data/demo_3/obs"].__delitem__("object"), "object"),
        (lambda file: file.__delitem__("data"), "data"),
        (lambda file: [file["data"].__delitem__(f"demo_{i}") for i in range(12)], "demonstrations"),
        (lambda file: file["data"].move("demo_3", "other"), ""),
        (lambda file: file["data/demo_3/actions"].__setitem__((0, 0), np.nan), "finite"),
    ],
    ids=["no env_args", "bad env_args", "no actions", "no object", "no data", "no demos", "other names", "NaN"],
)
def test_broken_robomimic_files(tmp_path, capsys, stand_ins, change, word):
    path = edit(write_robomimic(tmp_path / "broken.hdf5"), change)
    message = refused(capsys, "lift-mh-low_dim", dataset_path=str(path))
    assert word in message


# --- OGBench ----------------------------------------------------------------------------------------------------------
def test_ogbench_through_its_package(stand_ins):
    import ogbench

    env, _, train, val = make_env_and_datasets("reach-play-singletask-v0", Args())
    for part, theirs in ((train, ogbench.rows(30, 0)), (val, ogbench.rows(5, 1))):
        for key in ("observations", "next_observations", "rewards", "masks", "terminals"):
            np.testing.assert_array_equal(part[key], theirs[key], err_msg=key)
        np.testing.assert_allclose(part["actions"], theirs["actions"], atol=1e-7)
    assert_no_chunk_crosses(train, np.arange(train.size) // 4, 3)
    assert make_env_and_datasets("reach-play-singletask-v0", Args(validation_fraction=0.5))[2].size == train.size
    obs, _ = env.reset(seed=0)
    assert obs.shape == (2,) and obs.dtype == np.float32
    count = len([call for call in ogbench.calls if not call[2]])
    make_env_and_datasets("reach-play-singletask-v0", Args())
    assert len([call for call in ogbench.calls if not call[2]]) == count == 1  # loaded through the package once


def test_validation_actions_are_scaled_as_those_of_training(stand_ins):
    """By the training data's own range, in which not all of them need to lie."""
    import ogbench

    _, _, train, val = make_env_and_datasets("reach-play-singletask-v0", Args(action_bounds="data"))
    raw = ogbench.rows(5, 1)["actions"]
    scaled = datasets.to_unit(raw, train.box)
    assert np.abs(scaled).max() != pytest.approx(1, abs=1e-3)
    np.testing.assert_allclose(val["actions"], scaled.clip(-1 + 1e-5, 1 - 1e-5), atol=1e-6)


def test_ogbench_with_only_the_training_part_stored(stand_ins, tmp_path):
    """A run that was killed between the two parts."""
    make_env_and_datasets("reach-play-singletask-v0", Args())
    (val,) = [name for name in minari.list_local_datasets() if "val" in name]
    shutil.rmtree(tmp_path / "minari" / val)
    assert make_env_and_datasets("reach-play-singletask-v0", Args())[3].size == 20


def test_ogbench_faults(stand_ins, monkeypatch, capsys):
    assert "is not a data set" in refused(capsys, "no-such-singletask-v0")
    assert "singletask is not a data set" in refused(capsys, "singletask")
    monkeypatch.setitem(__import__("sys").modules, "ogbench", None)
    assert "pip install ogbench" in refused(capsys, "reach-play-singletask-v0")


# --- Downloads --------------------------------------------------------------------------------------------------------
D4RL_PATH = "gym_mujoco_v2/halfcheetah_medium-v2.hdf5"
ANTMAZE = "ant_maze_v2/Ant_maze_{}_noisy_multistart_{}_multigoal_{}_sparse_fixed.hdf5"


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # where nothing listens


@pytest.fixture
def d4rl_server(tmp_path, monkeypatch) -> Iterator[offline_data.FileServer]:
    data = write_hdf5(tmp_path / "source" / "x.hdf5", d4rl_rows()).read_bytes()
    with serve({D4RL_PATH: data}) as server:
        monkeypatch.setenv("D4RL_URL", server.url)
        yield server


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("halfcheetah-medium-v2", D4RL_PATH),
        ("hopper-medium-replay-v2", "gym_mujoco_v2/hopper_medium_replay-v2.hdf5"),
        ("walker2d-medium-expert-v2", "gym_mujoco_v2/walker2d_medium_expert-v2.hdf5"),
        ("pen-human-v1", "hand_dapg_v1/pen-human-v1.hdf5"),
        ("antmaze-umaze-v2", ANTMAZE.format("u-maze", "False", "False")),
        ("antmaze-umaze-diverse-v2", ANTMAZE.format("u-maze", "True", "True")),
        ("antmaze-medium-play-v2", ANTMAZE.format("big-maze", "True", "False")),
        ("antmaze-medium-diverse-v2", ANTMAZE.format("big-maze", "True", "True")),
        ("antmaze-large-play-v2", ANTMAZE.format("hardest-maze", "True", "False")),
        ("antmaze-large-diverse-v2", ANTMAZE.format("hardest-maze", "True", "True")),
        ("maze2d-umaze-v1", "maze2d/maze2d-umaze-sparse-v1.hdf5"),
        ("maze2d-large-dense-v1", "maze2d/maze2d-large-dense-v1.hdf5"),
        ("kitchen-complete-v0", "kitchen/mini_kitchen_microwave_kettle_light_slider-v0.hdf5"),
        ("kitchen-partial-v0", "kitchen/kitchen_microwave_kettle_light_slider-v0.hdf5"),
        ("kitchen-mixed-v0", "kitchen/kitchen_microwave_kettle_bottomburner_light-v0.hdf5"),
    ],
)
def test_addresses_of_d4rl_files(name, path):
    """D4RL infos.py:297-330."""
    assert datasets.d4rl_files()[name] == path


def test_a_d4rl_file_is_downloaded_once(tmp_path, d4rl_server, capsys):
    args = Args(env_name="halfcheetah-medium-v2")
    train = make_env_and_datasets(args.env_name, args)[2]
    np.testing.assert_array_equal(train["observations"], d4rl_rows()["observations"])
    assert d4rl_server.requests == [("GET", f"/{D4RL_PATH}", None)]
    assert "100%" in capsys.readouterr().err  # the progress bar
    assert [path.name for path in (tmp_path / "d4rl").iterdir()] == ["halfcheetah_medium-v2.hdf5"]
    make_env_and_datasets(args.env_name, args)
    assert len(d4rl_server.requests) == 1
    shutil.rmtree(tmp_path / "minari")  # the file is enough
    make_env_and_datasets(args.env_name, args)
    assert len(d4rl_server.requests) == 1


@pytest.mark.parametrize("how", ["cut off", "too long a length", "404", "an error page", "a folder that is none"])
def test_downloads_that_fail(tmp_path, d4rl_server, capsys, how):
    """One line; no half file that the next run would take for the whole one; then it works."""
    url = d4rl_server.url
    if how == "cut off":
        d4rl_server.cut, d4rl_server.cuts = 2000, 1
    elif how == "too long a length":
        d4rl_server.extra = 100
    elif how == "an error page":
        d4rl_server.files = {D4RL_PATH: b"<html>Please log in</html>"}
    elif how == "a folder that is none":
        (tmp_path / "d4rl").write_text("")
    else:
        d4rl_server.files = {}
    message = refused(capsys, "halfcheetah-medium-v2")
    assert url in message and any(word in message for word in ("404", "again", "signature", f"{tmp_path}/d4rl"))
    if how == "a folder that is none":
        (tmp_path / "d4rl").unlink()
    else:
        assert not list((tmp_path / "d4rl").iterdir())
    d4rl_server.extra = 0
    d4rl_server.files = {D4RL_PATH: (tmp_path / "source" / "x.hdf5").read_bytes()}
    assert train_rows("halfcheetah-medium-v2").size == 20


def test_no_disk_space_for_a_download(tmp_path, d4rl_server, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    message = refused(capsys, "halfcheetah-medium-v2")
    assert "d4rl" in message and "free" in message and "room" in message
    assert not list((tmp_path / "d4rl").iterdir())


def test_the_disk_fills_up_during_a_download(tmp_path, d4rl_server):
    """A file may not grow beyond 3 kB: one line that names it, and nothing half is left."""
    flags = ("--env-name", "halfcheetah-medium-v2", "--run-dir", "run")
    env = {"D4RL_URL": d4rl_server.url, "D4RL_DATASET_DIR": str(tmp_path / "d4rl"), "HOME": str(tmp_path)}
    result = run_forked(SCRIPT, *flags, cwd=tmp_path, env=env, max_file_bytes=3000, check=False, timeout=30)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"{SCRIPT}: ") and ("too large" in last or "No space" in last) and "--resume" not in last
    assert not list((tmp_path / "d4rl").iterdir())


def test_no_network_is_one_message_in_seconds(capsys):
    """With ways on that work: a Minari id takes no --dataset-path, its folder is copied."""
    started = time.monotonic()
    ways = {"halfcheetah-medium-v2": "--dataset-path FILE", "mujoco/halfcheetah/medium-v0": "minari download"}
    for name, way in ways.items():
        message = refused(capsys, name)
        for word in (name, way, "minari list local", "leave --env-name out"):
            assert word in message
        assert ("--dataset-path" in message) == ("/" not in name)
    assert time.monotonic() - started < 4


def test_a_proxy_reaches_what_is_not_reached_from_here(monkeypatch):
    assert not datasets.reachable("http://127.0.0.1:9/file")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert datasets.reachable("http://127.0.0.1:9/file")


def test_a_network_that_swallows_packets_is_given_up_soon(capsys, monkeypatch):
    """Neither refused nor answered, as behind a firewall; and a name server that does not answer."""

    def silent(*_, **__):
        time.sleep(30)

    monkeypatch.setattr("socket.create_connection", silent)
    started = time.monotonic()
    assert "--dataset-path" in refused(capsys, "halfcheetah-medium-v2")
    assert time.monotonic() - started < 6


def test_minari_id_is_downloaded_through_minari(monkeypatch, capsys, tmp_path):
    """Minari's own function, with its progress; a hub that does not know the name, and Minari without its package."""
    source = tmp_path / "hub"
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(source))
    write_minari("steps/some-v0", gym.make("offline_data:Steps-v0"), episodes=2)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    asked = []

    def download_dataset(dataset_id, force_download=False):
        asked.append(dataset_id)
        if not (source / dataset_id).exists():
            raise ValueError("Couldn't find any version")
        shutil.copytree(source, os.environ["MINARI_DATASETS_PATH"], dirs_exist_ok=True)

    monkeypatch.setattr("minari.storage.local.hosting.download_dataset", download_dataset, raising=False)
    monkeypatch.setattr("minari.storage.hosting.download_dataset", download_dataset)
    with serve({}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        assert train_rows("steps/some-v0").size == 14 and asked == ["steps/some-v0"]
        assert train_rows("steps/some-v0").size == 14 and len(asked) == 1
        with pytest.raises(SystemExit, match=r"steps/sme-v0.*Couldn't find.*steps/some-v0"):
            train_rows("steps/sme-v0")
        shutil.rmtree(tmp_path / "minari/steps/some-v0/data")
        (tmp_path / "minari/steps/some-v0/notes").touch()
        with pytest.raises(SystemExit, match=r"--env-name steps/some-v0: \[Errno 39\] Directory not empty"):
            train_rows("steps/some-v0")

        def without_package(dataset_id, force_download=False):
            raise ImportError("huggingface_hub is not installed") from ModuleNotFoundError(name="httpx")

        monkeypatch.setattr("minari.storage.hosting.download_dataset", without_package)
        with pytest.raises(SystemExit, match="pip install httpx, which is missing"):
            train_rows("steps/other-v0")


@pytest.mark.parametrize("error", [KeyboardInterrupt, ConnectionError])
def test_a_minari_download_that_ends_half_way_leaves_nothing(monkeypatch, tmp_path, error):
    """Half a folder would be taken for the dataset by the next run, and by Minari's own download."""

    def download(dataset_id, force_download=False):
        folder = Path(os.environ["MINARI_DATASETS_PATH"], dataset_id, "data")
        folder.mkdir(parents=True)
        (folder / "metadata.json").write_text("{}")
        raise error

    monkeypatch.setattr("minari.storage.hosting.download_dataset", download)
    monkeypatch.setenv("MINARI_REMOTE", "hf://nobody")
    with pytest.raises(SystemExit if error is ConnectionError else error):
        train_rows("steps/some-v0")
    assert not list((tmp_path / "minari").iterdir())


def test_d4rl_name_never_becomes_another_dataset(capsys):
    """Minari's medium is here, D4RL's is not: the name is refused, not replaced."""
    write_minari("mujoco/halfcheetah/medium-v0", gym.make("offline_data:Steps-v0"), episodes=1)
    with pytest.raises(SystemExit, match="cannot be reached"):
        make_env_and_datasets("halfcheetah-medium-v2", Args())


# --- Own recordings, Minari datasets ----------------------------------------------------------------------------------
def test_minari_dataset_as_rows():
    """Truncated ends keep their mask, terminated ones lose it; observations are flat in the order of sorted names."""
    dataset = write_minari("point/random-v0", gym.make("probe_envs:Point-v0"), policy=lambda env, obs: [-0.4, 0.1, 0])
    train = train_rows("point/random-v0")
    episodes = list(dataset.iterate_episodes())
    flat = [np.concatenate([e.observations["goal"], e.observations["point"]], -1) for e in episodes]
    np.testing.assert_array_equal(train["observations"], np.float32(np.concatenate([o[:-1] for o in flat])))
    np.testing.assert_array_equal(train["next_observations"], np.float32(np.concatenate([o[1:] for o in flat])))
    np.testing.assert_allclose(train["actions"], [[-0.2, 0.05, 0]] * train.size, atol=1e-7)  # of bounds -2..2
    last = np.cumsum([len(episode.rewards) for episode in episodes]) - 1
    assert np.flatnonzero(train["terminals"]).tolist() == last.tolist()
    terminated = [row for row, episode in zip(last, episodes) if episode.terminations[-1]]
    assert np.flatnonzero(train["masks"] == 0).tolist() == terminated and 0 < len(terminated) < 4
    assert_no_chunk_crosses(train, np.repeat(np.arange(4), [len(e.rewards) for e in episodes]), 6)


@pytest.mark.parametrize("task", ["Steps", "Ordered", "Tall"])
def test_live_observations_and_actions_are_those_of_the_data(task):
    """The same numbers in the same order, and an action in [-1, 1] does what the stored one did."""
    env = gym.make(f"offline_data:{task}-v0")
    write_minari("own/data-v0", env, episodes=2)
    env, eval_env, train, _ = make_env_and_datasets("own/data-v0")
    for live in (env, eval_env):
        obs, _ = live.reset(seed=1000)
        for row in range(7):
            assert obs.dtype == np.float32
            np.testing.assert_array_equal(obs, train["observations"][row])
            obs, reward, *_ = live.step(train["actions"][row])
            if task != "Ordered":
                assert reward == pytest.approx(train["rewards"][row], abs=2e-4)
    assert abs(train["actions"]).max() <= 1


def test_action_bounds_of_the_data_hold_live():
    """Recorded within -1..1, of a task that takes -2..2: the actions do what they did, or there is no task."""
    env = gym.make("probe_envs:Point-v0")
    narrow = spaces.Box(-1, 1, (3,))
    write_minari(
        "own/data-v0", env, episodes=1, policy=lambda env, obs: np.full(3, 0.5, np.float32), action_space=narrow
    )
    live, _, train, _ = make_env_and_datasets("own/data-v0")
    if live is not None:
        live.reset(seed=1000)
        obs, *_ = live.step(train["actions"][0])
        np.testing.assert_allclose(obs, train["next_observations"][0], atol=1e-5)


class Unbounded(offline_data.Steps):
    action_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)


class Discrete(offline_data.Steps):
    action_space = spaces.Discrete(3)

    def step(self, action):
        return super().step([action])


class Levels(offline_data.Steps):
    action_space = spaces.Box(0, 3, (1,), np.int64)


@pytest.mark.parametrize("task", [Unbounded, Discrete, Levels])
def test_actions_that_cannot_be_learned(task):
    write_minari("own/data-v0", task(), episodes=1)
    with pytest.raises(SystemExit, match="own/data-v0.*bounded Box|bounded Box.*own/data-v0"):
        make_env_and_datasets("own/data-v0")


def test_nan_in_a_recording():
    """Minari stores what it is given; learning from it would end in NaN."""

    def episode(env, obs):
        return np.array([np.nan if obs[1] == 3 else 0.1], np.float32)

    write_minari("own/data-v0", gym.make("offline_data:Steps-v0"), episodes=2, policy=episode)
    with pytest.raises(SystemExit, match="own/data-v0.*finite"):
        make_env_and_datasets("own/data-v0")


def test_task_that_is_not_here(capsys, monkeypatch):
    """Data can be learned from without its task: no environment, and a line that says why."""
    write_minari("own/data-v0", gym.make("offline_data:Steps-v0"), episodes=2)
    metadata = Path(minari.load_dataset("own/data-v0").storage.data_path) / "metadata.json"
    metadata.write_text(metadata.read_text().replace("offline_data:Steps", "no_such_module:Steps"))
    env, eval_env, train, _ = make_env_and_datasets("own/data-v0")
    assert env is None and eval_env is None and train.size == 14
    assert "no evaluation" in capsys.readouterr().err


def test_normalized_scores_are_the_datasets_own(capsys):
    reference = {"ref_min_score": -3.0, "ref_max_score": 5.0}
    write_minari("own/data-v0", gym.make("offline_data:Steps-v0"), episodes=2, **reference)
    make_env_and_datasets("own/data-v0")
    printed = capsys.readouterr().out
    assert "-3" in printed and "5" in printed and "Minari" in printed and "D4RL" not in printed


def test_references_that_are_the_same_are_none(capsys):
    """A recording of a sparse task by a policy that never succeeds: 0 by chance, 0 by the policy."""
    write_minari("own/data-v0", gym.make("offline_data:Steps-v0"), 1, ref_min_score=0.0, ref_max_score=0.0)
    train = train_rows("own/data-v0")
    assert datasets.reference_scores(train.source)[1] == "" and "no reference scores" in capsys.readouterr().out


def test_minari_locomotion_is_scored_with_d4rls_references(capsys):
    """bc.md: Minari's mujoco sets have none of their own; the line says whose they are."""
    write_minari("mujoco/hopper/simple-v0", gym.make("Hopper-v5"), episodes=1)
    make_env_and_datasets("mujoco/hopper/simple-v0")
    printed = capsys.readouterr().out
    assert "D4RL" in printed and "-20.2723" in printed and "3234.3" in printed and "mujoco/hopper/simple-v0" in printed


def test_top_fraction_keeps_the_episodes_of_the_highest_return(capsys):
    dataset = write_minari(
        "point/random-v0", gym.make("probe_envs:Point-v0"), 10, policy=lambda env, obs: [0.1, 0.1, 0]
    )
    returns = [episode.rewards.sum() for episode in dataset.iterate_episodes()]
    train = train_rows("point/random-v0", top_fraction=0.3)
    best = sorted(np.argsort(returns)[-3:])
    kept = np.concatenate([dataset[int(i)].rewards for i in best])
    np.testing.assert_array_equal(train["rewards"], np.float32(kept))
    printed = capsys.readouterr().out
    assert "3 of 10 episodes" in printed and f"mean return {np.mean(np.sort(returns)[-3:]):.6g}, best" in printed


def test_shares_of_episodes_are_not_rounded_up_by_accident():
    """0.56 * 25 is 14.000000000000002."""
    returns = {number: float(-number) for number in range(25)}
    kept, _ = datasets.choose_episodes(None, returns, 0.0, 0.56, seed=0)
    assert kept == list(range(14))
    kept, _ = datasets.choose_episodes(None, returns, 0.0, 0.561, seed=0)
    assert kept == list(range(15))
    dataset = types.SimpleNamespace(id="own/data-v0", storage=types.SimpleNamespace(metadata={}))
    chosen = [datasets.choose_episodes(dataset, returns, 0.56, 1.0, seed) for seed in (0, 1)]
    assert [(len(kept), len(held_out)) for kept, held_out in chosen] == [(11, 14)] * 2 and chosen[0] != chosen[1]
    equal = dict.fromkeys(range(25), 0.0)  # then the first ones
    assert datasets.choose_episodes(None, equal, 0.0, 0.2, seed=0)[0] == list(range(5))
    with pytest.raises(SystemExit, match=r"own/data-v0: no episode is left to learn from; --validation-fraction 0.99"):
        datasets.choose_episodes(dataset, returns, 0.99, 1.0, seed=0)


def test_validation_part_is_apart_from_training():
    write_minari("steps/data-v0", gym.make("offline_data:Steps-v0"), episodes=10)
    _, _, train, val = make_env_and_datasets("steps/data-v0", Args(validation_fraction=0.3, seed=1))
    assert (train.size, val.size) == (49, 21)
    assert not set(train["observations"][:, 0].tolist()) & set(val["observations"][:, 0].tolist())
    assert len(set(train["observations"][:, 0].tolist()) | set(val["observations"][:, 0].tolist())) == 10
    again = make_env_and_datasets("steps/data-v0", Args(validation_fraction=0.3, seed=1))[3]
    np.testing.assert_array_equal(val["observations"], again["observations"])


def test_robomimic_validation_is_the_files_own(tmp_path, stand_ins):
    """mask/valid names demo_0 and demo_6."""
    args = Args(dataset_path=str(write_robomimic(tmp_path / "x.hdf5")), validation_fraction=0.1)
    _, _, train, val = make_env_and_datasets("lift-mh-low_dim", args)
    assert sorted({round(100 * a) for a in val["actions"][:, 6].tolist()}) == [0, 6]
    assert train.size + val.size == 60 and val.size == 8


def test_samples_of_stacked_frames():
    """Dataset.sample gives an agent with frame_stack what it sees live: earlier frames first, the start repeated."""
    write_minari("steps/data-v0", gym.make("offline_data:Steps-v0"), episodes=2)
    env, _, train, _ = make_env_and_datasets("steps/data-v0", Args(frame_stack=3))
    obs, _ = env.reset(seed=1001)
    for row in range(7, 10):
        for batch in (train.sample(1, idxs=np.array([row])), train.sample_sequence(1, 2, 0.9, idxs=np.array([row]))):
            np.testing.assert_array_equal(batch["observations"][0], obs)
        obs, *_ = env.step(train["actions"][row])
        np.testing.assert_array_equal(train.sample(1, idxs=np.array([row]))["next_observations"][0], obs)
    assert obs.tolist()[1::2] == [1, 2, 3]


# --- Images -----------------------------------------------------------------------------------------------------------
@pytest.fixture(params=[True, False], ids=["jpeg", "raw"])
def camera_data(request):
    env = gym.make("offline_data:Camera-v0")
    return write_minari("own/camera-v0", env, episodes=3, jpeg_encoding=request.param)


def test_images_from_disk_are_those_in_memory(camera_data):
    memory = train_rows("own/camera-v0", data_loading="memory")
    disk = train_rows("own/camera-v0", data_loading="workers")
    images = np.concatenate([episode.observations["front"][:-1] for episode in camera_data.iterate_episodes()])
    assert memory["observations"]["front"].dtype == np.uint8
    np.testing.assert_array_equal(memory["observations"]["front"], images)
    rows = np.array([[0, 29], [10, 9]])
    np.testing.assert_array_equal(disk["observations"]["front"][rows], images[rows])
    assert disk.keys() == memory.keys() and disk["observations"].keys() == memory["observations"].keys()
    for key in ("actions", "rewards", "terminals", "masks"):
        np.testing.assert_array_equal(disk[key], memory[key])
    np.testing.assert_array_equal(disk["observations"]["state"], memory["observations"]["state"])


def test_some_episodes_images_from_disk_are_those_in_memory(camera_data):
    """Episodes that are not the first ones; also in a copy, as a worker process that is no fork gets one."""
    how = {"validation_fraction": 0.3, "seed": 3}
    for part in (2, 3):
        memory = make_env_and_datasets("own/camera-v0", Args(data_loading="memory", **how))[part]
        disk = make_env_and_datasets("own/camera-v0", Args(data_loading="workers", **how))[part]
        images = copy.deepcopy(disk["observations"]["front"])
        np.testing.assert_array_equal(images[np.arange(memory.size)], memory["observations"]["front"])
    assert images.episodes[0] > 0


def test_a_process_opens_a_file_of_images_for_itself(camera_data, monkeypatch):
    images = train_rows("own/camera-v0", data_loading="workers")["observations"]["front"]
    handle = images.file
    images[0]
    assert images.file is handle
    monkeypatch.setattr(os, "getpid", lambda: -1)
    images[0]
    assert images.file is not handle


@pytest.mark.parametrize("jpeg", [True, False])
def test_nested_observations_from_disk_are_those_in_memory(jpeg):
    """Beside a camera, in a dict of its own, a depth that JPEG could not keep, and numbers."""
    depth, rgb = spaces.Box(0, 1, (40, 36, 1), np.float32), spaces.Box(0, 255, (40, 36, 3), np.uint8)
    space = spaces.Dict(front=spaces.Dict(rgb=rgb, depth=depth, q=spaces.Box(-9, 9, (2,))))
    frames = random_images((7, 40, 36, 3))
    q = np.arange(14, dtype=np.float32).reshape(7, 2) / 2
    parts = {"rgb": frames, "depth": np.float32(frames[..., :1] / 255), "q": q}
    steps_dataset("own/data-v0", space, lambda i: {"front": parts}, jpeg_encoding=jpeg)
    memory, disk = (train_rows("own/data-v0", data_loading=how)["observations"] for how in ("memory", "workers"))
    assert memory.keys() == disk.keys() == {"front_rgb", "front_depth", "state"}
    for key, values in memory.items():
        np.testing.assert_array_equal(disk[key][np.arange(18)], values)
    np.testing.assert_array_equal(memory["front_depth"][:6], frames[:6, ..., :1])


def test_images_stay_on_disk_when_memory_is_short(camera_data, monkeypatch, capsys):
    for free, expected in ((10**12, False), (1000, True)):
        monkeypatch.setattr(datasets, "free_memory", lambda free=free: free)
        assert datasets.images_stay_on_disk(camera_data, "auto") == expected
        assert not datasets.images_stay_on_disk(camera_data, "memory")
        bc_flow_offline.load_datasets(Args(env_name=camera_data.id))
        assert ("images read by 2 workers, for memory is short" in capsys.readouterr().out) == expected


def test_memory_is_shared_by_the_processes_of_a_job(camera_data, monkeypatch):
    size = int(camera_data.total_steps) * 40 * 40 * 3
    monkeypatch.setattr(datasets, "free_memory", lambda: 6 * size)
    for processes, on_disk in ((1, False), (2, False), (4, True)):
        monkeypatch.setattr(datasets, "world_size", lambda processes=processes: processes)
        assert datasets.images_stay_on_disk(camera_data, "auto") == on_disk


def test_images_without_states_are_read_by_workers():
    write_minari("own/pictures-v0", gym.make("offline_data:Pictures-v0"), episodes=3)
    memory = train_rows("own/pictures-v0", data_loading="memory")
    disk = train_rows("own/pictures-v0", data_loading="workers")
    (name,) = memory["observations"]
    assert disk["observations"].keys() == {name}
    rows = np.array([0, 29, 10])
    np.testing.assert_array_equal(disk["observations"][name][rows], memory["observations"][name][rows])
    for key in ("actions", "rewards", "terminals", "masks"):
        np.testing.assert_array_equal(disk[key], memory[key])


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_give_the_batches_of_memory(camera_data, workers):
    options = {"frame_stack": 3, "batch_size": 16, "action_chunking": True, "horizon_length": 4, "num_workers": workers}
    taken = []
    for how in ("memory", "workers"):
        args = Args(**options, data_loading=how, dataset_proportion=0.9)
        dataset = process_train_dataset(make_env_and_datasets("own/camera-v0", args)[2], args)
        batches = make_batches(dataset, args, CPU)
        batches.open(2, 6, False)
        taken.append([batches.take(2, 3, CPU), batches.take(5, 1, CPU)])
        np.testing.assert_array_equal(taken[-1][1][0]["front"][0], dataset.stacked(batches.rows(5))["front"])
        batches.loader = None  # ends the workers
    for one, other in zip(*taken):
        assert one[0]["front"].shape[1:] == (16, 40, 40, 9) and one[0]["state"].shape[1:] == (16, 3)
        for key in one[0]:
            assert torch.equal(one[0][key], other[0][key])
        assert torch.equal(one[1], other[1]) and torch.equal(one[2], other[2])


def test_workers_whose_samples_do_not_fit_into_shared_memory(camera_data, monkeypatch):
    """Docker gives 64 MB; what a worker cannot put there never comes, and nothing says so."""
    batches = make_batches(train_rows("own/camera-v0", data_loading="workers"), Args(batch_size=16), CPU)
    free = 28 * 16 * (40 * 40 * 3 + 4 + 4 + 4) - 1  # four samples wait for each of two workers, 20 are taken at once
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=free))
    with pytest.raises(SystemExit, match=r"^\S+ /dev/shm: 2 MB are free, --num-workers 2 \(0 needs none\) needs 2;"):
        batches.open(0, 100, False, 20)
    batches.open(0, 27, False, 20)
    batches.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_on_disk_that_is_damaged_is_one_line(workers, monkeypatch):
    dataset = write_minari("own/camera-v0", gym.make("offline_data:Camera-v0"), episodes=3, jpeg_encoding=False)
    path = Path(dataset.storage.data_path) / "main_data.hdf5"
    with h5py.File(path, "r+") as file:
        images = file["episode_1/observations/front"][:]
        del file["episode_1/observations/front"]
        options = {"chunks": (1, *images.shape[1:]), "compression": "gzip"}
        chunk = file.create_dataset("episode_1/observations/front", data=images, **options).id.get_chunk_info(5)
    with path.open("r+b") as file:
        file.seek(chunk.byte_offset + 4)
        file.write(b"\xff" * 20)
    batches = make_batches(train_rows("own/camera-v0", data_loading="workers"), Args(num_workers=workers), CPU)
    monkeypatch.setattr(batches, "rows", lambda step: np.array([step * 15]))  # the second update's is in episode 1
    batches.open(0, 3, False)
    with pytest.raises(Fault, match=r"^[^\n]*episode 1: observations/front is damaged, cannot be read[^\n]*$"):
        batches.take(0, 3, CPU)
    batches.close()


def test_a_jpeg_on_disk_that_is_damaged_is_one_line():
    """Wherever: Pillow raises SyntaxError and struct.error, too."""
    dataset = write_minari("own/camera-v0", gym.make("offline_data:Camera-v0"), episodes=3)
    images = train_rows("own/camera-v0", data_loading="workers")["observations"]["front"]
    with h5py.File(Path(dataset.storage.data_path) / "main_data.hdf5") as file:
        sound = file["episode_1/observations/front"][5].tobytes()
    damaged = 0
    for spoilt in [sound[:i] + rest for i in range(2, 400) for rest in (b"", b"\0" + sound[i + 1 :])]:
        frames = {"episode_1/observations/front": [np.frombuffer(spoilt, np.uint8)] * 15}
        images.pid, images.file = os.getpid(), frames
        try:
            images[images.firsts[1] + 5]
        except Fault:
            damaged += 1
    assert damaged > 400


STILL = np.zeros((3, 2)), np.zeros((2, 1), np.float32), np.zeros(2), *np.array([[False] * 2, [False, True]])
STILL_SPACES = {"observation_space": spaces.Box(-1, 1, (2,), float), "action_space": spaces.Box(-1, 1, (1,))}


def test_two_processes_that_store_the_same_data(tmp_path):
    """The slower one finds the name taken when it is done."""
    root = tmp_path / "minari" / "own"
    datasets.store("own/data-v0", [STILL], **STILL_SPACES)
    root.rename(tmp_path / "theirs")

    def episodes():
        yield STILL
        shutil.copytree(tmp_path / "theirs", root)
        yield STILL

    assert datasets.store("own/data-v0", episodes(), **STILL_SPACES) == "own/data-v0"
    assert train_rows("own/data-v0").size == 2 and not list((tmp_path / "minari").glob(".*"))


@pytest.mark.parametrize("name", ["Hopper-v2", "CartPole-v1", "HalfCheetah-v5"])
def test_gymnasium_tasks_without_an_expert_or_that_do_not_run(capsys, name):
    assert f"--env-name {name}" in refused(capsys, name)


def test_a_server_that_speaks_another_protocol(capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with connection:
                        connection.settimeout(0.5)
                        with contextlib.suppress(OSError):
                            connection.recv(1000)
                            connection.sendall(b"SSH-2.0\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("D4RL_URL", url)
        assert url in refused(capsys, "halfcheetah-medium-v2")


def test_no_disk_space_to_convert_a_file(tmp_path, capsys, monkeypatch, stand_ins):
    """Seen before it begins: HDF5 crashes when the disk fills up as it writes. The file is good, nobody deletes it."""
    path = write_hdf5(tmp_path / "x.hdf5", d4rl_rows())
    pictures = {"observations": np.zeros((20, 99, 99, 3), np.uint8), "timeouts": np.ones(20)}  # well compressed
    small = write_hdf5(tmp_path / "small.hdf5", d4rl_rows(next_observations=False) | pictures)
    lift = write_robomimic(tmp_path / "lift.hdf5")
    usage = shutil.disk_usage(tmp_path)
    for name, file, free in (("my-robot-v0", small, 500_000), ("lift-mh-low_dim", lift, 1000), ("", path, 1000)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        message = refused(capsys, name or "halfcheetah-medium-v2", dataset_path=str(file))
        assert "free" in message and "room" in message and "delete" not in message
    assert "MB are free, ogbench/reach-play-singletask-v0 needs" in refused(capsys, "reach-play-singletask-v0")


def test_a_disk_that_fills_up_during_a_conversion_is_not_the_files_fault(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(datasets, "write", full)
    with pytest.raises(OSError, match="No space left on device"):
        train_rows("my-robot-v0", dataset_path=str(write_hdf5(tmp_path / "x.hdf5", d4rl_rows())))


def test_images_of_two_cameras_in_nested_observations():
    """Both are kept, whatever their places are called."""
    image = spaces.Box(0, 255, (4, 4, 3), np.uint8)
    cameras = {"front": spaces.Dict({"rgb": image}), "wrist": spaces.Dict({"rgb": image})}
    space = spaces.Dict(cameras | {"pos": spaces.Box(-1, 1, (2,))})
    obs = {"front": {"rgb": np.full((5, 4, 4, 3), 1, np.uint8)}, "wrist": {"rgb": np.full((5, 4, 4, 3), 2, np.uint8)}}
    arranged = bc_flow_offline.arrange(space, obs | {"pos": np.zeros((5, 2))})
    images = [x for key, x in arranged.items() if key != "state"]
    assert sorted(x.flat[0] for x in images) == [1, 2] and arranged["state"].shape == (5, 2)


# --- Cases: what users of this field brought --------------------------------------------------------------------------
def no_evaluation(capsys) -> str:
    """The one line about an environment that does not run."""
    lines = [line for line in capsys.readouterr().err.splitlines() if "no evaluation" in line]
    assert len(lines) == 1, lines
    return lines[0]


def broken_lift(monkeypatch, when: str) -> None:
    """A robosuite whose task raises what robosuite 1.5 raises on another MuJoCo: in make, in reset, or in step."""
    import robosuite

    def fault(*_, **__):
        raise AssertionError

    if when == "make":
        monkeypatch.setattr(robosuite, "make", fault)
    else:
        monkeypatch.setattr(robosuite.Lift, when, fault)


@pytest.mark.parametrize("when", ["make", "reset"])
def test_b1_whatever_the_environment_raises_learning_goes_on(tmp_path, stand_ins, monkeypatch, capsys, when):
    """B1, B2: an AssertionError without a word, at once: one line with its name and place, and the data is there."""
    broken_lift(monkeypatch, when)
    env, eval_env, train, _ = make_env_and_datasets(
        "lift-mh-low_dim", Args(dataset_path=str(write_robomimic(tmp_path / "x.hdf5")))
    )
    assert env is None and eval_env is None and train.size == 60
    assert re.search(r"AssertionError at tests/test_datasets.py:\d+", no_evaluation(capsys))


class Falls(offline_data.Steps):
    """Raises in its fourth step."""

    def step(self, action):
        if self.t == 3:
            raise RuntimeError("the simulation\nis unstable")
        return super().step(action)


gym.register("Falls-v0", f"{__name__}:Falls", disable_env_checker=True)


def test_b1_an_environment_that_raises_while_it_is_evaluated(tmp_path, capsys):
    """B1: learned to the end, final_model.pt is there, the fault is named once, with its place; no more evaluations."""
    write_minari("own/data-v0", gym.make("offline_data:Steps-v0"), episodes=2)
    metadata = Path(minari.load_dataset("own/data-v0").storage.data_path) / "metadata.json"
    metadata.write_text(metadata.read_text().replace("offline_data:Steps", f"{__name__}:Falls"))
    flags = [*TINY.split(), "--env-name", "own/data-v0", "--eval-interval", 10]
    done = run_forked(SCRIPT, *flags, cwd=tmp_path)
    lines = [line for line in done.stderr.splitlines() if "no evaluation" in line]
    assert len(lines) == 1 and "the simulation is unstable" in lines[0] and "test_datasets.py" in lines[0]
    assert (done.run_dir / "final_model.pt").exists() and "last: no evaluation" in done.stdout
    assert "Traceback" not in done.stderr


def test_b2_data_of_another_robosuite_is_not_evaluated(tmp_path, stand_ins, capsys):
    """robomimic#206, #230, #259: the controllers of 1.4 and 1.5 differ, success would be 0 without a word."""
    path = write_robomimic(tmp_path / "x.hdf5", env_args=offline_data.ENV_ARGS | {"env_version": "1.4.1"})
    env, _, train, _ = make_env_and_datasets("lift-mh-low_dim", Args(dataset_path=str(path)))
    line = no_evaluation(capsys)
    assert env is None and train.size == 60 and "robosuite 1.4.1" in line and "1.5.2" in line


ADROIT = {
    "door": ("door-human-v1", lambda obs: obs[35:38]),
    "hammer": ("hammer-human-v1", lambda obs: obs[33:36] - obs[36:39]),
    "relocate": ("relocate-human-v1", lambda obs: obs[30:33]),
    "pen": ("pen-human-v1", None),
}


class Hand(gym.Env):
    """Stands for gymnasium-robotics' Adroit tasks: the observation is 0, 0.01, 0.02, ... plus the action's first
    number, the reward 1; it never ends."""

    action_space = spaces.Box(-1, 1, (28,), np.float32)

    def __init__(self, numbers: int, actions: int, render_mode=None):
        self.observation_space = spaces.Box(-np.inf, np.inf, (numbers,), np.float64)
        self.action_space = spaces.Box(-1, 1, (actions,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.arange(self.observation_space.shape[0]) / 100, {}

    def step(self, action):
        return (
            np.arange(self.observation_space.shape[0]) / 100 + float(action[0]),
            1.0,
            False,
            False,
            {"success": False},
        )


@pytest.fixture
def hands(monkeypatch):
    """A module gymnasium_robotics that registers its tasks when it is imported, as the real one."""
    for kind in ADROIT:
        family = datasets.FAMILIES[kind]
        monkeypatch.setitem(gym.registry, family.task.partition(":")[2], None)
        monkeypatch.delitem(gym.registry, family.task.partition(":")[2])

    class Module(types.ModuleType):
        """Registers on import, which here is the first look at it."""

    module = Module("gymnasium_robotics")
    real = datasets.importlib.import_module

    def import_module(name):
        if name != "gymnasium_robotics":
            return real(name)
        for kind in ADROIT:
            family = datasets.FAMILIES[kind]
            name = family.task.partition(":")[2]
            options = {"numbers": family.dims[0], "actions": family.dims[1]}
            if name not in gym.registry:
                gym.register(name, f"{__name__}:Hand", kwargs=options, max_episode_steps=400, disable_env_checker=True)
        return module

    monkeypatch.setattr(datasets.importlib, "import_module", import_module)
    monkeypatch.setitem(sys.modules, "gymnasium_robotics", module)


@pytest.mark.parametrize("kind", ADROIT)
def test_b3_adroit_is_evaluated_as_d4rl_did(tmp_path, hands, kind):
    """B3: also from a dataset that was stored without gymnasium-robotics. Rewards take off the hand's distance, which
    gymnasium-robotics adds; a pen ends when it falls; the time limit is D4RL's."""
    name, hand = ADROIT[kind]
    family = datasets.FAMILIES[kind]
    path = write_hdf5(tmp_path / "x.hdf5", d4rl_rows(((9, "timeout"),), *family.dims))
    env, *_ = make_env_and_datasets(name, Args(dataset_path=str(path)))
    env.reset(seed=0)
    obs, reward, terminated, _, _ = env.step(np.zeros(family.dims[1], np.float32))
    assert reward == pytest.approx(1 - 0.2 * np.linalg.norm(hand(obs)) if hand else 1)
    assert not terminated  # a pen at obs[26] = 0.26
    obs, _, terminated, _, _ = env.step(np.full(family.dims[1], -0.2, np.float32))
    assert obs[26] == pytest.approx(0.06, abs=1e-3) and terminated == (kind == "pen")
    env.reset(seed=0)
    ends = [env.step(np.zeros(family.dims[1], np.float32))[3] for _ in range(family.steps)]
    assert ends.index(True) == family.steps - 1 == {"pen": 99}.get(kind, 199)


def test_b3_without_gymnasium_robotics_one_line_names_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gymnasium_robotics", None)
    path = write_hdf5(tmp_path / "x.hdf5", d4rl_rows(((9, "timeout"),), 39, 28))
    env, _, train, _ = make_env_and_datasets("door-human-v1", Args(dataset_path=str(path)))
    assert env is None and train.size == 9
    assert "pip install gymnasium-robotics" in no_evaluation(capsys)


def test_b4_ant_observes_27_numbers_and_zeros(tmp_path):
    """D4RL's contact forces are all 0 (D4RL issue 143); Ant-v4 without them, then 84 zeros."""
    rows = d4rl_rows(((5, "timeout"),), 111, 8)
    rows["observations"][:, 27:] = 0
    rows["next_observations"][:, 27:] = 0
    env, *_ = make_env_and_datasets("ant-medium-v2", Args(dataset_path=str(write_hdf5(tmp_path / "x.hdf5", rows))))
    plain = gym.make("Ant-v4")
    obs, _ = env.reset(seed=3)
    np.testing.assert_allclose(obs[:27], plain.reset(seed=3)[0], rtol=1e-5)
    assert obs.shape == (111,) and not obs[27:].any()
    assert not env.step(np.full(8, 0.3, np.float32))[0][27:].any()


def test_b4_ant_with_forces_in_the_data(tmp_path):
    """Somebody's own collection, with a simulator that reports them: the environment reports them, too."""
    rows = d4rl_rows(((5, "timeout"),), 111, 8)
    rows["observations"][:, 28:] = 0  # one number will do
    path = write_hdf5(tmp_path / "x.hdf5", rows)
    env, *_ = make_env_and_datasets("ant-medium-v2", Args(dataset_path=str(path)))
    env.reset(seed=3)
    forces = [env.step(np.full(8, 0.3, np.float32))[0][27:] for _ in range(60)]
    assert np.abs(forces).max() > 0.01


# kg; public code of mujoco_py's time prints halfcheetah's. The rest by MuJoCo's changelog of 2.1.2.
MASSES = {
    "halfcheetah": [6.36031332, 1.53524804, 1.58093995, 1.0691906, 1.42558747, 1.17885117, 0.84986945],
    "hopper": [3.53429174, 3.92699082, 2.71433605, 5.0893801],
    "walker2d": [3.53429174, *[3.92699082, 2.71433605, 2.94053072] * 2],
    "ant": [0.32724923, *[0.03647693, 0.03647693, 0.06491138] * 4],
}


@pytest.mark.parametrize("kind", MASSES)
def test_b5_the_robots_weigh_what_the_datas_did(tmp_path, kind):
    """Today's MuJoCo makes capsules up to 8% heavier than that of D4RL's data."""
    dims = datasets.FAMILIES[kind].dims
    path = write_hdf5(tmp_path / "x.hdf5", d4rl_rows(((5, "timeout"),), *dims))
    env, *_ = make_env_and_datasets(f"{kind}-medium-v2", Args(dataset_path=str(path)))
    np.testing.assert_allclose(env.unwrapped.model.body_mass[1:], MASSES[kind], rtol=1e-6)
    assert env.unwrapped.model.body_subtreemass[1] == pytest.approx(sum(MASSES[kind]))


def test_b5_a_capsules_inertia_is_that_of_a_cylinder(tmp_path):
    """Hopper's torso, 0.4 m long, radius 0.05 m, half of that longer at each end; 1000 kg/m3."""
    path = write_hdf5(tmp_path / "x.hdf5", d4rl_rows(((5, "timeout"),), 11, 3))
    env, *_ = make_env_and_datasets("hopper-medium-v2", Args(dataset_path=str(path)))
    mass = np.pi * 0.05**2 * 0.45 * 1000
    across, along = mass * (3 * 0.05**2 + 0.45**2) / 12, mass * 0.05**2 / 2
    model = env.unwrapped.model
    np.testing.assert_allclose(model.body_inertia[model.body("torso").id], [across, across, along], rtol=1e-6)


def test_b5_walkers_feet_and_the_alive_bonus_are_the_datas(tmp_path):
    """Walker2d-v5 has friction 1.9 at both feet, D4RL 0.9 at the right one; it pays the step in which a robot falls."""
    path = write_hdf5(tmp_path / "x.hdf5", d4rl_rows(((5, "timeout"),), 17, 6))
    env, *_ = make_env_and_datasets("walker2d-medium-v2", Args(dataset_path=str(path)))
    model = env.unwrapped.model
    assert [model.geom(name).friction[0] for name in ("foot_geom", "foot_left_geom")] == [0.9, 1.9]
    env.reset(seed=0)
    terminated = False
    while not terminated:
        _, reward, terminated, _, info = env.step(np.full(6, -1, np.float32))
    velocity = info["x_velocity"]
    assert reward == pytest.approx(1 + velocity - 1e-3 * 6, abs=1e-4)


@pytest.mark.parametrize("name", ["antmaze-umaze-v2", "kitchen-mixed-v0", "maze2d-umaze-v1"])
def test_b5_no_score_where_no_robot_fits(tmp_path, capsys, name):
    dims = datasets.FAMILIES[datasets.d4rl_kind(name)].dims
    path = write_hdf5(tmp_path / "x.hdf5", d4rl_rows(((5, "timeout"),), *dims))
    env, *_ = make_env_and_datasets(name, Args(dataset_path=str(path)))
    assert env is None and f"that of D4RL's {datasets.d4rl_kind(name)}" in no_evaluation(capsys)


def test_b5_minaris_robots_get_no_d4rl_score(tmp_path):
    """Hopper-v5 is not D4RL's: the number on D4RL's scale has another name."""
    write_minari("mujoco/hopper/simple-v0", gym.make("Hopper-v5"), episodes=1)
    scores, stdout = learn("--env-name", "mujoco/hopper/simple-v0", cwd=tmp_path)
    expected = 100 * (scores["episodic_return"][0] + 20.272305) / (3234.3 + 20.272305)
    assert scores["normalized_score_d4rl_scale"] == [pytest.approx(expected, rel=1e-6)]
    assert "normalized_score_d4rl" not in scores and "another version of its robot" in stdout


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"kwargs": {}', '"kwargs": {"terrain": "rocky"}'),
        ('"kwargs": {}', '"kwargs": {"length": "seven"}'),
        ("offline_data:Steps", "offline_data:Gone"),
    ],
    ids=["unknown option", "option of another type", "attribute that is gone"],
)
def test_b6_tasks_that_this_version_cannot_make(capsys, old, new):
    """Minari#296, #302: the environment's options or class have changed since."""
    write_minari("own/data-v0", gym.make("offline_data:Steps-v0"), episodes=2)
    metadata = Path(minari.load_dataset("own/data-v0").storage.data_path) / "metadata.json"
    assert old.replace('"', '\\"') in metadata.read_text() or old in metadata.read_text()
    text = metadata.read_text().replace(old.replace('"', '\\"'), new.replace('"', '\\"')).replace(old, new)
    metadata.write_text(text)
    env, _, train, _ = make_env_and_datasets("own/data-v0")
    if "seven" in new:  # made, and never truncated: a string is no step
        assert env is not None
    else:
        assert env is None and no_evaluation(capsys)
    assert train.size == 14


def test_a_task_without_a_time_limit_is_cut(monkeypatch, capsys):
    """R3: an evaluation would not end."""
    write_minari("own/data-v0", gym.make("offline_data:Steps-v0"), episodes=1)
    metadata = Path(minari.load_dataset("own/data-v0").storage.data_path) / "metadata.json"
    metadata.write_text(metadata.read_text().replace('\\"kwargs\\": {}', '\\"kwargs\\": {\\"length\\": 1000}'))
    monkeypatch.setattr(envs, "LONGEST_EPISODE", 30)
    envs.say_once.cache_clear()
    env, *_ = make_env_and_datasets("own/data-v0")
    env.reset(seed=0)
    assert [env.step(np.zeros(1, np.float32))[3] for _ in range(30)] == [False] * 29 + [True]
    said = "the task of own/data-v0 has no registered time limit; its episodes are cut after 30 steps\n"
    assert capsys.readouterr().err == said


def test_b6_data_of_a_newer_minari(capsys):
    """Minari#200: one line that names both versions."""
    write_minari("own/data-v0", gym.make("offline_data:Steps-v0"), episodes=1)
    metadata = Path(minari.load_dataset("own/data-v0").storage.data_path) / "metadata.json"
    metadata.write_text(metadata.read_text().replace(minari.__version__, "9.1.0"))
    with pytest.raises(SystemExit, match=f"own/data-v0.*{re.escape(minari.__version__)}.*9.1.0"):
        make_env_and_datasets("own/data-v0")


class Fixed(offline_data.Steps):
    """The second of its three actions has no room: 0.5 to 0.5."""

    action_space = spaces.Box(np.array([-1, 0.5, 0], np.float32), np.array([1, 0.5, 10], np.float32))

    def step(self, action):
        self.last = np.array(action)
        return super().step(action)


gym.register("Fixed-v0", f"{__name__}:Fixed", disable_env_checker=True)


def test_b7_an_action_without_room_stays_constant(tmp_path):
    """lerobot#211: it is 0 in training, and its one value live; nothing is NaN."""
    write_minari("own/data-v0", gym.make(f"{__name__}:Fixed-v0"), episodes=3)
    env, _, train, _ = make_env_and_datasets("own/data-v0")
    assert np.isfinite(train["actions"]).all() and not train["actions"][:, 1].any()
    assert np.abs(train["actions"][:, [0, 2]]).max() > 0.5
    env.reset(seed=0)
    env.step(np.array([0.5, 0.9, -1], np.float32))
    np.testing.assert_allclose(env.unwrapped.last, [0.5, 0.5, 0], atol=1e-6)


def image_dataset(space: spaces.Box, frames: np.ndarray, name: str = "own/images-v0") -> np.ndarray:
    """What is learned from a dataset with such images beside a state, in memory; from disk it is the same."""
    steps = len(frames) - 1
    observations = {"camera": frames, "state": np.zeros((steps + 1, 2), np.float32)}
    box = spaces.Dict(camera=space, state=spaces.Box(-1, 1, (2,)))
    ends = np.arange(1, steps + 1) == steps
    parts = (observations, np.zeros((steps, 1), np.float32), np.zeros(steps), ~ends & ends, ends)
    datasets.store(name, [parts], observation_space=box, action_space=spaces.Box(-1, 1, (1,)))
    memory = train_rows(name, data_loading="memory")["observations"]
    disk = train_rows(name, data_loading="workers")["observations"]
    assert memory.keys() == disk.keys() == {"camera", "state"} and memory["state"].shape == (steps, 2)
    np.testing.assert_array_equal(disk["camera"][np.arange(steps)], memory["camera"])
    assert memory["camera"].dtype == np.uint8
    return memory["camera"]


def random_images(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def test_b8_channels_first_become_channels_last():
    """lerobot#846: (3, H, W) is no image of height 3."""
    frames = random_images((6, 3, 20, 24))
    images = image_dataset(spaces.Box(0, 255, (3, 20, 24), np.uint8), frames)
    np.testing.assert_array_equal(images, frames[:-1].transpose(0, 2, 3, 1))
    narrow = datasets.as_images("x", spaces.Box(0, 255, (3, 20, 12), np.uint8), frames[..., :12])  # 12 may be channels
    np.testing.assert_array_equal(narrow, frames[..., :12].transpose(0, 2, 3, 1))


@pytest.mark.parametrize("high", [1, 255])
def test_b8_float_images_become_bytes(high):
    frames = random_images((6, 20, 24, 3))
    images = image_dataset(spaces.Box(0, high, (20, 24, 3), np.float32), np.float32(frames) * (high / 255))
    np.testing.assert_array_equal(images, frames[:-1])


def test_b8_grey_images_without_an_axis_of_channels():
    frames = random_images((6, 20, 24))
    images = image_dataset(spaces.Box(0, 255, (20, 24), np.uint8), frames)
    np.testing.assert_array_equal(images, frames[:-1, ..., None])


@pytest.mark.parametrize(
    ("space", "frames", "words"),
    [
        (
            spaces.Box(0, 255, (9, 8, 3), np.uint8),
            np.full((2, 9, 8, 3), 0.8, np.float32),
            "hold float32 in 0.8 ... 0.8",
        ),
        (
            spaces.Box(0, 1, (9, 8, 3), np.float32),
            np.full((2, 9, 8, 3), 200, np.float32),
            "hold float32 in 200 ... 200",
        ),
        (spaces.Box(0, 1, (9, 8, 3), np.float32), np.full((2, 9, 8, 3), -0.5, np.float32), "hold float32 in -0.5"),
        (spaces.Box(0, 1, (9, 8, 3), np.float32), np.full((2, 9, 8, 3), np.nan, np.float32), "hold float32 in nan"),
    ],
)
def test_b8_images_that_are_not_what_their_space_says(space, frames, words):
    """They would be black, or turn over."""
    with pytest.raises(Fault, match=f"observations/cam {words}.*their space says {space.dtype}"):
        datasets.as_images("observations/cam", space, frames)


def test_b8_names_of_images():
    """An image called state is not the state; two images under one name would be one."""
    camera, box = spaces.Box(0, 255, (9, 8, 3), np.uint8), spaces.Box(-1, 1, (2,))
    frames = random_images((1, 9, 8, 3))
    arranged = bc_flow_offline.arrange(spaces.Dict(state=camera, q=box), {"state": frames, "q": np.ones((1, 2))})
    assert arranged.keys() == {"state", "state_image"} and arranged["state"].tolist() == [[1, 1]]
    np.testing.assert_array_equal(arranged["state_image"], frames)
    space = spaces.Dict({"front_rgb": camera, "front": spaces.Dict(rgb=camera)})
    dataset = types.SimpleNamespace(id="own/data-v0", observation_space=space)
    with pytest.raises(SystemExit, match="own/data-v0: observations/front/rgb, observations/front_rgb would share"):
        datasets.images_stay_on_disk(dataset, "memory")


class ChannelsFirst(offline_data.Camera):
    observation_space = spaces.Box(0, 255, (3, 40, 40), np.uint8)

    def observe(self):
        return super().observe()["front"].transpose(2, 0, 1)


gym.register("ChannelsFirst-v0", f"{__name__}:ChannelsFirst", disable_env_checker=True)


def test_b8_live_images_are_arranged_like_the_datas():
    """What the policy sees live is what it learned from, channels first included."""
    env = gym.make(f"{__name__}:ChannelsFirst-v0")
    write_minari("own/data-v0", env, episodes=1, jpeg_encoding=False)
    env, _, train, _ = make_env_and_datasets("own/data-v0")
    obs, _ = env.reset(seed=1000)
    assert obs["image"].shape == (40, 40, 3)
    np.testing.assert_array_equal(obs["image"], train["observations"]["image"][0])


@pytest.mark.parametrize(
    ("space", "word"),
    [
        (spaces.Box(-1, 1, (20, 24, 3), np.float32), "-1 ... 1"),
        (spaces.Box(-np.inf, np.inf, (1024, 3), np.float32), "(1024, 3)"),
        (spaces.Box(0, 255, (20, 24, 32), np.uint8), "(20, 24, 32)"),
        (spaces.Box(0, 255, (4, 20, 24, 3), np.uint8), "(4, 20, 24, 3)"),
        (spaces.Tuple([spaces.Box(-1, 1, (2,))]), "Tuple"),
        (spaces.Text(5), "Text"),
    ],
    ids=["signed", "point cloud", "feature map", "stack", "tuple", "text"],
)
def test_b8_what_is_neither_state_nor_image_is_refused_by_name(space, word):
    space = spaces.Dict(thing=space, state=spaces.Box(-1, 1, (2,)))
    with pytest.raises(SystemExit, match="observations/thing") as error:
        bc_flow_offline.arrange(
            space, {"thing": np.zeros((1, *(space["thing"].shape or ()))), "state": np.zeros((1, 2))}
        )
    assert word in str(error.value)


def test_b8_row_vectors_and_small_matrices_are_states_and_choices_one_hot():
    space = spaces.Dict(
        row=spaces.Box(-1, 1, (1, 12)), pose=spaces.Box(-1, 1, (4, 4)), mode=spaces.Discrete(3, start=1)
    )
    x = {"row": np.arange(24.0).reshape(2, 1, 12), "pose": np.ones((2, 4, 4)), "mode": np.array([1, 3])}
    arranged = bc_flow_offline.arrange(space, x)
    assert arranged.shape == (2, 31)
    assert arranged[:, :3].tolist() == [[1, 0, 0], [0, 0, 1]] and arranged[1, 19:].tolist() == list(range(12, 24))


TEXT = np.array([b"0.1"] * 20)


@pytest.mark.parametrize(
    ("column", "values", "words"),
    [
        ("actions", np.array([[b"0.1"] * 6] * 20), "actions b'0.1'"),
        ("rewards", TEXT, "rewards b'0.1'"),
        ("observations", np.array([[b"x"] * 17] * 20), "observations b'x'"),
        ("terminals", np.array([b"False"] * 20), "terminals b'False'"),
        ("terminals", np.array([0.0, 0.5] * 10), "terminals 0.5 true or false"),
        ("timeouts", np.array([np.nan] * 20), "timeouts nan"),
        ("rewards", np.ones((20, 2)), "rewards (20, 2)"),
        ("rewards", np.ones((2, 10)), "rewards (2, 10)"),
        ("rewards", np.full(20, 1e300), "rewards 1e+300"),
        ("observations", np.full((20, 17), 3.4e38), "observations 3.4e+38 measurements (number 0 of each)"),
        ("next_observations", np.ones((20, 5)), "next_observations (20, 5)"),
    ],
    ids=lambda x: None if isinstance(x, np.ndarray) else x,
)
def test_b9_what_is_no_number_is_refused_and_nothing_stays(tmp_path, capsys, column, values, words):
    """Text is always true, broadcasts or crashes later; 1e300 becomes infinite in float32."""
    path = write_hdf5(tmp_path / "x.hdf5", d4rl_rows() | {column: values})
    message = refused(capsys, "halfcheetah-medium-v2", dataset_path=str(path))
    assert all(word in message for word in words.split()), message
    assert not list((tmp_path / "minari").glob("*/*")) and not list((tmp_path / "minari").glob(".*"))


def test_b9_columns_of_one_number_a_row(tmp_path):
    """(N, 1), as D4RL's own reader takes them: rlkit's replay buffers hold rewards so."""
    rows = d4rl_rows()
    wide = {key: rows[key][:, None] for key in ("rewards", "terminals", "timeouts")}
    train = train_rows("halfcheetah-medium-v2", dataset_path=str(write_hdf5(tmp_path / "x.hdf5", rows | wide)))
    assert train["rewards"].tolist() == rows["rewards"].tolist()
    assert np.flatnonzero(train["masks"] == 0).tolist() == [8, 17]


@pytest.mark.parametrize(("steps", "words"), [(0, r"0 actions need 1 observations"), (7, r"7 actions need 8 .* \[7\]")])
def test_b9_episodes_without_a_step_or_without_their_last_observation(steps, words):
    write_minari("own/data-v0", gym.make("offline_data:Steps-v0"), episodes=2)
    with h5py.File(Path(minari.load_dataset("own/data-v0").storage.data_path) / "main_data.hdf5", "a") as file:
        for key, part in file["episode_1"].items():
            if isinstance(part, h5py.Dataset):
                part.resize(max(steps, key == "observations"), 0)
    with pytest.raises(SystemExit, match=f"own/data-v0, episode 1 of the data: {words}"):
        make_env_and_datasets("own/data-v0")


def test_b9_a_recording_without_an_episode():
    """As one that was begun and left."""
    write_minari("own/data-v0", gym.make("offline_data:Steps-v0"), episodes=1)
    metadata = Path(minari.load_dataset("own/data-v0").storage.data_path) / "metadata.json"
    metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"total_episodes": 0}))
    with pytest.raises(SystemExit, match="own/data-v0: holds no episodes"):
        train_rows("own/data-v0")


def test_b9_a_file_without_an_episode(tmp_path, capsys):
    """One row, after which nothing is known."""
    rows = {key: values[:1] for key, values in d4rl_rows(next_observations=False).items()} | {"terminals": np.zeros(1)}
    message = refused(capsys, "halfcheetah-medium-v2", dataset_path=str(write_hdf5(tmp_path / "x.hdf5", rows)))
    assert "no episode" in message and "\n" not in message.strip()


def test_b9_text_in_a_minari_dataset():
    write_minari("own/data-v0", gym.make("offline_data:Steps-v0"), episodes=2)
    path = Path(minari.load_dataset("own/data-v0").storage.data_path) / "main_data.hdf5"
    with h5py.File(path, "a") as file:
        del file["episode_1/rewards"]
        file["episode_1/rewards"] = np.array([b"1.0"] * 7)
    with pytest.raises(SystemExit, match="own/data-v0.*rewards hold b'1.0'"):
        make_env_and_datasets("own/data-v0")


@pytest.mark.parametrize(("action", "words"), [(np.nan, "not finite"), (b"up", "not numbers")])
@pytest.mark.parametrize("bounds", ["task", "data"])
def test_b9_actions_that_are_no_numbers_with_any_bounds(bounds, action, words):
    write_minari("own/data-v0", gym.make("offline_data:Steps-v0"), episodes=2)
    with h5py.File(Path(minari.load_dataset("own/data-v0").storage.data_path) / "main_data.hdf5", "a") as file:
        del file["episode_1/actions"]
        file["episode_1/actions"] = np.array([[action]] * 7)
    with pytest.raises(SystemExit, match=f"own/data-v0, episode 1 of the data: actions hold .*{words}"):
        make_env_and_datasets("own/data-v0", Args(action_bounds=bounds))


class Stamped(offline_data.Steps):
    """Observes nanoseconds since 1970, as whole numbers."""

    observation_space = spaces.Dict(place=spaces.Box(-9, 9, (2,)), stamp=spaces.Box(0, 2**62, (1,), np.int64))

    def observe(self):
        return {"place": super().observe(), "stamp": np.array([1_700_000_000_000_000_000 + self.t])}


def test_b9_whole_numbers_that_are_no_measurements():
    write_minari("own/data-v0", Stamped(), episodes=1)
    with pytest.raises(SystemExit, match="observations hold numbers that are too large to be measurements: 1.7e"):
        make_env_and_datasets("own/data-v0")


@pytest.mark.parametrize("high", [3.4e38, np.finfo(np.float32).max, np.inf])
def test_b10_bounds_that_are_none(high):
    """Scaled by them, every action would be 0."""
    box = spaces.Box(-np.float32(high), np.float32(high), (1,), np.float32)
    write_minari("own/data-v0", gym.make("offline_data:Steps-v0"), episodes=1, action_space=box)
    with pytest.raises(SystemExit, match=r"own/data-v0.*bounded Box.*--action-bounds data"):
        make_env_and_datasets("own/data-v0")
    rows = train_rows("own/data-v0", action_bounds="data")
    assert rows["actions"].min() == pytest.approx(-1, abs=1e-4) and rows["actions"].max() == pytest.approx(1, abs=1e-4)


def test_b11_absolute_actions_are_scaled_by_the_datas_bounds(tmp_path, stand_ins):
    """diffusion_policy#35, robomimic#38: positions in metres, angles in radians. Clipped, every action is a bound."""
    path = write_robomimic(tmp_path / "x.hdf5")
    with h5py.File(path, "a") as file:
        for demo in file["data"].values():
            demo["actions"][:, :3] = demo["actions"][:, :3] * 0.1 + [0.4, 0.0, 1.2]
            demo["actions"][:, 3:6] = [3.1, -3.1, 0.5]
    with pytest.raises(SystemExit) as error:
        train_rows("lift-mh-low_dim", dataset_path=str(path))
    message = str(error.value)
    assert "-1 to 1" in message and "--action-bounds data" in message and "\n" not in message and "3.1" in message
    train = train_rows("lift-mh-low_dim", dataset_path=str(path), action_bounds="data")
    assert np.abs(train["actions"]).max() <= 1 and len(np.unique(train["actions"][:, 2])) > 2
    low, high = train.box.low, train.box.high
    restored = low + (train["actions"] + 1) / 2 * (high - low)
    stored = np.concatenate([episode.actions for episode in train.source.iterate_episodes()])
    np.testing.assert_allclose(restored, stored, atol=2e-4)


def test_b11_bounds_of_many_dimensions_are_one_short_line():
    box = spaces.Box(np.linspace(-1, 0, 28, dtype=np.float32), np.linspace(0.5, 1, 28, dtype=np.float32))
    assert len(datasets.bounds_of(box)) < 200 and "\n" not in datasets.bounds_of(box)
    assert datasets.bounds_of(spaces.Box(-1, 1, (28,))) == "-1 to 1"
    assert datasets.bounds_of(spaces.Box(np.full(2, -1, np.float32), np.float32([1, 2]))) == "-1:1 -1:2"


def test_b12_a_file_of_ones_own_in_d4rls_layout(tmp_path):
    """Read under its own name, cut where it says, evaluated in the task that the name may be."""
    rows = d4rl_rows(((4, "timeout"), (3, "terminal")), 2, 1)
    path = write_hdf5(tmp_path / "x.hdf5", rows)
    train = train_rows("my-robot-v3", dataset_path=str(path))
    assert train.size == 7 and np.flatnonzero(train["terminals"]).tolist() == [3, 6]
    assert train.source.id.startswith("file/my-robot-") and train.source.id.endswith("-v3")
    assert datasets.reference_scores(train.source)[1] == ""
    rows = d4rl_rows(((4, "timeout"), (3, "terminal")), 11, 3)
    env, *_ = make_env_and_datasets("Hopper-v5", Args(dataset_path=str(write_hdf5(tmp_path / "y.hdf5", rows))))
    assert env.spec.id == "Hopper-v5"


def test_b12_v0_names_and_names_that_are_near(tmp_path, capsys):
    """D4RL's v0 has the same robots; its files are read, and without a file the way on is named."""
    path = write_hdf5(tmp_path / "x.hdf5", d4rl_rows(((4, "timeout"), (3, "timeout")), 11, 3))
    env, _, train, _ = make_env_and_datasets("hopper-medium-v0", Args(dataset_path=str(path)))
    assert train.size == 7 and env.spec.id == "Hopper-v4"
    with pytest.raises(SystemExit, match=r"hopper-medium-v0.*did you mean.*hopper-medium-v2.*--dataset-path FILE"):
        train_rows("hopper-medium-v0")


def test_b12_ends_that_nothing_tells(tmp_path, capsys):
    """One's own file without timeouts and next_observations: its episodes would be one, chunks would cross ends."""
    rows = d4rl_rows(((4, "timeout"), (3, "timeout")), 2, 1, next_observations=False)
    for keys in (("timeouts",), ()):
        kept = {key: value for key, value in rows.items() if key not in keys} | {"terminals": np.zeros(7, bool)}
        if "timeouts" in kept:
            kept["timeouts"] = np.zeros(7, bool)
        message = refused(capsys, "my-robot-v0", dataset_path=str(write_hdf5(tmp_path / "x.hdf5", kept)))
        assert "timeouts" in message and "end" in message
    rows["terminals"][[3, 6]] = True  # every episode terminates
    del rows["timeouts"]
    train = train_rows("my-robot-v0", dataset_path=str(write_hdf5(tmp_path / "y.hdf5", rows)))
    assert np.flatnonzero(train["terminals"]).tolist() == [3, 6]


def test_b12_another_robots_file_under_a_d4rl_name(tmp_path, capsys):
    path = write_hdf5(tmp_path / "x.hdf5", d4rl_rows(((4, "timeout"),), 17, 6))
    message = refused(capsys, "hopper-medium-v2", dataset_path=str(path))
    assert all(word in message for word in ("11", "3", "17", "6", "its own name"))


def test_b12_another_task_of_robomimic(tmp_path, capsys, stand_ins):
    """A can file under lift's name: goals, horizon and score would be another task's."""
    path = write_robomimic(tmp_path / "x.hdf5", env_args=offline_data.ENV_ARGS | {"env_name": "PickPlaceCan"})
    message = refused(capsys, "lift-mh-low_dim", dataset_path=str(path))
    assert "PickPlaceCan" in message and "Lift" in message
    assert train_rows("my-can-v0", dataset_path=str(path)).source.id.startswith("file/my-can-")


@pytest.mark.parametrize("raw", [True, False])
def test_b13_demonstrations_without_observations(tmp_path, capsys, raw):
    """robomimic#138, #260: robosuite's own demo.hdf5, or what convert_robosuite made of it."""

    def strip(file):
        for demo in file["data"].values():
            del demo["obs"], demo["next_obs"]
        if raw:
            del file["data"].attrs["env_args"]

    path = edit(write_robomimic(tmp_path / "demo.hdf5"), strip)
    message = refused(capsys, "lift-mh-low_dim", dataset_path=str(path))
    assert f"dataset_states_to_obs --dataset {path}" in message and "delete" not in message
    assert ("conversion.convert_robosuite" in message) == raw


def test_b13_a_robomimic_file_of_images(tmp_path, capsys):
    def strip(file):
        for demo in file["data"].values():
            del demo["obs/object"]
            demo["obs/agentview_image"] = random_images((len(demo["actions"]), 8, 8, 3))

    message = refused(capsys, "lift-mh-low_dim", dataset_path=str(edit(write_robomimic(tmp_path / "x.hdf5"), strip)))
    assert "object" in message and "agentview_image" in message and "low_dim" in message


def test_b14_leftovers_of_a_killed_conversion_are_cleared_at_once(tmp_path):
    """Of a process that is dead, not of one that still writes."""
    root = tmp_path / "minari"
    with datasets.hidden_root(root) as living:
        os.environ["MINARI_DATASETS_PATH"] = str(root)
        process = multiprocessing.get_context("fork").Process(target=hold, args=(root,))
        process.start()
        wait_until(lambda: len(list(root.glob(".storing-*/.lock"))) == 2)
        process.kill()
        process.join()
        train_rows("halfcheetah-medium-v2", dataset_path=str(write_hdf5(tmp_path / "x.hdf5", d4rl_rows())))
        assert list(root.glob(".*")) == [living]
    assert not list(root.glob(".*"))


def test_b14_a_conversion_that_just_begins_is_left_alone(tmp_path):
    """Its folder is there, its lock not yet; of one that was killed right there, it goes later."""
    root = tmp_path / "minari"
    for name, age in ((".storing-1", 0), (".storing-2", 10)):
        (root / name).mkdir(parents=True)
        os.utime(root / name, (time.time() - age,) * 2)
    datasets.clear_leftovers(root)
    assert [path.name for path in root.iterdir()] == [".storing-1"]


def test_a_namespace_is_as_minari_wants_it():
    """`minari upload` reads its file; what somebody says about it there stays."""
    minari.namespace.create_namespace("mine", description="of the lab")
    for name in ("mine", "new/nested"):
        datasets.store(f"{name}/data-v0", [STILL], **STILL_SPACES)
    assert minari.namespace.get_namespace_metadata("mine") == {"description": "of the lab"}
    assert set(minari.namespace.list_local_namespaces()) == {"mine", "new", "new/nested"}


def hold(root: Path) -> None:
    with datasets.hidden_root(root):
        time.sleep(60)


def test_b14_ctrl_c_during_a_conversion_leaves_nothing(tmp_path):
    """It ends within seconds, and says that nothing was begun."""
    path = write_hdf5(tmp_path / "x.hdf5", d4rl_rows(((2, "timeout"),) * 20_000))
    flags = [*TINY.split(), "--env-name", "halfcheetah-medium-v2", "--dataset-path", path]
    with popen_script(SCRIPT, *flags, cwd=tmp_path) as process:
        wait_until(lambda: list((tmp_path / "minari").glob(".storing*/**/main_data.hdf5")))
        for _ in range(
            3
        ):  # Python drops an interrupt that falls into one of h5py's destructors: a person presses again
            os.kill(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(15)
                break
        assert process.poll() not in (0, None)
    ignored = r"Exception ignored in:.*?KeyboardInterrupt: ?\n"  # Python's word on such a destructor
    errors = re.sub(ignored, "", process.stderr_path.read_text(), flags=re.S)
    assert "run the same command again" in errors and "Traceback (most recent call last)" not in errors
    assert not list((tmp_path / "minari").glob(".*")) and not (tmp_path / "run").exists()


def test_b15_the_actions_are_named_where_they_do_not_fit(capsys):
    """Observations are right; the line says actions."""
    box = spaces.Box(-1, 1, (3,), np.float32)
    policy = np.zeros(3, np.float32)

    class Wide(offline_data.Steps):
        action_space = box

        def step(self, action):
            return super().step(action[:1])

    write_minari("own/data-v0", Wide(), episodes=2, policy=lambda env, obs: policy)
    metadata = Path(minari.load_dataset("own/data-v0").storage.data_path) / "metadata.json"
    metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"env_spec": gym.spec("Steps-v0").to_json()}))
    env, *_ = make_env_and_datasets("own/data-v0")
    line = no_evaluation(capsys)
    assert env is None and "actions" in line and "observations" not in line and "(3,)" in line and "(1,)" in line


def test_b15_the_observations_are_named_where_they_do_not_fit(capsys):
    three = np.arange(21, dtype=np.float32).reshape(7, 3)
    steps_dataset(space=spaces.Box(-99, 99, (3,)), observations=lambda i: three, env=gym.spec("Steps-v0"))
    assert make_env_and_datasets("own/data-v0")[0] is None
    assert "has observations Box(-99.0, 99.0, (3,), float32), the task here Box(" in no_evaluation(capsys)


def test_b15_observations_that_would_broadcast():
    steps_dataset(space=spaces.Box(-99, 99, (2,)), observations=lambda i: np.arange(7, dtype=np.float32)[:, None])
    with pytest.raises(SystemExit, match=r"data: observations have shape \(1,\), the dataset says \(2,\)"):
        train_rows("own/data-v0")


def test_a_dataset_is_evaluated_in_its_task_for_evaluation():
    write_minari("own/data-v0", gym.make("Steps-v0"), episodes=1, eval_env=gym.make("Steps-v0", length=3))
    assert make_env_and_datasets("own/data-v0")[0].unwrapped.length == 3


def test_what_our_own_checks_of_a_task_say_stays_as_it_is():
    def fault(*_, **__):
        raise Fault("observation is nan at step 3")

    with pytest.raises(Fault, match="^observation is nan at step 3$"):
        datasets.Foreign(gym.make("Steps-v0")).guarded(fault)


def test_b15_actions_that_would_broadcast():
    """(T, 1) in a dataset that says (3,): scaled by its bounds they would silently become three."""
    box = spaces.Box(-1, 1, (3,), np.float32)
    policy = np.zeros(1, np.float32)
    write_minari("own/data-v0", gym.make("offline_data:Steps-v0"), 1, lambda env, obs: policy, action_space=box)
    with pytest.raises(SystemExit, match=r"own/data-v0, episode 0 of the data: actions have shape \(1,\).*\(3,\)"):
        make_env_and_datasets("own/data-v0")


def test_b16_what_is_missing_is_named(monkeypatch, capsys, tmp_path):
    """ogbench is here, dm_control is not."""
    (tmp_path / "ogbench.py").write_text("import no_such_dm_control")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "ogbench", raising=False)
    message = refused(capsys, "reach-play-singletask-v0")
    assert "pip install no-such-dm-control" in message and "pip install ogbench" not in message


# --- What could be misread in silence ---------------------------------------------------------------------------------
def steps_dataset(name: str = "own/data-v0", space: spaces.Space | None = None, observations=None, **about) -> str:
    """Three episodes of six steps, actions of two numbers."""
    count = 6
    default = np.arange(2.0 * (count + 1), dtype=np.float32).reshape(-1, 2)
    ends = np.arange(1, count + 1) == count
    columns = {"actions": np.linspace(-1, 1, 2 * count, dtype=np.float32).reshape(count, 2)}
    columns |= {"rewards": np.ones(count), "terminations": ends & ~ends, "truncations": ends}
    buffers = []
    for i in range(3):
        obs = default + i if observations is None else observations(i)
        buffers.append(minari.data_collector.EpisodeBuffer(i, None, None, obs, *columns.values(), {}))
    box = {"observation_space": space or spaces.Box(-99, 99, (2,)), "action_space": spaces.Box(-1, 1, (2,))}
    minari.create_dataset_from_buffers(name, buffers, **{"jpeg_encoding": False} | box | about)
    return name


@pytest.mark.parametrize(("ours", "theirs"), [(np.float64, np.float32), (np.float32, np.float16)])
def test_b12_next_observations_that_were_rounded_are_no_jumps(tmp_path, ours, theirs):
    """Every row would be an episode of its own, of which no chunk has a second action."""
    rows = d4rl_rows(((6, "timeout"), (3, "timeout"), (5, "cut")), 4, 2)
    del rows["timeouts"]
    for key in ("observations", "next_observations"):
        rows[key][:, 1] *= 1e-7  # too small for float16's precision
    rows["observations"] = rows["observations"].astype(ours) * 1.37
    rows["next_observations"] = (rows["next_observations"].astype(ours) * 1.37).astype(theirs)
    train = train_rows("my-robot-v0", dataset_path=str(write_hdf5(tmp_path / "x.hdf5", rows)))
    assert np.flatnonzero(train["terminals"]).tolist() == [5, 8, 13]


def test_b12_next_observations_that_are_the_rows_shifted_tell_nothing(tmp_path, capsys):
    """obs[1:] over every end: episodes would be joined, but for those that terminate."""
    rows = d4rl_rows(((6, "timeout"), (3, "terminal"), (5, "timeout")), 4, 2)
    rows["next_observations"] = np.concatenate([rows["observations"][1:], rows["observations"][-1:]])
    del rows["timeouts"]
    message = refused(capsys, "my-robot-v0", dataset_path=str(write_hdf5(tmp_path / "x.hdf5", rows)))
    assert "add timeouts, 1 at each end" in message


def test_b12_a_name_like_antmaze_is_no_antmaze(tmp_path):
    """Only in D4RL's own does the goal not end an episode."""
    path = write_hdf5(tmp_path / "x.hdf5", d4rl_rows(((4, "timeout"), (3, "terminal")), 2, 1))
    train = train_rows("antmaze-of-mine-v0", dataset_path=str(path))
    assert np.flatnonzero(train["terminals"]).tolist() == [3, 6]
    rows = d4rl_rows(((4, "timeout"), (3, "terminal"), (5, "timeout")), 2, 1, next_observations=False)
    train = train_rows("antmaze-of-mine-v0", dataset_path=str(write_hdf5(tmp_path / "y.hdf5", rows)))
    assert np.flatnonzero(train["terminals"]).tolist() == [2, 5, 9]


@pytest.mark.parametrize("theirs", ["walker2d_medium-v2", "halfcheetah_medium_replay-v2", "halfcheetah_medium-v1"])
def test_b12_another_file_of_d4rls_under_a_d4rl_name(tmp_path, capsys, theirs):
    """Walker2d and HalfCheetah have equal numbers; another level or version would be printed as this one's score."""
    path = write_hdf5(tmp_path / f"{theirs}.hdf5", d4rl_rows())
    message = refused(capsys, "halfcheetah-medium-v2", dataset_path=str(path))
    assert f"is D4RL's {theirs.replace('_', '-')}; give that as --env-name" in message


@pytest.mark.parametrize("kind", ["uint16", "bool", "int64", "longdouble", ">f4", "float16"])
def test_b9_observations_of_any_kind_of_number(tmp_path, kind):
    rows = d4rl_rows(((4, "timeout"), (3, "timeout")), 2, 1)
    for key in ("observations", "next_observations"):
        rows[key] = rows[key].astype(kind)
    train = train_rows("my-robot-v0", dataset_path=str(write_hdf5(tmp_path / "x.hdf5", rows)))
    np.testing.assert_array_equal(train["observations"], rows["observations"].astype(np.float32))


def test_b9_observations_of_float16_that_are_infinite():
    """What float16 cannot hold; there, the largest number that is a measurement is infinite, too."""
    space = spaces.Dict(q=spaces.Box(-np.inf, np.inf, (1,), np.float16))
    steps_dataset(space=space, observations=lambda i: {"q": np.array([[np.inf]] * 7, np.float16)})
    with pytest.raises(SystemExit, match="observations hold numbers that are not finite: inf at step 0"):
        train_rows("own/data-v0")


def test_b9_choices_are_no_quantities(tmp_path, capsys):
    """Left or right, 0 or 1, fits into [-1, 1]: cloned as a number it would be half of each."""
    rows = d4rl_rows(((4, "timeout"), (3, "timeout")), 2, 1) | {"actions": np.arange(7) % 2}
    message = refused(capsys, "my-robot-v0", dataset_path=str(write_hdf5(tmp_path / "x.hdf5", rows)))
    assert "actions are int64" in message and "floats" in message


@pytest.mark.parametrize("choice", [0, 4])
def test_b9_a_choice_that_there_is_not(choice):
    """0 of 1, 2, 3 would be the last of them; 4 an IndexError."""
    space = spaces.Dict(mode=spaces.Discrete(3, start=1), q=spaces.Box(-1, 1, (1,)))
    steps_dataset(space=space, observations=lambda i: {"mode": np.full(7, choice), "q": np.zeros((7, 1), np.float32)})
    with pytest.raises(SystemExit, match="observations/mode hold choices that are not in Discrete"):
        train_rows("own/data-v0")


def test_b9_words_beside_the_observations_are_named_not_their_episodes():
    space = spaces.Dict(task=spaces.Text(9), q=spaces.Box(-1, 1, (1,)))
    steps_dataset(space=space, observations=lambda i: {"task": ["pick"] * 7, "q": np.zeros((7, 1), np.float32)})
    with pytest.raises(SystemExit, match="observations/task are Text.*leave them out of the data$"):
        train_rows("own/data-v0")


def test_b9_a_tuple_beside_images_on_disk_is_not_called_damaged():
    """As in memory: nothing is wrong with the file."""
    both = spaces.Tuple((spaces.Box(-1, 1, (2,)), spaces.Box(-1, 1, (1,))))
    space = spaces.Dict(front=spaces.Box(0, 255, (40, 36, 3), np.uint8), q=both)
    frames, q = random_images((7, 40, 36, 3)), (np.zeros((7, 2), np.float32), np.zeros((7, 1), np.float32))
    steps_dataset(space=space, observations=lambda i: {"front": frames, "q": q})
    with pytest.raises(SystemExit, match="observations/q are Tuple.*leave them out of the data$"):
        train_rows("own/data-v0", data_loading="workers")


@pytest.mark.parametrize("shape", [(40, 36, 3), (64, 64, 4), (84, 84, 9), (64, 64, 1), (64, 64)])
def test_b8_pictures_of_a_file_are_kept_as_they_are(tmp_path, shape):
    """Minari would store (H, W, 3) as JPEG, in silence, and fail at four or nine channels."""
    frames = random_images((7, *shape))
    rows = d4rl_rows(((4, "timeout"), (3, "timeout")), 2, 1)
    rows |= {"observations": frames, "next_observations": np.concatenate([frames[1:], frames[:1]])}
    train = train_rows("my-robot-v0", dataset_path=str(write_hdf5(tmp_path / "x.hdf5", rows)))
    np.testing.assert_array_equal(train["observations"]["image"].reshape(frames.shape), frames)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x.transpose(0, 2, 1, 3), r"7 images of \(36, 40, 3\) and uint8, not 7 of \(40, 36, 3\)"),
        (lambda x: x[:, ::2], r"7 images of \(20, 36, 3\)"),
        (lambda x: x[:-1], "6 images"),
        (lambda x: x / 255, r"7 images of \(40, 36, 3\) and float64"),
    ],
    ids=["turned", "small", "one less", "float"],
)
def test_b8_images_on_disk_that_are_not_like_the_others(change, words):
    """Rows of another width would be a jumble, one image less a shift, floats of 0 to 1 black."""
    space = spaces.Dict(front=spaces.Box(0, 255, (40, 36, 3), np.uint8), q=spaces.Box(-99, 99, (2,)))
    frames, q = random_images((7, 40, 36, 3)), np.zeros((7, 2), np.float32)
    steps_dataset(space=space, observations=lambda i: {"front": change(frames) if i == 1 else frames, "q": q})
    with pytest.raises(SystemExit, match=f"episode 1: observations/front are {words}"):
        train_rows("own/data-v0", data_loading="workers")


def test_s1_observations_that_never_change_and_black_pictures_are_said(capsys):
    """Kept without a copy, an episode holds one observation; floats of 0 to 1 as bytes are black."""
    envs.say_once.cache_clear()
    space = spaces.Dict(front=spaces.Box(0, 255, (9, 8, 3), np.uint8), q=spaces.Box(-1, 1, (1,)))
    still = {"front": random_images((1, 9, 8, 3)).repeat(7, 0), "q": np.ones((7, 1), np.float32)}
    train_rows(steps_dataset("own/still-v0", space, lambda i: still))
    said = capsys.readouterr().err
    assert "observations never change" in said and "black" not in said
    bits = spaces.Box(0, 1, (4,), np.uint8)
    train_rows(steps_dataset("own/bits-v0", bits, lambda i: np.eye(7, 4, dtype=np.uint8)))
    assert "black" not in capsys.readouterr().err
    black = {"front": random_images((7, 9, 8, 3)) // 128, "q": np.ones((7, 1), np.float32)}
    train_rows(steps_dataset("own/black-v0", space, lambda i: black))
    said = capsys.readouterr().err
    assert said.count("black; were floats of 0 to 1 stored as bytes?") == 1 and "never change" not in said
    floats = np.linspace(0, 1, 7 * 20 * 24 * 3, dtype=np.float32).reshape(7, 20, 24, 3)
    for name in ("own/floats-v0", "own/others-v0"):
        train_rows(steps_dataset(name, spaces.Box(0, 255, (20, 24, 3), np.float32), lambda i: floats))
    assert capsys.readouterr().err.count("observations: numbers up to 1 in a space up to 255 are black pictures") == 1


def test_r9_a_chunk_longer_than_every_episode():
    """Nothing would teach its last actions, which are executed all the same."""
    ds = train_rows(steps_dataset())
    make_batches(ds, Args(action_chunking=True, horizon_length=6), CPU)
    with pytest.raises(SystemExit, match="--horizon-length 7: the longest episode of the data has 6 steps"):
        make_batches(ds, Args(action_chunking=True, horizon_length=7), CPU)


@pytest.mark.parametrize(("low", "high", "said"), [(-1, 9, "-1 to 9"), (-9, 1, "-9 to 1"), (-0.5, 0.5, None)])
def test_b11_actions_beyond_the_tasks_bounds_are_said_and_cut(tmp_path, capsys, low, high, said):
    envs.say_once.cache_clear()
    rows = d4rl_rows(((4, "timeout"), (3, "timeout")), 2, 1)
    rows["actions"] = np.linspace(low, high, 7, dtype=np.float32)[:, None]
    path = str(write_hdf5(tmp_path / "x.hdf5", rows))
    env = make_env_and_datasets("Steps-v0", Args(dataset_path=path, action_bounds="data"))[0]
    error = capsys.readouterr().err
    assert f"in {said}, the task takes -1 to 1, where they are cut" in error if said else "where they" not in error
    env.reset(seed=0)
    for action in (-1, 1):
        env.step(np.array([action], np.float32))
    assert env.unwrapped.taken == [max(low, -1), min(high, 1)]


@pytest.mark.parametrize("settings", [{"type": "OSC_POSE", "control_delta": False}, {"input_type": "absolute"}])
def test_b11_absolute_actions_reach_robosuite_whole(tmp_path, stand_ins, monkeypatch, settings):
    """1.2 metres are not cut to 1, as its bounds for changes would have it."""
    env_args = {**offline_data.ENV_ARGS, "env_kwargs": {"controller_configs": settings}}
    path = write_robomimic(tmp_path / "x.hdf5", env_args=env_args)
    with h5py.File(path, "a") as file:
        for demo in file["data"].values():
            demo["actions"][:, 2] = 1.2 + demo["actions"][:, 2] / 10
    env, _, train, _ = make_env_and_datasets("lift-mh-low_dim", Args(dataset_path=str(path), action_bounds="data"))
    executed = []
    obs, _ = env.reset(seed=0)
    result = ({"robot0_eef_pos": obs[:3], "robot0_eef_quat": obs[3:7], "robot0_gripper_qpos": obs[7:9]}, 0.0, False, {})
    result[0]["object-state"] = obs[9:]
    monkeypatch.setattr(env.unwrapped.sim, "step", lambda action: executed.append(action) or result)
    env.step(np.ones(7, np.float32))
    assert executed[0][2] == pytest.approx(train.box.high[2]) and executed[0][2] > 1.2


def test_b13_a_robomimic_file_of_a_robot_of_ones_own(tmp_path, capsys):
    """Without env_args it has no task here, and is learned from under a name of its own."""
    path = edit(write_robomimic(tmp_path / "x.hdf5"), lambda file: file["data"].attrs.__delitem__("env_args"))
    env, _, train, _ = make_env_and_datasets("my-robot-v0", Args(dataset_path=str(path)))
    assert env is None and train.size == 60 and "the data names no task" in no_evaluation(capsys)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda file: file["data"].create_group("info"), "data has info, not only demo_0"),
        (lambda file: file["data/demo_3"].__delitem__("rewards"), "demo_3 has no rewards"),
        (lambda file: [demo.move("obs/robot0_eef_pos", "x") for demo in file["data"].values()], "no robot0_eef_pos"),
        (lambda file: file["mask"].move("valid", "old") or file.__setitem__("mask/valid", [b"demo_99"]), "demo_99"),
    ],
    ids=["another group", "no rewards", "no arm", "a mask of others"],
)
def test_b13_the_line_names_what_does_not_fit(tmp_path, capsys, change, words):
    path = edit(write_robomimic(tmp_path / "x.hdf5"), change)
    message = refused(capsys, "lift-mh-low_dim", dataset_path=str(path))
    assert words in message and "damaged" not in message


@pytest.mark.parametrize("how", ["a folder", "npz", "pickle", "being written", "unreadable"])
def test_b12_what_is_no_readable_hdf5_is_not_called_damaged(tmp_path, capsys, monkeypatch, how):
    path = tmp_path / "x.hdf5"
    words = {"a folder": "is a folder; give an HDF5 file", "being written": "is being written by another process"}
    words["unreadable"] = "cannot be read: Permission denied"
    if how == "a folder":
        path.mkdir()
    elif how == "npz":
        np.savez(path.open("wb"), **d4rl_rows())
    elif how == "pickle":
        path.write_bytes(b"\x80\x04\x95")
    else:
        write_hdf5(path, d4rl_rows())
    if how == "unreadable":  # a test may run as root, who reads all

        def denied(*_, **__):
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(h5py, "File", denied)
    if how == "being written":
        hold_it = f"import h5py; f = h5py.File({str(path)!r}, 'a'); print(1, flush=True); input()"
        with subprocess.Popen([sys.executable, "-c", hold_it], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
            writer.stdout.readline()
            message = refused(capsys, "my-robot-v0", dataset_path=str(path))
            writer.communicate(b"\n")
    else:
        message = refused(capsys, "my-robot-v0", dataset_path=str(path))
    assert words.get(how, "is no HDF5 file; give an HDF5 file of D4RL's layout") in message
    assert "damaged" not in message


def test_b14_a_dataset_folder_that_cannot_be_written(tmp_path, monkeypatch):
    """Not the file is at fault."""
    path = write_hdf5(tmp_path / "x.hdf5", d4rl_rows())
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(path / "minari"))
    with pytest.raises(SystemExit, match="x.hdf5/minari: Not a directory; give a folder that can be written: MINARI"):
        train_rows("halfcheetah-medium-v2", dataset_path=str(path))


def test_r9_a_run_remembers_its_data(tmp_path, monkeypatch):
    """--dataset-path may change, for a file may move; its rows may not."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    args = Args(env_name="my-robot-v0", dataset_path="x.hdf5")
    rows = d4rl_rows(((4, "timeout"), (3, "timeout")), 2, 1)
    write_hdf5(Path("x.hdf5"), rows)
    args.check()
    assert args.dataset_path == str(tmp_path / "x.hdf5")  # also where --resume is called in another folder
    for _ in range(2):
        datasets.remember(tmp_path / "run" / "data.json", bc_flow_offline.load_datasets(args)[0])
    kept = bc_flow_offline.load_datasets(args)[0]
    for size, box, word in ((8, kept.box, "steps is 7 there, 8 here"), (7, spaces.Box(-1, 2, (1,)), "actions is")):
        other = types.SimpleNamespace(source=kept.source, size=size, box=box)
        with pytest.raises(SystemExit, match=word):
            datasets.remember(tmp_path / "run" / "data.json", other)
    rows["actions"] *= -1
    write_hdf5(Path("x.hdf5"), rows)
    with pytest.raises(SystemExit, match=f"{tmp_path}/run: the data of this run: is of another set-up: id is"):
        datasets.remember(tmp_path / "run" / "data.json", bc_flow_offline.load_datasets(args)[0])


# --- From each format to a score --------------------------------------------------------------------------------------
TINY = "--threads 1 --hidden-dims 32 32 --batch-size 32 --offline-steps 20 --log-interval 10 --no-capture-video"
TINY += " --eval-episodes 2 --flow-steps 2 --run-dir run"


def learn(*flags: object, cwd: Path) -> tuple[dict[str, list[float]], str]:
    """eval.csv and stdout of a short run."""
    done = run_forked(SCRIPT, *TINY.split(), *flags, cwd=cwd, env={"HOME": str(cwd)})
    return read_csv(done.run_dir, "eval.csv"), done.stdout


def test_a_d4rl_run_logs_d4rls_score(tmp_path):
    """100 * (return - random policy's) / (expert's - random policy's), named after whose references these are."""
    path = write_hdf5(tmp_path / "x.hdf5", d4rl_rows())
    flags = ("--env-name", "halfcheetah-medium-v2", "--dataset-path", path, "--eval-episodes", 1, "--action-chunking")
    scores, stdout = learn(*flags, cwd=tmp_path)
    assert scores["episodic_length"] == [1000]
    expected = 100 * (scores["episodic_return"][0] + 280.178953) / (12135 + 280.178953)
    assert scores["normalized_score_d4rl"][0] == pytest.approx(expected, rel=1e-6)
    assert f"normalized_score_d4rl {expected:.5g} " in stdout and "d4rl/halfcheetah-medium" in stdout


def test_a_robomimic_run_logs_success(tmp_path, stand_ins):
    path = write_robomimic(tmp_path / "x.hdf5", demos=30)
    flags = ("--env-name", "lift-mh-low_dim", "--dataset-path", path, "--action_chunking=True", "--horizon_length=3")
    scores, stdout = learn(*flags, "--offline-steps", 300, "--lr", 3e-3, cwd=tmp_path)
    assert scores["success_rate"] == [1] and scores["episodic_return"] == [1] and scores["episodic_length"][0] < 20
    assert "robomimic/lift-mh-low_dim" in stdout


def test_an_ogbench_run_logs_success_and_validation_loss(tmp_path, stand_ins):
    flags = ("--env-name", "reach-play-singletask-v0", "--offline-steps", 300, "--lr", 3e-3, "--normalize-observations")
    scores, _ = learn(*flags, cwd=tmp_path)
    assert scores["success_rate"] == [1] and 0 < scores["validation_loss"][0] < 1.5


def test_a_recording_of_sac_state_sim_is_learned_from(tmp_path):
    sac = "--env-id probe_envs:Point-v0 --total-timesteps 60 --learning-starts 50 --demos 0 --hidden-dims 16 16"
    sac += " --threads 1 --final-eval-episodes 5 --no-capture-video --run-dir sac --record-dataset point/mine-v0"
    run_forked("sac_state_sim.py", *sac.split(), cwd=tmp_path)
    scores, stdout = learn("--env-name", "point/mine-v0", "--action-chunking", cwd=tmp_path)
    assert "5 of 5 episodes" in stdout and scores["episodes"] == [2]
    assert "normalized_score_minari" in scores


def test_validation_episodes_may_be_shorter_than_a_chunk():
    lengths = iter((12, 12, 3, 12, 12, 12))
    env = gym.make("offline_data:Steps-v0").unwrapped
    reset = env.reset

    def other_length(**kwargs):
        env.length = next(lengths)
        return reset(**kwargs)

    env.reset = other_length
    write_minari("steps/short-v0", env, episodes=6)
    args = Args(env_name="steps/short-v0", action_chunking=True, validation_fraction=0.1, batch_size=8, seed=3)
    train, val = bc_flow_offline.load_datasets(args)
    assert (train.size, val.size) == (60, 3)
    _, chunks, valid = make_batches(val, args, CPU, learns=False).fixed(2, CPU)
    assert valid.unique(dim=1).tolist() == [[[1, 1, 1, 0, 0]]] * 2
    torch.testing.assert_close(chunks[0, 0, :3], torch.from_numpy(val["actions"][:, 0]))
    batches = make_batches(train, args, CPU)
    assert torch.equal(batches.fixed(2, CPU)[1], batches.fixed(2, CPU)[1])


def test_ends_of_pictures_are_found_in_little_memory():
    """Row by row as float64, not all at once: that were eight times the pictures, several times over."""
    pictures = random_images((20_001, 16, 16, 3))
    file = {"observations": pictures[:-1], "next_observations": pictures[1:]}
    terminals = np.zeros(20_000, bool)
    terminals[-1] = True
    after = file["next_observations"].copy()
    after[6_999] = 0
    tracemalloc.start()
    ends = datasets.episode_ends(file, None, file["observations"], terminals, after)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert np.flatnonzero(ends).tolist() == [6_999, 19_999]
    assert peak < 3 * pictures.nbytes


def test_masks_of_bits_are_pictures():
    masks = np.random.default_rng(0).integers(0, 2, (2, 9, 8)).astype(np.int8)
    images = datasets.as_images("observations/mask", spaces.MultiBinary((9, 8)), masks)
    np.testing.assert_array_equal(images, 255 * masks[..., None].astype(np.uint8))
