"""Random access to samples: a memory-mapped sample table, and views into memory-mapped tars.

N is the number of samples of a split.
"""

from __future__ import annotations

import mmap
import os
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from io import BufferedReader
from pathlib import Path

import numpy as np

from shards.boxes import box_offsets_path, boxes_path, find_wrong_box, load_box_offsets, load_boxes
from shards.manifest import MANIFEST_ADVICE, Manifest, Shard, Split, read_manifest, sha256_of

SPARE_FILES = 64
"""File descriptors that stay free for everything else in this process."""

SAMPLE_DTYPE = np.dtype(
    [
        ("id", "<i8"),
        ("label", "<i4"),
        ("shard", "<i4"),
        ("offset", "<i8"),
        ("size", "<i8"),
        ("width", "<i4"),
        ("height", "<i4"),
    ]
)
"""A row of the sample table. ``offset`` and ``size`` are the position of the encoded image in its tar, in bytes."""
MASKED_SAMPLE_DTYPE = np.dtype([*SAMPLE_DTYPE.descr, ("mask_offset", "<i8"), ("mask_size", "<i8")])
"""The row of a sample that has a mask, and the position of its encoded mask in the same tar."""
PAIRED_SAMPLE_DTYPE = np.dtype([*SAMPLE_DTYPE.descr, ("low_offset", "<i8"), ("low_size", "<i8")])
"""The row of a sample that has a smaller copy, and the position of the encoded copy in the same tar."""


def sample_dtype(task: str) -> np.dtype:
    """Return the type of a row of the sample table, by the task of the manifest."""
    return {"segmentation": MASKED_SAMPLE_DTYPE, "super_resolution": PAIRED_SAMPLE_DTYPE}.get(task, SAMPLE_DTYPE)


def samples_path(folder: Path, split: str) -> Path:
    """Return the path of a split's sample table."""
    return Path(folder) / f"{split}.samples.npy"


def targets_path(folder: Path, split: str) -> Path:
    """Return the path of a split's table of targets, which shards of several classes an image have."""
    return Path(folder) / f"{split}.targets.npy"


