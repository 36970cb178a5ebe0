"""common/run.py, through sac_state_sim.py as a user runs it: what a run leaves behind, how it stops and goes on."""

import dataclasses
import errno
import io
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import imageio.v2 as imageio
import minari
import numpy as np
import pytest
import torch
from conftest import (
    REPO,
    Finished,
    differences,
    held_elsewhere,
    leaves,
    read_checkpoint,
    read_csv,
    read_scalars,
    run_script,
    script_env,
    table,
    wait_until,
)
from forked import popen_forked
from state_runs import POINT, SCRIPT, TASKS, TINY, WITH_DEMOS, refused, run, script, stored
from tqdm import tqdm

import sac_state_sim
from common import run as run_module
from common.run import Run, drop_rows_after, quality, write_atomically, write_tensors
from common.setup import RunArgs, ends_well
from sac_state_sim import Args

GO_ON = ("--resume", "run", "--no-capture-video", "--total-timesteps")
TRAIN_KEYS = "charts/episodic_return charts/episodic_length charts/success charts/SPS losses/critic_loss "
TRAIN_KEYS += "losses/q_values losses/actor_loss losses/entropy losses/alpha time/act_ms time/env_ms time/update_ms"
EVAL_KEYS = "eval/episodic_return eval/episodic_length eval/success_rate eval/episodes"


def copy_run(finished: Finished, cwd: Path) -> Path:
    return Path(shutil.copytree(finished.run_dir, cwd / "run"))


def start(*flags: object, cwd: Path):
    """The script as a process to be stopped."""
    return popen_forked(SCRIPT, *flags, cwd=cwd, env=TASKS)


def line_of(output: str, name: str) -> str:
    return next(line for line in output.splitlines() if line.startswith(f"{name}: "))


# --- What a run leaves behind -----------------------------------------------------------------------------------------
def test_numbers_stand_in_csv_tensorboard_and_terminal(finished):
    train, evals = read_csv(finished.run_dir, "train.csv"), read_csv(finished.run_dir, "eval.csv")
    assert train.keys() == {"global_step", "wall_s", *TRAIN_KEYS.split()}
    assert evals.keys() == {"global_step", "wall_s", *EVAL_KEYS.split()}
    assert train["global_step"] == [50, 100, 150, 200, 250, 300] and evals["global_step"] == [100, 200, 300]
    for key in TRAIN_KEYS.split():
        assert all(math.isfinite(x) for x in train[key][1:]), key  # from the first update on
    assert all(math.isfinite(x) for key in EVAL_KEYS.split() for x in evals[key])
    assert train["wall_s"] == sorted(train["wall_s"])
    assert evals["eval/episodes"] == [2, 2, 2] and evals["eval/episodic_length"][0] <= 20
    scalars = read_scalars(finished.run_dir)
    for columns in (train, evals):
        for key in columns.keys() - {"global_step", "wall_s"}:
            ours = [pair for pair in zip(columns["global_step"], columns[key]) if math.isfinite(pair[1])]
            theirs = [pair for pair in scalars[key] if math.isfinite(pair[1])]
            np.testing.assert_allclose(theirs, ours, rtol=1e-6, err_msg=key)
    returns = evals["eval/episodic_return"]
    best = max(zip(evals["eval/success_rate"], returns))[1]
    for word, episodic_return in (("last", returns[-1]), ("best", best)):
        line = line_of(finished.stdout, word)
        assert f"{episodic_return:.5g}" in line and "over 2 episodes" in line


def test_run_directory_names_its_origin_and_holds_the_code(finished):
    run_dir, about = finished.run_dir, json.loads((finished.run_dir / "run.json").read_text())
    assert about["command"][1:] == [*TINY.split(), *map(str, WITH_DEMOS), "--capture-video", "--run-dir", "run"]
    assert about["versions"]["torch"] == torch.__version__ and about["versions"]["numpy"] == np.__version__
    assert re.fullmatch("[0-9a-f]{40}[+]?|unknown", about["git_commit"])
    args = json.loads((run_dir / "args.json").read_text())
    assert args.keys() == {field.name for field in dataclasses.fields(Args)}
    assert (args["env_id"], args["demos"], args["hidden_dims"]) == ("probe_envs:Point-v0", "3", [32, 32])
    for name in (SCRIPT, "franka_sim.py", "common/run.py", "common/envs.py", "common/link.py"):
        assert (run_dir / name).read_bytes() == (REPO / name).read_bytes()


def test_curve_and_video(finished):
    image = imageio.imread(finished.run_dir / "curve.png")[..., :3].astype(int)
    assert min(image.shape[:2]) > 200
    assert (np.ptp(image, axis=-1) > 100).sum() > 100  # coloured pixels: a curve, not only axes and text
    frames = np.array(imageio.mimread(finished.run_dir / "video.mp4", memtest=False))
    assert len(frames) >= 20 and frames.shape[1:] == (64, 64, 3)
    assert abs(frames[0].astype(int) - frames[19]).max() > 100  # the point moves


def test_training_changes_every_weight(finished):
    args = Args(**json.loads((finished.run_dir / "args.json").read_text()) | {"hidden_dims": (32, 32)})
    env = sac_state_sim.wrap_env(sac_state_sim.make_env(args), args)
    new, trained = (
        sac_state_sim.Agent(env.observation_space, env.action_space, args, torch.device("cpu")) for _ in range(2)
    )
    state = read_checkpoint(finished.run_dir)
    trained.load_state_dict(state["agent"])
    for part in ("actor", "critic", "target_critic"):
        for (name, one), other in zip(getattr(new, part).named_parameters(), getattr(trained, part).parameters()):
            assert not torch.equal(one, other), f"{part}.{name}"
    assert trained.critic_updates == 250 and trained.alpha.item() != pytest.approx(args.alpha_init)
    assert trained.normalizer.count == 360  # 300 steps and 60 of demonstrations
    assert len(stored(state)["rewards"]) == 300 and len(stored(state, "demos")["rewards"]) == 60


