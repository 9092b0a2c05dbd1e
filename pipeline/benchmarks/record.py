"""Records of benchmarks as JSON files: results, recipe, commit and machine."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import PlainSerializer, ValidationError

from pipeline.benchmarks.measure import Measurement
from pipeline.benchmarks.step import WHOLE
from pipeline.config.recipe import LoadedRecipe, dump_recipe
from pipeline.data.loader_settings import processor
from pipeline.errors import RecipeError
from pipeline.frozen_model import FrozenModel
from pipeline.runs.files import write_json
from pipeline.runs.versions import versions
from shards.cores import usable_cores


class BenchmarkRecord(FrozenModel):
    """The record of a finished benchmark."""

    what: str
    recipe: str
    """Path of the recipe."""
    resolved: dict[str, Any]
    """The recipe's keys and values, with the overrides of the command."""
    words: tuple[str, ...]
    date: str
    """ISO 8601, in UTC."""
    machine: dict[str, Any]
    versions: dict[str, Any]
    """Versions of Python and the packages, the commit, and whether there were uncommitted changes."""
    measured: tuple[Annotated[Measurement, PlainSerializer(lambda measured: measured._asdict())], ...]

    def shares(self) -> dict[str, float]:
        """Return each row's share of the whole by name; empty if the rows are not parts of a whole."""
        medians = {each.name: each.median for each in self.measured}
        whole = medians.get(WHOLE) if self.what == "step" else sum(medians.values()) if self.what == "losses" else None
        return {name: seconds / whole for name, seconds in medians.items()} if whole else {}


def new_record(
    what: str, loaded: LoadedRecipe, words: Sequence[str], measured: Sequence[Measurement], ranks: int
) -> BenchmarkRecord:
    """Return the record of a measurement that has just been made on this machine."""
    return BenchmarkRecord(
        what=what,
        recipe=str(loaded.source),
        resolved=dump_recipe(loaded.recipe),
        words=tuple(words),
        date=datetime.now(UTC).isoformat(),
        machine=machine(ranks),
        versions=versions(),
        measured=tuple(measured),
    )


def machine(ranks: int) -> dict[str, Any]:
    """Return the facts that times depend on besides the code: processor, cores, GPU, ranks."""
    return {
        "cpu": processor(),
        "cores": len(usable_cores()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "ranks": ranks,
    }


def write_record(record: BenchmarkRecord, folder: Path) -> Path:
    """Write the record into ``folder`` under a unique name, and return its path."""
    when = datetime.fromisoformat(record.date).strftime("%Y%m%d-%H%M%S-%f")
    path = folder / f"{record.what}-{Path(record.recipe).stem}-{when}.json"
    write_json(path, record.model_dump(mode="json"))
    return path


def read_record(path: Path, what: str) -> BenchmarkRecord:
    """Return a record of ``what``. Raises RecipeError for a record of another benchmark, and for other files."""
    try:
        record = BenchmarkRecord.model_validate_json(path.read_bytes())
    except OSError as error:
        raise RecipeError(f"--compare: {path} cannot be read: {error.strerror}; name an earlier record") from None
    except ValidationError:
        raise RecipeError(f"--compare: {path} is no record of this command; name an earlier one") from None
    if record.what != what:
        raise RecipeError(f"--compare: {path} is a record of {record.what}, not of {what}; name one of {what}")
    return record
