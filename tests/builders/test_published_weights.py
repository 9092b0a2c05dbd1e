"""Published weights bring what they expect of images: the teacher answers as it does where it was published."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision.models
import yaml
from resolved import run_of
from tiny_runs import DATA, STRATEGY
from torch import Tensor, nn

from pipeline.batch import Batch
from pipeline.builders.student import build_student, load_start, student_spec
from pipeline.builders.teacher import build_teacher
from pipeline.models import from_timm, published
from pipeline.models.published import published_normalization

CPU = torch.device("cpu")
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE = 64


@pytest.fixture
def recipe(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe whose images have another mean and std than any published network expects."""
    monkeypatch.chdir(tmp_path)
    data = {**DATA, "path": str(shards), "size": SIZE}
    own = {"student": {"model": "cifar_resnet8"}, "losses": {"kd": {"temperature": 4.0}}, "folder": "runs/kd"}
    (tmp_path / "kd.yaml").write_text(yaml.safe_dump({"data": data, **STRATEGY, **own}))
    return tmp_path / "kd.yaml"


def pixels() -> Tensor:
    return torch.rand(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def normalised(mean: Any, std: Any) -> Tensor:
    mean_C11, std_C11 = (torch.tensor(x).view(3, 1, 1) for x in (mean, std))
    return (pixels() - mean_C11) / std_C11


def answers(path: Path, *words: str) -> Tensor:
    """Return the teacher's logits for the pixels, as the recipe's loader gives them."""
    teacher = build_teacher(run_of(path, words), CPU)
    assert teacher is not None
    images_BCHW, zeros_B = normalised(DATA["mean"], DATA["std"]), torch.zeros(3, dtype=torch.int64)
    return teacher(Batch(images_BCHW, zeros_B, zeros_B, {})).logits_BK


def seen(model: nn.Module) -> nn.Module:
    """Let the network's BatchNorms see something."""
    with torch.no_grad():
        model.train()(normalised(*IMAGENET))
    return model.eval()


def torchvisions(name: str, **keys: object) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        return seen(torchvision.models.get_model(name, num_classes=20, **keys))

    return build


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("googlenet", torchvisions("googlenet", aux_logits=False, transform_input=True, init_weights=False)),
        ("resnet18", torchvisions("resnet18")),
    ],
)
def test_torchvisions_teachers_answer_as_torchvisions_own(
    recipe: Path, name: str, build: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    model = build()
    monkeypatch.setattr(published, "load_state_dict_from_url", lambda *_args, **_keys: model.state_dict())
    with torch.no_grad():
        expected = model(normalised(*IMAGENET))
    found = answers(recipe, f"teacher={{model: {name}, weights: IMAGENET1K_V1}}")
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    assert f"for IMAGENET1K_V1 of {name}" in capsys.readouterr().out


def test_timms_teachers_answer_as_their_own_configuration_says(recipe: Path, monkeypatch: pytest.MonkeyPatch):
    name = "vit_tiny_patch16_224"
    model = timm.create_model(name, num_classes=20, img_size=SIZE).eval()
    monkeypatch.setattr(from_timm, "timm_weights", lambda *_: model.state_dict())
    monkeypatch.setattr(published, "timm_weights", lambda *_: model.state_dict())
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda short, **keys: create(short, img_size=SIZE, **keys))
    with torch.no_grad():
        expected = model(normalised((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)))
    found = answers(recipe, f"teacher={{model: timm/{name}, weights: pretrained}}")
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_what_the_recipe_gives_itself_stays(recipe: Path):
    own = "teacher={model: googlenet, weights: IMAGENET1K_V1, mean: [0.1, 0.2, 0.3]}"
    teacher = run_of(recipe, [own]).recipe.teacher
    assert teacher is not None
    assert (teacher.mean, teacher.std) == ((0.1, 0.2, 0.3), (0.5, 0.5, 0.5))


def test_a_recipe_with_the_images_that_they_expect_stays_the_run_that_it_was(recipe: Path):
    words = [f"data.mean={list(IMAGENET[0])}", f"data.std={list(IMAGENET[1])}"]
    run = run_of(recipe, [*words, "teacher={model: resnet18, weights: IMAGENET1K_V1}"])
    assert run.identity["teacher"]["mean"] is None


def test_members_bring_each_their_own(recipe: Path):
    members = "[{model: googlenet, weights: IMAGENET1K_V1}, {model: resnet18, weights: IMAGENET1K_V1}]"
    teacher = run_of(recipe, [f"teacher={{members: {members}, combine: mean, temperature: 4}}"]).recipe.teacher
    assert teacher is not None
    assert teacher.members is not None
    assert [member.mean for member in teacher.members] == [(0.5, 0.5, 0.5), IMAGENET[0]]


def test_a_start_says_which_images_it_expects_and_the_words_that_give_them(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    model = torchvisions("resnet18")()
    monkeypatch.setattr(published, "load_state_dict_from_url", lambda *_args, **_keys: model.state_dict())
    start = ["student={model: resnet18, start: {weights: IMAGENET1K_V1}}", "losses={kd: null, ce: {}}"]

    def said(words: list[str]) -> str:
        run = run_of(recipe, words)
        load_start(run, build_student(student_spec(run.recipe.student, frozenset()), 20, 0))
        return capsys.readouterr().out

    told = said(start).partition("another mean and std; set ")[2].partition("\n")[0]
    assert said([*start, *told.split(" ")]) == ""


def test_all_of_torchvisions_weights_say_what_they_expect():
    modules = (torchvision.models, torchvision.models.segmentation)
    for name in [name for module in modules for name in torchvision.models.list_models(module)]:
        for weights in torchvision.models.get_model_weights(name).__members__:
            assert published_normalization(name, weights) is not None
    assert published_normalization("resnet18", "GONE") is None
    assert published_normalization("cifar_resnet8", "IMAGENET1K_V1") is None
    assert published_normalization("timm/resnet18", "gone") is None
