from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from shard_factory import config_of, draw_samples, join, open_loader, write_shards
from torch import Tensor

from pipeline.batch import Batch, Progress
from pipeline.data.loader import Config, Loader


@pytest.fixture(scope="module", params=["dali", "dali, pad", "memory"])
def config(request: pytest.FixtureRequest, photo_shards: Path, small_shards: Path) -> Config:
    """Both loaders, and both kinds of crop."""
    if request.param == "dali":
        return config_of(photo_shards, resize=20, validation_batch=4, shuffle_shards=2)
    return config_of(small_shards, loader=request.param.split(",")[0], crop="pad", pad=2, validation_batch=4)


def everything(loader: Loader, step: int = 0, epochs: int = 2) -> list[Batch]:
    return list(loader.stream(Progress(loader.steps_per_epoch, step=step), epochs))


def assert_same(one: Batch, other: Batch) -> None:
    assert one.ids_B.tolist() == other.ids_B.tolist()
    assert one.labels_B.tolist() == other.labels_B.tolist()
    assert torch.equal(one.images_BCHW, other.images_BCHW)


def interleaved(shares: list[Tensor], batch: int) -> Tensor:
    """Put the ranks' rows back in the order of the global batches."""
    return torch.stack([share.unflatten(0, (-1, batch // len(shares))) for share in shares], dim=2).flatten(0, 2)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_see_the_global_batches_of_one_process_to_the_pixel(
    config: Config, world: int, accumulation: int
) -> None:
    alone = join(everything(open_loader(config, batch=12)))
    shares = []
    for rank in range(world):
        batches = everything(open_loader(config, batch=12, rank=rank, world=world, accumulation=accumulation))
        assert {len(batch.ids_B) for batch in batches} == {12 // world // accumulation}
        shares.append(join(batches))
    together = Batch(*(interleaved(list(columns), 12) for columns in list(zip(*shares, strict=True))[:3]), {})
    assert_same(together, alone)


def test_every_id_comes_once_an_epoch_bar_the_tail(config: Config) -> None:
    loader = open_loader(config, batch=6)
    for epoch in range(2):
        ids = join(everything(loader, epoch * loader.steps_per_epoch, epoch + 1)).ids_B.tolist()
        assert len(ids) == len(set(ids)) == loader.samples_per_epoch
        assert loader.plan.readers["train"].split.samples - len(ids) < 6


@pytest.mark.parametrize("step", [1, 5, 6, 11, 12])
def test_a_stream_resumes_in_the_middle_of_an_epoch(config: Config, step: int) -> None:
    uninterrupted = everything(open_loader(config, batch=6))
    resumed = everything(open_loader(config, batch=6), step)
    assert len(resumed) == 12 - step
    for one, other in zip(resumed, uninterrupted[step:], strict=True):
        assert_same(one, other)


def test_threads_prefetch_and_micro_batches_do_not_change_a_pixel(config: Config) -> None:
    one = config.model_copy(update={"threads": 1, "prefetch": 1})
    other = config.model_copy(update={"threads": 3, "prefetch": 4})
    parts = everything(open_loader(other, batch=36, accumulation=9))
    assert len(parts[0].ids_B) == 4
    assert_same(join(everything(open_loader(one, batch=36))), join(parts))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_validation_is_exact_over_any_number_of_ranks(config: Config, world: int) -> None:
    alone = join(open_loader(config).validation())
    order = alone.ids_B.argsort()
    shares = [list(open_loader(config, batch=12, rank=rank, world=world).validation()) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    together = join(batch for share in shares for batch in share)
    real = together.ids_B >= 0
    assert torch.equal(real, together.labels_B >= 0)
    places = together.ids_B[real].argsort()
    assert together.ids_B[real][places].tolist() == alone.ids_B[order].tolist()
    assert together.labels_B[real][places].tolist() == alone.labels_B[order].tolist()
    assert torch.equal(together.images_BCHW[real][places], alone.images_BCHW[order])


def test_validation_in_the_middle_of_a_stream_does_not_disturb_it(config: Config) -> None:
    loader = open_loader(config, batch=6)
    expected = everything(loader)
    scores = join(loader.validation())
    seen = []
    for batch in loader.stream(Progress(loader.steps_per_epoch), 2):
        seen.append(batch)
        if len(seen) in (3, 6):
            assert_same(join(loader.validation()), scores)
    for one, other in zip(seen, expected, strict=True):
        assert_same(one, other)


def test_a_stream_left_early_ends_its_threads_and_the_next_one_starts_afresh(config: Config) -> None:
    loader = open_loader(config, batch=6)
    expected = everything(loader, step=2)
    threads = threading.active_count()
    for taken in (0, 1, 3):
        stream = loader.stream(Progress(loader.steps_per_epoch), 2)
        for _ in range(taken):
            next(stream)
        stream.close()  # type: ignore[attr-defined]
        assert threading.active_count() == threads
        for one, other in zip(everything(loader, step=2), expected, strict=True):
            assert_same(one, other)


def test_batches_that_are_kept_stay_as_they_were(config: Config) -> None:
    loader = open_loader(config, batch=6)
    kept, copies = [], []
    for batch in loader.stream(Progress(loader.steps_per_epoch), 3):
        kept.append(batch.images_BCHW)
        copies.append(batch.images_BCHW.clone())
    assert all(torch.equal(one, other) for one, other in zip(kept, copies, strict=True))


@pytest.mark.parametrize("channels_last", [True, False])
def test_images_are_float_batches_in_the_memory_format_asked_for(config: Config, channels_last: bool) -> None:
    loader = open_loader(config.model_copy(update={"channels_last": channels_last}))
    batch = next(loader.stream(Progress(loader.steps_per_epoch), 1))
    assert batch.images_BCHW.shape == (4, 3, 16, 16)
    assert batch.images_BCHW.dtype == torch.float32
    assert batch.images_BCHW.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert batch.images_BCHW.is_contiguous() != channels_last
    assert batch.labels_B.dtype == batch.ids_B.dtype == torch.int64
    assert batch.extra == {}


def test_columns_travel_with_their_batch_in_training_alone(config: Config) -> None:
    def columns(view: int) -> dict[str, np.ndarray]:
        return {"seen": np.stack([np.arange(100), np.full(100, view)], axis=1)}

    loader = open_loader(config, batch=6, columns=columns)
    for step, batch in enumerate(everything(loader)):
        assert batch.extra["seen"].tolist() == [[number, step // 6] for number in batch.ids_B.tolist()]
    assert all(batch.extra == {} for batch in loader.validation())


@pytest.mark.parametrize("error", [KeyError("row"), RuntimeError("the cache is gone")])
def test_an_error_in_columns_surfaces_in_the_training_thread(config: Config, error: Exception) -> None:
    calls = []

    def columns(view: int) -> dict[str, np.ndarray]:
        calls.append(view)
        if len(calls) == 4:
            raise error
        return {}

    loader = open_loader(config, batch=6, columns=columns)
    with pytest.raises(type(error), match=str(error.args[0])):
        everything(loader)


def test_the_facts_of_the_shards_are_at_hand(config: Config) -> None:
    loader = open_loader(config)
    batch = join(everything(loader, epochs=1))
    assert loader.num_classes == 7
    assert loader.id_count == len(loader.labels_by_id) > loader.samples_per_epoch
    assert loader.labels_by_id[batch.ids_B].tolist() == batch.labels_B.tolist()
    assert (loader.labels_by_id == -1).any()
    assert loader.manifest.splits.keys() == {"train", "val"}


def test_nothing_is_left_of_a_run_that_has_ended(config: Config) -> None:
    assert everything(open_loader(config, batch=6), step=12, epochs=2) == []


class TestErrors:
    """Each is one line that names the key and what to do."""

    @staticmethod
    def message(config: Config, **keys: object) -> str:
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            open_loader(config, **keys)
        message = str(caught.value)
        assert "\n" not in message
        return message

    def test_missing_folder(self, tmp_path: Path) -> None:
        message = self.message(config_of(tmp_path / "nowhere"))
        assert message.startswith("data.path: no folder")
        assert "shards/prepare_" in message

    def test_folder_without_manifest(self, tmp_path: Path) -> None:
        message = self.message(config_of(tmp_path))
        assert message.startswith("data.path: ")
        assert "manifest.json" in message

    def test_missing_split(self, tmp_path: Path) -> None:
        folder = write_shards(tmp_path, {"train": draw_samples(6, [16], "jpg", 0)})
        message = self.message(config_of(folder))
        assert message.startswith("data.path: ")
        assert "'val'" in message
        assert open_loader(config_of(folder), splits=("train",)).steps_per_epoch == 1

    def test_cut_tar(self, tmp_path: Path) -> None:
        folder = write_shards(tmp_path, {name: draw_samples(6, [16], "jpg", 0) for name in ("train", "val")})
        with (folder / "train-000001.tar").open("r+b") as tar:
            tar.truncate(100)
        assert "train-000001.tar" in self.message(config_of(folder))

    @pytest.mark.parametrize(("batch", "world", "accumulation"), [(5, 2, 1), (6, 2, 2), (6, 1, 4)])
    def test_batch_that_does_not_divide(self, small_shards: Path, batch: int, world: int, accumulation: int) -> None:
        message = self.message(config_of(small_shards), batch=batch, world=world, accumulation=accumulation)
        assert message.startswith(f"batch: {batch} is not divisible by {world} ranks × accumulation: {accumulation}")

    def test_fewer_samples_than_a_batch(self, small_shards: Path) -> None:
        message = self.message(config_of(small_shards), batch=42)
        assert message.startswith("data.path: ")
        assert "41 training samples" in message
        assert "batch: 42" in message

    @pytest.mark.parametrize("keys", [{"loader": "memory", "crop": "pad"}, {"crop": "pad"}])
    def test_images_of_other_sizes_where_one_is_needed(self, photo_shards: Path, keys: dict) -> None:
        message = self.message(config_of(photo_shards, **keys))
        assert "data.size: 16 × 16" in message
        assert "train-000000.tar" in message

    @pytest.mark.parametrize("loader", ["dali", "memory"])
    def test_an_image_that_is_not_one_is_named_with_its_tar(self, tmp_path: Path, loader: str) -> None:
        samples = draw_samples(20, [16], "jpg", 0)
        samples[13] = type(samples[13])(samples[13].id, 0, b"\xff\xd8\xff" + bytes(400), 16, 16)
        folder = write_shards(tmp_path, {"train": samples, "val": samples[:3]})
        config = config_of(folder, loader=loader, crop="pad")
        with pytest.raises(
            ValueError, match=rf"sample {samples[13].id} in .*train-000002\.tar cannot be decoded"
        ) as caught:
            everything(open_loader(config, batch=5))
        assert "\n" not in str(caught.value)
        assert "data.path: " in str(caught.value)

    @pytest.mark.parametrize(
        ("keys", "words"),
        [
            ({"resize": 15}, "resize: 15 is smaller than the crop, size: 16"),
            ({"loader": "memory"}, "set crop: pad"),
            ({"loader": "memory", "crop": "pad", "resize": 20}, "remove resize"),
            ({"loader": "memory", "crop": "pad", "validation_size": 20}, "remove resize and validation_size"),
            ({"resize": 20, "validation_size": 24}, "resize: 20 is smaller than the crop, validation_size: 24"),
            ({"scale": (0.5, 0.2)}, "scale must be"),
            ({"scale": (0.5, 1.2)}, "scale must be"),
            ({"ratio": (1.5, 1.2)}, "ratio must be"),
            ({"flip": 1.5}, "less than or equal to 1"),
            ({"hw_decoder_load": 0.65}, "expected 0 or 1, got 0.65: between them a sample's pixels would depend on"),
            ({"std": (0.0, 1.0, 1.0)}, "greater than 0"),
            ({"colour": 1}, "Extra inputs"),
        ],
    )
    def test_config(self, tmp_path: Path, keys: dict, words: str) -> None:
        with pytest.raises(ValidationError, match=words):
            config_of(tmp_path, **keys)
