"""The main job on the GPU that computes nothing, watched: to be run by ``null_gpu.python``.

    under_null_gpu.py WORDS METHOD:PRECISION …       WORDS is a JSON list of overrides for every recipe

Prints a line of JSON for each: what a step launches and copies, how often the host waited for the device between two
lines of the journal, and how a step is captured and replayed as a CUDA graph. Numbers mean nothing there, so what looks
at them is left out: the guard's question, and the evaluation, by ending within an epoch. cuDNN is off; a convolution is
a tensor of the right shape.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from itertools import islice, pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from training_on_ranks import launched

from pipeline import train
from pipeline.batch import Batch
from pipeline.builders.session import open_session
from pipeline.config.recipe import load_recipe
from pipeline.distributed.launcher import read_launch
from pipeline.optim.guard import FiniteGuard
from pipeline.runs.identity import resolve
from pipeline.training.step import forward_backward, update

PAIR = Path(__file__).resolve().parents[2] / "configs" / "cifar100" / "resnet56_resnet20"
STEPS, FIRST = 9, 3
"""Steps of a run, and the first that is counted; the journal writes after the first and the last."""
COUNTED = ("launches", "products", "copies", "fills", "waits", "pageable")
convolutions: Counter[str] = Counter()


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation, transposed, more, groups):
    """Return a blank of the shape that the convolution has."""
    convolutions["convolutions"] += 1
    pairs = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, more, strict=True)
    if transposed:
        channels = weight.shape[1] * groups
        sides = [(size - 1) * s - 2 * p + d * (k - 1) + m + 1 for size, k, s, p, d, m in pairs]
    else:
        channels = weight.shape[0]
        sides = [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d, _ in pairs]
    blank = torch.empty((len(x), channels, *sides), dtype=x.dtype, device=x.device)
    return blank.contiguous(memory_format=torch.channels_last)


def convolution_backward(grad, x, weight, bias_sizes, stride, padding, dilation, transposed, more, groups, mask):
    """Return blanks for the gradients that are asked for."""
    convolutions["convolutions"] += sum(mask[:2])
    bias = grad.new_empty(grad.shape[1]) if mask[2] else None
    return torch.empty_like(x) if mask[0] else None, torch.empty_like(weight) if mask[1] else None, bias


def main(words: list[str], cases: list[str]) -> None:
    """Train with each method in each precision, and print what a step took."""
    null = ctypes.CDLL("libnull.so")
    null.null_count.restype = ctypes.c_long
    torch.backends.cudnn.enabled = False
    library = torch.library.Library("aten", "IMPL")
    library.impl("convolution", convolution, "CUDA")
    library.impl("convolution_backward", convolution_backward, "CUDA")
    for case in cases:
        method, precision = case.split(":")
        own = [str(PAIR / f"{method}.yaml"), *words, f"precision={precision}", f"folder=runs/{method}-{precision}"]
        if method == "ce":
            own = [word for word in own if not word.startswith("teacher")]
        found: dict[str, Any] = {}
        try:
            found |= watched(null, [*own, f"stop.steps={STEPS}"])
            found |= captured(null, [*own, f"folder=runs/{method}-{precision}-captured"])
        except Exception as error:
            found["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        print(json.dumps({"case": case, **found}), flush=True)


def watched(null: Any, words: list[str]) -> dict[str, Any]:
    """Train so, and return a step's counts and the waits of all steps but those that are written down."""
    steps: list[dict[str, int]] = []
    learning_rate = train.learning_rate

    def counts() -> dict[str, int]:
        return {name: null.null_count(name.encode()) for name in COUNTED} | dict(convolutions)

    def at_a_step(*args: Any) -> float:
        steps.append(counts())
        return learning_rate(*args)

    silent = mock.patch.object(FiniteGuard, "check", return_value=None)
    counted = mock.patch.object(train, "learning_rate", at_a_step)
    with launched(0, 1), silent, counted:
        train.main(words)
    taken = [{key: b[key] - a.get(key, 0) for key in b} for a, b in pairwise(steps)]
    settled = taken[FIRST - 1 :]
    return {
        **settled[0],
        "waits": sum(step["waits"] for step in settled),
        "alike": all(s == settled[0] for s in settled),
    }


class Silent:
    """A timer that marks nothing: events that measure time are not captured."""

    def __call__(self, name: str) -> AbstractContextManager[None]:
        """Return a context that does nothing."""
        return nullcontext()

    def backward(self, total: Tensor) -> AbstractContextManager[None]:
        """Return a context that does nothing."""
        return nullcontext()


def captured(null: Any, words: list[str]) -> dict[str, Any]:
    """Capture a step whole, replay it, and return its nodes, and what a replay launches and allocates besides."""
    with launched(0, 1):
        launch = read_launch()
        session, state = open_session(resolve(load_recipe(words[0], words[1:]), launch), launch)
        session.distiller.train()
        timer: Any = Silent()

        def step(batch: Batch) -> Tensor:
            with session.accelerator.accumulate(session.distiller):
                progress, accelerator, distiller = state.progress, session.accelerator, session.distiller
                losses = forward_backward(accelerator, distiller, session.teacher, batch, progress, timer)
                session.guard.watch(losses, 1)
                update(accelerator, distiller, session.optimizer, session.recipe.clip, session.guard, 1)
            session.unwrapped.commit()
            return torch.stack([value.detach() for value in losses.values()])

        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        batches = list(islice(session.loader.stream(state.progress, 1), 4))
        with torch.cuda.stream(stream):  # so that what is allocated once is there
            for batch in batches[:3]:
                step(batch)
        with torch.cuda.graph(graph, stream=stream):
            step(batches[3])
        before = {name: null.null_count(name.encode()) for name in ("launches", "allocations", "waits")}
        for _ in range(2):
            graph.replay()
        after = {name: null.null_count(name.encode()) for name in before}
        session.accelerator.end_training()
    replay = {f"replay_{name}": (after[name] - before[name]) // 2 for name in before}
    return {"nodes": null.null_count(b"nodes"), **replay}


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2:])
