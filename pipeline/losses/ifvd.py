"""Intra-class feature variation distillation, Wang et al., ECCV 2020: its part of features.

The paper adds KD of every pixel, which is a loss of its own, and a discriminator, which is not built here.

B batch, C D channels, H W space, K classes, N pixels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.losses._functional import l2_normalize, pool_to_smaller
from pipeline.losses._stages import FeatureMapLoss
from pipeline.tasks._masks import MASK, masks_at


def ifvd_loss(student_BCHW: Tensor, teacher_BDHW: Tensor, mask_BHW: Tensor, num_classes: int) -> Tensor:
    """Return the squared differences of the pixels' cosines to the centre of their class, averaged over all pixels.

    A pixel of no class is in no centre, and its difference is zero. It counts in the mean, as in published code.
    Maps of different size are average-pooled to the smaller one, and masks are sampled at that size. Numbers of
    channels may differ. No gradient reaches the teacher.
    """
    student_BCHW, teacher_BDHW = pool_to_smaller(student_BCHW, teacher_BDHW.detach())
    class_BN = masks_at(mask_BHW, *student_BCHW.shape[2:]).flatten(1)
    classes_K1 = torch.arange(num_classes, device=class_BN.device)[:, None]
    member_BKN = (class_BN[:, None] == classes_K1).to(student_BCHW.dtype)
    return F.mse_loss(class_similarities(student_BCHW, member_BKN), class_similarities(teacher_BDHW, member_BKN))


def class_similarities(map_BCHW: Tensor, member_BKN: Tensor) -> Tensor:
    """Return each pixel's cosine to the mean of its class's pixels in the same image, [B, N]; 0 without a class.

    ``member_BKN`` is 1 where the pixel is of the class, and 0 elsewhere.
    """
    pixels_BCN = map_BCHW.flatten(2)
    # A sum has the direction of the mean. All pixels meet all centres, and those of other classes are left out: a
    # product of matrices needs less memory than each pixel's centre.
    centres_BCK = l2_normalize(pixels_BCN @ member_BKN.mT, 1)
    return (centres_BCK.mT @ l2_normalize(pixels_BCN, 1) * member_BKN).sum(1)


class IFVD(FeatureMapLoss):
    """A loss that matches how near each pixel's feature is to the mean feature of its class in the image."""

    reads_labels = False
    takes_pixels = True
    targets = frozenset({MASK})

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the loss part ``ifvd``."""
        mask_BHW, classes = batch.targets[MASK], self.facts.num_classes
        pairs = zip(*self.maps(student, teacher), strict=True)
        return {"ifvd": torch.stack([ifvd_loss(*pair, mask_BHW, classes) for pair in pairs]).sum()}
