"""Networks of super-resolution by name: FSRCNN, EDSR and RCAN.

They take images [B, 3, H, W] of values in 0 … 1 and return larger ones. Inside of EDSR and RCAN the values are in
0 … ``levels``, less the mean of DIV2K's images, as in the published code. ``residual`` adds bicubic interpolation to
what the network computes, which then learns the difference; published networks do without.

B batch, C channels, H W space.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from pipeline.bicubic import bicubic_upscaled

DIV2K_MEAN = (0.4488, 0.4371, 0.4040)
"""Mean of red, green and blue of DIV2K's training images."""
_COLOURS = 3


class Enlarger(nn.Module):
    """The base class of networks that enlarge images ``scale`` times."""

    def __init__(self, scale: int, *, residual: bool) -> None:
        super().__init__()
        if scale not in (2, 3, 4, 8):
            raise ValueError(f"scale: expected 2, 3, 4 or 8, got {scale!r}")
        self.scale = scale
        self.residual = residual

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return the images, ``scale`` times as high and wide."""
        large_BCHW = self.enlarged(images_BCHW)
        return large_BCHW + bicubic_upscaled(images_BCHW, self.scale) if self.residual else large_BCHW

    def enlarged(self, images_BCHW: Tensor) -> Tensor:
        """Return what the network computes, [B, C, scale · H, scale · W]."""
        raise NotImplementedError

    def tap_paths(self) -> dict[str, str]:
        """Return the module path of each stage."""
        raise NotImplementedError


class FSRCNN(Enlarger):
    """Features in few channels, which a transposed convolution enlarges.

    Dong et al., "Accelerating the super-resolution convolutional neural network", ECCV 2016, arXiv:1608.00367. The
    published network is of one colour, the luma.
    """

    def __init__(
        self,
        num_classes: int = 1,
        *,
        scale: int,
        features: int = 56,
        shrunk: int = 12,
        layers: int = 4,
        colours: int = _COLOURS,
        residual: bool = False,
    ) -> None:
        super().__init__(scale, residual=residual)
        self.feature_extraction = nn.Sequential(nn.Conv2d(colours, features, 5, padding=2), nn.PReLU())
        self.shrinking = nn.Sequential(nn.Conv2d(features, shrunk, 1), nn.PReLU())
        maps = [nn.Sequential(nn.Conv2d(shrunk, shrunk, 3, padding=1), nn.PReLU()) for _ in range(layers)]
        self.mapping = nn.Sequential(*maps)
        self.expanding = nn.Sequential(nn.Conv2d(shrunk, features, 1), nn.PReLU())
        self.deconvolution = nn.ConvTranspose2d(features, colours, 9, scale, padding=4, output_padding=scale - 1)

    def enlarged(self, images_BCHW: Tensor) -> Tensor:
        """Return what the transposed convolution makes of the expanded features."""
        x_BCHW = self.mapping(self.shrinking(self.feature_extraction(images_BCHW)))
        return self.deconvolution(self.expanding(x_BCHW))

    def tap_paths(self) -> dict[str, str]:
        """Return the module path of each stage; ``expanding`` is the name in the published code of PISR."""
        stages = {"stage1": "shrinking", "stage2": "mapping", "stage3": "expanding"}
        return {"stem": "feature_extraction", **stages, "expanding": "expanding"}


class ResidualBlock(nn.Module):
    """Two convolutions and a ReLU between, without BatchNorm, whose result is scaled and added."""

    def __init__(self, features: int, residual_scale: float) -> None:
        super().__init__()
        self.conv1, self.relu, self.conv2 = _conv(features, features), nn.ReLU(), _conv(features, features)
        self.residual_scale = residual_scale

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the sum."""
        return x_BCHW + self.residual_scale * self.conv2(self.relu(self.conv1(x_BCHW)))


