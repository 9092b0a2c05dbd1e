from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import tensor

from pipeline.optim.guard import FiniteGuard, NonFiniteError

INF = torch.inf


@pytest.fixture
def guard() -> FiniteGuard:
    return FiniteGuard(torch.device("cpu"))


def scaled(guard: FiniteGuard, scale: float) -> None:
    """Let a GradScaler have come to that scale."""
    scaler = mock.Mock(get_scale=lambda: scale)
    guard.skip_step_if_nonfinite(SimpleNamespace(scaler=scaler), tensor(INF), 1)  # type: ignore[arg-type]


def test_the_part_that_began_it_is_named_with_its_step(guard: FiniteGuard):
    for step, kd in enumerate([1.0, 2.0, INF, 1.0, torch.nan], 1):
        guard.watch({"ce": tensor(1.0 if step < 4 else INF), "kd": tensor(kd), "total": tensor(1.0 + kd)}, step)
    with pytest.raises(NonFiniteError, match=r"^kd became NaN or inf at step 3; the update was skipped"):
        guard.check()


def test_an_overflow_of_scaled_gradients_is_no_error(guard: FiniteGuard):
    guard.watch({"ce": tensor(1.0)}, 1)
    scaled(guard, 2.0**14)
    guard.check()


def test_a_scale_that_fell_for_ever_is_one(guard: FiniteGuard):
    guard.watch({"ce": tensor(1.0)}, 1)
    scaled(guard, 2.0**-30)
    with pytest.raises(NonFiniteError, match=r"^the gradient was NaN or inf for many steps in a row"):
        guard.check()


def test_under_a_scale_that_fell_the_part_that_made_it_fall_is_named(guard: FiniteGuard):
    for step in range(1, 40):
        guard.watch({"ce": tensor(1.0), "kd": tensor(INF if step > 2 else 1.0)}, step)
    scaled(guard, 2.0**-30)
    with pytest.raises(NonFiniteError, match=r"^kd became NaN or inf at step 3"):
        guard.check()


OWN = ("teacher", "logits")


@pytest.mark.parametrize(
    ("answers", "advice"),
    [
        ({}, "lower schedule.rate, or set precision: fp32"),
        ({OWN: tensor([1.0, INF])}, "the teacher's own logits are not finite in float16; set teacher.dtype: bf16, or"),
        ({OWN: tensor([torch.nan])}, "the teacher's own logits are not finite in float16; set teacher.dtype: bf16"),
        (
            {OWN: tensor([1.0])},
            "lower schedule.rate, or set precision: fp32; or teacher.dtype: bf16, if the teacher over",
        ),
        ({OWN: tensor([1.0]), ("teacher", "features (last)"): tensor([INF])}, "the teacher's own features (last) are"),
        (
            {OWN: tensor([1.0]), ("teacher.members.1", "logits"): tensor([INF])},
            "the teacher's own logits are not finite in float16; set teacher.members.1.dtype: bf16, or fp32",
        ),
        (
            {("teacher.members.0", "logits"): tensor([1.0]), ("teacher.members.2", "logits"): tensor([1.0])},
            "lower schedule.rate, or set precision: fp32; or teacher.members.0.dtype: bf16, teacher.members.2.dtype: ",
        ),
    ],
)
def test_the_advice_names_the_teacher_where_it_is_or_may_be_the_cause(
    guard: FiniteGuard, answers: dict[tuple[str, str], torch.Tensor], advice: str
):
    guard.watch({"kd": tensor(INF)}, 1)
    guard.half_answers = {place: value.half() for place, value in answers.items()}
    with pytest.raises(NonFiniteError) as caught:
        guard.check()
    assert str(caught.value).partition("was skipped; ")[2].startswith(advice)
