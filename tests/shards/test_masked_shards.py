"""Shards whose images have masks: their members and tables, what reads them, and what is found in damaged ones."""

from __future__ import annotations

import gc
import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from masked import PIXEL_CLASSES, draw_masked, write_masked
from pictures import decode, encode

from shards.index import main as index
from shards.manifest import Manifest, Split, read_manifest, write_manifest
from shards.masks import decode_mask, encode_mask
from shards.read import SAMPLE_DTYPE, SplitReader, samples_path
from shards.stage import stage_shards
from shards.verify import verify
from shards.write import ShardWriter, write_samples


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_masked(tmp_path / "shards")


def test_a_reader_gives_the_mask_of_every_image_by_row(folder):
    for split, first in (("train", 0), ("val", 1000)):
        reader = SplitReader(folder, split)
        rows = np.arange(len(reader.samples))[::-1]
        for row, image, mask in zip(rows, reader.bytes(rows), reader.masks(rows), strict=True):
            pixels, expected = draw_masked(first + int(reader.samples["id"][row]))
            assert np.array_equal(decode(image), pixels)
            assert np.array_equal(decode_mask(mask.tobytes()), expected)
            assert mask.dtype == np.uint8
            assert not mask.flags.writeable
        assert reader.has_masks
        assert reader.samples["label"].tolist() == [0] * len(rows)
        assert set(reader.strata.tolist()) == {0}
        assert reader.classes_in_use() == set(range(len(PIXEL_CLASSES)))


def test_a_tar_has_the_members_that_other_readers_take(folder):
    with tarfile.open(folder / "train-000000.tar") as tar:
        names = tar.getnames()
        content = tar.extractfile("00000003.mask.png")
        assert content
        assert np.array_equal(decode(content.read()), draw_masked(3)[1])
    assert names[:5] == [f"00000000.{end}" for end in ("png", "cls", "id.i64", "wh.i32", "mask.png")]


# The library leaves the files to the garbage collector.
@pytest.mark.filterwarnings("ignore:.*unclosed file:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_webdataset_library_reads_image_and_mask(folder):
    webdataset = pytest.importorskip("webdataset")
    samples = list(webdataset.WebDataset([str(folder / "train-000000.tar")], shardshuffle=False).decode("rgb8"))
    gc.collect()
    assert len(samples) == 5
    for sample in samples:
        pixels, mask = draw_masked(int(sample["__key__"]))
        assert np.array_equal(sample["png"], pixels)
        assert np.array_equal(sample["mask.png"][..., 0], mask)


def test_the_manifest_names_the_task_and_no_table_of_targets(folder):
    text = json.loads((folder / "manifest.json").read_text())
    assert (text["task"], text["version"], text["classes"]) == ("segmentation", 1, list(PIXEL_CLASSES))
    assert "targets_sha256" not in text["splits"]["train"]
    assert read_manifest(folder).task == "segmentation"


def test_shards_without_masks_have_none_to_read(photo_shards):
    reader = SplitReader(photo_shards, "train")
    assert reader.samples.dtype == SAMPLE_DTYPE
    assert not reader.has_masks
    with pytest.raises(ValueError, match="has no masks: its task is classification"):
        reader.masks(np.arange(2))


def test_a_staged_copy_has_the_masks(folder, tmp_path):
    copy = SplitReader(stage_shards(folder, tmp_path / "local"), "train")
    rows = np.arange(len(copy.samples))
    pairs = zip(copy.masks(rows), SplitReader(folder, "train").masks(rows), strict=True)
    assert all(np.array_equal(one, other) for one, other in pairs)


def test_more_classes_than_a_byte_can_tell_are_refused(folder):
    text = json.loads((folder / "manifest.json").read_text())
    text["classes"] = [f"class{number}" for number in range(256)]
    (folder / "manifest.json").write_text(json.dumps(text))
    with pytest.raises(ValueError, match=r"manifest.json: classes: 256 classes, but a mask has 255 at most; copy it"):
        read_manifest(folder)


def edit_table(folder: Path, edit: Callable[[np.ndarray], np.ndarray | None]) -> None:
    """Change the sample table of ``train``, with its digest in the manifest."""
    path = samples_path(folder, "train")
    samples = np.load(path)
    changed = edit(samples)
    np.save(path, samples if changed is None else changed)
    text = json.loads((folder / "manifest.json").read_text())
    text["splits"]["train"]["samples_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(text))


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("mask_offset", -1, "mask_offset of row 2 is -1, outside of its tar"),
        ("mask_offset", 10**9, "mask_offset of row 2 is 1000000000, outside of its tar"),
        ("mask_size", 10**9, "mask_size of row 2 is 1000000000, beyond its tar's end"),
    ],
)
def test_a_mask_beyond_its_tar_is_refused_before_it_is_read(folder, column, value, message):
    def edit(samples: np.ndarray) -> None:
        samples[column][2] = value

    edit_table(folder, edit)
    with pytest.raises(ValueError, match=message):
        SplitReader(folder, "train")
    assert any(f"disagree about {column}" in problem for problem in verify(folder, 1))