def test_same_seed_same_numbers_other_seed_other_numbers(finished, tmp_path):
    again = run(*WITH_DEMOS, "--run-dir", "again", cwd=tmp_path)
    assert differences(finished.run_dir, again.run_dir) == []
    for name in ("train.csv", "eval.csv"):
        assert table(finished.run_dir, name) == table(again.run_dir, name)
    other = run(*WITH_DEMOS, "--seed", 2, "--run-dir", "other", cwd=tmp_path)
    different = differences(finished.run_dir, other.run_dir)
    assert {"/buffer/columns/2", "/agent/generator", "/demos/columns/1", "/agent/raw_alpha"} <= set(different)
    assert table(finished.run_dir, "eval.csv") != table(other.run_dir, "eval.csv")


def test_eval_only_repeats_the_last_evaluation(finished, tmp_path, monkeypatch):
    """Nothing but the video is written; a dataset and another number of episodes where they are asked for."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    run_dir = copy_run(finished, tmp_path)
    before = {path.name: path.read_bytes() for path in run_dir.glob("*.*")}
    (run_dir / "video.mp4").unlink()
    result = script("--eval-only", "run", cwd=tmp_path)
    assert line_of(result.stdout, "checkpoint").split(": ")[1] == line_of(finished.stdout, "last").split(": ")[1]
    after = {path.name: path.read_bytes() for path in run_dir.glob("*.*")}
    assert len(imageio.mimread(run_dir / "video.mp4", memtest=False)) >= 20
    assert after | {"video.mp4": b""} == before | {"video.mp4": b""}
    record = ("--no-capture-video", "--record-dataset", "point/mine-v0", "--final-eval-episodes", 7)
    result = script("--eval-only", "run", *record, cwd=tmp_path)
    dataset = minari.load_dataset("point/mine-v0")
    returns = [episode.rewards.sum() for episode in dataset.iterate_episodes()]
    assert len(returns) == 7 and f"{np.mean(returns):.5g}" in line_of(result.stdout, "checkpoint")
    scores = dataset.storage.metadata
    assert scores["ref_max_score"] == pytest.approx(np.mean(returns), rel=1e-5)
    assert math.isfinite(scores["ref_min_score"]) and scores["ref_min_score"] != scores["ref_max_score"]
    run(*POINT, "--demos", "point/mine-v0", "--total-timesteps", 60, "--run-dir", "learned", cwd=tmp_path)
    assert len(stored(read_checkpoint(tmp_path / "learned"), "demos")["rewards"]) == dataset.total_steps


def test_every_switch_at_once(tmp_path):
    """Those that the other runs leave alone, in a run that reaches gradient steps."""
    flags = "--action-chunk 2 --gripper-penalty 0.1 --demos 2 --demo-ratio 0.25 --activation gelu --no-layer-norm"
    flags += " --dropout 0.1 --no-normalize-observations --num-qs 5 --num-min-qs 3 --backup-entropy --n-step 3"
    flags += " --std-parameterization softplus --target-entropy-per-dim -1 --lr-warmup 10 --lr-decay 200"
    flags += " --weight-decay 0.01 --hidden-dims 16 24 32 --explore-prob 0.1 --actor-ema 0 --run-dir run"
    run(*POINT, *flags.split(), "--total-timesteps", 150, cwd=tmp_path)
    columns = read_csv(tmp_path / "run", "train.csv")
    assert all(math.isfinite(x) for key in columns if "losses" in key for x in columns[key][1:])
    state = read_checkpoint(tmp_path / "run")
    assert stored(state)["observations"].shape == (150, 4) and stored(state)["actions"].shape == (150, 6)
    assert state["agent"]["actor"]["trunk.linears.2.weight"].shape == (1, 24, 32)


@pytest.mark.parametrize("std_parameterization", ["uniform", "fixed"])
def test_runs_with_other_standard_deviations(tmp_path, std_parameterization):
    flags = ("--std-parameterization", std_parameterization, "--total-timesteps", 120, "--run-dir", "run")
    run(*POINT, *flags, cwd=tmp_path)
    assert math.isfinite(read_csv(tmp_path / "run", "train.csv")["losses/actor_loss"][-1])


# --- R1: copies -------------------------------------------------------------------------------------------------------
MY_TASKS = '''
import gymnasium as gym
import probe_envs

class Mirrored(gym.ActionWrapper):
    """Actions point the other way."""

    def action(self, action):
        return -action

    def expert_action(self):
        return -self.env.unwrapped.expert_action()

gym.register("Mine-v0", "probe_envs:Point", max_episode_steps=20)
'''
EDITS = [
    (r"^( *)import franka_sim\b.*# TASK:.*$", r"\1import my_tasks"),
    (r"^    env_id: str = .*# TASK:.*$", '    env_id: str = "Mine-v0"'),
    (r"^    return env  # TASK:.*$", "    return my_tasks.Mirrored(env)"),
    (r"^    return envs.truth\(info.*# TASK:.*$", '    return float(info["success"])'),
]


def copy_script(folder: Path) -> None:
    """my_task.py, edited only in the lines that `grep -n TASK:` shows."""
    text = (REPO / SCRIPT).read_text()
    for pattern, replacement in EDITS:
        assert len(re.findall(pattern, text, re.MULTILINE)) == 1, pattern
        text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
    assert "import franka_sim" not in text
    (folder / "my_task.py").write_text(text)
    (folder / "my_tasks.py").write_text(MY_TASKS)


def test_a_copy_with_a_task_of_ones_own(tmp_path):
    """R1: beside the script, in another folder with common/ beside it, and in its run folder; a wrapper that changes
    actions included. Runs are called after the copy, and the copy in a run folder makes the same run again."""
    for place in ("house", "elsewhere"):
        folder = tmp_path / place
        shutil.copytree(REPO / "common", folder / "common", ignore=shutil.ignore_patterns("__pycache__"))
        if place == "house":  # the folder of the repository, with all that is in it
            for path in REPO.glob("*.py"):
                shutil.copy(path, folder)
        copy_script(folder)
    flags = [*TINY.split(), "--demos", 2, "--total-timesteps", 120]
    first = run_script(str(tmp_path / "house" / "my_task.py"), *flags, cwd=tmp_path / "house", env=TASKS)
    assert re.fullmatch(r"Mine-v0__my_task__1__\d+", first.run_dir.name)
    assert first.run_dir.parent == tmp_path / "house" / "runs"
    assert "demonstrations: 2 episodes, 40 steps, 2 successful" in first.stdout
    other = tmp_path / "elsewhere"
    run_script(str(other / "my_task.py"), *flags, "--run-dir", "run", cwd=other, env=TASKS)
    assert differences(first.run_dir, other / "run") == []
    kept = {path.relative_to(other / "run").as_posix() for path in (other / "run").rglob("*.py")}
    assert {"my_task.py", "my_tasks.py", "common/run.py", "common/envs.py"} <= kept
    # resume and evaluate, with the run folder's own copy
    copy, third = str(other / "run" / "my_task.py"), tmp_path / "third"
    run_script(copy, "--resume", other / "run", "--total-timesteps", 160, cwd=third, env=TASKS)
    result = run_script(copy, "--eval-only", other / "run", "--no-capture-video", cwd=third, env=TASKS)
    assert "over 2 episodes" in line_of(result.stdout, "checkpoint")
    run_script(copy, *flags, "--run-dir", "again", cwd=third, env=TASKS)
    assert differences(first.run_dir, third / "again") == []
    assert (third / "again" / "my_task.py").read_bytes() == (other / "my_task.py").read_bytes()


def test_a_run_that_goes_on_with_other_code_says_so(tmp_path):
    """Another reward, other bounds of actions, another script: the numbers before and after are not of one task."""
    folder = tmp_path / "house"
    shutil.copytree(REPO / "common", folder / "common", ignore=shutil.ignore_patterns("__pycache__"))
    copy_script(folder)
    flags = [*TINY.split(), "--total-timesteps", 60, "--run-dir", "run"]
    run_script(str(folder / "my_task.py"), *flags, cwd=tmp_path, env=TASKS)
    go_on = ("--resume", "run", "--total-timesteps")
    words = "run began with another"
    assert words not in run_script(str(folder / "my_task.py"), *go_on, 70, cwd=tmp_path, env=TASKS).stderr
    (folder / "my_tasks.py").write_text(MY_TASKS.replace("-action", "-action / 2"))
    result = run_script(str(folder / "my_task.py"), *go_on, 80, cwd=tmp_path, env=TASKS)
    assert f"{words} my_tasks.py\n" in result.stderr
    assert words not in run_script(str(tmp_path / "run" / "my_task.py"), *go_on, 90, cwd=tmp_path, env=TASKS).stderr
    (folder / "my_task.py").rename(folder / "other.py")
    result = run_script(str(folder / "other.py"), "--eval-only", "run", cwd=tmp_path, env=TASKS)
    assert f"{words} my_tasks.py, other.py\n" in result.stderr


# --- R2: places -------------------------------------------------------------------------------------------------------
def test_a_run_in_a_folder_that_is_there(finished, tmp_path, monkeypatch):
    """R2: an empty one, such as a mounted volume, is filled, not replaced; `.` is one; a killed start begins again."""
    volume, here = tmp_path / "volume", tmp_path / "here"
    for folder in (volume, here):
        (folder / "lost+found").mkdir(parents=True)  # as a new file system has it
    inode = volume.stat().st_ino
    run(*POINT, "--total-timesteps", 60, "--run-dir", "volume", cwd=tmp_path)
    assert volume.stat().st_ino == inode and read_checkpoint(volume)["run"]["step"] == 60
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith(".")) == ["here", "volume"]
    half = copy_run(finished, tmp_path)
    (half / "args.json").unlink()
    run(*POINT, "--total-timesteps", 60, "--run-dir", "run", cwd=tmp_path)
    assert json.loads((half / "args.json").read_text())["total_timesteps"] == 60
    monkeypatch.chdir(here)
    args = Args(run_dir=".")
    Run(args, "name", str(REPO / SCRIPT))
    assert args.run_dir == "." and (here / "args.json").exists() and (here / SCRIPT).exists()


def test_a_start_that_is_killed_amid_is_no_run_yet(tmp_path, monkeypatch):
    """The code is there before the flags, by which --resume takes it for a run; the same command begins again."""
    args = Args(run_dir=str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    for name in ("run.lock", "run.json.tmp"):  # of one that was killed sooner
        (tmp_path / "run" / name).touch()
    with monkeypatch.context() as patch:
        patch.setattr(run_module.shutil, "copy", lambda *_: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            Run(args, "task", sac_state_sim.__file__)
    assert (tmp_path / "run" / "run.json").exists() and not (tmp_path / "run" / "args.json").exists()
    run = Run(args, "task", sac_state_sim.__file__)
    with pytest.raises(AssertionError), held_elsewhere(run.dir / "run.lock"):  # which this process has
        pass


def test_runs_that_begin_in_the_same_second(tmp_path, monkeypatch):
    """As those of a sweep: each has a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "time", lambda: 1e9)
    folders = {Run(Args(), "name", str(REPO / SCRIPT)).dir for _ in range(3)}
    assert len(folders) == 3 and all((folder / "args.json").exists() for folder in folders)


