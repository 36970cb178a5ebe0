"""Actor and learner over ZeroMQ: records of bytes one way, weights the other.

A message is a JSON header {protocol, hello, actor, asked, first} and records of one size, the actor's from number
`first` on; the reply is JSON: `asked`, how many of this actor's records the learner has, how many of them are saved,
and whether it takes more. Where it does not, or has not replied, an actor asks without records. It journals each before
it sends it, and drops what is saved. A learner that lost some in a crash answers with a smaller number and the actor
goes back to there; what arrives twice is known by its number. So each is learned from exactly once, whoever is killed.
"""

import ipaddress
import json
import math
import os
import socket
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import zmq
import zmq.auth
from zmq.auth.thread import ThreadAuthenticator

from common.envs import say_once
from common.setup import fail, write_atomically

PROTOCOL = "records-4"
DEFAULT_PORT = 5588
MESSAGE_BYTES = 1 << 25  # records in one message, at most
RECORDS_PER_FILE = 1024  # of the journal


def parse_address(address: str) -> tuple[str, int]:
    """IP address and port of HOST, HOST:PORT, tcp://HOST:PORT, ::1 or [::1]:PORT; weights take the port after it.
    Exits with one line when it is none, or the host is unknown."""
    host, port = address.removeprefix("tcp://"), str(DEFAULT_PORT)
    if host.startswith("["):
        host, _, rest = host[1:].partition("]")
        port = rest.removeprefix(":") or port
    elif host.count(":") == 1:
        host, port = host.split(":")
    if not port.isdigit() or not 0 < int(port) < 65535:
        fail(f"--address {address}: {port!r} is no port; give HOST:PORT, such as 127.0.0.1:{DEFAULT_PORT}")
    try:
        found = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        fail(f"--address {address}: no host {host!r} ({error}); give HOST:PORT, such as 127.0.0.1:{DEFAULT_PORT}")
    *_, sockaddr = min(found, key=lambda entry: entry[0] != socket.AF_INET)  # 0.0.0.0 takes no IPv6
    return socket.getnameinfo(sockaddr, socket.NI_NUMERICHOST)[0], int(port)  # fe80:: with its interface


def endpoint(ip: str, port: int) -> str:
    return f"tcp://[{ip}]:{port}" if ":" in ip else f"tcp://{ip}:{port}"


def make_socket(kind: int, ip: str, role: str, keys: str | None):
    """A ZeroMQ socket, encrypted and authenticated with CURVE when there are keys."""
    sock = zmq.Context.instance().socket(kind)
    sock.linger = 1000
    sock.ipv6 = ":" in ip
    sock.maxmsgsize = 1 << 30
    sock.tcp_keepalive = 1  # a peer that lost power says nothing: two minutes later its connection is made anew
    sock.tcp_keepalive_idle = 30
    sock.tcp_keepalive_intvl = 10
    if kind in (zmq.PUB, zmq.SUB):
        sock.conflate = True  # the newest weights only, also where a slow network holds them up
    if not keys:
        return sock
    try:
        if role == "learner":
            make_keys(Path(keys))
            zmq.auth.load_certificates(keys)  # raises for a bad one, with which nobody would be let in
            sock.curve_server = True
        sock.curve_publickey, sock.curve_secretkey = zmq.auth.load_certificate(Path(keys) / f"{role}.key_secret")
        if role == "actor":
            sock.curve_serverkey = zmq.auth.load_certificate(Path(keys) / "learner.key")[0]
    except (OSError, LookupError, ValueError, TypeError, zmq.ZMQError) as error:
        fail(f"--curve-keys {keys}: {error}; the learner makes the keys, copy its folder to every actor")
    return sock


