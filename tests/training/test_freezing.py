"""What is frozen stays bit for bit, the rest trains as it would alone, on any number of ranks and over a resume."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import training_on_ranks
import yaml
from gloo_ranks import Ranks
from methods import losses_of
from resolved import run_of
from safetensors.torch import load_file
from tiny_runs import DATA, STRATEGY
from torch import Tensor

from pipeline.builders.meta import image_flops
from pipeline.builders.student import build_student, student_spec
from pipeline.builders.summary import summarize
from pipeline.config.recipe import load_recipe
from pipeline.errors import RecipeError
from pipeline.models import create_model

Train = Callable[..., None]
FROZEN = ("conv1.", "bn1.", "layer1.")
FREEZE = 'student.freeze=[conv1, bn1, "layer1.*"]'
RATES = 'optimizer.rates={"fc.*": 10.0}'


@pytest.fixture
def place(recipes: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of ``ce.yaml``, and of ``plain.yaml``, of a network without BatchNorm in float64."""
    monkeypatch.chdir(recipes)
    path = yaml.safe_load(Path("ce.yaml").read_text())["data"]["path"]
    data = {**DATA, "path": path, "loader": "memory", "crop": "pad", "size": 24}
    student = {"model": {"path": "witness:plain", "stages": {"last": "1"}}, "freeze": ["0"]}
    optimizer = {**STRATEGY["optimizer"], "rates": {"3.weight": 10.0}}
    own = {**STRATEGY, "optimizer": optimizer, "data": data, "student": student, "losses": {"ce": {}}}
    Path("plain.yaml").write_text(yaml.safe_dump({**own, "folder": "runs/plain"}))
    return recipes


def initial(path: str, *words: str) -> dict[str, Tensor]:
    run = run_of(path, words)
    return dict(build_student(student_spec(run.recipe.student, frozenset()), 20, run.recipe.seed).model.state_dict())


def trained(folder: str, name: str = "student") -> dict[str, Tensor]:
    return load_file(f"{folder}/{name}.safetensors")


