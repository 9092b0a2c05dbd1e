"""Weights from a file, or torchvision's or timm's published ones, into a network of exactly that architecture."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.models.create import create_model
from pipeline.models.file_memo import memoized_by_file
from pipeline.models.fitting import Fitted, check_finite, fit_state
from pipeline.models.published import published_weights
from pipeline.models.weights_file import is_file, read_file


def load_weights(model: nn.Module, source: str, name: str, key: str | None = None) -> str:
    """Load ``source`` into ``model``: a file (``is_file``), or the published ones for the network ``name``.

    Published are torchvision's by their name, such as IMAGENET1K_V1, and timm's by a tag or ``pretrained``. Where a
    file holds several weights that fit, ``key`` names those that are meant; ``fit`` says what may lie around them.

    Returns what was chosen or left out, a line or nothing. Raises ValueError or FileNotFoundError, with ``model`` as it
    was, for what cannot be read, is of another architecture, or is no weights.
    """
    state, note = _fitted(model, source, name, key)
    # With the network's own versions of its modules (``_metadata``), whose names and shapes these are; and its own
    # counters of batches, where there are none.
    whole = model.state_dict()
    whole.update(state)
    model.load_state_dict(whole, strict=True)
    return note


def weights_sha256(source: str, name: str, num_classes: int, key: str | None = None) -> str:
    """Return the sha256 of the network's tensors: the same whatever file they lie in, and whatever stands around them.

    That of a file is remembered for as long as the file stays as it is.
    """
    if not is_file(source):
        return _sha256(_fitted(_empty(name, num_classes), source, name, key).state)
    about = [name, num_classes, key]
    return memoized_by_file(
        Path(source), about, lambda: _sha256(_fitted(_empty(name, num_classes), source, name, key).state)
    )


def _fitted(model: nn.Module, source: str, name: str, key: str | None) -> Fitted:
    content: Any = read_file(Path(source)) if is_file(source) else published_weights(name, source)
    fitted = fit_state(content, model, source, name, key)
    check_finite(fitted.state, model, source)
    return fitted


def _empty(name: str, num_classes: int) -> nn.Module:
    """Return the network for its names and shapes alone; what computes with numbers while it is built has them."""
    with torch.random.fork_rng():
        try:
            with torch.device("meta"):
                return create_model(name, num_classes)
        except Exception:  # what is wrong is so below, too
            return create_model(name, num_classes)


def _sha256(state: Mapping[str, Tensor]) -> str:
    """Return the sha256 of tensors by name, type, shape and bytes."""
    found = hashlib.sha256()
    for key, value in sorted(state.items()):
        found.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        found.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
