"""What every loss is: a frozen config, the facts it is built from, and named parts.

A file of this folder holds a method's formulas, as pure functions, and one ``Loss``; its name is the loss's in a
recipe. There is no list.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, PlainSerializer, create_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.batch import Batch, Outputs, Progress
from pipeline.parallel import gather_rows, world_size
from pipeline.schedules import Ramp, ramp_factor
from pipeline.stage_names import numbered
from pipeline.taps import NormParameters


class Taps(NamedTuple):
    """The taps a loss reads, by canonical stage name, of each network. Logits always come and are not named here."""

    student: frozenset[str] = frozenset()
    teacher: frozenset[str] = frozenset()

    def union(self, other: Taps) -> Taps:
        """Return the taps that either asks for."""
        return Taps(self.student | other.student, self.teacher | other.teacher)


@dataclass(frozen=True)
class Facts:
    """What one probe forward and the shards' manifest tell a loss at construction."""

    num_classes: int
    student_shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Shape of each student tap without the batch dimension, by tap name."""
    teacher_shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    id_count: int = 0
    """One more than the largest training sample id: the rows of a bank indexed by id."""
    labels_by_id: np.ndarray | None = None
    """int64 [id_count]; −1 where no sample has that id."""
    teacher_norms: dict[str, NormParameters] = field(default_factory=dict)
    """Scale and shift of the BatchNorm that ends a teacher's ``stageN.preact``, by tap name, as before folding."""
    autocast: torch.dtype | None = None
    """The recipe's autocast type, under which the convolutions of auxiliary modules run; None is none."""


class Loss(nn.Module):
    """A loss. Its auxiliary modules are its attributes, so they are moved, trained, saved and left out at export.

    ``forward(student, teacher, batch)`` returns the unweighted parts by name. A loss that wraps another overrides
    ``parts`` instead and calls the other's ``parts``.
    """

    class Config(BaseModel):
        """Every loss's config has a weight and a ramp; a paper's constants have no defaults and stand in recipes."""

        model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

        weight: float = 1.0
        ramp: Ramp | None = None

        def taps(self) -> Taps:
            """Return the taps this loss and those inside it read."""
            return Taps()

    scope: ClassVar[Literal["sample", "statistics", "batch"]] = "sample"
    """What it needs of other ranks: nothing; sums, through ``parallel``; or all rows, gathered by the Distiller."""
    needs_teacher: ClassVar[bool] = True

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__()
        self.config: Any = config
        self.facts = facts

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the unweighted scalar parts by name."""
        raise NotImplementedError

    def parts(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Return ``forward``'s parts × weight × ramp, computed in at least float32 with autocast off."""
        with autocast(student.logits_BK, None):
            return self.scaled(self(*self.tapped(student, teacher), batch), progress)

    def tapped(self, student: Outputs, teacher: Outputs) -> tuple[Outputs, Outputs]:
        """Return what the loss sees of both networks: logits and the taps that its config names, at least in float32.

        Another loss's maps are left alone: to promote them would be a copy of each, for every loss.
        """
        taps = self.config.taps()
        of_teacher = promoted(only(teacher, taps.teacher)) if self.needs_teacher else teacher
        return promoted(only(student, taps.student)), of_teacher

    def commit(self) -> None:
        """Take in what ``forward`` saw of this global batch; called after its update, once, on every rank.

        Only here may a loss change state of its own, such as a bank over the data set: ``forward`` is a function. A
        loss's own buffers are the same on every rank, and a checkpoint holds them once.
        """

    def run(self, network: Callable[..., Tensor], x: Tensor, *more: Tensor) -> Tensor:
        """Return an auxiliary network's answer under the recipe's autocast, in the dtype of ``x``."""
        return run_under(self.facts.autocast, network, x, *more)

    def scaled(self, parts: dict[str, Tensor], progress: Progress) -> dict[str, Tensor]:
        """Return ``parts`` × weight × ramp."""
        factor = self.config.weight * ramp_factor(self.config.ramp, progress)
        return {name: factor * value for name, value in parts.items()}


def run_under(dtype: torch.dtype | None, network: Callable[..., Tensor], x: Tensor, *more: Tensor) -> Tensor:
    """Return the network's answer under that autocast type, None for none, brought back to the dtype of ``x``."""
    with autocast(x, dtype):
        return network(x, *more).to(x.dtype)


