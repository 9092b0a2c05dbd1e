"""The model card of a student: a README in Markdown with the front matter that hubs read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from pipeline.config.recipe import LoadedRecipe, Recipe
from pipeline.image_size import height_width, size_text
from pipeline.models.from_timm import PREFIX
from pipeline.runs.card import Card
from pipeline.runs.evaluation_file import EvaluationFile
from pipeline.runs.files import Result, read_identity, read_result
from pipeline.tasks._registry import find_task

TITLES = {"nll": "negative log-likelihood", "ece": "expected calibration error"}
NATS = ("nll",)
"""Metrics that are no percentages."""


def model_card(loaded: LoadedRecipe, weights: Path, card: Card, evaluation: EvaluationFile | None) -> str:
    """Return the model card of the student in the file ``weights``, whose ``card`` has its metrics.

    ``evaluation`` is what ``evaluate.py`` wrote for these weights, if it did: it has more figures.
    """
    recipe, result, identity = loaded.recipe, read_result(weights.parent), read_identity(weights.parent)
    losses = list(identity.losses) if identity else []
    images = f"{result.images:,} images" if result and result.images else "images"
    lines = [
        "---",
        yaml.safe_dump(_front_matter(recipe, losses), sort_keys=False).rstrip(),
        "---",
        f"# {recipe.student.model}, distilled",
        "",
        f"{recipe.student.model}, trained with the losses {', '.join(losses)} for {recipe.epochs} epochs on {images} "
        f"of {len(card.classes)} classes. {_describe_teacher(loaded)}",
        "",
        "## Measured",
        "",
        *_table(("metric", "value"), _figures(card, result, evaluation)),
        "",
        "## Images it expects",
        "",
        *_table(("property", "value"), _preprocessing(card)),
        "",
        *_output(card),
        f"Weights: `{weights.name}`. Digest of the run: `{card.identity}`.",
        *_use(recipe),
    ]
    return "\n".join(lines) + "\n"


def _front_matter(recipe: Recipe, losses: list[str]) -> dict[str, Any]:
    purpose = "image-segmentation" if find_task(recipe.task).of_pixels else "image-classification"
    library = {"library_name": "timm"} if recipe.student.model.startswith(PREFIX) else {}
    return {**library, "pipeline_tag": purpose, "tags": [purpose, "knowledge-distillation", *losses]}


def _describe_teacher(loaded: LoadedRecipe) -> str:
    teacher = loaded.recipe.teacher
    if teacher is None:
        return "It had no teacher."
    names = [each.recipe.student.model for each in loaded.teachers]
    names += [network.model for network in teacher.members or (teacher,) if network.model]
    itself = "itself at the end of its last cycle" if teacher.snapshots else "a moving average of itself"
    return f"Its teacher was {' and '.join(names) or itself}."


def _figures(card: Card, result: Result | None, evaluation: EvaluationFile | None) -> Iterator[tuple[str, str]]:
    titles = {**find_task(card.task).titles, **TITLES}
    measured: Mapping[str, float | None] = evaluation.metrics if evaluation else card.accuracy or {}
    for name, value in measured.items():
        if name in titles and value is not None:
            yield titles[name], f"{value:.4f} nats" if name in NATS else f"{value:.2f} %"
    if result:
        yield "parameters", f"{result.parameters:,}"
    if evaluation is None:
        return
    if evaluation.agreement is not None:
        yield "agreement with the teacher", f"{evaluation.agreement:.2f} %"
    yield "multiply-accumulates", f"{evaluation.network.macs:,}"
    for speed in evaluation.speed or ():
        yield f"latency of a batch of {speed.batch}, {evaluation.device}", f"{speed.latency_ms:.2f} ms"


def _preprocessing(card: Card) -> Iterator[tuple[str, str]]:
    if find_task(card.task).of_pixels:
        yield "size", f"{size_text(height_width(card.size))} pixels, whole images, padded below and on the right"
    else:
        short = f"the centre of an image whose short side is resized to {card.resize or card.size}"
        yield "size", f"{size_text(height_width(card.size))} pixels, {short}"
    yield "mean", ", ".join(f"{value:g}" for value in card.mean)
    yield "standard deviation", ", ".join(f"{value:g}" for value in card.std)


def _output(card: Card) -> list[str]:
    """Return what a segmenter's logits are; of an image they need no words."""
    if not find_task(card.task).of_pixels:
        return []
    names = ", ".join(f"{number} {name}" for number, name in enumerate(card.classes))
    text = "Logits are maps, smaller than the image; interpolate them to its size (bilinear, align_corners)."
    return [text, "", f"Classes: {names}.", ""]


def _use(recipe: Recipe) -> list[str]:
    if not recipe.student.model.startswith(PREFIX):
        return []
    return ["", "```python", "import timm", 'model = timm.create_model("local-dir:FOLDER", pretrained=True)', "```"]


def _table(head: tuple[str, str], rows: Iterable[tuple[str, str]]) -> list[str]:
    return [f"| {head[0]} | {head[1]} |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)]
