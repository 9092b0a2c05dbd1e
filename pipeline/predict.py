"""Name what is on images, find its boxes, draw masks, or enlarge images, by a student's weights file alone.

    python pipeline/predict.py runs/demo/seed-0/student.safetensors IMAGE_OR_FOLDER … [key=value …]

    top=5           number of classes per image; with several classes, at most that many
    batch=64        images at once; of masks and boxes 4
    out=FILE        write the classes, or all boxes, to FILE.json or FILE.csv as well
    out=FOLDER      of a segmenter: write a mask for each image; of a network that enlarges images: write them

A folder stands for all images in it and below. Of a student of several classes (task: multilabel), those with a
probability above one half are named. Of a segmenter the classes with most pixels are named. Its masks are PNGs with a
palette, as large as the image, whose values are the classes. Of a detector the boxes with a score of at least 0.3 are
named, in pixels of the image; the file has all of them. Enlarged images are PNGs; their originals are taken whole, one
at a time. A file that is no image is named, the others are done, and the exit code is 2.
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
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import PositiveInt
from torch import Tensor, nn

from pipeline.builders.student import student_from_card
from pipeline.cli import entry, print_answer
from pipeline.config.arguments import parse_command_args, split_command_args
from pipeline.data.config import Config
from pipeline.data.images import image_on_canvas, read_image, validation_image, whole_image
from pipeline.errors import AlreadyReported, RecipeError
from pipeline.features.taps import FeatureTaps
from pipeline.frozen_model import FrozenModel
from pipeline.image_size import height_width
from pipeline.models.stages import stages
from pipeline.runs.card import Card, read_card
from pipeline.runs.files import check_student
from pipeline.runs.ownership import check_new_file, check_writable
from pipeline.tasks._boxes import DETECTIONS, LIKELY
from pipeline.tasks._image_quality import to_pixels
from pipeline.tasks._mask_images import palette_png, rgb_png
from pipeline.tasks._masks import upsampled
from pipeline.tasks._registry import find_task
from pipeline.training.result import aligned
from shards.manifest import write_atomically

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
"""Names of the files in a folder that are taken for images."""
_FILES = (".json", ".csv")
_STRIDE = 32
"""A segmenter's map is this many times smaller than the image, or less; so padded sides are multiples of it."""


class PredictArguments(FrozenModel):
    """The options of the command."""

    top: PositiveInt = 5
    batch: PositiveInt | None = None
    out: str | None = None


class Guess(NamedTuple):
    """A class of an image."""

    label: int
    name: str
    probability: float


class FoundBox(NamedTuple):
    """A box that a detector finds, in pixels of the image."""

    label: int
    name: str
    score: float
    box: list[float]
    """Its left, top, right and bottom edge."""


def main(args: Sequence[str]) -> None:
    """Predict the classes of the images that the command line names, print them, and write them to ``out``."""
    options, words = split_command_args(args, tuple(PredictArguments.model_fields))
    arguments = parse_command_args(options, PredictArguments)
    if unknown := [word for word in words if "=" in word and not Path(word).exists()]:
        raise RecipeError(f"command line: {unknown[0]}: unknown key; known are top, batch and out")
    if not words:
        raise RecipeError("command line: name a student.safetensors, then images or folders of images")
    weights, card = Path(words[0]), read_card(Path(words[0]))
    check_student(weights)
    task = find_task(card.task)
    writes_images = task.of_pixels or task.of_images
    _check_out(arguments.out, writes_images=writes_images)
    images = [Path(word) for word in words[1:]]
    paths = image_files(images)
    written = "mask" if task.of_pixels else "enlarged image"
    targets = written_files(images, Path(arguments.out), written) if writes_images and arguments.out else {}
    model = student_from_card(weights, card).to(_device())
    answer = _masks if task.of_pixels else _boxes if task.of_boxes else _enlarged if task.of_images else _classes
    failed = answer(model, card, paths, arguments, targets)
    if failed:
        raise AlreadyReported


def _check_out(out: str | None, *, writes_images: bool) -> None:
    """Raise RecipeError if ``out`` is no file for classes, or no folder for images."""
    if out is None:
        return
    path = Path(out)
    if not writes_images:
        if path.suffix not in _FILES:
            raise RecipeError(f"command line: out: expected a file that ends in .json or .csv, got {out!r}")
        check_new_file(path, "out")
    elif path.suffix in _FILES or (path.exists() and not path.is_dir()):
        raise RecipeError(f"command line: out: expected a folder, which gets a PNG for each image, got {out!r}")
    else:
        check_writable(path, "out", "give out=ANOTHER")


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


