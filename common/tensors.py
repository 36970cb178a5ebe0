"""PyTorch on this machine: device, memory, a second thread, CUDA graphs, several processes; observations, scaled; steps
and weights as they are sent."""

import contextlib
import ctypes
import importlib
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from common.run import Run
from common.setup import RunArgs, fail, go_on

with contextlib.suppress(ImportError):  # PyTorch for CPUs comes without it
    importlib.import_module("triton")  # optimizers need it: crashes once Mesa's renderer has loaded its own LLVM


def set_up_torch(threads: int, amp: bool) -> torch.device:
    """Precision, threads and memory for speed; the device: a GPU if there is one.

    Exits with one line when `amp` asks for bfloat16 of a CPU that would have to emulate it.
    """
    torch.set_num_threads(max(1, threads))
    torch.set_float32_matmul_precision("medium")  # a GPU's TF32; on a CPU oneDNN, on AMD twice as fast as MKL
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD: keep freed activations, rather than have the
        libc.mallopt(-3, 1 << 25)  # system map them anew in every update
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if amp and device.type == "cpu" and not cpu_has_bfloat16():
        fail("--amp: this CPU has no bfloat16 units (AVX512-BF16, AMX), which makes it 14 times slower; leave it out")
    return device


def cpu_has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 matrices itself; Linux, elsewhere no."""
    with contextlib.suppress(OSError):
        return bool(re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", Path("/proc/cpuinfo").read_text()))
    return False


def check_memory(needed: int, what: str, remedy: str) -> None:
    """Says what takes more than 1 GB (bytes) before it is taken. Exits with one line when there is not enough."""
    if needed < 1 << 30:
        return
    print(f"{what}: {needed / 1e9:.1f} GB", flush=True)
    free = free_memory()
    if needed > free:
        fail(f"{what} needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; {remedy}")


def free_memory() -> float:
    """Bytes that can still be taken, swap and other programs apart; infinite where the system does not say."""
    with contextlib.suppress(OSError):
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        return 1024.0 * int(found[1])
    return float("inf")


def expand(mask: Tensor, like: Tensor) -> Tensor:
    """A mask (...) with dimensions of size 1 behind, as many as `like` (..., D) has more."""
    return mask[(...,) + (None,) * (like.ndim - mask.ndim)]


def fill(column: Tensor, saved: Tensor) -> Tensor:
    """`column` that begins with the rows `saved`, or those when it is shorter."""
    if len(saved) > len(column):
        return saved
    column[: len(saved)] = saved
    return column


def load_generator(generator: torch.Generator, state: Tensor, other_seed: int) -> None:
    """The generator as it was; `other_seed` when the state is a GPU's and is read on a CPU, or vice versa."""
    if state.shape == generator.get_state().shape:
        generator.set_state(state.cpu())
    else:
        generator.manual_seed(other_seed)


