"""The pages under ``docs/`` and README.md: their blocks of code, names, commands and links."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
_FENCE = re.compile(r"^```(?P<info>[^\n]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
PLACEHOLDER = "…"


class Block(NamedTuple):
    """A fenced block of a page: language, words after it, and code."""

    language: str
    words: tuple[str, ...]
    code: str

    @property
    def runs(self) -> bool:
        return "run" in self.words

    @property
    def file(self) -> str | None:
        return next((word.removeprefix("file=") for word in self.words if word.startswith("file=")), None)


def blocks(text: str) -> list[Block]:
    """Return the fenced blocks of a page."""
    found = []
    for match in _FENCE.finditer(text):
        language, *words = match["info"].split() or [""]
        found.append(Block(language, tuple(words), match["code"]))
    return found


def spans(text: str) -> list[str]:
    """Return the inline code of a page, without its fenced blocks."""
    return re.findall(r"`([^`\n]+)`", _FENCE.sub("", text))


def command_lines(text: str) -> list[str]:
    """Return the commands of a page: the lines of its bash blocks without comments, and inline ones."""
    lines = [line for block in blocks(text) if block.language == "bash" for line in block.code.splitlines()]
    lines += [span for span in spans(text) if re.match(r"(python|torchrun|sbatch|accelerate) ", span)]
    return [line for line in (re.sub(r"(^|\s+)#.*", "", line).strip() for line in lines) if line]


def words_of(line: str) -> list[str]:
    """Return the words of a command, with braces expanded as a shell does; those with a placeholder are left out."""
    words = [word for part in shlex.split(line) for word in expand_braces(part)]
    return [word for word in words if PLACEHOLDER not in word]


def expand_braces(word: str) -> list[str]:
    """Return a word for each alternative of its first ``{a,b}``."""
    match = re.search(r"\{([^{}\s]*,[^{}\s]*)\}", word)
    if match is None or ":" in match[1]:
        return [word]
    ends = [f"{word[: match.start()]}{each}{word[match.end() :]}" for each in match[1].split(",")]
    return [found for end in ends for found in expand_braces(end)]


def links(text: str) -> list[str]:
    """Return the targets of a page's links that are no addresses of the web."""
    targets = re.findall(r"\]\(([^)\s]+)\)", _FENCE.sub("", text))
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ +(.+?) *$", _FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def messages(text: str) -> list[str]:
    """Return the messages of the index of errors: the inline code in the first column of its tables."""
    return re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)


def fragments(message: str) -> list[str]:
    """Return the fixed words of a message, between its placeholders."""
    return [part.strip(" :'") for part in message.split(PLACEHOLDER) if part.strip(" :'")]


def texts_in_code(*folders: str) -> list[str]:
    """Return every string of the Python files, and every line of the shell scripts, in some folders.

    The parts of an f-string, and adjacent strings, are joined; a replacement field is a placeholder.
    """
    found = []
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            nodes = ast.walk(ast.parse(path.read_text()))
            found += [text for node in nodes if (text := _text(node))]
        for path in sorted((ROOT / folder).rglob("*.sh")):
            found += [re.sub(r"\$\{?[\w@#*]+[^}\s]*\}?|\$\(\(.*?\)\)", PLACEHOLDER, line) for line in _lines(path)]
    return found


def _lines(path: Path) -> Iterator[str]:
    yield from path.read_text().splitlines()


def _text(node: ast.AST) -> str:
    """Return the text of a string, an f-string or a sum of these; an empty text for another node."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(value) or PLACEHOLDER for value in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return ""


def is_printed(message: str, texts: list[str]) -> bool:
    """Return whether one of the texts has the message's fixed words, in their order."""
    pattern = re.compile(".*".join(map(re.escape, fragments(message))), re.DOTALL)
    return any(pattern.search(text) for text in texts)
