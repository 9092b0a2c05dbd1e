"""Writer of shards: reproducible USTAR tars, DALI's index of each tar, and the sample table.

The bytes of a tar depend on its samples alone. A sample's key is its id, such as ``00000042``. It has four members:

- ``00000042.jpg`` or ``00000042.png``, the encoded image,
- ``00000042.cls``, the label as four ASCII digits, because DALI needs a fixed width,
- ``00000042.id.i64``, the id, because a plain ``.id`` breaks webdataset's ``decode``,
- ``00000042.wh.i32``, width and height in pixels.

The last two are little-endian integers. Where an image has any number of classes, there is a fifth member,
``00000042.labels.u8``. It has a byte for each class: 1 if the image has it, else 0. Where it has a mask, the fifth
member is ``00000042.mask.png``. Where it has a smaller copy, that is ``00000042.low.png``. Where it has boxes, there
are two more members: ``00000042.boxes.f32`` has six numbers for each box, and ``00000042.areas.f32`` its area
(``shards/boxes.py``). The label in ``cls`` is then 0000. An image without a label has no ``cls``.
"""

from __future__ import annotations

import hashlib
import io
import os
import struct
import tarfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import numpy as np

from shards.boxes import box_offsets, box_offsets_path, boxes_path, encode_boxes, no_boxes
from shards.manifest import Shard, free_bytes, sync_path, unwritable, write_atomically, writing
from shards.read import SAMPLE_DTYPE, sample_dtype, samples_path, targets_path

NO_LABEL = -1
"""Label in the sample table of an image without one."""
MAX_LABEL = 9_999
MAX_ID = 99_999_999
INDEX_VERSION = "v1.2"
_BLOCK = tarfile.BLOCKSIZE
_TARGET_MEMBERS = {
    "multilabel": ["labels.u8"],
    "segmentation": ["mask.png"],
    "detection": ["boxes.f32", "areas.f32"],
    "super_resolution": ["low.png"],
}
_PNG_MAGIC = b"\x89PNG"


class ShardWriter:
    """A writer of one tar and its index under temporary names; ``close`` flushes and renames them.

    As a context manager it removes the temporary file if it was not closed. All methods that write raise UnwritableFile
    if the disk is full or fails.
    """

    def __init__(self, path: Path, image: str) -> None:
        self.path = path
        self.image = image
        self._temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        with writing(path, 0):
            self._file = self._temporary.open("wb")
        self._hash = hashlib.sha256()
        self._offset = 0
        self._index: list[str] = []
        self.boxes: list[np.ndarray] = []
        """The boxes of each sample so far, where samples have boxes."""
        self._rows: list[tuple[int, ...]] = []
        self._task = "classification"

    def add(
        self,
        sample_id: int,
        label: int,
        image: bytes,
        width: int,
        height: int,
        targets: bytes | None = None,
        mask: bytes | None = None,
        boxes: np.ndarray | None = None,
        low: bytes | None = None,
    ) -> None:
        """Append a sample, with ``targets`` if it has several classes, an encoded ``mask``, ``boxes``, or a ``low``.

        The latter is the encoded smaller copy.

        Raises ValueError if the label or the id has too many digits.
        """
        if not NO_LABEL <= label <= MAX_LABEL:
            raise ValueError(f"label {label} does not fit the four digits of a cls member")
        if not 0 <= sample_id <= MAX_ID:
            raise ValueError(f"id {sample_id} does not fit the eight digits of a key")
        contents = [image, *([] if label == NO_LABEL else [b"%04d" % label])]
        contents += [struct.pack("<q", sample_id), struct.pack("<ii", width, height)]
        contents += [each for each in (targets, mask, low) if each is not None]
        if boxes is not None:
            contents += encode_boxes(boxes)
            self.boxes.append(boxes)
        self._task = "unlabelled" if label == NO_LABEL else _task_of(targets, mask, boxes, low)
        names = member_names(sample_id, image_extension(image, self.image), self._task)
        written = [self._add_member(*member) for member in zip(names, contents, strict=True)]
        offsets, entries = zip(*written, strict=True)
        row = (sample_id, label, 0, offsets[0], len(image), width, height)
        second = mask if mask is not None else low  # an image that belongs to the first
        self._rows.append(row if second is None else (*row, offsets[-1], len(second)))
        self._index.append(" ".join(entries))

    def close(self) -> tuple[Shard, np.ndarray]:
        """Finish the tar and return its record and its rows of the sample table, with ``shard`` 0."""
        self._write(bytes(2 * _BLOCK))
        with writing(self.path, 0):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        write_atomically(index_path(self.path), index_text(self._index).encode("ascii"))
        with writing(self.path, 0):
            self._temporary.rename(self.path)
            sync_path(self.path.parent)
        shard = Shard(self.path.name, len(self._rows), self._offset, self._hash.hexdigest())
        return shard, np.array(self._rows, sample_dtype(self._task))

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # on a full disk the rest of the buffer cannot be written
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _add_member(self, name: str, content: bytes) -> tuple[int, str]:
        """Write a member, and return the offset of its content and its entry in the index."""
        header = tarfile.TarInfo(name)  # no time, owner or host: its defaults are zeros, empty names and mode 0644
        header.size = len(content)
        self._write(header.tobuf(tarfile.USTAR_FORMAT))
        offset = self._offset
        self._write(content)
        self._write(bytes(-len(content) % _BLOCK))
        return offset, index_entry(name, offset, len(content))

    def _write(self, content: bytes) -> None:
        try:
            self._file.write(content)
        except OSError as error:
            raise unwritable(self.path, 0, free_bytes(self.path.parent), error) from error
        self._hash.update(content)
        self._offset += len(content)


