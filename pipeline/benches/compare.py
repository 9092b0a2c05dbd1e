"""Two records of the same thing: what is faster, what is slower, and what only looks so."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import numpy as np

from pipeline.benches.measure import Measured
from pipeline.benches.record import Record
from pipeline.report import aligned
from pipeline.runs import differences


class Ratio(NamedTuple):
    """New speed ÷ old speed."""

    median: float
    """Of the medians."""
    low: float
    high: float
    """Between the two lies the middle half of the ratios of all pairs of repeats."""

    @property
    def verdict(self) -> str:
        """Whether the new one is ``faster``, ``slower`` or, by its noise, the ``same``."""
        return "faster" if self.low > 1 else "slower" if self.high < 1 else "same"


def compare(old: Record, new: Record) -> str:
    """Return what differs between the records' circumstances, and a row for everything that both measured."""
    rows = [["", "new ÷ old speed", "middle half", ""]]
    before = {each.name: each for each in old.measured}
    for each in new.measured:
        if each.name not in before:
            rows.append([each.name, "", "", "only in the new record"])
        elif found := ratio(before[each.name], each):
            rows.append([each.name, f"{found.median:.3f}", f"{found.low:.3f} – {found.high:.3f}", found.verdict])
        else:
            rows.append([each.name, "", "", "too short to tell"])
    now = {each.name for each in new.measured}
    rows += [[name, "", "", "only in the old record"] for name in before if name not in now]
    return "\n".join([*circumstances(old, new), aligned(rows)])


def ratio(old: Measured, new: Measured) -> Ratio | None:
    """Return the ratio of the speeds, of images or else of steps; None where a time is zero."""
    if not all((*old.seconds, *new.seconds)):
        return None
    by_images = bool(old.images and new.images)
    work = new.images / old.images if by_images else new.steps / old.steps
    pairs = [work * before / after for before, after in product(old.seconds, new.seconds)]
    low, high = np.quantile(pairs, (0.25, 0.75))
    return Ratio(work * old.median / new.median, float(low), float(high))


def circumstances(old: Record, new: Record) -> list[str]:
    """Return a line for each thing other than the code that may explain a difference."""
    found = [f"another machine: {_changes(old.machine, new.machine)}"] if old.machine != new.machine else []
    torches = old.versions.get("torch"), new.versions.get("torch")
    found += [f"another torch: {torches[0]}, now {torches[1]}"] if torches[0] != torches[1] else []
    keys = differences(old.resolved, new.resolved)
    return found + ([f"another recipe: {', '.join(keys)}"] if keys else [])


def _changes(old: dict[str, object], new: dict[str, object]) -> str:
    return ", ".join(f"{key} {old.get(key)}, now {new.get(key)}" for key in differences(old, new))
