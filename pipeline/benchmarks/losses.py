"""Benchmark of each loss of a recipe alone: time of forward and backward, memory, parameters.

It needs no networks, weights or shards. The outputs of student and teacher are random tensors of their taps' shapes, in
the precision that they would have in training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from pipeline.batch import Batch, Outputs, Progress, join_peers
from pipeline.benchmarks.inputs import draw_batch, draw_outputs
from pipeline.benchmarks.measure import Lap, Measurement, measure_parts
from pipeline.builders.meta import probe, probe_models
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
"""Names of the memory counts: a step's peak on a GPU; on a CPU, what is kept between forward and backward."""


def measure_losses(
    loaded: LoadedRecipe, launch: Launch, device: torch.device, *, repeats: int, warmup: int, steps: int
) -> list[Measurement]:
    """Return two measurements per loss, forward and backward; the first includes memory and parameters."""
    recipe = loaded.recipe
    torch.manual_seed(recipe.seed)
    measured: list[Measurement] = []
    with error_context(display_path(loaded.path)):
        facts = probe_models(recipe, [named.recipe for named in loaded.teachers], probe).facts
        layout = weights_layout(recipe, launch)
        inputs = draw_loss_inputs(recipe, facts, layout, device)
        images = len(inputs.batch.labels_B)
        for name, spec in recipe.losses.items():
            benchmark = LossBenchmark(build(spec, facts, layout, device), inputs, facts.autocast)
            parts = measure_parts(
                benchmark.step, device=device, repeats=repeats, warmup=warmup, steps=steps, images=images
            )
            forward, backward = (part._replace(name=f"{name} {part.name}") for part in parts)
            measured += [forward._replace(counts=benchmark.counts()), backward]
    return measured


class LossInputs(NamedTuple):
    """The arguments that training would pass to the losses."""

    student: Outputs
    teacher: Outputs | None
    batch: Batch

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments. They exist anyway, so a loss's memory is counted without them."""
        return [*tensors(self.student), *(tensors(self.teacher) if self.teacher else ()), *self.batch[:3]]


def tensors(outputs: Outputs) -> list[Tensor]:
    """Return the tensors of a network's outputs, or of those of all networks that train together."""
    if outputs.peers:
        return [x for peer in outputs.peers for x in tensors(peer)]
    return [outputs.logits, *outputs.features.values()]


def draw_loss_inputs(recipe: Recipe, facts: Facts, layout: torch.memory_format, device: torch.device) -> LossInputs:
    """Return a random micro-batch of a rank, and random outputs of the networks for it."""
    assert facts.labels_by_id is not None
    batch = draw_batch(recipe, facts.labels_by_id, facts.num_classes, device)
    draw = partial(draw_outputs, rows=len(batch.labels_B), device=device)
    precision = facts.autocast or torch.float32
    exported, peers = recipe.student.export, facts.peers
    student = draw(facts.student_shapes, dtype=precision, layout=layout)
    if peers:
        student = join_peers([draw(peer.student_shapes, dtype=precision, layout=layout) for peer in peers], exported)
    for x in tensors(student):
        x.requires_grad_()
    if recipe.teacher is None:
        return LossInputs(student, None, batch)
    if not recipe.teacher.uses_live_model:
        precision = torch.float16  # of the answers in a teacher's cache
    elif not recipe.teacher.follows_student:
        precision = (recipe.teacher.members or (recipe.teacher,))[0].torch_dtype(device)
    of_teacher = partial(draw, dtype=precision, layout=torch.channels_last)
    teacher = of_teacher(facts.teacher_shapes)
    if peers and recipe.teacher.average:
        teacher = join_peers([of_teacher(peer.teacher_shapes) for peer in peers], exported)
    return LossInputs(student, teacher, batch)


def build(spec: LossSpec, facts: Facts, layout: torch.memory_format, device: torch.device) -> Distiller:
    """Return a Distiller with only that loss, on the device, without a student."""
    distiller = Distiller(cast(FeatureTaps, nn.Identity()), {spec.name: spec}, facts).to(device)
    return distiller.to(memory_format=layout)  # type: ignore[call-overload]


class LossBenchmark:
    """A loss with its inputs, whose steps are measured."""

    def __init__(self, distiller: Distiller, inputs: LossInputs, dtype: torch.dtype | None) -> None:
        self.distiller = distiller
        self.inputs = inputs
        self.dtype = dtype
        self.loss: Any
        (self.loss,) = distiller.losses.values()

    def forward(self) -> Tensor:
        """Return the loss's part of the total, computed as in a Distiller."""
        with autocast(self.inputs.student.logits_BK, self.dtype):
            parts = self.loss.parts(*self.inputs, Progress(steps_per_epoch=1))
            return torch.stack(list(parts.values())).sum()

    def step(self, lap: Lap) -> None:
        """Run forward and backward; the update of the loss's memory bank counts as backward."""
        total = self.forward()
        lap(FORWARD)
        trainable = [x for x in (*tensors(self.inputs.student), *self.distiller.parameters()) if x.requires_grad]
        torch.autograd.grad(total, trainable, allow_unused=True)
        self.distiller.commit()
        lap(BACKWARD)

    def counts(self) -> dict[str, int]:
        """Return a step's memory in bytes and the number of the loss's parameters."""
        parameters = sum(parameter.numel() for parameter in self.distiller.parameters())
        device = self.inputs.batch.labels_B.device
        if device.type == "cuda":
            return {PEAK: peak_bytes(lambda: self.step(lambda name: None), device), "parameters": parameters}
        existing = [*self.inputs.tensors, *self.distiller.parameters(), *self.distiller.buffers()]
        return {KEPT: kept_bytes(self.forward, existing), "parameters": parameters}


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Return the peak of the bytes that ``step`` allocates on the GPU, beyond those allocated before."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    return torch.cuda.max_memory_allocated(device) - before


def kept_bytes(forward: Callable[[], Tensor], existing: Iterable[Tensor]) -> int:
    """Return the bytes that ``forward`` keeps for its backward, each storage once, without ``existing`` tensors."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return x.detach()  # a saved tensor that refers to its own graph would never be freed

    with saved_tensors_hooks(pack, lambda x: x):
        total = forward()
    for x in existing:
        kept.pop(x.untyped_storage().data_ptr(), None)
    del total  # kept until here: a freed storage could be used again, and two tensors would count as one
    return sum(kept.values())
