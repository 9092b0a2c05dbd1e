"""Sample requests: the samples of each micro-batch, and the geometry of each image.

This module decides *what* a batch contains; a decoder only turns requests into pixels.

Shape suffixes: B rows of a request. Boxes are (top, left, height, width) in pixels.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from pipeline.batch import Batch, Progress, rows_per_rank
from pipeline.data import augment
from pipeline.data.augmenter import Augmenter, Drawn
from pipeline.data.box_targets import box_targets
from pipeline.data.buckets import bucket_numbers, canvas, count_batches
from pipeline.data.config import Config
from pipeline.data.mixer import Mixer, Mixture
from pipeline.data.read_ahead import CPU
from pipeline.image_size import height_width
from pipeline.tasks._boxes import DRAWS
from pipeline.tasks.multilabel import LABELS
from shards.read import SplitReader

Columns = Callable[[int], Mapping[str, NDArray]]
"""A function ``columns(view)`` that returns more arrays by name, with one row per id. They may be memory-mapped."""


# A remote file system answers several reads in the time of one.
_READS_AT_ONCE = 8
_PAGE = mmap.PAGESIZE
_TABLE_ROWS = 2**16
"""Largest number of rows in a request of several batches. CIFAR has fewer in an epoch."""
_MAX_ASPECT = 16
"""Largest part of an image's long side that validation decodes, in multiples of the short side."""


class Geometry(NamedTuple):
    """The steps for each image: cut out the box, resize it, take the crop (zeros outside the image), mirror it."""

    boxes_B4: NDArray[np.int64]
    """(top, left, height, width) of the box in the stored image."""
    resized_B2: NDArray[np.int64]
    """(height, width) of the box after resizing."""
    crops_B2: NDArray[np.int64]
    """(top, left) of the ``size`` × ``size`` crop in the resized box."""
    flips_B: NDArray[np.bool_]
    """Mask of the images that are mirrored left to right. ``patch`` has [B, 3]: whether an image is mirrored left to
    right, then top to bottom, and then transposed."""


class SampleRequest(NamedTuple):
    """A micro-batch of one rank before decoding, or for ``loader: memory`` several that follow one another.

    Its tensors are on the host, pinned if they go to a GPU.
    """

    rows_B: NDArray[np.int64]
    """Row numbers in the split's sample table. Those of the partners of mixed images are behind those of the batches;
    so are their geometry, encoded images and draws."""
    geometry: Geometry
    encoded: list[NDArray[np.uint8]]
    """The encoded images, in memory; empty for a loader that does not decode."""
    masks: list[NDArray[np.uint8]]
    """The encoded masks, in memory; empty for images without."""
    ids_B: Tensor
    labels_B: Tensor
    batch: int
    """Number of rows of each batch; the last may have fewer."""
    targets: dict[str, Tensor] = {}  # noqa: RUF012
    """The task's targets, if the shards have any besides the labels."""
    drawn: Drawn = ()
    """Draws of ``data.augment``; empty for images that are not augmented."""
    mixture: Mixture | None = None
    """How the images are mixed; None if they are not."""
    canvas: tuple[int, int] | None = None
    """Height and width of the images, if they are not those of ``data.size``."""
    views: int = 1
    """Views of each image, of ``data.views_per_step``: a batch has its images in one view, then in the next."""

    def rows_of_batches(self) -> Iterator[tuple[slice, slice]]:
        """Yield the rows of each batch, and those of its images' partners."""
        count = len(self.ids_B)
        for start in range(0, count, self.batch):
            rows = slice(start, min(start + self.batch, count))
            partners = self.mixture.partners_of(rows) if self.mixture else slice(0, 0)
            yield rows, slice(count + partners.start, count + partners.stop)

    def to_batch(self, images_BCHW: Tensor, device: torch.device) -> Batch:
        """Return the batch of a request for a single one, whose images, with the partners', are on ``device``."""
        labels_B, ids_B = (x.to(device, non_blocking=True) for x in (self.labels_B, self.ids_B))
        targets = {name: x.to(device, non_blocking=True) for name, x in self.targets.items()}
        batch = self.with_views(Batch(images_BCHW, labels_B, ids_B, {}, targets))
        return self.mixture(batch) if self.mixture else batch

    def with_views(self, batch: Batch) -> Batch:
        """Return a decoded batch of this request with the views of its images as [V, B, C, H, W], if it has several."""
        if self.views == 1:
            return batch
        images_VBCHW = batch.images_BCHW.unflatten(0, (self.views, -1))
        count = images_VBCHW.shape[1]
        return batch._replace(images_BCHW=images_VBCHW, labels_B=batch.labels_B[:count], ids_B=batch.ids_B[:count])


