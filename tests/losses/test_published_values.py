"""Values and gradients of published code, in float64, from tests/published or the folder that ``--published`` names.

One ``.npz`` a case; its name up to the first ``_T`` and a digit, or all of it, names the formula. ``hyper`` is a JSON
string; ``in.*``, ``param.*``, ``out.*`` and ``grad.*`` are arrays: inputs, parameters by published name, outputs and
gradients that are expected.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.losses._base import Facts, load_spec
from pipeline.losses._denoiser import Denoiser, Draws
from pipeline.losses.dkd import dkd_loss
from pipeline.losses.kd import kd_loss
from pipeline.losses.perception import perceive

Case = dict[str, Any]
Outcome = tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]
"""Outputs by name; the scalar that is differentiated; what it is differentiated by, under the names of ``grad.*``."""

AWAITED = {
    *("at", "crd", "dist", "fitnet", "logit_standardization_kd", "nst", "ofd_partial_l2", "pkt"),
    *("review_abf", "review_hcl", "rkd", "sp", "vid"),
}
"""Formulas that have published values and are not written yet."""


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


def seen(student: Tensor, teacher: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return perceive(student, eps=eps), perceive(teacher, eps=eps)


def of_logits(case: Case, formula: Callable[..., Tensor]) -> Outcome:
    student = case["in.student_logits"].requires_grad_()
    loss = formula(student, case["in.teacher_logits"], **case["hyper"])
    return {"loss": loss}, loss, {"student_logits": student}


PUBLISHED_NAMES = {
    "ae.encoder.": "autoencoder.encoder.",
    "ae.decoder.0.": "autoencoder.decoder.",
    "trans.": "projection.",
    "model.time_embedding.": "predictor.time_embedding.",
    "model.pred.": "predictor.network.",
    "noise_adapter.feat.0.block.": "adapter.network.block.",
    "noise_adapter.feat.": "adapter.network.",
    "noise_adapter.pred.": "adapter.linear.",
    "proj.": "output.",
}


def diffkd_feature(case: Case) -> Outcome:
    denoiser, outputs = denoised(case, "feature_denoiser")
    outputs["distance_mse"] = (outputs["denoised"] - outputs["teacher_latent"]).square().mean()
    total = outputs["distance_mse"] + outputs["diffusion_loss"] + outputs.get("autoencoder_loss", 0)
    return {**outputs, "total": total}, total, differentiated(case, denoiser)


diffkd_feature_no_autoencoder = diffkd_feature


def diffkd_logits(case: Case) -> Outcome:
    denoiser, outputs = denoised(case, "logit_denoiser")
    total = outputs["diffusion_loss"] + (outputs["denoised"] * case["in.denoised_weight"]).mean()
    return {**outputs, "total": total}, total, differentiated(case, denoiser)


def denoised(case: Case, which: str) -> tuple[Denoiser, dict[str, Tensor]]:
    """Return the denoiser with the published parameters, and its answers under the published names."""
    denoiser = denoiser_of(case["hyper"], which)
    denoiser.load_state_dict({ours(key): case[key] for key in case if key.startswith("param.")}, strict=True)
    draws = Draws(case["in.adapter_noise"], case["in.train_noise"], case["in.train_timesteps"])
    answer = denoiser(case["in.student"].requires_grad_(), case["in.teacher"], draws)
    outputs = {
        "denoised": answer.student_BCHW,
        "teacher_latent": answer.target_BCHW,
        "diffusion_loss": answer.diffusion_loss,
        "gamma": answer.gamma_B,
    }
    return denoiser, outputs | ({"autoencoder_loss": answer.autoencoder_loss} if "ae" in parameters(case) else {})


def denoiser_of(hyper: Case, which: str) -> Denoiser:
    steps = hyper["timesteps"]
    assert hyper["beta_schedule"] == "linear"
    diffusion = {
        "time_steps": hyper["num_train_timesteps"],
        "beta_start": hyper["beta_start"],
        "beta_end": hyper["beta_end"],
        "sampler_steps": hyper["inference_steps"],
        "sampler_stride": steps[0] - steps[1],
        "time_rows": 1280,
    }
    feature = {"predictor_reduction": 4, "adapter_reduction": 8}
    feature["latent"] = hyper["latent_channels"] if hyper["autoencoder"] else None
    logits = {
        "logits": {"predictor_expansion": 4, "adapter_expansion": 2},
        "logit_distance": {"kd": {"temperature": 1}},
    }
    weights = dict.fromkeys(("diffusion_weight", "autoencoder_weight", "distance_weight"), 1.0)
    branch = {"feature": feature} if which == "feature_denoiser" else logits
    shapes = [{"last": (hyper[f"{network}_channels"], 4, 4)} for network in ("student", "teacher")]
    loss = load_spec("diffkd", {"diffusion": diffusion, **branch, **weights}).build(
        Facts(hyper["student_channels"], *shapes)
    )
    assert loss.config.diffusion.sampled == steps
    return getattr(loss, which).double()


def differentiated(case: Case, denoiser: Denoiser) -> dict[str, Tensor]:
    own = dict(denoiser.named_parameters())
    by_name = {key: own[ours(key)] for key in case if key.startswith("param.")}
    return {"student": case["in.student"], **by_name}


def parameters(case: Case) -> set[str]:
    """Return the first words of the published parameters' names."""
    return {key.split(".")[1] for key in case if key.startswith("param.")}


