"""The student's moving average as its teacher: what it holds, that every rank has the same, and that it is resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from followed_students import batch, learn, student_of
from gloo_ranks import Ranks
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline import evaluate
from pipeline.errors import RecipeError
from pipeline.features.taps import FeatureTaps
from pipeline.models import create_model
from pipeline.models.stages import stages
from pipeline.optim.ema import Config as Averaging
from pipeline.teachers.average import EMATeacher
from pipeline.training.journal import trace

Train = Callable[..., None]
CPU = torch.device("cpu")


def teacher_of(student: nn.Module, decay: float = 0.75, autocast: torch.dtype | None = None) -> EMATeacher:
    taps = FeatureTaps(student_of(99), stages(student), ("last",))
    teacher = EMATeacher(taps, Averaging(decay=decay), batch=4, device=CPU, autocast=autocast)
    teacher.follow(student)
    return teacher


def test_it_begins_as_the_student_and_follows_its_weights_and_has_its_statistics():
    student = student_of(0)
    teacher = teacher_of(student)
    expected = {name: weight.detach().clone() for name, weight in student.named_parameters()}
    for step in range(3):
        learn(student, step)
        teacher.update(step + 1)
        for name, weight in student.named_parameters():
            expected[name] = 0.75 * expected[name] + 0.25 * weight.detach()
    network = teacher.taps.model
    for name, average in network.named_parameters():
        torch.testing.assert_close(average.detach(), expected[name], msg=name)
    for name, buffer in network.named_buffers():
        assert torch.equal(buffer, student.get_buffer(name)), name


def test_it_answers_as_its_network_does_in_evaluation_and_takes_no_gradient():
    student = student_of(0)
    teacher = teacher_of(student)
    learn(student, 1)
    teacher.update(1)
    nn.ModuleList([teacher]).train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    answer = teacher(batch())
    assert answer.features.keys() == {"last"}
    assert not answer.logits_BK.is_inference()
    network = create_model("cifar_resnet8", 10).eval()
    network.load_state_dict(teacher.taps.model.state_dict())
    torch.testing.assert_close(answer.logits_BK, network(batch().images_BCHW).detach(), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())


def test_it_computes_under_autocast_and_keeps_its_average_in_float32():
    student = student_of(0)
    exact, half = teacher_of(student, 0.9), teacher_of(student, 0.9, autocast=torch.bfloat16)
    assert half(batch()).logits_BK.dtype == torch.bfloat16
    assert (half(batch()).logits_BK - exact(batch()).logits_BK).abs().max() < 0.1 * exact(batch()).logits_BK.abs().max()
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float32}


def of_a_rank(rank: int, world: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the student's and the teacher's state where ranks have other statistics and, as under DDP, one weight."""
    student = student_of(0)
    teacher = teacher_of(student)
    weights = [parameter.detach().clone() for parameter in student.parameters()]
    learn(student, rank)
    with torch.no_grad():
        for parameter, weight in zip(student.parameters(), weights, strict=True):
            parameter.copy_(1.5 * weight)
    teacher.update(1)
    return dict(student.state_dict()), dict(teacher.taps.model.state_dict())


def test_every_rank_has_the_same_teacher_and_keeps_its_own_student(ranks: Ranks):
    (first_student, first), (second_student, second) = ranks(of_a_rank)
    statistics = [key for key in first if key.endswith("running_mean")]
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
    for key in statistics:
        assert not torch.equal(first_student[key], second_student[key]), key
        torch.testing.assert_close(first[key], (first_student[key] + second_student[key]) / 2)


@pytest.fixture
def mean_teacher(recipes: Path) -> str:
    """Return a recipe whose teacher is the student's moving average, and which keeps another of the same decay."""
    own = {"folder": "runs/mean", "teacher": {"average": {"decay": 0.9}}, "ema": {"decay": 0.9}}
    losses = {"ce": {}, "kd": {"temperature": 4.0, "weight": 10.0, "ramp": {"linear_epochs": 2}}}
    (recipes / "mean.yaml").write_text(yaml.safe_dump({"base": "ce.yaml", **own, "losses": losses}))
    return "mean.yaml"


def test_a_run_with_it_is_resumed_bit_for_bit(run_train: Train, recipes: Path, mean_teacher: str):
    run_train(mean_teacher, "folder=runs/whole")
    run_train(mean_teacher, "folder=runs/parts", "stop.steps=3")
    run_train(mean_teacher, "folder=runs/parts", "stop.steps=7")
    run_train(mean_teacher, "folder=runs/parts")
    whole, parts = recipes / "runs" / "whole", recipes / "runs" / "parts"
    assert trace(parts / "journal.jsonl") == trace(whole / "journal.jsonl")
    assert any(line["kd"] > 0 for line in trace(whole / "journal.jsonl") if "kd" in line)
    last = "checkpoints/step-10"
    for name in ("student.safetensors", f"{last}/teacher.safetensors", f"{last}/ema.safetensors"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes(), name


def test_its_weights_are_those_of_the_average_of_the_same_decay(run_train: Train, recipes: Path, mean_teacher: str):
    run_train(mean_teacher, "epochs=1")
    folder = recipes / "runs" / "mean" / "checkpoints" / "step-5"
    teacher, averages = load_file(folder / "teacher.safetensors"), load_file(folder / "ema.safetensors")
    assert len(averages) > 10
    for name, average in averages.items():
        assert torch.equal(teacher[f"taps.model.{name}"], average), name


def test_agreement_with_a_teacher_that_only_its_run_had_is_refused(
    run_train: Train, recipes: Path, mean_teacher: str, monkeypatch: pytest.MonkeyPatch
):
    run_train(mean_teacher, "epochs=1")
    with pytest.raises(RecipeError, match="the teacher is the student's moving average, which a run does not save"):
        evaluate.main([mean_teacher, "epochs=1", "agreement=yes"])
