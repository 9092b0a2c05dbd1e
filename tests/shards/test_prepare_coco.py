"""``prepare_coco.py``: every box of COCO's files comes through, and what is wrong with them is one line."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import encode, pixels

from shards.manifest import read_manifest
from shards.prepare_coco import main
from shards.read import SplitReader
from shards.verify import verify

WIDTH, HEIGHT = 20, 16
CATEGORIES = [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}, {"id": 90, "name": "toothbrush"}]
LABELS = {1: 0, 18: 1, 90: 2}
Content = dict[str, Any]


def an_object(image: int, category: int, bbox: list[float], **more: object) -> Content:
    return {"id": 1, "image_id": image, "category_id": category, "bbox": bbox, "iscrowd": 0, **more}


def annotations(split: str) -> Content:
    """Return a file of annotations of three images, the second of which has no box, and the third only a crowd."""
    first = {"train": 7, "val": 100}[split]
    images = [
        {"id": number, "file_name": f"{number:012d}.jpg", "width": WIDTH, "height": HEIGHT, "license": 3}
        for number in (first + 2, first, first + 1)
    ]
    objects = [
        an_object(first, 18, [1.5, 2.25, 7.0, 5.0], area=20.5, segmentation=[[1.0, 2.0]]),
        an_object(first, 90, [12, 3, 30, 4.5], area=99.0),
        an_object(first + 2, 1, [0, 0, 10, 10], area=70.0, iscrowd=1, segmentation={"counts": [1], "size": [1, 1]}),
        an_object(first, 1, [25, 3, 4, 4], area=16.0),
        an_object(first, 1, [3, 3, 0, 4], area=0.0),
        an_object(first, 1, [10, 10, 5, 4]),
    ]
    return {"info": {"year": 2017}, "images": images, "annotations": objects, "categories": CATEGORIES}


BOXES = [
    [[1.5, 2.25, 8.5, 7.25, 1, 0, 20.5], [12, 3, 20, 7.5, 2, 0, 99], [10, 10, 15, 14, 0, 0, 20]],
    [],
    [[0, 0, 10, 10, 0, 1, 70]],
]
"""The boxes of the three images, by their numbers."""


def write_coco(source: Path, **changed: Content) -> Path:
    """Write both splits, with other contents of ``changed`` ones."""
    (source / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        content = annotations(split)
        (source / f"{split}2017").mkdir()
        for image in content["images"]:
            (source / f"{split}2017" / image["file_name"]).write_bytes(encode(pixels(image["id"])))
        path = source / f"annotations/instances_{split}2017.json"
        path.write_text(json.dumps(changed.get(split, content)))
    return source


def prepare(source: Path, *more: str) -> Path:
    out = source.parent / "out"
    assert main([str(source), str(out), "--jobs", "1", *more]) == 0
    return out


def boxes_of(out: Path, split: str) -> list[list[list[float]]]:
    reader = SplitReader(out, split)
    return [boxes.tolist() for boxes in reader.boxes(np.argsort(reader.samples["id"]))]


def test_every_box_is_in_its_image_with_area_crowd_and_class(tmp_path, capsys):
    out = prepare(write_coco(tmp_path / "coco"))
    manifest = read_manifest(out)
    assert (manifest.task, manifest.image, manifest.classes) == ("detection", "jpg", ("person", "dog", "toothbrush"))
    assert boxes_of(out, "train") == boxes_of(out, "val") == BOXES
    for split in ("train", "val"):
        reader = SplitReader(out, split)
        order = np.argsort(reader.samples["id"])
        files = sorted((tmp_path / "coco" / f"{split}2017").iterdir())
        assert [bytes(image) for image in reader.bytes(order)] == [file.read_bytes() for file in files]
    told = "boxes in 3 images, 1 without a box; 1 clipped to their image, 2 dropped outside of it or empty"
    printed = capsys.readouterr().out
    assert f"train: 4 {told}" in printed
    assert f"val: 4 {told}" in printed
    assert verify(out, 1) == []


def test_zips_and_any_number_of_processes_give_the_same_bytes(tmp_path, contents, run):
    source = write_coco(tmp_path / "coco")
    whole = contents(prepare(source))
    for name in ("train2017", "val2017"):
        with zipfile.ZipFile(source / f"{name}.zip", "w") as archive:
            for file in (source / name).iterdir():
                archive.write(file, f"{name}/{file.name}")
                file.unlink()
        (source / name).rmdir()
    other = run("prepare_coco.py", source, tmp_path / "other", "--jobs", 2)
    assert other.returncode == 0, other.stderr
    assert contents(tmp_path / "other") == whole


def test_training_images_without_a_box_are_left_out_if_asked(tmp_path, capsys):
    out = prepare(write_coco(tmp_path / "coco"), "--skip-empty")
    assert boxes_of(out, "train") == BOXES[:1]
    assert boxes_of(out, "val") == BOXES
    assert "train: 2 images without a box are not used" in capsys.readouterr().out


def test_boxes_shrink_with_their_image(tmp_path):
    out = prepare(write_coco(tmp_path / "coco"), "--resize-short", "12")
    reader = SplitReader(out, "train")
    assert (set(reader.samples["width"]), set(reader.samples["height"])) == ({15}, {12})
    expected = np.array(BOXES[0]) * [0.75, 0.75, 0.75, 0.75, 1, 1, 0.75**2]
    np.testing.assert_allclose(boxes_of(out, "train")[0], expected, rtol=1e-6)
    assert verify(out, 1) == []


def test_one_split_is_enough_and_names_may_be_others(tmp_path, capsys):
    source = write_coco(tmp_path / "coco")
    (source / "images").mkdir()
    (source / "val2017").rename(source / "images/tiny")
    (source / "annotations/instances_val2017.json").rename(source / "annotations/instances_tiny.json")
    assert boxes_of(prepare(source, "--train", "tiny"), "train") == BOXES
    assert "there is no validation split" in capsys.readouterr().out


def test_an_image_of_another_size_than_annotated_is_left_out(tmp_path):
    source = write_coco(tmp_path / "coco")
    (source / "train2017/000000000007.jpg").write_bytes(encode(pixels(7)[:, :-2]))
    out = prepare(source)
    (entry,) = read_manifest(out).splits["train"].left_out
    assert entry.reason == "it is 18×16, but 20×16 in its annotation"
    assert boxes_of(out, "train") == BOXES[1:]


def changed(edit: Callable[[Content], object]) -> Content:
    content = annotations("train")
    edit(content)
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed(lambda file: file.pop("categories")), r"train2017.json: categories: Field required; expected images,"),
        (changed(lambda file: file.update(categories=[])), r"categories: List should have at least 1 item"),
        (changed(lambda file: file.update(categories=[*CATEGORIES, *CATEGORIES])), r"two have the same id or name"),
        (
            changed(lambda file: file["annotations"].append(an_object(7, 2, [1, 1, 2, 2]))),
            r"annotations.6.category_id: no category has the id 2; add it, or take the annotation off",
        ),
        (
            changed(lambda file: file["annotations"].append(an_object(8888, 1, [1, 1, 2, 2]))),
            r"annotations.6.image_id: no image has the id 8888; add it, or take the annotation off",
        ),
        (
            changed(lambda file: file["annotations"].append(an_object(7, 1, [1, float("nan"), 2, 2]))),
            r"annotations.6.bbox.1: Input should be a finite number",
        ),
        (
            changed(lambda file: file["annotations"].append(an_object(7, 1, [1, 1, 2, 2], area=float("nan")))),
            r"annotations.6.area: Input should be a finite number",
        ),
        (
            changed(lambda file: file["annotations"].append(an_object(7, 1, [1, 1, 2]))),
            r"annotations.6.bbox.3: Field required",
        ),
        (
            changed(lambda file: file["images"].append(file["images"][0] | {"id": 77, "file_name": "none.jpg"})),
            r"train2017 has no image none.jpg, which annotations name: add it, or take it off them",
        ),
        (
            changed(lambda file: file["images"].append(file["images"][0] | {"id": 77})),
            r"images: two have the same id or file_name; give each its own",
        ),
        (
            changed(lambda file: file["images"][0].update(file_name="../val2017/000000000100.jpg")),
            r"'../val2017/000000000100.jpg' is outside of the folder of images",
        ),
        (
            changed(lambda file: file.update(categories=[*CATEGORIES, {"id": 91, "name": "hair brush"}])),
            r"instances_val2017.json: its categories differ from those of training",
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(tmp_path, content, message):
    source = write_coco(tmp_path / "coco", train=content)
    with pytest.raises(ValueError, match=message) as refused:
        main([str(source), str(tmp_path / "out"), "--jobs", "1"])
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_what_is_missing_is_one_line(tmp_path):
    source = write_coco(tmp_path / "coco")
    arguments = [str(source), str(tmp_path / "out"), "--jobs", "1"]
    with pytest.raises(FileNotFoundError, match=r"--val small: there is no .*annotations/instances_small.json"):
        main([*arguments, "--val", "small"])
    (source / "val2017").rename(source / "elsewhere")
    with pytest.raises(
        FileNotFoundError, match=r"has no images of val2017: neither the folder val2017 nor val2017.zip"
    ):
        main(arguments)
    (source / "val2017.zip").write_bytes(b"PK, but not all of it")
    with pytest.raises(ValueError, match=r"val2017.zip is not a complete zip .*: download it again"):
        main(arguments)
    with pytest.raises(FileNotFoundError, match=r"has neither annotations/instances_train2017.json nor instances_val"):
        main([str(tmp_path), *arguments[1:]])
