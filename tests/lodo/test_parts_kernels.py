"""The compiled kernels of a diagonal G with its parts (`lodo.fused`) against the plain form: a step, and trainings."""

import copy
from itertools import product

import pytest
import torch

import lodo
from lodo import meta
from lodo.bases import AdamBase
from lodo.composite import Composite
from lodo.fused import Fused, put_together
from lodo.mixture import Mixture
from lodo.preconditioners import Identity
from lodo.scalars import is_tensor
from lodo.scale import LARGEST_LOG, Scale
from lodo.step import lodo_step
from tests.helpers.kernels import needs_compiler
from tests.helpers.parts import backward, built, entry_of, flat

pytestmark = needs_compiler

DTYPES = (torch.float32, torch.float64)
DECAYS = (0.0, 0.3, 0.9, 0.999)  # forgetting more than half a momentum in a step, and less
LENGTHS = {
    "one": [1],
    "less than a chunk": [2047],
    "a chunk": [2048],
    "more than a chunk": [2049],
    "several": [0, 1, 2047, 0, 2049, 3, 9000, 0],
    "several threads": [2**17 + 5, 3, 0, 70_001],
}
sizes = pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
dtypes = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture
def plain(monkeypatch):
    """Makes something with plain torch in place of the kernels."""

    def made(make, *args, **options):
        with monkeypatch.context() as patch:
            patch.setenv("LODO_NATIVE", "0")
            return make(*args, **options)

    return made


def random(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def table(*shape, seed=0):
    """What `descend_` advances, after some steps: its second moments are positive."""
    found = random(meta.ROWS, *shape, seed=seed)
    found[2].square_().add_(0.1)
    return found


def agree(found, expected, roundings=20):
    """Equal to a few roundings of the largest number."""
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    tolerance = roundings * torch.finfo(expected.dtype).eps * scale
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def with_threads(count, work):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count)
        return work()
    finally:
        torch.set_num_threads(before)


