"""Run one row of the results table, once per seed, and record the outcome in benchmarks/results/.

    python benchmarks/run.py sac_pick_default                # with the row's own seeds
    python benchmarks/run.py sac_pick_default --seeds 1 2 3
    python benchmarks/report.py                              # then write the tables from the files

Each seed runs the row's command as a process of its own. Recorded are the metric in the last line of its eval.csv, the
wall time and the largest resident memory of the whole process (start, training, evaluation, video), the date, the
commit, the hardware and the exact command. A seed that is run again replaces its line.
"""

import csv
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import tyro

REPO = Path(__file__).resolve().parent.parent
RESULTS = REPO / "benchmarks" / "results"
COLUMNS = ["row", "seed", "env_id", "global_step", "metric", "value", "wall_s", "peak_mb", "date", "commit"]
COLUMNS += ["hardware", "command"]


@dataclass(frozen=True)
class Row:
    what: str
    """what is measured, in the words of the table"""
    command: str
    """script and flags, without seed and run directory"""
    metric: str
    """column of eval.csv"""
    target: str
    """what it must reach, in the words of the table"""
    seeds: tuple[int, ...] = (1, 2, 3)
    formerly: str | None = None
    """the same command, as flags were spelled when the recorded results were measured"""


CHEETAH = "sac_state_sim.py --env-id HalfCheetah-v5 --demos 0 --total-timesteps 100000 --learning-starts 5000"
CHEETAH += " --eval-every 10000 --batch-size 256 --utd-ratio 1 --policy-delay 1 --gamma 0.99 --backup-entropy"
CHEETAH += " --target-entropy-per-dim -1.0"
ROWS = {
    "sac_pick_default": Row(
        "the default: 20 scripted demonstrations, 6,000 steps",
        "sac_state_sim.py",
        "eval/success_rate",
        "at least 0.95; 12,000 steps, 3 min",
        seeds=(1, 2, 3, 4, 5),
    ),
    "sac_pick_scratch": Row(
        "without demonstrations",
        "sac_state_sim.py --demos 0 --total-timesteps 40000 --learning-starts 2000 --explore-prob 0.005 --n-step 3"
        " --batch-size 64 --utd-ratio 4",
        "eval/success_rate",
        "at least 0.95; 40,000 steps, 15 min",
        seeds=(1, 2, 3, 4, 5),
    ),
    "sac_pick_mirror": Row(
        "without demonstrations, half of each batch seen in a mirror",
        "sac_state_sim.py --demos 0 --mirror 1 5 8 11 --total-timesteps 25000 --learning-starts 2000"
        " --explore-prob 0.005 --n-step 3 --batch-size 64 --utd-ratio 4",
        "eval/success_rate",
        "at least 0.95; 25,000 steps",
        seeds=(1, 2, 3, 4, 5),
    ),
    "sac_peg_default": Row(
        "a peg in a hole, sparse reward, 20 scripted demonstrations",
        "sac_state_sim.py --env-id FrankaPegInsert-v0 --total-timesteps 10000",
        "eval/success_rate",
        "at least 0.9",
    ),
    "sac_peg_mirror": Row(
        "the peg, half of each batch seen in a mirror",
        "sac_state_sim.py --env-id FrankaPegInsert-v0 --mirror 2 4 6 9 12 14 15 17 19 21 23 25 27 29"
        " --total-timesteps 10000",
        "eval/success_rate",
        "at least 0.9",
    ),
    "reward_classifier": Row(
        "success classifier of the simulated peg, in lights that it has not seen: frames right",
        "reward_classifier.py --test-episodes 200",
        "eval/frames_right",
        "at least 0.99; at most 1 false success in 100 failed episodes, over all seeds",
    ),
    "sac_halfcheetah_100k": Row(
        "locomotion, one update per step",
        f"{CHEETAH} --alpha-init 0.2 --lr 1e-3",
        "eval/episodic_return",
        "at least 6,000",
        formerly=f"{CHEETAH} --alpha-init 0.2 --actor-lr 1e-3 --critic-lr 1e-3 --alpha-lr 1e-3",
    ),
    "pixel_pick_default": Row(
        "from two cameras, 20 scripted demonstrations",
        "sac_pixel_sim.py",
        "eval/success_rate",
        "at least 0.9; 10 min on two CPU cores",
    ),
    "pixel_pick_gpu": Row(
        "from two cameras, 20 scripted demonstrations, on a GPU",
        "sac_pixel_sim.py --no-capture-video",
        "eval/success_rate",
        "at least 0.9; 3 min on one GPU",
    ),
    "pixel_pick_resnet": Row(
        "from two cameras of 128 x 128, ResNet-10, on a GPU",
        "sac_pixel_sim.py --encoder resnet10 --image-size 128 --batch-size 256 --amp --total-timesteps 12000"
        " --no-capture-video",
        "eval/success_rate",
        "at least 0.95; 5 min on an H200",
    ),
    "pixel_peg_default": Row(
        "from two cameras, sparse reward, 20 scripted demonstrations",
        "sac_pixel_sim.py --env-id FrankaPegInsert-v0 --total-timesteps 12000",
        "eval/success_rate",
        "at least 0.9",
        formerly="sac_pixel_sim.py --env-id FrankaPegInsert-v0",
    ),
    "pixel_pick_vice": Row(
        "the reward learned from images of success",
        "sac_pixel_sim.py --reward vice --total-timesteps 12000",
        "eval/success_rate",
        "learns",
        formerly="sac_pixel_sim.py --reward vice",
    ),
    "pixel_pick_scratch": Row(
        "from two cameras, without demonstrations",
        "sac_pixel_sim.py --demos 0 --total-timesteps 40000 --learning-starts 2000 --explore-prob 0.01 --utd-ratio 4"
        " --policy-delay 2 --amp --n-step 1",
        "eval/success_rate",
        "learns",
        formerly="sac_pixel_sim.py --demos 0 --total-timesteps 40000 --learning-starts 2000 --explore-prob 0.01"
        " --utd-ratio 4 --policy-delay 2 --amp",
    ),
    # The published settings, as far as flags of ours express them; the script's header says what differs.
    "serl_settings": Row(  # rail-berkeley/serl utils/launcher.py:50; its actor sees all 8 batches of a step
        "SERL's settings",
        "sac_state_sim.py --demos 0 --total-timesteps 20000 --batch-size 256 --num-qs 10 --num-min-qs 2 --utd-ratio 8"
        " --policy-delay 8 --activation tanh --gamma 0.99 --lr-warmup 2000 --learning-starts 1000"
        " --no-normalize-observations",
        "eval/success_rate",
        "",
        seeds=(1,),
    ),
    "rlpd_settings": Row(  # ikostrikov/rlpd README.md (locomotion), configs/rlpd_config.py; its actor has no LayerNorm
        "RLPD's settings, made for longer runs",
        "sac_state_sim.py --bc-weight 0 --demo-noise 0 --total-timesteps 6000 --batch-size 256 --num-qs 10"
        " --num-min-qs 2 --utd-ratio 20 --policy-delay 20 --gamma 0.99 --learning-starts 500"
        " --no-normalize-observations --backup-entropy --alpha-init 1.0",
        "eval/success_rate",
        "",
        seeds=(1,),
    ),
    "bc_pick_default": Row(
        "cloning, the default: 200 scripted demonstrations, 5,000 updates",
        "bc_flow_offline.py",
        "success_rate",
        "at least 0.98; 5 min",
    ),
}
# The default at half its steps, and one flag changed: what each is worth.
SAC_FLAGS = {
    "default": ("the default", ""),
    "no_imitation": ("no imitation in the actor's loss", " --bc-weight 0"),
    "few_demos": ("a tenth of each batch from demonstrations, not half", " --demo-ratio 0.1"),
    "clean_demos": ("no noise on the demonstrations' actions", " --demo-noise 0"),
    "no_layer_norm": ("no LayerNorm", " --no-layer-norm"),
    "no_ema": ("no average of the actor", " --actor-ema 0"),
    "unnormalized": ("observations as they are", " --no-normalize-observations"),
    "utd_2": ("two updates per step, not six", " --utd-ratio 2"),
    "utd_12": ("twelve updates per step, not six", " --utd-ratio 12"),
    "mirror": ("half of each batch seen in a mirror", " --mirror 1 5 8 11"),
}
for name, (what, flags) in SAC_FLAGS.items():
    command = f"sac_state_sim.py --total-timesteps 3000 --no-capture-video{flags}"
    ROWS[f"sac_pick_3k_{name}"] = Row(f"3,000 steps: {what}", command, "eval/success_rate", "")
