"""The memory of an unfinished preparation: a line for each finished shard, so that a killed one can go on."""

from __future__ import annotations

import fcntl
import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from shards.documents import parse_document
from shards.manifest import MANIFEST, LeftOut, Manifest, Shard, writing

_T = TypeVar("_T")

PREPARATION_JOURNAL = "journal.jsonl"


@dataclass(frozen=True)
class ShardRecord:
    """A finished shard, and what of its share was left out. A shard of which nothing is left has no file."""

    shard: Shard
    left_out: tuple[LeftOut, ...]


class PreparationJournal:
    """``journal.jsonl``: the job in its first line, then a record a line. Held locked, against a second preparation.

    Raises ValueError where the folder belongs to another job or to another process.
    """

    def __init__(self, folder: Path, job: Manifest) -> None:
        self.path = folder / PREPARATION_JOURNAL
        _check_folder(folder, job)
        self._file = self.path.open("a+b")
        try:
            self._lock()
            self.records = self._read(job)
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def append(self, record: ShardRecord) -> None:
        """Put down a shard; when this returns it is on the disk."""
        self._write_line(asdict(record))

    def __enter__(self) -> PreparationJournal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # a full disk, which refuses what is still in the buffer
            self._file.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{self.path.parent} is being prepared by another process: wait for it") from None

    def _read(self, job: Manifest) -> dict[str, ShardRecord]:
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._file.truncate(len(whole))  # a kill may have torn the last line
        if not whole:
            self._write_line(describe(job))
            return {}
        first, *lines = whole.split(b"\n")[:-1]
        check_same_job(self.path.parent, self._parse(first, 1, dict[str, Any]), job)
        records = [self._parse(line, number, ShardRecord) for number, line in enumerate(lines, 2)]
        return {record.shard.url: record for record in records}

    def _parse(self, line: bytes, number: int, schema: type[_T]) -> _T:
        advice = f"delete {self.path.parent}, and prepare again"
        return parse_document(line, f"{self.path}: line {number}", schema, advice)

    def _write_line(self, values: dict[str, Any]) -> None:
        line = _encoded(values)
        with writing(self.path, len(line)):
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())


def describe(job: Manifest) -> dict[str, Any]:
    """Return what a job's bytes depend on, as JSON values: its manifest without the shards."""
    return json.loads(json.dumps(replace(job, splits={}).values()))


def check_same_job(folder: Path, found: dict[str, Any], job: Manifest) -> None:
    """Raise a ValueError that names the first difference, if ``found`` describes another job."""
    old, new = _flat(found), _flat(describe(job))
    # The files found follow from other keys, too, which say more.
    for key in sorted(old.keys() | new.keys(), key=lambda key: ("listing" in key, key)):
        if old.get(key) != new.get(key):
            there, here = _short(old.get(key)), _short(new.get(key))
            raise ValueError(
                f"{folder} was prepared with another {key} ({there} there, {here} here): "
                "name another folder, or delete this one"
            )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _encoded(values: dict[str, Any]) -> bytes:
    return json.dumps(values, sort_keys=True).encode("ascii") + b"\n"


def _check_folder(folder: Path, job: Manifest) -> None:
    """Raise ValueError if the folder holds anything but shards, or the journal of something else, as a run's is."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {path.name for path in folder.iterdir() if path.suffix != ".tmp"}
    begun = PREPARATION_JOURNAL in names and _is_begun(folder / PREPARATION_JOURNAL, job)
    if names and not begun and MANIFEST not in names:
        raise ValueError(f"{folder} is not empty and holds no shards: name a new folder")


def _is_begun(path: Path, job: Manifest) -> bool:
    """Whether a journal's first line is a preparation's, or what a kill left of this one's."""
    with path.open("rb") as file:
        first = file.readline()
    try:
        return {"tool", "image", "classes", "plan"} <= json.loads(first).keys()
    except (ValueError, AttributeError, RecursionError):
        return _encoded(describe(job)).startswith(first)
