"""Pseudo-labels: a teacher's logits for images without labels, and which of these images are used.

The logits are a cache of one view, in the transform of validation. Two files beside it, which are written last, say
which images are used:

    kept.npy      int64 [n], their ids, by class; an id of a rare class is there several times
    kept.json     the settings of the choice, and the digest of kept.npy

N ids, K classes.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveInt

from pipeline.frozen_model import FrozenModel
from pipeline.teachers.cache import LOGITS, Cache
from pipeline.teachers.sample import check_sample
from shards.documents import read_document
from shards.manifest import sha256_of

SELECTED_IDS, SELECTION_FILE = "kept.npy", "kept.json"


class SelectedImages(FrozenModel):
    """How images were chosen by the teacher's answers to them."""

    keep: Annotated[float, Field(ge=0, le=1)]
    """Least probability of an image's likeliest class."""
    per_class: PositiveInt
    """Largest number of images of a class."""
    sha256: str
    """Digest of the file with their ids."""


def has_pseudo_labels(folder: Path) -> bool:
    """Return whether a folder has pseudo-labels that are complete."""
    return (folder / SELECTION_FILE).is_file()


class PseudoLabels:
    """The pseudo-labels in a folder. Raises FileNotFoundError or ValueError, one line, if there are none or damaged."""

    def __init__(self, folder: Path) -> None:
        if not has_pseudo_labels(folder):
            raise FileNotFoundError(
                f"{folder}: there are no pseudo-labels here, or not all; write them: pipeline/pseudo_label.py RECIPE "
                "SHARDS FOLDER"
            )
        self.folder = folder
        self.cache = Cache(folder)
        self.choice = read_document(folder / SELECTION_FILE, SelectedImages, "write the pseudo-labels again")

    @property
    def digest(self) -> str:
        """Return a hash of the facts that determine the logits, and of the ids."""
        facts = [self.cache.digest(()), self.choice.model_dump()]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    @property
    def classes(self) -> int:
        """Return the number of classes."""
        return self.cache.header.kinds[LOGITS].shape[0]

    def logits(self) -> NDArray[np.float16]:
        """Return the logits [N, K] by id, memory-mapped, after a check of some of them."""
        rows = self.cache.complete_view(0, LOGITS)
        check_sample(self.cache, [LOGITS], 1)
        return rows

    def ids(self) -> NDArray[np.int64]:
        """Return the ids of the images that are used, each as often as an epoch has it."""
        path = self.folder / SELECTED_IDS
        if not path.is_file() or sha256_of(path) != self.choice.sha256:
            raise ValueError(f"{path} is missing or does not match the sha256 in {SELECTION_FILE}; write it again")
        return np.load(path, allow_pickle=False)
