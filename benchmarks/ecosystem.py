"""What each script does with the tasks of gymnasium-robotics, robosuite, gym-hil, and dm_control through shimmy.

    python benchmarks/ecosystem.py                  # needs tests/requirements-ecosystem.txt
    python benchmarks/ecosystem.py --only gym-hil   # needs the same; the lines of the others stay
    python benchmarks/report.py                     # then write the table from the file

A script trains a little on a task, its run is evaluated (--eval-only) and resumed, each by a command of a user. Of each
results/ecosystem.csv says yes, or what the script said instead. Cloning learns from what the SAC script recorded of its
evaluation; in robosuite from a file of robomimic's layout that a scripted expert fills here.

The packages register neither the cube with its images (gym-hil) nor robosuite's tasks: `ecosystem:NAME-v0` does, as a
module of one's own would.
"""

import csv
import importlib.metadata
import json
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import gymnasium as gym
import numpy as np
import tyro
from run import REPO, RESULTS, commit, hardware
from speed import write_anew

COLUMNS = ["ecosystem", "version", "task", "script", "trains", "evaluates", "resumes", "seconds", "date", "commit"]
COLUMNS += ["hardware", "command"]
TIMEOUT_S = 1800  # of one command


@dataclass(frozen=True)
class Task:
    packages: tuple[str, ...]
    """whose it is, by their names on PyPI"""
    env_id: str
    demos: str | None = None
    """what --env-name calls demonstrations of it that are not recorded by sac_state_sim.py: robomimic's name"""
    pictures: bool = False
    """its episodes are short enough to be learned from rendered pictures, without a GPU"""


TASKS = (
    Task(("gymnasium-robotics",), "gymnasium_robotics:FetchReach-v4", pictures=True),
    Task(("gymnasium-robotics",), "gymnasium_robotics:AdroitHandDoor-v1"),
    Task(("robosuite",), "ecosystem:Lift-v0", demos="lift-ph-low_dim"),
    Task(("gym-hil",), "gym_hil:gym_hil/PandaPickCubeBase-v0"),
    Task(("gym-hil",), "ecosystem:PandaPickCubeImages-v0"),
    Task(("dm_control", "shimmy"), "shimmy:dm_control/cartpole-balance-v0"),
)
SHORT = {  # script: its flags, steps to train, steps when resumed; train.csv has a row at both
    "sac_state_sim.py": (
        "--demos 0 --learning-starts 100 --utd-ratio 1 --eval-every 600 --final-eval-episodes 2 --no-capture-video",
        300,
        600,
    ),
    "sac_pixel_sim.py": (
        "--demos 0 --learning-starts 40 --utd-ratio 1 --batch-size 16 --eval-every 160 --final-eval-episodes 1"
        " --no-capture-video",
        80,
        160,
    ),
    "bc_flow_offline.py": (
        "--batch-size 16 --log-interval 100 --eval-episodes 2 --eval-envs 2 --no-capture-video",
        100,
        200,
    ),
}
STEPS = {"sac_state_sim.py": "--total-timesteps", "sac_pixel_sim.py": "--total-timesteps"}
STEPS["bc_flow_offline.py"] = "--offline-steps"


# --- Args -------------------------------------------------------------------------------------------------------------
@dataclass
class Args:
    only: str | None = None
    """a package, such as gym-hil, or a part of a task's name; the lines of the others stay as they are"""


# --- Tasks ------------------------------------------------------------------------------------------------------------
OBSERVED = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "object")  # robomimic's low-dimensional ones

gym.register(
    "PandaPickCubeImages-v0",
    "gym_hil.envs:PandaPickCubeGymEnv",
    max_episode_steps=100,
    kwargs={"image_obs": True},
)
gym.register("Lift-v0", "ecosystem:lift", max_episode_steps=300)


def lift_env_args() -> dict:
    """What robomimic 0.5 stores of robosuite 1.5's Lift: the name, and everything that robosuite.make was given."""
    import robosuite

    options = {
        "robots": ["Panda"],
        "controller_configs": robosuite.load_composite_controller_config(controller="BASIC", robot="Panda"),
        "control_freq": 20,
        "has_renderer": False,
        "has_offscreen_renderer": False,
        "use_camera_obs": False,
        "ignore_done": True,
        "use_object_obs": True,
        "reward_shaping": False,
    }
    return {"env_name": "Lift", "type": 1, "env_version": robosuite.__version__, "env_kwargs": options}


def lift(render_mode: str | None = None) -> gym.Env:
    """robosuite's Lift as a gymnasium task. (gymnasium.make refuses robosuite's GymWrapper: its spec stays None.)"""
    from common.datasets import RobosuiteTask

    return RobosuiteTask(lift_env_args(), list(OBSERVED), render_mode=render_mode)


