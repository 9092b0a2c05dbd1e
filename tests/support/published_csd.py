"""Contrastive self-distillation under its published names: its contrast of maps, and its network of two widths."""

from __future__ import annotations

import torch
from published_cases import Case, Formulas, Outcome
from published_survey import maps_of

from pipeline.losses.csd import contrast_ratio, far_distance, near_distance
from pipeline.models.slimmable import Slimmable
from pipeline.models.super_resolution import DIV2K_MEAN, EDSR

RENAMED = {"upsampler.blocks.0": "upsampler.0.0", "tail_conv": "tail"}


def csd_contrast(case: Case) -> Outcome:
    """Every row has the same negatives there."""
    students, wholes, leaves = maps_of(case)
    negatives = [case[f"in.negative_feature_{level}"] for level in range(len(students))]
    rows_KB = torch.arange(len(negatives[0]))[:, None].expand(-1, len(students[0]))
    near_L = torch.stack([near_distance(*pair) for pair in zip(students, wholes, strict=True)])
    far_L = torch.stack([far_distance(*pair, rows_KB) for pair in zip(students, negatives, strict=True)])
    loss = contrast_ratio(near_L, far_L, case["hyper"]["weights"])
    return {"loss": loss}, loss, leaves


def csd_edsr(case: Case) -> Outcome:
    """Values are in 0 … 255 there."""
    hyper, levels = case["hyper"], case["hyper"]["range"]
    options = {key: hyper[key] for key in ("scale", "blocks", "residual_scale")}
    with torch.device("meta"):
        part = EDSR(features=round(hyper["width"] * hyper["features"]), **options)
    network = Slimmable(EDSR(features=hyper["features"], **options), part).double()
    network.whole.mean_C11 = torch.tensor(DIV2K_MEAN, dtype=torch.float64)[:, None, None]
    leaves = {}
    for key in [key for key in case if key.startswith("param.")]:
        name, _, kind = key.removeprefix("param.").rpartition(".")
        leaves[key] = network.whole.get_submodule(RENAMED.get(name, name)).get_parameter(kind)
        leaves[key].data = case[key]
    full = []
    network.full.register_forward_hook(lambda *call: full.append(levels * call[2]))
    outputs = {"part": levels * network(case["in.low"] / levels), "full": full[0]}
    loss = torch.stack([image.abs().mean() for image in outputs.values()]).sum()
    return {**outputs, "loss": loss}, loss, leaves


FORMULAS: Formulas = {formula.__name__: formula for formula in (csd_contrast, csd_edsr)}
