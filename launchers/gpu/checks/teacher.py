"""Check that a folded teacher in half precision gives nearly the same outputs as in float32."""

from __future__ import annotations

from pathlib import Path

import torch
from options import Options
from torch import Tensor

from checks import CheckAnswer, answer, cuda_device
from pipeline.batch import Batch
from pipeline.features.taps import FeatureTaps
from pipeline.models import create_model
from pipeline.models.stages import stages
from pipeline.models.weights import load_weights
from pipeline.teachers.frozen import Teacher
from shards.manifest import read_manifest

LARGEST_CHANGE = 2e-2
"""Change of a tap, relative to its largest value."""
LEAST_AGREEMENT = 99.8
"""Percentage of images with the same predicted class."""


def check(options: Options, _: Path) -> CheckAnswer:
    """Compare both teachers on random images.

    Generated weights have BatchNorm statistics of such images. Trained weights do not.
    """
    cifar_weights = options.weights or options.inputs / "resnet56.pt"
    shards = {"resnet56": options.cifar_shards, "resnet50": options.inputs / "imagenet"}
    cases = [
        ("cifar_resnet56", cifar_weights, 32, 200),
        ("resnet50", options.inputs / "resnet50.pt", options.imagenet_size, 32),
    ]
    rows, problems = [], []
    for name, weights, size, images in cases:
        classes = read_manifest(shards[name.removeprefix("cifar_")]).num_classes
        change, agreement = _compare(name, weights, classes, size, 16 if options.rehearse else images)
        rows.append([name, f"{change:.1e}", f"{agreement:.1f}"])
        if not change <= LARGEST_CHANGE:
            problems.append(f"{name}: a tap changes by {change:.1e} of its largest value")
        # Only trained weights separate the classes well enough for this limit.
        if options.weights and name.startswith("cifar") and agreement < LEAST_AGREEMENT:
            problems.append(f"{name}: only {agreement:.1f} % of the images get the same class")
    title = f"Teacher in {str(_half_dtype()).removeprefix('torch.')}, folded, against float32, not folded"
    return answer(title, ["network", "largest change of a tap", "same class, %"], rows, problems)


def _half_dtype() -> torch.dtype:
    return torch.float16 if cuda_device().type == "cuda" else torch.float32


def _compare(name: str, weights: Path, classes: int, size: int, images: int) -> tuple[float, float]:
    """Return the largest relative change of the last map and the logits, and the percentage of equal classes."""
    batch = Batch(torch.randn(images, 3, size, size, device=cuda_device()), *(torch.zeros(images),) * 2, {})
    found = []
    for dtype, fold in ((torch.float32, False), (_half_dtype(), True)):
        model = create_model(name, classes)
        load_weights(model, str(weights), name)
        taps = FeatureTaps(model, stages(model), frozenset({"last"}))
        found.append(Teacher(taps, batch=16, image_size=size, dtype=dtype, device=cuda_device(), fold=fold)(batch))
    (plain, half) = found
    pairs = [(plain.logits_BK, half.logits_BK), (plain.features["last"], half.features["last"])]
    same_B = plain.logits_BK.argmax(1) == half.logits_BK.argmax(1)
    return max(_change(*pair) for pair in pairs), 100 * same_B.float().mean().item()


def _change(expected: Tensor, found: Tensor) -> float:
    return ((found.float() - expected).abs().max() / expected.abs().max()).item()
