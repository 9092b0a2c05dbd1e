from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from gloo_ranks import Ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from sent_bytes import Collectives, forward_and_backward
from torch import Tensor, nn

from pipeline.distributed import collectives
from pipeline.distributed.norms import BatchNorm
from pipeline.losses.perception import perceive

EPS = 1e-5
Answer = dict[str, Any]

quick = settings(max_examples=15, derandomize=True, deadline=None)


class Rows(NamedTuple):
    """Random rows, and how many of them each rank has."""

    counts: tuple[int, ...]
    columns: int = 3
    seed: int = 0
    offset: float = 0.0
    dtype: torch.dtype = torch.float64

    def drawn(self, rank: int, world: int, *shape: int, seed: int = 0) -> Tensor:
        """Return a rank's rows, or all of them for one process, without gradient."""
        generator = torch.Generator().manual_seed(100 * self.seed + seed)
        x = torch.randn(sum(self.counts), self.columns, *shape, dtype=torch.float64, generator=generator)
        # In turn above and below: the rows of no column are equal but for rounding, which would be all there is to see.
        x[1::2] += 3
        x = (x + self.offset).to(self.dtype)
        return x if world == 1 else x.split(self.counts)[rank].clone()

    def among(self, world: int) -> Rows:
        return self._replace(counts=self.counts[:world])


# For as many ranks as a test has; a rank, or all but one, may be without rows.
COUNTS = st.tuples(*[st.integers(0, 5)] * 3).filter(lambda counts: counts[0] + counts[1] > 0)


def rows_up_to(offset: float, dtype: torch.dtype) -> st.SearchStrategy[Rows]:
    columns, seeds, offsets = st.integers(1, 6), st.integers(0, 1000), st.floats(-offset, offset)
    return st.builds(Rows, COUNTS, columns, seeds, offsets, st.just(dtype))


ROWS = rows_up_to(3, torch.float64)
HIGH_SINGLE_ROWS = rows_up_to(300, torch.float32)


def assert_ranks_equal_one(answers: list[Answer], one: Answer, *, tolerance: float = 1e-12) -> None:
    """Compare: of ``rows …`` each rank has its own, of ``sum …`` its addend, and of anything else the whole."""
    for key, expected in one.items():
        found = [answer[key] for answer in answers]
        if key.startswith("rows "):
            found = [torch.cat(found)]
        elif key.startswith("sum "):
            found = [torch.stack(found).sum(0)]
        for value in found:
            assert value.shape == expected.shape, key
            torch.testing.assert_close(
                value.double(), expected, rtol=tolerance, atol=tolerance, msg=lambda text, key=key: f"{key}: {text}"
            )


def factor(rank: int, world: int, ranks: int) -> int:
    """Return what a rank multiplies its loss by, so that ranks differ; for one process the sum of the ranks'."""
    return rank + 1 if world > 1 else ranks * (ranks + 1) // 2


def summed(rank: int, world: int, rows: Rows) -> Answer:
    x = rows.drawn(rank, world).requires_grad_()
    total = collectives.global_sum(x.sum(0))
    (factor(rank, world, len(rows.counts)) * total.square().sum()).backward()
    return {"total": total.detach(), "rows grad": x.grad}


@quick
@given(rows=ROWS)
def test_a_global_sum_is_that_of_one_process_and_so_is_its_gradient(several_ranks: Ranks, rows: Rows):
    rows = rows.among(several_ranks.world)
    assert_ranks_equal_one(several_ranks(summed, rows), summed(0, 1, rows))


def related(rank: int, world: int, rows: Rows, equal: bool) -> Answer:
    """Gather the rows, of more than one dimension, and differentiate what all of them have to do with one another."""
    x = rows.drawn(rank, world, 2).requires_grad_()
    gathered = collectives.gather_rows(x, equal=equal)
    flat = gathered.flatten(1)
    (factor(rank, world, len(rows.counts)) * (flat @ flat.T).square().sum()).backward()
    return {"all": gathered.detach(), "rows grad": x.grad}


@quick
@given(rows=ROWS)
def test_gathered_rows_are_those_of_one_process_and_so_is_their_gradient(several_ranks: Ranks, rows: Rows):
    rows = rows.among(several_ranks.world)
    assert_ranks_equal_one(several_ranks(related, rows, False), related(0, 1, rows, False))


@quick
@given(each=st.integers(1, 4), rows=ROWS)
def test_equally_many_rows_are_gathered_without_asking_how_many(several_ranks: Ranks, each: int, rows: Rows):
    rows = rows._replace(counts=(each,) * several_ranks.world)
    assert_ranks_equal_one(several_ranks(related, rows, True), related(0, 1, rows, True))


def gathered_without_rows(rank: int, world: int) -> Answer:
    x = torch.empty(0, 3, requires_grad=True)
    collectives.gather_rows(x).sum().backward()
    ids = torch.full((rank, 1), rank)
    return {"all": x.grad, "ids": collectives.gather_rows(ids).flatten().tolist()}


