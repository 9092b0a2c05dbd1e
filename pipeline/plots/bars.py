"""Bar charts as PNG files. Only this package imports matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


class Bar(NamedTuple):
    """A bar with the range of its whisker."""

    label: str
    middle: float
    least: float
    most: float


def draw_bars(bars: Sequence[Bar], path: Path, *, title: str, unit: str) -> None:
    """Write a PNG of horizontal bars, the first on top, each with its range as a whisker."""
    figure, axes = _figure(1.2 + 0.4 * len(bars), title, unit)
    for label, middle, least, most in bars:
        axes.barh(label, middle, xerr=[[middle - least], [most - middle]], color="tab:blue", capsize=3)
    axes.invert_yaxis()
    figure.savefig(path, dpi=150)


def draw_stack(bars: Sequence[Bar], path: Path, *, title: str, unit: str) -> None:
    """Write a PNG with one stacked bar whose parts are ``bars``, in their order."""
    figure, axes = _figure(2.6, title, unit)
    left = 0.0
    for label, middle, _, _ in bars:
        axes.barh(0, middle, left=left, label=label)
        left += middle
    axes.set_yticks([])
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=150)


def _figure(height: float, title: str, unit: str) -> tuple[Figure, Axes]:
    """Return an empty figure of that height in inches, and its axes."""
    figure = Figure(figsize=(9, height), layout="constrained")
    FigureCanvasAgg(figure)  # not pyplot, which would look for a display and keep every figure in memory
    axes = figure.subplots()
    axes.set_xlabel(unit)
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
