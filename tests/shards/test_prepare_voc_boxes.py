"""``prepare_voc.py --boxes``: annotations in the format of Pascal VOC, and those of BCCD."""

from __future__ import annotations

import tarfile
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from pictures import encode, pixels

from shards.manifest import read_manifest
from shards.prepare_voc import main
from shards.read import SplitReader
from shards.verify import verify

BCCD = Path(__file__).resolve().parents[3] / "shared" / "data" / "bccd.tar"
JOBS = ("--jobs", "1")


def an_object(name: str, *corners: object, more: str = "", part: str = "") -> str:
    inside = "".join(f"<{tag}>{value}</{tag}>" for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), corners))  # noqa: B905
    return f"<object><name>{name}</name>{more}{part}<bndbox>{inside}</bndbox></object>"


HEAD = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
OBJECTS = {
    1: [an_object("dog", 2, 3, 8, 9), an_object("cat", 1, 1, 20, 16, more="<difficult>1</difficult>")],
    2: [an_object("person", "3.5", 4, "10.25", 12, part=HEAD), an_object("dog", 15, 10, 29, 18)],
    3: [],
    4: [an_object("cat", 5, 5, 5, 9), an_object("cat", 5, 5, 6, 9), an_object("cat", 22, 5, 26, 9)],
}
BOXES = {
    1: [[1, 2, 8, 9, 1, 0, 49], [0, 0, 20, 16, 0, 1, 320]],
    2: [[2.5, 3, 10.25, 12, 2, 0, 7.75 * 9], [14, 9, 20, 16, 1, 0, 15 * 9]],
    3: [],
    4: [[4, 4, 6, 9, 0, 0, 10]],
}


def write_voc(source: Path, size: str = "<size><width>20</width><height>16</height></size>") -> Path:
    """Write images 1 and 2 of ``train``, and 3 and 4 of ``val``."""
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (source / folder).mkdir(parents=True)
    for number, objects in OBJECTS.items():
        (source / f"JPEGImages/im_{number}.jpg").write_bytes(encode(pixels(number)))
        text = f"<annotation>{size}{''.join(objects)}</annotation>"
        (source / f"Annotations/im_{number}.xml").write_text(text)
    for name, numbers in {"train": (1, 2), "val": (3, 4)}.items():
        (source / f"ImageSets/Main/{name}.txt").write_text("".join(f"im_{number}\n" for number in numbers))
    return source


def prepare(source: Path, *more: str) -> Path:
    out = source.parent / "out"
    assert main([str(source), str(out), "--boxes", *JOBS, *more]) == 0
    return out


def boxes_of(out: Path, split: str) -> list[list[list[float]]]:
    reader = SplitReader(out, split)
    return [boxes.tolist() for boxes in reader.boxes(np.argsort(reader.samples["id"]))]


@pytest.mark.parametrize(
    "size", ["<size><width>20</width><height>16</height></size>", "<size><width>0</width></size>", ""]
)
def test_corners_are_pixels_from_one_and_difficult_objects_are_crowds(tmp_path, capsys, size):
    out = prepare(write_voc(tmp_path / "voc", size))
    manifest = read_manifest(out)
    assert (manifest.task, manifest.classes) == ("detection", ("cat", "dog", "person"))
    assert boxes_of(out, "train") == [BOXES[1], BOXES[2]]
    assert boxes_of(out, "val") == [BOXES[3], BOXES[4]]
    printed = capsys.readouterr().out
    assert "train: 4 boxes in 2 images, 0 without a box; 1 clipped to their image, 0 dropped" in printed
    assert "val: 1 boxes in 2 images, 1 without a box; 0 clipped to their image, 2 dropped" in printed
    assert verify(out, 1) == []


def test_lists_of_several_folders_are_joined_and_any_number_of_processes_gives_the_same_bytes(tmp_path, contents, run):
    for year in ("VOC2007", "VOC2012"):
        write_voc(tmp_path / "VOCdevkit" / year)
    lists = ["--train", "VOC2007/train", "VOC2012/val", "--val", "VOC2007/val"]
    out = prepare(tmp_path / "VOCdevkit", *lists)
    assert boxes_of(out, "train") == [BOXES[1], BOXES[2], BOXES[3], BOXES[4]]
    assert boxes_of(out, "val") == [BOXES[3], BOXES[4]]
    other = run("prepare_voc.py", tmp_path / "VOCdevkit", tmp_path / "other", "--boxes", *lists, "--jobs", 2)
    assert other.returncode == 0, other.stderr
    assert contents(tmp_path / "other") == contents(out)


