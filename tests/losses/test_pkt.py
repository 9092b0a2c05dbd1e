from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.losses.pkt import neighbourhoods, pkt_loss

EPS = 1e-7


def embeddings(seed: int, rows: int = 6, width: int = 4) -> Tensor:
    return torch.randn(rows, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_every_row_is_a_distribution():
    p = neighbourhoods(embeddings(0), EPS)
    assert (p >= 0).all()
    torch.testing.assert_close(p.sum(1), torch.ones(6, dtype=torch.float64))


def test_the_loss_is_zero_at_the_teacher():
    assert pkt_loss(embeddings(0), embeddings(0), eps=EPS).item() == 0


def test_a_networks_scale_is_ignored_but_for_epsilon():
    expected = pkt_loss(embeddings(0), embeddings(1), eps=EPS).item()
    assert pkt_loss(100 * embeddings(0), 0.1 * embeddings(1), eps=EPS).item() == pytest.approx(expected, rel=1e-4)


def test_a_row_of_zeros_gets_no_gradient():
    """Published code takes the root of a sum of squares there, whose gradient is 0/0, and divides by ε beside it."""
    student = embeddings(0)
    student[2] = 0
    student.requires_grad_()
    loss = pkt_loss(student, embeddings(1), eps=EPS)
    loss.backward()
    assert loss.isfinite()
    assert student.grad is not None
    assert not student.grad[2].any()
    assert student.grad[3].abs().amax() > 0


def test_opposite_rows_in_float32_stay_finite():
    """Rounding takes their cosine below −1."""
    for seed in range(20):
        row = embeddings(seed, 1, 7).float()
        student = torch.cat([row, -row, 3 * row]).requires_grad_()
        loss = pkt_loss(student, embeddings(0, 3).float(), eps=EPS)
        loss.backward()
        assert loss.isfinite()
        assert student.grad is not None
        assert student.grad.isfinite().all()


def test_twice_the_rows_halve_the_value():
    """Rows of p sum to one and the mean is over B² pairs: a weight belongs to a batch size."""
    student, teacher = embeddings(0), embeddings(1)
    twice = pkt_loss(student.repeat(2, 1), teacher.repeat(2, 1), eps=EPS)
    assert twice.item() == pytest.approx(pkt_loss(student, teacher, eps=EPS).item() / 2, rel=1e-4)
