"""Run a recipe's teacher once over the shards and keep its answers, to train from instead of asking it again.

    python pipeline/cache_teacher.py RECIPE views=4 [key=value …]          write; the same command goes on after a stop
    torchrun --nproc_per_node 8 pipeline/cache_teacher.py RECIPE views=4   with any number of ranks, at any time
    python pipeline/cache_teacher.py --dry-run RECIPE views=4              what that takes on disk; needs no data
    python pipeline/cache_teacher.py --verify RECIPE [sample=256] [tolerance=0.01]

The folder is the recipe's ``teacher.cache``. What is written are the logits and what the recipe's losses read; more by
``kinds=[embedding, last]``; ``encode={last: 256}``, or the recipe's ``teacher.encode``, keeps that many principal
components of a stage's channels; more views and kinds may be added later. ``--verify`` reads every byte and asks the
teacher again for a sample of images.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from pipeline.distributed import signals

    signals.install()  # what follows takes seconds to load, and a scheduler may end the job at any of them

import signal
from collections.abc import Iterable, Sequence
from typing import NoReturn

import numpy as np

from pipeline.batch import rows_per_rank
from pipeline.builders.loader import build_loader, training_splits
from pipeline.builders.teacher import check_provenance, check_sizes, provenance
from pipeline.caching.blocks import Block
from pipeline.caching.damage import Damage, find_damage, mark_damaged
from pipeline.caching.size import choices, size_table
from pipeline.caching.source import open_source
from pipeline.caching.verify import compare_answers
from pipeline.caching.write import CacheArguments, begin, new_header, write_blocks
from pipeline.cli import entry
from pipeline.config.arguments import parse_command_args, parse_recipe_args, split_command_args
from pipeline.config.recipe import LoadedRecipe, Recipe, load_recipe
from pipeline.distributed import collectives, signals
from pipeline.distributed.launcher import Launch, read_launch
from pipeline.errors import Interrupted, RecipeError, display_path, error_context
from pipeline.runs.dependencies import ensure_dependencies
from pipeline.runs.folder import mark_preempted
from pipeline.runs.identity import Run
from pipeline.runs.ownership import check_cache_folder
from pipeline.runs.rank_settings import join_ranks
from pipeline.teachers.cache import Cache, open_cache
from pipeline.teachers.config import Config
from pipeline.training.accelerator import create_accelerator, use_all_cores
from pipeline.training.evaluation import check_teacher_accuracy

FLAGS = ("--dry-run", "--verify")
STOPPED = 128 + signal.SIGTERM
"""Exit code of a command that ended before its work was done: what is written stays, and the same command goes on."""


def main(words: Sequence[str]) -> None:
    """Write the cache that the command line names, or say what it takes, or verify it."""
    own, rest = split_command_args([word for word in words if word not in FLAGS], tuple(CacheArguments.model_fields))
    asked, launch = parse_command_args(own, CacheArguments), read_launch()
    path, overrides = parse_recipe_args(rest)
    loaded = load_recipe(path, overrides)
    with error_context(display_path(loaded.path)):
        config = network_of(loaded.recipe)
        there = open_cache(Path(config.cache)) if config.cache else None
        asked = complete(asked, loaded.recipe, config, there)
        if "--dry-run" in words:
            found, _ = choices(loaded.recipe, recipes(loaded.teachers), asked.kinds, asked.encode)
            print(size_table(loaded.recipe, found, asked.views or 1))
            return
        folder = cache_folder(config)
        if "--verify" not in words:
            check_cache_folder(folder)
        live = without_cache(loaded, config, overrides, asked.views, there)
        try:
            run = ensure_dependencies(live, launch)
            if "--verify" not in words:
                join_ranks(launch, "cache_teacher", run.recipe, run, cache=folder, **asked.model_dump(mode="json"))
        except Interrupted as unfinished:
            print(unfinished)
            stopped(None if "--verify" in words else folder)
        use_all_cores(launch)
        if "--verify" in words:
            verify_cache(run, network_of(run.recipe), folder, asked, config.accept, launch)
        else:
            write(run, network_of(run.recipe), folder, asked, launch)


def recipes(loaded: Iterable[LoadedRecipe | Run]) -> list[Recipe]:
    """Return the recipes themselves."""
    return [each.recipe for each in loaded]


def network_of(recipe: Recipe) -> Config:
    """Return the recipe's teacher. Raises RecipeError unless it is a frozen network, to be asked."""
    config = recipe.teacher
    if config is None or config.average is not None or not config.has_model:
        raise RecipeError("teacher: there is no frozen network to ask; give teacher.model and teacher.weights")
    return config


def cache_folder(config: Config) -> Path:
    """Return where the cache is to lie. Raises RecipeError if the recipe does not say."""
    if config.cache is None:
        raise RecipeError("teacher.cache: say which folder to write: teacher.cache=FOLDER")
    return Path(config.cache)


