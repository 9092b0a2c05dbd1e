"""The parts of the loader are measured apart, and the best settings are found and remembered."""

from __future__ import annotations

from contextlib import closing
from itertools import islice
from pathlib import Path

import pytest
import torch
from masked import write_masked
from resolved import run_of
from shard_factory import CPU, config_of, join, open_loader

from pipeline.batch import Progress
from pipeline.benchmarks import tune
from pipeline.benchmarks.loader import measure_loading
from pipeline.benchmarks.measure import Measurement
from pipeline.builders.loader import build_loader
from pipeline.config.recipe import LoadedRecipe, load_recipe
from pipeline.data.loader_settings import LoaderSettings, cores, tuned_path
from pipeline.data.native import native_decoder
from pipeline.errors import RecipeError
from pipeline.runs.identity import Run
from shards.manifest import read_manifest

RECIPE = Path(__file__).resolve().parents[2] / "configs" / "imagenet" / "r50_mbv1.yaml"
PAD = ("data.crop=pad", "data.resize=null")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def run(folder: Path, *words: str) -> Run:
    return run_of(RECIPE, ["method=ce", f"data.path={folder}", "data.size=16", "batch=4", *words])


def loaded(folder: Path, *words: str) -> LoadedRecipe:
    return load_recipe(RECIPE, ["method=ce", f"data.path={folder}", "data.size=16", "batch=4", *words])


def test_a_reader_that_leaves_masks_out_is_not_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = write_masked(tmp_path / "masked", 9, 3, size=(48, 40))
    words = ["task=segmentation", "losses={ce: null, segmentation: {}}", f"data.path={folder}", "data.resize=null"]
    sizes = ["data.crop=scaled", "data.size=16", "data.validation_size=16", "data.scale=null", "batch=4"]
    parts = measure_loading(run_of(RECIPE, ["method=ce", *words, *sizes]), CPU, repeats=1, warmup=1, steps=2)
    assert [part.name for part in parts] == ["read", "decode", "loader"]
    assert "note: native reader: it has no masks and no buckets, so it is not measured" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ((), ["read", "decode", "loader", "native reader"]),
        (PAD, ["read", "decode", "loader", "native reader"]),
        (("data.loader=synthetic",), ["read", "decode", "loader"]),
        ((*PAD, "data.loader=memory"), ["loader"]),
    ],
)
def test_reading_decoding_and_the_whole_are_measured_apart_over_any_number_of_epochs(
    small_shards: Path, words: tuple[str, ...], names: list[str], capsys: pytest.CaptureFixture[str]
):
    parts = measure_loading(run(small_shards, *words), CPU, repeats=2, warmup=1, steps=13)
    assert [part.name for part in parts] == names
    for part in parts:
        assert part.images == 13 * 4
        assert len(part.seconds) == 2
        assert min(part.seconds) > 0
    assert capsys.readouterr().out.startswith("page cache while reading was measured") == ("read" in names)


@pytest.mark.parametrize("keys", [{"crop": "pad", "pad": 0}, {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}])
def test_the_native_reader_does_the_same_work(small_shards: Path, keys: dict):
    """Where nothing is left to chance, its images are ours; only their order is not."""
    loader = open_loader(config_of(small_shards, flip=0.0, **keys), batch=10)
    ours = join(loader.stream(Progress(4), 3)).images_BCHW
    with closing(native_decoder(loader.plan, loader.settings, CPU)) as batches:
        theirs = torch.cat(list(islice(batches, 5))).permute(0, 3, 1, 2)
    nearest = (theirs[:, None] - ours).abs().flatten(2).amax(2).min(1)
    assert nearest.values.max() == 0
    assert len(theirs.flatten(1).unique(dim=0)) > 30


