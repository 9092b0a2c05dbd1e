"""A recipe may have torch compile its networks: the same training, but for rounding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from gloo_ranks import Ranks
from training_on_ranks import train

from pipeline.training.journal import trace

COMPILED = ("folder=runs/compiled", "student.compile=true", "teacher.compile=true")


@pytest.mark.endurance
@pytest.mark.parametrize("world", [1, 2])
def test_compiled_networks_train_as_plain_ones_do(
    world: int, run_train: Callable[..., None], ranks: Ranks, recipes: Path
):
    network = {"model": "small_networks:Small", "stages": {"stage1": "body", "logits": "classify"}}
    losses = {"ce": {}, "fitnet": {"stage": "stage1", "weight": 1.0}, "kd": {"temperature": 4.0}}
    teacher = {"base": "ce.yaml", "student": network, "epochs": 1, "folder": "runs/small_teacher"}
    own = {**teacher, "teacher": {"recipe": "small_teacher.yaml"}, "losses": losses, "folder": "runs/small"}
    for name, recipe in {"small_teacher.yaml": teacher, "small.yaml": own}.items():
        (recipes / name).write_text(yaml.safe_dump(recipe))
    run_train("small_teacher.yaml")
    for words in (["small.yaml"], ["small.yaml", *COMPILED]):
        if world == 1:
            run_train(*words)
        else:
            ranks(train, recipes, words)
    plain, compiled = (trace(recipes / "runs" / folder / "journal.jsonl") for folder in ("small", "compiled"))
    assert len(compiled) == len(plain)
    for mine, other in zip(compiled, plain, strict=True):
        assert mine == pytest.approx(other, rel=1e-3), mine["step"]
    assert compiled != plain  # other last bits: it was compiled
