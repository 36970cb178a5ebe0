"""reward_classifier.py: labels, splits, thresholds, and whole runs on small datasets of which the answer is known."""

import json
import math
import os
import re
import shutil
import termios
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from conftest import read_csv, wait_until
from forked import popen_forked, run_forked
from labelled_frames import FINGERPRINT, STEPS, write_frames
from PIL import Image

import reward_classifier as script
import robot_client as rc
from common import envs
from common.success import SuccessDetector, log_odds
from common.vision import make_trunk
from reward_classifier import Args, Clip, Frames, Scored, choose_threshold, frame_labels, measure, split


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    """Local Minari datasets of this test; the folder is the current one. Batches are small, steps large."""
    monkeypatch.setattr(script, "BATCH_SIZE", 24)
    monkeypatch.setattr(script, "LEARNING_RATE", 1e-3)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


ROBOT = {"env_id": "robot_client:FrankaReal-v0"}


def run(**flags: object) -> dict:
    """A whole run in this process with small budgets; what its file holds."""
    args = Args(**{"run_dir": "run", "updates": 60, "threads": 1, "data": ("hil/frames-v0",)} | flags)
    args.check()
    script.main(args)
    return torch.load("run/classifier.pt", weights_only=True)


def scored(odds: list[float], labels: str) -> Scored:
    """An episode; labels are # success, . failure, - left out."""
    kinds = np.array(list(labels))
    return Scored(np.array(odds, float), kinds == "#", kinds == ".")


# --- Labels -----------------------------------------------------------------------------------------------------------
def test_labels_of_steps_belong_to_the_observations_after_them():
    labels = np.array([0, 0, -1, 1, 1], np.int8)
    assert frame_labels({"label": labels}, 6, 2).tolist() == [-1, 0, 0, -1, 1, 1]
    assert frame_labels({"label": np.array([0, 1, 1])}, 3, 2).tolist() == [0, 1, 1]  # one for each observation


def test_demonstrations_have_one_frame_of_success():
    success = np.arange(9) == 8
    assert frame_labels({"success": success}, 10, 2).tolist() == [0, 0, 0, 0, -1, -1, -1, -1, -1, 1]
    assert frame_labels({"success": ~success}, 10, 2).tolist() == [0] * 10
    assert frame_labels({"success": success}, 10, 3)[-1] == 2  # success is the last class


@pytest.mark.parametrize(("said", "verdict", "differ"), [(0, 0, False), (1, 0, True), (0, 1, True), (1, 1, False)])
def test_disagreement(said, verdict, differ):
    infos = {"suggestion": np.array([0, said, 0], bool), "success": np.array([0, 0, verdict], bool)}
    assert script.disagreement(infos) == differ


def test_memory_is_asked_for_before_it_is_taken(datasets, monkeypatch):
    """The episodes', and the labelled frames' that batches are drawn from."""
    write_frames("hil/frames-v0", episodes=4)
    asked = []
    monkeypatch.setattr(script, "check_memory", lambda needed, *_: asked.append(needed))
    _, _, clips, _ = script.gather(Args(data=("hil/frames-v0",)))
    taken = Frames.of(clips, torch.device("cpu")).images.nbytes + sum(clip.images.nbytes for clip in clips)
    assert 0.8 * asked[0] < taken <= asked[0]


# --- Split and batches ------------------------------------------------------------------------------------------------
def clips_of(successes: int, failures: int, added: int = 0) -> list[Clip]:
    images = np.zeros((4, 1, 2, 2, 3), np.uint8)
    kinds = [([0, 0, 1, 1], False)] * successes + [([0, 0, 0, 0], False)] * failures + [([0] * 4, True)] * added
    return [Clip(str(i), images + i, np.array(labels), late) for i, (labels, late) in enumerate(kinds)]


