"""Builds the teacher of a recipe: a network, an ensemble, the student itself at another time, or a cache of outputs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.builders.model_spec import ModelSpec
from pipeline.builders.peers import trained_specs
from pipeline.builders.student import print_note
from pipeline.config.recipe import Recipe
from pipeline.data.loader import transform_fingerprint
from pipeline.distributed import collectives
from pipeline.errors import RecipeError, display_path, error_context
from pipeline.features.taps import FeatureTaps
from pipeline.models.weights import load_weights, weights_sha256
from pipeline.models.weights_file import is_file
from pipeline.precision import AUTOCAST
from pipeline.runs.dependencies import finished
from pipeline.runs.files import IDENTITY, STUDENT, check_student, route_file
from pipeline.runs.identity import Run, check_route, differing_keys
from pipeline.runs.weights import known_by_path
from pipeline.teachers.average import EMATeacher
from pipeline.teachers.cache import LOGITS, Cache
from pipeline.teachers.cached import AnyTeacher, CachedTeacher
from pipeline.teachers.config import Config, Route, TeacherNetwork
from pipeline.teachers.ensemble import TeacherEnsemble
from pipeline.teachers.follower import StudentFollower
from pipeline.teachers.frozen import Normalization, Teacher
from pipeline.teachers.peers import AveragedPeers
from pipeline.teachers.route import RouteTeacher
from pipeline.teachers.snapshots import SnapshotTeacher
from shards.manifest import Manifest


def build_teacher(run: Run, device: torch.device, taps: frozenset[str] = frozenset()) -> AnyTeacher | None:
    """Return the teacher, or None for a recipe without one.

    A live teacher has the taps that the run's losses read, and ``taps`` besides. Raises RecipeError if weights do not
    fit the network or the classes of the shards, or if a cache does not fit them.
    """
    recipe, config = run.recipe, run.recipe.teacher
    if config is None or not recipe.runs_teacher:
        return None
    if (run.folder / IDENTITY).is_file():
        for weights in known_by_path(run.identity):
            text = f"{run.folder} records only the path of {weights}, no digest; it is not checked for changes"
            print_note("weights", text)
    if config.cache is not None:
        with error_context("teacher.cache"):
            return _build_cached(run, config, Cache(Path(config.cache)), device)
    if config.follows_student:
        specs = teacher_specs(recipe, ())
        followers = [_build_follower(run, config, spec, device) for spec in specs]
        return AveragedPeers(followers, recipe.student.export) if recipe.student.peers else followers[0]
    if config.route is not None:
        return _build_route(run, config, config.route, device)
    return build_live_teacher(run, config, recipe.taps.teacher | taps, device)


def _build_follower(run: Run, config: Config, spec: ModelSpec, device: torch.device) -> StudentFollower:
    """Return a teacher of a student's own network, which follows it from ``follow`` on."""
    recipe = run.recipe
    auto = "fp32" if recipe.precision == "fp32" else "bf16"
    autocast = AUTOCAST[auto if config.dtype == "auto" else config.dtype]
    network, batch = spec.build(run.manifest.num_classes), config.batch or 1
    if config.snapshots is not None:
        epochs = recipe.epochs // config.snapshots.cycles
        return SnapshotTeacher(network, epochs, batch=batch, device=device, autocast=autocast)
    assert config.average is not None
    return EMATeacher(network, config.average, batch=batch, device=device, autocast=autocast)


def _build_route(run: Run, config: Config, route: Route, device: torch.device) -> RouteTeacher:
    """Return the teacher of a route. Raises RecipeError if the teacher's run kept no weights of one of its epochs."""
    (network,) = frozen_networks(run, config)
    source = finished(network.run)
    anchors = []
    for epoch in route.epochs:
        weights = source.folder / route_file(epoch)
        if not weights.is_file():
            raise RecipeError(
                f"teacher.route: {source.folder} kept no weights of epoch {epoch}; set checkpoints.export_epochs in "
                f"{display_path(source.path)}, move the folder away, and the run is trained again"
            )
        anchors.append(
            _build_frozen(run, config, network._replace(weights=str(weights)), run.recipe.taps.teacher, device)
        )
    return RouteTeacher(anchors, route.each)


