"""Factor transfer: factors as directions, and a paraphraser that another run left."""

from __future__ import annotations

from math import sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import PROGRESS, example
from torch import Tensor

from pipeline.losses.ft import FT, energy, ft_loss


def factors(seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(3, 4, 8, 6, generator=draw), torch.randn(3, 5, 4, 6, generator=draw)


@settings(max_examples=20, derandomize=True, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.floats(1e-3, 1e3))
def test_factors_are_directions_whose_distance_has_a_bound(seed: int, scale: float):
    student, teacher = factors(seed)
    lengths = torch.linalg.vector_norm(energy(student), dim=1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))
    loss = ft_loss(scale * student, teacher).item()
    assert 0 <= loss <= 2 / sqrt(4 * 6)
    assert loss == pytest.approx(ft_loss(student, teacher).item(), rel=1e-4)


def left_paraphraser() -> tuple[FT, dict[str, Tensor]]:
    """Return a loss, and what a run of its paraphraser leaves, with numbers of its own."""
    loss = example("ft").loss
    assert isinstance(loss, FT)
    encoder = example("ft_paraphraser", seed=1).loss.get_submodule("paraphraser")
    return loss, {f"ft_paraphraser.paraphraser.{key}": x for key, x in encoder.state_dict().items()}


def test_the_paraphraser_of_another_run_is_taken_and_learns_nothing():
    loss, state = left_paraphraser()
    case = example("ft")._replace(loss=loss)
    before = case.total().item()
    loss.load_auxiliary(state)
    assert case.total().item() != before
    taken = {key: x.clone() for key, x in loss.named_buffers()}
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        loss.parts(case.student, case.teacher, case.batch, PROGRESS)["ft"].backward()
        optimizer.step()
    expected = {f"encoder{level}_{kind}" for level in (0, 2, 4) for kind in ("weight", "bias")}
    assert taken.keys() == expected
    assert all(torch.equal(x, taken[key]) for key, x in loss.named_buffers())
    weight = state["ft_paraphraser.paraphraser.encoder.0.weight"]
    assert torch.equal(taken["encoder0_weight"], weight)


def test_a_paraphraser_of_another_shape_or_none_is_refused_in_one_line():
    loss, state = left_paraphraser()
    with pytest.raises(ValueError, match=r"^that run left no paraphraser; name one with the loss ft_paraphraser$"):
        loss.load_auxiliary({"vid.means.0.weight": torch.zeros(1)})
    key = "ft_paraphraser.paraphraser.encoder.2.weight"
    with pytest.raises(
        ValueError, match=r"^its paraphraser has a convolution of \[4, 16, 3, 3\], and \[8, 16, 3, 3\] is"
    ):
        loss.load_auxiliary({**state, key: state[key][:4]})
