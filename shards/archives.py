"""Read tars whole: every member is found and it is proved that there are no others, or one line says where it breaks.

Python's ``tarfile`` takes a header that it cannot read for the end of the archive. Here an archive ends in two blocks
of zeros with nothing but zeros behind them, and members lie one behind the other up to there.
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
_PIECE = 2**20
_GZIP = b"\x1f\x8b"


class DamagedArchive(ValueError):
    """An archive of which a part is missing or unreadable; the message names it and the byte."""


class Member(NamedTuple):
    """A file of a tar: its name, and the place of its bytes."""

    name: str
    offset: int
    size: int


def list_members(path: Path, file: BinaryIO, start: int = 0, end: int | None = None) -> list[Member]:
    """Return the files of the archive that lies in ``file`` from byte ``start`` to ``end``, links as what they link to.

    ``path`` is named in errors; without ``end`` the archive is all the rest of the file. Folders are passed over.
    Raises DamagedArchive, and ValueError for a member that is no file.
    """
    last = file.seek(0, io.SEEK_END) if end is None else end
    infos = [info for info in _walk(path, file, start, last) if not info.isdir()]
    found = {posixpath.normpath(info.name): info for info in infos}
    return [_member(path, info, found) for info in infos]


def read_archive(path: Path, names: Collection[str]) -> dict[str, bytes]:
    """Return the contents of those files that an archive, plain or compressed by gzip, holds, by their last names.

    All of it is read, whatever is asked for. Raises like ``list_members``.
    """
    content = path.read_bytes()
    if content.startswith(_GZIP):
        try:
            content = gzip.decompress(content)  # which checks its checksum
        except (OSError, EOFError, zlib.error) as error:
            raise DamagedArchive(f"{path} is damaged: {error}; download it again") from None
    members = list_members(path, io.BytesIO(content))
    wanted = [(posixpath.basename(each.name), each) for each in members]
    return {name: content[each.offset : each.offset + each.size] for name, each in wanted if name in names}


def _walk(path: Path, file: BinaryIO, start: int, end: int) -> Iterator[tarfile.TarInfo]:
    at = start
    file.seek(start)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                if not 0 <= info.size <= end - info.offset_data:
                    raise _damage(path, info.offset, f"{info.name} reaches beyond the end")
                yield info
                at = tar.offset
            at = tar.offset
    except (tarfile.TarError, EOFError, RecursionError) as error:
        raise _damage(path, at, str(error)) from None
    _prove_end(path, file, at, end)


def _prove_end(path: Path, file: BinaryIO, at: int, end: int) -> None:
    file.seek(at)
    begun = file.read(max(0, min(end - at, 2 * _BLOCK)))
    if begun[:_BLOCK].strip(b"\0"):
        raise _damage(path, at, "what stands there is no header of a file")
    if len(begun) < 2 * _BLOCK:
        raise _damage(path, at, "it ends there, without the blocks of zeros at an archive's end")
    piece, place = begun, at
    while piece:
        if rest := piece.lstrip(b"\0"):
            beyond = place + len(piece) - len(rest)
            raise _damage(path, beyond, f"there is something behind the archive's end at byte {at:,}")
        place += len(piece)
        piece = file.read(min(_PIECE, end - place))


def _damage(path: Path, at: int, what: str) -> DamagedArchive:
    return DamagedArchive(f"{path} is damaged at byte {at:,} or just before it ({what}): download it again")


def _member(path: Path, info: tarfile.TarInfo, found: dict[str, tarfile.TarInfo]) -> Member:
    target, steps = info, 0
    while target.islnk() or target.issym():
        folder = posixpath.dirname(target.name) if target.issym() else ""
        link = posixpath.normpath(posixpath.join(folder, target.linkname))
        steps += 1
        if link not in found or steps > len(found):
            raise ValueError(f"{path}: {info.name} is a link to {target.linkname}, which it does not hold: unpack it")
        target = found[link]
    if not target.isreg() or target.sparse is not None:
        kind = "a sparse file" if target.isreg() else f"of type {target.type.decode('ascii', 'replace')!r}"
        raise ValueError(f"{path}: {info.name} is {kind}, not a plain file: pack the archive anew, of plain files")
    return Member(info.name, target.offset_data, target.size)
