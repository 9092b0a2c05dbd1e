"""Curves over epochs or steps, as SVG: metrics, loss parts, noise levels, rates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pipeline.plots._figure import STYLES, add_legend, as_svg, color_of, new_figure, set_log_axis


class Curve(NamedTuple):
    """A line of a picture."""

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    color: int = 0
    """Number of its colour; −1 is the grey of a baseline."""
    style: int = 0
    """Number of its line style."""
    thin: bool = False
    """Whether it is one of several like it, such as a seed."""


class HorizontalLine(NamedTuple):
    """A horizontal line, such as the teacher's accuracy."""

    label: str
    y: float
    color: int
    style: int


def draw_curves(
    name: str,
    title: str,
    curves: Sequence[Curve],
    *,
    xlabel: str,
    ylabel: str,
    levels: Sequence[HorizontalLine] = (),
    log: bool = False,
    from_zero: bool = False,
) -> str:
    """Return curves in one panel, with horizontal lines; the y axis is logarithmic, or begins at zero, on request."""
    figure, (axes,) = new_figure()
    for curve in curves:
        y = np.array([np.nan if value is None else value for value in curve.y], dtype=float)
        if log:
            y[y <= 0] = np.nan  # a part whose ramp begins at zero
        axes.plot(curve.x, y, label=curve.label, **_look(curve))
    for level in levels:
        look = {"color": color_of(level.color), "linestyle": STYLES[level.style % len(STYLES)]}
        axes.axhline(level.y, label=f"{level.label} {level.y:.2f}", linewidth=1.3, **look)
    if log:
        set_log_axis(axes, [value for curve in curves for value in curve.y if value is not None and value > 0])
    if from_zero:
        axes.set_ylim(bottom=0)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    add_legend(figure, axes)
    return as_svg(figure, name, title)


def _look(curve: Curve) -> dict[str, Any]:
    alone = sum(value is not None for value in curve.y) < 2
    return {
        "color": color_of(curve.color),
        "linestyle": STYLES[curve.style % len(STYLES)],
        "linewidth": 1.0 if curve.thin else 1.6,
        "alpha": 0.75 if curve.thin else 1.0,
        "marker": "o" if alone else None,  # one point has no line
        "markersize": 4,
    }
