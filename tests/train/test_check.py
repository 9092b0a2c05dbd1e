"""``--check``: what a recipe is made of, without training it; and every recipe of the tree is made of something."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.check import check
from pipeline.recipe import ROOT, RecipeError, load_recipe

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
RECIPES = [path for path in CONFIGS if f"pipeline/train.py {path.relative_to(ROOT)}" in path.read_text()]


def test_every_file_beside_a_pair_says_its_command():
    beside = {path for path in CONFIGS if (path.parent / "pair.yaml").is_file() and path.name != "pair.yaml"}
    assert len(beside) > 300
    assert beside <= set(RECIPES)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_every_recipe_of_the_tree_is_built(path: Path):
    loaded = load_recipe(path)
    report = check(loaded)
    # Each loss gives its parts, and what has parameters of its own says so.
    for name in loaded.recipe.losses:
        assert any(part == name or part.startswith(f"{name}/") for part in report.parts)
    assert report.student.parameters > 50_000
    assert report.student.shapes["logits"] == (loaded.recipe.data.classes,)
    assert (report.teacher is None) == (loaded.recipe.teacher is None)
    assert report.training_macs >= 3 * report.student.macs


def test_the_cost_of_ddkd_is_what_its_formulas_give():
    report = check(load_recipe(ROOT / "configs" / "imagenet" / "r50_mbv1" / "ddkd.yaml"))
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
        ("data.path=nowhere",): "data.classes: nowhere holds no shards",
    }.items():
        with pytest.raises(RecipeError) as caught:
            check(load_recipe("ddkd.yaml", words))
        assert message in str(caught.value)
