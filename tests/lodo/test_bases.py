"""`base="soap"` against SOAP with dense matrices, with bases of whole and of low rank."""

import copy
import math

import pytest
import torch
from torch import nn

import lodo
from lodo.parts import bases
from lodo.parts.bases import LowRank, Side, Whole, batched, leading, rank_of, sides_of
from tests.helpers.bases import DenseSoap, completed, dense_basis, eye, factors_in
from tests.helpers.parts import backward, flat, state_of
from tests.helpers.parts import made as made_params

# For each shape its sides: (0 for rows or 1 for columns, length, rank).
WHOLE = {
    "matrices": {(3, 4): [(0, 3, 3), (1, 4, 4)], (4, 4): [(0, 4, 4), (1, 4, 4)]},
    "a matrix and vectors": {(3, 4): [(0, 3, 3), (1, 4, 4)], (5,): [], (): []},
    "vectors alone": {(5,): [(0, 5, 5)], (1,): [], (): [], (3,): [(0, 3, 3)]},
    "more dimensions": {(2, 3, 2): [(0, 2, 2), (1, 6, 6)], (3, 2, 1, 2): [(0, 3, 3), (1, 4, 4)]},
    "skew": {(9, 2): [(0, 9, 9), (1, 2, 2)], (2, 6): [(0, 2, 2), (1, 6, 6)]},
    "small and empty": {(1, 1): [], (0, 3): [], (): [], (3, 0): [], (2, 2): [(0, 2, 2), (1, 2, 2)]},
}
LOW = {
    "matrices": {(3, 4): [(0, 3, 3), (1, 4, 4)], (7, 5): [(0, 7, 2), (1, 5, 2)]},
    "one side": {(9, 3): [(0, 9, 2), (1, 3, 3)], (2, 8): [(0, 2, 2), (1, 8, 2)]},
    "rank one": {(1, 6): [(1, 6, 1)], (5,): []},
    "more dimensions": {(3, 2, 3): [(0, 3, 3), (1, 6, 2)]},
}


@pytest.fixture
def narrow(monkeypatch):
    """Sides are whole up to 4, and of rank 2 beyond."""
    monkeypatch.setattr(bases, "WORK", 8)


@pytest.fixture
def eager(monkeypatch):
    """What is close to an eigenvector is renewed too."""
    monkeypatch.setattr(bases, "TOLERANCE", 0.0)


def check_soap(case, zeros):
    shapes, sides = list(case), list(case.values())
    params = made_params(shapes)
    optimizer = lodo.LODO(params, lr=0.05, base="soap", preconditioner="identity")
    expected = DenseSoap(shapes, sides, flat(params))
    for t in range(1, 32):
        g = backward(params)
        if t <= zeros:
            g = torch.zeros_like(g)
            for p in params:
                p.grad.zero_()
        optimizer.step()
        factors = factors_in(state_of(optimizer), sides)
        expected.step(g, 0.05, t, factors)
        basis = dense_basis(shapes, factors)
        if t > 1:  # the signs too: what a network has learned of a coordinate must go on meaning the same
            torch.testing.assert_close(basis, dense_basis(shapes, expected.factors), rtol=0, atol=1e-6)
        torch.testing.assert_close(basis.T @ basis, eye(len(g)), rtol=0, atol=1e-12)
        dense = optimizer.preconditioners[0].to_dense()
        size = float(dense.abs().max())
        torch.testing.assert_close(dense, expected.g, rtol=0, atol=1e-6 * size)
        torch.testing.assert_close(dense, dense.T, rtol=0, atol=1e-13 * size)
        assert torch.linalg.eigvalsh(dense).min() >= -1e-13 * size  # zero where there was no gradient
        torch.testing.assert_close(flat(params), expected.x, rtol=0, atol=1e-6)
    assert (flat(params) - flat(made_params(shapes))).abs().max() > 0.3


@pytest.mark.parametrize("zeros", [0, 2])
@pytest.mark.parametrize("case", WHOLE)
def test_an_identity_over_soap_is_soap(case, zeros, eager):
    """Also if the first gradients are zero."""
    check_soap(WHOLE[case], zeros)


