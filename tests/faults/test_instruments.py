"""The instruments of the campaign, shown what they must see: a storage that fails, and each judgement's cause."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import shim
from forks import Done
from grammar import places, spoil, spoil_bytes, spoil_document
from judge import GOOD, damage_judgement, ended, input_judgement, names, run_result

ARMED = """
import ctypes, os, sys
storage = ctypes.CDLL(None)
storage.storage_arm(os.fsencode(os.getcwd()), int(sys.argv[1]), int(sys.argv[2]))
"""
SAVES = """
descriptor = os.open("a.tmp", os.O_WRONLY | os.O_CREAT)
os.write(descriptor, b"0123456789")
os.fsync(descriptor)
os.rename("a.tmp", "a")
os.unlink("old")
"""
CALLS = [
    *('open("a", "wb", buffering=0)', 'os.truncate("old", 3)'),
    *('os.mkdir("b")', 'os.mkdir("c")', 'os.rename("old", "d")'),
]
"""Five calls each that change the folder."""
needs_compiler = pytest.mark.skipif(bool(shim.missing()), reason=str(shim.missing()))


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shim.build(tmp_path_factory.mktemp("shim"))


def under(storage: Path, folder: Path, nth: int, kind: int, code: str = SAVES) -> subprocess.CompletedProcess[str]:
    (folder / "old").touch()
    told = f"{ARMED}{code}\nprint(storage.storage_count())"
    command = [sys.executable, "-S", "-c", told, str(nth), str(kind)]
    environment = {"LD_PRELOAD": str(storage)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@needs_compiler
def test_the_storage_counts_what_changes_the_folder_and_nothing_else(storage: Path, tmp_path: Path):
    assert under(storage, tmp_path, 0, shim.STOP).stdout == "5\n"
    elsewhere = 'open(os.devnull, "w").write("x")\nopen("a").read()\nos.listdir(".")'
    assert under(storage, tmp_path, 0, shim.STOP, elsewhere).stdout == "0\n"


@needs_compiler
@pytest.mark.parametrize(("nth", "left"), [(1, {"old"}), (3, {"old", "a.tmp"}), (5, {"old", "a"})])
def test_a_kill_comes_before_its_call(storage: Path, tmp_path: Path, nth: int, left: set[str]):
    assert under(storage, tmp_path, nth, shim.STOP).returncode == -signal.SIGKILL
    assert {path.name for path in tmp_path.iterdir()} == left


@needs_compiler
def test_a_torn_write_leaves_half_of_its_bytes(storage: Path, tmp_path: Path):
    assert under(storage, tmp_path, 2, shim.TEAR).returncode == -signal.SIGKILL
    assert (tmp_path / "a.tmp").read_bytes() == b"012345"


@needs_compiler
@pytest.mark.parametrize("nth", range(1, 6))
def test_an_error_of_the_storage_fails_the_call_of_that_number_alone(storage: Path, tmp_path: Path, nth: int):
    lines = [f"try:\n    {line}\nexcept OSError as error:\n    print(error.errno)" for line in CALLS]
    assert under(storage, tmp_path, nth, errno.EIO, "\n".join(lines)).stdout == f"{errno.EIO}\n5\n"


@needs_compiler
@pytest.mark.parametrize("kind", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_stays_full_but_still_renames_and_deletes(storage: Path, tmp_path: Path, kind: int):
    code = """
open("a", "w").close()
for number in range(2):
    try:
        os.write(os.open("a", os.O_WRONLY), b"x")
    except OSError as error:
        print(error.errno)
