"""Kinds of bad input: each writes one into a copy of the world, and names the command that reads it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from world import EVALUATE, TRAIN

Write = Callable[[Random, Path], "Trial"]
CANARY = "canary"
"""A file that nothing writes but what must not be executed."""


@dataclass(frozen=True)
class Trial:
    """A command, and what is wrong with what it reads."""

    what: str
    script: str = TRAIN
    words: tuple[str, ...] = ("ce.yaml", "stop.steps=1")
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Kind:
    """A kind of bad input; what is ``strict`` must be refused, else some cases of it are harmless."""

    write: Write
    strict: bool


KINDS: dict[str, Kind] = {}
"""By name, in the order in which cases take turns."""


def kind(name: str, *, strict: bool = False) -> Callable[[Write], Write]:
    """Register a kind."""

    def register(write: Write) -> Write:
        KINDS[name] = Kind(write, strict)
        return write

    return register


# -- trees of JSON or YAML --------------------------------------------------------------------------------------------

WRONG: tuple[Any, ...] = (
    *(
        None,
        True,
        -1,
        0,
        3.5,
        10**12,
        10**30,
        float("inf"),
        float("nan"),
        "",
        "x",
        "8",
        "../up",
        "/",
        "\x00",
        "é" * 300,
    ),
    *([], [[]], [1, "x"], {}, {"x": 1}, {"x": {"y": []}}),
)


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every place of a tree, as container and key."""
    keys = tree.keys() if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys:
        yield tree, key
        yield from places(tree[key])


def spoil(tree: Any, random: Random) -> tuple[Any, str]:
    """Return the tree with one change: a value of another kind, a key too few or too many; and what it is."""
    tree = copy.deepcopy(tree)
    container, key = random.choice(list(places(tree)))
    change = random.choice(["value", "value", "value", "delete", "add"])
    if change == "delete":
        del container[key]
        return tree, f"without {key!r}"
    if change == "add" and isinstance(container, dict):
        container["stray"] = random.choice(WRONG)
        return tree, f"a key more beside {key!r}"
    container[key] = value = random.choice([wrong for wrong in WRONG if wrong != container[key]])
    return tree, f"{key!r} is {short(value)}"


def short(value: Any) -> str:
    """Return a value as a line can show it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


DOCUMENTS = (
    *("null", "[]", "{}", "0", '"x"', "", "{", '{"a": 1', "[" * 100_000, '{"a":' * 50_000, "NaN", "\x00", "\ufeff{}"),
    *('{"a": 1, "a": 2}', "1" * 5000, "é"),
)


def spoil_document(path: Path, random: Random) -> str:
    """Spoil a JSON file: another value somewhere, another document, or a part of it; return what was done."""
    text = path.read_text()
    way = random.choice(["tree", "tree", "tree", "document", "cut"])
    if way == "document":
        path.write_text(found := random.choice(DOCUMENTS), encoding="utf-8")
        return f"{path.name} is {short(found[:70])}"
    if way == "cut":
        path.write_text(text[: (at := random.randrange(len(text)))])
        return f"{path.name} is cut at {at} of {len(text)}"
    tree, what = spoil(json.loads(text), random)
    path.write_text(json.dumps(tree, indent=1))
    return f"{path.name}: {what}"


def spoil_bytes(path: Path, random: Random) -> str:
    """Damage a file as storage does: bits, zeros, noise, an end too early, nothing; return what was done."""
    whole = path.read_bytes()
    content, what = _damaged(whole, random)
    while content == whole:  # zeros over zeros
        content, what = _damaged(whole, random)
    path.write_bytes(content)
    return f"{path.name}: {what}"


def _damaged(whole: bytes, random: Random) -> tuple[bytes, str]:
    content, size = bytearray(whole), len(whole)
    way = random.choice(["bit", "bit", "bit", "cut", "zeros", "noise", "empty", "tail"]) if size else "tail"
    at, count = random.randrange(max(size, 1)), random.choice([1, 16, 512, 4096])
    if way == "bit":
        content[at] ^= 1 << random.randrange(8)
    elif way == "cut":
        del content[at:]
    elif way == "zeros":
        content[at : at + count] = bytes(len(content[at : at + count]))
    elif way == "noise":
        content[at : at + count] = random.randbytes(len(content[at : at + count]))
    elif way == "tail":
        content += random.randbytes(count)
    else:
        content.clear()
    return bytes(content), f"{way} at {at} of {size}"


# -- commands ---------------------------------------------------------------------------------------------------------


def training(what: str, *words: str, recipe: str = "ce.yaml", **environment: str) -> Trial:
    """Return a step of training."""
    return Trial(what, TRAIN, (recipe, "stop.steps=1", *words), environment)


def reading_recipe(what: str, random: Random, recipe: str, *words: str) -> Trial:
    """Return one of the commands that read a recipe."""
    trains = Trial(what, TRAIN, (recipe, "stop.steps=1", *words))
    checks = Trial(what, TRAIN, ("--check", recipe, *words))
    evaluates = Trial(what, EVALUATE, (recipe, "weights=teacher.safetensors", *words))
    return random.choice([trains, trains, trains, checks, evaluates])
