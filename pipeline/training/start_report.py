"""The first lines of a command: which run it trains, from where on, on what, and what has to be trained before it."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.batch import rows_per_rank
from pipeline.config.recipe import Recipe
from pipeline.distributed.launcher import Launch
from pipeline.runs.describe import describe_epochs, describe_role, describe_state, training_order
from pipeline.runs.identity import Run
from shards.cores import usable_cores

_SHARED = ("data.path", "folder")
"""Keys that the note on overrides leaves out: every dependency gets ``data.path``, and each run has its own folder."""


def print_start(run: Run, launch: Launch) -> None:
    """Print on the main process what this command is going to do with ``run``; every rank calls it."""
    recipe = run.recipe
    lines = {
        "recipe": f"{run.source}: {recipe.student.model}, losses {' + '.join(recipe.losses)}",
        "folder": f"{run.folder}: {describe_state(run)}",
    }
    if run.result is None:
        lines |= {
            "data": _describe_data(run),
            "teacher": _describe_teacher(run),
            "device": _describe_device(recipe, launch),
            "batch": _describe_batch(recipe, launch),
            "training": _describe_steps(run),
        }
    # On every rank, because a damaged file is an error, and a rank that did not see it would wait for the main one.
    text = "\n".join([*(f"{title:<10} {text}" for title, text in lines.items()), *_dependency_lines(run)])
    if launch.is_main:
        print(text, flush=True)


def _describe_data(run: Run) -> str:
    names = {"train": "training", "val": "validation"}
    if run.recipe.data.holdout and "train" in run.manifest.splits:
        images, whole = run.training_images, run.manifest.splits["train"].samples
        return f"{run.recipe.data.path}: {images:,} training images, {whole - images:,} held out for validation"
    splits = [f"{split.samples:,} {names.get(name, name)} images" for name, split in run.manifest.splits.items()]
    return f"{run.recipe.data.path}: {', '.join(splits)}"


def _describe_teacher(run: Run) -> str:
    teacher = run.recipe.teacher
    if teacher is None:
        return "none"
    if teacher.average is not None:
        return "a moving average of the student's weights"
    if teacher.snapshots is not None:
        return f"the student itself at the end of each of {teacher.snapshots.cycles} cycles"
    if run.recipe.data.unlabelled and not run.recipe.runs_teacher:
        return f"pseudo-labels {run.recipe.data.unlabelled.pseudo}"
    runs = [each.recipe.student.model for each in run.teachers]
    models = [network.model for network in teacher.members or (teacher,) if network.model]
    live = f"live, {' + '.join([*runs, *models])}{' without its head' if teacher.head else ''}"
    if teacher.route is not None:
        epochs = ", ".join(map(str, teacher.route.epochs))
        return f"{live}, after epochs {epochs} of its own run, {_count(teacher.route.each, 'epoch')} each"
    if teacher.cache is None:
        return live
    return f"outputs from the cache {teacher.cache}" + (f"; others {live}" if teacher.uses_live_model else "")


def _describe_device(recipe: Recipe, launch: Launch) -> str:
    device = "CPU" if launch.on_cpu else "GPU"
    cores = len(usable_cores())
    used = f" with {_count(cores, 'core')}" if launch.on_cpu and launch.world_size == 1 else ""
    precision = "precision from DeepSpeed" if launch.use_deepspeed else recipe.precision
    return f"{device}, {_count(launch.world_size, 'rank')}{used}, {precision}"


def _describe_batch(recipe: Recipe, launch: Launch) -> str:
    rows = rows_per_rank(recipe.batch, launch.world_size, recipe.accumulation)
    if rows * launch.world_size * recipe.accumulation != recipe.batch:
        return f"{recipe.batch} images"  # an error of the loader, which says what to change
    ranks, per_rank = _count(launch.world_size, "rank"), _count(rows, "row")
    unlabelled = recipe.rows_per_step - recipe.batch
    others = f", and {unlabelled} without labels" if unlabelled else ""
    return f"{recipe.batch} images = {ranks} × {per_rank} × accumulation {recipe.accumulation}{others}"


def _describe_steps(run: Run) -> str:
    in_epoch, recipe = run.steps_per_epoch, run.recipe
    stops = [f"stop.{key}={value:g}" for key, value in recipe.stop if value is not None]
    text = f"{describe_epochs(recipe)} × {in_epoch} steps = {recipe.epochs * in_epoch} steps"
    return text + (f"; this command ends at {' or '.join(stops)}" if stops else "")


def _dependency_lines(run: Run) -> Iterator[str]:
    """Yield a line for each run that this one depends on, and a note if overrides do not reach one of them."""
    missing = False
    for dependent, dependency in training_order(run):
        state = describe_state(dependency)
        if dependency.result is None:
            missing = True
            state += f", is trained first ({describe_epochs(dependency.recipe)})"
        yield f"{'needs':<10} {dependency.source}, {describe_role(dependent, dependency)}: {state}"
    # The first stage of a student gets the seed of this run.
    shared = (*_SHARED, "seed") if run.start else _SHARED
    own = [override for override in run.overrides if override.partition("=")[0] not in shared]
    if missing and own:
        verb = "applies" if len(own) == 1 else "apply"
        yield f"note: {' '.join(own)} {verb} to this run only; the others are trained by their own recipes"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number > 1 else ''}"
