"""Data of bc_flow_offline.py: each format read from small files of its layout, and what happens when it cannot be."""

import shutil
from pathlib import Path

import gymnasium as gym
import h5py
import minari
import numpy as np
import offline_data
import pytest
import torch
from offline_data import EPISODES, d4rl_rows, write_hdf5, write_minari, write_robomimic

import bc_flow_offline
from bc_flow_offline import Args, Batches, make_env_and_datasets, process_train_dataset

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:minari")
SCRIPT = "bc_flow_offline.py"
STAND_INS = Path(offline_data.__file__).parent / "stand_ins"


@pytest.fixture(autouse=True)
def _folders(tmp_path, monkeypatch):
    """Data sets go to a folder of the test's own, and nothing is looked for elsewhere."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("sys.argv", [SCRIPT])


@pytest.fixture
def stand_ins(monkeypatch):
    """The stand-ins for packages that are not installed, fresh for this test."""
    monkeypatch.syspath_prepend(STAND_INS)
    for name in ("ogbench", "robosuite"):
        monkeypatch.delitem("sys.modules", name, raising=False)


def train_rows(name: str, **changes):
    return make_env_and_datasets(name, Args(**changes))[2]


def assert_no_chunk_crosses(dataset, episode_of: np.ndarray, horizon: int) -> None:
    """Of every chunk, exactly the steps of the first one's episode are valid."""
    rows = np.arange(dataset.size - horizon + 1)
    inside = episode_of[rows[:, None] + np.arange(horizon)] == episode_of[rows][:, None]
    batch = dataset.sample_sequence(len(rows), horizon, 0.99, idxs=rows)
    np.testing.assert_array_equal(batch["valid"], inside)
    args = Args(action_chunking=True, horizon_length=horizon, cuda=False)
    _, actions, valid = Batches(dataset, args, torch.device("cpu")).gather(torch.from_numpy(rows))
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
    train = train_rows("halfcheetah-medium-v2", dataset_path=str(write_hdf5(tmp_path / "x.hdf5", rows)))
    assert np.flatnonzero(train["terminals"]).tolist() == [3, 6, 11] and train["masks"].all()


def test_d4rl_v0_file_without_timeouts_is_cut_at_the_time_limit(tmp_path):
    """d4rl/__init__.py cuts such files at max_episode_steps, 1000 for a Hopper."""
    rows = d4rl_rows(((2300, "cut"),), obs_dim=11, action_dim=3, next_observations=False)
    rows["actions"] *= 0.1
    rows = {k: v for k, v in rows.items() if k != "timeouts"}
    train = train_rows("hopper-medium-v2", dataset_path=str(write_hdf5(tmp_path / "x.hdf5", rows)))
    assert [codes(train["observations"])[i] for i in np.flatnonzero(train["terminals"])] == [998, 1998, 2298]


def test_d4rl_file_becomes_a_minari_dataset_once(tmp_path):
    path = write_hdf5(tmp_path / "x.hdf5", d4rl_rows())
    train = train_rows("halfcheetah-medium-v2", dataset_path=str(path))
    (name,) = minari.list_local_datasets()
    dataset = minari.load_dataset(name)
    assert "halfcheetah-medium" in name and dataset.total_episodes == 5 and dataset.total_steps == 20
    assert [len(episode.rewards) for episode in dataset.iterate_episodes()] == [length for length, _ in EPISODES]
    assert isinstance(dataset.recover_environment().unwrapped, gym.make("HalfCheetah-v5").unwrapped.__class__)
    about = dataset.storage.metadata
    assert (about["ref_min_score"], about["ref_max_score"]) == (-280.178953, 12135.0)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "minari").rglob("*.hdf5")}
    again = train_rows("halfcheetah-medium-v2", dataset_path=str(path))
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "minari").rglob("*.hdf5")}
    assert all(np.array_equal(again[key], train[key]) for key in train)
    other = d4rl_rows(((7, "timeout"),))  # another file of the same name is other data
    assert train_rows("halfcheetah-medium-v2", dataset_path=str(write_hdf5(path, other))).size == 7


