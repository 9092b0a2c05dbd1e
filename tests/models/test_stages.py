"""Every known network's stages lie where the literature has them, and are what their names say."""

from __future__ import annotations

from collections import OrderedDict
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.features.names import deep_stages, find_stage, tap_names
from pipeline.features.taps import FeatureTaps, tap_shapes
from pipeline.models import create_model
from pipeline.models.stages import stages

# name: (channels, side) of stem, stage 1, stage 2, … of a 32-pixel image, and the width of the embedding
CIFAR = {
    **{
        name: ([(16, 32), (16, 32), (32, 16), (64, 8)], 64)
        for name in ("cifar_resnet8", "cifar_resnet20", "cifar_resnet110", "cifar_wrn_16_1", "cifar_wrn_40_1")
    },
    "cifar_resnet8x4": ([(32, 32), (64, 32), (128, 16), (256, 8)], 256),
    "cifar_resnet32x4": ([(32, 32), (64, 32), (128, 16), (256, 8)], 256),
    "cifar_wrn_16_2": ([(16, 32), (32, 32), (64, 16), (128, 8)], 128),
    "cifar_wrn_40_2": ([(16, 32), (32, 32), (64, 16), (128, 8)], 128),
    "cifar_vgg8": ([(64, 32), (128, 16), (256, 8), (512, 4), (512, 4)], 512),
    "cifar_vgg13": ([(64, 32), (128, 16), (256, 8), (512, 4), (512, 4)], 512),
    "cifar_mobilenet_v2": ([(16, 16), (12, 16), (16, 8), (48, 4), (160, 2)], 1280),
    "cifar_shufflenet_v1": ([(24, 32), (240, 16), (480, 8), (960, 4)], 960),
    "cifar_shufflenet_v2": ([(24, 32), (116, 16), (232, 8), (464, 4)], 1024),
    "cifar_resnet50": ([(64, 32), (256, 32), (512, 16), (1024, 8), (2048, 4)], 2048),
}
# name: channels of stages 1 to 4, which are 56, 28, 14 and 7 pixels wide, and the width of the embedding
IMAGENET = {
    "resnet18": ((64, 128, 256, 512), 512),
    "resnet34": ((64, 128, 256, 512), 512),
    "resnet50": ((256, 512, 1024, 2048), 2048),
    "resnext50_32x4d": ((256, 512, 1024, 2048), 2048),
    "wide_resnet50_2": ((256, 512, 1024, 2048), 2048),
    "mobilenet_v1": ((128, 256, 512, 1024), 1024),
    "mobilenet_v2": ((24, 32, 96, 1280), 1280),
    "mobilenet_v3_large": ((24, 40, 112, 960), 1280),
    "mobilenet_v3_small": ((16, 24, 48, 576), 1024),
    "efficientnet_b0": ((24, 40, 112, 1280), 1280),
    "efficientnet_v2_s": ((48, 64, 160, 1280), 1280),
    "shufflenet_v2_x1_0": ((24, 116, 232, 1024), 1024),
    "regnet_y_400mf": ((48, 104, 208, 440), 440),
    "densenet121": ((256, 512, 1024, 1024), 1024),
    "convnext_tiny": ((96, 192, 384, 768), 768),
    "swin_t": ((96, 192, 384, 768), 768),
    "swin_v2_t": ((96, 192, 384, 768), 768),
    "mnasnet1_0": ((24, 40, 96, 1280), 1280),
    "googlenet": ((192, 480, 832, 1024), 1024),
    "maxvit_t": ((64, 128, 256, 512), 512),
}
# name: image size, and (channels, side) of stem, stage 1, stage 2, … where convolutions without padding make odd sizes
ODD = {
    "alexnet": (224, [(64, 55), (64, 55), (192, 27), (256, 13), (256, 6)]),
    "squeezenet1_0": (224, [(96, 109), (256, 54), (512, 27), (512, 13)]),
    "squeezenet1_1": (224, [(64, 111), (128, 55), (256, 27), (512, 13)]),
    "inception_v3": (299, [(64, 147), (192, 71), (288, 35), (768, 17), (2048, 8)]),
}
# One network of each construction, small enough for a forward.
ACTIVATED = (
    *("cifar_resnet8", "cifar_resnet50", "cifar_wrn_16_2", "cifar_vgg8", "cifar_shufflenet_v1", "cifar_shufflenet_v2"),
    *("resnet18", "mobilenet_v1", "regnet_y_400mf"),
)
LINEAR = ("cifar_mobilenet_v2", "densenet121", "convnext_tiny", "swin_t")
LAST_ACTIVATIONS = {
    "mobilenet_v2": F.relu6,
    "efficientnet_b0": F.silu,
    "mobilenet_v3_small": F.hardswish,
    "shufflenet_v2_x1_0": F.relu,
    "mnasnet0_5": F.relu,
}
MORE_LINEAR_HEADS = (
    *("cifar_mobilenet_v2", "mobilenet_v2", "efficientnet_b0", "shufflenet_v2_x1_0", "swin_t", "mnasnet0_5"),
    "googlenet",
)


