"""What is recorded for the report changes nothing of a run: numbers, draws, checkpoints, weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from gloo_ranks import Ranks
from html_page import draw
from training_on_ranks import train

from pipeline.losses.diffkd import DiffKD
from pipeline.runs.files import read_starts
from pipeline.training.journal import read_journal, trace

Train = Callable[..., None]


def observed(folder: Path) -> list[dict[str, Any]]:
    """Return what was recorded of the denoisers after each epoch."""
    return [line["denoiser"] for line in read_journal(folder / "journal.jsonl") if "denoiser" in line]


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the tensors of a run: its weights and the newest checkpoint, by name."""
    return {path.name: path.read_bytes() for path in folder.rglob("*.safetensors")}


@pytest.fixture
def alone(recipes: Path) -> Path:
    """The recipes, with a DDKD that is compared with nothing and has one epoch more."""
    tree = yaml.safe_load((recipes / "ddkd.yaml").read_text())
    (recipes / "ddkd.yaml").write_text(yaml.safe_dump({**tree, "compare": [], "epochs": 2}))
    return recipes


def test_trace_and_weights_are_the_same_with_and_without_the_recording(run_train: Train, alone: Path):
    run_train("ddkd.yaml", "folder=on")
    run_train("ddkd.yaml", "folder=off", "journal.report=false")
    assert trace(alone / "on/journal.jsonl") == trace(alone / "off/journal.jsonl")
    assert files_of(alone / "on") == files_of(alone / "off")
    assert (alone / "on/identity.json").read_bytes() == (alone / "off/identity.json").read_bytes()
    assert len(observed(alone / "on")) == 2
    assert observed(alone / "off") == []
    for seen in observed(alone / "on"):
        for gamma in (seen["ddkd"]["gamma"], seen["ddkd"]["gamma_logits"]):
            assert 0 <= gamma["least"] <= gamma["mean"] <= gamma["most"] <= 1
        sizes = {(len(rows), len(rows[0])) for rows in seen["ddkd"]["maps"].values()}
        assert (seen["ddkd"]["maps"].keys(), len(sizes)) == ({"teacher", "student", "denoised"}, 1)
    assert "journal.report is false" in draw("off").text


def test_a_run_that_was_interrupted_records_what_one_that_was_not_does(run_train: Train, alone: Path):
    run_train("ddkd.yaml", "folder=whole")
    run_train("ddkd.yaml", "folder=parts", "stop.steps=7")
    run_train("ddkd.yaml", "folder=parts")
    assert observed(alone / "parts") == observed(alone / "whole")
    assert [start.step for start in read_starts(alone / "parts")] == [0, 7]
    assert "2 starts:" in draw("parts").text


def test_two_ranks_record_on_the_first(run_train: Train, alone: Path, ranks: Ranks):
    run_train("teacher.yaml")
    # Statistics over the ranks: the first must not wait for the other, which does not look.
    ranks(train, alone, ["ddkd.yaml", "folder=two", "epochs=1", "losses.ddkd.diffusion.stat_scope=global"])
    (seen,) = observed(alone / "two")
    assert seen["ddkd"].keys() == {"gamma", "maps", "gamma_logits"}


def test_a_look_that_fails_is_a_note_and_the_run_goes_on(
    run_train: Train, alone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def fail(*_: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(DiffKD, "observe", fail)
    run_train("ddkd.yaml")
    assert capsys.readouterr().out.count("the report will not show the losses' own networks: no memory") == 1
    assert json.loads((alone / "runs/ddkd/result.json").read_text())["epochs"] == 2


def test_a_number_that_is_not_finite_is_null_in_the_journal_and_no_reason_to_draw_nothing(
    run_train: Train, alone: Path, monkeypatch: pytest.MonkeyPatch
):
    nan, inf = float("nan"), float("inf")
    gamma = {"mean": nan, "least": 0.0, "most": inf}
    maps = {"teacher": [[nan, 1.0]], "student": [[0.5, inf]], "denoised": [[nan, nan]]}
    monkeypatch.setattr(DiffKD, "observe", lambda *_: {"gamma": gamma, "maps": maps})
    run_train("ddkd.yaml")
    text = (alone / "runs/ddkd/journal.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert observed(alone / "runs/ddkd")[-1]["ddkd"]["maps"]["teacher"] == [[None, 1.0]]
    assert "not finite" in draw("runs/ddkd").text
