"""The denoiser of DiffKD and DDKD: its networks, random draws and precision.

It takes a tap of the student and one of the teacher, and returns the tensors whose distance is the loss.

B batch, C channels of the latent, H W space, T time steps. Equation numbers are those of ``equations.py``.
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
    """The random numbers of one step, in the order they are drawn."""

    start_noise_BCHW: Tensor
    """ε of eq. 9, mixed into the student's tensor."""
    train_noise_BCHW: Tensor
    """ε of eq. 5, added to the teacher's tensor."""
    train_t_B: Tensor
    """Time step of each row in the diffusion loss."""


class Denoised(NamedTuple):
    """The outputs of a denoiser."""

    student_BCHW: Tensor
    """The student's tensor after denoising."""
    target_BCHW: Tensor
    """The teacher's latent, without gradient; the teacher's tensor if there is no autoencoder."""
    diffusion_loss: Tensor
    autoencoder_loss: Tensor | None
    gamma_B: Tensor
    """Weight of the student's tensor at the sampler's start."""


class Denoiser(nn.Module):
    """A module that denoises the student's tensor with a diffusion model trained on the teacher's tensor.

    A distance between ``student_BCHW`` and ``target_BCHW`` trains everything except the autoencoder. The diffusion loss
    trains only the noise predictor, the reconstruction loss only the autoencoder. Networks run under ``autocast``,
    formulas never do.
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
        # Not in the papers, but in the published networks. Its norm undoes the factor 2.27 by which sampling scales.
        self.output = nn.Sequential(Convolution(latent, latent), diffusion.norm(latent))
        # A module on the meta device is only built to count its operations, which needs no compiled code.
        if diffusion.compile and self.projection.weight.device.type != "meta":
            for network in (self.predictor, self.adapter):
                # Compiled in place, like the student, because torch.compile(network) would change parameter names.
                network.compile(dynamic=False)
        # Not a buffer: buffers are cast with their module, and in half precision 1 − ᾱ₀ is zero.
        self.alpha_bars_T = diffusion.alpha_bars()
        # The same numbers on the host: the sampler needs them as floats, and reading a GPU tensor would synchronise.
        self.alpha_bars: list[float] = self.alpha_bars_T.tolist()

    def forward(self, student_BCHW: Tensor, teacher_BCHW: Tensor, draws: Draws | None = None) -> Denoised:
        """Return the denoised student tensor, its target, and the losses that train the networks.

        Both tensors have the same height and width. Without ``draws``, torch's default generators are used.
        Raises ValueError if a BatchNorm would see a single value.
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
        """Return the teacher's latent, without gradient, and the reconstruction loss.

        Without an autoencoder these are the teacher's tensor and None.
        """
        if self.autoencoder is None:
            return teacher_BCHW, None
        latent = self.autocast_call(self.autoencoder["encoder"], teacher_BCHW)
        rebuilt = self.autocast_call(self.autoencoder["decoder"], latent)
        # Detached, so that only the reconstruction loss trains the autoencoder.
        return latent.detach(), reconstruction_loss(rebuilt, teacher_BCHW)

    def draw(self, target_BCHW: Tensor) -> Draws:
        """Return the draws of one step, from torch's default generator of the target's device."""
        t_max = self.diffusion.t_max or self.diffusion.time_steps
        noises = _noise_like(target_BCHW), _noise_like(target_BCHW)
        return Draws(*noises, torch.randint(t_max, (len(target_BCHW),), device=target_BCHW.device))

    @property
    def passes(self) -> int:
        """Number of passes of Φ that share one weight gradient; 0 if each pass computes its own.

        Sharing is used on a CPU only. It keeps the inputs and gradients of all passes until the last one, and with a
        GPU's many rows it gains little.
        """
        # Sharing needs every pass to run the same weights in the same way. ``detach_predictor`` gives the sampler's
        # passes constant weights, ``checkpoint`` runs passes again in backward, ``compile`` replaces the forward.
        separate = self.diffusion.detach_predictor or self.diffusion.checkpoint or self.diffusion.compile
        weights = list(self.predictor.parameters())
        # Under ZeRO-3 a parameter is empty outside its module's own forward and backward.
        unpartitioned = all(weight.numel() for weight in weights)
        shared = weights[0].device.type == "cpu" and unpartitioned and not separate
        # One more than the sampler's: the pass of the diffusion loss.
        return self.diffusion.sampler_steps + 1 if shared else 0

    def predict(self, y_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """Return Φ(y, t)."""
        return self.autocast_call(self.predictor, y_BCHW, t_B)

    def predict_for_distance(self, y_BCHW: Tensor, _t: int) -> Tensor:
        """Return Φ(y, t) for one t in all rows, on which it does not depend (``NoisePredictor``).

        With ``detach_predictor``, Φ's parameters are constants.
        """
        network: Callable[[Tensor], Tensor] = self.predictor
        if self.diffusion.detach_predictor:
            # The gradient must still reach y, and through it the student. So the parameters are detached, not the call.
            constants = {name: parameter.detach() for name, parameter in self.predictor.named_parameters()}
            network = partial(functional_call, self.predictor, constants)
        if self.diffusion.checkpoint:
            return checkpointed(partial(self.autocast_call, network), y_BCHW)
        return self.autocast_call(network, y_BCHW)

    def autocast_call(self, network: Callable[..., Tensor], x: Tensor, *more: Tensor) -> Tensor:
        """Return the network's output under the recipe's autocast, cast back to the dtype of ``x``."""
        return autocast_call(self.autocast, network, x, *more)

    def alpha_bars_on(self, device: torch.device) -> Tensor:
        """Return ᾱ on ``device``. The copy is kept for the next steps."""
        if self.alpha_bars_T.device != device:
            self.alpha_bars_T = self.alpha_bars_T.to(device)
        return self.alpha_bars_T


def _noise_like(x_BCHW: Tensor) -> Tensor:
    """Return normal noise in the shape of ``x``; the numbers do not depend on the memory format of ``x``."""
    # Filled in channels-last order, the memory format of the networks' maps: a CPU fills contiguous memory much faster.
    return torch.randn_like(x_BCHW.movedim(1, -1), memory_format=torch.contiguous_format).movedim(-1, 1)
