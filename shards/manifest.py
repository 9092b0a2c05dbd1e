"""The file ``manifest.json`` of a folder of shards: it lists the other files with their sha256.

Its bytes depend on the shards alone, not on date or host. So its sha256 identifies the complete folder.
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

from pydantic import AfterValidator, ConfigDict, Field

from shards.documents import DamagedFile, parse_document

MANIFEST = "manifest.json"
VERSION = 1
MANIFEST_ADVICE = "copy it again, or run the preparation again"
"""How to repair a folder with a damaged or missing file; the end of error messages."""

IGNORED_VALUE = 255
"""Value of a mask's pixel without a class: unlabelled in the data set, outside the image, or in a padded row."""
MOST_MASK_CLASSES = IGNORED_VALUE
"""Largest number of classes of pixels: a mask has a byte for each pixel, and the last value means no class."""
COPY_SCALES = (2, 3, 4, 8)
"""How many times smaller the copies of images are in shards for super-resolution."""
MOST_IDS = 10**8
"""Largest number of ids in a split: a sample's key has eight digits."""
_Count = Annotated[int, Field(ge=0, lt=2**63)]
_Ids = Annotated[int, Field(ge=0, le=MOST_IDS)]
_Side = Annotated[int, Field(ge=0, lt=2**31)]
_Name = Annotated[str, Field(pattern=r"^[^/\x00]*[^/\x00.][^/\x00]*$")]
"""A plain file name, which cannot point to another folder."""
_IMAGE = "(jpg|jpeg|png|webp)"
_STRICT = ConfigDict(extra="forbid")
_TABLES = {
    "multilabel": {"targets_sha256": "targets"},
    "detection": {"boxes_sha256": "boxes", "box_offsets_sha256": "offsets"},
}
"""The tables that splits of some tasks have beside the sample table, by the key of their digest."""

ShardTaskName = Literal["classification", "multilabel", "segmentation", "detection", "super_resolution", "unlabelled"]
"""What the images of shards have: one class, any number of classes, a mask, boxes, a smaller copy, or no label."""


def _check_plan(plan: dict[str, Any]) -> dict[str, Any]:
    for key, least in {"seed": 0, "samples_per_shard": 1}.items():
        value = plan.get(key, least)
        if type(value) is not int or value < least:
            raise ValueError(f"{key}: expected a whole number of at least {least}, got {value!r}")
    members = plan.get("members", {})
    keys = members.keys() if isinstance(members, dict) else {""}
    known = {"label_key", "image_key", "mask_key"}
    if keys - known or not all(isinstance(members[key], str | None) for key in keys):
        raise ValueError(f"members: expected names for label_key, image_key and mask_key, got {members!r}")
    return plan


@dataclass(frozen=True)
class Shard:
    """One tar file. Its keys are those that ``wids``, webdataset's index reader, expects."""

    __pydantic_config__ = _STRICT
    url: _Name
    nsamples: _Count
    filesize: _Count
    sha256: Annotated[str, Field(pattern="^([0-9a-f]{64})?$")]


@dataclass(frozen=True)
class LeftOut:
    """A source file that is not a usable image: no sample has its id."""

    __pydantic_config__ = _STRICT
    id: _Ids
    path: str
    reason: str


@dataclass(frozen=True)
class Split:
    """A split, ``train`` or ``val``.

    Ids are in [0, id_count). Of these ids ``samples`` are in the shards, and the others are left out.
    """

    __pydantic_config__ = _STRICT
    name: _Name
    samples: _Ids
    id_count: _Ids
    shards: tuple[Shard, ...]
    samples_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    max_width: _Side
    max_height: _Side
    left_out: tuple[LeftOut, ...] = ()
    targets_sha256: Annotated[str, Field(pattern="^([0-9a-f]{64})?$")] = ""
    """Digest of the table of targets, if images have any number of classes."""
    boxes_sha256: Annotated[str, Field(pattern="^([0-9a-f]{64})?$")] = ""
    """Digest of the table of boxes, if images have boxes."""
    box_offsets_sha256: Annotated[str, Field(pattern="^([0-9a-f]{64})?$")] = ""
    """Digest of the table that says which boxes an image has."""


@dataclass(frozen=True)
class Manifest:
    """The contents of ``manifest.json``. Everything except ``splits`` is known before the first image is read."""

    __pydantic_config__ = _STRICT
    tool: str
    image: Annotated[str, Field(pattern=rf"^{_IMAGE}(;{_IMAGE})*$")]
    """Extension of the image members: ``jpg`` or ``png``.

    Tars of other tools may have several, as in ``jpg;png``, which is how DALI's reader takes them.
    """
    classes: tuple[str, ...]
    """Class names in the order of their labels; none if images have no labels."""
    transform: dict[str, Any] = field(default_factory=dict)
    """The conversion of the images: options and their values."""
    plan: Annotated[dict[str, Any], AfterValidator(_check_plan)] = field(default_factory=dict)
    """Everything else that the bytes depend on: seed, shard size, digest of the source's listing."""
    splits: Annotated[dict[_Name, Split], Field(min_length=1)] = field(default_factory=dict)
    version: Literal[1] = VERSION
    task: ShardTaskName = "classification"
    """Whether an image has one class, any number of them, a mask (a class for each pixel), boxes, a copy, or no label.

    The file has this key in all cases but the first.
    """
    sha256: str = field(default="", compare=False)
    """Digest of the file that was read, which identifies the complete folder. It is not written to the file."""

    @property
    def is_foreign(self) -> bool:
        """Return whether the tars were written by another tool, and ``shards/index.py`` made only their tables."""
        return "members" in self.plan

    @property
    def num_classes(self) -> int:
        """Return the number of classes, including those without an image."""
        return len(self.classes)

    @property
    def scale(self) -> int:
        """Return how many times smaller the copies of the images are, along each side; 1 without copies."""
        return self.transform["scale"] if self.task == "super_resolution" else 1

    def values(self) -> dict[str, Any]:
        """Return the keys and values of the file."""
        values = {key: value for key, value in asdict(self).items() if key != "sha256"}
        if self.task == "classification":  # its files are the same bytes as before there were other tasks
            del values["task"]
        unused = [key for task, keys in _TABLES.items() if task != self.task for key in keys]
        for split in values["splits"].values():
            for key in unused:
                del split[key]
        return values


