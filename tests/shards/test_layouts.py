"""The layouts in which people have their images: each is read, says so, and gives the shards of plain class folders."""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pictures import jpeg, tar_of, write_folders, write_splits

from shards.manifest import read_manifest
from shards.prepare_imagenet import main
from shards.read import SplitReader
from shards.verify import main as verify

SHARED = Path(__file__).resolve().parents[3] / "shared/data"
CLASSES = ["n01440764", "n01443537", "n02105855"]
SMALL = ("--jobs", "1", "--samples-per-shard", "4")


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return write_splits(tmp_path / "plain", CLASSES, 4, 2)


def prepare(source: Path, *options: object, name: str = "out") -> Path:
    destination = source.parent / f"{name} of {source.name}"
    assert main([str(source), str(destination), *SMALL, *map(str, options)]) == 0
    return destination


def refusal(source: Path, *options: object) -> str:
    with pytest.raises((ValueError, OSError)) as raised:
        main([str(source), str(source.parent / "refused"), *SMALL, *map(str, options)])
    assert "\n" not in str(raised.value)
    assert not (source.parent / "refused").exists()
    return str(raised.value)


def val_files(plain: Path) -> list[Path]:
    return sorted(plain.glob("val/*/*"), key=lambda path: path.name)


def kaggle(plain: Path, to: Path) -> Path:
    folder = to / "ILSVRC/Data/CLS-LOC"
    shutil.copytree(plain / "train", folder / "train")
    for split in ("val", "test"):
        (folder / split).mkdir()
        for path in val_files(plain):
            shutil.copy(path, folder / split / path.name)
    rows = [f"{path.stem},{path.parent.name} 1 2 3 4 {path.parent.name} 5 6 7 8" for path in reversed(val_files(plain))]
    (to / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *rows]))
    (to / "LOC_synset_mapping.txt").write_text("n01440764 tench, Tinca tinca\n")
    return to


def tiny(plain: Path, to: Path) -> Path:
    for path in plain.glob("train/*/*"):
        (to / "train" / path.parent.name / "images").mkdir(parents=True, exist_ok=True)
        shutil.copy(path, to / "train" / path.parent.name / "images")
        (to / "train" / path.parent.name / f"{path.parent.name}_boxes.txt").write_text("a.JPEG\t1\t2\t3\t4\n")
    for split in ("val", "test"):
        (to / split / "images").mkdir(parents=True)
        for path in val_files(plain):
            shutil.copy(path, to / split / "images")
    rows = [f"{path.name}\t{path.parent.name}\t0\t32\t44\t62\n" for path in val_files(plain)]
    (to / "val/val_annotations.txt").write_text("".join(rows))
    return to


def called(name: str) -> Callable[[Path, Path], Path]:
    def layout(plain: Path, to: Path) -> Path:
        shutil.copytree(plain, to)
        (to / "val").rename(to / name)
        return to

    return layout


@pytest.mark.parametrize(
    ("layout", "told"),
    [
        (kaggle, "ILSVRC/Data/CLS-LOC/val, classes from LOC_val_solution.csv; test/ is not read"),
        (tiny, "val/images, classes from val_annotations.txt; test/ is not read"),
        (called("validation"), "validation, as validation/<class>/<file>"),
        (called("valid"), "valid, as valid/<class>/<file>"),
        (called("test"), "test, as test/<class>/<file>"),
    ],
)
def test_a_layout_gives_the_bytes_of_class_folders_and_says_how_it_was_read(plain, capsys, contents, layout, told):
    source = layout(plain, plain.parent / "other")
    folder = prepare(source)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("val: 6 images of 3 classes in ") and line.endswith(told)]
    assert contents(folder) == contents(prepare(plain))


def test_the_inner_folder_of_kaggles_may_be_named_itself(plain, contents):
    source = kaggle(plain, plain.parent / "other") / "ILSVRC/Data/CLS-LOC"
    assert contents(prepare(source)) == contents(prepare(plain))


def test_images_between_class_and_file_are_said_and_lists_beside_them_are_named(plain, capsys):
    prepare(tiny(plain, plain.parent / "other"))
    said = capsys.readouterr().out
    assert "train, as train/<class>/images/<file>; not read: n01440764_boxes.txt and 2 more" in said


