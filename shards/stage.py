"""Copy shards to a node's own disk, once, and say which folder to read.

    python shards/stage.py SOURCE LOCAL             copy where it is not yet whole; other processes wait
    python shards/stage.py SOURCE LOCAL --look      copy nothing

Prints the copy, ``LOCAL/shards-<digest of the manifest>``, or SOURCE with a line that says why: a full disk stops no
job. Every file is held against the manifest as it is copied and gets its own name only then, the manifest comes last,
so a folder with a manifest is whole, and stopped at any moment the same command goes on where it was.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import socket
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

if not __package__:  # started as a script: Python put this folder, not the root, on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from shards.command import Parser, run_main
from shards.manifest import MANIFEST, read_manifest, sync_path, write_atomically
from shards.read import samples_path
from shards.write import index_path

STREAMS = 8
"""Files copied at a time: one stream seldom fills what a shared file system can give."""
PIECE = 8 * 2**20
_RESERVE = 2**30
"""Bytes of the local disk that are left to others."""


class File(NamedTuple):
    """A file to copy, and what the manifest holds of it: nothing of an index, which training does not read."""

    name: str
    size: int | None = None
    sha256: str | None = None

    def is_in(self, folder: Path) -> bool:
        """Return whether the file is there, of the size that is known."""
        path = folder / self.name
        return path.is_file() and self.size in (None, path.stat().st_size)


def stage_shards(source: Path, local: Path) -> Path:
    """Copy the shards in ``source`` below ``local``, if they are not there, and return the copy's folder.

    Raises OSError or ValueError, one line, where that cannot be.
    """
    copy = copy_of(source, local)
    if is_whole(copy):  # without the lock, which may be another user's
        return copy
    local.mkdir(parents=True, exist_ok=True)
    with _locked(local / f".{copy.name}.lock"):
        if not is_whole(copy):
            _copy_all(source, copy)
    return copy


def copy_of(source: Path, local: Path) -> Path:
    """Return where the copy of the shards in ``source`` lies below ``local``, whether it is there or not."""
    return local / f"shards-{read_manifest(source).sha256[:16]}"


def is_whole(copy: Path) -> bool:
    """Return whether all of a copy is there: the manifest, which came last, and what it names."""
    return (copy / MANIFEST).is_file() and all(file.is_in(copy) for file in _files(copy))


def _files(folder: Path) -> Iterator[File]:
    """Yield all files of a folder of shards but the manifest, by its manifest."""
    for split in read_manifest(folder).splits.values():
        yield File(samples_path(folder, split.name).name, sha256=split.samples_sha256)
        for shard in split.shards:
            yield File(shard.url, shard.filesize, shard.sha256)
            yield File(index_path(Path(shard.url)).name)


def _copy_all(source: Path, copy: Path) -> None:
    copy.mkdir(exist_ok=True)
    for left in copy.glob("*.tmp"):
        left.unlink()
    missing = [file for file in _files(source) if not file.is_in(copy)]
    needed = sum((source / file.name).stat().st_size for file in missing) + _RESERVE
    free = shutil.disk_usage(copy).free
    if needed > free:
        raise OSError(f"{copy.parent} has {free / 1e9:,.1f} GB free and {needed / 1e9:,.1f} GB are needed")
    with ThreadPoolExecutor(STREAMS) as pool:
        try:
            for done in as_completed([pool.submit(_copy, file, source, copy) for file in missing]):
                done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    write_atomically(copy / MANIFEST, (source / MANIFEST).read_bytes())


def _copy(file: File, source: Path, copy: Path) -> None:
    """Copy a file piece by piece, and give it its name when its bytes are the manifest's."""
    temporary, digest = copy / f"{file.name}.tmp", hashlib.sha256()
    with (source / file.name).open("rb") as reading, temporary.open("wb") as writing:
        while piece := reading.read(PIECE):
            writing.write(piece)
            digest.update(piece)
    if file.sha256 not in (None, digest.hexdigest()):
        raise ValueError(f"{source / file.name} has another sha256 than the manifest says: see shards/verify.py")
    sync_path(temporary)
    temporary.rename(copy / file.name)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait for the lock and hold it; a process that is killed lets go of it."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = Parser(prog="stage.py", description="Copy shards to a node's own disk and print the folder to read.")
    parser.add_argument("source", type=Path)
    parser.add_argument("local", type=Path)
    parser.add_argument("--look", action="store_true", help="copy nothing; print the copy if it is there, else SOURCE")
    options = parser.parse_args(arguments)
    copy = copy_of(options.source, options.local)
    if options.look:
        print(copy if is_whole(copy) else options.source)
        return 0
    try:
        print(stage_shards(options.source, options.local))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        print(f"{socket.gethostname()}: reading the shards where they are: {reason}", file=sys.stderr)
        print(options.source)
    return 0


if __name__ == "__main__":
    run_main(main)
