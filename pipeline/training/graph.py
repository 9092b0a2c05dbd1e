"""A training step as a CUDA graph: captured once, then started by one call of the host.

A small student's step is hundreds of kernels of two microseconds each. The host needs several times as long to launch
them one by one. A replay launches all of them at once and computes the same numbers.

The inputs of a replay are written before it. The batch, the learning rate and the step's number are tensors; the seed
is set in torch's generator. Everything else is a constant of the capture. The factors of the losses' ramps are such
constants: when one changes, the step is captured again.
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
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor
from torch.utils._pytree import tree_map_only

from pipeline.batch import Batch, Outputs, Progress
from pipeline.distiller import Distiller
from pipeline.errors import RecipeError, display_path, one_line
from pipeline.optim.guard import skips_on_device
from pipeline.optim.kinds import FUSED
from pipeline.optim.optimizer import allow_capture, move_learning_rate_to
from pipeline.optim.schedule import WatchedProgress
from pipeline.training.step import Step, StepOutput

_T = TypeVar("_T")
EAGER_STEPS = 3
"""Steps at the start of a command without a graph: in them libraries choose and allocate, which a capture forbids."""
_ADVICE = "or give graph=false"
_LIBRARIES = tuple(str(Path(str(module.__file__)).parent) for module in (torch, accelerate))


def maybe_graph(
    step: Step,
    wanted: Literal["auto"] | bool,
    accumulation: int,
    checkpointed: bool = False,
    varying: str | None = None,
) -> Step | GraphedStep:
    """Return the step, as a CUDA graph if that is wanted and possible; on a GPU, print the decision.

    ``varying`` is what makes the tensors of some batches larger than others', for a message, if anything does.
    Raises RecipeError if ``wanted`` is true and a graph is not possible.
    """
    accelerator = step.accelerator
    if wanted is False:
        reason: str | None = "graph=false"
    elif checkpointed:  # a checkpointed block reads the states of torch's generators, which a capture forbids
        reason = "student.checkpoint"
    elif varying:  # the tensors of a capture keep their sizes
        reason = varying
    else:
        reason = _unfused(step.optimizer) or _waiting(step.unwrapped) or _obstacle(accelerator, accumulation)
    if wanted is True and reason:
        raise RecipeError(f"graph: true needs one GPU and accumulation: 1, and this run has {reason}; give graph=auto")
    if accelerator.device.type == "cuda":
        accelerator.print(f"graph: off ({reason})" if reason else "graph: on, from this command's fourth step")
    return step if reason else GraphedStep(step)


def _unfused(optimizer: AcceleratedOptimizer) -> str | None:
    """Return the optimizer, for a message, if the host decides whether its step is skipped; otherwise None."""
    inner = optimizer.optimizer
    if not isinstance(inner, torch.optim.Optimizer) or skips_on_device(inner):  # the former is DeepSpeed's
        return None
    return f"an optimizer that cannot be captured, {type(inner).__name__} ({', '.join(FUSED)} can be)"


def _waiting(distiller: Distiller) -> str | None:
    """Return the loss, for a message, for which the host waits for its device; None if there is none."""
    found = [name for name, loss in distiller.losses.items() if not loss.capturable]
    return f"the loss {found[0]!r}, for which the host waits" if found else None


def _obstacle(accelerator: Accelerator, accumulation: int) -> str | None:
    """Return the property of the run that prevents a capture, None if there is none."""
    if accelerator.device.type != "cuda":
        return "no GPU"
    if accelerator.num_processes > 1:
        return f"{accelerator.num_processes} ranks"
    if accelerator.deepspeed_plugin is not None:
        return "DeepSpeed"
    return f"accumulation: {accumulation}" if accumulation > 1 else None


class GraphedStep:
    """A ``Step`` that is captured after ``EAGER_STEPS`` calls and replayed from then on.

    Each replay writes its results into the same tensors, so they are valid only until the next call.
    """

    def __init__(self, step: Step) -> None:
        device = step.accelerator.device
        self.step = step
        self.graph = Graph()
        self.calls = self.captured_at = self.captures_in_a_row = 0
        # On the device, because a number of the host would be a constant of the capture.
        self.step_number = torch.zeros((), dtype=torch.int64, device=device)
        # Only now, after a checkpoint was loaded: loading replaces the parameter groups and so their learning rate.
        move_learning_rate_to(device, step.optimizer)

    def __call__(self, batch: Batch, progress: Progress, answers: Outputs | None = None) -> StepOutput:
        """Train on the batch of the step that begins at ``progress``, with the teacher's ``answers`` if they are known.

        Raises RecipeError if the step cannot be captured.
        """
        self.calls += 1
        if self.calls <= EAGER_STEPS:
            # On the graph's own stream, as torch requires of the steps that warm up a capture.
            return self.graph.run(lambda: self.step(batch, progress, answers))
        changed = self.constants.changed(progress) if self.captured_at else ["all"]
        if changed:
            self._capture(batch, progress, answers, changed)
        torch._foreach_copy_(self.inputs, input_tensors(batch, answers))  # pyright: ignore[reportPrivateImportUsage]
        self.step_number.fill_(progress.step + 1)
        # Also right after a capture, which computes nothing.
        self.graph.replay()
        self.step.timer.lap("graph")
        return self.output

    def _capture(self, batch: Batch, progress: Progress, answers: Outputs | None, changed: list[str]) -> None:
        self.captures_in_a_row = self.captures_in_a_row + 1 if self.captured_at == self.calls - 1 else 1
        # Two in a row are normal: an epoch may end, and a ramp rise, right after the command's first capture.
        if self.captures_in_a_row > 2:
            raise RecipeError(f"graph: the losses read {changed[0]}, which changes at every step; give graph=false")
        self.captured_at = self.calls
        allow_capture(self.step.optimizer)
        # Records what the losses read of the progress, because a graph keeps these values.
        self.constants = WatchedProgress(progress)
        # The graph reads these copies: every replay finds its batch at the same addresses.
        static_batch, static_answers = tree_map_only(Tensor, torch.clone, (batch, answers))
        self.inputs = input_tensors(static_batch, static_answers)
        # The timer is paused, because its events would be recorded into the graph.
        with _capture_errors(self.step.unwrapped), _no_host_draws(), self.step.timer.paused():
            watched = cast(Progress, self.constants)
            self.output = self.graph.capture(lambda: self.step(static_batch, watched, static_answers, self.step_number))


def input_tensors(batch: Batch, answers: Outputs | None = None) -> list[Tensor]:
    """Return the tensors of a batch and of the teacher's answers, always in the same order."""
    found = [batch.images_BCHW, batch.labels_B, batch.ids_B]
    found += [named[name] for named in (batch.extra, batch.targets) for name in sorted(named)]
    if answers is not None:
        found += [answers.logits, *(answers.features[name] for name in sorted(answers.features))]
    return found


