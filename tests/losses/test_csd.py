"""Contrastive self-distillation: which images are negatives, what the frozen network is, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from extractors import Tiny, tiny_extractor
from gloo_ranks import Ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import PROGRESS, Example, config_of, example, inputs_of
from oracles import csd as oracle
from torch import Tensor
from torchvision.models.vgg import cfgs, make_layers

from pipeline.builders.extractors import load_extractors
from pipeline.config.recipe import load_recipe
from pipeline.errors import RecipeError
from pipeline.features.taps import FeatureTaps
from pipeline.losses._base import Facts
from pipeline.losses._extractor import ExtractorConfig, FrozenExtractor
from pipeline.losses._registry import LossSpec, load_spec
from pipeline.losses.csd import contrast_ratio, find_negatives

ROWS = 12


def spec_of(**changes: Any) -> LossSpec:
    return load_spec("csd", {**config_of("csd"), **changes})


@settings(max_examples=40, derandomize=True, deadline=None)
@given(ids=st.lists(st.integers(0, 9), min_size=2, max_size=9), data=st.data())
def test_negatives_are_different_other_rows(ids: list[int], data: st.DataObject):
    negatives = data.draw(st.integers(1, len(ids) - 1))
    rows_KN = find_negatives(torch.tensor(ids), negatives)
    assert rows_KN.shape == (negatives, len(ids))
    for row, others in enumerate(rows_KN.T.tolist()):
        assert row not in others
        assert len({*others}) == negatives
        assert {*others} <= {*range(len(ids))}


@settings(max_examples=20, derandomize=True, deadline=None)
@given(ids=st.permutations([3, 8, 11, 20, 21, 40]), negatives=st.integers(1, 5))
def test_the_negatives_of_an_image_do_not_depend_on_its_place_in_the_batch(ids: list[int], negatives: int):
    def by_id(order: list[int]) -> dict[int, list[int]]:
        rows_KN = find_negatives(torch.tensor(order), negatives)
        return {order[row]: [order[each] for each in others] for row, others in enumerate(rows_KN.T.tolist())}

    assert by_id(ids) == by_id(sorted(ids))


def test_negatives_are_the_next_in_the_order_of_the_ids_in_a_circle():
    assert find_negatives(torch.tensor([30, 10, 20, 40]), 2).tolist() == [[3, 2, 0, 1], [1, 0, 3, 2]]


@pytest.mark.parametrize("changes", [{"negatives": 4}, {"negatives": 3, "normalize": False}])
def test_several_negatives_are_summed_as_the_formula_says(changes: dict[str, Any]):
    spec = spec_of(**changes)
    case = example("csd", spec)
    expected = oracle.parts(spec.config.model_dump(mode="json"), inputs_of(case, seed=0))
    assert {name: value.item() for name, value in case.parts().items()} == pytest.approx(expected, rel=1e-10)


def test_a_contrast_of_zero_runs_no_frozen_network():
    case = example("csd", spec_of(contrast_weight=0.0), rows=1)
    case.loss.get_submodule("extractor").register_forward_hook(lambda *_: pytest.fail("it ran"))
    assert case.parts().keys() == {"full"}


def test_the_contrast_has_no_unit():
    near_L, far_L = torch.rand(2, 5, dtype=torch.float64) + 1
    assert contrast_ratio(255 * near_L, 255 * far_L, [1.0] * 5).item() == pytest.approx(
        contrast_ratio(near_L, far_L, [1.0] * 5).item(), rel=1e-6
    )


def test_no_gradient_of_the_contrast_reaches_the_whole_network():
    case = example("csd", spec_of(full_weight=0.0))
    case.total().backward()
    assert case.student.logits.grad is not None
    assert case.student.logits.grad.any()
    assert not case.student.features["full"].grad.any()  # type: ignore[union-attr]


def of_a_rank(rank: int, world: int) -> tuple[Tensor, list[Tensor | None]]:
    """Return this rank's loss of five negatives, and the gradients that DDP would give."""
    own = example("csd", spec_of(negatives=5), rows=ROWS).at([*range(rank, ROWS, world)])
    total = torch.stack(list(own.loss.parts(own.student, own.teacher, own.batch, PROGRESS).values())).sum() / world
    total.backward()
    return total.detach(), [x.grad for x in own.student_tensors()]


def test_two_and_three_ranks_have_the_loss_and_gradient_of_one(several_ranks: Ranks):
    total, gradients = of_a_rank(0, 1)
    found = several_ranks(of_a_rank)
    torch.testing.assert_close(sum(value for value, _ in found), total, rtol=1e-12, atol=0)
    for number, expected in enumerate(gradients):
        # A rank has every W-th row.
        rows = torch.stack([of[number] for _, of in found], 1).flatten(0, 1)
        torch.testing.assert_close(rows, expected, rtol=1e-10, atol=1e-14)


