"""The base class of all teachers."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from pipeline.batch import Progress


class TeacherModule(nn.Module):
    """A teacher: a module that returns ``Outputs`` for a batch, without gradient. Its weights may change in a run.

    It also has ``shapes``, ``norms`` and ``head_KD``, which losses read once, when they are built.
    """

    moves: ClassVar[bool] = False
    """Whether its answers for the same batch change during a run."""

    def at(self, progress: Progress) -> None:
        """Become the teacher of the step that begins at ``progress``; one that does not move stays as it is.

        Every rank calls it before each micro-batch, outside of a CUDA graph. Weights change in place, where a captured
        graph reads them.
        """
