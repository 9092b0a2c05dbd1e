"""The shards and runs that a recipe stands on, made where they are not there.

A recipe may stand on other runs (``teacher: {recipe: …}``, ``student: {start: {recipe: …}}``, ``compare: […]``) and on
shards (``data: {prepare: […]}``). ``ensure_dependencies`` makes what is not there, each in a process of its own, before
this process has an Accelerator.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

from pipeline.config.recipe import LoadedRecipe, Recipe, inherited_overrides, load_recipe
from pipeline.distributed import signals
from pipeline.distributed.launcher import Launch
from pipeline.distributed.rendezvous import check_launcher
from pipeline.errors import ROOT, AlreadyReported, Interrupted, RecipeError, display_path
from pipeline.runs.folder import check_folder
from pipeline.runs.identity import Run, check_no_cycle, resolve
from shards.manifest import MANIFEST

_USER_ERROR = 2
"""Exit code of a command of this project that has said in one line what is wrong."""


def ensure_dependencies(loaded: LoadedRecipe, launch: Launch) -> Run:
    """Make the shards and the runs that ``loaded`` stands on, where they are not there, and return its run.

    What a finished run stood on is not asked for again. Under several ranks all must be there already: RecipeError
    names the command that makes it.
    """
    check_no_cycles(loaded)
    prepare_shards(loaded, launch)
    run = resolve(loaded, launch)
    _ensure(run, launch)
    return run


def check_no_cycles(loaded: LoadedRecipe, above: tuple[Path, ...] = ()) -> None:
    """Raise RecipeError if a recipe stands on itself, before anything is made."""
    check_no_cycle(loaded, above)
    for named in (*loaded.teachers, *([loaded.start] if loaded.start else []), *loaded.compare):
        check_no_cycles(named, (*above, loaded.path))


def _ensure(run: Run, launch: Launch) -> None:
    if run.result is not None:
        return
    for path, below in run.needed.items():
        _ensure(below, launch)
        if below.result is None:
            _make(below, run.recipe, path, launch)


def _make(run: Run, above: Recipe, path: str, launch: Launch) -> None:
    """Train a run that ``above`` names by ``path`` and that stands on nothing that is missing."""
    check_folder(run, f"move {run.folder} away")
    place, *more = inherited_overrides(above, path)
    elsewhere = load_recipe(path, more).recipe.data.path != above.data.path
    told = " ".join([run.command, *([shlex.quote(place)] if elsewhere else []), *more])
    _execute([sys.executable, str(ROOT / "pipeline" / "train.py"), str(run.path), place, *more], told, launch)
    if run.result is None:
        raise Interrupted(f"{told} was stopped before its end; the same command continues")


def prepare_shards(loaded: LoadedRecipe, launch: Launch, *, trusted: bool = True) -> None:
    """Run ``data.prepare`` if ``data.path`` has no manifest; that of a recipe which is not ``trusted`` is an error."""
    data = loaded.recipe.data
    if (Path(data.path) / MANIFEST).is_file():
        return
    if not (data.prepare and trusted):
        raise RecipeError(
            f"{display_path(loaded.path)}: data.path: there are no shards in {data.path!r} (no {MANIFEST}); "
            "make them with the script that the head of the data set's recipe names, or give data.path=FOLDER"
        )
    script, *arguments = *data.prepare, data.path
    key = f"{display_path(loaded.path)}: data.prepare"
    if any("\0" in word for word in data.prepare) or not (ROOT / script).is_file():
        raise RecipeError(f"{key}: there is no script {script!r}; name one such as shards/prepare_demo.py")
    told = shlex.join(["python", script, *arguments])
    _execute([sys.executable, str(ROOT / script), *arguments], told, launch)
    if not (Path(data.path) / MANIFEST).is_file():
        raise RecipeError(f"{key}: {told} made no {MANIFEST} in {data.path!r}; name a script that prepares shards")


def _execute(command: list[str], message: str, launch: Launch) -> None:
    """Run a command to its end; a notice to stop ends it first, wherever it is, and raises Interrupted.

    Raises AlreadyReported where it said itself what is wrong, and RecipeError where it ended otherwise.
    """
    if launch.world_size > 1:
        raise RecipeError(
            f"this run stands on something that is not there yet and one process must make first: {message}"
        )
    check_launcher()
    print(f"$ {message}", flush=True)
    status = _status(command)
    if signals.stop_requested():
        raise Interrupted(f"{message} was stopped before its end; the same command continues")
    if status == _USER_ERROR:
        raise AlreadyReported(message)
    if status != 0:
        raise RecipeError(f"this run stands on another that ended with exit code {status}: {message}")


def _status(command: list[str]) -> int:
    """Return a command's exit code; a notice to stop is passed on to it."""
    signals.install()
    with subprocess.Popen(command) as process, signals.forward_to(process.terminate):
        return process.wait()


def finished(run: Run | None) -> Run:
    """Return the run. Raises RecipeError unless it is finished."""
    if run is None:
        raise RecipeError("a run that this one stands on is not known")
    if run.result is None:
        raise RecipeError(f"{run.folder} holds no finished run of {display_path(run.path)}; make it: {run.command}")
    return run
