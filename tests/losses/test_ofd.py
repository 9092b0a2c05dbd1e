"""Margins, the partial distance, and a teacher that stays as it is."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from loss_cases import PROGRESS, example
from torch import Tensor, nn

from pipeline.batch import Batch
from pipeline.distiller import Distiller
from pipeline.features.taps import FeatureTaps, NormParameters, tap_shapes
from pipeline.losses._base import Facts
from pipeline.losses._registry import load_spec
from pipeline.losses.ofd import margins, partial_l2
from pipeline.models import create_model
from pipeline.models.stages import stages
from pipeline.teachers.frozen import Teacher


def margin(scale: float, shift: float) -> float:
    return margins(NormParameters(torch.tensor([scale]), torch.tensor([shift]))).item()


def test_the_margin_of_a_standard_normal_channel_is_minus_the_root_of_two_over_pi():
    assert margin(1.0, 0.0) == pytest.approx(-math.sqrt(2 / math.pi), rel=1e-12)


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.5), (0.25, -1.5), (2.0, 5.0), (3.0, -20.0)])
def test_the_margin_is_the_mean_of_the_channels_negative_values(scale: float, shift: float):
    x = np.linspace(shift - 12 * scale, 0, 2_000_001)
    density = np.exp(-(((x - shift) / scale) ** 2) / 2)
    assert margin(scale, shift) == pytest.approx(np.trapezoid(x * density, x) / np.trapezoid(density, x), rel=1e-6)
    assert margin(-scale, shift) == margin(scale, shift)


def test_a_channel_that_is_hardly_ever_negative_gets_three_deviations():
    assert margin(0.5, 10.0) == pytest.approx(-1.5, rel=1e-6)
    below, above = margin(1.0, 3.0), margin(1.0, 3.1)
    assert below > -1
    assert above == pytest.approx(-3.0)


@pytest.mark.parametrize(("shift", "expected"), [(-2.0, -2.0), (0.0, 0.0), (2.0, 0.0)])
def test_a_pruned_channel_of_no_spread_gets_what_it_always_is(shift: float, expected: float):
    assert margin(0.0, shift) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("student", "teacher", "loss"),
    [
        (3.0, 1.0, 4.0),
        (-3.0, 1.0, 16.0),
        (0.0, -0.25, 0.0625),
        (-0.4, -0.25, 0.0),
        (0.0, -9.0, 0.25),
        (-0.5, -9.0, 0.0),
        (-7.0, -9.0, 0.0),
    ],
)
def test_a_student_below_a_passive_teacher_is_left_alone(student: float, teacher: float, loss: float):
    x, t = torch.full((1, 1, 1, 1), student), torch.full((1, 1, 1, 1), teacher)
    assert partial_l2(x, t, torch.tensor([-0.5])).item() == pytest.approx(loss)


def test_elements_are_summed_and_rows_averaged():
    ones_BCHW = torch.ones(4, 2, 3, 5)
    assert partial_l2(3 * ones_BCHW, ones_BCHW, torch.zeros(2)).item() == 2 * 3 * 5 * 4.0


def test_the_deepest_stage_by_its_alias_has_its_margin_too():
    spec = load_spec("ofd", {"stages": ["last"]})
    assert example("ofd", spec).total().isfinite()


def test_a_teacher_stage_without_a_known_norm_is_refused_in_one_line():
    shapes = {"stage1.preact": (3, 4, 4)}
    with pytest.raises(
        ValueError, match=r"^ofd: .*'stage1\.preact'.*teacher\.stages: \{stage1\.norm: <module path>\} \(.*\)$"
    ):
        load_spec("ofd", {"stages": "all"}).build(Facts(5, shapes, shapes))


def test_connectors_begin_with_the_authors_spread():
    facts = Facts(5, {"stage1.preact": (256, 2, 2)}, {"stage1.preact": (400, 2, 2)})
    norms = {"stage1.preact": NormParameters(torch.ones(400), torch.zeros(400))}
    loss = load_spec("ofd", {"stages": "all"}).build(Facts(**{**vars(facts), "teacher_norms": norms}))
    assert loss.connectors[0][0].weight.std().item() == pytest.approx(math.sqrt(2 / 400), rel=0.02)  # type: ignore[index]


def network() -> nn.Module:
    return create_model("cifar_resnet8", 5)


def taps_of(model: nn.Module) -> FeatureTaps:
    return FeatureTaps(model, stages(model), {"all.preact"})


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def test_published_code_puts_the_teacher_in_training_mode_and_here_its_statistics_never_move():
    torch.manual_seed(0)
    student, cpu = taps_of(network()), torch.device("cpu")
    teacher = Teacher(taps_of(network()), batch=2, image_size=32, dtype=torch.float32, device=cpu, fold=False)
    facts = Facts(5, tap_shapes(student, 32), tap_shapes(teacher.taps, 32), teacher_norms=teacher.norms)
    distiller = Distiller(student, {"ofd": load_spec("ofd", {"stages": "all", "weight": 1e-3})}, facts)
    before = state_of(teacher)
    nn.ModuleList([distiller, teacher]).train()
    batch = Batch(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]), torch.arange(2), {})
    for _ in range(2):
        distiller(batch, teacher(batch), PROGRESS)["total"].backward()
    assert not any(module.training for module in teacher.taps.modules())
    assert any(key.endswith("running_var") for key in before)
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert not {id(module) for module in teacher.modules()} & {id(module) for module in distiller.modules()}
