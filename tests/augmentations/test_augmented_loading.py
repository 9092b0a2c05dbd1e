"""Augmented batches are a function of seed, id and view, whoever loads them and however."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from shard_factory import config_of, join, open_loader

from pipeline.batch import Batch, Progress
from pipeline.data.loader import Config, Loader

Augment = list[dict[str, Any]]
EVERYTHING: Augment = [
    {"trivialaugment": {}},
    {"randaugment": {"ops": 3, "magnitude": 9, "magnitude_std": 0.5, "increasing": True, "probability": 0.5}},
    {"autoaugment": {"policy": "svhn"}},
    {"color_jitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}},
    {"erasing": {"probability": 0.5}},
    {"erasing": {"probability": 0.5, "value": "noise"}},
]


@pytest.fixture(scope="module", params=["dali", "dali, pad", "memory"])
def config(request: pytest.FixtureRequest, photo_shards: Path, small_shards: Path) -> Config:
    """Both loaders, and both kinds of crop."""
    if request.param == "dali":
        return config_of(photo_shards, resize=20, augment=EVERYTHING)
    return config_of(small_shards, loader=request.param.split(",")[0], crop="pad", augment=EVERYTHING)


def everything(loader: Loader, step: int = 0, epochs: int = 2) -> list[Batch]:
    return list(loader.stream(Progress(loader.steps_per_epoch, step=step), epochs))


def images_by_id(batches: list[Batch]) -> dict[int, torch.Tensor]:
    joined = join(batches)
    return dict(zip(joined.ids_B.tolist(), joined.images_BCHW, strict=True))


def assert_equal_images(ours: dict[int, torch.Tensor], theirs: dict[int, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[number], theirs[number]) for number in ours)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_see_the_images_of_one_process_to_the_pixel(config: Config, world: int) -> None:
    alone = images_by_id(everything(open_loader(config, batch=12), epochs=1))
    shares = [everything(open_loader(config, batch=12, rank=rank, world=world), epochs=1) for rank in range(world)]
    together = images_by_id([batch for share in shares for batch in share])
    assert_equal_images(together, alone)


@pytest.mark.parametrize("step", [1, 6, 11])
def test_a_stream_resumes_in_the_middle_of_an_epoch(config: Config, step: int) -> None:
    uninterrupted = everything(open_loader(config, batch=6))
    resumed = everything(open_loader(config, batch=6), step)
    for one, other in zip(resumed, uninterrupted[step:], strict=True):
        assert one.ids_B.tolist() == other.ids_B.tolist()
        assert torch.equal(one.images_BCHW, other.images_BCHW)


def test_threads_prefetch_and_micro_batches_do_not_change_a_pixel(config: Config) -> None:
    one, other = (config.model_copy(update={"threads": count, "prefetch": count}) for count in (1, 3))
    parts = everything(open_loader(other, batch=36, accumulation=9), epochs=1)
    assert_equal_images(images_by_id(everything(open_loader(one, batch=36), epochs=1)), images_by_id(parts))


def test_a_view_of_given_images_is_what_training_sees_in_that_view(config: Config) -> None:
    loader = open_loader(config, batch=4)
    for view in (0, 1):
        seen = images_by_id(everything(loader, view * loader.steps_per_epoch, view + 1))
        ids_N = loader.plan.readers["train"].samples["id"]
        rows = np.flatnonzero(np.isin(ids_N, list(seen)))
        assert_equal_images(images_by_id(list(loader.views([(row[None], view) for row in rows]))), seen)


def test_batches_that_are_kept_stay_as_they_were(config: Config) -> None:
    kept, copies = [], []
    for batch in everything(open_loader(config, batch=6)):
        kept.append(batch.images_BCHW)
        copies.append(batch.images_BCHW.clone())
    assert all(torch.equal(one, other) for one, other in zip(kept, copies, strict=True))


def test_a_second_epoch_of_the_memory_loader_starts_from_the_stored_pixels(small_shards: Path) -> None:
    """Augmentations may overwrite what they get, which must not be the pixels that the loader keeps."""
    config = config_of(small_shards, loader="memory", crop="pad", pad=0, augment=EVERYTHING, views=1)
    loader = open_loader(config, batch=6)
    assert_equal_images(images_by_id(everything(loader, epochs=1)), images_by_id(everything(loader, epochs=1)))


def test_both_decoders_give_the_same_bits(small_shards: Path) -> None:
    """PNGs decode to the same bytes everywhere, and all that follows is the same code."""
    for channels_last in (True, False):
        keys = {"crop": "pad", "augment": EVERYTHING, "channels_last": channels_last}
        one, other = (open_loader(config_of(small_shards, loader=name, **keys), batch=8) for name in ("memory", "dali"))
        for ours, theirs in zip(everything(one), everything(other), strict=True):
            assert ours.ids_B.tolist() == theirs.ids_B.tolist()
            assert torch.equal(ours.images_BCHW, theirs.images_BCHW)
            assert ours.images_BCHW.stride() == theirs.images_BCHW.stride()


def test_validation_is_not_augmented(config: Config) -> None:
    plain = config.model_copy(update={"augment": ()})
    for keys in ({}, {"holdout": {"share": 0.4}}):
        one, other = (
            open_loader(Config.model_validate({**each.model_dump(), **keys}), batch=4) for each in (config, plain)
        )
        for ours, theirs in zip(one.validation(), other.validation(), strict=True):
            torch.testing.assert_close(ours.images_BCHW, theirs.images_BCHW, atol=1e-5, rtol=0)


def test_an_augmentation_that_leaves_all_images_alone_changes_nothing_but_rounding(config: Config) -> None:
    """The normalisation after it is in other code than DALI's."""
    nothing = [{"randaugment": {"ops": 1, "magnitude": 9, "probability": 0}}, {"erasing": {"probability": 0}}]
    one = Config.model_validate({**config.model_dump(), "augment": nothing})
    other = config.model_copy(update={"augment": ()})
    for ours, theirs in zip(everything(open_loader(one)), everything(open_loader(other)), strict=True):
        torch.testing.assert_close(ours.images_BCHW, theirs.images_BCHW, atol=1e-5, rtol=0)
        assert ours.images_BCHW.stride() == theirs.images_BCHW.stride()


@pytest.mark.gpu
def test_a_gpu_augments_to_the_bits_of_the_cpu(small_shards: Path) -> None:
    config = config_of(small_shards, loader="memory", crop="pad", augment=EVERYTHING)
    on_cpu, on_gpu = (open_loader(config, batch=6, device=torch.device(name)) for name in ("cpu", "cuda"))
    for ours, theirs in zip(everything(on_gpu), everything(on_cpu), strict=True):
        assert torch.equal(ours.images_BCHW.cpu(), theirs.images_BCHW)
