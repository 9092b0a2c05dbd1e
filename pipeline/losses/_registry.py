"""The losses by name, and the specs that a recipe's ``losses`` section is read into."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, ValidationInfo, create_model

from pipeline.losses._base import Facts, Loss
from pipeline.losses._extractor import ExtractorConfig
from pipeline.losses._peers import EachPeer, PeersLoss
from pipeline.run_reference import RunReference

NO_LOSSES = {"losses": False}
"""Context of a validation that reads a recipe without its losses, whose modules are then not imported."""


@dataclass(frozen=True)
class LossSpec:
    """An entry of a recipe's ``losses``: the loss's name, class and config."""

    name: str
    loss: type[Loss]
    config: Loss.Config

    def build(self, facts: Facts) -> Loss:
        """Return the loss, built from the config and ``facts``.

        It is built for each peer if several networks train together, unless it compares them. Raises ValueError if it
        compares maps of logits of different size.
        """
        if facts.peers and not self.compares_peers:
            return EachPeer(self.name, [self.build(of_peer) for of_peer in facts.peers], facts)
        # Losses that tap the maps of logits as features pool them to one size.
        if self.reads_teachers_head and self.takes_pixels and "logits" not in self.config.taps().student:
            _check_maps(self.name, facts)
        loss = self.loss(self.config, replace(facts, extractor=facts.extractors.get(self.name)))
        loss.labelled_only = self.reads_labels
        return loss

    @property
    def reads_teachers_head(self) -> bool:
        """Return whether the loss reads what the teacher's head computes."""
        return self.runs_teacher and self.config.reads_head()

    @property
    def runs_teacher(self) -> bool:
        """Return whether the loss reads what the teacher answers during training."""
        return self.loss.needs_teacher and not self.config.reads_pseudo_labels()

    @property
    def runs(self) -> dict[str, RunReference]:
        """The runs whose auxiliary modules this loss starts with, by the key of its config."""
        return {key: value for key, value in self.config if isinstance(value, RunReference)}

    @property
    def extractors(self) -> dict[str, ExtractorConfig]:
        """The frozen networks whose features this loss compares images by, by the key of its config."""
        return {key: value for key, value in self.config if isinstance(value, ExtractorConfig)}

    @property
    def scopes(self) -> frozenset[str]:
        """The scopes of this loss and of its inner losses."""
        return frozenset({self.loss.scope}).union(*(spec.scopes for spec in self._inner))

    @property
    def compares_peers(self) -> bool:
        """Return whether the loss compares networks that train together."""
        return issubclass(self.loss, PeersLoss)

    @property
    def reads_labels(self) -> bool:
        """Return whether this loss or an inner one reads an image's only class."""
        return _declared(self.loss, "reads_labels", True) or any(spec.reads_labels for spec in self._inner)

    @property
    def refuses_mixed(self) -> bool:
        """Return whether this loss or an inner one reads a class, but cannot learn from an image of two."""
        own = _declared(self.loss, "reads_labels", True) and _declared(self.loss, "mixed_labels", None) is None
        return own or any(spec.refuses_mixed for spec in self._inner)

    @property
    def takes_pixels(self) -> bool:
        """Return whether this loss and its inner losses take the pixels of a map of logits as rows."""
        return _declared(self.loss, "takes_pixels", False) and all(spec.takes_pixels for spec in self._inner)

    @property
    def takes_images(self) -> bool:
        """Return whether the loss of logits takes images in their place."""
        return _declared(self.loss, "takes_images", False)

    @property
    def has_label_loss(self) -> bool:
        """Return whether this loss or an inner one has the cross-entropy with the labels as a part."""
        return self.config.has_label_loss() or any(spec.has_label_loss for spec in self._inner)

    @property
    def needs_pairs(self) -> bool:
        """Return whether this loss or an inner one needs ``data.pairs``."""
        return self.config.needs_pairs() or any(spec.needs_pairs for spec in self._inner)

    @property
    def targets(self) -> frozenset[str]:
        """The names in a batch's targets that this loss and its inner losses read."""
        return self.loss.targets.union(*(spec.targets for spec in self._inner))

    @property
    def _inner(self) -> list[LossSpec]:
        return [value for _, value in self.config if isinstance(value, LossSpec)]


