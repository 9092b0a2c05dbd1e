"""DiffKD on several feature maps: who trains whom, weights of the levels, published values, parameters and cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loss_cases import CLASSES, Example, config_of, example
from oracles.sigmoid_kd import parts as sigmoid_kd
from published_cases import Case
from published_diffusion import ours

from pipeline.batch import Outputs
from pipeline.diffusion.denoiser import Denoiser, Draws
from pipeline.losses._base import Facts
from pipeline.losses._registry import load_spec
from pipeline.training.flops import FlopCounter

DIFFUSION = config_of("diffkd")["diffusion"]
WEIGHTS = dict.fromkeys(("diffusion_weight", "autoencoder_weight", "distance_weight"), 1.0)
REDUCTIONS = {"predictor_reduction": 4, "adapter_reduction": 8}


def pyramid(latent: int | None = 4, rows: int = 2, **feature: Any) -> Example:
    """Return the loss on the two levels of a pyramid."""
    branch = {"stage": "fpn", "latent": latent, **REDUCTIONS, **feature}
    return example("diffkd", load_spec("diffkd", {"diffusion": DIFFUSION, "feature": branch, **WEIGHTS}), rows=rows)


def test_each_level_trains_its_own_denoiser_and_its_own_map():
    case = pyramid()
    denoisers: Any = case.loss.feature_denoiser
    assert list(denoisers) == ["fpn_p3", "fpn_p4"]
    for level, (name, denoiser) in zip(("fpn.p3", "fpn.p4"), denoisers.items(), strict=True):
        other = next(each for key, each in denoisers.items() if key != name)
        answer = denoiser(case.student.features[level], case.teacher.features[level])
        total = (answer.student_BCHW - answer.target_BCHW).square().mean() + answer.diffusion_loss
        total = total + answer.autoencoder_loss
        wanted = [*denoiser.parameters(), *other.parameters(), *case.student.features.values()]
        found = torch.autograd.grad(total, wanted, allow_unused=True)
        own = len(list(denoiser.parameters()))
        assert all(gradient is not None for gradient in found[:own])
        assert not any(gradient is not None for gradient in found[own:-2])
        maps = zip(case.student.features, found[-2:], strict=True)
        assert [each for each, gradient in maps if gradient is not None] == [level]


def test_the_gradient_of_the_whole_reaches_every_level_and_every_network_and_no_teacher():
    case = pyramid()
    case.total().backward()
    assert all(x.grad is not None and x.grad.any() for x in case.student.features.values())
    assert all(parameter.grad is not None for parameter in case.loss.parameters())
    assert all(x.grad is None for x in case.teacher.features.values())
    assert case.student.logits.grad is None


def test_levels_weigh_the_same_or_by_their_number_of_pixels():
    equal, by_area = (pyramid(level_weight=weight).parts(seed=1) for weight in ("equal", "area"))
    assert equal["diffusion_feature"].item() == by_area["diffusion_feature"].item()
    alone = [pyramid(stage=["fpn.p3"]), pyramid(stage=["fpn.p4"])]
    case = pyramid()
    for each, name in zip(alone, ("fpn_p3", "fpn_p4"), strict=True):
        each.loss.feature_denoiser.load_state_dict(case.loss.feature_denoiser[name].state_dict())  # type: ignore
    torch.manual_seed(1)
    fine, coarse = (each.loss.feature_parts(case.student, case.teacher)["feature"].item() for each in alone)  # type: ignore
    assert equal["feature"].item() == pytest.approx(fine + coarse, rel=1e-12)
    assert by_area["feature"].item() == pytest.approx((96 * fine + 24 * coarse) / 60, rel=1e-12)


def test_the_weight_of_the_pyramid_scales_the_distance_alone():
    plain, heavy = ({k: v.item() for k, v in pyramid(weight=weight).parts().items()} for weight in (1.0, 7.0))
    assert heavy == pytest.approx({**plain, "feature": 7 * plain["feature"]})


def test_the_finest_level_is_observed():
    case, single = pyramid(), pyramid(stage="fpn.p3")
    single.loss.feature_denoiser.load_state_dict(case.loss.feature_denoiser["fpn_p3"].state_dict())  # type: ignore
    with torch.no_grad():
        seen = case.loss.observe(case.student, case.teacher)
        assert seen == single.loss.observe(case.student, case.teacher)
        assert case.loss.observe(case.student, None)["maps"].keys() == {"student", "denoised"}
    assert [len(rows) for rows in seen["maps"].values()] == [8, 8, 8]


@pytest.mark.parametrize("name", ["diffkd_feature", "diffkd_feature_no_autoencoder"])
def test_every_level_equals_the_published_values(name: str, pytestconfig: pytest.Config):
    path = Path(pytestconfig.getoption("--published")) / f"{name}.npz"
    with np.load(path, allow_pickle=False) as arrays:
        case: Case = {key: torch.from_numpy(arrays[key]) for key in arrays.files if key != "hyper"}
    latent = len(case["out.teacher_latent"][0]) if "ae" in {key.split(".")[1] for key in case} else None
    shapes = [{f"fpn.p{n}": (case[f"in.{side}"].shape[1], 4, 4) for n in (3, 4)} for side in ("student", "teacher")]
    branch = {"stage": "fpn", "latent": latent, **REDUCTIONS}
    loss = load_spec("diffkd", {"diffusion": DIFFUSION, "feature": branch, **WEIGHTS}).build(Facts(5, *shapes)).double()
    networks: Any = loss.feature_denoiser
    assert len(networks) == 2
    for network in networks.values():
        network.load_state_dict({ours(key): case[key] for key in case if key.startswith("param.")}, strict=True)
        draws = Draws(case["in.adapter_noise"], case["in.train_noise"], case["in.train_timesteps"])
        answer = network(case["in.student"], case["in.teacher"], draws)
        torch.testing.assert_close(answer.student_BCHW, case["out.denoised"], rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(answer.diffusion_loss, case["out.diffusion_loss"], rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("latent", "parameters", "mega_macs"), [(None, 694_722, 1.385), (128, 339_554, 0.428), (64, 151_410, 0.132)]
)
def test_a_level_of_256_channels_costs_what_its_formula_says(latent: int | None, parameters: int, mega_macs: float):
    shapes = {f"fpn.p{n}": (256, 2 ** (7 - n) * 4, 2 ** (7 - n) * 4) for n in (6, 7)}
    branch = {"stage": "fpn", "latent": latent, **REDUCTIONS}
    with torch.device("meta"):
        loss = load_spec("diffkd", {"diffusion": DIFFUSION, "feature": branch, **WEIGHTS}).build(
            Facts(5, shapes, shapes)
        )
        maps = {name: torch.empty(1, *shape) for name, shape in shapes.items()}
        outputs = Outputs(torch.empty(1, 5), maps)
        with FlopCounter() as counter, torch.no_grad():
            loss.feature_parts(outputs, outputs)  # type: ignore[operator]
    networks: Any = loss.feature_denoiser
    for network in networks.values():
        assert isinstance(network, Denoiser)
        assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    pixels = sum(x.shape[2] * x.shape[3] for x in maps.values())
    assert counter.flops / 2 / pixels / 1e6 == pytest.approx(mega_macs, abs=5e-4)
    if latent is None:
        assert counter.flops / 2 / pixels == pytest.approx(21.14 * 256**2, rel=2e-3)


def on_class_maps(temperature: float = 2.0) -> Example:
    branch = {"predictor_reduction": 10, "adapter_reduction": 10, "temperature": temperature, "weight": 3.0}
    return example("diffkd", load_spec("diffkd", {"diffusion": DIFFUSION, "class_maps": branch, **WEIGHTS}), rows=2)


def test_class_maps_are_denoised_and_compared_by_kd_of_every_channels_sigmoid():
    case = on_class_maps()
    assert not case.loss.config.reads_head()
    assert case.loss.config.taps().student == {"head.class"}
    found = case.parts(seed=2)
    torch.manual_seed(2)
    expected, diffusion = 0.0, 0.0
    for level, network in zip(("p3", "p4"), case.loss.class_denoiser.values(), strict=True):  # type: ignore[union-attr,operator]
        maps = [outputs.features[f"head.class.{level}"] for outputs in (case.student, case.teacher)]
        answer = network(*maps)
        rows = [Outputs(x, {}).logits_BK.tolist() for x in (answer.student_BCHW, maps[1])]

        class Seen:
            student_logits, teacher_logits = rows

        expected += sigmoid_kd({"temperature": 2.0}, Seen)["sigmoid_kd"]
        diffusion += answer.diffusion_loss.item()
    assert found["classes"].item() == pytest.approx(3 * expected, rel=1e-10)
    assert found["diffusion_classes"].item() == pytest.approx(diffusion, rel=1e-12)
    assert set(found) == {"classes", "diffusion_classes"}


def test_a_class_map_of_720_channels_costs_what_its_formula_says():
    shapes = {"head.class.p7": (720, 4, 4)}
    branch = {"predictor_reduction": 10, "adapter_reduction": 10, "temperature": 1.0}
    with torch.device("meta"):
        spec = load_spec("diffkd", {"diffusion": DIFFUSION, "class_maps": branch, **WEIGHTS})
        network = spec.build(Facts(CLASSES, shapes, shapes)).class_denoiser
        assert isinstance(network, Denoiser)
        map_BCHW = torch.empty(1, *shapes["head.class.p7"])
        with FlopCounter() as counter, torch.no_grad():
            network(map_BCHW, map_BCHW)
    assert counter.flops / 2 / 16 / 1e6 == pytest.approx(6.10, abs=0.02)
    assert sum(parameter.numel() for parameter in network.parameters()) / 1e6 == pytest.approx(2.94, abs=0.01)
