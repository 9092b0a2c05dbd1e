"""The state of a network as a file of safetensors holds it, and back.

The format knows tensors by name and nothing else. Two of them that share memory are written twice, so that the file
loads into any network of the architecture; one that shares them still does, after both were written to. The versions
by which some modules load (``torch.nn.Module._version``) stand in the file's metadata, where there are any.
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
"""Key of a file's metadata: JSON, a module's version by its path."""

LENGTH = 8
"""Bytes of the number, at the beginning of a file, that says how long its header is, a JSON text."""
METADATA = "__metadata__"
"""Key of the header."""


class VersionedState(OrderedDict[str, Tensor]):
    """Tensors by name, with the versions that torch looks for in ``_metadata``."""

    _metadata: dict[str, dict[str, int]]


def module_versions(module: nn.Module) -> dict[str, int]:
    """Return, by path, the versions of those modules within that load by them; torch's own need none."""
    return {
        path: child._version for path, child in module.named_modules(remove_duplicate=False) if _loads_by_version(child)
    }


def _loads_by_version(module: nn.Module) -> bool:
    """Whether the module's version, or its way of loading, comes from a class that is not torch's own."""
    names = ("_version", "_load_from_state_dict")
    sources = [next(kind for kind in type(module).__mro__ if name in vars(kind)) for name in names]
    return "_version" in vars(module) or any(not kind.__module__.startswith("torch.nn.") for kind in sources)


def state_metadata(module: nn.Module) -> dict[str, str] | None:
    """Return what a file of the module's state says of it beside the tensors; None where there is nothing to say."""
    versions = module_versions(module)
    return {MODULE_VERSIONS: TypeAdapter(dict[str, int]).dump_json(versions).decode()} if versions else None


def storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors as safetensors takes them: without gradient, in rows, none in the memory of another.

    Raises ValueError for what is no tensor.
    """
    found: dict[str, Tensor] = {}
    memory: set[tuple[torch.device, int]] = set()
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} is a {type(tensor).__name__}, and a file holds tensors alone")
        rows = tensor.detach().contiguous()
        place = (rows.device, rows.untyped_storage().data_ptr())
        found[name] = rows.clone() if place in memory else rows
        memory.add(place)
    return found


def file_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return a file's bytes, the same for the same content: safetensors itself puts metadata in any order."""
    content = save(storable(tensors), dict(metadata) or None)
    if len(metadata) < 2:
        return content
    end = LENGTH + int.from_bytes(content[:LENGTH], "little")
    header = json.loads(content[LENGTH:end])
    header[METADATA] = dict(sorted(header[METADATA].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH)  # so that the tensors lie where memory wants them
    return len(text).to_bytes(LENGTH, "little") + text + content[end:]


def read_state(path: Path) -> VersionedState:
    """Return the tensors of a file, and with them the versions that stand in it.

    Raises whatever the readers raise for a file that is none.
    """
    with safe_open(path, framework="pt") as file:
        state = VersionedState((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118
        told = (file.metadata() or {}).get(MODULE_VERSIONS)
    versions = TypeAdapter(dict[str, int]).validate_json(told, strict=True) if told else {}
    state._metadata = {path: {"version": version} for path, version in versions.items()}
    return state


def load_state(module: nn.Module, state: Mapping[str, Tensor], read: Mapping[str, Tensor] | None = None) -> None:
    """Load ``state`` strictly, by the versions of ``read``, what it was read from, or of ``state`` itself.

    A module of which neither tells a version is taken to be as it is now, since its names and shapes fit.
    """
    own = {path: {"version": version} for path, version in module_versions(module).items()}
    whole = VersionedState(state)
    whole._metadata = {**own, **getattr(state if read is None else read, "_metadata", {})}
    module.load_state_dict(whole, strict=True)
