"""The methods of ``configs/methods`` and their losses."""

from __future__ import annotations

from typing import Any

from pipeline.config.compose import compose
from pipeline.config.source import RecipeSource, known_methods, method_file
from pipeline.losses._registry import find_loss

WITHOUT_TEACHER = ("ce", "ab", "fsp", "bce", "byot", "cs_kd", "subclass_auxiliary", "dml", "pcl", "mmt", "csd")


def losses_of(method: str) -> dict[str, Any]:
    """Return the losses of a method's file, with its own constants."""
    return compose(RecipeSource(method_file(method)))["losses"]


def arguments_of(method: str) -> dict[str, Any]:
    """Return the arguments of the networks that a method's file asks for."""
    return compose(RecipeSource(method_file(method))).get("student", {}).get("arguments", {})


def keys_of(section: str, method: str) -> set[str]:
    """Return the keys that a method's file sets in a section of a pair's recipe."""
    return {*(compose(RecipeSource(method_file(method))).get(section) or {})}


ALL = [name for name in known_methods() if not name.endswith("_paper_literal")]
"""All methods but those that have another's losses with another training strategy."""
MULTILABEL = [name for name in ALL if "bce" in losses_of(name)]
"""The methods for images of any number of classes."""
OF_TOKENS = [name for name in ALL if "deit" in losses_of(name)]
"""The methods for students with a distillation token."""
OF_MASKS = [name for name in ALL if losses_of(name).keys() & {"ifvd", "segmentation"}]
"""The methods that read the class of every pixel."""
OF_BOXES = [name for name in ALL if losses_of(name).keys() & {"box_l1", "detection", "fgd"}]
"""The methods for detectors alone."""
OF_IMAGES = [name for name in ALL if "l1" in losses_of(name)]
"""The methods for networks that enlarge images."""
OF_MODULES = [name for name in ALL if "ft" in losses_of(name)]
"""The methods whose losses start with modules that another run left."""
OF_PEERS = [name for name in ALL if "peers" in keys_of("student", name)]
"""The methods of several networks that train together."""
OF_STAGES = [
    name for name in ALL if keys_of("student", name) & {"train"} or (keys_of("teacher", name) and name not in OF_PEERS)
]
"""The methods with the losses of others, whose students or teachers have several stages."""
_OTHERS = (*MULTILABEL, *OF_TOKENS, *OF_MASKS, *OF_BOXES, *OF_IMAGES, *OF_MODULES, *OF_PEERS, *OF_STAGES)
METHODS = [name for name in ALL if name not in _OTHERS]
"""The methods for images of one class and any network, in one run."""
CAPTURABLE = [name for name in METHODS if all(find_loss(loss).capturable for loss in losses_of(name))]
"""Those of them whose step a CUDA graph can record."""


_SMALL: dict[str, dict[str, Any]] = {
    "csd": {
        "phi": {"model": "extractors:Tiny", "weights": "tiny.pt", "stages": {"logits": "head"}, "taps": ["one", "two"]},
        "level_weights": [0.25, 1.0],
        "negatives": 1,
    }
}
"""What a loss has in tests instead of its method's: networks for images of a few pixels, and few images."""


def config_of(loss: str) -> dict[str, Any]:
    """Return a loss's config, with ``_SMALL``: that of the method of its name, or else of another that uses it."""
    names = sorted(ALL, key=lambda name: (name != loss, name))
    found = next((losses[loss] for losses in map(losses_of, names) if loss in losses), None)
    assert found is not None, f"no method under configs/methods/ uses the loss {loss}"
    return {**found, **_SMALL.get(loss, {})}