def lift_action(raw: dict, holding: bool) -> np.ndarray:
    """(7,) of OSC_POSE, in 1/20 m: over the cube, down, close, up."""
    to_cube = raw["cube_pos"] - raw["robot0_eef_pos"]
    move = np.clip(10 * to_cube, -1, 1)
    if np.linalg.norm(to_cube[:2]) > 0.02:
        move[2] = np.clip(10 * (to_cube[2] + 0.06), -1, 1)
    if holding:
        closed = raw["robot0_gripper_qpos"][0] < 0.03
        move = np.array([0, 0, 1.0 if closed else 0.0])
    return np.array([*move, 0, 0, 0, 1.0 if holding else -1.0])


def record_lift(sim) -> dict[str, np.ndarray]:
    """One demonstration, until the cube is lifted: observations (T + 1, ...), actions and rewards (T, ...)."""
    raw = sim.reset()
    rows, actions, rewards, holding = [raw], [], [], False
    while not sim._check_success():
        holding = holding or bool(np.linalg.norm(raw["cube_pos"] - raw["robot0_eef_pos"]) < 0.01)
        actions.append(lift_action(raw, holding))
        raw, reward, *_ = sim.step(actions[-1])
        rows.append(raw)
        rewards.append(reward)
        if len(actions) == 100:
            raise RuntimeError("the scripted expert does not lift the cube")
    names = {"object": "object-state"}  # robomimic's name: robosuite's
    obs = {key: np.array([row[names.get(key, key)] for row in rows]) for key in OBSERVED}
    return {**obs, "actions": np.array(actions), "rewards": np.array(rewards)}


def write_lift(path: Path, demos: int) -> None:
    """A low-dimensional file of robomimic's layout, recorded on the robosuite that is installed."""
    import h5py
    import robosuite

    env_args = lift_env_args()
    sim = robosuite.make(env_args["env_name"], **env_args["env_kwargs"])
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        for i in range(demos):
            np.random.seed(i)  # noqa: NPY002  where robosuite 1.5.1 draws the cube's place from
            demo = record_lift(sim)
            group = data.create_group(f"demo_{i}")
            group["actions"], group["rewards"] = demo["actions"], demo["rewards"]
            group["dones"] = (demo["rewards"] > 0).astype(int)
            for key in OBSERVED:
                group[f"obs/{key}"], group[f"next_obs/{key}"] = demo[key][:-1], demo[key][1:]
        data.attrs["env_args"] = json.dumps(env_args)
    sim.close()


# --- Trying -----------------------------------------------------------------------------------------------------------
class Failed(Exception):  # noqa: N818  it is a finding
    """What a script said instead of doing it, in one line."""


