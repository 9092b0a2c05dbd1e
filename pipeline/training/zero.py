"""What DeepSpeed's ZeRO does otherwise than DDP: its settings, weights that lie in parts, its checkpoints.

The launcher's environment alone chooses it (``ACCELERATE_USE_DEEPSPEED`` and a file such as
``launchers/deepspeed/zero2.json``); a recipe knows nothing of it. The only file that imports DeepSpeed.

DeepSpeed steps within ``accelerator.backward``. It divides by the accumulation and clips like DDP's loop, and leaves a
step out by itself, on every rank, when the gradient's norm is not finite. In one thing it differs: a parameter that no
loss reaches has a gradient of zero, not none, and so decays.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin
from torch import nn

from pipeline.batch import rows_per_rank
from pipeline.config.recipe import Recipe, dump_recipe
from pipeline.distributed.launcher import Launch
from pipeline.errors import ROOT, RecipeError, display_path
from shards.documents import read_document

_SETTINGS_VARIABLE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"
WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
DDP = "ddp"
TAG = "zero"
"""The folder, within a checkpoint, of what DeepSpeed writes."""


def create_plugin(recipe: Recipe, launch: Launch) -> DeepSpeedPlugin:
    """Return Accelerate's plugin for DeepSpeed with the ``settings``; RecipeError where it cannot run."""
    missing = [name for name in ("deepspeed", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise RecipeError(f"DeepSpeed was asked for and {missing[0]} is not installed; install the extra: deepspeed")
    if launch.local_rank is None:
        raise RecipeError("DeepSpeed was asked for without ranks; start them with torchrun or accelerate launch")
    if launch.use_cpu:
        raise RecipeError("ACCELERATE_USE_CPU turns DeepSpeed off without a word; unset it, it needs no GPU")
    plugin = DeepSpeedPlugin(hf_ds_config=settings(recipe, launch))
    _keep_gloo()
    return plugin


def settings(recipe: Recipe, launch: Launch) -> dict[str, Any]:
    """Return the launcher's file of DeepSpeed settings, completed by what stands in the recipe.

    Raises RecipeError where the two disagree, or where ZeRO cannot do what the recipe asks for.
    """
    path, given = _read(launch.deepspeed_file)
    zero = given.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise RecipeError(
            f'{path}: zero_optimization: expected a mapping such as {{"stage": 2}}, got {json.dumps(zero)}'
        )
    stage = zero.get("stage")
    if isinstance(stage, bool) or stage not in (1, 2, 3):
        raise RecipeError(f"{path}: zero_optimization.stage: expected 1, 2 or 3, got {stage!r}; DDP needs no DeepSpeed")
    _refuse(recipe, stage)
    own = _of_recipe(recipe, launch)
    for key in sorted(given.keys() & own.keys()):
        if given[key] not in ("auto", own[key]):
            raise RecipeError(f"{path}: {key}: {given[key]} here and {own[key]} by the recipe; leave it to the recipe")
    for key in ("optimizer", "scheduler"):
        if key in given:
            raise RecipeError(f"{path}: {key}: leave it to the recipe")
    # Accelerate would otherwise turn whatever optimizer is to step on the CPU into Adam.
    return {**given, **own, "zero_force_ds_cpu_optimizer": False}


def deepspeed_autocast(accelerator: Accelerator) -> AbstractContextManager[Any]:
    """Return the recipe's autocast: Accelerate's, or that of DeepSpeed's settings, which Accelerate does not read."""
    plugin = accelerator.deepspeed_plugin
    if plugin is None:
        return accelerator.autocast()
    enabled = plugin.deepspeed_config["torch_autocast"]["enabled"]
    return torch.autocast(accelerator.device.type, torch.bfloat16, enabled=enabled)


@contextmanager
def gather_parameters(module: nn.Module) -> Iterator[None]:
    """Give every rank the weights of ``module`` whole, to be read; ZeRO-3 keeps a part of each on each rank."""
    if not any(hasattr(parameter, "ds_id") for parameter in module.parameters()):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(module.parameters()):
        yield


def checkpoint_format(accelerator: Accelerator) -> str:
    """Return the format of this run's checkpoints: ``ddp``, or ``zero-1`` to ``zero-3``."""
    plugin = accelerator.deepspeed_plugin
    return DDP if plugin is None else f"zero-{plugin.zero_stage}"


def save_engine(accelerator: Accelerator, folder: Path) -> None:
    """Write weights and optimizer, each rank its part; every rank calls it."""
    _engine(accelerator).save_checkpoint(str(folder), tag=TAG, save_latest=False)


def load_engine(accelerator: Accelerator, folder: Path) -> None:
    """Restore what ``save`` wrote on as many ranks; every rank calls it. Nothing in the files is executed.

    Raises FileNotFoundError where files are gone, and torch's error for one that names more than DeepSpeed's data.
    """
    with _data_alone():
        found, _ = _engine(accelerator).load_checkpoint(str(folder), tag=TAG)
    if found is None:
        raise FileNotFoundError(f"DeepSpeed finds not all of its files in {folder / TAG}")


@contextmanager
def _data_alone() -> Iterator[None]:
    """Have every ``torch.load`` inside take tensors, plain values and the classes that DeepSpeed stores, no others.

    DeepSpeed asks for ``weights_only=False``, which would run whatever a file names; torch's own switch overrules it.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    before = os.environ.get(WEIGHTS_ONLY)
    os.environ[WEIGHTS_ONLY] = "1"
    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        os.environ.pop(WEIGHTS_ONLY)
        if before is not None:
            os.environ[WEIGHTS_ONLY] = before


def _engine(accelerator: Accelerator) -> Any:
    return accelerator.deepspeed_engine_wrapped.engine  # type: ignore[union-attr]


def _read(name: str | None) -> tuple[str, dict[str, Any]]:
    """Return the name of the launcher's file and what it says."""
    if not name:
        raise RecipeError(
            f"{_SETTINGS_VARIABLE}: DeepSpeed was asked for without settings; give launchers/deepspeed/zero2.json"
        )
    path = next((found for found in (Path(name), ROOT / name) if found.is_file()), None)
    if path is None:
        raise RecipeError(
            f"{_SETTINGS_VARIABLE}: there is no file {name}; give launchers/deepspeed/zero2.json, or your own"
        )
    advice = "it is a mapping of DeepSpeed's settings, as in launchers/deepspeed/zero2.json"
    return display_path(path), read_document(path, dict[str, Any], advice)


def _refuse(recipe: Recipe, stage: int) -> None:
    """Raise RecipeError for what is not done under ZeRO."""
    if recipe.precision == "fp16":
        raise RecipeError("precision: fp16 is not done under DeepSpeed; give precision=bf16 or precision=fp32")
    if recipe.compress:
        raise RecipeError("compress: DeepSpeed sends the gradients, and in float32; leave the key out, or take DDP")
    compiled = _compiled(dump_recipe(recipe.model_copy(update={"teacher": None})))  # a frozen teacher is whole
    if stage == 3 and compiled:
        raise RecipeError(f"{compiled}: under ZeRO-3 no weight is whole when torch compiles; leave the key out")
    average = "ema" if recipe.ema else "teacher.average" if recipe.teacher and recipe.teacher.average else None
    if stage == 3 and average:
        raise RecipeError(f"{average}: under ZeRO-3 no rank has the weights to average; take zero2.json, or DDP")


def _compiled(tree: dict[str, Any], above: str = "") -> str | None:
    """Return the first key at which torch is told to compile."""
    for key, value in tree.items():
        name = f"{above}{key}"
        if key == "compile" and value:
            return name
        if isinstance(value, dict) and (found := _compiled(value, f"{name}.")):
            return found
    return None


def _of_recipe(recipe: Recipe, launch: Launch) -> dict[str, Any]:
    """Return DeepSpeed's settings of batch, accumulation, clipping and precision."""
    return {
        "train_batch_size": recipe.batch,
        "train_micro_batch_size_per_gpu": rows_per_rank(recipe.batch, launch.world_size, recipe.accumulation),
        "gradient_accumulation_steps": recipe.accumulation,
        "gradient_clipping": recipe.clip or 0.0,
        # Not bf16.enabled, which casts the weights: BatchNorm takes no bf16 weights beside float32 statistics. Where no
        # module is named as safe, gradients travel in float32, as under DDP.
        "torch_autocast": {
            "enabled": recipe.precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
    }


def _keep_gloo() -> None:
    """Spare ranks on a CPU the compiler: as it starts, DeepSpeed would build an all-reduce of its own for them."""
    if not torch.cuda.is_available():
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
