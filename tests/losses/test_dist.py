from __future__ import annotations

import pytest
import torch
from gloo_ranks import Ranks
from loss_cases import CLASSES, config_of
from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.losses._base import Facts
from pipeline.losses._registry import load_spec
from pipeline.losses.dist import dist_loss, inter_class, intra_class, softened

CONSTANTS = {"beta": 1.0, "gamma": 1.0, "temperature": 1.0}


def probabilities(seed: int, rows: int = 12) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, CLASSES, dtype=torch.float64, generator=g).softmax(1)


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_probabilities_mixed_with_even_ones_lose_nothing(share: float):
    """Correlation ignores a positive factor and a shift, of a row and of a column; ε leaves 1e-8 over the lengths."""
    teacher = probabilities(0)
    student = share * teacher + (1 - share) / CLASSES
    assert dist_loss(student.log(), teacher.log(), **CONSTANTS).item() == pytest.approx(0, abs=1e-5)


def test_opposite_probabilities_cost_two_in_each_direction():
    teacher = probabilities(0)
    student = 2 / CLASSES - teacher
    assert inter_class(student, teacher).item() == pytest.approx(2, abs=1e-5)
    assert intra_class(student, teacher).item() == pytest.approx(2, abs=1e-5)


def test_the_loss_is_scaled_by_the_square_of_the_temperature():
    student, teacher = probabilities(0).log(), probabilities(1).log()
    hot = dist_loss(4 * student, 4 * teacher, beta=1.0, gamma=1.0, temperature=4.0)
    torch.testing.assert_close(hot, 16 * dist_loss(student, teacher, **CONSTANTS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sure", ["student", "teacher", "both"])
def test_a_class_without_any_probability_is_uncorrelated_and_gets_no_gradient(dtype: torch.dtype, sure: str):
    certain = torch.full((4, CLASSES), -1e4, dtype=dtype)
    certain[:, 0] = 1e4
    other = probabilities(0, 4).log().to(dtype)
    student = (other if sure == "teacher" else certain).clone().requires_grad_()
    teacher = other if sure == "student" else certain
    loss = dist_loss(student, teacher, beta=0.0, gamma=1.0, temperature=1.0)
    loss.backward()
    assert loss.item() == 1
    assert student.grad is not None
    assert not student.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [5, 10, 20, 100])
def test_a_row_of_equal_logits_is_uncorrelated_and_gets_no_gradient(dtype: torch.dtype, classes: int):
    """Its mean may differ from it by rounding; published code divides what is left by 1e-8."""
    g = torch.Generator().manual_seed(0)
    for level in torch.randn(50, generator=g).mul(5).tolist():
        student, teacher = torch.randn(2, 3, classes, dtype=dtype, generator=g)
        student[1] = level
        student.requires_grad_()
        p, q = softened(student, teacher, 4.0)
        value = inter_class(p, q)
        value.backward()
        torch.testing.assert_close(value, (inter_class(p[:1], q[:1]) + 1 + inter_class(p[2:], q[2:])) / 3)
        assert student.grad is not None
        assert not student.grad[1].any()
        assert student.grad[[0, 2]].abs().amax() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [3, 7, 64])
def test_rows_that_are_all_the_same_have_no_columns_to_correlate(dtype: torch.dtype, rows: int):
    teacher = probabilities(0, rows).to(dtype)
    for seed in range(20):
        student = probabilities(seed, 1).to(dtype).expand(rows, -1).clone().requires_grad_()
        value = intra_class(student, teacher)
        value.backward()
        assert value.item() == 1
        assert student.grad is not None
        assert not student.grad.any()


def test_a_rare_class_is_correlated_however_small_its_probabilities_are():
    """A limit on how much a column varies that did not go by its size would take it for one of equal numbers."""
    p, q = 1e-7 * probabilities(0).float(), probabilities(1).float()
    p.requires_grad_()
    intra_class(p, q).backward()
    assert p.grad is not None
    assert (p.grad.abs().amax(0) > 0).all()


def test_one_row_has_no_columns_to_correlate():
    student = probabilities(0, 1).requires_grad_()
    loss = intra_class(student, probabilities(1, 1))
    loss.backward()
    assert loss.item() == 1
    assert student.grad is not None
    assert not student.grad.any()


def intra_of_a_rank(rank: int, world: int, counts: tuple[int, ...]) -> tuple[float, Tensor]:
    """Return the intra-class term and its gradient by this rank's rows."""
    drawn = probabilities(0, sum(counts)), probabilities(1, sum(counts))
    student, teacher = drawn if world == 1 else (x.split(counts)[rank] for x in drawn)
    own = student.clone().requires_grad_()
    value = intra_class(own, teacher)
    value.backward()
    assert own.grad is not None
    return value.item(), own.grad / world


@pytest.mark.parametrize("counts", [(5, 4, 3), (12, 0, 0), (0, 7, 5)], ids=str)
def test_ranks_of_any_size_correlate_the_columns_of_one_process(counts: tuple[int, ...], several_ranks: Ranks):
    counts = counts[: several_ranks.world]
    value, grad = intra_of_a_rank(0, 1, counts)
    values, grads = zip(*several_ranks(intra_of_a_rank, counts), strict=True)
    assert values == pytest.approx([value] * several_ranks.world, rel=1e-12)
    torch.testing.assert_close(torch.cat(grads), grad, rtol=1e-12, atol=1e-14)


def intra_part(stat_scope: str, student: Tensor, teacher: Tensor) -> Tensor:
    loss = load_spec("dist", {**config_of("dist"), "stat_scope": stat_scope, "temperature": 1.0}).build(Facts(CLASSES))
    labels = torch.zeros(len(student), dtype=torch.int64)
    return loss(Outputs(student.log(), {}), Outputs(teacher.log(), {}), Batch(labels, labels, labels, {}))["intra"]


def test_ghost_batches_are_consecutive_rows_correlated_apart():
    student, teacher = probabilities(0, 8), probabilities(1, 8)
    groups = [intra_class(student[rows], teacher[rows]) for rows in (slice(0, 3), slice(3, 6), slice(6, 8))]
    weighed = (3 * groups[0] + 3 * groups[1] + 2 * groups[2]) / 8
    torch.testing.assert_close(intra_part("ghost:3", student, teacher), weighed)
    torch.testing.assert_close(intra_part("rank", student, teacher), intra_class(student, teacher))
    torch.testing.assert_close(intra_part("global", student, teacher), intra_class(student, teacher))


def scopes_of_a_rank(rank: int, world: int) -> list[float]:
    student, teacher = probabilities(rank, 4), probabilities(rank + 2, 4)
    return [intra_part(scope, student, teacher).item() for scope in ("rank", "ghost:4", "global")]


def test_the_scope_rank_asks_no_other_rank(ranks: Ranks):
    apart = [intra_class(probabilities(rank, 4), probabilities(rank + 2, 4)).item() for rank in range(2)]
    student, teacher = (torch.cat([probabilities(seed, 4) for seed in seeds]) for seeds in ((0, 1), (2, 3)))
    together = intra_class(student, teacher).item()
    for own, found in zip(apart, ranks(scopes_of_a_rank), strict=True):
        assert found == pytest.approx([own, own, together], rel=1e-12)
