"""What it costs to add up a recipe's gradients over the ranks, with nothing else to do."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from pipeline.benchmarks.measure import Measurement, measure
from pipeline.builders.meta import probe as built
from pipeline.builders.meta import probe_models
from pipeline.builders.student import student_spec
from pipeline.config.recipe import LoadedRecipe
from pipeline.diagnostics.network import bus_bandwidth
from pipeline.distiller import Distiller
from pipeline.distributed import collectives
from pipeline.distributed.launcher import Launch
from pipeline.errors import RecipeError, display_path, error_context
from pipeline.training.accelerator import BUCKET_MIB

_MIB = 2**20


def measure_allreduce(
    loaded: LoadedRecipe, launch: Launch, device: torch.device, *, repeats: int, warmup: int, steps: int
) -> list[Measurement]:
    """Return how long the sum of all gradients takes, bucket after bucket as DDP sends them.

    Without the casts of compressed ones.
    """
    world = collectives.world_size()
    if world == 1:
        raise RecipeError(
            "allreduce: one rank sends nothing; start several: torchrun --nproc_per_node N pipeline/bench.py …"
        )
    with error_context(display_path(loaded.path)):
        if launch.use_deepspeed:
            raise RecipeError("allreduce is of DDP's buckets, which DeepSpeed does not send; start it without")
        sent = [torch.zeros(size, dtype=dtype, device=device) for size, dtype in sendings(loaded)]

    def add_up() -> None:
        for bucket in sent:
            collectives.all_reduce_(bucket)

    found = measure("gradients", add_up, device=device, repeats=repeats, warmup=warmup, steps=steps)
    total = sum(bucket.nbytes for bucket in sent)
    speed = bus_bandwidth(total, found.median / steps, world)
    return [found._replace(counts={"bytes": total, "buckets": len(sent), "bus bytes/s": round(speed)})]


def sendings(loaded: LoadedRecipe) -> list[tuple[int, torch.dtype]]:
    """Return how many numbers of which type each of DDP's buckets sends."""
    recipe = loaded.recipe
    facts = probe_models(recipe, [named.recipe for named in loaded.teachers], built).facts
    student = student_spec(recipe.student, recipe.taps.student).build(facts.num_classes)
    distiller = Distiller(student, recipe.losses, facts)
    small = {"all": distiller, "auxiliary": distiller.losses}.get(recipe.compress or "")
    compressed = set(small.parameters()) if small else set()
    learning = [parameter for parameter in distiller.parameters() if parameter.requires_grad]
    return [
        (sum(x.numel() for x in bucket), torch.bfloat16 if compressed.issuperset(bucket) else torch.float32)
        for bucket in buckets(learning, BUCKET_MIB * _MIB)
    ]


def buckets(gradients: Iterable[Tensor], largest: int) -> list[list[Tensor]]:
    """Return DDP's buckets in the order in which it sends them, backward's.

    A gradient is put into the last one, which is full once it has ``largest`` bytes.
    """
    filled: list[list[Tensor]] = [[]]
    for gradient in gradients:
        if sum(x.nbytes for x in filled[-1]) >= largest:
            filled.append([])
        filled[-1].append(gradient)
    return filled[::-1]
