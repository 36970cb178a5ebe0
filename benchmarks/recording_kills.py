"""record_demos.py, killed with kill -9 at random moments while the scripted expert demonstrates the peg, over and over.

    python benchmarks/recording_kills.py          # 20 kills; some minutes

recording_kills.csv, a line for each kill: when it came (s after the first episode of that start was written), how many
episodes the recorder had said were written, in this start and before, how many of them Minari reads with the number of
steps that was said, before anything is mended, how many are `lost`, and how many of the dataset's are not `whole`.
"""

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import minari
import numpy as np
import tyro
from robot_latency import write
from run import REPO, RESULTS

WRITTEN = re.compile(r"^episode (\d+): \w+, (\d+) steps", re.M)


# --- Args -------------------------------------------------------------------------------------------------------------
@dataclass
class Args:
    kills: int = 20
    """how often"""
    within_s: float = 4.0
    """a kill comes at a random moment of this time after the first episode of a start"""
    seed: int = 1
    """seed of the moments"""


# --- Main -------------------------------------------------------------------------------------------------------------
def record_and_kill(folder: Path, after_s: float) -> dict[int, int]:
    """{episode: steps} of what the recorder said it had written before it was killed."""
    flags = ["--env-id", "FrankaPegInsert-v0", "--teleop", "expert", "--episodes", "100000"]
    log = folder / "log"
    with log.open("wb") as out:
        command = [sys.executable, str(REPO / "record_demos.py"), *flags]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, cwd=folder)
    try:
        while not WRITTEN.search(log.read_text()):
            if process.poll() is not None:
                raise SystemExit(f"recording_kills.py: the recorder ended with {process.returncode}")
            time.sleep(0.05)
        time.sleep(after_s)
    finally:
        process.kill()
        process.wait()
    return {int(number): int(steps) for number, steps in WRITTEN.findall(log.read_text())}


def read_lengths() -> dict[int, int]:
    """{episode: steps} of those that Minari reads, and that are whole."""
    found = {}
    for episode in minari.load_dataset("hil/demos-v0").iterate_episodes():
        frames = [len(part) for part in episode.observations.values()]
        columns = [len(episode.actions), len(episode.rewards), *(len(part) for part in episode.infos.values())]
        if set(frames) == {len(episode) + 1} and set(columns) == {len(episode)}:
            found[int(episode.id)] = len(episode)
    return found


def main(args: Args) -> None:
    rng = np.random.default_rng(args.seed)
    said: dict[int, int] = {}
    lines = []
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        os.environ["MINARI_DATASETS_PATH"] = f"{folder}/minari"
        for kill in range(args.kills):
            after_s = float(rng.uniform(0, args.within_s))
            said |= record_and_kill(Path(folder), after_s)
            total = minari.load_dataset("hil/demos-v0").total_episodes
            found = read_lengths()
            kept = sum(found.get(number) == steps for number, steps in said.items())
            counts = {"said": len(said), "kept": kept, "lost": len(said) - kept, "not_whole": total - len(found)}
            lines.append({"kill": kill, "after_s": round(after_s, 3)} | counts)
            print(lines[-1], flush=True)
    write(RESULTS / "recording_kills.csv", lines, "python benchmarks/recording_kills.py")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
