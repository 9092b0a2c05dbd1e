"""Record finished runs in configs/results/, and write the tables of docs/results.md from them and from tables.yaml.

python configs/results.py add RUN_FOLDER …    record runs, one file per recipe, and write the tables
python configs/results.py                     write the tables
python configs/results.py --check             exit with 1 if the page differs from what would be written
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from pipeline.cli import entry
from pipeline.config.measured import RESULTS, MeasuredRun, count_seeds, mean_and_deviation, read_results
from pipeline.config.source import known_methods
from pipeline.config.tables import TEACHER, PairTable, Tables, load_tables
from pipeline.errors import ROOT, RecipeError, display_path
from pipeline.runs.recording import record_run
from shards.manifest import write_atomically

PAGE = ROOT / "docs" / "results.md"
BEGIN, END = "<!-- written by configs/results.py -->\n", "<!-- end -->\n"
Cells = dict[str, list[MeasuredRun]]
"""The runs of each recipe of a pair, by its name."""
Column = Callable[[list[MeasuredRun]], str]
"""A column of a table, as a function of a recipe's runs."""


def page(text: str, tables: Tables, results: Path) -> str:
    """Return the page with its tables; ``text`` is the page as it is."""
    measured = read_all(results)
    parts = []
    for dataset, facts in tables.datasets.items():
        for name, pair in facts.pairs.items():
            metric = "" if facts.metric == "top-1" else f", {facts.metric}"
            title = f"{facts.title}{metric}, {tables.networks[pair.teacher]} to {tables.networks[pair.student]}"
            teachers = measured.get(Path(dataset, "teachers"), {}).get(pair.teacher, [])
            cells = measured.pop(Path(dataset, name), {})
            parts.append(pair_section(title, f"configs/{dataset}/{name}.yaml", tables, pair, cells, teachers))
    parts += [other_section(folder, cells) for folder, cells in measured.items()]
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + "\n" + "\n".join(parts) + "\n" + END + after


def read_all(results: Path) -> dict[Path, Cells]:
    """Return the recorded runs by folder and by recipe."""
    found: dict[Path, Cells] = {}
    for path in sorted(results.rglob("*.json")):
        if runs := read_results(path):
            found.setdefault(path.parent.relative_to(results), {})[path.stem] = runs
    return found


def pair_section(
    title: str, recipe: str, tables: Tables, pair: PairTable, cells: Cells, teachers: list[MeasuredRun]
) -> str:
    """Return the section of a pair: what the papers print, what was measured, and the runs."""
    numbers = {TEACHER: teachers, **cells}
    ours = _measured_columns(numbers.values(), any(name.endswith("top-5") for name in pair.published))
    known = {name for printed in [numbers, *pair.published.values()] for name in printed if printed[name]}
    names = [name for name in dict.fromkeys([TEACHER, *tables.methods_of(pair), *cells]) if name in known]
    rows = [
        [
            "the teacher" if name == TEACHER else method_link(name),
            *(_number(printed.get(name)) for printed in pair.published.values()),
            *(column(numbers.get(name, [])) for column in ours.values()),
        ]
        for name in names
    ]
    lines = [f"### {title}", "", f"`{recipe}`" + ("" if cells else ": not measured yet."), ""]
    lines += table(["recipe", *pair.published, *ours], rows)
    if without := [f"`{name}`" for name in tables.methods_of(pair) if name not in names]:
        lines += ["", f"Without a number so far: {', '.join(without)}."]
    return "\n".join([*lines, *_run_lines(cells)]) + "\n"


def other_section(folder: Path, cells: Cells) -> str:
    """Return the section of recipes that no paper's table has, such as those of the proxy."""
    ours = _measured_columns(cells.values(), False)
    rows = [[f"`{name}`", *(column(runs) for column in ours.values())] for name, runs in cells.items()]
    lines = [f"### configs/{folder}", "", *table(["recipe", *ours], rows), *_run_lines(cells)]
    return "\n".join(lines) + "\n"


def _measured_columns(cells: Iterable[list[MeasuredRun]], with_top5: bool) -> dict[str, Column]:
    """Return the columns of what was measured by title, each a function of a recipe's runs; none without a run."""
    runs = [run for each in cells for run in each]
    columns: dict[str, Column] = {"ours": _ours} if runs else {}
    if with_top5 and any(run.top5 is not None for run in runs):
        columns["ours, top-5"] = _ours_top5
    return columns


def _ours(runs: list[MeasuredRun]) -> str:
    """Return the mean of the last epoch, that of the best epoch in brackets, and the number of seeds."""
    if not runs:
        return ""
    last, best = (mean_and_deviation([getattr(run, key) for run in runs]) for key in ("last", "best"))
    return f"{last} ({best}), {count_seeds(runs)}"


def _ours_top5(runs: list[MeasuredRun]) -> str:
    return mean_and_deviation([run.top5 for run in runs]) if any(run.top5 is not None for run in runs) else ""


def _run_lines(cells: Cells) -> list[str]:
    """Return the lines of a table with a row per run, none if there are no runs."""
    columns = ["run", "seed", "last epoch", "best epoch", "epochs", "minutes", "trained on", "commit", "teacher"]
    rows = [[f"`{name}`", *_facts(run)] for name, runs in cells.items() for run in runs]
    return ["", *table(columns, rows)] if rows else []


def _facts(run: MeasuredRun) -> list[str]:
    commit = f"{(run.commit or 'not known')[:9]}{' and changes' if run.uncommitted_changes else ''}"
    # Of a digest, the first digits are enough to see whether two are the same.
    kind, colon, digest = (run.teacher or "").rpartition(":")
    device = f"{run.ranks} × {run.card}" if (run.ranks or 1) > 1 else str(run.card or "not known")
    device += f", {run.side} runs together" if run.side else ""
    minutes = "" if run.minutes is None else f"{run.minutes:,.1f}"
    numbers = [str(run.seed), _number(run.last), _number(run.best), str(run.epochs), minutes]
    return [*numbers, device, commit, f"{kind}{colon}{digest[:12] if colon else digest}"]


def method_link(name: str) -> str:
    """Return a recipe's name, with a link to the method's file if there is one of that name."""
    return f"[`{name}`](../configs/methods/{name}.yaml)" if name in known_methods() else f"`{name}`"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def main(args: Sequence[str]) -> None:
    """Record the named runs and write the page, or compare the page."""
    command, *folders = args or ("",)
    if command not in ("", "add", "--check") or bool(folders) != (command == "add"):
        raise RecipeError("command line: expected nothing, --check, or add and the folders of finished runs")
    for folder in folders:
        path = record_run(Path(folder), RESULTS)
        print(f"{folder}: recorded in {display_path(path)}")
    wanted = page(PAGE.read_text(), load_tables(), RESULTS)
    if command != "--check":
        write_atomically(PAGE, wanted.encode())
    elif wanted != PAGE.read_text():
        print(f"{display_path(PAGE)}: the tables are out of date: run python configs/results.py")
        sys.exit(1)


if __name__ == "__main__":
    entry(main)
