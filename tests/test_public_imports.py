"""What a user's own code imports stays where it is, whatever moves behind it."""

from __future__ import annotations

from importlib import import_module

import pytest

FORMULAS = {
    "ab": ["ab_loss"],
    "at": ["at_loss", "attention"],
    "cat_kd": ["cat_loss"],
    "dist": ["dist_loss", "inter_class", "intra_class"],
    "dkd": ["dkd_loss"],
    "irg": ["edges", "transformation"],
    "kd": ["kd_loss"],
    "logit_standardization": ["standardize"],
    "nst": ["nst_loss"],
    "ofd": ["partial_l2", "margins"],
    "perception": ["perceive"],
    "pkt": ["pkt_loss"],
    "review": ["hcl_loss"],
    "rkd": ["rkd_loss", "distance_loss", "angle_loss"],
    "sp": ["sp_loss"],
    "vid": ["vid_loss"],
}
CLASSES = {
    "pipeline.losses": ["Loss", "BatchLoss", "LogitTransform", "Facts", "Taps"],
    "pipeline.models": ["create_model", "known_models"],
    "pipeline.losses.ddkd": ["DDKD"],
    "pipeline.losses.diffkd": ["DiffKD"],
    "pipeline.models.stages": ["stages"],
    "pipeline.features.taps": ["FeatureTaps", "tap_shapes"],
    "pipeline.batch": ["Batch", "Outputs", "Progress"],
}
PUBLIC = {**CLASSES, **{f"pipeline.losses.{name}": names for name, names in FORMULAS.items()}}


@pytest.mark.parametrize("module", PUBLIC)
def test_what_people_import_is_there(module: str):
    assert all(callable(getattr(import_module(module), name)) for name in PUBLIC[module])
