"""Writing a cache: its header, its encoders, and its blocks, which are shared among the ranks."""

from __future__ import annotations

import signal
import sys
from collections.abc import Collection, Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Annotated, Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt
from torch import Tensor
from tqdm import tqdm

from pipeline.batch import Outputs
from pipeline.builders.teacher import check_provenance
from pipeline.caching.blocks import Block, check_room, create_files, missing_blocks, write_block
from pipeline.caching.damage import lost_encoders, mark_blocks
from pipeline.caching.source import AnswerSource, Part, stored
from pipeline.data.config import MAX_VIEWS
from pipeline.distributed import collectives, signals
from pipeline.errors import RecipeError
from pipeline.features import pca
from pipeline.features.pca import Encoder
from pipeline.frozen_model import FrozenModel
from pipeline.runs.files import PREEMPTED
from pipeline.runs.folder import lock_folder, mark_preempted
from pipeline.teachers.cache import (
    DTYPE,
    Cache,
    CacheEntry,
    Encoding,
    Header,
    Provenance,
    StoredNorm,
    encoder_path,
    format_bytes,
    open_cache,
    write_header,
)

FIT_IMAGES, HELD_OUT_IMAGES = 4096, 1024
"""Number of images that an encoder is fitted on, and of others to measure what it loses."""
LOG_INTERVAL = 60.0
"""Seconds between two lines of progress if the output is not a terminal."""
STOPPED = 128 + signal.SIGTERM
"""Exit code of a command that was stopped early: what is written stays, and the same command continues."""
Names = Annotated[tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]


class CacheArguments(FrozenModel):
    """The arguments of ``cache_teacher.py`` that are not overrides of the recipe."""

    views: int | None = Field(default=None, gt=0, le=MAX_VIEWS)
    """Number of augmented views to write; null is the recipe's, or that of the existing cache."""
    kinds: Names = ()
    """Kinds of output to write in addition to those that the recipe's losses read."""
    encode: dict[str, PositiveInt] = Field(default={})
    """Number of principal components to store, by stage."""
    block: int = Field(default=1024, gt=0, le=2**24)
    """Approximate number of images in a block of a new cache. An existing cache keeps its own."""
    sample: int = Field(default=256, gt=0, le=10**6)
    """Number of images that ``--verify`` runs through the teacher again."""
    tolerance: PositiveFloat = 0.01
    """Largest difference that ``--verify`` accepts, divided by the largest output of the kind."""


