"""Rows without a label: which losses learn from them, and that no label of theirs is ever read."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from gloo_ranks import Ranks
from loss_cases import CLASSES, NAMES, PROGRESS, Example, every_loss, example
from methods import config_of
from pydantic import ValidationError
from torch import Tensor

from pipeline.batch import PSEUDO, Batch, Outputs
from pipeline.distiller import Distiller
from pipeline.losses._base import Facts
from pipeline.losses._registry import load_spec

RATIO, LABELLED = 2, 6
LABELLED_ONLY = {"ce", "byot", "cs_kd", "crd", "crcd", "ddkd", "deit", "dkd", "perception", "spherical_kd"}
"""The losses that read labels in their method's config, by an inner loss or by themselves."""


def with_unlabelled(name: str) -> Example:
    """Return a case whose last two thirds of the rows have no label, and the ids of labelled images."""
    case = example(name, rows=LABELLED * (1 + RATIO))
    spec = load_spec(name, config_of(name))
    case.loss.labelled_only = spec.reads_labels
    object.__setattr__(case.loss.facts, "unlabelled_ratio", RATIO)
    labels_B = case.batch.labels_B.clone()
    labels_B[LABELLED:] = -1
    return case._replace(batch=case.batch._replace(labels_B=labels_B))


def parts_of(case: Example) -> dict[str, Tensor]:
    torch.manual_seed(0)
    student, teacher, batch = case.loss.select_rows(case.student, case.teacher, case.batch)
    return case.loss.parts(student, teacher, batch, PROGRESS)  # type: ignore[arg-type]


@every_loss
def test_a_loss_that_reads_labels_is_that_of_the_labelled_rows_alone_and_another_learns_from_all(name: str):
    case = with_unlabelled(name)
    assert case.loss.labelled_only == (name in LABELLED_ONLY)
    whole = parts_of(case)
    torch.stack(list(whole.values())).sum().backward()
    behind = [x.grad[LABELLED:] for x in case.student_tensors() if x.grad is not None]
    learns = any(bool(grad.any()) for grad in behind)
    few = case.at(list(range(LABELLED)))
    torch.manual_seed(0)
    alone = few.loss.parts(few.student, few.teacher, few.batch, PROGRESS)
    if name in LABELLED_ONLY:
        assert not learns
        for part, value in alone.items():
            torch.testing.assert_close(whole[part], value, rtol=1e-12, atol=1e-14)
    else:
        assert learns == any(bool(x.grad.any()) for x in case.student_tensors() if x.grad is not None)
        assert any(not torch.equal(whole[part], value) for part, value in alone.items())


def test_the_table_names_every_loss_that_reads_labels():
    assert {name for name in NAMES if load_spec(name, config_of(name)).reads_labels} == LABELLED_ONLY


def soft_ce(**config: object):
    keys = {"teacher_temperature": 1.0, "from": "batch", "rows": "unlabelled", **config}
    return load_spec("soft_ce", keys)


def drawn_batch(rows: int, seed: int = 0) -> tuple[Outputs, Batch]:
    draw = torch.Generator().manual_seed(seed)
    logits_BK, pseudo_BK = torch.randn(2, rows, CLASSES, dtype=torch.float64, generator=draw)
    labels_B = torch.randint(CLASSES, (rows,), generator=draw)
    labels_B[rows // (1 + RATIO) :] = -1
    return Outputs(logits_BK.requires_grad_(), {}), Batch(torch.empty(rows, 0), labels_B, labels_B, {PSEUDO: pseudo_BK})


class Answering(torch.nn.Module):
    """A network that answers as it is told."""

    def __init__(self, outputs: Outputs) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, images: Tensor, targets: Mapping[str, Tensor]) -> Outputs:
        return self.outputs


def parts_of_student(student: Outputs, batch: Batch, ratio: int = RATIO) -> dict[str, Tensor]:
    """Return what noisy student's losses and the training metric are for a student's logits."""
    specs = {"ce": load_spec("ce", {"label_smoothing": 0.1}), "soft_ce": soft_ce(weight=3.0)}
    distiller = Distiller(Answering(student), specs, Facts(CLASSES, unlabelled_ratio=ratio))  # type: ignore[arg-type]
    return distiller(batch, None, PROGRESS)


