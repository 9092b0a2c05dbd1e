"""Read samples by their place in storage: a memory-mapped sample table, and views into memory-mapped tars.

N samples of a split.
"""

from __future__ import annotations

import mmap
import os
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from io import BufferedReader
from pathlib import Path

import numpy as np

from shards.manifest import MANIFEST_ADVICE, Manifest, Shard, Split, read_manifest, sha256_of

SPARE_FILES = 64
"""Descriptors that are left to all else in this process."""

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
"""A row of the sample table. ``offset`` and ``size`` (bytes) say where in its tar the encoded image lies."""


def samples_path(folder: Path, split: str) -> Path:
    """Return the path of a split's sample table."""
    return Path(folder) / f"{split}.samples.npy"


class SplitReader:
    """One split of a folder of shards.

    ``samples`` [N] is the sample table in storage order (shard by shard, and by position within), read-only and
    memory-mapped, and held against its digest. ``manifest`` is the folder's, where it was read already. Raises
    FileNotFoundError or ValueError, one line, where the folder is not whole.
    """

    def __init__(self, folder: Path, split: str, manifest: Manifest | None = None) -> None:
        self.folder = Path(folder)
        self.manifest = manifest or read_manifest(self.folder)
        if split not in self.manifest.splits:
            raise ValueError(f"{self.folder} holds no split '{split}', only {', '.join(sorted(self.manifest.splits))}")
        self.split = self.manifest.splits[split]
        self.samples = self._map_samples()
        self._tars: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()
        allow_open_files(len(self.split.shards))

    def bytes(self, rows: np.ndarray) -> list[np.ndarray]:
        """Return the encoded images of some rows of ``samples`` as uint8 views into the tars, nothing copied.

        May be called from any thread. The first touch of a page reads it from the disk. Where this process may not
        open as many files as there are tars, images of some are read at once. Raises FileNotFoundError or ValueError,
        one line, for a tar that is gone or has another size.
        """
        views = []
        samples = self.samples[rows]
        for shard, offset, size in zip(
            samples["shard"].tolist(), samples["offset"].tolist(), samples["size"].tolist(), strict=True
        ):
            tar = self._tars.get(shard)
            if tar is None:
                tar = self._map_tar(shard)
            views.append(self._read(shard, offset, size) if tar is None else tar[offset : offset + size])
        return views

    def labels_by_id(self) -> np.ndarray:
        """Return the label of every id, int64 [id_count]; −1 where the id is a hole."""
        labels = np.full(self.split.id_count, -1, np.int64)
        labels[self.samples["id"]] = self.samples["label"]
        return labels

    def check_sizes(self) -> None:
        """Compare the size of every tar with the manifest: quick, and enough to notice a copy that did not finish."""
        for shard in self.split.shards:
            path = self.folder / shard.url
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing: {MANIFEST_ADVICE}")
            _check_size(path, path.stat(), shard)

    def _map_samples(self) -> np.ndarray:
        path = samples_path(self.folder, self.split.name)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: {MANIFEST_ADVICE}")
        status = path.stat()
        stamp = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        _prove_samples(path, stamp, self.split, self.manifest.num_classes)
        return load_samples(path)

    def _map_tar(self, shard: int) -> np.ndarray | None:
        """Map a tar and keep it; None where that would use up the files that this process may open."""
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
        # A page of a map that lies behind the file's end kills the process, so the size is looked at here again.
        path = self.folder / self.split.shards[shard].url
        with path.open("rb") as file:
            _check_size(path, os.fstat(file.fileno()), self.split.shards[shard])
            yield file


def _next_descriptor(file: int) -> int:
    # The lowest number that is free, and the one that a map of the file, which keeps one, would get.
    descriptor = os.dup(file)
    os.close(descriptor)
    return descriptor


def load_samples(path: Path) -> np.ndarray:
    """Map a sample table, whatever its numbers are. Raises ValueError where the file is none."""
    try:
        samples = np.lib.format.open_memmap(path, mode="r")  # an .npy alone, without pickled objects
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is not a sample table ({error}): {MANIFEST_ADVICE}") from None
    if samples.dtype != SAMPLE_DTYPE or samples.ndim != 1:
        raise ValueError(f"{path} is not a sample table: {MANIFEST_ADVICE}")
    return samples


def _check_size(path: Path, status: os.stat_result, shard: Shard) -> None:
    if status.st_size != shard.filesize:
        raise ValueError(
            f"{path} has {status.st_size:,} bytes, the manifest says {shard.filesize:,}: {MANIFEST_ADVICE}"
        )


@lru_cache(maxsize=64)
def _prove_samples(path: Path, stamp: tuple[int, ...], split: Split, num_classes: int) -> None:
    """Hold a sample table against the manifest: its digest, and every number in it.

    A process does so once for a file as it is (``stamp``): ImageNet's 51 MB take it less than a second. Nothing is
    remembered on the disk, where it would have to be proved itself. Raises ValueError, one line.
    """
    if sha256_of(path) != split.samples_sha256:
        raise ValueError(f"{path} has another sha256 than the manifest says: {MANIFEST_ADVICE}")
    samples = load_samples(path)
    if len(samples) != split.samples:
        raise ValueError(f"{path} has {len(samples):,} rows, the manifest says {split.samples:,}: {MANIFEST_ADVICE}")
    for row, column, why in _wrong_rows(samples, split, num_classes):
        raise ValueError(f"{path}: {column} of row {row:,} is {samples[column][row]}, {why}: {MANIFEST_ADVICE}")


def _wrong_rows(samples: np.ndarray, split: Split, num_classes: int) -> Iterator[tuple[int, str, str]]:
    """Yield the first row whose value cannot be, for each column of a table that has one, and why it cannot."""
    sizes = np.array([shard.filesize for shard in split.shards], np.int64)
    shards = np.repeat(np.arange(len(sizes)), [shard.nsamples for shard in split.shards])
    room = sizes[shards]
    order = np.argsort(samples["id"], kind="stable")
    ids = samples["id"][order]
    again = np.zeros(len(samples), np.bool_)
    again[order[1:]] = ids[1:] == ids[:-1]
    for column, wrong, why in (
        ("id", _outside(samples["id"], 0, split.id_count), f"which must lie below {split.id_count:,}"),
        ("id", again, "which comes more than once"),
        ("label", _outside(samples["label"], 0, num_classes), f"where there are {num_classes:,} classes"),
        ("shard", samples["shard"] != shards, "where the manifest has another"),
        ("offset", _outside(samples["offset"], 0, room + 1), "outside of its tar"),
        ("size", _outside(samples["size"], 0, room - samples["offset"] + 1), "beyond its tar's end"),
        ("width", _outside(samples["width"], 1, split.max_width + 1), f"of at most {split.max_width:,}"),
        ("height", _outside(samples["height"], 1, split.max_height + 1), f"of at most {split.max_height:,}"),
    ):
        if wrong.any():
            yield int(wrong.argmax()), column, why


def _outside(values: np.ndarray, low: int, end: int | np.ndarray) -> np.ndarray:
    return (values < low) | (values >= end)


def allow_open_files(count: int) -> None:
    """Raise the limit of this process for files that are to be memory-mapped, as far as it may be raised."""
    # Python keeps a descriptor open for every map, and 1,024 (ImageNet has more shards) is a usual soft limit.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        wanted = soft + count if hard == resource.RLIM_INFINITY else min(soft + count, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
