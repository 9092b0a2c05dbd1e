"""Students as folders that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import RecipeError
from pipeline.exporting.trained import CARD_FILE, TrainedStudent
from pipeline.models.from_timm import PREFIX

MODEL_CARD = "README.md"


def write_timm_folder(student: TrainedStudent, folder: Path) -> None:
    """Write weights, configuration and model card. Raises RecipeError if the network is none of timm's."""
    name = student.recipe.student.model
    if not name.startswith(PREFIX):
        raise RecipeError(f"{name} is none of timm's networks (timm/NAME); give format=hub, onnx, pt2 or torchscript")
    if student.folded:
        raise RecipeError("timm builds the network with its BatchNorms; leave out fold=yes")
    from timm.models import save_for_hf

    # timm mirrors what a recipe says in ``arguments`` only if the factory recorded it; the recipe is certain.
    config: dict[str, Any] = {"label_names": list(student.card.classes)}
    save_for_hf(
        student.model,
        str(folder),
        model_config=config,
        model_args=dict(student.card.arguments or {}),
        safe_serialization=True,
        data_config=_preprocessing(student),
    )
    (folder / MODEL_CARD).write_text(student.description)
    (folder / CARD_FILE).write_text(student.card_text + "\n")


def run_timm_folder(folder: Path) -> Callable[[Tensor], Tensor]:
    """Return the network that timm makes of a folder, from images [B, C, H, W] to logits [B, K]."""
    import timm

    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()

    def run(images_BCHW: Tensor) -> Tensor:
        with torch.no_grad():
            return model(images_BCHW)

    return run


def _preprocessing(student: TrainedStudent) -> dict[str, Any]:
    """Return timm's words for the images of validation."""
    data = student.recipe.data.for_validation
    return {
        "input_size": (3, data.size, data.size),
        "interpolation": "bilinear",
        "mean": data.mean,
        "std": data.std,
        "crop_pct": data.size / (data.resize or data.size),
        "crop_mode": "center",
    }