def test_one_process_works_in_a_run(finished, tmp_path):
    """A second --resume, as of a cluster's requeued job, is refused; an evaluation is not."""
    run_dir = copy_run(finished, tmp_path)
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    with held_elsewhere(run_dir / "run.lock") as pid:
        before |= {run_dir / "run.lock": str(pid).encode()}
        flags = ("--total-timesteps", 400)
        assert f"run: process {pid} works there; end that one first" in refused("--resume", "run", *flags, cwd=tmp_path)
        assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before
        run_script(SCRIPT, "--eval-only", "run", "--no-capture-video", cwd=tmp_path, env=TASKS)
    run_script(SCRIPT, "--resume", "run", *flags, cwd=tmp_path, env=TASKS)


def test_folders_that_cannot_be_one(finished, tmp_path):
    """R2: one true line each, and nothing is changed."""
    run_dir = copy_run(finished, tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    before = sorted((path, path.is_file() and path.read_bytes()) for path in tmp_path.rglob("*"))
    for folder, words in (
        ("run", "has a run; --resume it"),
        ("full", "is not empty"),
        ("file", "cannot be written"),
        ("file/run", "cannot be written"),
        ("/proc/run", "cannot be written"),
    ):
        args = Args(run_dir=str(tmp_path / folder))
        with pytest.raises(SystemExit, match=f"--run-dir {args.run_dir}: {words}"):
            Run(args, "name", str(REPO / SCRIPT))
    assert sorted((path, path.is_file() and path.read_bytes()) for path in tmp_path.rglob("*")) == before
    assert "--total-timesteps 300" in refused("--resume", "run", cwd=tmp_path)
    assert (run_dir / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.EROFS, "make the folder writable"),
        (errno.EACCES, "make the folder writable"),
        (errno.ENOSPC, "make room"),
        (errno.EDQUOT, "make room"),
        (errno.EFBIG, "make room"),
    ],
)
def test_a_folder_that_takes_no_more(tmp_path, code, remedy):
    """R2: one line about the folder; the same error of a task keeps its traceback."""
    args = RunArgs(run_dir=str(tmp_path / "run"))
    line = pytest.raises(SystemExit, match=f"{os.strerror(code)}.*run/train.csv.*{remedy}, then run")
    with line, ends_well(args):
        raise OSError(code, os.strerror(code), f"{args.run_dir}/train.csv")
    with pytest.raises(OSError, match="camera"), ends_well(args):
        raise OSError(13, "Permission denied", "/dev/camera")


