"""What DeepSpeed's ZeRO does otherwise than DDP: its settings, weights that are spread over the ranks, its checkpoints.

The launcher's environment alone chooses it (``ACCELERATE_USE_DEEPSPEED`` and a file such as
``launchers/deepspeed/zero2.json``); a recipe knows nothing of it. The only file that imports DeepSpeed.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin
from torch import nn

from pipeline.composition import RecipeError
from pipeline.recipe import Recipe
from pipeline.runs import world_size_asked

FILE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"
TAG = "zero"
"""The folder, within a checkpoint, of what DeepSpeed writes."""


def asked() -> bool:
    """Whether the launcher chose DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def create_plugin(recipe: Recipe) -> DeepSpeedPlugin:
    """Return Accelerate's plugin for the launcher's file, completed from the recipe.

    Raises RecipeError where the two disagree, or where ZeRO cannot do what the recipe asks for.
    """
    _check_environment()
    path = Path(os.environ[FILE])
    config = _read(path)
    _check(recipe, config, str(path))
    _keep_gloo()
    return DeepSpeedPlugin(hf_ds_config=_completed(config, recipe, str(path)))


def form(accelerator: Accelerator) -> str:
    """Return the format of this run's checkpoints: ``ddp``, or ``zero-1`` to ``zero-3``."""
    plugin = accelerator.deepspeed_plugin
    return f"zero-{plugin.zero_stage}" if plugin else "ddp"


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Give every rank all weights of ``module``, which ZeRO-3 spreads over them. Nothing may be written or called."""
    if not any(hasattr(parameter, "ds_id") for parameter in module.parameters()):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(module.parameters()):
        yield


def save(accelerator: Accelerator, folder: Path) -> None:
    """Write weights and optimizer, each rank its part; every rank calls it."""
    _engine(accelerator).save_checkpoint(str(folder), tag=TAG, save_latest=False)


def load(accelerator: Accelerator, folder: Path) -> None:
    """Restore what ``save`` wrote; every rank calls it."""
    _engine(accelerator).load_checkpoint(str(folder), tag=TAG)


def _engine(accelerator: Accelerator) -> Any:
    return accelerator.deepspeed_engine_wrapped.engine


def _check_environment() -> None:
    missing = [name for name in ("deepspeed", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise RecipeError(f"DeepSpeed is asked for and {missing[0]} is not installed; install the extra 'deepspeed'")
    if "LOCAL_RANK" not in os.environ:
        raise RecipeError("DeepSpeed is asked for without ranks; start them with torchrun or accelerate launch")
    if os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true"):
        raise RecipeError("ACCELERATE_USE_CPU would silently turn DeepSpeed off; unset it, a CPU is used anyway")
    if not os.environ.get(FILE):
        raise RecipeError(f"{FILE}: DeepSpeed is asked for without settings; give launchers/deepspeed/zero2.json")


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RecipeError(f"{FILE}: {path} cannot be read as JSON: {error}") from None


def _check(recipe: Recipe, config: dict[str, Any], path: str) -> None:
    stage = config.get("zero_optimization", {}).get("stage")
    if stage not in (1, 2, 3):
        raise RecipeError(f"{path}: zero_optimization.stage: expected 1, 2 or 3, got {stage!r}; DDP needs no DeepSpeed")
    for key in ("optimizer", "scheduler"):
        if key in config:
            raise RecipeError(f"{path}: {key}: the recipe's is used; remove it here")
    if recipe.precision == "fp16":
        raise RecipeError("precision: fp16 is not supported under DeepSpeed; give precision=bf16 or precision=fp32")
    averages = {"ema": recipe.ema, "teacher.average": recipe.teacher and recipe.teacher.average}
    for key, average in averages.items():
        if stage == 3 and average:
            raise RecipeError(f"{key}: no rank has all weights under ZeRO-3 to average; use zero2.json or DDP")


def _completed(config: dict[str, Any], recipe: Recipe, path: str) -> dict[str, Any]:
    """Return ``config`` with what the recipe says of batch, accumulation, clipping and precision."""
    ranks = world_size_asked()
    own = {
        "train_batch_size": recipe.batch,
        "train_micro_batch_size_per_gpu": recipe.batch // (ranks * recipe.accumulation),
        "gradient_accumulation_steps": recipe.accumulation,
        "gradient_clipping": recipe.clip or 0.0,
        # Not bf16.enabled: that casts the weights, and BatchNorm takes no bf16 weights. Without safe modules gradients
        # travel in float32, as under DDP.
        "torch_autocast": {
            "enabled": recipe.precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
    }
    for key, value in own.items():
        given = config.get(key, "auto")
        if given not in ("auto", value):
            raise RecipeError(f"{path}: {key}: {given} there, {value} by the recipe; remove it there")
    # Accelerate would otherwise turn an optimizer of the CPU into Adam, whichever it was.
    return {**config, **own, "zero_force_ds_cpu_optimizer": False}


def _keep_gloo() -> None:
    """Spare CPU ranks the compiler: DeepSpeed would build an all-reduce of its own for them when it starts."""
    if not torch.cuda.is_available():
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
