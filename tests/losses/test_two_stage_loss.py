"""The losses of a detector of two stages: torchvision's to the last bit, and those of one process on any ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gloo_ranks import Ranks
from loss_cases import PROGRESS, boxes_of
from oracles import two_stage_detection as oracle
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN

from pipeline.batch import Batch, Outputs
from pipeline.distiller import Distiller
from pipeline.features.taps import FeatureTaps, tap_shapes
from pipeline.losses._base import Facts
from pipeline.losses._registry import LossSpec, load_spec
from pipeline.models import create_model
from pipeline.models.box_sampling import sample_labels
from pipeline.models.stages import stages
from pipeline.tasks._boxes import BOXES, CLASSES, CROWD, DRAWS
from pipeline.tasks.detection import Detection

NO_TEACHER: Any = None
CLASSES_OF = 3
# Three anchors for a cell of maps of 2 × 3 and 1 × 2, and regions of an image.
MAPS = {"p3": (2, 3), "p4": (1, 2)}
ANCHORS, REGIONS = 3 * (6 + 2), 9
NAMES = {"loss_objectness": "rpn_class", "loss_rpn_box_reg": "rpn_box", "loss_classifier": "class"}
NAMES["loss_box_reg"] = "box"


def spec_of(**config: Any) -> LossSpec:
    return load_spec("detection", config)


def tapped(name: str = "plain_fasterrcnn", *, seed: int = 0) -> FeatureTaps:
    torch.manual_seed(seed)
    model = create_model(name, 5, {"width": 4, "channels": 8} if name[0] == "p" else None)
    taps = FeatureTaps(model, stages(model), spec_of().config.taps().student | Detection.taps).train()
    # The random weights' regions would all be nearly the anchors.
    nn.init.normal_(model.get_submodule("rpn.head.bbox_pred").weight, std=0.05)  # type: ignore[arg-type]
    return taps


def batch_of(rows: int, **changed: Tensor) -> Batch:
    images = torch.randn(rows, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    zeros_B = torch.zeros(rows, dtype=torch.int64)
    return Batch(images, zeros_B, torch.arange(rows), {}, boxes_of(rows) | changed)


def parts_of(spec: LossSpec, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
    shapes = {name: tuple(x.shape[1:]) for name, x in outputs.features.items()}
    return spec.build(Facts(5, shapes)).parts(outputs, NO_TEACHER, batch, PROGRESS)


class SameChoice:
    """The choice of the network under test, in the form of torchvision's sampler."""

    def __init__(self, sampler: Any, seeds: list[int]) -> None:
        self.sampler = sampler
        self.seeds = seeds

    def __call__(self, labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        size, share = self.sampler.batch_size_per_image, self.sampler.positive_fraction
        found = [sample_labels(each, seed, size, share) for each, seed in zip(labels, self.seeds, strict=True)]
        return [each >= 1 for each in found], [each == 0 for each in found]


@pytest.mark.parametrize("name", ["plain_fasterrcnn", "fasterrcnn_resnet18"])
def test_the_losses_are_torchvisions_to_the_last_bit_with_the_same_choice(name: str):
    taps, batch, spec = tapped(name), batch_of(4), spec_of(normalizer="batch")
    model: Any = taps.model
    parts = {"rpn_anchor_generator": model.rpn.anchor_generator, "rpn_head": model.rpn.head}
    heads = {f"box_{part}": getattr(model.roi_heads, f"box_{part}") for part in ("roi_pool", "head", "predictor")}
    plain: Any = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3, "_skip_resize": True}
    plain |= {"box_batch_size_per_image": model.roi_heads.fg_bg_sampler.batch_size_per_image}
    theirs: Any = FasterRCNN(model.backbone, **parts, **heads, **plain).train()
    for number, stage in enumerate((theirs.rpn, theirs.roi_heads)):
        stage.fg_bg_sampler = SameChoice(stage.fg_bg_sampler, batch.targets[DRAWS][:, number].tolist())
    columns = zip(*(batch.targets[key] for key in (BOXES, CLASSES, CROWD)), strict=True)
    targets = [
        {"boxes": boxes[k := (labels >= 0) & ~crowd], "labels": labels[k] + 1} for boxes, labels, crowd in columns
    ]
    assert [len(each["labels"]) for each in targets] == [2, 2, 0, 2]
    expected = theirs(list(batch.images_BCHW), targets)
    found = parts_of(spec, taps(batch.images_BCHW, batch.targets), batch)
    assert {part: value.item() for part, value in found.items()} == {
        NAMES[part]: value.item() for part, value in expected.items()
    }


