"""Check that a sample's pixels depend neither on its batch nor on how its box is decoded, and are nearly the CPU's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from options import Options
from torch import Tensor

from checks import CheckAnswer, answer, cuda_device
from pipeline import nvjpeg
from pipeline.data import dali
from pipeline.data.config import Config
from pipeline.data.jpeg_engine import has_engine
from pipeline.data.loader import create_loader

LARGEST_MEAN_DIFFERENCE = 0.5
"""Mean absolute difference of an image's pixels, of 255."""
_CPU = torch.device("cpu")


def check(options: Options, _: Path) -> CheckAnswer:
    """Decode the same images in several ways by the GPU's cores and by its JPEG engine, and compare the pixels."""
    device, rows, problems = cuda_device(), [], []
    if not dali.decodes_boxes(device):
        problems.append(f"nvJPEG {nvjpeg.version()} decodes whole images, not boxes")
    for shards in (options.inputs / "kinds", *([options.jpegs] if options.jpegs else [])):
        # A CPU ignores the value, so that a rehearsal compares equal things.
        for load in (0, 1) if has_engine(device) or device == _CPU else (0,):
            config = Config(
                path=str(shards),
                size=64 if options.rehearse else 224,
                mean=(0, 0, 0),
                std=(1 / 255,) * 3,
                hw_decoder_load=load,
            )
            found, wrong = _compare(config, device)
            rows += [[shards.name, str(load), *row] for row in found]
            problems += [f"{shards.name}, load {load}: {each}" for each in wrong]
    title = f"Pixels, of 255, by nvJPEG {nvjpeg.version() if device.type == 'cuda' else None}"
    columns = ["images", "hw_decoder_load", "in order, batches of 8, against", "largest difference", "largest mean"]
    return answer(title, [*columns, "images that differ"], rows, problems)


def _compare(config: Config, device: torch.device) -> tuple[list[list[str]], list[str]]:
    """Return a row for each other way of decoding, and what is wrong."""
    rng, first = np.random.default_rng(0), _decode(config, device, 8)
    equal = {
        "batches of 8, shuffled": _decode(config, device, 8, rng),
        "batches of 3, shuffled": _decode(config, device, 3, rng),
        "batches of 16": _decode(config, device, 16),
        "boxes cut out of whole images": _decode(config, device, 8, boxes=False),
    }
    near = {"the CPU's decoder": _decode(config, _CPU, 8)} if device != _CPU else {}
    if config.hw_decoder_load:
        near["the GPU's cores"] = _decode(config.model_copy(update={"hw_decoder_load": 0}), device, 8)
    rows, problems = [], []
    for name, images in {**equal, **near}.items():
        change = (images - first).abs()
        largest, mean = change.max().item(), change.mean((1, 2, 3)).max().item()
        rows.append([name, f"{largest:.3g}", f"{mean:.3g}", str(int(change.flatten(1).any(1).sum()))])
        if name in equal and largest:
            problems.append(f"pixels differ by {largest:.3g} of 255 from {name}")
        if mean > LARGEST_MEAN_DIFFERENCE:
            problems.append(f"an image differs by {mean:.2f} of 255 on average from {name}")
    return rows, problems


def _decode(
    config: Config, device: torch.device, batch: int, rng: np.random.Generator | None = None, *, boxes: bool = True
) -> Tensor:
    """Return up to 256 training images of view 0 in storage order, on the CPU; ``rng`` shuffles their decoding.

    Without ``boxes``, whole images are decoded. A smaller batch comes first.
    """
    how: Any = dali.decodes_boxes if boxes else lambda device: False
    with mock.patch.object(dali, "decodes_boxes", how):
        loader = create_loader(
            config, batch=batch, accumulation=1, seed=0, rank=0, world=1, device=device, splits=("train",)
        )
    count = min(len(loader.plan.readers["train"].samples), 256)
    parts = _batches(np.arange(count) if rng is None else rng.permutation(count), batch)
    images = torch.empty(count, 3, config.size, config.size)
    for part, decoded in zip(parts, loader.views((part, 0) for part in parts), strict=True):
        images[part] = decoded.images_BCHW.float().cpu()
    return images


def _batches(rows: NDArray[np.int64], batch: int) -> Sequence[NDArray[np.int64]]:
    """Return the rows in batches, the first of which may be smaller."""
    return [part for part in np.split(rows, range(len(rows) % batch, len(rows), batch)) if len(part)]
