"""A run that SIGTERM ends on the way, as Slurm sends it before a kill, ends as one that was never stopped."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from methods import losses_of

from pipeline.distributed import signals
from pipeline.training import session
from pipeline.training.journal import trace

Train = Callable[..., None]
STEP = 7
"""Step in which the signal comes: the second of five in the second epoch."""
KD: dict[str, Any] = {"ce": {}, "kd": {"temperature": 4.0}}
SOFT = {"teacher_temperature": 3.0, "ramp": {"from": 1}}
AVERAGE = {"decay": 0.9, "warmup": True}
RUNS: dict[str, dict[str, Any]] = {
    "a route": {"losses": KD, "teacher": {"recipe": "kept.yaml", "route": {"epochs": [1, 2, 3], "each": 1}}},
    "snapshots": {"losses": {"ce": {}, "soft_ce": SOFT}, "teacher": {"snapshots": {"cycles": 3}}},
    "a stage": {
        "losses": {"ce": None, "stage_mse": {"stages": ["stage2"]}},
        "student": {"train": ["stage2"]},
        "teacher": {"recipe": "kept.yaml"},
    },
    "peers": {
        "losses": losses_of("pcl"),
        "student": {"peers": 3, "shared": "stage2"},
        "data": {"views_per_step": 3},
        "teacher": {"average": AVERAGE},
        "ema": AVERAGE,
    },
    "unlabelled": {
        "losses": {"ce": {}, "soft_ce": {"teacher_temperature": 1.0, "rows": "unlabelled"}},
        "data": {"unlabelled": {"path": "images", "ratio": 2}},  # their labels are not read
        "teacher": {"recipe": "kept.yaml"},
    },
}


@pytest.fixture
def place(recipes: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a recipe for each run, ``NAME.yaml``, and of their teacher, ``kept.yaml``, which keeps its epochs."""
    monkeypatch.chdir(recipes)
    kept = {"base": "ce.yaml", "epochs": 3, "checkpoints": {"export_epochs": [1, 2, 3]}, "folder": "runs/kept"}
    (recipes / "kept.yaml").write_text(yaml.safe_dump(kept))
    for name, own in RUNS.items():
        recipe = {"base": "ce.yaml", "epochs": 3, "schedule": {"rate": 0.01}, **own}
        (recipes / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    (recipes / "images").symlink_to(shards)
    return recipes


def end_in_step(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Send this process SIGTERM within that step of the next run."""
    learning_rate = session.learning_rate

    def rate(schedule: Any, progress: Any, epochs: Any) -> float:
        if progress.step == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return learning_rate(schedule, progress, epochs)

    monkeypatch.setattr(session, "learning_rate", rate)


def files(folder: Path) -> dict[str, bytes]:
    """Return the weights of a run, and all that its last checkpoint holds of networks and optimizer, by their paths."""
    paths = [*folder.glob("*.safetensors"), *folder.glob("checkpoints/step-15/*")]
    # The state has the length of the journal, whose lines have times.
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths if path.name != "state.json"}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_sigterm_ends_goes_on_bit_for_bit(
    run_train: Train, place: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    whole, parts = Path("runs/whole"), Path("runs/parts")
    run_train(f"{name}.yaml", f"folder={whole}")
    with monkeypatch.context() as sent:
        sent.setattr(signals, "_requested", False)
        end_in_step(sent, STEP)
        run_train(f"{name}.yaml", f"folder={parts}")
    assert not (parts / "result.json").exists()
    assert (parts / "checkpoints" / f"step-{STEP}").is_dir()
    run_train(f"{name}.yaml", f"folder={parts}")
    assert trace(parts / "journal.jsonl") == trace(whole / "journal.jsonl")
    expected, found = files(whole), files(parts)
    assert "student.safetensors" in expected
    assert found.keys() == expected.keys()
    assert [path for path, content in expected.items() if found[path] != content] == []
