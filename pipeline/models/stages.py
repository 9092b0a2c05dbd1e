"""The canonical stages ``stem, stage1 … stage4, map, embedding, logits`` of a network, by module path.

A segmentation network has ``decode, logits, aux`` after its stages. A detector has the levels of its feature pyramid,
the maps of its heads, and its boxes.

The syntax of a path:

- ``layer4``: the output of that module.
- ``layer4.1.relu:in``: the input of that module's last call.
- ``…:nhwc``: the tensor has its channels last; it is read as a map [C, H, W].
- ``…:tokens``: the tensor is a sequence of tokens [N, C]; it is read as a map [C, H, W].
- ``…:tokens+5``: the first 5 tokens are prefix tokens, which do not belong to the map.
- ``…:tokens+5@7x14``: the other tokens form 7 rows and 14 columns.
- ``layer4:512``: the map must have 512 channels.
- ``…:copy``: the tensor is copied at once, because the network overwrites it.
- ``a|b``: the tensors at the paths ``a`` and ``b``, with their channels concatenated.

The meaning of a name:

- ``stageN`` is the tensor after a stage's last activation.
- ``stageN.preact`` is the tensor before it; the same tensor if the stage ends linearly or in a pool.
- ``stageN.norm`` is no tap, but a module: the BatchNorm that ends ``stageN.preact``, before a shortcut is added.
- ``map`` is the tensor that is averaged for the last linear layer.
- ``embedding`` is the input of the last linear layer.
- ``subclasses`` are the logits of all subclasses, of a network with ``arguments: {subclasses: …}``.
- ``decode`` is the map that the last convolution of a segmentation network's main head reads, before dropout.
- ``aux`` is the output of its auxiliary head, which runs only if it is tapped.
- ``backbone.stageN`` is ``stageN`` of a detector.
- ``fpn.pN`` is a level of its feature pyramid, whose cells are 2ᴺ pixels wide.
- ``head.class.pN``, ``head.box.pN`` and, of FCOS, ``head.centre.pN`` are maps of its heads. An anchor's channels stand
  together.
- ``anchors`` are the boxes of all anchors, float32 [B, A, 4] in pixels.
- ``regression`` is what the heads of one stage say of each anchor's box, [B, A, 4]; that of FCOS ends with the
  centre-ness.
- ``rpn.class.pN`` and ``rpn.box.pN`` are the maps of the first of two stages: objectness and box of every anchor.
- ``roi.boxes`` are the regions of the second stage, [B, R, 4]. Rows behind an image's last are zero. ``roi.class``,
  [B, R, 1 + K] with the background first, and ``roi.box``, [B, R, 4 + 4·K], are what it says of them.
- ``rpn.targets`` and ``roi.targets`` are the box that each anchor or region should become, and its label, [B, …, 5].
  The label is 0 of the background and −1 of what the network did not choose to learn from, as all in evaluation.
- ``detections`` are the boxes that it finds, [B, 100, 6], the best first: left, top, right, bottom, score and class.
  In training there are none.
- ``expanding`` is what the last convolution of FSRCNN reads.

In networks for ImageNet, stage n is the last tensor with 1 / 2ⁿ⁺¹ of the image's width. In VGGs a stage is a block, on
ImageNet as on CIFAR. Where convolutions without padding make odd widths, stage n is the last tensor after n + 1
halvings. AlexNet's four stages are 55, 27, 13 and 6 pixels wide, the last a pool. SqueezeNet halves four times, so it
has three stages. It has no ``map`` and no ``embedding``: its last layer is a convolution, and the average of its
activated output is the logits. In ShuffleNetV2, a stage's last activation is of half of the channels, which are its
``.preact``.

In segmentation networks, stage n is that of the classification network with the same backbone. The last two are larger
there by the strides that dilations replace.

In networks of super-resolution all stages have the size of the small image. ``stage1`` and ``stage2`` are the ends of
the thirds of EDSR's and RCAN's body, and ``stage3`` is the sum after the skip around it.
"""

from __future__ import annotations

from torch import nn

from pipeline.models.families import FAMILIES, head
from pipeline.models.from_timm import is_timm, timm_stages
from pipeline.models.subclasses import SUBCLASSES, SubclassHead


def stages(model: nn.Module) -> dict[str, str]:
    """Return the module path of each canonical stage of ``model``.

    For a network of an unknown family only ``map``, ``embedding`` and ``logits`` are returned, if its head is obvious.
    """
    found = _family_stages(model)
    if "logits" in found and isinstance(model.get_submodule(found["logits"]), SubclassHead):
        found[SUBCLASSES] = f"{found['logits']}.scores"
    return found


def _family_stages(model: nn.Module) -> dict[str, str]:
    for family, paths in FAMILIES.items():
        if isinstance(model, family):
            return paths(model)
    return timm_stages(model) if is_timm(model) else head(model)
