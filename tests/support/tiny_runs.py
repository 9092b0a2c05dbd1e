"""Tiny runs: real shards, real networks, seconds."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.state import AcceleratorState, PartialState
from methods import losses_of
from one_core import one_core

from pipeline import train
from pipeline.builders.meta import image_flops
from pipeline.config.recipe import Recipe, dump_recipe

ROOT = Path(__file__).resolve().parents[2]

DATA = {"size": 16, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "scale": [0.5, 1.0]}
STRATEGY = {
    "epochs": 2,
    "batch": 12,
    "optimizer": {"momentum": 0.9, "weight_decay": 5e-4},
    "schedule": {"kind": "cosine", "rate": 0.05, "warmup_epochs": 0.5},
    "journal": {"every_steps": 1, "trackers": []},
}
DDKD = losses_of("ddkd")


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 training and 20 validation images of 20 classes."""
    folder = tmp_path_factory.mktemp("shards") / "tiny"
    command = [sys.executable, str(ROOT / "shards" / "prepare_demo.py"), str(folder), "--train", "60", "--val", "20"]
    subprocess.run(
        [*command, "--size", "24", "--jobs", "1", "--samples-per-shard", "25"], check=True, capture_output=True
    )
    return folder


@pytest.fixture
def recipes(tmp_path: Path, shards: Path) -> Path:
    """A folder of recipes on those shards: ``ce.yaml``, ``teacher.yaml``, and ``ddkd.yaml``, which stands on both."""
    data = {**DATA, "path": str(shards)}
    write = {
        "ce.yaml": {"student": {"model": "cifar_resnet8"}, "losses": {"ce": {}}, "folder": "runs/ce"},
        "teacher.yaml": {
            "student": {"model": "cifar_resnet20"},
            "losses": {"ce": {}},
            "epochs": 1,
            "folder": "runs/teacher",
        },
        "ddkd.yaml": {
            "student": {"model": "cifar_resnet8"},
            "teacher": {"recipe": "teacher.yaml"},
            "losses": DDKD,
            "compare": ["ce.yaml"],
            "folder": "runs/ddkd",
        },
    }
    for name, recipe in write.items():
        (tmp_path / name).write_text(yaml.safe_dump({"data": data, **STRATEGY, **recipe}))
    return tmp_path


_COUNTED: dict[str, float | None] = {}


def counted_once(recipe: Recipe, *sources: Any) -> float | None:
    """Return ``image_flops``, which takes longer than some steps of these networks, kept for the runs that follow."""
    keys = ("student", "teacher", "losses", "data", "batch", "accumulation")
    tree = dump_recipe(recipe)
    key = json.dumps([tree[name] for name in keys])
    if key not in _COUNTED:
        _COUNTED[key] = image_flops(recipe, *sources)
    return _COUNTED[key]


@pytest.fixture
def run_train(recipes: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """``run_train("ce.yaml", "epochs=1")`` is the command in this process, in the folder of the recipes."""
    with training_in(recipes, monkeypatch) as run:
        yield run


@contextmanager
def training_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Yield the command of training in this process, in a folder of recipes.

    So are the runs that it stands on: their own processes, of seconds each, are what ``tests/cli`` is about.
    """
    monkeypatch.chdir(folder)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}

    def run(*words: str) -> None:
        # The Accelerator is a singleton of its process; a command begins with none.
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()
        train.main(words)

    def status(command: list[str]) -> int:
        assert command[:2] == [sys.executable, str(ROOT / "pipeline" / "train.py")]
        run(*command[2:])
        return 0

    monkeypatch.setattr("pipeline.runs.dependencies._status", status)
    monkeypatch.setattr("pipeline.builders.session.image_flops", counted_once)
    try:
        with one_core():
            yield run
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