def drawn(rows: int, seed: int = 0) -> Outputs:
    """Return what a network may answer, in float64: labels of all kinds, and images with unequal numbers of them."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(rows, *shape, generator=draw, dtype=torch.float64)

    def boxes(count: int) -> Tensor:
        corners = 40 * torch.rand(rows, count, 2, generator=draw, dtype=torch.float64)
        return torch.cat([corners, corners + 4 + 30 * torch.rand(rows, count, 2, generator=draw).double()], 2)

    def targets(count: int, labels: int) -> Tensor:
        label_BN = torch.randint(-1, labels, (rows, count), generator=draw)
        label_BN[:, :2] = torch.tensor([0, 1])  # none of an image would be a mean of nothing
        return torch.cat([boxes(count), label_BN[..., None]], 2)

    features = {f"rpn.class.{level}": normal(3, *size).requires_grad_() for level, size in MAPS.items()}
    features |= {f"rpn.box.{level}": normal(12, *size).requires_grad_() for level, size in MAPS.items()}
    features |= {"anchors": boxes(ANCHORS), "rpn.targets": targets(ANCHORS, 2), "roi.boxes": boxes(REGIONS)}
    features |= {"roi.targets": targets(REGIONS, CLASSES_OF + 1)}
    features |= {"roi.class": (3 * normal(REGIONS, CLASSES_OF + 1)).requires_grad_()}
    features |= {"roi.box": normal(REGIONS, 4 * (CLASSES_OF + 1)).requires_grad_()}
    return Outputs(features["roi.class"][..., 1:], features)


def rows_of(outputs: Outputs, rows: slice) -> Outputs:
    features = {name: x.detach()[rows].requires_grad_(x.requires_grad) for name, x in outputs.features.items()}
    return Outputs(features["roi.class"][..., 1:], features)


@pytest.mark.parametrize("normalizer", ["image", "batch"])
def test_the_losses_are_the_sums_of_plain_loops(normalizer: str):
    outputs = drawn(4)
    images = [{name: x[row].tolist() for name, x in outputs.features.items()} for row in range(4)]
    found = parts_of(spec_of(normalizer=normalizer), outputs, batch_of(4))
    expected = oracle.parts(normalizer, images)
    assert {name: value.item() for name, value in found.items()} == pytest.approx(expected, rel=1e-12)
    assert all(value > 0.01 for value in expected.values())


def test_the_two_normalizers_differ_where_images_have_unequal_numbers():
    of_image, of_batch = (parts_of(spec_of(normalizer=each), drawn(4), batch_of(4)) for each in ("image", "batch"))
    assert all(abs(of_image[name] - of_batch[name]) > 1e-4 for name in of_image)


@pytest.mark.parametrize("normalizer", ["image", "batch"])
def test_the_gradients_are_those_of_finite_differences(normalizer: str):
    outputs, batch, spec = drawn(2), batch_of(2), spec_of(normalizer=normalizer)
    trained = {name: x for name, x in outputs.features.items() if x.requires_grad}

    def total(*values: Tensor) -> Tensor:
        features = outputs.features | dict(zip(trained, values, strict=True))
        return torch.stack([*parts_of(spec, Outputs(features["roi.class"], features), batch).values()]).sum()

    assert torch.autograd.gradcheck(total, tuple(trained.values()), fast_mode=True)


def of_a_rank(rank: int, world: int, normalizer: str) -> list[float]:
    """Return the total and the sums of the gradients of a rank's images."""
    size = 6 // world
    outputs = rows_of(drawn(6), slice(rank * size, (rank + 1) * size))
    parts = parts_of(spec_of(normalizer=normalizer), outputs, batch_of(size))
    total = torch.stack([*parts.values()]).sum()
    total.backward()
    gradients = [x.grad for x in outputs.features.values() if x.grad is not None]
    return [total.item(), *(gradient.sum().item() / world for gradient in gradients)]


