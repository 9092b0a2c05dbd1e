"""Each ends before any work with one line that names the file and the key and says what to do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch._inductor.exc import InductorError, InvalidCxxCompiler

from pipeline.cli import entry
from pipeline.config.arguments import split_command_args
from pipeline.errors import RecipeError
from pipeline.models import create_model

ROOT = Path(__file__).resolve().parents[2]
Train = Callable[..., None]


def refused(train: Train, *words: str) -> str:
    with pytest.raises((ValueError, OSError)) as caught:
        train(*words)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_missing_folder_of_shards(run_train: Train):
    message = refused(run_train, "ce.yaml", "data.path=nowhere")
    assert "ce.yaml: data.path: there are no shards in 'nowhere'" in message
    assert "the script named at the top of the data set's recipe" in message


def test_a_shard_that_is_shorter_than_the_manifest_says(run_train: Train, shards: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    tar = next(copy.glob("train-*.tar"))
    tar.write_bytes(tar.read_bytes()[:-512])
    assert str(tar) in refused(run_train, "ce.yaml", f"data.path={copy}")


def test_a_batch_that_the_accumulation_does_not_divide(run_train: Train):
    assert "ce.yaml: batch: 12 is not divisible by" in refused(run_train, "ce.yaml", "accumulation=5")


def test_a_folder_that_holds_another_recipes_run(run_train: Train):
    run_train("ce.yaml", "stop.steps=1")
    message = refused(run_train, "ce.yaml", "seed=1", "batch=6")
    assert "runs/ce: holds the run of another recipe (different batch, seed)" in message


def test_a_folder_that_holds_the_run_of_a_student_alone(run_train: Train):
    run_train("teacher.yaml")
    run_train("ce.yaml", "stop.steps=1", "folder=runs/mixed")
    message = refused(run_train, "ddkd.yaml", "compare=null", "folder=runs/mixed")
    assert "runs/mixed: holds the run of another recipe" in message


def test_recipes_that_stand_on_one_another(run_train: Train, recipes: Path):
    (recipes / "a.yaml").write_text("base: ce.yaml\ncompare: [b.yaml]\nfolder: runs/a\n")
    (recipes / "b.yaml").write_text("base: ce.yaml\ncompare: [a.yaml]\nfolder: runs/b\n")
    assert "the recipe depends on itself, through" in refused(run_train, "a.yaml")


def test_keys_that_are_no_part_of_the_run_may_change(run_train: Train):
    run_train("ce.yaml", "stop.steps=1")
    run_train("ce.yaml", "stop.steps=2", "journal.every_steps=2", "data.threads=1", "checkpoints.keep=5")


@pytest.mark.parametrize(
    ("model", "classes", "reason"),
    [("cifar_resnet8", 20, "another architecture than cifar_resnet20"), ("cifar_resnet20", 100, "100 classes")],
)
def test_teacher_weights_that_do_not_fit(run_train: Train, tmp_path: Path, model: str, classes: int, reason: str):
    file = tmp_path / "weights.pt"
    torch.save(create_model(model, classes).state_dict(), file)
    teacher = f"teacher={{recipe: null, model: cifar_resnet20, weights: {file}}}"
    message = refused(run_train, "ddkd.yaml", "compare=null", teacher)
    assert f"ddkd.yaml: teacher.weights: {file}" in message
    assert reason in message


def test_shards_whose_classes_are_not_the_teachers(run_train: Train, shards: Path, tmp_path: Path):
    run_train("teacher.yaml")
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["classes"] = manifest["classes"][::-1]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert "differ from those that runs/teacher was trained on" in refused(
        run_train, "ddkd.yaml", "compare=null", f"data.path={copy}"
    )


def test_two_sources_of_one_network(run_train: Train):
    words = ["teacher.model=cifar_resnet20", "teacher.weights=teacher.pt"]
    assert "teacher: both model and recipe name the network; set recipe: null" in refused(
        run_train, "ddkd.yaml", *words
    )
    message = refused(run_train, "ddkd.yaml", *words, "teacher.recipe=null")
    assert "teacher.weights: teacher.pt: there is no such weights file" in message
    start = "student.start={recipe: ce.yaml, weights: start.pt}"
    assert "student.start: both weights and recipe name the initial weights" in refused(run_train, "ddkd.yaml", start)


def test_half_precision_without_a_gpu(run_train: Train):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert "precision: fp16 needs a GPU" in refused(run_train, "ce.yaml", "precision=fp16")


def test_a_tracker_that_is_unknown_or_not_installed(run_train: Train, monkeypatch: pytest.MonkeyPatch):
    message = refused(run_train, "ce.yaml", "journal.trackers=[tensorbord]")
    assert "journal.trackers: there is no tracker 'tensorbord'; known are" in message
    monkeypatch.setattr("pipeline.training.accelerator.get_available_trackers", lambda: ["tensorboard"])
    message = refused(run_train, "ce.yaml", "journal.trackers=[tensorboard, wandb]")
    assert "journal.trackers: wandb is not installed; install it, or leave it out" in message


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_run_that_is_not_there_must_be_made_by_one_process_first(
    run_train: Train, shards: Path, monkeypatch: pytest.MonkeyPatch, elsewhere: bool
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = refused(run_train, "ddkd.yaml", *([f"data.path={shards}/"] if elsewhere else []))
    told = message.partition("one process must make it first: python pipeline/train.py ")[2]
    assert "teacher.yaml" in told
    assert (f'data.path="{shards}/"' in told) == elsewhere


def test_ranks_that_do_not_see_one_another(run_train: Train, monkeypatch: pytest.MonkeyPatch):
    run_train("ce.yaml", "stop.steps=1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("pipeline.distributed.rendezvous.init_process_group", lambda launch, **_: None)
    monkeypatch.setattr(
        "pipeline.training.accelerator.Accelerator", lambda **_: type("Alone", (), {"num_processes": 1})
    )
    assert "the launcher started 2 ranks and each sees 1" in refused(run_train, "ce.yaml")


def test_the_process_prints_one_line_and_exits_with_2(recipes: Path):
    command = [sys.executable, str(ROOT / "pipeline" / "train.py"), "ce.yaml", "batsh=3"]
    done = subprocess.run(
        command,
        cwd=recipes,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.strip() == "error: command line: batsh: unknown key; did you mean 'batch'?"
    assert done.stdout == "loading PyTorch and the other libraries, which takes some seconds\n"


DAMAGED = {
    "checkpoints/step-2/distiller.safetensors": "step-2 away, and the run continues from step-1",
    "checkpoints/step-2/optimizer.pt": "step-2 away, and the run continues from step-1",
    "checkpoints/step-2/state.json": "step-2 away, and the run continues from step-1",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_file_of_the_run_that_is_cut_short(run_train: Train, recipes: Path, name: str):
    run_train("ce.yaml", "checkpoints.every_steps=1", "stop.steps=2")
    file = recipes / "runs" / "ce" / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    message = refused(run_train, "ce.yaml")
    assert f"{file.parent.relative_to(recipes)}" in message
    assert DAMAGED[name] in message
    if "step-2" in name:
        shutil.rmtree(file.parent)
        run_train("ce.yaml", "stop.steps=2")  # what the message says is so


def test_best_weights_that_are_cut_short(run_train: Train, recipes: Path):
    run_train("ce.yaml", "stop.epoch=1")
    best = recipes / "runs" / "ce" / "student_best.safetensors"
    best.write_bytes(best.read_bytes()[:100])
    assert "runs/ce/student_best.safetensors: cannot be read" in refused(run_train, "ce.yaml")


def test_a_file_where_the_run_folder_would_be(run_train: Train, recipes: Path):
    (recipes / "taken").write_text("")
    message = refused(run_train, "ce.yaml", "folder=taken/run")
    assert message.startswith("folder: taken/run cannot be written")
    assert message.endswith("taken is not a folder); give folder=ANOTHER")


def test_a_misspelt_word_of_the_commands_own():
    with pytest.raises(RecipeError, match="command line: repeat: unknown key; did you mean 'repeats'"):
        split_command_args(["repeat=2"], ("repeats", "steps"))
    others = ["batch=2", "losses.kd.weight=1", "data.views=3"]
    assert split_command_args(others, ("repeats", "views")) == ({}, others)


def test_an_empty_mapping_that_would_change_nothing(run_train: Train):
    assert "remove an entry with losses.NAME=null" in refused(run_train, "ce.yaml", "losses={}")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has …"), "lower batch"),
        (InductorError(InvalidCxxCompiler(), None), "remove compile from the recipe"),
    ],
    ids=["memory", "compiler"],
)
def test_what_torch_finds_lacking_in_the_machine(error: Exception, told: str, capsys: pytest.CaptureFixture[str]):
    def lacking(words: Sequence[str]) -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        entry(lacking)
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert message.startswith("error: ")
    assert told in message


def test_a_defect_of_the_code_shows_where_it_is():
    def defective(words: Sequence[str]) -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError):
        entry(defective)


@pytest.mark.parametrize(
    "value", ["!!timestamp soon", "!!bool soon", "!!int soon", "!!float soon", "!!set [1]", "!!omap 1"]
)
def test_a_yaml_tag_that_does_not_fit_its_value(run_train: Train, recipes: Path, value: str):
    (recipes / "tagged.yaml").write_text(f"base: ce.yaml\nepochs: {value}\n")
    assert "tagged.yaml: " in refused(run_train, "tagged.yaml")
    assert "epochs: " in refused(run_train, "ce.yaml", f"epochs={value}")
