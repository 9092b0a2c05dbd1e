"""Pictures of training: learning curves, loss parts, where the time went, speed and memory."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.plots.curves import Curve, HorizontalLine, draw_curves
from pipeline.plots.shares import draw_shares
from pipeline.reports import page
from pipeline.reports.methods import ALONE_COLOR, TEACHER_COLOR, MethodRuns, colored
from pipeline.reports.references import References
from pipeline.reports.reported_run import ReportedRun
from pipeline.training.result import percent

_POINTS = 150
"""Most points of a curve; the lines of a longer journal are averaged."""
_POSITION = ("step", "epoch", "samples", "rate", "total", "gradient_norm", "timing")
"""Keys of a training line that are no part of the loss, besides the training metric."""
Captioned = list[tuple[str, str]]


def thinned(x: Sequence[float], y: Sequence[float | None]) -> tuple[list[float], list[float | None]]:
    """Return at most ``_POINTS`` points: the means of equally many neighbours each. None stays None."""
    size = -(-len(x) // _POINTS)
    parts = [slice(start, start + size) for start in range(0, len(x), size)]
    known = [[value for value in y[part] if value is not None] for part in parts]
    means = [statistics.fmean(values) if values else None for values in known]
    return [statistics.fmean(x[part]) for part in parts], means


def draw_learning(methods: Sequence[MethodRuns], references: References) -> str:
    """Return the section of the learning curves: validation and training metric by epoch."""
    task = methods[0].first_run.task
    levels = []
    if references.teacher_metric is not None and not all(method.first_run.teaches_itself for method in methods):
        levels = [HorizontalLine("teacher", references.teacher_metric, TEACHER_COLOR, 1)]
    given = {run.folder.absolute() for method in methods for run in method.runs}
    others = [run for run in references.alone if run.folder.absolute() not in given]
    alone = [_validation(run, "student alone", ALONE_COLOR, 0, thin=len(others) > 1) for run in others]
    numbered = colored(methods, references)
    validation = [curve for number, method in numbered for curve in _curves(number, method, task.metric)]
    ends = ", ".join(f"{method.name} {percent(method.last)}" for method in methods)
    drawn: Captioned = []
    if any(curve.y for curve in validation):
        title = f"{task.title} on the validation images by epoch; last: {ends}"
        svg = draw_curves(
            "validation", title, [*alone, *validation], xlabel="epoch", ylabel=task.title_and_unit, levels=levels
        )
        drawn.append((f"{task.title} on the validation images", svg))
    training = [
        curve for number, method in numbered for curve in _curves(number, method, task.training_metric, training=True)
    ]
    measure = task.titles.get(task.training_metric, task.training_metric)
    title = f"{measure} on the training batches by epoch"
    svg = draw_curves(
        "training", title, training, xlabel="epoch", ylabel=f"{measure}, {task.unit_of(task.training_metric)}"
    )
    drawn.append((f"{measure} on the training batches, in training mode", svg))
    missing = "" if len(drawn) == 2 else page.note("The run has no evaluation yet, or no validation images.")
    return page.section("Learning curves", page.pictures(drawn), missing)


def _curves(number: int, method: MethodRuns, metric: str, *, training: bool = False) -> list[Curve]:
    found: list[Curve] = []
    for run in method.runs:
        thin = len(method.runs) > 1
        if training:
            lines = run.training
            x, y = thinned([line["epoch"] for line in lines], [line.get(metric) for line in lines])
            found.append(Curve(method.name, x, y, number, _style(number), thin))
        else:
            found.append(_validation(run, method.name, number, _style(number), thin=thin))
    return found


def _style(color: int) -> int:
    return max(color, 0)  # the grey is solid, and as a thin line still seen


def _validation(run: ReportedRun, label: str, color: int, style: int, *, thin: bool) -> Curve:
    lines = run.evaluations
    return Curve(
        label, [line["epoch"] for line in lines], [line.get(run.task.metric) for line in lines], color, style, thin
    )


def draw_losses(methods: Sequence[MethodRuns]) -> str:
    """Return the section of the losses: the parts of each method's first run by epoch."""
    drawn: Captioned = []
    measured = False
    for number, method in enumerate(methods):
        lines = method.first_run.training
        epochs = [line["epoch"] for line in lines]
        names = [name for name in lines[-1] if name not in (*_POSITION, method.first_run.task.training_metric)]
        selected = ["total", *names] if len(names) > 1 else names
        curves = [
            Curve(name, *thinned(epochs, [line.get(name) for line in lines]), color, color)
            for color, name in enumerate(selected)
        ]
        validation = [
            (line["epoch"], line["validation"].get("loss"))
            for line in method.first_run.evaluations
            if isinstance(line.get("validation"), dict) and line["validation"].get("loss") is not None
        ]
        if validation:
            x, y = zip(*validation, strict=True)
            curves.append(Curve("validation loss", x, y, ALONE_COLOR, 1))
            measured = True
        title = f"Loss parts of {method.name} by epoch, on a logarithmic axis: {', '.join(selected)}"
        svg = draw_curves(f"losses-{number}", title, curves, xlabel="epoch", ylabel="loss, weighted", log=True)
        drawn.append((f"{method.name}, seed {method.first_run.recipe.seed}", svg))
    text = "Parts of the training loss as they are summed, with their weights."
    text += " The validation loss is the task's own." if measured else ""
    return page.section("Loss parts", page.pictures(drawn), page.note(text))


