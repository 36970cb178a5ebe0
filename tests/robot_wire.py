"""The wire of robot_server.py, for tests: messages made by hand, so that a test can also send what no client would."""

import contextlib
import functools
import itertools
import re
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import Popen

import msgpack
import zmq
import zmq.auth
from conftest import popen_script, wait_until

from robot_server import PROTOCOL_VERSION

TOKEN = "a" * 16
SERVING = re.compile(r"serving on tcp://([\d.]+|\[[\da-f:]+\]):(\d+) \(state: (\d+)\)")


def message(op: object, number: object = 1, token: object = TOKEN, /, **args: object) -> bytes:
    """A request's frame."""
    return msgpack.packb({"v": PROTOCOL_VERSION, "op": op, "id": number, "token": token, "args": args})


class Wire:
    """One connection; every request waits `timeout` s for its own reply, and is sent `tries` times."""

    def __init__(
        self, address: str, token: str = TOKEN, keys: Path | None = None, timeout: float = 20.0, tries: int = 1
    ):
        self.context, self.timeout, self.token, self.count = zmq.Context.instance(), timeout, token, itertools.count(1)
        self.tries = tries
        self.socket = self.context.socket(zmq.REQ)
        for option in (zmq.REQ_RELAXED, zmq.REQ_CORRELATE):
            self.socket.setsockopt(option, 1)
        options = {zmq.LINGER: 0, zmq.HEARTBEAT_IVL: 500, zmq.HEARTBEAT_TIMEOUT: 10_000, zmq.RECONNECT_IVL: 20}
        for option, value in (options | {zmq.IPV6: 1}).items():
            self.socket.setsockopt(option, value)
        if keys is not None:
            use_keys(self.socket, keys)
        self.socket.connect(address)

    def __enter__(self) -> "Wire":
        return self

    def __exit__(self, *_) -> None:
        self.socket.close()

    def call(self, op: str, token: str | None = None, **args: object) -> dict:
        """The whole reply, of whatever kind. Raises TimeoutError."""
        token = token or self.token
        args |= {"token": token} if op == "acquire" else {}
        frame = message(op, next(self.count), token, **args)
        for _ in range(self.tries):
            self.socket.send(frame)
            if self.socket.poll(self.timeout * 1000):
                (reply,) = self.socket.recv_multipart()
                return msgpack.unpackb(reply)
        raise TimeoutError(op)

    def ask(self, op: str, token: str | None = None, **args: object) -> dict:
        """The whole reply of a request that must be accepted."""
        reply = self.call(op, token, **args)
        assert reply["ok"] and reply["error"] is None, f"{op}: {reply['error']}"
        return reply

    def refused(self, op: str, token: str | None = None, **args: object) -> str:
        """The error's code for a request that must be refused."""
        reply = self.call(op, token, **args)
        assert not reply["ok"] and reply["result"] is None and reply["error"]["message"], f"{op} {args}: {reply}"
        return reply["error"]["code"]

    @functools.cached_property
    def hello(self) -> dict:
        return self.ask("hello")["result"]

    def state(self) -> dict:
        """The reply to `state`, its result's fields beside the reply's own."""
        reply = self.ask("state", token="observer" + "0" * 8)
        return reply | reply["result"]

    def take(self, ttl: float = 10.0, takeover: bool = True) -> None:
        self.ask("acquire", name="test", token=self.token, ttl=ttl, takeover=takeover)

    def job(self, op: str, timeout: float = 60.0, **args: object) -> dict:
        """Run a job to its end; its last answer."""
        handle = uuid.uuid4().hex
        self.ask(op, handle=handle, **args)
        deadline = time.monotonic() + timeout
        while True:
            result = self.ask("job", handle=handle)["result"]
            if result["status"] in ("done", "failed"):
                return result
            assert time.monotonic() < deadline, f"{op} is still {result}"
            time.sleep(0.01)

    def done(self, op: str, **args: object) -> dict:
        result = self.job(op, **args)
        assert result["status"] == "done", result
        return result

    def wait_for(self, timeout: float = 20.0, **wanted: object) -> dict:
        """Poll the state until its fields are as wanted; the state."""
        found: dict = {}

        def there() -> bool:
            found.update(self.state())
            return all(found[name] == value for name, value in wanted.items())

        try:
            wait_until(there, timeout)
        except AssertionError as error:
            raise AssertionError(f"no {wanted} but {found}") from error
        return found

    def stream(self) -> list[float]:
        """Take the lease, recover if need be and start streaming; the pose to start from."""
        self.take()
        if self.state()["fault"] is not None:
            self.done("recover")
        self.done("start")
        return self.state()["reference"]