@pytest.mark.parametrize("normalizer", ["image", "batch"])
def test_ranks_with_unequal_numbers_of_chosen_boxes_are_one_process(normalizer: str, several_ranks: Ranks):
    total, *gradients = of_a_rank(0, 1, normalizer)
    answers = several_ranks(of_a_rank, normalizer)
    assert sum(answer[0] for answer in answers) / len(answers) == pytest.approx(total, rel=1e-12)
    assert len(gradients) == 6
    for number, expected in enumerate(gradients, start=1):
        assert sum(answer[number] for answer in answers) == pytest.approx(expected, rel=1e-10, abs=1e-15)


def of_a_network(rank: int, world: int) -> list[float]:
    """Return the total of a rank's images, and gradients, through a whole network without batch statistics."""
    size, taps = 6 // world, tapped()
    for module in taps.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    sampler: Any = taps.model.get_submodule("roi_heads").fg_bg_sampler
    sampler.batch_size_per_image = 64  # of more regions, so that it matters which are chosen
    whole, rows = batch_of(6), slice(rank * size, (rank + 1) * size)
    targets = {name: x[rows] for name, x in whole.targets.items()}
    batch = Batch(*(x[rows] for x in whole[:3]), {}, targets)
    spec = spec_of(normalizer="batch")
    facts = Facts(5, tap_shapes(taps, (64, 96)))
    total = Distiller(taps, {"detection": spec}, facts, Detection())(batch, None, PROGRESS)["total"]
    total.backward()
    gradients = [parameter.grad for parameter in taps.parameters() if parameter.grad is not None]
    return [total.item(), *(gradient.double().sum().item() / world for gradient in gradients)]


def test_two_ranks_train_as_one_because_an_images_choice_is_its_own(ranks: Ranks):
    total, *gradients = of_a_network(0, 1)
    answers = ranks(of_a_network)
    assert sum(answer[0] for answer in answers) / 2 == pytest.approx(total, rel=1e-6)
    for number, expected in enumerate(gradients, start=1):
        assert sum(answer[number] for answer in answers) == pytest.approx(expected, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("normalizer", ["image", "batch"])
def test_a_batch_without_any_box_has_finite_losses_and_a_gradient_for_every_parameter(normalizer: str):
    task, spec, taps = Detection(), spec_of(normalizer=normalizer), tapped()
    batch = batch_of(2, **task.blank_targets(2, 5, (64, 96)))
    found = Distiller(taps, {"detection": spec}, Facts(5, tap_shapes(taps, (64, 96))), task)(batch, None, PROGRESS)
    assert all(value.isfinite() for value in found.values())
    assert found["detection/class"] > 0 < found["detection/rpn_class"]
    assert found["detection/box"] == found["detection/rpn_box"] == found["class_accuracy"] == 0
    found["total"].backward()
    for key, parameter in taps.model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


def test_the_training_metric_is_the_class_of_regions_on_an_object():
    outputs = drawn(4)
    right = counted = 0
    for image in range(4):
        for logits, target in zip(outputs.logits[image].tolist(), outputs.features["roi.targets"][image], strict=True):
            counted += int(target[4] > 0)
            right += int(target[4] > 0 and logits.index(max(logits)) + 1 == target[4])
    assert 0 < right < counted
    assert Detection().measure_batch(outputs, batch_of(4)).item() == pytest.approx(100 * right / counted)


def test_the_losses_and_their_work_are_counted_on_the_meta_device():
    with torch.device("meta"):
        taps = tapped()
        batch = batch_of(2)._replace(images_BCHW=torch.empty(2, 3, 64, 96))
        parts = parts_of(spec_of(), taps(batch.images_BCHW, batch.targets), batch)
    assert list(parts) == ["rpn_class", "rpn_box", "class", "box"]
    torch.stack(list(parts.values())).sum().backward()
    assert all(parameter.grad is not None for parameter in taps.parameters())


def test_the_generalised_iou_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"^distance: giou is of detectors of one stage; Faster R-CNN has Smooth L1"):
        parts_of(spec_of(distance="giou"), drawn(2), batch_of(2))
