"""The recipe's ``data:`` section."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from pipeline.augmentations._registry import Augmentations, find_augmentation
from pipeline.data.holdout import Holdout
from pipeline.frozen_model import FrozenModel
from pipeline.image_size import height_width, size_text

MAX_PIXELS = 2**14
"""Largest side of an image, in pixels."""
MAX_VIEWS = 100_000
"""Largest number of augmented views."""
MAX_PEERS = 16
"""Largest number of networks that train together."""
MAX_REPEAT = 1000
"""Largest number of times that an epoch has an image."""
SCALE_FACTORS = tuple(step / 10 for step in range(5, 21))
"""Factors of ``crop: scaled``, if a recipe gives none: 0.5, 0.6, … 2.0, as in the code behind Cityscapes' tables."""
SHORT, LONG = (800,), 1333
"""Largest sides of ``crop: keep_ratio``, if a recipe gives none: those of COCO's tables."""
BUCKETS = ((800, 1088), (800, 1344), (1088, 800), (1344, 800))
"""Sizes of its batches, if a recipe gives none: they hold every image of such sides."""
BUCKET_MULTIPLE = 32
"""A side of a bucket is a multiple of it, since a pyramid of maps halves its images five times."""
Probability = Annotated[float, Field(ge=0, le=1)]
Side = Annotated[int, Field(gt=0, le=MAX_PIXELS)]
Bucket = tuple[Side, Side]


def _none_or_all(value: Any) -> int:
    if value not in (0, 1):
        raise ValueError(f"expected 0 or 1, got {value!r}: between them a sample's pixels would depend on its batch")
    return int(value)


_WITH_TARGETS = ("scaled", "keep_ratio", "patch")
"""Crops of images with masks, boxes or smaller copies, which move with them."""
_NO_NORMALIZATION = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
"""Of the images of ``crop: patch``, whose values are in 0 … 1."""
EngineLoad = Annotated[Literal[0, 1], BeforeValidator(_none_or_all)]


class Unlabelled(FrozenModel):
    """Images without labels, which a batch has behind those with labels."""

    path: str
    """Folder of their shards, by ``prepare_unlabelled.py``. If these have labels, nothing reads them."""
    ratio: int = Field(default=1, ge=0, le=MAX_REPEAT)
    """Unlabelled images of a global batch, in multiples of ``batch``; 0 leaves them out."""
    pseudo: str | None = None
    """Folder written by ``pseudo_label.py``: the teacher's logits, and which images are used; null uses all images."""


