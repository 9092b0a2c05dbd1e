"""The loader of a rank's batches. Their order does not depend on the number of ranks or on interruptions."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.batch import Batch, Progress
from pipeline.data import augment, memory, synthetic
from pipeline.data.buckets import check_buckets
from pipeline.data.config import Config
from pipeline.data.holdout import source_split, used_rows
from pipeline.data.loader_settings import LoaderSettings, loader_settings
from pipeline.data.mixer import partners
from pipeline.data.patches import PatchDecoder
from pipeline.data.read_ahead import read_ahead
from pipeline.data.requests import BatchSampler, Columns, SampleRequest, describe_sample
from pipeline.data.unlabelled import SEED_OFFSET, UnlabelledSampler, append_unlabelled
from pipeline.distributed import collectives
from pipeline.image_size import height_width, size_text
from pipeline.tasks._image_quality import WINDOW
from shards.manifest import Manifest
from shards.read import SplitReader

__all__ = ["Config", "Decoder", "Loader", "create_loader", "transform_fingerprint"]


class Decoder(Protocol):
    """The interface of a decoder, which turns requests into batches of normalised images on the device, in order."""

    def __call__(self, requests: Iterator[SampleRequest]) -> Generator[Batch, None, None]:
        """Yield the batches of the requests, without ``extra``. One call at a time."""
        ...


class Loader:
    """A loader of this rank's batches. It has no state: the ``Progress`` it gets determines the batches."""

    def __init__(
        self,
        plan: BatchSampler,
        decoders: dict[str, Decoder],
        settings: LoaderSettings,
        device: torch.device,
        unlabelled: Loader | None = None,
    ) -> None:
        self.plan = plan
        self.decoders = decoders
        self.settings = settings
        self.device = device
        self.unlabelled = unlabelled
        """The loader of the images without labels that training batches have, too; None if they have none."""

    def in_order_of(self, seed: int) -> Loader:
        """Return a loader of the same images, with the same decoders, in the order of another seed."""
        others = self.unlabelled and self.unlabelled.in_order_of(seed + SEED_OFFSET)
        return Loader(replace(self.plan, seed=seed), self.decoders, self.settings, self.device, others)

    def with_unlabelled(self, unlabelled: Loader) -> Loader:
        """Return a loader whose training batches also have the rows of another loader's, behind their own."""
        return Loader(self.plan, self.decoders, self.settings, self.device, unlabelled)

    @property
    def samples_per_epoch(self) -> int:
        """Return the number of samples in the complete global batches of an epoch, over all ranks."""
        return self.steps_per_epoch * self.plan.batch

    @property
    def steps_per_epoch(self) -> int:
        """Return the number of global batches of an epoch, which is the same on every rank."""
        return self.plan.steps_per_epoch

    @property
    def manifest(self) -> Manifest:
        """Return the manifest of the shards."""
        return next(iter(self.plan.readers.values())).manifest

    @property
    def num_classes(self) -> int:
        """Return the number of classes, including those without a sample."""
        return self.manifest.num_classes

    @property
    def id_count(self) -> int:
        """Return one more than the largest possible training id."""
        return self.plan.readers["train"].split.id_count

    @property
    def labels_by_id(self) -> NDArray[np.int64]:
        """Return the label of every training id, int64 [id_count]; −1 for an id that is not trained on."""
        return self.plan.readers["train"].labels_by_id(self.plan.rows["train"])

    def stream(self, progress: Progress, epochs: int) -> Generator[Batch, None, None]:
        """Yield this rank's micro-batches from ``progress``, anywhere in an epoch, to the end of epoch ``epochs``."""
        batches = self._batches(self.plan.training(progress, epochs), self.decoders["train"])
        if self.plan.columns:
            batches = self._with_extra(batches, self.plan.extra(progress, epochs))
        return self._with_unlabelled(batches, self.unlabelled, progress, epochs) if self.unlabelled else batches

    @property
    def has_validation(self) -> bool:
        """Return whether there are validation images. Shards may contain training images only."""
        return "val" in self.decoders

    def validation(self) -> Iterator[Batch]:
        """Yield the validation images, each once over all ranks; equally many batches on every rank.

        A padded row has id −1 and label −1.
        """
        return self._batches(self.plan.validation(), self.decoders["val"])

    def views(self, parts: Iterable[tuple[NDArray[np.int64], int]]) -> Iterator[Batch]:
        """Yield a batch for each (rows, view): training images of those rows of the sample table, in that view.

        Its ``extra`` is empty.
        """
        return self._batches(self.plan.views(parts), self.decoders["train"])

    def plain(self, parts: Iterable[NDArray[np.int64]]) -> Iterator[Batch]:
        """Yield a batch for each array of rows of the validation split's sample table, in validation's transform."""
        return self._batches(self.plan.plain(parts), self.decoders["val"])

    def _batches(
        self, requests: Generator[SampleRequest, None, None], decoder: Decoder
    ) -> Generator[Batch, None, None]:
        # Control runs backwards here: the decoder pulls requests from ``ahead``, whose thread pulls from ``requests``.
        # Both are closed even if the caller stops early, the decoder first, so that no thread outlives the loop.
        # A request of ``memory`` is an epoch's, so one ahead is enough.
        depth = 1 if self.plan.config.loader == "memory" else self.settings.prefetch
        ahead = read_ahead(requests, depth, self.device)
        with closing(ahead), closing(decoder(ahead)) as batches:
            yield from batches

    def _with_extra(
        self, batches: Generator[Batch, None, None], extra: Generator[dict[str, Tensor], None, None]
    ) -> Generator[Batch, None, None]:
        ahead = read_ahead(extra, self.settings.prefetch, self.device)
        with closing(ahead), closing(batches):
            for batch, columns in zip(batches, ahead, strict=True):
                sent = {name: column.to(self.device, non_blocking=True) for name, column in columns.items()}
                yield batch._replace(extra=sent)

    def _with_unlabelled(
        self, batches: Generator[Batch, None, None], unlabelled: Loader, progress: Progress, epochs: int
    ) -> Generator[Batch, None, None]:
        # The others have done as many of their global batches, in epochs of another length, and last long enough.
        done = Progress(unlabelled.steps_per_epoch, progress.step)
        last = -(-epochs * self.steps_per_epoch // unlabelled.steps_per_epoch)
        with closing(batches), closing(unlabelled.stream(done, last)) as others:
            for batch, other in zip(batches, others, strict=False):
                yield append_unlabelled(batch, other)


def create_loader(
    config: Config,
    *,
    batch: int,
    accumulation: int,
    seed: int,
    rank: int,
    world: int,
    device: torch.device,
    columns: Columns | None = None,
    splits: tuple[str, ...] = ("train", "val"),
    manifest: Manifest | None = None,
    sources: Mapping[str, str] | None = None,
    ids: NDArray[np.int64] | None = None,
) -> Loader:
    """Open the shards and return the loader of ``rank``; ``batch`` is the global batch.

    ``manifest`` is that of the shards, if it was read already. ``columns(view)`` is called on a reading thread; rows
    of its arrays become ``Batch.extra`` of ``stream``, on the device. ``sources`` is the split of the shards that each
    split reads, by default that of its name, or that of ``data.holdout``. ``ids`` are the training images of an epoch,
    which may have one several times; None is all of them. Raises FileNotFoundError or ValueError, one line, if the
    shards are incomplete or do not fit the recipe.
    """
    if "train" in splits and batch % (world * accumulation):
        raise ValueError(
            f"batch: {batch} is not divisible by {world} ranks × accumulation: {accumulation}; "
            f"make it a multiple of {world * accumulation}"
        )
    sources = sources or {split: source_split(config.holdout, split) for split in splits}
    opened = {source: _open(config, source, manifest) for source in dict.fromkeys(sources.values())}
    readers = {split: opened[source] for split, source in sources.items()}
    rows = {split: used_rows(reader, config.holdout, split) for split, reader in readers.items()}
    if ids is not None:
        rows["train"] = rows_of_ids(readers["train"])[ids]
    _check_images(config, {split: reader.samples[rows[split]] for split, reader in readers.items()}, batch)
    encoded, pin = config.loader == "dali", device.type == "cuda"
    sampler = BatchSampler if ids is None else UnlabelledSampler
    plan = sampler(config, readers, rows, batch, accumulation, seed, rank, world, columns, encoded, pin)
    settings = loader_settings(config, next(iter(readers.values())).manifest, device)
    return Loader(plan, _create_decoders(plan, settings, device), settings, device)


def rows_of_ids(reader: SplitReader) -> NDArray[np.int64]:
    """Return the row of the sample table of every id, [id_count]; −1 for an id without a sample."""
    rows_by_id = np.full(reader.split.id_count, -1)
    rows_by_id[reader.samples["id"]] = np.arange(len(reader.samples))
    return rows_by_id


def _check_images(config: Config, samples: dict[str, NDArray], batch: int) -> None:
    """Raise ValueError if the images of the splits are too few, or too large for the crop."""
    if "train" in samples and len(samples["train"]) * config.rows_per_image < batch:
        times = f"{config.rows_per_image} × " if config.rows_per_image > 1 else ""
        raise ValueError(
            f"data.path: {config.path} has {times}{len(samples['train'])} training samples, fewer than one global "
            f"batch: {batch}; lower batch or prepare more samples"
        )
    if config.crop == "scaled":
        _check_scaled_sizes(config, samples)
    if config.crop == "patch":
        _check_pairs(config, samples)
    if config.crop == "keep_ratio" and (note := check_buckets(config, samples, batch)) and collectives.is_main():
        print(note)


def transform_fingerprint(config: Config, manifest: Manifest, device: torch.device) -> dict[str, Any]:
    """Return the facts that determine a training image, besides its shards, its id and the view.

    A cache of teacher outputs records them.
    """
    crop_keys = {"pad": ("pad",), "random_resized": ("scale", "ratio")}.get(config.crop, ())
    keys = ("size", "crop", *crop_keys, "flip", "mean", "std", "seed")
    values = {key: getattr(config, key) for key in keys}
    if config.crop == "scaled":
        values["scales"] = config.scale_factors
    if config.crop == "keep_ratio":
        sides = {"short": config.short_sides, "long": config.long_side}
        values |= {**sides, "buckets": config.bucket_sizes}
    if config.augment:  # caches that were written before this key have none
        values["augment"] = config.model_dump(mode="json", include={"augment"})["augment"]
    if config.mixes:
        values["partners"] = partners(config)
    return {**values, "law": augment.AUGMENT_VERSION, "decoder": _decoder_facts(config, manifest, device)}


def plain_fingerprint(config: Config, manifest: Manifest, device: torch.device) -> dict[str, Any]:
    """Return the facts that determine an image in the transform of validation, besides its shards and its id."""
    decoded = config.for_validation
    sizes = {"size": decoded.size, "resize": config.resize, "mean": config.mean, "std": config.std}
    return {**sizes, "decoder": _decoder_facts(decoded, manifest, device)}


def _decoder_facts(config: Config, manifest: Manifest, device: torch.device) -> dict[str, Any]:
    if config.loader == "synthetic":
        return synthetic.synthetic_fingerprint()
    if config.loader == "memory":
        return memory.memory_fingerprint(manifest.image)
    return _dali().dali_fingerprint(config, device)


def _open(config: Config, split: str, manifest: Manifest | None) -> SplitReader:
    """Return the reader of a split, after a check of its files and of the sizes of its images."""
    folder = Path(config.path)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"data.path: no folder {folder}; prepare the shards (shards/prepare_*.py) or set data.path=FOLDER"
        )
    try:
        reader = SplitReader(folder, split, manifest)
        if config.loader != "synthetic":
            reader.check_sizes()
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"data.path: {error}") from None
    if config.crop == "keep_ratio" and not reader.has_boxes:
        raise ValueError(
            f"data.crop: keep_ratio needs images with boxes, and {folder} has none; prepare shards with boxes, or set "
            "another crop"
        )
    if config.crop == "patch":
        _check_copies(config, reader)
    elif config.loader == "memory" or (config.loader == "dali" and config.crop == "pad" and split == "train"):
        _check_sides(config, reader)
    return reader


