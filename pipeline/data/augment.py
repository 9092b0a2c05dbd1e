"""The order of an epoch, crops and flips, as pure functions of (seed, epoch or view, id).

Every random number comes from a counter, not from the state of a generator. So a sample's augmentation does not depend
on its batch, its rank or earlier draws. A run can resume at any step and on any number of ranks.

Boxes are (top, left, height, width) in pixels. Shape suffixes: B rows of a batch, N samples of a split.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipeline.philox import Purpose, random_words, uniforms

AUGMENT_VERSION = "philox4x32-10, 1"
"""Version of the random augmentation. Its number must rise whenever a change alters what is drawn for a sample."""

_ATTEMPTS = 10
PARTNERS_VIEWS = 2**30
"""What is added to an epoch for the views of partners of a class, so that an image has another crop as a partner."""


def epoch_order(shards_N: ArrayLike, seed: int, epoch: int, shuffle_shards: int = 0) -> NDArray[np.int64]:
    """Return the row numbers [N] of a split in the order of an epoch: a permutation.

    ``shards_N`` is the shard of each row. With ``shuffle_shards`` = 0 the whole split is shuffled. Otherwise the shards
    are shuffled, then the samples within groups of ``shuffle_shards`` shards. This keeps reads local on cold storage.
    """
    shards_N = np.asarray(shards_N)
    keys_N = _sort_keys(np.arange(len(shards_N)), Purpose.ORDER, seed, epoch)
    if shuffle_shards == 0 or len(shards_N) == 0:
        return np.argsort(keys_N, kind="stable")
    shard_order = np.argsort(_sort_keys(np.arange(shards_N.max() + 1), Purpose.SHARDS, seed, epoch), kind="stable")
    # np.lexsort sorts by its last key first: by the group of shards, then by the random key.
    return np.lexsort([keys_N, shard_order[shards_N] // shuffle_shards])


def holdout_keys(ids_N: ArrayLike, *, seed: int) -> NDArray[np.uint64]:
    """Return a random 64-bit number of each id, [N], in whose order images are held out."""
    return _sort_keys(ids_N, Purpose.HOLDOUT, seed, 0)


def _sort_keys(numbers_N: ArrayLike, draw: int, seed: int, epoch: int) -> NDArray[np.uint64]:
    """Return one random 64-bit sort key per number, as [N]."""
    # Not NumPy's own shuffle, which may give another order in another release.
    high, low, _, _ = random_words(numbers_N, epoch, draw, seed=seed).astype(np.uint64)
    return high << np.uint64(32) | low


def sampling_draws(ids_N: ArrayLike, view: ArrayLike, *, seed: int) -> NDArray[np.int64]:
    """Return two random 32-bit numbers of each image and view, [N, 2], by which a detector chooses what it learns."""
    return random_words(ids_N, view, Purpose.SAMPLE, seed=seed)[:2].T.astype(np.int64)


def repeated(order_N: NDArray[np.int64], times: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return an epoch's rows, each ``times`` times in a row, and how often each of them came before; both [N · times].

    So the views of an image are in one global batch, if ``times`` divides its size, and on different ranks. Source:
    Hoffer et al., "Augment your batch", CVPR 2020, and Berman et al., "MultiGrain", arXiv:1902.05509.
    """
    return np.repeat(order_N, times), np.tile(np.arange(times), len(order_N))


