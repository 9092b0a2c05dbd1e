"""PISR from end to end: a teacher that is given the large images, and a student that begins with its decoder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from gloo_ranks import Ranks
from paired import assert_same_but_for_rounding, draw_waves, size_of, write_paired
from PIL import Image
from resolved import run_of
from safetensors.torch import load_file
from torch import Tensor
from training_on_ranks import train

from pipeline import evaluate, predict
from pipeline.builders.inheriting import inherit_weights
from pipeline.builders.student import build_student, load_start, student_spec
from pipeline.config.compose import compose
from pipeline.config.recipe import load_recipe
from pipeline.config.source import RecipeSource, method_file
from pipeline.errors import RecipeError
from pipeline.models.create import create_model
from pipeline.tasks._high import HIGH
from pipeline.tasks._image_quality import quality, to_pixels
from pipeline.training.journal import trace
from shards.imresize import reduced_to_bytes

PARTS = ["feature_extraction", "shrinking", "mapping", "expanding", "deconvolution"]
SMALL = {"scale": 2, "features": 8, "shrunk": 4, "layers": 2, "residual": True}
COMMON = {
    "task": "super_resolution",
    "epochs": 2,
    "batch": 6,
    "optimizer": {"kind": "adam"},
    "schedule": {"kind": "cosine", "rate": 0.005, "final_rate": 1e-5},
    "journal": {"every_steps": 1, "trackers": []},
}
VALIDATION = 3
PISR = {"weight": 1e-3, "scale": 0.1, "eps": 1e-8}
Train = Callable[..., None]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_paired(tmp_path_factory.mktemp("images") / "shards", 8, VALIDATION)


@pytest.fixture
def place(recipes: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder, current too, with the recipes of both stages, ``teacher.yaml`` and ``student.yaml``."""
    data = {"loader": "memory", "crop": "patch", "upscale": 2, "size": 12, "repeat": 3, "path": str(images)}
    write: dict[str, dict[str, Any]] = {
        "teacher.yaml": {
            "student": {"model": "pisr_teacher", "arguments": SMALL},
            "losses": {"l1": {}, "imitation": {"weight": 0.1}},
            "folder": "runs/teacher",
        },
        "student.yaml": {
            "student": {"model": "fsrcnn", "arguments": SMALL, "start": {"recipe": "teacher.yaml", "parts": PARTS}},
            "teacher": {"recipe": "teacher.yaml"},
            "losses": {"l1": {}, "pisr": PISR},
            "folder": "runs/student",
        },
    }
    for name, recipe in write.items():
        (recipes / name).write_text(yaml.safe_dump({"data": data, **COMMON, **recipe}))
    monkeypatch.chdir(recipes)
    return recipes


def weights_of(folder: str) -> dict[str, Tensor]:
    return load_file(Path("runs") / folder / "student.safetensors")


def assert_same_run(one: str, other: str) -> None:
    assert trace(Path("runs") / one / "journal.jsonl") == trace(Path("runs") / other / "journal.jsonl")
    ours, theirs = weights_of(one), weights_of(other)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_the_teacher_learns_to_encode_the_large_image_and_is_measured_with_it(place: Path, run_train: Train):
    run_train("teacher.yaml", "epochs=12")
    lines = trace(Path("runs/teacher/journal.jsonl"))
    parts = [line["imitation"] for line in lines if "imitation" in line]
    assert parts[-1] < parts[0] / 2
    trained = json.loads(Path("runs/teacher/result.json").read_text())["psnr"]
    evaluate.main(["runs/teacher", "speed=no"])
    evaluation = json.loads(Path("runs/teacher/evaluation.json").read_text())["metrics"]
    assert evaluation["psnr"] == pytest.approx(trained, abs=1e-9)
    with_large, without = (psnr_of_validation(given_large=given) for given in (True, False))
    assert with_large == pytest.approx(trained, abs=1e-4)
    assert without < trained - 3


def psnr_of_validation(*, given_large: bool) -> float:
    """Return the mean PSNR of the trained teacher's images of the drawn validation images."""
    model = create_model("pisr_teacher", 1, SMALL).eval()
    model.load_state_dict(weights_of("teacher"))
    found = []
    for number in range(VALIDATION):
        image_HWC = draw_waves(1000 + number, *size_of(number))
        large_CHW = torch.from_numpy(image_HWC).permute(2, 0, 1)
        small_CHW = torch.from_numpy(reduced_to_bytes(image_HWC, 2)).permute(2, 0, 1) / 255
        with torch.no_grad():
            answer = model(small_CHW[None], {HIGH: large_CHW[None]} if given_large else None)
        found.append(float(quality(to_pixels(answer[0]), large_CHW, 2)[0]))
    return sum(found) / VALIDATION


