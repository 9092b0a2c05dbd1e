"""Comparison of two benchmark records: what is faster, what is slower, and what is only noise."""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

from pipeline.benchmarks.measure import Measurement
from pipeline.benchmarks.record import BenchmarkRecord
from pipeline.runs.identity import differing_keys
from pipeline.training.result import aligned

NO_PACKAGES = ("commit", "uncommitted_changes", "device")
"""Keys of a record's ``versions`` that are no packages: the compared code itself, and what ``machine`` contains."""
_FEW_REPEATS = 4
"""Fewest repeats for a verdict: with 4 and 4, noise alone separates two records in 1 of 35 comparisons."""


class Ratio(NamedTuple):
    """The ratio of the new speed to the old speed."""

    median: float
    """Ratio of the median speeds."""
    low: float
    high: float
    """Smallest (``low``) and largest ratio of a new repeat to an old one."""
    repeats: int
    """Number of repeats in the record that has fewer."""

    @property
    def verdict(self) -> str:
        """Return ``faster`` or ``slower`` if every new repeat is faster, or slower, than every old one.

        Noise alone causes such a verdict in 1 of 126 comparisons of equal code with 5 repeats each.
        """
        if self.repeats < _FEW_REPEATS:
            return "too few repeats to tell"
        return "faster" if self.low > 1 else "slower" if self.high < 1 else "no difference beyond noise"


def comparison_table(old: BenchmarkRecord, new: BenchmarkRecord) -> str:
    """Return the differences between the records' circumstances, and a row for everything that they measured."""
    rows = [["", "new ÷ old speed", "range of pairs", ""]]
    before = {each.name: each for each in old.measured}
    for each in new.measured:
        if each.name not in before:
            rows.append([each.name, "", "", "only in the new record"])
        elif ratio := speed_ratio(before[each.name], each):
            rows.append([each.name, f"{ratio.median:.3f}", f"{ratio.low:.3f} – {ratio.high:.3f}", ratio.verdict])
        else:
            rows.append([each.name, "", "", "too short to tell"])
    now = {each.name for each in new.measured}
    rows += [[name, "", "", "only in the old record"] for name in before if name not in now]
    return "\n".join([*circumstances(old, new), aligned(rows)])


def speed_ratio(old: Measurement, new: Measurement) -> Ratio | None:
    """Return the ratio of the speeds in images, or else in steps; None if a time is zero."""
    if not all((*old.seconds, *new.seconds)):
        return None
    by_images = bool(old.images and new.images)
    work = new.images / old.images if by_images else new.steps / old.steps
    # Every new repeat against every old one: the order of the repeats has no meaning.
    pairs = [work * before / after for before, after in product(old.seconds, new.seconds)]
    repeats = min(len(old.seconds), len(new.seconds))
    return Ratio(work * old.median / new.median, min(pairs), max(pairs), repeats)


def circumstances(old: BenchmarkRecord, new: BenchmarkRecord) -> list[str]:
    """Return a line for each thing other than the code that may explain a difference."""
    lines = [f"another machine: {_changes(old.machine, new.machine)}"] if old.machine != new.machine else []
    before, now = _packages(old.versions), _packages(new.versions)
    lines += [f"other packages: {_changes(before, now)}"] if before != now else []
    keys = differing_keys(old.resolved, new.resolved)
    return lines + ([f"another recipe: {', '.join(keys)}"] if keys else [])


def _packages(versions: dict[str, Any]) -> dict[str, Any]:
    """Return the versions of the installed packages."""
    return {name: version for name, version in versions.items() if name not in NO_PACKAGES}


def _changes(old: dict[str, object], new: dict[str, object]) -> str:
    return ", ".join(f"{key} {old.get(key)}, now {new.get(key)}" for key in differing_keys(old, new))