def written_files(images: Sequence[Path], out: Path, written: str) -> dict[Path, Path]:
    """Return the file of what is written for each image: its path in the folder that was named, below ``out``.

    It ends in ``.png``. ``written`` is what it has, such as ``mask``.

    Raises RecipeError if two images would have the same file, or if it is one of the images.
    """
    files: dict[Path, Path] = {}
    for above in images:
        for path in image_files([above]):
            inside = path.relative_to(above) if above.is_dir() else Path(path.name)
            files[path] = (out / inside).with_suffix(".png")
    originals = {path.resolve(): path for path in files}
    owners: dict[Path, Path] = {}
    for path, file in files.items():
        if original := originals.get(file.resolve()):
            raise RecipeError(
                f"command line: out: the {written} of {path} would replace the image {original}; give another folder"
            )
        if (other := owners.setdefault(file, path)).resolve() != path.resolve():
            raise RecipeError(f"command line: out: {other} and {path} would have the same {written} {file}; rename one")
    return files


def _classes(
    model: nn.Module, card: Card, paths: Sequence[Path], arguments: PredictArguments, _: Mapping[Path, Path]
) -> bool:
    """Print the classes of the images, write them to ``out``, and return whether an image could not be read."""
    found, failed = predict(model, card, paths, arguments)
    print_answer(aligned([["image", "class", "probability"], *_rows(found)]))
    if arguments.out:
        write_atomically(Path(arguments.out), _as_text(found, Path(arguments.out).suffix).encode())
    return failed


def _masks(
    model: nn.Module, card: Card, paths: Sequence[Path], arguments: PredictArguments, targets: Mapping[Path, Path]
) -> bool:
    """Print the share of the classes of each image, write masks, and return whether an image could not be read."""
    rows = [["image", "class", "% of pixels"]]
    distinct = list(dict.fromkeys(paths))
    found = 0
    for path, mask_HW in predict_masks(model, card, distinct, arguments.batch or 4):
        found += 1
        shares_K = 100 * np.bincount(mask_HW.ravel(), minlength=len(card.classes)) / mask_HW.size
        for number, label in enumerate(np.argsort(-shares_K, kind="stable")[: arguments.top]):
            if shares_K[label] > 0:
                rows.append([_text(path) if number == 0 else "", card.classes[label], f"{shares_K[label]:.2f}"])
        if path in targets:
            targets[path].parent.mkdir(parents=True, exist_ok=True)
            write_atomically(targets[path], palette_png(mask_HW))
    print_answer(aligned(rows))
    return found < len(distinct)


@torch.no_grad()
def _enlarged(
    model: nn.Module, card: Card, paths: Sequence[Path], arguments: PredictArguments, targets: Mapping[Path, Path]
) -> bool:
    """Print the sizes of each image, write the enlarged ones, and return whether an image could not be read.

    Raises RecipeError for a network that is given the large image.
    """
    if getattr(model, "takes_targets", False):
        raise RecipeError(
            f"command line: {card.model} is given the large image, and there is none to enlarge an image by; take a "
            "student that learned from it"
        )
    rows = [["image", "pixels", "enlarged"]]
    failed = False
    for path in dict.fromkeys(paths):
        try:
            pixels_HWC = read_image(path, upright=True)
        except ValueError as error:
            failed = True
            print(f"error: {error}", file=sys.stderr)
            continue
        x_1CHW = torch.tensor(pixels_HWC).permute(2, 0, 1)[None].float().div(255).to(_device())
        large_CHW = to_pixels(model(x_1CHW.contiguous(memory_format=torch.channels_last))[0]).to(torch.uint8)
        rows.append([_text(path), *(f"{shape[1]} × {shape[0]}" for shape in (pixels_HWC.shape, large_CHW.shape[1:]))])
        if path in targets:
            targets[path].parent.mkdir(parents=True, exist_ok=True)
            write_atomically(targets[path], rgb_png(large_CHW.permute(1, 2, 0).cpu().numpy()))
    print_answer(aligned(rows))
    return failed


def _boxes(
    model: nn.Module, card: Card, paths: Sequence[Path], arguments: PredictArguments, _: Mapping[Path, Path]
) -> bool:
    """Print the likely boxes of each image, write all to ``out``, and return whether an image could not be read."""
    distinct = list(dict.fromkeys(paths))
    answers = dict(predict_boxes(model, card, distinct, arguments.batch or 4))
    found = {path: answers[path] for path in distinct if path in answers}  # images of one shape came together
    rows = [["image", "class", "score", "left", "top", "right", "bottom"]]
    for path, boxes in found.items():
        likely = [box for box in boxes if box.score >= LIKELY][: arguments.top]
        if not likely:
            rows.append([_text(path), f"no box of a score of {LIKELY}", *[""] * 5])
        for number, box in enumerate(likely):
            edges = [f"{edge:.1f}" for edge in box.box]
            rows.append([_text(path) if number == 0 else "", box.name, f"{box.score:.3f}", *edges])
    print_answer(aligned(rows))
    if arguments.out:
        write_atomically(Path(arguments.out), _boxes_as_text(found, Path(arguments.out).suffix).encode())
    return len(found) < len(distinct)


