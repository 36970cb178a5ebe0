"""common/episodes.py: kept, demonstrated, played again, stored."""

import math
import shutil
from functools import partial

import gymnasium as gym
import h5py
import minari
import numpy as np
import probe_envs
import pytest
from gymnasium import spaces

import franka_sim
from common import envs
from common.episodes import Episode, Recorder, collect, demonstrations, record, spread_starts, summary
from common.recording import Recording, check_new_dataset, dataset_folder

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:minari")


def test_recorder_keeps_episodes_and_copies():
    env = Recorder(probe_envs.InPlace())
    for length in (20, 3):
        env.reset(seed=1)
        for t in range(length):
            action = np.full(3, 0.1 * t, np.float32)
            env.step(action)
            action[:] = 9
    (episode,) = env.episodes  # the other one has not ended
    assert len(episode.observations) == 21 and episode.actions.max() == np.float32(1.9)
    assert len({obs["point"].tobytes() for obs in episode.observations}) > 10
    assert episode.truncations.tolist() == [False] * 19 + [True] and not episode.terminations.any()
    assert episode.rewards.shape == (20,) and episode.info == {"success": episode.info["success"]}


# --- Demonstrations ---------------------------------------------------------------------------------------------------
def point() -> gym.Env:
    return envs.make("probe_envs:Point-v0")


class Reversed(gym.ActionWrapper):
    """Changes actions without saying what the expert would do."""

    def action(self, action):
        return -action


class ReversedToo(Reversed):
    def expert_action(self):
        return -self.env.unwrapped.expert_action()


class Half(gym.Wrapper):
    """Changes the action space only."""

    action_space = spaces.Box(-1, 1, (3,))


def test_experts_behind_wrappers():
    """R1: a wrapper that changes actions has an expert of its own, or is named; others are looked through."""
    for wrap in (ReversedToo, lambda env: ReversedToo(gym.wrappers.TimeLimit(env, 50)), Recorder):
        episodes = list(demonstrations("2", wrap(point()), seed=1, noise=0.0))
        assert [episode.info["success"] for episode in episodes] == [True, True]
        assert len({episode.observations[0]["goal"].tobytes() for episode in episodes}) == 2
    for wrap, name in ((Reversed, "Reversed"), (Half, "Half")):
        with pytest.raises(SystemExit, match=f"--demos 2: {name} changes actions, so it needs an expert_action"):
            next(demonstrations("2", wrap(point()), seed=1, noise=0.0))
    with pytest.raises(SystemExit, match="--demos 5: Pendulum-v1 has no expert_action"):
        next(demonstrations("5", envs.make("Pendulum-v1"), seed=1, noise=0.0))


def closest_pair(points: np.ndarray) -> float:
    distances = np.linalg.norm(points[:, None] - points, axis=-1)
    return distances[~np.eye(len(points), dtype=bool)].min()


@pytest.mark.parametrize(("task", "seen"), [("Point", slice(4)), ("PixelPoint", slice(2))])
def test_few_demonstrations_cover_the_task(task, seen):
    """Those chosen start further from each other, in what is not an image, than the first ones would."""
    env = envs.make(f"probe_envs:{task}-v0")

    def starts(numbers) -> np.ndarray:
        points = []
        for number in numbers:
            env.reset(seed=envs.episode_seed(3, 2, number))
            points.append([*env.unwrapped.point, *env.unwrapped.goal])
        return np.array(points)

    chosen = spread_starts(8, env, seed=3)
    assert len(set(chosen)) == 8 and max(chosen) < 40
    assert closest_pair(starts(chosen)[:, seen]) > 1.2 * closest_pair(starts(range(8))[:, seen])
    shown = [env.unwrapped.goal.copy() for _ in demonstrations("8", env, seed=3, noise=0.0)]
    np.testing.assert_array_equal(shown, starts(chosen)[:, 2:])


def test_starts_that_are_all_the_same_are_different_episodes(monkeypatch):
    monkeypatch.setattr(probe_envs.Point, "observe", lambda self: {"point": np.zeros(2), "goal": np.ones(2)})
    assert spread_starts(4, point(), seed=1) == [0, 1, 2, 3]


def test_images_do_not_choose_demonstrations():
    """By pixels the cubes near the camera were chosen, and most of the table was left out."""
    assert spread_starts(4, envs.make("probe_envs:GreyImages-v0"), seed=1) == [0, 1, 2, 3]
    chosen = [spread_starts(8, franka_sim.FrankaPickCube(**options), 1) for options in ({}, {"image_obs": True})]
    assert chosen[0] == chosen[1] != [*range(8)]  # where the cube lies is told, image or not


