"""Training steps per second of sac_state_sim.py beside CleanRL, SB3 and SBX, on one machine, in one go.

    python benchmarks/sac_state_speed.py                                          # ours alone
    python benchmarks/sac_state_speed.py --cleanrl-path CLEANRL --cleanrl-python CLEANRL_VENV/bin/python \\
        --sb3-python SB3_VENV/bin/python --sbx-python SBX_VENV/bin/python         # the table

The same task and settings for all: SAC, two critics, 2 x 256 ReLU units, batches of 256, one update of critics, actor
and temperature per step. Each measurement is a process of its own on the same cores; the contenders take turns, so
that a change of the machine's speed meets all alike. The clock runs from `warmup` updates after the random steps to
the last step: start, compilation and evaluation are outside. The other projects are not part of this one: give a
checkout of CleanRL (https://github.com/vwxyzjn/cleanrl) and interpreters that can import what they need. CleanRL is
of gymnasium 0.29; with gymnasium 1.x, its SyncVectorEnv needs autoreset_mode=SAME_STEP and "final_obs".

Run it on a quiet machine. `others_cores` in the file says how many cores other processes used during a measurement:
OpenMP's two threads wait for each other, so that one foreign process slows a PyTorch contender many times over.
"""

import csv
import hashlib
import json
import os
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import tyro
from run import REPO, RESULTS, commit, hardware

COLUMNS = ["contender", "version", "round", "steps", "seconds", "steps_per_second", "others_cores", "date", "commit"]
COLUMNS += ["hardware", "command"]

# The flags of sac_state_sim.py that make it the others' SAC; {total} and {learning_starts} are filled in.
OURS = """--env-id {env_id} --total-timesteps {total} --learning-starts {learning_starts} --demos 0 --batch-size 256
    --num-qs 2 --num-min-qs 2 --utd-ratio 1 --policy-delay 1 --no-layer-norm
    --no-normalize-observations --actor-q min --backup-entropy --gamma 0.99 --alpha-init 1.0
    --target-entropy-per-dim -1.0 --log-every 500 --eval-every 1000000000 --save-every 1000000000
    --final-eval-episodes 1 --no-capture-video"""
CLEANRL = "--env-id {env_id} --total-timesteps {total} --learning-starts {learning_starts} --batch-size 256"
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
def interpreter(python: str) -> str:
    """Absolute path of an interpreter, symbolic links kept: a virtual environment is known by them."""
    if found := shutil.which(python):
        return os.path.abspath(found)
    raise SystemExit(f"{python}: there is no such interpreter")


def commands(args: Args, seed: int, folder: Path) -> dict[str, list[str]]:
    """Contender -> command; writes the SB3 and SBX scripts into `folder`."""
    values = {"env_id": args.env_id, "learning_starts": args.learning_starts, "seed": seed}
    values |= {"total": args.learning_starts + args.warmup + args.steps, "start": args.learning_starts + args.warmup}
    found = {}
    if args.ours:
        flags = ["--seed", str(seed), "--run-dir", str(folder / "runs")]
        found["ours"] = [sys.executable, str(REPO / "sac_state_sim.py"), *OURS.format(**values).split(), *flags]
        found["ours_bf16"] = [*found["ours"], "--amp"]
    if args.cleanrl_path:
        script = args.cleanrl_path.resolve() / "cleanrl" / "sac_continuous_action.py"
        flags = CLEANRL.format(**values | {"total": values["total"] + 1}).split()  # it logs a step after taking it
        found["cleanrl"] = [interpreter(args.cleanrl_python), str(script), *flags, "--seed", str(seed)]
    for name, package, python in (("sb3", "stable_baselines3", args.sb3_python), ("sbx", "sbx", args.sbx_python)):
        if python:
            (folder / f"{name}_sac.py").write_text(SB3.format(package=package, **values))
            found[name] = [interpreter(python), str(folder / f"{name}_sac.py")]
    return found


def version(contender: str, command: list[str]) -> str:
    """The versions that matter, as the contender's interpreter finds them; CleanRL's is the hash of its script."""
    names = {
        "ours": "torch",
        "ours_bf16": "torch",
        "cleanrl": "torch",
        "sb3": "stable_baselines3 torch",
        "sbx": "sbx-rl jax",
    }[contender]
    code = "import sys, importlib.metadata as m; print(*(n + ' ' + m.version(n) for n in sys.argv[1:]), sep=', ')"
    query = [command[0], "-c", code, *names.split(), "gymnasium", "mujoco"]
    found = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    if contender == "cleanrl":
        return f"sha256 {hashlib.sha256(Path(command[1]).read_bytes()).hexdigest()[:8]}, {found}"
    return found


