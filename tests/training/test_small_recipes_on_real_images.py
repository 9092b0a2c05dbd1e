"""The recipes of real images for a CPU, end to end: shards, a teacher, a student with DiffKD, and its evaluation."""

from __future__ import annotations

import json
import math
import tarfile
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import yaml
from tiny_runs import training_in

from pipeline import evaluate
from pipeline.training.journal import trace
from shards import prepare_camvid, prepare_voc
from shards.verify import verify

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
SIZES = {"size": [80, 104], "validation_size": [90, 120]}
"""Half of CamVid's height and width in its recipe for a CPU."""


def bccd(source: Path, out: Path) -> int:
    words = ["--boxes", "--train", "trainval", "--val", "test", "--jobs", "1"]
    return prepare_voc.main([str(source / "BCCD"), str(out), *words])


def camvid(source: Path, out: Path) -> int:
    return prepare_camvid.main(
        [str(source / "camvid"), str(out), "--val", "test", "--resize-short", "90", "--jobs", "1"]
    )


def write_recipes(recipes: Path, place: Path, data: dict[str, Any]) -> None:
    """Write the recipes of the small teacher and student, of two epochs each."""
    keys = {"data": data, "epochs": 2, "journal": {"every_steps": 1, "trackers": []}}
    teacher = {"base": str(recipes / "teachers" / "small.yaml"), "folder": "runs/teacher"}
    student = {"base": str(recipes / "small.yaml"), "folder": "runs/student", "teacher": {"recipe": "teacher.yaml"}}
    (place / "teacher.yaml").write_text(yaml.safe_dump({**teacher, **keys}))
    (place / "student.yaml").write_text(yaml.safe_dump({**student, **keys}))


@pytest.mark.shared
@pytest.mark.endurance
@pytest.mark.parametrize(("prepare", "sizes", "metric"), [(bccd, {}, "ap"), (camvid, SIZES, "miou")])
def test_a_student_learns_and_is_evaluated(
    prepare: Callable[[Path, Path], int],
    sizes: dict[str, list[int]],
    metric: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    name = prepare.__name__
    with tarfile.open(DATA / f"{name}.tar") as archive:
        archive.extractall(tmp_path, filter="data")
    shards = tmp_path / "shards"
    assert prepare(tmp_path, shards) == 0
    assert verify(shards, 1) == []
    write_recipes(ROOT / "configs" / name, tmp_path, {"path": str(shards), **sizes})
    with training_in(tmp_path, monkeypatch) as run:
        run("teacher.yaml")
        run("student.yaml", "method=diffkd")
        evaluate.main(["runs/student", "speed=no"])
    lines = trace(tmp_path / "runs/student/journal.jsonl")
    losses = [line["total"] for line in lines if "total" in line]
    assert len(losses) > 50
    assert all(map(math.isfinite, losses))
    assert mean(losses[-10:]) < mean(losses[:10])
    result = json.loads((tmp_path / "runs/student/result.json").read_text())
    assert result[metric] > 0
    assert f" {result[metric]:.2f}  " in capsys.readouterr().out.rpartition("student.safetensors:")[2]