@torch.no_grad()
def predict_boxes(
    model: nn.Module, card: Card, paths: Sequence[Path], at_once: int
) -> Iterator[tuple[Path, list[FoundBox]]]:
    """Yield the boxes of each image, the best first. An image that cannot be read is printed and left out."""
    data = {"short": card.short and (card.short,), "long": card.long, "buckets": card.buckets}
    config = Config(path="", crop="keep_ratio", mean=card.mean, std=card.std, **data)  # pyright: ignore
    taps = FeatureTaps(model, stages(model), (DETECTIONS,))
    for start in range(0, len(paths), at_once):
        alike: dict[tuple[int, ...], list[tuple[Path, Tensor, Tensor]]] = {}
        for path in paths[start : start + at_once]:
            try:
                pixels_HWC = read_image(path, upright=True)
            except ValueError as error:
                print(f"error: {error}", file=sys.stderr)
                continue
            x_CHW, sides = image_on_canvas(pixels_HWC, config)
            stored_2 = torch.tensor(pixels_HWC.shape[1::-1])  # width and height
            scales_2 = torch.tensor(sides[::-1]) / stored_2
            alike.setdefault(tuple(x_CHW.shape), []).append((path, x_CHW, torch.stack([stored_2, scales_2])))
        for images in alike.values():
            x_BCHW = torch.stack([x_CHW for _, x_CHW, _ in images]).to(_device())
            found_BD6 = taps(x_BCHW.contiguous(memory_format=torch.channels_last)).features[DETECTIONS].cpu()
            for (path, _, geometry_22), found_D6 in zip(images, found_BD6, strict=True):
                yield path, list(_named_boxes(found_D6, card, *geometry_22))


def _named_boxes(found_D6: Tensor, card: Card, sides_2: Tensor, scales_2: Tensor) -> Iterator[FoundBox]:
    """Yield the boxes of an image of those sides, cut off at its edges; ``scales_2`` are those of the canvas."""
    edges_D4 = (found_D6[:, :4] / scales_2.repeat(2)).clamp(min=0).minimum(sides_2.repeat(2))
    for (*_, score, label), edges in zip(found_D6.tolist(), edges_D4.tolist(), strict=True):
        if label >= 0:
            yield FoundBox(int(label), card.classes[int(label)], score, edges)


@torch.no_grad()
def predict_masks(
    model: nn.Module, card: Card, paths: Sequence[Path], at_once: int
) -> Iterator[tuple[Path, NDArray[np.uint8]]]:
    """Yield the class of every pixel of each image, uint8 [H, W]. An image that cannot be read is printed and left out.

    Whole images are padded below and on the right to the card's size, or if larger, to a multiple of ``_STRIDE``.
    """
    config = Config(path="", size=card.size, crop="scaled", mean=card.mean, std=card.std)
    for start in range(0, len(paths), at_once):
        alike: dict[tuple[int, int], dict[Path, Tensor]] = {}
        for path in paths[start : start + at_once]:
            try:
                x_CHW = whole_image(read_image(path, upright=True), config)
            except ValueError as error:
                print(f"error: {error}", file=sys.stderr)
                continue
            alike.setdefault(_padded_size(card, x_CHW), {})[path] = x_CHW
        for size, images in alike.items():
            masks_BHW = _predict_padded(model, [*images.values()], size)
            for (path, x_CHW), mask_HW in zip(images.items(), masks_BHW, strict=True):
                yield path, mask_HW[: x_CHW.shape[1], : x_CHW.shape[2]].numpy()


def _padded_size(card: Card, x_CHW: Tensor) -> tuple[int, int]:
    height, width = (
        least if side <= least else -(-side // _STRIDE) * _STRIDE
        for side, least in zip(x_CHW.shape[1:], height_width(card.size), strict=True)
    )
    return height, width


def _predict_padded(model: nn.Module, images: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Return the classes of images that are padded to ``size``, uint8 [B, H, W], on the CPU."""
    height, width = size
    padded = [F.pad(x_CHW, (0, width - x_CHW.shape[2], 0, height - x_CHW.shape[1])) for x_CHW in images]
    x_BCHW = torch.stack(padded).to(_device()).contiguous(memory_format=torch.channels_last)
    return upsampled(model(x_BCHW).float(), x_BCHW[:, 0]).argmax(1).to(torch.uint8).cpu()


@torch.no_grad()
def predict(
    model: nn.Module, card: Card, paths: Sequence[Path], arguments: PredictArguments
) -> tuple[dict[Path, list[Guess]], bool]:
    """Return the classes of each image, and whether one could not be read, which is then printed."""
    config = Config(path="", size=card.size, resize=card.resize, mean=card.mean, std=card.std)
    found: dict[Path, list[Guess]] = {}
    failed = False
    at_once = arguments.batch or 64
    for start in range(0, len(paths), at_once):
        images: dict[Path, Tensor] = {}
        for path in paths[start : start + at_once]:
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


def _boxes_as_text(found: dict[Path, list[FoundBox]], ending: str) -> str:
    if ending == ".json":
        images = [{"image": _text(path), "boxes": [box._asdict() for box in boxes]} for path, boxes in found.items()]
        return json.dumps(images, indent=2, ensure_ascii=False) + "\n"
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "label", "name", "score", "left", "top", "right", "bottom"])
    writer.writerows([_text(path), *box[:3], *box.box] for path, boxes in found.items() for box in boxes)
    return text.getvalue()


if __name__ == "__main__":
    entry(main)