def training_geometry(config: Config, samples_B: NDArray, view: ArrayLike) -> Geometry:
    """Return the random geometry of rows of a sample table, for one view or a view of each row."""
    ids, widths, heights = samples_B["id"], samples_B["width"], samples_B["height"]
    flips = augment.flips(ids, view, seed=config.seed, probability=config.flip)
    if config.crop == "scaled":
        boxes = _full_boxes(widths, heights)
        resized, crops = augment.scaled_crop(
            ids,
            view,
            widths,
            heights,
            seed=config.seed,
            scales=config.scale_factors,
            size=height_width(config.size),
        )
        return Geometry(boxes, resized, crops, flips)
    if config.crop == "keep_ratio":
        shorts = augment.drawn_shorts(ids, view, seed=config.seed, shorts=config.short_sides)
        return _whole_geometry(config, samples_B, shorts, flips)
    if config.crop == "patch":
        return _patch_geometry(config, samples_B, view)
    if config.crop == "pad":
        offsets = augment.pad_crop(ids, view, seed=config.seed, pad=config.pad)
        boxes = _full_boxes(widths, heights)
        return Geometry(boxes, boxes[:, 2:], offsets - config.pad, flips)
    boxes = augment.random_resized_crop(
        ids, view, widths, heights, seed=config.seed, scale=config.scale, ratio=config.ratio
    )
    return Geometry(boxes, np.full_like(boxes[:, 2:], config.side), np.zeros_like(boxes[:, :2]), flips)


def validation_geometry(config: Config, samples_B: NDArray) -> Geometry:
    """Return the geometry of validation for rows of a sample table.

    Only the middle of a very long and thin image is decoded. The centre crop uses no more of it, and the whole image
    would take gigabytes once its short side is resized.
    """
    if config.crop == "scaled":  # the whole image, at its own size
        boxes = _full_boxes(samples_B["width"], samples_B["height"])
        return Geometry(boxes, boxes[:, 2:], np.zeros_like(boxes[:, :2]), np.zeros(len(samples_B), np.bool_))
    if config.crop == "patch":
        boxes = _full_boxes(*_low_sides(config, samples_B))
        return _plain_geometry(boxes, np.zeros((len(boxes), 3), np.bool_))
    if config.crop == "keep_ratio":
        return _whole_geometry(config, samples_B, max(config.short_sides), np.zeros(len(samples_B), np.bool_))
    boxes, size = _middle_boxes(samples_B["width"], samples_B["height"]), config.for_validation.side
    resized, crops = augment.resize_and_centre_crop(boxes[:, 3], boxes[:, 2], config.resize or size, size)
    return Geometry(boxes, resized, crops, np.zeros(len(samples_B), np.bool_))


def _patch_geometry(config: Config, samples_B: NDArray, view: ArrayLike) -> Geometry:
    """Return the geometry of patches of the smaller copies; that of the large images is ``upscale`` times as large."""
    size, draws = height_width(config.size), {"seed": config.seed}
    corners_B2 = augment.patches(samples_B["id"], view, *_low_sides(config, samples_B), size=size, **draws)
    boxes_B4 = np.concatenate([corners_B2, np.broadcast_to(size, corners_B2.shape)], axis=1)
    return _plain_geometry(boxes_B4, augment.symmetries(samples_B["id"], view, probability=config.flip, **draws))


