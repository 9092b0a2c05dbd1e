"""Copy shards to a node's local disk once, and print the folder to read.

    python shards/stage.py SOURCE LOCAL             copy unless the copy is complete; other processes wait
    python shards/stage.py SOURCE LOCAL --look      copy nothing

SOURCE is a folder, or a URL that the package fsspec can read: ``s3://bucket/shards``, ``gs://…``, ``https://…``.

Prints the copy, ``LOCAL/shards-<digest of the manifest>``. If it cannot be written, SOURCE is printed, and the reason
on stderr: a full disk must not stop a job. Training cannot read a URL, so for a URL that is an error. Every file is
checked against the manifest while it is copied, and only then renamed. The manifest is copied last, so a folder with a
manifest is complete. After an interruption at any moment the same command continues.
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

from shards.boxes import box_offsets_path, boxes_path
from shards.command import Parser, run_main
from shards.manifest import MANIFEST, Manifest, parse_manifest, read_manifest, sync_path, write_atomically
from shards.read import samples_path, targets_path
from shards.remote import SourceFolder, connect_source, is_url
from shards.write import index_path

STREAMS = 8
"""Files copied at the same time: one stream rarely uses the full bandwidth of a shared file system."""
CHUNK_BYTES = 8 * 2**20
_RESERVE = 2**30
"""Bytes of the local disk that stay free for others."""


class File(NamedTuple):
    """A file to copy, with its size in bytes and sha256 if the manifest contains them.

    An index has neither: training does not read it.
    """

    name: str
    size: int | None = None
    sha256: str | None = None

    def is_in(self, folder: Path) -> bool:
        """Return whether the folder contains the file, with the right size if that is known."""
        path = folder / self.name
        return path.is_file() and self.size in (None, path.stat().st_size)


def stage_shards(source: Path | str, local: Path) -> Path:
    """Copy the shards in ``source``, a path or URL, to a folder in ``local``, unless they are there, and return it.

    Raises OSError if the source cannot be read or the copy cannot be written, and ValueError if the shards are damaged.
    """
    manifest, content = _read_source(source)
    copy = _copy_of(manifest, local)
    if is_complete(copy):  # without the lock, which this user may not open if another user created it
        return copy
    local.mkdir(parents=True, exist_ok=True)
    with _locked(local / f".{copy.name}.lock"):
        if not is_complete(copy):
            _copy_all(connect_source(source), copy, manifest)
            write_atomically(copy / MANIFEST, content)
    return copy


def copy_path(source: Path | str, local: Path) -> Path:
    """Return the path in ``local`` of the copy of the shards in ``source``; it need not exist."""
    return _copy_of(_read_source(source)[0], local)


def is_complete(copy: Path) -> bool:
    """Return whether a copy is complete: the manifest, which is copied last, and every file that it lists."""
    return (copy / MANIFEST).is_file() and all(file.is_in(copy) for file in _files(read_manifest(copy)))


def _read_source(source: Path | str) -> tuple[Manifest, bytes]:
    """Return the manifest of a source, and its bytes."""
    if not is_url(source):
        return read_manifest(Path(source)), (Path(source) / MANIFEST).read_bytes()
    folder = connect_source(source)
    content = b"".join(folder.chunks(MANIFEST, CHUNK_BYTES))
    return parse_manifest(content, f"{folder}/{MANIFEST}"), content


def _copy_of(manifest: Manifest, local: Path) -> Path:
    return local / f"shards-{manifest.sha256[:16]}"


def _files(manifest: Manifest) -> Iterator[File]:
    """Yield all files that a manifest lists, which excludes the manifest itself."""
    for split in manifest.splits.values():
        yield File(samples_path(Path(), split.name).name, sha256=split.samples_sha256)
        tables = {targets_path: split.targets_sha256, boxes_path: split.boxes_sha256}
        for path, sha256 in (tables | {box_offsets_path: split.box_offsets_sha256}).items():
            if sha256:
                yield File(path(Path(), split.name).name, sha256=sha256)
        for shard in split.shards:
            yield File(shard.url, shard.filesize, shard.sha256)
            yield File(index_path(Path(shard.url)).name)


def _copy_all(source: SourceFolder, copy: Path, manifest: Manifest) -> None:
    copy.mkdir(exist_ok=True)
    for leftover in copy.glob("*.tmp"):
        leftover.unlink()
    missing = [file for file in _files(manifest) if not file.is_in(copy)]
    with ThreadPoolExecutor(STREAMS) as pool:
        needed = sum(pool.map(source.size, [file.name for file in missing])) + _RESERVE
        free = shutil.disk_usage(copy).free
        if needed > free:
            raise OSError(f"{copy.parent} has {free / 1e9:,.1f} GB free and {needed / 1e9:,.1f} GB are needed")
        try:
            for done in as_completed([pool.submit(_copy, file, source, copy) for file in missing]):
                done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _copy(file: File, source: SourceFolder, copy: Path) -> None:
    """Copy a file in chunks, and rename it when its digest is the manifest's. Raises ValueError if it is not."""
    temporary, digest = copy / f"{file.name}.tmp", hashlib.sha256()
    with temporary.open("wb") as writing:
        for chunk in source.chunks(file.name, CHUNK_BYTES):
            writing.write(chunk)
            digest.update(chunk)
    if file.sha256 not in (None, digest.hexdigest()):
        raise ValueError(
            f"{source}/{file.name} has a sha256 that differs from the manifest: check the folder with shards/verify.py"
        )
    sync_path(temporary)
    temporary.rename(copy / file.name)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait for the lock and keep it inside the context. The kernel releases it if the process is killed."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = Parser(prog="stage.py", description="Copy shards to a node's local disk and print the folder to read.")
    parser.add_argument("source", help="folder of shards, or its URL")
    parser.add_argument("local", type=Path, help="folder on the local disk for the copy")
    parser.add_argument(
        "--look", action="store_true", help="copy nothing; print the copy if it is complete, else SOURCE"
    )
    options = parser.parse_args(arguments)
    copy = copy_path(options.source, options.local)
    if options.look:
        if is_url(options.source) and not is_complete(copy):
            raise FileNotFoundError(f"{copy} is not complete: copy {options.source} without --look first")
        print(copy if is_complete(copy) else options.source)
        return 0
    try:
        print(stage_shards(options.source, options.local))
    except (OSError, ValueError) as error:
        if is_url(options.source):
            raise
        reason = " ".join(str(error).split())
        print(
            f"{socket.gethostname()}: not staged, the shards are read from {options.source}: {reason}", file=sys.stderr
        )
        print(options.source)
    return 0


if __name__ == "__main__":
    run_main(main)
