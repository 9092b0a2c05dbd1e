"""Two records of the same thing: what is faster, what is slower, and what only looks so."""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

from pipeline.benchmarks.measure import Measurement
from pipeline.benchmarks.record import BenchmarkRecord
from pipeline.runs.identity import differing_keys
from pipeline.training.result import aligned

NO_PACKAGES = ("commit", "uncommitted_changes", "device")
"""Of a record's versions: the code that is compared, and what ``machine`` says."""
_FEW_REPEATS = 4
"""Repeats below which noise alone sets two records apart too often: 4 and 4 it does in 1 of 35 comparisons."""


class Ratio(NamedTuple):
    """New speed ÷ old speed."""

    median: float
    """Of the medians."""
    low: float
    high: float
    """The least and the greatest ratio of a new repeat to an old one."""
    repeats: int
    """Of the record that has fewer."""

    @property
    def verdict(self) -> str:
        """Whether the new one is ``faster`` or ``slower``: every repeat of it than every repeat of the old one.

        Of two records of the same thing with 5 repeats each, noise says so of 1 in 126.
        """
        if self.repeats < _FEW_REPEATS:
            return "too few repeats to tell"
        return "faster" if self.low > 1 else "slower" if self.high < 1 else "no difference beyond noise"


def comparison_table(old: BenchmarkRecord, new: BenchmarkRecord) -> str:
    """Return what differs between the records' circumstances, and a row for everything that both measured."""
    rows = [["", "new ÷ old speed", "range of pairs", ""]]
    before = {each.name: each for each in old.measured}
    for each in new.measured:
        if each.name not in before:
            rows.append([each.name, "", "", "only in the new record"])
        elif found := speed_ratio(before[each.name], each):
            rows.append([each.name, f"{found.median:.3f}", f"{found.low:.3f} – {found.high:.3f}", found.verdict])
        else:
            rows.append([each.name, "", "", "too short to tell"])
    now = {each.name for each in new.measured}
    rows += [[name, "", "", "only in the old record"] for name in before if name not in now]
    return "\n".join([*circumstances(old, new), aligned(rows)])


def speed_ratio(old: Measurement, new: Measurement) -> Ratio | None:
    """Return the ratio of the speeds, of images or else of steps; None where a time is zero."""
    if not all((*old.seconds, *new.seconds)):
        return None
    by_images = bool(old.images and new.images)
    work = new.images / old.images if by_images else new.steps / old.steps
    pairs = [work * before / after for before, after in product(old.seconds, new.seconds)]
    repeats = min(len(old.seconds), len(new.seconds))
    return Ratio(work * old.median / new.median, min(pairs), max(pairs), repeats)


def circumstances(old: BenchmarkRecord, new: BenchmarkRecord) -> list[str]:
    """Return a line for each thing other than the code that may explain a difference."""
    found = [f"another machine: {_changes(old.machine, new.machine)}"] if old.machine != new.machine else []
    before, now = _packages(old.versions), _packages(new.versions)
    found += [f"other packages: {_changes(before, now)}"] if before != now else []
    keys = differing_keys(old.resolved, new.resolved)
    return found + ([f"another recipe: {', '.join(keys)}"] if keys else [])


def _packages(versions: dict[str, Any]) -> dict[str, Any]:
    """Return what is installed besides the code itself."""
    return {name: version for name, version in versions.items() if name not in NO_PACKAGES}


def _changes(old: dict[str, object], new: dict[str, object]) -> str:
    return ", ".join(f"{key} {old.get(key)}, now {new.get(key)}" for key in differing_keys(old, new))
