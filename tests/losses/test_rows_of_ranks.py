"""Which rows a loss of relations compares: those of all ranks, of one, or of groups, and what ranks send each other."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from gloo_ranks import Ranks
from loss_cases import CLASSES, PROGRESS, STUDENT_SHAPES, TEACHER_SHAPES, Example, config_of, example
from sent_bytes import Call, Collectives, forward_and_backward
from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.losses import _rows
from pipeline.losses._base import Facts
from pipeline.losses._registry import load_spec

ROWS = 12

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
    with Collectives() as sent:
        value, gradient = value_and_gradient(own)
    return value, gradient, len(sent.calls)


@pytest.mark.parametrize("stat_scope", ["rank", "ghost:2"])
@of_relations
def test_a_rank_compares_its_own_rows_and_asks_no_other(name: str, stat_scope: str, several_ranks: Ranks):
    world = several_ranks.world
    same = f"ghost:{ROWS // world}" if stat_scope == "rank" else stat_scope
    value, gradient = value_and_gradient(scoped(name, same))
    values, gradients, collectives = zip(*several_ranks(of_a_rank, name, stat_scope), strict=True)
    assert sum(values) / world == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(torch.cat(gradients) / world, gradient)
    assert set(collectives) == {0}


@of_relations
def test_by_default_the_rows_of_all_ranks_are_compared(name: str, ranks: Ranks):
    value, _ = value_and_gradient(scoped(name, "global"))
    values, _, collectives = zip(*ranks(of_a_rank, name, "global"), strict=True)
    assert values == pytest.approx([value, value], rel=1e-12)
    # Labels with ids, the student's outputs and the teacher's; and what the student's ask back.
    assert collectives == (4, 4)


def targets_of_groups(rank: int, world: int, stat_scope: str) -> list[tuple[Tensor, Tensor]]:
    """Return the ids and a target of each group of rows that a loss compares; a row's target is its id, thrice."""
    case = scoped("sp", stat_scope)
    own = case.at(list(range(rank * ROWS // world, (rank + 1) * ROWS // world)))
    batch = own.batch._replace(targets={"triple_B3": own.batch.ids_B[:, None].expand(-1, 3)})
    groups = own.loss.row_groups(own.student, own.teacher, batch)  # type: ignore[operator]
    return [(of_group.ids_B, of_group.targets["triple_B3"]) for _, _, of_group in groups]


@pytest.mark.parametrize(("stat_scope", "rows"), [("global", 12), ("rank", 6), ("ghost:2", 2)])
def test_a_task_s_targets_go_with_their_rows(stat_scope: str, rows: int, ranks: Ranks):
    for groups in ranks(targets_of_groups, stat_scope):
        for ids_B, targets_B3 in groups:
            assert targets_B3.tolist() == [[number] * 3 for number in ids_B.tolist()]
            assert len(ids_B) == rows


def perception_of_a_thousand_classes(rank: int, world: int) -> tuple[list[Call], list[Call]]:
    """Return the collectives of perception-DKD in float64, forward and backward."""
    loss = load_spec("perception", config_of("perception")).build(Facts(1000))
    student, teacher = torch.randn(2, 4, 1000, dtype=torch.float64)
    labels = torch.arange(4)
    answers = Outputs(student.requires_grad_(), {}), Outputs(teacher, {})
    return forward_and_backward(lambda: loss.parts(*answers, Batch(labels, labels, labels, {}), PROGRESS)["dkd"])


def test_perception_sends_two_small_messages_and_nothing_back_for_the_teacher(several_ranks: Ranks):
    for forward, backward in several_ranks(perception_of_a_thousand_classes):
        # The count of rows, and two sums a class: of both networks, and then of the student's gradient.
        assert forward == [("allreduce", 8 * (1 + 4 * 1000))]
        assert backward == [("allreduce", 8 * (2 * 1000))]
        assert sum(call.bytes for call in forward + backward) == 48_008


def sent_by(rank: int, world: int, name: str) -> dict[str, Any]:
    """Return the collectives of two steps of a loss in float64, forward, backward and after the update."""
    case = example(name, rows=ROWS).at(list(range(ROWS // world)))
    found = []
    for _ in range(2):
        forward, backward = forward_and_backward(case.total)
        with Collectives() as commit:
            case.loss.commit()
        found.append((forward, backward, commit.calls))
    return {"steps": found, "embedding": case.loss.config.dim if name == "crd" else None}


def test_correlations_of_columns_take_two_sums_each_way(ranks: Ranks):
    sums = [8 * (1 + 2 * CLASSES), 8 * 3 * CLASSES]
    forward = [("allreduce", size) for size in sums]
    for answer in ranks(sent_by, "dist"):
        assert answer["steps"] == [(forward, forward[::-1], [])] * 2


def test_similarities_are_taken_of_gathered_rows_and_ask_back_for_the_student_alone(ranks: Ranks):
    rows = ROWS // ranks.world
    widths = [CLASSES + torch.Size(shapes["last"]).numel() for shapes in (STUDENT_SHAPES, TEACHER_SHAPES)]
    forward = [("allgather_base", 8 * rows * width) for width in (2, *widths)]
    backward = [("reduce_scatter_base", 8 * ROWS * widths[0])]
    for answer in ranks(sent_by, "sp"):
        assert answer["steps"] == [(forward, backward, [])] * 2


def test_a_contrast_sends_what_enters_the_banks_and_sums_its_normalisers_once(ranks: Ranks):
    rows = ROWS // ranks.world
    for answer in ranks(sent_by, "crd"):
        commit = [("allgather_base", 8 * rows), ("allgather_base", 8 * rows * 2 * answer["embedding"])]
        assert answer["steps"] == [([("allreduce", 16)], [], commit), ([], [], commit)]


@of_relations
def test_a_group_counts_by_its_rows(name: str):
    case = scoped(name, "ghost:4", rows=6)
    first, last = (value_and_gradient(case.at(rows))[0] for rows in ([0, 1, 2, 3], [4, 5]))
    assert abs(first - last) > 0.1 * abs(first)
    assert case.total().item() == pytest.approx((4 * first + 2 * last) / 6, rel=1e-12)


def gathered_widths(rank: int, world: int, name: str) -> list[int]:
    """Return how many numbers of a row each collective carried."""
    case = scoped(name, "global")
    with mock.patch.object(_rows, "gather_rows", wraps=_rows.gather_rows) as gather:
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
