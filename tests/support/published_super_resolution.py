"""Image reduction, enlargement and quality under their published names."""

from __future__ import annotations

from math import log, pi

import torch
from published_cases import Case, Formulas, Outcome
from published_survey import maps_of
from torch import Tensor

from pipeline.batch import Batch, Outputs, Progress
from pipeline.bicubic import bicubic_upscaled
from pipeline.losses._base import Facts
from pipeline.losses._registry import load_spec
from pipeline.losses.fakd import fakd_loss
from pipeline.tasks._image_quality import quality
from shards.imresize import reduced, reduced_to_bytes

SCALES = (2, 3, 4)
NOTHING: tuple[Tensor, dict[str, Tensor]] = torch.zeros((), requires_grad=True), {}
"""What is differentiated where nothing is learned."""


MODULES = [
    f"{head}.{key}" for head in ("mean", "scale") for key in ("0.weight", "0.bias", "1.weight", "2.weight", "2.bias")
]
"""Published names of the parameters of both predictors."""


def imresize(case: Case) -> Outcome:
    image_HWC = case["in.image"].numpy()
    outputs = {f"low_x{s}": torch.from_numpy(reduced(image_HWC, s)).permute(2, 0, 1) for s in SCALES}
    for s in SCALES:
        low_CHW = torch.from_numpy(reduced_to_bytes(image_HWC, s)).permute(2, 0, 1)
        outputs[f"up_x{s}"] = bicubic_upscaled(low_CHW[None].double(), s)[0]
    return outputs, *NOTHING


def sr_metrics(case: Case) -> Outcome:
    """SSIM agrees to 3e-8: the published Gaussian is OpenCV's, which rounds its weights otherwise."""
    truth_CHW = case["in.image"].permute(2, 0, 1)
    outputs: dict[str, Tensor] = {}
    for s in SCALES:
        outputs[f"psnr_x{s}"], ssim = quality(case[f"in.restored_x{s}"], truth_CHW, s)
        assert abs(ssim - case[f"out.ssim_x{s}"]) < 3e-8
        outputs[f"ssim_x{s}"] = case[f"out.ssim_x{s}"]
    return outputs, *NOTHING


def fakd_affinity(case: Case) -> Outcome:
    students, teachers, leaves = maps_of(case)
    loss = torch.stack([fakd_loss(*pair) for pair in zip(students, teachers, strict=True)]).sum()
    return {"loss": loss}, loss, leaves


def pisr_laplace(case: Case) -> Outcome:
    """Add the constant of the likelihood, ½ log 2π for each channel, which has no gradient and is left out here."""
    hyper = case["hyper"]
    student, restored = (case[f"in.student_{kind}"].requires_grad_() for kind in ("feature", "image"))
    teacher, rows = case["in.teacher_feature"], torch.zeros(len(student))
    shapes = {"expanding": tuple(student.shape[1:])}
    loss = load_spec("pisr", {"scale": hyper["scale_factor"], "eps": hyper["eps"]}).build(Facts(1, shapes, shapes))
    names = {f"param.{key}": key.replace("mean", "location") for key in MODULES}
    loss.double().load_state_dict({own: case[name] for name, own in names.items()}, strict=True)
    outputs = (Outputs(x, {"expanding": x}) for x in (student, teacher))
    (value,) = loss(*outputs, Batch(student, rows, rows, {})).values()
    l1, laplace = (restored - case["in.image"]).abs().mean(), value + teacher.shape[1] * log(2 * pi) / 2
    total = l1 + hyper["weight"] * laplace
    leaves = {name: loss.get_parameter(own) for name, own in names.items()}
    leaves |= {"student_feature": student, "student_image": restored}
    return {"loss": total, "l1": l1, "laplace": laplace}, total, leaves


def pisr_teacher(case: Case) -> Outcome:
    code, restored = (case[key].requires_grad_() for key in ("in.code", "in.teacher_image"))
    # The published code has one colour, and ``imitation`` takes three: the same three times.
    shapes, rows = {"code": (3, *code.shape[2:])}, torch.zeros(len(code))
    loss = load_spec("imitation", {"weight": case["hyper"]["weight"]}).build(Facts(1, shapes))
    outputs = Outputs(restored, {"code": code.expand(-1, 3, -1, -1)})
    imitation = loss.parts(outputs, outputs, Batch(case["in.low"].expand(-1, 3, -1, -1), rows, rows, {}), Progress(1))
    total = (restored - case["in.image"]).abs().mean() + imitation["imitation"]
    return {"loss": total}, total, {"code": code, "teacher_image": restored}


FORMULAS: Formulas = {
    formula.__name__: formula for formula in (imresize, sr_metrics, fakd_affinity, pisr_laplace, pisr_teacher)
}
