"""A teacher that takes its student along its own route: RCO, Jin et al., ICCV 2019, arXiv:1904.09149."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.batch import Batch, Outputs, Progress
from pipeline.features.taps import FeatureTaps, NormParameters
from pipeline.image_size import Resolution
from pipeline.teachers._base import TeacherModule
from pipeline.teachers.frozen import Teacher


class RouteTeacher(TeacherModule):
    """A teacher that has the weights of one epoch of its own training after the other, the anchors.

    The student's epoch e, counted from 0, has anchor min(⌊e / each⌋, n − 1). ``anchors`` are n networks that differ in
    their weights only. The first one computes; the weights of the others wait in the host's memory.
    """

    moves = True

    def __init__(self, anchors: Sequence[Teacher], each: int) -> None:
        super().__init__()
        self.network = anchors[0]
        self.each = each
        self.states = [{name: x.cpu() for name, x in anchor.taps.state_dict().items()} for anchor in anchors]
        # The first anchor's tensors, which take the values of the others.
        self.states[0] = {name: x.clone() for name, x in self.states[0].items()}
        self.anchor = 0
        # Losses read these parameters once, when they are built; those of the first anchor would soon be outdated.
        self.norms: dict[str, NormParameters] = {}
        self.head_KD = None

    @property
    def taps(self) -> FeatureTaps:
        """Return the network."""
        return self.network.taps

    def at(self, progress: Progress) -> None:
        """Take the weights of the anchor of the student's epoch."""
        anchor = min(progress.epoch // self.each, len(self.states) - 1)
        if anchor != self.anchor:
            self.taps.load_state_dict(self.states[anchor])
            self.anchor = anchor

    def shapes(self, image_size: Resolution) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the network's taps and logits, without the batch."""
        return self.network.shapes(image_size)

    def forward(self, batch: Batch) -> Outputs:
        """Return the outputs of the current anchor."""
        return self.network(batch)
