"""Speed of franka_sim.py on one core, and success of its scripted experts.

    python benchmarks/franka_sim_speed.py
    python benchmarks/franka_sim_speed.py --rounds 1 --no-expert    # a quick look

Everything goes through gym.make with its default wrappers, resets included. Contenders: pick_states (random actions),
pick_states_grasp (the expert's recorded actions, with contacts), pick_one_camera and pick_two_cameras (128 x 128,
software OpenGL unless there is a GPU), peg_states (50 physics steps per action), robot_1khz (FrankaSim alone, one
physics step of 1 ms per call). steps_per_second and ms_per_step are by the wall clock, cpu_seconds is this process's.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import gymnasium as gym
import numpy as np
import tyro
from run import REPO, RESULTS, hardware
from speed import write_anew

sys.path.insert(0, str(REPO))
import franka_sim


# --- Args -------------------------------------------------------------------------------------------------------------
@dataclass
class Args:
    rounds: int = 5
    """measurements of each contender; they take turns"""
    seconds: float = 2.0
    """length of a measurement"""
    expert: bool = True
    """run the experts, too"""
    expert_episodes: int = 200
    """seeded resets per expert"""
    core: int = -1
    """core to run on; -1: the last one of this process"""
    output: Path = RESULTS
    """folder for franka_sim_speed.csv and franka_sim_expert.csv"""


# --- Measuring --------------------------------------------------------------------------------------------------------
def steps_of(env: gym.Env, actions: list[np.ndarray] | None = None) -> Iterator[None]:
    """One environment step per `next`, resets included; random actions, or these (T, A) per seed."""
    random, seed = np.random.default_rng(0), 0
    while True:
        env.reset(seed=seed)
        count = env.spec.max_episode_steps
        episode = actions[seed] if actions else random.uniform(-1, 1, (count, *env.action_space.shape))
        for action in episode.astype(np.float32):
            env.step(action)
            yield
        seed = (seed + 1) % (len(actions) if actions else 1_000_000)


def expert_episode(env: gym.Env, seed: int) -> tuple[np.ndarray, float, list[bool]]:
    """(T, A) actions, return and the success of every step."""
    env.reset(seed=seed)
    actions, successes, episodic_return, done = [], [], 0.0, False
    while not done:
        actions.append(env.unwrapped.expert_action())
        _, reward, terminated, truncated, info = env.step(actions[-1])
        episodic_return, done = episodic_return + reward, terminated or truncated
        successes.append(info["success"])
    return np.array(actions), episodic_return, successes


def robot_steps() -> Iterator[None]:
    sim = franka_sim.FrankaSim(dt=0.001)
    while True:
        sim.step()
        yield


def contenders() -> dict[str, Callable[[], Iterator[None]]]:
    """Name -> what makes one step per `next`."""
    pick = "FrankaPickCube-v0"
    recorded = [expert_episode(gym.make(pick), seed)[0] for seed in range(20)]
    return {
        "pick_states": lambda: steps_of(gym.make(pick)),
        "pick_states_grasp": lambda: steps_of(gym.make(pick), recorded),
        "pick_one_camera": lambda: steps_of(gym.make(pick, image_obs=True, cameras=("front",))),
        "pick_two_cameras": lambda: steps_of(gym.make(pick, image_obs=True)),
        "peg_states": lambda: steps_of(gym.make("FrankaPegInsert-v0")),
        "robot_1khz": robot_steps,
    }


def measure(steps: Iterator[None], seconds: float) -> dict[str, float]:
    for _ in range(20):
        next(steps)
    count, start, cpu = 0, time.perf_counter(), time.process_time()
    while (elapsed := time.perf_counter() - start) < seconds:
        for _ in range(10):
            next(steps)
        count += 10
    rates = {"steps_per_second": round(count / elapsed, 1), "ms_per_step": round(1000 * elapsed / count, 4)}
    return {"steps": count, "seconds": round(elapsed, 3), "cpu_seconds": round(time.process_time() - cpu, 3), **rates}


def measure_expert(env_id: str, episodes: int) -> dict[str, object]:
    env = gym.make(env_id)
    runs = [expert_episode(env, seed) for seed in range(episodes)]
    first = [successes.index(True) + 1 for *_, successes in runs if True in successes]
    returns = [episodic_return for _, episodic_return, _ in runs]
    return {
        "env_id": env_id,
        "seeds": f"0-{episodes - 1}",
        "success_rate": np.mean([successes[-1] for *_, successes in runs]),
        "success_any_step": np.mean([any(successes) for *_, successes in runs]),
        "mean_return": round(np.mean(returns), 3),
        "min_return": round(min(returns), 3),
        "max_return": round(max(returns), 3),
        "mean_first_success_step": round(np.mean(first), 2),
        "max_first_success_step": max(first),
    }


def git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=REPO, capture_output=True, text=True, check=True).stdout.strip()


# --- Main -------------------------------------------------------------------------------------------------------------
def main(args: Args) -> None:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[-1] if args.core < 0 else args.core})
    dirty = "-dirty" if git("status", "--porcelain", "--", "franka_sim.py") else ""
    facts = {
        "version": ", ".join(f"{name} {version(name)}" for name in ("mujoco", "gymnasium", "numpy")),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": git("log", "-1", "--format=%h", "--", "franka_sim.py") + dirty,
        "hardware": hardware(),
        "command": "python benchmarks/franka_sim_speed.py",
    }
    lines, running = [], {name: start() for name, start in contenders().items()}
    for number in range(args.rounds):
        for name, steps in running.items():
            lines.append({"contender": name, "round": number, **measure(steps, args.seconds), **facts})
            print(f"{name:18} {lines[-1]['steps_per_second']:9.1f} steps/s {lines[-1]['ms_per_step']:8.3f} ms")
    write_anew(args.output / "franka_sim_speed.csv", lines)
    if args.expert:
        tasks = ("FrankaPickCube-v0", "FrankaPegInsert-v0")
        experts = [measure_expert(task, args.expert_episodes) | facts for task in tasks]
        write_anew(args.output / "franka_sim_expert.csv", experts)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
