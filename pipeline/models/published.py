"""Torchvision's and timm's published weights, by name, and how the images that they expect are normalised."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torchvision.models
from torch import Tensor
from torch.hub import load_state_dict_from_url

from pipeline.models.from_timm import PREFIX, timm_normalization, timm_weights

_Triple = tuple[float, float, float]
RESCALING = ("googlenet", "inception_v3")
"""Networks that torchvision lets turn images of ImageNet's mean and std into those of their weights, 0.5 and 0.5."""


class Published(NamedTuple):
    """Per-channel mean and standard deviation of the images that weights were trained on."""

    mean: _Triple
    std: _Triple


def published_weights(name: str, weights: str) -> Mapping[str, Tensor]:
    """Return the published weights of that name for the network ``name``, from the hub's folder or its address.

    Raises ValueError, one line, where there are none or they cannot be had.
    """
    if name.startswith(PREFIX):
        return timm_weights(name, weights)
    url = _torchvision(name, weights).url
    try:
        return load_state_dict_from_url(url, map_location="cpu", progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{weights} of {name}: no download from {url} ({reason}); give a file") from error


def published_normalization(name: str, weights: str) -> Published | None:
    """Return what the network's images must be normalised with for those weights; None where there are no such weights.

    As torchvision's transforms and timm's configuration say it, without the weights themselves.
    """
    try:
        found = (
            timm_normalization(name, weights) if name.startswith(PREFIX) else _torchvision(name, weights).transforms()
        )
    except ValueError:
        return None
    if name in RESCALING:
        return Published((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    return Published(_triple(found.mean), _triple(found.std))


def _triple(values: Iterable[float]) -> _Triple:
    red, green, blue = map(float, values)
    return red, green, blue


def _torchvision(name: str, weights: str) -> Any:
    try:
        published = torchvision.models.get_model_weights(name).__members__
    except ValueError:
        raise ValueError(
            f"{weights}: there is no such file, and torchvision has no weights of {name!r}; give a file"
        ) from None
    if weights not in published:
        raise ValueError(f"{weights}: no weights of {name}; torchvision has {', '.join(published)}; or give a file")
    return published[weights].value
