"""The order of an epoch in buckets, the sizes of images whose ratio is kept, and their boxes, against plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.data import augment
from pipeline.data.box_targets import box_targets
from pipeline.data.buckets import bucket_numbers, count_batches
from pipeline.data.config import BUCKETS, LONG, SHORT, Config
from pipeline.tasks._boxes import AREAS, BOXES, CLASSES, CROWD, SCALES, SIZES
from shards.read import SAMPLE_DTYPE

quick = settings(derandomize=True, deadline=None, max_examples=40)


def config_of(**keys: object) -> Config:
    known = {"path": "", "crop": "keep_ratio", "mean": (0.5, 0.5, 0.5), "std": (1, 1, 1)}
    return Config.model_validate({**known, **keys})


def samples_of(sides: list[tuple[int, int]]) -> np.ndarray:
    """Return rows of a sample table with those heights and widths."""
    samples = np.zeros(len(sides), SAMPLE_DTYPE)
    samples["height"], samples["width"] = np.array(sides).reshape(-1, 2).T
    return samples


@quick
@given(buckets=st.lists(st.integers(0, 3), max_size=60), batch=st.integers(1, 9), seed=st.integers(0, 99))
def test_an_epoch_emits_a_batch_whenever_a_queue_is_full(buckets: list[int], batch: int, seed: int):
    order = np.random.default_rng(seed).permutation(len(buckets))
    queues: dict[int, list[int]] = {}
    expected: list[int] = []
    for row in order.tolist():
        queue = queues.setdefault(buckets[row], [])
        queue.append(row)
        if len(queue) == batch:
            expected += queue
            queue.clear()
    found = augment.bucket_order(order, np.array(buckets, np.int64), batch)
    assert found.tolist() == expected
    assert len(found) == batch * count_batches(np.array(buckets, np.int64), batch)


@quick
@given(
    sides=st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), min_size=1, max_size=20),
    short=st.sampled_from([64, 600, 800]),
)
def test_an_image_keeps_its_ratio_and_grows_up_to_one_of_its_limits(sides: list[tuple[int, int]], short: int):
    heights, widths = np.array(sides).T
    found = augment.keep_ratio(widths, heights, short=short, long=LONG).tolist()
    for (height, width), resized in zip(sides, found, strict=True):
        factor = min(short / min(height, width), LONG / max(height, width))
        assert resized == [max(1, math.floor(side * factor + 0.5)) for side in (height, width)]
        assert min(resized) <= short
        assert max(resized) <= LONG
        assert short in resized or LONG in resized


def test_the_sizes_of_coco_are_those_of_mmdetection():
    sides = {(480, 640): [800, 1067], (427, 640): [800, 1199], (640, 480): [1067, 800], (400, 1000): [533, 1333]}
    heights, widths = np.array(list(sides)).T
    assert augment.keep_ratio(widths, heights, short=800, long=1333).tolist() == list(sides.values())


@quick
@given(sides=st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), min_size=1, max_size=50))
def test_the_default_buckets_hold_every_image(sides: list[tuple[int, int]]):
    numbers = bucket_numbers(config_of(), samples_of(sides))
    assert (numbers >= 0).all()
    for (height, width), number in zip(sides, numbers.tolist(), strict=True):
        resized = augment.keep_ratio([width], [height], short=SHORT[0], long=LONG)[0]
        fits = [bool((resized <= bucket).all()) for bucket in BUCKETS]
        assert number == fits.index(True)


def test_the_bucket_of_an_image_is_that_of_its_largest_size():
    config = config_of(short=[32, 64], long=90, buckets=[[32, 32], [64, 64], [64, 96]])
    assert bucket_numbers(config, samples_of([(100, 100), (50, 60), (60, 50)])).tolist() == [1, 2, -1]


def test_every_short_side_is_drawn_equally_often_and_for_each_image_alone():
    ids, shorts = np.arange(30_000), (480, 512, 544, 576, 608, 640)
    drawn = augment.drawn_shorts(ids, 3, seed=5, shorts=shorts)
    numbers, often = np.unique(drawn, return_counts=True)
    assert numbers.tolist() == list(shorts)
    assert np.abs(often / len(ids) * len(shorts) - 1).max() < 0.05
    assert augment.drawn_shorts(ids[::7], 3, seed=5, shorts=shorts).tolist() == drawn[::7].tolist()
    assert augment.drawn_shorts(ids, 4, seed=5, shorts=shorts).tolist() != drawn.tolist()


def expected_rows(boxes: np.ndarray, stored: list[int], resized: list[int], flip: bool, smallest: float) -> list[list]:
    """Return left, top, right, bottom, class, crowd and area of the boxes that an image keeps."""
    rows = []
    for left, top, right, bottom, label, crowd, area in boxes.tolist():
        across, down = resized[1] / stored[1], resized[0] / stored[0]
        sides = [left * across, top * down, right * across, bottom * down]
        if flip:
            sides[0], sides[2] = resized[1] - sides[2], resized[1] - sides[0]
        sides = [min(max(x, 0.0), float(resized[1 - k % 2])) for k, x in enumerate(sides)]
        if sides[2] - sides[0] >= smallest and sides[3] - sides[1] >= smallest:
            rows.append([*sides, label, crowd, area])
    return rows


@quick
@given(
    counts=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    seed=st.integers(0, 99),
    smallest=st.sampled_from([0, 1]),
)
def test_boxes_move_with_their_images_and_small_ones_leave_training(counts: list[int], seed: int, smallest: int):
    random = np.random.default_rng(seed)
    stored, resized = random.integers(20, 60, (2, len(counts), 2))
    flips = random.random(len(counts)) < 0.5
    boxes = []
    for count, (height, width) in zip(counts, stored, strict=True):
        corners = random.uniform(-2, 1, (count, 2)) + random.uniform(0, 1, (count, 2)) * (width, height)
        ends = corners + random.exponential(4, (count, 2))
        rest = random.integers(0, 9, count), random.integers(0, 2, count), random.uniform(0, 99, count)
        boxes.append(np.column_stack([corners, ends, *rest]).astype(np.float32))
    found = box_targets(boxes, stored, resized, flips, smallest)
    rows = [
        expected_rows(*each, smallest) for each in zip(boxes, stored.tolist(), resized.tolist(), flips, strict=True)
    ]
    most = max(1, *(len(each) for each in rows))
    assert found[BOXES].shape == (len(counts), most, 4)
    for number, expected in enumerate(rows):
        blank = most - len(expected)
        table = np.array(expected).reshape(-1, 7).T
        np.testing.assert_allclose(found[BOXES][number, : len(expected)], table[:4].T, rtol=1e-5, atol=1e-4)
        assert found[BOXES][number, len(expected) :].tolist() == [[0.0] * 4] * blank
        assert found[CLASSES][number].tolist() == [*table[4].tolist(), *[-1] * blank]
        assert found[CROWD][number].tolist() == [*(table[5] == 1).tolist(), *[False] * blank]
        np.testing.assert_allclose(found[AREAS][number], [*table[6].tolist(), *[0.0] * blank], rtol=1e-6)
    assert found[SIZES].tolist() == resized.tolist()
    np.testing.assert_allclose(found[SCALES], resized / stored, rtol=1e-6)


def test_a_box_that_is_not_a_number_stays_and_is_seen_in_the_loss():
    box = np.array([[np.nan, 1, 5, 5, 0, 0, 16]], np.float32)
    sides = np.array([[10, 10]])
    assert np.isnan(box_targets([box], sides, sides, np.array([False]), 1.0)[BOXES]).any()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"buckets": [[64, 96], [90, 64]]}, "buckets: 90 × 64: the sides must be multiples of 32; write \\[96, 64\\]"),
        ({"buckets": []}, "at least 1 item"),
        ({"buckets": ["a"]}, "buckets"),
        ({"short": []}, "at least 1 item"),
        ({"size": 224}, "size: 224 is not the largest of buckets, 800 × 1344, .* remove it"),
        ({"validation_size": 224}, "validation_size: crop: keep_ratio does not take it; remove it"),
        ({"resize": 64}, "resize: crop: keep_ratio does not take it"),
        ({"scales": [0.5]}, "scales: crop: keep_ratio does not take it"),
        ({"ratio": [0.5, 2.0]}, "ratio: crop: keep_ratio does not take it"),
        ({"repeat": 2}, "repeat: crop: keep_ratio does not take it"),
        ({"augment": [{"erasing": {"probability": 0.5}}]}, "augment: crop: keep_ratio does not take it"),
        ({"augment": [{"mixup": {"alpha": 0.5}}]}, "augment: crop: keep_ratio does not take it"),
        ({"loader": "memory"}, "loader: memory does not take crop: keep_ratio; set loader: dali"),
        ({"crop": "pad", "size": 32, "long": 90}, "long: crop: pad does not take it; remove it"),
        ({"crop": "scaled", "size": 32, "buckets": [[64, 64]]}, "buckets: crop: scaled does not take it; remove it"),
    ],
)
def test_settings_that_do_not_fit_boxes_are_refused_in_one_line(keys: dict[str, object], message: str):
    with pytest.raises(ValidationError, match=message):
        config_of(**keys)


def test_networks_are_tried_with_the_largest_bucket():
    assert config_of().size == (800, 1344)
    assert config_of(buckets=[[64, 64], [32, 160], [160, 32]]).size == (32, 160)
    again = config_of(**config_of(buckets=[[64, 64]]).model_dump())
    assert again.size == (64, 64)
