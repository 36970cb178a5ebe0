"""common/setup.py: flags, as sac_state_sim.py has them, and a process beside this one."""

import dataclasses
import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import typing
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import REPO, wait_until
from tqdm import tqdm

import sac_state_sim
from common import setup
from common.setup import Child, RunArgs, ends_well, help_text, parse
from sac_state_sim import Args


def parsed(*flags: object) -> Args:
    return parse(Args, sac_state_sim.__doc__, Args.MAY_CHANGE, list(map(str, flags)))


def refused(*flags: object) -> str:
    """The one line that a command line ends with."""
    with pytest.raises(SystemExit) as error:
        parsed(*flags)
    assert isinstance(error.value.code, str) and "\n" not in error.value.code
    return error.value.code


# --- Flags ------------------------------------------------------------------------------------------------------------
def test_flags_take_their_types():
    args = parsed("--hidden-dims", 32, 16, "--demos", 7, "--no-layer-norm", "--lr", 1e-3, "--activation", "gelu")
    assert (args.hidden_dims, args.demos, args.layer_norm) == ((32, 16), "7", False)
    assert (args.lr, args.activation, args.total_timesteps) == (1e-3, "gelu", 6000)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--num-qs 2 --num-min-qs 3", "--num-min-qs 3 --num-qs 2"),
        ("--num-min-qs 0", "--num-min-qs 0"),
        ("--demo-ratio 1.5", "--demo-ratio 1.5"),
        ("--demo-ratio nan", "--demo-ratio nan"),
        ("--batch-size 0", "--batch-size 0"),
        ("--utd-ratio 0", "--utd-ratio 0 --role"),
        ("--total-timesteps 0", "--total-timesteps 0"),
        ("--total-timesteps 500", "--total-timesteps 500: 500; more"),
        ("--buffer-size 0", "--buffer-size 0"),
        ("--action-chunk 0", "--action-chunk 0"),
        ("--eval-every 0", "--eval-every 0"),
        ("--eval-episodes 0", "--eval-episodes 0"),
        ("--n-step 0", "--n-step 0"),
        ("--threads 0", "--threads 0"),
        ("--seed -1", "--seed -1"),
        ("--dropout 1", "--dropout 1"),
        ("--alpha-init 0", "--alpha-init"),
        ("--gamma 1.5", "--gamma 1.5"),
        ("--seed 18446744073709551616", "--seed 18446744073709551616 2**63"),
        ("--lr inf", "--lr inf"),
        ("--target-entropy-per-dim nan", "--target-entropy-per-dim nan: finite"),
        ("--target-entropy-per-dim -inf", "--target-entropy-per-dim -inf: finite"),
        ("--lr -1", "--lr -1"),
        ("--hidden-dims 3 0", "--hidden-dims (3, 0): give one number or more"),
        ("--hidden-dims", "--hidden-dims (): give one number or more"),
        ("--mirror 0 -1", "--mirror (0, -1): give one number or more, each at least 0"),
        ("--record-dataset no_version!", "--record-dataset no_version!"),
        ("--resume nowhere", "--resume nowhere"),
        ("--eval-only nowhere", "--eval-only nowhere"),
        ("--resume one --eval-only other", "--resume one --eval-only other"),
        (f"--resume {'x' * 300}", "--resume File name too long"),
    ],
)
def test_values_out_of_range(flags, words):
    error = refused(*flags.split())
    for word in words.split():
        assert word in error


@pytest.mark.parametrize("option", ["--resume", "--eval-only"])
def test_a_run_without_a_name(option):
    """As `--resume "$RUN"` where RUN is not set: a new run was begun."""
    assert "give one of them, and the folder of a run" in refused(option, "")


@pytest.mark.parametrize("flags", ["--seed one", "--hidden-dims 3 x", "--activation relo", "--gamma", "--no-such 1"])
def test_values_of_wrong_types(flags, capsys):
    """tyro's own message: it frames the line, but names the flag."""
    with pytest.raises(SystemExit) as error:
        parsed(*flags.split())
    assert error.value.code not in (0, None)
    assert flags.split()[0] in "".join(capsys.readouterr())


