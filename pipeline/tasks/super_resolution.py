"""Super-resolution: a network enlarges an image.   B batch, C colours, H W pixels of the large image, N images.

The logits are the large image, of values in 0 … 1. The metrics are those of ``_image_quality.py`` for each image,
averaged over the images. As many pixels at each edge are left out as the image is enlarged.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.bicubic import bicubic_upscaled
from pipeline.distributed.collectives import gather_rows
from pipeline.tasks._base import Details, Evaluation, Seen, Task
from pipeline.tasks._high import HIGH, as_levels
from pipeline.tasks._image_quality import psnr, quality, to_pixels


class SuperResolution(Task):
    """PSNR and SSIM of the luma of restored images."""

    titles: ClassVar[dict[str, str]] = {"psnr": "PSNR", "ssim": "SSIM"}
    units: ClassVar[dict[str, str]] = {"psnr": "dB"}
    training_metric = "psnr"
    images_have = "have smaller copies"
    script = "shards/prepare_super_resolution.py"
    targets = frozenset({HIGH})
    of_images = True

    def blank_targets(self, rows: int, num_classes: int, size: tuple[int, int]) -> dict[str, Tensor]:
        """Return black images."""
        return {HIGH: torch.zeros(rows, 3, *size, dtype=torch.uint8)}

    def wrong_logits(self, shape: tuple[int, ...], size: tuple[int, int]) -> str | None:
        """Return what is wrong with the size of a network's images; None if it is that of the targets."""
        if shape == (3, *size):
            return None
        found, expected = (" × ".join(map(str, sides)) for sides in (shape, (3, *size)))
        return (
            f"it returns {found} numbers for an image of {expected}; give the network's scale the value of "
            "data.upscale, or take a network that enlarges images"
        )

    def measure_batch(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Return PSNR over all colours and pixels of the batch, which are not rounded."""
        return psnr(outputs.logits.detach() * 255, batch.targets[HIGH]).float()

    def see(self, outputs: Outputs, batch: Batch) -> Seen:
        """Return the ids, and PSNR, SSIM and the mean absolute error of each image."""
        return batch.ids_B, self.detail_rows(outputs, batch)

    def summarize(self, seen: Iterable[Seen]) -> Evaluation:
        """Return the means over the images of PSNR in dB, SSIM in percent, and the absolute error."""
        ids_N, rows_NC = (gather_rows(torch.cat(columns)) for columns in zip(*seen, strict=True))
        # In the order of the ids, so that sums do not depend on the number of ranks. Padding has id −1.
        order = ids_N.argsort()[int((ids_N < 0).sum()) :]
        rows_NC = rows_NC[order]
        return Evaluation(_means(rows_NC), len(order), rows_NC[:, 2].mean().item())

    def agreement(self, a: Outputs, b: Outputs, batch: Batch) -> Tensor:
        """Return the number of pixels' colours that are the same after rounding, and that of all of them."""
        real_B111 = (batch.labels_B >= 0)[:, None, None, None]
        same_BCHW = (to_pixels(a.logits) == to_pixels(b.logits)) & real_B111
        return torch.stack([same_BCHW.sum(), real_B111.expand_as(same_BCHW).sum()])

    def detail_rows(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Return PSNR, SSIM and the mean absolute error, then PSNR and SSIM of bicubic interpolation."""
        high_BCHW = batch.targets[HIGH]
        scale = high_BCHW.shape[2] // batch.images_BCHW.shape[2]
        bicubic_BCHW = to_pixels(bicubic_upscaled(batch.images_BCHW.float(), scale))
        errors_B = (outputs.logits.double() - as_levels(high_BCHW, torch.float64)).abs().mean((1, 2, 3))
        images = zip(to_pixels(outputs.logits), bicubic_BCHW, high_BCHW, errors_B, strict=True)
        rows = [
            torch.stack([*quality(ours, truth, scale), error, *quality(bicubic, truth, scale)])
            for ours, bicubic, truth, error in images
        ]
        return torch.stack(rows)

    def detail(self, rows_NC: Tensor, num_classes: int, accepted_NK: Tensor | None = None) -> Details:
        """Return PSNR and SSIM, and those of bicubic interpolation."""
        bicubic = {f"bicubic_{name}": value for name, value in _means(rows_NC[:, 3:]).items()}
        return Details({**_means(rows_NC), **bicubic, "nll": None, "ece": None})

    def divergence(self, teacher: Outputs, student: Outputs) -> Tensor | None:
        """Return None: an image has no distribution."""
        return None


def _means(rows_NC: Tensor) -> dict[str, float]:
    return {"psnr": rows_NC[:, 0].mean().item(), "ssim": 100 * rows_NC[:, 1].mean().item()}
