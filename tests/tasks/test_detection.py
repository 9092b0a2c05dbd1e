"""Detection: what is measured of the boxes that a network finds, in the pixels of the stored images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from box_scenes import SCENE_CLASSES, draw_scene
from gloo_ranks import Ranks
from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.tasks._average_precision import average_precision_of_boxes, match_boxes
from pipeline.tasks._base import Evaluation
from pipeline.tasks._boxes import AREAS, BOXES, CLASSES, CROWD, DETECTIONS, SCALES, SIZES
from pipeline.tasks.detection import Detection

IMAGES, SIDE = 7, 320
SCENES = [draw_scene(seed) for seed in range(IMAGES)]


def padded(rows: list[np.ndarray], columns: int) -> np.ndarray:
    """Return the rows of each image, float64 [B, N, C], with rows of class −1 behind them; detections are 12."""
    count = 12 if columns == 6 else max(1, *map(len, rows), 0)
    found = np.zeros((len(rows), count, columns))
    found[..., 5 if columns == 6 else 4] = -1
    for number, each in enumerate(rows):
        found[number, : len(each)] = each
    return found


def batch_of(numbers: list[int], scales: tuple[float, float] = (1.0, 1.0)) -> tuple[Outputs, Batch]:
    """Return scenes whose stored images are 320 × 320, scaled along height and width; a number below 0 is padding."""
    scenes = [SCENES[number] if number >= 0 else (np.zeros((0, 6)), np.zeros((0, 7))) for number in numbers]
    along = torch.tensor(scales)[[1, 0, 1, 0]]
    found_BD6, objects_BN7 = (torch.from_numpy(padded([scene[part] for scene in scenes], 6 + part)) for part in (0, 1))
    # Of padding there are detections, and they count nowhere.
    found_BD6[[number < 0 for number in numbers]] = torch.tensor([5.0, 5, 90, 90, 1, 0]).double()
    targets = {
        BOXES: (objects_BN7[..., :4] * along).float(),
        CLASSES: objects_BN7[..., 4].long(),
        CROWD: objects_BN7[..., 5] > 0,
        AREAS: objects_BN7[..., 6].float(),
        SIZES: (SIDE * torch.tensor(scales)).long().repeat(len(numbers), 1),
        SCALES: torch.tensor(scales).repeat(len(numbers), 1),
    }
    features = {DETECTIONS: torch.cat([found_BD6[..., :4] * along, found_BD6[..., 4:]], dim=2).float()}
    ids_B = torch.tensor(numbers)
    batch = Batch(torch.empty(len(numbers), 0, 2 * SIDE, 2 * SIDE), ids_B.clamp(max=0), ids_B, {}, targets)
    return Outputs(torch.zeros(len(numbers), 1, SCENE_CLASSES), features), batch


def expected_metrics() -> dict[str, float]:
    # Scores are of float32 in a network's answer, areas in the targets.
    scenes = [
        (found.astype(np.float32).astype(float), objects.astype(np.float32).astype(float)) for found, objects in SCENES
    ]
    inside = [np.clip(found[:, :4], 0, SIDE) for found, _ in scenes]
    found_NM6 = padded(
        [np.concatenate([box, found[:, 4:]], 1) for box, (found, _) in zip(inside, scenes, strict=True)], 6
    )
    matched = [
        match_boxes(found, objects, SCENE_CLASSES) for found, (_, objects) in zip(found_NM6, scenes, strict=True)
    ]
    found = average_precision_of_boxes(*(np.stack(parts) for parts in zip(*matched, strict=True)))
    return {name: value for name, value in found.metrics.items() if value is not None}


def measured(*batches: tuple[Outputs, Batch]) -> Evaluation:
    task = Detection()
    return task.summarize([task.see(*each) for each in batches])


@pytest.mark.parametrize("scales", [(1.0, 1.0), (2.0, 0.5)])
def test_boxes_are_compared_in_pixels_of_the_stored_image(scales: tuple[float, float]):
    found = measured(batch_of([*range(IMAGES)], scales))
    assert found.metrics == expected_metrics()
    assert list(found.metrics) == list(Detection.titles)
    assert (found.samples, found.loss) == (IMAGES, None)


def test_a_detection_is_cut_off_where_the_image_ends_and_the_padding_begins():
    outputs, batch = batch_of([0])
    box = torch.tensor([10.0, 20, SIDE, 100])
    for name, values in {BOXES: box, CLASSES: torch.tensor(1), AREAS: torch.tensor(9999.0)}.items():
        batch.targets[name] = values.expand(1, 1, *values.shape).clone()
    batch.targets[CROWD] = torch.zeros(1, 1, dtype=torch.bool)
    beyond = torch.tensor([[[10.0, 20, 2 * SIDE, 100, 0.9, 1]]])
    found = measured((outputs._replace(features={DETECTIONS: beyond}), batch))
    assert found.metrics["ap"] == pytest.approx(100)
    assert "ap_small" not in found.metrics


def test_without_any_object_ap_is_zero_and_nothing_else_is_told():
    outputs, batch = batch_of([-1])
    batch = batch._replace(ids_B=torch.zeros(1, dtype=torch.int64), labels_B=torch.zeros(1, dtype=torch.int64))
    assert measured((outputs, batch)).metrics == {"ap": 0.0}


def share_of(rank: int, world: int) -> Evaluation:
    """Return what a rank finds that has every ``world``-th image, in batches of two; ranks pad their last batch."""
    numbers = [number if number < IMAGES else -1 for number in range(rank, world * -(-IMAGES // world), world)]
    return measured(*(batch_of(numbers[start : start + 2]) for start in range(0, len(numbers), 2)))


def test_three_ranks_find_the_very_numbers_of_one(three_ranks: Ranks):
    assert share_of(0, 1) == measured(batch_of([*range(IMAGES)]))
    assert three_ranks(share_of) == [share_of(0, 1)] * 3


def test_details_have_the_same_figures_and_those_of_each_class():
    task, (outputs, batch) = Detection(), batch_of([*range(IMAGES)])
    detail = task.detail(task.detail_rows(outputs, batch), SCENE_CLASSES)
    assert {name: value for name, value in detail.metrics.items() if value is not None} == expected_metrics()
    assert detail.per_class is not None
    objects = np.concatenate([objects for _, objects in SCENES])
    assert detail.per_class["samples"] == [
        int(((objects[:, 4] == number) & (objects[:, 5] == 0)).sum()) for number in range(SCENE_CLASSES)
    ]
    known = [value for value in detail.per_class["average_precision"] if value is not None]
    assert np.mean(known) == pytest.approx(detail.metrics["ap"])
    assert (detail.confusion, detail.reliability, task.divergence(outputs, outputs)) == (None, None, None)


def test_networks_agree_in_the_likely_boxes_of_one_class_and_place():
    _, batch = batch_of([0])
    ours = [[0, 0, 40, 40, 0.9, 1], [100, 100, 140, 140, 0.8, 0], [200, 0, 240, 40, 0.7, 2], [0, 200, 40, 240, 0.2, 0]]
    theirs = [[2, 2, 42, 42, 0.4, 1], [100, 100, 140, 140, 0.9, 2], [0, 200, 40, 240, 0.9, 0]]
    a, b = (Outputs(torch.zeros(1, 1, 3), {DETECTIONS: torch.tensor([each])}) for each in (ours, theirs))
    # Three are likely to either; the first is common. The second has other classes; the last is likely to one alone.
    assert Detection().agreement(a, b, batch).tolist() == [2, 6]
    assert Detection().agreement(b, a, batch).tolist() == [2, 6]


def class_accuracy_by_loops(maps: list[Tensor], batch: Batch) -> float:
    """Return the share of the objects, in percent, whose class has the largest logit around their middle."""
    right = counted = 0
    height, width = batch.images_BCHW.shape[2:]
    for image, boxes in enumerate(batch.targets[BOXES].tolist()):
        for number, (left, top, right_edge, bottom) in enumerate(boxes):
            label = int(batch.targets[CLASSES][image, number])
            if label < 0 or batch.targets[CROWD][image, number]:
                continue
            best = [-np.inf] * SCENE_CLASSES
            for map_BCHW in maps:
                row = min(int((top + bottom) / 2 / height * map_BCHW.shape[2]), map_BCHW.shape[2] - 1)
                column = min(int((left + right_edge) / 2 / width * map_BCHW.shape[3]), map_BCHW.shape[3] - 1)
                for channel, logit in enumerate(map_BCHW[image, :, row, column].tolist()):
                    best[channel % SCENE_CLASSES] = max(best[channel % SCENE_CLASSES], logit)
            counted += 1
            right += int(np.argmax(best)) == label
    return 100 * right / counted


def test_the_training_metric_is_the_class_in_the_middle_of_each_object():
    outputs, batch = batch_of([*range(IMAGES)])
    maps = [torch.randn(IMAGES, 2 * SCENE_CLASSES, side, side + 3) for side in (40, 20)]
    features = {f"head.class.p{number}": values for number, values in enumerate(maps, 3)}
    found = Detection().measure_batch(outputs._replace(features=features), batch)
    assert found.item() == pytest.approx(class_accuracy_by_loops(maps, batch))
    assert 10 < found < 90
    blank = Detection().blank_targets(IMAGES, SCENE_CLASSES, (2 * SIDE, 2 * SIDE))
    assert blank.keys() == Detection.targets
    assert Detection().measure_batch(outputs._replace(features=features), batch._replace(targets=blank)) == 0