def test_a_table_without_the_columns_of_masks_is_refused(folder):
    edit_table(folder, lambda samples: samples[list(SAMPLE_DTYPE.names or ())].astype(SAMPLE_DTYPE))
    with pytest.raises(ValueError, match=r"train.samples.npy is not a sample table"):
        SplitReader(folder, "train")


def write_one(folder: Path, mask: bytes, image: str = "png") -> Path:
    """Write a folder of one sample with that mask, which agrees with itself."""
    folder.mkdir()
    with ShardWriter(folder / "train-000000.tar", image) as writer:
        writer.add(0, 0, encode(draw_masked(0)[0], "PNG"), 24, 20, mask=mask)
        shard, rows = writer.close()
    _, sha256 = write_samples(folder, "train", [rows])
    splits = {"train": Split("train", 1, 1, (shard,), sha256, 24, 20)}
    write_manifest(folder, Manifest("test", image, PIXEL_CLASSES, splits=splits, task="segmentation"))
    return folder


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (encode_mask(draw_masked(0)[1])[:50], "its mask cannot be decoded"),
        (encode_mask(draw_masked(0)[1][:, :-1]), "its mask is 23×20, the image 24×20: they must be equal"),
        (encode_mask(np.full((20, 24), 3, np.uint8)), "its mask has the value 3 in 480 pixels: classes are 0–2"),
        (encode(np.zeros((20, 24), np.uint16), "PNG"), "its mask has 16 bits a pixel: expected a grey PNG"),
        (encode(draw_masked(0)[0], "PNG"), "its mask has 3 channels: expected a grey PNG"),
    ],
)
def test_verify_finds_a_mask_that_is_none(tmp_path, mask, message):
    (problem,) = verify(write_one(tmp_path / "one", mask), 1)
    assert "train-000000.tar: the sample of id 0 is unusable: " in problem
    assert message in problem


def test_verify_finds_a_changed_byte_of_a_mask(folder):
    offset = int(SplitReader(folder, "train").samples["mask_offset"][0])
    path = folder / "train-000000.tar"
    content = bytearray(path.read_bytes())
    content[offset + 60] ^= 1
    path.write_bytes(content)
    problems = "\n".join(verify(folder, 1))
    assert "train-000000.tar has a sha256 that differs from the manifest" in problems
    assert "the sample of id 0 is unusable: its mask cannot be decoded" in problems


def test_verify_finds_a_lost_mask(folder):
    path = folder / "train-000000.tar"
    buffer = io.BytesIO()
    with tarfile.open(path) as old, tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as new:
        for member in old:
            if member.name != "00000002.mask.png":
                new.addfile(member, old.extractfile(member))
    path.write_bytes(buffer.getvalue())
    assert any("00000002" in problem and "members" in problem for problem in verify(folder, 1))


