"""``compare.py``: several recipes with several seeds, made once, with mean and spread."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
import yaml

from pipeline import compare
from pipeline.recipe import RecipeError


@pytest.fixture
def place(recipes: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of tiny recipes, without folders of their own."""
    monkeypatch.chdir(recipes)
    for name in ("ce", "teacher"):
        path = recipes / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "epochs": 1, "folder": None}))
    return recipes


def test_every_recipe_is_trained_with_every_seed_and_only_once(place: Path, capsys: pytest.CaptureFixture[str]):
    words = ["ce.yaml", "teacher.yaml", "seeds=0,3", "jobs=2"]
    compare.main(words)
    results = {
        name: [json.loads((place / "runs" / name / f"seed-{seed}" / "result.json").read_text()) for seed in (0, 3)]
        for name in ("ce", "teacher")
    }
    shown = capsys.readouterr().out
    for name, (first, second) in results.items():
        top1 = first["top1"], second["top1"]
        mean, deviation = statistics.mean(top1), statistics.stdev(top1)
        line = next(line for line in shown.splitlines() if line.startswith(f"| `{place / name}`"))
        assert f"| {mean:.2f} ± {deviation:.2f} |" in line
        assert line.endswith(f"| {top1[0]:.2f}, {top1[1]:.2f} |")
    journals = {path: path.read_bytes() for path in place.rglob("journal.jsonl")}
    assert len(journals) == 4
    compare.main(words)
    assert {path: path.read_bytes() for path in place.rglob("journal.jsonl")} == journals


def test_a_run_that_fails_is_named_with_its_command_and_reason(place: Path):
    with pytest.raises(RecipeError) as caught:
        compare.main(["ce.yaml", "jobs=2", "schedule.rate=1e30"])
    message = str(caught.value)
    assert "ce.yaml schedule.rate=1e30 seed=0: error: " in message
    assert "is not finite at step" in message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seeds=0,1"], "name the recipes to compare"),
        (["ce.yaml", "seeds=a"], "seeds: expected whole numbers such as seeds=0, got 'a'"),
        (["ce.yaml", "jobs=0"], "jobs: expected whole numbers"),
        (["ce.yaml", "seeds=0,1", "folder=runs/one"], "would share runs/one"),
    ],
)
def test_what_cannot_be_compared_is_one_line(place: Path, words: list[str], message: str):
    with pytest.raises(RecipeError, match=message):
        compare.main(words)
