"""What a run saves is proved before its first step, and a full disk ends it in one line."""

from __future__ import annotations

import errno
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from odd_networks import Looped
from safetensors.torch import load_file

from pipeline.cli import entry
from pipeline.errors import RecipeError
from pipeline.models.create import create_model
from pipeline.models.weights import load_weights
from pipeline.training import files
from pipeline.training.checkpoint import Checkpoints
from pipeline.training.journal import trace
from shards.manifest import UnwritableFile, write_atomically, writing

Train = Callable[..., None]
EVERY_STEP = ("ce.yaml", "checkpoints.every_steps=1")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def own(recipes: Path, model: object) -> str:
    """Write a recipe of a user's network, and return its name."""
    (recipes / "own.yaml").write_text(
        yaml.safe_dump({"base": "ce.yaml", "student": {"model": model}, "folder": "runs/own"})
    )
    return "own.yaml"


# -- proved before the first step -------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["odd_networks:Looped", "odd_networks:Versioned"])
def test_networks_of_odd_states_go_on_bit_for_bit(run_train: Train, recipes: Path, model: str):
    words = (
        own(recipes, {"path": model, "stages": {"stage1": "stem"}} if "Looped" in model else model),
        "ema.decay=0.9",
    )
    run_train(*words, "folder=runs/whole")
    run_train(*words, "folder=runs/parts", "stop.steps=3")
    run_train(*words, "folder=runs/parts")
    whole, parts = recipes / "runs" / "whole", recipes / "runs" / "parts"
    assert trace(parts / "journal.jsonl") == trace(whole / "journal.jsonl")
    for path in whole.glob("*.safetensors"):
        assert (parts / path.name).read_bytes() == path.read_bytes()
    if "Looped" in model:
        for name in ("student", "student_best", "student_ema"):
            Looped(20).load_state_dict(load_file(parts / f"{name}.safetensors"), strict=True)


def test_torchvisions_network_with_a_version_trains_stops_and_goes_on(run_train: Train, recipes: Path):
    words = (own(recipes, "mnasnet0_5"), "epochs=1")
    run_train(*words, "stop.steps=1")
    run_train(*words)
    run = recipes / "runs" / "own"
    student = create_model("mnasnet0_5", 20)
    load_weights(student, str(run / "student.safetensors"), "mnasnet0_5")
    last = load_file(run / "checkpoints" / "step-5" / "distiller.safetensors")
    assert all(torch.equal(value, last[f"student.model.{name}"]) for name, value in student.state_dict().items())


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("Remembering", "student.model._extra_state is a dict, but a file holds only tensors"),
        ("Forgetful", "weights of my own"),
        ("Hiding", 'Missing key(s) in state_dict: "student.model.scale"'),
    ],
)
def test_what_cannot_be_saved_and_loaded_back_is_refused_before_the_first_step(
    run_train: Train, recipes: Path, model: str, told: str
):
    with pytest.raises(RecipeError) as raised:
        run_train(own(recipes, f"odd_networks:{model}"))
    message = str(raised.value)
    assert message.startswith("runs/own: its state cannot be saved and loaded back (")
    assert told in message
    assert "\n" not in message
    assert not (recipes / "runs" / "own" / "journal.jsonl").exists()
    assert names(recipes / "runs" / "own") == []


# -- a full disk ------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(recipes: Path) -> Iterator[Callable[[str], None]]:
    """``small_disk("3m")`` is the size of the file system that holds the run folders."""
    (recipes / "runs").mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", recipes / "runs"], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("must not mount a file system")
    yield lambda size: _remount(recipes / "runs", size)
    subprocess.run(["umount", "--lazy", recipes / "runs"], check=True)


