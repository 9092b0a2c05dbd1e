"""Images with boxes: a detector trained, measured, distilled, resumed, and the same on any number of ranks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from boxed import write_boxed
from gloo_ranks import Ranks
from methods import config_of
from safetensors.torch import load_file
from tiny_runs import training_in
from training_on_ranks import train

from pipeline import cache_teacher, report
from pipeline.training.journal import trace

DATA = {
    "crop": "keep_ratio",
    "short": [48, 64],
    "long": 96,
    "buckets": [[64, 96], [96, 64]],
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
    "validation_batch": 2,
    "path": "shards",
}
STRATEGY = {
    "task": "detection",
    "data": DATA,
    "epochs": 2,
    "batch": 6,
    "optimizer": {"kind": "adamw", "weight_decay": 0.01},
    "schedule": {"kind": "cosine", "rate": 0.005},
    "clip": 10.0,
    "journal": {"every_steps": 1, "trackers": []},
}
DENOISING = {
    "diffusion": config_of("diffkd")["diffusion"],
    "feature": {"stage": "fpn", "latent": None, "predictor_reduction": 4, "adapter_reduction": 8},
    "logits": None,
    "logit_distance": None,
    **{"diffusion_weight": 1.0, "autoencoder_weight": 1.0, "distance_weight": 1.0},
}
EVERY = {
    "kd": {"maps": ["head.class"], "temperature": 1.0},
    "dist": {"maps": ["head.class"], "beta": 1.0, "gamma": 1.0, "temperature": 1.0},
    "box_l1": config_of("box_l1"),
    "fitnet": {"stage": "fpn", "linear": True},
    "cwd": {"stages": ["fpn"], "weights": [10.0], "temperature": 1.0},
    "pkd": {"stages": ["fpn"]},
    "mgd": {"stages": ["fpn"], "hidden": "pixels", "share": 0.65, "weight": 2.0e-5},
    "fgd": config_of("fgd"),
    "diffkd": DENOISING,
}
OF_HEADS = ("kd", "dist", "box_l1")
DRAWN = ("mgd", "diffkd")
"""Losses with draws of each rank, which are tested for themselves."""
EPOCHS = 40
"""Of the teacher."""
Train = Callable[..., None]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards, a trained teacher, and ``student.yaml``, which it teaches by all losses of detectors."""
    folder = tmp_path_factory.mktemp("detectors")
    write_boxed(folder / "shards", 24, 5)
    networks = [{"model": "plain_retinanet", "arguments": {"width": width, "channels": 8}} for width in (8, 4)]
    write: dict[str, dict[str, Any]] = {
        "teacher.yaml": {
            "student": networks[0],
            "losses": {"detection": {}},
            "epochs": EPOCHS,
            "batch": 4,
            "folder": "runs/teacher",
        },
        "student.yaml": {
            "student": networks[1],
            "teacher": {"recipe": "teacher.yaml"},
            "losses": {"detection": {"normalizer": "batch"}, **EVERY},
        },
    }
    for name, recipe in write.items():
        (folder / name).write_text(yaml.safe_dump({**STRATEGY, **recipe}))
    with pytest.MonkeyPatch.context() as monkeypatch, training_in(folder, monkeypatch) as run:
        run("teacher.yaml")
    return folder


@pytest.fixture
def run_train(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Train]:
    """``run_train("student.yaml")`` is the command in this process, in the folder of the recipes."""
    with training_in(trained, monkeypatch) as run:
        yield run


def traces_of(place: Path, *names: str) -> list[list[dict[str, Any]]]:
    return [trace(place / "runs" / name / "journal.jsonl") for name in names]


def weights_of(place: Path, *names: str) -> list[dict[str, torch.Tensor]]:
    return [load_file(place / "runs" / name / "student.safetensors") for name in names]


def test_a_detector_learns_to_find_boxes(trained: Path):
    found = json.loads((trained / "runs/teacher/result.json").read_text())
    assert found["best_ap"] >= found["ap"] > 5
    assert found["ap50"] > 35
    lines = [json.loads(line) for line in (trained / "runs/teacher/journal.jsonl").read_text().splitlines()]
    assert {"total", "detection/class", "detection/box", "class_accuracy"} <= lines[0].keys()
    measured = [line for line in lines if "ap" in line]
    assert len(measured) == EPOCHS
    assert measured[-1]["ap"] == found["ap"]


