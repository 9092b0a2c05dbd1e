"""Feature maps of one image side by side, as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pipeline.plots._figure import as_svg, new_figure


def draw_maps(name: str, title: str, maps: Mapping[str, Sequence[Sequence[float]]]) -> str:
    """Return the maps [H, W], each from its own least to its own largest value, dark to light."""
    figure, panels = new_figure((5.4, 5.4 / max(len(maps), 2) + 0.7), len(maps))
    for axes, (label, rows) in zip(panels, maps.items(), strict=True):
        values = np.array(rows, dtype=float)
        # Squares of their own, and not an image: pictures stay sharp at any size, and nothing is embedded.
        axes.pcolormesh(values, cmap="cividis", vmin=values.min(), vmax=max(values.max(), values.min() + 1e-12))
        axes.set_aspect("equal")
        axes.invert_yaxis()
        axes.set_title(label, fontsize=9)
        axes.set_xlabel(f"{values.min():.3g} to {values.max():.3g}", fontsize=8)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        axes.grid(False)
    return as_svg(figure, name, title)
