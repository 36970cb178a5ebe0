"""Training steps per second of sac_state_sim.py beside CleanRL, LeanRL, SB3 and SBX, on one machine, in one go.

    python benchmarks/sac_state_speed.py                                          # ours alone
    python benchmarks/sac_state_speed.py --cleanrl-path CLEANRL --cleanrl-python CLEANRL_VENV/bin/python \\
        --sb3-python SB3_VENV/bin/python --sbx-python SBX_VENV/bin/python         # the table
    python benchmarks/sac_state_speed.py --gpu --env-id HalfCheetah-v4 --threads 8 --rounds 2 --cleanrl-path CLEANRL \\
        --cleanrl-python VENV/bin/python --leanrl-path LEANRL --leanrl-python VENV/bin/python      # on a GPU

The same task and settings for all: SAC, two critics, 2 x 256 ReLU units, batches of 256, one update of critics, actor
and temperature per step. Each measurement is a process of its own on the same cores; the contenders take turns, so
that a change of the machine's speed meets all alike. The clock runs from `warmup` updates after the random steps to
the last step: start, compilation and evaluation are outside. The other projects are not part of this one: give a
checkout of CleanRL (https://github.com/vwxyzjn/cleanrl), of LeanRL (https://github.com/meta-pytorch/LeanRL), and
interpreters that can import what they need. CleanRL and LeanRL are of gymnasium 0.29, whose cheetah is HalfCheetah-v4;
with gymnasium 1.x, CleanRL's SyncVectorEnv needs autoreset_mode=SAME_STEP and "final_obs". LeanRL's script is the one
for torch.compile and CUDA graphs, both switched on with --gpu; a stand-in for wandb notes when it logs. At commit
760837e it needs two changes: with tensordict 0.12 its policy may give the action only, `get_action(x)[0]`; with NumPy
2.4 an episode's return is read by `.item()`.

Run it on a quiet machine. `others_cores` in the file says how many cores other processes used during a measurement:
OpenMP's two threads wait for each other, so that one foreign process slows a PyTorch contender many times over.
"""

import csv
import hashlib
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from run import REPO, RESULTS
from speed import bind, interpreter, run_contender, take_turns, timing, versions

# The flags of sac_state_sim.py that make it the others' SAC; {total} and {learning_starts} are filled in.
OURS = """--env-id {env_id} --total-timesteps {total} --learning-starts {learning_starts} --demos 0 --batch-size 256
    --num-qs 2 --num-min-qs 2 --utd-ratio 1 --policy-delay 1 --no-layer-norm
    --no-normalize-observations --backup-entropy --gamma 0.99 --alpha-init 1.0
    --target-entropy-per-dim -1.0 --eval-every 1000 --eval-episodes 1
    --final-eval-episodes 1 --no-capture-video"""
CLEANRL = "--env-id {env_id} --total-timesteps {total} --learning-starts {learning_starts} --batch-size 256"
WANDB = """
import json, time
def init(**settings): pass
def log(values, step): print(json.dumps([step, time.time()]))
"""
# SB3 and SBX share their interface. Prints [[step, seconds], ...] at both ends of the timed part.
SB3 = """
import json, sys, time
import gymnasium as gym
from {package} import SAC
from stable_baselines3.common.callbacks import BaseCallback

class Clock(BaseCallback):
    marks = []
    def _on_step(self):
        if self.num_timesteps in ({start}, {total}):
            self.marks.append([self.num_timesteps, time.time()])
        return True

agent = SAC("MlpPolicy", gym.make("{env_id}"), batch_size=256, learning_starts={learning_starts}, train_freq=1,
            gradient_steps=1, policy_kwargs=dict(net_arch=[256, 256]), seed={seed})
agent.learn({total}, callback=Clock())
print(json.dumps(Clock.marks))
"""


# --- Args -------------------------------------------------------------------------------------------------------------
@dataclass
class Args:
    ours: bool = True
    """measure sac_state_sim.py, with this interpreter"""
    cleanrl_path: Path | None = None
    """checkout of CleanRL: the folder that holds cleanrl/ and cleanrl_utils/"""
    cleanrl_python: str = sys.executable
    """interpreter for CleanRL"""
    leanrl_path: Path | None = None
    """checkout of LeanRL: the folder that holds leanrl/"""
    leanrl_python: str = sys.executable
    """interpreter for LeanRL"""
    sb3_python: str | None = None
    """interpreter that can import stable_baselines3"""
    sbx_python: str | None = None
    """interpreter that can import sbx"""
    env_id: str = "HalfCheetah-v5"
    """gymnasium id"""
    rounds: int = 5
    """measurements of each contender"""
    learning_starts: int = 1000
    """random steps, not timed"""
    warmup: int = 1000
    """steps with updates before the clock starts"""
    steps: int = 5000
    """timed steps"""
    threads: int = 2
    """cores that every process is bound to, and OMP_NUM_THREADS"""
    gpu: bool = False
    """let the contenders use a GPU"""
    output: Path = RESULTS / "sac_state_speed.csv"
    """file that gets one line per measurement, after those that it holds"""


