"""Write a run's student in the format of another program, and check the written file on validation images.

    python pipeline/export.py RUN format=onnx [fold=yes] [weights=best]     for onnxruntime, TensorRT, OpenVINO
    python pipeline/export.py RUN format=pt2                                a program of torch.export
    python pipeline/export.py RUN format=torchscript                        for libtorch
    python pipeline/export.py RUN format=timm                               a folder that timm.create_model reads
    python pipeline/export.py RUN format=hub [push=OWNER/NAME]              a repository of the Hugging Face hub

RUN is the folder of a finished run. A file takes any number of normalised images [B, 3, size, size] and returns their
logits [B, classes]. A segmenter returns maps [B, classes, height, width], smaller than the image. A network of
super-resolution takes images of any height and width, and returns larger ones. ``fold=yes``
folds BatchNorms into convolutions. ``out=PATH`` names the file or folder, which is below RUN by default. ``images=64``
is the number of validation images that are compared. ``push`` uploads the folder, ``private=yes`` to a private
repository.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from pipeline import nvjpeg
    from pipeline.cli import answer_help
    from pipeline.distributed import signals

    answer_help(__doc__)
    signals.exit_quietly_on_interrupt()
    nvjpeg.load_first()  # before the imports below: torchvision brings an older one

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from tempfile import TemporaryDirectory

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.builders.loader import build_loader
from pipeline.builders.student import student_from_card
from pipeline.cli import entry
from pipeline.config.arguments import parse_command_args, parse_recipe_args, split_command_args
from pipeline.config.recipe import LoadedRecipe
from pipeline.distributed.launcher import read_launch
from pipeline.errors import RecipeError
from pipeline.exporting.checked_images import first_images, first_parts, smaller_parts
from pipeline.exporting.comparison import compare_outputs
from pipeline.exporting.formats import FORMATS, Format
from pipeline.exporting.hub import push_to_hub
from pipeline.exporting.model_card import model_card
from pipeline.exporting.trained import AT_ONCE, TrainedStudent
from pipeline.frozen_model import FrozenModel
from pipeline.models.folding import fold_batchnorms
from pipeline.runs.card import read_card
from pipeline.runs.dependencies import prepare_shards
from pipeline.runs.evaluation_file import EVALUATIONS, read_evaluation
from pipeline.runs.folder import load_run, student_file
from pipeline.runs.ownership import check_writable
from pipeline.tasks._registry import find_task
from shards.manifest import Manifest, read_manifest

EXPORT_FOLDER = "export"
"""Folder of a run that has its exported students."""


class ExportArguments(FrozenModel):
    """The options of the command."""

    format: str
    weights: str = "last"
    fold: bool = False
    out: str | None = None
    images: int = Field(default=64, ge=1, le=10_000)
    push: str | None = None
    private: bool = False


def main(args: Sequence[str]) -> None:
    """Export the student that the command line names."""
    options, args = split_command_args(args, tuple(ExportArguments.model_fields))
    if "format" not in options:
        raise RecipeError(f"command line: give format={'|'.join(FORMATS)}")
    arguments, launch = parse_command_args(options, ExportArguments), read_launch()
    chosen = _format(arguments)
    folder, overrides = parse_recipe_args(args)
    if not folder.is_dir():
        raise RecipeError(f"command line: {folder}: expected the folder of a run, such as runs/demo/seed-0")
    loaded = load_run(folder, overrides, losses=False)
    file = student_file(arguments.weights, folder)
    if find_task(loaded.recipe.task).of_boxes:
        raise RecipeError(f"command line: {folder}: no format holds a detector's boxes; use {file} with predict.py")
    if find_task(loaded.recipe.task).of_images and not chosen.ending:
        raise RecipeError(
            f"command line: format={arguments.format} has no model card for larger images; give format=onnx, pt2 or "
            "torchscript"
        )
    path = (
        Path(arguments.out)
        if arguments.out
        else folder / EXPORT_FOLDER / f"{file.stem}-{arguments.format}{chosen.ending}"
    )
    check_writable(path.parent, "out", "give out=ANOTHER")
    prepare_shards(loaded, launch, trusted=False)
    manifest = read_manifest(Path(loaded.recipe.data.path))
    student = _open_student(loaded, manifest, file, arguments)
    with _replaced(path, is_folder=not chosen.ending) as partial:
        chosen.write(student, partial)
        compared = compare_outputs(student, chosen.run(partial))
    print(f"{path}: {compared}")
    if arguments.push:
        print(f"uploaded to {push_to_hub(path, arguments.push, private=arguments.private)}")


def _format(arguments: ExportArguments) -> Format:
    """Return the format that the options name. Raises RecipeError if there is none, or a library is missing."""
    name = arguments.format
    if name not in FORMATS:
        raise RecipeError(f"command line: format: there is no {name!r}; known are {', '.join(FORMATS)}")
    chosen = FORMATS[name]
    if arguments.push and chosen.ending:
        raise RecipeError("command line: push: only folders are uploaded; give format=hub or format=timm")
    for library in chosen.libraries:
        if find_spec(library) is None:
            raise RecipeError(f"command line: format={name} needs {library}; pip install '.[{chosen.extra}]'")
    return chosen


def _open_student(loaded: LoadedRecipe, manifest: Manifest, file: Path, arguments: ExportArguments) -> TrainedStudent:
    """Return the student with the weights of ``file``, and the images with which the exported file is checked."""
    recipe, device, card = loaded.recipe, torch.device("cpu"), read_card(file)
    loader = build_loader(recipe, manifest, device, ("val",))
    if not loader.has_validation:
        raise RecipeError(f"data.path: {recipe.data.path} has no validation images to check the exported file with")
    if loader.num_classes != len(card.classes):
        classes = f"{loader.num_classes} classes, and {file} has {len(card.classes)}"
        raise RecipeError(f"data.path: {recipe.data.path} has {classes}; give the shards that it was trained on")
    model = student_from_card(file, card)
    of_images = find_task(recipe.task).of_images
    images_BCHW = (first_parts if of_images else first_images)(loader, arguments.images)
    logits_BK = _answers(model, images_BCHW)
    others_BCHW = smaller_parts(images_BCHW)
    other_size = (others_BCHW, _answers(model, others_BCHW)) if of_images else None
    if arguments.fold:
        print(f"{fold_batchnorms(model, images_BCHW[:1])} BatchNorms are folded")
    evaluation = file.parent / EVALUATIONS.get(file.name, "")
    known = read_evaluation(evaluation) if evaluation.is_file() else None
    description = model_card(loaded, file, card, known)
    return TrainedStudent(model, images_BCHW, logits_BK, card, arguments.fold, description, other_size)


@torch.no_grad()
def _answers(model: nn.Module, images_BCHW: Tensor) -> Tensor:
    return torch.cat([model(piece_BCHW) for piece_BCHW in images_BCHW.split(AT_ONCE)])


@contextmanager
def _replaced(path: Path, *, is_folder: bool) -> Iterator[Path]:
    """Yield a path to write to. What is there takes the place of ``path`` if all went well, and is removed if not.

    Other files of a folder stay.
    """
    if path.exists() and path.is_dir() != is_folder:
        raise RecipeError(f"command line: out: {path} is a {'file' if is_folder else 'folder'}; give another path")
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".export-", dir=path.parent) as temporary:
        partial = Path(temporary) / path.name
        if is_folder:
            partial.mkdir()
        yield partial
        if not is_folder:
            partial.replace(path)
            return
        path.mkdir(exist_ok=True)
        for file in partial.iterdir():
            file.replace(path / file.name)


if __name__ == "__main__":
    entry(main)
