"""Decoding with NVIDIA DALI: one graph for training and validation, on the GPU or, without one, on the CPU.

A request contains the geometry of each image: the box to decode, its size after resizing, the crop and the flip.
The graph has no random operator and no state, so the pixels of a sample depend only on its geometry.
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

from pipeline import nvjpeg
from pipeline.batch import Batch
from pipeline.data.augmenter import Augmenter
from pipeline.data.config import Config
from pipeline.data.jpeg_engine import uses_engine
from pipeline.data.loader_settings import LoaderSettings
from pipeline.data.read_ahead import cuda_index
from pipeline.data.requests import SampleRequest, describe_sample
from pipeline.tasks._masks import MASK
from shards.manifest import IGNORED_VALUE
from shards.read import SplitReader

RESIZE = "linear, antialiased"
"""Interpolation of ``fn.resize`` below, as recorded in the fingerprint of a cache."""

# DALI's type stubs do not contain what its C library adds at run time, such as the enumerations.
_dali: Any = nvidia.dali
fn, types, feed_ndarray = _dali.fn, _dali.types, _dali.plugin.pytorch.feed_ndarray


def dali_fingerprint(config: Config, device: torch.device) -> dict[str, Any]:
    """Return the facts that determine a sample's pixels, besides its geometry. A cache records them."""
    facts = {"backend": "dali", "version": nvidia.dali.__version__, "device": device.type, "resize": RESIZE}
    if device.type == "cuda":
        version = nvjpeg.version()
        facts |= {"hw_decoder_load": config.hw_decoder_load, "nvjpeg": version and str(version)}
    if uses_engine(config, device):
        facts |= {"gpu": torch.cuda.get_device_name(device)}  # engines of different GPUs may round differently
    return facts


def decodes_boxes(device: torch.device) -> bool:
    """Return whether the box of an image is decoded alone; otherwise it is cut out of the whole image.

    Before version 13.2, nvJPEG's pixels at the edges of a box are wrong if chroma is interpolated. So nvImageCodec
    would decode the box on the CPU.
    """
    return device.type != "cuda" or (nvjpeg.version() or (0, 0, 0)) >= (13, 2, 0)


class Inputs(NamedTuple):
    """The inputs of the graph for one batch, in the order of ``fn.external_source``."""

    encoded: list[NDArray[np.uint8]]
    """The encoded images, one array of bytes each."""
    corners_B2: NDArray[np.int32]
    """(top, left) of each box."""
    shapes_B2: NDArray[np.int32]
    """(height, width) of each box."""
    resized_B2: NDArray[np.float32]
    """(height, width) of each box after resizing."""
    crops_B2: NDArray[np.int32]
    """(top, left) of each crop in the resized box."""
    flips_B: NDArray[np.int32]
    """1 where the image is mirrored."""


AnyInputs = tuple[Any, ...]
"""The inputs of a graph, a NamedTuple whose fields have a row for each image: lists or arrays."""


class DecodingGraph(NamedTuple):
    """A kind of graph: how its inputs are made of a request, and how its pipeline is created."""

    inputs: Callable[[SampleRequest], AnyInputs]
    create: Callable[[Callable[[], AnyInputs], Config, int, LoaderSettings, torch.device], Pipeline]
    run: Callable[[Pipeline, torch.device], tuple[Tensor, ...]]
    """Returns the next images, and their masks if it makes any."""


class InFlight(NamedTuple):
    """A request that DALI is working on. It keeps the inputs alive, because DALI reads them without a copy."""

    request: SampleRequest
    inputs: AnyInputs


