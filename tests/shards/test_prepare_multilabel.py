"""``shards/prepare_multilabel.py``: images of several classes and their lists become shards with a table of targets."""

from __future__ import annotations

import csv
import hashlib
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from pictures import write_folders
from several_classes import CLASSES, has_classes, write_images

from shards.manifest import read_manifest
from shards.prepare_folder import main as prepare_folder
from shards.prepare_multilabel import main
from shards.read import SplitReader, targets_path
from shards.stage import main as stage
from shards.verify import verify

ONE = ("--jobs", "1")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Twenty training images and seven of validation, in folders, with their lists."""
    write_images(tmp_path, "train", 20, seed=0)
    write_images(tmp_path, "val", 7, seed=1)
    return tmp_path


def prepare(source: Path, out: str, *more: str) -> Path:
    lists = ["--labels", str(source / "train.csv"), "--val-labels", str(source / "val.csv")]
    assert main([str(source / "images"), str(source / out), *lists, "--samples-per-shard", "8", *ONE, *more]) == 0
    return source / out


def targets_by_name(folder: Path, split: str) -> dict[str, list[int]]:
    """Return the classes of each image by the number in its name: ids follow the sorted paths."""
    reader = SplitReader(folder, split)
    assert reader.targets is not None
    names = sorted(f"{split}/{number}.png" for number in range(len(reader.samples)))
    return {names[number]: row.tolist() for number, row in zip(reader.samples["id"], reader.targets, strict=True)}


def test_every_image_has_the_classes_of_its_line(source: Path):
    out = prepare(source, "out")
    manifest = read_manifest(out)
    assert (manifest.task, manifest.classes) == ("multilabel", CLASSES)
    for split, count, seed in (("train", 20, 0), ("val", 7, 1)):
        expected = {f"{split}/{number}.png": has.tolist() for number, has in enumerate(has_classes(count, seed))}
        assert targets_by_name(out, split) == expected
    assert verify(out, 1) == []


def test_names_of_classes_in_one_column_give_the_same_table(source: Path):
    columns = prepare(source, "columns")
    for split in ("train", "val"):
        with (source / f"{split}.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        lines = [f"{row['file']},{' '.join(name for name in CLASSES if row[name] == '1')}" for row in rows]
        (source / f"{split}.csv").write_text("\n".join(["image,tags", *lines, ""]))
    (source / "order.txt").write_text("\n".join(CLASSES))
    names = prepare(source, "names", "--separator", " ", "--classes", str(source / "order.txt"))
    for split in ("train", "val"):
        assert targets_path(names, split).read_bytes() == targets_path(columns, split).read_bytes()
    sorted_names = prepare(source, "sorted", "--separator", " ")
    assert read_manifest(sorted_names).classes == tuple(sorted(CLASSES))


def test_a_tar_holds_the_classes_of_its_images(source: Path):
    out = prepare(source, "out")
    reader = SplitReader(out, "train")
    assert reader.targets is not None
    found = {}
    for path in sorted(out.glob("train-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".labels.u8"):
                    content = tar.extractfile(member)
                    assert content
                    found[int(member.name.partition(".")[0])] = list(content.read())
    assert found == dict(zip(reader.samples["id"].tolist(), reader.targets.tolist(), strict=True))


def test_an_interrupted_preparation_goes_on_to_the_same_bytes(source: Path, contents):
    whole = contents(prepare(source, "whole"))
    part = prepare(source, "part")
    for name in ("train.targets.npy", "train-000001.tar"):
        (part / name).unlink()
    assert contents(prepare(source, "part")) == whole


def test_a_share_of_the_training_images_is_set_aside(source: Path):
    lists = ["--labels", str(source / "train.csv"), "--val-share", "0.25"]
    assert main([str(source / "images"), str(source / "out"), *lists, *ONE]) == 0
    readers = [SplitReader(source / "out", split) for split in ("train", "val")]
    assert [len(reader.samples) for reader in readers] == [15, 5]
    assert verify(source / "out", 1) == []


def test_a_staged_copy_has_the_table(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = prepare(source, "out")
    (tmp_path / "local").mkdir()
    assert stage([str(out), str(tmp_path / "local")]) == 0
    copy = next((tmp_path / "local").glob("shards-*"))
    assert targets_path(copy, "train").read_bytes() == targets_path(out, "train").read_bytes()


def spoil(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_changed_table_is_found_before_training_and_by_verify(source: Path):
    out = prepare(source, "out")
    spoil(targets_path(out, "train"))
    with pytest.raises(ValueError, match=r"train.targets.npy has a sha256 that differs from the manifest"):
        SplitReader(out, "train")
    problems = "\n".join(verify(out, 1))
    assert "train.targets.npy has a sha256 that differs" in problems
    assert "and the table of targets disagree" in problems
    targets_path(out, "train").unlink()
    with pytest.raises(FileNotFoundError, match=r"train.targets.npy is missing: "):
        SplitReader(out, "train")
    assert any("train.targets.npy is missing" in problem for problem in verify(out, 1))


def test_a_table_of_another_shape_is_refused_even_with_its_digest(source: Path):
    out = prepare(source, "out")
    np.save(targets_path(out, "val"), np.full((7, len(CLASSES)), 2, np.uint8))
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["splits"]["val"]["targets_sha256"] = hashlib.sha256(targets_path(out, "val").read_bytes()).hexdigest()
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"val.targets.npy is not 7 rows of 4 zeros and ones"):
        SplitReader(out, "val")


def test_a_manifest_of_several_classes_without_a_table_is_contradictory(source: Path):
    out = prepare(source, "out")
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["splits"]["val"]["targets_sha256"]
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"splits.val.targets_sha256: a split of task: multilabel has no table"):
        read_manifest(out)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,labels\n", r"train.csv: expected a header, such as 'file,labels', and a line for each image"),
        ("file,red,red\ntrain/0.png,0,1\n", r"line 1: two columns have the same name"),
        ("file,red,blue\ntrain/0.png,0\n", r"line 2: expected 3 cells as in the header, got 2"),
        ("file,red,blue\ntrain/0.png,0,2\n", r"line 2: blue: expected 0 or 1, got '2'"),
        ("file,labels\ntrain/0.png,red\ntrain/0.png,blue\n", r"line 3: train/0.png is in the list twice"),
        ("file,labels\ntrain/none.png,red\n", r"there is no image train/none.png in "),
        ("file,labels\n../train.csv,red\n", r"there is no image ../train.csv in "),
        ("file,labels\ntrain/0.png,\n", r"no image has a class; --separator is the text between two names"),
        ("file,labels\nval/0.png,red\n", r"val.csv: val/0.png is a training image, too; validate on other images"),
    ],
)
def test_a_list_that_cannot_be_used_is_one_line(source: Path, text: str, message: str):
    (source / "train.csv").write_text(text)
    with pytest.raises(ValueError, match=message) as refused:
        prepare(source, "out")
    assert "\n" not in str(refused.value)
    assert not (source / "out").exists()


def test_a_class_that_is_not_among_the_listed_ones_is_one_line(source: Path):
    (source / "classes.txt").write_text("red\ngreen\nblue\n")
    with pytest.raises(ValueError, match=r"'yellow' is not one of the 3 classes"):
        prepare(source, "out", "--classes", str(source / "classes.txt"))


def test_shards_of_one_class_have_no_word_of_targets(tmp_path: Path):
    write_folders(tmp_path, "source", ["a", "b"], 3)
    prepare_folder([str(tmp_path / "source"), str(tmp_path / "out"), *ONE])
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert "task" not in manifest
    assert "targets_sha256" not in manifest["splits"]["train"]
    assert SplitReader(tmp_path / "out", "train").targets is None
