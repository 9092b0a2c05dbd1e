"""Benchmark of the data loader: reading, decoding, both together, and DALI's own reader."""

from __future__ import annotations

import resource
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, closing
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
from pipeline.tasks._registry import find_task
from pipeline.teachers.cached import CachedTeacher

EPOCHS = 2**31
"""More epochs than any measurement needs, so that the images never run out."""

Items = Generator[Any, None, None]
"""An endless generator of micro-batches, or of requests for them."""


def measure_loading(run: Run, device: torch.device, *, repeats: int, warmup: int, steps: int) -> list[Measurement]:
    """Measure each part of the loader and the whole, for ``steps`` micro-batches per repeat after ``warmup`` others.

    ``read`` makes requests: order, geometry, encoded images in memory, rows of a teacher's cache. ``decode`` makes
    pixels from requests that were read before. ``loader`` is both together. ``native reader`` is DALI's own, if the
    recipe decodes with DALI, and its images have no masks and no buckets. The page cache is not emptied, so a data set
    that fits into memory is measured as in its later epochs. With ``loader: memory`` a request is for many batches, so
    only ``loader`` is measured.
    """
    loader = open_training(run, run.recipe, device)
    reading = ReadBenchmark(loader.plan)
    parts: dict[str, Items] = {}
    if run.recipe.data.loader != "memory":
        # A decoder has one stream at a time, so a second loader decodes the requests that were read before.
        other = open_training(run, run.recipe, device)
        requests = _first_requests(loader.plan, steps)
        parts = {"read": reading.requests(), "decode": other.decoders["train"](cycle(requests))}
    parts["loader"] = stream(loader)
    if run.recipe.data.loader == "dali":
        parts |= _native_reader(run, loader, device)
    images = steps * loader.plan.micro_batch
    ahead = items_ahead(loader.settings)
    measured = measure_in_turn(
        parts, device, repeats=repeats, warmup=max(warmup, ahead), steps=steps, images=images, ahead=ahead
    )
    if collectives.is_main() and "read" in parts:
        print(reading)
    return measured


def _native_reader(run: Run, loader: Loader, device: torch.device) -> dict[str, Items]:
    """Return DALI's own reader as a part; nothing, with a note, for images with masks or buckets, which it has not."""
    if find_task(run.recipe.task).of_pixels or run.recipe.data.crop == "keep_ratio":
        if collectives.is_main():
            print("note: native reader: it has no masks and no buckets, so it is not measured")
        return {}
    from pipeline.data.native import native_decoder  # loads DALI

    return {"native reader": native_decoder(loader.plan, loader.settings, device)}


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
    """Measure ``steps`` items of every part in turn, and all parts again, so that noise affects them alike.

    Each time ``warmup`` items come first, because items that were prefetched would show too high a rate. Afterwards a
    pause lets the part prefetch its ``ahead`` items again: meanwhile it would take cores from the next part.
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
                # The time that the part needs for the items that it prefetches.
                time.sleep(once.median * ahead / steps)
    return [Measurement(name, times, images, steps=steps) for name, times in seconds.items()]


def items_ahead(settings: LoaderSettings) -> int:
    """Return the largest number of items that a part prefetches, finished or in progress."""
    return 2 * settings.prefetch + 1


class ReadBenchmark:
    """A benchmark of reading without decoding that also counts the page faults that waited for the storage."""

    def __init__(self, plan: BatchSampler) -> None:
        self._plan = plan
        self._faults = 0

    def requests(self) -> Generator[SampleRequest, None, None]:
        """Yield a run's requests without an end."""
        start = _start_progress(self._plan)
        with closing(self._plan.training(start, EPOCHS)) as requests, closing(self._plan.extra(start, EPOCHS)) as extra:
            while True:
                before = _page_faults()
                request, _ = next(requests), next(extra)
                self._faults += _page_faults() - before
                yield request

    def __str__(self) -> str:
        """Return a line that says whether the page cache was warm."""
        state = f"cold, {self._faults:,} page faults waited for the storage" if self._faults else "warm"
        return f"page cache while reading was measured, including warm-up: {state}"


def open_training(run: Run, recipe: Recipe, device: torch.device) -> Loader:
    """Return the loader of the training images, with the rows of the teacher's cache if the recipe has one.

    ``recipe`` is the run's, or one with other settings of the loader.
    """
    teacher = build_teacher(run, device) if recipe.teacher and recipe.teacher.cache else None
    if isinstance(teacher, CachedTeacher):
        # The cache may contain only the views of the recipe's epochs, and more epochs are measured here.
        views = views_read(recipe, teacher.cache)
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"views": views})})
    return build_loader(recipe, run.manifest, device, ("train",), teacher)


def stream(loader: Loader) -> Items:
    """Yield training batches without an end."""
    yield from loader.stream(_start_progress(loader.plan), EPOCHS)


def take(items: Iterator[Any], count: int) -> None:
    """Consume the next ``count`` items, keeping none of them."""
    deque(islice(items, count), maxlen=0)


def _start_progress(plan: BatchSampler) -> Progress:
    return Progress(plan.steps_per_epoch)


def _first_requests(plan: BatchSampler, count: int) -> list[SampleRequest]:
    """Return a run's first ``count`` requests, one epoch's at most."""
    with closing(plan.training(_start_progress(plan), 1)) as requests:
        return list(islice(requests, count))


def _page_faults() -> int:
    """Return how many page faults of this process have waited for the storage."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt
