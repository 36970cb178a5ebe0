"""common/link.py: records arrive once, whoever is killed; then sac_state_sim.py as learner and actors."""

import contextlib
import json
import os
import shutil
import signal
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import zmq
import zmq.auth
from conftest import free_port, one_line, read_checkpoint, read_csv, wait_until
from forked import popen_forked
from state_runs import SCRIPT, TASKS, TINY, script, stored

from common import link
from common.link import PROTOCOL, RECORDS_PER_FILE, Actor, Journal, Learner, parse_address
from common.tensors import check_steps, step_type
from sac_state_sim import Agent, Args

HELLO = {"--env-id": "Task-v0", "--hidden-dims": (256, 256)}
SIZE = 12  # bytes of a record in these tests


def record(number: int) -> bytes:
    return number.to_bytes(SIZE, "big")


def records(first: int, count: int) -> bytes:
    return b"".join(record(number) for number in range(first, first + count))


# --- Addresses --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("127.0.0.1", ("127.0.0.1", 5588)),
        ("127.0.0.1:7000", ("127.0.0.1", 7000)),
        ("tcp://127.0.0.1:7000", ("127.0.0.1", 7000)),
        ("tcp://127.0.0.1", ("127.0.0.1", 5588)),
        ("::1", ("::1", 5588)),
        ("[::1]", ("::1", 5588)),
        ("[::1]:7000", ("::1", 7000)),
        ("tcp://[::1]:7000", ("::1", 7000)),
        ("192.168.7.9:7000", ("192.168.7.9", 7000)),
    ],
)
def test_an_address_is_an_address(address, expected):
    """R6"""
    assert parse_address(address) == expected


def test_names_are_looked_up():
    ip, port = parse_address("localhost:7000")
    assert ip in ("127.0.0.1", "::1") and port == 7000


def test_a_name_with_addresses_of_both_kinds(monkeypatch):
    """A learner at 0.0.0.0 takes no IPv6."""
    found = [(socket.AF_INET6, 1, 6, "", ("fd00::9", 7000, 0, 0)), (socket.AF_INET, 1, 6, "", ("192.0.2.9", 7000))]
    monkeypatch.setattr(link.socket, "getaddrinfo", lambda *_, **__: found)
    assert parse_address("robot:7000") == ("192.0.2.9", 7000)
    del found[1]
    assert parse_address("robot:7000") == ("fd00::9", 7000)
    interface = socket.if_nameindex()[0]
    found[0] = (socket.AF_INET6, 1, 6, "", ("fe80::9", 7000, 0, interface[0]))  # as of fe80::9%lo
    assert parse_address("robot:7000") == (f"fe80::9%{interface[1]}", 7000)


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1:", "127.0.0.1:x", "127.0.0.1:0", "127.0.0.1:65535", "127.0.0.1:99999", "no.such.host.invalid", "a b"],
)
def test_addresses_that_are_none(address):
    """R6: a misspelled host or port is named at once, not waited for."""
    with pytest.raises(SystemExit, match="--address .*; give HOST:PORT, such as 127.0.0.1:5588") as error:
        parse_address(address)
    assert f"--address {address}: " in error.value.code


# --- Journal ----------------------------------------------------------------------------------------------------------
def test_journal_survives_a_kill_in_any_byte(tmp_path):
    journal = Journal(tmp_path / "journal", SIZE)
    for number in range(RECORDS_PER_FILE + 5):
        journal.append(record(number))
    newest = max((tmp_path / "journal").iterdir())
    for cut in range(SIZE):
        newest.write_bytes(newest.read_bytes()[: 5 * SIZE] + record(99)[:cut])
        journal = Journal(tmp_path / "journal", SIZE)
        assert journal.written == RECORDS_PER_FILE + 5
        assert journal.read(RECORDS_PER_FILE + 3, 9) == records(RECORDS_PER_FILE + 3, 2)
    journal.append(record(RECORDS_PER_FILE + 5))
    assert journal.read(RECORDS_PER_FILE - 2, 9) == records(RECORDS_PER_FILE - 2, 2)  # to the end of a file
    assert journal.read(RECORDS_PER_FILE, 9) == records(RECORDS_PER_FILE, 6)


def test_journal_drops_what_is_saved_and_keeps_its_count(tmp_path):
    journal = Journal(tmp_path / "journal", SIZE)
    for number in range(3 * RECORDS_PER_FILE):
        journal.append(record(number))
    journal.drop(2 * RECORDS_PER_FILE - 1)
    assert journal.first == RECORDS_PER_FILE
    journal.drop(3 * RECORDS_PER_FILE)
    assert len(list((tmp_path / "journal").iterdir())) == 1  # never grows: the newest file is left
    for _ in range(2):
        journal = Journal(tmp_path / "journal", SIZE)
        assert (journal.first, journal.written) == (2 * RECORDS_PER_FILE, 3 * RECORDS_PER_FILE)
    journal.append(record(7))
    assert journal.read(3 * RECORDS_PER_FILE, 5) == record(7)


# --- Learner and actor in one process ---------------------------------------------------------------------------------
@contextlib.contextmanager
def learner_at(port: int, check=lambda records: None, hello: dict = HELLO):
    learner = Learner(f"127.0.0.1:{port}", None, hello, SIZE, check)
    try:
        yield learner
    finally:
        learner.router.close(0)
        learner.publisher.close(0)
        wait_until(lambda: is_free(port) and is_free(port + 1))  # ZeroMQ closes in a thread of its own


