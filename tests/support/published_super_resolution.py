"""Image reduction, enlargement and quality under their published names."""

from __future__ import annotations

import torch
from published_cases import Case, Formulas, Outcome
from published_survey import maps_of
from torch import Tensor

from pipeline.bicubic import bicubic_upscaled
from pipeline.losses.fakd import fakd_loss
from pipeline.tasks._image_quality import quality
from shards.imresize import reduced, reduced_to_bytes

SCALES = (2, 3, 4)
NOTHING: tuple[Tensor, dict[str, Tensor]] = torch.zeros((), requires_grad=True), {}
"""What is differentiated where nothing is learned."""


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


FORMULAS: Formulas = {formula.__name__: formula for formula in (imresize, sr_metrics, fakd_affinity)}
