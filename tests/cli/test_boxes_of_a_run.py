"""What a user does with a detector's weights: evaluate them beside a picture, find boxes, draw a report."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from boxed import BOX_CLASSES, draw_boxed, write_boxed
from PIL import Image

from pipeline import evaluate, predict
from pipeline.builders.student import student_from_card
from pipeline.config.recipe import load_recipe
from pipeline.errors import RecipeError
from pipeline.models import create_model
from pipeline.reports.box_pictures import draw_box_metrics, draw_class_aps
from pipeline.runs.card import Card, read_card
from pipeline.runs.evaluation_file import EvaluationFile, read_evaluation
from pipeline.tasks._average_precision import average_precision_of_boxes, match_boxes
from pipeline.tasks._mask_images import palette
from pipeline.tasks.detection import Detection
from pipeline.training.checkpoint import export_student

IMAGES, SIDES = 5, [[64, 64], [64, 96], [96, 64]]
NETWORK = {"model": "plain_retinanet", "arguments": {"width": 2}}
CARD = Card(
    task="detection",
    model="plain_retinanet",
    arguments={"width": 2},
    classes=BOX_CLASSES,
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
    size=(64, 96),
    short=64,
    long=80,
    buckets=((64, 64), (64, 96), (96, 64)),
    identity="0" * 64,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards, and with two detectors that were not trained, but find a hundred boxes everywhere."""
    folder = tmp_path_factory.mktemp("boxes")
    write_boxed(folder / "shards", 3, IMAGES)
    for seed, name in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        model = create_model(CARD.model, len(BOX_CLASSES), CARD.arguments)
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, torch.nn.Conv2d):
                    torch.nn.init.normal_(module.weight, std=0.2)
            model.head.classification_head.cls_logits.bias.zero_()  # type: ignore[union-attr, operator]
        export_student(model, folder / f"{name}.safetensors", CARD)
    recipe = {
        "task": "detection",
        "student": NETWORK,
        "teacher": {**NETWORK, "weights": str(folder / "teacher.safetensors")},
        "losses": {"detection": {}},
        "data": {
            "path": str(folder / "shards"),
            "crop": "keep_ratio",
            "short": [64],
            "long": 80,
            "buckets": SIDES,
            "mean": CARD.mean,
            "std": CARD.std,
        },
        "epochs": 1,
        "batch": 2,
        "schedule": {"rate": 0.1},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(recipe))))
    return folder