def _check_maps(name: str, facts: Facts) -> None:
    """Raise ValueError unless student and teacher have logits of the same pixels."""
    ours, theirs = (shapes.get("logits", ())[1:] for shapes in (facts.student_shapes, facts.teacher_shapes))
    if ours != theirs:
        sizes = " and ".join(" × ".join(map(str, size)) or "no map" for size in (ours, theirs))
        raise ValueError(f"{name}: the maps of logits of student and teacher are {sizes}; give both one output stride")


def _declared(loss: type[Loss], name: str, default: Any) -> Any:
    """Return an attribute of a loss's class, but ``default`` for a subclass that computes something else."""
    for base in loss.__mro__:
        if name in vars(base):
            return vars(base)[name]
        if {"forward", "parts"} & vars(base).keys():
            return default
    return default


def known_losses() -> list[str]:
    """Return the names of the losses: the files of this folder that do not begin with an underscore."""
    names = [module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)])]
    return sorted(name for name in names if not name.startswith("_"))


def find_loss(name: str) -> type[Loss]:
    """Return the loss class named ``name``: a file of this folder, or a user's own as ``package.module:Class``.

    Raises ValueError if there is no such loss.
    """
    if ":" in name:
        path, _, attribute = name.partition(":")
        try:
            found = getattr(importlib.import_module(path), attribute)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"no loss at {name!r}: {error}") from error
        if not (isinstance(found, type) and issubclass(found, Loss)):
            raise ValueError(f"{name!r} is not a pipeline.losses.Loss")
        if not isinstance(found.targets, frozenset):
            raise ValueError(f"the targets of {name!r} must be a frozenset of names, got {found.targets!r}")
        return found
    if name not in known_losses():
        near = get_close_matches(name, known_losses(), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known_losses())}"
        raise ValueError(f"there is no loss {name!r}; {hint}")
    (loss,) = _losses_of(f"{__package__}.{name}")
    return loss


def _losses_of(module_name: str) -> list[type[Loss]]:
    """Return the losses that a module defines itself, without those it imports; each file defines one."""
    module = importlib.import_module(module_name)
    defined = [value for value in vars(module).values() if isinstance(value, type) and value.__module__ == module_name]
    return [value for value in defined if issubclass(value, Loss)]


def load_spec(name: str, config: Any) -> LossSpec:
    """Return the spec of one ``name: {…}`` entry. Config errors name the key with its full path."""
    loss = find_loss(name)
    # A model with one field, aliased to the loss's name: pydantic then puts that name into the path of its errors.
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
    spec = load_spec(name, config)
    if not spec.config.reads_head():
        raise ValueError(f"the loss {name!r} reads no logits, which are what it is for here; name another one")
    if spec.config.reads_unlabelled_only():
        raise ValueError(f"the loss {name!r} has rows of its own, and another loss chooses them here; remove its rows")
    return spec


def _load_losses(value: Any, info: ValidationInfo) -> dict[str, LossSpec]:
    if info.context == NO_LOSSES:
        return {}
    if not isinstance(value, dict) or not value or not all(isinstance(name, str) for name in value):
        raise ValueError("expected losses by name, such as {ce: {}, kd: {temperature: 4.0}}")
    return {name: config if isinstance(config, LossSpec) else load_spec(name, config) for name, config in value.items()}


def _dump(spec: LossSpec) -> dict[str, Any]:
    return {spec.name: spec.config.model_dump(mode="json", by_alias=True)}


InnerLoss = Annotated[LossSpec, BeforeValidator(_load_inner), PlainSerializer(_dump)]
"""Type of a config field that holds another loss, as in ``inner: {dkd: {…}}``."""
Losses = Annotated[
    dict[str, LossSpec],
    BeforeValidator(_load_losses),
    PlainSerializer(lambda specs: {name: value for spec in specs.values() for name, value in _dump(spec).items()}),
]
"""Type of the recipe's ``losses`` section: specs by name."""
