"""Decoding threads and prefetch depth of a rank. No pixel depends on them.

Keys that a recipe does not set take the results of ``bench.py loader --tune`` for similar images on this machine. They
are stored in ``$XDG_CACHE_HOME/distillation-pipeline/loader.json``, by default under ``~/.cache``.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
from pathlib import Path

import torch
from pydantic import PositiveInt, TypeAdapter, ValidationError

from pipeline.data.config import Config
from pipeline.distributed import collectives
from pipeline.frozen_model import FrozenModel
from pipeline.image_size import size_text
from shards.cores import usable_cores
from shards.manifest import Manifest, write_atomically


class LoaderSettings(FrozenModel):
    """The resources with which a rank loads images."""

    threads: PositiveInt
    """Decoding threads."""
    prefetch: PositiveInt
    """Batches that are read ahead, and batches that are decoded ahead, of the one in use."""


TunedSettings = TypeAdapter(dict[str, LoaderSettings])


def loader_settings(config: Config, manifest: Manifest, device: torch.device) -> LoaderSettings:
    """Return the settings of the recipe; keys it does not set are the tuned ones, or else the defaults."""
    default = LoaderSettings(threads=cores(), prefetch=2)
    if config.loader == "dali" and None in (config.threads, config.prefetch):
        default = _read_tuned().get(workload_key(config, manifest, device), default)
    return LoaderSettings(threads=config.threads or default.threads, prefetch=config.prefetch or default.prefetch)


def remember(settings: LoaderSettings, config: Config, manifest: Manifest, device: torch.device) -> Path:
    """Store the best settings for this workload on this machine, and return the file.

    Raises OSError where it cannot be written.
    """
    path = tuned_path()
    tuned = {**_read_tuned(), workload_key(config, manifest, device): settings}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps({key: value.model_dump() for key, value in tuned.items()}, indent=1).encode())
    return path


def workload_key(config: Config, manifest: Manifest, device: torch.device) -> str:
    """Return what the best settings depend on: processor, cores of a rank, type and size of images in and out."""
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    # The mean size is rounded to a power of two below, so that data sets of similar images share one result.
    kib = sum(shard.filesize for shard in shards) / sum(shard.nsamples for shard in shards) / 1024
    images = f"{manifest.image} of about {2 ** round(math.log2(kib))} KiB to {size_text(config.size)} px"
    decoder = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return f"{decoder}, {cores()} cores, {images}, {config.crop}"


def cores() -> int:
    """Return the number of cores of this rank: its share of the cores that its machine's ranks may use."""
    allowed = len(usable_cores())
    # Slurm can bind each task to cores of its own. The ranks do not share them.
    if os.environ.get("SLURM_CPUS_PER_TASK") == str(allowed):
        return allowed
    return max(1, allowed // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def tuned_path() -> Path:
    """Return the file in which tuned settings are stored."""
    # Not Path.home(), which raises for a user without a home folder.
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(folder) / "distillation-pipeline" / "loader.json"


def _read_tuned() -> dict[str, LoaderSettings]:
    """Return the stored settings by workload; none if the file is missing or unreadable."""
    path = tuned_path()
    try:
        return TunedSettings.validate_json(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValidationError) as error:
        if collectives.is_main():
            reason = error.strerror if isinstance(error, OSError) else "it is damaged, or of another version"
            print(f"note: {path} is ignored ({reason}); bench.py loader --tune writes it again")
        return {}


def processor() -> str:
    """Return the model of this machine's CPU."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    return found[1] if found else platform.machine()
