"""From a recipe to its teacher: a network, several, the student's average, or the cache of a network's answers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from pipeline.builders.student import AUTOCAST, Named, finished
from pipeline.config.recipe import Recipe
from pipeline.data.loader import pixels
from pipeline.distributed import collectives
from pipeline.errors import RecipeError, about
from pipeline.models.weights import is_file, load_weights, weights_sha256
from pipeline.runs.files import STUDENT
from pipeline.runs.identity import differences, find_run, load_dependency
from pipeline.teachers.average import EMATeacher
from pipeline.teachers.cache import LOGITS, Cache
from pipeline.teachers.cached import AnyTeacher, CachedTeacher
from pipeline.teachers.config import Network
from pipeline.teachers.ensemble import TeacherEnsemble
from pipeline.teachers.frozen import Normalization, Teacher
from shards.manifest import Manifest, manifest_sha256


def build_teacher(recipe: Recipe, manifest: Manifest, device: torch.device) -> AnyTeacher | None:
    """Return the teacher, or None for a recipe without one.

    Raises RecipeError where its weights do not fit the network or the shards' classes, or a cache does not fit either.
    """
    config = recipe.teacher
    if config is None:
        return None
    if config.cache is not None:
        with about("teacher.cache"):
            return _cached(recipe, Cache(Path(config.cache)), manifest, device)
    if config.average is not None:
        taps = teacher_named(recipe, "teacher").build(manifest.num_classes)
        auto = "fp32" if recipe.precision == "fp32" else "bf16"
        autocast = AUTOCAST[auto if config.dtype == "auto" else config.dtype]
        return EMATeacher(taps, config.average, batch=config.batch or 1, device=device, autocast=autocast)
    return build_live_teacher(recipe, recipe.taps.teacher, manifest, device)


def build_live_teacher(
    recipe: Recipe, taps: Iterable[str], manifest: Manifest, device: torch.device
) -> Teacher | TeacherEnsemble:
    """Return the frozen network, or networks, with those taps, whether there is a cache of their answers or not."""
    config = recipe.teacher
    assert config is not None
    first, *others = teacher_places(recipe)
    teachers = [_frozen(recipe, first, frozenset(taps), manifest, device)]
    teachers += [_frozen(recipe, place, frozenset(), manifest, device) for place in others]
    if config.members is None:
        return teachers[0]
    assert config.combine is not None
    assert config.temperature is not None
    return TeacherEnsemble(teachers, combine=config.combine, temperature=config.temperature)


def teacher_places(recipe: Recipe) -> dict[str, Network]:
    """Return what the recipe says of each of the teacher's networks, by the key where it says it."""
    config = recipe.teacher
    if config is None or not config.is_named:
        return {}
    if config.members is None:
        return {"teacher": config}
    return {f"teacher.members.{index}": member for index, member in enumerate(config.members)}


def teacher_named(recipe: Recipe, place: str) -> Named:
    """Return one of the teacher's networks as the recipe, or the one that it stands on, names it.

    The first of ``teacher_places`` has the taps that the losses read. A moving average is the student's network.
    """
    places = teacher_places(recipe)
    network = source = places[place]
    if network.recipe is not None:
        source = load_dependency(recipe, network.recipe).recipe.student
    elif network.model is None:
        source = recipe.student
    assert source.model is not None
    own = network.stages or source.stages or {}
    wanted = recipe.taps.teacher if place == next(iter(places)) else frozenset[str]()
    return Named(place, source.model, frozenset(own.items()), wanted)


def _frozen(recipe: Recipe, place: str, taps: frozenset[str], manifest: Manifest, device: torch.device) -> Teacher:
    """Return the network of ``teacher_places`` with its weights and those taps, frozen."""
    assert recipe.teacher is not None
    network = teacher_places(recipe)[place]
    if network.recipe is not None:
        finished(recipe, network.recipe)
    named = teacher_named(recipe, place)._replace(taps=taps)
    built = named.build(manifest.num_classes)
    named.probe(built, recipe.data.size)  # folding would run it on the same images, and not say what it cannot take
    with about(f"{place}.weights"):
        load_weights(built.model, _weights(recipe, network), named.model)
    teacher = Teacher(
        built,
        batch=recipe.teacher.batch or 1,
        image_size=recipe.data.size,
        dtype=network.torch_dtype(device),
        device=device,
        given=Normalization(recipe.data.mean, recipe.data.std),
        expected=_normalization(recipe, network),
        fold=network.fold,
    )
    if network.compile:
        teacher.taps.compile(dynamic=False)
    return teacher


