"""A frozen segmentation network answers like the network itself, folded and in half precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.batch import Batch, Outputs
from pipeline.features.taps import FeatureTaps
from pipeline.models import create_model
from pipeline.models.stages import stages
from pipeline.teachers.frozen import Teacher

SIZE = (32, 64)
# name: arguments, and the taps besides ``stage4`` and ``decode``
NETWORKS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "deeplabv3_resnet18": ({"width": 0.125}, ("aux", "logits")),
    "pspnet_resnet18": ({"width": 0.125, "stem": "deep"}, ()),
    "deeplabv3_mobilenet_v2": ({"width": 0.25}, ()),
    "deeplabv3_mobilenet_v3_large": ({}, ("aux",)),
    "lraspp_mobilenet_v3_large": ({}, ()),
    "deeplabv3_resnet34": ({"width": 0.125, "output_stride": 16}, ("stage3.preact",)),
    "plain_fpn": ({"width": 4}, ("stage1",)),
}


def taps_of(name: str) -> FeatureTaps:
    """Return the network with its taps, in evaluation mode, with BatchNorms that have seen something."""
    torch.manual_seed(0)
    arguments, wanted = NETWORKS[name]
    model = create_model(name, 7, arguments)
    taps = FeatureTaps(model, stages(model), ("stage4", "decode", *wanted))
    with torch.no_grad():
        for _ in range(2):
            taps(2 * images(4) + 1)
    return taps.eval()


def images(rows: int) -> Tensor:
    return torch.randn(rows, 3, *SIZE, generator=torch.Generator().manual_seed(1))


def answers(name: str, **keys: Any) -> tuple[Teacher, Outputs]:
    defaults = {"batch": 2, "image_size": SIZE, "dtype": torch.float32, "device": torch.device("cpu")}
    teacher = Teacher(taps_of(name), **{**defaults, **keys})
    labels = torch.zeros(3, dtype=torch.int64)
    return teacher, teacher(Batch(images(3), labels, labels, {}))


def largest_change(found: Outputs, expected: Outputs) -> float:
    pairs = [(found.logits, expected.logits), *((found.features[k], v) for k, v in expected.features.items())]
    assert all(one.shape == other.shape for one, other in pairs)
    return max(((one.float() - other).abs().max() / other.abs().max()).item() for one, other in pairs)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_folded_segmentation_teacher_answers_what_the_network_does(name: str):
    with torch.no_grad():
        expected = taps_of(name)(images(3))
    teacher, found = answers(name)
    assert found.logits.shape[:2] == (3, 7)
    assert largest_change(found, expected) < 1e-5
    left = [path for path, module in teacher.taps.model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    # An auxiliary head that no loss reads never runs, so its BatchNorm stays.
    assert [path for path in left if not path.startswith("aux_classifier.")] == []
    assert left == [] or "aux" not in NETWORKS[name][1]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_a_segmentation_teacher_computes_in_half_precision(name: str, dtype: torch.dtype):
    with torch.no_grad():
        expected = taps_of(name)(images(3))
    _, found = answers(name, dtype=dtype)
    assert found.logits.dtype == dtype
    assert largest_change(found, expected) < (0.05 if dtype == torch.bfloat16 else 0.01)


def test_a_segmentation_teacher_has_the_shapes_of_another_size():
    teacher, _ = answers("deeplabv3_resnet18")
    assert teacher.shapes((64, 32)) == {
        "stage4": (64, 8, 4),
        "decode": (16, 8, 4),
        "aux": (7, 8, 4),
        "logits": (7, 8, 4),
    }
    assert teacher.shapes(64)["logits"] == (7, 8, 8)
