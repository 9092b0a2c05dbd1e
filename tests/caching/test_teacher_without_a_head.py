"""A teacher without a head teaches by its features, live and from a cache, and every reader of its logits says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import rounded_teacher
import torch
import training_on_ranks
import yaml
from gloo_ranks import Ranks
from methods import losses_of
from safetensors.torch import load_file, save_file

from pipeline import evaluate
from pipeline.builders.summary import summarize
from pipeline.config.recipe import load_recipe
from pipeline.diagnostics.inputs import check_teacher_source
from pipeline.distributed.launcher import Launch
from pipeline.errors import RecipeError
from pipeline.models import create_model
from pipeline.training.journal import trace

Command = Callable[..., None]
FEATURES = ("fitnet", "at", "review", "sp", "crd")
HEADLESS = "features.yaml"


@pytest.fixture
def place(place: Path) -> Path:
    """The folder with ``features.yaml``, whose teacher knows seven classes, while the shards have twenty."""
    recipe = yaml.safe_load((place / "kd.yaml").read_text())
    teacher = create_model("cifar_resnet20", 7)
    whole = load_file(place / "teacher.safetensors")
    trunk = {name: value for name, value in whole.items() if not name.startswith("fc.")}
    save_file(teacher.state_dict() | trunk, place / "seven.safetensors")
    recipe["teacher"] |= {"weights": "seven.safetensors", "head": "none"}
    recipe["losses"] = {name: config for each in FEATURES for name, config in losses_of(each).items()}
    (place / HEADLESS).write_text(yaml.safe_dump(recipe))
    return place


def assert_same_run(one: Path, other: Path) -> None:
    assert len(lines := trace(one / "journal.jsonl")) == 12
    assert lines == trace(other / "journal.jsonl")
    weights, others = load_file(one / "student.safetensors"), load_file(other / "student.safetensors")
    assert all(weights[key].equal(others[key]) for key in weights)


def test_it_teaches_the_same_as_with_a_head_of_any_classes(
    place: Path, run_train: Command, capsys: pytest.CaptureFixture[str]
):
    run_train(HEADLESS, "folder=without")
    printed = capsys.readouterr().out
    assert "live, cifar_resnet20 without its head" in printed
    assert "note: teacher.weights: seven.safetensors: head: none leaves out fc.bias, fc.weight" in printed
    run_train(HEADLESS, "folder=whole", "teacher.head=null", "teacher.weights=teacher.safetensors")
    assert_same_run(place / "without", place / "whole")
    with pytest.raises(RecipeError, match="the weights have 7 classes, the network and the shards have 20"):
        run_train(HEADLESS, "folder=other", "teacher.head=null")


def test_its_cache_has_features_only_and_teaches_the_same(
    place: Path, run_cache: Command, run_train: Command, capsys: pytest.CaptureFixture[str]
):
    run_cache("--dry-run", HEADLESS, "teacher.cache=cache")
    assert "logits" not in capsys.readouterr().out
    run_cache(HEADLESS, "teacher.cache=cache")
    run_cache("--verify", HEADLESS, "teacher.cache=cache")
    assert {file.name.split(".", 1)[1] for file in (place / "cache").glob("view-00.*.npy")} == {
        f"{kind}{ending}.npy"
        for kind in ("embedding", "stage1", "stage1.preact", "stage2", "stage2.preact", "stage3", "stage3.preact")
        for ending in ("", ".sha256")
    }
    rounded_teacher.train(0, 1, place, [HEADLESS, "folder=live"])
    run_train(HEADLESS, "teacher.cache=cache", "folder=cached", "stop.steps=7")
    assert not (place / "cached" / "result.json").exists()
    run_train(HEADLESS, "teacher.cache=cache", "folder=cached")
    assert_same_run(place / "live", place / "cached")


def test_two_ranks_learn_the_same_from_its_cache_as_from_the_live_teacher(
    place: Path, run_cache: Command, ranks: Ranks
):
    run_cache(HEADLESS, "teacher.cache=cache")
    ranks(rounded_teacher.train, place, [HEADLESS, "folder=live"])
    ranks(training_on_ranks.train, place, [HEADLESS, "teacher.cache=cache", "folder=cached"])
    assert_same_run(place / "live", place / "cached")


def test_a_cache_of_it_serves_a_recipe_that_names_the_cache_only(place: Path, run_cache: Command, run_train: Command):
    run_cache(HEADLESS, "teacher.cache=cache")
    recipe = yaml.safe_load((place / HEADLESS).read_text()) | {"teacher": {"cache": "cache"}}
    (place / "only.yaml").write_text(yaml.safe_dump(recipe))
    assert "at" in summarize(load_recipe("only.yaml")).parts
    found = check_teacher_source(load_recipe("only.yaml"), Launch())
    assert (found.status, "logits" in found.value) == ("ok", False)
    run_train("only.yaml", "folder=only")
    run_train(HEADLESS, "teacher.cache=cache", "folder=both")
    assert_same_run(place / "only", place / "both")
    recipe["losses"] = losses_of("kd")
    (place / "only.yaml").write_text(yaml.safe_dump(recipe))
    message = (
        r"^teacher.cache: cache is of a teacher without a head, and the loss 'kd' reads what a head computes; remove"
    )
    with pytest.raises(RecipeError, match=message):
        summarize(load_recipe("only.yaml"))
    with pytest.raises(RecipeError, match="cache is of a teacher without a head, and the loss 'kd' reads"):
        run_train("only.yaml", "folder=kd")


def test_a_cache_without_a_head_is_not_that_of_a_teacher_with_one(place: Path, run_cache: Command, run_train: Command):
    run_cache(HEADLESS, "teacher.cache=cache")
    with pytest.raises(RecipeError, match=r"cache was written with different settings: teacher\.network\.head"):
        run_train(
            HEADLESS, "teacher.cache=cache", "teacher.head=null", "teacher.weights=teacher.safetensors", "folder=whole"
        )


@pytest.mark.usefixtures("place")
def test_a_cache_with_nothing_in_it_is_refused(run_cache: Command):
    with pytest.raises(RecipeError, match=r"teacher.head: none leaves out the logits, and no loss reads features"):
        run_cache(HEADLESS, "teacher.cache=cache", "losses={ce: {}}", *(f"losses.{name}=null" for name in FEATURES))


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("loss", ["kd", "dkd", "ddkd", "perception", "irg", "dist", "cat_kd"])
def test_a_loss_that_reads_logits_is_refused_before_anything_is_built(loss: str):
    flow = yaml.safe_dump(losses_of(loss)[loss], default_flow_style=True, width=10**4)
    config = f"losses.{loss}={flow}"
    with pytest.raises(
        RecipeError, match=rf"the loss '{loss}' reads what the teacher's head computes, but teacher.head "
    ):
        load_recipe(HEADLESS, [config])


def test_a_loss_of_ones_own_may_say_that_it_reads_no_logits(place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(place))
    source = "from pipeline.losses import Loss\n\n\nclass Mine(Loss):\n    class Config(Loss.Config):\n        {}\n"
    (place / "silent_loss.py").write_text(source.format("pass"))
    (place / "saying_loss.py").write_text(source.format("def reads_head(self): return False"))
    with pytest.raises(RecipeError, match="remove the loss or the key, or let reads_head of its Config return False"):
        load_recipe(HEADLESS, ['losses={"silent_loss:Mine": {}}'])
    assert "saying_loss:Mine" in load_recipe(HEADLESS, ['losses={"saying_loss:Mine": {}}']).recipe.losses


@pytest.mark.usefixtures("place")
def test_what_needs_its_logits_says_so_in_one_line(place: Path, run_train: Command):
    with pytest.raises(RecipeError, match="expect needs the logits, which head: none leaves out; remove expect"):
        load_recipe(HEADLESS, ["teacher.expect=50"])
    alone = ("teacher.model=null", "teacher.weights=null", "teacher.batch=null")
    members = "teacher.members=[{model: resnet18, weights: a.pt, head: none}]"
    with pytest.raises(
        RecipeError, match="members: their logits are mixed, and head: none leaves them out; remove head"
    ):
        load_recipe("kd.yaml", [*alone, members, "teacher.combine=mean", "teacher.temperature=4"])
    with pytest.raises(RecipeError, match="head cannot be combined with average; remove head"):
        load_recipe("kd.yaml", [*alone, "teacher.average={decay: 0.9}", "teacher.head=none"])
    run_train(HEADLESS, "folder=run", "epochs=1")
    with pytest.raises(RecipeError, match=r"^agreement=yes: the teacher has no head \(teacher.head: none\), so it "):
        evaluate.main(["run", "agreement=yes"])


@pytest.mark.usefixtures("place")
def test_check_shows_that_it_has_no_logits():
    text = str(summarize(load_recipe(HEADLESS)))
    student, teacher = text.split("\nteacher   ")
    assert "logits           20" in student
    assert "logits           none" in teacher


TOKENS = """
import timm