def build_live_teacher(
    run: Run, config: Config, taps: Iterable[str], device: torch.device
) -> Teacher | TeacherEnsemble:
    """Return the frozen network or ensemble with those taps, even if the recipe has a cache of its outputs."""
    first, *others = frozen_networks(run, config)
    teachers = [_build_frozen(run, config, first, frozenset(taps), device)]
    teachers += [_build_frozen(run, config, network, frozenset(), device) for network in others]
    if config.combine is None or config.temperature is None:
        return teachers[0]
    return TeacherEnsemble(teachers, combine=config.combine, temperature=config.temperature)


def teacher_networks(config: Config | None) -> dict[str, TeacherNetwork]:
    """Return the configuration of each of the teacher's networks, by recipe key."""
    if config is None or not config.has_model:
        return {}
    if config.members is None:
        return {"teacher": config}
    return {f"teacher.members.{index}": member for index, member in enumerate(config.members)}


def teacher_specs(recipe: Recipe, sources: Sequence[Recipe]) -> list[ModelSpec]:
    """Return the specifications of the teacher's networks. One that follows the student or its peers is their network.

    The first has the taps that the losses read. ``sources`` are the recipes of ``teacher.runs``, in that order.
    """
    if recipe.teacher and recipe.teacher.follows_student:
        specs = trained_specs(recipe.student, recipe.taps.teacher)
        return [spec._replace(key="teacher", frozen=(), trained=()) for spec in specs]
    check_route(recipe.teacher, sources)
    remaining, found = iter(sources), []
    for key, network in teacher_networks(recipe.teacher).items():
        source = next(remaining).student if network.recipe is not None else network
        model = source.model or recipe.student.model
        stages = network.stages or (source if source.model else recipe.student).stages or {}
        taps = frozenset[str]() if found else recipe.taps.teacher
        arguments = json.dumps((source if source.model else recipe.student).arguments or {}, sort_keys=True)
        spec = ModelSpec(key, model, frozenset(stages.items()), taps, arguments)
        found.append(spec._replace(size=network.size, headless=network.head is not None))
    return found


class FrozenNetwork(NamedTuple):
    """One of a teacher's networks, with its configuration and the source of its weights."""

    spec: ModelSpec
    config: TeacherNetwork
    run: Run | None
    """The run whose student it is; None for a network that is not from a run."""
    weights: str
    """A file, or the name of published weights. By default, the last weights of the run."""
    expected: Normalization
    """The normalisation of the images that it was trained with."""


def frozen_networks(run: Run, config: Config) -> list[FrozenNetwork]:
    """Return the teacher's networks; none for a recipe with only a cache."""
    remaining, found = iter(run.teachers), []
    specs = teacher_specs(run.recipe, [source.recipe for source in run.teachers])
    for spec, network in zip(specs, teacher_networks(config).values(), strict=True):
        source = next(remaining) if network.recipe is not None else None
        weights = network.weights or (str(source.folder / STUDENT) if source else "")
        data = (source or run).recipe.data
        expected = Normalization(network.mean or data.mean, network.std or data.std)
        found.append(FrozenNetwork(spec, network, source, weights, expected))
    return found


def trained_network(run: Run, network: FrozenNetwork, taps: frozenset[str] = frozenset()) -> tuple[FeatureTaps, str]:
    """Return a teacher's network with its weights and those taps, and a line about the weights, or "".

    Raises RecipeError if it does not fit the task, the images or the weights.
    """
    if network.run is not None:
        finished(network.run)
    spec = network.spec._replace(taps=taps)
    built = spec.build(run.manifest.num_classes)
    spec.check_task(built, run.recipe.task)
    # Folding runs the network on images of this size, too, but its error would not name the key of the recipe.
    spec.check_logits(spec.probe(built, run.recipe.data.size), run.recipe.task, run.recipe.data.target_size)
    with error_context(f"{spec.key}.weights"):
        check_student(Path(network.weights))
        key = network.config.weights_key
        return built, load_weights(built.model, network.weights, spec.model, key, arguments=spec.arguments)


