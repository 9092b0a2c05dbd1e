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

    signals.listen()  # what follows takes seconds to load, and a scheduler may end the job at any of them

import signal
from collections.abc import Iterable, Sequence

import numpy as np

from pipeline.builders.student import build_loader, training_splits
from pipeline.builders.teacher import binding, refuse_others
from pipeline.caching.blocks import (
    Block,
    damages,
)
from pipeline.caching.size import choices, table
from pipeline.caching.source import open_source
from pipeline.caching.verify import differences
from pipeline.caching.write import Asked, begin, new_header, write_blocks
from pipeline.cli import entry
from pipeline.config.arguments import own_words, split_words, typed_words
from pipeline.config.recipe import LoadedRecipe, Recipe, load_recipe
from pipeline.distributed import collectives, signals
from pipeline.distributed.rendezvous import world_size_asked
from pipeline.errors import RecipeError, about, shown
from pipeline.runs.dependencies import Unfinished, stand
from pipeline.teachers.cache import (
    Cache,
    open_cache,
)
from pipeline.training.accelerator import create_accelerator, use_all_cores
from pipeline.training.evaluation import check_teacher
from shards.manifest import read_manifest

FLAGS = ("--dry-run", "--verify")
STOPPED = 128 + signal.SIGTERM
"""Exit code of a command that a signal ended: what is written stays, and the same command goes on."""


def main(words: Sequence[str]) -> None:
    """Write the cache that the command line names, or say what it takes, or verify it."""
    own, rest = own_words([word for word in words if word not in FLAGS], tuple(Asked.model_fields))
    asked = typed_words(own, Asked)
    path, overrides = split_words(rest)
    loaded = load_recipe(path, overrides)
    with about(shown(loaded.path)):
        check_names_a_network(loaded.recipe)
        there = cache_of(loaded.recipe)
        asked = complete(asked, loaded.recipe, there)
        if "--dry-run" in words:
            found, _ = choices(loaded.recipe, asked.kinds, asked.encode)
            print(table(loaded.recipe, found, asked.views or 1))
            return
        folder = cache_folder(loaded.recipe)
        try:
            recipe = stand(without_cache(loaded, overrides, asked, there)).recipe
        except Unfinished as unfinished:
            print(unfinished)
            sys.exit(STOPPED)
        use_all_cores()
        if "--verify" in words:
            assert loaded.recipe.teacher is not None
            verify(recipe, folder, asked, loaded.recipe.teacher.accept)
        else:
            write(recipe, folder, asked)


def check_names_a_network(recipe: Recipe) -> None:
    """Raise RecipeError for a recipe without a frozen network to ask."""
    config = recipe.teacher
    if config is None or config.average is not None or not config.is_named:
        raise RecipeError("teacher: there is no frozen network to ask; give teacher.model and teacher.weights")


def cache_folder(recipe: Recipe) -> Path:
    """Return where the recipe's cache is to lie. Raises RecipeError if it does not say."""
    if recipe.teacher is None or recipe.teacher.cache is None:
        raise RecipeError("teacher.cache: say which folder to write: teacher.cache=FOLDER")
    return Path(recipe.teacher.cache)


def cache_of(recipe: Recipe) -> Cache | None:
    """Return the recipe's cache, if it has been begun."""
    folder = recipe.teacher.cache if recipe.teacher else None
    return open_cache(Path(folder)) if folder else None


def complete(asked: Asked, recipe: Recipe, there: Cache | None) -> Asked:
    """Return the words with what the recipe says, and with what the cache has: further views get all of its kinds."""
    kinds = there.header.kinds if there else {}
    views = asked.views or recipe.data.views or (there.header.views if there else None)
    ranks = {name: kind.encoded.rank for name, kind in kinds.items() if kind.encoded}
    encode = {**ranks, **(recipe.teacher.encode if recipe.teacher else {}), **asked.encode}
    return asked.model_copy(update={"views": views, "kinds": (*kinds, *asked.kinds), "encode": encode})


def without_cache(loaded: LoadedRecipe, overrides: Sequence[str], asked: Asked, there: Cache | None) -> LoadedRecipe:
    """Return the recipe of the network itself, with the views and the teacher's batch of its cache.

    Where the student begins and what it is compared with is nothing of the teacher's. The batch does not depend on the
    number of ranks, so that any number writes the same answers.
    """
    recipe = loaded.recipe
    assert recipe.teacher is not None
    if asked.views is None:
        raise RecipeError("command line: views: say how many augmented looks at an image to keep, such as views=4")
    own = recipe.teacher.batch or (there.header.batch if there else max(recipe.batch // recipe.accumulation, 1))
    words = [f"teacher.{key}=null" for key in ("cache", "fallback", "accept", "encode")]
    words += ["compare=null", "student.start=null", f"data.views={asked.views}", f"teacher.batch={own}"]
    return load_recipe(loaded.path, [*overrides, *words])


# -- writing ----------------------------------------------------------------------------------------------------------


def write(recipe: Recipe, folder: Path, asked: Asked) -> None:
    """Write what of the cache is not there yet; every rank takes its share of the blocks."""
    signals.listen()
    accelerator = create_accelerator(recipe)
    device, manifest = accelerator.device, read_manifest(Path(recipe.data.path))
    found, stages = choices(recipe, asked.kinds, asked.encode)
    kinds = {choice.name: choice.kind for choice in found if choice.written}
    source = open_source(recipe, kinds, manifest, device)
    if recipe.teacher and recipe.teacher.expect_top1 is not None:
        check_teacher(recipe, source.teacher, build_loader(recipe, device, training_splits(manifest)[1:]))
    blocks: list[Block] = []
    if accelerator.is_main_process:
        assert recipe.data.views is not None
        print(table(recipe, found, recipe.data.views))
        facts = binding(recipe, manifest, device, published=True)
        blocks = begin(folder, new_header(recipe, asked, kinds, stages, source, facts), source)
    blocks = collectives.gather_objects(blocks)[0]
    is_whole = write_blocks(Cache(folder), source, blocks)
    accelerator.print(f"{folder}: {'whole' if is_whole else 'stopped; the same command goes on'}")
    accelerator.end_training()
    if not is_whole:
        sys.exit(STOPPED)


# -- verifying --------------------------------------------------------------------------------------------------------


def verify(recipe: Recipe, folder: Path, asked: Asked, accept: Iterable[str]) -> None:
    """Read every byte, ask the teacher again about a sample, and exit with 1 where something is not as it should be."""
    if world_size_asked() > 1:
        raise RecipeError("--verify is the work of one process; start it without a launcher")
    cache, device = Cache(folder), create_accelerator(recipe).device
    manifest = read_manifest(Path(recipe.data.path))
    refuse_others(cache, binding(recipe, manifest, device), accept)
    if found := list(damages(cache)):
        print("\n".join(found))
        sys.exit(1)
    print(f"{folder}: {cache.header.views} views of {', '.join(cache.header.kinds)}: every byte is as it was written")
    source = open_source(recipe, cache.header.kinds, manifest, device)
    measured = differences(cache, source, asked.sample, np.random.default_rng())
    print("\n".join(map(str, measured)))
    if worst := [each.kind for each in measured if not each.relative <= asked.tolerance]:
        print(f"{', '.join(worst)}: more than the tolerated {asked.tolerance:g} of the largest answer")
        sys.exit(1)


if __name__ == "__main__":
    entry(main)
