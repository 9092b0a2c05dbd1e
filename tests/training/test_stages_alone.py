"""Stages that train alone: what belongs to them, that all else stays bit for bit, and students in several stages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import training_on_ranks
import yaml
from gloo_ranks import Ranks
from resolved import run_of
from safetensors.torch import load_file
from tiny_runs import DATA, STRATEGY
from torch import Tensor

from pipeline.builders.meta import image_flops
from pipeline.builders.student import build_student, student_spec
from pipeline.builders.summary import summarize
from pipeline.config.recipe import load_recipe
from pipeline.errors import RecipeError
from pipeline.features.stagewise import stages_of_modules, train_stages
from pipeline.features.taps import FeatureTaps
from pipeline.models import create_model
from pipeline.models.stages import stages
from pipeline.training.journal import trace

Train = Callable[..., None]


def network_of(name: str) -> FeatureTaps:
    with torch.device("meta"):
        model = create_model(name, 10)
    return FeatureTaps(model, stages(model), ())


MEMBERS = {
    ("cifar_resnet8", 32): {"conv1": "stem", "bn1": "stem", "layer2.0.bn2": "stage2", "layer3.0.conv1": "stage3"},
    # A stage's last BatchNorm and activation are in the block after it, or after the last block.
    ("cifar_wrn_16_2", 32): {
        "layer1.0.bn1": "stem",
        "layer2.0.bn1": "stage1",
        "layer2.0.conv1": "stage2",
        "bn1": "stage3",
    },
    ("resnet18", 64): {"bn1": "stem", "layer1.1.bn2": "stage1", "layer4.0.conv1": "stage4", "fc": "head"},
    # Its stages are no modules of their own.
    ("vgg11_bn", 64): {"features.0": "stem", "features.4": "stage1", "features.26": "stage4", "classifier.0": "head"},
    # A projection that attention computes with, and never calls.
    ("vit_b_16", 224): {
        **{"": "stem", "conv_proj": "stem", "encoder": "stage1", "encoder.ln": "stage4", "heads.head": "head"},
        "encoder.layers.encoder_layer_4.self_attention.out_proj": "stage2",
    },
    # An auxiliary head, which runs only where it is tapped.
    ("deeplabv3_resnet18", 64): {"backbone.layer4.1.bn2": "stage4", "classifier.4": "head", "aux_classifier.0": "head"},
}


@pytest.mark.parametrize(
    ("network", "members"), MEMBERS.items(), ids=lambda value: value[0] if type(value) is tuple else ""
)
def test_a_module_belongs_to_the_stage_that_is_computed_next(network: tuple[str, int], members: dict[str, str]):
    found, known = stages_of_modules(network_of(network[0]), network[1])
    assert {path: found[path] for path in members} == members
    assert known[0] == "stem"
    assert known[1:] == [*sorted({*found.values()} - {"stem", "head"}), "head"]


def test_the_norms_of_the_other_stages_are_never_in_training_mode():
    student = network_of("cifar_wrn_16_2")
    train_stages(student, ["stage2"], 32)
    modes = {path: module.training for path, module in student.train().model.named_modules() if "bn" in path}
    of_stage = {"layer2.0.bn2", "layer2.1.bn1", "layer2.1.bn2", "layer3.0.bn1"}
    assert {path for path, training in modes.items() if training} == of_stage
    trained = {name.rpartition(".")[0] for name, x in student.model.named_parameters() if x.requires_grad}
    assert trained == of_stage | {
        f"layer2.{conv}" for conv in ("0.conv1", "0.conv2", "0.shortcut", "1.conv1", "1.conv2")
    }
    assert not any(module.training for module in student.eval().modules())


@pytest.fixture
def place(recipes: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of ``first.yaml``, ``second.yaml`` and ``head.yaml``: two stages after a teacher's, and the head."""
    monkeypatch.chdir(recipes)
    base = {"base": "ce.yaml", "epochs": 1, "checkpoints": {"keep": 9}}
    write("teacher.yaml", {**base, "folder": "runs/teacher"})
    write("first.yaml", {**base, **stage(1, train=["stem", "stage1"])})
    write("second.yaml", {**base, **stage(2, train=["stage2"], start={"recipe": "first.yaml"})})
    head = {"train": ["head"], "start": {"recipe": "second.yaml"}}
    write("head.yaml", {**base, "student": head, "folder": "runs/head"})
    return recipes


def write(name: str, recipe: object) -> None:
    Path(name).write_text(yaml.safe_dump(recipe))


def stage(number: int, **student: object) -> dict[str, object]:
    """Return what a recipe of a student's stage has of its own."""
    losses = {"ce": None, "stage_mse": {"stages": [f"stage{number}"]}}
    folder = f"runs/{('first', 'second')[number - 1]}"
    return {"student": student, "teacher": {"recipe": "teacher.yaml"}, "losses": losses, "folder": folder}


