"""Faster R-CNN in a run: distilled by every loss of maps, resumed, on two ranks as on one, measured and used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from boxed import BOX_CLASSES, draw_boxed, write_boxed
from gloo_ranks import Ranks
from methods import config_of
from PIL import Image
from safetensors.torch import load_file
from tiny_runs import training_in
from torch import nn
from training_on_ranks import train

from pipeline import evaluate, predict
from pipeline.builders.meta import image_flops, probe
from pipeline.builders.student import student_from_card, student_spec
from pipeline.config.recipe import load_recipe
from pipeline.errors import RecipeError
from pipeline.models import create_model
from pipeline.runs.card import read_card
from pipeline.runs.evaluation_file import read_evaluation
from pipeline.training.journal import trace

NETWORK: dict[str, Any] = {"model": "plain_fasterrcnn", "arguments": {"width": 4, "depth": 1, "channels": 8}}
LOSSES: dict[str, Any] = {
    "detection": {"normalizer": "batch"},
    "fitnet": {"stage": "fpn", "linear": True},
    "cwd": {"stages": ["fpn"], "weights": [10.0], "temperature": 1.0},
    "pkd": {"stages": ["fpn"]},
    "mgd": {"stages": ["fpn"], "hidden": "pixels", "share": 0.45, "weight": 5.0e-7},
    "fgd": config_of("fgd"),
    "kd": {"maps": ["rpn.class"], "temperature": 1.0},
    "dist": {**config_of("dist"), "maps": ["rpn.class"]},
    "box_l1": {"stages": ["rpn.box"], "beta": 0.0},
    "diffkd": {
        "diffusion": config_of("diffkd")["diffusion"],
        "feature": {"stage": "fpn", "latent": None, "predictor_reduction": 4, "adapter_reduction": 8},
        "logits": None,
        "logit_distance": None,
        **{"diffusion_weight": 1.0, "autoencoder_weight": 1.0, "distance_weight": 1.0},
    },
}
# Those that draw noise of each rank, or normalise by a batch's statistics, are tested for themselves.
ALONE = ["losses.mgd=null", "losses.diffkd=null", "student.freeze=[backbone.body.*]"]
Train = Callable[..., None]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards, a teacher's weights, and a recipe of two epochs of two steps."""
    folder = tmp_path_factory.mktemp("two_stages")
    write_boxed(folder / "shards", 8, 3, size=(64, 48))
    torch.manual_seed(1)
    teacher = create_model("plain_fasterrcnn", len(BOX_CLASSES), NETWORK["arguments"])
    for module in teacher.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.2)  # so that it finds boxes
    torch.save(teacher.state_dict(), folder / "teacher.pt")
    recipe = {
        "task": "detection",
        "student": NETWORK,
        "teacher": {**NETWORK, "weights": "teacher.pt"},
        "losses": LOSSES,
        "data": {
            **{"path": "shards", "crop": "keep_ratio", "short": [48], "long": 64, "buckets": [[64, 64]]},
            **{"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
        },
        **{"epochs": 2, "batch": 4, "schedule": {"rate": 0.01}, "clip": 35.0},
        "journal": {"every_steps": 1, "trackers": []},
    }
    (folder / "student.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(recipe))))
    return folder


@pytest.fixture
def run_train(place: Path, monkeypatch: pytest.MonkeyPatch):
    with training_in(place, monkeypatch) as run:
        yield run


def test_it_learns_from_every_loss_of_maps_and_a_stopped_run_goes_on_bit_for_bit(place: Path, run_train: Train):
    run_train("student.yaml", "folder=runs/straight")
    run_train("student.yaml", "folder=runs/stopped", "stop.steps=3")
    run_train("student.yaml", "folder=runs/stopped")
    straight, stopped = (trace(place / "runs" / name / "journal.jsonl") for name in ("straight", "stopped"))
    assert straight == stopped
    parts = {f"detection/{part}" for part in ("rpn_class", "rpn_box", "class", "box")}
    parts |= {"fitnet", "cwd", "pkd", "mgd", "fgd/foreground", "kd", "dist/inter", "box_l1", "diffkd/feature"}
    assert parts <= straight[0].keys()
    assert all(straight[0][part] > 0 for part in parts)
    assert any("ap" in line for line in straight)
    weights = [load_file(place / "runs" / name / "student.safetensors") for name in ("straight", "stopped")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_two_ranks_train_as_one_process_does(place: Path, run_train: Train, ranks: Ranks):
    words = ["student.yaml", *ALONE, "epochs=1"]
    run_train(*words, "folder=runs/one")
    ranks(train, place, [*words, "folder=runs/two"])
    one, two = (trace(place / "runs" / name / "journal.jsonl") for name in ("one", "two"))
    assert len(one) == len(two) == 3
    for of_one, of_two in zip(one[:2], two[:2], strict=True):
        for line in (of_one, of_two):
            line.pop("class_accuracy")  # a mean of the ranks' shares, of unequal numbers of regions
        assert of_two == pytest.approx(of_one, rel=2e-3)
    weights = [load_file(place / "runs" / name / "student.safetensors") for name in ("one", "two")]
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=1e-2, atol=1e-4)


def test_student_and_teacher_are_measured_and_the_weights_find_the_boxes_of_an_image(
    place: Path, run_train: Train, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(place)
    evaluate.main(["student.yaml", "weights=teacher.pt", "speed=no", "agreement=yes", "out=evaluation.json"])
    found = read_evaluation(Path("evaluation.json"))
    assert found.teacher is not None
    assert found.boxes is not None
    assert found.metrics["ar100"] == pytest.approx(found.teacher.metrics["ar100"], abs=1)  # folded
    assert found.metrics["ar100"]
    assert found.agreement is not None
    alone = [f"losses.{name}=null" for name in LOSSES if name != "detection"]
    run_train("student.yaml", "epochs=1", "teacher=null", *alone, "folder=runs/used")
    weights, image = Path("runs/used/student.safetensors"), Path("image.png")
    Image.fromarray(draw_boxed(1000, (64, 48))[0]).save(image)
    card = read_card(weights)
    ((path, boxes),) = predict.predict_boxes(student_from_card(weights, card), card, [image], 1)
    assert path == image
    assert boxes
    assert all(box.name in BOX_CLASSES and box.score > 0.05 for box in boxes)


def test_its_work_is_counted(place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(place)
    recipe = load_recipe(Path("student.yaml"), []).recipe
    network, _ = probe(student_spec(recipe.student, recipe.taps.student), 3, (64, 64))
    pyramid, _ = probe(student_spec(recipe.student, frozenset({"fpn"})), 3, (64, 64))
    # Behind the pyramid: a 3×3 and two 1×1 convolutions of 84 cells, and three layers of 1000 regions.
    first = (8 * 8 * 9 + 8 * 6 * 5) * (64 + 16 + 4)
    second = 1000 * (8 * 49 * 32 + 32 * 32 + 32 * 4 * 5)
    assert network.macs - pyramid.macs == first + second
    counted = image_flops(recipe)
    assert counted is not None
    assert counted > 2 * 3 * pyramid.macs


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "losses.kd.maps=[head.class]",
            r"the network has no stage 'head.class', because it is no detector of one stage",
        ),
        ("losses.detection.distance=giou", r"distance: giou is of detectors of one stage; .* so remove it$"),
    ],
)
def test_what_does_not_fit_is_one_line(run_train: Train, words: str, message: str):
    with pytest.raises(RecipeError, match=message) as caught:
        run_train("student.yaml", words, "folder=runs/refused")
    assert "\n" not in str(caught.value)