def ours(published: str) -> str:
    name = published.removeprefix("param.")
    prefix = next(prefix for prefix in PUBLISHED_NAMES if name.startswith(prefix))
    return PUBLISHED_NAMES[prefix] + name.removeprefix(prefix)


FORMULAS: dict[str, Callable[[Case], Outcome]] = {
    formula.__name__: formula for formula in (kd, dkd, perception_kd, perception_dkd, diffkd_feature, diffkd_logits)
} | {"diffkd_feature_no_autoencoder": diffkd_feature_no_autoencoder}


def formula_name(path: Path) -> str:
    return re.split(r"_T\d", path.stem)[0]


def load(path: Path) -> Case:
    with np.load(path, allow_pickle=False) as arrays:
        case: Case = {key: torch.from_numpy(arrays[key]) for key in arrays.files if key != "hyper"}
        return {**case, "hyper": json.loads(str(arrays["hyper"]))}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "path" in metafunc.fixturenames:
        paths = sorted(metafunc.config.getoption("--published").glob("*.npz"))
        metafunc.parametrize("path", paths, ids=[path.stem for path in paths])


def assert_close(found: Tensor, expected: Tensor, what: str) -> None:
    # Relative to the array's largest entry; the floor is for gradients that are zero but for rounding.
    tolerance = 1e-9 * expected.abs().max().item() + 1e-15
    assert found.shape == expected.shape, what
    worst = (found - expected).abs().max().item()
    assert worst <= tolerance, f"{what} is off by {worst:.3g}, allowed is {tolerance:.3g}"


def test_a_formula_equals_its_published_values(path: Path):
    name = formula_name(path)
    if name in AWAITED:
        pytest.skip(f"{name} is not written yet")
    assert name in FORMULAS, f"{path.name}: no formula is known under {name!r}"
    case = load(path)
    outputs, scalar, leaves = FORMULAS[name](case)
    expected = {key.removeprefix("out."): case[key] for key in case if key.startswith("out.")}
    assert set(outputs) == set(expected)
    for key, value in expected.items():
        assert_close(outputs[key], value, f"out.{key}")
    gradients = {key.removeprefix("grad."): case[key] for key in case if key.startswith("grad.")}
    assert set(leaves) == set(gradients)
    scalar.backward()
    for key, value in gradients.items():
        grad = leaves[key].grad
        assert grad is not None, f"grad.{key}"
        assert_close(grad, value, f"grad.{key}")


def test_there_are_published_values_to_check(pytestconfig: pytest.Config):
    folder = pytestconfig.getoption("--published")
    names = {formula_name(path) for path in folder.glob("*.npz")}
    assert names & set(FORMULAS), f"{folder} has no case of a formula that is written"
