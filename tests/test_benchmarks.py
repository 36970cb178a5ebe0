"""benchmarks/run.py measures what it says, benchmarks/report.py shows what the files hold."""

import contextlib
import csv
import dataclasses
import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch
import tyro
from conftest import REPO, free_port, run_script
from test_repo import Command, args_of, command_faults

import sac_state_sim
from common.evaluation import evaluate

sys.path.insert(0, str(REPO / "benchmarks"))
import ecosystem
import hil_rehearsal
import peers
import report
import run
import speed

LINE = {"row": "sac_pick_default", "env_id": "FrankaPickCube-v0", "global_step": 12000, "metric": "eval/success_rate"}
LINE |= {"wall_s": 90, "peak_mb": 700, "date": "2026-01-02", "commit": "abc1234", "hardware": "a CPU, 2 cores"}


def test_tables_are_those_of_the_files():
    for path, page in report.pages().items():
        assert path.read_text() == page, f"{path} is stale: run `python benchmarks/report.py`"


@pytest.mark.parametrize("name", run.ROWS)
def test_commands_parse(name):
    script, *flags = shlex.split(run.ROWS[name].command)
    assert command_faults(Command(script, tuple(flags), ""), args_of(script)) == []


def test_results_were_measured_with_the_rows_command():
    rows, _ = report.results_in(run.RESULTS)
    for name, lines in rows.items():
        for line in lines:
            row = run.ROWS[name]
            assert line["command"] in [f"python {c} --seed {line['seed']}" for c in (row.command, row.formerly)]
            assert not line["commit"].endswith("-dirty")
            curve = run.RESULTS / name / f"seed{line['seed']}_eval.csv"
            assert run.last_evaluation(curve, line["metric"]) == (line["global_step"], float(line["value"]))


def test_measure(tmp_path):
    script = """
import sys; sys.path.insert(0, sys.argv[1]); import run; from pathlib import Path
grow = "import time; x = bytearray(200_000_000); x[::4096] = b'1' * len(x[::4096]); time.sleep(0.5)"
print(*run.measure([sys.executable, "-c", grow], Path()), *run.measure([sys.executable, "-c", ""], Path()))
"""
    # In a process of its own: Linux counts the parent's memory at the start as the child's, and pytest is large.
    command = [sys.executable, "-c", script, str(REPO / "benchmarks")]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    wall_s, peak_mb, short_s, small_mb = map(float, output.split())
    assert 0.5 <= wall_s < 10 and 200 <= peak_mb < 300
    assert short_s < wall_s and small_mb < 100  # not the largest of all processes so far
    with pytest.raises(SystemExit, match="exited with 3; nothing is recorded"):
        run.measure([sys.executable, "-c", "raise SystemExit(3)"], tmp_path)


@pytest.mark.parametrize("name", ["script.py", "common/module.py"])
def test_commit_of_changed_code_is_dirty(tmp_path, monkeypatch, name):
    monkeypatch.setattr(run, "REPO", tmp_path)
    (tmp_path / "common").mkdir()
    (tmp_path / name).write_text("x = 1\n")
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for words in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "x"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    (tmp_path / "notes.txt").write_text("x\n")
    assert re.fullmatch(r"[0-9a-f]{7,}", run.commit())
    (tmp_path / name).write_text("x = 2\n")
    assert re.fullmatch(r"[0-9a-f]{7,}-dirty", run.commit())