@pytest.fixture(autouse=True)
def _in_its_folder(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


@pytest.fixture(scope="module")
def evaluation(place: Path) -> EvaluationFile:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        words = ["weights=student.safetensors", "speed=no", "agreement=yes", "out=evaluation.json"]
        evaluate.main(["recipe.yaml", *words])
        return read_evaluation(Path("evaluation.json"))


def found_by_hand(name: str) -> list[np.ndarray]:
    """Return the detections of each validation image, float64 [D, 6] in its own pixels, by ``predict.py``."""
    weights = Path(f"{name}.safetensors")
    model, card = student_from_card(weights, read_card(weights)), read_card(weights)
    for number in range(IMAGES):
        Image.fromarray(draw_boxed(1000 + number)[0]).save(f"{number}.png")
    paths = [Path(f"{number}.png") for number in range(IMAGES)]
    found = dict(predict.predict_boxes(model, card, paths, 2))
    return [np.array([[*box.box, box.score, box.label] for box in found[path]]).reshape(-1, 6) for path in paths]


def test_an_evaluation_has_the_figures_of_the_boxes_that_predict_finds(evaluation: EvaluationFile):
    objects = [draw_boxed(1000 + number)[1].astype(float) for number in range(IMAGES)]
    assert evaluation.teacher is not None
    for name, measured in (("student", evaluation), ("teacher", evaluation.teacher)):
        found = found_by_hand(name)
        most = max(map(len, found))
        none = np.array([[0.0, 0, 0, 0, 0, -1]])
        rows = [np.concatenate([each, none.repeat(most - len(each), 0)]) for each in found]
        matched = [match_boxes(each, known, 3) for each, known in zip(rows, objects, strict=True)]
        expected = average_precision_of_boxes(*(np.stack(parts) for parts in zip(*matched, strict=True)))
        assert measured.per_class is not None
        assert list(measured.per_class.samples) == expected.samples
        for key, value in expected.metrics.items():
            assert measured.metrics[key] == pytest.approx(value, abs=2)  # Pillow resizes a little otherwise
    assert evaluation.metrics["ar100"] is not None
    assert evaluation.metrics["ar100"] > 0
    assert (evaluation.samples, evaluation.confusion, evaluation.kl) == (IMAGES, None, None)
    assert evaluation.agreement is not None


def test_the_picture_shows_the_boxes_in_the_colours_of_their_classes(evaluation: EvaluationFile):
    assert evaluation.boxes is not None
    assert evaluation.boxes.columns == ("truth", "teacher", "student")
    with Image.open(evaluation.boxes.file) as image:
        pixels = np.asarray(image)
    assert pixels.shape == (4 * 100, 3 * 100, 3)
    drawn, objects = draw_boxed(1000)
    scale = min(64 / min(drawn.shape[:2]), 80 / max(drawn.shape[:2]))
    height, width = (int(side * scale + 0.5) for side in drawn.shape[:2])
    top, left = 2 + (96 - height) // 2, 2 + (96 - width) // 2
    assert len(objects)
    for *edges, label, _, _ in objects:
        x, y = (round(edge * scale) for edge in edges[:2])
        assert pixels[top + y, left + x].tolist() == palette()[int(label)].tolist()


def test_the_cells_of_a_picture_have_the_shape_of_the_only_bucket(tmp_path: Path):
    write_boxed(tmp_path / "wide", 2, 2, size=(64, 48))
    words = ["weights=student.safetensors", "speed=no", "out=wide.json"]
    evaluate.main(["recipe.yaml", *words, f"data.path={tmp_path / 'wide'}", "data.buckets=[[64, 96]]"])
    found = read_evaluation(Path("wide.json")).boxes
    assert found is not None
    with Image.open(found.file) as image:
        assert image.size == (2 * (96 + 4), 2 * (64 + 4))


def test_the_report_has_bars_of_sizes_and_classes(evaluation: EvaluationFile):
    named = [("kd", 0, evaluation)]
    ((caption, sizes),) = draw_box_metrics(named, Detection.titles)
    ((_, classes),) = draw_class_aps(named)
    assert caption == "AP and AR by size of the objects"
    assert all(title in sizes for title in Detection.titles.values())
    assert all(name in classes for name in BOX_CLASSES)
    assert "teacher" in sizes


def test_boxes_are_written_as_json_or_csv_and_the_likely_ones_printed(capsys: pytest.CaptureFixture[str]):
    expected = found_by_hand("student")
    for ending in ("json", "csv"):
        Path(f"found.{ending}").unlink(missing_ok=True)
        predict.main(["student.safetensors", "0.png", "1.png", f"out=found.{ending}", "top=2"])
    images = json.loads(Path("found.json").read_text())
    assert [image["image"] for image in images] == ["0.png", "1.png"]
    for image, boxes in zip(images, expected[:2], strict=True):
        found = [[*box["box"], box["score"], box["label"]] for box in image["boxes"]]
        np.testing.assert_allclose(found, boxes, atol=1e-3)
        assert all(box["name"] == BOX_CLASSES[box["label"]] for box in image["boxes"])
    with Path("found.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(len(image["boxes"]) for image in images)
    assert {row["name"] for row in rows} <= set(BOX_CLASSES)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * (3 + 2 * 2)  # two of each image are printed
    assert lines[1].split() == ["image", "class", "score", "left", "top", "right", "bottom"]


def test_what_makes_no_sense_for_boxes_is_refused_in_one_line(place: Path):
    for words, message in (
        (["losses.ce={}"], "the loss 'ce' compares images by their logits, and task: detection has those of anchors"),
        (["losses.kd={temperature: 4}"], "the loss 'kd' compares images by their logits"),
        (["teacher.expect=50"], "teacher.expect: the teacher of task: detection finds no boxes while it teaches"),
    ):
        with pytest.raises(RecipeError, match=message) as refused:
            load_recipe(place / "recipe.yaml", words)
        assert "\n" not in str(refused.value)
    for words, message in (
        (["class_map=index"], "class_map: task: detection needs shards with the network's own classes; remove it"),
        (["real_labels=real.json"], "real_labels: the images of task: detection have boxes; remove it"),
    ):
        with pytest.raises(RecipeError, match=message):
            evaluate.main(["recipe.yaml", "weights=student.safetensors", "speed=no", "out=no.json", *words])
