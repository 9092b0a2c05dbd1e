"""The base class of tasks: what a student's outputs are measured against.

Each file of this folder without an underscore holds one ``Task``. The file's name is the value of ``task`` in a recipe.
There is no list to register it in. The loss of a task is a loss like any other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from pipeline.batch import Batch, Outputs

Seen = tuple[Tensor, ...]
"""What a task keeps of one batch to measure the whole split: counts, or a row per image."""


class Evaluation(NamedTuple):
    """The exact metrics of the validation split, over the images of all ranks."""

    metrics: dict[str, float]
    """Metrics by name, in percent or the unit of ``Task.units``. The first one decides which weights are the best."""
    samples: int
    """Number of images."""
    loss: float | None = None
    """Mean over the images of the task's own loss, summed in float64; its last bits may depend on the ranks."""
    peers: dict[str, float] = {}  # noqa: RUF012
    """The main metric of each network that trains with this one, of their mean and of their ensemble; never changed."""

    @property
    def main(self) -> float:
        """Return the metric that decides which weights are the best."""
        return next(iter(self.metrics.values()))


class Details(NamedTuple):
    """All measures of one network on the images of a split; None where a measure has no meaning for the task."""

    metrics: dict[str, float | None]
    """Metrics by name: those of the task in percent, ``nll`` in nats, ``ece`` in percent."""
    per_class: dict[str, list[Any]] | None = None
    """Lists with an entry for each class: ``samples``, and ``correct`` or ``average_precision``, in percent."""
    confusion: list[tuple[int, int, int]] | None = None
    """Class of the image, predicted class, and number of images, where that is not 0."""
    reliability: dict[str, list[Any]] | None = None
    """``samples``, mean ``confidence`` and ``accuracy`` of bins of equal width of the first choice's probability."""


class Task(ABC):
    """The metrics of a task. A task has no state: ``summarize`` gets all that ``see`` returned."""

    titles: ClassVar[dict[str, str]]
    """Titles of the metrics of validation, by their name in files; the first is the main one."""
    units: ClassVar[dict[str, str]] = {}
    """Unit of a metric by its name in files, where it is not a percentage."""
    training_metric: ClassVar[str]
    """Name of the metric of a training batch in the journal."""
    images_have: ClassVar[str]
    """What the images of this task's shards have, as the end of a sentence about them."""
    script: ClassVar[str | None] = None
    """Command that prepares such shards; None if most of them do."""
    one_class: ClassVar[bool] = False
    """Whether an image has a single class, in ``labels_B``; losses that read it need such a task."""
    targets: ClassVar[frozenset[str]] = frozenset()
    """Names in ``batch.targets`` of this task's batches; losses that read others need another task."""

    @property
    def metric(self) -> str:
        """Return the name of the main metric."""
        return next(iter(self.titles))

    @property
    def title(self) -> str:
        """Return the title of the main metric."""
        return self.titles[self.metric]

    @property
    def unit(self) -> str:
        """Return the unit of the main metric."""
        return self.unit_of(self.metric)

    @property
    def title_and_unit(self) -> str:
        """Return the title of the main metric with its unit."""
        return f"{self.title}, {self.unit}"

    @property
    def is_dense(self) -> bool:
        """Return whether a network answers for places in an image, and not for the image as a whole."""
        return self.of_pixels or self.of_boxes or self.of_images

    def unit_of(self, metric: str) -> str:
        """Return the unit of a metric."""
        return self.units.get(metric, "%")

    of_pixels: ClassVar[bool] = False
    """Whether the logits are maps, whose pixels have classes; losses of logits must take such maps then."""
    of_boxes: ClassVar[bool] = False
    """Whether an image has any number of objects, each with a box and a class; the logits are those of anchors."""
    of_images: ClassVar[bool] = False
    """Whether the logits are images, which no class stands for."""
    taps: ClassVar[frozenset[str]] = frozenset()
    """Taps that the task reads of each network that it judges."""

    def blank_targets(self, rows: int, num_classes: int, size: tuple[int, int]) -> dict[str, Tensor]:
        """Return targets of a batch without any content, on torch's default device, for a trial of the losses.

        ``size`` is the height and width of what is asked of the pixels, by default those of the images.
        """
        return {}

    def wrong_logits(self, shape: tuple[int, ...], size: tuple[int, int]) -> str | None:
        """Return why a network whose logits have that shape, without the batch, cannot be judged; None if it can.

        ``size`` is that of ``blank_targets``.
        """
        return None

    @abstractmethod
    def measure_batch(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Return the training metric of a batch of one rank, a scalar in percent; it must be cheap."""

    @abstractmethod
    def see(self, outputs: Outputs, batch: Batch) -> Seen:
        """Return what the metrics need of a validation batch, on the device. Rows of label −1 are padding."""

    @abstractmethod
    def summarize(self, seen: Iterable[Seen]) -> Evaluation:
        """Return the metrics of all batches of all ranks; every rank calls it with equally many batches."""

    @abstractmethod
    def agreement(self, a: Outputs, b: Outputs, batch: Batch) -> Tensor:
        """Return int64 [2]: the decisions in which two networks agree about the images, and all decisions."""

    @abstractmethod
    def detail_rows(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Return what ``detail`` needs of each image, float64 [B, C]; padding has rows, too."""

    @abstractmethod
    def detail(self, rows_NC: Tensor, num_classes: int, accepted_NK: Tensor | None = None) -> Details:
        """Return all measures of the images of a split, from their rows in the order of the ids.

        ``accepted_NK`` (bool) says which classes count as right, where images of one class have several that do.
        """

    @abstractmethod
    def divergence(self, teacher: Outputs, student: Outputs) -> Tensor | None:
        """Return KL(teacher‖student) of each image in nats, float64 [B]; None if an image has no distribution."""
