"""Segmentation: counts of pixels from their definition, with plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gloo_ranks import Ranks
from PIL import Image
from torchmetrics.functional.classification import multiclass_confusion_matrix, multiclass_jaccard_index

from pipeline.batch import Batch, Outputs
from pipeline.tasks._base import Evaluation
from pipeline.tasks._masks import MASK, masks_at, upsampled
from pipeline.tasks.segmentation import Segmentation
from shards.manifest import IGNORED_VALUE

IMAGES, CLASSES = 5, 4


def draw(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return maps of logits [N, K, 3, 4] and masks [N, 6, 9], in which class 3 occurs nowhere."""
    random = torch.Generator().manual_seed(seed)
    logits_NKHW = torch.randn(IMAGES, CLASSES, 3, 4, generator=random)
    logits_NKHW[:, 3] -= 9
    mask_NHW = torch.randint(0, 4, (IMAGES, 6, 9), generator=random)
    return logits_NKHW, torch.where(mask_NHW == 3, IGNORED_VALUE, mask_NHW).to(torch.uint8)


def batch_of(mask_BHW: torch.Tensor) -> Batch:
    zeros_B = torch.zeros(len(mask_BHW), dtype=torch.int64)
    return Batch(torch.empty(len(mask_BHW), 0), zeros_B, zeros_B, {}, {MASK: mask_BHW})


def ious_by_loops(logits_NKHW: torch.Tensor, mask_NHW: torch.Tensor) -> tuple[list[float | None], float]:
    """Return the IoU of each class and the share of right pixels, in percent, pixel by pixel."""
    both, either, right, pixels = [0] * CLASSES, [0] * CLASSES, 0, 0
    for logits_KHW, mask_HW in zip(logits_NKHW, mask_NHW, strict=True):
        large = F.interpolate(logits_KHW[None], mask_HW.shape, mode="bilinear", align_corners=True)[0]
        for y in range(mask_HW.shape[0]):
            for x in range(mask_HW.shape[1]):
                label, guess = int(mask_HW[y, x]), int(large[:, y, x].argmax())
                if label == IGNORED_VALUE:
                    continue
                pixels += 1
                right += label == guess
                for k in range(CLASSES):
                    both[k] += label == k and guess == k
                    either[k] += label == k or guess == k
    return [100 * b / e if e else None for b, e in zip(both, either, strict=True)], 100 * right / pixels


def test_miou_is_its_definition_pixel_by_pixel_and_leaves_out_classes_that_occur_nowhere():
    logits_NKHW, mask_NHW = draw(0)
    ious, right = ious_by_loops(logits_NKHW, mask_NHW)
    known = [iou for iou in ious if iou is not None]
    task, batch, outputs = Segmentation(), batch_of(mask_NHW), Outputs(logits_NKHW, {})
    found = task.summarize([task.see(outputs, batch)])
    assert found.metrics == pytest.approx({"miou": np.mean(known), "pixel_accuracy": right})
    detail = task.detail(task.detail_rows(outputs, batch), CLASSES)
    assert ious[3] is None
    assert len(known) == 3
    assert detail.per_class is not None
    assert detail.per_class["iou"][:3] == pytest.approx(ious[:3])
    assert detail.per_class["iou"][3] is None
    assert detail.per_class["samples"] == [(mask_NHW == k).sum().item() for k in range(CLASSES)]
    assert detail.metrics["nll"] == pytest.approx(found.loss)