def _task_of(targets: bytes | None, mask: bytes | None, boxes: np.ndarray | None, low: bytes | None) -> str:
    """Return the task of a sample with such targets."""
    given = {"multilabel": targets, "segmentation": mask, "detection": boxes, "super_resolution": low}
    return next((task for task, each in given.items() if each is not None), "classification")


def member_names(sample_id: int, image: str, task: str = "classification") -> tuple[str, ...]:
    """Return the names of a sample's members, in their order; ``image`` is the image's extension."""
    label = [] if task == "unlabelled" else ["cls"]
    extensions = (image, *label, "id.i64", "wh.i32", *_TARGET_MEMBERS.get(task, []))
    return tuple(f"{sample_id:08d}.{extension}" for extension in extensions)


def image_extension(image: bytes, extensions: str) -> str:
    """Return the extension of an encoded image: that of the manifest, or of ``jpg;png`` the one that it is."""
    if ";" not in extensions:
        return extensions
    return "png" if image.startswith(_PNG_MAGIC) else "jpg"


def index_entry(name: str, offset: int, size: int) -> str:
    """Return the entry of a member in its sample's line of the index."""
    return f"{name.partition('.')[2]} {offset} {size} {name}"


def index_text(lines: list[str]) -> str:
    """Return the index of a tar in the format of DALI's ``wds2idx``: one line per sample after the header."""
    return "".join(f"{line}\n" for line in (f"{INDEX_VERSION} {len(lines)}", *lines))


def index_path(tar: Path) -> Path:
    """Return the path of a tar's index."""
    return tar.with_suffix(".idx")


def write_samples(folder: Path, split: str, tables: list[np.ndarray]) -> tuple[np.ndarray, str]:
    """Write the sample table of a split from the rows of its shards, in order; return the table and its sha256."""
    samples = np.concatenate(tables) if tables else np.empty(0, SAMPLE_DTYPE)
    samples["shard"] = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
    return samples, _write_table(samples_path(folder, split), samples)


def write_targets(folder: Path, split: str, rows: list[bytes]) -> str:
    """Write the table of targets of a split, a row for each row of its sample table; return the file's sha256."""
    return _write_table(targets_path(folder, split), np.frombuffer(b"".join(rows), np.uint8).reshape(len(rows), -1))


def write_boxes(folder: Path, split: str, boxes: list[np.ndarray]) -> tuple[str, str]:
    """Write the boxes of each row of a split's sample table; return the digests of the tables of boxes and offsets."""
    table = np.concatenate([no_boxes(), *boxes])
    return (
        _write_table(boxes_path(folder, split), table),
        _write_table(box_offsets_path(folder, split), box_offsets(boxes)),
    )


def _write_table(path: Path, table: np.ndarray) -> str:
    """Write a table as an array file, and return its sha256."""
    buffer = io.BytesIO()
    np.save(buffer, table, allow_pickle=False)
    content = buffer.getvalue()
    write_atomically(path, content)
    return hashlib.sha256(content).hexdigest()
