"""common/evaluation.py: seeded roll-outs, side by side, in chunks, given up, filmed."""

import errno
import math
import random
from pathlib import Path

import gymnasium as gym
import imageio.v2 as imageio
import numpy as np
import probe_envs
import pytest
from conftest import read_csv
from gymnasium import spaces

from common import envs
from common.evaluation import (
    CsvLogger,
    evaluate,
    film,
    means,
    plot_curves,
    record_grid,
    record_video,
    roll_out,
    success_rate,
    write_grid,
)
from common.recording import write_video


class Count(gym.Env):
    """Lasts as many steps as its seed says, 1 to 5; reward: the action; keeps what was done in it."""

    observation_space, action_space = spaces.Box(-9, 9, (2,)), spaces.Box(-9, 9, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.length = 0, int(self.np_random.integers(1, 6))
        return np.float32([self.length, 0]), {}

    def step(self, action):
        self.t += 1
        info = {"success": self.length > 2, "length": self.length}
        return np.float32([self.length, self.t]), float(action[0]), self.t == self.length, False, info


def lengths(episodes: int, seed: int) -> list[int]:
    env = Count()
    return [int(env.reset(seed=envs.episode_seed(seed, 1, number))[0][0]) for number in range(episodes)]


def step_number(observations: list, rngs: list) -> np.ndarray:
    return np.array([obs[1:] + 1 for obs in observations])


@pytest.mark.parametrize("side_by_side", [1, 2, 3, 20])
def test_episodes_are_the_same_however_many_run_side_by_side(side_by_side):
    rollouts = roll_out(step_number, [Count() for _ in range(side_by_side)], 9, seed=4)
    expected = lengths(9, 4)
    assert [rollout.number for rollout in rollouts] == list(range(9))
    assert [len(rollout.rewards) for rollout in rollouts] == expected and len(set(expected)) > 2
    assert [rollout.rewards for rollout in rollouts] == [list(range(1, length + 1)) for length in expected]


def test_noise_of_an_episode_does_not_depend_on_what_runs_beside_it():
    def noisy(observations: list, rngs: list) -> np.ndarray:
        return np.array([rng.normal(size=1) for rng in rngs])

    alone, beside = (roll_out(noisy, [Count() for _ in range(n)], 6, seed=1) for n in (1, 4))
    assert [rollout.rewards for rollout in alone] == [rollout.rewards for rollout in beside]


def test_chunks_are_executed_before_the_policy_is_asked_again():
    asked = []

    def chunks(observations: list, rngs: list) -> np.ndarray:
        asked.append([int(obs[1]) for obs in observations])
        return np.array([[[10.0], [20.0], [30.0]]] * len(observations))

    (rollout,) = roll_out(chunks, [Count()], 1, seed=next(s for s in range(50) if lengths(1, s) == [5]))
    assert rollout.rewards == [10, 20, 30, 10, 20]
    assert asked == [[0], [3]]


def test_means_over_the_episodes():
    scalars = evaluate(step_number, [Count()], 8, 3, lambda info: info["success"])
    expected = lengths(8, 3)
    assert scalars == {
        "eval/episodic_return": pytest.approx(np.mean([n * (n + 1) / 2 for n in expected])),
        "eval/episodic_length": np.mean(expected),
        "eval/success_rate": np.mean([n > 2 for n in expected]),
        "eval/episodes": 8,
    }


class Luck(Count):
    """Draws from the generators of all, as old tasks do."""

    def step(self, action):
        obs, _, terminated, truncated, info = super().step(action)
        luck = random.random() + np.random.rand()  # noqa: NPY002
        return obs, luck, terminated, truncated, info


def test_an_evaluation_leaves_the_generators_of_a_training_episode_alone():
    training, evaluating = (envs.Checked(Luck(), "Luck-v0") for _ in range(2))
    rewards = []
    for evaluates in (False, True):
        training.reset(seed=next(s for s in range(50) if lengths(1, s) == [5]))
        if evaluates:
            first = evaluate(step_number, [evaluating], 3, 3, lambda info: 1.0)
            assert first == evaluate(step_number, [evaluating], 3, 3, lambda info: 1.0)
        rewards.append(training.step(np.zeros(1, np.float32))[1])
    assert rewards[0] == rewards[1]


def test_what_a_task_calls_its_numbers_does_not_hide_ours(tmp_path):
    class Named(Count):
        def step(self, action):
            obs, reward, terminated, truncated, info = super().step(action)
            theirs = {"step": 0.5, "episodic_return": -1.0, "episodic_length": -1.0, "success_rate": -1.0, "force": 2.0}
            if self.length == lengths(1, 3)[0]:
                theirs["of_some"] = 1.0
            return obs, reward, terminated, truncated, info | theirs

    stats = means(roll_out(step_number, [Named()], 4, 3), lambda info: 1.0)
    assert stats["episodic_return"] > 0 < stats["episodic_length"]
    assert stats["success_rate"] == 1 and stats["force"] == 2
    assert math.isnan(stats["of_some"])  # no mean of some episodes is passed off as that of all
    logger = CsvLogger(tmp_path / "eval.csv")
    for step in (20, 40):
        logger.log(stats, step)
    logger.close()
    assert read_csv(tmp_path, "eval.csv")["step"] == [20, 40]


def test_an_episode_that_says_nothing_has_failed():
    """In both tables: many tasks say success only."""
    envs.say_once.cache_clear()
    says = lambda info: 1.0 if info["success"] else math.nan  # noqa: E731
    rate = np.mean([n > 2 for n in lengths(8, 3)])
    assert 0 < rate < 1
    assert means(roll_out(step_number, [Count()], 8, 3), says)["success_rate"] == rate
    assert evaluate(step_number, [Count()], 8, 3, says)["eval/success_rate"] == rate


def test_an_evaluation_ends_when_it_is_told_to():
    """R3: in the middle of an episode, without a number that would be of fewer episodes."""
    calls = []
    assert (
        evaluate(step_number, [Count()], 10**6, 0, lambda info: 1.0, stop=lambda: len(calls) > 9 or calls.append(1))
        == {}
    )


def test_a_likely_key_for_success_is_named(capsys):
    """S10: once, where the task says something like it under another name; nothing is said otherwise."""
    envs.say_once.cache_clear()
    env = probe_envs.Spiky()
    unknown = lambda info: float(info.get("success", math.nan))  # noqa: E731
    still = lambda observations, rngs: np.zeros((len(observations), 3))  # noqa: E731
    for _ in range(2):
        assert math.isnan(evaluate(still, [env], 1, 0, unknown)["eval/success_rate"])
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and "['task_succeeded']" in errors[0] and "success()" in errors[0]
    evaluate(still, [probe_envs.Point()], 1, 0, unknown)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("verdicts", "rate", "said"),
    [
        ([1.0, 0.0, 1.0, 1.0], 0.75, False),
        ([1.0, math.nan, math.nan, 1.0], 0.5, True),
        ([math.nan, math.nan], math.nan, False),
        ([], math.nan, False),
    ],
)
def test_successes_of_tasks_that_say_nothing_else(verdicts, rate, said, capsys):
    """S10: `if won: info["success"] = True`; the rate was unknown unless all episodes succeeded."""
    envs.say_once.cache_clear()
    assert success_rate(verdicts) == pytest.approx(rate, nan_ok=True)
    assert ("count as failures" in capsys.readouterr().err) is said


