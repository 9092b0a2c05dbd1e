"""What people's files hold: wrappings, prefixes, other names, values beside the weights, and what nobody should run."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import struct
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision.models
from torch import Tensor

from pipeline.models import create_model
from pipeline.models.foreign_names import foreign_names
from pipeline.models.weights import load_weights, weights_sha256
from pipeline.models.weights_file import is_file

NAME = "cifar_resnet8"
State = dict[str, Tensor]


def state_of(seed: int, name: str = NAME, classes: int = 10) -> State:
    torch.manual_seed(seed)
    return dict(create_model(name, classes).state_dict())


def prefixed(state: State, prefix: str) -> State:
    return {prefix + key: value for key, value in state.items()}


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def load(path: Path, key: str | None = None, name: str = NAME, classes: int = 10) -> tuple[State, str]:
    """Return what the network holds that the file was loaded into, and what was said."""
    model = create_model(name, classes)
    note = load_weights(model, str(path), name, key)
    return dict(model.state_dict()), note


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def refusal(path: Path, key: str | None = None) -> str:
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: .*$") as caught:
        load(path, key)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- around the weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model.", "net.backbone.", "student."]
)
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s}, lambda s: {"epoch": 3, "a": {"b": s}}])
def test_any_prefix_and_any_wrapping_is_taken_off(tmp_path: Path, prefix: str, wrap: Callable[[State], Any]):
    found, note = load(saved(tmp_path / "w.pt", wrap(prefixed(state_of(1), prefix))))
    assert same(found, state_of(1))
    assert note == ""


@pytest.mark.parametrize("key", ["model_state_dict", "state_dict_ema", "model_ema", "ema", "net"])
def test_the_one_mapping_that_fits_is_taken_whatever_it_is_called(tmp_path: Path, key: str):
    optimizer = {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
    averaged = {"n_averaged": torch.tensor(7), **prefixed(state_of(1), "module.")}
    found, note = load(saved(tmp_path / "w.pt", {"optimizer": optimizer, "epoch": 9, key: averaged}))
    assert same(found, state_of(1))
    assert note == ""


@pytest.mark.parametrize(("raw", "ema"), [("model", "model_ema"), ("state_dict", "state_dict_ema")])
def test_beside_averaged_weights_the_raw_ones_are_taken_unless_a_key_says_otherwise(tmp_path: Path, raw: str, ema: str):
    path = saved(tmp_path / "w.pth", {ema: prefixed(state_of(2), "module."), raw: state_of(1)})
    found, note = load(path)
    assert same(found, state_of(1))
    assert note == f"{path}: {raw} are used and not {ema}.module; weights_key can select it"
    found, _ = load(path, key=ema)
    assert same(found, state_of(2))
    assert f"holds no weights under weights_key 'gone'; it has {ema}.module, {raw}" in refusal(path, key="gone")


def test_two_that_fit_are_not_guessed_at_and_the_key_that_is_told_works(tmp_path: Path):
    both = prefixed(state_of(1), "encoder_q.") | prefixed(state_of(2), "encoder_k.")
    path = saved(tmp_path / "w.pt", both)
    assert "holds several weights that fit; set weights_key to one of encoder_q, encoder_k" in refusal(path)
    assert same(load(path, key="encoder_k")[0], state_of(2))
    twice = saved(tmp_path / "twice.pt", {"model": state_of(1), "state_dict": state_of(1)})
    assert load(twice)[1] == ""


def test_what_lies_beside_the_weights_is_said_and_what_thop_counts_is_not(tmp_path: Path):
    counted = {f"{module}total_ops": torch.zeros(1) for module in ("", "layer1.", "fc.")}
    assert load(saved(tmp_path / "thop.pt", state_of(1) | counted))[1] == ""
    lightning = prefixed(state_of(1), "model.") | {"criterion.weight": torch.ones(10)}
    found, note = load(saved(tmp_path / "l.ckpt", {"state_dict": lightning}))
    assert same(found, state_of(1))
    assert note.endswith("l.ckpt: 1 other tensors (first criterion.weight) are left out")


def test_a_deeper_network_is_no_wrapping(tmp_path: Path):
    deep = saved(tmp_path / "deep.pt", {"model": prefixed(state_of(1, "cifar_resnet20"), "module.")})
    assert "weights of another architecture than cifar_resnet8: 72 unexpected (first layer1.1.conv1" in refusal(deep)


def test_a_networks_own_way_of_loading_is_used(tmp_path: Path):
    """Torchvision's vision transformers called layers otherwise once; its MNASNet wants a version."""
    vit = torchvision.models.VisionTransformer(32, 16, 2, 2, 8, 16, num_classes=10)
    torch.manual_seed(3)
    newer = {key: torch.randn_like(value) for key, value in vit.state_dict().items()}
    older = {key.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): v for key, v in newer.items()}
    load_weights(vit, str(saved(tmp_path / "vit.pt", older)), "vit")
    assert same(dict(vit.state_dict()), newer)
    mnasnet = state_of(1, "mnasnet0_5")
    safetensors.torch.save_file(mnasnet, tmp_path / "m.safetensors")
    assert same(load(tmp_path / "m.safetensors", name="mnasnet0_5")[0], mnasnet)


