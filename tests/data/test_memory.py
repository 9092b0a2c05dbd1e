from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from shard_factory import config_of, draw_samples, encode, open_loader, write_shards

from pipeline.batch import Batch, Progress
from pipeline.data import augment, requests
from pipeline.data.loader import Config, Loader
from shards.read import SplitReader

quick = settings(
    derandomize=True, deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.mark.parametrize("keys", [{}, {"pad": 3, "flip": 1.0}, {"pad": 0, "flip": 0.0}, {"channels_last": False}])
def test_memory_and_dali_give_the_same_images(small_shards: Path, keys: dict) -> None:
    """PNGs decode to the same bytes everywhere, so only the rounding of the normalisation is between them."""
    one, other = (
        open_loader(config_of(small_shards, loader=name, crop="pad", **keys), batch=8) for name in ("memory", "dali")
    )
    for ours, theirs in zip(one.stream(Progress(5), 2), other.stream(Progress(5), 2), strict=True):
        assert ours.ids_B.tolist() == theirs.ids_B.tolist()
        torch.testing.assert_close(ours.images_BCHW, theirs.images_BCHW, atol=1e-5, rtol=0)
        assert ours.images_BCHW.stride() == theirs.images_BCHW.stride()
    for ours, theirs in zip(one.validation(), other.validation(), strict=True):
        assert ours.ids_B.tolist() == theirs.ids_B.tolist()
        torch.testing.assert_close(ours.images_BCHW, theirs.images_BCHW, atol=1e-5, rtol=0)


def one_by_one(reader: SplitReader, config: Config, rows: np.ndarray, view: int) -> Batch:
    """Return the training images of some rows: each padded, cropped, mirrored and normalised by itself."""
    ids, labels = (reader.samples[name][rows] for name in ("id", "label"))
    mean, std = (255 * torch.tensor(values) for values in (config.mean, config.std))
    images = []
    for number, encoded in zip(ids.tolist(), reader.bytes(rows), strict=True):
        image = np.asarray(Image.open(io.BytesIO(encoded.tobytes())).convert("RGB"))
        padded = np.pad(image, [(config.pad, config.pad), (config.pad, config.pad), (0, 0)])
        ((top, left),) = augment.pad_crop([number], view, seed=config.seed, pad=config.pad)
        crop = padded[top : top + config.size, left : left + config.size]
        if augment.flips([number], view, seed=config.seed, probability=config.flip)[0]:
            crop = crop[:, ::-1]
        images.append((torch.from_numpy(crop.copy()).float() - mean) / std)
    images_BCHW = torch.stack(images).permute(0, 3, 1, 2)
    return Batch(images_BCHW, torch.from_numpy(labels.astype(np.int64)), torch.from_numpy(ids), {})


def step_by_step(loader: Loader, progress: Progress, epochs: int) -> Iterator[Batch]:
    """Yield a rank's micro-batches, their order drawn anew for every step."""
    plan, reader = loader.plan, loader.plan.readers["train"]
    for step in range(progress.step, epochs * plan.steps_per_epoch):
        epoch, at = divmod(step, plan.steps_per_epoch)
        order = augment.epoch_order(reader.samples["shard"], plan.seed, epoch, plan.config.shuffle_shards)
        rows = order[at * plan.batch : (at + 1) * plan.batch][plan.rank :: plan.world]
        for part in np.split(rows, plan.accumulation):
            batch = one_by_one(reader, plan.config, part, plan.config.view(epoch))
            columns = plan.columns(plan.config.view(epoch)) if plan.columns else {}
            yield batch._replace(
                extra={name: torch.from_numpy(column[batch.ids_B]) for name, column in columns.items()}
            )


def assert_equal(ours: Batch, theirs: Batch) -> None:
    assert torch.equal(ours.images_BCHW, theirs.images_BCHW)
    assert ours.images_BCHW.stride() == theirs.images_BCHW.stride()
    assert torch.equal(ours.labels_B, theirs.labels_B)
    assert torch.equal(ours.ids_B, theirs.ids_B)
    assert ours.extra.keys() == theirs.extra.keys()
    assert all(torch.equal(ours.extra[name], theirs.extra[name]) for name in ours.extra)


@quick
@given(
    world=st.integers(1, 3),
    accumulation=st.integers(1, 3),
    start=st.integers(0, 40),
    views=st.sampled_from([None, 1, 2]),
    shuffle_shards=st.integers(0, 3),
    cached=st.booleans(),
    table_rows=st.sampled_from([1, 7, 2**16]),
)
def test_batches_of_every_rank_are_those_of_each_image_by_itself(
    small_shards: Path,
    world: int,
    accumulation: int,
    start: int,
    views: int | None,
    shuffle_shards: int,
    cached: bool,
    table_rows: int,
) -> None:
    """From any step on, however many batches a table holds."""
    config = config_of(small_shards, loader="memory", crop="pad", pad=3, views=views, shuffle_shards=shuffle_shards)
    answers = np.random.default_rng(0).normal(size=(3, 80, 5)).astype(np.float16)

    def columns(view: int) -> dict[str, np.ndarray]:
        return {"logits": answers[view], "number": np.arange(80) + 100 * view}

    keys = {"batch": 6 * accumulation, "accumulation": accumulation, "columns": columns if cached else None}
    for rank in range(world):
        loader = open_loader(config, rank=rank, world=world, **keys)
        progress = Progress(loader.steps_per_epoch, step=start % (3 * loader.steps_per_epoch))
        with mock.patch.object(requests, "_TABLE_ROWS", table_rows):
            ours = list(loader.stream(progress, 3))
        theirs = list(step_by_step(loader, progress, 3))
        assert len(ours) == len(theirs) == (3 * loader.steps_per_epoch - progress.step) * accumulation
        for one, other in zip(ours, theirs, strict=True):
            assert_equal(one, other)


def test_a_view_of_given_images_is_one_batch_whatever_the_batch_of_training(small_shards: Path) -> None:
    loader = open_loader(config_of(small_shards, loader="memory", crop="pad"), batch=4)
    parts = [(np.array([3, 1, 20, 8, 11, 2, 30]), 5), (np.array([7]), 0), (np.arange(4), 2)]
    for batch, (rows, view) in zip(loader.views(parts), parts, strict=True):
        assert_equal(batch, one_by_one(loader.plan.readers["train"], loader.plan.config, rows, view))


@pytest.mark.parametrize(("world", "validation_batch"), [(1, 4), (2, 4), (3, 5), (2, 100)])
def test_validation_has_the_same_batches_however_many_a_table_holds(
    small_shards: Path, world: int, validation_batch: int
) -> None:
    config = config_of(small_shards, loader="memory", crop="pad", validation_batch=validation_batch)
    for rank in range(world):
        loader = open_loader(config, batch=6, rank=rank, world=world)
        together = list(loader.validation())
        with mock.patch.object(requests, "_TABLE_ROWS", 1):
            apart = list(loader.validation())
        share = -(-len(loader.plan.readers["val"].samples) // world)
        sizes = [min(validation_batch, share - first) for first in range(0, share, validation_batch)]
        assert [len(batch.ids_B) for batch in together] == sizes
        for one, other in zip(together, apart, strict=True):
            assert_equal(one, other)


def test_an_epoch_is_drawn_at_once_and_the_next_while_it_is_used(small_shards: Path) -> None:
    loader = open_loader(config_of(small_shards, loader="memory", crop="pad"), batch=4)
    drawn: list[list[int]] = []
    second = threading.Event()

    def flips(ids: np.ndarray, *args: int, **keys: float) -> np.ndarray:
        drawn.append(ids.tolist())
        if len(drawn) == 2:
            second.set()
        return augment_flips(ids, *args, **keys)

    augment_flips, steps = augment.flips, loader.steps_per_epoch
    with mock.patch.object(augment, "flips", flips):
        stream = loader.stream(Progress(steps, step=2), 2)
        begun = [next(stream)]
        assert second.wait(60)
        seen = [number for batch in [*begun, *stream] for number in batch.ids_B.tolist()]
    assert [len(ids) for ids in drawn] == [4 * (steps - 2), 4 * steps]
    assert seen == [number for ids in drawn for number in ids]


def test_more_images_than_one_thread_takes_at_once_keep_their_places(tmp_path: Path) -> None:
    samples = draw_samples(20, [4], "png", 0)
    many = [
        type(sample)(k, k % 7, encode(np.full((4, 4, 3), (k % 251, k // 251, 7), np.uint8), "png"), 4, 4)
        for k, sample in enumerate(samples * 125)
    ]
    folder = write_shards(tmp_path, {"train": many[:4], "val": many}, "png", per_shard=1000)
    config = config_of(folder, size=4, loader="memory", crop="pad", mean=(0, 0, 0), std=(1, 1, 1), validation_batch=999)
    for batch in open_loader(config).validation():
        colours = (255 * batch.images_BCHW[:, :, 0, 0]).round().int()
        assert colours.tolist() == [[k % 251, k // 251, 7] for k in batch.ids_B.tolist()]


def test_grey_images_become_colour(tmp_path: Path) -> None:
    samples = [
        type(sample)(sample.id, sample.label, encode(np.full((8, 8), 10 + sample.id, np.uint8), "png"), 8, 8)
        for sample in draw_samples(5, [8], "png", 0)
    ]
    folder = write_shards(tmp_path, {"train": samples, "val": samples}, "png")
    config = config_of(folder, size=8, loader="memory", crop="pad", mean=(0, 0, 0), std=(1, 1, 1))
    for batch in open_loader(config).validation():
        expected = (10 + batch.ids_B[:, None, None, None]) / 255
        torch.testing.assert_close(batch.images_BCHW, expected.expand(-1, 3, 8, 8), atol=1e-6, rtol=0)
