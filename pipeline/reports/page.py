"""The frame of the report: one HTML file without script, which reads no other file, for a phone, a screen and paper."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

_STYLE = (
    ":root { color-scheme: light; }",
    "* { box-sizing: border-box; }",
    "body { margin: 0 auto; padding: 1rem; max-width: 76rem; background: #fff; color: #1a1a1a;",
    'font: 1rem/1.5 system-ui, "DejaVu Sans", Verdana, sans-serif; overflow-wrap: break-word; }',
    "h1 { font-size: 1.5rem; margin: 0.5rem 0; line-height: 1.25; }",
    "h2 { font-size: 1.15rem; margin: 2rem 0 0.5rem; border-bottom: 1px solid #ccc; }",
    "p { margin: 0.4rem 0; }",
    ".note { color: #555; font-size: 0.9rem; }",
    ".numbers { display: flex; flex-wrap: wrap; gap: 0.75rem; margin: 1rem 0; padding: 0; list-style: none; }",
    ".numbers li { flex: 1 1 9rem; border: 1px solid #ccc; border-radius: 0.4rem; padding: 0.5rem 0.75rem; }",
    ".numbers b { display: block; font-size: 1.5rem; line-height: 1.3; }",
    ".numbers span { color: #555; font-size: 0.85rem; }",
    ".pictures { display: grid; grid-template-columns: 1fr; gap: 1.5rem; }",
    "figure { margin: 0; min-width: 0; break-inside: avoid; }",
    "figcaption { font-weight: 600; font-size: 0.95rem; margin-bottom: 0.25rem; }",
    "svg.picture { display: block; width: 100%; height: auto; max-width: 46rem; }",
    ".scroll { overflow-x: auto; margin-bottom: 1rem; }",
    "table { border-collapse: collapse; font-size: 0.9rem; }",
    "th, td { text-align: left; padding: 0.25rem 0.75rem 0.25rem 0; border-bottom: 1px solid #ddd; }",
    "th, td { vertical-align: top; }",
    'pre, code { font: 0.85rem/1.4 ui-monospace, "DejaVu Sans Mono", monospace; }',
    "pre { background: #f6f6f6; padding: 0.75rem; overflow-x: auto; }",
    ".sheet { min-width: 20rem; max-width: 62rem; }",
    ".sheet div { display: flex; font-size: 0.85rem; }",
    ".sheet div span { flex: 1; text-align: center; }",
    ".sheet img { display: block; width: 100%; height: auto; }",
    ".legend span { display: inline-block; margin-right: 1rem; font-size: 0.85rem; }",
    ".legend i { display: inline-block; width: 0.8rem; height: 0.8rem; margin-right: 0.3rem; }",
    "@media (min-width: 60rem) { .pictures { grid-template-columns: 1fr 1fr; } }",
    "@media print {",
    "body { max-width: none; padding: 0; font-size: 10pt; }",
    ".pictures { grid-template-columns: 1fr 1fr; gap: 0.5cm; }",
    "pre { white-space: pre-wrap; background: none; border: 1px solid #ccc; }",
    ".recipe { columns: 3; font-size: 7pt; }",
    "h2 { break-after: avoid; }",
    ".scroll { break-inside: avoid; }",
    ".legend i, .sheet { print-color-adjust: exact; }",
    "}",
)


def escaped(text: object) -> str:
    """Return text as HTML that shows it, whatever characters it has."""
    return html.escape(str(text))


def html_page(title: str, sections: Sequence[str]) -> str:
    """Return a complete HTML page."""
    head = (
        f'<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escaped(title)}</title>\n<style>\n{chr(10).join(_STYLE)}\n</style>"
    )
    body = "\n".join(part for part in sections if part)
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'


def section(title: str, *parts: str) -> str:
    """Return a section with its heading; empty if it has no part."""
    body = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{escaped(title)}</h2>\n{body}\n</section>" if body else ""


def paragraph(text: str) -> str:
    """Return a line of plain text."""
    return f"<p>{escaped(text)}</p>"


def note(text: str, command: str = "") -> str:
    """Return a line in small letters, and a command to copy after it."""
    return f'<p class="note">{escaped(text)}{f" <code>{escaped(command)}</code>" if command else ""}</p>'


def numbers(values: Sequence[tuple[str, str]]) -> str:
    """Return big numbers, each with what it is."""
    items = "\n".join(f"<li><b>{escaped(value)}</b><span>{escaped(what)}</span></li>" for what, value in values)
    return f'<ul class="numbers">\n{items}\n</ul>'


def pictures(drawn: Sequence[tuple[str, str]]) -> str:
    """Return pictures side by side where there is room, each an ``<svg>`` with its caption; empty without any."""
    if not drawn:
        return ""
    items = "\n".join(
        f"<figure>\n<figcaption>{escaped(caption)}</figcaption>\n{svg}\n</figure>" for caption, svg in drawn
    )
    return f'<div class="pictures">\n{items}\n</div>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table, which scrolls by itself on a narrow screen."""
    titles = "".join(f"<th>{escaped(cell)}</th>" for cell in head)
    body = "\n".join("<tr>" + "".join(f"<td>{escaped(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll">\n<table>\n<tr>{titles}</tr>\n{body}\n</table>\n</div>'


def sheet(text: str, columns: Sequence[str], png: bytes, colours: Sequence[tuple[str, str]]) -> str:
    """Return a PNG of equally wide columns with their names, and names of colours; it scrolls on a narrow screen."""
    names = "".join(f"<span>{escaped(column)}</span>" for column in columns)
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    spoken = escaped(f"{text} Columns: {', '.join(columns)}.")
    image = f'<img src="{source}" alt="{spoken}">'
    legend = "".join(f'<span><i style="background:{color}"></i>{escaped(name)}</span>\n' for name, color in colours)
    body = f'<div class="scroll">\n<div class="sheet">\n<div>{names}</div>\n{image}\n</div>\n</div>'
    return f'{paragraph(text)}\n<p class="legend">\n{legend}</p>\n{body}'


def preformatted(text: str) -> str:
    """Return text with its own line breaks."""
    return f"<pre>{escaped(text)}</pre>"


def recipe(text: str) -> str:
    """Return a long recipe, which is in small columns on paper."""
    return f'<pre class="recipe">{escaped(text)}</pre>'
