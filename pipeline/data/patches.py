"""A decoder of image pairs for super-resolution: it keeps them on the device, and cuts patches and mirrors them there.

A request is a table of many batches, which is sent to the device once.

Shape suffixes: R rows of a request, B of a batch, N of a split. P pixels of all images, C colours, H W space.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.augmentations._base import send
from pipeline.batch import Batch
from pipeline.data.augmenter import Augmenter
from pipeline.data.config import Config
from pipeline.data.memory import decode_images
from pipeline.data.requests import SampleRequest
from pipeline.tasks._high import HIGH
from shards.read import SplitReader


class StoredImages(NamedTuple):
    """Images of any sizes, one behind another."""

    pixels_PC: Tensor
    """uint8, on the device."""
    firsts_N: NDArray[np.int64]
    """The first pixel of each image."""
    widths_N: NDArray[np.int64]


class PatchDecoder:
    """A decoder of one split that holds its images and their smaller copies on the device.

    Raises ValueError, one line, for an image that cannot be decoded, or whose copy has another size.
    """

    def __init__(self, reader: SplitReader, config: Config, device: torch.device) -> None:
        self._device = device
        self._scale = reader.manifest.scale
        self._augmenter = Augmenter(config, device)
        samples = reader.samples
        sides_N2 = np.stack([samples["height"], samples["width"]], axis=1).astype(np.int64)
        self._high = _store(decode_images(reader, reader.bytes, sides_N2), sides_N2, device)
        sides_N2 = sides_N2 // self._scale
        self._low = _store(decode_images(reader, reader.copies, sides_N2), sides_N2, device)

    def __call__(self, requests: Iterator[SampleRequest]) -> Generator[Batch, None, None]:
        """Yield the batches of each request, small images in float32, and large ones in uint8 as targets."""
        for request in requests:
            table_9R = send(self._table(request), self._device)
            for rows, _ in request.rows_of_batches():
                height, width = request.geometry.boxes_B4[rows.start, 2:].tolist()
                ids_B, labels_B, low_B, low_width_B, high_B, high_width_B, *symmetry = table_9R[:, rows].unbind()
                low = _patches(self._low.pixels_PC, low_B, low_width_B, symmetry, (height, width))
                large = self._scale * height, self._scale * width
                high = _patches(self._high.pixels_PC, high_B, high_width_B, symmetry, large)
                yield Batch(self._augmenter.normalized(low), labels_B, ids_B, {}, {HIGH: high.permute(0, 3, 1, 2)})

    def _table(self, request: SampleRequest) -> NDArray[np.int64]:
        """Return int64 [9, R]: id, label, first pixel and width of the small and of the large image, and symmetry."""
        rows_R, geometry = request.rows_B, request.geometry
        tops_R, lefts_R = geometry.boxes_B4[:, :2].T
        starts = []
        for images, factor in ((self._low, 1), (self._high, self._scale)):
            widths_R = images.widths_N[rows_R]
            starts += [images.firsts_N[rows_R] + factor * (tops_R * widths_R + lefts_R), widths_R]
        flips_3R = geometry.flips_B.T.astype(np.int64)
        return np.stack([request.ids_B.numpy(), request.labels_B.numpy(), *starts, *flips_3R])


def _store(images: list[NDArray[np.uint8]], sides_N2: NDArray[np.int64], device: torch.device) -> StoredImages:
    pixels_N = sides_N2.prod(axis=1)
    pixels_PC = np.concatenate([image_HWC.reshape(-1, 3) for image_HWC in images])
    return StoredImages(torch.from_numpy(pixels_PC).to(device), pixels_N.cumsum() - pixels_N, sides_N2[:, 1])


def _patches(
    pixels_PC: Tensor, firsts_B: Tensor, widths_B: Tensor, symmetry: list[Tensor], size: tuple[int, int]
) -> Tensor:
    """Gather the patches of (height, width) ``size`` that begin at those pixels, uint8 [B, H, W, C].

    ``symmetry`` says of each patch whether it is mirrored left to right, then top to bottom, and then transposed.
    """
    height, width = size
    rows_HW, columns_HW = (
        x.expand(height, width)
        for x in (
            torch.arange(height, device=pixels_PC.device)[:, None],
            torch.arange(width, device=pixels_PC.device)[None],
        )
    )
    mirrored_B, upended_B, transposed_B = (each.bool()[:, None, None] for each in symmetry)
    rows_BHW = torch.where(transposed_B, columns_HW, rows_HW)
    columns_BHW = torch.where(transposed_B, rows_HW, columns_HW)
    rows_BHW = torch.where(upended_B, height - 1 - rows_BHW, rows_BHW)
    columns_BHW = torch.where(mirrored_B, width - 1 - columns_BHW, columns_BHW)
    numbers_BHW = firsts_B[:, None, None] + rows_BHW * widths_B[:, None, None] + columns_BHW
    return pixels_PC.index_select(0, numbers_BHW.flatten()).view(*numbers_BHW.shape, 3)
