"""Tables of benchmark records for the terminal."""

from __future__ import annotations

from pipeline.benchmarks.measure import Measurement
from pipeline.benchmarks.record import BenchmarkRecord
from pipeline.training.result import aligned


def benchmark_table(record: BenchmarkRecord) -> str:
    """Return a table with a row per measurement: median, range, images per second, share of the whole, counts."""
    shares = record.shares()
    counted = list(dict.fromkeys(name for each in record.measured for name in each.counts))
    head = ["", "ms a step", "range", "images/s", *(["share"] if shares else []), *counted]
    rows = [_row(each, shares, counted) for each in record.measured]
    machine = ", ".join(f"{name} {value}" for name, value in record.machine.items() if value is not None)
    repeats = len(record.measured[0].seconds)
    return f"{record.what} of {record.recipe}, medians of {repeats} repeats; {machine}\n{aligned([head, *rows])}"


def _row(measured: Measurement, shares: dict[str, float], counted: list[str]) -> list[str]:
    middle, least, most = measured.milliseconds
    rate = f"{measured.images_per_second:,.1f}" if measured.images else ""
    share = [f"{shares[measured.name]:.1%}"] if shares else []
    counts = [_format_count(measured.counts.get(name)) for name in counted]
    return [measured.name, f"{middle:,.3f}", f"{least:,.3f} – {most:,.3f}", rate, *share, *counts]


def _format_count(count: float | None) -> str:
    return "" if count is None else f"{count:,}" if isinstance(count, int) else f"{count:.4g}"