# -- file or name -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["best.pth.tar", "last.ckpt", "pytorch_model.bin", "weights", "IMAGENET1K_V1"])
def test_what_is_there_is_a_file_whatever_it_is_called(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / name, state_of(1))
    assert same(load(Path(name))[0], state_of(1))


def test_what_names_a_folder_is_a_file_and_what_does_neither_is_a_name():
    assert is_file("runs/gone")
    assert is_file("gone.pth.tar")
    assert not is_file("IMAGENET1K_V1")
    assert not is_file("pretrained")


def test_the_kind_of_a_file_is_told_by_what_it_holds(tmp_path: Path):
    safetensors.torch.save_file(state_of(1), tmp_path / "w.pt")
    assert same(load(tmp_path / "w.pt")[0], state_of(1))
    torch.save(state_of(2), tmp_path / "old.safetensors", _use_new_zipfile_serialization=False)
    assert same(load(tmp_path / "old.safetensors")[0], state_of(2))


# -- beside the weights -----------------------------------------------------------------------------------------------


def test_harmless_values_beside_the_weights_load(tmp_path: Path):
    values = {
        "args": argparse.Namespace(lr=0.1, out=Path("runs"), nested=argparse.Namespace(x=[1, (2, "3")])),
        "more": types.SimpleNamespace(device=torch.device("cpu"), dtype=torch.float16, size=torch.Size([1])),
        "best": np.float64(72.6),
        "epoch": np.int64(3),
        "draws": np.arange(5, dtype=np.uint32),
        "rng": torch.get_rng_state(),
    }
    assert same(load(saved(tmp_path / "w.pth", {"model": state_of(1), **values}))[0], state_of(1))


class Settings:
    """A class that a user's training script kept its settings in."""


def test_what_is_refused_is_named(tmp_path: Path):
    path = saved(tmp_path / "w.pt", {"model": state_of(1), "settings": Settings()})
    name = f"{Settings.__module__}.Settings"
    expected = f"holds {name}, which is neither a tensor nor a plain value and is not loaded; save model.state_dict() t"
    assert expected in refusal(path)


# -- hostile files ----------------------------------------------------------------------------------------------------


