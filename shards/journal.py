"""The journal of an unfinished preparation: one line per finished shard, so that it can be resumed."""

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
    """A finished shard, and the files left out of it. A shard without any usable image has no file."""

    shard: Shard
    left_out: tuple[LeftOut, ...]


class PreparationJournal:
    """The file ``journal.jsonl``: the job in the first line, then one ``ShardRecord`` per line.

    It is locked while it is open, so that no other process prepares the same folder. Opening it raises ValueError if
    the folder belongs to another job, or if another process holds the lock.
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
        """Add a finished shard. It is on the disk when this returns."""
        self._write_line(asdict(record))

    def __enter__(self) -> PreparationJournal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # on a full disk the rest of the buffer cannot be written
            self._file.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{self.path.parent} is being prepared by another process: wait until that ends") from None

    def _read(self, job: Manifest) -> dict[str, ShardRecord]:
        """Return the records by their shard's file name, and write the first line of a new journal."""
        self._file.seek(0)
        content = self._file.read()
        complete = content[: content.rfind(b"\n") + 1]
        self._file.truncate(len(complete))  # the last line is incomplete if the process was killed
        if not complete:
            self._write_line(describe(job))
            return {}
        first, *lines = complete.split(b"\n")[:-1]
        check_same_job(self.path.parent, self._parse(first, 1, dict[str, Any]), job)
        records = [self._parse(line, number, ShardRecord) for number, line in enumerate(lines, 2)]
        return {record.shard.url: record for record in records}

    def _parse(self, line: bytes, number: int, schema: type[_T]) -> _T:
        advice = f"delete {self.path.parent}, and prepare again"
        return parse_document(line, f"{self.path}: line {number}", schema, advice)

    def _write_line(self, values: dict[str, Any]) -> None:
        line = _encode(values)
        with writing(self.path, len(line)):
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())


def describe(job: Manifest) -> dict[str, Any]:
    """Return everything that a job's output depends on, as JSON values: its manifest without the splits."""
    return json.loads(json.dumps(replace(job, splits={}).values()))


def check_same_job(folder: Path, found: dict[str, Any], job: Manifest) -> None:
    """Raise ValueError with the first difference if ``found``, the description of a folder, is not that of ``job``."""
    old, new = _flatten(found), _flatten(describe(job))
    # The listing's digest comes last: another option often changes it, too, and that option is the better message.
    for key in sorted(old.keys() | new.keys(), key=lambda key: ("listing" in key, key)):
        if old.get(key) != new.get(key):
            stored, current = _short(old.get(key)), _short(new.get(key))
            raise ValueError(
                f"{folder} was prepared with another {key} ({stored} there, {current} here): "
                "use another folder, or delete this one"
            )


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        flat.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _encode(values: dict[str, Any]) -> bytes:
    return json.dumps(values, sort_keys=True).encode("ascii") + b"\n"


def _check_folder(folder: Path, job: Manifest) -> None:
    """Raise ValueError if the folder contains other files than shards; training's journal has the same name."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {path.name for path in folder.iterdir() if path.suffix != ".tmp"}
    unfinished = PREPARATION_JOURNAL in names and _is_preparation(folder / PREPARATION_JOURNAL, job)
    if names and not unfinished and MANIFEST not in names:
        raise ValueError(f"{folder} is not empty and contains no shards: use a new folder")


def _is_preparation(path: Path, job: Manifest) -> bool:
    """Return whether a journal's first line describes a preparation, or is an incomplete description of this job."""
    with path.open("rb") as file:
        first = file.readline()
    try:
        return {"tool", "image", "classes", "plan"} <= json.loads(first).keys()
    except (ValueError, AttributeError, RecursionError):  # not JSON, not an object, or nested too deeply
        return _encode(describe(job)).startswith(first)
