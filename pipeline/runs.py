"""Run folders: where a recipe's run lies, what makes it that run and no other, and the runs and shards it stands on.

A recipe may stand on other runs (``teacher: {recipe: …}``, ``student: {start: {recipe: …}}``, ``compare: […]``) and on
shards (``data: {prepare: […]}``). ``stand`` makes what is not there, each in a process of its own, before this process
has an Accelerator.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from pipeline import notice
from pipeline.composition import ROOT, RecipeError, about, default_folder, read_yaml, shown
from pipeline.ranks import refuse_lone_ranks
from pipeline.recipe import LoadedRecipe, Recipe, dump_recipe, load_recipe
from pipeline.teacher_cache import Cache, open_cache
from shards.manifest import MANIFEST, manifest_sha256, read_manifest, write_atomically

RESULT = "result.json"
RECIPE = "recipe.yaml"
IDENTITY = "identity.json"
VERSIONS = "versions.json"
STUDENT = "student.safetensors"
STUDENT_BEST = "student_best.safetensors"
STUDENT_EMA = "student_ema.safetensors"
PREEMPTED = "preempted"
"""Left by a command that a signal ended, with all that it did saved; gone when the run goes on."""

# What a command may change without making another run.
_NOT_IDENTITY = ("folder", "stop", "journal", "checkpoints")
_NOT_IDENTITY_TEACHER = ("accept", "encode")
_NOT_IDENTITY_DATA = ("path", "samples", "threads", "prefetch", "hw_decoder_load")
ANOTHER = "give folder=ANOTHER"
# What makes another run only where it is asked for.
_OPTIONS = ("cache", "fallback", "compile", "compress", "checkpoint")


@dataclass(frozen=True)
class Run:
    """A recipe, its folder and its identity."""

    recipe: Recipe
    path: Path
    """The recipe file."""
    folder: Path
    identity: dict[str, Any]

    @property
    def result(self) -> dict[str, Any] | None:
        """What the finished run of this identity measured; None if it is not there or not finished."""
        file = self.folder / RESULT
        if not file.is_file():
            return None
        result = read_json(file, "delete it, and the run is measured again")
        return result if result["identity"] == self.digest else None

    @property
    def digest(self) -> str:
        """The identity's sha256."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    @property
    def command(self) -> str:
        """The command that makes this run."""
        return f"python pipeline/train.py {shlex.quote(shown(self.path))}"


def run_folder(loaded: LoadedRecipe) -> Path:
    """Return ``folder:``, or ``runs/<path under configs/>/seed-<n>`` below the current folder."""
    if loaded.recipe.folder is not None:
        return Path(loaded.recipe.folder)
    return default_folder(loaded.path, loaded.recipe.seed)


def find_run(loaded: LoadedRecipe) -> Run:
    """Return the run of a recipe whose shards are there."""
    recipe, folder = loaded.recipe, run_folder(loaded)
    with about(shown(loaded.path)):
        recipe = _resolved(recipe, folder)
        return Run(recipe, loaded.path, folder, identity(recipe, folder))