class SecondThread:
    """Calls on a second thread of the CPU; each of the two has half of PyTorch's threads."""

    def __init__(self, threads: int, device: torch.device):
        """There is no second thread on a GPU, or where `threads` is 1: what is called waits for its turn there."""
        self.pool: ThreadPoolExecutor | None = None
        if threads > 1 and device.type == "cpu":
            torch.set_num_threads(threads // 2)
            self.pool = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads // 2,))

    def __call__(self, function: Callable, *inputs: object) -> Callable:
        """Begins `function(*inputs)`; what it returns gives the result when it is called, once."""
        if self.pool:
            return self.pool.submit(function, *inputs).result
        return partial(function, *inputs)


class Graphed:
    """A function of tensors on a GPU as one CUDA graph: everything that it launches is launched together.

    Its first `eager` calls run as usual on a side stream (they compile, and fill the optimizers), then one is captured
    for each value of the keyword arguments. The results are the same tensors in every call.
    """

    def __init__(self, function: Callable[..., Tensor | dict], generator: torch.Generator, eager: int):
        self.function, self.generator, self.eager = function, generator, eager
        self.calls = 0
        self.graphs: dict[tuple, tuple] = {}

    def __call__(self, *inputs: Tensor, **options: bool) -> Tensor | dict:
        self.calls += 1
        if self.calls <= self.eager:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                results = self.function(*inputs, **options)
            torch.cuda.current_stream().wait_stream(stream)
            return results
        key = tuple(options.items())
        if key not in self.graphs:
            graph = torch.cuda.CUDAGraph()
            static_inputs = [tensor.clone() for tensor in inputs]
            graph.register_generator_state(self.generator)
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # a loader pins memory meanwhile
                results = self.function(*static_inputs, **options)
            self.graphs[key] = graph, static_inputs, results
        graph, static_inputs, results = self.graphs[key]
        for static, tensor in zip(static_inputs, inputs, strict=True):
            static.copy_(tensor)
        graph.replay()
        return results


class RunningNormalizer(nn.Module):
    """Running mean and variance of observations; the identity until FIRST of them have come.

    A value far outside the range seen so far is taken for one REACH ranges away, so that a spike cannot ruin them; a
    range below 1 counts as 1.
    """

    FIRST, REACH = 32, 10

    def __init__(self, dim: int, enabled: bool = True):
        super().__init__()
        self.enabled = enabled  # else the identity
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("var", torch.ones(dim))
        self.register_buffer("low", torch.zeros(dim))
        self.register_buffer("high", torch.zeros(dim))
        self.register_buffer("first", torch.zeros(self.FIRST, dim))  # the first observations, until they are enough
        self.register_buffer("waiting", torch.zeros((), dtype=torch.long))  # how many these are

    def update(self, obs: Tensor) -> None:
        """Takes in observations (N, O)."""
        if not self.enabled or obs.shape[1] == 0:  # images only
            return
        parts = [obs]
        if self.count == 0:
            parts = [*(row[None] for row in self.first[: self.waiting]), obs]
            seen = torch.cat(parts)
            if len(seen) < self.FIRST:
                self.first[: len(seen)] = seen
                self.waiting.fill_(len(seen))
                return
            outer = 1 + len(seen) // 100  # at either end they may be spikes
            self.low.copy_(seen.kthvalue(1 + outer, 0).values)
            self.high.copy_(seen.kthvalue(len(seen) - outer, 0).values)
        for part in parts:
            self.add(part)

    def fit(self, obs: Tensor) -> None:
        """Takes in observations (N, O) that are all there will be, however few."""
        self.update(obs.repeat(math.ceil(self.FIRST / len(obs)), 1))

    def add(self, obs: Tensor) -> None:
        """Chan et al. 1979, parallel variance."""
        reach = self.REACH * (self.high - self.low).clamp(min=1)
        obs = obs.clamp(self.low - reach, self.high + reach)
        self.low.copy_(torch.minimum(self.low, obs.amin(0)))
        self.high.copy_(torch.maximum(self.high, obs.amax(0)))
        total = self.count + len(obs)
        delta = obs.mean(0) - self.mean
        weight = len(obs) / total
        self.var += weight * (obs.var(0, correction=0) - self.var + (1 - weight) * delta.square())
        self.mean += weight * delta
        self.count.copy_(total)

    def forward(self, obs: Tensor) -> Tensor:
        if not self.enabled:
            return obs
        return ((obs - self.mean) * (self.var + 1e-6).rsqrt()).clamp(-10, 10)


# --- What actor and learner send --------------------------------------------------------------------------------------
def step_type(obs_dim: int, action_dim: int, frames: tuple[int, ...] = ()) -> np.dtype:
    """One step as it is journalled and sent: an action and what followed; `first`: a reset, without an action.

    With images, `frames` is the shape (N, K, H, W, 3) of the newest N of its observation's stack: the older ones are
    in the steps before.
    """
    fields = [("action", "f4", (action_dim,)), ("reward", "f4"), ("terminated", "?"), ("first", "?")]
    fields.append(("observation", "f4", (obs_dim,)))
    if frames:
        fields.append(("frames", "u1", frames))
    return np.dtype(fields)


def pack_step(dtype: np.dtype, action: np.ndarray | None, obs, reward=0.0, terminated=False) -> np.ndarray:
    """A step of type `step_type` (); without an action a reset. `obs`: an array, or with images {"images", "state"}."""
    step = np.zeros((), dtype)
    if "frames" in dtype.names:
        step["frames"] = obs["images"][-len(step["frames"]) :]
        obs = obs["state"].reshape(-1)
    step["observation"] = obs
    step["first"] = action is None
    if action is not None:
        step["action"] = action
        step["reward"] = reward
        step["terminated"] = terminated
    return step


def check_steps(dtype: np.dtype, data: bytes) -> None:
    """Raises ValueError when packed steps hold numbers that are not finite."""
    steps = np.frombuffer(data, dtype)
    for name in ("action", "reward", "observation"):
        if not np.isfinite(steps[name]).all():
            raise ValueError(f"{name}: numbers are not finite")


def pack_tensors(tensors: list[Tensor]) -> bytes:
    """Tensors one after the other, as float32."""
    return torch.cat([tensor.flatten() for tensor in tensors]).cpu().numpy().tobytes()


def unpack_tensors(data: bytes, tensors: list[Tensor]) -> None:
    """Fills `tensors` with what `pack_tensors` made of such. Exits with one line when they are not of these shapes."""
    vector = torch.frombuffer(bytearray(data), dtype=torch.float32)
    sizes = [tensor.numel() for tensor in tensors]
    if len(vector) != sum(sizes):
        fail("the learner's policy has another size; give actor and learner the same flags")
    for tensor, values in zip(tensors, vector.split(sizes), strict=True):
        tensor.copy_(values.reshape(tensor.shape))


# --- Processes that learn together ------------------------------------------------------------------------------------
def world_size() -> int:
    """How many there are: `torchrun --nproc-per-node N SCRIPT ...`."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """Which of them this one is; the first is 0."""
    return int(os.environ.get("RANK", 0))


def join_processes(device: torch.device) -> None:
    """Each has a GPU of its own, where there are any; waits for the others where there are any."""
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if world_size() > 1 and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))  # rank 0 may evaluate long


def as_the_first_says(text: str, device: torch.device) -> str:
    """The first process's `text`, in all of them; 4096 bytes, the longest path, at most."""
    if world_size() == 1:
        return text
    data = torch.tensor(list(os.fsencode(text).ljust(4096, b"\0")), dtype=torch.uint8, device=device)
    dist.broadcast(data, 0)
    return os.fsdecode(bytes(data.tolist()).rstrip(b"\0"))


class Follower(Run):
    """The run as processes beside the first see it: they read its checkpoint and write nothing."""

    def create(self) -> None:
        pass

    def claim(self) -> None:
        pass

    def open(self, total: int, unit="step", option="", waits_for="the update") -> None:
        self.unit = self.doing = waits_for
        self.bar = tqdm(disable=True)
        self.restart_timer()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.on_signal)

    def save(self, finished: bool = False) -> None:
        pass


