"""What one check of one rank found, and the one line that all ranks' findings make."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

from pipeline.errors import one_line

OK, SKIP, FAIL = "ok", "skip", "FAIL"
_WORST_LAST = (SKIP, OK, FAIL)


class Finding(NamedTuple):
    """A check's answer: what was measured and, where something is to be done, what."""

    status: str
    value: str
    advice: str = ""
    badness: float = 0.0
    """Of equal statuses the greatest is the worst."""


def ok(value: str, badness: float = 0.0) -> Finding:
    """Return that all is well."""
    return Finding(OK, value, badness=badness)


def fail(value: str, advice: str, badness: float = 0.0) -> Finding:
    """Return that this machine will not train as it is."""
    return Finding(FAIL, value, advice, badness)


def skip(reason: str) -> Finding:
    """Return that there was nothing to check."""
    return Finding(SKIP, reason)


def run_check(check: Callable[[], Finding]) -> Finding:
    """Return what ``check`` finds; what it raises is a finding, too."""
    try:
        return check()
    except Exception as error:
        if os.environ.get("PIPELINE_TRACEBACK"):
            raise
        kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
        return fail(kind + one_line(error, 500), "PIPELINE_TRACEBACK=1 shows more" if kind else "")


def line(name: str, findings: Sequence[Finding], hosts: Sequence[str]) -> str:
    """Return a check's line of the table: the worst rank's finding, which is named where the ranks differ."""
    worst = max(range(len(findings)), key=lambda rank: _order(findings[rank]))
    finding = findings[worst]
    where = f" [rank {worst} on {hosts[worst]}]" if len(set(findings)) > 1 else ""
    failing = sum(each.status == FAIL for each in findings)
    share = f" [{failing} of {len(findings)} ranks]" if failing and len(findings) > 1 else ""
    advice = f" → {finding.advice}" if finding.advice else ""
    return f"{finding.status:<5} {name:<15} {finding.value}{where}{share}{advice}"


def _order(finding: Finding) -> tuple[int, float]:
    return _WORST_LAST.index(finding.status), finding.badness
