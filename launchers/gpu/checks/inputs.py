"""Random shards and weights, for the inputs of the other stages that the user does not pass."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from options import Options
from PIL import Image

from checks import CheckAnswer, answer
from pipeline.models import create_model
from shards.manifest import Manifest, Split, read_manifest, write_manifest
from shards.write import ShardWriter, write_samples

_ROOT = Path(__file__).resolve().parents[3]
ImageSize = tuple[int, int]
"""Width and height in pixels."""
Kind = tuple[str, dict[str, Any]]
"""Pillow's mode of an image, and its options for the JPEG."""
KINDS: tuple[Kind, ...] = (
    ("RGB", {"subsampling": "4:2:0"}),
    ("RGB", {"subsampling": "4:2:2"}),
    ("RGB", {"subsampling": "4:4:4"}),
    ("L", {}),
    ("RGB", {"subsampling": "4:2:0", "progressive": True}),
)
"""JPEGs that a JPEG engine decodes, the usual ones first, and one that it does not."""


def check(options: Options, _: Path) -> CheckAnswer:
    """Write the missing inputs, and return the source of each input."""
    options.inputs.mkdir(parents=True, exist_ok=True)
    few = options.rehearse
    if options.cifar is None:
        draw_inputs(options.inputs / "cifar", 128 if few else 10_000, 32 if few else 2_000, 32)
    draw_inputs(options.inputs / "demo", 100 if few else 5_000, 50 if few else 1_000, 64)
    write_shards(options.inputs / "imagenet", 1000, 64 if few else 2_048, [(64, 64)])
    write_shards(options.inputs / "kinds", 20, 60 if few else 240, [(500, 375), (191, 257), (96, 96)], KINDS)
    if options.jpegs is None:
        write_shards(options.inputs / "jpegs", 20, 32 if few else 256, [(500, 375)])
    networks = {
        "resnet56": ("cifar_resnet56", options.cifar_shards),
        "resnet50": ("resnet50", options.inputs / "imagenet"),
    }
    networks["demo_teacher"] = ("cifar_resnet20", options.inputs / "demo")
    for name, (model, shards) in networks.items():
        if not (options.inputs / f"{name}.pt").is_file():
            write_weights(options.inputs / f"{name}.pt", model, read_manifest(shards).num_classes)
    rows = [["CIFAR-100", str(options.cifar or "drawn")], ["its teacher", str(options.weights or "drawn")]]
    return answer("Inputs", ["", "from"], [*rows, ["JPEGs", str(options.jpegs or "drawn")]])


def draw_inputs(folder: Path, train: int, val: int, size: int) -> None:
    """Write the shards of the demo's classification task, unless they exist."""
    args = [str(folder), "--train", str(train), "--val", str(val), "--size", str(size)]
    subprocess.run([sys.executable, str(_ROOT / "shards" / "prepare_demo.py"), *args], check=True)


def write_weights(path: Path, model: str, classes: int) -> None:
    """Write a network's initial weights, with BatchNorm statistics of random images."""
    torch.manual_seed(0)
    network = create_model(model, classes)
    network(torch.randn(16, 3, 64, 64))  # in training mode, to update the statistics
    torch.save(network.state_dict(), path)


def write_shards(
    folder: Path, classes: int, samples: int, sides: Sequence[ImageSize], kinds: Sequence[Kind] = KINDS[:1]
) -> None:
    """Write random JPEGs, ``samples`` for training and an eighth (at least 8) for validation, unless they exist."""
    if (folder / "manifest.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    names = tuple(f"class{number}" for number in range(classes))
    counts = {"train": samples, "val": max(samples // 8, 8)}
    variants = list(product(sides, kinds))
    splits = {split: _write_split(folder, split, count, classes, variants) for split, count in counts.items()}
    write_manifest(folder, Manifest("half_hour", "jpg", names, splits=splits))


def _write_split(
    folder: Path, split: str, count: int, classes: int, variants: Sequence[tuple[ImageSize, Kind]]
) -> Split:
    rng = np.random.default_rng(count)
    # Eight different images of a variant are enough: only their size and their decoding time matter.
    images = [(_jpeg(rng, side, kind), *side) for _ in range(8) for side, kind in variants][:count]
    with ShardWriter(folder / f"{split}-000000.tar", "jpg") as writer:
        for number in range(count):
            writer.add(number, number % classes, *images[number % len(images)])
        shard, table = writer.close()
    table, sha256 = write_samples(folder, split, [table])
    return Split(split, count, count, (shard,), sha256, int(table["width"].max()), int(table["height"].max()))


def _jpeg(rng: np.random.Generator, side: ImageSize, kind: Kind) -> bytes:
    """Return a random smooth image, similar to a photograph, encoded as JPEG."""
    mode, encoding = kind
    coarse = rng.integers(0, 255, (side[1] // 16 + 1, side[0] // 16 + 1, 3), np.uint8)
    file = io.BytesIO()
    image = Image.fromarray(coarse).resize(side, Image.Resampling.BICUBIC).convert(mode)
    image.save(file, "JPEG", quality=90, **encoding)
    return file.getvalue()
