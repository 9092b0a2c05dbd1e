from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as reference

from pipeline.data import augment
from pipeline.philox import Purpose, philox4x32, uniforms

quick = settings(derandomize=True, deadline=None, max_examples=25)
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter: str, key: str, words: str) -> None:
    numbers, (key0, key1), expected = ([int(word, 16) for word in text.split()] for text in (counter, key, words))
    drawn = philox4x32(np.array(numbers, np.uint32)[:, None], (key0, key1))
    assert drawn[:, 0].tolist() == expected


def test_uniforms_are_uniform_and_differ_by_seed_view_draw_and_id() -> None:
    ids = np.arange(20_000)
    draws = [
        uniforms(ids, 0, 0, seed=0),
        uniforms(ids, 0, 0, seed=1),
        uniforms(ids, 0, 0, seed=1 << 40),
        uniforms(ids, 1, 0, seed=0),
        uniforms(ids, 0, 1, seed=0),
        uniforms(ids + (1 << 40), 0, 0, seed=0),
    ]
    numbers = np.concatenate(draws)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert all(stats.kstest(row, "uniform").pvalue > 1e-4 for row in numbers)
    assert np.abs(np.corrcoef(numbers) - np.eye(len(numbers))).max() < 0.04


@quick
@given(seed=st.integers(0, 2**63 - 1), view=st.integers(0, 1000), split_at=st.integers(0, 40), pad=st.integers(0, 8))
def test_what_happens_to_a_sample_does_not_depend_on_its_batch(seed: int, view: int, split_at: int, pad: int) -> None:
    rng = np.random.default_rng(0)
    ids, widths, heights = rng.integers(0, 10**7, 40), rng.integers(1, 600, 40), rng.integers(1, 600, 40)

    def draw(part: np.ndarray) -> list[np.ndarray]:
        sides = widths[part], heights[part]
        return [
            augment.random_resized_crop(ids[part], view, *sides, seed=seed, scale=SCALE, ratio=RATIO),
            augment.flips(ids[part], view, seed=seed, probability=0.5),
            augment.pad_crop(ids[part], view, seed=seed, pad=pad),
        ]

    shuffled = rng.permutation(40)
    parts = [draw(shuffled[:split_at]), draw(shuffled[split_at:])]
    for whole, *pieces in zip(draw(np.arange(40)), *parts, strict=True):
        np.testing.assert_array_equal(whole[shuffled], np.concatenate(pieces))


