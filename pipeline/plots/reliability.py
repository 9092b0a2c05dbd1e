"""A reliability diagram as SVG: how often a network is right, by how sure it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from pipeline.plots._figure import GREY, MARKERS, STYLES, add_legend, as_svg, color_of, new_figure


class Bins(NamedTuple):
    """The images of a network, in bins of its confidence. An empty bin has no point."""

    label: str
    samples: Sequence[float]
    confidence: Sequence[float | None]
    """Mean confidence of each bin, from 0 to 1."""
    accuracy: Sequence[float | None]
    """Share of each bin's images whose class is right, from 0 to 1."""
    color: int = 0
    """Number of its colour; −1 is the grey of a baseline."""


def draw_reliability(name: str, title: str, networks: Sequence[Bins]) -> str:
    """Return accuracy over confidence above, and the share of images in each bin below."""
    figure, (axes, below) = new_figure((5.4, 4.4), 2, heights=(3, 1))
    axes.plot([0, 1], [0, 1], color=GREY, linestyle=":", linewidth=1, label="as sure as right")
    for number, bins in enumerate(networks):
        look: dict[str, Any] = {"color": color_of(bins.color), "linestyle": STYLES[number % len(STYLES)]}
        whole = sum(bins.samples) or 1
        rows = zip(bins.confidence, bins.accuracy, bins.samples, strict=True)
        points = [(c, a, 100 * n / whole) for c, a, n in rows if n and c is not None and a is not None]
        if not points:
            continue
        confidence, accuracy, share = zip(*points, strict=True)
        axes.plot(
            confidence,
            accuracy,
            marker=MARKERS[number % len(MARKERS)],
            markersize=4,
            label=bins.label,
            clip_on=False,
            **look,
        )
        below.plot(confidence, share, marker=MARKERS[number % len(MARKERS)], markersize=4, **look)
    axes.set(xlim=(0, 1), ylim=(0, 1), ylabel="share that is right")
    below.set(xlim=(0, 1), ylim=(0, None), xlabel="confidence", ylabel="images, %")
    add_legend(figure, axes)
    return as_svg(figure, name, title)
