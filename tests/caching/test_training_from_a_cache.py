"""A run from a cache is the run with the live teacher on the same views, bit for bit."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import rounded_teacher
import torch
import training_on_ranks
import yaml
from gloo_ranks import Ranks
from safetensors.torch import load_file, save_file

from pipeline import compare
from pipeline.config.recipe import load_recipe
from pipeline.diagnostics.inputs import check_teacher_source
from pipeline.distributed.launcher import Launch
from pipeline.errors import RecipeError
from pipeline.teachers.frozen import Teacher
from pipeline.training.journal import trace

ROOT = Path(__file__).resolve().parents[2]
Command = Callable[..., None]


def assert_same_run(one: Path, other: Path, epochs: int = 2, repeat: int = 1) -> None:
    """Compare the lines of the journal, and every weight of the student."""
    lines = trace(one / "journal.jsonl")
    assert len(lines) == (5 * repeat + 1) * epochs  # five steps and an evaluation each
    assert lines == trace(other / "journal.jsonl")
    weights, others = load_file(one / "student.safetensors"), load_file(other / "student.safetensors")
    assert all(weights[key].equal(others[key]) for key in weights)


@pytest.mark.parametrize("method", ["kd", "dkd", "perception", "ddkd"])
def test_each_method_learns_the_same_as_from_the_live_teacher(
    method: str, written: Path, place: Path, run_train: Command
):
    rounded_teacher.train(0, 1, place, [f"{method}.yaml", "folder=live"])
    (place / "teacher.safetensors").unlink()  # the cache takes its place
    run_train(f"{method}.yaml", f"teacher.cache={written}", "folder=cached")
    assert_same_run(place / "live", place / "cached")


AUGMENT = (
    "data.augment=[{randaugment: {ops: 2, magnitude: 9}}, {color_jitter: {hue: 0.1}}, {erasing: {probability: 0.5}}]"
)


def test_augmented_views_are_answered_as_the_live_teacher_answers_them(
    place: Path, run_cache: Command, run_train: Command
):
    words = ["kd.yaml", AUGMENT, "data.views=2"]
    rounded_teacher.train(0, 1, place, [*words, "epochs=3", "folder=live"])
    run_cache(*words, "teacher.cache=cache")
    run_train(*words, "epochs=3", "teacher.cache=cache", "folder=cached")
    assert_same_run(place / "live", place / "cached", epochs=3)
    plain = ["kd.yaml", "data.views=2", "teacher.cache=cache"]
    for changed in ("data.augment=[]", AUGMENT.replace("0.5", "0.4"), "data.augment=[{trivialaugment: {}}]"):
        with pytest.raises(RecipeError, match=r"different settings: data\.augment"):
            run_train(*plain, changed)


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
    rounded_teacher.train(0, 1, place, [*words, "folder=live"])
    run_train(*words, f"teacher.cache={written}", "folder=cached")
    assert_same_run(place / "live", place / "cached", epochs=3)


def test_an_epoch_with_every_image_twice_reads_two_views_of_the_cache(written: Path, place: Path, run_train: Command):
    words = ["kd.yaml", "epochs=1", "data.repeat=2"]
    rounded_teacher.train(0, 1, place, [*words, "folder=live"])
    run_train(*words, f"teacher.cache={written}", "folder=cached", "stop.steps=7")
    run_train(*words, f"teacher.cache={written}", "folder=cached")
    assert_same_run(place / "live", place / "cached", epochs=1, repeat=2)


MIXING = "data.augment=[{trivialaugment: {}}, {mixup: {alpha: 0.8}}, {cutmix: {alpha: 1.0, probability: 0.5}}]"


@pytest.mark.parametrize("method", ["kd", "all"])
def test_mixed_images_have_the_answers_of_the_live_teacher(
    method: str, place: Path, run_cache: Command, run_train: Command
):
    words = [f"{method}.yaml", MIXING, "data.repeat=2"]
    rounded_teacher.train(0, 1, place, [*words, "folder=live"])
    run_cache(*words, "teacher.cache=mixed")
    run_train(*words, "teacher.cache=mixed", "folder=cached", "stop.steps=7")
    run_train(*words, "teacher.cache=mixed", "folder=cached")
    assert_same_run(place / "live", place / "cached", repeat=2)


def test_two_ranks_learn_the_same_from_a_cache_of_mixed_images(place: Path, run_cache: Command, ranks: Ranks):
    ranks(rounded_teacher.train, place, ["all.yaml", MIXING, "folder=live"])
    run_cache("all.yaml", MIXING, "teacher.cache=mixed")
    ranks(training_on_ranks.train, place, ["all.yaml", MIXING, "teacher.cache=mixed", "folder=cached"])
    assert_same_run(place / "live", place / "cached")


def test_partners_of_a_cache_are_those_of_the_run_that_holds_images_out(
    place: Path, run_cache: Command, run_train: Command
):
    words = ["kd.yaml", MIXING, "data.holdout.share=0.3"]
    rounded_teacher.train(0, 1, place, [*words, "folder=live"])
    run_cache(*words, "teacher.cache=mixed")
    run_train(*words, "teacher.cache=mixed", "folder=cached")
    live, cached = (trace(place / name / "journal.jsonl") for name in ("live", "cached"))
    assert live == cached
    assert len(live) == 2 * (3 + 1)  # three steps of 40 images and an evaluation, twice


def test_a_cache_of_other_mixtures_is_refused(written: Path, place: Path, run_cache: Command, run_train: Command):
    with pytest.raises(RecipeError, match=r"different settings: data\.augment"):
        run_train("kd.yaml", MIXING, f"teacher.cache={written}")
    run_cache("kd.yaml", MIXING, "teacher.cache=mixed")
    with pytest.raises(
        RecipeError, match=r"different settings: data\.partners \(all training images, here all but 0\.5"
    ):
        run_train("kd.yaml", MIXING, "teacher.cache=mixed", "data.holdout.share=0.5")


def test_fewer_epochs_than_views_need_no_more_of_them(copied: Path, place: Path, run_train: Command):
    for file in copied.glob("view-01.*"):
        file.unlink()
    with pytest.raises(RecipeError, match=r"view-01\.logits\.npy is missing"):
        run_train("kd.yaml", "teacher.cache=cache", "folder=two")
    run_train("kd.yaml", "teacher.cache=cache", "folder=one", "epochs=1")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["data.scale=[0.2, 1.0]"], r"different settings: data\.scale \(\[0\.5, 1\.0\], here \[0\.2, 1\.0\]\)"),
        (["data.augment=[{trivialaugment: {}}]"], r"different settings: data\.augment"),
        (["data.seed=1"], r"different settings: data\.seed"),
        (["teacher.weights=other.safetensors"], r"different settings: teacher\.network\.weights"),
        (["teacher.mean=[0.1, 0.1, 0.1]"], r"different settings: teacher\.network\.mean"),
        (["data.path=other_shards"], r"different settings: shards"),
        (["data.views=3"], r"has 2 views, but 3 are needed"),
    ],
)
def test_a_cache_of_other_answers_is_refused(
    words: list[str], told: str, written: Path, place: Path, run_train: Command
):
    weights = {key: 2 * value for key, value in load_file("teacher.safetensors").items()}
    save_file(weights, place / "other.safetensors")
    shutil.copytree(place / "shards", place / "other_shards")
    manifest = place / "other_shards" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"tool": "', '"tool": "another '))
    with pytest.raises(RecipeError, match=told) as refusal:
        run_train("kd.yaml", f"teacher.cache={written}", "epochs=3", *words)
    assert "\n" not in str(refusal.value)
    assert not (place / "runs").exists()


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


def test_a_difference_may_be_accepted_in_the_middle_of_a_run(copied: Path, run_train: Command):
    words = ["kd.yaml", "teacher.cache=cache"]
    run_train(*words, "stop.steps=3", "teacher.accept=[data.decoder.version]")
    run_train(*words, "teacher.accept=[data.decoder.version, data.decoder.device]")


def test_rows_of_other_shards_are_refused_whatever_is_accepted(copied: Path, run_train: Command):
    more = [sys.executable, str(ROOT / "shards" / "prepare_demo.py"), "more", "--train", "90", "--val", "12"]
    subprocess.run([*more, "--size", "24", "--jobs", "1"], check=True, capture_output=True)
    with pytest.raises(RecipeError, match=r"rows for 60 ids, but the shards have 90"):
        run_train("kd.yaml", "teacher.cache=cache", "data.path=more", "teacher.accept=[shards]")


def test_a_finished_run_needs_its_cache_no_more(copied: Path, run_train: Command, capsys: pytest.CaptureFixture[str]):
    words = ["kd.yaml", "teacher.cache=cache", "data.views=null", "epochs=1"]
    run_train(*words)
    told = capsys.readouterr().out
    shutil.rmtree(copied)
    run_train(*words)
    assert capsys.readouterr().out.splitlines()[-1] == told.splitlines()[-1]


def test_a_run_keeps_its_views_when_its_cache_grows(copied: Path, place: Path, run_cache: Command, run_train: Command):
    words = ["kd.yaml", "teacher.cache=cache", "data.views=null", "epochs=3", "folder=run"]
    run_train(*words, "stop.steps=3")
    run_cache("all.yaml", "teacher.cache=cache", "views=3")
    run_train(*words)
    run_train("kd.yaml", "teacher.cache=cache", "data.views=2", "epochs=3", "folder=two")
    assert_same_run(place / "run", place / "two", epochs=3)


def test_a_kind_that_is_added_in_the_middle_of_a_run_makes_it_another(run_cache: Command, run_train: Command):
    words = ["ddkd.yaml", "teacher.cache=cache", "teacher.fallback=live"]
    run_cache("kd.yaml", "teacher.cache=cache")
    run_train(*words, "stop.steps=3")
    run_cache("ddkd.yaml", "teacher.cache=cache")
    with pytest.raises(RecipeError, match=r"another recipe \(different teacher\.cache\)"):
        run_train(*words)


def test_the_network_is_asked_about_no_more_images_than_a_rank_has(
    run_cache: Command, run_train: Command, monkeypatch: pytest.MonkeyPatch
):
    run_cache("kd.yaml", "teacher.cache=cache")
    asked, prepared = [], Teacher._prepared

    def counted(self: Teacher, images_BCHW: torch.Tensor) -> torch.Tensor:
        found = prepared(self, images_BCHW)
        asked.append(len(found))
        return found

    monkeypatch.setattr(Teacher, "_prepared", counted)
    words = ["teacher.cache=cache", "teacher.fallback=live", "teacher.batch=null", "accumulation=3", "stop.steps=1"]
    run_train("ddkd.yaml", *words)
    assert asked == [4, 4, 4]


def test_an_ensemble_and_a_run_are_cached_as_one_network_is(place: Path, run_cache: Command, run_train: Command):
    one = {"model": "cifar_resnet20", "weights": "teacher.safetensors"}
    teacher = {"members": [one, {**one, "fold": False}], "combine": "entropy", "temperature": 4.0, "batch": 12}
    ensemble = {"base": "kd.yaml", "teacher": {**teacher, "model": None, "weights": None}}
    Path("ensemble.yaml").write_text(yaml.safe_dump(ensemble))
    Path("first.yaml").write_text(yaml.safe_dump({"base": "kd.yaml", "epochs": 1, "folder": "runs/first"}))
    chained = {"model": None, "weights": None, "recipe": "first.yaml"}
    Path("chained.yaml").write_text(yaml.safe_dump({"base": "kd.yaml", "teacher": chained}))
    run_train("first.yaml")
    for name in ("ensemble", "chained"):
        rounded_teacher.train(0, 1, place, [f"{name}.yaml", f"folder={name}_live"])
        run_cache(f"{name}.yaml", f"teacher.cache={name}_cache")
    shutil.rmtree("runs/first")
    Path("teacher.safetensors").unlink()
    for name in ("ensemble", "chained"):
        run_train(f"{name}.yaml", f"teacher.cache={name}_cache", f"folder={name}_cached")
        assert_same_run(place / f"{name}_live", place / f"{name}_cached")


def test_the_doctor_looks_for_all_that_the_recipe_reads_in_the_cache(copied: Path, run_cache: Command):
    run_cache("kd.yaml", "teacher.cache=logits")

    def status(*words: str) -> str:
        return check_teacher_source(load_recipe("ddkd.yaml", words), Launch()).status

    assert status("teacher.cache=cache") == "ok"
    assert status("teacher.cache=logits") == "FAIL"
    assert status("teacher.cache=logits", "teacher.fallback=live") == "ok"
    assert status("teacher.cache=nowhere") == "FAIL"
    (copied / "view-01.stage3.npy").unlink()
    assert status("teacher.cache=cache") == "FAIL"


def test_a_circle_through_a_cache_is_a_circle(written: Path, place: Path, run_train: Command):
    circle = {"base": "kd.yaml", "teacher": {"model": None, "weights": None, "recipe": "circle.yaml"}}
    Path("circle.yaml").write_text(yaml.safe_dump(circle))
    with pytest.raises(RecipeError, match=r"the recipe depends on itself"):
        run_train("circle.yaml", f"teacher.cache={written}")


def test_a_cache_may_move_and_its_run_goes_on(copied: Path, place: Path, run_train: Command):
    run_train("kd.yaml", "teacher.cache=cache", "folder=run", "stop.steps=5")
    copied.rename(place / "elsewhere")
    with pytest.raises(RecipeError, match=r"cache: there is no cache here.*cache_teacher\.py"):
        run_train("kd.yaml", "teacher.cache=cache", "folder=run")
    run_train("kd.yaml", "teacher.cache=elsewhere", "folder=run")
    assert (place / "run" / "result.json").is_file()


def test_seeds_and_methods_side_by_side_train_from_one_cache_as_each_does_alone(
    written: Path, place: Path, run_train: Command
):
    (place / "teacher.safetensors").unlink()
    cached = [f"teacher.cache={written}"]
    for name in ("kd", "ddkd"):
        run_train(f"{name}.yaml", *cached, "seed=1", f"folder=alone/{name}")
    training_on_ranks.run(compare.main, 0, 1, place, ["kd.yaml", "ddkd.yaml", "seeds=0,1", "side=4", *cached])
    for name in ("kd", "ddkd"):
        assert_same_run(place / "alone" / name, place / "runs" / name / "seed-1")
        assert (place / "runs" / name / "seed-0" / "result.json").is_file()


def test_a_cache_of_all_images_serves_a_run_that_holds_some_out(written: Path, place: Path, run_train: Command):
    holdout = "data.holdout={share: 0.34}"
    rounded_teacher.train(0, 1, place, ["kd.yaml", "folder=live", holdout])
    run_train("kd.yaml", f"teacher.cache={written}", "folder=cached", holdout)
    steps = [[line for line in trace(place / run / "journal.jsonl") if "total" in line] for run in ("live", "cached")]
    assert len(steps[0]) == 6  # two epochs of 40 images
    assert steps[0] == steps[1]


def test_a_teacher_of_its_own_size_is_cached_as_it_answers_live(place: Path, run_cache: Command, run_train: Command):
    words = ["all.yaml", "teacher.size=24", "data.validation_size=20"]
    rounded_teacher.train(0, 1, place, [*words, "folder=live"])
    run_cache(*words, "teacher.cache=cache")
    run_train(*words, "teacher.cache=cache", "folder=cached")
    assert_same_run(place / "live", place / "cached")
    with pytest.raises(RecipeError, match=r"different settings: teacher\.network\.size"):
        run_train("all.yaml", "teacher.cache=cache", "folder=other")
