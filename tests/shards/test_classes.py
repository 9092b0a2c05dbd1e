"""No label moves without a word: which classes there are and how they are numbered."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from pictures import encode, pixels, tar_of, write_splits

from shards.classes import read_classes, without_images
from shards.manifest import read_manifest
from shards.prepare_imagenet import main
from shards.read import SplitReader

CLASSES = ["ant", "bee", "cat", "dog"]
SMALL = ("--jobs", "1", "--samples-per-shard", "4")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_splits(tmp_path / "source", CLASSES, 2, 1)


def prepare(source: Path, *options: object) -> Path:
    assert main([str(source), str(source.parent / "out"), *SMALL, *map(str, options)]) == 0
    return source.parent / "out"


def empty(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()


def _empty_in_both(source: Path) -> None:
    empty(source / "train/bee")
    empty(source / "val/bee")


def _empty_in_train(source: Path) -> None:
    empty(source / "train/bee")


def _hidden_files_alone(source: Path) -> None:
    empty(source / "train/bee")
    (source / "train/bee/.DS_Store").write_bytes(b"x")


def _missing_in_train(source: Path) -> None:
    shutil.rmtree(source / "train/bee")


def _other_names_in_val(source: Path) -> None:
    for label, name in enumerate(CLASSES):
        (source / "val" / name).rename(source / f"val/{label}")


def _numbers_in_a_list(source: Path) -> None:
    paths = sorted(source.glob("val/*/*"))
    (source / "labels").write_text("".join(f"{path.name} {label}\n" for label, path in enumerate(paths)))
    images = {path.name: path.read_bytes() for path in paths}
    shutil.rmtree(source / "val")
    (source / "ILSVRC2012_img_val.tar").write_bytes(tar_of(images))


@pytest.mark.parametrize(
    ("arrange", "message"),
    [
        (_empty_in_both, "train has the class bee, which has no image: add its images, remove its folder, or list all"),
        (_empty_in_train, "train has the class bee, which has no image"),
        (_hidden_files_alone, "train has the class bee, which has no image"),
        (
            _missing_in_train,
            "val has the class bee, which train does not have: add or remove it, or list all classes in",
        ),
        (_other_names_in_val, "val has the class 0 and 3 more, which train does not have: use the class names"),
        (_numbers_in_a_list, "val has the class 0 and 3 more, which train does not have: use the class names"),
    ],
)
def test_what_would_move_labels_is_one_line(source, run, arrange, message):
    arrange(source)
    labels = ("--val-labels", source / "labels") if (source / "labels").exists() else ()
    done = run("prepare_imagenet.py", source, source.parent / "out", *SMALL, *labels)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert message in done.stderr
    assert not (source.parent / "out").exists()


@pytest.mark.parametrize("arrange", [_empty_in_both, _empty_in_train, _missing_in_train])
def test_a_class_that_the_list_names_keeps_its_number_and_it_is_said_that_it_has_no_image(source, capsys, arrange):
    arrange(source)
    (source.parent / "classes").write_text("\n".join(CLASSES))
    folder = prepare(source, "--classes", source.parent / "classes")
    assert read_manifest(folder).classes == tuple(CLASSES)
    assert SplitReader(folder, "train").labels_by_id().tolist() == [0, 0, 2, 2, 3, 3]
    said = capsys.readouterr().out
    assert "train: 1 of 4 classes have no image, the first is bee" in said
    assert ("val: 1 of 4 classes have no image, the first is bee" in said) == (arrange is _empty_in_both)


def test_a_class_without_a_validation_image_is_said(source, capsys):
    empty(source / "val/cat")
    shutil.rmtree(source / "val/dog")
    folder = prepare(source)
    assert "val: 2 of 4 classes have no image, the first is cat" in capsys.readouterr().out
    assert SplitReader(folder, "val").labels_by_id().tolist() == [0, 1]


def test_a_class_of_unusable_files_keeps_its_number_and_is_said(source, capsys):
    for path in (source / "train/bee").iterdir():
        path.write_bytes(encode(pixels(1), "GIF"))
    folder = prepare(source)
    assert "train: 1 of 4 classes have no image, the first is bee" in capsys.readouterr().out
    assert read_manifest(folder).classes == tuple(CLASSES)


@pytest.mark.parametrize(
    ("text", "classes"),
    [
        ("dragon's fly\nant hill\n", ["dragon's fly", "ant hill"]),
        ("ant hill\nant\n", ["ant hill", "ant"]),
        ("n01440764 tench, Tinca tinca\nn01443537\tgoldfish\nn02105855,dog\n", ["n01440764", "n01443537", "n02105855"]),
        ("ant a small animal\n\n  dragon's fly  \n", ["ant", "dragon's fly"]),
        ("\ufeffant\r\nnobody yet\r\n", ["ant", "nobody yet"]),
    ],
)
def test_a_list_of_classes_has_whole_lines_and_may_describe_them(tmp_path, text, classes):
    (tmp_path / "classes").write_text(text, encoding="utf-8")
    found = {"dragon's fly", "ant hill", "ant", "n01440764"}
    assert read_classes(tmp_path / "classes", found) == classes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "contains no class: write one class per line"),
        (b"ant\nbee\nant\n", r"contains a class twice \(ant\)"),
        (b"ant\nant a small animal", r"contains a class twice \(ant\)"),
        (b"\xff\xfea\0", "is not UTF-8 text"),
    ],
)
def test_a_list_that_cannot_be_names_its_file(tmp_path, content, message):
    (tmp_path / "classes").write_bytes(content)
    with pytest.raises(ValueError, match=rf"{tmp_path / 'classes'} {message}"):
        read_classes(tmp_path / "classes", {"ant"})


def test_names_with_spaces_are_classes_from_folder_to_manifest(source):
    (source / "train/bee").rename(source / "train/dragon's fly")
    (source / "val/bee").rename(source / "val/dragon's fly")
    (source.parent / "classes").write_text("dragon's fly\ndog\ncat\nant\n")
    folder = prepare(source, "--classes", source.parent / "classes")
    assert read_manifest(folder).classes == ("dragon's fly", "dog", "cat", "ant")
    assert SplitReader(folder, "train").labels_by_id().tolist() == [3, 3, 2, 2, 1, 1, 0, 0]


def test_all_classes_with_an_image_need_no_word():
    assert without_images({0, 1}, ("a", "b")) == ""
    assert without_images({1}, ("a", "b")) == "1 of 2 classes have no image, the first is a"