@pytest.mark.parametrize("start", ["left", None, {"x": 1.0}, [1.0, math.nan], "as many as drawn"])
def test_starts_that_are_no_numbers(start):
    class Telling(gym.Wrapper):
        def reset(self, **options):
            obs, info = self.env.reset(**options)
            drawn = np.zeros(1 + int(4 * self.np_random.random()))
            return obs, info | {"start": drawn if start == "as many as drawn" else start}

    with pytest.raises(SystemExit, match=r"--demos 8: info\[.start.\] of a reset must be numbers"):
        spread_starts(8, Telling(point()), seed=1)


@pytest.mark.parametrize("action", [np.zeros(2), 0.0, np.full(3, math.nan), None, "left", (np.zeros(3), {"state": 1})])
def test_experts_that_say_no_action(monkeypatch, action):
    monkeypatch.setattr(probe_envs.Point, "expert_action", lambda self: action)
    with pytest.raises(SystemExit, match=r"--demos 1: expert_action\(\) gives"):
        next(demonstrations("1", point(), seed=1, noise=0.0))


@pytest.mark.parametrize("expert", [lambda self, obs: np.zeros(3), None])
def test_experts_that_cannot_be_asked(monkeypatch, expert):
    """R1: one line that says how expert_action is called."""
    monkeypatch.setattr(probe_envs.Point, "expert_action", expert)
    with pytest.raises(SystemExit, match=r"--demos 1: Point.expert_action\(\) is called without arguments"):
        next(demonstrations("1", point(), seed=1, noise=0.0))


@pytest.mark.parametrize(
    ("verdicts", "words"),
    [([1, 0, 1], "2 successful"), ([1, math.nan, 0], "1 successful"), ([math.nan] * 3, "success unknown")],
)
def test_a_summary_counts_successes(verdicts, words):
    """S10: a task may say success only where there was one."""
    episodes = [Episode([], np.zeros((4, 3)), np.zeros(4), None, None, {"success": x}) for x in verdicts]
    assert summary(episodes, lambda info: info["success"]) == f"3 episodes, 12 steps, {words}"


