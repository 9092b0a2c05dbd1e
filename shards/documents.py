"""Strict reading of the project's JSON files: a file matches its schema, or a one-line error names the key."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

_T = TypeVar("_T")


class DamagedFile(ValueError):
    """A file that is damaged or cannot be read; the message contains the file, the key and what to do."""


def read_document(path: Path, schema: type[_T], advice: str) -> _T:
    """Return a file's JSON as ``schema``: a pydantic model, a dataclass or a type such as ``dict[str, int]``.

    Types are not converted: a string is never accepted as a number. Raises DamagedFile if the content does not match,
    and FileNotFoundError if there is no file. Their messages end with ``advice``.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: there is no such file; {advice}") from None
    except OSError as error:
        raise DamagedFile(f"{path}: cannot be read ({error.strerror}); {advice}") from None
    return parse_document(content, str(path), schema, advice)


def parse_document(content: bytes, location: str, schema: type[_T], advice: str) -> _T:
    """Return JSON text as ``schema``. ``location`` names the file or line in errors.

    Raises DamagedFile if the text does not match ``schema``.
    """
    try:
        return TypeAdapter(schema).validate_json(content, strict=True)
    except ValidationError as error:
        first, *more = error.errors(include_url=False, include_input=False)
        key = ".".join(map(str, first["loc"]))
        others = f" (and {len(more)} more)" if more else ""
        where = f"{location}: {key}" if key else location
        raise DamagedFile(f"{where}: {' '.join(first['msg'].split())}{others}; {advice}") from None