def test_episodes_are_held_out_whole_and_of_each_kind():
    clips = clips_of(successes=10, failures=20, added=3)
    learned, held_out = split(clips, 0.3, seed=1)
    assert sorted(int(clip.name) for clip in learned + held_out) == list(range(33))
    assert sum(clip.labels.max() == 1 for clip in held_out) == 3
    assert sum(clip.labels.max() == 0 and not clip.added for clip in held_out) == 6
    assert sum(clip.added for clip in held_out) == 1
    assert [clip.name for clip in split(clips, 0.3, seed=1)[1]] == [clip.name for clip in held_out]
    assert [clip.name for clip in split(clips, 0.3, seed=2)[1]] != [clip.name for clip in held_out]


def test_a_single_added_episode_is_learned_from():
    learned, _ = split(clips_of(10, 10, added=1), 0.3, seed=1)
    assert sum(clip.added for clip in learned) == 1


def test_batches_have_as_many_frames_of_each_class():
    frames = Frames.of(clips_of(successes=1, failures=30), torch.device("cpu"))
    assert len(frames.labels) == 31 * 4 and int(frames.labels.sum()) == 2
    images, labels = frames.sample(64, 2, torch.Generator().manual_seed(0))
    assert labels.bincount().tolist() == [32, 32]
    assert (images[labels == 1] == 0).all()  # of the first episode
    assert len(images[labels == 0].flatten(1)[:, 0].unique()) > 10


def test_left_out_frames_are_in_no_batch():
    clip = Clip("a", np.arange(4, dtype=np.uint8).reshape(4, 1, 1, 1, 1), np.array([0, -1, 1, -1]))
    frames = Frames.of([clip], torch.device("cpu"))
    assert frames.images.flatten().tolist() == [0, 2] and frames.labels.tolist() == [0, 1]


# --- Threshold --------------------------------------------------------------------------------------------------------
def test_lowest_in_a_row():
    assert script.lowest_in_a_row(np.array([3.0, 1, 4, 1, 5, 9]), 1).tolist() == [3, 1, 4, 1, 5, 9]
    assert script.lowest_in_a_row(np.array([3.0, 1, 4, 1, 5, 9]), 3).tolist() == [-math.inf, -math.inf, 1, 1, 1, 1]
    assert script.lowest_in_a_row(np.array([3.0]), 2).tolist() == [-math.inf]


def test_threshold_is_the_middle_of_the_gap():
    episodes = [scored([-4, -3, 2, 6], "..##"), scored([-5, -1, -2, -3], "....")]
    assert choose_threshold(episodes, 1, 0.0) == pytest.approx(0.5)  # between -1 and 2


def test_threshold_keeps_to_the_budget():
    """One failure of four looks like a success, more than some successes do."""
    failures = [scored([-4] * 4, "....")] * 3 + [scored([-4, 3, 3, -4], "....")]
    successes = [scored([-4, -4, 1, 2], "..##"), scored([-4, -4, 5, 6], "..##")]
    assert choose_threshold(failures + successes, 2, 0.0) > 3
    assert -4 < choose_threshold(failures + successes, 2, 0.2) < 1  # one of six episodes is within the budget


def test_a_single_frame_counts_only_without_hold():
    episodes = [scored([-4, 3, -4, -4], "...."), scored([-4, -4, 1, 2], "..##")]
    assert choose_threshold(episodes, 1, 0.0) > 3
    threshold = choose_threshold(episodes, 2, 0.0)
    assert -4 < threshold < 1
    assert measure(episodes, threshold, 2)["false_successes"] == 0
    assert measure(episodes, threshold, 1)["false_successes"] == 1
    assert choose_threshold([scored([3, -2], ".#")], 2, 0.0) == 3.5  # no failure lasts as long


