"""A cache of digests of files, valid as long as a file's path, size and times do not change.

The cache is in ``$XDG_CACHE_HOME/distillation-pipeline/weights``, by default under ``~/.cache``. The folder of the file
itself may be read-only or shared with other users. Each entry is a file of its own, so that processes with different
entries never write the same file. A damaged entry, or one that cannot be written, only costs computing the digest
again.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from shards.manifest import write_atomically

SETTLED = 2.0
"""Seconds after the last write of a file. A later write then changes the file's time, on any file system."""


def memoized_by_file(path: Path, key: list[Any], compute: Callable[[], str]) -> str:
    """Return ``compute()``, a digest of the file and ``key``, from the cache if the file has not changed since.

    Errors of ``compute`` are passed on.
    """
    try:
        before = path.stat()
    except OSError:  # ``compute`` raises a better error for a file that cannot be read
        return compute()
    facts = [str(path.resolve()), before.st_size, before.st_mtime_ns, before.st_ctime_ns, key]
    entry = _folder() / f"{_sha256([facts[0], key])[:32]}.json"
    with suppress(OSError, ValueError, TypeError):
        cached = json.loads(entry.read_bytes())
        # "check" is a digest of the entry itself, so that a damaged entry cannot return a wrong digest.
        if cached["facts"] == facts and cached["check"] == _sha256([facts, cached["digest"]]):
            return cached["digest"]
    digest = compute()
    # A file that was written just now could be written again within the resolution of its time, without a change of it.
    if time.time() - before.st_mtime > SETTLED:
        text = json.dumps({"facts": facts, "digest": digest, "check": _sha256([facts, digest])})
        with suppress(OSError):
            entry.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(entry, text.encode())
    return digest


def _folder() -> Path:
    # Not Path.home(), which raises where a user has none.
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(folder) / "distillation-pipeline" / "weights"


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
