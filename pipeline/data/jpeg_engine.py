"""The JPEG engine of a GPU, which decodes where ``data.hw_decoder_load`` is 1."""

from __future__ import annotations

import torch

from pipeline import nvjpeg
from pipeline.data.config import Config


def has_engine(device: torch.device) -> bool:
    """Return whether a device has a JPEG engine."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return nvjpeg.finds_engine()


def uses_engine(config: Config, device: torch.device) -> bool:
    """Return whether the engine decodes. Raises ValueError, one line, where it should and the GPU has none."""
    if device.type != "cuda" or not config.hw_decoder_load:
        return False
    if not has_engine(device):
        name = torch.cuda.get_device_name(device)
        raise ValueError(f"data.hw_decoder_load: {name} has no JPEG engine that nvJPEG can use; leave the key out")
    return True
