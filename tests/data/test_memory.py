from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from shard_factory import config_of, draw_samples, encode, open_loader, write_shards

from pipeline.batch import Progress


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
