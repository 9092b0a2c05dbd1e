"""The same recipe and the same loop under ZeRO-1, 2 and 3 as under DDP, on two gloo ranks."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoints import without_digests
from gloo_ranks import Ranks
from methods import losses_of
from safetensors.torch import load_file
from torch import Tensor
from training_rank import Training, trained

from pipeline.config.recipe import Recipe, load_recipe
from pipeline.distributed.launcher import read_launch
from pipeline.errors import RecipeError
from pipeline.training import zero
from pipeline.training.journal import trace
from shards.documents import DamagedFile

ROOT = Path(__file__).resolve().parents[2]
STAGES = (1, 2, 3)
ALONE = {**os.environ, "OMP_NUM_THREADS": "1"}
missing = [name for name in ("deepspeed", "transformers") if importlib.util.find_spec(name) is None]
needs_deepspeed = pytest.mark.skipif(bool(missing), reason="needs the extra deepspeed")

ROUNDING = 1e-4
"""Largest difference to DDP, relative. ZeRO-3 adds the parts of a gradient in another order, and so does accumulation;
weights lie elsewhere in memory, where convolutions may round otherwise. Without either ZeRO-1 and 2 were bit-equal."""
ROUNDING_OF_ADAM = 1e-3
"""The same of Adam's steps under ZeRO-3. They divide by the size of a gradient, and so enlarge what a small one lost;
ten steps change weights by a hundredth."""


def on_ranks(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that trains on two ranks."""
    return pytest.mark.endurance(needs_deepspeed(test))


