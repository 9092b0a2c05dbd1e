"""What all pictures share: colours, line styles, and a figure as a PNG file or as SVG inside an HTML page."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's colours, which people with any kind of colour vision can tell apart; not yellow, pale on white."""
GREY = "#767676"
"""A grey that is readable on white (contrast 4.5)."""
STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
"""Line styles, for those who see no colours and for paper."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_LONGEST_NAME = 18
_SETTINGS = {
    "svg.fonttype": "none",  # text stays text: small, searchable, and read aloud
    "font.family": ["DejaVu Sans"],  # comes with matplotlib
    "font.size": 9,
}
mpl.rcParams.update(_SETTINGS)  # pyright: ignore[reportCallIssue, reportArgumentType]
# Here, and not in a context, because a text takes its font when it is made.
_SIZE = 5.4, 3.4
"""Inches of a picture: a phone's width at readable letters."""


def color_of(number: int) -> str:
    """Return the colour with that number; −1 is the grey of a baseline."""
    return GREY if number < 0 else COLORS[number % len(COLORS)]


def new_figure(
    size: tuple[float, float] = _SIZE, panels: int = 1, *, heights: Sequence[float] = (), share: bool = False
) -> tuple[Figure, list[Axes]]:
    """Return an empty figure of ``size`` in inches with panels side by side, and their axes.

    ``heights`` puts them below one another, with those shares of the height.
    """
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)  # not pyplot, which would look for a display and keep every figure in memory
    grid = (panels, 1) if heights else (1, panels)
    ratios = list(heights) or None
    found = figure.subplots(*grid, squeeze=False, sharey=share, height_ratios=ratios).ravel().tolist()
    for axes in found:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e6e6e6", linewidth=0.6)
        axes.set_axisbelow(True)
    return figure, found


def add_legend(figure: Figure, axes: Axes, columns: int = 3) -> None:
    """Put a legend under the picture, where it covers nothing, if there is anything to tell apart."""
    handles, labels = axes.get_legend_handles_labels()
    by_label = dict(zip(labels, handles, strict=True))
    if len(by_label) > 1:
        widest = max(map(len, by_label))
        columns = max(1, min(columns, len(by_label), 60 // (widest + 6)))
        figure.legend(
            by_label.values(), by_label, loc="outside lower center", ncols=columns, frameon=False, fontsize=8.5
        )


def short_label(text: str) -> str:
    """Return the name of a class as it fits beside an axis."""
    return text if len(text) <= _LONGEST_NAME else f"{text[: _LONGEST_NAME - 1]}…"


def as_svg(figure: Figure, name: str, title: str) -> str:
    """Return the figure as an ``<svg>`` element of an HTML page, with ``title`` for those who cannot see it.

    ``name`` makes its ids unique in the page. The same figure is the same text. It refers to nothing outside.
    """
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # Other fonts than this one are narrower, so text never overflows where it is missing.
    text = text.replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    # Coordinates to a hundredth of a point: the rest is half of the file.
    text = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d+\.\d\d)\d+", r"\1", tag[0]), text)
    box = re.search(r'viewBox="([^"]*)"', text)
    head = f'<svg class="picture" role="img" aria-labelledby="{name}-title" viewBox="{box[1] if box else ""}">'
    titled = f'{head}\n<title id="{name}-title">{html.escape(title)}</title>'
    return re.sub(r"<svg\b[^>]*>", lambda _: titled, text, count=1).replace("xlink:href", "href").strip()


def set_log_axis(axes: Axes, values: Sequence[float]) -> None:
    """Make the y axis logarithmic, with plain numbers at its ticks; ``values`` are those on it."""
    axes.set_yscale("log")
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(plain)
    short = not values or max(values) / min(values) < 30  # a range with few powers of ten needs numbers between them
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.yaxis.set_minor_formatter(plain if short else NullFormatter())


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Return the least and the largest value, moved apart by a twentieth of their distance, or by one if equal."""
    low, high = min(values), max(values)
    margin = (high - low) / 20 or 1.0
    return low - margin, high + margin