class DaliDecoder:
    """A decoder of one split with DALI, with ``settings.prefetch`` batches in flight.

    ``batch`` is the largest number of images in a request.
    """

    def __init__(
        self,
        reader: SplitReader,
        config: Config,
        batch: int,
        settings: LoaderSettings,
        device: torch.device,
        graph: DecodingGraph | None = None,
    ) -> None:
        graph = graph or DecodingGraph(image_inputs, create_pipeline, lambda *running: (run(*running),))
        self._reader = reader
        self._config = config
        self._device = device
        self._batch = batch
        self._augmenter = Augmenter(config, device)
        # The engine gets as many images of every batch as the first batch had (nvImageCodec, ``assigned_batch_size_``).
        self._fills_next = uses_engine(config, device)
        # DALI pulls its inputs from a callback that is fixed when the graph is built. A new stream therefore replaces
        # this iterator, and the callback reads from whichever iterator is stored here.
        self._requests: Iterator[SampleRequest] = iter(())
        self._in_flight: deque[InFlight] = deque()
        self._graph = graph
        self._pipeline = graph.create(self._next_inputs, config, batch, settings, device)

    def __call__(self, requests: Iterator[SampleRequest]) -> Generator[Batch, None, None]:
        """Yield the batch of each request, with images [B, C, H, W] in float32.

        Raises ValueError, one line, for an image that cannot be decoded.
        """
        # Clean up before a stream, not after it: at interpreter exit, Python closes an unfinished generator only after
        # DALI has shut down.
        self._drain()
        self._requests = requests
        while (outputs := self._run()) is not None:
            # DALI returns batches in the order in which it pulled them, so these images belong to the oldest request.
            request = self._in_flight.popleft().request
            if len(outputs[0]) > len(request.rows_B):  # the engine's first batch
                outputs = tuple(output[: len(request.rows_B)] for output in outputs)
            images, *masks = outputs
            batch = request.to_batch(self._finished(images, request), self._device)
            yield with_masks(batch, masks[0], request) if masks else batch
            if self._requests is not requests:
                raise RuntimeError("another stream of this loader has begun; use one stream at a time")

    def _next_inputs(self) -> AnyInputs:
        """Return the inputs of the next request; DALI calls this.

        Raises StopIteration at the end of the requests.
        """
        # DALI calls this whenever its queue has room, which is ``prefetch`` batches before it returns the images.
        # So the requests advance ahead of the images, and ``_in_flight`` holds those in between.
        # DALI takes StopIteration for the end of the data: it still returns the batches in its queue.
        request = next(self._requests)
        inputs = self._graph.inputs(request)
        if self._fills_next:
            inputs, self._fills_next = _filled(inputs, self._batch), False
        self._in_flight.append(InFlight(request, inputs))
        return inputs

    def _run(self) -> tuple[Tensor, ...] | None:
        """Return the images of the oldest request in flight, and their masks if there are any; None after the last."""
        try:
            return self._graph.run(self._pipeline, self._device)
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

    def _finished(self, images: Tensor, request: SampleRequest) -> Tensor:
        """Return the images of the graph as those of a batch, [B, C, H, W]."""
        if self._config.augment:
            return self._augmenter(images, request.drawn)
        # With channels_last DALI returns NHWC; the permuted view has shape NCHW and memory format channels_last.
        return images.permute(0, 3, 1, 2) if self._config.channels_last else images

    def _drain(self) -> None:
        """Discard the batches that an unfinished stream left in flight, and reset the pipeline."""
        # With empty requests the callback raises StopIteration, so that DALI pulls no further batch meanwhile.
        self._requests = iter(())
        try:
            while self._in_flight:
                self._pipeline.run()
                self._in_flight.popleft()
        except (StopIteration, RuntimeError):
            self._in_flight.clear()
        self._pipeline.reset()

    def _undecodable_row(self) -> int | None:
        """Return the row of the first image in flight that cannot be decoded alone, or None if every image can."""
        # DALI's error does not name the sample, so each image is tried in a batch of its own.
        singles = [single for flight in self._in_flight for single in _split_rows(flight)]
        source = iter(singles)
        settings = LoaderSettings(threads=1, prefetch=1)
        probe = self._graph.create(lambda: next(source).inputs, self._config, 1, settings, torch.device("cpu"))
        for single in singles:
            try:
                probe.run()
            except RuntimeError:
                return int(single.request.rows_B[0])
        return None


def create_pipeline(
    source: Callable[[], AnyInputs], config: Config, batch: int, settings: LoaderSettings, device: torch.device
) -> Pipeline:
    """Return a DALI pipeline that turns the inputs from ``source`` into normalised images. Its first run builds it.

    With ``data.augment`` it ends before normalisation, with the images as uint8 [H, W, C].
    """
    pipeline = new_pipeline(batch, settings, device)
    with pipeline:
        # ``no_copy`` saves a copy of every encoded image; ``InFlight`` keeps the arrays alive in return.
        encoded, corners, shapes, resized, crops, flips = fn.external_source(
            source,
            num_outputs=6,
            dtype=[types.UINT8, types.INT32, types.INT32, types.FLOAT, types.INT32, types.INT32],
            ndim=[1, 1, 1, 1, 1, 0],
            no_copy=True,
        )
        where = {"start": corners, "shape": shapes, "axes": (0, 1)}
        # No rotation by EXIF: the boxes refer to the image as it is stored.
        how = {"adjust_orientation": False, **decoding(config, device)}
        if decodes_boxes(device):
            boxes = fn.decoders.image_slice(encoded, **where, **how)
        else:
            boxes = fn.slice(fn.decoders.image(encoded, **how), **where)
        images = fn.resize(boxes, size=resized, interp_type=types.INTERP_LINEAR, antialias=True)
        images = fn.slice(
            images, start=crops, shape=(config.side, config.side), axes=(0, 1), out_of_bounds_policy="pad"
        )
        if config.augment:
            pipeline.set_outputs(fn.flip(images, horizontal=flips))
        else:
            pipeline.set_outputs(normalized(images, flips, config))
    return pipeline


