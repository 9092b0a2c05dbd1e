"""Mixed images: their partners, on any number of ranks, from both decoders, and in the views that a cache reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from shard_factory import config_of, join, open_loader
from torch import Tensor

from pipeline.augmentations._base import SampleDraws
from pipeline.augmentations._registry import build_augmentations
from pipeline.batch import Batch, Progress
from pipeline.data.holdout import Holdout
from pipeline.data.loader import Config, Loader, transform_fingerprint
from pipeline.data.mixer import Mixer
from pipeline.philox import Purpose, random_words

BOTH = [{"mixup": {"alpha": 0.8}}, {"cutmix": {"alpha": 1.0, "probability": 0.7, "switch": 0.4}}]
PIXELS = {"trivialaugment": {}}


@pytest.fixture(params=["dali", "dali, pad", "memory"])
def config(request: pytest.FixtureRequest, photo_shards: Path, small_shards: Path) -> Config:
    """Both loaders, and both kinds of crop."""
    keys = {"augment": [PIXELS, *BOTH], "validation_batch": 4}
    if request.param == "dali":
        return config_of(photo_shards, **keys)
    return config_of(small_shards, loader=request.param.split(",")[0], crop="pad", pad=2, **keys)


def everything(loader: Loader, step: int = 0, epochs: int = 2) -> Batch:
    return join(loader.stream(Progress(loader.steps_per_epoch, step=step), epochs))


def assert_same(one: Batch, other: Batch) -> None:
    assert one.ids_B.tolist() == other.ids_B.tolist()
    assert one.labels_B.tolist() == other.labels_B.tolist()
    assert torch.equal(one.targets["soft_BK"], other.targets["soft_BK"])
    assert torch.equal(one.images_BCHW, other.images_BCHW)


def in_turn(shares: list[Batch]) -> Batch:
    """Return the rows of several ranks in the order of the global batches."""

    def joined(columns: list[Tensor]) -> Tensor:
        return torch.stack(columns, dim=1).flatten(0, 1)

    images, labels, ids = (joined([share[column] for share in shares]) for column in range(3))
    return Batch(images, labels, ids, {}, {"soft_BK": joined([share.targets["soft_BK"] for share in shares])})


@pytest.mark.parametrize("accumulation", [1, 2])
def test_ranks_mix_as_one_process_does_to_the_pixel(config: Config, accumulation: int) -> None:
    config = config.model_copy(update={"repeat": 2})
    alone = everything(open_loader(config, batch=12))
    assert len(torch.unique(alone.targets["soft_BK"])) > 20
    for world in (2, 3):
        loaders = [
            open_loader(config, batch=12, rank=rank, world=world, accumulation=accumulation) for rank in range(world)
        ]
        assert_same(in_turn([everything(loader) for loader in loaders]), alone)


def test_a_stream_goes_on_within_an_epoch(config: Config) -> None:
    whole = everything(open_loader(config, batch=6))
    rest = everything(open_loader(config, batch=6), step=3)
    assert_same(rest, Batch(*(x[18:] for x in whole[:3]), {}, {name: x[18:] for name, x in whole.targets.items()}))


def test_the_images_of_a_view_are_those_of_training_whatever_batch_they_are_in(config: Config) -> None:
    """A cache is written so."""
    loader = open_loader(config.model_copy(update={"views": 2}), batch=6)
    row_by_id = {int(sample["id"]): row for row, sample in enumerate(loader.plan.readers["train"].samples)}
    for epoch in (0, 3):
        trained = everything(loader, epoch * loader.steps_per_epoch, epoch + 1)
        rows = np.array([row_by_id[number] for number in trained.ids_B.tolist()])
        parts = np.split(rows, range(5, len(rows), 5))
        assert_same(join(loader.views((part, epoch % 2) for part in parts)), trained)


def expected_of(config: Config, view: int) -> tuple[Tensor, Tensor, list[int]]:
    """Return the mixed images of a view in storage order, the shares of their classes, and the rows of the partners."""
    loader = open_loader(config.model_copy(update={"augment": config.augment[:1]}))
    samples = loader.plan.readers["train"].samples
    rows = np.arange(len(samples))
    plain = join(loader.views((part, view) for part in np.array_split(rows, -(-len(rows) // 4)))).images_BCHW.double()
    _, mixup, cutmix = build_augmentations(config.augment, config.size)
    of_mixup, of_cutmix = (
        each.draw(SampleDraws(samples["id"], view, config.seed, position))
        for position, each in ((1, mixup), (2, cutmix))
    )
    images, soft, partners = [], [], []
    for row, number in enumerate(samples["id"].tolist()):
        high, low, choice, _ = random_words([number], view, Purpose.PARTNER, seed=config.seed)[:, 0].tolist()
        partners.append((high * 2**32 + low) % len(rows))
        share, weight, top, left, bottom, right = (of_cutmix if choice / 2**32 < 0.4 else of_mixup)[row]
        image = weight * plain[row] + (1 - weight) * plain[partners[-1]]
        box = np.s_[:, int(top) : int(bottom), int(left) : int(right)]
        image[box] = plain[partners[-1]][box]
        images.append(image)
        own, other = (np.eye(loader.num_classes)[samples["label"][at]] for at in (row, partners[-1]))
        soft.append(share * own + (1 - share) * other)
    return torch.stack(images), torch.from_numpy(np.stack(soft)), partners


def test_a_mixed_image_is_made_of_two_images_of_the_same_view(config: Config) -> None:
    loader = open_loader(config)
    rows = np.arange(len(loader.plan.readers["train"].samples))
    for view in (0, 5):
        found = join(loader.views((part, view) for part in np.array_split(rows, -(-len(rows) // 4))))
        images, soft, partners = expected_of(config, view)
        assert len(set(partners)) > len(rows) / 3
        torch.testing.assert_close(found.images_BCHW.double(), images, rtol=0, atol=1e-6)
        torch.testing.assert_close(found.targets["soft_BK"].double(), soft, rtol=0, atol=1e-7)
        assert found.labels_B.tolist() == soft.argmax(1).tolist()


def test_both_decoders_mix_the_same(small_shards: Path) -> None:
    keys = {"crop": "pad", "augment": BOTH}
    one, other = (everything(open_loader(config_of(small_shards, loader=name, **keys))) for name in ("memory", "dali"))
    assert_same(one, other)


@pytest.mark.parametrize("loader", ["dali", "memory", "synthetic"])
def test_an_image_that_is_not_mixed_costs_no_second_one(loader: str, small_shards: Path) -> None:
    augment = [{"mixup": {"alpha": 1.0, "probability": 0.25}}]
    opened = open_loader(config_of(small_shards, loader=loader, crop="pad", augment=augment), batch=8)
    requests = list(opened.plan.training(Progress(opened.steps_per_epoch), 4))
    own, decoded = (sum(len(each) for each in (r.ids_B if ids else r.rows_B for r in requests)) for ids in (1, 0))
    assert 1.1 * own < decoded < 1.4 * own
    batch = next(iter(opened.stream(Progress(opened.steps_per_epoch), 1)))
    assert batch.targets["soft_BK"].sum(1).tolist() == pytest.approx([1.0] * 8)
    assert batch.images_BCHW.shape == (8, 3, 16, 16)


def test_validation_has_whole_images_and_labels(config: Config) -> None:
    plain = config.model_copy(update={"augment": ()})
    mixing, other = (list(open_loader(each).validation()) for each in (config, plain))
    for one, whole in zip(mixing, other, strict=True):
        assert not one.targets
        assert torch.equal(one.images_BCHW, whole.images_BCHW)
        assert one.labels_B.tolist() == whole.labels_B.tolist()


@pytest.mark.parametrize("loader", ["dali", "memory"])
def test_held_out_images_are_mixed_into_none(loader: str, small_shards: Path) -> None:
    keys = {"loader": loader, "crop": "pad", "augment": BOTH}
    held = Holdout(share=0.4)
    plan = open_loader(config_of(small_shards, **keys, holdout=held.model_dump())).plan
    requests = list(plan.training(Progress(plan.steps_per_epoch), 6))
    used = set(plan.rows["train"].tolist())
    partners = np.concatenate([request.rows_B[len(request.ids_B) :] for request in requests])
    assert set(partners.tolist()) == used
    whole = open_loader(config_of(small_shards, **keys)).plan
    facts = [
        transform_fingerprint(p.config, whole.readers["train"].manifest, torch.device("cpu")) for p in (plan, whole)
    ]
    assert facts[0]["partners"] == "all but 0.4 of each class, by seed 0"
    assert facts[1]["partners"] == "all training images"


def test_each_image_is_as_likely_a_partner_and_differs_by_id_view_and_seed(small_shards: Path) -> None:
    samples = np.zeros(60, [("id", np.int64), ("label", np.int64)])
    samples["label"] = np.arange(60) % 7
    rows, ids = np.arange(10, 60), np.arange(50_000)

    def partners_of(view: int = 0, **keys: int) -> np.ndarray:
        mixing = config_of(small_shards, augment=[{"mixup": {"alpha": 1.0}}], **keys)
        mixture = Mixer(mixing, samples, rows, 7).draw(ids, view)
        assert mixture is not None
        assert np.array_equal(mixture.labels_P, samples["label"][mixture.partners_P])
        assert len(mixture.partners_P) == len(ids)
        return mixture.partners_P

    found = partners_of()
    counts = np.bincount(found, minlength=60)
    assert not counts[:10].any()
    assert stats.chisquare(counts[10:]).pvalue > 1e-3
    for other in (partners_of(view=1), partners_of(seed=1), np.roll(found, 1)):
        assert (found == other).mean() < 0.03


def test_mixup_and_cutmix_take_turns_by_the_switch_and_keep_their_own_draws(small_shards: Path) -> None:
    samples, ids = np.zeros(9, [("id", np.int64), ("label", np.int64)]), np.arange(20_000)

    def drawn(*augment: dict) -> np.ndarray:
        mixture = Mixer(config_of(small_shards, augment=list(augment)), samples, np.arange(9), 7).draw(ids, 0)
        assert mixture is not None
        return mixture.drawn_R6

    mixup, cutmix = {"mixup": {"alpha": 0.8}}, {"cutmix": {"alpha": 1.0, "switch": 0.3}}
    both, turned = drawn(mixup, cutmix), drawn(cutmix, mixup)
    is_cut = both[:, 1] == 1
    assert is_cut.mean() == pytest.approx(0.3, abs=0.01)
    assert np.array_equal(is_cut, turned[:, 1] == 1)
    assert np.array_equal(both[~is_cut], drawn(mixup)[~is_cut])
