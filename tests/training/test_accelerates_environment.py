"""What Accelerate's environment, or a user's configuration of it, asks for beside the recipe."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import pytest
import torch

from pipeline.distributed.launcher import NUMBERS
from pipeline.errors import RecipeError
from pipeline.training.accelerator import FOREIGN_VARIABLES

Train = Callable[..., None]


def fails(*_args: object, **_options: object) -> NoReturn:
    raise AssertionError("torch was told to compile")


@pytest.mark.parametrize("compiler", ["EAGER", "INDUCTOR", "no such compiler"])
def test_a_compiler_that_the_recipe_does_not_ask_for_is_not_used_and_a_line_says_so(
    run_train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], compiler: str
):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", compiler)
    monkeypatch.setattr(torch, "compile", fails)
    run_train("ce.yaml", "stop.steps=1")
    assert f"note: ACCELERATE_DYNAMO_BACKEND={compiler} is ignored; student.compile=true" in capsys.readouterr().out


def test_its_word_for_none_needs_no_line(
    run_train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    run_train("ce.yaml", "stop.steps=1")
    assert "note" not in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(FOREIGN_VARIABLES))
def test_what_is_not_done_here_is_refused_in_one_line(run_train: Train, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setenv(name, "true")
    with pytest.raises(RecipeError, match=f"{name} enables .*, which is not supported here; unset it"):
        run_train("ce.yaml", "stop.steps=1")
    monkeypatch.delenv(name)
    run_train("ce.yaml", "stop.steps=1")


def test_a_device_beside_the_recipe_is_refused_in_one_line(run_train: Train, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "nowhere")
    with pytest.raises(RecipeError, match="ACCELERATE_TORCH_DEVICE=nowhere: unset it"):
        run_train("ce.yaml", "stop.steps=1")


def test_empty_variables_of_any_launcher_say_nothing(run_train: Train, monkeypatch: pytest.MonkeyPatch):
    for name in NUMBERS:
        monkeypatch.setenv(name, "")
    run_train("ce.yaml", "stop.steps=1")


@pytest.mark.parametrize("name", ["PMI_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_SIZE", "MPI_LOCALRANKID"])
def test_a_variable_of_another_launcher_that_is_no_number_is_named(
    run_train: Train, monkeypatch: pytest.MonkeyPatch, name: str
):
    monkeypatch.setenv(name, "x")
    with pytest.raises(RecipeError, match=f"^{name} is 'x', not a number$"):
        run_train("ce.yaml", "stop.steps=1")