def run_script(script: str, *flags: str, cwd: Path) -> str:
    """Run it as a user does; what it printed. Raises Failed with its last line when it does not end well."""
    environment = os.environ | {"PYTHONPATH": str(REPO / "benchmarks"), "MINARI_DATASETS_PATH": str(cwd / "minari")}
    try:
        result = subprocess.run(
            [sys.executable, str(REPO / script), *flags],
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise Failed(f"did not end within {TIMEOUT_S} s") from error
    lines = re.split(r"[\r\n]+", result.stderr.strip())
    if result.returncode:
        raise Failed(lines[-1].removeprefix(f"{script}: ").replace(f"{cwd}/", ""))
    unknown = [line for line in lines if line.startswith("no evaluation")]
    if unknown:
        raise Failed(unknown[0].replace(f"{cwd}/", ""))
    return result.stdout


def last_row(path: Path) -> dict[str, float]:
    """The numbers of a CSV's last line; an empty cell is NaN."""
    with path.open(newline="") as file:
        *_, last = csv.DictReader(file)
    return {name: float(value or "nan") for name, value in last.items()}


def check_training(run_dir: Path, steps: int) -> None:
    """Raises Failed unless all steps were taken and the last losses are numbers."""
    table = "offline_agent.csv" if (run_dir / "offline_agent.csv").exists() else "train.csv"
    row = last_row(run_dir / table)
    step = row.get("global_step", row.get("step"))
    losses = {name: value for name, value in row.items() if name.endswith(("actor_loss", "critic_loss"))}
    if step != steps or not losses or not all(map(math.isfinite, losses.values())):
        raise Failed(f"{table} ends at step {step:g} with {losses}")


def check_evaluation(printed: str) -> None:
    """Raises Failed unless a return is told."""
    told = re.findall(r"episodic_return (\S+?),? ", printed)
    if not told or not math.isfinite(float(told[-1])):
        raise Failed(f"prints {printed.strip()[-80:]!r}")


def attempts(script: str, flags: list[str], cwd: Path) -> Iterator[tuple[str, str]]:
    """Trains, evaluates, resumes: (what, "yes" or what happened). Without training there is nothing to go on with."""
    run_dir = Path(script).stem
    more, steps, later = SHORT[script]
    option = STEPS[script]
    try:
        run_script(script, *flags, *more.split(), option, str(steps), "--run-dir", run_dir, cwd=cwd)
        check_training(cwd / run_dir, steps)
    except Failed as failed:
        yield "trains", str(failed)
        return
    yield "trains", "yes"
    try:
        check_evaluation(run_script(script, "--eval-only", run_dir, cwd=cwd))
        yield "evaluates", "yes"
    except Failed as failed:
        yield "evaluates", str(failed)
    try:
        run_script(script, "--resume", run_dir, option, str(later), cwd=cwd)
        check_training(cwd / run_dir, later)
        yield "resumes", "yes"
    except Failed as failed:
        yield "resumes", str(failed)


def data_of(task: Task, cwd: Path) -> list[str]:
    """bc_flow_offline.py's flags for data of a task, which is recorded now. Raises Failed when it cannot be."""
    if task.demos:
        write_lift(cwd / "demos.hdf5", demos=12)
        return ["--env-name", task.demos, "--dataset-path", "demos.hdf5"]
    trained = [script for script in ("sac_state_sim.py", "sac_pixel_sim.py") if (cwd / Path(script).stem).exists()]
    if not trained:
        raise Failed("there is no policy to record")
    dataset_id = f"recorded/{re.sub(r'.*[:/]', '', task.env_id)}"
    run_script(trained[0], "--eval-only", Path(trained[0]).stem, "--record-dataset", dataset_id, cwd=cwd)
    return ["--env-name", dataset_id]


def try_task(task: Task, cwd: Path) -> Iterator[dict[str, object]]:
    """A line of the file for each script."""
    scripts = {"sac_state_sim.py": ["--env-id", task.env_id], "sac_pixel_sim.py": ["--env-id", task.env_id]}
    if task.pictures:
        scripts["sac_pixel_sim.py"] += ["--cameras", "render"]
    scripts["bc_flow_offline.py"] = []
    versions = ", ".join(map(importlib.metadata.version, task.packages))
    known = {"ecosystem": ", ".join(task.packages), "version": versions, "task": task.env_id}
    known |= {"date": datetime.now(UTC).date().isoformat(), "commit": commit(), "hardware": hardware()}
    for script, flags in scripts.items():
        line = known | {"script": script}
        started = time.monotonic()
        try:
            flags = flags or data_of(task, cwd)
            line |= dict(attempts(script, flags, cwd))
        except Failed as failed:
            line["trains"] = str(failed)
        line["seconds"] = round(time.monotonic() - started)
        more, steps, _ = SHORT[script]
        command = shlex.join(["python", script, *flags, *more.split(), STEPS[script], str(steps)])
        own = "PYTHONPATH=benchmarks " if task.env_id.startswith("ecosystem:") else ""
        yield line | {"command": own + command}


# --- Main -------------------------------------------------------------------------------------------------------------
def record(path: Path, line: dict[str, object]) -> None:
    """Add a line to the file, in place of an older one of the same task and script; in the order of TASKS."""
    lines = []
    if path.exists():
        with path.open(newline="") as file:
            lines = list(csv.DictReader(file))
    key = (line["task"], line["script"])
    lines = [old for old in lines if (old["task"], old["script"]) != key] + [line]
    tasks = [task.env_id for task in TASKS]
    lines.sort(key=lambda line: (tasks.index(line["task"]), list(SHORT).index(line["script"])))
    write_anew(path, lines, COLUMNS)


def main(args: Args) -> None:
    tasks = [task for task in TASKS if (args.only or "") in " ".join([*task.packages, task.env_id])]
    if not tasks:
        known = ", ".join(task.env_id for task in TASKS)
        raise SystemExit(f"--only {args.only}: there is no such package or task; the tasks are {known}")
    for task in tasks:
        with tempfile.TemporaryDirectory() as folder:
            for line in try_task(task, Path(folder)):
                record(RESULTS / "ecosystem.csv", line)
                said = ", ".join(f"{what}: {line.get(what, '')}" for what in ("trains", "evaluates", "resumes"))
                print(f"{line['task']} {line['script']}: {said} ({line['seconds']} s)", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