@pytest.mark.parametrize("listed", ["LOC_val_solution.csv", "val/val_annotations.txt"])
def test_a_list_that_came_with_the_images_may_be_given_for_others(plain, contents, listed):
    source = (kaggle if listed.endswith("csv") else tiny)(plain, plain.parent / "other")
    (source / listed).rename(plain.parent / "labels")
    assert contents(prepare(source, "--val-labels", plain.parent / "labels")) == contents(prepare(plain))


def test_images_without_class_folders_and_without_a_list_ask_for_one(plain):
    source = kaggle(plain, plain.parent / "other")
    (source / "LOC_val_solution.csv").unlink()
    assert "pass --val-labels FILE" in refusal(source)
    lines = [f"{path.name} {path.parent.name}" for path in val_files(plain)]
    (plain.parent / "labels").write_text("\n".join(lines))
    prepare(source, "--val-labels", plain.parent / "labels")


def classes_only(plain: Path) -> Path:
    return (plain / "train").rename(plain.parent / "classes")


def test_class_folders_without_a_split_are_for_training_and_it_is_said_that_there_is_no_validation(plain, capsys):
    folder = prepare(classes_only(plain))
    assert "there is no validation split" in capsys.readouterr().out
    assert set(read_manifest(folder).splits) == {"train"}
    assert verify([str(folder), "--jobs", "1"]) == 0
    assert "there is no validation split" in capsys.readouterr().out


@pytest.mark.parametrize("with_train", [False, True])
def test_a_share_of_every_class_is_set_aside(plain, capsys, with_train):
    write_folders(plain, "train", CLASSES, 20)
    (plain / "train/lonely").mkdir()
    (plain / "train/lonely/1.JPEG").write_bytes(jpeg(1))
    shutil.rmtree(plain / "val")
    source = plain if with_train else classes_only(plain)
    folder = prepare(source, "--val-share", 0.1)
    assert "val: 6 images of these, 0.1 of every class (seed 0)" in capsys.readouterr().out
    counts = {split: np.bincount(SplitReader(folder, split).labels_by_id()).tolist() for split in ("train", "val")}
    assert counts == {"train": [1, 18, 18, 18], "val": [0, 2, 2, 2]}
    images = [bytes(view) for split in counts for view in _views(folder, split)]
    assert sorted(images) == sorted(path.read_bytes() for path in source.rglob("*.JPEG"))
    assert verify([str(folder), "--jobs", "1"]) == 0


def _views(folder: Path, split: str) -> list[np.ndarray]:
    reader = SplitReader(folder, split)
    return reader.bytes(np.arange(len(reader.samples)))


def test_the_seed_chooses_what_is_set_aside_and_another_share_is_another_set(plain, contents):
    source = classes_only(plain)
    one, same = (prepare(source, "--val-share", 0.3, name=name) for name in ("one", "same"))
    other = prepare(source, "--val-share", 0.3, "--seed", 1, name="other")
    assert contents(one) == contents(same)
    assert {bytes(view) for view in _views(one, "val")} != {bytes(view) for view in _views(other, "val")}
    with pytest.raises(ValueError, match=r"another plan\.val_share \(0\.3 there, 0\.5 here\)"):
        prepare(source, "--val-share", 0.5, name="one")


def _two_validations(source: Path) -> tuple[object, ...]:
    shutil.copytree(source / "val", source / "validation")
    return ()


def _share_of_a_set_with_splits(source: Path) -> tuple[object, ...]:
    return "--val-share", "0.1"


def _no_share(source: Path) -> tuple[object, ...]:
    return "--val-share", "1"


def _list_that_nothing_needs(source: Path) -> tuple[object, ...]:
    (source / "labels").write_text("a b\n")
    return "--val-labels", source / "labels"


def _half_with_images_within(source: Path) -> tuple[object, ...]:
    (source / "train/n01440764/images").mkdir()
    return ()


def _image_beside_plain_classes(source: Path) -> tuple[object, ...]:
    shutil.rmtree(source / "val")
    (source / "train/n01440764").rename(source / "n01440764")
    shutil.rmtree(source / "train")
    (source / "a.png").write_bytes(b"")
    return ()


def _label_of_an_image_that_is_not_there(source: Path) -> tuple[object, ...]:
    paths = list(source.glob("val/*/*"))
    (source / "labels").write_text("".join(f"{path.name} {path.parent.name}\n" for path in paths))
    for path in paths[1:]:
        path.rename(source / "val" / path.name)
    shutil.rmtree(source / "val/n01440764")
    shutil.rmtree(source / "val/n01443537")
    shutil.rmtree(source / "val/n02105855")
    return "--val-labels", source / "labels"