# --- Flags of an earlier run ------------------------------------------------------------------------------------------
FREE = "run_dir resume eval_only record_dataset capture_video track compile threads amp total_timesteps eval_every "
FREE += "eval_episodes final_eval_episodes address curve_keys"
OTHER = {"std_parameterization": "fixed", "activation": "tanh", "hidden_dims": (7,), "mirror": (7,), "role": "learner"}


@pytest.mark.parametrize("option", ["--resume", "--eval-only"])
def test_flags_of_a_run(tmp_path, option):
    """R9: what shapes what is learned is kept, another value is named and refused; all else may change."""
    saved = Args(env_id="probe_envs:Point-v0", demos="point/expert-v0")
    (tmp_path / "args.json").write_text(json.dumps(dataclasses.asdict(saved)))
    for field in dataclasses.fields(Args):
        if field.name in FREE.split():
            continue
        value, name = getattr(saved, field.name), field.name.replace("_", "-")
        if isinstance(value, bool):
            changed, unchanged = [f"--{'no-' * value}{name}"], [f"--{'no-' * (not value)}{name}"]
        else:
            new = OTHER.get(field.name) or (f"{value}x" if isinstance(value, str) else type(value)(value / 2 + 2))
            assert new != value, name
            changed, unchanged = ([f"--{name}", *(x if isinstance(x, tuple) else (x,))] for x in (new, value))
        assert getattr(parsed(option, tmp_path, *unchanged), field.name) == value
        error = refused(option, tmp_path, *changed)
        assert f"--{name}" in error and str(tmp_path) in error
    more = "--total-timesteps 777 --threads 1 --eval-every 7 --no-capture-video --amp --address ::1"
    args = parsed(option, tmp_path, *more.split())
    changes = {"total_timesteps": 777, "threads": 1, "eval_every": 7, "capture_video": False, "amp": True}
    changes["address"] = "::1"
    assert args.run_dir == str(tmp_path)
    cleared = {"run_dir": None, "resume": None, "eval_only": None}
    assert dataclasses.replace(saved, **changes) == dataclasses.replace(args, **cleared)


def test_a_run_that_goes_on_stays_where_it_is(tmp_path):
    """R2's kind: another --run-dir beside --resume was not looked at."""
    (tmp_path / "args.json").write_text(json.dumps(dataclasses.asdict(Args())))
    for option in ("--resume", "--eval-only"):
        assert f"--run-dir elsewhere: the run stays in {tmp_path}" in refused(
            option, tmp_path, "--run-dir", "elsewhere"
        )
        assert parsed(option, tmp_path, "--run-dir", tmp_path).run_dir == str(tmp_path)
        (tmp_path / "checkpoint.pt").touch()
        assert parsed(option, tmp_path / "checkpoint.pt").run_dir == str(tmp_path)  # as a shell completes it


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EBADF])
def test_a_closed_stdout_is_one_line(number, monkeypatch):
    """R2's kind: `| head`, or `>&-`."""
    closed = []
    monkeypatch.setattr(setup.os, "dup2", lambda new, old: closed.append(old))
    with pytest.raises(SystemExit, match="stdout was closed.*; run the same command again$"), ends_well(Args()):
        raise OSError(number, "Broken pipe")
    assert closed == [1]


def test_a_dataset_is_recorded_when_it_is_asked_for(tmp_path, monkeypatch):
    """A finished run has recorded its dataset; that it is there does not keep the run from being evaluated again."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    (tmp_path / "point" / "mine-v0").mkdir(parents=True)
    (tmp_path / "args.json").write_text(json.dumps(dataclasses.asdict(Args()) | {"record_dataset": "point/mine-v0"}))
    assert parsed("--eval-only", tmp_path).record_dataset is None
    assert "exists" in refused("--eval-only", tmp_path, "--record-dataset", "point/mine-v0")


def test_a_finished_run_with_a_dataset_goes_on(tmp_path, monkeypatch):
    """It was told to give another name, and no other name was taken."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    (tmp_path / "args.json").write_text(json.dumps(dataclasses.asdict(Args()) | {"record_dataset": "point/mine-v0"}))
    assert parsed("--resume", tmp_path).record_dataset == "point/mine-v0"
    (tmp_path / "point" / "mine-v0").mkdir(parents=True)
    assert "--record-dataset point/mine-v0: exists" in refused("--resume", tmp_path)
    assert parsed("--resume", tmp_path, "--record-dataset", "point/mine-v1").record_dataset == "point/mine-v1"