class FilmStrip(probe_envs.Point):
    """render() returns a list of frames, as with gymnasium's RenderCollection."""

    def render(self):
        return [np.zeros((64, 64, 3), np.uint8), super().render()]


@pytest.mark.parametrize("task", [probe_envs.Point, FilmStrip])
def test_video_of_the_first_episodes(tmp_path, task):
    """P2 as well: the newest frame of a list."""
    still = lambda observations, rngs: np.zeros((len(observations), 3))  # noqa: E731
    record_video(still, task, tmp_path / "video.mp4", seed=0, episodes=2)
    frames = np.array(imageio.mimread(tmp_path / "video.mp4", memtest=False))
    assert frames.shape == (42, 64, 64, 3)
    assert (frames[..., 1] > 150).sum(axis=(1, 2)).min() > 4  # the goal, in green
    assert abs(frames[0].astype(int) - frames[21]).max() > 100  # another one in the second episode


class OddSize(probe_envs.Point):
    def render(self):
        return np.zeros((63, 65, 3), np.uint8)


def test_videos_of_pictures_with_odd_sides(tmp_path):
    """H.264 takes even ones only."""
    still = lambda observations, rngs: np.zeros((len(observations), 3))  # noqa: E731
    record_video(still, OddSize, tmp_path / "video.mp4", seed=0, episodes=1)
    write_grid(film(still, OddSize(), 1, 5, 0), tmp_path / "grid.mp4", 10)
    write_video(np.zeros((5, 63, 65, 3), np.uint8), tmp_path / "frames.mp4", 10)
    shapes = {name: imageio.mimread(tmp_path / f"{name}.mp4")[0].shape for name in ("video", "grid", "frames")}
    assert shapes == {"video": (64, 66, 3), "grid": (66, 68, 3), "frames": (64, 66, 3)}


