"""One of the runs that train side by side: its session, and on a GPU its own stream and random numbers."""

from __future__ import annotations

import shlex
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from pipeline.batch import Batch, Outputs, Progress
from pipeline.builders.session import open_session
from pipeline.builders.shared import SharedParts
from pipeline.cli import user_message
from pipeline.config.recipe import Recipe
from pipeline.distributed.launcher import Launch
from pipeline.errors import one_line
from pipeline.optim.schedule import learning_rate
from pipeline.runs.folder import check_folder
from pipeline.runs.identity import Run
from pipeline.training.result import percent
from pipeline.training.session import Session, State, finish, train_step
from pipeline.training.step import seed_draws


class ConcurrentRun:
    """A run that trains beside others. An error ends it and becomes its ``error``, one line."""

    session: Session
    state: State

    def __init__(self, run: Run) -> None:
        self.run = run
        self.error: str | None = None
        self.is_training = False
        self._stream: OwnStream | None = None
        self._journal = ExitStack()

    @property
    def recipe(self) -> Recipe:
        """Return the recipe of the run."""
        return self.run.recipe

    @property
    def progress(self) -> Progress:
        """Return the progress of the run."""
        return self.state.progress

    @property
    def rate(self) -> float:
        """Return the learning rate of the next step."""
        return learning_rate(self.recipe.schedule, self.progress, self.recipe.epochs)

    def open(self, launch: Launch, parts: SharedParts) -> None:
        """Build the run and restore its newest checkpoint."""
        with self._errors():
            check_folder(self.run)
            self.session, self.state = open_session(self.run, launch, parts)
            session, state = self.session, self.state
            session.distiller.train()
            device = session.accelerator.device
            self._stream = OwnStream(device) if device.type == "cuda" else None
            state.reason = session.stopping.reason(state.progress, beginning=True)
            self._journal.enter_context(session.journal.open(state.progress, state.journal_bytes, display=False))
            self.is_training = True
            self._end_if_due()

    def train_step(self, micro_batches: Sequence[tuple[Batch, Outputs | None]]) -> None:
        """Train on the micro-batches of one global batch, each with the teacher's outputs if they are known."""
        session, state = self.session, self.state
        with self._errors(), self._on_own_stream(tree_leaves(micro_batches)):
            seed_draws(self.recipe.seed, state.progress.step)  # the other runs draw from the same generator
            session.timer.lap("others")
            for batch, answers in micro_batches:
                train_step(session, state, batch, answers)
            if state.progress.epoch_ended and state.last is not None:
                last, best = percent(state.last.main), percent(state.best.value)
                title = session.task.title
                tqdm.write(f"{self.run.folder}, epoch {state.progress.epoch}: {title} {last}, best {best}")
            self._end_if_due()

    def _end_if_due(self) -> None:
        """Finish the run if it is complete or has a reason to stop."""
        if self.state.reason or self.state.progress.step == self.session.journal.total_steps:
            self.is_training = False
            self._journal.close()
            finish(self.session, self.state)

    def _on_own_stream(self, inputs: Iterable[Any]) -> AbstractContextManager[None]:
        return nullcontext() if self._stream is None else self._stream(inputs)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """End the run at an error inside the context, so that the others can go on."""
        try:
            yield
        except Exception as error:
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """End the run with an error, and print it."""
        reason = user_message(error)
        if reason is None:  # not the user's: whoever mends it needs its place
            traceback.print_exception(error, file=sys.stderr)
            reason = f"{type(error).__name__}: {one_line(error)}"
        self.error = f"{self.run.command} {shlex.join(self.run.overrides)}: {reason}"
        self.is_training = False
        self._journal.close()
        tqdm.write(f"{self.run.folder}: failed: {reason}", file=sys.stderr)


class OwnStream:
    """A CUDA stream, and a state of torch's random generator that belongs to it.

    CUDA graphs read the seed from memory of the generator's state when they run. With one state for all, a graph could
    read the seed that was set for another run's.
    """

    def __init__(self, device: torch.device) -> None:
        torch.cuda.synchronize(device)  # what was built in the default stream is complete
        self.stream = torch.cuda.Stream(device)
        self.generator = torch.Generator(device)

    @contextmanager
    def __call__(self, inputs: Iterable[Any]) -> Iterator[None]:
        """Use the stream inside the context, after the work of the current one, which computes the ``inputs``."""
        self.stream.wait_stream(torch.cuda.current_stream())
        for x in inputs:
            if isinstance(x, Tensor):
                x.record_stream(self.stream)  # its memory is not reused before this stream has read it
        default = torch.cuda.default_generators[self.stream.device_index]
        others = default.graphsafe_get_state()
        default.graphsafe_set_state(self.generator)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            default.graphsafe_set_state(others)