class Learner:
    """The learner's end: receives records, publishes weights. Its state says what it has of each actor."""

    def __init__(
        self,
        address: str,
        keys: str | None,
        hello: dict,
        record_bytes: int,
        check: Callable[[bytes], None] = lambda records: None,
    ):
        """Listens at `address`; `hello` must, as JSON, be the actors' too; `check` raises ValueError to refuse records.
        Exits with one line when the address is taken, or on a network without `keys`; makes them if none are there."""
        ip, port = parse_address(address)
        if not ipaddress.ip_address(ip).is_loopback and not keys:
            fail(f"--address {address}: a network needs --curve-keys DIR, which encrypts and authenticates")
        self.hello, self.record_bytes, self.check = json.loads(json.dumps(hello)), record_bytes, check
        self.held: dict[str, int] = {}
        self.asking: set[str] = set()  # actors that have not been told that it is over
        self.over = False
        self.saves: list[dict[str, int]] = [{}, {}]  # held in the checkpoint before the newest, and in that
        self.router = make_socket(zmq.ROUTER, ip, "learner", keys)
        self.publisher = make_socket(zmq.PUB, ip, "learner", keys)
        if keys:
            self.authenticator = ThreadAuthenticator(zmq.Context.instance())
            self.authenticator.start()
            self.authenticator.configure_curve(domain="*", location=keys)
        try:
            self.router.bind(endpoint(ip, port))
            self.publisher.bind(endpoint(ip, port + 1))
        except zmq.ZMQError as error:
            fail(f"--address {address}: {error}; give another port, of which the next one is free too")

    def receive(self, timeout_ms: int, most: float = math.inf, asks: bool = True) -> list[tuple[str, bytes]]:
        """At most `most` new records as (actor, record), each actor's in order; waits `timeout_ms` for the first.
        Unless it `asks` for more, only what actors were asked for before: who is slow to send has its turn, too."""
        new = []
        for _ in range(100):  # then learning has its turn
            if not self.router.poll(timeout_ms):
                break
            timeout_ms = 0
            identity, *frames = self.router.recv_multipart()
            try:
                actor, asked, records = self.read(frames, most - len(new))
                new += [(actor, record) for record in records]
                reply = {"asked": asked, "held": self.held.get(actor, 0), "saved": self.saves[0].get(actor, 0)}
                reply |= {"takes": asks and len(new) < most, "over": self.over}
                self.asking = self.asking - {actor} if self.over else self.asking | {actor}
            except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
                reply = {"error": f"refused: {error}; give actor and learner the same script and flags"}
            self.router.send_multipart([identity, json.dumps(reply).encode()])
        return new

    def read(self, frames: list[bytes], most: float) -> tuple[str, int, list[bytes]]:
        """The actor, its message's number, at most `most` new records; raises what a hostile header makes it raise."""
        header = json.loads(frames[0])
        if header["protocol"] != PROTOCOL:
            raise ValueError(f"protocol is {header['protocol']}, not {PROTOCOL}")
        differ = [name for name, value in self.hello.items() if header["hello"].get(name) != value]
        if differ:
            raise ValueError(f"{', '.join(differ)} of the learner and of the actor differ")
        actor, asked, first = str(header["actor"]), int(header["asked"]), int(header["first"])
        payload = frames[1]
        size = self.record_bytes
        count, rest = divmod(len(payload), size)
        if first < 0 or rest:
            raise ValueError(f"{len(payload)} bytes from number {first} on are no records of {size}")
        self.check(payload)
        held = self.held.get(actor, 0)
        if first > held:
            return actor, asked, []
        new = range(held - first, int(min(count, held - first + most)))
        records = [payload[i * size : (i + 1) * size] for i in new]
        self.held[actor] = held + len(records)
        return actor, asked, records

    def saved(self) -> None:
        """All that was received is in a checkpoint: actors may drop what is in the one before, too."""
        self.saves = [self.saves[1], dict(self.held)]

    def publish(self, version: int, weights: bytes, done: bool = False) -> None:
        """Sends the weights to all actors; `done` ends them, also one that takes long to ask again."""
        header = json.dumps({"version": version, "done": done}).encode()
        self.publisher.send(header + b"\n" + weights)
        if done:
            self.end()

    def end(self, patience_s: float = 10.0) -> None:
        """Tells each actor that has sent something that it is over, when it asks; takes nothing more."""
        self.over = True
        deadline = time.monotonic() + patience_s
        while self.asking and time.monotonic() < deadline:
            self.receive(100, most=0)

    def state_dict(self) -> dict:
        return {"held": dict(self.held)}

    def load_state_dict(self, state: dict) -> None:
        self.held = dict(state["held"])
        self.saved()


