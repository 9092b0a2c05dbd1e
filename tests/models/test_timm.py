"""Networks of timm by name: their stages as maps, their weights by tag, and one line where the package is missing."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import authors_names
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.features.names import tap_names
from pipeline.features.taps import FeatureTaps, tap_shapes
from pipeline.models import create_model, from_timm
from pipeline.models.folding import fold_batchnorms
from pipeline.models.stages import stages
from pipeline.models.weights import load_weights, weights_sha256


@pytest.fixture
def timm():
    return pytest.importorskip("timm", reason="timm is not installed")


def on_meta(name: str, num_classes: int = 1000) -> nn.Module:
    with torch.device("meta"):
        return create_model(name, num_classes)


def all_shapes(model: nn.Module, image_size: int, *more: str) -> dict[str, tuple[int, ...]]:
    named = stages(model)
    return tap_shapes(FeatureTaps(model, named, [*tap_names(named), *more]), image_size)


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        ("resnet18", (64, 128, 256, 512)),
        ("mobilenetv1_100", (128, 256, 512, 1024)),
        ("tf_efficientnet_b0", (24, 40, 112, 1280)),
        ("convnext_tiny", (96, 192, 384, 768)),
        ("swin_tiny_patch4_window7_224", (96, 192, 384, 768)),
        ("swin_large_patch4_window7_224", (192, 384, 768, 1536)),
    ],
)
@pytest.mark.usefixtures("timm")
def test_the_stages_lie_at_56_to_7_pixels(name: str, widths: tuple[int, ...]):
    shapes = all_shapes(on_meta(f"timm/{name}"), 224)
    for number, (channels, side) in enumerate(zip(widths, (56, 28, 14, 7), strict=True), start=1):
        assert shapes[f"stage{number}"] == (channels, side, side)
    assert shapes["embedding"] == (widths[-1],)
    assert shapes["logits"] == (1000,)


@pytest.mark.parametrize(
    ("name", "activation", "norms"),
    [
        ("resnet18", F.relu, ["layer1.1.bn2", "layer2.1.bn2", "layer3.1.bn2", "layer4.1.bn2"]),
        ("seresnet50", F.relu, [None] * 4),
        ("regnety_004", F.relu, ["s1.b1.conv3.bn", "s2.b3.conv3.bn", "s3.b6.conv3.bn", "s4.b6.conv3.bn"]),
        ("mobilenetv1_100", F.relu, ["blocks.1.1.bn2", "blocks.2.1.bn2", "blocks.3.5.bn2", "blocks.4.1.bn2"]),
        ("efficientnet_b0", F.silu, ["blocks.1.1.bn3", "blocks.2.1.bn3", "blocks.4.2.bn3", "bn2"]),
        (
            "mobilenetv3_small_050",
            F.hardswish,
            ["blocks.0.0.bn2", "blocks.1.1.bn3", "blocks.3.1.bn3", "blocks.5.0.bn1"],
        ),
        ("densenet121", F.relu, [None, None, None, "features.norm5"]),
        ("convnext_atto", None, [None] * 4),
    ],
)
@pytest.mark.usefixtures("timm")
def test_a_stage_is_its_pre_activation_activated(
    name: str, activation: Callable[[Tensor], Tensor] | None, norms: list[str | None]
):
    torch.manual_seed(0)
    model = create_model(f"timm/{name}", 10).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)  # timm's zeros of the last one of a block would leave the shortcut alone
    named = stages(model)
    features = FeatureTaps(model, named, ["all", "all.preact"])(torch.randn(1, 3, 64, 64)).features
    # The bottlenecks of the mobile networks and the concatenations of DenseNet end linearly, all but the last stage.
    linear_until = {"efficientnet_b0": 3, "mobilenetv3_small_050": 3, "densenet121": 3, "convnext_atto": 4}.get(name, 0)
    for number in range(1, 5):
        stage, before = features[f"stage{number}"], features[f"stage{number}.preact"]
        assert (before < 0).any()
        assert torch.equal(stage, before if number <= linear_until or activation is None else activation(before))
    assert [named.get(f"stage{number}.norm") for number in range(1, 5)] == norms


@pytest.mark.usefixtures("timm")
def test_the_batchnorm_that_ends_a_stage_has_the_width_of_its_pre_activation():
    model = on_meta("timm/resnet50")
    named, shapes = stages(model), all_shapes(model, 64)
    for number in range(1, 5):
        norm = model.get_submodule(named[f"stage{number}.norm"])
        assert norm.num_features == shapes[f"stage{number}.preact"][0]


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
@pytest.mark.usefixtures("timm")
def test_the_stages_of_a_vision_transformer_are_maps_without_the_leading_tokens(name: str):
    shapes = all_shapes(on_meta(f"timm/{name}"), 224)
    assert {shapes[f"stage{number}"] for number in range(1, 5)} == {(192, 14, 14)}
    assert ("embedding" in shapes) == ("distilled" not in name)


@pytest.mark.usefixtures("timm")
def test_the_large_swin_transformer_has_the_published_size():
    assert sum(p.numel() for p in on_meta("timm/swin_large_patch4_window7_224").parameters()) == 196_532_476


@pytest.mark.usefixtures("timm")
def test_the_last_stage_of_a_swin_transformer_is_its_normed_map_turned():
    torch.manual_seed(0)
    model = create_model("timm/swin_tiny_patch4_window7_224", 10).eval()
    seen = []
    model.get_submodule("norm").register_forward_hook(lambda _m, _a, output: seen.append(output))
    with torch.no_grad():
        outputs = FeatureTaps(model, stages(model), ["last", "cam"])(torch.randn(1, 3, 224, 224))
    assert seen[0].shape == (1, 7, 7, 768)
    assert torch.equal(outputs.features["last"], seen[0].permute(0, 3, 1, 2))
    bias = model.get_submodule("head.fc").bias
    torch.testing.assert_close(outputs.features["cam"].mean((2, 3)) + bias, outputs.logits_BK, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["convnext_tiny", "vit_tiny_patch16_224"])
@pytest.mark.usefixtures("timm")
def test_a_head_that_normalises_or_reads_a_token_has_no_class_activation_map(name: str):
    model = on_meta(f"timm/{name}")
    with pytest.raises(ValueError, match=r"^tap 'cam': .* has no known average of a map"):
        FeatureTaps(model, stages(model), ["cam"])


@pytest.mark.usefixtures("timm")
def test_a_network_of_one_width_that_is_no_transformer_of_tokens_has_a_head_only():
    assert set(stages(on_meta("timm/mixer_s32_224"))) == {"embedding", "logits"}


@pytest.mark.parametrize(
    ("name", "stage", "shape"),
    [
        ("volo_d1_224", "stage2", "1, 28, 28, 192"),
        ("levit_128s", "stage3", "1, 196, 128"),
        ("efficientformer_l1", "stage4", "1, 49, 448"),
    ],
)
@pytest.mark.usefixtures("timm")
def test_a_stage_that_is_no_map_of_the_channels_it_is_said_to_have_is_refused(name: str, stage: str, shape: str):
    model = on_meta(f"timm/{name}")
    with pytest.raises(
        ValueError, match=rf"^tap '{stage}': .* a tensor shaped \[{shape}\], expected \d+ channels; give"
    ):
        tap_shapes(FeatureTaps(model, stages(model), [stage]), 224)


@pytest.mark.usefixtures("timm")
def test_where_the_channels_are_a_recipe_may_say():
    model = on_meta("timm/volo_d1_224")
    shapes = tap_shapes(FeatureTaps(model, {"stage2": "network.0:nhwc"}, ["stage2"]), 224)
    assert shapes["stage2"] == (192, 28, 28)


@pytest.mark.parametrize(
    ("name", "message"),
    [("timm/resnet_18", "did you mean timm/resnet18 or "), ("timm/resnet18.nothing", "Invalid pretrained tag")],
)
@pytest.mark.usefixtures("timm")
def test_an_unknown_network_or_tag_is_refused_in_one_line(name: str, message: str):
    with pytest.raises(ValueError, match=rf"^there is no model '{name}': .*{message}") as caught:
        create_model(name, 10)
    assert "\n" not in str(caught.value)


def test_without_timm_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    message = r"^timm/resnet18: timm is not installed; pip install timm \(or this project's extra 'timm'\)$"
    with pytest.raises(ValueError, match=message):
        create_model("timm/resnet18", 10)
    with pytest.raises(ValueError, match=message):
        load_weights(network(5), "pretrained", "timm/resnet18")


def network(classes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, classes))


class Published:
    """What the package offers, with a small network for whatever it is asked."""

    def __init__(self, classes: int) -> None:
        self.model = network(classes)
        self.asked: list[str] = []

    def create_model(self, name: str, pretrained: bool) -> nn.Module:
        assert pretrained
        self.asked.append(name)
        if "gone" in name:
            raise RuntimeError("No address.\nTry again.")
        return self.model


@pytest.mark.parametrize(
    ("model", "source", "asked"),
    [
        ("timm/resnet18", "tv_in1k", "resnet18.tv_in1k"),
        ("timm/resnet18", "pretrained", "resnet18"),
        ("timm/resnet18.a1_in1k", "pretrained", "resnet18.a1_in1k"),
        ("timm/resnet18.a1_in1k", "tv_in1k", "resnet18.tv_in1k"),
    ],
)
def test_published_weights_are_asked_for_by_tag(monkeypatch: pytest.MonkeyPatch, model: str, source: str, asked: str):
    published = Published(5)
    monkeypatch.setattr(from_timm, "_timm", lambda _name: published)
    fresh = network(5)
    load_weights(fresh, source, model)
    assert published.asked == [asked]
    assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in published.model.state_dict().items())


def test_weights_of_another_number_of_classes_are_refused_rather_than_given_a_random_head(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(from_timm, "_timm", lambda _name: Published(1000))
    with pytest.raises(ValueError, match=r"^pretrained: the weights have 1000 classes, the network and .* have 5"):
        load_weights(network(5), "pretrained", "timm/resnet18")


def test_weights_that_cannot_be_had_are_refused_in_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(from_timm, "_timm", lambda _name: Published(5))
    with pytest.raises(ValueError, match=r"^gone of timm/resnet18: no weights \(No address\.\); give a file$"):
        load_weights(network(5), "gone", "timm/resnet18")


@pytest.mark.usefixtures("timm")
def test_a_frozen_copy_keeps_the_activation_inside_its_batchnorms():
    torch.manual_seed(0)
    model = create_model("timm/tf_efficientnet_b0", 10).double().eval()
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        before = model(images)
        fold_batchnorms(model, images)
        torch.testing.assert_close(model(images), before, rtol=1e-9, atol=1e-9)


# -- checkpoints under the names of a network's authors, or of an older timm ------------------------------------------


def _older_densenet(name: str) -> str:
    return re.sub(r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.", name)


OLDER = {"timm/convnext_atto": authors_names.convnext, "timm/densenet121": _older_densenet}


def older(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return a network's state and the same under the names that its family had once; BatchNorms count no batches."""
    torch.manual_seed(1)
    state = {key: value for key, value in create_model(name, 7).state_dict().items() if "num_batches" not in key}
    renamed = {OLDER[name](key): value for key, value in state.items()}
    assert renamed.keys() != state.keys()
    return state, renamed


