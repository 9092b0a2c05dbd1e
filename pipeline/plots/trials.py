"""The trials of a search, as SVG: the metric by number, and by the values of each key."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from pipeline.plots._figure import COLORS, GREY, add_legend, as_svg, new_figure

_LONGEST = 16
"""Letters of a value under its column."""


class PlottedTrial(NamedTuple):
    """A trial in the picture."""

    number: int
    values: Mapping[str, Any]
    metric: float | None
    """None if it failed, or is not finished."""
    failed: bool


class SearchedKey(NamedTuple):
    """A key of the space, and its axis."""

    key: str
    choices: Sequence[Any] | None
    """The values of a list in their order; None for a range of numbers."""
    log: bool


def draw_trials(name: str, title: str, trials: Sequence[PlottedTrial], *, ylabel: str) -> str:
    """Return the metric of each trial over its number, with the best so far, and a cross for each that failed."""
    figure, (axes,) = new_figure()
    numbers, metrics = _finished(trials)
    axes.step(numbers, list(accumulate(metrics, max)), where="post", color=COLORS[1], label="best so far")
    axes.plot(numbers, metrics, "o", color=COLORS[0], markerfacecolor="none", markersize=6, label="trial")
    if failed := [trial.number for trial in trials if trial.failed]:
        foot = axes.get_xaxis_transform()  # at the foot of the picture, because they have no metric
        axes.plot(failed, [0.03] * len(failed), "x", color=GREY, label="failed", transform=foot)
    axes.locator_params(axis="x", integer=True)
    axes.set_xlabel("trial")
    axes.set_ylabel(ylabel)
    add_legend(figure, axes)
    return as_svg(figure, name, title)


def draw_key(name: str, title: str, searched: SearchedKey, trials: Sequence[PlottedTrial], *, ylabel: str) -> str:
    """Return the metric of the finished trials over the values of a key; the best is filled."""
    figure, (axes,) = new_figure((5.4, 2.6))
    finished = [trial for trial in trials if trial.metric is not None]
    values = [trial.values[searched.key] for trial in finished]
    if searched.choices is None:
        x = values
        if searched.log:
            _set_log_axis(axes, values)
    else:
        names = [json.dumps(value, ensure_ascii=False) for value in searched.choices]
        x = [names.index(json.dumps(value, ensure_ascii=False)) for value in values]
        short = [text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…" for text in names]
        many = len(names) * max(map(len, short)) > 60
        axes.set_xticks(range(len(names)), short, fontsize=7.5, rotation=90 if many else 0)
        axes.set_xlim(-0.5, len(names) - 0.5)
    metrics = _finished(finished)[1]
    axes.plot(x, metrics, "o", color=COLORS[0], markerfacecolor="none", markersize=6)
    best = metrics.index(max(metrics))
    axes.plot([x[best]], [metrics[best]], "o", color=COLORS[1], markersize=7)
    axes.set_xlabel(searched.key)
    axes.set_ylabel(ylabel)
    return as_svg(figure, name, title)


def _finished(trials: Sequence[PlottedTrial]) -> tuple[list[int], list[float]]:
    """Return numbers and metrics of the finished trials."""
    found = [(trial.number, trial.metric) for trial in trials if trial.metric is not None]
    return [number for number, _ in found], [metric for _, metric in found]


def _set_log_axis(axes: Axes, values: Sequence[float]) -> None:
    """Make the x axis logarithmic, with plain numbers at its ticks."""
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(plain)
    axes.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.xaxis.set_minor_formatter(plain if max(values) / min(values) < 30 else NullFormatter())
