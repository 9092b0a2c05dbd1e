"""The files of a cache of teacher outputs.

    cache.json                    the teacher, images and shards of the outputs, and the kinds of output
    view-03.logits.npy            float16 [N, K], one row per id; zeros for an id without a sample
    view-03.logits.sha256.npy     uint8 [blocks, 32], the digest of each block of rows; zeros until it is written
    stage4.encoder.safetensors    the encoder of a stage whose maps are stored as principal components

A kind of output is ``logits`` or a stage by its canonical name. Nothing in the folder is ever executed: it contains
JSON, tensors, and arrays without pickle. N ids, B rows of a batch, K classes, C channels, H W space.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, PositiveInt, StringConstraints

from pipeline.features import pca
from pipeline.features.names import canonical, deep_stages
from pipeline.features.pca import Encoder
from pipeline.frozen_model import FrozenModel
from shards.documents import read_document
from shards.manifest import write_atomically

HEADER = "cache.json"
LOGITS = "logits"
DTYPE = np.dtype("<f2")
DIGEST = 32
"""Bytes of a sha256 digest."""

MEND_HINT = (
    "copy the cache again, or repair it: cache_teacher.py --verify RECIPE marks damaged blocks, "
    "and the same command without --verify writes them again"
)

NAME = r"[a-z][a-z0-9_]*(\.[a-z]+)?(\.p[0-9]+)?"
"""Pattern of the name of a kind, such as ``stage3.preact`` or ``head.class.p3``.

It becomes part of a file name, and the cache may come from another user.
"""
Name = Annotated[str, StringConstraints(pattern=f"^{NAME}$")]
Shape = tuple[PositiveInt, ...]


class Encoding(FrozenModel):
    """The encoding of a kind that is stored as principal components."""

    rank: PositiveInt
    """Number of principal components of its channels."""
    sha256: str
    """Sha256 of the encoder's file."""
    unexplained: float
    """Share of the variance that the encoding loses, on images that the encoder was not fitted on."""


class StoredNorm(FrozenModel):
    """The BatchNorm at the end of a ``.preact`` stage, as it was before folding; one number per channel."""

    weight: tuple[float, ...]
    bias: tuple[float, ...]


class CacheEntry(FrozenModel):
    """The description of one kind of output."""

    shape: Shape
    """Shape of an output, without the batch."""
    encoded: Encoding | None = None
    norm: StoredNorm | None = None

    @property
    def stored(self) -> Shape:
        """Return the shape of a row on disk."""
        return (self.encoded.rank, *self.shape[1:]) if self.encoded else self.shape

    @property
    def row_bytes(self) -> int:
        """Return the bytes of a row on disk."""
        return DTYPE.itemsize * int(np.prod(self.stored))


class Provenance(FrozenModel):
    """The facts that determine the outputs, besides id, view and batch size. Other facts need another cache."""

    teacher: dict[str, Any]
    data: dict[str, Any]
    shards: str
    """Sha256 of the shards' manifest."""


