"""``data.unlabelled``: behind the labelled rows of a batch are images without labels, in epochs of their own."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError
from shard_factory import config_of, open_loader

from pipeline.batch import PSEUDO, Batch, Progress
from pipeline.data import augment
from pipeline.data.config import Config
from pipeline.data.loader import Loader
from pipeline.data.unlabelled import SEED_OFFSET, config_of_unlabelled

BATCH, RATIO, EPOCHS = 4, 2, 3
MEMORY = {"loader": "memory", "crop": "pad", "pad": 2}


def labelled_config(folder: Path, **keys: object) -> Config:
    return config_of(folder, unlabelled={"path": str(folder), "ratio": RATIO}, **keys)


def open_both(
    config: Config, rank: int = 0, world: int = 1, ids: NDArray[np.int64] | None = None, **keys: object
) -> Loader:
    """Return a rank's loader of labelled images with others of the same shards behind them, answered by their ids."""
    both = {"rank": rank, "world": world, **keys}
    answers = np.arange(200, dtype=np.float16)[:, None].repeat(3, 1)
    others = open_loader(
        config_of_unlabelled(config),
        batch=RATIO * BATCH,
        seed=SEED_OFFSET,
        splits=("train",),
        columns=lambda view: {PSEUDO: answers},
        ids=ids,
        **both,
    )
    return open_loader(config, batch=BATCH, **both).with_unlabelled(others)


def batches_of(loader: Loader, step: int = 0, epochs: int = EPOCHS) -> list[Batch]:
    return [
        batch._replace(images_BCHW=batch.images_BCHW.clone())
        for batch in loader.stream(Progress(loader.steps_per_epoch, step), epochs)
    ]


def assert_equal(one: list[Batch], other: list[Batch]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))
        assert torch.equal(a.extra[PSEUDO], b.extra[PSEUDO])


@pytest.fixture(params=["memory", "dali", "synthetic", "augmented"])
def config(request: pytest.FixtureRequest, small_shards: Path, photo_shards: Path) -> Config:
    if request.param == "memory":
        return labelled_config(small_shards, **MEMORY)
    if request.param == "augmented":
        return labelled_config(small_shards, **MEMORY, augment=[{"randaugment": {"ops": 2, "magnitude": 9}}])
    return labelled_config(photo_shards, loader=request.param)


def test_a_batch_has_the_labelled_rows_of_a_plain_run_and_then_the_others_with_label_minus_one(config: Config):
    found = batches_of(open_both(config))
    plain = list(open_loader(config, batch=BATCH).stream(Progress(open_loader(config, batch=BATCH).steps_per_epoch), 3))
    assert len(found) == len(plain)
    for batch, labelled in zip(found, plain, strict=True):
        assert len(batch.labels_B) == BATCH * (1 + RATIO)
        assert batch.labels_B[:BATCH].equal(labelled.labels_B)
        assert batch.ids_B[:BATCH].equal(labelled.ids_B)
        assert batch.labels_B[BATCH:].tolist() == [-1] * (RATIO * BATCH)
        assert not batch.extra[PSEUDO][:BATCH].any()
        assert batch.extra[PSEUDO][BATCH:, 0].tolist() == batch.ids_B[BATCH:].tolist()
    if config.loader != "synthetic":
        assert found[-1].images_BCHW[:BATCH].equal(plain[-1].images_BCHW)
        assert found[0].images_BCHW.is_contiguous(memory_format=torch.channels_last)


def test_the_others_have_epochs_of_their_own_in_another_order(config: Config):
    loader = open_both(config)
    found = batches_of(loader)
    assert loader.unlabelled is not None
    length = loader.unlabelled.steps_per_epoch
    assert 0 < length < loader.steps_per_epoch
    epochs = [
        [number for batch in found[start : start + length] for number in batch.ids_B[BATCH:].tolist()]
        for start in (0, length)
    ]
    assert all(max(Counter(ids).values()) == 1 for ids in epochs)
    assert epochs[0] != epochs[1]
    assert epochs[0][: 2 * BATCH] != [number for batch in found[:2] for number in batch.ids_B[:BATCH].tolist()]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_any_ranks_and_any_start_have_the_rows_of_one_process(small_shards: Path, accumulation: int):
    config = labelled_config(small_shards, **MEMORY)
    whole = batches_of(open_both(config))
    step = 13  # in the second epoch
    shares = [batches_of(open_both(config, rank, 2, accumulation=accumulation), step=step) for rank in range(2)]
    rows = BATCH // (2 * accumulation)
    for number, batch in enumerate(whole[step:]):
        parts = [share[number * accumulation : (number + 1) * accumulation] for share in shares]
        labelled = [part.ids_B[k] for at in range(accumulation) for k in range(rows) for part in (p[at] for p in parts)]
        others = [
            part.images_BCHW[rows + k]
            for at in range(accumulation)
            for k in range(RATIO * rows)
            for part in (p[at] for p in parts)
        ]
        assert torch.stack(labelled).equal(batch.ids_B[:BATCH])
        assert torch.stack(others).equal(batch.images_BCHW[BATCH:])


