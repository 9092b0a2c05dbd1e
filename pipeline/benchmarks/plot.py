"""Pictures of benchmark records."""

from __future__ import annotations

from pathlib import Path

from pipeline.benchmarks.losses import KEPT, PEAK
from pipeline.benchmarks.record import BenchmarkRecord
from pipeline.benchmarks.step import WHOLE
from pipeline.plots.bars import Bar, draw_bars, draw_stack

UNIT = "milliseconds a step"
_MEMORY = {KEPT: "MiB kept until the backward", PEAK: "MiB at the peak"}


def draw_record(record: BenchmarkRecord, path: Path) -> None:
    """Write the record as a PNG: a step as one stacked bar, anything else as one bar per row, with its range."""
    title = f"{record.what}: {_short_name(record.recipe)}, {record.machine['gpu'] or record.machine['cpu']}"
    counted = next((name for each in record.measured for name in _MEMORY if name in each.counts), "")
    bars = [Bar(each.name, *each.milliseconds, int(each.counts.get(counted, 0))) for each in record.measured]
    if record.what == "step":
        shares = record.shares()
        parts = [bar._replace(label=f"{bar.label} {shares[bar.label]:.1%}") for bar in bars if bar.label != WHOLE]
        draw_stack(parts, path, title=title, unit=UNIT)
    else:
        draw_bars(bars, path, title=title, unit=UNIT, memory=_MEMORY.get(counted, ""))


def _short_name(recipe: str) -> str:
    """Return the pair and the method of a recipe, such as ``resnet56_resnet20 kd``."""
    path, *selection = recipe.split()
    return " ".join([Path(path).stem, *(word.partition("=")[2] for word in selection)])
