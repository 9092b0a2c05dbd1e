"""Be your own teacher, Zhang et al., ICCV 2019, arXiv:1905.08094.

Every stage but the last gets an exit: a classifier of its own. The exits learn from the labels, and from what the
network's end says and computes. No teacher is needed. The exported student has no exits; a run leaves them beside it
where ``export_exits`` says so.

B batch, C channels, D embedding, H W space, K classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor, nn

from pipeline.batch import Batch, Outputs
from pipeline.distributed.norms import NormFactory
from pipeline.features.names import numbered
from pipeline.losses._base import Facts, Taps
from pipeline.losses._connectors import ConnectorLoss
from pipeline.losses._functional import soft_cross_entropy
from pipeline.losses._stages import channels
from pipeline.losses.ce import label_cross_entropy


class ExitLosses(NamedTuple):
    """The losses of one exit, without their weights."""

    ce: Tensor
    """Cross-entropy with the labels."""
    kd: Tensor
    """T² times the cross-entropy with the softened probabilities of the network's end."""
    feature: Tensor
    """Squared distance to the network's embedding, summed over the numbers and averaged over the rows."""


def exit_losses(logits_BK: Tensor, feature_BD: Tensor, end: Outputs, batch: Batch, *, temperature: float) -> ExitLosses:
    """Return the losses of an exit. ``end`` has the network's logits and ``embedding``, which get no gradient."""
    p_BK = (end.logits_BK.detach() / temperature).softmax(1)
    kd = temperature**2 * soft_cross_entropy(p_BK, (logits_BK / temperature).log_softmax(1))
    distance = (feature_BD - end.features["embedding"].detach()).square().sum(1).mean()
    return ExitLosses(label_cross_entropy(logits_BK, batch, 0.0), kd, distance)


class BYOT(ConnectorLoss):
    """The losses of the exits: (1 − α)·CE, α·KD and β·the distance of the features, each summed over the exits.

    The cross-entropy of the network's own logits is the loss ``ce`` of the recipe, with the weight 1 − α.
    """

    needs_teacher = False
    mixed_labels = "soft"

    class Config(ConnectorLoss.Config):
        """The config of BYOT, such as ``{temperature: 3.0, alpha: 0.1, beta: 1.28e-4}``."""

        temperature: PositiveFloat
        """Temperature T of the softened probabilities."""
        alpha: float = Field(ge=0, le=1)
        """Share α of KD against the labels."""
        beta: NonNegativeFloat
        """Weight β of the distance between the features, which is averaged over the rows."""
        export_exits: bool = False
        """True to leave the exits in ``auxiliary.safetensors``, beside the student."""

        def taps(self) -> Taps:
            """Return the student's stages and its embedding."""
            return Taps(student=frozenset({"all", "embedding"}))

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        shapes = facts.student_shapes
        *self.stages, last = numbered(shapes)
        if not self.stages:
            raise ValueError("byot: the student has one stage, and each but the last gets an exit; give more stages")
        if len(shapes["embedding"]) != 1:
            raise ValueError(f"byot: the embedding is shaped {list(shapes['embedding'])}, but a vector is needed")
        channels(shapes, last)
        self.exits = nn.ModuleList(self._exit(stage, last) for stage in self.stages)
        self.exported = ("exits",) if config.export_exits else ()
        self.noted: list[Tensor] = []

    def _exit(self, stage: str, last: str) -> Exit:
        """Return the exit of a stage, whose map it brings to the size of the last one."""
        shapes, size = self.facts.student_shapes, self.facts.student_shapes[last][1:]
        width = channels(shapes, stage)
        if any(side % end for side, end in zip(shapes[stage][1:], size, strict=True)):
            sizes = " and ".join("×".join(map(str, sides)) for sides in (shapes[stage][1:], size))
            raise ValueError(
                f"byot: the maps of {stage} and {last} are {sizes}, and the first is no multiple; change data.size"
            )
        kernel = (shapes[stage][1] // size[0], shapes[stage][2] // size[1])
        return Exit(width, shapes["embedding"][0], self.facts.num_classes, kernel, self.norm)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the loss parts ``ce``, ``kd`` and ``feature``."""
        c, found, self.noted = self.config, [], []
        for stage, branch in zip(self.stages, self.exits, strict=True):
            assert isinstance(branch, Exit)
            feature_BD = self.autocast_call(branch.bottleneck, student.features[stage]).mean((2, 3))
            logits_BK = self.autocast_call(branch.fc, feature_BD)
            found.append(exit_losses(logits_BK, feature_BD, student, batch, temperature=c.temperature))
            self.noted.append(100 * (logits_BK.detach().argmax(1) == batch.labels_B).float().mean())
        ce, kd, feature = (torch.stack(losses).sum() for losses in zip(*found, strict=True))
        return {"ce": (1 - c.alpha) * ce, "kd": c.alpha * kd, "feature": c.beta * feature}

    def metrics(self) -> dict[str, Tensor]:
        """Return the accuracy of each exit in the last forward in percent, such as ``stage1_top1``."""
        return {f"{stage}_top1": accuracy for stage, accuracy in zip(self.stages, self.noted, strict=True)}


class Exit(nn.Module):
    """The classifier of a stage: a bottleneck to the width and size of the network's end, and a linear layer."""

    bottleneck: nn.Sequential
    fc: nn.Linear

    def __init__(self, width: int, embedding: int, classes: int, kernel: tuple[int, int], norm: NormFactory) -> None:
        super().__init__()
        inner = max(embedding // 4, 1)
        self.bottleneck = nn.Sequential(
            *(nn.Conv2d(width, inner, 1), norm(inner), nn.ReLU()),
            *(nn.Conv2d(inner, inner, kernel, stride=kernel), norm(inner), nn.ReLU()),
            *(nn.Conv2d(inner, embedding, 1), norm(embedding), nn.ReLU()),
        )
        self.fc = nn.Linear(embedding, classes)
