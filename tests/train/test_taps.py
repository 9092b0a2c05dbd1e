"""A tap is the tensor the network itself computes, untouched, and nothing more."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from pipeline.models import create_model
from pipeline.models.stages import stages
from pipeline.taps import FeatureTaps, tap_shapes


def tapped(name: str, *wanted: str, seed: int = 0) -> FeatureTaps:
    torch.manual_seed(seed)
    model = create_model(name, 10)
    return FeatureTaps(model, stages(model), wanted)


def images(size: int = 32, rows: int = 2) -> Tensor:
    return torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    """A residual block as torchvision writes it: the sum overwrites the second BatchNorm's output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.bn = nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=True)
        self.unused = nn.Identity()
        self.pair = Pair()

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] == 7:
            raise RuntimeError("seven")
        y = self.relu(self.bn(self.conv(x)))
        z = self.bn(self.conv(y))
        z += x
        first, _ = self.pair(self.relu(z))
        return first.mean((2, 3))


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


def block(**paths: str) -> FeatureTaps:
    torch.manual_seed(0)
    return FeatureTaps(Block(), paths, paths)


def test_taps_are_what_a_forward_by_hand_computes():
    taps = tapped("cifar_resnet8", "stem", "stage1", "stage2", "last", "embedding", "logits").eval()
    m = taps.model
    outputs = taps(images())
    with torch.no_grad():
        stem = torch.relu(m.bn1(m.conv1(images())))
        stage1 = m.layer1(stem)
        stage2 = m.layer2(stage1)
        last = m.layer3(stage2)
        embedding = last.mean((2, 3))
        logits = nn.functional.linear(embedding, m.fc.weight, m.fc.bias)
    expected = {
        "stem": stem,
        "stage1": stage1,
        "stage2": stage2,
        "last": last,
        "embedding": embedding,
        "logits": logits,
    }
    assert outputs.features.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(outputs.features[name], value)
    assert outputs.logits_BK is outputs.features["logits"]


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v1", "cifar_resnet8"])
@pytest.mark.parametrize("training", [True, False])
def test_a_pre_activation_is_signed_and_its_relu_is_the_stage(name: str, training: bool):
    outputs = tapped(name, "last", "last.preact").train(training)(images(64))
    assert (outputs.features["last.preact"] < 0).any()
    assert torch.equal(outputs.features["last.preact"].relu(), outputs.features["last"])


def test_in_place_activations_that_overwrite_no_tap_stay_in_place():
    taps = tapped("resnet18", "stage4.preact")
    taps(images())
    changed = [name for name, module in taps.model.named_modules() if getattr(module, "inplace", None) is False]
    assert changed == ["layer4.1.relu"]


def test_an_output_that_the_next_activation_would_overwrite_is_spared():
    taps = tapped("resnet18")
    taps = FeatureTaps(taps.model, {"inner": "layer1.0.bn1"}, ["inner"])
    assert (taps(images()).features["inner"] < 0).any()


def test_tapping_changes_neither_the_logits_nor_the_gradients():
    plain, taps = tapped("resnet18").model, tapped("resnet18", "stage1.preact", "stage3", "last.preact")
    for network in (plain, taps):
        outputs = network(images())
        (outputs if isinstance(outputs, Tensor) else outputs.logits_BK).square().sum().backward()
    assert torch.equal(plain(images()), taps(images()).logits_BK)
    for one, other in zip(plain.parameters(), taps.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_only_what_is_wanted_is_captured():
    assert tapped("cifar_resnet8")(images()).features == {}
    assert tapped("cifar_resnet8", "last", "stage3")(images()).features.keys() == {"last", "stage3"}


def test_nothing_is_kept_between_calls():
    taps = tapped("cifar_resnet8", "last", "stage1")
    outputs = taps(images())
    remembered = [weakref.ref(tensor) for tensor in (*outputs.features.values(), outputs.logits_BK)]
    del outputs
    gc.collect()
    assert [reference() for reference in remembered] == [None] * 3


def test_the_plain_model_runs_without_capturing():
    taps = tapped("cifar_resnet8", "last")
    seen = []
    taps.model.get_submodule("layer3").register_forward_hook(lambda _m, _a, output: seen.append(weakref.ref(output)))
    with torch.no_grad():
        taps.model(images())
    gc.collect()
    assert seen[0]() is None


def test_the_state_dict_of_the_model_is_the_plain_one():
    taps = tapped("cifar_resnet8", "last", "stage1.preact")
    taps(images())
    create_model("cifar_resnet8", 10).load_state_dict(taps.model.state_dict(), strict=True)


def test_a_deep_copy_captures_its_own_features():
    taps = tapped("cifar_resnet8", "last", "last.preact")
    copied = copy.deepcopy(taps)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert copied(images()).features["last"].abs().max() == 0
    assert taps(images()).features["last"].abs().max() > 0


def test_a_failed_forward_leaves_no_trace():
    taps = block(inner="conv")
    with pytest.raises(RuntimeError, match="seven"):
        taps(images(7))
    taps.model(images(9))
    assert taps(images(8)).features["inner"].shape == (2, 3, 8, 8)


def test_the_last_call_of_a_shared_module_counts():
    taps = block(first="relu:in", second="conv")
    model = taps.model
    features = taps.eval()(images()).features
    middle = torch.relu(model.bn(model.conv(images())))
    torch.testing.assert_close(features["second"], model.conv(middle))
    torch.testing.assert_close(features["first"], model.bn(model.conv(middle)) + images())


def test_a_compiled_network_gives_the_same_taps():
    taps = tapped("cifar_resnet8", "last", "last.preact").eval()
    compiled = torch.compile(taps, backend="eager", fullgraph=True)
    expected, outputs = taps(images()), compiled(images())
    torch.testing.assert_close(outputs.features, expected.features)
    assert torch.equal(outputs.features["last.preact"].relu(), outputs.features["last"])


def test_a_stage_without_its_module_is_refused():
    with pytest.raises(ValueError, match=r"^stage 'x': Block has no module 'nowhere': "):
        block(x="nowhere")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("bn", "tap 'x': Block overwrites 'bn' in place; tap another module"),
        ("unused", "tap 'x': the forward of Block never called its module 'unused'"),
        ("pair", "tap at 'pair': expected one tensor there, got a tuple"),
    ],
)
def test_what_cannot_be_tapped_is_refused(path: str, message: str):
    with pytest.raises(ValueError, match=f"^{message}$"):
        block(x=path)(images())


def test_a_network_that_does_not_answer_logits_is_refused():
    with pytest.raises(ValueError, match="Pair returned a tuple, expected one tensor of logits"):
        FeatureTaps(Pair(), {}, [])(images())


def test_shapes_are_those_of_a_real_forward():
    taps = tapped("cifar_resnet8", "stem", "last", "embedding")
    outputs = taps(images())
    expected = {name: tuple(value.shape[1:]) for name, value in outputs.features.items()} | {"logits": (10,)}
    assert tap_shapes(taps, 32) == expected


def test_the_probe_leaves_modes_statistics_and_random_states_alone():
    taps = tapped("mobilenet_v2", "last").train()
    taps.model.get_submodule("features.3").eval()
    modes = {name: module.training for name, module in taps.named_modules()}
    state = {key: value.clone() for key, value in taps.state_dict().items()}
    random = torch.get_rng_state()
    tap_shapes(taps, 32)
    assert {name: module.training for name, module in taps.named_modules()} == modes
    assert all(torch.equal(value, state[key]) for key, value in taps.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
