"""How busily a rank makes images: its decoding threads, and how far ahead. No pixel depends on it.

What a recipe leaves open is what ``bench.py loader --tune`` found best for such images on such a machine. It is kept in
``$XDG_CACHE_HOME/distillation-pipeline/loader.json``, by default under ``~/.cache``.
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
from shards.manifest import Manifest, write_atomically


class LoaderSettings(FrozenModel):
    """What making images takes of a machine."""

    threads: PositiveInt
    """That decode."""
    prefetch: PositiveInt
    """Batches that are read, and batches that are decoded, ahead of the one in use."""


TunedSettings = TypeAdapter(dict[str, LoaderSettings])


def loader_settings(config: Config, manifest: Manifest, device: torch.device) -> LoaderSettings:
    """Return the recipe's own values, in their place the remembered ones, and in theirs the default."""
    default = LoaderSettings(threads=cores(), prefetch=2)
    if config.loader == "dali" and None in (config.threads, config.prefetch):
        default = _kept().get(workload_key(config, manifest, device), default)
    return LoaderSettings(threads=config.threads or default.threads, prefetch=config.prefetch or default.prefetch)


def remember(pace: LoaderSettings, config: Config, manifest: Manifest, device: torch.device) -> Path:
    """Keep what is best for such work on this machine, and return the file; OSError where it cannot be written."""
    path = tuned_path()
    kept = {**_kept(), workload_key(config, manifest, device): pace}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps({name: each.model_dump() for name, each in kept.items()}, indent=1).encode())
    return path


def workload_key(config: Config, manifest: Manifest, device: torch.device) -> str:
    """Return what the best pace depends on: processor, cores of a rank, kind and size of images in and out."""
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    kib = sum(shard.filesize for shard in shards) / sum(shard.nsamples for shard in shards) / 1024
    images = f"{manifest.image} of about {2 ** round(math.log2(kib))} KiB to {config.size} px"
    decoder = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return f"{decoder}, {cores()} cores, {images}, {config.crop}"


def cores() -> int:
    """Return this rank's share of the cores that the machine's ranks may use; a task that Slurm binds has its own."""
    mine = len(os.sched_getaffinity(0))
    if os.environ.get("SLURM_CPUS_PER_TASK") == str(mine):
        return mine
    return max(1, mine // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def tuned_path() -> Path:
    """Return the file in which paces are kept."""
    # Not Path.home(), which raises where a user has none.
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(folder) / "distillation-pipeline" / "loader.json"


def _kept() -> dict[str, LoaderSettings]:
    path = tuned_path()
    try:
        return TunedSettings.validate_json(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValidationError) as error:
        if collectives.is_main():
            told = error.strerror if isinstance(error, OSError) else "it is damaged, or another version's"
            print(f"note: {path} is passed over ({told}); bench.py loader --tune writes it anew")
        return {}


def processor() -> str:
    """Return the model of this machine's CPU."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    return found[1] if found else platform.machine()
