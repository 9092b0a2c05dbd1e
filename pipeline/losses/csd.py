"""Contrastive self-distillation of networks that enlarge images, Wang et al., IJCAI 2021, arXiv:2105.11683.

The student is the first channels of a network, which learns with it and teaches it (``student.within``). In the
features φ of a frozen network, the student's image shall be near the whole network's, and far from bicubic
interpolation of other images.

B batch, C channels, H W space, K negatives, L levels, N rows of all ranks.
"""

from collections.abc import Sequence
from typing import Self

import torch
from pydantic import NonNegativeFloat, PositiveInt, model_validator
from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.bicubic import bicubic_upscaled
from pipeline.distributed.collectives import gather_rows, rank, world_size
from pipeline.features.names import OPTIONAL
from pipeline.features.taps import tap_shapes
from pipeline.losses._base import Facts, Loss, Taps
from pipeline.losses._extractor import ExtractorConfig, FrozenExtractor
from pipeline.losses._functional import sum_levels
from pipeline.losses._rows import in_global_order
from pipeline.losses._stages import channels
from pipeline.precision import checkpointed
from pipeline.tasks._high import HIGH, as_levels

_EPS = 1e-7
"""What the published code adds to the distance from the negatives."""
_FULL = "full"


def near_distance(student_BCHW: Tensor, whole_BCHW: Tensor) -> Tensor:
    """Return the mean absolute difference of both maps. No gradient reaches the whole network's."""
    return (student_BCHW - whole_BCHW.detach()).abs().mean()


def far_distance(student_BCHW: Tensor, negatives_NCHW: Tensor, rows_KB: Tensor) -> Tensor:
    """Return the mean absolute difference to a negative's map, summed over the K negatives ``rows_KB`` of each row."""
    # One negative of each row is in memory at a time, and the backward computes the differences again.
    return sum_levels([checkpointed(_distance_to, student_BCHW, negatives_NCHW, rows_B) for rows_B in rows_KB])


def _distance_to(student_BCHW: Tensor, negatives_NCHW: Tensor, rows_B: Tensor) -> Tensor:
    return (negatives_NCHW[rows_B] - student_BCHW).abs().mean()


def contrast_ratio(near_L: Tensor, far_L: Tensor, weights: Sequence[float]) -> Tensor:
    """Return Σ_l w_l · near_l / (far_l + ε) from the distances of each level over the global batch."""
    levels = zip(weights, near_L, far_L, strict=True)
    return sum_levels([weight * near / (far + _EPS) for weight, near, far in levels])


def find_negatives(ids_N: Tensor, negatives: int) -> Tensor:
    """Return the negatives of each row of a global batch, [K, N]: the next rows in the order of the ids, in a circle.

    No row is its own. Raises ValueError if there are fewer other rows than that.
    """
    count = len(ids_N)
    if count <= negatives:
        raise ValueError(
            f"csd: negatives: {negatives} other images are needed, and a micro-batch of all ranks has {count}; raise "
            "batch, or lower negatives"
        )
    order_N = ids_N.argsort(stable=True)
    place_N = torch.empty_like(order_N).scatter_(0, order_N, torch.arange(count, device=order_N.device))
    return order_N[(place_N + torch.arange(1, negatives + 1, device=order_N.device)[:, None]) % count]


class CSD(Loss):
    """The whole network's mean absolute error, and the contrast of both networks' images.

    The distances are those of the global batch, and of its micro-batch under gradient accumulation.
    """

    scope = "statistics"
    needs_teacher = False
    reads_labels = False
    targets = frozenset({HIGH})

    class Config(Loss.Config):
        """The config of CSD, such as ``{contrast_weight: 0.784, negatives: 10, phi: {weights: vgg19.pth}, …}``."""

        full_weight: NonNegativeFloat
        """Factor λ_t of the whole network's mean absolute error."""
        contrast_weight: NonNegativeFloat
        """Factor λ_c of the contrast; with 0 the network φ is not run."""
        level_weights: tuple[NonNegativeFloat, ...]
        """Factor of each tap of φ, the shallowest first."""
        negatives: PositiveInt
        """Other images of the global batch, K, from whose bicubic interpolation the student's image shall differ."""
        phi: ExtractorConfig
        """The frozen network whose features are compared."""
        normalize: bool = True
        """False for values of 0 … 255, as in the published code; true for the mean and std that φ was trained with."""

        @model_validator(mode="after")
        def _weighs_every_tap(self) -> Self:
            if len(self.level_weights) != len(self.phi.taps):
                raise ValueError(
                    f"level_weights: {len(self.level_weights)} numbers for the {len(self.phi.taps)} taps of phi, "
                    f"{', '.join(self.phi.taps)}; give one for each"
                )
            return self

        def taps(self) -> Taps:
            """Return the whole network's image, which the exported student has not."""
            return Taps(student=frozenset({_FULL + OPTIONAL}))

        def least_rows(self) -> int:
            """Return the number of an image and its negatives."""
            return 1 + self.negatives if self.contrast_weight else 1

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        shapes = facts.student_shapes
        if _FULL not in shapes:
            raise ValueError("csd: the student is no part of a network that could teach it; set student.within")
        assert facts.extractor is not None
        found = tap_shapes(facts.extractor, shapes[_FULL][1:])  # type: ignore[arg-type]
        for tap in config.phi.taps:
            channels(found, tap)
        self.extractor = FrozenExtractor(facts.extractor, config.phi, normalize=config.normalize)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the loss parts ``full`` and ``contrast``."""
        c, full_BCHW = self.config, student.features[_FULL]
        error = (full_BCHW - as_levels(batch.targets[HIGH], full_BCHW.dtype)).abs().mean()
        parts = {"full": c.full_weight * error}
        if c.contrast_weight:
            distances = self.distances(student.logits, full_BCHW, batch)
            parts["contrast"] = c.contrast_weight * contrast_ratio(*distances, c.level_weights)
        return parts

    def distances(self, student_BCHW: Tensor, full_BCHW: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the distances to the whole network's images and to the negatives, [L] each, over all ranks' rows.

        This is a collective: every rank must call it.
        """
        ids_N, low_NCHW = (in_global_order(gather_rows(x, equal=True)) for x in (batch.ids_B, batch.images_BCHW))
        # A rank has every W-th row of the global batch.
        rows_KB = find_negatives(ids_N, self.config.negatives)[:, rank() :: world_size()]
        ours = self.extractor(student_BCHW, self.facts.autocast)
        with torch.no_grad():
            theirs = self.extractor(full_BCHW, self.facts.autocast)
            scale = student_BCHW.shape[2] // low_NCHW.shape[2]
            large_NCHW = bicubic_upscaled(low_NCHW.to(student_BCHW.dtype), scale)
            negatives = self.extractor(large_NCHW, self.facts.autocast)
        near = [near_distance(*pair) for pair in zip(ours, theirs, strict=True)]
        far = [far_distance(*pair, rows_KB) for pair in zip(ours, negatives, strict=True)]
        # A ratio of means over all ranks, not a mean of ratios. One collective serves both.
        near_L, far_L = gather_rows(torch.stack([*near, *far])[None], equal=True).mean(0).chunk(2)
        return near_L, far_L
