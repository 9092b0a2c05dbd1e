"""Partners of one class, and what goes from one to the other."""

from __future__ import annotations

import math

import pytest
import torch
from gloo_ranks import Ranks
from hypothesis import given
from hypothesis import strategies as st
from loss_cases import example
from oracles.cs_kd import partner
from oracles.kd import divergence, softmax
from test_spherical_kd import quick
from torch import Tensor

from pipeline.batch import Batch, Outputs, Progress
from pipeline.losses._base import Facts
from pipeline.losses._registry import load_spec
from pipeline.losses.cs_kd import cs_kd_rows, find_partners


@quick
@given(labels=st.lists(st.integers(0, 3), min_size=1, max_size=12), order=st.randoms(use_true_random=False))
def test_a_partner_is_the_next_of_the_class_by_id(labels: list[int], order) -> None:
    ids = list(range(len(labels)))
    order.shuffle(ids)
    partner_B, paired_B = find_partners(torch.tensor(labels), torch.tensor(ids))
    assert partner_B.tolist() == [partner(row, labels, ids) for row in range(len(labels))]
    assert paired_B.tolist() == [labels.count(label) > 1 for label in labels]


def test_an_image_that_comes_twice_is_its_own_partner_in_the_other_row():
    partner_B, paired_B = find_partners(torch.tensor([1, 0, 1]), torch.tensor([7, 8, 7]))
    assert (partner_B.tolist(), paired_B.tolist()) == ([2, 1, 0], [True, False, True])


def test_a_batch_without_partners_costs_nothing_and_has_a_finite_gradient():
    case = example("cs_kd", rows=3)  # three classes
    case.total().backward()
    assert case.total().item() == 0
    assert case.student.logits.grad is not None
    assert case.student.logits.grad.abs().amax() == 0


def test_a_row_s_gradient_comes_from_its_own_term_alone():
    case = example("cs_kd", rows=6)  # rows 0 and 5 are of one class
    case.total().backward()
    logits = case.student.logits.detach()
    own = logits[:1].clone().requires_grad_()
    (cs_kd_rows(own, logits[5:], temperature=4.0).sum() / 2).backward()
    assert case.student.logits.grad is not None
    torch.testing.assert_close(case.student.logits.grad[:1], own.grad)
    assert case.student.logits.grad[1:5].abs().amax() == 0


def test_the_rows_formula_has_an_exact_gradient():
    own, others = torch.randn(2, 3, 4, dtype=torch.float64)
    own.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: cs_kd_rows(x, others, temperature=2.0).sum(), [own])


@pytest.mark.parametrize(("classes", "batch", "published"), [(100, 64, 0.47), (100, 256, 0.92), (1000, 256, 0.23)])
def test_a_shuffled_batch_has_so_many_partners(classes: int, batch: int, published: float):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (200, batch), generator=generator)
    shares = [find_partners(row, torch.arange(batch))[1].double().mean().item() for row in labels]
    expected = 1 - (1 - 1 / classes) ** (batch - 1)
    assert sum(shares) / len(shares) == pytest.approx(expected, abs=0.02)
    assert expected == pytest.approx(published, abs=0.005)


def of_a_rank(rank: int, world: int) -> tuple[dict[str, Tensor], Tensor]:
    """Return the parts of ``half`` and the gradient of the rows that a rank has in training, every ``world``-th."""
    loss = load_spec("cs_kd", {"temperature": 4.0, "half": True, "kd_weight": 3.0}).build(Facts(5))
    logits_BK = torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(rank, 12, world)
    own = logits_BK[ids].requires_grad_()
    batch = Batch(ids, torch.tensor(LABELS)[ids], ids, {})
    parts = loss.parts(Outputs(own, {}), Outputs(own, {}), batch, Progress(1))
    torch.stack(list(parts.values())).sum().backward()
    assert own.grad is not None
    return {name: part.detach() for name, part in parts.items()}, own.grad / world


LABELS = [0, 0, 3, 3, 0, 0, 1, 1, 2, 2, 4, 4]
"""Those of six pairs, of which two are of one class."""


def test_of_a_pair_the_first_learns_from_its_label_and_the_second_which_gets_no_gradient():
    parts, gradient = of_a_rank(0, 1)
    rows = torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).tolist()
    ce = -sum(math.log(softmax(rows[i])[LABELS[i]]) for i in range(0, 12, 2)) / 6
    soft = [softmax([z / 4 for z in row]) for row in rows]
    kl = 16 * sum(divergence(soft[i + 1], soft[i]) for i in range(0, 12, 2)) / 6
    assert (parts["ce"].item(), parts["cs_kd"].item()) == pytest.approx((ce, 3 * kl), rel=1e-12)
    assert gradient[1::2].abs().amax() == 0
    assert (gradient[::2].abs().amax(1) > 0).all()


def test_a_pair_may_lie_on_two_ranks(several_ranks: Ranks):
    (parts, gradient), world = of_a_rank(0, 1), several_ranks.world
    for rank, (found, part) in enumerate(several_ranks(of_a_rank)):
        torch.testing.assert_close(found, parts, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(part, gradient[rank::world], rtol=1e-12, atol=1e-12)