def is_free(port: int) -> bool:
    with socket.socket() as sock, contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", port))
        return True
    return False


@contextlib.contextmanager
def actor_at(port: int, folder: Path, **options):
    folder.mkdir(exist_ok=True)
    actor = Actor(f"127.0.0.1:{port}", None, options.pop("hello", HELLO), SIZE, folder, **options)
    try:
        yield actor
    finally:
        actor.dealer.close(0)
        actor.subscriber.close(0)


def taken(learner: Learner, actor: Actor, count: int, most: float = float("inf")) -> list[bytes]:
    """What the learner receives until it has `count` records."""
    new, deadline = [], time.monotonic() + 60
    while len(new) < count:
        assert time.monotonic() < deadline, new
        actor.exchange(0)
        new += [data for _, data in learner.receive(20, most)]
    return new


def test_records_arrive_once_and_in_order_whoever_restarts(tmp_path):
    port = free_port()
    with actor_at(port, tmp_path / "actor") as actor:
        for number in range(7):
            actor.send(record(number))  # before there is a learner
        with learner_at(port) as learner:
            assert taken(learner, actor, 7) == [record(number) for number in range(7)]
            checkpoint = learner.state_dict()
            learner.saved()
            for number in range(7, 12):
                actor.send(record(number))
            assert len(taken(learner, actor, 5)) == 5  # lost with this learner
        with learner_at(port) as learner:  # from its checkpoint
            learner.load_state_dict(checkpoint)
            assert taken(learner, actor, 5) == [record(number) for number in range(7, 12)]
            name = actor.name
    with actor_at(port, tmp_path / "actor") as actor, learner_at(port) as learner:
        learner.load_state_dict({"held": {name: 12}})
        assert actor.name == name and actor.journal.written == 12
        actor.send(record(12))
        assert taken(learner, actor, 1) == [record(12)]
        assert learner.held == {name: 13}


def test_a_learner_takes_no_more_than_it_asks_for(tmp_path):
    """R8: the rest stays with the actor."""
    port = free_port()
    with actor_at(port, tmp_path / "one") as one, actor_at(port, tmp_path / "two") as two, learner_at(port) as learner:
        for number in range(40):
            one.send(record(number))
            two.send(record(100 + number))
        new, deadline = [], time.monotonic() + 60
        while len(new) < 50 and time.monotonic() < deadline:
            one.exchange(0)
            two.exchange(0)
            new += learner.receive(20, 50 - len(new))
        assert len(new) == sum(learner.held.values()) == 50
        for actor, first in ((one, 0), (two, 100)):
            mine = [data for name, data in new if name == actor.name]
            assert mine == [record(first + number) for number in range(len(mine))]
            assert learner.held[actor.name] == len(mine) < 50


def test_what_is_saved_is_dropped_by_the_actor(tmp_path):
    port, count = free_port(), 3 * RECORDS_PER_FILE
    with actor_at(port, tmp_path / "actor") as actor, learner_at(port) as learner:
        for number in range(count):
            actor.journal.append(record(number))
        assert taken(learner, actor, count)[-1] == record(count - 1)
        assert len(list((tmp_path / "actor" / "journal").iterdir())) == 3
        learner.saved()
        learner.saved()
        while actor.journal.first < 2 * RECORDS_PER_FILE:
            actor.exchange(0)
            learner.receive(20)
        assert len(list((tmp_path / "actor" / "journal").iterdir())) == 1
        learner.held.clear()  # an older checkpoint than the one that was saved
        with pytest.raises(SystemExit, match="its journal does not fit: start a new one"):
            taken(learner, actor, 1)


@pytest.mark.parametrize("catches_up", [False, True])
def test_a_journal_that_lost_records_is_not_gone_on_with(tmp_path, catches_up):
    """By a power cut, or an older copy of the folder: what follows would be taken for what the learner has."""
    port = free_port()
    with learner_at(port) as learner:
        with actor_at(port, tmp_path / "actor") as actor:
            for number in range(10):
                actor.journal.append(record(number))
            assert len(taken(learner, actor, 10)) == 10
        (journal,) = (tmp_path / "actor" / "journal").iterdir()
        os.truncate(journal, 6 * SIZE)
        with actor_at(port, tmp_path / "actor") as actor:
            for number in range(10 * catches_up):
                actor.journal.append(record(100 + number))
            with pytest.raises(SystemExit, match="has 10 of this actor's records, its journal does not fit"):
                taken(learner, actor, 1)
        assert learner.held[actor.name] == 10


def test_checkpoint_before_the_newest_can_be_gone_on_from(tmp_path):
    """The newest may be damaged: what only that one has stays in the journals."""
    port, count = free_port(), 4 * RECORDS_PER_FILE
    with actor_at(port, tmp_path / "actor") as actor:
        for number in range(count):
            actor.journal.append(record(number))
        with learner_at(port) as learner:
            older = 2 * RECORDS_PER_FILE
            got = taken(learner, actor, older, most=older)
            learner.saved()
            checkpoint = learner.state_dict()
            got += taken(learner, actor, count - len(got))
            learner.saved()
            for _ in range(20):
                actor.exchange(20)
                learner.receive(20)
            assert actor.journal.first == older
        with learner_at(port) as learner:
            learner.load_state_dict(checkpoint)
            held = learner.held[actor.name]
            assert taken(learner, actor, count - held) == [record(number) for number in range(held, count)]


