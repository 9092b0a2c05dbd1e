"""Images of any number of classes: trained, measured, distilled, resumed, and the same on any number of ranks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from gloo_ranks import Ranks
from methods import MULTILABEL
from safetensors.torch import load_file
from several_classes import CLASSES, has_classes, write_images
from training_on_ranks import train

from pipeline import bench, evaluate
from pipeline.batch import Batch, Outputs, Progress
from pipeline.config.recipe import load_recipe
from pipeline.data.holdout import Holdout, used_rows
from pipeline.data.loader import Config, create_loader
from pipeline.errors import RecipeError
from pipeline.losses.kd import KD
from pipeline.tasks.multilabel import LABELS
from pipeline.training.journal import trace
from shards.prepare_multilabel import main as prepare
from shards.read import SplitReader

DATA = {"size": 24, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "crop": "pad", "pad": 2, "flip": 0}
STRATEGY = {
    "batch": 12,
    "optimizer": {"momentum": 0.9},
    "schedule": {"kind": "cosine", "rate": 0.1},
    "journal": {"every_steps": 1, "trackers": []},
}
Train = Callable[..., None]
PROGRESS = Progress(steps_per_epoch=10)


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 training and 37 validation images of four colours."""
    folder = tmp_path_factory.mktemp("squares")
    lists = [write_images(folder, name, count, seed) for name, count, seed in (("train", 120, 0), ("val", 37, 1))]
    arguments = ["--labels", str(lists[0]), "--val-labels", str(lists[1]), "--samples-per-shard", "50", "--jobs", "1"]
    prepare([str(folder / "images"), str(folder / "shards"), *arguments])
    return folder / "shards"


@pytest.fixture
def place(recipes: Path, squares: Path) -> Path:
    """A folder with ``bce.yaml``, a teacher, and ``student.yaml``, which learns from it."""
    write = {
        "bce.yaml": {"student": {"model": "cifar_resnet8"}, "losses": {"bce": {}}, "folder": "runs/bce"},
        "student.yaml": {
            "student": {"model": "cifar_resnet8"},
            "teacher": {"recipe": "bce.yaml"},
            "losses": {"bce": {"sum_classes": True}, "sigmoid_kd": {"temperature": 1.0}},
            "folder": "runs/student",
        },
    }
    for name, recipe in write.items():
        whole = {"task": "multilabel", "data": {**DATA, "path": str(squares)}, **STRATEGY, "epochs": 2, **recipe}
        (recipes / name).write_text(yaml.safe_dump(whole))
    return recipes


@pytest.mark.parametrize("loader", ["dali", "memory"])
def test_a_batch_has_the_classes_of_its_images(squares: Path, loader: str):
    config = Config.model_validate({**DATA, "path": str(squares), "loader": loader, "threads": 1})
    keys: dict[str, Any] = {"batch": 12, "accumulation": 1, "seed": 0, "device": torch.device("cpu")}
    expected = {split: has_classes(count, seed) for split, count, seed in (("train", 120, 0), ("val", 37, 1))}
    for rank in (0, 1):
        opened = create_loader(config, rank=rank, world=2, **keys)
        for split, batches in (("train", opened.stream(PROGRESS, 1)), ("val", opened.validation())):
            # An id is an index into the sorted names: 0.png, 1.png, 10.png, …
            order = sorted(range(len(expected[split])), key=lambda number: f"{number}.png")
            for batch in batches:
                real = batch.ids_B >= 0
                rows = [order[number] for number in batch.ids_B[real].tolist()]
                np.testing.assert_array_equal(batch.targets[LABELS][real].numpy(), expected[split][rows])
                assert set(batch.labels_B[real].tolist()) <= {0}
                assert len(batch.targets[LABELS]) == len(batch.images_BCHW)


def test_a_network_learns_the_classes_and_is_measured_as_evaluate_measures_it(
    place: Path, run_train: Train, capsys: pytest.CaptureFixture[str]
):
    run_train("bce.yaml", "epochs=12", "ema.decay=0.9")
    out = capsys.readouterr().out
    result = json.loads((place / "runs/bce/result.json").read_text())
    assert result["best_map"] >= result["map"] > 70  # of colours at random, two fifths are right
    assert 0 < result["f1"] <= 100
    assert {"ema_map", "best_epoch"} <= result.keys()
    assert not {"top1", "best_top1"} & result.keys()
    assert "mAP" in out
    lines = [json.loads(line) for line in (place / "runs/bce/journal.jsonl").read_text().splitlines()]
    assert {"total", "f1", "bce"} <= lines[0].keys()
    assert [line["map"] for line in lines if "map" in line][-1] == result["map"]
    evaluate.main(["runs/bce", "speed=no"])
    printed = capsys.readouterr().out
    assert f"mAP {result['map']:.2f}  F1 {result['f1']:.2f}  (37 images)" in printed


def test_a_student_learns_from_a_teacher_and_agreement_is_over_all_decisions(
    place: Path, run_train: Train, capsys: pytest.CaptureFixture[str]
):
    run_train("student.yaml")
    capsys.readouterr()
    evaluate.main(["runs/student", "weights=runs/bce/student.safetensors", "agreement=yes", "speed=no"])
    printed = capsys.readouterr().out
    assert len(set(re.findall(r"mAP ([\d.]+)", printed))) == 1
    assert "agreement: 100.00" in printed


