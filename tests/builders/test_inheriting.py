"""A student may begin with the layers of its teacher."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from training_on_ranks import train as train_on_rank

from pipeline.builders.summary import summarize
from pipeline.config.recipe import load_recipe
from pipeline.errors import RecipeError
from pipeline.models import create_model


def recipe(folder: Path, *patterns: str, rate: float = 1e-9) -> str:
    """Write the recipe of a student that inherits what the patterns are for, and return its path."""
    content = yaml.safe_load((folder / "ddkd.yaml").read_text())
    torch.manual_seed(7)
    save_file(create_model("cifar_resnet20", 20).state_dict(), folder / "t.safetensors")
    content |= {
        "student": {"model": "cifar_resnet8", "inherit": list(patterns)},
        "teacher": {"model": "cifar_resnet20", "weights": "t.safetensors"},
        "losses": {"ce": {}, "kd": {"temperature": 4.0}},
        "compare": [],
        "epochs": 1,
        "schedule": {"kind": "constant", "rate": rate},
        "optimizer": {"momentum": 0.0, "weight_decay": 0.0},
    }
    (folder / "inherit.yaml").write_text(yaml.safe_dump(content))
    return "inherit.yaml"


def test_what_the_patterns_are_for_begins_as_the_teachers_and_the_rest_does_not(recipes: Path):
    path = recipe(recipes, "conv1", "fc", "layer1.0.*")
    train_on_rank(0, 1, recipes, [path])
    ours, theirs = load_file(recipes / "runs/ddkd/student.safetensors"), load_file(recipes / "t.safetensors")
    for name in ("conv1.weight", "layer1.0.conv1.weight", "layer1.0.conv2.weight", "fc.weight", "fc.bias"):
        assert torch.allclose(ours[name], theirs[name], atol=1e-6), name
    assert not torch.allclose(ours["layer2.0.conv1.weight"], theirs["layer2.0.conv1.weight"], atol=1e-2)


@pytest.mark.parametrize(
    ("pattern", "teacher", "message"),
    [
        (
            "nothing",
            "cifar_resnet20",
            "'nothing' is for no parameter or buffer of the student; the first is conv1.weight",
        ),
        (
            "conv1",
            "cifar_resnet8x4",
            "conv1.weight cannot be the teacher's: its shape is [16, 3, 3, 3], and [32, 3, 3, 3]",
        ),
        ("fc", "cifar_vgg8", "fc.weight cannot be the teacher's: its shape is [20, 64], and [20, 512] there"),
        (
            "layer1",
            "cifar_vgg8",
            "layer1.0.conv1.weight cannot be the teacher's: its shape is [16, 16, 3, 3], and not there",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_a_check(
    recipes: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, teacher: str, message: str
):
    path = recipe(recipes, pattern)
    monkeypatch.chdir(recipes)
    with pytest.raises(RecipeError) as caught:
        summarize(load_recipe(path, [f"teacher.model={teacher}"]))
    assert f"student.inherit: {message}" in str(caught.value)


def test_without_a_single_teacher_there_is_nothing_to_inherit(recipes: Path):
    path = recipe(recipes, "conv1")
    with pytest.raises(RecipeError, match=r"student\.inherit takes the weights of a teacher that is one network"):
        load_recipe(recipes / path, ["teacher=null", "losses.kd=null"])
