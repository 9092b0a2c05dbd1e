"""Focal and global distillation: which pixels a box covers, what its blocks do at the start, what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loss_cases import STUDENT_SHAPES, Example, config_of, example, inputs_of, oracle
from torch import Tensor, nn

from pipeline.losses._registry import load_spec
from pipeline.losses.fgd import FGD, GlobalContext, attention_of, box_weights, stride_of
from pipeline.tasks._boxes import BOXES, CLASSES, CROWD


def weights(*boxes: list[float], real: list[bool] | None = None) -> tuple[Tensor, Tensor]:
    """Return the weights of one image of 4 × 6 pixels with those boxes."""
    real_BN = torch.tensor([real or [True] * len(boxes)])
    foreground_BHW, background_BHW = box_weights(torch.tensor([list(boxes)]), real_BN, 4, 6)
    return foreground_BHW[0], background_BHW[0]


def test_a_box_covers_the_pixels_it_touches_and_each_weighs_one_over_their_number():
    foreground, background = weights([1.5, 0.5, 2.5, 1.2])
    expected = torch.zeros(4, 6)
    expected[0:3, 1:4] = 1 / 9
    torch.testing.assert_close(foreground, expected)
    torch.testing.assert_close(background, (expected == 0) / 15.0)


def test_of_boxes_that_overlap_the_smaller_counts():
    foreground, _ = weights([0.0, 0.0, 5.0, 3.0], [1.0, 1.0, 2.0, 1.0])
    assert foreground[1, 1].item() == foreground[1, 2].item() == 0.5
    assert foreground[0, 0].item() == pytest.approx(1 / 24)


def test_crowds_and_what_fills_the_batch_are_background():
    foreground, background = weights([0.0, 0.0, 5.0, 3.0], [1.0, 1.0, 2.0, 1.0], real=[False, False])
    assert not foreground.any()
    torch.testing.assert_close(background, torch.full((4, 6), 1 / 24))


def test_an_image_that_a_box_covers_has_no_background():
    _, background = weights([0.0, 0.0, 6.0, 4.0])
    assert not background.any()


@pytest.mark.parametrize(("images", "maps", "stride"), [(800, 100, 8), (800, 13, 64), (800, 7, 128), (64, 4, 16)])
def test_boxes_are_divided_by_the_stride_of_a_level_whose_size_is_rounded_up(images: int, maps: int, stride: int):
    assert stride_of((images, images), (maps, maps)) == stride


def test_attention_has_a_mean_of_one_over_pixels_and_over_channels():
    pixels_BHW, channels_BC = attention_of(torch.randn(2, 8, 4, 6, dtype=torch.float64), 0.5)
    torch.testing.assert_close(pixels_BHW.mean((1, 2)), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(channels_BC.mean(1), torch.ones(2, dtype=torch.float64))


def fgd(student: dict[str, Any] = STUDENT_SHAPES, **changes: Any) -> Example:
    """Return the example of the loss with two images of 64 × 96 pixels with three boxes, and changes to its config."""
    return example("fgd", load_spec("fgd", {**config_of("fgd"), **changes}), rows=2, student=student)


def test_a_narrower_student_is_brought_to_the_teachers_channels_by_a_convolution_with_a_bias():
    narrow = {**STUDENT_SHAPES, "fpn.p3": (4, 8, 12), "fpn.p4": (4, 4, 6)}
    case = fgd(narrow)
    connectors: Any = case.loss.connectors
    assert all(isinstance(each, nn.Conv2d) and each.bias is not None for each in connectors)
    expected = oracle("fgd").parts(case.loss.config.model_dump(mode="json"), inputs_of(case, seed=0))
    assert case.total().item() == pytest.approx(sum(expected.values()), rel=1e-10)


def test_at_the_start_the_context_is_zero_and_its_last_convolution_learns_first():
    torch.manual_seed(0)
    block = GlobalContext(8)
    context = block(torch.randn(2, 8, 4, 6))
    assert context.shape == (2, 8, 1, 1)
    assert not context.any()
    (context - 1).square().sum().backward()
    assert block.transform[3].weight.grad.abs().amax() > 0  # type: ignore[union-attr]
    assert not block.transform[0].weight.grad.any()  # type: ignore[union-attr]


def test_each_weight_scales_its_part_alone():
    plain = {name: value.item() for name, value in fgd().parts().items()}
    config = config_of("fgd")
    for part in plain:
        found = {name: value.item() for name, value in fgd(**{part: 3 * config[part]}).parts().items()}
        assert found == pytest.approx({**plain, part: 3 * plain[part]})


def test_the_gradient_reaches_every_pixel_in_a_box_and_outside():
    case = fgd(attention=0.0, relation=0.0)
    case.total().backward()
    for level in ("fpn.p3", "fpn.p4"):
        assert (case.student.features[level].grad != 0).all()  # type: ignore[operator]


def test_a_batch_without_any_box_is_all_background():
    case = fgd()
    none = {**case.batch.targets, CLASSES: torch.full_like(case.batch.targets[CLASSES], -1)}
    parts = case._replace(batch=case.batch._replace(targets=none)).parts()
    assert parts["foreground"].item() == 0
    assert parts["background"].item() > 0


def test_it_reads_boxes_classes_and_crowds_and_neither_logits_nor_the_class_of_an_image():
    assert FGD.targets == {BOXES, CLASSES, CROWD}
    assert not FGD.reads_labels
    assert not fgd().loss.config.reads_head()
