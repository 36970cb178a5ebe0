"""record_demos.py as a user runs it: tiny tasks, a terminal, the simulated robot; killed at any moment."""

import contextlib
import os
import pty
import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import imageio.v3 as imageio
import minari
import numpy as np
import pytest
import recorded_tasks
import torch
from conftest import popen_script, read_csv, run_script, wait_until

import record_demos
import robot_client
from common import envs, recording
from common.episodes import demonstrations
from common.recording import settled
from common.success import SuccessClassifier, SuccessDetector

TESTS = str(Path(__file__).parent)
KILLS = int(os.environ.get("KILLS", 3))  # moments; 20 take some minutes


def record(folder: Path, *flags: object, task: str = "Reach", teleop: str = "expert", check: bool = True):
    """A finished recorder on one of the tiny tasks."""
    flags = ("--env-id", f"recorded_tasks:{task}-v0", "--teleop", teleop, *flags)
    return run_script("record_demos.py", *flags, cwd=folder, env={"PYTHONPATH": TESTS}, check=check, timeout=280)


def refusal(folder: Path, *flags: object, **options) -> str:
    """The one line by which a recorder says no."""
    finished = record(folder, *flags, check=False, **options)
    assert finished.returncode == 1 and "Traceback" not in finished.stderr, finished
    return finished.stderr.splitlines()[-1]


def load(folder: Path, monkeypatch, dataset_id: str = "hil/demos-v0"):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(folder / "minari"))
    return minari.load_dataset(dataset_id)


def check_whole(episode, attributes: dict) -> None:
    """What is stored is what the task gives for the same seed and actions, in each step."""
    env = recorded_tasks.Reach()
    obs, _ = env.reset(seed=attributes["seed"])
    assert len(episode) == attributes["total_steps"] and episode.observations["state"].shape == (len(episode) + 1, 3)
    for t in range(len(episode) + 1):
        assert episode.observations["state"][t].tolist() == obs["state"].tolist()
        assert (episode.observations["front"][t] == obs["front"]).all()
        if t < len(episode):
            obs, *_ = env.step(episode.actions[t])


# --- Scripted demonstrations ------------------------------------------------------------------------------------------
def test_expert_episodes_are_stored_as_they_were(tmp_path, monkeypatch):
    finished = record(tmp_path, "--episodes", 3)
    dataset = load(tmp_path, monkeypatch)
    about = list(dataset.storage.get_episode_metadata(range(3)))
    assert dataset.total_episodes == 3
    for episode, attributes in zip(dataset.iterate_episodes(), about, strict=True):
        check_whole(episode, attributes)
        assert episode.rewards.tolist() == [0.0] * (len(episode) - 1) + [1.0]
        assert not episode.terminations.any()  # the task goes on: it is the recorder that ends the episode
        assert episode.truncations.tolist() == [False] * (len(episode) - 1) + [True]
        assert episode.infos["success"].tolist() == [False] * (len(episode) - 1) + [True]
        assert episode.infos["intervened"].all() and np.array_equal(episode.infos["asked_action"], episode.actions)
        assert np.allclose(np.diff(episode.infos["time_s"]), 1 / 20)
        assert attributes["verdict"] == "success" and attributes["decided_by"] == "task" and attributes["success"]
    assert len({int(attributes["seed"]) for attributes in about}) == 3
    lengths = [len(episode) for episode in dataset.iterate_episodes()]
    assert f"3 episodes, {sum(lengths)} steps" in finished.stdout
    median = float(np.median(lengths))
    assert f"median {median:g}, {min(lengths)} to {max(lengths)} steps" in finished.stdout
    assert f"max_episode_steps = {round(2 * median)}" in finished.stdout
    actions = np.concatenate([episode.actions for episode in dataset.iterate_episodes()])
    shares = " ".join(f"{share:.0%}" for share in (np.abs(actions) > 0.99).mean(0))
    assert f"saturated actions, of each entry: {shares}\n" in finished.stdout
    assert dataset.storage.metadata["fingerprint"]["observations"] == {"front": [16, 24, 3], "state": [3]}


def test_executed_action_is_what_is_learned_from(tmp_path, monkeypatch):
    record(tmp_path, "--episodes", 1, task="Boxed")
    (episode,) = load(tmp_path, monkeypatch).iterate_episodes()
    asked = episode.infos["asked_action"]
    assert np.abs(asked).max() > 0.5 and np.array_equal(episode.actions, np.clip(asked, -0.5, 0.5))


def test_contact_sheet_and_videos_show_the_episodes(tmp_path, monkeypatch):
    record(tmp_path, "--episodes", 2, task="TwoCameras")
    folder = tmp_path / "minari/hil/demos-v0"
    for episode in load(tmp_path, monkeypatch).iterate_episodes():
        video = np.stack(list(imageio.imiter(folder / f"episode_{episode.id}.mp4")))
        assert video.shape == (len(episode) + 1, 16, 48, 3)
    sheet = imageio.imread(folder / "contact_sheet.png")
    assert sheet.shape == (2 * 98, 90 + 6 * (288 + 2), 3)
    first = sheet[:96, 90 : 90 + 288]
    assert abs(int(np.median(first)) - 60) <= 1 and first.max() > 150  # the ground, and the bright pixel


