from __future__ import annotations

import pytest
import torch
from loss_cases import config_of, example, load_spec
from torch import Tensor

from pipeline.losses.irg import edges, transformation


def embeddings(seed: int, rows: int = 6, width: int = 4) -> Tensor:
    return torch.randn(rows, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_edges_are_squared_distances_over_the_largest():
    points = torch.tensor([[0.0], [1.0], [3.0]], dtype=torch.float64)
    expected = torch.tensor([[0.0, 1.0, 9.0], [1.0, 0.0, 4.0], [9.0, 4.0, 0.0]], dtype=torch.float64) / 9
    torch.testing.assert_close(edges(points), expected)


def test_moves_between_levels_of_equal_width_are_the_papers():
    shallow, deep = embeddings(0), embeddings(1)
    squares = (deep - shallow).square().sum(1)
    torch.testing.assert_close(transformation(shallow, deep), squares / squares.max())


def test_neighbouring_channels_of_a_level_of_twice_the_width_are_averaged():
    shallow, deep = embeddings(0), embeddings(1, width=8)
    halved = (deep[:, 0::2] + deep[:, 1::2]) / 2
    torch.testing.assert_close(transformation(shallow, deep), transformation(shallow, halved))
    torch.testing.assert_close(transformation(deep, shallow), transformation(halved, shallow))


@pytest.mark.parametrize("relation", [edges, lambda x: transformation(x, 2 * x.flip(0))], ids=["edges", "moves"])
def test_the_gradient_ignores_the_scale_too(relation):
    """Published code holds the largest constant: its gradient would also shrink or stretch all rows together."""
    x = embeddings(0).requires_grad_()
    (relation(x) * torch.rand(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().amax() > 1e-3
    assert (x.grad * x.detach()).sum().item() == pytest.approx(0, abs=1e-12)


def test_rows_that_are_one_point_have_no_edges_and_no_gradient():
    x = torch.full((5, 4), 3.0, dtype=torch.float64, requires_grad=True)
    edges(x).sum().backward()
    assert x.grad is not None
    assert not x.grad.any()


def test_one_stage_has_edges_and_no_transformation():
    case = example("irg", load_spec("irg", {**config_of("irg"), "stages": ["last"]}))
    assert set(case.parts()) == {"vertices", "edges"}


def test_an_embedding_is_a_level_like_an_averaged_map():
    config = {**config_of("irg"), "vertex_weight": 0.0}
    case = example("irg", load_spec("irg", {**config, "stages": ["stage2", "last"]}))
    other = example("irg", load_spec("irg", {**config, "stages": ["stage2", "embedding"]}))
    pooled = [
        x._replace(features={"stage2": x.features["stage2"], "embedding": x.features["last"].mean((2, 3))})
        for x in (case.student, case.teacher)
    ]
    other = other._replace(student=pooled[0], teacher=pooled[1])
    torch.testing.assert_close(other.parts(), case.parts())