# --- Contenders -------------------------------------------------------------------------------------------------------
def commands(args: Args, seed: int, folder: Path) -> dict[str, list[str]]:
    """Contender -> command; writes the SB3 and SBX scripts and LeanRL's wandb into `folder`."""
    values = {"env_id": args.env_id, "learning_starts": args.learning_starts, "seed": seed}
    values |= {"total": args.learning_starts + args.warmup + args.steps, "start": args.learning_starts + args.warmup}
    found = {}
    if args.ours:
        flags = ["--seed", str(seed), "--run-dir", str(folder / "runs")]
        found["ours"] = [sys.executable, str(REPO / "sac_state_sim.py"), *OURS.format(**values).split(), *flags]
        if not args.gpu:  # which such small products do not keep busy
            found["ours_bf16"] = [*found["ours"], "--amp"]
    if args.cleanrl_path:
        script = args.cleanrl_path.resolve() / "cleanrl" / "sac_continuous_action.py"
        flags = CLEANRL.format(**values | {"total": values["total"] + 1}).split()  # it logs a step after taking it
        found["cleanrl"] = [interpreter(args.cleanrl_python), str(script), *flags, "--seed", str(seed)]
    if args.leanrl_path:
        (folder / "wandb.py").write_text(WANDB)
        script = args.leanrl_path.resolve() / "leanrl" / "sac_continuous_action_torchcompile.py"
        flags = [*CLEANRL.format(**values | {"total": values["total"] + 1}).split(), "--seed", str(seed)]
        flags += ["--compile", "--cudagraphs"] if args.gpu else []
        found["leanrl"] = [interpreter(args.leanrl_python), str(script), *flags]
    for name, package, python in (("sb3", "stable_baselines3", args.sb3_python), ("sbx", "sbx", args.sbx_python)):
        if python:
            (folder / f"{name}_sac.py").write_text(SB3.format(package=package, **values))
            found[name] = [interpreter(python), str(folder / f"{name}_sac.py")]
    return found


def version(contender: str, command: list[str]) -> str:
    """The versions that matter, as the contender's interpreter finds them; of a script that is no package its hash."""
    packages = {
        "ours": ["torch"],
        "ours_bf16": ["torch"],
        "cleanrl": ["torch"],
        "leanrl": ["torch", "tensordict", "torchrl"],
        "sb3": ["stable_baselines3", "torch"],
        "sbx": ["sbx-rl", "jax"],
    }
    found = versions(command[0], *packages[contender], "gymnasium", "mujoco")
    if contender in ("cleanrl", "leanrl"):
        return f"sha256 {hashlib.sha256(Path(command[1]).read_bytes()).hexdigest()[:8]}, {found}"
    return found


def marks(contender: str, folder: Path, stdout: str) -> list[tuple[int, float]]:
    """(step, time in s) at each moment that a finished run has noted."""
    if contender in ("sb3", "sbx"):
        return [tuple(mark) for mark in json.loads(stdout.splitlines()[-1])]
    if contender == "leanrl":
        return [tuple(json.loads(line)) for line in stdout.splitlines() if line.startswith("[")]
    if contender.startswith("ours"):  # its steps per second leave out what it evaluates in between
        with (folder / "runs" / "train.csv").open(newline="") as file:
            rows = [(int(row["global_step"]), float(row["charts/SPS"])) for row in csv.DictReader(file)]
        times = np.cumsum([(step - before) / rate for (before, _), (step, rate) in zip(rows, rows[1:], strict=False)])
        return [(rows[0][0], 0.0), *((step, float(time)) for (step, _), time in zip(rows[1:], times, strict=True))]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = (folder / "runs").rglob("events.out.tfevents.*")
    scalars = EventAccumulator(str(events), size_guidance={"scalars": 0}).Reload().Scalars("charts/SPS")
    return [(scalar.step, scalar.wall_time) for scalar in scalars]


# --- Measuring --------------------------------------------------------------------------------------------------------
def measure(contender: str, args: Args, seed: int) -> dict[str, object]:
    """Runs one contender once: timed steps, their time (s), and the cores that other processes used meanwhile."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        paths = {"cleanrl": args.cleanrl_path and args.cleanrl_path.resolve(), "leanrl": folder}
        env = {"PYTHONPATH": str(paths[contender])} if contender in paths else {}
        command = commands(args, seed, folder)[contender]
        stdout, others = run_contender(command, folder, args.threads, args.gpu, **env)
        noted = marks(contender, folder, stdout)
    first, start = next(mark for mark in noted if mark[0] >= args.learning_starts + args.warmup)
    last, end = noted[-1]
    return timing(last - first, end - start) | {"others_cores": others}


# --- Main -------------------------------------------------------------------------------------------------------------
def main(args: Args) -> None:
    if args.steps % 500 or (args.learning_starts + args.warmup) % 500:
        raise SystemExit("--steps and --learning-starts + --warmup: give multiples of 500, the logs' interval")
    bind(args.threads)
    with tempfile.TemporaryDirectory() as temporary:
        runs = commands(args, 0, Path(temporary))
    flags = {"cleanrl": "--cleanrl-path", "leanrl": "--leanrl-path", "sb3": "--sb3-python", "sbx": "--sbx-python"}
    for contender, flag in flags.items():
        if contender not in runs:
            print(f"{contender} is left out: {flag} is not given")
    names = {contender: version(contender, command) for contender, command in runs.items()}

    def measured(contender: str, number: int) -> dict[str, object]:
        return measure(contender, args, seed=number) | {"version": names[contender]}

    command = f"python benchmarks/sac_state_speed.py, {args.steps} steps of {args.env_id}"
    medians = take_turns(runs, args.rounds, measured, args.output, command)
    for contender, median in medians.items():
        if "ours" in medians and contender != "ours":
            print(f"ours is {medians['ours'] / median:.2f} x {contender}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