def test_recording_goes_on_with_other_episodes(tmp_path, monkeypatch):
    record(tmp_path, "--episodes", 2)
    finished = record(tmp_path, "--episodes", 4)
    assert "2 episodes are there; recording goes on" in finished.stdout
    assert re.findall(r"^episode (\d+): success", finished.stdout, re.M) == ["2", "3"]
    about = list(load(tmp_path, monkeypatch).storage.get_episode_metadata(range(4)))
    assert len({int(attributes["seed"]) for attributes in about}) == 4
    again = record(tmp_path, "--episodes", 4)
    assert "4 episodes, " in again.stdout and "episode 4" not in again.stdout


@pytest.mark.timeout(1000)
def test_data_is_cloned_and_is_demonstrations(tmp_path, monkeypatch):
    record(tmp_path, "--episodes", 3, "--noise", 0)
    dataset = load(tmp_path, monkeypatch)
    env = envs.make("recorded_tasks:Reach-v0")
    episodes = list(demonstrations("hil/demos-v0", env, seed=1, noise=0.0))
    assert [len(episode.actions) for episode in episodes] == [len(episode) for episode in dataset.iterate_episodes()]
    assert all(episode.info["success"] for episode in episodes)
    with pytest.raises(SystemExit, match=r"--demos hil/demos-v0: is not of this task"):
        list(demonstrations("hil/demos-v0", envs.make("recorded_tasks:Gripper-v0"), seed=1, noise=0.0))
    with pytest.raises(SystemExit, match=r'task is "Reach-v0" there, "Slow-v0" here'):
        list(demonstrations("hil/demos-v0", envs.make("recorded_tasks:Slow-v0"), seed=1, noise=0.0))
    flags = ("--offline-steps", 4, "--batch-size", 4, "--encoder", "impala_small", "--hidden-dims", 16)
    flags += ("--eval-episodes", 2, "--log-interval", 2, "--num-workers", 1, "--no-capture-video")
    for loading in ("memory", "workers"):
        where = ("--data-loading", loading, "--run-dir", loading)
        cloned = run_script(
            "bc_flow_offline.py",
            *("--env-name", "hil/demos-v0", *flags, *where),
            cwd=tmp_path,
            env={"PYTHONPATH": TESTS},
            timeout=400,
        )
        assert f"3 of 3 episodes, {dataset.total_steps} steps" in cloned.stdout
        assert "no evaluation" not in cloned.stderr  # the task comes back from the dataset


def test_failures_are_kept_and_named(tmp_path, monkeypatch):
    finished = record(tmp_path, "--episodes", 2, task="Stuck")
    about = list(load(tmp_path, monkeypatch).storage.get_episode_metadata(range(3)))
    assert [attributes["verdict"] for attributes in about] == ["success", "failure", "success"]
    assert [bool(attributes["success"]) for attributes in about] == [True, False, True]
    assert about[1]["total_steps"] == 30  # its time was up
    assert "successes: 2 of 3" in finished.stdout
    share = float(re.search(r"--top-fraction ([\d.]+)", finished.stdout)[1])
    assert np.ceil(share * 3) == 2  # as bc_flow_offline.py counts


def test_gripper_that_never_closes_is_a_warning(tmp_path):
    assert "warning: the gripper is never told to close" in record(tmp_path, "--episodes", 1, task="Gripper").stderr
    assert "warning" not in record(tmp_path / "other", "--episodes", 1).stderr


# --- Kept whatever happens --------------------------------------------------------------------------------------------
@pytest.mark.timeout(2000)
def test_kill_at_any_moment_keeps_every_finished_episode(tmp_path, monkeypatch):
    rng = np.random.default_rng()
    flags = ("--env-id", "recorded_tasks:Reach-v0", "--teleop", "expert", "--episodes", 100_000)
    known = 0
    for _ in range(KILLS):
        with popen_script("record_demos.py", *flags, cwd=tmp_path, env={"PYTHONPATH": TESTS}) as process:
            wait_until(lambda process=process: "episode" in process.stdout_path.read_text())
            time.sleep(rng.uniform(0, 1))
            process.kill()
            process.wait()
        told = [int(number) for number in re.findall(r"^episode (\d+): ", process.stdout_path.read_text(), re.M)]
        assert told == list(range(known, known + len(told)))  # the earlier ones are not recorded over
        dataset = load(tmp_path, monkeypatch)  # as it is, before the recorder mends anything
        assert known + len(told) <= dataset.total_episodes + 1  # told after it was written
        known = known + len(told)
        assert dataset.total_episodes >= known
        about = list(dataset.storage.get_episode_metadata(range(dataset.total_episodes)))
        for number in range(max(known - 3, 0), dataset.total_episodes):
            check_whole(dataset[number], about[number])
        known = len(list((tmp_path / "minari/hil/demos-v0/data").glob("episode_*.hdf5")))
    assert record(tmp_path, "--episodes", 1).returncode == 0
    dataset = load(tmp_path, monkeypatch)
    assert dataset.total_episodes == known
    assert dataset.total_steps == sum(len(episode) for episode in dataset.iterate_episodes())


def test_ctrl_c_ends_it_without_the_running_episode(tmp_path, monkeypatch):
    flags = ("--env-id", "recorded_tasks:Slow-v0", "--teleop", "expert")
    with popen_script("record_demos.py", *flags, cwd=tmp_path, env={"PYTHONPATH": TESTS}) as process:
        wait_until(lambda: "episode 0: success" in process.stdout_path.read_text())
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 0
    assert "hil/demos-v0: 1 episodes" in process.stdout_path.read_text()
    assert load(tmp_path, monkeypatch).total_episodes == 1


