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
    guard.arm(SimpleNamespace(scaler=scaler), tensor(INF), 1)  # type: ignore[arg-type]


def test_the_part_that_began_it_is_named_with_its_step(guard: FiniteGuard):
    for step, kd in enumerate([1.0, 2.0, INF, 1.0, torch.nan], 1):
        guard.watch({"ce": tensor(1.0 if step < 4 else INF), "kd": tensor(kd), "total": tensor(1.0 + kd)}, step)
    with pytest.raises(NonFiniteError, match=r"^kd is not finite at step 3, which touched no weight"):
        guard.check()


def test_an_overflow_of_scaled_gradients_is_no_error(guard: FiniteGuard):
    guard.watch({"ce": tensor(1.0)}, 1)
    scaled(guard, 2.0**14)
    guard.check()


def test_a_scale_that_fell_for_ever_is_one(guard: FiniteGuard):
    guard.watch({"ce": tensor(1.0)}, 1)
    scaled(guard, 2.0**-30)
    with pytest.raises(NonFiniteError, match=r"^the gradient was not finite for many steps on end"):
        guard.check()


def test_under_a_scale_that_fell_the_part_that_made_it_fall_is_named(guard: FiniteGuard):
    for step in range(1, 40):
        guard.watch({"ce": tensor(1.0), "kd": tensor(INF if step > 2 else 1.0)}, step)
    scaled(guard, 2.0**-30)
    with pytest.raises(NonFiniteError, match=r"^kd is not finite at step 3"):
        guard.check()


@pytest.mark.parametrize(
    ("logits", "advice"),
    [
        (None, "lower schedule.rate, or precision: fp32"),
        (tensor([1.0, INF]).half(), "the teacher's own logits are not finite in float16; give teacher.dtype: bf16, or"),
        (tensor([torch.nan]).half(), "the teacher's own logits are not finite in float16; give teacher.dtype: bf16"),
        (tensor([1.0]).half(), "lower schedule.rate, or precision: fp32; or teacher.dtype: bf16, if the teacher over"),
    ],
)
def test_the_advice_names_the_teacher_where_it_is_or_may_be_the_cause(
    guard: FiniteGuard, logits: torch.Tensor | None, advice: str
):
    guard.watch({"kd": tensor(INF)}, 1)
    guard.teacher_logits = logits
    with pytest.raises(NonFiniteError) as caught:
        guard.check()
    assert str(caught.value).partition("no weight; ")[2].startswith(advice)