# --- Stop and go on ---------------------------------------------------------------------------------------------------
ALL = "--env-id probe_envs:Point-v0 --action-chunk 3 --gripper-penalty 0.1 --demos 2 --dropout 0.1 --lr-warmup 100 "
ALL += "--lr-decay 2000 --buffer-size 90 --explore-prob 0.2 --n-step 3 --eval-every 70 --eval-episodes 1"
FRANKA = "--env-id FrankaPickCube-v0 --demos 1 --eval-every 300 --eval-episodes 1 --final-eval-episodes 1"


def assert_same_runs(one: Path, other: Path) -> None:
    assert differences(one, other) == []
    for name in ("train.csv", "eval.csv"):
        assert table(one, name) == table(other, name)


@pytest.mark.parametrize(("flags", "total"), [(FRANKA, 500), (ALL, 1500)], ids=["Franka", "all-wrappers"])
def test_ctrl_c_ends_the_episode_and_a_resumed_run_is_the_same(tmp_path, flags, total):
    flags = [*TINY.split(), *flags.split(), "--total-timesteps", total]
    with start(*flags, "--run-dir", "run", cwd=tmp_path) as process:
        train_csv = tmp_path / "run" / "train.csv"
        wait_until(lambda: train_csv.exists() and train_csv.read_text().count("\n") > 1)
        os.kill(process.pid, signal.SIGINT)
        process.join(60)
        assert process.exitcode not in (0, None)
    errors = process.stderr_path.read_text()
    assert "the episode ends first, within 10 s" in errors and "Traceback" not in errors
    assert errors.splitlines()[-1] == "stopped; go on with --resume run"
    progress = read_checkpoint(tmp_path / "run")["run"]
    assert progress["step"] < total
    columns, scalars = read_csv(tmp_path / "run", "train.csv"), read_scalars(tmp_path / "run")
    assert [step for step, _ in scalars["losses/critic_loss"]] == columns["global_step"]  # nothing is left behind
    script("--resume", "run", cwd=tmp_path)
    script(*flags, "--run-dir", "whole", cwd=tmp_path)
    assert_same_runs(tmp_path / "run", tmp_path / "whole")
    steps = read_csv(tmp_path / "whole", "train.csv")["global_step"]
    assert [step for step, _ in read_scalars(tmp_path / "run")["losses/critic_loss"]] == steps


def newest_row(path: Path) -> int:
    """The step of a CSV's newest whole row; 0 where there is none."""
    lines = path.read_text().split("\n")[1:-1] if path.exists() else []
    return int(lines[-1].split(",")[0]) if lines else 0


def test_kill_at_twenty_moments(tmp_path):
    """kill -9, twenty times in a row on one run; then it finishes as if nothing had happened."""
    flags = [*TINY.split(), *ALL.split(), "--eval-every", 35, "--total-timesteps", 3000]
    moments, run_dir, saved = random.Random(0), tmp_path / "run", [0]
    train_csv = run_dir / "train.csv"
    for kill in range(20):
        go_on = ["--resume", "run"] if (run_dir / "args.json").exists() else [*flags, "--run-dir", "run"]
        with start(*go_on, cwd=tmp_path) as process:
            if kill % 4 == 0:
                time.sleep(moments.uniform(0, 1))  # while it starts
            else:
                goal = saved[-1] + moments.randint(1, 150)
                wait_until(
                    lambda output=process.stdout_path: "run directory" in output.read_text()
                )  # old rows are gone
                wait_until(lambda goal=goal: newest_row(train_csv) >= goal)
                time.sleep(moments.uniform(0, 0.1))
            assert process.exitcode is None
        errors = process.stderr_path.read_text()
        assert "Traceback" not in errors and f"{SCRIPT}: " not in errors, errors
        if (run_dir / "checkpoint.pt").exists():
            saved.append(read_checkpoint(run_dir)["run"]["step"])
    assert saved == sorted(saved) and len(set(saved)) > 5
    script("--resume", "run", cwd=tmp_path)
    script(*flags, "--run-dir", "whole", cwd=tmp_path)
    assert_same_runs(run_dir, tmp_path / "whole")


@pytest.mark.parametrize("how", ["Ctrl-C", "kill"])
def test_stopped_in_the_last_evaluation(tmp_path, how):
    flags = (*TINY.split(), *POINT, "--total-timesteps", 100, "--run-dir", "run", "--final-eval-episodes", 10**6)
    with start(*flags, cwd=tmp_path) as process:
        wait_until(lambda: (tmp_path / "run" / "checkpoint.pt").exists())
        time.sleep(0.5)
        if how == "kill":
            process.kill()
        else:
            os.kill(process.pid, signal.SIGINT)
            process.join(20)
            assert process.exitcode, "goes on for minutes"
            errors = process.stderr_path.read_text()
            assert "Traceback" not in errors and "go on with --resume run" in errors
    script("--resume", "run", "--final-eval-episodes", 2, cwd=tmp_path)
    run(*POINT, "--total-timesteps", 100, "--run-dir", "whole", cwd=tmp_path)
    for name in ("train.csv", "eval.csv"):
        assert table(tmp_path / "run", name) == table(tmp_path / "whole", name)
    assert (tmp_path / "run" / "curve.png").exists()


