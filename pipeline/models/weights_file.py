"""Reading a weights file so that nothing in it runs: safetensors, or what ``torch.save`` wrote."""

from __future__ import annotations

import argparse
import pathlib
import re
import types
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

ENDINGS = (".pt", ".pth", ".safetensors", ".ckpt", ".bin", ".tar", ".th")
WEIGHTS_ADVICE = "save model.state_dict() there"


def is_file(source: str) -> bool:
    """Return whether ``source`` is a file of one's own, and not the name of published weights.

    It is one if it is there, names a folder, or ends as such files do.
    """
    return "/" in source or source.endswith(ENDINGS) or Path(source).is_file()


def read_file(path: Path) -> Any:
    """Return what a file holds: tensors by name, maybe with plain values beside them or around them.

    What kind of file it is, is told by how it begins. Raises ValueError or FileNotFoundError, one line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such weights file")
    try:
        return _read(path)
    except Exception as error:  # a damaged file makes the readers raise nearly anything
        raise ValueError(f"{path}: {_reason(error)}; {WEIGHTS_ADVICE}") from error


def _read(path: Path) -> Any:
    with path.open("rb") as file:
        beginning = file.read(9)
    if beginning[8:] == b"{":  # behind the length of the header
        return load_file(path)
    if beginning.startswith(b"PK"):
        _check_archive(path)
    # With weights_only nothing is made of a pickle, or called, but tensors and these types.
    with path.open("rb") as file, torch.serialization.safe_globals(_harmless()), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the pickle's protocol: what torch cannot read it refuses
        return torch.load(file, map_location="cpu", weights_only=True)  # of a path, torch looks at the ending


def _check_archive(path: Path) -> None:
    """Raise ValueError for members that are packed or larger than the file: torch writes none, and memory is finite."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    packed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
    if packed or sum(member.file_size for member in members) > path.stat().st_size:
        raise ValueError("its members are packed, and torch.save packs none")


def _harmless() -> list[Any]:
    """Return the types of values, not tensors, that training scripts keep beside the weights.

    Made of what a pickle says they hold numbers, text and one another, and do nothing.
    """
    scalar, array = np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]  # by numpy's version in other modules
    kinds = {type(np.dtype(code)) for code in "?bhilBHILefdSU"}
    return [
        argparse.Namespace,
        types.SimpleNamespace,
        (pathlib.PurePosixPath, "pathlib.PosixPath"),
        (pathlib.PurePosixPath, "pathlib._local.PosixPath"),
        (pathlib.PureWindowsPath, "pathlib.WindowsPath"),
        (pathlib.PureWindowsPath, "pathlib._local.WindowsPath"),
        *((pathlib.PurePosixPath, f"{module}.PurePosixPath") for module in ("pathlib", "pathlib._local")),
        *((scalar, f"numpy.{module}.multiarray.scalar") for module in ("core", "_core")),
        *((array, f"numpy.{module}.multiarray._reconstruct") for module in ("core", "_core")),
        np.ndarray,
        np.dtype,
        *kinds,
    ]


def _reason(error: Exception) -> str:
    """Return why a file cannot be read; what torch refuses to make of a pickle is named."""
    refused = re.search(r"GLOBAL (\S+)", str(error))
    if refused:
        return f"holds {refused[1]}, which is neither a tensor nor a plain value and is not loaded"
    return f"cannot be read as tensors ({type(error).__name__})"


def mappings(found: Any, depth: int = 4) -> list[tuple[str, Mapping[str, Any]]]:
    """Return every mapping by text inside what a file holds, the outer ones first, by its dotted place there."""
    layer, result, seen = [("", found)], [], {id(found)}
    for _ in range(depth):
        inner = []
        for place, each in layer:
            if not isinstance(each, Mapping):
                continue
            own = {key: value for key, value in each.items() if isinstance(key, str)}
            result.append((place, own))
            for key, value in own.items():
                if isinstance(value, Mapping) and id(value) not in seen:
                    seen.add(id(value))
                    inner.append((f"{place}.{key}" if place else key, value))
        layer = inner
    return result
