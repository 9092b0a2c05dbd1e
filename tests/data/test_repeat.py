"""``data.repeat``: an epoch has every image several times, each time in a view of its own."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shard_factory import config_of, join, open_loader

from pipeline.batch import Progress
from pipeline.data import augment
from pipeline.data.loader import Loader
from pipeline.data.requests import BatchSampler, SampleRequest, training_geometry
from shards.read import SplitReader

quick = settings(
    derandomize=True, deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def reader(photo_shards: Path) -> SplitReader:
    return SplitReader(photo_shards, "train")


def plan_of(reader: SplitReader, batch: int, rank: int = 0, world: int = 1, accumulation: int = 1, **keys):
    rows = {"train": np.arange(len(reader.samples))}
    config = config_of(reader.folder, **keys)
    return BatchSampler(config, {"train": reader}, rows, batch, accumulation, 3, rank, world, encoded=False)


def epoch_of(plan: BatchSampler, epoch: int, step: int = 0) -> list[SampleRequest]:
    progress = Progress(plan.steps_per_epoch, step=epoch * plan.steps_per_epoch + step)
    return list(plan.training(progress, epoch + 1))


def rows_of(requests: list[SampleRequest]) -> list[tuple[int, list]]:
    """Return each row's id and all that decides its pixels."""
    return [
        (int(request.ids_B[k]), [column[k].tolist() for column in request.geometry])
        for request in requests
        for k in range(len(request.rows_B))
    ]


@quick
@given(repeat=st.integers(1, 4), epoch=st.integers(0, 3), views=st.sampled_from([None, 1, 2, 3, 7]))
def test_an_epoch_has_every_id_that_often_in_the_views_of_that_epoch(
    reader: SplitReader, repeat: int, epoch: int, views: int | None
) -> None:
    views = views and max(views, repeat)  # fewer would repeat pixels
    batch = repeat if len(reader.samples) % 2 else 2 * repeat  # divides the epoch, so that nothing is left out
    plan = plan_of(reader, batch, repeat=repeat, views=views)
    assert plan.steps_per_epoch * batch == repeat * len(reader.samples)
    found = rows_of(epoch_of(plan, epoch))
    expected = []
    for repetition in range(repeat):
        view = epoch * repeat + repetition
        geometry = training_geometry(plan.config, reader.samples, view if views is None else view % views)
        expected += [
            (int(sample["id"]), [column[row].tolist() for column in geometry])
            for row, sample in enumerate(reader.samples)
        ]
    assert sorted(found) == sorted(expected)