class Config(FrozenModel):
    """The shards to read, and the transforms of their images."""

    path: str
    """Folder of shards, with its ``manifest.json``."""
    prepare: tuple[str, ...] = ()
    """Script and arguments that create missing shards. The destination folder is appended."""
    classes: PositiveInt | None = None
    """Number of classes that ``--check`` assumes if the shards are missing. Existing shards record their own."""
    samples: PositiveInt | None = None
    """Number of training images that ``--check`` and a cache's ``--dry-run`` assume if the shards are missing."""
    loader: Literal["dali", "memory", "synthetic"] = "dali"
    """Source of the images: ``dali`` decodes during training. ``memory`` keeps a small data set decoded on the device.
    ``synthetic`` reads no image and returns noise, to measure a step that never waits for input."""
    upscale: int = Field(default=1, ge=1, le=8)
    """``patch``: how many times higher and wider the images are that a network restores, 2, 3, 4 or 8, as the shards
    have it."""
    size: Side | tuple[Side, Side]
    """Side of the square images of a batch, in pixels, in training and in validation; or their [height, width].
    ``keep_ratio`` does not need it: networks are tried with the largest of ``buckets``."""
    validation_size: Side | tuple[Side, Side] | None = None
    """Size of the images of validation, likewise; null is ``size``. Networks often do best on images somewhat
    larger than those they were trained on, because random crops enlarge what they show."""
    resize: Side | None = None
    """Short side in pixels before the centre crop of validation; null is the size of validation images."""
    crop: Literal["random_resized", "pad", "scaled", "keep_ratio", "patch"] = "random_resized"
    """Crop of training images: a random area and aspect ratio, or the original size out of the zero-padded image.
    ``scaled``, for images with masks, enlarges or reduces the image by one of ``scales`` and takes a random place of
    it. Its validation images are whole, padded to ``validation_size``. ``keep_ratio``, for images with boxes, resizes
    the whole image to ``short`` and ``long``, and pads it to one of ``buckets``. ``patch``, for images with smaller
    copies, takes a random patch of the copy, of ``size``, and the same part of the image. Its validation images are
    whole, one in a batch. It needs ``loader: memory``, and no ``mean`` and ``std``: values are in 0 … 1."""
    scales: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] | None = None
    """``scaled``: factors of an image's sides, of which each image gets one, all with the same probability; null is
    0.5, 0.6, … 2.0."""
    short: Annotated[tuple[Side, ...], Field(min_length=1)] | None = None
    """``keep_ratio``: pixels of the short side, of which each training image gets one, all with the same probability.
    Validation takes the largest; null is 800."""
    long: Side | None = None
    """``keep_ratio``: largest long side, in pixels. An image whose long side would be longer becomes smaller; null is
    1333."""
    buckets: Annotated[tuple[Bucket, ...], Field(min_length=1)] | None = None
    """``keep_ratio``: sizes of the batches, [height, width], multiples of 32. An image is in batches of the first size
    that holds it at its largest. Null is [800, 1088], [800, 1344], [1088, 800] and [1344, 800]."""
    scale: tuple[PositiveFloat, PositiveFloat] = (0.08, 1.0)
    """``random_resized``: smallest and largest share of the image's area."""
    ratio: tuple[PositiveFloat, PositiveFloat] = (3 / 4, 4 / 3)
    """``random_resized``: smallest and largest aspect ratio, width over height."""
    pad: int = Field(default=4, ge=0, le=MAX_PIXELS)
    """``pad``: pixels added on each side."""
    flip: Probability = 0.5
    """Probability of mirroring left to right; ``patch``: also of mirroring top to bottom, and of transposing."""
    augment: Augmentations = ()
    """Augmentations of training images after crop and flip, in this order, such as
    ``[{randaugment: {ops: 2, magnitude: 9}}, {erasing: {probability: 0.25}}]``; docs/augmentation.md."""
    mean: tuple[float, float, float]
    """Per-channel mean of red, green and blue, for pixel values in 0 … 1."""
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat]
    """Per-channel standard deviation, for pixel values in 0 … 1."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of crops, flips and augmentations."""
    order_seed: int | None = Field(default=None, ge=0, lt=2**63)
    """Seed of the order of the samples; null is the recipe's ``seed``. Runs with the same value see the same batches,
    whatever their ``seed``."""
    shuffle_shards: NonNegativeInt = 0
    """Number of shuffled shards in a group; samples are shuffled within a group. 0 shuffles the whole split."""
    holdout: Holdout | None = None
    """Training images that are held out and replace the validation images, to choose hyper-parameters without the
    test images. Recipes that this one compares with, or starts from, get the same. A teacher keeps its own."""
    views: int | None = Field(default=None, gt=0, le=MAX_VIEWS)
    """Number of augmented views of every image, used in turn; null draws a new view every epoch."""
    repeat: int = Field(default=1, gt=0, le=MAX_REPEAT)
    """Times that an epoch has every image, each in a view of its own, and all in one global batch where it divides
    ``batch``. An epoch is as many times longer."""
    pairs: bool = False
    """True to put another image of its class behind every image of an epoch, drawn anew in each epoch. An epoch is
    twice as long. A class of one image pairs it with itself, in another view."""
    views_per_step: int = Field(default=1, gt=0, le=MAX_PEERS)
    """Views of every image in a batch: 1, or as many as ``student.peers``, each of which then gets a view of its own.
    Decoding costs as many times more."""
    unlabelled: Unlabelled | None = None
    """Images without labels beside those of ``path``, with the same transforms. An epoch is still one of the labelled
    images; the others have epochs of their own. null is none."""
    validation_batch: int | None = Field(default=None, gt=0, le=2**20)
    """Images per validation batch of a rank; null is the size of its micro-batch. Training does not depend on it, so a
    run may continue with another. A library may choose other kernels for another size, whose logits differ in their
    last bits. An image with two nearly equal largest logits can then count otherwise."""
    threads: int | None = Field(default=None, gt=0, le=1024)
    """Decoding threads of a rank. null is the result of ``bench.py loader --tune`` for similar images on this machine.
    Without a result it is the rank's share of the cores."""
    prefetch: int | None = Field(default=None, gt=0, le=1024)
    """Batches that are read ahead, and batches that are decoded ahead. null is the result of ``--tune``, or 2."""
    hw_decoder_load: EngineLoad = 0
    """1 decodes JPEGs by the JPEG engine of the GPU (A100, H100), except for those that the engine does not support,
    such as progressive ones. 0 decodes all by the GPU's cores. The engine rounds differently, so 1 is part of a run's
    identity. ``--tune`` measures both and never sets it. A CPU ignores it."""
    channels_last: bool = True
    """Memory format of the images: true is channels last (NHWC), false is contiguous (NCHW)."""

    @model_validator(mode="after")
    def _ranges_rise(self) -> Config:
        if not self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale must be [smallest, largest] with largest at most 1, got {list(self.scale)}")
        if self.ratio[0] > self.ratio[1]:
            raise ValueError(f"ratio must be [smallest, largest], got {list(self.ratio)}")
        return self

    @model_validator(mode="after")
    def _repetitions_differ(self) -> Config:
        several = {key: getattr(self, key) for key in ("repeat", "views_per_step")}
        for key, number in several.items():
            if self.views is not None and number > self.views:
                raise ValueError(f"{key}: {number} needs as many views, got views: {self.views}; raise views")
        return self

    @model_validator(mode="after")
    def _special_batches_fit(self) -> Config:
        untried = {
            "repeat": self.repeat > 1,
            f"crop: {self.crop}": self.crop in _WITH_TARGETS,
            "mixup and cutmix": self.mixes,
        }
        pairs, views = {"pairs": self.pairs}, {"views": self.views is not None}
        several = {"views_per_step": self.views_per_step > 1}
        kinds = {
            "pairs: true": (self.pairs, untried | views | {"loader: synthetic": self.loader == "synthetic"}),
            f"views_per_step: {self.views_per_step}": (self.views_per_step > 1, untried | pairs),
            "unlabelled": (self.unlabelled is not None, untried | views | pairs | several),
        }
        for kind, (given, others) in kinds.items():
            if given and (odd := next((key for key, set_too in others.items() if set_too), None)):
                raise ValueError(f"{kind} does not go with {odd}; remove one of them")
        return self

    @model_validator(mode="after")
    def _crop_fits(self) -> Config:
        if self.crop in _WITH_TARGETS:
            return self
        key, size = ("validation_size", self.validation_size) if self.validation_size else ("size", self.size)
        crop = max(height_width(size))
        if self.resize is not None and self.resize < crop:
            raise ValueError(f"resize: {self.resize} is smaller than the crop, {key}: {crop}; raise resize")
        same = (None, self.size)
        if self.loader == "memory" and (
            self.crop != "pad" or self.resize not in same or self.validation_size not in same
        ):
            raise ValueError(
                "loader: memory does not resize images: set crop: pad, and remove resize and validation_size"
            )
        return self

    @model_validator(mode="after")
    def _crop_takes_the_size(self) -> Config:
        if self.crop in _WITH_TARGETS:
            return self
        sizes = {"size": self.size, "validation_size": self.validation_size}
        if odd := [key for key, size in sizes.items() if isinstance(size, tuple)]:
            raise ValueError(
                f"{odd[0]}: {size_text(sizes[odd[0]])}: crop: {self.crop} makes square images; give one number, or "
                "crop: scaled with images that have masks"
            )
        return self

    @model_validator(mode="after")
    def _crop_takes_the_keys(self) -> Config:
        unfit = {key: getattr(self, key) for key in ("short", "long", "buckets") if self.crop != "keep_ratio"}
        if self.crop in _WITH_TARGETS:
            unfit |= {"resize": self.resize, "augment": self.augment}
        if self.crop in ("scaled", "keep_ratio"):
            unfit |= {"repeat": self.repeat > 1}
        if self.crop in ("keep_ratio", "patch"):
            defaults = Config.model_fields
            unfit |= {key: getattr(self, key) != defaults[key].default for key in ("scale", "ratio", "pad")}
            unfit |= {"validation_size": self.validation_size, "scales": self.scales}
        if odd := [key for key, given in unfit.items() if given]:
            raise ValueError(f"{odd[0]}: crop: {self.crop} does not take it; remove it")
        wrong, right = ("dali", "memory") if self.crop == "patch" else ("memory", "dali")
        if self.crop in _WITH_TARGETS and self.loader == wrong:
            raise ValueError(f"loader: {wrong} does not take crop: {self.crop}; set loader: {right}")
        return self

    @model_validator(mode="after")
    def _patches_fit(self) -> Config:
        if (self.crop == "patch") != (self.upscale > 1):
            raise ValueError("upscale: crop: patch needs it, such as upscale: 2, and no other crop takes it")
        if self.crop != "patch":
            return self
        if odd := [key for key, value in _NO_NORMALIZATION.items() if getattr(self, key) != value]:
            raise ValueError(f"{odd[0]}: crop: patch has values in 0 … 1, which are not normalised; remove it")
        if isinstance(self.size, tuple):
            raise ValueError(f"size: {size_text(self.size)}: crop: patch makes square images; give one number")
        if self.validation_batch not in (None, 1):
            raise ValueError("validation_batch: crop: patch validates whole images, one in a batch; remove it")
        return self

    @model_validator(mode="before")
    @classmethod
    def _patches_are_not_normalized(cls, values: Any) -> Any:
        return {**_NO_NORMALIZATION, **values} if isinstance(values, dict) and values.get("crop") == "patch" else values

    @model_validator(mode="before")
    @classmethod
    def _largest_bucket_is_the_size(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("crop") != "keep_ratio" or values.get("size") is not None:
            return values
        try:
            return {**values, "size": largest_bucket(values.get("buckets") or BUCKETS)}
        except (TypeError, ValueError, LookupError):  # ``buckets`` is refused for what it is
            return {**values, "size": BUCKETS[0]}

    @model_validator(mode="after")
    def _buckets_fit(self) -> Config:
        buckets = self.bucket_sizes
        if odd := [bucket for bucket in buckets if any(side % BUCKET_MULTIPLE for side in bucket)]:
            fit = [-(-side // BUCKET_MULTIPLE) * BUCKET_MULTIPLE for side in odd[0]]
            raise ValueError(
                f"buckets: {size_text(odd[0])}: the sides must be multiples of {BUCKET_MULTIPLE}; write {fit}"
            )
        if self.crop == "keep_ratio" and self.size != largest_bucket(buckets):
            raise ValueError(
                f"size: {size_text(self.size)} is not the largest of buckets, {size_text(largest_bucket(buckets))}, "
                "which crop: keep_ratio takes; remove it"
            )
        return self

    @property
    def side(self) -> int:
        """Return the side of the images, which are square for the crops that take no whole images."""
        return height_width(self.size)[0]

    @property
    def target_size(self) -> tuple[int, int]:
        """Return the height and width of what a task asks of the pixels of an image of ``size``."""
        height, width = height_width(self.size)
        return self.upscale * height, self.upscale * width

    @property
    def for_validation(self) -> Config:
        """Return the settings with which validation images are decoded: of their own size, without augmentation."""
        changed = {"size": self.validation_size or self.size, "validation_size": None, "augment": ()}
        return self.model_copy(update=changed)

    @property
    def scale_factors(self) -> tuple[float, ...]:
        """Return the factors of ``crop: scaled``."""
        return self.scales or SCALE_FACTORS

    @property
    def short_sides(self) -> tuple[int, ...]:
        """Return the largest short sides of ``crop: keep_ratio``, of which training draws one for each image."""
        return self.short or SHORT

    @property
    def long_side(self) -> int:
        """Return the largest long side of ``crop: keep_ratio``."""
        return self.long or LONG

    @property
    def bucket_sizes(self) -> tuple[Bucket, ...]:
        """Return the sizes of the batches of ``crop: keep_ratio``."""
        return self.buckets or BUCKETS

    @property
    def has_several_sizes(self) -> bool:
        """Return whether batches of training images have several sizes."""
        return self.crop == "keep_ratio" and len(self.bucket_sizes) > 1

    @property
    def rows_per_image(self) -> int:
        """Return how many rows of an epoch each training image brings."""
        return 2 if self.pairs else self.repeat

    @property
    def unlabelled_ratio(self) -> int:
        """Return how many images without labels a batch has for each one with a label."""
        return self.unlabelled.ratio if self.unlabelled else 0

    @property
    def mixes(self) -> bool:
        """Return whether training images are mixed with others, so that they have two classes."""
        return any(find_augmentation(entry.name).kind == "mixtures" for entry in self.augment)

    def view(self, epoch: int, repetition: int = 0) -> int:
        """Return the view in which an epoch has an image for the ``repetition``-th time, counted from 0."""
        number = epoch * self.repeat * self.views_per_step + repetition
        return number if self.views is None else number % self.views


def largest_bucket(buckets: Sequence[Sequence[int]]) -> Bucket:
    """Return the bucket of most pixels, the first of several."""
    height, width = max(buckets, key=lambda bucket: bucket[0] * bucket[1])
    return height, width
