"""Differences of DeepSpeed's ZeRO from DDP: its settings, partitioned weights and its checkpoints.

Only the launcher's environment selects it (``ACCELERATE_USE_DEEPSPEED`` and a file such as
``launchers/deepspeed/zero2.json``); a recipe contains nothing about it. Only this file imports DeepSpeed.

DeepSpeed steps inside ``accelerator.backward``. Like DDP's loop, it divides by the accumulation and clips. If the
gradient norm is not finite, it skips the step itself, on every rank. One thing differs: a parameter that no loss uses
has a gradient of zero instead of None, so weight decay still changes it.
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
from pipeline.errors import RecipeError, display_path
from pipeline.optim.kinds import FUSED
from shards.documents import read_document

_SETTINGS_VARIABLE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"
WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
DDP = "ddp"
TAG = "zero"
"""Folder of DeepSpeed's files inside a checkpoint."""


def create_plugin(recipe: Recipe, launch: Launch) -> DeepSpeedPlugin:
    """Return Accelerate's plugin for DeepSpeed with the ``settings``. Raises RecipeError if DeepSpeed cannot run."""
    missing = [name for name in ("deepspeed", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise RecipeError(f"DeepSpeed is enabled and {missing[0]} is not installed; install the extra: deepspeed")
    if launch.local_rank is None:
        raise RecipeError("DeepSpeed is enabled without ranks; start them with torchrun or accelerate launch")
    if launch.use_cpu:
        raise RecipeError("ACCELERATE_USE_CPU turns DeepSpeed off silently; unset it: DeepSpeed needs no GPU")
    plugin = DeepSpeedPlugin(hf_ds_config=settings(recipe, launch))
    _keep_gloo()
    return plugin


def settings(recipe: Recipe, launch: Launch) -> dict[str, Any]:
    """Return the DeepSpeed settings of the launcher's file, completed with those of the recipe.

    Raises RecipeError if the two disagree, or if ZeRO does not support a setting of the recipe.
    """
    path, from_file = _read(launch)
    zero = from_file.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise RecipeError(
            f'{path}: zero_optimization: expected a mapping such as {{"stage": 2}}, got {json.dumps(zero)}'
        )
    stage = zero.get("stage")
    if isinstance(stage, bool) or stage not in (1, 2, 3):
        raise RecipeError(f"{path}: zero_optimization.stage: expected 1, 2 or 3, got {stage!r}; DDP needs no DeepSpeed")
    _check_recipe(recipe, stage)
    from_recipe = _recipe_settings(recipe, launch)
    for key in sorted(from_file.keys() & from_recipe.keys()):
        if from_file[key] not in ("auto", from_recipe[key]):
            raise RecipeError(
                f"{path}: {key}: {from_file[key]} here and {from_recipe[key]} by the recipe; "
                "remove it, the recipe sets it"
            )
    for key in ("optimizer", "scheduler"):
        if key in from_file:
            raise RecipeError(f"{path}: {key}: remove it, the recipe sets it")
    # With optimizer offload to the CPU, Accelerate would otherwise replace any optimizer with Adam.
    return {**from_file, **from_recipe, "zero_force_ds_cpu_optimizer": False}


def deepspeed_autocast(accelerator: Accelerator) -> AbstractContextManager[Any]:
    """Return the recipe's autocast: Accelerate's, or the one in DeepSpeed's settings, which Accelerate ignores."""
    plugin = accelerator.deepspeed_plugin
    if plugin is None:
        return accelerator.autocast()
    enabled = plugin.deepspeed_config["torch_autocast"]["enabled"]
    return torch.autocast(accelerator.device.type, torch.bfloat16, enabled=enabled)


@contextmanager
def gather_parameters(module: nn.Module) -> Iterator[None]:
    """Gather the complete weights of ``module`` on every rank, to be read; ZeRO-3 partitions them over the ranks."""
    # ZeRO-3 sets ``ds_id`` on every parameter that it partitions.
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
    """Write this rank's part of weights and optimizer; every rank calls it."""
    _engine(accelerator).save_checkpoint(str(folder), tag=TAG, save_latest=False)


def load_engine(accelerator: Accelerator, folder: Path) -> None:
    """Restore what ``save_engine`` wrote on the same number of ranks; every rank calls it. No file is executed.

    Raises FileNotFoundError if files are missing, and torch's error if one contains more than DeepSpeed's data.
    """
    with _safe_loading():
        path, _ = _engine(accelerator).load_checkpoint(str(folder), tag=TAG)
    if path is None:
        raise FileNotFoundError(f"DeepSpeed's files in {folder / TAG} are incomplete")


@contextmanager
def _safe_loading() -> Iterator[None]:
    """Let every ``torch.load`` inside accept only tensors, plain values and the classes that DeepSpeed stores.

    DeepSpeed passes ``weights_only=False``, which would run any code that a file names. torch's environment variable
    overrides that.
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


def _read(launch: Launch) -> tuple[str, dict[str, Any]]:
    """Return the display path and the content of the launcher's settings file."""
    if not launch.deepspeed_file:
        raise RecipeError(
            f"{_SETTINGS_VARIABLE}: DeepSpeed is enabled without settings; give launchers/deepspeed/zero2.json"
        )
    path = launch.deepspeed_path
    if path is None:
        raise RecipeError(
            f"{_SETTINGS_VARIABLE}: there is no file {launch.deepspeed_file}; "
            "give launchers/deepspeed/zero2.json, or your own"
        )
    advice = "it is a mapping of DeepSpeed's settings, as in launchers/deepspeed/zero2.json"
    return display_path(path), read_document(path, dict[str, Any], advice)


def _check_recipe(recipe: Recipe, stage: int) -> None:
    """Raise RecipeError for settings that this ZeRO stage does not support."""
    if recipe.precision == "fp16":
        raise RecipeError("precision: fp16 is not supported under DeepSpeed; give precision=bf16 or precision=fp32")
    if recipe.optimizer.kind not in FUSED:
        raise RecipeError(
            f"optimizer.kind: {recipe.optimizer.kind} is not supported under DeepSpeed, which steps on parts of the "
            f"parameters; give {', '.join(FUSED)}, or use DDP"
        )
    if recipe.compress:
        raise RecipeError("compress: DeepSpeed sends the gradients itself, in float32; remove the key, or use DDP")
    if recipe.student.peers:
        raise RecipeError("student.peers: networks that train together were not tried under DeepSpeed; use DDP")
    if recipe.student.within:
        raise RecipeError("student.within: a part of a network was not tried under DeepSpeed; use DDP")
    # The frozen teacher is left out: ZeRO does not partition it.
    compiled = _compiled_key(dump_recipe(recipe.model_copy(update={"teacher": None})))
    if stage == 3 and compiled:
        raise RecipeError(
            f"{compiled}: under ZeRO-3 the weights are partitioned, so torch cannot compile; remove the key"
        )
    if stage == 3 and recipe.student.checkpoint:
        raise RecipeError("student.checkpoint: under ZeRO-3 the weights are partitioned; use zero2.json, or DDP")
    if stage == 3 and recipe.student.train:
        raise RecipeError("student.train: stages alone are not trained under ZeRO-3; use zero2.json, or DDP")
    readers = [name for name, spec in recipe.losses.items() if spec.config.reads_head_weights()]
    if stage == 3 and readers:
        raise RecipeError(
            f"losses.{readers[0]}: under ZeRO-3 no rank has all weights of the head; use zero2.json, or DDP"
        )
    teacher = recipe.teacher
    copied = "ema" if recipe.ema else f"teacher.{teacher.kind}" if teacher and teacher.follows_student else None
    if stage == 3 and copied:
        raise RecipeError(f"{copied}: under ZeRO-3 no rank has all weights to copy; use zero2.json, or DDP")


def _compiled_key(tree: dict[str, Any], above: str = "") -> str | None:
    """Return the first key that turns on torch.compile, None if there is none."""
    for key, value in tree.items():
        name = f"{above}{key}"
        if key == "compile" and value:
            return name
        if isinstance(value, dict) and (found := _compiled_key(value, f"{name}.")):
            return found
    return None


def _recipe_settings(recipe: Recipe, launch: Launch) -> dict[str, Any]:
    """Return the recipe's batch, accumulation, clipping and precision as settings of DeepSpeed."""
    return {
        "train_batch_size": recipe.batch,
        "train_micro_batch_size_per_gpu": rows_per_rank(recipe.batch, launch.world_size, recipe.accumulation),
        "gradient_accumulation_steps": recipe.accumulation,
        "gradient_clipping": recipe.clip or 0.0,
        # Not bf16.enabled, which casts the weights: BatchNorm accepts no bf16 weights with float32 statistics. With no
        # module listed as safe, gradients are sent in float32, as under DDP.
        "torch_autocast": {
            "enabled": recipe.precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
    }


def _keep_gloo() -> None:
    """Keep gloo for ranks on a CPU: DeepSpeed would otherwise compile an all-reduce of its own when it starts."""
    if not torch.cuda.is_available():
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
