"""``--check``: what a recipe is made of, without training it; and every recipe of the tree is made of something."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
import yaml
from methods import OF_BOXES, OF_IMAGES, OF_MASKS, OF_TOKENS
from resolved import run_of
from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.builders.distiller import build_distiller
from pipeline.builders.summary import summarize
from pipeline.config.listing import known_pairs
from pipeline.config.recipe import load_recipe
from pipeline.config.source import RecipeSource, known_methods
from pipeline.config.tables import load_tables, table_cells
from pipeline.data.loader import Loader
from pipeline.errors import ROOT, RecipeError
from pipeline.losses._base import Loss
from pipeline.tasks._registry import find_task

CONFIGS = ROOT / "configs"
IN_TABLES = [path for path in known_pairs() if load_tables().table_of(RecipeSource(path))]
LARGE = [
    path
    for folders in (("cityscapes", "camvid"), ("coco",))
    for path in [path for path in IN_TABLES if path.parent.name in folders][1:]
]


def without_table(path: Path) -> str:
    """Return the method by which a pair that is in no table is tried: DDKD, or one that fits its task."""
    others = {"demo_detection": "diffkd", "demo_super_resolution": "fakd", "rcan_x4": "fakd", "fsrcnn_x2": "pisr"}
    return "diffkd" if path.parent.name in ("bccd", "coco") else others.get(path.stem, "ddkd")


RECIPES = [
    *(
        RecipeSource(CONFIGS / "cifar100" / "resnet56_resnet20.yaml", name)
        for name in known_methods()
        # The teacher of one needs subclasses, and the networks of the other a fourth stage.
        if name not in (*OF_TOKENS, *OF_MASKS, *OF_BOXES, *OF_IMAGES, "subclass_kd", "sskd_stage4")
    ),
    *(RecipeSource(CONFIGS / "imagenet" / "regnety_deit_tiny.yaml", name) for name in OF_TOKENS),
    *table_cells([path for path in IN_TABLES if path not in LARGE], ()),
    # Their methods are those of the first pair of the task; a ResNet-101 takes a second.
    *table_cells(LARGE, ("ce", "cwd", "diffkd")),
    *(RecipeSource(path, without_table(path)) for path in known_pairs() if path not in IN_TABLES),
    *map(RecipeSource, sorted(CONFIGS.glob("*/teachers/*.yaml"))),
]
"""Every method but those of masks, the cells of the tables, the other pairs, and the teachers."""


@pytest.mark.parametrize("source", dict.fromkeys(RECIPES), ids=str)
def test_every_recipe_of_the_tree_is_built(source: RecipeSource):
    loaded = load_recipe(source.path, source.selection)
    report = summarize(loaded)
    # Each loss gives its parts, and what has parameters of its own says so.
    for name in loaded.recipe.losses:
        assert any(part == name or part.startswith(f"{name}/") for part in report.parts)
    assert report.student.parameters > 5_000
    data, logits = loaded.recipe.data, report.student.shapes["logits"]
    assert logits == (3, *data.target_size) if find_task(loaded.recipe.task).of_images else data.classes in logits
    averages = len(loaded.recipe.student.peer_models) or 1
    assert len(report.teachers) == (averages if loaded.recipe.teacher is not None else 0)
    assert report.training_macs >= 3 * report.student.macs


def test_the_cost_of_ddkd_is_what_its_formulas_give():
    report = summarize(load_recipe(CONFIGS / "imagenet" / "r50_mbv1.yaml", ["method=ddkd"]))
    assert report.student.parameters == 4_231_976
    assert report.auxiliary["ddkd"] == 34_638_972
    assert report.auxiliary_macs == pytest.approx(1.394e9, rel=1e-3)
    assert report.training_macs == pytest.approx(9.98e9, rel=1e-3)


def test_a_check_trains_nothing_and_writes_nothing(
    run_train: Callable[..., None], recipes: Path, capsys: pytest.CaptureFixture[str]
):
    before = sorted(recipes.rglob("*"))
    run_train("--check", "ddkd.yaml")
    shown = capsys.readouterr().out
    assert "cifar_resnet8, 78,692 parameters" in shown
    assert "last             64 × 4 × 4" in shown
    assert "ddkd/diffusion_feature" in shown
    assert sorted(recipes.rglob("*")) == before


def test_a_check_says_what_training_would_refuse(recipes: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(recipes)
    for words, message in {
        ("student.model=resnet19",): "student.model: there is no model 'resnet19'",
        ("losses.ddkd.feature.stage=stage9",): "student.stages: the network has no stage 'stage9'",
        ("losses.ddkd.feature.stage=embedding",): "losses: the tap 'embedding' is shaped [64]",
        ("data.path=nowhere",): "data.classes: nowhere contains no shards",
    }.items():
        with pytest.raises(RecipeError) as caught:
            summarize(load_recipe("ddkd.yaml", words))
        assert message in str(caught.value)


def test_every_member_of_an_ensemble_is_measured_and_one_is_tapped(recipes: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(recipes)
    write_members(recipes, {"recipe": "teacher.yaml"}, {"model": "cifar_resnet32", "weights": "nowhere.pt"})
    report = summarize(load_recipe("members.yaml"))
    assert [teacher.name for teacher in report.teachers] == ["cifar_resnet20", "cifar_resnet32"]
    assert [set(teacher.shapes) for teacher in report.teachers] == [{"last", "logits"}, {"logits"}]
    first, second = report.teachers
    assert report.training_macs == first.macs + second.macs + 3 * (report.student.macs + report.auxiliary_macs)
    assert "teacher   cifar_resnet20, 27" in str(report)
    assert "teacher   cifar_resnet32, 46" in str(report)


def test_a_member_that_training_would_refuse_is_refused(recipes: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(recipes)
    for model, message in {
        "resnet19": "teacher.members.1.model: there is no model 'resnet19'",
        "vit_b_16": "teacher.members.1.model: VisionTransformer cannot take images of 16 pixels: Wrong image height!",
    }.items():
        write_members(recipes, {"recipe": "teacher.yaml"}, {"model": model, "weights": "nowhere.pt"})
        with pytest.raises(RecipeError, match=f"^{message}"):
            summarize(load_recipe("members.yaml"))


def write_members(folder: Path, *members: dict[str, str]) -> None:
    teacher = {"recipe": None, "members": list(members), "combine": "mean", "temperature": 4.0}
    (folder / "members.yaml").write_text(yaml.safe_dump({"base": "ddkd.yaml", "teacher": teacher}))


def test_a_moving_average_costs_a_forward_of_the_students_network(recipes: Path):
    teacher = {"recipe": None, "average": {"decay": 0.9}}
    (recipes / "average.yaml").write_text(yaml.safe_dump({"base": "ddkd.yaml", "teacher": teacher}))
    report = summarize(load_recipe(recipes / "average.yaml"))
    assert [teacher.name for teacher in report.teachers] == ["cifar_resnet8"]
    assert report.training_macs == 4 * report.student.macs + 3 * report.auxiliary_macs


UNFIT = [
    ("vit_b_16", "VisionTransformer cannot take images of 32 pixels: Wrong image height! Expected 224 but got 32!"),
    ("alexnet", "AlexNet cannot take images of 32 pixels: Given input size: "),
    ("inception_v3", "Inception3 cannot take images of 32 pixels: "),
]


@pytest.mark.parametrize(("model", "message"), UNFIT)
def test_a_network_that_cannot_take_the_images_is_refused_in_one_line(
    recipes: Path, monkeypatch: pytest.MonkeyPatch, model: str, message: str
):
    monkeypatch.chdir(recipes)
    with pytest.raises(RecipeError, match=f"^student.model: {message}") as caught:
        summarize(load_recipe("ce.yaml", (f"student.model={model}", "data.size=32")))
    assert "\n" not in str(caught.value)


def test_training_refuses_it_in_the_same_words(recipes: Path):
    loader = cast(Loader, SimpleNamespace(num_classes=20))
    run = run_of(recipes / "ce.yaml", ("student.model=alexnet", "data.size=32"))
    with pytest.raises(RecipeError, match=r"^student.model: AlexNet cannot take images of 32 pixels: "):
        build_distiller(run, loader, None, torch.device("cpu"), torch.contiguous_format)


class Wary(Loss):
    """A user's loss that looks at its numbers."""

    needs_teacher = False

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        logits_BK = student.logits_BK
        small = logits_BK.abs().max() < 5 and logits_BK.numpy(force=True).max() < 5
        return {"": logits_BK.square().mean() * (1.0 if small else 2.0) * logits_BK.mean().item()}


