"""The gradients that DDP gives a rank are those of one process with all rows, whatever a loss needs of other ranks."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from gloo_ranks import Ranks
from loss_cases import CLASSES, PROGRESS, TEACHER_SHAPES, config_of, draws_of_the_global_batch, shapes_of
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.batch import Batch, Outputs
from pipeline.distiller import Distiller
from pipeline.features.taps import FeatureTaps, tap_shapes
from pipeline.losses._base import Facts, Taps
from pipeline.losses._registry import load_spec

ROWS = 12
STAGES = {"stage1": "1", "embedding": "4:in"}

# Of samples, of statistics (class by class, of columns, over banks) and of the batch.
every_scope = pytest.mark.parametrize("name", ["dkd", "perception", "dist", "crd", "sp"])


def distiller_of(name: str, teacher: dict[str, tuple[int, ...]], taps: Taps, labels: Tensor) -> Distiller:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES)
    )
    student = FeatureTaps(network, STAGES, taps.student)
    facts = Facts(CLASSES, tap_shapes(student, 8), teacher, ROWS, labels.numpy())
    return Distiller(student, {key: load_spec(key, config_of(key)) for key in ("ce", name)}, facts).double()


def under_ddp(model: nn.Module) -> nn.Module:
    """Return the model as ``launch.create_accelerator`` has it wrapped."""
    options = {"gradient_as_bucket_view": True, "find_unused_parameters": True}
    return DistributedDataParallel(model, broadcast_buffers=False, **options)


def gradients(rank: int, world: int, name: str, micro_batches: int = 1) -> dict[str, Tensor]:
    """Return what a rank's parameters are given for its share of 12 rows, by DDP if there are other ranks."""
    taps = load_spec(name, config_of(name)).config.taps()
    teacher_shapes = shapes_of(taps.teacher, TEACHER_SHAPES)
    labels = torch.arange(ROWS) * 2 % CLASSES
    model = distiller_of(name, teacher_shapes, taps, labels)
    torch.manual_seed(1)
    images = torch.randn(ROWS, 3, 8, 8, dtype=torch.float64)
    logits = torch.randn(ROWS, CLASSES, dtype=torch.float64)
    features = {tap: torch.randn(ROWS, *shape, dtype=torch.float64) for tap, shape in teacher_shapes.items()}
    wrapped = under_ddp(model) if world > 1 else model
    *others, last = torch.arange(ROWS).split(ROWS // micro_batches)
    for share in (*others, last):
        own = share[rank * len(share) // world : (rank + 1) * len(share) // world]
        batch = Batch(images[own], labels[own], own, {})
        teacher = Outputs(logits[own], {tap: x[own] for tap, x in features.items()})
        waiting = wrapped.no_sync() if world > 1 and share is not last else nullcontext()  # type: ignore[operator]
        with waiting, draws_of_the_global_batch(rank, world):
            # Accelerate divides by the number of micro-batches.
            (wrapped(batch, teacher, PROGRESS)["total"] / micro_batches).backward()
    return {key: parameter.grad.clone() for key, parameter in model.named_parameters() if parameter.grad is not None}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(
            found[key], value, rtol=1e-12, atol=1e-12, msg=lambda text, key=key: f"{key}: {text}"
        )


@every_scope
def test_a_rank_is_given_the_gradients_of_one_process(name: str, several_ranks: Ranks):
    one = gradients(0, 1, name)
    assert len([key for key in one if key.startswith("student.")]) == 4
    for answer in several_ranks(gradients, name):
        assert_equal(answer, one)


@pytest.mark.parametrize("micro_batches", [2, 6])
def test_micro_batches_of_a_loss_of_samples_add_up_to_the_whole(micro_batches: int, ranks: Ranks):
    whole = gradients(0, 1, "dkd")
    assert_equal(gradients(0, 1, "dkd", micro_batches), whole)
    for answer in ranks(gradients, "dkd", micro_batches):
        assert_equal(answer, whole)


@pytest.mark.parametrize("name", ["perception", "sp"])
def test_statistics_and_relations_are_those_of_a_micro_batch_over_all_ranks(name: str, several_ranks: Ranks):
    one, whole = gradients(0, 1, name, 2), gradients(0, 1, name)
    for answer in several_ranks(gradients, name, 2):
        assert_equal(answer, one)
    assert max((one[key] - whole[key]).abs().max() for key in whole) > 1e-3
