"""A command draws its report in a process of its own, whose failure is a warning."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.distributed import signals
from pipeline.runs import drawing

Train = Callable[..., None]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let commands of this test draw."""
    monkeypatch.delenv(drawing.SWITCH)


@pytest.mark.usefixtures("drawn")
def test_a_run_ends_with_its_report_and_those_it_stands_on_have_none(
    run_train: Train, recipes: Path, capfd: pytest.CaptureFixture[str]
):
    run_train("ce.yaml", "epochs=1")
    assert capfd.readouterr().out.splitlines()[-1] == "report: runs/ce/report.html"
    assert (recipes / "runs/ce/report.html").read_text().startswith("<!DOCTYPE html>")
    assert drawing.undrawn_environment()[drawing.SWITCH] == "0"
    before = (recipes / "runs/ce/report.html").stat().st_mtime_ns
    run_train("ce.yaml", "epochs=1")  # it is finished, and only prints its table
    assert (recipes / "runs/ce/report.html").stat().st_mtime_ns == before


@pytest.mark.usefixtures("drawn")
def test_a_drawing_that_fails_is_one_line_of_warning(
    run_train: Train, recipes: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(drawing, "SOURCE", recipes)  # where there is no report.py
    run_train("ce.yaml", "epochs=1")
    last = capfd.readouterr().out.splitlines()[-1]
    assert last.startswith("warning: no report (")
    assert last.endswith("to draw it: python pipeline/report.py runs/ce")
    assert (recipes / "runs/ce/result.json").is_file()


def test_a_drawing_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(drawing, "SECONDS", 0.5)
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    assert drawing._run(command, {}) == "it took more than 0.5 seconds"


@pytest.mark.usefixtures("drawn")
def test_a_signal_ends_the_drawing_and_none_begins_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(signals, "_requested", True)
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    assert drawing._run(command, {}) == "exit code -9"
    drawing.draw_report([tmp_path], tmp_path / "report.html")
    assert capsys.readouterr().out == ""


def test_the_switch_turns_the_drawing_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(drawing.SWITCH, "0")
    monkeypatch.setattr(subprocess, "Popen", None)  # would fail if it were called
    drawing.draw_report([tmp_path], tmp_path / "report.html")
