"""A recipe may have torch compile its networks: the same training, but for rounding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from pipeline.journal import trace

NETWORK = """
from torch import nn


class Small(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8), nn.ReLU())
        self.classify = nn.Linear(8, num_classes)

    def forward(self, images):
        return self.classify(self.body(images).mean((2, 3)))
"""


@pytest.mark.endurance
def test_compiled_networks_train_as_plain_ones_do(
    run_train: Callable[..., None], recipes: Path, monkeypatch: pytest.MonkeyPatch
):
    (recipes / "small_network.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(str(recipes))
    network = {"model": "small_network:Small", "stages": {"stage1": "body", "logits": "classify"}}
    losses = {"ce": {}, "fitnet": {"stage": "stage1", "weight": 1.0}, "kd": {"temperature": 4.0}}
    teacher = {"base": "ce.yaml", "student": network, "epochs": 1, "folder": "runs/small_teacher"}
    own = {**teacher, "teacher": {"recipe": "small_teacher.yaml"}, "losses": losses, "folder": "runs/small"}
    for name, recipe in {"small_teacher.yaml": teacher, "small.yaml": own}.items():
        (recipes / name).write_text(yaml.safe_dump(recipe))
    run_train("small.yaml")
    run_train("small.yaml", "folder=runs/compiled", "student.compile=true", "teacher.compile=true")
    plain, compiled = (trace(recipes / "runs" / folder / "journal.jsonl") for folder in ("small", "compiled"))
    assert len(compiled) == len(plain)
    for mine, other in zip(compiled, plain, strict=True):
        assert mine == pytest.approx(other, rel=1e-3), mine["step"]
    assert compiled != plain  # other last bits: it was compiled