class Place:
    """A folder with recipes, and two ranks of its own, since one that knew DeepSpeed is not as it was."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ranks = Ranks(folder)
        self.settings = {stage: str(ROOT / "launchers" / "deepspeed" / f"zero{stage}.json") for stage in (1, 2)}
        # The one that is shipped would leave each weight of so small a network whole.
        self.settings[3] = str(folder / "zero3.json")
        torn = {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 4000}
        Path(self.settings[3]).write_text(json.dumps({"zero_optimization": torn}))
        for name, recipe in RECIPES.items():
            own = {"base": "base.yaml", "folder": f"runs/{name}"} if name != "base" else {}
            (folder / f"{name}.yaml").write_text(yaml.safe_dump({**own, **recipe}))

    def train(self, run: str, *words: str, stage: int | None = None) -> list[Training]:
        """Train in ``runs/<run>`` under ZeRO of that stage, or under DDP, and return what every rank has then."""
        settings = self.settings[stage] if stage else None
        return self.ranks(trained, self.folder, [*words, f"folder=runs/{run}"], settings, timeout=250)


def method(name: str) -> dict[str, Any]:
    return losses_of(name)


DATA = {
    "path": "shards",
    "prepare": ["shards/prepare_demo.py", "--train", "60", "--val", "20", "--size", "24", "--jobs", "1"],
    "size": 16,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
    # Rows, as ZeRO lays weights out: convolutions of another layout round otherwise.
    "channels_last": False,
}
ACCUMULATED = ("accumulation=2", "clip=1.0")
PARTLY = ('student.freeze=[conv1, bn1, "layer1.*"]', 'optimizer.rates={"fc.*": 10.0}')
DISTILLED = {"student": {"model": "cifar_resnet8"}, "teacher": {"recipe": "teacher.yaml"}}
COMPILED = [
    "teacher={model: cifar_resnet20, weights: w.pt}",
    f"losses={json.dumps(method('ddkd'))}",
    "losses.ddkd.diffusion.compile=true",
]
SNAPSHOTS = ["teacher.snapshots.cycles=5", "losses.soft_ce={teacher_temperature: 3.0, ramp: {from: 1}}"]
CRCD = [COMPILED[0], f"losses={json.dumps(method('crcd'))}"]
RECIPES: dict[str, Any] = {
    "base": {
        "student": {"model": "cifar_resnet8"},
        "losses": {"ce": {}},
        "data": DATA,
        "epochs": 5,
        "batch": 24,
        "optimizer": {"momentum": 0.9, "weight_decay": 5e-4},
        "schedule": {"kind": "cosine", "rate": 0.01, "warmup_epochs": 0.5},
        "journal": {"every_steps": 1, "trackers": []},
    },
    "teacher": {"student": {"model": "cifar_resnet20"}, "epochs": 1},
    # A connector for each stage, and variances that no weight decay may touch.
    "vid": {**DISTILLED, "losses": method("vid")},
    "ddkd": {**DISTILLED, "losses": method("ddkd")},
    # Of the features alone: the student's head learns nothing.
    "headless": {**DISTILLED, "losses": {"ce": None, "fitnet": method("fitnet")["fitnet"]}},
    "bursting": {"losses": {"training_rank:Bursting": {}}},
    # Teachers that move with the run, and a student of which one stage trains.
    "anchors": {"student": {"model": "cifar_resnet20"}, "epochs": 2, "checkpoints": {"export_epochs": [1, 2]}},
    "route": {
        "teacher": {"recipe": "anchors.yaml", "route": {"epochs": [1, 2], "each": 2}},
        "losses": {"kd": method("kd")["kd"]},
    },
    "snapshots": {
        "teacher": {"snapshots": {"cycles": 5}},
        "losses": {"soft_ce": {"teacher_temperature": 3.0, "ramp": {"from": 1}}},
    },
    "stage": {
        "student": {"model": "cifar_resnet8", "train": ["stage2"]},
        "teacher": {"recipe": "teacher.yaml"},
        "losses": {"ce": None, "stage_mse": {"stages": ["stage2"]}},
    },
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    place = Place(tmp_path_factory.mktemp("zero"))
    for name in ("teacher.yaml", "anchors.yaml"):
        command = [sys.executable, str(ROOT / "pipeline" / "train.py"), name]
        subprocess.run(command, cwd=place.folder, check=True, env=ALONE)
    yield place
    place.ranks.kill()


@pytest.fixture(scope="module")
def by_ddp(place: Place) -> list[Training]:
    """Ten steps under DDP."""
    return place.train("ddp", "vid.yaml")


@pytest.fixture(scope="module")
def accumulated_by_ddp(place: Place) -> list[Training]:
    """Ten steps under DDP, of two micro-batches each."""
    return place.train("accumulated", "vid.yaml", *ACCUMULATED)


@pytest.fixture(scope="module")
def partly_by_ddp(place: Place) -> list[Training]:
    """Ten steps under DDP, in which some parameters do not train and others faster."""
    return place.train("partly", "vid.yaml", *PARTLY)


@pytest.fixture(scope="module", params=STAGES, ids="zero{}".format)
def stage(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="module")
def by_zero(place: Place, stage: int) -> list[Training]:
    """The same ten steps under ZeRO."""
    return place.train(f"zero-{stage}", "vid.yaml", stage=stage)


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Return the largest one of any two values, relative to the largest value of their tensor."""
    assert one.keys() == other.keys()
    return max(float((x - other[name]).abs().max() / x.abs().max().clamp(min=1e-3)) for name, x in one.items())


@on_ranks
def test_ten_steps_under_zero_are_those_under_ddp(
    place: Place, stage: int, by_ddp: list[Training], by_zero: list[Training]
):
    for ddp, under_zero in zip(by_ddp, by_zero, strict=True):
        assert largest_difference(ddp.weights, under_zero.weights) < ROUNDING
    one, other = place.folder / "runs" / "ddp", place.folder / "runs" / f"zero-{stage}"
    for name in ("student.safetensors", "student_best.safetensors"):
        assert largest_difference(load_file(one / name), load_file(other / name)) < ROUNDING
    results = [json.loads((folder / "result.json").read_text()) for folder in (one, other)]
    for key in ("top1", "top5", "best_top1", "best_epoch", "parameters"):
        assert results[0][key] == results[1][key]
    for a, b in zip(trace(one / "journal.jsonl"), trace(other / "journal.jsonl"), strict=True):
        assert a == pytest.approx(b, rel=1e-5)


