from __future__ import annotations

from typing import Any

import pytest
import torch
from gloo_ranks import Ranks
from loss_cases import CLASSES, PROGRESS, config_of, example
from pydantic import ValidationError

from pipeline.losses._base import Facts
from pipeline.losses._registry import load_spec
from pipeline.losses.perception import perceive

KL_ON_MATRICES = {"eps": 1e-5, "inner": {"kd": {"temperature": 2.0}}}


def parts_of_a_rank(rank: int, world: int, counts: tuple[int, ...]) -> dict[str, Any]:
    """Return a rank's part of Σ KL on perception matrices, and its gradient."""
    g = torch.Generator().manual_seed(0)
    both = torch.randn(2, sum(counts), CLASSES, dtype=torch.float64, generator=g)
    student, teacher = both if world == 1 else both.split(counts, 1)[rank]
    loss = load_spec("perception", KL_ON_MATRICES).build(Facts(CLASSES))
    own = student.clone().requires_grad_()
    seen, target = loss.transform(own, teacher)  # type: ignore[operator]
    log_p, log_q = (x.log_softmax(1) for x in (target, seen))
    value = (log_p.exp() * (log_p - log_q)).sum()
    value.backward()
    return {"h": seen.detach(), "value": value.item(), "grad": own.grad, "of the teacher": target.requires_grad}


@pytest.mark.parametrize("counts", [(5, 4, 3), (12, 0, 0), (0, 7, 5)], ids=str)
def test_ranks_of_any_size_see_the_matrix_of_one_process(counts: tuple[int, ...], several_ranks: Ranks):
    counts = counts[: several_ranks.world]
    one = parts_of_a_rank(0, 1, counts)
    answers = several_ranks(parts_of_a_rank, counts)
    for key in ("h", "grad"):
        torch.testing.assert_close(torch.cat([answer[key] for answer in answers]), one[key], rtol=1e-12, atol=1e-12)
    assert sum(answer["value"] for answer in answers) == pytest.approx(one["value"], rel=1e-12)
    assert not any(answer["of the teacher"] for answer in answers)


def perceived(stat_scope: str, x: torch.Tensor) -> torch.Tensor:
    loss = load_spec("perception", {**config_of("perception"), "stat_scope": stat_scope}).build(Facts(CLASSES))
    return loss.transform(x, x)[0]  # type: ignore[operator]


def test_ghost_batches_are_consecutive_rows_standardised_apart():
    x = torch.randn(8, CLASSES, dtype=torch.float64)
    expected = torch.cat([perceive(x[:3]), perceive(x[3:6]), perceive(x[6:])])
    torch.testing.assert_close(perceived("ghost:3", x), expected)
    torch.testing.assert_close(perceived("ghost:8", x), perceive(x))
    torch.testing.assert_close(perceived("rank", x), perceive(x))
    assert not torch.allclose(perceived("ghost:4", x), perceive(x))


def of_a_rank(rank: int, world: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(4, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    return x, torch.stack([perceived("rank", x), perceived("global", x)])


def test_the_scope_rank_asks_no_other_rank(ranks: Ranks):
    (x, seen), (other, _) = ranks(of_a_rank)
    torch.testing.assert_close(seen[0], perceive(x))
    torch.testing.assert_close(seen[1], perceive(torch.cat([x, other]))[:4])


@pytest.mark.parametrize("scope", ["ghost", "ghost:1", "ghost:0", "ghost:x", "ghost:-3", "local", "rank:4"])
def test_a_scope_that_means_nothing_is_refused(scope: str):
    with pytest.raises(ValidationError, match="expected global, rank or ghost:N"):
        load_spec("perception", {**config_of("perception"), "stat_scope": scope})


def test_the_inner_loss_keeps_its_weight_and_ramp():
    case = example("perception")
    doubled = {**config_of("perception"), "weight": 2.0}
    doubled["inner"] = {"dkd": {**doubled["inner"]["dkd"], "weight": 3.0, "ramp": {"linear_epochs": 86}}}
    heavy = load_spec("perception", doubled).build(case.loss.facts)
    ramped = PROGRESS.epoch + 1
    expected = case.parts()["dkd"] * 6.0 * ramped / 86
    torch.testing.assert_close(heavy.parts(case.student, case.teacher, case.batch, PROGRESS)["dkd"], expected)


def test_the_logits_of_the_task_stay_as_they_are():
    case = example("perception")
    before = case.student.logits_BK.detach().clone()
    case.total()
    assert torch.equal(case.student.logits_BK, before)
