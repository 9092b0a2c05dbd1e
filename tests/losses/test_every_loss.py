"""What holds of every loss. A new one is found by itself; it needs its recipe in configs/methods and an oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from unittest import mock

import pytest
import torch
from gloo_ranks import Ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import (
    CLASSES,
    PROGRESS,
    STUDENT_SHAPES,
    TEACHER_SHAPES,
    Example,
    at_the_teacher,
    config_of,
    draws_of_the_global_batch,
    every_loss,
    example,
    inputs_of,
    oracle,
    shapes_of,
    those_with,
    with_global_statistics,
)
from torch import Tensor, nn

from pipeline.batch import Batch, Outputs, Progress
from pipeline.distributed.norms import BatchNorm
from pipeline.losses._base import Facts, Loss, Taps
from pipeline.losses._registry import load_spec

quick = settings(max_examples=15, derandomize=True, deadline=None)


@every_loss
def test_a_loss_equals_its_oracle_to_ten_digits(name: str):
    assert_equals_oracle(example(name), name)


@every_loss
def test_a_loss_of_maps_equals_its_oracle_on_maps_that_are_wider_than_high(name: str):
    taps = load_spec(name, config_of(name)).config.taps()
    read = [*shapes_of(taps.student, STUDENT_SHAPES).values(), *shapes_of(taps.teacher, TEACHER_SHAPES).values()]
    if any(len(shape) == 3 for shape in read):
        assert_equals_oracle(example(name, rows=2, student=wide(STUDENT_SHAPES), teacher=wide(TEACHER_SHAPES)), name)


def wide(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return the shapes with every map half as wide again."""
    return {name: (*shape[:-1], shape[-1] * 3 // 2) if len(shape) == 3 else shape for name, shape in shapes.items()}


def assert_equals_oracle(case: Example, name: str) -> None:
    config = load_spec(name, config_of(name)).config.model_dump(mode="json")
    expected = oracle(name).parts(config, inputs_of(case, seed=3))
    weight = case.loss.config.weight
    found = case.parts(seed=3)
    assert set(found) == set(expected)
    for part, value in expected.items():
        assert found[part].item() == pytest.approx(weight * value, rel=1e-10), part


@every_loss
def test_a_loss_reads_what_the_teachers_head_computes_if_it_says_so(name: str):
    case = example(name)
    if not case.loss.needs_teacher:
        return
    expected = case.parts()
    if case.loss.config.reads_head():
        of_head = {stage: x.flip(0) + 1 for stage, x in case.teacher.features.items() if stage in ("cam", "subclasses")}
        other = Outputs(case.teacher.logits.flip(0).square(), case.teacher.features | of_head)
        assert any(value != expected[part] for part, value in case._replace(teacher=other).parts().items())
    else:
        headless = case.teacher._replace(logits=case.teacher.logits[:, :0])
        assert case._replace(teacher=headless).parts() == expected


@every_loss
def test_a_loss_reads_the_labels_if_it_says_so(name: str):
    case = example(name)
    other = case._replace(batch=case.batch._replace(labels_B=case.batch.labels_B.roll(1)))
    differs = any(value != case.parts()[part] for part, value in other.parts().items())
    assert differs == load_spec(name, config_of(name)).reads_labels


@every_loss
def test_parts_are_finite_scalars_under_short_names(name: str):
    for part, value in example(name, dtype=torch.float32).parts().items():
        assert part.isidentifier()
        assert value.shape == ()
        assert value.isfinite()


@every_loss
def test_gradient_reaches_the_student_and_every_parameter_and_never_the_teacher(name: str):
    case = example(name)
    case.total().backward()
    aims = {*getattr(oracle(name), "NO_GRADIENT", ())}
    if "reads the logits" not in oracle(name).PROPERTIES:
        aims |= {"logits"}
    for key, tensor in {"logits": case.student.logits, **case.student.features}.items():
        if key in aims:
            assert tensor.grad is None, key
        else:
            assert tensor.grad is not None, key
            assert tensor.grad.abs().amax() > 0, key
    for key, parameter in case.loss.named_parameters():
        assert parameter.grad is not None, key
        assert key in shifts_under_norms(case.loss) or parameter.grad.abs().amax() > 1e-12, key
    for tensor in (case.teacher.logits, *case.teacher.features.values()):
        assert tensor.grad is None


def shifts_under_norms(loss: nn.Module) -> set[str]:
    """Return the biases of a loss with BatchNorms: one of them may take away again what a bias adds."""
    if not any(isinstance(module, nn.BatchNorm2d | BatchNorm) for module in loss.modules()):
        return set()
    return {key for key, _ in loss.named_parameters() if key.endswith(".bias")}


@every_loss
def test_gradient_is_exact(name: str):
    case, detached = example(name, rows=3), []
    stops = "stops a gradient" in oracle(name).PROPERTIES
    case.total()
    case.loss.commit()  # what a loss takes from its first batch alone is a constant from here on

    def total(*_: torch.Tensor) -> torch.Tensor:
        with constant_where_detached(detached) if stops else nullcontext():
            return case.total()

    tensors = [case.student.logits, *case.student.features.values()]
    assert torch.autograd.gradcheck(total, tensors, fast_mode=len(tensors) > 1)


@contextmanager
def constant_where_detached(known: list[Tensor]) -> Iterator[None]:
    """Let ``detach`` answer what it did in the first such context: a gradient that a loss stops is not measured."""
    first, found, detach = not known, iter(list(known)), Tensor.detach

    def same(x: Tensor) -> Tensor:
        if first:
            known.append(detach(x).clone())
            return detach(x)
        return next(found)

    with mock.patch.object(Tensor, "detach", same):
        yield


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@every_loss
def test_logits_of_a_thousand_in_half_stay_finite(name: str, dtype: torch.dtype, autocast: torch.dtype | None):
    # The gradient of products of four features of a thousand is larger than what float16 holds.
    scale = 100.0 if "of the fourth degree" in getattr(oracle(name), "PROPERTIES", ()) else 1000.0
    case = example(name, dtype=dtype, autocast=autocast, scale=scale)
    for _ in range(2):
        total = case.total()
        assert total.dtype == torch.float32
        assert total.isfinite()
    total.backward()
    for tensor in case.student_tensors():
        assert tensor.grad is None or tensor.grad.isfinite().all()


class Looking(Loss):
    """What it saw of both networks."""

    class Config(Loss.Config):
        def taps(self) -> Taps:
            return Taps(student=frozenset({"stage2"}), teacher=frozenset({"all"}))

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        self.saw = student, teacher
        return {"": student.logits_BK.sum()}


def test_a_loss_is_given_in_float32_what_it_taps_and_another_losses_maps_are_not_copied():
    def outputs() -> Outputs:
        maps = {name: torch.ones(2, 3, 4, 4, dtype=torch.bfloat16) for name in ("stage1", "stage2", "embedding")}
        return Outputs(torch.ones(2, 5, dtype=torch.bfloat16), maps)

    loss = Looking(Looking.Config(), Facts(5, {}, {}))
    loss.parts(
        outputs(), outputs(), Batch(torch.empty(0), torch.zeros(2).long(), torch.zeros(2).long(), {}), Progress(1)
    )
    student, teacher = loss.saw
    assert (set(student.features), set(teacher.features)) == ({"stage2"}, {"stage1", "stage2"})
    assert {x.dtype for seen in loss.saw for x in (seen.logits_BK, *seen.features.values())} == {torch.float32}


@every_loss
def test_state_survives_saving_and_loading(name: str):
    case, other = example(name), example(name, seed=1)
    other.loss.load_state_dict(case.loss.state_dict(), strict=True)
    again = case._replace(loss=other.loss)
    assert {k: v.item() for k, v in again.parts().items()} == {k: v.item() for k, v in case.parts().items()}


@every_loss
def test_the_same_seed_repeats_the_loss_bit_for_bit(name: str):
    case = example(name, dtype=torch.float32)
    assert case.total(seed=5).item() == case.total(seed=5).item()


@every_loss
def test_one_row_and_constant_features_give_finite_gradients_or_one_line(name: str):
    for case in (example(name, rows=1), constant(example(name)), constant(example(name, rows=1))):
        total = total_or_reason(case)
        if isinstance(total, str):
            assert "\n" not in total
            assert "raise batch" in total
            continue
        total.backward()
        assert total.isfinite()
        for tensor in case.student_tensors():
            assert tensor.grad is None or tensor.grad.isfinite().all()


def total_or_reason(case: Example) -> torch.Tensor | str:
    try:
        return case.total()
    except ValueError as error:
        return str(error)


def constant(case: Example) -> Example:
    """Return the case with every learnt feature equal to one number and all logits equal."""

    def filled(outputs: Outputs) -> Outputs:
        learnt = {stage: x for stage, x in outputs.features.items() if x.requires_grad}
        features = outputs.features | {stage: torch.full_like(x, 0.5).requires_grad_() for stage, x in learnt.items()}
        return Outputs(torch.full_like(outputs.logits, 0.5).requires_grad_(), features)

    return case._replace(student=filled(case.student), teacher=filled(case.teacher))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [slice(None), slice(2)], ids=["every row", "two rows"])
@pytest.mark.parametrize("level", [0.0, 0.1, 0.5])
@every_loss
def test_a_student_without_any_contrast_gets_no_huge_gradient(name: str, level: float, rows: slice, dtype: torch.dtype):
    """Two BatchNorms in a row may send √(1/1e-5) each, 1e5 in all; a division by 1e-12 would send far more.

    Three in a row make rounding errors as large as numbers, whose direction then counts.
    """
    limit = 1e9 if "three norms in a row" in oracle(name).PROPERTIES else 1e5
    case, usual = flat_student(example(name, dtype=dtype), level, rows), example(name, dtype=dtype)
    assert largest_gradient(case) <= limit * largest_gradient(usual)


def flat_student(case: Example, level: float, rows: slice) -> Example:
    """Return the case with those rows of the student's learnt features and logits at one number; the teacher stays."""

    def flat(x: Tensor) -> Tensor:
        x = x.detach().clone()
        x[rows] = level
        return x.requires_grad_()

    learnt = {stage: flat(x) for stage, x in case.student.features.items() if x.requires_grad}
    return case._replace(student=Outputs(flat(case.student.logits), case.student.features | learnt))


def largest_gradient(case: Example) -> float:
    case.total().backward()
    # A paraphraser of the teacher sends the student nothing.
    return max((x.grad.abs().amax().item() for x in case.student_tensors() if x.grad is not None), default=0.0)


@those_with("vanishes at the teacher")
@quick
@given(seed=st.integers(0, 1000), scale=st.floats(0.01, 30))
def test_a_loss_vanishes_where_the_student_equals_the_teacher(name: str, seed: int, scale: float):
    case = at_the_teacher(name, scale=scale, seed=seed)
    total = case.total()
    total.backward()
    assert total.item() == pytest.approx(0, abs=1e-12 * max(case.loss.config.weight, 1))
    for tensor in case.student_tensors():
        assert tensor.grad is None or tensor.grad.abs().amax() < 1e-12 * max(case.loss.config.weight, 1)


@those_with("never negative")
@quick
@given(seed=st.integers(0, 1000), scale=st.floats(0.01, 30), rows=st.integers(1, 9))
def test_a_loss_is_never_negative(name: str, seed: int, scale: float, rows: int):
    total = total_or_reason(example(name, scale=scale, seed=seed, rows=rows))
    if isinstance(total, str):
        assert rows == 1, total
        return
    assert total.item() > -1e-12


def shifted(case: Example, shift: torch.Tensor) -> Example:
    return case._replace(
        student=case.student._replace(logits=case.student.logits + shift),
        teacher=case.teacher._replace(logits=case.teacher.logits - 2 * shift),
    )


@those_with("ignores a shift of the logits")
@quick
@given(seed=st.integers(0, 1000), shift=st.floats(-100, 100))
def test_a_loss_ignores_a_shift_of_a_rows_logits(name: str, seed: int, shift: float):
    case = example(name, seed=seed)
    moved = shifted(case, shift * torch.arange(6, dtype=torch.float64).unsqueeze(1))
    assert moved.total().item() == pytest.approx(case.total().item(), rel=1e-9)


@those_with("ignores a shift of a class")
@quick
@given(seed=st.integers(0, 1000), shift=st.floats(-100, 100))
def test_a_loss_ignores_a_shift_of_a_class_over_the_batch(name: str, seed: int, shift: float):
    case = example(name, seed=seed)
    moved = shifted(case, shift * torch.arange(CLASSES, dtype=torch.float64))
    assert moved.total().item() == pytest.approx(case.total().item(), rel=1e-9)


@those_with("ignores the order of rows")
@quick
@given(seed=st.integers(0, 1000), order=st.permutations(range(6)))
def test_a_loss_ignores_the_order_of_rows(name: str, seed: int, order: list[int]):
    case = example(name, seed=seed)
    total = case.at(order).total()
    assert total.item() == pytest.approx(case.total().item(), rel=1e-12)


def with_features(case: Example, student: Callable[[Tensor], Tensor], teacher: Callable[[Tensor], Tensor]) -> Example:
    """Return the case with every feature changed; the logits stay."""

    def changed(outputs: Outputs, change: Callable[[Tensor], Tensor]) -> Outputs:
        return outputs._replace(features={stage: change(x) for stage, x in outputs.features.items()})

    return case._replace(student=changed(case.student, student), teacher=changed(case.teacher, teacher))


@those_with("ignores the scale of the features")
@quick
@given(seed=st.integers(0, 1000), student=st.floats(1e-3, 1e3), teacher=st.floats(1e-3, 1e3))
def test_a_loss_ignores_the_scale_of_a_networks_features(name: str, seed: int, student: float, teacher: float):
    case = example(name, seed=seed)
    scaled = with_features(case, lambda x: student * x, lambda x: teacher * x)
    assert scaled.total().item() == pytest.approx(case.total().item(), rel=1e-9)


@those_with("ignores a rotation of the channels")
@quick
@given(seed=st.integers(0, 1000))
def test_a_loss_ignores_a_rotation_of_a_networks_channels(name: str, seed: int):
    def rotated(x: Tensor) -> Tensor:
        rotation_CC = torch.linalg.qr(torch.randn(x.shape[1], x.shape[1], dtype=x.dtype)).Q
        return torch.tensordot(x, rotation_CC, dims=([1], [0])).movedim(-1, 1)

    case = example(name, seed=seed)
    torch.manual_seed(seed)
    assert with_features(case, rotated, rotated).total().item() == pytest.approx(case.total().item(), rel=1e-9)


def loss_of_a_rank(rank: int, world: int, name: str) -> dict[str, torch.Tensor]:
    """Return this rank's loss and the gradients that DDP would give, each for the loss of all ranks."""
    case = example(name, with_global_statistics(load_spec(name, config_of(name))), rows=12)
    own = case.at(list(range(12 * rank // world, 12 * (rank + 1) // world)))
    torch.manual_seed(0)
    with draws_of_the_global_batch(rank, world):
        total = torch.stack(list(own.loss.parts(own.student, own.teacher, own.batch, PROGRESS).values())).sum() / world
    total.backward()
    tensors = enumerate(own.student_tensors())
    # What several ranks gather and nothing reads has a gradient of zeros; one rank gathers nothing.
    rows = {f"row {i}": torch.zeros_like(x) if x.grad is None else x.grad for i, x in tensors}
    return {
        "total": total.detach(),
        **rows,
        **{k: p.grad for k, p in own.loss.named_parameters() if p.grad is not None},
    }


@every_loss
def test_ranks_with_equal_shares_equal_one_process_in_loss_and_gradient(name: str, several_ranks: Ranks):
    one = loss_of_a_rank(0, 1, name)
    answers = several_ranks(loss_of_a_rank, name)
    for answer in answers:
        assert set(answer) == set(one)
    for key, expected in one.items():
        found = [answer[key] for answer in answers]
        found = torch.cat(found) if key.startswith("row ") else torch.stack(found).sum(0)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12, msg=lambda text, key=key: f"{key}: {text}")
