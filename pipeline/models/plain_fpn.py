"""A plain network for segmentation in demos and tests, which two cores train in minutes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops import Conv2dNormActivation

from pipeline.models.initialization import he_normal
from pipeline.models.segmenter import Segmenter

SUMMED = ("stage2", "stage3", "stage4")
"""Features that the head adds up; the first has a quarter of the image's width."""


STAGES = ("stage1", "stage2", "stage3", "stage4")


def check_plain(width: int, depth: int) -> None:
    """Raise ValueError if there is no ``plain_backbone`` of this width and depth."""
    if width < 1 or depth < 1:
        raise ValueError(f"width and depth must be at least 1, got {width!r} and {depth!r}")


def plain_backbone(width: int, depth: int, returned: Sequence[str] = STAGES) -> IntermediateLayerGetter:
    """Return four stages with ``width``, 2, 4 and 8 times ``width`` channels, each of which halves the map.

    The first has one convolution, the others ``depth``, each with BatchNorm and ReLU. Features are those of the stages
    ``returned``.
    """
    stages: OrderedDict[str, nn.Module] = OrderedDict()
    channels_in = 3
    for number in range(1, 5):
        channels = width * 2 ** (number - 1)
        layers = [Conv2dNormActivation(channels_in, channels, 3, stride=2)]
        layers += [Conv2dNormActivation(channels, channels, 3) for _ in range(depth - 1 if number > 1 else 0)]
        stages[f"stage{number}"] = nn.Sequential(*layers)
        channels_in = channels
    return IntermediateLayerGetter(nn.Sequential(stages), {stage: stage for stage in returned})


class TopDown(nn.Module):
    """The sum of ``SUMMED``, each as ``channels`` channels, the deeper ones enlarged to the size of the shallowest.

    Lin et al., CVPR 2017, figure 3.
    """

    def __init__(self, channels_in: Sequence[int], channels: int) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(nn.Conv2d(each, channels, 1) for each in channels_in)

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Return the sum, of the shallowest feature's height and width."""
        *shallow, total = (lateral(features[name]) for name, lateral in zip(SUMMED, self.laterals, strict=True))
        for each in reversed(shallow):
            total = each + F.interpolate(total, each.shape[2:], mode="nearest")
        return total


def plain_fpn(num_classes: int, *, width: int = 16, depth: int = 2) -> Segmenter:
    """Return a ``plain_backbone`` with a head that adds up three stages: a map of a quarter of the image's width."""
    check_plain(width, depth)
    channels = 4 * width
    summed = TopDown([width * 2**number for number in range(1, 4)], channels)
    smoothed = Conv2dNormActivation(channels, channels, 3, inplace=False)
    classifier = nn.Sequential(summed, *smoothed, nn.Conv2d(channels, num_classes, 1))
    model = Segmenter(plain_backbone(width, depth), classifier, all_features=True)
    he_normal(model)
    return model


MODELS: dict[str, Callable[..., nn.Module]] = {"plain_fpn": plain_fpn}