def expected_parts(student: Outputs, batch: Batch) -> dict[str, float]:
    """Return the parts and the accuracy in plain Python: labelled rows by their class, the others by their logits."""
    ce, soft, right, counts = 0.0, 0.0, 0, [0, 0]
    rows = zip(student.logits.tolist(), batch.labels_B.tolist(), batch.extra[PSEUDO].tolist(), strict=True)
    for z, label, pseudo in rows:
        total, other = sum(map(math.exp, z)), sum(map(math.exp, pseudo))
        log_q = [x - math.log(total) for x in z]
        counts[label < 0] += 1
        if label >= 0:
            y = [0.1 / CLASSES + 0.9 * (k == label) for k in range(CLASSES)]
            ce -= sum(a * b for a, b in zip(y, log_q, strict=True))
            right += z.index(max(z)) == label
        else:
            soft -= sum(math.exp(a) / other * b for a, b in zip(pseudo, log_q, strict=True))
    return {"ce": ce / counts[0], "soft_ce": 3 * soft / counts[1], "top1": 100 * right / counts[0]}


def test_the_parts_of_noisy_student_are_those_of_plain_python():
    student, batch = drawn_batch(9)
    found = parts_of_student(student, batch)
    for name, value in expected_parts(student, batch).items():
        assert found[name].item() == pytest.approx(value, rel=1e-6), name
    found["total"].backward()
    assert student.logits.grad is not None
    assert student.logits.grad.any(dim=1).all()


def parts_of_a_rank(rank: int, world: int) -> dict[str, Tensor]:
    student, batch = drawn_batch(18)
    # A rank's rows: its share of the labelled ones, then its share of the others.
    rows = torch.cat([torch.arange(6)[rank::world], torch.arange(6, 18)[rank::world]])
    extra = {name: x[rows] for name, x in batch.extra.items()}
    share = Batch(batch.images_BCHW[rows], batch.labels_B[rows], batch.ids_B[rows], extra)
    logits = student.logits.detach()[rows].requires_grad_()
    found = parts_of_student(Outputs(logits, {}), share)
    found["total"].backward()
    assert logits.grad is not None
    return {name: value.detach() for name, value in found.items()} | {"rows": rows, "gradient": logits.grad}


def test_several_ranks_have_the_means_and_gradients_of_one(several_ranks: Ranks):
    one, shares = parts_of_a_rank(0, 1), several_ranks(parts_of_a_rank)
    for name in ("ce", "soft_ce", "total", "top1"):
        torch.testing.assert_close(torch.stack([share[name] for share in shares]).mean(0), one[name])
    for share in shares:  # DDP divides the sum by the number of ranks
        torch.testing.assert_close(share["gradient"] / len(shares), one["gradient"][share["rows"]])


def test_without_unlabelled_rows_the_soft_loss_is_zero_and_has_no_gradient():
    student, batch = drawn_batch(6)
    labelled = Batch(batch.images_BCHW, batch.labels_B.clamp(min=0), batch.ids_B, {})
    found = parts_of_student(student, labelled, ratio=0)
    found["total"].backward()
    assert found["soft_ce"].item() == 0.0
    plain = torch.nn.functional.cross_entropy(student.logits.detach(), labelled.labels_B, label_smoothing=0.1)
    assert found["total"].item() == pytest.approx(plain.item(), rel=1e-6)


def test_the_teachers_answers_of_this_step_teach_all_rows_or_the_unlabelled_ones():
    student, batch = drawn_batch(9)
    teacher = Outputs(batch.extra[PSEUDO], {})
    for rows, first in (("all", 0), ("unlabelled", 3)):
        loss = soft_ce(**{"from": "teacher", "rows": rows}).build(Facts(CLASSES, unlabelled_ratio=RATIO))
        selected = loss.select_rows(student, teacher, batch)
        found = loss.parts(*selected, PROGRESS)["soft_ce"]  # type: ignore[arg-type]
        p_BK = teacher.logits[first:].softmax(1)
        expected = -(p_BK * student.logits[first:].log_softmax(1)).sum(1).mean()
        torch.testing.assert_close(found, expected)


def test_pseudo_labels_of_labelled_rows_and_rows_of_an_inner_loss_are_refused():
    with pytest.raises(ValidationError, match="from: batch has logits for images without labels alone"):
        soft_ce(rows="all")
    inner = {"soft_ce": {"teacher_temperature": 1.0, "rows": "unlabelled"}}
    with pytest.raises(ValidationError, match="has rows of its own, and another loss chooses them here"):
        load_spec("logit_standardization", {**config_of("logit_standardization"), "inner": inner})
