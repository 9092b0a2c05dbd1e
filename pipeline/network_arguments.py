"""How a recipe gives keyword arguments to the factory of a network; the factories themselves are in ``models``."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import AfterValidator

FIXED = {
    "num_classes": "the shards set the number of classes",
    "features_only": "a network without a classifier cannot be trained",
    **dict.fromkeys(
        ("weights", "weights_backbone", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path"),
        "weights are given by start.weights of the student or weights of the teacher",
    ),
}
"""Arguments that a recipe cannot give, with the reason."""


def _checked(arguments: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the arguments as JSON would store them; None if there are none."""
    for name, value in (arguments or {}).items():
        if name in FIXED:
            raise ValueError(f"{name} cannot be given here; {FIXED[name]}")
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            raise ValueError(
                f"{name}: expected numbers, texts, true, false, lists or mappings, got {value!r}"
            ) from None
    return json.loads(json.dumps(arguments)) if arguments else None


Arguments = Annotated[dict[str, Any] | None, AfterValidator(_checked)]
"""Keyword arguments of a network's factory, as a recipe gives them."""