def recomputed(function: Callable[..., Tensor], x: Tensor, *more: Tensor) -> Tensor:
    """Return ``function(x, …)``, which draws nothing; backward computes it again, and what is inside is not kept.

    On the meta device, where operations are counted, none is done twice.
    """
    if x.device.type == "meta":
        return function(x, *more)
    found = checkpoint(function, x, *more, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(found, Tensor)
    return found


def autocast(x: Tensor, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """Return the context that computes with ``x`` under that autocast type, None for none."""
    if x.device.type == "meta":  # where shapes are computed and numbers are not; torch has no autocast there
        return nullcontext()
    return torch.autocast(x.device.type, dtype=dtype, enabled=dtype is not None)


def checked_scope(scope: str) -> str:
    """Return ``scope`` if it is ``global``, ``rank`` or ``ghost:N``; raise ValueError otherwise."""
    kind, _, rows = scope.partition(":")
    if scope in ("global", "rank") or (kind == "ghost" and rows.isdecimal() and int(rows) > 1):
        return scope
    raise ValueError(f"expected global, rank or ghost:N with N > 1 consecutive rows of a rank, got {scope!r}")


StatScope = Annotated[str, AfterValidator(checked_scope)]
"""Rows that a statistic covers: all ranks', this rank's, or with ``ghost:N`` each N consecutive ones of it."""


def group_size(scope: str, rows: int) -> int | None:
    """Return how many consecutive ones of a rank's ``rows`` a statistic covers; None where it is those of all ranks."""
    kind, _, number = scope.partition(":")
    if kind == "global":
        return None
    return int(number) if number else max(rows, 1)


def mean_by_rows(values: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Return the mean of the groups' values, each as often as its group has rows: the last may be a short one."""
    # By numbers of the host: a tensor made of them would have it wait for a GPU.
    return torch.stack([value * (size / sum(sizes)) for value, size in zip(values, sizes, strict=True)]).sum()


class BatchLoss(Loss):
    """A loss of how rows relate to one another. ``forward`` is given the rows of all ranks at once.

    Of them it sees logits, the taps that its config names, labels and ids; the images are this rank's. Under gradient
    accumulation the rows are those of a micro-batch.
    """

    scope = "batch"

    class Config(Loss.Config):
        """With ``stat_scope: rank`` or ``ghost:N`` it takes a rank's rows, or groups of them, as published code did."""

        stat_scope: StatScope = "global"

    def parts(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Return ``forward``'s parts of the gathered rows, or the mean of those of the groups, × weight × ramp."""
        with autocast(student.logits_BK, None):
            student, teacher = map(self.compared, self.tapped(student, teacher))
            groups = self.groups(student, teacher, batch)
            found = [self(*group) for group in groups]
            sizes = [len(of_group.labels_B) for _, _, of_group in groups]
            return self.scaled({name: mean_by_rows([p[name] for p in found], sizes) for name in found[0]}, progress)

    def compared(self, outputs: Outputs) -> Outputs:
        """Return what is gathered of a network's outputs; a loss that needs less than its taps says so here."""
        return outputs

    def groups(self, student: Outputs, teacher: Outputs, batch: Batch) -> list[tuple[Outputs, Outputs, Batch]]:
        """Return what each group of related rows consists of."""
        size = group_size(self.config.stat_scope, len(batch.labels_B))
        if size is None:
            labels_B, ids_B = gather_rows(torch.stack([batch.labels_B, batch.ids_B], 1), equal=True).unbind(1)
            return [(gathered(student), gathered(teacher), batch._replace(labels_B=labels_B, ids_B=ids_B))]
        places = zip(batch.labels_B.split(size), batch.ids_B.split(size), strict=True)
        batches = [batch._replace(labels_B=labels_B, ids_B=ids_B) for labels_B, ids_B in places]
        return list(zip(split_rows(student, size), split_rows(teacher, size), batches, strict=True))


def only(outputs: Outputs, taps: frozenset[str]) -> Outputs:
    """Return ``outputs`` with only the features that ``taps`` name, ``all`` meaning every stage."""
    kinds = {tap.removeprefix("all") for tap in taps if tap.partition(".")[0] == "all"}
    of_all = {name for kind in kinds for name in numbered(outputs.features, kind)}
    return outputs._replace(features={name: x for name, x in outputs.features.items() if name in taps | of_all})


def gathered(outputs: Outputs) -> Outputs:
    """Return the outputs of all ranks' rows, with gradient: one collective, whatever the number of features."""
    if world_size() == 1:
        return outputs
    tensors = [outputs.logits_BK, *outputs.features.values()]
    flat = gather_rows(torch.cat([x.flatten(1) for x in tensors], 1), equal=True)
    parts = flat.split([x.shape[1:].numel() for x in tensors], 1)
    logits_BK, *features = (part.unflatten(1, x.shape[1:]) for part, x in zip(parts, tensors, strict=True))
    return Outputs(logits_BK, dict(zip(outputs.features, features, strict=True)))


def split_rows(outputs: Outputs, size: int) -> list[Outputs]:
    """Return the outputs of each ``size`` consecutive rows."""
    features = {name: x.split(size) for name, x in outputs.features.items()}
    logits = outputs.logits_BK.split(size)
    return [Outputs(part, {name: x[group] for name, x in features.items()}) for group, part in enumerate(logits)]


def promoted(outputs: Outputs) -> Outputs:
    """Return ``outputs`` with half-precision tensors in float32; float32 and float64 pass as they are."""

    def promote(x: Tensor) -> Tensor:
        return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x

    return Outputs(promote(outputs.logits_BK), {name: promote(x) for name, x in outputs.features.items()})


@dataclass(frozen=True)
class LossSpec:
    """A loss as a recipe names it: which class, with which config."""

    name: str
    loss: type[Loss]
    config: Loss.Config

    def build(self, facts: Facts) -> Loss:
        """Return the loss."""
        return self.loss(self.config, facts)

    @property
    def scopes(self) -> frozenset[str]:
        """The scopes of this loss and of those it wraps."""
        inner = [value for _, value in self.config if isinstance(value, LossSpec)]
        return frozenset({self.loss.scope}).union(*(spec.scopes for spec in inner))


def known_losses() -> list[str]:
    """Return the names of the losses in this folder."""
    names = [module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)])]
    return sorted(name for name in names if not name.startswith("_") and _losses_of(f"{__package__}.{name}"))


def find_loss(name: str) -> type[Loss]:
    """Return the loss of that name: a file of this folder, or a user's own as ``package.module:Class``.

    Raises ValueError where there is none.
    """
    if ":" in name:
        path, _, attribute = name.partition(":")
        try:
            found = getattr(importlib.import_module(path), attribute)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"no loss at {name!r}: {error}") from error
        if not (isinstance(found, type) and issubclass(found, Loss)):
            raise ValueError(f"{name!r} is not a pipeline.losses.Loss")
        return found
    if name not in known_losses():
        near = get_close_matches(name, known_losses(), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known_losses())}"
        raise ValueError(f"there is no loss {name!r}; {hint}")
    (loss,) = _losses_of(f"{__package__}.{name}")
    return loss


