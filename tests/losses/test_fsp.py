"""Flows between maps: how they scale, which maps they are of, and maps that cannot be compared."""

from __future__ import annotations

import re

import pytest
import torch
from loss_cases import example

from pipeline.losses._base import Facts
from pipeline.losses._registry import load_spec
from pipeline.losses.fsp import flow


def test_flows_grow_with_the_square_of_the_features_and_divide_by_the_pixels():
    torch.manual_seed(0)
    shallow_BCHW, deep_BDHW = torch.randn(2, 3, 4, 6), torch.randn(2, 5, 4, 6)
    torch.testing.assert_close(flow(3 * shallow_BCHW, 3 * deep_BDHW), 9 * flow(shallow_BCHW, deep_BDHW))
    assert flow(torch.ones(2, 3, 4, 6), torch.ones(2, 5, 2, 2)).eq(1).all()


def test_all_stages_begin_with_the_stem():
    assert example("fsp").loss.levels == [("stem", "stem"), ("stage1", "stage2"), ("stage2", "stage3")]


MAPS = {"stage1": (8, 4, 4), "stage2": (32, 2, 2)}


@pytest.mark.parametrize("name", ["fsp", "kdsvd"])
@pytest.mark.parametrize(
    ("stages", "teacher", "message"),
    [
        (
            ["stage1", "stage2"],
            MAPS | {"stage2": (64, 2, 2)},
            "stage2 has 32 channels in the student and 64 in the teacher; it compares equal widths only",
        ),
        (
            ["stage1", {"student": "stage2", "teacher": "stage3"}],
            {"stage1": (8, 4, 4), "stage3": (64, 2, 2)},
            "stage2 has 32 channels in the student and 64 in the teacher at stage3; it compares equal widths only",
        ),
        (["stage2"], MAPS, "name two stages"),
        (["stage1", "stage2"], MAPS | {"stage2": (32,)}, "the tap 'stage2' is shaped [32], but a map [C, H, W] is"),
    ],
)
def test_maps_that_cannot_be_compared_are_refused_in_one_line(name: str, stages: list, teacher: dict, message: str):
    spec = load_spec(name, {"stages": stages, **({"k": 1} if name == "kdsvd" else {})})
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        spec.build(Facts(5, MAPS, teacher))
    assert "\n" not in str(caught.value)
