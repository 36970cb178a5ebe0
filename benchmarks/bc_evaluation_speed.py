"""Environment steps per second of bc_flow_offline.py's evaluation: episodes side by side, and one after the other.

    python benchmarks/bc_evaluation_speed.py

HalfCheetah, the default network (4 x 512 units, 10 flow steps) with random weights, which cost as much as learned ones.
`single` samples one action at a time, `chunks` five; `_1` runs one episode at a time, `_50` fifty side by side.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import tyro
from run import REPO, RESULTS
from speed import bind, take_turns, timing

sys.path.insert(0, str(REPO))
import bc_flow_offline as bc


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
def measure(args: Args, chunks: bool, side_by_side: int) -> dict[str, float]:
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
    seconds = time.perf_counter() - start
    return timing(round(stats["episodic_length"] * episodes), seconds)


# --- Main -------------------------------------------------------------------------------------------------------------
def main(args: Args) -> None:
    bind(args.threads)
    contenders = {}
    for name, chunks in (("single", False), ("chunks", True)):
        for side_by_side in (1, args.episodes):
            contenders[f"{name}_{side_by_side}"] = chunks, side_by_side

    def measured(contender: str, number: int) -> dict[str, float]:
        return measure(args, *contenders[contender])

    command = f"python benchmarks/bc_evaluation_speed.py, {args.episodes} episodes of {args.env_id}"
    take_turns(contenders, args.rounds, measured, args.output, command)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
