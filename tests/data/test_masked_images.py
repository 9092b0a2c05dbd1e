"""Images with masks: both go through the same resize, crop and flip, and nothing depends on batch, rank or resume."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masked import COLOURS_K3, draw_masked, write_masked
from pydantic import ValidationError
from torch import Tensor

from pipeline.batch import Batch, Progress
from pipeline.data import augment
from pipeline.data.config import SCALE_FACTORS, Config
from pipeline.data.loader import Loader, create_loader, transform_fingerprint
from pipeline.data.requests import training_geometry
from pipeline.image_size import height_width
from pipeline.tasks._masks import MASK
from shards.manifest import IGNORED_VALUE

WIDTH, HEIGHT = 48, 40
MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
quick = settings(derandomize=True, deadline=None, max_examples=25)


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_masked(tmp_path_factory.mktemp("masked") / "shards", 12, 5, size=(WIDTH, HEIGHT))


def config_of(folder: Path, **keys: object) -> Config:
    known = {"size": (32, 52), "validation_size": (HEIGHT, WIDTH), "crop": "scaled", "mean": MEAN, "std": STD}
    return Config.model_validate({"path": str(folder), **known, **keys})


def open_masked(config: Config, *, rank: int = 0, world: int = 1, batch: int = 4) -> Loader:
    device = torch.device("cpu")
    return create_loader(config, batch=batch, accumulation=1, seed=3, rank=rank, world=world, device=device)


def training(loader: Loader, step: int = 0, epochs: int = 2) -> list[Batch]:
    return list(loader.stream(Progress(loader.steps_per_epoch, step=step), epochs))


def nearest(mask_HW: np.ndarray, resized: np.ndarray) -> list[np.ndarray]:
    """Return the mask at another size by the nearest pixel's centre: on an edge of two pixels both count, [4, h, w]."""
    sides = []
    for new, old in zip(resized.tolist(), mask_HW.shape, strict=True):
        centres = (np.arange(new) + 0.5) * old / new
        sides.append([np.clip(np.floor(centres + shift), 0, old - 1).astype(int) for shift in (-1e-3, 1e-3)])
    return [mask_HW[rows][:, columns] for rows in sides[0] for columns in sides[1]]


def expected_masks(loader: Loader, view: int, ids_B: Tensor) -> list[np.ndarray]:
    """Return what the crop of each mask may be, [4, h, w], by NumPy; it ends where the image does."""
    samples = loader.plan.readers["train"].samples
    rows = [int(np.flatnonzero(samples["id"] == number)[0]) for number in ids_B.tolist()]
    geometry = training_geometry(loader.plan.config, samples[rows], view)
    height, width = height_width(loader.plan.config.size)
    found = []
    for number, (_, resized, crop, flip) in zip(ids_B.tolist(), zip(*geometry, strict=True), strict=True):
        whole_4HW = np.stack(nearest(draw_masked(number, WIDTH, HEIGHT)[1], resized))
        crop_4HW = whole_4HW[:, crop[0] : crop[0] + height, crop[1] : crop[1] + width]
        found.append(crop_4HW[..., ::-1] if flip else crop_4HW)
    return found


@pytest.mark.parametrize("channels_last", [True, False])
def test_a_mask_takes_the_nearest_pixels_and_the_rest_of_the_crop_has_no_class(masked: Path, channels_last: bool):
    loader = open_masked(config_of(masked, channels_last=channels_last))
    shapes = set()
    for step, batch in enumerate(training(loader)):
        view = step // loader.steps_per_epoch
        masks = zip(batch.targets[MASK].numpy(), expected_masks(loader, view, batch.ids_B), strict=True)
        for mask_HW, expected_4HW in masks:
            height, width = expected_4HW.shape[1:]
            assert mask_HW.shape == (32, 52)
            assert (mask_HW[:height, :width] == expected_4HW).any(0).all()
            assert (mask_HW[height:] == IGNORED_VALUE).all()
            assert (mask_HW[:, width:] == IGNORED_VALUE).all()
            shapes.add((height, width))
    assert (32, 52) in shapes  # some crops are inside of their image, and others are not
    assert any(height < 32 for height, _ in shapes)
    assert any(width < 52 for _, width in shapes)


