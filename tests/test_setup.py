"""common/setup.py: flags, as sac_state_sim.py has them, and what PyTorch is set up with."""

import dataclasses
import json
import re
import typing
from dataclasses import dataclass

import pytest
import torch

import sac_state_sim
from common import setup
from common.setup import RunArgs, check_memory, help_text, parse, set_up_torch
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
        ("--lr inf", "--lr inf"),
        ("--lr -1", "--lr -1"),
        ("--hidden-dims 0", "--hidden-dims"),
        ("--record-dataset no_version!", "--record-dataset no_version!"),
        ("--resume nowhere", "--resume nowhere"),
        ("--eval-only nowhere", "--eval-only nowhere"),
    ],
)
def test_values_out_of_range(flags, words):
    error = refused(*flags.split())
    for word in words.split():
        assert word in error


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
OTHER = {"std_parameterization": "fixed", "activation": "tanh", "hidden_dims": (7,), "role": "learner"}


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
    more = "--total-timesteps 77 --threads 1 --eval-every 7 --no-capture-video --amp --address ::1"
    args = parsed(option, tmp_path, *more.split())
    changes = {"total_timesteps": 77, "threads": 1, "eval_every": 7, "capture_video": False, "amp": True}
    changes["address"] = "::1"
    assert args.run_dir == str(tmp_path)
    cleared = {"run_dir": None, "resume": None, "eval_only": None}
    assert dataclasses.replace(saved, **changes) == dataclasses.replace(args, **cleared)


def test_a_dataset_is_recorded_when_it_is_asked_for(tmp_path, monkeypatch):
    """A finished run has recorded its dataset; that it is there does not keep the run from being evaluated again."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.setattr("minari.list_local_datasets", lambda: {"point/mine-v0": {}})
    (tmp_path / "args.json").write_text(json.dumps(dataclasses.asdict(Args()) | {"record_dataset": "point/mine-v0"}))
    assert parsed("--eval-only", tmp_path).record_dataset is None
    assert "exists" in refused("--eval-only", tmp_path, "--record-dataset", "point/mine-v0")


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


# --- PyTorch ----------------------------------------------------------------------------------------------------------
CPUS = [
    ("flags : fpu avx2 avx512f avx512_bf16", True),
    ("flags : fpu amx_bf16 amx_tile", True),
    ("Features : fp asimd bf16", True),
    ("flags : fpu avx2 avx512f", False),
]


@pytest.mark.parametrize(("cpuinfo", "fast"), CPUS)
def test_amp_only_where_it_is_fast(monkeypatch, cpuinfo, fast):
    """R10: a CPU that would emulate bfloat16 is named, instead of ten times the time in silence."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(setup.Path, "read_text", lambda self: cpuinfo)
    threads = torch.get_num_threads()
    try:
        assert set_up_torch(1, amp=False).type == "cpu"
        if fast:
            assert set_up_torch(1, amp=True).type == "cpu"
        else:
            with pytest.raises(SystemExit, match="--amp: this CPU has no bfloat16"):
                set_up_torch(1, amp=True)
    finally:
        torch.set_num_threads(threads)


def test_memory_is_announced_and_refused_in_one_line(monkeypatch, capsys):
    """S5: before it is taken; what is small is not mentioned."""
    monkeypatch.setattr(setup, "free_memory", lambda: 5e9)
    check_memory(10**8, "buffer", "smaller")
    assert capsys.readouterr().out == ""
    check_memory(4 * 10**9, "buffer", "smaller")
    assert capsys.readouterr().out == "buffer: 4.0 GB\n"
    with pytest.raises(SystemExit, match=r"buffer needs 6.0 GB, 5.0 GB are free; give a smaller --buffer-size"):
        check_memory(6 * 10**9, "buffer", "give a smaller --buffer-size")


def test_free_memory_is_a_number_of_bytes():
    assert 1e7 < setup.free_memory() < 1e14 or setup.free_memory() == float("inf")
