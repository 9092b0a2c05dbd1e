"""Losses of logits on maps: a pixel is a row, and pixels without a class are no rows of losses that read classes."""

from __future__ import annotations

import pytest
import torch
from gloo_ranks import Ranks
from loss_cases import CLASSES, MAP_SIZE, PROGRESS, config_of, example, inputs_of, oracle
from pydantic import ValidationError
from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.losses._base import Facts
from pipeline.losses._registry import known_losses, load_spec
from pipeline.tasks._masks import MASK, masks_at
from shards.manifest import IGNORED_VALUE

SPECS = {name: load_spec(name, config_of(name)) for name in known_losses()}
OF_PIXELS = [name for name, spec in SPECS.items() if spec.takes_pixels and spec.reads_teachers_head]
DIFFUSION = SPECS["diffkd"].config.diffusion.model_dump(mode="json")
DKD = {"alpha": 1.0, "beta": 2.0, "temperature": 2.0}
KD = {"temperature": 1.0}


def test_losses_of_logits_that_take_pixels_are_known():
    assert OF_PIXELS == ["ddkd", "diffkd", "dist", "dkd", "kd", "logit_standardization", "perception", "soft_ce"]


@pytest.mark.parametrize("name", [name for name in OF_PIXELS if "diff" not in name and name != "ddkd"])
def test_a_loss_of_a_map_is_the_oracles_of_its_pixels(name: str):
    case = example(name, of_pixels=True)
    mask_BHW = case.batch.targets[MASK].where(case.batch.targets[MASK] != IGNORED_VALUE, 0)
    case = case._replace(batch=case.batch._replace(targets={MASK: mask_BHW}))
    inputs = inputs_of(case, seed=3)._replace(labels=masks_at(mask_BHW, *MAP_SIZE).flatten().tolist())
    assert len(inputs.student_logits) == len(inputs.labels) == 6 * 3 * 4
    expected = oracle(name).parts(case.loss.config.model_dump(mode="json"), inputs)
    found = case.parts(seed=3)
    assert set(found) == set(expected)
    for part, value in expected.items():
        assert found[part].item() == pytest.approx(case.loss.config.weight * value, rel=1e-10), part


def test_dkd_of_a_map_is_that_of_the_pixels_with_a_class():
    case = example("dkd", of_pixels=True)
    labels_R = masks_at(case.batch.targets[MASK], *MAP_SIZE).flatten()
    known = (labels_R != IGNORED_VALUE).nonzero()[:, 0].tolist()
    assert 0 < len(known) < len(labels_R)
    inputs = inputs_of(case, seed=3)
    student, teacher = ([rows[row] for row in known] for rows in (inputs.student_logits, inputs.teacher_logits))
    of_known = inputs._replace(student_logits=student, teacher_logits=teacher, labels=labels_R[known].tolist())
    expected = oracle("dkd").parts(case.loss.config.model_dump(mode="json"), of_known)
    assert case.total().item() == pytest.approx(expected["dkd"], rel=1e-10)
    case.total().backward()
    gradient_RK = Outputs(case.student.logits.grad, {}).logits_BK
    assert (gradient_RK[labels_R == IGNORED_VALUE] == 0).all()
    assert (gradient_RK[known] != 0).any(1).all()


def test_perception_standardises_over_all_pixels_and_its_dkd_reads_those_with_a_class():
    case = example("perception", load_spec("perception", {"inner": {"dkd": DKD}}), of_pixels=True)
    labels_R = masks_at(case.batch.targets[MASK], *MAP_SIZE).flatten()
    known = labels_R != IGNORED_VALUE

    def standardized(rows_RK: Tensor) -> Tensor:
        return (rows_RK - rows_RK.mean(0)) / (rows_RK.var(0, correction=0) + 1e-5).sqrt()

    rows = [standardized(outputs.logits_BK.detach())[known] for outputs in (case.student, case.teacher)]
    inner = load_spec("dkd", DKD).build(Facts(CLASSES))
    zeros_R = torch.zeros(len(rows[0]), dtype=torch.int64)
    batch = Batch(torch.empty(0), labels_R[known].long(), zeros_R, {})
    expected = inner.parts(*(Outputs(each, {}) for each in rows), batch, PROGRESS)["dkd"]
    assert case.parts()["dkd"].item() == pytest.approx(expected.item(), rel=1e-10)


