"""The Triton kernels against plain torch: compiled where there is a GPU, else in Triton's interpreter."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lodo
from lodo import inner_optimizer, kernels, scalars
from lodo.kernels import gpu, native, reference
from tests.helpers.kernels import RATES, close, tensors
from tests.helpers.oracle import fresh

triton = pytest.importorskip("triton", reason="Triton is not installed")
ROOT = Path(__file__).parents[2]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
SIZES = [
    (1, 1, 1, 1),
    (1, 3, 4, 2),
    (3, 2, 7, 1),
    (7, 4, 3, 2),
    (41, 5, 4, 2),
    (130, 2, 5, 1.1),
    (513, 2, 8, 2),
    (1201, 3, 4, 1),  # a pair and a single layer; several tiles, the last one not full
    (1500, 4, 2, 1),
    (300, 2, 16, 1),
]


@pytest.fixture
def device(monkeypatch):
    """Where the kernels run: compiled on a CUDA device, or on CPU tensors in the interpreter (see conftest.py)."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
        pytest.skip("the interpreter of Triton < 3.7 does not work with NumPy >= 1.25")
    monkeypatch.setattr(gpu, "is_ready", lambda tensor: True)
    monkeypatch.setattr(native, "available", lambda theta: False)
    return torch.device("cpu")


def example(device, *args):
    theta, moments, indices, g, m = tensors(*args)
    indices = None if indices is None else indices.to(device)
    return theta.to(device), tuple(moment.to(device) for moment in moments), indices, g.to(device), m.to(device)


def clones(tensors):
    return tuple(tensor.clone() for tensor in tensors)


def assert_learns_alike(learn_, plain_learn_, theta, moments, inner):
    """`learn_` and `plain_learn_` do the same to copies of theta and moments; returns the moments that they leave."""
    found, expected = (theta.clone(), clones(moments)), (theta.clone(), clones(moments))
    learn_(found[0], found[1] if inner == "adam" else None)
    plain_learn_(expected[0], expected[1] if inner == "adam" else None)
    assert not torch.equal(expected[0], theta)
    close(found[0], expected[0])
    return found[1], expected[1]


@pytest.fixture(params=["one program", "a program per tile"])
def launches(request, monkeypatch):
    """Whether one program does a whole network, or there is one for every tile of a layer."""
    monkeypatch.setattr(gpu, "SINGLE_PROGRAM", 1 << 30 if request.param == "one program" else 0)


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize(("dtype", "inner"), [(torch.float32, "adam"), (torch.float64, "adam"), (torch.float32, "sgd")])
@pytest.mark.parametrize("permutation", ["random", "shuffle"])
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_networks(shape, permutation, dtype, inner, device):
    theta, moments, indices, g, m = example(device, *shape, permutation, dtype)
    kept = gpu.prepare(indices, None)
    close(gpu.matvec(theta, indices, g, kept), reference.matvec(theta, indices, g))
    found, expected = assert_learns_alike(
        lambda theta, moments: gpu.learn_(theta, moments, indices, g, m, 0.3, RATES, kept),
        lambda theta, moments: reference.learn_(theta, moments, indices, g, m, 0.3, RATES),
        theta,
        moments,
        inner,
    )
    for one, other in zip(found, expected, strict=True):
        close(one, other)


@pytest.mark.parametrize("shape", [(41, 4, 4, 2), (1201, 3, 2, 1)], ids=str)
def test_pairs_of_layers_equal_single_ones(shape, device, monkeypatch):
    results = []
    theta, moments, _, g, m = example(device, *shape, "shuffle", torch.float32)
    for paired in ({2: 8, 4: 16}, {}):
        monkeypatch.setattr(gpu, "PAIRED", paired)
        copies = (theta.clone(), clones(moments))
        gpu.learn_(*copies, None, g, m, 0.3, RATES, None)
        results.append((copies[0], *copies[1], gpu.matvec(theta, None, g, None)))
    for one, other in zip(*results, strict=True):
        close(one, other)


