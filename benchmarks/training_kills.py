"""sac_pixel_real.py while learner, robot and actor are killed in turn with kill -9 at random moments, over and over.

    python benchmarks/training_kills.py           # ten times each; some minutes

On the simulated peg with a scripted person and small networks. training_kills.csv, a line for each kill: what was
killed (`contender`), when it came (s after an episode had ended), and how long it took until another one had ended.
When all is over the run is finished; each line then says how many transitions the actor had made in all, how many of
them the learner does not have (`lost`), and how many it has twice (`doubled`).
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from robot_latency import write
from run import REPO, RESULTS

sys.path.insert(0, str(REPO))

import sac_pixel_real as real
from robot_client import RobotClient

SMALL = "--latent-dim 8 --small-channels 4 4 --image-size 32 --batch-size 8 --hidden-dims 32 --utd-ratio 1 --threads 1"
SMALL += " --learning-starts 60 --teleop scripted --gripper fixed --no-capture-video"
AT_MOST_S = 300.0  # that it takes to go on


# --- Args -------------------------------------------------------------------------------------------------------------
@dataclass
class Args:
    kills: int = 10
    """how often each of the three is killed"""
    within_s: float = 4.0
    """a kill comes at a random moment of this time after the end of an episode"""
    seed: int = 1
    """seed of the moments"""


# --- The day ----------------------------------------------------------------------------------------------------------
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Day:
    """A robot, an actor and its learner, which may be killed; and a copy of all that the actor has sent."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.run_dir = folder / "run"
        self.robot_port = free_port()
        self.learner_port = free_port()
        self.server = f"tcp://127.0.0.1:{self.robot_port}"
        args = real.Args(image_size=32)
        env = real.wrap_env(real.make_env(args), args)
        self.step_type = real.robot_step_type(real.views_of(env), env.action_space.shape[0])
        self.journal: dict[str, bytes] = {}  # contents of its files, of which the actor drops old ones
        self.actor: subprocess.Popen | None = None
        threading.Thread(target=self.keep_journal, daemon=True).start()
        self.start_robot()

    def start(self, name: str, *flags: object) -> subprocess.Popen:
        command = [sys.executable, str(REPO / name), *map(str, flags)]
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                command, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def start_robot(self) -> None:
        flags = ("--port", self.robot_port, "--env-id", "FrankaPegInsert-v0", "--sim-speed", 0)
        self.robot = self.start("robot_server.py", *flags)
        with contextlib.closing(RobotClient(self.server)) as client:
            client.hello(60.0)

    def record(self) -> None:
        flags = ("--teleop", "expert", "--episodes", 2, "--server", self.server)
        if self.start("record_demos.py", *flags).wait():
            raise SystemExit("training_kills.py: record_demos.py failed")

    def act(self, *flags: object) -> None:
        self.actor = self.start("sac_pixel_real.py", *flags, "--server", self.server)

    def episodes(self) -> int:
        path = self.run_dir / "train.csv"
        return len(path.read_text().splitlines()) - 1 if path.exists() else 0

    def learner(self) -> int:
        """Process id."""
        for child in Path(f"/proc/{self.actor.pid}/task/{self.actor.pid}/children").read_text().split():
            if "learner" in Path(f"/proc/{child}/cmdline").read_text():
                return int(child)
        raise SystemExit("training_kills.py: the actor has no learner")

    def copy_journal(self) -> None:
        for path in (self.run_dir / "journal").glob("*.records"):
            with contextlib.suppress(FileNotFoundError):
                self.journal[path.name] = path.read_bytes()

    def keep_journal(self) -> None:
        """Before the actor drops a file, which it does once the learner has saved what is in it."""
        while True:
            self.copy_journal()
            time.sleep(0.1)

    def sent(self) -> np.ndarray:
        """All transitions that the actor has sent, as records."""
        data = b"".join(self.journal[name] for name in sorted(self.journal))
        steps = np.frombuffer(data, self.step_type)
        return steps[~steps["first"]]

    def wait(self, condition: Callable[[], bool], what: str) -> float:
        """Waits for it; how long that took (s)."""
        start = time.monotonic()
        while not condition():
            if time.monotonic() > start + AT_MOST_S:
                raise SystemExit(f"training_kills.py: waited {AT_MOST_S} s for {what}; see {self.folder}")
            if self.actor.poll() is not None:
                raise SystemExit(f"training_kills.py: the actor ended with {self.actor.poll()}; see {self.folder}")
            time.sleep(0.2)
        return time.monotonic() - start

    def kill(self, which: str) -> None:
        """kill -9; what a person would start again is started again."""
        if which == "learner":
            os.kill(self.learner(), signal.SIGKILL)
        elif which == "robot":
            os.killpg(self.robot.pid, signal.SIGKILL)
            self.robot.wait()
            self.start_robot()
        else:
            learner = self.learner()
            self.actor.kill()
            self.actor.wait()
            while Path(f"/proc/{learner}").exists():  # it saves, and ends by itself
                time.sleep(0.1)
            self.act("--resume", self.run_dir)

    def finish(self) -> tuple[int, int, int]:
        """Ends the run where it is: transitions that were sent, and how many of them were lost and doubled."""
        self.actor.send_signal(signal.SIGINT)
        self.actor.wait()
        self.copy_journal()
        total = len(self.sent()) + 20
        flags = ("--resume", self.run_dir, "--total-timesteps", total, "--server", self.server)
        if self.start("sac_pixel_real.py", *flags).wait():
            raise SystemExit(f"training_kills.py: the run could not be finished; see {self.folder}")
        self.copy_journal()
        sent = self.sent()[:total]
        checkpoint = torch.load(self.run_dir / "learner" / "checkpoint.pt", weights_only=True)
        _, actions, rewards, observations, *_ = checkpoint["buffer"]["columns"]
        learned = Counter(map(as_bytes, actions.numpy(), rewards.numpy(), observations.numpy()))
        made = Counter(map(as_bytes, sent["action"], sent["reward"], sent["observation"]))
        return len(sent), (made - learned).total(), (learned - made).total()


