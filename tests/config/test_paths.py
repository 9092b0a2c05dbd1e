"""Where a recipe's files lie, told to scripts before anything heavy is loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config import paths
from pipeline.config.recipe import load_recipe
from pipeline.errors import RecipeError
from pipeline.runs.identity import run_folder

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "words",
    [
        ["configs/demo.yaml"],
        ["configs/imagenet/r50_mbv1.yaml", "method=ddkd", "seed=3", "data.path=/data/imagenet"],
        ["configs/demo.yaml", "folder=runs/own"],
        ["configs/imagenet/r50_mbv1.yaml", "method=kd", "data.holdout={share: 0.1}"],
        ["configs/imagenet/r50_mbv1.yaml", "method=kd", "with=cached"],
    ],
)
def test_they_are_those_that_training_uses(words: list[str], capsys: pytest.CaptureFixture[str]):
    paths.main(words)
    loaded = load_recipe(words[0], words[1:])
    folder, teacher = str(run_folder(loaded)), loaded.recipe.teacher
    cache = teacher.cache if teacher and teacher.cache else folder
    assert capsys.readouterr().out.splitlines() == [loaded.recipe.data.path, folder, cache]


def test_without_a_recipe_there_are_none():
    with pytest.raises(RecipeError, match="name one recipe"):
        paths.main(["seed=1"])


@pytest.mark.parametrize("seed", ["abc", "1.5", "true", "-1", "[1]", str(2**64)])
def test_a_seed_that_is_none_is_said_before_tasks_begin_as_training_would(seed: str):
    with pytest.raises(RecipeError, match=r"^configs/demo\.yaml: seed: expected a whole number from 0 to 1844"):
        paths.main(["configs/demo.yaml", f"seed={seed}", "folder=runs/own"])
    with pytest.raises(RecipeError, match="seed"):
        load_recipe("configs/demo.yaml", [f"seed={seed}"])


@pytest.mark.parametrize(
    ("module", "light"),
    [
        ("pipeline.config.paths", ("torch", "pydantic", "numpy")),
        ("pipeline.config.recipe", ("torchvision", "PIL", "pipeline.models", "accelerate")),
        ("pipeline.distributed.signals", ("torch", "numpy")),
    ],
)
def test_what_comes_first_loads_nothing_that_takes_time(module: str, light: tuple[str, ...]):
    code = f"import sys, {module}; print([name for name in {light!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