def _remount(folder: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", folder], check=True)


@pytest.mark.parametrize(
    "told", [True, False], ids=["the disk says so", "the disk keeps it to itself, as a quota does"]
)
def test_a_disk_that_fills_up_ends_the_run_in_one_line_and_it_goes_on(
    run_train: Train,
    recipes: Path,
    small_disk: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    told: bool,
):
    small_disk("1800k")
    if not told:
        monkeypatch.setattr("shards.manifest.shutil.disk_usage", lambda path: SimpleNamespace(free=10**9, total=10**9))
    monkeypatch.setattr("sys.argv", ["train.py", *EVERY_STEP])
    with pytest.raises(SystemExit) as ended:
        entry(lambda words: run_train(*words))
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert printed.err.count("\n") == 1
    assert printed.err.startswith(f"error: runs/ce/checkpoints/{'' if told else '.tmp-'}step-3")
    assert "bytes are needed" in printed.err
    assert ("free there, unless a quota allows less;" in printed.err) != told
    assert printed.err.endswith("; make room there, and run the same command again to continue\n")
    assert ("warning: runs/ce/checkpoints: " in printed.out) == told
    assert names(recipes / "runs" / "ce") == ["step-1", "step-2"]
    small_disk("30m")
    run_train(*EVERY_STEP)
    monkeypatch.undo()
    monkeypatch.chdir(recipes)
    run_train("ce.yaml", "folder=elsewhere")
    for name in ("student.safetensors", "student_best.safetensors"):
        assert (recipes / "runs" / "ce" / name).read_bytes() == (recipes / "elsewhere" / name).read_bytes()


def test_a_disk_without_room_for_one_checkpoint_is_said_before_the_first_step(
    run_train: Train, recipes: Path, small_disk: Callable[[str], None]
):
    small_disk("300k")
    with pytest.raises(UnwritableFile, match=r"step-0.*No space left on device.*bytes are needed, [\d,]+ are free"):
        run_train("ce.yaml")
    assert names(recipes / "runs" / "ce") == []
    assert not (recipes / "runs" / "ce" / "journal.jsonl").exists()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 576 vs 534"),
    ],
    ids=["quota", "torch"],
)
def test_torchs_own_words_for_a_full_disk_are_told_with_the_file(
    run_train: Train, recipes: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
):
    run_train(*EVERY_STEP, "stop.steps=1")

    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(files.torch, "save", fail)
        with pytest.raises(UnwritableFile) as raised:
            run_train(*EVERY_STEP, "stop.steps=2")
    message = str(raised.value)
    assert message.startswith("runs/ce/checkpoints/.tmp-step-2/optimizer.pt: cannot be written (")
    assert (error.strerror if isinstance(error, OSError) else str(error)) in message
    assert message.endswith("make room there, and run the same command again to continue")
    assert names(recipes / "runs" / "ce") == ["step-1"]
    run_train(*EVERY_STEP, "stop.steps=2")
    assert names(recipes / "runs" / "ce") == ["step-1", "step-2"]


@pytest.mark.parametrize("name", ["student.safetensors", "student_best.safetensors", "result.json"])
def test_a_last_file_that_does_not_fit_costs_a_line_and_the_run_is_finished_by_the_next_command(
    run_train: Train, recipes: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    def full(path: Path, content: bytes) -> None:
        if path.name == name:
            with writing(path, len(content)):
                raise OSError(errno.ENOSPC, "No space left on device")
        write_atomically(path, content)

    with monkeypatch.context() as patched:
        patched.setattr("pipeline.training.checkpoint.write_atomically", full)
        patched.setattr("pipeline.runs.files.write_atomically", full)
        with pytest.raises(UnwritableFile) as raised:
            run_train("ce.yaml", "epochs=1")
    assert f"runs/ce/{name}: cannot be written (No space left on device): " in str(raised.value)
    run_train("ce.yaml", "epochs=1")
    assert json.loads((recipes / "runs" / "ce" / "result.json").read_text())["top1"] is not None


# -- as many as are to be kept -----------------------------------------------------------------------------------------


class Killed(BaseException):
    """A kill, at a place of the test's choice."""


@pytest.mark.parametrize("last", [3, 5], ids=["in the middle", "at the last step"])
def test_a_command_that_was_killed_before_it_could_prune_leaves_no_checkpoint_too_many(
    run_train: Train, recipes: Path, monkeypatch: pytest.MonkeyPatch, last: int
):
    words, run = (*EVERY_STEP, "epochs=1", "checkpoints.keep=2"), recipes / "runs" / "ce"
    prune = Checkpoints._prune

    def killed(self: Checkpoints) -> None:
        if (run / "checkpoints" / f"step-{last}").exists():
            raise Killed
        prune(self)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "_prune", killed)
        with pytest.raises(Killed):
            run_train(*words)
    assert len(names(run)) == 3
    run_train(*words)
    assert names(run) == ["step-4", "step-5"]
    assert (run / "result.json").is_file()


def test_fewer_checkpoints_are_kept_as_soon_as_the_recipe_says_so(run_train: Train, recipes: Path):
    run_train(*EVERY_STEP, "checkpoints.keep=4", "stop.steps=4")
    run_train(*EVERY_STEP, "checkpoints.keep=1", "stop.steps=4")
    assert names(recipes / "runs" / "ce") == ["step-4"]
