"""Images with smaller copies: a network trained, measured, distilled, resumed, and the same on any number of ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from gloo_ranks import Ranks
from paired import assert_same_but_for_rounding, write_paired
from PIL import Image
from safetensors.torch import load_file
from training_on_ranks import train

from pipeline import evaluate, export, predict, report
from pipeline.builders.student import student_from_card
from pipeline.config.recipe import load_recipe
from pipeline.errors import RecipeError
from pipeline.exporting.comparison import compare_outputs
from pipeline.exporting.formats import FORMATS
from pipeline.exporting.trained import TrainedStudent
from pipeline.models import create_model
from pipeline.runs.card import Card, read_card
from pipeline.training.journal import trace

DATA = {"loader": "memory", "crop": "patch", "upscale": 2, "size": 12, "repeat": 3}
STRATEGY = {
    "task": "super_resolution",
    "epochs": 2,
    "batch": 6,
    "optimizer": {"kind": "adam"},
    "schedule": {"kind": "cosine", "rate": 0.005},
    "journal": {"every_steps": 1, "trackers": []},
}
CARD = {"mean": (0, 0, 0), "std": (1, 1, 1), "size": 12, "identity": "0" * 64}
SMALL = {"scale": 2, "blocks": 3, "levels": 1.0, "residual": True}
EVERY = {"l1": {}, "image_l1": {}, "fakd": {"stages": "all"}, "srkd": {"stages": "all"}}
Train = Callable[..., None]


@pytest.fixture(scope="module")
def paired(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_paired(tmp_path_factory.mktemp("paired") / "shards", 8, 5)


@pytest.fixture
def recipes_of_pairs(recipes: Path, paired: Path) -> Path:
    """A folder with ``teacher.yaml``, and ``student.yaml``, which learns from it by several losses."""
    write: dict[str, dict[str, Any]] = {
        "teacher.yaml": {
            "student": {"model": "edsr_baseline", "arguments": {**SMALL, "features": 8}},
            "losses": {"l1": {}},
            "folder": "runs/teacher",
        },
        "student.yaml": {
            "student": {"model": "edsr_baseline", "arguments": {**SMALL, "features": 4}},
            "teacher": {"recipe": "teacher.yaml"},
            "losses": EVERY,
            "folder": "runs/student",
        },
    }
    for name, recipe in write.items():
        (recipes / name).write_text(yaml.safe_dump({"data": {**DATA, "path": str(paired)}, **STRATEGY, **recipe}))
    return recipes


def size_of_file(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def result_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


def test_a_network_becomes_better_than_bicubic_and_is_shown(
    recipes_of_pairs: Path, run_train: Train, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    run_train("teacher.yaml", "epochs=12")
    folder = recipes_of_pairs / "runs/teacher"
    found = result_of(folder)
    lines = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    measured = [line["psnr"] for line in lines if "ssim" in line]
    assert found["best_psnr"] == max(measured) >= found["psnr"] == measured[-1]
    evaluate.main([str(folder), "speed=no"])
    evaluation = json.loads((folder / "evaluation.json").read_text())
    metrics = evaluation["metrics"]
    assert metrics["psnr"] == pytest.approx(found["psnr"], abs=1e-9)
    assert metrics["bicubic_psnr"] < metrics["psnr"] < 60
    assert metrics["bicubic_ssim"] < metrics["ssim"] < 100
    assert evaluation["images"]["columns"] == ["bicubic", "student", "truth"]
    assert size_of_file(folder / evaluation["images"]["file"]) == (3 * 244, 4 * 244)
    assert "bicubic PSNR" in capsys.readouterr().out
    report.main([str(folder)])
    page = (folder / "report.html").read_text()
    assert "PSNR after the last epoch" in page
    assert "bicubic PSNR, dB" in page


def test_a_student_of_every_loss_goes_on_bit_for_bit_after_a_stop(recipes_of_pairs: Path, run_train: Train):
    run_train("student.yaml", "folder=runs/straight")
    run_train("student.yaml", "folder=runs/stopped", "stop.steps=3")
    run_train("student.yaml", "folder=runs/stopped")
    folders = [recipes_of_pairs / "runs" / name for name in ("straight", "stopped")]
    straight, stopped = (trace(folder / "journal.jsonl") for folder in folders)
    assert straight == stopped
    assert EVERY.keys() <= straight[0].keys()
    weights = [load_file(folder / "student.safetensors") for folder in folders]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_two_and_three_ranks_train_and_measure_as_one_process_does(
    recipes_of_pairs: Path, run_train: Train, several_ranks: Ranks
):
    words = ["student.yaml", "teacher.batch=2"]
    run_train(*words, "folder=runs/one")
    several_ranks(train, recipes_of_pairs, [*words, "folder=runs/many"])
    one, many = (trace(recipes_of_pairs / "runs" / name / "journal.jsonl") for name in ("one", "many"))
    assert_same_but_for_rounding(one, many)


def test_predict_writes_images_of_twice_the_size(
    recipes_of_pairs: Path, run_train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run_train("teacher.yaml")
    weights = str(recipes_of_pairs / "runs/teacher/student.safetensors")
    (tmp_path / "images").mkdir()
    for number, size in enumerate([(9, 17), (30, 12)]):
        Image.fromarray(np.full((*size[::-1], 3), 40 * number, np.uint8)).save(tmp_path / "images" / f"{number}.png")
    predict.main([weights, str(tmp_path / "images"), f"out={tmp_path / 'large'}"])
    assert [size_of_file(tmp_path / "large" / f"{number}.png") for number in range(2)] == [(18, 34), (60, 24)]
    assert "30 × 12  60 × 24" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "residual"), [("onnx", "false"), ("pt2", "true"), ("torchscript", "true")])
def test_an_exported_file_enlarges_images_of_any_size(
    recipes_of_pairs: Path, run_train: Train, capsys: pytest.CaptureFixture[str], name: str, residual: str
):
    run_train("teacher.yaml", "epochs=1", f"student.arguments.residual={residual}")
    run = recipes_of_pairs / "runs/teacher"
    export.main([str(run), f"format={name}", "images=3"])
    assert capsys.readouterr().out.rstrip().endswith(" on 3 parts in two sizes")
    weights = run / "student.safetensors"
    network = student_from_card(weights, read_card(weights))
    written = FORMATS[name].run(run / "export" / f"student-{name}.{name}")
    for size in ((9, 17), (30, 12)):
        images = torch.rand(2, 3, *size)
        torch.testing.assert_close(written(images), network(images), rtol=1e-4, atol=1e-5)


def test_bicubic_interpolation_in_a_network_is_no_onnx(recipes_of_pairs: Path, run_train: Train):
    run_train("teacher.yaml", "epochs=1")
    with pytest.raises(RecipeError, match="the network cannot be exported: the operation aten") as refused:
        export.main([str(recipes_of_pairs / "runs/teacher"), "format=onnx"])
    assert "\n" not in str(refused.value)
    assert not [*(recipes_of_pairs / "runs/teacher/export").iterdir()]


def test_a_file_that_enlarges_images_of_one_size_alone_is_refused():
    images = torch.rand(2, 3, 12, 12)
    network = create_model("edsr_baseline", 1, {**SMALL, "features": 4}).eval()
    card = Card(task="super_resolution", model="edsr_baseline", arguments={}, classes=("image",), **CARD)
    answers = [network(each).detach() for each in (images, images[:, :, :8, :6])]
    student = TrainedStudent(network, images, answers[0], card, other_size=(images[:, :, :8, :6], answers[1]))
    assert compare_outputs(student, lambda x: network(x).detach()).largest_difference == 0
    with pytest.raises(RecipeError, match=r"the exported file returns \[2, 3, 24, 24\] for \[2, 3, 16, 12\]"):
        compare_outputs(student, lambda x: answers[0][: len(x)])


@pytest.mark.parametrize("name", ["hub", "timm"])
def test_a_folder_for_a_hub_is_refused(recipes_of_pairs: Path, run_train: Train, name: str):
    run_train("teacher.yaml", "epochs=1")
    with pytest.raises(RecipeError, match=f"format={name} has no model card for larger images; give format=onnx, pt2"):
        export.main([str(recipes_of_pairs / "runs/teacher"), f"format={name}"])


REFUSED = [
    (["losses.ce={}"], "the loss 'ce' reads logits of classes, and task: super_resolution has images in their place"),
    (["losses.kd={temperature: 1}"], "the loss 'kd' reads logits of classes"),
    (["task=classification"], "reads the targets high_BCHW, which task: classification has not"),
    (["data.crop=pad", "data.upscale=1", "data.mean=[0,0,0]", "data.std=[1,1,1]", "data.repeat=1"], "data.crop: pad"),
    (["teacher.cache=cache"], "teacher.cache: the answers of task: super_resolution are images"),
    (["teacher.size=24"], "teacher.size resizes images to squares, and this is task: super_resolution"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED)
def test_what_does_not_fit_the_task_is_one_line(recipes_of_pairs: Path, words: list[str], message: str):
    with pytest.raises(RecipeError, match=message) as refused:
        load_recipe(recipes_of_pairs / "student.yaml", words)
    assert "\n" not in str(refused.value)


def test_networks_and_shards_of_another_scale_or_task_are_refused(
    recipes_of_pairs: Path, run_train: Train, shards: Path
):
    with pytest.raises(RecipeError, match=r"student.model: edsr_baseline: it returns 3 × 36 × 36 numbers for an"):
        run_train("teacher.yaml", "student.arguments.scale=3")
    with pytest.raises(RecipeError, match=r"student.model: cifar_resnet8: it returns 1 numbers for an image of 3 × 24"):
        run_train("--check", "teacher.yaml", "student={model: cifar_resnet8, arguments: null}")
    with pytest.raises(RecipeError, match=r"task: super_resolution: the images in data.path: .* have one class each"):
        run_train("teacher.yaml", f"data.path={shards}")


def test_check_tells_the_images_of_both_networks(
    recipes_of_pairs: Path, run_train: Train, capsys: pytest.CaptureFixture[str]
):
    run_train("--check", "student.yaml")
    printed = capsys.readouterr().out
    assert printed.count("logits           3 × 24 × 24") == 2
    assert "stage3           4 × 12 × 12" in printed


@pytest.mark.parametrize("method", ["l1", "image_l1", "fakd", "srkd"])
def test_a_method_of_the_demo_has_the_loss_of_images(method: str):
    recipe = load_recipe("configs/demo_super_resolution.yaml", [f"method={method}"]).recipe
    assert recipe.task == "super_resolution"
    assert "l1" in recipe.losses
    assert (recipe.teacher is None) == (method == "l1")