def test_run_seed_records_a_line_and_the_curve(tmp_path, monkeypatch):
    fake = tmp_path / "fake.py"
    fake.write_text(
        "import json, pathlib, sys\n"
        "flags = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))\n"
        "run_dir = pathlib.Path(flags['--run-dir']); run_dir.mkdir(parents=True)\n"
        "(run_dir / 'args.json').write_text(json.dumps({'env_id': 'Fake-v0'}))\n"
        "curve = f'global_step,eval/success_rate\\n10,0.0\\n20,{flags[\"--value\"]}\\n'\n"
        "(run_dir / 'eval.csv').write_text(curve)\n"
    )
    monkeypatch.setattr(run, "REPO", tmp_path)
    monkeypatch.setattr(run, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(run, "commit", lambda: "abc1234")
    for value, seed in [(0.25, 2), (0.5, 1), (0.75, 2)]:
        row = run.Row("a fake", f"fake.py --value {value}", "eval/success_rate", "")
        monkeypatch.setitem(run.ROWS, "fake", row)
        run.run_seed("fake", seed)
    with (tmp_path / "results/fake.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["seed"], line["value"], line["global_step"]) for line in lines] == [
        ("1", "0.5", "20"),
        ("2", "0.75", "20"),
    ]
    assert list(lines[0]) == run.COLUMNS
    assert lines[0]["command"] == "python fake.py --value 0.5 --seed 1" and lines[0]["env_id"] == "Fake-v0"
    assert (tmp_path / "results/fake/seed2_eval.csv").read_text().endswith("20,0.75\n")
    assert json.loads(next(tmp_path.glob("runs/benchmark__fake__1__*/args.json")).read_text())


def test_tables_of_rows_and_of_speed(tmp_path):
    assert "Nothing has been measured" in report.summary(tmp_path)
    assert "Nothing has been measured" in report.results_tables(tmp_path)
    for seed, value in [(1, 0.9), (2, 1.0)]:
        line = LINE | {"seed": seed, "value": value, "command": "python x.py"}
        run.record(tmp_path / "sac_pick_default.csv", line)
        run.record(tmp_path / "rlpd_settings.csv", line | {"row": "rlpd_settings"})
    (tmp_path / "sac_state_speed.csv").write_text(
        "contender,steps_per_second\nslow,100\nours,300\nours,290\nours,1000\n"
    )
    (tmp_path / "notes.csv").write_text("a,b\n1,2\n")
    summary, tables = report.summary(tmp_path), report.results_tables(tmp_path)
    line = next(line for line in summary.splitlines() if "sac_pick_default" in line)
    assert "| **0.95** (0.9, 1) |" in line and "| 12,000 |" in line and "| 1.5 min |" in line and "| 700 MB |" in line
    assert line in tables
    assert "rlpd_settings" not in summary and "ours" not in summary
    assert tables.index("sac_pick_default") < tables.index("### Ablations") < tables.index("rlpd_settings")
    assert tables.index("| ours | 300 | 3 |") < tables.index("| slow | 100 | 1 |")
    assert "notes" not in tables
    assert "Measured with another command: `python x.py`" in report.full_report(tmp_path)


def test_readme_shows_ten_rows_at_most():
    shown = report.BETWEEN.search((REPO / "README.md").read_text())[0]
    names = re.findall(r"\(`(\w+)`\) \|", shown)
    assert 0 < len(names) <= 10
    assert set(names) <= set(report.NEWCOMERS) <= set(run.ROWS)


# --- Tasks of others --------------------------------------------------------------------------------------------------
FAKE_SCRIPT = """
import pathlib, sys
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder = pathlib.Path(flags.get("--run-dir") or flags.get("--resume") or flags["--eval-only"])
folder.mkdir(exist_ok=True)
if "--eval-only" in flags:
    print("checkpoint: eval/success_rate 0, eval/episodic_return RETURN over 2 episodes")
elif "--resume" in flags and RESUMES:
    sys.exit(f"sac_state_sim.py: {pathlib.Path.cwd()}/{folder}: is gone; start anew")
else:
    steps = flags["--total-timesteps"]
    (folder / "train.csv").write_text(f"global_step,losses/critic_loss,losses/vice_loss\\n1,nan,\\n{steps},LOSS,\\n")
"""
BAD_LOSS = "train.csv ends at step 300 with {'losses/critic_loss': nan}"


@pytest.mark.parametrize(
    ("episodic_return", "loss", "gone", "outcomes"),
    [
        ("-3.5", "0.25", "0", ["yes", "yes", "yes"]),
        (
            "nan",
            "0.25",
            "0",
            ["yes", "prints 'checkpoint: eval/success_rate 0, eval/episodic_return nan over 2 episodes'", "yes"],
        ),
        ("-3.5", "0.25", "1", ["yes", "yes", "sac_state_sim: is gone; start anew"]),
        ("-3.5", "nan", "0", [BAD_LOSS]),
        ("-3.5", "", "0", [BAD_LOSS]),
    ],
)
def test_what_a_script_does_with_a_task(tmp_path, monkeypatch, episodic_return, loss, gone, outcomes):
    script = FAKE_SCRIPT.replace("RETURN", episodic_return).replace("LOSS", loss).replace("RESUMES", gone)
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "sac_state_sim.py").write_text(script)
    (tmp_path / "cwd").mkdir()
    monkeypatch.setattr(ecosystem, "REPO", tmp_path / "repo")
    monkeypatch.setitem(ecosystem.SHORT, "sac_state_sim.py", ("", 300, 400))
    found = list(ecosystem.attempts("sac_state_sim.py", [], tmp_path / "cwd"))
    assert [what for what, _ in found] == ["trains", "evaluates", "resumes"][: len(outcomes)]
    for (_, said), words in zip(found, outcomes, strict=True):
        assert said.startswith(words)


