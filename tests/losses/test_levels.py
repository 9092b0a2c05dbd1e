"""Losses on groups of stages, such as the levels of a detector's pyramid: how they are paired, and how they add up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loss_cases import PROGRESS, STUDENT_SHAPES, TEACHER_SHAPES, Example, example, inputs_of, oracle
from torch import nn

from pipeline.batch import Outputs
from pipeline.losses._base import Facts, Loss, keep_taps
from pipeline.losses._registry import load_spec
from pipeline.losses._stages import pair_stages, stage_pair

FACTS = Facts(5, STUDENT_SHAPES, TEACHER_SHAPES)
LEVELS = ["fpn.p3", "fpn.p4"]
DIFFUSION = {
    **{"time_steps": 1000, "beta_start": 1e-4, "beta_end": 2e-2},
    **{"sampler_steps": 2, "sampler_stride": 100, "time_rows": 1000},
}
SUMMED: dict[str, tuple[str, dict[str, Any]]] = {
    "fitnet": ("stage", {"weight": 5.0, "linear": True}),
    "kd": ("maps", {"temperature": 2.0}),
    "dist": ("maps", {"beta": 1.0, "gamma": 1.0, "temperature": 1.0}),
    "at": ("stages", {"p": 2.0}),
    "diffkd": ("feature", {"diffusion": DIFFUSION, **dict.fromkeys(("diffusion_weight", "distance_weight"), 2.0)}),
}


def config(name: str, stages: list[str]) -> dict[str, Any]:
    """Return a config of the loss on those stages."""
    key, others = SUMMED[name]
    if key == "feature":
        branch = {"latent": 4, "predictor_reduction": 2, "adapter_reduction": 2, "weight": 7.0}
        return {"feature": {"stage": stages, **branch}, "autoencoder_weight": 3.0, **others}
    return {key: stages, **others}


def test_levels_that_both_networks_have_are_paired_by_name():
    pairs = [(name, name) for name in LEVELS]
    assert pair_stages(("fpn",), FACTS) == pairs  # the teacher has fpn.p5, too
    assert pair_stages(("stage2", "fpn"), FACTS) == [("stage2", "stage2"), *pairs]
    assert pair_stages(("fpn.p4",), FACTS) == [("fpn.p4", "fpn.p4")]


def test_a_group_without_a_common_level_is_refused_in_one_line():
    other = Facts(5, {"fpn.p2": (8, 4, 4)}, TEACHER_SHAPES)
    message = r"^no level pairs fpn.p2 of the student with fpn.p3, fpn.p4, fpn.p5 of the teacher; name a level of each$"
    with pytest.raises(ValueError, match=message):
        pair_stages(("fpn",), other)


def test_a_loss_of_one_stage_refuses_a_group_in_one_line():
    with pytest.raises(ValueError, match=r"^the stage 'fpn' is 2 levels; name one of them, such as 'fpn.p3'$"):
        stage_pair("fpn", FACTS)
    with pytest.raises(ValueError, match="is 2 levels"):
        example("sp", load_spec("sp", {"stage": "fpn"})).parts()


def test_a_stage_that_is_named_twice_is_refused_in_one_line():
    spec = load_spec("fitnet", {"stage": ["fpn", "fpn.p3"], "linear": True})
    with pytest.raises(ValueError, match=r"^the stage 'fpn.p3' is named twice; name it once$"):
        spec.build(FACTS)


def test_a_loss_on_a_group_is_given_its_levels_and_no_other_maps():
    maps = {name: torch.zeros(1) for name in ("fpn.p3", "fpn.p4", "head.box.p3", "stage1")}
    assert list(keep_taps(Outputs(torch.zeros(1), maps), frozenset({"fpn"})).features) == LEVELS


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("cwd", {"temperature": 1.0, "weights": [10.0]}),
        ("pkd", {}),
        ("mgd", {"hidden": "pixels", "share": 0.65}),
        ("box_l1", {"stages": ["head.box"], "beta": 0.5}),
    ],
)
def test_a_loss_on_a_pyramid_equals_its_oracle(name: str, own: dict[str, Any]):
    spec = load_spec(name, {"stages": ["fpn"], **own})
    case = example(name, spec, rows=2)
    settings = {**spec.config.model_dump(mode="json"), **({"weights": [10.0] * 2} if "weights" in own else {})}
    expected = oracle(name).parts(settings, inputs_of(case, seed=3))
    assert case.total(seed=3).item() == pytest.approx(sum(expected.values()), rel=1e-10)


def single(case: Example, name: str, level: str) -> Loss:
    """Return the loss of one level of the case, with that level's networks."""
    stage = level if SUMMED[name][0] != "maps" else level.replace("fpn", "head.class")
    loss = load_spec(name, config(name, [stage])).build(case.loss.facts).double()
    own = f".{level.replace('.', '_')}."
    loss.load_state_dict({key.replace(own, "."): x for key, x in case.loss.state_dict().items() if own in key})
    return loss


@pytest.mark.parametrize("name", SUMMED)
def test_the_loss_of_two_levels_is_the_sum_of_two_losses_of_one(name: str):
    case = example(name, load_spec(name, config(name, ["head.class" if SUMMED[name][0] == "maps" else "fpn"])), rows=2)
    singles = [single(case, name, level) for level in LEVELS]
    together = case.parts(seed=5)
    torch.manual_seed(5)  # one level draws after the other
    alone = [loss.parts(case.student, case.teacher, case.batch, PROGRESS) for loss in singles]
    for part, value in together.items():
        assert value.item() == pytest.approx(sum(parts[part].item() for parts in alone), rel=1e-12), part
        assert min(parts[part].item() for parts in alone) > 0, part


def test_a_single_level_has_the_networks_of_a_stage_and_several_have_their_names():
    one, two = (
        example("fitnet", load_spec("fitnet", config("fitnet", stages))).loss for stages in (["fpn.p3"], LEVELS)
    )
    assert [name for name, _ in one.named_parameters()] == ["regressor.weight"]
    assert [name for name, _ in two.named_parameters()] == ["regressor.fpn_p3.weight", "regressor.fpn_p4.weight"]
    assert isinstance(one.regressor, nn.Conv2d)