def new_pipeline(batch: int, settings: LoaderSettings, device: torch.device) -> Pipeline:
    """Return a pipeline without operators."""
    return Pipeline(batch, settings.threads, cuda_index(device), prefetch_queue_depth=settings.prefetch)


def decoding(config: Config, device: torch.device) -> dict[str, Any]:
    """Return the keyword arguments of DALI's image decoders: device and output."""
    if device.type != "cuda":
        return {"device": "cpu", "output_type": types.RGB}
    # Fancy upsampling interpolates chroma, as the decoders of the CPU and torchvision do.
    share = {"hw_decoder_load": config.hw_decoder_load}
    return {"device": "mixed", "output_type": types.RGB, "jpeg_fancy_upsampling": True, **share}


def normalized(images: Any, flips: Any, config: Config) -> Any:
    """Return the last node of the graph: images in float32, normalised, and mirrored where ``flips`` is 1."""
    return fn.crop_mirror_normalize(
        images,
        mirror=flips,
        # The decoded pixels are 0 … 255; the recipe's mean and std are for 0 … 1.
        mean=[255 * mean for mean in config.mean],
        std=[255 * std for std in config.std],
        dtype=types.FLOAT,
        output_layout="HWC" if config.channels_last else "CHW",
    )


def run(pipeline: Pipeline, device: torch.device) -> Tensor:
    """Return the next images of a pipeline, in its own layout and dtype. Raises StopIteration after the last."""
    (images,) = run_outputs(pipeline, device)
    return images


def run_outputs(pipeline: Pipeline, device: torch.device) -> tuple[Tensor, ...]:
    """Return the next batch of each output of a pipeline, as ``run`` does."""
    if device.type != "cuda":
        return tuple(torch.from_dlpack(output.as_tensor()) for output in pipeline.run())
    # DALI's outputs are ordered on torch's stream, so the host does not wait for them. They are copied into torch's
    # memory, because DALI reuses its own buffers.
    stream = torch.cuda.current_stream(device)
    return tuple(_copied(output.as_tensor(), device, stream) for output in pipeline.run(stream))


def _copied(dense: Any, device: torch.device, stream: torch.cuda.Stream) -> Tensor:
    copy = torch.empty(dense.shape(), dtype=_dali.plugin.pytorch.to_torch_type[dense.dtype], device=device)
    return feed_ndarray(dense, copy, cuda_stream=stream)


def with_masks(batch: Batch, masks_BHW1: Tensor, request: SampleRequest) -> Batch:
    """Return the batch with the masks of its images among its targets; padded rows have no class anywhere."""
    masks_BHW, padded_B = masks_BHW1[..., 0], request.ids_B < 0
    if padded_B.any():
        masks_BHW = masks_BHW.masked_fill(padded_B.to(masks_BHW.device)[:, None, None], IGNORED_VALUE)
    return batch._replace(targets={**batch.targets, MASK: masks_BHW})


def image_inputs(request: SampleRequest) -> Inputs:
    """Return the inputs of the graph for a request."""
    boxes, resized, crops, flips = request.geometry
    return Inputs(
        request.encoded,
        boxes[:, :2].astype(np.int32),
        boxes[:, 2:].astype(np.int32),
        resized.astype(np.float32),  # the type that ``fn.resize`` takes as its size
        crops.astype(np.int32),
        flips.astype(np.int32),
    )


def _filled(inputs: AnyInputs, batch: int) -> AnyInputs:
    """Return the inputs with their rows repeated, so that there are ``batch`` of them."""
    rows = np.resize(np.arange(len(inputs[0])), batch)
    return tuple([values[row] for row in rows] if isinstance(values, list) else values[rows] for values in inputs)


def _split_rows(flight: InFlight) -> Iterator[InFlight]:
    """Yield each row of a request as a request of its own."""
    request, inputs = flight
    for row in range(len(request.rows_B)):
        one = slice(row, row + 1)
        yield InFlight(request._replace(rows_B=request.rows_B[one]), tuple(values[one] for values in inputs))
