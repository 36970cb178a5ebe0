"""Peers that mean ill, or well, for tests and benchmarks of robot_server.py."""

import contextlib
import math
import random
import socket
import struct
import threading
import time
from subprocess import Popen

import msgpack
import zmq
from robot_wire import Wire, message, moved


# --- Peers that speak ZMTP themselves ---------------------------------------------------------------------------------
def raw_peer(address: str, kind: bytes = b"DEALER", receive_buffer: int = 4096) -> socket.socket:
    """A connection after ZMTP's handshake (RFC 23, mechanism NULL), which libzmq does not look after."""
    host, port = address.removeprefix("tcp://").rsplit(":", 1)
    peer = socket.socket()
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    peer.connect((host, int(port)))
    peer.sendall(b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"NULL" + bytes(16) + b"\x00" + bytes(31))
    time.sleep(0.02)
    peer.recv(64)
    body = b"\x05READY\x0bSocket-Type" + struct.pack(">I", len(kind)) + kind
    body += b"\x08Identity" + struct.pack(">I", 0) if kind == b"DEALER" else b""
    peer.sendall(b"\x04" + bytes([len(body)]) + body)
    return peer


def zmtp(*frames: bytes) -> bytes:
    """A message on the wire, with short frames."""
    flags = [1] * (len(frames) - 1) + [0]
    return b"".join(bytes([flag, len(frame)]) + frame for flag, frame in zip(flags, frames))


PING = b"\x04\x07\x04PING\x00\x10"
REQUEST = zmtp(b"", message("state"))


def push(peers: list[socket.socket], data: bytes, seconds: float) -> int:
    """Send as much of `data` over and over as goes; how many bytes went."""
    end, sent = time.monotonic() + seconds, 0
    for peer in peers:
        peer.setblocking(False)
    while time.monotonic() < end:
        for peer in peers:
            with contextlib.suppress(OSError):
                sent += peer.send(data)
        time.sleep(0.002)
    return sent


class Honest(threading.Thread):
    """A client that streams at 50 Hz meanwhile; `times` of its requests in ms."""

    def __init__(self, process: Popen, timeout: float = 20.0):
        super().__init__()
        self.process, self.ending = process, threading.Event()
        self.times: list[float] = []
        self.errors: list[str] = []
        self.modes: set[str] = set()
        self.wire = Wire(process.requests)
        self.start_pose = self.wire.stream()
        self.wire.timeout = timeout

    def run(self) -> None:
        while not self.ending.is_set():
            asked = time.monotonic()
            try:
                reply = self.wire.call("target", pose=moved(self.start_pose, y=0.02 * math.sin(asked)))
                self.modes.add(reply["mode"])
                if not reply["ok"]:
                    self.errors.append(reply["error"]["code"])
            except TimeoutError:
                self.errors.append("timeout")
            self.times.append(1000 * (time.monotonic() - asked))
            time.sleep(0.02)

    def __enter__(self) -> "Honest":
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.ending.set()
        self.join()
        self.wire.__exit__()


# --- Hostile messages -------------------------------------------------------------------------------------------------
def some_value(choose: random.Random, depth: int = 0) -> object:
    """Anything that msgpack can say."""
    kind = choose.randrange(10 if depth < 12 else 8)
    if kind == 8:
        return [some_value(choose, depth + 1) for _ in range(choose.randrange(3))]
    if kind == 9:
        return {choose.choice(["pose", "name", "q", "", "x" * 300, 3]): some_value(choose, depth + 1)}
    numbers = [math.nan, math.inf, -math.inf, 1e308, -0.0, choose.gauss(0, 1)]
    values = [None, True, choose.randint(-(2**63), 2**64 - 1), choose.choice(numbers)]
    values += ["\u0141\0x" * choose.choice([0, 1, 5, 100, 1000]), choose.randbytes(choose.choice([0, 8, 500]))]
    values += [msgpack.ExtType(choose.randrange(128), b"1234"), [0.0] * choose.choice([0, 3, 6, 7, 8, 65, 5000])]
    return values[kind]


def deep(depth: int) -> bytes:
    return b"\x91" * depth + b"\xc0"


def hostile_frame(choose: random.Random) -> bytes:
    """A message as no client of ours would send it. `hold`, `stop` and a takeover are left out: they may be sent."""
    ops = ["target", "gains", "start", "move_joints", "reset", "recover", "gripper", "job", "task", "state"]
    ops += ["hello", "release", "reset_task", "acquire", "", "x" * 300, "__class__", "eval", 7, None, ["state"]]
    token = choose.choice([None, "c" * 16, 3, "", "x" * 500, b"c" * 16])
    honest = {"v": 2, "op": choose.choice(ops), "id": choose.randrange(1000), "token": token}
    names = ["pose", "seq", "handle", "q", "speed", "action", "width", "name", "ttl", "closure", "seed", "stiffness"]
    args = {choose.choice(names): some_value(choose) for _ in range(choose.randrange(4))}
    args = {} if honest["op"] == "acquire" else args  # a lease may be had by anyone who asks properly
    kind = choose.randrange(10)
    if kind == 0:
        return choose.randbytes(choose.choice([0, 1, 5, 100, 5000]))
    if kind == 1:
        frame = msgpack.packb(honest | {"args": args})
        return frame[: choose.randrange(len(frame))]
    if kind == 2:
        frame = bytearray(msgpack.packb({"v": 2, "op": "state", "id": 1, "args": {}}))
        for _ in range(choose.randrange(1, 4)):
            frame[choose.randrange(len(frame))] = choose.randrange(256)
        return bytes(frame)
    if kind == 3:
        return choose.choice([deep(10), deep(1000), deep(20_000)])
    if kind == 4:
        return choose.choice([b"\xdf", b"\xdd", b"\xdb", b"\xc6", b"\xc9"]) + choose.randbytes(4) + choose.randbytes(20)
    if kind == 5:
        return msgpack.packb(honest | {"v": some_value(choose)})
    if kind == 6:
        return msgpack.packb(some_value(choose))
    if kind == 7:
        return msgpack.packb(honest | {"args": some_value(choose), "id": some_value(choose)})
    if kind == 8:
        return msgpack.packb({choose.choice([1, None, "op", b"v"]): some_value(choose) for _ in range(3)})
    return msgpack.packb(honest | {"args": args})


def attack(address: str, count: int, seed: int) -> int:
    """Send `count` hostile messages, over connections of several kinds; how many answers came."""
    choose, answers = random.Random(seed), 0
    sent = 0
    while sent < count:
        with zmq.Context.instance().socket(zmq.DEALER) as socket:
            socket.setsockopt(zmq.LINGER, 0)
            if choose.random() < 0.5:
                socket.setsockopt(zmq.IDENTITY, b"\x01" + choose.randbytes(choose.randrange(1, 200)))
            socket.connect(address)
            for _ in range(min(10, (count - sent + 99) // 100)):
                batch = min(100, count - sent)
                for _ in range(batch):
                    envelope = choose.choice([[b""], [b""], [b""], [], [b"id", b""], [choose.randbytes(9), b"x", b""]])
                    extra = choose.choice([[], [], [], [b""], [b"x"] * 3, [b"", b""]])
                    socket.send_multipart([*envelope, hostile_frame(choose), *extra])
                sent += batch
                while socket.poll(20):
                    socket.recv_multipart()
                    answers += 1
            if choose.random() < 0.2:  # larger than any request may be: the connection is cut
                socket.send_multipart([b"", choose.randbytes(200_000)])
                socket.poll(20)
    return answers
