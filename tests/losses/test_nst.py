from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.losses.nst import discrepancy, mean_kernel, nst_loss


def maps(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("channels", [(3, 5), (4, 4), (9, 7)])
def test_either_gram_matrix_gives_the_kernel_of_all_pairs_of_channels(channels: tuple[int, int]):
    """Of 4 pixels the 16 products of two pixels are fewer than those of 9 and 7 channels, and not than of 3 and 5."""
    a, b = (maps(seed, 2, count, 4) for seed, count in enumerate(channels))
    pairs = [(a[:, i] * b[:, j]).sum(1).square() for i in range(channels[0]) for j in range(channels[1])]
    torch.testing.assert_close(mean_kernel(a, b), torch.stack(pairs).mean())


def test_channels_are_a_set():
    student, teacher = maps(0, 2, 6, 4, 4), maps(1, 2, 8, 4, 4)
    expected = nst_loss([student], [teacher])
    torch.testing.assert_close(nst_loss([student.flip(1)], [teacher.roll(3, 1)]), expected)
    assert nst_loss([student.flip(1)], [student]).item() == pytest.approx(0, abs=1e-12)


def test_a_channel_counts_by_its_pattern_and_not_by_its_strength():
    student, teacher = maps(0, 2, 6, 4, 4), maps(1, 2, 8, 4, 4)
    strengths = maps(2, 6).exp().view(6, 1, 1)
    torch.testing.assert_close(nst_loss([student * strengths], [teacher]), nst_loss([student], [teacher]))


def test_a_dead_channel_gets_no_gradient():
    student = maps(0, 2, 6, 4, 4).relu()
    student[:, 2] = 0
    student.requires_grad_()
    nst_loss([student], [maps(1, 2, 8, 4, 4)]).backward()
    assert student.grad is not None
    assert not student.grad[:, 2].any()
    assert student.grad.abs().amax() < 1


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor holds that any operation makes."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.numbers = max(self.numbers, made.untyped_storage().nbytes() // made.element_size())
        return made


@pytest.mark.parametrize("shape", [(64, 4, 4), (8, 16, 16)], ids=["deep", "shallow"])
def test_no_product_of_all_channels_and_pixels_is_made(shape: tuple[int, int, int]):
    """The published form makes one of [B, C, C, N]: 1 GB for 64 maps of 256 × 8 × 8."""
    student, teacher = maps(0, 3, *shape).requires_grad_(), maps(1, 3, *shape)
    with Largest() as largest:
        discrepancy(student, teacher).backward()
    channels, pixels = shape[0], shape[1] * shape[2]
    assert largest.numbers <= 3 * max(channels * pixels, min(channels, pixels) ** 2)
