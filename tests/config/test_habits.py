"""Names that people know from other code are answered with the key of a recipe that means the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline.config import habits
from pipeline.config.arguments import parse_recipe_args, split_command_args
from pipeline.config.recipe import Recipe, load_recipe
from pipeline.config.schema import find_node, model_schema
from pipeline.errors import ROOT, RecipeError

MINIMAL = """
student: {model: resnet18}
teacher: {model: resnet34, weights: teacher.pt}
losses: {ce: {}, kd: {temperature: 4.0}}
data: {path: shards, size: 64, mean: [0.5, 0.5, 0.5], std: [0.2, 0.2, 0.2]}
epochs: 3
batch: 8
schedule: {rate: 0.1}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL)
    return path


@pytest.fixture
def ddkd(recipe: Path) -> Path:
    """Return a recipe whose loss DKD is within DDKD."""
    path = recipe.with_name("ddkd.yaml")
    path.write_text(f"base: [recipe.yaml, {ROOT}/configs/methods/ddkd.yaml]\nlosses: {{kd: null}}\n")
    return path


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


HINTS = {
    **{"lr": "schedule.rate", "learning_rate": "schedule.rate", "base-lr": "schedule.rate"},
    **{"wd": "optimizer.weight_decay", "weight_decay": "optimizer.weight_decay", "momentum": "optimizer.momentum"},
    **{"batch_size": "batch", "bs": "batch", "num_epochs": "epochs", "max_epochs": "epochs"},
    **{"label_smoothing": "losses.ce.label_smoothing", "T": "losses.kd.temperature", "alpha": "losses.NAME.weight"},
    **{"num_workers": "data.threads", "workers": "data.threads", "data_dir": "data.path", "root": "data.path"},
    **{"amp": "precision", "fp16": "precision", "img_size": "data.size", "num_classes": "data.classes"},
    **{"output_dir": "folder", "exp_name": "folder", "name": "folder", "grad_clip": "clip", "max_norm": "clip"},
    **{"accum": "accumulation", "gradient_accumulation_steps": "accumulation", "arch": "student.model"},
    **{"model": "student.model", "teacher_model": "teacher.model", "lr_scheduler": "schedule.kind"},
    **{"scheduler": "schedule.kind", "warmup_epochs": "schedule.warmup_epochs", "ema_decay": "ema.decay"},
    **{"pretrained": "teacher.weights or student.start.weights", "opt": "optimizer.kind", "wandb": "journal.trackers"},
    **{"save_freq": "checkpoints.every_epochs or checkpoints.every_steps", "print_freq": "journal.every_steps"},
    **{"compile": "student.compile or teacher.compile", "loss_type": "method=NAME, or losses", "flip": "data.flip"},
    **{"optimizer.lr": "schedule.rate", "optimizer.type": "optimizer.kind", "schedule.gamma": "schedule.factor"},
    **{"randaugment": "data.augment", "data.auto_augment": "data.augment", "ra_reps": "data.repeat"},
    **{"mixup": "data.augment", "data.cutmix": "data.augment", "mixup_switch_prob": "data.augment"},
    **{"data.batch": "batch", "data.batch_size": "batch", "data.num_workers": "data.threads", "data.name": "data.path"},
    **{"student.arch": "student.model", "student.pretrained": "student.start.weights"},
    **{"teacher.checkpoint": "teacher.weights", "checkpoints.steps": "checkpoints.every_steps"},
    **{"opt_betas": "optimizer.betas", "model_ema_warmup": "ema.warmup", "poly_power": "schedule.power"},
    **{"losses.kd.T": "losses.kd.temperature", "losses.kd.alpha": "losses.kd.weight"},
    **{"losses.ce.eps": "losses.ce.label_smoothing", "losses.kd.warmup_epochs": "losses.kd.ramp"},
}


@pytest.mark.parametrize("name", HINTS)
def test_a_name_of_other_code_is_answered_with_the_key(recipe: Path, name: str):
    assert refused(recipe, f"{name}=1") == f"command line: {name}: unknown key; use {HINTS[name]}"


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("gpus", "torchrun --nproc_per_node N, or accelerate launch --num_processes N"),
        ("local_rank", "the launcher starts the processes"),
        ("resume", "the same command continues an interrupted run"),
        ("eval_freq", "every epoch ends with a validation"),
        ("max_steps", "a run's length is in epochs"),
        ("train.lr", "epochs, batch and precision are at the top level"),
    ],
)
def test_a_name_without_a_key_is_answered_with_what_to_do(recipe: Path, name: str, answer: str):
    message = refused(recipe, f"{name}=1")
    assert message.startswith(f"command line: {name.partition('.')[0] if name == 'train.lr' else name}: unknown key; ")
    assert answer in message


def test_a_file_gets_the_same_answer(recipe: Path):
    recipe.write_text(MINIMAL + "lr: 0.1\n")
    assert refused(recipe).endswith("recipe.yaml: lr: unknown key; use schedule.rate")


def test_a_misspelling_in_a_section_comes_before_a_habit(recipe: Path):
    assert "did you mean 'epoch'?" in refused(recipe, "stop.epochs=1")
    assert "did you mean 'epochs'?" in refused(recipe, "epoch=1")
    assert "did you mean 'weights'?" in refused(recipe, "teacher.weight=x")


