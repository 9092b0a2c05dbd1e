"""Findings of the doctor's checks, and the table line for the findings of all ranks."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

from pipeline.commands import as_started
from pipeline.errors import one_line

OK, SKIP, FAIL = "ok", "skip", "FAIL"
_WORST_LAST = (SKIP, OK, FAIL)


class Finding(NamedTuple):
    """The result of a check on one rank: what was measured, and what to do if something is wrong."""

    status: str
    value: str
    advice: str = ""
    badness: float = 0.0
    """Order among findings of equal status: the largest is the worst."""


def ok(value: str, badness: float = 0.0) -> Finding:
    """Return a finding without a problem."""
    return Finding(OK, value, badness=badness)


def fail(value: str, advice: str, badness: float = 0.0) -> Finding:
    """Return a finding that keeps this machine from training."""
    return Finding(FAIL, value, advice, badness)


def skip(reason: str) -> Finding:
    """Return the finding of a check that does not apply."""
    return Finding(SKIP, reason)


def run_check(check: Callable[[], Finding]) -> Finding:
    """Return the finding of ``check``; an exception becomes a failure."""
    try:
        return check()
    except Exception as error:
        if os.environ.get("PIPELINE_TRACEBACK"):
            raise
        # The project's own errors explain themselves; any other is named by its class.
        kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
        return fail(kind + one_line(error, 500), "PIPELINE_TRACEBACK=1 shows more" if kind else "")


def line(name: str, findings: Sequence[Finding], hosts: Sequence[str]) -> str:
    """Return a check's line of the table: the worst rank's finding, with the rank if the findings differ."""
    worst = max(range(len(findings)), key=lambda index: _order(findings[index]))
    finding = findings[worst]
    rank = f" [rank {worst} on {hosts[worst]}]" if len(set(findings)) > 1 else ""
    failing = sum(each.status == FAIL for each in findings)
    share = f" [{failing} of {len(findings)} ranks]" if failing and len(findings) > 1 else ""
    advice = f" → {finding.advice}" if finding.advice else ""
    return as_started(f"{finding.status:<5} {name:<15} {finding.value}{rank}{share}{advice}")


def _order(finding: Finding) -> tuple[int, float]:
    return _WORST_LAST.index(finding.status), finding.badness
