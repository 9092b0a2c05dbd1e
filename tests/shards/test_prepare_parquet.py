"""``shards/prepare_parquet.py``: Hugging Face's image files become shards."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_parquet import CLASS_LABELS, FILES, NAMES, features, images, write_parquet, write_table
from pictures import decode, encode, jpeg, pixels

from shards.manifest import read_manifest
from shards.prepare_parquet import main
from shards.read import SplitReader
from shards.verify import verify

ONE = ("--jobs", "1")
DRAWN = images([jpeg(0), jpeg(1)])


def prepare(source: Path, *options: object, name: str = "out") -> Path:
    destination = source.parent / name
    assert main([str(source), str(destination), *ONE, *map(str, options)]) == 0
    return destination


def images_by_id(folder: Path, split: str = "train") -> list[bytes]:
    reader = SplitReader(folder, split)
    order = np.argsort(reader.samples["id"])
    return [bytes(view) for view in reader.bytes(order)]


def test_ids_follow_files_and_rows_and_jpegs_keep_their_bytes(tmp_path: Path):
    folder = prepare(write_parquet(tmp_path / "source"), "--samples-per-shard", 6)
    assert images_by_id(folder) == [jpeg(n) for n in range(26)]
    assert images_by_id(folder, "val") == [jpeg(n) for n in FILES["validation-00000-of-00001.parquet"]]
    assert SplitReader(folder, "train").labels_by_id().tolist() == [n % 3 for n in range(26)]
    manifest = read_manifest(folder)
    assert (manifest.tool, manifest.classes, manifest.image) == ("prepare_parquet", NAMES, "jpg")
    assert verify(folder, 1) == []


def test_the_number_of_processes_changes_no_byte_and_no_other_file_remains(tmp_path: Path, run, contents):
    source = write_parquet(tmp_path / "source")
    for jobs in (1, 2):
        done = run("prepare_parquet.py", source, tmp_path / f"out{jobs}", "--jobs", jobs, "--samples-per-shard", 6)
        assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out1") == contents(tmp_path / "out2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out1", "out2", "source"]


def test_running_again_keeps_finished_shards(tmp_path: Path, contents):
    source = write_parquet(tmp_path / "source")
    folder = prepare(source, "--samples-per-shard", 6)
    before = contents(folder)
    (folder / "train-000001.tar").unlink()
    kept = (folder / "train-000000.tar").stat().st_ino
    prepare(source, "--samples-per-shard", 6)
    assert contents(folder) == before
    assert (folder / "train-000000.tar").stat().st_ino == kept


def test_a_png_becomes_a_jpeg_and_a_row_without_an_image_is_left_out(tmp_path: Path):
    png = encode(pixels(3), "PNG")
    columns = {"image": [*images([jpeg(0), png, None]), None], "label": [0, 1, 2, 0]}
    write_table(tmp_path / "source/a.parquet", columns, CLASS_LABELS)
    folder = prepare(tmp_path / "source")
    kept, made = images_by_id(folder)
    assert kept == jpeg(0)
    assert np.abs(decode(made).astype(int) - pixels(3)).mean() < 4
    left_out = read_manifest(folder).splits["train"].left_out
    assert [(each.id, each.path) for each in left_out] == [
        (2, "train/a.parquet/000000002"),
        (3, "train/a.parquet/000000003"),
    ]


@pytest.mark.parametrize(
    ("columns", "metadata", "options", "labels", "classes"),
    [
        ({"img": DRAWN, "label": [2, 0]}, None, (), [2, 0], "012"),
        ({"image": [jpeg(0), jpeg(1)], "label": ["bee", "ant"]}, None, (), [1, 0], ["ant", "bee"]),
        ({"image": [jpeg(0), jpeg(1)], "label": ["10", "2"]}, None, (), [10, 2], [str(n) for n in range(11)]),
        ({"image": [jpeg(0), jpeg(1)], "label": ["10", "x"]}, None, (), [0, 1], ["10", "x"]),
        (
            {"image": DRAWN, "fine": [1, 0], "coarse": [0, 0]},
            features(
                image={"_type": "Image"},
                fine={"_type": "ClassLabel", "names": ["a", "b"]},
                coarse={"_type": "ClassLabel", "names": ["c"]},
            ),
            ("--label-column", "fine"),
            [1, 0],
            "ab",
        ),
        ({"mask": DRAWN, "photo": DRAWN, "label": [0, 1]}, None, ("--image-column", "photo"), [0, 1], "01"),
    ],
)
def test_columns_are_found_or_chosen(tmp_path: Path, columns, metadata, options, labels, classes):
    write_table(tmp_path / "source/a.parquet", columns, metadata)
    folder = prepare(tmp_path / "source", *options)
    assert SplitReader(folder, "train").labels_by_id().tolist() == labels
    assert read_manifest(folder).classes == tuple(classes)


def test_a_list_of_classes_orders_the_names_of_the_metadata_and_exchanges_none(tmp_path: Path):
    names = features(image={"_type": "Image"}, label={"_type": "ClassLabel", "names": ["ant", "bee"]})
    write_table(tmp_path / "source/a.parquet", {"image": DRAWN, "label": [0, 1]}, names)
    (tmp_path / "list").write_text("cat\nbee\nant\n")
    folder = prepare(tmp_path / "source", "--classes", tmp_path / "list")
    assert read_manifest(folder).classes == ("cat", "bee", "ant")
    assert SplitReader(folder, "train").labels_by_id().tolist() == [2, 1]
    (tmp_path / "list").write_text("wasp\nant\n")
    with pytest.raises(
        ValueError, match=r"metadata has the class bee, which is missing from the list .*: add it there"
    ):
        prepare(tmp_path / "source", "--classes", tmp_path / "list", name="other")


def test_a_share_of_every_class_becomes_the_validation_split(tmp_path: Path):
    columns = {"image": images([jpeg(n) for n in range(20)]), "label": [n % 2 for n in range(20)]}
    write_table(tmp_path / "source/train.parquet", columns)
    folder = prepare(tmp_path / "source", "--val-share", 0.3)
    labels = {split: SplitReader(folder, split).labels_by_id().tolist() for split in ("train", "val")}
    assert {split: (each.count(0), each.count(1)) for split, each in labels.items()} == {"train": (7, 7), "val": (3, 3)}
    assert sorted(images_by_id(folder) + images_by_id(folder, "val")) == sorted(jpeg(n) for n in range(20))


def test_a_test_split_is_not_read_beside_a_validation_split_and_is_chosen_by_its_name(tmp_path: Path, capsys):
    source = write_parquet(tmp_path / "source")
    write_table(source / "data/test-0.parquet", {"image": DRAWN, "label": [-1, -1]}, CLASS_LABELS)
    assert len(images_by_id(prepare(source), "val")) == 7
    assert "not read: test-0.parquet" in capsys.readouterr().out
    columns = {"image": images([jpeg(50), jpeg(51)]), "label": [1, 2]}
    write_table(source / "data/test-0.parquet", columns, CLASS_LABELS)
    folder = prepare(source, "--train", "train-*", "--val", "test-*", name="other")
    assert images_by_id(folder, "val") == [jpeg(50), jpeg(51)]
    assert len(images_by_id(folder)) == 26


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path, capsys):
    folder = prepare(write_parquet(tmp_path / "source"), "--dry-run")
    assert "train: 26 files" in capsys.readouterr().out
    assert not folder.exists()


WRONG: list[tuple[dict[str, Any], dict[bytes, bytes] | None, tuple[str, ...], str]] = [
    (
        {"text": ["a"], "label": [0]},
        None,
        (),
        r"a\.parquet has no image column; its columns are text \(string\), label \(int64\); name it with --image-col",
    ),
    (
        {"image": DRAWN},
        None,
        (),
        r"has no label column; its columns are image \(struct<.*>\); name it with --label-col",
    ),
    ({"a": DRAWN, "b": DRAWN, "label": [0, 1]}, None, (), r"has several image columns, a, b: choose with --image-col"),
    ({"image": DRAWN, "label": [0, 1]}, None, ("--image-column", "label"), r"--image-column label: .* has no such"),
    ({"image": DRAWN, "label": [0, None]}, None, (), r"a\.parquet: row 1 has no label: remove the row"),
    ({"image": DRAWN, "label": [0, 3]}, CLASS_LABELS, (), r"a\.parquet/000000001 has the label 3, which is not from 0"),
    ({"image": DRAWN, "label": [0, -1]}, CLASS_LABELS, (), r"has the label -1, which is not from 0 to 2"),
]


@pytest.mark.parametrize(("columns", "metadata", "options", "message"), WRONG)
def test_a_file_without_images_or_labels_is_one_line(tmp_path: Path, columns, metadata, options, message):
    write_table(tmp_path / "source/a.parquet", columns, metadata)
    with pytest.raises(ValueError, match=message) as raised:
        main([str(tmp_path / "source"), str(tmp_path / "out"), *ONE, *options])
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_the_command_ends_with_two_and_one_line(tmp_path: Path, run):
    write_table(tmp_path / "source/a.parquet", {"text": ["a"], "label": [0]})
    done = run("prepare_parquet.py", tmp_path / "source", tmp_path / "out")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "has no image column; its columns are text (string), label (int64)" in done.stderr


def test_a_file_that_is_cut_is_one_line(tmp_path: Path):
    path = write_table(tmp_path / "source/a.parquet", {"image": DRAWN, "label": [0, 1]})
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"a\.parquet is not a complete Parquet file \(.*\): download it again"):
        main([str(tmp_path / "source"), str(tmp_path / "out"), *ONE])


def test_files_of_several_data_sets_are_refused(tmp_path: Path):
    write_table(tmp_path / "source/train.parquet", {"image": DRAWN, "label": [0, 1]}, CLASS_LABELS)
    other = features(image={"_type": "Image"}, label={"_type": "ClassLabel", "names": ["x", "y"]})
    write_table(tmp_path / "source/val.parquet", {"image": DRAWN, "label": [0, 1]}, other)
    with pytest.raises(ValueError, match=r"train\.parquet and .*val\.parquet name different classes"):
        main([str(tmp_path / "source"), str(tmp_path / "out"), *ONE])


def test_a_folder_without_such_files_is_one_line(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"contains no \.parquet file: name the folder with train-"):
        main([str(tmp_path), str(tmp_path / "out")])


def test_without_pyarrow_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = write_parquet(tmp_path / "source")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"pyarrow is not installed; pip install pyarrow \(or this project's extra"):
        main([str(source), str(tmp_path / "out")])
