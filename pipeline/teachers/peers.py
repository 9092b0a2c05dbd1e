"""A teacher that is the moving averages of several students that train together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from pipeline.batch import Batch, Outputs, join_peers
from pipeline.features.cohort import views_of_peers
from pipeline.features.taps import NormParameters
from pipeline.image_size import Resolution
from pipeline.teachers._base import TeacherModule
from pipeline.teachers.follower import StudentFollower


class AveragedPeers(TeacherModule):
    """The moving average of each peer. It gets the view of the images that the peer itself gets.

    Its outputs are those of the ``exported`` peer's average, with those of all in ``peers``.
    """

    moves = True
    head_KD = None

    def __init__(self, averages: Sequence[StudentFollower], exported: int) -> None:
        super().__init__()
        self.averages = nn.ModuleList(averages)
        self.exported = exported
        self.norms: dict[str, NormParameters] = {}  # as of one average

    @property
    def members(self) -> list[StudentFollower]:
        """Return the average of each peer."""
        return list(self.averages)  # type: ignore[arg-type]

    def follow(self, students: Iterable[nn.Module]) -> None:
        """Copy the weights of the peers, plain networks without wrappers, and average over them from now on."""
        for average, student in zip(self.members, students, strict=True):
            average.follow(student)

    def update(self, step: int | Tensor) -> None:
        """Update the averages after optimizer ``step``, counted from 1. Every rank must call it."""
        for average in self.members:
            average.update(step)

    def forward(self, batch: Batch) -> Outputs:
        """Return the outputs for the images of a batch, or for a view of them for each peer."""
        views = views_of_peers(batch.images_BCHW, len(self.averages))
        pairs = zip(self.members, views, strict=True)
        outputs = [average(batch._replace(images_BCHW=view_BCHW)) for average, view_BCHW in pairs]
        return join_peers(outputs, self.exported)

    def shapes(self, image_size: Resolution) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tap and of the logits of the exported peer's average, without the batch."""
        return self.members[self.exported].shapes(image_size)

    def train(self, mode: bool = True) -> AveragedPeers:
        """Stay in evaluation mode, also when ``train()`` of a parent module is called."""
        return super().train(False)


FollowingTeacher = StudentFollower | AveragedPeers
"""A teacher that follows the student, or several that train together."""
