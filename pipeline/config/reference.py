"""The reference of a recipe's keys, as files: a page of tables, and a JSON schema for editors.

python pipeline/config/reference.py            write docs/recipe.md and configs/recipe.schema.json
python pipeline/config/reference.py --check    exit with 1 where a file is not what it would write
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from pipeline.config.keys import OWN_LOSS, KeyRow, file_rows, is_section, key_row, section_rows
from pipeline.config.recipe import Recipe
from pipeline.config.schema import file_schema, loss_schema, model_schema, subkeys
from pipeline.errors import ROOT
from pipeline.losses._base import Loss
from pipeline.losses._registry import known_losses

PAGE, SCHEMA = Path("docs", "recipe.md"), Path("configs", "recipe.schema.json")
_BEGIN, _END = "<!-- written by pipeline/config/reference.py -->\n", "<!-- end -->\n"


def page(text: str) -> str:
    """Return the text of docs/recipe.md with its tables, which are between the marks."""
    before, _, rest = text.partition(_BEGIN)
    return before + _BEGIN + "\n".join(_page_sections()) + _END + rest.partition(_END)[2]


def _page_sections() -> Iterator[str]:
    """Yield the sections of the page, each with a table."""
    recipe = model_schema(Recipe)
    nodes = subkeys(recipe)
    sections = {name: node for name, node in nodes.items() if is_section(node)}
    top = [key_row(name, node, name in recipe["required"]) for name, node in nodes.items()]
    yield _page_section("## Keys at the top level", "", top)
    yield _page_section("## Keys that name a recipe's files", "", file_rows())
    for name, node in sections.items():
        yield _page_section(f"## {name}", node["description"], section_rows(name, node))
    common = model_schema(Loss.Config)
    yield _page_section("## losses", f"{OWN_LOSS} Every loss has these keys:", section_rows("losses.NAME", common))
    for name in known_losses():
        node = loss_schema(name)
        rows = [row for row in section_rows(f"losses.{name}", node) if row.key.split(".")[2] not in subkeys(common)]
        yield _page_section(f"### losses.{name}", node["description"], rows)


def _page_section(heading: str, text: str, rows: Iterable[KeyRow]) -> str:
    """Return a heading, a text and a Markdown table of the rows, if there are any."""
    lines = [f"| `{row.key}` | `{row.type}` | {row.default} | {row.description} |" for row in map(_escaped, rows)]
    table = ["| key | type | default | meaning |", "| --- | --- | --- | --- |", *lines] if lines else []
    parts = [heading, _in_markdown(text), "\n".join(table)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _escaped(row: KeyRow) -> KeyRow:
    """Return the row for a Markdown table."""
    default = row.default if row.default in ("required", "") else f"`{row.default}`"
    texts = row._replace(default=default, description=_in_markdown(row.description))
    return KeyRow(*(text.replace("|", "\\|") for text in texts))


def _in_markdown(text: str) -> str:
    return " ".join(text.replace("``", "`").split())


def generated_files() -> dict[Path, str]:
    """Return the text of every generated file, by path from the project's folder."""
    return {PAGE: page((ROOT / PAGE).read_text()), SCHEMA: _json_text(file_schema(Recipe)) + "\n"}


def _json_text(value: Any, margin: str = "") -> str:
    """Return a value as JSON; what fits in a line is one line."""
    line = json.dumps(value, ensure_ascii=False)
    if len(margin + line) <= 120 or not isinstance(value, dict | list):
        return line
    deeper = f"{margin} "
    if isinstance(value, list):
        lines = [f"{deeper}{_json_text(item, deeper)}" for item in value]
        return "[\n" + ",\n".join(lines) + f"\n{margin}]"
    lines = [f"{deeper}{json.dumps(key)}: {_json_text(below, deeper)}" for key, below in value.items()]
    return "{\n" + ",\n".join(lines) + f"\n{margin}}}"


def main(check: bool) -> int:
    """Write, or compare, the generated files; return the exit code."""
    stale = {path: text for path, text in generated_files().items() if not _same(ROOT / path, text)}
    for path, text in stale.items():
        if check:
            print(f"{path}: run python pipeline/config/reference.py")
        else:
            (ROOT / path).write_text(text)
    return int(check and bool(stale))


def _same(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text() == text


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["--check"]):
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1:] == ["--check"]))
