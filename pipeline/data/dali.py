"""Decoding with NVIDIA DALI, on the GPU where there is one and on the CPU otherwise, by the same graph.

One graph serves training and validation: a request says of each image which box is decoded, what it is resized to,
which crop is taken and whether it is mirrored. Nothing in it is random or has a state, so the pixels of a sample depend
on its geometry alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple

import numpy as np
import nvidia.dali
import nvidia.dali.plugin.pytorch
import torch
from numpy.typing import NDArray
from nvidia.dali.pipeline import Pipeline
from torch import Tensor

from pipeline.data.config import Config
from pipeline.data.loader_settings import LoaderSettings
from pipeline.data.read_ahead import cuda_index
from pipeline.data.requests import SampleRequest, describe_sample
from shards.read import SplitReader

RESIZE = "linear, antialiased"
"""The law of ``fn.resize`` below: what becomes of a box's pixels."""

# DALI's type stubs lack what its C library adds at run time, the enumerations among it.
_dali: Any = nvidia.dali
fn, types, feed_ndarray = _dali.fn, _dali.types, _dali.plugin.pytorch.feed_ndarray


def dali_fingerprint(config: Config, device: torch.device) -> dict[str, Any]:
    """Return what a sample's pixels follow from, besides its geometry."""
    decoder = {"backend": "dali", "version": nvidia.dali.__version__, "device": device.type, "resize": RESIZE}
    return decoder | ({"hw_decoder_load": config.hw_decoder_load} if device.type == "cuda" else {})


class Inputs(NamedTuple):
    """What the graph is fed: encoded images, boxes' (top, left) and (height, width), resized sides, crops, flips."""

    encoded: list[NDArray[np.uint8]]
    corners_B2: NDArray[np.int32]
    shapes_B2: NDArray[np.int32]
    resized_B2: NDArray[np.float32]
    crops_B2: NDArray[np.int32]
    flips_B: NDArray[np.int32]


class InFlight(NamedTuple):
    """A request that DALI is at. It keeps the inputs alive, which DALI reads without a copy."""

    request: SampleRequest
    inputs: Inputs


class DaliDecoder:
    """Turns the requests of one split into images, with ``pace.prefetch`` batches in flight.

    ``batch`` is the largest number of images in a request.
    """

    def __init__(
        self, reader: SplitReader, config: Config, batch: int, pace: LoaderSettings, device: torch.device
    ) -> None:
        self._reader = reader
        self._config = config
        self._device = device
        self._requests: Iterator[SampleRequest] = iter(())
        self._in_flight: deque[InFlight] = deque()
        self._pipeline = create_pipeline(self._next_inputs, config, batch, pace, device)

    def __call__(self, requests: Iterator[SampleRequest]) -> Generator[tuple[SampleRequest, Tensor], None, None]:
        """Yield each request with its images [B, C, H, W] in float32.

        Raises ValueError, one line, for an image that cannot be decoded.
        """
        # At the beginning, not at the end: as Python exits, an unfinished stream ends after DALI has shut down.
        self._drain()
        self._requests = requests
        while (images := self._run()) is not None:
            yield self._in_flight.popleft().request, images
            if self._requests is not requests:
                raise RuntimeError("another stream of this loader has begun; there is one at a time")

    def _next_inputs(self) -> Inputs:
        # DALI asks whenever it has room for another batch, and takes StopIteration for the end.
        request = next(self._requests)
        self._in_flight.append(InFlight(request, _inputs(request)))
        return self._in_flight[-1].inputs

    def _run(self) -> Tensor | None:
        """Return the images of the oldest request in flight, None after the last."""
        try:
            images = run(self._pipeline, self._device)
        except StopIteration:
            return None
        except RuntimeError as error:
            row = self._undecodable_row()
            if row is None:
                raise
            raise ValueError(
                f"data.path: {describe_sample(self._reader, row)} cannot be decoded; "
                f"shards/verify.py {self._reader.folder} lists what is wrong"
            ) from error
        return images.permute(0, 3, 1, 2) if self._config.channels_last else images

    def _drain(self) -> None:
        """Drop what a stream that was left early has in flight, so that the pipeline starts afresh."""
        self._requests = iter(())
        try:
            while self._in_flight:
                self._pipeline.run()
                self._in_flight.popleft()
        except (StopIteration, RuntimeError):
            self._in_flight.clear()
        self._pipeline.reset()

    def _undecodable_row(self) -> int | None:
        """Return the row of the first image in flight that fails by itself; DALI does not say which one it was."""
        singles = [single for flight in self._in_flight for single in _singles(flight)]
        source = iter(singles)
        alone = LoaderSettings(threads=1, prefetch=1)
        probe = create_pipeline(lambda: next(source).inputs, self._config, 1, alone, torch.device("cpu"))
        for single in singles:
            try:
                probe.run()
            except RuntimeError:
                return int(single.request.rows_B[0])
        return None


