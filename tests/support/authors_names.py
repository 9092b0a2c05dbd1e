"""Names that a network's authors gave to its tensors, where timm's are others."""

from __future__ import annotations

import re


def convnext(name: str) -> str:
    """Return the authors' name of a tensor of timm's ConvNeXt."""
    name = re.sub(r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1.", name).replace(
        "stem.", "downsample_layers.0."
    )
    name = re.sub(r"^(stages\.\d)\.blocks\.", r"\1.", name).replace("head.fc.", "head.").replace("head.norm.", "norm.")
    return name.replace("conv_dw.", "dwconv.").replace("mlp.fc", "pwconv")
