"""What stands between a pair of taps and their distance in DiffKD and DDKD: networks, random draws and precision.

B batch, C channels of the latent, H W space, T time steps. Eq. numbers as in ``equations.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pipeline.diffusion.config import Diffusion
from pipeline.diffusion.convolution import Convolution, batched_weight_grad
from pipeline.diffusion.equations import denoise, diffusion_loss, match_noise, reconstruction_loss
from pipeline.diffusion.networks import Autoencoder, NoiseAdapter, NoisePredictor
from pipeline.precision import autocast_call, checkpointed


class Draws(NamedTuple):
    """A step's random numbers, in the order they are drawn."""

    start_noise_BCHW: Tensor
    """ε of eq. 9, for the student."""
    train_noise_BCHW: Tensor
    """ε of eq. 5, for the teacher."""
    train_t_B: Tensor


class Denoised(NamedTuple):
    """What a denoiser answers."""

    student_BCHW: Tensor
    target_BCHW: Tensor
    """The teacher's latent, or without an autoencoder the teacher's tensor; without gradient."""
    diffusion_loss: Tensor
    autoencoder_loss: Tensor | None
    gamma_B: Tensor
    """Share of the student's tensor where the sampler starts."""


class Denoiser(nn.Module):
    """Denoises a student's tensor with a diffusion model that it trains on the teacher's.

    A distance between what it answers trains all of it but the autoencoder; its diffusion loss trains the noise
    predictor alone, its reconstruction loss the autoencoder alone. Networks run under ``autocast``, formulas never do.
    """

    def __init__(
        self,
        diffusion: Diffusion,
        student_channels: int,
        latent: int,
        *,
        predictor: nn.Module,
        adapter: nn.Module,
        autoencoder: Autoencoder | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.diffusion, self.autocast = diffusion, autocast
        self.autoencoder = autoencoder
        self.projection = Convolution(student_channels, latent)
        self.adapter = NoiseAdapter(adapter, latent)
        self.predictor = NoisePredictor(predictor, latent, diffusion.time_rows)
        # Not in the papers but in the published networks; its norm takes back the factor 2.27 that sampling gives.
        self.output = nn.Sequential(Convolution(latent, latent), diffusion.norm(latent))
        if diffusion.compile and self.projection.weight.device.type != "meta":  # where operations are counted
            for network in (self.predictor, self.adapter):
                network.compile(dynamic=False)  # in place, as the student is
        # Not a buffer: in half, to which a module's buffers are cast, 1 − ᾱ₀ is zero.
        self.alpha_bars_T = diffusion.alpha_bars()
        self.alpha_bars: list[float] = self.alpha_bars_T.tolist()

    def forward(self, student_BCHW: Tensor, teacher_BCHW: Tensor, draws: Draws | None = None) -> Denoised:
        """Return the denoised student, its target and the losses that train the networks.

        Both tensors have the same height and width. Draws that are not given come from torch's default generators.
        Raises ValueError where a norm would see a single value.
        """
        alpha_bars_T = self.alpha_bars_on(student_BCHW.device)
        target, autoencoder_loss = self.encode(teacher_BCHW.detach())
        draws = draws or self.draw(target)
        feature = self.autocast_call(self.projection, student_BCHW)
        gamma_B = self.autocast_call(self.adapter, feature).softmax(1)[:, 0]
        start = match_noise(feature, draws.start_noise_BCHW, gamma_B, self.diffusion.mixing)
        with batched_weight_grad(self.predictor, self.passes):
            denoised = denoise(self.predict_for_distance, start, self.diffusion.sampled, self.alpha_bars)
            loss = diffusion_loss(self.predict, target, draws.train_noise_BCHW, draws.train_t_B, alpha_bars_T)
        return Denoised(self.autocast_call(self.output, denoised), target, loss, autoencoder_loss, gamma_B)

    def encode(self, teacher_BCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the teacher's latent, without gradient, and the autoencoder's loss."""
        if self.autoencoder is None:
            return teacher_BCHW, None
        latent = self.autocast_call(self.autoencoder["encoder"], teacher_BCHW)
        rebuilt = self.autocast_call(self.autoencoder["decoder"], latent)
        return latent.detach(), reconstruction_loss(rebuilt, teacher_BCHW)

    def draw(self, target_BCHW: Tensor) -> Draws:
        """Return a step's draws from torch's default generator of the device."""
        t_max = self.diffusion.t_max or self.diffusion.time_steps
        noises = _noise_like(target_BCHW), _noise_like(target_BCHW)
        return Draws(*noises, torch.randint(t_max, (len(target_BCHW),), device=target_BCHW.device))

    @property
    def passes(self) -> int:
        """How many passes of Φ share one gradient of its weights; 0 where each has its own.

        On a CPU alone: all passes' inputs and gradients are kept until then, and a GPU's many rows gain little.
        """
        one_by_one = self.diffusion.detach_predictor or self.diffusion.checkpoint or self.diffusion.compile
        weights = list(self.predictor.parameters())
        whole = all(weight.numel() for weight in weights)  # ZeRO-3 lends them pass by pass
        return self.diffusion.sampler_steps + 1 if weights[0].device.type == "cpu" and whole and not one_by_one else 0

    def predict(self, y_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """Return Φ(y, t)."""
        return self.autocast_call(self.predictor, y_BCHW, t_B)

    def predict_for_distance(self, y_BCHW: Tensor, _t: int) -> Tensor:
        """Return Φ(y, t) for one t, which does not count; under ``detach_predictor`` Φ's parameters are constants."""
        network: Callable[[Tensor], Tensor] = self.predictor
        if self.diffusion.detach_predictor:
            constants = {name: parameter.detach() for name, parameter in self.predictor.named_parameters()}
            network = partial(functional_call, self.predictor, constants)
        if self.diffusion.checkpoint:
            return checkpointed(partial(self.autocast_call, network), y_BCHW)
        return self.autocast_call(network, y_BCHW)

    def autocast_call(self, network: Callable[..., Tensor], x: Tensor, *more: Tensor) -> Tensor:
        """Return the network's answer, computed under the recipe's autocast, in the dtype of ``x``."""
        return autocast_call(self.autocast, network, x, *more)

    def alpha_bars_on(self, device: torch.device) -> Tensor:
        """Return ᾱ on that device, kept there for the next step."""
        if self.alpha_bars_T.device != device:
            self.alpha_bars_T = self.alpha_bars_T.to(device)
        return self.alpha_bars_T


def _noise_like(x_BCHW: Tensor) -> Tensor:
    """Return normal noise shaped as ``x``, the same for any layout of it."""
    # Along the channels of a pixel, as the networks' maps lie: a CPU is many times as quick to fill what is in a row.
    return torch.randn_like(x_BCHW.movedim(1, -1), memory_format=torch.contiguous_format).movedim(-1, 1)
