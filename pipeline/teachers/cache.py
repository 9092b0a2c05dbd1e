"""A teacher's answers on disk: how they lie there, and the teacher that answers from them.

    cache.json                    what the answers are of: teacher, pixels, shards; and which there are
    view-03.logits.npy            float16 [N, K], a row for each id; zeros where there is no such sample
    view-03.logits.sha256.npy     uint8 [blocks, 32], of each block of rows; zeros where it is not written yet
    stage4.encoder.safetensors    where the maps of a stage are stored as their principal components

A kind of answer is ``logits`` or a stage by its canonical name. Nothing in the folder is ever executed: JSON, tensors,
and arrays without pickle. N ids, B rows of a batch, K classes, C channels, H W space.
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
"""Bytes of a block's sha256."""

MEND_HINT = (
    "copy the cache again, or mend it: cache_teacher.py --verify RECIPE marks what is damaged, "
    "and the same command without --verify writes that again"
)

NAME = r"[a-z][a-z0-9_]*(\.[a-z]+)?"
"""What a kind may be called: it becomes part of a file's name, and a cache may be somebody else's."""
Name = Annotated[str, StringConstraints(pattern=f"^{NAME}$")]
Shape = tuple[PositiveInt, ...]


class Encoding(FrozenModel):
    """How a kind is stored that is not stored as it is."""

    rank: PositiveInt
    """Principal components of its channels that are kept."""
    sha256: str
    """Of the encoder's file."""
    unexplained: float
    """Share of the variance that they lose, of images that the encoder was not fitted on."""


class StoredNorm(FrozenModel):
    """The BatchNorm that ends a ``.preact``, as it was before folding: a number a channel."""

    weight: tuple[float, ...]
    bias: tuple[float, ...]


class CacheEntry(FrozenModel):
    """One kind of answer."""

    shape: Shape
    """Of an answer, without the batch."""
    encoded: Encoding | None = None
    norm: StoredNorm | None = None

    @property
    def stored(self) -> Shape:
        """Shape of a row on disk."""
        return (self.encoded.rank, *self.shape[1:]) if self.encoded else self.shape

    @property
    def row_bytes(self) -> int:
        """Bytes of a row on disk."""
        return DTYPE.itemsize * int(np.prod(self.stored))


class Provenance(FrozenModel):
    """What the answers follow from, besides id, view and batch; what differs here is another cache."""

    teacher: dict[str, Any]
    data: dict[str, Any]
    shards: str
    """Sha256 of their manifest."""