@pytest.mark.parametrize("sides", [(20, 600), (600, 20), (3, 2), (1, 1)])
def test_random_resized_crop_takes_torchvisions_boxes_from_the_same_uniform_numbers(
    sides: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The narrow and the tiny images reach the tenth attempt and the centre crop."""
    rng = np.random.default_rng(0)
    count = 300
    widths, heights = rng.integers(min(sides), max(sides) + 1, (2, count))
    widths[::3], heights[::3] = sides
    ids = rng.integers(0, 10**7, count)
    ours = augment.random_resized_crop(ids, 5, widths, heights, seed=9, scale=SCALE, ratio=RATIO)

    # Torchvision draws an area and a ratio an attempt, and a place (top, left) only for the box that fits.
    blocks: list[np.ndarray] = []
    drawn: list[str] = []

    def uniform(_: torch.Tensor, low: float, high: float) -> torch.Tensor:
        attempt, which = divmod(len(drawn), 2)
        drawn.append("area or ratio")
        return torch.tensor([float(low) + float(high - low) * blocks[attempt][which]], dtype=torch.float64)

    def randint(low: int, high: int, size: tuple[int]) -> torch.Tensor:
        attempt, places = (drawn.count("area or ratio") - 1) // 2, drawn.count("place")
        drawn.append("place")
        return torch.tensor([low + int((high - low) * blocks[attempt][2 + places])])

    monkeypatch.setattr(torch.Tensor, "uniform_", uniform)
    monkeypatch.setattr(torch, "randint", randint)
    for row in range(count):
        blocks[:] = [uniforms(ids[row], 5, Purpose.CROP + attempt, seed=9) for attempt in range(10)]
        drawn.clear()
        theirs = RandomResizedCrop.get_params(torch.empty(3, heights[row], widths[row]), list(SCALE), list(RATIO))
        assert ours[row].tolist() == list(theirs)


def test_random_resized_crop_has_torchvisions_distribution() -> None:
    count = 4000
    torch.manual_seed(0)
    image = torch.empty(3, 375, 500)
    theirs = np.array([RandomResizedCrop.get_params(image, list(SCALE), list(RATIO)) for _ in range(count)])
    sides = np.full(count, 500), np.full(count, 375)
    ours = augment.random_resized_crop(np.arange(count), 0, *sides, seed=0, scale=SCALE, ratio=RATIO)
    for column in range(4):
        assert stats.ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-3
    assert stats.ks_2samp(ours[:, 3] / ours[:, 2], theirs[:, 3] / theirs[:, 2]).pvalue > 1e-3


@quick
@given(width=st.integers(1, 700), height=st.integers(1, 700), size=st.integers(1, 300), more=st.integers(0, 60))
def test_validation_resizes_and_crops_as_torchvision_does(width: int, height: int, size: int, more: int) -> None:
    resized, crops = augment.resize_and_centre_crop([width], [height], size + more, size)
    image = torch.zeros(1, height, width)
    theirs = reference.resize(image, [size + more], reference.InterpolationMode.NEAREST)
    assert resized[0].tolist() == list(theirs.shape[1:])
    numbered = torch.arange(theirs.numel(), dtype=torch.float64).view(theirs.shape)
    corner = int(reference.center_crop(numbered, [size, size])[0, 0, 0])
    assert crops[0].tolist() == list(divmod(corner, theirs.shape[2]))


def test_every_place_of_a_padded_crop_comes_equally_often() -> None:
    places = augment.pad_crop(np.arange(81_000), 0, seed=0, pad=4)
    assert places.min() == 0
    assert places.max() == 8
    counts = np.bincount(places[:, 0] * 9 + places[:, 1], minlength=81)
    assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_flips_come_with_their_probability(probability: float) -> None:
    mirrored = augment.flips(np.arange(20_000), 0, seed=0, probability=probability)
    assert abs(mirrored.mean() - probability) < (0.015 if 0 < probability < 1 else 1e-12)


@quick
@given(
    per_shard=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    group=st.integers(0, 5),
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 500),
)
def test_an_epoch_is_a_permutation_that_stays_within_groups_of_shards(
    per_shard: list[int], group: int, seed: int, epoch: int
) -> None:
    shards = np.repeat(np.arange(len(per_shard)), per_shard)
    order = augment.epoch_order(shards, seed, epoch, group)
    assert sorted(order.tolist()) == list(range(len(shards)))
    np.testing.assert_array_equal(order, augment.epoch_order(shards, seed, epoch, group))
    if group:
        # Reading on, the reader leaves a shard for good once its group is done, so few are open at a time.
        first, last = {}, {}
        for place, shard in enumerate(shards[order].tolist()):
            first.setdefault(shard, place)
            last[shard] = place
        at_once = [sum(first[s] <= place <= last[s] for s in first) for place in range(len(order))]
        assert max(at_once, default=0) <= group


def test_orders_differ_by_seed_epoch_and_group_and_every_place_is_as_likely() -> None:
    shards = np.repeat(np.arange(10), 10)
    orders = [
        augment.epoch_order(shards, seed, epoch, group) for seed in (0, 1) for epoch in (0, 1) for group in (0, 3)
    ]
    assert len({order.tobytes() for order in orders}) == len(orders)
    places = np.array([np.argsort(augment.epoch_order(shards, 0, epoch, 3)) for epoch in range(600)])
    assert abs(places.mean(axis=0) - 49.5).max() < 6  # standard error 1.2
    groups = {frozenset(shards[augment.epoch_order(shards, 0, epoch, 3)[:30]].tolist()) for epoch in range(50)}
    assert len(groups) > 20


def test_the_tail_of_an_epoch_differs_from_epoch_to_epoch() -> None:
    shards = np.zeros(103, np.int64)
    tails = {tuple(sorted(augment.epoch_order(shards, 0, epoch)[100:].tolist())) for epoch in range(20)}
    assert len(tails) == 20


def test_ranks_share_a_global_batch_out_in_turn() -> None:
    order = np.arange(20)[::-1]
    batch = augment.global_batches(order, 1, 2, 6)
    assert batch.tolist() == [13, 12, 11, 10, 9, 8]
    assert [augment.rank_rows(batch, rank, 3).tolist() for rank in range(3)] == [[13, 10], [12, 9], [11, 8]]