def assert_frozen(weights: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    for key, value in weights.items():
        if key.startswith(FROZEN):
            assert torch.equal(value, before[key]), key
    moved = [key for key, value in weights.items() if not torch.equal(value, before[key])]
    assert {"layer2.0.conv1.weight", "layer2.0.bn1.running_mean", "fc.weight"} <= {*moved}


def test_frozen_parameters_and_statistics_stay_bit_for_bit_and_the_others_train(run_train: Train, place: Path):
    run_train("ce.yaml", FREEZE, "epochs=1", "ema={decay: 0.5}", "folder=runs/frozen")
    before = initial("ce.yaml", FREEZE)
    assert_frozen(trained("runs/frozen"), before)
    assert_frozen(trained("runs/frozen", "student_ema"), before)
    state = torch.load("runs/frozen/checkpoints/step-5/optimizer.pt")
    trainable = [key for key in before if not key.startswith(FROZEN) and "running" not in key and "num_" not in key]
    assert len(state["state"]) == len(trainable)  # a momentum for each that trains, and no other


def test_a_frozen_run_that_stopped_goes_on_with_the_same_bytes(run_train: Train, place: Path):
    words = ("ce.yaml", FREEZE, RATES, "epochs=1")
    run_train(*words, "folder=runs/whole")
    run_train(*words, "folder=runs/parts", "stop.steps=2")
    run_train(*words, "folder=runs/parts")
    whole, parts = trained("runs/whole"), trained("runs/parts")
    assert all(torch.equal(value, parts[key]) for key, value in whole.items())


def test_frozen_statistics_stay_on_several_ranks(place: Path, several_ranks: Ranks):
    words = ["ce.yaml", FREEZE, RATES, "epochs=1", "folder=runs/ranks"]
    several_ranks(training_on_ranks.train, place, words, timeout=250)
    assert_frozen(trained("runs/ranks"), initial("ce.yaml", FREEZE))


def test_ranks_compute_what_one_process_does_and_go_on_on_others(
    place: Path, ranks: Ranks, three_ranks: Ranks, run_train: Train
):
    run_train("plain.yaml")
    one, before = trained("runs/plain"), initial("plain.yaml")
    assert torch.equal(one["0.weight"], before["0.weight"])
    assert not torch.equal(one["3.weight"], before["3.weight"])
    ranks(training_on_ranks.train, place, ["plain.yaml", "folder=runs/two", "stop.steps=3"], timeout=250)
    shutil.copytree("runs/two", "runs/three")
    for name, among in {"two": ranks, "three": three_ranks}.items():
        among(training_on_ranks.train, place, ["plain.yaml", f"folder=runs/{name}"], timeout=250)
        for key, value in trained(f"runs/{name}").items():
            torch.testing.assert_close(value, one[key], rtol=0, atol=1e-11)


def test_a_multiplier_makes_a_first_step_that_much_longer(run_train: Train, place: Path):
    words = ("plain.yaml", "epochs=1", "optimizer.weight_decay=0", "schedule.warmup_epochs=0", "stop.steps=1")
    before, steps = initial("plain.yaml"), {}
    for name, more in {"ten": [], "one": ["optimizer.rates=null"]}.items():
        run_train(*words, f"folder=runs/{name}", *more)
        weights = load_file(f"runs/{name}/checkpoints/step-1/distiller.safetensors")
        steps[name] = {key: weights[f"student.model.{key}"] - value for key, value in before.items()}
    torch.testing.assert_close(steps["ten"]["3.weight"], 10 * steps["one"]["3.weight"], rtol=1e-6, atol=1e-12)
    assert torch.equal(steps["ten"]["3.bias"], steps["one"]["3.bias"])
    assert steps["one"]["3.weight"].abs().max() > 1e-4


def test_the_mode_of_the_frozen_norms_is_not_that_of_training():
    student = student_spec(load_recipe("configs/demo.yaml", [FREEZE]).recipe.student, frozenset()).build(5).train()
    modes = {path: module.training for path, module in student.model.named_modules() if "bn" in path}
    assert {path for path, training in modes.items() if not training} == {
        path for path in modes if path.startswith(("bn1", "layer1."))
    }
    assert student.model.get_submodule("layer1").training
    assert not any(module.training for module in student.eval().modules())


def test_frozen_layers_have_no_backward(place: Path):
    plain, frozen = (image_flops(load_recipe("ce.yaml", words).recipe) for words in ([], [FREEZE]))
    assert plain is not None
    assert frozen is not None
    assert frozen < 0.8 * plain


def test_both_are_part_of_a_run_only_if_they_are_given(place: Path):
    plain, frozen = run_of("ce.yaml"), run_of("ce.yaml", [FREEZE, RATES])
    assert plain.identity == run_of("ce.yaml", ["student.freeze=[]"]).identity
    assert "freeze" not in plain.identity["student"]
    assert "rates" not in plain.identity["optimizer"]
    assert frozen.identity["student"]["freeze"] == ["conv1", "bn1", "layer1.*"]
    assert frozen.identity["optimizer"]["rates"] == {"fc.*": 10.0}


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (
            "student.freeze=[layer9]",
            "student.freeze: 'layer9' is the name or path of no parameter; did you mean 'layer",
        ),
        ('student.freeze=["*"]', "student.freeze: every parameter of the network is frozen; leave some to train"),
        ('optimizer.rates={"head.*": 3.0}', r"optimizer.rates: 'head\.\*' is the name or path of no parameter that tr"),
        (
            'optimizer.rates={"fc": 3.0, "fc.*": 2.0}',
            r"optimizer.rates: 'fc' and 'fc\.\*' are both for fc.weight;",
        ),
        ('optimizer.rates={"fc": 0.0}', "optimizer.rates.fc: .*greater than 0"),
    ],
)
def test_a_pattern_for_nothing_ends_in_one_line(run_train: Train, place: Path, word: str, message: str):
    for command in (lambda: summarize(load_recipe("ce.yaml", [word])), lambda: run_train("ce.yaml", word)):
        with pytest.raises(RecipeError, match=message) as caught:
            command()
        assert "\n" not in str(caught.value)
    assert not Path("runs/ce/identity.json").exists()


def test_losses_of_frozen_features_alone_end_in_one_line(run_train: Train, place: Path):
    torch.save(create_model("cifar_resnet8", 20).state_dict(), "w.pt")
    losses = f"losses={json.dumps({'ce': None, 'rkd': losses_of('rkd')['rkd']})}"
    teacher = "teacher={model: cifar_resnet8, weights: w.pt}"
    with pytest.raises(RecipeError, match=r"^losses: none depends on a parameter that trains; [^\n]*$"):
        run_train("ce.yaml", losses, teacher, 'student.freeze=[conv1, bn1, "layer*"]', "folder=runs/nothing")
