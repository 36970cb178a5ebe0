"""common/evaluation.py: seeded roll-outs, side by side, in chunks, given up, filmed."""

import math

import gymnasium as gym
import imageio.v2 as imageio
import numpy as np
import probe_envs
import pytest
from gymnasium import spaces

from common import envs
from common.evaluation import evaluate, film, record_video, roll_out


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


def test_pictures_of_a_task_that_gives_several():
    """P2: bc_flow_offline.py's film, too, takes the newest frame."""
    still = lambda observations, rngs: np.zeros((len(observations), 3))  # noqa: E731
    (one,), (other,) = (film(still, task(), 1, 5, 0) for task in (probe_envs.Point, FilmStrip))
    assert one.shape == (4, 64, 64, 3)
    np.testing.assert_array_equal(one, other)


def test_no_video_without_opengl(tmp_path, capsys):
    """The policy is trained and saved all the same; one line says how to get the video later."""
    still = lambda observations, rngs: np.zeros((len(observations), 1))  # noqa: E731
    record_video(still, probe_envs.NoOpenGL, tmp_path / "video.mp4", seed=0)
    errors = capsys.readouterr().err
    assert "no video" in errors and "libegl1" in errors and f"--eval-only {tmp_path}" in errors
