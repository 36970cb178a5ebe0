"""The working day with the robot, rehearsed on the simulated one: from the first demonstration to the evaluation.

    python benchmarks/hil_rehearsal.py --short                 # every step, in minutes, with too little of everything
    python benchmarks/hil_rehearsal.py --seeds 1 2 3           # peg in hole; the rows of results/hil_rehearsal.csv
    python benchmarks/hil_rehearsal.py --help-until 0          # the same without interventions
    python benchmarks/hil_rehearsal.py --classifier            # the reward of a classifier that is trained first

It starts robot_server.py with the peg, and runs the commands of README's "A day with the robot" one after the other:
record_demos.py with the scripted expert, reward_classifier.py on labelled frames, sac_pixel_real.py with a scripted
person who takes over often at first, then ever less, and now and then presses a wrong key, and its evaluation without
help. Each is printed before it runs, as one would type it.
"""

import contextlib
import csv
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import tyro

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO), str(REPO / "benchmarks")]

from run import RESULTS, commit, hardware  # noqa: E402

from robot_client import RobotClient  # noqa: E402
from sac_pixel_real import wilson  # noqa: E402

SHORT = "--latent-dim 16 --small-channels 4 8 8 --batch-size 16 --utd-ratio 1 --learning-starts 60"
COLUMNS = ["row", "seed", "transitions", "robot_s", "success", "episodes", "low", "high", "intervention_rate"]
COLUMNS += ["cycle_s", "demo_cycle_s", "late_p99_ms", "wall_s", "date", "commit", "hardware", "command"]


# --- Args -------------------------------------------------------------------------------------------------------------
@dataclass
class Args:
    seeds: tuple[int, ...] = (1,)
    """one working day each"""
    short: bool = False
    """every step with too little of everything: does it run?"""
    demos: int = 20
    """demonstrations by the scripted expert"""
    classifier: bool = False
    """record labelled frames and train a classifier, whose reward is learned from; else the simulated task's"""
    total_timesteps: int = 12_000
    """transitions to learn from"""
    help_until: int = 6_000
    """environment steps after which the scripted person no longer takes over (0: never does)"""
    image_size: int = 48
    """pixels that the pictures are resized to, as sac_pixel_sim.py has it"""
    eval_episodes: int = 50
    """episodes of the evaluation"""
    sim_speed: float = 1.0
    """simulated time per real time; the faster it goes, the older is what the policy sees when it acts"""
    port: int = 5640
    """of the robot's server; the learner takes the tenth port after it"""
    folder: str = "runs/rehearsal"
    """where runs and datasets go"""

    def row(self) -> str:
        """The name of this kind of day in results/."""
        name = "hil_rehearsal"
        if not self.help_until:
            name += "_without_help"
        if self.classifier:
            name += "_classifier"
        return name


# --- The day ----------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def robot(args: Args, folder: Path) -> Iterator[str]:
    """A simulated robot with the peg; its address."""
    command = [sys.executable, str(REPO / "robot_server.py"), "--env-id", "FrankaPegInsert-v0"]
    command += ["--port", str(args.port), "--sim-speed", str(args.sim_speed)]
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    address = f"tcp://127.0.0.1:{args.port}"
    try:
        with contextlib.closing(RobotClient(address)) as client:
            client.hello(60.0)
        yield address
    finally:
        process.terminate()
        process.wait()


