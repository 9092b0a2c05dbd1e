"""The files of a run folder, and how JSON is written and read there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.errors import RecipeError
from shards.manifest import write_atomically

RESULT = "result.json"
RECIPE = "recipe.yaml"
IDENTITY = "identity.json"
VERSIONS = "versions.json"
STUDENT = "student.safetensors"
STUDENT_BEST = "student_best.safetensors"
STUDENT_EMA = "student_ema.safetensors"
PREEMPTED = "preempted"
"""Left by a command that a signal ended, with all that it did saved; gone when the run goes on."""
ANOTHER = "give folder=ANOTHER"


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` so that the file is either the old one or the new one, whole."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path, mend: str) -> Any:
    """Return what ``write_json`` wrote. Raises RecipeError, with what to do, where it is gone or damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: cannot be read ({error}); {mend}") from None
