"""Stochastic rounding to bfloat16, for moments that move by less than bfloat16 resolves.

With b2 = 0.999 the second moment falls by at most 0.1 % per step, and bfloat16 numbers lie 0.4 to 0.8 % apart: rounded
to the nearest it would never fall. Rounded up or down at random, in proportion to the distance, it moves right on
average.

The random bits are a hash of (element, count of the step), not of a generator's state: every kernel, on every device
and with any number of threads, draws the same, and a resumed run draws what the uninterrupted one would have.
"""

from typing import Any

import torch
from torch import Tensor

from lodo.scalars import Number, is_tensor

MASK = 0xFFFFFFFF
SALT = 0x9E3779B1  # spreads consecutive counts over all 32 bits; any large odd number does


DTYPES = {None: None, "bfloat16": torch.bfloat16}
"""What an option for the dtype of kept numbers may be; None is the dtype they are computed in."""


def name_of(option: Any) -> Any:
    """A dtype as the string that stands for it among the options; anything else as it is."""
    return str(option).removeprefix("torch.") if isinstance(option, torch.dtype) else option


def kept_dtype(option: str | torch.dtype | None, computed: torch.dtype) -> torch.dtype:
    """The dtype that an option asks for, given the one that numbers are computed in."""
    return DTYPES[name_of(option)] or computed


def random_words(first: int, count: int, salt: Number, device: torch.device) -> Tensor:
    """32 random bits for each of the elements first, first + 1, ..., as int64 of shape (count,).

    A multiply-xorshift mixer of 32 bits (the constants are those of Wellons' "lowbias32"). The low 16 bits are for the
    element's first moment, the high ones for its second.
    """
    index = torch.arange(first, first + count, device=device)
    turn = (salt.to(torch.int64) if is_tensor(salt) else int(salt)) * SALT & MASK
    x = (index & MASK) ^ turn
    x = (x ^ x >> 16) * 0x7FEB352D & MASK
    x = (x ^ x >> 15) * 0x846CA68B & MASK
    return x ^ x >> 16


def to_bfloat16(values: Tensor, bits: Tensor) -> Tensor:
    """`values` (float32 or float64) in bfloat16, up with the probability that 16 random bits per element give.

    Numbers that bfloat16 holds exactly stay what they are, and a NaN stays one.
    """
    narrow = values.to(torch.float32)
    word = narrow.view(torch.int32) + (bits & 0xFFFF).to(torch.int32).view(values.shape)
    rounded = (word & -0x10000).view(torch.float32)
    return torch.where(narrow.isnan(), narrow, rounded).to(torch.bfloat16)
