"""A file of the project's own that is damaged in any way ends in one line that names it and says what to do."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.documents import DamagedFile, read_document


@dataclass(frozen=True)
class Inner:
    size: int
    name: str


@dataclass(frozen=True)
class Outer:
    count: int
    inner: tuple[Inner, ...] = ()


WHOLE = {"count": 2, "inner": [{"size": 1, "name": "a"}, {"size": 2, "name": "ü"}]}


def test_what_was_written_is_read(tmp_path: Path):
    (tmp_path / "a.json").write_text(json.dumps(WHOLE))
    assert read_document(tmp_path / "a.json", Outer, "do so") == Outer(2, (Inner(1, "a"), Inner(2, "ü")))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "Invalid JSON: EOF"),
        (b"null", "Input should be"),
        (b"[]", "Input should be"),
        (b"{", "Invalid JSON: EOF"),
        (b"\xff\xfe", "Invalid JSON"),
        (b"[" * 100_000, "recursion limit"),
        (json.dumps({**WHOLE, "count": "2"}).encode(), "count: Input should be a valid integer"),
        (json.dumps({"count": 1, "inner": [{"size": 1}]}).encode(), "inner.0.name: Field required"),
        (json.dumps({"count": 1.5, "inner": None}).encode(), "(and 1 more)"),
    ],
)
def test_damage_is_one_line_with_file_key_and_advice(tmp_path: Path, content: bytes, told: str):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(DamagedFile) as raised:
        read_document(path, Outer, "delete it")
    message = str(raised.value)
    assert message.startswith(f"{path}: ")
    assert told in message
    assert message.endswith("; delete it")
    assert "\n" not in message


def test_a_file_that_is_gone_or_a_folder_is_one_line(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"there is no such file; write it again$"):
        read_document(tmp_path / "b.json", Outer, "write it again")
    with pytest.raises(DamagedFile, match=r"cannot be read \(Is a directory\); write it again$"):
        read_document(tmp_path, Outer, "write it again")


@given(cut=st.integers(0, len(json.dumps(WHOLE)) - 1))
def test_no_cut_file_is_read(tmp_path_factory: pytest.TempPathFactory, cut: int):
    path = tmp_path_factory.mktemp("cut") / "a.json"
    path.write_bytes(json.dumps(WHOLE).encode()[:cut])
    with pytest.raises(DamagedFile):
        read_document(path, Outer, "delete it")
