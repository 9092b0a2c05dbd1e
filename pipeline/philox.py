"""Random numbers as a pure function of (seed, id, view, draw): Philox4x32-10, a generator without state.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Shape suffix R: rows.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray


class Purpose(IntEnum):
    """The first number of the draws of each purpose.

    It is part of the counter, because an order and a crop of one seed must not share random numbers.
    """

    ORDER = 0
    SHARDS = 1
    FLIP = 2
    PAD = 3
    HOLDOUT = 4
    PARTNER = 5
    """Which image is mixed into another, and whether by mixup or CutMix."""
    SCALE = 6
    """By which factor an image with a mask is enlarged or reduced, and which place of it is taken.

    It is also which short side an image with boxes gets."""
    PAIR = 7
    """Which other image of its class stands beside an image."""
    PATCH = 8
    """Which patch of an image is taken."""
    SYMMETRY = 9
    """How a patch is mirrored and transposed."""
    SAMPLE = 10
    """From which anchors and regions of an image a detector learns."""
    CROP = 16
    """Attempt i at a crop uses ``CROP + i``."""
    AUGMENTATION = 2**24
    """Draw i of the augmentation at position p of ``data.augment`` uses ``(1 + p) * AUGMENTATION + i``."""


def philox4x32(counter: NDArray[np.uint32], key: tuple[int, int]) -> NDArray[np.uint32]:
    """Return Philox4x32-10 of each column of ``counter`` [4, …]: four random 32-bit words per column, as [4, …]."""
    # 64-bit words, because each round needs the upper half of a 32-bit by 32-bit product.
    mask, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    x0, x1, x2, x3 = counter.astype(np.uint64)
    key0, key1 = key
    for _ in range(10):
        product0, product1 = x0 * np.uint64(0xD2511F53), x2 * np.uint64(0xCD9E8D57)
        x0, x1 = (product1 >> shift) ^ x1 ^ np.uint64(key0), product1 & mask
        x2, x3 = (product0 >> shift) ^ x3 ^ np.uint64(key1), product0 & mask
        key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([x0, x1, x2, x3]).astype(np.uint32)


def random_words(ids: ArrayLike, view: ArrayLike, draw: ArrayLike, *, seed: int) -> NDArray[np.uint32]:
    """Return four random words for each (id, view, draw), as [4, …]; the three broadcast.

    ``seed`` and ids have 64 bits, ``view`` and ``draw`` 32.
    """
    ids_64, view_64, draw_64 = np.broadcast_arrays(*(np.asarray(x, np.int64) for x in (ids, view, draw)))
    counter = np.stack([draw_64, view_64, ids_64, ids_64 >> 32]).astype(np.uint32)
    return philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))


def uniforms(ids: ArrayLike, view: ArrayLike, draw: ArrayLike, *, seed: int) -> NDArray[np.float64]:
    """Return four uniform numbers in [0, 1) for each (id, view, draw), as [4, …]."""
    return np.ldexp(random_words(ids, view, draw, seed=seed).astype(np.float64), -32)