def create_pipeline(
    source: Callable[[], Inputs], config: Config, batch: int, pace: LoaderSettings, device: torch.device
) -> Pipeline:
    """Return DALI's pipeline from the inputs that ``source`` gives to normalised images; it is built when first run."""
    pipeline = new_pipeline(batch, pace, device)
    with pipeline:
        encoded, corners, shapes, resized, crops, flips = fn.external_source(
            source,
            num_outputs=6,
            dtype=[types.UINT8, types.INT32, types.INT32, types.FLOAT, types.INT32, types.INT32],
            ndim=[1, 1, 1, 1, 1, 0],
            no_copy=True,
        )
        where = {"start": corners, "shape": shapes, "axes": (0, 1)}
        how = {"adjust_orientation": False, **decoding(config, device)}  # the boxes are of the image as it is stored
        if device.type == "cuda":
            # Below version 13.2, and torchvision brings 13.1, nvJPEG leaves a part of an image to the CPU, if its
            # chroma is to be interpolated.
            boxes = fn.slice(fn.decoders.image(encoded, **how), **where)
        else:
            boxes = fn.decoders.image_slice(encoded, **where, **how)
        images = fn.resize(boxes, size=resized, interp_type=types.INTERP_LINEAR, antialias=True)
        images = fn.slice(
            images, start=crops, shape=(config.size, config.size), axes=(0, 1), out_of_bounds_policy="pad"
        )
        pipeline.set_outputs(normalized(images, flips, config))
    return pipeline


def new_pipeline(batch: int, pace: LoaderSettings, device: torch.device) -> Pipeline:
    """Return a pipeline without operators."""
    return Pipeline(batch, pace.threads, cuda_index(device), prefetch_queue_depth=pace.prefetch)


def decoding(config: Config, device: torch.device) -> dict[str, Any]:
    """Return where and how a decoder of the graph decodes."""
    if device.type != "cuda":
        return {"device": "cpu", "output_type": types.RGB}
    # Interpolated chroma is what the decoders of the CPU, and torchvision, do.
    share = {"hw_decoder_load": config.hw_decoder_load}
    return {"device": "mixed", "output_type": types.RGB, "jpeg_fancy_upsampling": True, **share}


def normalized(images: Any, flips: Any, config: Config) -> Any:
    """Return the graph's last node: images mirrored where ``flips`` is 1, in float32 and normalised."""
    return fn.crop_mirror_normalize(
        images,
        mirror=flips,
        mean=[255 * mean for mean in config.mean],
        std=[255 * std for std in config.std],
        dtype=types.FLOAT,
        output_layout="HWC" if config.channels_last else "CHW",
    )


def run(pipeline: Pipeline, device: torch.device) -> Tensor:
    """Return the next images of a pipeline, as it lays them out. Raises StopIteration after the last."""
    if device.type != "cuda":
        (images,) = pipeline.run()
        return torch.from_dlpack(images.as_tensor())
    # Bound to torch's stream, so that the host waits for nothing; the copy makes the images torch's own memory.
    stream = torch.cuda.current_stream(device)
    (images,) = pipeline.run(stream)
    dense = images.as_tensor()
    copy = torch.empty(dense.shape(), dtype=torch.float32, device=device)
    return feed_ndarray(dense, copy, cuda_stream=stream)


def _inputs(request: SampleRequest) -> Inputs:
    boxes, resized, crops, flips = request.geometry
    return Inputs(
        request.encoded,
        boxes[:, :2].astype(np.int32),
        boxes[:, 2:].astype(np.int32),
        resized.astype(np.float32),
        crops.astype(np.int32),
        flips.astype(np.int32),
    )


def _singles(flight: InFlight) -> Iterator[InFlight]:
    request, inputs = flight
    for row in range(len(request.rows_B)):
        one = slice(row, row + 1)
        yield InFlight(request._replace(rows_B=request.rows_B[one]), Inputs._make(values[one] for values in inputs))
