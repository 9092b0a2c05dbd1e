"""Shards of images with smaller copies: how they are made, what reads them, and what is found in damaged ones."""

from __future__ import annotations

import csv
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from paired import draw_waves, size_of, write_paired
from pictures import decode, encode

from shards.copies import check_copy, decode_rgb, encode_pair
from shards.documents import DamagedFile
from shards.imresize import reduced_to_bytes
from shards.manifest import read_manifest
from shards.plan import Unusable
from shards.prepare_photographs import PHOTOGRAPHS
from shards.prepare_photographs import main as prepare_photographs
from shards.prepare_super_resolution import main as prepare
from shards.read import SplitReader
from shards.stage import stage_shards
from shards.verify import verify
from shards.write import ShardWriter


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_paired(tmp_path / "shards")


def write_images(folder: Path, count: int, *, first: int = 0) -> Path:
    folder.mkdir(parents=True)
    for number in range(first, first + count):
        (folder / f"{number}.png").write_bytes(encode(draw_waves(number, 41, 35), "PNG"))
    return folder


def test_a_reader_gives_image_and_copy_by_row(folder: Path, tmp_path: Path):
    for reader in (SplitReader(folder, "train"), SplitReader(stage_shards(folder, tmp_path / "local"), "train")):
        rows = np.arange(len(reader.samples))[::-1]
        for row, image, low in zip(rows, reader.bytes(rows), reader.copies(rows), strict=True):
            number = int(reader.samples["id"][row])
            expected = draw_waves(number, *size_of(number))
            assert np.array_equal(decode(image), expected)
            assert np.array_equal(decode(low), reduced_to_bytes(expected, 2))
        assert reader.has_copies
        assert reader.classes_in_use() == {0}


def test_a_tar_has_the_members_that_other_readers_take(folder: Path):
    with tarfile.open(folder / "train-000000.tar") as tar:
        assert tar.getnames()[:5] == [f"00000000.{end}" for end in ("png", "cls", "id.i64", "wh.i32", "low.png")]


def test_the_manifest_has_the_scale_and_another_one_is_refused(folder: Path):
    assert read_manifest(folder).scale == 2
    text = json.loads((folder / "manifest.json").read_text())
    for scale in (5, None, "2"):
        (folder / "manifest.json").write_text(json.dumps({**text, "transform": {"scale": scale}}))
        with pytest.raises(DamagedFile, match=r"transform.scale: expected one of \(2, 3, 4, 8\), got"):
            read_manifest(folder)


def test_shards_without_copies_have_none_to_read(photo_shards: Path):
    reader = SplitReader(photo_shards, "train")
    assert not reader.has_copies
    with pytest.raises(ValueError, match="has no smaller copies: its task is classification"):
        reader.copies(np.arange(2))


def test_whole_images_are_cut_to_multiples_of_the_scale(tmp_path: Path):
    for name in ("DIV2K_train_HR", "DIV2K_valid_HR"):
        write_images(tmp_path / "source" / name, 2)
    for scale in (2, 3, 4):
        out = tmp_path / f"x{scale}"
        assert prepare([str(tmp_path / "source"), str(out), "--scale", str(scale), "--jobs", "1"]) == 0
        reader = SplitReader(out, "val")
        width, height = 41 // scale * scale, 35 // scale * scale
        expected = draw_waves(int(reader.samples["id"][0]), 41, 35)[:height, :width]
        assert np.array_equal(decode(reader.bytes(np.arange(1))[0]), expected)
        assert np.array_equal(decode(reader.copies(np.arange(1))[0]), reduced_to_bytes(expected, scale))
        assert verify(out, 1) == []


