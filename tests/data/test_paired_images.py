"""Patches of images and of their smaller copies: the same pixels of both, for any batches, ranks and interruptions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from paired import draw_waves, size_of, write_paired
from pydantic import ValidationError

from pipeline.batch import Batch, Progress
from pipeline.data import augment
from pipeline.data.config import Config
from pipeline.data.loader import Loader, create_loader
from pipeline.tasks._high import HIGH
from shards.imresize import reduced_to_bytes

SIZE, SCALE, CPU = 8, 2, torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_paired(tmp_path_factory.mktemp("paired"))


def config_of(folder: Path | str, **values: Any) -> Config:
    known = {"crop": "patch", "upscale": SCALE, "size": SIZE, "loader": "memory", "path": str(folder)}
    return Config.model_validate(known | values)


def loader_of(folder: Path, rank: int = 0, world: int = 1, batch: int = 6, **values: Any) -> Loader:
    config = config_of(folder, **values)
    return create_loader(config, batch=batch, accumulation=1, seed=0, rank=rank, world=world, device=CPU)


def views(image: np.ndarray) -> list[np.ndarray]:
    """Return the eight symmetries of a square, [H, W, C]: four turns of it and of its mirror image."""
    return [np.rot90(each, turns) for each in (image, image[:, ::-1]) for turns in range(4)]


def pixels(images_CHW: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(images_CHW.permute(1, 2, 0).numpy())


def find_view(batch: Batch, row: int) -> int:
    """Return which symmetry a row's pair shows, after a check that both show the same part of image and copy."""
    image = draw_waves(int(batch.ids_B[row]), *size_of(int(batch.ids_B[row])))
    low, high = reduced_to_bytes(image, SCALE), batch.targets[HIGH][row]
    found = pixels((batch.images_BCHW[row] * 255).round()).astype(np.uint8)
    for top in range(low.shape[0] - SIZE + 1):
        for left in range(low.shape[1] - SIZE + 1):
            for number, view in enumerate(views(low[top : top + SIZE, left : left + SIZE])):
                if np.array_equal(view, found):
                    large = SCALE * SIZE
                    part = image[SCALE * top : SCALE * top + large, SCALE * left : SCALE * left + large]
                    assert np.array_equal(views(part)[number], pixels(high))
                    return number
    raise AssertionError("no patch of the copy")


def test_a_batch_has_the_same_part_of_image_and_copy_in_all_eight_symmetries(folder: Path):
    loader = loader_of(folder, repeat=3)
    batches = list(loader.stream(Progress(loader.steps_per_epoch), 4))
    assert loader.steps_per_epoch == 4
    seen = [find_view(batch, row) for batch in batches for row in range(6)]
    assert set(seen) == set(range(8))


