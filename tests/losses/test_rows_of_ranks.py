"""Which rows a loss of relations compares: those of all ranks, of one, or of groups, and what ranks send each other."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from gloo_ranks import WORLD, Ranks
from loss_cases import CLASSES, STUDENT_SHAPES, TEACHER_SHAPES, Example, config_of, example
from torch import Tensor

from pipeline.losses import _base
from pipeline.losses._base import load_spec

COLLECTIVES = ("all_gather", "all_reduce")
ROWS = 8

of_relations = pytest.mark.parametrize("name", ["sp", "rkd"])


def scoped(name: str, stat_scope: str, rows: int = ROWS) -> Example:
    return example(name, load_spec(name, {**config_of(name), "stat_scope": stat_scope}), rows=rows)


def value_and_gradient(case: Example) -> tuple[float, Tensor]:
    """Return the loss, and its gradient by the features [B, …]."""
    total = case.total()
    total.backward()
    (feature,) = case.student.features.values()
    assert feature.grad is not None
    return total.item(), feature.grad


def of_a_rank(rank: int, world: int, name: str, stat_scope: str) -> tuple[float, Tensor, int]:
    """Return the loss of this rank's rows, its gradient, and how many collectives both took."""
    size = ROWS // world
    own = scoped(name, stat_scope).at(list(range(rank * size, (rank + 1) * size)))
    wrapped = {key: mock.Mock(wraps=getattr(dist, key)) for key in COLLECTIVES}
    with mock.patch.multiple(dist, **wrapped):
        value, gradient = value_and_gradient(own)
    return value, gradient, sum(call.call_count for call in wrapped.values())


@pytest.mark.parametrize(("stat_scope", "same"), [("rank", f"ghost:{ROWS // WORLD}"), ("ghost:2", "ghost:2")])
@of_relations
def test_a_rank_compares_its_own_rows_and_asks_no_other(name: str, stat_scope: str, same: str, ranks: Ranks):
    value, gradient = value_and_gradient(scoped(name, same))
    values, gradients, collectives = zip(*ranks(of_a_rank, name, stat_scope), strict=True)
    assert sum(values) / WORLD == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(torch.cat(gradients) / WORLD, gradient)
    assert collectives == (0, 0)


@of_relations
def test_by_default_the_rows_of_all_ranks_are_compared(name: str, ranks: Ranks):
    value, _ = value_and_gradient(scoped(name, "global"))
    values, _, collectives = zip(*ranks(of_a_rank, name, "global"), strict=True)
    assert values == pytest.approx([value, value], rel=1e-12)
    assert min(collectives) > 0


@of_relations
def test_a_group_counts_by_its_rows(name: str):
    case = scoped(name, "ghost:4", rows=6)
    first, last = (value_and_gradient(case.at(rows))[0] for rows in ([0, 1, 2, 3], [4, 5]))
    assert abs(first - last) > 0.1 * abs(first)
    assert case.total().item() == pytest.approx((4 * first + 2 * last) / 6, rel=1e-12)


def gathered_widths(rank: int, world: int, name: str) -> list[int]:
    """Return how many numbers of a row each collective carried."""
    case = scoped(name, "global")
    with mock.patch.object(_base, "gather_rows", wraps=_base.gather_rows) as gather:
        case.total()
    return sorted(call.args[0].shape[1] for call in gather.call_args_list)


def test_graphs_of_instances_send_averaged_maps(ranks: Ranks):
    channels = [
        sum(shape[0] for name, shape in shapes.items() if name.startswith("stage"))
        for shapes in (STUDENT_SHAPES, TEACHER_SHAPES)
    ]
    labels_and_ids = 2
    widths = [labels_and_ids, *(CLASSES + count for count in channels)]
    assert ranks(gathered_widths, "irg") == [widths, widths]