def _plain_geometry(boxes_B4: NDArray[np.int64], flips: NDArray[np.bool_]) -> Geometry:
    """Return the geometry of boxes that are neither resized nor cropped."""
    return Geometry(boxes_B4, boxes_B4[:, 2:], np.zeros_like(boxes_B4[:, :2]), flips)


def _low_sides(config: Config, samples_B: NDArray) -> tuple[NDArray, NDArray]:
    """Return the widths and heights of the smaller copies."""
    return samples_B["width"] // config.upscale, samples_B["height"] // config.upscale


def _whole_geometry(
    config: Config, samples_B: NDArray, short: int | NDArray[np.int64], flips_B: NDArray[np.bool_]
) -> Geometry:
    """Return the geometry of whole images, their ratio kept, whose short side is at most ``short``."""
    boxes = _full_boxes(samples_B["width"], samples_B["height"])
    resized = augment.keep_ratio(boxes[:, 3], boxes[:, 2], short=short, long=config.long_side)
    return Geometry(boxes, resized, np.zeros_like(resized), flips_B)


def _middle_boxes(widths_B: NDArray, heights_B: NDArray) -> NDArray[np.int64]:
    """Return the boxes [B, 4] of the images' middles, their long side about ``_MAX_ASPECT`` short sides or less."""
    boxes_B4 = _full_boxes(widths_B, heights_B)
    sides_B2 = boxes_B4[:, 2:]
    limits_B1 = _MAX_ASPECT * sides_B2.min(axis=1, keepdims=True)
    # The cut side keeps the parity of the image's side, so that its centre is not shifted by half a pixel.
    kept_B2 = np.where(sides_B2 > limits_B1, limits_B1 + (sides_B2 - limits_B1) % 2, sides_B2)
    return np.concatenate([(sides_B2 - kept_B2) // 2, kept_B2], axis=1)


def _full_boxes(widths_B: NDArray, heights_B: NDArray) -> NDArray[np.int64]:
    """Return the boxes [B, 4] of entire images."""
    zeros_B = np.zeros_like(widths_B)
    return np.stack([zeros_B, zeros_B, heights_B, widths_B], axis=1).astype(np.int64)


@dataclass(frozen=True)
class BatchSampler:
    """The sampler of one rank: its rows of each global batch, in micro-batches."""

    config: Config
    readers: dict[str, SplitReader]
    rows: dict[str, NDArray[np.int64]]
    """The rows of each split's sample table that it uses, in storage order."""
    batch: int
    """Size of the global batch, a multiple of world size × accumulation."""
    accumulation: int
    seed: int
    rank: int
    world: int
    columns: Columns | None = None
    encoded: bool = True
    """Whether requests carry the encoded images."""
    pin: bool = False
    """Whether host tensors are pinned, for a GPU."""

    @cached_property
    def _augmenter(self) -> Augmenter:
        return Augmenter(self.config, CPU)

    @cached_property
    def _mixer(self) -> Mixer:
        reader = self.readers["train"]
        return Mixer(self.config, reader.samples, self.rows["train"], reader.manifest.num_classes)

    @cached_property
    def _buckets(self) -> dict[str, NDArray[np.int64]]:
        """The bucket of each of ``rows``, by split; empty where all batches have one size."""
        if self.config.crop != "keep_ratio":
            return {}
        samples = {split: self.readers[split].samples[rows] for split, rows in self.rows.items()}
        return {split: bucket_numbers(self.config, each) for split, each in samples.items()}

    @property
    def micro_batch(self) -> int:
        """Return the number of rows of a training request."""
        return rows_per_rank(self.batch, self.world, self.accumulation)

    @property
    def decoded_rows(self) -> int:
        """Return the largest number of images of a training request of one batch, with those that are mixed in."""
        return self._viewed_rows * (2 if self.config.mixes else 1)

    @property
    def _viewed_rows(self) -> int:
        """Return the number of rows of a training request of one batch, in all views of a step."""
        return self.micro_batch * self.config.views_per_step

    @property
    def validation_batch(self) -> int:
        """Return the number of rows of a validation batch; the last may have fewer."""
        if self.config.crop == "patch":  # whole images, whose sizes differ
            return 1
        return self.config.validation_batch or self.micro_batch

    @property
    def steps_per_epoch(self) -> int:
        """Return the number of complete global batches in an epoch."""
        if "train" in self._buckets:
            return count_batches(self._buckets["train"], self.batch)
        return len(self.rows["train"]) * self.config.rows_per_image // self.batch

    def training(self, progress: Progress, epochs: int) -> Generator[SampleRequest, None, None]:
        """Yield this rank's micro-batches from ``progress`` to the end of epoch ``epochs``."""
        with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
            for rows, views in self._parts(progress, epochs, self._request_rows(self._viewed_rows)):
                request = self._training_request(rows, views, self._viewed_rows, pool)
                yield request._replace(views=self.config.views_per_step)

    def extra(self, progress: Progress, epochs: int) -> Generator[dict[str, Tensor], None, None]:
        """Yield the rows of ``columns`` by name for each micro-batch of ``training``, on the host."""
        ids_N = self.readers["train"].samples["id"]
        with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
            for rows, views in self._parts(progress, epochs, self.micro_batch):
                yield self._extra(ids_N[rows], views, pool)

    def views(self, parts: Iterable[tuple[NDArray[np.int64], int]]) -> Generator[SampleRequest, None, None]:
        """Yield a request for each (rows of the training split, view)."""
        with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
            for rows, view in parts:
                yield self._training_request(rows, view, len(rows), pool)

    def plain(self, parts: Iterable[NDArray[np.int64]]) -> Generator[SampleRequest, None, None]:
        """Yield a request for each array of rows of the validation split, one image after another."""
        with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
            for rows in parts:
                yield self._validation_request(rows, np.arange(len(rows)), pool)._replace(batch=len(rows))

    def validation(self) -> Generator[SampleRequest, None, None]:
        """Yield this rank's share of the validation split in storage order, equally many requests on every rank.

        If the split is not divisible by the ranks, some ranks end with a padded row, whose id and label are −1. With
        buckets, that is so of each of them, and one follows another.
        """
        at_once = self._request_rows(self.validation_batch)
        with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
            for used in self._validation_groups():
                share = -(-len(used) // self.world)  # rounded up
                places = np.arange(share) * self.world + self.rank
                for first in range(0, share, at_once):
                    yield self._validation_request(used, places[first : first + at_once], pool)

    def _validation_groups(self) -> list[NDArray[np.int64]]:
        """Return the rows of the validation split whose images have one size: those of each bucket, or all of them."""
        rows = self.rows["val"]
        if "val" not in self._buckets:
            return [rows]
        return [rows[self._buckets["val"] == bucket] for bucket in np.unique(self._buckets["val"])]

    def _request_rows(self, batch: int) -> int:
        """Return the number of rows of a request for batches of ``batch`` rows."""
        # Draws for 64 rows at a time take thirty times as long as for all of an epoch.
        return max(_TABLE_ROWS // batch, 1) * batch if self.config.loader == "memory" else batch

    def _parts(
        self, progress: Progress, epochs: int, size: int
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Yield this rank's rows in the order of training, up to ``size`` of an epoch at a time, and their views."""
        used = self.rows["train"]
        shards = self.readers["train"].samples["shard"][used]
        for epoch in range(progress.epoch, epochs):
            order = augment.epoch_order(shards, self.seed, epoch, self.config.shuffle_shards)
            if "train" in self._buckets:
                order = augment.bucket_order(order, self._buckets["train"], self.batch)
            order = used[order]
            first = progress.step_in_epoch if epoch == progress.epoch else 0
            columns = (self._share(column, first) for column in self._rows_and_views(order, epoch))
            ours = self._viewed(epoch, *columns)
            for start in range(0, len(ours[0]), size):
                rows_B, views_B = (column[start : start + size] for column in ours)
                yield rows_B, views_B

    def _rows_and_views(self, order: NDArray[np.int64], epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the rows of all batches of an epoch, and the view of each, from the order of the images."""
        if self.config.pairs:
            partners = augment.partners_of_class(order, self.readers["train"].samples, self.seed, epoch)
            views = np.tile([epoch, epoch + augment.PARTNERS_VIEWS], len(order))
            return np.stack([order, partners], 1).reshape(-1), views
        views = np.array([self.config.view(epoch, repetition) for repetition in range(self.config.repeat)])
        numbers, repetitions = augment.repeated(order, self.config.repeat)
        return numbers, views[repetitions]

    def _viewed(
        self, epoch: int, rows: NDArray[np.int64], views: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return this rank's rows of an epoch, and the view of each, in all views of a step."""
        count = self.config.views_per_step
        if count == 1:
            return rows, views
        numbers = np.array([self.config.view(epoch, number) for number in range(count)])
        rows, places = augment.views_of_batches(rows, self.micro_batch, count)
        return rows, numbers[places]

    def _share(self, column: NDArray[np.int64], first: int) -> NDArray[np.int64]:
        """Return this rank's part of a column of an epoch, from step ``first`` on."""
        rest = augment.global_batches(column, first, self.steps_per_epoch, self.batch)
        return augment.rank_rows(rest, self.rank, self.world)

    def _training_request(
        self, rows: NDArray[np.int64], view: ArrayLike, batch: int, pool: ThreadPoolExecutor
    ) -> SampleRequest:
        samples, views = self.readers["train"].samples[rows], np.broadcast_to(view, len(rows))
        mixture, decoded, decoded_rows = self._mixer.draw(samples["id"], views), samples, rows
        if mixture:
            decoded_rows = np.concatenate([rows, mixture.partners_P])
            decoded = self.readers["train"].samples[decoded_rows]
            views = np.concatenate([views, views[mixture.places_P]])
        geometry = training_geometry(self.config, decoded, views)
        return SampleRequest(
            decoded_rows,
            geometry,
            self._encoded("train", decoded_rows, pool),
            self._masks("train", rows, pool),
            self._host(samples["id"]),
            self._host(samples["label"].astype(np.int64)),
            batch,
            self._targets("train", rows, geometry, views=views),
            self._augmenter.draw(decoded["id"], views),
            mixture,
            canvas(self.config, samples),
        )

    def _validation_request(
        self, used: NDArray[np.int64], places: NDArray[np.int64], pool: ThreadPoolExecutor
    ) -> SampleRequest:
        # A padded row decodes the last image once more; its id and label of −1 exclude it from every count.
        real = places < len(used)
        rows = used[np.minimum(places, len(used) - 1)]
        samples = self.readers["val"].samples[rows]
        geometry = validation_geometry(self.config, samples)
        return SampleRequest(
            rows,
            geometry,
            self._encoded("val", rows, pool),
            self._masks("val", rows, pool),
            self._host(np.where(real, samples["id"], -1)),
            self._host(np.where(real, samples["label"], -1).astype(np.int64)),
            self.validation_batch,
            self._targets("val", rows, geometry, real=real),
            canvas=canvas(self.config, samples),
        )

    def _targets(
        self,
        split: str,
        rows: NDArray[np.int64],
        geometry: Geometry,
        *,
        views: ArrayLike = 0,
        real: NDArray[np.bool_] | None = None,
    ) -> dict[str, Tensor]:
        """Return the task's targets of a request. Validation gives the rows that are ``real``, and keeps all boxes."""
        reader = self.readers[split]
        if reader.has_boxes:
            boxes = reader.boxes(rows)
            if real is not None:
                boxes = [each if is_real else each[:0] for each, is_real in zip(boxes, real, strict=True)]
            sides, smallest = geometry.boxes_B4[:, 2:], 1.0 if real is None else 0.0
            found = box_targets(boxes, sides, geometry.resized_B2, geometry.flips_B, smallest)
            found[DRAWS] = augment.sampling_draws(reader.samples["id"][rows], views, seed=self.config.seed)
            return {name: self._host(column) for name, column in found.items()}
        return {} if reader.targets is None else {LABELS: self._host(reader.targets[rows])}

    def _encoded(self, split: str, rows: NDArray[np.int64], pool: ThreadPoolExecutor) -> list[NDArray[np.uint8]]:
        if not self.encoded:
            return []
        return _read_by_threads(self.readers[split].bytes(rows), pool)

    def _masks(self, split: str, rows: NDArray[np.int64], pool: ThreadPoolExecutor) -> list[NDArray[np.uint8]]:
        reader = self.readers[split]
        return _read_by_threads(reader.masks(rows), pool) if self.encoded and reader.has_masks else []

    def _extra(self, ids: NDArray[np.int64], views: NDArray[np.int64], pool: ThreadPoolExecutor) -> dict[str, Tensor]:
        if self.columns is None:
            return {}
        # Rows of one view are taken together. With ``repeat``, a batch has several.
        of_views = {view: self.columns(view) for view in np.unique(views).tolist()}
        first = next(iter(of_views.values()))
        if short := [name for name, column in first.items() if len(column) <= ids.max()]:
            raise ValueError(f"{short[0]} has {len(first[short[0]])} rows, but id {ids.max()} is requested")
        extra = {name: self._empty(len(ids), column) for name, column in first.items()}
        size = -(-len(ids) // _READS_AT_ONCE)
        parts = [slice(start, start + size) for start in range(0, len(ids), size)]
        arrays = {name: tensor.numpy() for name, tensor in extra.items()}
        list(pool.map(lambda part: _take(of_views, ids[part], views[part], _rows_of(arrays, part)), parts))
        return extra

    def _host(self, array: NDArray) -> Tensor:
        """Copy an array, which may be a read-only view of a file, into a host tensor."""
        tensor = self._empty(len(array), array)
        np.copyto(tensor.numpy(), array)
        return tensor

    def _empty(self, rows: int, like: NDArray) -> Tensor:
        """Return an uninitialised host tensor with ``rows`` rows of the shape and dtype of an array's rows."""
        dtype = torch.from_numpy(np.empty(0, like.dtype)).dtype
        return torch.empty((rows, *like.shape[1:]), dtype=dtype, pin_memory=self.pin)


def _rows_of(arrays: Mapping[str, NDArray], part: slice) -> dict[str, NDArray]:
    """Return those rows of each array, as views."""
    return {name: array[part] for name, array in arrays.items()}


def _take(
    of_views: Mapping[int, Mapping[str, NDArray]], ids_B: NDArray, views_B: NDArray, out: Mapping[str, NDArray]
) -> None:
    """Write the columns' rows of those ids, each at its view, into ``out``; all ids have a row."""
    for view, columns in of_views.items():
        at = np.flatnonzero(views_B == view)
        for name, column in columns.items():
            # mode="clip" writes directly into ``out``; the default mode="raise" copies through a buffer.
            if len(at) == len(ids_B):
                column.take(ids_B, axis=0, out=out[name], mode="clip")
            elif len(at):
                out[name][at] = column.take(ids_B[at], axis=0, mode="clip")


def _read_by_threads(views: list[NDArray[np.uint8]], pool: ThreadPoolExecutor) -> list[NDArray[np.uint8]]:
    """Read memory-mapped files into memory, several at once, and return them."""
    # ``list`` waits for the threads and raises their exceptions.
    list(pool.map(_read_into_memory, [views[start::_READS_AT_ONCE] for start in range(_READS_AT_ONCE)]))
    return views


def _read_into_memory(views: list[NDArray[np.uint8]]) -> None:
    """Read memory-mapped files into memory."""
    # Touch one byte of every page, so that page faults happen on this thread. ``take`` releases the GIL meanwhile.
    # ``max`` would keep the GIL for so few bytes, and be slow for all of them.
    for view in filter(len, views):
        view.take(np.arange(0, len(view) + _PAGE - 1, _PAGE), mode="clip")


def describe_sample(reader: SplitReader, row: int) -> str:
    """Return a sample's id and file for an error message: ``sample 42 in …/train-000000.tar``."""
    sample = reader.samples[row]
    return f"sample {sample['id']} in {reader.folder / reader.split.shards[sample['shard']].url}"
