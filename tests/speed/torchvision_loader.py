"""Compare our loader with a torchvision DataLoader of equal work, in one run: no test, for its figures are a machine's.

    python tests/speed/torchvision_loader.py data.path=/data/imagenet [seconds=4] [blocks=5] [key=value …]

Both make the same training batches of configs/imagenet/r50_mbv1.yaml, of 60 images unless batch= says otherwise: the
same images, boxes and flips, resized with antialiasing and normalised in float32. Ours decodes on two threads, theirs
in two workers that never end, by Pillow and by ``decode_jpeg``; their geometry is ours, which spares them the drawing.
They take turns, block by block; what was ready before a block began is left out of it.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import io
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import median
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional as v2

from pipeline.batch import Progress
from pipeline.builders.loader import build_loader
from pipeline.config.arguments import split_command_args
from pipeline.config.recipe import load_recipe
from pipeline.data.config import Config
from pipeline.data.requests import BatchSampler
from pipeline.errors import ROOT
from shards.read import SplitReader

RECIPE = ROOT / "configs" / "imagenet" / "r50_mbv1.yaml"
EPOCHS = 2**31
READY = 5
"""Batches that may be ready before a block begins."""


class Place(NamedTuple):
    """One image of a batch, and what becomes of it."""

    row: int
    label: int
    box: tuple[int, int, int, int]
    flip: bool


def pillow(encoded: bytearray) -> Image.Image:
    return Image.open(io.BytesIO(encoded)).convert("RGB")


def jpeg(encoded: bytearray) -> Tensor:
    return decode_jpeg(torch.frombuffer(encoded, dtype=torch.uint8), ImageReadMode.RGB)


class Images(Dataset):
    """What a user of torchvision would write, reading from our shards."""

    def __init__(self, config: Config, decode: Callable[[bytearray], Image.Image | Tensor]) -> None:
        self.config = config
        self.decode = decode
        self.reader: SplitReader | None = None

    def __getitem__(self, place: Place) -> tuple[Tensor, int]:
        if self.reader is None:  # in a worker: maps of files do not travel
            self.reader = SplitReader(Path(self.config.path), "train")
        image = self.decode(bytearray(self.reader.bytes([place.row])[0]))
        side = [self.config.size] * 2
        image = v2.resized_crop(image, *place.box, side, v2.InterpolationMode.BILINEAR, antialias=True)
        image = v2.to_dtype(v2.to_image(v2.hflip(image) if place.flip else image), torch.float32, scale=True)
        return v2.normalize(image, list(self.config.mean), list(self.config.std)), place.label


class Places:
    """Batches of places, in the order in which training takes them."""

    def __init__(self, plan: BatchSampler) -> None:
        self.plan = replace(plan, encoded=False)

    def __iter__(self) -> Iterator[list[Place]]:
        for request in self.plan.training(Progress(self.plan.steps_per_epoch), EPOCHS):
            boxes, flips = request.geometry.boxes_B4.tolist(), request.geometry.flips_B.tolist()
            yield [Place(*each) for each in zip(request.rows_B, request.labels_B.tolist(), boxes, flips, strict=True)]


def theirs(plan: BatchSampler, decode: Callable[[bytearray], Image.Image | Tensor]) -> Iterator[Tensor]:
    """Yield images [B, C, H, W] of two workers that never end."""
    workers = DataLoader(
        Images(plan.config, decode), batch_sampler=Places(plan), num_workers=2, multiprocessing_context="spawn"
    )
    for images, _ in workers:
        yield images


def rate(images: Iterator[Tensor], seconds: float) -> float:
    """Return images a second over at least ``seconds``, and leave no thread or worker at work."""
    for _ in range(READY):
        batch = next(images)
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        count += len(next(images))
    found = count / (time.perf_counter() - began)
    time.sleep(READY * len(batch) / found)  # until it has as much ready again
    return found


def difference(ours: Tensor, other: Tensor, config: Config) -> float:
    """Return the mean difference of a colour, of 255."""
    return float(((ours - other) * torch.tensor(config.std)[:, None, None]).abs().mean() * 255)


def told(values: list[float], digits: int) -> str:
    return f"{median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def main() -> None:
    own, words = split_command_args(sys.argv[1:], ("seconds", "blocks"))
    recipe = load_recipe(RECIPE, ["method=ce", "batch=60", "data.threads=2", "data.prefetch=2", *words]).recipe
    loader = build_loader(recipe, torch.device("cpu"), ("train",))
    ours = "our loader, 2 threads"
    streams: dict[str, Iterator[Tensor]] = {
        ours: (batch.images_BCHW for batch in loader.stream(Progress(loader.steps_per_epoch), EPOCHS)),
        "torchvision, Pillow, 2 workers": theirs(loader.plan, pillow),
        "torchvision, decode_jpeg, 2 workers": theirs(loader.plan, jpeg),
    }
    first = {name: next(images) for name, images in streams.items()}
    rates: dict[str, list[float]] = {name: [] for name in streams}
    for _ in range(int(own.get("blocks", 5))):
        for name, images in streams.items():
            rates[name].append(rate(images, float(own.get("seconds", 4))))
    print(f"{'images/s, median (range)':<36} {'rate':<20} {'ours ÷ it':<20} mean |d| of 255")
    for name, each in rates.items():
        ratios = [mine / other for mine, other in zip(rates[ours], each, strict=True)]
        apart = difference(first[ours], first[name], recipe.data)
        print(f"{name:<36} {told(each, 0):<20} {told(ratios, 2):<20} {apart:.2f}")


if __name__ == "__main__":
    main()
