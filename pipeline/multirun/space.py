"""The space of a search: keys of a recipe, and the values that each may take."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError, model_validator

from pipeline.errors import RecipeError
from pipeline.frozen_model import FrozenModel


def _no_switch(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"expected a number, got {json.dumps(value)}; give a list, [false, true]")
    return value


Number = Annotated[int | float, Field(allow_inf_nan=False), BeforeValidator(_no_switch)]
SET_BY_SEARCH = ("seed", "folder", "data.holdout")
"""Keys that the search itself sets for each of its runs."""


MOST_VALUES = 100
"""Values of a list."""


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
        if self.step is not None and not _divides(self.step, self.high - self.low):
            raise ValueError(f"step: {self.step} does not lead from low: {self.low} to high: {self.high}")
        return self

    @property
    def is_whole(self) -> bool:
        """Return whether the values are whole numbers."""
        return all(isinstance(value, int) for value in (self.low, self.high, self.step or 1))

    @property
    def extremes(self) -> tuple[int | float, ...]:
        """Return the smallest and the largest value."""
        return self.low, self.high


class Categorical(FrozenModel):
    """Values without an order, which may be anything that a recipe has."""

    values: tuple[Any, ...]

    @property
    def extremes(self) -> tuple[Any, ...]:
        """Return all values."""
        return self.values


Space = Mapping[str, Range | Categorical]
_RANGE = TypeAdapter(Range)


def parse_space(given: Any) -> dict[str, Range | Categorical]:
    """Return the space: by key a list of values, or a mapping with ``low`` and ``high``. Raises RecipeError."""
    example = "{losses.kd.temperature: [2, 4, 8], schedule.rate: {low: 0.01, high: 0.2, log: true}}"
    if not isinstance(given, dict) or not given:
        raise RecipeError(f"command line: space: expected keys and their values, such as space='{example}'")
    space = {str(key): _parse(f"command line: space: {key}", values) for key, values in given.items()}
    for key in space:
        if any(_meets(key, other) for other in SET_BY_SEARCH):
            raise RecipeError(f"command line: space: {key}: the search sets it for each run; leave it out")
        if within := next((other for other in space if other != key and _meets(key, other)), None):
            raise RecipeError(f"command line: space: {key}: meets {within}, and both would set the same; give one")
    return space


def check_overrides(space: Space, overrides: Sequence[str]) -> None:
    """Raise RecipeError if the space sets a key, or one above it, that an override sets, too."""
    for given in (override.partition("=")[0] for override in overrides):
        if taken := next((key for key in space if f"{given}.".startswith(f"{key}.")), None):
            raise RecipeError(f"command line: {given}: the space has {taken}, which would replace it; give one of them")


def _meets(key: str, other: str) -> bool:
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")


def _divides(step: float, width: float) -> bool:
    return math.isclose(width / step, round(width / step), rel_tol=1e-9) and round(width / step) > 0


def _parse(where: str, values: Any) -> Range | Categorical:
    try:
        if not isinstance(values, list | dict):
            raise RecipeError(f"{where}: expected a list of values or {{low: …, high: …}}, got {values!r}")
        if isinstance(values, list):
            if not 2 <= len(values) <= MOST_VALUES:
                raise RecipeError(f"{where}: a list has 2 to {MOST_VALUES} values, got {len(values)}")
            chosen = Categorical(values=tuple(values))
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
