"""A run's folder, to be read, resumed and run again: code, flags, tables, checkpoints, curve; progress bar, Ctrl-C."""

import contextlib
import dataclasses
import filecmp
import json
import math
import os
import shutil
import signal
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common.evaluation import plot_curves, quality, report, success_rate
from common.setup import Fault, RunArgs, check_new_folder, fail, git_commit, hold, write_atomically

CURVES = ("eval/episodic_return", "eval/success_rate")  # of curve.png
PATIENCE_S = 10.0  # after Ctrl-C: how long an episode or an evaluation may take to end


def own_modules(folder: Path) -> list[Path]:
    """Files in `folder` that this program has imported: common/, tasks of one's own; not what pip installed there."""
    files = [Path(getattr(module, "__file__", None) or "") for module in list(sys.modules.values())]
    own = {file.resolve() for file in files if file.is_absolute() and file.suffix == ".py"}
    prefix = Path(sys.prefix).resolve()
    installed = {file for file in own if "site-packages" in file.parts or (prefix != folder and prefix in file.parents)}
    return sorted(file for file in own - installed if folder in file.parents)


class Run:
    """The folder of a run and where the run stands: `step`, `episode`, `signals` (Ctrl-C so far), `state`.

    `state` is the newest checkpoint, or None. Use: make it; `keep` what a checkpoint holds; `open`; then in the loop
    `phase`, `advance`, `end_episode`, `due`, `log`, `save`; at the end `finish`.
    """

    def __init__(self, args: RunArgs, name: str, script: str, device: torch.device | str = "cpu"):
        """A new folder runs/NAME__SCRIPT__SEED__TIME or --run-dir, or the one of --resume or --eval-only.

        Exits with one line when it cannot be written or read, or is not empty. Sets args.run_dir.
        """
        self.args, self.script = args, Path(script).resolve()
        name = f"{name}__{self.script.stem}__{args.seed}__{time.time_ns() // 10**6}".replace("/", "-").replace(":", "-")
        args.run_dir = args.run_dir or f"runs/{name}"
        self.dir = Path(args.run_dir).absolute()  # a task may change the current folder
        self.step = 0
        self.before = 0  # `step` before the newest `advance`
        self.episode = 0
        self.recent: list[tuple[float, float, float]] = []  # return, length, success since the last row of train.csv
        self.best: dict[str, float] = {}
        self.elapsed_before = 0.0  # s, until the checkpoint
        self.saved_at = 0  # step of the newest checkpoint
        self.parts: dict[str, object] = {}
        self.files = {}  # open tables, by name
        self.bar = tqdm(disable=True)
        self.writer = None
        self.started = time.perf_counter()
        self.signals = 0
        self.signalled_at = math.inf
        self.state = None
        if args.resume or args.eval_only:
            self.state = self.load(device)
        else:
            self.create()

    def create(self) -> None:
        """Fills the folder, also one that is mounted; run.json comes first, args.json comes last and makes it a run."""
        try:
            check_new_folder(self.args.run_dir)
            self.dir.mkdir(parents=True, exist_ok=True)
            self.claim()
            write_atomically(self.dir / "run.json", json.dumps(self.about(), indent=2).encode())
            for name in self.code():
                (self.dir / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(self.script.parent / name, self.dir / name)
            self.write_flags()
        except OSError as error:
            fail(f"--run-dir {self.args.run_dir}: cannot be written ({error}); give another folder")

    def code(self) -> list[Path]:
        """This program's files, as they stand beside the script and in the run's folder."""
        root = self.script.parent
        return sorted(file.relative_to(root) for file in {self.script, *own_modules(root)})

    def claim(self) -> None:
        """For this process alone."""
        self.lock = hold(self.dir / "run.lock", f"{self.args.run_dir}: process PID works there; end that one first")

    def write_flags(self) -> None:
        """What --resume and --eval-only take; those that --resume changed stay changed."""
        flags = dataclasses.asdict(self.args) | {"run_dir": None, "resume": None}
        write_atomically(self.dir / "args.json", json.dumps(flags, indent=2).encode())

    def about(self) -> dict[str, object]:
        """What beside code and flags a run depends on."""
        names = [name for name in ("torch", "numpy", "gymnasium", "mujoco") if name in sys.modules]
        versions = {name: sys.modules[name].__version__ for name in names}
        return {
            "command": sys.argv,
            "git_commit": git_commit(self.script.parent),
            "versions": versions | {"python": sys.version.split()[0]},
            "cpus": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        }

    def load(self, device: torch.device | str) -> dict | None:
        """The newest checkpoint, or None when the run has none yet. Exits when it cannot be read."""
        if not self.args.eval_only:
            self.claim()
        _, changed, new = filecmp.cmpfiles(self.script.parent, self.dir, self.code(), shallow=False)
        changed += [name for name in new if name.name == self.script.name]  # a run of another script
        if changed:
            print(f"{self.args.run_dir} began with another {', '.join(map(str, changed))}", file=sys.stderr)
        path, previous = self.dir / "checkpoint.pt", self.dir / "checkpoint.previous"
        if previous.exists() and not path.exists():  # killed between `save`'s two renames
            path = previous
        if not path.exists():
            if self.args.eval_only:
                fail(f"--eval-only {self.args.run_dir}: stopped before its first checkpoint; --resume it")
            return None
        try:
            with warnings.catch_warnings(action="ignore"):  # it advises to load without weights_only
                return torch.load(path, map_location=device, weights_only=True)
        except Exception as error:  # noqa: BLE001  a damaged file raises what it likes
            remedy = f"delete it to go on from {previous}" if previous.exists() else "start a new run"
            fail(f"{path}: damaged, cannot be read ({type(error).__name__}); {remedy}")

    def keep(self, **parts: object) -> None:
        """What a checkpoint holds, beside where the run stands: objects with state_dict and load_state_dict, or None.

        They are loaded now if there is a checkpoint. Exits with one line when it is of another script or other flags.
        """
        self.parts = {name: part for name, part in parts.items() if part is not None}
        if self.state is None:
            return
        try:
            for name, part in self.parts.items():
                part.load_state_dict(self.state[name])
            progress = self.state["run"]
            self.step = self.saved_at = progress["step"]
            self.episode = progress["episode"]
            self.recent = [tuple(row) for row in progress["recent"]]
            self.best = progress["best"]
            self.elapsed_before = progress["elapsed"]
            self.state = {"finished": progress["finished"]}  # the rest is loaded, and its memory can go
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            fail(f"{self.args.run_dir}/checkpoint.pt: is not of this script and flags ({str(error).splitlines()[0]})")

    def save(self, finished: bool = False) -> None:
        """Writes checkpoint.pt, and keeps the one before as checkpoint.previous."""
        progress = {"step": self.step, "episode": self.episode, "recent": self.recent, "best": self.best}
        progress |= {"elapsed": self.elapsed(), "finished": finished}
        state = {name: part.state_dict() for name, part in self.parts.items()} | {"run": progress}
        if self.writer is not None:
            self.writer.flush()  # what a checkpoint is behind of, is not written again
        path = self.dir / "checkpoint.pt"
        write_tensors(path.with_suffix(".new"), state)
        if path.exists():
            path.replace(path.with_suffix(".previous"))
        path.with_suffix(".new").replace(path)
        self.saved_at = self.step

    # --- while it runs ---
    def open(self, total: int, unit="step", option="--total-timesteps", waits_for="the episode") -> None:
        """CSV files, TensorBoard, wandb, progress bar, signals; what was written after the checkpoint is removed.

        Ctrl-C waits for the end of `waits_for`. Exits with one line that names `option` when a finished run is asked
        for no more than it has.
        """
        from torch.utils.tensorboard import SummaryWriter

        if self.state and self.state["finished"] and self.step >= total:
            fail(f"{self.args.run_dir} is finished: {option} {total}: it has {self.step}; give a larger number")
        self.write_flags()
        self.unit = self.doing = waits_for
        for path in self.dir.glob("*.csv"):
            newest = self.step
            if path.stem == "eval" and self.step >= total:  # the last evaluation comes after the checkpoint
                newest = self.step - 1
            drop_rows_after(path, newest)
        if self.args.track:
            import wandb

            config = dataclasses.asdict(self.args)
            wandb.init(project="robot-learning", name=self.dir.name, config=config, dir=self.dir, sync_tensorboard=True)
        self.writer = SummaryWriter(self.dir, purge_step=self.step + 1)
        self.bar = tqdm(total=total, initial=self.step, unit=unit, mininterval=0.2 if sys.stderr.isatty() else 30.0)
        self.started = time.perf_counter()
        self.restart_timer()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.on_signal)
        print(f"run directory {self.args.run_dir}", flush=True)

    def on_signal(self, number: int = signal.SIGINT, *_) -> None:
        """Ctrl-C and SIGTERM: the loop ends where it can go on from; Ctrl-C after that ends the program at once."""
        self.signals += 1
        if self.signals > 1 and number == signal.SIGINT:  # SIGTERM may come for each thread of a parent that is killed
            raise KeyboardInterrupt
        self.signalled_at = min(self.signalled_at, time.monotonic())
        wait = f"{self.doing} ends first, within {PATIENCE_S:.0f} s"
        self.bar.disable = True  # Ctrl-C has also ended the reader of `2>&1 | tee log`
        with contextlib.suppress(OSError):
            os.write(2, f"\nstopping: {wait}, then all is saved; Ctrl-C again stops at once\n".encode())

    def impatient(self) -> bool:
        """Whether Ctrl-C was so long ago that what is going on is given up."""
        return time.monotonic() - self.signalled_at > PATIENCE_S

    def elapsed(self) -> float:
        """Seconds spent on this run, its resumed parts together."""
        return self.elapsed_before + time.perf_counter() - self.started

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to this phase; "eval" does not count as training."""
        start = time.perf_counter()
        self.doing = "the evaluation" if name == "eval" else self.unit
        try:
            yield
        except Fault as error:
            self.episode += 1
            self.save()
            fail(f"{error}. All is saved: --resume {self.args.run_dir} goes on with the next episode")
        self.seconds[name] += time.perf_counter() - start

    def restart_timer(self) -> None:
        """Forgets the times until now: what comes before learning would flatter charts/SPS."""
        self.seconds: dict[str, float] = defaultdict(float)
        self.timed_from = (self.step, time.perf_counter())

    def speed(self) -> dict[str, float]:
        """Steps per second, and milliseconds per step of each phase, since the last call, apart from evaluating."""
        step, since = self.timed_from
        count = max(self.step - step, 1)
        scalars = {"charts/SPS": (self.step - step) / (time.perf_counter() - since - self.seconds["eval"])}
        for name in ("act", "env", "update"):
            scalars[f"time/{name}_ms"] = 1e3 * self.seconds[name] / count
        self.restart_timer()
        return scalars

    def advance(self, count: int = 1) -> None:
        self.before = self.step
        self.step += count
        self.bar.update(count)

    def due(self, every: int) -> bool:
        """Whether the newest `advance` reached or passed a multiple of `every`."""
        return self.step // every > self.before // every

    def should_save(self, every: int) -> bool:
        """Whether a multiple of `every` has passed since the newest checkpoint, or the program was asked to end."""
        return self.signals > 0 or self.step // every > self.saved_at // every

    def end_episode(self, info: dict, success: float) -> None:
        """Counts an episode, which has statistics in its last info unless it was given up."""
        if "episode" in info:
            self.recent.append((float(info["episode"]["r"]), float(info["episode"]["l"]), float(success)))
        self.episode += 1

    def episodes(self) -> dict[str, float]:
        """Means over the episodes that ended since the last call, NaN where there are none."""
        means = np.mean(self.recent or [(math.nan,) * 3], 0, dtype=float).tolist()
        means[2] = success_rate([success for _, _, success in self.recent])
        self.recent = []
        names = ("charts/episodic_return", "charts/episodic_length", "charts/success")
        return dict(zip(names, means, strict=True))

    def log(self, table: str, scalars: dict[str, float | Tensor]) -> None:
        """A row of TABLE.csv, and the same numbers to TensorBoard; the best row of "eval" is kept.

        The first row fixes the columns. An empty `scalars` (an evaluation that was given up) is no row.
        """
        if not scalars:
            return
        scalars = {key: float(value) for key, value in scalars.items()}
        row = {"global_step": self.step, "wall_s": self.elapsed()} | scalars
        if table not in self.files:
            self.files[table] = (self.dir / f"{table}.csv").open("a")
            if self.files[table].tell() == 0:
                self.files[table].write(",".join(row) + "\n")
        self.files[table].write(",".join(f"{value:.9g}" for value in row.values()) + "\n")
        self.files[table].flush()
        for key, value in scalars.items():
            self.writer.add_scalar(key, value, self.step)
        if table == "eval":
            if quality(scalars) >= quality(self.best):
                self.best = scalars
            known = [key for key in CURVES if not math.isnan(scalars.get(key, math.nan))]
            self.bar.set_postfix({key.split("/")[1]: f"{scalars[key]:.2f}" for key in known})

    def end_of_training(self, *tasks: gym.Env | None) -> None:
        """A checkpoint, then closes `tasks`. Raises KeyboardInterrupt if asked to end; Ctrl-C now ends it at once."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)
        self.writer.flush()
        if self.saved_at != self.step or not (self.dir / "checkpoint.pt").exists():
            self.save()
        for task in filter(None, tasks):
            task.close()
        if self.signals:
            raise KeyboardInterrupt

    def finish(self, last: dict[str, float]) -> None:
        """After the last evaluation: its row, the curve, a checkpoint, and a summary on the terminal."""
        self.log("eval", last)
        self.plot()
        self.save(finished=True)
        self.close()
        report("last", last)
        report("best", self.best)
        print(f"{self.elapsed():.0f} s in all; see {self.args.run_dir}")

    def close(self) -> None:
        self.bar.close()
        self.writer.close()

    def plot(self, x: str = "environment steps", name: str = "eval", keys: tuple[str, ...] = CURVES) -> None:
        """Writes curve.png: columns of a table over steps; by default return and success rate of the evaluations."""
        plot_curves(self.dir, {name: keys}, x, self.elapsed())


def write_tensors(path: Path, state: dict) -> None:
    """A file that is whole when this returns, without a second copy of the tensors in memory."""
    with path.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # what torch says, whose writer does not expect a full disk
            raise error.__context__ or error from None
        file.flush()
        os.fsync(file.fileno())


def drop_rows_after(path: Path, newest: int) -> None:
    """Keeps a CSV file's rows up to step `newest`, without a row that a crash cut off."""
    try:
        lines = path.read_text().split("\n")[:-1]  # what follows the last newline was cut off
        kept = [line for line in lines[1:] if line and int(line.split(",")[0]) <= newest]
    except ValueError as error:
        fail(f"{path}: has a row that does not begin with a step ({error}); mend it, or delete the file, and go on")
    write_atomically(path, "".join(line + "\n" for line in lines[:1] + kept).encode())
