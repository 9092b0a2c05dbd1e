"""Faster R-CNN: a first stage proposes regions of an image (RPN), and a second one classifies each of them (RoI).

Ren et al., NeurIPS 2015, arXiv:1506.01497, on a pyramid: Lin et al., CVPR 2017, arXiv:1612.03144.

B batch, A anchors of all levels, R regions of an image, K classes, C channels, H W cells of a level.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.ops.poolers import initLevelMapper

from pipeline.models.box_sampling import Objects, objects_of, sample_labels
from pipeline.models.detector import POSTPROCESSING, Detector, found_rows, no_rows
from pipeline.models.segmenter import has_hooks

REGION_TAPS = ("roi.boxes", "roi.class", "roi.box", "roi.targets")
"""Taps of the regions: what they are, what the second stage says of them, and what it should say."""
Size = tuple[int, int]
"""Height and width of an image."""


class FasterRCNNDetector(Detector, FasterRCNN):  # type: ignore[misc]  # another forward
    """Faster R-CNN with levels from P``first`` on, of which the coarsest is a pool of the one before.

    Its logits are those of the regions, [B, R, K], without the background's. R is 512 by default in training, where the
    boxes and the draws of an image choose its regions, and 1000 in evaluation. An image with fewer has zeros behind
    them.
    """

    heads = ("rpn", "roi_heads")
    takes_targets: ClassVar[bool] = True
    rpn: Any
    roi_heads: Any

    def __init__(self, backbone: nn.Module, num_classes: int, *, first: int = 2, **options: Any) -> None:
        postprocessing = {f"box_{name}": value for name, value in POSTPROCESSING.items()}
        super().__init__(backbone, num_classes + 1, **postprocessing, **options)
        levels = [f"p{number}" for number, _ in enumerate(self.rpn.anchor_generator.sizes, start=first)]
        self.add_taps(levels, ["rpn.class", "rpn.box"], ["anchors", "rpn.targets", *REGION_TAPS])
        _fix_scales(self.roi_heads.box_roi_pool, first)

    @property
    def num_classes(self) -> int:
        """Return the number of classes, without the background."""
        return self.roi_heads.box_predictor.cls_score.out_features - 1

    def _run_heads(self, images_BCHW: Tensor, maps: list[Tensor], targets: Mapping[str, Tensor] | None) -> Tensor:
        return self._run_stages(images_BCHW, maps, targets)  # pyright: ignore[reportCallIssue]  # by its decorator

    # The number of regions differs, for which torch.compile would compile this part again and again.
    @torch.compiler.disable
    def _run_stages(self, images_BCHW: Tensor, maps: list[Tensor], targets: Mapping[str, Tensor] | None) -> Tensor:
        """Return the logits of the regions, or [B, 0] without the second stage; give all that is computed to the taps.

        Raises ValueError in training without a batch's targets.
        """
        objectness, deltas = self.rpn.head(maps)
        for level, objectness_BCHW, deltas_BCHW in zip(self.levels, objectness, deltas, strict=True):
            self.tap(f"rpn.class.{level}", objectness_BCHW)
            self.tap(f"rpn.box.{level}", deltas_BCHW)
        sizes = [(images_BCHW.shape[2], images_BCHW.shape[3])] * len(images_BCHW)
        anchors: list[Tensor] = self.rpn.anchor_generator(ImageList(images_BCHW, sizes), maps)
        self.tap("anchors", torch.stack(anchors))
        objects = self._objects(targets, anchors[0])
        if self.is_read("rpn.targets"):
            self.tap("rpn.targets", self._anchor_targets(anchors, objects))
        if not (self.training or self.is_read("roi", "detections") or not has_hooks(self)):
            return images_BCHW.new_zeros(len(images_BCHW), 0)
        regions = self._propose(objectness, deltas, anchors, sizes)
        if objects:
            regions, learnt = self._choose(regions, objects)
            self.tap("roi.targets", self._as_rows(learnt, fill=-1))
        else:
            self.tap("roi.targets", anchors[0].new_full((len(regions), self._most_regions, 5), -1))
        return self._classify(maps, regions, sizes)

    def _objects(self, targets: Mapping[str, Tensor] | None, like: Tensor) -> list[Objects] | None:
        """Return the objects to learn, with boxes in the precision of ``like``; None where nothing is learnt."""
        if not self.training or like.is_meta:  # where no box can be compared
            return None
        if targets is None:
            raise ValueError("Faster R-CNN chooses what it learns from by a batch's boxes; in training give targets")
        return objects_of(targets, like.dtype)

    def _anchor_targets(self, anchors: list[Tensor], objects: list[Objects] | None) -> Tensor:
        """Return the box that each anchor should become, and its label, [B, A, 5].

        Labels are 1 of an object, 0 of the background, and −1 of an anchor that was not chosen.
        """
        if objects is None:
            return anchors[0].new_full((len(anchors), len(anchors[0]), 5), -1)
        boxes = [{"boxes": each.boxes_N4} for each in objects]
        labels, matched = self.rpn.assign_targets_to_anchors(anchors, boxes)
        rows = zip(matched, labels, objects, strict=True)
        return torch.stack([_joined(x_A4, self._sample("rpn", x_A, each.seeds[0])) for x_A4, x_A, each in rows])

    @torch.no_grad()
    def _propose(
        self, objectness: list[Tensor], deltas: list[Tensor], anchors: list[Tensor], sizes: list[Size]
    ) -> list[Tensor]:
        """Return the regions of each image, [R, 4], of a different number for each."""
        if anchors[0].is_meta:  # which has no scores to compare
            return [anchors[0].new_zeros(self._most_regions, 4)] * len(anchors)
        counts = [map_BCHW[0].numel() for map_BCHW in objectness]
        objectness_T1, deltas_T4 = concat_box_prediction_layers(objectness, deltas)
        proposals_BA4 = self.rpn.box_coder.decode(deltas_T4, anchors).view(len(anchors), -1, 4)
        return self.rpn.filter_proposals(proposals_BA4, objectness_T1, sizes, counts)[0]

    def _choose(self, regions: list[Tensor], objects: list[Objects]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the regions to learn from, and the box that each should become with its label, [R, 5].

        The boxes of the objects are among the regions. A label of 0 is the background's.
        """
        boxes, labels = [each.boxes_N4 for each in objects], [each.labels_N for each in objects]
        regions = self.roi_heads.add_gt_proposals(regions, boxes)
        matches, labels = self.roi_heads.assign_targets_to_proposals(regions, boxes, labels)
        chosen, learnt = [], []
        for boxes_N4, regions_P4, matches_P, labels_P, each in zip(
            boxes, regions, matches, labels, objects, strict=True
        ):
            labels_P = self._sample("roi_heads", labels_P, each.seeds[1])
            # An image without any object has a box of zeros, which no label refers to.
            matched_P4 = (boxes_N4 if len(boxes_N4) else boxes_N4.new_zeros(1, 4))[matches_P]
            chosen.append(regions_P4[labels_P >= 0])
            learnt.append(_joined(matched_P4, labels_P)[labels_P >= 0])
        return chosen, learnt

    def _sample(self, stage: str, labels_P: Tensor, seed: int) -> Tensor:
        """Return labels with −1 in place of those that a stage does not learn from."""
        sampler: BalancedPositiveNegativeSampler = self.get_submodule(stage).fg_bg_sampler  # type: ignore[assignment]
        return sample_labels(labels_P, seed, sampler.batch_size_per_image, sampler.positive_fraction)

    @property
    def _most_regions(self) -> int:
        """Return the largest number of regions of an image."""
        return self.roi_heads.fg_bg_sampler.batch_size_per_image if self.training else self.rpn.post_nms_top_n()

    def _classify(self, maps: list[Tensor], regions: list[Tensor], sizes: list[Size]) -> Tensor:
        """Return the logits of the regions, [B, R, K], and give all that the second stage computes to the taps."""
        pooled_TCHW = self._pool(maps, regions, sizes)
        logits_TK, deltas_TC = self.roi_heads.box_predictor(self.roi_heads.box_head(pooled_TCHW))
        counts = [len(each) for each in regions]
        self.tap("roi.boxes", self._as_rows(regions))
        self.tap("roi.box", self._as_rows(deltas_TC.split(counts)))
        if self.is_read("detections"):
            self.tap("detections", self._detections(logits_TK, deltas_TC, regions, sizes))
        return self.tap("roi.class", self._as_rows(logits_TK.split(counts)))[..., 1:]

    def _pool(self, maps: list[Tensor], regions: list[Tensor], sizes: list[Size]) -> Tensor:
        """Return the features of all regions, [T, C, 7, 7], each of the level that its size asks for."""
        pool: MultiScaleRoIAlign = self.roi_heads.box_roi_pool
        if regions[0].is_meta:  # where no level can be chosen
            return roi_align(maps[0], regions, pool.output_size)
        return pool(dict(zip(pool.featmap_names, maps, strict=False)), regions, sizes)

    def _as_rows(self, values: list[Tensor] | tuple[Tensor, ...], fill: float = 0) -> Tensor:
        """Return the rows of each image, [R, C], as [B, R, C] with ``fill`` behind them."""
        return torch.stack([F.pad(x_RC, (0, 0, 0, self._most_regions - len(x_RC)), value=fill) for x_RC in values])

    @torch.no_grad()
    def _detections(self, logits_TK: Tensor, deltas_TC: Tensor, regions: list[Tensor], sizes: list[Size]) -> Tensor:
        """Return what postprocessing finds, as ``found_rows``."""
        if self.training or logits_TK.is_meta:  # as above
            return no_rows(logits_TK, len(regions), training=self.training)
        columns = self.roi_heads.postprocess_detections(logits_TK, deltas_TC, regions, sizes)
        found = zip(*columns, strict=True)
        return torch.stack([found_rows({"boxes": b, "scores": s, "labels": k - 1}) for b, s, k in found])


def _joined(boxes_P4: Tensor, labels_P: Tensor) -> Tensor:
    return torch.cat([boxes_P4, labels_P[:, None].to(boxes_P4.dtype)], 1)


def _fix_scales(pool: MultiScaleRoIAlign, first: int) -> None:
    """Give the pool the scales of its levels, which it would infer from the first image, and rounds."""
    levels = range(first, first + len(pool.featmap_names))
    pool.scales = [2.0**-level for level in levels]
    pool.map_levels = initLevelMapper(levels[0], levels[-1], pool.canonical_scale, pool.canonical_level)
