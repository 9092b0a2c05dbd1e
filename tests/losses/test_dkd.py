from __future__ import annotations

from math import log

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.losses._base import Facts
from pipeline.losses._functional import kl_divergence
from pipeline.losses._registry import load_spec
from pipeline.losses.dkd import dkd_loss, split_at_label
from pipeline.losses.kd import kd_loss


def logits(seed: int, rows: int = 8, classes: int = 6) -> Tensor:
    return 3 * torch.randn(rows, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=20, derandomize=True, deadline=None)
@given(seed=st.integers(0, 10_000), temperature=st.floats(0.5, 8))
def test_kd_is_tckd_plus_the_teachers_doubt_times_nckd(seed: int, temperature: float):
    student, teacher = logits(seed), logits(seed + 1)
    labels = torch.arange(8) % 6
    for row in range(8):
        one = slice(row, row + 1)
        doubt = 1 - (teacher[one] / temperature).softmax(1)[0, labels[row]].item()
        split = dkd_loss(student[one], teacher[one], labels[one], alpha=1.0, beta=doubt, temperature=temperature)
        whole = kd_loss(student[one], teacher[one], temperature=temperature)
        assert split.item() == pytest.approx(whole.item(), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("confident", ["student", "teacher", "both"])
def test_a_gap_of_two_hundred_logits_at_temperature_one_stays_finite(dtype: torch.dtype, confident: str):
    """The published form takes the log of a probability there, which is log 0."""
    sure = torch.zeros(4, 5, dtype=dtype)
    sure[:, 0] = 200.0
    student = (sure if confident != "teacher" else logits(0, 4, 5).to(dtype)).clone().requires_grad_()
    teacher = sure if confident != "student" else logits(1, 4, 5).to(dtype)
    loss = dkd_loss(student, teacher, torch.arange(4), alpha=1.0, beta=2.0, temperature=1.0)
    loss.backward()
    assert loss.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_a_student_surer_than_its_teacher_is_charged_its_gap():
    """The teacher gives the label one half, the student 1 − 2·e^−200."""
    student, teacher = torch.zeros(2, 1, 3, dtype=torch.float64)
    student[0, 0], teacher[0, 0] = 200.0, log(2)
    loss = dkd_loss(student, teacher, torch.tensor([0]), alpha=1.0, beta=1.0, temperature=1.0)
    assert loss.item() == pytest.approx(0.5 * log(0.5) + 0.5 * (log(0.5) - (log(2) - 200)), rel=1e-12)


def test_the_two_halves_of_the_split_are_distributions():
    binary_B2, others_BK = split_at_label(logits(0), torch.arange(8) % 6)
    torch.testing.assert_close(binary_B2.exp().sum(1), torch.ones(8, dtype=torch.float64))
    torch.testing.assert_close(others_BK.exp().sum(1) - 1, torch.ones(8, dtype=torch.float64))


def test_a_label_far_above_the_others_leaves_their_distribution_alone():
    """Masking it with −1000, as a summand or as a value, would leave it the largest."""
    scores = torch.tensor([[3000.0, -3000.0, -2999.0, -2998.0]], dtype=torch.float64)
    _, others_BK = split_at_label(scores, torch.tensor([0]))
    torch.testing.assert_close(others_BK[:, 1:], scores[:, 1:].log_softmax(1))


@pytest.mark.parametrize("classes", [10, 100])
def test_divergence_is_summed_over_classes_and_averaged_over_rows(classes: int):
    p, q = (logits(seed, 4, classes).log_softmax(1) for seed in (0, 1))
    by_row = [torch.nn.functional.kl_div(q[i], p[i], log_target=True, reduction="sum") for i in range(4)]
    torch.testing.assert_close(kl_divergence(p, q), torch.stack(by_row).mean())


def test_two_classes_are_refused_in_one_line():
    spec = load_spec("dkd", {"alpha": 1, "beta": 8, "temperature": 4})
    with pytest.raises(ValueError, match=r"^dkd: needs at least 3 classes, but the data has 2; use kd$"):
        spec.build(Facts(num_classes=2))
