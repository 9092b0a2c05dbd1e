"""Safe reading of weights files, safetensors or files of ``torch.save``: no code in them is run."""

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
    """Return whether ``source`` is a file, and not the name of published weights.

    It is a file if it exists, if its path has a folder, or if it has the ending of a weights file.
    """
    return "/" in source or source.endswith(ENDINGS) or Path(source).is_file()


def read_file(path: Path) -> Any:
    """Return a file's contents: tensors by name, possibly nested, and possibly with plain values beside them.

    The format is recognised by the file's first bytes. Raises ValueError or FileNotFoundError, in one line.
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
    if beginning[8:] == b"{":  # safetensors: 8 bytes with the header's length, then a JSON object
        return load_file(path)
    if beginning.startswith(b"PK"):
        _check_archive(path)
    # With weights_only, torch creates only tensors and these types from a pickle, and calls nothing else.
    with path.open("rb") as file, torch.serialization.safe_globals(_harmless_types()), warnings.catch_warnings():
        # Torch warns of unusual pickle protocols, but raises an error if it cannot read one.
        warnings.simplefilter("ignore", UserWarning)
        # An open file, because for a path torch chooses the reader by the path's ending.
        return torch.load(file, map_location="cpu", weights_only=True)


def _check_archive(path: Path) -> None:
    """Raise ValueError if members are compressed, or together larger than the file.

    ``torch.save`` writes no such file, and unpacking one could fill the memory.
    """
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    compressed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
    if compressed or sum(member.file_size for member in members) > path.stat().st_size:
        raise ValueError("its members are compressed, which torch.save never does")


def _harmless_types() -> list[Any]:
    """Return the types, other than tensors, of values that training scripts save beside the weights.

    Objects of these types, created from any pickle, contain only numbers, text and each other, and run no code.
    """
    # The functions that unpickle numpy's scalars and arrays. Which module they are in depends on numpy's version, so
    # both modules' names are allowed below.
    scalar, array = np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]
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
    """Return the reason why a file cannot be read, with the type that torch refuses to load, if that is the reason."""
    refused = re.search(r"GLOBAL (\S+)", str(error))
    if refused:
        return f"holds {refused[1]}, which is neither a tensor nor a plain value and is not loaded"
    return f"cannot be read as tensors ({type(error).__name__})"


def mappings(found: Any, depth: int = 4) -> list[tuple[str, Mapping[str, Any]]]:
    """Return every mapping with text keys inside a file's contents, with its dotted key, outer mappings first.

    At most ``depth`` levels of nesting are searched.
    """
    layer, result, seen = [("", found)], [], {id(found)}
    for _ in range(depth):
        inner = []
        for path, mapping in layer:
            if not isinstance(mapping, Mapping):
                continue
            items = {key: value for key, value in mapping.items() if isinstance(key, str)}
            result.append((path, items))
            for key, value in items.items():
                # A pickle may contain one mapping twice, or a mapping that contains itself.
                if isinstance(value, Mapping) and id(value) not in seen:
                    seen.add(id(value))
                    inner.append((f"{path}.{key}" if path else key, value))
        layer = inner
    return result
