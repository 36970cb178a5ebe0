"""Write the tables of README.md, benchmarks/README.md and benchmarks/exploration.md from the files in benchmarks/.

    python benchmarks/report.py            # after benchmarks/run.py
    python benchmarks/report.py --check    # exit with 1 if the tables are not those of the files

results/ROW.csv holds one line per seed (see run.py). A file with the column contender is a comparison, one line per
repetition, shown as the medians of each contender; ecosystem.csv says what scripts do with tasks of others (see
ecosystem.py), peers.csv how others learn ours (see peers.py). Files of other forms are left alone.

exploration.csv holds the evaluations of the runs in exploration.md. Whoever adds a run writes `| `name` | settings |`
there; the other cells of the line are filled in.
"""

import csv
import re
import statistics
from dataclasses import dataclass
from pathlib import Path

import tyro
from run import REPO, RESULTS, ROWS

EXPLORATION = REPO / "benchmarks" / "exploration.csv"
NEWCOMERS = (  # the rows of README's table, ten at most; benchmarks/README.md has all
    "sac_pick_default",
    "sac_pick_mirror",
    "sac_peg_default",
    "sac_halfcheetah_100k",
    "pixel_pick_default",
    "pixel_peg_default",
    "pixel_pick_vice",
    "pixel_pick_gpu",
    "bc_pick_default",
    "bc_halfcheetah_chunks",
)
PEERS = {  # the contenders of peers.py, whose header says more about their settings
    "ours_demos": "`sac_state_sim.py`, the task's row in `run.py`, 20 demonstrations",
    "ours_mirror": "`sac_state_sim.py`, the row `sac_pick_mirror`",
    "ours": "`sac_state_sim.py`, the row `sac_pick_scratch`",
    "serl_demos": "SERL's SAC agent (JAX), its settings for states, half of each batch from the same 20 demonstrations",
    "serl": "SERL's SAC agent (JAX), its settings for states",
    "lerobot_demos": "LeRobot's SAC, its SO-100 example's settings, half of each batch from the same 20 demonstrations",
    "lerobot": "LeRobot's SAC, its SO-100 example's settings",
    "sb3": "Stable-Baselines3's SAC, rl-zoo's settings for MuJoCo",
    "sbx": "SBX's SAC (JAX), rl-zoo's settings for MuJoCo",
    "cleanrl": "CleanRL's `sac_continuous_action.py`, its defaults",
}
PEERS_INTRO = """
## Beside others

`python benchmarks/peers.py` lets others learn the same task, on the same cores, within the same time; its header tells
their settings and what was changed to run them. The clock stands still during evaluations: 10 episodes, every 1,000
steps. Success is the mean of two evaluations in a row, where it is reached and at the end. Cells have a value for each
seed.

![Success over wall-clock, ours beside others](../assets/peers.png)
"""
# Columns of comparisons that are shown.
MEASURED = re.compile(
    r"[\w.]+(_per_second|_ms|_mb|_of_a_core|_ticks)|(hold|stop|goes_on)_s|restarts|errors|lost|doubled"
)
BETWEEN = re.compile(r"(?<=<!-- results -->\n).*?(?=<!-- /results -->)", re.S)
RUN_LINE = re.compile(r"^(\| `(\w+)` \| [^|\n]+ \|).*$", re.M)  # of exploration.md: the name and settings of a run


# --- Args -------------------------------------------------------------------------------------------------------------
@dataclass
class Args:
    check: bool = False
    """compare only, write nothing"""


# --- Tables -----------------------------------------------------------------------------------------------------------
def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def table(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *lines]) + "\n"


def shown(value: float) -> str:
    if value != value:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min"


def unique(rows: list[dict[str, str]], column: str) -> str:
    return "; ".join(dict.fromkeys(row[column] for row in rows if row.get(column)))


def grouped(rows: list[dict[str, str]], column: str) -> dict[str, list[dict[str, str]]]:
    """The rows by their value there, in the order of the file."""
    groups: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault(row[column], []).append(row)
    return groups


def results_in(folder: Path) -> tuple[dict[str, list[dict[str, str]]], dict[str, list[dict[str, str]]]]:
    """The files of rows, in the order of ROWS, and of speed comparisons, by name."""
    files = {path.stem: read(path) for path in sorted(folder.glob("*.csv"))}
    rank = {name: i for i, name in enumerate(ROWS)}
    rows = {name: lines for name, lines in files.items() if lines and {"seed", "metric", "value"} <= set(lines[0])}
    speeds = {name: lines for name, lines in files.items() if lines and "contender" in lines[0] and name != "peers"}
    return dict(sorted(rows.items(), key=lambda item: rank.get(item[0], len(rank)))), speeds


