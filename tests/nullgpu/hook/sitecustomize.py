"""Read by every Python that ``null_gpu.py`` starts: what has to be otherwise on a GPU that computes nothing.

Each change is made once its module has been loaded, and loads nothing by itself. Convolutions are blanks. What looks at
numbers does its work and believes none: the guard, an accuracy, what the half hour's checks compare of two runs. DALI,
which brings a CUDA of its own, decodes on the CPU; its images are copied to the GPU.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def torch_has_loaded(torch: Any) -> None:
    from blank_convolutions import register

    register()


def guard_has_loaded(guard: Any) -> None:
    check = guard.FiniteGuard.check

    def silent(self: Any) -> None:
        """Ask the device, and take every answer."""
        with contextlib.suppress(guard.NonFiniteError):
            check(self)

    guard.FiniteGuard.check = silent


def evaluation_has_loaded(evaluation: Any) -> None:
    sum_over_ranks = evaluation.sum_over_ranks

    def one_at_least(counts: Any) -> Any:
        """Add up, and never give zero: what is counted is divided by."""
        return sum_over_ranks(counts).cpu().clamp(min=1)

    evaluation.sum_over_ranks = one_at_least


def dali_has_loaded(dali: Any) -> None:
    import torch

    new_pipeline, decoding, run, cpu = dali.new_pipeline, dali.decoding, dali.run, torch.device("cpu")
    dali.new_pipeline = lambda batch, pace, device: new_pipeline(batch, pace, cpu)
    dali.decoding = lambda config, device: decoding(config, cpu)
    dali.run = lambda pipeline, device: run(pipeline, cpu).to(device)


def verifying_has_loaded(verify: Any) -> None:
    verify.Difference.relative = 0.0


def checks_have_loaded(checks: Any) -> None:
    journal_losses, saved_weights = checks.journal_losses, checks.saved_weights
    checks.journal_losses = lambda lines: [1.0 for _ in journal_losses(lines)]
    checks.saved_weights = lambda run, step: len(saved_weights(run, step))


CHANGES: dict[str, Callable[[ModuleType], None]] = {
    "torch": torch_has_loaded,
    "pipeline.optim.guard": guard_has_loaded,
    "pipeline.training.evaluation": evaluation_has_loaded,
    "pipeline.data.dali": dali_has_loaded,
    "pipeline.caching.verify": verifying_has_loaded,
    "checks": checks_have_loaded,
}


class Afterwards(MetaPathFinder):
    """Finds the modules of ``CHANGES``, each to be changed once it has been loaded."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        change = CHANGES.pop(name, None)
        spec = importlib.util.find_spec(name) if change else None
        if change is None or spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def load_and_change(module: ModuleType) -> None:
            load(module)
            change(module)

        spec.loader.exec_module = load_and_change  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, Afterwards())