def test_there_may_be_no_rows_at_all_and_rows_of_integers(several_ranks: Ranks):
    for answer in several_ranks(gathered_without_rows):
        assert answer["all"].shape == (0, 3)
        assert answer["ids"] == [rank for rank in range(several_ranks.world) for _ in range(rank)]


def perceived(rank: int, world: int, rows: Rows) -> Answer:
    """Differentiate Σ g·h² of the perception matrix h."""
    x = rows.drawn(rank, world).requires_grad_()
    h = perceive(x, eps=EPS)
    assert h.dtype == x.dtype
    (rows._replace(offset=0.0).drawn(rank, world, seed=1) * h**2).sum().backward()
    return {"rows h": h.detach(), "rows grad": x.grad}


@quick
@given(rows=ROWS)
def test_statistics_are_those_of_one_process_and_so_is_the_gradient_through_them(several_ranks: Ranks, rows: Rows):
    rows = rows.among(several_ranks.world)
    assert_ranks_equal_one(several_ranks(perceived, rows), perceived(0, 1, rows))


def batch_normalised_in_double(rows: Rows) -> Answer:
    """Return what torch's BatchNorm answers where ``perceived`` is asked, in double of what the dtype left."""
    x = rows.drawn(0, 1).double().requires_grad_()
    centred = x - x.mean(0)
    h = centred * (centred.square().mean(0) + EPS).rsqrt()
    if len(x) > 1:
        torch.testing.assert_close(h, nn.functional.batch_norm(x, None, None, training=True, eps=EPS))
    (rows._replace(offset=0.0).drawn(0, 1, seed=1).double() * h**2).sum().backward()
    return {"rows h": h.detach(), "rows grad": x.grad}


@quick
@given(rows=HIGH_SINGLE_ROWS)
def test_logits_of_hundreds_cost_float32_no_digits(several_ranks: Ranks, rows: Rows):
    rows = rows.among(several_ranks.world)
    expected = batch_normalised_in_double(rows)
    assert_ranks_equal_one([perceived(0, 1, rows)], expected, tolerance=2e-5)
    assert_ranks_equal_one(several_ranks(perceived, rows), expected, tolerance=2e-5)


def both_standardized(rank: int, world: int, rows: Rows, across_ranks: bool) -> Answer:
    x, constant = rows.drawn(rank, world).requires_grad_(), rows.drawn(rank, world, 2, seed=1).flatten(1)
    h, other = collectives.standardize_both(x, constant.requires_grad_(), EPS, across_ranks=across_ranks)
    assert h.requires_grad
    assert not other.requires_grad
    h.pow(3).sum().backward()
    assert constant.grad is None
    return {"rows h": h.detach(), "rows other": other, "rows grad": x.grad}


@pytest.mark.parametrize("across_ranks", [True, False])
def test_two_standardized_together_are_each_standardized_alone(several_ranks: Ranks, across_ranks: bool):
    rows = Rows((4, 0, 3)).among(several_ranks.world)
    alone = rows.drawn(0, 1).requires_grad_()
    h = collectives.standardize_columns(alone, EPS)
    h.pow(3).sum().backward()
    other = collectives.standardize_columns(rows.drawn(0, 1, 2, seed=1).flatten(1), EPS)
    one = {"rows h": h.detach(), "rows other": other, "rows grad": alone.grad}
    assert_ranks_equal_one([both_standardized(0, 1, rows, across_ranks)], one)
    if across_ranks:
        assert_ranks_equal_one(several_ranks(both_standardized, rows, across_ranks), one)


@pytest.mark.parametrize("across_ranks", [True, False])
def test_the_gradient_of_standardize_is_exact(across_ranks: bool):
    x = Rows((5,), columns=4).drawn(0, 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: collectives.standardize_columns(x, EPS, across_ranks=across_ranks), [x])
    assert torch.autograd.gradcheck(lambda x: collectives.standardize_both(x, x.detach(), 1.0)[0], [x])


def test_one_row_and_a_constant_column_give_zeros():
    one = Rows((1,)).drawn(0, 1).requires_grad_()
    constant = torch.full((4, 2), 1e3, dtype=torch.float32, requires_grad=True)
    for x in (one, constant):
        h = collectives.standardize_columns(x, EPS)
        h.sum().backward()
        assert h.abs().max() < 1e-3
        assert x.grad is not None
        assert x.grad.abs().max() < 1e-9


def norm_of(channels: int, make: Any) -> Any:
    """Return a BatchNorm with random scale and shift."""
    torch.manual_seed(0)
    norm = make(channels)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm.double()


def normalised(rank: int, world: int, rows: Rows, shape: tuple[int, int], make: Any = BatchNorm) -> Answer:
    norm = norm_of(rows.columns, make)
    x = rows.drawn(rank, world, *shape).to(memory_format=torch.channels_last).requires_grad_()
    y = norm(x)
    (rows.drawn(rank, world, *shape, seed=1) * y**2).sum().backward()
    return {"rows y": y.detach(), "rows grad": x.grad, "sum weight": norm.weight.grad, "sum bias": norm.bias.grad}


