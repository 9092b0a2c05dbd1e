"""Shards whose images have boxes: their members and tables, what reads them, and what is found in damaged ones."""

from __future__ import annotations

import gc
import hashlib
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from boxed import BOX_CLASSES, draw_boxed, write_boxed
from pictures import decode

from shards.boxes import box_offsets_path, boxes_path, decode_boxes, encode_boxes, no_boxes
from shards.manifest import read_manifest
from shards.read import SAMPLE_DTYPE, SplitReader
from shards.stage import stage_shards
from shards.verify import verify


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_boxed(tmp_path / "shards")


def test_a_reader_gives_the_boxes_of_every_image_by_row(folder):
    for split, first in (("train", 0), ("val", 1000)):
        reader = SplitReader(folder, split)
        rows = np.arange(len(reader.samples))[::-1]
        found = reader.boxes(rows)
        for row, image, boxes in zip(rows, reader.bytes(rows), found, strict=True):
            pixels, expected = draw_boxed(first + int(reader.samples["id"][row]))
            assert np.array_equal(decode(image), pixels)
            assert np.array_equal(boxes, expected)
            assert boxes.dtype == np.float32
            assert not boxes.flags.writeable
        assert reader.has_boxes
        assert not reader.has_masks
        assert any(len(boxes) == 0 for boxes in found)
        assert reader.samples.dtype == SAMPLE_DTYPE
        assert reader.samples["label"].tolist() == [0] * len(rows)
        assert set(reader.strata.tolist()) == {0}
        assert reader.classes_in_use() == {int(label) for boxes in found for label in boxes[:, 4]}


def test_a_tar_has_the_members_that_other_readers_take(folder):
    with tarfile.open(folder / "train-000000.tar") as tar:
        names = tar.getnames()
        contents = [tar.extractfile(f"00000002.{end}") for end in ("boxes.f32", "areas.f32")]
        boxes, areas = (np.frombuffer(each.read(), "<f4") for each in contents if each)
    expected = draw_boxed(2)[1]
    assert np.array_equal(boxes.reshape(-1, 6), expected[:, :6])
    assert np.array_equal(areas, expected[:, 6])
    assert names[:6] == [f"00000000.{end}" for end in ("png", "cls", "id.i64", "wh.i32", "boxes.f32", "areas.f32")]


# The library leaves the files to the garbage collector.
@pytest.mark.filterwarnings("ignore:.*unclosed file:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_webdataset_library_reads_image_and_boxes(folder):
    webdataset = pytest.importorskip("webdataset")
    samples = list(webdataset.WebDataset([str(folder / "train-000000.tar")], shardshuffle=False).decode("rgb8"))
    gc.collect()
    assert len(samples) == 5
    for sample in samples:
        pixels, boxes = draw_boxed(int(sample["__key__"]))
        assert np.array_equal(sample["png"], pixels)
        assert np.array_equal(decode_boxes(sample["boxes.f32"], sample["areas.f32"]), boxes)


def test_boxes_that_are_no_rows_of_float32_are_not_written():
    with pytest.raises(ValueError, match=r"expected boxes of float32 \[N, 7\], got float64 \[2, 7\]"):
        encode_boxes(np.zeros((2, 7)))
    with pytest.raises(ValueError, match=r"12 bytes of boxes and 4 bytes of areas are not of the same boxes"):
        decode_boxes(bytes(12), bytes(4))
    assert encode_boxes(no_boxes()) == (b"", b"")
    assert decode_boxes(b"", b"").shape == (0, 7)


def test_the_manifest_names_the_task_and_its_two_tables(folder):
    text = json.loads((folder / "manifest.json").read_text())
    assert (text["task"], text["version"], text["classes"]) == ("detection", 1, list(BOX_CLASSES))
    assert "targets_sha256" not in text["splits"]["train"]
    for key, path in {"boxes_sha256": boxes_path, "box_offsets_sha256": box_offsets_path}.items():
        expected = hashlib.sha256(path(folder, "train").read_bytes()).hexdigest()
        assert text["splits"]["train"][key] == expected
    del text["splits"]["val"]["boxes_sha256"]
    (folder / "manifest.json").write_text(json.dumps(text))
    with pytest.raises(ValueError, match=r"splits.val.boxes_sha256: a split of task: detection has no table of boxes"):
        read_manifest(folder)


def test_images_of_which_none_has_a_box_are_read(tmp_path):
    reader = SplitReader(write_boxed(tmp_path / "empty", train=4, val=0), "train")
    assert [len(boxes) for boxes in reader.boxes(np.array([3, 3]))] == [0, 0]
    edit_boxes(tmp_path / "empty", lambda boxes, offsets: (boxes[:0], offsets * 0))
    reader = SplitReader(tmp_path / "empty", "train")
    assert [boxes.shape for boxes in reader.boxes(np.arange(4))] == [(0, 7)] * 4
    assert reader.classes_in_use() == set()


def test_shards_without_boxes_have_none_to_read(photo_shards):
    reader = SplitReader(photo_shards, "train")
    assert not reader.has_boxes
    with pytest.raises(ValueError, match="has no boxes: its task is classification"):
        reader.boxes(np.arange(2))


def test_a_staged_copy_has_the_boxes(folder, tmp_path):
    copy = SplitReader(stage_shards(folder, tmp_path / "local"), "train")
    rows = np.arange(len(copy.samples))
    pairs = zip(copy.boxes(rows), SplitReader(folder, "train").boxes(rows), strict=True)
    assert all(np.array_equal(one, other) for one, other in pairs)


Edit = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def edit_boxes(folder: Path, edit: Edit) -> None:
    """Change the tables of boxes of ``train``, with their digests in the manifest."""
    paths = {"boxes_sha256": boxes_path(folder, "train"), "box_offsets_sha256": box_offsets_path(folder, "train")}
    changed = edit(*(np.load(path) for path in paths.values()))
    text = json.loads((folder / "manifest.json").read_text())
    for (key, path), table in zip(paths.items(), changed, strict=True):
        path.unlink()  # a table of the same size within one tick of the clock would pass for the old one
        np.save(path, table)
        text["splits"]["train"][key] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(text))