def test_ctrl_c_before_the_first_step(tmp_path):
    """While demonstrations are collected, no run is there yet."""
    with start(*TINY.split(), *POINT, "--demos", 10**6, cwd=tmp_path) as process:
        time.sleep(3)
        os.kill(process.pid, signal.SIGINT)
        process.join(30)
        assert process.exitcode not in (0, None)
    assert process.stderr_path.read_text().splitlines() == ["stopped; run the same command again"]
    assert not (tmp_path / "runs").exists()


def test_ctrl_c_that_also_ends_who_reads_the_output(tmp_path):
    """`2>&1 | tee log`: what Ctrl-C promises could not be written, and nothing was saved."""
    command = [sys.executable, str(REPO / SCRIPT), *TINY.split(), *POINT, "--total-timesteps", "1000000"]
    command += ["--eval-every", "1000000", "--run-dir", "run"]
    pipe = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, cwd=tmp_path, env=script_env(tmp_path, TASKS), **pipe) as process:
        while b"run directory" not in process.stdout.readline():
            assert process.poll() is None
        time.sleep(1)
        process.stdout.close()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) not in (0, None)
    state = read_checkpoint(tmp_path / "run")
    assert len(stored(state)["rewards"]) == state["run"]["step"] > 0


def interrupt_later(run_dir: Path, ready: str, signals: int = 1, number: int = signal.SIGINT) -> threading.Thread:
    """Ctrl-C for this process, when the file `ready` of the run is there and a second has passed."""

    def wait() -> None:
        wait_until((run_dir / ready).exists)
        for _ in range(signals):
            time.sleep(1)
            os.kill(os.getpid(), number)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@pytest.mark.parametrize("where", ["episode", "evaluation"])
def test_ctrl_c_in_an_episode_or_evaluation_without_end(tmp_path, monkeypatch, capfd, where):
    """R3: it is given up after a while, what was learned is saved, and what is waited for is said."""
    monkeypatch.setattr(run_module, "PATIENCE_S", 1.0)
    monkeypatch.chdir(tmp_path)
    every = 30 if where == "evaluation" else 10**6
    args = Args(env_id="probe_envs:Endless-v0", demos="0", total_timesteps=10**6, learning_starts=20, eval_every=every)
    args = dataclasses.replace(args, run_dir="run", hidden_dims=(8, 8), batch_size=8, utd_ratio=1, threads=1)
    threads = torch.get_num_threads()
    thread = interrupt_later(tmp_path / "run", "args.json")
    begun = time.monotonic()
    with pytest.raises(SystemExit, match="stopped; go on with --resume run"):
        sac_state_sim.main(args)
    thread.join()
    torch.set_num_threads(threads)
    assert time.monotonic() - begun < 60
    state = read_checkpoint(tmp_path / "run")
    assert len(stored(state)["rewards"]) == state["run"]["step"] > 20
    assert state["run"]["episode"] == 1
    assert f"stopping: the {where} ends first, within 1 s, then all is saved" in capfd.readouterr().err


def test_a_second_ctrl_c_ends_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "PATIENCE_S", 1e9)
    monkeypatch.chdir(tmp_path)
    args = Args(env_id="probe_envs:Endless-v0", demos="0", run_dir="run", eval_every=10**6, threads=1)
    threads = torch.get_num_threads()
    thread = interrupt_later(tmp_path / "run", "args.json", signals=2)
    with pytest.raises(SystemExit, match="stopped; begin again with --resume run, nothing was saved yet"):
        sac_state_sim.main(args)
    thread.join()
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_a_second_sigterm_does_not_keep_it_from_saving(tmp_path, monkeypatch):
    """A learner gets one for each thread of its actor, when that is killed and its threads end one after the other."""
    monkeypatch.setattr(run_module, "PATIENCE_S", 3.0)
    monkeypatch.chdir(tmp_path)
    args = Args(env_id="probe_envs:Endless-v0", demos="0", run_dir="run", eval_every=10**6, threads=1)
    threads = torch.get_num_threads()
    thread = interrupt_later(tmp_path / "run", "args.json", signals=2, number=signal.SIGTERM)
    with pytest.raises(SystemExit, match="stopped; go on with --resume run"):
        sac_state_sim.main(args)
    thread.join()
    torch.set_num_threads(threads)


def test_a_second_sigterm_does_not_prolong_the_wait(tmp_path):
    run = Run(Args(run_dir=str(tmp_path / "run")), "task", sac_state_sim.__file__)
    bar = io.StringIO()
    run.bar = tqdm(total=10, file=bar, mininterval=0)
    run.doing = "the episode"
    run.on_signal(signal.SIGTERM)
    since, shown = run.signalled_at, bar.getvalue()
    run.advance()
    assert bar.getvalue() == shown != ""  # Ctrl-C has also ended `tee`, which it would write to
    run.on_signal(signal.SIGTERM)
    assert run.signals == 2 and run.signalled_at == since


def test_resume_of_a_run_without_a_checkpoint_and_of_a_finished_one(finished, tmp_path):
    """The first begins again; the second goes on with a new episode when it is asked for more steps."""
    run_dir = copy_run(finished, tmp_path)
    for path in run_dir.glob("checkpoint.*"):
        path.unlink()
    error = refused("--eval-only", "run", cwd=tmp_path)
    assert "--eval-only run: stopped before its first checkpoint; --resume it" in error
    script("--resume", "run", "--no-capture-video", cwd=tmp_path)
    assert_same_runs(finished.run_dir, run_dir)
    episodes = read_checkpoint(run_dir)["run"]["episode"]
    script(*GO_ON, 350, cwd=tmp_path)
    state = read_checkpoint(run_dir)
    assert state["run"]["step"] == len(stored(state)["rewards"]) == 350 and state["run"]["episode"] > episodes
    assert not stored(state)["continues"][300] and stored(state)["continues"][301]
    longer = table(run_dir, "train.csv")
    assert {key: column[:6] for key, column in longer.items()} == table(finished.run_dir, "train.csv")
    assert longer["global_step"][-1] == "350.0"
    assert read_csv(run_dir, "eval.csv")["global_step"] == [100, 200, 300, 350]
    assert "is finished: --total-timesteps 350: it has 350" in refused("--resume", "run", cwd=tmp_path)  # it remembers


