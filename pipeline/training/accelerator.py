"""The promised Accelerator: a recipe's precision, accumulation, trackers and DDP, and every core for one process."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
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

BUCKET_MIB = 8
"""Of gradients that DDP sends together. What backward overlaps with is all buckets but the last: the 16 MB of 4 million
parameters would be one of torch's 25 MB, sent when all is computed, and are two or three of these. The 160 MB of 40
million are 20, each still long enough for a network to be busy with its bytes, not its latency."""


FOREIGN_VARIABLES = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism of several dimensions",
}
"""What Accelerate can be told to do and no recipe knows, by the variable that turns it on."""


def use_all_cores(launch: Launch) -> None:
    """Give one process on a CPU every core it may use: Accelerate's launcher sets OMP_NUM_THREADS to 1."""
    if launch.world_size == 1:
        torch.set_num_threads(len(os.sched_getaffinity(0)))


def create_accelerator(recipe: Recipe, launch: Launch, folder: Path | None = None) -> Accelerator:
    """Return the Accelerator of a recipe, with its trackers if there is a run ``folder``.

    Raises RecipeError where the machine cannot do what is asked, or where the ranks do not see one another.
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
        # Told of a CPU, Accelerate would forget DeepSpeed, which has the precision among its settings.
        cpu=cpu and plugin is None,
        deepspeed_plugin=plugin,
        mixed_precision="no" if plugin or recipe.precision == "fp32" else recipe.precision,
        # The loader gives whole global batches, so accumulation never has to end early at a loader's end.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=recipe.accumulation, sync_with_dataloader=False
        ),
        step_scheduler_with_optimizer=False,
        dynamo_backend="no",
        log_with=(list(recipe.journal.trackers) or None) if folder else None,
        project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder)) if folder else None,
        kwargs_handlers=[
            _ddp_options(),
            # Accelerate chooses the backend, but for DeepSpeed on a CPU: without the name each rank would be alone.
            InitProcessGroupKwargs(backend="gloo" if cpu and plugin else "nccl", timeout=timedelta(minutes=10)),
        ],
    )
    if accelerator.num_processes != launch.world_size:
        raise RecipeError(
            f"the launcher started {launch.world_size} ranks and each sees {accelerator.num_processes}; "
            "start them with torchrun --nproc_per_node N pipeline/train.py, or with each its own LOCAL_RANK"
        )
    return accelerator


def _check_environment(launch: Launch) -> None:
    """Raise RecipeError for what Accelerate's environment or its configuration asks for and this pipeline does not do.

    What is the recipe's to say, as the precision and what torch compiles, is not followed.
    """
    for name, what in FOREIGN_VARIABLES.items():
        if is_set(name):
            raise RecipeError(
                f"{name} asks for {what}, which is not done here; unset it, or take it out of Accelerate's "
                "configuration (accelerate launch --config_file launchers/accelerate/ddp.yaml has none of it)"
            )
    if device := os.environ.get("ACCELERATE_TORCH_DEVICE"):
        raise RecipeError(
            f"ACCELERATE_TORCH_DEVICE={device}: unset it; CUDA_VISIBLE_DEVICES or ACCELERATE_USE_CPU=true choose"
        )
    compiler = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if compiler.lower() not in ("", "no") and launch.is_main:
        print(f"note: ACCELERATE_DYNAMO_BACKEND={compiler} is not followed; student.compile=true lets torch compile")


def _ddp_options() -> DistributedDataParallelKwargs:
    # Accelerate has no field yet for the name that torch would rather have.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
    return DistributedDataParallelKwargs(
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
        # A parameter may do without a gradient, as a head does where only features are compared. Of the ways to say so
        # this one alone keeps its buckets: others make them anew after a command's first steps, and three ranks' sum in
        # other buckets has other last bits, so that no resumed run would be the same.
        find_unused_parameters=True,
        bucket_cap_mb=BUCKET_MIB,
    )


def _check_trackers(names: Sequence[str]) -> None:
    """Raise RecipeError for a tracker that Accelerate would leave out without a word."""
    known, installed = list(map(str, LoggerType)), list(map(str, [LoggerType.ALL, *get_available_trackers()]))
    for name in names:
        if name not in known:
            raise RecipeError(f"journal.trackers: there is no tracker {name!r}; known are {', '.join(known)}")
        if name not in installed:
            raise RecipeError(f"journal.trackers: {name} is not installed; install it, or leave it out of the list")
