"""Classes that are split into subclasses: the head, the loss of the teacher and what is refused."""

from __future__ import annotations

from math import log

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_spherical_kd import quick
from torch import Tensor

from pipeline.features.taps import FeatureTaps
from pipeline.losses.kd import kd_loss
from pipeline.losses.subclass_auxiliary import subclass_auxiliary_loss
from pipeline.models import create_model
from pipeline.models.arguments import ArgumentError
from pipeline.models.stages import stages
from pipeline.models.subclasses import class_logits


def split_evenly(logits_BK: Tensor, number: int) -> Tensor:
    return (logits_BK - log(number)).repeat_interleave(number, 1)


def test_an_even_split_has_the_logits_and_the_kd_of_the_plain_network():
    student_BK, teacher_BK = torch.randn(2, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(class_logits(split_evenly(student_BK, 3), 3), student_BK)
    # At T = 1 alone: a temperature softens subclasses and classes differently.
    split = kd_loss(split_evenly(student_BK, 3), split_evenly(teacher_BK, 3), temperature=1.0)
    assert split.item() == pytest.approx(kd_loss(student_BK, teacher_BK, temperature=1.0).item(), rel=1e-12)


@quick
@given(seed=st.integers(0, 1000), rows=st.integers(2, 9), temperature=st.floats(0.1, 5))
def test_the_auxiliary_loss_is_negative_down_to_the_logarithm_of_the_rows_and_zero_for_equal_rows(
    seed: int, rows: int, temperature: float
):
    draws = torch.Generator().manual_seed(seed)
    subclasses_BS = torch.randn(rows, 10, dtype=torch.float64, generator=draws)
    different = subclass_auxiliary_loss(subclasses_BS, temperature=temperature, eps=1e-9).item()
    assert -log(rows) < different < 0
    equal = subclass_auxiliary_loss(subclasses_BS[:1].expand(rows, 10), temperature=temperature, eps=1e-9).item()
    assert equal == pytest.approx(0, abs=1e-7)


def test_a_network_with_subclasses_answers_the_logits_of_classes_and_taps_those_of_subclasses():
    model = create_model("cifar_resnet8", 4, {"subclasses": 3})
    plain = create_model("cifar_resnet8", 12)
    plain.load_state_dict(model.state_dict(), strict=True)  # the same names and shapes
    images = torch.randn(2, 3, 32, 32)
    taps = FeatureTaps(model, stages(model), {"subclasses", "embedding"}).eval()
    outputs = taps(images)
    torch.testing.assert_close(outputs.features["subclasses"], plain.eval()(images))
    torch.testing.assert_close(outputs.logits, class_logits(outputs.features["subclasses"], 3))
    assert outputs.logits.shape == (2, 4)


@pytest.mark.parametrize("number", [1, 0, 2.5, "two"])
def test_fewer_than_two_subclasses_are_refused(number: object):
    with pytest.raises(ArgumentError, match=r"subclasses: expected a whole number of at least 2, got"):
        create_model("cifar_resnet8", 4, {"subclasses": number})


def test_a_network_whose_last_layer_is_not_known_is_refused():
    with pytest.raises(ArgumentError, match=r"subclasses: no last linear layer of SqueezeNet is known"):
        create_model("squeezenet1_1", 4, {"subclasses": 2})


def test_a_network_without_subclasses_says_why_it_has_none():
    plain = create_model("cifar_resnet8", 4)
    with pytest.raises(ValueError, match="the network has no stage 'subclasses', because it was built without"):
        FeatureTaps(plain, stages(plain), {"subclasses"})
