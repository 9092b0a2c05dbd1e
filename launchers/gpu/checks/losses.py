"""Every loss here, in float32, against the same loss in float64 on the CPU: value and gradient."""

from __future__ import annotations

from pathlib import Path

import torch
from loss_cases import NAMES, Example, example
from options import Options
from torch import Tensor

from checks import CheckAnswer, answer, cuda_device
from pipeline.batch import Batch, Outputs

_LARGEST_DIFFERENCE = 1e-3
"""Of the total, relative. Networks of a loss compute in TF32 on a GPU, with ten bits."""
LEAST_COSINE = 0.999
DRAWS = ("crd", "ddkd", "diffkd")
"""Losses that draw: a GPU's generator has other numbers, and all there is to see is that they are finite."""


def check(options: Options, _: Path) -> CheckAnswer:
    """Compare all of them."""
    rows, wrong = [], []
    for name in NAMES[:4] if options.rehearse else NAMES:
        expected, found = _run(_moved(example(name), torch.float64)), _run(_moved(example(name, dtype=torch.float32)))
        difference = abs(found[0] - expected[0]) / max(abs(expected[0]), 1e-12)
        cosine = torch.nn.functional.cosine_similarity(found[1], expected[1], dim=0).item()
        compared = name not in DRAWS or cuda_device().type == "cpu"
        rows.append([name, f"{difference:.1e}", f"{cosine:.6f}"] if compared else [name, "draws", "draws"])
        if not torch.isfinite(found[1]).all():
            wrong.append(f"{name}: its gradient is not finite")
        elif compared and not (difference <= _LARGEST_DIFFERENCE and cosine >= LEAST_COSINE):
            wrong.append(f"{name}: off by {difference:.1e}, cosine {cosine:.5f}")
    return answer("Losses against float64", ["loss", "difference of the value", "cosine of the gradient"], rows, wrong)


def _moved(case: Example, dtype: torch.dtype | None = None) -> Example:
    """Return the case on this machine's device; one in float64 stays on the CPU."""
    to = torch.device("cpu") if dtype == torch.float64 else cuda_device()

    def leaf(x: Tensor) -> Tensor:
        return x.detach().to(to).requires_grad_()

    def outputs(given: Outputs) -> Outputs:
        return Outputs(leaf(given.logits_BK), {name: leaf(x) for name, x in given.features.items()})

    batch = Batch(*(x.to(to) for x in case.batch[:3]), {})
    return Example(case.loss.to(to), outputs(case.student), outputs(case.teacher), batch)


def _run(case: Example) -> tuple[float, Tensor]:
    """Return the total and its gradient at the student, in float64 on the CPU."""
    total = case.total(seed=1)
    total.backward()
    gradients = [x.grad.flatten().double().cpu() for x in case.student_tensors() if x.grad is not None]
    return total.item(), torch.cat(gradients)