@pytest.mark.parametrize("name", [*OF_PIXELS, "segmentation"])
def test_the_gradient_of_a_loss_of_pixels_is_exact(name: str):
    case = example(name, rows=2, of_pixels=True)
    assert torch.autograd.gradcheck(lambda *_: case.total(), case.student_tensors(), fast_mode=True)


@pytest.mark.parametrize("kind", ["diffkd", "ddkd"])
def test_a_map_of_logits_is_denoised_like_a_map_of_features(kind: str):
    reductions = {"predictor_reduction": 2, "adapter_reduction": 2}
    weights = {"diffusion_weight": 1.0, "autoencoder_weight": 1.0, "distance_weight": 1.0}
    distance = {"dkd": DKD} if kind == "ddkd" else {"kd": {"temperature": 1.0}}
    of_logits = {"logits": reductions, "logit_distance": distance, "feature": None}
    case = example(kind, load_spec(kind, {"diffusion": DIFFUSION, **of_logits, **weights}), of_pixels=True)
    shapes = {"last": (CLASSES, *MAP_SIZE)}
    feature = {"diffusion": DIFFUSION, "feature": {"stage": "last", **reductions}, **weights}
    other = load_spec("diffkd", feature).build(Facts(CLASSES, shapes, shapes)).double()
    state = {key.replace("logit_", "feature_"): value for key, value in case.loss.state_dict().items()}
    other.load_state_dict(state)
    as_features = [Outputs(outputs.logits, {"last": outputs.logits}) for outputs in (case.student, case.teacher)]
    torch.manual_seed(7)
    expected = other.parts(*as_features, case.batch, PROGRESS)
    found = case.parts(seed=7)
    assert found["diffusion_logit"].item() == pytest.approx(expected["diffusion_feature"].item(), rel=1e-12)
    torch.manual_seed(7)
    denoised = other.feature_denoiser(*(outputs.logits for outputs in (case.student, case.teacher))).student_BCHW
    (inner,) = distance
    loss = load_spec(inner, distance[inner]).build(case.loss.facts)
    same = loss.parts(case.student._replace(logits=denoised), case.teacher, case.batch, PROGRESS)[inner]
    assert found[f"logit_{inner}"].item() == pytest.approx(same.item(), rel=1e-12)


@pytest.mark.parametrize("kind", ["diffkd", "ddkd"])
@pytest.mark.parametrize(
    ("keys", "got"),
    [
        ({"predictor_expansion": 4}, "predictor_expansion"),
        ({"predictor_expansion": 4, "adapter_reduction": 2}, "predictor_expansion and adapter_reduction"),
        ({"predictor_expnsion": 4, "adapter_expansion": 2}, "predictor_expnsion and adapter_expansion"),
    ],
)
def test_keys_of_a_branch_of_logits_that_are_of_neither_kind_are_named(kind: str, keys: dict[str, int], got: str):
    config = {**config_of(kind), "logits": keys}
    kinds = "predictor_expansion and adapter_expansion or, of a map, predictor_reduction and adapter_reduction"
    with pytest.raises(ValidationError, match=f"expected {kinds}, got {got}"):
        load_spec(kind, config)


def test_a_cached_teachers_student_is_observed_on_larger_images_than_it_learns_from():
    reductions = {"predictor_reduction": 2, "adapter_reduction": 2}
    weights = {"diffusion_weight": 1.0, "autoencoder_weight": 1.0, "distance_weight": 1.0}
    branches = {"feature": {"stage": "logits", **reductions}, "logits": reductions, "logit_distance": {"kd": KD}}
    shapes = {"logits": (CLASSES, *MAP_SIZE)}
    loss = load_spec("diffkd", {"diffusion": DIFFUSION, **branches, **weights}).build(Facts(CLASSES, shapes, shapes))
    map_BKHW = torch.randn(2, CLASSES, 2 * MAP_SIZE[0], 2 * MAP_SIZE[1])
    seen = loss.observe(Outputs(map_BKHW, {"logits": map_BKHW}), None)
    assert {"gamma", "gamma_logits"} <= seen.keys()
    assert set(seen["maps"]) == {"student", "denoised"}


