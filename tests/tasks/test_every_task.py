"""Every task: what its metrics are, the same for any batches and on any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from gloo_ranks import Ranks
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.tasks._base import Evaluation
from pipeline.tasks._boxes import AREAS, BOXES, CLASSES, CROWD, DETECTIONS, LIKELY, SCALES, SIZES
from pipeline.tasks._high import HIGH
from pipeline.tasks._masks import MASK, upsampled
from pipeline.tasks._registry import find_task, known_tasks
from pipeline.tasks.multilabel import LABELS, MultiLabel, mean_average_precision
from shards.manifest import IGNORED_VALUE

every_task = pytest.mark.parametrize("name", known_tasks())
IMAGES, NUMBER = 31, 7
SIDE = 160
"""Of the images with boxes, in pixels."""


def split(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits of few distinct values, one class of each image, and several classes of each image."""
    draws = torch.Generator().manual_seed(seed)
    logits_NK = torch.randint(-4, 5, (IMAGES, NUMBER), generator=draws) / 2
    labels_N = torch.randint(NUMBER, (IMAGES,), generator=draws)
    return logits_NK, labels_N, (torch.rand(IMAGES, NUMBER, generator=draws) < 0.3).to(torch.uint8)


def maps(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return maps of logits of each image, [N, K, 2, 3], and masks of twice their size, some pixels without a class."""
    draws = torch.Generator().manual_seed(seed)
    logits_NKHW = torch.randint(-4, 5, (IMAGES, NUMBER, 2, 3), generator=draws) / 2
    masks_NHW = torch.randint(NUMBER + 1, (IMAGES, 4, 6), generator=draws)
    return logits_NKHW, torch.where(masks_NHW < NUMBER, masks_NHW, IGNORED_VALUE).to(torch.uint8)


def boxes(seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """Return detections that hit most objects, and the targets: three objects an image, of all sizes and classes."""
    draws = torch.Generator().manual_seed(seed)
    corners = torch.tensor([[0, 0, 16, 16], [20, 20, 68, 68], [60, 60, 160, 160]])
    boxes_N34 = corners.float().repeat(IMAGES, 1, 1)
    classes_N3 = torch.stack([torch.randperm(NUMBER, generator=draws)[:3] for _ in range(IMAGES)])
    moved_N34 = boxes_N34 + torch.randint(0, 9, (IMAGES, 3, 4), generator=draws)
    scores_N3 = torch.randint(1, 11, (IMAGES, 3), generator=draws) / 10
    guesses_N3 = torch.where(scores_N3 > 0.2, classes_N3, 0)
    targets = {
        BOXES: boxes_N34,
        CLASSES: classes_N3,
        CROWD: torch.zeros(IMAGES, 3, dtype=torch.bool),
        AREAS: (boxes_N34[..., 2:] - boxes_N34[..., :2]).prod(2),
        SIZES: torch.full((IMAGES, 2), SIDE),
        SCALES: torch.ones(IMAGES, 2),
    }
    return torch.cat([moved_N34, scores_N3[..., None], guesses_N3[..., None]], dim=2), targets


def pairs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return restored images of values in 0 … 1, the small images, and the true ones, twice as large, uint8."""
    draws = torch.Generator().manual_seed(seed)
    truth_NCHW = torch.randint(256, (IMAGES, 3, 16, 18), generator=draws, dtype=torch.uint8)
    restored_NCHW = (truth_NCHW + 30 * torch.randn(truth_NCHW.shape, generator=draws)) / 255
    return restored_NCHW, torch.rand(IMAGES, 3, 8, 9, generator=draws), truth_NCHW


def batches(rows: np.ndarray, size: int, name: str) -> Iterator[tuple[Outputs, Batch]]:
    """Yield those rows of the split in batches; a row beyond the split is padding, a copy of the last image."""
    logits_NK, labels_N, several_NK = split()
    logits_NKHW, masks_NHW = maps()
    found_N36, objects = boxes()
    restored_NCHW, small_NCHW, truth_NCHW = pairs()
    task = find_task(name)
    logits = restored_NCHW if task.of_images else logits_NKHW if task.of_pixels else logits_NK
    for start in range(0, len(rows), size):
        part = torch.from_numpy(rows[start : start + size])
        real_B, row_B = part < IMAGES, part.clamp(max=IMAGES - 1)
        labels_B, ids_B = (torch.where(real_B, x, -1) for x in (labels_N[row_B], row_B))
        targets = {LABELS: several_NK, MASK: masks_NHW, HIGH: truth_NCHW, **objects}
        targets = {name: values[row_B] for name, values in targets.items()}
        yield (
            Outputs(logits[row_B], {DETECTIONS: found_N36[row_B]}),
            Batch(small_NCHW[row_B], labels_B, ids_B, {}, targets),
        )


def evaluation(rank: int, world: int, name: str, size: int) -> Evaluation:
    """Return a task's metrics over a rank's share of the split, with padding where ranks are uneven."""
    rows = np.arange(-(-IMAGES // world)) * world + rank
    task = find_task(name)
    return task.summarize(task.see(*batch) for batch in batches(rows, size, name))


@every_task
def test_metrics_are_those_of_the_whole_split_for_any_batches_and_ranks(name: str, ranks: Ranks):
    whole = evaluation(0, 1, name, IMAGES)
    assert whole.samples == IMAGES
    others = [*(evaluation(0, 1, name, size) for size in (1, 8)), *ranks(evaluation, name, 4)]
    assert [other._replace(loss=None) for other in others] == [whole._replace(loss=None)] * len(others)
    if whole.loss is not None:
        assert [other.loss for other in others] == pytest.approx([whole.loss] * len(others), rel=1e-12)


def cross_entropy(logits_NK: np.ndarray, labels_N: np.ndarray) -> float:
    """Return the mean of log Σ exp z − z_y, from the definition."""
    return float(np.mean(np.log(np.exp(logits_NK).sum(1)) - logits_NK[np.arange(len(labels_N)), labels_N]))


def binary_cross_entropy(logits_NK: np.ndarray, several_NK: np.ndarray) -> float:
    """Return the mean of −log p of what is right about every class of every image, from the definition."""
    p_NK = 1 / (1 + np.exp(-logits_NK))
    return float(-np.mean(np.log(np.where(several_NK > 0, p_NK, 1 - p_NK))))


def test_the_loss_is_that_of_the_task_over_real_images_in_float64():
    logits_NK, labels_N, several_NK = (x.numpy() for x in split())
    logits_NK = logits_NK.astype(np.float64)
    logits_NKHW, masks_NHW = maps()
    pixels = upsampled(logits_NKHW.double(), masks_NHW).permute(0, 2, 3, 1).numpy()[masks_NHW.numpy() != IGNORED_VALUE]
    expected = {
        "classification": cross_entropy(logits_NK, labels_N),
        "multilabel": binary_cross_entropy(logits_NK, several_NK),
        "segmentation": cross_entropy(pixels, masks_NHW.numpy()[masks_NHW.numpy() != IGNORED_VALUE]),
        "super_resolution": np.abs(pairs()[0].double().numpy() - pairs()[2].numpy() / 255).mean(),
    }
    found = {name: evaluation(0, 1, name, 8).loss for name in known_tasks()}
    assert found.pop("detection") is None
    assert found == pytest.approx(expected, rel=1e-6)


def perfect_boxes() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return features of a network that finds every object with its class in the middle of the box, and targets."""
    found_N36, objects = boxes()
    found_N36 = torch.cat([objects[BOXES], torch.ones(IMAGES, 3, 1), objects[CLASSES][..., None]], dim=2)
    map_NKHW = torch.zeros(IMAGES, NUMBER, SIDE // 8, SIDE // 8)
    middles_N32 = (objects[BOXES][..., :2] + objects[BOXES][..., 2:]).long() // 16
    for image, (middles_32, classes_3) in enumerate(zip(middles_N32, objects[CLASSES], strict=True)):
        map_NKHW[image, classes_3, middles_32[:, 1], middles_32[:, 0]] = 1
    return {DETECTIONS: found_N36, "head.class.p3": map_NKHW}, objects


@every_task
def test_a_task_measures_what_it_names_and_a_perfect_network_reaches_a_hundred(name: str):
    task, (_, labels_N, several_NK) = find_task(name), split()
    masks_NHW, one_hot = maps()[1], torch.nn.functional.one_hot
    answers = {
        "classification": one_hot(labels_N, NUMBER),
        "detection": labels_N[:, None, None].new_zeros(IMAGES, 1, NUMBER),
        "multilabel": several_NK,
        "segmentation": one_hot(masks_NHW.long() % IGNORED_VALUE, NUMBER).permute(0, 3, 1, 2),
        "super_resolution": pairs()[2] / 255 + 0.5,
    }
    perfect, ids_N = answers[name] - 0.5, torch.arange(IMAGES)
    features, objects = perfect_boxes()
    targets = {LABELS: several_NK, MASK: masks_NHW, HIGH: pairs()[2], **objects}
    images = pairs()[1] if task.of_images else torch.empty(IMAGES, 0, SIDE, SIDE)
    batch = Batch(images, labels_N, ids_N, {}, targets)
    found = task.summarize([task.see(Outputs(perfect, features), batch)])
    assert list(found.metrics) == list(task.titles)
    assert set(found.metrics.values()) == {100.0}
    assert found.main == found.metrics[task.metric]
    assert task.measure_batch(Outputs(perfect, features), batch).item() == pytest.approx(100)


@every_task
def test_networks_agree_with_themselves_and_padding_is_no_decision(name: str):
    task = find_task(name)
    ((outputs, batch),) = batches(np.arange(IMAGES + 2), IMAGES + 2, name)
    same, decisions = task.agreement(outputs, outputs, batch).tolist()
    pixels = int((maps()[1] != IGNORED_VALUE).sum())
    found_N36 = outputs.features[DETECTIONS]
    twice = 2 * int((found_N36[:IMAGES, :, 4] >= LIKELY).sum())
    expected = {"classification": IMAGES, "multilabel": IMAGES * NUMBER, "segmentation": pixels, "detection": twice}
    expected["super_resolution"] = pairs()[2].numel()
    assert same == decisions == expected[name]
    other = Outputs(-outputs.logits - 0.25, {DETECTIONS: found_N36 + torch.tensor([0.0, 0, 0, 0, 0, 1])})
    assert task.agreement(outputs, other, batch)[0] < decisions


def average_precision(scores: list[float], labels: list[int]) -> float:
    """Return Σ (Rₙ − Rₙ₋₁)·Pₙ over the distinct scores as thresholds, the highest first, from the definition."""
    total, before, result = sum(labels), 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        kept = [label for score, label in zip(scores, labels, strict=True) if score >= threshold]
        recall, precision = sum(kept) / total, sum(kept) / len(kept)
        result, before = result + (recall - before) * precision, recall
    return result


@given(seed=st.integers(0, 10_000), images=st.integers(1, 40), values=st.integers(1, 50), share=st.floats(0, 1))
def test_mean_average_precision_is_its_definition_also_with_equal_scores(
    seed: int, images: int, values: int, share: float
):
    draws = np.random.default_rng(seed)
    scores_NK, labels_NK = draws.integers(values, size=(images, 4)) / 8, draws.random((images, 4)) < share
    known = [
        average_precision(scores_NK[:, k].tolist(), labels_NK[:, k].tolist()) for k in range(4) if labels_NK[:, k].any()
    ]
    found = mean_average_precision(torch.from_numpy(scores_NK), torch.from_numpy(labels_NK.astype(np.uint8)))
    assert found == pytest.approx(np.mean(known) if known else 0, abs=1e-12)


def test_f1_counts_all_decisions_together():
    logits_BK = torch.tensor([[1.0, -1.0, 2.0], [-1.0, -1.0, -1.0]])
    labels_BK = torch.tensor([[1, 1, 0], [0, 0, 1]], dtype=torch.uint8)
    zeros_B = torch.zeros(2).long()
    batch = Batch(torch.empty(2, 0), zeros_B, zeros_B, {}, {LABELS: labels_BK})
    # One class is found, two are predicted, and the images have three.
    assert MultiLabel().measure_batch(Outputs(logits_BK, {}), batch).item() == pytest.approx(100 * 2 * 1 / (2 + 3))


def test_an_unknown_task_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="no task 'segmenting'; known are classification, detection, multilabel, seg"):
        find_task("segmenting")
