"""Tokens become the map that they were cut from: those of no place are left out, whatever their number."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision.models
from torch import Tensor, nn

from pipeline.features.taps import FeatureTaps
from pipeline.models.stages import stages


class Patches(nn.Module):
    """A user's transformer that blends nothing: tokens are their patches' means, behind ``before`` others."""

    def __init__(self, before: int, patch: tuple[int, int], name: str | None = None) -> None:
        super().__init__()
        self.patch = patch
        self.before = before
        if name:
            self.register_parameter(name, nn.Parameter(torch.full((1, before, 3), 9.0)))
        self.norm = nn.Identity()
        self.classify = nn.Linear(3, 2)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return logits."""
        tokens_BNC = nn.functional.avg_pool2d(images_BCHW, self.patch).flatten(2).mT
        before_BNC = tokens_BNC.new_full((len(tokens_BNC), self.before, 3), 9.0)
        return self.classify(self.norm(torch.cat([before_BNC, tokens_BNC], 1)).mean(1))


def mapped(model: nn.Module, place: str, height: int = 32, width: int = 32) -> tuple[Tensor, Tensor]:
    """Return the map at a place, and the images."""
    images_BCHW = torch.randn(2, 3, height, width)
    return FeatureTaps(model, {"x": place}, ["x"])(images_BCHW).features["x"], images_BCHW


def pooled(images_BCHW: Tensor, patch: tuple[int, int]) -> Tensor:
    return nn.functional.avg_pool2d(images_BCHW, patch)


@pytest.mark.parametrize("before", [0, 1, 2, 5, 7])
@pytest.mark.parametrize("side", [32, 64])
def test_the_number_that_a_recipe_gives_is_left_out(before: int, side: int):
    found, images_BCHW = mapped(Patches(before, (16, 16)), f"norm:tokens+{before}:3", side, side)
    torch.testing.assert_close(found, pooled(images_BCHW, (16, 16)))


@pytest.mark.parametrize("name", ["cls_token", "class_token", "register_tokens", "reg_token"])
@pytest.mark.parametrize("before", [1, 5])
def test_a_network_says_the_number_by_its_parameters(name: str, before: int):
    found, images_BCHW = mapped(Patches(before, (16, 16), name), "norm:tokens")
    torch.testing.assert_close(found, pooled(images_BCHW, (16, 16)))


@pytest.mark.parametrize("before", [0, 1, 2, 5])
def test_where_nothing_says_it_the_map_is_of_whole_patches(before: int):
    """Five and four tokens are nine, and 32 pixels are no three patches."""
    found, images_BCHW = mapped(Patches(before, (16, 16)), "norm:tokens")
    torch.testing.assert_close(found, pooled(images_BCHW, (16, 16)))


@pytest.mark.parametrize(("height", "width"), [(32, 64), (64, 32), (48, 16)])
def test_a_map_has_the_proportions_of_the_image(height: int, width: int):
    found, images_BCHW = mapped(Patches(5, (16, 16)), "norm:tokens+5", height, width)
    torch.testing.assert_close(found, pooled(images_BCHW, (16, 16)))


def test_rows_and_columns_are_given_where_patches_are_no_squares():
    model = Patches(5, (16, 8))
    with pytest.raises(
        ValueError, match=r"13 tokens, 5 of them prefix tokens, which do not form a map of a 32 × 32 image; give"
    ):
        mapped(model, "norm:tokens+5")
    found, images_BCHW = mapped(model, "norm:tokens+5@2x4")
    torch.testing.assert_close(found, pooled(images_BCHW, (16, 8)))
    with pytest.raises(ValueError, match="13 tokens, 4 of them"):
        mapped(model, "norm:tokens+4@2x4")


@pytest.mark.parametrize(
    ("name", "keys", "shape"),
    [
        ("vit_tiny_patch16_224", {"img_size": 32, "reg_tokens": 4}, (2, 2)),
        ("vit_tiny_patch16_224", {"img_size": 32, "reg_tokens": 0}, (2, 2)),
        ("vit_tiny_patch16_224", {"img_size": 32, "class_token": False, "global_pool": "avg", "reg_tokens": 5}, (2, 2)),
        ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": (16, 8), "reg_tokens": 4}, (2, 4)),
        ("deit_tiny_distilled_patch16_224", {"img_size": 32}, (2, 2)),
        ("cait_xxs24_224", {"img_size": 64}, (4, 4)),  # the class token comes after the stages
    ],
)
def test_timms_transformers_are_asked_for_theirs(name: str, keys: dict, shape: tuple[int, int]):
    model = timm.create_model(name, num_classes=3, **keys).eval()
    taps = FeatureTaps(model, stages(model), ["stage1", "stage4"])
    with torch.no_grad():
        features = taps(torch.randn(1, 3, keys["img_size"], keys["img_size"])).features
    assert {tuple(value.shape[2:]) for value in features.values()} == {shape}
    captured = {}  # what the map is made of are the last tokens
    model.norm.register_forward_hook(lambda _m, _a, output: captured.update(norm=output))
    with torch.no_grad():
        last = taps(torch.randn(1, 3, keys["img_size"], keys["img_size"])).features["stage4"]
    assert torch.equal(last.flatten(2).mT, captured["norm"][:, -shape[0] * shape[1] :])


def test_torchvisions_transformer_has_one():
    model = torchvision.models.VisionTransformer(32, 16, 4, 2, 8, 16, num_classes=3)
    assert FeatureTaps(model, stages(model), ["stage4"])(torch.randn(1, 3, 32, 32)).features["stage4"].shape[1:] == (
        8,
        2,
        2,
    )
