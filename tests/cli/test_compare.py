"""``compare.py``: several recipes with several seeds, made once, with mean and spread."""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from resolved import run_of

from pipeline import compare
from pipeline.cli import entry
from pipeline.distributed import signals
from pipeline.errors import RecipeError
from pipeline.multirun.processes import train_run
from pipeline.runs.files import read_result
from pipeline.training.journal import trace

Train = Callable[..., None]


@pytest.fixture
def place(recipes: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of tiny recipes, without folders of their own."""
    monkeypatch.chdir(recipes)
    for name in ("ce", "teacher"):
        path = recipes / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "epochs": 1, "folder": None}))
    return recipes


def test_every_recipe_is_trained_with_every_seed_and_only_once(
    run_train: Train, place: Path, capsys: pytest.CaptureFixture[str]
):
    run_train("ce.yaml")
    run_train("teacher.yaml", "seed=3")
    before = {path: path.read_bytes() for path in place.rglob("journal.jsonl")}
    assert len(before) == 2
    words = ["ce.yaml", "teacher.yaml", "seeds=0,3", "jobs=2"]
    compare.main(words)
    assert {path: path.read_bytes() for path in before} == before
    results = {
        name: [json.loads((place / "runs" / name / f"seed-{seed}" / "result.json").read_text()) for seed in (0, 3)]
        for name in ("ce", "teacher")
    }
    shown = capsys.readouterr().out
    for name, (first, second) in results.items():
        top1 = first["top1"], second["top1"]
        mean, deviation = statistics.mean(top1), statistics.stdev(top1)
        line = next(line for line in shown.splitlines() if line.startswith(f"| `{name}`"))
        assert f"| {mean:.2f} ± {deviation:.2f} |" in line
        assert line.endswith(f"| {top1[0]:.2f}, {top1[1]:.2f} |")
    journals = {path: path.read_bytes() for path in place.rglob("journal.jsonl")}
    assert len(journals) == 4
    compare.main(words)
    assert {path: path.read_bytes() for path in place.rglob("journal.jsonl")} == journals


def test_a_run_that_fails_is_named_with_its_command_and_reason_under_the_table_of_the_others(
    place: Path, capsys: pytest.CaptureFixture[str]
):
    (place / "bad.yaml").write_text("base: ce.yaml\nschedule: {rate: 1.0e+30}\n")
    with pytest.raises(RecipeError) as caught:
        compare.main(["bad.yaml", "ce.yaml", "jobs=2", "epochs=1"])
    message = str(caught.value)
    assert message.startswith("1 of 2 runs failed: ")
    assert "bad.yaml 'compare=[]' epochs=1 seed=0: error: " in message
    assert "became NaN or inf at step" in message
    _, _, row = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert row.startswith("| `ce`")


def test_of_many_failures_two_are_named(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(compare, "train_all", lambda runs, jobs: ["first", "second", "third"])
    with pytest.raises(RecipeError, match=r"^3 of 3 runs failed: first; second; and 1 more$"):
        compare.main(["ce.yaml", "seeds=0,1,2"])
    assert capsys.readouterr().out == ""


def test_runs_without_validation_images_have_dashes_and_one_at_a_time_is_heard(
    run_train: Train, place: Path, shards: Path, capfd: pytest.CaptureFixture[str]
):
    copy = place / "alone"
    shutil.copytree(shards, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["splits"]["val"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    run_train("ce.yaml", f"data.path={copy}")
    capfd.readouterr()
    compare.main(["ce.yaml", f"data.path={copy}", "seeds=0,1"])
    told = capfd.readouterr().out
    assert "network  ce      cifar_resnet8" in told
    assert "runs/ce/seed-1: top-1 –, best –" in told
    assert told.splitlines()[-1].endswith("| – | – | –, – |")


def test_a_finished_run_does_not_ask_for_the_teacher_it_had(
    run_train: Train, place: Path, capfd: pytest.CaptureFixture[str]
):
    own = {"base": "ce.yaml", "teacher": {"recipe": "teacher.yaml"}, "losses": {"kd": {"temperature": 4.0}}}
    (place / "kd.yaml").write_text(yaml.safe_dump(own))
    run_train("kd.yaml")
    assert "$ python pipeline/train.py" in capfd.readouterr().out
    shutil.rmtree(place / "runs" / "teacher")
    compare.main(["kd.yaml"])
    assert "$" not in capfd.readouterr().out
    assert not (place / "runs" / "teacher").exists()


def test_overrides_are_for_the_runs_of_the_table_and_no_other_student_is_trained(run_train: Train, place: Path):
    own = yaml.safe_load((place / "ce.yaml").read_text())
    (place / "teacher.yaml").write_text(yaml.safe_dump({**own, "student": {"model": "cifar_resnet20"}}))
    run_train("teacher.yaml")
    kd = {"teacher": {"recipe": "teacher.yaml"}, "losses": {"kd": {"temperature": 4.0}}, "compare": ["ce.yaml"]}
    (place / "kd.yaml").write_text(yaml.safe_dump({**own, **kd}))
    compare.main(["kd.yaml", "ce.yaml", "epochs=2"])
    results = [read_result(place / "runs" / name / "seed-0") for name in ("kd", "ce")]
    assert [result and result.epochs for result in results] == [2, 2]


def lines_of(journal: Path) -> int:
    return len(journal.read_bytes().splitlines()) if journal.exists() else 0


@pytest.fixture
def signal_once() -> Iterator[Callable[[Callable[[], bool]], None]]:
    """``signal_once(ready)`` sends this process SIGTERM as soon as ``ready()``; nobody listening, it does nothing."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    ended = threading.Event()

    def send(ready: Callable[[], bool]) -> None:
        while not ready():
            if ended.wait(0.01):
                return
        os.kill(os.getpid(), signal.SIGTERM)

    threads: list[threading.Thread] = []

    def start(ready: Callable[[], bool]) -> None:
        threads.append(threading.Thread(target=send, args=(ready,)))
        threads[-1].start()

    yield start
    ended.set()
    for thread in threads:
        thread.join()
    signal.signal(signal.SIGTERM, before)


def test_a_signal_stops_what_is_under_way_and_the_same_command_goes_on(
    place: Path,
    signal_once: Callable[[Callable[[], bool]], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    words = ["ce.yaml", "seeds=0,1,2", "jobs=2", "epochs=10", "checkpoints.every_epochs=0"]
    monkeypatch.setattr(sys, "argv", ["compare.py", *words])
    folders = [place / "runs" / "ce" / f"seed-{seed}" for seed in (0, 1, 2)]
    journals = [folder / "journal.jsonl" for folder in folders]
    signal_once(lambda: max(map(lines_of, journals)) >= 3)
    entry(compare.main)
    assert "stopped before the last run; the same command continues" in capsys.readouterr().out
    # The two side by side may be far apart, and the later one may not have begun to listen.
    assert list(place.glob("runs/ce/seed-[01]/checkpoints/step-*"))
    assert not list(place.rglob("result.json"))
    assert not folders[2].exists()

    monkeypatch.setattr(signals, "_requested", False)  # the next command is another process
    entry(compare.main)
    results = [json.loads((folder / "result.json").read_text())["top1"] for folder in folders]
    told = capsys.readouterr().out
    assert told.splitlines()[-1].endswith(f"| {', '.join(f'{top1:.2f}' for top1 in results)} |")
    for journal in journals:
        assert [line["step"] for line in trace(journal) if "total" in line] == list(range(1, 51))


def test_a_signal_that_comes_before_a_run_can_hear_it_is_no_failure(place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(signals, "_requested", True)
    run = run_of("ce.yaml")
    cores = sorted(os.sched_getaffinity(0))
    assert train_run(run, cores, quiet=True) is None
    assert run.result is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seeds=0,1"], "name the recipes to compare"),
        (["ce.yaml", "seeds=a"], "seeds: expected whole numbers such as seeds=0, got 'a'"),
        (["ce.yaml", "jobs=0"], "jobs: expected a number from 1 to 256, got '0'"),
        (["ce.yaml", "side=0"], "side: expected a number from 1 to 256, got '0'"),
        (["ce.yaml", "side=2", "jobs=2"], "jobs trains in several processes and side in one; give one of them"),
        (["ce.yaml", "seeds=0,1", "folder=runs/one"], "would share runs/one"),
        (["teacher.yaml", "ce.yaml", "ce.yaml"], "would share runs/ce/seed-0"),
    ],
)
def test_what_cannot_be_compared_is_one_line(place: Path, words: list[str], message: str):
    with pytest.raises(RecipeError, match=message):
        compare.main(words)
