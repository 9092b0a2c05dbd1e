"""Feature maps of one image side by side, as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pipeline.plots._figure import as_svg, new_figure


def draw_maps(name: str, title: str, maps: Mapping[str, Sequence[Sequence[float | None]]]) -> str:
    """Return the maps [H, W], each from its own least to its own largest value, dark to light."""
    figure, panels = new_figure((5.4, 5.4 / max(len(maps), 2) + 0.7), len(maps))
    for axes, (label, rows) in zip(panels, maps.items(), strict=True):
        values = np.ma.masked_invalid(np.array(rows, dtype=float))  # a number that was not finite has no square
        low, high = (float(end) for end in (values.min(), values.max())) if values.count() else (np.nan, np.nan)
        # Squares of their own, and not an image: pictures stay sharp at any size, and nothing is embedded.
        look = {"edgecolors": "face", "linewidth": 0.3}  # no white seams between them
        axes.pcolormesh(values, cmap="cividis", vmin=low, vmax=max(high, low + 1e-12), **look)
        axes.set_aspect("equal")
        axes.invert_yaxis()
        axes.set_title(label, fontsize=9)
        axes.set_xlabel(f"{low:.3g} to {high:.3g}" if values.count() else "not finite", fontsize=8)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        axes.grid(False)
    return as_svg(figure, name, title)