def rows_table(rows: dict[str, list[dict[str, str]]]) -> str:
    """One line per row: every seed's value, the mean, the target, median time and largest memory."""
    lines = []
    for name, seeds in rows.items():
        values = [float(seed["value"]) for seed in seeds]
        target = ROWS[name].target if name in ROWS else ""
        lines.append(
            [
                f"{ROWS[name].what if name in ROWS else name} (`{name}`)",
                unique(seeds, "env_id"),
                shown(max(float(seed["global_step"]) for seed in seeds)),
                f"`{unique(seeds, 'metric')}`",
                f"**{shown(statistics.mean(values))}** ({', '.join(map(shown, values))})",
                target or "none",
                minutes(statistics.median(float(seed["wall_s"]) for seed in seeds)),
                f"{max(float(seed['peak_mb']) for seed in seeds):,.0f} MB",
            ]
        )
    return table(
        ["", "task", "steps", "metric", "mean (each seed)", "target", "time, median", "memory, largest"], lines
    )


def speed_table(lines: list[dict[str, str]]) -> str:
    """One line per contender, the best by the first column first."""
    columns = [column for column in lines[0] if MEASURED.fullmatch(column)]
    groups = grouped(lines, "contender")
    medians = {name: [median_of(group, column) for column in columns] for name, group in groups.items()}
    ranked = sorted(groups, key=lambda name: medians[name][0], reverse=columns[0].endswith("_per_second"))
    return table(
        ["contender", *(f"{column.replace('_', ' ')}, median" for column in columns), "repetitions"],
        [[name, *map(shown, medians[name]), str(len(groups[name]))] for name in ranked],
    )


def median_of(lines: list[dict[str, str]], column: str) -> float:
    """Over the lines that have a value there; NaN where none has."""
    values = [float(line[column]) for line in lines if line[column]]
    return statistics.median(values) if values else float("nan")


def ecosystem_table(lines: list[dict[str, str]]) -> str:
    """One line for each task and script: yes, or the beginning of what the script said instead."""
    cells = []
    for line in lines:
        outcomes = [line[what] for what in ("trains", "evaluates", "resumes")]
        said = [outcome.removeprefix(f"--env-id {line['task']}: ").partition(";")[0] for outcome in outcomes]
        whose = f"{line['ecosystem']} {line['version']}"
        cells.append([whose, f"`{line['task']}`", f"`{line['script']}`", *(text.replace("|", "/") for text in said)])
    return table(["packages", "task", "script", "trains", "evaluates", "resumes"], cells)


def ecosystem_report(folder: Path) -> str:
    """The section about tasks of others: the table, and where, when and with which commands it was made."""
    path = folder / "ecosystem.csv"
    if not path.exists():
        return ""
    lines = read(path)
    text = "\n## Tasks of others\n\n`python benchmarks/ecosystem.py` lets each script train a little on each task,\n"
    text += "evaluate its run and resume it. A cell says yes, or what the script said instead.\n\n"
    text += ecosystem_table(lines) + "\n"
    facts = ["task", "script", "seconds", "date", "commit", "hardware", "command"]
    return text + table(facts, [[line[fact].replace("|", "/") for fact in facts] for line in lines])


def rehearsal_report(folder: Path) -> str:
    """The section about the working day with the robot: one line for each day."""
    path = folder / "hil_rehearsal.csv"
    if not path.exists():
        return ""
    cells = []
    for line in read(path):
        settings = re.findall(r"--(?:help-until|reward) \S+", line["command"])
        success = f"**{shown(float(line['success']))}** ({line['low']} to {line['high']})"
        speed = f"{shown(float(line['cycle_s']))} s ({shown(float(line['demo_cycle_s']))} s)"
        helped = f"{float(line['intervention_rate']):.0%}"
        robot = minutes(float(line["robot_s"]))
        late = f"{shown(float(line['late_p99_ms']))} ms"
        wall = minutes(float(line["wall_s"])) if line["wall_s"] else "stopped early"
        episodes = line["episodes"]
        facts = [line["date"], line["commit"], line["hardware"]]
        cells.append([line["seed"], f"`{' '.join(settings)}`", line["transitions"], robot, success, episodes, helped])
        cells[-1] += [speed, late, wall, *facts]
    head = ["seed", "settings", "transitions", "robot time", "success without help (95%)", "episodes"]
    head += [
        "helped, last 20 episodes",
        "cycle (demonstrations')",
        "late, p99",
        "wall time",
        "date",
        "commit",
        "hardware",
    ]
    text = "\n## A day with the robot, rehearsed\n\n"
    text += "`python benchmarks/hil_rehearsal.py` records, trains with a scripted person and evaluates on the\n"
    text += "simulated robot server; `results/hil_rehearsal*/` have what each episode said. At commit 60ecd69\n"
    text += "`--help-until 0` still helped in 18 steps of the first episode.\n\n"
    return text + table(head, cells)


