"""An HTML page as tests read it, and the command that writes one."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

from pipeline import report

VOID = {"meta", "br", "hr", "img", "link", "input", "col"}


class Page(HTMLParser):
    """An HTML page: its tags, text and ids; an end tag that closes another one than the last is an error."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.outside: list[str] = []
        self.ids: list[str] = []
        self.headings: list[str] = []
        self.words: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = {name: value or "" for name, value in attrs}
        self.ids += [values["id"]] if "id" in values else []
        refers = [values[name] for name in ("src", "href", "xlink:href", "data", "action") if name in values]
        self.outside += [value for value in refers if not value.startswith("#")]
        self.outside += [name for name in values if name.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def draw(*words: object) -> Page:
    """Return the page that the command writes for those words."""
    report.main([*map(str, words), "out=report.html"])
    return Page(Path("report.html"))
