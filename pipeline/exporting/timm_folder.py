"""Students as folders that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.errors import RecipeError
from pipeline.exporting.trained import CARD_FILE, TrainedStudent, inference
from pipeline.image_size import height_width
from pipeline.models.from_timm import PREFIX

MODEL_CARD = "README.md"


def write_timm_folder(student: TrainedStudent, folder: Path) -> None:
    """Write weights, configuration and model card. Raises RecipeError if the network is none of timm's."""
    name = student.card.model
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
        model_args=student.card.arguments,
        safe_serialization=True,
        data_config=_preprocessing(student),
    )
    (folder / MODEL_CARD).write_text(student.description)
    (folder / CARD_FILE).write_text(student.card_text + "\n")


def run_timm_folder(folder: Path) -> Callable[[Tensor], Tensor]:
    """Return the network that timm makes of a folder, from images [B, C, H, W] to logits [B, K]."""
    import timm

    return inference(timm.create_model(f"local-dir:{folder}", pretrained=True).eval())


def _preprocessing(student: TrainedStudent) -> dict[str, Any]:
    """Return timm's words for the images of validation."""
    card = student.card
    side = height_width(card.size)[0]
    return {
        "input_size": (3, *height_width(card.size)),
        "interpolation": "bilinear",
        "mean": card.mean,
        "std": card.std,
        "crop_pct": side / (card.resize or side),
        "crop_mode": "center",
    }
