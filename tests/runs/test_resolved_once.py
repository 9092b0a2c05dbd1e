"""A run and those that it names are resolved once: nothing below reads a recipe or a manifest again."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from resolved import run_of

from pipeline.config import recipe
from pipeline.distributed.launcher import Launch
from pipeline.errors import RecipeError
from pipeline.runs import identity

Train = Callable[..., None]


def counted(monkeypatch: pytest.MonkeyPatch, counts: Counter[str], module: Any, name: str, title: str) -> None:
    """Count the calls of a function of a module."""
    function = getattr(module, name)

    def call(*args: Any, **more: Any) -> Any:
        counts[title] += 1
        return function(*args, **more)

    monkeypatch.setattr(module, name, call)


def test_a_run_whose_teacher_and_baseline_are_finished_reads_three_recipes_and_one_manifest(
    run_train: Train, recipes: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("ce.yaml", "teacher.yaml"):
        run_train(name)
    counts = Counter[str]()
    counted(monkeypatch, counts, recipe, "_load_one", "load_recipe")
    counted(monkeypatch, counts, identity, "identity", "identity")
    ours = [module for name, module in sys.modules.items() if name.split(".")[0] in ("pipeline", "shards")]
    for module in ours:
        if hasattr(module, "read_manifest"):
            counted(monkeypatch, counts, module, "read_manifest", "read_manifest")
    run_train("ddkd.yaml", "epochs=1")
    assert counts == {"load_recipe": 3, "identity": 3, "read_manifest": 1}
    assert (recipes / "runs" / "ddkd" / "result.json").is_file()


def test_what_does_not_need_a_named_recipe_does_not_read_it(run_train: Train, recipes: Path):
    (recipes / "broken.yaml").write_text("base: ce.yaml\nnonsense: 1\n")
    (recipes / "top.yaml").write_text("base: ce.yaml\ncompare: [broken.yaml]\nfolder: runs/top\n")
    run_train("--check", "top.yaml")
    with pytest.raises(RecipeError, match=r"broken\.yaml: nonsense: unknown key"):
        run_train("top.yaml")


def test_what_a_finished_teacher_was_compared_with_is_not_asked_for_again(run_train: Train, recipes: Path):
    run_train("teacher.yaml")
    text = (recipes / "teacher.yaml").read_text()
    (recipes / "gone.yaml").write_text("base: ce.yaml\nteacher: {cache: nowhere}\nfolder: runs/gone\n")
    (recipes / "teacher.yaml").write_text(text + "compare: [gone.yaml]\n")
    folder = recipes / "runs" / "teacher"
    known = identity.resolve(recipe.load_recipe("teacher.yaml"), Launch())
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps({**result, "identity": known.fingerprint}))
    run_train("ddkd.yaml", "epochs=1", "compare=null")
    assert (recipes / "runs" / "ddkd" / "result.json").is_file()


def test_images_that_the_jpeg_engine_decodes_are_those_of_another_run(recipes: Path):
    words = ([], ["data.hw_decoder_load=0.0"], ["data.hw_decoder_load=1"])
    default, none, engine = (run_of(recipes / "ce.yaml", each).identity for each in words)
    assert default == none
    assert "hw_decoder_load" not in default["data"]
    assert identity.differing_keys(default, engine) == ["data.hw_decoder_load"]
