"""Check every loss in float32 on this device against float64 on the CPU: value and gradient."""

from __future__ import annotations

from pathlib import Path

import torch
from loss_cases import NAMES, Example, example
from options import Options
from torch import Tensor

from checks import CheckAnswer, answer, cuda_device
from pipeline.batch import Batch, Outputs

_LARGEST_DIFFERENCE = 1e-3
"""Relative difference of the total. Networks of a loss compute in TF32 on a GPU, with ten bits."""
LEAST_COSINE = 0.999
RANDOM_LOSSES = ("crd", "ddkd", "diffkd")
"""Losses with random numbers, which differ on a GPU. There they are only checked to be finite."""


def check(options: Options, _: Path) -> CheckAnswer:
    """Compare the value and the gradient of every loss."""
    rows, problems = [], []
    for name in NAMES[:4] if options.rehearse else NAMES:
        expected, found = (
            _run(_move_example(example(name), torch.float64)),
            _run(_move_example(example(name, dtype=torch.float32))),
        )
        difference = abs(found[0] - expected[0]) / max(abs(expected[0]), 1e-12)
        cosine = torch.nn.functional.cosine_similarity(found[1], expected[1], dim=0).item()
        compared = name not in RANDOM_LOSSES or cuda_device().type == "cpu"
        rows.append([name, f"{difference:.1e}", f"{cosine:.6f}"] if compared else [name, "random", "random"])
        if not torch.isfinite(found[1]).all():
            problems.append(f"{name}: its gradient is not finite")
        elif compared and not (difference <= _LARGEST_DIFFERENCE and cosine >= LEAST_COSINE):
            problems.append(f"{name}: off by {difference:.1e}, cosine {cosine:.5f}")
    return answer(
        "Losses against float64", ["loss", "difference of the value", "cosine of the gradient"], rows, problems
    )


def _move_example(case: Example, dtype: torch.dtype | None = None) -> Example:
    """Return the example on this machine's device, or on the CPU for float64."""
    device = torch.device("cpu") if dtype == torch.float64 else cuda_device()

    def leaf(x: Tensor) -> Tensor:
        return x.detach().to(device).requires_grad_()

    def move_outputs(outputs: Outputs) -> Outputs:
        return Outputs(leaf(outputs.logits_BK), {name: leaf(x) for name, x in outputs.features.items()})

    batch = Batch(*(x.to(device) for x in case.batch[:3]), {})
    return Example(case.loss.to(device), move_outputs(case.student), move_outputs(case.teacher), batch)


def _run(case: Example) -> tuple[float, Tensor]:
    """Return the total loss, and its gradient by the student's outputs as one float64 vector on the CPU."""
    total = case.total(seed=1)
    total.backward()
    gradients = [x.grad.flatten().double().cpu() for x in case.student_tensors() if x.grad is not None]
    return total.item(), torch.cat(gradients)
