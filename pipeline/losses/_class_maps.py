"""The base class of losses of logits that also take maps of class logits, as a detector's head computes them.

A channel of such a map is one class of one anchor, with a probability of its own, and a cell is a row.

B batch, C channels, H W space, R rows.
"""

from __future__ import annotations

from torch import Tensor

from pipeline.batch import Outputs
from pipeline.losses._base import Facts, Loss, Taps
from pipeline.losses._stages import StageList, channels, pair_stages, stage_taps


class ClassMapLoss(Loss):
    """A loss of the logits, or of the maps of class logits at the taps ``maps``. Raises ValueError if these differ.

    ``levels`` holds the pairs of (student, teacher) taps; it is empty if the loss is of the logits.
    """

    class Config(Loss.Config):
        """The config of such a loss: ``{maps: [head.class]}`` for detectors, nothing for other networks."""

        maps: StageList | None = None
        """Stages that are compared in place of the logits, such as ``head.class``. Every channel has a sigmoid."""

        def taps(self) -> Taps:
            """Return the maps' taps."""
            return stage_taps(self.maps) if self.maps else Taps()

        def reads_head(self) -> bool:
            """Return whether the logits are read."""
            return self.maps is None

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        self.levels = pair_stages(config.maps, facts) if config.maps else []
        for pair in self.levels:
            check_equal_maps(facts, *pair)

    def map_logits(self, student: Outputs, teacher: Outputs) -> list[tuple[Tensor, Tensor]]:
        """Return the rows of both networks at each level. The teacher's get no gradient."""
        return [
            (map_rows(student.features[ours]), map_rows(teacher.features[theirs]).detach())
            for ours, theirs in self.levels
        ]


def map_rows(map_BCHW: Tensor) -> Tensor:
    """Return the cells of a map as rows [R, C], with R = B·H·W."""
    return map_BCHW.permute(0, 2, 3, 1).flatten(0, 2)


def check_equal_maps(facts: Facts, student: str, teacher: str) -> None:
    """Raise ValueError unless the two taps are maps of one shape."""
    channels(facts.student_shapes, student)
    channels(facts.teacher_shapes, teacher)
    if (ours := facts.student_shapes[student]) != (theirs := facts.teacher_shapes[teacher]):
        raise ValueError(
            f"the student's {student!r} is shaped {list(ours)} and the teacher's {teacher!r} {list(theirs)}; "
            "both networks need the same anchors and classes"
        )
