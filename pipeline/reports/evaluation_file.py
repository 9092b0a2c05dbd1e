"""``evaluation.json`` of a run folder, as the report reads it: a key that is missing is only not shown."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from pipeline.runs.files import EVALUATION_FILE
from shards.documents import read_document

Numbers = tuple[float | None, ...]


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Reliability(_Part):
    """The images in bins of the network's confidence."""

    samples: Numbers
    confidence: Numbers
    accuracy: Numbers


class PerClass(_Part):
    """Images of each class, and how many of them are classified correctly."""

    samples: tuple[int, ...]
    correct: tuple[int, ...]


class EvaluatedTeacher(_Part):
    """The teacher on the same images."""

    name: str = "teacher"
    metrics: dict[str, float | None] = {}
    per_class: PerClass | None = None
    reliability: Reliability | None = None


class NetworkSize(_Part):
    """The size of the evaluated network."""

    parameters: int | None = None
    macs: float | None = None


class Speed(_Part):
    """The latency of the evaluated network at one batch size."""

    batch: int
    latency_ms: float


class EvaluationFile(_Part):
    """What the report reads of the file."""

    sha256: str | None = None
    samples: int | None = None
    metrics: dict[str, float | None] = {}
    classes: tuple[str, ...] = ()
    per_class: PerClass | None = None
    reliability: Reliability | None = None
    teacher: EvaluatedTeacher | None = None
    agreement: float | None = None
    kl: float | None = None
    network: NetworkSize | None = None
    speed: tuple[Speed, ...] | None = None
    device: str | None = None

    @property
    def latency_ms(self) -> float | None:
        """Return the milliseconds of the smallest measured batch; None if no speed was measured."""
        return min(self.speed, key=lambda each: each.batch).latency_ms if self.speed else None


def read_evaluation(folder: Path) -> EvaluationFile | None:
    """Return the evaluation of a run, None if there is none. Raises DamagedFile if it cannot be read."""
    path = folder / EVALUATION_FILE
    if not path.is_file():
        return None
    return read_document(path, EvaluationFile, "delete it, and evaluate the run again")


def accuracies(per_class: PerClass) -> list[float | None]:
    """Return the accuracy of each class in percent, None for a class without an image."""
    pairs = zip(per_class.correct, per_class.samples, strict=True)
    return [100 * correct / samples if samples else None for correct, samples in pairs]
