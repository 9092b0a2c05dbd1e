"""A metric against what a network costs, as SVG: operations, parameters, latency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pipeline.plots._figure import MARKERS, add_legend, as_svg, color_of, new_figure, spread


class Network(NamedTuple):
    """A network in the picture."""

    label: str
    metric: float
    costs: Mapping[str, float]
    """Cost by axis; an axis that a network has no value for has no point of it."""
    color: int = 0
    """Number of its colour; −1 is the grey of a baseline."""


def draw_costs(name: str, title: str, networks: Sequence[Network], *, ylabel: str) -> str:
    """Return a panel for each kind of cost that any network has, with a point for each network."""
    kinds = list(dict.fromkeys(kind for network in networks for kind in network.costs))
    figure, panels = new_figure((5.4, 3.2), len(kinds), share=True)
    for axes, kind in zip(panels, kinds, strict=True):
        for number, network in enumerate(networks):
            if kind in network.costs:
                color, marker = color_of(network.color), MARKERS[number % len(MARKERS)]
                point = [network.costs[kind]], [network.metric]
                axes.plot(*point, linestyle="", markersize=7, label=network.label, color=color, marker=marker)
        known = [network.costs[kind] for network in networks if kind in network.costs]
        low, high = spread([0.0, *known])
        axes.set_xlim(max(low, 0.0), high)
        axes.set_ylim(*spread([network.metric for network in networks]))
        axes.set_xlabel(kind)
        axes.locator_params(axis="x", nbins=4)
    panels[0].set_ylabel(ylabel)
    add_legend(figure, panels[0])
    return as_svg(figure, name, title)
