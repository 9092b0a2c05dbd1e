"""Subclass distillation, Müller et al., 2020, arXiv:2002.03936.

The teacher has split each class into subclasses by itself, and the student learns their probabilities. Both networks
have heads of subclasses: ``arguments: {subclasses: 5}``.

B batch, S subclasses of all classes.
"""

from pydantic import PositiveFloat
from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.losses._base import Facts, Loss, Taps
from pipeline.losses.kd import kd_loss

_TAP = "subclasses"


class SubclassKD(Loss):
    """KD over the subclasses of all classes.

    The authors write a cross-entropy, which is larger by T² times the entropy of the teacher's probabilities.
    """

    reads_labels = False

    class Config(Loss.Config):
        """The config of subclass distillation, such as ``{temperature: 4.0}``."""

        temperature: PositiveFloat
        """Temperature T by which both networks' logits of subclasses are divided."""

        def taps(self) -> Taps:
            """Return the logits of the subclasses."""
            return Taps(frozenset({_TAP}), frozenset({_TAP}))

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        counts = [shapes[_TAP][0] for shapes in (facts.student_shapes, facts.teacher_shapes)]
        if counts[0] != counts[1]:
            raise ValueError(
                f"subclass_kd: the student has {counts[0]} subclasses in all and the teacher {counts[1]}; give both "
                "the same arguments: {subclasses: …}"
            )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the loss part ``subclass_kd``."""
        both = (network.features[_TAP] for network in (student, teacher))
        return {"subclass_kd": kd_loss(*both, temperature=self.config.temperature)}