def test_recorded_episodes_become_demonstrations(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    recorded = list(demonstrations("3", point(), seed=5, noise=0.1))
    record("point/expert-v0", recorded, point(), lambda info: info["success"], algorithm_name="expert")
    dataset = minari.load_dataset("point/expert-v0")
    assert isinstance(dataset.recover_environment().unwrapped, probe_envs.Point)
    assert isinstance(dataset.recover_environment(eval_env=True).unwrapped, probe_envs.Point)
    for ours, theirs in zip(recorded, demonstrations("point/expert-v0", point(), seed=0, noise=0.0), strict=True):
        for name in ("actions", "rewards", "terminations", "truncations"):
            np.testing.assert_array_equal(getattr(theirs, name), getattr(ours, name))
        for one, other in zip(theirs.observations, ours.observations, strict=True):
            assert np.array_equal(one["goal"], other["goal"]) and np.array_equal(one["point"], other["point"])
        assert theirs.info["success"] == ours.info["success"]
    with pytest.raises(SystemExit, match="--record-dataset point/expert-v0: exists"):
        check_new_dataset("point/expert-v0")
    for name in ("no version", "no/version"):
        with pytest.raises(SystemExit, match=f"--record-dataset {name}: is no name that Minari takes"):
            check_new_dataset(name)


gym.register("Limited-v0", "probe_envs:Endless", max_episode_steps=5)


def endless(render_mode: str | None = None) -> gym.Env:
    return probe_envs.Endless()


gym.register("Partial-v0", partial(endless), max_episode_steps=5)


@pytest.mark.parametrize("task", ["Limited-v0", "Partial-v0"])  # dm_control's tasks are partials in shimmy
def test_a_recording_knows_the_time_limit(tmp_path, monkeypatch, task):
    """R3: the task itself never ends an episode; evaluated from the recording it would not end."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    env = Recorder(envs.make(task))
    env.reset(seed=0)
    while not env.step(np.zeros(1, np.float32))[3]:
        pass
    record("own/limited-v0", env.episodes, env, lambda info: math.nan)
    again = minari.load_dataset("own/limited-v0").recover_environment()
    again.reset(seed=0)
    assert [again.step(np.zeros(1))[3] for _ in range(5)] == [False] * 4 + [True]


def test_a_recording_does_not_make_the_task_again(tmp_path, monkeypatch):
    """Which may own a port. Also with scores, for which Minari would make it once more."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    env = Recorder(envs.make("Limited-v0"))
    env.reset(seed=0)
    while not env.step(np.zeros(1, np.float32))[3]:
        pass
    monkeypatch.setattr(gym, "make", lambda *_, **__: pytest.fail("made again"))
    record("own/limited-v0", env.episodes, env, lambda info: math.nan, ref_min_score=0.0, ref_max_score=5.0)
    recorded = minari.load_dataset("own/limited-v0")
    assert recorded.env_spec.id == "Limited-v0" and recorded.storage.metadata["ref_max_score"] == 5


class OtherKeys(probe_envs.Point):
    observation_space = spaces.Dict({"place": spaces.Box(-1, 1, (2,)), "goal": spaces.Box(-1, 1, (2,))})

    def observe(self):
        return {"place": np.float32(self.point), "goal": np.float32(self.goal)}


class OtherBounds(probe_envs.Point):
    action_space = spaces.Box(-1, 1, (3,), np.float32)

    def expert_action(self):
        return super().expert_action() / 2


@pytest.mark.parametrize("task", [probe_envs.OtherPoint, OtherKeys, OtherBounds])
def test_demonstrations_of_another_task_are_refused(tmp_path, monkeypatch, task):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    name = f"{task.__name__}-v7"
    gym.register(name, task, max_episode_steps=20)  # a class, not the name of one
    other = envs.make(name)
    record("other/expert-v0", demonstrations("1", other, seed=1, noise=0.0), other, lambda info: math.nan)
    with pytest.raises(SystemExit, match="--demos other/expert-v0: is not of this task"):
        next(demonstrations("other/expert-v0", point(), seed=0, noise=0.0))
    with pytest.raises(SystemExit, match="--demos no/such-v0: "):
        next(demonstrations("no/such-v0", point(), seed=0, noise=0.0))


def test_demonstrations_for_cloning_of_a_task_that_a_class_makes(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    gym.register("PointClass-v7", probe_envs.Point, max_episode_steps=20)
    dataset_id = collect("PointClass-v7", 2, seed=1, success=lambda info: envs.truth(info, "success"))
    dataset = minari.load_dataset(dataset_id)
    assert (
        dataset.total_episodes == 2 and dataset.recover_environment().unwrapped.spec.entry_point == "probe_envs:Point"
    )
    assert gym.spec("PointClass-v7").entry_point is probe_envs.Point


def test_demonstrations_are_collected_anew_when_the_task_has_changed(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "changing_task.py"
    file.write_text("import probe_envs\n\n\nclass Mine(probe_envs.Point):\n    pass\n")
    gym.register("Mine-v0", "changing_task:Mine", max_episode_steps=20)

    def collected(count: int = 2) -> str:
        return collect("Mine-v0", count, seed=1, success=lambda info: envs.truth(info, "success"))

    first = collected()
    assert collected() == first and len(minari.list_local_datasets()) == 1
    file.write_text(file.read_text().replace("pass", "speed = 2"))
    assert collected() != first and len(minari.list_local_datasets()) == 2


gym.register("Other-v3", "probe_envs:Point", max_episode_steps=20)


def test_what_is_odd_about_demonstrations_is_said(tmp_path, monkeypatch, capsys):
    """B11's kind, of --demos: another task with the same spaces. Once a dataset."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    envs.say_once.cache_clear()
    recorded = list(demonstrations("2", point(), seed=1, noise=0.0))
    record("point/ours-v0", recorded, point(), lambda info: math.nan)
    read = list(demonstrations("point/ours-v0", point(), seed=0, noise=0.0))
    assert len(read) == 2 and not any("success" in episode.info for episode in read)  # NaN: not known
    assert capsys.readouterr().err == ""
    list(demonstrations("point/ours-v0", envs.make("Other-v3"), seed=0, noise=0.0))
    said = "--demos point/ours-v0: was recorded in Point-v0, the task is Other-v3"
    assert capsys.readouterr().err.splitlines() == [said]


@pytest.mark.parametrize("box", [spaces.MultiDiscrete([2, 2, 2]), spaces.MultiBinary(3)])
def test_demonstrations_of_choices_are_refused(tmp_path, monkeypatch, box):
    """They have the shape of the task's actions, and no bounds."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    (episode,) = demonstrations("1", point(), seed=1, noise=0.0)
    parts = (np.ones((20, 3), int), episode.rewards, episode.terminations, episode.truncations, {})
    obs = {key: np.stack([obs[key] for obs in episode.observations]) for key in episode.observations[0]}
    buffer = minari.data_collector.EpisodeBuffer(0, None, None, obs, *parts)
    space = point().observation_space
    minari.create_dataset_from_buffers("own/choices-v0", [buffer], observation_space=space, action_space=box)
    with pytest.raises(
        SystemExit, match=f"--demos own/choices-v0: is not of this task; its actions are {type(box).__name__}"
    ):
        list(demonstrations("own/choices-v0", point(), seed=0, noise=0.0))


@pytest.mark.parametrize("text", ["", "{}"])
def test_demonstrations_that_came_half_way(tmp_path, monkeypatch, text):
    """Whatever Minari raises at half a download: one line that says what to do."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    (tmp_path / "own/half-v0/data").mkdir(parents=True)
    (tmp_path / "own/half-v0/data/metadata.json").write_text(text)
    with pytest.raises(SystemExit, match="--demos own/half-v0: this Minari .* cannot read it: .*delete its folder"):
        next(demonstrations("own/half-v0", point(), seed=0, noise=0.0))


def test_demonstrations_with_numbers_that_are_none(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    (episode,) = demonstrations("1", point(), seed=1, noise=0.0)
    episode.rewards[3] = math.nan
    record("point/nan-v0", [episode], point(), lambda info: math.nan)
    with pytest.raises(
        SystemExit, match="--demos point/nan-v0: episode 0 of the data: rewards hold numbers that are not finite"
    ):
        list(demonstrations("point/nan-v0", point(), seed=0, noise=0.0))


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        (
            "rewards",
            lambda x: x[:-1],
            r"episode 0 of the data: rewards have shape \(19,\), not one value for each of 20",
        ),
        ("rewards", lambda x: x[:, None], None),
        ("terminations", lambda x: x[:-1], r"episode 0 of the data: terminations have shape \(19,\)"),
        (
            "truncations",
            lambda x: np.array([b"False"] * 20),
            "episode 0 of the data: truncations hold b'False', not true",
        ),
        ("actions", lambda x: x[:, :1], r"episode 0: actions have shape \(1,\), the task's \(3,\)"),
        ("terminations", lambda x: x + 0.5, "episode 0 of the data: terminations hold 0.5, not true or false"),
        ("actions", lambda x: 50 * x, r"episode 0: actions from .* are outside Box\(-2.0, 2.0"),
        ("observations/goal", lambda x: x[:-1], "episode 0 of the data: 20 actions need 21 observations"),
        ("observations/goal", lambda x: np.append(x, x, 0), "episode 0 of the data: 20 actions need 21 observations"),
        ("observations/goal", None, "is damaged, cannot be read"),
    ],
)
def test_demonstrations_whose_file_is_damaged(tmp_path, monkeypatch, part, change, words):
    """B9's and B15's kinds, of --demos: parts that do not fit together, and a file that is cut off."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    recorded = list(demonstrations("2", point(), seed=1, noise=0.0))
    record("point/bad-v0", recorded, point(), lambda info: math.nan)
    path = tmp_path / "point/bad-v0/data/main_data.hdf5"
    if change is None:
        path.write_bytes(path.read_bytes()[:5000])
    else:
        with h5py.File(path, "a") as file:
            values = change(file[f"episode_0/{part}"][:])
            del file[f"episode_0/{part}"]
            file[f"episode_0/{part}"] = values
    if words is None:
        read = list(demonstrations("point/bad-v0", point(), seed=0, noise=0.0))
        np.testing.assert_array_equal(read[0].rewards, recorded[0].rewards)
        return
    with pytest.raises(SystemExit, match=f"--demos point/bad-v0: {words}"):
        list(demonstrations("point/bad-v0", point(), seed=0, noise=0.0))


class Pair(gym.Env):
    """Its observations are a Tuple."""

    observation_space = spaces.Tuple((spaces.Box(-9, 9, (2,)), spaces.Box(-9, 9, (3,))))
    action_space = spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        self.t = 0
        return (np.zeros(2, np.float32), np.zeros(3, np.float32)), {}

    def step(self, action):
        self.t += 1
        return (np.full(2, self.t, np.float32), np.zeros(3, np.float32)), 1.0, False, self.t == 4, {}

    def expert_action(self):
        return np.array([0.5])


class Choices(probe_envs.Point):
    """A choice of several beside the point."""

    def __init__(self, count: int = 3):
        super().__init__()
        parts = probe_envs.Point.observation_space.spaces
        self.observation_space = spaces.Dict(parts | {"tool": spaces.Discrete(count)})

    def observe(self):
        return super().observe() | {"tool": 1}


gym.register("Choices-v0", Choices, max_episode_steps=20)


def test_demonstrations_with_more_choices_are_of_another_task(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    ours = envs.make("Choices-v0")
    record("own/choices-v0", demonstrations("1", ours, seed=1, noise=0.0), ours, lambda info: math.nan)
    assert len(list(demonstrations("own/choices-v0", ours, seed=0, noise=0.0))) == 1
    more = envs.make("Choices-v0", count=5)
    with pytest.raises(SystemExit, match="--demos own/choices-v0: is not of this task; its observations are"):
        next(demonstrations("own/choices-v0", more, seed=0, noise=0.0))


def test_pictures_are_recorded_as_they_were_seen(tmp_path, monkeypatch):
    """Minari's default is JPEG."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    env = Recorder(envs.make("probe_envs:PixelPoint-v0"))
    env.reset(seed=0)
    while not any(env.step(np.zeros(3, np.float32))[2:4]):
        pass
    asked = []
    monkeypatch.setattr("common.datasets.check_space", lambda folder, size, name: asked.append(size))
    record("own/pixels-v0", env.episodes, env, lambda info: math.nan)
    (again,) = demonstrations("own/pixels-v0", env, seed=0, noise=0.0)
    for one, other in zip(env.episodes[0].observations, again.observations, strict=True):
        np.testing.assert_array_equal(one["front"], other["front"])
    assert asked[0] > 1e6 + sum(obs["front"].nbytes for obs in again.observations)


def test_a_recording_is_there_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    """Killed, or with a full disk, in the midst: half of a dataset was left, with a name that was taken."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.setattr("minari.dataset._storages.hdf5_storage.HDF5Storage.update_episodes", full)
    with pytest.raises(OSError, match="No space"):
        record("own/half-v0", demonstrations("1", point(), seed=1, noise=0.0), point(), lambda info: math.nan)
    assert not any(tmp_path.iterdir())


def test_a_recording_asks_for_its_disk(tmp_path, monkeypatch):
    """Where that fills up, HDF5 ends the program by a segmentation fault: pictures are stored as they are."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(SystemExit, match=r"0 MB are free, --record-dataset own/large-v0 needs 1; make room"):
        record("own/large-v0", demonstrations("1", point(), seed=1, noise=0.0), point(), lambda info: math.nan)
    assert not any(tmp_path.iterdir())


def full(*_) -> None:
    raise OSError(28, "No space left on device")


def test_a_name_that_was_taken_meanwhile(tmp_path, monkeypatch):
    """Two runs that record under one name: the second says so, and leaves the first one's data alone."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    record("own/one-v0", demonstrations("1", point(), seed=1, noise=0.0), point(), lambda info: math.nan)
    with pytest.raises(SystemExit, match="--record-dataset own/one-v0: exists"):
        record("own/one-v0", [], point(), lambda info: math.nan)


def test_a_dataset_in_which_nothing_is_recorded_yet(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    Recording(dataset_folder("own/none-v0", "--dataset"), "own/none-v0", point(), {})
    with pytest.raises(SystemExit, match="--demos own/none-v0: has no steps"):
        next(demonstrations("own/none-v0", point(), seed=0, noise=0.0))


def test_experts_that_fail_are_not_cloned(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    verdicts = iter([0.0, 1.0] * 5)
    kept = minari.load_dataset(collect("Point-v0", 2, 1, lambda info: next(verdicts)))
    shown = [episode.observations["goal"][0].tolist() for episode in kept.iterate_episodes()]
    env = point()
    assert shown == [env.reset(seed=envs.episode_seed(1, 2, n))[0]["goal"].tolist() for n in (1, 3)]
    with pytest.raises(SystemExit, match="--env-name Point-v0: its scripted expert succeeds in 0 of 10 episodes only"):
        collect("Point-v0", 1, 1, lambda info: 0.0)
    assert len(minari.list_local_datasets()) == 1


def test_tuples_are_demonstrated_but_not_read_again(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    gym.register("Pair-v0", Pair, max_episode_steps=9, disable_env_checker=True)
    env = envs.make("Pair-v0")
    episodes = list(demonstrations("2", env, seed=1, noise=0.0))
    record("pair/ours-v0", episodes, env, lambda info: np.nan)
    with pytest.raises(SystemExit, match="--demos pair/ours-v0: its observations are a Tuple; make them a Dict"):
        list(demonstrations("pair/ours-v0", env, seed=1, noise=0.0))