# Half of the default's demonstrations, and one flag changed: what each is worth.
BC_FLAGS = {
    "half": ("half the demonstrations", ""),
    "single_actions": ("the same, single actions", " --no-action-chunking"),
    "execute_2": ("the same, two of five actions executed", " --execution-horizon 2"),
    "constant_lr": ("the same, constant learning rate", " --lr-schedule constant"),
    "no_ema": ("the same, no averaging", " --ema 0.0"),
    "unnormalized": ("the same, observations as they are", " --no-normalize-observations"),
    "two_flow_steps": ("the same, two flow steps", " --flow-steps 2"),
    "heun": ("the same, five steps of Heun", " --flow-steps 5 --flow-solver heun"),
    "top_half": ("the default's demonstrations, the better half", " --demos 200 --top-fraction 0.5"),
    "gaussian": ("the same, tanh-Gaussian policy", " --policy gaussian"),
}
for name, (what, flags) in BC_FLAGS.items():
    command = f"bc_flow_offline.py --demos 100 --no-capture-video{flags}"
    ROWS[f"bc_pick_{name}"] = Row(f"cloning, {what}", command, "success_rate", "", seeds=(1,))
# Data recorded by `sac_state_sim.py --eval-only RUN_DIR --record-dataset halfcheetah/sac-v0 --final-eval-episodes 200`.
CHEETAH_DATA = "bc_flow_offline.py --env-name halfcheetah/sac-v0"
STRONG = "--normalize-observations --ema 0.999 --lr 1e-3 --lr-schedule cosine --log-interval 1000 --no-capture-video"
for name, (what, steps, flags) in {
    "single": ("single actions", 20_000, ""),
    "chunks": ("chunks of 5, the first action executed", 40_000, " --action-chunking --execution-horizon 1"),
    "open_loop": ("chunks of 5, all executed", 40_000, " --action-chunking"),
}.items():
    ROWS[f"bc_halfcheetah_{name}"] = Row(
        f"cloning of a recorded SAC policy, {what}",
        f"{CHEETAH_DATA} --offline-steps {steps} --eval-interval 5000 {STRONG}{flags}",
        "episodic_return",
        "98% of the data's mean return (6,675)",
        seeds=(1,),
    )
