"""The hierarchical context loss, and which levels are reviewed in which order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loss_cases import Example, config_of, example, inputs_of, oracle

from pipeline.batch import Progress
from pipeline.losses._base import Facts
from pipeline.losses._registry import load_spec
from pipeline.losses.review import hcl_loss


def changed(shapes: dict[str, Any] | None = None, **changes: Any) -> Example:
    return example("review", load_spec("review", {**config_of("review"), **changes}), **(shapes or {}))


@pytest.mark.parametrize("side", [1, 2, 3, 4, 7, 8])
def test_the_weights_of_whole_and_pooled_maps_sum_to_one(side: int):
    map_BCHW = torch.randn(2, 3, side, side, dtype=torch.float64)
    assert hcl_loss([map_BCHW + 3], [map_BCHW]).item() == pytest.approx(9.0)
    assert hcl_loss([map_BCHW + 3, map_BCHW], [map_BCHW, map_BCHW]).item() == pytest.approx(9.0)


def test_a_difference_that_averages_out_counts_less_than_one_that_stays():
    board_HW = torch.ones(8, 8).cumsum(0).cumsum(1).remainder(2) * 2 - 1
    zeros_BCHW = torch.zeros(1, 1, 8, 8)
    assert hcl_loss([zeros_BCHW + board_HW], [zeros_BCHW]).item() < hcl_loss([zeros_BCHW + 1], [zeros_BCHW]).item()


def test_a_map_of_four_pixels_a_side_is_pooled_to_two_and_one_only():
    student, teacher = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64)
    difference = student - teacher
    whole, half, one = (F.adaptive_avg_pool2d(difference, side).square().mean().item() for side in (4, 2, 1))
    expected = (whole + half / 2 + one / 4) / 1.75
    assert hcl_loss([student], [teacher]).item() == pytest.approx(expected, rel=1e-12)


def test_levels_are_paired_from_the_deep_end_and_the_embedding_is_the_deepest():
    loss: Any = example("review").loss
    assert loss.pairs == [("stage1", "stage2.preact"), ("stage2", "stage3.preact"), ("embedding", "embedding")]
    assert [fusion.attention is None for fusion in loss.fusions] == [False, False, True]


def test_a_deeper_student_leaves_out_its_first_level():
    shapes = {
        "student": {"embedding": (6,), **{f"stage{number}": (4, 4, 4) for number in (1, 2, 3)}},
        "teacher": {"embedding": (6,), **{f"stage{number}": (4, 4, 4) for number in (1, 2)}},
    }
    loss: Any = changed(shapes).loss
    assert loss.pairs[:-1] == [("stage2", "stage1.preact"), ("stage3", "stage2.preact")]


@pytest.mark.parametrize("preact", [False, True])
def test_the_student_may_be_tapped_before_its_last_activation(preact: bool):
    case = changed(student_preact=preact)
    kind = ".preact" if preact else ""
    assert set(case.student.features) == {f"stage1{kind}", f"stage2{kind}", "embedding"}
    assert {name for name in case.teacher.features if name != "embedding"} == {
        f"stage{number}.preact" for number in (1, 2, 3)
    }
    expected = oracle("review").parts(case.loss.config.model_dump(), inputs_of(case, seed=0))["review"]
    assert case.total().item() == pytest.approx(5 * expected, rel=1e-10)


@pytest.mark.parametrize(("embedding", "width"), [(64, 64), (512, 512), (1280, 512)])
def test_fused_maps_are_as_wide_as_the_students_embedding_and_at_most_512(embedding: int, width: int):
    shapes = {"embedding": (embedding,), "stage1": (8, 4, 4)}
    teacher = {"embedding": (6,), "stage1.preact": (8, 4, 4)}
    with torch.device("meta"):
        loss: Any = load_spec("review", config_of("review")).build(Facts(5, shapes, teacher))
    assert [fusion.input[0].out_channels for fusion in loss.fusions] == [width, width]


def test_the_shallowest_level_is_reviewed_in_the_light_of_the_embedding():
    case = example("review")
    loss: Any = case.loss
    residual, found = (), []
    for level in (2, 1, 0):
        feature = case.student.features[loss.pairs[level][0]]
        map_BCHW = feature[:, :, None, None] if level == 2 else feature
        residual = (loss.fusions[level].fuse(map_BCHW, *residual, size=(8, 8)),)
        found = torch.autograd.grad(residual[0].square().sum(), case.student.features["embedding"], retain_graph=True)
        assert found[0].abs().amax() > 0


def test_one_row_is_refused_since_the_embeddings_norms_would_see_one_value():
    with pytest.raises(ValueError, match=r"got one value a channel; each rank needs at least 2 rows: raise batch$"):
        example("review", rows=1).total()


def test_the_ramp_begins_with_a_twentieth():
    case = example("review")
    first = case.loss.parts(case.student, case.teacher, case.batch, Progress(steps_per_epoch=10))["review"].item()
    assert first == pytest.approx(case.total().item() / 20)
