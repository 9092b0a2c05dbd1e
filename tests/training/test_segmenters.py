"""Images with masks: a segmenter trained, measured, distilled, cached, resumed, and the same on any number of ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from gloo_ranks import Ranks
from masked import write_masked
from methods import config_of
from safetensors.torch import load_file
from training_on_ranks import train

from pipeline import cache_teacher
from pipeline.builders.student import note_untrained_head, student_spec
from pipeline.config.recipe import load_recipe
from pipeline.errors import RecipeError
from pipeline.training.journal import trace

DATA = {
    "size": [24, 32],
    "validation_size": [40, 48],
    "crop": "scaled",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
    "validation_batch": 2,
}
STRATEGY = {
    "task": "segmentation",
    "epochs": 2,
    "batch": 6,
    "optimizer": {"momentum": 0.9},
    "schedule": {"kind": "poly", "rate": 0.05, "power": 0.9},
    "journal": {"every_steps": 1, "trackers": []},
}
KD = {"temperature": 1.0}
DKD = {"alpha": 1.0, "beta": 2.0, "temperature": 1.0}
DENOISING = {
    "diffusion": config_of("diffkd")["diffusion"],
    "feature": {"stage": "decode", "latent": 8, "predictor_reduction": 4, "adapter_reduction": 8},
    "logits": {"predictor_reduction": 1, "adapter_reduction": 1},
    "logit_distance": {"kd": KD},
    **{"diffusion_weight": 1.0, "autoencoder_weight": 1.0, "distance_weight": 1.0},
}
EVERY = {
    **{"kd": KD, "dkd": DKD, "dist": {"beta": 1.0, "gamma": 1.0, "temperature": 1.0}},
    "perception": {"inner": {"dkd": DKD}},
    "diffkd": DENOISING,
    "cwd": {"stages": ["stage4", "logits"], "weights": [1.0, 3.0], "temperature": 4.0},
    "ifvd": {"stages": ["stage4"]},
}
Train = Callable[..., None]


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_masked(tmp_path_factory.mktemp("masked") / "shards", 18, 5, size=(48, 40))


@pytest.fixture
def place(recipes: Path, masked: Path) -> Path:
    """A folder with ``teacher.yaml``, and ``student.yaml``, which learns from it by several losses."""
    networks = [{"model": "plain_fpn", "arguments": {"width": width}} for width in (8, 4)]
    write: dict[str, dict[str, Any]] = {
        "teacher.yaml": {"student": networks[0], "losses": {"segmentation": {}}, "folder": "runs/teacher"},
        "student.yaml": {
            "student": networks[1],
            "teacher": {"recipe": "teacher.yaml"},
            "losses": {"segmentation": {}, **EVERY},
            "folder": "runs/student",
        },
    }
    for name, recipe in write.items():
        (recipes / name).write_text(yaml.safe_dump({"data": {**DATA, "path": str(masked)}, **STRATEGY, **recipe}))
    return recipes


def result_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


def test_a_segmenter_learns_its_classes(place: Path, run_train: Train, capsys: pytest.CaptureFixture[str]):
    run_train("teacher.yaml", "epochs=20", "data.scales=[1.0]")
    found = result_of(place / "runs/teacher")
    assert found["best_miou"] >= found["miou"] > 50  # one class everywhere has at most a third
    assert found["pixel_accuracy"] > 80
    assert "mIoU" in capsys.readouterr().out
    lines = [json.loads(line) for line in (place / "runs/teacher/journal.jsonl").read_text().splitlines()]
    assert {"total", "segmentation", "pixel_accuracy"} <= lines[0].keys()
    measured = [line for line in lines if "miou" in line]
    assert len(measured) == 20
    assert measured[-1]["miou"] == found["miou"]
    assert measured[-1]["validation"]["loss"] < measured[0]["validation"]["loss"]


def test_a_student_of_every_loss_of_maps_and_pixels_goes_on_bit_for_bit_after_a_stop(place: Path, run_train: Train):
    run_train("student.yaml", "folder=runs/straight")
    run_train("student.yaml", "folder=runs/stopped", "stop.steps=4")
    run_train("student.yaml", "folder=runs/stopped")
    straight, stopped = (trace(place / "runs" / name / "journal.jsonl") for name in ("straight", "stopped"))
    assert straight == stopped
    parts = {"segmentation", "kd", "dkd", "dist/inter", "dist/intra", "perception/dkd", "cwd", "ifvd"}
    of_denoisers = ("feature", "diffusion_feature", "autoencoder", "logit_kd", "diffusion_logit")
    parts |= {f"diffkd/{part}" for part in of_denoisers}
    assert parts <= straight[0].keys()
    weights = [load_file(place / "runs" / name / "student.safetensors") for name in ("straight", "stopped")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_two_ranks_train_and_measure_as_one_process_does(place: Path, run_train: Train, ranks: Ranks):
    # Those that draw noise, or connect maps by a BatchNorm of their own, are tested for themselves.
    words = ["student.yaml", "student.sync_batchnorm=true", "losses.diffkd=null", "losses.cwd=null", "teacher.batch=3"]
    run_train(*words, "folder=runs/one")
    ranks(train, place, [*words, "folder=runs/two"])
    one, two = (trace(place / "runs" / name / "journal.jsonl") for name in ("one", "two"))
    assert len(one) == len(two)
    for of_one, of_two in zip(one, two, strict=True):
        # The training metric is a mean of the ranks' shares; they have unequal numbers of pixels with a class.
        shares = [line.pop("pixel_accuracy") for line in (of_one, of_two) if "total" in line]
        assert of_two == pytest.approx(of_one, rel=2e-3)
        assert not shares or shares[1] == pytest.approx(shares[0], rel=0.02)
    weights = [load_file(place / "runs" / name / "student.safetensors") for name in ("one", "two")]
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=1e-2, atol=1e-4)


def test_a_cache_of_maps_teaches_as_the_network_does(place: Path, run_train: Train):
    words = ["data.views=2", "teacher.dtype=fp16", "losses.diffkd=null", "losses.ifvd=null"]
    run_train("student.yaml", *words, "folder=runs/live")
    cache_teacher.main(["student.yaml", *words, "teacher.cache=cache"])
    run_train("student.yaml", *words, "teacher.cache=cache", "folder=runs/cached")
    live, cached = (trace(place / "runs" / name / "journal.jsonl") for name in ("live", "cached"))
    assert live == cached


def test_a_teacher_is_held_to_the_metric_of_its_task(place: Path, run_train: Train):
    told = r"teacher\.expect: the teacher reaches mIoU [\d.]+ of the expected 100"
    with pytest.raises(RecipeError, match=told):
        run_train("student.yaml", "teacher.expect=100")
    assert not (place / "runs" / "student").exists()


def test_an_auxiliary_head_that_no_loss_trains_is_told(place: Path, capsys: pytest.CaptureFixture[str]):
    words = ["student.model=deeplabv3_resnet18", "student.arguments={width: 0.125}"]
    for more, told in (([], True), (["losses.segmentation.aux_weight=0.4"], False)):
        recipe = load_recipe(place / "teacher.yaml", [*words, *more]).recipe
        note_untrained_head(recipe, student_spec(recipe.student, recipe.taps.student).build(3))
        note = "note: student: no loss trains its auxiliary head, which is saved as it began"
        assert (note in capsys.readouterr().out) == told


REFUSED = [
    (["losses.ce={}"], "the loss 'ce' compares images by their logits, and task: segmentation has those of pixels"),
    (["losses.sigmoid_kd={temperature: 1}"], "the loss 'sigmoid_kd' compares images by their"),
    (["losses.bce={}"], "the loss 'bce' compares images by their logits"),
    (
        ["losses.logit_standardization={inner: {sigmoid_kd: {temperature: 1}}}"],
        "the loss 'logit_standardization' compares",
    ),
    (["task=classification"], "needs|reads the targets mask_BHW|crop"),
    (["data.crop=pad", "data.size=24", "data.validation_size=null"], "data.crop: pad is not for task: segmentation"),
    (["teacher.expect_top1=50"], "teacher.expect_top1: unknown key; use teacher.expect"),
    (["teacher.size=32"], "teacher.size resizes images to squares, and this is task: segmentation; remove it"),
    (["data.augment=[{erasing: {probability: 0.5}}]"], "augment: crop: scaled does not take it; remove it"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED)
def test_what_does_not_fit_the_task_is_one_line(place: Path, words: list[str], message: str):
    with pytest.raises(RecipeError, match=message) as refused:
        load_recipe(place / "student.yaml", words)
    assert "\n" not in str(refused.value)


def test_shards_of_another_task_are_refused(place: Path, run_train: Train, shards: Path, masked: Path):
    with pytest.raises(RecipeError, match=r"task: segmentation: the images in data.path: .* have one class each; set "):
        run_train("teacher.yaml", f"data.path={shards}")
    with pytest.raises(RecipeError, match=r"task: classification: .* have masks; set task: segmentation, or give"):
        run_train("ce.yaml", f"data.path={masked}")


def test_check_tells_the_maps_of_both_networks(place: Path, run_train: Train, capsys: pytest.CaptureFixture[str]):
    run_train("--check", "student.yaml")
    printed = capsys.readouterr().out
    assert "logits           3 × 6 × 8" in printed
    assert "decode           32 × 6 × 8" in printed


@pytest.mark.parametrize("method", ["ce", "kd", "dkd", "dist", "cwd", "ifvd", "fitnet", "perception", "diffkd", "ddkd"])
def test_a_method_of_the_demo_has_the_loss_of_pixels_in_place_of_that_of_images(method: str):
    recipe = load_recipe("configs/demo_segmentation.yaml", [f"method={method}"]).recipe
    assert recipe.task == "segmentation"
    assert "segmentation" in recipe.losses
    assert "ce" not in recipe.losses
    assert (recipe.teacher is None) == (method == "ce")


def test_a_pair_with_a_loss_of_its_own_task_still_needs_a_method(place: Path):
    (place / "pair.yaml").write_text(
        yaml.safe_dump(
            {
                **STRATEGY,
                "data": {**DATA, "path": "shards"},
                "student": {"model": "plain_fpn"},
                "overrides": {"losses": {"ce": None, "segmentation": {}}},
            }
        )
    )
    with pytest.raises(RecipeError, match="it needs a method: method=NAME"):
        load_recipe(place / "pair.yaml")
    assert set(load_recipe(place / "pair.yaml", ["method=ce"]).recipe.losses) == {"segmentation"}
