"""Networks that find objects: a backbone with a feature pyramid, and heads that all of its levels share.

B batch, A anchors of all levels, K classes, C channels, H W cells of a level, R rows of an image.

Torchvision's networks resize and normalise images, and compute their losses, inside ``forward``. Here the loader and
the losses do that, so only the networks' parts are called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.image_list import ImageList

from pipeline.models.segmenter import has_hooks

MOST_DETECTIONS = 100
"""Largest number of boxes that are found in an image, as in COCO's metrics."""
POSTPROCESSING: dict[str, Any] = {"score_thresh": 0.05, "nms_thresh": 0.5, "detections_per_img": MOST_DETECTIONS}
"""Settings of torchvision's postprocessing, as in the published tables of COCO."""
OUTPUTS = {"class": "cls_logits", "box": "bbox_regression", "centre": "bbox_ctrness"}
"""Torchvision's names of what heads compute, by the names in taps."""


class Detector(nn.Module):
    """A network that maps images [B, 3, H, W] to the logits of the classes of boxes.

    Those of one stage, which are the bases of RetinaNet and FCOS, have logits of all anchors, [B, A, K]. Networks are
    subclasses of torchvision's, which share their state dict. ``taps`` are modules without weights that hooks read.
    Heads run in training, where a hook reads what they compute, and in a network without any hook; otherwise the logits
    are [B, 0]. They run in float32, whatever the precision of the backbone.
    """

    heads: ClassVar[tuple[str, ...]]
    """Names of the modules behind the pyramid."""
    takes_targets: ClassVar[bool] = False
    """Whether ``forward`` needs a batch's targets in training."""
    backbone: nn.Module
    taps: nn.ModuleDict
    levels: tuple[str, ...]
    """Names of the levels of the pyramid, such as ``p3``, whose cells are 2³ pixels wide."""

    def add_taps(self, levels: Sequence[str], maps: Sequence[str], others: Sequence[str]) -> None:
        """Add the modules that hooks read: maps of all ``levels`` of the pyramid and of heads, and other tensors."""
        self.levels = tuple(levels)
        names = [f"{kind}.{level}" for kind in ("fpn", *maps) for level in levels] + [*others, "detections"]
        # A module's name may not hold a dot.
        self.taps = nn.ModuleDict({name.replace(".", "_"): nn.Identity() for name in names})

    def tap_paths(self) -> dict[str, str]:
        """Return the path of each of the taps, by the names that ``pipeline.models.stages`` explains."""
        kept = [name for name in self.taps if self.has_head or name.startswith("fpn_")]
        return {name.replace("_", "."): f"taps.{name}" for name in kept}

    @property
    def has_head(self) -> bool:
        """Return whether the network has its heads, which a teacher of features may be without."""
        return any(True for _ in self._head_tensors())

    @property
    def num_classes(self) -> int:
        """Return the number of classes, without a background. The network must have its heads."""
        raise NotImplementedError

    def forward(self, images_BCHW: Tensor, targets: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the logits of the classes, or [B, 0] where the heads do not run."""
        maps = list(self.backbone(images_BCHW).values())
        maps = [self.tap(f"fpn.{level}", x_BCHW) for level, x_BCHW in zip(self.levels, maps, strict=True)]
        if not self._runs_heads():
            return images_BCHW.new_zeros(len(images_BCHW), 0)
        device = images_BCHW.device.type
        # torch has no autocast on the meta device.
        with nullcontext() if device == "meta" else torch.autocast(device, enabled=False):
            dtype = next(self._head_tensors()).dtype
            return self._run_heads(images_BCHW, [x_BCHW.to(dtype) for x_BCHW in maps], targets)

    def tap(self, name: str, value: Tensor) -> Tensor:
        """Give a tensor to the hooks of a tap, and return it."""
        return self.taps[name.replace(".", "_")](value)

    def is_read(self, *names: str) -> bool:
        """Return whether a hook reads one of the taps of those names, or of a group of that name."""
        ours = (tap for tap in self.taps if tap.startswith(tuple(name.replace(".", "_") for name in names)))
        return any(has_hooks(self.taps[tap]) for tap in ours)

    def _runs_heads(self) -> bool:
        read = self.is_read(*(tap for tap in self.taps if not tap.startswith("fpn_")))
        return self.has_head and (self.training or read or not has_hooks(self))

    def _head_tensors(self) -> Iterator[Tensor]:
        """Yield the parameters of the heads, and then their buffers."""
        modules = [self.get_submodule(name) for name in self.heads]
        for module in modules:
            yield from module.parameters()
        for module in modules:
            yield from module.buffers()

    def _run_heads(self, images_BCHW: Tensor, maps: list[Tensor], targets: Mapping[str, Tensor] | None) -> Tensor:
        """Return the logits of the classes, and give all that the heads compute to the taps."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or convert all tensors, but leave the heads in their precision where ``fn`` would halve it."""
        of_heads = {id(tensor) for tensor in self._head_tensors()}

        def moved(tensor: Tensor) -> Tensor:
            found = fn(tensor)
            halves = id(tensor) in of_heads and found.dtype in (torch.float16, torch.bfloat16)
            return tensor.to(found.device) if halves else found

        return super()._apply(moved, recurse)


class OneStageDetector(Detector):
    """A detector whose heads compute class and box of every anchor of every cell."""

    heads = ("head",)
    head: nn.Module
    anchor_generator: Any
    postprocess_detections: Callable[..., Any]

    def add_head_taps(self, *kinds: str) -> None:
        """Add the modules that hooks read, for a head with those ``kinds`` of maps."""
        levels = [f"p{number}" for number, _ in enumerate(self.anchor_generator.sizes, start=3)]
        self.add_taps(levels, [f"head.{kind}" for kind in kinds], ["anchors", "regression"])

    @property
    def num_classes(self) -> int:
        """Return the number of classes."""
        classes: Any = self.get_submodule("head.classification_head")
        return classes.num_classes

    def _run_heads(self, images_BCHW: Tensor, maps: list[Tensor], targets: Mapping[str, Tensor] | None) -> Tensor:
        """Return the logits of the classes of all anchors, and give all that the heads compute to the taps."""
        outputs: dict[str, Tensor] = self.head(maps)
        cells = zip(maps, self.anchor_generator.num_anchors_per_location(), strict=True)
        counts = [x_BCHW.shape[2] * x_BCHW.shape[3] * anchors for x_BCHW, anchors in cells]
        for kind, name in OUTPUTS.items():
            if name in outputs:
                self._tap_levels(kind, outputs[name].split(counts, 1), maps)
        if self.is_read("regression"):
            regression = [outputs[name] for kind, name in OUTPUTS.items() if kind != "class" and name in outputs]
            self.tap("regression", torch.cat(regression, 2))
        if self.is_read("anchors", "detections"):
            size = (images_BCHW.shape[2], images_BCHW.shape[3])
            anchors_A4 = self.anchor_generator(ImageList(images_BCHW, [size]), maps)[0]
            self.tap("anchors", anchors_A4.expand(len(images_BCHW), -1, -1))
            if self.is_read("detections"):
                self.tap("detections", self._detections(outputs, anchors_A4, counts, size))
        return outputs["cls_logits"]

    def _tap_levels(self, kind: str, rows: tuple[Tensor, ...], maps: list[Tensor]) -> None:
        """Give a head's rows of anchors, [B, H·W·anchors, C] of each level, to the taps as maps [B, anchors·C, H, W].

        A tower runs once for each level, so a hook on its own modules would keep the last level alone.
        """
        for level, level_BRC, x_BCHW in zip(self.levels, rows, maps, strict=True):
            height, width = x_BCHW.shape[2:]
            self.tap(f"head.{kind}.{level}", level_BRC.view(len(x_BCHW), height, width, -1).permute(0, 3, 1, 2))

    @torch.no_grad()
    def _detections(
        self, outputs: dict[str, Tensor], anchors_A4: Tensor, counts: list[int], size: tuple[int, int]
    ) -> Tensor:
        """Return what postprocessing finds, as ``found_rows``."""
        images = len(outputs["cls_logits"])
        if self.training or anchors_A4.is_meta:  # which has no scores to compare
            return no_rows(anchors_A4, images, training=self.training)
        levels = {name: list(value.split(counts, 1)) for name, value in outputs.items()}
        anchors = [list(anchors_A4.split(counts))] * images
        return torch.stack([found_rows(each) for each in self.postprocess_detections(levels, anchors, [size] * images)])


def no_rows(like: Tensor, images: int, *, training: bool) -> Tensor:
    """Return detections without any box: none in training, [B, 0, 6], and else zeros."""
    return like.new_zeros(images, 0 if training else MOST_DETECTIONS, 6)


def found_rows(found: dict[str, Tensor]) -> Tensor:
    """Return the boxes that are found in an image, [100, 6], the best first: box, score and class.

    Rows behind them are zeros with class −1.
    """
    scores, classes = found["scores"][:, None], found["labels"][:, None]
    rows_N6 = torch.cat([found["boxes"], scores, classes.to(scores.dtype)], 1)
    padded_N6 = F.pad(rows_N6, (0, 0, 0, MOST_DETECTIONS - len(rows_N6)))
    padded_N6[len(rows_N6) :, 5] = -1
    return padded_N6


class RetinaNetDetector(OneStageDetector, RetinaNet):  # type: ignore[misc]  # another forward
    """RetinaNet, Lin et al., ICCV 2017, arXiv:1708.02002."""

    def __init__(self, backbone: nn.Module, num_classes: int, **options: Any) -> None:
        super().__init__(backbone, num_classes, **POSTPROCESSING, **options)
        self.add_head_taps("class", "box")


class FCOSDetector(OneStageDetector, FCOS):  # type: ignore[misc]  # another forward
    """FCOS, Tian et al., ICCV 2019, arXiv:1904.01355, with one anchor for each cell."""

    def __init__(self, backbone: nn.Module, num_classes: int, **options: Any) -> None:
        super().__init__(backbone, num_classes, **POSTPROCESSING, **options)
        self.add_head_taps("class", "box", "centre")
