"""Find the decoding threads, the prefetch and the share of the GPU's JPEG engine with which images come quickest here.

What cannot change a pixel is remembered (``pipeline/data/loader_settings.py``), the rest only told.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch

from pipeline.benchmarks.loader import items_ahead, measure_in_turn, open_training, stream
from pipeline.benchmarks.measure import Measurement
from pipeline.config.recipe import Recipe
from pipeline.data.config import Config
from pipeline.data.loader_settings import LoaderSettings, cores, remember, tuned_path, workload_key
from pipeline.distributed import collectives
from pipeline.errors import RecipeError
from pipeline.runs.identity import Run
from shards.manifest import Manifest

_SECONDS = 1.0
"""Of a repeat, about."""
REPEATS = 3
PREFETCHES = (1, 2, 4)
HW_DECODER_LOADS = (0.0, 0.4, 0.65, 0.9)
AS_GOOD = 0.98
"""Of the best rate: threads, buffers and pixels unlike a CPU's are not spent on less than the noise."""


def tune(run: Run, device: torch.device) -> list[Measurement]:
    """Measure ``Loader.stream`` at a few values of one setting after the other, keep the best, and remember it.

    Start it on as many ranks a machine as train there: they share its cores. Raises RecipeError where nothing is
    decoded as training goes.
    """
    recipe = run.recipe
    if recipe.data.loader != "dali":
        raise RecipeError(f"data.loader: {recipe.data.loader} decodes nothing as it goes: there is nothing to tune")
    best, measured = recipe.data.model_copy(update={"threads": cores(), "prefetch": 2}), []
    for key, values in _sweeps(recipe, device).items():
        tried = _sweep(run, [best.model_copy(update={key: value}) for value in values], key, device)
        chosen = _least_of_the_best(dict(zip(values, tried, strict=True)))
        best = best.model_copy(update={key: collectives.gather_objects(chosen)[0]})
        measured += tried
    if collectives.is_main():
        _conclude(recipe.data, best, run.manifest, device)
    return measured


def _sweeps(recipe: Recipe, device: torch.device) -> dict[str, Iterable[Any]]:
    """Return the values to try of each setting."""
    sweeps: dict[str, Iterable[Any]] = {"threads": _thread_counts(), "prefetch": PREFETCHES}
    if device.type == "cuda" and not (recipe.teacher and recipe.teacher.cache):  # a cache is of one share
        sweeps["hw_decoder_load"] = HW_DECODER_LOADS
    return sweeps


def _thread_counts() -> list[int]:
    """Return quarters of this rank's cores."""
    return sorted({math.ceil(cores() * quarters / 4) for quarters in (1, 2, 3, 4)})


def _sweep(run: Run, configs: list[Config], key: str, device: torch.device) -> list[Measurement]:
    """Return what was measured with each of some configurations, which differ in ``key``."""
    tried = [run.recipe.model_copy(update={"data": config}) for config in configs]
    loaders = [open_training(run, recipe, device) for recipe in tried]
    full = max(items_ahead(loader.pace) for loader in loaders)
    turns = partial(measure_in_turn, device=device, warmup=full, ahead=full)
    pilot = turns({key: stream(loaders[-1])}, repeats=1, steps=2, images=0)
    steps = collectives.gather_objects(max(1, round(2 * _SECONDS / pilot[0].median)))[0]  # ranks go in step
    names = [f"{key} {getattr(config, key)}" for config in configs]
    parts = {name: stream(loader) for name, loader in zip(names, loaders, strict=True)}
    images = steps * loaders[0].plan.micro_batch
    measured = turns(parts, repeats=REPEATS, steps=steps, images=images)
    if collectives.is_main():
        for each in measured:
            slowest, quickest = images / max(each.seconds), images / min(each.seconds)
            print(f"{each.name:<20} {each.images_per_second:8,.0f} images/s ({slowest:,.0f}–{quickest:,.0f})")
    return measured


def _least_of_the_best(tried: dict[Any, Measurement]) -> Any:
    """Return the least value whose rate is as good as the best."""
    best = max(each.images_per_second for each in tried.values())
    return min(value for value, each in tried.items() if each.images_per_second >= AS_GOOD * best)


def _conclude(given: Config, best: Config, manifest: Manifest, device: torch.device) -> None:
    """Remember the pace and say so; the share of the JPEG engine is only told."""
    pace = LoaderSettings(threads=best.threads or 1, prefetch=best.prefetch or 1)
    told = f"data.threads={pace.threads} data.prefetch={pace.prefetch}"
    try:
        path = remember(pace, given, manifest, device)
        print(
            f"{told} for {workload_key(given, manifest, device)}: remembered in {path}; what a recipe says itself wins"
        )
    except OSError as error:
        print(f"note: {tuned_path()} cannot be written ({error.strerror}); give {told}")
    if best.hw_decoder_load != given.hw_decoder_load:
        print(f"data.hw_decoder_load={best.hw_decoder_load} is best, and yours to give, because it may change pixels")
