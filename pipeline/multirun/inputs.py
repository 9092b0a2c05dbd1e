"""The batches and the teacher's outputs that runs share while they train side by side."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from itertools import islice
from typing import Self

from pipeline.batch import Batch, Outputs
from pipeline.data.loader import Loader
from pipeline.multirun.graphed_teacher import GraphedTeacher
from pipeline.multirun.run import ConcurrentRun
from pipeline.teachers.cached import AnyTeacher, CachedTeacher
from pipeline.teachers.view_logits import ViewLogits
from pipeline.training.graph import GraphedStep


class SharedInputs:
    """Trains runs that are at the same step, with one batch for all that share a loader.

    Each teacher computes a batch once for the runs that share it. Runs with different loaders have the same images in
    different orders. If they read the teacher's logits only, these are computed once for all images of a view.
    """

    def __init__(self, members: Sequence[ConcurrentRun]) -> None:
        self.view_logits = _view_logits(members)
        self.streams: dict[Loader, tuple[int, Generator[Batch, None, None]]] = {}
        """The batches of each loader, and the step of the next one."""
        self.graphed: dict[AnyTeacher, GraphedTeacher] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for _step, stream in self.streams.values():
            stream.close()

    def train_step(self, members: Sequence[ConcurrentRun]) -> None:
        """Train one step of these runs, which are all at the same step. An error ends those that it concerns."""
        for loader in dict.fromkeys(member.session.loader for member in members):
            readers = [member for member in members if member.session.loader is loader]
            try:
                batches = self._batches(loader, readers)
            except Exception as error:
                _fail(readers, error)
                continue
            for teacher in dict.fromkeys(reader.session.teacher for reader in readers):
                self._train_taught(teacher, [each for each in readers if each.session.teacher is teacher], batches)

    def _train_taught(
        self, teacher: AnyTeacher | None, taught: Sequence[ConcurrentRun], batches: Sequence[Batch]
    ) -> None:
        """Train the step of runs that share the teacher, too."""
        try:
            answers = [self._answers(teacher, taught, batch) for batch in batches]
        except Exception as error:
            _fail(taught, error)
            return
        for each in taught:
            each.train_step(list(zip(batches, answers, strict=True)))

    def _batches(self, loader: Loader, readers: Sequence[ConcurrentRun]) -> list[Batch]:
        """Return the micro-batches of the runs' next step."""
        progress = readers[0].progress
        if loader in self.streams and self.streams[loader][0] != progress.step:
            self.streams.pop(loader)[1].close()  # the runs that used it have ended before this step
        if loader not in self.streams:
            epochs = max(reader.recipe.epochs for reader in readers)
            self.streams[loader] = progress.step, loader.stream(progress, epochs)
        _, stream = self.streams[loader]
        self.streams[loader] = progress.step + 1, stream
        return list(islice(stream, loader.plan.accumulation))

    def _answers(self, teacher: AnyTeacher | None, taught: Sequence[ConcurrentRun], batch: Batch) -> Outputs | None:
        """Return the teacher's outputs for a batch; None without a teacher, or if it moves with its own run."""
        if teacher is None or teacher.moves:
            return None
        if teacher in self.view_logits and not any(each.recipe.taps.teacher for each in taught):
            return self.view_logits[teacher](batch, taught[0].recipe.data.view(taught[0].progress.epoch))
        if all(isinstance(each.session.step, GraphedStep) for each in taught):
            if teacher not in self.graphed:
                self.graphed[teacher] = GraphedTeacher(teacher)
            return self.graphed[teacher](batch)
        return teacher(batch)


def _fail(members: Sequence[ConcurrentRun], error: Exception) -> None:
    """End all runs that an error concerns."""
    for member in members:
        member.fail(error)


def _view_logits(members: Sequence[ConcurrentRun]) -> dict[AnyTeacher, ViewLogits]:
    """Return the teachers whose logits are computed for a whole view: they teach runs with different orders of images.

    The images must be in memory, because a view is read once more for it, and the runs may read no other outputs.
    """
    found: dict[AnyTeacher, ViewLogits] = {}
    sessions = [member.session for member in members if not member.recipe.taps.teacher]
    for session in sessions:
        teacher, config = session.teacher, session.recipe.teacher
        if teacher is None or config is None or teacher.moves or isinstance(teacher, CachedTeacher):
            continue
        loaders = {other.loader for other in sessions if other.teacher is teacher}
        data = session.recipe.data
        # The noise of ``synthetic`` is not an id's own, and with ``repeat`` or ``pairs`` a batch has several views.
        if len(loaders) > 1 and data.loader == "memory" and data.rows_per_image == 1:
            found[teacher] = ViewLogits(teacher, session.loader, config.batch or 1)
    return found
