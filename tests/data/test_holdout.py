"""Held-out training images: which they are, and that they are never trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from resolved import run_of
from shard_factory import CPU, config_of, draw_samples, write_shards

from pipeline.batch import Progress
from pipeline.builders.loader import training_splits
from pipeline.builders.summary import summarize
from pipeline.config.recipe import load_recipe
from pipeline.data import holdout
from pipeline.data.holdout import Holdout
from pipeline.data.loader import Loader, create_loader
from pipeline.errors import RecipeError
from shards.manifest import read_manifest
from shards.read import SAMPLE_DTYPE, SplitReader

HOLDOUT = {"share": 0.3, "seed": 4}


def held_out(samples: np.ndarray, chosen: Holdout) -> np.ndarray:
    return holdout.held_out(samples["id"], samples["label"].astype(np.int64), chosen, [f"class{k}" for k in range(10)])


def table(labels: list[int]) -> np.ndarray:
    samples = np.zeros(len(labels), SAMPLE_DTYPE)
    samples["id"], samples["label"] = 3 * np.arange(len(labels)), labels
    return samples


@settings(derandomize=True, deadline=None)
@given(sizes=st.lists(st.sampled_from([0, 2, 3, 7, 40]), min_size=1, max_size=5), share=st.floats(0.01, 0.99))
def test_each_class_gives_its_rounded_share_but_never_none_nor_all(sizes: list[int], share: float):
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    mask = held_out(table(labels), Holdout(share=share))
    found = Counter(np.array(labels, int)[mask].tolist())
    for label, size in enumerate(sizes):
        assert found[label] == (min(max(round(size * share), 1), size - 1) if size else 0)


def test_the_choice_belongs_to_the_ids_whatever_the_order_of_the_table():
    samples = table([k % 4 for k in range(80)])
    shuffled = samples[np.random.default_rng(0).permutation(80)]

    def chosen(rows: np.ndarray, seed: int) -> set[int]:
        return set(rows["id"][held_out(rows, Holdout(share=0.3, seed=seed))].tolist())

    assert chosen(samples, 0) == chosen(shuffled, 0)
    assert chosen(samples, 0) != chosen(samples, 1)
    assert held_out(samples, Holdout(share=0.3)).sum() == 24


def test_a_class_with_one_image_is_named():
    with pytest.raises(ValueError, match=r"^data\.holdout: the class 'class1' has only one training image[^\n]*$"):
        held_out(table([0, 0, 1, 2, 2]), Holdout(share=0.5))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("holdout")
    return write_shards(
        folder, {"train": draw_samples(42, [16], "png", 0), "val": draw_samples(8, [16], "png", 1)}, "png"
    )


def loader_of(folder: Path, loader: str, rank: int, world: int) -> Loader:
    keys = {"loader": loader, "crop": "pad", "holdout": HOLDOUT}
    return create_loader(config_of(folder, **keys), batch=6, accumulation=1, seed=1, rank=rank, world=world, device=CPU)


@pytest.mark.parametrize("loader", ["dali", "memory"])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_training_and_validation_share_no_image_and_ranks_share_them_out(folder: Path, loader: str, world: int):
    samples = SplitReader(folder, "train").samples
    mask = held_out(samples, Holdout(**HOLDOUT))
    held, kept = (set(samples["id"][rows].tolist()) for rows in (mask, ~mask))
    trained, validated = [], []
    for rank in range(world):
        each = loader_of(folder, loader, rank, world)
        assert each.steps_per_epoch == len(kept) // 6
        trained.append([batch.ids_B.tolist() for batch in each.stream(Progress(each.steps_per_epoch), 1)])
        validated += [number for batch in each.validation() for number in batch.ids_B.tolist() if number >= 0]
        assert set(np.flatnonzero(each.labels_by_id >= 0).tolist()) == kept
    assert sorted(validated) == sorted(held)
    batches = [[i for row in zip(*parts, strict=True) for i in row] for parts in zip(*trained, strict=True)]
    whole = loader_of(folder, loader, 0, 1)
    assert batches == [batch.ids_B.tolist() for batch in whole.stream(Progress(whole.steps_per_epoch), 1)]
    assert {number for batch in batches for number in batch} <= kept


def test_a_held_out_image_has_the_pixels_that_it_would_have_as_a_validation_image(folder: Path, tmp_path: Path):
    draws = draw_samples(42, [16], "png", 0)
    write_shards(tmp_path, {"train": draws, "val": draws}, "png")
    expected = create_loader(
        config_of(tmp_path, crop="pad"), batch=6, accumulation=1, seed=1, rank=0, world=1, device=CPU
    )
    pixels = {
        number: image
        for batch in expected.validation()
        for number, image in zip(batch.ids_B.tolist(), batch.images_BCHW, strict=True)
    }
    for loader in ("dali", "memory"):
        for batch in loader_of(folder, loader, 0, 1).validation():
            for number, image in zip(batch.ids_B.tolist(), batch.images_BCHW, strict=True):
                assert image.sub(pixels[number]).abs().max() < 1e-5


def test_only_a_run_with_held_out_images_has_them_in_its_identity_and_folder(recipes: Path, monkeypatch):
    monkeypatch.chdir(recipes)
    assert "holdout" not in run_of("ce.yaml").identity["data"]
    assert run_of("ce.yaml", ["data.validation_size=16"]).identity == run_of("ce.yaml").identity
    assert run_of("ce.yaml", ["data.validation_size=20"]).identity["data"]["validation_size"] == 20
    run = run_of("ddkd.yaml", ["data.holdout={share: 0.34, seed: 2}", "folder=null"])
    assert run.identity["data"]["holdout"] == {"share": 0.34, "seed": 2}
    assert run.folder.name == "seed-0-holdout"
    assert run.training_images == 40  # of 20 classes of three images each
    assert run.compare[0].recipe.data.holdout == run.recipe.data.holdout
    assert run.teachers[0].recipe.data.holdout is None


def test_a_student_starts_without_the_held_out_images_even_from_its_teachers_recipe(recipes: Path, monkeypatch):
    monkeypatch.chdir(recipes)
    keys = ["data.holdout.share=0.34", "student.start.recipe=teacher.yaml", "compare=[teacher.yaml]", "folder=null"]
    run = run_of("ddkd.yaml", keys)
    assert run.start is not None
    assert [each.recipe.data.holdout for each in (run.start, *run.compare)] == [run.recipe.data.holdout] * 2
    assert run.teachers[0].recipe.data.holdout is None


def test_a_cache_is_as_large_as_without_held_out_images(recipes: Path, monkeypatch):
    monkeypatch.chdir(recipes)
    keys = ["compare=null", "teacher.cache=cache"]
    whole, held = (summarize(load_recipe("ddkd.yaml", [*keys, *more])) for more in ([], ["data.holdout.share=0.34"]))
    assert whole.cache_size
    assert held.cache_size == whole.cache_size


def test_a_share_of_nothing_or_all_is_one_line(recipes: Path, monkeypatch):
    monkeypatch.chdir(recipes)
    for share in ("0", "1", "1.5"):
        with pytest.raises(RecipeError, match=r"^[^\n]*data\.holdout\.share[^\n]*$"):
            run_of("ce.yaml", [f"data.holdout.share={share}"])


def test_shards_without_validation_images_validate_on_held_out_ones(folder: Path, tmp_path: Path):
    write_shards(tmp_path, {"train": draw_samples(42, [16], "png", 0)}, "png")
    manifest = read_manifest(tmp_path)
    assert training_splits(config_of(tmp_path), manifest) == ("train",)
    assert training_splits(config_of(tmp_path, holdout=HOLDOUT), manifest) == ("train", "val")


@pytest.mark.parametrize("loader", ["dali", "synthetic"])
def test_validation_images_have_their_own_size_and_those_of_training_do_not_change(folder: Path, loader: str):
    plain, sized = (
        create_loader(
            config_of(folder, loader=loader, size=12, **keys),
            batch=6,
            accumulation=1,
            seed=1,
            rank=0,
            world=1,
            device=CPU,
        )
        for keys in ({}, {"validation_size": 20})
    )
    assert {batch.images_BCHW.shape[1:] for batch in sized.validation()} == {(3, 20, 20)}
    start = Progress(sized.steps_per_epoch)
    for one, other in zip(plain.stream(start, 1), sized.stream(start, 1), strict=True):
        assert one.images_BCHW.equal(other.images_BCHW)


def test_the_table_says_that_the_teacher_was_measured_on_other_images(
    run_train: Callable[..., None], capsys: pytest.CaptureFixture[str]
):
    words = ["losses.ddkd=null", "losses.kd.temperature=4", "compare=null", "epochs=1", "folder=null"]
    run_train("ddkd.yaml", *words, "data.holdout.share=0.34")
    said = capsys.readouterr().out
    assert "40 training images, 20 held out for validation" in said
    assert said.splitlines()[-1].startswith("note: students are measured on held-out training images")
    run_train("ddkd.yaml", *words)
    assert "held-out" not in capsys.readouterr().out
