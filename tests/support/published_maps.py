"""Losses of maps for segmentation and detection under their published names."""

from __future__ import annotations

from unittest import mock

import torch
from published_cases import Case, Formulas, Outcome
from published_features import of_loss

from pipeline.losses.ifvd import ifvd_loss
from pipeline.losses.pkd import pkd_loss
from pipeline.losses.skd import skd_loss


def cwd(case: Case) -> Outcome:
    """Divide by the student's number of channels, as CIRKD's code does, whatever the convolution makes of it."""
    widths = [case[f"in.{network}_feature"].shape[1] for network in ("teacher", "student")]
    config = {"stages": ["stage1"], "weights": [widths[0] / widths[1]], **case["hyper"]}
    return of_loss(case, "cwd", config, {"conv.": "connectors.0."})


def fitnet_linear(case: Case) -> Outcome:
    return of_loss(case, "fitnet", {"stage": "stage1", "linear": True}, {"conv.": "regressor."})


def mgd(case: Case) -> Outcome:
    config = {"stages": ["stage1"], "hidden": "pixels", **case["hyper"]}
    # Published code hides what is above 1 − λ.
    with mock.patch("torch.rand", return_value=1 - case["in.draws"]):
        return of_loss(case, "mgd", config, {"align.": "connectors.0.", "generation.": "generators.0."})


def skd(case: Case) -> Outcome:
    student = case["in.student_feature"].requires_grad_()
    loss = skd_loss(student, case["in.teacher_feature"], **case["hyper"])
    return {"loss": loss}, loss, {"student_feature": student}


def ifvd(case: Case) -> Outcome:
    student = case["in.student_feature"].requires_grad_()
    loss = ifvd_loss(student, case["in.teacher_feature"], case["in.mask"].to(torch.uint8), **case["hyper"])
    return {"loss": loss}, loss, {"student_feature": student}


def pkd(case: Case) -> Outcome:
    student = case["in.student_feature"].requires_grad_()
    loss = pkd_loss(student, case["in.teacher_feature"])
    return {"loss": loss}, loss, {"student_feature": student}


FORMULAS: Formulas = {formula.__name__: formula for formula in (cwd, fitnet_linear, mgd, skd, ifvd, pkd)}
