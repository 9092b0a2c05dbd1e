"""``search.py``: trials on held-out images, which an interrupted command continues as if nothing had happened."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import report, search
from pipeline.config.recipe import load_recipe
from pipeline.errors import Interrupted, RecipeError
from pipeline.multirun.space import Categorical, Range
from pipeline.multirun.study import RANDOM_TRIALS, STUDY_FILE, Study, best_trial, recover
from pipeline.runs.files import read_result
from pipeline.runs.identity import Run
from shards.documents import DamagedFile

Train = Callable[..., None]
SPACE = {
    "rate": Range(low=0.01, high=1.0, log=True),
    "size": Range(low=1, high=9),
    "kind": Categorical(values=(None, [1, 2], "x")),
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


def test_numbers_keep_to_a_narrow_range_and_differ_in_it(tmp_path: Path):
    study = Study(tmp_path, {"decay": Range(low=0.9995, high=0.99999)}, seed=0)
    found = []
    for _ in range(10):
        trial = study.next_trial()
        study.finish(trial, 1.0)
        found.append(trial.values["decay"])
    assert len({*found}) == 10
    assert all(0.9995 <= decay <= 0.99999 for decay in found)


def test_a_search_that_was_killed_while_it_wrote_its_log_goes_on(tmp_path: Path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
        search_to(folder, 2)
    log = killed / STUDY_FILE
    with log.open("a") as file:
        file.write('{"op_code":4,"worker')  # the disk was full, or the power failed
    (killed / f"{STUDY_FILE}.lock").symlink_to(STUDY_FILE)
    recover(killed)
    assert search_to(killed, 4) == search_to(whole, 4)
    assert search_to(killed, 4) == search_to(whole, 4)  # and can be read once more


def test_a_log_is_not_written_to_where_it_is_only_read(tmp_path: Path):
    search_to(tmp_path, 2)
    before = (tmp_path / STUDY_FILE).read_bytes()
    assert len(Study(tmp_path, SPACE, seed=0).trials()) == 2
    assert (tmp_path / STUDY_FILE).read_bytes() == before


@pytest.mark.parametrize("damage", [b"\x00\x00\n", b"{}\n", b"[]\n"])
def test_a_damaged_log_is_one_line(tmp_path: Path, damage: bytes):
    search_to(tmp_path, 1)
    log = tmp_path / STUDY_FILE
    log.write_bytes(log.read_bytes() + damage + log.read_bytes())
    with pytest.raises(DamagedFile, match=r"study\.log: is no log of trials .*give folder=ANOTHER") as raised:
        Study(tmp_path, SPACE, seed=0)
    assert "\n" not in str(raised.value)


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


def test_a_search_ends_with_a_page_of_its_trials(
    trained: list[Run], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    page = Path("runs/found/report.html")
    # In this process: that a report is drawn in one of its own is a test of tests/reports.
    monkeypatch.setattr(search, "draw_report", lambda folders, out: report.main([*map(str, folders), f"out={out}"]))
    search.main([*WORDS, "trials=2"])
    told = capsys.readouterr().out.splitlines()
    assert told[-1] == str(page)
    text = page.read_text()
    for part in ("Search: ce", "top-1 on held-out images by trial", "top-1 by schedule.rate", "schedule.rate=0."):
        assert part in text
    assert text.count("<svg") == 2
    assert "http" not in text.replace("http://www.w3.org", "")
    before = page.stat().st_mtime_ns
    search.main([*WORDS, "trials=2"])  # nothing was trained
    assert page.stat().st_mtime_ns == before

    report.main(["runs/found", "out=again.html"])
    assert Path("again.html").read_text() == text
    with pytest.raises(RecipeError, match="no finished run in it"):  # trials are not runs to compare
        report.main(["runs"])


def test_the_best_values_are_trained_on_all_images_if_the_recipe_holds_some_out(
    trained: list[Run], recipes: Path, capsys: pytest.CaptureFixture[str]
):
    text = (recipes / "ce.yaml").read_text()
    (recipes / "held.yaml").write_text(text.replace("data:", "data:\n  holdout: {share: 0.2}", 1))
    search.main(["held.yaml", *WORDS[1:], "trials=1"])
    assert trained[0].recipe.data.holdout is not None
    assert trained[0].recipe.data.holdout.share == 0.2
    command = capsys.readouterr().out.splitlines()[-1]
    assert load_recipe(Path("held.yaml"), shlex.split(command)[3:]).recipe.data.holdout is None


def test_a_trial_that_another_process_still_trains_is_waited_for_and_not_failed(
    trained: list[Run], monkeypatch: pytest.MonkeyPatch
):
    folder = Path("runs/found/trial-000/seed-0")
    folder.mkdir(parents=True)
    holder = (
        "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    )
    command = [sys.executable, "-c", holder, str(folder / ".lock")]
    words = [*WORDS[:-1], "folder=runs/found", "trials=1"]
    monkeypatch.setattr(search, "check_search_folder", lambda folder: None)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(RecipeError, match="trial-000/seed-0: another process is writing in this folder"):
            search.main(words)
        process.communicate(b"\n")
    search.main(words)
    assert [run.folder for run in trained] == [folder]


def test_a_damaged_record_of_a_search_is_one_line(trained: list[Run]):
    search.main([*WORDS, "trials=1"])
    for text in ("{", "{}", "[]"):
        Path("runs/found/search.json").write_text(text)
        with pytest.raises(DamagedFile, match=r"runs/found/search\.json: .*give folder=ANOTHER"):
            search.main([*WORDS, "trials=1"])


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
        (
            ["ce.yaml", f"space={{epochs: [{', '.join(map(str, range(2, 102)))}, 1]}}"],
            "a list has 2 to 100 values, got 101",
        ),
        (["ce.yaml", "space={epochs: [1, 2]}", "epochs=3"], "epochs: the space has epochs, which would replace it"),
        (
            ["ce.yaml", "space={schedule: [{rate: 1}, {rate: 2}]}", "schedule.rate=3"],
            "schedule.rate: the space has schedule, which would replace it; give one of them",
        ),
        (["ce.yaml", "space={epochs: [1, 2]}", "seeds=1,1"], "seeds: 1,1 names a seed twice"),
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
