"""A user's loss and network train by being named in a recipe: one file and one recipe, no edit of the project."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from pipeline.training.journal import trace

LOSS = '''
"""The student's embedding, through a linear layer, near the teacher's logits."""

import torch.nn.functional as F
from torch import nn

from pipeline.losses import Loss, Taps


def toy_loss(student_BK, teacher_BK):
    return F.mse_loss(student_BK, teacher_BK)


class Toy(Loss):
    class Config(Loss.Config):
        stage: str

        def taps(self):
            return Taps(student=frozenset([self.stage]))

    def __init__(self, config, facts):
        super().__init__(config, facts)
        self.head = nn.Linear(facts.student_shapes[config.stage][0], facts.num_classes)

    def forward(self, student, teacher, batch):
        seen_BK = self.autocast_call(self.head, student.features[self.config.stage])
        return {"toy": toy_loss(seen_BK, teacher.logits_BK.detach())}
'''
NETWORK = '''
"""Two layers, and a map with its channels last."""

from torch import nn


class Small(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.ReLU())
        self.last = nn.Identity()
        self.classify = nn.Linear(8, num_classes)

    def forward(self, images):
        return self.classify(self.last(self.body(images).movedim(1, -1)).mean((1, 2)))


def small(num_classes):
    return Small(num_classes)
'''


@pytest.fixture
def own(recipes: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a user's modules ``toy_loss`` and ``toy_network``, on the module path."""
    (recipes / "toy_loss.py").write_text(LOSS)
    (recipes / "toy_network.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(recipes)
    return recipes


def write(own: Path, **recipe: object) -> None:
    """Write ``toy.yaml``: the recipe over the tiny ``ce.yaml``, with the tiny teacher."""
    whole = {"base": "ce.yaml", "teacher": {"recipe": "teacher.yaml"}, "folder": "runs/toy", **recipe}
    (own / "toy.yaml").write_text(yaml.safe_dump(whole))


def test_a_toy_loss_in_a_users_module_trains_its_head_and_is_left_out_at_export(
    run_train: Callable[..., None], own: Path
):
    write(own, losses={"toy_loss:Toy": {"stage": "embedding", "weight": 2.0}})
    run_train("toy.yaml")
    steps = [line for line in trace(own / "runs" / "toy" / "journal.jsonl") if "total" in line]
    assert {"ce", "toy_loss:Toy/toy", "total"} <= steps[0].keys()
    assert steps[-1]["toy_loss:Toy/toy"] < steps[0]["toy_loss:Toy/toy"]
    assert steps[0]["total"] == pytest.approx(steps[0]["ce"] + steps[0]["toy_loss:Toy/toy"], rel=1e-6)
    (checkpoint,) = sorted((own / "runs" / "toy" / "checkpoints").glob("step-*"))[-1:]
    heads = [key for key in load_file(checkpoint / "distiller.safetensors") if key.endswith("head.weight")]
    assert heads == ["losses.toy_loss:Toy.head.weight"]
    assert not any("head" in key for key in load_file(own / "runs" / "toy" / "student.safetensors"))


def test_a_users_network_is_distilled_into_by_the_stages_it_names(run_train: Callable[..., None], own: Path):
    stages = {"stage1": "body", "stage2": "last:nhwc", "embedding": "classify:in"}
    losses = {"at": {"p": 2.0, "stages": "all"}, "rkd": {"distance_weight": 1, "angle_weight": 2, "stage": "embedding"}}
    write(own, student={"model": {"path": "toy_network:small", "stages": stages}}, losses=losses)
    run_train("toy.yaml")
    result = json.loads((own / "runs" / "toy" / "result.json").read_text())
    assert result["model"] == "toy_network:small"
    assert result["parameters"] == sum(
        map(torch.Tensor.numel, load_file(own / "runs/toy/student.safetensors").values())
    )
    steps = [line for line in trace(own / "runs" / "toy" / "journal.jsonl") if "total" in line]
    assert {"ce", "at", "rkd/distance", "rkd/angle"} <= steps[0].keys()
