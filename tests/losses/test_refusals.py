"""What methods refuse, each in one line that says what to do."""

from __future__ import annotations

import pytest
from loss_cases import config_of

from pipeline.config.recipe import load_recipe
from pipeline.errors import ROOT, RecipeError
from pipeline.losses._base import Facts
from pipeline.losses._registry import load_spec

PAIR = ROOT / "configs" / "cifar100" / "resnet56_resnet20.yaml"
OF_RECIPES = {
    "labels twice": (
        ["method=spherical_kd", "losses.ce={weight: 1.0}"],
        "the losses 'spherical_kd' and 'ce' each have the cross-entropy with the labels; remove all but one of them",
    ),
    "labels twice, inside another loss": (
        ["method=kd", "losses.perception={inner: {spherical_kd: {temperature: 4.0, alpha: 0.9, scale: teacher}}}"],
        "the losses 'ce' and 'perception' each have the cross-entropy with the labels; remove all but one of them",
    ),
    "pairs of noise": (["method=cs_kd", "data.loader=synthetic"], "pairs: true does not go with loader: synthetic"),
    "pairs that are mixed": (
        ["method=cs_kd", "data.augment=[{cutmix: {alpha: 1.0}}]"],
        "pairs: true does not go with mixup and cutmix; remove one of them",
    ),
    "mixed images without pairs": (
        ["method=cs_kd", "data.pairs=false", "data.augment=[{cutmix: {alpha: 1.0}}]"],
        "the loss 'cs_kd' reads the class of an image, but data.augment mixes images of two classes",
    ),
    "pairs over two micro-batches": (
        ["method=cs_kd", "batch=6", "accumulation=2"],
        "data.pairs needs an even micro-batch, got 3 rows, batch: 6 by accumulation: 2; change batch",
    ),
    "pairs from a cache": (
        ["method=kd", "data.pairs=true", "with=cached", "data.views=null"],
        "data.pairs draws partners in views that a cache has not; remove teacher.cache or the key",
    ),
    "labels twice, of which one is for the first of each pair": (
        ["method=cs_kd", "losses.cs_kd.half=true"],
        "the losses 'ce' and 'cs_kd' each have the cross-entropy with the labels; remove all but one of them",
    ),
    "the first of each pair without pairs": (
        ["method=cs_kd", "losses.cs_kd.half=true", "losses.ce=null", "data.pairs=false"],
        "the loss 'cs_kd' learns from pairs of one class; set data.pairs: true",
    ),
    "a weight beside no other part": (
        ["method=cs_kd", "losses.cs_kd.kd_weight=3"],
        "kd_weight is for half: true, whose loss has two parts; set weight",
    ),
    "a rank's own partners": (["method=cs_kd", "losses.cs_kd.stat_scope=rank"], "losses.cs_kd.stat_scope"),
    "two forms of a ramp": (
        ["method=kd", "losses.kd.ramp={gaussian: 80, linear_epochs: 20}"],
        "linear_epochs, gaussian and steps exclude each other; give one of them",
    ),
    "steps of a ramp that begin late": (
        ["method=kd", "losses.kd.ramp={steps: [[5, 1.0]]}"],
        "steps must have rising epochs, of which the first is 0",
    ),
    "cycles of steps": (["method=kd", "schedule.cycles=4"], "cycles needs kind: cosine, got kind: step"),
    "a teacher of no head for subclasses": (
        ["method=subclass_kd", "teacher.head=none"],
        "the loss 'subclass_kd' reads what the teacher's head computes, but teacher.head is none",
    ),
}
THREE = {"stage1": (4, 8, 8), "stage2": (8, 5, 4), "embedding": (6,)}
OF_NETWORKS = {
    "exits of one stage": ("byot", {"stage1": (4, 8, 8), "embedding": (6,)}, {}, "byot: the student has one stage"),
    "a map that is no multiple": ("byot", THREE, {}, "byot: the maps of stage1 and stage2 are 8×8 and 5×4"),
    "a map for an embedding": ("byot", {**THREE, "embedding": (6, 2, 2)}, {}, "byot: the embedding is shaped"),
    "a variance of a map": ("pad", {"embedding": (6,)}, {"embedding": (6, 2, 2)}, "pad: the teacher's 'embedding' is"),
    "a vector and a map": ("pad", {"embedding": (6, 2, 2)}, {"embedding": (6,)}, "but a map"),
    "other numbers of subclasses": (
        *("subclass_kd", {"subclasses": (10,)}, {"subclasses": (15,)}),
        "subclass_kd: the student has 10 subclasses in all and the teacher 15; give both the same arguments",
    ),
}


@pytest.mark.parametrize("name", OF_RECIPES)
def test_a_recipe_that_cannot_be_meant_is_refused_in_one_line(name: str):
    words, message = OF_RECIPES[name]
    with pytest.raises(RecipeError) as caught:
        load_recipe(PAIR, words)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", OF_NETWORKS)
def test_networks_that_do_not_fit_a_loss_are_refused_in_one_line(name: str):
    loss, student, teacher, message = OF_NETWORKS[name]
    spec = load_spec(loss, config_of(loss))
    with pytest.raises(ValueError) as caught:  # noqa: PT011, the message is compared below
        spec.build(Facts(5, student, teacher))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
