"""``data.views_per_step``: a batch has every image in several views, the next ones in the next epoch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from shard_factory import config_of, open_loader
from test_repeat import epoch_of, plan_of, quick, reader, rows_of

from pipeline.batch import Progress
from pipeline.data import augment
from pipeline.data.requests import training_geometry
from shards.read import SplitReader

__all__ = ["reader"]


def test_batches_follow_one_another_each_as_often_as_there_are_views():
    rows, numbers = augment.views_of_batches(np.array([5, 6, 7, 8]), 2, 3)
    assert rows.tolist() == [5, 6, 5, 6, 5, 6, 7, 8, 7, 8, 7, 8]
    assert numbers.tolist() == [0, 0, 1, 1, 2, 2] * 2


@quick
@given(count=st.integers(2, 4), epoch=st.integers(0, 2), known=st.sampled_from([None, 4, 7]))
def test_a_batch_has_its_images_in_the_views_of_its_epoch(
    reader: SplitReader, count: int, epoch: int, known: int | None
) -> None:
    plan, plain = plan_of(reader, 2, views_per_step=count, views=known), plan_of(reader, 2)
    assert plan.steps_per_epoch == plain.steps_per_epoch
    once = [request.rows_B for request in epoch_of(plain, epoch)]
    for request, rows in zip(epoch_of(plan, epoch), once, strict=True):
        assert request.views == count
        expected = []
        for number in range(count):
            view = epoch * count + number
            samples = reader.samples[rows]
            geometry = training_geometry(plan.config, samples, view if known is None else view % known)
            of_row = zip(*(column.tolist() for column in geometry), strict=True)
            expected += [(int(i), list(row)) for i, row in zip(samples["id"], of_row, strict=True)]
        assert rows_of([request]) == expected


@quick
@given(accumulation=st.integers(1, 2), start=st.integers(0, 10))
def test_ranks_share_the_batches_of_one_rank_from_any_step_on(
    reader: SplitReader, accumulation: int, start: int
) -> None:
    count = 3
    whole = epoch_of(plan_of(reader, 12, views_per_step=count), 1)
    step = start % len(whole)
    for world in (1, 2, 3):
        plans = [plan_of(reader, 12, rank, world, accumulation, views_per_step=count) for rank in range(world)]
        shares = [epoch_of(plan, 1, step) for plan in plans]
        for number, request in enumerate(whole[step:]):
            micro_batches = [share[number * accumulation : (number + 1) * accumulation] for share in shares]
            for view in range(count):
                expected = rows_of([request])[12 * view : 12 * (view + 1)]
                size = 12 // world // accumulation
                parts = [
                    [row for each in of_rank for row in rows_of([each])[size * view : size * (view + 1)]]
                    for of_rank in micro_batches
                ]
                assert [row for rows in zip(*parts, strict=True) for row in rows] == expected


@pytest.mark.parametrize("loader", ["dali", "synthetic"])
def test_a_decoded_batch_has_a_dimension_of_views_and_one_label_an_image(photo_shards: Path, loader: str):
    progress = Progress(10, step=10)
    batch = next(open_loader(config_of(photo_shards, views_per_step=3, loader=loader)).stream(progress, 2))
    plain = next(open_loader(config_of(photo_shards, loader=loader)).stream(progress, 2))
    assert batch.images_BCHW.shape == (3, *plain.images_BCHW.shape)
    assert torch.equal(batch.ids_B, plain.ids_B)
    assert torch.equal(batch.labels_B, plain.labels_B)
    assert batch.images_BCHW[0].is_contiguous(memory_format=torch.channels_last)


def test_each_view_has_the_pixels_of_that_view(photo_shards: Path):
    loader = open_loader(config_of(photo_shards, views_per_step=2))
    steps = loader.steps_per_epoch
    batch = next(loader.stream(Progress(steps, step=steps), 2))
    row_of = {number: row for row, number in enumerate(loader.plan.readers["train"].samples["id"].tolist())}
    rows = np.array([row_of[number] for number in batch.ids_B.tolist()])
    for number in range(2):
        (expected,) = open_loader(config_of(photo_shards)).views([(rows, 2 + number)])
        assert torch.equal(batch.images_BCHW[number], expected.images_BCHW)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"repeat": 2}, "repeat"),
        ({"pairs": True}, "pairs"),
        ({"augment": [{"mixup": {"alpha": 0.2}}]}, "mixup and cutmix"),
    ],
)
def test_what_was_not_tested_with_several_views_is_refused(reader: SplitReader, keys: dict, named: str) -> None:
    with pytest.raises(ValidationError, match=f"views_per_step: 2 does not go with {named}; remove one of them"):
        config_of(reader.folder, views_per_step=2, **keys)


def test_fewer_views_than_a_step_has_are_refused(reader: SplitReader) -> None:
    with pytest.raises(ValidationError, match="views_per_step: 3 needs as many views, got views: 2; raise views"):
        config_of(reader.folder, views_per_step=3, views=2)
