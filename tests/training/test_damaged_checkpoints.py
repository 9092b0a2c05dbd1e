"""Whatever happened to a checkpoint's files: it is named with what to do, that works, and nothing in it is executed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import without_digests
from gloo_ranks import Ranks
from safetensors.torch import load_file, save_file
from training_rank import trained

from pipeline.errors import RecipeError
from pipeline.training.journal import trace
from shards.documents import DamagedFile

Train = Callable[..., None]
WORDS = ("ce.yaml", "epochs=1", "ema.decay=0.9", "checkpoints.every_steps=1")
FILES = ["buffers-0.safetensors", "distiller.safetensors", "ema.safetensors", "optimizer.pt", "state.json"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Copies of runs that were trained once, by the words that ended them."""
    return {}


@pytest.fixture
def run(run_train: Train, recipes: Path, runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stopped after 2 of 5 steps, with both checkpoints."""
    if not runs:
        run_train(*WORDS, "stop.steps=2")
        runs["two"] = Path(shutil.copytree(recipes / "runs" / "ce", tmp_path_factory.mktemp("kept") / "two"))
        run_train(*WORDS)
        runs["whole"] = Path(shutil.copytree(recipes / "runs" / "ce", tmp_path_factory.mktemp("kept") / "whole"))
        shutil.rmtree(recipes / "runs" / "ce")
    return Path(shutil.copytree(runs["two"], recipes / "runs" / "ce"))


def refused(run_train: Train) -> str:
    """Return the line with which the run is refused."""
    with pytest.raises((RecipeError, DamagedFile, FileNotFoundError)) as raised:
        run_train(*WORDS)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def follow(advice: str, run: Path) -> None:
    """Do what every message about a checkpoint says."""
    assert advice.endswith("move runs/ce/checkpoints/step-2 away, and the run continues from step-1")
    step = run / "checkpoints" / "step-2"
    step.rename(step.with_name("step-2.damaged"))


def flip(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("place", [0.02, 0.5, 1.0], ids=["begin", "middle", "end"])
@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_is_found_and_the_run_goes_on_from_the_step_before(
    run_train: Train, recipes: Path, run: Path, runs: dict[str, Path], name: str, place: float
):
    flip(run / "checkpoints" / "step-2" / name, place)
    told = refused(run_train)
    assert told.startswith(f"runs/ce/checkpoints/step-2/{name}: ")
    follow(told, run)
    if place == 0.5:
        run_train(*WORDS)
        assert trace(run / "journal.jsonl") == trace(runs["whole"] / "journal.jsonl")
        for file in runs["whole"].glob("*.safetensors"):
            assert (run / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: os.truncate(path, 50)])
@pytest.mark.parametrize("digests", [True, False])
def test_a_file_that_is_gone_or_cut_is_told_with_or_without_digests(
    run_train: Train, run: Path, name: str, damage: Callable[[Path], Any], digests: bool
):
    step = run / "checkpoints" / "step-2"
    if not digests:
        without_digests(step)
    damage(step / name)
    told = refused(run_train)
    assert told.startswith("runs/ce/checkpoints/step-2")
    follow(told, run)


STATES: dict[str, Any] = {
    "null": None,
    "a list": [],
    "no values": {},
    "a step of another folder": {"progress": {"steps_per_epoch": 5, "step": 10**12, "samples_seen": 24}},
    "no step": {"progress": {"steps_per_epoch": 5, "samples_seen": 24}},
    "epochs of no steps": {"progress": {"steps_per_epoch": 0, "step": 2, "samples_seen": 24}},
    "other epochs": {"progress": {"steps_per_epoch": 7, "step": 2, "samples_seen": 24}},
    "fewer samples than steps": {"progress": {"steps_per_epoch": 5, "step": 2, "samples_seen": -24}},
    "a number in quotes": {"progress": {"steps_per_epoch": 5, "step": "2", "samples_seen": 24}},
    "a negative length": {"journal_bytes": -1},
    "a real length": {"journal_bytes": 1.5},
    "no ranks": {"world_size": 0},
    "ranks that wrote nothing": {"world_size": 3},
    "what nobody wrote": {"more": 1},
    "digests of another kind": {"sha256": []},
    "digests without their own": {"sha256": {"optimizer.pt": "0"}},
}


@pytest.mark.parametrize("changes", STATES.values(), ids=list(STATES))
def test_a_state_that_is_whole_json_of_the_wrong_shape(run_train: Train, run: Path, changes: Any):
    step = run / "checkpoints" / "step-2"
    without_digests(step)
    state = json.loads((step / "state.json").read_text())
    (step / "state.json").write_text(json.dumps({**state, **changes} if changes else changes))
    follow(refused(run_train), run)


@pytest.mark.parametrize(
    "text", ["", "[" * 100_000, "{", "\0", '{"progress": NaN}', '"\ud800"'.encode("utf-8", "surrogatepass")]
)
def test_a_state_that_is_no_json(run_train: Train, run: Path, text: str | bytes):
    (run / "checkpoints" / "step-2" / "state.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    follow(refused(run_train), run)


def test_every_rank_tells_of_the_file_that_one_of_them_found(recipes: Path, ranks: Ranks):
    words = ["ce.yaml", "epochs=1"]
    assert ranks(trained, recipes, [*words, "stop.steps=2"])[0].error is None
    flip(recipes / "runs" / "ce" / "checkpoints" / "step-2" / "buffers-1.safetensors", 0.5)
    one, other = (each.error for each in ranks(trained, recipes, words))
    assert one is not None
    assert one.startswith("runs/ce/checkpoints/step-2/buffers-1.safetensors: is missing or was changed")
    assert one == other


def test_a_value_of_the_state_that_was_changed_within_its_bounds(run_train: Train, run: Path):
    path = run / "checkpoints" / "step-2" / "state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps({**state, "journal_bytes": state["journal_bytes"] - 9}))
    told = refused(run_train)
    assert "state.json: was changed" in told
    follow(told, run)


def test_a_checkpoint_of_a_step_beyond_the_run(run_train: Train, run: Path):
    step = run / "checkpoints" / "step-2"
    without_digests(step, progress={"steps_per_epoch": 5, "step": 10**12, "samples_seen": 10**14})
    step.rename(step.with_name(f"step-{10**12}"))
    assert f"progress.step: expected the step in step-{10**12}, from 1 to 5, got {10**12}" in refused(run_train)


@pytest.mark.parametrize(
    "best", ["null", "[]", '{"top1": 101, "epoch": 1}', '{"top1": NaN}', '{"epoch": -1}', '"x', None]
)
def test_best_weights_that_tell_no_accuracy(run_train: Train, run: Path, best: str | None):
    path = run / "student_best.safetensors"
    tensors = load_file(run / "checkpoints" / "step-2" / "ema.safetensors")
    save_file(tensors, path, {"best": best} if best else None)
    told = refused(run_train)
    assert told.startswith(f"runs/ce/student_best.safetensors: {'best: ' if best else 'cannot be read ('}")
    assert told.endswith("move it away; the next best weights take its place")
    path.unlink()
    run_train(*WORDS)
    assert json.loads((run / "result.json").read_text())["best_epoch"] == 1


class Canary:
    """An object that, unpickled, leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("write", [torch.save, lambda bird, path: path.write_bytes(pickle.dumps(bird))])
@pytest.mark.parametrize("name", FILES)
def test_nothing_in_a_checkpoint_is_executed(
    run_train: Train, recipes: Path, run: Path, name: str, write: Callable[[Any, Path], Any]
):
    step = run / "checkpoints" / "step-2"
    without_digests(step)
    write({"state": Canary(recipes / "hatched"), "param_groups": []}, step / name)
    told = refused(run_train)
    if (name, write) == ("optimizer.pt", torch.save):  # what torch did not write it refuses at the first byte
        assert "it would call posix.mkdir, which is not data" in told
    follow(told, run)
    assert not (recipes / "hatched").exists()


def test_best_weights_that_are_gone_are_told(run_train: Train, recipes: Path, capsys: pytest.CaptureFixture[str]):
    run_train("ce.yaml", "stop.steps=7")
    (recipes / "runs" / "ce" / "student_best.safetensors").unlink()
    capsys.readouterr()
    run_train("ce.yaml", "stop.steps=8")
    assert "warning: runs/ce/student_best.safetensors is gone; the best weights" in capsys.readouterr().out
