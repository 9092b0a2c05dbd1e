"""``data.pairs``: behind every image of an epoch stands another of its class."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from shard_factory import config_of
from test_repeat import epoch_of, plan_of, quick, reader, rows_of

from pipeline.data import augment
from pipeline.data.requests import training_geometry
from shards.read import SplitReader

__all__ = ["reader"]
SAMPLES = np.array(
    [(number + 100, label) for number, label in enumerate([0, 1, 0, 2, 1, 0, 1, 0])],
    dtype=[("id", np.int64), ("label", np.int32)],
)
"""Four images of class 0, three of class 1, and one of class 2, in row 3."""


def pairs_of(epoch: int, order: list[int] | None = None) -> dict[int, int]:
    """Return each row's partner in an epoch."""
    rows = np.array(range(len(SAMPLES)) if order is None else order)
    return dict(zip(rows.tolist(), augment.partners_of_class(rows, SAMPLES, 5, epoch).tolist(), strict=True))


@quick
@given(epoch=st.integers(0, 1000), order=st.permutations(range(8)))
def test_a_partner_is_another_image_of_the_class_whatever_the_order(epoch: int, order: list[int]) -> None:
    found = pairs_of(epoch, order)
    assert found == pairs_of(epoch)
    for row, partner in found.items():
        assert SAMPLES["label"][partner] == SAMPLES["label"][row]
        assert partner != row or row == 3


def test_every_other_image_of_the_class_is_a_partner_equally_often() -> None:
    counts = Counter(pairs_of(epoch)[0] for epoch in range(3000))
    assert counts.keys() == {2, 5, 7}
    assert max(abs(count - 1000) for count in counts.values()) < 4 * np.sqrt(3000 * 2 / 9)


def test_images_that_are_held_out_are_nobodys_partner() -> None:
    assert {partner for epoch in range(50) for partner in pairs_of(epoch, [0, 1, 2, 4]).values()} == {0, 1, 2, 4}


def test_an_epoch_has_every_image_once_before_a_partner_of_its_class_in_another_view(reader: SplitReader) -> None:
    plan, count = plan_of(reader, 2, pairs=True), len(reader.samples)
    assert plan.steps_per_epoch == count
    found = rows_of(epoch_of(plan, 1))
    once = rows_of(epoch_of(plan_of(reader, 1), 1))
    assert found[::2] == once
    label_of = dict(zip(reader.samples["id"].tolist(), reader.samples["label"].tolist(), strict=True))
    row_of = {number: row for row, number in enumerate(reader.samples["id"].tolist())}
    geometry = training_geometry(plan.config, reader.samples, 1 + augment.PARTNERS_VIEWS)
    for (first, _), (partner, seen) in zip(found[::2], found[1::2], strict=True):
        assert label_of[partner] == label_of[first]
        assert seen == [column[row_of[partner]].tolist() for column in geometry]


@quick
@given(accumulation=st.integers(1, 2), start=st.integers(0, 10))
def test_the_pairs_are_those_of_one_rank_from_any_step_on_and_share_a_micro_batch(
    reader: SplitReader, accumulation: int, start: int
) -> None:
    whole = rows_of(epoch_of(plan_of(reader, 12, pairs=True), 1))
    step = start % plan_of(reader, 12, pairs=True).steps_per_epoch
    for world in (1, 2, 3):
        plans = [plan_of(reader, 12, rank, world, accumulation, pairs=True) for rank in range(world)]
        requests = [epoch_of(plan, 1, step) for plan in plans]
        shares = [rows_of(share) for share in requests]
        assert [row for rows in zip(*shares, strict=True) for row in rows] == whole[12 * step :]
        for together in zip(*requests, strict=True):
            rows = [row for rows in zip(*map(rows_of, ([share] for share in together)), strict=True) for row in rows]
            assert len(rows) == 12 // accumulation
            assert whole.index(rows[0]) % 2 == 0


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"repeat": 2}, "repeat"),
        ({"views": 3}, "views"),
        ({"loader": "synthetic"}, "loader: synthetic"),
        ({"augment": [{"mixup": {"alpha": 0.2}}]}, "mixup and cutmix"),
    ],
)
def test_what_was_not_tested_with_pairs_is_refused(reader: SplitReader, keys: dict, named: str) -> None:
    with pytest.raises(ValidationError, match=f"pairs: true does not go with {named}; remove one of them"):
        config_of(reader.folder, pairs=True, **keys)
