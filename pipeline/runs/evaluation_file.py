"""The file ``evaluation.json``: what a student is worth on validation images, and what it costs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, NonNegativeInt, PositiveInt

from pipeline.runs.files import STUDENT, STUDENT_BEST, STUDENT_EMA, write_json
from shards.documents import read_document

EVALUATIONS = {STUDENT: "evaluation.json", STUDENT_BEST: "evaluation_best.json", STUDENT_EMA: "evaluation_ema.json"}
"""Name of the file in a run folder, by the file of the weights."""

# JSON has no NaN and no infinity.
_Number = Annotated[
    float | None, BeforeValidator(lambda x: None if isinstance(x, float) and not math.isfinite(x) else x)
]


class _Section(BaseModel):
    # Later code may write more keys.
    model_config = ConfigDict(extra="ignore", frozen=True)


class PerClass(_Section):
    """Figures of each class, in the order of ``classes``."""

    samples: tuple[NonNegativeInt, ...]
    """Images of the class; of masks, pixels; of boxes, objects."""
    correct: tuple[NonNegativeInt, ...] | None = None
    """Those of them whose first choice is right; None if an image has not exactly one class."""
    average_precision: tuple[_Number, ...] | None = None
    """Average precision in percent, None for a class without an image; only where an image has several classes, or
    boxes."""
    iou: tuple[_Number, ...] | None = None
    """Intersection over union in percent, None for a class that occurs nowhere; only of masks."""

    @property
    def percent(self) -> list[float | None]:
        """Return the accuracy of each class in percent, its average precision or IoU; None for a class without any."""
        if self.correct is None:
            return list(self.iou or self.average_precision or ())
        pairs = zip(self.correct, self.samples, strict=True)
        return [100 * correct / samples if samples else None for correct, samples in pairs]


class Reliability(_Section):
    """Bins of equal width of the first choice's probability; zeros in a bin without an image."""

    samples: tuple[NonNegativeInt, ...]
    confidence: tuple[float, ...]
    """Mean probability of the first choice, between 0 and 1."""
    accuracy: tuple[float, ...]
    """Share of right first choices, between 0 and 1."""


class EvaluatedTeacher(_Section):
    """The teacher on the same images."""

    name: str
    """Its networks."""
    metrics: dict[str, _Number]
    per_class: PerClass | None
    reliability: Reliability | None


class PictureFile(_Section):
    """The picture of some images with masks or boxes, or as networks restore them: a PNG, whose rows are images."""

    file: str
    """Its name, in the same folder."""
    columns: tuple[str, ...]
    """What its columns are: ``image``, ``truth``, ``teacher`` and ``student``; of boxes all but the first. Of restored
    images the first is ``bicubic``."""
    classes: tuple[NonNegativeInt, ...]
    """The classes that its masks or boxes have."""


class NetworkCost(_Section):
    """The size of the student."""

    model: str
    parameters: NonNegativeInt
    macs: NonNegativeInt
    """Multiply-accumulates of the forward of one image."""
    bytes: NonNegativeInt
    """Size of the weights file."""


class Speed(_Section):
    """The time of a forward of the student: the median of several rounds, the fastest and the slowest of them."""

    batch: PositiveInt
    latency_ms: float
    low_ms: float
    high_ms: float
    images_per_second: float


class EvaluationFile(_Section):
    """The content of ``evaluation.json``. A measure that has no meaning for the task is None."""

    weights: str
    """Name of the weights file."""
    sha256: str
    """Digest of that file."""
    recipe: str | None
    """The recipe as a command line names it, None for one that is not among the project's."""
    task: str
    shards: str
    """Script that prepared the shards, by its name."""
    shards_sha256: str
    """Digest of their manifest."""
    data: str
    """Name of their folder."""
    real_labels: str | None
    """Name of the file of accepted labels, where it replaces the labels of the shards."""
    samples: NonNegativeInt
    """Number of images."""
    metrics: dict[str, _Number]
    """``nll`` in nats, PSNR in dB, all others in percent. ``bicubic_…`` are those of bicubic interpolation."""
    classes: tuple[str, ...]
    """Names of the classes among which the network chose."""
    per_class: PerClass | None
    confusion: tuple[tuple[NonNegativeInt, NonNegativeInt, PositiveInt], ...] | None
    """Class of the image, first choice, and number of images, where that is not 0; of masks, of pixels."""
    reliability: Reliability | None
    masks: PictureFile | None = None
    """Only of masks."""
    boxes: PictureFile | None = None
    """Only of boxes."""
    images: PictureFile | None = None
    """Only of restored images."""
    teacher: EvaluatedTeacher | None
    agreement: _Number
    """Percentage of decisions in which student and teacher agree."""
    kl: _Number
    """Mean of KL(teacher‖student) over the images, in nats."""
    network: NetworkCost
    speed: tuple[Speed, ...] | None
    device: str
    """Name of the GPU or processor."""
    threads: PositiveInt
    """Threads of torch on the CPU."""

    @property
    def latency_ms(self) -> float | None:
        """Return the milliseconds of the smallest measured batch; None if no speed was measured."""
        return min(self.speed, key=lambda each: each.batch).latency_ms if self.speed else None


def read_evaluation(path: Path) -> EvaluationFile:
    """Return what ``write_evaluation`` wrote. Raises DamagedFile for other content, FileNotFoundError for no file."""
    return read_document(path, EvaluationFile, "evaluate the weights again")


def write_evaluation(path: Path, evaluation: EvaluationFile) -> None:
    """Write the file atomically: a reader sees the old one or the complete new one."""
    write_json(path, evaluation.model_dump())