def marks(contender: str, folder: Path, stdout: str) -> list[tuple[int, float]]:
    """(step, time in s) at each moment that a finished run has noted."""
    if contender in ("sb3", "sbx"):
        return [tuple(mark) for mark in json.loads(stdout.splitlines()[-1])]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = (folder / "runs").rglob("events.out.tfevents.*")
    scalars = EventAccumulator(str(events), size_guidance={"scalars": 0}).Reload().Scalars("charts/SPS")
    return [(scalar.step, scalar.wall_time) for scalar in scalars]


# --- Measuring --------------------------------------------------------------------------------------------------------
def busy_seconds() -> float:
    """CPU seconds that all processes of the machine have used (Linux)."""
    user, nice, system, _, _, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def run_contender(command: list[str], folder: Path, threads: int, gpu: bool, **env: str) -> tuple[str, float]:
    """Runs a command in a folder: what it prints, and the cores that other processes used meanwhile.

    Raises SystemExit with the end of its output if it fails.
    """
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "WANDB_MODE": "disabled"} | env
    if not gpu:
        env |= {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}
    clock, busy, own = time.time(), busy_seconds(), resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    if result.returncode != 0:
        raise SystemExit(f"`{shlex.join(command)[:300]}` failed:\n{result.stdout[-1000:]}{result.stderr[-3000:]}")
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    others = busy_seconds() - busy - (now.ru_utime + now.ru_stime - own.ru_utime - own.ru_stime)
    return result.stdout, round(others / (time.time() - clock), 2)


def measure(contender: str, args: Args, seed: int) -> dict[str, object]:
    """Runs one contender once: timed steps, their time (s), and the cores that other processes used meanwhile."""
    env = {"PYTHONPATH": str(args.cleanrl_path.resolve())} if contender == "cleanrl" else {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        command = commands(args, seed, folder)[contender]
        stdout, others = run_contender(command, folder, args.threads, args.gpu, **env)
        noted = marks(contender, folder, stdout)
    (first, start) = next(mark for mark in noted if mark[0] >= args.learning_starts + args.warmup)
    (last, end) = noted[-1]
    return {
        "steps": last - first,
        "seconds": round(end - start, 3),
        "steps_per_second": round((last - first) / (end - start), 1),
        "others_cores": others,
    }


def record(path: Path, line: dict[str, object]) -> None:
    """Appends a line, below a header if the file is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(line)


# --- Main -------------------------------------------------------------------------------------------------------------
def main(args: Args) -> None:
    if args.steps % 500 or (args.learning_starts + args.warmup) % 500:
        raise SystemExit("--steps and --learning-starts + --warmup: give multiples of 500, the logs' interval")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    with tempfile.TemporaryDirectory() as temporary:
        runs = commands(args, 0, Path(temporary))
    for contender, flag in (("cleanrl", "--cleanrl-path"), ("sb3", "--sb3-python"), ("sbx", "--sbx-python")):
        if contender not in runs:
            print(f"{contender} is left out: {flag} is not given")
    facts = {"date": datetime.now(UTC).date().isoformat(), "commit": commit(), "hardware": hardware()}
    facts["command"] = f"python benchmarks/sac_state_speed.py, {args.steps} steps of {args.env_id}"
    versions = {contender: version(contender, command) for contender, command in runs.items()}
    speeds: dict[str, list[float]] = {contender: [] for contender in runs}
    for number in range(1, args.rounds + 1):
        for contender in runs:
            line = measure(contender, args, seed=number)
            line |= {"contender": contender, "version": versions[contender], "round": number}
            record(args.output, facts | line)
            speeds[contender].append(line["steps_per_second"])
            busy = f" (others used {line['others_cores']} cores)" if line["others_cores"] > 0.1 else ""
            print(f"round {number}: {contender:8} {line['steps_per_second']:7.1f} steps/s{busy}", flush=True)
    medians = {contender: statistics.median(values) for contender, values in speeds.items()}
    for contender, values in speeds.items():
        ratio = f", ours is {medians['ours'] / medians[contender]:.2f} x" if "ours" in medians else ""
        print(f"{contender:8} median {medians[contender]:.1f} (min {min(values):.1f}, max {max(values):.1f}){ratio}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
