"""A preparation that is killed, stopped or damaged, and what the next run makes of it."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pictures import write_folders

from shards.documents import DamagedFile
from shards.prepare_imagenet import main
from shards.verify import verify

ROOT = Path(__file__).resolve().parents[2]

CLASSES = ["n01440764", "n01443537"]
OPTIONS = ("--samples-per-shard", "4")

KILLED_AT_A_CALL = """
import os, runpy, signal, sys
count, call = int(sys.argv[1]), sys.argv[2]
original = getattr(os, call)
def counting(*arguments, **options):
    global count
    count -= 1
    if count == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **options)
setattr(os, call, counting)
sys.argv = sys.argv[3:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source")
    write_folders(source, "train", CLASSES, 9)
    write_folders(source, "val", CLASSES, 2)
    (source / "train/n01440764/empty.JPEG").write_bytes(b"")
    return source


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    assert main([str(source), str(folder), "--jobs", "1", *OPTIONS]) == 0
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_killed_wherever_it_writes_it_ends_in_the_same_bytes(source, undisturbed, tmp_path, contents, call):
    arguments = [str(ROOT / "shards/prepare_imagenet.py"), str(source), str(tmp_path / "out"), "--jobs", "1", *OPTIONS]
    codes = []
    for count in itertools.cycle((1, 3, 6, 8)):
        command = [sys.executable, "-c", KILLED_AT_A_CALL, str(count), call, *arguments]
        codes.append(subprocess.run(command, check=False, capture_output=True).returncode)
        if codes[-1] == 0:
            break
    assert codes == [-signal.SIGKILL] * (len(codes) - 1) + [0]
    assert len(codes) > 4
    assert contents(tmp_path / "out") == undisturbed


def descendants(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [each for child in map(int, children) for each in (child, *descendants(child))]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def start(source: Path, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "shards/prepare_demo.py"), str(folder)]
    options = ["--train", "600", "--val", "40", "--samples-per-shard", "30", "--jobs", "2"]
    return subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_shards(process: subprocess.Popen[str], folder: Path, count: int) -> bool:
    """Wait until some shards are on record; False where the process ended first."""
    journal = folder / "journal.jsonl"
    while process.poll() is None:
        if journal.is_file() and journal.read_bytes().count(b"\n") > count:
            return True
        time.sleep(0.01)
    return False


def test_killed_with_its_workers_busy_it_ends_in_the_same_bytes_and_no_worker_stays(source, tmp_path, contents):
    straight = start(source, tmp_path / "straight")
    assert straight.wait() == 0
    pause = random.Random(0)
    for count in (1, 5, 9):
        process = start(source, tmp_path / "killed")
        assert wait_for_shards(process, tmp_path / "killed", count)
        time.sleep(pause.uniform(0, 0.05))
        workers = descendants(process.pid)
        process.kill()
        process.communicate()
        assert len(workers) >= 2
        while any(map(is_running, workers)):
            time.sleep(0.01)
    process = start(source, tmp_path / "killed")
    process.communicate()
    assert process.returncode == 0
    straight.communicate()
    assert contents(tmp_path / "killed") == contents(tmp_path / "straight")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_ends_it_cleanly(source, tmp_path, number):
    process = start(source, tmp_path / "out")
    assert wait_for_shards(process, tmp_path / "out", 1)
    workers = descendants(process.pid)
    process.send_signal(number)
    _, error = process.communicate()
    assert process.returncode == 128 + number
    assert error == f"stopped by {number.name}\n"
    assert not list((tmp_path / "out").glob("*.tmp"))
    while any(map(is_running, workers)):
        time.sleep(0.01)


def test_finished_shards_are_not_made_again(source, undisturbed, tmp_path):
    folder = tmp_path / "out"
    assert main([str(source), str(folder), "--jobs", "1", *OPTIONS]) == 0
    (folder / "train-000002.tar").unlink()
    times = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.tar")}
    assert main([str(source), str(folder), "--jobs", "1", *OPTIONS]) == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == undisturbed
    changed = {path.name for path in folder.glob("*.tar") if path.stat().st_mtime_ns != times.get(path.name)}
    assert changed == {"train-000002.tar"}


@pytest.mark.parametrize("name", ["train-000001.tar", "train-000001.idx", "train.samples.npy", "manifest.json"])
def test_a_lost_file_comes_back(source, undisturbed, tmp_path, contents, name):
    folder = tmp_path / "out"
    assert main([str(source), str(folder), "--jobs", "1", *OPTIONS]) == 0
    (folder / name).unlink()
    if name == "manifest.json":
        # Without it nothing tells the shards from a stranger's.
        with pytest.raises(ValueError, match="is not empty and contains no shards"):
            main([str(source), str(folder), "--jobs", "1", *OPTIONS])
        return
    assert main([str(source), str(folder), "--jobs", "1", *OPTIONS]) == 0
    assert contents(folder) == undisturbed


def test_on_a_complete_folder_it_touches_nothing(source, tmp_path):
    folder = tmp_path / "out"
    assert main([str(source), str(folder), "--jobs", "1", *OPTIONS]) == 0
    times = {path: path.stat().st_mtime_ns for path in (folder, *folder.iterdir())}
    assert main([str(source), str(folder), "--jobs", "1", *OPTIONS]) == 0
    assert {path: path.stat().st_mtime_ns for path in (folder, *folder.iterdir())} == times


def test_strict_complains_about_what_an_earlier_run_left_out(source, tmp_path):
    folder = tmp_path / "out"
    assert main([str(source), str(folder), "--jobs", "1", *OPTIONS]) == 0
    with pytest.raises(ValueError, match=r"train/n01440764/empty\.JPEG is not a usable image"):
        main([str(source), str(folder), "--jobs", "1", *OPTIONS, "--strict"])


def unfinished(source: Path, folder: Path) -> None:
    assert main([str(source), str(folder), "--jobs", "1", *OPTIONS]) == 0
    manifest = json.loads((folder / "manifest.json").read_text())
    header = json.dumps({**manifest, "splits": {}}, sort_keys=True)
    (folder / "journal.jsonl").write_text(header + "\n")
    (folder / "manifest.json").unlink()


@pytest.mark.parametrize("state", ["finished", "unfinished"])
@pytest.mark.parametrize(
    ("options", "what"),
    [
        (("--seed", "1"), r"another plan\.seed \(0 there, 1 here\)"),
        (("--samples-per-shard", "5"), r"another plan\.samples_per_shard \(4 there, 5 here\)"),
        (("--resize-short", "8"), r"another transform\.resize_short \(null there, 8 here\)"),
        (("--subset", "3"), r"another plan\.images_per_split \(null there, 3 here\)"),
    ],
)
def test_a_folder_of_other_arguments_is_refused(source, tmp_path, state, options, what):
    folder = tmp_path / "out"
    if state == "finished":
        assert main([str(source), str(folder), "--jobs", "1", *OPTIONS]) == 0
    else:
        unfinished(source, folder)
    with pytest.raises(ValueError, match=what):
        main([str(source), str(folder), "--jobs", "1", *OPTIONS, *options])


def test_a_folder_of_another_source_is_refused(source, tmp_path):
    folder = tmp_path / "out"
    assert main([str(source), str(folder), "--jobs", "1", *OPTIONS]) == 0
    write_folders(tmp_path / "other", "train", CLASSES, 8)
    write_folders(tmp_path / "other", "val", CLASSES, 2)
    with pytest.raises(ValueError, match=r"another plan\.listing\.train"):
        main([str(tmp_path / "other"), str(folder), "--jobs", "1", *OPTIONS])


def test_a_torn_or_damaged_journal_line(source, undisturbed, tmp_path, contents):
    folder = tmp_path / "out"
    unfinished(source, folder)
    with (folder / "journal.jsonl").open("a") as file:
        file.write('{"shard": {"url": "train-0000')
    assert main([str(source), str(folder), "--jobs", "1", *OPTIONS]) == 0
    assert contents(folder) == undisturbed
    unfinished(source, tmp_path / "other")
    with (tmp_path / "other/journal.jsonl").open("a") as file:
        file.write("rubbish\n")
    with pytest.raises(
        DamagedFile, match=rf"journal\.jsonl: line 2: .*; delete {tmp_path / 'other'}, and prepare again"
    ):
        main([str(source), str(tmp_path / "other"), "--jobs", "1", *OPTIONS])
    shutil.rmtree(tmp_path / "other")
    assert main([str(source), str(tmp_path / "other"), "--jobs", "1", *OPTIONS]) == 0
    assert contents(tmp_path / "other") == undisturbed


SAID = r"^\S*(journal\.jsonl: line|out was prepared with another|out is not empty and contains no shards)"


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize(
    "line",
    [
        "null",
        "[]",
        "7",
        "[" * 10_000,
        '{"shard": {}, "left_out": []}',
        '{"shard": {"url": "../a.tar", "nsamples": 1, "filesize": 1, "sha256": ""}, "left_out": []}',
        '{"shard": {"url": "a.tar", "nsamples": "1", "filesize": 1, "sha256": ""}, "left_out": []}',
    ],
)
def test_a_journal_of_whole_lines_of_another_shape_is_one_line(source, tmp_path, line, number):
    folder = tmp_path / "out"
    unfinished(source, folder)
    lines = (folder / "journal.jsonl").read_text().splitlines()[: number - 1]
    (folder / "journal.jsonl").write_text("\n".join([*lines, line, ""]))
    with pytest.raises(ValueError, match=SAID) as raised:
        main([str(source), str(folder), "--jobs", "1", *OPTIONS])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("end", ["\n", ""], ids=["a whole line", "a torn line"])
@pytest.mark.parametrize("first", ['{"step": 1, "loss": 2.0}', "[1]", "words", '{"tool": "mine"}'])
def test_a_journal_of_something_else_is_left_as_it_is(source, tmp_path, first, end):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "journal.jsonl").write_text(first + end)
    with pytest.raises(ValueError, match="run is not empty and contains no shards: use a new folder"):
        main([str(source), str(folder), "--jobs", "1", *OPTIONS])
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [("journal.jsonl", first + end)]


