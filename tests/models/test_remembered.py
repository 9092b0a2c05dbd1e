"""A file's digest is that of its tensors, and remembered only for as long as the file is the same."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from pipeline.models import create_model, weights
from pipeline.models.foreign_names import foreign_names
from pipeline.models.weights import weights_sha256

NAME = "cifar_vgg8"
AN_HOUR_AGO = 3600


@pytest.fixture(autouse=True)
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of what is remembered; it is there once something is."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "distillation-pipeline" / "weights"


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read, one by one."""
    read, found = weights.read_file, []

    def counted(path: Path) -> object:
        found.append(path)
        return read(path)

    monkeypatch.setattr(weights, "read_file", counted)
    return found


def state(seed: int = 1) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return dict(create_model(NAME, 10).state_dict())


def written(path: Path, seed: int = 1) -> Path:
    """Write weights as if an hour ago."""
    torch.save(state(seed), path)
    age(path)
    return path


def age(path: Path) -> None:
    past = path.stat().st_mtime - AN_HOUR_AGO
    os.utime(path, (past, past))


def digest(path: Path) -> str:
    return weights_sha256(str(path), NAME, 10)


def test_the_digest_is_the_tensors_whatever_they_lie_in(tmp_path: Path):
    own = state()
    theirs = {foreign: own[name] for foreign, name in foreign_names(create_model(NAME, 10), own).items()}
    forms = {
        "plain.pt": own,
        "wrapped.pth.tar": {"epoch": 3, "state_dict": {f"module.{name}": value for name, value in own.items()}},
        "theirs.pth": {"model": theirs},
        "turned.ckpt": dict(reversed(own.items())),
    }
    for name, content in forms.items():
        torch.save(content, tmp_path / name)
    safetensors.torch.save_file(own, tmp_path / "plain.safetensors")
    found = {digest(path) for path in tmp_path.iterdir() if path.is_file()}
    assert len(found) == 1
    assert digest(written(tmp_path / "other.pt", seed=2)) not in found


def test_a_file_is_read_once_for_as_long_as_it_stays_as_it_is(tmp_path: Path, readings: list[Path]):
    path = written(tmp_path / "w.pt")
    assert [digest(path) for _ in range(3)] == [digest(path)] * 3
    assert len(readings) == 1
    weights_sha256(str(path), "cifar_vgg8", 10, key=None)
    assert len(readings) == 1


def test_the_digest_without_the_head_is_remembered_apart(tmp_path: Path, readings: list[Path]):
    path = written(tmp_path / "w.pt")
    whole = digest(path)
    for _ in range(2):
        assert weights_sha256(str(path), NAME, 10, headless={"logits": "fc"}) != whole
    assert len(readings) == 2
    assert digest(path) == whole


def replaced(path: Path) -> None:
    """Other weights of the same size, with the time of the old ones."""
    times = path.stat()
    torch.save(state(2), path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def renamed_over(path: Path) -> None:
    other = written(path.with_suffix(".new"), seed=2)
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    other.rename(path)


@pytest.mark.parametrize("change", [replaced, renamed_over, lambda path: written(path, seed=2)])
def test_other_weights_in_the_same_file_are_seen(tmp_path: Path, change: Callable[[Path], object]):
    path = written(tmp_path / "w.pt")
    before, size = digest(path), path.stat().st_size
    change(path)
    assert path.stat().st_size == size
    assert digest(path) != before


def test_a_file_that_was_just_written_is_not_relied_on(tmp_path: Path, readings: list[Path], notes: Path):
    torch.save(state(), tmp_path / "w.pt")
    assert digest(tmp_path / "w.pt") == digest(tmp_path / "w.pt")
    assert len(readings) == 2
    assert not notes.exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"facts": 1}', b"\xff" * 99])
def test_a_damaged_note_costs_a_reading_and_is_written_anew(
    tmp_path: Path, readings: list[Path], notes: Path, content: bytes
):
    path = written(tmp_path / "w.pt")
    right = digest(path)
    (note,) = notes.iterdir()
    whole = note.read_bytes()
    note.write_bytes(content)
    assert digest(path) == right
    assert (len(readings), note.read_bytes()) == (2, whole)


def test_a_digest_with_a_turned_digit_is_no_digest(tmp_path: Path, notes: Path):
    path = written(tmp_path / "w.pt")
    right = digest(path)
    (note,) = notes.iterdir()
    wrong = right[:-1] + ("0" if right[-1] != "0" else "1")
    note.write_text(note.read_text().replace(right, wrong))
    assert digest(path) == right


def test_where_nothing_can_be_remembered_the_file_is_read(
    tmp_path: Path, readings: list[Path], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    path = written(tmp_path / "w.pt")
    assert digest(path) == digest(path)
    assert len(readings) == 2


def test_a_copy_elsewhere_has_the_same_digest(tmp_path: Path):
    path = written(tmp_path / "w.pt")
    (tmp_path / "folder").mkdir()
    assert digest(Path(shutil.copy2(path, tmp_path / "folder" / "copy.bin"))) == digest(path)


def test_a_file_that_is_gone_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"gone\.pt: there is no such weights file"):
        digest(tmp_path / "gone.pt")