def test_table_of_tasks_of_others(tmp_path):
    assert report.ecosystem_report(tmp_path) == ""
    door, lift = ecosystem.TASKS[1].env_id, ecosystem.TASKS[2].env_id
    line = dict.fromkeys(ecosystem.COLUMNS, "x") | {"ecosystem": "robosuite", "version": "1.5.1"}
    yes = dict.fromkeys(("trains", "evaluates", "resumes"), "yes")
    path = tmp_path / "ecosystem.csv"
    ecosystem.record(path, line | {"task": lift, "script": "sac_state_sim.py", "trains": "fails | here"})
    ecosystem.record(path, line | {"task": door, "script": "bc_flow_offline.py"} | yes | {"evaluates": "a | b"})
    said = f"--env-id {door}: observes no images; use sac_state_sim.py"
    ecosystem.record(
        path, {"ecosystem": "a, b", "version": "1, 2", "task": door, "script": "sac_pixel_sim.py", "trains": said}
    )
    ecosystem.record(path, line | {"task": lift, "script": "sac_state_sim.py"} | yes | {"resumes": "NaN"})
    table = report.ecosystem_report(tmp_path).split("\n\n")[2]
    assert table.splitlines()[2:] == [
        f"| a, b 1, 2 | `{door}` | `sac_pixel_sim.py` | observes no images |  |  |",
        f"| robosuite 1.5.1 | `{door}` | `bc_flow_offline.py` | yes | a / b | yes |",
        f"| robosuite 1.5.1 | `{lift}` | `sac_state_sim.py` | yes | yes | NaN |",
    ]
    assert report.ecosystem_report(tmp_path) in report.full_report(tmp_path)


def test_ecosystems_flags_parse():
    for script, (flags, steps, _) in ecosystem.SHORT.items():
        command = Command(script, (*flags.split(), ecosystem.STEPS[script], str(steps)), "")
        assert command_faults(command, args_of(script)) == []