def read_manifest(folder: Path) -> Manifest:
    """Return the contents of ``folder/manifest.json``.

    Raises FileNotFoundError if there is no such file, and otherwise like ``parse_manifest``.
    """
    path = Path(folder) / MANIFEST
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"{path} does not exist: prepare the shards (shards/prepare_*.py), list those of another tool "
            "(shards/index.py), or let an interrupted preparation finish"
        ) from None
    return parse_manifest(content, str(path))


def parse_manifest(content: bytes, location: str) -> Manifest:
    """Return the contents of a manifest; ``location`` names it in errors.

    Raises DamagedFile if the contents are invalid or contradictory.
    """
    manifest = parse_document(content, location, Manifest, "copy it again, or prepare the shards again")
    if message := _wrong_classes(manifest):
        raise DamagedFile(f"{location}: classes: {message}; copy it again, or prepare the shards again")
    if manifest.task == "super_resolution" and manifest.transform.get("scale") not in COPY_SCALES:
        message = f"expected one of {COPY_SCALES}, got {manifest.transform.get('scale')!r}"
        raise DamagedFile(f"{location}: transform.scale: {message}; copy it again, or prepare the shards again")
    for name, split in manifest.splits.items():
        for key, message in _contradictions(name, split, manifest.task):
            raise DamagedFile(f"{location}: splits.{name}.{key}: {message}; copy it again, or prepare the shards again")
    return replace(manifest, sha256=hashlib.sha256(content).hexdigest())


def _wrong_classes(manifest: Manifest) -> str:
    """Return what is wrong with the number of classes; an empty string if nothing is."""
    if manifest.task == "segmentation" and manifest.num_classes > MOST_MASK_CLASSES:
        return f"{manifest.num_classes:,} classes, but a mask has {MOST_MASK_CLASSES} at most"
    if (manifest.num_classes == 0) != (manifest.task == "unlabelled"):
        return f"{manifest.num_classes:,} classes, and its task is {manifest.task}"
    return ""


def _contradictions(name: str, split: Split, task: str) -> Iterator[tuple[str, str]]:
    """Yield each key of a split that contradicts other keys, and a message about it."""
    for of_task, tables in _TABLES.items():
        for key, table in tables.items():
            if (has := bool(getattr(split, key))) != (task == of_task):
                yield key, f"a split of task: {task} has {'a' if has else 'no'} table of {table}"
    if split.name != name:
        yield "name", f"the split's own name is '{split.name}'"
    if (total := sum(shard.nsamples for shard in split.shards)) != split.samples:
        yield "samples", f"the shards have {total:,} samples, not {split.samples:,}"
    if split.samples > split.id_count:
        yield "id_count", f"{split.id_count:,} ids are not enough for all samples"
    if too_large := [entry.id for entry in split.left_out if entry.id >= split.id_count]:
        yield "left_out", f"id {too_large[0]} is not below the split's id_count of {split.id_count:,}"
    urls = [shard.url for shard in split.shards]
    if len(set(urls)) != len(urls):
        yield "shards", "a file is listed twice"
    if any(not shard.sha256 for shard in split.shards):
        yield "shards", "a file has no sha256"


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``folder/manifest.json`` atomically: a reader sees the old file or the complete new one."""
    text = json.dumps(manifest.values(), indent=1, sort_keys=True) + "\n"
    write_atomically(Path(folder) / MANIFEST, text.encode("ascii"))


class UnwritableFile(OSError):
    """A file that cannot be written; the message contains its path, the bytes needed, the bytes free and what to do.

    The message is its only argument, so that it can be pickled on its way out of a worker process.
    """


def unwritable(path: Path, needed: int, free: int | None, error: OSError) -> UnwritableFile:
    """Return the error of a file or folder that needs ``needed`` bytes (0: unknown) while ``free`` are free."""
    # The error of a library has no errno, and is nearly always caused by a full disk.
    full = error.errno in (None, errno.ENOSPC, errno.EDQUOT)
    need = f"{needed:,} bytes are needed" if needed else "its size is not known yet"
    room = f"{free:,} are free there" if free is not None else "the free space is unknown"
    if full and free is not None and free >= needed:
        room += ", unless a quota allows less"
    reason, advice = error.strerror or str(error), "make room there" if full else "fix that"
    return UnwritableFile(
        f"{path}: cannot be written ({reason}): {need}, {room}; {advice}, and run the same command again to continue"
    )


@contextmanager
def writing(path: Path, needed: int) -> Iterator[None]:
    """Check that there is room for ``needed`` bytes at ``path``, a file or folder that the code inside writes.

    Raises UnwritableFile if there is not enough room, and in place of every OSError inside.
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
    """Return the free bytes of a folder's disk, None if unknown. A quota may allow less."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return None
    return usage.free if usage.total else None


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a crash at any moment leaves either the old content or the complete new content.

    Raises UnwritableFile if it cannot be written; the old content then remains.
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
    """Flush a file to the disk, or a folder, whose renamed entries are then safe from a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
