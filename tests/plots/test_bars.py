"""Charts are PNG files of what they are given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib.figure
import pytest
from PIL import Image

from pipeline.plots.bars import Bar, draw_bars, draw_stack

BARS = [Bar("forward", 3.0, 2.0, 5.0), Bar("backward", 6.0, 5.5, 6.0)]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[matplotlib.figure.Figure]:
    """The figures that were written to files."""
    figures: list[matplotlib.figure.Figure] = []
    write = matplotlib.figure.Figure.savefig

    def savefig(self: matplotlib.figure.Figure, *args: object, **more: object) -> None:
        figures.append(self)
        write(self, *args, **more)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", savefig)
    return figures


@pytest.mark.parametrize(("draw", "lefts"), [(draw_bars, [0, 0]), (draw_stack, [0, 3])])
def test_a_chart_is_a_png_with_a_bar_as_long_as_each_middle(
    draw: Callable[..., None], lefts: list[float], tmp_path: Path, drawn: list[matplotlib.figure.Figure]
):
    draw(BARS, tmp_path / "bars.png", title="step of a recipe", unit="milliseconds")
    with Image.open(tmp_path / "bars.png") as image:
        assert image.format == "PNG"
    (axes,) = drawn[0].axes
    assert (axes.get_title(), axes.get_xlabel()) == ("step of a recipe", "milliseconds")
    assert [(bar.get_x(), bar.get_width()) for bar in axes.patches] == list(zip(lefts, [3.0, 6.0], strict=True))


def test_a_bar_has_its_range_as_a_whisker(tmp_path: Path, drawn: list[matplotlib.figure.Figure]):
    draw_bars(BARS, tmp_path / "bars.png", title="", unit="")
    ends = [path.vertices[:, 0].tolist() for lines in drawn[0].axes[0].collections for path in lines.get_paths()]
    assert ends == [[2.0, 5.0], [5.5, 6.0]]