def test_scores_of_known_episodes():
    episodes = [
        scored([-1, -1, 1, 1], "..##"),  # seen
        scored([-1, 1, 1, -1], ".-##"),  # one of its two frames: not seen
        scored([1, 1, -1, 1], "..##"),  # too early
        scored([-1, -1, -1, -1], "...."),
        scored([-1, 1, 1, -1], "...."),  # a false success
    ]
    row = measure(episodes, 0.0, hold=2)
    assert row["frames"] == 19
    assert row["frames_right"] == pytest.approx((4 + 2 + 1 + 4 + 2) / 19)
    assert (row["failed_episodes"], row["false_successes"]) == (2, 1)
    assert (row["successful_episodes"], row["too_early"]) == (3, 1)
    assert row["seen_successes"] == 2  # the first; the second by a frame that was left out and its first of success
    high, low = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1))
    success, failure = (4 * high + 2 * low) / 6, (4 * high + 9 * low) / 13
    assert row["separation"] == pytest.approx(success - failure)


def test_a_demonstration_that_ends_with_its_first_success_can_be_seen():
    demo = scored([-1, -1, -1, 1], ".--#")
    assert measure([demo], 0.0, hold=2)["seen_successes"] == 1
    assert measure([demo._replace(odds=demo.odds - 2)], 0.0, hold=2)["seen_successes"] == 0


def test_the_worst_frames_are_shown(tmp_path, monkeypatch):
    """The furthest on the wrong side first, two of an episode; what was left out is not judged."""
    titles = []
    monkeypatch.setattr("matplotlib.axes.Axes.set_title", lambda axis, text, **_: titles.append(text.split("\n")[1]))
    clips = [Clip(name, np.zeros((5, 1, 4, 4, 3), np.uint8), None) for name in "ab"]
    heads = [scored([-9, 3, -2, 1, 9], ".#.#-"), scored([1, 8, 4, -7, -2], "..#.#")]
    script.draw_errors(tmp_path / "errors.png", clips, heads, threshold=0.0, count=3)
    assert titles == ["b, frame 1", "b, frame 4", "a, frame 3"]


# --- Training ---------------------------------------------------------------------------------------------------------
def test_the_best_weights_are_those_of_the_best_look(monkeypatch):
    """By the loss of all cameras together, each class counted alike."""
    torch.manual_seed(0)
    classifier = script.SuccessClassifier(("front",), 32)
    trainer = script.Trainer(classifier, Args(), torch.device("cpu"), [])
    frames = Frames(torch.zeros(4, 1, 32, 32, 3, dtype=torch.uint8), torch.tensor([0, 0, 0, 1]))
    parameter = classifier.together[-1].bias
    for number, (failure, success) in enumerate([(0.0, 0.0), (4.0, -1.0), (0.0, 0.0)]):
        rows = torch.tensor([[failure, 0.0]] * 3 + [[0.0, success]])  # logits of all together
        monkeypatch.setattr(script, "answers", lambda *_, rows=rows: torch.stack([-9 * rows, rows], 1))
        with torch.no_grad():
            parameter.fill_(number)
        loss = trainer.look(frames)
        assert loss == pytest.approx((math.log1p(math.exp(-failure)) + math.log1p(math.exp(-success))) / 2)
    with torch.no_grad():
        parameter.fill_(3)
    assert trainer.best_weights["together.4.bias"].tolist() == [1, 1] and trainer.looks == 1


def test_an_update_is_one_gradient_step_with_dropout(monkeypatch):
    torch.manual_seed(0)
    classifier = script.SuccessClassifier(("front",), 32).eval()
    trainer = script.Trainer(classifier, Args(augmentations=()), torch.device("cpu"), [])
    frames = Frames.of([Clip("a", np.zeros((2, 1, 32, 32, 3), np.uint8), np.array([0, 1]))], torch.device("cpu"))
    seen = []
    monkeypatch.setattr(trainer.optimizer, "step", lambda: seen.append(classifier.together[-1].bias.grad.clone()))
    for _ in range(2):
        torch.manual_seed(1)
        trainer.update(frames)
    assert classifier.training and torch.equal(seen[0], seen[1])  # the first one's is not in the second's


