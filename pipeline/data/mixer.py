"""The other image that mixup or CutMix mixes into an image, and how: a function of (seed, id, view) alone.

A partner is any training image that is trained on, whatever batch, rank or epoch it is in. It has the crop, flip and
other augmentations of the same view. So a mixed image is the same for any number of ranks, after a resume, and for a
teacher whose outputs are cached.

Shape suffixes: R rows of a request, B of a batch, P mixed images of these, N images that are trained on, K classes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.augmentations._base import SampleDraws
from pipeline.augmentations._mixing import MixAugmentation, mix_images, mix_labels
from pipeline.augmentations._registry import build_augmentations
from pipeline.batch import Batch
from pipeline.data.config import Config
from pipeline.philox import Purpose, random_words


class Mixture(NamedTuple):
    """How the images of a request are mixed."""

    drawn_R6: NDArray[np.float64]
    """A row of ``augmentations/_mixing.py`` for each image."""
    partners_P: NDArray[np.int64]
    """Rows of the partners in the sample table."""
    labels_P: NDArray[np.int64]
    """Labels of the partners."""
    classes: int
    """Number of classes."""

    @property
    def places_P(self) -> NDArray[np.int64]:
        """Return which rows of the request are mixed."""
        return np.flatnonzero(self.drawn_R6[:, 0] < 1)

    def partners_of(self, rows: slice) -> slice:
        """Return which of the partners belong to those rows of the request."""
        first, end = np.searchsorted(self.places_P, [rows.start, rows.stop]).tolist()
        return slice(first, end)

    def of(self, rows: slice) -> Mixture:
        """Return the mixture of those rows of the request."""
        ours = self.partners_of(rows)
        partners_P, labels_P = self.partners_P[ours], self.labels_P[ours]
        return self._replace(drawn_R6=self.drawn_R6[rows], partners_P=partners_P, labels_P=labels_P)

    def __call__(self, batch: Batch) -> Batch:
        """Return the mixed batch, with targets ``soft_BK``; the partners' images are behind those of ``batch``.

        It overwrites the images.
        """
        images_BCHW: Tensor = mix_images(batch.images_BCHW, self.drawn_R6)
        labels_B, soft_BK = mix_labels(batch.labels_B, self.drawn_R6, self.labels_P, self.classes)
        return batch._replace(images_BCHW=images_BCHW, labels_B=labels_B, targets=batch.targets | {"soft_BK": soft_BK})


def unmixed_targets(config: Config, labels_B: Tensor, classes: int) -> dict[str, Tensor]:
    """Return the targets of a batch of images that are not mixed, for a recipe that mixes them or not."""
    if not config.mixes:
        return {}
    return {"soft_BK": torch.zeros(len(labels_B), classes, device=labels_B.device).scatter_(1, labels_B[:, None], 1.0)}


def partners(config: Config) -> str:
    """Return from which images a partner is drawn, for the facts of a cache."""
    holdout = config.holdout
    return f"all but {holdout.share!r} of each class, by seed {holdout.seed}" if holdout else "all training images"


class Mixer:
    """The draws of mixtures: mixup, CutMix, or one of them for each image.

    ``rows_N`` are the rows of the sample table that are trained on, in storage order.
    """

    def __init__(self, config: Config, samples: NDArray, rows_N: NDArray[np.int64], classes: int) -> None:
        self._seed = config.seed
        augmentations = enumerate(build_augmentations(config.augment, config.side))
        mixings = [(position, each) for position, each in augmentations if isinstance(each, MixAugmentation)]
        # One of two has a switch: the probability that it takes the other's place.
        self._mixings = sorted(mixings, key=lambda each: hasattr(each[1].config, "switch"))
        self._samples = samples
        self._rows_N = rows_N
        self._classes = classes

    def draw(self, ids_R: NDArray[np.int64], view: int | NDArray[np.int64]) -> Mixture | None:
        """Return the mixture of the images with those ids, in a view or in one of each; None without mixing."""
        if not self._mixings:
            return None
        high_R, low_R, choices_R, _ = random_words(ids_R, view, Purpose.PARTNER, seed=self._seed)
        drawn_R6, *others = (
            each.draw(SampleDraws(ids_R, view, self._seed, position)) for position, each in self._mixings
        )
        for other_R6, (_, mixing) in zip(others, self._mixings[1:], strict=True):
            switch = 0.5 if mixing.config.switch is None else mixing.config.switch
            switched_R = np.ldexp(choices_R.astype(np.float64), -32) < switch
            drawn_R6 = np.where(switched_R[:, None], other_R6, drawn_R6)
        # Of 64 bits the remainder is uniform to nine digits and more, for fewer images than 2**32.
        numbers_R = (high_R.astype(np.uint64) << np.uint64(32) | low_R) % np.uint64(len(self._rows_N))
        places_P = np.flatnonzero(drawn_R6[:, 0] < 1)
        partners_P = self._rows_N[numbers_R[places_P].astype(np.int64)]
        return Mixture(drawn_R6, partners_P, self._samples["label"][partners_P].astype(np.int64), self._classes)
