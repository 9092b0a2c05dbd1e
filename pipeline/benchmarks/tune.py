"""Search for the fastest loader settings on this machine: decoding threads, prefetch, use of the GPU's JPEG engine.

Settings that cannot change a pixel are saved for later runs (``pipeline/data/loader_settings.py``). The engine changes
them, so it is only printed what a recipe would have to say.
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
from pipeline.data.jpeg_engine import has_engine
from pipeline.data.loader_settings import LoaderSettings, cores, remember, tuned_path, workload_key
from pipeline.distributed import collectives
from pipeline.errors import RecipeError
from pipeline.runs.identity import Run
from shards.manifest import Manifest

_SECONDS = 1.0
"""Approximate length of a repeat in seconds."""
REPEATS = 3
PREFETCHES = (1, 2, 4)
HW_DECODER_LOADS = (0, 1)
GOOD_ENOUGH = 0.98
"""Share of the best rate that is good enough: more threads, buffers or GPU decoding must gain more than the noise."""


def tune(run: Run, device: torch.device) -> list[Measurement]:
    """Measure ``Loader.stream`` with a few values of each setting in turn, and save the best.

    Start it with as many ranks per machine as training: they share its cores. Raises RecipeError if the loader decodes
    nothing during training.
    """
    recipe = run.recipe
    if recipe.data.loader != "dali":
        raise RecipeError(
            f"data.loader: {recipe.data.loader} decodes nothing during training; there is nothing to tune"
        )
    best, measured = recipe.data.model_copy(update={"threads": cores(), "prefetch": 2}), []
    for key, values in _sweeps(recipe, device).items():
        tried = _sweep(run, [best.model_copy(update={key: value}) for value in values], key, device)
        chosen = _smallest_good_value(dict(zip(values, tried, strict=True)))
        # Rank 0 decides, because the ranks measure slightly different rates.
        best = best.model_copy(update={key: collectives.gather_objects(chosen)[0]})
        measured += tried
    if collectives.is_main():
        _save_best(recipe.data, best, run.manifest, device)
    return measured


def _sweeps(recipe: Recipe, device: torch.device) -> dict[str, Iterable[Any]]:
    """Return the values to try for each setting."""
    sweeps: dict[str, Iterable[Any]] = {"threads": _thread_counts(), "prefetch": PREFETCHES}
    # A cache was written with one value.
    if has_engine(device) and not (recipe.teacher and recipe.teacher.cache):
        sweeps["hw_decoder_load"] = HW_DECODER_LOADS
    return sweeps


def _thread_counts() -> list[int]:
    """Return one to four quarters of this rank's cores, rounded up."""
    return sorted({math.ceil(cores() * quarters / 4) for quarters in (1, 2, 3, 4)})


def _sweep(run: Run, configs: list[Config], key: str, device: torch.device) -> list[Measurement]:
    """Return a measurement for each of the configurations, which differ in ``key``."""
    tried = [run.recipe.model_copy(update={"data": config}) for config in configs]
    loaders = [open_training(run, recipe, device) for recipe in tried]
    ahead = max(items_ahead(loader.settings) for loader in loaders)
    measure_loaders = partial(measure_in_turn, device=device, warmup=ahead, ahead=ahead)
    pilot = measure_loaders({key: stream(loaders[-1])}, repeats=1, steps=2, images=0)
    # All ranks take as many steps as rank 0.
    steps = collectives.gather_objects(max(1, round(2 * _SECONDS / pilot[0].median)))[0]
    names = [f"{key} {getattr(config, key)}" for config in configs]
    parts = {name: stream(loader) for name, loader in zip(names, loaders, strict=True)}
    images = steps * loaders[0].plan.micro_batch
    measured = measure_loaders(parts, repeats=REPEATS, steps=steps, images=images)
    if collectives.is_main():
        for each in measured:
            slowest, quickest = images / max(each.seconds), images / min(each.seconds)
            print(f"{each.name:<20} {each.images_per_second:8,.0f} images/s ({slowest:,.0f}–{quickest:,.0f})")
    return measured


def _smallest_good_value(tried: dict[Any, Measurement]) -> Any:
    """Return the smallest value whose rate is within ``GOOD_ENOUGH`` of the best."""
    best = max(each.images_per_second for each in tried.values())
    return min(value for value, each in tried.items() if each.images_per_second >= GOOD_ENOUGH * best)


def _save_best(given: Config, best: Config, manifest: Manifest, device: torch.device) -> None:
    """Save and print the best threads and prefetch; the best ``hw_decoder_load`` is only printed."""
    settings = LoaderSettings(threads=best.threads or 1, prefetch=best.prefetch or 1)
    overrides = f"data.threads={settings.threads} data.prefetch={settings.prefetch}"
    try:
        path = remember(settings, given, manifest, device)
        print(
            f"{overrides} for {workload_key(given, manifest, device)}: saved in {path}; a recipe's own keys override it"
        )
    except OSError as error:
        print(f"note: {tuned_path()} cannot be written ({error.strerror}); give {overrides}")
    if (load := best.hw_decoder_load) != given.hw_decoder_load:
        print(
            f"data.hw_decoder_load={load} is best; it changes pixels, so it is not saved. A new run's recipe may say:"
        )
        print(f"data: {{hw_decoder_load: {load}}}")
