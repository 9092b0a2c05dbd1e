"""Students as folders for a hub: weights, card and model card; and the upload, which happens only when asked for."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from pipeline.builders.student import student_from_card
from pipeline.errors import RecipeError, one_line
from pipeline.exporting.timm_folder import MODEL_CARD, write_timm_folder
from pipeline.exporting.trained import CARD_FILE, TrainedStudent, inference
from pipeline.models.from_timm import PREFIX
from pipeline.runs.card import read_card
from pipeline.training.checkpoint import export_student

WEIGHTS = "model.safetensors"


def write_hub_folder(student: TrainedStudent, folder: Path) -> None:
    """Write the files of a hub's repository; for a network of timm they are those that timm reads, and the card."""
    if student.folded:
        raise RecipeError("format=hub holds the plain weights; leave out fold=yes")
    if student.card.model.startswith(PREFIX):
        write_timm_folder(student, folder)
        return
    export_student(student.model, folder / WEIGHTS, student.card)
    (folder / MODEL_CARD).write_text(student.description)
    (folder / CARD_FILE).write_text(student.card_text + "\n")


def run_hub_folder(folder: Path) -> Callable[[Tensor], Tensor]:
    """Return the network of a folder, from images [B, C, H, W] to logits [B, K]."""
    return inference(student_from_card(folder / WEIGHTS, read_card(folder / WEIGHTS)))


def push_to_hub(folder: Path, repository: str, *, private: bool) -> str:
    """Upload the folder to a repository ``owner/name`` of the Hugging Face hub, and return its address.

    The hub is that of the environment variable HF_ENDPOINT, with the token that ``hf auth login`` stored or HF_TOKEN.
    Raises RecipeError if the hub cannot be reached or refuses it.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))  # the library reads it at its import only
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload a distilled student")
    except Exception as error:  # the client raises errors of its own, of the network and of its HTTP library
        raise RecipeError(f"push: {repository}: {one_line(error, 300)}; the files are in {folder}") from error
    return str(address)
