"""What each loss of a recipe costs by itself: time forward and backward, memory, parameters.

Networks, weights and shards are not needed: student and teacher answer drawn tensors of their taps' shapes, in the
precision that training would give them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from pipeline.batch import Batch, Outputs, Progress
from pipeline.benchmarks.inputs import draw_batch, draw_outputs
from pipeline.benchmarks.measure import Lap, Measurement, measure_parts
from pipeline.builders.meta import probe as built
from pipeline.builders.meta import probe_models
from pipeline.builders.student import weights_layout
from pipeline.config.recipe import LoadedRecipe, Recipe
from pipeline.distiller import Distiller
from pipeline.distributed.launcher import Launch
from pipeline.errors import display_path, error_context
from pipeline.features.taps import FeatureTaps
from pipeline.losses._base import Facts
from pipeline.losses._registry import LossSpec
from pipeline.precision import autocast

FORWARD, BACKWARD = "forward", "backward"
PEAK, KEPT = "peak bytes", "kept bytes"
"""What a step adds at most on a GPU; what is kept on a CPU between forward and backward."""


def measure_losses(
    loaded: LoadedRecipe, launch: Launch, device: torch.device, *, repeats: int, warmup: int, steps: int
) -> list[Measurement]:
    """Return two rows for each loss, forward and backward; the first says its memory and its parameters."""
    recipe = loaded.recipe
    torch.manual_seed(recipe.seed)
    found: list[Measurement] = []
    with error_context(display_path(loaded.path)):
        facts = probe_models(recipe, [named.recipe for named in loaded.teachers], built).facts
        layout = weights_layout(recipe, launch)
        given = draw_given(recipe, facts, layout, device)
        images = len(given.batch.labels_B)
        for name, spec in recipe.losses.items():
            alone = LossBenchmark(build(spec, facts, layout, device), given, facts.autocast)
            parts = measure_parts(alone.step, device=device, repeats=repeats, warmup=warmup, steps=steps, images=images)
            forward, backward = (part._replace(name=f"{name} {part.name}") for part in parts)
            found += [forward._replace(counts=alone.counts()), backward]
    return found


class LossInputs(NamedTuple):
    """What training would give the losses."""

    student: Outputs
    teacher: Outputs | None
    batch: Batch

    @property
    def tensors(self) -> list[Tensor]:
        """What of it a loss may keep."""
        return [*tensors(self.student), *(tensors(self.teacher) if self.teacher else ()), *self.batch[:3]]


def tensors(outputs: Outputs) -> list[Tensor]:
    """Return the tensors of a network's answer."""
    return [outputs.logits_BK, *outputs.features.values()]


def draw_given(recipe: Recipe, facts: Facts, layout: torch.memory_format, device: torch.device) -> LossInputs:
    """Draw what a rank's micro-batch would be, and what the networks would answer to it."""
    assert facts.labels_by_id is not None
    batch = draw_batch(recipe, facts.labels_by_id, device)
    draw = partial(draw_outputs, rows=len(batch.labels_B), device=device)
    precision = facts.autocast or torch.float32
    student = draw(facts.student_shapes, dtype=precision, layout=layout)
    for x in tensors(student):
        x.requires_grad_()
    if recipe.teacher is None:
        return LossInputs(student, None, batch)
    if not recipe.teacher.uses_live_model:
        precision = torch.float16
    elif not recipe.teacher.average:
        precision = (recipe.teacher.members or (recipe.teacher,))[0].torch_dtype(device)
    return LossInputs(student, draw(facts.teacher_shapes, dtype=precision, layout=torch.channels_last), batch)


def build(spec: LossSpec, facts: Facts, layout: torch.memory_format, device: torch.device) -> Distiller:
    """Return a Distiller of that one loss, on the device, without a student."""
    distiller = Distiller(cast(FeatureTaps, nn.Identity()), {spec.name: spec}, facts).to(device)
    return distiller.to(memory_format=layout)  # type: ignore[call-overload]


class LossBenchmark:
    """One loss with what it is given."""

    def __init__(self, distiller: Distiller, given: LossInputs, dtype: torch.dtype | None) -> None:
        self.distiller = distiller
        self.given = given
        self.dtype = dtype
        self.loss: Any
        (self.loss,) = distiller.losses.values()

    def forward(self) -> Tensor:
        """Return what the loss adds to the total, as a Distiller asks for it."""
        with autocast(self.given.student.logits_BK, self.dtype):
            parts = self.loss.parts(*self.given, Progress(steps_per_epoch=1))
            return torch.stack(list(parts.values())).sum()

    def step(self, mark: Lap) -> None:
        """Run forward and backward; that the loss takes the batch in belongs to the second."""
        total = self.forward()
        mark(FORWARD)
        learning = [x for x in (*tensors(self.given.student), *self.distiller.parameters()) if x.requires_grad]
        torch.autograd.grad(total, learning, allow_unused=True)
        self.distiller.commit()
        mark(BACKWARD)

    def counts(self) -> dict[str, int]:
        """Return the bytes that a step takes and the loss's parameters."""
        parameters = sum(parameter.numel() for parameter in self.distiller.parameters())
        device = self.given.batch.labels_B.device
        if device.type == "cuda":
            return {PEAK: peak_bytes(lambda: self.step(lambda name: None), device), "parameters": parameters}
        there = [*self.given.tensors, *self.distiller.parameters(), *self.distiller.buffers()]
        return {KEPT: kept_bytes(self.forward, there), "parameters": parameters}


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Return the bytes of the GPU that ``step`` allocates at most, beyond what is there already."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    return torch.cuda.max_memory_allocated(device) - before


def kept_bytes(forward: Callable[[], Tensor], there: Iterable[Tensor]) -> int:
    """Return the bytes that ``forward`` keeps for its backward besides what is ``there``, each storage once."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return x.detach()  # what is packed must not hold on to the graph that holds it

    with saved_tensors_hooks(pack, lambda x: x):
        total = forward()
    for x in there:
        kept.pop(x.untyped_storage().data_ptr(), None)
    del total  # held until here: the storage of what is freed could be another's, and count for both as one
    return sum(kept.values())
