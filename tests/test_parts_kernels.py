"""The compiled kernels of the parts (mixture, scale, base, gains) against their plain forms, alone and in training."""

import copy
from itertools import product

import pytest
import torch
from test_kernels import needs_compiler
from test_parts import backward, built, entry_of, flat

import lodo
from lodo import meta
from lodo.bases import AdamBase
from lodo.mixture import Mixture
from lodo.scalars import is_tensor
from lodo.scale import Scale

pytestmark = needs_compiler

DTYPES = (torch.float32, torch.float64)
DECAYS = (0.0, 0.3, 0.9, 0.999)  # forgetting more than half a momentum in a step, and less
LENGTHS = {
    "nothing": [0],
    "one": [1],
    "less than a chunk": [4095],
    "a chunk": [4096],
    "more than a chunk": [4097],
    "several": [0, 1, 4095, 0, 4097, 3, 9000, 0],
    "several threads": [2**17 + 5, 3, 0, 70_001],
}
sizes = pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
dtypes = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture
def plain(monkeypatch):
    """Makes something with plain torch in place of the kernels."""

    def made(make, *args):
        with monkeypatch.context() as patch:
            patch.setenv("LODO_NATIVE", "0")
            return make(*args)

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


class Momenta:
    """A mixture, what it is given and what it changes. Whoever asks for `dtype` float32 in a `wide` form gets the same
    numbers in float64."""

    def __init__(self, lengths, dtype, wide=False):
        n, count = sum(lengths), len(DECAYS)
        used = torch.float64 if wide else dtype
        self.momenta, self.g = random(count, n, dtype=dtype).to(used), random(n, dtype=dtype, seed=1).to(used)
        self.m, self.table = torch.full((n,), float("nan"), dtype=used), table(count, len(lengths), seed=2)
        self.mixture = Mixture(self.momenta, self.table, DECAYS, lengths)

    def learn_(self, steps=7, active=True):
        self.mixture.learn_(self.g, 0.3, steps, active)
        return self

    def mix_(self, steps=7, active=True):
        self.mixture.mix_(self.m, self.g, steps, active)
        return self

    def copies(self):
        return self.momenta.clone(), self.m.clone(), self.table.clone()


class Scales:
    """The same of a scale."""

    def __init__(self, lengths, dtype, wide=False):
        n, used = sum(lengths), torch.float64 if wide else dtype
        self.moves, self.g = random(n, dtype=dtype).to(used), random(n, dtype=dtype, seed=1).to(used)
        self.table = table(len(lengths), seed=2)
        self.scale = Scale(self.table, self.moves, lengths)

    def learn_(self, steps=7, active=True):
        self.scale.learn_(self.g, 0.3, steps, active)
        return self


class Gains:
    """What a `LogDiagonal` learns from, with its inner optimizer."""

    def __init__(self, size, dtype, kind):
        self.network = lodo.LogDiagonal(random(size, dtype=dtype))
        self.reply, self.m = random(size, dtype=dtype, seed=1), random(size, dtype=dtype, seed=2)
        moments = random(size, dtype=dtype, seed=3), random(size, dtype=dtype, seed=4).square()
        self.moments = moments if kind == "adam" else None
        self.kind = kind

    def learn_(self, active=True):
        rates = meta.rates(self.kind, 0.02, 5, active, self.reply.dtype)
        self.network.learn_from_(self.reply.clone(), self.m, 0.7, self.moments, rates)
        return self

    def copies(self):
        return [tensor.clone() for tensor in (self.network.theta, *(self.moments or ()))]


# ---- a kernel and its plain form -----------------------------------------------------------------------------------


@sizes
@dtypes
@pytest.mark.parametrize("steps", [3, 1000])
def test_a_mixture_learns_as_its_plain_form_does_in_float64(lengths, dtype, steps, plain):
    """Sums of float32 numbers too: the kernel adds them up in float64."""
    before = table(len(DECAYS), len(lengths), seed=2)
    found = Momenta(lengths, dtype).learn_(steps).table
    expected = plain(Momenta, lengths, dtype, True).learn_(steps).table
    assert (found != before).all()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@sizes
