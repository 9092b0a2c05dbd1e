"""Where the time of a step went over a run, as SVG: stacked areas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pipeline.plots._figure import COLORS, add_legend, as_svg, new_figure

_HATCHES = ("", "///", "...", "\\\\\\", "xxx", "---", "++", "oo", "|||")


def draw_shares(
    name: str, title: str, x: Sequence[float], parts: Mapping[str, Sequence[float]], *, xlabel: str, ylabel: str
) -> str:
    """Return stacked areas of the ``parts`` over ``x``, the first at the bottom, with colours and hatches."""
    figure, (axes,) = new_figure()
    colors = [COLORS[number % len(COLORS)] for number in range(len(parts))]
    areas = axes.stackplot(x, np.array(list(parts.values()), dtype=float), labels=list(parts), colors=colors, alpha=0.8)
    for number, area in enumerate(areas):
        area.set(hatch=_HATCHES[number % len(_HATCHES)], edgecolor="white", linewidth=0.3)
    axes.set(xlabel=xlabel, ylabel=ylabel, xlim=(min(x), max(x)) if min(x) < max(x) else None)
    axes.set_ylim(bottom=0)
    add_legend(figure, axes, 4)
    return as_svg(figure, name, title)
