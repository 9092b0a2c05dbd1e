"""Trackers know a run by its project, name, tags and recipe, and a run that is requeued is the same one there."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_trackers import FakeMlflow, FakeWandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.config.recipe import load_recipe
from pipeline.errors import ROOT, RecipeError
from pipeline.training.journal import read_journal
from pipeline.training.tracked_run import configuration

Train = Callable[..., None]
ON = "journal={every_steps: 1, trackers: [wandb, mlflow], project: my tests, tags: [one, two]}"


@pytest.fixture
def trackers(monkeypatch: pytest.MonkeyPatch) -> tuple[FakeWandb, FakeMlflow]:
    """Install both trackers, as far as Accelerate can see."""
    wandb, mlflow = FakeWandb(), FakeMlflow()
    for fake in (wandb, mlflow):
        monkeypatch.setitem(sys.modules, fake.__name__, fake)
    for module in ("pipeline.training.accelerator", "accelerate.tracking"):
        monkeypatch.setattr(f"{module}.get_available_trackers", lambda: ["wandb", "mlflow"])
    monkeypatch.setattr("accelerate.accelerator.filter_trackers", lambda names, _folder: list(names))
    return wandb, mlflow


def expected_values(folder: Path) -> dict[tuple[int, str], float]:
    """Return what trackers are to get of a journal, without its timing, by step and name."""
    found: dict[tuple[int, str], float] = {}
    for line in read_journal(folder / "journal.jsonl"):
        validation, step = line.pop("validation", None), line["step"]
        section = "val" if validation else "train"
        values = {name: line[name] for name in line if name not in ("step", "epoch", "samples", "timing")}
        if validation:
            values |= {"loss": validation["loss"], "best_top1": validation["best"]}
        found |= {(step, f"{section}/{name}"): value for name, value in values.items()}
    return found


def without_timing(values: dict[tuple[int, str], float]) -> dict[tuple[int, str], float]:
    assert any(name.startswith("timing/milliseconds/") for _, name in values)
    own = {key: value for key, value in values.items() if not key[1].startswith("timing/")}
    return {key: value for key, value in own.items() if key[1] != "train/epoch"}


def test_a_run_that_is_requeued_twice_is_one_run_with_its_recipe_and_all_its_values(
    run_train: Train, recipes: Path, trackers: tuple[FakeWandb, FakeMlflow]
):
    wandb, mlflow = trackers
    for stop in ("stop.steps=3", "stop.steps=7", "stop.steps=null"):
        run_train("ce.yaml", ON, stop)
    folder = recipes / "runs" / "ce"
    expected = expected_values(folder)
    assert {"train/total", "train/top1", "train/rate", "val/top1", "val/loss", "val/best_top1"} <= {
        name for _, name in expected
    }

    ((identifier, run),) = wandb.runs.items()
    assert [found["resume"] for found in wandb.inits] == ["allow"] * 3
    told = {key: wandb.inits[0][key] for key in ("project", "name", "tags", "dir")}
    assert told == {"project": "my tests", "name": "ce/seed-0", "tags": ["one", "two"], "dir": "runs/ce"}
    assert without_timing(run["values"]) == expected
    assert run["finished"] == 3

    ((run_id, other),) = mlflow.runs.items()
    assert (other.experiment, other.name, other.tags) == ("my tests", "ce/seed-0", {"tags": "one, two"})
    assert without_timing(other.data.values) == expected
    assert json.loads((folder / "trackers.json").read_text()) == {"wandb": identifier, "mlflow": run_id}

    for known in (run["config"], other.data.params):
        assert known["student.model"] == "cifar_resnet8"
        assert known["data.mean"] == "[0.5, 0.5, 0.5]"
        assert known["parameters"] > 1000
        assert known["macs"] > 1000
    assert run["config"]["stop.steps"] is None
    assert other.data.params["stop.steps"] == 3  # MLflow keeps the first


def test_the_same_recipe_in_another_folder_is_another_run(
    run_train: Train, trackers: tuple[FakeWandb, FakeMlflow], recipes: Path
):
    for name in ("one", "two"):
        run_train("ce.yaml", ON, "stop.steps=1", f"folder=runs/{name}", "journal.name=mine")
    assert len(trackers[0].runs) == len(trackers[1].runs) == 2
    one, two = trackers[0].runs
    assert one != two
    assert one[:16] == two[:16]
    assert {found["name"] for found in trackers[0].inits} == {"mine"}


def test_a_damaged_file_of_ids_costs_a_line_and_the_trackers(
    run_train: Train, trackers: tuple[FakeWandb, FakeMlflow], recipes: Path, capsys: pytest.CaptureFixture[str]
):
    run_train("ce.yaml", ON, "stop.steps=1")
    (recipes / "runs" / "ce" / "trackers.json").write_text("[]")
    run_train("ce.yaml", ON, "stop.steps=2")
    told = capsys.readouterr().out
    assert told.count("trackers.json: ") == 2
    assert told.count("delete it, and trackers begin a new run") == 2
    assert len(read_journal(recipes / "runs" / "ce" / "journal.jsonl")) == 2


def test_tensorboard_has_the_recipe_once_and_training_and_validation_apart(run_train: Train, recipes: Path):
    on = "journal={every_steps: 1, trackers: [tensorboard]}"
    run_train("ce.yaml", on, "stop.steps=6")
    run_train("ce.yaml", on)
    folder = recipes / "runs" / "ce"
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    found = {
        (value.step, name): value.value
        for name in events.Tags()["scalars"]
        for value in events.Scalars(name)
        if not name.startswith("timing/") and name != "train/epoch"
    }
    assert found == pytest.approx(expected_values(folder), rel=1e-6)
    (text,) = events.Tensors("recipe/text_summary")
    assert b"student.model: cifar_resnet8" in text.tensor_proto.string_val[0]


def test_every_value_of_a_configuration_is_plain_and_every_name_one_that_mlflow_takes(recipes: Path):
    keys = ["losses.ce={label_smoothing: 0.1}", 'optimizer.rates={"layer1.*": 0.1}', "student.arguments={depth: 14}"]
    found = configuration(load_recipe(recipes / "ce.yaml", keys).recipe)
    assert {type(value) for value in found.values()} <= {str, int, float, bool, type(None)}
    assert found["optimizer.rates"] == '{"layer1.*": 0.1}'
    assert found["student.arguments.depth"] == 14
    assert found["losses.ce.label_smoothing"] == 0.1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("journal.project=a/b", "journal.project: expected up to 128 letters, digits, spaces and . _ -"),
        ('journal.project="it\'s"', "journal.project: expected up to 128 letters"),
        ('journal.name=""', "journal.name: expected one line of text of up to 64 characters"),
        ('journal.tags=["a\\nb"]', "journal.tags.0: expected one line of text of up to 64 characters"),
        ("journal.tags=[1]", "journal.tags.0: "),
    ],
)
def test_a_project_a_name_or_tags_that_no_tracker_takes_are_one_line(recipes: Path, words: str, message: str):
    with pytest.raises(RecipeError) as error:
        load_recipe(recipes / "ce.yaml", [words])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.long
@pytest.mark.timeout(0)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what MLflow calls
@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("wandb", "mlflow")),
    reason="wandb and mlflow, extras of this project, are not installed",
)
def test_the_real_trackers_offline_keep_one_run_over_two_requeues(recipes: Path):
    database = f"sqlite:///{recipes}/mlflow.db"
    environment = os.environ | {"WANDB_MODE": "offline", "MLFLOW_TRACKING_URI": database}
    for stop in ("stop.steps=3", "stop.steps=7", "stop.steps=null"):
        command = [sys.executable, str(ROOT / "pipeline" / "train.py"), "ce.yaml", ON, stop]
        done = subprocess.run(command, cwd=recipes, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "warning: journal.trackers" not in done.stdout
    folder = recipes / "runs" / "ce"
    ids = json.loads((folder / "trackers.json").read_text())
    assert {path.name.split("-", 3)[3] for path in (folder / "wandb").glob("offline-run-*")} == {ids["wandb"]}
    run, history = _from_mlflow(database, ids["mlflow"])
    assert run.data.params["student.model"] == "cifar_resnet8"
    assert history == pytest.approx(expected_values(folder))


def _from_mlflow(database: str, run_id: str) -> tuple[Any, dict[tuple[int, str], float]]:
    """Return MLflow's only run, and its values by step and name, without timing."""
    client: Any = importlib.import_module("mlflow").MlflowClient(database)
    (experiment,) = client.search_experiments(filter_string="name = 'my tests'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == run_id
    names = [name for name in run.data.metrics if not name.startswith("timing/") and name != "train/epoch"]
    return run, {(point.step, name): point.value for name in names for point in client.get_metric_history(run_id, name)}
