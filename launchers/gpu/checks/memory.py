"""Check that the largest losses fit into memory at ImageNet's size, and measure their peak memory."""

from __future__ import annotations

import resource
import shutil
from pathlib import Path
from typing import Any

import torch
from options import Options
from stages import imagenet_run

from checks import CheckAnswer, answer, cuda_device, train_short


def check(options: Options, folder: Path) -> CheckAnswer:
    """Train three steps of each method on noise, and return its peak memory in GB."""
    rows, problems = [], []
    for method in ("kd", "ddkd") if options.rehearse else ("ce", "kd", "crd", "review", "ddkd"):
        shutil.rmtree(folder / "run", ignore_errors=True)
        args = [*imagenet_run(options, method), *_precision()]
        try:
            lines = train_short(folder / "run", *args, "stop.steps=3", "checkpoints={every_steps: 0, every_epochs: 0}")
        except Exception as error:
            problems.append(f"{method}: {' '.join(str(error).split())[:160]}")
        else:
            rows.append([method, f"{_peak(lines):.2f}"])
    title = f"Peak memory in GB, ResNet-50 → MobileNetV1, B {options.imagenet_batch}, {options.imagenet_size} px"
    return answer(
        title, ["method", "GB on the GPU" if cuda_device().type == "cuda" else "GB of this process"], rows, problems
    )


def _precision() -> list[str]:
    # ImageNet's bf16 is many times slower on a CPU without bf16 units.
    return [] if cuda_device().type == "cuda" else ["precision=fp32"]


def _peak(lines: list[dict[str, Any]]) -> float:
    """Return the peak memory of a run's steps in GB: allocated on the GPU, or resident in this process."""
    if torch.cuda.is_available():
        return max(line["timing"]["memory_gib"]["allocated"] for line in lines if "timing" in line) * 2**30 / 1e9
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9