def use_keys(socket: zmq.Socket, keys: Path) -> None:
    """CURVE, with the files of `--keygen`."""
    socket.curve_serverkey, _ = zmq.auth.load_certificate(keys / "server.key")
    socket.curve_publickey, socket.curve_secretkey = zmq.auth.load_certificate(keys / "client.key_secret")


def subscribe(address: str) -> zmq.Socket:
    """The newest published state, always; close it."""
    socket = zmq.Context.instance().socket(zmq.SUB)
    socket.setsockopt(zmq.CONFLATE, 1)
    socket.setsockopt(zmq.SUBSCRIBE, b"")
    socket.setsockopt(zmq.LINGER, 0)
    socket.connect(address)
    return socket


def watch(address: str, seconds: float) -> list[dict]:
    """Everything published during `seconds`, in order."""
    with zmq.Context.instance().socket(zmq.SUB) as socket:
        socket.setsockopt(zmq.SUBSCRIBE, b"")
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(address)
        states, end = [], time.monotonic() + seconds
        while (rest := end - time.monotonic()) > 0:
            if socket.poll(rest * 1000):
                states.append(msgpack.unpackb(socket.recv()))
    return states


@contextlib.contextmanager
def serving(
    cwd: Path, *flags: object, timeout: float = 60.0, script: str | Path = "robot_server.py"
) -> Iterator[Popen]:
    """`python robot_server.py --port 0 *flags`, once it serves; process.requests and process.states are addresses."""
    with popen_script(script, "--port", 0, *flags, cwd=cwd) as process:
        found: list[re.Match] = []

        def ready() -> bool:
            found[:] = SERVING.finditer(process.stdout_path.read_text())
            return bool(found) or process.poll() is not None

        wait_until(ready, timeout)
        output = process.stdout_path.read_text() + process.stderr_path.read_text()
        assert found, f"the server ended with {process.poll()}: {output[-3000:]}"
        host, port, state_port = found[0].groups()
        process.requests, process.states = f"tcp://{host}:{port}", f"tcp://{host}:{state_port}"
        yield process


def moved(pose: list[float], x: float = 0.0, y: float = 0.0, z: float = 0.0) -> list[float]:
    return [pose[0] + x, pose[1] + y, pose[2] + z, *pose[3:]]


def follow(wire: Wire, targets: Callable[[float], list[float]], seconds: float, hz: float = 50.0) -> list[dict]:
    """Send `targets(t)` at `hz` for a while; the replies."""
    start, replies = time.monotonic(), []
    while (t := time.monotonic() - start) < seconds:
        replies.append(wire.ask("target", pose=targets(t)))
        time.sleep(max(start + len(replies) / hz - time.monotonic(), 0.0))
    return replies


def status_of(pid: int, name: str) -> int:
    """A number in /proc/PID/status."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1])


def fronts(pid: int) -> list[int]:
    """Process ids of a server's fronts: the one that serves first (libzmq has threads), then the spare one."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    alive = [int(child) for child in children if "State:\tZ" not in Path(f"/proc/{child}/status").read_text()]
    return sorted(alive, key=lambda child: -status_of(child, "Threads"))


def memory_mb(pid: int) -> float:
    """Resident memory of a server: the robot process and the front that serves."""
    return (status_of(pid, "VmRSS") + status_of(fronts(pid)[0], "VmRSS")) / 1024
