"""The hint regressor: how it meets the teacher's size, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loss_cases import Example, config_of, example, inputs_of, oracle
from oracles._feature_maps import at_the_smaller, convolution, maps
from torch import nn

from pipeline.losses._base import Facts
from pipeline.losses._registry import load_spec


def between(student: int, teacher: int, rows: int = 2) -> Example:
    """Return the loss between square maps of those sides."""
    shapes = {"stage2": (3, student, student)}, {"stage2": (4, teacher, teacher)}
    return example("fitnet", rows=rows, student=shapes[0], teacher=shapes[1])


@pytest.mark.parametrize(
    ("student", "teacher", "kind", "kernel", "stride"),
    [
        (8, 4, nn.Conv2d, 3, 2),
        (4, 8, nn.ConvTranspose2d, 4, 2),
        (5, 5, nn.Conv2d, 1, 1),
        (7, 5, nn.Conv2d, 3, 1),
        (9, 3, nn.Conv2d, 7, 1),
    ],
)
def test_the_regressor_meets_the_teachers_size(student: int, teacher: int, kind: type, kernel: int, stride: int):
    case = between(student, teacher)
    regressor: Any = case.loss.regressor
    convolution = regressor[0]
    assert type(convolution) is kind
    assert (convolution.kernel_size, convolution.stride) == ((kernel, kernel), (stride, stride))
    assert regressor(case.student.features["stage2"]).shape == case.teacher.features["stage2"].shape
    expected = oracle("fitnet").parts(case.loss.config.model_dump(), inputs_of(case, seed=0))["fitnet"]
    assert case.total().item() == pytest.approx(100 * expected, rel=1e-10)


@pytest.mark.parametrize(("student", "teacher"), [(3, 8), (2, 8), (4, 7)])
def test_published_code_calls_a_constant_where_no_size_fits_and_here_one_line_names_both_maps(
    student: int, teacher: int
):
    sizes = rf"'stage2', {student}×{student}, to the teacher's 'stage2', {teacher}×{teacher}"
    with pytest.raises(ValueError, match=rf"^no regressor leads .*{sizes}: .*; name another stage$"):
        between(student, teacher)


def test_stages_of_different_number_may_be_compared():
    spec = load_spec("fitnet", {**config_of("fitnet"), "stage": {"student": "stage2", "teacher": "stage3"}})
    assert example("fitnet", spec).total().isfinite()


def test_a_hint_that_is_no_map_is_refused_in_one_line():
    spec = load_spec("fitnet", {"stage": "embedding"})
    with pytest.raises(ValueError, match=r"the tap 'embedding' is shaped \[6\], but a map \[C, H, W\] is needed"):
        spec.build(Facts(5, {"embedding": (6,)}, {"embedding": (10,)}))


def test_its_norm_takes_the_batchs_statistics_in_either_mode():
    case = example("fitnet")
    trained = case.total().item()
    case.loss.eval()
    assert case.total().item() == trained
    assert not list(case.loss.buffers())


def test_a_norm_that_sees_a_single_value_is_refused_in_one_line():
    case = between(2, 1, rows=1)
    with pytest.raises(ValueError, match=r"each rank needs at least 2 rows: raise batch$"):
        case.total()


def test_the_regressor_alone_runs_under_autocast():
    case = example("fitnet", dtype=torch.float32, autocast=torch.bfloat16)
    seen = []
    case.loss.regressor[0].register_forward_hook(lambda _module, _inputs, y: seen.append(y.dtype))  # type: ignore[index]
    assert case.total().dtype == torch.float32
    assert seen == [torch.bfloat16]


def linear(student: tuple[int, ...], teacher: tuple[int, ...]) -> Example:
    """Return the loss with a regressor of one convolution between maps of those shapes."""
    spec = load_spec("fitnet", {"weight": 10.0, "stage": "stage4", "linear": True})
    return example("fitnet", spec, rows=2, student={"stage4": student}, teacher={"stage4": teacher})


@pytest.mark.parametrize(
    ("student", "teacher"), [((3, 4, 6), (5, 4, 6)), ((4, 4, 6), (4, 4, 6)), ((3, 4, 6), (2, 8, 12))]
)
def test_a_linear_regressor_is_one_convolution_without_bias_norm_and_activation(
    student: tuple[int, ...], teacher: tuple[int, ...]
):
    case = linear(student, teacher)
    ((name, weight),) = case.loss.named_parameters()
    assert (name, weight.shape) == ("regressor.weight", (teacher[0], student[0], 1, 1))
    x, y = at_the_smaller(*maps(inputs_of(case, seed=0), "stage4", "stage4"))
    guess = convolution(x, weight.detach().numpy())
    assert case.total().item() == pytest.approx(10 * ((guess - y) ** 2).mean(), rel=1e-10)


def test_a_linear_regressor_learns_negative_hints():
    case = linear((3, 4, 6), (5, 4, 6))
    below = {"stage4": -case.teacher.features["stage4"].detach().abs()}
    case = case._replace(teacher=case.teacher._replace(features=below))
    with torch.no_grad():
        case.loss.regressor.weight.zero_()  # type: ignore[union-attr]
    case.total().backward()
    assert case.loss.regressor.weight.grad.abs().amax() > 0  # type: ignore[union-attr]
