"""The digest of a file's tensors, remembered for as long as the file's path, size and times stay what they are.

It lies in ``$XDG_CACHE_HOME/distillation-pipeline/weights``, by default under ``~/.cache``: beside the file there may
be no right to write, and a shared folder is not for one user's notes. A file a note, so that no two processes write the
same one differently. What is damaged there, or cannot be written, costs a moment and nothing else.
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
"""Seconds since a file was last written after which a further write shows in its time, on any file system."""


def memoized_by_file(path: Path, key: list[Any], compute: Callable[[], str]) -> str:
    """Return ``compute()``, a digest of the file that depends on ``about`` too, or what it was of the file as it is.

    Raises what ``compute`` does.
    """
    try:
        before = path.stat()
    except OSError:  # it is for ``compute`` to say
        return compute()
    facts = [str(path.resolve()), before.st_size, before.st_mtime_ns, before.st_ctime_ns, key]
    note = _folder() / f"{_sha256([facts[0], key])[:32]}.json"
    with suppress(OSError, ValueError, TypeError):
        kept = json.loads(note.read_bytes())
        if kept["facts"] == facts and kept["check"] == _sha256([facts, kept["digest"]]):
            return kept["digest"]
    digest = compute()
    if time.time() - before.st_mtime > SETTLED:
        text = json.dumps({"facts": facts, "digest": digest, "check": _sha256([facts, digest])})
        with suppress(OSError):
            note.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(note, text.encode())
    return digest


def _folder() -> Path:
    # Not Path.home(), which raises where a user has none.
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(folder) / "distillation-pipeline" / "weights"


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
