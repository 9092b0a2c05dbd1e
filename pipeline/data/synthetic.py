"""A decoder that returns noise instead of images, to measure a step that never waits for input.

The noise is drawn once, on the device. Ids, labels, boxes and order come from the shards' tables; no tar is opened.

Shape suffixes: B rows of a request, C channels, H W space.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator

import torch
from torch import Tensor

from pipeline.batch import Batch
from pipeline.data.config import Config
from pipeline.data.requests import SampleRequest
from pipeline.image_size import height_width
from pipeline.tasks._high import HIGH
from pipeline.tasks._masks import MASK


def synthetic_fingerprint() -> dict[str, str]:
    """Return the fingerprint of noise: a cache that was made on noise must not be used with images."""
    return {"backend": "synthetic"}


class SyntheticDecoder:
    """A decoder that gives the same noise to every request. ``batch`` is the largest number of rows in a request.

    ``mask_classes`` is the number of classes of images with masks, whose pixels then have random ones.
    """

    def __init__(self, config: Config, batch: int, device: torch.device, mask_classes: int | None = None) -> None:
        self._device = device
        draws = torch.Generator(device).manual_seed(config.seed)
        self._size = height_width(config.size)
        self._images: dict[tuple[int, int], Tensor] = {}
        for size in [self._size] if config.crop != "keep_ratio" else config.bucket_sizes:
            images_BCHW = torch.randn(batch, *size, 3, generator=draws, device=device).permute(0, 3, 1, 2)
            self._images[size] = images_BCHW if config.channels_last else images_BCHW.contiguous()
        self._targets: dict[str, Tensor] = {}
        if mask_classes:
            size = (batch, *height_width(config.size))
            masks_BHW = torch.randint(mask_classes, size, dtype=torch.uint8, generator=draws, device=device)
            self._targets = {MASK: masks_BHW}
        if config.crop == "patch":
            size = (batch, 3, *config.target_size)
            high_BCHW = torch.randint(256, size, dtype=torch.uint8, generator=draws, device=device)
            self._targets = {HIGH: high_BCHW}

    def __call__(self, requests: Iterator[SampleRequest]) -> Generator[Batch, None, None]:
        """Yield the batch of each request, with one image per row, [B, C, H, W] in float32."""
        for request in requests:
            images_BCHW = self._images[request.canvas or self._size][: len(request.rows_B)]
            # A copy, because mixing overwrites its images.
            batch = request.to_batch(images_BCHW.clone() if request.mixture else images_BCHW, self._device)
            targets = {name: x[: len(request.rows_B)] for name, x in self._targets.items()}
            yield batch._replace(targets=batch.targets | targets) if targets else batch
