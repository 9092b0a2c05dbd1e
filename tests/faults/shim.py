"""``storage.c`` as a library to preload, and the numbers of what it does."""

from __future__ import annotations

import errno
import shutil
import subprocess
from pathlib import Path

STOP, TEAR = -1, -2
KINDS = {"stop": STOP, "tear": TEAR, "EIO": errno.EIO, "ENOSPC": errno.ENOSPC, "EDQUOT": errno.EDQUOT}
"""SIGKILL before a call; SIGKILL after half of a write; an error of the storage."""


def missing() -> str | None:
    """Say what this machine lacks for it."""
    return None if shutil.which("gcc") else "needs gcc"


def build(folder: Path) -> Path:
    """Compile it into ``folder`` and return the library."""
    library = folder / "storage.so"
    source = str(Path(__file__).with_name("storage.c"))
    subprocess.run(
        ["gcc", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-o", str(library), source, "-ldl"], check=True
    )
    return library
