"""Name what is on images, by a student's weights file alone.

    python pipeline/predict.py runs/demo/seed-0/student.safetensors IMAGE_OR_FOLDER … [key=value …]

    top=5           number of classes per image; with several classes, at most that many
    batch=64        images at once
    out=FILE        write the classes to FILE.json or FILE.csv as well

A folder stands for all images in it and below. Of a student of several classes (task: multilabel), those with a
probability above one half are named. A file that is no image is named, the others are done, and the exit code is 2.
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

import csv
import io
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from pydantic import PositiveInt, field_validator
from torch import Tensor, nn

from pipeline.builders.student import student_from_card
from pipeline.cli import entry, print_answer
from pipeline.config.arguments import parse_command_args, split_command_args
from pipeline.data.config import Config
from pipeline.data.images import read_image, validation_image
from pipeline.errors import AlreadyReported, RecipeError
from pipeline.frozen_model import FrozenModel
from pipeline.runs.card import Card, read_card
from pipeline.runs.files import check_student
from pipeline.runs.ownership import check_new_file
from pipeline.tasks._registry import find_task
from pipeline.training.result import aligned
from shards.manifest import write_atomically

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
"""Names of the files in a folder that are taken for images."""


class PredictArguments(FrozenModel):
    """The options of the command."""

    top: PositiveInt = 5
    batch: PositiveInt = 64
    out: str | None = None

    @field_validator("out")
    @classmethod
    def _is_json_or_csv(cls, out: str | None) -> str | None:
        if out is not None and Path(out).suffix not in (".json", ".csv"):
            raise ValueError("expected a file that ends in .json or .csv")
        return out


class Guess(NamedTuple):
    """A class of an image."""

    label: int
    name: str
    probability: float


def main(args: Sequence[str]) -> None:
    """Predict the classes of the images that the command line names, print them, and write them to ``out``."""
    options, words = split_command_args(args, tuple(PredictArguments.model_fields))
    arguments = parse_command_args(options, PredictArguments)
    if unknown := [word for word in words if "=" in word and not Path(word).exists()]:
        raise RecipeError(f"command line: {unknown[0]}: unknown key; known are top, batch and out")
    if not words:
        raise RecipeError("command line: name a student.safetensors, then images or folders of images")
    if arguments.out:
        check_new_file(Path(arguments.out), "out")
    weights, card = Path(words[0]), read_card(Path(words[0]))
    check_student(weights)
    if find_task(card.task).of_pixels:
        raise RecipeError(f"{weights}: task: {card.task} has no class of an image; export.py writes a network to run")
    paths = image_files([Path(word) for word in words[1:]])
    model = student_from_card(weights, card).to(_device())
    found, failed = predict(model, card, paths, arguments)
    print_answer(aligned([["image", "class", "probability"], *_rows(found)]))
    if arguments.out:
        write_atomically(Path(arguments.out), _as_text(found, Path(arguments.out).suffix).encode())
    if failed:
        raise AlreadyReported


def image_files(paths: Sequence[Path]) -> list[Path]:
    """Return the files, and those in folders by name. Raises RecipeError if one is missing, or if there are none."""
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise RecipeError(f"{path}: there is no such image or folder")
        inside = sorted(each for each in path.rglob("*") if each.suffix.lower() in IMAGE_ENDINGS and each.is_file())
        if path.is_dir() and not inside:
            raise RecipeError(f"{path}: there is no image in this folder ({' '.join(IMAGE_ENDINGS)})")
        found += inside if path.is_dir() else [path]
    if not found:
        raise RecipeError("command line: there are no images; name files or folders behind the weights")
    return found


@torch.no_grad()
def predict(
    model: nn.Module, card: Card, paths: Sequence[Path], arguments: PredictArguments
) -> tuple[dict[Path, list[Guess]], bool]:
    """Return the classes of each image, and whether one could not be read, which is then printed."""
    config = Config(path="", size=card.size, resize=card.resize, mean=card.mean, std=card.std)
    found: dict[Path, list[Guess]] = {}
    failed = False
    for start in range(0, len(paths), arguments.batch):
        images: dict[Path, Tensor] = {}
        for path in paths[start : start + arguments.batch]:
            try:
                images[path] = validation_image(read_image(path), config)
            except ValueError as error:
                failed = True
                print(f"error: {error}", file=sys.stderr)
        if images:
            # The memory format of training, with which the same kernels are chosen.
            x_BCHW = torch.stack([*images.values()]).to(_device()).contiguous(memory_format=torch.channels_last)
            guesses = guess(model(x_BCHW).float().cpu(), card, arguments.top)
            found |= dict(zip(images, guesses, strict=True))
    return found, failed


def guess(logits_BK: Tensor, card: Card, top: int) -> Iterator[list[Guess]]:
    """Yield the most probable classes of each image, at most ``top``; of several classes, those above one half."""
    several = card.task == "multilabel"
    probabilities_BK = logits_BK.sigmoid() if several else logits_BK.softmax(1)
    for values_K in probabilities_BK:
        best = values_K.topk(min(top, len(card.classes)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        yield [Guess(index, card.classes[index], value) for index, value in pairs if value > 0.5 or not several]


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _rows(found: dict[Path, list[Guess]]) -> Iterator[list[str]]:
    """Yield the rows of the table: an image's name stands in the first of its rows."""
    for path, guesses in found.items():
        if not guesses:
            yield [_text(path), "no class above 0.5", ""]
        for number, each in enumerate(guesses):
            yield [_text(path) if number == 0 else "", each.name, f"{each.probability:.3f}"]


def _text(path: Path) -> str:
    """Return a path with a question mark in a diamond for each byte that is not UTF-8, so that it can be printed."""
    return os.fsencode(path).decode(errors="replace")


def _as_text(found: dict[Path, list[Guess]], ending: str) -> str:
    if ending == ".json":
        images: list[dict[str, Any]] = [
            {"image": _text(path), "classes": [each._asdict() for each in guesses]} for path, guesses in found.items()
        ]
        return json.dumps(images, indent=2, ensure_ascii=False) + "\n"
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", *Guess._fields])
    writer.writerows([_text(path), *each] for path, guesses in found.items() for each in guesses)
    return text.getvalue()


if __name__ == "__main__":
    entry(main)
