"""Every method of ``configs/methods`` trains, stops in the middle, and goes on to the same end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from methods import METHODS, WITHOUT_TEACHER, arguments_of, losses_of
from safetensors.torch import load_file

from pipeline.models import create_model
from pipeline.training.journal import trace


@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_and_goes_on_bit_for_bit_where_it_was_stopped(
    method: str, run_train: Callable[..., None], recipes: Path
):
    torch.manual_seed(0)
    losses, arguments = losses_of(method), arguments_of(method)
    torch.save(create_model("cifar_resnet20", 20, arguments).state_dict(), recipes / "teacher.pt")
    network = {"model": "cifar_resnet20", "weights": "teacher.pt", "arguments": arguments}
    teacher = None if method in WITHOUT_TEACHER else network
    whole = {"base": "ce.yaml", "teacher": teacher, "losses": {"ce": None, **losses}, "epochs": 1}
    whole["student"] = {"arguments": arguments}
    (recipes / "method.yaml").write_text(yaml.safe_dump(whole))
    # Losses whose weights are for long runs of larger networks would throw a few steps of a tiny one off.
    words = ["method.yaml", "schedule.rate=1e-4"]
    run_train(*words, "folder=runs/straight")
    run_train(*words, "folder=runs/stopped", "stop.steps=3")
    run_train(*words, "folder=runs/stopped")
    straight, stopped = (trace(recipes / "runs" / name / "journal.jsonl") for name in ("straight", "stopped"))
    assert straight == stopped
    assert len([line for line in straight if "total" in line]) == 5
    weights = [load_file(recipes / "runs" / name / "student.safetensors") for name in ("straight", "stopped")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    start = load_file(recipes / "runs" / "stopped" / "checkpoints" / "step-3" / "distiller.safetensors")
    end = load_file(recipes / "runs" / "stopped" / "checkpoints" / "step-5" / "distiller.safetensors")
    moved = [key for key in end if not torch.equal(start[key], end[key])]
    assert any(key.startswith("student.") for key in moved)
    # Whatever a loss trains or keeps moves on as well.
    assert {key for key in end if key.startswith("losses.")} - set(moved) <= constants(end)


def constants(state: dict[str, torch.Tensor]) -> set[str]:
    """Return the keys of what stays: the normalisers of banks, and convolutions' biases that a BatchNorm takes away.

    A loss without BatchNorms, such as CRD with its linear layers, has no bias that may stay.
    """
    losses = {key: value for key, value in state.items() if key.startswith("losses.")}
    of_maps = {key.removesuffix("weight") + "bias" for key, value in losses.items() if value.ndim == 4}
    return {"losses.crd.normalizers", "losses.crcd.normalizers"} | (of_maps & losses.keys())
