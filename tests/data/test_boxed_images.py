"""Images with boxes: the pixels show each box where its targets say, whatever the rank, the batch or a resume."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from boxed import COLOURS_K3, GROUND, draw_boxed, write_boxed
from masked import write_masked

from pipeline.batch import Batch, Progress
from pipeline.data.buckets import epoch_batches
from pipeline.data.config import Config
from pipeline.data.loader import Loader, create_loader, transform_fingerprint
from pipeline.tasks._boxes import AREAS, BOXES, CLASSES, CROWD, DRAWS, SCALES, SIZES

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
BUCKETS = [[64, 96], [96, 64]]
TRAIN, VAL = 20, 7
CPU = torch.device("cpu")
KINDS = {BOXES, CLASSES, CROWD, AREAS, SIZES, SCALES, DRAWS}


@pytest.fixture(scope="module")
def boxed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_boxed(tmp_path_factory.mktemp("boxed") / "shards", TRAIN, VAL)


def config_of(folder: Path, **keys: object) -> Config:
    known = {"crop": "keep_ratio", "short": [32, 48, 64], "long": 90, "buckets": BUCKETS, "mean": MEAN, "std": STD}
    return Config.model_validate({"path": str(folder), **known, **keys})


def open_boxed(config: Config, *, rank: int = 0, world: int = 1, batch: int = 6) -> Loader:
    return create_loader(config, batch=batch, accumulation=1, seed=3, rank=rank, world=world, device=CPU)


def training(loader: Loader, step: int = 0, epochs: int = 2) -> list[Batch]:
    return list(loader.stream(Progress(loader.steps_per_epoch, step=step), epochs))


def rows_of(batches: Iterable[Batch]) -> list[tuple[int, int, tuple]]:
    """Return id, label and all else of each image: pixels, and boxes without padding."""
    return [
        (
            int(batch.ids_B[row]),
            int(batch.labels_B[row]),
            (batch.images_BCHW.shape, batch.images_BCHW[row].numpy().tobytes(), *targets_of(batch, row)),
        )
        for batch in batches
        for row in range(len(batch.ids_B))
    ]


def targets_of(batch: Batch, row: int) -> list[list]:
    real = batch.targets[CLASSES][row] >= 0
    boxes = [batch.targets[name][row][real].tolist() for name in (BOXES, CLASSES, CROWD, AREAS)]
    return [*boxes, *(batch.targets[name][row].tolist() for name in (SIZES, SCALES, DRAWS))]


def painted_boxes(image_CHW: np.ndarray, boxes_N4: np.ndarray) -> list[tuple[list[int], np.ndarray]]:
    """Return the tight box and the mean colour of what is painted near each box, which is beside its neighbours."""
    pixels_HWC = image_CHW.transpose(1, 2, 0) * np.array(STD) + np.array(MEAN)
    painted_HW = pixels_HWC.max(axis=2) > (GROUND + COLOURS_K3.max()) / 2 / 255
    order = boxes_N4[:, 0].argsort()
    cuts = np.rint((boxes_N4[order[:-1], 2] + boxes_N4[order[1:], 0]) / 2).astype(int)
    edges = [0, *cuts.tolist(), image_CHW.shape[2]]
    found = {}
    for number, start, end in zip(order.tolist(), edges, edges[1:], strict=False):
        y, x = np.nonzero(painted_HW[:, start:end])
        colour = pixels_HWC[:, start:end][y, x].mean(axis=0) * 255
        found[number] = [x.min() + start, y.min(), x.max() + start + 1, y.max() + 1], colour
    assert bool(len(boxes_N4)) == bool(painted_HW.any())
    return [found[number] for number in range(len(boxes_N4))]


def assert_painted(batch: Batch, drawn: int) -> None:
    """Assert that every image of a batch has its boxes where, and in the colours that, its targets say."""
    for row, number in enumerate(batch.ids_B.tolist()):
        pixels, table = draw_boxed(drawn + number)
        boxes, classes, crowd, areas, size, scales, _ = targets_of(batch, row)
        image_CHW = batch.images_BCHW[row].numpy()
        assert np.abs(image_CHW[:, size[0] :]).max(initial=0) == np.abs(image_CHW[:, :, size[1] :]).max(initial=0) == 0
        assert np.abs(image_CHW[:, : size[0], : size[1]]).max(axis=0).min() > 0
        assert scales == pytest.approx([size[0] / pixels.shape[0], size[1] / pixels.shape[1]])
        assert (classes, crowd, areas) == (table[:, 4].tolist(), (table[:, 5] == 1).tolist(), table[:, 6].tolist())
        shown = painted_boxes(image_CHW[:, : size[0], : size[1]], np.array(boxes).reshape(-1, 4))
        for box, label, (tight, colour) in zip(boxes, classes, shown, strict=True):
            np.testing.assert_allclose(box, tight, atol=1)
            assert np.abs(COLOURS_K3 - colour).sum(axis=1).argmin() == label


@pytest.mark.parametrize("channels_last", [True, False])
def test_every_box_is_where_its_image_shows_it(boxed: Path, channels_last: bool):
    seen = set()
    for batch in training(open_boxed(config_of(boxed, channels_last=channels_last)), epochs=6):
        assert set(batch.targets) == KINDS
        assert_painted(batch, drawn=0)
        for number, boxes_N4, size in zip(
            batch.ids_B.tolist(), batch.targets[BOXES], batch.targets[SIZES], strict=True
        ):
            pixels, table = draw_boxed(number)
            if len(table):
                mirrored = abs(boxes_N4[0, 0] - table[0, 0] * size[1] / pixels.shape[1]) > 1
                seen.add((tuple(batch.images_BCHW.shape[2:]), int(size.min()), bool(mirrored)))
    expected = {(tuple(bucket), side, flip) for bucket in BUCKETS for side in (32, 48, 64) for flip in (False, True)}
    assert expected <= seen


def test_every_view_of_an_image_has_draws_of_its_own(boxed: Path):
    draws = [tuple(row) for batch in training(open_boxed(config_of(boxed))) for row in batch.targets[DRAWS].tolist()]
    assert len({number for row in draws for number in row}) == 2 * len(draws)
    assert all(0 <= number < 2**32 for row in draws for number in row)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_validation_shows_every_image_once_at_its_largest_grouped_by_bucket(boxed: Path, world: int):
    seen, canvases = [], []
    for rank in range(world):
        batches = list(open_boxed(config_of(boxed, validation_batch=2), rank=rank, world=world).validation())
        canvases.append([tuple(batch.images_BCHW.shape[2:]) for batch in batches])
        for batch in batches:
            real = batch.ids_B >= 0
            assert torch.equal(batch.labels_B, real.long() - 1)
            assert (batch.targets[CLASSES][~real] == -1).all()
            assert (batch.targets[BOXES][~real] == 0).all()
            assert (batch.targets[SIZES].amin(1) >= 63).all()
            images_BCHW, labels_B, ids_B = (column[real] for column in batch[:3])
            kept = Batch(images_BCHW, labels_B, ids_B, {}, {name: x[real] for name, x in batch.targets.items()})
            assert_painted(kept, drawn=1000)
            seen += kept.ids_B.tolist()
    assert sorted(seen) == list(range(VAL))
    assert canvases == canvases[:1] * world
    assert canvases[0] == sorted(canvases[0])


def test_validation_keeps_boxes_that_become_smaller_than_a_pixel(boxed: Path):
    small = config_of(boxed, short=[2], buckets=[[32, 32]])
    counts = {}
    for batch in open_boxed(small).validation():
        counts |= dict(zip(batch.ids_B.tolist(), (batch.targets[CLASSES] >= 0).sum(1).tolist(), strict=True))
    assert counts == {number: len(draw_boxed(1000 + number)[1]) for number in range(VAL)}
    trained = sum(int((batch.targets[CLASSES] >= 0).sum()) for batch in training(open_boxed(small), epochs=1))
    assert trained < sum(len(draw_boxed(number)[1]) for number in range(TRAIN)) / 2


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_see_the_global_batches_of_one_process(boxed: Path, world: int):
    config = config_of(boxed)
    shares = [rows_of(training(open_boxed(config, rank=rank, world=world))) for rank in range(world)]
    alone = rows_of(training(open_boxed(config)))
    each = 6 // world
    together = [shares[row % world][step * each + row // world] for step in range(len(alone) // 6) for row in range(6)]
    assert [row[:2] for row in together] == [row[:2] for row in alone]
    for ours, theirs in zip(together, alone, strict=True):
        assert ours[2][1:] == theirs[2][1:]
        assert ours[2][0][1:] == theirs[2][0][1:]


def test_a_stream_resumed_anywhere_goes_on_with_the_same_batches(boxed: Path):
    loader = open_boxed(config_of(boxed))
    whole = rows_of(training(loader))
    for step in range(1, 2 * loader.steps_per_epoch):
        assert rows_of(training(loader, step)) == whole[6 * step :]


def test_an_image_looks_the_same_in_any_batch_of_its_view(boxed: Path):
    by_two, by_three = (
        {row[0]: row[2][1:] for row in rows_of(training(open_boxed(config_of(boxed), batch=batch), epochs=1))}
        for batch in (2, 3)
    )
    both = by_two.keys() & by_three.keys()
    assert len(both) > TRAIN - 2 * 2 - 2 * 3
    assert all(by_two[number] == by_three[number] for number in both)


def test_every_epoch_has_as_many_batches_and_an_image_once_at_most(boxed: Path):
    loader = open_boxed(config_of(boxed), batch=4)
    assert loader.steps_per_epoch == 13 // 4 + 7 // 4 == epoch_batches(loader.plan.config, loader.manifest, 4)
    batches = training(loader, epochs=5)
    left_out = set()
    for epoch in range(5):
        steps = batches[epoch * loader.steps_per_epoch :][: loader.steps_per_epoch]
        ids = torch.cat([batch.ids_B for batch in steps]).tolist()
        assert len(ids) == len(set(ids)) == loader.samples_per_epoch
        assert TRAIN - len(ids) < len(BUCKETS) * 4
        left_out |= {frozenset(range(TRAIN)) - frozenset(ids)}
    assert len(left_out) > 1


def test_held_out_images_are_in_buckets_too(boxed: Path):
    config = config_of(boxed, holdout={"share": 0.25})
    loader = open_boxed(config, batch=2)
    validated = torch.cat([batch.ids_B for batch in loader.validation()]).tolist()
    trained = torch.cat([batch.ids_B for batch in training(loader)]).tolist()
    assert len(validated) == 5
    assert not set(validated) & set(trained)
    assert (
        loader.steps_per_epoch
        == epoch_batches(config, loader.manifest, 2)
        < epoch_batches(config_of(boxed), loader.manifest, 2)
    )


def test_noise_in_place_of_images_has_their_boxes_and_sizes(boxed: Path):
    pixels, noise = (training(open_boxed(config_of(boxed, loader=kind)), epochs=1) for kind in ("dali", "synthetic"))
    for shown, drawn in zip(pixels, noise, strict=True):
        assert drawn.images_BCHW.shape == shown.images_BCHW.shape
        assert 0.9 < drawn.images_BCHW.std().item() < 1.1
        assert all(torch.equal(drawn.targets[name], shown.targets[name]) for name in KINDS)


def test_a_cache_of_answers_is_bound_to_the_sizes_and_buckets(boxed: Path):
    manifest = open_boxed(config_of(boxed)).manifest
    changes = ({}, {"short": [64]}, {"long": 96}, {"buckets": BUCKETS[::-1]}, {"flip": 0.25})
    facts = [transform_fingerprint(config_of(boxed, **keys), manifest, CPU) for keys in changes]
    assert all(one != other for number, one in enumerate(facts) for other in facts[:number])
    defaults = {"short": [800], "long": 1333, "buckets": None}
    assert transform_fingerprint(config_of(boxed, **{**defaults, "short": None, "long": None}), manifest, CPU) == (
        transform_fingerprint(config_of(boxed, **defaults), manifest, CPU)
    )


def test_images_of_one_bucket_are_read_in_any_view_and_those_of_several_are_refused(boxed: Path):
    parts = [(np.array([2, 0, 3]), 5)]
    (batch,) = open_boxed(config_of(boxed)).views(iter(parts))
    assert_painted(batch, drawn=0)
    with pytest.raises(ValueError, match=r"data.buckets: images of several buckets cannot be in one batch"):
        next(iter(open_boxed(config_of(boxed)).views([(np.array([0, 1]), 0)])))
    (square,) = open_boxed(config_of(boxed, buckets=[[96, 96]])).views([(np.array([0, 1]), 0)])
    assert square.images_BCHW.shape == (2, 3, 96, 96)


def test_images_that_are_in_no_batch_are_told(boxed: Path, capsys: pytest.CaptureFixture[str]):
    open_boxed(config_of(boxed), batch=8)
    assert "note: data.buckets: 7 of 20 training images are in no batch" in capsys.readouterr().out
    open_boxed(config_of(boxed), batch=7)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("keys", "batch", "message"),
    [
        (
            {"buckets": [[64, 96]]},
            2,
            "data.buckets: none holds 7 images of train, such as id 1 of 64 × 48,",
        ),
        ({"buckets": [[64, 96]]}, 2, "resized to 85 × 64; add \\[96, 64\\], or lower short or long"),
        ({}, 14, "data.buckets: no bucket has the images of one global batch: 14; the fullest, 64 × 96, has 13"),
    ],
)
def test_images_that_fit_no_batch_are_refused(boxed: Path, keys: dict[str, object], batch: int, message: str):
    with pytest.raises(ValueError, match=message):
        open_boxed(config_of(boxed, **keys), batch=batch)


def test_shards_without_boxes_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"data.crop: keep_ratio needs images with boxes, and .* has none"):
        open_boxed(config_of(write_masked(tmp_path / "masked")))


def test_an_undecodable_image_is_named(boxed: Path, tmp_path: Path):
    loader = open_boxed(config_of(boxed))
    reader = loader.plan.readers["train"]
    bytes_of = reader.bytes
    reader.bytes = lambda rows: [
        np.zeros_like(x) if row == 4 else x for row, x in zip(rows, bytes_of(rows), strict=True)
    ]
    with pytest.raises(ValueError, match=r"sample 4 in .* cannot be decoded"):
        list(islice(loader.stream(Progress(loader.steps_per_epoch), 3), 9))
