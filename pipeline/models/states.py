"""Conversion between the state of a network and a safetensors file.

A safetensors file holds tensors by name and nothing else. Two tensors that share memory are written twice, so that the
file loads into any network of the architecture. A network that shares them still shares them after loading. Some
modules load by a version (``torch.nn.Module._version``). Their versions are in the file's metadata.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import TypeAdapter
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

MODULE_VERSIONS = "versions"
"""Key of a file's metadata that holds the modules' versions by path, as JSON."""

LENGTH = 8
"""Number of bytes at the beginning of a file that give the length of its header, a JSON text."""
METADATA = "__metadata__"
"""Key of the header that holds the file's metadata."""


class VersionedState(OrderedDict[str, Tensor]):
    """A state dict, tensors by name, with the versions that torch reads from ``_metadata``."""

    _metadata: dict[str, dict[str, int]]


def module_versions(module: nn.Module) -> dict[str, int]:
    """Return, by path, the versions of the submodules that load by their version; torch's own modules do not."""
    return {
        path: child._version for path, child in module.named_modules(remove_duplicate=False) if _loads_by_version(child)
    }


def _loads_by_version(module: nn.Module) -> bool:
    """Return whether the module's version, or its method for loading, is defined by a class outside ``torch.nn``."""
    names = ("_version", "_load_from_state_dict")
    sources = [next(kind for kind in type(module).__mro__ if name in vars(kind)) for name in names]
    return "_version" in vars(module) or any(not kind.__module__.startswith("torch.nn.") for kind in sources)


def state_metadata(module: nn.Module) -> dict[str, str] | None:
    """Return the metadata for a file of the module's state, or None if there is none."""
    versions = module_versions(module)
    return {MODULE_VERSIONS: TypeAdapter(dict[str, int]).dump_json(versions).decode()} if versions else None


def storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors as safetensors requires them: detached, contiguous, and not sharing memory.

    Raises ValueError if a value is not a tensor.
    """
    found: dict[str, Tensor] = {}
    memory: set[tuple[torch.device, int]] = set()
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} is a {type(tensor).__name__}, but a file holds only tensors")
        contiguous = tensor.detach().contiguous()
        location = (contiguous.device, contiguous.untyped_storage().data_ptr())
        found[name] = contiguous.clone() if location in memory else contiguous
        memory.add(location)
    return found


def file_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return the bytes of a safetensors file; equal content gives equal bytes."""
    content = save(storable(tensors), dict(metadata) or None)
    if len(metadata) < 2:
        return content
    # safetensors writes the metadata's keys in random order. The header is written again with sorted keys.
    end = LENGTH + int.from_bytes(content[:LENGTH], "little")
    header = json.loads(content[LENGTH:end])
    header[METADATA] = dict(sorted(header[METADATA].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH)  # so that the tensors stay aligned to 8 bytes, as the format requires
    return len(text).to_bytes(LENGTH, "little") + text + content[end:]


def read_state(path: Path) -> VersionedState:
    """Return the tensors of a file, with the versions from its metadata.

    Errors of safetensors and pydantic for a damaged file are passed on.
    """
    with safe_open(path, framework="pt") as file:
        state = VersionedState((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118
        text = (file.metadata() or {}).get(MODULE_VERSIONS)
    versions = TypeAdapter(dict[str, int]).validate_json(text, strict=True) if text else {}
    state._metadata = {path: {"version": version} for path, version in versions.items()}
    return state


def load_state(module: nn.Module, state: Mapping[str, Tensor], read: Mapping[str, Tensor] | None = None) -> None:
    """Load ``state`` strictly, with the modules' versions of ``read``, or of ``state`` if ``read`` is None.

    ``read`` is the state that ``state`` was made from. A module without a version there is loaded with the version of
    its current class, since its names and shapes fit.
    """
    current = {path: {"version": version} for path, version in module_versions(module).items()}
    versioned = VersionedState(state)
    versioned._metadata = {**current, **getattr(state if read is None else read, "_metadata", {})}
    module.load_state_dict(versioned, strict=True)
