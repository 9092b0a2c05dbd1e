"""The loader: batches of this rank, in an order that neither the number of ranks nor an interruption changes."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.batch import Batch, Progress
from pipeline.data import augment, memory, synthetic
from pipeline.data.config import Config
from pipeline.data.loader_settings import LoaderSettings, loader_settings
from pipeline.data.read_ahead import read_ahead
from pipeline.data.requests import BatchSampler, Columns, SampleRequest, describe_sample
from shards.manifest import Manifest
from shards.read import SplitReader

__all__ = ["Config", "Decoder", "Loader", "create_loader", "transform_fingerprint"]


class Decoder(Protocol):
    """What a way of decoding is: it turns requests into normalised images on the device, in their order."""

    def __call__(self, requests: Iterator[SampleRequest]) -> Generator[tuple[SampleRequest, Tensor], None, None]:
        """Yield each request with its images [B, C, H, W]. One call at a time."""
        ...


class Loader:
    """The batches of this rank. Its whole state is the ``Progress`` it is given."""

    def __init__(
        self, plan: BatchSampler, images: dict[str, Decoder], pace: LoaderSettings, device: torch.device
    ) -> None:
        self.plan = plan
        self.images = images
        self.pace = pace
        self.device = device

    @property
    def samples_per_epoch(self) -> int:
        """Samples in the whole global batches of an epoch, over all ranks."""
        return self.steps_per_epoch * self.plan.batch

    @property
    def steps_per_epoch(self) -> int:
        """Global batches of an epoch; the same on every rank."""
        return self.plan.steps_per_epoch

    @property
    def manifest(self) -> Manifest:
        """What the folder of shards holds."""
        return next(iter(self.plan.readers.values())).manifest

    @property
    def num_classes(self) -> int:
        """Number of classes, those without a sample included."""
        return self.manifest.num_classes

    @property
    def id_count(self) -> int:
        """One more than the largest possible training id."""
        return self.plan.readers["train"].split.id_count

    @property
    def labels_by_id(self) -> NDArray[np.int64]:
        """Return the label of every training id, int64 [id_count]; −1 where there is no such sample."""
        return self.plan.readers["train"].labels_by_id()

    def stream(self, progress: Progress, epochs: int) -> Iterator[Batch]:
        """Yield this rank's micro-batches from ``progress``, anywhere in an epoch, to the end of epoch ``epochs``."""
        return self._batches(self.plan.training(progress, epochs), self.images["train"])

    @property
    def validates(self) -> bool:
        """Whether there are validation images; shards may hold training images alone."""
        return "val" in self.images

    def validation(self) -> Iterator[Batch]:
        """Yield the validation images, each once over all ranks; equally many batches on every rank.

        A padded row has id −1 and label −1.
        """
        return self._batches(self.plan.validation(), self.images["val"])

    def views(self, parts: Iterable[tuple[NDArray[np.int64], int]]) -> Iterator[Batch]:
        """Yield what rows of the training split's sample table look like at a view, for each (rows, view)."""
        return self._batches(self.plan.views(parts), self.images["train"])

    def _batches(self, requests: Generator[SampleRequest, None, None], images: Decoder) -> Iterator[Batch]:
        ahead = read_ahead(requests, self.pace.prefetch, self.device)
        with closing(ahead), closing(images(ahead)) as decoded:
            for request, images_BCHW in decoded:
                extra = {name: self._send(column) for name, column in request.extra.items()}
                yield Batch(images_BCHW, self._send(request.labels_B), self._send(request.ids_B), extra)

    def _send(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)


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
) -> Loader:
    """Open the shards and return the loader of ``rank``; ``batch`` is the global batch.

    ``manifest`` is the shards', where it was read already. ``columns(view)`` is called on the reading
    thread; its arrays' rows travel to the device as ``Batch.extra``. Raises FileNotFoundError or
    ValueError, one line, where the shards are not whole or do not fit the recipe.
    """
    if "train" in splits and batch % (world * accumulation):
        raise ValueError(
            f"batch: {batch} does not divide by {world} ranks × accumulation: {accumulation}; "
            f"make it a multiple of {world * accumulation}"
        )
    readers = {split: _open(config, split, manifest) for split in splits}
    if "train" in readers and len(readers["train"].samples) < batch:
        raise ValueError(
            f"data.path: {config.path} has {len(readers['train'].samples)} training samples, less than one global "
            f"batch: {batch}; lower batch or prepare more"
        )
    encoded, pin = config.loader == "dali", device.type == "cuda"
    plan = BatchSampler(config, readers, batch, accumulation, seed, rank, world, columns, encoded, pin)
    pace = loader_settings(config, next(iter(readers.values())).manifest, device)
    return Loader(plan, _create_images(plan, pace, device), pace, device)


