"""Measure a student exactly: every validation image once, over any number of ranks.

    python pipeline/evaluate.py runs/demo/seed-0 [weights=best]      the student of a run: last, best or ema
    python pipeline/evaluate.py RECIPE weights=FILE [key=value …]    a weights file, with a recipe's network and data

It prints top-1 and top-5 in percent. ``agreement=yes`` adds the teacher's, and how often student and teacher agree.
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
    signals.exit_quietly_on_interrupt()
    nvjpeg.load_first()  # before the imports below: torchvision brings an older one

from collections.abc import Sequence

from accelerate import Accelerator

from pipeline.builders.loader import build_loader
from pipeline.builders.student import build_student, student_spec, weights_layout
from pipeline.builders.teacher import build_live_teacher
from pipeline.cli import entry
from pipeline.config.arguments import parse_command_args, parse_recipe_args, split_command_args
from pipeline.config.recipe import load_recipe
from pipeline.data.loader import Loader
from pipeline.distributed.launcher import read_launch
from pipeline.errors import RecipeError
from pipeline.features.taps import FeatureTaps
from pipeline.frozen_model import FrozenModel
from pipeline.models.weights import load_weights
from pipeline.runs.dependencies import prepare_shards
from pipeline.runs.files import STUDENT, STUDENT_BEST, STUDENT_EMA, check_student
from pipeline.runs.folder import load_run
from pipeline.runs.identity import Run, resolve, run_folder
from pipeline.runs.rank_settings import join_ranks
from pipeline.tasks._base import Evaluation, Task
from pipeline.tasks._registry import find_task
from pipeline.teachers.config import Config as Teacher
from pipeline.training.accelerator import create_accelerator, use_all_cores
from pipeline.training.evaluation import agreement, evaluate, evaluate_teacher
from shards.manifest import read_manifest

NAMED_WEIGHTS = {"last": STUDENT, "best": STUDENT_BEST, "ema": STUDENT_EMA}


class EvaluateArguments(FrozenModel):
    """The options of the command."""

    weights: str = "last"
    agreement: bool = False


def main(args: Sequence[str]) -> None:
    """Evaluate the weights that the command line names."""
    options, args = split_command_args(args, tuple(EvaluateArguments.model_fields))
    arguments, launch = parse_command_args(options, EvaluateArguments), read_launch()
    target, overrides = parse_recipe_args(args)
    folder = target if target.is_dir() else None
    loaded = load_run(folder, overrides) if folder else load_recipe(target, overrides)
    prepare_shards(loaded, launch, trusted=folder is None)  # never a script that a run folder names
    recipe = loaded.recipe
    teacher = _comparison_teacher(recipe.teacher) if arguments.agreement else None
    weights = _weights_file(arguments.weights, folder or run_folder(loaded))
    manifest = read_manifest(Path(recipe.data.path))
    # Without a Run, whose identity has the digests, the manifest and the file must be compared explicitly.
    join_ranks(launch, "evaluate", recipe, manifest=manifest.sha256, file=weights, agreement=arguments.agreement)
    use_all_cores(launch)
    accelerator = create_accelerator(recipe, launch)
    loader = build_loader(recipe, manifest, accelerator.device, ("val",))
    spec, layout = student_spec(recipe.student, recipe.taps.student), weights_layout(recipe, launch)
    student = build_student(spec, loader.num_classes, recipe.seed, layout).to(accelerator.device)
    if note := load_weights(student.model, str(weights), recipe.student.model, arguments=spec.arguments):
        accelerator.print(f"note: weights: {note}")
    task = find_task(recipe.task)
    result = evaluate(task, student, loader.validation(), accelerator)
    accelerator.print(f"{weights}: {_describe(task, result)}  ({result.samples:,} images)")
    if teacher is not None:
        _report_teacher(resolve(loaded, launch), loader, student, accelerator)


def _comparison_teacher(config: Teacher | None) -> Teacher:
    """Return the teacher. Raises RecipeError if there is none that can be evaluated."""
    if config is None:
        raise RecipeError("agreement=yes: the recipe has no teacher")
    if config.average is not None:
        raise RecipeError("agreement=yes: the teacher is the student's moving average, which a run does not save")
    if config.head is not None:
        raise RecipeError("agreement=yes: the teacher has no head (teacher.head: none), so it predicts no class")
    if config.combine == "confidence":
        raise RecipeError("agreement=yes: combine: confidence uses the labels, so its accuracy means nothing")
    if not config.has_model:
        raise RecipeError("agreement=yes: a cache has no validation images; give teacher.model and teacher.weights")
    return config


def _report_teacher(run: Run, loader: Loader, student: FeatureTaps, accelerator: Accelerator) -> None:
    teacher = build_live_teacher(run, _comparison_teacher(run.recipe.teacher), (), accelerator.device)
    task = find_task(run.recipe.task)
    accelerator.print(f"teacher: {_describe(task, evaluate_teacher(task, teacher, loader))}")
    accelerator.print(f"agreement: {agreement(task, student, teacher, loader.validation(), accelerator):.2f}")


def _describe(task: Task, result: Evaluation) -> str:
    return "  ".join(f"{task.titles[name]} {value:.2f}" for name, value in result.metrics.items())


def _weights_file(name: str, folder: Path) -> Path:
    file = folder / NAMED_WEIGHTS[name] if name in NAMED_WEIGHTS else Path(name)
    if not file.is_file():
        raise RecipeError(f"weights: there is no file {file}; train the run first, or give weights=FILE")
    check_student(file)
    return file


if __name__ == "__main__":
    entry(main)
