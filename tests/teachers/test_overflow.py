"""A teacher that is beyond half precision is named by the key of its network, and what the message says helps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.batch import Outputs
from pipeline.models import create_model
from pipeline.optim.guard import NonFiniteError
from pipeline.teachers.cached import CachedTeacher, half_answers
from pipeline.teachers.ensemble import TeacherEnsemble

Train = Callable[..., None]
KD = ("ce.yaml", "losses.kd.temperature=4", "stop.steps=2")


@pytest.fixture
def loud(recipes: Path) -> Path:
    """The folder of the recipes, with ``loud.pt``, whose logits float16 cannot hold, and ``quiet.pt``."""
    torch.manual_seed(0)
    state = create_model("cifar_resnet8", 20).state_dict()
    torch.save(state, recipes / "quiet.pt")
    torch.save(state | {"fc.weight": 1e6 * state["fc.weight"]}, recipes / "loud.pt")
    return recipes


def test_a_teacher_that_overflows_is_named_and_the_advice_works(run_train: Train, loud: Path):
    words = (*KD, "teacher={recipe: null, model: cifar_resnet8, weights: loud.pt}")
    with pytest.raises(NonFiniteError, match=r"the teacher's own logits are not finite in float16; set teacher\.dtype"):
        run_train(*words, "teacher.dtype=fp16", "folder=half")
    for dtype in ("bf16", "fp32"):
        run_train(*words, f"teacher.dtype={dtype}", f"folder={dtype}")


@pytest.mark.parametrize(("combine", "number"), [("mean", 1), ("entropy", 0), ("confidence", 1)])
def test_so_is_a_member_of_several_and_the_advice_works(run_train: Train, loud: Path, combine: str, number: int):
    def teacher(dtype: str) -> str:
        names, dtypes = ["quiet", "quiet"], ["fp16", "fp16"]
        names[number], dtypes[number] = "loud", dtype
        members = [
            f"{{model: cifar_resnet8, weights: {name}.pt, dtype: {each}}}"
            for name, each in zip(names, dtypes, strict=True)
        ]
        return f"teacher={{members: [{', '.join(members)}], combine: {combine}, temperature: 4, batch: 12}}"

    with pytest.raises(
        NonFiniteError, match=rf"own logits are not finite in float16; set teacher\.members\.{number}\.dtype: bf16"
    ):
        run_train(*KD, teacher("fp16"), "folder=half")
    run_train(*KD, teacher("bf16"), "folder=whole")


def of(kind: type, **facts: object) -> nn.Module:
    """Return a teacher of that kind that has nothing but these facts."""
    teacher = kind.__new__(kind)
    nn.Module.__init__(teacher)
    vars(teacher).update(facts)
    return teacher


def test_what_the_networks_answer_in_half_precision_is_known_by_key_and_name():
    half, single = torch.ones(2).half(), torch.ones(2)
    answers = Outputs(half, {"last": half, "stage1": single})
    assert half_answers(nn.Identity(), answers).keys() == {("teacher", "logits"), ("teacher", "features (last)")}
    assert half_answers(nn.Identity(), Outputs(single, {"last": single})) == {}
    ensemble = of(TeacherEnsemble, member_logits=[half, single, half])
    places = {("teacher.members.0", "logits"), ("teacher.members.2", "logits")}
    assert half_answers(ensemble, answers).keys() == places | {("teacher.members.0", "features (last)")}
    for live, found in ((None, set()), (nn.Identity(), {("teacher", "features (last)")})):
        cached = of(CachedTeacher, live=live, live_taps=["last"] if live else [], kinds=["logits"])
        assert half_answers(cached, answers).keys() == found
