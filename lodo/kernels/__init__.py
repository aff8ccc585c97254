"""The arithmetic of the preconditioners, by the fastest kernel that takes the tensors given.

`native` runs the block-diagonal x permutation network on CPUs, `gpu` all networks on CUDA, `reference` in plain torch
wherever they cannot. They have the same functions: for each preconditioner `matvec` applies it and `learn_` takes one
inner step along the hypergradient. (`native` has the two passes of `lodo.fused` too.) LODO_NATIVE=0 in the environment
asks for plain torch.
"""

from collections.abc import Sequence
from itertools import accumulate
from types import ModuleType

import torch
from torch import Tensor

from lodo import scalars
from lodo.kernels import gpu, native, reference


def for_network(
    theta: Tensor, permutations: Tensor | None, learning: bool, kept: Tensor | None
) -> tuple[ModuleType, Tensor | None]:
    """The kernels for a network, and what they want to find again at the next call: `kept`, unless that will not do.

    That is scratch memory on a CPU and the inverse permutations on CUDA.
    """
    if native.available(theta):
        return native, native.prepare(theta, permutations, learning, kept)
    if gpu.available(theta):
        return gpu, gpu.prepare(permutations, kept)
    return reference, None


def for_vectors(theta: Tensor) -> ModuleType:
    """The kernels for the other preconditioners."""
    return gpu if gpu.available_for_vectors(theta) else reference


def for_rounding(values: Tensor) -> ModuleType:
    """The kernels for rounding a vector."""
    return native if native.available(values) else for_vectors(values)


def energies(vector: Tensor, lengths: Sequence[int]) -> list[float] | Tensor:
    """The sums of squares of the parts of a vector that have these lengths, with no overflow in between: in plain
    torch what `native.energies` does."""
    wide = torch.float32 if vector.device.type == "mps" else torch.float64
    if not lengths:
        return []
    found = torch.stack(torch._foreach_norm(list(vector.split(lengths)), dtype=wide)).square()
    return found.tolist() if scalars.is_readable(found) else found


def offsets(lengths: Sequence[int]) -> Tensor:
    """Where tensors of these numbers of elements begin in a vector, and its end, as `native` takes it."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int64, device="cpu")