def test_confusion_and_iou_are_those_of_torchmetrics():
    logits_NKHW, mask_NHW = draw(1)
    task, batch, outputs = Segmentation(), batch_of(mask_NHW), Outputs(logits_NKHW, {})
    detail = task.detail(task.detail_rows(outputs, batch), CLASSES)
    guess_NHW = upsampled(logits_NKHW, mask_NHW).argmax(1)
    settings = {"num_classes": CLASSES, "ignore_index": IGNORED_VALUE}
    theirs_KK = multiclass_confusion_matrix(guess_NHW, mask_NHW.long(), **settings)
    assert detail.confusion is not None
    ours_KK = torch.zeros(CLASSES, CLASSES, dtype=torch.int64)
    for label, guess, pixels in detail.confusion:
        ours_KK[label, guess] = pixels
    assert torch.equal(ours_KK, theirs_KK)
    theirs_K = multiclass_jaccard_index(guess_NHW, mask_NHW.long(), average="none", **settings)
    assert detail.per_class is not None
    assert detail.per_class["iou"][:3] == pytest.approx((100 * theirs_K[:3]).tolist(), rel=1e-6)


def share_of(rank: int, world: int) -> Evaluation:
    logits_NKHW, mask_NHW = draw(2)
    task, rows = Segmentation(), torch.arange(IMAGES)[rank::world]
    rows = torch.cat([rows, rows[:1]])[: -(-IMAGES // world)]
    batch = batch_of(mask_NHW[rows])
    padded = torch.arange(len(rows)) * world + rank >= IMAGES
    batch = batch._replace(labels_B=torch.where(padded, -1, batch.labels_B))
    return task.summarize([task.see(Outputs(logits_NKHW[rows], {}), batch)])


def test_three_ranks_count_the_pixels_of_one(three_ranks: Ranks):
    alone = share_of(0, 1)
    for found in three_ranks(share_of):
        assert found.metrics == alone.metrics
        assert found.samples == alone.samples == IMAGES
        assert found.loss == pytest.approx(alone.loss, rel=1e-12)


@pytest.mark.parametrize("size", [(3, 4), (6, 9), (12, 20), (1, 1), (7, 5)])
def test_a_mask_at_another_size_takes_the_pixels_that_pil_takes(size: tuple[int, int]):
    _, mask_NHW = draw(3)
    expected = [
        np.asarray(Image.fromarray(mask.numpy()).resize(size[::-1], Image.Resampling.NEAREST)) for mask in mask_NHW
    ]
    assert masks_at(mask_NHW, *size).tolist() == np.stack(expected).tolist()


def test_the_training_metric_counts_pixels_with_a_class_at_the_size_of_the_logits():
    logits_NKHW, mask_NHW = draw(4)
    small_NHW = masks_at(mask_NHW, 3, 4)
    known = small_NHW != IGNORED_VALUE
    expected = 100 * (logits_NKHW.argmax(1)[known] == small_NHW[known]).float().mean()
    measured = Segmentation().measure_batch(Outputs(logits_NKHW, {}), batch_of(mask_NHW))
    assert measured.item() == pytest.approx(expected.item())
    empty = batch_of(torch.full_like(mask_NHW, IGNORED_VALUE))
    assert Segmentation().measure_batch(Outputs(logits_NKHW, {}), empty).item() == 0


def test_agreement_interpolates_logits_of_half_precision_as_the_counts_do():
    logits_NKHW = draw(7)[0].bfloat16()
    batch = batch_of(torch.zeros(IMAGES, 60, 90, dtype=torch.uint8))
    same, all_pixels = Segmentation().agreement(Outputs(logits_NKHW, {}), Outputs(logits_NKHW.float(), {}), batch)
    assert same == all_pixels == IMAGES * 60 * 90


def test_the_divergence_of_a_network_from_itself_is_zero_and_else_the_mean_over_the_pixels():
    logits_NKHW, _ = draw(5)
    other_NKHW, _ = draw(6)
    task, one, other = Segmentation(), Outputs(logits_NKHW, {}), Outputs(other_NKHW, {})
    assert task.divergence(one, one).abs().max() < 1e-12
    p, q = (x.double().softmax(1) for x in (logits_NKHW, other_NKHW))
    expected_N = (p * (p.log() - q.log())).sum(1).mean((1, 2))
    assert task.divergence(one, other).tolist() == pytest.approx(expected_N.tolist())
