"""Updates per second of bc_flow_offline.py from images in memory, and from images that workers read from disk.

    python benchmarks/bc_image_speed.py

Demonstrations of FrankaPickCube-v0 from two cameras are stored as a Minari dataset (HDF5, in the system's file cache),
and cloned from memory, and by worker processes that read them (`workers_0`: the learning process reads by itself). The
losses must be the same. Each measurement is a process of its own on the same cores; the contenders take turns. Start
and first updates are outside. `others_cores` in the file says how many cores other processes used.
"""

import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from run import REPO, RESULTS
from speed import bind, cloning_log, cloning_timing, run_contender, take_turns, versions

FLAGS = "--env-name franka/images-v0 --run-dir run --offline-steps {total} --log-interval {warmup} --eval-episodes 1"
FLAGS += " --no-capture-video --encoder small --batch-size {batch_size} --threads {threads}"


# --- Args -------------------------------------------------------------------------------------------------------------
@dataclass
class Args:
    episodes: int = 50
    """demonstrations of 100 steps"""
    image_size: int = 64
    """height and width of the two cameras' images (pixels)"""
    batch_size: int = 64
    """samples per update"""
    workers: tuple[int, ...] = (0, 1, 2)
    """numbers of worker processes to measure"""
    rounds: int = 3
    """measurements of each contender"""
    warmup: int = 20
    """updates before the clock starts"""
    updates: int = 200
    """timed updates, a multiple of warmup"""
    threads: int = 2
    """cores that every process is bound to, and OMP_NUM_THREADS"""
    gpu: bool = False
    """let the contenders use a GPU"""
    output: Path = RESULTS / "bc_image_speed.csv"
    """file that gets one line per measurement, after those that it holds"""


def store_demonstrations(args: Args) -> None:
    """The scripted expert's episodes as the local Minari dataset franka/images-v0."""
    sys.path.insert(0, str(REPO))
    import gymnasium as gym

    from common.datasets import store

    env = gym.make("FrankaPickCube-v0", image_obs=True, image_size=args.image_size)

    def demonstration(seed: int) -> tuple:
        observations, steps, done = [env.reset(seed=seed)[0]], [], False
        while not done:
            action = env.unwrapped.expert_action()
            obs, reward, terminated, truncated, _ = env.step(action)
            observations.append(obs)
            steps.append((action, reward, terminated, truncated))
            done = terminated or truncated
        parts = ({key: np.stack([obs[key] for obs in observations]) for key in obs}, *zip(*steps, strict=True))
        return parts[0], *map(np.array, parts[1:])

    episodes = map(demonstration, range(args.episodes))
    about = {"observation_space": env.observation_space, "action_space": env.action_space}
    store("franka/images-v0", episodes, {"env_spec": env.spec.to_json()}, **about)
    env.close()


def measure(flags: list[str], args: Args, folder: Path) -> tuple[dict[str, object], list[str]]:
    """Runs one contender once: timed updates, their time (s), the cores that others used; and the losses."""
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, str(REPO / "bc_flow_offline.py"), *flags]
        env = {"MINARI_DATASETS_PATH": str(folder)}
        _, others = run_contender(command, Path(temporary), args.threads, args.gpu, **env)
        log = cloning_log(Path(temporary) / "run")
    line = cloning_timing(log, args.warmup) | {"others_cores": others}
    return line, [row["actor/actor_loss"] for row in log]


# --- Main -------------------------------------------------------------------------------------------------------------
def main(args: Args) -> None:
    if args.updates % args.warmup:
        raise SystemExit("--updates: give a multiple of --warmup, the logs' interval")
    bind(args.threads)
    values = {"total": args.warmup + args.updates, "warmup": args.warmup}
    flags = FLAGS.format(**values, batch_size=args.batch_size, threads=args.threads).split()
    contenders = {"memory": [*flags, "--data-loading", "memory"]}
    for count in args.workers:
        contenders[f"workers_{count}"] = [*flags, "--data-loading", "workers", "--num-workers", str(count)]
    torch_version = versions(sys.executable, "torch")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MINARI_DATASETS_PATH"] = folder
        store_demonstrations(args)
        expected: list[str] = []

        def measured(contender: str, number: int) -> dict[str, object]:
            line, losses = measure(contenders[contender], args, Path(folder))
            if not expected:
                expected.extend(losses)
            if losses != expected:
                raise SystemExit(f"{contender}: its losses are not those of images in memory")
            return line | {"version": torch_version}

        command = f"python benchmarks/bc_image_speed.py, {args.updates} updates"
        take_turns(contenders, args.rounds, measured, args.output, command, unit="updates/s")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