def make_keys(folder: Path) -> None:
    """Key pairs for a learner and its actors, unless the folder has some."""
    if (folder / "learner.key").exists():
        return
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for name in ("actor", "learner"):  # in this order: what was killed amid it begins anew
        os.chmod(zmq.auth.create_certificates(folder, name)[1], 0o600)


class Journal:
    """Records of one size, numbered from 0, in files of a folder; those that are saved elsewhere can be dropped."""

    def __init__(self, folder: Path, record_bytes: int):
        self.folder, self.record_bytes = folder, record_bytes
        folder.mkdir(exist_ok=True)
        files = sorted(int(path.stem) for path in folder.glob("*.records")) or [0]  # their first records' numbers
        self.first, newest = files[0], files[-1]  # older ones were dropped
        self.file = self.path(newest).open("ab")
        self.written = newest + self.file.tell() // record_bytes
        self.file.truncate((self.written - newest) * record_bytes)  # without what a crash cut off

    def path(self, first: int) -> Path:
        return self.folder / f"{first:012d}.records"

    def append(self, record: bytes) -> None:
        """The record survives this process from here on."""
        if self.written % RECORDS_PER_FILE == 0:
            os.fsync(self.file.fileno())
            self.file.close()
            self.file = self.path(self.written).open("ab")
        self.file.write(record)
        self.file.flush()
        self.written += 1

    def read(self, first: int, count: int) -> bytes:
        """Records from `first` on, at most `count` and not beyond the end of a file."""
        start = first - first % RECORDS_PER_FILE
        with self.path(start).open("rb") as file:
            file.seek((first - start) * self.record_bytes)
            return file.read(count * self.record_bytes)

    def drop(self, before: int) -> None:
        """Deletes the files that hold only records before this number; the newest stays, it knows the count."""
        while self.first + RECORDS_PER_FILE <= min(before, self.written - 1):
            self.path(self.first).unlink(missing_ok=True)
            self.first += RECORDS_PER_FILE