def _check_copies(config: Config, reader: SplitReader) -> None:
    """Raise ValueError unless the images have copies that are ``data.upscale`` times smaller."""
    if not reader.has_copies:
        raise ValueError(
            f"data.crop: patch needs images with smaller copies, and {reader.folder} has none; prepare shards with "
            "them, or set another crop"
        )
    if reader.manifest.scale != config.upscale:
        raise ValueError(
            f"data.upscale: {config.upscale}: the copies in {reader.folder} are {reader.manifest.scale} times smaller; "
            f"set upscale: {reader.manifest.scale}, or give other shards"
        )


def _check_pairs(config: Config, samples: dict[str, NDArray]) -> None:
    """Raise ValueError for a training image smaller than a patch, or a validation image that is too small to judge."""
    for split, key, least in (("train", "size", config.target_size[0]), ("val", "path", 2 * config.upscale + WINDOW)):
        if split not in samples:
            continue
        sides_N = np.minimum(samples[split]["width"], samples[split]["height"])
        if len(small := np.flatnonzero(sides_N < least)):
            number, side = samples[split]["id"][small[0]], sides_N[small[0]]
            raise ValueError(
                f"data.{key}: {len(small):,} images of {split} have sides below {least} pixels, such as id {number} "
                f"with {side}; leave them out, or set a smaller data.size"
            )