def test_a_grid_of_few_pictures(tmp_path):
    still = lambda observations, rngs: np.zeros((len(observations), 3))  # noqa: E731
    record_grid(still, probe_envs.Point(), 1, 40, 0, tmp_path / "grid.mp4", track=False)
    assert len(imageio.mimread(tmp_path / "grid.mp4")) == 1  # the last of 20 steps


def test_pictures_of_a_task_that_gives_several():
    """P2: bc_flow_offline.py's film, too, takes the newest frame."""
    still = lambda observations, rngs: np.zeros((len(observations), 3))  # noqa: E731
    (one,), (other,) = (film(still, task(), 1, 6, 0) for task in (probe_envs.Point, FilmStrip))
    assert one.shape == (4, 64, 64, 3)  # of steps 6, 12, 18, and the last one
    np.testing.assert_array_equal(one, other)


class Breaks(probe_envs.Point):
    """Renders five frames."""

    def render(self):
        self.left = getattr(self, "left", 5) - 1
        if self.left < 0:
            raise RuntimeError("the camera\nis gone")
        return super().render()


@pytest.mark.parametrize("broken", [Breaks, "float", "alpha", "nothing"])
def test_a_video_that_breaks_off(tmp_path, capsys, monkeypatch, broken):
    """P2, P6: one line, the video that was there stays, and no part of the new one."""
    frames = {"float": np.zeros((64, 64, 3)), "alpha": np.zeros((64, 64, 4), np.uint8), "nothing": None}
    words = {
        Breaks: "the camera is gone",
        "float": "render() gives float64 (64, 64, 3), not an image (H, W, 3) of bytes",
    }
    words |= {"alpha": "render() gives uint8 (64, 64, 4), not", "nothing": "render() gives NoneType, not"}
    if broken is not Breaks:
        monkeypatch.setattr(probe_envs.Point, "render", lambda self: frames[broken])
    still = lambda observations, rngs: np.zeros((len(observations), 3))  # noqa: E731
    (tmp_path / "video.mp4").write_bytes(b"before")
    record_video(still, Breaks if broken is Breaks else probe_envs.Point, tmp_path / "video.mp4", seed=0)
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"no video: {words[broken]}")
    assert error.endswith(f"; once that is mended, --eval-only {tmp_path} writes it")
    assert [path.name for path in tmp_path.iterdir()] == ["video.mp4"]
    assert (tmp_path / "video.mp4").read_bytes() == b"before"


def test_no_video_of_a_task_that_cannot_be_made_to_render(tmp_path, capsys):
    """A package that only pictures need is missing: the run ended there, and its last evaluation was lost."""
    still = lambda observations, rngs: np.zeros((len(observations), 3))  # noqa: E731
    gym.register("NoPictures-v0", without_pictures, max_episode_steps=20)
    record_video(still, lambda: envs.make("NoPictures-v0", render=True), tmp_path / "video.mp4", seed=0)
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("no video: ") and "--env-id NoPictures-v0: No module named 'pictures'" in error


def without_pictures(render_mode: str | None = None) -> gym.Env:
    if render_mode:
        raise ImportError("No module named 'pictures'")
    return probe_envs.Point()


def test_no_video_on_a_disk_that_is_read_only(tmp_path, capsys, monkeypatch):
    """What was evaluated is reported all the same."""

    def refuse(*_, **__) -> None:
        raise OSError(errno.EROFS, "Read-only file system", "new_video.mp4")

    monkeypatch.setattr(Path, "unlink", refuse)
    monkeypatch.setattr(imageio, "get_writer", refuse)
    record_video(step_number, probe_envs.Point, tmp_path / "video.mp4", seed=0)
    assert "no video: [Errno 30] Read-only file system" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["$lr_$seed", "a$\\x$", "50%"])
def test_a_curve_in_a_folder_of_any_name(tmp_path, name):
    """As of a shell's variables that were not set; matplotlib took them for mathematics and raised."""
    folder = tmp_path / name
    folder.mkdir()
    (folder / "eval.csv").write_text("global_step,eval/success_rate\n5,0\n10,1\n")
    plot_curves(folder, {"eval": ("eval/success_rate",)}, "steps", 1.0)
    assert (folder / "curve.png").stat().st_size > 1000


def test_no_video_without_opengl(tmp_path, capsys):
    """The policy is trained and saved all the same; one line says how to get the video later."""
    still = lambda observations, rngs: np.zeros((len(observations), 1))  # noqa: E731
    record_video(still, probe_envs.NoOpenGL, tmp_path / "video.mp4", seed=0)
    errors = capsys.readouterr().err
    assert "no video" in errors and "libegl1" in errors and f"--eval-only {tmp_path}" in errors