@pytest.mark.parametrize(
    "content", ["", '{"seed": 1', "[1, 2]", '{"no_such_flag": 1}', '{"hidden_dims": 3}', '{"gamma": 7.0}', None]
)
def test_damaged_flags_of_a_run(tmp_path, content):
    if content is not None:
        (tmp_path / "args.json").write_text(content)
    error = refused("--resume", tmp_path)
    assert f"--resume {tmp_path}" in error or "--gamma" in error


# --- Help -------------------------------------------------------------------------------------------------------------
def test_help_keeps_the_headers_lines_and_shows_flags_in_groups(capsys):
    """R11: line breaks of the header, every flag once with type, default and meaning, below the name of its group."""
    with pytest.raises(SystemExit) as error:
        parsed("--resume", "nowhere", "--help")
    assert error.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(sac_state_sim.__doc__.strip())
    body = text[len(sac_state_sim.__doc__.strip()) :]
    groups = re.findall(r"^(\w[\w ]*):$", body, re.MULTILINE)
    assert groups == ["experiment", "environment", "training", "algorithm", "actor and learner"]
    for field in dataclasses.fields(Args):
        name = field.name.replace("_", "-")
        entries = re.findall(rf"^  (--{name} .*)\n        (\S.*)$", body, re.MULTILINE)
        assert len(entries) == 1, name
    assert "--utd-ratio INT  (6)" in body and "--lr FLOAT  (0.0003)" in body and "--run-dir STR  (none)" in body
    assert "--activation {relu,tanh,silu,gelu}  (relu)" in body and "--hidden-dims [INT ...]  (256 256)" in body
    assert "--layer-norm | --no-layer-norm  (on)" in body
    assert body.index("experiment:") < body.index("--record-dataset") < body.index("environment:")
    assert max(map(len, body.splitlines())) <= 110


def test_help_of_a_script_with_few_flags():
    @dataclass
    class Few:
        # robot
        speed: float = 0.1
        """of the arm, m/s"""
        kind: typing.Literal["fr3", "panda"] = "fr3"
        """of robot"""

    lines = ["Moves.", "", "robot:", "  --speed FLOAT  (0.1)", "        of the arm, m/s"]
    lines += ["  --kind {fr3,panda}  (fr3)", "        of robot"]
    assert help_text(Few, "Moves.") == "\n".join(lines)


def test_every_flag_has_a_meaning():
    for flags in (RunArgs, Args):
        assert help_text(flags, "").count("\n  --") == len(dataclasses.fields(flags))


