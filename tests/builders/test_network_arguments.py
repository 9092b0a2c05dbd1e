"""The arguments of a network go wherever a recipe's networks are built, and make another run and another cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from resolved import run_of
from safetensors.torch import load_file

from pipeline import cache_teacher, evaluate
from pipeline.builders.shared import _teacher_key
from pipeline.builders.student import student_spec
from pipeline.builders.summary import summarize
from pipeline.builders.teacher import build_teacher, provenance
from pipeline.caching.size import choices
from pipeline.config.recipe import load_recipe
from pipeline.errors import RecipeError
from pipeline.models import create_model
from pipeline.runs.folder import load_run

Train = Callable[..., None]
CPU = torch.device("cpu")
DEEPER = "student.arguments={depth: 14}"


def size(name: str, arguments: dict[str, object] | None = None) -> int:
    return sum(parameter.numel() for parameter in create_model(name, 20, arguments).parameters())


@pytest.fixture
def place(recipes: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of ``ce.yaml``, and of ``kd.yaml`` with a teacher of 14 layers, whose weights are ``w.pt``."""
    monkeypatch.chdir(recipes)
    torch.manual_seed(1)
    torch.save(create_model("cifar_resnet8", 20, {"depth": 14}).state_dict(), "w.pt")
    teacher = {"model": "cifar_resnet8", "arguments": {"depth": 14}, "weights": "w.pt"}
    own = {"base": "ce.yaml", "teacher": teacher, "losses": {"kd": {"temperature": 4.0}}, "folder": "runs/kd"}
    Path("kd.yaml").write_text(yaml.safe_dump(own))
    return recipes


def test_they_are_part_of_the_run_only_if_there_are_some(place: Path):
    plain, deeper = run_of("ce.yaml"), run_of("ce.yaml", [DEEPER])
    assert plain.identity == run_of("ce.yaml", ["student.arguments={}"]).identity
    assert "arguments" not in plain.identity["student"]
    assert deeper.identity["student"]["arguments"] == {"depth": 14}
    assert deeper.fingerprint != plain.fingerprint != run_of("ce.yaml", ["student.arguments.depth=20"]).fingerprint


def test_nothing_within_them_is_off(place: Path):
    """An argument may have the name of a key of recipes that is no part of a run where it is off."""
    found = run_of("ce.yaml", ["student.arguments={compile: false, head: keep}"]).identity["student"]["arguments"]
    assert found == {"compile": False, "head": "keep"}


def test_a_run_trains_goes_on_and_is_evaluated_with_them(
    run_train: Train, place: Path, capsys: pytest.CaptureFixture[str]
):
    words = ("ce.yaml", DEEPER, "epochs=1")
    run_train(*words, "folder=runs/deep", "stop.steps=2")
    run_train(*words, "folder=runs/deep")
    weights = load_file("runs/deep/student.safetensors")
    assert any(key.startswith("layer1.1.") for key in weights)
    assert load_run(Path("runs/deep")).recipe.student.arguments == {"depth": 14}
    evaluate.main(["runs/deep", "speed=no"])
    assert "runs/deep/student.safetensors: top-1" in capsys.readouterr().out
    assert summarize(load_recipe("ce.yaml", [DEEPER])).student.parameters == size("cifar_resnet8", {"depth": 14})
    spec = student_spec(load_recipe("ce.yaml", [DEEPER]).recipe.student, frozenset())
    assert sum(parameter.numel() for parameter in spec.build(20).parameters()) == size("cifar_resnet8", {"depth": 14})


def test_a_teacher_is_built_with_its_own_and_not_the_students(place: Path):
    run = run_of("kd.yaml", ["student.arguments={depth: 20}"])
    teacher = build_teacher(run, CPU)
    assert teacher is not None
    state = teacher.taps.model.state_dict()
    assert torch.equal(state["fc.weight"], torch.load("w.pt")["fc.weight"])
    assert run.identity["teacher"]["arguments"] == {"depth": 14}
    report = summarize(load_recipe("kd.yaml", ["student.arguments={depth: 20}"]))
    assert [report.student.parameters, report.teachers[0].parameters] == [
        size("cifar_resnet20"),
        size("cifar_resnet8", {"depth": 14}),
    ]


