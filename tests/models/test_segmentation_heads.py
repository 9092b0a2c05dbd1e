"""The heads of segmenters compute what those of segmentation_models_pytorch compute with the same weights."""

from __future__ import annotations

import torch
from segmentation_models_pytorch.decoders.deeplabv3.decoder import DeepLabV3Decoder
from segmentation_models_pytorch.decoders.pspnet.decoder import PSPBlock
from torch import nn

from pipeline.models.segmentation_heads import POOLED_SIZES, PyramidPooling, atrous_rates, deeplab_head


def give_weights(theirs: nn.Module, ours: nn.Module) -> None:
    """Copy the tensors in their order, with BatchNorms that have seen something."""
    for module in ours.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
    names = list(theirs.state_dict())
    theirs.load_state_dict(dict(zip(names, ours.state_dict().values(), strict=True)))


@torch.no_grad()
def test_deeplabs_head_is_theirs():
    torch.manual_seed(0)
    for stride in (8, 16):
        ours = deeplab_head(64, 16, 5, stride).eval()
        decoder = DeepLabV3Decoder(64, 16, atrous_rates(stride), aspp_separable=False, aspp_dropout=0.5)
        theirs = nn.Sequential(decoder, nn.Conv2d(16, 5, 1)).eval()
        give_weights(theirs, ours)
        x_BCHW = torch.randn(2, 64, 24, 32)
        decoded = theirs[1](decoder([x_BCHW]))
        assert torch.equal(ours(x_BCHW), decoded)


@torch.no_grad()
def test_pspnets_pooled_maps_are_theirs():
    """Theirs has no BatchNorm behind the pool of one pixel, so that one is left out."""
    torch.manual_seed(0)
    ours, x_BCHW = PyramidPooling(32).eval(), torch.randn(2, 32, 12, 18)
    theirs = [PSPBlock(32, 8, size).eval() for size in POOLED_SIZES[1:]]
    for block, pool in zip(theirs, list(ours.pools)[1:], strict=True):
        give_weights(block, pool)
    same, _, *pooled = ours(x_BCHW).split([32, 8, 8, 8, 8], dim=1)
    assert torch.equal(same, x_BCHW)
    for block, found_BCHW in zip(theirs, pooled, strict=True):
        assert torch.allclose(found_BCHW, block(x_BCHW), atol=1e-6)
