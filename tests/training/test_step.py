"""A step's draws: the same as torch's own seeding gives, another for every step and rank."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch

from pipeline.distributed import collectives
from pipeline.training.step import seed_draws


def draws(seed: int, step: int) -> list[float]:
    seed_draws(seed, step)
    return [*torch.rand(3).tolist(), *torch.randn(2).tolist(), float(torch.randint(1000, (1,)))]


@pytest.mark.parametrize(("seed", "step"), [(0, 0), (3, 1), (2**40, 10**7)])
def test_the_draws_are_those_of_torchs_own_seeding(seed: int, step: int):
    ours = draws(seed, step)
    number = np.random.SeedSequence([seed, step, 0]).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(number))
    assert ours == [*torch.rand(3).tolist(), *torch.randn(2).tolist(), float(torch.randint(1000, (1,)))]


def test_they_repeat_and_differ_by_seed_step_and_rank():
    first = draws(1, 1)
    assert draws(1, 1) == first
    with mock.patch.object(collectives, "rank", return_value=1):
        of_another_rank = draws(1, 1)
    assert len({tuple(each) for each in (first, draws(2, 1), draws(1, 2), of_another_rank)}) == 4


@pytest.mark.gpu
def test_a_gpus_draws_are_those_of_torchs_own_seeding():
    seed_draws(1, 1)
    ours = torch.randn(5, device="cuda")
    torch.manual_seed(int(np.random.SeedSequence([1, 1, 0]).generate_state(1, np.uint64)[0]))
    assert torch.equal(torch.randn(5, device="cuda"), ours)
