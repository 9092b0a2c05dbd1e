"""``shards/prepare_unlabelled.py``: images without labels become shards without classes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from pictures import encode, jpeg, pixels

from shards.manifest import DamagedFile, read_manifest
from shards.prepare_unlabelled import main
from shards.read import SplitReader
from shards.stage import main as stage
from shards.verify import verify

ONE = ("--jobs", "1", "--samples-per-shard", "3")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Five images in two folders, a hidden one, and files that are no images."""
    folder = tmp_path / "source"
    (folder / "deep" / "er").mkdir(parents=True)
    for number, name in enumerate(("b.jpg", "a.JPEG", "deep/c.jpg", "deep/er/d.jpg")):
        (folder / name).write_bytes(jpeg(number))
    (folder / "deep" / "e.png").write_bytes(encode(pixels(4), "PNG"))
    (folder / ".hidden.jpg").write_bytes(jpeg(5))
    (folder / "notes.txt").write_text("no image")
    return folder


def test_the_shards_have_every_image_with_label_minus_one_and_no_classes(source: Path, tmp_path: Path, capsys):
    assert main([str(source), str(tmp_path / "out"), *ONE]) == 0
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.tool, manifest.task, manifest.classes) == ("prepare_unlabelled", "unlabelled", ())
    assert {name: split.samples for name, split in manifest.splits.items()} == {"train": 5}
    reader = SplitReader(tmp_path / "out", "train")
    assert reader.samples["label"].tolist() == [-1] * 5
    by_id = dict(zip(reader.samples["id"].tolist(), reader.bytes(reader.samples["id"].argsort()), strict=True))
    assert sorted(by_id) == list(range(5))  # in the order of the paths
    first = reader.bytes(reader.samples["id"].argsort())[0]
    assert first.tobytes() == (source / "a.JPEG").read_bytes()
    assert verify(tmp_path / "out", 1) == []
    assert "train: 5 images without labels in 2 shards; 0 files left out" in capsys.readouterr().out


def test_a_folder_that_lost_a_shard_gets_the_same_bytes_again(source: Path, tmp_path: Path, contents):
    main([str(source), str(tmp_path / "out"), *ONE])
    before = contents(tmp_path / "out")
    (tmp_path / "out" / "train-000001.tar").unlink()
    main([str(source), str(tmp_path / "out"), *ONE])
    assert contents(tmp_path / "out") == before
    assert stage([str(tmp_path / "out"), str(tmp_path / "staged")]) == 0
    (staged,) = (tmp_path / "staged").glob("shards-*")
    assert verify(staged, 1) == []


def test_a_subset_and_files_that_are_no_images(source: Path, tmp_path: Path):
    (source / "broken.jpg").write_bytes(b"no image")
    assert main([str(source), str(tmp_path / "out"), "--subset", "6", *ONE]) == 0
    split = read_manifest(tmp_path / "out").splits["train"]
    assert (split.samples, [entry.path for entry in split.left_out]) == (5, ["train/broken.jpg"])
    main([str(source), str(tmp_path / "few"), "--subset", "2", *ONE])
    assert read_manifest(tmp_path / "few").splits["train"].samples == 2


def test_what_cannot_be_prepared_is_one_line(tmp_path: Path, run):
    (tmp_path / "empty").mkdir()
    for folder, told in (("empty", "has no images: they end in .jpg, .jpeg, .png"), ("none", "is not a folder")):
        done = run("prepare_unlabelled.py", tmp_path / folder, tmp_path / "out")
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert told in done.stderr


def test_labels_where_there_are_no_classes_are_found(source: Path, tmp_path: Path):
    main([str(source), str(tmp_path / "out"), *ONE])
    shutil.copytree(tmp_path / "out", tmp_path / "spoilt")
    path = tmp_path / "spoilt" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"classes": ["a"]}))
    with pytest.raises(DamagedFile, match="classes: 1 classes, and its task is unlabelled"):
        read_manifest(tmp_path / "spoilt")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"task": "classification"}))
    with pytest.raises(ValueError, match="label of row 0 is -1, but there are 1 classes"):
        SplitReader(tmp_path / "spoilt", "train")
