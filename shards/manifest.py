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
from typing import Any

MANIFEST = "manifest.json"
VERSION = 1


@dataclass(frozen=True)
class Shard:
    """One tar, by its file name; the key set is the one that ``wids`` reads."""

    url: str
    nsamples: int
    filesize: int
    sha256: str


@dataclass(frozen=True)
class LeftOut:
    """A file of the source that is no usable image: its id is a hole."""

    id: int
    path: str
    reason: str


@dataclass(frozen=True)
class Split:
    """``train`` or ``val``. Ids lie in [0, id_count); ``samples`` of them are in the shards, the others left out."""

    name: str
    samples: int
    id_count: int
    shards: tuple[Shard, ...]
    samples_sha256: str
    max_width: int
    max_height: int
    left_out: tuple[LeftOut, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """The whole folder. Everything but ``splits`` is known before the first image is read."""

    tool: str
    image: str
    """Extension of the image members: ``jpg`` or ``png``."""
    classes: tuple[str, ...]
    """Class names in the order of their labels."""
    transform: dict[str, Any] = field(default_factory=dict)
    """What was done to the images."""
    plan: dict[str, Any] = field(default_factory=dict)
    """What else the bytes depend on: seed, shard size, the source's listing."""
    splits: dict[str, Split] = field(default_factory=dict)
    version: int = VERSION
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

    Raises FileNotFoundError where there is none, and ValueError where it cannot be understood; one line each.
    """
    path = Path(folder) / MANIFEST
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"{path} does not exist: prepare the shards (shards/prepare_*.py), or let an interrupted preparation finish"
        ) from None
    try:
        return replace(parse_manifest(json.loads(content)), sha256=hashlib.sha256(content).hexdigest())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a manifest of version {VERSION} ({error}): prepare the shards again") from None


def parse_manifest(values: dict[str, Any]) -> Manifest:
    """Build a manifest from its JSON values; what is missing, unknown or contradictory raises."""
    if values["version"] != VERSION:
        raise ValueError(f"its version is {values['version']}")
    splits = {name: _parse_split(name, split) for name, split in values["splits"].items()}
    return Manifest(**{**values, "classes": tuple(values["classes"]), "splits": splits})


def _parse_split(name: str, values: dict[str, Any]) -> Split:
    shards = tuple(Shard(**shard) for shard in values["shards"])
    left_out = tuple(LeftOut(**each) for each in values["left_out"])
    split = Split(**{**values, "shards": shards, "left_out": left_out})
    if split.name != name:
        raise ValueError(f"split '{name}' calls itself '{split.name}'")
    if sum(shard.nsamples for shard in shards) != split.samples:
        raise ValueError(f"the shards of '{name}' do not add up to {split.samples} samples")
    for shard in shards:
        if Path(shard.url).name != shard.url:
            raise ValueError(f"shard '{shard.url}' is not a plain file name")
    return split


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``folder/manifest.json`` in one atomic step: a reader sees the old one or the whole new one."""
    text = json.dumps(manifest.values(), indent=1, sort_keys=True) + "\n"
    write_atomically(Path(folder) / MANIFEST, text.encode("ascii"))


class UnwritableFile(OSError):
    """A file that cannot be written; the message names it, what it takes, the room there is and what to do."""

    def __init__(self, path: Path, reason: str, needed: int, free: int | None, *, full: bool) -> None:
        takes = f"{needed:,} bytes are needed" if needed else "its size is not known yet"
        there = f"{free:,} are free there" if free is not None else "how many are free is not known"
        if full and free is not None and free >= needed:
            there += ", unless a quota says less"
        advice = "make room there" if full else "mend that"
        super().__init__(
            f"{path}: cannot be written ({reason}): {takes}, {there}; {advice}, and the same command goes on"
        )


@contextmanager
def writing(path: Path, needed: int) -> Iterator[None]:
    """Be where ``path``, a file or a folder, is written, which takes ``needed`` bytes.

    Raises UnwritableFile where there is no room for them, and for every OSError inside.
    """
    free = free_bytes(path.parent)
    if free is not None and free < needed:
        raise UnwritableFile(path, os.strerror(errno.ENOSPC), needed, free, full=True)
    try:
        yield
    except UnwritableFile:
        raise
    except OSError as error:
        # A library's own error has no number, and is nearly always this one.
        full = error.errno in (None, errno.ENOSPC, errno.EDQUOT)
        raise UnwritableFile(path, error.strerror or str(error), needed, free, full=full) from error


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
