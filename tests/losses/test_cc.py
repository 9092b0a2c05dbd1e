"""Correlation congruence: all pairs are the mean over the orders of neighbours, and the order of a global batch."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from gloo_ranks import Ranks
from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.losses._base import Facts
from pipeline.losses._registry import load_spec
from pipeline.losses.cc import CC, all_pairs, neighbours


def distances(rows: int) -> Tensor:
    return torch.rand(rows, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_all_pairs_are_the_mean_of_neighbours_over_all_orders():
    distance_BD = distances(5)
    found = [neighbours(distance_BD[list(order)]) for order in permutations(range(5))]
    assert all_pairs(distance_BD).item() == pytest.approx(torch.stack(found).mean().item(), rel=1e-12)


def test_nothing_is_lost_where_at_most_one_row_differs():
    distance_BD = torch.zeros(5, 4, dtype=torch.float64)
    assert all_pairs(distance_BD).item() == 0
    distance_BD[3] = distances(1)
    assert all_pairs(distance_BD).item() == pytest.approx(0, abs=1e-15)


def loss_of(pairs: str) -> CC:
    torch.manual_seed(0)
    loss = load_spec("cc", {"dim": 3, "pairs": pairs}).build(Facts(5, {"embedding": (5,)}, {"embedding": (7,)}))
    assert isinstance(loss, CC)
    return loss.double()


def of_a_rank(rank: int, world: int, pairs: str) -> tuple[Tensor, Tensor]:
    """Return the loss and the gradient of the rows that a rank has in training, every ``world``-th."""
    draw = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(12, width, dtype=torch.float64, generator=draw) for width in (5, 7))
    ids = torch.arange(rank, 12, world)
    own = student[ids].requires_grad_()
    seen = Outputs(own, {"embedding": own}), Outputs(teacher[ids], {"embedding": teacher[ids]})
    (value,) = loss_of(pairs)(*seen, Batch(ids, ids, ids, {})).values()
    value.backward()
    assert own.grad is not None
    return value.detach(), own.grad / world


@pytest.mark.parametrize("pairs", ["all", "neighbours"])
def test_ranks_pair_the_rows_of_the_global_batch(pairs: str, several_ranks: Ranks):
    (value, gradient), world = of_a_rank(0, 1, pairs), several_ranks.world
    for rank, (found, part) in enumerate(several_ranks(of_a_rank, pairs)):
        torch.testing.assert_close(found, value, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(part, gradient[rank::world], rtol=1e-12, atol=1e-12)


def test_one_row_and_a_map_are_refused_in_one_line():
    row = torch.zeros(1, dtype=torch.int64)
    seen = (Outputs(torch.zeros(1, width), {"embedding": torch.zeros(1, width)}) for width in (5, 7))
    with pytest.raises(ValueError, match=r"^cc: a batch of one row has no pairs; raise batch$"):
        loss_of("all")(*seen, Batch(row, row, row, {}))
    spec = load_spec("cc", {"dim": 3, "pairs": "all", "stage": "last"})
    with pytest.raises(ValueError, match=r"^cc: the tap 'last' is shaped \[4, 2, 2\], but a vector such as embedding"):
        spec.build(Facts(5, {"last": (4, 2, 2)}, {"last": (8, 2, 2)}))