class BodyNetwork(Enlarger):
    """A convolution, a body with a skip around it, and an upsampler: EDSR and RCAN.

    ``stage1`` and ``stage2`` are the ends of the thirds of the body. ``stage3`` is the sum after the skip, where the
    published code of FAKD takes its last features, too.
    """

    mean_C11: Tensor

    def __init__(self, scale: int, features: int, blocks: list[nn.Module], *, levels: float, residual: bool) -> None:
        super().__init__(scale, residual=residual)
        self.levels = levels
        self.head = _conv(_COLOURS, features)
        self.body = nn.Sequential(*blocks)
        self.body_conv = _conv(features, features)
        self.stage3 = nn.Identity()
        steps = [scale] if scale == 3 else [2] * (scale.bit_length() - 1)
        self.upsampler = nn.Sequential(
            *(nn.Sequential(_conv(features, step**2 * features), nn.PixelShuffle(step)) for step in steps)
        )
        self.tail = _conv(features, _COLOURS)
        mean_C11 = torch.tensor(DIV2K_MEAN)[:, None, None]
        self.register_buffer("mean_C11", mean_C11, persistent=False)

    def enlarged(self, images_BCHW: Tensor) -> Tensor:
        """Return what the upsampler makes of the body's features; with ``residual`` the mean is not added."""
        x_BCHW = self.head((images_BCHW - self.mean_C11) * self.levels)
        x_BCHW = self.stage3(self.body_conv(self.body(x_BCHW)) + x_BCHW)
        large_BCHW = self.tail(self.upsampler(x_BCHW)) / self.levels
        return large_BCHW if self.residual else large_BCHW + self.mean_C11

    def tap_paths(self) -> dict[str, str]:
        """Return the module path of each stage."""
        ends = {f"stage{number}": (number * len(self.body) + 1) // 3 - 1 for number in (1, 2)}
        return {"stem": "head", **{name: f"body.{max(end, 0)}" for name, end in ends.items()}, "stage3": "stage3"}


class EDSR(BodyNetwork):
    """Residual blocks without BatchNorm.

    Lim et al., "Enhanced deep residual networks for single image super-resolution", CVPRW 2017, arXiv:1707.02921.
    """

    def __init__(
        self,
        num_classes: int = 1,
        *,
        scale: int,
        features: int = 64,
        blocks: int = 16,
        residual_scale: float = 1.0,
        levels: float = 255.0,
        residual: bool = False,
    ) -> None:
        body: list[nn.Module] = [ResidualBlock(features, residual_scale) for _ in range(blocks)]
        super().__init__(scale, features, body, levels=levels, residual=residual)


class ChannelAttentionBlock(nn.Module):
    """A residual block whose channels are weighed by their mean over the image."""

    def __init__(self, features: int, reduction: int) -> None:
        super().__init__()
        self.conv1, self.relu, self.conv2 = _conv(features, features), nn.ReLU(), _conv(features, features)
        self.attention = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(features, features // reduction, 1),
            nn.ReLU(),
            nn.Conv2d(features // reduction, features, 1),
            nn.Sigmoid(),
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the sum of the input and the weighed features."""
        features_BCHW = self.conv2(self.relu(self.conv1(x_BCHW)))
        return x_BCHW + features_BCHW * self.attention(features_BCHW)


class ResidualGroup(nn.Module):
    """Blocks of channel attention and a convolution, with a skip around them."""

    def __init__(self, features: int, blocks: int, reduction: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(ChannelAttentionBlock(features, reduction) for _ in range(blocks)))
        self.conv = _conv(features, features)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the sum."""
        return x_BCHW + self.conv(self.blocks(x_BCHW))


class RCAN(BodyNetwork):
    """Residual groups of blocks with channel attention.

    Zhang et al., "Image super-resolution using very deep residual channel attention networks", ECCV 2018,
    arXiv:1807.02758.
    """

    def __init__(
        self,
        num_classes: int = 1,
        *,
        scale: int,
        features: int = 64,
        groups: int = 10,
        blocks: int = 20,
        reduction: int = 16,
        levels: float = 255.0,
        residual: bool = False,
    ) -> None:
        if not 1 <= reduction <= features:
            raise ValueError(f"reduction: expected 1 to {features}, the features, got {reduction!r}")
        body: list[nn.Module] = [ResidualGroup(features, blocks, reduction) for _ in range(groups)]
        super().__init__(scale, features, body, levels=levels, residual=residual)


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


MODELS: dict[str, Callable[..., nn.Module]] = {
    "fsrcnn": FSRCNN,
    "edsr": partial(EDSR, features=256, blocks=32, residual_scale=0.1),
    "edsr_baseline": EDSR,
    "rcan": RCAN,
}
"""The networks as functions of the number of classes, which means nothing to them, and of ``scale``."""
