"""Run a recipe's teacher once over the shards and store its outputs, so that training need not run it again.

    python pipeline/cache_teacher.py RECIPE views=4 [key=value …]          write; the same command resumes it
    torchrun --nproc_per_node 8 pipeline/cache_teacher.py RECIPE views=4   with any number of ranks, at any time
    python pipeline/cache_teacher.py --dry-run RECIPE views=4              the size on disk; needs no data
    python pipeline/cache_teacher.py --verify RECIPE [sample=256] [tolerance=0.01]

The folder is the recipe's ``teacher.cache``. The cache has the logits and the features that the recipe's losses read.
``kinds=[embedding, last]`` adds others. ``encode={last: 256}``, or the recipe's ``teacher.encode``, keeps that many
principal components of a stage's channels. More views and kinds can be added later. ``--verify`` reads every byte, and
runs the teacher again on a sample of images.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from pipeline import nvjpeg
    from pipeline.cli import answer_help
    from pipeline.distributed import signals

    answer_help(__doc__)
    signals.install()  # before the imports below: they take seconds, and a scheduler may send a signal meanwhile
    nvjpeg.load_first()  # before the imports below: torchvision brings an older one

from collections.abc import Iterable, Sequence

import numpy as np

from pipeline.batch import rows_per_rank
from pipeline.builders.teacher import check_provenance, check_sizes, provenance
from pipeline.caching.blocks import Block
from pipeline.caching.damage import Damage, find_damage, mark_damaged
from pipeline.caching.size import check_one_size, choices, size_table
from pipeline.caching.source import check_expected, live_teacher, open_source
from pipeline.caching.verify import compare_answers
from pipeline.caching.write import CacheArguments, begin, exit_stopped, new_header, write_blocks
from pipeline.cli import entry
from pipeline.config.arguments import parse_command_args, parse_recipe_args, split_command_args
from pipeline.config.recipe import LoadedRecipe, Recipe, load_recipe
from pipeline.distributed import collectives, signals
from pipeline.distributed.launcher import Launch, read_launch
from pipeline.errors import Interrupted, RecipeError, display_path, error_context
from pipeline.runs.dependencies import ensure_dependencies
from pipeline.runs.identity import Run
from pipeline.runs.ownership import check_cache_folder
from pipeline.runs.rank_settings import join_ranks
from pipeline.teachers.cache import Cache, open_cache
from pipeline.teachers.config import Config
from pipeline.training.accelerator import create_accelerator, use_all_cores

FLAGS = ("--dry-run", "--verify")


def main(args: Sequence[str]) -> None:
    """Write the cache that the command line names, print its size, or verify it."""
    options, rest = split_command_args([arg for arg in args if arg not in FLAGS], tuple(CacheArguments.model_fields))
    arguments, launch = parse_command_args(options, CacheArguments), read_launch()
    path, overrides = parse_recipe_args(rest)
    loaded = load_recipe(path, overrides)
    with error_context(display_path(loaded.path)):
        config = live_teacher(loaded.recipe)
        existing = open_cache(Path(config.cache)) if config.cache else None
        arguments = fill_arguments(arguments, loaded.recipe, config, existing)
        if "--dry-run" in args:
            available, _ = choices(loaded.recipe, recipes(loaded.teachers), arguments.kinds, arguments.encode)
            check_one_size(loaded.recipe, available)
            print(size_table(loaded.recipe, available, arguments.views or 1))
            return
        folder = cache_folder(config)
        if "--verify" not in args:
            check_cache_folder(folder)
        live = without_cache(loaded, config, overrides, arguments.views, existing)
        try:
            run = ensure_dependencies(live, launch)
            if "--verify" not in args:
                join_ranks(launch, "cache_teacher", run.recipe, run, cache=folder, **arguments.model_dump(mode="json"))
        except Interrupted as interrupted:
            print(interrupted)
            exit_stopped(None if "--verify" in args else folder)
        use_all_cores(launch)
        if "--verify" in args:
            verify_cache(run, live_teacher(run.recipe), folder, arguments, config.accept, launch)
        else:
            write(run, live_teacher(run.recipe), folder, arguments, launch)


def recipes(loaded: Iterable[LoadedRecipe | Run]) -> list[Recipe]:
    """Return the recipe of each run or loaded recipe."""
    return [item.recipe for item in loaded]


def cache_folder(config: Config) -> Path:
    """Return the folder of the cache. Raises RecipeError if the recipe does not name it."""
    if config.cache is None:
        raise RecipeError("teacher.cache: the recipe names no folder; give teacher.cache=FOLDER")
    return Path(config.cache)


def fill_arguments(arguments: CacheArguments, recipe: Recipe, config: Config, existing: Cache | None) -> CacheArguments:
    """Return the arguments, completed from the recipe and the existing cache, whose kinds all views must have."""
    kinds = existing.header.kinds if existing else {}
    views = arguments.views or recipe.data.views or (existing.header.views if existing else None)
    components = {name: kind.encoded.rank for name, kind in kinds.items() if kind.encoded}
    encode = {**components, **config.encode, **arguments.encode}
    return arguments.model_copy(update={"views": views, "kinds": (*kinds, *arguments.kinds), "encode": encode})


def without_cache(
    loaded: LoadedRecipe, config: Config, overrides: Sequence[str], views: int | None, existing: Cache | None
) -> LoadedRecipe:
    """Return the recipe with the live teacher in place of the cache, and with the cache's views and batch.

    The student's start and the compared runs are left out, as the teacher does not depend on them. The batch does not
    depend on the number of ranks, so that any number of ranks writes the same outputs.
    """
    if views is None:
        raise RecipeError("command line: views: give the number of augmented views of each image, such as views=4")
    recipe = loaded.recipe
    batch = config.batch or (existing.header.batch if existing else rows_per_rank(recipe.batch, 1, recipe.accumulation))
    changes = [f"teacher.{key}=null" for key in ("cache", "fallback", "accept", "encode")]
    changes += ["compare=null", "student.start=null", f"data.views={views}", f"teacher.batch={batch}"]
    return load_recipe(loaded.path, [*overrides, *changes])


# -- writing ----------------------------------------------------------------------------------------------------------


def write(run: Run, config: Config, folder: Path, arguments: CacheArguments, launch: Launch) -> None:
    """Write the missing blocks of the cache; every rank writes its share of them."""
    signals.install()
    recipe, views = run.recipe, arguments.views or 1
    accelerator = create_accelerator(recipe, launch)
    available, stages = choices(recipe, recipes(run.teachers), arguments.kinds, arguments.encode)
    kinds = {choice.name: choice.kind for choice in available if choice.written}
    source = open_source(run, config, kinds, accelerator.device)
    check_expected(run, config, source)
    blocks: list[Block] = []
    if accelerator.is_main_process:
        print(size_table(recipe, available, views))
        facts = provenance(run, config, accelerator.device, published=True)
        header = new_header(views, config.batch or 1, arguments.block, kinds, stages, source, facts)
        blocks = begin(folder, header, source)
    # Rank 0 alone reads the folder, which is about to change, and gives its list of blocks to the others.
    blocks = collectives.gather_objects(blocks)[0]
    is_complete = write_blocks(Cache(folder), source, blocks)
    accelerator.print(f"{folder}: {'complete' if is_complete else 'stopped; the same command continues'}")
    accelerator.end_training()
    if not is_complete:
        exit_stopped(folder if launch.is_main else None)


# -- verifying --------------------------------------------------------------------------------------------------------


def verify_cache(
    run: Run, config: Config, folder: Path, arguments: CacheArguments, accept: Iterable[str], launch: Launch
) -> None:
    """Read every byte, run the teacher again on a sample, and exit with code 1 if either shows an error."""
    if launch.world_size > 1:
        raise RecipeError("--verify runs in a single process; start it without a launcher")
    cache, device = Cache(folder), create_accelerator(run.recipe, launch).device
    check_provenance(cache, provenance(run, config, device), accept)
    check_sizes(cache, run.manifest)
    if damages := list(find_damage(cache)):
        # Each description once: a lost encoder damages its kind at every view.
        print("\n".join(dict.fromkeys(damage.description for damage in damages)))
        print(mark_and_report(cache, damages))
        sys.exit(1)
    print(f"{folder}: {cache.header.views} views of {', '.join(cache.header.kinds)}: every byte is as it was written")
    source = open_source(run, config, cache.header.kinds, device)
    measured = compare_answers(cache, source, arguments.sample, np.random.default_rng())
    print("\n".join(map(str, measured)))
    # "not … <=" and not ">", so that a NaN counts as an error.
    if wrong := [error.kind for error in measured if not error.relative <= arguments.tolerance]:
        print(f"{', '.join(wrong)}: error above the tolerance, {arguments.tolerance:g} of the largest output")
        sys.exit(1)


def mark_and_report(cache: Cache, damages: Iterable[Damage]) -> str:
    """Mark the damaged blocks as not written, and return a message with what to do next."""
    try:
        mark_damaged(cache, damages)
    except (OSError, ValueError) as error:  # another user's cache, or one that is being written
        return f"{cache.folder}: nothing is marked there ({error})"
    return f"{cache.folder}: marked as not written; the same command without --verify writes it (again)"


if __name__ == "__main__":
    entry(main)