def _build_frozen(
    run: Run, config: Config, network: FrozenNetwork, taps: frozenset[str], device: torch.device
) -> Teacher:
    """Return the frozen network with its weights and those taps."""
    data = run.recipe.data
    spec = network.spec._replace(taps=taps)
    built, note = trained_network(run, network, taps)
    print_note(f"{spec.key}.weights", note)
    given = Normalization(data.mean, data.std)
    if not is_file(network.weights) and network.expected != given:
        normalization = f"mean {list(network.expected.mean)} and std {list(network.expected.std)}"
        print_note(spec.key, f"its images are renormalised to {normalization} for {network.weights} of {spec.model}")
    teacher = Teacher(
        built,
        batch=config.batch or 1,
        image_size=spec.size or data.size,
        resize=spec.size,
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


def _build_cached(run: Run, config: Config, cache: Cache, device: torch.device) -> CachedTeacher:
    """Return the cached teacher. With ``teacher.fallback: live``, the network computes the missing outputs."""
    recipe = run.recipe
    check_provenance(cache, provenance(run, config, device), config.accept)
    check_sizes(cache, run.manifest)
    check_head(recipe, cache)
    missing = cache.missing(recipe.taps.teacher)
    if missing and config.fallback is None:
        tap, kind = next(iter(missing.items()))
        loss = next(name for name, spec in recipe.losses.items() if tap in cache.kinds(spec.config.taps().teacher))
        raise RecipeError(
            f"{cache.folder} has no {kind}, which the loss {loss!r} reads as {tap!r}; add it with cache_teacher.py "
            "RECIPE, or let the network compute it: teacher.fallback=live"
        )
    live = build_live_teacher(run, config, missing, device) if missing else None
    taps, head = cache.kinds(recipe.taps.teacher), _cached_head(run, config, device, live)
    return CachedTeacher(cache, taps, views=views_read(recipe, cache), device=device, live=live, head_KD=head)


def _cached_head(
    run: Run, config: Config, device: torch.device, live: Teacher | TeacherEnsemble | None
) -> Tensor | None:
    """Return the weights of the last layer of a network whose outputs are cached, if a loss reads them."""
    if not config.has_one_head or not any(spec.config.reads_head_weights() for spec in run.recipe.losses.values()):
        return None
    return (live or build_live_teacher(run, config, (), device)).head_KD


def check_head(recipe: Recipe, cache: Cache) -> None:
    """Raise RecipeError if a loss reads logits, and the cache is that of a teacher without a head."""
    readers = [name for name, spec in recipe.losses.items() if spec.reads_teachers_head]
    if readers and LOGITS not in cache.header.kinds:
        raise RecipeError(
            f"{cache.folder} is of a teacher without a head, and the loss {readers[0]!r} reads what a head computes; "
            "remove the loss, or write another cache"
        )


def views_read(recipe: Recipe, cache: Cache) -> int:
    """Return the number of the cache's views that the run reads: at most ``data.repeat`` per epoch."""
    return min(recipe.data.views or cache.header.views, recipe.epochs * recipe.data.repeat)


def provenance(run: Run, config: Config, device: torch.device, *, published: bool = False) -> dict[str, Any]:
    """Return the facts that determine a frozen teacher's outputs, besides id and view: networks, images and shards.

    The network of a recipe with only a cache is None.
    """
    facts = {
        "teacher": teacher_facts(run, config, device, published=published),
        "data": transform_fingerprint(run.recipe.data, run.manifest, device),
        "shards": run.manifest.sha256,
    }
    return json.loads(json.dumps(facts))  # tuples become lists, as in the header that they are compared with


def teacher_facts(run: Run, config: Config, device: torch.device, *, published: bool = False) -> dict[str, Any] | None:
    """Return the facts about a frozen teacher's networks for ``provenance``; None without a network.

    The digest of a missing weights file is None. Published weights are hashed only if ``published`` is true.
    """
    classes = run.manifest.num_classes
    found = [_network_facts(network, classes, device, published) for network in frozen_networks(run, config)]
    members = {"members": {str(index): facts for index, facts in enumerate(found)}}
    mixture = {"combine": config.combine, "temperature": config.temperature, **members}
    facts = (mixture if config.members else {"network": found[0]}) if found else None
    return json.loads(json.dumps(facts))


def _network_facts(network: FrozenNetwork, classes: int, device: torch.device, published: bool) -> dict[str, Any]:
    """Return the facts about one network for ``provenance``."""
    (spec, config, _, weights, expected) = network
    readable, key = Path(weights).is_file() if is_file(weights) else published, config.weights_key
    built = {"arguments": spec.arguments, "headless": dict(spec.stages) if spec.headless else None}
    sha256 = weights_sha256(weights, spec.model, classes, key, **built) if readable else None
    if is_file(weights) and not readable and collectives.is_main():
        print(f"note: {spec.key}.weights: {weights} is missing, so the cache is not checked against these weights")
    return {
        # Only if set, so that caches written before these options existed still match.
        **({"compile": True} if config.compile else {}),
        **({"size": config.size} if config.size else {}),
        **({"head": config.head} if config.head else {}),
        **({"arguments": spec.arguments} if spec.arguments else {}),
        "model": spec.model,
        "stages": dict(spec.stages),
        "weights": sha256,
        "published": None if is_file(weights) else weights,
        "dtype": str(config.torch_dtype(device)).removeprefix("torch."),
        "fold": config.fold,
        "mean": expected.mean,
        "std": expected.std,
    }


def check_sizes(cache: Cache, manifest: Manifest) -> None:
    """Raise RecipeError if the cache's ids or classes differ from the shards'; ``accept`` has no effect here."""
    ids, logits = manifest.splits["train"].id_count, cache.header.kinds.get(LOGITS)
    if cache.header.id_count != ids:
        raise RecipeError(f"{cache.folder} has rows for {cache.header.id_count:,} ids, but the shards have {ids:,}")
    if logits and (classes := _classes_of(logits.shape)) != manifest.num_classes:
        raise RecipeError(f"{cache.folder} has {classes} logits, but the shards have {manifest.num_classes} classes")


def _classes_of(logits: tuple[int, ...]) -> int:
    """Return the number of classes of logits [K], of those of pixels [K, H, W], or of those of anchors [A, K]."""
    return logits[1] if len(logits) == 2 else logits[0]


def check_provenance(
    cache: Cache, facts: dict[str, Any], accept: Iterable[str] = (), advice: str | None = None
) -> None:
    """Raise RecipeError if the cache was written with other facts than ``facts``. Keys in ``accept`` may differ.

    ``advice`` says what to do, by default for a cache of the training images.
    """
    cached = cache.header.binding.model_dump()
    differing = [key for key in differing_keys(cached, _fill_unknown(facts, cached)) if key not in accept]
    if differing:
        values = ", ".join(f"{key}{_values(cached, facts, key)}" for key in differing)
        accepting = f"if you know that the outputs are the same, set teacher.accept=[{', '.join(differing)}]"
        advice = advice or f"write a new cache, or, {accepting}"
        raise RecipeError(f"{cache.folder} was written with different settings: {values}; {advice}")


def _fill_unknown(facts: Any, cached: Any) -> Any:
    """Return ``facts`` with every None replaced by the value in the cache."""
    if isinstance(facts, dict) and isinstance(cached, dict):
        return {key: _fill_unknown(value, cached.get(key)) for key, value in facts.items()}
    return cached if facts is None else facts


def _values(cached: Any, facts: Any, key: str) -> str:
    """Return both values of a key as text, or an empty text if one of them is a section."""
    for part in key.split("."):
        cached, facts = (tree.get(part) if isinstance(tree, dict) else None for tree in (cached, facts))
    return "" if isinstance(cached, dict) or isinstance(facts, dict) else f" ({cached}, here {facts})"
