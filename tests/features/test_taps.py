"""A tap is the tensor the network itself computes, untouched, and nothing more."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from pipeline.features.taps import FeatureTaps, tap_shapes
from pipeline.models import create_model
from pipeline.models.stages import stages


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
    with pytest.raises(
        ValueError, match=r"^Pair returned a tuple, expected one tensor of logits; give a factory whose "
    ):
        FeatureTaps(Pair(), {}, [])(images())


def test_shapes_are_those_of_a_real_forward():
    taps = tapped("cifar_resnet8", "stem", "last", "embedding")
    outputs = taps(images())
    expected = {name: tuple(value.shape[1:]) for name, value in outputs.features.items()} | {"logits": (10,)}
    assert tap_shapes(taps, 32) == expected


def test_a_place_may_say_how_many_channels_it_has():
    paths = {"stem": "embed:8", "stage1": "mix:in:nhwc:8", "stage2": "norm:tokens:8"}
    assert set(tap_shapes(FeatureTaps(Patches(5), paths, paths), 32).values()) == {(8, 8, 8), (5,)}


class Demanding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        assert images_BCHW.shape[-1] > 30
        if images_BCHW.shape[-1] < 40:
            raise RuntimeError("Only 40 pixels.\nOr more.")
        return self.scale * images_BCHW.mean((2, 3))


@pytest.mark.parametrize(("size", "reason"), [(32, r"Only 40 pixels\."), (16, "(assert .*|AssertionError)")])
def test_an_image_that_a_network_cannot_take_is_refused_in_one_line(size: int, reason: str):
    with pytest.raises(ValueError, match=f"^Demanding cannot take images of {size} pixels: {reason}$"):
        tap_shapes(FeatureTaps(Demanding(), {}, []), size)


def test_shapes_are_those_of_images_that_are_not_square_too():
    taps = tapped("cifar_resnet8", "stage2")
    assert tap_shapes(taps, (32, 64)) == {"stage2": (32, 16, 32), "logits": (10,)}
    assert tap_shapes(taps, (32, 32)) == tap_shapes(taps, 32)
    with pytest.raises(ValueError, match=r"^Demanding cannot take images of 64 × 16 pixels: "):
        tap_shapes(FeatureTaps(Demanding(), {}, []), (64, 16))


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


def test_all_is_every_stage_under_its_own_name():
    taps = tapped("cifar_resnet8", "all", "all.preact", "last")
    stages_only = {"stage1", "stage2", "stage3"}
    assert taps(images()).features.keys() == stages_only | {f"{stage}.preact" for stage in stages_only} | {"last"}


def test_a_class_activation_map_is_the_weighted_sum_of_the_map():
    taps = tapped("cifar_resnet8", "cam").eval()
    features = taps(images()).features
    assert features.keys() == {"cam"}
    map_BCHW = tapped("cifar_resnet8", "map").eval()(images()).features["map"]
    expected = torch.einsum("kc,bchw->bkhw", taps.model.get_submodule("fc").weight, map_BCHW)
    torch.testing.assert_close(features["cam"], expected)


def test_a_class_activation_map_teaches_the_head_and_what_is_before_it():
    taps = tapped("cifar_resnet8", "cam")
    taps(images()).features["cam"].square().sum().backward()
    assert all(taps.model.get_submodule(name).weight.grad.abs().max() > 0 for name in ("fc", "conv1"))


def test_a_class_activation_map_in_a_compiled_network_is_the_same():
    taps = tapped("cifar_resnet8", "cam").eval()
    compiled = torch.compile(taps, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images()).features["cam"], taps(images()).features["cam"])


def test_a_class_activation_map_needs_a_map_as_wide_as_its_head():
    model = create_model("cifar_resnet8", 10)
    taps = FeatureTaps(model, stages(model) | {"map": "layer2"}, ["cam"])
    message = (
        r"^tap 'cam': the stage 'map' of CifarResNet is shaped \[32, 16, 16\], but its linear head takes 64 channels$"
    )
    with pytest.raises(ValueError, match=message):
        taps(images())


def test_the_norms_are_those_that_end_the_tapped_pre_activations():
    taps = tapped("cifar_resnet8", "all.preact", "last.preact", "stem", "last")
    model = taps.model
    with torch.no_grad():
        for number, name in enumerate(("layer1.0.bn2", "layer2.0.bn2", "layer3.0.bn2"), start=1):
            model.get_submodule(name).weight.fill_(number)
            model.get_submodule(name).bias.fill_(-number)
    norms = taps.norms()
    assert norms.keys() == {"stage1.preact", "stage2.preact", "stage3.preact", "last.preact"}
    for tap, number in (("stage1.preact", 1), ("stage2.preact", 2), ("stage3.preact", 3), ("last.preact", 3)):
        assert (norms[tap].weight_C == number).all()
        assert (norms[tap].bias_C == -number).all()


def test_the_norms_are_copies_without_gradient():
    taps = tapped("cifar_resnet8", "stage1.preact")
    norm = taps.norms()["stage1.preact"]
    with torch.no_grad():
        taps.model.get_submodule("layer1.0.bn2").weight.zero_()
    assert not norm.weight_C.requires_grad
    assert (norm.weight_C == 1).all()


def test_a_pre_activation_that_no_batchnorm_ends_has_no_norm():
    assert tapped("cifar_shufflenet_v2", "last.preact").norms() == {}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("conv", "stage 'stage1.norm': 'conv' is a Conv2d, expected a BatchNorm2d with scale and shift"),
        ("nowhere", "stage 'stage1.norm': Block has no module 'nowhere': "),
    ],
)
def test_a_norm_that_is_none_is_refused(path: str, message: str):
    paths = {"stage1": "relu", "stage1.preact": "conv", "stage1.norm": path}
    with pytest.raises(ValueError, match=f"^{message}"):
        FeatureTaps(Block(), paths, ["stage1.preact"]).norms()


class Patches(nn.Module):
    """A user's network: patches with their channels last, then tokens behind two that have no place."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, stride=4)
        self.mix = nn.Linear(8, 8)
        self.attend = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.classify = nn.Linear(8, num_classes)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        x_BHWC = self.mix(self.embed(images_BCHW).permute(0, 2, 3, 1))
        tokens_BNC = x_BHWC.flatten(1, 2)
        tokens_BNC = torch.cat([tokens_BNC.mean(1, keepdim=True), tokens_BNC.amax(1, keepdim=True), tokens_BNC], 1)
        return self.classify(self.norm(self.attend(tokens_BNC))[:, 0])


