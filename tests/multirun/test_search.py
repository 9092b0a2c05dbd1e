"""``search.py``: trials on held-out images, which an interrupted command continues as if nothing had happened."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import search
from pipeline.errors import Interrupted, RecipeError
from pipeline.multirun.space import Choice, Range
from pipeline.multirun.study import RANDOM_TRIALS, Study, best_trial
from pipeline.runs.files import read_result
from pipeline.runs.identity import Run

Train = Callable[..., None]
SPACE = {
    "rate": Range(low=0.01, high=1.0, log=True),
    "size": Range(low=1, high=9),
    "kind": Choice(values=(None, [1, 2], "x")),
}


def metric_of(values: dict[str, object]) -> float:
    rate = values["rate"]
    assert isinstance(rate, float)
    return 50 - 10 * abs(rate - 0.3)


def search_to(folder: Path, trials: int) -> list[dict[str, object]]:
    """Continue the study in a folder to that many trials, as a new process would."""
    study = Study(folder, SPACE, seed=3)
    while len(study.trials()) < trials:
        trial = study.next_trial()
        study.finish(trial, metric_of(trial.values))
    return [trial.values for trial in study.trials()]


def test_an_interrupted_search_proposes_what_an_unbroken_one_does(tmp_path: Path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    total = RANDOM_TRIALS + 4
    for trials in (1, 3, RANDOM_TRIALS + 1):
        search_to(parts, trials)
    assert search_to(parts, total) == search_to(whole, total)
    assert len({json.dumps(values) for values in search_to(whole, total)}) == total


def test_a_trial_that_was_interrupted_is_the_next_one(tmp_path: Path):
    first = Study(tmp_path, SPACE, seed=0).next_trial()
    study = Study(tmp_path, SPACE, seed=0)
    assert study.next_trial() == first
    study.fail(first)
    assert study.next_trial().number == 1
    assert best_trial(study.trials()) is None


def test_proposals_keep_to_the_space_and_numbers_are_short(tmp_path: Path):
    for values in search_to(tmp_path, 12):
        assert isinstance(values["rate"], float)
        assert 0.01 <= values["rate"] <= 1.0
        assert values["size"] in range(1, 10)
        assert values["kind"] in (None, [1, 2], "x")
        assert len(repr(values["rate"])) <= 7


@pytest.fixture
def trained(run_train: Train, recipes: Path, monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """The runs that the search trains, in this process."""
    runs: list[Run] = []

    def train_here(run: Run, cores: list[int], *, quiet: bool) -> None:
        runs.append(run)
        run_train(*run.source.args, *run.overrides)

    monkeypatch.setattr(search, "train_run", train_here)
    return runs


WORDS = ["ce.yaml", "epochs=1", "space={schedule.rate: [0.01, 0.05, 0.1]}", "folder=runs/found"]


def test_a_search_trains_each_trial_on_held_out_images_and_tells_the_best(
    trained: list[Run], capsys: pytest.CaptureFixture[str]
):
    search.main([*WORDS, "trials=2", "seeds=0,4"])
    folders = [run.folder for run in trained]
    assert folders == [Path(f"runs/found/trial-{trial:03d}/seed-{seed}") for trial in (0, 1) for seed in (0, 4)]
    assert all(run.recipe.data.holdout for run in trained)
    results = [read_result(folder) for folder in folders]
    tops = [result.last for result in results if result and result.last is not None]
    means = [sum(tops[:2]) / 2, sum(tops[2:]) / 2]
    told = capsys.readouterr().out
    assert f"{max(means):.2f}" in told.partition("trial  top-1")[2].splitlines()[2]
    command = told.splitlines()[-1]
    rate = trained[2 * means.index(max(means))].recipe.schedule.rate
    assert command.startswith("python pipeline/train.py ce.yaml epochs=1")
    assert command.endswith(f"schedule.rate={rate}")
    assert "holdout" not in command

    search.main([*WORDS, "trials=2", "seeds=0,4"])  # finished: nothing is trained again
    assert len(trained) == 4


def test_a_search_that_stops_goes_on_with_the_run_it_left(
    trained: list[Run], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    train_here = search.train_run
    monkeypatch.setattr(search, "train_run", lambda run, cores, quiet: None)  # a signal came before it could save
    with pytest.raises(Interrupted, match="stopped in trial 0; the same command continues"):
        search.main([*WORDS, "trials=1"])
    monkeypatch.setattr(search, "train_run", train_here)
    search.main([*WORDS, "trials=1"])
    assert [run.folder.parent.name for run in trained] == ["trial-000"]


def test_a_trial_that_fails_is_told_and_others_go_on(
    trained: list[Run], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    train_here = search.train_run

    def fail_first(run: Run, cores: list[int], *, quiet: bool) -> str | None:
        return "total became NaN" if "trial-000" in str(run.folder) else train_here(run, cores, quiet=quiet)

    monkeypatch.setattr(search, "train_run", fail_first)
    search.main([*WORDS, "trials=2"])
    output = capsys.readouterr()
    assert output.err == "warning: trial 0 failed: total became NaN\n"
    assert "0      failed" in output.out

    monkeypatch.setattr(search, "train_run", lambda run, cores, quiet: "total became NaN")
    with pytest.raises(RecipeError, match="all of 3 trials failed; the last: total became NaN"):
        search.main([*WORDS[:-1], "folder=runs/none", "trials=9"])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["ce.yaml"], "space: expected keys and their values"),
        (["ce.yaml", "space={schedule.rat: [1, 2]}"], r"space: schedule.rat: .*did you mean"),
        (["ce.yaml", "space={schedule.rate: {low: -1, high: 2}}"], "space: schedule.rate: .*greater than 0"),
        (["ce.yaml", "space={losses.kd.weight: [1, 2]}"], "space: losses.kd.weight: "),
        (["ce.yaml", "space={epochs: [1, 2]}", "trials=0"], "trials: expected a number from 1 to 10000, got '0'"),
        (["ce.yaml", "space={epochs: [1, 2]}", "seed=1"], "seed=1: use seeds=0,1,2, the seeds of a trial"),
        (["ce.yaml", "space={epochs: [1, 2]}", "trails=3"], "trails: unknown key; did you mean 'trials'"),
        (["ce.yaml", "space={epochs: [1, 2]}", "folder=shards"], "holds manifest.json|nothing is written there"),
    ],
)
def test_what_cannot_be_searched_is_one_line(
    recipes: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], told: str
):
    monkeypatch.chdir(recipes)
    (recipes / "shards").mkdir()
    (recipes / "shards" / "manifest.json").write_text("{}")
    with pytest.raises(RecipeError, match=told):
        search.main(words)


def test_a_folder_of_another_search_is_refused(trained: list[Run]):
    search.main([*WORDS, "trials=1"])
    with pytest.raises(RecipeError, match="runs/found: holds another search; give folder=ANOTHER"):
        search.main([*WORDS, "trials=1", "batch=6"])
