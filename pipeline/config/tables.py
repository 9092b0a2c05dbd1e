"""The papers' tables, ``configs/tables.yaml``: what they print of each pair by each method.

    python pipeline/config/tables.py [PAIR …] [methods=kd,dkd] [key=value …]

prints the recipe of each cell, a line each with tabs between its arguments; by default those of ImageNet's tables.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from pydantic import ValidationError

from pipeline.config.reading import read_yaml
from pipeline.config.source import CONFIGS, RecipeSource, find_recipe, split_names
from pipeline.errors import RecipeError, display_path, run_script
from pipeline.frozen_model import FrozenModel

FILE = CONFIGS / "tables.yaml"
TEACHER = "teacher"
"""The key of the teacher's own accuracy among the published numbers of a pair."""


class PairTable(FrozenModel):
    """A pair of the tables: its networks, its methods and what the papers print."""

    teacher: str
    student: str
    methods: tuple[str, ...] = ()
    """Methods of its table; default: all."""
    published: dict[str, dict[str, float]]
    """The metric in percent by method, by the paper and its table; top-5 where the name of the table ends so."""


class DatasetTables(FrozenModel):
    """The pairs of a data set."""

    title: str
    metric: str = "top-1"
    """What the published numbers are."""
    pairs: dict[str, PairTable]


class Tables(FrozenModel):
    """All tables: titles by method and by network, and the data sets."""

    methods: dict[str, str]
    networks: dict[str, str]
    datasets: dict[str, DatasetTables]

    def table_of(self, source: RecipeSource) -> PairTable | None:
        """Return the table of a recipe's pair, None if the papers have none."""
        dataset = self._dataset_of(source)
        return dataset and dataset.pairs.get(source.path.stem)

    def _dataset_of(self, source: RecipeSource) -> DatasetTables | None:
        return self.datasets.get(source.path.parent.name) if source.path.parent.parent == CONFIGS else None

    def methods_of(self, pair: PairTable) -> tuple[str, ...]:
        """Return the methods of a pair's table, in their order."""
        return pair.methods or tuple(self.methods)

    def published(self, source: RecipeSource) -> dict[str, float]:
        """Return what the papers print of a recipe's pair and method, by paper and table."""
        pair = self.table_of(source)
        printed = pair.published.items() if pair and source.method else ()
        return {table: numbers[source.method] for table, numbers in printed if source.method in numbers}

    def published_text(self, source: RecipeSource) -> str:
        """Return what the papers print of a recipe's pair and method, each number with the tables it stands in."""
        tables: dict[str, list[str]] = {}
        dataset = self._dataset_of(source)
        for table, number in self.published(source).items():
            kind = "top-5" if table.endswith("top-5") or dataset is None else dataset.metric
            tables.setdefault(f"{kind} {number:.2f}", []).append(table.removesuffix(", top-5"))
        return ", ".join(f"{number} ({'; '.join(names)})" for number, names in tables.items()) or "not reported"


@cache
def load_tables() -> Tables:
    """Return the content of ``configs/tables.yaml``. Raises RecipeError if it is not valid."""
    try:
        return Tables.model_validate(read_yaml(FILE))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise RecipeError(f"{display_path(FILE)}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def table_cells(paths: Sequence[Path], methods: Sequence[str]) -> list[RecipeSource]:
    """Return the recipes of the given files by the given methods, file by file.

    Without methods, a pair of the tables has all of its table, and any other recipe is taken as it is.
    """
    found = []
    for path in map(find_recipe, paths):
        alone = RecipeSource(path)
        pair = load_tables().table_of(alone)
        own = methods or (load_tables().methods_of(pair) if pair else ())
        found += [RecipeSource(path, method) for method in own] or [alone]
    return found


def imagenet_pairs() -> list[Path]:
    """Return the pairs of ImageNet's tables."""
    return [CONFIGS / "imagenet" / f"{pair}.yaml" for pair in load_tables().datasets["imagenet"].pairs]


def main(args: Sequence[str]) -> None:
    """Print the arguments of each cell, one cell a line."""
    methods = [name for arg in args if arg.startswith("methods=") for name in split_names(arg.partition("=")[2])]
    paths = [Path(arg) for arg in args if "=" not in arg] or imagenet_pairs()
    overrides = [arg for arg in args if "=" in arg and not arg.startswith("methods=")]
    for cell in table_cells(paths, methods):
        print("\t".join([*cell.shown_args, *overrides]))


if __name__ == "__main__":
    run_script(main)