def test_what_is_served_is_what_was_graded(datasets, monkeypatch, capsys):
    """The best weights, here the first ones, after as many looks as none was better; at the threshold."""
    write_frames("hil/frames-v0", episodes=6)
    monkeypatch.setattr(script, "LOOK_EVERY", 1)
    together = {"seen_successes": 1, "successful_episodes": 2, "false_successes": 0, "failed_episodes": 2}

    def look(trainer: script.Trainer, frames: Frames) -> float:
        trainer.looks += 1
        return 1.0

    monkeypatch.setattr(script.Trainer, "look", look)
    monkeypatch.setattr(script, "grade", lambda *_: (-2.0, {"held out": {"together": together}}))
    saved = run(updates=50)
    assert read_csv(Path("run"), "train.csv")["global_step"] == list(range(1, 1 + script.PATIENCE))
    first = script.gather(Args(data=("hil/frames-v0",)))[0].state_dict()
    assert all(torch.equal(tensor, saved["weights"][name]) for name, tensor in first.items())
    assert saved["threshold"] == pytest.approx(1 / (1 + math.exp(2)))
    out = capsys.readouterr().out
    assert "1 of 2 successes seen (recall 50%), 0 false ones in 2 failed episodes" in out and "often missing" in out


# --- Whole runs -------------------------------------------------------------------------------------------------------
def test_learns_from_labelled_frames(datasets, capsys):
    write_frames("hil/frames-v0", episodes=14)
    saved = run()
    held_out = saved["about"]["scores"]["held out"]
    assert held_out["wrist"]["frames_right"] == held_out["together"]["frames_right"] == 1.0
    assert held_out["wrist"]["separation"] > 0.7
    assert abs(held_out["front"]["separation"]) < 0.3
    assert held_out["together"]["seen_successes"] == held_out["together"]["successful_episodes"] == 2
    assert held_out["together"]["false_successes"] == 0
    assert (
        saved["fingerprint"] == FINGERPRINT and saved["hold"] == 2 and saved["about"]["trained_on"] == ["hil/frames-v0"]
    )
    assert sorted(saved["arguments"]["cameras"]) == ["front", "wrist"]
    out = capsys.readouterr().out
    assert "camera front tells next to nothing" in out and "camera wrist tells" not in out
    assert "recall 100%" in out and "often missing" not in out
    assert json.loads(Path("run/scores.json").read_text()) == saved["about"]["scores"]
    evaluation = read_csv(Path("run"), "eval.csv")
    assert evaluation["eval/frames_right"] == [1.0] and evaluation["eval/false_successes"] == [0]
    assert evaluation["eval/front_frames_right"][0] == pytest.approx(held_out["front"]["frames_right"])
    losses = read_csv(Path("run"), "train.csv")["losses/held_out"]
    assert losses[-1] < 0.5 * losses[0]
    for name in ("errors.png", "curve.png"):
        picture = np.asarray(Image.open(Path("run", name)))
        assert picture.std() > 5


def test_what_ends_while_it_is_graded_is_gone_on_with(datasets, monkeypatch):
    write_frames("hil/frames-v0", episodes=6)
    grade = script.grade

    def interrupted(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "grade", interrupted)
    with pytest.raises(SystemExit, match="go on with --resume run"):
        run(updates=20)
    monkeypatch.setattr(script, "grade", grade)
    assert run(updates=20, resume="run")["about"]["scores"]
    with pytest.raises(SystemExit, match="run is finished"):
        run(updates=20, resume="run")


def test_serving_gives_the_logits_of_training(datasets):
    """From the dataset to logits, as in training, and frame by frame, as on the robot: the same numbers."""
    write_frames("hil/frames-v0", episodes=6)
    run(updates=20)
    detector = SuccessDetector.load("run/classifier.pt", FINGERPRINT)
    (clip, *_) = script.recorded_clips("--data", "hil/frames-v0", detector.classifier, FINGERPRINT)
    trained = log_odds(script.answers(detector.classifier, torch.from_numpy(clip.images))[:, -1]).sigmoid().numpy()
    episode = next(minari.load_dataset("hil/frames-v0").iterate_episodes())
    served = []
    for t in range(STEPS + 1):
        detector({name: values[t] for name, values in episode.observations.items()})
        served.append(detector.probability)
    np.testing.assert_allclose(served, trained, rtol=1e-5)
    assert np.ptp(trained) > 0.05