def as_bytes(action: np.ndarray, reward: np.ndarray, observation: np.ndarray) -> bytes:
    return action.tobytes() + reward.tobytes() + observation.tobytes()


# --- Main -------------------------------------------------------------------------------------------------------------
def kill_in_turn(day: Day, args: Args) -> list[dict[str, object]]:
    rng = np.random.default_rng(args.seed)
    lines = []
    for number in range(3 * args.kills):
        which = ("learner", "robot", "actor")[number % 3]
        before = day.episodes()
        day.wait(lambda before=before: day.episodes() > before, "an episode")
        after_s = float(rng.uniform(0, args.within_s))
        time.sleep(after_s)
        done = day.episodes()
        start = time.monotonic()
        day.kill(which)
        day.wait(lambda done=done: day.episodes() > done, f"an episode after the {which} was killed")
        seconds = time.monotonic() - start
        lines.append({"kill": number, "contender": which, "after_s": round(after_s, 3), "goes_on_s": round(seconds, 1)})
        print(lines[-1], flush=True)
    return lines


def main(args: Args) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MINARI_DATASETS_PATH"] = f"{folder}/minari"
        day = Day(Path(folder))
        try:
            day.record()
            where = ("--run-dir", day.run_dir, "--address", f"127.0.0.1:{day.learner_port}")
            day.act(*SMALL.split(), *where, "--total-timesteps", 20_000)
            lines = kill_in_turn(day, args)
            transitions, lost, doubled = day.finish()
        finally:
            for process in filter(None, (day.actor, day.robot)):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    counts = {"transitions": transitions, "lost": lost, "doubled": doubled}
    print(counts)
    write(RESULTS / "training_kills.csv", [line | counts for line in lines], "python benchmarks/training_kills.py")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
