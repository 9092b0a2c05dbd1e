"""Detection's own losses: torchvision's to the last bit, over all ranks, without crowds, and with images of no box."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gloo_ranks import Ranks
from loss_cases import PROGRESS, boxes_of, example
from torch import Tensor, nn
from torchvision.models.detection import FCOS, RetinaNet

from pipeline.batch import Batch, Outputs
from pipeline.distiller import Distiller
from pipeline.features.taps import FeatureTaps, tap_shapes
from pipeline.losses._base import Facts
from pipeline.losses._registry import LossSpec, load_spec
from pipeline.losses.detection import PARTS
from pipeline.models import create_model
from pipeline.models.stages import stages
from pipeline.tasks._boxes import BOXES, CLASSES, CROWD
from pipeline.tasks.detection import Detection

NETWORKS = [("plain_retinanet", RetinaNet, "image"), ("fcos_resnet18", FCOS, "batch")]
NO_TEACHER: Any = None


def spec_of(**config: Any) -> LossSpec:
    return load_spec("detection", config)


def tapped(name: str, taps: frozenset[str]) -> FeatureTaps:
    torch.manual_seed(0)
    model = create_model(name, 5)
    return FeatureTaps(model, stages(model), taps)


def batch_of(rows: int, **changed: Tensor) -> Batch:
    images = torch.randn(rows, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    zeros_B = torch.zeros(rows, dtype=torch.int64)
    return Batch(images, zeros_B, zeros_B, {}, boxes_of(rows) | changed)


def parts_of(spec: LossSpec, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
    shapes = {name: tuple(x.shape[1:]) for name, x in outputs.features.items()}
    return spec.build(Facts(5, shapes)).parts(outputs, NO_TEACHER, batch, PROGRESS)


@pytest.mark.parametrize(("name", "kind", "normalizer"), NETWORKS)
def test_the_losses_are_torchvisions_to_the_last_bit(name: str, kind: Any, normalizer: str):
    spec = spec_of(normalizer=normalizer)
    taps, batch = tapped(name, spec.config.taps().student), batch_of(4)
    model: Any = taps.model
    plain = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3, "_skip_resize": True}
    theirs = kind(model.backbone, 5, anchor_generator=model.anchor_generator, head=model.head, **plain)
    columns = zip(*(batch.targets[key] for key in (BOXES, CLASSES, CROWD)), strict=True)
    targets = [{"boxes": boxes[k := (labels >= 0) & ~crowd], "labels": labels[k]} for boxes, labels, crowd in columns]
    assert [len(each["labels"]) for each in targets] == [2, 2, 0, 2]
    expected = theirs.train()(list(batch.images_BCHW), targets)
    found = parts_of(spec, taps.train()(batch.images_BCHW), batch)
    assert {name: value.item() for name, value in found.items()} == {
        PARTS[name]: value.item() for name, value in expected.items()
    }


def test_the_distance_of_boxes_may_be_the_generalised_iou():
    found = {}
    for distance in ("l1", "giou"):
        case = example("detection", spec_of(distance=distance))
        found[distance] = case.parts()
    assert found["l1"]["class"] == found["giou"]["class"]
    assert 0 < found["giou"]["box"] < 2
    assert found["l1"]["box"] != found["giou"]["box"]


@pytest.mark.parametrize("columns", [4, 5])
@pytest.mark.parametrize("normalizer", ["image", "batch"])
def test_a_crowd_is_no_target_and_padding_has_no_box(normalizer: str, columns: int):
    case = example("detection", spec_of(normalizer=normalizer), student=shapes(columns))
    targets = case.batch.targets
    moved = {**targets, BOXES: targets[BOXES] + 7.0 * targets[CROWD][..., None]}
    more = {key: torch.cat([value, torch.zeros_like(value[:, :1])], 1) for key, value in moved.items()}
    more[CLASSES][:, -1] = -1
    for other in (moved, more):
        assert case._replace(batch=case.batch._replace(targets=other)).parts() == case.parts()
    crowds = {**targets, CROWD: torch.ones_like(targets[CROWD])}
    assert case.parts()["box"] > case._replace(batch=case.batch._replace(targets=crowds)).parts()["box"] == 0


def shapes(columns: int) -> dict[str, tuple[int, ...]]:
    return {"anchors": (24, 4), "regression": (24, columns)}


@pytest.mark.parametrize("columns", [4, 5])
def test_a_batch_is_divided_by_its_matched_anchors_and_an_image_by_its_own(columns: int):
    alone, together = [], []
    for rows in ([0], [1], [0, 1]):
        of_image, of_batch = (
            example("detection", spec_of(normalizer=each), student=shapes(columns)).at(rows).parts()
            for each in ("image", "batch")
        )
        alone.append(of_image["box"].item())
        together.append(of_batch["box"].item())
    assert alone[:2] == pytest.approx(together[:2], rel=1e-12)
    assert alone[2] == pytest.approx(sum(alone[:2]) / 2, rel=1e-12)
    assert min(together[:2]) < together[2] < max(together[:2])


def of_a_rank(rank: int, world: int, columns: int) -> list[float]:
    """Return the total and the sums of the gradients of a rank's images; two of all have no box."""
    size = 6 // world
    case = example("detection", spec_of(normalizer="batch"), student=shapes(columns))
    case = case.at(list(range(rank * size, (rank + 1) * size)))
    total = case.total()
    total.backward()
    return [total.item(), *(x.grad.sum().item() / world for x in case.student_tensors())]


@pytest.mark.parametrize("columns", [4, 5])
def test_ranks_with_unequal_numbers_of_matched_anchors_are_one_process(columns: int, several_ranks: Ranks):
    total, *gradients = of_a_rank(0, 1, columns)
    answers = several_ranks(of_a_rank, columns)
    assert sum(answer[0] for answer in answers) / len(answers) == pytest.approx(total, rel=1e-12)
    for number, expected in enumerate(gradients, start=1):
        assert sum(answer[number] for answer in answers) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("name", "_kind", "normalizer"), NETWORKS)
def test_a_batch_without_any_box_has_finite_losses_and_a_gradient_for_every_parameter(
    name: str, _kind: Any, normalizer: str
):
    task, spec = Detection(), spec_of(normalizer=normalizer)
    taps = tapped(name, spec.config.taps().student | {"head.class.p3"})
    batch = batch_of(2, **task.blank_targets(2, 5, (64, 96)))
    facts = Facts(5, tap_shapes(taps, (64, 96)))
    found = Distiller(taps, {"detection": spec}, facts, task)(batch, None, PROGRESS)
    assert all(value.isfinite() for value in found.values())
    assert found["detection/class"] > 0
    assert found["detection/box"] == 0
    found["total"].backward()
    model: nn.Module = taps.model
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


def test_the_losses_are_counted_on_the_meta_device():
    with torch.device("meta"):
        taps = tapped("plain_retinanet", spec_of().config.taps().student)
        batch = batch_of(2)._replace(images_BCHW=torch.empty(2, 3, 64, 96))
        parts = parts_of(spec_of(), taps(batch.images_BCHW), batch)
    torch.stack(list(parts.values())).sum().backward()
    assert all(parameter.grad is not None for parameter in taps.parameters())
