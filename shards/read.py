"""Read samples by their place in storage: a memory-mapped sample table, and views into memory-mapped tars.

N samples of a split.
"""

from __future__ import annotations

import mmap
import resource
import threading
from pathlib import Path

import numpy as np

from shards.manifest import Manifest, read_manifest

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
    memory-mapped. ``manifest`` is the folder's, where it was read already. Raises FileNotFoundError or
    ValueError, one line, where the folder is not whole.
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

        May be called from any thread. The first touch of a page reads it from the disk.
        """
        views = []
        samples = self.samples[rows]
        for shard, offset, size in zip(
            samples["shard"].tolist(), samples["offset"].tolist(), samples["size"].tolist(), strict=True
        ):
            tar = self._tars.get(shard)
            if tar is None:
                tar = self._map_tar(shard)
            views.append(tar[offset : offset + size])
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
                raise FileNotFoundError(f"{path} is missing: copy it again, or run the preparation again")
            if path.stat().st_size != shard.filesize:
                raise ValueError(
                    f"{path} has {path.stat().st_size:,} bytes, the manifest says {shard.filesize:,}: "
                    "copy it again, or run the preparation again"
                )

    def _map_samples(self) -> np.ndarray:
        path = samples_path(self.folder, self.split.name)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: copy it again, or run the preparation again")
        try:
            samples = np.load(path, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise ValueError(f"{path} is not a sample table ({error}): run the preparation again") from None
        if samples.dtype != SAMPLE_DTYPE or samples.shape != (self.split.samples,):
            raise ValueError(f"{path} does not fit the manifest's {self.split.samples:,} samples: copy it again")
        return samples

    def _map_tar(self, shard: int) -> np.ndarray:
        with self._lock:
            if shard not in self._tars:
                path = self.folder / self.split.shards[shard].url
                with path.open("rb") as file:
                    tar = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                # A plain array over the map: slices of np.memmap cost ten times as much.
                self._tars[shard] = np.frombuffer(tar, np.uint8)
            return self._tars[shard]


def allow_open_files(count: int) -> None:
    """Raise the limit of this process for files that are to be memory-mapped, as far as it may be raised."""
    # Python keeps a descriptor open for every map, and 1,024 (ImageNet has more shards) is a usual soft limit.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        wanted = soft + count if hard == resource.RLIM_INFINITY else min(soft + count, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