def with_value(column: int, value: float) -> Edit:
    def edit(boxes: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        boxes[2, column] = value
        return boxes, offsets

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (with_value(0, np.nan), r"the box of row 2 is not of finite numbers"),
        (with_value(0, -1), r"the box of row 2 is empty, or not inside of its image"),
        (with_value(2, 65), r"the box of row 2 is empty, or not inside of its image"),
        (with_value(3, 0), r"the box of row 2 is empty, or not inside of its image"),
        (with_value(4, 3), r"the box of row 2 has no class from 0 to 2"),
        (with_value(4, 0.5), r"the box of row 2 has no class from 0 to 2"),
        (with_value(5, 2), r"the box of row 2 has a crowd that is neither 0 nor 1"),
        (with_value(6, -1), r"the box of row 2 has a negative area"),
        (lambda boxes, offsets: (boxes[1:], offsets), r"boxes.npy has \d+ boxes, the table of offsets \d+"),
        (lambda boxes, offsets: (boxes[:, :6], offsets), r"boxes.npy is not a table of boxes"),
        (lambda boxes, offsets: (boxes.astype(np.float64), offsets), r"boxes.npy is not a table of boxes"),
        (lambda boxes, offsets: (boxes, offsets[1:]), r"offsets.npy is not a table of offsets, which begin at 0"),
        (lambda boxes, offsets: (boxes, offsets[:-1]), r"offsets.npy is of 7 images, but 8 in the manifest"),
        (lambda boxes, offsets: (boxes, -offsets), r"offsets.npy is not a table of offsets, which begin at 0"),
    ],
)
def test_tables_that_contradict_their_images_are_refused(folder, edit, message):
    edit_boxes(folder, edit)
    with pytest.raises(ValueError, match=message):
        SplitReader(folder, "train")
    assert any("train" in problem and "box" in problem for problem in verify(folder, 1))


@pytest.mark.parametrize("path", [boxes_path, box_offsets_path])
def test_a_changed_or_lost_table_is_found_before_training(folder, path):
    content = bytearray(path(folder, "train").read_bytes())
    content[-1] ^= 1
    path(folder, "train").write_bytes(content)
    with pytest.raises(ValueError, match=r"npy has a sha256 that differs from the manifest"):
        SplitReader(folder, "train")
    assert any("npy has a sha256 that differs from the manifest" in problem for problem in verify(folder, 1))
    path(folder, "train").unlink()
    with pytest.raises(FileNotFoundError, match=r"npy is missing: copy it again"):
        SplitReader(folder, "train")
    assert verify(folder, 1) == [f"{path(folder, 'train')} is missing"]


def test_verify_compares_the_tables_with_the_tars_and_counts_boxes(folder, capsys):
    assert verify(folder, 1) == []
    rows = np.concatenate([draw_boxed(number)[1] for number in range(8)])
    counts = np.bincount(rows[:, 4].astype(int))
    assert (
        f"train: 8 images in 2 shards, 2 without a box; {len(rows)} boxes, {int(rows[:, 5].sum())} of crowds; "
        f"3 of 3 classes, {counts.min()} to {counts.max()} in each; 0 left out"
    ) in capsys.readouterr().out
    edit_boxes(folder, with_value(6, 17))
    (problem,) = verify(folder, 1)
    assert problem.endswith("train-000000.tar and the tables of boxes disagree")


def test_verify_finds_boxes_that_are_none(tmp_path):
    wrong = draw_boxed(0)[1]
    wrong[0, :6] = (5, 5, 70, 9, np.nan, np.nan)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("boxed.draw_boxed", lambda number, size: (draw_boxed(0)[0], wrong))
        write_boxed(tmp_path / "wrong", train=1, val=0)
    (problem,) = verify(tmp_path / "wrong", 1)
    assert "train-000000.tar: box 0 of id 0 is not of finite numbers" in problem


def test_verify_finds_members_that_do_not_belong_together(folder):
    path = folder / "train-000000.tar"
    content = path.read_bytes()
    size = f"{4 * len(draw_boxed(0)[1]):011o}".encode()
    header = content.index(b"00000000.areas.f32")
    changed = bytearray(content)
    changed[header + 124 : header + 135] = f"{0:011o}".encode()
    assert content[header + 124 : header + 135] == size
    path.write_bytes(changed)
    assert any("train-000000.tar" in problem and "damaged" in problem for problem in verify(folder, 1))
