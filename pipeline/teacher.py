"""The frozen network that is learned from."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.batch import Batch, Outputs
from pipeline.models.folding import fold_batchnorms
from pipeline.taps import FeatureTaps

TOLERANCE = 1e-3
"""Largest change of a tap by folding, relative to its largest value. Rounding changes 1e-6, a wrong fold about 1."""

Triple = tuple[float, float, float]


class Config(BaseModel):
    """The recipe's ``teacher``: a network with its weights, or the student of another recipe's run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = None
    """A name that ``create_model`` knows, or a user's own factory as ``package.module:factory``."""
    weights: str | None = None
    """A ``.pt``, ``.pth`` or ``.safetensors`` file, or the name of torchvision weights, such as IMAGENET1K_V1."""
    recipe: str | None = None
    """Instead of ``model`` and ``weights``: the recipe whose run gives the network, its weights, mean and std."""
    stages: dict[str, str] | None = None
    """Module path by canonical stage name, for a network whose stages the project does not know."""
    batch: PositiveInt | None = None
    """Images of one forward, whatever the batch; default: a rank's rows in the run's first start."""
    dtype: Literal["auto", "fp16", "bf16", "fp32"] = "auto"
    """``auto`` is fp16 on a GPU and fp32 on a CPU."""
    fold: bool = True
    """Whether BatchNorm is folded into the convolution before it."""
    mean: Triple | None = None
    """What the teacher's training images were normalised with; default: the recipe's own."""
    std: Triple | None = None
    expect_top1: float | None = Field(default=None, ge=0, le=100)
    """Percent on the validation images below which the run does not begin."""

    @model_validator(mode="after")
    def _one_source(self) -> Config:
        by_recipe = self.recipe is not None and self.model is None
        by_model = self.recipe is None and self.model is not None and self.weights is not None
        if not (by_recipe or by_model):
            raise ValueError("give either model and weights (a file, or a name such as IMAGENET1K_V1), or recipe")
        return self

    def torch_dtype(self, device: torch.device) -> torch.dtype:
        """Return the precision the teacher computes in on ``device``."""
        if self.dtype == "auto":
            return torch.float16 if device.type == "cuda" else torch.float32
        return {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[self.dtype]


class Normalization(NamedTuple):
    """Per-channel mean and standard deviation that images in [0, 1] were brought to zero and one with."""

    mean: Triple
    std: Triple


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
    ) -> None:
        super().__init__()
        self.batch = batch
        self.dtype = dtype
        taps.requires_grad_(False).eval()
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
        with torch.inference_mode(), torch.autocast(images_BCHW.device.type, enabled=False):
            chunks = [self.taps(chunk) for chunk in images_BCHW.split(self.batch)]
        # Copied outside of inference mode: autograd refuses to save that mode's own tensors for a loss's backward.
        rows = len(batch.images_BCHW)
        features = {name: torch.cat([chunk.features[name] for chunk in chunks])[:rows] for name in chunks[0].features}
        return Outputs(torch.cat([chunk.logits_BK for chunk in chunks])[:rows], features)

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
