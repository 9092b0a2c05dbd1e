"""A decoder that keeps a small data set decoded on the device, and pads, crops and mirrors there.

The augmentation and the order of samples are those of the other decoders.

Shape suffixes: B rows of a request, N samples of a split, H W C as stored, P pixels of all padded images.
"""

from __future__ import annotations

import io
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from pipeline.data.config import Config
from pipeline.data.requests import SampleRequest, describe_sample
from shards.read import SplitReader

_ROWS_AT_ONCE = 1024


def memory_fingerprint(kind: str) -> dict[str, str]:
    """Return the facts that determine a sample's pixels, besides its geometry. ``kind`` is the image format."""
    # PNG is lossless, so every decoder gives the same pixels. JPEG decoders round differently from one another.
    return {"backend": "memory"} if kind == "png" else {"backend": "memory", "pillow": PIL.__version__}


class MemoryDecoder:
    """A decoder of one split that holds its pixels on the device, each image padded by ``config.pad`` zeros.

    Raises ValueError, one line, for an image that cannot be decoded.
    """

    def __init__(self, reader: SplitReader, config: Config, device: torch.device) -> None:
        self._config = config
        self._device = device
        images_NHWC = torch.from_numpy(decode_split(reader, config.size)).to(device)
        # F.pad counts from the last dimension: no padding of C, ``pad`` on both sides of W and of H.
        self._pixels_PC = F.pad(images_NHWC, (0, 0, *[config.pad] * 4)).flatten(0, 2)
        self._mean_C, self._std_C = (255 * torch.tensor(values, device=device) for values in (config.mean, config.std))

    def __call__(self, requests: Iterator[SampleRequest]) -> Generator[tuple[SampleRequest, Tensor], None, None]:
        """Yield each request with its images [B, C, H, W] in float32."""
        for request in requests:
            images_BHWC = self._cropped(request).float().sub_(self._mean_C).div_(self._std_C)
            images_BCHW = images_BHWC.permute(0, 3, 1, 2)
            yield request, images_BCHW if self._config.channels_last else images_BCHW.contiguous()

    def _cropped(self, request: SampleRequest) -> Tensor:
        """Gather the crops, mirrored where the request says so, as uint8 [B, H, W, C]."""
        size, pad = self._config.size, self._config.pad
        geometry = request.geometry
        crops_B4 = np.column_stack([request.rows_B, geometry.crops_B2 + pad, geometry.flips_B])
        host_B4 = torch.from_numpy(crops_B4)
        if self._device.type == "cuda":  # a copy from unpinned memory would wait for all queued work of the GPU
            host_B4 = host_B4.pin_memory()
        rows_B, tops_B, lefts_B, flips_B = host_B4.to(self._device, non_blocking=True).unbind(1)
        along = torch.arange(size, device=self._device)
        down_BH = tops_B[:, None] + along
        across_BW = lefts_B[:, None] + torch.where(flips_B[:, None] == 1, along.flip(0), along)
        # One flat index per pixel takes a third of the time of indexing by image, row and column.
        lines_BH = rows_B[:, None] * (size + 2 * pad) + down_BH
        numbers_BHW = lines_BH[:, :, None] * (size + 2 * pad) + across_BW[:, None, :]
        return self._pixels_PC.index_select(0, numbers_BHW.flatten()).view(*numbers_BHW.shape, 3)


def decode_split(reader: SplitReader, size: int) -> NDArray[np.uint8]:
    """Return all images of a split in storage order, [N, H, W, C].

    Raises ValueError, one line, for an image that cannot be decoded.
    """
    images_NHWC = np.empty((len(reader.samples), size, size, 3), np.uint8)

    def decode_from(start: int) -> None:
        rows = np.arange(start, min(start + _ROWS_AT_ONCE, len(images_NHWC)))
        for row, encoded in zip(rows.tolist(), reader.bytes(rows), strict=True):
            try:
                with Image.open(io.BytesIO(encoded.tobytes())) as image:
                    images_NHWC[row] = np.asarray(image.convert("RGB"))
            except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
                raise ValueError(
                    f"data.path: {describe_sample(reader, row)} cannot be decoded ({error}); "
                    f"shards/verify.py {reader.folder} lists what is wrong"
                ) from error

    # Threads suffice: Pillow releases the GIL while it decodes.
    with ThreadPoolExecutor() as pool:
        list(pool.map(decode_from, range(0, len(images_NHWC), _ROWS_AT_ONCE)))
    return images_NHWC
