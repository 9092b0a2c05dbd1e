"""``prepare_demo.py``: the same images every time, as many of each class, and a class that shows."""

from __future__ import annotations

import numpy as np
import pytest
from pictures import decode

from shards.drawing import DRAWN_CLASSES, draw_image
from shards.manifest import read_manifest
from shards.prepare_demo import main
from shards.read import SplitReader
from shards.verify import verify

OPTIONS = ("--train", "80", "--val", "40", "--samples-per-shard", "30")


def generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed))


def images(folder, split):
    reader = SplitReader(folder, split)
    order = np.argsort(reader.samples["id"])
    return np.stack([decode(view) for view in reader.bytes(order)])


def test_the_number_of_processes_changes_no_byte_and_the_seed_does(tmp_path, contents, run):
    for name, options in {"one": ("--jobs", 1), "three": ("--jobs", 3), "seed": ("--jobs", 1, "--seed", 1)}.items():
        assert run("prepare_demo.py", tmp_path / name, *OPTIONS, *options).returncode == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    assert not np.array_equal(images(tmp_path / "one", "train"), images(tmp_path / "seed", "train"))


def test_every_class_has_as_many_images_and_no_image_comes_twice(tmp_path):
    assert main([str(tmp_path), *OPTIONS, "--jobs", "1"]) == 0
    assert np.bincount(SplitReader(tmp_path, "train").samples["label"]).tolist() == [4] * 20
    assert np.bincount(SplitReader(tmp_path, "val").samples["label"]).tolist() == [2] * 20
    everything = np.concatenate([images(tmp_path, "train"), images(tmp_path, "val")])
    assert everything.shape == (120, 64, 64, 3)
    assert len(np.unique(everything, axis=0)) == 120
    assert verify(tmp_path, 1) == []


def test_more_images_leave_those_before_as_they_were(tmp_path):
    assert main([str(tmp_path / "few"), "--train", "20", "--val", "20", "--jobs", "1"]) == 0
    assert main([str(tmp_path / "more"), "--train", "60", "--val", "20", "--jobs", "1"]) == 0
    few, more = images(tmp_path / "few", "train"), images(tmp_path / "more", "train")
    np.testing.assert_array_equal(few, more[::3])  # ids go class by class, three images each


def test_there_are_twenty_classes_of_shape_and_texture():
    assert len(set(DRAWN_CLASSES)) == 20
    assert {name.count("-") for name in DRAWN_CLASSES} == {1}


@pytest.mark.parametrize("side", [32, 64, 100])
def test_the_same_draw_differs_between_any_two_classes(side):
    drawn = np.stack([draw_image(name, side, generator(3)) for name in DRAWN_CLASSES]).astype(int)
    assert drawn.shape == (20, side, side, 3)
    difference = abs(drawn[:, None] - drawn[None]).mean((2, 3, 4))
    assert (difference + 100 * np.eye(20)).min() > 1


def test_on_a_complete_folder_it_touches_nothing(tmp_path):
    folder = tmp_path / "out"
    assert main([str(folder), *OPTIONS, "--jobs", "1"]) == 0
    times = {path: path.stat().st_mtime_ns for path in (folder, *folder.iterdir())}
    assert main([str(folder), *OPTIONS, "--jobs", "1"]) == 0
    assert {path: path.stat().st_mtime_ns for path in (folder, *folder.iterdir())} == times
    assert read_manifest(folder).transform == {"size": 64, "quality": 92}
