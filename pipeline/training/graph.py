"""A training step as a CUDA graph: captured once, then started by one call of the host.

A small student's step is hundreds of kernels of two microseconds, and the host needs several times as long to launch
them one by one. A replay launches all of them at once and computes the same numbers.

What a replay takes from outside lies in tensors that are filled before it: the batch, the learning rate, the step's
number and, in torch's generator, the seed. Everything else is as it was at the capture. The factors of the losses'
ramps are such constants: where one changes, the step is captured anew.
"""

from __future__ import annotations

import linecache
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Literal, TypeVar, cast

import accelerate
import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from pipeline.batch import Batch, Progress
from pipeline.distiller import Distiller
from pipeline.errors import RecipeError, display_path, one_line
from pipeline.optim.optimizer import move_learning_rate_to
from pipeline.optim.schedule import WatchedProgress
from pipeline.training.step import Step, StepOutput

_T = TypeVar("_T")
EAGER_STEPS = 3
"""Steps of a command that run kernel by kernel first: libraries choose and allocate in them what a capture may not."""
_ADVICE = "or give graph=false"
_LIBRARIES = tuple(str(Path(str(module.__file__)).parent) for module in (torch, accelerate))


def maybe_graph(step: Step, wanted: Literal["auto"] | bool, accumulation: int) -> Step | GraphedStep:
    """Return the step as a CUDA graph where that is wanted and possible; on a GPU, say which it is.

    Raises RecipeError where ``wanted`` is true and it is not possible.
    """
    accelerator = step.accelerator
    if wanted is False:
        reason: str | None = "graph=false"
    else:
        reason = _obstacle(accelerator, accumulation)
        if wanted is True and reason:
            raise RecipeError(
                f"graph: true needs one GPU and accumulation: 1, and this run has {reason}; give graph=auto"
            )
    if accelerator.device.type == "cuda":
        accelerator.print(f"graph: off ({reason})" if reason else "graph: on, from this command's fourth step")
    return step if reason else GraphedStep(step)


def _obstacle(accelerator: Accelerator, accumulation: int) -> str | None:
    """Return what a run has that keeps its step from being captured."""
    if accelerator.device.type != "cuda":
        return "no GPU"
    if accelerator.num_processes > 1:
        return f"{accelerator.num_processes} ranks"
    if accelerator.deepspeed_plugin is not None:
        return "DeepSpeed"
    return f"accumulation: {accumulation}" if accumulation > 1 else None


class GraphedStep:
    """A ``Step`` that is captured after ``EAGER_STEPS`` calls and replayed from then on.

    Each replay leaves its results in the same tensors: they hold until the next call.
    """

    def __init__(self, step: Step) -> None:
        device = step.accelerator.device
        self.step = step
        self.graph = Graph()
        self.calls = self.captured_at = self.in_a_row = 0
        self.number = torch.zeros((), dtype=torch.int64, device=device)
        # The optimizer's state has been restored by now: that replaces the groups and their rate.
        move_learning_rate_to(device, step.optimizer)

    def __call__(self, batch: Batch, progress: Progress) -> StepOutput:
        """Learn from the batch of the step that begins at ``progress``.

        Raises RecipeError where the step cannot be captured.
        """
        self.calls += 1
        if self.calls <= EAGER_STEPS:
            return self.graph.run(lambda: self.step(batch, progress))
        changed = self.constants.changed(progress) if self.captured_at else ["all"]
        if changed:
            self._capture(batch, progress, changed)
        torch._foreach_copy_(self.inputs, _tensors(batch))  # pyright: ignore[reportPrivateImportUsage]
        self.number.fill_(progress.step + 1)
        self.graph.replay()
        self.step.timer.lap("graph")
        return self.done

    def _capture(self, batch: Batch, progress: Progress, changed: list[str]) -> None:
        self.in_a_row = self.in_a_row + 1 if self.captured_at == self.calls - 1 else 1
        if self.in_a_row > 2:  # two there are where an epoch ends, and a ramp rises, right after the first
            raise RecipeError(f"graph: the losses read {changed[0]}, which is another at every step; give graph=false")
        self.captured_at = self.calls
        self.constants = WatchedProgress(progress)
        extra = {name: x.clone() for name, x in batch.extra.items()}
        own = Batch(batch.images_BCHW.clone(), batch.labels_B.clone(), batch.ids_B.clone(), extra)
        self.inputs = _tensors(own)
        with _explained(self.step.unwrapped), _no_host_draws(), self.step.timer.paused():
            watched = cast(Progress, self.constants)
            self.done = self.graph.capture(lambda: self.step(own, watched, self.number))