@pytest.mark.parametrize("zeros", [0, 2])
@pytest.mark.parametrize("case", LOW)
def test_so_it_is_with_bases_of_low_rank(case, zeros, narrow, eager):
    check_soap(LOW[case], zeros)


# ---- who has what --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", WHOLE)
def test_every_side_has_a_basis_and_small_ones_a_whole_one(case):
    shapes = [torch.Size(shape) for shape in WHOLE[case]]
    assert [[tuple(side) for side in own] for own in sides_of(shapes)] == list(WHOLE[case].values())


@pytest.mark.parametrize(
    ("length", "other", "rank"),
    [
        (128, 128, 128),
        (128, 64, 128),
        (128, 63, 63),
        (90, 45, 90),
        (90, 44, 44),
        (64, 1, 64),
        (65, 1, 1),
        (129, 1000, 64),
        (129, 5, 5),
        (577, 577, 64),
        (50_257, 768, 64),
        (65_536, 16, 16),
        (768, 50_257, 64),
    ],
)
def test_ranks_are_within_the_budgets(length, other, rank):
    assert rank_of(length, other) == rank
    work = 2 * length if rank == length else 4 * rank
    assert work <= bases.WORK
    assert length * rank <= max(bases.NUMBERS * length * other, bases.SMALL)


def test_many_vectors_have_none_and_few_alone_have_full_ones():
    assert sides_of([torch.Size((256,)), torch.Size((256,))]) == [[Side(0, 256, 256)]] * 2
    assert sides_of([torch.Size((257,)), torch.Size((256,))]) == [[], []]
    assert sides_of([torch.Size((2,)), torch.Size((2, 2))])[0] == []


# ---- a basis -------------------------------------------------------------------------------------------------------


def basis_of(axis, length, rank, dtype=torch.float64, count=1):
    side = Side(axis, length, rank)
    basis = bases.basis_of(side, *torch.zeros(2, count, length, rank, dtype=dtype))
    basis.begin_(range(count))
    assert isinstance(basis, Whole if rank == length else LowRank)
    return basis


