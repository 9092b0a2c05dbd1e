"""The one way in which JSON files of the project's own folders are read: whole and of their schema, or one line."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

_T = TypeVar("_T")


class DamagedFile(ValueError):
    """A file that is not what was written, or that cannot be read; the message names file, key and what to do."""


def read_document(path: Path, schema: type[_T], advice: str) -> _T:
    """Return the file's JSON as ``schema``: a pydantic model, a dataclass or a type such as ``dict[str, int]``.

    Values are taken strictly: a number in quotes is none. Raises DamagedFile, with ``advice`` at its end, for whatever
    else the file holds, and FileNotFoundError where there is none.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: there is no such file; {advice}") from None
    except OSError as error:
        raise DamagedFile(f"{path}: cannot be read ({error.strerror}); {advice}") from None
    return parse_document(content, str(path), schema, advice)


def parse_document(content: bytes, location: str, schema: type[_T], advice: str) -> _T:
    """Return JSON that was read from ``place``, a file or a line of one, as ``schema``. Raises DamagedFile."""
    try:
        return TypeAdapter(schema).validate_json(content, strict=True)
    except ValidationError as error:
        first, *more = error.errors(include_url=False, include_input=False)
        key = ".".join(map(str, first["loc"]))
        others = f" (and {len(more)} more)" if more else ""
        where = f"{location}: {key}" if key else location
        raise DamagedFile(f"{where}: {' '.join(first['msg'].split())}{others}; {advice}") from None
