"""The space of a search: what it may say, and what is wrong with it in one line."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.errors import RecipeError
from pipeline.multirun.space import Categorical, Range, overrides_of, parse_space


def test_a_list_is_a_choice_and_a_mapping_a_range():
    space = parse_space(
        {"epochs": {"low": 2, "high": 8}, "losses.kd.temperature": [2, 4.0], "schedule.milestones": [[1], [2, 3]]}
    )
    assert space["epochs"] == Range(low=2, high=8)
    assert isinstance(space["epochs"], Range)
    assert space["epochs"].is_whole
    assert space["losses.kd.temperature"] == Categorical(values=(2, 4.0))
    assert space["schedule.milestones"].extremes == ([1], [2, 3])


@pytest.mark.parametrize("given", [{"low": 1, "high": 8.0}, {"low": 1, "high": 8, "step": 0.5}])
def test_a_range_with_a_fraction_in_it_is_not_of_whole_numbers(given: dict[str, Any]):
    assert not Range(**given).is_whole


def test_values_become_words_of_a_command_line():
    values = {"a.b": 0.5, "c": [1, 2], "d": "x", "e": None, "f": True}
    assert overrides_of(values) == ["a.b=0.5", "c=[1, 2]", 'd="x"', "e=null", "f=true"]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (None, "space: expected keys and their values, such as space="),
        ([1, 2], "space: expected keys and their values"),
        ({}, "space: expected keys and their values"),
        ({"epochs": [2]}, "space: epochs: a list has 2 to 100 values, got 1"),
        ({"flip": {"low": False, "high": True}}, "space: flip: low: expected a number, got false; give a list"),
        ({"epochs": "two"}, "space: epochs: expected a list of values or {low: …, high: …}, got 'two'"),
        ({"x": {"low": 1, "high": 5, "step": 3}}, "space: x: step: 3 does not lead from low: 1 to high: 5"),
        ({"losses.kd": [1, 2], "losses.kd.weight": [1, 2]}, "losses.kd: meets losses.kd.weight"),
        ({"seed": [1, 2]}, "space: seed: the search sets it for each run; leave it out"),
        ({"data": [1, 2]}, "space: data: the search sets it for each run; leave it out"),
        ({"epochs": [2, 2]}, "space: epochs: a value stands there twice"),
        ({"epochs": 3}, "space: epochs: "),
        ({"epochs": {"low": 3}}, "space: epochs: high: Field required"),
        ({"epochs": {"low": 3, "high": 2}}, "space: epochs: low: 3 must be below high: 2"),
        ({"epochs": {"low": 3, "high": 5, "hihg": 2}}, "space: epochs: hihg: "),
        ({"x": {"low": 0, "high": 5, "log": True}}, "space: x: log: true needs low above 0"),
        ({"x": {"low": 1, "high": 5, "log": True, "step": 1}}, "space: x: log: true takes no step"),
        ({"x": {"low": 1, "high": 5, "step": 0}}, "space: x: step: "),
        ({"x": {"low": 1, "high": float("inf")}}, "space: x: high: "),
        ({"x": {"low": "one", "high": 2}}, "space: x: low"),
    ],
)
def test_what_is_no_space_is_refused_in_one_line(given: Any, told: str):
    with pytest.raises(RecipeError) as raised:
        parse_space(given)
    assert told in str(raised.value)
    assert "\n" not in str(raised.value)