@pytest.mark.parametrize(
    ("arrange", "message"),
    [
        (_two_validations, "contains both val/ and validation/: move one of them away"),
        (_share_of_a_set_with_splits, "has a validation split already: remove the option"),
        (_no_share, "argument --val-share: invalid share value: '1'"),
        (_list_that_nothing_needs, "no validation images outside of class folders: remove the option"),
        (_half_with_images_within, "is outside of the class folders: move it to"),
        (_image_beside_plain_classes, "a.png is outside of the class folders: move it to"),
        (_label_of_an_image_that_is_not_there, "which labels lists: add it, or list only the existing files"),
    ],
)
def test_what_cannot_be_read_one_way_is_refused(plain, arrange, message):
    assert message in refusal(plain, *arrange(plain))


def test_an_archive_that_is_not_all_of_imagenet_is_said(plain, capsys):
    packed = plain.parent / "packed"
    packed.mkdir()
    inner = {
        f"{wnid}.tar": tar_of({path.name: path.read_bytes() for path in (plain / "train" / wnid).iterdir()})
        for wnid in CLASSES
    }
    (packed / "ILSVRC2012_img_train.tar").write_bytes(tar_of(inner))
    prepare(packed)
    told = "train: this is not the complete ImageNet, which has 1,281,167 images of 1,000 classes"
    assert told in capsys.readouterr().out
    prepare(plain)
    assert "not the complete ImageNet" not in capsys.readouterr().out


@pytest.mark.parametrize("level", ["class", "image"])
def test_a_flipped_bit_in_any_header_of_the_original_archive_is_an_error_with_its_byte(plain, level):
    inner = {f"{wnid}.tar": tar_of({f"{wnid}_{n}.JPEG": jpeg(n) for n in range(3)}) for wnid in CLASSES}
    content = bytearray(tar_of(inner))
    headers = [block for block in range(0, len(content), 512) if content[block + 257 : block + 262] == b"ustar"]
    at = headers[4] if level == "class" else headers[6]
    content[at] ^= 1
    (plain.parent / "packed").mkdir()
    (plain.parent / "packed/ILSVRC2012_img_train.tar").write_bytes(content)
    assert f"ILSVRC2012_img_train.tar is damaged at byte {at:,}" in refusal(plain.parent / "packed")


def test_members_that_are_links_are_read_and_what_is_no_class_or_twice_there_is_refused(plain):
    packed = plain.parent / "packed"
    packed.mkdir()
    inner = tar_of({"n1_0.JPEG": jpeg(0), "n1_1.JPEG": jpeg(1)})
    with tarfile.open(packed / "inner.tar", "w") as tar:
        tar.add(next(plain.glob("train/*/*")), "n2_0.JPEG")
        link = tarfile.TarInfo("n2_1.JPEG")
        link.type, link.linkname = tarfile.LNKTYPE, "n2_0.JPEG"
        tar.addfile(link)
    archive = packed / "ILSVRC2012_img_train.tar"
    archive.write_bytes(tar_of({"n1.tar": inner, "n2.tar": (packed / "inner.tar").read_bytes(), "._n1.tar": b"mac"}))
    images = [bytes(view) for view in _views(prepare(packed), "train")]
    assert sorted(images) == sorted([jpeg(0), jpeg(1), *[next(plain.glob("train/*/*")).read_bytes()] * 2])
    archive.write_bytes(tar_of({"n1.tar": inner, "readme": b""}))
    assert "contains readme, which is not the archive of a class" in refusal(packed)
    archive.write_bytes(tar_of({"n1.tar": inner, "more/n1.tar": inner}))
    assert "contains n1/n1_0.JPEG twice" in refusal(packed)
    archive.write_bytes(tar_of({"n1.tar": tar_of({}), "n2.tar": inner}))
    assert "n1.tar contains no image" in refusal(packed)


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="the real data sets are not beside the checkout")
def test_real_archives_unpacked_are_read_with_a_share_set_aside(tmp_path, capsys):
    with tarfile.open(SHARED / "imagenet-sample-300.tar") as tar:
        tar.extractall(tmp_path / "source", tar.getmembers()[:40], filter="data")
    prepare(tmp_path / "source")
    assert "train: 40 images of 40 classes" in capsys.readouterr().out
