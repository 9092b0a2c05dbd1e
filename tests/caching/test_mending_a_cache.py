"""What is damaged in a cache is noticed when training opens it, marked by ``--verify``, and written again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline import cache_teacher
from pipeline.caching.blocks import _RESERVE
from pipeline.errors import RecipeError
from pipeline.runs.folder import lock_folder
from pipeline.teachers import sample
from pipeline.teachers.cache import Cache
from pipeline.teachers.sample import check_sample

Command = Callable[..., None]
WORDS = ("all.yaml", "teacher.cache=cache", "sample=12")


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != ".lock"}


def flip(file: Path, at: int) -> None:
    damaged = bytearray(file.read_bytes())
    damaged[at] ^= 1
    file.write_bytes(damaged)


def zero(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:128].ljust(file.stat().st_size, b"\0"))


DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a bit of a row": ("view-00.logits.npy", lambda file: flip(file, 1000)),
    "a bit of the last row": ("view-01.logits.npy", lambda file: flip(file, -1)),
    "zeros": ("view-00.logits.npy", zero),
    "a bit of the head": ("view-00.logits.npy", lambda file: flip(file, 60)),
    "a cut file": ("view-00.logits.npy", lambda file: file.write_bytes(file.read_bytes()[:-100])),
    "an empty file": ("view-00.logits.npy", lambda file: file.write_bytes(b"")),
    "a lost file": ("view-00.logits.npy", lambda file: file.unlink()),
    "a bit of a digest": ("view-00.logits.sha256.npy", lambda file: flip(file, -1)),
    "a cut file of digests": ("view-01.logits.sha256.npy", lambda file: file.write_bytes(file.read_bytes()[:-5])),
    "a lost file of digests": ("view-01.logits.sha256.npy", lambda file: file.unlink()),
    "bytes after a file": ("view-01.logits.npy", lambda file: file.write_bytes(file.read_bytes() + b"x")),
    "bytes after a file of digests": (
        "view-00.logits.sha256.npy",
        lambda file: file.write_bytes(file.read_bytes() + bytes(512)),
    ),
    "another view's file": (
        "view-00.logits.npy",
        lambda file: file.write_bytes(file.with_name("view-01.logits.npy").read_bytes()),
    ),
}


@pytest.mark.parametrize(("name", "damage"), DAMAGE.values(), ids=DAMAGE)
def test_training_names_the_file_and_what_the_line_says_mends_it(
    name: str,
    damage: Callable[[Path], object],
    copied: Path,
    written: Path,
    run_cache: Command,
    run_train: Command,
    capsys: pytest.CaptureFixture[str],
):
    damage(copied / name)
    with pytest.raises(RecipeError, match=r"view[- ].*(--verify RECIPE|run the same command again)") as refusal:
        run_train("kd.yaml", "teacher.cache=cache", "epochs=2")
    assert "\n" not in str(refusal.value)
    with pytest.raises(SystemExit) as end:
        run_cache("--verify", *WORDS)
    assert end.value.code == 1
    assert "the same command without --verify writes it (again)" in capsys.readouterr().out
    run_cache(*WORDS)
    assert content(copied) == content(written)
    run_cache("--verify", *WORDS)
    assert "every byte is as it was written" in capsys.readouterr().out


def test_only_what_is_damaged_is_written_again(copied: Path, run_cache: Command, capsys: pytest.CaptureFixture[str]):
    flip(copied / "view-00.logits.npy", 1000)
    before = content(copied)
    with pytest.raises(SystemExit):
        run_cache("--verify", *WORDS)
    after = content(copied)
    assert {name for name in before if before[name] != after[name]} == {"view-00.logits.sha256.npy"}
    digests = np.load(copied / "view-00.logits.sha256.npy")
    assert (digests == 0).all(axis=1).tolist() == [True, False, False]
    capsys.readouterr()
    run_cache(*WORDS)
    assert "cache: 960 bytes to write" in capsys.readouterr().out  # 24 rows of 20 numbers


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: flip(file, -1), lambda file: file.write_bytes(b"")])
def test_a_lost_encoder_is_fitted_again_with_all_that_it_encoded(
    damage: Callable[[Path], object], place: Path, run_cache: Command, run_train: Command
):
    words = ("ddkd.yaml", "teacher.cache=cache", "encode={last: 4}", "block=24")
    run_cache(*words)
    whole = content(place / "cache")
    damage(place / "cache" / "stage3.encoder.safetensors")
    with pytest.raises(
        RecipeError, match=r"stage3\.encoder\.safetensors is missing or does not match .*--verify RECIPE marks"
    ):
        run_train("ddkd.yaml", "teacher.cache=cache", "epochs=1")
    run_cache(*words)
    assert content(place / "cache") == whole
    run_cache("--verify", *words)


def test_a_lost_file_that_nobody_verified_is_written_again(copied: Path, written: Path, run_cache: Command):
    """Its digests are still there: a new file of zeros must not pass for what they are of."""
    (copied / "view-00.logits.npy").unlink()
    run_cache(*WORDS)
    assert content(copied) == content(written)


@pytest.mark.parametrize("damage", [lambda file: file.write_bytes(b"null"), lambda file: flip(file, 5)])
def test_a_damaged_header_is_mended_by_moving_the_folder_away(
    damage: Callable[[Path], object], copied: Path, written: Path, place: Path, run_cache: Command, run_train: Command
):
    damage(copied / "cache.json")
    with pytest.raises(RecipeError, match=r"cache/cache\.json: .*move the folder away and write a new cache"):
        run_train("kd.yaml", "teacher.cache=cache")
    copied.rename(place / "away")
    run_cache(*WORDS, "block=24")
    assert content(copied) == content(written)


def test_a_cache_that_is_being_written_is_not_marked(copied: Path, capsys: pytest.CaptureFixture[str]):
    flip(copied / "view-00.logits.npy", 1000)
    before = content(copied)

    def locked(folder: Path) -> None:
        raise RecipeError(f"{folder}: another process is writing in this folder")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("pipeline.caching.damage.lock_folder", locked)
        told = cache_teacher.mark_and_report(Cache(copied), [])
    assert "nothing is marked there (" in told
    assert "another process is writing" in told
    assert content(copied) == before


def test_no_cache_is_written_over_what_is_there(place: Path, run_cache: Command):
    (place / "mine").mkdir()
    (place / "mine" / "view-00.logits.npy").write_bytes(b"mine")
    with pytest.raises(RecipeError, match=r"mine: holds view-00\.logits\.npy, and not a teacher's cache: nothing is"):
        run_cache("kd.yaml", "teacher.cache=mine")
    assert content(place / "mine") == {"view-00.logits.npy": b"mine"}


def test_what_a_killed_writer_left_is_removed(copied: Path, written: Path, run_cache: Command):
    for name in ("cache.json.77.tmp", "view-00.logits.npy.77.tmp", "view-00.logits.npy.tmp"):
        (copied / name).write_bytes(b"half")
    run_cache(*WORDS)
    assert content(copied) == content(written)


def test_what_is_written_again_takes_no_further_room(copied: Path, run_cache: Command, monkeypatch: pytest.MonkeyPatch):
    lock_folder(copied)
    for file in copied.glob("view-00.*.sha256.npy"):
        file.unlink()
    usage = shutil.disk_usage(copied)
    monkeypatch.setattr("pipeline.caching.blocks.shutil.disk_usage", lambda _: usage._replace(free=_RESERVE))
    run_cache(*WORDS)


# -- the sample -------------------------------------------------------------------------------------------------------


def checked(cache: Cache, monkeypatch: pytest.MonkeyPatch, sampled: int, world: int) -> list[list[tuple]]:
    """Return the blocks that each rank reads of the logits and of a map, of two views."""
    read: list[list[tuple]] = []
    monkeypatch.setattr(Cache, "damaged", lambda _, view, kind, blocks: _note(read[-1], view, kind, blocks))
    monkeypatch.setattr(sample.collectives, "world_size", lambda: world)
    for rank in range(world):
        monkeypatch.setattr(sample.collectives, "rank", lambda rank=rank: rank)
        read.append([])
        check_sample(cache, ["logits", "stage3"], 2, sampled)
    return read


def _note(read: list[tuple], view: int, kind: str, blocks: list[int]) -> list[int]:
    read.extend((view, kind, block) for block in blocks)
    return []


@pytest.mark.parametrize("world", [1, 2, 5])
def test_the_ranks_share_all_blocks_of_a_small_cache(written: Path, world: int, monkeypatch: pytest.MonkeyPatch):
    read = checked(Cache(written), monkeypatch, 2**29, world)
    every = [(view, kind, block) for view in range(2) for kind in ("logits", "stage3") for block in range(3)]
    assert sorted(block for blocks in read for block in blocks) == sorted(every)


@pytest.mark.parametrize("world", [1, 2])
def test_of_a_large_cache_each_rank_reads_a_block_of_every_file_before_it_reads_a_second(
    written: Path, world: int, monkeypatch: pytest.MonkeyPatch
):
    cache = Cache(written)
    turn = 2 * 24 * cache.header.row_bytes(["logits", "stage3"])
    for blocks in checked(cache, monkeypatch, world * turn, world):
        files = [(view, kind) for view, kind, _ in blocks]
        assert sorted(files[:4]) == [(0, "logits"), (0, "stage3"), (1, "logits"), (1, "stage3")]
        assert len(set(blocks)) == len(blocks) < 12


def test_each_rank_reads_a_block_however_large_it_is(written: Path, monkeypatch: pytest.MonkeyPatch):
    assert [len(blocks) for blocks in checked(Cache(written), monkeypatch, 1, 3)] == [1, 1, 1]
