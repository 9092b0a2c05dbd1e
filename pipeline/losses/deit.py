"""DeiT: a distillation token, Touvron et al., ICML 2021, arXiv:2012.12877, equations 2 and 3.   B batch, K classes."""

from typing import Any

import torch.nn.functional as F
from pydantic import Field, PositiveFloat
from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.losses._base import Facts, Loss, Taps
from pipeline.losses.ce import label_cross_entropy
from pipeline.losses.kd import kd_loss

CLASS_HEAD, TOKEN_HEAD = "class_head", "token_head"
"""Stages of the student: the logits [B, K] of its class token and of its distillation token."""


class DeiT(Loss):
    """Cross-entropy of the class token with the labels, and of the distillation token with the teacher's decisions.

    The student's own logits, which are measured, are the mean of both tokens' logits, as in timm.
    """

    mixed_labels = "soft"

    class Config(Loss.Config):
        """The config of DeiT, such as ``{label_share: 0.5}``."""

        label_share: float = Field(ge=0, le=1)
        """Share of the labels' part; the rest is the teacher's."""
        temperature: PositiveFloat | None = None
        """Temperature of the teacher's softened probabilities (eq. 2); null takes its first class (eq. 3)."""
        label_smoothing: float = Field(default=0.0, ge=0.0, lt=1.0)
        """Share of the labels' target that is spread evenly over the classes."""

        def taps(self) -> Taps:
            """Return the heads of both tokens."""
            return Taps(student=frozenset({CLASS_HEAD, TOKEN_HEAD}))

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        for name in (CLASS_HEAD, TOKEN_HEAD):
            if facts.student_shapes[name] != (facts.num_classes,):
                shape = " × ".join(map(str, facts.student_shapes[name]))
                raise ValueError(f"deit: the student's stage {name} must be {facts.num_classes} logits, got {shape}")

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the loss parts ``labels`` and ``teacher``."""
        config: Any = self.config
        labels = label_cross_entropy(student.features[CLASS_HEAD], batch, config.label_smoothing)
        token_BK = student.features[TOKEN_HEAD]
        if config.temperature is None:
            distilled = F.cross_entropy(token_BK, teacher.logits_BK.argmax(1))
        else:
            distilled = kd_loss(token_BK, teacher.logits_BK, temperature=config.temperature)
        return {"labels": config.label_share * labels, "teacher": (1 - config.label_share) * distilled}