def network(num_classes):
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=num_classes, **sizes)
"""


def test_a_vision_transformer_of_timm_teaches_by_its_tokens(
    place: Path, run_train: Command, run_cache: Command, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("timm", reason="timm is not installed")
    (place / "tokens_of_timm.py").write_text(TOKENS)
    monkeypatch.syspath_prepend(str(place))
    torch.manual_seed(0)
    # As DINO's and CLIP's files: tensors of a trunk, or with a head of anything but the classes of the shards.
    save_file(create_model("tokens_of_timm:network", 3).state_dict(), place / "tokens.safetensors")
    pair = "{stage: {student: last, teacher: last}, weight: 1.0}"
    teacher = ("teacher.model=tokens_of_timm:network", "teacher.weights=tokens.safetensors")
    words = (HEADLESS, *teacher, f"losses.fitnet={pair}", "epochs=1")
    run_cache(*words, "teacher.cache=cache")
    rounded_teacher.train(0, 1, place, [*words, "folder=live"])
    run_train(*words, "teacher.cache=cache", "folder=cached")
    lines = trace(place / "live" / "journal.jsonl")
    assert len(lines) == 6
    assert lines == trace(place / "cached" / "journal.jsonl")
    assert all(line[loss] > 0 for line in lines[:-1] for loss in ("fitnet", "at", "review", "sp"))