def test_without_flips_a_patch_is_as_stored_and_corners_reach_every_edge(folder: Path):
    loader = loader_of(folder, flip=0)
    batches = list(loader.stream(Progress(loader.steps_per_epoch), 4))
    assert {find_view(batch, row) for batch in batches for row in range(6)} == {0}
    corners = augment.patches(np.arange(4000), 0, np.full(4000, 10), np.full(4000, 9), seed=0, size=(8, 8))
    assert {tuple(corner) for corner in corners.tolist()} == {(top, left) for top in range(2) for left in range(3)}
    often = augment.symmetries(np.arange(4000), 0, seed=1, probability=0.5)
    assert np.bincount(often @ [1, 2, 4]).min() > 400


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_batches_of_one_and_a_run_goes_on_in_the_middle(folder: Path, world: int):
    whole = list(loader_of(folder, repeat=3).stream(Progress(4), 2))
    parts = [list(loader_of(folder, rank, world, repeat=3).stream(Progress(4), 2)) for rank in range(world)]
    later = list(loader_of(folder, repeat=3).stream(Progress(4, step=3), 2))
    for number, batch in enumerate(whole):
        for rank, part in enumerate(parts):
            rows = slice(rank, None, world)
            assert torch.equal(part[number].images_BCHW, batch.images_BCHW[rows])
            assert torch.equal(part[number].targets[HIGH], batch.targets[HIGH][rows])
    assert [batch.ids_B.tolist() for batch in later] == [batch.ids_B.tolist() for batch in whole[3:]]
    assert all(torch.equal(a.images_BCHW, b.images_BCHW) for a, b in zip(later, whole[3:], strict=True))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_validation_images_are_whole_and_come_once_over_the_ranks(folder: Path, world: int):
    found = [batch for rank in range(world) for batch in loader_of(folder, rank, world).validation()]
    assert {len(batch.ids_B) for batch in found} == {1}
    assert sorted(int(batch.ids_B) for batch in found if batch.labels_B >= 0) == list(range(5))
    for batch in found:
        if batch.labels_B >= 0:
            number = int(batch.ids_B)
            image = draw_waves(1000 + number, *size_of(number))
            assert np.array_equal(pixels(batch.targets[HIGH][0]), image)
            low = pixels((batch.images_BCHW[0] * 255).round())
            assert np.array_equal(low, reduced_to_bytes(image, SCALE))


def test_images_that_are_held_out_are_validated_whole(folder: Path):
    loader = loader_of(folder, holdout={"share": 0.25})
    trained = {int(i) for batch in loader.stream(Progress(1), 3) for i in batch.ids_B}
    found = list(loader.validation())
    assert not trained & {int(batch.ids_B) for batch in found}
    assert [batch.targets[HIGH].shape[2:] for batch in found] == [size_of(int(batch.ids_B))[::-1] for batch in found]


def test_noise_in_place_of_images_has_targets_too(folder: Path):
    batch = next(iter(loader_of(folder, loader="synthetic").stream(Progress(1), 1)))
    assert batch.images_BCHW.shape == (6, 3, SIZE, SIZE)
    assert batch.targets[HIGH].shape == (6, 3, SCALE * SIZE, SCALE * SIZE)
    assert batch.targets[HIGH].dtype == torch.uint8


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"loader": "dali"}, "loader: dali does not take crop: patch; set loader: memory"),
        ({"upscale": 1}, "upscale: crop: patch needs it, such as upscale: 2"),
        ({"crop": "pad"}, "upscale: crop: patch needs it, such as upscale: 2, and no other crop takes it"),
        ({"mean": [0.5, 0.5, 0.5]}, "mean: crop: patch has values in 0 … 1, which are not normalised"),
        ({"size": [8, 12]}, "size: 8 × 12: crop: patch makes square images; give one number"),
        ({"validation_batch": 4}, "validation_batch: crop: patch validates whole images"),
        ({"validation_size": 16}, "validation_size: crop: patch does not take it"),
        ({"augment": [{"erasing": {"probability": 0.5}}]}, "augment: crop: patch does not take it"),
        ({"pairs": True}, "pairs: true does not go with crop: patch"),
    ],
)
def test_keys_that_do_not_fit_are_refused_in_one_line(values: dict[str, Any], message: str):
    plain = {"mean": [0.0] * 3, "std": [1.0] * 3} if values.get("crop") else {}
    with pytest.raises(ValidationError, match=message):
        config_of("", **plain, **values)


def test_images_that_do_not_fit_are_refused_in_one_line(folder: Path, photo_shards: Path):
    with pytest.raises(ValueError, match=r"data.upscale: 3: the copies in .* are 2 times smaller; set upscale: 2"):
        loader_of(folder, upscale=3)
    with pytest.raises(ValueError, match=r"data.crop: patch needs images with smaller copies, and .* has none"):
        loader_of(photo_shards)
    with pytest.raises(
        ValueError, match=r"data.size: 3 images of train have sides below 36 pixels, such as id 0 with 32"
    ):
        loader_of(folder, size=18)
