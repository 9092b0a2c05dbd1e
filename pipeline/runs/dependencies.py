"""The dependencies of a recipe, its shards and other runs, and the commands that make those that are missing.

A recipe may depend on other runs (``teacher: {recipe: …}``, ``student: {start: {recipe: …}}``, ``compare: […]``) and on
shards (``data: {prepare: […]}``). ``ensure_dependencies`` makes each missing one in a process of its own, before this
process has an Accelerator.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from pipeline.commands import as_started
from pipeline.config.recipe import LoadedRecipe, load_recipe
from pipeline.config.source import RecipeSource
from pipeline.distributed import signals
from pipeline.distributed.launcher import Launch
from pipeline.distributed.rendezvous import check_launcher
from pipeline.errors import EXIT_USER_ERROR, SOURCE, AlreadyReported, Interrupted, RecipeError, display_path
from pipeline.runs.describe import explain_training, training_order
from pipeline.runs.drawing import undrawn_environment
from pipeline.runs.folder import check_folder
from pipeline.runs.identity import Run, check_no_cycle, resolve
from shards.manifest import MANIFEST


def ensure_dependencies(
    loaded: LoadedRecipe, launch: Launch, announce: Callable[[Run], None] = lambda run: None
) -> Run:
    """Make the missing shards and runs that ``loaded`` depends on, and return its run.

    ``announce`` is called with the run once its shards are there, before another run is trained. The dependencies of a
    finished run are not needed again. With several ranks, none may be missing: RecipeError names the command that
    makes it.
    """
    check_no_cycles(loaded)
    prepare_shards(loaded, launch)
    run = resolve(loaded, launch)
    announce(run)
    return _ensure(run, launch, lambda: resolve(loaded, launch))


def check_no_cycles(loaded: LoadedRecipe, above: tuple[RecipeSource, ...] = ()) -> None:
    """Raise RecipeError if a recipe depends on itself, directly or through others."""
    check_no_cycle(loaded, above)
    for named in (*loaded.teachers, *([loaded.start] if loaded.start else []), *loaded.of_losses, *loaded.compare):
        check_no_cycles(named, (*above, loaded.source))


def _ensure(run: Run, launch: Launch, resolved_again: Callable[[], Run]) -> Run:
    """Train the missing runs that ``run`` needs, those that others need first, and return ``run``.

    The modules and the route that a run leaves are part of the identity of those that read them, which are then
    resolved again.
    """
    while missing := next((pair for pair in training_order(run) if pair[1].result is None), None):
        dependent, dependency = missing
        _train(dependency, dependent, launch)
        leaves_modules = any(spec.loss.exported for spec in dependency.recipe.losses.values())
        if leaves_modules or dependency.recipe.checkpoints.export_epochs:
            run = resolved_again()
    return run


def _train(run: Run, dependent: Run, launch: Launch) -> None:
    """Train the run that ``dependent`` names; its own dependencies are there already."""
    _check_keeps_route(run, dependent)
    check_folder(run, f"move {run.folder} away")
    path, *selection = run.source.args
    data_path, *others = run.overrides
    # The message is for the user: it leaves out an override that changes nothing.
    is_moved = load_recipe(path, [*selection, *others]).recipe.data.path != run.recipe.data.path
    message = " ".join([run.command, *([shlex.quote(data_path)] if is_moved else []), *map(shlex.quote, others)])
    command = [sys.executable, str(SOURCE / "pipeline" / "train.py"), *run.source.args, *run.overrides]
    _execute(command, message, launch, explain_training(dependent, run))
    if run.result is None:
        raise Interrupted(f"{message} was stopped before its end; the same command continues")


def _check_keeps_route(run: Run, dependent: Run) -> None:
    """Raise RecipeError if the run is a teacher that will not keep the weights of its route."""
    teacher = dependent.recipe.teacher
    if teacher is None or teacher.route is None or run is not dependent.teachers[0]:
        return
    missing = [epoch for epoch in teacher.route.epochs if epoch not in run.recipe.checkpoints.export_epochs]
    if missing:
        raise RecipeError(
            f"teacher.route: {display_path(run.path)} will keep no weights of epoch {missing[0]}; set "
            f"checkpoints.export_epochs: [{', '.join(map(str, teacher.route.epochs))}] there"
        )


def prepare_shards(loaded: LoadedRecipe, launch: Launch, *, trusted: bool = True) -> None:
    """Run ``data.prepare`` if ``data.path`` has no manifest. Raises RecipeError if the recipe is not ``trusted``."""
    data = loaded.recipe.data
    if (Path(data.path) / MANIFEST).is_file():
        return
    if not (data.prepare and trusted):
        raise RecipeError(
            f"{display_path(loaded.path)}: data.path: there are no shards in {data.path!r} (no {MANIFEST}); "
            f"run the script named at the top of {_data_set_file(loaded.path)}, or give data.path=FOLDER"
        )
    script, *arguments = *data.prepare, data.path
    key = f"{display_path(loaded.path)}: data.prepare"
    # The project's own scripts first: no folder that a command is started in replaces them.
    file = next((file for file in (SOURCE / script, Path(script)) if "\0" not in script and file.is_file()), None)
    if any("\0" in word for word in data.prepare) or file is None:
        raise RecipeError(f"{key}: there is no script {script!r}; name one such as shards/prepare_demo.py")
    message = shlex.join(["python", script, *arguments])
    reason = f"{display_path(loaded.path)}: there are no shards in {data.path!r} yet; preparing them first"
    _execute([sys.executable, str(file), *arguments], message, launch, reason)
    if not (Path(data.path) / MANIFEST).is_file():
        raise RecipeError(f"{key}: {message} made no {MANIFEST} in {data.path!r}; name a script that prepares shards")


def _data_set_file(path: Path) -> str:
    """Return the file of the data set, ``configs/imagenet/imagenet.yaml``, of a recipe beside it; else its kind."""
    file = path.with_name(f"{path.parent.name}.yaml")
    return display_path(file) if file.is_file() else "the data set's recipe"


def _execute(command: list[str], message: str, launch: Launch, reason: str) -> None:
    """Print the reason for a command, and run it to its end. A signal to stop ends it early, and raises Interrupted.

    Raises AlreadyReported if the command has reported its error itself, and RecipeError if it failed in another way.
    """
    if launch.world_size > 1:
        raise RecipeError(f"this run depends on something that is missing; one process must make it first: {message}")
    check_launcher()  # processes that cannot see one another would each run the command
    print(f"{reason}\n$ {as_started(message)}", flush=True)
    status = _status(command)
    if signals.stop_requested():
        raise Interrupted(f"{message} was stopped before its end; the same command continues")
    if status == EXIT_USER_ERROR:
        raise AlreadyReported(message)
    if status != 0:
        raise RecipeError(f"this run depends on a command that failed with exit code {status}: {message}")


def _status(command: list[str]) -> int:
    """Run a command and return its exit code; a signal to stop is forwarded to it."""
    signals.install()
    with subprocess.Popen(command, env=undrawn_environment()) as process, signals.forward_to(process.terminate):
        return process.wait()


def finished(run: Run | None) -> Run:
    """Return the run. Raises RecipeError unless it is finished."""
    if run is None:
        raise RecipeError("this run depends on a run that is not known")
    if run.result is None:
        raise RecipeError(f"{run.folder} holds no finished run of {display_path(run.path)}; train it: {run.command}")
    return run