def _resolved(recipe: Recipe, folder: Path) -> Recipe:
    """Return the recipe with what it leaves to the run: the teacher's chunk, and the views of a cache.

    A run that has begun keeps its own, so that other ranks ask alike, and a cache may grow; else the chunk is a rank's
    rows, and the views are all.
    """
    teacher, data = recipe.teacher, recipe.data
    if teacher is None:
        return recipe
    begun = (read_yaml(folder / RECIPE) or {}) if (folder / RECIPE).is_file() else {}
    if teacher.batch is None:
        batch = (begun.get("teacher") or {}).get("batch")
        own = max(recipe.batch // (world_size_asked() * recipe.accumulation), 1)
        teacher = teacher.model_copy(update={"batch": batch or own})
    if teacher.cache is not None and data.views is None:
        views = (begun.get("data") or {}).get("views") or _cache(teacher.cache).header.views
        data = data.model_copy(update={"views": views})
    return recipe.model_copy(update={"teacher": teacher, "data": data})


def _cache(folder: str) -> Cache:
    with about("teacher.cache"):
        return Cache(Path(folder))


def _cache_digest(recipe: Recipe, cache: str, folder: Path) -> str:
    """Return what stands for the cache's answers; where it is gone, what the run that began from it kept of it."""
    if open_cache(Path(cache)) is None and (folder / IDENTITY).is_file():
        kept = (read_json(folder / IDENTITY, ANOTHER)["teacher"] or {}).get("cache")
        if kept:
            return kept
    return _cache(cache).digest(recipe.taps.teacher)


def world_size_asked() -> int:
    """Return the number of ranks that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_asked() -> bool:
    """Whether the launcher started this process as the first rank."""
    return int(os.environ.get("RANK", "0")) == 0


def identity(recipe: Recipe, run: Path) -> dict[str, Any]:
    """Return what makes ``run`` this run: the resolved recipe, shards by sha256, a teacher's run or cache by digest."""
    tree = dump_recipe(recipe)
    for key in _NOT_IDENTITY:
        del tree[key]
    for key in _NOT_IDENTITY_DATA:
        del tree["data"][key]
    folder = Path(recipe.data.path)
    tree["data"]["manifest"] = manifest_sha256(folder)
    tree["data"]["classes"] = hashlib.sha256(json.dumps(read_manifest(folder).classes).encode()).hexdigest()
    teacher = tree["teacher"] or {}
    for section in (teacher, *(teacher.get("members") or ()), tree["student"]["start"]):
        if section and section["recipe"]:
            section["recipe"] = find_run(load_dependency(recipe, section["recipe"])).digest
    if teacher.get("cache"):
        teacher["cache"] = _cache_digest(recipe, teacher["cache"], run)
    for key in _NOT_IDENTITY_TEACHER:
        teacher.pop(key, None)
    return _without_unused(tree)


def _without_unused(tree: Any) -> Any:
    """Return the tree without options that are off: a run is the one that it was before there were any."""
    if isinstance(tree, dict):
        return {key: _without_unused(value) for key, value in tree.items() if value or key not in _OPTIONS}
    return [_without_unused(value) for value in tree] if isinstance(tree, list) else tree


def differences(a: Any, b: Any, at: str = "") -> list[str]:
    """Return the dotted keys at which two identities differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted(a.keys() | b.keys())
        return [key for name in keys for key in differences(a.get(name), b.get(name), f"{at}.{name}" if at else name)]
    return [] if a == b else [at]


# -- what a run stands on ---------------------------------------------------------------------------------------------


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
    place, *more = _passed_on(above, path)
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


def dependencies(recipe: Recipe) -> list[str]:
    """Return the recipes whose runs ``recipe`` needs, each once: of those it names all but a cached teacher's."""
    cached = recipe.teacher.recipes if recipe.teacher and not recipe.teacher.is_asked else []
    return [path for path in named_recipes(recipe) if path not in cached or path in recipe.compare]


def named_recipes(recipe: Recipe) -> list[str]:
    """Return the recipes that ``recipe`` names, each once."""
    teacher = recipe.teacher.recipes if recipe.teacher else []
    start = [recipe.student.start.recipe] if recipe.student.start and recipe.student.start.recipe else []
    return list(dict.fromkeys([*teacher, *start, *recipe.compare]))


def load_dependency(recipe: Recipe, path: str) -> LoadedRecipe:
    """Return a recipe that ``recipe`` stands on, on the same shards, wherever this command says that they lie.

    A student's own first stage has the student's seed; teachers and compared runs keep theirs.
    """
    return load_recipe(path, _passed_on(recipe, path))


def _passed_on(recipe: Recipe, path: str) -> list[str]:
    """Return the overrides with which ``recipe`` stands on the one at ``path``; where the shards lie comes first."""
    others = (*(recipe.teacher.recipes if recipe.teacher else ()), *recipe.compare)
    start = recipe.student.start
    own = start is not None and start.recipe == path and path not in others
    return [f"data.path={json.dumps(recipe.data.path)}", *([f"seed={recipe.seed}"] if own else [])]


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
    if notice.given():
        raise Unfinished(f"{told} was stopped before its end; the same command continues")
    if status != 0:
        raise RecipeError(f"this run stands on another that ended with exit code {status}: {told}")


def _status(command: list[str]) -> int:
    """Return a command's exit code; a notice to stop is passed on to it."""
    notice.listen()
    with subprocess.Popen(command) as process, notice.passed_on(process.terminate):
        return process.wait()


# -- opening a folder -------------------------------------------------------------------------------------------------


def check_folder(run: Run, mend: str = ANOTHER) -> None:
    """Raise RecipeError if the run folder holds another run, or cannot be written; ``mend`` says what to do then."""
    _check_writable(run.folder)
    saved = run.folder / IDENTITY
    differing = differences(read_json(saved, mend), run.identity) if saved.is_file() else []
    if "data.classes" in differing:
        raise RecipeError(
            f"data.path: the classes of {run.recipe.data.path} are not those that {run.folder} was trained on; "
            "prepare the shards with the same --classes, or give folder=ANOTHER"
        )
    if differing:
        keys = ", ".join(differing)
        raise RecipeError(f"{run.folder}: holds the run of another recipe (other {keys}); {mend}")


def _check_writable(folder: Path) -> None:
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        reason = "must not write there" if there.is_dir() else f"{there} is no folder"
        raise RecipeError(f"folder: {folder} cannot be written ({reason}); {ANOTHER}")


def open_folder(run: Run) -> None:
    """Write down what the run is, or compare it; the main process calls it once everything could be built.

    The folder is this process's until it ends. Raises RecipeError if another trains in it.
    """
    lock_folder(run.folder)
    (run.folder / PREEMPTED).unlink(missing_ok=True)
    now = versions()
    if (run.folder / IDENTITY).is_file():
        changed = differences(read_json(run.folder / VERSIONS, ANOTHER), now)
        if changed:
            print(f"warning: {run.folder} was begun with another {', '.join(changed)}; its numbers may differ")
        return
    write_atomically(run.folder / RECIPE, yaml.safe_dump(dump_recipe(run.recipe), sort_keys=False).encode())
    write_json(run.folder / VERSIONS, now)
    write_json(run.folder / IDENTITY, run.identity)


def lock_folder(folder: Path) -> None:
    """Make the folder, where it is not there, this process's until it ends. Raises RecipeError if it is another's."""
    folder.mkdir(parents=True, exist_ok=True)
    # The descriptor stays open, and the lock with it, as long as the process lives; no crash can leave it behind.
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        # By process, not by descriptor: a second run of one process is no other.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise RecipeError(
            f"{folder}: another process is writing in this folder; wait for it, or name another folder"
        ) from None


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` so that the file is either the old one or the new one, whole."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path, mend: str) -> Any:
    """Return what ``write_json`` wrote. Raises RecipeError, with what to do, where it is gone or damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: cannot be read ({error}); {mend}") from None


def versions() -> dict[str, Any]:
    """Return what a reader needs to know to repeat the run: versions, commit, machine."""
    names = ("torch", "torchvision", "accelerate", "nvidia-dali-cuda130", "numpy", "pydantic", "timm")
    installed = {name: importlib.metadata.version(name) for name in names if _installed(name)}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {"python": platform.python_version(), **installed, "device": device, **_commit()}


def _installed(name: str) -> bool:
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


def _commit() -> dict[str, Any]:
    def git(*words: str) -> str | None:
        answer = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
        return answer.stdout.strip() if answer.returncode == 0 else None

    return {"commit": git("rev-parse", "HEAD"), "uncommitted_changes": bool(git("status", "--porcelain"))}
