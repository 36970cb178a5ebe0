"""Runs of sac_state_sim.py with small networks and budgets on the tasks of probe_envs.py, for the tests to read."""

from pathlib import Path

import numpy as np
import probe_envs
from conftest import Finished, one_line
from forked import run_forked

SCRIPT = "sac_state_sim.py"
TASKS = {"PYTHONPATH": str(Path(probe_envs.__file__).parent)}
POINT = ("--env-id", "probe_envs:Point-v0")
TINY = "--threads 1 --hidden-dims 32 32 --batch-size 32 --utd-ratio 1 --policy-delay 2 --learning-starts 50 "
TINY += "--eval-every 100 --eval-episodes 2 --final-eval-episodes 2 --no-capture-video --demos 0"
WITH_DEMOS = (*POINT, "--demos", 3, "--total-timesteps", 300)


def run(*flags: object, cwd: Path, **options) -> Finished:
    """The script with TINY's flags; later ones win."""
    return script(*TINY.split(), *flags, cwd=cwd, **options)


def script(*flags: object, cwd: Path, **options) -> Finished:
    """The script with these flags only."""
    options["env"] = TASKS | options.get("env", {})
    return run_forked(SCRIPT, *flags, cwd=cwd, **options)


def refused(*flags: object, cwd: Path, **options) -> str:
    """The error of a run that must end with one line."""
    return one_line(script(*flags, cwd=cwd, check=False, **options), SCRIPT)


class AllAtOnce:
    """In the place of link.Learner: `steps` arrive in one message, as from a journal; keeps what it is asked for."""

    def __init__(self, steps: list[np.ndarray]):
        self.steps = steps
        self.asked: list[tuple[int, float, bool]] = []

    def receive(self, wait_ms: int, most: float, asks: bool) -> list[tuple[str, bytes]]:
        self.asked.append((wait_ms, most, asks))
        arrived, self.steps = self.steps, []
        return [("actor", step.tobytes()) for step in arrived]

    def publish(self, *_, **__) -> None: ...

    def saved(self) -> None: ...

    def state_dict(self) -> dict:
        return {}


def stored(state: dict, part: str = "buffer") -> dict:
    """The columns of a buffer in a checkpoint, by their names."""
    names = ("observations", "actions", "rewards", "next_observations", "terminations", "continues")
    return dict(zip(names, state[part]["columns"], strict=True))