def test_an_actor_is_not_too_far_ahead(tmp_path):
    """`send` waits at the bound until the learner has taken some, or it is stopped."""
    port, asked = free_port(), []
    stop = lambda: bool(asked.append(1)) or len(asked) > 5  # noqa: E731
    with actor_at(port, tmp_path / "actor", ahead=3, stop=stop) as actor:
        for number in range(3):
            actor.send(record(number))
        assert not asked
        actor.send(record(3))
        assert len(asked) > 5
        asked.clear()
        with learner_at(port) as learner:
            reader = threading.Thread(target=lambda: [learner.receive(100) for _ in range(30)])
            reader.start()
            actor.stop = lambda: False
            actor.send(record(4))  # returns: the learner has taken enough
            reader.join()
        assert actor.journal.written - actor.held <= 3


@contextlib.contextmanager
def counted(folder: Path):
    """A learner that has one record of an actor, the actor, and how many bytes each later message brings."""
    port = free_port()
    arrived: list[int] = []
    with learner_at(port) as learner, actor_at(port, folder) as actor:
        actor.send(record(0))
        assert taken(learner, actor, 1) == [record(0)]
        read = learner.read
        learner.read = lambda frames, most: arrived.append(len(frames[1])) or read(frames, most)
        yield learner, actor, arrived


def test_a_learner_that_is_slow_to_answer_is_sent_nothing_twice(tmp_path):
    """It evaluates, or the network is slow: who asks again then sends no records, and one message is on its way."""
    with counted(tmp_path / "actor") as (learner, actor, arrived):
        for number in range(1, 6):
            actor.sent -= 3  # s, without an answer
            actor.send(record(number))
        assert taken(learner, actor, 5) == [record(number) for number in range(1, 6)]
        assert sum(arrived) == 5 * SIZE and len(arrived) > 5
        for _ in range(10):
            learner.receive(20)
            actor.exchange(20)
        assert not actor.dealer.poll(200)


def test_a_learner_that_takes_nothing_is_not_sent_the_same_again(tmp_path):
    """It has its pace to keep, and answers meanwhile: an actor's backlog waits where it is."""
    with counted(tmp_path / "actor") as (learner, actor, arrived):
        for number in range(1, 21):
            actor.send(record(number))
            learner.receive(20, most=0)
        assert sum(arrived) <= 20 * SIZE and len(arrived) > 5
        assert taken(learner, actor, 20) == [record(number) for number in range(1, 21)]


def test_an_actor_that_is_slow_to_send_has_its_turn(tmp_path):
    """What a learner has asked for it takes, also when another actor's records came first and it owes updates then."""
    port = free_port()
    with (
        actor_at(port, tmp_path / "near") as near,
        actor_at(port, tmp_path / "far") as far,
        learner_at(port) as learner,
    ):

        def all_ask(asks: bool) -> int:
            near.exchange(20)
            far.exchange(20)
            return len(learner.receive(20, asks=asks))

        wait_until(lambda: all_ask(True) or (near.takes and far.takes))
        near.send(record(0))
        wait_until(lambda: learner.receive(20))
        for number in range(20):
            far.journal.append(record(number))
        wait_until(lambda: all_ask(False))  # it has updates to make for the near one's
        assert learner.held == {near.name: 1, far.name: 20}
        for actor, number in ((near, 1), (far, 20)):
            actor.journal.append(record(number))
        wait_until(lambda: all_ask(False) or not (near.takes or far.takes))
        assert sum(all_ask(False) for _ in range(5)) == 0  # a message more at most of each
        while sum(learner.held.values()) < 23:
            all_ask(True)


def test_two_actors_of_one_name_are_noticed(tmp_path):
    """A folder that was copied: the learner would take steps of one for those of the other."""
    port = free_port()
    with learner_at(port) as learner, actor_at(port, tmp_path / "one") as one:
        one.send(record(0))
        assert taken(learner, one, 1) == [record(0)]
        shutil.copytree(tmp_path / "one", tmp_path / "two")
        with actor_at(port, tmp_path / "two") as two:
            two.send(record(1))
            assert taken(learner, two, 1) == [record(1)]
            for number in range(1, 5):
                one.send(record(number))
            assert taken(learner, one, 3) == [record(number) for number in range(2, 5)]
            with pytest.raises(SystemExit, match="has 5 of this actor's records, its journal does not fit"):
                two.send(record(2)) or taken(learner, two, 1)


def test_an_actor_gives_up_when_no_learner_answers(tmp_path):
    port = free_port()
    with actor_at(port, tmp_path / "actor", timeout_s=0.5) as actor:
        actor.send(record(0))
        time.sleep(0.6)
        with pytest.raises(SystemExit, match=f"no learner at 127.0.0.1:{port}; .* --role learner"):
            actor.send(record(1))
        assert actor.journal.written == 2  # nothing is lost


def test_a_pause_of_an_actor_is_no_silence_of_its_learner(tmp_path):
    """Also of one that was started again meanwhile, with which the answer is lost."""
    port = free_port()
    with actor_at(port, tmp_path / "actor") as actor:
        with learner_at(port) as learner:
            actor.send(record(0))
            assert taken(learner, actor, 1) == [record(0)]
            for _ in range(2):
                actor.exchange(200)
        with learner_at(port) as learner:
            for clock in ("answered", "looked", "sent"):
                setattr(actor, clock, getattr(actor, clock) - 700)
            assert taken(learner, actor, 1) == [record(0)]