def transform_fingerprint(config: Config, manifest: Manifest, device: torch.device) -> dict[str, Any]:
    """Return what a training image follows from, besides its shards, its id and the view."""
    of_crop = ("pad",) if config.crop == "pad" else ("scale", "ratio")
    names = ("size", "crop", *of_crop, "flip", "mean", "std", "seed")
    said = {name: getattr(config, name) for name in names}
    return {**said, "law": augment.AUGMENT_VERSION, "decoder": _decoder_facts(config, manifest, device)}


def _decoder_facts(config: Config, manifest: Manifest, device: torch.device) -> dict[str, Any]:
    if config.loader == "synthetic":
        return synthetic.synthetic_fingerprint()
    if config.loader == "memory":
        return memory.memory_fingerprint(manifest.image)
    return _dali().dali_fingerprint(config, device)


def _open(config: Config, split: str, manifest: Manifest | None) -> SplitReader:
    folder = Path(config.path)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"data.path: no folder {folder}; prepare the shards (shards/prepare_*.py) or name theirs (data.path=FOLDER)"
        )
    try:
        reader = SplitReader(folder, split, manifest)
        if config.loader != "synthetic":
            reader.check_sizes()
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"data.path: {error}") from None
    if config.loader == "memory" or (config.loader == "dali" and config.crop == "pad" and split == "train"):
        _check_sides(config, reader)
    return reader


def _check_sides(config: Config, reader: SplitReader) -> None:
    samples = reader.samples
    odd = np.flatnonzero((samples["width"] != config.size) | (samples["height"] != config.size))
    if len(odd):
        key = "loader: memory" if config.loader == "memory" else "crop: pad"
        width, height = samples["width"][odd[0]], samples["height"][odd[0]]
        raise ValueError(
            f"data.{key} needs images of data.size: {config.size} × {config.size}, "
            f"but {describe_sample(reader, int(odd[0]))} is {width} × {height}; "
            "set data.size, or data.loader: dali with data.crop: random_resized"
        )


def _create_images(plan: BatchSampler, pace: LoaderSettings, device: torch.device) -> dict[str, Decoder]:
    config, batches = plan.config, {"train": plan.micro_batch, "val": plan.validation_batch}
    if config.loader == "synthetic":
        return {split: synthetic.SyntheticDecoder(config, batches[split], device) for split in plan.readers}
    if config.loader == "memory":
        return {split: memory.MemoryDecoder(reader, config, device) for split, reader in plan.readers.items()}
    decoder = _dali().DaliDecoder
    return {split: decoder(reader, config, batches[split], pace, device) for split, reader in plan.readers.items()}


def _dali() -> ModuleType:
    """Return the module that decodes with DALI."""
    try:
        # Not at the head of the file: it takes a second to load, and is for Linux only.
        from pipeline.data import dali
    except ModuleNotFoundError as error:
        raise ValueError(f"data.loader: dali needs NVIDIA DALI ({error}), which runs on Linux; try memory") from None
    return dali
