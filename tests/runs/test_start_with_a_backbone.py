"""A segmentation run whose backbone starts from a classification network's weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from resolved import run_of
from torch import Tensor

from pipeline.builders.student import build_student, load_start, student_spec
from pipeline.errors import RecipeError
from pipeline.models import create_model, published
from pipeline.runs.identity import Run

STUDENT = "model: pspnet_resnet18"


@pytest.fixture
def weights(recipes: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Return a ResNet-18 of 1,000 classes, which is in ``w.pt`` of the folder of ``ce.yaml``, too."""
    monkeypatch.chdir(recipes)
    torch.manual_seed(1)
    state = dict(create_model("resnet18", 1000).state_dict())
    torch.save(state, "w.pt")
    return state


def initial(run: Run) -> dict[str, Tensor]:
    student = build_student(student_spec(run.recipe.student, frozenset()), 20, run.recipe.seed)
    load_start(run, student)
    return dict(student.model.state_dict())


def test_the_backbone_begins_with_the_weights_and_the_heads_with_those_of_the_seed(
    weights: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
):
    found = initial(run_of("ce.yaml", [f"student={{{STUDENT}, start: {{weights: w.pt, part: backbone}}}}"]))
    fresh = initial(run_of("ce.yaml", [f"student={{{STUDENT}}}"]))
    for key, value in found.items():
        module, _, name = key.partition(".")
        assert torch.equal(value, weights[name] if module == "backbone" else fresh[key])
    said = "note: student.start: w.pt: 2 other tensors (first fc.weight) are left out\n"
    assert capsys.readouterr().out == said


def test_published_weights_are_those_of_the_backbones_network(
    weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(published, "load_state_dict_from_url", lambda *_args, **_keys: weights)
    found = initial(run_of("ce.yaml", [f"student={{{STUDENT}, start: {{weights: IMAGENET1K_V1, part: backbone}}}}"]))
    assert torch.equal(found["backbone.conv1.weight"], weights["conv1.weight"])
    assert "IMAGENET1K_V1 of resnet18 was trained with another mean and std" in capsys.readouterr().out


def test_a_part_belongs_to_the_run_only_if_it_is_not_all(weights: dict[str, Tensor]):
    torch.save(create_model("pspnet_resnet18", 20).state_dict(), "own.pt")
    starts = ("", ", part: all", ", part: backbone")
    runs = [run_of("ce.yaml", [f"student={{{STUDENT}, start: {{weights: own.pt{part}}}}}"]) for part in starts]
    assert runs[0].identity == runs[1].identity
    assert "part" not in runs[0].identity["student"]["start"]
    assert runs[2].identity["student"]["start"]["part"] == "backbone"


@pytest.mark.parametrize(
    ("student", "message"),
    [
        (f"{{{STUDENT}, start: {{weights: w.pt}}}}", "student.start.weights: w.pt: weights of another architecture"),
        (f"{{{STUDENT}, start: {{weights: w.pt, head: new, part: backbone}}}}", "leaves every head as it is; remove "),
        ("{model: resnet18, start: {weights: w.pt, part: backbone}}", "ResNet has no module named backbone"),
        ("{model: fcn_resnet50, start: {weights: w.pt, part: backbone}}", "than the backbone of fcn_resnet50"),
    ],
)
def test_a_start_that_does_not_fit_ends_in_one_line(weights: dict[str, Tensor], student: str, message: str):
    with pytest.raises(RecipeError, match=message) as caught:
        run_of("ce.yaml", [f"student={student}"])
    assert "\n" not in str(caught.value)