def new_header(
    views: int,
    batch: int,
    block: int,
    kinds: dict[str, CacheEntry],
    stages: list[str],
    source: AnswerSource,
    facts: dict[str, Any],
) -> Header:
    """Return the header of a new cache, whose encoders are still to be fitted.

    ``batch`` is the number of images per forward of the teacher, ``block`` about the number of images in a block.
    """
    return Header(
        views=views,
        id_count=source.loader.id_count,
        batch=batch,
        block=batch * max(block // batch, 1),  # a multiple of the batch: a chunk must not span two blocks
        stages=tuple(stages),
        kinds={name: kind.model_copy(update={"norm": _norm(source, name)}) for name, kind in kinds.items()},
        binding=Provenance.model_validate(facts),
    )


def _norm(source: AnswerSource, kind: str) -> StoredNorm | None:
    """Return the BatchNorm at the end of a ``.preact`` stage, which OFD needs; None for other kinds."""
    norm = source.teacher.norms.get(kind)
    return StoredNorm(weight=tuple(norm.weight_C.tolist()), bias=tuple(norm.bias_C.tolist())) if norm else None


def begin(folder: Path, new: Header, source: AnswerSource) -> list[Block]:
    """Prepare the folder and return the blocks to write. A cache that does not fit is refused unchanged."""
    lock_folder(folder)
    (folder / PREEMPTED).unlink(missing_ok=True)
    existing = open_cache(folder)
    header = _extend_header(existing, new) if existing else new
    cache = Cache(folder, header)
    lost = lost_encoders(cache)
    blocks = missing_blocks(cache, lost)
    print(f"{folder}: {format_bytes(check_room(cache, blocks))} to write")
    # Rows of a lost encoder are marked as not written before a new encoder replaces it: it cannot decode them.
    for view, kind in product(range(header.views), lost):
        mark_blocks(cache, view, kind, range(header.blocks))
    header = _fit_encoders(folder, header, source, lost)
    write_header(folder, header)
    create_files(Cache(folder, header))
    return blocks


def _extend_header(cache: Cache, new: Header) -> Header:
    """Return the cache's header with the views and kinds of ``new`` added.

    Raises RecipeError if the two do not fit together.
    """
    check_provenance(cache, new.binding.model_dump())
    old, folder = cache.header, cache.folder
    if old.id_count != new.id_count:
        raise RecipeError(f"{folder} has rows for {old.id_count:,} ids, but the shards have {new.id_count:,}")
    if old.batch != new.batch:
        raise RecipeError(
            f"{folder} was written with teacher.batch: {old.batch}, here {new.batch}; set teacher.batch={old.batch}"
        )
    for name, kind in old.kinds.items():
        if name not in new.kinds:
            raise RecipeError(f"{folder}: another command has added {name} meanwhile; run this command again")
        if kind.stored != new.kinds[name].stored:
            shape = " × ".join(map(str, kind.stored))
            raise RecipeError(f"{folder} has {name} as {shape}; keep this shape, or write to another folder")
    return old.model_copy(update={"views": max(old.views, new.views), "kinds": {**new.kinds, **old.kinds}})


def _fit_encoders(folder: Path, header: Header, source: AnswerSource, lost: Collection[str]) -> Header:
    """Fit and write the encoders that are new or ``lost``, and return the header with their digests."""
    kinds = {
        name: kind.model_copy(update={"encoded": _fit_encoder(folder, name, kind.encoded.rank, header.batch, source)})
        if kind.encoded and (name in lost or not kind.encoded.sha256)
        else kind
        for name, kind in header.kinds.items()
    }
    return header.model_copy(update={"kinds": kinds})


def _fit_encoder(folder: Path, kind: str, rank: int, batch: int, source: AnswerSource) -> Encoding:
    """Fit an encoder on some images, write it, and return its description with its loss on other images."""
    # A fixed seed: the same teacher and images must give the same encoder.
    ids = np.random.default_rng(0).permutation(source.present(range(source.loader.id_count)))
    held_out = max(min(HELD_OUT_IMAGES, len(ids) // 5), 1)

    def maps(ids: NDArray[np.int64]) -> Iterator[Tensor]:
        parts = ((ids[start : start + batch], 0) for start in range(0, len(ids), batch))
        return (outputs.features[kind] for outputs in source.answers(parts))

    encoder = pca.fit_pca(maps(ids[held_out : held_out + FIT_IMAGES]), rank)
    lost = pca.unexplained(encoder, maps(ids[:held_out]))
    print(f"{kind}: {rank} components lose {lost:.2%} of the variance of {held_out:,} images they were not fitted on")
    sha256 = pca.save_encoder(encoder, encoder_path(folder, kind))
    return Encoding(rank=rank, sha256=sha256, unexplained=lost)


def write_blocks(cache: Cache, source: AnswerSource, blocks: list[Block]) -> bool:
    """Write this rank's share of the blocks, one after the other, and return whether all were written.

    A stop signal to any rank ends the writing on all ranks, between two blocks.
    """
    rank, world = collectives.rank(), collectives.world_size()
    mine = blocks[rank::world]
    encoders = cache.encoders(source.loader.device)
    answers = source.answers(_parts(cache, source, mine))
    images = sum(len(ids) for ids, _ in _parts(cache, source, mine))
    title = f"rank {rank} of {world}" if world > 1 else None
    pause = 0.1 if sys.stderr.isatty() else LOG_INTERVAL
    with tqdm(total=images, unit="img", desc=title, disable=rank > 0, mininterval=pause, delay=pause) as bar:
        # Every rank makes the same number of turns, even without a block left: ``any_rank`` is a collective.
        for turn in range(-(-len(blocks) // world)):
            if collectives.any_rank(signals.stop_requested()):
                return False
            if turn < len(mine):
                write_block(cache, mine[turn], _rows(cache, source, mine[turn], answers, encoders, bar))
    return True


def _parts(cache: Cache, source: AnswerSource, blocks: Iterable[Block]) -> Iterator[Part]:
    """Yield the ids and the view of each chunk of some blocks, except for chunks without a sample."""
    for block in blocks:
        for ids in cache.header.chunks(block.number):
            if len(present := source.present(ids)):
                yield present, block.view


def _rows(
    cache: Cache,
    source: AnswerSource,
    block: Block,
    answers: Iterator[Outputs],
    encoders: dict[str, Encoder],
    bar: tqdm[Any],
) -> Iterator[tuple[range, dict[str, NDArray[np.float16]]]]:
    """Yield the rows of a block, chunk by chunk. ``answers`` are the outputs for ``_parts``, in the same order."""
    for ids in cache.header.chunks(block.number):
        rows = {kind: np.zeros((len(ids), *cache.header.kinds[kind].stored), DTYPE) for kind in block.kinds}
        if len(present := source.present(ids)):
            for kind, found in stored(next(answers), block.kinds, encoders).items():
                rows[kind][present - ids.start] = found
        yield ids, rows
        bar.update(len(present))
        bar.set_postfix_str(format_bytes(bar.n * cache.header.row_bytes(block.kinds)), refresh=False)


def exit_stopped(folder: Path | None) -> NoReturn:
    """Exit before the work is done. If a signal was the reason, mark ``folder`` as preempted for the scheduler."""
    if folder is not None and signals.stop_requested():
        mark_preempted(folder)
    sys.exit(STOPPED)
