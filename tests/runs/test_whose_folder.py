"""A folder that is somebody else's stays as it is; what a killed command left of its own is in nobody's way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import bench, compare
from pipeline.errors import RecipeError
from pipeline.runs.folder import lock_folder, mark_preempted
from pipeline.runs.ownership import check_cache_folder, check_run_folder

Train = Callable[..., None]

STRANGE = {
    "a file": ("notes.txt",),
    "a journal and weights": ("journal.jsonl", "student.safetensors"),
    "a result": ("result.json",),
    "a recipe": ("recipe.yaml",),
    "checkpoints": ("checkpoints/step-1/state.json",),
    "a cache": ("cache.json", "view-00.logits.npy"),
    "shards": ("manifest.json", "train-000000.tar"),
    "an unfinished preparation": ("journal.jsonl", "train-000000.tar"),
    "runs": ("ce/seed-0/identity.json",),
}
HARMLESS = ("preempted", ".lock", ".DS_Store", "identity.json.77.tmp", "tensorboard/events.1", "train.log", "job-1.out")


def filled(folder: Path, names: tuple[str, ...]) -> dict[Path, bytes]:
    """Make the files, and return all that the folder holds."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    return content(folder)


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("names", STRANGE.values(), ids=STRANGE)
def test_a_folder_with_other_things_is_refused_before_anything_is_written(
    names: tuple[str, ...], run_train: Train, recipes: Path
):
    before = filled(recipes / "mine", names)
    with pytest.raises(RecipeError, match=r"^mine: holds .*, and not a run: nothing is written there; give folder="):
        run_train("ddkd.yaml", "folder=mine")
    assert content(recipes / "mine") == before
    assert not (recipes / "runs").exists()  # nor was the teacher made first


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (("cache.json", "view-00.logits.npy"), "holds a teacher's cache, and"),
        (("manifest.json", "a", "b"), "holds shards, and"),
        (("a", "b", "c", "d", "e"), "holds a, b, c and 2 more, and"),
    ],
)
def test_the_line_says_what_is_there(names: tuple[str, ...], told: str, tmp_path: Path):
    filled(tmp_path, names)
    with pytest.raises(RecipeError, match=told):
        check_run_folder(tmp_path)


def test_a_folder_that_no_run_was_begun_in_is_trained_in(run_train: Train, recipes: Path):
    filled(recipes / "mine", HARMLESS)
    run_train("ce.yaml", "folder=mine", "stop.steps=1")
    left = {path.name for path in (recipes / "mine").iterdir()}
    assert {"identity.json", "recipe.yaml", "versions.json", "train.log", "tensorboard"} <= left
    assert not {"preempted", "identity.json.77.tmp"} & left


def test_a_run_killed_while_its_folder_was_begun_goes_on(run_train: Train, recipes: Path):
    run_train("ce.yaml", "stop.steps=1")
    folder = recipes / "runs" / "ce"
    whole = content(folder)
    starts = folder / "starts.jsonl"
    for name in ("recipe.yaml", "versions.json"):
        (folder / name).unlink()
    run_train("ce.yaml", "stop.steps=1")
    now = content(folder)
    assert now.pop(starts).startswith(whole.pop(starts))  # one line more: it was started twice
    assert now == whole


@pytest.mark.parametrize(
    "names", [STRANGE["shards"], ("identity.json",), ("notes.txt",)], ids=["shards", "run", "file"]
)
def test_no_cache_is_begun_in_another_folder(names: tuple[str, ...], tmp_path: Path):
    filled(tmp_path, names)
    with pytest.raises(RecipeError, match=r", and not a teacher's cache: .* give teacher\.cache=ANOTHER"):
        check_cache_folder(tmp_path)


def test_a_cache_killed_before_its_header_is_begun_again(tmp_path: Path):
    filled(tmp_path, ("stage3.encoder.safetensors", "preempted", "cache.json.7.tmp"))
    check_cache_folder(tmp_path)


def test_a_comparison_refuses_the_folder_before_it_makes_a_teacher(recipes: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(recipes)
    filled(recipes / "runs" / "ddkd", ("notes.txt",))
    with pytest.raises(RecipeError, match=r"runs/ddkd: holds notes\.txt, and not a run"):
        compare.main(["ddkd.yaml"])
    assert not (recipes / "runs" / "teacher").exists()


def test_a_benchmark_does_not_write_over_a_file(recipes: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(recipes)
    (recipes / "taken").write_text("mine")
    with pytest.raises(RecipeError, match=r"^out: taken cannot be written \(taken is not a folder\); give out=ANOTHER"):
        bench.main(["losses", "ce.yaml", "out=taken"])


def test_a_benchmark_of_a_step_removes_no_folder_but_a_run_of_its_own(
    recipes: Path, run_train: Train, capsys: pytest.CaptureFixture[str]
):
    before = filled(recipes / "out" / f"step-{os.getpid()}", ("notes.txt",))
    with pytest.raises(RecipeError, match=r"holds notes\.txt, and not a run: .* give out=ANOTHER"):
        bench.main(["step", "ce.yaml", "out=out", "repeats=1", "steps=2"])
    assert content(recipes / "out") == before


# -- left behind ------------------------------------------------------------------------------------------------------


def test_who_holds_the_lock_removes_what_killed_commands_had_begun(tmp_path: Path):
    (tmp_path / "held.1.tmp").mkdir()
    filled(tmp_path, ("result.json.4711.tmp", "view-00.logits.npy.tmp", "notes.tmp", "7.tmp", "result.json"))
    lock_folder(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "held.1.tmp", "notes.tmp", "7.tmp", "result.json"}


def test_what_another_process_is_writing_is_not_removed(tmp_path: Path):
    code = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    command = [sys.executable, "-c", code, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        filled(tmp_path, ("result.json.4711.tmp",))
        with pytest.raises(RecipeError, match="another process is writing in this folder"):
            lock_folder(tmp_path)
        assert (tmp_path / "result.json.4711.tmp").is_file()
        other.communicate(b"\n")


def test_word_of_a_signal_survives_whoever_cleans_the_folder(tmp_path: Path):
    mark_preempted(tmp_path / "run")
    lock_folder(tmp_path / "run")
    assert (tmp_path / "run" / "preempted").read_bytes() == b""


def test_an_identity_of_another_recipe_is_refused_and_kept(run_train: Train, recipes: Path):
    run_train("ce.yaml", "stop.steps=1")
    before = content(recipes / "runs" / "ce")
    with pytest.raises(RecipeError, match=r"holds the run of another recipe \(different batch\)"):
        run_train("ce.yaml", "batch=6")
    assert content(recipes / "runs" / "ce") == before
    assert json.loads((recipes / "runs/ce/identity.json").read_text())["batch"] == 12
