"""launchers/README.md: its tables are the generator's, and its bytes are those that ranks send."""

from __future__ import annotations

import runpy
from typing import Any

import numpy as np
import pytest
import torch
from gloo_ranks import Ranks
from sent_bytes import Collectives

from pipeline.batch import Batch, Outputs, Progress
from pipeline.config.recipe import load_recipe
from pipeline.errors import ROOT
from pipeline.losses._base import Facts
from pipeline.losses._registry import load_spec
from pipeline.training.accelerator import BUCKET_MIB

MODEL = runpy.run_path(str(ROOT / "launchers" / "cost_model.py"))
FAST, ONE_ADAPTER, ETHERNET = MODEL["NETWORKS"]
CLASSES, ROWS = 10, 4
SHAPES = MODEL["Shapes"]({"embedding": (8,), "logits": (CLASSES,)}, {"embedding": (12,), "logits": (CLASSES,)})
KINDS = {"allreduce": "all-reduce", "allgather_base": "all-gather", "reduce_scatter_base": "reduce-scatter"}


@pytest.fixture(scope="module")
def methods() -> dict[str, Any]:
    return {method.name: method for method in MODEL["methods"]()}


@pytest.fixture(scope="module")
def rate(methods: dict[str, Any]) -> float:
    return MODEL["published_rate"](list(methods.values()))


def test_the_tables_are_what_the_generator_writes(methods: dict[str, Any]):
    assert MODEL["readme"](list(methods.values())) == MODEL["README"].read_text()


def losses_of(method: str) -> dict[str, Any]:
    return load_recipe(ROOT / "configs" / "imagenet" / "r50_mbv1.yaml", [f"method={method}"]).recipe.losses


def sent(rank: int, world: int, method: str) -> list[tuple[str, int]]:
    """Return the collectives of the second step of a method's losses, on vectors that are no images'."""
    labels_by_id = np.arange(20) % CLASSES
    facts = Facts(CLASSES, SHAPES.student, SHAPES.teacher, len(labels_by_id), labels_by_id)
    losses = [spec.build(facts) for spec in losses_of(method).values()]
    ids = torch.arange(ROWS) + rank * ROWS
    batch = Batch(torch.zeros(ROWS, 3, 1, 1), ids % CLASSES, ids, {})
    for _ in range(2):
        student, teacher = ({name: torch.randn(ROWS, *shape) for name, shape in of.items()} for of in SHAPES)
        for value in student.values():
            value.requires_grad_()
        answers = [Outputs(of.pop("logits"), of) for of in (student, teacher)]
        with Collectives() as collectives:
            parts = [
                part for loss in losses for part in loss.parts(*answers, batch, Progress(steps_per_epoch=1)).values()
            ]
            torch.stack(parts).sum().backward()
            for loss in losses:
                loss.commit()
    return [(KINDS[call.name], call.bytes) for call in collectives.calls]


@pytest.mark.parametrize("method", ["dkd", "perception", "kd_perception", "dist", "crd", "pkt", "rkd"])
def test_a_method_sends_the_bytes_of_the_model(method: str, ranks: Ranks):
    expected = [tuple(one) for one in MODEL["messages"](losses_of(method).values(), SHAPES, ROWS, ranks.world)]
    assert bool(expected) == (method != "dkd")
    for answer in ranks(sent, method):
        assert sorted(answer) == sorted(expected)


def test_what_stands_inside_another_loss_sends_as_much(methods: dict[str, Any]):
    assert methods["ddkd_perception"].messages(32, 64) == methods["perception"].messages(32, 64)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("irg", {"vertex_weight": 1, "edge_weight": 1, "transformation_weight": 1}),
        ("fitnet", {"stat_scope": "global", "stage": "last"}),
    ],
)
def test_a_loss_that_the_model_does_not_know_is_refused(name: str, config: dict[str, Any]):
    with pytest.raises(ValueError, match=f"{name}: the collectives of this loss have no formula"):
        MODEL["messages"]([load_spec(name, config)], SHAPES, ROWS, 2)


def test_buckets_are_as_large_as_those_that_training_asks_for():
    assert MODEL["BUCKET"] == BUCKET_MIB * 2**20


def test_a_ring_carries_every_share_but_ones_own():
    carried = {kind: MODEL["volume"](MODEL["Message"](kind, 400), 4) for kind in KINDS.values()}
    assert carried == {"all-reduce": 600, "all-gather": 1200, "reduce-scatter": 300}


def speed(method: Any, nodes: int, rows: int, network: Any, rate: float) -> float:
    """Return images a second and node."""
    return 8 * rows / method.step(nodes, rows, network, rate).seconds


def test_the_model_says_what_the_text_says_of_networks(methods: dict[str, Any], rate: float):
    for name, method in methods.items():
        alone = speed(method, 1, 32, FAST, rate)
        assert 2 * speed(method, 2, 32, ETHERNET, rate) < alone, name
        scales = speed(method, 64, 32, FAST, rate) > 0.8 * alone
        assert scales == (name not in ("pkt", "rkd")), name


def test_the_model_says_what_the_text_says_of_a_fixed_batch_and_of_latency(methods: dict[str, Any], rate: float):
    ddkd, dkd = methods["ddkd"], methods["dkd"]
    share = [1 - one.step(4, 8, FAST, rate).compute / one.step(4, 8, FAST, rate).seconds for one in (ddkd, dkd)]
    assert share[0] > 2 * share[1]
    for name in ("perception", "dist"):
        few = methods[name].step(64, 32, FAST, rate).seconds / dkd.step(64, 32, FAST, rate).seconds - 1
        assert 0.01 < few < 0.06, name


def test_compute_and_backward_are_those_that_check_counts(methods: dict[str, Any], rate: float):
    for name in ("ce", "ddkd", "review"):
        step = methods[name].step(1, 32, FAST, rate)
        assert step.compute == pytest.approx(32 * 2 * methods[name].report.training_macs / rate)
    assert methods["ddkd"].gradients == 4 * (4_231_976 + 34_638_972)
