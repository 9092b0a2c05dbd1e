"""The denoiser's networks, as published with DiffKD: Huang et al., NeurIPS 2023, arXiv:2305.15712.

B batch, C channels, H W space, K classes.
"""

from __future__ import annotations

from torch import Tensor, nn

from pipeline.diffusion.convolution import Convolution
from pipeline.distributed.norms import NormFactory


class Bottleneck(nn.Module):
    """A residual block x + block(x): 1×1 to fewer channels, 3×3, 1×1 back; no ReLU after the sum."""

    def __init__(self, channels: int, reduction: int, norm: NormFactory) -> None:
        super().__init__()
        inner = max(channels // reduction, 1)
        self.block = nn.Sequential(
            *(Convolution(channels, inner), norm(inner), nn.ReLU()),
            *(Convolution(inner, inner, 3), norm(inner), nn.ReLU()),
            *(Convolution(inner, channels), norm(channels)),
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return x + block(x)."""
        return x_BCHW + self.block(x_BCHW)


class Autoencoder(nn.ModuleDict):
    """A linear autoencoder: a 1×1 convolution to the latent's channels, and one back.

    The encoder's norm gives the latent unit variance, the same as the noise that is added to it.
    """

    def __init__(self, channels: int, latent: int, norm: NormFactory) -> None:
        encoder = nn.Sequential(Convolution(channels, latent), norm(latent))
        super().__init__({"encoder": encoder, "decoder": Convolution(latent, channels)})


class NoisePredictor(nn.Module):
    """The noise predictor Φ(y, t). A learned number per channel, looked up by the time step, is added to y.

    In every step of the sampler all rows have the same t, so a constant is added to each channel. The BatchNorm after
    each convolution removes a constant. There Φ does not depend on t, and does not read it.
    """

    def __init__(self, network: nn.Module, channels: int, time_rows: int) -> None:
        super().__init__()
        self.time_embedding = nn.Embedding(time_rows, channels)
        self.network = network

    def forward(self, y_BCHW: Tensor, t_B: Tensor | None = None) -> Tensor:
        """Return the predicted noise in the shape of ``y``. Leave out ``t_B`` if all rows share one time step."""
        embedded = y_BCHW if t_B is None else y_BCHW + self.time_embedding(t_B)[:, :, None, None]
        return self.network(embedded)


class NoiseAdapter(nn.Module):
    """A network that weighs the student's tensor against noise: two logits per row, whose softmax is (γ, 1 − γ)."""

    def __init__(self, network: nn.Module, channels: int) -> None:
        super().__init__()
        self.network = network
        self.linear = nn.Linear(channels, 2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the two logits [B, 2]."""
        return self.linear(self.network(x_BCHW).mean((2, 3)))


def map_predictor(channels: int, reduction: int, norm: NormFactory) -> nn.Sequential:
    """Return Φ's network for maps: two bottlenecks, a 1×1 convolution and a norm."""
    bottlenecks = (Bottleneck(channels, reduction, norm), Bottleneck(channels, reduction, norm))
    return nn.Sequential(*bottlenecks, Convolution(channels, channels), norm(channels))


def logit_predictor(channels: int, expansion: int, norm: NormFactory) -> nn.Sequential:
    """Return Φ's network for logits [B, K, 1, 1]: two expanding blocks, the second without a final norm."""
    return nn.Sequential(*_expanding(channels, expansion, norm), norm(channels), *_expanding(channels, expansion, norm))


def logit_adapter(channels: int, expansion: int, norm: NormFactory) -> nn.Sequential:
    """Return the adapter's network for logits [B, K, 1, 1]: one expanding block."""
    return nn.Sequential(*_expanding(channels, expansion, norm), norm(channels))


def _expanding(channels: int, expansion: int, norm: NormFactory) -> list[nn.Module]:
    """Return the layers of an expanding block without its final norm: 1×1 to more channels, norm, ReLU, 1×1 back."""
    wide = channels * expansion
    return [Convolution(channels, wide), norm(wide), nn.ReLU(), Convolution(wide, channels)]
