"""Channel-wise distillation: which maps it takes, with which weights, and what stands between them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loss_cases import Example, example, inputs_of, oracle
from pydantic import ValidationError
from torch import Tensor, nn

from pipeline.distributed.norms import BatchNorm, RankNorm
from pipeline.losses._base import Facts
from pipeline.losses._registry import load_spec
from pipeline.losses.cwd import cwd_loss

SHAPES = {"stage4": (4, 4, 6), "logits": (5, 4, 6)}, {"stage4": (7, 4, 6), "logits": (5, 4, 6)}


def segmenters(**changes: Any) -> Example:
    """Return the loss between two networks that have a map of logits."""
    config = {"stages": ["stage4", "logits"], "weights": [50.0, 3.0], "temperature": 4.0, **changes}
    return example("cwd", load_spec("cwd", config), rows=3, student=SHAPES[0], teacher=SHAPES[1])


def test_features_and_logits_have_a_weight_each_in_one_loss():
    case = segmenters()
    config = case.loss.config.model_dump(mode="json")
    assert case.total().item() == pytest.approx(oracle("cwd").parts(config, inputs_of(case, 0))["cwd"], rel=1e-10)
    alone = [segmenters(weights=weights).total().item() for weights in ([50.0, 0.0], [0.0, 3.0])]
    assert case.total().item() == pytest.approx(sum(alone), rel=1e-12)
    assert min(alone) > 0


def test_stages_without_weights_count_one_each():
    assert segmenters(weights=None).total().item() == segmenters(weights=[1.0, 1.0]).total().item()


def test_a_convolution_stands_only_where_the_channels_differ():
    of_stage, of_logits = segmenters().loss.connectors  # type: ignore[misc]
    assert isinstance(of_stage, nn.Conv2d)
    assert (of_stage.kernel_size, of_stage.out_channels, of_stage.bias) == ((1, 1), 7, None)
    assert isinstance(of_logits, nn.Identity)


@pytest.mark.parametrize(("scope", "kind"), [("rank", RankNorm), ("global", BatchNorm)])
def test_a_batch_norm_follows_the_convolution_on_request(scope: str, kind: type):
    connected = segmenters(norm=True, stat_scope=scope)
    convolution, norm = connected.loss.connectors[0]  # type: ignore[index,misc]
    assert isinstance(convolution, nn.Conv2d)
    assert type(norm) is kind
    assert isinstance(connected.loss.connectors[1], nn.Identity)  # type: ignore[index]
    assert connected.total().item() != segmenters().total().item()


def test_it_reads_the_head_only_with_the_map_of_its_logits():
    assert segmenters().loss.config.reads_head()
    assert not segmenters(stages=["stage4"], weights=None).loss.config.reads_head()


def test_what_is_added_to_a_channel_changes_nothing():
    student, teacher = (torch.randn(2, 3, 4, 5, dtype=torch.float64) for _ in range(2))
    moved = cwd_loss(student + torch.arange(3)[:, None, None], teacher - 2, temperature=4.0)
    torch.testing.assert_close(moved, cwd_loss(student, teacher, temperature=4.0), rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": [50.0]}, "1 weights for 2 stages; give each stage one"),
        ({"stages": "all"}, "weights are those of named stages, and stages is all; name them, or remove weights"),
    ],
)
def test_weights_that_fit_no_stages_are_refused_in_one_line(changes: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        segmenters(**changes)


def test_the_logits_of_a_classifier_are_refused_in_one_line():
    spec = load_spec("cwd", {"stages": ["logits"], "temperature": 4.0})
    with pytest.raises(ValueError, match=r"^the tap 'logits' is shaped \[5\], but a map \[C, H, W\] is needed$"):
        spec.build(Facts(5, {"logits": (5,)}, {"logits": (5,)}))


def at_temperature(temperature: float) -> Tensor:
    maps = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return cwd_loss(*maps, temperature=temperature)


def test_at_high_temperatures_it_tends_to_half_the_variance_over_the_pixels():
    difference = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).diff(dim=0)
    half = difference.flatten(3).var(3, unbiased=False).mean() / 2
    assert at_temperature(1e4).item() == pytest.approx(half.item(), rel=1e-3)