def test_an_address_where_another_program_answers(tmp_path):
    """As robot_server.py does: it publishes its state, and first comes what it takes for an envelope."""
    port, context = free_port(), zmq.Context.instance()
    with (
        context.socket(zmq.ROUTER) as router,
        context.socket(zmq.PUB) as publisher,
        actor_at(port, tmp_path / "actor") as actor,
    ):
        router.bind(f"tcp://127.0.0.1:{port}")
        publisher.bind(f"tcp://127.0.0.1:{port + 1}")
        while not actor.subscriber.poll(10):
            publisher.send(b"\x82\xa1v\x02\xa2ok\xc3")  # msgpack
        assert actor.weights() is None
        actor.exchange(0)
        router.send_multipart([*router.recv_multipart(), b"no JSON"])
        with pytest.raises(SystemExit, match="the learner says: what none says; is this --address its own"):
            actor.exchange(5000)


def test_an_actor_says_that_it_waits(tmp_path, capsys):
    port = free_port()
    asked = iter([False, False, True])
    with actor_at(port, tmp_path / "actor", ahead=0, stop=lambda: next(asked)) as actor:
        actor.answered -= 11
        actor.send(record(0))
    said = capsys.readouterr().err
    assert said == f"waiting for a learner at 127.0.0.1:{port}, where none answers\n"  # once


def test_weights_reach_the_actor(tmp_path):
    port = free_port()
    with learner_at(port) as learner, actor_at(port, tmp_path / "actor") as actor:
        deadline = time.monotonic() + 30
        got = None
        while got is None and time.monotonic() < deadline:  # a subscription takes a moment
            learner.publish(5, b"five\nlines")
            time.sleep(0.02)
            got = actor.weights()
        assert got == (5, b"five\nlines")
        learner.publish(6, b"newer")
        wait_until(lambda: actor.weights() == (6, b"newer"), timeout=30)


def test_weights_do_not_queue_up_for_a_slow_network(tmp_path):
    """Its actors get the newest, not those of minutes ago; nor does the learner's memory fill with them."""
    port = free_port()
    with learner_at(port) as learner:
        slow = zmq.Context.instance().socket(zmq.SUB)
        slow.rcvhwm = 1
        slow.connect(f"tcp://127.0.0.1:{port + 1}")
        slow.subscribe(b"")
        wait_until(lambda: learner.publish(0, b"") or slow.poll(20))
        for version in range(1, 101):
            learner.publish(version, bytes(1 << 20))
        got = [json.loads(slow.recv().partition(b"\n")[0])["version"]]
        while slow.poll(2000):
            got.append(json.loads(slow.recv().partition(b"\n")[0])["version"])
        slow.close(0)
    assert got == sorted(got) and got[-1] == 100 and len(got) < 50


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="shows the timers of connections, on Linux")
def test_a_peer_that_lost_power_is_noticed(tmp_path):
    """Who waits for weights sends nothing, and would wait for ever: the system asks whether the other end is there."""

    def kept_alive() -> int:
        rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        ends = {f"{number:04X}" for number in (port, port + 1)}
        return sum(bool({row[1][-4:], row[2][-4:]} & ends) and row[3] == "01" and row[5][:2] == "02" for row in rows)

    port = free_port()
    with learner_at(port), actor_at(port, tmp_path / "actor"):
        wait_until(lambda: kept_alive() == 4, timeout=20)  # both ends of two connections


def test_the_end_reaches_an_actor_that_asks_late(tmp_path):
    """In a long reset it asks nothing, until the learner is gone. (A subscription takes a moment: hence the loop.)"""
    port = free_port()
    with actor_at(port, tmp_path / "actor") as actor:
        with learner_at(port) as learner:
            actor.send(record(0))
            wait_until(lambda: learner.publish(5, b"five") or actor.weights(), timeout=30)
            learner.end = lambda: time.sleep(2)  # its patience is over
            learner.publish(6, b"six", done=True)
        assert not actor.done
        wait_until(lambda: actor.weights() == (6, b"six"), timeout=30)
        assert actor.done
        actor.send(record(1))  # waits for nobody


def test_the_end_reaches_an_actor_that_waits_for_its_learner(tmp_path):
    """After a long step, or a person's pause: whom it asks is gone."""
    port = free_port()
    with actor_at(port, tmp_path / "actor", ahead=0, timeout_s=5.0) as actor:
        with learner_at(port) as learner:
            wait_until(lambda: learner.publish(5, b"five") or actor.weights(), timeout=30)
            learner.end = lambda: time.sleep(2)
            learner.publish(6, b"six", done=True)
        actor.send(record(0))
        assert actor.done and actor.weights() == (6, b"six") and actor.weights() is None


class CrashError(Exception):
    """Stands for kill -9: what comes after it does not happen."""


def staging_actor(folder: Path) -> Actor:
    return Actor(f"127.0.0.1:{free_port()}", None, HELLO, SIZE, folder)


def journalled(folder: Path) -> bytes:
    return Journal(folder / "journal", SIZE).read(0, 100)


