"""``--check``: the paper's number, the measured one, and what the run costs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pipeline.builders.summary import summarize
from pipeline.caching.size import choices
from pipeline.config.measured import MeasuredRun, results_file
from pipeline.config.recipe import load_recipe
from pipeline.config.source import RecipeSource
from pipeline.errors import ROOT

CONFIGS = ROOT / "configs"


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder in place of ``configs/results``."""
    monkeypatch.setattr("pipeline.config.measured.results_file", lambda source: results_file(source, tmp_path))
    return tmp_path


def checked(name: str, *words: str) -> list[str]:
    """Return the lines of the report on a recipe."""
    return str(summarize(load_recipe(CONFIGS / f"{name}.yaml", words))).splitlines()


def measure(source: RecipeSource, results: Path, *tops: float) -> None:
    path = results_file(source, results)
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {"top5": None, "epochs": 240, "minutes": None, "card": None, "ranks": None, "commit": None}
    facts |= {"uncommitted_changes": False, "versions": {}, "teacher": None, "identity": "i", "student": "s"}
    runs = [MeasuredRun(seed=seed, last=top, best=top, **facts) for seed, top in enumerate(tops)]
    path.write_text(json.dumps([run.model_dump() for run in runs]))


def test_a_cell_of_the_tables_says_what_the_papers_print_and_whether_it_was_measured(results: Path):
    _, paper, ours, *_ = checked("imagenet/r50_mbv1", "method=ddkd")
    assert paper == "paper     top-1 73.87 (DDKD, table 1), top-5 91.75 (DDKD, table 1)"
    assert ours == "measured  not measured yet"
    _, paper, *_ = checked("cifar100/resnet56_resnet20", "method=kd")
    assert paper == "paper     top-1 70.66 (DDKD, table 2; perception, table 3; CRD, table 1)"
    _, paper, *_ = checked("cifar100/resnet56_resnet20", "method=irg")
    assert paper == "paper     not reported"


def test_a_measured_cell_says_its_mean_over_seeds(results: Path):
    measure(RecipeSource(CONFIGS / "cifar100" / "resnet56_resnet20.yaml", "kd"), results, 70.0, 71.0, 72.0)
    assert checked("cifar100/resnet56_resnet20", "method=kd")[2] == "measured  71.00 ± 1.00 (3 seeds)"
    assert checked("cifar100/resnet56_resnet20", "method=dkd")[2] == "measured  not measured yet"


def test_a_pair_of_no_table_says_only_what_was_measured(results: Path):
    assert not [line for line in checked("cifar100/proxy", "method=kd") if re.match("paper|measured", line)]
    measure(RecipeSource(CONFIGS / "cifar100" / "proxy.yaml", "kd"), results, 26.2)
    assert checked("cifar100/proxy", "method=kd")[1] == "measured  26.20 (1 seed)"


def test_the_cost_is_that_of_the_whole_run(results: Path):
    def cost(*words: str) -> str:
        return next(line for line in checked(*words) if line.startswith("training")).partition("image, ")[2]

    assert cost("imagenet/r50_mbv1", "method=ce") == "128 million images"
    assert cost("cifar100/resnet56_resnet20", "method=ce", "epochs=1") == "50,000 images"
    assert cost("cifar100/resnet56_resnet20", "method=ce", "data.samples=null") == ""


@pytest.mark.parametrize(
    ("name", "method", "size"),
    [
        ("imagenet/r50_mbv1", "ddkd", "4 views of 34.7 GB"),  # 1,281,167 · 2 · (1000 + 256 · 7 · 7) bytes
        ("imagenet/r34_r18", "ddkd", "4 views of 66.8 GB"),  # 1,281,167 · 2 · (1000 + 512 · 7 · 7) bytes
        ("cifar100/resnet56_resnet20", "kd", "10 views of 10.0 MB"),
    ],
)
def test_a_cached_recipe_says_how_large_its_cache_becomes(results: Path, name: str, method: str, size: str):
    words = (f"method={method}", "with=cached")
    assert f"cache     {size}" in checked(name, *words)
    # So says the command that writes the cache.
    loaded = load_recipe(CONFIGS / f"{name}.yaml", words)
    recipe, sources = loaded.recipe, [teacher.recipe for teacher in loaded.teachers]
    assert recipe.teacher
    written = [choice for choice in choices(recipe, sources, (), recipe.teacher.encode)[0] if choice.written]
    view = (recipe.data.samples or 0) * sum(choice.kind.row_bytes for choice in written)
    assert f"{view / 1000 ** (3 if view > 1e9 else 2):,.1f}" in size
    assert not [line for line in checked(name, f"method={method}") if line.startswith("cache")]