@pytest.mark.parametrize(
    ("name", "env", "worst", "best"),
    [
        ("halfcheetah-medium-replay-v2", "HalfCheetah-v5", -280.178953, 12135.0),
        ("hopper-medium-expert-v2", "Hopper-v5", -20.272305, 3234.3),
        ("walker2d-random-v2", "Walker2d-v5", 1.629008, 4592.3),
        ("ant-expert-v2", "Ant-v5", -325.6, 3879.7),
        ("antmaze-large-diverse-v2", None, 0.0, 1.0),
        ("kitchen-mixed-v0", None, 0.0, 4.0),
        ("pen-human-v1", None, 96.262799, 3076.8331),
        ("hammer-cloned-v1", None, -274.856578, 12794.1348),
        ("relocate-expert-v1", None, -6.425911, 4233.8778),
        ("door-human-v1", None, -56.512833, 2880.5693),
        ("maze2d-umaze-v1", None, 23.85, 161.86),
        ("maze2d-medium-v1", None, 13.13, 277.39),
        ("maze2d-large-v1", None, 6.7, 273.99),
        ("maze2d-umaze-dense-v1", None, 68.54, 193.66),
        ("maze2d-large-dense-v1", None, 30.57, 303.49),
    ],
)
def test_d4rl_reference_scores(tmp_path, name, env, worst, best, capsys):
    """D4RL infos.py:106-295, printed with the data; the data's returns are sums of its rewards."""
    dims = {"HalfCheetah-v5": (17, 6), "Hopper-v5": (11, 3), "Walker2d-v5": (17, 6)}.get(env, (7, 3))
    path = write_hdf5(tmp_path / "x.hdf5", d4rl_rows(((4, "timeout"), (2, "timeout")), *dims))
    bc_flow_offline.load_datasets(Args(env_name=name, dataset_path=str(path)))
    (dataset_id,) = minari.list_local_datasets()
    about = minari.load_dataset(dataset_id).storage.metadata
    assert about["ref_min_score"] == pytest.approx(worst, abs=5e-3)
    assert about["ref_max_score"] == pytest.approx(best, abs=5e-3)
    printed = capsys.readouterr().out
    assert "D4RL" in printed and "mean return 6.5" in printed and "best 10" in printed and dataset_id in printed


def test_antmaze_episodes_go_on_behind_the_goal(tmp_path):
    """antmaze: `terminals` marks the goal, where the episode does not end; rewards - 1 (qc d4rl_utils.py:16-58)."""
    rows = d4rl_rows(((6, "timeout"), (5, "timeout")), obs_dim=29, action_dim=8)
    rows["terminals"][[3, 4]] = True
    rows["rewards"] = rows["terminals"].astype(np.float32)
    args = Args(env_name="antmaze-umaze-v2", dataset_path=str(write_hdf5(tmp_path / "x.hdf5", rows)))
    train = process_train_dataset(make_env_and_datasets(args.env_name, args)[2], args)
    assert np.flatnonzero(train["terminals"]).tolist() == [5, 10]
    assert np.flatnonzero(train["masks"] == 0).tolist() == [3, 4]
    assert train["rewards"].tolist() == [-1, -1, -1, 0, 0, -1] + [-1] * 5


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
        ("empty", "again"),
        ("text", "layout"),
        ("damaged", "again"),
        ("group", "layout"),
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
    with pytest.raises(SystemExit, match=r"episode 2.*--clip-actions"):
        train_rows("halfcheetah-medium-v2", dataset_path=str(path))
    train = train_rows("halfcheetah-medium-v2", dataset_path=str(path), clip_actions=True)
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


def test_a_local_dataset_is_suggested_too(capsys):
    write_minari("point/expert-v0", gym.make("probe_envs:Point-v0"), episodes=1)
    with pytest.raises(SystemExit, match="point/expert-v0"):
        make_env_and_datasets("pont/expert-v0", Args(d4rl_url="http://127.0.0.1:9"))


