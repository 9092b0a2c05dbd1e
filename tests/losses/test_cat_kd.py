"""Class activation maps: resolution, normalisation and sizes."""

from __future__ import annotations

import pytest
import torch
from loss_cases import config_of, example, inputs_of, oracle

from pipeline.losses._registry import load_spec
from pipeline.losses.cat_kd import cat_loss


def maps() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(3, 5, 4, 4, dtype=torch.float64), torch.randn(3, 5, 8, 8, dtype=torch.float64)


@pytest.mark.parametrize("resolution", [1, 2])
@pytest.mark.parametrize("normalize", [False, True])
def test_every_resolution_and_normalisation_equals_the_oracle(resolution: int, normalize: bool):
    spec = load_spec("cat_kd", {"resolution": resolution, "normalize": normalize})
    case = example("cat_kd", spec)
    expected = oracle("cat_kd").parts(spec.config.model_dump(), inputs_of(case, seed=0))["cat_kd"]
    assert case.total().item() == pytest.approx(expected, rel=1e-10)


def test_one_pixel_compares_the_logits_without_their_bias():
    student_BKHW, teacher_BKHW = maps()
    logits_BK = student_BKHW.mean((2, 3)) - teacher_BKHW.mean((2, 3))
    found = cat_loss(student_BKHW, teacher_BKHW, resolution=1, normalize=False)
    assert found.item() == pytest.approx(logits_BK.square().mean().item(), rel=1e-12)


def test_normalised_maps_say_where_a_class_is_seen_and_not_how_strongly():
    student_BKHW, teacher_BKHW = maps()
    strength_BK11 = torch.rand(3, 5, 1, 1, dtype=torch.float64) + 0.1
    plain, scaled = (
        cat_loss(student, teacher_BKHW, resolution=2, normalize=True)
        for student in (student_BKHW, student_BKHW * strength_BK11)
    )
    assert scaled.item() == pytest.approx(plain.item(), rel=1e-12)
    assert cat_loss(teacher_BKHW * 7, teacher_BKHW, resolution=2, normalize=True).item() < 1e-20


def test_a_class_that_the_student_sees_nowhere_gets_no_gradient():
    """Published code divides its gradient by 1e-12."""
    student_BKHW, teacher_BKHW = maps()
    student_BKHW[:, 1] = 0
    student_BKHW.requires_grad_()
    cat_loss(student_BKHW, teacher_BKHW, resolution=2, normalize=True).backward()
    assert student_BKHW.grad is not None
    assert student_BKHW.grad[:, 0].abs().amax() > 0
    assert not student_BKHW.grad[:, 1].any()


def test_a_resolution_finer_than_a_map_is_refused_in_one_line():
    spec = load_spec("cat_kd", {**config_of("cat_kd"), "resolution": 4})
    with pytest.raises(ValueError, match=r"^cat_kd: resolution: the student's .* are 2×2; give at most 2, got 4$"):
        example("cat_kd", spec)
