"""A decoder that keeps a small data set decoded on the device, and pads, crops and mirrors there.

The augmentation and the order of samples are those of the other decoders. A request is a table of many batches, which
is sent to the device once. A batch is then a slice of it and the gather of its pixels.

Shape suffixes: R rows of a request, B of a batch, D images that are gathered for it, N of a split. P pixels of all
padded images; H, W and C are as stored.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from pipeline.augmentations._base import send
from pipeline.batch import Batch
from pipeline.data.augmenter import Augmenter
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
        self._side = config.side + 2 * config.pad
        images_NHWC = torch.from_numpy(decode_split(reader, config.side)).to(device)
        # F.pad counts from the last dimension: no padding of C, ``pad`` on both sides of W and of H.
        self._pixels_PC = F.pad(images_NHWC, (0, 0, *[config.pad] * 4)).flatten(0, 2)
        self._augmenter = Augmenter(config, device)
        along = torch.arange(config.side, device=device)
        plain_HW = along[:, None] * self._side + along
        self._offsets_2HW = torch.stack([plain_HW, plain_HW.flip(1)])
        """Distance of a crop's pixels from its first one, as stored and mirrored."""

    def __call__(self, requests: Iterator[SampleRequest]) -> Generator[Batch, None, None]:
        """Yield the batches of each request, with images [B, C, H, W] in float32."""
        for request in requests:
            table_4R = self._table(request)
            targets = {name: send(x.numpy(), self._device) for name, x in request.targets.items()}
            for rows, partners in request.rows_of_batches():
                ids_B, labels_B, _, _ = table_4R[:, rows].unbind()
                _, _, firsts_D, flips_D = _columns(table_4R, rows, partners).unbind()
                drawn = tuple(np.concatenate([each[rows], each[partners]]) for each in request.drawn)
                images = self._augmenter(self._pixels(firsts_D, flips_D), drawn)
                batch = Batch(images, labels_B, ids_B, {}, {name: x[rows] for name, x in targets.items()})
                batch = request.with_views(batch)
                yield request.mixture.of(rows)(batch) if request.mixture else batch

    def _table(self, request: SampleRequest) -> Tensor:
        """Return each row's id, label, first pixel of its crop, and 1 if it is mirrored, as int64 [4, R].

        A partner of a mixed image has the id and label −1.
        """
        tops_R, lefts_R = (request.geometry.crops_B2 + self._config.pad).T
        firsts_R = (request.rows_B * self._side + tops_R) * self._side + lefts_R
        table_4R = np.full((4, len(firsts_R)), -1)
        table_4R[:2, : len(request.ids_B)] = request.ids_B, request.labels_B
        table_4R[2:] = firsts_R, request.geometry.flips_B
        return send(table_4R, self._device)

    def _pixels(self, firsts_B: Tensor, flips_B: Tensor) -> Tensor:
        """Gather and mirror the crops that begin at those pixels, uint8 [B, H, W, C]."""
        # One flat index per pixel takes a third of the time of indexing by image, row and column.
        numbers_BHW = self._offsets_2HW.index_select(0, flips_B).add_(firsts_B[:, None, None])
        return self._pixels_PC.index_select(0, numbers_BHW.flatten()).view(*numbers_BHW.shape, 3)


def _columns(table_4R: Tensor, rows: slice, partners: slice) -> Tensor:
    """Return the columns of the images to gather for a batch, a view unless some have partners."""
    own = table_4R[:, rows]
    return own if partners.start == partners.stop else torch.cat([own, table_4R[:, partners]], dim=1)


def decode_split(reader: SplitReader, size: int) -> NDArray[np.uint8]:
    """Return all images of a split in storage order, [N, H, W, C]. Raises ValueError as ``decode_images``."""
    sides_N2 = np.full((len(reader.samples), 2), size)
    images_NHWC = np.empty((len(sides_N2), size, size, 3), np.uint8)
    decode_images(reader, reader.bytes, sides_N2, images_NHWC)
    return images_NHWC


def decode_images(
    reader: SplitReader,
    read: Callable[[NDArray[np.int64]], list[NDArray[np.uint8]]],
    sides_N2: NDArray[np.int64],
    out: NDArray[np.uint8] | None = None,
) -> list[NDArray[np.uint8]]:
    """Return what ``read`` gives of the rows of a split, decoded, uint8 [H, W, C] each, in ``out`` if it is given.

    ``sides_N2`` are their heights and widths. Raises ValueError, one line, for one that cannot be decoded, or of
    another size.
    """
    images = [np.empty((*sides, 3), np.uint8) for sides in sides_N2.tolist()] if out is None else list(out)

    def decode_from(start: int) -> None:
        rows = np.arange(start, min(start + _ROWS_AT_ONCE, len(images)))
        for row, encoded in zip(rows.tolist(), read(rows), strict=True):
            try:
                with Image.open(io.BytesIO(encoded.tobytes())) as image:
                    if image.size != (found := images[row].shape[1::-1]):
                        raise ValueError(f"its size is {image.size}, not {found}")
                    images[row][:] = np.asarray(image.convert("RGB"))
            except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
                raise ValueError(
                    f"data.path: {describe_sample(reader, row)} cannot be decoded ({error}); "
                    f"shards/verify.py {reader.folder} lists what is wrong"
                ) from error

    # Threads suffice: Pillow releases the GIL while it decodes.
    with ThreadPoolExecutor() as pool:
        list(pool.map(decode_from, range(0, len(images), _ROWS_AT_ONCE)))
    return images
