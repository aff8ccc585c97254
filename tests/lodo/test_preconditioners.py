"""Each operator against its dense matrix, and its hypergradient against autograd through the loss after the step."""

import copy
import pickle

import numpy as np
import pytest
import torch

import lodo
from lodo.preconditioners.block_permutation import random_orthogonal
from tests.helpers.hypergradients import check_hypergradient
from tests.helpers.oracle import KINDS, fresh, learned, matvec, quadratic

SIZES = (1, 2, 3, 7, 41, 1000)
BLOCKS = (1, 2, 3, 4, 5, 8, 16)


@pytest.mark.parametrize("permutation", ["random", "shuffle"])
@pytest.mark.parametrize("depth", [0, 1, 2, 16])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("size", [1, 2, 3, 7, 41])
def test_hypergradient_of_blocks(size, block, depth, permutation, kernel):
    check_hypergradient(fresh("block_permutation", size, depth=depth, block_size=block, permutation=permutation))


@pytest.mark.parametrize("permutation", ["random", "shuffle"])
@pytest.mark.parametrize(("block", "depth"), [(1, 2), (3, 1), (4, 16), (5, 2), (16, 2)])
def test_hypergradient_of_blocks_in_a_thousand_dimensions(block, depth, permutation, kernel):
    check_hypergradient(fresh("block_permutation", 1000, depth=depth, block_size=block, permutation=permutation))


@pytest.mark.parametrize("depth", [0, 1, 2, 5, 16, 64])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 41])
def test_hypergradient_of_residuals(size, depth):
    check_hypergradient(fresh("residual", size, depth=depth))


@pytest.mark.parametrize("kind", ["residual", "diagonal", "scalar"])
@pytest.mark.parametrize("size", SIZES)
def test_hypergradient_of_the_other_kinds(kind, size):
    check_hypergradient(fresh(kind, size, depth=2))


