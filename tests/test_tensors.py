"""common/tensors.py: how PyTorch is set up; running statistics that are numpy's and stand spikes."""

import io
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from conftest import REPO, script_env

from common import tensors
from common.tensors import RunningNormalizer, check_memory, set_up_torch


@pytest.fixture(autouse=True, scope="module")
def _on_one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def statistics(data: np.ndarray) -> RunningNormalizer:
    """Those of observations `data` (N, O) that come one by one."""
    normalizer = RunningNormalizer(data.shape[1])
    for row in torch.tensor(data, dtype=torch.float32):
        normalizer.update(row[None])
    return normalizer


@pytest.mark.parametrize(
    "script", ["sac_state_sim", "sac_pixel_sim", "sac_pixel_real", "bc_flow_offline", "reward_classifier"]
)
def test_triton_is_imported_before_anything_renders(script, tmp_path):
    """PyTorch with CUDA on a machine without a GPU: after Mesa's renderer its import, by an optimizer, crashed."""
    (tmp_path / "triton.py").write_text("")
    code = f"import sys, {script}; assert 'triton' in sys.modules and 'OpenGL.EGL' not in sys.modules"
    env = script_env(tmp_path, {"PYTHONPATH": f"{tmp_path}{os.pathsep}{REPO}"})
    subprocess.run([sys.executable, "-c", code], env=env, check=True, cwd=tmp_path, timeout=60)


@pytest.mark.filterwarnings("error")
def test_observations_that_are_images_only():
    """P6: no numbers, and no warning of the variance of none."""
    normalizer = RunningNormalizer(0)
    for count in (1, 40, 1):
        normalizer.update(torch.zeros(count, 0))
    assert normalizer(torch.zeros(5, 0)).shape == (5, 0)


def test_they_are_numpys_mean_and_variance():
    data = np.random.default_rng(0).normal([0, 5, -100, 2], [1, 0.1, 30, 0], (1000, 4))
    x, in_parts = torch.tensor(data, dtype=torch.float32), RunningNormalizer(4)
    np.testing.assert_allclose(in_parts(x[:3]), data[:3].clip(-10, 10), rtol=1e-5)  # the identity, but for the clamp
    for chunk in torch.split(x, [1, 1, 300, 7, 500, 191]):
        in_parts.update(chunk)
    for normalizer in (in_parts, statistics(data)):
        np.testing.assert_allclose(normalizer.mean, data.mean(0), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(normalizer.var, data.var(0), rtol=1e-3, atol=1e-4)
        normal = normalizer(x)
        np.testing.assert_allclose(normal[:, :3].mean(0), np.zeros(3), atol=1e-3)
        np.testing.assert_allclose(normal[:, :3].std(0), np.ones(3), atol=5e-3)
        assert normalizer(torch.tensor([1e9, -1e9, 0, 2]))[:2].tolist() == [10, -10]
        assert normalizer.count == 1000


@pytest.mark.parametrize(("place", "spike"), [(0, 1e5), (5, -1e10), (31, 1e5), (100, -1e5), (599, 1e10)])
def test_one_spike_does_not_ruin_them(place, spike):
    """S4: wherever it comes, the spread of a feature stays of its own size; 1e5 made the others 0.0008 of it."""
    data = np.random.default_rng(0).normal([0, 5, 300], [1, 0.1, 30], (600, 3))
    spiked = data.copy()
    spiked[place] = spike
    with_spike, without = statistics(spiked), statistics(data)
    scale = (with_spike.var / without.var).sqrt()
    assert (scale > 0.99).all() and scale[[0, 2]].max() < 4, scale
    assert scale[1] < 8  # a range below 1 counts as 1
    assert ((with_spike.mean - without.mean).abs() < without.var.sqrt()).all()


def test_they_follow_a_feature_that_moves_late():
    """S4: what is clipped at first is learned: constant for 400 steps, then of the size of 500."""
    data = np.concatenate([np.zeros((400, 1)), np.random.default_rng(0).normal(0, 500, (400, 1))])
    assert statistics(data).var.sqrt().item() == pytest.approx(data.std(), rel=0.05)


def test_they_start_with_32_observations():
    """One by one or at once; what waits is part of a checkpoint, in one of many there may be spikes as well."""
    x = torch.tensor(np.random.default_rng(0).normal(size=(200, 3)), dtype=torch.float32)
    one, other, file = statistics(x[:31].numpy()), RunningNormalizer(3), io.BytesIO()
    assert one.count == 0
    np.testing.assert_allclose(one(x), x, rtol=1e-5)
    torch.save(one.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for normalizer in (one, other):
        normalizer.update(x[31:60])
        assert normalizer.count == 60
        np.testing.assert_allclose(normalizer.mean, x[:60].mean(0), atol=1e-5)
    spiked, at_once = x.clone(), RunningNormalizer(3)
    spiked[[17, 60], 1] = 1e9
    at_once.update(spiked)
    assert at_once.var[1].sqrt().item() < 5 * np.delete(x[:, 1].numpy(), [17, 60]).std()


# --- PyTorch on this machine ------------------------------------------------------------------------------------------
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
    monkeypatch.setattr(tensors.Path, "read_text", lambda self: cpuinfo)
    threads = torch.get_num_threads()
    try:
        assert set_up_torch(3, amp=False).type == "cpu" and torch.get_num_threads() == 3
        if fast:
            assert set_up_torch(1, amp=True).type == "cpu"
        else:
            with pytest.raises(SystemExit, match="--amp: this CPU has no bfloat16"):
                set_up_torch(1, amp=True)
    finally:
        torch.set_num_threads(threads)


def test_memory_is_announced_and_refused_in_one_line(monkeypatch, capsys):
    """S5: before it is taken; what is small is not mentioned."""
    monkeypatch.setattr(tensors, "free_memory", lambda: 5e9)
    check_memory(10**8, "buffer", "smaller")
    assert capsys.readouterr().out == ""
    check_memory(4 * 10**9, "buffer", "smaller")
    assert capsys.readouterr().out == "buffer: 4.0 GB\n"
    with pytest.raises(SystemExit, match=r"buffer needs 6.0 GB, 5.0 GB are free; give a smaller --buffer-size"):
        check_memory(6 * 10**9, "buffer", "give a smaller --buffer-size")


def test_free_memory_is_a_number_of_bytes():
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert size / 200 < tensors.free_memory() <= size or tensors.free_memory() == float("inf")


def test_tensors_as_bytes_and_back():
    ours = [torch.arange(6.0).view(2, 3), torch.tensor(7.0)]
    theirs = [torch.zeros(2, 3), torch.zeros(())]
    tensors.unpack_tensors(tensors.pack_tensors(ours), theirs)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs))
    with pytest.raises(SystemExit, match="the learner's policy has another size; give actor and learner the same flag"):
        tensors.unpack_tensors(tensors.pack_tensors(ours), theirs[:1])