def test_an_image_has_the_colour_of_its_mask_away_from_edges(masked: Path):
    colours_K3 = (COLOURS_K3 / 255 - np.array(MEAN)) / np.array(STD)
    inside = 0
    for batch in training(open_masked(config_of(masked))):
        for image_CHW, mask_HW in zip(batch.images_BCHW.numpy(), batch.targets[MASK].numpy(), strict=True):
            windows = np.lib.stride_tricks.sliding_window_view(mask_HW, (7, 7))
            even = (windows == windows[..., :1, :1]).all((2, 3)) & (windows[..., 3, 3] != IGNORED_VALUE)
            for y, x in np.argwhere(even) + 3:
                inside += 1
                assert image_CHW[:, y, x] == pytest.approx(colours_K3[mask_HW[y, x]], abs=1e-5)
    assert inside > 1000


def test_what_an_image_does_not_cover_is_zero_after_normalisation(masked: Path):
    small = open_masked(config_of(masked, scales=(0.5,)))
    for batch in training(small, epochs=1):
        assert batch.images_BCHW[:, :, HEIGHT // 2 :].abs().max() == 0
        assert batch.images_BCHW[:, :, :, WIDTH // 2 :].abs().max() == 0


def join(batches: list[Batch]) -> tuple[Tensor, Tensor, Tensor]:
    columns = zip(*((batch.ids_B, batch.images_BCHW, batch.targets[MASK]) for batch in batches), strict=True)
    ids_N, images_NCHW, masks_NHW = (torch.cat(column) for column in columns)
    return ids_N, images_NCHW, masks_NHW


def test_ranks_see_the_images_and_masks_of_one_process(masked: Path):
    config = config_of(masked)
    alone = join(training(open_masked(config)))
    shares = [join(training(open_masked(config, rank=rank, world=2))) for rank in range(2)]
    for column, parts in zip(alone, zip(*shares, strict=True), strict=True):
        assert torch.equal(torch.stack(list(parts), 1).flatten(0, 1), column)


def test_a_stream_resumed_anywhere_goes_on_with_the_same_masks(masked: Path):
    loader = open_masked(config_of(masked))
    whole = training(loader)
    for step in (1, 4):
        for one, other in zip(join(training(loader, step)), join(whole[step:]), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_validation_shows_every_whole_image_once_and_padding_has_no_class(masked: Path, world: int):
    seen = {}
    for rank in range(world):
        config = config_of(masked, validation_batch=2, validation_size=(48, 64))
        for batch in open_masked(config, rank=rank, world=world, batch=6).validation():
            columns = batch.ids_B.tolist(), batch.images_BCHW, batch.targets[MASK]
            for number, image_CHW, mask_HW in zip(*columns, strict=True):
                if number < 0:
                    assert (mask_HW == IGNORED_VALUE).all()
                    continue
                assert number not in seen
                seen[number] = mask_HW
                pixels, mask = draw_masked(1000 + number, WIDTH, HEIGHT)
                assert mask_HW[:HEIGHT, :WIDTH].tolist() == mask.tolist()
                assert (mask_HW[HEIGHT:] == IGNORED_VALUE).all()
                assert (mask_HW[:, WIDTH:] == IGNORED_VALUE).all()
                expected = (pixels / 255 - np.array(MEAN)) / np.array(STD)
                assert image_CHW[:, :HEIGHT, :WIDTH].permute(1, 2, 0).numpy() == pytest.approx(expected, abs=1e-5)
                assert image_CHW[:, HEIGHT:].abs().max() == image_CHW[:, :, WIDTH:].abs().max() == 0
    assert sorted(seen) == list(range(5))


@quick
@given(seed=st.integers(0, 2**63 - 1), view=st.integers(0, 1000), split_at=st.integers(0, 40))
def test_scale_and_place_of_an_image_do_not_depend_on_its_batch(seed: int, view: int, split_at: int):
    rng = np.random.default_rng(0)
    ids, widths, heights = rng.integers(0, 10**7, 40), rng.integers(1, 600, 40), rng.integers(1, 600, 40)

    def draw(rows: np.ndarray) -> np.ndarray:
        sides = widths[rows], heights[rows]
        resized, crops = augment.scaled_crop(ids[rows], view, *sides, seed=seed, scales=SCALE_FACTORS, size=(128, 256))
        return np.concatenate([resized, crops], axis=1)

    order = rng.permutation(40)
    parts = np.concatenate([draw(order[:split_at]), draw(order[split_at:])])
    np.testing.assert_array_equal(parts, draw(np.arange(40))[order])


def test_every_scale_and_place_is_drawn_equally_often():
    count = 20_000
    ids, sides = np.arange(count), np.full(count, 100)
    resized, crops = augment.scaled_crop(ids, 0, sides, sides, seed=1, scales=SCALE_FACTORS, size=(96, 120))
    numbers, often = np.unique(resized[:, 0], return_counts=True)
    assert numbers.tolist() == [round(100 * scale) for scale in SCALE_FACTORS]
    assert np.abs(often / count * len(SCALE_FACTORS) - 1).max() < 0.1
    of_largest = crops[resized[:, 0] == 200]
    assert of_largest.min(axis=0).tolist() == [0, 0]
    assert of_largest.max(axis=0).tolist() == [200 - 96, 200 - 120]
    assert (crops[resized[:, 0] < 96] == 0).all()


def test_a_cache_of_answers_is_bound_to_the_scales(masked: Path):
    device = torch.device("cpu")
    facts = [
        transform_fingerprint(config, open_masked(config).manifest, device)
        for config in (config_of(masked), config_of(masked, scales=SCALE_FACTORS), config_of(masked, scales=(1.0, 2.0)))
    ]
    assert facts[0] == facts[1] != facts[2]


def test_held_out_training_images_are_validated_whole_too(masked: Path):
    with pytest.raises(ValueError, match="the largest have 40 × 48 pixels"):
        open_masked(config_of(masked, holdout={"share": 0.5}, validation_size=(32, 48)))
    loader = open_masked(config_of(masked, holdout={"share": 0.5}))
    assert sum(int((batch.ids_B >= 0).sum()) for batch in loader.validation()) == 6


def test_images_that_fill_their_crop_at_no_scale_are_told(masked: Path, capsys: pytest.CaptureFixture[str]):
    open_masked(config_of(masked, scales=(0.5, 1.0)))
    assert (
        "note: data.size: 12 of 12 training images are smaller than 32 × 52 at every scale" in capsys.readouterr().out
    )
    open_masked(config_of(masked))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"validation_size": (39, 48)}, "the largest have 40 × 48 pixels .* set validation_size: \\[40, 48\\]"),
        ({"validation_size": None}, "data.validation_size: 32 × 52: crop: scaled validates whole images"),
    ],
)
def test_validation_images_larger_than_their_size_are_refused(masked: Path, keys: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        open_masked(config_of(masked, **keys))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"resize": 64}, "resize: crop: scaled does not take it"),
        ({"augment": [{"erasing": {"probability": 0.5}}]}, "augment: crop: scaled does not take it"),
        ({"loader": "memory"}, "loader: memory does not take crop: scaled"),
        ({"crop": "random_resized"}, "size: 32 × 52: crop: random_resized makes square images"),
        ({"scales": ()}, "at least 1 item"),
        ({"size": (32, 0)}, "greater than 0"),
    ],
)
def test_settings_that_do_not_fit_masks_are_refused_in_one_line(masked: Path, keys: dict[str, object], message: str):
    with pytest.raises(ValidationError, match=message):
        config_of(masked, **keys)


def test_noise_in_place_of_images_has_masks_too(masked: Path):
    loader = open_masked(config_of(masked, loader="synthetic"))
    for batch in islice(loader.stream(Progress(loader.steps_per_epoch), 1), 2):
        assert batch.images_BCHW.shape == (4, 3, 32, 52)
        assert batch.targets[MASK].shape == (4, 32, 52)