def test_one_camera_of_two(datasets):
    write_frames("hil/frames-v0")
    saved = run(cameras=("wrist",), updates=40)
    assert saved["arguments"]["cameras"] == ("wrist",)
    assert list(saved["about"]["scores"]["held out"]) == ["wrist", "together"]


def test_three_classes(datasets):
    write_frames("hil/frames-v0", classes=3)
    saved = run(classes=("nothing", "half", "success"), updates=120)
    assert saved["arguments"]["classes"] == ("nothing", "half", "success")
    assert saved["weights"]["together.4.bias"].shape == (3,)
    held_out = saved["about"]["scores"]["held out"]["together"]
    assert held_out["frames_right"] > 0.95 and held_out["false_successes"] == 0


def test_learns_from_demonstrations_and_a_frozen_trunk(datasets, monkeypatch):
    monkeypatch.setattr("labelled_frames.SIZE", 64)
    torch.manual_seed(5)
    trunk = make_trunk("resnet10", 3)
    torch.save(trunk.state_dict(), "trunk.pt")
    write_frames("hil/demos-v0", episodes=6, labelled=False, fingerprint=None)
    saved = run(data=("hil/demos-v0",), encoder="resnet10", pretrained="trunk.pt", updates=20)
    for name, tensor in trunk.state_dict().items():
        assert torch.equal(saved["weights"][f"trunks.0.{name}"], tensor)
    assert saved["fingerprint"] == {"observations": {"front": [64, 64, 3], "wrist": [64, 64, 3]}}


def test_added_episodes_are_those_where_the_two_disagreed(datasets, capsys):
    write_frames("hil/frames-v0", episodes=12)
    write_frames("hil/more-v0", episodes=12, labelled=False, suggestion="wrong", seed=1)
    Path("earlier").mkdir()
    os.rename("minari/hil/more-v0", "earlier/episodes")  # as in the folder of a run
    saved = run(add=("earlier",), updates=20)
    assert saved["about"]["trained_on"] == ["hil/frames-v0", "earlier"]
    counts = [
        line.split() for line in capsys.readouterr().out.splitlines() if line.startswith(("to learn", "held out"))
    ]
    assert [int(line[3 if line[0] == "to" else 2]) for line in counts[:2]] == [8 + 2, 4 + 1]  # of 12, and of 3


def test_a_run_that_goes_on_is_the_run_that_did_not_stop(datasets):
    write_frames("hil/frames-v0")
    script.main(Args(run_dir="whole", updates=40, threads=1, data=("hil/frames-v0",)))
    script.main(Args(run_dir="parts", updates=20, threads=1, data=("hil/frames-v0",)))
    script.main(Args(run_dir="parts", resume="parts", updates=40, threads=1, data=("hil/frames-v0",)))
    whole, parts = (torch.load(f"{name}/classifier.pt", weights_only=True) for name in ("whole", "parts"))
    assert read_csv(Path("parts"), "train.csv")["global_step"] == [20, 40]
    with pytest.raises(SystemExit, match="parts is finished: --updates 40: it has 40"):
        script.main(Args(run_dir="parts", resume="parts", updates=40, threads=1, data=("hil/frames-v0",)))
    for name, tensor in whole["weights"].items():
        assert torch.equal(tensor, parts["weights"][name]), name
    assert whole["threshold"] == parts["threshold"]
    shutil.rmtree("minari/hil/frames-v0")
    write_frames("hil/frames-v0", episodes=24)  # now it may hold out what it has learned from
    with pytest.raises(SystemExit, match="--data has other episodes now, so that others are held out; start a new run"):
        script.main(Args(run_dir="parts", resume="parts", updates=60, threads=1, data=("hil/frames-v0",)))


