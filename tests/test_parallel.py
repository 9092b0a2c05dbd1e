from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from gloo_ranks import Ranks
from torch import Tensor, nn

from pipeline import parallel

SPLITS = {"even": [0, 6, 12], "uneven": [0, 5, 12], "with an empty rank": [0, 0, 12]}
EPS = 1e-5


def rows(seed: int, *shape: int) -> Tensor:
    return torch.randn(12, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def own(x: Tensor, rank: int, world: int, split: list[int]) -> Tensor:
    return x if world == 1 else x[split[rank] : split[rank + 1]]


def standardized(rank: int, world: int, split: list[int], offset: float) -> dict[str, Any]:
    """Return a rank's rows of the result and of the gradient of Σ g·h², and the number of collectives each way."""
    x = own(rows(0, 7) + offset, rank, world, split).requires_grad_()
    g = own(rows(1, 7), rank, world, split)
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
        h = parallel.standardize(x, EPS)
        forward = all_reduce.call_count
        (g * h**2).sum().backward()
    return {"h": h.detach(), "grad": x.grad, "collectives": (forward, all_reduce.call_count - forward)}


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_statistics_over_two_ranks_are_those_of_one_process(split: list[int], offset: float, ranks: Ranks):
    one = standardized(0, 1, split, offset)
    both = ranks(standardized, split, offset)
    for key in ("h", "grad"):
        found = torch.cat([answer[key] for answer in both])
        torch.testing.assert_close(found, one[key], rtol=1e-9, atol=1e-9)
    assert [answer["collectives"] for answer in both] == [(1, 1), (1, 1)]
    assert one["collectives"] == (0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_standardize_is_batch_norm_without_affine_parameters(dtype: torch.dtype, offset: float):
    x = (rows(0, 7) + offset).to(dtype)
    # The reference sees in double what rounding to the dtype left.
    reference, ours = x.double().clone().requires_grad_(), x.clone().requires_grad_()
    expected = nn.BatchNorm1d(7, eps=EPS, affine=False, track_running_stats=False, dtype=torch.float64)(reference)
    h = parallel.standardize(ours, EPS)
    assert h.dtype == dtype
    (rows(1, 7) * expected**2).sum().backward()
    (rows(1, 7).to(dtype) * h**2).sum().backward()
    assert reference.grad is not None
    assert ours.grad is not None
    tolerance = 1e-9 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(h.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ours.grad.double(), reference.grad, rtol=tolerance, atol=tolerance)


def test_the_gradient_of_standardize_is_exact():
    x = rows(0, 4)[:5].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: parallel.standardize(x, EPS), [x])
    assert torch.autograd.gradcheck(lambda x: parallel.standardize(x, 1.0, across_ranks=False), [x])


def test_one_row_and_a_constant_column_give_zeros():
    one = rows(0, 3)[:1].clone().requires_grad_()
    constant = torch.full((4, 2), 1e3, dtype=torch.float32, requires_grad=True)
    for x in (one, constant):
        h = parallel.standardize(x, EPS)
        h.sum().backward()
        assert h.abs().max() < 1e-3
        assert x.grad is not None
        assert x.grad.abs().max() < 1e-9


def normalised(rank: int, world: int, split: list[int]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    norm = parallel.BatchNorm(3).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = own(rows(0, 3, 2, 2), rank, world, split).requires_grad_()
    y = norm(x)
    (own(rows(1, 3, 2, 2), rank, world, split) * y**2).sum().backward()
    return {"y": y.detach(), "x": x.grad, "weight": norm.weight.grad, "bias": norm.bias.grad}  # type: ignore[dict-item]


def test_batch_norm_over_two_ranks_is_torchs_over_all_rows(ranks: Ranks):
    torch.manual_seed(0)
    theirs = nn.BatchNorm2d(3, track_running_stats=False, dtype=torch.float64)
    nn.init.normal_(theirs.weight)
    nn.init.normal_(theirs.bias)
    x = rows(0, 3, 2, 2).requires_grad_()
    y = theirs(x)
    (rows(1, 3, 2, 2) * y**2).sum().backward()
    first, second = ranks(normalised, SPLITS["uneven"])
    torch.testing.assert_close(torch.cat([first["y"], second["y"]]), y.detach())
    torch.testing.assert_close(torch.cat([first["x"], second["x"]]), x.grad)
    torch.testing.assert_close(first["weight"] + second["weight"], theirs.weight.grad)
    torch.testing.assert_close(first["bias"] + second["bias"], theirs.bias.grad)


def sum_and_gather(rank: int, world: int) -> dict[str, Tensor]:
    """Differentiate rank + 1 times a function of all rows; over two ranks that is three times the function."""
    factor = rank + 1 if world == 2 else 3
    summed = own(rows(0, 3), rank, world, SPLITS["even"]).requires_grad_()
    gathered = summed.detach().clone().requires_grad_()
    total = parallel.global_sum(summed.sum(0))
    all_rows = parallel.gather_rows(gathered)
    (factor * total.square().sum()).backward()
    (factor * (all_rows @ all_rows.T).square().sum()).backward()
    return {"total": total.detach(), "rows": all_rows.detach(), "by sum": summed.grad, "by gather": gathered.grad}  # type: ignore[dict-item]


def test_sums_and_gathered_rows_are_differentiated_over_all_ranks(ranks: Ranks):
    one = sum_and_gather(0, 1)
    first, second = ranks(sum_and_gather)
    for key in ("total", "rows"):
        torch.testing.assert_close(first[key], one[key])
        torch.testing.assert_close(second[key], one[key])
    for key in ("by sum", "by gather"):
        torch.testing.assert_close(torch.cat([first[key], second[key]]), one[key])


def agreed(rank: int, world: int) -> dict[str, Any]:
    mine = torch.tensor([rank, 10 - rank])
    module = nn.BatchNorm1d(2)
    module.running_mean.fill_(float(rank))  # type: ignore[union-attr]
    with parallel.averaged_buffers(module):
        inside = module.running_mean.clone()  # type: ignore[union-attr]
    return {
        "who": (parallel.rank(), parallel.world_size(), parallel.is_main()),
        "sum": parallel.all_reduce_sum(mine).tolist(),
        "mean": parallel.all_reduce_mean(mine.double()).tolist(),
        "min": parallel.all_reduce_min(mine).tolist(),
        "untouched": mine.tolist(),
        "any": (parallel.any_rank(rank == 1), parallel.any_rank(False)),
        "buffers": (inside.tolist(), module.running_mean.tolist()),  # type: ignore[union-attr]
    }


def test_ranks_agree_on_sums_means_minima_and_flags(ranks: Ranks):
    common = {"sum": [1, 19], "mean": [0.5, 9.5], "min": [0, 9], "any": (True, False)}
    first, second = ranks(agreed)
    assert first == {**common, "who": (0, 2, True), "untouched": [0, 10], "buffers": ([0.5, 0.5], [0.0, 0.0])}
    assert second == {**common, "who": (1, 2, False), "untouched": [1, 9], "buffers": ([0.5, 0.5], [1.0, 1.0])}


def test_a_single_process_answers_for_itself():
    answer = agreed(0, 1)
    assert answer["who"] == (0, 1, True)
    assert answer["sum"] == answer["mean"] == answer["min"] == [0, 10]
    assert answer["any"] == (False, False)
    assert answer["buffers"] == ([0.0, 0.0], [0.0, 0.0])
