"""Charts are PNG files of what they are given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib.figure
import pytest
from PIL import Image

from pipeline.plots.bars import Bar, draw_bars, draw_stack

BARS = [Bar("step forward", 3.0, 2.0, 5.0), Bar("step backward", 6.0, 5.5, 6.0)]


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


@pytest.mark.parametrize("draw", [draw_bars, draw_stack])
def test_a_chart_is_a_png_with_a_bar_as_long_as_each_middle(
    draw: Callable[..., None], tmp_path: Path, drawn: list[matplotlib.figure.Figure]
):
    draw(BARS, tmp_path / "bars.png", title="step of a recipe", unit="milliseconds")
    with Image.open(tmp_path / "bars.png") as image:
        assert image.format == "PNG"
    (axes,) = drawn[0].axes
    assert axes.get_xlabel() == "milliseconds"
    assert "step of a recipe" in (axes.get_title(), drawn[0].get_suptitle())
    assert [(bar.get_x(), bar.get_width()) for bar in axes.patches] == [(0, 3.0), (3.0, 6.0)]


def test_forward_and_backward_of_one_loss_are_one_bar_with_its_value_and_their_ranges(
    tmp_path: Path, drawn: list[matplotlib.figure.Figure]
):
    bars = [Bar("kd forward", 3.0, 2.0, 5.0, 2**21), Bar("kd backward", 6.0, 5.5, 6.0), Bar("at", 4.0, 4.0, 4.0)]
    draw_bars(bars, tmp_path / "bars.png", title="", unit="", memory="MiB kept")
    times, memory = drawn[0].axes
    assert [label.get_text() for label in times.get_yticklabels()] == ["kd", "at"]
    assert [text.get_text() for text in times.texts] == ["9", "4"]
    assert [text.get_text() for text in memory.texts] == ["2", "0"]
    ends = [path.vertices[:, 0].tolist() for lines in times.collections for path in lines.get_paths()]
    assert ends == [[2.0, 5.0], [8.5, 9.0], [4.0, 4.0]]


def test_a_bar_below_a_hundredth_of_the_longest_is_named_and_no_empty_row(
    tmp_path: Path, drawn: list[matplotlib.figure.Figure]
):
    draw_bars(
        [Bar("ce", 0.15, 0.1, 0.2), Bar("ddkd", 3800.0, 3700.0, 3900.0)], tmp_path / "bars.png", title="", unit="ms"
    )
    (axes,) = drawn[0].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["ddkd"]
    assert axes.get_xlabel() == "ms\n(below 1 % of the longest: ce 0.15)"