def test_the_simulated_peg_without_any_data(tmp_path):
    """As a user does, with a small budget; then its answers live, and on another task and size."""
    flags = ("--simulated-episodes", 10, "--test-episodes", 5, "--updates", 60, "--image-size", 32, "--threads", 1)
    finished = run_forked("reward_classifier.py", *flags, "--run-dir", "run", cwd=tmp_path, timeout=280)
    scores = torch.load(tmp_path / "run" / "classifier.pt", weights_only=True)["about"]["scores"]
    assert scores["held out"]["together"]["separation"] > 0.5
    assert scores["another light"]["together"]["frames"] > 100
    assert "to learn from" in finished.stdout and "another light" in finished.stdout
    live = ("--watch", "run/classifier.pt", "--episodes", 1)
    watched = run_forked("reward_classifier.py", *live, "--image-size", 32, cwd=tmp_path, timeout=280)
    lines = watched.stdout.splitlines()
    assert len([line for line in lines if line.startswith("step ")]) == 100
    assert "|" in lines[0] and "since reset" in lines[0]
    assert lines[-1].startswith("episode 1: 100 steps, in the end p ")
    for flag, value, fault in (
        ("--env-id", "FrankaPickCube-v0", 'task is "FrankaPegInsert-v0" there, "FrankaPickCube-v0" here'),
        ("--image-size", 48, "observations.front is [32, 32, 3] there, [48, 48, 3] here"),
    ):
        refused = run_forked(
            "reward_classifier.py", *live, "--image-size", 32, flag, value, cwd=tmp_path, timeout=280, check=False
        )
        assert refused.returncode == 1 and fault in refused.stderr
        assert refused.stderr.count("\n") == 1 and "classifier.pt" in refused.stderr


class Unsure:
    probability, lowest, highest = 0.5, 0.1, 0.9

    def reset(self) -> None:
        pass

    def __call__(self, obs: dict) -> bool:
        return False


def test_a_person_may_steer_what_is_watched(datasets, monkeypatch, capsys):
    """By the keyboard, also in a simulation; q ends it."""
    primary, secondary = os.openpty()
    steered = []

    class Watched(gym.Env):
        metadata = {"render_fps": 20}
        observation_space = gym.spaces.Dict(front=gym.spaces.Box(0, 255, (32, 32, 3), np.uint8))
        action_space = gym.spaces.Box(-1, 1, (6,), np.float32)

        def reset(self, **_):
            return {}, {}

        def step(self, action):
            steered.append(action.tolist())
            time.sleep(0.05)
            keys = {1: b"w", 20: b"q"}.get(len(steered), b"")
            os.write(primary, keys)
            return {}, 0.0, False, False, {}

    monkeypatch.setattr(script.envs, "make", lambda *_, **__: Watched())
    monkeypatch.setattr(script.rc, "Terminal", partial(rc.Terminal, secondary))
    monkeypatch.setattr(script, "open_detector", lambda *_: Unsure())
    settings = termios.tcgetattr(secondary)
    script.watch(Args(watch="classifier.pt", teleop="keyboard", episodes=2))
    assert termios.tcgetattr(secondary) == settings
    output = capsys.readouterr().out
    assert "w s  forward, back" in output and "    q quit\n" in output and "y success" not in output
    assert 20 <= len(steered) < 60 and output.count("\nepisode ") == 1
    assert [0.125, 0, 0, 0, 0, 0] in steered and [0.0] * 6 in steered
    os.close(primary)
    os.close(secondary)


def test_ctrl_c_saves_and_resume_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    write_frames("hil/frames-v0")
    flags = ("--data", "hil/frames-v0", "--updates", 2000, "--threads", 1, "--run-dir", "run")
    with popen_forked("reward_classifier.py", *flags, cwd=tmp_path) as process:
        wait_until(lambda: (tmp_path / "run" / "checkpoint.pt").exists(), 250)
        os.kill(process.pid, 2)
        process.join(120)
        assert process.exitcode == 1
        errors = process.stderr_path.read_text()
        assert "--resume run" in errors and re.search("stopping: the (update|evaluation) ends first", errors)
    assert not (tmp_path / "run" / "classifier.pt").exists()
    before = read_csv(tmp_path / "run", "train.csv")["global_step"][-1]
    more = ("--resume", "run", "--updates", int(before) + 40)
    run_forked("reward_classifier.py", *more, cwd=tmp_path, timeout=250)
    assert (tmp_path / "run" / "classifier.pt").exists()
    assert read_csv(tmp_path / "run", "train.csv")["global_step"][-1] > before


