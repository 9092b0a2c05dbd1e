"""Creation of a recipe's Accelerator: precision, accumulation, trackers, DDP options and the cores of one process."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    LoggerType,
    ProjectConfiguration,
)

from pipeline.config.recipe import Recipe
from pipeline.distributed import rendezvous
from pipeline.distributed.launcher import Launch, is_set
from pipeline.errors import RecipeError
from pipeline.training import zero
from shards.cores import usable_cores

BUCKET_MIB = 8
"""Size in MiB of the buckets in which DDP sends gradients.

Backward overlaps with the all-reduce of every bucket but the last. The 16 MB of 4 million parameters would fit into one
of torch's 25 MB buckets, which is sent after backward. Here they are two or three buckets. The 160 MB of 40 million
parameters are 20 buckets. Each is still large enough that its bytes take the time, not the network's latency.
"""

FOREIGN_VARIABLES = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism of several dimensions",
}
"""Features of Accelerate that no recipe supports, by the environment variable that enables each."""


def use_all_cores(launch: Launch) -> None:
    """Let a single process use every core it may run on: Accelerate's launcher sets OMP_NUM_THREADS to 1."""
    if launch.world_size == 1:
        torch.set_num_threads(len(usable_cores()))


def create_accelerator(recipe: Recipe, launch: Launch, folder: Path | None = None) -> Accelerator:
    """Return the Accelerator of a recipe, with its trackers if there is a run ``folder``.

    Raises RecipeError if the machine cannot do what the recipe needs, or if the ranks cannot see each other.
    """
    cpu = launch.on_cpu
    if cpu and recipe.precision == "fp16":
        raise RecipeError("precision: fp16 needs a GPU; give precision=bf16 or precision=fp32")
    _check_environment(launch)
    if folder:
        _check_trackers(recipe.journal.trackers)
    plugin = zero.create_plugin(recipe, launch) if launch.use_deepspeed else None
    rendezvous.init_process_group(launch)
    accelerator = Accelerator(
        # With cpu=True Accelerate would ignore the DeepSpeed plugin.
        cpu=cpu and plugin is None,
        deepspeed_plugin=plugin,
        # DeepSpeed's own settings contain the precision.
        mixed_precision="no" if plugin or recipe.precision == "fp32" else recipe.precision,
        # The loader yields complete global batches only, so accumulation never has to end early with the loader.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=recipe.accumulation, sync_with_dataloader=False
        ),
        step_scheduler_with_optimizer=False,
        dynamo_backend="no",  # only the recipe decides what torch compiles (``student.compile``)
        log_with=(list(recipe.journal.trackers) or None) if folder else None,
        project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder)) if folder else None,
        kwargs_handlers=[
            _ddp_options(),
            # Accelerate chooses the backend, except for DeepSpeed on a CPU: without "gloo" each rank would run alone.
            InitProcessGroupKwargs(backend="gloo" if cpu and plugin else "nccl", timeout=timedelta(minutes=10)),
        ],
    )
    if accelerator.num_processes != launch.world_size:
        raise RecipeError(
            f"the launcher started {launch.world_size} ranks and each sees {accelerator.num_processes}; "
            "start them with torchrun --nproc_per_node N pipeline/train.py, or set a different LOCAL_RANK for each"
        )
    return accelerator


def forget_accelerators() -> None:
    """Forget precision and accumulation, which Accelerate keeps for the whole process, so that others can follow."""
    AcceleratorState._reset_state()
    GradientState._reset_state()


def _check_environment(launch: Launch) -> None:
    """Raise RecipeError if Accelerate's environment or configuration enables a feature that is not supported here.

    Settings that belong to the recipe, such as precision and compilation, are ignored.
    """
    for name, feature in FOREIGN_VARIABLES.items():
        if is_set(name):
            raise RecipeError(
                f"{name} enables {feature}, which is not supported here; unset it, or use an Accelerate configuration "
                "without it (accelerate launch --config_file launchers/accelerate/ddp.yaml)"
            )
    if device := os.environ.get("ACCELERATE_TORCH_DEVICE"):
        raise RecipeError(
            f"ACCELERATE_TORCH_DEVICE={device}: unset it; choose the device with CUDA_VISIBLE_DEVICES or "
            "ACCELERATE_USE_CPU=true"
        )
    compiler = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if compiler.lower() not in ("", "no") and launch.is_main:
        print(f"note: ACCELERATE_DYNAMO_BACKEND={compiler} is ignored; student.compile=true turns on torch.compile")


def _ddp_options() -> DistributedDataParallelKwargs:
    # torch deprecates this argument, but Accelerate has no field for its successor yet.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
    return DistributedDataParallelKwargs(
        # Each rank keeps its own BatchNorm statistics; evaluation and export take their mean over the ranks.
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
        # A parameter may have no gradient, such as the head's if the losses compare only features. The other options
        # for this rebuild DDP's buckets after a command's first steps. With three ranks, a sum in other buckets differs
        # in its last bits, and a resumed run would differ from an uninterrupted one.
        find_unused_parameters=True,
        bucket_cap_mb=BUCKET_MIB,
    )


def _check_trackers(names: Sequence[str]) -> None:
    """Raise RecipeError for an unknown or missing tracker, which Accelerate would ignore silently."""
    known, installed = list(map(str, LoggerType)), list(map(str, [LoggerType.ALL, *get_available_trackers()]))
    for name in names:
        if name not in known:
            raise RecipeError(f"journal.trackers: there is no tracker {name!r}; known are {', '.join(known)}")
        if name not in installed:
            raise RecipeError(f"journal.trackers: {name} is not installed; install it, or leave it out of the list")