def gradient(axis, length, other, seed=0, rows=None):
    """Of decreasing size along the side; zero but on some rows of it."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(length, other, generator=generator, dtype=torch.float64)
    found *= torch.linspace(2, 0.1, length, dtype=torch.float64)[:, None]
    if rows is not None:
        found[[row for row in range(length) if row not in rows]] = 0
    return found if axis == 0 else found.T.contiguous()


def learn(basis, g, weight):
    """Takes a gradient into the only one of a batch."""
    basis.learn_(basis.ahead_(g[None].clone()), weight)


def refresh(basis, square, one=0):
    """With nothing kept but one matrix."""
    basis.refresh_(one, [square.clone()], square)


def dense(basis):
    """Q of the only one of a batch."""
    (found,) = basis.back_(eye(basis.side.length)[None])
    return found if basis.side.axis == 0 else found.T


@pytest.mark.parametrize("rank", [6, 12, 1])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_basis_is_orthogonal_and_takes_along_what_is_kept(axis, rank):
    basis = basis_of(axis, 12, rank)
    assert torch.equal(dense(basis), eye(12))
    basis.start_(0, gradient(axis, 12, 9), 0.5)
    x = torch.randn(1, *((12, 9) if axis == 0 else (9, 12)), dtype=torch.float64)
    for seed in range(4):
        q = dense(basis)
        torch.testing.assert_close(q.T @ q, eye(12), rtol=0, atol=1e-13)
        torch.testing.assert_close(q, completed(basis.vectors[0]), rtol=0, atol=1e-12)
        ahead = q.T @ x if axis == 0 else x @ q
        torch.testing.assert_close(basis.ahead_(x.clone()), ahead, rtol=0, atol=1e-12)
        torch.testing.assert_close(basis.back_(ahead.clone()), x, rtol=0, atol=1e-12)
        learn(basis, gradient(axis, 12, 9, seed + 1), 0.3)
        square = torch.rand(x.shape[1:], dtype=torch.float64)
        total, kept = square.sum(), torch.stack([ahead[0], 2 * ahead[0]])
        basis.refresh_(0, list(kept), square)
        assert (dense(basis) - q).abs().max() > 1e-3
        torch.testing.assert_close(basis.back_(kept[:1].clone()), x, rtol=0, atol=1e-12)
        torch.testing.assert_close(kept[1], 2 * kept[0])
        assert square.min() > 0
        if rank == 12:
            torch.testing.assert_close(square.sum(), total)  # a rotation moves it about


@pytest.mark.parametrize("rank", [3, 12])
def test_a_basis_is_off_where_a_vector_is_no_eigenvector(rank):
    """Also where its eigenvalue is small beside others."""
    basis = basis_of(0, 12, rank)
    basis.average[0] = torch.cat([torch.diag(torch.logspace(0, -6, rank)), torch.zeros(12 - rank, rank)])
    assert not basis.is_off(0)
    basis.average[0, 1, 0] = 0.009
    assert not basis.is_off(0)
    for row, column, residual in ((1, 0, 0.011), (0, rank - 1, 1.1e-8), (11, 1, 0.011), (2, 2, math.nan)):
        before = basis.average[0, row, column].clone()
        basis.average[0, row, column] = residual
        assert basis.is_off(0)
        basis.average[0, row, column] = before
    basis.average.zero_()  # there is nothing to be an eigenvector of
    assert not basis.is_off(0)


@pytest.mark.parametrize("rank", [3, 12])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_batch_is_its_members(axis, rank):
    batch, alone = basis_of(axis, 12, rank, count=3), [basis_of(axis, 12, rank) for _ in range(3)]
    gradients = [torch.stack([gradient(axis, 12, 9, 3 * step + one) for one in range(3)]) for step in range(4)]
    square = torch.rand(3, *gradients[0].shape[1:], dtype=torch.float64)
    squares = [each.clone() for each in square]
    for step, g in enumerate(gradients):
        for one, each in enumerate(alone):
            if step == 0:
                batch.start_(one, g[one], 0.5)
                each.start_(0, g[one], 0.5)
            elif step == 1:
                batch.learn_(batch.ahead_(g.clone()), 0.5, one)
                learn(each, g[one], 0.5)
            else:
                learn(each, g[one], 0.5)
        if step > 1:
            batch.learn_(batch.ahead_(g.clone()), 0.5)
        refresh(batch, square[1], 1)
        refresh(alone[1], squares[1], 0)
        for turn in ("ahead_", "back_"):
            expected = torch.cat([getattr(each, turn)(g[one : one + 1].clone()) for one, each in enumerate(alone)])
            torch.testing.assert_close(getattr(batch, turn)(g.clone()), expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(square, torch.stack(squares), rtol=0, atol=1e-12)


def test_a_basis_of_low_rank_finds_the_leading_eigenvectors():
    """Of the average of many gradients, as orthogonal iteration with the average itself would."""
    basis = basis_of(0, 40, 6)
    spread = torch.diag(torch.tensor([30.0, 20, 14, 10, 7, 5] + [1.0] * 34, dtype=torch.float64))
    torch.manual_seed(0)
    turn = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64))[0]
    for step in range(600):
        g = turn @ spread @ torch.randn(40, 50, dtype=torch.float64) / 7
        if step == 0:
            basis.start_(0, g, 0.02)
        else:
            learn(basis, g, 0.02)
        if step % 5 == 4:
            refresh(basis, torch.ones(40, 50, dtype=torch.float64))
    overlap = (turn[:, :6].T @ basis.vectors[0]).diagonal().abs()
    assert overlap.min() > 0.99
    sizes = basis.average[0].diagonal() / 50 * 49
    torch.testing.assert_close(sizes, spread.diagonal()[:6] ** 2, rtol=0.2, atol=0)


@pytest.mark.parametrize("axis", [0, 1])
def test_rows_without_a_gradient_keep_their_coordinates(axis):
    seen = [3, 7, 11, 12, 20, 21, 22, 30]
    basis = basis_of(axis, 40, 4)
    basis.start_(0, gradient(axis, 40, 9, rows=seen), 0.5)
    for seed in range(3):
        learn(basis, gradient(axis, 40, 9, seed + 1, rows=seen), 0.5)
        refresh(basis, torch.ones((40, 9) if axis == 0 else (9, 40), dtype=torch.float64))
    q = dense(basis)
    others = [row for row in range(4, 40) if row not in seen]
    torch.testing.assert_close(q[others][:, others], eye(len(others)), rtol=0, atol=1e-12)
    assert q[others][:, seen].abs().max() < 1e-12
    assert q[seen][:, others].abs().max() < 1e-12
    # Left out, they leave what is orthogonal to the eigenvectors.
    kept = torch.zeros(40, dtype=torch.float64)
    kept[seen] = 1
    assert (basis.vectors[0].T @ (kept[:, None] * q)[:, 4:]).abs().max() < 1e-12


@pytest.mark.parametrize("rank", [30, 12])
def test_rounding_does_not_add_up_over_renewals(rank):
    basis, square = basis_of(0, 30, rank, torch.float32), torch.ones(30, 20)
    basis.start_(0, gradient(0, 30, 20).float(), 0.5)
    errors = []
    for seed in range(1, 601):
        learn(basis, gradient(0, 30, 20, seed).float(), 0.3)
        refresh(basis, square)
        errors.append(float((basis.vectors[0].T @ basis.vectors[0] - torch.eye(rank)).abs().max()))
    assert max(errors) < 2e-6


@pytest.mark.parametrize("kind", ["zero", "rank one", "tiny", "huge"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_gradients_leave_an_orthogonal_basis(kind, dtype):
    basis = basis_of(0, 30, 5, dtype)
    g = gradient(0, 30, 8).to(dtype)
    if kind == "rank one":
        g = torch.outer(g[:, 0], g[0])
    g = g * {"tiny": 1e-15, "huge": 1e15}.get(kind, 1.0)
    basis.start_(0, g, 0.5)
    square = torch.ones(30, 8, dtype=dtype)
    for _ in range(3):
        learn(basis, 0 * g if kind == "zero" else g, 1.0)
        refresh(basis, square)
    (q,) = basis.back_(torch.eye(30, dtype=dtype)[None])
    torch.testing.assert_close(
        q.T @ q, torch.eye(30, dtype=dtype), rtol=0, atol=1e-4 if dtype == torch.float32 else 1e-12
    )
    assert square.isfinite().all()


def test_leading_vectors_are_those_of_a_decomposition():
    left, _, right = torch.linalg.svd(gradient(0, 50, 20), full_matrices=False)
    g = left @ torch.logspace(0, -4, 20, dtype=torch.float64).diag() @ right
    found = leading(g, 5)
    torch.testing.assert_close((left[:, :5].T @ found).abs(), eye(5), rtol=0, atol=1e-6)
    assert leading(g.float(), 5).dtype == torch.float64


def test_tensors_of_one_shape_at_equal_distances_are_a_batch():
    block = [(4, 6), (6,), (6, 6), (6, 6)]
    shapes = [torch.Size(shape) for shape in [(5, 6), *block, (1,), *block, (1,), *block, (4, 6)]]
    found = [[member.place for member in batch] for batch in batched(shapes)]
    assert found == [[0], [1, 6, 11], [3, 4], [8, 9], [13, 14], [15]]
    sides = sides_of(shapes)
    for batch in batched(shapes):
        for member in batch:
            assert member.start == sum(shape.numel() for shape in shapes[: member.place])
            assert member.packed == sum(side.size for own in sides[: member.place] for side in own)


# ---- in an optimizer -----------------------------------------------------------------------------------------------


def test_a_long_side_learns_what_a_whole_basis_does(monkeypatch):
    """On a regression whose inputs lie in a few directions, which the leading vectors hold, training goes alike."""

    def trained():
        torch.manual_seed(0)
        inputs = torch.randn(512, 12) @ torch.randn(12, 160) * torch.logspace(0, -1, 160)
        target = inputs @ torch.randn(160, 30)
        model = nn.Linear(160, 30)
        optimizer, losses = lodo.AutoLODO(model.parameters()), []
        for _ in range(300):
            optimizer.zero_grad()
            loss = (model(inputs) - target).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return math.log(losses[-1])

    low = trained()
    monkeypatch.setattr(bases, "WORK", 10**9)
    monkeypatch.setattr(bases, "SMALL", 10**9)
    whole = trained()
    assert low == pytest.approx(whole, abs=0.05)


def test_no_step_renews_all_bases(eager):
    """The two sides have steps of their own, and so have shapes that differ, so that none is long; and these are the
    same whatever else is in the group."""

    def renewals(shapes):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
        optimizer, before, found = lodo.AutoLODO(params), None, []
        for _ in range(60):
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()
            now = [optimizer.state[p]["eigenbasis"].split([p.shape[0] ** 2, p.shape[1] ** 2]) for p in params]
            now = [[side.clone() for side in own] for own in now]
            if before is not None:
                pairs = [zip(*pair, strict=True) for pair in zip(now, before, strict=True)]
                found.append([[not torch.equal(a, b) for a, b in pair] for pair in pairs])
            before = now
        return torch.tensor(found)  # (step, tensor, side)

    shapes = [(6, 6), (6, 8), (8, 6), (12, 6), (6, 24)]
    found = renewals(shapes)
    assert (found[10:20].sum(0) == 1).all()
    assert (found[20:30] == found[10:20]).all()
    assert not (found[:, :, 0] & found[:, :, 1]).any()
    assert found.sum((1, 2)).max() <= 3  # of ten
    for number, shape in enumerate(shapes):
        assert torch.equal(renewals([(4, 5), shape])[:, 1], found[:, number])


@pytest.mark.parametrize("work", [256, 8])
def test_equal_tensors_take_the_steps_that_each_would_take_by_itself(work, monkeypatch):
    """In a batch of three, of which one comes late, one misses gradients, and rows have none at first."""
    monkeypatch.setattr(bases, "WORK", work)
    torch.manual_seed(0)
    starts = [torch.randn(6, 7, dtype=torch.float64) for _ in range(3)]
    together, alone = ([nn.Parameter(start.clone()) for start in starts] for _ in range(2))
    optimizers = [lodo.AutoLODO(together), *(lodo.AutoLODO([p]) for p in alone)]
    for step in range(60):
        for number, pair in enumerate(zip(together, alone, strict=True)):
            g = torch.randn(6, 7, dtype=torch.float64) + starts[number]
            g[4:] *= step >= 12
            has = not ((number == 1 and step < 7) or (number == 2 and step % 5 == 3))
            for p in pair:
                p.grad = g.clone() if has else None
        for optimizer in optimizers:
            optimizer.step()
    for start, one, other in zip(starts, together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
        assert (one - start).abs().max() > 1e-2


def test_bases_of_low_rank_resume_bit_for_bit_and_copies_go_on_alike(narrow):
    def steps(p, optimizer, first, last):
        for step in range(first, last):
            p.grad = torch.randn(7, 9, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        return p.detach().clone()

    p = nn.Parameter(torch.zeros(7, 9))
    optimizer = lodo.AutoLODO([p])
    steps(p, optimizer, 0, 23)
    saved, half = copy.deepcopy(optimizer.state_dict()), p.detach().clone()
    copied = copy.deepcopy(optimizer)
    expected = steps(p, optimizer, 23, 60)
    again = nn.Parameter(half)
    resumed = lodo.AutoLODO([again])
    resumed.load_state_dict(saved)
    assert torch.equal(steps(again, resumed, 23, 60), expected)
    (other,) = copied.param_groups[0]["params"]
    assert torch.equal(steps(other, copied, 23, 60), expected)


def test_the_default_device_has_no_influence_on_first_bases(narrow):
    p = nn.Parameter(torch.zeros(7, 9))
    optimizer = lodo.AutoLODO([p])
    p.grad = torch.randn(7, 9)
    with torch.device("meta"):
        optimizer.step()
    assert p.detach().isfinite().all()
    assert p.detach().any()


@pytest.mark.parametrize("size", [1e-15, 1.0, 1e15])
def test_whether_a_basis_is_off_does_not_hang_on_the_size_of_gradients(size):
    basis = basis_of(0, 12, 5, torch.float32)
    basis.average[0] = size**2 * torch.ones(12, 5)
    assert basis.is_off(0)
