"""Gains and losses of single classes, as SVG."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.plots._figure import COLORS, as_svg, new_figure

_LONGEST = 22


def draw_class_gains(name: str, title: str, gains: Sequence[tuple[str, float]], *, xlabel: str) -> str:
    """Return a bar for each class, in the given order from top to bottom; gains are hatched, losses plain."""
    figure, (axes,) = new_figure((5.4, 1.0 + 0.24 * len(gains)))
    for row, (_, gain) in enumerate(gains):
        color, hatch = (COLORS[0], "") if gain >= 0 else (COLORS[1], "///")
        axes.barh(row, gain, color=color, hatch=hatch, edgecolor="white", linewidth=0)
        axes.annotate(
            f"{gain:+.1f}",
            (gain, row),
            xytext=(3 if gain >= 0 else -3, 0),
            textcoords="offset points",
            ha="left" if gain >= 0 else "right",
            va="center",
            fontsize=7.5,
        )
    labels = [text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…" for text, _ in gains]
    axes.set_yticks(range(len(gains)), labels, fontsize=8)
    axes.set_ylim(len(gains) - 0.4, -0.6)
    axes.margins(x=0.16)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel(xlabel)
    return as_svg(figure, name, title)
