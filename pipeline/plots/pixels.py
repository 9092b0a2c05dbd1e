"""What a segmenter makes of the pixels: IoU of each class, and which classes it takes for which, as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pipeline.plots._figure import add_legend, as_svg, color_of, new_figure

_LONGEST = 18
_HATCHES = ("", "///", "...", "xxx")


def draw_ious(
    name: str, title: str, classes: Sequence[str], ious: Mapping[str, tuple[int, Sequence[float | None]]]
) -> str:
    """Return bars of the IoU of each class, one for each network, which has a colour; none for a class without IoU."""
    figure, (axes,) = new_figure((5.4, 1.1 + (0.1 + 0.17 * len(ious)) * len(classes)))
    height = 0.84 / len(ious)
    for row, (network, (color, values)) in enumerate(ious.items()):
        y = np.arange(len(classes)) + (row - (len(ious) - 1) / 2) * height
        lengths = [value or 0.0 for value in values]
        hatch = _HATCHES[row % len(_HATCHES)]
        axes.barh(y, lengths, height, color=color_of(color), hatch=hatch, edgecolor="white", linewidth=0, label=network)
        for at, value in zip(y, values, strict=True):
            text = "–" if value is None else f"{value:.1f}"
            axes.annotate(text, (value or 0, at), (3, 0), textcoords="offset points", va="center", fontsize=7)
    axes.set_yticks(range(len(classes)), [_short(each) for each in classes], fontsize=8)
    axes.set_ylim(len(classes) - 0.4, -0.6)
    axes.set_xlim(0, 108)
    axes.set_xlabel("IoU, %")
    add_legend(figure, axes)
    return as_svg(figure, name, title)


def draw_confusion(name: str, title: str, classes: Sequence[str], shares_KK: np.ndarray) -> str:
    """Return a matrix: a row for each class of the pixels, and the share in percent that is taken for each class."""
    count = len(classes)
    figure, (axes,) = new_figure((5.4, 1.6 + 3.8 * min(1.0, (count + 2) / 12)))
    axes.pcolormesh(shares_KK, cmap="Blues", vmin=0, vmax=100, edgecolors="white", linewidth=0.5)
    for (row, column), share in np.ndenumerate(shares_KK):
        if count <= 12 and np.isfinite(share):
            color = "white" if share > 55 else "black"
            axes.text(column + 0.5, row + 0.5, f"{share:.0f}", ha="center", va="center", fontsize=7.5, color=color)
    labels = [_short(each) for each in classes]
    axes.set_xticks(np.arange(count) + 0.5, labels, rotation=90 if count > 4 else 0, fontsize=8)
    axes.set_yticks(np.arange(count) + 0.5, labels, fontsize=8)
    axes.tick_params(length=0)
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set(xlabel="predicted", ylabel="class of the pixel")
    return as_svg(figure, name, title)


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
