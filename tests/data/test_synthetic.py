"""Noise in the place of images comes with the ids and labels of the real ones, and is nobody's training."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from shard_factory import CPU, config_of, join, open_loader

from pipeline.batch import Batch, Progress
from pipeline.config.recipe import LoadedRecipe, load_recipe
from pipeline.data.loader import Config, transform_fingerprint
from pipeline.distributed.launcher import Launch
from pipeline.runs.identity import resolve
from shards.manifest import read_manifest

RECIPE = Path(__file__).resolve().parents[2] / "configs" / "imagenet" / "r50_mbv1.yaml"


@pytest.fixture
def without_tars(photo_shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(photo_shards, tmp_path / "tables", ignore=shutil.ignore_patterns("*.tar", "*.idx")))


def streamed(config: Config, **keys: object) -> list[Batch]:
    loader = open_loader(config, batch=12, **keys)
    return [*loader.stream(Progress(loader.steps_per_epoch, step=1), 3), *loader.validation()]


@pytest.mark.parametrize("keys", [{}, {"rank": 1, "world": 2, "accumulation": 3}])
def test_ids_and_labels_come_in_the_order_of_the_images_they_stand_for(
    photo_shards: Path, without_tars: Path, keys: dict
):
    real = streamed(config_of(photo_shards, shuffle_shards=2, validation_batch=4), **keys)
    noise = streamed(config_of(without_tars, shuffle_shards=2, validation_batch=4, loader="synthetic"), **keys)
    for ours, theirs in zip(noise, real, strict=True):
        assert ours.ids_B.tolist() == theirs.ids_B.tolist()
        assert ours.labels_B.tolist() == theirs.labels_B.tolist()
        assert ours.images_BCHW.shape == theirs.images_BCHW.shape
        assert not torch.equal(ours.images_BCHW, theirs.images_BCHW)


@pytest.mark.parametrize("channels_last", [True, False])
def test_images_are_normal_floats_in_the_memory_format_asked_for(without_tars: Path, channels_last: bool):
    config = config_of(without_tars, loader="synthetic", crop="pad", channels_last=channels_last)
    images = join(streamed(config)).images_BCHW
    first = streamed(config)[0].images_BCHW
    assert first.dtype == torch.float32
    assert first.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert first.is_contiguous() != channels_last
    assert abs(images.mean()) < 0.1
    assert abs(images.std() - 1) < 0.1


def test_rows_of_a_teachers_cache_come_along(without_tars: Path):
    loader = open_loader(
        config_of(without_tars, loader="synthetic"),
        batch=6,
        columns=lambda view: {"row": torch.arange(100).numpy() + 1000 * view},
    )
    for step, batch in enumerate(loader.stream(Progress(6), 2)):
        assert batch.extra["row"].tolist() == [number + 1000 * (step // 6) for number in batch.ids_B.tolist()]


def test_it_is_another_run_and_another_teachers_cache(photo_shards: Path):
    def loaded(loader: str) -> LoadedRecipe:
        return load_recipe(RECIPE, ["method=ce", f"data.path={photo_shards}", "data.size=16", f"data.loader={loader}"])

    assert resolve(loaded("synthetic"), Launch()).fingerprint != resolve(loaded("dali"), Launch()).fingerprint
    manifest = read_manifest(photo_shards)
    noise, real = (
        transform_fingerprint(loaded(name).recipe.data, manifest, CPU)["decoder"] for name in ("synthetic", "dali")
    )
    assert noise == {"backend": "synthetic"} != real