@pytest.mark.usefixtures("timm")
@pytest.mark.parametrize("name", OLDER)
@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"model": state, "epoch": 3}], ids=["bare", "in"])
def test_weights_under_names_that_timm_itself_translates_load_and_are_the_same_weights(
    tmp_path: Path, name: str, wrap: Callable[[dict[str, Tensor]], object]
):
    state, renamed = older(name)
    torch.save(wrap(renamed), tmp_path / "older.pt")
    torch.save(create_model(name, 7).state_dict() | state, tmp_path / "now.pt")
    model = create_model(name, 7)
    load_weights(model, str(tmp_path / "older.pt"), name)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    digests = {weights_sha256(str(tmp_path / file), name, 7) for file in ("older.pt", "now.pt")}
    assert len(digests) == 1


@pytest.mark.usefixtures("timm")
@pytest.mark.parametrize("spoil", ["lacking", "more", "classes", "another network"])
def test_what_timm_cannot_translate_whole_is_refused_and_nothing_is_left_at_random(tmp_path: Path, spoil: str):
    name = "timm/convnext_atto"
    _, state = older(name)
    if spoil == "lacking":
        state = {key: value for key, value in state.items() if "stages.2.1." not in key}
    elif spoil == "more":
        state["stages.9.0.gamma"] = torch.ones(3)
    elif spoil == "classes":
        state |= {"head.weight": state["head.weight"][:5], "head.bias": state["head.bias"][:5]}
    else:
        _, state = older("timm/densenet121")
    torch.save(state, tmp_path / "older.pt")
    model = create_model(name, 7)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"older\.pt: weights of another architecture than timm/convnext_atto: "):
        load_weights(model, str(tmp_path / "older.pt"), name)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