def assert_rounded_alike(found, expected):
    """Equal but for a few numbers, whose float32 values lie a rounding apart and fall to two sides of a threshold."""
    assert found.dtype == torch.bfloat16
    assert (found != expected).float().mean() <= 0.01
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-6)


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize("permutation", ["random", "shuffle"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_networks_with_bfloat16_moments(permutation, dtype, device):
    theta, moments, indices, g, m = example(device, 801, 5, 4, 1, permutation, dtype)
    found, expected = assert_learns_alike(
        lambda theta, moments: gpu.learn_(theta, moments, indices, g, m, 0.3, RATES, gpu.prepare(indices, None)),
        lambda theta, moments: reference.learn_(theta, moments, indices, g, m, 0.3, RATES),
        theta,
        tuple(moment.bfloat16() for moment in moments),
        "adam",
    )
    for one, other in zip(found, expected, strict=True):
        assert_rounded_alike(one, other)


@pytest.mark.parametrize("inner", ["adam", "bfloat16", "sgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 7, 41, 1500])
@pytest.mark.parametrize("kind", ["residual", "diagonal"])
def test_residual_and_diagonal(kind, size, dtype, inner, device):
    g = fresh(kind, size, dtype=dtype, depth=7).to(dtype, device)
    vectors = torch.randn(2, size, dtype=dtype).to(device)
    indices = () if kind == "diagonal" else (g.permutations_stored,)
    moments = tuple(0.1 * torch.rand_like(g.theta) for _ in range(2))
    if inner == "bfloat16":
        moments = tuple(moment.bfloat16() for moment in moments)
    if kind == "residual":
        arguments = (g.theta, *indices, vectors[0])
        close(gpu.residual_matvec(*arguments), reference.residual_matvec(*arguments))
    found, expected = assert_learns_alike(
        lambda theta, moments: getattr(gpu, f"{kind}_learn_")(theta, moments, *indices, *vectors, 0.3, RATES),
        lambda theta, moments: getattr(reference, f"{kind}_learn_")(theta, moments, *indices, *vectors, 0.3, RATES),
        g.theta,
        moments,
        "sgd" if inner == "sgd" else "adam",
    )
    for one, other in zip(found, expected, strict=True):
        (assert_rounded_alike if inner == "bfloat16" else close)(one, other)


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize("moment_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["shuffle", "random", "residual", "diagonal"])
def test_an_inactive_step_leaves_every_bit(kind, moment_dtype, device):
    options = {"permutation": kind} if kind in ("shuffle", "random") else {}
    g = fresh("block_permutation" if options else kind, 90, dtype=torch.float32, depth=3, **options)
    g = g.to(torch.float32, device)
    moments = tuple(torch.rand_like(g.theta).to(moment_dtype) for _ in range(2))
    before = clones((g.theta, *moments))
    count, active = torch.tensor(5.0, dtype=torch.float64, device=device), torch.tensor(0.0, device=device)
    rates = inner_optimizer.rates("adam", 0.1, count, active, torch.float32)
    g.learn_(*torch.randn(2, 90).to(device), torch.tensor(0.3, dtype=torch.float64, device=device), moments, rates)
    for found, expected in zip((g.theta, *moments), before, strict=True):
        assert torch.equal(found, expected)


def train(device, dtype, steps, **options):
    x, y = (torch.nn.Parameter(torch.linspace(-1, 1, n).to(device, dtype)) for n in (41, 88))
    optimizer = lodo.LODO([x, y], lr=0.3, meta_lr=1e-2, weight_decay=0.01, depth=3, **options)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):  # gradients that do not depend on the steps, which would spread their roundings
        for p in (x, y):
            p.grad = torch.randn(len(p), generator=generator).to(device, dtype)
        if step == 4:
            y.grad[3] = float("nan")
        optimizer.step()
    return (x, y), optimizer


@pytest.mark.filterwarnings("ignore:LODO skipped a step")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"permutation": "shuffle"},
        {"permutation": "shuffle", "meta_every": 2, "meta_state_dtype": "bfloat16", "momentum_dtype": "bfloat16"},
        {"meta_optimizer": "sgd", "block_size": 5},
        {"preconditioner": "residual"},
        {"preconditioner": "diagonal"},
        {"preconditioner": "scalar"},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_steps_agree_on_parameters_and_state(dtype, options, device, monkeypatch):
    """Whole steps, one of them skipped, with the scalars on the device as on CUDA."""
    monkeypatch.setattr(scalars, "is_readable", lambda tensor: False)
    params, optimizer = train(device, dtype, 8, **options)
    monkeypatch.setattr(gpu, "is_ready", lambda tensor: False)
    expected, plain = train(device, dtype, 8, **options)
    assert optimizer.skipped_steps == plain.skipped_steps == 1
    atol = (
        1e-3 if "momentum_dtype" in options else 1e-5
    )  # a number that is rounded to the other side moves what follows
    for p, q in zip(params, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=max(1e-4, torch.finfo(dtype).eps), atol=atol)
        found, other = optimizer.state[p], plain.state[q]
        assert found.keys() == other.keys()
        for name in found:
            if name != "format" and found[name].dtype == torch.bfloat16:
                assert (found[name] != other[name]).float().mean() <= 0.02
            else:
                torch.testing.assert_close(found[name], other[name], rtol=1e-4, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, torch.tensor(70_000)])
def test_rounding_to_bfloat16_draws_the_same_bits(count, dtype, device):
    values = torch.randn(2500, dtype=dtype).to(device)
    found, expected = (torch.zeros(2500, dtype=torch.bfloat16, device=device) for _ in range(2))
    count = count.to(device) if isinstance(count, torch.Tensor) else count
    gpu.round_into_(found, values, count)
    reference.round_into_(expected, values, count)
    assert torch.equal(found, expected)
    assert not torch.equal(found, values.bfloat16())


def test_rounding_to_bfloat16_keeps_what_is_not_finite(device):
    """Every NaN too, whatever its bits: NVIDIA's is 0x7fffffff."""
    words = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7F800000, -0x800000], dtype=torch.int32)
    values = words.view(torch.float32).to(device)
    for count in range(1, 20):
        found = torch.zeros(5, dtype=torch.bfloat16, device=device)
        gpu.round_into_(found, values, count)
        assert found.isnan().tolist() == [True, True, True, False, False]
        assert found[3:].tolist() == [float("inf"), -float("inf")]