def on_meta(name: str, num_classes: int = 1000) -> nn.Module:
    with torch.device(
        "cpu" if name.startswith("regnet") else "meta"
    ):  # torchvision computes a RegNet's widths by torch
        return create_model(name, num_classes)


@cache
def all_shapes(name: str, image_size: int, num_classes: int = 1000) -> dict[str, tuple[int, ...]]:
    model = on_meta(name, num_classes)
    named = stages(model)
    return tap_shapes(FeatureTaps(model, named, tap_names(named)), image_size)


def small(name: str, *wanted: str) -> FeatureTaps:
    torch.manual_seed(0)
    model = create_model(name, 10)
    return FeatureTaps(model, stages(model), wanted)


def images(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", CIFAR)
def test_the_stages_of_a_cifar_network_are_the_literatures(name: str):
    maps, width = CIFAR[name]
    shapes = all_shapes(name, 32, 100)
    names = ["stem", *(f"stage{number}" for number in range(1, len(maps)))]
    assert {stage: shapes[stage] for stage in names} == {n: (c, s, s) for n, (c, s) in zip(names, maps, strict=True)}
    assert all(shapes[f"{stage}.preact"] == shapes[stage] for stage in names[1:])
    assert shapes["embedding"] == (width,)
    assert shapes["map"] == (width, maps[-1][1], maps[-1][1])
    assert shapes["logits"] == (100,)
    assert f"stage{len(maps)}" not in shapes


@pytest.mark.parametrize("name", IMAGENET)
def test_the_stages_of_an_imagenet_network_lie_at_56_to_7_pixels(name: str):
    shapes = all_shapes(name, 224)
    widths, embedding = IMAGENET[name]
    for number, (channels, side) in enumerate(zip(widths, (56, 28, 14, 7), strict=True), start=1):
        assert shapes[f"stage{number}"] == (channels, side, side)
        halved = name.startswith("shufflenet") and number in (2, 3)
        assert shapes[f"stage{number}.preact"] == (channels // (2 if halved else 1), side, side)
    assert shapes["stem"][1] in (56, 112)
    assert shapes["embedding"] == (embedding,)
    assert shapes["logits"] == (1000,)
    assert "stage5" not in shapes


@pytest.mark.parametrize("name", ODD)
def test_where_sizes_are_odd_a_stage_is_the_last_map_after_a_halving(name: str):
    size, maps = ODD[name]
    shapes = all_shapes(name, size)
    names = ["stem", *(f"stage{number}" for number in range(1, len(maps)))]
    assert {stage: shapes[stage] for stage in names} == {n: (c, s, s) for n, (c, s) in zip(names, maps, strict=True)}
    assert all(shapes[f"{stage}.preact"] == shapes[stage] for stage in names[1:])
    assert f"stage{len(maps)}" not in shapes


@pytest.mark.parametrize("name", ["vgg11", "vgg13_bn", "vgg19"])
def test_the_stages_of_a_vgg_are_its_blocks(name: str):
    shapes = all_shapes(name, 224)
    expected = {"stem": (64, 224), "stage1": (128, 112), "stage2": (256, 56), "stage3": (512, 28), "stage4": (512, 14)}
    assert {stage: shapes[stage] for stage in expected} == {s: (c, side, side) for s, (c, side) in expected.items()}
    assert shapes["embedding"] == (4096,)
    assert ("stage4.norm" in stages(on_meta(name))) == name.endswith("bn")


def test_the_stages_of_a_vision_transformer_are_the_quarters_of_its_layers():
    named = stages(on_meta("vit_b_16"))
    layers = [f"encoder.layers.encoder_layer_{number}:tokens" for number in (2, 5, 8)]
    assert [named[f"stage{number}"] for number in range(1, 5)] == [*layers, "encoder.ln:tokens"]
    shapes = all_shapes("vit_b_16", 224)
    assert {shapes[stage] for stage in ("stem", "stage1", "stage2", "stage3", "stage4")} == {(768, 14, 14)}
    assert shapes["embedding"] == (768,)


@pytest.mark.parametrize("name", [*CIFAR, *IMAGENET, "vgg13_bn"])
def test_the_batchnorm_that_ends_a_stage_has_its_width(name: str):
    model = on_meta(name)
    named = stages(model)
    shapes = all_shapes(name, *((32, 100) if name in CIFAR else (224,)))
    norms = {stage.removesuffix(".norm"): named[stage] for stage in named if stage.endswith(".norm")}
    for stage, path in norms.items():
        norm = model.get_submodule(path)
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.num_features == shapes[f"{stage}.preact"][0]
    without = ("cifar_shufflenet_v2", "densenet121", "convnext_tiny", "swin_t", "swin_v2_t", "googlenet", "maxvit_t")
    assert ("stage3" in norms) == (name not in without)


@pytest.mark.parametrize("name", ["cifar_vgg8", "cifar_wrn_16_2", "mobilenet_v1"])
def test_without_a_shortcut_the_pre_activation_is_the_batchnorms_output(name: str):
    taps = small(name, "all.preact").eval()
    seen = {}
    for tap in taps.paths:
        norm = taps.model.get_submodule(taps.stages[tap.replace("preact", "norm")])
        norm.register_forward_hook(lambda _m, _a, output, tap=tap: seen.update({tap: output.clone()}))
    features = taps(images()).features
    assert all(torch.equal(features[tap], value) for tap, value in seen.items())
    assert seen.keys() == features.keys()


@pytest.mark.parametrize("name", [*ACTIVATED, *LINEAR])
def test_a_stage_is_its_pre_activation_activated(name: str):
    features = small(name, "all", "all.preact")(images()).features
    names = [stage for stage in features if not stage.endswith("preact")]
    assert len(names) in (3, 4)
    for stage in names:
        before = features[f"{stage}.preact"]
        assert (before < 0).any()
        assert torch.equal(features[stage], before.relu() if name in ACTIVATED else before)


@pytest.mark.parametrize(("name", "size"), [("googlenet", 64), ("squeezenet1_1", 64), ("inception_v3", 96)])
def test_the_branches_of_a_stage_are_tapped_before_their_activations(name: str, size: int):
    taps = small(name, "all", "all.preact")
    # Their shallow stages are a single convolution, or two halves; the deeper ones have up to six branches.
    features = taps(images(size)).features
    for stage in [stage for stage in features if not stage.endswith("preact")]:
        before = features[f"{stage}.preact"]
        assert (before < 0).any()
        assert torch.equal(features[stage], before.relu())
    features["last.preact" if "last.preact" in features else "stage3.preact"].square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in taps.parameters() if parameter.grad is not None)


def test_the_pre_activation_of_a_shufflenet_stage_is_of_the_channels_that_its_last_block_activates():
    features = small("shufflenet_v2_x1_0", "all", "all.preact")(images(64)).features
    for stage in ("stage2", "stage3"):
        before = features[f"{stage}.preact"]
        assert (before < 0).any()
        # The shuffle puts the activated half at every second channel.
        assert torch.equal(features[stage][:, 1::2], before.relu())


def test_the_last_stage_of_an_alexnet_is_its_last_pool():
    features = small("alexnet", "all", "all.preact").eval()(images(224)).features
    assert torch.equal(features["stage4"], F.max_pool2d(features["stage3"], 3, 2))
    assert torch.equal(features["stage4"], features["stage4.preact"])
    assert all(torch.equal(features[f"stage{n}"], features[f"stage{n}.preact"].relu()) for n in (1, 2, 3))


@pytest.mark.parametrize("name", LAST_ACTIVATIONS)
def test_the_last_convolution_of_a_mobile_network_is_tapped_before_its_activation(name: str):
    features = small(name, "last", "last.preact")(images(64)).features
    assert torch.equal(features["last"], LAST_ACTIVATIONS[name](features["last.preact"]))


@pytest.mark.parametrize("name", [name for name in (*ACTIVATED, *LINEAR) if name.startswith("cifar")])
def test_taps_run_no_batchnorm_twice(name: str):
    """Published wide networks run the next block's BatchNorm again for a feature, and count each batch double."""
    taps = small(name, "all", "all.preact", "stem", "map").train()
    taps(images())
    counts = [m.num_batches_tracked.item() for m in taps.modules() if isinstance(m, nn.BatchNorm2d)]
    assert set(counts) == {1}


@pytest.mark.parametrize("name", [*ACTIVATED, *MORE_LINEAR_HEADS])
def test_the_average_of_the_class_activation_map_is_the_logits_without_the_bias(name: str):
    taps = small(name, "cam", "embedding").eval()
    with torch.no_grad():
        outputs = taps(images(64))
        head = taps.model.get_submodule(taps.stages["logits"])
    assert outputs.features["cam"].shape[1] == 10
    expected = outputs.features["cam"].mean((2, 3)) + head.bias
    torch.testing.assert_close(outputs.logits_BK, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs.logits_BK, head(outputs.features["embedding"]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "convnext_tiny", "vgg11", "vit_b_16", "alexnet", "maxvit_t"])
def test_a_head_of_more_than_one_linear_layer_has_no_class_activation_map(name: str):
    model = on_meta(name)
    with pytest.raises(ValueError, match=r"^tap 'cam': \w+ has no known average of a map before one linear layer; "):
        FeatureTaps(model, stages(model), ["cam"])


def test_a_channels_last_stage_is_the_networks_tensor_turned():
    taps = small("swin_t", "stage2", "last").eval()
    seen = []
    taps.model.get_submodule("norm").register_forward_hook(lambda _m, _a, output: seen.append(output))
    features = taps(images(64)).features
    assert seen[0].shape == (2, 2, 2, 768)
    assert torch.equal(features["last"], seen[0].permute(0, 3, 1, 2))
    assert features["stage2"].shape == (2, 192, 8, 8)


def test_last_is_the_deepest_stage_of_each_network():
    deepest = {"cifar_resnet8": "layer3", "resnet18": "layer4", "mobilenet_v1": "stage4", "cifar_wrn_16_1": "relu1"}
    for name, path in deepest.items():
        assert find_stage(stages(on_meta(name, 10)), "last") == path
    paths = {"stage9": "a", "stage10": "b", "stage10.preact": "c", "stage10.norm": "d"}
    assert find_stage(paths, "last.preact") == "c"
    assert find_stage(paths, "last.norm") == "d"


def test_a_stage_named_last_is_that_one():
    assert find_stage({"stage1": "a", "last": "b"}, "last") == "b"


def test_all_is_every_stage_the_shallowest_first():
    paths = {"stem": "s", "stage10": "b", "stage9": "a", "stage9.preact": "c", "map": "m"}
    assert deep_stages(paths, "all") == ["stage9", "stage10"]
    assert deep_stages(paths, "all.preact") == ["stage9.preact", "stage10.preact"]
    assert deep_stages(paths, "map") == ["map"]
    levels = {"fpn.p10": "a", "fpn.p3": "b", "fpn.p4.norm": "c", "head.class.p3": "d"}
    assert deep_stages(levels, "fpn") == ["fpn.p3", "fpn.p10"]
    assert deep_stages(levels, "head.class") == ["head.class.p3"]
    assert deep_stages(levels, "fpn.p3") == ["fpn.p3"]
    with pytest.raises(ValueError, match=r"^no stages of this network are known; name them under stages: \{stage1"):
        deep_stages({"embedding": "fc:in"}, "all")


def test_what_names_a_module_for_its_parameters_is_no_tap():
    assert tap_names({"stage1": "a", "stage1.preact": "b", "stage1.norm": "c"}) == ["stage1", "stage1.preact"]


def test_an_unknown_network_with_an_obvious_head_has_embedding_and_logits_only():
    classifier = nn.Sequential(nn.Dropout(), nn.Linear(4, 10))
    known = nn.Sequential(OrderedDict(body=nn.Conv2d(3, 4, 3), classifier=classifier))
    assert stages(known) == {"embedding": "classifier.0:in", "logits": "classifier.1"}
    assert stages(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())) == {}


def test_an_unknown_stage_is_refused_with_what_there_is_and_what_to_write():
    with pytest.raises(
        ValueError,
        match=r"^the network has no stage 'stage4': it has stem, stage1, stage1.preact, stage2,.*"
        r"stages: \{stage4: <module path>\}$",
    ):
        find_stage(stages(on_meta("cifar_resnet8", 10)), "stage4")
    with pytest.raises(ValueError, match="no stage 'embedding', because no known linear layer ends it: it has stem, "):
        find_stage(stages(on_meta("squeezenet1_0", 10)), "embedding")
    with pytest.raises(ValueError, match="no stage 'map', because no known linear layer takes the average of a map: "):
        find_stage(stages(on_meta("alexnet", 10)), "map")
    with pytest.raises(ValueError, match="no stage 'last': none is known; name it under stages"):
        find_stage({}, "last")
