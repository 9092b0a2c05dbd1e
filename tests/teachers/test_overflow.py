"""A teacher whose logits are beyond half precision is named, and what the message says helps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline.models import create_model
from pipeline.optim.guard import NonFiniteError


def test_a_teacher_that_overflows_is_named_and_the_advice_works(run_train: Callable[..., None], recipes: Path):
    torch.manual_seed(0)
    state = create_model("cifar_resnet8", 20).state_dict()
    torch.save(state | {"fc.weight": 1e6 * state["fc.weight"]}, recipes / "loud.pt")
    teacher = "teacher={recipe: null, model: cifar_resnet8, weights: loud.pt}"
    words = ("ce.yaml", teacher, "losses.kd.temperature=4", "stop.steps=2")
    with pytest.raises(
        NonFiniteError, match=r"the teacher's own logits are not finite in float16; give teacher\.dtype"
    ):
        run_train(*words, "teacher.dtype=fp16", "folder=half")
    for dtype in ("bf16", "fp32"):
        run_train(*words, f"teacher.dtype={dtype}", f"folder={dtype}")