class Graph:
    """A CUDA graph and the stream that it is captured on."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.graph: torch.cuda.CUDAGraph | None = None

    def run(self, function: Callable[[], _T]) -> _T:
        """Run ``function`` on the graph's stream, ordered with all work before and after it, and return its result."""
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = function()
        current.wait_stream(self.stream)
        return result

    def capture(self, function: Callable[[], _T]) -> _T:
        """Record the kernels that ``function`` launches, and return its result; nothing is computed yet."""
        if self.graph is not None:
            self.graph.reset()  # otherwise both graphs' memory would be allocated at once
        self.graph = torch.cuda.CUDAGraph()
        # The loader's thread reads ahead and may allocate pinned memory meanwhile, which the default mode forbids.
        with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
            return function()

    def replay(self) -> None:
        """Run the captured kernels."""
        assert self.graph is not None
        self.graph.replay()


@contextmanager
def _no_host_draws() -> Iterator[None]:
    """Raise RecipeError if the host draws random numbers inside the context: every replay would reuse them."""
    before = _host_states()
    yield
    for name, state in _host_states().items():
        if state != before[name]:
            raise RecipeError(
                f"graph: the step draws from {name}, and every replay would reuse these numbers; draw them with torch "
                f"on the images' device, {_ADVICE}"
            )


def _host_states() -> dict[str, object]:
    """Return the states of all generators on the host, by the name that a message gives them."""
    # torch's generator of the GPU is missing here on purpose: a graph reads its seed anew at every replay.
    kind, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002 - only read, never drawn from
    torch_state = torch.default_generator.get_state().numpy().tobytes()
    return {
        "random": random.getstate(),
        "numpy.random": (kind, np.asarray(keys).tobytes(), *rest),
        "torch's CPU generator": torch_state,
    }


@contextmanager
def _capture_errors(distiller: Distiller) -> Iterator[None]:
    """Raise RecipeError, with the loss and the source line, if code inside the context cannot be captured."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        # Ending the failed capture raises another error; the first one in the chain is the cause.
        first: BaseException = error
        while first.__context__ is not None:
            first = first.__context__
        raise RecipeError(
            f"graph: the step cannot be captured, {_source_line(first, distiller)}: {one_line(first, 200)}; a capture "
            f"may not wait for the GPU, as .item() and masks do; change that line, {_ADVICE}"
        ) from error


def _source_line(error: BaseException, distiller: Distiller) -> str:
    """Return the loss in which the error was raised, if it was in one, and the source line."""
    frames = list(_frames(error))
    names = {id(loss): f"losses.{name}" for name, loss in distiller.losses.items()}
    losses = [names[id(frame.f_locals.get("self"))] for frame, _ in frames if id(frame.f_locals.get("self")) in names]
    # The last line outside torch and Accelerate is the one that a user can change.
    outside = [(frame, line) for frame, line in frames if not frame.f_code.co_filename.startswith(_LIBRARIES)]
    frame, line = (outside or frames)[-1]
    path = Path(frame.f_code.co_filename)
    source = linecache.getline(str(path), line).strip()
    return f"{', '.join([*losses[-1:], f'{display_path(path)}:{line}'])}, {source!r}"


def _frames(error: BaseException) -> Iterator[tuple[FrameType, int]]:
    """Yield each frame of an error's traceback with its line number, the outermost first."""
    traceback = error.__traceback__
    while traceback is not None:
        yield traceback.tb_frame, traceback.tb_lineno
        traceback = traceback.tb_next
