"""A step's draws, its gradients' norm and its clipping are torch's own, made so that they can be captured."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.distributed import collectives
from pipeline.training.step import clip_gradients, gradient_norm, seed_draws


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


def gradients(seed: int = 0) -> list[torch.Tensor]:
    """Return gradients of several shapes and layouts, one of them a view, one expanded and one empty."""
    torch.manual_seed(seed)
    dense = [torch.randn(7, 3), torch.randn(4, 8, 3, 3).to(memory_format=torch.channels_last), torch.randn(6, 5).t()]
    return [*dense, torch.randn(40)[5:25].view(4, 5), torch.randn(3, 1).expand(3, 4), torch.randn(0), torch.randn(())]


def test_the_norm_is_that_of_all_gradients_as_one_vector():
    found = gradients()
    expected = torch.cat([x.double().flatten() for x in found]).norm().float()
    assert gradient_norm(found) == expected


def test_the_norm_takes_three_operations_and_copies_no_gradient_alone():
    found = [x for x in gradients() if not 0 < x.untyped_storage().nbytes() < x.nbytes]  # not the expanded one
    operators: list[str] = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            operators.extend([] if func.is_view else [func._opname])
            return func(*args, **(kwargs or {}))

    with Seen():
        gradient_norm(found)
    assert operators == ["cat", "linalg_vector_norm", "_to_copy"]


@pytest.mark.parametrize("largest", [0.5, 1e6])
def test_clipping_is_torchs_own(largest: float):
    module = nn.ParameterList([nn.Parameter(torch.zeros_like(x)) for x in gradients() if x.numel()])
    for parameter, gradient in zip(module, [x for x in gradients() if x.numel()], strict=True):
        parameter.grad = gradient.clone()
    accelerator: Any = SimpleNamespace(deepspeed_plugin=None, unscale_gradients=lambda: None)
    copies = [nn.Parameter(torch.zeros_like(parameter)) for parameter in module]
    for copy, parameter in zip(copies, module, strict=True):
        copy.grad = parameter.grad.clone()
    before = nn.utils.clip_grad_norm_(copies, largest)
    norm = clip_gradients(accelerator, module, largest)
    torch.testing.assert_close(norm, before, rtol=1e-6, atol=0)
    for parameter, copy in zip(module, copies, strict=True):
        torch.testing.assert_close(parameter.grad, copy.grad, rtol=1e-6, atol=0)


def test_a_gradient_that_is_not_finite_has_no_finite_norm():
    for bad in (float("nan"), float("inf")):
        assert not gradient_norm([torch.ones(3), torch.tensor([1.0, bad])]).isfinite()
