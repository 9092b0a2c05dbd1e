"""Recording of finished runs among the measured results of their recipes.

A recorded run is one of a recipe under ``configs/`` without overrides. Only the place of the data and settings that
change no number may differ. The teacher's weights may come from another file, whose digest the record contains.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from pathlib import Path
from typing import Any

from pipeline.config.compose import read_source
from pipeline.config.measured import RESULTS, MeasuredRun, read_results, results_file
from pipeline.config.recipe import LoadedRecipe, load_recipe
from pipeline.config.source import CONFIGS, RecipeSource
from pipeline.errors import ROOT, RecipeError, display_path, error_context
from pipeline.models.weights_file import is_file
from pipeline.runs.files import (
    IDENTITY,
    RESULT_FILE,
    STUDENT,
    Identity,
    Result,
    read_identity,
    read_result,
    read_versions,
    write_json,
)
from pipeline.runs.folder import load_run
from pipeline.runs.identity import differing_keys, fixed_settings
from pipeline.runs.weights import CONTENT, with_normalization

_DRAWN = ("prepare_demo", "prepare_scenes", "half_hour")
"""Scripts that draw the images of their shards."""
_NO_VERSIONS = ("device", "commit", "uncommitted_changes")
"""Keys of ``versions.json`` that are no versions."""
_FILE = "a file"


def record_run(folder: Path, results: Path = RESULTS) -> Path:
    """Add the finished run in ``folder`` to the results of its recipe, and return their file.

    A run that is recorded already is replaced. Raises RecipeError for a run that is no result of its recipe, and for
    another run of a seed that is recorded.
    """
    source, run = measured_run(folder)
    path = results_file(source, results)
    others = []
    for known in read_results(path):
        if known.teacher != run.teacher:
            raise RecipeError(
                f"{folder}: its teacher ({run.teacher}) is another one than that of the runs in "
                f"{display_path(path)} ({known.teacher}); delete that file to begin it anew"
            )
        if known.seed != run.seed:
            others.append(known)
        elif known.student != run.student:
            raise RecipeError(
                f"{folder}: {display_path(path)} has another run of seed {run.seed} (top-1 {known.last:.2f}, commit "
                f"{str(known.commit)[:7]}); delete its entry there first"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    runs = sorted([*others, run], key=lambda each: each.seed)
    write_json(path, [each.model_dump(mode="json") for each in runs])
    return path


def measured_run(folder: Path) -> tuple[RecipeSource, MeasuredRun]:
    """Return the recipe and the result of the finished run in ``folder``.

    Raises RecipeError if it is not finished, if its images are drawn, and if its recipe was changed by overrides.
    """
    result, identity = _finished(folder)
    source, run = _source(folder, result), load_run(folder)
    seed = run.recipe.seed
    if run.recipe.data.loader == "synthetic" or result.shards in _DRAWN:
        raise RecipeError(f"{folder}: its images are drawn, so this is no result of a data set; train on real images")
    if differing := _differing(run, load_recipe(source.path, [*source.selection, f"seed={seed}"])):
        raise RecipeError(
            f"{folder}: trained with other values of {', '.join(differing)} than {source}; only runs without overrides "
            "are recorded"
        )
    if result.images != (run.recipe.data.samples or result.images):
        raise RecipeError(
            f"{folder}: trained on {result.images:,} images, and {source} says {run.recipe.data.samples:,} "
            "(data.samples); train on the shards that it names"
        )
    if result.last is None or result.best is None:
        raise RecipeError(f"{folder}: its shards have no validation images, so nothing was measured")
    versions = read_versions(folder) or {}
    return source, MeasuredRun(
        seed=seed,
        last=result.last,
        best=max(result.best, result.last),  # −1 if the file with the best weights was moved away
        top5=result.metrics.get("top5"),
        epochs=result.epochs,
        minutes=None if result.seconds is None else round(result.seconds / 60, 1),
        card=result.device,
        ranks=result.ranks,
        side=result.side,
        commit=str(versions["commit"]) if versions.get("commit") else None,
        uncommitted_changes=bool(versions.get("uncommitted_changes")),
        versions={name: str(value) for name, value in versions.items() if name not in _NO_VERSIONS},
        teacher=_teacher_digest(identity.values()["teacher"] or {}),
        identity=result.identity,
        student=result.sha256[STUDENT],
    )


def _finished(folder: Path) -> tuple[Result, Identity]:
    """Return the results and the identity of a finished run. Raises RecipeError if there is none."""
    result, identity = read_result(folder), read_identity(folder)
    if result is None or identity is None:
        missing = RESULT_FILE if result is None else IDENTITY
        raise RecipeError(f"{folder}: there is no finished run (no {missing}); train it to its end")
    if result.identity != hashlib.sha256(json.dumps(identity.values(), sort_keys=True).encode()).hexdigest():
        raise RecipeError(f"{folder}: {RESULT_FILE} is of another run than {IDENTITY}; delete it, and train to the end")
    if result.recipe is None or STUDENT not in result.sha256:
        raise RecipeError(
            f"{folder}: {RESULT_FILE} names no recipe of {display_path(CONFIGS)}, and only those have results. If "
            "earlier code wrote it, delete it and repeat the run's command, which evaluates the last weights again"
        )
    return result, identity


def _source(folder: Path, result: Result) -> RecipeSource:
    """Return the recipe of a result. Raises RecipeError if it is none of the project's."""
    path, *selection = shlex.split(str(result.recipe))
    with error_context(str(folder)):
        source, _ = read_source(ROOT / path, selection)
    names = [name for name in (source.method, *source.overlays) if name]
    if not source.path.is_relative_to(CONFIGS) or any(Path(name).stem != name for name in names):
        raise RecipeError(
            f"{folder}: {source} is no recipe of {display_path(CONFIGS)}; only those have a file of results"
        )
    return source


