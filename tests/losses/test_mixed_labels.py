"""What losses learn from an image that is mixed from two: the shares of both classes, or the larger share's."""

from __future__ import annotations

from math import log

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import CLASSES, NAMES, example
from methods import config_of
from oracles.kd import softmax
from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.losses._base import Facts, Loss
from pipeline.losses._registry import LossSpec, load_spec

quick = settings(max_examples=20, derandomize=True, deadline=None)
SPECS = {name: load_spec(name, config_of(name)) for name in NAMES}


def soft_of(own_B: Tensor, other_B: Tensor, shares_B: Tensor) -> Tensor:
    own_BK, other_BK = (torch.nn.functional.one_hot(x, CLASSES).double() for x in (own_B, other_B))
    return shares_B[:, None] * own_BK + (1 - shares_B)[:, None] * other_BK


def cross_entropy(logits_BK: Tensor, targets: dict[str, Tensor], labels_B: Tensor, smoothing: float) -> Tensor:
    loss = load_spec("ce", {"label_smoothing": smoothing}).build(Facts(CLASSES))
    batch = Batch(torch.empty(len(labels_B), 0), labels_B, labels_B, {}, targets)
    return loss(Outputs(logits_BK, {}), Outputs(logits_BK, {}), batch)["ce"]


@quick
@given(seed=st.integers(0, 1000), smoothing=st.sampled_from([0.0, 0.1, 0.5]))
def test_cross_entropy_is_the_oracles_with_each_one_hot_smoothed_before_it_is_mixed(seed: int, smoothing: float):
    draw = torch.Generator().manual_seed(seed)
    logits_BK = 3 * torch.randn(4, CLASSES, dtype=torch.float64, generator=draw)
    own_B, other_B = torch.randint(CLASSES, (2, 4), generator=draw)
    shares_B = torch.rand(4, dtype=torch.float64, generator=draw)
    expected = 0.0
    for z, own, other, share in zip(*(x.tolist() for x in (logits_BK, own_B, other_B, shares_B)), strict=True):
        for k, p in enumerate(softmax(z)):
            off, on = smoothing / CLASSES, 1 - smoothing + smoothing / CLASSES
            y = share * (on if k == own else off) + (1 - share) * (on if k == other else off)
            expected -= y * log(p) / 4
    found = cross_entropy(logits_BK, {"soft_BK": soft_of(own_B, other_B, shares_B)}, own_B, smoothing)
    assert found.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_timms_of_the_targets_that_timm_mixes(smoothing: float):
    mixup = pytest.importorskip("timm.data.mixup")
    loss = pytest.importorskip("timm.loss").SoftTargetCrossEntropy()
    logits_BK, labels_B = torch.randn(4, CLASSES, dtype=torch.float64), torch.tensor([3, 0, 2, 2])
    theirs = loss(logits_BK, mixup.mixup_target(labels_B, CLASSES, lam=0.3, smoothing=smoothing).double())
    soft_BK = soft_of(labels_B, labels_B.flip(0), torch.full((4,), 0.3).double())  # timm's partner is the mirrored row
    ours = cross_entropy(logits_BK, {"soft_BK": soft_BK}, labels_B, smoothing)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def test_the_gradient_of_soft_cross_entropy_is_that_of_differences():
    draw = torch.Generator().manual_seed(0)
    logits_BK = torch.randn(4, CLASSES, dtype=torch.float64, generator=draw).requires_grad_()
    own_B, other_B = torch.randint(CLASSES, (2, 4), generator=draw)
    targets = {"soft_BK": soft_of(own_B, other_B, torch.rand(4, generator=draw).double())}
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, targets, own_B, 0.1), [logits_BK])


def test_whole_images_have_the_cross_entropy_of_their_labels():
    logits_BK, labels_B = torch.randn(4, CLASSES, dtype=torch.float64), torch.tensor([3, 0, 2, 2])
    targets = {"soft_BK": soft_of(labels_B, (labels_B + 1) % CLASSES, torch.ones(4)).float()}
    for smoothing in (0.0, 0.1):
        soft, hard = (cross_entropy(logits_BK, given, labels_B, smoothing) for given in (targets, {}))
        torch.testing.assert_close(soft, hard, rtol=1e-7, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_loss_takes_of_mixed_images_what_it_says(name: str):
    case, spec = example(name), SPECS[name]
    soft_BK = torch.rand(len(case.batch.labels_B), CLASSES, dtype=torch.float64).softmax(1)
    mixed = case._replace(batch=case.batch._replace(targets=case.batch.targets | {"soft_BK": soft_BK})).parts()
    reads_soft = any(value != mixed[part] for part, value in case.parts().items())
    assert reads_soft == (spec.loss.mixed_labels == "soft")


def test_losses_refuse_mixed_images_that_read_a_class_and_do_not_say_how():
    refused = {name for name, spec in SPECS.items() if spec.refuses_mixed}
    assert refused == {name for name, spec in SPECS.items() if spec.reads_labels} - {
        *("ce", "byot", "deit", "dkd", "ddkd", "perception", "spherical_kd")
    }
    assert "crd" in refused  # its banks keep what an image alone looks like


def test_a_loss_with_an_inner_one_refuses_what_the_inner_one_does():
    class Own(Loss):
        pass

    class Careful(Own):
        mixed_labels = "dominant"

    specs = {loss: LossSpec("own", loss, Loss.Config()) for loss in (Own, Careful)}
    assert (specs[Own].refuses_mixed, specs[Careful].refuses_mixed) == (True, False)
    for loss, refuses in {Own: True, Careful: False}.items():
        wrapped = SPECS["perception"].config.model_copy(update={"inner": specs[loss]})
        assert LossSpec("perception", SPECS["perception"].loss, wrapped).refuses_mixed == refuses
