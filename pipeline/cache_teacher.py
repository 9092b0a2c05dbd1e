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
    from pipeline import notice

    notice.listen()  # what follows takes seconds to load, and a scheduler may end the job at any of them

import signal
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, PositiveFloat, PositiveInt
from torch import Tensor
from tqdm import tqdm

from pipeline import linear_encoder, notice, parallel
from pipeline.batch import Outputs
from pipeline.build import build_loader, training_splits
from pipeline.build_teacher import binding, refuse_others
from pipeline.caching.asking import Part, Source, open_source, stored
from pipeline.caching.blocks import (
    Block,
    check_room,
    create_files,
    damages,
    missing_blocks,
    shown_bytes,
    write_block,
)
from pipeline.caching.storage import choices, table
from pipeline.caching.verifying import differences
from pipeline.composition import RecipeError, about, shown
from pipeline.evaluate import check_teacher
from pipeline.launch import create_accelerator, entry, use_all_cores
from pipeline.linear_encoder import Encoder
from pipeline.recipe import LoadedRecipe, Recipe, load_recipe, own_words, split_words, typed_words
from pipeline.runs import Unfinished, lock_folder, stand, world_size_asked
from pipeline.teacher_cache import (
    DTYPE,
    Binding,
    Cache,
    Encoded,
    Header,
    Kind,
    Norm,
    encoder_path,
    open_cache,
    write_header,
)
from shards.manifest import read_manifest

FLAGS = ("--dry-run", "--verify")
FITTED, HELD_OUT = 4096, 1024
"""Images that an encoder is fitted on, and others that tell what it loses."""
STOPPED = 128 + signal.SIGTERM
"""Exit code of a command that a signal ended: what is written stays, and the same command goes on."""
IN_A_LOG = 60.0
"""Seconds between two lines of progress where there is no terminal."""

Names = Annotated[tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]


class Asked(BaseModel):
    """The command's own words."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    views: PositiveInt | None = None
    kinds: Names = ()
    encode: dict[str, PositiveInt] = {}
    block: PositiveInt = 1024
    """Images that are written and marked as done together, about; a cache that is there keeps its own."""
    sample: PositiveInt = 256
    tolerance: PositiveFloat = 0.01
    """Of a difference, as a share of the largest answer of its kind."""


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
    notice.listen()
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
    blocks = parallel.gather_objects(blocks)[0]
    is_whole = write_blocks(Cache(folder), source, blocks)
    accelerator.print(f"{folder}: {'whole' if is_whole else 'stopped; the same command goes on'}")
    accelerator.end_training()
    if not is_whole:
        sys.exit(STOPPED)


def new_header(
    recipe: Recipe, asked: Asked, kinds: dict[str, Kind], stages: list[str], source: Source, facts: dict[str, Any]
) -> Header:
    """Return the header of a folder in which there is nothing yet; encoders are still to be fitted."""
    assert recipe.teacher is not None
    assert recipe.data.views is not None
    batch = recipe.teacher.batch or 1
    return Header(
        views=recipe.data.views,
        id_count=source.loader.id_count,
        batch=batch,
        block=batch * max(asked.block // batch, 1),
        stages=tuple(stages),
        kinds={name: kind.model_copy(update={"norm": _norm(source, name)}) for name, kind in kinds.items()},
        binding=Binding.model_validate(facts),
    )


def _norm(source: Source, kind: str) -> Norm | None:
    norm = source.teacher.norms.get(kind)
    return Norm(weight=tuple(norm.weight_C.tolist()), bias=tuple(norm.bias_C.tolist())) if norm else None


def begin(folder: Path, new: Header, source: Source) -> list[Block]:
    """Make the folder ready and return what is to be written; nothing is touched in one that this cannot go on in."""
    lock_folder(folder)
    there = open_cache(folder)
    header = extended(there, new) if there else new
    blocks = missing_blocks(Cache(folder, header))
    print(f"{folder}: {shown_bytes(check_room(Cache(folder, header), blocks))} to write")
    header = with_encoders(folder, header, source)
    write_header(folder, header)
    create_files(Cache(folder, header))
    return blocks


def extended(cache: Cache, new: Header) -> Header:
    """Return the cache's header with the views and kinds of ``new``; raise RecipeError where they do not fit."""
    refuse_others(cache, new.binding.model_dump())
    old, folder = cache.header, cache.folder
    if old.batch != new.batch:
        raise RecipeError(f"{folder} was begun with teacher.batch: {old.batch}, here {new.batch}; keep to that")
    for name, kind in old.kinds.items():
        if name not in new.kinds:
            raise RecipeError(f"{folder} has got {name} meanwhile, from another command; give this one again")
        if kind.stored != new.kinds[name].stored:
            there = " × ".join(map(str, kind.stored))
            raise RecipeError(f"{folder} has {name} as {there}; keep to that, or name another folder")
    return old.model_copy(update={"views": max(old.views, new.views), "kinds": {**new.kinds, **old.kinds}})


