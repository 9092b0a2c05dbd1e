"""The space of a search: keys of a recipe, and the values that each may take."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from pipeline.errors import RecipeError
from pipeline.frozen_model import FrozenModel

Number = Annotated[int | float, Field(allow_inf_nan=False)]


class Range(FrozenModel):
    """The numbers from ``low`` to ``high``, both included: whole ones if both are, and ``step``, too."""

    low: Number
    high: Number
    log: bool = False
    """Whether to search by the logarithm."""
    step: Annotated[Number, Field(gt=0)] | None = None
    """Distance of neighbouring values; null is 1 for whole numbers, and none for others."""

    @model_validator(mode="after")
    def _is_a_range(self) -> Range:
        if not self.low < self.high:
            raise ValueError(f"low: {self.low} must be below high: {self.high}")
        if self.log and self.low <= 0:
            raise ValueError("log: true needs low above 0")
        if self.log and self.step is not None:
            raise ValueError("log: true takes no step; remove one of them")
        return self

    @property
    def is_whole(self) -> bool:
        """Return whether the values are whole numbers."""
        return all(isinstance(value, int) for value in (self.low, self.high, self.step or 1))

    @property
    def extremes(self) -> tuple[int | float, ...]:
        """Return the smallest and the largest value."""
        return self.low, self.high


class Choice(FrozenModel):
    """Values without an order, which may be anything that a recipe has."""

    values: Annotated[tuple[Any, ...], Field(min_length=2, max_length=100)]

    @property
    def extremes(self) -> tuple[Any, ...]:
        """Return all values."""
        return self.values


Space = Mapping[str, Range | Choice]
_RANGE = TypeAdapter(Range)


def parse_space(given: Any) -> dict[str, Range | Choice]:
    """Return the space: by key a list of values, or a mapping with ``low`` and ``high``. Raises RecipeError."""
    example = "{losses.kd.temperature: [2, 4, 8], schedule.rate: {low: 0.01, high: 0.2, log: true}}"
    if not isinstance(given, dict) or not given:
        raise RecipeError(f"command line: space: expected keys and their values, such as space='{example}'")
    return {str(key): _parse(f"command line: space: {key}", values) for key, values in given.items()}


def _parse(where: str, values: Any) -> Range | Choice:
    try:
        if isinstance(values, list):
            chosen = Choice(values=tuple(values))
            if len({json.dumps(value, sort_keys=True) for value in values}) < len(values):
                raise RecipeError(f"{where}: a value stands there twice")
            return chosen
        return _RANGE.validate_python(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        at = ".".join(map(str, first["loc"]))
        raise RecipeError(f"{where}: {f'{at}: ' if at else ''}{first['msg'].removeprefix('Value error, ')}") from None


def overrides_of(values: Mapping[str, Any]) -> list[str]:
    """Return the values by key as words of a command line."""
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]
