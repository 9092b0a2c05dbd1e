"""A run from a cache is the run with the live teacher on the same views, bit for bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import rounded_teacher
import training_on_ranks
from gloo_ranks import Ranks
from one_core import one_core
from safetensors.torch import load_file

from pipeline.composition import RecipeError
from pipeline.journal import trace

Command = Callable[..., None]


def assert_same_run(one: Path, other: Path, epochs: int = 2) -> None:
    """Compare the lines of the journal, and every weight of the student."""
    lines = trace(one / "journal.jsonl")
    assert len(lines) == 6 * epochs  # five steps and an evaluation each
    assert lines == trace(other / "journal.jsonl")
    weights, others = load_file(one / "student.safetensors"), load_file(other / "student.safetensors")
    assert all(weights[key].equal(others[key]) for key in weights)


@pytest.mark.parametrize("method", ["kd", "dkd", "perception", "ddkd"])
def test_each_method_learns_the_same_as_from_the_live_teacher(
    method: str, written: Path, place: Path, run_train: Command
):
    with one_core():
        rounded_teacher.train(0, 1, place, [f"{method}.yaml", "folder=live"])
    (place / "teacher.safetensors").unlink()  # the cache takes its place
    run_train(f"{method}.yaml", f"teacher.cache={written}", "folder=cached")
    assert_same_run(place / "live", place / "cached")


def test_rounding_to_float16_is_what_differs_from_the_live_teacher(written: Path, place: Path, run_train: Command):
    run_train("kd.yaml", "folder=live")
    run_train("kd.yaml", f"teacher.cache={written}", "folder=cached")
    live, cached = (trace(place / run / "journal.jsonl")[0]["kd"] for run in ("live", "cached"))
    assert live != cached
    assert live == pytest.approx(cached, rel=1e-3)


def test_a_run_that_stopped_within_an_epoch_goes_on_from_the_cache(written: Path, place: Path, run_train: Command):
    words = ["all.yaml", f"teacher.cache={written}"]
    run_train(*words, "folder=whole")
    run_train(*words, "folder=parts", "stop.steps=7")
    assert not (place / "parts" / "result.json").exists()
    run_train(*words, "folder=parts")
    assert_same_run(place / "whole", place / "parts")


def test_two_ranks_learn_the_same_from_a_cache_as_from_the_live_teacher(written: Path, place: Path, ranks: Ranks):
    ranks(rounded_teacher.train, place, ["all.yaml", "folder=live"])
    words = ["all.yaml", f"teacher.cache={written}", "folder=cached"]
    ranks(training_on_ranks.train, place, [*words, "stop.steps=7"])
    ranks(training_on_ranks.train, place, words)
    assert_same_run(place / "live", place / "cached")


def test_what_the_cache_lacks_ends_the_command_with_loss_and_stage(
    copied: Path, run_cache: Command, run_train: Command
):
    run_cache("kd.yaml", "teacher.cache=logits")
    with pytest.raises(
        RecipeError, match=r"logits has no stage3, which the loss 'ddkd' reads as 'last'.*fallback=live"
    ):
        run_train("ddkd.yaml", "teacher.cache=logits")


def test_what_the_cache_lacks_is_asked_of_the_network_where_the_recipe_says_so(
    place: Path, run_cache: Command, run_train: Command
):
    run_cache("kd.yaml", "teacher.cache=logits")
    run_train("ddkd.yaml", "teacher.cache=logits", "teacher.fallback=live", "folder=mixed")
    run_train("ddkd.yaml", "folder=live")
    mixed, live = (trace(place / run / "journal.jsonl")[0] for run in ("mixed", "live"))
    assert mixed["ddkd/diffusion_feature"] == live["ddkd/diffusion_feature"]  # the map was the network's own
    assert mixed["ddkd/diffusion_logit"] != live["ddkd/diffusion_logit"]  # and the logits were float16


def test_more_epochs_than_views_see_the_views_again(written: Path, place: Path, run_train: Command):
    words = ["kd.yaml", "epochs=3", "data.views=1"]
    with one_core():
        rounded_teacher.train(0, 1, place, [*words, "folder=live"])
    run_train(*words, f"teacher.cache={written}", "folder=cached")
    assert_same_run(place / "live", place / "cached", epochs=3)


def test_fewer_epochs_than_views_need_no_more_of_them(copied: Path, place: Path, run_train: Command):
    for file in copied.glob("view-01.*"):
        file.unlink()
    with pytest.raises(RecipeError, match=r"view-01\.logits\.npy is missing"):
        run_train("kd.yaml", "teacher.cache=cache", "folder=two")
    run_train("kd.yaml", "teacher.cache=cache", "folder=one", "epochs=1")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["data.scale=[0.2, 1.0]"], r"another data\.scale \(\[0\.5, 1\.0\], here \[0\.2, 1\.0\]\)"),
        (["data.seed=1"], r"another data\.seed"),
        (["teacher.weights=other.safetensors"], r"another teacher\.networks\.teacher\.weights"),
        (["teacher.batch=6"], r"another teacher\.batch"),
        (["teacher.mean=[0.1, 0.1, 0.1]"], r"another teacher\.networks\.teacher\.mean"),
        (["data.path=other_shards"], r"another shards"),
        (["data.views=3"], r"has 2 views, 3 are asked for"),
    ],
)
def test_a_cache_of_other_answers_is_refused(
    words: list[str], told: str, written: Path, place: Path, run_train: Command
):
    weights = {key: 2 * value for key, value in load_file("teacher.safetensors").items()}
    _save(weights, place / "other.safetensors")
    shutil.copytree(place / "shards", place / "other_shards")
    manifest = place / "other_shards" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"tool": "', '"tool": "another '))
    with pytest.raises(RecipeError, match=told) as refusal:
        run_train("kd.yaml", f"teacher.cache={written}", "epochs=3", *words)
    assert "\n" not in str(refusal.value)
    assert not (place / "runs").exists()


def _save(state: dict, path: Path) -> None:
    from safetensors.torch import save_file

    save_file(state, path)


def test_a_decoder_of_another_version_is_refused_and_accepted_by_name(copied: Path, place: Path, run_train: Command):
    header = copied / "cache.json"
    header.write_text(header.read_text().replace('"backend": "dali"', '"backend": "another"'))
    with pytest.raises(RecipeError, match=r"accept=\[data\.decoder\.backend\]"):
        run_train("kd.yaml", "teacher.cache=cache")
    run_train("kd.yaml", "teacher.cache=cache", "teacher.accept=[data.decoder.backend]")


def test_a_cache_alone_is_a_teacher(written: Path, place: Path, run_train: Command):
    run_train("ofd.yaml", f"teacher.cache={written}", "folder=named")
    own = ["teacher.model=null", "teacher.weights=null", "teacher.batch=null", "data.views=null"]
    run_train("ofd.yaml", f"teacher.cache={written}", "folder=alone", *own)
    assert_same_run(place / "named", place / "alone")


def test_a_cache_may_move_and_its_run_goes_on(copied: Path, place: Path, run_train: Command):
    run_train("kd.yaml", "teacher.cache=cache", "folder=run", "stop.steps=5")
    copied.rename(place / "elsewhere")
    with pytest.raises(RecipeError, match=r"cache: there is no cache here.*cache_teacher\.py"):
        run_train("kd.yaml", "teacher.cache=cache", "folder=run")
    run_train("kd.yaml", "teacher.cache=elsewhere", "folder=run")
    assert (place / "run" / "result.json").is_file()
