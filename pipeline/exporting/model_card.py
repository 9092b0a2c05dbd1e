"""The model card of a student: a README in Markdown with the front matter that hubs read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from pipeline.config.recipe import LoadedRecipe, Recipe
from pipeline.models.from_timm import PREFIX
from pipeline.runs.files import Result, read_identity, read_result
from pipeline.tasks._registry import find_task
from shards.manifest import Manifest

TITLES = {"nll": "negative log-likelihood", "ece": "expected calibration error"}
NATS = ("nll", "kl")
"""Metrics that are no percentages."""


def model_card(
    loaded: LoadedRecipe, folder: Path, manifest: Manifest, weights: str, evaluation: dict[str, Any] | None
) -> str:
    """Return the model card of the student in the file ``weights`` of the run in ``folder``.

    ``evaluation`` is the content of the file that ``evaluate.py`` wrote for these weights, if it is there: it has more
    figures than the run's result.
    """
    recipe, result, identity = loaded.recipe, read_result(folder), read_identity(folder)
    losses = list(identity.losses) if identity else []
    images = f"{result.images:,} images" if result and result.images else "images"
    lines = [
        "---",
        yaml.safe_dump(_front_matter(recipe, losses), sort_keys=False).rstrip(),
        "---",
        f"# {recipe.student.model}, distilled",
        "",
        f"{recipe.student.model}, trained with the losses {', '.join(losses)} for {recipe.epochs} epochs on {images} "
        f"of {manifest.num_classes} classes. {_describe_teacher(loaded)}",
        "",
        "## Measured",
        "",
        *_table(("metric", "value"), _figures(recipe, result, evaluation)),
        "",
        "## Images it expects",
        "",
        *_table(("property", "value"), _preprocessing(recipe)),
        "",
        f"Weights: `{weights}`." + (f" Digest of the run: `{result.identity}`." if result else ""),
        *_use(recipe),
    ]
    return "\n".join(lines) + "\n"


def _front_matter(recipe: Recipe, losses: list[str]) -> dict[str, Any]:
    tags = ["image-classification", "knowledge-distillation", *losses]
    library = {"library_name": "timm"} if recipe.student.model.startswith(PREFIX) else {}
    return {**library, "pipeline_tag": "image-classification", "tags": tags}


def _describe_teacher(loaded: LoadedRecipe) -> str:
    teacher = loaded.recipe.teacher
    if teacher is None:
        return "It had no teacher."
    names = [each.recipe.student.model for each in loaded.teachers]
    names += [network.model for network in teacher.members or (teacher,) if network.model]
    return f"Its teacher was {' and '.join(names)}." if names else "Its teacher was a moving average of itself."


def _figures(recipe: Recipe, result: Result | None, evaluation: dict[str, Any] | None) -> Iterator[tuple[str, str]]:
    titles = {**find_task(recipe.task).titles, **TITLES}
    measured: dict[str, float | None] = result.metrics if result else {}
    if evaluation is not None:
        measured = evaluation["metrics"]
    for name, value in measured.items():
        if name in titles and value is not None:
            yield titles[name], f"{value:.4f} nats" if name in NATS else f"{value:.2f} %"
    if result:
        yield "parameters", f"{result.parameters:,}"
    if evaluation is None:
        return
    if evaluation.get("agreement") is not None:
        yield "agreement with the teacher", f"{evaluation['agreement']:.2f} %"
    yield "multiply-accumulates", f"{evaluation['network']['macs']:,}"
    for speed in evaluation.get("speed") or ():
        yield f"latency of a batch of {speed['batch']}, {evaluation['device']}", f"{speed['latency_ms']:.2f} ms"


def _preprocessing(recipe: Recipe) -> Iterator[tuple[str, str]]:
    data = recipe.data.for_validation
    short = data.resize or data.size
    yield "size", f"{data.size} × {data.size} pixels, the centre of an image whose short side is resized to {short}"
    yield "mean", ", ".join(f"{value:g}" for value in data.mean)
    yield "standard deviation", ", ".join(f"{value:g}" for value in data.std)


def _use(recipe: Recipe) -> list[str]:
    if not recipe.student.model.startswith(PREFIX):
        return []
    return ["", "```python", "import timm", 'model = timm.create_model("local-dir:FOLDER", pretrained=True)', "```"]


def _table(head: tuple[str, str], rows: Iterable[tuple[str, str]]) -> list[str]:
    return [f"| {head[0]} | {head[1]} |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)]
