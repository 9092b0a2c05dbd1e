"""What README and the pages under ``docs/`` name exists: files, options, keys, methods, messages, links."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pages import (
    PAGES,
    ROOT,
    anchors,
    blocks,
    command_lines,
    expand_braces,
    is_printed,
    links,
    messages,
    spans,
    texts_in_code,
    words_of,
)
from pydantic import BaseModel

from pipeline.config.recipe import Recipe, load_recipe
from pipeline.config.schema import find_node, known_keys, model_schema
from pipeline.losses._registry import LossSpec, find_loss, known_losses
from pipeline.models import known_models
from pipeline.multirun.space import Range

TOP = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
RECIPE = model_schema(Recipe)
MADE = {"runs", "datasets", "caches"}
"""Folders that commands make."""
SCRIPT = re.compile(r"(pipeline|shards|launchers|slurm)/[\w/]+\.(py|sh)")
FILE_ENDINGS = ("md", "yaml", "json", "jsonl", "safetensors", "py", "sh", "npy", "pt", "pth", "png", "out")
SELECTION = {"method", "methods", "with", "seeds", "jobs", "side", "base", "constants", "overrides"}
"""Names before ``=`` or ``:`` that choose files, or belong to recipe files and not to recipes."""
COMMAND_OPTIONS = {
    "cache_teacher": ("pipeline.caching.write", "CacheArguments"),
    "pseudo_label": ("pipeline.pseudo_label", "LabelArguments"),
    "evaluate": ("pipeline.evaluate", "EvaluateArguments"),
    "export": ("pipeline.export", "ExportArguments"),
    "predict": ("pipeline.predict", "PredictArguments"),
    "bench": ("pipeline.bench", "BenchArguments"),
}
OTHERS = {"out", "minutes", "cifar", "weights", "jpegs", "file", "strict", "space", "trials"}
"""Options of ``half_hour.py`` and of ``search.py``, the mark of a block, and an argument of torch."""

page_by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@page_by_page
def test_files_that_a_page_names_exist(page: Path):
    names = [word for name in named(page) for word in expand_braces(name.partition(":")[0])]
    files = [name for name in names if name.split("/")[0] in TOP and re.fullmatch(r"[\w.*/\-]+", name)]
    assert [name for name in files if not list(ROOT.glob(name))] == []


@page_by_page
def test_options_that_a_page_gives_to_a_script_exist(page: Path):
    for line in command_lines(page.read_text()):
        script = SCRIPT.search(line)
        if script and script[0].endswith(".py"):
            source = (ROOT / script[0]).read_text() + sources_of(script[0])
            options = re.findall(r"(?<![\w-])--[a-z][a-z-]+", line[script.end() :])
            assert [option for option in options if f'"{option}"' not in source] == [], line


@page_by_page
def test_options_that_a_page_mentions_exist(page: Path):
    source = sources_of("pipeline") + sources_of("shards") + sources_of("launchers") + sources_of("slurm")
    options = [span for span in spans(page.read_text()) if re.fullmatch(r"--[a-z][a-z-]+", span)]
    assert [option for option in options if option not in source] == []


@page_by_page
def test_keys_that_a_page_names_exist(page: Path):
    assert [key for key in keys_of(page) if not is_key(key)] == []


@page_by_page
def test_environment_variables_that_a_page_names_are_read(page: Path):
    source = sources_of("pipeline") + sources_of("launchers") + sources_of("slurm")
    names = re.findall(r"\b(?:PIPELINE|ACCELERATE|SLURM)_[A-Z_]+\b", page.read_text())
    assert [name for name in names if name not in source] == []


@page_by_page
def test_methods_and_overlays_that_a_page_names_exist(page: Path):
    methods = {path.stem for path in (ROOT / "configs" / "methods").glob("*.yaml")}
    overlays = {path.stem for path in (ROOT / "configs").glob("*/overlays/*.yaml")}
    text = page.read_text()
    named = {word for found in re.findall(r"\bmethods?=([a-z0-9_,]+)", text) for word in found.split(",") if word}
    assert named <= methods
    assert {
        word for found in re.findall(r"\bwith=([a-z0-9_,]+)", text) for word in found.split(",") if word
    } <= overlays


@page_by_page
def test_links_of_a_page_lead_somewhere(page: Path):
    for target in links(page.read_text()):
        path, _, anchor = target.partition("#")
        found = (page.parent / path) if path else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found.read_text()), target


@page_by_page
def test_commands_with_a_recipe_of_the_project_compose_it(page: Path):
    for line in command_lines(page.read_text()):
        for recipe, overrides in recipes_of(line):
            load_recipe(recipe, overrides)


def test_every_method_is_on_the_page_of_methods():
    text = (ROOT / "docs" / "methods.md").read_text()
    assert [path.stem for path in (ROOT / "configs" / "methods").glob("*.yaml") if f"`{path.stem}`" not in text] == []


def test_readme_stays_a_guide_of_120_lines():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_every_page_is_in_the_contents():
    contents = links((ROOT / "docs" / "README.md").read_text())
    assert {page.name for page in PAGES if page.name != "README.md"} <= set(contents)


def test_the_index_of_errors_has_messages_that_the_code_prints():
    texts = texts_in_code("pipeline", "shards", "launchers")
    found = messages((ROOT / "docs" / "errors.md").read_text())
    assert len(found) > 60
    assert [message for message in found if not is_printed(message, texts)] == []


def test_a_message_that_no_code_prints_is_found():
    texts = texts_in_code("pipeline", "shards", "launchers")
    assert is_printed("there is no loss …; …", texts)
    assert not is_printed("there is no loss … here; …", texts)


def test_every_key_of_a_journal_is_explained():
    text = (ROOT / "docs" / "journal.md").read_text()
    journal = ROOT / "tests" / "runs" / "kept" / "end" / "journal.jsonl"
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    keys = {key for line in lines for key in (*line, *line.get("timing", {}), *timings(line)) if "/" not in key}
    assert [key for key in keys if f"`{key}`" not in text] == []


@pytest.mark.parametrize(
    "planted",
    ["losses.dkd.gamma=4", "data.paths=x", "teacher.weight=x", "losses.ddkd.feature.width", "stat_scopes: rank"],
)
def test_a_key_that_does_not_exist_is_found(planted: str):
    assert not is_key(planted)


def timings(line: dict[str, Any]) -> dict[str, float]:
    return line.get("timing", {}).get("milliseconds", {})


def named(page: Path) -> list[str]:
    """Return the inline code of a page, and the words of its commands."""
    text = page.read_text()
    return [*spans(text), *(word for line in command_lines(text) for word in words_of(line))]


def sources_of(path: str) -> str:
    """Return the source of a folder; for a script, that of its package."""
    folder = ROOT / path if (ROOT / path).is_dir() else (ROOT / path).parent
    return "".join(file.read_text() for file in folder.rglob("*") if file.suffix in (".py", ".sh"))


def keys_of(page: Path) -> Iterator[str]:
    """Yield what a page names as ``a.b``, ``a=value`` or ``a: value``."""
    for name in named(page):
        dotted = re.match(r"[a-z_]+(\.[\w:]+)*", name)
        if dotted is None or dotted[0].endswith(tuple(f".{ending}" for ending in FILE_ENDINGS)):
            continue
        rest = name[dotted.end() :]
        is_recipe_key = "." in dotted[0] and dotted[0].partition(".")[0] in Recipe.model_fields and not rest
        if is_recipe_key or re.match(r"=|: ", rest):
            yield dotted[0] if is_recipe_key or rest.startswith("=") else f"{dotted[0]}: "


def is_key(name: str) -> bool:
    """Return whether a recipe or a command has a key: a dotted one from its root, one with ``: `` anywhere."""
    key, mapping, _ = re.split(r"(=|: |$)", name, maxsplit=1)
    parts = key.replace("NAME", "kd").split(".")  # a page on all losses writes NAME
    if ":" in key or parts[0] == "constants":
        return True  # a loss of the user's own, and constants, which any file may define
    if mapping == ": ":
        return key in all_fields() | options() | SELECTION | {*known_losses()}
    if len(parts) == 1 and key in options() | SELECTION | OTHERS:
        return True
    return all(is_known(parts[:depth], part) for depth, part in enumerate(parts))


def is_known(section: list[str], key: str) -> bool:
    known = known_keys(find_node(RECIPE, section))
    return not known or key in known


def options() -> set[str]:
    """Return the names of the options ``name=value`` of the commands."""
    found = [getattr(importlib.import_module(module), name) for module, name in COMMAND_OPTIONS.values()]
    return {field for model in found for field in model.model_fields}


def all_fields() -> set[str]:
    """Return the names of the keys of all sections and losses."""
    fields: set[str] = set()
    models: list[Any] = [Recipe, Range, *(find_loss(name).Config for name in known_losses())]
    for model in models:  # the list grows meanwhile
        for name, field in model.model_fields.items():
            fields.add(field.alias or name)
            models += [kind for kind in unpacked(field.annotation) if is_section(kind) and kind not in models]
    return fields


def unpacked(annotation: Any) -> list[Any]:
    return [annotation, *(kind for argument in get_args(annotation) for kind in unpacked(argument))]


def is_section(kind: Any) -> bool:
    return isinstance(kind, type) and kind is not LossSpec and issubclass(kind, BaseModel)


def recipes_of(line: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the recipes of the project that a command names, each with its overrides."""
    script = re.search(
        r"pipeline/(train|cache_teacher|pseudo_label|bench|doctor|compare|evaluate)\.py|launchers/job.sh", line
    )
    if script is None:
        return
    words = [word for word in words_of(line[script.end() :]) if not word.startswith("-")]
    own = options() if script[1] in COMMAND_OPTIONS else set()
    overrides = [
        word
        for word in words
        if "=" in word and word.partition("=")[0] not in own | {"seeds", "jobs", "side", "space", "trials"}
    ]
    methods = [word.partition("=")[2].split(",") for word in overrides if word.startswith("methods=")]
    others = [word for word in overrides if not word.startswith("methods=")]
    for recipe in (word for word in words if word.startswith("configs/")):
        for method in methods[0] if methods else [None]:
            yield recipe, [*others, *([f"method={method}"] if method else [])]


def test_blocks_are_marked_with_words_that_the_tests_know():
    words = {word for page in PAGES for block in blocks(page.read_text()) for word in block.words}
    assert {word for word in words if word != "run" and not word.startswith("file=")} == set()


@page_by_page
def test_python_of_a_page_compiles(page: Path):
    for block in blocks(page.read_text()):
        if block.language == "python":
            compile(block.code, f"{page.name}: {block.file}", "exec")


@page_by_page
def test_networks_that_a_page_names_exist(page: Path):
    names = re.findall(r"\b(?:cifar_[a-z0-9_]*[a-z0-9]|mobilenet_v1)\b", page.read_text())
    assert set(names) <= set(known_models())
