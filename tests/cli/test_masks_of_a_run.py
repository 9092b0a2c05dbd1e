"""What a user does with a trained segmenter: measure it, look at its report, predict masks, export it."""

from __future__ import annotations

import base64
import contextlib
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics.functional.classification as metrics
import yaml
from gloo_ranks import Ranks
from html_page import draw
from masked import PIXEL_CLASSES, draw_masked, write_masked
from masked_runs import IMAGES, SIZE, predicted_masks
from PIL import Image
from safetensors.torch import load_file, save_file
from training_on_ranks import run

from pipeline import evaluate, export, predict
from pipeline.builders.student import student_from_card
from pipeline.errors import AlreadyReported, RecipeError
from pipeline.exporting.formats import FORMATS
from pipeline.exporting.model_card import model_card
from pipeline.exporting.trained import inference
from pipeline.runs.card import read_card
from pipeline.runs.evaluation_file import EvaluationFile, read_evaluation
from pipeline.runs.folder import load_run
from pipeline.tasks._mask_images import class_color, palette
from shards.manifest import read_manifest, write_manifest

RUN, TEACHER = Path("runs/student"), Path("runs/teacher")
WEIGHTS = RUN / "student.safetensors"


@pytest.fixture(autouse=True)
def _in_its_folder(masked_pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(masked_pair)


def evaluated(*words: str, out: str) -> EvaluationFile:
    evaluate.main([str(RUN), "speed=no", f"out={out}", *words])
    return read_evaluation(Path(out))


def read_png(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
        return image


def true_masks() -> list[np.ndarray]:
    return [draw_masked(1000 + number, *SIZE)[1] for number in range(IMAGES)]


def count_pixels(truths: list[np.ndarray], masks: list[np.ndarray]) -> np.ndarray:
    """Return the pixels [K, K] of each class and prediction, in a plain loop."""
    counts = np.zeros((len(PIXEL_CLASSES), len(PIXEL_CLASSES)), int)
    for truth, mask in zip(truths, masks, strict=True):
        for label, predicted in zip(truth.ravel(), mask.ravel(), strict=True):
            if label != 255:
                counts[label, predicted] += 1
    return counts


@pytest.fixture(scope="module")
def evaluation(masked_pair: Path) -> EvaluationFile:
    """The evaluation of the student beside its teacher, in the run's own file."""
    with contextlib.chdir(masked_pair):
        evaluate.main([str(RUN), "speed=no", "agreement=yes"])
        return read_evaluation(RUN / "evaluation.json")


def test_an_evaluation_has_what_a_loop_over_the_pixels_counts(evaluation: EvaluationFile):
    truths, ours, theirs = true_masks(), *(predicted_masks(folder / "student.safetensors") for folder in (RUN, TEACHER))
    assert evaluation.teacher is not None
    for masks, measured in ((ours, evaluation), (theirs, evaluation.teacher)):
        counts, per_class = count_pixels(truths, masks), measured.per_class
        ious = [100 * counts[k, k] / (counts[k].sum() + counts[:, k].sum() - counts[k, k]) for k in range(3)]
        assert per_class is not None
        assert (per_class.samples, per_class.correct) == (tuple(counts.sum(1)), None)
        assert per_class.percent == pytest.approx(ious)
        assert measured.metrics["miou"] == pytest.approx(np.mean(ious))
        assert measured.metrics["pixel_accuracy"] == pytest.approx(100 * counts.trace() / counts.sum())
        target, predicted = (torch.from_numpy(np.stack(each)).long() for each in (truths, masks))
        keys: dict[str, Any] = {"num_classes": 3, "ignore_index": 255}
        assert np.array_equal(metrics.multiclass_confusion_matrix(predicted, target, **keys), counts)
        jaccard_K = metrics.multiclass_jaccard_index(predicted, target, average=None, **keys)
        assert (100 * jaccard_K).tolist() == pytest.approx(ious, rel=1e-5)
    counts = count_pixels(truths, ours)
    assert evaluation.confusion == tuple((a, b, n) for (a, b), n in np.ndenumerate(counts) if n)
    assert (evaluation.samples, evaluation.metrics["ece"], evaluation.reliability) == (IMAGES, None, None)
    same = sum(((a == b) & (t != 255)).sum() for a, b, t in zip(ours, theirs, truths, strict=True))
    assert evaluation.agreement == pytest.approx(100 * same / counts.sum())


def test_the_picture_shows_truth_and_predictions_in_the_colours_of_the_classes(evaluation: EvaluationFile):
    assert evaluation.masks is not None
    assert evaluation.masks.columns == ("image", "truth", "teacher", "student")
    pixels = np.asarray(read_png(RUN / evaluation.masks.file))
    ours, theirs = (predicted_masks(folder / "student.safetensors") for folder in (RUN, TEACHER))
    width, height = SIZE[0] + 4, SIZE[1] + 4
    assert pixels.shape == (4 * height, 4 * width, 3)
    shown = set()
    for number in range(4):
        image, truth = draw_masked(1000 + number, *SIZE)
        expected = [image, *(palette()[mask] for mask in (truth, theirs[number], ours[number]))]
        for column, cell in enumerate(expected):
            top, left = number * height + 2, column * width + 2
            assert np.array_equal(pixels[top : top + SIZE[1], left : left + SIZE[0]], cell)
        shown |= {*truth.ravel(), *ours[number].ravel(), *theirs[number].ravel()} - {255}
    assert set(evaluation.masks.classes) == shown


def test_a_class_that_occurs_nowhere_has_no_iou_and_a_dash_in_the_table(
    evaluation: EvaluationFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    other = write_masked(tmp_path / "other", 2, 3, size=SIZE)
    write_manifest(other, replace(read_manifest(other), classes=(*PIXEL_CLASSES, "unseen")))
    recipe = yaml.safe_load(Path("teacher.yaml").read_text())
    recipe = recipe | {"data": recipe["data"] | {"path": str(other)}, "folder": str(tmp_path / "run")}
    (tmp_path / "more.yaml").write_text(yaml.safe_dump(recipe))
    state = load_file(TEACHER / "student.safetensors")
    for name, value in state.items():
        if value.shape[:1] == (3,) and name.startswith("classifier"):  # the new class is never the largest logit
            state[name] = torch.cat([value, torch.full_like(value[:1], -100.0 if value.ndim == 1 else 0.0)])
    save_file(state, tmp_path / "more.safetensors")
    words = [f"{tmp_path}/more.yaml", f"weights={tmp_path}/more.safetensors", "speed=no", "out=more.json"]
    evaluate.main(words)
    per_class = read_evaluation(Path("more.json")).per_class
    assert per_class is not None
    assert (per_class.samples[3], per_class.percent[3]) == (0, None)
    assert re.search(r"unseen +0.00 +–\n", capsys.readouterr().out)


def evaluate_on_rank(rank: int, world: int, folder: Path, words: list[str]) -> None:
    run(evaluate.main, rank, world, folder, words)


def test_ranks_write_the_file_and_the_picture_of_one_process(masked_pair: Path, several_ranks: Ranks):
    words = [str(RUN), "speed=no", "agreement=yes"]
    evaluate_on_rank(0, 1, masked_pair, [*words, "out=one.json"])
    several_ranks(evaluate_on_rank, masked_pair, [*words, "out=several.json"])
    one, several = (read_evaluation(Path(name)) for name in ("one.json", "several.json"))
    parts = {"masks": {"file"}}
    assert several.model_dump(exclude=parts) == one.model_dump(exclude=parts)
    assert Path("several_masks.png").read_bytes() == Path("one_masks.png").read_bytes()


def test_other_images_of_the_same_classes_are_measured_and_other_classes_refused(tmp_path: Path):
    other = write_masked(tmp_path / "other", 2, 3, size=SIZE)
    found = evaluated(f"data.path={other}", out="other.json")
    assert (found.samples, found.classes) == (3, PIXEL_CLASSES)
    for words, message in (
        (["class_map=index"], "class_map: task: segmentation needs shards with the network's own classes; remove it"),
        (["real_labels=real.json"], "real_labels: the images of task: segmentation have a class for every pixel"),
    ):
        with pytest.raises(RecipeError, match=message):
            evaluate.main([str(RUN), "speed=no", *words])
    write_manifest(other, replace(read_manifest(other), classes=PIXEL_CLASSES[::-1]))
    with pytest.raises(RecipeError, match=r"data.path: the classes of .* are not those of the network; task: seg"):
        evaluated(f"data.path={other}", out="other.json")


def test_the_report_shows_ious_confusion_and_masks(evaluation: EvaluationFile):
    page = draw(RUN)
    assert "Single classes and masks" in page.headings
    for caption in (
        "mIoU on the validation images",
        "IoU of all classes",
        "taken for which class",
        "grey pixels have no",
    ):
        assert caption in page.text.replace("Grey", "grey")
    assert page.tags.count("img") == 1
    (picture,) = page.outside
    kind, _, content = picture.partition(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(content) == (RUN / "evaluation_masks.png").read_bytes()
    text = Path("report.html").read_text()
    assert all(class_color(number) in text for number in evaluation.masks.classes)  # type: ignore[union-attr]
    assert page.tags.count("svg") == page.tags.count("figure")


def test_a_report_of_two_runs_compares_them_and_names_the_command_for_masks(evaluation: EvaluationFile, tmp_path: Path):
    page = draw(TEACHER, RUN)
    assert "mIoU, last epoch, %" in page.text
    for name in ("evaluation.json", "evaluation_masks.png"):
        (RUN / name).rename(tmp_path / name)
    page = draw(RUN)
    assert "Masks and single classes are shown once the run is evaluated" in page.text
    assert "img" not in page.tags
    shutil.copy(tmp_path / "evaluation.json", RUN)
    assert "img" not in draw(RUN).tags  # the picture alone is gone
    shutil.copy(tmp_path / "evaluation_masks.png", RUN)


def write_images(folder: Path) -> Path:
    """Write the validation images as files, and a larger one below them."""
    (folder / "below").mkdir(parents=True)
    for number in range(IMAGES):
        Image.fromarray(draw_masked(1000 + number, *SIZE)[0]).save(folder / f"{number}.png")
    Image.fromarray(draw_masked(7, 101, 33)[0]).save(folder / "below" / "large.jpg")
    return folder


def test_predicted_masks_are_those_that_evaluate_counted(
    evaluation: EvaluationFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    images, out = write_images(tmp_path / "images"), tmp_path / "new" / "masks"
    predict.main([str(WEIGHTS), str(images), f"out={out}", "batch=2"])
    files = [read_png(out / f"{number}.png") for number in range(IMAGES)]
    assert {file.mode for file in files} == {"P"}
    counts = count_pixels(true_masks(), [np.asarray(file) for file in files])
    assert evaluation.confusion == tuple((a, b, n) for (a, b), n in np.ndenumerate(counts) if n)
    assert np.array_equal(np.asarray(files[0].convert("RGB")), palette()[np.asarray(files[0])])
    assert read_png(out / "below" / "large.png").size == (101, 33)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["image", "class", "%", "of", "pixels"]
    assert sum(str(images) in line for line in lines) == IMAGES + 1
    assert sum(float(line.split()[-1]) for line in lines[3:]) == pytest.approx(100 * (IMAGES + 1), abs=0.2)


def test_a_photograph_that_its_exif_rotates_gets_the_mask_of_what_people_see(
    evaluation: EvaluationFile, tmp_path: Path
):
    stored = Image.fromarray(draw_masked(7, 48, 40)[0])
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    stored.save(tmp_path / "photo.png", exif=exif)
    stored.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "upright.png")
    predict.main([str(WEIGHTS), str(tmp_path / "photo.png"), str(tmp_path / "upright.png"), f"out={tmp_path / 'out'}"])
    photo, upright = (read_png(tmp_path / "out" / name) for name in ("photo.png", "upright.png"))
    assert photo.size == upright.size == (40, 48)
    assert np.array_equal(np.asarray(photo), np.asarray(upright))


def test_masks_that_cannot_be_written_are_one_line_and_other_images_are_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    images = write_images(tmp_path / "images")
    shutil.copy(images / "0.png", images / "0.bmp")
    for words, message in (
        ([images, f"out={tmp_path}/masks"], r"0.bmp and \S+/0.png would have the same mask \S+/0.png; rename one"),
        ([images / "1.png", f"out={images}"], "the mask of .* would replace the image"),
        ([images / "1.png", "out=found.json"], "expected a folder, which gets a PNG for each image, got 'found.json'"),
    ):
        with pytest.raises(RecipeError, match=message) as refused:
            predict.main([str(WEIGHTS), *map(str, words)])
        assert "\n" not in str(refused.value)
    (images / "0.bmp").unlink()
    (images / "1.png").write_bytes(b"no image")
    with pytest.raises(AlreadyReported):
        predict.main([str(WEIGHTS), str(images), f"out={tmp_path}/masks"])
    assert f"error: {images}/1.png: is not an image that Pillow knows\n" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "masks").iterdir()} == {"0.png", "2.png", "3.png", "4.png", "below"}


@pytest.mark.parametrize("name", ["onnx", "pt2", "torchscript"])
def test_an_exported_segmenter_takes_any_number_of_images(name: str, capsys: pytest.CaptureFixture[str]):
    export.main([str(RUN), f"format={name}", "fold=yes"])
    assert "the same class of every pixel on 5 of 5 validation images" in capsys.readouterr().out
    network = FORMATS[name].run(RUN / "export" / f"student-{name}.{name}")
    assert network(torch.zeros(3, 3, 40, 48)).shape == (3, 3, 10, 12)
    if name == "onnx":  # its file is for one size, because onnxruntime pools maps of other sizes otherwise than torch
        with pytest.raises(Exception, match="invalid dimensions"):
            network(torch.zeros(1, 3, 72, 40))
        return
    images_BCHW = torch.randn(2, 3, 72, 40, generator=torch.Generator().manual_seed(0))
    model = student_from_card(WEIGHTS, read_card(WEIGHTS))
    torch.testing.assert_close(network(images_BCHW), inference(model)(images_BCHW), rtol=1e-4, atol=1e-4)


def test_a_segmenters_folder_for_a_hub_says_what_its_logits_are():
    export.main([str(RUN), "format=hub"])
    text = (RUN / "export" / "student-hub" / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert (front["pipeline_tag"], front["tags"][0]) == ("image-segmentation", "image-segmentation")
    assert "| mIoU |" in text
    assert "interpolate them to its size" in text
    assert "Classes: 0 ground, 1 box, 2 disc." in text
    with pytest.raises(RecipeError, match="plain_fpn is none of timm's networks"):
        export.main([str(RUN), "format=timm"])


def test_a_model_card_says_that_square_images_of_a_segmenter_are_whole_too():
    card = read_card(WEIGHTS).model_copy(update={"size": 48})
    text = model_card(load_run(RUN, []), WEIGHTS, card, None)
    assert "48 × 48 pixels, whole images, padded below and on the right" in text
    assert "centre" not in text
