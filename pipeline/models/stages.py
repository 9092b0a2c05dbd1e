"""The canonical stages ``stem, stage1 … stage4, map, embedding, logits`` of a network, by module path.

``layer4`` is that module's output, ``layer4.1.relu:in`` its last call's input. An ending ``:nhwc`` says that the tensor
has its channels last, ``:tokens`` that it is a row of tokens [N, C]; both are read as maps [C, H, W]. ``:tokens+5``
says that the first 5 have no place in the image, ``:tokens+5@7x14`` into which rows and columns the others go. A
number, as in ``layer4:512``, is how many channels the map must have.

A stage's output comes after its last activation and ``.preact`` before it; they are one tensor where it ends linearly.
``stageN.norm`` is no tap but a module: the BatchNorm whose output ``.preact`` is, or was before a shortcut was added.
``map`` is what the last linear layer takes the average of, and ``embedding`` is what it takes. In networks for ImageNet
stage n is the last tensor of 1 / 2ⁿ⁺¹ of the image's width, but for VGG, whose blocks are its stages as on CIFAR.
"""

from __future__ import annotations

from torch import nn

from pipeline.models.families import FAMILIES, head
from pipeline.models.from_timm import is_timm, timm_stages


def stages(model: nn.Module) -> dict[str, str]:
    """Return the module path of each canonical stage of ``model``.

    Of a network of no known family only the embedding and the logits are named, and only where its head is obvious.
    """
    for family, paths in FAMILIES.items():
        if isinstance(model, family):
            return paths(model)
    return timm_stages(model) if is_timm(model) else head(model)
