"""Every faster path against the plain one: parameters and state, step by step."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import lodo
from lodo import inner_optimizer, rounding, scalars
from lodo.kernels import native, reference
from lodo.rounding import random_words, to_bfloat16
from lodo.scalars import Cell, energy, where
from tests.helpers.kernels import RATES, close, needs_compiler, neighbours, residual_tensors, tensors
from tests.helpers.oracle import KINDS, fresh


def close_in_bfloat16(found, expected, eps):
    """Equal, but for few numbers that differed before the stochastic rounding, by a few roundings of theta's dtype,
    and came down on the two sides of one step of bfloat16 (or of several, where they nearly cancel)."""
    assert found.dtype == expected.dtype == torch.bfloat16
    assert (found != expected).sum() <= 0.01 * found.numel()
    steps = neighbours(found) - neighbours(expected)
    roundings = 200 * eps * expected.float().abs().max()
    assert ((steps.abs() <= 1) | ((found.float() - expected.float()).abs() <= roundings)).all()


def moments_close(found_moments, expected_moments, inner, dtype):
    for found, expected in zip(found_moments, expected_moments, strict=True):
        if inner == "adam in bfloat16":
            close_in_bfloat16(found, expected, torch.finfo(dtype).eps)
        else:
            close(found, expected)


@needs_compiler
@pytest.mark.parametrize("inner", ["adam", "adam in bfloat16", "sgd"])
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
    moments_dtype = torch.bfloat16 if inner == "adam in bfloat16" else dtype
    theta, moments, indices, g, m = tensors(size, layers, block, expansion, permutation, dtype, moments_dtype)
    copies = (theta.clone(), tuple(moment.clone() for moment in moments))
    work = native.prepare(theta, indices, learning=True, kept=None).fill_(float("nan"))
    close(native.matvec(theta, indices, g, work), reference.matvec(theta, indices, g))
    reference.learn_(theta, None if inner == "sgd" else moments, indices, g, m, 0.3, RATES)
    native.learn_(copies[0], None if inner == "sgd" else copies[1], indices, g, m, 0.3, RATES, work)
    close(copies[0], theta)
    moments_close(copies[1], moments, inner, dtype)


@needs_compiler
@pytest.mark.parametrize("inner", ["adam", "adam in bfloat16", "sgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("size", "layers", "padded"),
    [
        (1, 1, 1),
        (1, 0, 2),
        (2, 3, 2),
        (7, 2, 14),
        (41, 64, 82),
        (41, 5, 77),  # a last stretch of layers that is short
        (100, 63, 100),
        (4099, 7, 8199),  # several tiles, the last one not full
        (30_000, 4, 30_000),
    ],
)
def test_native_residuals_equal_reference(size, layers, padded, dtype, inner):
    moments_dtype = torch.bfloat16 if inner == "adam in bfloat16" else dtype
    theta, moments, indices, g, m = residual_tensors(size, layers, padded, dtype, moments_dtype)
    copies = (theta.clone(), tuple(moment.clone() for moment in moments))
    close(native.residual_matvec(theta, indices, g), reference.residual_matvec(theta, indices, g))
    reference.residual_learn_(theta, None if inner == "sgd" else moments, indices, g, m, 0.3, RATES)
    native.residual_learn_(copies[0], None if inner == "sgd" else copies[1], indices, g, m, 0.3, RATES)
    close(copies[0], theta)
    moments_close(copies[1], moments, inner, dtype)


@needs_compiler
@pytest.mark.parametrize("moments_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("permutation", ["random", "shuffle"])
def test_threads_do_not_change_a_bit(permutation, moments_dtype):
    """Large enough that each thread gets several tiles."""
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            theta, moments, indices, g, m = tensors(50_000, 3, 4, 2, permutation, torch.float32, moments_dtype)
            work = native.prepare(theta, indices, learning=True, kept=None)
            native.learn_(theta, moments, indices, g, m, 0.3, RATES, work)
            results.append((theta, *moments, native.matvec(theta, indices, g, work)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for found, expected in zip(other, results[0], strict=True):
            assert torch.equal(found, expected)


@needs_compiler
@pytest.mark.parametrize("moments_dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_a_bit_of_residuals(moments_dtype):
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            theta, moments, indices, g, m = residual_tensors(50_000, 5, 70_001, torch.float32, moments_dtype)
            native.residual_learn_(theta, moments, indices, g, m, 0.3, RATES)
            results.append((theta, *moments, native.residual_matvec(theta, indices, g)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for found, expected in zip(other, results[0], strict=True):
            assert torch.equal(found, expected)


@needs_compiler
@pytest.mark.parametrize("how", ["native", "reference", "scalars on the device"])
@pytest.mark.parametrize("count", [0, 5])
@pytest.mark.parametrize("moments_dtype", [torch.float32, torch.bfloat16])
def test_an_inactive_step_leaves_every_bit(moments_dtype, count, how):
    theta, moments, indices, g, m = tensors(999, 3, 4, 2, "random", torch.float32, moments_dtype)
    before = [tensor.clone() for tensor in (theta, *moments)]
    numbers = (torch.tensor(float(count)), torch.tensor(0.0)) if how == "scalars on the device" else (count, 0)
    rates = inner_optimizer.rates("adam", 0.1, *numbers, torch.float32)
    if how == "native":
        work = native.prepare(theta, indices, learning=True, kept=None)
        native.learn_(theta, moments, indices, g, m, 0.3, rates, work)
    else:
        reference.learn_(theta, moments, indices, g, m, 0.3, rates)
    for found, expected in zip((theta, *moments), before, strict=True):
        assert torch.equal(found.view(torch.int16), expected.view(torch.int16))


# ---- stochastic rounding -------------------------------------------------------------------------------------------


def test_numbers_that_bfloat16_holds_keep_their_bits():
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    numbers = patterns.view(torch.bfloat16)
    for words in (random_words(0, 2**16, 7, numbers.device), torch.full((2**16,), rounding.MASK)):
        for dtype in (torch.float32, torch.float64):
            found = to_bfloat16(numbers.to(dtype), words)
            assert torch.equal(found.isnan(), numbers.isnan())
            assert torch.equal(found.view(torch.int16)[~numbers.isnan()], patterns[~numbers.isnan()])


def test_large_numbers_stay_large():
    """float32 numbers beyond the largest of bfloat16 become that or infinity, with their sign; others, finite ones."""
    largest = torch.finfo(torch.bfloat16).max
    values = torch.tensor([torch.finfo(torch.float32).max, largest, 0.99 * largest, float("inf")])
    for bits in (0, 0x1234, 0x8000, 0xFFFF):
        found = to_bfloat16(torch.cat((values, -values)), torch.full((8,), bits)).float()
        assert torch.equal(found[4:], -found[:4])
        assert found[0] >= largest
        assert found[1] == largest
        assert 0.98 * largest < found[2] <= largest
        assert found[3] == float("inf")
    assert to_bfloat16(torch.tensor([1e300], dtype=torch.float64), torch.zeros(1).long()) == float("inf")


@pytest.mark.parametrize("kernel", ["reference", pytest.param("native", marks=needs_compiler)])
def test_not_a_number_stays_one(kernel):
    """Whatever its bits: NVIDIA's is 0x7fffffff, to which nothing may be added."""
    values = torch.tensor([0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32).view(torch.float32)
    for count in range(1, 20):
        found = torch.zeros(3, dtype=torch.bfloat16)
        {"reference": reference, "native": native}[kernel].round_into_(found, values, count)
        assert found.isnan().all()


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 7, 70_001])
@pytest.mark.parametrize("count", [0, 1, 70_000])
def test_native_rounding_draws_the_same_bits(count, size, dtype):
    values = torch.randn(size, dtype=dtype)
    found, expected = torch.zeros(2, size, dtype=torch.bfloat16)
    native.round_into_(found, values, count)
    reference.round_into_(expected, values, count)
    assert torch.equal(found, expected)
    assert size < 100 or not torch.equal(found, values.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("half", ["M", "V"])
def test_the_rounding_is_right_on_average(half, dtype):
    """Each element's mean over the counts, in standard errors of a coin with the element's own probability."""
    values = torch.randn(1000, dtype=dtype) * torch.logspace(-8, 8, 1000, dtype=dtype)
    low = to_bfloat16(values, torch.zeros(1000).long()).double()
    high = to_bfloat16(values, torch.full((1000,), 0xFFFF)).double()
    counts = 2000
    total = torch.zeros(1000, dtype=torch.float64)
    for count in range(1, counts + 1):
        words = random_words(5000, 1000, count, values.device)
        rounded = to_bfloat16(values, words if half == "M" else words >> 16).double()
        assert ((rounded == low) | (rounded == high)).all()
        total += rounded
    up = (values.double() - low) / (high - low)
    errors = (total / counts - values) / (high - low) / (up * (1 - up) / counts).sqrt().clamp(min=2**-16)
    assert errors.abs().max() < 5
    assert abs(errors.square().mean() - 1) < 0.25
    assert abs(errors.mean()) < 5 / 1000**0.5


def correlation(a, b):
    return float(torch.corrcoef(torch.stack((a, b)).double())[0, 1])


def test_random_words_are_uniform_and_unrelated():
    """Both halves of the words, along the elements of a step and along the steps of an element."""
    n = 2**18
    device = torch.device("cpu")
    along_elements = random_words(0, n, 3, device)
    along_steps = torch.cat([random_words(11, 1, count, device) for count in range(1, 2**13)])
    for words in (along_elements, along_steps):
        for half in (words & 0xFFFF, words >> 16):
            expected = len(words) / 64
            excess = ((half // 1024).bincount(minlength=64) - expected).square().sum() / expected  # chi^2, 63 degrees
            assert 20 < excess < 130
            assert abs(correlation(half[1:], half[:-1])) < 5 / len(half) ** 0.5
        assert not torch.equal(words & 0xFFFF, words >> 16)
        assert abs(correlation(words & 0xFFFF, words >> 16)) < 5 / len(words) ** 0.5
    assert 0 <= along_elements.min() <= along_elements.max() <= rounding.MASK
    assert abs(correlation(along_elements, random_words(0, n, 4, device))) < 5 / n**0.5
    assert len(along_elements.unique()) == n  # the hash is a permutation of the 32-bit numbers


def test_random_words_depend_on_element_and_count_alone():
    device = torch.device("cpu")
    whole = random_words(0, 100, 12, device)
    assert torch.equal(random_words(40, 25, 12, device), whole[40:65])
    for salt in (12.0, torch.tensor(12.0), torch.tensor(12.0, dtype=torch.float64), 2**32 + 12):
        assert torch.equal(random_words(0, 100, salt, device), whole)
    assert torch.equal(random_words(2**32 + 40, 25, 12, device), whole[40:65])


def test_the_second_moment_falls_which_it_would_not_rounded_to_nearest():
    """With h = 0, V is to fall by 0.1 % a step, and bfloat16 numbers lie 0.4 to 0.8 % apart."""
    theta = torch.zeros(4096)
    start = torch.linspace(0.5, 4, 4096).bfloat16()
    moments = (torch.zeros_like(start), start.clone())
    for count in range(1, 1001):
        inner_optimizer.update_(
            theta, torch.zeros_like(theta), moments, inner_optimizer.rates("adam", 0.0, count, 1, theta.dtype)
        )
    expected = inner_optimizer.BETA2**1000 * start.float()
    assert abs(float(moments[1].float().mean() / expected.mean()) - 1) < 0.01
    assert (moments[1].float() / expected - 1).abs().max() < 0.5
    assert torch.equal((inner_optimizer.BETA2 * start.float()).bfloat16(), start)


def train(steps, **options):
    x = torch.nn.Parameter(torch.linspace(-1, 1, 321, dtype=torch.float64))
    optimizer = lodo.LODO([x], lr=0.2, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        (x.cos() * torch.linspace(-1, 1, 321)).sum().backward()
        optimizer.step()
    return x.detach(), optimizer


@needs_compiler
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"permutation": "shuffle", "block_size": 3},
        {"meta_optimizer": "sgd"},
        {"preconditioner": "residual"},
        {"preconditioner": "residual", "meta_optimizer": "sgd", "depth": 3, "expansion": 1},
    ],
)
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


def steps_with_gaps(kind, inner, dtype=torch.float32, **options):
    """Twelve steps, of which the first and the sixth are skipped; checks that those change nothing, and that theta
    changes in the steps that learn."""
    x = torch.nn.Parameter(torch.linspace(-1, 1, 33, dtype=dtype))
    optimizer = lodo.LODO([x], lr=0.1, weight_decay=0.1, preconditioner=kind, depth=3, meta_optimizer=inner, **options)
    for step in range(12):
        x.grad = x.detach().sin() * (float("nan") if step in (0, 5) else 1.0)
        before = {name: value.clone() for name, value in optimizer.state[x].items() if name != "format"}
        start = x.detach().clone()
        with pytest.warns(UserWarning, match="skipped a step") if step == 0 else nullcontext():
            optimizer.step()
        unchanged = {name for name, value in before.items() if torch.equal(optimizer.state[x][name], value)}
        if step in (0, 5):
            assert torch.equal(x, start)
            assert unchanged | {"skipped_steps"} >= before.keys()
        elif step > 2:
            learns = int(optimizer.state[x]["step"]) % options.get("meta_every", 1) == 0
            learning = {"theta", "meta_step"} if inner == "sgd" else {"theta", "meta_step", "theta_exp_avg"}
            assert learning & unchanged == (set() if learns else learning)
            assert not {"momentum", "steps"} & unchanged
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


@pytest.mark.parametrize("options", [{"meta_every": 3}, {"meta_state_dtype": "bfloat16"}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_scalars_on_the_device_serve_the_options_too(kind, options, monkeypatch):
    """In float64, where the numbers before a stochastic rounding differ too little to be rounded differently."""
    monkeypatch.setenv("LODO_NATIVE", "0")
    x, state = steps_with_gaps(kind, "adam", torch.float64, **options)
    monkeypatch.setattr(scalars, "is_readable", lambda tensor: False)
    other_x, other_state = steps_with_gaps(kind, "adam", torch.float64, **options)
    torch.testing.assert_close(other_x, x, rtol=1e-10, atol=1e-12)
    assert other_state.keys() == state.keys()
    for name, value in state.items():
        torch.testing.assert_close(other_state[name], value, rtol=1e-10, atol=1e-12)


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
    assert where(False, 1.0, 2.0) == 2.0
    assert where(torch.tensor(True), torch.tensor(1.0), torch.tensor(2.0)) == 1.0


@needs_compiler
def test_no_allocation_of_the_native_step_grows_with_theta():
    """What it allocates is bounded by a few vectors of n numbers, theta has 128 n."""
    g = fresh("block_permutation", 4000, dtype=torch.float32)
    moments = inner_optimizer.start_moments(g.theta)
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
