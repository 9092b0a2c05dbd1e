"""Benchmark of the all-reduce of a recipe's gradients, without any other work."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from pipeline.benchmarks.measure import Measurement, measure
from pipeline.builders.meta import probe, probe_models
from pipeline.builders.peers import trained_specs
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
    """Return how long the all-reduce of all gradients takes, bucket by bucket as DDP sends them.

    Casts of compressed gradients are not included. Raises RecipeError for a single rank and under DeepSpeed.
    """
    world = collectives.world_size()
    if world == 1:
        raise RecipeError(
            "allreduce: one rank sends nothing; start several: torchrun --nproc_per_node N pipeline/bench.py …"
        )
    with error_context(display_path(loaded.path)):
        if launch.use_deepspeed:
            raise RecipeError(
                "allreduce: measures DDP's buckets, which DeepSpeed does not send; start it without DeepSpeed"
            )
        sent = [torch.zeros(size, dtype=dtype, device=device) for size, dtype in bucket_sizes(loaded)]

    def all_reduce() -> None:
        for bucket in sent:
            collectives.all_reduce_(bucket)

    measured = measure("gradients", all_reduce, device=device, repeats=repeats, warmup=warmup, steps=steps)
    total = sum(bucket.nbytes for bucket in sent)
    speed = bus_bandwidth(total, measured.median / steps, world)
    return [measured._replace(counts={"bytes": total, "buckets": len(sent), "bus bytes/s": round(speed)})]


def bucket_sizes(loaded: LoadedRecipe) -> list[tuple[int, torch.dtype]]:
    """Return the number of elements and the dtype of each bucket that DDP sends."""
    recipe = loaded.recipe
    facts = probe_models(recipe, [named.recipe for named in loaded.teachers], probe).facts
    spec = trained_specs(recipe.student, recipe.taps.student)[recipe.student.export]
    student = spec.build(facts.num_classes)
    spec.select_stages(student, recipe.data.size)
    distiller = Distiller(student, recipe.losses, facts)
    small = {"all": distiller, "auxiliary": distiller.losses}.get(recipe.compress or "")
    compressed = set(small.parameters()) if small else set()
    trainable = [parameter for parameter in distiller.parameters() if parameter.requires_grad]
    return [
        # A bucket is sent in bfloat16 only if all its gradients are compressed.
        (sum(x.numel() for x in bucket), torch.bfloat16 if compressed.issuperset(bucket) else torch.float32)
        for bucket in buckets(trainable, BUCKET_MIB * _MIB)
    ]


def buckets(gradients: Iterable[Tensor], largest: int) -> list[list[Tensor]]:
    """Return DDP's buckets in the order in which it sends them, which is that of backward.

    A gradient joins the current bucket; a bucket with ``largest`` bytes or more is full.
    """
    filled: list[list[Tensor]] = [[]]
    for gradient in gradients:
        if sum(x.nbytes for x in filled[-1]) >= largest:
            filled.append([])
        filled[-1].append(gradient)
    return filled[::-1]
