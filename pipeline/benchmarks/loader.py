"""How quickly this rank's images come: read, decoded, and both as training has them; by DALI's own reader, too."""

from __future__ import annotations

import resource
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from itertools import cycle, islice
from typing import Any

import torch

from pipeline.batch import Progress
from pipeline.benchmarks.measure import Measurement, measure
from pipeline.builders.loader import build_loader
from pipeline.builders.teacher import build_teacher, views_read
from pipeline.config.recipe import Recipe
from pipeline.data.loader import Loader
from pipeline.data.loader_settings import LoaderSettings
from pipeline.data.requests import BatchSampler, SampleRequest
from pipeline.distributed import collectives
from pipeline.runs.identity import Run
from pipeline.teachers.cached import CachedTeacher

EPOCHS = 2**31
"""More than anything is measured for: a small set comes round again and again, as in training."""

Items = Generator[Any, None, None]
"""Micro-batches, or what becomes one, without an end."""


def measure_loading(run: Run, device: torch.device, *, repeats: int, warmup: int, steps: int) -> list[Measurement]:
    """Measure the parts of the loader apart, and the whole: ``steps`` micro-batches a repeat, after ``warmup`` others.

    ``read`` is order, geometry, encoded images in memory and rows of a teacher's cache; ``decode`` is pixels from what
    was read before; ``loader`` is both at once; ``native reader`` is DALI's, where the recipe decodes with DALI.
    Nothing is dropped from the page cache: what a set that fits into memory shows is its later epochs.
    """
    # A decoder has one stream at a time, so the one that is fed by hand is another loader's.
    loader, other = (open_training(run, run.recipe, device) for _ in range(2))
    read = Reading(loader.plan)
    parts: dict[str, Items] = {
        "read": read.requests(),
        "decode": other.images["train"](cycle(_kept(loader.plan, steps))),
        "loader": stream(loader),
    }
    if run.recipe.data.loader == "dali":
        from pipeline.data.native import native_decoder  # loads DALI

        parts["native reader"] = native_decoder(loader.plan, loader.pace, device)
    images = steps * loader.plan.micro_batch
    ahead = items_ahead(loader.pace)
    measured = measure_in_turn(
        parts, device, repeats=repeats, warmup=max(warmup, ahead), steps=steps, images=images, ahead=ahead
    )
    if collectives.is_main():
        print(read)
    return measured


def measure_in_turn(
    parts: Mapping[str, Items],
    device: torch.device,
    *,
    repeats: int,
    warmup: int,
    steps: int,
    images: int,
    ahead: int,
) -> list[Measurement]:
    """Measure each part's next ``steps`` items, one part after the other and all of them again: noise hits all alike.

    ``warmup`` items go before, each time: what was ready before anyone asked is no rate. After it a part is left alone
    for as long as it takes to make the ``ahead`` items that it keeps ready: until then it takes cores from the next.
    """
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    with ExitStack() as stack:
        for items in parts.values():
            stack.enter_context(closing(items))
        for _ in range(repeats):
            for name, items in parts.items():
                take(items, warmup)
                collectives.barrier()  # ranks of a machine share its cores, here as in training
                once = measure(name, lambda items=items: take(items, steps), device=device, repeats=1, warmup=0)
                seconds[name] += once.seconds
                time.sleep(once.median * ahead / steps)
    return [Measurement(name, each, images, steps=steps) for name, each in seconds.items()]


def items_ahead(pace: LoaderSettings) -> int:
    """Return how many items a part may have ready or under way before anyone asks."""
    return 2 * pace.prefetch + 1


class Reading:
    """Requests without their decoding, and how many page faults waited for the storage on the way."""

    def __init__(self, plan: BatchSampler) -> None:
        self._plan = plan
        self._faults = 0

    def requests(self) -> Generator[SampleRequest, None, None]:
        """Yield a run's requests, for ever."""
        with closing(self._plan.training(_beginning(self._plan), EPOCHS)) as requests:
            while True:
                before = _page_faults()
                request = next(requests)
                self._faults += _page_faults() - before
                yield request

    def __str__(self) -> str:
        """Return whether the page cache was warm."""
        told = f"cold, {self._faults:,} page faults waited for the storage" if self._faults else "warm"
        return f"page cache while reading was measured, its warm-up included: {told}"


def open_training(run: Run, recipe: Recipe, device: torch.device) -> Loader:
    """Return the loader of the training images, with the rows of the teacher's cache if the recipe has one.

    ``recipe`` is the run's, or one that differs from it in how it loads.
    """
    teacher = build_teacher(run, device) if recipe.teacher and recipe.teacher.cache else None
    if isinstance(teacher, CachedTeacher):
        # No more than the recipe's epochs come to, whatever the epochs here.
        views = views_read(recipe, teacher.cache)
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"views": views})})
    return build_loader(recipe, run.manifest, device, ("train",), teacher)


def stream(loader: Loader) -> Items:
    """Yield training batches for ever."""
    yield from loader.stream(_beginning(loader.plan), EPOCHS)


def take(items: Iterator[Any], count: int) -> None:
    """Let go of the next items, each before the next is asked for."""
    deque(islice(items, count), maxlen=0)


def _beginning(plan: BatchSampler) -> Progress:
    return Progress(plan.steps_per_epoch)


def _kept(plan: BatchSampler, count: int) -> list[SampleRequest]:
    """Return the first requests of a run, no more than an epoch's, without a cache's rows, which nobody decodes."""
    with closing(replace(plan, columns=None).training(_beginning(plan), 1)) as requests:
        return list(islice(requests, count))


def _page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt
