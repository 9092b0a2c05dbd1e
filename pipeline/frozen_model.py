"""The base class of everything that is read from a recipe, a command line or a file of ours."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class FrozenModel(BaseModel):
    """A pydantic model that refuses unknown keys and cannot be changed once it is made.

    Fields may hold types that pydantic does not know, such as a loss's class.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)