def test_a_stream_that_begins_anywhere_is_the_end_of_a_whole_one(config: Config):
    whole = batches_of(open_both(config))
    assert_equal(batches_of(open_both(config), step=7), whole[7:])


def test_copies_of_an_image_in_an_epoch_differ_in_their_pixels_and_come_as_often_as_they_are_listed(small_shards: Path):
    config = labelled_config(small_shards, **MEMORY)
    plan = open_loader(config).plan
    ids = np.sort(plan.readers["train"].samples["id"])[:4].repeat([1, 2, 3, 10])
    loader = open_both(config, ids=ids)
    assert loader.unlabelled is not None
    assert loader.unlabelled.steps_per_epoch == 2
    found = batches_of(loader, epochs=1)[:2]
    seen = Counter(number for batch in found for number in batch.ids_B[BATCH:].tolist())
    assert sorted(seen.elements()) == ids.tolist()
    last = [x for batch in found for x, n in zip(batch.images_BCHW, batch.ids_B, strict=True) if n == ids[-1]]
    assert len({x.numpy().tobytes() for x in last[-10:]}) > 5


@settings(max_examples=25, deadline=None, derandomize=True)
@given(rows=st.lists(st.integers(0, 5), max_size=30))
def test_occurrences_count_what_came_before(rows: list[int]):
    found = augment.occurrences(np.array(rows, np.int64))
    assert found.tolist() == [rows[:place].count(row) for place, row in enumerate(rows)]


def test_plain_images_are_those_of_validation_whatever_company_they_are_in(photo_shards: Path):
    config = config_of(photo_shards, validation_batch=None)
    loader = open_loader(config, batch=8, sources={"train": "train", "val": "train"})
    whole = [(n, x.clone()) for batch in loader.validation() for n, x in zip(*batch[2::-2], strict=True)]
    of_id = {int(number): image for number, image in whole}
    rows = np.random.default_rng(0).permutation(len(of_id))
    for batch in loader.plain([rows[:8], rows[8:9], rows[9:14]]):
        for number, image in zip(batch.ids_B.tolist(), batch.images_BCHW, strict=True):
            assert image.equal(of_id[number])


def test_held_out_images_are_not_among_the_labelled_rows_alone(small_shards: Path):
    config = labelled_config(small_shards, **MEMORY, holdout={"share": 0.3})
    loader = open_both(config)
    held = {number for batch in loader.validation() for number in batch.ids_B.tolist() if number >= 0}
    found = batches_of(loader)
    assert held
    assert held.isdisjoint(number for batch in found for number in batch.ids_B[:BATCH].tolist())
    assert not held.isdisjoint(number for batch in found for number in batch.ids_B[BATCH:].tolist())


def test_another_order_has_the_others_in_another_order_too(small_shards: Path):
    loader = open_both(labelled_config(small_shards, **MEMORY))
    one, other = batches_of(loader)[0], batches_of(loader.in_order_of(5))[0]
    assert all(one.ids_B[part].tolist() != other.ids_B[part].tolist() for part in (slice(BATCH), slice(BATCH, None)))
    assert_equal(batches_of(loader.in_order_of(0)), batches_of(loader))


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"repeat": 2}, "repeat"),
        ({"views": 3}, "views"),
        ({"pairs": True}, "pairs"),
        ({"crop": "scaled"}, "crop: scaled"),
        ({"augment": [{"mixup": {"alpha": 0.2}}]}, "mixup and cutmix"),
    ],
)
def test_what_was_not_tested_with_unlabelled_images_is_refused(small_shards: Path, keys: dict, named: str):
    with pytest.raises(ValidationError, match=f"unlabelled does not go with {named}; remove one of them"):
        labelled_config(small_shards, **keys)