def draw_time(methods: Sequence[MethodRuns], references: References) -> str:
    """Return the section of the time: a step's parts, images per second, wait for data, memory."""
    drawn: Captioned = []
    beside = False
    for number, method in enumerate(methods):
        run = method.first_run
        epochs = [line["epoch"] for line in run.training]
        timings = [line["timing"] for line in run.training]
        split = [timing.get("milliseconds") or {} for timing in timings]
        x, parts = epochs, {}
        for name in dict.fromkeys(name for each in split for name in each):
            x, values = thinned(epochs, [each.get(name, 0.0) for each in split])
            parts[name] = [value or 0.0 for value in values]
        if parts:
            title = f"Milliseconds of a step of {method.name} by epoch: {', '.join(parts)}"
            svg = draw_shares(f"time-{number}", title, x, parts, xlabel="epoch", ylabel="milliseconds a step")
            drawn.append((f"Where a step's time goes: {method.name}", svg))
            beside |= any(parts.get("others", ()))
    for key, what, unit, factor in _RATES:
        if curves := _rates(colored(methods, references), key, factor):
            name = key.replace("_", "-").replace("/", "-")
            svg = draw_curves(name, f"{what} by epoch", curves, xlabel="epoch", ylabel=unit, from_zero=True)
            drawn.append((what, svg))
    text = page.note("Others: the runs that were trained side by side in the same process.") if beside else ""
    return page.section("Time and memory", page.pictures(drawn), text)


_RATES = (
    ("images_per_second", "Images per second", "images/s", 1),
    ("data_wait", "Share of the time that waits for data", "% of the time", 100),
    ("mfu", "Model FLOPs utilization", "% of the GPU's peak", 100),
    ("memory_gib/allocated", "GPU memory of the first rank", "GiB", 1),
)


def _rates(methods: Sequence[tuple[int, MethodRuns]], key: str, factor: float) -> list[Curve]:
    """Return a rate of each method's first run over the epochs; none if no journal has it."""
    found = []
    for number, method in methods:
        known = [(line["epoch"], _look_up(line["timing"], key)) for line in method.first_run.training]
        known = [(epoch, factor * value) for epoch, value in known if isinstance(value, int | float)]
        if known:
            epochs, values = zip(*known, strict=True)
            found.append(Curve(method.name, *thinned(epochs, values), number, _style(number)))
    return found


def _look_up(timing: Mapping[str, Any], key: str) -> Any:
    """Return the value at a key of ``timing``, such as ``memory_gib/allocated``; None if it is not there."""
    found: Any = timing
    for part in key.split("/"):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found