def _losses_of(module_name: str) -> list[type[Loss]]:
    """Return the losses a module defines (not those it imports): one in a loss file, none in a file of formulas."""
    module = importlib.import_module(module_name)
    own = [value for value in vars(module).values() if isinstance(value, type) and value.__module__ == module_name]
    return [value for value in own if issubclass(value, Loss)]


def load_spec(name: str, config: Any) -> LossSpec:
    """Return the spec of one ``name: {…}`` entry; a config error keeps its key's path."""
    loss = find_loss(name)
    # A one-field model, so that the loss's name stands in the path of an error below it.
    entry = create_model("entry", entry=(loss.Config, ...))
    entry.model_fields["entry"].validation_alias = name
    entry.model_rebuild(force=True)
    return LossSpec(name, loss, entry.model_validate({name: {} if config is None else config}).entry)  # type: ignore[attr-defined]


def _load_inner(value: Any) -> LossSpec:
    if isinstance(value, LossSpec):
        return value
    if not isinstance(value, dict) or len(value) != 1:
        raise ValueError("expected exactly one loss, such as {kd: {temperature: 4.0}}")
    ((name, config),) = value.items()
    return load_spec(name, config)


def _load_losses(value: Any) -> dict[str, LossSpec]:
    if not isinstance(value, dict) or not value or not all(isinstance(name, str) for name in value):
        raise ValueError("expected losses by name, such as {ce: {}, kd: {temperature: 4.0}}")
    return {name: config if isinstance(config, LossSpec) else load_spec(name, config) for name, config in value.items()}


def _dump(spec: LossSpec) -> dict[str, Any]:
    return {spec.name: spec.config.model_dump(mode="json", by_alias=True)}


InnerLoss = Annotated[LossSpec, BeforeValidator(_load_inner), PlainSerializer(_dump)]
"""A field of a loss's config that holds another loss: ``inner: {dkd: {…}}``."""

Losses = Annotated[
    dict[str, LossSpec],
    BeforeValidator(_load_losses),
    PlainSerializer(lambda specs: {name: value for spec in specs.values() for name, value in _dump(spec).items()}),
]
"""The recipe's ``losses``."""


class Wrapping(Loss):
    """Another loss, ``inner``, of logits that were changed first; weight and ramp multiply the inner loss's own."""

    class Config(Loss.Config):
        """``{inner: {dkd: {…}}}``."""

        inner: InnerLoss

        def taps(self) -> Taps:
            """Return the inner loss's taps."""
            return self.inner.config.taps()

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        self.inner = config.inner.build(facts)

    def changed(self, student_BK: Tensor, teacher_BK: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits that the inner loss sees, of student and teacher."""
        raise NotImplementedError

    def parts(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Return the inner loss's parts on the changed logits, × weight × ramp."""
        with autocast(student.logits_BK, None):
            student, teacher = self.tapped(student, teacher)
            student_BK, teacher_BK = self.changed(student.logits_BK, teacher.logits_BK.detach())
            seen = student._replace(logits_BK=student_BK), teacher._replace(logits_BK=teacher_BK)
            return self.scaled(self.inner.parts(*seen, batch, progress), progress)