class Header(FrozenModel):
    """What ``cache.json`` says."""

    version: Literal[1] = 1
    views: PositiveInt
    id_count: PositiveInt
    batch: PositiveInt
    """Images that the teacher was asked about at a time: the last bits of its answers depend on it."""
    block: PositiveInt
    """Rows that are written, checked and marked as done together."""
    stages: tuple[str, ...]
    """Names of the teacher's stages, for what a recipe may call them."""
    kinds: Annotated[dict[Name, CacheEntry], Field(min_length=1)]
    binding: Provenance

    @property
    def blocks(self) -> int:
        """Blocks of a view."""
        return -(-self.id_count // self.block)

    def row_bytes(self, kinds: Iterable[str]) -> int:
        """Return the bytes on disk of an image's answers of those kinds."""
        return sum(self.kinds[kind].row_bytes for kind in kinds)

    def ids(self, block: int) -> range:
        """Return the ids, which are the rows, of a block."""
        return range(block * self.block, min((block + 1) * self.block, self.id_count))

    def chunks(self, block: int) -> list[range]:
        """Return the ids of a block in parts of as many as the teacher answers at once."""
        ids = self.ids(block)
        return [ids[start : start + self.batch] for start in range(0, len(ids), self.batch)]


def resolved(stages: Iterable[str], taps: Iterable[str]) -> dict[str, str]:
    """Return the kind of answer that each tap is, ``all`` taken apart, of a network with those stages."""
    names = dict.fromkeys(stages, "")
    return {tap: canonical(names, tap) for wanted in taps for tap in deep_stages(names, wanted)}


class Cache:
    """A folder of answers, with its header or the one that it is to have.

    Raises FileNotFoundError or ValueError, one line, for what is not there or no such thing.
    """

    def __init__(self, folder: Path, header: Header | None = None) -> None:
        self.folder = folder
        self.header = header or _read_header(folder / HEADER)

    def kinds(self, taps: Iterable[str]) -> dict[str, str]:
        """Return the kind of answer that each tap is, whether it is here or not."""
        return resolved(self.header.stages, taps)

    def digest(self, taps: Iterable[str]) -> str:
        """Return what stands for the answers to those taps, wherever the folder lies and whatever else is in it."""
        held = {kind: self.header.kinds.get(kind) for kind in (LOGITS, *self.kinds(taps).values())}
        stored = {name: kind and [kind.stored, kind.encoded and kind.encoded.sha256] for name, kind in held.items()}
        facts = [self.header.binding.model_dump(), self.header.batch, stored]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def path(self, view: int, kind: str) -> Path:
        """Return the file of a view's answers of one kind."""
        return self.folder / f"view-{view:02d}.{kind}.npy"

    def digests_path(self, view: int, kind: str) -> Path:
        """Return the file of their blocks' digests."""
        return self.folder / f"view-{view:02d}.{kind}.sha256.npy"

    def rows(self, view: int, kind: str) -> NDArray[np.float16]:
        """Return the answers [N, …] as they are stored, memory-mapped."""
        return _mapped(self.path(view, kind), DTYPE, (self.header.id_count, *self.header.kinds[kind].stored))

    def digests(self, view: int, kind: str) -> NDArray[np.uint8]:
        """Return the sha256 [blocks, 32] of each block; zeros for one that is not written."""
        path, shape = self.digests_path(view, kind), (self.header.blocks, DIGEST)
        return np.array(_mapped(path, np.dtype(np.uint8), shape)) if path.is_file() else np.zeros(shape, np.uint8)

    def written(self, view: int, kind: str) -> NDArray[np.bool_]:
        """Return which blocks are written, whole: none where the file is gone."""
        digests = self.digests(view, kind).astype(np.bool_).max(axis=1)
        return digests & self.path(view, kind).is_file()

    def damaged(self, view: int, kind: str, blocks: Iterable[int]) -> Iterator[int]:
        """Read some blocks and yield those that are written and not as they were. Raises what ``rows`` does."""
        rows, digests, written = self.rows(view, kind), self.digests(view, kind), self.written(view, kind)
        for block in blocks:
            ids, found = self.header.ids(block), block_hasher(view, kind, block)
            found.update(np.ascontiguousarray(rows[ids.start : ids.stop]).data)
            if written[block] and found.digest() != digests[block].tobytes():
                yield block

    def missing(self, taps: Iterable[str]) -> dict[str, str]:
        """Return those of the taps whose kind of answer is not here, and that kind."""
        return {tap: kind for tap, kind in self.kinds(taps).items() if kind not in self.header.kinds}

    def whole(self, kinds: Iterable[str], views: int) -> dict[tuple[int, str], NDArray[np.float16]]:
        """Return ``whole_view`` of the first ``views`` views and those kinds, by both."""
        if views > self.header.views:
            raise ValueError(f"{self.folder} has {self.header.views} views, {views} are asked for; write more (views=)")
        return {(view, kind): self.whole_view(view, kind) for kind in kinds for view in range(views)}

    def whole_view(self, view: int, kind: str) -> NDArray[np.float16]:
        """Return ``rows``; raise ValueError or FileNotFoundError unless they are there, all written."""
        rows = self.rows(view, kind)
        if not (written := self.written(view, kind)).all():
            raise ValueError(
                f"{self.folder}: view {view} of {kind} is written to {written.mean():.0%}; the command that began it "
                "goes on: pipeline/cache_teacher.py RECIPE"
            )
        return rows

    def encoders(self, device: torch.device) -> dict[str, Encoder]:
        """Return the encoders of the kinds that are stored encoded."""
        found = {kind: self.encoder(kind) for kind in self.header.kinds}
        return {kind: encoder.to(device) for kind, encoder in found.items() if encoder}

    def encoder(self, kind: str) -> Encoder | None:
        """Return the encoder of a kind, None for one that is stored as it is. Raises ValueError."""
        encoded, path = self.header.kinds[kind].encoded, encoder_path(self.folder, kind)
        if encoded is None:
            return None
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != encoded.sha256:
            raise ValueError(f"{path} is not the encoder that {HEADER} names; {MEND_HINT}")
        return pca.load_encoder(path)


def open_cache(folder: Path) -> Cache | None:
    """Return the cache in a folder, None where none was begun."""
    return Cache(folder) if (folder / HEADER).is_file() else None


def encoder_path(folder: Path, kind: str) -> Path:
    """Return the file of a kind's encoder."""
    return folder / f"{kind}.encoder.safetensors"


def block_hasher(view: int, kind: str, block: int) -> hashlib._Hash:
    """Return the hash that a block's bytes are to be added to: it knows where they belong."""
    return hashlib.sha256(f"{view} {kind} {block}\n".encode())


def write_header(folder: Path, header: Header) -> None:
    """Write ``cache.json`` in one atomic step."""
    text = json.dumps(header.model_dump(mode="json"), indent=1, sort_keys=True) + "\n"
    write_atomically(folder / HEADER, text.encode())


def _read_header(path: Path) -> Header:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent}: there is no cache here; write it: pipeline/cache_teacher.py RECIPE")
    advice = "copy it again, or move the folder away and write the cache anew (it may be another version's)"
    return read_document(path, Header, advice)


def _mapped(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; {MEND_HINT}")
    try:
        # Not np.load, which opens archives and pickles as well.
        array = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # a damaged header makes the parser raise nearly anything
        told = str(error).partition("\n")[0]
        raise ValueError(f"{path} cannot be read ({told}); {MEND_HINT}") from None
    if array.dtype != dtype or array.shape != shape:
        raise ValueError(f"{path} holds {array.dtype} {array.shape}, {HEADER} says {dtype} {shape}; {MEND_HINT}")
    return array
