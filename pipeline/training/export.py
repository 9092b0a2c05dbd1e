"""Export of the student's plain weights and of their moving average."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from accelerate import Accelerator
from torch import nn

from pipeline.distributed import collectives
from pipeline.features.taps import FeatureTaps
from pipeline.losses._base import Loss
from pipeline.models.slimmable import exported_network
from pipeline.models.states import file_bytes
from pipeline.optim.ema import EMA
from pipeline.runs.card import Card
from pipeline.runs.identity import Run
from pipeline.tasks._base import Evaluation
from pipeline.training import zero
from pipeline.training.checkpoint import Best, export_student
from shards.manifest import write_atomically

_T = TypeVar("_T")


def student_card(run: Run, found: Evaluation | None, best: Best | None = None) -> Card:
    """Return the card of weights of the run that reached ``found``. ``best`` is for the best weights only."""
    student, data = run.recipe.student, run.recipe.data
    sides = {}
    if data.crop == "keep_ratio":
        sides = {"short": max(data.short_sides), "long": data.long_side, "buckets": data.bucket_sizes}
    return Card(
        task=run.recipe.task,
        model=student.model,
        arguments=dict(student.arguments or {}),
        classes=run.manifest.classes,
        mean=data.mean,
        std=data.std,
        size=data.for_validation.size,
        resize=data.resize,
        **sides,
        accuracy=found.metrics if found else None,
        identity=run.fingerprint,
        best={best.metric: best.value, "epoch": best.epoch} if best else None,
    )


def export(student: FeatureTaps, path: Path, accelerator: Accelerator, card: Card) -> None:
    """Write the weights and their card, with BatchNorm statistics averaged over the ranks; every rank calls it."""
    # Both contexts run collectives, so every rank enters them before the main process writes.
    with collectives.average_buffers(student), zero.gather_parameters(student):
        if accelerator.is_main_process:
            export_student(exported_network(student.model), path, card)


def export_auxiliary(losses: nn.ModuleDict, path: Path, accelerator: Accelerator) -> None:
    """Write the modules that the losses leave for other runs, if there are any; every rank calls it."""
    left = {
        f"{name}.{module}": loss.get_submodule(module) for name, loss in losses.items() for module in _exported(loss)
    }
    if not left:
        return
    with zero.gather_parameters(losses):
        if accelerator.is_main_process:
            tensors = {f"{name}.{key}": x for name, module in left.items() for key, x in module.state_dict().items()}
            write_atomically(path, file_bytes(tensors, {}))


def _exported(loss: nn.Module) -> tuple[str, ...]:
    return loss.exported if isinstance(loss, Loss) else ()


def export_average(
    ema: EMA,
    student: FeatureTaps,
    path: Path,
    accelerator: Accelerator,
    measure: Callable[[], _T],
    card_of: Callable[[_T], Card],
) -> _T:
    """Write the averaged weights, and return the result of ``measure`` while the student uses them.

    ``card_of`` returns their card from that result.
    """
    with ema.applied():
        found = measure()
        export(student, path, accelerator, card_of(found))
        return found