def test_resume_after_kills_at_the_end_of_a_checkpoint(finished, tmp_path):
    """Between the last evaluation and its checkpoint; between a checkpoint's two renames."""
    run_dir = copy_run(finished, tmp_path)
    (run_dir / "checkpoint.previous").replace(run_dir / "checkpoint.pt")  # from just before that evaluation
    script("--resume", "run", cwd=tmp_path)
    assert table(run_dir, "eval.csv") == table(finished.run_dir, "eval.csv")
    (run_dir / "checkpoint.pt").rename(run_dir / "checkpoint.previous")
    script(*GO_ON, 350, cwd=tmp_path)
    assert read_checkpoint(run_dir)["run"]["step"] == 350


def test_resume_of_a_task_that_does_not_repeat_itself(tmp_path):
    """As a robot: the steps of before stay, new ones follow."""
    flags = ("--env-id", "probe_envs:NeverTwiceTheSame-v0", "--total-timesteps", 110, "--run-dir", "run")
    run(*flags, cwd=tmp_path)
    before = stored(read_checkpoint(tmp_path / "run"))
    script("--resume", "run", "--total-timesteps", 150, cwd=tmp_path)
    after = stored(read_checkpoint(tmp_path / "run"))
    for name in ("observations", "actions", "rewards", "next_observations"):
        assert torch.equal(after[name][:110], before[name]) and len(after[name]) == 150


@pytest.mark.parametrize(
    ("content", "kept"),
    [
        ("", ""),
        ("global_st", ""),
        ("global_step,wall_s\n", "global_step,wall_s\n"),
        ("global_step,wall_s\n5", "global_step,wall_s\n"),
        ("global_step,wall_s\n5,1\n60,2\n", "global_step,wall_s\n5,1\n60,2\n"),
        ("global_step,wall_s\n5,1\n60,2\n61,3\n70,4", "global_step,wall_s\n5,1\n60,2\n"),
    ],
)
def test_rows_that_a_crash_left_behind(tmp_path, content, kept):
    path = tmp_path / "train.csv"
    path.write_text(content)
    drop_rows_after(path, 60)
    assert path.read_text() == kept


@pytest.mark.parametrize("row", ["50;1.5", "step 50,1.5", "50.0,1.5", "\xff,1.5"])
def test_rows_that_a_spreadsheet_has_changed(tmp_path, row):
    """One line, and the file is as it was."""
    path = tmp_path / "train.csv"
    path.write_text(f"global_step,wall_s\n{row}\n", encoding="latin-1")
    before = path.read_bytes()
    with pytest.raises(SystemExit, match="train.csv: has a row that does not begin with a step"):
        drop_rows_after(path, 60)
    assert path.read_bytes() == before


def test_files_are_replaced_never_overwritten(tmp_path):
    path, link = tmp_path / "file", tmp_path / "link"
    path.write_bytes(b"old")
    os.link(path, link)
    write_atomically(path, b"new and longer")
    assert (path.read_bytes(), link.read_bytes()) == (b"new and longer", b"old")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "link"]


def test_files_are_on_the_disk_before_they_have_their_names(tmp_path, monkeypatch):
    """Else a power cut leaves an empty one in the place of the old one."""
    synced = {}  # bytes of each file by its inode

    def sync(number: int) -> None:
        assert not (tmp_path / "args.json").exists()
        synced[os.fstat(number).st_ino] = os.fstat(number).st_size

    monkeypatch.setattr(os, "fsync", sync)
    write_tensors(tmp_path / "checkpoint.new", {"buffer": torch.ones(10)})
    write_atomically(tmp_path / "args.json", b"{}")
    for path in tmp_path.iterdir():
        assert synced[path.stat().st_ino] == path.stat().st_size > 0


def test_a_checkpoint_is_written_without_a_copy_of_it(tmp_path):
    """A buffer may fill most of the memory."""
    tracemalloc.start()
    write_tensors(tmp_path / "file", {"buffer": torch.ones(5_000_000)})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5e6 and (tmp_path / "file").stat().st_size > 20e6
    assert torch.load(tmp_path / "file", weights_only=True)["buffer"].sum() == 5e6


def test_a_large_checkpoint_on_a_full_disk(tmp_path):
    """Where torch has written a part it raises an error of its own, of which no line about making room was made."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limit[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_tensors(tmp_path / "checkpoint.new", {"buffer": torch.ones(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


@pytest.fixture
def _handlers():
    """Signals are handled afterwards as before."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_handlers")
def test_where_a_run_stands_outlives_it(tmp_path):
    """What it has, when it is due, its best evaluation, its time; rows of the checkpoint's own step stay."""
    args = Args(run_dir=str(tmp_path / "run"))
    run = Run(args, "task", sac_state_sim.__file__)
    run.open(100)
    flush, flushed = run.writer.flush, []
    run.writer.flush = lambda: flushed.append((run.dir / "checkpoint.pt").exists()) or flush()
    run.started -= 1000.0  # s
    run.advance(7)
    run.log("eval", {"eval/success_rate": 1.0})
    run.end_episode({"episode": {"r": 5.0, "l": 7}}, 1.0)
    run.advance(3)
    assert run.due(5) and run.due(10) and not run.due(6)
    run.end_episode({}, math.nan)  # given up
    run.advance()
    run.log("eval", {"eval/success_rate": 0.5})
    assert run.should_save(10) and not run.due(10)  # not yet saved
    run.save()
    assert not run.should_save(10) and flushed == [False]  # before: it does not come again
    rows = [(7, 1.0), (11, 0.5)]
    assert read_scalars(run.dir)["eval/success_rate"] == rows
    run.close()
    again = Run(dataclasses.replace(args, resume=args.run_dir), "task", sac_state_sim.__file__)
    again.keep()
    again.open(100)
    assert (again.step, again.episode, again.recent) == (11, 2, [(5.0, 7.0, 1.0)])
    assert again.best == {"eval/success_rate": 1.0} and again.elapsed() > 1000 and not again.should_save(10)
    again.close()
    assert read_scalars(run.dir)["eval/success_rate"] == rows
    assert read_csv(run.dir, "eval.csv")["eval/success_rate"] == [1.0, 0.5]


@pytest.mark.usefixtures("_handlers")
def test_a_run_that_ends_before_its_first_step_is_saved(tmp_path):
    run = Run(Args(run_dir=str(tmp_path / "run")), "task", sac_state_sim.__file__)
    run.open(100)
    run.end_of_training()
    run.close()
    assert read_checkpoint(run.dir)["run"]["step"] == 0