def reached(evaluations: list[dict[str, str]], success: float = 0.95) -> dict[str, str] | None:
    """The first evaluation that, together with the one before it, has this mean success; None if there is none."""
    for before, line in zip(evaluations, evaluations[1:], strict=False):
        if float(before["success"]) + float(line["success"]) >= 2 * success - 1e-9:
            return line
    return None


def peer_cells(contender: str, lines: list[dict[str, str]]) -> list[str]:
    """A contender's line of the table: a value for each seed in every cell."""
    seeds = grouped(lines, "seed")
    first = [reached(evaluations) for evaluations in seeds.values()]
    last = [evaluations[-1] for evaluations in seeds.values()]
    ends = [[float(line["success"]) for line in evaluations[-2:]] for evaluations in seeds.values()]
    base, _, steps = contender.rpartition("_")
    what = f"{PEERS[base]}, an update every {steps} steps" if steps.isdecimal() else PEERS[contender]
    cells = [
        list(seeds),
        [f"{float(line['wall_s']) / 60:.1f}" if line else "never" for line in first],
        [f"{int(line['step']):,}" if line else "never" for line in first],
        [f"**{shown(statistics.mean(end))}**" for end in ends],
        [f"{float(line['return']):.0f}" for line in last],
        [f"{float(line['wall_s']) / 60:.1f}" for line in last],
        [f"{int(line['step']):,}" for line in last],
    ]
    return [f"`{contender}`", what, *("; ".join(values) for values in cells)]


def peers_report(folder: Path) -> str:
    """The section about other projects on our tasks: a table for each task, and with what and when it was measured."""
    path = folder / "peers.csv"
    lines = read(path) if path.exists() else []
    if not lines:
        return ""
    text = PEERS_INTRO
    head = ["contender", "what", "seeds", "min to 0.95", "steps to 0.95"]
    head += ["success at the end", "return", "min in all", "steps in all"]
    for task, of_task in grouped(lines, "env_id").items():
        cells = [peer_cells(name, own) for name, own in grouped(of_task, "contender").items()]
        text += f"\n### {task}\n\n" + table(head, cells)
    facts = ["contender", "version", "budget_s", "cores", "date", "commit", "hardware"]
    cells = []
    for own in grouped(lines, "contender").values():
        others = max(float(line["others_cores"]) for line in own)
        cells.append([*(unique(own, fact) for fact in facts), f"{others:.2f}"])
    return text + "\n" + table([*facts, "cores of other processes, most"], cells)


def hardware_line(lines: list[dict[str, str]]) -> str:
    return f"Hardware: {unique(lines, 'hardware')}.\n" if unique(lines, "hardware") else ""


def summary(folder: Path) -> str:
    """The block between the markers of README.md: the rows that a newcomer needs."""
    rows, _ = results_in(folder)
    shown_rows = {name: lines for name, lines in rows.items() if name in NEWCOMERS}
    if not shown_rows:
        return "Nothing has been measured yet.\n"
    measured = [line for lines in shown_rows.values() for line in lines]
    return rows_table(shown_rows) + "\n" + hardware_line(measured)


def results_tables(folder: Path) -> str:
    """The rows of README.md, all others, and the comparisons of speed."""
    rows, speeds = results_in(folder)
    if not rows and not speeds:
        return "Nothing has been measured yet: `benchmarks/results/` is empty.\n"
    groups = {
        "Each script's main tasks": {name: lines for name, lines in rows.items() if name in NEWCOMERS},
        "Ablations, and settings of others": {name: lines for name, lines in rows.items() if name not in NEWCOMERS},
    }
    text = ""
    for title, group in groups.items():
        if group:
            text += f"### {title}\n\n{rows_table(group)}\n"
    text += "### Speed\n\n" if speeds else ""
    for name, lines in speeds.items():
        text += f"`benchmarks/results/{name}.csv`:\n\n{speed_table(lines)}\n"
    measured = [line for lines in (*rows.values(), *speeds.values()) for line in lines]
    return text + hardware_line(measured)


