"""All measures of a split: against float64 loops and torchmetrics, the same on one, two and three ranks."""

from __future__ import annotations

import contextlib
import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator
from gloo_ranks import Ranks
from torch import Tensor
from torchmetrics.functional import classification as metrics

from pipeline.batch import Batch, Outputs
from pipeline.features.taps import FeatureTaps
from pipeline.tasks._registry import find_task
from pipeline.tasks.multilabel import LABELS, average_precisions
from pipeline.teachers.frozen import Teacher
from pipeline.training.comparison import Comparison, SplitClasses, compare_networks

IMAGES, CLASSES = 37, 7
ACCELERATOR = cast(Accelerator, SimpleNamespace(deepspeed_plugin=None, autocast=contextlib.nullcontext))
ALL = SplitClasses(tuple("abcdefg"))


def split() -> tuple[Tensor, Tensor, Tensor]:
    """Return a student's logits, which are the images too, the labels, and several classes of each image."""
    draws = torch.Generator().manual_seed(0)
    logits_NK, labels_N = 2 * torch.randn(IMAGES, CLASSES, generator=draws), torch.arange(IMAGES) % (CLASSES - 1)
    logits_NK[0, labels_N[0]] = 90  # a probability of exactly 1
    return logits_NK, labels_N, (torch.rand(IMAGES, CLASSES, generator=draws) < 0.3).to(torch.uint8)


class Student(torch.nn.Module):
    """A network whose logits are its images."""

    def forward(self, images: Tensor, targets: dict[str, Tensor]) -> Outputs:
        return Outputs(images, {})


def teacher(batch: Batch) -> Outputs:
    """Return the logits of another network, in half precision."""
    return Outputs((batch.images_BCHW.roll(1, 1) + batch.images_BCHW).bfloat16(), {})