def initial(path: str) -> dict[str, Tensor]:
    run = run_of(path)
    return dict(build_student(student_spec(run.recipe.student, frozenset()), 20, run.recipe.seed).model.state_dict())


def trained(name: str) -> dict[str, Tensor]:
    return load_file(f"runs/{name}/student.safetensors")


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Return the modules of the network of which a weight or a buffer changed."""
    return {name.partition(".")[0] for name, x in after.items() if not torch.equal(x, before[name])}


def test_each_run_of_a_chain_changes_its_own_stage_alone(run_train: Train, place: Path):
    run_train("head.yaml", "ema={decay: 0.5}")
    start, first, second, head = initial("first.yaml"), *map(trained, ("first", "second", "head"))
    assert moved(start, first) == {"conv1", "bn1", "layer1"}
    assert moved(first, second) == {"layer2"}
    assert moved(second, head) == {"fc"}
    assert moved(second, load_file("runs/head/student_ema.safetensors")) == {"fc"}
    assert not torch.equal(first["layer2.0.bn1.running_mean"], second["layer2.0.bn1.running_mean"])
    # The momentum of what trains, the connectors of the losses among it: equal widths need none.
    for name, count in {"first": 9, "second": 9, "head": 2}.items():
        assert len(torch.load(f"runs/{name}/checkpoints/step-5/optimizer.pt")["state"]) == count, name


def test_a_stage_that_stopped_goes_on_with_the_same_bytes(run_train: Train, place: Path):
    run_train("second.yaml")
    run_train("second.yaml", "folder=runs/parts", "stop.steps=2")
    run_train("second.yaml", "folder=runs/parts")
    assert trace(Path("runs/parts/journal.jsonl")) == trace(Path("runs/second/journal.jsonl"))
    whole, parts = (Path("runs", name, "student.safetensors") for name in ("second", "parts"))
    assert whole.read_bytes() == parts.read_bytes()


def test_two_ranks_train_a_stage_as_one_process_does(run_train: Train, place: Path, ranks: Ranks):
    path = yaml.safe_load(Path("ce.yaml").read_text())["data"]["path"]
    data = {**DATA, "path": path, "loader": "memory", "crop": "pad", "size": 24}
    student = {"model": {"path": "witness:plain", "stages": {"stage1": "1"}}}
    base = {**STRATEGY, "data": data, "student": student, "losses": {"ce": {}}, "epochs": 1}
    write("teacher.yaml", {**base, "seed": 1, "folder": "runs/teacher"})
    own = {**stage(1), "student": {**student, "train": ["stage1"]}, "losses": {"stage_mse": {"stages": ["stage1"]}}}
    write("first.yaml", {**base, **own, "folder": "runs/one"})
    run_train("first.yaml", "teacher.batch=6")
    ranks(training_on_ranks.train, place, ["first.yaml", "teacher.batch=6", "folder=runs/two"], timeout=250)
    one, two = trained("one"), trained("two")
    assert moved(initial("first.yaml"), two) == {"0"}
    for name, x in two.items():
        torch.testing.assert_close(x, one[name], rtol=0, atol=1e-11)


def test_frozen_stages_have_no_backward_and_are_part_of_a_run_only_if_they_are_given(place: Path):
    plain, alone = (image_flops(load_recipe("ce.yaml", words).recipe) for words in ([], ["student.train=[head]"]))
    assert plain is not None
    assert alone is not None
    assert alone < 0.5 * plain
    assert "train" not in run_of("ce.yaml").identity["student"]
    assert run_of("ce.yaml", ["student.train=[]"]).identity == run_of("ce.yaml").identity
    assert run_of("ce.yaml", ["student.train=[head]"]).identity["student"]["train"] == ["head"]


REFUSED = {
    "student.train=[stage9]": "'stage9' is no stage of this network; it has stem, stage1, stage2, stage3, head",
    "student.train=[head] student.freeze=[fc]": "student: train and freeze cannot be combined; remove one of them",
}


@pytest.mark.parametrize(("words", "message"), REFUSED.items())
def test_what_cannot_train_alone_is_refused_in_one_line(run_train: Train, place: Path, words: str, message: str):
    given = words.split()
    for command in (lambda: summarize(load_recipe("ce.yaml", given)), lambda: run_train("ce.yaml", *given)):
        with pytest.raises(RecipeError, match=message) as caught:
            command()
        assert "\n" not in str(caught.value)


def test_a_stage_without_parameters_is_refused():
    with pytest.raises(ValueError, match="no parameter is in stage1; add a stage that has some"):
        train_stages(network_of("alexnet"), ["stage1"], 96)