@pytest.mark.parametrize("kept", [0, 1, 100, None])
def test_a_preparation_killed_in_its_first_line_goes_on(source, undisturbed, tmp_path, contents, kept):
    folder = tmp_path / "out"
    unfinished(source, folder)
    journal = folder / "journal.jsonl"
    line = journal.read_bytes()[:-1][:kept]
    for path in folder.iterdir():
        path.unlink()
    journal.write_bytes(line)
    assert main([str(source), str(folder), "--jobs", "1", *OPTIONS]) == 0
    assert contents(folder) == undisturbed


def test_two_preparations_do_not_share_a_folder(source, tmp_path):
    process = start(source, tmp_path / "out")
    assert wait_for_shards(process, tmp_path / "out", 1)
    os.kill(process.pid, signal.SIGSTOP)
    second = start(source, tmp_path / "out")
    _, error = second.communicate()
    os.kill(process.pid, signal.SIGCONT)
    process.communicate()
    assert (second.returncode, process.returncode) == (2, 0)
    assert error.endswith("is being prepared by another process: wait until that ends\n")
    assert verify(tmp_path / "out", 1) == []


def test_a_killed_worker_is_one_line_and_the_next_run_goes_on(source, tmp_path):
    process = start(source, tmp_path / "out")
    assert wait_for_shards(process, tmp_path / "out", 1)
    for pid in descendants(process.pid):
        if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)
            break
    _, error = process.communicate()
    assert process.returncode == 2
    assert error.startswith("error: a worker process was killed")
    assert len(error.splitlines()) == 1
    process = start(source, tmp_path / "out")
    process.communicate()
    assert process.returncode == 0
    assert verify(tmp_path / "out", 1) == []
