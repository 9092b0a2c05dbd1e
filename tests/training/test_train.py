from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import without_digests
from safetensors.torch import load_file, save_file

from pipeline.config.recipe import load_recipe
from pipeline.models import create_model
from pipeline.optim.guard import NonFiniteError
from pipeline.training.journal import read_journal, trace

Train = Callable[..., None]


def test_a_run_leaves_what_the_readme_promises(run_train: Train, recipes: Path, capsys: pytest.CaptureFixture[str]):
    run_train("ce.yaml", "ema.decay=0.9")
    folder = recipes / "runs" / "ce"
    names = {path.name for path in folder.iterdir()}
    assert names >= {"recipe.yaml", "versions.json", "journal.jsonl", "checkpoints", "result.json"}
    for name in ("student.safetensors", "student_best.safetensors", "student_ema.safetensors"):
        create_model("cifar_resnet8", 20).load_state_dict(load_file(folder / name), strict=True)
    result = json.loads((folder / "result.json").read_text())
    assert result["parameters"] == sum(p.numel() for p in create_model("cifar_resnet8", 20).parameters())
    assert 0 <= result["top1"] <= result["best_top1"] <= 100
    assert load_recipe(folder / "recipe.yaml").recipe.epochs == 2
    assert {"torch", "commit", "uncommitted_changes"} <= json.loads((folder / "versions.json").read_text()).keys()
    assert "cifar_resnet8" in capsys.readouterr().out


def test_the_journal_holds_every_step_and_every_evaluation(run_train: Train, recipes: Path):
    run_train("ce.yaml")
    lines = trace(recipes / "runs" / "ce" / "journal.jsonl")
    steps = [line for line in lines if "total" in line]
    assert [line["step"] for line in steps] == list(range(1, 11))
    assert [line["samples"] for line in steps] == list(range(12, 121, 12))
    assert [line["epoch"] for line in lines if "top5" in line] == [1, 2]
    measured = [line for line in read_journal(recipes / "runs" / "ce" / "journal.jsonl") if "top5" in line]
    best = [max(line["top1"] for line in measured[: number + 1]) for number in range(2)]
    assert [line["validation"]["best"] for line in measured] == best
    assert all(0 < line["validation"]["loss"] < 10 for line in measured)
    assert not any("validation" in line for line in lines)
    assert steps[0]["rate"] == 0.0
    assert max(line["rate"] for line in steps) <= 0.05
    assert all(line["ce"] == line["total"] for line in steps)


def test_a_finished_run_is_not_trained_again(run_train: Train, recipes: Path, capsys: pytest.CaptureFixture[str]):
    run_train("ce.yaml", "epochs=1")
    journal = recipes / "runs" / "ce" / "journal.jsonl"
    before = journal.read_bytes()
    capsys.readouterr()
    run_train("ce.yaml", "epochs=1")
    assert journal.read_bytes() == before
    assert "runs/ce" in capsys.readouterr().out


@pytest.mark.parametrize("changes", [(), ("accumulation=2", "ema.decay=0.9", "clip=1.0")], ids=["plain", "accumulated"])
def test_a_run_stopped_in_the_middle_of_an_epoch_goes_on_bit_for_bit(
    run_train: Train, recipes: Path, changes: tuple[str, ...]
):
    run_train("teacher.yaml")
    words = ("ddkd.yaml", "compare=null", *changes)
    run_train(*words, "folder=runs/whole")
    run_train(*words, "folder=runs/parts", "stop.steps=3")
    assert not (recipes / "runs" / "parts" / "result.json").exists()
    run_train(*words, "folder=runs/parts", "stop.steps=8")
    run_train(*words, "folder=runs/parts")
    whole, parts = recipes / "runs" / "whole", recipes / "runs" / "parts"
    assert trace(parts / "journal.jsonl") == trace(whole / "journal.jsonl")
    for name in [path.name for path in whole.glob("*.safetensors")]:
        assert (parts / name).read_bytes() == (whole / name).read_bytes()
    measured = [json.loads((folder / "result.json").read_text()) for folder in (whole, parts)]
    for result in measured:
        del result["images_per_second"], result["seconds"]
    assert measured[0] == measured[1]


@pytest.mark.parametrize("kind", ["adamw", "timm/lamb", "timm/muon", "nadam"])
def test_a_run_of_another_optimizer_goes_on_bit_for_bit(run_train: Train, recipes: Path, kind: str):
    optimizer = {"kind": kind, "momentum": None, "weight_decay": 0.05, "decay_norms_and_biases": False}
    schedule = {"kind": "one_cycle", "rate": 0.002, "warmup_epochs": 0.5}
    sections = [f"{key}={json.dumps(value)}" for key, value in (("optimizer", optimizer), ("schedule", schedule))]
    words = ("ce.yaml", *sections, "ema={decay: 0.99, warmup: true}")
    run_train(*words, "folder=runs/whole")
    for stop in ("3", "8", "null"):
        run_train(*words, "folder=runs/parts", f"stop.steps={stop}")
    whole, parts = recipes / "runs" / "whole", recipes / "runs" / "parts"
    assert trace(parts / "journal.jsonl") == trace(whole / "journal.jsonl")
    files = [*whole.glob("*.safetensors"), *whole.glob("checkpoints/step-10/*.pt")]
    assert len(files) == 4
    for path in files:
        assert (parts / path.relative_to(whole)).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("kind", ["adamw", "timm/lamb"])
