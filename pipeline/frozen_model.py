"""The pydantic base class of all settings: recipes, command lines and the project's own files."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class FrozenModel(BaseModel):
    """A pydantic model that rejects unknown keys and cannot be changed.

    Fields may have types that pydantic does not know, such as a loss's class.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True, use_attribute_docstrings=True)
