"""PKD: the correlation of the maps' channels, over all rows, a rank's or groups of them."""

from __future__ import annotations

import pytest
import torch
from gloo_ranks import Ranks
from loss_cases import config_of, example
from torch import Tensor, nn

from pipeline.losses._registry import load_spec
from pipeline.losses.pkd import pkd_loss, standardize_channels


def maps(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_it_is_one_minus_the_correlation_of_each_channel():
    student, teacher = maps(0, 4, 3, 5, 6), maps(1, 4, 3, 5, 6)
    columns = [torch.stack([x[:, c].flatten() for x in (student, teacher)]) for c in range(3)]
    correlations = torch.stack([torch.corrcoef(column)[0, 1] for column in columns])
    pixels = 4 * 5 * 6
    expected = (1 - correlations).mean().item() * (pixels - 1) / pixels  # the variance is unbiased
    assert pkd_loss(student, teacher).item() == pytest.approx(expected, rel=1e-5)  # ε is 1e-6


def test_a_channels_scale_and_mean_hardly_count():
    student, teacher = maps(0, 4, 3, 5, 6), maps(1, 4, 3, 5, 6)
    moved = pkd_loss(7 * student + 3, 0.5 * teacher - 2)
    assert moved.item() == pytest.approx(pkd_loss(student, teacher).item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("level", [0.0, 0.1, 1e4])
def test_a_channel_without_contrast_is_zero_and_gets_no_gradient(level: float, dtype: torch.dtype):
    x = maps(0, 4, 3, 5, 6).to(dtype)
    x[:, 1] = level
    x.requires_grad_()
    standard = standardize_channels(x)
    assert not standard[:, 1].any()
    (standard * maps(1, 4, 3, 5, 6).to(dtype)).sum().backward()
    assert x.grad is not None
    assert not x.grad[:, 1].any()
    assert x.grad[:, [0, 2]].abs().amax() > 0.1


def test_a_large_mean_costs_no_digits():
    x = maps(0, 4, 3, 5, 6).float()
    torch.testing.assert_close(standardize_channels(x + 64), standardize_channels(x), rtol=0, atol=1e-4)


def test_the_student_is_aligned_only_where_the_channels_differ():
    assert isinstance(example("pkd").loss.connectors[0], nn.Conv2d)  # type: ignore[index]
    same = {"last": (8, 4, 4)}
    assert isinstance(example("pkd", student=same, teacher=same).loss.connectors[0], nn.Identity)  # type: ignore[index]


@pytest.mark.parametrize(("scope", "sizes"), [("rank", [6]), ("ghost:2", [2, 2, 2]), ("ghost:4", [4, 2])])
def test_a_scope_of_fewer_rows_is_the_mean_of_the_groups(scope: str, sizes: list[int]):
    shapes = {"last": (8, 4, 6)}
    spec = load_spec("pkd", {**config_of("pkd"), "stat_scope": scope})
    case = example("pkd", spec, student=shapes, teacher=shapes)
    groups = zip(case.student.features["last"].split(sizes), case.teacher.features["last"].split(sizes), strict=True)
    expected = sum(len(s) * pkd_loss(s, t).item() for s, t in groups) / 6
    assert case.total().item() == pytest.approx(6.0 * expected, rel=1e-12)


def of_unequal_rows(rank: int, world: int) -> Tensor:
    """Return this rank's part of a batch of seven rows, standardised over all ranks."""
    own = maps(0, 7, 3, 2, 4).tensor_split(world)[rank]
    return standardize_channels(own)


def test_ranks_with_unequal_rows_standardise_over_all_rows(several_ranks: Ranks):
    torch.testing.assert_close(torch.cat(several_ranks(of_unequal_rows)), of_unequal_rows(0, 1), rtol=1e-12, atol=1e-12)


def rows_of_a_rank(rank: int, world: int, scope: str) -> float:
    spec = load_spec("pkd", {**config_of("pkd"), "stat_scope": scope})
    case = example("pkd", spec, rows=12)
    own = case.at(list(range(12 * rank // world, 12 * (rank + 1) // world)))
    return own.total().item()


def test_a_ranks_own_statistics_cover_its_rows_alone(ranks: Ranks):
    assert ranks(rows_of_a_rank, "rank") == [rows_of_a_rank(rank, 2, "rank") for rank in range(2)]
    assert ranks(rows_of_a_rank, "global")[0] != rows_of_a_rank(0, 2, "rank")