class Canary:
    """What a pickle says is to be called when it is read."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def archive(path: Path, pickled: bytes, compression: int = zipfile.ZIP_STORED, **members: bytes) -> None:
    """Write an archive as ``torch.save`` does, with that pickle."""
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in {"data.pkl": pickled, "version": b"3\n", "byteorder": b"little", **members}.items():
            file.writestr(f"archive/{name}", content)


CALLS = {
    "system": lambda place: Canary(os.system, f"touch {place}"),
    "eval": lambda place: Canary(eval, f"open({str(place)!r}, 'w')"),
    "open": lambda place: Canary(open, str(place), "w"),
    "mkdir": lambda place: Canary(os.mkdir, str(place)),
    "namespace": lambda place: argparse.Namespace(x=Canary(os.system, f"touch {place}")),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", ["archive", "pickle", "torch"])
def test_nothing_that_a_pickle_calls_is_executed(tmp_path: Path, call: str, kind: str):
    path, canary = tmp_path / "w.pt", tmp_path / "canary"
    content = {"model": state_of(1) if kind == "torch" else {}, "args": CALLS[call](canary)}
    if kind == "torch":
        torch.save(content, path)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        archive(path, pickle.dumps(content, protocol=2))
    assert "save model.state_dict() there" in refusal(path)
    assert not canary.exists()


def _packed(path: Path) -> None:
    archive(path, pickle.dumps({}), zipfile.ZIP_DEFLATED, **{"data/0": bytes(1 << 22)})


def _escaping(path: Path) -> None:
    archive(path, pickle.dumps({}, protocol=2), **{"../../canary": b"x", "/canary": b"x"})


def _script(path: Path) -> None:
    archive(path, pickle.dumps({}, protocol=2), **{"constants.pkl": pickle.dumps(()), "code/a.py": b"1"})


def _header(length: int, header: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(struct.pack("<Q", length) + header)

    return write


def _tensor(**entry: Any) -> Callable[[Path], None]:
    header = json.dumps({"conv1.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **entry}}).encode()
    return _header(len(header), header)


HOSTILE: dict[str, Callable[[Path], None]] = {
    "packed members": _packed,
    "members that leave the archive": _escaping,
    "TorchScript": _script,
    "a header longer than the file": _header(2**62, b"{}"),
    "a header that is no JSON": _header(4, b"{{{{"),
    "a deep header": _header(200_000, b'{"a":' * 40_000),
    "a shape beyond memory": _tensor(shape=[2**40, 2**20]),
    "a negative shape": _tensor(shape=[-1]),
    "offsets behind the end": _tensor(data_offsets=[0, 2**50]),
    "another type": _tensor(dtype="OBJECT"),
    "a recursive pickle": lambda path: path.write_bytes(b"\x80\x02" + b"]" * 100_000 + b"."),
    "a folder's name as a file": lambda path: path.write_bytes(b"PK\x05\x06" + bytes(18)),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_of_any_kind_ends_in_one_line(tmp_path: Path, kind: str):
    path = tmp_path / "folder" / "w.pt"
    path.parent.mkdir()
    HOSTILE[kind](path)
    assert "save model.state_dict() there" in refusal(path)
    assert [entry.name for entry in tmp_path.rglob("*")] == ["folder", "w.pt"]


def test_mappings_inside_one_another_end(tmp_path: Path):
    circle: dict[str, Any] = {}
    circle["again"] = circle
    wide: dict[str, Any] = {}
    for _ in range(64):
        wide = {"a": wide, "b": wide}
    for content in (circle, wide):
        assert "expected tensors by name" in refusal(saved(tmp_path / "w.pt", content))


# -- nonsense ---------------------------------------------------------------------------------------------------------


NONSENSE: dict[str, tuple[Callable[[State], Any], str]] = {
    "whole numbers": (lambda s: s["conv1.weight"].long(), "conv1.weight holds torch.int64, expected torch.float32"),
    "truth values": (lambda s: s["conv1.weight"] > 0, "conv1.weight holds torch.bool, expected torch.float32"),
    "complex numbers": (lambda s: s["conv1.weight"] + 0j, "conv1.weight holds torch.complex64, expected"),
    "not a number": (lambda s: s["conv1.weight"] / 0 * 0, "conv1.weight: 432 of 432 values are not finite"),
    "infinity": (lambda s: s["conv1.weight"].double() * 1e300, "conv1.weight: 432 of 432 values are not finite"),
    "none at all": (lambda s: s["conv1.weight"].to("meta"), "conv1.weight is a torch.strided torch.float32 tensor wit"),
}


@pytest.mark.parametrize("kind", NONSENSE)
def test_weights_that_no_training_leaves_are_refused(tmp_path: Path, kind: str):
    change, told = NONSENSE[kind]
    state = state_of(1)
    path = saved(tmp_path / "w.pt", state | {"conv1.weight": change(state)})
    assert told in refusal(path)
    with pytest.raises(ValueError, match=re.escape(told)):
        weights_sha256(str(path), NAME, 10)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_pickle_of_any_protocol_is_read_or_refused_in_one_line(
    tmp_path: Path, protocol: int, recwarn: pytest.WarningsRecorder
):
    path = tmp_path / "w.pt"
    for content in (3, {"state_dict": None}):
        path.write_bytes(pickle.dumps(content, protocol))
        refusal(path)
    torch.save(state_of(1), path)
    assert same(load(path)[0], state_of(1))
    assert not recwarn.list


def test_a_variance_below_zero_is_refused_and_half_precision_is_not(tmp_path: Path):
    state = state_of(1)
    path = saved(tmp_path / "w.pt", state | {"bn1.running_var": -state["bn1.running_var"]})
    assert "bn1.running_var: a variance is below zero" in refusal(path)
    half = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    found, _ = load(saved(tmp_path / "half.pt", half))
    assert torch.equal(found["conv1.weight"], half["conv1.weight"].float())


# -- other names ------------------------------------------------------------------------------------------------------

# As those repositories' state dicts call them (RepDistiller and mdistiller alike): ours, theirs.
NAMES = {
    "cifar_wrn_40_2": """
        conv1.weight conv1.weight
        layer1.0.bn1.running_mean block1.layer.0.bn1.running_mean
        layer1.0.shortcut.weight block1.layer.0.convShortcut.weight
        layer3.5.conv2.weight block3.layer.5.conv2.weight
        bn1.weight bn1.weight
        fc.bias fc.bias""",
    "cifar_vgg13": """
        stem.0.0.weight block0.0.weight
        stem.0.1.running_var block0.1.running_var
        stem.1.0.bias block0.3.bias
        stage4.1.1.num_batches_tracked block4.4.num_batches_tracked
        fc.weight classifier.weight""",
    "cifar_vgg8": """
        stem.0.1.weight block0.1.weight
        stage3.0.0.weight block3.0.weight
        fc.bias classifier.bias""",
    "cifar_mobilenet_v2": """
        stem.1.weight conv1.1.weight
        stage1.0.layers.0.0.weight blocks.0.0.conv.0.weight
        stage1.1.layers.1.1.bias blocks.1.0.conv.4.bias
        stage1.2.layers.2.1.weight blocks.1.1.conv.7.weight
        stage2.2.layers.2.0.weight blocks.2.2.conv.6.weight
        stage3.3.layers.0.1.weight blocks.3.3.conv.1.weight
        stage3.4.layers.1.0.weight blocks.4.0.conv.3.weight
        stage4.3.layers.2.1.running_mean blocks.6.0.conv.7.running_mean
        last.0.weight conv2.0.weight
        fc.weight classifier.0.weight""",
    "cifar_shufflenet_v1": """
        stem.0.weight conv1.weight
        stem.1.weight bn1.weight
        stage1.0.squeeze.0.weight layer1.0.conv1.weight
        stage2.7.filter.1.bias layer2.7.bn2.bias
        stage3.3.widen.0.weight layer3.3.conv3.weight
        fc.bias linear.bias""",
    "cifar_shufflenet_v2": """
        stem.1.running_var bn1.running_var
        stage1.0.branch1.0.weight layer1.0.conv1.weight
        stage1.0.branch1.3.weight layer1.0.bn2.weight
        stage1.0.branch2.0.weight layer1.0.conv3.weight
        stage1.0.branch2.4.weight layer1.0.bn4.weight
        stage2.7.branch2.0.weight layer2.7.conv1.weight
        stage2.7.branch2.6.bias layer2.7.bn3.bias
        last.0.weight conv2.weight
        last.1.weight bn2.weight
        fc.weight linear.weight""",
    "cifar_resnet50": """
        conv1.weight conv1.weight
        layer1.0.downsample.0.weight layer1.0.shortcut.0.weight
        layer4.2.bn3.weight layer4.2.bn3.weight
        fc.weight linear.weight""",
}


@pytest.mark.parametrize("name", NAMES)
def test_teachers_of_well_known_code_have_their_names_here(name: str):
    with torch.device("meta"):
        model = create_model(name, 100)
    own = list(model.state_dict())
    ours = foreign_names(model, own)
    assert list(ours.values()) == own  # in order, and no two of ours are one of theirs
    for line in NAMES[name].split("\n")[1:]:
        mine, theirs = line.split()
        assert ours[theirs] == mine


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_such_a_teacher_loads(tmp_path: Path, name: str):
    state = {key: torch.rand_like(x) if x.is_floating_point() else x for key, x in state_of(4, name, 100).items()}
    theirs = {other: state[mine] for other, mine in foreign_names(create_model(name, 100), state).items()}
    path = saved(tmp_path / "ckpt_epoch_240.pth", {"epoch": 240, "model": theirs, "best_acc": torch.tensor(75.6)})
    found, note = load(path, name=name, classes=100)
    assert same(found, state)
    assert note == ""


def test_densenets_names_of_torchvisions_first_release_load(tmp_path: Path):
    state = state_of(1, "densenet121")
    older = {foreign: state[name] for foreign, name in foreign_names(create_model("densenet121", 10), state).items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in older
    assert same(load(saved(tmp_path / "d.pth", older), name="densenet121")[0], state)
