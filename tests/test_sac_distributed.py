"""sac_state_sim.py as learner and actors on this machine: nothing lost, nothing doubled, whoever is killed."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import time
from pathlib import Path

import numpy as np
import probe_envs
import pytest
import torch
import zmq
import zmq.auth
from conftest import popen_script, read_csv, wait_until
from forked import popen_forked, run_forked
from gymnasium import spaces

from sac_state_sim import PROTOCOL, Agent, Args

SCRIPT = "sac_state_sim.py"
TASKS = {"PYTHONPATH": str(Path(probe_envs.__file__).parent)}
WIDTH = 4 + 3 + 1 + 4 + 1  # of a row of Point-v0
TINY = "--env-id probe_envs:Point-v0 --demos 0 --threads 1 --hidden-dims 32 32 --batch-size 32 --utd-ratio 1"
TINY += " --policy-delay 2 --learning-starts 50 --log-every 50 --save-every 100 --eval-every 100000"
TINY += " --final-eval-episodes 1 --no-capture-video --publish-every 20 --actor-ahead 40"


def free_port() -> int:
    """A port with a free one above it."""
    while True:
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            with contextlib.suppress(OSError):
                other.bind(("127.0.0.1", one.getsockname()[1] + 1))
                return one.getsockname()[1]


class Site:
    """A folder with one learner, its port, and as many actors as a test starts."""

    def __init__(self, cwd: Path, *flags: object):
        self.cwd, self.port = cwd, free_port()
        self.flags = [*TINY.split(), "--port", self.port, *flags]

    def learner(self, *flags: object, start=popen_script):
        return start(SCRIPT, *self.flags, "--role", "learner", "--run-dir", "learner", *flags, cwd=self.cwd, env=TASKS)

    def actor(self, name: str = "actor", *flags: object, start=popen_script):
        return start(SCRIPT, *self.flags, "--role", "actor", "--run-dir", name, *flags, cwd=self.cwd, env=TASKS)

    def resume(self, name: str, *flags: object, start=popen_script):
        return start(SCRIPT, "--resume", name, *flags, cwd=self.cwd, env=TASKS)

    def state(self) -> dict:
        """The learner's newest checkpoint; of a running learner it may be away for a moment, between two renames."""
        wait_until((self.cwd / "learner" / "checkpoint.pt").exists, timeout=5)
        try:
            return torch.load(self.cwd / "learner" / "checkpoint.pt", weights_only=True)
        except FileNotFoundError:
            return self.state()

    def step(self) -> int:
        """Where the learner's log stands."""
        with contextlib.suppress(FileNotFoundError, IndexError):
            return int(read_csv(self.cwd / "learner", "train.csv")["global_step"][-1])
        return 0

    def journal(self, name: str = "actor") -> np.ndarray:
        """All whole rows that an actor has written."""
        data = np.fromfile(self.cwd / name / "transitions.f32", np.float32)
        return data[: len(data) // WIDTH * WIDTH].reshape(-1, WIDTH)


def finish(*processes, timeout: float = 120) -> None:
    """Waits for processes that must end well."""
    for process in processes:
        try:
            code = process.wait(timeout)
        except Exception as error:
            raise AssertionError(process.stderr_path.read_text()[-3000:]) from error
        assert code == 0, process.stderr_path.read_text()[-3000:]


def assert_each_row_once(site: Site, *actors: str) -> None:
    """Every row that the learner says it holds stands once in its buffer, in each actor's order; nothing else does."""
    state = site.state()
    buffer, held = state["buffer"]["rows"].numpy(), state["progress"]["held"]
    names = {(site.cwd / actor / "actor_name").read_text().strip(): actor for actor in actors}
    assert held.keys() == names.keys()
    assert len(buffer) == state["buffer"]["total"] == sum(held.values()) == state["progress"]["global_step"]
    place = {row.tobytes(): number for number, row in enumerate(buffer)}
    assert len(place) == len(buffer)  # none doubled
    for name, count in held.items():
        journal = site.journal(names[name])
        assert len(journal) >= count > 0
        places = [place.get(row.tobytes()) for row in journal[:count]]
        assert None not in places  # none lost
        assert places == sorted(places)


def updates(site: Site) -> tuple[int, int]:
    """Critic updates made, and asked for by the ratio."""
    state, args = site.state(), json.loads((site.cwd / "learner" / "args.json").read_text())
    steps = state["progress"]["global_step"] - args["learning_starts"]
    return state["agent"]["critic_updates"], args["utd_ratio"] * steps


# --- Learner and actors -----------------------------------------------------------------------------------------------
def test_learner_and_actor_to_the_end(tmp_path):
    """All rows, the exact ratio, and an actor that follows the learner's policy."""
    site = Site(tmp_path, "--std-parameterization", "fixed", "--fixed-std", 1e-3, "--utd-ratio", 3, "--actor-lr", 1e-6)
    with site.learner("--total-timesteps", 1500) as learner, site.actor("actor", "--seed", 5) as actor:
        finish(learner, actor)
    assert_each_row_once(site, "actor")
    made, asked = updates(site)
    assert made == asked
    assert site.state()["progress"]["global_step"] >= 1500
    args = json.loads((tmp_path / "learner" / "args.json").read_text()) | {"hidden_dims": (32, 32)}
    agent = Agent(spaces.Box(-1, 1, (4,)), spaces.Box(-1, 1, (3,)), Args(**args), torch.device("cpu"))
    agent.load_state_dict(site.state()["agent"])
    rows = site.journal()[: site.state()["progress"]["global_step"]]
    agent.mean_actor = agent.actor  # the one that acts
    distance = [np.abs(agent.act(row[:4], deterministic=True) - row[4:7]).mean() for row in rows]
    assert np.mean(distance[:40]) > 0.3  # random actions at first
    # At last those of the learner's policy, which hardly moves. On a busy machine the first policy comes late: the
    # subscription needs a second.
    assert np.mean(distance[-40:]) < 0.2
    for word in ("last: ", "best: "):
        assert word in learner.stdout_path.read_text()
    assert (tmp_path / "learner" / "curve.png").exists()


def test_two_actors(tmp_path):
    site = Site(tmp_path, "--total-timesteps", 800)
    with site.actor("one") as one, site.actor("two") as two:
        for journal in (tmp_path / name / "transitions.f32" for name in ("one", "two")):
            wait_until(lambda file=journal: file.exists() and file.stat().st_size, timeout=60)
        with site.learner() as learner:  # neither comes too late for it
            finish(learner, one, two)
    assert_each_row_once(site, "one", "two")
    assert min(site.state()["progress"]["held"].values()) > 20
    assert not np.array_equal(site.journal("one")[0], site.journal("two")[0])  # they explore on their own


def test_learner_and_actor_are_killed_and_resumed(tmp_path):
    """kill -9 of the learner, then of the actor, then of both, each resumed."""
    site = Site(tmp_path, "--total-timesteps", 2500, "--save-every", 150)
    with contextlib.ExitStack() as stack:
        learner, actor = stack.enter_context(site.learner()), stack.enter_context(site.actor())
        for goal, killed in ((500, "learner"), (1000, "actor"), (1500, "both")):
            wait_until(lambda goal=goal: site.step() >= goal)
            held, written = site.state()["progress"]["held"], len(site.journal())
            if killed != "actor":
                learner.kill()
                learner.wait()
                learner = stack.enter_context(site.resume("learner"))
            if killed != "learner":
                actor.kill()
                actor.wait()
                actor = stack.enter_context(site.resume("actor"))
            assert sum(held.values()) >= goal - 400  # a save, and what an actor had waiting
        finish(learner, actor)
    assert len(site.journal()) > written
    assert_each_row_once(site, "actor")
    made, asked = updates(site)
    assert made == asked


def test_ctrl_c_on_either_side(tmp_path):
    site = Site(tmp_path, "--total-timesteps", 1200, "--save-every", 10**6)
    with contextlib.ExitStack() as stack:
        learner, actor = stack.enter_context(site.learner()), stack.enter_context(site.actor())
        for name, goal in (("learner", 300), ("actor", 600)):
            process = learner if name == "learner" else actor
            wait_until(lambda goal=goal: site.step() >= goal)
            os.kill(process.pid, signal.SIGINT)
            assert process.wait(20) not in (0, None)
            errors = process.stderr_path.read_text()
            assert f"--resume {name}" in errors and "Traceback" not in errors
            if name == "learner":
                assert site.state()["progress"]["global_step"] >= 300
            resumed = stack.enter_context(site.resume(name))
            learner, actor = (resumed, actor) if name == "learner" else (learner, resumed)
        finish(learner, actor)
    assert_each_row_once(site, "actor")


def test_actor_gives_up_when_the_learner_stays_away(tmp_path):
    """One line; its rows are kept, and a learner that comes back gets them all."""
    site = Site(tmp_path, "--total-timesteps", 800, "--learner-timeout-s", 3)
    with site.learner() as learner, site.actor() as actor:
        wait_until(lambda: site.step() >= 200)
        learner.kill()
        assert actor.wait(20) not in (0, None)
    errors = actor.stderr_path.read_text()
    assert "Traceback" not in errors and f"127.0.0.1:{site.port}" in errors and "--learner" in errors
    with site.resume("learner") as learner, site.resume("actor", "--learner-timeout-s", 60) as actor:
        finish(learner, actor)
    assert_each_row_once(site, "actor")


# --- The wire, with this test as the actor ----------------------------------------------------------------------------
@contextlib.contextmanager
def talk(port: int):
    """A function (frames) -> reply, as an actor talks to the learner."""
    dealer = zmq.Context.instance().socket(zmq.DEALER)
    dealer.linger = 0
    dealer.connect(f"tcp://127.0.0.1:{port}")

    def ask(*frames: bytes) -> dict:
        dealer.send_multipart(frames)
        assert dealer.poll(20_000), "the learner is silent"
        return json.loads(dealer.recv())

    yield ask
    dealer.close()


def numbered(first: int, count: int) -> np.ndarray:
    """Rows (count, WIDTH), each with its number, small enough to learn from."""
    rows = np.random.default_rng(0).uniform(-1, 1, (10_000, WIDTH)).astype(np.float32)[first : first + count]
    rows[:, -1] = 0
    rows[:, 0] = np.arange(first, first + count) / 10_000
    return rows


def message(first: int, rows: np.ndarray, **changes) -> tuple[bytes, bytes]:
    header = {"protocol": PROTOCOL, "actor": "test", "first": first, "count": len(rows)} | changes
    return json.dumps(header).encode(), rows.tobytes()


def flags_digest(site: Site) -> dict:
    """What else a header carries; taken from a real actor's first message."""
    router = zmq.Context.instance().socket(zmq.ROUTER)
    router.linger = 0
    router.bind(f"tcp://127.0.0.1:{site.port}")
    with site.actor("spy", start=popen_forked):
        assert router.poll(20_000)
        header = json.loads(router.recv_multipart()[1])
    router.close()
    shutil.rmtree(site.cwd / "spy")
    return {key: value for key, value in header.items() if key not in ("actor", "first", "count")}


def test_rows_are_numbered(tmp_path):
    """Repeated, overlapping and early messages: the learner takes every row once, in order."""
    site = Site(tmp_path, "--total-timesteps", 300)
    extra = flags_digest(site)
    with site.learner(start=popen_forked) as learner, talk(site.port) as ask:
        for first, count, held in (
            (0, 0, 0),  # a greeting
            (0, 30, 30),
            (0, 30, 30),  # repeated
            (10, 40, 50),  # overlapping
            (90, 10, 50),  # too early: rows 50 to 89 are missing
            (20, 10, 50),  # old
            (50, 150, 200),
            (200, 100, 300),
        ):
            assert ask(*message(first, numbered(first, count), **extra)) == {"held": held}
        learner.join(60)
        assert learner.exitcode == 0, learner.stderr_path.read_text()
    assert np.array_equal(site.state()["buffer"]["rows"].numpy(), numbered(0, 300))
    made, asked = updates(site)
    assert made == asked == 250


@pytest.mark.timeout(120)
def test_malformed_messages_do_not_kill_the_learner(tmp_path):
    site = Site(tmp_path, "--total-timesteps", 200)
    rows, extra = numbered(0, 10), flags_digest(site)
    nan, infinite = rows.copy(), rows.copy()
    nan[3, 2], infinite[0, 0] = np.nan, np.inf
    header, data = message(0, rows, **extra)
    hostile = [
        (b"",),
        (b"", b""),
        (b"junk", data),
        (b"\xff\xfe", data),
        (b"[" * 100_000, data),
        (b"[]", data),
        (b"1", data),
        (b"{}", data),
        (b"null", data),
        (header,),
        (header, data[:-1]),
        (header, data[:-4]),
        (header, b""),
        (header, data + data),
        message(0, nan, **extra),
        message(0, infinite, **extra),
        message(0, rows, **extra | {"protocol": "sac-rows-0"}),
        message(0, rows, **extra, count="x"),
        message(0, rows, **extra, count=11),
        message(0, rows, **extra, count=-1),
        message(0, rows, **extra, count=10**30),
        message(None, rows, **extra),
        message(-5, rows, **extra),
        message(float("inf"), rows, **extra),
        message(float("nan"), rows, **extra),
    ]
    with site.learner(start=popen_forked) as learner, talk(site.port) as ask:
        for frames in hostile:
            with talk(site.port) as stranger:
                assert "error" in stranger(*frames), frames[0][:80]
        with socket.create_connection(("127.0.0.1", site.port)) as raw:
            raw.sendall(os.urandom(1000))
        assert ask(*message(0, numbered(0, 200), **extra)) == {"held": 200}
        learner.join(60)
        assert learner.exitcode == 0, learner.stderr_path.read_text()
    assert np.array_equal(site.state()["buffer"]["rows"].numpy(), numbered(0, 200))
    assert site.state()["progress"]["held"] == {"test": 200}


@contextlib.contextmanager
def versions(port: int):
    """A function () -> number of critic updates in the newest published policy."""
    subscriber = zmq.Context.instance().socket(zmq.SUB)
    subscriber.linger, subscriber.conflate = 0, True
    subscriber.connect(f"tcp://127.0.0.1:{port + 1}")
    subscriber.subscribe(b"")
    newest = [0]

    def version() -> int:
        if subscriber.poll(0):
            newest[0] = json.loads(subscriber.recv().partition(b"\n")[0])["version"]
        return newest[0]

    yield version
    subscriber.close()


def test_a_paced_learner_waits_and_a_free_one_goes_on(tmp_path):
    seen = {}
    for flag in ("--paced", "--no-paced"):
        site = Site(tmp_path / flag, "--total-timesteps", 1000, flag)
        extra = flags_digest(site)
        with site.learner(start=popen_forked), talk(site.port) as ask, versions(site.port) as version:
            ask(*message(0, numbered(0, 50), **extra))
            for first in range(50, 150, 10):  # the learner publishes, once the subscriber has joined
                time.sleep(0.05)
                ask(*message(first, numbered(first, 10), **extra))
            if flag == "--no-paced":
                wait_until(lambda version=version: version() >= 300)
            else:
                wait_until(lambda version=version: version() >= 80)
                time.sleep(1)
            seen[flag] = version()
    assert seen["--paced"] <= 100 < 300 <= seen["--no-paced"]


# --- Flags that do not fit --------------------------------------------------------------------------------------------
def actor_error(site: Site, *flags: object) -> str:
    """The one line of an actor that must give up."""
    with site.actor("wrong", *flags, start=popen_forked) as actor:
        actor.join(90)  # a loaded machine starts slowly
        code = actor.exitcode  # None: it hangs, and is killed on the way out
    errors = actor.stderr_path.read_text()
    assert code not in (0, None), errors
    assert "Traceback" not in errors, errors
    lines = [line for line in re.split("[\r\n]", errors) if line.strip() and "step/s]" not in line]
    assert len(lines) == 1, errors
    (error,) = lines
    return error


@pytest.mark.parametrize(
    "flags",
    [
        "--hidden-dims 16 16",
        "--activation tanh",
        "--no-normalize-observations",
        "--env-id probe_envs:OtherPoint-v0",
        "--frame-stack 2",
    ],
)
def test_an_actor_with_other_flags_is_told(tmp_path, flags):
    site = Site(tmp_path, "--total-timesteps", 10**6)
    with site.learner(start=popen_forked) as learner:
        error = actor_error(site, *flags.split())
        assert "same" in error and "flags" in error or flags.split()[0] in error
        assert learner.exitcode is None


def test_a_port_in_use(tmp_path):
    site = Site(tmp_path)
    with socket.socket() as other:
        other.bind(("127.0.0.1", site.port))
        other.listen()
        flags = (*site.flags, "--role", "learner", "--run-dir", "learner")
        result = run_forked(SCRIPT, *flags, cwd=tmp_path, env=TASKS, check=False, timeout=20)
    assert result.returncode not in (0, None)
    assert f"--port {site.port}" in result.stderr and "Traceback" not in result.stderr


# --- Keys -------------------------------------------------------------------------------------------------------------
def test_curve_keys(tmp_path):
    """The right keys work; an actor with others, or none, gets nothing in and gives up with a clear line."""
    site, wrong_keys = Site(tmp_path, "--total-timesteps", 300), tmp_path / "wrong_keys"
    wrong_keys.mkdir()
    for name in ("learner", "actor"):
        zmq.auth.create_certificates(wrong_keys, name)
    with site.learner("--curve-keys", "keys") as learner:
        wait_until((tmp_path / "keys" / "actor.key_secret").exists)
        secret = tmp_path / "keys" / "actor.key_secret"
        wait_until(lambda: secret.stat().st_mode & 0o077 == 0 == (tmp_path / "keys").stat().st_mode & 0o077)
        # an intruder who knows the learner's public key, but whose own key the learner does not know
        shutil.copytree(wrong_keys, tmp_path / "intruder")
        shutil.copy(tmp_path / "keys" / "learner.key", tmp_path / "intruder")
        for flags in ((), ("--curve-keys", "wrong_keys"), ("--curve-keys", "intruder")):
            error = actor_error(site, *flags, "--learner-timeout-s", 1)
            assert f"no learner at 127.0.0.1:{site.port}" in error
            shutil.rmtree(tmp_path / "wrong")
        assert "--curve-keys nowhere" in actor_error(site, "--curve-keys", "nowhere")
        with site.actor("actor", "--curve-keys", "keys") as actor:
            finish(learner, actor)
    assert_each_row_once(site, "actor")  # of the right actor alone
