"""The files of a checkpoint: reading, writing, digests, and errors in one line."""

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

MACHINE_ERRORS = (torch.OutOfMemoryError, torch.distributed.DistError)
"""Errors of the GPU or the network, which say nothing about a file."""


@contextmanager
def saving(path: Path, needed: int) -> Iterator[None]:
    """Raise UnwritableFile if torch or another library fails to write ``needed`` bytes to ``path``."""
    with writing(path, needed):
        try:
            yield
        except MACHINE_ERRORS:
            raise
        except (SafetensorError, RuntimeError) as error:
            raise OSError(_reason(error)) from error


@contextmanager
def readable(path: Path, advice: str) -> Iterator[None]:
    """Raise RecipeError, with ``advice``, for any error that a damaged file causes inside the context."""
    try:
        yield
    except (RecipeError, *MACHINE_ERRORS):
        raise
    except Exception as error:
        raise RecipeError(f"{path}: cannot be read ({type(error).__name__}: {_reason(error)}); {advice}") from error


def save_tensors(path: Path, tensors: Mapping[str, Tensor], module: nn.Module | None = None) -> None:
    """Write tensors by name; if they are the state of ``module``, also write its module versions."""
    stored = storable(tensors)
    with saving(path, _bytes(stored)):
        save_file(stored, path, state_metadata(module) if module else None)


def save_pickled(path: Path, state: dict[str, Any]) -> None:
    """Write the state of an optimizer or scaler: tensors, numbers and names, which ``load_pickled`` accepts."""
    with saving(path, sum(_bytes(tensors) for tensors in state.get("state", {}).values())):
        torch.save(state, path)


def load_pickled(path: Path) -> dict[str, Any]:
    """Return what ``save_pickled`` wrote, on the CPU; nothing in the file is executed."""
    with warnings.catch_warnings():
        # torch warns of an unusual pickle protocol; a file that it refuses raises an error anyway.
        warnings.simplefilter("ignore", UserWarning)
        return torch.load(path, map_location="cpu", weights_only=True)


def file_digests(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file in a folder and below it, by relative path."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in paths}


def first_damaged(folder: Path, digests: Mapping[str, str], device: torch.device) -> str | None:
    """Return the first file that is missing or has another digest, None if all are intact.

    Each rank reads its share of the files, and all ranks return the same answer.
    """
    names, rank, ranks = sorted(digests), collectives.rank(), collectives.world_size()
    damaged = (n for n in range(rank, len(names), ranks) if not _is_intact(folder / names[n], digests[names[n]]))
    first = int(collectives.all_reduce_min(torch.tensor(next(damaged, len(names)), device=device)))
    return names[first] if first < len(names) else None


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files in a folder and below it."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _is_intact(path: Path, digest: str) -> bool:
    try:
        return sha256_of(path) == digest
    except OSError:
        return False


def _bytes(tensors: Mapping[str, Any]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors.values() if isinstance(x, Tensor))


def _reason(error: Exception) -> str:
    message = one_line(error)
    # torch's own message advises to trust the file, which would run its code.
    refused = re.search(r"GLOBAL (\S+)", message) if type(error).__name__ == "UnpicklingError" else None
    return f"it would call {refused[1]}, which is not data" if refused else message[:200]
