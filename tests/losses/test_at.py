from __future__ import annotations

import pytest
import torch
from loss_cases import example, load_spec
from torch import Tensor

from pipeline.losses._base import Facts
from pipeline.losses.at import at_loss, attention


def maps(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_attention_is_the_channels_power_as_a_vector_of_length_one():
    map_BCHW = torch.tensor([[[[3.0, 0.0]], [[0.0, -4.0]]]], dtype=torch.float64)
    expected = torch.tensor([[9.0, 16.0]], dtype=torch.float64) / (9**2 + 16**2) ** 0.5
    torch.testing.assert_close(attention(map_BCHW, 2.0), expected)
    torch.testing.assert_close(attention(map_BCHW, 1.0), torch.tensor([[0.6, 0.8]], dtype=torch.float64))


def test_channels_that_repeat_change_nothing():
    student, teacher = maps(0, 3, 4, 5, 5), maps(1, 3, 6, 5, 5)
    wide = at_loss([student.repeat(1, 3, 1, 1)], [teacher.repeat(1, 2, 1, 1)], p=2)
    torch.testing.assert_close(wide, at_loss([student], [teacher], p=2))


def test_levels_are_added_up():
    students, teachers = [maps(0, 3, 4, 5, 5), maps(1, 3, 8, 2, 2)], [maps(2, 3, 6, 5, 5), maps(3, 3, 6, 4, 4)]
    one_by_one = [at_loss([s], [t], p=2) for s, t in zip(students, teachers, strict=True)]
    torch.testing.assert_close(at_loss(students, teachers, p=2), torch.stack(one_by_one).sum())


@pytest.mark.parametrize("p", [1.0, 2.0, 4.0])
def test_a_map_without_any_activation_gets_no_gradient(p: float):
    student = maps(0, 3, 4, 5, 5).relu()
    student[1] = 0
    student.requires_grad_()
    at_loss([student], [maps(1, 3, 6, 5, 5)], p=p).backward()
    assert student.grad is not None
    assert not student.grad[1].any()
    assert student.grad.abs().amax() < 1


def test_the_teachers_surplus_stage_is_the_shallowest():
    case = example("at")
    first = case.teacher.features["stage1"]
    moved = case._replace(teacher=case.teacher._replace(features={**case.teacher.features, "stage1": 2 + first}))
    assert moved.total().item() == case.total().item()


def test_a_stage_that_is_no_map_is_refused_in_one_line():
    shapes = {"embedding": (6,)}
    spec = load_spec("at", {"p": 2.0, "stages": ["embedding"]})
    with pytest.raises(ValueError, match=r"^the tap 'embedding' is shaped \[6\], but a map \[C, H, W\] is needed$"):
        spec.build(Facts(5, shapes, shapes))