def _differing(run: LoadedRecipe, expected: LoadedRecipe) -> list[str]:
    """Return the keys whose values make the run one of another recipe than the expected one."""
    ours, theirs = _comparable(run), _comparable(expected)
    if ours["teacher"] and theirs["teacher"]:
        _use_weights(ours["teacher"], theirs["teacher"], expected)
    for section, key in (("teacher", "batch"), ("data", "views")):
        if theirs[section] and theirs[section][key] is None:  # the run has filled it in
            (ours[section] or {}).pop(key, None)
    return differing_keys(ours, theirs)


def _comparable(loaded: LoadedRecipe) -> dict[str, Any]:
    """Return the settings that determine the result of a recipe, without the paths of the teacher's files."""
    recipe = with_normalization(loaded.recipe, [teacher.recipe for teacher in loaded.teachers])
    tree = fixed_settings(recipe)
    teacher = tree["teacher"] or {}
    for network in teacher.get("members") or ([teacher] if teacher else []):
        if network["weights"] and is_file(network["weights"]):
            network |= {"weights": _FILE, "weights_key": None}
    if teacher:
        teacher["cache"] = bool(teacher["cache"])
    return tree


def _use_weights(ours: dict[str, Any], theirs: dict[str, Any], expected: LoadedRecipe) -> None:
    """Let the expected teacher come from a file, if the run's does, and the recipe says a run of the same network."""
    if ours["weights"] == _FILE and ours["model"] and theirs["recipe"] and not theirs["weights"]:
        student = expected.teachers[0].recipe.student
        network = {"model": student.model, "arguments": student.arguments}
        theirs |= {"recipe": None, "method": None, "with": [], "weights": _FILE, **network}


def _teacher_digest(teacher: dict[str, Any]) -> str | None:
    """Return the names or digests of the teacher's weights in an identity, None if it has no network of its own."""
    names = []
    for network in teacher.get("members") or [teacher]:
        if weights := network.get("weights"):
            # Identities of earlier code have the path of a file in place of its digest.
            names.append("unknown" if is_file(weights) and not weights.startswith(CONTENT) else weights)
        elif network.get("recipe"):
            names.append(f"run:{network['recipe']}")
    return ", ".join(names) or None