# --- Simulated episodes -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "successes"),
    [("success", True), ("beside", False), ("stops", False), ("wanders", False), ("out again", True)],
)
def test_scripted_kinds_do_what_they_are_called(kind, successes):
    env = envs.make(script.SIMULATED)
    deepest = []
    for seed in range(3):
        _, info = env.reset(seed=seed)
        actions = script.Script(env, kind, np.random.default_rng(seed))
        results, depth = [], []
        for _ in range(50):
            info = env.step(actions.action(info["success"]))[-1]
            results.append(info["success"])
            depth.append(-float(env.unwrapped.tip_in_hole()[2]))
        deepest.append(max(depth))
        assert any(results) == successes, seed
        if kind == "out again":
            assert not results[-1] and depth[-1] < 0
    if kind == "beside":
        assert max(deepest) < 0.003
    if kind == "stops":
        assert max(deepest) > 0.01  # a near miss


def test_lights_and_noise_change_with_the_episode_and_stay_within_it():
    env = envs.make(script.SIMULATED, image_obs=True, image_size=32)
    plain = env.reset(seed=0)[0]["front"].astype(float)
    here, elsewhere = script.Lights(env, 1, False), script.Lights(env, 1, True)
    means = []
    for light in (here, here, elsewhere, elsewhere):
        obs, _ = light.reset(seed=0)
        assert obs["front"].dtype == np.uint8 and obs["state"].dtype == np.float32
        means.append(obs["front"].mean((0, 1)))
    for a in range(4):
        for b in range(a):
            assert np.abs(means[a] - means[b]).max() > 1
    assert np.abs(plain.mean((0, 1)) - means[0]).max() > 1
    first, second = elsewhere.noisy({"front": plain, "wrist": plain}), elsewhere.noisy({"front": plain, "wrist": plain})
    difference = first["front"].astype(float) - second["front"]
    assert 6 < difference[(first["front"] > 40) & (first["front"] < 215)].std() / math.sqrt(2) < 10.5


# --- Bad input --------------------------------------------------------------------------------------------------------
def fault_of(**flags: object) -> str:
    with pytest.raises(SystemExit) as error:
        run(**flags)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("options", "flags", "fault"),
    [
        ({}, {"data": ("hil/none-v0",)}, "--data hil/none-v0: "),
        ({"successes": False}, {}, "no frame of success in the episodes to learn from"),
        ({"episodes": 2}, {}, "no frame of failure in the episodes held out"),
        ({"classes": 3}, {}, "--data hil/frames-v0: has the labels [-1, 0, 1, 2]; --classes names 2"),
        ({}, {"cameras": ("side", "wrist")}, "--cameras side: hil/frames-v0 has the cameras front, wrist"),
        ({}, {"add": ("hil/frames-v0",)}, "--add hil/frames-v0: does not tell both verdicts"),
        ({"suggestion": "right"}, {"add": ("hil/frames-v0",)}, "person and classifier agree in all of its 12 episodes"),
        ({}, {"encoder": "resnet10"}, "--encoder resnet10: images of 32 pixels are too small"),
        ({}, {"data": (), "add": ("runs/peg",)}, "--add: give the first classifier's --data DATASET"),
        ({}, {"pretrained": "none.pt"}, "--encoder small"),
        ({}, {"hold": 0}, "--hold 0: must be at least 1"),
        ({}, {"false_successes": 1.0}, "--false-successes 1.0"),
        ({}, {"false_successes": -0.1}, "--false-successes -0.1"),
        ({}, {"classes": ("success",)}, "--classes success: at least two different names"),
        ({}, {"watch": "gone.pt", "run_dir": None}, "--watch gone.pt: not there"),
        ({}, {"watch": "gone.pt", "run_dir": None, **ROBOT, "task": "pig"}, "--task pig: there are peg, pick"),
        ({}, {"watch": "gone.pt"}, "--watch: shows a finished classifier, give neither --resume nor --run-dir"),
    ],
)
def test_bad_input_is_named_in_one_line(datasets, options, flags, fault):
    write_frames("hil/frames-v0", **options)
    assert fault in fault_of(**flags)
    assert not Path("run").exists()


