"""Losses of the logits under their published names."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from published_cases import Case, Formulas, Outcome
from torch import Tensor

from pipeline.batch import Batch, Outputs, Progress
from pipeline.losses._base import Facts
from pipeline.losses._registry import load_spec
from pipeline.losses.dist import dist_loss
from pipeline.losses.dkd import dkd_loss
from pipeline.losses.kd import kd_loss
from pipeline.losses.logit_standardization import standardize
from pipeline.losses.perception import perceive
from pipeline.losses.spherical_kd import rescale
from pipeline.losses.subclass_auxiliary import subclass_auxiliary_loss
from pipeline.models.subclasses import class_logits


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


def spherical_kd(case: Case) -> Outcome:
    """Take both parts with their shares, as the authors' script adds them."""
    student, teacher = case["in.student_logits"].requires_grad_(), case["in.teacher_logits"]
    loss = load_spec("spherical_kd", {"scale": "teacher", **case["hyper"]}).build(Facts(student.shape[1]))
    parts = loss.parts(Outputs(student, {}), Outputs(teacher, {}), batch_of(case), Progress(1))
    outputs = {"loss": parts["ce"] + parts["kd"], **parts, "student_rescaled": rescale(student, teacher)}
    return outputs, outputs["loss"], {"student_logits": student}


def spherical_kd_layer_norm(case: Case) -> Outcome:
    hyper = dict(case["hyper"])
    spec = load_spec("spherical_kd", {"scale": hyper.pop("multiplier"), **hyper})
    student, alpha = case["in.student_logits"].requires_grad_(), hyper["alpha"]
    both = Outputs(student, {}), Outputs(case["in.teacher_logits"], {})
    parts = spec.build(Facts(student.shape[1]))(*both, batch_of(case))
    loss = (1 - alpha) * parts["ce"] + alpha * parts["kd"]
    return {"loss": loss, **parts}, loss, {"student_logits": student}


def cs_kd(case: Case) -> Outcome:
    hyper, student = case["hyper"], case["in.student_logits"].requires_grad_()
    config = {"temperature": hyper["temperature"], "half": True, "kd_weight": hyper["lambda"]}
    pairs_BK = torch.stack([student, case["in.partner_logits"]], 1).flatten(0, 1)
    pairs = batch_of(case)._replace(labels_B=case["in.labels"].repeat_interleave(2))
    outputs = Outputs(pairs_BK, {})
    parts = load_spec("cs_kd", config).build(Facts(student.shape[1]))(outputs, outputs, pairs)
    loss = parts["ce"] + parts["cs_kd"]
    return {"loss": loss, "ce": parts["ce"], "kd": parts["cs_kd"] / hyper["lambda"]}, loss, {"student_logits": student}


def subclass_auxiliary(case: Case) -> Outcome:
    student, hyper = case["in.student_logits"].requires_grad_(), case["hyper"]
    loss = subclass_auxiliary_loss(student, temperature=hyper["temperature"], eps=hyper["eps"])
    return {"loss": loss}, loss, {"student_logits": student}


def subclass_ce(case: Case) -> Outcome:
    student = case["in.student_logits"].requires_grad_()
    classes = class_logits(student, case["hyper"]["subclasses"])
    loss = F.cross_entropy(classes, case["in.labels"])
    return {"loss": loss, "class_logits": classes}, loss, {"student_logits": student}


def subclass_kd(case: Case) -> Outcome:
    """Add the teacher's entropy: the authors write a cross-entropy, times T²."""
    student, teacher, temperature = case["in.student_logits"].requires_grad_(), case["in.teacher_logits"], 4.0
    assert case["hyper"]["temperature"] == temperature
    entropy = -((teacher / temperature).softmax(1) * (teacher / temperature).log_softmax(1)).sum(1).mean()
    loss = kd_loss(student, teacher, temperature=temperature) + temperature**2 * entropy
    return {"loss": loss}, loss, {"student_logits": student}


def batch_of(case: Case) -> Batch:
    labels = case["in.labels"]
    return Batch(labels, labels, labels, {})


def seen(student: Tensor, teacher: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return perceive(student, eps=eps), perceive(teacher, eps=eps)


def of_logits(case: Case, formula: Callable[..., Tensor]) -> Outcome:
    student = case["in.student_logits"].requires_grad_()
    loss = formula(student, case["in.teacher_logits"], **case["hyper"])
    return {"loss": loss}, loss, {"student_logits": student}


FORMULAS: Formulas = {
    formula.__name__: formula
    for formula in (
        *(kd, dkd, perception_kd, perception_dkd, logit_standardization_kd, dist),
        *(spherical_kd, spherical_kd_layer_norm, cs_kd),
        *(subclass_auxiliary, subclass_ce, subclass_kd),
    )
}