# Recorded by `sac_pixel_sim.py --eval-only RUN_DIR --record-dataset peg/pixels-v0 --final-eval-episodes 100`, after the
# first seed of pixel_peg_default.
ROWS["bc_peg_pixels"] = Row(
    "cloning from two cameras: 100 episodes of a learned policy",
    "bc_flow_offline.py --env-name peg/pixels-v0 --encoder small --offline-steps 2000 --batch-size 64"
    " --eval-interval 500 --no-capture-video",
    "success_rate",
    "at least 0.9",
)
# Minari's public data, with a network. Targets: FQL's flow policy as ZhangJL16/FQLbaseline (af8af82) measured it there.
MINARI = {"halfcheetah": (58.9, 107.9, 135.4), "hopper": (55.2, 91.6, 115.5), "walker2d": (89.2, 125.6, 150.1)}
for robot, scores in MINARI.items():
    for level, score in zip(("simple", "medium", "expert"), scores, strict=True):
        ROWS[f"bc_minari_{robot}_{level}"] = Row(
            f"flow cloning of Minari's {robot} {level}",
            f"bc_flow_offline.py --env-name mujoco/{robot}/{level}-v0 --normalize-observations --no-capture-video",
            "normalized_score_d4rl_scale",
            f"{score}",
        )


# --- Args -------------------------------------------------------------------------------------------------------------
@dataclass
class Args:
    row: tyro.conf.Positional[str]
    """name of a row in ROWS"""
    seeds: tuple[int, ...] = ()
    """seeds to run, one after the other (default: the row's own)"""