def test_a_stopped_run_goes_on_bit_for_bit(place: Path, run_train: Train):
    run_train("student.yaml", "folder=runs/straight")
    run_train("student.yaml", "folder=runs/stopped", "stop.steps=13")
    run_train("student.yaml", "folder=runs/stopped")
    straight, stopped = (trace(place / "runs" / name / "journal.jsonl") for name in ("straight", "stopped"))
    assert straight == stopped
    weights = [load_file(place / "runs" / name / "student_best.safetensors") for name in ("straight", "stopped")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_ranks_train_and_measure_as_one_process_does(place: Path, run_train: Train, ranks: Ranks):
    run_train("bce.yaml", "epochs=1", "folder=runs/one", "data.validation_batch=4")
    ranks(train, place, ["bce.yaml", "epochs=1", "folder=runs/two", "data.validation_batch=4"])
    one, two = (trace(place / "runs" / name / "journal.jsonl") for name in ("one", "two"))
    assert [line.keys() for line in one] == [line.keys() for line in two]
    # BatchNorm sees a rank's rows, so the first loss is near and not equal; the images measured are the same.
    assert two[0]["bce"] == pytest.approx(one[0]["bce"], rel=0.1)
    results = [json.loads((place / "runs" / name / "result.json").read_text()) for name in ("one", "two")]
    assert all(0 < result["map"] <= 100 for result in results)


class Labelled(KD):
    """A loss that reads the labels, and inherits that it does not."""

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, torch.Tensor]:
        return {"labelled": torch.nn.functional.cross_entropy(student.logits_BK, batch.labels_B)}


class Listed(KD):
    """A loss whose targets are no set of names."""

    targets: Any = LABELS


@pytest.mark.parametrize(
    ("loss", "message"), [("Labelled", "reads the class of an image"), ("Listed", "must be a frozenset of names")]
)
def test_a_loss_of_ones_own_does_not_inherit_what_another_reads(place: Path, loss: str, message: str):
    with pytest.raises(RecipeError, match=message):
        load_recipe(place / "student.yaml", [f"losses.{__name__}:{loss}={{temperature: 4}}"])


def test_the_speed_of_losses_is_measured_without_images(place: Path, run_train: Train, capsys):
    run_train("bce.yaml")
    bench.main(["losses", "student.yaml", "repeats=1", "steps=1", "warmup=0"])
    assert "bce" in capsys.readouterr().out


def test_a_held_out_share_has_images_of_every_class(squares: Path):
    chosen = Holdout(share=0.1)
    reader = SplitReader(squares, "train")
    assert reader.targets is not None
    for split, count in (("val", 12), ("train", 108)):
        rows = used_rows(reader, chosen, split)
        assert reader.targets[rows].any(axis=0).all()
        assert abs(len(rows) - count) <= 2


@pytest.mark.parametrize("method", MULTILABEL)
def test_a_method_sets_the_task(method: str):
    recipe = load_recipe("configs/cifar100/resnet56_resnet20.yaml", [f"method={method}"]).recipe
    assert recipe.task == "multilabel"
    assert {name for spec in recipe.losses.values() for name in spec.targets} == {LABELS}


def test_shards_of_another_task_are_refused(place: Path, run_train: Train, shards: Path):
    with pytest.raises(RecipeError, match=r"task: multilabel: the images in data.path: .* have one class each; set "):
        run_train("bce.yaml", f"data.path={shards}", "data.crop=random_resized")
    with pytest.raises(RecipeError, match=r"task: multilabel: the images in data.path: .* have one class each; set "):
        run_train("--check", "bce.yaml", f"data.path={shards}", "data.crop=random_resized")
    with pytest.raises(RecipeError, match=r"task: classification: .* have any number of classes each; set task: multi"):
        run_train("ce.yaml", f"data.path={yaml.safe_load((place / 'bce.yaml').read_text())['data']['path']}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["losses.ce={}"], r"the loss 'ce' reads the class of an image, and an image of task: multi"),
        (["losses.dkd={alpha: 1, beta: 2, temperature: 4}"], r"the loss 'dkd' reads the class"),
        (["task=classification"], r"the loss 'bce' reads the targets labels_BK, which task: classification has not"),
        (["task=segmenting"], r"there is no task 'segmenting'; known are classification, detection, multilabel"),
    ],
)
def test_what_does_not_fit_the_task_is_one_line(place: Path, words: list[str], message: str):
    with pytest.raises(RecipeError, match=message) as refused:
        load_recipe(place / "student.yaml", words)
    assert "\n" not in str(refused.value)


def test_check_tells_the_parts_of_a_task_of_several_classes(
    place: Path, run_train: Train, capsys: pytest.CaptureFixture[str]
):
    run_train("--check", "student.yaml")
    assert "losses    bce, sigmoid_kd" in capsys.readouterr().out
    assert len(CLASSES) == 4
