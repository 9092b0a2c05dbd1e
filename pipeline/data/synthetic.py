"""Noise in the place of images, drawn once on the device: what a step takes when it waits for no input.

Ids, labels and order are those of the shards' tables; no tar is opened.

Shape suffixes: B rows of a request, C channels, H W space.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator

import torch
from torch import Tensor

from pipeline.data.config import Config
from pipeline.data.requests import SampleRequest


def synthetic_fingerprint() -> dict[str, str]:
    """Return what the pixels follow from: a teacher's answers to noise are no other loader's."""
    return {"backend": "synthetic"}


class SyntheticDecoder:
    """The same images for every request, of which ``batch`` is the largest number in one."""

    def __init__(self, config: Config, batch: int, device: torch.device) -> None:
        draws = torch.Generator(device).manual_seed(config.seed)
        images_BHWC = torch.randn(batch, config.size, config.size, 3, generator=draws, device=device)
        images_BCHW = images_BHWC.permute(0, 3, 1, 2)
        self._images_BCHW = images_BCHW if config.channels_last else images_BCHW.contiguous()

    def __call__(self, requests: Iterator[SampleRequest]) -> Generator[tuple[SampleRequest, Tensor], None, None]:
        """Yield each request with as many images [B, C, H, W] in float32."""
        for request in requests:
            yield request, self._images_BCHW[: len(request.rows_B)]