def test_what_is_released_is_on_the_disk_before_it_is_sent(tmp_path, monkeypatch):
    """A learner's checkpoint that is ahead of the journal after a power cut cannot be gone on with."""
    synced = {}  # bytes of each file by its inode
    monkeypatch.setattr(link.os, "fsync", lambda fd: synced.update({os.fstat(fd).st_ino: os.fstat(fd).st_size}))
    with actor_at(free_port(), tmp_path) as actor:
        exchange = actor.exchange

        def checked(wait_ms: int) -> None:
            for path in (tmp_path / "journal").iterdir():
                assert synced.get(path.stat().st_ino, 0) == path.stat().st_size
            exchange(wait_ms)

        actor.exchange = checked
        for number in range(RECORDS_PER_FILE + 2):  # over the end of a file
            actor.stage(record(number))
        assert actor.release() == actor.journal.written == RECORDS_PER_FILE + 2


def test_what_is_staged_is_sent_when_it_is_released(tmp_path):
    actor = staging_actor(tmp_path)
    for number in range(3):
        actor.stage(record(number))
    assert actor.journal.written == 0
    assert actor.release() == 3 and actor.release() == 0
    assert journalled(tmp_path) == records(0, 3)
    for number in range(3, 6):
        actor.stage(record(number))
    actor.discard()
    assert actor.release() == 0
    actor.stage(record(7))
    assert actor.release() == 1
    assert journalled(tmp_path) == records(0, 3) + record(7)


@pytest.mark.parametrize("written", range(5))
def test_release_that_is_killed_loses_and_doubles_nothing(tmp_path, written):
    """After `written` of 4 records: in the middle of it, or (4) before the staged file is removed."""
    actor = staging_actor(tmp_path)
    actor.send(record(0))
    for number in range(1, 5):
        actor.stage(record(number))
    append, left = actor.journal.append, [written]

    def killed(data: bytes) -> None:
        if not left[0]:
            raise CrashError
        left[0] -= 1
        append(data)

    actor.journal.append = killed
    if written == 4:
        actor.staged = SimpleNamespace(exists=actor.staged.exists, read_bytes=actor.staged.read_bytes)  # no unlink
    with pytest.raises((CrashError, AttributeError)):
        actor.release()
    assert journalled(tmp_path) == records(0, 1 + written)
    again = staging_actor(tmp_path)
    again.release()
    assert journalled(tmp_path) == records(0, 5)
    again.stage(record(5))
    assert again.release() == 1 and journalled(tmp_path) == records(0, 6)


def test_what_was_staged_outlives_a_journal_that_was_deleted(tmp_path):
    """As is advised where that does not fit the learner: the episode is whole, its first observation too."""
    actor = staging_actor(tmp_path)
    actor.send(record(0))
    for number in range(1, 5):
        actor.stage(record(number))
    shutil.rmtree(tmp_path / "journal")
    (tmp_path / "actor_name").unlink()
    assert staging_actor(tmp_path).release() == 4
    assert journalled(tmp_path) == records(1, 4)