@dtypes
@pytest.mark.parametrize("steps", [1, 7])
def test_a_mixture_mixes_as_its_plain_form_does(lengths, dtype, steps, plain):
    found, expected = Momenta(lengths, dtype).mix_(steps), plain(Momenta, lengths, dtype).mix_(steps)
    agree(found.momenta, expected.momenta)
    agree(found.m, expected.m)
    assert torch.equal(found.momenta[0], found.g)
    assert torch.equal(found.table, expected.table)


@sizes
@dtypes
def test_scales_learn_as_their_plain_form_does_in_float64(lengths, dtype, plain):
    found, expected = Scales(lengths, dtype).learn_().table, plain(Scales, lengths, dtype, True).learn_().table
    assert (found != table(len(lengths), seed=2)).all()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@sizes
@dtypes
@pytest.mark.parametrize("has_other", [False, True])
@pytest.mark.parametrize("power", [-1.0, 1.0, 100.0])
def test_scales_multiply_as_their_plain_form_does(lengths, dtype, power, has_other, plain):
    ours, theirs = Scales(lengths, dtype), plain(Scales, lengths, dtype)
    vector, other = (random(sum(lengths), dtype=dtype, seed=seed) for seed in (5, 6))
    before = vector.clone()
    found, expected = (own.scale.times(vector, power, other if has_other else None) for own in (ours, theirs))
    assert torch.equal(vector, before)
    torch.testing.assert_close(found, expected, rtol=4 * torch.finfo(dtype).eps, atol=0)
    by_hand = (power * ours.table[0]).clamp(-64, 64).exp().repeat_interleave(torch.tensor(lengths))
    by_hand = by_hand * vector * other if has_other else by_hand * vector
    torch.testing.assert_close(found.double(), by_hand.double(), rtol=1e-6, atol=0)


@sizes
@dtypes
@pytest.mark.parametrize("is_scaled", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 5000])
def test_the_gains_of_a_base_are_those_of_its_plain_form(lengths, dtype, is_scaled, steps, plain):
    """From second moments of zero on, over all orders of magnitude, with and without a gradient to take in."""
    n, shapes = sum(lengths), [torch.Size([length]) for length in lengths]
    square = 10 ** (30 * torch.rand(n, dtype=torch.float64) - 15)
    square[1::3] = 0
    found = []
    for make in (lambda *args: args[0](*args[1:]), plain):
        own = {"base_exp_avg_sq": square.to(dtype, copy=True)}
        base = make(AdamBase, shapes, own)
        scale = make(Scale, table(len(lengths)), torch.zeros(n, dtype=dtype), lengths) if is_scaled else None
        if is_scaled:
            scale.table[0, -2:] = torch.tensor([-100.0, 100.0])[-len(lengths) :]  # bounded, for S must have an inverse
        before = base.gains(steps, scale)
        assert torch.equal(own["base_exp_avg_sq"], square.to(dtype))
        after = base.gains(steps, scale, random(n, dtype=dtype, seed=4), random(n, dtype=dtype, seed=3), 1)
        found.append((before, after, own["base_exp_avg_sq"]))
    for ours, theirs in zip(*found, strict=True):
        assert ours.isfinite().all()
        limits = torch.finfo(dtype)
        torch.testing.assert_close(ours, theirs, rtol=32 * limits.eps, atol=limits.tiny)


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 2**17 + 5])
@dtypes
@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_gains_learn_as_their_plain_form_does(size, dtype, kind, monkeypatch):
    ours, theirs = Gains(size, dtype, kind), Gains(size, dtype, kind)
    before = ours.copies()
    ours.learn_()
    monkeypatch.setenv("LODO_NATIVE", "0")
    theirs.learn_()
    for found, expected, start in zip(ours.copies(), theirs.copies(), before, strict=True):
        assert (found != start).any()
        agree(found, expected)


# ---- threads, inactive steps, bad numbers --------------------------------------------------------------------------


