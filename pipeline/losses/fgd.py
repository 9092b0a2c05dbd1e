"""FGD: focal and global knowledge distillation for detectors, Yang et al., CVPR 2022, arXiv:2111.11837.

The focal part weighs the squared differences of a map by the teacher's attention. It separates the pixels in boxes,
where small boxes count as much as large ones, from the background. The global part compares the maps after each has
been given its context by a block of GCNet (Cao et al., 2019, arXiv:1904.11492).

    L = α·Σ f·S·A·(ΔF)² + β·Σ b·S·A·(ΔF)² + γ·(Σ|ΔS| + Σ|ΔA|) + λ·Σ(ΔR)², averaged over the images, summed over levels

B batch, N objects of an image at most, C channels, H W space.
"""

import math
from typing import NamedTuple

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor, nn

from pipeline.batch import Batch, Outputs
from pipeline.losses._base import Facts
from pipeline.losses._connectors import AlignedMapLoss, channel_connector
from pipeline.losses._stages import StageChoices, channels
from pipeline.tasks._boxes import BOXES, CLASSES, CROWD


class Attention(NamedTuple):
    """Where a map is large, with a mean of one over the pixels and one over the channels."""

    pixels_BHW: Tensor
    """S of the paper."""
    channels_BC: Tensor
    """A of the paper."""


def attention_of(map_BCHW: Tensor, temperature: float) -> Attention:
    """Return the softmax of |F|/T, averaged over channels or over pixels, × the number of its entries."""
    size_BCHW = map_BCHW.abs() / temperature
    pixels_BP, channels_BC = size_BCHW.mean(1).flatten(1), size_BCHW.mean((2, 3))
    pixels_BP = pixels_BP.shape[1] * pixels_BP.softmax(1)
    return Attention(pixels_BP.view_as(size_BCHW[:, 0]), channels_BC.shape[1] * channels_BC.softmax(1))


