"""Methods by seeds, as SVG: a dot for each run, and mean ± deviation of each method."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from pipeline.plots._figure import COLORS, GREY, as_svg, new_figure


def draw_dots(
    name: str, title: str, values: Mapping[str, Sequence[float]], *, xlabel: str, baseline: tuple[str, float] | None
) -> str:
    """Return a row of dots for each method, the best mean on top, with a line at the ``baseline``."""
    rows = sorted(values, key=lambda method: statistics.mean(values[method]))
    longest = max(map(len, rows))
    figure, (axes,) = new_figure((5.4, 1.3 + 0.34 * len(rows)))
    for row, method in enumerate(rows):
        found = values[method]
        mean = statistics.mean(found)
        deviation = statistics.stdev(found) if len(found) > 1 else 0.0
        axes.errorbar(mean, row, xerr=deviation or None, fmt="|", color="black", markersize=13, capsize=4, linewidth=1)
        # The dots of equal values lie on one another; a hollow dot shows it.
        axes.plot(found, [row] * len(found), "o", color=COLORS[0], markerfacecolor="none", markersize=6)
        text = f"{mean:.2f}" + (f" ± {deviation:.2f}" if len(found) > 1 else "")
        axes.annotate(text, (1.01, row), xycoords=("axes fraction", "data"), va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), rows, fontsize=9 if longest < 24 else 7)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    if baseline:
        axes.axvline(baseline[1], color=GREY, linestyle="--", linewidth=1.2)
        axes.set_title(f"dashed: {baseline[0]} {baseline[1]:.2f}", fontsize=8.5, loc="left")
    axes.set_xlabel(xlabel)
    return as_svg(figure, name, title)
