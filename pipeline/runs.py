"""Run folders: where a recipe's run lies, what makes it that run and no other, and the runs and shards it stands on.

A recipe may stand on other runs (``teacher: {recipe: …}``, ``student: {start: {recipe: …}}``, ``compare: […]``) and on
shards (``data: {prepare: […]}``). ``stand`` makes what is not there, each in a process of its own, before this process
has an Accelerator.
"""

from __future__ import annotations

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

from pipeline.recipe import ROOT, LoadedRecipe, Recipe, RecipeError, dump_recipe, load_recipe, read_yaml
from shards.manifest import MANIFEST, manifest_sha256

RESULT = "result.json"
RECIPE = "recipe.yaml"
IDENTITY = "identity.json"
STUDENT = "student.safetensors"
STUDENT_BEST = "student_best.safetensors"
STUDENT_EMA = "student_ema.safetensors"

# What a command may change without making another run.
_NOT_IDENTITY = ("folder", "stop", "journal", "checkpoints")
_NOT_IDENTITY_DATA = ("path", "threads", "prefetch", "hw_decoder_load")


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
        result = json.loads(file.read_text())
        return result if result["identity"] == self.digest else None

    @property
    def digest(self) -> str:
        """The identity's sha256."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    @property
    def command(self) -> str:
        """The command that makes this run."""
        return f"python pipeline/train.py {shlex.quote(_relative(self.path))}"


def run_folder(loaded: LoadedRecipe) -> Path:
    """Return ``folder:``, or ``runs/<path under configs/>/seed-<n>`` below the current folder."""
    if loaded.recipe.folder is not None:
        return Path(loaded.recipe.folder)
    configs = ROOT / "configs"
    name = loaded.path.relative_to(configs) if loaded.path.is_relative_to(configs) else Path(loaded.path.name)
    return Path("runs") / name.with_suffix("") / f"seed-{loaded.recipe.seed}"


def find_run(loaded: LoadedRecipe) -> Run:
    """Return the run of a recipe whose shards are there."""
    recipe, folder = loaded.recipe, run_folder(loaded)
    if recipe.teacher is not None and recipe.teacher.batch is None:
        teacher = recipe.teacher.model_copy(update={"batch": _teacher_batch(recipe, folder)})
        recipe = recipe.model_copy(update={"teacher": teacher})
    return Run(recipe, loaded.path, folder, identity(recipe))


def _teacher_batch(recipe: Recipe, folder: Path) -> int:
    """Return the teacher's chunk: the run's own if it has begun, so that other ranks ask alike, else a rank's rows."""
    if (folder / RECIPE).is_file():
        return read_yaml(folder / RECIPE)["teacher"]["batch"]
    return max(recipe.batch // (world_size_asked() * recipe.accumulation), 1)


def world_size_asked() -> int:
    """Return the number of ranks that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def identity(recipe: Recipe) -> dict[str, Any]:
    """Return what makes the run this run: the resolved recipe, its shards by sha256, its teacher's run by digest."""
    tree = dump_recipe(recipe)
    for key in _NOT_IDENTITY:
        del tree[key]
    for key in _NOT_IDENTITY_DATA:
        tree["data"].pop(key, None)
    tree["data"]["manifest"] = manifest_sha256(Path(recipe.data.path))
    for section in (tree["teacher"], tree["student"]["start"]):
        if section and section["recipe"]:
            section["recipe"] = find_run(load_recipe(section["recipe"])).digest
    return tree


def differences(a: Any, b: Any, at: str = "") -> list[str]:
    """Return the dotted keys at which two identities differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted(a.keys() | b.keys())
        return [key for name in keys for key in differences(a.get(name), b.get(name), f"{at}.{name}" if at else name)]
    return [] if a == b else [at]


# -- what a run stands on ---------------------------------------------------------------------------------------------


def stand(loaded: LoadedRecipe) -> Run:
    """Make the shards and the runs that ``loaded`` stands on, where they are not there, and return its run.

    Under several ranks they must be there already: RecipeError names the command that makes them.
    """
    prepare_shards(loaded)
    for path in dependencies(loaded.recipe):
        run = stand(load_recipe(path))
        if run.result is None:
            _execute([sys.executable, str(ROOT / "pipeline" / "train.py"), str(run.path)], run.command)
        if find_run(load_recipe(path)).result is None:
            raise RecipeError(
                f"{_relative(run.path)}: {run.folder} holds no finished run of this recipe after {run.command}"
            )
    return find_run(loaded)


def dependencies(recipe: Recipe) -> list[str]:
    """Return the recipes that ``recipe`` names, each once."""
    teacher = [recipe.teacher.recipe] if recipe.teacher and recipe.teacher.recipe else []
    start = [recipe.student.start.recipe] if recipe.student.start and recipe.student.start.recipe else []
    return list(dict.fromkeys([*teacher, *start, *recipe.compare]))


def prepare_shards(loaded: LoadedRecipe) -> None:
    """Run ``data.prepare`` if ``data.path`` has no manifest."""
    data = loaded.recipe.data
    if (Path(data.path) / MANIFEST).is_file():
        return
    if not data.prepare:
        raise RecipeError(
            f"{_relative(loaded.path)}: data.path: there are no shards in {data.path!r} (no {MANIFEST}); "
            "make them with shards/prepare_imagenet.py, or give data.path=FOLDER"
        )
    script, *arguments = *data.prepare, data.path
    _execute([sys.executable, str(ROOT / script), *arguments], shlex.join(["python", script, *arguments]))


def _execute(command: list[str], shown: str) -> None:
    if world_size_asked() > 1:
        raise RecipeError(
            f"this run stands on something that is not there yet and that one process must make first: {shown}"
        )
    print(f"$ {shown}", flush=True)
    status = subprocess.run(command, check=False).returncode
    if status != 0:
        raise RecipeError(f"this run stands on another that ended with exit code {status}: {shown}")


# -- opening a folder -------------------------------------------------------------------------------------------------


def check_folder(run: Run) -> None:
    """Raise RecipeError if the run folder holds another run."""
    saved = run.folder / IDENTITY
    if not saved.is_file():
        return
    other = json.loads(saved.read_text())
    if other != run.identity:
        keys = ", ".join(differences(other, run.identity))
        raise RecipeError(
            f"{run.folder}: holds the run of another recipe (it differs in {keys}); give folder=ANOTHER or remove it"
        )


def open_folder(run: Run) -> None:
    """Write down what the run is, if it begins; the main process calls it once everything could be built."""
    if (run.folder / IDENTITY).is_file():
        return
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / RECIPE).write_text(yaml.safe_dump(dump_recipe(run.recipe), sort_keys=False))
    write_json(run.folder / "versions.json", versions())
    write_json(run.folder / IDENTITY, run.identity)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` so that the file is either the old one or the new one, whole."""
    temporary = path.with_name(f".tmp-{path.name}")
    with temporary.open("w") as file:
        file.write(json.dumps(value, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def versions() -> dict[str, Any]:
    """Return what a reader needs to know to repeat the run: versions, commit, machine."""
    names = ("torch", "torchvision", "accelerate", "nvidia-dali-cuda130", "numpy", "pydantic")
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


def _relative(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
