"""The arithmetic of the block-diagonal x permutation network, by the fastest kernel that takes the tensors given.

Two verbs: `matvec` applies U^T U, `learn_` takes one inner step along the hypergradient. `work` is scratch memory of
`work_size` numbers, of theta's dtype, or None where the kernel needs none.
"""

from torch import Tensor

from lodo import meta
from lodo.kernels import native, reference
from lodo.scalars import Number


def work_size(theta: Tensor, permutations: Tensor | None, learning: bool) -> int:
    """How many numbers of scratch memory a call needs; 0 where the plain kernels will run."""
    if not native.available(theta):
        return 0
    layers, block, _, width = theta.shape
    vectors = 1 if not learning else layers + 1 if permutations is None else layers + 2
    return 2 * block * width * vectors


def matvec(theta: Tensor, permutations: Tensor | None, v: Tensor, work: Tensor | None) -> Tensor:
    if work is not None:
        return native.matvec(theta, permutations, v, work)
    return reference.matvec(theta, permutations, v)


def learn_(
    theta: Tensor,
    moments: meta.Moments | None,
    permutations: Tensor | None,
    g: Tensor,
    m: Tensor,
    lr: Number,
    rates: meta.Rates,
    work: Tensor | None,
) -> None:
    if work is not None:
        native.learn_(theta, moments, permutations, g, m, lr, rates, work)
    else:
        reference.learn_(theta, moments, permutations, g, m, lr, rates)
