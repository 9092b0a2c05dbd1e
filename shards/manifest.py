"""What a folder of shards holds: ``manifest.json``, the one file that names the others and their sha256.

Its bytes are a function of the shards alone (no date, no host), so its sha256 stands for the whole folder.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from shards.documents import DamagedFile, parse_document

MANIFEST = "manifest.json"
VERSION = 1
MANIFEST_ADVICE = "copy it again, or run the preparation again"
"""What mends a folder of which a file is damaged or missing."""

MOST_IDS = 10**8
"""A sample's key has eight digits."""
_Count = Annotated[int, Field(ge=0, lt=2**63)]
_Ids = Annotated[int, Field(ge=0, le=MOST_IDS)]
_Side = Annotated[int, Field(ge=0, lt=2**31)]
_Name = Annotated[str, Field(pattern=r"^[^/\x00]*[^/\x00.][^/\x00]*$")]
"""A plain file name: it leads to no other folder."""
_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Shard:
    """One tar, by its file name; the key set is the one that ``wids`` reads."""

    __pydantic_config__ = _STRICT
    url: _Name
    nsamples: _Count
    filesize: _Count
    sha256: Annotated[str, Field(pattern="^([0-9a-f]{64})?$")]


@dataclass(frozen=True)
class LeftOut:
    """A file of the source that is no usable image: its id is a hole."""

    __pydantic_config__ = _STRICT
    id: _Ids
    path: str
    reason: str


@dataclass(frozen=True)
class Split:
    """``train`` or ``val``. Ids lie in [0, id_count); ``samples`` of them are in the shards, the others left out."""

    __pydantic_config__ = _STRICT
    name: _Name
    samples: _Ids
    id_count: _Ids
    shards: tuple[Shard, ...]
    samples_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    max_width: _Side
    max_height: _Side
    left_out: tuple[LeftOut, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """The whole folder. Everything but ``splits`` is known before the first image is read."""

    __pydantic_config__ = _STRICT
    tool: str
    image: Annotated[str, Field(pattern="^(jpg|png)$")]
    """Extension of the image members: ``jpg`` or ``png``."""
    classes: Annotated[tuple[str, ...], Field(min_length=1)]
    """Class names in the order of their labels."""
    transform: dict[str, Any] = field(default_factory=dict)
    """What was done to the images."""
    plan: dict[str, Any] = field(default_factory=dict)
    """What else the bytes depend on: seed, shard size, the source's listing."""
    splits: Annotated[dict[_Name, Split], Field(min_length=1)] = field(default_factory=dict)
    version: Literal[1] = VERSION
    sha256: str = field(default="", compare=False)
    """Of the file that it was read from; it stands for the whole folder, and is not written."""

    @property
    def num_classes(self) -> int:
        """Number of classes, those without an image included."""
        return len(self.classes)

    def values(self) -> dict[str, Any]:
        """Return what the file holds."""
        return {key: value for key, value in asdict(self).items() if key != "sha256"}


def read_manifest(folder: Path) -> Manifest:
    """Read ``folder/manifest.json``.

    Raises FileNotFoundError where there is none, and DamagedFile where it says what cannot be; one line each.
    """
    path = Path(folder) / MANIFEST
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"{path} does not exist: prepare the shards (shards/prepare_*.py), or let an interrupted preparation finish"
        ) from None
    manifest = parse_document(content, str(path), Manifest, "copy it again, or prepare the shards again")
    for name, split in manifest.splits.items():
        for key, told in _contradictions(name, split):
            raise DamagedFile(f"{path}: splits.{name}.{key}: {told}; copy it again, or prepare the shards again")
    return replace(manifest, sha256=hashlib.sha256(content).hexdigest())


def _contradictions(name: str, split: Split) -> Iterator[tuple[str, str]]:
    """Yield the keys of a split that cannot be as they are beside the others, and why."""
    if split.name != name:
        yield "name", f"the split calls itself '{split.name}'"
    if (total := sum(shard.nsamples for shard in split.shards)) != split.samples:
        yield "samples", f"the shards have {total:,} samples, not {split.samples:,}"
    if split.samples > split.id_count:
        yield "id_count", f"{split.id_count:,} ids are not enough for all samples"
    if beyond := [each.id for each in split.left_out if each.id >= split.id_count]:
        yield "left_out", f"id {beyond[0]} lies outside of the split's {split.id_count:,}"
    urls = [shard.url for shard in split.shards]
    if len(set(urls)) != len(urls):
        yield "shards", "a file is named twice"
    if any(not shard.sha256 for shard in split.shards):
        yield "shards", "a file has no sha256"


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``folder/manifest.json`` in one atomic step: a reader sees the old one or the whole new one."""
    text = json.dumps(manifest.values(), indent=1, sort_keys=True) + "\n"
    write_atomically(Path(folder) / MANIFEST, text.encode("ascii"))


class UnwritableFile(OSError):
    """A file that cannot be written; the message names it, what it takes, the room there is and what to do.

    It has nothing but its message, so that it can come out of a worker process.
    """


def unwritable(path: Path, needed: int, free: int | None, error: OSError) -> UnwritableFile:
    """Return the error of a file, or a folder, that takes ``needed`` bytes where ``free`` are; 0 if nobody knows."""
    # A library's own error has no number, and is nearly always this one.
    full = error.errno in (None, errno.ENOSPC, errno.EDQUOT)
    takes = f"{needed:,} bytes are needed" if needed else "its size is not known yet"
    there = f"{free:,} are free there" if free is not None else "how many are free is not known"
    if full and free is not None and free >= needed:
        there += ", unless a quota says less"
    reason, advice = error.strerror or str(error), "make room there" if full else "mend that"
    return UnwritableFile(
        f"{path}: cannot be written ({reason}): {takes}, {there}; {advice}, and the same command goes on"
    )


@contextmanager
def writing(path: Path, needed: int) -> Iterator[None]:
    """Be where ``path``, a file or a folder, is written, which takes ``needed`` bytes.

    Raises UnwritableFile where there is no room for them, and for every OSError inside.
    """
    free = free_bytes(path.parent)
    if free is not None and free < needed:
        raise unwritable(path, needed, free, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    try:
        yield
    except UnwritableFile:
        raise
    except OSError as error:
        raise unwritable(path, needed, free, error) from error


def free_bytes(folder: Path) -> int | None:
    """Return the free bytes of the disk under a folder; None where the disk does not say. A quota may be less."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return None
    return usage.free if usage.total else None


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a crash at any moment leaves the old content or the new, never a part.

    Raises UnwritableFile, with the old content there, where that cannot be.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with writing(path, len(content)):
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_path(path.parent)


def sync_path(path: Path) -> None:
    """Flush a file, or a folder's entries so that a rename survives a loss of power, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
