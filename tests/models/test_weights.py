"""Weights go into their own architecture or are refused in one line, with the network as it was."""

from __future__ import annotations

from pathlib import Path
from urllib.error import URLError

import pytest
import safetensors.torch
import torch
import torchvision.models
from torch import nn

from pipeline.models import create_model, published
from pipeline.models.weights import load_weights

NAME = "cifar_resnet8"


@pytest.fixture
def saved() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return dict(create_model(NAME, 10).state_dict())


@pytest.fixture
def fresh() -> nn.Module:
    torch.manual_seed(2)
    return create_model(NAME, 10)


def same(model: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def refusal(model: nn.Module, source: Path | str, name: str = NAME) -> str:
    """Return the message with which ``source`` is refused; the network must not have changed."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load_weights(model, str(source), name)
    assert same(model, before)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_a_saved_state_dict_comes_back(tmp_path: Path, saved: dict, fresh: nn.Module, suffix: str):
    path = tmp_path / f"student{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file(saved, path)
    else:
        torch.save(saved, path)
    load_weights(fresh, str(path), NAME)
    assert same(fresh, saved)


@pytest.mark.parametrize("wrapping", [{"state_dict": "module."}, {"model": ""}], ids=["torchvision", "RepDistiller"])
def test_the_wrapping_of_training_scripts_is_taken_off(
    tmp_path: Path, saved: dict, fresh: nn.Module, wrapping: dict[str, str]
):
    wrapped = {key: {prefix + name: value for name, value in saved.items()} for key, prefix in wrapping.items()}
    torch.save({"epoch": 90, "best_acc": torch.tensor(72.6), **wrapped}, tmp_path / "w.pth")
    load_weights(fresh, str(tmp_path / "w.pth"), NAME)
    assert same(fresh, saved)


def test_weights_from_before_batches_were_counted_load(tmp_path: Path, saved: dict, fresh: nn.Module):
    torch.save({key: value for key, value in saved.items() if "num_batches" not in key}, tmp_path / "old.pt")
    load_weights(fresh, str(tmp_path / "old.pt"), NAME)
    assert same(fresh, saved)


def test_a_missing_file_is_named(fresh: nn.Module, tmp_path: Path):
    assert refusal(fresh, tmp_path / "gone.pt") == f"{tmp_path / 'gone.pt'}: there is no such weights file"


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"not weights", b"PK\x03\x04 cut short"])
def test_a_damaged_file_is_named(fresh: nn.Module, tmp_path: Path, suffix: str, content: bytes):
    path = tmp_path / f"damaged{suffix}"
    path.write_bytes(content)
    assert refusal(fresh, path).startswith(f"{path}: cannot be read as tensors")


def test_a_whole_pickled_model_is_not_executed(fresh: nn.Module, tmp_path: Path):
    torch.save(fresh, tmp_path / "model.pt")
    assert "save model.state_dict() there" in refusal(fresh, tmp_path / "model.pt")


def test_a_file_without_tensors_by_name_is_named(fresh: nn.Module, tmp_path: Path):
    torch.save([1, 2, 3], tmp_path / "list.pt")
    assert "expected tensors by name" in refusal(fresh, tmp_path / "list.pt")


def test_another_architecture_is_told_by_its_keys_and_shapes(fresh: nn.Module, tmp_path: Path):
    torch.save(create_model("cifar_resnet20", 10).state_dict(), tmp_path / "deep.pt")
    assert "cifar_resnet8: 72 unexpected (first layer1.1.conv1.weight)" in refusal(fresh, tmp_path / "deep.pt")
    torch.save(create_model("cifar_resnet8x4", 10).state_dict(), tmp_path / "wide.pt")
    assert "of another shape (first conv1.weight: (32, 3, 3, 3), expected (16, 3, 3, 3))" in refusal(
        fresh, tmp_path / "wide.pt"
    )
    torch.save(fresh.state_dict(), tmp_path / "shallow.pt")
    message = refusal(create_model("cifar_resnet20", 10), tmp_path / "shallow.pt", "cifar_resnet20")
    assert "60 keys missing (first layer1.1.conv1.weight)" in message


def test_a_head_of_another_number_of_classes_is_told_as_such(fresh: nn.Module, tmp_path: Path):
    torch.save(create_model(NAME, 1000).state_dict(), tmp_path / "imagenet.pt")
    message = refusal(fresh, tmp_path / "imagenet.pt")
    assert "imagenet.pt: the weights have 1000 classes, the network and the shards have 10; " in message
    assert "student.start.head=new" in message


@pytest.mark.parametrize("shape", [(), (10, 1), (10, 64, 1)])
def test_a_head_of_another_shape_is_not_taken_for_one_of_other_classes(fresh: nn.Module, tmp_path: Path, shape: tuple):
    state = create_model(NAME, 10).state_dict()
    torch.save(state | {list(state)[-1]: torch.zeros(shape)}, tmp_path / "w.pt")
    assert f"1 of another shape (first {list(state)[-1]}: {shape}, expected (10,))" in refusal(fresh, tmp_path / "w.pt")


def test_an_unknown_weights_name_is_refused_with_those_there_are():
    model = create_model("resnet18", 10)
    assert "torchvision has IMAGENET1K_V1, DEFAULT; or give a file" in refusal(model, "IMAGENET1K_V9", "resnet18")


def test_a_network_of_our_own_has_no_published_weights(fresh: nn.Module):
    assert "torchvision has no weights of 'cifar_resnet8'; give a file" in refusal(fresh, "IMAGENET1K_V1")


def test_published_weights_come_from_torchvisions_address(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(3)
    weights = create_model("resnet18", 1000).state_dict()
    asked = []

    def download(url: str, **_: object) -> dict:
        asked.append(url)
        return weights

    monkeypatch.setattr(published, "load_state_dict_from_url", download)
    model = create_model("resnet18", 1000)
    load_weights(model, "IMAGENET1K_V1", "resnet18")
    assert same(model, weights)
    assert asked[0].endswith("resnet18-f37072fd.pth")
    assert "the weights have 1000 classes, the network and the shards have 20" in refusal(
        create_model("resnet18", 20), "IMAGENET1K_V1", "resnet18"
    )


def test_published_weights_with_auxiliary_heads_fit_the_network_without(monkeypatch: pytest.MonkeyPatch):
    with torch.random.fork_rng():
        weights = torchvision.models.googlenet(num_classes=10, init_weights=False).state_dict()
    assert any(key.startswith("aux2.") for key in weights)
    monkeypatch.setattr(published, "load_state_dict_from_url", lambda *_args, **_keys: weights)
    model = create_model("googlenet", 10)
    load_weights(model, "IMAGENET1K_V1", "googlenet")
    assert same(model, weights)


def test_a_failed_download_says_what_to_do(monkeypatch: pytest.MonkeyPatch):
    def download(url: str, **_: object) -> dict:
        raise URLError("no route to host")

    monkeypatch.setattr(published, "load_state_dict_from_url", download)
    message = refusal(create_model("resnet18", 10), "IMAGENET1K_V1", "resnet18")
    assert "cannot download https://" in message
    assert "no route to host" in message
    assert "give a file" in message
