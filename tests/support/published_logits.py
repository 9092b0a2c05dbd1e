"""Losses of the logits under their published names."""

from __future__ import annotations

from collections.abc import Callable

from published_cases import Case, Formulas, Outcome
from torch import Tensor

from pipeline.losses.dist import dist_loss
from pipeline.losses.dkd import dkd_loss
from pipeline.losses.kd import kd_loss
from pipeline.losses.logit_standardization import standardize
from pipeline.losses.perception import perceive


def kd(case: Case) -> Outcome:
    return of_logits(case, lambda student, teacher, **hyper: kd_loss(student, teacher, **hyper))


def dkd(case: Case) -> Outcome:
    labels = case["in.labels"]
    return of_logits(case, lambda student, teacher, **hyper: dkd_loss(student, teacher, labels, **hyper))


def perception_kd(case: Case) -> Outcome:
    return of_logits(case, lambda student, teacher, eps, **hyper: kd_loss(*seen(student, teacher, eps), **hyper))


def perception_dkd(case: Case) -> Outcome:
    labels = case["in.labels"]
    return of_logits(
        case, lambda student, teacher, eps, **hyper: dkd_loss(*seen(student, teacher, eps), labels, **hyper)
    )


def logit_standardization_kd(case: Case) -> Outcome:
    return of_logits(
        case,
        lambda student, teacher, **hyper: kd_loss(standardize(student), standardize(teacher), **hyper),
    )


def dist(case: Case) -> Outcome:
    return of_logits(case, lambda student, teacher, **hyper: dist_loss(student, teacher, **hyper))


def seen(student: Tensor, teacher: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return perceive(student, eps=eps), perceive(teacher, eps=eps)


def of_logits(case: Case, formula: Callable[..., Tensor]) -> Outcome:
    student = case["in.student_logits"].requires_grad_()
    loss = formula(student, case["in.teacher_logits"], **case["hyper"])
    return {"loss": loss}, loss, {"student_logits": student}


FORMULAS: Formulas = {
    formula.__name__: formula for formula in (kd, dkd, perception_kd, perception_dkd, logit_standardization_kd, dist)
}
