"""A recipe may have torch compile its networks: the same training, but for rounding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from gloo_ranks import Ranks
from training_on_ranks import train

from pipeline.batch import Batch, Outputs
from pipeline.features.taps import FeatureTaps
from pipeline.models import create_model
from pipeline.models.stages import stages
from pipeline.teachers.frozen import TOLERANCE, Teacher
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


@pytest.mark.endurance
def test_a_compiled_teacher_gives_the_logits_and_maps_of_a_plain_one_within_the_tolerance_of_folding():
    """The compiler joins what folding leaves beside a convolution: its bias, the sum with the shortcut, the ReLU."""
    batch = Batch(torch.randn(12, 3, 32, 32), torch.zeros(12).long(), torch.arange(12), {})

    def answers(*, compiled: bool) -> Outputs:
        torch.manual_seed(0)
        model = create_model("cifar_resnet20", 10)
        teacher = Teacher(
            FeatureTaps(model, stages(model), {"all"}),
            batch=8,
            image_size=32,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        if compiled:
            teacher.taps.compile(dynamic=False)
        return teacher(batch)

    plain, compiled = answers(compiled=False), answers(compiled=True)
    assert compiled.features.keys() == plain.features.keys() == {"stage1", "stage2", "stage3"}
    pairs = [(compiled.logits_BK, plain.logits_BK)]
    pairs += [(compiled.features[name], plain.features[name]) for name in plain.features]
    changes = [((mine - other).abs().max() / other.abs().max()).item() for mine, other in pairs]
    assert 0 < max(changes) <= TOLERANCE  # other last bits: it was compiled
