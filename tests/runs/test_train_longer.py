"""More epochs than a finished run has are a new run, and the refusal has its words."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from resolved import run_of
from safetensors.torch import load_file

from pipeline.builders.student import build_student, load_start, student_spec
from pipeline.errors import RecipeError
from pipeline.models import create_model

Train = Callable[..., None]


def refusal(run_train: Train, *words: str) -> str:
    with pytest.raises(RecipeError) as caught:
        run_train(*words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_words_of_the_refusal_train_on_from_the_weights(run_train: Train, recipes: Path):
    run_train("ce.yaml", "epochs=1", "schedule.warmup_epochs=0")
    message = refusal(run_train, "ce.yaml", "epochs=3")
    told = message.partition("runs/ce: holds the run of another recipe (different epochs, schedule.warmup_epochs); ")[2]
    reason = "its 1 epochs have ended, and more are a new run that starts from its weights: "
    assert told == reason + "student.start.weights=runs/ce/student.safetensors epochs=2 folder=ANOTHER"
    words = ["ce.yaml", *shlex.split(told.removeprefix(reason).replace("ANOTHER", "runs/more"))]
    run = run_of(words[0], words[1:])
    student = build_student(student_spec(run.recipe.student, frozenset()), 20, 0)
    load_start(run, student)
    weights = load_file("runs/ce/student.safetensors")
    assert all(torch.equal(value, weights[key]) for key, value in student.model.state_dict().items())
    run_train(*words)
    assert (recipes / "runs" / "more" / "result.json").is_file()


def test_a_start_with_a_new_head_is_told_to_keep_it(run_train: Train, recipes: Path):
    torch.save(create_model("cifar_resnet8", 7).state_dict(), "w.pt")
    words = ("ce.yaml", "student.start={weights: w.pt, head: new}")
    run_train(*words, "epochs=1")
    message = refusal(run_train, *words, "epochs=2")
    assert message.endswith("student.safetensors student.start.head=keep epochs=1 folder=ANOTHER")


@pytest.mark.parametrize("changed", [["epochs=1", "schedule.warmup_epochs=0"], ["epochs=3", "batch=6"]])
def test_fewer_epochs_and_other_changes_are_another_recipe_as_ever(run_train: Train, recipes: Path, changed: list[str]):
    run_train("ce.yaml")
    assert refusal(run_train, "ce.yaml", *changed).endswith("; give folder=ANOTHER")


def test_a_run_that_is_not_finished_is_another_recipe_as_ever(run_train: Train, recipes: Path):
    run_train("ce.yaml", "stop.steps=1")
    assert refusal(run_train, "ce.yaml", "epochs=3").endswith("(different epochs); give folder=ANOTHER")
