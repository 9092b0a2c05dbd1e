"""Torchvision's and timm's published weights by name, and the normalisation of the images they expect."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torchvision.models
from torch import Tensor
from torch.hub import load_state_dict_from_url

from pipeline.models.coco_weights import torchvision_name, without_eps
from pipeline.models.from_timm import PREFIX, timm_normalization, timm_weights

_Triple = tuple[float, float, float]
RESCALING = ("googlenet", "inception_v3")
"""Networks whose weights expect a mean and std of 0.5.

Torchvision's transforms name ImageNet's mean and std for them, because its networks convert such images themselves.
"""


class Published(NamedTuple):
    """The per-channel mean and standard deviation of the images that weights were trained on."""

    mean: _Triple
    std: _Triple


def published_weights(name: str, weights: str, arguments: Mapping[str, Any] | None = None) -> Mapping[str, Tensor]:
    """Return the published weights ``weights`` for the network ``name``, from the hub's cache folder or by download.

    A detector's have the classes of COCO by the number of the category, 0 to 90. timm fits some weights to
    ``arguments`` of the network, such as another size of the images. Raises ValueError, in one line, if there are no
    such weights or they cannot be loaded.
    """
    if name.startswith(PREFIX):
        return timm_weights(name, weights, arguments)
    url = _torchvision(name, weights).url
    try:
        state = load_state_dict_from_url(url, map_location="cpu", progress=False, check_hash=True, weights_only=True)
        return without_eps(state, name)
    except (OSError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{weights} of {name}: cannot download {url} ({reason}); give a file") from error


def published_normalization(name: str, weights: str) -> Published | None:
    """Return the mean and std that images must be normalised with for these weights; None if there are no such weights.

    They are read from torchvision's transforms or timm's configuration, without loading the weights.
    """
    try:
        found = (
            timm_normalization(name, weights) if name.startswith(PREFIX) else _torchvision(name, weights).transforms()
        )
    except ValueError:
        return None
    if not hasattr(found, "mean"):  # torchvision's detectors normalise images themselves
        return Published((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    if name in RESCALING:
        return Published((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    return Published(_triple(found.mean), _triple(found.std))


def _triple(values: Iterable[float]) -> _Triple:
    red, green, blue = map(float, values)
    return red, green, blue


def _torchvision(name: str, weights: str) -> Any:
    try:
        published = torchvision.models.get_model_weights(torchvision_name(name)).__members__
    except ValueError:
        raise ValueError(
            f"{weights}: there is no such file, and torchvision has no weights of {name!r}; give a file"
        ) from None
    if weights not in published:
        raise ValueError(f"{weights}: no weights of {name}; torchvision has {', '.join(published)}; or give a file")
    return published[weights].value
