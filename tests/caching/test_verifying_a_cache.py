"""``cache_teacher.py --verify`` catches what is not as it was written, and answers that are not the teacher's."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import RecipeError
from pipeline.teachers.cache import block_hasher

Command = Callable[..., None]
VERIFY = ("--verify", "all.yaml", "teacher.cache=cache", "sample=24")


def assert_caught(run_cache: Command, capsys: pytest.CaptureFixture[str], *told: str) -> None:
    with pytest.raises(SystemExit) as end:
        run_cache(*VERIFY)
    assert end.value.code == 1
    said = capsys.readouterr().out
    assert all(part in said for part in told), said


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def test_a_cache_as_it_was_written_holds(copied: Path, run_cache: Command, capsys: pytest.CaptureFixture[str]):
    run_cache(*VERIFY)
    told = capsys.readouterr().out
    assert "2 views of logits, stage1.preact" in told
    assert "every byte is as it was written" in told
    assert "logits: largest difference 0, " in told  # this machine and this company of images: the very same bits
    assert "24 images" in told


@pytest.mark.parametrize("at", [0, 8, 11, 30, 60, 90])
def test_a_flipped_bit_of_a_files_head_is_caught(
    at: int, copied: Path, run_cache: Command, capsys: pytest.CaptureFixture[str]
):
    flip(copied / "view-01.logits.npy", at)
    assert_caught(run_cache, capsys, "view-01.logits.npy ")


@pytest.mark.parametrize("at", [200, 1000, 2000])
def test_a_flipped_bit_is_caught_with_its_rows(
    at: int, copied: Path, run_cache: Command, capsys: pytest.CaptureFixture[str]
):
    flip(copied / "view-01.logits.npy", at)
    row = (at - 128) // 40 // 24 * 24  # of 20 numbers each, behind 128 bytes of header
    assert_caught(run_cache, capsys, f"view-01.logits.npy: rows {row} to {min(row + 23, 59)} do not match their digest")


def test_a_truncated_file_is_caught(copied: Path, run_cache: Command, capsys: pytest.CaptureFixture[str]):
    file = copied / "view-00.stage3.npy"
    file.write_bytes(file.read_bytes()[:-1000])
    assert_caught(run_cache, capsys, "view-00.stage3.npy cannot be read")


def test_a_missing_file_is_caught(copied: Path, run_cache: Command, capsys: pytest.CaptureFixture[str]):
    (copied / "view-00.stage3.npy").unlink()
    assert_caught(run_cache, capsys, "view-00.stage3.npy is missing")


@pytest.mark.parametrize("with_digests", [False, True])
def test_a_swapped_view_is_caught(
    with_digests: bool, copied: Path, run_cache: Command, capsys: pytest.CaptureFixture[str]
):
    for ending in ("logits.npy", "logits.sha256.npy")[: 1 + with_digests]:
        one, other = copied / f"view-00.{ending}", copied / f"view-01.{ending}"
        shutil.move(one, copied / "aside")
        shutil.move(other, one)
        shutil.move(copied / "aside", other)
    assert_caught(run_cache, capsys, "view-00.logits.npy: rows 0", "view-01.logits.npy: rows 0")


def test_a_block_that_was_not_written_is_caught(copied: Path, run_cache: Command, capsys: pytest.CaptureFixture[str]):
    file = copied / "view-01.stage3.sha256.npy"
    digests = np.load(file)
    digests[2] = 0
    np.save(file, digests)
    assert_caught(run_cache, capsys, "view 1 of stage3 is written to 67%")


def test_a_spoilt_encoder_is_caught(place: Path, run_cache: Command, capsys: pytest.CaptureFixture[str]):
    run_cache("all.yaml", "teacher.cache=cache", "encode={last: 4}")
    run_cache(*VERIFY)
    (place / "cache" / "stage3.encoder.safetensors").write_bytes(b"another")
    capsys.readouterr()
    assert_caught(run_cache, capsys, "stage3.encoder.safetensors is missing or does not match")


def test_answers_that_are_no_numbers_are_caught(copied: Path, run_cache: Command, capsys: pytest.CaptureFixture[str]):
    """Somebody's file whose digests fit."""
    for view in range(2):
        rows = np.load(copied / f"view-{view:02d}.logits.npy")
        rows[:] = np.nan
        np.save(copied / f"view-{view:02d}.logits.npy", rows)
        digests = np.load(copied / f"view-{view:02d}.logits.sha256.npy")
        for block, digest in enumerate(digests):
            found = block_hasher(view, "logits", block)
            found.update(rows[24 * block : 24 * block + 24].tobytes())
            digest[:] = np.frombuffer(found.digest(), np.uint8)
        np.save(copied / f"view-{view:02d}.logits.sha256.npy", digests)
    assert_caught(run_cache, capsys, "every byte is as it was written", "logits: error above the tolerance")


def test_answers_that_are_not_the_teachers_are_caught(
    copied: Path, run_cache: Command, capsys: pytest.CaptureFixture[str]
):
    """Whole files whose digests fit: only the teacher itself can tell."""
    header = copied / "cache.json"
    shutil.rmtree(copied)
    run_cache("all.yaml", "teacher.cache=cache", "data.seed=1")
    header.write_text(header.read_text().replace('"seed": 1', '"seed": 0'))
    capsys.readouterr()
    assert_caught(run_cache, capsys, "every byte is as it was written", "error above the tolerance, 0.01")


def test_somebody_elses_cache_is_data_and_nothing_else(
    copied: Path, run_cache: Command, run_train: Command, capsys: pytest.CaptureFixture[str]
):
    np.save(copied / "view-00.logits.npy", np.array([{"not": "data"}]), allow_pickle=True)
    with pytest.raises(RecipeError, match=r"view-00\.logits\.npy cannot be read .*Python objects"):
        run_train("kd.yaml", "teacher.cache=cache")
    assert_caught(run_cache, capsys, "view-00.logits.npy cannot be read")


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('"stage3": {', '"../stage3": {', r"cache\.json: kinds"),
        ('"version": 1', '"version": 2', r"cache\.json: version"),
        ('"views": 2', '"views": 2, "more": 1', r"cache\.json: more"),
        ('"id_count": 60', '"id_count": 61', r"rows for 61 ids, but the shards have 60"),
        ('"batch": 12', '"batch": 0', r"cache\.json: batch"),
        ('"binding": {', '"binding": [', r"cache\.json: Invalid JSON"),
    ],
)
def test_a_header_that_says_something_else_is_one_line(old: str, new: str, told: str, copied: Path, run_train: Command):
    header = copied / "cache.json"
    header.write_text(header.read_text().replace(old, new, 1))
    with pytest.raises(RecipeError, match=told):
        run_train("kd.yaml", "teacher.cache=cache")
