"""A record as a picture. The only file that imports matplotlib."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pipeline.benches.record import Record
from pipeline.benches.step import WHOLE


def draw(record: Record, path: Path) -> None:
    """Write the picture as a PNG: a step as one stacked bar, anything else as a bar for each row, with its range."""
    stacked = record.what == "step"
    figure = Figure(figsize=(9, 2.6 if stacked else 1.2 + 0.4 * len(record.measured)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    _stack(axes, record) if stacked else _bars(axes, record)
    axes.set_xlabel("milliseconds a step")
    axes.set_title(f"{record.what} of {record.recipe}, {record.machine['gpu'] or record.machine['cpu']}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    if stacked:
        figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=150)


def _stack(axes: Axes, record: Record) -> None:
    """Draw the parts of a step one after the other, in their order."""
    left, shares = 0.0, record.shares()
    for each in record.measured:
        if each.name != WHOLE:
            width, _, _ = each.milliseconds
            axes.barh(0, width, left=left, label=f"{each.name} {shares[each.name]:.1%}")
            left += width
    axes.set_yticks([])


def _bars(axes: Axes, record: Record) -> None:
    """Draw every row's median, with its range as a whisker."""
    for each in record.measured:
        middle, least, most = each.milliseconds
        axes.barh(each.name, middle, xerr=[[middle - least], [most - middle]], color="tab:blue", capsize=3)
    axes.invert_yaxis()  # the first row on top
