"""Activation boundaries: special values, how levels count, and what the first stage trains."""

from __future__ import annotations

import pytest
import torch
from loss_cases import PROGRESS, config_of, example

from pipeline.batch import Batch, Outputs
from pipeline.distiller import Distiller
from pipeline.features.taps import FeatureTaps, tap_shapes
from pipeline.losses._base import Facts
from pipeline.losses._registry import load_spec
from pipeline.losses.ab import ab_loss
from pipeline.models import create_model
from pipeline.models.stages import stages


def single(student: float, teacher: float, margin: float = 1.0) -> float:
    return ab_loss(torch.full((1, 1, 1, 1), student), torch.full((1, 1, 1, 1), teacher), margin=margin).item()


@pytest.mark.parametrize(
    ("student", "teacher", "loss"),
    [
        (0.0, 2.0, 1.0),
        (0.0, -2.0, 1.0),
        (-0.5, 0.1, 2.25),
        (0.5, -0.1, 2.25),
        (1.0, 3.0, 0.0),
        (7.0, 0.1, 0.0),
        (-1.0, -3.0, 0.0),
        (-7.0, -0.1, 0.0),
        (0.5, 0.0, 2.25),
        (-1.0, 0.0, 0.0),
    ],
)
def test_a_pre_activation_pays_for_what_it_lacks_of_the_margin_on_the_teachers_side(
    student: float, teacher: float, loss: float
):
    assert single(student, teacher) == pytest.approx(loss)


def test_only_the_signs_of_the_teacher_count():
    student_BCHW, teacher_BCHW = torch.randn(2, 4, 3, 5, 5)
    small = ab_loss(student_BCHW, 1e-3 * teacher_BCHW, margin=1.0)
    assert small.item() == ab_loss(student_BCHW, 1e3 * teacher_BCHW, margin=1.0).item()


def test_elements_are_summed_and_rows_averaged():
    zeros_BCHW = torch.zeros(4, 2, 3, 5)
    assert ab_loss(zeros_BCHW, zeros_BCHW, margin=2.0).item() == 2 * 3 * 5 * 4.0


def test_the_deepest_level_counts_one_and_each_before_it_half_of_the_next():
    shapes = {f"stage{number}": (2, 3, 3) for number in (1, 2, 3)}
    case = example("ab", student=shapes, teacher=shapes)
    found = []
    for name in sorted(shapes):
        features = {tap: torch.full_like(x, 9.0) for tap, x in case.student.features.items()}
        features[f"{name}.preact"] = torch.zeros(6, 2, 3, 3, dtype=torch.float64)
        teacher = {tap: torch.ones_like(x) for tap, x in features.items()}
        seen = Outputs(case.student.logits_BK, features), Outputs(case.teacher.logits_BK, teacher)
        found.append(case.loss.parts(*seen, case.batch, PROGRESS)["ab"].item())
    assert found == pytest.approx([3e-3 * 18 / 4, 3e-3 * 18 / 2, 3e-3 * 18])


def test_equal_shapes_are_compared_without_a_connector():
    student = {"stage1": (3, 8, 8)}
    assert not list(example("ab", student=student, teacher=student).loss.parameters())
    assert list(example("ab", student=student, teacher={"stage1": (4, 8, 8)}).loss.parameters())


def test_the_first_stage_trains_the_students_stages_and_leaves_its_head_as_it_began():
    model = create_model("cifar_resnet8", 5)
    taps = FeatureTaps(model, stages(model), {"all.preact"})
    shapes = tap_shapes(taps, 32)
    teacher_shapes = {name: (2 * shape[0], *shape[1:]) for name, shape in shapes.items()}
    losses = {"ab": load_spec("ab", config_of("ab"))}
    distiller = Distiller(taps, losses, Facts(5, shapes, teacher_shapes))
    features = {name: torch.randn(2, *shape) for name, shape in teacher_shapes.items() if name != "logits"}
    batch = Batch(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]), torch.arange(2), {})
    distiller(batch, Outputs(torch.randn(2, 5), features), PROGRESS)["total"].backward()
    idle = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert idle == {"fc.weight", "fc.bias"}
