"""The student's snapshots as its teacher: what they hold and when, that every rank has the same, and their refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import training_on_ranks
import yaml
from followed_students import batch, learn, student_of
from gloo_ranks import Ranks
from loss_cases import every_loss, example
from resolved import run_of
from safetensors.torch import load_file
from tiny_runs import DATA, STRATEGY
from torch import Tensor, nn

from pipeline.batch import Outputs, Progress
from pipeline.benchmarks.teacher import measure_teacher
from pipeline.config.recipe import load_recipe
from pipeline.errors import RecipeError
from pipeline.exporting.model_card import _describe_teacher
from pipeline.features.taps import FeatureTaps
from pipeline.models.stages import stages
from pipeline.teachers.snapshots import SnapshotTeacher
from pipeline.training import start_report
from pipeline.training.journal import trace

Train = Callable[..., None]
CPU = torch.device("cpu")
SOFT = {"teacher_temperature": 3.0, "ramp": {"from": 1}}
STEPS = 5
"""Steps of an epoch."""


def teacher_of(student: nn.Module) -> SnapshotTeacher:
    """Return a teacher whose cycles have two epochs."""
    taps = FeatureTaps(student_of(99), stages(student), ("stage2",))
    teacher = SnapshotTeacher(taps, 2, batch=4, device=CPU, autocast=None)
    teacher.follow(student)
    return teacher


def at(step: int) -> Progress:
    return Progress(steps_per_epoch=STEPS, step=step)


def test_it_is_the_student_at_the_end_of_a_cycle_and_the_same_all_through_the_next():
    student = student_of(0)
    teacher = teacher_of(student)
    answers, expected = {}, {}
    for step in range(6 * STEPS):
        if step % (2 * STEPS) == 0:
            with torch.no_grad():
                expected[step // (2 * STEPS)] = student.eval()(batch().images_BCHW)
        teacher.at(at(step))
        answers[step] = teacher(batch()).logits
        learn(student, step)
        teacher.at(at(step))  # another micro-batch of the step
        assert torch.equal(teacher(batch()).logits, answers[step])
    for step, logits in answers.items():
        cycle = step // (2 * STEPS)
        assert torch.equal(logits, answers[2 * STEPS * cycle])
        if cycle:
            torch.testing.assert_close(logits, expected[cycle], rtol=1e-4, atol=1e-5)
    assert not torch.equal(answers[2 * STEPS], answers[4 * STEPS])


def test_no_network_is_asked_before_the_first_snapshot():
    student = student_of(0)
    teacher, asked = teacher_of(student), []
    teacher.taps.model.register_forward_hook(lambda _module, args, _output: asked.append(len(args[0])))
    teacher.at(at(0))
    answers = teacher(batch())
    teacher(batch())
    assert asked == [1]  # one blank image, for the shapes of what it answers
    assert not answers.logits.any()
    assert {name: x.shape for name, x in answers.features.items()} == {"stage2": (6, 32, 8, 8)}
    teacher.at(at(2 * STEPS))
    assert {name: x.shape for name, x in teacher(batch()).features.items()} == {"stage2": (6, 32, 8, 8)}
    assert asked == [1, 4, 4]


@every_loss
def test_a_loss_is_finite_while_there_is_no_snapshot(name: str):
    case = example(name)
    zeros = {tap: torch.zeros_like(x) for tap, x in case.teacher.features.items()}
    case = case._replace(teacher=Outputs(torch.zeros_like(case.teacher.logits), zeros))
    total = case.total()
    gradients = torch.autograd.grad(total, [*case.student_tensors(), *case.loss.parameters()], allow_unused=True)
    assert total.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients if gradient is not None)


def of_a_rank(rank: int, world: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the student's and the teacher's state where ranks have other statistics and, as under DDP, one weight."""
    student = student_of(0)
    teacher = teacher_of(student)
    student.train()(torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(rank)))
    teacher.at(at(2 * STEPS))
    return dict(student.state_dict()), dict(teacher.taps.model.state_dict())


def test_every_rank_has_the_same_snapshot_and_keeps_its_own_student(ranks: Ranks):
    (first_student, first), (second_student, second) = ranks(of_a_rank)
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
        if key.endswith("running_mean"):
            assert not torch.equal(first_student[key], second_student[key]), key
            torch.testing.assert_close(value, (first_student[key] + second_student[key]) / 2)


