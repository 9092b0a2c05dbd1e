"""``shards/prepare_folder.py``: class folders of one's own become shards, by ImageNet's preparation."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from pictures import encode, jpeg, pixels, write_folders

from shards.manifest import read_manifest
from shards.prepare_folder import main
from shards.prepare_imagenet import main as prepare_imagenet
from shards.read import SplitReader
from shards.verify import verify

ONE = ("--jobs", "1")
CLASSES = ["blue sky", "Äpfel", "桜"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder for each class with ten images, one of them a PNG."""
    write_folders(tmp_path, "source", CLASSES, 9)
    for label, name in enumerate(CLASSES):
        (tmp_path / "source" / name / "a picture.v2.png").write_bytes(encode(pixels(label), "PNG"))
    return tmp_path / "source"


def labels_of(folder: Path, split: str) -> list[int]:
    return SplitReader(folder, split).labels_by_id().tolist()


def test_class_folders_of_any_names_are_split_by_a_share_of_every_class(source: Path, tmp_path: Path):
    assert main([str(source), str(tmp_path / "out"), "--val-share", "0.2", *ONE]) == 0
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.tool, manifest.classes) == ("prepare_folder", tuple(CLASSES))
    assert [labels_of(tmp_path / "out", split).count(1) for split in ("train", "val")] == [8, 2]
    assert len(labels_of(tmp_path / "out", "train")) == 24
    assert verify(tmp_path / "out", 1) == []


def test_the_seed_chooses_the_validation_images(source: Path, tmp_path: Path):
    digests = set()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        main([str(source), str(tmp_path / name), "--val-share", "0.2", "--seed", str(seed), *ONE])
        digests.add(read_manifest(tmp_path / name).splits["val"].samples_sha256)
    assert len(digests) == 2


def test_a_split_that_exists_is_kept_and_its_shards_are_those_of_imagenets_preparation(tmp_path: Path, contents):
    write_folders(tmp_path / "source", "train", CLASSES, 4)
    write_folders(tmp_path / "source", "validation", CLASSES, 2)
    for command, name in ((main, "one"), (prepare_imagenet, "other")):
        assert command([str(tmp_path / "source"), str(tmp_path / name), *ONE]) == 0
    one, other = read_manifest(tmp_path / "one"), read_manifest(tmp_path / "other")
    assert replace(one, tool="prepare_imagenet") == other
    assert len(labels_of(tmp_path / "one", "val")) == 6
    tars = [
        {name: data for name, data in contents(tmp_path / each).items() if name != "manifest.json"}
        for each in ("one", "other")
    ]
    assert tars[0] == tars[1]


def test_a_folder_without_classes_is_one_line_and_two(tmp_path: Path, run):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "1.jpg").write_bytes(jpeg(1))
    done = run("prepare_folder.py", tmp_path / "source", tmp_path / "out")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_its_help_is_not_about_imagenet(run):
    done = run("prepare_folder.py", "--help")
    assert "folder of class folders" in done.stdout
    assert "ImageNet" not in done.stdout


def test_a_file_name_that_is_not_utf8_is_written_and_such_a_class_is_refused_before_any_work(
    source: Path, tmp_path: Path
):
    Path(os.fsdecode(os.fsencode(source / "桜") + b"/caf\xe9.jpg")).write_bytes(b"")
    assert main([str(source), str(tmp_path / "out"), *ONE]) == 0
    assert [each.path for each in read_manifest(tmp_path / "out").splits["train"].left_out] == [
        r"train/桜/caf\udce9.jpg"
    ]
    (source / "桜").rename(os.fsdecode(os.fsencode(source) + b"/caf\xe9"))
    with pytest.raises(ValueError, match=r"the class caf\\udce9 has a name that is not UTF-8 text: rename its folder"):
        main([str(source), str(tmp_path / "other"), *ONE])
    assert not (tmp_path / "other").exists()


def test_more_classes_than_a_label_has_digits_for_are_refused_before_any_work(tmp_path: Path):
    for number in range(10_001):
        (tmp_path / "source" / f"{number:05d}").mkdir(parents=True)
        (tmp_path / "source" / f"{number:05d}" / "a.jpg").touch()
    with pytest.raises(ValueError, match=r"there are 10,001 classes, but 10,000 are the most"):
        main([str(tmp_path / "source"), str(tmp_path / "out"), "--dry-run"])