USERS_STAGES = {
    "stem": "embed",
    "stage1": "mix:nhwc",
    "stage1.preact": "mix:in:nhwc",
    "stage2": "norm:tokens",
    "stage2.preact": "norm:in:tokens",
    "embedding": "classify:in",
}


def users_network(*wanted: str) -> FeatureTaps:
    torch.manual_seed(0)
    return FeatureTaps(create_model(f"{__name__}:Patches", 5), USERS_STAGES, wanted)


def test_a_users_network_is_tapped_where_its_recipe_says():
    taps = users_network(*USERS_STAGES, "last").eval()
    features = taps(images()).features
    patches = taps.model.embed(images())
    torch.testing.assert_close(features["stem"], patches)
    torch.testing.assert_close(features["stage1.preact"], patches)
    torch.testing.assert_close(features["stage1"], taps.model.mix(patches.movedim(1, -1)).movedim(-1, 1))
    assert torch.equal(features["last"], features["stage2"])
    assert features["embedding"].shape == (2, 8)


def test_tokens_become_the_map_that_they_were_cut_from():
    taps = users_network("stage1", "stage2.preact", "stage2").eval()
    features = taps(images()).features
    mixed_BHWC = features["stage1"].movedim(1, -1)
    attended = taps.model.attend(mixed_BHWC)
    torch.testing.assert_close(features["stage2.preact"], attended.movedim(-1, 1))
    torch.testing.assert_close(features["stage2"], taps.model.norm(attended).movedim(-1, 1))


def test_a_users_network_has_all_stages_that_it_names():
    shapes = tap_shapes(users_network("all", "all.preact"), 32)
    names = {"stage1", "stage2", "stage1.preact", "stage2.preact"}
    assert shapes == {**dict.fromkeys(names, (8, 8, 8)), "logits": (5,)}


def test_a_copied_network_turns_its_own_tokens():
    taps = users_network("last")
    copied = copy.deepcopy(taps)
    assert torch.equal(copied(images()).features["last"], taps(images()).features["last"])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "mix:nchw",
            "stage 'x': 'mix:nchw' ends in 'nchw'; allowed are in, copy, nhwc, tokens and a number of channels, .*",
        ),
        ("mix:nhwc:in", "stage 'x': 'mix:nhwc:in' ends in 'nhwc:in'; allowed are in, .*"),
        ("norm:8", r"tap 'x': Patches computes at 'norm:8' a tensor shaped \[2, 66, 8\], expected 8 channels; give .*"),
        ("embed:16", r"tap 'x': Patches computes at 'embed:16' a tensor shaped .*, expected 16 channels; give .*"),
        ("norm:nhwc", r"tap 'x': Patches computes at 'norm:nhwc' a tensor shaped \[2, 66, 8\], but :nhwc is for .*C\]"),
        ("embed:tokens", r"tap 'x': Patches computes at 'embed:tokens' a tensor .*, but :tokens is for \[B, N, C\]"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(path: str, message: str):
    with pytest.raises(ValueError, match=f"^{message}$"):
        FeatureTaps(Patches(5), {"x": path}, ["x"])(images())