def torchs(channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels, track_running_stats=False)


@quick
@given(rows=ROWS, shape=st.tuples(st.integers(1, 3), st.integers(2, 3)))
def test_batch_norm_is_torchs_over_the_rows_of_all_ranks(several_ranks: Ranks, rows: Rows, shape: tuple[int, int]):
    rows = rows.among(several_ranks.world)
    one = normalised(0, 1, rows, shape, torchs)
    assert_ranks_equal_one([normalised(0, 1, rows, shape)], one, tolerance=1e-11)
    assert_ranks_equal_one(several_ranks(normalised, rows, shape), normalised(0, 1, rows, shape))


def sent(rank: int, world: int) -> dict[str, Any]:
    """Return what each primitive sends of 5 rows of 7 float64 numbers, forward and backward."""
    x, norm = torch.randn(5, 7, dtype=torch.float64, requires_grad=True), BatchNorm(7).double()
    actions = {
        "global_sum": lambda: collectives.global_sum(x),
        "gather_rows, equal": lambda: collectives.gather_rows(x, equal=True),
        "gather_rows": lambda: collectives.gather_rows(x),
        "standardize": lambda: collectives.standardize_columns(x, EPS),
        "standardize_both": lambda: collectives.standardize_both(x, x.detach(), EPS)[0],
        "standardize, one rank": lambda: collectives.standardize_columns(x, EPS, across_ranks=False),
        "BatchNorm": lambda: norm(x[:, :, None, None]),
    }
    return {name: forward_and_backward(lambda act=act: act().square().sum()) for name, act in actions.items()}


def test_ranks_send_each_other_what_the_head_of_the_module_says(several_ranks: Ranks):
    rows, row = 5, 7 * 8
    expected = {
        "global_sum": ([("allreduce", rows * row)], [("allreduce", rows * row)]),
        "gather_rows, equal": (
            [("allgather_base", rows * row)],
            [("reduce_scatter_base", several_ranks.world * rows * row)],
        ),
        "gather_rows": (
            [("allgather_base", 8), ("allgather_base", rows * row)],
            [("reduce_scatter_base", several_ranks.world * rows * row)],
        ),
        "standardize": ([("allreduce", 8 + 2 * row)], [("allreduce", 2 * row)]),
        "standardize_both": ([("allreduce", 8 + 4 * row)], [("allreduce", 2 * row)]),
        "standardize, one rank": ([], []),
        "BatchNorm": ([("allreduce", 8 + 2 * row)], [("allreduce", 2 * row)]),
    }
    for answer in several_ranks(sent):
        assert answer == expected


def test_one_process_sends_nothing():
    assert set(map(str, sent(0, 1).values())) == {"([], [])"}


def agreed(rank: int, world: int) -> dict[str, Any]:
    mine = torch.tensor([rank, 10 - rank])
    module = nn.BatchNorm1d(2)
    module.running_mean.fill_(float(rank))  # type: ignore[union-attr]
    with Collectives() as averaging, collectives.average_buffers(module):
        inside = module.running_mean.clone()  # type: ignore[union-attr]
    return {
        "who": (collectives.rank(), collectives.world_size(), collectives.is_main()),
        "sum": collectives.all_reduce_sum(mine).tolist(),
        "mean": collectives.all_reduce_mean(mine.double()).tolist(),
        "min": collectives.all_reduce_min(mine).tolist(),
        "untouched": mine.tolist(),
        "any": (collectives.any_rank(rank == 1), collectives.any_rank(False)),
        "buffers": (inside.tolist(), module.running_mean.tolist()),  # type: ignore[union-attr]
        "averaging": averaging.calls,
    }


def test_ranks_agree_on_sums_means_minima_and_flags(ranks: Ranks):
    common = {"sum": [1, 19], "mean": [0.5, 9.5], "min": [0, 9], "any": (True, False)}
    # Mean and variance of two channels in float64, in one call.
    common["averaging"] = [("allreduce", 32)]
    first, second = ranks(agreed)
    assert first == {**common, "who": (0, 2, True), "untouched": [0, 10], "buffers": ([0.5, 0.5], [0.0, 0.0])}
    assert second == {**common, "who": (1, 2, False), "untouched": [1, 9], "buffers": ([0.5, 0.5], [1.0, 1.0])}


def test_a_single_process_answers_for_itself():
    answer = agreed(0, 1)
    assert answer["who"] == (0, 1, True)
    assert answer["sum"] == answer["mean"] == answer["min"] == [0, 10]
    assert answer["any"] == (False, False)
    assert answer["buffers"] == ([0.0, 0.0], [0.0, 0.0])
    assert answer["averaging"] == []
