"""A file of a run folder that is damaged in any way is one line that names it, and what the line says to do works."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import training_on_ranks
import yaml
from safetensors.torch import load_file, save_file

from pipeline import evaluate
from pipeline.errors import RecipeError
from pipeline.training.journal import read_journal
from shards.documents import DamagedFile

Train = Callable[..., None]

DAMAGE = {
    "empty": lambda whole: b"",
    "null": lambda whole: b"null",
    "an empty mapping": lambda whole: b"{}",
    "cut": lambda whole: whole[: len(whole) // 2],
    "zeros": lambda whole: bytes(len(whole)),
    "nested": lambda whole: b"[" * 100_000,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """A folder with ``ce.yaml``, its finished run in ``whole``, and one of four of five steps in ``part``."""
    folder = tmp_path_factory.mktemp("made")
    data = {"size": 16, "mean": [0.5] * 3, "std": [0.25] * 3, "path": str(shards)}
    recipe = {"data": data, "student": {"model": "cifar_resnet8"}, "losses": {"ce": {}}, "epochs": 1, "batch": 12}
    schedule = {"schedule": {"kind": "constant", "rate": 0.05}, "journal": {"every_steps": 1, "trackers": []}}
    (folder / "ce.yaml").write_text(yaml.safe_dump(recipe | schedule | {"checkpoints": {"every_steps": 2}}))
    training_on_ranks.train(0, 1, folder, ["ce.yaml", "folder=whole"])
    training_on_ranks.train(0, 1, folder, ["ce.yaml", "folder=part", "stop.steps=4"])
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    """A copy of it, to spoil."""
    return shutil.copytree(made, tmp_path / "place")


def train(place: Path, run: str, *words: str) -> None:
    training_on_ranks.train(0, 1, place, ["ce.yaml", f"folder={run}", *words])


def refused(place: Path, run: str, *words: str) -> str:
    """Return the line that training ends in."""
    with pytest.raises((RecipeError, DamagedFile)) as refusal:
        train(place, run, *words)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_result(place: Path, damage: Callable[[bytes], bytes]):
    file = place / "whole" / "result.json"
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    message = refused(place, "whole")
    assert "whole/result.json: " in message
    assert message.endswith("; delete it, and the run is evaluated again")
    file.unlink()
    train(place, "whole")
    before, after = json.loads(whole), json.loads(file.read_bytes())
    assert before | {"images_per_second": 0} == after | {"images_per_second": 0}


@pytest.mark.parametrize(
    ("key", "value"),
    [("top1", 101), ("top1", "50"), ("parameters", -1), ("identity", None), ("images_per_second", float("nan"))],
)
def test_a_result_of_impossible_values_names_the_key(place: Path, key: str, value: object):
    file = place / "whole" / "result.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    assert f"whole/result.json: {key}: Input should be " in refused(place, "whole")


def test_a_result_with_a_key_of_later_code_is_read(place: Path):
    file = place / "whole" / "result.json"
    before = file.read_text()
    file.write_text(json.dumps(json.loads(before) | {"note": "hello"}))
    train(place, "whole")
    assert json.loads(file.read_text())["note"] == "hello"


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_an_identity(place: Path, damage: Callable[[bytes], bytes]):
    file = place / "part" / "identity.json"
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    message = refused(place, "part")
    assert "part/identity.json: " in message
    assert message.endswith("; copy part/checkpoints/step-4/identity.json over it")
    shutil.copy(place / "part" / "checkpoints" / "step-4" / "identity.json", file)
    train(place, "part")
    assert file.read_bytes() == whole
    assert (place / "part" / "result.json").is_file()


def test_an_identity_that_is_gone_comes_back_from_a_checkpoint(place: Path):
    file = place / "part" / "identity.json"
    file.unlink()
    assert refused(place, "part").startswith(
        "part/identity.json is missing; copy part/checkpoints/step-4/identity.json"
    )
    shutil.copy(place / "part" / "checkpoints" / "step-4" / "identity.json", file)
    train(place, "part")
    assert (place / "part" / "result.json").is_file()


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_an_identity_without_a_checkpoint(place: Path, damage: Callable[[bytes], bytes]):
    shutil.rmtree(place / "part" / "checkpoints")
    file = place / "part" / "identity.json"
    file.write_bytes(damage(file.read_bytes()))
    assert refused(place, "part").endswith("; move part away, or give folder=ANOTHER")
    train(place, "another", "stop.steps=1")
    (place / "part").rename(place / "away")
    train(place, "part", "stop.steps=1")


@pytest.mark.parametrize("damage", [name for name in DAMAGE if name != "an empty mapping"])
def test_versions(place: Path, damage: str):
    file = place / "part" / "versions.json"
    whole = file.read_bytes()
    file.write_bytes(DAMAGE[damage](whole))
    message = refused(place, "part")
    assert "part/versions.json: " in message
    assert message.endswith("; delete it, and the current versions are written")
    file.unlink()
    train(place, "part")
    assert file.read_bytes() == whole
    assert read_journal(place / "part" / "journal.jsonl")[-1]["step"] == 5


@pytest.mark.parametrize("damage", [*DAMAGE, "gone", "a misspelt key"])
def test_a_saved_recipe(place: Path, damage: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    file = place / "whole" / "recipe.yaml"
    if damage == "gone":
        file.unlink()
    elif damage == "a misspelt key":
        file.write_text(file.read_text().replace("epochs:", "epoch:"))
    else:
        file.write_bytes(DAMAGE[damage](file.read_bytes()))
    monkeypatch.chdir(place)
    with pytest.raises(RecipeError) as refusal:
        evaluate.main(["whole"])
    assert str(refusal.value).endswith("; give the recipe's own file in place of the folder")
    with training_on_ranks.launched(0, 1):
        evaluate.main(["ce.yaml", "weights=whole/student.safetensors", "speed=no"])
    assert "top-1" in capsys.readouterr().out
    train(place, "whole")  # a finished run does not ask for it


def test_a_misspelt_word_is_not_laid_on_the_saved_recipe(place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(place)
    with pytest.raises(RecipeError, match=r"^command line: batsh: unknown key; did you mean 'batch'\?$"):
        evaluate.main(["whole", "batsh=3"])


@pytest.mark.parametrize("reads", ["evaluate", "start", "teacher"])
def test_other_weights_under_the_name_of_the_runs_own(place: Path, reads: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(place)
    file = place / "whole" / "student.safetensors"
    shutil.copy(file, "kept.safetensors")
    student = load_file(file)
    save_file({name: value + 1 if "running_var" in name else value for name, value in student.items()}, file)
    losses = '{"ce": {}, "kd": {"temperature": 4.0}}'
    words = {
        "start": ("student.start={recipe: ce.yaml}", "data.seed=7"),
        "teacher": ("teacher={recipe: ce.yaml}", f"losses={losses}"),
    }
    recipe = (place / "ce.yaml").read_text()
    (place / "ce.yaml").write_text(recipe + "folder: whole\n")
    (place / "new.yaml").write_text(recipe + "folder: new\n")

    def read() -> None:
        if reads == "evaluate":
            with training_on_ranks.launched(0, 1):
                evaluate.main(["ce.yaml", "speed=no"])
        else:
            training_on_ranks.train(0, 1, place, ["new.yaml", *words[reads]])

    with pytest.raises((RecipeError, DamagedFile), match=r"student\.safetensors: not the weights that this run wrote"):
        read()
    (place / "whole" / "result.json").unlink()
    train(place, "whole")  # as the message says
    assert file.read_bytes() == Path("kept.safetensors").read_bytes()
    read()


# -- the journal ------------------------------------------------------------------------------------------------------


def lines_of(place: Path) -> list[bytes]:
    return (place / "part" / "journal.jsonl").read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize("kept", [0, 1, 2, 3])
@pytest.mark.parametrize("torn", [b"", b'{"step": 4, "ep'])
def test_a_journal_that_lost_its_end_goes_on_without_it(
    place: Path, kept: int, torn: bytes, capsys: pytest.CaptureFixture[str]
):
    journal = place / "part" / "journal.jsonl"
    journal.write_bytes(b"".join(lines_of(place)[:kept]) + torn)
    train(place, "part")
    assert "journal.jsonl has lost lines" in capsys.readouterr().out
    steps = [line["step"] for line in read_journal(journal) if "total" in line]
    assert steps == [*range(1, kept + 1), 5]


SPOILT = {
    "reordered": lambda lines: [lines[1], lines[0], *lines[2:]],
    "a foreign line": lambda lines: [lines[0], b"words\n", *lines[1:]],
    "another journal's line": lambda lines: [b'{"tool": "prepare"}\n', *lines],
    "a cut line": lambda lines: [lines[0][:20] + b"\n", *lines[1:]],
    "zeros": lambda lines: [lines[0], bytes(len(lines[1])) + b"\n", *lines[2:]],
    "no text": lambda lines: [b"\xff\n", *lines],
    "an empty line": lambda lines: [b"\n", *lines],
    "an impossible step": lambda lines: [lines[0].replace(b'"step": 1', b'"step": -1'), *lines[1:]],
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_a_journal_with_other_lines_is_named_by_line_and_a_new_one_goes_on(
    place: Path, spoil: Callable[[list[bytes]], list[bytes]]
):
    journal = place / "part" / "journal.jsonl"
    journal.write_bytes(b"".join(spoil(lines_of(place))))
    spoilt = journal.read_bytes()
    message = refused(place, "part")
    assert "part/journal.jsonl: line " in message
    assert message.endswith("; move the journal away, and the run continues with a new one")
    assert journal.read_bytes() == spoilt
    journal.rename(journal.with_name("journal.old"))
    train(place, "part")
    assert [line["step"] for line in read_journal(journal)] == [5, 5]  # a step, and the epoch's evaluation
    assert (place / "part" / "result.json").is_file()


def test_a_journal_that_cannot_be_written_is_one_line_and_the_run_goes_on_later(
    place: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(line: object) -> str:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("pipeline.training.journal.json", SimpleNamespace(dumps=full))
        with pytest.raises(OSError, match=r"part/journal\.jsonl: a line could not be written \(No space .*make room"):
            train(place, "part")
    train(place, "part")
    assert (place / "part" / "result.json").is_file()
