"""From a recipe to its teacher: a network, several, the student's average, or the cache of a network's answers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pipeline.builders.model_spec import ModelSpec
from pipeline.builders.student import print_note, student_spec
from pipeline.config.recipe import Recipe
from pipeline.data.loader import transform_fingerprint
from pipeline.distributed import collectives
from pipeline.errors import RecipeError, error_context
from pipeline.models.weights import load_weights, weights_sha256
from pipeline.models.weights_file import is_file
from pipeline.precision import AUTOCAST
from pipeline.runs.dependencies import finished
from pipeline.runs.files import IDENTITY, STUDENT, check_student
from pipeline.runs.identity import Run, differing_keys
from pipeline.runs.weights import known_by_path
from pipeline.teachers.average import EMATeacher
from pipeline.teachers.cache import LOGITS, Cache
from pipeline.teachers.cached import AnyTeacher, CachedTeacher
from pipeline.teachers.config import Config, TeacherNetwork
from pipeline.teachers.ensemble import TeacherEnsemble
from pipeline.teachers.frozen import Normalization, Teacher
from shards.manifest import Manifest


def build_teacher(run: Run, device: torch.device) -> AnyTeacher | None:
    """Return the teacher, or None for a recipe without one.

    Raises RecipeError where its weights do not fit the network or the shards' classes, or a cache does not fit either.
    """
    recipe, config = run.recipe, run.recipe.teacher
    if config is None:
        return None
    if (run.folder / IDENTITY).is_file():
        for weights in known_by_path(run.identity):
            told = f"{run.folder} knows {weights} by its path; that it holds what it did then is not checked"
            print_note("weights", told)
    if config.cache is not None:
        with error_context("teacher.cache"):
            return _cached(run, config, Cache(Path(config.cache)), device)
    if config.average is not None:
        named = student_spec(recipe.student, recipe.taps.teacher)._replace(key="teacher")
        auto = "fp32" if recipe.precision == "fp32" else "bf16"
        autocast = AUTOCAST[auto if config.dtype == "auto" else config.dtype]
        taps = named.build(run.manifest.num_classes)
        return EMATeacher(taps, config.average, batch=config.batch or 1, device=device, autocast=autocast)
    return build_live_teacher(run, config, recipe.taps.teacher, device)


def build_live_teacher(
    run: Run, config: Config, taps: Iterable[str], device: torch.device
) -> Teacher | TeacherEnsemble:
    """Return the frozen network, or networks, with those taps, whether there is a cache of their answers or not."""
    first, *others = frozen_networks(run, config)
    teachers = [_build(run, config, first, frozenset(taps), device)]
    teachers += [_build(run, config, network, frozenset(), device) for network in others]
    if config.combine is None or config.temperature is None:
        return teachers[0]
    return TeacherEnsemble(teachers, combine=config.combine, temperature=config.temperature)


def teacher_networks(config: Config | None) -> dict[str, TeacherNetwork]:
    """Return what the recipe says of each of the teacher's networks, by the key where it says it."""
    if config is None or not config.has_model:
        return {}
    if config.members is None:
        return {"teacher": config}
    return {f"teacher.members.{index}": member for index, member in enumerate(config.members)}


def teacher_specs(recipe: Recipe, sources: Sequence[Recipe]) -> list[ModelSpec]:
    """Return the teacher's networks as the recipe, or those of ``sources`` that it stands on, name them.

    The first has the taps that the losses read. A moving average is the student's network. ``sources`` are the recipes
    of ``teacher.recipes``, in that order.
    """
    following, found = iter(sources), []
    for place, network in teacher_networks(recipe.teacher).items():
        source = next(following).student if network.recipe is not None else network
        model = source.model or recipe.student.model
        own = network.stages or (source if source.model else recipe.student).stages or {}
        wanted = frozenset[str]() if found else recipe.taps.teacher
        found.append(ModelSpec(place, model, frozenset(own.items()), wanted))
    return found


class FrozenNetwork(NamedTuple):
    """One of a teacher's networks: what a recipe says of it, and where its weights are."""

    spec: ModelSpec
    config: TeacherNetwork
    run: Run | None
    """The one whose student it is."""
    weights: str
    """A file or a published name; those of a run are its last unless the recipe says."""
    expected: Normalization
    """What its images were normalised with when it was trained."""


def frozen_networks(run: Run, config: Config) -> list[FrozenNetwork]:
    """Return the teacher's networks; none where there is a cache alone."""
    following, found = iter(run.teachers), []
    named = teacher_specs(run.recipe, [below.recipe for below in run.teachers])
    for each, network in zip(named, teacher_networks(config).values(), strict=True):
        below = next(following) if network.recipe is not None else None
        weights = network.weights or (str(below.folder / STUDENT) if below else "")
        data = (below or run).recipe.data
        expected = Normalization(network.mean or data.mean, network.std or data.std)
        found.append(FrozenNetwork(each, network, below, weights, expected))
    return found


def _build(run: Run, config: Config, network: FrozenNetwork, taps: frozenset[str], device: torch.device) -> Teacher:
    """Return the network with its weights and those taps, frozen."""
    data = run.recipe.data
    if network.run is not None:
        finished(network.run)
    named = network.spec._replace(taps=taps)
    built = named.build(run.manifest.num_classes)
    named.probe(built, data.size)  # folding would run it on the same images, and not say what it cannot take
    with error_context(f"{named.key}.weights"):
        check_student(Path(network.weights))
        note = load_weights(built.model, network.weights, named.model, network.config.weights_key)
    print_note(f"{named.key}.weights", note)
    given = Normalization(data.mean, data.std)
    if not is_file(network.weights) and network.expected != given:
        told = f"mean {list(network.expected.mean)} and std {list(network.expected.std)}"
        print_note(named.key, f"its images are brought to {told}, which {network.weights} of {named.model} expects")
    teacher = Teacher(
        built,
        batch=config.batch or 1,
        image_size=data.size,
        dtype=network.config.torch_dtype(device),
        device=device,
        given=given,
        expected=network.expected,
        fold=network.config.fold,
    )
    if network.config.compile:
        teacher.taps.compile(dynamic=False)
    return teacher


