"""A run that starts from weights of other classes: what it is, what it begins with, and what it says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from resolved import run_of
from safetensors.torch import load_file

from pipeline.builders.student import build_student, load_start, student_spec
from pipeline.errors import RecipeError
from pipeline.models import create_model
from pipeline.runs.identity import Run

Train = Callable[..., None]


@pytest.fixture
def place(recipes: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of ``ce.yaml``, whose shards have 20 classes, with weights of 100 in ``w.pt``."""
    monkeypatch.chdir(recipes)
    torch.manual_seed(1)
    torch.save(create_model("cifar_resnet8", 100).state_dict(), "w.pt")
    return recipes


def initial(run: Run) -> dict[str, torch.Tensor]:
    student = build_student(student_spec(run.recipe.student, frozenset()), 20, run.recipe.seed)
    load_start(run, student)
    return dict(student.model.state_dict())


def test_the_student_begins_with_the_weights_under_the_head_of_its_seed(
    place: Path, capsys: pytest.CaptureFixture[str]
):
    run = run_of("ce.yaml", ["student.start={weights: w.pt, head: new}", "seed=3"])
    found, weights = initial(run), torch.load("w.pt")
    fresh = initial(run_of("ce.yaml", ["seed=3"]))
    for key, value in found.items():
        assert torch.equal(value, (fresh if key.startswith("fc.") else weights)[key])
    told = "note: student.start: fc.weight, fc.bias are not read from w.pt and keep their random initialisation\n"
    assert capsys.readouterr().out == told


def test_without_a_new_head_the_refusal_names_it(place: Path):
    with pytest.raises(RecipeError, match=r"ce.yaml: student.start.weights: w.pt: .* 100 classes.*start.head=new"):
        run_of("ce.yaml", ["student.start.weights=w.pt"])


def test_weights_whose_other_tensors_do_not_fit_are_refused_in_one_line(place: Path):
    with pytest.raises(RecipeError, match=r"student.start.weights: w.pt: weights of another architecture") as caught:
        run_of("ce.yaml", ["student={model: cifar_resnet20, start: {weights: w.pt, head: new}}"])
    assert "\n" not in str(caught.value)


def test_a_head_is_part_of_the_run_only_if_it_is_new(place: Path):
    torch.save(create_model("cifar_resnet8", 20).state_dict(), "own.pt")
    runs = [
        run_of("ce.yaml", [f"student.start={{weights: own.pt{head}}}"]) for head in ("", ", head: keep", ", head: new")
    ]
    assert runs[0].identity == runs[1].identity
    assert "head" not in runs[0].identity["student"]["start"]
    assert runs[2].identity["student"]["start"]["head"] == "new"
    assert runs[2].fingerprint != runs[0].fingerprint


def test_the_student_of_a_run_goes_on_under_a_new_head(run_train: Train, place: Path):
    run_train("teacher.yaml")
    own = {
        "base": "ce.yaml",
        "student": {"model": "cifar_resnet20", "start": {"recipe": "teacher.yaml", "head": "new"}},
    }
    Path("second.yaml").write_text(yaml.safe_dump(own))
    found, weights = initial(run_of("second.yaml")), load_file("runs/teacher/student.safetensors")
    assert torch.equal(found["conv1.weight"], weights["conv1.weight"])
    assert not torch.equal(found["fc.weight"], weights["fc.weight"])


def test_a_run_with_a_new_head_trains_and_goes_on_where_it_was(run_train: Train, place: Path):
    words = ("ce.yaml", "student.start={weights: w.pt, head: new}", "epochs=1")
    run_train(*words, "folder=runs/whole")
    run_train(*words, "folder=runs/parts", "stop.steps=2")
    (place / "w.pt").unlink()
    torch.manual_seed(1)
    torch.save(create_model("cifar_resnet8", 100).state_dict(), "w.pt")
    run_train(*words, "folder=runs/parts")
    whole, parts = (load_file(f"runs/{name}/student.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(value, parts[key]) for key, value in whole.items())
