"""common/child.py: a process beside this one."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO, wait_until

from common.child import Child

SCRIPT = """
import pathlib, signal, sys, time

folder = pathlib.Path(sys.argv[2])
folder.mkdir(exist_ok=True)
(folder / "args.json").touch()
with (folder / "starts").open("a") as file:
    file.write(sys.argv[1] + "\\n")
if sys.argv[1] == "says":
    raise SystemExit("worker.py: --demos: there are none")


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
from common.child import Child

folder = pathlib.Path(sys.argv[3])
Child(sys.argv[2], ["new", str(folder)], ["again", str(folder)], folder)
time.sleep(60)
"""


def starts(folder: Path) -> list[str]:
    return (folder / "starts").read_text().split() if (folder / "starts").exists() else []


@pytest.fixture
def script(tmp_path) -> Path:
    path = tmp_path / "worker.py"
    path.write_text(SCRIPT)
    return path


def test_child_that_is_killed_goes_on(script, tmp_path, capsys):
    folder = tmp_path / "learner"
    child = Child(str(script), ["new", str(folder)], ["again", str(folder)], folder)
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


def test_child_that_says_why_is_heard(script, tmp_path):
    folder = tmp_path / "learner"
    child = Child(str(script), ["says", str(folder)], [], folder)
    child.process.wait()
    with pytest.raises(SystemExit, match=r"the learner ended: --demos: there are none \(see .*learner.log\)"):
        child.finished()


def test_child_saves_when_it_is_asked_to_end(script, tmp_path):
    folder = tmp_path / "learner"
    child = Child(str(script), ["new", str(folder)], [], folder)
    wait_until(lambda: starts(folder))
    child.end()
    assert (folder / "saved").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a child does not learn that its parent was killed")
def test_child_saves_when_its_parent_is_killed_and_the_next_one_waits_for_it(script, tmp_path):
    folder = tmp_path / "learner"
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(REPO), str(script), str(folder)])
    wait_until(lambda: starts(folder))
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    child = Child(str(script), ["new", str(folder)], ["again", str(folder)], folder)
    assert (folder / "saved").exists() and starts(folder)[:1] == ["new"]
    wait_until(lambda: starts(folder) == ["new", "again"])
    child.end()