def uneven(rank: int, world: int, name: str) -> list[float]:
    """Return the parts of a loss and its gradient's sum, on a rank's images; the first images have few known pixels."""
    case = example(name, rows=4, of_pixels=True)
    mask_BHW = case.batch.targets[MASK].clone()
    mask_BHW[:2, 3:] = IGNORED_VALUE
    case = case._replace(batch=case.batch._replace(targets={MASK: mask_BHW}))
    size = 4 // world
    case = case.at(list(range(rank * size, (rank + 1) * size)))
    total = case.total()
    total.backward()
    return [total.item(), *case.student.logits.grad.flatten(1).sum(1).div(world).tolist()]


@pytest.mark.parametrize("name", ["segmentation", "dkd", "dist", "perception"])
def test_two_ranks_with_unequal_numbers_of_known_pixels_are_one_process(name: str, ranks: Ranks):
    total, *gradients = uneven(0, 1, name)
    found = ranks(uneven, name)
    assert sum(each[0] for each in found) / 2 == pytest.approx(total, rel=1e-12)
    assert [value for each in found for value in each[1:]] == pytest.approx(gradients, rel=1e-9, abs=1e-12)


def test_images_without_any_class_train_nothing_and_end_no_run():
    for name in ("segmentation", "dkd"):
        case = example(name, of_pixels=True)
        empty = torch.full_like(case.batch.targets[MASK], IGNORED_VALUE)
        case = case._replace(batch=case.batch._replace(targets={MASK: empty}))
        total = case.total()
        total.backward()
        assert total.item() == 0
        assert case.student.logits.grad.abs().max() == 0


@pytest.mark.parametrize("name", OF_PIXELS)
def test_maps_of_logits_of_different_size_are_refused_in_one_line(name: str):
    spec = SPECS[name]
    taps = {"last": (8, 4, 4)}
    ours, theirs = {"logits": (CLASSES, 3, 4), **taps}, {"logits": (CLASSES, 6, 8), **taps}
    with pytest.raises(ValueError, match=f"{name}: the maps of logits .* 3 × 4 and 6 × 8; give both one output stride"):
        spec.build(Facts(CLASSES, ours, theirs))


GROUPED = {"beta": 1, "gamma": 1, "temperature": 1, "stat_scope": "ghost:2"}


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("dist", GROUPED),
        ("perception", {"inner": {"kd": KD}, "stat_scope": "ghost:2"}),
        ("logit_standardization", {"inner": {"dist": GROUPED}}),
    ],
)
def test_groups_of_pixels_are_refused_in_one_line(name: str, values: dict):
    of_images, of_pixels = ({"logits": (CLASSES, *size)} for size in ((), MAP_SIZE))
    load_spec(name, values).build(Facts(CLASSES, of_images, of_images))
    with pytest.raises(ValueError, match=r"^(dist|perception): stat_scope: ghost:2 would group pixels"):
        load_spec(name, values).build(Facts(CLASSES, of_pixels, of_pixels))


def test_reductions_are_refused_for_logits_that_are_no_map():
    reductions = {"predictor_reduction": 2, "adapter_reduction": 2}
    weights = {"diffusion_weight": 1.0, "autoencoder_weight": 1.0, "distance_weight": 1.0}
    config = {"diffusion": DIFFUSION, "logits": reductions, "logit_distance": {"kd": {"temperature": 1.0}}, **weights}
    with pytest.raises(ValueError, match=r"logits\.predictor_reduction: the logits are no map"):
        load_spec("diffkd", config).build(Facts(CLASSES, {"logits": (CLASSES,)}, {"logits": (CLASSES,)}))
