"""The rules for names and prose, read from source text: which identifiers, names and sentences break them."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

Sources = Mapping[str, str]
"""Source text by path from the checkout."""

PRIVATE_WORDS = frozenset(
    {"told", "place", "stand", "asked", "about", "shown", "mark", "notice", "poisoned", "looks", "lacking", "held"}
)
"""Words that mean nothing to a reader who knows PyTorch; no identifier is one of them."""
PLUGIN_NAMES = frozenset({"Config", "main", "MODELS", "check", "__all__"})
"""Names that several modules define because they are looked up by name in each of them."""
NOUN_PHRASES = frozenset({"Of", "What", "Whose", "Whether", "How", "Which", "Where", "Who", "Those", "That", "When"})
"""Words that begin a noun phrase; a function's docstring begins with what the function does."""
MOST_WORDS = 25
"""Of a sentence."""


def read_sources(root: Path, *folders: str) -> dict[str, str]:
    """Return the text of every Python file in some folders of a checkout."""
    paths = sorted(path for folder in folders for path in (root / folder).rglob("*.py"))
    return {path.relative_to(root).as_posix(): path.read_text() for path in paths}


def private_identifiers(sources: Sources) -> Iterator[str]:
    """Yield each file that uses one of the private words as an identifier."""
    for path, text in sources.items():
        names = {token.string for token in _tokens(text) if token.type == tokenize.NAME}
        yield from (f"{path}: {name}" for name in sorted(names) if name.strip("_") in PRIVATE_WORDS)


def doubled_names(sources: Sources) -> Iterator[str]:
    """Yield each public name that several modules define at their top level."""
    modules = defaultdict(list)
    for path, text in sources.items():
        for name in {name for node in ast.parse(text).body for name in _defined(node)}:
            if not name.startswith("_") and name not in PLUGIN_NAMES:
                modules[name].append(path)
    yield from (f"{name}: {', '.join(paths)}" for name, paths in modules.items() if len(paths) > 1)


def long_sentences(sources: Sources) -> Iterator[str]:
    """Yield each sentence of a docstring, a comment or another string that has too many words."""
    for path, text in sources.items():
        for line, prose in [*_strings(text), *_comments(text)]:
            for sentence in sentences(prose):
                if len(sentence.split()) > MOST_WORDS:
                    yield f"{path}:{line}: {sentence}"


def noun_docstrings(sources: Sources) -> Iterator[str]:
    """Yield each function whose docstring is a noun phrase, and does not say what the function does."""
    for path, text in sources.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                first = (ast.get_docstring(node) or "Return").split()[0]
                if first in NOUN_PHRASES:
                    yield f"{path}:{node.lineno}: {node.name}: {first} …"


def sentences(prose: str) -> list[str]:
    """Return the sentences of a text, code between double backquotes counted as one word.

    A paragraph, an indented line (a table, a formula, a command) and an item of a list end a sentence, too.
    """
    prose = re.sub(r"``.*?``", "CODE", prose, flags=re.DOTALL)
    parts = re.split(r"\n\s*\n|\n(?=[ ]*[-*|] )|\n(?= {4})", prose)
    return [sentence for part in parts for sentence in re.split(r"(?<=[.!?])\s+", " ".join(part.split()))]


def _tokens(text: str) -> Iterator[tokenize.TokenInfo]:
    return tokenize.generate_tokens(io.StringIO(text).readline)


def _defined(node: ast.stmt) -> set[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)}


def _strings(text: str) -> Iterator[tuple[int, str]]:
    """Yield every string with its line; a docstring without its indentation, an f-string with a word for each value."""
    inside: set[ast.AST] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.JoinedStr):
            inside |= set(ast.walk(node))
            yield (
                node.lineno,
                "".join(
                    str(getattr(each, "value", "")) if isinstance(each, ast.Constant) else "X" for each in node.values
                ),
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in inside:
            yield node.lineno, _dedented(node.value)


def _dedented(text: str) -> str:
    first, _, rest = text.partition("\n")
    margin = min((len(line) - len(line.lstrip()) for line in rest.splitlines() if line.strip()), default=0)
    return "\n".join([first, *(line[margin:] for line in rest.splitlines())])


def _comments(text: str) -> Iterator[tuple[int, str]]:
    """Yield every comment with its first line; lines that follow one another at one column are one comment."""
    found: list[tuple[int, int, list[str]]] = []
    for token in _tokens(text):
        if token.type == tokenize.COMMENT:
            line, column = token.start
            if found and (found[-1][0] + len(found[-1][2]), found[-1][1]) == (line, column):
                found[-1][2].append(token.string.lstrip("# "))
            else:
                found.append((line, column, [token.string.lstrip("# ")]))
    yield from ((line, "\n".join(words)) for line, _, words in found)
