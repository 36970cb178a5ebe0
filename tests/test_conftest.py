"""The helpers of conftest.py, tried on small scripts of our own."""

import math
import os
import signal
import textwrap
from pathlib import Path

import pytest
from conftest import popen_script, read_csv, read_scalars, run_script, wait_until


def write_script(folder: Path, source: str) -> str:
    path = folder / "script.py"
    path.write_text(textwrap.dedent(source))
    return str(path)


def test_run_script_runs_as_a_user_does(tmp_path, monkeypatch):
    monkeypatch.setenv("DISPLAY", ":0")
    script = write_script(
        tmp_path,
        """
        import os, sys
        os.makedirs("runs/a"); os.makedirs("runs/b"); os.utime("runs/a", (1, 1))
        print(sys.argv[1:], "DISPLAY" in os.environ, repr(os.environ["CUDA_VISIBLE_DEVICES"]), os.environ["EXTRA"])
        print("to stderr", file=sys.stderr)
        """,
    )
    run = run_script(script, "--seed", 1, cwd=tmp_path, env={"EXTRA": "yes"})
    assert run.returncode == 0
    assert run.stdout == "['--seed', '1'] False '' yes\n"
    assert run.stderr == "to stderr\n"
    assert run.run_dir == tmp_path / "runs" / "b"


@pytest.mark.parametrize("flags", [["--run-dir", "here"], ["--run-dir=here"], ["--run_dir", "here"]])
def test_run_dir_flag_names_the_run_dir(tmp_path, flags):
    assert run_script(write_script(tmp_path, ""), *flags, cwd=tmp_path).run_dir == tmp_path / "here"


def test_failure_is_an_assertion_that_shows_the_output(tmp_path):
    script = write_script(tmp_path, "raise SystemExit('no such flag')")
    with pytest.raises(AssertionError, match="exited with 1(?s:.*)no such flag"):
        run_script(script, cwd=tmp_path)
    run = run_script(script, cwd=tmp_path, check=False)
    assert run.returncode == 1 and run.run_dir is None


def test_timeout_ends_the_script_and_its_children(tmp_path):
    script = write_script(
        tmp_path,
        """
        import pathlib, subprocess, sys, time
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        pathlib.Path("pid").write_text(str(child.pid))
        time.sleep(60)
        """,
    )
    with pytest.raises(AssertionError, match="did not end within 2 s"):
        run_script(script, cwd=tmp_path, timeout=2)
    wait_until(lambda: has_ended(int((tmp_path / "pid").read_text())), timeout=10)


def has_ended(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return not status.exists() or "State:\tZ" in status.read_text()  # a zombie has ended, nobody has waited for it


def test_popen_script_can_be_signalled(tmp_path):
    script = write_script(
        tmp_path,
        """
        import time
        try:
            print("ready")
            while True:
                time.sleep(0.1)  # a signal that comes just before a sleep does not end it
        except KeyboardInterrupt:
            print("saved")
        """,
    )
    with popen_script(script, cwd=tmp_path) as process:
        wait_until(lambda: "ready" in process.stdout_path.read_text())
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    assert process.stdout_path.read_text() == "ready\nsaved\n"
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)


def test_wait_until_gives_up():
    with pytest.raises(AssertionError, match="in vain"):
        wait_until(lambda: False, timeout=0.1)


def test_read_csv(tmp_path):
    (tmp_path / "eval.csv").write_text("global_step,eval/success_rate\n100,0.5\n200,\n")
    columns = read_csv(tmp_path, "eval.csv")
    assert columns["global_step"] == [100.0, 200.0]
    assert columns["eval/success_rate"][0] == 0.5 and math.isnan(columns["eval/success_rate"][1])


def test_read_scalars(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(20_000):  # more than TensorBoard keeps unless told to
            writer.add_scalar("losses/critic_loss", step / 2, step)
    scalars = read_scalars(tmp_path)
    assert len(scalars["losses/critic_loss"]) == 20_000
    assert scalars["losses/critic_loss"][7] == (7, 3.5)
