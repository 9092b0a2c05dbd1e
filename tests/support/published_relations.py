"""Losses of how rows relate, and of contrast, under their published names."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from unittest import mock

import numpy as np
import torch
from published_cases import Case, Formulas, Outcome
from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.losses._base import Facts
from pipeline.losses._registry import load_spec
from pipeline.losses.at import at_loss
from pipeline.losses.nst import nst_loss
from pipeline.losses.pkt import pkt_loss
from pipeline.losses.rkd import rkd_loss
from pipeline.losses.sp import sp_loss


def crd(case: Case) -> Outcome:
    hyper, student = case["hyper"], case["in.student_embedding"].requires_grad_()
    teacher, ids, others = case["in.teacher_embedding"], case["in.index"], case["in.negative_index"]
    dim = case["in.memory_student"].shape[1]
    spec = load_spec("crd", {"dim": dim} | {key: hyper[key] for key in ("temperature", "momentum", "negatives")})
    student_shapes, teacher_shapes = {"embedding": (student.shape[1],)}, {"embedding": (teacher.shape[1],)}
    labels = np.arange(hyper["num_data"]) % 2
    loss = spec.build(Facts(2, student_shapes, teacher_shapes, len(labels), labels)).double()
    heads = linear_layers(case)
    banks = {f"{network}_bank": case[f"in.memory_{network}"] for network in ("student", "teacher")}
    loss.load_state_dict({**heads, **banks, "normalizers": torch.zeros(2)}, strict=True)
    seen = [Outputs(x, {"embedding": x}) for x in (student, teacher)]
    with mock.patch.object(loss.others, "forward", return_value=others):
        total = torch.stack(list(loss(*seen, Batch(student, ids, ids, {})).values())).sum()
    after = deepcopy(loss)
    after.commit()
    state = after.state_dict()
    outputs = {"loss": total, "Z_student": state["normalizers"][0], "Z_teacher": state["normalizers"][1]}
    outputs |= {f"memory_{network}_after": state[f"{network}_bank"] for network in ("student", "teacher")}
    own = dict(loss.named_parameters())
    leaves = {f"param.embed_{key.replace('_head', '.linear')}": own[key] for key in heads}
    return outputs, total, {"student_embedding": student, **leaves}


def linear_layers(case: Case) -> dict[str, Tensor]:
    """Return the published linear layers of both networks under our names."""
    return {
        f"{network}_head.{key}": case[f"param.embed_{network}.linear.{key}"]
        for network in ("student", "teacher")
        for key in ("weight", "bias")
    }


def at(case: Case) -> Outcome:
    return of_levels(case, at_loss)


def nst(case: Case) -> Outcome:
    return of_levels(case, nst_loss)


def sp(case: Case) -> Outcome:
    return of_one(case, "feature", sp_loss)


def pkt(case: Case) -> Outcome:
    return of_one(case, "embedding", pkt_loss)


def rkd(case: Case) -> Outcome:
    # Their eps keeps a root's argument off zero; these distances have no need of one.
    weights = {key: value for key, value in case["hyper"].items() if key != "eps"}
    return of_one({**case, "hyper": weights}, "embedding", rkd_loss)


def of_levels(case: Case, formula: Callable[..., Tensor]) -> Outcome:
    students, teachers = (
        [case[key] for key in sorted(case) if key.startswith(f"in.{network}_feature_")]
        for network in ("student", "teacher")
    )
    leaves = {f"student_feature_{level}": x.requires_grad_() for level, x in enumerate(students)}
    loss = formula(students, teachers, **case["hyper"])
    return {"loss": loss}, loss, leaves


def of_one(case: Case, feature: str, formula: Callable[..., Tensor]) -> Outcome:
    student = case[f"in.student_{feature}"].requires_grad_()
    loss = formula(student, case[f"in.teacher_{feature}"], **case["hyper"])
    return {"loss": loss}, loss, {f"student_{feature}": student}


FORMULAS: Formulas = {formula.__name__: formula for formula in (crd, at, nst, sp, pkt, rkd)}
