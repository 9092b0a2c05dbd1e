"""What is learned from: a frozen network, several of them, or the student's own moving average.

M members, B batch, K classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.batch import Batch, Outputs
from pipeline.features.taps import FeatureTaps, tap_shapes
from pipeline.models.folding import fold_batchnorms
from pipeline.teachers.config import _Triple

TOLERANCE = 1e-3
"""Largest change of a tap by folding, relative to its largest value. Rounding changes 1e-6, a wrong fold about 1."""


class Normalization(NamedTuple):
    """Per-channel mean and standard deviation that images in [0, 1] were brought to zero and one with."""

    mean: _Triple
    std: _Triple


class Teacher(nn.Module):
    """A network that answers ``Outputs`` for a batch and never changes: frozen, in evaluation mode.

    It runs in chunks of exactly ``batch`` images, the last one padded and cut: the last bits of an answer depend on the
    batch size, and so not on the caller's. ``given`` is the normalisation of the images that come, ``expected`` the one
    it was trained with. Raises ValueError where folding changes more than rounding.
    """

    def __init__(
        self,
        taps: FeatureTaps,
        *,
        batch: int,
        image_size: int,
        dtype: torch.dtype,
        device: torch.device,
        given: Normalization | None = None,
        expected: Normalization | None = None,
        fold: bool = True,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.batch = batch
        self.dtype = dtype
        self.autocast = autocast
        taps.requires_grad_(False).eval()
        self.norms = taps.norms()
        if fold:
            _fold(taps, image_size)
        self.taps = taps.to(device, dtype)
        # The faster layout, on a CPU by a quarter; and always the same one, since the last bits depend on it too.
        self.taps.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.renormalization = None
        if given and expected and given != expected:
            self.renormalization = tuple(x.to(device) for x in _renormalization(given, expected))

    def forward(self, batch: Batch) -> Outputs:
        """Return the answers for ``batch.images_BCHW`` in the teacher's precision, as ordinary tensors."""
        images_BCHW = self._prepared(batch.images_BCHW)
        autocast = torch.autocast(images_BCHW.device.type, self.autocast, enabled=self.autocast is not None)
        with torch.inference_mode(), autocast:
            chunks = [self.taps(chunk) for chunk in images_BCHW.split(self.batch)]
        # Copied outside of inference mode: autograd refuses to save that mode's own tensors for a loss's backward.
        rows = len(batch.images_BCHW)
        features = {name: torch.cat([chunk.features[name] for chunk in chunks])[:rows] for name in chunks[0].features}
        return Outputs(torch.cat([chunk.logits_BK for chunk in chunks])[:rows], features)

    def shapes(self, image_size: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tap and of the logits, without the batch, on images of that size."""
        return tap_shapes(self.taps, image_size)

    def train(self, mode: bool = True) -> Teacher:
        """Stay in evaluation mode, whatever ``mode`` a module around it is put in."""
        return super().train(False)

    def _prepared(self, images_BCHW: Tensor) -> Tensor:
        """Return the images as the network wants them: its normalisation, precision and layout, and whole chunks."""
        if self.renormalization is not None:
            scale_C11, shift_C11 = self.renormalization
            images_BCHW = images_BCHW * scale_C11 + shift_C11
        if lacking := -len(images_BCHW) % self.batch:
            images_BCHW = F.pad(images_BCHW, (0, 0, 0, 0, 0, 0, 0, lacking))
        return images_BCHW.to(self.dtype, memory_format=torch.channels_last)


def _renormalization(given: Normalization, expected: Normalization) -> tuple[Tensor, Tensor]:
    """Return (scale, shift), each [C, 1, 1], that turn images normalised as ``given`` into ``expected`` ones."""
    given_mean, given_std = (torch.tensor(x, dtype=torch.float64).view(-1, 1, 1) for x in given)
    mean, std = (torch.tensor(x, dtype=torch.float64).view(-1, 1, 1) for x in expected)
    return (given_std / std).float(), ((given_mean - mean) / std).float()


@torch.no_grad()
def _fold(taps: FeatureTaps, image_size: int) -> None:
    """Fold the BatchNorms of ``taps.model`` and make sure that every tap and the logits stay what they were."""
    weight = next(taps.parameters())
    image_1CHW = torch.randn(1, 3, image_size, image_size, generator=torch.Generator().manual_seed(0)).to(weight)
    before = taps(image_1CHW)
    fold_batchnorms(taps.model, image_1CHW, spared=taps.tapped_modules())
    after = taps(image_1CHW)
    for name, value in {**before.features, "logits": before.logits_BK}.items():
        new = after.logits_BK if name == "logits" else after.features[name]
        change = ((new - value).abs().max() / value.abs().max().clamp_min(1e-12)).item()
        if not change <= TOLERANCE:
            raise ValueError(f"teacher: folding BatchNorm changes {name} by {change:.0e} of its size; set fold: false")
