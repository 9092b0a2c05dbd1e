"""Compare our augmentations with torchvision's of the same name, in one run: no test, for its figures are a machine's.

    python tests/speed/augmentations.py [size=224] [batch=64] [blocks=7]

Both augment the same images in memory, on one thread, without decoding: ours a batch of uint8 [B, H, W, C], torchvision
image by image, as PIL images and as tensors (``transforms.v2``). Mixtures are of whole batches both ways; what it takes
to decode partners is not in them. Figures are images per second of CPU time, drawing
included. They take turns, block by block.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from pipeline.batch import Batch
from pipeline.data.augmenter import Augmenter
from pipeline.data.config import Config
from pipeline.data.mixer import Mixer

JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4}
CASES: dict[str, tuple[dict[str, Any], Callable[[], Any]]] = {
    "trivialaugment": ({"trivialaugment": {}}, v2.TrivialAugmentWide),
    "randaugment, 2 operations": ({"randaugment": {"ops": 2, "magnitude": 9}}, v2.RandAugment),
    "autoaugment, imagenet": ({"autoaugment": {"policy": "imagenet"}}, v2.AutoAugment),
    "color_jitter 0.4, 0.4, 0.4": ({"color_jitter": JITTER}, lambda: v2.ColorJitter(**JITTER)),
    "color_jitter with hue 0.1": ({"color_jitter": {**JITTER, "hue": 0.1}}, lambda: v2.ColorJitter(**JITTER, hue=0.1)),
    "erasing 0.25": ({"erasing": {"probability": 0.25}}, lambda: v2.RandomErasing(0.25)),
    "mixup 0.8": ({"mixup": {"alpha": 0.8}}, lambda: v2.MixUp(alpha=0.8, num_classes=1000)),
    "cutmix 1.0": ({"cutmix": {"alpha": 1.0}}, lambda: v2.CutMix(alpha=1.0, num_classes=1000)),
}


def smooth_images(count: int, size: int) -> np.ndarray:
    """Return colourful images with some texture, uint8 [count, size, size, 3]."""
    rng = np.random.default_rng(0)
    waves = np.sin(np.arange(size)[:, None, None] * rng.uniform(0.02, 0.1, (count, 1, 1, 3)) + rng.uniform(0, 6, 3))
    waves = waves + np.cos(np.arange(size)[:, None] * rng.uniform(0.02, 0.1, (count, 1, 1, 3)))
    return (128 + 50 * waves + rng.normal(0, 8, (count, size, size, 3))).clip(0, 255).astype(np.uint8)


class Ours:
    """Augments all images as one batch."""

    def __init__(self, entry: dict[str, Any], images: np.ndarray) -> None:
        keys = {"path": "", "size": images.shape[1], "mean": [0.5] * 3, "std": [0.25] * 3, "augment": [entry]}
        self.augmenter = Augmenter(Config.model_validate(keys), torch.device("cpu"))
        (self.augmentation,) = self.augmenter._augmentations
        pixels = torch.from_numpy(images)
        self.inputs = pixels if self.augmentation.kind == "pixels" else self.augmenter.normalized(pixels)
        self.view = 0
        self.prepare()

    def prepare(self) -> None:
        self.images = self.inputs.clone()  # augmentations overwrite what they get
        self.view += 1

    def augment(self) -> None:
        (drawn,) = self.augmenter.draw(np.arange(len(self.images)), self.view)
        self.augmentation.apply(self.images, drawn)


class OursMixed:
    """Mixes a batch, whose partners are drawn and at hand, and its labels."""

    def __init__(self, entry: dict[str, Any], images: np.ndarray) -> None:
        keys = {"path": "", "size": images.shape[1], "mean": [0.5] * 3, "std": [0.25] * 3, "augment": [entry]}
        config, count = Config.model_validate(keys), len(images)
        self.inputs = Augmenter(config, torch.device("cpu")).normalized(torch.from_numpy(images))
        samples = np.zeros(count, [("id", np.int64), ("label", np.int64)])
        self.mixer = Mixer(config, samples, np.arange(count), 1000)
        self.labels = torch.zeros(count, dtype=torch.int64)
        self.view = 0

    def prepare(self) -> None:
        self.view += 1
        mixture = self.mixer.draw(np.arange(len(self.inputs)), self.view)
        assert mixture is not None
        self.images = torch.cat([self.inputs, self.inputs[: len(mixture.partners_P)]])

    def augment(self) -> None:
        mixture = self.mixer.draw(np.arange(len(self.inputs)), self.view)
        assert mixture is not None
        mixture(Batch(self.images, self.labels, self.labels, {}))


class TheirsMixed:
    """Mixes a batch with its neighbours, and its labels."""

    def __init__(self, transform: Any, images: torch.Tensor) -> None:
        self.transform, self.images = transform, images
        self.labels = torch.zeros(len(images), dtype=torch.int64)

    def prepare(self) -> None:
        pass

    def augment(self) -> None:
        self.transform(self.images, self.labels)


class Theirs:
    """Augments one image after another."""

    def __init__(self, transform: Any, images: list[Any]) -> None:
        self.transform = transform
        self.images = images

    def prepare(self) -> None:
        pass

    def augment(self) -> None:
        for image in self.images:
            self.transform(image)


Way = Ours | OursMixed | Theirs | TheirsMixed


def ways_of(entry: dict[str, Any], transform: Callable[[], Any], images: np.ndarray) -> dict[str, Way]:
    """Return the ways to augment those images."""
    tensors = torch.from_numpy(images).permute(0, 3, 1, 2)
    if "mixup" in entry or "cutmix" in entry:
        floats = v2.functional.to_dtype(tensors, torch.float32, scale=True)
        return {"ours": OursMixed(entry, images), "tensors": TheirsMixed(transform(), floats)}
    if "erasing" in entry:
        floats = v2.functional.to_dtype(tensors.contiguous(), torch.float32, scale=True)
        return {"ours": Ours(entry, images), "tensors": Theirs(transform(), list(floats))}
    pictures = [Image.fromarray(image) for image in images]
    return {
        "ours": Ours(entry, images),
        "tensors": Theirs(transform(), list(tensors.contiguous())),
        "PIL": Theirs(transform(), pictures),
    }


def cpu_seconds(way: Way) -> float:
    way.prepare()
    began = time.process_time()
    way.augment()
    return time.process_time() - began


def main() -> None:
    options = {"size": 224, "batch": 64, "blocks": 7, **{k: int(v) for k, v in (w.split("=") for w in sys.argv[1:])}}
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = smooth_images(options["batch"], options["size"])
    print(f"{'images per CPU second, median (range)':38} {'ours':24} {'torchvision, PIL':24} torchvision, tensors")
    for name, (entry, transform) in CASES.items():
        ways = ways_of(entry, transform, images)
        rates: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(options["blocks"]):
            for name_of_way, way in ways.items():
                rates[name_of_way].append(len(images) / cpu_seconds(way))
        shown = {way: f"{median(x):,.0f} ({min(x):,.0f}–{max(x):,.0f})" for way, x in rates.items()}
        print(f"{name:38} {shown['ours']:24} {shown.get('PIL', '–'):24} {shown['tensors']}", flush=True)


if __name__ == "__main__":
    main()
