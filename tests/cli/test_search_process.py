"""``search.py`` as a process that is stopped and killed."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import ROOT, run, start

from pipeline.multirun.space import Categorical
from pipeline.multirun.study import Study
from pipeline.runs.files import read_result
from pipeline.training.journal import trace

SEARCH = (sys.executable, str(ROOT / "pipeline" / "search.py"), "ce.yaml", "folder=runs/found", "trials=2")
WORDS = (*SEARCH, "space={schedule.rate: [0.01, 0.1]}", "epochs=40", "journal.every_steps=1")


def wait_until(done: Callable[[], bool]) -> None:
    while not done():
        time.sleep(0.05)


@pytest.mark.endurance
def test_a_search_that_is_stopped_and_killed_trains_every_step_once_and_records_every_result(recipes: Path):
    folders = [recipes / "runs" / "found" / f"trial-{number:03d}" / "seed-0" for number in (0, 1)]
    journals = [folder / "journal.jsonl" for folder in folders]

    def has_begun(number: int) -> bool:
        return journals[number].exists() and len(journals[number].read_bytes().splitlines()) >= 3

    process = start(*WORDS, folder=recipes)
    wait_until(lambda: has_begun(0))
    process.send_signal(signal.SIGTERM)
    told, _ = process.communicate()
    assert process.returncode == 0
    assert told.splitlines()[-1] == "runs/found: stopped in trial 0; the same command continues"

    process = start(*WORDS, folder=recipes)
    wait_until(lambda: has_begun(1))
    process.kill()
    process.wait()
    again = run(*WORDS, folder=recipes)  # the killed command's own training may still be under way
    assert again.returncode in (0, 2)
    if again.returncode == 2:
        assert "another process is writing in this folder" in again.stderr
        assert len(again.stderr.splitlines()) == 1
        wait_until((folders[1] / "result.json").exists)
        again = run(*WORDS, folder=recipes)
        assert again.returncode == 0, again.stderr

    steps = [[line["step"] for line in trace(journal) if "total" in line] for journal in journals]
    assert steps[0] == steps[1] == list(range(1, len(steps[0]) + 1))
    trials = Study(recipes / "runs" / "found", {"schedule.rate": Categorical(values=(0.01, 0.1))}, seed=0).trials()
    results = [read_result(folder) for folder in folders]
    assert [trial.metric for trial in trials] == [result and result.last for result in results]
