"""Decoding of images with masks by NVIDIA DALI: both go through the same resize, crop and flip.

The image is interpolated, and the mask takes the nearest pixel. What the crop lacks below and on the right is 0 in the
normalised image, and without a class in the mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.data.config import Config
from pipeline.data.dali import DecodingGraph, Pipeline, decoding, fn, new_pipeline, normalized, run_outputs, types
from pipeline.data.loader_settings import LoaderSettings
from pipeline.data.requests import SampleRequest
from pipeline.image_size import height_width
from shards.manifest import IGNORED_VALUE


class MaskedInputs(NamedTuple):
    """The inputs of the graph for one batch, in the order of ``fn.external_source``."""

    encoded: list[NDArray[np.uint8]]
    """The encoded images, one array of bytes each."""
    masks: list[NDArray[np.uint8]]
    """The encoded masks."""
    resized_B2: NDArray[np.float32]
    """(height, width) of each image after resizing."""
    crops_B2: NDArray[np.int32]
    """(top, left) of each crop in the resized image."""
    shapes_B2: NDArray[np.int32]
    """(height, width) of each crop, which is smaller than a batch's images where the resized image is."""
    flips_B: NDArray[np.int32]
    """1 where image and mask are mirrored."""


def mask_graph(config: Config) -> DecodingGraph:
    """Return the graph of images with masks."""
    size = height_width(config.size)
    return DecodingGraph(lambda request: masked_inputs(request, size), create_masked_pipeline, run_outputs)


def masked_inputs(request: SampleRequest, size: tuple[int, int]) -> MaskedInputs:
    """Return the inputs of the graph for a request; ``size`` is the (height, width) of the batch's images."""
    _, resized, crops, flips = request.geometry
    return MaskedInputs(
        request.encoded,
        request.masks,
        resized.astype(np.float32),
        crops.astype(np.int32),
        np.minimum(resized - crops, size).astype(np.int32),
        flips.astype(np.int32),
    )


def create_masked_pipeline(
    source: Callable[[], Any], config: Config, batch: int, settings: LoaderSettings, device: torch.device
) -> Pipeline:
    """Return a DALI pipeline from inputs to normalised images and their masks, uint8 [H, W, 1]."""
    pipeline = new_pipeline(batch, settings, device)
    with pipeline:
        encoded, masks, resized, crops, shapes, flips = fn.external_source(
            source,
            num_outputs=6,
            dtype=[types.UINT8, types.UINT8, types.FLOAT, types.INT32, types.INT32, types.INT32],
            ndim=[1, 1, 1, 1, 1, 0],
            no_copy=True,
        )
        # No rotation by EXIF: the mask belongs to the image as it is stored.
        images = fn.decoders.image(encoded, adjust_orientation=False, **decoding(config, device))
        images = fn.resize(images, size=resized, interp_type=types.INTERP_LINEAR, antialias=True)
        images = normalized(fn.slice(images, start=crops, shape=shapes, axes=(0, 1)), flips, config)
        # On the CPU, also beside a GPU: a mask is a PNG, and its pixels are few bytes.
        masks = fn.decoders.image(masks, device="cpu", output_type=types.GRAY, adjust_orientation=False)
        masks = fn.resize(masks, size=resized, interp_type=types.INTERP_NN)
        masks = fn.flip(fn.slice(masks, start=crops, shape=shapes, axes=(0, 1)), horizontal=flips)
        masks = _padded(masks, config, IGNORED_VALUE)
        pipeline.set_outputs(_padded(images, config, 0), masks.gpu() if device.type == "cuda" else masks)
    return pipeline


def _padded(images: Any, config: Config, value: int) -> Any:
    """Return images, or masks, at the size of a batch's, filled with ``value`` below and on the right."""
    shape = height_width(config.size)
    return fn.slice(images, start=(0, 0), shape=shape, axis_names="HW", out_of_bounds_policy="pad", fill_values=value)
