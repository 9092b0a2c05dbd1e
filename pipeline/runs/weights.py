"""Properties of a recipe that follow from its weights: their digest, and the normalisation that they expect."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.config.compose import read_yaml
from pipeline.config.recipe import Recipe
from pipeline.errors import error_context
from pipeline.models.published import published_normalization
from pipeline.models.weights import weights_sha256
from pipeline.models.weights_file import is_file
from pipeline.runs.files import RECIPE, read_identity
from pipeline.teachers.config import Config, TeacherNetwork

CONTENT = "sha256:"
"""Prefix of the digest of a file's tensors in an identity."""


def with_normalization(recipe: Recipe, sources: Sequence[Recipe]) -> Recipe:
    """Return the recipe with the ``mean`` and ``std`` that a teacher's published weights expect.

    ``sources`` are the recipes of ``teacher.runs``, in that order. Values that the recipe sets are kept, and nothing
    is set if the weights expect the normalisation of the data.
    """
    config = recipe.teacher
    if config is None:
        return recipe
    networks = [_normalized(network, source or recipe) for network, source in _networks(config, sources)]
    update = {"members": tuple(networks)} if config.members else dict(networks[0]) if networks else {}
    return recipe.model_copy(update={"teacher": config.model_copy(update=update)})


def _normalized(network: TeacherNetwork, origin: Recipe) -> TeacherNetwork:
    model = network.model or origin.student.model
    if not network.weights or is_file(network.weights):
        return network
    expected = published_normalization(model, network.weights)
    if expected is None or expected == (origin.data.mean, origin.data.std):
        return network
    return network.model_copy(update={key: getattr(network, key) or getattr(expected, key) for key in ("mean", "std")})


def _networks(config: Config, sources: Sequence[Recipe]) -> Iterator[tuple[TeacherNetwork, Recipe | None]]:
    """Yield each network of the teacher with the recipe that trains it, None if it is not another recipe's student."""
    remaining = iter(sources)
    for network in config.members or (config,):
        yield network, None if network.recipe is None else next(remaining)


def removed_head(network: TeacherNetwork, source: Recipe | None) -> dict[str, str] | None:
    """Return the recipe's stages of a network without a head, for ``weights_sha256``; None if it has its head."""
    return None if network.head is None else network.stages or (source and source.student.stages) or {}


def name_by_content(
    tree: dict[str, Any], recipe: Recipe, sources: Sequence[Recipe], folder: Path, classes: int
) -> None:
    """Replace each file of weights in an identity by the digest of its tensors.

    Published weights keep their name. If a file is gone, the digest is that of the run in ``folder``. Old runs, whose
    identity has the paths of files, are still compared by path.
    """
    begun = read_identity(folder)
    kept = _weights_keys(begun.values()) if begun else {}
    networks = [*_networks(recipe.teacher, sources)] if recipe.teacher else []
    named = [
        recipe.student,
        *(network if network.model or not source else source.student for network, source in networks),
    ]
    headless = [None, *(removed_head(network, source) for network, source in networks)]
    for (key, section), network, removed in zip(_weights_keys(tree).items(), named, headless, strict=True):
        model, arguments = network.model, network.arguments
        weights, known = section.get("weights"), kept.get(key, {}).get("weights")
        # Published weights keep their name, and an old run its path.
        if not (weights and model and is_file(weights)) or (known and not known.startswith(CONTENT)):
            continue
        if Path(weights).is_file():
            with error_context(key):
                options = {"new_head": section.get("head") == "new", "headless": removed}
                options |= {"part": tuple(section.get("parts") or ()) or section.get("part", "all")}
                key_in_file = section["weights_key"]
                found = weights_sha256(weights, model, classes, key_in_file, arguments=arguments, **options)
            # The digest is that of the weights which the key selects, so the key has no more meaning.
            section |= {"weights": CONTENT + found, "weights_key": None}
        elif known and weights == _weights_keys(read_yaml(folder / RECIPE) or {}).get(key, {}).get("weights"):
            section |= {"weights": known, "weights_key": None}


def name_extractors(tree: dict[str, Any], recipe: Recipe, folder: Path) -> None:
    """Replace the files of the networks that losses compare images by in an identity by the digests of their tensors.

    Published weights keep their name. If a file is gone, the digest is that of the run in ``folder``.
    """
    begun = read_identity(folder)
    for name, spec in recipe.losses.items():
        for key, network in spec.extractors.items():
            weights, known = network.weights, ((begun and begun.losses.get(name)) or {}).get(key) or {}
            if not is_file(weights):
                continue
            if Path(weights).is_file():
                with error_context(f"losses.{name}.{key}.weights"):
                    options = {"arguments": network.arguments, "headless": network.paths}
                    digest = CONTENT + weights_sha256(weights, network.model, 1, network.weights_key, **options)
            else:
                digest = known.get("weights", weights)
            tree["losses"][name][key] |= {"weights": digest, "weights_key": None}


def _weights_keys(tree: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the sections of a recipe that may name weights, by the key of the weights: start, then teachers."""
    teacher = tree.get("teacher") or {}
    found = {"student.start.weights": (tree.get("student") or {}).get("start") or {}}
    if teacher.get("members"):
        return found | {f"teacher.members.{index}.weights": member for index, member in enumerate(teacher["members"])}
    return found | ({"teacher.weights": teacher} if teacher else {})


def known_by_path(identity: dict[str, Any]) -> list[str]:
    """Return the files of weights that an identity names by their paths."""
    named = [section.get("weights") for section in _weights_keys(identity).values()]
    return [weights for weights in named if weights and not weights.startswith(CONTENT) and is_file(weights)]