os.rename("a", "b")
os.unlink("b")
"""
    assert under(storage, tmp_path, 2, kind, code).stdout.splitlines()[:-1] == [str(kind)] * 2


def done(code: int | None = 0, *, err: str = "", out: str = "", signal: int | None = None, late: bool = False) -> Done:
    return Done(code, signal, late, 0.0, 0.0, None, out, err)


TRACEBACK = "Traceback (most recent call last):\n  File …\nKeyError: 'x'\n"
ENDS = {
    "one line": done(2, err="error: a.yaml: x: unknown key\n"),
    "many lines": done(2, err="error: a\nerror: b\n"),
    "traceback": done(1, err=TRACEBACK),
    "hang": done(None, late=True),
    "abort": done(None, signal=6, err="terminate called\n"),
    "accepted": done(),
    "reported": done(1, out="a.tar has a sha256 that differs\n"),
    "exit code 1": done(1),
    "exit code 3": done(3, err="error: x\n"),
}


@pytest.mark.parametrize("judgement", ENDS)
def test_every_end_of_a_command_has_its_judgement(judgement: str):
    assert ended(ENDS[judgement]) == judgement


def test_an_error_of_exit_code_2_that_is_no_error_line_is_none():
    assert ended(done(2, err="oops\n")) == ended(done(2)) == "many lines"
    assert ended(done(2, err=f"error: x\n{TRACEBACK}")) == "traceback"


def test_bad_input_that_was_executed_or_taken_is_seen_whatever_the_command_said(tmp_path: Path):
    assert input_judgement(ENDS["one line"], tmp_path / "canary", strict=True) == "one line"
    assert input_judgement(ENDS["accepted"], tmp_path / "canary", strict=True) == "accepted wrongly"
    assert input_judgement(ENDS["accepted"], tmp_path / "canary", strict=False) == "accepted"
    (tmp_path / "canary").touch()
    assert input_judgement(ENDS["one line"], tmp_path / "canary", strict=True) == "canary executed"


def test_damage_that_changes_the_result_must_be_said():
    same, other = {"student": b"1"}, {"student": b"2"}
    assert damage_judgement(done(), same, same, said=False) == "harmless"
    assert damage_judgement(done(), same, other, said=True) == "said"
    assert damage_judgement(done(), same, other, said=False) == "silent"
    assert damage_judgement(done(), None, {}, said=False) == "silent"  # a proof that saw nothing
    assert damage_judgement(ENDS["one line"], same, other, said=False) == "noticed"
    assert damage_judgement(ENDS["reported"], None, {}, said=False) == "noticed"
    assert damage_judgement(ENDS["traceback"], same, same, said=True) == "traceback"
    breaches = {
        "silent",
        "traceback",
        "hang",
        "abort",
        "canary executed",
        "accepted wrongly",
        "many lines",
        "left behind",
    }
    assert not GOOD & breaches


def test_a_runs_result_is_its_weights_and_its_trace_without_times(tmp_path: Path):
    (tmp_path / "student.safetensors").write_bytes(b"weights")
    (tmp_path / "journal.jsonl").write_text('{"step": 1, "total": 2.5, "timing": {"data_wait": 0.1}}\n')
    first = run_result(tmp_path)
    (tmp_path / "journal.jsonl").write_text('{"step": 1, "total": 2.5, "timing": {"data_wait": 0.2}}\n')
    assert run_result(tmp_path) == first
    for spoilt in ('{"step": 1, "total": 2.6}\n', '{"step": 1}\n', "x\n", "null\n", ""):
        (tmp_path / "journal.jsonl").write_text(spoilt)
        assert run_result(tmp_path) != first


def test_what_is_left_behind_shows_by_its_name(tmp_path: Path):
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / "events").touch()
    assert names(tmp_path) == set()
    (tmp_path / "a.12.tmp").touch()
    assert names(tmp_path) == {"a.12.tmp"}


@pytest.mark.parametrize("seed", range(20))
def test_a_spoilt_file_is_another_and_the_same_from_the_same_seed(tmp_path: Path, seed: int):
    file = tmp_path / "a.json"
    for spoiling in (spoil_bytes, spoil_document):
        found = []
        for _ in range(2):
            file.write_text(text := json.dumps({"a": [1, {"b": None}], "c": "x"}, indent=1))
            found.append((spoiling(file, Random(seed)), file.read_bytes()))
        assert found[0] == found[1]
        assert found[0][1] != text.encode()


def test_spoiling_a_tree_changes_a_copy(tmp_path: Path):
    tree = {"a": [1, {"b": None}], "c": "x"}
    assert len(list(places(tree))) == 5
    for seed in range(50):
        spoilt, what = spoil(tree, Random(seed))
        assert tree == {"a": [1, {"b": None}], "c": "x"}
        assert repr(spoilt) != repr(tree), what