@quick
@given(
    repeat=st.integers(1, 4),
    accumulation=st.integers(1, 2),
    shuffle_shards=st.integers(0, 2),
    start=st.integers(0, 10),
    views=st.sampled_from([None, 3]),
)
def test_the_global_batches_are_those_of_one_rank_from_any_step_on(
    reader: SplitReader, repeat: int, accumulation: int, shuffle_shards: int, start: int, views: int | None
) -> None:
    keys = {"repeat": repeat, "shuffle_shards": shuffle_shards, "views": views and max(views, repeat)}
    whole = rows_of(epoch_of(plan_of(reader, 12, **keys), 1))
    step = start % plan_of(reader, 12, **keys).steps_per_epoch
    for world in (1, 2, 3):
        shares = []
        for rank in range(world):
            requests = epoch_of(plan_of(reader, 12, rank, world, accumulation, **keys), 1, step)
            assert {len(request.rows_B) for request in requests} == {12 // world // accumulation}
            shares.append(rows_of(requests))
        assert [row for rows in zip(*shares, strict=True) for row in rows] == whole[12 * step :]


def test_the_views_of_an_image_are_in_one_global_batch_and_on_different_ranks(reader: SplitReader) -> None:
    requests = [epoch_of(plan_of(reader, 12, rank, 3, repeat=3), 0) for rank in range(3)]
    for shares in zip(*requests, strict=True):
        ids = [share.ids_B.tolist() for share in shares]
        assert ids[0] == ids[1] == ids[2]
        assert len(set(ids[0])) == 4


def test_the_tail_that_an_epoch_leaves_out_is_less_than_a_batch(reader: SplitReader) -> None:
    plan = plan_of(reader, 10, repeat=3)
    counts = Counter(number for number, _ in rows_of(epoch_of(plan, 0)))
    left = 3 * len(reader.samples) - counts.total()
    assert 0 <= left < 10
    assert max(counts.values()) == 3


def test_the_order_of_images_is_that_of_an_epoch_without_repetition(reader: SplitReader) -> None:
    once = [number for number, _ in rows_of(epoch_of(plan_of(reader, 1), 2))]
    thrice = [number for number, _ in rows_of(epoch_of(plan_of(reader, 3, repeat=3), 2))]
    assert thrice == [number for number in once for _ in range(3)]
    rows, repetitions = augment.repeated(np.array([4, 2]), 1)
    assert (rows.tolist(), repetitions.tolist()) == ([4, 2], [0, 0])


@pytest.mark.parametrize("loader", ["dali", "memory"])
def test_both_decoders_give_each_row_the_pixels_of_its_view(loader: str, small_shards: Path) -> None:
    config = config_of(small_shards, loader=loader, crop="pad", pad=2, repeat=2, views=3)
    found = join(open_loader(config, batch=6).stream(Progress(open_loader(config, batch=6).steps_per_epoch), 2))
    single = open_loader(config)
    row_by_id = {int(sample["id"]): row for row, sample in enumerate(single.plan.readers["train"].samples)}
    images = {view: images_of(single, view) for view in range(3)}
    before: Counter[int] = Counter()
    steps = open_loader(config, batch=6).steps_per_epoch
    for place, number in enumerate(found.ids_B.tolist()):
        epoch = place // (6 * steps)
        view = (2 * epoch + before[epoch, number]) % 3
        before[epoch, number] += 1
        assert torch.equal(found.images_BCHW[place], images[view][row_by_id[number]]), (place, view)


def images_of(loader: Loader, view: int) -> torch.Tensor:
    """Return all training images at a view, in storage order."""
    rows = np.arange(len(loader.plan.readers["train"].samples))
    return join(loader.views((part, view) for part in np.array_split(rows, -(-len(rows) // 4)))).images_BCHW


def test_rows_of_a_cache_are_those_of_each_rows_view(small_shards: Path) -> None:
    config = config_of(small_shards, loader="memory", crop="pad", repeat=3, views=4)
    ids = open_loader(config).id_count
    table_VNF = np.random.default_rng(0).normal(size=(4, ids, 5)).astype(np.float16)
    plan = open_loader(config, batch=9, columns=lambda view: {"logits": table_VNF[view]}).plan
    progress = Progress(plan.steps_per_epoch, step=plan.steps_per_epoch + 1)
    requests = list(plan.training(progress, 2))
    numbers = torch.cat([request.ids_B for request in requests]).tolist()
    found = torch.cat([extra["logits"] for extra in plan.extra(progress, 2)]).numpy()
    assert len(found) == len(numbers) > 9
    for place, number in enumerate(numbers):  # a batch begins with the first view of an image
        assert found[place].tolist() == table_VNF[(3 + place % 3) % 4, number].tolist()


def test_a_batch_may_be_larger_than_the_data_set_but_not_than_an_epoch(small_shards: Path) -> None:
    config = config_of(small_shards, loader="memory", crop="pad", repeat=2)
    images = len(open_loader(config).plan.rows["train"])
    assert open_loader(config, batch=2 * images).steps_per_epoch == 1
    with pytest.raises(ValueError, match=rf"has 2 × {images} training samples, fewer than one"):
        open_loader(config, batch=2 * images + 1)


def test_repetitions_that_would_be_the_same_pixels_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="repeat: 3 needs as many views, got views: 2; raise views"):
        config_of(tmp_path, repeat=3, views=2)
