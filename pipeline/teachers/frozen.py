"""The frozen teacher network. B batch, K classes, C channels, H W space."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.batch import Batch, Outputs
from pipeline.features.taps import FeatureTaps, tap_shapes
from pipeline.image_size import Resolution, height_width
from pipeline.models.folding import fold_batchnorms
from pipeline.tasks._boxes import DETECTIONS
from pipeline.teachers._base import TeacherModule
from pipeline.teachers.config import RGBTriple

TOLERANCE = 1e-3
"""Largest change of a tap by folding, relative to its largest value. Rounding changes 1e-6, a wrong fold about 1."""


class Normalization(NamedTuple):
    """The per-channel mean and standard deviation with which images in [0, 1] were normalised."""

    mean: RGBTriple
    std: RGBTriple


class Teacher(TeacherModule):
    """A frozen network in evaluation mode that returns ``Outputs`` for a batch.

    It runs in chunks of exactly ``batch`` images; the last chunk is padded, and its outputs are cut. So the last bits
    of the outputs do not depend on the caller's batch size. ``given`` is the normalisation of the input images,
    ``expected`` the one that the network was trained with. ``resize`` is the side in pixels to which the images are
    resized, None for none. Raises ValueError if folding changes more than rounding.
    """

    def __init__(
        self,
        taps: FeatureTaps,
        *,
        batch: int,
        image_size: Resolution,
        dtype: torch.dtype,
        device: torch.device,
        given: Normalization | None = None,
        expected: Normalization | None = None,
        fold: bool = True,
        resize: int | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.batch = batch
        self.dtype = dtype
        self.resize = resize
        self.autocast = autocast
        taps.requires_grad_(False).eval()
        self.norms = taps.norms()  # before folding, which merges these BatchNorms into convolutions
        head = taps.linear_head()
        self.head_KD = head and head.weight.detach().to(device, torch.float32, copy=True)
        if fold:
            _fold(taps, image_size)
        self.taps = taps.to(device, dtype)
        # channels_last is faster, by a quarter on a CPU. It is always used, because the last bits depend on it, too.
        self.taps.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.renormalization = None
        if given and expected and given != expected:
            self.renormalization = tuple(x.to(device) for x in _renormalization(given, expected))

    def forward(self, batch: Batch) -> Outputs:
        """Return the outputs for ``batch.images_BCHW`` in the teacher's precision, as ordinary tensors."""
        images_BCHW = self._prepared(batch.images_BCHW)
        autocast = torch.autocast(images_BCHW.device.type, self.autocast, enabled=self.autocast is not None)
        # Every forward has exactly self.batch images: kernels are chosen by the shape of their input, and different
        # kernels round differently. With one shape, a cache, a live teacher and any number of ranks give the same bits.
        with torch.inference_mode(), autocast:
            chunks = [self.taps(*chunk) for chunk in self._chunks(images_BCHW, batch.targets)]
        # torch.cat copies, even a single chunk. It runs outside of inference mode, because autograd refuses to save
        # tensors of that mode for the backward of a loss.
        rows = len(batch.images_BCHW)
        features = {name: torch.cat([chunk.features[name] for chunk in chunks])[:rows] for name in chunks[0].features}
        return Outputs(torch.cat([chunk.logits for chunk in chunks])[:rows], features)

    def shapes(self, image_size: Resolution) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tap and of the logits, without the batch, on images of that size."""
        return tap_shapes(self.taps, self.resize or image_size)

    def train(self, mode: bool = True) -> Teacher:
        """Stay in evaluation mode, also when ``train()`` of a parent module is called."""
        return super().train(False)

    def _chunks(
        self, images_BCHW: Tensor, targets: Mapping[str, Tensor]
    ) -> Iterator[tuple[Tensor, dict[str, Tensor] | None]]:
        """Yield the prepared images chunk by chunk, each with its targets for a network that takes some, or None."""
        takes_targets = getattr(self.taps.model, "takes_targets", False)
        padded = {name: _pad_to_multiple(x, self.batch) for name, x in targets.items()} if takes_targets else None
        for start in range(0, len(images_BCHW), self.batch):
            rows = slice(start, start + self.batch)
            yield images_BCHW[rows], padded and {name: x[rows] for name, x in padded.items()}

    def _prepared(self, images_BCHW: Tensor) -> Tensor:
        """Return the images in the network's normalisation, precision, size and memory format, in complete chunks."""
        if self.renormalization is not None:
            scale_C11, shift_C11 = self.renormalization
            images_BCHW = images_BCHW * scale_C11 + shift_C11
        # Padding rows cannot change the others: in evaluation mode, no layer mixes the rows of a batch.
        images_BCHW = _pad_to_multiple(images_BCHW, self.batch)
        if self.resize is not None:  # in chunks, like the forward, because kernels are chosen by the shape
            resized = [_resize(chunk, self.resize) for chunk in images_BCHW.split(self.batch)]
            images_BCHW = torch.cat(resized)
        return images_BCHW.to(self.dtype, memory_format=torch.channels_last)


def _pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Return the tensor with rows of zeros behind its own, so that their number is a multiple of ``multiple``."""
    padding = -len(x) % multiple
    return F.pad(x, (0, 0) * (x.ndim - 1) + (0, padding)) if padding else x


def _resize(images_BCHW: Tensor, size: int) -> Tensor:
    """Return the images with sides of ``size`` pixels."""
    return F.interpolate(images_BCHW, (size, size), mode="bilinear", antialias=True, align_corners=False)


def _renormalization(given: Normalization, expected: Normalization) -> tuple[Tensor, Tensor]:
    """Return (scale, shift), each [C, 1, 1], that turn images normalised as ``given`` into ``expected`` ones."""
    given_mean, given_std = (torch.tensor(x, dtype=torch.float64).view(-1, 1, 1) for x in given)
    mean, std = (torch.tensor(x, dtype=torch.float64).view(-1, 1, 1) for x in expected)
    return (given_std / std).float(), ((given_mean - mean) / std).float()


@torch.no_grad()
def _fold(taps: FeatureTaps, image_size: Resolution) -> None:
    """Fold the BatchNorms of ``taps.model`` into its convolutions.

    Raises ValueError if a tap or the logits change by more than ``TOLERANCE``.
    """
    weight = next(taps.parameters())
    image_1CHW = torch.randn(1, 3, *height_width(image_size), generator=torch.Generator().manual_seed(0)).to(weight)
    before = taps(image_1CHW)
    fold_batchnorms(taps.model, image_1CHW, spared=taps.tapped_modules())
    after = taps(image_1CHW)
    logits = {"logits": before.logits} if before.logits.numel() else {}  # none without a head
    for name, value in {**before.features, **logits}.items():
        # Rounding may change the order of boxes, and so the choice of regions; both follow from what is compared.
        if name == DETECTIONS or name.startswith("roi.") or (name == "logits" and "roi.class" in taps.stages):
            continue
        new = after.logits if name == "logits" else after.features[name]
        change = ((new - value).abs().max() / value.abs().max().clamp_min(1e-12)).item()
        if not change <= TOLERANCE:  # written like this, because a NaN must fail, too
            raise ValueError(f"teacher: folding BatchNorm changes {name} by {change:.0e} of its size; set fold: false")
