"""What a segmenter makes of the pixels: which classes it takes for which, as SVG."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.plots._figure import as_svg, new_figure, short_label


def draw_confusion(name: str, title: str, classes: Sequence[str], shares_KK: np.ndarray) -> str:
    """Return a matrix: a row for each class of the pixels, and the share in percent that is taken for each class."""
    count = len(classes)
    figure, (axes,) = new_figure((5.4, 1.6 + 3.8 * min(1.0, (count + 2) / 12)))
    axes.pcolormesh(shares_KK, cmap="Blues", vmin=0, vmax=100, edgecolors="white", linewidth=0.5)
    for (row, column), share in np.ndenumerate(shares_KK):
        if count <= 12 and np.isfinite(share):
            color = "white" if share > 55 else "black"
            axes.text(column + 0.5, row + 0.5, f"{share:.0f}", ha="center", va="center", fontsize=7.5, color=color)
    labels = [short_label(each) for each in classes]
    axes.set_xticks(np.arange(count) + 0.5, labels, rotation=90 if count > 4 else 0, fontsize=8)
    axes.set_yticks(np.arange(count) + 0.5, labels, fontsize=8)
    axes.tick_params(length=0)
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set(xlabel="predicted", ylabel="class of the pixel")
    return as_svg(figure, name, title)