def _weights(recipe: Recipe, network: Network) -> str:
    """Return a network's weights: a file or a published name; those of a recipe are its run's last unless it says."""
    if network.weights is not None:
        return network.weights
    assert network.recipe is not None
    return str(find_run(load_dependency(recipe, network.recipe)).folder / STUDENT)


def _normalization(recipe: Recipe, network: Network) -> Normalization:
    """Return what a network's images were normalised with when it was trained."""
    source = recipe if network.recipe is None else load_dependency(recipe, network.recipe).recipe
    return Normalization(network.mean or source.data.mean, network.std or source.data.std)


# -- from a cache -----------------------------------------------------------------------------------------------------


def _cached(recipe: Recipe, cache: Cache, manifest: Manifest, device: torch.device) -> CachedTeacher:
    """Return the teacher that answers from the cache, and asks the network for what it lacks if the recipe says so."""
    config = recipe.teacher
    assert config is not None
    refuse_others(cache, binding(recipe, manifest, device), config.accept)
    _check_sizes(cache, manifest)
    lacking = cache.lacking(recipe.taps.teacher)
    if lacking and config.fallback is None:
        tap, kind = next(iter(lacking.items()))
        loss = next(name for name, spec in recipe.losses.items() if tap in cache.kinds(spec.config.taps().teacher))
        raise RecipeError(
            f"{cache.folder} has no {kind}, which the loss {loss!r} reads as {tap!r}; let cache_teacher.py write "
            "it for this recipe, too, or ask the network: teacher.fallback=live"
        )
    live = build_live_teacher(recipe, lacking, manifest, device) if lacking else None
    taps = cache.kinds(recipe.taps.teacher)
    return CachedTeacher(cache, taps, views=views_read(recipe, cache), device=device, live=live)


def views_read(recipe: Recipe, cache: Cache) -> int:
    """Return how many of the cache's views the run reads: fewer epochs need no more of them."""
    return min(recipe.data.views or cache.header.views, recipe.epochs)


def binding(recipe: Recipe, manifest: Manifest, device: torch.device, *, published: bool = False) -> dict[str, Any]:
    """Return what a frozen teacher's answers follow from, besides id and view: networks, pixels and shards.

    None stands for what is not known: the network, where the recipe names a cache alone; the weights of a file that is
    gone, or ``published`` ones, unless they are to be looked at.
    """
    config = recipe.teacher
    assert config is not None
    found = [_network_facts(recipe, place, device, published) for place in teacher_places(recipe)]
    members = {"members": {str(index): facts for index, facts in enumerate(found)}}
    mixture = {"combine": config.combine, "temperature": config.temperature, **members}
    facts = {
        "teacher": (mixture if config.members else {"network": found[0]}) if found else None,
        "data": pixels(recipe.data, manifest, device),
        "shards": manifest_sha256(Path(recipe.data.path)),
    }
    return json.loads(json.dumps(facts))


def _network_facts(recipe: Recipe, place: str, device: torch.device, published: bool) -> dict[str, Any]:
    network, named = teacher_places(recipe)[place], teacher_named(recipe, place)
    weights, normalization = _weights(recipe, network), _normalization(recipe, network)
    at_hand = Path(weights).is_file() if is_file(weights) else published
    if is_file(weights) and not at_hand and collectives.is_main():
        print(f"note: {place}.weights: {weights} is not there; that the cache is of these weights is not checked")
    return {
        **({"compile": True} if network.compile else {}),
        "model": named.model,
        "stages": dict(named.stages),
        "weights": weights_sha256(weights, named.model) if at_hand else None,
        "published": None if is_file(weights) else weights,
        "dtype": str(network.torch_dtype(device)).removeprefix("torch."),
        "fold": network.fold,
        "mean": normalization.mean,
        "std": normalization.std,
    }


def _check_sizes(cache: Cache, manifest: Manifest) -> None:
    """Raise RecipeError where the rows cannot be those of the shards, whatever the user accepts."""
    ids, logits = manifest.splits["train"].id_count, cache.header.kinds.get(LOGITS)
    if cache.header.id_count != ids:
        raise RecipeError(f"{cache.folder} has rows for {cache.header.id_count:,} ids, and the shards have {ids:,}")
    if logits and logits.shape != (manifest.num_classes,):
        raise RecipeError(f"{cache.folder} has {logits.shape[0]} logits, and the shards {manifest.num_classes} classes")


def refuse_others(cache: Cache, facts: dict[str, Any], accept: Iterable[str] = ()) -> None:
    """Raise RecipeError if the cache is of other answers than those that follow from ``facts``, but in ``accept``."""
    theirs = cache.header.binding.model_dump()
    differing = [key for key in differences(theirs, _known(facts, theirs)) if key not in accept]
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
