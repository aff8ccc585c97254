"""Every faster path against the plain one: parameters and state, step by step."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from oracle import KINDS, fresh

import lodo
from lodo import kernels, meta, scalars
from lodo.kernels import native, reference
from lodo.scalars import Cell, choose, energy

RATES = meta.Rates(step_size=0.01, forget1=0.1, keep2=0.9, forget2=0.1, count=3)
needs_compiler = pytest.mark.skipif(native.library() is None, reason="no C++ compiler on this machine")


def tensors(size, layers, block, expansion, permutation, dtype):
    shape = lodo.BlockPermutation.theta_shape(
        size, {"depth": layers, "block_size": block, "expansion": expansion, "permutation": permutation}
    )
    theta = torch.randn(shape, dtype=dtype) / block**0.5
    padded = block * shape[3]
    indices = torch.stack([torch.randperm(padded) for _ in range(layers)]).int() if permutation == "random" else None
    moments = (0.1 * torch.randn(shape, dtype=dtype), 0.1 * torch.rand(shape, dtype=dtype))
    return theta, moments, indices, torch.randn(size, dtype=dtype), torch.randn(size, dtype=dtype)


def close(found, expected):
    """Equal to a few roundings of the largest number."""
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    tolerance = 200 * torch.finfo(expected.dtype).eps * scale
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@needs_compiler
@pytest.mark.parametrize("inner", ["adam", "sgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("permutation", ["random", "shuffle"])
@pytest.mark.parametrize(
    ("size", "layers", "block", "expansion"),
    [
        (1, 1, 1, 1),
        (1, 3, 4, 2),
        (2, 2, 2, 1),
        (3, 2, 7, 1),
        (7, 4, 3, 2),
        (41, 16, 4, 2),
        (41, 2, 41, 1),
        (1000, 2, 5, 1.1),
        (4099, 2, 8, 2),
        (9001, 3, 4, 1),  # several tiles, the last one not full
        (30_000, 2, 2, 2),
        (20_000, 1, 16, 1),
    ],
)
def test_native_equals_reference(size, layers, block, expansion, permutation, dtype, inner):
    theta, moments, indices, g, m = tensors(size, layers, block, expansion, permutation, dtype)
    copies = (theta.clone(), tuple(moment.clone() for moment in moments))
    work = torch.full((kernels.work_size(theta, indices, learning=True),), float("nan"), dtype=dtype)
    close(native.matvec(theta, indices, g, work), reference.matvec(theta, indices, g))
    given = moments if inner == "adam" else None
    reference.learn_(theta, given, indices, g, m, 0.3, RATES)
    native.learn_(copies[0], copies[1] if inner == "adam" else None, indices, g, m, 0.3, RATES, work)
    close(copies[0], theta)
    for found, expected in zip(copies[1], moments, strict=True):
        close(found, expected)


@needs_compiler
@pytest.mark.parametrize("permutation", ["random", "shuffle"])
def test_threads_do_not_change_a_bit(permutation):
    """Large enough that each thread gets several tiles."""
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            theta, moments, indices, g, m = tensors(50_000, 3, 4, 2, permutation, torch.float32)
            work = torch.empty(kernels.work_size(theta, indices, learning=True))
            native.learn_(theta, moments, indices, g, m, 0.3, RATES, work)
            results.append((theta, *moments, native.matvec(theta, indices, g, work)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for found, expected in zip(other, results[0], strict=True):
            assert torch.equal(found, expected)


def train(steps, **options):
    x = torch.nn.Parameter(torch.linspace(-1, 1, 321, dtype=torch.float64))
    optimizer = lodo.LODO([x], lr=0.2, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        (x.cos() * torch.linspace(-1, 1, 321)).sum().backward()
        optimizer.step()
    return x.detach(), optimizer


@needs_compiler
@pytest.mark.parametrize("options", [{}, {"permutation": "shuffle", "block_size": 3}, {"meta_optimizer": "sgd"}])
def test_fifty_steps_agree_on_parameters_and_state(options, monkeypatch):
    x, optimizer = train(50, meta_lr=1e-3, **options)
    monkeypatch.setenv("LODO_NATIVE", "0")
    plain_x, plain = train(50, meta_lr=1e-3, **options)
    torch.testing.assert_close(x, plain_x, rtol=1e-10, atol=1e-10)
    for entry, expected in zip(optimizer.state.values(), plain.state.values(), strict=True):
        assert entry.keys() == expected.keys()
        for name in entry:
            torch.testing.assert_close(entry[name], expected[name], rtol=1e-7, atol=1e-10)


def test_without_a_compiler_the_plain_kernels_serve(tmp_path):
    """An empty PATH and an empty cache: one step works, nothing is printed, nothing is built."""
    code = (
        "import torch, lodo; from lodo.kernels import native; x = torch.nn.Parameter(torch.ones(9)); "
        "x.grad = torch.ones(9); lodo.LODO([x]).step(); assert native.library() is None; assert x[0] < 1"
    )
    root = str(Path(lodo.__file__).parents[1])
    environment = {"PATH": "", "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": root}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout == ""
    assert not list(tmp_path.rglob("*.so"))


@pytest.fixture
def reload():
    """Forgets the loaded library before and after a test."""
    native._load.cache_clear()
    yield native._load
    native._load.cache_clear()


def test_a_compiler_that_cannot_compile_does_no_harm(tmp_path, monkeypatch, reload):
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\n[ $1 = --version ]\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert reload() is None
    assert not list(tmp_path.rglob("*.so"))


@needs_compiler
@pytest.mark.parametrize("cache", ["a file", "open to others", "no home"])
def test_where_the_cache_cannot_be_used_the_library_is_private(cache, tmp_path, monkeypatch, reload):
    folder = tmp_path / "lodo"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if cache == "a file":
        folder.write_text("")
    elif cache == "open to others":
        folder.mkdir()
        folder.chmod(0o777)
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")

        def no_home():
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", no_home)
    assert native._cache_folder() is None
    assert reload() is not None
    assert not list(tmp_path.rglob("*.so"))


@needs_compiler
def test_the_library_is_built_once(tmp_path, monkeypatch, reload):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert reload() is not None
    (built,) = (tmp_path / "lodo").iterdir()
    reload.cache_clear()
    monkeypatch.setattr(native.os, "replace", None)
    assert reload() is not None
    assert list((tmp_path / "lodo").iterdir()) == [built]


def steps_with_gaps(kind, inner):
    """Twelve steps, of which the first and the sixth are skipped; checks that those change nothing."""
    x = torch.nn.Parameter(torch.linspace(-1, 1, 33))
    optimizer = lodo.LODO([x], lr=0.1, weight_decay=0.1, preconditioner=kind, depth=3, meta_optimizer=inner)
    for step in range(12):
        x.grad = x.detach().sin() * (float("nan") if step in (0, 5) else 1.0)
        before = {name: value.clone() for name, value in optimizer.state[x].items() if name != "format"}
        start = x.detach().clone()
        with pytest.warns(UserWarning, match="skipped a step") if step == 0 else nullcontext():
            optimizer.step()
        unchanged = {name for name, value in before.items() if torch.equal(optimizer.state[x][name], value)}
        if step in (0, 5):
            assert torch.equal(x, start)
            assert unchanged | {"skipped"} >= before.keys()
        elif step > 2:
            assert not {"theta", "momentum", "meta_step"} & unchanged
    assert optimizer.skipped_steps == 2
    return x.detach(), optimizer.state[x]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inner", ["adam", "sgd"])
def test_scalars_on_the_device_equal_plain_ones(kind, inner, monkeypatch):
    """On an accelerator lr, counts and flags are 0-dim tensors: the same steps, skipped ones included."""
    monkeypatch.setenv("LODO_NATIVE", "0")
    x, state = steps_with_gaps(kind, inner)
    monkeypatch.setattr(scalars, "is_readable", lambda tensor: False)
    other_x, other_state = steps_with_gaps(kind, inner)
    torch.testing.assert_close(other_x, x, rtol=1e-5, atol=1e-6)
    assert other_state.keys() == state.keys()
    for name, value in state.items():
        torch.testing.assert_close(other_state[name], value, rtol=1e-5, atol=1e-6)


def test_cells_and_numbers(monkeypatch):
    host = Cell(torch.tensor(2.5))
    monkeypatch.setattr(scalars, "is_readable", lambda tensor: False)
    device = Cell(torch.tensor(2.5))
    assert host.get() == 2.5
    assert isinstance(host.get(), float)
    assert device.get() is device.tensor
    for cell in (host, device):
        cell.set(torch.tensor([3.0]))
        assert float(cell.tensor) == 3.0
        cell.set(4.0)
        assert float(cell.tensor) == 4.0
    assert energy(torch.tensor([1.0, -7.0])) == 50.0
    assert choose(False, 1.0, 2.0) == 2.0
    assert choose(torch.tensor(True), torch.tensor(1.0), torch.tensor(2.0)) == 1.0


@needs_compiler
def test_no_allocation_of_the_native_step_grows_with_theta():
    """What it allocates is bounded by a few vectors of n numbers, theta has 128 n."""
    g = fresh("block_permutation", 4000, dtype=torch.float32)
    moments = meta.start_moments(g.theta)
    v = torch.randn(4000)
    g.learn_(v, v, 0.1, moments, RATES)
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        g.learn_(v, v, 0.1, moments, RATES)
        g.apply(v)
    grown = sum(max(0, event.self_cpu_memory_usage) for event in profile.key_averages())
    assert grown <= 4 * 4000 * 2


@needs_compiler
def test_concurrent_products_do_not_disturb_each_other():
    g = fresh("block_permutation", 8000, dtype=torch.float32)
    vectors = torch.randn(40, 8000)
    expected = [g.matvec(v) for v in vectors]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(g.matvec, vectors))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
