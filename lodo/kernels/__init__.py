"""The arithmetic of the preconditioners, by the fastest kernel that takes the tensors given.

`native` runs the block-diagonal x permutation network and LODO-Residuals on CPUs, `gpu` all networks on CUDA,
`reference` in plain torch wherever they cannot. They have the same functions: for each preconditioner `matvec` applies
it and `learn_` takes one inner step along the hypergradient. (`native` has the two passes of `lodo.update.fused` too.)
LODO_NATIVE=0 in the environment asks for plain torch.
"""

from types import ModuleType

from torch import Tensor

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


def for_residual(theta: Tensor) -> ModuleType:
    """The kernels for LODO-Residuals."""
    return native if native.available(theta) else for_vectors(theta)


def for_vectors(theta: Tensor) -> ModuleType:
    """The kernels for the other preconditioners."""
    return gpu if gpu.available_for_vectors(theta) else reference


def for_rounding(values: Tensor) -> ModuleType:
    """The kernels for rounding a vector."""
    return native if native.available(values) else for_vectors(values)