def full_report(folder: Path) -> str:
    """benchmarks/README.md: the tables, and for each row its commands, seeds, dates, commits and hardware."""
    rows, speeds = results_in(folder)
    text = "# Benchmarks\n\n<!-- Written by benchmarks/report.py from benchmarks/results/; do not edit. -->\n\n"
    text += (
        "`python benchmarks/run.py ROW` runs a row and records it, `python benchmarks/report.py` writes this page.\n"
    )
    text += (
        "The value of a run is the last line of its `eval.csv`, kept in `results/ROW/seedN_eval.csv`. Time and memory\n"
    )
    text += "are those of the whole process. [exploration.md](exploration.md) tells how the defaults were found.\n\n"
    text += "## Results\n\n" + results_tables(folder)
    text += peers_report(folder) + ecosystem_report(folder) + rehearsal_report(folder)
    text += "\n## Rows\n\nEach command also gets `--seed N`.\n"
    for name, row in ROWS.items():
        text += f"\n**{name}**: {row.what}\n\n```bash\npython {row.command}\n```\n\n"
        if name not in rows:
            text += "Not measured yet.\n"
            continue
        facts = ["seed", "value", "global_step", "wall_s", "peak_mb", "date", "commit", "hardware"]
        text += table(facts, [[line[fact] for fact in facts] for line in rows[name]])
        commands = {re.sub(r" --seed \d+", "", line["command"]) for line in rows[name]} - {f"python {row.command}"}
        text += "".join(f"\nMeasured with another command: `{command}`\n" for command in sorted(commands))
    for name, lines in speeds.items():
        facts = [fact for fact in ("date", "commit", "hardware", "command") if unique(lines, fact)]
        text += f"\n**{name}**\n\n" + table(facts, [[unique(lines, fact) for fact in facts]]) if facts else ""
    return text


# --- Exploration ------------------------------------------------------------------------------------------------------
def exploration_runs(path: Path) -> dict[str, dict[int, list[dict[str, str]]]]:
    """Run -> seed -> its evaluations, in the order of the file."""
    runs: dict[str, dict[int, list[dict[str, str]]]] = {}
    for line in read(path):
        seeds = runs.setdefault(line["run"], {})
        seeds.setdefault(int(line["seed"]), []).append(line)
    return runs


def thousands(step: str) -> str:
    return f"{int(step) / 1000:.3g}"


def half_at(evaluations: list[dict[str, str]]) -> str:
    """The first step (in thousands) at which half of the episodes succeeded, or never."""
    for line in evaluations:
        if float(line["success"]) >= 0.5:
            return thousands(line["global_step"])
    return "never"


def run_cells(seeds: dict[int, list[dict[str, str]]]) -> list[str]:
    """What exploration.csv says of a run: a value for each seed in every cell."""
    ends = [evaluations[-1] for evaluations in seeds.values()]
    cells = [
        [str(seed) for seed in seeds],
        list(dict.fromkeys(thousands(end["global_step"]) for end in ends)),
        [half_at(evaluations) for evaluations in seeds.values()],
        [shown(float(end["success"])) for end in ends],
        [f"{float(end['return']):.0f}" for end in ends],
        [f"{float(end['wall_s']) / 60:.1f}" for end in ends if end["wall_s"]],
    ]
    return [", ".join(values) for values in cells]


def filled_exploration(page: str, runs: dict[str, dict[int, list[dict[str, str]]]]) -> str:
    """The page with the numbers of every run's line."""

    def filled(line: re.Match) -> str:
        if line[2] not in runs:
            raise SystemExit(f"exploration.md names the run {line[2]}, which is not in exploration.csv")
        return " ".join([line[1], " | ".join(run_cells(runs[line[2]])), "|"])

    return RUN_LINE.sub(filled, page)


# --- Main -------------------------------------------------------------------------------------------------------------
def pages() -> dict[Path, str]:
    """File -> the text that it should have."""
    readme = (REPO / "README.md").read_text()
    if not BETWEEN.search(readme):
        raise SystemExit("README.md has no lines `<!-- results -->` and `<!-- /results -->`")
    filled = BETWEEN.sub(lambda _: summary(RESULTS), readme)
    exploration = EXPLORATION.with_suffix(".md")
    return {
        REPO / "README.md": filled,
        REPO / "benchmarks" / "README.md": full_report(RESULTS),
        exploration: filled_exploration(exploration.read_text(), exploration_runs(EXPLORATION)),
    }


def main(args: Args) -> None:
    stale = {path: text for path, text in pages().items() if not path.exists() or path.read_text() != text}
    if args.check and stale:
        raise SystemExit(f"not what the files say: {', '.join(path.name for path in stale)}; run benchmarks/report.py")
    for path, text in stale.items():
        path.write_text(text)
        print(f"wrote {path.relative_to(REPO)}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