def compare(
    rank: int, world: int, name: str, size: int, with_teacher: bool = True, classes: SplitClasses = ALL
) -> Comparison:
    """Return the measures over a rank's share of the split; ranks are uneven, and have padding."""
    logits_NK, labels_N, several_NK = split()
    ids = torch.arange(-(-IMAGES // world)) * world + rank
    batches = []
    for part in ids.split(size):
        real_B, row_B = part < IMAGES, part.clamp(max=IMAGES - 1)
        labels_B, ids_B = (torch.where(real_B, x, -1) for x in (labels_N[row_B], row_B))
        batches.append(Batch(logits_NK[row_B], labels_B, ids_B, {}, {LABELS: several_NK[row_B]}))
    student, other = cast(FeatureTaps, Student()), cast(Teacher, teacher) if with_teacher else None
    return compare_networks(find_task(name), student, other, batches, ACCELERATOR, classes)


@pytest.mark.parametrize("name", ["classification", "multilabel"])
def test_all_measures_are_the_same_to_the_last_bit_on_any_number_of_ranks(name: str, several_ranks: Ranks):
    whole = compare(0, 1, name, IMAGES)
    assert whole.samples == IMAGES
    assert compare(0, 1, name, 5) == whole
    assert several_ranks(compare, name, 4) == [whole] * several_ranks.world


def test_measures_of_images_of_one_class_are_those_of_torchmetrics_and_of_plain_loops():
    logits_NK, labels_N, _ = split()
    found = compare(0, 1, "classification", 8)
    networks = {
        "student": logits_NK.double(),
        "teacher": teacher(Batch(logits_NK, labels_N, labels_N, {})).logits.double(),
    }
    for name, scores_NK in networks.items():
        details = getattr(found, name)
        assert details.metrics == pytest.approx(oracle(scores_NK, labels_N), rel=1e-6)  # torchmetrics: float32
        confusion_KK = torch.zeros(CLASSES, CLASSES, dtype=torch.int64)
        for true, predicted, count in details.confusion:
            assert count > 0
            confusion_KK[true, predicted] = count
        assert torch.equal(confusion_KK, metrics.multiclass_confusion_matrix(scores_NK, labels_N, CLASSES))
        recall_K = metrics.multiclass_recall(scores_NK, labels_N, CLASSES, average=None)
        shares = [
            right / max(all_, 1)
            for right, all_ in zip(*(details.per_class[key] for key in ("correct", "samples")), strict=True)
        ]
        assert shares == pytest.approx(recall_K.tolist())
        assert details.per_class["samples"] == torch.bincount(labels_N, minlength=CLASSES).tolist()
        assert binned_error(details.reliability) == pytest.approx(details.metrics["ece"])
    student, other = networks.values()
    same = sum(int(a.argmax() == b.argmax()) for a, b in zip(student, other, strict=True))
    assert found.agreement == pytest.approx(100 * same / IMAGES)
    p_NK, log_q_NK = other.softmax(1), student.log_softmax(1)
    terms = [
        p * (math.log(p) - log_q) for p, log_q in zip(p_NK.flatten().tolist(), log_q_NK.flatten().tolist(), strict=True)
    ]
    assert found.kl == pytest.approx(math.fsum(terms) / IMAGES, rel=1e-9)


def oracle(scores_NK: Tensor, labels_N: Tensor) -> dict[str, float]:
    """Return the metrics in plain float64, and the calibration error of torchmetrics from all probabilities."""
    ranked = scores_NK.argsort(dim=1, descending=True, stable=True).tolist()
    rows = list(zip(ranked, labels_N.tolist(), scores_NK.tolist(), strict=True))
    # A probability of exactly 1 has a bin of its own in torchmetrics.
    shares_NK = scores_NK.softmax(1).clamp(max=1 - 2**-53)
    ece = metrics.multiclass_calibration_error(shares_NK, labels_N, scores_NK.shape[1], 15)
    return {
        "top1": 100 * sum(label == order[0] for order, label, _ in rows) / IMAGES,
        "top5": 100 * sum(label in order[:5] for order, label, _ in rows) / IMAGES,
        "nll": math.fsum(math.log(math.fsum(map(math.exp, row))) - row[label] for _, label, row in rows) / IMAGES,
        "ece": 100 * ece.item(),
    }


def binned_error(reliability: dict[str, list[Any]]) -> float:
    """Return the expected calibration error of the bins, in percent."""
    assert len(reliability["samples"]) == 15
    assert sum(reliability["samples"]) == IMAGES
    bins = zip(reliability["samples"], reliability["confidence"], reliability["accuracy"], strict=True)
    return 100 * sum(count * abs(accuracy - confidence) for count, confidence, accuracy in bins) / IMAGES


def test_logits_of_classes_that_the_split_does_not_have_are_left_out():
    logits_NK, labels_N, _ = split()
    # The shards' labels 0 … 5 are the network's classes 6, 5, 4, 3, 2, 1, and 0 is in none.
    classes = SplitClasses(tuple("bcdefg"), torch.arange(1, 7), torch.tensor([5, 4, 3, 2, 1, 0]))
    found = compare(0, 1, "classification", 8, True, classes)
    expected = oracle(logits_NK[:, 1:].double(), 5 - labels_N)
    assert found.student.metrics == pytest.approx(expected, rel=1e-6)
    assert found.student.per_class is not None
    assert len(found.student.per_class["samples"]) == 6


def test_with_accepted_labels_any_of_them_is_right_and_images_without_one_are_left_out(several_ranks: Ranks):
    logits_NK, _, _ = split()
    accepted_NK = torch.rand(IMAGES, CLASSES, generator=torch.Generator().manual_seed(1)) < 0.3
    accepted_NK[3] = False
    classes = ALL._replace(accepted_NK=accepted_NK)
    found = compare(0, 1, "classification", 8, True, classes)
    kept = accepted_NK.any(1).nonzero().flatten().tolist()
    right = sum(bool(accepted_NK[image, logits_NK[image].argmax()]) for image in kept)
    among_five = sum(bool(accepted_NK[image, logits_NK[image].topk(5).indices].any()) for image in kept)
    assert found.samples == len(kept) < IMAGES
    assert found.student.metrics["top1"] == pytest.approx(100 * right / len(kept))
    assert found.student.metrics["top5"] == pytest.approx(100 * among_five / len(kept))
    assert (found.student.metrics["nll"], found.student.confusion, found.student.per_class) == (None, None, None)
    assert several_ranks(compare, "classification", 4, True, classes) == [found] * several_ranks.world


@pytest.mark.filterwarnings("ignore:No positive samples")
def test_measures_of_images_of_several_classes_are_those_of_the_task_and_of_each_class():
    logits_NK, labels_N, several_NK = split()
    several_NK[:, 2] = 0  # a class without an image
    task, ids_N = find_task("multilabel"), torch.arange(IMAGES)
    batch = Batch(logits_NK, torch.zeros_like(labels_N), ids_N, {}, {LABELS: several_NK})
    found = compare_networks(task, cast(FeatureTaps, Student()), None, [batch], ACCELERATOR, ALL).student
    assert {key: found.metrics[key] for key in task.titles} == task.summarize(
        [task.see(Outputs(logits_NK, {}), batch)]
    ).metrics
    assert (found.metrics["nll"], found.metrics["ece"], found.confusion, found.reliability) == (None, None, None, None)
    assert found.per_class is not None
    theirs = metrics.multilabel_average_precision(logits_NK, several_NK.long(), CLASSES, average=None)
    for index, average in enumerate(found.per_class["average_precision"]):
        assert average is None if index == 2 else average == pytest.approx(100 * theirs[index].item(), rel=1e-5)
    assert found.per_class["samples"] == several_NK.sum(0).tolist()
    assert average_precisions(logits_NK, several_NK)[2] == 0


def test_outputs_that_are_not_finite_have_no_likelihood_and_no_calibration():
    batch = Batch(torch.full((3, CLASSES), torch.nan), torch.arange(3), torch.arange(3), {})
    found = compare_networks(
        find_task("classification"), cast(FeatureTaps, Student()), None, [batch], ACCELERATOR, ALL
    ).student
    assert (found.metrics["nll"], found.metrics["ece"], found.reliability) == (None, None, None)
