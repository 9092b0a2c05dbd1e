"""The key ``data.augment``: what it takes, what it refuses in one line, and what a run's identity makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from smallest_recipe import RECIPE

from pipeline.config.recipe import dump_recipe, load_recipe
from pipeline.errors import RecipeError
from pipeline.runs.identity import fixed_settings

EVERYTHING = [
    {"color_jitter": {"hue": 0.1}},
    {"autoaugment": {"policy": "svhn", "fill": [1, 2, 3]}},
    {"trivialaugment": {}},
    {"trivialaugment": {}},
    {"randaugment": {"ops": 2, "magnitude": 9}},
    {"erasing": {"probability": 0.25}},
    {"mixup": {"alpha": 0.8}},
    {"cutmix": {"alpha": 1.0}},
]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path / "recipe.yaml"


def names(augment: list[dict[str, Any]]) -> list[str]:
    return [name for entry in augment for name in entry]


def test_augmentations_keep_their_order_and_are_read_back_as_they_were_written(recipe: Path, tmp_path: Path):
    loaded = load_recipe(recipe, [f"data.augment={json.dumps(EVERYTHING)}"]).recipe
    dumped = dump_recipe(loaded)
    assert names(dumped["data"]["augment"]) == names(EVERYTHING)
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(dumped))
    assert load_recipe(tmp_path / "again.yaml").recipe == loaded


def test_the_augmentations_of_a_recipe_are_its_own_in_its_identity(recipe: Path):
    plain, empty, some, other = (
        fixed_settings(load_recipe(recipe, words).recipe)["data"]
        for words in (
            [],
            ["data.augment=[]"],
            ["data.augment=[{trivialaugment: {}}]"],
            ["data.augment=[{trivialaugment: {fill: [1, 1, 1]}}]"],
        )
    )
    assert plain == empty
    assert some["augment"] == [{"trivialaugment": {"fill": [0, 0, 0]}}]
    assert some != other


@pytest.mark.parametrize(
    ("augment", "said"),
    [
        ([{"randagument": {}}], "data.augment.0.randagument: unknown key; did you mean 'randaugment'?"),
        (
            [{"sepia": {}}],
            "known here are autoaugment, color_jitter, cutmix, erasing, mixup, randaugment, trivialaugment",
        ),
        ([{"randaugment": None}], "data.augment.0: expected keys of the augmentation, such as {randaugment: {ops: 2, "),
        (["randaugment"], "data.augment: expected a list of augmentations, such as [{randaugment: {ops: 2, "),
        ("randaugment", "data.augment: expected a list of augmentations, such as [{randaugment: {ops: 2, "),
        ({"trivialaugment": {}}, "data.augment: expected a list of augmentations"),
        ([{"trivialaugment": {}, "erasing": {"probability": 1}}], "data.augment: expected a list of augmentations"),
        ([{}], "data.augment: expected a list of augmentations"),
        ([{"trivialaugment": {}}] * 17, "data.augment: expected at most 16 augmentations, got 17"),
        ([{"randaugment": {"ops": 2}}], "data.augment.0.randaugment.magnitude: this key is required"),
        ([{"randaugment": {"ops": 2, "magnitude": 31}}], "randaugment.magnitude: should be less than or equal to 30"),
        (
            [{"randaugment": {"ops": 2, "magnitude": 11, "increasing": True}}],
            "data.augment.0.randaugment: magnitude must be at most 10 with increasing: true, got 11",
        ),
        ([{"autoaugment": {"policy": "mnist"}}], "autoaugment.policy: should be 'imagenet', 'cifar10' or 'svhn'"),
        ([{"color_jitter": {}}], "color_jitter: nothing changes; set brightness, contrast, saturation or hue above 0"),
        (
            [{"erasing": {"probability": 0.5, "scale": [0.5, 0.1]}}],
            "erasing: scale must be [smallest, largest], got [0.5",
        ),
        (
            [{"erasing": {"probability": 0.5}}, {"trivialaugment": {}}],
            "data.augment: trivialaugment changes pixels, and erasing before it normalised images; "
            "move trivialaugment before it",
        ),
    ],
)
def test_what_is_no_augmentation_is_one_line(recipe: Path, augment: object, said: str):
    with pytest.raises(RecipeError) as refusal:
        load_recipe(recipe, [f"data.augment={json.dumps(augment)}"])
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)
