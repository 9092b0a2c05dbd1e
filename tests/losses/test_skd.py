"""The pair-wise part of structured knowledge distillation: regions and their similarities."""

from __future__ import annotations

import pytest
import torch
from loss_cases import config_of, example, inputs_of, oracle

from pipeline.losses._registry import load_spec
from pipeline.losses.skd import region_similarities, skd_loss


@pytest.mark.parametrize(("pool", "regions"), [(1, 35), (2, 12), (3, 6), (9, 1)])
def test_windows_at_the_edges_are_regions_too(pool: int, regions: int):
    maps = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    similarities_BNN = region_similarities(maps, pool)
    assert similarities_BNN.shape == (2, regions, regions)
    torch.testing.assert_close(similarities_BNN.diagonal(dim1=1, dim2=2), torch.ones(2, regions, dtype=torch.float64))
    torch.testing.assert_close(similarities_BNN, similarities_BNN.mT)


@pytest.mark.parametrize("pool", [1, 3])
def test_regions_of_another_size_equal_the_oracle(pool: int):
    spec = load_spec("skd", {**config_of("skd"), "stages": ["stage1", "stage2"], "pool": pool})
    shapes = {"stage1": (3, 5, 7), "stage2": (4, 2, 3)}, {"stage1": (2, 5, 7), "stage2": (6, 4, 4)}
    case = example("skd", spec, rows=2, student=shapes[0], teacher=shapes[1])
    expected = oracle("skd").parts(spec.config.model_dump(mode="json"), inputs_of(case, seed=0))["skd"]
    assert case.total().item() == pytest.approx(10 * expected, rel=1e-10)


def test_a_region_without_any_activation_gets_no_gradient():
    student = torch.randn(2, 4, 4, 4, dtype=torch.float64).relu()
    student[0] = 0
    student.requires_grad_()
    skd_loss(student, torch.randn(2, 6, 4, 4, dtype=torch.float64), pool=2).backward()
    assert student.grad is not None
    assert not student.grad[0].any()
    assert 0 < student.grad.abs().amax() < 10