def test_both_stages_go_on_bit_for_bit_after_a_stop(place: Path, run_train: Train):
    run_train("teacher.yaml")
    run_train("teacher.yaml", "folder=runs/stopped_teacher", "stop.steps=3")
    run_train("teacher.yaml", "folder=runs/stopped_teacher")
    assert_same_run("teacher", "stopped_teacher")
    run_train("student.yaml")
    run_train("student.yaml", "folder=runs/stopped", "stop.steps=3")
    run_train("student.yaml", "folder=runs/stopped")
    assert_same_run("student", "stopped")
    assert {"l1", "pisr"} <= trace(Path("runs/student/journal.jsonl"))[0].keys()
    assert weights_of("student").keys() == create_model("fsrcnn", 1, SMALL).state_dict().keys()


def test_the_student_begins_as_the_teachers_decoder(place: Path, run_train: Train):
    run_train("teacher.yaml")
    theirs = weights_of("teacher")
    words = ["student.start=null", f"student.inherit=[{', '.join(PARTS)}]"]
    for given in ([], words):
        run = run_of("student.yaml", given)
        student = build_student(student_spec(run.recipe.student, frozenset()), 1, run.recipe.seed)
        load_start(run, student)
        inherit_weights(run, student.model)
        found = student.model.state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in found.items())
        assert {name.partition(".")[0] for name in theirs} == {*PARTS, "encoder"}


def test_the_methods_are_those_of_both_stages():
    second = compose(RecipeSource(method_file("pisr")))
    assert second["student"]["inherit"] == PARTS
    teacher = load_recipe("configs/div2k/teachers/pisr_x2.yaml").recipe
    student = load_recipe("configs/div2k/fsrcnn_x2.yaml", ["method=pisr"])
    assert (teacher.losses["l1"].config.weight, teacher.losses["imitation"].config.weight) == (1, 1e-4)
    assert (student.recipe.losses["l1"].config.weight, student.recipe.losses["pisr"].config.weight) == (1, 1e-6)
    assert student.teachers[0].recipe == teacher


def test_the_teacher_of_a_student_is_measured_with_the_large_images(place: Path, run_train: Train):
    run_train("teacher.yaml")
    reached = json.loads(Path("runs/teacher/result.json").read_text())["psnr"]
    run_train("student.yaml", "teacher.batch=2", f"teacher.expect={reached - 0.001}", "epochs=1")
    with pytest.raises(RecipeError, match=f"the teacher reaches PSNR {reached:.2f} of the expected"):
        run_train("student.yaml", f"teacher.expect={reached + 0.01}", "folder=runs/refused")


def test_two_ranks_train_both_stages_as_one_process_does(place: Path, run_train: Train, ranks: Ranks):
    for recipe, teacher in (("teacher.yaml", []), ("student.yaml", ["teacher.batch=2"])):
        folders = [f"runs/{recipe.partition('.')[0]}", "runs/many"]
        words = [recipe, *teacher]
        run_train(*words)
        ranks(train, place, [*words, f"folder={folders[1]}_{recipe}"])
        one, many = (trace(Path(folder) / "journal.jsonl") for folder in (folders[0], f"{folders[1]}_{recipe}"))
        assert_same_but_for_rounding(one, many)


def test_predict_refuses_a_network_that_is_given_the_large_image(place: Path, run_train: Train, tmp_path: Path):
    run_train("teacher.yaml", "epochs=1")
    Image.new("RGB", (9, 7)).save(tmp_path / "small.png")
    with pytest.raises(RecipeError, match="pisr_teacher is given the large image, and there is none") as refused:
        predict.main(["runs/teacher/student.safetensors", str(tmp_path / "small.png"), f"out={tmp_path / 'large'}"])
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "large").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["teacher.cache=cache"], "teacher.cache: the answers of task: super_resolution are images"),
        (["losses.imitation={}"], "student.stages: .*code"),
        (
            ["student.arguments.shrunk=6"],
            r"of another shape \(first shrinking.0.weight: \(4, 8, 1, 1\), expected \(6, 8",
        ),
        (["student.arguments.layers=3"], r"3 keys missing \(first mapping.2.0.weight\)"),
        (["student.arguments.layers=1"], r"3 unexpected \(first mapping.1.0.weight\)"),
        (["student.start.parts=[encoder]"], "parts: FSRCNN has no module 'encoder' with weights; it has feature_"),
        (["student.model=edsr_baseline", "student.arguments=null"], "edsr_baseline cannot be built with {}: .*scale"),
    ],
)
def test_what_does_not_fit_is_refused_by_a_check(place: Path, run_train: Train, words: list[str], message: str):
    with pytest.raises(RecipeError, match=message) as refused:
        run_train("--check", "student.yaml", *words)
    assert "\n" not in str(refused.value)