def test_verify_prints_how_many_pixels_the_classes_have(folder, capsys):
    assert verify(folder, 1) == []
    masks = np.stack([draw_masked(number)[1] for number in range(8)])
    shares = [100 * (masks == value).mean() for value in (0, 1, 2, 255)]
    told = (
        f"3 of 3 classes, {min(shares[:3]):.3g} to {max(shares[:3]):.3g} % of the pixels in a class, {shares[3]:.3g} %"
    )
    assert f"train: 8 images with masks in 2 shards; {told} ignored; 0 files left out" in capsys.readouterr().out


def test_images_of_two_kinds_lie_in_one_tar_by_their_own_names(tmp_path):
    folder = tmp_path / "both"
    folder.mkdir()
    images = {"png": encode(draw_masked(0)[0], "PNG"), "jpg": encode(draw_masked(1)[0], "JPEG")}
    with ShardWriter(folder / "train-000000.tar", "jpg;png") as writer:
        for number, image in enumerate(images.values()):
            writer.add(number, 0, image, 24, 20, mask=encode_mask(draw_masked(number)[1]))
        shard, rows = writer.close()
    _, sha256 = write_samples(folder, "train", [rows])
    splits = {"train": Split("train", 2, 2, (shard,), sha256, 24, 20)}
    write_manifest(folder, Manifest("test", "jpg;png", PIXEL_CLASSES, splits=splits, task="segmentation"))
    assert verify(folder, 1) == []
    with tarfile.open(folder / "train-000000.tar") as tar:
        assert {"00000000.png", "00000001.jpg"} <= {*tar.getnames()}


def list_in_place(folder: Path, classes: tuple[str, ...], *more: str) -> Path:
    """List the tars of a folder as those of another tool, in a folder beside it."""
    (folder.parent / "classes.txt").write_text("\n".join(classes))
    listed = folder.parent / "listed"
    options = ["--mask-key", "mask.png", "--classes", str(folder.parent / "classes.txt"), "--jobs", "1"]
    assert index([str(folder), "--destination", str(listed), *options, *more]) == 0
    return listed


def test_tars_of_other_tools_with_masks_are_listed_in_place(folder, capsys):
    listed = list_in_place(folder, PIXEL_CLASSES)
    assert "no image" not in capsys.readouterr().out
    manifest = read_manifest(listed)
    assert (manifest.task, manifest.classes) == ("segmentation", PIXEL_CLASSES)
    assert manifest.plan["members"]["mask_key"] == "mask.png"
    for split in ("train", "val"):
        one, other = SplitReader(listed, split), SplitReader(folder, split)
        rows = np.arange(len(other.samples))
        assert [bytes(mask) for mask in one.masks(rows)] == [bytes(mask) for mask in other.masks(rows)]
        assert [bytes(image) for image in one.bytes(rows)] == [bytes(image) for image in other.bytes(rows)]
    assert verify(listed, 1) == []
    assert "train: 8 images with masks in 2 shards; 3 of 3 classes" in capsys.readouterr().out


def test_a_listed_sample_whose_mask_does_not_fit_is_left_out(folder, capsys):
    with pytest.raises(ValueError, match=r"the split 'train' has no usable sample; .* its mask has the value 2 in"):
        list_in_place(folder, PIXEL_CLASSES[:2])
    with pytest.raises(ValueError, match=r"no usable sample; .*: no mask: its members are png, .*, none is seg.png"):
        list_in_place(folder, PIXEL_CLASSES, "--mask-key", "seg.png")
    assert "left out: train-000000.tar/00000000: no mask" in capsys.readouterr().err


def test_options_of_masks_that_contradict_one_another_are_refused(folder):
    with pytest.raises(ValueError, match=r"--mask-key: samples with masks have no labels: remove --label-key"):
        list_in_place(folder, PIXEL_CLASSES, "--label-key", "cls")
    with pytest.raises(ValueError, match=r"--mask-key: .*: name the classes of pixels with --classes FILE"):
        index([str(folder), "--destination", str(folder.parent / "listed"), "--mask-key", "mask.png"])
    with pytest.raises(ValueError, match="there are 256 classes, but 255 are the most"):
        list_in_place(folder, tuple(f"class {number}" for number in range(256)))