@pytest.mark.parametrize("expansion", [1, 1.3, 2, 3])
def test_hypergradient_with_other_expansions(expansion, kernel):
    check_hypergradient(fresh("block_permutation", 41, depth=3, expansion=expansion))
    check_hypergradient(fresh("residual", 41, depth=3, expansion=expansion))


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_step_moves_theta_along_the_hypergradient(kind, kernel):
    """Through the optimizer itself: the second step's inner SGD moves theta by the gradient of the loss in between."""
    h, c = quadratic(7)
    x = torch.nn.Parameter(torch.randn(7, dtype=torch.float64))
    optimizer = lodo.LODO([x], lr=0.3, meta_lr=0.5, beta=0.4, preconditioner=kind, depth=3, meta_optimizer="sgd")
    start = x.detach().clone()
    momentum = 0.6 * (h @ (start - c))

    def backward():
        optimizer.zero_grad()
        loss = 0.5 * (x - c) @ h @ (x - c)
        loss.backward()
        return loss

    backward()
    optimizer.step()
    g = optimizer.preconditioners[0]
    theta = learned(g).requires_grad_()
    landed = start - 0.3 * matvec(g, theta, momentum)
    torch.testing.assert_close(x.detach(), landed.detach(), rtol=1e-12, atol=1e-12)
    (0.5 * (landed - c) @ h @ (landed - c)).backward()
    backward()
    optimizer.step()
    torch.testing.assert_close(learned(g), (theta - 0.5 * theta.grad).detach(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("permutation", ["random", "shuffle"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 2, 3, 7, 41])
def test_operator_is_its_dense_matrix(kind, size, permutation, dtype, kernel):
    g = fresh(kind, size, depth=3, block_size=3, permutation=permutation, dtype=dtype)
    dense = g.to_dense()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    assert dense.shape == (size, size)
    assert dense.dtype == dtype
    v = torch.randn(size, dtype=dtype)
    torch.testing.assert_close(g.matvec(v), dense @ v, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(g.matvec(v), matvec(g, learned(g), v), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(dense, dense.T, rtol=tolerance, atol=tolerance)
    if kind == "block_permutation":
        assert torch.linalg.eigvalsh(dense).min() >= -tolerance


@pytest.mark.parametrize("permutation", ["random", "shuffle"])
@pytest.mark.parametrize(("block", "depth", "expansion"), [(4, 16, 2), (3, 0, 2), (1, 2, 1), (5, 3, 1.5)])
def test_a_fresh_network_is_the_identity(block, depth, expansion, permutation):
    x = torch.nn.Parameter(torch.zeros(41, dtype=torch.float64))
    x.grad = torch.ones_like(x)
    options = {"depth": depth, "block_size": block, "expansion": expansion, "permutation": permutation}
    optimizer = lodo.LODO([x], meta_lr=0.0, **options)
    optimizer.step()
    dense = optimizer.preconditioners[0].to_dense()
    torch.testing.assert_close(dense, torch.eye(41, dtype=torch.float64), rtol=0, atol=1e-13)


def test_initial_blocks_are_uniform_on_the_orthogonal_group():
    """Haar: mean zero, variance 1/k, both determinants equally likely."""
    blocks = random_orthogonal(4, 20_000, np.random.default_rng(0)).permute(2, 0, 1)
    identity = torch.eye(4, dtype=torch.float64).expand(len(blocks), 4, 4)
    torch.testing.assert_close(blocks @ blocks.transpose(1, 2), identity, rtol=0, atol=1e-13)
    assert blocks.mean(0).abs().max() < 0.02
    torch.testing.assert_close(blocks.pow(2).mean(0), torch.full((4, 4), 0.25, dtype=torch.float64), rtol=0, atol=0.01)
    assert abs(torch.linalg.det(blocks).mean()) < 0.03


def test_the_shuffle_is_the_transpose_and_mixes_everything():
    g = fresh("block_permutation", 16, depth=2, expansion=1, permutation="shuffle")
    expected = torch.arange(16).view(4, 4).T.reshape(-1)
    assert torch.equal(g.permutations, expected.repeat(2, 1))
    assert (g.to_dense().abs() > 1e-9).all()


def test_read_tensors_are_copies_in_the_layout_of_the_paper():
    g = fresh("block_permutation", 10, depth=3)
    assert g.blocks.shape == (3, 5, 4, 4)
    assert g.permutations.shape == (3, 20)
    assert g.permutations.dtype == torch.int64
    before = g.to_dense()
    for tensor in (g.blocks, g.permutations):
        tensor.zero_()
    torch.testing.assert_close(g.to_dense(), before, rtol=0, atol=0)
    rebuilt = lodo.BlockPermutation(g.blocks, g.permutations, g.size)
    torch.testing.assert_close(rebuilt.to_dense(), before, rtol=0, atol=0)
    blocks = g.blocks
    lodo.BlockPermutation(blocks, g.permutations, g.size).theta.zero_()
    assert blocks.abs().sum() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_pickles_are_independent(kind):
    g = fresh(kind, 9, depth=2)
    before = g.to_dense()
    for other in (copy.deepcopy(g), pickle.loads(pickle.dumps(g))):
        torch.testing.assert_close(other.to_dense(), before, rtol=0, atol=0)
        other.theta.zero_()
    torch.testing.assert_close(g.to_dense(), before, rtol=0, atol=0)
    assert kind.split("_")[0] in repr(g).lower()


def test_numpy_arrays_and_spare_blocks_are_welcome(kernel):
    g = fresh("block_permutation", 10, depth=2, expansion=2.4)
    assert g.blocks.shape == (2, 6, 4, 4)
    rebuilt = lodo.BlockPermutation(g.blocks.numpy(), g.permutations.numpy(), 10)
    torch.testing.assert_close(rebuilt.to_dense(), g.to_dense(), rtol=0, atol=0)


BLOCKS_3 = torch.zeros(3, 5, 4, 4)
INDEX_3 = torch.arange(20).repeat(3, 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lodo.BlockPermutation(BLOCKS_3[0], INDEX_3, 10), "blocks must have 4 dimensions"),
        (lambda: lodo.BlockPermutation(BLOCKS_3[..., :2], INDEX_3, 10), "blocks must have shape"),
        (lambda: lodo.BlockPermutation(BLOCKS_3.half(), INDEX_3, 10), "blocks must be float32 or float64"),
        (lambda: lodo.BlockPermutation(BLOCKS_3, INDEX_3[:2], 10), "permutations must have shape"),
        (lambda: lodo.BlockPermutation(BLOCKS_3, INDEX_3 // 2, 10), "every row of permutations"),
        (lambda: lodo.BlockPermutation(BLOCKS_3, INDEX_3.double(), 10), "permutations must be integers"),
        (lambda: lodo.BlockPermutation(BLOCKS_3, INDEX_3, 21), "size must be an int with 1 <= size <= 20, got 21"),
        (lambda: lodo.Residual(torch.zeros(4), INDEX_3, 10), "diagonals must have 2 dimensions"),
        (lambda: lodo.Residual(torch.zeros(5, 20), INDEX_3, 10), "permutations must have shape"),
        (lambda: lodo.Diagonal(torch.zeros(())), "weight must have 1 dimensions"),
        (lambda: lodo.Diagonal(torch.zeros(0)), "weight must have at least one element"),
        (lambda: lodo.Diagonal("ones"), "weight must be a tensor, got 'ones'"),
        (lambda: lodo.Diagonal(torch.ones(3).to_sparse()), "weight must be a dense tensor"),
        (lambda: lodo.BlockPermutation(BLOCKS_3, None, 10), "permutations must be a tensor, got None"),
        (lambda: lodo.Scalar(torch.zeros(3), 3), "weight must have 0 dimensions"),
        (lambda: lodo.Scalar(torch.zeros(()), 0), "size must be"),
        (lambda: lodo.Diagonal(torch.zeros(3)).matvec(torch.zeros(4)), r"v must have shape \(3,\), got \(4,\)"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32, torch.uint32, torch.uint64])
def test_permutations_may_be_of_any_integer_dtype(dtype):
    g = fresh("block_permutation", 10, depth=2)
    rebuilt = lodo.BlockPermutation(g.blocks, g.permutations.to(dtype), 10)
    assert torch.equal(rebuilt.permutations, g.permutations)


@pytest.mark.parametrize("kind", KINDS)
def test_a_vector_that_is_negated_lazily_is_seen_negated(kind, kernel):
    """As the imaginary part of a conjugate is."""
    g = fresh(kind, 5, depth=2)
    v = torch.randn(5, dtype=torch.float64)
    lazy = torch.view_as_complex(torch.stack((v, v), 1)).conj().imag
    assert lazy.is_neg()
    assert torch.equal(g.matvec(lazy), g.matvec(-v))
    one = fresh(kind, 1, depth=2)
    assert torch.equal(one.matvec(lazy[:1]), one.matvec(-v[:1]))


def test_hessian_error_is_the_frobenius_norm():
    h, _ = quadratic(30)
    inverse = lodo.Diagonal(torch.ones(30, dtype=torch.float64))
    expected = torch.linalg.matrix_norm(torch.eye(30, dtype=torch.float64) - 0.5 * h) / 30**0.5
    generator = torch.Generator().manual_seed(0)
    found = lodo.hessian_error(inverse, lambda v: h @ v, lr=0.5, samples=4000, generator=generator)
    assert found == pytest.approx(float(expected), rel=0.02)
    exact = lodo.Scalar(torch.tensor(2.0, dtype=torch.float64), 30)
    assert lodo.hessian_error(exact, lambda v: 4 * v, lr=0.125) == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        lodo.hessian_error(exact, lambda v: v, samples=0)


def test_hessian_error_takes_products_made_by_autograd():
    x = torch.arange(1.0, 6.0, dtype=torch.float64, requires_grad=True)

    def hvp(v):
        (gradient,) = torch.autograd.grad((x**4).sum(), x, create_graph=True)
        return torch.autograd.grad(gradient @ v, x)[0]

    inverse = lodo.Diagonal(1 / (12 * x.detach() ** 2))
    assert lodo.hessian_error(inverse, hvp) == pytest.approx(0, abs=1e-12)
    assert lodo.hessian_error(inverse, hvp, lr=0.5) == pytest.approx(0.5)