def test_what_computes_with_its_numbers_is_run_on_the_cpu(recipes: Path):
    recipe = {"base": "ce.yaml", "student": {"model": "small_networks:Careful"}, "losses": {f"{__name__}:Wary": {}}}
    (recipes / "own.yaml").write_text(yaml.safe_dump(recipe))
    report = summarize(load_recipe(recipes / "own.yaml"))
    assert report.student.parameters == 20 * 28
    assert report.student.macs == 20 * 27 * 14 * 14
    assert any(part.startswith(f"{__name__}:Wary") for part in report.parts)


def test_what_is_counted_for_made_up_samples_is_said(recipes: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(recipes)
    absent = summarize(load_recipe("ddkd.yaml", ("data.path=nowhere", "data.classes=7")))
    assert str(absent).endswith(
        "\nno shards at nowhere: the memory of losses per sample is counted for 14 assumed samples"
    )
    said = summarize(load_recipe("ddkd.yaml", ("data.path=nowhere", "data.classes=7", "data.samples=60")))
    assert said.note.endswith(
        "at nowhere: the memory of losses per sample is counted for the 60 samples of data.samples"
    )
    there = str(summarize(load_recipe("ddkd.yaml")))
    assert "assumed" not in there
    assert "\ntraining  about 0." in there


def test_banks_are_counted_as_on_the_shards_where_the_recipe_says_how_many_samples_they_have(
    recipes: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(recipes)
    crd = {"crd": {"dim": 8, "negatives": 5, "temperature": 0.07, "momentum": 0.5}}
    (recipes / "crd.yaml").write_text(yaml.safe_dump({"base": "ddkd.yaml", "losses": {"ddkd": None, **crd}}))
    there = summarize(load_recipe("crd.yaml"))
    nowhere = ("data.path=nowhere", "data.classes=20")
    said = summarize(load_recipe("crd.yaml", (*nowhere, "data.samples=60")))
    assert said._replace(note="") == there
    # Both anchors are embedded from 64 channels, and compared with a bank.
    assert said.auxiliary_macs == 2 * (64 * 8 + 60 * 8)
    assert summarize(load_recipe("crd.yaml", nowhere)).auxiliary_macs == 2 * (64 * 8 + 40 * 8)


def test_how_many_samples_a_recipe_says_does_not_make_it_another_run(recipes: Path):
    plain, said = (run_of(recipes / "ce.yaml", words) for words in ((), ("data.samples=7",)))
    assert said.identity == plain.identity
