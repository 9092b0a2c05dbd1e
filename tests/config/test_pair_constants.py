"""What ReviewKD and CAT-KD set for every pair of CIFAR-100's tables, as their papers and authors' code have it."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.config.recipe import load_recipe
from pipeline.config.tables import load_tables
from pipeline.errors import ROOT

PAIRS = ROOT / "configs" / "cifar100"

REVIEW = {
    "resnet56_resnet20": 0.6,
    "resnet110_resnet32": 1.0,
    "resnet32x4_resnet8x4": 5.0,
    "wrn_40_2_wrn_16_2": 5.0,
    "wrn_40_2_wrn_40_1": 5.0,
    "resnet32x4_shufflenet_v1": 5.0,
    "resnet32x4_shufflenet_v2": 8.0,
    "wrn_40_2_shufflenet_v1": 5.0,
}
"""Weight; of the other pairs none is published."""

CAT_KD = {
    "resnet110_resnet32": (1.8, 2, False),
    "resnet32x4_resnet8x4": (15.0, 2, False),
    "resnet32x4_shufflenet_v1": (600.0, 4, True),
    "resnet32x4_shufflenet_v2": (600.0, 4, True),
    "resnet50_mobilenet_v2": (40.0, 2, True),
    "resnet56_resnet20": (0.7, 2, False),
    "vgg13_mobilenet_v2": (15.0, 2, True),
    "vgg13_vgg8": (4.5, 2, False),
    "wrn_40_2_shufflenet_v1": (80.0, 4, True),
    "wrn_40_2_wrn_16_2": (12.0, 2, False),
    "wrn_40_2_wrn_40_1": (1.5, 2, False),
}
"""Weight, resolution, and whether maps are brought to unit length."""


def config_in(pair: str, row: str, loss: str) -> dict[str, Any]:
    """Return the loss's config in that row of a pair's tables."""
    return load_recipe(PAIRS / f"{pair}.yaml", [f"method={row}"]).recipe.losses[loss].config.model_dump()


@pytest.mark.parametrize("row", ["review", "review_dkd"])
@pytest.mark.parametrize("pair", REVIEW)
def test_reviews_weight_of_a_pair_is_the_published_one(pair: str, row: str):
    assert config_in(pair, row, "review")["weight"] == REVIEW[pair]


@pytest.mark.parametrize("pair", CAT_KD)
def test_cat_kds_constants_of_a_pair_are_the_published_ones(pair: str):
    config = config_in(pair, "cat_kd", "cat_kd")
    assert (config["weight"], config["resolution"], config["normalize"]) == CAT_KD[pair]


def test_every_pair_has_its_constants_of_cat_kd():
    assert CAT_KD.keys() == load_tables().datasets["cifar100"].pairs.keys()