class SplitReader:
    """One split of a folder of shards.

    ``samples`` [N] is the sample table, read-only and memory-mapped. Its rows are in storage order, by shard and by
    position in the shard. ``targets`` are the classes of each row's image, uint8 [N, K] with 1 for a class that it has.
    It is None for other tasks. Both are checked against their digests. Pass ``manifest`` if it has been read already.
    Raises FileNotFoundError or ValueError if the folder is damaged or incomplete.
    """

    def __init__(self, folder: Path, split: str, manifest: Manifest | None = None) -> None:
        self.folder = Path(folder)
        self.manifest = manifest or read_manifest(self.folder)
        if split not in self.manifest.splits:
            raise ValueError(
                f"{self.folder} contains no split '{split}', only {', '.join(sorted(self.manifest.splits))}"
            )
        self.split = self.manifest.splits[split]
        dtype = sample_dtype(self.manifest.task)
        self.samples = self._map_table(
            samples_path(self.folder, split),
            partial(_check_samples, dtype=dtype),
            partial(load_samples, dtype=dtype),
        )
        self.targets: np.ndarray | None = None
        if self.split.targets_sha256:
            self.targets = self._map_table(targets_path(self.folder, split), _check_targets, load_targets)
        self._box_offsets, self._boxes = np.empty(0, np.int64), np.empty(0, np.float32)
        if self.has_boxes:
            offsets = box_offsets_path(self.folder, split)
            # Plain arrays over the maps: slices of np.memmap cost ten times as much.
            self._box_offsets = self._map_table(offsets, _check_box_offsets, load_box_offsets).view(np.ndarray)
            self._boxes = self._map_table(boxes_path(self.folder, split), _check_boxes, load_boxes).view(np.ndarray)
        self._tars: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()
        allow_open_files(len(self.split.shards))

    def bytes(self, rows: np.ndarray) -> list[np.ndarray]:
        """Return the encoded images of some rows of ``samples`` as uint8 views into the tars, without a copy.

        It may be called from any thread. The first access to a page reads it from the disk. If this process may not
        open all tars at the same time, the images of some tars are copied instead. Raises FileNotFoundError or
        ValueError for a tar that is missing or has another size.
        """
        return self._views(rows, "offset", "size")

    @property
    def has_masks(self) -> bool:
        """Return whether every image has a mask."""
        return self.manifest.task == "segmentation"

    def masks(self, rows: np.ndarray) -> list[np.ndarray]:
        """Return the encoded masks of some rows of ``samples``, as ``bytes`` returns the images.

        A mask is a grey PNG of 8 bits, of its image's size. Raises ValueError if the shards have none.
        """
        if not self.has_masks:
            raise ValueError(f"{self.folder} has no masks: its task is {self.manifest.task}")
        return self._views(rows, "mask_offset", "mask_size")

    @property
    def has_copies(self) -> bool:
        """Return whether every image has a smaller copy, ``manifest.scale`` times smaller along each side."""
        return self.manifest.task == "super_resolution"

    def copies(self, rows: np.ndarray) -> list[np.ndarray]:
        """Return the encoded smaller copies of some rows of ``samples``, as ``bytes`` returns the images.

        A copy is a PNG of red, green and blue. Raises ValueError if the shards have none.
        """
        if not self.has_copies:
            raise ValueError(f"{self.folder} has no smaller copies: its task is {self.manifest.task}")
        return self._views(rows, "low_offset", "low_size")

    @property
    def has_boxes(self) -> bool:
        """Return whether every image has boxes, or none because nothing is in it."""
        return self.manifest.task == "detection"

    def boxes(self, rows: np.ndarray) -> list[np.ndarray]:
        """Return the boxes of some rows of ``samples``, float32 [n, 7] each, as views into their table.

        The columns are ``shards.boxes.BOX_COLUMNS``. Raises ValueError if the shards have no boxes.
        """
        if not self.has_boxes:
            raise ValueError(f"{self.folder} has no boxes: its task is {self.manifest.task}")
        starts, ends = self._box_offsets[rows].tolist(), self._box_offsets[rows + 1].tolist()
        return [self._boxes[start:end] for start, end in zip(starts, ends, strict=True)]

    def labels_by_id(self, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Return the label of every id, int64 [id_count]; −1 for an id that is not in those ``rows`` of ``samples``."""
        labels = np.full(self.split.id_count, -1, np.int64)
        samples = self.samples[rows]
        labels[samples["id"]] = samples["label"]
        return labels

    def classes_in_use(self) -> set[int]:
        """Return the classes that have an image; all of them where only masks say it, which are not read here."""
        if self.has_masks:
            return set(range(self.manifest.num_classes))
        if self.has_boxes:
            return set(np.unique(self._boxes[:, 4]).astype(np.int64).tolist())
        if self.targets is None:
            return set(np.unique(self.samples["label"]).tolist())
        return set(np.flatnonzero(self.targets.any(axis=0)).tolist())

    @property
    def strata(self) -> np.ndarray:
        """Return the class of each row over which choices of images are even, int64 [N].

        Of several classes it is the rarest. Images with masks or boxes are all of one.
        """
        return self.samples["label"].astype(np.int64) if self.targets is None else rarest_class(self.targets)

    def check_sizes(self) -> None:
        """Check the size of every tar: a quick test that finds an unfinished copy. Raises like ``bytes``."""
        for shard in self.split.shards:
            path = self.folder / shard.url
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing: {MANIFEST_ADVICE}")
            _check_size(path, path.stat(), shard)

    def _views(self, rows: np.ndarray, offset: str, size: str) -> list[np.ndarray]:
        """Return the bytes at the positions in two columns of some rows, as views where the tar is mapped."""
        views = []
        samples = self.samples[rows]
        for shard, start, length in zip(
            samples["shard"].tolist(), samples[offset].tolist(), samples[size].tolist(), strict=True
        ):
            tar = self._tars.get(shard)
            if tar is None:
                tar = self._map_tar(shard)
            views.append(self._read(shard, start, length) if tar is None else tar[start : start + length])
        return views

    def _map_table(self, path: Path, check: Callable[..., None], load: Callable[[Path], np.ndarray]) -> np.ndarray:
        """Return a table of the split, memory-mapped, after ``check`` of its digest and its values."""
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: {MANIFEST_ADVICE}")
        status = path.stat()
        # A changed file has another of these, and is checked again.
        stamp = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        check(path, stamp, self.split, self.manifest.num_classes)
        return load(path)

    def _map_tar(self, shard: int) -> np.ndarray | None:
        """Return a tar as memory-mapped bytes, mapped once; None if too few file descriptors would stay free."""
        with self._lock:
            if shard not in self._tars:
                with self._open(shard) as file:
                    if _next_descriptor(file.fileno()) + SPARE_FILES >= resource.getrlimit(resource.RLIMIT_NOFILE)[0]:
                        return None
                    tar = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                # A plain array over the map: slices of np.memmap cost ten times as much.
                self._tars[shard] = np.frombuffer(tar, np.uint8)
            return self._tars[shard]

    def _read(self, shard: int, offset: int, size: int) -> np.ndarray:
        with self._open(shard) as file:
            return np.frombuffer(os.pread(file.fileno(), size, offset), np.uint8)

    @contextmanager
    def _open(self, shard: int) -> Iterator[BufferedReader]:
        # Access to a mapped page after the end of a file kills the process (SIGBUS). So the size is checked here again.
        path = self.folder / self.split.shards[shard].url
        with path.open("rb") as file:
            _check_size(path, os.fstat(file.fileno()), self.split.shards[shard])
            yield file


def _next_descriptor(file: int) -> int:
    # The lowest free number. A mapped file keeps a descriptor, and would get this one.
    descriptor = os.dup(file)
    os.close(descriptor)
    return descriptor


def load_samples(path: Path, dtype: np.dtype = SAMPLE_DTYPE) -> np.ndarray:
    """Return a sample table of such rows, memory-mapped; its values are not checked.

    Raises ValueError for any other file.
    """
    try:
        samples = np.lib.format.open_memmap(path, mode="r")  # reads .npy files only, and refuses pickled objects
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is not a sample table ({error}): {MANIFEST_ADVICE}") from None
    if samples.dtype != dtype or samples.ndim != 1:
        raise ValueError(f"{path} is not a sample table: {MANIFEST_ADVICE}")
    return samples


def rarest_class(targets_NK: np.ndarray) -> np.ndarray:
    """Return the class of each image that the fewest images have, int64 [N]; K for an image without any class."""
    counts = targets_NK.sum(axis=0, dtype=np.int64)
    # Classes of equal size keep the order of their numbers.
    by_size = np.argsort(counts, kind="stable")
    return np.where(targets_NK.any(axis=1), by_size[targets_NK[:, by_size].argmax(axis=1)], targets_NK.shape[1])


def load_targets(path: Path) -> np.ndarray:
    """Return a table of targets, memory-mapped; its values are not checked. Raises ValueError for any other file."""
    try:
        targets = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is not a table of targets ({error}): {MANIFEST_ADVICE}") from None
    if targets.dtype != np.uint8 or targets.ndim != 2:
        raise ValueError(f"{path} is not a table of targets: {MANIFEST_ADVICE}")
    return targets


def _check_size(path: Path, status: os.stat_result, shard: Shard) -> None:
    if status.st_size != shard.filesize:
        raise ValueError(
            f"{path} has {status.st_size:,} bytes, but {shard.filesize:,} in the manifest: {MANIFEST_ADVICE}"
        )


@lru_cache(maxsize=64)
def _check_samples(path: Path, stamp: tuple[int, ...], split: Split, num_classes: int, dtype: np.dtype) -> None:
    """Check a sample table against the manifest: its digest, and every value in it.

    A process does this once for each ``stamp``, the state of the file. ImageNet's table of 51 MB takes less than a
    second. The result is not stored on disk, because a stored result would need a check, too. Raises
    ValueError if a check fails.
    """
    if sha256_of(path) != split.samples_sha256:
        raise ValueError(f"{path} has a sha256 that differs from the manifest: {MANIFEST_ADVICE}")
    samples = load_samples(path, dtype)
    if len(samples) != split.samples:
        raise ValueError(f"{path} has {len(samples):,} rows, but {split.samples:,} in the manifest: {MANIFEST_ADVICE}")
    for row, column, reason in _wrong_rows(samples, split, num_classes):
        raise ValueError(f"{path}: {column} of row {row:,} is {samples[column][row]}, {reason}: {MANIFEST_ADVICE}")


@lru_cache(maxsize=64)
def _check_targets(path: Path, stamp: tuple[int, ...], split: Split, num_classes: int) -> None:
    """Check a table of targets against the manifest, once for each ``stamp``, as ``_check_samples`` does."""
    if sha256_of(path) != split.targets_sha256:
        raise ValueError(f"{path} has a sha256 that differs from the manifest: {MANIFEST_ADVICE}")
    targets = load_targets(path)
    if targets.shape != (split.samples, num_classes) or targets.max(initial=0) > 1:
        raise ValueError(
            f"{path} is not {split.samples:,} rows of {num_classes:,} zeros and ones, one for each sample and class: "
            f"{MANIFEST_ADVICE}"
        )


@lru_cache(maxsize=64)
def _check_box_offsets(path: Path, stamp: tuple[int, ...], split: Split, num_classes: int) -> None:
    """Check the table of the boxes' offsets against the manifest, once for each ``stamp``."""
    if sha256_of(path) != split.box_offsets_sha256:
        raise ValueError(f"{path} has a sha256 that differs from the manifest: {MANIFEST_ADVICE}")
    if (count := len(load_box_offsets(path)) - 1) != split.samples:
        raise ValueError(f"{path} is of {count:,} images, but {split.samples:,} in the manifest: {MANIFEST_ADVICE}")


@lru_cache(maxsize=64)
def _check_boxes(path: Path, stamp: tuple[int, ...], split: Split, num_classes: int) -> None:
    """Check a table of boxes against the manifest, once for each ``stamp``, after sample table and offsets."""
    if sha256_of(path) != split.boxes_sha256:
        raise ValueError(f"{path} has a sha256 that differs from the manifest: {MANIFEST_ADVICE}")
    boxes, offsets = load_boxes(path), load_box_offsets(box_offsets_path(path.parent, split.name))
    if len(boxes) != offsets[-1]:
        raise ValueError(f"{path} has {len(boxes):,} boxes, the table of offsets {offsets[-1]:,}: {MANIFEST_ADVICE}")
    samples, counts = load_samples(samples_path(path.parent, split.name)), np.diff(offsets)
    widths, heights = (np.repeat(samples[side], counts) for side in ("width", "height"))
    if wrong := find_wrong_box(boxes, widths, heights, num_classes):
        raise ValueError(f"{path}: the box of row {wrong[0]:,} {wrong[1]}: {MANIFEST_ADVICE}")


def _wrong_rows(samples: np.ndarray, split: Split, num_classes: int) -> Iterator[tuple[int, str, str]]:
    """Yield the first row with an invalid value of each column, the column, and the reason."""
    sizes = np.array([shard.filesize for shard in split.shards], np.int64)
    shards = np.repeat(np.arange(len(sizes)), [shard.nsamples for shard in split.shards])
    tar_sizes = sizes[shards]
    order = np.argsort(samples["id"], kind="stable")
    ids = samples["id"][order]
    repeated = np.zeros(len(samples), np.bool_)
    repeated[order[1:]] = ids[1:] == ids[:-1]
    lowest = 0 if num_classes else -1  # without classes, images have no labels
    # After these checks every image and mask is inside of its tar, and ids and labels are valid indices.
    for column, wrong, reason in (
        ("id", _outside(samples["id"], 0, split.id_count), f"not from 0 to {split.id_count - 1:,}"),
        ("id", repeated, "which is used more than once"),
        ("label", _outside(samples["label"], lowest, num_classes), f"but there are {num_classes:,} classes"),
        ("shard", samples["shard"] != shards, "but the manifest has another"),
        *_wrong_positions(samples, "", tar_sizes),
        *(_wrong_positions(samples, "mask_", tar_sizes) if samples.dtype == MASKED_SAMPLE_DTYPE else ()),
        *(_wrong_positions(samples, "low_", tar_sizes) if samples.dtype == PAIRED_SAMPLE_DTYPE else ()),
        ("width", _outside(samples["width"], 1, split.max_width + 1), f"not from 1 to {split.max_width:,}"),
        ("height", _outside(samples["height"], 1, split.max_height + 1), f"not from 1 to {split.max_height:,}"),
    ):
        if wrong.any():
            yield int(wrong.argmax()), column, reason


def _wrong_positions(samples: np.ndarray, prefix: str, tar_sizes: np.ndarray) -> Iterator[tuple[str, np.ndarray, str]]:
    """Yield the columns of a position in a tar, whether each row's value is wrong, and the reason."""
    offset, size = f"{prefix}offset", f"{prefix}size"
    yield offset, _outside(samples[offset], 0, tar_sizes + 1), "outside of its tar"
    yield size, _outside(samples[size], 0, tar_sizes - samples[offset] + 1), "beyond its tar's end"


def _outside(values: np.ndarray, low: int, end: int | np.ndarray) -> np.ndarray:
    return (values < low) | (values >= end)


def allow_open_files(count: int) -> None:
    """Raise this process's limit of open files by ``count``, or as far as allowed."""
    # Every mapped file keeps a descriptor. A usual soft limit is 1,024, and ImageNet has more shards.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        wanted = soft + count if hard == resource.RLIM_INFINITY else min(soft + count, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
