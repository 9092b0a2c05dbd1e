"""Files of a checkpoint: written in whole or refused in one line, and held against their digests."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.distributed import collectives
from pipeline.errors import RecipeError, one_line
from pipeline.models.states import state_metadata, storable
from shards.manifest import sha256_of, writing

OF_THE_MACHINE = (torch.OutOfMemoryError, torch.distributed.DistError)
"""Errors that say nothing of a file."""


@contextmanager
def saving(path: Path, needed: int) -> Iterator[None]:
    """Be where torch or another library writes ``path``: its errors, too, become UnwritableFile."""
    with writing(path, needed):
        try:
            yield
        except OF_THE_MACHINE:
            raise
        except (SafetensorError, RuntimeError) as error:
            raise OSError(_reason(error)) from error


@contextmanager
def readable(path: Path, mend: str) -> Iterator[None]:
    """Raise RecipeError, with what to do, for whatever a damaged file makes its reader raise inside the context."""
    try:
        yield
    except (RecipeError, *OF_THE_MACHINE):
        raise
    except Exception as error:
        raise RecipeError(f"{path}: cannot be read ({type(error).__name__}: {_reason(error)}); {mend}") from error


def save_tensors(path: Path, tensors: Mapping[str, Tensor], module: nn.Module | None = None) -> None:
    """Write tensors by name; of a ``module`` whose state they are its versions, too."""
    found = storable(tensors)
    with saving(path, _bytes(found)):
        save_file(found, path, state_metadata(module) if module else None)


def save_pickled(path: Path, state: dict[str, Any]) -> None:
    """Write an optimizer's or a scaler's state: tensors, numbers and names, as ``load_pickled`` takes them."""
    with saving(path, sum(_bytes(each) for each in state.get("state", {}).values())):
        torch.save(state, path)


def load_pickled(path: Path) -> dict[str, Any]:
    """Return what ``save_pickled`` wrote, on the CPU; nothing in the file is executed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of another protocol than torch's: what it refuses is an error
        return torch.load(path, map_location="cpu", weights_only=True)


def file_digests(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file in a folder and below it, by its path from there."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in paths}


def first_damaged(folder: Path, digests: Mapping[str, str], device: torch.device) -> str | None:
    """Return the first file that is gone or not of its digest. Each rank reads its share, and all get the answer."""
    names, rank, ranks = sorted(digests), collectives.rank(), collectives.world_size()
    damaged = (n for n in range(rank, len(names), ranks) if not _is_whole(folder / names[n], digests[names[n]]))
    first = int(collectives.all_reduce_min(torch.tensor(next(damaged, len(names)), device=device)))
    return names[first] if first < len(names) else None


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files in a folder and below it."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _is_whole(path: Path, digest: str) -> bool:
    try:
        return sha256_of(path) == digest
    except OSError:
        return False


def _bytes(tensors: Mapping[str, Any]) -> int:
    return sum(each.numel() * each.element_size() for each in tensors.values() if isinstance(each, Tensor))


def _reason(error: Exception) -> str:
    told = one_line(error)
    # Torch advises to trust the file.
    refused = re.search(r"GLOBAL (\S+)", told) if type(error).__name__ == "UnpicklingError" else None
    return f"it would call {refused[1]}, which is not data" if refused else told[:200]
