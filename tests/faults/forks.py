"""The other end of ``forking.py``: run a command of a checkout in a forked child, and see what became of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from one_core import one_core

HERE = Path(__file__).resolve().parent
SUPPORT = HERE.parent / "support"
GIGABYTE = 1 << 30
SECONDS = 20.0
Fault = tuple[str, int, int]
"""Folder, number of the storage call below it, and what happens there (``shim.py``)."""


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int | None
    """Exit code; None where a signal ended it."""
    signal: int | None
    late: bool
    """Whether it was killed at its time limit."""
    seconds: float
    processor: float
    calls: int | None
    """Storage calls that were counted, where it came to its end."""
    out: str
    err: str


class Forks:
    """A process that has imported a checkout's commands, and forks itself for each that it is asked to run."""

    def __init__(self, root: Path, aside: Path, preload: Path | None = None) -> None:
        self.root, self.aside = root.resolve(), aside
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "PYTEST"))}
        environment |= {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
        environment |= {
            "PYTHONPATH": f"{self.root}:{SUPPORT}",
            "PYTHONDONTWRITEBYTECODE": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "XDG_CACHE_HOME": str(aside / "remembered"),
        }
        environment |= {"LD_PRELOAD": str(preload)} if preload else {}
        command = [sys.executable, str(HERE / "forking.py"), str(self.root)]
        with one_core():
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=aside
            )
        self._answer()

    def run(
        self,
        script: str,
        words: Sequence[str],
        folder: Path,
        *,
        fault: Fault | None = None,
        seconds: float = SECONDS,
        memory: int = 3 * GIGABYTE,
        learn: bool = False,
        **environment: str,
    ) -> Done:
        """Run a script, such as ``pipeline/train.py``, on those words in ``folder``.

        What it imports is imported before all later ones where they are to ``learn`` from it.
        """
        request = {
            "script": script,
            "words": list(words),
            "folder": str(folder),
            "fault": fault,
            "seconds": seconds,
            "memory": memory,
            "learn": learn,
            "environment": environment,
            "aside": str(self.aside / "streams"),
        }
        assert self.process.stdin
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return Done(**self._answer())

    def _answer(self) -> dict:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{HERE / 'forking.py'} ended with exit code {self.process.wait()}")
        return json.loads(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
