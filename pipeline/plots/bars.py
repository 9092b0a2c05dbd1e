"""Bar charts of measured times as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes

from pipeline.plots._figure import COLORS, GREY, add_legend, new_figure

_PARTS = ("forward", "backward")
_HATCHES = ("", "///")
_LEAST = 0.01
"""Share of the longest bar below which a bar would be an empty row, and is named under the picture."""


class Bar(NamedTuple):
    """A bar with the range of its whisker."""

    label: str
    middle: float
    least: float
    most: float
    memory: int = 0
    """Bytes for a second panel, 0 if they are not known."""


class StackedBar(NamedTuple):
    """The bars that are drawn as one: forward and backward of a loss, or a single one."""

    label: str
    parts: tuple[Bar, ...]

    @property
    def length(self) -> float:
        """Return the sum of the parts."""
        return sum(part.middle for part in self.parts)


def stacked(bars: Sequence[Bar]) -> list[StackedBar]:
    """Return ``NAME forward`` and ``NAME backward`` as one bar ``NAME``, and any other bar by itself."""
    by_label: dict[str, list[Bar]] = {}
    for bar in bars:
        name, _, part = bar.label.rpartition(" ")
        by_label.setdefault(name if name and part in _PARTS else bar.label, []).append(bar)
    return [StackedBar(label, tuple(parts)) for label, parts in by_label.items()]


def draw_bars(bars: Sequence[Bar], path: Path, *, title: str, unit: str, memory: str = "MiB") -> None:
    """Write a PNG of horizontal bars, the first on top, with values, ranges, and their memory in a second panel.

    Forward and backward of one name are stacked. Bars below a hundredth of the longest are named under the picture.
    """
    rows = stacked(bars)
    longest = max((row.length for row in rows), default=0.0)
    drawn = [row for row in rows if row.length >= _LEAST * longest]
    tiny = [f"{row.label} {row.length:.3g}" for row in rows if row not in drawn]
    has_memory = any(part.memory for row in drawn for part in row.parts)
    figure, panels = new_figure((9, 1.7 + 0.42 * len(drawn)), 2 if has_memory else 1)
    _draw_times(panels[0], drawn, f"{unit}\n(below 1 % of the longest: {', '.join(tiny)})" if tiny else unit)
    if has_memory:
        _draw_memory(panels[1], drawn, memory)
    figure.suptitle(title, fontsize=10)
    add_legend(figure, panels[0])
    figure.savefig(path, dpi=150)


def _draw_times(axes: Axes, rows: Sequence[StackedBar], unit: str) -> None:
    for y, row in enumerate(rows):
        left = end = 0.0
        for number, part in enumerate(row.parts):
            name = part.label.rpartition(" ")[2] if len(row.parts) > 1 else None
            color, hatch = COLORS[number % len(COLORS)], _HATCHES[number % 2]
            axes.barh(y, part.middle, left=left, color=color, hatch=hatch, edgecolor="white", label=name)
            whisker = [[part.middle - part.least], [part.most - part.middle]]
            at = y + 0.25 * (number - (len(row.parts) - 1) / 2)  # whiskers of parts may overlap
            axes.errorbar(left + part.middle, at, xerr=whisker, fmt="none", ecolor="black", capsize=3)
            end, left = max(end, left + part.most), left + part.middle
        axes.annotate(_short(row.length), (end, y), (4, 0), textcoords="offset points", va="center", fontsize=8)
    _name_rows(axes, rows, unit)


def _draw_memory(axes: Axes, rows: Sequence[StackedBar], unit: str) -> None:
    for y, row in enumerate(rows):
        size = sum(part.memory for part in row.parts) / 2**20
        axes.barh(y, size, color=GREY)
        axes.annotate(_short(size), (size, y), (4, 0), textcoords="offset points", va="center", fontsize=8)
    _name_rows(axes, rows, unit)
    axes.set_yticklabels([])


def _name_rows(axes: Axes, rows: Sequence[StackedBar], unit: str) -> None:
    axes.set_yticks(range(len(rows)), [row.label for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.margins(x=0.16)
    axes.set_xlabel(unit)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def draw_stack(bars: Sequence[Bar], path: Path, *, title: str, unit: str) -> None:
    """Write a PNG with one stacked bar whose parts are ``bars``, in their order."""
    figure, (axes,) = new_figure((9, 2.6))
    axes.set_xlabel(unit)
    axes.set_title(title, fontsize=10)
    left = 0.0
    for number, bar in enumerate(bars):
        color, hatch = COLORS[number % len(COLORS)], _HATCHES[number // len(COLORS) % 2]
        axes.barh(0, bar.middle, left=left, label=bar.label, color=color, hatch=hatch, edgecolor="white")
        left += bar.middle
    axes.set_yticks([])
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=150)
