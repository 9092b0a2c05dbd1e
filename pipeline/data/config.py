"""The recipe's ``data:`` section."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from pipeline.frozen_model import FrozenModel

MAX_PIXELS = 2**14
MAX_VIEWS = 100_000
Probability = Annotated[float, Field(ge=0, le=1)]
Side = Annotated[int, Field(gt=0, le=MAX_PIXELS)]


class Config(FrozenModel):
    """Which shards are read, and what becomes of an image on its way into a batch."""

    path: str
    """Folder of shards, with its ``manifest.json``."""
    prepare: tuple[str, ...] = ()
    """Script and arguments that make the shards where they are missing; the destination is added."""
    classes: PositiveInt | None = None
    """What ``--check`` takes for their number of classes where they are not there; those that are there know it."""
    samples: PositiveInt | None = None
    """What ``--check`` and a cache's ``--dry-run`` take for their number of training images, likewise."""
    loader: Literal["dali", "memory", "synthetic"] = "dali"
    """``dali`` decodes as it goes; ``memory`` keeps small sets decoded on the device; ``synthetic`` looks at no image
    at all and gives noise in its place, to show what a step takes that waits for no input."""
    size: Side
    """Side of the square images of a batch, in pixels, in training and in validation."""
    resize: Side | None = None
    """Short side before the centre crop of validation; null is ``size``."""
    crop: Literal["random_resized", "pad"] = "random_resized"
    """How training crops: a random area and aspect ratio, or the image's own size out of the zero-padded image."""
    scale: tuple[PositiveFloat, PositiveFloat] = (0.08, 1.0)
    """``random_resized``: least and largest share of the image's area."""
    ratio: tuple[PositiveFloat, PositiveFloat] = (3 / 4, 4 / 3)
    """``random_resized``: least and largest width over height."""
    pad: int = Field(default=4, ge=0, le=MAX_PIXELS)
    """``pad``: pixels added on each side."""
    flip: Probability = 0.5
    """Probability of mirroring left to right."""
    mean: tuple[float, float, float]
    """Subtracted from red, green and blue, which lie in 0 … 1."""
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat]
    """Divides them afterwards."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Keys crops and flips; the recipe's ``seed`` keys the order."""
    shuffle_shards: NonNegativeInt = 0
    """Samples are shuffled within groups of that many shuffled shards; 0 shuffles the whole split."""
    views: int | None = Field(default=None, gt=0, le=MAX_VIEWS)
    """Number of augmented looks at an image, taken in turn; null is a new one every epoch."""
    validation_batch: int | None = Field(default=None, gt=0, le=2**20)
    """Images a rank validates at a time; null is the size of its micro-batch."""
    threads: int | None = Field(default=None, gt=0, le=1024)
    """Decoding threads of a rank; null is what ``bench.py loader --tune`` found best for such images on such a machine,
    and before there is such a finding its share of the machine's cores."""
    prefetch: int | None = Field(default=None, gt=0, le=1024)
    """Batches that are read, and batches that are decoded, ahead of the one in use; null likewise, or 2."""
    hw_decoder_load: Probability = 0.0
    """Share of a batch, its largest images, that a GPU's JPEG engine decodes, where it has one; its cores do the rest.
    They round differently, so this is never tuned behind the recipe's back: with any but 0 a sample's pixels depend on
    the others of its batch and on its process's first, which other numbers of ranks and a teacher's cache change."""
    channels_last: bool = True
    """Memory format of the images: channels beside one another, or planes."""

    @model_validator(mode="after")
    def _ranges_rise(self) -> Config:
        if not self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale must rise and end at 1 or below, got {list(self.scale)}")
        if self.ratio[0] > self.ratio[1]:
            raise ValueError(f"ratio must rise, got {list(self.ratio)}")
        return self

    @model_validator(mode="after")
    def _crop_fits(self) -> Config:
        if self.resize is not None and self.resize < self.size:
            raise ValueError(f"resize: {self.resize} is smaller than size: {self.size}, which is cropped from it")
        if self.loader == "memory" and (self.crop != "pad" or self.resize not in (None, self.size)):
            raise ValueError("loader: memory takes images as they are: set crop: pad and leave resize out")
        return self

    def view(self, epoch: int) -> int:
        """Return which look at the images an epoch takes."""
        return epoch if self.views is None else epoch % self.views