class Actor:
    """The actor's end: `send` journals a record and passes it on; `done`: the learner has ended."""

    def __init__(
        self,
        address: str,
        keys: str | None,
        hello: dict,
        record_bytes: int,
        folder: Path,
        ahead: float = math.inf,
        stop: Callable[[], bool] = lambda: False,
        timeout_s: float = 600.0,  # one evaluates meanwhile
    ):
        """Talks to the learner at `address`; the journal is in `folder`. `send` waits while the learner is more than
        `ahead` records behind, until `stop` says so; it exits with one line when no learner answers for `timeout_s`."""
        self.address, self.hello, self.ahead, self.stop, self.timeout_s = address, hello, ahead, stop, timeout_s
        name_file = folder / "actor_name"
        if not name_file.exists():
            write_atomically(name_file, uuid.uuid4().hex.encode())
        self.name = name_file.read_text()
        self.number = int(self.name[:8], 16)  # for seeds that no other actor has
        self.journal = Journal(folder / "journal", record_bytes)
        self.staged = folder / "staged.records"
        self.held = self.journal.first  # what came before was saved
        self.most = self.journal.written  # that the learner can have
        self.takes = False  # nothing before the learner's first answer
        self.done = False
        self.answered = self.looked = time.monotonic()
        self.newest: tuple[int, bytes] | None = None  # weights that nobody has taken yet
        self.asked = 0  # messages sent
        self.sent = -math.inf  # the newest of them, if it waits for its reply
        ip, port = parse_address(address)
        self.dealer = make_socket(zmq.DEALER, ip, "actor", keys)
        self.subscriber = make_socket(zmq.SUB, ip, "actor", keys)
        self.dealer.connect(endpoint(ip, port))
        self.subscriber.connect(endpoint(ip, port + 1))
        self.subscriber.subscribe(b"")

    def send(self, record: bytes) -> None:
        """Journals a record, and passes on what the learner does not have; never waits for more than the pace asks."""
        self.journal.append(record)
        self.exchange(0)
        while self.journal.written - self.held > self.ahead and not (self.done or self.stop()):
            self.exchange(100)
            if time.monotonic() - self.answered > 10:
                say_once(f"waiting for a learner at {self.address}, where none answers")

    def stage(self, record: bytes) -> None:
        """Keeps a record back, on the disk, until `release` or `discard`."""
        if not self.staged.exists():
            self.staged.write_bytes(self.journal.written.to_bytes(8, "little"))
        with self.staged.open("ab") as file:
            file.write(record)
        self.exchange(0)

    def release(self) -> int:
        """Sends what was kept back, also before a crash; how many records."""
        if not self.staged.exists():
            return 0
        data = self.staged.read_bytes()
        size = self.journal.record_bytes
        records = [data[i : i + size] for i in range(8, len(data) - size + 1, size)]
        done = self.journal.written - int.from_bytes(data[:8], "little")  # by a `release` that a crash ended
        for record in records[max(done, 0) :]:  # less than none: the journal was deleted, as `exchange` advises
            self.journal.append(record)
        os.fsync(self.journal.file.fileno())  # before a learner's checkpoint counts on them, also after a power cut
        self.staged.unlink()
        self.exchange(0)
        return len(records)

    def discard(self) -> None:
        """Forgets what was kept back."""
        self.staged.unlink(missing_ok=True)

    def exchange(self, wait_ms: int) -> None:
        """Takes the learner's answer if it is there, and sends records. Exits when it is silent for too long."""
        self.answered += max(time.monotonic() - self.looked - 10, 0)  # in a person's pause nobody asked
        self.looked = time.monotonic()
        self.newest = self.weights()  # which may say that it is over
        if self.sent > -math.inf and self.dealer.poll(wait_ms):
            reply = json.loads(self.dealer.recv())
            if "held" not in reply:
                fail(f"the learner says: {reply.get('error', 'what none says; is this --address its own?')}")
            self.held, self.takes = reply["held"], reply["takes"]
            if not self.journal.first <= self.held <= self.most:  # a new learner; or a power cut, an older copy
                remedy = f"start a new one, or delete actor_name and journal in {self.staged.parent} to make it one"
                fail(f"the learner has {self.held} of this actor's records, its journal does not fit: {remedy}")
            self.done = self.done or reply["over"]
            self.journal.drop(reply["saved"])
            if reply["asked"] == self.asked:  # not one to a message that has been repeated since
                self.sent = -math.inf
            self.answered = time.monotonic()
        if time.monotonic() - self.answered > self.timeout_s:
            fail(f"no learner at {self.address}; start one there with --role learner, or give --address HOST:PORT")
        if time.monotonic() - self.sent < 2:  # a message to a learner that was killed is lost
            return
        wanted = self.takes and self.sent == -math.inf and self.held < self.journal.written
        records = self.journal.read(self.held, max(1, MESSAGE_BYTES // self.journal.record_bytes)) if wanted else b""
        self.asked += 1
        head = {"protocol": PROTOCOL, "hello": self.hello, "actor": self.name, "asked": self.asked, "first": self.held}
        try:
            self.dealer.send_multipart([json.dumps(head).encode(), records], zmq.NOBLOCK)
        except zmq.Again:  # nobody to queue it for: no learner, or one that knows other keys
            time.sleep(wait_ms / 1000)
            return
        self.most = max(self.most, self.held + len(records) // self.journal.record_bytes)
        self.sent = time.monotonic()

    def weights(self) -> tuple[int, bytes] | None:
        """Version and weights, if newer ones have come."""
        newest, self.newest = self.newest, None
        message = self.subscriber.recv() if self.subscriber.poll(0) else b""
        if message.startswith(b'{"version"'):  # not of another program, whose reply ends this one
            header, _, weights = message.partition(b"\n")
            header = json.loads(header)
            self.done = self.done or header["done"]
            newest = header["version"], weights
        return newest
