"""The shards and runs that a recipe stands on, made where they are not there.

A recipe may stand on other runs (``teacher: {recipe: …}``, ``student: {start: {recipe: …}}``, ``compare: […]``) and on
shards (``data: {prepare: […]}``). ``stand`` makes what is not there, each in a process of its own, before this process
has an Accelerator.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

from pipeline.config.recipe import LoadedRecipe, Recipe, load_recipe
from pipeline.distributed import signals
from pipeline.distributed.rendezvous import refuse_lone_ranks, world_size_asked
from pipeline.errors import ROOT, RecipeError, shown
from pipeline.runs.folder import check_folder
from pipeline.runs.identity import Run, dependencies, find_run, load_dependency, named_recipes, overrides_for
from shards.manifest import MANIFEST


class Unfinished(Exception):
    """A run that this one stands on was told to stop; the same command continues it."""


def stand(loaded: LoadedRecipe) -> Run:
    """Make the shards and the runs that ``loaded`` stands on, where they are not there, and return its run.

    What a finished run stood on is not asked for again. Under several ranks all must be there already: RecipeError
    names the command that makes it.
    """
    refuse_circles(loaded)
    return _stand(loaded)


def _stand(loaded: LoadedRecipe) -> Run:
    prepare_shards(loaded)
    run = find_run(loaded)
    if run.result is not None:
        return run
    for path in dependencies(loaded.recipe):
        below = _stand(load_dependency(loaded.recipe, path))
        if below.result is None:
            _make(below, loaded.recipe, path)
    return find_run(loaded)


def _make(run: Run, above: Recipe, path: str) -> None:
    """Train a run that ``above`` names by ``path`` and that stands on nothing that is missing."""
    check_folder(run, "move it away")
    place, *more = overrides_for(above, path)
    elsewhere = load_recipe(path, more).recipe.data.path != above.data.path
    told = " ".join([run.command, *([shlex.quote(place)] if elsewhere else []), *more])
    _execute([sys.executable, str(ROOT / "pipeline" / "train.py"), str(run.path), place, *more], told)
    if run.result is None:
        raise Unfinished(f"{told} was stopped before its end; the same command continues")


def refuse_circles(loaded: LoadedRecipe, above: tuple[Path, ...] = ()) -> None:
    """Raise RecipeError if a recipe stands on itself: its identity would have no end."""
    if loaded.path in above:
        raise RecipeError(f"{shown(loaded.path)}: the recipe stands on itself, by way of {shown(above[-1])}")
    for path in named_recipes(loaded.recipe):
        refuse_circles(load_dependency(loaded.recipe, path), (*above, loaded.path))


def prepare_shards(loaded: LoadedRecipe) -> None:
    """Run ``data.prepare`` if ``data.path`` has no manifest."""
    data = loaded.recipe.data
    if (Path(data.path) / MANIFEST).is_file():
        return
    if not data.prepare:
        raise RecipeError(
            f"{shown(loaded.path)}: data.path: there are no shards in {data.path!r} (no {MANIFEST}); "
            "make them with the script that the head of the data set's recipe names, or give data.path=FOLDER"
        )
    script, *arguments = *data.prepare, data.path
    _execute([sys.executable, str(ROOT / script), *arguments], shlex.join(["python", script, *arguments]))


def _execute(command: list[str], told: str) -> None:
    """Run a command to its end; a notice to stop ends it first, wherever it is, and raises Unfinished."""
    if world_size_asked() > 1:
        raise RecipeError(f"this run stands on something that is not there yet and one process must make first: {told}")
    refuse_lone_ranks()
    print(f"$ {told}", flush=True)
    status = _status(command)
    if signals.given():
        raise Unfinished(f"{told} was stopped before its end; the same command continues")
    if status != 0:
        raise RecipeError(f"this run stands on another that ended with exit code {status}: {told}")


def _status(command: list[str]) -> int:
    """Return a command's exit code; a notice to stop is passed on to it."""
    signals.listen()
    with subprocess.Popen(command) as process, signals.passed_on(process.terminate):
        return process.wait()
