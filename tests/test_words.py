"""Names and prose are those of the field, in short sentences; each rule finds a planted breach."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import words

SOURCES = words.read_sources(Path(__file__).resolve().parents[1], "pipeline", "shards", "launchers")
LONG = " ".join(["word"] * (words.MOST_WORDS + 1))

BREACHES: dict[str, list[dict[str, str]]] = {
    "private_identifiers": [
        {"pipeline/planted.py": "told = 1"},
        {"pipeline/planted.py": "def f(place): pass"},
        {"shards/planted.py": "def _shown(): pass"},
        {"pipeline/planted.py": "x.mark()"},
        {"launchers/planted.py": "f(asked=1)"},
    ],
    "doubled_names": [
        {"pipeline/planted.py": "class Batch: pass"},
        {"shards/planted.py": "ROOT = 1"},
        {"pipeline/planted.py": "(new, kd_loss) = 1, 2"},
        {"pipeline/planted.py": "entry: int = 1"},
    ],
    "long_sentences": [
        {"pipeline/planted.py": f'"""{LONG}."""'},
        {"pipeline/planted.py": f'def f():\n    """Return.\n\n    {LONG[:60]}\n    {LONG[60:]}.\n    """'},
        {"pipeline/planted.py": f"# {LONG[:60]}\n# {LONG[60:]}\n"},
        {"shards/planted.py": f'raise ValueError("{LONG}")'},
        {"shards/planted.py": f'raise ValueError(f"{LONG[:60]}" f"{{x}}{LONG[60:]}")'},
    ],
    "noun_docstrings": [
        {"pipeline/planted.py": f'def f():\n    """{word} it is."""'} for word in ("Of", "What", "Whether")
    ],
}


@pytest.mark.parametrize("name", BREACHES)
def test_names_and_prose_keep_the_rules(name: str):
    assert not list(rule(name)(SOURCES))


@pytest.mark.parametrize(("name", "planted"), [(name, each) for name, cases in BREACHES.items() for each in cases])
def test_a_planted_breach_is_found(name: str, planted: dict[str, str]):
    found = list(rule(name)(SOURCES | planted))
    assert any(path in line for line in found for path in planted)


def test_a_sentence_ends_where_a_paragraph_a_list_item_or_an_indented_line_does():
    text = "One two. Three four:\n\n    a table  of numbers\n    and more\n\n- an item\n- another ``with code``\n"
    assert words.sentences(text) == [
        "One two.",
        "Three four:",
        "a table of numbers",
        "and more",
        "- an item",
        "- another CODE",
    ]


def rule(name: str) -> Callable[[words.Sources], Iterator[str]]:
    return getattr(words, name)
