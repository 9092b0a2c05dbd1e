"""Run a recipe's teacher once over images without labels, store its answers, and choose the images to train on.

    python pipeline/pseudo_label.py RECIPE SHARDS FOLDER [keep=0.3 per_class=130000] [key=value …]
    torchrun --nproc_per_node 8 pipeline/pseudo_label.py RECIPE SHARDS FOLDER       with any number of ranks

SHARDS are those of ``shards/prepare_unlabelled.py``, or any others of images with one class, whose labels are not read.
FOLDER is the recipe's ``data.unlabelled.pseudo``. It gets the logits of every image in the transform of validation, in
float16, and the ids of the images to train on. An image counts for its likeliest class. It is kept if the probability
is at least ``keep``, up to ``per_class`` of a class, the surest first. Rare classes have theirs several times.

The same command continues after an interruption. With another ``keep`` or ``per_class`` it chooses anew, and the
teacher does not run again. Source: Xie et al., "Self-training with Noisy Student", CVPR 2020, arXiv:1911.04252.
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

import json
from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import Field, PositiveInt

from pipeline.batch import rows_per_rank
from pipeline.builders.teacher import teacher_facts
from pipeline.builders.unlabelled import read_unlabelled
from pipeline.caching.blocks import Block
from pipeline.caching.image_selection import select_images, write_selection
from pipeline.caching.source import AnswerSource, check_expected, live_teacher, open_plain_source
from pipeline.caching.write import begin, exit_stopped, new_header, write_blocks
from pipeline.cli import entry
from pipeline.config.arguments import parse_command_args, parse_recipe_args, split_command_args
from pipeline.config.recipe import LoadedRecipe, load_recipe
from pipeline.data.loader import plain_fingerprint
from pipeline.distributed import collectives, signals
from pipeline.distributed.launcher import Launch, read_launch
from pipeline.errors import Interrupted, RecipeError, display_path, error_context
from pipeline.frozen_model import FrozenModel
from pipeline.runs.dependencies import ensure_dependencies
from pipeline.runs.identity import Run
from pipeline.runs.ownership import check_cache_folder
from pipeline.runs.rank_settings import join_ranks
from pipeline.teachers.cache import LOGITS, Cache, CacheEntry, open_cache
from pipeline.teachers.config import Config
from pipeline.training.accelerator import create_accelerator, use_all_cores

UNUSED = ("data.unlabelled", "data.views", "compare", "student.start")
"""Keys of the recipe on which the teacher's answers do not depend."""


class LabelArguments(FrozenModel):
    """The arguments of ``pseudo_label.py`` that are not overrides of the recipe."""

    keep: Annotated[float, Field(ge=0, le=1)] = 0.3
    """Least probability of an image's likeliest class."""
    per_class: PositiveInt = 130_000
    """Largest number of images of a class."""
    block: int = Field(default=1024, gt=0, le=2**24)
    """Approximate number of images that are written together. A folder that exists keeps its own."""


def main(args: Sequence[str]) -> None:
    """Write the pseudo-labels that the command line names."""
    options, rest = split_command_args(args, tuple(LabelArguments.model_fields))
    arguments, launch = parse_command_args(options, LabelArguments), read_launch()
    words = [word for word in rest if "=" not in word and not word.startswith("-")]
    if len(words) != 3:
        raise RecipeError(f"command line: expected RECIPE SHARDS FOLDER, got {' '.join(words) or 'nothing'}")
    recipe_file, shards, folder = words[0], words[1], Path(words[2])
    path, overrides = parse_recipe_args([recipe_file, *(word for word in rest if word not in words)])
    with error_context(display_path(path)):
        check_cache_folder(folder, "FOLDER", "name another folder")
        try:
            run = ensure_dependencies(without_unused(path, overrides, folder), launch)
            join_ranks(launch, "pseudo_label", run.recipe, run, folder=folder, **arguments.model_dump(mode="json"))
        except Interrupted as interrupted:
            print(interrupted)
            exit_stopped(folder)
        use_all_cores(launch)
        write_labels(run, live_teacher(run.recipe), shards, folder, arguments, launch)


def without_unused(path: Path, overrides: Sequence[str], folder: Path) -> LoadedRecipe:
    """Return the recipe without what the teacher's answers do not depend on, and with the batch of ``folder``.

    It has no losses: what they read of a batch is not there yet. The batch does not depend on the number of ranks, so
    that any number of ranks writes the same outputs.
    """
    recipe, existing = load_recipe(path, overrides, losses=False).recipe, open_cache(folder)
    rows = existing.header.batch if existing else rows_per_rank(recipe.batch, 1, recipe.accumulation)
    config = live_teacher(recipe)
    if config.head or config.combine == "confidence":
        raise RecipeError("teacher: head: none has no answers, and combine: confidence needs labels; remove the key")
    batch = config.batch or rows
    changes = [*(f"{key}=null" for key in UNUSED), f"teacher.batch={batch}"]
    return load_recipe(path, [*overrides, *changes], losses=False)


def write_labels(
    run: Run, config: Config, shards: str, folder: Path, arguments: LabelArguments, launch: Launch
) -> None:
    """Write the missing logits, every rank its share of them, and then which images are used."""
    signals.install()
    accelerator, manifest = create_accelerator(run.recipe, launch), read_unlabelled(shards, "SHARDS")
    source = open_plain_source(run, config, manifest, shards, accelerator.device)
    check_expected(run, config, source)
    blocks: list[Block] = []
    if accelerator.is_main_process:
        facts = {
            "teacher": teacher_facts(run, config, accelerator.device, published=True),
            "data": plain_fingerprint(run.recipe.data, manifest, accelerator.device),
            "shards": manifest.sha256,
        }
        kinds = {LOGITS: CacheEntry(shape=(run.manifest.num_classes,))}
        facts = json.loads(json.dumps(facts))  # tuples become lists, as in the header that they are compared with
        blocks = begin(folder, new_header(1, config.batch or 1, arguments.block, kinds, [], source, facts), source)
    # Rank 0 alone reads the folder, which is about to change, and gives its list of blocks to the others.
    blocks = collectives.gather_objects(blocks)[0]
    is_complete = write_blocks(Cache(folder), source, blocks)
    if accelerator.is_main_process and is_complete:
        keep_images(Cache(folder), source, arguments)
    accelerator.print(f"{folder}: {'complete' if is_complete else 'stopped; the same command continues'}")
    accelerator.end_training()
    if not is_complete:
        exit_stopped(folder if launch.is_main else None)


def keep_images(cache: Cache, source: AnswerSource, arguments: LabelArguments) -> None:
    """Choose the images to use, write their ids, and print how many there are."""
    present = source.present(range(cache.header.id_count))
    ids = select_images(cache.complete_view(0, LOGITS), present, arguments.keep, arguments.per_class)
    if not len(ids):
        raise RecipeError(f"keep: no image has a class with a probability of {arguments.keep:g} or more; lower keep")
    write_selection(cache.folder, ids, arguments.keep, arguments.per_class)
    (classes,), used = cache.header.kinds[LOGITS].shape, len(np.unique(ids))
    counts = np.bincount(cache.rows(0, LOGITS)[ids].argmax(axis=1), minlength=classes)
    print(
        f"{used:,} of {len(present):,} images are used; an epoch has {counts.max():,} of each of "
        f"{np.count_nonzero(counts):,} classes, copies of rare ones included"
    )
    if empty := classes - np.count_nonzero(counts):
        print(f"note: {empty:,} of {classes:,} classes have no such image")


if __name__ == "__main__":
    entry(main)
