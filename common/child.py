"""A process beside this one: at a lower priority, started again when it is killed, ended when this one ends.

child = Child(script, new=["--run-dir", "run/learner"], again=["--resume", "run/learner"], folder=Path("run/learner"))
while not child.finished(): ...
child.end()
"""

import ctypes
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

from common.setup import fail

LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


class Child:
    """`python SCRIPT` with the flags `new`, or `again` once there is a run in `folder`; its output goes to a file."""

    def __init__(self, script: str, new: list[str], again: list[str], folder: Path):
        self.script, self.new, self.again, self.folder = script, new, again, folder
        self.log = folder.with_suffix(".log")
        self.lock = folder.with_suffix(".lock")
        self.start()

    def start(self) -> None:
        """Waits for one whose parent was killed, and which may still be saving: it holds the lock while it lives."""
        with self.log.open("ab") as log, self.lock.open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            flags = self.again if (self.folder / "args.json").exists() else self.new
            self.process = subprocess.Popen(
                [sys.executable, os.path.abspath(self.script), *flags],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                pass_fds=[lock.fileno()],
                preexec_fn=end_with_parent,
                start_new_session=True,
            )

    def finished(self) -> bool:
        """Whether it has ended well. Starts it again if it was killed.

        Exits with its last line when it has said why it cannot go on.
        """
        code = self.process.poll()
        if code is None or code == 0:
            return code == 0
        if code > 0:
            last = self.log.read_text(errors="replace").strip().splitlines()[-1]
            fail(f"the {self.folder.name} ended: {last.partition('.py: ')[2] or last} (see {self.log})")
        print(f"the {self.folder.name} was ended by signal {-code} and is started again", file=sys.stderr, flush=True)
        self.start()
        return False

    def end(self) -> None:
        """Asks it to end, and waits until it has saved and done so."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.process.wait()


def end_with_parent() -> None:
    """In the child, before it runs: a lower priority, and SIGTERM when its parent dies (Linux)."""
    os.nice(10)
    if LIBC:
        LIBC.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
