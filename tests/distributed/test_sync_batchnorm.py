"""BatchNorm over the rows of all ranks: what one process with all rows computes."""

from __future__ import annotations

import copy

import pytest
import torch
from gloo_ranks import Ranks
from torch import Tensor, nn

from pipeline.distributed.sync_batchnorm import SyncedBatchNorm, synchronize_batchnorms
from pipeline.models import create_model


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Sequential(nn.BatchNorm2d(4)))
    layers[1].weight.data.uniform_(0.5, 2)
    layers[1].bias.data.normal_()
    return layers.double()


def images() -> Tensor:
    return torch.randn(6, 3, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def steps(rank: int, world: int, synced: bool) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    """Return outputs of this rank's rows, mean gradients over the ranks' losses, and the state after two steps."""
    model = network()
    if synced:
        synchronize_batchnorms(model)
    rows = images()[rank * 6 // world : (rank + 1) * 6 // world]
    outputs = [model(rows) for _ in range(2)][-1]
    outputs.square().mean().backward()
    return outputs.detach(), [parameter.grad for parameter in model.parameters()], model.state_dict()


def test_ranks_normalise_and_keep_averages_as_one_process_does(several_ranks: Ranks):
    outputs, gradients, state = steps(0, 1, synced=False)
    found = several_ranks(steps, True)
    torch.testing.assert_close(torch.cat([each[0] for each in found]), outputs, rtol=1e-12, atol=1e-12)
    for position, gradient in enumerate(gradients):
        mean = torch.stack([each[1][position] for each in found]).mean(0)
        torch.testing.assert_close(mean, gradient, rtol=1e-10, atol=1e-12)
    for _, _, of_rank in found:
        assert of_rank.keys() == state.keys()
        for name, value in state.items():
            torch.testing.assert_close(of_rank[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_one_process_computes_what_batchnorm_does_to_the_bit(training: bool):
    plain = network().train(training)
    synced = copy.deepcopy(plain)
    synchronize_batchnorms(synced)
    assert [type(module) for module in synced.modules()].count(SyncedBatchNorm) == 2
    assert torch.equal(synced(images()), plain(images()))
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in synced.state_dict().items())


def half_steps(rank: int, world: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the outputs of this rank's rows under autocast, and the state after a step."""
    model, rows = network().float(), images().float()[rank * 6 // world : (rank + 1) * 6 // world]
    synchronize_batchnorms(model)
    with torch.autocast("cpu", torch.bfloat16):
        return model(rows).detach(), model.state_dict()


def test_under_autocast_averages_stay_exact_and_maps_half(several_ranks: Ranks):
    outputs, state = half_steps(0, 1)
    found = several_ranks(half_steps)
    assert outputs.dtype == torch.bfloat16
    for of_rank, after in found:
        assert of_rank.dtype == torch.bfloat16
        for name, value in state.items():
            torch.testing.assert_close(after[name], value, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(torch.cat([each[0] for each in found]), outputs, rtol=2e-2, atol=2e-2)


def test_a_batchnorm_with_an_activation_is_refused():
    model = create_model("timm/resnetv2_18", 3)
    with pytest.raises(ValueError, match="a BatchNormAct2d cannot be synchronised, only BatchNorm2d; remove sync"):
        synchronize_batchnorms(model)


def test_the_kind_of_device_is_that_of_the_launch(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model = network()
    synchronize_batchnorms(model)
    assert [type(module) for module in model.modules()].count(nn.SyncBatchNorm) == 2
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    model = network()
    synchronize_batchnorms(model)
    assert [type(module) for module in model.modules()].count(SyncedBatchNorm) == 2


def test_a_batchnorm_without_running_averages_is_refused():
    with pytest.raises(ValueError, match="without scale, shift or running averages cannot be synchronised"):
        synchronize_batchnorms(nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)))
