"""DALI's own reader of WebDataset shards, as a baseline for benchmarks.

It is never used for training: its order depends on the number of ranks and on all that it has read before.
"""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor

from pipeline.data.config import Config
from pipeline.data.dali import decodes_boxes, decoding, fn, new_pipeline, normalized, run, types
from pipeline.data.loader_settings import LoaderSettings
from pipeline.data.requests import BatchSampler
from shards.read import SplitReader

_SHUFFLED = 1024
"""Samples in the reader's shuffle buffer, from which it draws."""


def native_decoder(plan: BatchSampler, settings: LoaderSettings, device: torch.device) -> Generator[Tensor, None, None]:
    """Yield micro-batches of training images without end, [B, H, W, C] or [B, C, H, W], with random crops and flips."""
    config, reader = plan.config, plan.readers["train"]
    pipeline = new_pipeline(plan.micro_batch, settings, device)
    with pipeline:
        encoded = _read(reader, plan)
        if config.crop == "pad":
            boxes = _pad_cropped(fn.decoders.image(encoded, **decoding(config, device)), config)
        else:
            boxes = _random_resized(encoded, config, device)
        pipeline.set_outputs(normalized(boxes, fn.random.coin_flip(probability=config.flip), config))
    while True:
        yield run(pipeline, device)


def _read(reader: SplitReader, plan: BatchSampler):
    tars = [reader.folder / shard.url for shard in reader.split.shards]
    return fn.readers.webdataset(
        paths=[str(tar) for tar in tars],
        index_paths=[str(tar.with_suffix(".idx")) for tar in tars],
        ext=[reader.manifest.image],
        random_shuffle=True,
        initial_fill=min(_SHUFFLED, len(reader.samples)),
        shard_id=plan.rank,
        num_shards=plan.world,
        pad_last_batch=True,
    )


def _random_resized(encoded, config: Config, device: torch.device):
    drawn = {"random_area": config.scale, "random_aspect_ratio": config.ratio}
    resized = {"size": [config.side] * 2, "interp_type": types.INTERP_LINEAR, "antialias": True}
    if not decodes_boxes(device):
        return fn.random_resized_crop(fn.decoders.image(encoded, **decoding(config, device)), **drawn, **resized)
    return fn.resize(fn.decoders.image_random_crop(encoded, **drawn, **decoding(config, device)), **resized)


def _pad_cropped(images, config: Config):
    # ``values`` draws from a list of whole numbers, each with the same probability, so that the cast rounds nothing.
    offsets = range(-config.pad, config.pad + 1)
    start = fn.cast(fn.random.uniform(values=[float(offset) for offset in offsets], shape=(2,)), dtype=types.INT32)
    return fn.slice(images, start=start, shape=(config.side,) * 2, axes=(0, 1), out_of_bounds_policy="pad")