def box_weights(boxes_BN4: Tensor, real_BN: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the weights f and b [B, H, W] of foreground and background; ``boxes_BN4`` are in pixels of the map.

    A box covers the pixels from its rounded down left and top to its rounded up right and bottom, both included. There
    f is one over their number, of the smallest box. Elsewhere b is one over the number of the other pixels.
    """
    left_BN, top_BN = boxes_BN4[..., 0].floor(), boxes_BN4[..., 1].floor()
    right_BN, bottom_BN = boxes_BN4[..., 2].ceil(), boxes_BN4[..., 3].ceil()
    columns_BNW = _between(left_BN, right_BN, width)
    rows_BNH = _between(top_BN, bottom_BN, height) & real_BN[..., None]
    share_BN = 1 / ((bottom_BN - top_BN + 1) * (right_BN - left_BN + 1))
    inside_BNHW = rows_BNH[..., None] & columns_BNW[..., None, :]
    foreground_BHW = (inside_BNHW * share_BN[..., None, None]).amax(1)
    outside_BHW = (foreground_BHW == 0).to(foreground_BHW.dtype)
    return foreground_BHW, outside_BHW / outside_BHW.sum((1, 2), keepdim=True).clamp(min=1)


def _between(first_BN: Tensor, last_BN: Tensor, count: int) -> Tensor:
    """Return whether each of ``count`` places is in the range, both ends included, as [B, N, count]."""
    places = torch.arange(count, device=first_BN.device)
    return (places >= first_BN[..., None]) & (places <= last_BN[..., None])


def stride_of(images: tuple[int, int], maps: tuple[int, int]) -> int:
    """Return the power of two that is nearest to the images' height over the map's, which may be rounded up."""
    return 2 ** round(math.log2(images[0] / maps[0]))


class GlobalContext(nn.Module):
    """A block that computes what is added to every pixel of a map: its pooled context, through two convolutions.

    The last convolution is zero at the start, so that the maps are compared as they are at first.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = max(width // 2, 1)
        # Published code has a bias here, which the softmax over the pixels takes away again.
        self.scores = nn.Conv2d(width, 1, 1, bias=False)
        self.transform = nn.Sequential(
            *(nn.Conv2d(width, inner, 1), nn.LayerNorm([inner, 1, 1]), nn.ReLU(), nn.Conv2d(inner, width, 1))
        )
        nn.init.kaiming_normal_(self.scores.weight)
        for parameter in self.transform[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, map_BCHW: Tensor) -> Tensor:
        """Return the context [B, C, 1, 1]."""
        weights_BP1 = self.scores(map_BCHW).flatten(2).softmax(2).mT
        return self.transform((map_BCHW.flatten(2) @ weights_BP1)[..., None])


class FGD(AlignedMapLoss):
    """Differences of a detector's maps, weighed by boxes and attention, and of their global context.

    The sums grow with the images' area, so the weights depend on it. Crowd boxes are background, as those of no class.
    """

    reads_labels = False
    targets = frozenset({BOXES, CLASSES, CROWD})

    class Config(AlignedMapLoss.Config):
        """The config of FGD; ``configs/methods/fgd.yaml`` has the published values."""

        stages: StageChoices = ("fpn",)
        """Stages of both networks whose maps are compared."""
        temperature: PositiveFloat
        """Temperature T of the attention."""
        foreground: NonNegativeFloat
        """α, the weight of the differences in boxes."""
        background: NonNegativeFloat
        """β, the weight of the differences outside."""
        attention: NonNegativeFloat
        """γ, the weight of the attention's own differences."""
        relation: NonNegativeFloat
        """λ, the weight of the differences of the maps with their context."""

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        widths = [channels(facts.teacher_shapes, teacher) for _, teacher in self.levels]
        networks = ("student", "teacher")
        self.contexts = nn.ModuleList(nn.ModuleDict({name: GlobalContext(c) for name in networks}) for c in widths)

    def connector(self, student: str, teacher: str) -> nn.Module:
        """Return the network that brings the student's tap to the teacher's channels; its convolution has a bias."""
        return channel_connector(self.facts, student, teacher, bias=True)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the loss parts ``foreground``, ``background``, ``attention`` and ``relation``."""
        c, pairs = self.config, self.aligned_maps(student, teacher)
        levels = [
            self.level_sums(*pair, blocks, batch)  # type: ignore[arg-type]
            for pair, blocks in zip(pairs, self.contexts, strict=True)
        ]
        sums = torch.stack(levels).sum(0) / len(batch.labels_B)
        weights = {name: getattr(c, name) for name in ("foreground", "background", "attention", "relation")}
        return {name: weight * value for (name, weight), value in zip(weights.items(), sums, strict=True)}

    def level_sums(self, student_BCHW: Tensor, teacher_BCHW: Tensor, blocks: nn.ModuleDict, batch: Batch) -> Tensor:
        """Return the four sums of a level over all images, without their weights."""
        height, width = student_BCHW.shape[2:]
        stride = stride_of(batch.images_BCHW.shape[2:], (height, width))  # type: ignore[arg-type]
        boxes_BN4 = batch.targets[BOXES].to(student_BCHW.dtype) / stride
        real_BN = (batch.targets[CLASSES] >= 0) & ~batch.targets[CROWD]
        ours, theirs = (attention_of(x_BCHW, self.config.temperature) for x_BCHW in (student_BCHW, teacher_BCHW))
        squares_BCHW = (student_BCHW - teacher_BCHW).square() * theirs.channels_BC[..., None, None]
        weighed_BHW = squares_BCHW.sum(1) * theirs.pixels_BHW
        focal = [(mask_BHW * weighed_BHW).sum() for mask_BHW in box_weights(boxes_BN4, real_BN, height, width)]
        of_attention = torch.stack([(a - b).abs().sum() for a, b in zip(ours, theirs, strict=True)]).sum()
        contexts = [
            self.autocast_call(blocks[name], x_BCHW)
            for name, x_BCHW in (("student", student_BCHW), ("teacher", teacher_BCHW))
        ]
        relation = (student_BCHW - teacher_BCHW + (contexts[0] - contexts[1])).square().sum()
        return torch.stack([*focal, of_attention, relation])
