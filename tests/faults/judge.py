"""What a command's end is worth, and whether two folders hold the same result."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from forks import Done

from pipeline.training.journal import NOT_IN_TRACE

GOOD = {"one line", "reported", "accepted", "noticed", "harmless", "said", "same", "went on"}
"""Judgements that nobody has to mend; the others are breaches."""

WEIGHTS = ("student.safetensors", "student_ema.safetensors", "student_best.safetensors")
OWN_TIME = ("tensorboard", ".lock")
"""What differs from one run of a command to the next."""
TOLD = "left out: "
"""How a preparation names each file that is no image, while it works."""


def ended(done: Done) -> str:
    """Judge how a command ended, whatever it was to do."""
    lines = [line for line in done.err.splitlines() if line.strip() and not line.startswith(TOLD)]
    if done.late:
        return "hang"
    if done.signal is not None:
        return "abort"
    if "Traceback (most recent call last)" in done.err:
        return "traceback"
    if done.code == 0:
        return "accepted"
    if done.code == 2:
        return "one line" if len(lines) == 1 and lines[0].startswith("error: ") else "many lines"
    return "reported" if done.code == 1 and done.out.strip() and not lines else f"exit code {done.code}"


def input_judgement(done: Done, canary: Path, strict: bool) -> str:
    """Judge a command on bad input; where the kind of input is ``strict``, it must not be taken."""
    if canary.exists():
        return "canary executed"
    found = ended(done)
    return "accepted wrongly" if found == "accepted" and strict else found


def damage_judgement(done: Done, expected: Result | None, found: Result | None, said: bool) -> str:
    """Judge a command on damaged files by its result without the damage; None for one that proves, and makes none."""
    judged = ended(done)
    if judged in ("one line", "reported"):
        return "noticed"
    if judged != "accepted":
        return judged
    if expected is not None and found == expected:
        return "harmless"
    return "said" if said else "silent"


Result = dict[str, bytes]
"""Content by name of what a command is there to make."""


def run_result(folder: Path) -> Result:
    """Return a run's weights and its trace without timing."""
    weights = {name: (folder / name).read_bytes() for name in WEIGHTS if (folder / name).is_file()}
    journal = folder / "journal.jsonl"
    return weights | {"trace": "\n".join(_trace(journal) if journal.is_file() else ()).encode()}


def _trace(journal: Path) -> Iterator[str]:
    for line in journal.read_text(errors="replace").splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            found = line
        yield json.dumps(
            {key: found[key] for key in found if key not in NOT_IN_TRACE} if isinstance(found, dict) else found
        )


def folder_result(folder: Path) -> Result:
    """Return every file of a folder, as of shards or a cache."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in OWN_TIME and not path.name.endswith(".tmp")
    }


def names(folder: Path) -> set[str]:
    """Return the names of all that lies in a folder, but for what differs each time."""
    found = {path.relative_to(folder) for path in folder.rglob("*")}
    return {str(path) for path in found if not set(path.parts) & set(OWN_TIME)}
