"""Write a recipe for every cell of the papers' tables, and the tables of README.md, from tables.yaml.

    python configs/generate.py            write them
    python configs/generate.py --check    exit with 1 where a file is not what it would write

A row is two files laid over each other: its method's, with the method's constants, and its pair's, with what varies.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import yaml

CONFIGS = Path(__file__).resolve().parent
BEGIN, END = "<!-- written by generate.py -->\n", "<!-- end -->\n"


def files(tables: dict[str, Any]) -> dict[Path, str]:
    """Return every file to write, by path under ``configs/``."""
    found = {Path("README.md"): readme(tables)}
    for name in tables["teachers"]:
        found[Path("cifar100", "teachers", f"{name}.yaml")] = teacher(tables, name)
    for dataset, facts in tables["datasets"].items():
        for pair, cells in facts["pairs"].items():
            for method in cells.get("methods", tables["methods"]):
                found[Path(dataset, pair, f"{method}.yaml")] = row(tables, dataset, pair, method)
    for variant in tables["variants"].values():
        found |= variants(tables, variant)
    for cache in tables["caches"]:
        for place in cache["pairs"]:
            for method in cache["methods"]:
                found[Path(place, f"{method}_cached.yaml")] = cached(tables, cache, place, method)
    return found


def row(tables: dict[str, Any], dataset: str, pair: str, method: str) -> str:
    """Return the recipe of one pair by one method."""
    facts, how = tables["datasets"][dataset], tables["methods"][method]
    cells = facts["pairs"][pair]
    path = f"configs/{dataset}/{pair}/{method}.yaml"
    teacher, student = (tables["networks"][cells[role]] for role in ("teacher", "student"))
    own = {"base": [f"../../methods/{how.get('base', method)}.yaml", "pair.yaml"], **how.get("own", {})}
    learns = own.get("teacher", True) is not None
    gmac = 3 * student["gmac"] + (teacher["gmac"] if learns else 0)
    cost = f"{gmac:.3g} GMAC an image{' and what the losses add (--check)' if learns else ''}"
    return (
        f"# {_title(tables, method)}, {teacher['title']} to {student['title']}, {facts['title']}.\n"
        f"#   accelerate launch pipeline/train.py {path}{facts['command']}\n"
        f"# Paper: {expected(cells['published'], method)}. Cost: {cost}, {how.get('images', facts['images'])}.\n"
        + _yaml(own)
    )


def expected(published: dict[str, dict[str, float]], method: str) -> str:
    """Return what the papers print of a cell, each number with the tables it stands in."""
    sources: dict[str, list[str]] = {}
    for source, cells in published.items():
        if method in cells:
            number = f"top-5 {cells[method]:.2f}" if source.endswith("top-5") else f"top-1 {cells[method]:.2f}"
            sources.setdefault(number, []).append(source.removesuffix(", top-5"))
    return ", ".join(f"{number} ({'; '.join(tables)})" for number, tables in sources.items()) or "not reported"


def teacher(tables: dict[str, Any], name: str) -> str:
    """Return the recipe of a CIFAR-100 teacher."""
    network = tables["networks"][name]
    pairs = tables["datasets"]["cifar100"]["pairs"].values()
    published = next(cells["published"] for cells in pairs if cells["teacher"] == name)
    own = {"base": ["../../methods/ce.yaml", "../cifar100.yaml"], "student": {"model": f"cifar_{name}"}}
    return (
        f"# The {network['title']} teacher of CIFAR-100, trained by the strategy of its students.\n"
        f"#   accelerate launch pipeline/train.py configs/cifar100/teachers/{name}.yaml\n"
        f"# Published: {expected(published, 'teacher')}. "
        f"Cost: {3 * network['gmac']:.3g} GMAC an image, 12 million images.\n" + _yaml(own)
    )


def variants(tables: dict[str, Any], variant: dict[str, Any]) -> dict[Path, str]:
    """Return the rows of a group that lie over other rows: the proxy, and what the papers say to the letter."""
    found = {}
    for pair in variant["pairs"]:
        for method in variant["methods"]:
            path = Path(variant["path"].format(pair=pair, method=method))
            bases = [f"cifar100/{pair}/{method}.yaml", variant["over"]]
            own = {"base": [os.path.relpath(base, path.parent) for base in bases]}
            # A base that is laid over the row may bring back what the row took away.
            own |= tables["methods"][method].get("own", {})
            found[path] = (
                f"# {_title(tables, method)}, {variant['title']}: {pair}/{method}.yaml under {variant['over']}.\n"
                f"#   accelerate launch pipeline/train.py configs/{path}\n"
                f"# {variant['expect']}\n" + _yaml(own)
            )
    return found


def cached(tables: dict[str, Any], cache: dict[str, Any], place: str, method: str) -> str:
    """Return the row of ``place``, a data set and pair, that learns from a cache."""
    dataset, pair = place.split("/")
    facts, path = tables["datasets"][dataset], f"configs/{place}/{method}_cached.yaml"
    cells = facts["pairs"][pair]
    teacher, student = (tables["networks"][cells[role]] for role in ("teacher", "student"))
    kept: dict[str, Any] = {"cache": f"caches/{dataset}/{cells['teacher']}{cache.get('suffix', '')}"}
    if "encode" in cache:
        kept["encode"] = {"last": cache["encode"]}
    own = {"base": f"{method}.yaml", "data": {"views": cache["views"]}, "teacher": kept}
    return (
        f"# {_title(tables, method)}, {teacher['title']} to {student['title']}, {facts['title']}, "
        f"from what the teacher answered once: {method}.yaml with a cache.\n"
        f"#   accelerate launch pipeline/cache_teacher.py {path}{facts['command']}\n"
        f"#   accelerate launch pipeline/train.py {path}{facts['command']}\n"
        f"# Cache: {cache['views']} views of {_size(view_bytes(cache, dataset, teacher))}. "
        f"Cost: {3 * student['gmac']:.3g} GMAC an image and what the losses add (--check), {facts['images']}.\n"
        + _yaml(own)
    )


def view_bytes(cache: dict[str, Any], dataset: str, teacher: dict[str, Any]) -> int:
    """Return the bytes of one view of every training image: float16 numbers."""
    data = yaml.safe_load((CONFIGS / dataset / f"{dataset}.yaml").read_text())["data"]
    numbers = data["classes"]
    if "last" in cache["kinds"]:
        channels, height, width = teacher["last"]
        numbers += cache.get("encode", channels) * height * width
    return 2 * data["samples"] * numbers


def readme(tables: dict[str, Any]) -> str:
    """Return README.md with its tables."""
    known = {
        f"{d}/{p}/{m}" for d, facts in tables["datasets"].items() for p in facts["pairs"] for m in tables["methods"]
    }
    if stray := tables["measured"].keys() - known:
        raise ValueError(f"tables.yaml: measured: {', '.join(stray)}: there is no such row")
    before, _, rest = (CONFIGS / "README.md").read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    sections = [
        section(tables, dataset, facts["title"], pair)
        for dataset, facts in tables["datasets"].items()
        for pair in facts["pairs"]
    ]
    return before + BEGIN + "\n".join(sections) + END + after


def section(tables: dict[str, Any], dataset: str, title: str, pair: str) -> str:
    """Return the table of one pair."""
    cells = tables["datasets"][dataset]["pairs"][pair]
    teacher, student = (tables["networks"][cells[role]]["title"] for role in ("teacher", "student"))
    published = cells["published"]
    lines = [f"### {title}, {teacher} to {student}\n", _line(["recipe", *published, "ours"])]
    lines.append(_line(["---"] * (len(published) + 2)))
    if any("teacher" in source for source in published.values()):
        lines.append(_line(["the teacher", *(_number(source.get("teacher")) for source in published.values()), ""]))
    for method in cells.get("methods", tables["methods"]):
        if tables["methods"][method].get("hidden"):
            continue
        name = f"{dataset}/{pair}/{method}"
        numbers = [_number(source.get(method)) for source in published.values()]
        lines.append(_line([f"[`{method}`]({name}.yaml)", *numbers, str(tables["measured"].get(name, "–"))]))
    return "\n".join(lines) + "\n"


def _title(tables: dict[str, Any], method: str) -> str:
    title = tables["methods"][method]["title"]
    return title[0].upper() + title[1:]


def _size(count: int) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _yaml(own: dict[str, Any]) -> str:
    """Return one line a key; what nests is written in flow style."""
    flow = {k: yaml.safe_dump(v, default_flow_style=True, width=1000).removesuffix("...\n") for k, v in own.items()}
    return "".join(f"{key}: {value}" for key, value in flow.items())


def main(check: bool) -> int:
    """Write, or compare, every file; return the exit code."""
    wanted = files(yaml.safe_load((CONFIGS / "tables.yaml").read_text()))
    stale = [path for path, text in wanted.items() if not _same(CONFIGS / path, text)]
    if check:
        print("\n".join(f"configs/{path}: run python configs/generate.py" for path in stale), end="")
        return int(bool(stale))
    for path in stale:
        (CONFIGS / path).parent.mkdir(parents=True, exist_ok=True)
        (CONFIGS / path).write_text(wanted[path])
    return 0


def _same(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text() == text


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["--check"]):
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1:] == ["--check"]))
