"""Values and gradients of published code, in float64, from tests/published or the folder that ``--published`` names.

One ``.npz`` a case; its name up to the first ``_T`` and a digit, or all of it, names the formula. ``hyper`` is a JSON
string; ``in.*``, ``param.*``, ``out.*`` and ``grad.*`` are arrays: inputs, parameters by published name, outputs and
gradients that are expected.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import published_csd
import published_diffusion
import published_features
import published_logits
import published_maps
import published_relations
import published_super_resolution
import published_survey
import pytest
import torch
from published_cases import Case
from torch import Tensor

FORMULAS = (
    published_logits.FORMULAS
    | published_features.FORMULAS
    | published_maps.FORMULAS
    | published_relations.FORMULAS
    | published_diffusion.FORMULAS
    | published_survey.FORMULAS
    | published_super_resolution.FORMULAS
    | published_csd.FORMULAS
)


def formula_name(path: Path) -> str:
    return re.split(r"_T\d", path.stem)[0]


def load(path: Path) -> Case:
    with np.load(path, allow_pickle=False) as arrays:
        case: Case = {key: torch.from_numpy(arrays[key]) for key in arrays.files if key != "hyper"}
        return {**case, "hyper": json.loads(str(arrays["hyper"]))}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "path" in metafunc.fixturenames:
        paths = sorted(metafunc.config.getoption("--published").glob("*.npz"))
        metafunc.parametrize("path", paths, ids=[path.stem for path in paths])


def assert_close(found: Tensor, expected: Tensor, what: str) -> None:
    # Relative to the array's largest entry. A bias before a norm has a gradient of zero: there a published array holds
    # nothing but the rounding of its own sums (up to 8e-15), and another order of summing rounds otherwise.
    largest = expected.abs().max().item()
    tolerance = 1e-13 if largest < 1e-13 else 1e-9 * largest
    assert found.shape == expected.shape, what
    worst = (found - expected).abs().max().item()
    assert worst <= tolerance, f"{what} is off by {worst:.3g}, allowed is {tolerance:.3g}"


def test_a_formula_equals_its_published_values(path: Path):
    name = formula_name(path)
    assert name in FORMULAS, f"{path.name}: no formula is known under {name!r}"
    case = load(path)
    outputs, scalar, leaves = FORMULAS[name](case)
    expected = {key.removeprefix("out."): case[key] for key in case if key.startswith("out.")}
    assert set(outputs) == set(expected)
    for key, value in expected.items():
        assert_close(outputs[key], value, f"out.{key}")
    gradients = {key.removeprefix("grad."): case[key] for key in case if key.startswith("grad.")}
    assert set(leaves) == set(gradients)
    scalar.backward()
    for key, value in gradients.items():
        grad = leaves[key].grad
        assert grad is not None, f"grad.{key}"
        assert_close(grad, value, f"grad.{key}")


def test_there_are_published_values_to_check(pytestconfig: pytest.Config):
    folder = pytestconfig.getoption("--published")
    names = {formula_name(path) for path in folder.glob("*.npz")}
    assert names & set(FORMULAS), f"{folder} has no case of a formula that is written"
