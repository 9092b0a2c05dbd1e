from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from gloo_ranks import Ranks


def summed(rank: int, world: int, numbers: list[float]) -> torch.Tensor:
    total = torch.tensor(numbers[rank])
    dist.all_reduce(total)
    return total


def fails_on_rank_one_while_the_other_waits(rank: int, world: int) -> None:
    if rank == 1:
        raise KeyError("a lost key")
    dist.barrier()


def test_both_ranks_answer(ranks: Ranks):
    assert [answer.item() for answer in ranks(summed, [1.5, 2.0])] == [3.5, 3.5]


def test_an_error_of_a_rank_reaches_the_test_with_its_traceback(tmp_path: Path):
    own = Ranks(tmp_path)
    with pytest.raises(KeyError, match="a lost key") as caught:
        own(fails_on_rank_one_while_the_other_waits)
    assert "fails_on_rank_one" in caught.value.__notes__[0]
    assert not own.processes