def _check_scaled_sizes(config: Config, samples: dict[str, NDArray]) -> None:
    """Print how many training images fill their crop at no scale, and check the sizes of the validation images."""
    sides = {split: np.stack([rows["height"], rows["width"]], axis=1) for split, rows in samples.items()}
    if "train" in sides:
        largest = np.floor(sides["train"] * max(config.scale_factors) + 0.5)
        small = int((largest < height_width(config.size)).any(axis=1).sum())
        if small and collectives.is_main():
            images = f"{small:,} of {len(sides['train']):,} training images"
            print(f"note: data.size: {images} are smaller than {size_text(config.size)} at every scale, and are padded")
    if "val" in sides:
        _check_whole_images(config, sides["val"])


def _check_whole_images(config: Config, sides: NDArray) -> None:
    """Raise ValueError for a validation image that is larger than ``data.validation_size``."""
    largest, given = tuple(sides.max(axis=0).tolist()), config.for_validation.size
    if np.any(np.asarray(largest) > height_width(given)):
        raise ValueError(
            f"data.validation_size: {size_text(given)}: crop: scaled validates whole images, and the largest have "
            f"{size_text(largest)} pixels (height × width); set validation_size: {list(largest)}"
        )


def _check_sides(config: Config, reader: SplitReader) -> None:
    """Raise ValueError for an image whose size differs from ``data.size``."""
    samples = reader.samples
    odd = np.flatnonzero((samples["width"] != config.side) | (samples["height"] != config.side))
    if len(odd):
        key = "loader: memory" if config.loader == "memory" else "crop: pad"
        width, height = samples["width"][odd[0]], samples["height"][odd[0]]
        raise ValueError(
            f"data.{key} needs images of data.size: {config.side} × {config.side}, "
            f"but {describe_sample(reader, int(odd[0]))} is {width} × {height}; "
            "set data.size, or data.loader: dali with data.crop: random_resized"
        )