def test_a_teacher_that_is_a_run_has_the_runs_own(run_train: Train, place: Path):
    own = {"student": {"arguments": {"depth": 14}}, "epochs": 1, "folder": "runs/deep"}
    Path("deep.yaml").write_text(yaml.safe_dump({"base": "ce.yaml", **own}))
    words = ["teacher={recipe: deep.yaml, model: null, arguments: null, weights: null}"]
    run_train("kd.yaml", *words, "stop.steps=1")
    teacher = build_teacher(run_of("kd.yaml", words), CPU)
    assert teacher is not None
    weights = load_file("runs/deep/student.safetensors")
    assert torch.equal(teacher.taps.model.state_dict()["fc.weight"], weights["fc.weight"])
    with pytest.raises(RecipeError, match="teacher: arguments are those of the run that recipe names; remove"):
        run_of("kd.yaml", ["teacher={recipe: deep.yaml, model: null, weights: null}"])
    file = ["teacher={recipe: deep.yaml, model: null, arguments: null, weights: w.pt}"]
    assert build_teacher(run_of("kd.yaml", file), CPU) is not None


def test_a_moving_average_is_the_students_network(place: Path):
    average = "teacher={model: null, weights: null, arguments: null, average: {decay: 0.9}}"
    words = [average, "student.arguments={depth: 20}"]
    run = run_of("kd.yaml", words)
    teacher = build_teacher(run, CPU)
    assert teacher is not None
    assert sum(parameter.numel() for parameter in teacher.taps.model.parameters()) == size("cifar_resnet20")
    assert summarize(load_recipe("kd.yaml", words)).teachers[0].parameters == size("cifar_resnet20")
    other = run_of("kd.yaml", [average])
    assert _teacher_key(run) != _teacher_key(other)


def test_a_cache_belongs_to_the_network_of_its_arguments(run_train: Train, place: Path):
    torch.save(create_model("cifar_resnet8", 20, {"depth": 14}).state_dict(), "w.pt")
    run, plain = run_of("kd.yaml"), run_of("ddkd.yaml", ["compare=null"])
    assert run.recipe.teacher is not None
    assert provenance(run, run.recipe.teacher, CPU)["teacher"]["network"]["arguments"] == {"depth": 14}
    assert plain.recipe.teacher is not None
    assert "arguments" not in provenance(plain, plain.recipe.teacher, CPU)["teacher"]["network"]
    cache_teacher.main(["kd.yaml", "teacher.cache=cache", "data.views=1"])
    run_train("kd.yaml", "teacher.cache=cache", "stop.steps=1")
    others = "teacher={model: cifar_resnet20, arguments: null, weights: w20.pt, cache: cache}"
    torch.save(create_model("cifar_resnet20", 20).state_dict(), "w20.pt")
    with pytest.raises(RecipeError, match=r"was written with different settings: .*teacher\.network\.arguments"):
        run_train("kd.yaml", others, "folder=runs/other")
    shapes, _ = choices(load_recipe("kd.yaml").recipe, [], [], {})
    assert shapes[0].name == "logits"


def test_arguments_that_a_network_does_not_take_end_in_one_line_with_the_key(place: Path):
    cases = {
        "student.arguments={width: 3}": "student.arguments: cifar_resnet8 takes no argument 'width'; it takes depth, ",
        "student.arguments={num_classes: 3}": "student.arguments: num_classes cannot be given here; the shards set",
        "teacher.arguments={width: 3}": "teacher.arguments: cifar_resnet8 takes no argument 'width'; it takes depth, ",
        "teacher={model: null, weights: null, cache: c}": "teacher: give either model and weights",
        "teacher={model: null, weights: null, average: {decay: 0.9}}": "arguments cannot be combined with average",
    }
    for word, message in cases.items():
        with pytest.raises(RecipeError, match=message) as caught:
            summarize(load_recipe("kd.yaml", [word]))
        assert "\n" not in str(caught.value)
