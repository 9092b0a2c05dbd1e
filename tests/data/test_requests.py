from __future__ import annotations

import mmap
import sys
import threading
import time
from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from shard_factory import config_of

from pipeline.batch import Progress
from pipeline.data import augment
from pipeline.data.config import Config
from pipeline.data.read_ahead import read_ahead
from pipeline.data.requests import BatchSampler, SampleRequest, _read_into_memory, validation_geometry
from shards.read import SAMPLE_DTYPE, SplitReader

quick = settings(
    derandomize=True, deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def readers(photo_shards: Path) -> dict[str, SplitReader]:
    return {split: SplitReader(photo_shards, split) for split in ("train", "val")}


def plan_of(
    readers: dict[str, SplitReader], batch: int = 6, accumulation: int = 1, rank: int = 0, world: int = 1, **keys
):
    config = config_of(
        readers["train"].folder, **{key: keys.pop(key) for key in ("views", "shuffle_shards") if key in keys}
    )
    return BatchSampler(
        config, readers, rows_used(readers), batch, accumulation, 3, rank, world, **{"encoded": False, **keys}
    )


def rows_used(readers: dict[str, SplitReader]) -> dict[str, np.ndarray]:
    return {split: np.arange(len(reader.samples)) for split, reader in readers.items()}


def rows_of(requests: list[SampleRequest]) -> list[tuple]:
    """Return everything that decides the pixels, a tuple a row."""
    return [
        (int(request.ids_B[k]), int(request.labels_B[k]), *(column[k].tolist() for column in request.geometry))
        for request in requests
        for k in range(len(request.rows_B))
    ]


def interleaved(shares: list[list[tuple]], batch: int) -> list[tuple]:
    """Put the ranks' rows back in the order of the global batches."""
    world, each = len(shares), batch // len(shares)
    batches = range(len(shares[0]) // each)
    return [shares[row % world][step * each + row // world] for step in batches for row in range(batch)]


@quick
@given(
    unit=st.integers(1, 6),
    accumulation=st.integers(1, 3),
    shuffle_shards=st.integers(0, 3),
    start=st.integers(0, 40),
    views=st.sampled_from([None, 1, 2]),
)
def test_the_global_batches_are_the_same_for_any_number_of_ranks_and_micro_batches(
    readers: dict[str, SplitReader], unit: int, accumulation: int, shuffle_shards: int, start: int, views: int | None
) -> None:
    """Ids, labels, boxes, crops and flips, from any step on."""
    batch = 6 * accumulation * min(unit, 6 // accumulation)
    steps = 37 // batch
    progress = Progress(steps, step=start % (2 * steps))

    def share(rank: int, world: int, accumulation: int) -> list[tuple]:
        plan = plan_of(readers, batch, accumulation, rank, world, shuffle_shards=shuffle_shards, views=views)
        assert plan.steps_per_epoch == steps
        return rows_of(list(plan.training(progress, 2)))

    alone = share(0, 1, 1)
    assert len(alone) == (2 * steps - progress.step) * batch
    for world in (1, 2, 3):
        assert interleaved([share(rank, world, accumulation) for rank in range(world)], batch) == alone


def test_every_id_comes_once_an_epoch_bar_the_tail_which_differs(readers: dict[str, SplitReader]) -> None:
    plan = plan_of(readers, batch=6)
    known = set(readers["train"].samples["id"].tolist())
    left_out = []
    for epoch in range(4):
        ids = [row[0] for row in rows_of(list(plan.training(Progress(6, step=6 * epoch), epoch + 1)))]
        assert len(ids) == len(set(ids)) == 36
        left_out.append(known - set(ids))
    assert len(set.union(*left_out)) > 1


def test_micro_batches_are_consecutive_parts_of_the_ranks_rows(readers: dict[str, SplitReader]) -> None:
    whole = next(plan_of(readers, batch=12, rank=1, world=2).training(Progress(3), 1))
    parts = plan_of(readers, batch=12, accumulation=3, rank=1, world=2).training(Progress(3), 1)
    first = [next(parts) for _ in range(3)]
    assert [len(part.rows_B) for part in first] == [2, 2, 2]
    assert np.concatenate([part.rows_B for part in first]).tolist() == whole.rows_B.tolist()


def test_labels_and_encoded_images_are_those_of_the_ids(readers: dict[str, SplitReader]) -> None:
    request = next(plan_of(readers, encoded=True).training(Progress(6), 1))
    samples = readers["train"].samples
    labels = readers["train"].labels_by_id()
    assert request.labels_B.tolist() == [labels[number] for number in request.ids_B.tolist()]
    for row, number, encoded in zip(request.rows_B, request.ids_B.tolist(), request.encoded, strict=True):
        assert samples[row]["id"] == number
        assert encoded[:3].tobytes() == b"\xff\xd8\xff"
        assert len(encoded) == samples[row]["size"]


@pytest.mark.parametrize(("views", "same"), [(None, False), (2, True)])
def test_views_take_turns(readers: dict[str, SplitReader], views: int | None, same: bool) -> None:
    plan = plan_of(readers, views=views)
    epochs = [rows_of(list(plan.training(Progress(6, step=6 * epoch), epoch + 1))) for epoch in range(4)]
    looks = [{row[0]: row for row in rows} for rows in epochs]

    def agree(one: int, other: int) -> bool:
        both = looks[one].keys() & looks[other].keys()
        return all(looks[one][number] == looks[other][number] for number in both)

    assert agree(0, 2) == agree(1, 3) == same
    assert not agree(0, 1)
    assert epochs[0] != epochs[2]  # the order is another one, whatever the views


@quick
@given(world=st.integers(1, 4), validation_batch=st.integers(1, 12))
def test_validation_holds_each_image_once_in_equally_many_batches_of_every_rank(
    readers: dict[str, SplitReader], world: int, validation_batch: int
) -> None:
    shares = []
    for rank in range(world):
        plan = plan_of(readers, batch=12, rank=rank, world=world)
        config = plan.config.model_copy(update={"validation_batch": validation_batch})
        shares.append(
            list(BatchSampler(config, readers, rows_used(readers), 12, 1, 3, rank, world, encoded=False).validation())
        )
    sizes = [[len(request.rows_B) for request in share] for share in shares]
    assert sizes == [sizes[0]] * world
    rows = [row for share in shares for row in rows_of(share)]
    real = [row for row in rows if row[0] != -1]
    assert sorted(row[0] for row in real) == sorted(readers["val"].samples["id"].tolist())
    labels = readers["val"].labels_by_id()
    assert all(row[1] == labels[row[0]] for row in real)
    assert all(row[1] == -1 for row in rows if row[0] == -1)
    assert len(rows) - len(real) == -len(real) % world


class Watched(np.ndarray):
    """An array that knows which rows were taken of it, and where."""

    def take(self, indices: np.ndarray, *args: object, **keys: object) -> np.ndarray:
        self.taken.append((indices.tolist(), threading.get_ident()))
        return super().take(indices, *args, **keys)


@pytest.mark.parametrize("batch", [3, 18])
def test_columns_rows_are_taken_by_id_at_the_view_on_other_threads(readers: dict[str, SplitReader], batch: int) -> None:
    table = np.arange(2 * 60 * 5, dtype=np.float16).reshape(2, 60, 5)
    table.flags.writeable = False  # as a memory-mapped cache is
    watched = table[1].view(Watched)
    watched.taken = []

    def columns(view: int) -> dict[str, np.ndarray]:
        assert view == 1
        return {"logits": watched, "row": np.arange(60, dtype=np.int32)}

    plan = plan_of(readers, batch, columns=columns, views=2)
    steps = plan.steps_per_epoch
    progress = Progress(steps, step=3 * steps)
    requests = list(plan.training(progress, 4))
    extra = list(read_ahead(plan.extra(progress, 4), 2))
    assert len(extra) == len(requests) == steps
    # Several threads ask, each for a part of a batch: a distant file system answers them at once.
    ids = [each for taken, _ in watched.taken for each in taken]
    assert sorted(ids) == sorted(each for request in requests for each in request.ids_B.tolist())
    assert all(len(taken) < batch for taken, _ in watched.taken)
    assert threading.get_ident() not in {thread for _, thread in watched.taken}
    for request, columns_B in zip(requests, extra, strict=True):
        np.testing.assert_array_equal(columns_B["logits"].numpy(), table[1][request.ids_B])
        assert columns_B["row"].tolist() == request.ids_B.tolist()


def test_every_page_of_an_image_is_read_while_other_threads_run() -> None:
    """A page fault may take as long as a disk does; the training thread must not wait for it."""
    page, touched, other = mmap.PAGESIZE, [], []

    class Pages(np.ndarray):
        def take(self, indices: np.ndarray, *args: object, **keys: object) -> np.ndarray:
            touched.extend((np.minimum(indices, len(self) - 1) // page).tolist())
            return super().take(indices, *args, **keys)

    for size in (0, 1, page, page + 1, 3 * page):
        touched.clear()
        _read_into_memory([np.zeros(size, np.uint8).view(Pages)])
        assert set(touched) == set(range(-(-size // page)))

    def count() -> None:
        while not stop.is_set():
            other.append(None)
            time.sleep(0)

    stop, views = threading.Event(), [np.zeros(9, np.uint8)] * 20_000
    counting = threading.Thread(target=count)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # no thread is made to give way: it does by itself, or not at all
    try:
        counting.start()
        before = len(other)
        _read_into_memory(views)
        assert len(other) > before + 1
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        counting.join()


def numbers(produced: list[int], fail_at: int = 1000) -> Generator[int, None, None]:
    for number in range(20):
        if number == fail_at:
            raise KeyError("no such row")
        produced.append(number)
        yield number


@pytest.mark.parametrize("depth", [1, 3, 50])
def test_reading_ahead_keeps_order_and_depth(depth: int) -> None:
    produced: list[int] = []
    ahead = read_ahead(numbers(produced), depth)
    seen = []
    for number in ahead:
        seen.append(number)
        assert len(produced) <= len(seen) + depth
    assert seen == list(range(20))


def test_an_exception_of_the_reading_thread_comes_out_where_the_item_would_have() -> None:
    seen = []
    with pytest.raises(KeyError, match="no such row"):
        seen.extend(read_ahead(numbers([], fail_at=7), 3))
    ahead = read_ahead(numbers([], fail_at=7), 3)
    assert [next(ahead) for _ in range(7)] == list(range(7))


def test_the_thread_is_at_the_gpu_that_its_loader_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    at: list[tuple[object, int]] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: at.append((index, threading.get_ident())))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    for device, index in (("cuda:1", 1), ("cuda", 3)):
        assert len(list(read_ahead(numbers([]), 2, torch.device(device)))) == 20
        (found, thread), *_ = at
        assert (found, thread != threading.get_ident()) == (index, True)
        at.clear()
    assert len(list(read_ahead(numbers([]), 2))) == 20
    assert not at


def test_closing_early_ends_the_thread_and_the_source() -> None:
    before = threading.active_count()
    source = numbers([])
    ahead = read_ahead(source, 2)
    assert [next(ahead), next(ahead)] == [0, 1]
    assert threading.active_count() == before + 1
    ahead.close()
    assert threading.active_count() == before
    assert list(source) == []


def sides(*sizes: tuple[int, int]) -> np.ndarray:
    """Return rows of a sample table of images of those widths and heights."""
    samples = np.zeros(len(sizes), SAMPLE_DTYPE)
    samples["width"], samples["height"] = zip(*sizes, strict=True)
    return samples


@quick
@given(short=st.integers(1, 300), long=st.integers(1, 50_000), turned=st.booleans())
def test_validation_resizes_no_more_of_a_long_thin_image_than_a_bound_around_its_middle(short, long, turned):
    config = Config(path="", size=48, resize=64, mean=(0, 0, 0), std=(1, 1, 1))
    width, height = (long, short) if turned else (short, long)
    boxes, resized, crops, _ = (each[0] for each in validation_geometry(config, sides((width, height))))
    assert resized.max() <= 17 * 64
    if max(width, height) <= 16 * min(width, height):
        assert boxes.tolist() == [0, 0, height, width]
    assert (2 * boxes[:2] + boxes[2:]).tolist() == [height, width]
    assert (crops >= 0).all()
    assert (crops + 48 <= resized).all()


@pytest.mark.parametrize("size", [(8, 4000), (4001, 9), (3, 1000)])
def test_the_middle_of_a_long_thin_image_is_what_all_of_it_would_give(size):
    config = Config(path="", size=48, resize=64, mean=(0, 0, 0), std=(1, 1, 1))
    width, height = size
    y, x = np.mgrid[:height, :width]
    image = Image.fromarray((127 + 60 * np.sin((x + y) / 40) + 60 * np.cos(x / 3 - y / 30)).astype(np.uint8))
    (top, left, tall, wide), resized, crop, _ = (each[0] for each in validation_geometry(config, sides(size)))
    part = image.crop((left, top, left + wide, top + tall)).resize(resized[::-1].tolist(), Image.Resampling.BILINEAR)
    (all_resized,), (all_crop,) = augment.resize_and_centre_crop([width], [height], 64, 48)
    whole = image.resize(all_resized[::-1].tolist(), Image.Resampling.BILINEAR)
    found, wanted = (
        np.asarray(each.crop((at[1], at[0], at[1] + 48, at[0] + 48))).astype(int)
        for each, at in ((part, crop), (whole, all_crop))
    )
    assert abs(found - wanted).max() <= 8
