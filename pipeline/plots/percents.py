"""Percentages of several networks beside one another, such as the IoU of each class, as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pipeline.plots._figure import add_legend, as_svg, color_of, new_figure, short_label

Percents = Mapping[str, tuple[int, Sequence[float | None]]]
"""The colour of a network, and its percentages, by its name."""
_HATCHES = ("", "///", "...", "xxx")


def draw_percents(
    name: str,
    title: str,
    labels: Sequence[str],
    networks: Percents,
    xlabel: str,
) -> str:
    """Return bars below one another: at each label one for each network, which has a colour; none for None."""
    figure, (axes,) = new_figure((5.4, 1.1 + (0.1 + 0.17 * len(networks)) * len(labels)))
    height = 0.84 / len(networks)
    for row, (network, (color, values)) in enumerate(networks.items()):
        y = np.arange(len(labels)) + (row - (len(networks) - 1) / 2) * height
        lengths = [value or 0.0 for value in values]
        hatch = _HATCHES[row % len(_HATCHES)]
        axes.barh(y, lengths, height, color=color_of(color), hatch=hatch, edgecolor="white", linewidth=0, label=network)
        for at, value in zip(y, values, strict=True):
            text = "–" if value is None else f"{value:.1f}"
            axes.annotate(text, (value or 0, at), (3, 0), textcoords="offset points", va="center", fontsize=7)
    axes.set_yticks(range(len(labels)), [short_label(each) for each in labels], fontsize=8)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_xlim(0, 108)
    axes.set_xlabel(xlabel)
    add_legend(figure, axes)
    return as_svg(figure, name, title)
