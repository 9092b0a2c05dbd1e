"""What a message says about a run: how far it is, and for what another run needs it."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.config.recipe import Recipe
from pipeline.runs.files import CHECKPOINTS, checkpoint_folders, read_identity
from pipeline.runs.identity import Run, differing_keys

NEW = "new"


def describe_state(run: Run) -> str:
    """Return how far a run is: new, finished, or the step at which the same command continues it."""
    if run.result is not None:
        return "finished"
    begun = read_identity(run.folder)
    if begun is None:
        return NEW
    if differing_keys(begun.values(), run.identity):
        return "holds the run of another recipe"
    total, saved = run.recipe.epochs * run.steps_per_epoch, checkpoint_folders(run.folder / CHECKPOINTS)
    if not saved:
        return "begun before its first checkpoint, starts at step 0 again"
    return f"continues at step {saved[-1].name.removeprefix('step-')} of {total}"


def describe_epochs(recipe: Recipe) -> str:
    """Return the length of a run as text."""
    return f"{recipe.epochs} epoch{'s' if recipe.epochs > 1 else ''}"


def describe_role(dependent: Run, dependency: Run) -> str:
    """Return what ``dependency`` is to ``dependent``, as the beginning of a line."""
    if any(dependency is teacher for teacher in dependent.teachers):
        role = "teacher of"
    else:
        stages = (dependent.start, *dependent.of_losses)
        role = "first stage of" if any(dependency is stage for stage in stages) else "compared with"
    return f"{role} {dependent.source}"


def explain_training(dependent: Run, dependency: Run) -> str:
    """Return why ``dependency`` is trained now, and how long it is."""
    state = describe_state(dependency)
    details = describe_epochs(dependency.recipe) + ("" if state == NEW else f", {state}")
    name = dependency.source
    return f"{describe_role(dependent, dependency)}: {name} is not trained yet; training it first ({details})"


def training_order(run: Run) -> Iterator[tuple[Run, Run]]:
    """Yield each run that ``run`` depends on, after the one that needs it, in the order in which they are trained.

    What a finished run was made from is not needed again. A run that several others need is yielded once.
    """
    seen: set[int] = set()

    def walk(dependent: Run) -> Iterator[tuple[Run, Run]]:
        for dependency in dependent.needed if dependent.result is None else ():
            yield from walk(dependency)
            if id(dependency) not in seen:
                seen.add(id(dependency))
                yield dependent, dependency

    yield from walk(run)
