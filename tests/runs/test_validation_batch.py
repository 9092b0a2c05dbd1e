"""The size of a validation batch is no part of a run, though runs of earlier code have it in their identity."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from resolved import run_of

from pipeline.errors import RecipeError
from pipeline.runs.folder import check_folder, open_folder
from pipeline.runs.identity import Run
from pipeline.training.journal import trace

MEASURED = {"model": "cifar_resnet8", "parameters": 1, "top1": 5.0, "best_top1": 5.0, "images_per_second": 9.0}


@pytest.fixture
def place(recipes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipes' folder, as the one that commands run in."""
    monkeypatch.chdir(recipes)


def begun_with(size: int, recipe: str) -> str:
    """Begin the recipe's run, and finish it, as code did that had the size in the identity; return its digest."""
    run = run_of(recipe)
    open_folder(run)
    identity = {**run.identity, "data": {**run.identity["data"], "validation_batch": size}}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    (run.folder / "identity.json").write_text(json.dumps(identity))
    (run.folder / "result.json").write_text(json.dumps({"identity": digest, **MEASURED}))
    return digest


def test_a_run_is_the_same_with_any_size_and_its_identity_is_that_of_none(place: None):
    plain, sized = (run_of("ce.yaml", words) for words in ([], ["data.validation_batch=7"]))
    assert plain.identity == sized.identity
    assert plain.identity["data"]["validation_batch"] is None  # as runs of earlier code have it
    open_folder(sized)
    check_folder(plain)


@pytest.mark.parametrize("words", [[], ["data.validation_batch=5"], ["data.validation_batch=7"]])
def test_a_run_that_began_with_a_size_in_its_identity_is_the_same_run_still(place: None, words: list[str]):
    digest = begun_with(5, "ce.yaml")
    run: Run = run_of("ce.yaml", words)
    check_folder(run)
    assert run.fingerprint == digest
    assert run.result is not None
    with pytest.raises(RecipeError, match=r"another recipe \(different epochs\)"):
        check_folder(run_of("ce.yaml", ["epochs=3", *words]))


def test_a_student_of_such_a_teacher_is_the_same_run_still(place: None):
    digest = begun_with(5, "teacher.yaml")
    assert run_of("ddkd.yaml").identity["teacher"]["recipe"] == digest


def test_a_run_goes_on_with_another_size_to_the_same_weights(run_train: Callable[..., None], recipes: Path):
    run_train("ce.yaml", "folder=whole")
    run_train("ce.yaml", "data.validation_batch=7", "stop.steps=7")
    run_train("ce.yaml", "data.validation_batch=20")
    whole, parts = (Path(folder) for folder in ("whole", "runs/ce"))
    assert (parts / "student.safetensors").read_bytes() == (whole / "student.safetensors").read_bytes()
    steps = [[line for line in trace(path / "journal.jsonl") if "total" in line] for path in (whole, parts)]
    assert steps[0] == steps[1]
    assert len(steps[0]) == 10