def test_stage_that_is_killed_in_any_byte_keeps_whole_records(tmp_path):
    (tmp_path / "whole").mkdir()
    actor = staging_actor(tmp_path / "whole")
    for number in range(2):
        actor.stage(record(number))
    data = actor.staged.read_bytes()
    assert len(data) == 8 + 2 * SIZE
    for cut in range(len(data) + 1):
        folder = tmp_path / str(cut)
        folder.mkdir()
        (folder / "staged.records").write_bytes(data[:cut])
        staging_actor(folder).release()
        assert journalled(folder) == records(0, max(cut - 8, 0) // SIZE)


def test_all_actors_are_told_that_it_is_over(tmp_path):
    """Also one that is busy; what they send afterwards stays with them; one that is gone is not waited for long."""
    port = free_port()
    with learner_at(port) as learner, actor_at(port, tmp_path / "one") as one, actor_at(port, tmp_path / "two") as two:
        for actor in (one, two):
            actor.send(record(0))
            assert taken(learner, actor, 1) == [record(0)]
            actor.subscriber.unsubscribe(b"")  # it takes a moment, so that they may not hear it with the weights
        one.send(record(1))
        ending = threading.Thread(target=learner.publish, args=(1, b"", True))
        ending.start()
        deadline = time.monotonic() + 30
        while not (one.done and two.done) and time.monotonic() < deadline:
            one.exchange(0)
            time.sleep(0.3)
            two.exchange(0)
        ending.join()
        assert one.done and two.done and set(learner.held.values()) == {1}
        learner.asking.add("gone")
        begun = time.monotonic()
        learner.end(patience_s=0.5)
        assert time.monotonic() - begun < 5


# --- The wire, with this test as the actor ----------------------------------------------------------------------------
def message(first: object, payload: bytes, **changes) -> tuple[bytes, bytes]:
    header = {"protocol": PROTOCOL, "hello": HELLO, "actor": "test", "asked": 7, "first": first}
    return json.dumps(header | changes).encode(), payload


@contextlib.contextmanager
def talk(learner: Learner, port: int):
    """A function (frames) -> the reply and the records that were taken, as an actor talks to the learner."""
    dealer = zmq.Context.instance().socket(zmq.DEALER)
    dealer.linger = 0
    dealer.connect(f"tcp://127.0.0.1:{port}")

    def ask(*frames: bytes) -> tuple[dict, list]:
        dealer.send_multipart(frames)
        new, deadline = [], time.monotonic() + 20
        while not dealer.poll(0):
            assert time.monotonic() < deadline, "the learner is silent"
            new += learner.receive(20)
        return json.loads(dealer.recv()), new

    yield ask
    dealer.close()


def test_records_are_numbered():
    """Repeated, overlapping and early messages: the learner takes every record once, in order."""
    port, all_new = free_port(), []
    with learner_at(port) as learner, talk(learner, port) as ask:
        for first, count, held in (
            (0, 0, 0),  # a greeting
            (0, 30, 30),
            (0, 30, 30),  # repeated
            (10, 40, 50),  # overlapping
            (90, 10, 50),  # too early: records 50 to 89 are missing
            (20, 10, 50),  # old
            (50, 150, 200),
        ):
            reply, new = ask(*message(first, records(first, count)))
            assert reply == {"asked": 7, "held": held, "saved": 0, "takes": True, "over": False}
            all_new += new
        learner.load_state_dict(learner.state_dict())  # from a checkpoint, which was one before the next
        assert ask(*message(200, b""))[0]["saved"] == 0
        learner.saved()
        assert ask(*message(200, b""))[0]["saved"] == 200
    assert all_new == [("test", record(number)) for number in range(200)]


def not_finite(payload: bytes) -> None:
    if record(13) in [payload[i : i + SIZE] for i in range(0, len(payload), SIZE)]:
        raise ValueError("record 13 is not finite")


def test_malformed_messages_do_not_kill_the_learner():
    header, data = message(0, records(0, 10))
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
        message(10, records(10, 5)),
        message(0, data, protocol="records-0"),
        message(0, data, hello=None),
        message(0, data, hello=[1]),
        message(0, data, hello=HELLO | {"--env-id": "Other-v0"}),
        message(0, data, hello={}),
        message("x", data),
        message(0, data, asked=None),
        message(None, data),
        message(-5, data),
        message(float("inf"), data),
        message(float("nan"), data),
    ]
    port = free_port()
    with learner_at(port, not_finite) as learner:
        for frames in hostile:
            with talk(learner, port) as ask:
                reply, new = ask(*frames)
                assert "refused: " in reply["error"] and new == [], frames[0][:80]
        with socket.create_connection(("127.0.0.1", port)) as raw:
            raw.sendall(os.urandom(1000))
        with talk(learner, port) as ask:
            reply, new = ask(header, data)
            assert reply["held"] == len(new) == 10
        assert learner.held == {"test": 10}


def test_what_differs_is_named(tmp_path):
    port = free_port()
    hello = HELLO | {"--hidden-dims": [16, 16], "--env-id": "Other-v0"}
    with learner_at(port) as learner, actor_at(port, tmp_path / "actor", hello=hello) as actor:
        actor.send(record(0))
        with pytest.raises(SystemExit, match="--env-id, --hidden-dims of the learner and of the actor differ") as error:
            taken(learner, actor, 1)
        assert "\n" not in error.value.code


def test_addresses_that_a_learner_cannot_have():
    port = free_port()
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        with pytest.raises(SystemExit, match=f"--address 127.0.0.1:{port}: .*another port"):
            Learner(f"127.0.0.1:{port}", None, HELLO, SIZE)
    with pytest.raises(SystemExit, match="--address 0.0.0.0:7000: a network needs --curve-keys"):
        Learner("0.0.0.0:7000", None, HELLO, SIZE)


def test_steps_of_the_script_must_be_finite():
    """What `check` is in the scripts."""
    dtype = step_type(3, 2)
    steps = np.zeros(4, dtype)
    check_steps(dtype, steps.tobytes())
    for name in ("action", "reward", "observation"):
        wrong = steps.copy()
        wrong[name][2] = np.nan
        with pytest.raises(ValueError, match=name):
            check_steps(dtype, wrong.tobytes())


# --- Keys -------------------------------------------------------------------------------------------------------------
def test_curve_keys(tmp_path, monkeypatch):
    """The right keys work; an actor with others, or none, gets nothing in and gives up."""
    port, keys = free_port(), tmp_path / "keys"
    learner = Learner(f"127.0.0.1:{port}", str(keys), HELLO, SIZE)
    try:
        assert (keys / "actor.key_secret").stat().st_mode & 0o077 == 0 == keys.stat().st_mode & 0o077
        link.make_keys(tmp_path / "wrong")
        # an intruder who knows the learner's public key, but whose own key the learner does not know
        shutil.copytree(tmp_path / "wrong", tmp_path / "intruder")
        shutil.copy(keys / "learner.key", tmp_path / "intruder")
        for number, folder in enumerate((None, tmp_path / "wrong", tmp_path / "intruder", keys)):
            place = tmp_path / f"actor{number}"
            place.mkdir()
            actor = Actor(f"127.0.0.1:{port}", folder and str(folder), HELLO, SIZE, place)
            actor.send(record(number))
            got = [learner.receive(20) for _ in range(30) if actor.exchange(0) is None]
            assert [data for batch in got for _, data in batch] == ([record(3)] if folder == keys else [])
            actor.dealer.close(0)
            actor.subscriber.close(0)
        with pytest.raises(SystemExit, match="--curve-keys nowhere: "):
            Actor(f"127.0.0.1:{port}", "nowhere", HELLO, SIZE, place)
        (tmp_path / "file").touch()
        with pytest.raises(SystemExit, match="--curve-keys .*file: "):
            Learner(f"127.0.0.1:{free_port()}", str(tmp_path / "file"), HELLO, SIZE)
        (keys / "actor.key").write_text("curve\n    public-key")  # cut off: nobody would be let in
        with pytest.raises(SystemExit, match="--curve-keys .*keys: .*the learner makes the keys"):
            Learner(f"127.0.0.1:{free_port()}", str(keys), HELLO, SIZE)
    finally:
        learner.authenticator.stop()
        learner.router.close(0)
        learner.publisher.close(0)


