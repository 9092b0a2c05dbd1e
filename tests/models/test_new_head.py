"""Under a new head, weights of other classes fill all of a network but its classifier, and must fit there as ever."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import authors_names
import pytest
import torch
from torch import Tensor, nn

from pipeline.models import create_model, published
from pipeline.models.foreign_names import foreign_names
from pipeline.models.weights import head_tensors, load_weights, weights_sha256

NAME = "cifar_resnet8"
HEADS = {
    "cifar_resnet8": {"fc.weight", "fc.bias"},
    "cifar_vgg8": {"fc.weight", "fc.bias"},
    "resnet18": {"fc.weight", "fc.bias"},
    "vgg11": {"classifier.6.weight", "classifier.6.bias"},
    "mobilenet_v3_small": {"classifier.3.weight", "classifier.3.bias"},
    "squeezenet1_1": {"classifier.1.weight", "classifier.1.bias"},
    "timm/deit_tiny_distilled_patch16_224": {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"},
}


class Blind(nn.Module):
    """A network that does not care how many classes there are."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 10)


def state_of(seed: int, classes: int, name: str = NAME) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return dict(create_model(name, classes).state_dict())


def started(source: str, name: str = NAME, classes: int = 7, seed: int = 2) -> tuple[dict[str, Tensor], str]:
    """Return the state of a network of that seed which starts from weights under a new head, and the note."""
    torch.manual_seed(seed)
    model = create_model(name, classes)
    note = load_weights(model, source, name, left_out=head_tensors(name, classes))
    return dict(model.state_dict()), note


def assert_new_head(found: dict[str, Tensor], weights: dict[str, Tensor], initial: dict[str, Tensor], name: str):
    for key, value in found.items():
        assert torch.equal(value, (initial if key in HEADS[name] else weights)[key]), key


def saved(path: Path, content: object) -> str:
    torch.save(content, path)
    return str(path)


@pytest.mark.parametrize("name", HEADS)
def test_the_head_is_the_layer_whose_rows_are_classes(name: str):
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    assert head_tensors(name, 10) == HEADS[name]


def test_a_network_without_classes_has_no_head():
    with pytest.raises(ValueError, match=r"no tensor of .*:Blind depends on the number of classes.*; remove head$"):
        head_tensors(f"{__name__}:Blind", 10)


@pytest.mark.parametrize("classes", [1000, 7], ids=["other classes", "as many classes"])
@pytest.mark.parametrize("around", [lambda s: s, lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}}])
def test_a_file_fills_all_but_the_head_which_stays_as_the_seed_drew_it(
    tmp_path: Path, classes: int, around: Callable[[dict[str, Tensor]], object]
):
    weights = state_of(1, classes)
    file = saved(tmp_path / "w.pt", around(weights))
    found, note = started(file)
    assert_new_head(found, weights, state_of(2, 7), NAME)
    assert note == f"fc.weight, fc.bias are not read from {file} and keep their random initialisation"


def test_weights_without_any_head_will_do(tmp_path: Path):
    weights = state_of(1, 1000)
    found, _ = started(saved(tmp_path / "w.pt", {k: v for k, v in weights.items() if not k.startswith("fc.")}))
    assert_new_head(found, weights, state_of(2, 7), NAME)


def test_torchvisions_published_weights_fill_all_but_the_head(monkeypatch: pytest.MonkeyPatch):
    weights = state_of(1, 1000, "resnet18")
    monkeypatch.setattr(published, "load_state_dict_from_url", lambda *_args, **_keys: weights)
    found, note = started("IMAGENET1K_V1", "resnet18")
    assert_new_head(found, weights, state_of(2, 7, "resnet18"), "resnet18")
    assert note.startswith("fc.weight, fc.bias are not read from IMAGENET1K_V1")


def test_timms_published_weights_fill_all_but_the_head(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("timm")
    name = "timm/deit_tiny_distilled_patch16_224"
    weights = state_of(1, 1000, name)
    monkeypatch.setattr(published, "timm_weights", lambda *_: weights)
    assert_new_head(started("fb_in1k", name)[0], weights, state_of(2, 7, name), name)


def test_weights_under_other_names_fill_all_but_the_head(tmp_path: Path):
    pytest.importorskip("timm")
    name = "timm/convnext_atto"
    weights = state_of(1, 11, name)

    found, _ = started(
        saved(tmp_path / "authors.pt", {authors_names.convnext(key): value for key, value in weights.items()}), name
    )
    initial = state_of(2, 7, name)
    head = {"head.fc.weight", "head.fc.bias"}
    assert all(torch.equal(value, (initial if key in head else weights)[key]) for key, value in found.items())


def test_weights_under_mdistillers_names_fill_all_but_the_head(tmp_path: Path):
    weights, fresh = (state_of(seed, classes, "cifar_vgg8") for seed, classes in ((1, 100), (2, 7)))
    names = foreign_names(create_model("cifar_vgg8", 7), fresh)
    assert set(names) != set(fresh)
    file = saved(tmp_path / "w.pt", {foreign: weights[own] for foreign, own in names.items()})
    assert_new_head(started(file, "cifar_vgg8")[0], weights, fresh, "cifar_vgg8")


@pytest.mark.parametrize(
    ("name", "classes", "reason"),
    [("cifar_resnet20", 1000, "72 unexpected"), ("cifar_resnet8x4", 1000, r"of another shape \(first conv1.weight")],
)
def test_all_other_tensors_must_fit_as_ever(tmp_path: Path, name: str, classes: int, reason: str):
    file = saved(tmp_path / "w.pt", state_of(1, classes, name))
    with pytest.raises(ValueError, match=f"w.pt: weights of another architecture than {NAME}: .*{reason}") as caught:
        started(file)
    assert "\n" not in str(caught.value)


def test_a_tensor_that_is_missing_or_too_many_is_refused_and_the_network_stays_as_it_was(tmp_path: Path):
    weights = state_of(1, 1000)
    lacking = {key: value for key, value in weights.items() if key != "layer3.0.conv2.weight"}
    model = create_model(NAME, 7)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for state, reason in ((lacking, "1 keys missing"), (weights | {"more": torch.ones(3)}, "1 unexpected")):
        with pytest.raises(ValueError, match=reason):
            load_weights(model, saved(tmp_path / "w.pt", state), NAME, left_out=head_tensors(NAME, 7))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_digest_is_that_of_what_is_read(tmp_path: Path):
    weights = state_of(1, 1000)
    one = saved(tmp_path / "one.pt", weights)
    two = saved(tmp_path / "two.pt", weights | {"fc.bias": torch.ones(1000)})
    three = saved(tmp_path / "three.pt", weights | {"conv1.weight": torch.ones_like(weights["conv1.weight"])})
    digests = [weights_sha256(file, NAME, 7, new_head=True) for file in (one, two, three)]
    assert digests[0] == digests[1] != digests[2]
    same = saved(tmp_path / "same.pt", state_of(1, 7))
    assert weights_sha256(same, NAME, 7) != weights_sha256(same, NAME, 7, new_head=True)
