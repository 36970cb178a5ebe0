"""What the scripts that measure speed have in common. It is imported, not run.

Contenders take turns on the same cores, so that a change of the machine's speed meets all alike; every measurement is
a line of the output file. run_contender gives each a process of its own and notes how many cores others used.
"""

import csv
import os
import resource
import shlex
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path

from report import shown
from run import commit, hardware

COLUMNS = ["contender", "version", "round", "steps", "seconds", "steps_per_second", "others_cores", "date", "commit"]
COLUMNS += ["hardware", "command"]


# --- Contenders -------------------------------------------------------------------------------------------------------
def interpreter(python: str) -> str:
    """Absolute path of an interpreter, symbolic links kept: a virtual environment is known by them."""
    if found := shutil.which(python):
        return os.path.abspath(found)
    raise SystemExit(f"{python}: there is no such interpreter")


def versions(python: str, *packages: str) -> str:
    """The versions of packages, as an interpreter finds them: `torch 2.13.0, gymnasium 1.4.0`."""
    code = "import sys, importlib.metadata as m; print(*(n + ' ' + m.version(n) for n in sys.argv[1:]), sep=', ')"
    found = subprocess.run([python, "-c", code, *packages], capture_output=True, text=True, check=True)
    return found.stdout.strip()


def bind(threads: int) -> None:
    """Keep this process, and those that it starts, on the first cores that it may use."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[:threads])


def busy_seconds() -> float:
    """CPU seconds that all processes of the machine have used (Linux)."""
    user, nice, system, _, _, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def children_seconds() -> float:
    """CPU seconds of this process's finished children."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def run_contender(command: list[str], folder: Path, threads: int, gpu: bool, **env: str) -> tuple[str, float]:
    """Runs a command in a folder: what it prints, and the cores that other processes used meanwhile.

    Raises SystemExit with the end of its output if it fails.
    """
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "WANDB_MODE": "disabled"} | env
    if not gpu:
        env |= {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}
    start = time.time()
    busy_before = busy_seconds()
    own_before = children_seconds()
    result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    if result.returncode != 0:
        raise SystemExit(f"`{shlex.join(command)[:300]}` failed:\n{result.stdout[-1000:]}{result.stderr[-3000:]}")
    own = children_seconds() - own_before
    others = busy_seconds() - busy_before - own
    return result.stdout, round(others / (time.time() - start), 2)


# --- Measurements -----------------------------------------------------------------------------------------------------
def timing(steps: int, seconds: float) -> dict[str, float]:
    """The columns of a measurement: `steps` of whatever is counted took `seconds`."""
    return {"steps": steps, "seconds": round(seconds, 3), "steps_per_second": round(steps / seconds, 3)}


def cloning_log(run_dir: Path) -> list[dict[str, str]]:
    """The lines of bc_flow_offline.py's log behind the first, which holds start and warm-up."""
    with (run_dir / "offline_agent.csv").open(newline="") as file:
        return list(csv.DictReader(file))[1:]


def cloning_timing(log: list[dict[str, str]], interval: int) -> dict[str, float]:
    """Timing of a log with a line every `interval` updates."""
    seconds = sum(interval / float(row["SPS"]) for row in log)
    return timing(interval * len(log), seconds)


def facts(command: str) -> dict[str, str]:
    """Where and when a measurement was made."""
    today = datetime.now(UTC).date().isoformat()
    return {"date": today, "commit": commit(), "hardware": hardware(), "command": command}


def take_turns(
    contenders: Iterable[str],
    rounds: int,
    measure: Callable[[str, int], dict[str, object]],
    output: Path,
    command: str,
    unit: str = "steps/s",
) -> dict[str, float]:
    """Measures every contender in each of the rounds, records and prints; returns the median speeds.

    `measure(contender, round)` gives the columns of timing(), and others where it knows them.
    """
    where = facts(command)
    speeds: dict[str, list[float]] = {contender: [] for contender in contenders}
    width = max(map(len, speeds))
    for number in range(1, rounds + 1):
        for contender, values in speeds.items():
            line = measure(contender, number)
            record(output, where | line | {"contender": contender, "round": number})
            values.append(line["steps_per_second"])
            others = line.get("others_cores", 0)
            busy = f" (others used {others} cores)" if others > 0.1 else ""
            print(f"round {number}: {contender:{width}} {shown(values[-1]):>7} {unit}{busy}", flush=True)
    medians = {contender: statistics.median(values) for contender, values in speeds.items()}
    for contender, values in speeds.items():
        spread = f"min {shown(min(values))}, max {shown(max(values))}"
        print(f"{contender:{width}} median {shown(medians[contender])} {unit} ({spread})")
    return medians


# --- Files ------------------------------------------------------------------------------------------------------------
def record(path: Path, line: dict[str, object]) -> None:
    """Appends a line, below a header if the file is new. Raises SystemExit if the file has other columns."""
    columns = [column for column in COLUMNS if column in line]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", newline="") as file:
        new = file.tell() == 0
        file.seek(0)
        header = columns if new else next(csv.reader(file))
        if header != columns:
            raise SystemExit(f"{path} has the columns {', '.join(header)}, not {', '.join(columns)}: give --output")
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(line)


def write_anew(path: Path, lines: list[dict[str, object]], columns: list[str] | None = None) -> None:
    """Replace the file, whole or not at all, by these lines; `columns` where there may be none."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns or list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    temporary.replace(path)
    print(f"wrote {path}")
