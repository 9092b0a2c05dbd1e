"""What a run under DDP sends, what every rank has after it, and what it is worth."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from gloo_ranks import Ranks
from safetensors.torch import load_file
from torch.profiler import ProfilerActivity, profile
from training_rank import Training, trained

from pipeline import evaluate

ROOT = Path(__file__).resolve().parents[2]
RECIPE = {
    "student": {"model": "cifar_resnet8"},
    "losses": {"ce": {}},
    "data": {
        "path": "shards",
        "prepare": ["shards/prepare_demo.py", "--train", "60", "--val", "20", "--size", "24", "--jobs", "1"],
        "size": 16,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
    },
    "epochs": 4,
    "batch": 20,
    "schedule": {"rate": 0.05},
    "journal": {"every_steps": 1, "trackers": []},
}


class Run(NamedTuple):
    folder: Path
    ranks: list[Training]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe and its shards."""
    folder = tmp_path_factory.mktemp("ddp")
    (folder / "ce.yaml").write_text(yaml.safe_dump(RECIPE))
    script, *words = RECIPE["data"]["prepare"]
    subprocess.run([sys.executable, str(ROOT / script), *words, "shards"], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def run(place: Path, ranks: Ranks) -> Run:
    """A whole run on two ranks."""
    return Run(place / "runs" / "whole", ranks(trained, place, ["ce.yaml", "folder=runs/whole"]))


def test_all_ranks_end_with_the_same_weights_and_their_own_statistics(run: Run):
    one, other = (rank.weights for rank in run.ranks)
    statistics = {name for name in one if "running" in name}
    assert all(torch.equal(one[name], other[name]) for name in one.keys() - statistics)
    assert not any(torch.equal(one[name], other[name]) for name in statistics)


def test_the_exported_student_has_the_ranks_mean_statistics_and_one_process_measures_the_same(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(place)
    for name, exported in load_file(run.folder / "student.safetensors").items():
        one, other = (rank.weights[f"student.model.{name}"] for rank in run.ranks)
        torch.testing.assert_close(exported, (one + other) / 2 if exported.is_floating_point() else one)
    AcceleratorState._reset_state(reset_partial_state=True)
    evaluate.main([str(run.folder), "speed=no"])
    result = json.loads((run.folder / "result.json").read_text())
    assert f"top-1 {result['top1']:.2f}  top-5 {result['top5']:.2f}  (20 images)" in capsys.readouterr().out


def broadcasts(rank: int, world: int, folder: Path, *words: str) -> int:
    """Return how many broadcasts of tensors a run takes."""
    with profile(activities=[ProfilerActivity.CPU]) as events:
        trained(rank, world, folder, words)
    return sum(event.count for event in events.key_averages() if "broadcast" in event.key)


def test_no_step_broadcasts_buffers(place: Path, ranks: Ranks):
    # DDP begins with some: the weights, and when it has seen a step or two its buckets.
    short, long = (ranks(broadcasts, place, "ce.yaml", f"folder=runs/{n}", f"stop.steps={n}") for n in (4, 9))
    assert short == long
    assert short[0] > 0


@pytest.mark.endurance
def test_accelerates_launcher_starts_what_its_file_says(place: Path):
    file = str(ROOT / "launchers" / "accelerate" / "ddp.yaml")
    accelerate = [str(Path(sys.executable).parent / "accelerate"), "launch", "--config_file", file]
    words = [str(ROOT / "pipeline" / "train.py"), "ce.yaml", "stop.steps=1", "folder=runs/launched"]
    done = subprocess.run(
        [*accelerate, "--num_processes", "2", "--main_process_port", "0", *words],
        cwd=place,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    state = place / "runs" / "launched" / "checkpoints" / "step-1" / "state.json"
    assert json.loads(state.read_text())["world_size"] == 2
