"""Strict reading of tar archives: every member is found, and damage raises an error that names its byte.

Python's ``tarfile`` takes an unreadable header for the end of the archive, so it can lose files without an error.
Here an archive must end in two blocks of zeros, followed by nothing but zeros. Its members must fill all of the space
before them.
"""

from __future__ import annotations

import gzip
import io
import posixpath
import tarfile
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

_BLOCK = tarfile.BLOCKSIZE
_CHUNK_BYTES = 2**20
_GZIP_MAGIC = b"\x1f\x8b"


class DamagedArchive(ValueError):
    """An archive that is incomplete or unreadable; the message names the archive and the byte."""


class Member(NamedTuple):
    """A file of a tar: its name, the offset of its content in bytes, and its size in bytes."""

    name: str
    offset: int
    size: int


def list_members(path: Path, file: BinaryIO, start: int = 0, end: int | None = None) -> list[Member]:
    """Return the files of the archive that occupies the bytes ``start`` to ``end`` of ``file``.

    Without ``end`` the archive is the rest of the file. Links are resolved, and folders are skipped. ``path`` is only
    used in error messages. Raises DamagedArchive for damage, and ValueError for a member that is not a plain file.
    """
    stop = file.seek(0, io.SEEK_END) if end is None else end
    infos = [info for info in _read_headers(path, file, start, stop) if not info.isdir()]
    found = {posixpath.normpath(info.name): info for info in infos}
    return [_member(path, info, found) for info in infos]


def read_archive(path: Path, names: Collection[str]) -> dict[str, bytes]:
    """Return the contents of the named files of an archive, keyed by file name without folders.

    The archive may be compressed by gzip. It is always read to its end, so that damage anywhere is found. Names that
    it does not contain are left out. Raises like ``list_members``.
    """
    content = path.read_bytes()
    if content.startswith(_GZIP_MAGIC):
        try:
            content = gzip.decompress(content)  # also verifies the checksum
        except (OSError, EOFError, zlib.error) as error:
            raise DamagedArchive(f"{path} is damaged: {error}; download it again") from None
    members = list_members(path, io.BytesIO(content))
    named = [(posixpath.basename(member.name), member) for member in members]
    return {name: content[member.offset : member.offset + member.size] for name, member in named if name in names}


def _read_headers(path: Path, file: BinaryIO, start: int, end: int) -> Iterator[tarfile.TarInfo]:
    position = start  # of the next header; if it cannot be read, the archive is damaged there
    file.seek(start)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                if not 0 <= info.size <= end - info.offset_data:
                    raise _damage(path, info.offset, f"{info.name} reaches beyond the end")
                yield info
                position = tar.offset
            position = tar.offset
    except (tarfile.TarError, EOFError, RecursionError) as error:
        raise _damage(path, position, str(error)) from None
    # tarfile also stops without an error at a header of zeros in the middle of the archive.
    _check_end(path, file, position, end)


def _check_end(path: Path, file: BinaryIO, start: int, end: int) -> None:
    """Raise DamagedArchive unless two blocks of zeros begin at ``start``, with only zeros after them."""
    file.seek(start)
    head = file.read(max(0, min(end - start, 2 * _BLOCK)))
    if head[:_BLOCK].strip(b"\0"):
        raise _damage(path, start, "this block is not the header of a file")
    if len(head) < 2 * _BLOCK:
        raise _damage(path, start, "the archive ends without its two blocks of zeros")
    chunk, position = head, start
    while chunk:
        if rest := chunk.lstrip(b"\0"):
            first = position + len(chunk) - len(rest)
            raise _damage(path, first, f"there is data after the archive's end at byte {start:,}")
        position += len(chunk)
        chunk = file.read(min(_CHUNK_BYTES, end - position))


def _damage(path: Path, position: int, reason: str) -> DamagedArchive:
    return DamagedArchive(f"{path} is damaged at byte {position:,} or just before it ({reason}): download it again")


def _member(path: Path, info: tarfile.TarInfo, found: dict[str, tarfile.TarInfo]) -> Member:
    """Return the position and size of a member's content; links are followed to a plain file.

    Raises ValueError for a link to a missing file, and for anything but a plain file at the end.
    """
    target, steps = info, 0
    while target.islnk() or target.issym():
        # A symbolic link is relative to its own folder, a hard link to the root of the archive.
        folder = posixpath.dirname(target.name) if target.issym() else ""
        link = posixpath.normpath(posixpath.join(folder, target.linkname))
        steps += 1
        if link not in found or steps > len(found):  # more steps than files: the links form a cycle
            raise ValueError(
                f"{path}: {info.name} is a link to {target.linkname}, which is not in the archive: unpack the archive"
            )
        target = found[link]
    if not target.isreg() or target.sparse is not None:
        kind = "a sparse file" if target.isreg() else f"of type {target.type.decode('ascii', 'replace')!r}"
        raise ValueError(
            f"{path}: {info.name} is {kind}, not a plain file: pack the archive again with plain files only"
        )
    return Member(info.name, target.offset_data, target.size)
