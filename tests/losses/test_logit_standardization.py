from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import PROGRESS, example
from torch import Tensor

from pipeline.losses._registry import load_spec
from pipeline.losses.dkd import dkd_loss
from pipeline.losses.kd import kd_loss
from pipeline.losses.logit_standardization import standardize


def logits(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return 3 * torch.randn(6, 5, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def test_every_row_has_mean_zero_and_unbiased_variance_one():
    z = standardize(logits(0))
    torch.testing.assert_close(z.mean(1), torch.zeros(6, dtype=torch.float64))
    torch.testing.assert_close(z.square().sum(1) / 4, torch.ones(6, dtype=torch.float64), rtol=1e-6, atol=0)


@settings(max_examples=20, derandomize=True, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.floats(0.1, 100), shift=st.floats(-100, 100))
def test_a_rows_scale_and_shift_are_ignored(seed: int, scale: float, shift: float):
    torch.testing.assert_close(
        standardize(scale * logits(seed) + shift), standardize(logits(seed)), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("level", [0.0, 0.1, 1000.0])
def test_a_row_of_equal_logits_is_even_and_gets_no_gradient(dtype: torch.dtype, level: float):
    """Published code divides its gradient by ε, 1e-7."""
    student, teacher = logits(1, dtype), standardize(logits(0, dtype))
    student[2] = level
    student.requires_grad_()
    seen = standardize(student)
    assert not seen[2].any()
    kd_loss(seen, teacher, temperature=2.0).backward()
    assert student.grad is not None
    assert not student.grad[2].any()
    assert student.grad[3].abs().amax() > 0


def test_any_loss_of_logits_can_be_wrapped():
    inner = {"dkd": {"alpha": 1.0, "beta": 8.0, "temperature": 2.0, "weight": 3.0}}
    case = example("logit_standardization", load_spec("logit_standardization", {"weight": 2.0, "inner": inner}))
    seen = standardize(case.student.logits_BK), standardize(case.teacher.logits_BK)
    expected = 6.0 * dkd_loss(*seen, case.batch.labels_B, alpha=1.0, beta=8.0, temperature=2.0)
    parts = case.loss.parts(case.student, case.teacher, case.batch, PROGRESS)
    torch.testing.assert_close(parts, {"dkd": expected})


def test_rows_and_columns_can_both_be_standardised():
    """Perception standardises the columns; the one that wraps the other comes first."""
    inner = {"perception": {"inner": {"kd": {"temperature": 2.0}}}}
    case = example("logit_standardization", load_spec("logit_standardization", {"inner": inner}))
    (total,) = case.parts().values()
    assert total.isfinite()
    rows_first = load_spec("perception", inner["perception"]).build(case.loss.facts)
    seen = [x._replace(logits=standardize(x.logits_BK)) for x in (case.student, case.teacher)]
    torch.testing.assert_close(rows_first.parts(*seen, case.batch, PROGRESS)["kd"], total)
