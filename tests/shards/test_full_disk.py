"""A full disk ends a preparation in one line, and with room again the same command makes the same bytes."""

from __future__ import annotations

import errno
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shards.manifest import UnwritableFile, unwritable

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ("--train", "600", "--val", "8", "--size", "24", "--samples-per-shard", "100")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """``disk("200k")`` is a folder on a disk of that size, the same one every time."""
    folder, mounted = tmp_path / "disk", False
    folder.mkdir()

    def resize(size: str) -> Path:
        nonlocal mounted
        options = f"{'remount,' if mounted else ''}size={size}"
        try:
            done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
        except FileNotFoundError:
            pytest.skip("there is no mount")
        if done.returncode:
            pytest.skip("only root mounts a small disk")
        mounted = True
        return folder

    yield resize
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


def prepare(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "shards" / "prepare_demo.py"), str(folder), *IMAGES, *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("size", ["4k", "300k", "900k"])
def test_it_is_one_line_that_names_the_file_and_the_same_command_goes_on(
    disk: Callable[[str], Path], tmp_path: Path, size: str, jobs: int
):
    folder = disk(size) / "shards"
    done = prepare(folder, "--jobs", str(jobs))
    assert done.returncode == 2
    line, *more = done.stderr.splitlines()
    assert not more
    assert line.startswith(f"error: {folder}/")
    assert ": cannot be written (No space left on device): " in line
    assert line.endswith("; make room there, and run the same command again to continue")
    assert not list(folder.glob("*.tmp"))
    disk("30m")
    assert prepare(folder, "--jobs", "1").returncode == 0
    assert prepare(tmp_path / "elsewhere", "--jobs", "1").returncode == 0
    assert content(folder) == content(tmp_path / "elsewhere")


def test_the_error_comes_whole_out_of_a_worker_process():
    error = unwritable(Path("a.tar"), 0, 4096, OSError(errno.ENOSPC, "No space left on device"))
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, UnwritableFile)
    assert str(again) == str(error)
    assert "its size is not known yet, 4,096 are free there, unless a quota allows less; make room there" in str(error)