def _create_decoders(plan: BatchSampler, settings: LoaderSettings, device: torch.device) -> dict[str, Decoder]:
    """Return a decoder for each split."""
    config, batches = plan.config, {"train": plan.decoded_rows, "val": plan.validation_batch}
    configs = {"train": config, "val": config.for_validation}
    if config.loader == "synthetic":
        return {
            split: synthetic.SyntheticDecoder(
                configs[split], batches[split], device, reader.manifest.num_classes if reader.has_masks else None
            )
            for split, reader in plan.readers.items()
        }
    if config.loader == "memory":
        kind = PatchDecoder if config.crop == "patch" else memory.MemoryDecoder
        # One decoder for both splits if images are held out: it keeps the pixels of all of them.
        decoders = {reader: kind(reader, config, device) for reader in dict.fromkeys(plan.readers.values())}
        return {split: decoders[reader] for split, reader in plan.readers.items()}
    decoder = _dali().DaliDecoder
    return {
        split: decoder(reader, configs[split], batches[split], settings, device, _graph(reader, configs[split]))
        for split, reader in plan.readers.items()
    }


def _graph(reader: SplitReader, config: Config) -> Any:
    """Return the graph of images with masks or boxes; None if the images have neither."""
    if config.crop == "keep_ratio":
        from pipeline.data.dali_canvas import CANVAS_GRAPH  # after DALI itself

        return CANVAS_GRAPH
    if not reader.has_masks:
        return None
    from pipeline.data.dali_masks import mask_graph  # after DALI itself

    return mask_graph(config)


def _dali() -> ModuleType:
    """Return the module ``dali``. Raises ValueError where DALI is not installed."""
    try:
        # Imported on first use: DALI takes a second to load, and exists for Linux only.
        from pipeline.data import dali
    except ModuleNotFoundError as error:
        raise ValueError(
            f"data.loader: dali needs NVIDIA DALI ({error}); install the extra cu13 or cu12 on Linux, or try memory"
        ) from None
    return dali
