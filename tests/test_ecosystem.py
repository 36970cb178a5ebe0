"""Other people's tasks, the real packages: gymnasium-robotics, gym-hil, dm_control through shimmy, robosuite.

They are not in requirements.txt: pip install -r requirements.txt -r tests/requirements-ecosystem.txt, then
python -m pytest -m ecosystem. A package that is not installed fails its tests, so that nothing passes unseen.
Cases B1 (robosuite runs on the pinned MuJoCo) and B3 (AdroitHandDoor), with the others of issue 12.
"""

import importlib.metadata
import re
import sys

import numpy as np
import pytest
from conftest import REPO, read_csv, run_script

sys.path.insert(0, str(REPO / "benchmarks"))
import ecosystem

pytestmark = [pytest.mark.ecosystem, pytest.mark.timeout(1200)]

PINS = ("requirements.txt", "tests/requirements-ecosystem.txt")
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
    run = run_script("sac_state_sim.py", "--env-id", env_id, *SHORT.split(), cwd=tmp_path, timeout=900)
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
    )
    assert read_csv(run.run_dir, "eval.csv")["global_step"][-1] == 400


# --- robosuite --------------------------------------------------------------------------------------------------------
def test_cloning_lifts_the_cube_in_robosuite(tmp_path):
    """B1, B2: a Lift file of robomimic's layout is recorded, cloned, and the clone is evaluated in robosuite itself."""
    ecosystem.write_lift(tmp_path / "lift.hdf5", demos=12)
    flags = "--env-name lift-ph-low_dim --offline-steps 1500 --eval-episodes 4 --eval-envs 2 --no-capture-video"
    flags += " --log-interval 500 --eval-interval 0"
    run = run_script(
        "bc_flow_offline.py",
        *(*flags.split(), "--dataset-path", "lift.hdf5", "--run-dir", "run"),
        cwd=tmp_path,
        timeout=1000,
    )
    evaluations = read_csv(tmp_path / "run", "eval.csv")
    assert "no evaluation" not in run.stderr
    (column,) = [name for name in evaluations if name.endswith("success_rate")]
    assert evaluations[column][-1] >= 0.5, evaluations
