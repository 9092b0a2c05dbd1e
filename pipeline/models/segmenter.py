"""Networks for semantic segmentation: a backbone, a head for the pixels, and sometimes an auxiliary head."""

from __future__ import annotations

from torch import Tensor, nn


class Segmenter(nn.Module):
    """A network that maps images [B, 3, H, W] to a map of logits [B, K, h, w], smaller than the image.

    ``backbone`` returns features by name. ``classifier`` takes the feature ``out``, or all of them with
    ``all_features``, and ``aux_classifier`` takes the feature ``aux``. The tensors of the state dict have the names of
    torchvision's segmentation networks. Those also enlarge their logits, and always compute the auxiliary head.
    """

    def __init__(
        self,
        backbone: nn.Module,
        classifier: nn.Module,
        aux_classifier: nn.Module | None = None,
        *,
        all_features: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.classifier = classifier
        self.aux_classifier = aux_classifier
        self.all_features = all_features

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return the logits of the main head; the auxiliary head runs only if a hook, such as a tap's, reads it."""
        features = self.backbone(images_BCHW)
        logits_BKHW = self.classifier(features if self.all_features else features["out"])
        if self.aux_classifier is not None and has_hooks(self.aux_classifier):
            self.aux_classifier(features["aux"])
        return logits_BKHW


def has_hooks(module: nn.Module) -> bool:
    """Return whether a hook, such as a tap's, reads the module or one in it."""
    return any(child._forward_hooks or child._forward_pre_hooks for child in module.modules())
