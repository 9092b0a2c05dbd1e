"""Writing the files of a cache block by block, so that an interruption loses at most the current block of each rank.

The rows of a block are written and flushed before its digest. A block with a digest is therefore complete. A block is a
range of ids. Ranks write different blocks, with ``pwrite`` and not through memory maps: shared file systems may lose
writes to a map that several machines share.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.teachers.cache import DIGEST, DTYPE, Cache, block_hasher, format_bytes

_RESERVE = 2**30
"""Bytes of free disk space that are left to others."""


class Block(NamedTuple):
    """A unit of writing: one range of ids at one view, for the kinds that are not written yet."""

    view: int
    number: int
    """Index of the range of ids, as for ``Header.ids``."""
    kinds: tuple[str, ...]


def create_files(cache: Cache) -> None:
    """Create the missing files of all views and kinds, sparse, and create damaged files again.

    Raises ValueError for a damaged file with blocks that are marked as written.
    """
    for view in range(cache.header.views):
        for kind in cache.header.kinds:
            _create_pair(cache, view, kind)


def _create_pair(cache: Cache, view: int, kind: str) -> None:
    """Create the file of a kind at a view and the file of its digests, unless they exist and are valid."""
    header = cache.header
    path, digests = cache.path(view, kind), cache.digests_path(view, kind)
    if not cache.written(view, kind).any():
        # The digests are deleted first and created last, so that no digest ever belongs to an empty block.
        digests.unlink(missing_ok=True)
        if not _is_valid(cache, view, kind):
            _create(path, DTYPE, (header.id_count, *header.kinds[kind].stored))
        _create(digests, np.dtype(np.uint8), (header.blocks, DIGEST))
    cache.rows(view, kind)  # raises ValueError for a file that is damaged


def _is_valid(cache: Cache, view: int, kind: str) -> bool:
    """Return whether the file exists and has the expected dtype and shape."""
    try:
        cache.rows(view, kind)
    except (OSError, ValueError):
        return False
    return True


def _create(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    """Create a sparse array of zeros."""
    # Created under a temporary name and renamed, so that no file has the final name before its full length.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    np.lib.format.open_memmap(temporary, "w+", dtype, shape)
    temporary.rename(path)


def missing_blocks(cache: Cache, lost: Collection[str] = ()) -> list[Block]:
    """Return the blocks that are not written yet, and all blocks of the kinds in ``lost``, view by view."""
    header = cache.header
    return [
        Block(view, number, kinds)
        for view in range(header.views)
        for written in [{kind: cache.written(view, kind) & (kind not in lost) for kind in header.kinds}]
        for number in range(header.blocks)
        if (kinds := tuple(kind for kind in header.kinds if not written[kind][number]))
    ]


def check_room(cache: Cache, blocks: Iterable[Block]) -> int:
    """Return the total bytes of the blocks. Raises OSError if the disk does not have enough free space for them.

    Blocks that are written again need no new space.
    """
    header = cache.header
    sizes = Counter[tuple[int, str]]()
    for block in blocks:
        for kind in block.kinds:
            sizes[block.view, kind] += len(header.ids(block.number)) * header.row_bytes([kind])
    needed = sum(min(size, _not_allocated(cache, *file)) for file, size in sizes.items())
    existing = next(folder for folder in (cache.folder, *cache.folder.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free
    if needed + _RESERVE > free:
        raise OSError(
            f"{cache.folder} needs {format_bytes(needed)} more, but its disk has {format_bytes(free)} free, of which "
            f"{format_bytes(_RESERVE)} are reserved; write fewer views, or encode maps (encode={{last: 256}})"
        )
    return sizes.total()


def _not_allocated(cache: Cache, view: int, kind: str) -> int:
    """Return how many bytes of a sparse file the disk has not allocated yet."""
    path, size = cache.path(view, kind), cache.header.id_count * cache.header.row_bytes([kind])
    # st_blocks counts in units of 512 bytes, whatever the block size of the file system.
    return max(size - 512 * path.stat().st_blocks, 0) if path.is_file() else size


def write_block(cache: Cache, block: Block, answers: Iterable[tuple[range, dict[str, NDArray[np.float16]]]]) -> None:
    """Write a block. ``answers`` gives the stored rows by kind for consecutive ranges of its ids.

    The rows of ids without a sample are zeros.
    """
    files = {kind: os.open(cache.path(block.view, kind), os.O_WRONLY) for kind in block.kinds}
    hashers = {kind: block_hasher(block.view, kind, block.number) for kind in block.kinds}
    first = {kind: _offset(cache.path(block.view, kind)) for kind in block.kinds}
    try:
        for ids, rows in answers:
            for kind in block.kinds:
                content = np.ascontiguousarray(rows[kind]).tobytes()
                hashers[kind].update(content)
                _write_at(files[kind], content, first[kind] + ids.start * cache.header.kinds[kind].row_bytes)
        # Only rows that have reached the disk may get a digest.
        for file in files.values():
            os.fsync(file)
    finally:
        for file in files.values():
            os.close(file)
    for kind in block.kinds:
        _write_digest(cache.digests_path(block.view, kind), block.number, hashers[kind].digest())


def _write_digest(path: Path, block: int, digest: bytes) -> None:
    """Write the digest of a block, which marks the block as written."""
    file = os.open(path, os.O_WRONLY)
    try:
        _write_at(file, digest, _offset(path) + block * DIGEST)
    finally:
        os.close(file)


def _offset(path: Path) -> int:
    """Return the byte offset of an array's first row in its file."""
    return np.lib.format.open_memmap(path, mode="r").offset


def _write_at(file: int, content: bytes, offset: int) -> None:
    """Write all bytes of ``content`` at an offset of a file."""
    rest = memoryview(content)
    while rest:  # pwrite may write fewer bytes than it was given
        try:
            written = os.pwrite(file, rest, offset)
        except OSError as error:
            raise OSError(f"a block was not written ({error}); free disk space and run the command again") from error
        rest, offset = rest[written:], offset + written
