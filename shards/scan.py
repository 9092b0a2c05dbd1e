"""Reading of a shard's tar headers, as the reference for its index, its sample table and the manifest."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from shards.archives import DamagedArchive, Member, list_members
from shards.boxes import decode_boxes
from shards.manifest import Shard, sha256_of
from shards.read import sample_dtype
from shards.write import NO_LABEL, index_entry, index_path, index_text, member_names


class Scan(NamedTuple):
    """A tar's rows of the sample table, with ``shard`` 0, and the expected text of its index."""

    rows: np.ndarray
    index_text: str
    targets: list[bytes] = []  # noqa: RUF012
    """The classes of each row's image, where it has any number of them."""
    boxes: list[np.ndarray] = []  # noqa: RUF012
    """The boxes of each row's image, float32 [n, 7], where it has boxes."""


def is_on_record(path: Path, shard: Shard) -> bool:
    """Return whether the file exists and is identical to the recorded one."""
    return path.is_file() and path.stat().st_size == shard.filesize and sha256_of(path) == shard.sha256


def index_fits(tar: Path, scan: Scan) -> bool:
    """Return whether a tar's index exists and is correct."""
    path = index_path(tar)
    return path.is_file() and path.read_bytes() == scan.index_text.encode()


def scan_shard(path: Path, image: str, task: str = "classification") -> Scan:
    """Return the rows and index text of a tar, from its headers and small members.

    ``image`` and ``task`` are those of the manifest. Raises ValueError for damage.
    """
    size = len(member_names(0, image, task))
    try:
        with path.open("rb") as file:
            members = list_members(path, file)
            samples = [members[start : start + size] for start in range(0, len(members), size)]
            rows = [_read_row(file, sample, image, task) for sample in samples]
            targets = [_read(file, sample[-1]) for sample in samples] if task == "multilabel" else []
            boxes = [_read_boxes(file, sample) for sample in samples] if task == "detection" else []
    except DamagedArchive:
        raise
    except (struct.error, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    lines = [" ".join(index_entry(*member) for member in sample) for sample in samples]
    return Scan(np.array(rows, sample_dtype(task)), index_text(lines), targets, boxes)


def _read_row(file: BinaryIO, sample: list[Member], image: str, task: str) -> tuple[int, ...]:
    picture, *small = sample
    if len(sample) != len(member_names(0, image, task)):
        raise ValueError(f"the sample of {picture.name} is incomplete")
    label = NO_LABEL if task == "unlabelled" else _read_label(file, small.pop(0))
    sample_id, sides = (_read(file, member) for member in small[:2])
    row = (*struct.unpack("<q", sample_id), label, 0, picture.offset, picture.size, *struct.unpack("<ii", sides))
    names = tuple(member.name for member in sample)
    # All members must belong to the same id, in the order in which they are written.
    if names not in [member_names(row[0], extension, task) for extension in image.split(";")]:
        raise ValueError(f"id {row[0]} has the members {', '.join(names)}")
    has_second = len(sample_dtype(task).names or ()) > len(row)  # the position of the image that belongs to the first
    return (*row, small[-1].offset, small[-1].size) if has_second else row


def _read_label(file: BinaryIO, member: Member) -> int:
    label = _read(file, member)
    if len(label) != 4 or not label.isdigit():
        raise ValueError(f"{member.name} is not a label of four digits")
    return int(label)


def _read_boxes(file: BinaryIO, sample: list[Member]) -> np.ndarray:
    boxes, areas = (_read(file, member) for member in sample[-2:])
    try:
        return decode_boxes(boxes, areas)
    except ValueError as error:
        raise ValueError(f"{sample[-2].name}: {error}") from None


def _read(file: BinaryIO, member: Member) -> bytes:
    file.seek(member.offset)
    return file.read(member.size)