def test_what_was_saved_fills_a_column():
    assert tensors.fill(torch.zeros(4), torch.ones(3)).tolist() == [1, 1, 1, 0]
    assert tensors.fill(torch.zeros(2), torch.ones(3)).tolist() == [1, 1, 1]


def test_a_generator_goes_on_or_begins_with_another_seed():
    """That of a GPU's run does not begin again with the numbers that the run began with."""
    ours, theirs = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    torch.rand(3, generator=theirs)
    tensors.load_generator(ours, theirs.get_state(), 7)
    assert torch.equal(torch.rand(3, generator=ours), torch.rand(3, generator=theirs))
    tensors.load_generator(ours, torch.zeros(16, dtype=torch.uint8), 7)
    assert torch.equal(torch.rand(3, generator=ours), torch.rand(3, generator=torch.Generator().manual_seed(7)))


@pytest.mark.parametrize("threads", [1, 2])
def test_a_call_on_the_second_thread_gives_its_result_once_it_is_asked_for(threads):
    second_thread = tensors.SecondThread(threads, torch.device("cpu"))
    begun, main = [], threading.get_ident()

    def add(a: int, b: int) -> tuple[int, bool]:
        begun.append(a)
        return a + b, threading.get_ident() == main

    first, second = second_thread(add, 1, 2), second_thread(add, 10, 20)
    if threads == 2:  # begins at once, in their order
        assert second() == (30, False) and begun == [1, 10] and first() == (3, False)
    else:  # waits for its turn
        assert begun == [] and second() == (30, True) and begun == [10] and first() == (3, True)
    with pytest.raises(ZeroDivisionError):
        second_thread(lambda: 1 // 0)()


def test_the_two_threads_share_pytorchs():
    threads = torch.get_num_threads()
    second_thread = tensors.SecondThread(4, torch.device("cpu"))
    assert torch.get_num_threads() == second_thread(torch.get_num_threads)() == 2
    torch.set_num_threads(threads)
