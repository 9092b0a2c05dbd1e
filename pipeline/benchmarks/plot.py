"""Pictures of benchmark records."""

from __future__ import annotations

from pathlib import Path

from pipeline.benchmarks.record import BenchmarkRecord
from pipeline.benchmarks.step import WHOLE
from pipeline.plots.bars import Bar, draw_bars, draw_stack

UNIT = "milliseconds a step"


def draw_record(record: BenchmarkRecord, path: Path) -> None:
    """Write the record as a PNG: a step as one stacked bar, anything else as one bar per row, with its range."""
    title = f"{record.what} of {record.recipe}, {record.machine['gpu'] or record.machine['cpu']}"
    bars = [Bar(each.name, *each.milliseconds) for each in record.measured]
    if record.what == "step":
        shares = record.shares()
        parts = [bar._replace(label=f"{bar.label} {shares[bar.label]:.1%}") for bar in bars if bar.label != WHOLE]
        draw_stack(parts, path, title=title, unit=UNIT)
    else:
        draw_bars(bars, path, title=title, unit=UNIT)
