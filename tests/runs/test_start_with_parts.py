"""A run whose student starts from some modules of another network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from resolved import run_of
from safetensors.torch import load_file
from torch import Tensor
from training_on_ranks import train

from pipeline.builders.student import build_student, load_start, student_spec
from pipeline.builders.summary import summarize
from pipeline.config.recipe import load_recipe
from pipeline.errors import RecipeError
from pipeline.models import create_model
from pipeline.runs.folder import check_folder
from pipeline.runs.identity import Run

STUDENT = "model: cifar_resnet8"


@pytest.fixture
def place(recipes: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of ``ce.yaml``, which is the current one, too."""
    monkeypatch.chdir(recipes)
    return recipes


def saved(name: str, model: str, classes: int = 20) -> dict[str, Tensor]:
    """Write weights of a network to a file, and return them."""
    torch.manual_seed(1)
    state = dict(create_model(model, classes).state_dict())
    torch.save(state, name)
    return state


def start_of(keys: str) -> list[str]:
    return [f"student={{{STUDENT}, start: {{{keys}}}}}"]


def initial(run: Run) -> dict[str, Tensor]:
    student = build_student(student_spec(run.recipe.student, frozenset()), 20, run.recipe.seed)
    load_start(run, student)
    return dict(student.model.state_dict())


def assert_parts(found: dict[str, Tensor], theirs: dict[str, Tensor], parts: tuple[str, ...]) -> None:
    """The named modules are those of the other network, bit for bit, and the others those of the seed."""
    fresh = initial(run_of("ce.yaml", [f"student={{{STUDENT}}}"]))
    for key, value in found.items():
        source = theirs if key.partition(".")[0] in parts else fresh
        assert torch.equal(value, source[key]), key
    assert not torch.equal(found["conv1.weight"], fresh["conv1.weight"])


def test_named_modules_begin_as_those_of_a_deeper_network(place: Path, capsys: pytest.CaptureFixture[str]):
    theirs = saved("deep.pt", "cifar_resnet20")
    found = initial(run_of("ce.yaml", start_of("weights: deep.pt, parts: [conv1, bn1, fc]")))
    assert_parts(found, theirs, ("conv1", "bn1", "fc"))
    said = capsys.readouterr().out
    assert said == "note: student.start: deep.pt: 120 other tensors (first layer1.0.conv1.weight) are left out\n"


def test_named_modules_begin_as_those_of_another_run(place: Path):
    content = yaml.safe_load(Path("ce.yaml").read_text())
    content |= {"student": {"model": "cifar_resnet20"}, "folder": "runs/deep", "epochs": 1}
    Path("deep.yaml").write_text(yaml.safe_dump(content))
    train(0, 1, place, ["deep.yaml"])
    words = start_of("recipe: deep.yaml, parts: [conv1, fc]")
    run = run_of("ce.yaml", words)
    theirs = load_file(place / "runs/deep/student.safetensors")
    assert_parts(initial(run), theirs, ("conv1", "fc"))
    assert run.start is not None
    assert run.identity["student"]["start"] == {
        "recipe": run.start.fingerprint,
        "weights": None,
        "parts": ["conv1", "fc"],
    }


def test_the_parts_and_the_content_of_their_tensors_alone_belong_to_the_run(place: Path):
    state = saved("a.pt", "cifar_resnet20")
    torch.save({**state, "bn1.weight": state["bn1.weight"] + 1}, "other_norm.pt")
    torch.save({**state, "conv1.weight": state["conv1.weight"] + 1}, "other_convolution.pt")
    saved("own.pt", "cifar_resnet8")

    def identity(keys: str) -> dict[str, object]:
        return run_of("ce.yaml", start_of(keys)).identity

    one, parts = identity("weights: a.pt, parts: [conv1, fc]"), ", parts: [conv1, fc]"
    assert one == identity("weights: other_norm.pt" + parts)
    assert one != identity("weights: other_convolution.pt" + parts)
    assert one != identity("weights: a.pt, parts: [conv1]")
    off = identity("weights: own.pt, parts: []")
    assert off == identity("weights: own.pt")
    assert "parts" not in str(off)


REFUSED = [
    ("cifar_vgg8", "parts: [conv1]", "than these parts of cifar_resnet8: 1 keys missing (first conv1.weight)"),
    ("cifar_resnet20", "parts: [layer1]", "24 unexpected (first layer1.1.conv1.weight)"),
    (
        "cifar_resnet8x4",
        "parts: [conv1, bn1]",
        "5 of another shape (first conv1.weight: (32, 3, 3, 3), expected (16, 3, 3, 3))",
    ),
    ("cifar_resnet20", "parts: [stem]", "parts: CifarResNet has no module 'stem' with weights; it has conv1, bn1,"),
    ("cifar_resnet20", "parts: [relu]", "parts: CifarResNet has no module 'relu' with weights"),
    ("cifar_resnet20", "parts: [conv1], head: new", "parts names all that begins with the weights; remove head"),
    ("cifar_resnet20", "parts: [conv1], part: backbone", "all that begins with the weights; remove part"),
    ("cifar_resnet20", "parts: [conv1], weights_key: ema", "holds no weights under weights_key 'ema'"),
]


@pytest.mark.parametrize(("other", "keys", "message"), REFUSED)
def test_a_file_that_has_not_these_parts_ends_in_one_line(place: Path, other: str, keys: str, message: str):
    saved("w.pt", other)
    with pytest.raises(RecipeError) as caught:
        run_of("ce.yaml", start_of(f"weights: w.pt, {keys}"))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_part_is_no_module_of_that_name_inside_another(place: Path):
    state = saved("w.pt", "cifar_resnet20")
    torch.save({name: value for name, value in state.items() if not name.startswith("bn1.")}, "w.pt")
    with pytest.raises(RecipeError, match=r"4 keys missing \(first bn1.weight\)"):
        run_of("ce.yaml", start_of("weights: w.pt, parts: [bn1]"))


@pytest.mark.parametrize(("other", "keys", "message"), REFUSED[:5])
def test_a_check_compares_with_the_network_of_a_run_that_is_not_trained_yet(
    place: Path, other: str, keys: str, message: str
):
    content = yaml.safe_load(Path("ce.yaml").read_text())
    Path("other.yaml").write_text(yaml.safe_dump(content | {"student": {"model": other}, "folder": "runs/other"}))
    with pytest.raises(RecipeError) as caught:
        summarize(load_recipe("ce.yaml", start_of(f"recipe: other.yaml, {keys}")))
    assert str(caught.value).startswith("student.start: ")
    assert message in str(caught.value)
    assert not (place / "runs/other").exists()


def test_more_epochs_of_a_finished_run_start_from_all_of_its_weights(place: Path):
    saved("deep.pt", "cifar_resnet20")
    words = [*start_of("weights: deep.pt, parts: [conv1]"), "folder=runs/parts"]
    train(0, 1, place, ["ce.yaml", *words, "epochs=1"])
    with pytest.raises(RecipeError, match=r"student\.start\.weights=\S+ student\.start\.parts=\[\] epochs=1 folder"):
        check_folder(run_of("ce.yaml", [*words, "epochs=2"]))