def test_times_are_those_of_a_step_and_an_evaluation_is_none_of_them(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(run_module.time, "perf_counter", lambda: now[0])
    run = Run(Args(run_dir=str(tmp_path / "run")), "task", sac_state_sim.__file__)
    run.unit = "the episode"
    run.restart_timer()
    for scale in (1, 2):  # each time since the last
        for name, seconds in (("act", 0.25), ("env", 0.5), ("update", 1.25), ("eval", 10.0)):
            with run.phase(name):
                now[0] += scale * seconds
        run.advance(4)
        times = {"time/act_ms": 62.5, "time/env_ms": 125, "time/update_ms": 312.5}
        times = {name: scale * value for name, value in times.items()}
        assert run.speed() == pytest.approx(times | {"charts/SPS": 2 / scale})


@pytest.mark.usefixtures("_handlers")
def test_a_task_that_changes_the_folder(tmp_path, monkeypatch):
    """A relative folder was then another one: no table and no checkpoint could be written, and the run crashed."""
    monkeypatch.chdir(tmp_path)
    run = Run(Args(run_dir="run"), "name", str(REPO / SCRIPT))
    run.open(10)
    run.log("eval", {"eval/success_rate": 0.5})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run.advance()
    run.log("train", {"charts/SPS": 1.0})
    run.finish({"eval/success_rate": 1.0})
    assert read_scalars(tmp_path / "run")["eval/success_rate"] == [(0, 0.5), (1, 1.0)]


def test_the_better_of_two_evaluations():
    rows = [(0.5, -3.0), (0.5, -2.0), (0.9, -9.0), (math.nan, 100.0)]
    scalars = [{"eval/success_rate": rate, "eval/episodic_return": value} for rate, value in rows]
    assert max(scalars, key=quality) == scalars[2]
    assert max([scalars[3], {"eval/success_rate": math.nan, "eval/episodic_return": 5.0}], key=quality) == scalars[3]
    assert quality({}) < quality(scalars[3]) < quality(scalars[0])


# --- Faults -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("task", "words", "step"),
    [
        ("NanReward", "the reward is nan", 129),
        ("NanObservation", "the observation['goal'][1] is nan", 129),
        ("NanReset", "the observation['point'][0] is nan at step 0", 80),
    ],
)
def test_a_fault_of_the_task_in_a_run(tmp_path, task, words, step):
    """S6: the step before is saved, nothing is poisoned, and the run goes on with the next episode as it promises."""
    flags = ("--env-id", f"probe_envs:{task}-v0", "--eval-every", 10_000, "--run-dir", "run")
    error = refused(*TINY.split(), *flags, "--total-timesteps", 300, cwd=tmp_path)
    assert f"probe_envs:{task}-v0: {words}" in error
    assert "All is saved: --resume run goes on with the next episode" in error
    state = read_checkpoint(tmp_path / "run")
    assert all(torch.isfinite(leaf).all() for leaf in leaves(state).values() if isinstance(leaf, torch.Tensor))
    assert len(stored(state)["rewards"]) == state["run"]["step"]
    assert abs(state["run"]["step"] - step) <= 20
    if task != "NanReset":  # which comes again after as many resets
        script("--resume", "run", "--total-timesteps", step + 50, cwd=tmp_path)
        after = read_checkpoint(tmp_path / "run")
        assert len(stored(after)["rewards"]) == step + 50 and after["run"]["episode"] > state["run"]["episode"]
        assert not stored(after)["continues"][step]


@pytest.mark.parametrize(
    ("task", "words"),
    [("Crashes", "the task's own bug"), ("Exits", "the task ended the program by sys.exit(0)")],
)
def test_a_task_that_ends_the_program(tmp_path, task, words):
    """The last line says how to go on, below the traceback of a bug; an exit is no success."""
    flags = ("--env-id", f"probe_envs:{task}-v0", "--eval-every", 30, "--run-dir", "run", "--total-timesteps", 300)
    result = run(*flags, cwd=tmp_path, check=False)
    assert result.returncode == 1 and words in result.stderr
    assert result.stderr.splitlines()[-1].endswith("go on with --resume run")
    assert ("Traceback" in result.stderr) is (task == "Crashes")


def test_a_verdict_in_words_is_a_fault_and_the_run_is_saved(tmp_path):
    flags = ("--env-id", "probe_envs:OddSuccess-v0", "--eval-every", 10_000, "--run-dir", "run")
    error = refused(*TINY.split(), *flags, "--total-timesteps", 300, cwd=tmp_path)
    assert "info['success'] is 'yes', not True or False" in error and "All is saved: --resume run" in error
    progress = read_checkpoint(tmp_path / "run")["run"]
    assert 130 <= progress["step"] < 150


def test_all_is_saved_before_a_task_is_closed(tmp_path):
    """That may go wrong, or end the program."""
    flags = ("--env-id", "probe_envs:CannotClose-v0", "--eval-every", 10_000, "--run-dir", "run")
    result = run(*flags, "--total-timesteps", 110, cwd=tmp_path, check=False)
    assert result.returncode == 1 and "cannot be closed" in result.stderr
    assert read_checkpoint(tmp_path / "run")["run"]["step"] == 110
    assert (tmp_path / "closed.txt").read_text() == "closed\n"


def test_a_fault_in_the_first_reset(tmp_path):
    error = refused(*TINY.split(), "--env-id", "probe_envs:NanStart-v0", "--run-dir", "run", cwd=tmp_path)
    assert "probe_envs:NanStart-v0: the observation['goal'][0] is nan at step 0" in error
    assert "begin again with --resume run, nothing was saved yet" in error


def test_full_disk(tmp_path):
    """Files may not grow beyond what the first checkpoints need: the message names it, the checkpoint stays."""
    flags = [*TINY.split(), *POINT, "--eval-every", 100, "--total-timesteps", 900]
    script(*flags, "--total-timesteps", 250, "--run-dir", "short", cwd=tmp_path)
    space = (tmp_path / "short" / "checkpoint.pt").stat().st_size + 5_000
    error = refused(*flags, "--run-dir", "run", cwd=tmp_path, max_file_bytes=space)
    assert "make room, then go on with --resume run" in error and ("too large" in error or "No space" in error)
    assert read_checkpoint(tmp_path / "run")["run"]["step"] < 400
    script("--resume", "run", cwd=tmp_path)
    script(*flags, "--run-dir", "whole", cwd=tmp_path)
    assert_same_runs(tmp_path / "run", tmp_path / "whole")