class Parts:
    """A G with some of its parts after some steps, and all that a step changes: with the kernels, or in plain torch if
    LODO_NATIVE is 0 while it is made. Whoever asks for float32 in a `wide` form gets the same numbers in float64."""

    def __init__(
        self,
        lengths,
        dtype,
        wide=False,
        *,
        base=True,
        scale=True,
        mixture=True,
        trace=0.7,
        network="log_diagonal",
        inner="adam",
        steps=7,
        **options,
    ):
        n, self.steps, used = sum(lengths), steps, torch.float64 if wide else dtype

        def vectors(*shape, seed):
            return random(*shape, dtype=dtype, seed=seed).to(used)

        self.g, self.m, self.e = vectors(n, seed=1), vectors(n, seed=2), vectors(n, seed=3) if trace else None
        is_learned = network == "log_diagonal"
        self.network = lodo.LogDiagonal(vectors(n, seed=4)) if is_learned else Identity(n, used)
        self.moments = (
            (vectors(n, seed=5), vectors(n, seed=6).square_().add_(0.1)) if is_learned and inner == "adam" else None
        )
        self.square = (random(n, seed=10).clamp_(-2, 2).mul_(7).exp_() if base else torch.zeros(n)).to(dtype).to(used)
        self.square[1::3] = 0
        shapes = [torch.Size([length]) for length in lengths]
        self.base = AdamBase(shapes, {"base_exp_avg_sq": self.square}) if base else None
        self.scale = Scale(table(len(lengths), seed=7), torch.zeros(n, dtype=used), lengths) if scale else None
        if scale:
            self.scale.table[0, -2:] = torch.tensor([-100.0, 100.0])[-len(lengths) :]  # bounded: S must have an inverse
        self.momenta = vectors(len(DECAYS), n, seed=8)
        mixed = table(len(DECAYS), len(lengths), seed=9)
        self.mixture = Mixture(self.momenta, mixed, DECAYS, lengths) if mixture else None
        self.operator = put_together(self.network, self.base, self.scale, steps - 1, lengths)
        self.options = {"beta": 0.9, "meta_lr": 0.02, "meta_optimizer": inner, "trace": trace, "mix_lr": 0.3, **options}

    def step(self, *, active=True, last_lr=0.3):
        """Takes one, and returns it."""
        own = (self.g, self.m, self.operator, self.moments)
        numbers = (self.steps, last_lr, 0.7, active, active)
        return lodo_step(*own, *numbers, **self.options, e=self.e, mixture=self.mixture, steps=self.steps)

    def kept(self):
        """Copies of all that a step changes, by name."""
        exp_avg, exp_avg_sq = self.moments or (None, None)
        tensors = {"m": self.m, "e": self.e, "theta": self.network.theta, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        tensors |= {"v": self.square, "momenta": self.momenta, "mixture": self.mixture and self.mixture.table}
        return {name: tensor.clone() for name, tensor in tensors.items() if tensor is not None}

    def gains(self):
        """The diagonal of G / lr."""
        return self.operator.apply(torch.ones_like(self.g))


class Scales:
    """A scale with what it learns from, in the same two forms."""

    def __init__(self, lengths, dtype, wide=False):
        n, used = sum(lengths), torch.float64 if wide else dtype
        self.moves, self.g = random(n, dtype=dtype).to(used), random(n, dtype=dtype, seed=1).to(used)
        self.table = table(len(lengths), seed=2)
        self.scale = Scale(self.table, self.moves, lengths)

    def learn_(self, steps=7, active=True):
        self.scale.learn_(self.g, 0.3, steps, active)
        return self


# ---- one step ------------------------------------------------------------------------------------------------------

CASES = {
    "all parts": {},
    "the first step": {"steps": 1},
    "the second step": {"steps": 2},
    "a late step": {"steps": 50_000},
    "inner SGD": {"inner": "sgd", "meta_lr": 1e-9},
    "no network": {"network": "identity"},
    "no base": {"base": False},
    "no scale": {"scale": False},
    "no trace": {"trace": 0.0},
    "one momentum": {"mixture": False},
    "one momentum, mostly forgotten": {"mixture": False, "beta": 0.2},
    "one momentum, no trace": {"mixture": False, "trace": 0.0},
    "nothing that learns": {"network": "identity", "mixture": False},
    "frozen": {"meta_lr": 0.0},
    "bounded": {"max_condition": 4.0},
}


@sizes
@dtypes
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_step_is_that_of_the_plain_form(lengths, dtype, case, plain):
    found, expected = Parts(lengths, dtype, **case), plain(Parts, lengths, dtype, **case)
    assert type(found.operator) is Fused
    assert type(expected.operator) is Composite
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(found.gains(), expected.gains(), rtol=32 * rounding, atol=0)
    step, plain_step = found.step(), expected.step()
    torch.testing.assert_close(found.gains(), expected.gains(), rtol=200 * rounding, atol=0)
    agree(step / found.gains(), plain_step / expected.gains(), 100)
    others = expected.kept()
    for name, tensor in found.kept().items():
        if name != "mixture":
            agree(tensor, others[name], 100)


@sizes
@dtypes
@pytest.mark.parametrize("case", ["all parts", "no network", "no scale", "a late step"])
def test_a_mixture_learns_in_a_step_as_in_plain_float64(lengths, dtype, case, plain):
    """Sums over many float32 numbers too: the kernel adds up few of them in float32."""
    found, expected = Parts(lengths, dtype, **CASES[case]), plain(Parts, lengths, dtype, True, **CASES[case])
    before = found.mixture.table.clone()
    found.step(), expected.step()
    table, wide, tolerance = found.mixture.table, expected.mixture.table, 1e-4 if dtype == torch.float32 else 1e-9
    has_any = torch.tensor(lengths) > 0
    assert (table != before)[:, :, has_any].all()
    for row, other in zip(table, wide, strict=True):
        torch.testing.assert_close(row, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


@dtypes
def test_what_a_step_does_not_teach_it_leaves_alone(dtype):
    lengths = LENGTHS["several"]
    for case, steps in ((CASES["the first step"], 1), (CASES["the second step"], 2), ({}, 7)):
        parts = Parts(lengths, dtype, **case)
        before = parts.kept()
        parts.step(last_lr=0.3 if steps < 7 else 0.0)
        # After one step the corrected momenta are the same, and a step of length zero tells nothing of its direction.
        assert torch.equal(parts.kept()["mixture"], before["mixture"])
    parts = Parts(lengths, dtype, **CASES["frozen"])
    before = parts.kept()
    parts.step()
    for name in ("theta", "exp_avg", "exp_avg_sq"):
        assert torch.equal(parts.kept()[name], before[name])


@dtypes
@pytest.mark.parametrize("kernel", ["native", "plain"])
@pytest.mark.parametrize("case", ["all parts", "inner SGD", "one momentum, no trace"])
def test_an_inactive_step_leaves_every_bit(dtype, kernel, case, monkeypatch):
    if kernel == "plain":
        monkeypatch.setenv("LODO_NATIVE", "0")
    parts, scales = Parts(LENGTHS["several"], dtype, **CASES[case]), Scales(LENGTHS["several"], dtype)
    before, gains, scale_table = parts.kept(), parts.gains(), scales.table.clone()
    assert torch.equal(parts.step(active=False), torch.zeros_like(parts.m))
    scales.learn_(active=False)
    for name, tensor in parts.kept().items():
        assert torch.equal(tensor, before[name]), name
    assert torch.equal(parts.gains(), gains)
    assert torch.equal(scales.table, scale_table)


@dtypes
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_threads_do_not_change_a_bit(dtype, case):
    """Of what is large enough to wake four, tensors that end within a chunk of it included."""
    lengths = LENGTHS["several threads"]

    def work():
        parts = Parts(lengths, dtype, **case)
        return [
            parts.gains(),
            parts.step(),
            parts.gains(),
            *parts.kept().values(),
            Scales(lengths, dtype).learn_().table,
        ]

    for one, four in zip(with_threads(1, work), with_threads(4, work), strict=True):
        assert torch.equal(one, four)


# ---- what tables learn from ----------------------------------------------------------------------------------------


@sizes
@dtypes
def test_scales_learn_as_their_plain_form_does_in_float64(lengths, dtype, plain):
    found, expected = Scales(lengths, dtype).learn_().table, plain(Scales, lengths, dtype, True).learn_().table
    assert (found != table(len(lengths), seed=2)).all()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@sizes
@dtypes
@pytest.mark.parametrize("power", [-1.0, 1.0, 100.0])
def test_scales_multiply_within_their_bound(lengths, dtype, power):
    scale, vector = Scales(lengths, dtype).scale, random(sum(lengths), dtype=dtype, seed=5)
    before = vector.clone()
    found = scale.times(vector, power)
    assert torch.equal(vector, before)
    factors = (power * scale.table[0]).clamp(-LARGEST_LOG, LARGEST_LOG).exp()
    expected = factors.repeat_interleave(torch.tensor(lengths)) * vector
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-6, atol=0)


BAD = (float("nan"), float("inf"), -float("inf"))


@dtypes
@pytest.mark.parametrize("bad", BAD)
def test_products_that_are_not_finite_count_as_zero(dtype, bad, plain):
    lengths = [3, 5000, 4]

    def learned(parts, momentum, gradient):
        parts.momenta[1, 4000] = momentum  # of one decay on the second tensor
        parts.momenta[1, 3:4000], parts.momenta[1, 4001:5003] = 0, 0
        parts.g[-1] = gradient  # for all decays of the third
        parts.g[-4:-1] = 0
        parts.step()
        return parts.mixture.table

    found, expected = learned(Parts(lengths, dtype), bad, bad), learned(Parts(lengths, dtype), 0, 0)
    wide = learned(plain(Parts, lengths, dtype, True), bad, bad)
    assert torch.equal(found, expected)
    torch.testing.assert_close(found, wide, rtol=1e-4, atol=1e-4)
    found, expected, wide = Scales(lengths, dtype), Scales(lengths, dtype), plain(Scales, lengths, dtype, True)
    found.g[7], wide.g[7] = bad, bad
    expected.g[3:5003] = 0
    for own in (found, expected, wide):
        own.learn_()
    assert torch.equal(found.table, expected.table)
    torch.testing.assert_close(found.table, wide.table, rtol=1e-5, atol=1e-5)


def test_products_whose_squares_would_overflow_are_bounded_alike(plain):
    """So that a second moment stays finite, and comes down again."""

    def learned(make):
        parts, scales = make(Parts, [5, 7], torch.float64, scale=False), make(Scales, [5, 7], torch.float64)
        parts.g[2] = scales.g[2] = 1e160
        parts.step()
        return parts.mixture.table, scales.learn_().table

    native = learned(lambda kind, *args, **options: kind(*args, **options))
    for found, expected in zip(native, learned(plain), strict=True):
        assert found.isfinite().all()
        assert found[2].max() > 1e300
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


# ---- training ------------------------------------------------------------------------------------------------------

SHAPES = ((3, 4), (5,), (), (2, 3, 2), (0, 3), (1,))
PARTS = {
    "decays": (0.0, 0.9, 0.99),
    "mix_lr": 0.02,
    "trace": 0.7,
    "scale_lr": 0.02,
    "scale_trace": 0.9,
    "meta_lr": 0.01,
}
INNER = ({}, {"meta_optimizer": "sgd"}, {"meta_state_dtype": "bfloat16"})


def trained(kind, **options):
    params, optimizer = built(kind, SHAPES, **options)
    for _ in range(40):
        backward(params)
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize(
    ("kind", "inner"),
    [("identity", {}), *product(("log_diagonal", "block_permutation"), INNER)],  # the first has no inner optimizer
    ids=str,
)
@pytest.mark.parametrize("base", [None, "adam", "soap"])
def test_a_training_is_the_same_without_the_kernels(base, kind, inner, monkeypatch):
    params, optimizer = trained(kind, base=base, **PARTS, **inner)
    monkeypatch.setenv("LODO_NATIVE", "0")
    others, other = trained(kind, base=base, **PARTS, **inner)
    torch.testing.assert_close(flat(params), flat(others), rtol=0, atol=1e-9)
    assert (flat(params) - flat(built(kind, SHAPES)[0])).abs().max() > 0.1
    found, expected = entry_of(optimizer), entry_of(other)
    assert found.keys() == expected.keys() >= {"momenta", "mixture", "trace", "scale", "moves"}
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(
                found[name], value, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: name + text
            )
    for p, q in zip(params[1:], others[1:], strict=True):
        torch.testing.assert_close(optimizer.state[p]["momentum"], other.state[q]["momentum"], rtol=0, atol=1e-9)
    assert (found["mixture"][0] - found["mixture"][0, :, :1]).abs().max() > 1e-3  # weights that differ by tensor


@pytest.mark.parametrize("kind", ["log_diagonal", "block_permutation"])
def test_a_scale_that_has_fallen_below_all_numbers_ruins_nothing(kind, kernel):
    """float32 has no exp(100): its tensor stands still, and neither the network nor the others hear of an infinity."""
    params = [torch.nn.Parameter(random(*shape, dtype=torch.float32)) for shape in ((3, 4), (5,))]
    optimizer = lodo.LODO(params, lr=0.01, preconditioner=kind, depth=3, base="adam", **{**PARTS, "trace": 0.0})
    for step in range(8):
        if step == 3:
            saved = copy.deepcopy(optimizer.state_dict())
            saved["state"][0]["scale"][0, 0] = -100
            optimizer.load_state_dict(saved)
            before = [p.detach().clone() for p in params]
        for p in params:
            p.grad = p.detach().sin()
        optimizer.step()
    assert all(
        value.isfinite().all() for entry in optimizer.state.values() for value in entry.values() if is_tensor(value)
    )
    assert all(p.isfinite().all() for p in params)
    assert (params[0] - before[0]).abs().max() < 1e-3 < (params[1] - before[1]).abs().min()
