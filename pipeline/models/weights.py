"""Weights from a file, or torchvision's or timm's published ones, into a network of exactly that architecture."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision.models
from torch import Tensor, nn
from torch.hub import load_state_dict_from_url

from pipeline.models.from_timm import PREFIX, timm_weights
from pipeline.models.states import load_state, read_state

FILES = (".pt", ".pth", ".safetensors")
# Weights saved before BatchNorm counted its batches do not have this one; nothing here reads it.
COUNTER = "num_batches_tracked"
# Heads of torchvision's GoogLeNet and Inception that only train them; create_model leaves them out.
AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")
# Under which of these training scripts save the network beside the optimizer: torchvision's and timm's, RepDistiller's.
WRAPPINGS = ("state_dict", "model")


def load_weights(model: nn.Module, source: str, name: str) -> None:
    """Load ``source`` into ``model``: a ``.pt``, ``.pth`` or ``.safetensors`` file, or the published ones for ``name``.

    Published are torchvision's by their name, such as IMAGENET1K_V1, and timm's by a tag or ``pretrained``.

    The file holds a state dict, maybe under ``state_dict`` or ``model``, maybe with DDP's ``module.`` before each key.
    Raises ValueError or FileNotFoundError, with ``model`` as it was, for what cannot be read or is of another
    architecture.
    """
    found = _read(source, name)
    own = model.state_dict()
    state = {key: value for key, value in found.items() if key in own or not key.startswith(AUXILIARY)}
    _check_fit(model, state, source, name)
    load_state(model, state, found)


def is_file(source: str) -> bool:
    """Whether ``source`` is a file of one's own, and not the name of published weights."""
    return source.endswith(FILES)


def weights_sha256(source: str, name: str) -> str:
    """Return the sha256 of the tensors, by name, type, shape and bytes: the same whatever file they lie in."""
    found = hashlib.sha256()
    for key, value in sorted(_read(source, name).items()):
        found.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        found.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _read(source: str, name: str) -> Mapping[str, Tensor]:
    return _read_file(Path(source)) if is_file(source) else _published(name, source)


def _read_file(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such weights file")
    read = read_state if path.suffix == ".safetensors" else partial(torch.load, map_location="cpu", weights_only=True)
    try:
        found = read(path)
    except Exception as error:  # a damaged file makes the readers raise nearly anything
        kind = type(error).__name__
        raise ValueError(f"{path}: cannot be read as tensors ({kind}); save model.state_dict() there") from error
    return _plain(found, path)


def _plain(found: Any, path: Path) -> Mapping[str, Tensor]:
    """Return the state dict inside what a file holds, with plain keys."""
    if isinstance(found, Mapping):
        found = next((found[key] for key in WRAPPINGS if isinstance(found.get(key), Mapping)), found)
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{path}: expected tensors by name, a state dict; save model.state_dict() there")
    if found and all(key.startswith("module.") for key in found):
        return {key.removeprefix("module."): value for key, value in found.items()}
    return found


def _published(name: str, weights_name: str) -> Mapping[str, Tensor]:
    if name.startswith(PREFIX):
        return timm_weights(name, weights_name)
    files = f"give a file ({', '.join(FILES)})"
    try:
        published = torchvision.models.get_model_weights(name).__members__
    except ValueError:
        raise ValueError(f"{weights_name}: torchvision has no weights of {name!r}; {files}") from None
    if weights_name not in published:
        raise ValueError(f"{weights_name}: no weights of {name}; torchvision has {', '.join(published)}; or {files}")
    weights = published[weights_name].value
    try:
        return load_state_dict_from_url(
            weights.url, map_location="cpu", progress=False, check_hash=True, weights_only=True
        )
    except (OSError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{weights_name} of {name}: no download from {weights.url} ({reason}); {files}") from error


def _check_fit(model: nn.Module, state: Mapping[str, Tensor], source: str, name: str) -> None:
    """Raise ValueError unless ``state`` has the keys and shapes of ``model``."""
    wanted = model.state_dict()
    missing = [key for key in wanted if key not in state and not key.endswith(COUNTER)]
    unexpected = [key for key in state if key not in wanted]
    reshaped = [key for key in wanted if key in state and wanted[key].shape != state[key].shape]
    head = list(wanted)[-1].rpartition(".")[0]
    if reshaped and not (missing or unexpected) and all(key.startswith(f"{head}.") for key in reshaped):
        theirs, ours = state[reshaped[0]].shape[0], wanted[reshaped[0]].shape[0]
        raise ValueError(f"{source}: the weights have {theirs} classes, the network has {ours}, as many as the shards")
    problems = [f"{len(missing)} keys missing (first {missing[0]})"] if missing else []
    problems += [f"{len(unexpected)} unexpected (first {unexpected[0]})"] if unexpected else []
    if reshaped:
        theirs, ours = tuple(state[reshaped[0]].shape), tuple(wanted[reshaped[0]].shape)
        problems += [f"{len(reshaped)} of another shape (first {reshaped[0]}: {theirs}, expected {ours})"]
    if problems:
        raise ValueError(f"{source}: weights of another architecture than {name}: {'; '.join(problems)}")