# -- from a cache -----------------------------------------------------------------------------------------------------


def _cached(run: Run, config: Config, cache: Cache, device: torch.device) -> CachedTeacher:
    """Return the teacher that answers from the cache, and asks the network for what it lacks if the recipe says so."""
    recipe = run.recipe
    check_provenance(cache, provenance(run, config, device), config.accept)
    check_sizes(cache, run.manifest)
    lacking = cache.missing(recipe.taps.teacher)
    if lacking and config.fallback is None:
        tap, kind = next(iter(lacking.items()))
        loss = next(name for name, spec in recipe.losses.items() if tap in cache.kinds(spec.config.taps().teacher))
        raise RecipeError(
            f"{cache.folder} has no {kind}, which the loss {loss!r} reads as {tap!r}; let cache_teacher.py write "
            "it for this recipe, too, or ask the network: teacher.fallback=live"
        )
    live = build_live_teacher(run, config, lacking, device) if lacking else None
    taps = cache.kinds(recipe.taps.teacher)
    return CachedTeacher(cache, taps, views=views_read(recipe, cache), device=device, live=live)


def views_read(recipe: Recipe, cache: Cache) -> int:
    """Return how many of the cache's views the run reads: fewer epochs need no more of them."""
    return min(recipe.data.views or cache.header.views, recipe.epochs)


def provenance(run: Run, config: Config, device: torch.device, *, published: bool = False) -> dict[str, Any]:
    """Return what a frozen teacher's answers follow from, besides id and view: networks, pixels and shards.

    None stands for what is not known: the network, where the recipe names a cache alone; the weights of a file that is
    gone, or ``published`` ones, unless they are to be looked at.
    """
    classes = run.manifest.num_classes
    found = [_network_facts(network, classes, device, published) for network in frozen_networks(run, config)]
    members = {"members": {str(index): facts for index, facts in enumerate(found)}}
    mixture = {"combine": config.combine, "temperature": config.temperature, **members}
    facts = {
        "teacher": (mixture if config.members else {"network": found[0]}) if found else None,
        "data": transform_fingerprint(run.recipe.data, run.manifest, device),
        "shards": run.manifest.sha256,
    }
    return json.loads(json.dumps(facts))


def _network_facts(network: FrozenNetwork, classes: int, device: torch.device, published: bool) -> dict[str, Any]:
    (named, config, _, weights, expected) = network
    at_hand = Path(weights).is_file() if is_file(weights) else published
    if is_file(weights) and not at_hand and collectives.is_main():
        print(f"note: {named.key}.weights: {weights} is not there; that the cache is of these weights is not checked")
    return {
        **({"compile": True} if config.compile else {}),
        "model": named.model,
        "stages": dict(named.stages),
        "weights": weights_sha256(weights, named.model, classes, config.weights_key) if at_hand else None,
        "published": None if is_file(weights) else weights,
        "dtype": str(config.torch_dtype(device)).removeprefix("torch."),
        "fold": config.fold,
        "mean": expected.mean,
        "std": expected.std,
    }


def check_sizes(cache: Cache, manifest: Manifest) -> None:
    """Raise RecipeError where the rows cannot be those of the shards, whatever the user accepts."""
    ids, logits = manifest.splits["train"].id_count, cache.header.kinds.get(LOGITS)
    if cache.header.id_count != ids:
        raise RecipeError(f"{cache.folder} has rows for {cache.header.id_count:,} ids, and the shards have {ids:,}")
    if logits and logits.shape != (manifest.num_classes,):
        raise RecipeError(f"{cache.folder} has {logits.shape[0]} logits, and the shards {manifest.num_classes} classes")


def check_provenance(cache: Cache, facts: dict[str, Any], accept: Iterable[str] = ()) -> None:
    """Raise RecipeError if the cache is of other answers than those that follow from ``facts``, but in ``accept``."""
    theirs = cache.header.binding.model_dump()
    differing = [key for key in differing_keys(theirs, _known(facts, theirs)) if key not in accept]
    if differing:
        told = ", ".join(f"{key}{_values(theirs, facts, key)}" for key in differing)
        raise RecipeError(
            f"{cache.folder} is of another {told}; write another cache for this, or, if you know that the answers are "
            f"the same, teacher.accept=[{', '.join(differing)}]"
        )


def _known(facts: Any, theirs: Any) -> Any:
    """Return ``facts`` with what the cache says wherever they do not know."""
    if isinstance(facts, dict) and isinstance(theirs, dict):
        return {key: _known(value, theirs.get(key)) for key, value in facts.items()}
    return theirs if facts is None else facts


def _values(theirs: Any, facts: Any, key: str) -> str:
    """Return what both say at a key, unless that is a whole section."""
    for part in key.split("."):
        theirs, facts = (tree.get(part) if isinstance(tree, dict) else None for tree in (theirs, facts))
    return "" if isinstance(theirs, dict) or isinstance(facts, dict) else f" ({theirs}, here {facts})"
