"""``shards/stage.py``: a whole copy on the node's own disk, made once, or the shared folder."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest

from shards import stage
from shards.manifest import MANIFEST, read_manifest

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, str(ROOT / "shards" / "stage.py")]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 40 training and 10 validation images, five in all."""
    folder = tmp_path_factory.mktemp("source") / "tiny"
    words = ["--train", "40", "--val", "10", "--size", "16", "--jobs", "1", "--samples-per-shard", "10"]
    command = [sys.executable, str(ROOT / "shards" / "prepare_demo.py"), str(folder), *words]
    subprocess.run(command, check=True, capture_output=True)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_copy_has_every_byte_and_the_identity_of_its_source(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert stage.main([str(source), str(tmp_path / "local")]) == 0
    copy = Path(capsys.readouterr().out.strip())
    assert copy.parent == tmp_path / "local"
    assert contents(copy) == contents(source)
    assert read_manifest(copy).sha256 == read_manifest(source).sha256


def test_processes_of_one_node_copy_once_and_all_print_the_copy(source: Path, tmp_path: Path):
    command = [*COMMAND, str(source), str(tmp_path)]
    several = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    told = {process.communicate(timeout=60) for process in several}
    assert told == {(f"{stage.copy_path(source, tmp_path)}\n", "")}
    manifest = stage.copy_path(source, tmp_path) / MANIFEST
    written = manifest.stat().st_mtime_ns
    subprocess.run(command, check=True, capture_output=True)
    assert manifest.stat().st_mtime_ns == written


def test_looking_copies_nothing_and_finds_only_what_is_whole(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = [str(source), str(tmp_path)]
    stage.main([*words, "--look"])
    assert capsys.readouterr().out == f"{source}\n"
    assert not list(tmp_path.iterdir())
    copy = stage.stage_shards(source, tmp_path)
    stage.main([*words, "--look"])
    assert capsys.readouterr().out == f"{copy}\n"
    next(copy.glob("*.tar")).write_bytes(b"cut")
    stage.main([*words, "--look"])
    assert capsys.readouterr().out == f"{source}\n"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_copy_that_was_stopped_in_the_middle_goes_on_with_what_is_missing(
    source: Path, tmp_path: Path, number: signal.Signals
):
    copy = stage.copy_path(source, tmp_path)
    # One file at a time, and slowly, so that there is a middle.
    slow = "import runpy, sys, time, shards.stage as s; s.STREAMS = 1; real = s._copy\n"
    slow += "s._copy = lambda *a: (real(*a), time.sleep(0.2)); s.run_main(s.main)"
    command = [sys.executable, "-c", slow, str(source), str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and len(list(copy.glob("*.tar"))) < 2:
            time.sleep(0.01)
        process.send_signal(number)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    assert not (copy / MANIFEST).exists()
    (copy / "train-000000.tar.tmp").write_bytes(b"half a file")
    kept = {path.name: path.stat().st_ino for path in copy.glob("*.tar")}
    assert 0 < len(kept) < len(list(source.glob("*.tar")))
    assert stage.stage_shards(source, tmp_path) == copy
    assert contents(copy) == contents(source)
    assert all((copy / name).stat().st_ino == inode for name, inode in kept.items())


def test_without_room_the_shared_folder_is_read_and_one_line_says_so(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(stage._RESERVE))
    assert stage.main([str(source), str(tmp_path)]) == 0
    told = capsys.readouterr()
    assert told.out == f"{source}\n"
    assert told.err.count("\n") == 1
    assert (
        f"not staged, the shards are read from {source}: {tmp_path} has 1.1 GB free and 1.1 GB are needed" in told.err
    )


def test_a_damaged_shard_is_not_passed_off_as_a_copy(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    damaged = shutil.copytree(source, tmp_path / "damaged")
    tar = next(damaged.glob("*.tar"))
    tar.write_bytes(tar.read_bytes()[:-1] + b"x")
    assert stage.main([str(damaged), str(tmp_path / "local")]) == 0
    told = capsys.readouterr()
    assert told.out == f"{damaged}\n"
    assert f"{tar} has a sha256 that differs from the manifest" in told.err
    assert not stage.is_complete(stage.copy_path(damaged, tmp_path / "local"))


def test_a_folder_without_shards_is_an_error(tmp_path: Path):
    done = subprocess.run([*COMMAND, str(tmp_path), str(tmp_path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "manifest.json does not exist" in done.stderr
