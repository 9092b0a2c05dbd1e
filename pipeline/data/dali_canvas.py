"""Decoding of whole images by NVIDIA DALI, at the top left of a canvas whose size differs from batch to batch.

What an image does not cover is 0 after normalisation. Its boxes do not pass through here (``box_targets.py``).
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


class CanvasInputs(NamedTuple):
    """The inputs of the graph for one batch, in the order of ``fn.external_source``."""

    encoded: list[NDArray[np.uint8]]
    """The encoded images, one array of bytes each."""
    resized_B2: NDArray[np.float32]
    """(height, width) of each image after resizing."""
    flips_B: NDArray[np.int32]
    """1 where the image is mirrored."""
    canvases_B2: NDArray[np.int32]
    """(height, width) of the batch's images, the same in each row."""


def canvas_inputs(request: SampleRequest) -> CanvasInputs:
    """Return the inputs of the graph for a request."""
    _, resized, _, flips = request.geometry
    canvases = np.broadcast_to(np.asarray(request.canvas, np.int32), resized.shape)
    return CanvasInputs(
        request.encoded, resized.astype(np.float32), flips.astype(np.int32), np.ascontiguousarray(canvases)
    )


def create_canvas_pipeline(
    source: Callable[[], Any], config: Config, batch: int, settings: LoaderSettings, device: torch.device
) -> Pipeline:
    """Return a DALI pipeline from inputs to normalised images, each batch of the size of its canvas."""
    pipeline = new_pipeline(batch, settings, device)
    with pipeline:
        encoded, resized, flips, canvases = fn.external_source(
            source,
            num_outputs=4,
            dtype=[types.UINT8, types.FLOAT, types.INT32, types.INT32],
            ndim=[1, 1, 0, 1],
            no_copy=True,
        )
        # No rotation by EXIF: the boxes belong to the image as it is stored.
        images = fn.decoders.image(encoded, adjust_orientation=False, **decoding(config, device))
        images = fn.resize(images, size=resized, interp_type=types.INTERP_LINEAR, antialias=True)
        images = normalized(images, flips, config)  # mirrored before it is padded, so it stays at the left
        padded = fn.slice(
            images, start=(0, 0), shape=canvases, axis_names="HW", out_of_bounds_policy="pad", fill_values=0
        )
        pipeline.set_outputs(padded)
    return pipeline


CANVAS_GRAPH = DecodingGraph(canvas_inputs, create_canvas_pipeline, run_outputs)
"""The graph of whole images on a canvas."""