# --- Endings ----------------------------------------------------------------------------------------------------------
def test_sigterm_ends_as_ctrl_c_does(tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.chdir(tmp_path)
    for name in ("run", "saved"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "args.json").touch()
    (tmp_path / "saved" / "checkpoint.previous").touch()
    bar = tqdm(total=1, file=io.StringIO())
    for args, way in (
        (RunArgs(), "run the same command again"),
        (RunArgs(run_dir="run"), "begin again with --resume run, nothing was saved yet"),
        (RunArgs(run_dir="run", eval_only="run"), "run the same command again"),
        (RunArgs(run_dir="saved"), "go on with --resume saved"),
    ):
        with pytest.raises(SystemExit, match=f"^stopped; {way}$"), ends_well(args):
            signal.raise_signal(signal.SIGTERM)
        assert bar.disable  # what is said next has a line of its own
    signal.signal(signal.SIGTERM, before)


# --- A process beside this one ----------------------------------------------------------------------------------------
WORKER = """
import pathlib, signal, sys, time

folder = pathlib.Path(sys.argv[2])
folder.mkdir(exist_ok=True)
(folder / "args.json").touch()
with (folder / "starts").open("a") as file:
    file.write(sys.argv[1] + "\\n")
if sys.argv[1] == "says":
    raise SystemExit("worker.py: --demos: there are none")
if sys.argv[1] == "full":
    raise SystemExit(f"worker.py: the disk is full; make room, then go on with --resume {folder}")


def end(*_):
    time.sleep(0.5)  # saves
    (folder / "saved").touch()
    raise SystemExit(0)


signal.signal(signal.SIGTERM, end)
while not (folder / "enough").exists():
    time.sleep(0.01)
"""
PARENT = """
import pathlib, sys, time

sys.path.insert(0, sys.argv[1])
from common.setup import Child

folder = pathlib.Path(sys.argv[3])
Child(sys.argv[2], ["new", str(folder)], ["again", str(folder)], folder)
time.sleep(60)
"""


def starts(folder: Path) -> list[str]:
    return (folder / "starts").read_text().split() if (folder / "starts").exists() else []


@pytest.fixture
def worker(tmp_path) -> Path:
    path = tmp_path / "worker.py"
    path.write_text(WORKER)
    return path


def test_child_that_is_killed_goes_on(worker, tmp_path, capsys):
    folder = tmp_path / "learner"
    child = Child(str(worker), ["new", str(folder)], ["again", str(folder)], folder)
    wait_until(lambda: starts(folder) == ["new"])
    assert not child.finished()
    assert os.getpriority(os.PRIO_PROCESS, child.process.pid) == os.getpriority(os.PRIO_PROCESS, 0) + 10
    child.process.kill()
    child.process.wait()
    assert not child.finished() and "the learner was ended by signal 9 and is started again" in capsys.readouterr().err
    wait_until(lambda: starts(folder) == ["new", "again"])
    (folder / "enough").touch()
    wait_until(child.finished)
    child.end()  # of one that has ended
    assert not (folder / "saved").exists()


def test_child_that_says_why_is_heard(worker, tmp_path):
    folder = tmp_path / "learner"
    child = Child(str(worker), ["says", str(folder)], [], folder)
    child.process.wait()
    with pytest.raises(SystemExit, match=r"the learner ended: --demos: there are none \(see .*learner.log\)"):
        child.finished()
    child = Child(str(worker), [], ["full", str(folder)], folder)
    child.process.wait()
    with pytest.raises(SystemExit, match=rf"then go on with --resume {tmp_path} \(see"):  # the parent, not the child
        child.finished()


def test_child_saves_when_it_is_asked_to_end(worker, tmp_path):
    folder = tmp_path / "learner"
    child = Child(str(worker), ["new", str(folder)], [], folder)
    wait_until(lambda: starts(folder))
    child.end()
    assert (folder / "saved").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a child does not learn that its parent was killed")
def test_child_saves_when_its_parent_is_killed_and_the_next_one_waits_for_it(worker, tmp_path, capsys):
    folder = tmp_path / "learner"
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(REPO), str(worker), str(folder)])
    wait_until(lambda: starts(folder))
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    child = Child(str(worker), ["new", str(folder)], ["again", str(folder)], folder)
    assert (folder / "saved").exists() and starts(folder)[:1] == ["new"]
    assert "waiting for the learner of an earlier start, which has not ended" in capsys.readouterr().err
    wait_until(lambda: starts(folder) == ["new", "again"])
    child.end()


def test_a_drive_that_knows_no_locks(tmp_path, monkeypatch, capsys):
    def lockf(*_) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(setup.fcntl, "lockf", lockf)
    with setup.hold(tmp_path / "run.lock", "taken"):
        assert (tmp_path / "run.lock").read_text() == str(os.getpid())
    assert "run.lock: No locks available; see to it that no second process works there" in capsys.readouterr().err