def test_training_that_diverges_ends_the_run(tmp_path):
    flags = (*TINY.split(), *POINT, "--lr", 1e30, "--total-timesteps", 300, "--run-dir", "run")
    assert "training has diverged; give a smaller --lr" in refused(*flags, cwd=tmp_path)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


class Malicious:
    def __reduce__(self):
        return os.system, ("touch executed",)


def damage(path: Path, how: str) -> None:
    if how == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "random bytes":
        path.write_bytes(random.Random(0).randbytes(5000))
    elif how == "malicious":
        torch.save(torch.load(path) | {"agent": Malicious()}, path)
    elif how == "malicious pickle":
        path.write_bytes(pickle.dumps(Malicious()))
    else:
        torch.save({"a list": [1, 2]} if how == "other content" else [1, 2], path)


DAMAGES = ["truncated", "empty", "random bytes", "malicious", "malicious pickle", "other content", "list"]


def test_damaged_checkpoints(finished, tmp_path, monkeypatch):
    """Whatever the file holds: it is named, nothing in it is executed, and the one before is a way on."""
    run_dir = copy_run(finished, tmp_path)
    good = (run_dir / "checkpoint.pt").read_bytes()
    args = Args(**json.loads((run_dir / "args.json").read_text()) | {"hidden_dims": (32, 32), "run_dir": str(run_dir)})
    monkeypatch.chdir(tmp_path)
    for how in DAMAGES:
        for option in ({"resume": str(run_dir)}, {"eval_only": str(run_dir)}):
            (run_dir / "checkpoint.pt").write_bytes(good)
            damage(run_dir / "checkpoint.pt", how)
            with pytest.raises(SystemExit, match="checkpoint.pt: ") as error:
                sac_state_sim.main(dataclasses.replace(args, threads=1, **option))
            assert "\n" not in error.value.code
            assert ("checkpoint.previous" in error.value.code) is (how not in ("other content", "list")), how
    assert not (tmp_path / "executed").exists()
    (run_dir / "checkpoint.pt").unlink()  # as the message says
    script(*GO_ON, 350, cwd=tmp_path)
    assert read_checkpoint(run_dir)["run"]["step"] == 350


def test_checkpoint_of_other_networks(finished, tmp_path):
    run_dir = copy_run(finished, tmp_path)
    state = read_checkpoint(run_dir)
    for name in ("actor", "normalizer"):
        shortened = {key: value[..., :-1] for key, value in state["agent"][name].items() if value.ndim}
        torch.save(
            state | {"agent": state["agent"] | {name: state["agent"][name] | shortened}}, run_dir / "checkpoint.pt"
        )
        error = refused("--resume", "run", "--total-timesteps", 400, cwd=tmp_path)
        assert "run/checkpoint.pt: is not of this script and flags" in error


def test_a_run_of_a_gpu_goes_on_without(finished, tmp_path):
    """A checkpoint as a GPU writes it: its generator's state has 16 bytes, its optimizers are capturable."""
    run_dir = copy_run(finished, tmp_path)
    state = read_checkpoint(run_dir)
    state["agent"]["generator"] = torch.zeros(16, dtype=torch.uint8)
    for part in ("actor_optimizer", "critic_optimizer", "alpha_optimizer"):
        state["agent"][part]["param_groups"][0]["capturable"] = True
    torch.save(state, run_dir / "checkpoint.pt")
    result = script("--eval-only", "run", "--no-capture-video", cwd=tmp_path)
    assert line_of(finished.stdout, "last").removeprefix("last: ") in result.stdout
    script(*GO_ON, 350, cwd=tmp_path)
    assert math.isfinite(read_csv(run_dir, "train.csv")["losses/actor_loss"][-1])


# --- Tasks that need care ---------------------------------------------------------------------------------------------
def test_one_instance_of_a_task_where_one_is_enough(tmp_path):
    """R4: one for demonstrations and training, one for the last evaluation, one for its video, never two at a time."""
    flags = ("--env-id", "probe_envs:OnlyOne-v0", "--demos", 2, "--total-timesteps", 60, "--eval-every", 1000)
    run(*flags, "--capture-video", "--run-dir", "run", cwd=tmp_path)
    assert (tmp_path / "instances.txt").read_text() == "made\n" * 3
    assert (tmp_path / "run" / "video.mp4").stat().st_size > 1000
    script("--eval-only", "run", "--record-dataset", "own/only-v0", cwd=tmp_path)
    assert (tmp_path / "instances.txt").read_text() == "made\n" * 6
    assert (tmp_path / "minari" / "own" / "only-v0" / "data").exists()


def test_a_wide_state_takes_the_memory_of_the_steps_asked_for(tmp_path, monkeypatch):
    """S5: 4,096 numbers and 60 steps, of a buffer of a million."""
    args = Args(env_id="probe_envs:Point-v0", demos="0", total_timesteps=60, run_dir=str(tmp_path / "run"))
    task = sac_state_sim.make_env(args)
    _, agent, buffer, _ = sac_state_sim.start(args, task, lambda env: sac_state_sim.wrap_env(env, args))
    assert buffer.capacity == 60
    agent.obs_dim = 4096
    monkeypatch.setattr("common.tensors.free_memory", lambda: 16e9)
    line = "buffer of 1,000,000 transitions and checkpoint needs 65.6 GB, 16.0 GB are free; give a smaller --buffer-"
    with pytest.raises(SystemExit, match=line):
        agent.make_buffer(args.buffer_size)
    assert agent.make_buffer(60).rows.observations.shape == (60, 4096)


@pytest.mark.parametrize("task", ["Pendulum-v1", "probe_envs:Point-v0"])
def test_without_mujoco(tmp_path, task):
    """R7: where MuJoCo cannot be imported one line says so, and a task without it trains."""
    flags = [*TINY.split(), "--env-id", task, "--total-timesteps", 60, "--run-dir", "run"]
    result = run_script(SCRIPT, *flags, cwd=tmp_path, env=TASKS | {"MUJOCO_GL": "foo"})
    assert "Traceback" not in result.stderr and "OpenGL" in result.stderr
    assert read_checkpoint(tmp_path / "run")["run"]["step"] == 60