def test_a_report_has_no_validation_loss_where_none_is_measured(trained: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(trained)
    report.main(["runs/teacher"])
    drawn = (trained / "runs/teacher/report.html").read_text()
    assert "detection/box" in drawn
    assert "alidation loss" not in drawn


def test_a_student_of_every_loss_of_detectors_goes_on_bit_for_bit_after_a_kill(
    trained: Path, run_train: Train, monkeypatch: pytest.MonkeyPatch
):
    def killed(*_: object) -> None:
        raise SystemExit("killed")

    words = ["student.yaml", "checkpoints.every_steps=2", "checkpoints.every_epochs=0"]
    run_train(*words, "folder=runs/whole")
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.training.session.validate", killed)  # at step 3; the last checkpoint is of step 2
        with pytest.raises(SystemExit, match="killed"):
            run_train(*words, "folder=runs/killed")
    run_train(*words, "folder=runs/killed")
    whole, resumed = traces_of(trained, "whole", "killed")
    assert whole == resumed
    parts = {f"fgd/{part}" for part in ("foreground", "background", "attention", "relation")}
    parts |= {"detection/class", "detection/box", "dist/inter", "dist/intra"}
    parts |= {"diffkd/feature", "diffkd/diffusion_feature"}
    assert parts | {"kd", "box_l1", "fitnet", "cwd", "pkd", "mgd"} <= whole[0].keys()
    weights = weights_of(trained, "whole", "killed")
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.parametrize("normalizer", ["image", "batch"])
def test_two_ranks_train_and_measure_as_one_process_does(
    trained: Path, run_train: Train, ranks: Ranks, normalizer: str
):
    # The teacher's own weights, so that boxes are found: a few steps leave most of them.
    words = ["student.yaml", "student.arguments.width=8", 'student.inherit=["*"]', "schedule.rate=1e-4"]
    words += ["student.sync_batchnorm=true", f"losses.detection.normalizer={normalizer}", "teacher.batch=3"]
    words += [f"losses.{name}=null" for name in DRAWN]
    run_train(*words, f"folder=runs/{normalizer}_one")
    ranks(train, trained, [*words, f"folder=runs/{normalizer}_two"])
    one, two = traces_of(trained, f"{normalizer}_one", f"{normalizer}_two")
    assert len(one) == len(two)
    for of_one, of_two in zip(one, two, strict=True):
        # The training metric is a mean of the ranks' shares; they have unequal numbers of boxes.
        shares = [line.pop("class_accuracy") for line in (of_one, of_two) if "total" in line]
        assert of_two == pytest.approx(of_one, rel=2e-3)
        assert not shares or shares[1] == pytest.approx(shares[0], abs=20)
    assert one[-1]["ap"] > 10
    weights = weights_of(trained, f"{normalizer}_one", f"{normalizer}_two")
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=1e-2, atol=1e-4)


def test_a_cache_of_the_pyramid_teaches_as_the_network_does(trained: Path, run_train: Train):
    # Heads compute in float32, so the rounding of their outputs to the cache's float16 shows: here no loss reads them.
    words = ["student.yaml", "data.views=2", "data.buckets=[[96, 96]]", "teacher.dtype=fp16"]
    words += [f"losses.{name}=null" for name in OF_HEADS]
    run_train(*words, "folder=runs/live")
    cache_teacher.main([*words, "teacher.cache=cache"])
    run_train(*words, "teacher.cache=cache", "folder=runs/cached")
    live, cached = traces_of(trained, "live", "cached")
    assert live == cached


def test_a_cache_of_the_heads_teaches_almost_as_the_network_does(trained: Path, run_train: Train):
    words = ["student.yaml", "data.views=1", "data.buckets=[[96, 96]]", "stop.steps=1"]
    run_train(*words, "folder=runs/live_heads")
    cache_teacher.main([*words, "teacher.cache=heads"])
    run_train(*words, "teacher.cache=heads", "folder=runs/cached_heads")
    (live, *_), (cached, *_) = traces_of(trained, "live_heads", "cached_heads")
    assert cached == pytest.approx(live, rel=2e-3)