@pytest.fixture
def place(recipes: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of ``snapshots.yaml``, with four cycles of an epoch."""
    monkeypatch.chdir(recipes)
    own = {"base": "ce.yaml", "epochs": 4, "losses": {"ce": {}, "soft_ce": SOFT}, "folder": "runs/snapshots"}
    write("snapshots.yaml", {**own, "teacher": {"snapshots": {"cycles": 4}}})
    return recipes


def write(name: str, recipe: object) -> None:
    Path(name).write_text(yaml.safe_dump(recipe))


def test_a_run_with_snapshots_resumes_within_a_cycle_and_at_its_end_bit_for_bit(run_train: Train, place: Path):
    run_train("snapshots.yaml", "folder=runs/whole")
    for stop in ("stop.steps=10", "stop.steps=12", "stop.steps=null"):
        run_train("snapshots.yaml", "folder=runs/parts", stop)
    whole, parts = (Path("runs", name) for name in ("whole", "parts"))
    lines = trace(whole / "journal.jsonl")
    assert trace(parts / "journal.jsonl") == lines
    learned = [line["soft_ce"] for line in lines if "soft_ce" in line]
    assert learned[:STEPS] == [0.0] * STEPS
    assert min(learned[STEPS:]) > 0.5
    for name in ("student.safetensors", "checkpoints/step-20/teacher.safetensors"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes(), name
    # The last cycle's teacher is the student after the third epoch.
    kept = load_file(whole / "checkpoints/step-15/distiller.safetensors")
    teacher = load_file(whole / "checkpoints/step-20/teacher.safetensors")
    assert int(teacher.pop("cycle")) == 3
    for name, x in teacher.items():
        assert torch.equal(x, kept[name.replace("taps.", "student.")]), name


def test_two_ranks_have_the_snapshots_that_one_process_has(run_train: Train, place: Path, ranks: Ranks):
    path = yaml.safe_load(Path("ce.yaml").read_text())["data"]["path"]
    data = {**DATA, "path": path, "loader": "memory", "crop": "pad", "size": 24}
    student = {"model": {"path": "witness:plain", "stages": {"last": "1"}}}
    own = {**STRATEGY, "data": data, "student": student, "epochs": 3, "losses": {"ce": {}, "soft_ce": SOFT}}
    write("plain.yaml", {**own, "teacher": {"snapshots": {"cycles": 3}, "batch": 6}})
    run_train("plain.yaml", "folder=runs/one")
    ranks(training_on_ranks.train, place, ["plain.yaml", "folder=runs/two", "stop.steps=12"], timeout=250)
    ranks(training_on_ranks.train, place, ["plain.yaml", "folder=runs/two"], timeout=250)
    one = load_file("runs/one/student.safetensors")
    for name, x in load_file("runs/two/student.safetensors").items():
        torch.testing.assert_close(x, one[name], rtol=0, atol=1e-7)  # a snapshot is float32


def test_snapshots_are_part_of_a_run_only_if_they_are_given(place: Path):
    average = "teacher={average: {decay: 0.9}, snapshots: null}"
    assert "snapshots" not in run_of("snapshots.yaml", [average]).identity["teacher"]
    assert run_of("snapshots.yaml").identity["teacher"]["snapshots"] == {"cycles": 4}


EARLY = "the loss 'soft_ce' needs a teacher before the first snapshot"
REFUSED = {
    "teacher.snapshots.cycles=3": "teacher.snapshots.cycles: 3 does not divide epochs: 4; change one of them",
    "teacher.snapshots.cycles=1": "teacher.snapshots.cycles: ",
    "teacher.snapshots.cycles=2": f"{EARLY}, which epoch 2 has; set losses.soft_ce.ramp.from: 2",
    "losses.soft_ce.ramp=null": f"{EARLY}, which epoch 1 has",
    "losses.soft_ce.ramp={from: null, steps: [[0, 0.5], [1, 1.0]]}": EARLY,
    "teacher.cache=caches/some": "teacher: cache cannot be combined with snapshots; remove cache",
    "teacher.average={decay: 0.9}": "teacher: snapshots cannot be combined with average",
    "teacher.recipe=teacher.yaml": "teacher: recipe cannot be combined with snapshots",
}


@pytest.mark.parametrize(("word", "message"), REFUSED.items())
def test_what_snapshots_cannot_be_is_refused_in_one_line(place: Path, word: str, message: str):
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe("snapshots.yaml", [word])
    assert "\n" not in str(caught.value)


def test_a_loss_may_wait_for_the_first_snapshot_by_steps(place: Path):
    assert load_recipe("snapshots.yaml", ["losses.soft_ce.ramp={from: null, steps: [[0, 0.0], [1, 1.0]]}"])


def test_what_shows_a_teacher_names_the_snapshots(place: Path):
    loaded, run = load_recipe("snapshots.yaml"), run_of("snapshots.yaml")
    assert _describe_teacher(loaded) == "Its teacher was itself at the end of its last cycle."
    assert start_report._describe_teacher(run) == "the student itself at the end of each of 4 cycles"
    with pytest.raises(RecipeError, match=r"teacher.snapshots: no network answers in the first cycle; give [^\n]*$"):
        measure_teacher(run, CPU, repeats=1, warmup=0, steps=1)
