"""The weights that a student inherits from its teacher: those of layers that both have, such as a detector's heads."""

from __future__ import annotations

import torch
from torch import nn

from pipeline.builders.teacher import frozen_networks, trained_network
from pipeline.errors import error_context
from pipeline.features.patterns import matches
from pipeline.runs.identity import Run


def inherit_weights(run: Run, student: nn.Module) -> None:
    """Copy what the patterns of ``student.inherit`` are for from the teacher's weights, as they were trained.

    Raises RecipeError for a pattern of no tensor, and for a tensor that the teacher has not, or of another shape.
    """
    patterns, config = run.recipe.student.inherit, run.recipe.teacher
    if patterns and config is not None:
        # Loaded once more: the teacher's own network has folded BatchNorms and its own precision by now.
        teacher, _ = trained_network(run, frozen_networks(run, config)[0])
        with error_context("student.inherit"):
            copy_tensors(student, teacher.model, patterns)


@torch.no_grad()
def copy_tensors(student: nn.Module, teacher: nn.Module, patterns: tuple[str, ...]) -> None:
    """Copy the tensors that the patterns are for. Raises ValueError if one is for none, or does not fit."""
    ours, theirs = student.state_dict(), teacher.state_dict()
    for name in inherited_names(student, teacher, patterns):
        ours[name].copy_(theirs[name])


def inherited_names(student: nn.Module, teacher: nn.Module, patterns: tuple[str, ...]) -> list[str]:
    """Return the names of the tensors that the patterns are for.

    Raises ValueError if a pattern is for none, or if the teacher has not such a tensor.
    """
    ours, theirs = student.state_dict(), teacher.state_dict()
    for pattern in patterns:
        if not any(matches(name, pattern) for name in ours):
            first = next(iter(ours))
            raise ValueError(f"{pattern!r} is for no parameter or buffer of the student; the first is {first}")
    names = [name for name in ours if any(matches(name, pattern) for pattern in patterns)]
    for name in names:
        if name not in theirs or theirs[name].shape != ours[name].shape:
            other = f"{list(theirs[name].shape)} there" if name in theirs else "not there"
            raise ValueError(
                f"{name} cannot be the teacher's: its shape is {list(ours[name].shape)}, and {other}; give patterns "
                "of what both have alike"
            )
    return names
