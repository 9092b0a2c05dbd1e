"""Check that a sample's pixels do not depend on its batch, and are nearly the same on GPU and CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from options import Options

from checks import CheckAnswer, answer, cuda_device
from pipeline.data.config import Config
from pipeline.data.loader import create_loader

LARGEST_MEAN_DIFFERENCE = 0.5
"""Mean absolute difference of an image's pixels, of 255."""


def check(options: Options, _: Path) -> CheckAnswer:
    """Decode the same images with other orders and batch sizes, and on the CPU, and compare the pixels."""
    config = Config(
        path=str(options.jpeg_shards), size=64 if options.rehearse else 224, mean=(0, 0, 0), std=(1 / 255,) * 3
    )
    rng = np.random.default_rng(0)
    first = _decode(config, cuda_device(), 8, None)
    rows, problems = [], []
    for batch, order in ((8, rng), (3, rng), (16, None)):
        other = _decode(config, cuda_device(), batch, order)
        difference = (other - first).abs().max().item()
        rows.append([f"batches of {batch}, {'shuffled' if order else 'in order'}", f"{difference:.3g}", ""])
        if difference:
            problems.append(f"pixels depend on the batch: they differ by {difference:.3g} of 255")
    if cuda_device().type == "cuda":
        change = (_decode(config, torch.device("cpu"), 8, None) - first).abs()
        mean = change.mean((1, 2, 3)).max().item()
        rows.append(["the CPU's decoder", f"{change.max().item():.3g}", f"{mean:.3g}"])
        if mean > LARGEST_MEAN_DIFFERENCE:
            problems.append(f"an image differs from the CPU's by {mean:.2f} of 255 on average")
    return answer("Pixels, of 255", ["against batches of 8", "largest difference", "largest mean"], rows, problems)


def _decode(config: Config, device: torch.device, batch: int, rng: np.random.Generator | None) -> torch.Tensor:
    """Return up to 256 training images of view 0 in storage order, on the CPU; ``rng`` shuffles their decoding."""
    loader = create_loader(
        config, batch=batch, accumulation=1, seed=0, rank=0, world=1, device=device, splits=("train",)
    )
    count = min(len(loader.plan.readers["train"].samples), 256)
    rows = np.arange(count) if rng is None else rng.permutation(count)
    parts = [rows[start : start + batch] for start in range(0, count, batch)]
    images = torch.empty(count, 3, config.size, config.size)
    for part, decoded in zip(parts, loader.views((part, 0) for part in parts), strict=True):
        images[part] = decoded.images_BCHW.float().cpu()
    return images
