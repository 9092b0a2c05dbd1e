"""``predict.py`` names what is on images by a student's file alone, and sees them as validation does."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pipeline import evaluate, predict
from pipeline.config.recipe import load_recipe
from pipeline.data.images import read_image, validation_image
from pipeline.data.loader import create_loader
from pipeline.errors import ROOT, AlreadyReported
from pipeline.models import create_model
from pipeline.runs.card import Card, read_card
from pipeline.training.checkpoint import Best, export_student, exported_best
from shards.jpeg import decode_jpeg, to_rgb
from shards.read import SplitReader

Train = Callable[..., None]
CARD = Card(
    task="classification",
    model="cifar_resnet8",
    arguments={},
    classes=tuple(f"class {number}" for number in range(20)),
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
    size=32,
    accuracy={"top1": 50.0, "top5": 70.0},
    identity="0" * 64,
)


@pytest.fixture
def student(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    export_student(create_model("cifar_resnet8", 20), tmp_path / "student.safetensors", CARD)
    return tmp_path / "student.safetensors"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    draws = np.random.default_rng(0)
    folder = tmp_path / "images"
    (folder / "below").mkdir(parents=True)
    for number, name in enumerate(("a.png", "b.png", "below/c.png")):
        pixels = draws.integers(256, size=(32 + 8 * number, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


def refused(*words: object) -> str:
    with pytest.raises((ValueError, OSError)) as error:
        predict.main([str(word) for word in words])
    assert "\n" not in str(error.value)
    return str(error.value)


def test_its_first_class_is_that_of_evaluate_on_the_same_pixels(
    run_train: Train, recipes: Path, capsys: pytest.CaptureFixture[str]
):
    run_train("ce.yaml")
    weights = recipes / "runs" / "ce" / "student.safetensors"
    reader = SplitReader(Path(load_recipe("ce.yaml").recipe.data.path), "val")
    folder = recipes / "val"
    folder.mkdir()
    rows = np.arange(len(reader.samples))
    for row, encoded in zip(rows, reader.bytes(rows), strict=True):
        (folder / f"{row:04}.{reader.manifest.image}").write_bytes(encoded.tobytes())
    predict.main([str(weights), str(folder), "top=1", "batch=7", "out=found.json"])
    found = [image["classes"][0]["label"] for image in json.loads(Path("found.json").read_text())]
    right = np.mean(np.array(found) == reader.samples["label"])
    capsys.readouterr()
    evaluate.main(["runs/ce", "speed=no"])
    assert re.search(r"top-1 ([\d.]+)", capsys.readouterr().out)[1] == f"{100 * right:.2f}"  # type: ignore[index]


@pytest.mark.parametrize("keys", [{"size": 16}, {"size": 16, "resize": 20}, {"size": 24, "validation_size": 28}])
def test_an_image_is_resized_and_cropped_as_the_loader_does(recipes: Path, keys: dict[str, int]):
    config = load_recipe(recipes / "ce.yaml").recipe.data.model_copy(update={"crop": "random_resized", **keys})
    device = torch.device("cpu")
    loader = create_loader(config, batch=12, accumulation=1, seed=0, rank=0, world=1, device=device, splits=("val",))
    reader = SplitReader(Path(config.path), "val")
    expected = torch.cat([batch.images_BCHW[batch.ids_B >= 0] for batch in loader.validation()])
    for row, image_CHW in enumerate(expected):
        file = recipes / f"image.{reader.manifest.image}"
        file.write_bytes(next(iter(reader.bytes(np.array([row])))).tobytes())
        ours = validation_image(read_image(file), config)
        # The libraries round differently while they resize: a few levels of 255.
        levels = (ours - image_CHW).abs() * 255 * min(config.std)
        assert levels.max() <= 4.01
        assert levels.mean() < 0.5


def test_a_table_names_the_classes_and_files_hold_them(
    student: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for ending in ("json", "csv"):
        predict.main([str(student), str(images), str(images / "a.png"), "top=2", f"out={tmp_path}/found.{ending}"])
    printed = capsys.readouterr().out
    assert f"{images}/below/c.png  class " in printed
    found = json.loads((tmp_path / "found.json").read_text())
    assert [Path(image["image"]).name for image in found] == ["a.png", "b.png", "c.png"]
    assert all(len(image["classes"]) == 2 for image in found)
    first = found[0]["classes"][0]
    assert first["name"] == f"class {first['label']}"
    with (tmp_path / "found.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["label"], row["name"]) for row in rows[:1]] == [(str(first["label"]), first["name"])]
    assert len(rows) == 6


def test_a_name_that_is_not_utf_8_is_printed_and_written(
    student: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (images / "a.png").rename(images / os.fsdecode(b"\xe9.png"))
    for ending in ("json", "csv"):
        predict.main([str(student), str(images), "top=1", f"out={tmp_path}/found.{ending}"])
        assert "\N{REPLACEMENT CHARACTER}.png" in (tmp_path / f"found.{ending}").read_text(encoding="utf-8")
    assert "\N{REPLACEMENT CHARACTER}.png" in capsys.readouterr().out


def test_of_several_classes_those_above_one_half_are_named():
    card = CARD.model_copy(update={"task": "multilabel", "classes": ("a", "b", "c")})
    logits_BK = torch.tensor([[2.0, -1.0, 3.0], [-1.0, -2.0, 0.0]])
    one, none = predict.guess(logits_BK, card, 5)
    assert [(each.name, round(each.probability, 3)) for each in one] == [("c", 0.953), ("a", 0.881)]
    assert none == []


def test_a_file_that_is_no_image_is_named_and_the_others_are_done(
    student: Path, images: Path, capsys: pytest.CaptureFixture[str]
):
    (images / "b.png").write_bytes(b"no image")
    (images / "half.png").write_bytes((images / "a.png").read_bytes()[:1000])
    with pytest.raises(AlreadyReported):
        predict.main([str(student), str(images)])
    told = capsys.readouterr()
    assert f"error: {images}/b.png: is not an image that Pillow knows\n" in told.err
    assert f"error: {images}/half.png: cannot be decoded (" in told.err
    assert f"{images}/below/c.png  class " in told.out


@pytest.mark.parametrize("name", ["cmyk.jpg", "turned.jpg", "grey16.png", "palette.png", "alpha.png", "moving.webp"])
def test_an_odd_image_has_the_pixels_of_the_shards(tmp_path: Path, name: str):
    pixels = np.random.default_rng(0).integers(256, size=(20, 24, 3), dtype=np.uint8)
    image, path = Image.fromarray(pixels), tmp_path / name
    keys: dict[str, Any] = {}
    if name == "cmyk.jpg":
        image = image.convert("CMYK")
    elif name == "turned.jpg":
        keys["exif"] = Image.Exif()
        keys["exif"][0x112] = 6
    elif name == "grey16.png":
        image = Image.fromarray(257 * pixels[..., 0].astype(np.uint16))
    elif name == "palette.png":
        image, keys = image.quantize(16), {"transparency": 3}
    elif name == "alpha.png":
        image.putalpha(image.convert("L"))
    else:
        keys = {"save_all": True, "append_images": [image.rotate(90)], "lossless": True}
    image.save(path, **keys)
    of_shards = np.asarray(to_rgb(decode_jpeg(path.read_bytes(), webp=True)))
    np.testing.assert_array_equal(read_image(path), of_shards)


@pytest.mark.parametrize(
    ("dtype", "message"),
    [(np.float32, "its values are no whole numbers"), (np.int32, "its grey values have more than 16 bits")],
)
def test_values_that_have_no_eight_bits_are_refused(tmp_path: Path, dtype: type, message: str):
    Image.fromarray(np.full((4, 4), 70_000, dtype)).save(tmp_path / "values.tif")
    with pytest.raises(ValueError, match=rf"values\.tif: cannot be decoded \({message}"):
        read_image(tmp_path / "values.tif")


def test_what_cannot_be_predicted_is_one_line(student: Path, images: Path, tmp_path: Path):
    plain = tmp_path / "plain.safetensors"
    save_file(load_file(student), plain)
    message = refused(plain, images)
    assert "has no card" in message
    assert f"pipeline/evaluate.py RECIPE weights={plain}" in message
    assert "name files or folders" in refused(student)
    assert "name a student.safetensors" in refused()
    (tmp_path / "empty").mkdir()
    assert "there is no image in this folder" in refused(student, tmp_path / "empty")
    assert "there is no such image or folder" in refused(student, tmp_path / "gone.jpg")
    assert "is a folder; name the weights file, such as" in refused(images, images)
    assert "there is no such weights file" in refused(tmp_path / "gone.safetensors", images)
    assert "cannot be read as safetensors" in refused(images / "a.png", images)
    assert "unknown key; known are top, batch and out" in refused(student, images, "quality=5")
    assert "top" in refused(student, images, "top=0")
    assert "ends in .json or .csv" in refused(student, images, "out=found.txt")
    assert "out: there is no folder" in refused(student, images, f"out={tmp_path}/gone/found.json")
    (tmp_path / "folder.json").mkdir()
    assert "is a folder; name a file" in refused(student, images, f"out={tmp_path}/folder.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "gone_module:network"}, "card: model: no model factory at 'gone_module:network'"),
        ({"model": "cifar_resnet20"}, "weights of another architecture than cifar_resnet20"),
        ({"classes": ("one", "two")}, "have 20 classes"),
        ({"format": 2}, "card: format"),
        ({"task": "segmenting"}, "card: task: Value error, there is no task 'segmenting'; known are classification"),
    ],
)
def test_a_card_that_does_not_fit_is_one_line(changes: dict, message: str, images: Path, tmp_path: Path):
    file = tmp_path / "other.safetensors"
    export_student(create_model("cifar_resnet8", 20), file, CARD.model_copy(update=changes))
    assert message in refused(file, images)


WRITE = """
import sys, torch
from pathlib import Path
from pipeline.models import create_model
from pipeline.runs.card import Card
from pipeline.training.checkpoint import export_student
torch.manual_seed(0)
card = Card.model_validate_json(sys.argv[1])
export_student(create_model("cifar_resnet8", 20), Path(sys.argv[2]), card)
"""


def test_two_processes_write_the_same_bytes(tmp_path: Path):
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", WRITE, CARD.model_dump_json(), f"{tmp_path}/{seed}"]
        subprocess.run(command, env=environment, check=True)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    assert read_card(tmp_path / "1") == CARD


def test_a_runs_files_have_cards_with_their_own_accuracy(run_train: Train, recipes: Path):
    run_train("ce.yaml", "ema.decay=0.5")
    folder = recipes / "runs" / "ce"
    result = json.loads((folder / "result.json").read_text())
    last, best, ema = (read_card(folder / f"student{name}.safetensors") for name in ("", "_best", "_ema"))
    accuracies = [card.accuracy and card.accuracy["top1"] for card in (last, best, ema)]
    assert accuracies == [result["top1"], result["best_top1"], result["ema_top1"]]
    assert best.best == {"top1": result["best_top1"], "epoch": result["best_epoch"]}
    assert last.identity == result["identity"]
    assert len(last.classes) == 20


@pytest.mark.parametrize(
    ("best", "message"),
    [
        (None, "best: Input should be an object"),
        ({"epoch": 1}, "best: has no top1"),
        ({"top1": "x", "epoch": 1}, "best: top1: Input should be a valid number"),
        ({"top1": 5.0, "epoch": 1.5}, "best: epoch: Input should be a valid integer"),
    ],
)
def test_a_damaged_card_of_the_best_weights_is_one_line(student: Path, best: object, message: str):
    card = json.loads(CARD.metadata()["card"]) | {"best": best}
    save_file(load_file(student), student, {"card": json.dumps(card)})
    with pytest.raises(ValueError, match=f"{message}.*; move it away; the next best weights take its place$") as error:
        exported_best(student, "top1")
    assert "\n" not in str(error.value)


def test_weights_from_before_there_was_a_card_still_go_on_and_load(run_train: Train, recipes: Path):
    run_train("ce.yaml", "folder=runs/whole")
    run_train("ce.yaml", "stop.steps=6")
    folder = recipes / "runs" / "ce"
    card = read_card(folder / "student_best.safetensors")
    assert card.best is not None
    before = {"best": json.dumps({"top1": card.best["top1"], "epoch": 1})}
    save_file(load_file(folder / "student_best.safetensors"), folder / "student_best.safetensors", before)
    assert exported_best(folder / "student_best.safetensors", "top1") == Best("top1", card.best["top1"], 1)
    run_train("ce.yaml")
    whole = recipes / "runs" / "whole"
    assert (folder / "student.safetensors").read_bytes() == (whole / "student.safetensors").read_bytes()
    save_file(load_file(whole / "student.safetensors"), recipes / "old.safetensors")
    run_train("ce.yaml", "student.start.weights=old.safetensors", "folder=runs/started", "stop.steps=1")
    evaluate.main(["ce.yaml", "weights=old.safetensors", "speed=no"])
