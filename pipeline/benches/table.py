"""A record as a table for the terminal."""

from __future__ import annotations

from pipeline.benches.measure import Measured
from pipeline.benches.record import Record
from pipeline.report import aligned


def table(record: Record) -> str:
    """Return a row for everything measured: median and range, images per second, share of the whole, counts."""
    shares = record.shares()
    counted = list(dict.fromkeys(name for each in record.measured for name in each.counts))
    columns = ["ms a step", "from – to", "images/s", *(["share"] if shares else []), *counted]
    rows = [["", *columns]]
    for each in record.measured:
        low, high = (milliseconds(seconds / record.steps) for seconds in (min(each.seconds), max(each.seconds)))
        share = [f"{shares[each.name]:.1%}"] if shares else []
        counts = [f"{each.counts[name]:,}" if name in each.counts else "" for name in counted]
        rows.append(
            [each.name, milliseconds(each.median / record.steps), f"{low} – {high}", _rate(each), *share, *counts]
        )
    where = ", ".join(f"{name} {value}" for name, value in record.machine.items() if value is not None)
    repeats = max(len(each.seconds) for each in record.measured)
    head = f"{record.what} of {record.recipe}, median and range of {repeats} × {record.steps} steps; {where}"
    return f"{head}\n{aligned(rows)}"


def milliseconds(seconds: float) -> str:
    """Return a time as the tables show it."""
    return f"{1000 * seconds:,.3f}"


def _rate(measured: Measured) -> str:
    return f"{measured.images_per_second:,.1f}" if measured.images and measured.median else ""