def test_a_non_finite_loss_ends_the_run_of_any_optimizer_and_saves_nothing(run_train: Train, recipes: Path, kind: str):
    optimizer = f'optimizer={{"kind": "{kind}", "momentum": null}}'
    words = ("ce.yaml", optimizer, "checkpoints.every_steps=1", "journal.every_steps=50", "folder=runs/bad")
    with pytest.raises(NonFiniteError, match=r"became NaN or inf at step 2; the update was skipped"):
        run_train(*words, "schedule={kind: constant, rate: 1e38, warmup_epochs: null}")
    assert [path.name for path in (recipes / "runs" / "bad" / "checkpoints").iterdir()] == ["step-1"]


def test_a_command_that_is_already_where_it_stops_does_nothing(run_train: Train, recipes: Path):
    run_train("ce.yaml", "stop.steps=4")
    before = (recipes / "runs" / "ce" / "journal.jsonl").read_bytes()
    run_train("ce.yaml", "stop.steps=4")
    assert (recipes / "runs" / "ce" / "journal.jsonl").read_bytes() == before


def test_shards_without_validation_images_are_trained_on_and_it_is_said(
    run_train: Train, recipes: Path, shards: Path, capfd: pytest.CaptureFixture[str]
):
    copy = recipes / "alone"
    shutil.copytree(shards, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["splits"]["val"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    run_train("ce.yaml", f"data.path={copy}", "epochs=1")
    assert f"note: {copy} has no validation split: this run is not evaluated" in capfd.readouterr().out
    assert json.loads((recipes / "runs" / "ce" / "result.json").read_text())["top1"] is None


def test_shards_may_lie_elsewhere_than_the_recipes_say(run_train: Train, recipes: Path, shards: Path):
    run_train("teacher.yaml")
    copy = recipes / "local"
    shutil.copytree(shards, copy)
    run_train("ddkd.yaml", "compare=null", "stop.steps=2")
    run_train("ddkd.yaml", "compare=null", "stop.steps=3", f"data.path={copy}")


def test_lines_written_after_the_checkpoint_are_cut_on_resume(run_train: Train, recipes: Path):
    run_train("ce.yaml", "stop.steps=4", "folder=runs/cut")
    journal = recipes / "runs" / "cut" / "journal.jsonl"
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"step": 5, "half a li')
    run_train("ce.yaml", "stop.steps=6", "folder=runs/cut")
    assert [line["step"] for line in trace(journal) if "total" in line] == list(range(1, 7))


def test_the_last_checkpoints_are_kept_and_only_whole_ones_count(run_train: Train, recipes: Path):
    words = ("ce.yaml", "checkpoints={every_steps: 2, every_epochs: 0, keep: 2}", "folder=runs/kept")
    run_train(*words, "stop.steps=6")
    folder = recipes / "runs" / "kept" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-4", "step-6"]
    (folder / ".tmp-step-8").mkdir()
    (folder / ".tmp-step-8" / "state.json").write_text("{")
    run_train(*words)
    assert (recipes / "runs" / "kept" / "result.json").is_file()


def test_a_non_finite_loss_ends_the_run_with_its_name_and_step_and_touches_nothing(run_train: Train, recipes: Path):
    words = (
        "ce.yaml",
        "checkpoints.every_steps=1",
        "journal.every_steps=50",
        "checkpoints.keep=100",
        "folder=runs/bad",
    )
    run_train(*words, "stop.steps=2")
    checkpoint = recipes / "runs" / "bad" / "checkpoints" / "step-2" / "distiller.safetensors"
    weights = load_file(checkpoint)
    name = "student.model.fc.bias"
    poisoned = {**weights, name: torch.full_like(weights[name], torch.inf)}
    save_file(poisoned, checkpoint)
    without_digests(checkpoint.parent)
    with pytest.raises(NonFiniteError, match="ce became NaN or inf at step 3"):
        run_train(*words)
    assert sorted(path.name for path in checkpoint.parents[1].iterdir()) == ["step-1", "step-2"]


def test_the_teacher_gate_stops_a_run_before_it_begins(run_train: Train, recipes: Path):
    run_train("teacher.yaml")
    with pytest.raises(ValueError, match=r"teacher.expect: the teacher reaches top-1 [\d.]+ of the expected 99"):
        run_train("ddkd.yaml", "compare=null", "teacher.expect=99")
    assert not (recipes / "runs" / "ddkd").exists()


def test_every_auxiliary_parameter_is_trained_and_none_is_exported(run_train: Train, recipes: Path):
    run_train("teacher.yaml")
    words = ("ddkd.yaml", "compare=null", "checkpoints={every_steps: 1, keep: 100}")
    run_train(*words, "stop.steps=4")
    folder = recipes / "runs" / "ddkd" / "checkpoints"
    first, last = (load_file(folder / f"step-{step}" / "distiller.safetensors") for step in (1, 4))
    auxiliary = [key for key in first if key.startswith("losses.") and not key.endswith("num_batches_tracked")]
    assert len(auxiliary) > 50
    still = [key for key in auxiliary if torch.equal(first[key], last[key])]
    # Biases before a BatchNorm move by weight decay alone, and those that begin at zero not even by that.
    assert not [key for key in still if key.endswith("weight")]
