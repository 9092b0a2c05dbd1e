"""An example of every loss: its config from ``configs/methods/<name>.yaml``, inputs of the shapes it asks for."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from pipeline.batch import Batch, Outputs, Progress
from pipeline.losses._base import Facts, Loss, LossSpec, known_losses, load_spec

NAMES = known_losses()
METHODS = Path(__file__).resolve().parents[2] / "configs" / "methods"
# Past every warm-up.
PROGRESS = Progress(steps_per_epoch=10, step=215)
CLASSES = 5
STUDENT_SHAPES = {"embedding": (12,)}
TEACHER_SHAPES = {"embedding": (20,)}
STUDENT_MAP, TEACHER_MAP = (8, 4, 4), (16, 4, 4)

every_loss = pytest.mark.parametrize("name", NAMES)


class Example(NamedTuple):
    loss: Loss
    student: Outputs
    teacher: Outputs
    batch: Batch

    def parts(self, seed: int = 0) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return self.loss.parts(self.student, self.teacher, self.batch, PROGRESS)

    def total(self, seed: int = 0) -> Tensor:
        return torch.stack(list(self.parts(seed).values())).sum()

    def student_tensors(self) -> list[Tensor]:
        return [self.student.logits_BK, *self.student.features.values()]

    def at(self, rows: list[int]) -> Example:
        """Return the case with those rows of its inputs, as leaves of their own."""

        def of(outputs: Outputs) -> Outputs:
            features = {stage: x.detach()[rows].requires_grad_() for stage, x in outputs.features.items()}
            return Outputs(outputs.logits_BK.detach()[rows].requires_grad_(), features)

        batch = Batch(*(x[rows] for x in self.batch[:3]), {})
        return Example(self.loss, of(self.student), of(self.teacher), batch)


def config_of(name: str) -> dict[str, Any]:
    """Return the loss's entry in its method's recipe."""
    path = METHODS / f"{name}.yaml"
    assert path.is_file(), f"the loss {name} has no recipe configs/methods/{name}.yaml"
    return yaml.safe_load(path.read_text())["losses"][name]


def with_global_statistics(spec: LossSpec) -> LossSpec:
    """Return the spec with every ``stat_scope`` in it set to ``global``."""

    def turned(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: "global" if key == "stat_scope" else turned(below) for key, below in value.items()}

    return load_spec(spec.name, turned(spec.config.model_dump(mode="json", by_alias=True)))


def example(
    name: str,
    spec: LossSpec | None = None,
    *,
    rows: int = 6,
    dtype: torch.dtype = torch.float64,
    autocast: torch.dtype | None = None,
    scale: float = 1.0,
    seed: int = 0,
) -> Example:
    """Return the loss with float32 parameters (float64 ones for float64 inputs) and random inputs of that size."""
    spec = spec or load_spec(name, config_of(name))
    taps = spec.config.taps()
    student_shapes = {stage: STUDENT_SHAPES.get(stage, STUDENT_MAP) for stage in sorted(taps.student)}
    teacher_shapes = {stage: TEACHER_SHAPES.get(stage, TEACHER_MAP) for stage in sorted(taps.teacher)}
    labels = np.arange(rows) * 2 % CLASSES
    facts = Facts(CLASSES, student_shapes, teacher_shapes, rows, labels, autocast)
    torch.manual_seed(zlib.crc32(name.encode()) + seed)
    loss = spec.build(facts).to(torch.float64 if dtype == torch.float64 else torch.float32)

    def outputs(shapes: dict[str, tuple[int, ...]]) -> Outputs:
        def made(shape: tuple[int, ...]) -> Tensor:
            return (scale * torch.randn(rows, *shape, dtype=torch.float64)).to(dtype).requires_grad_()

        return Outputs(made((CLASSES,)), {stage: made(shape) for stage, shape in shapes.items()})

    batch = Batch(torch.zeros(rows, 3, 4, 4, dtype=dtype), torch.from_numpy(labels), torch.arange(rows), {})
    return Example(loss, outputs(student_shapes), outputs(teacher_shapes), batch)


class Inputs(NamedTuple):
    """What an oracle sees: lists of float64 numbers."""

    student_logits: list[list[float]]
    teacher_logits: list[list[float]]
    labels: list[int]
    student_features: dict[str, list[Any]]
    teacher_features: dict[str, list[Any]]
    parameters: dict[str, np.ndarray]
    seed: int
    """torch's seed before the loss draws."""


def inputs_of(case: Example, seed: int) -> Inputs:
    return Inputs(
        case.student.logits_BK.tolist(),
        case.teacher.logits_BK.tolist(),
        case.batch.labels_B.tolist(),
        {stage: x.tolist() for stage, x in case.student.features.items()},
        {stage: x.tolist() for stage, x in case.teacher.features.items()},
        {key: value.detach().numpy() for key, value in case.loss.named_parameters()},
        seed,
    )


def oracle(name: str) -> Any:
    """Return the loss's module of ``tests/oracles``; a loss without one fails."""
    try:
        return import_module(f"oracles.{name}")
    except ModuleNotFoundError:
        pytest.fail(f"the loss {name} has no oracle; write its formula in plain loops as tests/oracles/{name}.py")


def those_with(trait: str) -> pytest.MarkDecorator:
    """Parametrise over the losses whose oracle declares that property."""
    found = [name for name in NAMES if trait in getattr(oracle(name), "PROPERTIES", ())]
    return pytest.mark.parametrize("name", found)


@contextmanager
def draws_of_the_global_batch(rank: int, world: int) -> Iterator[None]:
    """Give a rank the rows of what one process with all rows would draw."""
    randn, randint = torch.randn, torch.randint

    def rows(size: int) -> slice:
        return slice(rank * size, (rank + 1) * size)

    def randn_like(x: Tensor) -> Tensor:
        return randn(world * len(x), *x.shape[1:], dtype=x.dtype)[rows(len(x))]

    def randint_rows(high: int, size: tuple[int, ...], **options: Any) -> Tensor:
        return randint(high, (world * size[0], *size[1:]), **options)[rows(size[0])]

    with mock.patch("torch.randn_like", randn_like), mock.patch("torch.randint", randint_rows):
        yield
