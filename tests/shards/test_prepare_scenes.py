"""``prepare_scenes.py``: the same scenes every time, fitting masks or boxes, and as many figures of each class."""

from __future__ import annotations

import numpy as np
import pytest
from pictures import decode

from shards.drawing import SHAPES
from shards.manifest import read_manifest
from shards.masks import decode_mask
from shards.prepare_scenes import main
from shards.read import SplitReader
from shards.scenes import MOST_FIGURES, SCENE_CLASSES, Scene, boxes_of, draw_scene
from shards.verify import verify

OPTIONS = ("--train", "24", "--val", "10", "--samples-per-shard", "9")


def scene(number: int, side: int = 96) -> Scene:
    return draw_scene(side, np.random.Generator(np.random.Philox(key=number)))


def test_the_number_of_processes_changes_no_byte_and_the_seed_does(tmp_path, contents, run):
    assert run("prepare_scenes.py", tmp_path / "two", *OPTIONS, "--jobs", 2).returncode == 0
    assert main([str(tmp_path / "one"), *OPTIONS, "--jobs", "1"]) == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert main([str(tmp_path / "seed"), *OPTIONS, "--jobs", "1", "--seed", "1"]) == 0
    one, other = (SplitReader(tmp_path / name, "train").masks(np.arange(24)) for name in ("one", "seed"))
    assert all(bytes(mask) != bytes(another) for mask, another in zip(one, other, strict=True))


def test_scenes_are_shards_with_masks_and_none_comes_twice(tmp_path):
    assert main([str(tmp_path), *OPTIONS, "--jobs", "1"]) == 0
    manifest = read_manifest(tmp_path)
    assert (manifest.task, manifest.image, manifest.classes) == ("segmentation", "jpg", SCENE_CLASSES)
    images, masks = [], []
    for split, count in (("train", 24), ("val", 10)):
        reader = SplitReader(tmp_path, split)
        images += [decode(image) for image in reader.bytes(np.arange(count))]
        masks += [decode_mask(bytes(mask)) for mask in reader.masks(np.arange(count))]
    assert np.stack(images).shape == (34, 96, 96, 3)
    assert len(np.unique(images, axis=0)) == len(np.unique(masks, axis=0)) == 34
    assert verify(tmp_path, 1) == []


def test_every_class_is_drawn_about_as_often():
    labels = [figure.label for number in range(400) for figure in scene(number, 24).figures]
    counts = np.bincount(labels, minlength=len(SCENE_CLASSES))
    assert counts[0] == 0
    assert counts[1:].min() / counts[1:].max() > 0.75
    assert 2.3 < len(labels) / 400 < 2.7


@pytest.mark.parametrize("number", range(8))
def test_a_mask_is_what_of_the_figures_is_visible(number):
    drawn = scene(number)
    assert 1 <= len(drawn.figures) <= MOST_FIGURES
    expected = np.zeros((96, 96), np.uint8)
    for figure in drawn.figures:
        assert not (expected[figure.visible] != 0).any()  # no pixel is visible of two figures
        expected[figure.visible] = figure.label
        assert figure.visible.sum() <= figure.pixels
    assert np.array_equal(drawn.mask, expected)


def test_figures_are_brighter_than_the_background_along_the_mask():
    inside, outside = [], []
    for number in range(40):
        drawn = scene(number)
        inside.append(drawn.image[drawn.mask > 0].mean())
        outside.append(drawn.image[drawn.mask == 0].mean())
    assert np.mean(inside) > np.mean(outside) + 60


def test_a_covered_figure_loses_the_pixels_of_those_above():
    covered = [
        (figure.pixels, int(figure.visible.sum()), place == len(drawn.figures) - 1)
        for drawn in map(scene, range(60))
        for place, figure in enumerate(drawn.figures)
    ]
    assert all(visible == pixels for pixels, visible, is_last in covered if is_last)
    assert any(visible < 0.7 * pixels for pixels, visible, _ in covered)


def test_a_box_is_tight_around_what_is_visible_of_a_figure_that_is_not_nearly_hidden():
    hidden = 0
    for drawn in map(scene, range(60)):
        expected = []
        for figure in drawn.figures:
            visible = int(figure.visible.sum())
            if visible < 20 or visible / figure.pixels < 0.3:
                hidden += 1
                continue
            rows, columns = (figure.visible.any(axis=axis).nonzero()[0] for axis in (1, 0))
            edges = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            expected.append([*edges, [*SHAPES].index(SCENE_CLASSES[figure.label]), 0, visible])
        assert boxes_of(drawn).tolist() == expected
    assert hidden


def test_scenes_with_boxes_have_the_images_of_those_with_masks(tmp_path, contents, run):
    options = ("--train", "5", "--val", "3", "--samples-per-shard", "2")
    assert run("prepare_scenes.py", tmp_path / "two", "--boxes", *options, "--jobs", 2).returncode == 0
    for name, more in (("masks", []), ("boxes", ["--boxes"])):
        assert main([str(tmp_path / name), *options, *more, "--jobs", "1"]) == 0
    assert contents(tmp_path / "boxes") == contents(tmp_path / "two")
    manifest = read_manifest(tmp_path / "boxes")
    assert (manifest.task, manifest.classes) == ("detection", SCENE_CLASSES[1:])
    one, other = (SplitReader(tmp_path / name, "train") for name in ("masks", "boxes"))
    rows = np.arange(5)
    assert [bytes(image) for image in one.bytes(rows)] == [bytes(image) for image in other.bytes(rows)]
    for row, boxes in zip(rows, other.boxes(rows), strict=True):
        key = np.array([0, 2 * other.samples["id"][row]], np.uint64)
        drawn = draw_scene(96, np.random.Generator(np.random.Philox(key=key)))
        assert np.array_equal(boxes, boxes_of(drawn))
    assert verify(tmp_path / "boxes", 1) == []


def test_an_interrupted_preparation_of_boxes_goes_on_to_the_same_bytes(tmp_path, contents):
    arguments = [str(tmp_path), "--boxes", "--train", "5", "--val", "2", "--samples-per-shard", "2", "--jobs", "1"]
    assert main(arguments) == 0
    whole = contents(tmp_path)
    for name in ("train.boxes.npy", "val.boxes.offsets.npy", "train-000001.tar"):
        (tmp_path / name).unlink()
    assert main(arguments) == 0
    assert contents(tmp_path) == whole
