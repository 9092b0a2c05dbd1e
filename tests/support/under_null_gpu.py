"""The main job on the GPU that computes nothing, watched: to be run by ``null_gpu.python``.

    under_null_gpu.py WORDS METHOD:PRECISION …       WORDS is a JSON list of overrides for every recipe
    under_null_gpu.py WORDS METHOD+METHOD:SEED,SEED …    the same of runs side by side

Prints a line of JSON for each: what a step launches and copies, and how often the host waited for the device between
two lines of the journal; and the same of a step that is a replay of a CUDA graph. Numbers mean nothing there, so what
looks at them is left out: the guard's question, the evaluation and the count of FLOPs. cuDNN is off; a convolution is a
tensor of the right shape. A frozen teacher is built once for all runs that can use the same.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

from blank_convolutions import convolutions, register
from methods import WITHOUT_TEACHER
from training_on_ranks import launched

from pipeline import compare, train
from pipeline.builders import session as building
from pipeline.builders.shared import SharedParts
from pipeline.errors import Interrupted
from pipeline.multirun.inputs import SharedInputs
from pipeline.optim.guard import FiniteGuard
from pipeline.runs.identity import Run
from pipeline.teachers.cached import AnyTeacher
from pipeline.training import session
from pipeline.training.graph import EAGER_STEPS

PAIR = Path(__file__).resolve().parents[2] / "configs" / "cifar100" / "resnet56_resnet20.yaml"
STEPS = 9
"""Of a run; the journal writes after the first and the last."""
TEACHERS: dict[tuple[str, frozenset[str]], AnyTeacher | None] = {}
"""Of this process. Building a ResNet-56 takes longer than all steps of a run."""
COUNTED = ("launches", "products", "copies", "fills", "waits", "pageable", "allocations", "replays", "captures")


def main(words: list[str], cases: list[str]) -> None:
    """Train with each method in each precision, and print what a step took."""
    null = ctypes.CDLL("libnull.so")
    null.null_count.restype = ctypes.c_long
    register()
    for case in cases:
        if "+" in case or "," in case:
            print(json.dumps({"case": case, **watched_side_by_side(null, words, *case.split(":"))}), flush=True)
            continue
        method, precision = case.split(":")
        own = [str(PAIR), f"method={method}", *words, f"precision={precision}", f"stop.steps={STEPS}"]
        if method in WITHOUT_TEACHER:
            own = [word for word in own if not word.startswith("teacher")]
        found: dict[str, Any] = {}
        try:
            found |= watched(null, [*own, "graph=false", f"folder=runs/{method}-{precision}"], first=3)
            replayed = watched(null, [*own, "graph=true", f"folder=runs/{method}-{precision}-graph"], EAGER_STEPS + 2)
            found |= {"nodes": null.null_count(b"nodes"), "replayed": replayed}
        except Exception as error:
            found["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"
        print(json.dumps({"case": case, **found}), flush=True)


def watched(null: Any, words: list[str], first: int) -> dict[str, Any]:
    """Train so, and return the counts of the step ``first``, and the waits of it and those that follow.

    ``calls`` are the functions that Python called. The last step, which is written down, is left out.
    """
    steps: list[dict[str, int]] = []
    calls: list[int] = []
    learning_rate = session.learning_rate

    def counts() -> dict[str, int]:
        return {name: null.null_count(name.encode()) for name in COUNTED} | dict(convolutions)

    def at_a_step(*args: Any) -> float:
        sys.setprofile(None)
        steps.append(counts())
        calls.append(0)
        sys.setprofile(count_call)
        return learning_rate(*args)

    def count_call(frame: Any, event: str, argument: Any) -> None:
        calls[-1] += event in ("call", "c_call")

    silent = mock.patch.object(FiniteGuard, "check", return_value=None)
    blind = mock.patch.object(session.Session, "evaluate", return_value=None)
    counted = mock.patch.object(session, "learning_rate", at_a_step)
    quick = mock.patch.multiple(building, SharedParts=with_built_teachers, image_flops=mock.Mock(return_value=None))
    with launched(0, 1), silent, blind, counted, quick:
        train.main(words)
    sys.setprofile(None)
    taken = [{key: b[key] - a.get(key, 0) for key in b} for a, b in pairwise(steps)]
    settled = taken[first - 1 :]
    return {
        **settled[0],
        "waits": sum(step["waits"] for step in settled),
        "captures": sum(step["captures"] for step in taken),
        "calls": min(calls[first - 1 : -1]),
        "alike": all(s == settled[0] for s in settled),
    }


def with_built_teachers(runs: Sequence[Run]) -> SharedParts:
    """Return the parts of the runs, with the teachers that earlier runs of this process built."""
    parts = SharedParts(runs)
    parts.teachers = TEACHERS
    return parts


def watched_side_by_side(null: Any, words: list[str], methods: str, seeds: str) -> dict[str, Any]:
    """Train runs of one group so, and return the counts of a step of all of them, and the waits of those that follow.

    ``captures`` are those of the whole command.
    """
    steps: list[dict[str, int]] = []
    train_step = SharedInputs.train_step

    def at_a_step(inputs: SharedInputs, lanes: Any) -> None:
        steps.append({name: null.null_count(name.encode()) for name in COUNTED})
        train_step(inputs, lanes)

    runs = [str(PAIR), f"methods={methods.replace('+', ',')}", f"seeds={seeds}", "side=4"]
    silent = mock.patch.object(FiniteGuard, "check", return_value=None)
    blind = mock.patch.object(session.Session, "evaluate", return_value=None)
    before, error = null.null_count(b"captures"), None
    with launched(0, 1), silent, blind, mock.patch.object(SharedInputs, "train_step", at_a_step):
        try:
            compare.main([*runs, *words, "graph=true", f"stop.steps={STEPS}"])
        except Interrupted:
            pass
        except Exception as raised:
            error = f"{type(raised).__name__}: {' '.join(str(raised).split())[:600]}"
    taken = [{key: b[key] - a[key] for key in b} for a, b in pairwise(steps)][EAGER_STEPS + 1 :]
    captures = null.null_count(b"captures") - before
    last = taken[0] if taken else {}
    waits = sum(step["waits"] for step in taken)
    return {**last, "steps": len(steps), "waits": waits, "captures": captures, "error": error}


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2:])
    sys.stdout.flush()
    os._exit(0)  # threads of libraries that believe in their GPU may not end
