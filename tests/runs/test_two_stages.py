"""A student in two stages, as activation boundaries are learned: the second trains on from where the first ended."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from methods import losses_of
from safetensors.torch import load_file


def test_the_second_stage_begins_with_the_first_ones_weights(run_train: Callable[..., None], recipes: Path):
    losses = losses_of("ab_init")
    stages = {
        "first": {"teacher": {"recipe": "teacher.yaml"}, "losses": {"ce": None, **losses}},
        "second": {"student": {"start": {"recipe": "first.yaml"}}},
        "scratch": {},
    }
    for name, own in stages.items():
        whole = {"base": "ce.yaml", "epochs": 1, "folder": f"runs/{name}", **own}
        (recipes / f"{name}.yaml").write_text(yaml.safe_dump(whole))
    # So slow that a run ends where it began.
    for name in ("second", "scratch"):
        run_train(f"{name}.yaml", "schedule.rate=1e-30")
    first, second, scratch = (load_file(recipes / "runs" / name / "student.safetensors") for name in stages)
    weights = [key for key, value in first.items() if value.ndim == 4]
    assert all(torch.equal(second[key], first[key]) for key in weights)
    assert not any(torch.equal(scratch[key], first[key]) for key in weights)