@pytest.mark.parametrize("scale", [2, 3])
def test_a_part_has_the_copy_of_the_whole_image_at_the_same_pixels(scale: int):
    image = draw_waves(3, 60, 48)
    whole = reduced_to_bytes(image, scale)
    for part in [(0, 0, 18, 12), (42, 36, 18, 12), (12, 6, 18, 12)]:
        left, top, width, height = part
        pair = encode_pair(image, scale, part)
        assert pair.low
        assert np.array_equal(decode_rgb(pair.data), image[top : top + height, left : left + width])
        low = whole[top // scale : (top + height) // scale, left // scale : (left + width) // scale]
        assert np.array_equal(decode_rgb(pair.low), low)


def test_parts_cover_the_training_images_and_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_images(tmp_path / "source" / "train", 2)
    write_images(tmp_path / "source" / "val", 1)
    options = ["--scale", "2", "--part", "16", "--step", "12", "--jobs", "1"]
    assert prepare([str(tmp_path / "source"), str(tmp_path / "out"), *options]) == 0
    assert "train: 18 parts of 16 × 16 pixels" in capsys.readouterr().out  # 3 × 3 of 40 × 34 pixels
    reader, whole = SplitReader(tmp_path / "out", "train"), SplitReader(tmp_path / "out", "val")
    corners = [decode(image)[0, 0].tolist() for image in reader.bytes(np.argsort(reader.samples["id"]))[:9]]
    expected = [draw_waves(0, 41, 35)[top, left].tolist() for top in (0, 12, 18) for left in (0, 12, 24)]
    assert len(whole.samples) == 1
    assert {tuple(corner) for corner in expected} <= {tuple(corner) for corner in corners}
    assert verify(tmp_path / "out", 1) == []


def test_a_folder_of_images_is_one_split_or_a_share_is_set_aside(tmp_path: Path):
    source = str(write_images(tmp_path / "source", 5))
    assert prepare([source, str(tmp_path / "val"), "--scale", "2", "--split", "val", "--jobs", "1"]) == 0
    assert list(read_manifest(tmp_path / "val").splits) == ["val"]
    assert prepare([source, str(tmp_path / "both"), "--scale", "2", "--val-share", "0.2", "--jobs", "1"]) == 0
    assert [each.samples for each in read_manifest(tmp_path / "both").splits.values()] == [4, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--part", "15", "--step", "12"], "--part 15: expected a multiple of the scale 2"),
        (["--part", "16"], "--part and --step: give both"),
        (["--split", "val"], "has the folder train: remove --split and --val-share"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path: Path, options: list[str], message: str):
    write_images(tmp_path / "source" / "train", 1)
    with pytest.raises(ValueError, match=message):
        prepare([str(tmp_path / "source"), str(tmp_path / "out"), "--scale", "2", *options])


def test_the_photographs_of_the_project_have_an_author_and_a_licence_each(tmp_path: Path):
    assert prepare_photographs([str(tmp_path / "out"), "--scale", "3"]) == 0
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.scale, manifest.splits["train"].samples, manifest.splits["val"].samples) == (3, 8, 4)
    assert verify(tmp_path / "out", 1) == []
    with (PHOTOGRAPHS / "images.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["file"]: row for row in csv.DictReader(file)}
    assert rows.keys() == {path.relative_to(PHOTOGRAPHS).as_posix() for path in PHOTOGRAPHS.rglob("*.png")}
    assert all(row["author"] and "creativecommons.org/licenses/by/" in row["licence"] for row in rows.values())


def test_a_copy_that_is_not_the_image_is_found(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert verify(folder, 1) == []
    assert "8 images with copies 2 times smaller in 2 shards, 1,152 to 1,920 pixels each" in capsys.readouterr().out
    image = draw_waves(0, 36, 32)
    low = reduced_to_bytes(image, 2)
    with pytest.raises(Unusable, match="its copy has other pixels than the image, made smaller"):
        check_copy(image, np.roll(low, 1, axis=1), 2)
    with pytest.raises(Unusable, match="its copy is 18×15, the image 36×32: it must be 2 times smaller"):
        check_copy(image, low[:-1], 2)
    with ShardWriter(folder / "train-000000.tar", "png") as writer:
        pair = encode_pair(image, 2)
        writer.add(0, 0, pair.data, 36, 32, low=encode(np.roll(low, 1, axis=0), "PNG"))
        writer.close()
    assert any("id 0 is unusable: its copy has other pixels" in problem for problem in verify(folder, 1))
