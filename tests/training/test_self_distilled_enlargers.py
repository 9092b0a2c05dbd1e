"""A part of a network that enlarges images, trained with the whole by CSD: what a run leaves, and how it goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from extractors import Tiny
from gloo_ranks import Ranks
from paired import write_paired
from PIL import Image
from safetensors.torch import load_file, save_file
from training_on_ranks import train

from pipeline import evaluate, predict
from pipeline.config.recipe import load_recipe
from pipeline.errors import RecipeError
from pipeline.models import create_model
from pipeline.training import zero
from pipeline.training.journal import trace

STAGES = {"one": "one", "two": "two", "logits": "head"}
PHI = {"model": "extractors:Tiny", "weights": "tiny.safetensors", "stages": STAGES, "taps": ["one", "two"]}
CSD = {
    "full_weight": 1.0,
    "contrast_weight": 0.05,
    "level_weights": [0.5, 1.0],
    "negatives": 4,
    "phi": PHI,
}
ARGUMENTS = {"scale": 2, "blocks": 3, "levels": 1.0, "residual": True, "features": 4}
RECIPE: dict[str, Any] = {
    "task": "super_resolution",
    "student": {"model": "edsr_baseline", "arguments": ARGUMENTS, "within": {"features": 12}},
    "losses": {"l1": {}, "csd": CSD},
    "data": {"loader": "memory", "crop": "patch", "upscale": 2, "size": 12, "repeat": 3},
    "epochs": 2,
    "batch": 6,
    "optimizer": {"kind": "adam"},
    "schedule": {"kind": "cosine", "rate": 0.005},
    "journal": {"every_steps": 1, "trackers": []},
}
Train = Callable[..., None]


@pytest.fixture(scope="module")
def paired(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_paired(tmp_path_factory.mktemp("paired") / "shards", 8, 5)


@pytest.fixture
def folder(recipes: Path, paired: Path) -> Path:
    """A folder with ``csd.yaml``, the file of its frozen network, and ``student.yaml``, which it teaches."""
    save_file(Tiny(3).state_dict(), recipes / "tiny.safetensors")
    data = {**RECIPE["data"], "path": str(paired)}
    write: dict[str, dict[str, Any]] = {
        "csd.yaml": {**RECIPE, "data": data, "folder": "runs/csd"},
        "student.yaml": {
            **RECIPE,
            "data": data,
            "student": {"model": "edsr_baseline", "arguments": {**ARGUMENTS, "features": 3}},
            "teacher": {"recipe": "csd.yaml"},
            "losses": {"l1": {}, "image_l1": {}, "fakd": {"stages": "all"}},
            "folder": "runs/student",
        },
    }
    for name, recipe in write.items():
        (recipes / name).write_text(yaml.safe_dump(recipe))
    return recipes


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]


def test_a_run_leaves_the_part_alone_which_is_measured_shown_and_teaches(
    folder: Path, run_train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run_train("student.yaml")
    run = folder / "runs/csd"
    plain = create_model("edsr_baseline", 1, ARGUMENTS)
    parameters = sum(each.numel() for each in plain.parameters())
    for name in ("student", "student_best"):
        plain.load_state_dict(load_file(run / f"{name}.safetensors"), strict=True)
    result = json.loads((run / "result.json").read_text())
    assert result["parameters"] == parameters
    evaluate.main([str(run), "speed=no"])
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["metrics"]["psnr"] == pytest.approx(result["psnr"], abs=1e-9)
    assert evaluation["network"]["parameters"] == parameters
    image = tmp_path / "image.png"
    Image.new("RGB", (9, 7), (40, 90, 200)).save(image)
    predict.main([str(run / "student.safetensors"), str(image), f"out={tmp_path / 'large'}"])
    with Image.open(tmp_path / "large" / "image.png") as large:
        assert large.size == (18, 14)
    assert {"image_l1", "fakd"} <= lines_of(folder / "runs/student")[0].keys()


def test_the_losses_fall_and_a_stopped_run_goes_on_bit_for_bit(folder: Path, run_train: Train):
    run_train("csd.yaml", "folder=runs/straight", "ema={decay: 0.5}", "epochs=8")
    run_train("csd.yaml", "folder=runs/stopped", "ema={decay: 0.5}", "epochs=8", "stop.steps=3")
    run_train("csd.yaml", "folder=runs/stopped", "ema={decay: 0.5}", "epochs=8")
    folders = [folder / "runs" / name for name in ("straight", "stopped")]
    straight, stopped = (trace(each / "journal.jsonl") for each in folders)
    assert straight == stopped
    steps = [line for line in straight if "total" in line]
    for part in ("l1", "csd/full", "csd/contrast"):
        values = [line[part] for line in steps]
        assert sum(values[-4:]) < sum(values[:4]), part
    for name in ("student", "student_ema", "student_best"):
        weights = [load_file(each / f"{name}.safetensors") for each in folders]
        assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
        create_model("edsr_baseline", 1, ARGUMENTS).load_state_dict(weights[0], strict=True)


@pytest.mark.parametrize(
    "words",
    [
        ["precision=bf16", "data.channels_last=true"],
        ["batch=12", "accumulation=2"],
        ["losses.csd.normalize=false"],
        ["losses.csd.contrast_weight=0"],
        ["optimizer.rates={whole.body: 0.1}"],
    ],
    ids=lambda words: words[0],
)
def test_other_strategies_train_both_networks_with_finite_losses(folder: Path, run_train: Train, words: list[str]):
    run_train("csd.yaml", "stop.steps=2", *words)
    steps = [line for line in trace(folder / "runs/csd/journal.jsonl") if "total" in line]
    parts = {"l1", "csd/full", "csd/contrast"} - ({"csd/contrast"} if words[0].endswith("weight=0") else set())
    for line in steps:
        assert line["total"] == pytest.approx(sum(line[part] for part in parts), rel=1e-3)
        assert 0 < line["total"] < 2


def test_a_checkpoint_has_the_whole_network_and_nothing_of_the_frozen_one(folder: Path, run_train: Train):
    run_train("csd.yaml", "stop.steps=2")
    (path,) = (folder / "runs/csd/checkpoints").glob("step-*/distiller.safetensors")
    whole = create_model("edsr_baseline", 1, {**ARGUMENTS, "features": 12}).state_dict()
    assert load_file(path).keys() == {f"student.model.whole.{name}" for name in whole}


def test_two_and_three_ranks_train_as_one_process_does(folder: Path, run_train: Train, ranks: Ranks):
    run_train("csd.yaml", "folder=runs/one")
    ranks(train, folder, ["csd.yaml", "folder=runs/many"])
    one, many = (trace(folder / "runs" / name / "journal.jsonl") for name in ("one", "many"))
    assert len(one) == len(many)
    for of_one, of_many in zip(one, many, strict=True):
        for line in (of_one, of_many) if "total" in of_one else ():
            del line["psnr"]  # a mean of the ranks' PSNR
        assert of_many == pytest.approx(of_one, rel=1e-3)


def test_the_frozen_networks_weights_are_part_of_the_runs_identity_and_their_path_is_not(
    folder: Path, run_train: Train
):
    run_train("csd.yaml", "stop.steps=1")
    named = json.loads((folder / "runs/csd/identity.json").read_text())["losses"]["csd"]["phi"]
    assert named["weights"].startswith("sha256:")
    (folder / "tiny.safetensors").rename(folder / "moved.safetensors")
    with pytest.raises(RecipeError, match=r"losses.csd.phi.weights: tiny.safetensors: there is no such weights file"):
        run_train("csd.yaml", "stop.steps=2")
    run_train("csd.yaml", "losses.csd.phi.weights=moved.safetensors", "stop.steps=2")
    state = Tiny(3).state_dict()
    save_file({**state, "one.0.bias": state["one.0.bias"] + 1}, folder / "tiny.safetensors")
    with pytest.raises(RecipeError, match=r"different losses.csd.phi.weights"):
        run_train("csd.yaml")
    # The classifier is left out, so that a file with another one is the same network.
    save_file({**state, "head.weight": torch.zeros(7, 2), "head.bias": torch.zeros(7)}, folder / "tiny.safetensors")
    run_train("csd.yaml")


def test_check_tells_the_student_and_the_network_around_it(
    folder: Path, run_train: Train, capsys: pytest.CaptureFixture[str]
):
    (folder / "tiny.safetensors").unlink()
    run_train("--check", "csd.yaml")
    printed = capsys.readouterr().out
    count = {
        features: sum(
            each.numel() for each in create_model("edsr_baseline", 1, {**ARGUMENTS, "features": features}).parameters()
        )
        for features in (4, 12)
    }
    assert f"student   edsr_baseline, {count[4]:,} parameters" in printed
    assert f"the first channels of a network of {count[12]:,} parameters; both take" in printed
    assert "losses    csd/full, csd/contrast, l1" in printed
    assert "no parameters of their own" in printed


REFUSED = [
    (["student.start={weights: a.pt}"], "within does not go with start; remove one of them"),
    (["student.peers=2"], "within does not go with peers"),
    (["student.freeze=[head]"], "within does not go with freeze"),
    (["student.compile=true"], "within does not go with compile"),
    (["teacher={average: {decay: 0.9}}"], "teacher.average was not tried with student.within; remove one of them"),
    (["batch=4"], "the loss 'csd' compares 5 images of a micro-batch, got 4"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED)
def test_what_does_not_go_with_a_part_of_a_network_is_one_line(folder: Path, words: list[str], message: str):
    with pytest.raises(RecipeError, match=message) as refused:
        load_recipe(folder / "csd.yaml", words)
    assert "\n" not in str(refused.value)


def test_a_network_of_classes_is_no_part_of_another():
    with pytest.raises(RecipeError, match=r"student.within is for task: super_resolution, and this is task: classif"):
        load_recipe("configs/cifar100/resnet56_resnet20.yaml", ["method=ce", "student.within={width: 2}"])


def test_deepspeed_is_refused(folder: Path):
    recipe = load_recipe(folder / "csd.yaml").recipe
    with pytest.raises(RecipeError, match=r"student.within: a part of a network was not tried under DeepSpeed"):
        zero._check_recipe(recipe, 1)


REFUSED_NETWORKS = [
    (["student.within=null"], "csd: the student is no part of a network that could teach it; set student.within"),
    (["student.within={features: 2}"], "student.within: head.weight is 4 × 3 × 3 × 3 and 2 × 3 × 3 × 3"),
    (["student.within={blocks: 4}"], "student.within: only one of both networks has body.3.conv1.bias"),
    (["student.within={width: 4}"], "student.within: edsr_baseline takes no argument 'width'"),
    (["losses.csd.phi.model=cifar_resnet9"], "losses.csd.phi.model: there is no model 'cifar_resnet9'"),
    (["losses.csd.phi.taps=[one,three]"], "losses.csd.phi.stages: the network has no stage 'three'"),
    (
        ["losses.csd.phi={model: vgg19, weights: a.pt, stages: null, taps: [relu1_1, relu2_1]}"],
        "losses.csd.phi.model: VGG cannot take images of 24 × 24 pixels",
    ),
]


@pytest.mark.parametrize(("words", "message"), REFUSED_NETWORKS)
def test_networks_that_do_not_fit_are_one_line(folder: Path, run_train: Train, words: list[str], message: str):
    with pytest.raises((RecipeError, ValueError), match=message) as refused:
        run_train("--check", "csd.yaml", *words)
    assert "\n" not in str(refused.value)


def test_weights_of_another_network_are_refused(folder: Path, run_train: Train):
    save_file({"one.0.weight": torch.zeros(4, 3, 1, 1)}, folder / "tiny.safetensors")
    with pytest.raises(RecipeError, match=r"losses.csd.phi.weights: tiny.safetensors: weights of another architecture"):
        run_train("csd.yaml")