# --- Speed ------------------------------------------------------------------------------------------------------------
def test_contenders_take_turns(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speed, "commit", lambda: "abc1234")
    monkeypatch.setattr(speed, "hardware", lambda: "a CPU")
    seconds = {("ours", 1): 2.0, ("slow", 1): 30.0, ("ours", 2): 4.0, ("slow", 2): 10.0}
    calls = []

    def measure(contender, number):
        calls.append((contender, number))
        others = 0.5 if contender == "slow" else 0.0
        return speed.timing(1000, seconds[contender, number]) | {"version": "x 1.0", "others_cores": others}

    medians = speed.take_turns(["ours", "slow"], 2, measure, tmp_path / "new" / "out.csv", "python x.py")
    assert calls == list(seconds)
    assert medians == {"ours": 375.0, "slow": pytest.approx((1000 / 30 + 100) / 2, abs=1e-3)}
    with (tmp_path / "new" / "out.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == speed.COLUMNS
    assert [(line["contender"], line["round"]) for line in lines] == [(name, str(number)) for name, number in calls]
    assert [line["steps_per_second"] for line in lines] == ["500.0", "33.333", "250.0", "100.0"]
    assert {(line["commit"], line["hardware"], line["command"]) for line in lines} == {
        ("abc1234", "a CPU", "python x.py")
    }
    printed = capsys.readouterr().out.splitlines()
    assert printed[1] == "round 1: slow    33.3 steps/s (others used 0.5 cores)"
    assert printed[4] == "ours median 375 steps/s (min 250, max 500)"


def test_a_file_with_other_columns_is_left_alone(tmp_path):
    path = tmp_path / "out.csv"
    speed.record(path, {"contender": "ours", "round": 1})
    speed.record(path, {"contender": "ours", "round": 2})
    with pytest.raises(SystemExit, match=r"has the columns contender, round, not contender, steps: give --output"):
        speed.record(path, {"contender": "ours", "steps": 5})
    assert path.read_text() == "contender,round\nours,1\nours,2\n"


def test_run_contender(tmp_path):
    program = "import os; print(os.getcwd(), os.environ['OMP_NUM_THREADS'], os.environ['CUDA_VISIBLE_DEVICES'] == '', "
    program += "os.environ['EXTRA'])"
    stdout, others = speed.run_contender([sys.executable, "-c", program], tmp_path, threads=3, gpu=False, EXTRA="yes")
    assert stdout.split() == [str(tmp_path), "3", "True", "yes"]
    assert isinstance(others, float)
    with pytest.raises(SystemExit, match=r"failed:\nseen\n"):
        speed.run_contender([sys.executable, "-c", "print('seen'); raise SystemExit(3)"], tmp_path, 1, gpu=False)


def test_cloning_timing(tmp_path):
    (tmp_path / "offline_agent.csv").write_text("step,SPS\n50,1\n100,25\n150,100\n")
    log = speed.cloning_log(tmp_path)
    assert speed.cloning_timing(log, 50) == {"steps": 100, "seconds": 2.5, "steps_per_second": 40.0}


def test_interpreter_and_versions(tmp_path):
    link = tmp_path / "python"
    link.symlink_to(sys.executable)
    assert speed.interpreter(str(link)) == str(link)  # not what it leads to
    with pytest.raises(SystemExit, match="nowhere: there is no such interpreter"):
        speed.interpreter("nowhere")
    assert speed.versions(sys.executable, "tyro") == f"tyro {importlib.metadata.version('tyro')}"


# --- Exploration ------------------------------------------------------------------------------------------------------
def prose_numbers(page: str) -> list[str]:
    """Numbers outside tables and `code`, where no file shows them."""
    prose = "\n".join(line for line in page.splitlines() if not line.startswith("|"))
    return re.findall(r"(?<![\w.])\d[\d.,]*\d?%?", re.sub(r"`[^`]*`", "", prose))


def test_every_run_of_exploration_has_one_line():
    page = report.EXPLORATION.with_suffix(".md").read_text()
    lines = [name for _, name in report.RUN_LINE.findall(page)]
    assert sorted(lines) == sorted(report.exploration_runs(report.EXPLORATION))
    assert prose_numbers(page) == []
    assert report.EXPLORATION.stat().st_size < 1_000_000


def test_numbers_in_prose_are_seen():
    assert prose_numbers("It lifts 95% at 12,000 steps,\n0.5 of them.\n") == ["95%", "12,000", "0.5"]
    assert prose_numbers("SimbaV2 with `--lr 0.1`\n| `run` | 0.5 |\n") == []


def test_lines_of_exploration(tmp_path):
    (tmp_path / "runs.csv").write_text(
        "run,seed,global_step,episodes,success,return,wall_s\n"
        "lifts,1,1000,10,0.2,9.1,60.0\nlifts,1,2500,10,0.5,20.2,90.0\nlifts,1,4000,50,0.98,61.6,120.0\n"
        "lifts,2,4000,50,0.06,12.4,150.0\nchance,1,17956,80,0.075,8.0,\n"
    )
    runs = report.exploration_runs(tmp_path / "runs.csv")
    page = "Words.\n\n| run | settings |\n| --- | --- |\n| `lifts` | `--x 1` |\n| `chance` | none | stale | 1 |\n"
    assert report.filled_exploration(page, runs) == (
        "Words.\n\n| run | settings |\n| --- | --- |\n"
        "| `lifts` | `--x 1` | 1, 2 | 4 | 2.5, never | 0.98, 0.06 | 62, 12 | 2.0, 2.5 |\n"
        "| `chance` | none | 1 | 18 | never | 0.075 | 8 |  |\n"
    )
    with pytest.raises(SystemExit, match="names the run unknown"):
        report.filled_exploration("| `unknown` | none |\n", runs)


def test_a_working_day_is_rehearsed(tmp_path):
    """Every step of README's day, the classifier's too, with too little of everything."""
    flags = ("--short", "--classifier", "--sim-speed", 4, "--folder", tmp_path / "day", "--port", free_port())
    finished = run_script("benchmarks/hil_rehearsal.py", *flags, cwd=tmp_path, timeout=280)
    line = dict(re.findall(r"^(\w+) {2,}(.+)$", finished.stdout, re.M))
    assert line["row"] == "hil_rehearsal_classifier" and line["episodes"] == "2"
    assert int(line["transitions"]) >= 200 and 0 < float(line["demo_cycle_s"]) < 10
    assert "--reward classifier/classifier.pt" in line["command"]


def test_table_of_rehearsed_days(tmp_path):
    assert report.rehearsal_report(tmp_path) == ""
    line = {"row": "hil_rehearsal", "seed": 2, "transitions": 8000, "robot_s": 900, "success": 0.96, "episodes": 50}
    line |= {"low": 0.86, "high": 0.99, "intervention_rate": 0.024, "cycle_s": 2.5, "demo_cycle_s": 3.1}
    line |= {"late_p99_ms": 1.2}
    line |= {"wall_s": 1800, "date": "day", "commit": "abc", "hardware": "cores"}
    line |= {"command": "python sac_pixel_real.py --teleop scripted --help-until 0 --reward task --seed 2"}
    with (tmp_path / "hil_rehearsal.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, hil_rehearsal.COLUMNS)
        writer.writeheader()
        writer.writerow(line)
        writer.writerow(line | {"wall_s": ""})
    table = report.rehearsal_report(tmp_path).split("\n\n")[2].splitlines()
    settings = "`--help-until 0 --reward task`"
    told = f"| 2 | {settings} | 8000 | 15.0 min | **0.96** (0.86 to 0.99) | 50 | 2% | 2.5 s (3.1 s) | 1.2 ms |"
    assert table[2:] == [f"{told} {wall} | day | abc | cores |" for wall in ("30.0 min", "stopped early")]


# --- Beside others ----------------------------------------------------------------------------------------------------
FAKE_CONTENDER = """
import sys
print("learning", "{", '{"loss": 1}', "wall_s", flush=True)
print('{"step": 1000, "wall_s": 10.5, "success": 0.5, "return": 20.25, "cpu_s": 0.01}', flush=True)
print('{"step": 2000, "wall_s": 20.0, "success": 1.0, "return": 61.0, "cpu_s": 0.02}', flush=True)
if "RESULT":
    sys.exit("RESULT")
"""
FAKE_CLEANRL = """
import numpy as np, torch, tyro
import gymnasium as gym
from cleanrl_utils.buffers import ReplayBuffer
from dataclasses import dataclass

@dataclass
class Args:
    env_id: str = "Hopper-v4"
    seed: int = 1
    total_timesteps: int = 5

class Actor:
    def get_action(self, x):
        assert x.shape == (1, *env.observation_space.shape) and x.dtype == torch.float32
        return None, None, torch.tensor([[0.0, 0.0, -1.0, 1.0]])  # down

if __name__ == "__main__":
    args = tyro.cli(Args)
    env = gym.make(args.env_id)
    actor, device = Actor(), torch.device("cpu")
    env.reset(seed=args.seed)
    for step in range(args.total_timesteps):
        env.step(env.action_space.sample())
"""


FAKE_LEROBOT = {
    "configs/types.py": """
from enum import Enum
FeatureType = Enum("FeatureType", ["STATE", "ACTION"])
def PolicyFeature(type, shape): return type, shape
""",
    "policies/sac/configuration_sac.py": """
from types import SimpleNamespace
def SACConfig(**settings): return SimpleNamespace(**settings)
""",
    "policies/sac/modeling_sac.py": """
import torch
class SACPolicy:
    def __init__(self, config):
        assert len(config.input_features) == len(config.output_features) == 1
        _, self.shape = config.input_features["observation.state"]
    def actor(self, obs):
        assert obs["observation.state"].shape == (1, *self.shape) and obs["observation.state"].dtype == torch.float32
        return None, None, torch.tensor([[0.0, 0.0, -9.0, 9.0]])  # before tanh: down
    def select_action(self, obs):
        return torch.zeros(1, 4)
""",
    "rl/learner.py": """
class Buffer(list):
    def add(self, *transition): self.append(transition)
def initialize_replay_buffer(cfg, device, storage_device): return Buffer()
def add_actor_information_and_train(cfg, logger, shutdown, transitions, interactions, parameters):
    assert make_policy(cfg=cfg.policy, env_cfg=cfg.env).shape == (OBS,)
    if cfg.dataset is not None:
        demos = initialize_offline_replay_buffer(cfg=cfg, device="cpu", storage_device="cpu")
        assert [over for *_, over in demos].count(True) == 1 and len(demos) == 100
        (obs, action, reward, next_obs, terminated, over) = demos[0]
        assert (obs["observation.state"] == 0).all() and (action == 1).all() and (reward, terminated) == (2.0, False)
    buffer = Buffer()
    for count in range(1, 106):
        process_transitions(transition_queue=transitions, replay_buffer=buffer, offline_replay_buffer=None)
        assert len(buffer) == count and buffer[-1][-1] is (count == 100)  # the task's time limit
    before, after = buffer[-2][3], buffer[-1][0]
    assert (before["observation.state"] == after["observation.state"]).all()
    parameters.put(b"")
""",
}


def a_job(tmp_path, contender="ours", **changes) -> peers.Job:
    job = peers.Job(contender, "FrankaPickCube-v0", 3, 600.0, time.time(), str(tmp_path))
    return dataclasses.replace(job, **changes)


def child_lines(job: peers.Job, before: str = "") -> list[dict[str, float]]:
    """What the referee says in a contender's process; `before` is run in it first."""
    code = peers.CHILD.replace("peers.compete", f"{before}; peers.compete")
    command = [sys.executable, "-c", code, str(REPO / "benchmarks"), json.dumps(dataclasses.asdict(job))]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=job.folder, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return [line for line in map(peers.evaluation, finished.stdout.splitlines()) if line]


@pytest.mark.parametrize(("contender", "env_id"), peers.OURS)
def test_commands_beside_others_parse(contender, env_id):
    script, *flags = shlex.split(peers.OURS[contender, env_id])
    assert command_faults(Command(script, tuple(flags), ""), args_of(script)) == []
    args = tyro.cli(sac_state_sim.Args, args=flags)
    assert args.env_id == env_id
    if contender == "ours_demos":
        assert (args.demos, args.demo_noise) == (peers.DEMOS, peers.DEMO_NOISE)
    else:
        assert args.demos == "0"


def test_all_are_evaluated_as_the_script_does(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(peers, "EPISODES", 2)
    job = a_job(tmp_path)
    referee = peers.Referee(job)
    down = np.float32([0.3, -0.2, -1.0, 0.5])
    before = referee.wall_s()
    scores = referee.evaluate(lambda _: down, 7000)
    assert referee.wall_s() - before < 0.5 * referee.paused_s  # the clock stood still
    env = sac_state_sim.wrap_env(sac_state_sim.make_env(sac_state_sim.Args()), sac_state_sim.Args())
    theirs = evaluate(lambda observations, _: down[None], [env], 2, job.seed, sac_state_sim.success)
    assert scores == {"success": theirs["eval/success_rate"], "return": theirs["eval/episodic_return"]}
    line = peers.evaluation(capsys.readouterr().out.splitlines()[-1])
    assert line["step"] == 7000 and line["return"] == scores["return"] and line["success"] == scores["success"]


def test_a_peers_task_interrupts_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(peers, "EPISODES", 1)
    monkeypatch.setattr(peers, "EVERY", 3)
    job = a_job(tmp_path)
    task = peers.Training(job, peers.Referee(job))
    task.policy = lambda obs: np.zeros(4, np.float32)
    task.reset(seed=1)
    for _ in range(7):
        task.step(task.action_space.sample())
    task.budget_s = 0.0
    with pytest.raises(peers.TimeUpError):
        task.step(task.action_space.sample())
    lines = list(filter(None, map(peers.evaluation, capsys.readouterr().out.splitlines())))
    assert [line["step"] for line in lines] == [3, 6, 8]


def test_half_of_each_minibatch_is_of_the_demonstrations():
    class Buffer:
        def __init__(self, value):
            self.value = value

        def sample(self, batch_size):
            rows = np.full((batch_size, 3), self.value) + np.arange(batch_size)[:, None] / 1000
            return {"observations": rows, "rewards": rows[:, 0]}

    batch = peers.mixed([Buffer(0), Buffer(1)], batch_size=6, utd_ratio=2)
    expected = [0, 0.001, 0.002, 1, 1.001, 1.002, 0.003, 0.004, 0.005, 1.003, 1.004, 1.005]
    assert batch["rewards"].tolist() == pytest.approx(expected)
    assert batch["observations"].tolist() == pytest.approx(np.repeat(expected, 3).reshape(12, 3))
    assert peers.mixed([Buffer(2)], 4, 2)["rewards"].tolist() == pytest.approx([2 + i / 1000 for i in range(8)])


def test_peers_get_the_scripts_demonstrations(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "DEMOS", "2")
    peers.write_demos(tmp_path / "demos.npz", "FrankaPickCube-v0", 5)
    demos = np.load(tmp_path / "demos.npz")
    args = sac_state_sim.Args(seed=5, demos="2")
    task = sac_state_sim.make_env(args)
    wrap = partial(sac_state_sim.wrap_env, args=args)
    env = wrap(task)
    agent = sac_state_sim.Agent(env.observation_space, env.action_space, args, torch.device("cpu"))
    rows = sac_state_sim.load_demos(args, agent, task, wrap).rows
    for name in ("observations", "actions", "rewards", "next_observations"):
        np.testing.assert_array_equal(np.float32(demos[name]), getattr(rows, name).numpy(), err_msg=name)
    np.testing.assert_array_equal(demos["masks"], 1 - rows.terminations.numpy())
    assert np.flatnonzero(demos["dones"]).tolist() == [99, 199]


def test_ours_runs_with_its_own_evaluations_replaced(tmp_path):
    tiny = "sac_state_sim.py --demos 0 --hidden-dims 8 8 --batch-size 8 --utd-ratio 1 --learning-starts 40"
    before = "peers.EVERY = 50; peers.EPISODES = 1; "
    before += f"peers.OURS['ours', 'FrankaPickCube-v0'] = '{tiny} --total-timesteps 120'"
    lines = child_lines(a_job(tmp_path, threads=1), before)
    assert [line["step"] for line in lines] == [50, 100, 120]
    with (tmp_path / "run" / "eval.csv").open(newline="") as file:
        own = list(csv.DictReader(file))
    assert [float(line["eval/episodic_return"]) for line in own] == pytest.approx([line["return"] for line in lines])
    (tmp_path / "short").mkdir()
    short = a_job(tmp_path, folder=str(tmp_path / "short"), threads=1, budget_s=0.0)
    assert [line["step"] for line in child_lines(short, before)] == [50]


def test_cleanrls_script_runs_as_it_is(tmp_path, monkeypatch):
    script = tmp_path / "cleanrl" / "sac_continuous_action.py"
    buffers = tmp_path / "cleanrl_utils" / "buffers.py"
    for path, text in ((script, FAKE_CLEANRL), (buffers, "ReplayBuffer = None\n")):
        path.parent.mkdir()
        path.write_text(text)
    job = a_job(tmp_path, "cleanrl", path=str(tmp_path), budget_s=0.0)
    (line,) = child_lines(job, "peers.EPISODES = 1")
    monkeypatch.setattr(peers, "EPISODES", 1)
    expected = peers.Referee(job).evaluate(lambda _: np.float32([0, 0, -1, 1]), 1)
    assert line["step"] == 1 and line["return"] == expected["return"]


@pytest.mark.parametrize("contender", ["lerobot", "lerobot_demos"])
def test_lerobots_learner_runs_as_it_is(tmp_path, monkeypatch, contender):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    job = a_job(tmp_path, contender)
    task = peers.make_task(job.env_id)
    for name, text in FAKE_LEROBOT.items():
        path = tmp_path / "lerobot" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace("OBS", str(task.observation_space.shape[0])))
    count, obs = 100, np.zeros((100, *task.observation_space.shape), np.float32)
    demos = {"observations": obs, "next_observations": obs, "actions": np.ones((count, 4), np.float32)}
    demos |= {"rewards": np.full(count, 2.0), "masks": np.ones(count), "dones": np.arange(count) == count - 1}
    np.savez(tmp_path / "demos.npz", **demos)
    lines = child_lines(job, "peers.EPISODES = 1; peers.EVERY = 40")
    monkeypatch.setattr(peers, "EPISODES", 1)
    expected = peers.Referee(job).evaluate(lambda _: np.tanh(np.float32([0, 0, -9, 9])), 1)
    assert [line["step"] for line in lines] == [40, 80]
    assert [line["return"] for line in lines] == pytest.approx([expected["return"]] * 2)


@pytest.mark.parametrize("result", ["", "the peer fell"])
def test_a_runs_lines_are_kept(tmp_path, monkeypatch, result):
    monkeypatch.setattr(peers, "CHILD", FAKE_CONTENDER.replace("RESULT", result))
    monkeypatch.setattr(peers, "commit", lambda: "abc1234")
    monkeypatch.setattr(peers, "hardware", lambda: "a CPU")
    args = peers.Args(output=tmp_path / "new" / "peers.csv")
    for seed in (1, 2, 1):
        failure = pytest.raises(SystemExit, match=result) if result else contextlib.nullcontext()
        with failure:
            peers.run_contender("sb3", sys.executable, "", "x 1.0", seed, args)
    lines = peers.read(args.output)
    assert list(lines[0]) == peers.COLUMNS
    assert [(line["seed"], line["step"]) for line in lines] == [
        ("2", "1000"),
        ("2", "2000"),
        ("1", "1000"),
        ("1", "2000"),
    ]
    line = lines[-1]
    facts = ("contender", "env_id", "wall_s", "success", "return", "budget_s", "version", "commit", "hardware")
    values = ["sb3", "FrankaPickCube-v0", "20.0", "1.0", "61.0", "1800.0", "x 1.0", "abc1234", "a CPU"]
    assert [line[fact] for fact in facts] == values
    assert float(line["others_cores"]) >= 0 and int(line["cores"]) == len(os.sched_getaffinity(0))


def test_contenders_that_are_given(tmp_path):
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run(["git", *identity, "commit", "-q", "--allow-empty", "-m", "x"], cwd=tmp_path, check=True)
    args = peers.Args(cleanrl_path=tmp_path)
    found = peers.contenders(args)
    assert list(found) == ["ours_demos", "ours_mirror", "ours", "cleanrl"]
    peg = peers.contenders(dataclasses.replace(args, env_id="FrankaPegInsert-v0"))
    assert list(peg) == ["ours_demos", "ours", "cleanrl"]
    assert found["ours"] == (sys.executable, "", speed.versions(sys.executable, "torch", "gymnasium", "mujoco"))
    assert re.fullmatch(r"commit [0-9a-f]{7,}, torch .*", found["cleanrl"][2])
    assert list(peers.contenders(dataclasses.replace(args, contenders=("cleanrl", "ours")))) == ["cleanrl", "ours"]
    with pytest.raises(SystemExit, match="--contenders sb3: not among those that are given paths: ours_demos, ours"):
        peers.contenders(peers.Args(contenders=("sb3",)))


def peer_lines(contender: str, seed: int, evaluations: list[tuple], env_id: str = "FrankaPickCube-v0") -> list[dict]:
    line = {"contender": contender, "env_id": env_id, "seed": seed, "others_cores": 0.02, "budget_s": 1800.0}
    line |= {"cores": 2, "version": "x 1.0", "date": "day", "commit": "abc", "hardware": "cores", "return": 31.4}
    columns = ("step", "wall_s", "success")
    return [line | dict(zip(columns, values, strict=True)) for values in evaluations]


def test_table_and_picture_beside_others(tmp_path):
    assert report.peers_report(tmp_path) == ""
    lines = peer_lines("ours_demos", 1, [(1000, 60, 0.4), (2000, 90, 0.9), (3000, 120, 1.0), (4000, 150, 0.9)])
    lines += peer_lines("ours_demos", 2, [(1000, 66, 0.9), (2000, 96, 0.9), (3000, 126, 0.9)])
    lines += peer_lines("serl_8", 1, [(1000, 600, 0.0), (1500, 1800, 0.1)])
    lines += peer_lines("sb3", 1, [(1000, 30, 1.0), (12345, 1800, 0.9)], "FrankaPegInsert-v0")
    with (tmp_path / "peers.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, peers.COLUMNS)
        writer.writeheader()
        writer.writerows(lines)
    page = report.peers_report(tmp_path)
    assert page in report.full_report(tmp_path)
    assert "peers.csv" not in report.results_tables(tmp_path)  # no speeds
    pick, peg, facts = [part.splitlines() for part in page.split("\n\n") if part.startswith("| ")]
    ours = report.PEERS["ours_demos"]
    serl = f"{report.PEERS['serl']}, an update every 8 steps"
    ends = "**0.95**; **0.9** | 31; 31 | 2.5; 2.1 | 4,000; 3,000"
    assert pick[2:] == [
        f"| `ours_demos` | {ours} | 1; 2 | 2.0; never | 3,000; never | {ends} |",
        f"| `serl_8` | {serl} | 1 | never | never | **0.05** | 31 | 30.0 | 1,500 |",
    ]
    assert "| `sb3` |" in peg[2] and "| 1 | 30.0 | 12,345 | **0.95** |" in peg[2]
    assert facts[2] == "| ours_demos | x 1.0 | 1800.0 | 2 | day | abc | cores | 0.02 |"
    peers.draw(peers.read(tmp_path / "peers.csv"), tmp_path / "new" / "peers.png")
    assert (tmp_path / "new" / "peers.png").read_bytes().startswith(b"\x89PNG")


def test_points_of_the_picture():
    lines = peer_lines("ours", 1, [(1000, 60, 0.4), (2000, 200, 1.0)]) + peer_lines("ours", 2, [(1000, 72, 0.8)])
    minutes, success = peers.curve(lines, np.array([50.0, 100.0, 150.0, 300.0]))
    assert minutes == pytest.approx([1.1, 200 / 60])
    assert success == pytest.approx([0.6, 1.0])


def test_results_beside_others():
    for line in peers.read(run.RESULTS / "peers.csv"):
        name, _, steps = line["contender"].rpartition("_")
        assert (name if steps.isdecimal() else line["contender"]) in report.PEERS
        assert not line["commit"].endswith("-dirty")