def test_a_list_gives_the_classes_their_order(tmp_path):
    (tmp_path / "classes.txt").write_text("person\nbird\ndog\ncat\n")
    out = prepare(write_voc(tmp_path / "VOCdevkit/VOC2012").parent, "--classes", str(tmp_path / "classes.txt"))
    assert read_manifest(out).classes == ("person", "bird", "dog", "cat")
    assert [int(box[4]) for boxes in boxes_of(out, "train") for box in boxes] == [2, 3, 0, 2]


def edit(source: Path, name: str, old: str, new: str) -> None:
    path = source / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("Annotations/im_1.xml", "<xmin>2<", "<xmin>nan<", r"im_1.xml: xmin of dog is 'nan', not a number: correct"),
        ("Annotations/im_1.xml", "<ymax>9<", "<ymax>high<", r"im_1.xml: ymax of dog is 'high', not a number"),
        ("Annotations/im_1.xml", "<ymax>9</ymax>", "", r"im_1.xml: ymax of dog is None, not a number"),
        (
            "Annotations/im_1.xml",
            "<name>dog</name>",
            "",
            r"im_1.xml: an object has no name: give it the name of its class",
        ),
        ("Annotations/im_1.xml", "</annotation>", "", r"im_1.xml is not XML \(.*\): annotate the image again"),
        ("Annotations/im_4.xml", "cat", "cart", r"val has the class cart, which train does not have: add or remove it"),
        ("ImageSets/Main/train.txt", "im_1", "im_7", r"JPEGImages has no image im_7: add it, or take it off the list"),
        ("ImageSets/Main/train.txt", "im_1", "im_2", r"JPEGImages/im_2.jpg is listed twice: take it off one"),
        ("ImageSets/Main/val.txt", "im_3", "im_1", r"im_1.jpg is in the lists of train and val: take it off one"),
    ],
)
def test_an_annotation_that_cannot_be_used_is_one_line(tmp_path, name, old, new, message):
    edit(write_voc(tmp_path / "voc"), name, old, new)
    with pytest.raises(ValueError, match=message) as refused:
        prepare(tmp_path / "voc")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_what_is_missing_or_contradicts_is_one_line(tmp_path):
    source = write_voc(tmp_path / "voc")
    (tmp_path / "classes.txt").write_text("dog\ncat\n")
    with pytest.raises(
        ValueError, match=r"train has the class person, which is missing from the list .*: add it there"
    ):
        prepare(source, "--classes", str(tmp_path / "classes.txt"))
    with pytest.raises(
        FileNotFoundError, match=r"there is no .*ImageSets/Main/test.txt: name a list in ImageSets/Main"
    ):
        prepare(source, "--val", "test")
    with pytest.raises(ValueError, match="--augmented is for images with masks: remove --boxes"):
        prepare(source, "--augmented", str(tmp_path))
    with pytest.raises(ValueError, match="--train is for images with boxes: give --boxes, too"):
        main([str(source), str(tmp_path / "out"), "--train", "train", *JOBS])
    (source / "Annotations/im_3.xml").unlink()
    with pytest.raises(ValueError, match=r"im_3.xml is missing: an image without objects has an annotation without"):
        prepare(source)
    with pytest.raises(FileNotFoundError, match="has no ImageSets/Main: name the folder VOC2012"):
        prepare(tmp_path)


@pytest.mark.shared
def test_real_blood_cells_come_through_with_every_box(tmp_path):
    with tarfile.open(BCCD) as tar:
        tar.extractall(tmp_path, filter="data")
    source = tmp_path / "BCCD"
    for name in ("train", "val"):
        path = source / f"ImageSets/Main/{name}.txt"
        path.write_text("\n".join(path.read_text().split()[::10]))
    out = prepare(source)
    assert read_manifest(out).classes == ("Platelets", "RBC", "WBC")
    for split in ("train", "val"):
        names = sorted((source / f"ImageSets/Main/{split}.txt").read_text().split())
        for name, boxes in zip(names, boxes_of(out, split), strict=True):
            objects = ElementTree.parse(source / f"Annotations/{name}.xml").getroot().findall("object")
            corners = [
                [int(each.findtext(f"bndbox/{tag}") or "") for tag in ("xmin", "ymin", "xmax", "ymax")]
                for each in objects
            ]
            labels = [("Platelets", "RBC", "WBC").index(each.findtext("name") or "") for each in objects]
            expected = [[x - 1, y - 1, right, bottom] for x, y, right, bottom in corners if x < right and y < bottom]
            assert [box[:4] for box in boxes] == np.clip(expected, 0, [640, 480, 640, 480]).tolist()
            assert len(labels) - len(boxes) == sum(x >= right for x, _, right, _ in corners)
    assert verify(out, 1) == []