@dtypes
def test_threads_do_not_change_a_bit(dtype):
    """Of what is large enough to wake four, tensors that end within a chunk of it included."""
    lengths, square = LENGTHS["several threads"], random(200_000, dtype=dtype).square()

    def work():
        momenta, scales, gains = Momenta(lengths, dtype), Scales(lengths, dtype), Gains(150_000, dtype, "adam")
        multiplied = scales.scale.times(random(sum(lengths), dtype=dtype), 0.5)
        root = AdamBase([square.shape], {"base_exp_avg_sq": square.clone()}).gains(3, None, square, square, 1)
        sgd = Gains(150_000, dtype, "sgd").learn_().copies()
        learned = momenta.learn_().mix_().copies()
        return [*learned, scales.learn_().table, multiplied, root, *gains.learn_().copies(), *sgd]

    for one, four in zip(with_threads(1, work), with_threads(4, work), strict=True):
        assert torch.equal(one, four)


@dtypes
@pytest.mark.parametrize("kernel", ["native", "plain"])
@pytest.mark.parametrize("steps", [0, 1, 7])
def test_an_inactive_step_leaves_every_bit(dtype, kernel, steps, monkeypatch):
    if kernel == "plain":
        monkeypatch.setenv("LODO_NATIVE", "0")
    lengths = LENGTHS["several"]
    mixed, scales = Momenta(lengths, dtype).mix_(max(steps, 1)), Scales(lengths, dtype)
    before = [*mixed.copies(), scales.table.clone()]
    mixed.learn_(steps, active=False).mix_(max(steps, 1), active=False)
    scales.learn_(steps, active=False)
    for found, expected in zip([*mixed.copies(), scales.table], before, strict=True):
        assert torch.equal(found, expected)
    for kind in ("adam", "sgd"):
        gains = Gains(4097, dtype, kind)
        before = gains.copies()
        assert all(map(torch.equal, gains.learn_(active=False).copies(), before))


@dtypes
@pytest.mark.parametrize("steps", [1, 2])
def test_the_first_two_steps_move_no_weights(dtype, steps, monkeypatch):
    """Of which there is nothing but rounding to learn from: nor do they reach the moments."""
    for native in ("1", "0"):
        monkeypatch.setenv("LODO_NATIVE", native)
        before = table(len(DECAYS), 8, seed=2)
        assert torch.equal(Momenta(LENGTHS["several"], dtype).learn_(steps).table, before)
        assert not torch.equal(Momenta(LENGTHS["several"], dtype).learn_(3).table, before)


BAD = (float("nan"), float("inf"), -float("inf"))


@dtypes
@pytest.mark.parametrize("bad", BAD)
def test_products_that_are_not_finite_count_as_zero(dtype, bad, plain):
    lengths = [3, 5000, 4]
    expected, wide = Momenta(lengths, dtype), plain(Momenta, lengths, dtype, True)
    found = Momenta(lengths, dtype)
    for own in (found, wide):
        own.momenta[1, 4000] = bad  # of one decay on the second tensor
        own.g[-1] = bad  # all decays of the third
    expected.momenta[1, 3:5003] = 0
    expected.g[-4:] = 0
    for own in (found, expected, wide):
        own.learn_()
    assert torch.equal(found.table, expected.table)
    torch.testing.assert_close(found.table, wide.table, rtol=1e-9, atol=1e-10)
    found, expected, wide = Scales(lengths, dtype), Scales(lengths, dtype), plain(Scales, lengths, dtype, True)
    found.g[7], wide.g[7] = bad, bad
    expected.g[3:5003] = 0
    for own in (found, expected, wide):
        own.learn_()
    assert torch.equal(found.table, expected.table)
    torch.testing.assert_close(found.table, wide.table, rtol=1e-9, atol=1e-10)


def test_products_whose_squares_would_overflow_are_bounded_alike(plain):
    """So that a second moment stays finite, and comes down again."""
    for make in (Momenta, Scales):
        found, expected = make([5, 7], torch.float64), plain(make, [5, 7], torch.float64)
        for own in (found, expected):
            own.g[2] = 1e160
            own.learn_()
        assert found.table.isfinite().all()
        assert found.table[2].max() > 1e300
        torch.testing.assert_close(found.table, expected.table, rtol=1e-12, atol=1e-12)


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
