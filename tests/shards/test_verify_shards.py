"""``verify.py`` finds every kind of damage, and calls it by its name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pictures import encode, jpeg, pixels

from shards.manifest import LeftOut, Manifest, Split, read_manifest, write_manifest
from shards.verify import main, verify
from shards.write import ShardWriter, write_samples

Sample = tuple[int, int, bytes, int, int]
GOOD: list[Sample] = [(number, number % 2, jpeg(number), 20, 16) for number in range(8)]


def write(folder: Path, samples: list[Sample], **changes: object) -> Path:
    """Write a folder that agrees with itself, whatever the samples are."""
    folder.mkdir()
    shards, tables = [], []
    for number in range(2):
        with ShardWriter(folder / f"train-{number:06d}.tar", "jpg") as writer:
            for sample in samples[number::2]:
                writer.add(*sample)
            shard, rows = writer.close()
        shards.append(shard)
        tables.append(rows)
    _, sha256 = write_samples(folder, "train", tables)
    split = replace(Split("train", len(samples), 8, tuple(shards), sha256, 20, 16), **changes)
    write_manifest(folder, Manifest("test", "jpg", ("cat", "dog"), splits={"train": split}))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "shards", GOOD)


def test_good_shards_are_well_and_their_histogram_is_printed(folder, capsys):
    assert main([str(folder), "--jobs", "1"]) == 0
    printed = capsys.readouterr().out
    assert "train: 8 images in 2 shards; 2 of 2 classes, 4 to 4 images in a class" in printed
    assert printed.endswith("no problems found\n")


def test_what_is_wrong_is_listed_and_the_exit_code_is_one(folder, run):
    (folder / "train-000000.idx").unlink()
    (folder / "train-000001.tar").unlink()
    done = run("verify.py", folder, "--jobs", 2)
    assert done.returncode == 1
    assert "train-000000.idx is missing" in done.stdout
    assert "train-000001.tar is missing" in done.stdout


def test_no_folder_is_an_error_of_one_line(tmp_path, run):
    done = run("verify.py", tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)


def _flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def _flip_padding(folder: Path) -> None:
    _flip(folder / "train-000000.tar", -1)


def _flip_header(folder: Path) -> None:
    _flip(folder / "train-000000.tar", 0)


def _flip_table(folder: Path) -> None:
    _flip(folder / "train.samples.npy", -1)


def _grow(folder: Path) -> None:
    with (folder / "train-000000.tar").open("ab") as file:
        file.write(bytes(512))


def _cut(folder: Path) -> None:
    path = folder / "train-000001.tar"
    path.write_bytes(path.read_bytes()[:3000])


def _swap_indices(folder: Path) -> None:
    shutil.copy(folder / "train-000000.idx", folder / "train-000001.idx")


def _swap_tars(folder: Path) -> None:
    shutil.copy(folder / "train-000000.tar", folder / "train-000001.tar")


def _lose_table(folder: Path) -> None:
    (folder / "train.samples.npy").unlink()


def _empty_table(folder: Path) -> None:
    (folder / "train.samples.npy").write_bytes(b"")


def _edit_table(column: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        samples = np.load(folder / "train.samples.npy")
        samples[column][3] += 1
        _, sha256 = write_samples(folder, "train", [samples[:4], samples[4:]])
        manifest = read_manifest(folder)
        split = replace(manifest.splits["train"], samples_sha256=sha256)
        write_manifest(folder, replace(manifest, splits={"train": split}))

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_flip_padding, "train-000000.tar has a sha256 that differs"),
        (_flip_header, "train-000000.tar is damaged"),
        (_grow, "train-000000.tar has 19,968 bytes"),
        (_cut, "train-000001.tar is damaged"),
        (_swap_indices, "train-000001.idx does not fit its tar"),
        (_swap_tars, "id 0 is used more than once"),
        (_flip_table, "train.samples.npy has a sha256 that differs"),
        (_lose_table, "train.samples.npy is missing"),
        (_empty_table, "train.samples.npy is not a sample table (EOF"),
        *(
            (_edit_table(name), f"disagree about {name}")
            for name in ("id", "label", "offset", "size", "width", "height")
        ),
    ],
)
def test_damaged_files_are_found(folder, damage, message):
    damage(folder)
    problems = verify(folder, 1)
    assert any(message in problem for problem in problems), problems


def _with(number: int, **changes: object) -> list[Sample]:
    names = ("id", "label", "image", "width", "height")
    samples = [dict(zip(names, sample, strict=True)) for sample in GOOD]
    samples[number].update(changes)
    return [tuple(sample.values()) for sample in samples]  # type: ignore[misc]


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (_with(3, id=5), "id 5 is used more than once"),
        (_with(3, id=5), "1 ids are missing, the first is 3"),
        (_with(3, id=8), "1 ids are not from 0 to 7, the first is 8"),
        (_with(3, label=2), "label 2 is not one of the manifest's 2 classes"),
        (_with(3, width=19), "the image of id 3 is 20×16, not 19×16"),
        (_with(3, image=jpeg(3)[:-60]), "the image of id 3 is unusable: cannot be decoded: image file is truncated"),
        (_with(3, image=encode(pixels(3), "GIF")), "the image of id 3 is unusable: neither a JPEG nor a PNG"),
        (_with(3, image=jpeg(3, 30, 10), width=30, height=10), "the largest sides are not the manifest's"),
    ],
)
def test_what_was_wrong_from_the_start_is_found(tmp_path, samples, message):
    problems = verify(write(tmp_path / "shards", samples), 1)
    assert any(message in problem for problem in problems), problems


def test_a_left_out_file_must_be_a_hole(tmp_path):
    left_out = (LeftOut(3, "train/cat/3.JPEG", "empty"),)
    assert verify(write(tmp_path / "good", [each for each in GOOD if each[0] != 3], left_out=left_out), 1) == []
    assert verify(write(tmp_path / "bad", GOOD, left_out=left_out), 1) == [
        "train: id 3 is in a shard, but according to the manifest it was left out"
    ]


def broken_within(number: int) -> bytes:
    """Return a JPEG whose data end in the middle: decoders fill it up with grey, and do not complain."""
    data = encode(np.random.default_rng(number).integers(0, 256, (64, 64, 3), np.uint8))
    return data[: len(data) // 2].rstrip(b"\xff") + b"\xff\xd9"


def test_jpegs_that_end_in_the_grey_of_broken_data_are_counted_and_are_no_error(tmp_path, capsys):
    dark = encode(np.zeros((64, 64, 3), np.uint8))
    images = {2: broken_within(2), 3: encode(pixels(3, 64, 64)), 5: broken_within(5), 6: dark}
    samples = [(*each[:2], images[each[0]], 64, 64) if each[0] in images else each for each in GOOD]
    assert verify(write(tmp_path / "shards", samples, max_width=64, max_height=64), 1) == []
    told = "train: 2 suspicious images: their last rows are plain grey, as in a broken JPEG: ids 2, 5\n"
    assert told in capsys.readouterr().out
    assert verify(write(tmp_path / "whole", GOOD), 1) == []
    assert "suspicious" not in capsys.readouterr().out
