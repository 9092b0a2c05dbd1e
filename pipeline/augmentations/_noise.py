"""Normal noise on a device: Philox4x32-10 in integers, and a table of quantiles. Every device has the same bits.

Shape suffixes: N images, M counters of all images.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.augmentations._base import send

_MASK = 0xFFFFFFFF
_PER_COUNTER = 8
"""Numbers that a counter gives: two from each of its four words."""


def normal_noise(keys_N2: NDArray[np.float64], counts: Sequence[int], device: torch.device) -> tuple[Tensor, ...]:
    """Return for each image as many standard normal numbers as ``counts`` says, float32.

    They are a function of the image's key, two whole numbers of 32 bits, and have 65536 values up to ±4.3.
    """
    counters = [-(-count // _PER_COUNTER) for count in counts]
    firsts = np.cumsum([0, *counters[:-1]])
    table = send(np.column_stack([keys_N2, firsts, counters]).astype(np.int64), device)
    total = sum(counters)
    # The number of rows is known here, so that the host need not wait for it.
    rows_M = torch.repeat_interleave(table[:, 3], output_size=total)
    key0_M, key1_M, first_M, _ = table.index_select(0, rows_M).unbind(1)
    words = philox_words(torch.arange(total, device=device) - first_M, key0_M, key1_M)
    halves = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=1)
    numbers = _quantiles(device).index_select(0, halves.flatten())
    parts = numbers.split([_PER_COUNTER * each for each in counters])
    return tuple(part[:count] for part, count in zip(parts, counts, strict=True))


def philox_words(numbers_M: Tensor, key0_M: Tensor, key1_M: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four words of Philox4x32-10 of the counters (number, 0, 0, 0), each under its own key, as int64."""
    zero = torch.zeros_like(numbers_M)
    x0, x1, x2, x3 = numbers_M, zero, zero, zero
    for _ in range(10):
        (high0, low0), (high1, low1) = _product(x0, 0xD2511F53), _product(x2, 0xCD9E8D57)
        x0, x1, x2, x3 = high1 ^ x1 ^ key0_M, low1, high0 ^ x3 ^ key1_M, low0
        key0_M, key1_M = (key0_M + 0x9E3779B9) & _MASK, (key1_M + 0xBB67AE85) & _MASK
    return x0, x1, x2, x3


def _product(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Return the upper and the lower 32 bits of the product of numbers of 32 bits."""
    # In halves of 16 bits, because int64 does not hold a product of two unsigned numbers of 32 bits.
    upper = (x >> 16) * factor
    middle = (x & 0xFFFF) * factor + ((upper & 0xFFFF) << 16)
    return (upper >> 16) + (middle >> 32), middle & _MASK


@cache
def _quantiles(device: torch.device) -> Tensor:
    """Return the normal quantiles of the middles of 65536 equal shares."""
    # Computed on the host for every device, whose own function might round differently.
    shares = (np.arange(2**16) + 0.5) / 2**16
    return send(torch.special.ndtri(torch.from_numpy(shares)).float().numpy(), device)
