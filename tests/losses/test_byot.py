"""The exits of a network that teaches itself."""

from __future__ import annotations

import pytest
import torch
from loss_cases import CLASSES, PROGRESS, config_of, example
from torch import nn

from pipeline.distiller import Distiller
from pipeline.features.taps import FeatureTaps, tap_shapes
from pipeline.losses._base import Facts
from pipeline.losses._registry import load_spec


def test_kd_and_the_features_send_nothing_to_the_end_of_the_network():
    case = example("byot", load_spec("byot", {**config_of("byot"), "alpha": 1.0}))
    case.total().backward()
    for end in (case.student.logits, case.student.features["embedding"], case.student.features["stage2"]):
        assert end.grad is None
    assert case.student.features["stage1"].grad is not None


def test_the_accuracy_of_each_exit_is_in_the_journal_and_in_no_sum():
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(3, 4, 3, stride=2), nn.Conv2d(4, 8, 2, stride=2)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES)),
    )
    spec = load_spec("byot", config_of("byot"))
    student = FeatureTaps(network, {"stage1": "0", "stage2": "1", "embedding": "4:in"}, spec.config.taps().student)
    model = Distiller(student, {"byot": spec}, Facts(CLASSES, tap_shapes(student, 17)))
    case = example("byot")
    outcome = model(case.batch._replace(images_BCHW=torch.randn(6, 3, 17, 17)), None, PROGRESS)
    assert list(outcome) == ["byot/ce", "byot/kd", "byot/feature", "total", "top1", "byot/stage1_top1"]
    assert outcome["total"].item() == sum(outcome[f"byot/{part}"] for part in ("ce", "kd", "feature")).item()
    right = outcome["byot/stage1_top1"].item() * 6 / 100
    assert right == pytest.approx(round(right))
