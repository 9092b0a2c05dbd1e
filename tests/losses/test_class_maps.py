"""KD and DIST on a detector's maps of class logits: a cell is a row, and every channel is a class with a sigmoid."""

from __future__ import annotations

import math
from typing import Any

import pytest
from loss_cases import STUDENT_SHAPES, TEACHER_SHAPES, Example, example
from oracles.dist import mean_gap
from oracles.sigmoid_kd import parts as sigmoid_kd
from pydantic import ValidationError

from pipeline.batch import Outputs
from pipeline.losses._base import Facts
from pipeline.losses._registry import load_spec

CONFIGS: dict[str, dict[str, Any]] = {
    "kd": {"temperature": 2.0},
    "dist": {"beta": 3.0, "gamma": 5.0, "temperature": 2.0},
}
Rows = list[list[float]]


def on_maps(name: str) -> Example:
    return example(name, load_spec(name, {**CONFIGS[name], "maps": ["head.class"]}), rows=2)


def cells(case: Example, level: str) -> tuple[Rows, Rows]:
    """Return the class logits of a level's cells, of student and teacher."""
    networks = case.student, case.teacher
    ours, theirs = (Outputs(outputs.features[f"head.class.{level}"], {}).logits_BK.tolist() for outputs in networks)
    return ours, theirs


def test_kd_is_that_of_every_channels_sigmoid_averaged_over_cells_and_summed_over_levels():
    case = on_maps("kd")
    expected = 0.0
    for level in ("p3", "p4"):
        student, teacher = cells(case, level)

        class Seen:
            student_logits, teacher_logits = student, teacher

        expected += sigmoid_kd({"temperature": 2.0}, Seen)["sigmoid_kd"]
    assert case.total().item() == pytest.approx(expected, rel=1e-10)


def test_dist_correlates_the_classes_of_a_cell_and_the_cells_of_a_class():
    case, inter, intra = on_maps("dist"), 0.0, 0.0
    for level in ("p3", "p4"):
        both = [[[1 / (1 + math.exp(-z / 2)) for z in row] for row in rows] for rows in cells(case, level)]
        inter += 4 * 3 * mean_gap(*both)
        intra += 4 * 5 * mean_gap(*([list(column) for column in zip(*rows, strict=True)] for rows in both))
    found = case.parts()
    assert (found["inter"].item(), found["intra"].item()) == pytest.approx((inter, intra), rel=1e-10)


@pytest.mark.parametrize("name", CONFIGS)
def test_on_maps_a_loss_reads_no_logits_and_its_gradient_reaches_every_map(name: str):
    case = on_maps(name)
    assert not case.loss.config.reads_head()
    case.total().backward()
    assert case.student.logits.grad is None
    assert {level for level, x in case.student.features.items() if x.grad is not None} == {
        "head.class.p3",
        "head.class.p4",
    }
    assert all(x.grad is None for x in case.teacher.features.values())


@pytest.mark.parametrize("name", ["kd", "dist", "box_l1"])
def test_heads_of_other_anchors_are_refused_in_one_line(name: str):
    stage = "head.box" if name == "box_l1" else "head.class"
    own = {"beta": 0.0} if name == "box_l1" else {**CONFIGS[name], "maps": [stage]}
    other = {**TEACHER_SHAPES, f"{stage}.p4": (12, 4, 6)}
    message = (
        rf"^the student's '{stage}.p4' is shaped .* teacher's '{stage}.p4' \[12, 4, 6\]; both networks need the same"
    )
    with pytest.raises(ValueError, match=message):
        load_spec(name, own).build(Facts(5, STUDENT_SHAPES, other))


def test_a_loss_of_transformed_logits_refuses_maps_as_what_it_transforms():
    inner = {"kd": {"temperature": 1.0, "maps": ["head.class"]}}
    with pytest.raises(ValidationError, match="the loss 'kd' reads no logits, which are what it is for here"):
        load_spec("logit_standardization", {"inner": inner})
