"""Builds the student of a recipe and loads its initial weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from pipeline.builders.model_spec import ModelSpec
from pipeline.config.recipe import Recipe, StudentConfig
from pipeline.distributed import collectives
from pipeline.distributed.launcher import Launch
from pipeline.errors import error_context
from pipeline.features.patterns import rate_multipliers
from pipeline.features.taps import FeatureTaps
from pipeline.models import create_model
from pipeline.models.fitting import fit_state
from pipeline.models.published import published_normalization
from pipeline.models.segmentation import backbone_network
from pipeline.models.weights import head_tensors, load_weights, meta_model, modules_by_name
from pipeline.models.weights_file import is_file
from pipeline.optim.optimizer import check_optimizer
from pipeline.runs.card import Card
from pipeline.runs.dependencies import finished
from pipeline.runs.files import STUDENT, check_student
from pipeline.runs.identity import Run
from pipeline.tasks._registry import find_task


def student_spec(config: StudentConfig, taps: frozenset[str]) -> ModelSpec:
    """Return the specification of the student with those taps."""
    stages, arguments = frozenset((config.stages or {}).items()), json.dumps(config.arguments or {}, sort_keys=True)
    spec = ModelSpec("student", config.model, stages, taps, arguments, config.freeze, synced=config.sync_batchnorm)
    return spec._replace(trained=config.train)


def build_student(
    spec: ModelSpec, num_classes: int, seed: int, layout: torch.memory_format = torch.contiguous_format
) -> FeatureTaps:
    """Return the student, initialised from the seed, with weights in the memory format ``layout``."""
    torch.manual_seed(seed)
    return spec.build(num_classes).to(memory_format=layout)  # type: ignore[call-overload]


def student_from_card(weights: Path, card: Card) -> nn.Module:
    """Return the network of a weights file by its card, in eval mode on the CPU.

    Raises RecipeError if the network cannot be built here, such as one of the user's own whose module is not there.
    """
    with error_context(f"{weights}: card: model"):
        model = create_model(card.model, len(card.classes), card.arguments)
    load_weights(model, str(weights), card.model, arguments=card.arguments)
    return model.eval()


def weights_layout(recipe: Recipe, launch: Launch) -> torch.memory_format:
    """Return the memory format of the student's weights.

    It is that of the images. Under ZeRO it is contiguous, because ZeRO flattens the weights.
    """
    # With another format than the images', DDP would copy every gradient into its buckets.
    channels_last = recipe.data.channels_last and not launch.use_deepspeed
    return torch.channels_last if channels_last else torch.contiguous_format


def load_start(run: Run, student: FeatureTaps) -> None:
    """Load the initial weights of the run's student, if ``student.start`` names some.

    They are those of a file, published weights, or the last weights of a finished run.
    """
    config, data = run.recipe.student, run.recipe.data
    start, model, arguments = config.start, config.model, config.arguments
    if start is None:
        return
    weights = start.weights or str(finished(run.start).folder / STUDENT)
    network = backbone_network(model) if start.part == "backbone" else model
    expected = None if is_file(weights) else published_normalization(network, weights)
    if expected is not None and expected != (data.mean, data.std):
        overrides = " ".join(f"data.{key}=[{','.join(map(str, getattr(expected, key)))}]" for key in ("mean", "std"))
        print_note("student.start", f"{weights} of {network} was trained with another mean and std; set {overrides}")
    with error_context("student.start"):
        check_student(Path(weights))
        classes, new = run.manifest.num_classes, start.head == "new"
        head = head_tensors(model, classes, arguments) if new else frozenset[str]()
        options = {"arguments": arguments, "left_out": head, "part": start.parts or start.part}
        note = load_weights(student.model, weights, model, start.weights_key, **options)
    print_note("student.start", note)


def check_parts(model: nn.Module, config: StudentConfig, source: StudentConfig, num_classes: int) -> None:
    """Raise RecipeError if the student cannot take the parts that ``start`` names from the ``source`` run's student.

    Only names and shapes are compared, so both networks may be on the meta device.
    """
    if config.start and config.start.parts:
        with error_context("student.start"):
            other = meta_model(source.model, num_classes, source.arguments).state_dict()
            parts = modules_by_name(model, config.start.parts)
            named = f"these parts of {config.model}"
            fit_state(other, parts, str(config.start.recipe), named, part=True, prefixed=False)


def check_optimizer_section(recipe: Recipe, model: nn.Module) -> None:
    """Raise RecipeError if the recipe's optimizer cannot be made for the parameters of the student's network."""
    with error_context("optimizer"):
        check_optimizer(recipe.optimizer)
    with error_context("optimizer.rates"):
        rate_multipliers(model, recipe.optimizer.rates)


def note_untrained_head(recipe: Recipe, student: FeatureTaps) -> None:
    """Print a note if the student of masks has an auxiliary head that no loss reads: it is saved as it began."""
    if find_task(recipe.task).of_pixels and "aux" in student.stages and "aux" not in recipe.taps.student:
        advice = "set losses.segmentation.aux_weight, or leave the head out by student.arguments={aux: false}"
        print_note("student", f"no loss trains its auxiliary head, which is saved as it began; {advice}")


def print_note(key: str, note: str) -> None:
    """Print a note on a key of the recipe, on the main rank only; nothing for an empty ``note``."""
    if note and collectives.is_main():
        print(f"note: {key}: {note}", flush=True)