# --- Measuring --------------------------------------------------------------------------------------------------------
def measure(command: list[str], cwd: Path) -> tuple[float, float]:
    """Run `command`; returns its wall time (s) and its largest resident memory, or that of a child of its own (MB).

    Raises SystemExit if it fails.
    """
    start = time.monotonic()
    process = subprocess.Popen(command, cwd=cwd)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"`{shlex.join(command)}` exited with {process.returncode}; nothing is recorded")
    return time.monotonic() - start, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def hardware() -> str:
    """CPU model, number of cores that this process may use, and the GPU if torch sees one."""
    cpu_info = Path("/proc/cpuinfo")
    models = [line.partition(":")[2].strip() for line in cpu_info.read_text().splitlines() if "model name" in line]
    gpu_name = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU')"
    gpu = subprocess.run([sys.executable, "-c", gpu_name], capture_output=True, text=True, check=True).stdout.strip()
    return f"{models[0] if models else platform.machine()}, {len(os.sched_getaffinity(0))} cores, {gpu}"


def commit() -> str:
    """Short hash; -dirty if a script or a module in common/ differs from that commit."""
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=REPO, capture_output=True, text=True, check=True)
    status = ["git", "status", "--porcelain", "--", ":(glob)*.py", ":(glob)common/*.py"]
    changes = subprocess.run(status, cwd=REPO, capture_output=True, text=True, check=True)
    return head.stdout.strip() + ("-dirty" if changes.stdout else "")


# --- Recording --------------------------------------------------------------------------------------------------------
def last_evaluation(eval_csv: Path, metric: str) -> tuple[str, float]:
    """(global_step or step, value) of the last line of a run's eval.csv."""
    with eval_csv.open(newline="") as file:
        last = list(csv.DictReader(file))[-1]
    return last.get("global_step") or last["step"], float(last[metric])


def record(path: Path, line: dict[str, object]) -> None:
    """Add a line to the row's file, in place of an older one with the same seed."""
    lines = []
    if path.exists():
        with path.open(newline="") as file:
            lines = [old for old in csv.DictReader(file) if int(old["seed"]) != line["seed"]]
    new = path.with_suffix(".tmp")
    with new.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted([*lines, line], key=lambda line: int(line["seed"])))
    new.replace(path)


def run_seed(name: str, seed: int) -> None:
    """One run of a row: its line in results/NAME.csv, its curve in results/NAME/seedN_eval.csv."""
    row = ROWS[name]
    script, *flags = shlex.split(row.command)
    run_dir = REPO / "runs" / f"benchmark__{name}__{seed}__{int(time.time())}"
    at_commit = commit()  # of the code that runs, before anyone commits more
    command = [script, *flags, "--seed", str(seed)]
    wall_s, peak_mb = measure([sys.executable, *command, "--run-dir", str(run_dir)], REPO)
    step, value = last_evaluation(run_dir / "eval.csv", row.metric)
    known = next(path for path in (run_dir / "args.json", run_dir / "flags.json") if path.exists())
    known = json.loads(known.read_text())
    line = {"row": name, "seed": seed, "env_id": known.get("env_id") or known["env_name"]}
    line |= {"global_step": step, "metric": row.metric, "value": value}
    line |= {"wall_s": round(wall_s, 1), "peak_mb": round(peak_mb), "date": datetime.now(UTC).date().isoformat()}
    line |= {"commit": at_commit, "hardware": hardware(), "command": shlex.join(["python", *command])}
    (RESULTS / name).mkdir(parents=True, exist_ok=True)
    shutil.copyfile(run_dir / "eval.csv", RESULTS / name / f"seed{seed}_eval.csv")
    record(RESULTS / f"{name}.csv", line)
    print(f"{name} seed {seed}: {row.metric} {value:g} at step {step}, {wall_s:.0f} s, {peak_mb:.0f} MB")


# --- Main -------------------------------------------------------------------------------------------------------------
def main(args: Args) -> None:
    if args.row not in ROWS:
        raise SystemExit(f"there is no row {args.row!r}; the rows are {', '.join(ROWS)}")
    for seed in args.seeds or ROWS[args.row].seeds:
        run_seed(args.row, seed)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