def _tensors(batch: Batch) -> list[Tensor]:
    """Return the tensors of a batch, always in the same order."""
    return [batch.images_BCHW, batch.labels_B, batch.ids_B, *(batch.extra[name] for name in sorted(batch.extra))]


class Graph:
    """A CUDA graph and the stream that it is captured on."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.graph: torch.cuda.CUDAGraph | None = None

    def run(self, function: Callable[[], _T]) -> _T:
        """Return ``function()``, run on the stream, in order with what comes before and after it."""
        outside = torch.cuda.current_stream()
        self.stream.wait_stream(outside)
        with torch.cuda.stream(self.stream):
            result = function()
        outside.wait_stream(self.stream)
        return result

    def capture(self, function: Callable[[], _T]) -> _T:
        """Return what ``function`` returns, and keep what it launches; nothing is computed yet."""
        if self.graph is not None:
            self.graph.reset()  # or the memory of both would be taken at once
        self.graph = torch.cuda.CUDAGraph()
        # Another thread reads ahead and may allocate pinned memory meanwhile, which the default mode forbids.
        with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
            return function()

    def replay(self) -> None:
        """Compute what was captured."""
        assert self.graph is not None
        self.graph.replay()


@contextmanager
def _no_host_draws() -> Iterator[None]:
    """Raise RecipeError if the host draws random numbers inside the context: each replay would have the same ones."""
    before = _host_states()
    yield
    for name, state in _host_states().items():
        if state != before[name]:
            raise RecipeError(
                f"graph: the step draws from {name}, and a graph would repeat what it drew; draw by torch on the "
                f"device of the images, {_ADVICE}"
            )


def _host_states() -> dict[str, object]:
    kind, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002 - not drawn from: watched
    torchs = torch.default_generator.get_state().numpy().tobytes()
    return {
        "random": random.getstate(),
        "numpy.random": (kind, np.asarray(keys).tobytes(), *rest),
        "torch's CPU": torchs,
    }


@contextmanager
def _explained(distiller: Distiller) -> Iterator[None]:
    """Raise RecipeError, with the loss and the line, for what cannot be captured inside the context."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        first: BaseException = error
        while first.__context__ is not None:  # that the capture ended badly is raised on top of why
            first = first.__context__
        raise RecipeError(
            f"graph: the step cannot be captured, {_where(first, distiller)}: {one_line(first, 200)}; a captured step "
            f"may not wait for the GPU, as .item() and masks do; change that line, {_ADVICE}"
        ) from error


def _where(error: BaseException, distiller: Distiller) -> str:
    """Return the loss that was computed when the error came, if one was, and the line."""
    frames = list(_frames(error))
    names = {id(loss): f"losses.{name}" for name, loss in distiller.losses.items()}
    owners = [names[id(frame.f_locals.get("self"))] for frame, _ in frames if id(frame.f_locals.get("self")) in names]
    own = [(frame, line) for frame, line in frames if not frame.f_code.co_filename.startswith(_LIBRARIES)]
    frame, line = (own or frames)[-1]
    path = Path(frame.f_code.co_filename)
    source = linecache.getline(str(path), line).strip()
    return f"{', '.join([*owners[-1:], f'{display_path(path)}:{line}'])}, {source!r}"


def _frames(error: BaseException) -> Iterator[tuple[FrameType, int]]:
    traceback = error.__traceback__
    while traceback is not None:
        yield traceback.tb_frame, traceback.tb_lineno
        traceback = traceback.tb_next
