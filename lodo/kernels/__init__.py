"""The arithmetic of the preconditioners, by the fastest kernel that takes the tensors given.

`native` runs the block-diagonal x permutation network on CPUs, `gpu` everything on CUDA, `reference` in plain torch
wherever they cannot. For each preconditioner two verbs: `matvec` applies it, `learn_` takes one inner step along the
hypergradient. LODO_NATIVE=0 in the environment asks for plain torch.
"""

from torch import Tensor

from lodo import meta
from lodo.kernels import gpu, native, reference
from lodo.scalars import Number


def prepare(theta: Tensor, permutations: Tensor | None, learning: bool, kept: Tensor | None) -> Tensor | None:
    """What the kernel of a network wants to find again at its next call, made or grown if `kept` will not do.

    Scratch memory on a CPU, the inverse permutations on CUDA; None where nothing is wanted.
    """
    if native.available(theta):
        return native.prepare(theta, permutations, learning, kept)
    if gpu.available(theta):
        return gpu.prepare(permutations, kept)
    return None


def matvec(theta: Tensor, permutations: Tensor | None, v: Tensor, kept: Tensor | None) -> Tensor:
    """E^T U^T U E v for v of shape (n,); `kept` is what `prepare` gave."""
    if native.available(theta) and kept is not None:
        return native.matvec(theta, permutations, v, kept)
    if gpu.available(theta):
        return gpu.matvec(theta, permutations, v, kept)
    return reference.matvec(theta, permutations, v)


def learn_(
    theta: Tensor,
    moments: meta.Moments | None,
    permutations: Tensor | None,
    g: Tensor,
    m: Tensor,
    lr: Number,
    rates: meta.Rates,
    kept: Tensor | None,
) -> None:
    """One inner update of a network; `kept` is what `prepare` gave."""
    if native.available(theta) and kept is not None:
        native.learn_(theta, moments, permutations, g, m, lr, rates, kept)
    elif gpu.available(theta):
        gpu.learn_(theta, moments, permutations, g, m, lr, rates, kept)
    else:
        reference.learn_(theta, moments, permutations, g, m, lr, rates)


def residual_matvec(theta: Tensor, indices: Tensor, v: Tensor) -> Tensor:
    plain = not gpu.available_for_vectors(theta)
    return (reference if plain else gpu).residual_matvec(theta, indices, v)


def residual_learn_(
    theta: Tensor,
    moments: meta.Moments | None,
    indices: Tensor,
    g: Tensor,
    m: Tensor,
    lr: Number,
    rates: meta.Rates,
) -> None:
    plain = not gpu.available_for_vectors(theta)
    (reference if plain else gpu).residual_learn_(theta, moments, indices, g, m, lr, rates)


def diagonal_learn_(
    theta: Tensor, moments: meta.Moments | None, g: Tensor, m: Tensor, lr: Number, rates: meta.Rates
) -> None:
    plain = not gpu.available_for_vectors(theta)
    (reference if plain else gpu).diagonal_learn_(theta, moments, g, m, lr, rates)


def round_into_(target: Tensor, values: Tensor, count: Number) -> None:
    """Rounds a vector of float32 or float64 stochastically into a bfloat16 one; `count` salts the random bits."""
    plain = not gpu.available_for_vectors(values)
    (reference if plain else gpu).round_into_(target, values, count)