def test_ctrl_c_while_it_sums_up_is_one_line(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setattr(record_demos, "sum_up", stop)
    args = record_demos.Args(env_id="recorded_tasks:Reach-v0", teleop="expert", episodes=1, dataset="hil/demos-v0")
    with pytest.raises(SystemExit, match="^stopped; the same command goes on with what is recorded$"):
        record_demos.main(args)
    assert load(tmp_path, monkeypatch).total_episodes == 1
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
        signal.signal(number, handler)


def test_second_recorder_is_refused(tmp_path, monkeypatch):
    flags = ("--env-id", "recorded_tasks:Slow-v0", "--teleop", "expert")
    with popen_script("record_demos.py", *flags, cwd=tmp_path, env={"PYTHONPATH": TESTS}) as process:
        wait_until(lambda: "episode 0" in process.stdout_path.read_text())
        line = refusal(tmp_path, task="Slow")
        assert f"hil/demos-v0: process {process.pid} is recording to it" in line
        assert load(tmp_path, monkeypatch).total_episodes >= 1  # and it can be read meanwhile
    assert record(tmp_path, "--episodes", 1, task="Slow").returncode == 0  # the dead one's lock is no lock


def test_full_disk_is_seen_before_the_episode(tmp_path, monkeypatch):
    line = refusal(tmp_path, task="FullDisk")
    assert "hil/demos-v0: 1 MB are free in" in line and "the 2 episodes that have ended are there" in line
    assert load(tmp_path, monkeypatch).total_episodes == 2


def test_disk_that_fills_up_costs_one_episode(tmp_path, monkeypatch):
    line = refusal(tmp_path, task="DiskFills")
    assert "No space left on device" in line and "make room" in line
    dataset = load(tmp_path, monkeypatch)
    assert [len(episode) for episode in dataset.iterate_episodes()] == [dataset.total_steps]
    assert not list((tmp_path / "minari/hil/demos-v0/data").glob("episode_1*"))


def test_episode_with_a_fault_is_not_kept(tmp_path, monkeypatch):
    finished = record(tmp_path, "--episodes", 2, task="Faulty")
    assert "episode 1, step 3: camera front: newest picture is 0.4 s old\nepisode 1 is not kept\n" in finished.stdout
    dataset = load(tmp_path, monkeypatch)
    assert dataset.total_episodes == 2 and not any("fault" in str(episode.infos) for episode in dataset)


# --- Refused in one line ----------------------------------------------------------------------------------------------
def test_bad_flags(tmp_path):
    for flags, message in (
        (("--dataset", "no version"), "--dataset no version: "),
        (("--episodes", 0), "--episodes 0: give at least 1"),
        (("--max-episode-steps", 0), "--max-episode-steps 0: give at least 1"),
        (("--noise", 2), "--noise 2.0: give a number from 0 to 1"),
        (("--task", "pegs"), "--task pegs: there are peg, pick"),
        (("--classes", 3), "--classes 3: a person labels them"),
        (("--wait-for-key",), "--wait-for-key: standard input is no terminal"),
    ):
        with contextlib.chdir(tmp_path), pytest.raises(SystemExit, match=re.escape(message)):
            record_demos.main(
                record_demos.parse(
                    record_demos.Args,
                    record_demos.__doc__,
                    "",
                    ["--env-id", "recorded_tasks:Reach-v0", "--teleop", "expert", *map(str, flags)],
                )
            )


def test_unknown_tasks_are_refused(tmp_path):
    assert "--env-id recorded_tasks:Raech-v0: " in refusal(tmp_path, task="Raech")
    assert "--env-id recorded_tasks:Uninstalled-v0: pygame is not" in refusal(tmp_path, task="Uninstalled")
    flags = ("--env-id", "Pendulum-v1", "--teleop", "expert")
    finished = run_script("record_demos.py", *flags, cwd=tmp_path, check=False)
    assert "--teleop expert: Pendulum-v1 has no expert_action()" in finished.stderr
    for mode in ("demos", "classifier"):
        assert "Silent-v0: does not say what success is" in refusal(tmp_path / mode, "--mode", mode, task="Silent")
    for task, message in (("Pendulum-v1", "has 1 actions; a hand gives 3 or 6"), ("CartPole-v1", "must be a Box")):
        finished = run_script("record_demos.py", "--env-id", task, cwd=tmp_path, check=False)
        assert message in finished.stderr and "Traceback" not in finished.stderr


def test_server_that_does_not_run_is_one_line(tmp_path):
    args = record_demos.Args(teleop="expert", server="tcp://127.0.0.1:9", dataset="hil/peg-v0")
    began = time.monotonic()
    with pytest.raises(SystemExit, match=r"--server: no answer from tcp://127.0.0.1:9 .*is robot_server.py running"):
        record_demos.make_env(args)
    assert time.monotonic() - began < 20


def test_dataset_of_another_set_up_is_refused(tmp_path):
    record(tmp_path, "--episodes", 1)
    line = refusal(tmp_path, task="TwoCameras")
    assert line == (
        "record_demos.py: --dataset hil/demos-v0: is of another set-up: observations.side is only here; "
        'task is "Reach-v0" there, "TwoCameras-v0" here'
    )
    line = refusal(tmp_path, "--mode", "classifier", "--dataset", "hil/demos-v0")
    assert "hil/demos-v0: its mode is demos, not classifier; give another name" in line


def test_a_dataset_in_which_nothing_was_recorded_binds_nobody(tmp_path):
    assert "terminal" in refusal(tmp_path, task="TwoCameras", teleop="keyboard")
    assert not (tmp_path / "minari/hil/demos-v0").exists()
    record(tmp_path, "--episodes", 1)


def test_hands_that_are_not_there(tmp_path):
    assert "standard input is no terminal" in refusal(tmp_path, teleop="keyboard")
    primary, secondary = pty.openpty()
    flags = ("--env-id", "recorded_tasks:Reach-v0", "--teleop", "spacemouse")
    with popen_script("record_demos.py", *flags, cwd=tmp_path, env={"PYTHONPATH": TESTS}, stdin=secondary) as process:
        assert process.wait(120) == 1
    error = process.stderr_path.read_text()
    assert "SpaceMouse: " in error and "Devices that are plugged in: " in error and "99-spacemouse.rules" in error
    assert "Traceback" not in error
    os.close(primary)
    os.close(secondary)


# --- In a terminal ----------------------------------------------------------------------------------------------------
class Person:
    """Types into the terminal of a recorder that runs, and reads what it says."""

    def __init__(self, folder: Path, *flags: object, task: str = "Reach"):
        self.primary, self.secondary = pty.openpty()
        flags = ("--env-id", f"recorded_tasks:{task}-v0", *flags) if task else flags
        self.context = popen_script(
            "record_demos.py", *flags, cwd=folder, env={"PYTHONPATH": TESTS}, stdin=self.secondary
        )
        self.read = 0

    def __enter__(self) -> "Person":
        self.process = self.context.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self.context.__exit__(*error)
        os.close(self.primary)
        os.close(self.secondary)

    def waits_for(self, text: str) -> None:
        """Until the recorder has said this, since the last time."""

        def said() -> bool:
            output = self.process.stdout_path.read_text()
            at = output.find(text, self.read)
            if at >= 0:
                self.read = at + len(text)
            assert at >= 0 or self.process.poll() is None, self.output()
            return at >= 0

        wait_until(said, 120)

    def types(self, keys: str, then_s: float = 0.0) -> None:
        os.write(self.primary, keys.encode())
        time.sleep(then_s)

    def output(self) -> str:
        return self.process.stdout_path.read_text() + self.process.stderr_path.read_text()

    def quits(self) -> str:
        self.types("q")
        assert self.process.wait(120) == 0, self.output()
        return self.output()


def test_keys_decide_about_episodes(tmp_path, monkeypatch):
    with Person(tmp_path) as person:
        for keys, said in (
            ("y", "episode 0: success"),
            ("n", "episode 1: failure"),
            ("x", "episode 2 is not kept"),
            ("y", "episode 2: success"),
        ):
            person.waits_for("ready: move to begin")
            person.types("w", then_s=0.4)
            person.types(keys)
            person.waits_for(said)
        person.waits_for("ready")
        person.types("z")
        person.waits_for("undone: episode 2 (success")
        person.types("z", then_s=1.0)  # still the same press
        person.types("z")
        person.waits_for("undone: episode 1 (failure")
        output = person.quits()
    assert "1 episodes" in output and output.count("undone") == 2
    dataset = load(tmp_path, monkeypatch)
    (episode,) = dataset.iterate_episodes()
    (attributes,) = dataset.storage.get_episode_metadata([0])
    check_whole(episode, attributes)
    assert attributes["decided_by"] == "person" and attributes["verdict"] == "success"
    assert episode.rewards.tolist() == [0.0] * (len(episode) - 1) + [1.0]
    assert episode.terminations.tolist() == [False] * (len(episode) - 1) + [True] and not episode.truncations.any()
    assert episode.infos["intervened"][0] and episode.actions[0].tolist() == pytest.approx([0.125, 0, 0])


def test_verdict_on_an_experts_episode_is_the_persons(tmp_path, monkeypatch):
    """The task had not rewarded it."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    args = record_demos.Args(teleop="expert", env_id="recorded_tasks:Reach-v0", episodes=1, dataset="hil/demos-v0")
    env = record_demos.make_env(args)
    folder = recording.dataset_folder(args.dataset, "--dataset")
    kept = recording.Recording(folder, args.dataset, env, {"mode": "demos", "classes": 2})
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    typed = iter([[], [], ["success"]])
    terminal = SimpleNamespace(fault="", commands=lambda: next(typed, []), forget=list, quits=lambda: False)
    record_demos.Session(args, env, kept, robot_client.ScriptedExpert(seed=1), terminal).run()
    (episode,) = load(tmp_path, monkeypatch).iterate_episodes()
    (attributes,) = kept.episodes
    assert attributes["decided_by"] == "person" and attributes["verdict"] == "success"
    assert len(episode) == 2
    assert episode.rewards.tolist() == [0.0] * (len(episode) - 1) + [1.0] and episode.terminations[-1]


class Hand:
    """Asks for more than the arm does; is unplugged while an episode goes on."""

    fault, forgotten = "", 0

    def forget(self) -> None:
        self.forgotten += 1

    def read(self, env: gym.Env) -> np.ndarray:
        return np.full(3, 3.0, np.float32)

    def motion(self) -> tuple[np.ndarray, float]:
        return np.zeros(6), 0.0


def test_a_session_of_a_person(tmp_path, monkeypatch, capsys):
    """The next seed, the label at a reset, what is executed, and a hand that fails: it waits for Enter."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    args = record_demos.Args(env_id="recorded_tasks:Reach-v0", dataset="hil/demos-v0")
    env = record_demos.make_env(args)
    folder = recording.dataset_folder(args.dataset, "--dataset")
    kept = recording.Recording(folder, args.dataset, env, {"mode": "demos", "classes": 2})
    kept.episodes = [{"attempt": 5}, {"attempt": 3}]  # others were discarded
    typed = iter([[], ["success"], [], ["go on"]])
    terminal = SimpleNamespace(fault="", commands=lambda: next(typed), forget=list, quits=lambda: False)
    hand = Hand()
    session = record_demos.Session(args, env, kept, hand, terminal)
    assert session.attempt == 6
    session.label = 1
    obs = session.reset()
    assert session.label == 0 and hand.forgotten == 1
    _, (step,), verdict = session.record(obs)
    assert step.action.tolist() == [1, 1, 1] and step.asked.tolist() == [3, 3, 3] and verdict == "success"
    hand.fault = "the SpaceMouse is gone"
    assert session.heed([obs]) == "" and hand.forgotten == 2
    assert "the SpaceMouse is gone: Enter goes on" in capsys.readouterr().out


def test_failure_and_time_limit_truncate(tmp_path, monkeypatch):
    with Person(tmp_path, "--max-episode-steps", 35) as person:
        person.waits_for("ready")
        person.types("w", then_s=0.3)
        person.types("n")
        person.waits_for("ready")
        person.types("w")
        person.waits_for("it has ended: y success, n failure, x discard")  # after 35 steps
        person.types("y")
        person.waits_for("episode 1: success, 35 steps")
        person.quits()
    failed, won = load(tmp_path, monkeypatch).iterate_episodes()
    assert failed.truncations[-1] and not failed.terminations.any() and not failed.rewards.any()
    assert won.terminations[-1] and not won.truncations.any() and won.rewards.sum() == 1
    assert won.infos["intervened"][0] and not won.infos["intervened"][-1]  # it was let go, and stood still
    assert won.actions[-1].tolist() == [0, 0, 0]


def test_idling_before_the_first_input_is_no_part_of_it(tmp_path, monkeypatch):
    with Person(tmp_path) as person:
        person.waits_for("ready")
        time.sleep(1.5)  # 30 steps
        person.types("a", then_s=0.3)
        person.types("y")
        person.waits_for("episode 0: success")
        person.quits()
    (episode,) = load(tmp_path, monkeypatch).iterate_episodes()
    assert len(episode) < 25 and episode.infos["intervened"][0]


def test_keys_pressed_during_a_reset_have_no_effect(tmp_path, monkeypatch):
    with Person(tmp_path, task="Slow") as person:
        person.waits_for("ready")
        person.types("w", then_s=0.3)
        person.types("y")
        person.waits_for("episode 0: success")
        person.types("nw", then_s=0.2)  # while it resets for a second
        person.waits_for("pressed during the reset, so without effect: failure")
        person.waits_for("ready")
        person.types("d", then_s=0.3)
        person.types("y")
        person.waits_for("episode 1: success")
        person.quits()
    first, second = load(tmp_path, monkeypatch).iterate_episodes()
    assert second.actions[0].tolist() == pytest.approx([0, -0.125, 0])  # d, not the w of before


def test_pause_during_a_reset_is_heeded_after_it(tmp_path):
    with Person(tmp_path, "--teleop", "expert", "--episodes", 2, task="Slow") as person:
        person.waits_for("keys: y success   n failure")  # none of those that move the arm, where they do nothing
        person.waits_for("episode 0: success")
        assert "forward, back" not in person.output()
        person.types("yp")  # while it resets for a second
        person.waits_for("pressed during the reset, so without effect: success")
        person.waits_for("paused: Enter goes on")
        time.sleep(1.0)
        assert "episode 1" not in person.output()
        person.types("\n")
        person.waits_for("episode 1: success")
        assert person.process.wait(120) == 0, person.output()


def test_quit_during_a_reset_comes_before_the_next_episode(tmp_path):
    with Person(tmp_path, "--teleop", "expert", task="Slow") as person:
        person.waits_for("episode 0: success")
        output = person.quits()
    assert "hil/demos-v0: 1 episodes" in output and "episode 1" not in output


def test_held_key_is_one_verdict(tmp_path):
    with Person(tmp_path) as person:
        person.waits_for("ready")
        person.types("w", then_s=0.3)
        for _ in range(20):
            person.types("y", then_s=0.05)
        person.types("w", then_s=0.5)
        output = person.quits()
    assert re.findall(r"^episode \d+: .*", output, re.M) == [output[output.index("episode 0") :].splitlines()[0]]


def test_pause_holds_and_goes_on(tmp_path, monkeypatch):
    with Person(tmp_path) as person:
        person.waits_for("ready")
        person.types("w", then_s=0.2)
        person.types("p")
        person.waits_for("paused: Enter goes on")
        time.sleep(2.0)  # 40 steps, more than an episode has
        person.types("\n", then_s=0.2)
        person.types("y")
        person.waits_for("episode 0: success")
        person.waits_for("ready")
        person.types("w", then_s=0.2)
        person.types("p")
        person.waits_for("paused")
        person.types("n")
        person.waits_for("episode 1: failure")
        person.quits()
    first, _ = load(tmp_path, monkeypatch).iterate_episodes()
    assert len(first) < 30 and first.infos["time_s"][-1] == pytest.approx(len(first) / 20)
    assert first.infos["late_s"].max() < 1  # a pause is none of it


def test_enter_begins_when_the_scene_is_restored(tmp_path, monkeypatch):
    with Person(tmp_path, "--wait-for-key", "--teleop", "expert", "--episodes", 1) as person:
        person.waits_for("ready: restore the scene, then Enter; to go: 1 successes")
        time.sleep(0.5)
        assert "episode 0" not in person.output()
        person.types("\n")
        person.waits_for("episode 0: success")
        assert person.process.wait(120) == 0
    assert load(tmp_path, monkeypatch).total_episodes == 1


def test_person_goes_on_when_the_robot_may_move_again(tmp_path, monkeypatch):
    with Person(tmp_path, "--episodes", 2, task="Stopped") as person:
        for said in ("episode 0: success", "episode 1: success"):
            person.waits_for("ready")
            person.types("w", then_s=0.8)  # a second y that comes sooner would be the first one, held
            person.types("y")
            person.waits_for(said)
            if said.startswith("episode 0"):
                person.waits_for("the stop button is pressed. Enter goes on with the next episode, q ends")
                person.types("\n")
        assert person.process.wait(120) == 0, person.output()
    assert load(tmp_path, monkeypatch).total_episodes == 2
    line = refusal(tmp_path / "alone", task="Stopped")  # where nobody can press Enter
    assert line.endswith(
        "the stop button is pressed; the 1 episodes that have ended are kept, the same command goes on"
    )


def test_undo_does_not_reach_an_earlier_session(tmp_path, monkeypatch):
    record(tmp_path, "--episodes", 1)
    with Person(tmp_path) as person:
        person.waits_for("ready")
        person.types("z")
        person.waits_for("nothing of this session to undo")
        person.quits()
    assert load(tmp_path, monkeypatch).total_episodes == 1


# --- Frames for a classifier ------------------------------------------------------------------------------------------
def test_near_misses_are_frames_beside_a_success():
    labels = np.array([0, 0, 0, -1, 1, -1, 0, 0, 0, 0], np.int8)
    near = record_demos.near_misses(labels, 1, 3)
    assert np.flatnonzero(near).tolist() == [1, 2, 6, 7]
    assert record_demos.count_labels([labels, labels[:3]], 2, 1.0) == {"label 0": 10, "label 1": 1, "near misses": 2}
    labels = np.array([0] * 6 + [1] * 4 + [2] * 4, np.int8)  # success is the last one
    assert record_demos.count_labels([labels], 3, 1.0) == {
        "label 0": 6, "label 1": 4, "label 2": 4, "near misses": 2,
    }  # fmt: skip


def test_expert_labels_frames_until_there_are_enough(tmp_path, monkeypatch):
    finished = record(tmp_path, "--mode", "classifier", "--frames", 40, "--margin", 2)
    dataset = load(tmp_path, monkeypatch, "hil/frames-v0")
    assert dataset.storage.metadata["mode"] == "classifier"
    about = list(dataset.storage.get_episode_metadata(range(dataset.total_episodes)))
    together = []
    for episode, attributes in zip(dataset.iterate_episodes(), about, strict=True):
        check_whole(episode, attributes)
        assert len(episode) == 30 and attributes["verdict"] == "none"  # success does not end it
        inside = np.linalg.norm(episode.observations["state"][1:], axis=1) < recorded_tasks.NEAR
        labels = episode.infos["label"]
        assert (labels == settled(inside.astype(np.int8), 2)).all()
        assert (episode.rewards == (labels == 1)).all() and not episode.terminations.any()
        together.append(labels)
    counts = record_demos.count_labels(together, 2, 20)
    assert counts["label 1"] >= 40 and counts["label 0"] >= 80 and counts["near misses"] >= 20
    enough = record_demos.count_labels(together[:-1], 2, 20)
    assert enough["label 1"] < 40 or enough["label 0"] < 80 or enough["near misses"] < 20
    assert ", ".join(f"{count} of {name}" for name, count in counts.items()) in finished.stdout
    left_out = sum(int((labels < 0).sum()) for labels in together)
    assert left_out > 0 and f"left out, close to a change of label: {left_out} frames" in finished.stdout


def test_margin_that_leaves_no_near_misses_is_refused(tmp_path):
    """It would never end."""
    line = refusal(tmp_path, "--mode", "classifier", "--margin", 20)
    assert line.endswith("--margin 20: leaves no near misses, 2 s around a success; give at most 19")
    labels = settled(np.repeat(np.array([0, 1, 0], np.int8), 50), 19)
    assert record_demos.count_labels([labels], 2, 20.0)["near misses"] == 4


def test_key_toggles_the_label(tmp_path, monkeypatch):
    flags = ("--mode", "classifier", "--margin", 1, "--classes", 3)
    with Person(tmp_path, *flags) as person:
        person.waits_for("ready: move to begin; to go: 400 of label 0, 200 of label 1, 200 of label 2")
        person.types("w", then_s=0.3)
        person.types("t", then_s=0.4)
        person.types("p")  # Reach has no time limit that counts here
        person.waits_for("paused")
        time.sleep(0.5)  # a second press at once would be the first one
        person.types("t")
        person.types("\n", then_s=0.3)
        person.types("y")
        person.waits_for("episode 0: labelled")
        person.quits()
    (episode,) = load(tmp_path, monkeypatch, "hil/frames-v0").iterate_episodes()
    labels = episode.infos["label"].tolist()
    order = [label for i, label in enumerate(labels) if i == 0 or label != labels[i - 1]]
    assert order == [0, -1, 1, -1, 2] and labels.count(-1) == 4


class Suggestion:
    """A classifier that says success in the second frame."""

    probability = 0.5

    def reset(self):
        self.frames = 0

    def __call__(self, obs):
        self.frames += 1
        return self.frames == 2


def test_suggestions_are_stored_and_disagreements_counted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("common.success.open_detector", lambda path, option, env: Suggestion())
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setattr(recorded_tasks.Reach, "resets", 0)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    flags = ["--env-id", "recorded_tasks:Stuck-v0", "--teleop", "expert", "--episodes", "2", "--classifier", "file"]
    record_demos.main(record_demos.parse(record_demos.Args, record_demos.__doc__, "", flags))
    output = capsys.readouterr().out
    assert re.findall(r"episode \d: \w+, \d+ steps; THE CLASSIFIER DISAGREES", output) == [
        "episode 1: failure, 30 steps; THE CLASSIFIER DISAGREES"
    ]
    assert "classifier and verdict disagree in 1 episodes: [1]" in output
    dataset = minari.load_dataset("hil/demos-v0")
    for episode in dataset.iterate_episodes():
        assert np.flatnonzero(episode.infos["suggestion"]).tolist() == [1]
    about = dataset.storage.get_episode_metadata(range(3))
    assert [bool(attributes["disagreement"]) for attributes in about] == [False, True, False]


def save_classifier(path: Path, camera: str, env: gym.Env) -> None:
    """One that takes every picture for a success, from the third of an episode on."""
    torch.manual_seed(1)
    classifier = SuccessClassifier((camera,), 32)
    shown = recording.fingerprint(env)
    shown["observations"] = {camera: [32, 32, 3]}
    torch.save(SuccessDetector(classifier, 0.0, 3, shown, {}).contents(), path)


def test_classifier_of_a_file_suggests(tmp_path, monkeypatch):
    env = envs.make("recorded_tasks:Square-v0")
    save_classifier(tmp_path / "front.pt", "front", env)
    finished = record(tmp_path, "--episodes", 1, "--classifier", "front.pt", task="Square")
    assert "classifier and verdict disagree in 0 episodes: []" in finished.stdout
    (episode,) = load(tmp_path, monkeypatch).iterate_episodes()
    assert episode.infos["suggestion"].tolist() == [False, False] + [True] * (len(episode) - 2)
    save_classifier(tmp_path / "side.pt", "side", env)
    assert "--classifier side.pt: was trained on other pictures: " in refusal(
        tmp_path, "--episodes", 2, "--classifier", "side.pt", task="Square"
    )
    assert "--classifier none.pt: not there" in refusal(tmp_path, "--classifier", "none.pt", task="Square")


# --- Through robot_server.py ------------------------------------------------------------------------------------------
@contextlib.contextmanager
def served(folder: Path, *flags: object):
    """Flags for a recorder on a running server."""
    with popen_script("robot_server.py", "--port", 0, *flags, cwd=folder) as process:
        wait_until(lambda: "serving on" in process.stdout_path.read_text() or process.poll() is not None)
        assert process.poll() is None, process.stderr_path.read_text()
        address = process.stdout_path.read_text().split("serving on ")[1].split()[0]
        yield ("--server", address)


def test_expert_demonstrates_through_the_server(tmp_path, monkeypatch):
    with served(tmp_path, "--env-id", "FrankaPegInsert-v0") as server:
        flags = ("--teleop", "expert", *server, "--noise", 0.05)
        finished = run_script("record_demos.py", *flags, "--episodes", 2, cwd=tmp_path, timeout=280)
        wrong = run_script("record_demos.py", *flags, "--task", "pick", cwd=tmp_path, check=False)
    assert "is of another set-up: action_scale is" in wrong.stderr and "Traceback" not in wrong.stderr
    assert re.search(r"steps come [\d.]+ ms late at the median", finished.stdout)
    dataset = load(tmp_path, monkeypatch)
    assert dataset.storage.metadata["fingerprint"] == robot_client.TASKS["peg"].fingerprint()
    assert dataset.recover_environment().unwrapped.config.fingerprint() == dataset.storage.metadata["fingerprint"]
    for episode in dataset.iterate_episodes():
        if not episode.infos["success"][-1]:
            continue
        assert episode.terminations[-1] and not episode.truncations.any()
        assert episode.rewards.tolist() == [0.0] * (len(episode) - 1) + [1.0]
        for name in ("front", "wrist"):
            frames = episode.observations[name].astype(int)
            assert frames.shape == (len(episode) + 1, 128, 128, 3) and frames.std() > 20
            moving = np.abs(np.diff(episode.observations["state"], axis=0)[:, 4:7]).max(1) > 0.002  # tcp, m
            changed = np.abs(np.diff(frames, axis=0)).max((1, 2, 3)) > 0
            assert moving.any() and changed[moving].all()  # pictures and states are of the same moments
        assert (np.abs(episode.actions) <= 1).all() and episode.actions.shape[1] == 7
        assert np.abs(episode.actions).max() > 0.3 and episode.infos["asked_action"].shape == episode.actions.shape
        assert np.diff(episode.infos["time_s"]).min() > 0.05


def test_person_demonstrates_through_the_server(tmp_path, monkeypatch):
    """The arm holds while a person waits, pauses and is asked; each episode begins with what is seen then."""
    with served(tmp_path, "--env-id", "FrankaPegInsert-v0") as server, Person(tmp_path, *server, task="") as person:
        person.waits_for("ready: move to begin")
        time.sleep(2.0)
        person.types("r", then_s=1.0)  # up
        person.types("p")
        person.waits_for("paused")
        time.sleep(2.0)
        person.types("\n", then_s=0.3)
        person.types("s", then_s=1.0)  # back
        person.types("y")
        person.waits_for("episode 0: success")
        person.waits_for("ready: move to begin")
        person.types("f", then_s=0.5)
        person.types("x")
        person.waits_for("episode 1 is not kept")
        person.waits_for("ready")
        output = person.quits()
    (episode,) = load(tmp_path, monkeypatch).iterate_episodes()
    assert 15 < len(episode) < 60 and "fault" not in output
    position = episode.observations["state"][:, 4:7]  # in the frame where the episode began, the tcp looks down
    steered = np.flatnonzero(episode.infos["intervened"])
    assert steered[0] == 0 and len(steered) >= 8
    assert np.linalg.norm(position[0]) < 0.002  # it stood still until then
    assert position[:, 2].min() < -0.01 and np.ptp(position[:, 0]) > 0.01  # went up, then back
    assert np.abs(episode.actions[~episode.infos["intervened"]]).max() < 1e-6
    assert episode.terminations[-1] and episode.rewards.sum() == 1
    assert np.diff(episode.infos["time_s"]).min() > 0.05 and episode.infos["late_s"].max() > 0


def test_quit_stops_the_robot_on_its_way_to_the_start(tmp_path):
    with (
        served(tmp_path, "--env-id", "FrankaPegInsert-v0") as server,
        contextlib.closing(robot_client.RobotClient(server[1])) as observer,
        Person(tmp_path, *server, task="") as person,
    ):
        wait_until(lambda: observer.state()["mode"] == "streaming" or person.process.poll() is not None)
        output = person.quits()
        wait_until(lambda: observer.state()["mode"] in ("hold", "idle"), 5)
    assert "the reset was given up, the arm holds" in output
    assert "ready" not in output and "Traceback" not in output


@pytest.mark.timeout(1000)
def test_data_of_the_robot_is_cloned_and_the_clone_is_evaluated_on_it(tmp_path):
    """With chunks of actions, of which the robot gets one at each of its beats."""
    with served(tmp_path, "--env-id", "FrankaPegInsert-v0") as server:
        run_script("record_demos.py", "--teleop", "expert", "--episodes", 2, *server, cwd=tmp_path, timeout=280)
        flags = ("--env-name", "hil/demos-v0", "--action-chunking", "--horizon-length", 4, "--run-dir", "run")
        flags += ("--offline-steps", 4, "--log-interval", 2, "--batch-size", 4, "--hidden-dims", 16)
        flags += ("--eval-episodes", 2, "--num-workers", 1, "--no-capture-video")
        cloned = run_script("bc_flow_offline.py", *flags, cwd=tmp_path, timeout=600)
    assert "no evaluation" not in cloned.stderr, cloned.stderr
    evaluated = read_csv(tmp_path / "run", "eval.csv")
    assert evaluated["episodes"] == [2]
    assert evaluated["episodic_length"] == [100] or evaluated["success_rate"][0] > 0  # both went on to their end
    assert evaluated["period_s"][0] == pytest.approx(0.1, abs=0.05)  # of the last step


def test_server_of_another_task_is_refused(tmp_path):
    with served(tmp_path) as server:  # the cube
        finished = run_script("record_demos.py", "--teleop", "expert", *server, cwd=tmp_path, check=False, timeout=280)
    assert (
        "the task 'peg' is not FrankaPickCube-v0; start robot_server.py --env-id FrankaPegInsert-v0" in finished.stderr
    )
    assert finished.returncode == 1 and "Traceback" not in finished.stderr


def test_camera_that_freezes_costs_one_episode(tmp_path, monkeypatch):
    """On the simulated robot, with a camera of one's own that stands still for a while in the second episode."""
    with served(tmp_path, "--env-id", "FrankaPegInsert-v0") as server:
        flags = ("--env-id", "freezing_camera:Peg-v0", "--teleop", "expert", "--episodes", 2)
        env = {"PYTHONPATH": TESTS, "SERVER": server[1]}
        finished = run_script("record_demos.py", *flags, cwd=tmp_path, timeout=280, env=env)
    (fault,) = re.findall(r"episode (\d+), step \d+: camera freezing: newest picture is", finished.stdout)
    assert f"episode {fault} is not kept" in finished.stdout
    dataset = load(tmp_path, monkeypatch)
    for episode in dataset.iterate_episodes():
        frames = episode.observations["freezing"]
        assert frames.shape[1:] == (128, 128, 3)


def test_failures_of_a_higher_return_are_not_left_out_by_top_fraction(capsys):
    lengths, won = np.array([100, 73]), np.array([False, True])
    for returns in ([14.5, 12.8], [12.8, 12.8]):
        record_demos.sum_up_demos(lengths, won, np.array(returns))
        assert "top-fraction cannot" in capsys.readouterr().out
    record_demos.sum_up_demos(lengths, won, np.array([0.0, 1.0]))
    assert "--top-fraction 0.5" in capsys.readouterr().out
