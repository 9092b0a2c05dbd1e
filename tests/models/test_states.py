"""What a file of safetensors holds of a network, and what of it comes back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from odd_networks import Looped, Remembering, Versioned
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.models import create_model
from pipeline.models.states import file_bytes, load_state, module_versions, read_state, state_metadata, storable
from pipeline.models.weights import load_weights


def write(module: nn.Module, path: Path) -> Path:
    save_file(storable(module.state_dict()), path, state_metadata(module))
    return path


def drawn(module: nn.Module) -> nn.Module:
    """Return the network with weights of its own."""
    with torch.no_grad():
        for value in (*module.parameters(), *module.buffers()):
            value.copy_(torch.randn(value.shape) if value.is_floating_point() else value + 3)
    return module


@pytest.mark.parametrize("build", [Looped, Versioned, lambda classes: create_model("mnasnet0_5", classes)])
def test_what_is_written_comes_back(build, tmp_path: Path):
    module, other = drawn(build(5)), build(5)
    state = read_state(write(module, tmp_path / "one.safetensors"))
    load_state(other, state)
    assert state.keys() == module.state_dict().keys()
    for name, value in module.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=0, atol=0)
    assert write(other, tmp_path / "other.safetensors").read_bytes() == (tmp_path / "one.safetensors").read_bytes()


def test_tensors_in_one_memory_are_written_under_all_their_names_and_stay_in_one(tmp_path: Path):
    path = write(drawn(Looped(5)), tmp_path / "looped.safetensors")
    other = Looped(5)
    other.load_state_dict(load_file(path), strict=True)
    assert other.tied is other.fc.weight
    assert other.blocks[0] is other.blocks[2]
    assert torch.equal(load_file(path)["halves"], load_file(path)["blocks.1.1.running_mean"][:4])


def test_a_network_without_such_specialities_is_the_same_bytes_as_ever(tmp_path: Path):
    module = create_model("cifar_resnet8", 5)
    save_file(module.state_dict(), tmp_path / "plain.safetensors")
    assert write(module, tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "plain.safetensors").read_bytes()
    assert not module_versions(module)


@pytest.mark.parametrize("metadata", [{}, {"best": "{}"}, {"versions": '{"":2}', "best": "70 °", "a": "\\", "b": ""}])
def test_a_file_is_the_same_bytes_each_time_whatever_its_metadata_says(tmp_path: Path, metadata: dict[str, str]):
    state = drawn(create_model("cifar_resnet8", 5)).state_dict()
    content, *others = {file_bytes(state, metadata) for _ in range(20)}
    assert not others
    (tmp_path / "w.safetensors").write_bytes(content)
    with safe_open(tmp_path / "w.safetensors", framework="pt") as file:
        assert (file.metadata() or {}) == metadata
    assert all(torch.equal(value, state[name]) for name, value in load_file(tmp_path / "w.safetensors").items())


@pytest.mark.parametrize("name", ["mnasnet0_5", "mnasnet1_3"])
@pytest.mark.parametrize("kind", ["ours.safetensors", "plain.safetensors", "plain.pt", "wrapped.pth"])
def test_weights_with_a_version_load_from_any_file_that_holds_them(name: str, kind: str, tmp_path: Path):
    module, other, path = create_model(name, 5), create_model(name, 5), tmp_path / kind
    state = module.state_dict()
    if kind == "ours.safetensors":
        write(module, path)
    elif kind == "plain.safetensors":
        save_file(state, path)
    else:
        torch.save({"model": {f"module.{key}": x for key, x in state.items()}} if "wrapped" in kind else state, path)
    load_weights(other, str(path), name)
    assert all(map(torch.equal, other.state_dict().values(), state.values()))


def test_the_version_in_the_file_is_the_one_that_counts(tmp_path: Path):
    module = Versioned(5)
    save_file(module.state_dict(), tmp_path / "old.safetensors", {"versions": '{"": 2}'})
    with pytest.raises(ValueError, match="version 2 is too old"):
        load_state(module, read_state(tmp_path / "old.safetensors"))


def test_what_is_no_tensor_is_named():
    with pytest.raises(ValueError, match="_extra_state is a dict, but a file holds only tensors"):
        storable(Remembering(5).state_dict())


def test_a_tensor_that_is_not_in_rows_is_written_in_rows():
    turned: dict[str, Tensor] = {"x": torch.arange(6.0).view(2, 3).T, "y": torch.ones(1).expand(4)}
    found = storable(turned)
    assert all(value.is_contiguous() and torch.equal(value, turned[name]) for name, value in found.items())
