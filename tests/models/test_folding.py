"""BatchNorm is folded exactly where a convolution feeds it and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from pipeline.models import create_model
from pipeline.models.folding import fold_batchnorms


class Plain(nn.Module):
    """Convolution, BatchNorm, and a ReLU that overwrites."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)))


class ReadTwice(Plain):
    """A pre-activation residual: the sum goes past the BatchNorm too."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.relu(self.bn(y)) + y


class RanTwice(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(self.conv(x)))


class BetweenThem(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.relu(self.conv(x)))


class FirstNorm(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.bn(x))


class Activating(nn.BatchNorm2d):
    """A BatchNorm with an activation in it, as timm has them."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class NormWithActivation(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.bn = Activating(4)


class BatchStatistics(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(4, track_running_stats=False)


class Frozen(Plain):
    """Torchvision's detectors have such norms."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = FrozenBatchNorm2d(4, eps=0.1)
        for value, tensor in enumerate((self.bn.weight, self.bn.bias, self.bn.running_mean, self.bn.running_var)):
            tensor.copy_(torch.arange(4.0) + value)


class NotAffine(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2, dilation=2)
        self.bn = nn.BatchNorm2d(4, eps=0.1, affine=False)


def lived_in(model: nn.Module) -> nn.Module:
    """Return ``model`` in float64 and evaluation mode with BatchNorms that have seen something."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                if tensor is not None:
                    tensor.data.copy_(torch.randn(tensor.shape, generator=generator))
            if module.running_var is not None:
                module.running_var.copy_(0.5 + torch.rand(module.running_var.shape, generator=generator))
    return model.double().eval()


def images(size: int = 16) -> Tensor:
    return torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def batchnorms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d) for module in model.modules())


@pytest.mark.parametrize("make", [Plain, NotAffine, Frozen])
def test_a_pair_is_folded_and_computes_the_same(make: type[nn.Module]):
    model = lived_in(make())
    before = model(images())
    assert fold_batchnorms(model, images()) == 1
    assert batchnorms(model) == 0
    torch.testing.assert_close(model(images()), before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", [ReadTwice, RanTwice, BetweenThem, FirstNorm, BatchStatistics, NormWithActivation])
def test_what_is_no_pair_is_left_alone(make: type[nn.Module]):
    model = lived_in(make())
    before = model(images())
    assert fold_batchnorms(model, images()) == 0
    assert torch.equal(model(images()), before)


def test_a_batchnorm_in_training_mode_is_left_alone():
    model = lived_in(Plain())
    model.get_submodule("bn").train()
    assert fold_batchnorms(model, images()) == 0


@pytest.mark.parametrize("name", ["conv", "bn"])
def test_a_spared_module_is_left_alone(name: str):
    model = lived_in(Plain())
    assert fold_batchnorms(model, images(), spared={model.get_submodule(name)}) == 0


@pytest.mark.parametrize(
    ("name", "folded"),
    [
        *[("resnet18", 20), ("mobilenet_v1", 27), ("mobilenet_v2", 52), ("efficientnet_b0", 49)],
        *[("cifar_resnet20", 21), ("cifar_vgg8", 5), ("cifar_mobilenet_v2", 53)],
        *[("cifar_shufflenet_v1", 49), ("cifar_shufflenet_v2", 56)],
    ],
)
def test_a_whole_network_loses_all_its_batchnorms_and_computes_the_same(name: str, folded: int):
    torch.manual_seed(0)
    model = lived_in(create_model(name, 10))
    with torch.no_grad():
        before = model(images(32))
        assert fold_batchnorms(model, images(32)) == folded
        after = model(images(32))
    assert batchnorms(model) == 0
    assert (after - before).abs().max() <= 1e-9 * before.abs().max()


@pytest.mark.parametrize(("name", "norms"), [("densenet121", 121), ("cifar_wrn_16_1", 13), ("cifar_wrn_16_2", 13)])
def test_batchnorms_that_read_a_concatenation_or_a_sum_stay(name: str, norms: int):
    model = lived_in(create_model(name, 10))
    with torch.no_grad():
        before = model(images(32))
        folded = fold_batchnorms(model, images(32))
        after = model(images(32))
    assert 0 < folded < norms
    assert batchnorms(model) == norms - folded
    assert (after - before).abs().max() <= 1e-9 * before.abs().max()
