"""DDKD: DiffKD's oracle, whose logits' distance is whatever the recipe names; here it is DKD's own oracle."""

from __future__ import annotations

from oracles.diffkd import PROPERTIES, parts

__all__ = ["PROPERTIES", "parts"]