def test_what_the_kernels_do_not_take_runs_in_plain_torch(device):
    theta, _, indices, _, _ = example(device, 40, 2, gpu.MAX_BLOCK + 1, 1, "random", torch.float32)
    assert not gpu.available(theta)
    assert not gpu.available(theta[:0])  # no layers
    assert kernels.for_network(theta, indices, True, None) == (reference, None)


def test_inverse_permutations():
    permutations = torch.stack([torch.randperm(30) for _ in range(3)]).int()
    inverse = gpu.prepare(permutations, None)
    assert torch.equal(inverse.long(), permutations.argsort(dim=1))
    assert gpu.prepare(permutations, inverse) is inverse
    assert gpu.prepare(None, None) is None


def test_triton_is_loaded_only_where_it_runs():
    """Importing lodo and stepping on a CPU loads no Triton, and a Triton that cannot be imported does no harm."""
    code = (
        "import sys, torch, lodo; from lodo.kernels import gpu; before = set(sys.modules); "
        "x = torch.nn.Parameter(torch.ones(9)); x.grad = torch.ones(9); lodo.LODO([x]).step(); "
        "assert 'lodo.kernels.gpu_kernels' not in sys.modules; sys.modules['triton'] = None; assert gpu.code() is None"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.compile
@pytest.mark.skipif(sys.platform != "linux", reason="Triton brings its assembler on Linux only")
def test_every_kernel_compiles_for_sm_90_without_spills(tmp_path):
    """Those of float32 networks, with no GPU at hand; `python -m benchmarks.kernel_resources` takes float64 too."""
    command = [sys.executable, "-m", "benchmarks.kernel_resources", "--numbers", "float32", "--out", str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    with (tmp_path / "kernel_resources.csv").open() as file:
        rows = list(csv.DictReader(file))
    code = (ROOT / "lodo" / "kernels" / "gpu_kernels.py").read_text()
    assert {row["kernel"] for row in rows} == set(re.findall(r"do_not_specialize=SIZES\)\ndef (\w+)", code))
    assert all(int(row["spilled_bytes"]) == 0 and int(row["registers"]) > 0 for row in rows)


# ---- CUDA graphs ----------------------------------------------------------------------------------------------------


def test_what_may_not_be_captured_is_refused(monkeypatch):
    """Before anything has changed: without capturable=True, and before the networks are there."""
    x = torch.nn.Parameter(torch.ones(5))
    x.grad = torch.ones(5)
    capturable, other = lodo.LODO([x], capturable=True), lodo.LODO([x])
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="capturable must be True in every param group"):
        other.step()
    with pytest.raises(RuntimeError, match="take at least one step before the capture"):
        capturable.step()
    assert torch.equal(x, torch.ones(5))
    assert not capturable.state
    monkeypatch.undo()
    capturable.step()
    learned = lodo.LODO([x], capturable=True, preconditioner=capturable.preconditioners[0])
    loaded = lodo.LODO([x], capturable=True)
    loaded.load_state_dict(capturable.state_dict())
    assert loaded.preconditioners[0] is not None
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    capturable.step()  # has all it needs
    for optimizer in (learned, loaded):  # have their state, but nothing that the kernels prepare
        with pytest.raises(RuntimeError, match="take at least one step before the capture"):
            optimizer.step()


def captured(optimizer, warm_up):
    """A CUDA graph of one step, after as many steps outside."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph


@pytest.mark.cuda
@needs_cuda
@pytest.mark.filterwarnings("ignore:LODO skipped a step")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"permutation": "shuffle"},
        {"permutation": "shuffle", "meta_every": 3, "meta_state_dtype": "bfloat16", "momentum_dtype": "bfloat16"},
        {"preconditioner": "residual", "depth": 5},
        {"preconditioner": "diagonal"},
        {"preconditioner": "scalar"},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [300, 20_000])
def test_a_replayed_graph_takes_the_steps_that_eager_ones_take(size, options):
    """With gradients, a skipped step and an lr that change between replays, bit for bit."""
    generator = torch.Generator("cuda").manual_seed(0)
    gradients = torch.randn(8, size, device="cuda", generator=generator)
    gradients[5, 7] = float("nan")
    lr = torch.tensor(0.1, device="cuda")
    eager, replayed = (torch.nn.Parameter(torch.ones(size, device="cuda")) for _ in range(2))
    optimizers = [lodo.LODO([x], lr=lr, capturable=True, **options) for x in (eager, replayed)]
    for x in (eager, replayed):
        x.grad = gradients[0].clone()
    for _ in range(2):
        optimizers[0].step()
    graph = captured(optimizers[1], warm_up=2)  # capturing takes no step
    for step, gradient in enumerate(gradients):
        lr.fill_(0.1 / (1 + step))
        for x in (eager, replayed):
            x.grad.copy_(gradient)
        optimizers[0].step()
        graph.replay()
    assert torch.equal(eager, replayed)
    one, other = optimizers[0].state[eager], optimizers[1].state[replayed]
    assert one.keys() == other.keys()
    for name in one.keys() - {"format"}:
        assert torch.equal(one[name], other[name]), name
    assert optimizers[1].skipped_steps == 1


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("permutation", ["random", "shuffle"])
def test_the_first_steps_on_cuda_equal_those_on_the_cpu(permutation):
    results = []
    for device in ("cpu", "cuda"):
        x = torch.nn.Parameter(torch.linspace(-1, 1, 5000, device=device))
        optimizer = lodo.LODO([x], lr=0.1, permutation=permutation)
        for _ in range(5):
            x.grad = x.detach().sin()
            optimizer.step()
        results.append((x.detach().cpu(), optimizer.preconditioners[0].blocks.cpu()))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
