"""What it costs to add up a recipe's gradients over the ranks, with nothing else to do."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from pipeline import parallel, zero
from pipeline.benches.measure import Measured, measure
from pipeline.build import student_named
from pipeline.check import made_of
from pipeline.composition import RecipeError, about, shown
from pipeline.distiller import Distiller
from pipeline.health.network import bus_bandwidth
from pipeline.launch import BUCKET_MIB
from pipeline.recipe import LoadedRecipe, Recipe

MIB = 2**20


def measure_allreduce(
    loaded: LoadedRecipe, device: torch.device, *, repeats: int, warmup: int, steps: int
) -> list[Measured]:
    """Return how long the sum of all gradients takes, bucket after bucket as DDP sends them; nothing for one rank."""
    world = parallel.world_size()
    if world == 1:
        print("allreduce: one rank has nothing to send; start several: torchrun --nproc_per_node N pipeline/bench.py …")
        return []
    with about(shown(loaded.path)):
        if zero.asked():
            raise RecipeError("allreduce is of DDP's buckets, which DeepSpeed does not send; start it without")
        sizes = buckets(gradient_bytes(loaded.recipe), BUCKET_MIB * MIB)
    gradients = [torch.zeros(size // 4, device=device) for size in sizes]

    def add_up() -> None:
        for gradient in gradients:
            parallel.add_over_ranks_(gradient)

    found = measure("gradients", add_up, device=device, repeats=repeats, warmup=warmup, steps=steps)
    speed = bus_bandwidth(sum(sizes), found.median / steps, world)
    return [found._replace(counts={"bytes": sum(sizes), "buckets": len(sizes), "bus bytes/s": round(speed)})]


def gradient_bytes(recipe: Recipe) -> list[int]:
    """Return the bytes of every gradient, in about the order in which backward finds them."""
    _, _, facts, _ = made_of(recipe)
    distiller = Distiller(student_named(recipe).build(facts.num_classes), recipe.losses, facts)
    learning = [parameter for parameter in distiller.parameters() if parameter.requires_grad]
    return [parameter.numel() * parameter.element_size() for parameter in reversed(learning)]


def buckets(sizes: Iterable[int], largest: int) -> list[int]:
    """Return the bytes of DDP's buckets: a gradient is put into the last one, which is full once it has ``largest``."""
    filled = [0]
    for size in sizes:
        if filled[-1] >= largest:
            filled.append(0)
        filled[-1] += size
    return filled