def test_the_frozen_network_is_no_part_of_what_trains_or_is_saved_and_never_changes_its_mode():
    case = example("csd")
    assert [*case.loss.parameters()] == []
    assert case.loss.state_dict() == {}
    case.loss.train()
    assert not case.loss.get_submodule("extractor.network.model").training
    assert len([*case.loss.buffers()]) == 4
    assert not any(buffer.requires_grad for buffer in case.loss.buffers())


def test_the_network_that_facts_name_is_not_changed_by_a_loss():
    network = tiny_extractor()
    FrozenExtractor(network, spec_of().config.phi, normalize=True)
    assert len([*network.parameters()]) == 4


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of random weights under torchvision's names of VGG19, with a tensor of its classifier."""
    torch.manual_seed(0)
    layers = make_layers(cfgs["E"])
    state = {f"features.{name}": x for name, x in layers.state_dict().items()}
    path = tmp_path_factory.mktemp("vgg") / "vgg19.pth"
    torch.save({**state, "classifier.6.bias": torch.zeros(1000)}, path)
    return str(path)


def test_phi_is_by_default_the_first_relu_of_each_of_vgg19s_blocks(vgg_file: str):
    recipe = load_recipe("configs/div2k/csd_x4.yaml", ["method=csd", f"losses.csd.phi.weights={vgg_file}"]).recipe
    network = load_extractors(recipe)["csd"]
    images = torch.rand(1, 3, 40, 36, requires_grad=True)
    maps = FrozenExtractor(network, ExtractorConfig(weights=vgg_file), normalize=True)(images, None)
    layers, x, expected = make_layers(cfgs["E"]), images, []
    layers.load_state_dict({k.removeprefix("features."): v for k, v in torch.load(vgg_file).items() if "features" in k})
    x = (x - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    for number, layer in enumerate(layers):
        x = layer(x)
        expected += [x.clone()] if number in (1, 6, 11, 20, 29) else []
    assert [each.shape[1] for each in maps] == [64, 128, 256, 512, 512]
    for ours, theirs in zip(maps, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    (gradient,) = torch.autograd.grad(maps[0].sum(), [images])
    assert gradient.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"level_weights": [1.0]}, "level_weights: 1 numbers for the 2 taps of phi, one, two; give one for each"),
        ({"phi": {"model": "cifar_resnet8", "weights": "a.pt"}}, "taps: name each stage of cifar_resnet8"),
        ({"phi": {"model": "a:b", "weights": "a.pt", "taps": ["all"]}}, "taps: name each stage of a:b"),
        ({"phi": {"model": "a:b", "weights": "a.pt", "taps": ["x", "x"]}}, "taps: a stage is named twice in x, x"),
        ({"phi": {"weights": "a.pt", "std": [1, 0, 1]}}, "std: expected numbers other than 0, got"),
        ({"negatives": 0}, "greater than 0"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        spec_of(**changes)


def test_a_student_that_is_no_part_of_a_network_is_refused():
    facts = Facts(1, {"logits": (3, 4, 4)}, extractors={"csd": tiny_extractor()})
    with pytest.raises(ValueError, match=r"csd: the student is no part of a network .*; set student.within"):
        spec_of().build(facts)


def test_a_tap_of_phi_that_is_no_map_is_refused():
    network = Tiny(1)
    taps = FeatureTaps(network, {"one": "one", "two": "head"}, ["one", "two"])
    shapes = {"logits": (3, 4, 4), "full": (3, 4, 4)}
    with pytest.raises(ValueError, match="the tap 'two' is shaped"):
        spec_of().build(Facts(1, shapes, extractors={"csd": taps}))


def too_few(negatives: int, rows: int) -> Example:
    return example("csd", spec_of(negatives=negatives), rows=rows)


@pytest.mark.parametrize(("negatives", "rows"), [(1, 1), (6, 6), (10, 4)])
def test_fewer_other_images_than_negatives_are_refused_in_one_line(negatives: int, rows: int):
    with pytest.raises(
        ValueError, match=f"csd: negatives: {negatives} other images .* has {rows}; raise batch"
    ) as found:
        too_few(negatives, rows).total()
    assert "\n" not in str(found.value)
    assert too_few(negatives, negatives + 1).total().isfinite()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["batch=10"], "the loss 'csd' compares 11 images of a micro-batch, got 10, batch: 10 by accumulation: 1"),
        (["accumulation=2"], "the loss 'csd' compares 11 images of a micro-batch, got 8, batch: 16 by accumulation: 2"),
        (["losses.csd.phi.weight=a.pt"], "losses.csd.phi.weight: unknown key"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused_in_one_line(words: list[str], message: str):
    with pytest.raises(RecipeError, match=message) as found:
        load_recipe("configs/div2k/csd_x4.yaml", ["method=csd", *words])
    assert "\n" not in str(found.value)
