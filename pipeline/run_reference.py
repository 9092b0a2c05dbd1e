"""How a recipe names another run: the recipe file, the method and the overlays of that run."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

from pipeline.frozen_model import FrozenModel


def _split(names: object) -> object:
    return [name.strip() for name in names.split(",")] if isinstance(names, str) else names


class RunReference(FrozenModel):
    """Another run, by its recipe."""

    recipe: str | None = None
    """The recipe file, relative to the file that names it; default with a ``method``: the same recipe file."""
    method: str | None = None
    """The method of that run, for a recipe file without losses."""
    overlays: Annotated[tuple[str, ...], BeforeValidator(_split)] = Field(default=(), alias="with")
    """The overlays of that run."""