def with_encoders(folder: Path, header: Header, source: Source) -> Header:
    """Fit the encoders that are not there yet, write them, and return the header that names them."""
    kinds = {
        name: kind.model_copy(update={"encoded": _fitted(folder, name, kind.encoded.rank, header.batch, source)})
        if kind.encoded and not kind.encoded.sha256
        else kind
        for name, kind in header.kinds.items()
    }
    return header.model_copy(update={"kinds": kinds})


def _fitted(folder: Path, kind: str, rank: int, batch: int, source: Source) -> Encoded:
    """Fit an encoder on some images, write it, and return it with what it loses of others."""
    ids = np.random.default_rng(0).permutation(source.present(range(source.loader.id_count)))
    held_out = max(min(HELD_OUT, len(ids) // 5), 1)

    def maps(ids: NDArray[np.int64]) -> Iterator[Tensor]:
        parts = ((ids[start : start + batch], 0) for start in range(0, len(ids), batch))
        return (outputs.features[kind] for outputs in source.answers(parts))

    encoder = linear_encoder.fit(maps(ids[held_out : held_out + FITTED]), rank)
    lost = linear_encoder.unexplained(encoder, maps(ids[:held_out]))
    print(f"{kind}: {rank} components lose {lost:.2%} of the variance of {held_out:,} images they were not fitted on")
    sha256 = linear_encoder.save(encoder, encoder_path(folder, kind))
    return Encoded(rank=rank, sha256=sha256, unexplained=lost)


def write_blocks(cache: Cache, source: Source, blocks: list[Block]) -> bool:
    """Write this rank's share of the blocks, one at a time on every rank; return whether all were written.

    A notice to stop that any rank was given ends it between two blocks.
    """
    rank, world = parallel.rank(), parallel.world_size()
    mine = blocks[rank::world]
    encoders = cache.encoders(source.loader.device)
    answers = source.answers(_parts(cache, source, mine))
    images = sum(len(ids) for ids, _ in _parts(cache, source, mine))
    title = f"rank {rank} of {world}" if world > 1 else None
    pause = 0.1 if sys.stderr.isatty() else IN_A_LOG
    with tqdm(total=images, unit="img", desc=title, disable=rank > 0, mininterval=pause, delay=pause) as bar:
        for turn in range(-(-len(blocks) // world)):
            if parallel.any_rank(notice.given()):
                return False
            if turn < len(mine):
                write_block(cache, mine[turn], _rows(cache, source, mine[turn], answers, encoders, bar))
    return True


def _parts(cache: Cache, source: Source, blocks: Iterable[Block]) -> Iterator[Part]:
    """Yield what the teacher is asked for some blocks, but for the chunks without a sample."""
    for block in blocks:
        for ids in cache.header.chunks(block.number):
            if len(present := source.present(ids)):
                yield present, block.view


def _rows(
    cache: Cache,
    source: Source,
    block: Block,
    answers: Iterator[Outputs],
    encoders: dict[str, Encoder],
    bar: tqdm[Any],
) -> Iterator[tuple[range, dict[str, NDArray[np.float16]]]]:
    """Yield the rows of a block, chunk by chunk; ``answers`` are those to ``_parts``, in their order."""
    for ids in cache.header.chunks(block.number):
        rows = {kind: np.zeros((len(ids), *cache.header.kinds[kind].stored), DTYPE) for kind in block.kinds}
        if len(present := source.present(ids)):
            for kind, found in stored(next(answers), block.kinds, encoders).items():
                rows[kind][present - ids.start] = found
        yield ids, rows
        bar.update(len(present))
        bar.set_postfix_str(shown_bytes(bar.n * cache.header.row_bytes(block.kinds)), refresh=False)


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
