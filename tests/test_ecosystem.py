"""Other people's tasks, the real packages: gymnasium-robotics, gym-hil, dm_control through shimmy, robosuite.

They are not in requirements.txt: pip install -r requirements.txt -r tests/requirements-ecosystem.txt, then
python -m pytest -m ecosystem. A package that is not installed fails its tests, so that nothing passes unseen.
Cases B1 (robosuite runs on the pinned MuJoCo) and B3 (AdroitHandDoor), with the others of issue 12.
"""

import importlib.metadata
import json
import re
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import REPO, read_csv, run_script

pytestmark = [pytest.mark.ecosystem, pytest.mark.timeout(1200)]

PINS = ("requirements.txt", "tests/requirements-ecosystem.txt")
WITHOUT_DISPLAY = {"MUJOCO_GL": "egl"}  # gym-hil makes a renderer for states, too
SHORT = "--demos 0 --total-timesteps 300 --learning-starts 100 --utd-ratio 1 --no-capture-video"
SHORT += " --eval-every 300 --eval-episodes 2 --final-eval-episodes 2"


def test_versions_are_those_that_were_seen_working():
    """What the notes in requirements.txt and tests/requirements-ecosystem.txt say was tried is what is tried here."""
    ours = re.compile(
        r"(mujoco|numpy|gymnasium|gymnasium-robotics|robosuite|gym-hil|shimmy|dm_control)(\[.*\])?==(\S+)"
    )
    pins = [ours.match(line) for name in PINS for line in (REPO / name).read_text().splitlines()]
    for pin in filter(None, pins):
        assert importlib.metadata.version(pin[1]) == pin[3], pin[0]
    assert sum(map(bool, pins)) == 8


# --- States -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("env_id", "length", "returns"),
    [
        ("gymnasium_robotics:FetchReach-v4", 50, (-50, 0)),  # -1 in each step off the goal
        ("gymnasium_robotics:AdroitHandDoor-v1", 200, (-200, 4000)),
        ("gym_hil:gym_hil/PandaPickCubeBase-v0", 100, (0, 100)),  # 1 in a step that holds the cube up
        ("shimmy:dm_control/cartpole-balance-v0", 1000, (0, 1000)),  # at most 1 in each step
    ],
)
def test_state_script_trains_and_evaluates(env_id, length, returns, tmp_path):
    run = run_script(
        "sac_state_sim.py", "--env-id", env_id, *SHORT.split(), cwd=tmp_path, timeout=900, env=WITHOUT_DISPLAY
    )
    train, evaluations = read_csv(run.run_dir, "train.csv"), read_csv(run.run_dir, "eval.csv")
    losses = [column for column in train if column.startswith("losses/")]
    assert losses and all(np.isfinite(train[column][-1]) for column in losses)
    assert evaluations["global_step"][-1] == 300
    assert evaluations["eval/episodic_length"][-1] <= length
    assert returns[0] <= evaluations["eval/episodic_return"][-1] <= returns[1]

    run_script(
        "sac_state_sim.py",
        *("--resume", run.run_dir, "--total-timesteps", 400),
        cwd=tmp_path,
        timeout=900,
        env=WITHOUT_DISPLAY,
    )
    assert read_csv(run.run_dir, "eval.csv")["global_step"][-1] == 400


# --- robosuite --------------------------------------------------------------------------------------------------------
OBSERVED = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "object")  # robomimic's low-dimensional ones


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
        assert len(actions) < 100, "the scripted expert does not lift the cube"
    names = {"object": "object-state"}  # robomimic's name: robosuite's
    obs = {key: np.array([row[names.get(key, key)] for row in rows]) for key in OBSERVED}
    return {**obs, "actions": np.array(actions), "rewards": np.array(rewards)}


def write_lift(path: Path, env_args: dict, demos: int) -> None:
    """A low-dimensional file of robomimic's layout, recorded on the robosuite that is installed."""
    import robosuite

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


def test_cloning_lifts_the_cube_in_robosuite(tmp_path):
    """B1, B2: a Lift file of robomimic's layout is recorded, cloned, and the clone is evaluated in robosuite itself."""
    write_lift(tmp_path / "lift.hdf5", lift_env_args(), demos=12)
    flags = "--env-name lift-ph-low_dim --offline-steps 1500 --eval-episodes 4 --eval-envs 2 --no-capture-video"
    flags += " --log-interval 500 --eval-interval 0"
    run = run_script(
        "bc_flow_offline.py",
        *(*flags.split(), "--dataset-path", "lift.hdf5", "--run-dir", "run"),
        cwd=tmp_path,
        timeout=1000,
        env=WITHOUT_DISPLAY,
    )
    evaluations = read_csv(tmp_path / "run", "eval.csv")
    assert "no evaluation" not in run.stderr
    (column,) = [name for name in evaluations if name.endswith("success_rate")]
    assert evaluations[column][-1] >= 0.5, evaluations