def names(table: dict[str, str]) -> list[str]:
    return [name for text in table.values() for name in text.split()]


def test_no_name_has_two_meanings_or_is_a_key_itself():
    every = names(habits._KEYS) + names(habits._ANSWERS)
    assert sorted(every) == sorted({*every})
    assert not {*every} & Recipe.model_fields.keys()


def test_every_key_of_the_answers_exists():
    root = model_schema(Recipe)
    texts = [*habits._KEYS, *(f"{section}.{key}" for section, table in habits._SECTIONS.items() for key in table)]
    texts += [text for text in habits._ANSWERS if "launcher" not in text]
    found = [key for text in texts for key in re.findall(r"[a-z_]+(?:\.[a-z_]+)+", text) if not key.endswith(".py")]
    found += [text for text in habits._KEYS if re.fullmatch("[a-z_]+", text)]
    of_any_loss = {f"losses.{name}": "kd" for name in ("ramp", "temperature", "weight")}
    of_any_loss["losses.label_smoothing"] = "ce"
    for key in found:
        section, _, name = key.partition(".")
        dotted = f"{section}.{of_any_loss[key]}.{name}" if key in of_any_loss else key
        assert find_node(root, dotted.split(".")), key
    assert len(found) > 50


def test_a_key_of_a_nested_loss_is_found_in_the_recipe(ddkd: Path):
    nested = "losses.ddkd.logit_distance.dkd"
    for key in ("alpha", "beta", "temperature"):
        for name in (key, f"losses.ddkd.{key}"):
            assert refused(ddkd, f"{name}=1") == f"command line: {name}: unknown key; use {nested}.{key}"
    assert refused(ddkd, "losses.ddkd.T=1").endswith(f"use {nested}.temperature")
    assert refused(ddkd, "latent=8", "losses.ddkd.feature.latent=4").endswith("use losses.ddkd.feature.latent")
    crd = "losses.crd={dim: 8, negatives: 4, temperature: 0.1, momentum: 0.5}"
    assert refused(ddkd, crd, "momentum=0.9").endswith("use optimizer.momentum")
    assert "did you mean 'time_steps'?" in refused(ddkd, "losses.ddkd.diffusion.steps=5")


def test_a_loss_that_is_only_within_another_one_is_not_added_by_one_of_its_keys(ddkd: Path):
    nested = "losses.ddkd.logit_distance.dkd"
    for key in ("beta", "ramp.linear_epochs"):
        assert refused(ddkd, f"losses.dkd.{key}=4") == (
            f"command line: losses.dkd.{key}: the recipe has no loss 'dkd' of its own; use {nested}.{key}, "
            "or add the loss by losses.dkd={…}"
        )
    loaded = load_recipe(ddkd, [f"{nested}.beta=4"]).recipe
    assert loaded.losses["ddkd"].config.model_dump()["logit_distance"]["dkd"]["beta"] == 4
    added = load_recipe(ddkd, ["losses.dkd={alpha: 1, beta: 4, temperature: 2}", "losses.dkd.beta=5"]).recipe
    assert added.losses["dkd"].config.model_dump()["beta"] == 5
    assert load_recipe(ddkd, ["losses.kd.temperature=3"]).recipe.losses.keys() == {"ce", "ddkd", "kd"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--lr", "0.1"], "--lr: unknown option; overrides are written key=value: schedule.rate=0.1"),
        (["--lr=0.1"], "--lr: unknown option; overrides are written key=value: schedule.rate=0.1"),
        (["--batch-size", "64"], "--batch-size: unknown option; overrides are written key=value: batch=64"),
        (["a.yaml", "--epochs", "3"], "--epochs: unknown option; overrides are written key=value: epochs=3"),
        (["--data.path", "my shards"], "overrides are written key=value: data.path='my shards'"),
        (["--lr", "a.yaml"], "--lr: unknown option; overrides are written key=value: schedule.rate=…"),
        (["--epoch", "3", "batch=2"], "--epoch: unknown option; overrides are written key=value: epochs=3"),
        (["--method", "dkd"], "--method: unknown option; overrides are written key=value: method=dkd"),
        (["--resume"], "--resume: unknown option; the same command continues an interrupted run"),
        (["--pretrained"], "--pretrained: unknown option; use teacher.weights or student.start.weights"),
        (["--foo"], "--foo: unknown option; overrides are written key=value; --help lists the options"),
        (["-x"], "-x: unknown option; overrides are written key=value; --help lists the options"),
    ],
)
def test_an_option_is_answered_with_the_override(args: list[str], message: str):
    for parse in (parse_recipe_args, lambda words: split_command_args(words, ("weights",))):
        with pytest.raises(RecipeError) as caught:
            parse(args)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_colon_without_a_space_is_pointed_out(recipe: Path):
    message = "command line: data.size:32: unknown key; YAML needs a space after the colon: {size: 32}"
    assert refused(recipe, "data={size:32}") == message
    assert load_recipe(recipe, ["losses={'mine.losses:Margin': null}"]).recipe == load_recipe(recipe).recipe
