"""The teacher of PISR: what it makes of the large image, its taps, and what it shares with its student."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.batch import Batch, Outputs
from pipeline.bicubic import bicubic_upscaled
from pipeline.features.taps import FeatureTaps, tap_shapes
from pipeline.models.arguments import ArgumentError
from pipeline.models.create import create_model
from pipeline.models.pisr import LARGE_IMAGE, PISRTeacher
from pipeline.models.stages import stages
from pipeline.models.super_resolution import FSRCNN
from pipeline.tasks._high import HIGH, as_levels
from pipeline.teachers.frozen import Teacher

SMALL = {"features": 6, "shrunk": 4, "layers": 2}
WANTED = ("code", "expanding")


def network(scale: int = 2, *, residual: bool = False) -> PISRTeacher:
    torch.manual_seed(0)
    return PISRTeacher(scale=scale, residual=residual, **SMALL).eval()


def batch_of(rows: int, scale: int = 2, height: int = 6, width: int = 5) -> Batch:
    draws = torch.Generator().manual_seed(1)
    small = torch.rand(rows, 3, height, width, generator=draws)
    large = torch.randint(256, (rows, 3, scale * height, scale * width), generator=draws, dtype=torch.uint8)
    numbers = torch.arange(rows)
    return Batch(small, numbers * 0, numbers, {}, {HIGH: large})


def teacher_of(model: nn.Module, rows: int, dtype: torch.dtype = torch.float32) -> Teacher:
    taps = FeatureTaps(model, stages(model), WANTED)
    return Teacher(taps, batch=rows, image_size=6, dtype=dtype, device=torch.device("cpu"))


def conv(x: Tensor, layer: nn.Module, stride: int = 1) -> Tensor:
    assert isinstance(layer, nn.Conv2d)
    return F.conv2d(x, layer.weight, layer.bias, stride, layer.kernel_size[0] // 2)


def test_the_name_of_the_large_image_is_that_of_the_tasks_targets():
    assert LARGE_IMAGE == HIGH


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_a_student_enlarges_the_code_of_the_large_image(scale: int, residual: bool):
    model, batch = network(scale, residual=residual).double(), batch_of(2, scale)
    x = as_levels(batch.targets[HIGH], torch.float64)
    for number, stride in ((0, 1), (2, scale), (4, 1), (6, 1)):
        x = conv(x, model.encoder[number], stride)
        x = F.prelu(x, model.encoder.get_submodule(f"{number + 1}").weight) if number < 6 else x  # pyright: ignore
    assert x.shape == batch.images_BCHW.shape
    student = FSRCNN(scale=scale, residual=residual, **SMALL).double()
    student.load_state_dict({name: model.state_dict()[name] for name in student.state_dict()})
    with torch.no_grad():
        expected = student.enlarged(x) + (bicubic_upscaled(x, scale) if residual else 0)
        torch.testing.assert_close(model(batch.images_BCHW.double(), batch.targets), expected)


def test_the_published_encoder_has_the_layers_of_the_paper():
    with torch.device("meta"):
        layers = [each for each in PISRTeacher(scale=2, colours=1).encoder if isinstance(each, nn.Conv2d)]
    assert [(each.kernel_size[0], each.out_channels, each.stride[0]) for each in layers] == [
        (5, 56, 1),
        (5, 56, 2),
        (3, 12, 1),
        (3, 1, 1),
    ]


def test_without_a_scale_it_is_refused_in_one_line():
    with pytest.raises(ArgumentError, match=r"pisr_teacher cannot be built with \{\}: .* argument: 'scale'"):
        create_model("pisr_teacher", 1)


def test_the_small_image_is_not_read_and_the_large_one_is():
    model, batch = network(), batch_of(2)
    with torch.no_grad():
        answer = model(batch.images_BCHW, batch.targets)
        assert torch.equal(model(1 - batch.images_BCHW, batch.targets), answer)
        assert not torch.allclose(model(batch.images_BCHW, {HIGH: 255 - batch.targets[HIGH]}), answer)


def test_without_targets_shapes_are_those_of_a_black_image_and_training_is_refused():
    model = network()
    taps = FeatureTaps(model, stages(model), WANTED)
    assert tap_shapes(taps, 6) == {"code": (3, 6, 6), "expanding": (6, 6, 6), "logits": (3, 12, 12)}
    images = torch.rand(1, 3, 4, 5)
    black = {HIGH: torch.zeros(1, 3, 8, 10, dtype=torch.uint8)}
    with torch.no_grad():
        assert torch.equal(model(images), model(images, black))
    with pytest.raises(ValueError, match="encodes the large images; in training give targets"):
        model.train()(images, {})


@pytest.mark.parametrize("rows", [2, 3, 5])
def test_a_frozen_teacher_answers_for_the_large_image_whatever_the_rows_of_a_forward(rows: int):
    model, batch = network(), batch_of(5)
    with torch.no_grad():
        expected = FeatureTaps(model, stages(model), WANTED)(batch.images_BCHW, batch.targets)
    answer = teacher_of(network(), rows)(batch)
    assert_close(answer, expected, 1e-5)
    one_by_one = [teacher_of(network(), rows)(batch.at(slice(row, row + 1))) for row in range(5)]
    assert torch.equal(torch.cat([each.logits for each in one_by_one]), answer.logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_the_answer_is_nearly_the_same(dtype: torch.dtype):
    batch = batch_of(4)
    answer = teacher_of(network(), 4, dtype)(batch)
    assert answer.logits.dtype == dtype
    assert_close(answer, teacher_of(network(), 4)(batch), 0.02)


def assert_close(one: Outputs, other: Outputs, gap: float) -> None:
    pairs = {name: (value, other.features[name]) for name, value in one.features.items()}
    for ours, theirs in ({**pairs, "logits": (one.logits, other.logits)}).values():
        torch.testing.assert_close(ours.float(), theirs, rtol=gap, atol=gap)