# --- robomimic --------------------------------------------------------------------------------------------------------
def test_robomimic_file(tmp_path, stand_ins):
    """demo_2 before demo_10; observations: eef_pos, eef_quat, gripper_qpos, object (qc robomimic_utils.py:27)."""
    path = write_robomimic(tmp_path / "x.hdf5")
    args = Args(env_name="lift-mh-low_dim", dataset_path=str(path))
    train = make_env_and_datasets(args.env_name, args)[2]
    demos = list(offline_data.robomimic_demos())
    train_demos = demos
    keys = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "object")
    obs = [np.concatenate([demo["obs"][key] for key in keys], -1) for demo in train_demos]
    np.testing.assert_array_equal(train["observations"], np.float32(np.concatenate([o[:-1] for o in obs])))
    np.testing.assert_array_equal(train["next_observations"], np.float32(np.concatenate([o[1:] for o in obs])))
    np.testing.assert_allclose(
        train["actions"], np.concatenate([d["actions"] for d in train_demos]).clip(1e-5 - 1, 1 - 1e-5), atol=1e-7
    )
    lengths = [len(demo["actions"]) for demo in train_demos]
    last = np.cumsum(lengths) - 1
    assert np.flatnonzero(train["terminals"]).tolist() == np.flatnonzero(train["masks"] == 0).tolist() == last.tolist()
    assert train["rewards"].sum() == len(train_demos)
    assert process_train_dataset(train, args)["rewards"].tolist() == [float(i in last) - 1 for i in range(sum(lengths))]
    assert_no_chunk_crosses(train, np.repeat(np.arange(len(lengths)), lengths), 4)


def test_robomimic_file_in_the_usual_place(tmp_path, stand_ins):
    write_robomimic(tmp_path / ".robomimic" / "lift" / "mh" / "low_dim_v15.hdf5")
    assert train_rows("lift-mh-low_dim")["observations"].shape[1] == 19


def test_robomimic_file_is_missing(capsys):
    message = refused(capsys, "can-ph-low_dim")
    for word in (".robomimic/can/ph/low_dim_v15.hdf5", "download_datasets", "--dataset-path"):
        assert word in message


def test_robomimic_task_is_made_from_the_file(tmp_path, stand_ins):
    import robosuite

    path = write_robomimic(tmp_path / "x.hdf5")
    env, eval_env, train, _ = make_env_and_datasets("lift-mh-low_dim", Args(dataset_path=str(path)))
    name, options = robosuite.made[0]
    assert name == "Lift" and options["robots"] == ["Panda"] and options["controller_configs"]["type"] == "BASIC"
    assert not options["use_camera_obs"] and options["control_freq"] == 20
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


def test_robomimic_without_robosuite(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "robosuite", None)
    env, _, train, _ = make_env_and_datasets(
        "lift-mh-low_dim", Args(dataset_path=str(write_robomimic(tmp_path / "x.hdf5")))
    )
    assert env is None and train.size == 48 and "robosuite" in capsys.readouterr().err


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
        (lambda file: [file["data"].__delitem__(f"demo_{i}") for i in range(12)], "layout"),
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
    obs, _ = env.reset(seed=0)
    assert obs.shape == (2,) and obs.dtype == np.float32
    count = len([call for call in ogbench.calls if not call[2]])
    make_env_and_datasets("reach-play-singletask-v0", Args())
    assert len([call for call in ogbench.calls if not call[2]]) == count == 1  # loaded through the package once


def test_ogbench_with_only_the_training_part_stored(stand_ins, tmp_path):
    """A run that was killed between the two parts."""
    make_env_and_datasets("reach-play-singletask-v0", Args())
    (val,) = [name for name in minari.list_local_datasets() if "val" in name]
    shutil.rmtree(tmp_path / "minari" / val)
    assert make_env_and_datasets("reach-play-singletask-v0", Args())[3].size == 20


def test_ogbench_faults(stand_ins, monkeypatch, capsys):
    assert "is not a data set" in refused(capsys, "no-such-singletask-v0")
    monkeypatch.setitem(__import__("sys").modules, "ogbench", None)
    assert "pip install ogbench" in refused(capsys, "reach-play-singletask-v0")