def views_of_batches(rows_N: NDArray[np.int64], batch: int, views: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the rows of batches of ``batch`` images, each batch ``views`` times in a row, and the number of the time.

    Numbers count from 0. With batches of two, [a, b, c, d] becomes [a, b, a, b, c, d, c, d].
    """
    rows = np.repeat(rows_N.reshape(-1, 1, batch), views, axis=1)
    return rows.reshape(-1), np.tile(np.repeat(np.arange(views), batch), len(rows))


def occurrences(rows_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return how often each row of an epoch came before, [N]."""
    order_N = rows_N.argsort(kind="stable")
    sorted_N = rows_N[order_N]
    before_N = np.empty_like(rows_N)
    before_N[order_N] = np.arange(len(rows_N)) - np.searchsorted(sorted_N, sorted_N)
    return before_N


def partners_of_class(order_N: NDArray[np.int64], samples: NDArray, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return another row of its class for each row of an epoch [N], every one with equal probability.

    ``samples`` is the table of the split, of which ``order_N`` are the rows that are used. A class of one row has that
    row. Which row it is depends on the seed, the epoch and the id, and not on the order.
    """
    rows_N = np.sort(order_N)
    labels_N = samples["label"][rows_N].astype(np.int64)
    by_label_N = rows_N[labels_N.argsort(kind="stable")]
    count_K = np.bincount(labels_N)
    first_K = count_K.cumsum() - count_K
    places = np.empty(len(samples), np.int64)  # of each row within its class
    places[by_label_N] = np.arange(len(rows_N)) - first_K[samples["label"][by_label_N].astype(np.int64)]
    labels_N = samples["label"][order_N].astype(np.int64)
    others_N = count_K[labels_N] - 1
    steps_N = 1 + np.floor(uniforms(samples["id"][order_N], epoch, Purpose.PAIR, seed=seed)[0] * others_N)
    chosen_N = (places[order_N] + steps_N.astype(np.int64)) % count_K[labels_N]
    return by_label_N[first_K[labels_N] + chosen_N]


def global_batches(order_N: NDArray[np.int64], first: int, end: int, batch: int) -> NDArray[np.int64]:
    """Return the rows of the global batches from step ``first`` of an epoch to before step ``end``."""
    return order_N[first * batch : end * batch]


def bucket_order(order_N: NDArray[np.int64], buckets_N: NDArray[np.int64], batch: int) -> NDArray[np.int64]:
    """Return an epoch's rows as complete global batches, each of one bucket; ``buckets_N`` is the bucket of each row.

    Every bucket has a queue, which the rows enter in their order. It becomes a global batch once it has ``batch`` rows.
    The rows that are left in the queues are not returned.
    """
    of_order_N = buckets_N[order_N]
    places, ends = [], []
    for bucket in np.unique(of_order_N):
        places_of = np.flatnonzero(of_order_N == bucket)
        batches = places_of[: len(places_of) // batch * batch].reshape(-1, batch)
        places.append(batches)
        ends.append(batches[:, -1])
    by_end = np.argsort(np.concatenate([np.zeros(0, np.int64), *ends]), kind="stable")
    return order_N[np.concatenate([np.zeros((0, batch), np.int64), *places])[by_end].reshape(-1)]


def rank_rows(rows: NDArray[np.int64], rank: int, world: int) -> NDArray[np.int64]:
    """Return the rows of global batches that ``rank`` takes of each: ``rank``, ``rank + world``, …

    The size of a global batch is a multiple of ``world``.
    """
    return rows[rank::world]


def random_resized_crop(
    ids_B: ArrayLike,
    view: ArrayLike,
    widths_B: ArrayLike,
    heights_B: ArrayLike,
    *,
    seed: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> NDArray[np.int64]:
    """Return the boxes [B, 4] of torchvision's RandomResizedCrop: ten attempts at area and ratio, else the centre."""
    # All attempts are drawn for all images at once. Counters have no state, so unused draws affect no later one.
    widths_B, heights_B = np.asarray(widths_B, np.int64), np.asarray(heights_B, np.int64)
    draws = Purpose.CROP + np.arange(_ATTEMPTS)[:, None]
    for_area, for_ratio, for_top, for_left = uniforms(ids_B, view, draws, seed=seed)  # [attempts, B] each
    area = widths_B * heights_B * (scale[0] + (scale[1] - scale[0]) * for_area)
    aspect = np.exp(np.log(ratio[0]) + (np.log(ratio[1]) - np.log(ratio[0])) * for_ratio)
    width, height = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (width > 0) & (width <= widths_B) & (height > 0) & (height <= heights_B)
    top = np.floor(for_top * (heights_B - height + 1))
    left = np.floor(for_left * (widths_B - width + 1))
    # argmax of booleans is the first True. A column without one is replaced by the centre box below.
    first_fit = fits.argmax(axis=0), np.arange(len(widths_B))
    boxes_B4 = np.stack([x[first_fit] for x in (top, left, height, width)], axis=1).astype(np.int64)
    return np.where(fits.any(axis=0)[:, None], boxes_B4, _centre_box(widths_B, heights_B, ratio))


def _centre_box(widths_B: NDArray, heights_B: NDArray, ratio: tuple[float, float]) -> NDArray[np.int64]:
    """Return the largest centred boxes [B, 4] whose aspect ratio, width over height, is within ``ratio``."""
    aspect = widths_B / heights_B
    width = np.where(aspect > max(ratio), np.rint(heights_B * max(ratio)), widths_B).astype(np.int64)
    height = np.where(aspect < min(ratio), np.rint(widths_B / min(ratio)), heights_B).astype(np.int64)
    return np.stack([(heights_B - height) // 2, (widths_B - width) // 2, height, width], axis=1)


def pad_crop(ids_B: ArrayLike, view: ArrayLike, *, seed: int, pad: int) -> NDArray[np.int64]:
    """Return the (top, left) [B, 2] of a crop of the original size from the image padded by ``pad``: 0 … 2·pad."""
    for_top, for_left, _, _ = uniforms(ids_B, view, Purpose.PAD, seed=seed)
    return np.floor(np.stack([for_top, for_left], axis=1) * (2 * pad + 1)).astype(np.int64)


def scaled_crop(
    ids_B: ArrayLike,
    view: ArrayLike,
    widths_B: ArrayLike,
    heights_B: ArrayLike,
    *,
    seed: int,
    scales: Sequence[float],
    size: tuple[int, int],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return each image's (height, width) [B, 2] after a random scale, and the (top, left) [B, 2] of a random crop.

    A side is the scale × the image's side, rounded to the nearest number, halves up. ``size`` is the (height, width) of
    the crop. Along a side that is shorter than the crop, the crop begins at 0.
    """
    for_scale, for_top, for_left, _ = uniforms(ids_B, view, Purpose.SCALE, seed=seed)
    factors_B = np.asarray(scales)[np.floor(for_scale * len(scales)).astype(np.int64)]
    sides_B2 = np.stack([np.asarray(heights_B, np.int64), np.asarray(widths_B, np.int64)], axis=1)
    resized_B2 = np.maximum(np.floor(sides_B2 * factors_B[:, None] + 0.5).astype(np.int64), 1)
    places_B2 = np.maximum(resized_B2 - np.asarray(size), 0) + 1
    return resized_B2, np.floor(np.stack([for_top, for_left], axis=1) * places_B2).astype(np.int64)


def drawn_shorts(ids_B: ArrayLike, view: ArrayLike, *, seed: int, shorts: Sequence[int]) -> NDArray[np.int64]:
    """Return the largest short side of each image, [B], drawn from ``shorts``."""
    for_short, _, _, _ = uniforms(ids_B, view, Purpose.SCALE, seed=seed)
    return np.asarray(shorts, np.int64)[np.floor(for_short * len(shorts)).astype(np.int64)]


def keep_ratio(
    widths_B: ArrayLike, heights_B: ArrayLike, *, short: int | NDArray[np.int64], long: int
) -> NDArray[np.int64]:
    """Return each image's (height, width) [B, 2] at its largest, within the limits of its short and its long side.

    A side is the factor × the image's side, rounded to the nearest number, halves up, as in mmdetection.
    """
    sides_B2 = np.stack([np.asarray(heights_B, np.int64), np.asarray(widths_B, np.int64)], axis=1)
    factors_B = np.minimum(short / sides_B2.min(axis=1), long / sides_B2.max(axis=1))
    return np.maximum(np.floor(sides_B2 * factors_B[:, None] + 0.5).astype(np.int64), 1)


def flips(ids_B: ArrayLike, view: ArrayLike, *, seed: int, probability: float) -> NDArray[np.bool_]:
    """Return a mask [B] of the images that are mirrored left to right."""
    return uniforms(ids_B, view, Purpose.FLIP, seed=seed)[0] < probability


def patches(
    ids_B: ArrayLike, view: ArrayLike, widths_B: ArrayLike, heights_B: ArrayLike, *, seed: int, size: tuple[int, int]
) -> NDArray[np.int64]:
    """Return the (top, left) [B, 2] of a patch of (height, width) ``size``, every one with equal probability."""
    for_top, for_left, _, _ = uniforms(ids_B, view, Purpose.PATCH, seed=seed)
    sides_B2 = np.stack([np.asarray(heights_B, np.int64), np.asarray(widths_B, np.int64)], axis=1)
    return np.floor(np.stack([for_top, for_left], axis=1) * (sides_B2 - np.asarray(size) + 1)).astype(np.int64)


def symmetries(ids_B: ArrayLike, view: ArrayLike, *, seed: int, probability: float) -> NDArray[np.bool_]:
    """Return whether a patch is mirrored left to right, top to bottom, and transposed: three draws of each, [B, 3]."""
    return (uniforms(ids_B, view, Purpose.SYMMETRY, seed=seed)[:3] < probability).T


def resize_and_centre_crop(
    widths_B: ArrayLike, heights_B: ArrayLike, resize: int, size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return each image's (height, width) [B, 2] after resizing and its crop's (top, left) [B, 2], as torchvision does.

    The short side becomes ``resize``; the long side is rounded down. The crop of ``size`` × ``size`` is centred.
    """
    sides_B2 = np.stack([np.asarray(heights_B, np.int64), np.asarray(widths_B, np.int64)], axis=1)
    resized_B2 = resize * sides_B2 // sides_B2.min(axis=1, keepdims=True)
    return resized_B2, np.rint((resized_B2 - size) / 2).astype(np.int64)
