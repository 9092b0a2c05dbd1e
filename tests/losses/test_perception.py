from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from gloo_ranks import Ranks
from loss_cases import CLASSES, PROGRESS, config_of, example
from pydantic import ValidationError

from pipeline.batch import Batch, Outputs
from pipeline.losses._base import Facts, load_spec
from pipeline.losses.perception import perceive
from pipeline.parallel import gather_rows

ROWS = {"five and seven": (5, 7), "all and none": (12, 0)}


def collective_parts(rank: int, world: int, rows: tuple[int, int]) -> dict[str, Any]:
    """Return a rank's part of Σ KL on perception matrices, its gradient, and the number of collectives each way."""
    g = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(12, CLASSES, dtype=torch.float64, generator=g) for _ in range(2))
    mine = slice(None) if world == 1 else slice(rank * rows[0], rank * rows[0] + rows[rank])
    spec = load_spec("perception", {"eps": 1e-5, "inner": {"kd": {"temperature": 2.0}}})
    loss = spec.build(Facts(CLASSES))
    own = student[mine].clone().requires_grad_()
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
        seen, target = loss.changed(own, teacher[mine])  # type: ignore[operator]
        forward = all_reduce.call_count
        log_p, log_q = (x.log_softmax(1) for x in (target, seen))
        value = (log_p.exp() * (log_p - log_q)).sum()
        value.backward()
    return {
        "h": seen.detach(),
        "value": value.item(),
        "grad": own.grad,
        "collectives": (forward, all_reduce.call_count - forward),
        "teacher asks for gradient": target.requires_grad,
    }


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_two_ranks_of_unequal_size_see_the_matrix_of_one_with_one_collective_each_way(
    rows: tuple[int, int], ranks: Ranks
):
    one = collective_parts(0, 1, rows)
    both = ranks(collective_parts, rows)
    for key in ("h", "grad"):
        torch.testing.assert_close(torch.cat([answer[key] for answer in both]), one[key], rtol=1e-10, atol=1e-12)
    assert sum(answer["value"] for answer in both) == pytest.approx(one["value"], rel=1e-12)
    assert [answer["collectives"] for answer in both] == [(1, 1), (1, 1)]
    assert not any(answer["teacher asks for gradient"] for answer in both)


def perceived(stat_scope: str, x: torch.Tensor) -> torch.Tensor:
    loss = load_spec("perception", {**config_of("perception"), "stat_scope": stat_scope}).build(Facts(CLASSES))
    return loss.changed(x, x)[0]  # type: ignore[operator]


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


def gathered_mean(rank: int, world: int) -> tuple[float, float]:
    """Compare a rank's local mean with the loss over gathered rows; their mean over the ranks must agree."""
    g = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(8, CLASSES, dtype=torch.float64, generator=g) for _ in range(2))
    labels = torch.arange(8) % CLASSES
    loss = load_spec("perception", config_of("perception")).build(Facts(CLASSES))

    def of(rows: slice) -> float:
        batch = Batch(torch.empty(0), labels[rows], labels[rows], {})
        return loss.parts(Outputs(student[rows], {}), Outputs(teacher[rows], {}), batch, PROGRESS)["dkd"].item()

    local = of(slice(4 * rank, 4 * rank + 4))
    assert torch.equal(gather_rows(student[4 * rank : 4 * rank + 4]), student)
    return local, of(slice(None))


def test_the_mean_of_equal_ranks_is_the_loss_of_the_whole_batch(ranks: Ranks):
    (first, whole), (second, _) = ranks(gathered_mean)
    assert (first + second) / 2 == pytest.approx(whole, rel=1e-12)