def any_process(yes: bool, device: torch.device) -> bool:
    """Whether any process says yes; all of them learn it at the same call."""
    if world_size() == 1:
        return yes
    count = torch.tensor(float(yes), device=device)
    dist.all_reduce(count)
    return bool(count > 0)


def mean_over_processes(tensors: list[Tensor]) -> list[Tensor]:
    """Of each tensor, in one message."""
    if world_size() == 1:
        return tensors
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    means = (flat / world_size()).split([tensor.numel() for tensor in tensors])
    return [mean.view_as(tensor) for mean, tensor in zip(means, tensors, strict=True)]


@contextlib.contextmanager
def others_end_well(args: RunArgs) -> Iterator[None]:
    """Another process of this job, or a worker that reads images, has ended: so does this one, with one line."""
    try:
        yield
    except RuntimeError as error:
        said = str(error).strip(" .\n")
        if said.startswith("DataLoader worker (pid"):
            fail(f"{said}; is memory, or /dev/shm, too small for it? --num-workers 0 needs none; {go_on(args)}")
        if world_size() == 1 or not any(word in said.lower() for word in ("gloo", "nccl", "peer")):
            raise
        fail(f"process {rank()}: another process of this job has ended, see its message; {go_on(args)}")


def ignore_ctrl_c(_: int) -> None:
    """In a worker that reads images: the process that it reads for is asked to end as well, and ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