@on_ranks
def test_a_checkpoint_goes_on_bit_for_bit(place: Place, stage: int, by_zero: list[Training]):
    run = f"parts-{stage}"
    place.train(run, "vid.yaml", "stop.steps=3", "checkpoints.keep=1", stage=stage)
    place.train(run, "vid.yaml", "stop.steps=5", "checkpoints.keep=1", stage=stage)
    checkpoints = place.folder / "runs" / run / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step-5"]
    assert json.loads((checkpoints / "step-5" / "state.json").read_text())["format"] == f"zero-{stage}"
    for whole, parts in zip(by_zero, place.train(run, "vid.yaml", stage=stage), strict=True):
        assert parts.error is None
        assert largest_difference(whole.weights, parts.weights) == 0
    one, other = place.folder / "runs" / f"zero-{stage}", place.folder / "runs" / run
    assert trace(one / "journal.jsonl") == trace(other / "journal.jsonl")
    for name in ("student.safetensors", "student_best.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


@on_ranks
def test_frozen_parameters_and_rates_are_those_of_ddp_also_over_a_stop(
    place: Place, stage: int, partly_by_ddp: list[Training]
):
    run = f"partly-{stage}"
    place.train(run, "vid.yaml", *PARTLY, "stop.steps=3", stage=stage)
    under_zero = place.train(run, "vid.yaml", *PARTLY, stage=stage)
    assert [training.error for training in under_zero] == [None, None]
    assert largest_difference(partly_by_ddp[1].weights, under_zero[1].weights) < ROUNDING


@on_ranks
@pytest.mark.parametrize("kind", ["adamw", "adam"])
def test_adam_and_adamw_are_those_of_ddp_also_over_a_stop(place: Place, stage: int, kind: str):
    optimizer = {"kind": kind, "momentum": None, "weight_decay": 0.05, "decay_norms_and_biases": False}
    words = ("vid.yaml", f"optimizer={json.dumps(optimizer)}", "schedule.rate=0.001")
    ddp = place.train(f"{kind}-ddp-{stage}", *words)
    whole = place.train(f"{kind}-{stage}", *words, stage=stage)
    place.train(f"{kind}-parts-{stage}", *words, "stop.steps=3", stage=stage)
    parts = place.train(f"{kind}-parts-{stage}", *words, stage=stage)
    assert [training.error for training in (*whole, *parts)] == [None] * 4
    rounding = ROUNDING_OF_ADAM if stage == 3 else ROUNDING
    for rank in (0, 1):
        assert largest_difference(ddp[rank].weights, whole[rank].weights) < rounding
        assert largest_difference(whole[rank].weights, parts[rank].weights) == 0


@on_ranks
@pytest.mark.parametrize("recipe", ["route", "snapshots", "stage"])
@pytest.mark.parametrize("stage", [1, 2], ids="zero{}".format)
def test_moving_teachers_and_stages_alone_are_those_of_ddp_also_over_a_stop(place: Place, stage: int, recipe: str):
    runs = [f"{recipe}-{way}-{stage}" for way in ("ddp", "whole", "parts")]
    ddp = place.train(runs[0], f"{recipe}.yaml")
    whole = place.train(runs[1], f"{recipe}.yaml", stage=stage)
    place.train(runs[2], f"{recipe}.yaml", "stop.steps=5", stage=stage)  # within the second anchor and third cycle
    parts = place.train(runs[2], f"{recipe}.yaml", stage=stage)
    assert [training.error for training in (*ddp, *whole, *parts)] == [None] * 6
    for rank in (0, 1):
        assert largest_difference(ddp[rank].weights, whole[rank].weights) < ROUNDING
        assert largest_difference(whole[rank].weights, parts[rank].weights) == 0
    lines = [trace(place.folder / "runs" / name / "journal.jsonl") for name in runs]
    assert lines[1] == lines[2]
    for a, b in zip(*lines[:2], strict=True):
        assert a == pytest.approx(b, rel=1e-5)


@on_ranks
def test_micro_batches_and_clipping_scale_the_gradient_as_under_ddp(
    place: Place, stage: int, accumulated_by_ddp: list[Training]
):
    under_zero = place.train(f"accumulated-{stage}", "vid.yaml", *ACCUMULATED, stage=stage)
    assert largest_difference(accumulated_by_ddp[1].weights, under_zero[1].weights) < ROUNDING


@on_ranks
def test_bf16_and_a_moving_average_are_those_of_ddp(place: Place):
    words = ("ddkd.yaml", "precision=bf16", "ema.decay=0.9", "stop.steps=10")
    ddp, under_zero = place.train("averaged", *words), place.train("averaged-2", *words, stage=2)
    assert largest_difference(ddp[0].weights, under_zero[0].weights) < 1e-3  # a bf16 number has three digits
    folders = [place.folder / "runs" / name for name in ("averaged", "averaged-2")]
    exported = [load_file(folder / "student_ema.safetensors") for folder in folders]
    assert largest_difference(*exported) < 1e-3
    assert json.loads((folders[1] / "result.json").read_text())["ema_top1"] is not None


@on_ranks
def test_a_head_that_learns_nothing_holds_nobody_up(place: Place, stage: int):
    words = ("headless.yaml", "optimizer.weight_decay=0", "stop.steps=3")
    for options in ((), ("accumulation=2",)):
        run = f"headless{len(options)}"
        ddp, under_zero = (
            place.train(run, *words, *options),
            place.train(f"{run}-{stage}", *words, *options, stage=stage),
        )
        assert under_zero[0].error is None
        assert largest_difference(ddp[0].weights, under_zero[0].weights) < ROUNDING


@on_ranks
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_gradient_that_is_not_finite_touches_no_weight_of_any_rank(place: Place, stage: int, kind: str):
    words = ("bursting.yaml", "checkpoints.every_steps=1", "journal.every_steps=50")
    words += () if kind == "sgd" else (f"optimizer={{kind: {kind}, momentum: null}}",)
    before = place.train(f"bursting-{stage}-{kind}", *words, "stop.steps=2", stage=stage)
    after = place.train(f"burst-{stage}-{kind}", *words, stage=stage)
    for rank in (0, 1):
        assert after[rank].error == (
            "the gradient became NaN or inf at step 3; the update was skipped; "
            "lower schedule.rate, or set precision: fp32"
        )
        learned = [name for name in before[rank].weights if "running" not in name and "tracked" not in name]
        assert all(torch.equal(before[rank].weights[name], after[rank].weights[name]) for name in learned)
    steps = (place.folder / "runs" / f"burst-{stage}-{kind}" / "checkpoints").iterdir()
    assert sorted(path.name for path in steps) == ["step-1", "step-2"]


@on_ranks
def test_another_number_of_ranks_or_another_format_is_refused_in_one_line(place: Place):
    assert place.train("refused", "vid.yaml", "stop.steps=1", stage=2)[0].error is None
    checkpoint = place.folder / "runs" / "refused" / "checkpoints" / "step-1"
    for stage, own in ((None, "ddp"), (1, "zero-1"), (3, "zero-3")):
        told = f"its format is zero-2 and this run's is {own}; start with the same DeepSpeed settings as before"
        for rank in place.train("refused", "vid.yaml", stage=stage):
            assert rank.error == f"runs/refused/checkpoints/step-1: {told}"
    without_digests(checkpoint, world_size=4)
    told = "its format is zero-2, which 4 ranks wrote and 2 ranks cannot read; start 4 ranks"
    assert place.train("refused", "vid.yaml", stage=2)[1].error == f"runs/refused/checkpoints/step-1: {told}"


class Canary:
    """An object that, unpickled, leaves a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@on_ranks
@pytest.mark.parametrize(("kind", "zipped"), [("optim_states", True), ("model_states", False)])
def test_nothing_in_deepspeeds_files_is_executed(place: Place, stage: int, kind: str, zipped: bool):
    run, words = f"canary-{stage}-{kind}-{zipped}", ("base.yaml", "checkpoints.every_steps=1")
    assert place.train(run, *words, "stop.steps=2", stage=stage)[0].error is None
    checkpoint = place.folder / "runs" / run / "checkpoints" / "step-2"
    without_digests(checkpoint)
    for path in (checkpoint / "zero").glob(f"*{kind}.pt"):
        whole = torch.load(path, weights_only=False)
        torch.save({**whole, "bird": Canary(place.folder / "hatched")}, path, _use_new_zipfile_serialization=zipped)
    told = "it would call posix.mkdir, which is not data); move runs/"
    for rank in place.train(run, *words, stage=stage):
        assert rank.error is not None
        assert told in rank.error
        assert rank.error.endswith("/step-2 away, and the run continues from step-1")
    assert not (place.folder / "hatched").exists()
    checkpoint.rename(checkpoint.with_name("step-2.damaged"))
    assert place.train(run, *words, "stop.steps=3", stage=stage)[0].error is None


@on_ranks
def test_a_damaged_file_of_one_rank_is_told_by_all(place: Place, stage: int):
    run, words = f"damaged-{stage}", ("base.yaml", "checkpoints.every_steps=1")
    assert place.train(run, *words, "stop.steps=2", stage=stage)[0].error is None
    path = place.folder / "runs" / run / "checkpoints" / "step-2" / "zero" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    os.truncate(path, path.stat().st_size - 1)
    one, other = (rank.error for rank in place.train(run, *words, stage=stage))
    assert one is not None
    assert f"{path.name}: is missing or was changed" in one
    assert one == other


@on_ranks
def test_accelerates_launcher_starts_what_its_file_says(place: Place):
    file = str(ROOT / "launchers" / "accelerate" / "zero3.yaml")
    accelerate = [str(Path(sys.executable).parent / "accelerate"), "launch", "--config_file", file]
    words = [str(ROOT / "pipeline" / "train.py"), "base.yaml", "epochs=1", "folder=runs/launched"]
    done = subprocess.run(
        [*accelerate, "--num_processes", "2", "--main_process_port", "0", *words],
        cwd=place.folder,
        env=ALONE,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    state = place.folder / "runs" / "launched" / "checkpoints" / "step-2" / "state.json"
    assert json.loads(state.read_text())["format"] == "zero-3"


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Recipe]:
    """``recipe("batch=48")`` is a recipe with that override."""
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(RECIPES["base"]))
    return lambda *words: load_recipe(tmp_path / "base.yaml", words).recipe


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``settings(stage=2, …)`` is what the launcher's file says."""

    def write(stage: int = 2, **more: Any) -> None:
        (tmp_path / "own.json").write_text(json.dumps({"zero_optimization": {"stage": stage}, **more}))

    monkeypatch.setenv(zero._SETTINGS_VARIABLE, str(tmp_path / "own.json"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    return write


def test_batch_accumulation_clipping_and_precision_are_the_recipes(recipe, settings):
    settings(stage=1, train_batch_size="auto", gradient_clipping=0.5, steps_per_print=10)
    found = zero.settings(recipe("accumulation=3", "clip=0.5", "precision=bf16"), read_launch())
    batches = [
        found[key] for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    ]
    assert batches == [24, 4, 3]
    assert (found["gradient_clipping"], found["steps_per_print"]) == (0.5, 10)
    assert found["torch_autocast"]["enabled"]
    assert not found["bf16"]["enabled"]
    assert found["zero_optimization"] == {"stage": 1}


@pytest.mark.parametrize(
    ("given", "words", "told"),
    [
        ({"train_batch_size": 32}, [], "train_batch_size: 32 here and 24 by the recipe; remove it, the recipe sets it"),
        ({"gradient_accumulation_steps": 2}, [], "gradient_accumulation_steps: 2 here and 1 by the recipe"),
        ({"bf16": {"enabled": True}}, [], "bf16: "),
        ({"optimizer": {"type": "Adam"}}, [], "optimizer: remove it, the recipe sets it"),
        ({"stage": 0}, [], "zero_optimization.stage: expected 1, 2 or 3, got 0"),
        ({}, ["compress=auxiliary"], "compress: DeepSpeed sends the gradients itself, in float32; remove the key"),
        (
            {},
            ["optimizer={kind: rmsprop, momentum: null}"],
            "optimizer.kind: rmsprop is not supported under DeepSpeed, which steps on parts",
        ),
        ({}, ["precision=fp16"], "precision: fp16 is not supported under DeepSpeed; give precision=bf16"),
        (
            {"stage": 3},
            ["student.compile=true"],
            "student.compile: under ZeRO-3 the weights are partitioned, so torch cannot compile",
        ),
        (
            {"stage": 3},
            COMPILED,
            "losses.ddkd.diffusion.compile: under ZeRO-3 the weights are partitioned",
        ),
        (
            {"stage": 3},
            ["ema.decay=0.9"],
            "ema: under ZeRO-3 no rank has all weights to copy; use zero2.json",
        ),
        (
            {"stage": 3},
            ["student.checkpoint=true"],
            "student.checkpoint: under ZeRO-3 the weights are partitioned; use",
        ),
        ({"stage": 3}, CRCD, "losses.crcd: under ZeRO-3 no rank has all weights of the head; use zero2.json"),
        ({}, ["student.peers=2"], "student.peers: networks that train together were not tried under DeepSpeed"),
        ({"stage": 3}, ["teacher.average.decay=0.9"], "teacher.average: under ZeRO-3 no rank has all weights"),
        ({"stage": 3}, SNAPSHOTS, "teacher.snapshots: under ZeRO-3 no rank has all weights"),
        ({"stage": 3}, ["student.train=[head]"], "student.train: stages alone are not trained under ZeRO-3; use"),
    ],
    ids=lambda value: None,
)
def test_what_disagrees_or_is_not_done_is_refused_in_one_line(recipe, settings, given, words, told):
    settings(**given)
    with pytest.raises(RecipeError) as raised:
        zero.settings(recipe(*words), read_launch())
    assert told in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_that_is_not_there_and_one_that_is_no_json_are_named(recipe, tmp_path, monkeypatch):
    monkeypatch.delenv(zero._SETTINGS_VARIABLE, raising=False)
    with pytest.raises(RecipeError, match=f"{zero._SETTINGS_VARIABLE}: DeepSpeed is enabled without settings"):
        zero.settings(recipe(), read_launch())
    monkeypatch.setenv(zero._SETTINGS_VARIABLE, "absent.json")
    with pytest.raises(RecipeError, match=f"{zero._SETTINGS_VARIABLE}: there is no file absent.json"):
        zero.settings(recipe(), read_launch())
    (tmp_path / "own.json").write_text("{stage: 2}")
    monkeypatch.setenv(zero._SETTINGS_VARIABLE, str(tmp_path / "own.json"))
    with pytest.raises(DamagedFile, match=r"own\.json: Invalid JSON: .*; it is a mapping of DeepSpeed's settings"):
        zero.settings(recipe(), read_launch())


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[]", "own.json: Input should be an object; it is a mapping of DeepSpeed's settings"),
        ("null", "own.json: Input should be an object"),
        ('{"zero_optimization": 2}', 'own.json: zero_optimization: expected a mapping such as {"stage": 2}, got 2'),
        ('{"zero_optimization": [1]}', "own.json: zero_optimization: expected a mapping"),
        ('{"zero_optimization": {"stage": [2]}}', "own.json: zero_optimization.stage: expected 1, 2 or 3, got [2]"),
        ('{"zero_optimization": {"stage": true}}', "own.json: zero_optimization.stage: expected 1, 2 or 3, got True"),
        ("{}", "own.json: zero_optimization.stage: expected 1, 2 or 3, got None"),
    ],
)
def test_settings_of_another_shape_are_refused_in_one_line(recipe, tmp_path, monkeypatch, content: str, told: str):
    (tmp_path / "own.json").write_text(content)
    monkeypatch.setenv(zero._SETTINGS_VARIABLE, str(tmp_path / "own.json"))
    with pytest.raises((RecipeError, DamagedFile)) as raised:
        zero.settings(recipe(), read_launch())
    assert told in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("stage", STAGES)
def test_the_settings_that_are_shipped_are_found_from_anywhere(recipe, tmp_path, monkeypatch, stage: int):
    monkeypatch.chdir(tmp_path)
    shipped = yaml.safe_load((ROOT / "launchers" / "accelerate" / f"zero{stage}.yaml").read_text())
    monkeypatch.setenv(zero._SETTINGS_VARIABLE, shipped["deepspeed_config"]["deepspeed_config_file"])
    assert zero.settings(recipe(), read_launch())["zero_optimization"]["stage"] == stage


@needs_deepspeed
def test_deepspeed_without_ranks_or_turned_off_is_refused_in_one_line(recipe, settings, monkeypatch):
    settings()
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(RecipeError, match="without ranks; start them with torchrun"):
        zero.create_plugin(recipe(), read_launch())
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(RecipeError, match="ACCELERATE_USE_CPU turns DeepSpeed off"):
        zero.create_plugin(recipe(), read_launch())
