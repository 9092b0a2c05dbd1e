"""The augmentations by name, and the entries that a recipe's ``data.augment`` is read into."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    create_model,
    model_serializer,
    model_validator,
)

from pipeline.augmentations._base import Augmentation
from pipeline.frozen_model import FrozenModel

_MOST = 16
"""Largest number of augmentations in a recipe."""
_EXAMPLE = "{randaugment: {ops: 2, magnitude: 9}}"


def known_augmentations() -> list[str]:
    """Return the names of the augmentations: the files of this folder that do not begin with an underscore."""
    names = [module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)])]
    return sorted(name for name in names if not name.startswith("_"))


@cache
def find_augmentation(name: str) -> type[Augmentation]:
    """Return the augmentation that the file ``name`` of this folder defines."""
    module = importlib.import_module(f"{__package__}.{name}")
    defined = [
        value for value in vars(module).values() if isinstance(value, type) and value.__module__ == module.__name__
    ]
    (found,) = [value for value in defined if issubclass(value, Augmentation)]
    return found


class _Entry(FrozenModel):
    """An entry of ``data.augment``: the name of an augmentation, and its keys."""

    @model_validator(mode="after")
    def _has_config(self) -> _Entry:
        if self.config is None:
            raise ValueError(f"expected keys of the augmentation, such as {_EXAMPLE}")
        return self

    @model_serializer(mode="wrap")
    def _only_its_name(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Not the other names as null: a new augmentation must not change the identity of old runs.
        return {name: value for name, value in serialize(self).items() if value is not None}

    @property
    def name(self) -> str:
        """Return the augmentation's name."""
        return next(iter(self.model_fields_set), "")

    @property
    def config(self) -> Any:
        """Return the augmentation's config."""
        return getattr(self, self.name, None)


# One optional key for each name, so that the keys' list, the schema and messages of unknown keys need no code of their
# own.
AugmentationEntry = create_model(
    "AugmentationEntry",
    __base__=_Entry,
    **{name: (find_augmentation(name).Config | None, Field(None)) for name in known_augmentations()},  # type: ignore[call-overload]
)


def _check_form(value: Any) -> Any:
    """Raise ValueError unless ``value`` is a list of mappings with one key each."""
    entries = value if isinstance(value, list | tuple) else [None]
    if len(entries) > _MOST:
        raise ValueError(f"expected at most {_MOST} augmentations, got {len(entries)}")
    if not all(isinstance(entry, _Entry) or (isinstance(entry, dict) and len(entry) == 1) for entry in entries):
        raise ValueError(f"expected a list of augmentations, such as [{_EXAMPLE}]")
    return value


def _fitting(entries: tuple[_Entry, ...]) -> tuple[_Entry, ...]:
    return _mixtures_fit(_pixels_first(entries))


def _mixtures_fit(entries: tuple[_Entry, ...]) -> tuple[_Entry, ...]:
    mixing = [entry.name for entry in entries if find_augmentation(entry.name).kind == "mixtures"]
    if repeated := [name for name in mixing if mixing.count(name) > 1]:
        raise ValueError(f"{repeated[0]} is given more than once; an image is mixed once, with one other")
    switched = [entry.name for entry in entries if getattr(entry.config, "switch", None) is not None]
    if switched and len(mixing) == 1:
        raise ValueError(f"{switched[0]}.switch is for a recipe that mixes in two ways; remove it, or add the other")
    if mixing != [entry.name for entry in entries[len(entries) - len(mixing) :]]:
        raise ValueError(f"{mixing[0]} mixes finished images; move it behind all others")
    return entries


def _pixels_first(entries: tuple[_Entry, ...]) -> tuple[_Entry, ...]:
    kinds = [find_augmentation(entry.name).kind for entry in entries]
    for before, after in zip(range(len(kinds)), range(1, len(kinds)), strict=False):
        if (kinds[before], kinds[after]) == ("floats", "pixels"):
            raise ValueError(
                f"{entries[after].name} changes pixels, and {entries[before].name} before it normalised images; "
                f"move {entries[after].name} before it"
            )
    return entries


Augmentations = Annotated[tuple[AugmentationEntry, ...], BeforeValidator(_check_form), AfterValidator(_fitting)]
"""Type of the key ``data.augment``."""


def build_augmentations(entries: Sequence[_Entry], size: int) -> tuple[Augmentation, ...]:
    """Return the augmentations of images of side ``size``, in the order of the recipe."""
    return tuple(find_augmentation(entry.name)(entry.config, size) for entry in entries)