def test_robot_that_is_not_there_is_one_line(datasets, monkeypatch):
    monkeypatch.setitem(rc.TASKS, "peg", replace(rc.PEG, wait_s=0.5))
    monkeypatch.setattr(script, "open_detector", lambda *_: None)
    fault = fault_of(watch="classifier.pt", run_dir=None, **ROBOT, server="tcp://127.0.0.1:9", teleop="expert")
    assert "--watch: no answer from tcp://127.0.0.1:9" in fault


def test_a_fault_of_what_is_watched_is_one_line(datasets, monkeypatch):
    class Faulty(gym.Env):
        action_space = gym.spaces.Box(-1, 1, (6,), np.float32)

        def reset(self, **_):
            return {}, {}

        def step(self, action):
            return {}, 0.0, False, True, {"fault": "camera front: newest picture is 0.4 s old"}

        def expert_action(self):
            return np.zeros(6, np.float32)

    monkeypatch.setattr(script.envs, "make", lambda *_, **__: Faulty())
    monkeypatch.setattr(script, "open_detector", lambda *_: Unsure())
    assert fault_of(watch="classifier.pt", run_dir=None).endswith("--watch: camera front: newest picture is 0.4 s old")


def test_datasets_of_other_cameras_are_refused(datasets):
    write_frames("hil/frames-v0")
    cropped = {
        **FINGERPRINT,
        "cameras": [FINGERPRINT["cameras"][0], {"name": "wrist", "crop": [0, 0, 1, 0.5], "fps": 30}],
    }
    write_frames("hil/cropped-v0", fingerprint=cropped)
    fault = fault_of(data=("hil/frames-v0", "hil/cropped-v0"))
    assert "--data hil/cropped-v0: its pictures are others" in fault
    assert "cameras.wrist.crop is [0, 0, 1, 0.5] there, null here" in fault
    write_frames("hil/slower-v0", fingerprint={**FINGERPRINT, "action_scale": [0.01]}, seed=1)
    assert run(data=("hil/frames-v0", "hil/slower-v0"), updates=20)["fingerprint"] == FINGERPRINT


def test_data_without_labels(datasets):
    from gymnasium import spaces
    from minari.data_collector import EpisodeBuffer

    image = spaces.Box(0, 255, (32, 32, 3), np.uint8)
    space, action = spaces.Dict({"front": image}), spaces.Box(-1, 1, (1,), np.float32)
    observations = {"front": np.zeros((4, 32, 32, 3), np.uint8)}
    columns = (np.zeros((3, 1), np.float32), np.zeros(3), np.zeros(3, bool), np.arange(3) == 2)
    buffers = [EpisodeBuffer(0, None, None, observations, *columns, {})]
    minari.create_dataset_from_buffers("hil/frames-v0", buffers, observation_space=space, action_space=action)
    assert "--data hil/frames-v0: says nothing of success (infos/label, infos/success)" in fault_of()


def test_pictures_that_tell_nothing_give_no_classifier(datasets, monkeypatch):
    """Both cameras are covered: every picture is black."""
    monkeypatch.setattr("labelled_frames.picture", lambda *_: np.zeros((32, 32, 3), np.uint8))
    write_frames("hil/frames-v0")
    assert "do not tell success from failure" in fault_of(updates=20)
    assert not Path("run/classifier.pt").exists() and Path("run/errors.png").exists()