def complete(asked: CacheArguments, recipe: Recipe, config: Config, there: Cache | None) -> CacheArguments:
    """Return the words with what the recipe says, and with what the cache has: further views get all of its kinds."""
    kinds = there.header.kinds if there else {}
    views = asked.views or recipe.data.views or (there.header.views if there else None)
    ranks = {name: kind.encoded.rank for name, kind in kinds.items() if kind.encoded}
    encode = {**ranks, **config.encode, **asked.encode}
    return asked.model_copy(update={"views": views, "kinds": (*kinds, *asked.kinds), "encode": encode})


def without_cache(
    loaded: LoadedRecipe, config: Config, overrides: Sequence[str], views: int | None, there: Cache | None
) -> LoadedRecipe:
    """Return the recipe of the network itself, with the views and the teacher's batch of its cache.

    Where the student begins and what it is compared with is nothing of the teacher's. The batch does not depend on the
    number of ranks, so that any number writes the same answers.
    """
    if views is None:
        raise RecipeError("command line: views: say how many augmented looks at an image to keep, such as views=4")
    recipe = loaded.recipe
    own = config.batch or (there.header.batch if there else rows_per_rank(recipe.batch, 1, recipe.accumulation))
    words = [f"teacher.{key}=null" for key in ("cache", "fallback", "accept", "encode")]
    words += ["compare=null", "student.start=null", f"data.views={views}", f"teacher.batch={own}"]
    return load_recipe(loaded.path, [*overrides, *words])


# -- writing ----------------------------------------------------------------------------------------------------------


def write(run: Run, config: Config, folder: Path, asked: CacheArguments, launch: Launch) -> None:
    """Write what of the cache is not there yet; every rank takes its share of the blocks."""
    signals.install()
    recipe, views = run.recipe, asked.views or 1
    accelerator = create_accelerator(recipe, launch)
    found, stages = choices(recipe, recipes(run.teachers), asked.kinds, asked.encode)
    kinds = {choice.name: choice.kind for choice in found if choice.written}
    source = open_source(run, config, kinds, accelerator.device)
    if config.expect_top1 is not None:
        splits = training_splits(run.manifest)[1:]
        check_teacher_accuracy(config, source.teacher, build_loader(recipe, run.manifest, accelerator.device, splits))
    blocks: list[Block] = []
    if accelerator.is_main_process:
        print(size_table(recipe, found, views))
        facts = provenance(run, config, accelerator.device, published=True)
        header = new_header(views, config.batch or 1, asked.block, kinds, stages, source, facts)
        blocks = begin(folder, header, source)
    blocks = collectives.gather_objects(blocks)[0]
    is_whole = write_blocks(Cache(folder), source, blocks)
    accelerator.print(f"{folder}: {'whole' if is_whole else 'stopped; the same command goes on'}")
    accelerator.end_training()
    if not is_whole:
        stopped(folder if launch.is_main else None)


def stopped(folder: Path | None) -> NoReturn:
    """End the command before its work is done, for a scheduler with word in the ``folder`` if a signal ended it."""
    if folder is not None and signals.stop_requested():
        mark_preempted(folder)
    sys.exit(STOPPED)


# -- verifying --------------------------------------------------------------------------------------------------------


def verify_cache(
    run: Run, config: Config, folder: Path, asked: CacheArguments, accept: Iterable[str], launch: Launch
) -> None:
    """Read every byte, ask the teacher again about a sample, and exit with 1 where something is not as it should be."""
    if launch.world_size > 1:
        raise RecipeError("--verify is the work of one process; start it without a launcher")
    cache, device = Cache(folder), create_accelerator(run.recipe, launch).device
    check_provenance(cache, provenance(run, config, device), accept)
    check_sizes(cache, run.manifest)
    if found := list(find_damage(cache)):
        print("\n".join(dict.fromkeys(damage.description for damage in found)))
        print(mark_and_report(cache, found))
        sys.exit(1)
    print(f"{folder}: {cache.header.views} views of {', '.join(cache.header.kinds)}: every byte is as it was written")
    source = open_source(run, config, cache.header.kinds, device)
    measured = compare_answers(cache, source, asked.sample, np.random.default_rng())
    print("\n".join(map(str, measured)))
    if worst := [each.kind for each in measured if not each.relative <= asked.tolerance]:
        print(f"{', '.join(worst)}: more than the tolerated {asked.tolerance:g} of the largest answer")
        sys.exit(1)


def mark_and_report(cache: Cache, found: Iterable[Damage]) -> str:
    """Mark what is damaged as not written, and return what to do now."""
    try:
        mark_damaged(cache, found)
    except (OSError, ValueError) as error:  # somebody else's cache, or one that is being written
        return f"{cache.folder}: nothing is marked there ({error})"
    return f"{cache.folder}: marked as not written; the same command without --verify writes it (again)"


if __name__ == "__main__":
    entry(main)