def step(folder: Path, *command: object, tries: int = 1) -> str:
    """Runs a script, shows the command; a part of what it says is for the report. Exits when it fails `tries` times."""
    command = [str(part) for part in command]
    print(f"\n$ python {shlex.join(command)}", flush=True)
    env = os.environ | {"MINARI_DATASETS_PATH": str(folder / "datasets")}
    for left in range(tries - 1, -1, -1):
        lines = []
        process = subprocess.Popen(
            [sys.executable, str(REPO / command[0]), *command[1:]],
            cwd=folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
        if process.wait() == 0:
            return "".join(lines)
        if not left:
            raise SystemExit(f"`python {shlex.join(command)}` exited with {process.returncode}")


def learn_reward(args: Args, folder: Path, server: tuple[str, str], seed: int) -> str:
    """--reward for the training: a classifier's file in `folder`, or the task's own."""
    if not args.classifier:
        return "task"
    frames = 30 if args.short else 200
    flags = ("--mode", "classifier", "--teleop", "expert", "--frames", frames, "--seed", seed, *server)
    step(folder, "record_demos.py", *flags, tries=5)
    flags = ("--data", "hil/frames-v0", "--seed", seed, "--run-dir", "classifier")
    step(folder, "reward_classifier.py", *flags, *(("--updates", 60) if args.short else ()))
    return "classifier/classifier.pt"


def demonstrated_s(folder: Path) -> float:
    """Mean length of the successful demonstrations."""
    import minari

    os.environ["MINARI_DATASETS_PATH"] = str(folder / "datasets")
    episodes = minari.load_dataset("hil/demos-v0").iterate_episodes()
    return float(np.mean([episode.infos["time_s"][-1] for episode in episodes if episode.infos["success"][-1]]))


def work(args: Args, seed: int, folder: Path) -> dict[str, object]:
    """One day in `folder`: the line of the table that it makes."""
    at_commit = commit()
    folder.mkdir(parents=True)
    demos, steps, episodes = (3, 200, 2) if args.short else (args.demos, args.total_timesteps, args.eval_episodes)
    start = time.monotonic()
    with robot(args, folder) as address:
        server = ("--server", address)
        flags = ("--teleop", "expert", "--episodes", demos, "--seed", seed, *server)
        step(folder, "record_demos.py", *flags, tries=5)
        reward = learn_reward(args, folder, server, seed)
        flags = ["--teleop", "scripted", "--help-until", args.help_until, "--reward", reward, "--gripper", "fixed"]
        flags += ["--image-size", args.image_size]
        flags += ["--total-timesteps", steps, "--seed", seed, *(SHORT.split() if args.short else ())]
        here = ("--run-dir", "run", "--address", f"127.0.0.1:{args.port + 10}", *server)
        step(folder, "sac_pixel_real.py", *flags, *here)
        # The task's word: a classifier is no judge of the policy that learned to please it.
        flags_of_evaluation = ("--final-eval-episodes", episodes, "--reward", "task", *server)
        step(folder, "sac_pixel_real.py", "--eval-only", "run", *flags_of_evaluation)
    line = {"row": args.row(), "seed": seed, "demo_cycle_s": demonstrated_s(folder)}
    line |= read_day(folder / "run")
    line |= {"wall_s": round(time.monotonic() - start), "date": datetime.now(UTC).date().isoformat()}
    line |= {"commit": at_commit, "hardware": hardware()}
    return line | {"command": shlex.join(["python", "sac_pixel_real.py", *map(str, flags)])}


def read_day(run_dir: Path) -> dict[str, object]:
    """What came of it: of the training's last 20 episodes, and of the evaluation."""
    trained, evaluated = (read_table(run_dir / f"{name}.csv") for name in ("train", "evaluation_newest"))
    won = evaluated["success"] == 1
    low, high = wilson(int(won.sum()), len(won))
    cycle_s = evaluated["cycle_s"][won].mean() if won.any() else np.nan
    return {
        "transitions": int(trained["global_step"][-1]),
        "robot_s": round(trained["time/cycle_s"].sum()),  # of the episodes, without resets
        "success": won.mean(),
        "episodes": len(won),
        "low": low,
        "high": high,
        "intervention_rate": trained["charts/intervention_rate"][-1],
        "cycle_s": cycle_s,
        "late_p99_ms": np.median(trained["time/late_p99_ms"][-20:]),
    }


def read_table(path: Path) -> dict[str, np.ndarray]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}


# --- Main -------------------------------------------------------------------------------------------------------------
def main(args: Args) -> None:
    for seed in args.seeds:
        folder = Path(args.folder).absolute() / f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{seed}"
        line = work(args, seed, folder)
        line = {name: f"{line[name]:.4g}" if isinstance(line[name], float) else line[name] for name in COLUMNS}
        print("\n" + "\n".join(f"{name:18} {value}" for name, value in line.items()))
        if args.short:
            continue
        copies = RESULTS / args.row()
        copies.mkdir(exist_ok=True)
        for ours, theirs in (("train", "train"), ("evaluation", "evaluation_newest")):
            shutil.copyfile(folder / "run" / f"{theirs}.csv", copies / f"seed{seed}_{ours}.csv")
        path = RESULTS / "hil_rehearsal.csv"
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(line)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