class Header(FrozenModel):
    """The contents of ``cache.json``."""

    version: Literal[1] = 1
    views: PositiveInt
    id_count: PositiveInt
    batch: PositiveInt
    """Images per forward of the teacher; the last bits of its outputs depend on it."""
    block: PositiveInt
    """Rows of a block, which are written, checked and marked as written together."""
    stages: tuple[str, ...]
    """Names of the teacher's stages, to resolve tap names such as ``last``."""
    kinds: Annotated[dict[Name, CacheEntry], Field(min_length=1)]
    binding: Provenance

    @property
    def blocks(self) -> int:
        """Return the number of blocks of a view."""
        return -(-self.id_count // self.block)  # rounded up

    def row_bytes(self, kinds: Iterable[str]) -> int:
        """Return the bytes on disk of an image's outputs of those kinds."""
        return sum(self.kinds[kind].row_bytes for kind in kinds)

    def ids(self, block: int) -> range:
        """Return the ids of a block; id i is stored in row i."""
        return range(block * self.block, min((block + 1) * self.block, self.id_count))

    def chunks(self, block: int) -> list[range]:
        """Return the ids of a block in chunks of the teacher's batch size; the last may be shorter."""
        ids = self.ids(block)
        return [ids[start : start + self.batch] for start in range(0, len(ids), self.batch)]


def kinds_by_tap(stages: Iterable[str], taps: Iterable[str]) -> dict[str, str]:
    """Return the kind of output of each tap of a network with those stages; ``all`` becomes one tap per stage."""
    names = dict.fromkeys(stages, "")
    return {tap: canonical(names, tap) for wanted in taps for tap in deep_stages(names, wanted)}


class Cache:
    """A cache folder of teacher outputs. ``header`` is given for a folder that is still to be written.

    Raises FileNotFoundError or ValueError, one line, for a missing or invalid file.
    """

    def __init__(self, folder: Path, header: Header | None = None) -> None:
        self.folder = folder
        self.header = header or _read_header(folder / HEADER)

    def kinds(self, taps: Iterable[str]) -> dict[str, str]:
        """Return the kind of output of each tap, whether it is cached or not."""
        return kinds_by_tap(self.header.stages, taps)

    def digest(self, taps: Iterable[str]) -> str:
        """Return a hash of the facts that determine the cached outputs of those taps.

        It does not depend on the folder's path, nor on other kinds in the cache.
        """
        entries = {kind: self.header.kinds.get(kind) for kind in (LOGITS, *self.kinds(taps).values())}
        stored = {name: kind and [kind.stored, kind.encoded and kind.encoded.sha256] for name, kind in entries.items()}
        facts = [self.header.binding.model_dump(), self.header.batch, stored]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def path(self, view: int, kind: str) -> Path:
        """Return the file of one kind of output at one view."""
        return self.folder / f"view-{view:02d}.{kind}.npy"

    def digests_path(self, view: int, kind: str) -> Path:
        """Return the file with the digests of the blocks of that file."""
        return self.folder / f"view-{view:02d}.{kind}.sha256.npy"

    def rows(self, view: int, kind: str) -> NDArray[np.float16]:
        """Return the outputs [N, …] as they are stored, memory-mapped."""
        return _open_array(self.path(view, kind), DTYPE, (self.header.id_count, *self.header.kinds[kind].stored))

    def digests(self, view: int, kind: str) -> NDArray[np.uint8]:
        """Return the sha256 [blocks, 32] of each block; zeros for a block that is not written."""
        path, shape = self.digests_path(view, kind), (self.header.blocks, DIGEST)
        return np.array(_open_array(path, np.dtype(np.uint8), shape)) if path.is_file() else np.zeros(shape, np.uint8)

    def written(self, view: int, kind: str) -> NDArray[np.bool_]:
        """Return a mask [blocks] of the blocks that are completely written; no block is, if the file is missing."""
        # A digest is written last. One that is not zero therefore means that all rows of its block are on disk.
        digests = self.digests(view, kind).astype(np.bool_).max(axis=1)
        return digests & self.path(view, kind).is_file()

    def damaged(self, view: int, kind: str, blocks: Iterable[int]) -> Iterator[int]:
        """Read some blocks and yield those that do not match their digest. Blocks that are not written are skipped.

        Raises the errors of ``rows``.
        """
        rows, digests, written = self.rows(view, kind), self.digests(view, kind), self.written(view, kind)
        for block in blocks:
            ids, hasher = self.header.ids(block), block_hasher(view, kind, block)
            hasher.update(np.ascontiguousarray(rows[ids.start : ids.stop]).data)
            if written[block] and hasher.digest() != digests[block].tobytes():
                yield block

    def missing(self, taps: Iterable[str]) -> dict[str, str]:
        """Return the taps whose kind of output is not cached, with that kind."""
        return {tap: kind for tap, kind in self.kinds(taps).items() if kind not in self.header.kinds}

    def complete_views(self, kinds: Iterable[str], views: int) -> dict[tuple[int, str], NDArray[np.float16]]:
        """Return ``complete_view`` of the first ``views`` views and those kinds, by (view, kind)."""
        if views > self.header.views:
            raise ValueError(
                f"{self.folder} has {self.header.views} views, but {views} are needed; write more (views=)"
            )
        return {(view, kind): self.complete_view(view, kind) for kind in kinds for view in range(views)}

    def complete_view(self, view: int, kind: str) -> NDArray[np.float16]:
        """Return ``rows``. Raises ValueError or FileNotFoundError unless all blocks are written."""
        rows = self.rows(view, kind)
        if not (written := self.written(view, kind)).all():
            raise ValueError(
                f"{self.folder}: view {view} of {kind} is written to {written.mean():.0%}; "
                "run the same command again to complete it: pipeline/cache_teacher.py RECIPE"
            )
        return rows

    def encoders(self, device: torch.device) -> dict[str, Encoder]:
        """Return the encoders of the encoded kinds, on ``device``."""
        found = {kind: self.encoder(kind) for kind in self.header.kinds}
        return {kind: encoder.to(device) for kind, encoder in found.items() if encoder}

    def encoder(self, kind: str) -> Encoder | None:
        """Return the encoder of a kind, or None for a kind that is not encoded.

        Raises ValueError for a file that is missing or that the header does not name.
        """
        encoded, path = self.header.kinds[kind].encoded, encoder_path(self.folder, kind)
        if encoded is None:
            return None
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != encoded.sha256:
            raise ValueError(f"{path} is missing or does not match the sha256 in {HEADER}; {MEND_HINT}")
        return pca.load_encoder(path)


def open_cache(folder: Path) -> Cache | None:
    """Return the cache in a folder, or None for a folder without a header."""
    return Cache(folder) if (folder / HEADER).is_file() else None


def encoder_path(folder: Path, kind: str) -> Path:
    """Return the file of a kind's encoder."""
    return folder / f"{kind}.encoder.safetensors"


def block_hasher(view: int, kind: str, block: int) -> hashlib._Hash:
    """Return the hash object of a block; the caller adds the block's bytes."""
    # The block's position is hashed first, so that a block copied to another position does not match.
    return hashlib.sha256(f"{view} {kind} {block}\n".encode())


def write_header(folder: Path, header: Header) -> None:
    """Write ``cache.json`` in one atomic step."""
    text = json.dumps(header.model_dump(mode="json"), indent=1, sort_keys=True) + "\n"
    write_atomically(folder / HEADER, text.encode())


def _read_header(path: Path) -> Header:
    """Return the header of a cache. Raises FileNotFoundError or ValueError, one line."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent}: there is no cache here; write it: pipeline/cache_teacher.py RECIPE")
    advice = "copy it again, or move the folder away and write a new cache (this one may be of another version)"
    return read_document(path, Header, advice)


def _open_array(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """Return the memory-mapped array of a file, after a check of its dtype and shape."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; {MEND_HINT}")
    try:
        # Not np.load, which opens archives and pickles as well.
        array = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # NumPy's parser raises many types of errors for a damaged header
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} cannot be read ({reason}); {MEND_HINT}") from None
    if array.dtype != dtype or array.shape != shape:
        raise ValueError(f"{path} holds {array.dtype} {array.shape}, {HEADER} says {dtype} {shape}; {MEND_HINT}")
    if array.offset + array.nbytes != path.stat().st_size:
        raise ValueError(f"{path} has bytes after its array; {MEND_HINT}")
    return array


def format_bytes(count: float) -> str:
    """Return a number of bytes as text in decimal units, such as ``1.5 GB`` for 1.5e9."""
    units = ("bytes", "kB", "MB", "GB", "TB", "PB")
    power = min(int(np.log10(max(count, 1))) // 3, len(units) - 1)
    return f"{count / 1000**power:,.1f} {units[power]}" if power else f"{count:,.0f} bytes"
