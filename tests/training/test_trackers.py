"""A tracker that fails, at its beginning, at a step or at its end, costs one line, and the run is the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from accelerate.tracking import TensorBoardTracker
from tensorboard.summary.writer.record_writer import RecordWriter

from pipeline.training.journal import trace

Train = Callable[..., None]
ON = "journal={every_steps: 1, trackers: [tensorboard]}"


def failing(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.fixture
def expected(run_train: Train, recipes: Path) -> list[dict]:
    run_train("ce.yaml", "epochs=1", "folder=runs/without")
    return trace(recipes / "runs" / "without" / "journal.jsonl")


FAILURES = {
    "its beginning": (TensorBoardTracker, "start"),
    "a step": (TensorBoardTracker, "log"),
    "its end": (TensorBoardTracker, "finish"),
    "its file, in a thread of its own": (RecordWriter, "write"),
}


@pytest.mark.parametrize(("owner", "name"), FAILURES.values(), ids=FAILURES)
def test_a_tracker_that_fails_is_one_line_and_the_run_goes_on(
    owner: type,
    name: str,
    expected: list[dict],
    run_train: Train,
    recipes: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(owner, name, failing)
    run_train("ce.yaml", "epochs=1", ON)
    told = capfd.readouterr()
    line = "warning: journal.trackers: tensorboard failed (OSError: [Errno 28] No space left on device); training "
    assert told.out.count(line) == 1
    assert "Traceback" not in told.err
    assert trace(recipes / "runs" / "ce" / "journal.jsonl") == expected
    assert (recipes / "runs" / "ce" / "result.json").is_file()


def test_of_two_trackers_the_other_goes_on(
    run_train: Train, recipes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    class Other(TensorBoardTracker):
        name = "other"
        log = finish = failing

        def start(self) -> None:
            """Leave no file."""

        def store_init_configuration(self, values: dict) -> None:
            """Keep nothing."""

    monkeypatch.setitem(__import__("accelerate").accelerator.LOGGER_TYPE_TO_CLASS, "aim", Other)
    monkeypatch.setattr("pipeline.training.accelerator.get_available_trackers", lambda: ["aim", "tensorboard"])
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: ["aim", "tensorboard"])
    monkeypatch.setattr("accelerate.accelerator.filter_trackers", lambda names, _folder: list(names))
    run_train("ce.yaml", "epochs=1", "journal={every_steps: 1, trackers: [aim, tensorboard]}")
    assert capsys.readouterr().out.count("warning: journal.trackers: other failed") == 1
    (events,) = (recipes / "runs" / "ce" / "tensorboard").glob("events.*")
    assert b"gradient_norm" in events.read_bytes()