def test_the_best_is_remembered_and_the_next_loader_takes_it(
    photo_shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(tune, "_SECONDS", 0.001)
    found = run(photo_shards)
    measured = tune.tune(found, CPU)
    *rates, conclusion = capsys.readouterr().out.splitlines()
    assert [each.name for each in measured] == [line.partition("  ")[0] for line in rates]
    assert measured[-3].name == "prefetch 1"
    assert str(tuned_path()) in conclusion
    pace = build_loader(found.recipe, found.manifest, CPU, ("train",)).settings
    assert f"data.threads={pace.threads} data.prefetch={pace.prefetch} for" in conclusion
    tuned_path().write_text(tuned_path().read_text().replace(f'"prefetch": {pace.prefetch}', '"prefetch": 7'))
    assert build_loader(found.recipe, found.manifest, CPU, ("train",)).settings == LoaderSettings(
        threads=pace.threads, prefetch=7
    )
    own = loaded(photo_shards, "data.prefetch=5").recipe
    assert build_loader(own, found.manifest, CPU, ("train",)).settings == LoaderSettings(
        threads=pace.threads, prefetch=5
    )


def test_both_ways_of_the_jpeg_engine_are_measured_and_neither_is_remembered(
    photo_shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(tune, "_SECONDS", 0.001)
    monkeypatch.setattr(tune, "REPEATS", 1)
    monkeypatch.setattr(tune, "has_engine", lambda device: True)
    measured = tune.tune(run(photo_shards), CPU)
    assert [each.name for each in measured[-2:]] == ["hw_decoder_load 0", "hw_decoder_load 1"]
    printed = capsys.readouterr().out
    assert all(f"{each.name} " in printed for each in measured)
    assert "hw_decoder_load" not in tuned_path().read_text()


def test_what_cannot_be_remembered_is_told(
    photo_shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    best = loaded(photo_shards).recipe.data.model_copy(update={"threads": 3, "prefetch": 4, "hw_decoder_load": 1})
    tune._save_best(loaded(photo_shards).recipe.data, best, read_manifest(photo_shards), CPU)
    note, *by_hand = (line for line in capsys.readouterr().out.splitlines() if "is ignored" not in line)
    assert note.startswith("note: /dev/null/distillation-pipeline/loader.json cannot be written")
    assert note.endswith("give data.threads=3 data.prefetch=4")
    assert by_hand[0].startswith("data.hw_decoder_load=1 is best; it changes pixels, so it is not saved.")
    assert by_hand[1:] == ["data: {hw_decoder_load: 1}"]


def test_the_jpeg_engine_is_never_remembered():
    assert set(LoaderSettings.model_fields) == {"threads", "prefetch"}


def test_the_jpeg_engine_is_tried_where_there_is_one_and_never_under_a_cache(
    photo_shards: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe, gpu = loaded(photo_shards).recipe, torch.device("cuda", 0)
    assert "hw_decoder_load" not in tune._sweeps(recipe, CPU)
    monkeypatch.setattr(tune, "has_engine", lambda device: device == gpu)
    assert tune._sweeps(recipe, gpu)["hw_decoder_load"] == (0, 1)
    cached = loaded(photo_shards, "teacher={model: cifar_resnet20, weights: w.pt, cache: answers}").recipe
    assert tune._sweeps(cached, gpu).keys() == tune._sweeps(recipe, CPU).keys()
    monkeypatch.setattr(tune, "has_engine", lambda device: False)
    assert tune._sweeps(recipe, gpu).keys() == tune._sweeps(recipe, CPU).keys()


def test_the_least_of_the_best_is_taken():
    def at(rate: float) -> Measurement:
        return Measurement("", [1 / rate], 1)

    assert tune._smallest_good_value({1: at(50), 2: at(99), 4: at(100)}) == 2
    assert tune._smallest_good_value({1: at(50), 2: at(97), 4: at(100)}) == 4


def test_there_is_nothing_to_tune_where_nothing_is_decoded_as_it_goes(small_shards: Path):
    with pytest.raises(RecipeError, match=r"data\.loader: memory"):
        tune.tune(run(small_shards, *PAD, "data.loader=memory"), CPU)


def test_thread_counts_end_at_the_ranks_cores():
    assert tune._thread_counts()[-1] == cores()