def test_keys_whose_making_was_interrupted_are_made_anew(tmp_path, monkeypatch):
    create, made = zmq.auth.create_certificates, []

    def interrupted(folder: Path, name: str) -> tuple[str, str]:
        if made:
            raise OSError("no space left")
        made.append(create(folder, name))
        return made[0]

    with monkeypatch.context() as patch:
        patch.setattr(link.zmq.auth, "create_certificates", interrupted)
        with pytest.raises(OSError, match="no space left"):
            link.make_keys(tmp_path / "keys")
    link.make_keys(tmp_path / "keys")
    assert len(zmq.auth.load_certificates(tmp_path / "keys")) == 2


# --- The script as learner and actors ---------------------------------------------------------------------------------
LOGGED = ("--eval-every", 100, "--eval-episodes", 1)  # so that train.csv has a row every 50 steps


class Site:
    """A folder with one learner, its address, and as many actors as a test starts."""

    def __init__(self, cwd: Path, *flags: object):
        self.cwd, self.port = cwd, free_port()
        self.flags = [*TINY.split(), "--env-id", "probe_envs:Point-v0", "--eval-every", 100_000]
        self.flags += ["--address", f"127.0.0.1:{self.port}", *flags]

    def start(self, name: str, *flags: object):
        """The learner, or an actor, in a folder of its name; again, if it has been there."""
        role = "learner" if name == "learner" else "actor"
        if (self.cwd / name).exists():
            return popen_forked(SCRIPT, "--resume", name, *flags, cwd=self.cwd, env=TASKS)
        flags = (*self.flags, "--role", role, "--run-dir", name, *flags)
        return popen_forked(SCRIPT, *flags, cwd=self.cwd, env=TASKS)

    def step(self) -> int:
        """Where the learner's log stands."""
        with contextlib.suppress(FileNotFoundError, IndexError):
            return int(read_csv(self.cwd / "learner", "train.csv")["global_step"][-1])
        return 0

    def journal(self, name: str) -> np.ndarray:
        """All whole steps that an actor's journal holds, and the number of the first."""
        files = sorted((self.cwd / name / "journal").glob("*.records"))
        data = b"".join(path.read_bytes() for path in files)
        dtype = step_type(4, 3)
        return np.frombuffer(data[: len(data) // dtype.itemsize * dtype.itemsize], dtype)


def finish(*processes, timeout: float = 120) -> None:
    """Waits for processes that must end well."""
    for process in processes:
        process.join(timeout)
        assert process.exitcode == 0, process.stderr_path.read_text()[-3000:]


def assert_each_step_once(site: Site, *actors: str) -> None:
    """Every step that the learner holds stands once in its buffer, in each actor's order; nothing else does."""
    state = read_checkpoint(site.cwd / "learner")
    buffer, held = stored(state), state["actors"]["held"]
    rows = np.concatenate([buffer[name].numpy() for name in ("actions", "next_observations")], 1)
    place = {row.tobytes(): number for number, row in enumerate(rows)}
    assert len(place) == len(rows) == state["run"]["step"] == state["buffer"]["total"]  # none doubled
    names = {(site.cwd / actor / "actor_name").read_text(): actor for actor in actors}
    assert held.keys() == names.keys()
    count = 0
    for name, number in held.items():
        steps = site.journal(names[name])[:number]
        assert len(steps) == number > 0
        steps = steps[~steps["first"]]
        sent = np.concatenate([steps["action"], steps["observation"]], 1)
        places = [place.get(row.tobytes()) for row in sent]
        assert None not in places and places == sorted(places)  # none lost
        count += len(steps)
    assert count == len(rows)


def updates(site: Site) -> tuple[int, int]:
    """Critic updates made, and asked for by the ratio."""
    state, args = read_checkpoint(site.cwd / "learner"), json.loads((site.cwd / "learner" / "args.json").read_text())
    return state["agent"]["critic_updates"], args["utd_ratio"] * (state["run"]["step"] - args["learning_starts"])


def test_a_learner_and_two_actors_to_the_end(tmp_path):
    """R8: 600 steps are 600; all of them, the exact ratio, actors that explore on their own and follow the learner."""
    site = Site(tmp_path, "--utd-ratio", 2, "--std-parameterization", "fixed", "--lr", 1e-6)
    total = ("--total-timesteps", 600)
    with site.start("one", "--seed", 5) as one, site.start("two", "--seed", 5) as two:
        for name in ("one", "two"):
            wait_until(lambda name=name: (tmp_path / name / "journal").exists() and len(site.journal(name)))
        with site.start("learner", *total) as learner:  # neither comes too late for it
            finish(learner, one, two)
    assert_each_step_once(site, "one", "two")
    made, asked = updates(site)
    state = read_checkpoint(tmp_path / "learner")
    assert state["run"]["step"] == 600 and made == asked == 1100
    journals = [site.journal(name) for name in ("one", "two")]
    assert min(map(len, journals)) > 20 and not np.array_equal(journals[0][:5], journals[1][:5])
    args = json.loads((tmp_path / "learner" / "args.json").read_text()) | {"hidden_dims": (32, 32)}
    from gymnasium import spaces

    agent = Agent(spaces.Box(-1, 1, (4,)), spaces.Box(-1, 1, (3,)), Args(**args), torch.device("cpu"))
    agent.load_state_dict(state["agent"])
    agent.ema_actor = agent.actor  # the one that acts
    distances = []
    for before, step in zip(journals[0], journals[0][1:]):
        if not step["first"]:
            distances.append(np.abs(agent.act(before["observation"], deterministic=True) - step["action"]).mean())
    assert np.mean(distances[:20]) > 0.3  # random actions at first
    assert np.mean(distances[-20:]) < 0.25  # at last those of the learner's policy, which hardly moves
    for word in ("last: ", "best: "):
        assert word in learner.stdout_path.read_text()
    assert (tmp_path / "learner" / "curve.png").exists()
    # evaluated like any run, by one process; an actor's folder has nothing to evaluate
    result = script("--eval-only", "learner", "--no-capture-video", cwd=tmp_path)
    assert "checkpoint: eval/success_rate" in result.stdout
    result = script("--eval-only", "one", cwd=tmp_path, check=False)
    assert "--eval-only one: is an actor's run; give its learner's" in one_line(result, SCRIPT)


def test_learner_and_actor_are_killed_and_stopped_and_resumed(tmp_path):
    """kill -9 of the learner, of the actor, of both, then Ctrl-C of each; every step arrives once."""
    site = Site(tmp_path, "--total-timesteps", 900, *LOGGED)  # of which a journal keeps all, in one file
    with contextlib.ExitStack() as stack:
        running = {name: stack.enter_context(site.start(name)) for name in ("learner", "actor")}
        for goal, names, how in (
            (150, ["learner"], signal.SIGKILL),
            (300, ["actor"], signal.SIGKILL),
            (450, ["learner", "actor"], signal.SIGKILL),
            (600, ["learner"], signal.SIGINT),
            (700, ["actor"], signal.SIGINT),
        ):
            wait_until(lambda goal=goal: site.step() >= goal)
            for name in names:
                os.kill(running[name].pid, how)
                running[name].join(60)
                assert running[name].exitcode not in (0, None)
                errors = running[name].stderr_path.read_text()
                assert "Traceback" not in errors and (how == signal.SIGKILL or f"go on with --resume {name}" in errors)
                running[name] = stack.enter_context(site.start(name))
        finish(running["learner"], running["actor"])
    assert_each_step_once(site, "actor")
    made, asked = updates(site)
    assert made == asked


def test_a_finished_learner_goes_on(tmp_path):
    """With what its actor has sent since, none of it lost at the seam."""
    site = Site(tmp_path, "--total-timesteps", 200)
    for total in (200, 300):
        with site.start("actor") as actor, site.start("learner", "--total-timesteps", total) as learner:
            learner.join(120)
            assert learner.exitcode == 0, learner.stderr_path.read_text()
            actor.kill()
    assert read_checkpoint(tmp_path / "learner")["run"]["step"] == 300
    assert_each_step_once(site, "actor")


def test_a_learner_needs_a_task_that_owns_something_for_its_spaces_only(tmp_path):
    """R4: one at the start, which it gives back, and one for the last evaluation."""
    site = Site(tmp_path, "--total-timesteps", 100)
    task = ("--env-id", "probe_envs:OnlyOne-v0")
    with site.start("learner", *task) as learner, site.start("actor", *task) as actor:
        finish(learner, actor)
    assert (tmp_path / "instances.txt").read_text() == "made\n" * 3  # and the actor's


@contextlib.contextmanager
def versions(port: int):
    """A function () -> number of critic updates in the newest published policy."""
    subscriber = link.make_socket(zmq.SUB, "127.0.0.1", "actor", None)
    subscriber.connect(link.endpoint("127.0.0.1", port + 1))
    subscriber.subscribe(b"")
    newest = [0]

    def version() -> int:
        if subscriber.poll(0):
            newest[0] = json.loads(subscriber.recv().partition(b"\n")[0])["version"]
        return newest[0]

    yield version
    subscriber.close(0)


def test_a_paced_learner_waits_and_a_free_one_goes_on(tmp_path):
    """--utd-ratio 0 learns while no step arrives; a ratio is kept."""
    for ratio in (0, 1):
        site = Site(tmp_path / str(ratio), "--total-timesteps", 10**6, "--utd-ratio", ratio, *LOGGED)
        with site.start("actor") as actor, site.start("learner") as learner, versions(site.port) as version:
            wait_until(lambda site=site: site.step() >= 100)
            os.kill(actor.pid, signal.SIGKILL)
            if ratio == 0:
                goal = version() + 300
                wait_until(lambda version=version, goal=goal: version() >= goal, timeout=250)
            else:
                time.sleep(2)
            os.kill(learner.pid, signal.SIGINT)
            learner.join(60)
        made, asked = updates(site)
        assert made == asked if ratio else made >= goal
