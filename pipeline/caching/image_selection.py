"""The choice of images without labels by a teacher's answers to them.

n ids with an image, N ids, K classes.
"""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.teachers.pseudo import SELECTED_IDS, SELECTION_FILE, SelectedImages
from shards.manifest import write_atomically

_CHUNK = 2**24
"""Logits that are made probabilities at once."""


def select_images(
    logits_NK: NDArray[np.float16], ids_n: NDArray[np.int64], keep: float, per_class: int
) -> NDArray[np.int64]:
    """Return the ids of the images to use, by class and the surest first; those of rare classes several times.

    An image's class is the likeliest one. It is used if its probability is at least ``keep``, and if it is among the
    ``per_class`` surest of its class. Classes with fewer images have theirs again, the surest first, until all classes
    have equally many. Classes without any image stay empty. Source: Xie et al., CVPR 2020, section 3.2.
    """
    classes_n, sure_n = _surest(logits_NK, ids_n)
    order = np.lexsort([ids_n, -sure_n, classes_n])
    order = order[sure_n[order] >= keep]
    counts_K = np.bincount(classes_n[order], minlength=logits_NK.shape[1])
    each = min(per_class, int(counts_K.max()))
    of_classes = np.split(ids_n[order], counts_K.cumsum()[:-1])
    return np.concatenate([np.resize(ids[:each], each if len(ids) else 0) for ids in of_classes])


def _surest(logits_NK: NDArray[np.float16], ids_n: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the likeliest class of each id, and its probability."""
    size = max(_CHUNK // logits_NK.shape[1], 1)
    classes, sure = [np.empty(0, np.int64)], [np.empty(0)]
    for start in range(0, len(ids_n), size):
        part_nK = logits_NK[ids_n[start : start + size]].astype(np.float64)
        classes.append(part_nK.argmax(axis=1))
        sure.append(1 / np.exp(part_nK - part_nK.max(axis=1, keepdims=True)).sum(axis=1))
    return np.concatenate(classes), np.concatenate(sure)


def write_selection(folder: Path, ids: NDArray[np.int64], keep: float, per_class: int) -> None:
    """Write the ids of the images to use, and then how they were chosen."""
    (folder / SELECTION_FILE).unlink(missing_ok=True)  # a folder with it is complete
    file = io.BytesIO()
    np.save(file, ids, allow_pickle=False)
    write_atomically(folder / SELECTED_IDS, file.getvalue())
    choice = SelectedImages(keep=keep, per_class=per_class, sha256=hashlib.sha256(file.getvalue()).hexdigest())
    write_atomically(folder / SELECTION_FILE, (json.dumps(choice.model_dump(), indent=1) + "\n").encode())
