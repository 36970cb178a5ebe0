"""Environment steps per second of bc_flow_offline.py's evaluation: episodes side by side, and one after the other.

    python benchmarks/bc_evaluation_speed.py

HalfCheetah, the default network (4 x 512 units, 10 flow steps) with random weights, which cost as much as learned ones.
`single` samples one action at a time, `chunks` five; `_1` runs one episode at a time, `_50` fifty side by side.
"""

import csv
import os
import statistics
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import gymnasium as gym
import tyro
from run import REPO, RESULTS, commit, hardware

sys.path.insert(0, str(REPO))
import bc_flow_offline as bc

COLUMNS = ["contender", "round", "steps", "seconds", "steps_per_second", "date", "commit", "hardware", "command"]


# --- Args -------------------------------------------------------------------------------------------------------------
@dataclass
class Args:
    env_id: str = "HalfCheetah-v5"
    """gymnasium id"""
    rounds: int = 3
    """measurements of each contender"""
    episodes: int = 50
    """episodes side by side; one after the other it is a tenth of them"""
    threads: int = 2
    """cores that the process is bound to, and PyTorch's threads"""
    output: Path = RESULTS / "bc_evaluation_speed.csv"
    """file that gets one line per measurement, after those that it holds"""


# --- Measuring --------------------------------------------------------------------------------------------------------
def measure(args: Args, chunks: bool, side_by_side: int) -> tuple[int, float]:
    """Steps of an evaluation, and its time (s)."""
    config = bc.BCAgentConfig(action_chunking=chunks, threads=args.threads)
    device = bc.prepare_torch(config)
    envs = [gym.make(args.env_id) for _ in range(side_by_side)]
    envs = [bc.PolicyInput(env, env.action_space) for env in envs]
    action_dim = envs[0].action_space.shape[0]
    agent = bc.BCAgent.create(envs[0].observation_space.shape, action_dim, config, device)
    episodes = args.episodes if side_by_side > 1 else max(args.episodes // 10, 1)
    start = time.perf_counter()
    stats, _, _ = bc.evaluate(agent, envs, action_dim, episodes, keep_observations=False)
    return round(stats["episodic_length"] * episodes), time.perf_counter() - start


# --- Main -------------------------------------------------------------------------------------------------------------
def main(args: Args) -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    facts = {"date": datetime.now(UTC).date().isoformat(), "commit": commit(), "hardware": hardware()}
    facts["command"] = f"python benchmarks/bc_evaluation_speed.py, {args.episodes} episodes of {args.env_id}"
    speeds: dict[str, list[float]] = {}
    new = not args.output.exists()
    with args.output.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        for number in range(1, args.rounds + 1):
            for name, chunks in (("single", False), ("chunks", True)):
                for side_by_side in (1, args.episodes):
                    steps, seconds = measure(args, chunks, side_by_side)
                    line = {"contender": f"{name}_{side_by_side}", "round": number, "steps": steps}
                    line |= {"seconds": round(seconds, 3), "steps_per_second": round(steps / seconds, 1)}
                    writer.writerow(facts | line)
                    speeds.setdefault(line["contender"], []).append(line["steps_per_second"])
                    print(f"round {number}: {line['contender']:10} {line['steps_per_second']:8.1f} steps/s", flush=True)
    for contender, values in speeds.items():
        print(f"{contender:10} median {statistics.median(values):.1f} (min {min(values):.1f}, max {max(values):.1f})")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
