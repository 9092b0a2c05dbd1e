"""Measure a student exactly: every validation image once, over any number of ranks.

    python pipeline/evaluate.py runs/demo/seed-0 [weights=best]      the student of a run: last, best or ema
    python pipeline/evaluate.py RECIPE weights=FILE [key=value …]    a weights file, with a recipe's network and data

It prints the metrics of the recipe's task in percent, such as top-1 and top-5. With them come likelihood (NLL, in
nats), calibration error (ECE), the network's size, and its speed on this machine. All of it, and the figures of each
class, go to evaluation.json in the run folder; with other weights to evaluation_best.json or evaluation_ema.json.

    agreement=yes         the teacher's metrics too, and how often student and teacher agree
    speed=no              without latency and images per second
    out=FILE              write the figures to another file
    data.path=FOLDER      other shards; logits of classes that they do not have are left out
    class_map=FILE        lines 'folder class', where their classes have other names; index: the names are numbers
    real_labels=FILE      the labels of ReaL, which accept several classes of an image
    val_labels=FILE       the classes of the validation images, which real_labels needs with shards of this project

Of masks it also prints the IoU of each class, and draws some images into evaluation_masks.png beside the file. Of boxes
it prints the AP of each class, and draws them into evaluation_boxes.png. Of restored images it prints PSNR and SSIM of
bicubic interpolation, too, and draws them into evaluation_images.png.

docs/evaluation.md explains the figures, and how to measure on ImageNet-V2, -A, -R, -Sketch and ReaL.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from pipeline import nvjpeg
    from pipeline.cli import answer_help
    from pipeline.distributed import signals

    answer_help(__doc__)
    signals.exit_quietly_on_interrupt()
    nvjpeg.load_first()  # before the imports below: torchvision brings an older one

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from pipeline.benchmarks.inference import BATCHES, DENSE_BATCHES, TimedNetwork, measure_speed
from pipeline.builders.loader import build_loader
from pipeline.builders.meta import probe
from pipeline.builders.split_classes import accept_real_labels, split_classes
from pipeline.builders.student import build_student, student_spec, weights_layout
from pipeline.builders.teacher import build_live_teacher, teacher_networks
from pipeline.cli import entry
from pipeline.config.arguments import parse_command_args, parse_recipe_args, split_command_args
from pipeline.config.recipe import LoadedRecipe, Recipe, load_recipe
from pipeline.config.source import CONFIGS
from pipeline.data.loader import Loader
from pipeline.distributed.launcher import Launch, read_launch
from pipeline.errors import RecipeError
from pipeline.features.taps import FeatureTaps
from pipeline.frozen_model import FrozenModel
from pipeline.models.weights import load_weights
from pipeline.runs.dependencies import prepare_shards
from pipeline.runs.evaluation_file import EVALUATIONS, EvaluationFile, PictureFile, write_evaluation
from pipeline.runs.files import RECIPE, read_identity, read_result
from pipeline.runs.folder import NAMED_WEIGHTS, load_run, student_file
from pipeline.runs.identity import classes_sha256, resolve, run_folder
from pipeline.runs.ownership import check_new_file
from pipeline.runs.rank_settings import join_ranks
from pipeline.tasks._base import Task
from pipeline.tasks._registry import find_task
from pipeline.teachers.config import Config as Teacher
from pipeline.training.accelerator import create_accelerator, use_all_cores
from pipeline.training.box_sheet import BoxSamples
from pipeline.training.comparison import Comparison, SplitClasses, compare_networks
from pipeline.training.evaluation import check_validation_size
from pipeline.training.image_sheet import DrawnSheet
from pipeline.training.mask_sheet import MaskSamples
from pipeline.training.restored_sheet import RestoredSamples
from pipeline.training.result import aligned, device_name
from shards.manifest import MANIFEST, Manifest, read_manifest, sha256_of, write_atomically

_TITLES = {"nll": "NLL", "ece": "ECE", "bicubic_psnr": "bicubic PSNR", "bicubic_ssim": "bicubic SSIM"}


class EvaluateArguments(FrozenModel):
    """The options of the command."""

    weights: str = "last"
    agreement: bool = False
    speed: bool = True
    out: str | None = None
    class_map: str | None = None
    real_labels: str | None = None
    val_labels: str | None = None


@dataclass(frozen=True)
class Subject:
    """What is evaluated: weights of a recipe's network, on the validation images of shards."""

    arguments: EvaluateArguments
    launch: Launch
    loaded: LoadedRecipe
    """The recipe, without its losses."""
    weights: Path
    manifest: Manifest
    """That of the shards."""
    network: Manifest
    """That of the shards whose classes are the network's."""

    @property
    def recipe(self) -> Recipe:
        """Return the recipe, without its losses."""
        return self.loaded.recipe

    @property
    def task(self) -> Task:
        """Return the recipe's task."""
        return find_task(self.recipe.task)


def main(args: Sequence[str]) -> None:
    """Evaluate the weights that the command line names."""
    subject = _read_subject(args)
    arguments, recipe, launch = subject.arguments, subject.recipe, subject.launch
    # Without a Run, whose identity has the digests, the manifest and the file must be compared explicitly.
    digests = {"manifest": subject.manifest.sha256, "file": subject.weights}
    join_ranks(launch, "evaluate", recipe, **digests, **arguments.model_dump(exclude={"out", "weights"}))
    use_all_cores(launch)
    accelerator = create_accelerator(recipe, launch)
    loader = build_loader(recipe, subject.manifest, accelerator.device, ("val",))
    classes = _find_classes(subject, loader)
    student = _load_student(subject, accelerator)
    teacher = None
    if arguments.agreement:
        run = resolve(subject.loaded, launch)
        config, taps = _comparison_teacher(run.recipe.teacher), subject.task.taps
        teacher = build_live_teacher(run, config, taps, accelerator.device)
        check_validation_size(teacher, loader)
    samples = _samples(subject, with_teacher=teacher is not None)
    watch = samples and samples.watch
    found = compare_networks(subject.task, student, teacher, loader.validation(), accelerator, classes, watch)
    sheet = samples and samples.draw()
    if not accelerator.is_main_process:
        return
    values = _figures(subject, found, classes) | {"speed": _speed(subject, accelerator)}
    evaluation = EvaluationFile.model_validate(values)
    print("\n".join(_describe(subject, evaluation)))
    if path := Path(arguments.out) if arguments.out else _own_file(subject):
        _write(path, evaluation, sheet)
    else:
        print("not written, because it is no evaluation of a run's own images; give out=FILE")


def _samples(subject: Subject, *, with_teacher: bool) -> MaskSamples | BoxSamples | RestoredSamples | None:
    """Return what draws some images with what networks make of them, None for a task of classes."""
    config, task = subject.recipe.data.for_validation, subject.task
    kind = MaskSamples if task.of_pixels else BoxSamples if task.of_boxes else None
    kind = RestoredSamples if task.of_images else kind
    return kind and kind(config, with_teacher=with_teacher)


def _write(path: Path, evaluation: EvaluationFile, sheet: DrawnSheet | None) -> None:
    """Write the file, and the picture of masks or boxes beside it."""
    if sheet is None:
        write_evaluation(path, evaluation)
        print(f"written to {path}")
        return
    picture = path.with_name(f"{path.stem}_{sheet.kind}.png")
    write_atomically(picture, sheet.png)
    named = PictureFile(file=picture.name, columns=sheet.columns, classes=sheet.classes)
    write_evaluation(path, evaluation.model_copy(update={sheet.kind: named}))
    print(f"written to {path}, with the picture {picture.name}")


def _read_subject(args: Sequence[str]) -> Subject:
    """Return what the command line names. Raises RecipeError where it does not fit together."""
    options, args = split_command_args(args, tuple(EvaluateArguments.model_fields))
    arguments, launch = parse_command_args(options, EvaluateArguments), read_launch()
    target, overrides = parse_recipe_args(args)
    loaded = _load(target, overrides)
    if arguments.out:
        check_new_file(Path(arguments.out), "out")
    own = [override for override in overrides if not override.startswith("data.path=")]
    own_path = Path((loaded if own == overrides else _load(target, own)).recipe.data.path)
    moved = own_path != Path(loaded.recipe.data.path)
    if moved:
        _check_is_prepared(Path(loaded.recipe.data.path))
    prepare_shards(loaded, launch, trusted=not target.is_dir())  # never a script that a run folder names
    if arguments.agreement:
        _comparison_teacher(loaded.recipe.teacher)
    weights = student_file(arguments.weights, target if target.is_dir() else run_folder(loaded))
    manifest = read_manifest(Path(loaded.recipe.data.path))
    trained = [read_manifest(own_path)] if moved and (own_path / MANIFEST).is_file() else []
    network = _network_classes(weights, loaded.recipe.data.path, [manifest, *trained], own_path)
    return Subject(arguments, launch, loaded, weights, manifest, network)


def _load(target: Path, overrides: Sequence[str]) -> LoadedRecipe:
    # Without losses: they are for training, and the file of one's own may be gone.
    return (
        load_run(target, overrides, losses=False) if target.is_dir() else load_recipe(target, overrides, losses=False)
    )


def _check_is_prepared(path: Path) -> None:
    """Raise RecipeError, with the command that makes shards, for a folder of images."""
    if path.is_dir() and not (path / MANIFEST).is_file():
        raise RecipeError(
            f"data.path: {path} is no folder of shards (no {MANIFEST}); make them from class folders: "
            f"python shards/prepare_folder.py {path} DESTINATION --split val"
        )


def _network_classes(weights: Path, path: str, manifests: list[Manifest], own_path: Path) -> Manifest:
    """Return the manifest that has the classes of the network.

    ``manifests`` are that of the shards in ``path``, and that of the recipe's own shards, in ``own_path``, if they are
    others. A run knows its classes by their digest. Without a run they are those of the recipe's own shards.
    """
    begun = read_identity(weights.parent)
    if begun is None:
        return manifests[-1]
    for manifest in manifests:
        if classes_sha256(manifest) == begun.data.classes:
            return manifest
    raise RecipeError(
        f"data.path: the classes of {path} are not those of {weights}, and {own_path} does not have them; "
        f"copy the {MANIFEST} of the run's shards there"
    )


def _find_classes(subject: Subject, loader: Loader) -> SplitClasses:
    """Return the classes of the images, among those of the network."""
    arguments, path = subject.arguments, subject.recipe.data.path
    if arguments.val_labels and not arguments.real_labels:
        raise RecipeError("val_labels: it is the order of the images of real_labels=FILE; give both, or none")
    if arguments.real_labels and not subject.task.one_class:
        kinds = {"a class for every pixel": subject.task.of_pixels, "boxes": subject.task.of_boxes}
        kinds |= {"smaller copies": subject.task.of_images, "several labels already": True}
        have = next(name for name, is_so in kinds.items() if is_so)
        raise RecipeError(f"real_labels: the images of task: {subject.recipe.task} have {have}; remove it")
    classes = split_classes(subject.network, subject.manifest, path, arguments.class_map)
    if arguments.real_labels is None:
        return classes
    if subject.recipe.data.holdout:
        raise RecipeError("real_labels: the images are held-out training images; give data.holdout=null")
    return accept_real_labels(classes, loader.plan.readers["val"], arguments.real_labels, arguments.val_labels)


def _load_student(subject: Subject, accelerator: Accelerator) -> FeatureTaps:
    """Return the student with its weights."""
    recipe, spec = subject.recipe, student_spec(subject.recipe.student, subject.recipe.taps.student)
    layout = weights_layout(recipe, subject.launch)
    student = build_student(spec, subject.network.num_classes, recipe.seed, layout).to(accelerator.device)
    if note := load_weights(student.model, str(subject.weights), recipe.student.model, arguments=spec.arguments):
        accelerator.print(f"note: weights: {note}")
    return student


def _comparison_teacher(config: Teacher | None) -> Teacher:
    """Return the teacher. Raises RecipeError if there is none that can be evaluated."""
    if config is None:
        raise RecipeError("agreement=yes: the recipe has no teacher")
    if config.average is not None:
        raise RecipeError("agreement=yes: the teacher is the student's moving average, which a run does not save")
    if config.moves:
        raise RecipeError(
            f"agreement=yes: the teacher is not one network, but moves with the run (teacher.{config.kind})"
        )
    if config.head is not None:
        raise RecipeError("agreement=yes: the teacher has no head (teacher.head: none), so it predicts no class")
    if config.combine == "confidence":
        raise RecipeError("agreement=yes: combine: confidence uses the labels, so its accuracy means nothing")
    if not config.has_model:
        raise RecipeError("agreement=yes: a cache has no validation images; give teacher.model and teacher.weights")
    return config


def _figures(subject: Subject, found: Comparison, classes: SplitClasses) -> dict[str, Any]:
    """Return the content of ``evaluation.json`` without the speed."""
    recipe, weights = subject.recipe, subject.weights
    result, source = read_result(weights.parent), subject.loaded.source
    named = str(source) if source.path.is_relative_to(CONFIGS) else None  # the project's recipes have a name anywhere
    spec = student_spec(recipe.student, recipe.taps.student)
    network, _ = probe(spec, subject.network.num_classes, recipe.data.for_validation.size)
    cost = {"model": network.name, "parameters": network.parameters, "macs": round(network.macs)}
    teacher = None
    if found.teacher:
        networks = [*teacher_networks(recipe.teacher).values()]
        names = [network.model or str(network.recipe) for network in networks]
        teacher = {"name": ", ".join(names), **found.teacher._asdict()}
    return {
        **found.student._asdict(),
        "weights": weights.name,
        "sha256": sha256_of(weights),
        "recipe": (result and result.recipe) or named,
        "task": recipe.task,
        "shards": subject.manifest.tool,
        "shards_sha256": subject.manifest.sha256,
        "data": Path(recipe.data.path).name,
        "real_labels": subject.arguments.real_labels and Path(subject.arguments.real_labels).name,
        "samples": found.samples,
        "classes": classes.names,
        "teacher": teacher,
        "agreement": found.agreement,
        "kl": found.kl,
        "network": {**cost, "bytes": weights.stat().st_size},
        "device": device_name(),
        "threads": torch.get_num_threads(),
    }


def _speed(subject: Subject, accelerator: Accelerator) -> list[Any] | None:
    """Return the speed of the student in the recipe's precision, None if it is not measured."""
    if not subject.arguments.speed:
        return None
    recipe, spec = subject.recipe, student_spec(subject.recipe.student, frozenset())
    network = TimedNetwork(
        model=spec.model,
        arguments=spec.arguments,
        num_classes=subject.network.num_classes,
        weights=str(subject.weights),
        size=recipe.data.for_validation.size,
        batches=DENSE_BATCHES if subject.task.is_dense else BATCHES,
        device=str(accelerator.device),
        threads=torch.get_num_threads(),
        precision=recipe.precision,
        channels_last=recipe.data.channels_last,
    )
    return measure_speed(network) or None


def _describe(subject: Subject, evaluation: EvaluationFile) -> list[str]:
    """Return the figures as lines of text."""

    def metrics(values: dict[str, float | None], titles: dict[str, str]) -> str:
        known = {title: values.get(key) for key, title in titles.items()}
        return "  ".join(f"{title} {value:.2f}" for title, value in known.items() if value is not None)

    network, teacher, titles = evaluation.network, evaluation.teacher, subject.task.titles
    lines = _describe_classes(evaluation, of_boxes=subject.task.of_boxes)
    lines += [f"{subject.weights}: {metrics(evaluation.metrics, titles)}  ({evaluation.samples:,} images)"]
    lines += [text] if (text := metrics(evaluation.metrics, _TITLES)) else []
    if len(evaluation.classes) < subject.network.num_classes:
        lines += [f"among {len(evaluation.classes):,} of the network's {subject.network.num_classes:,} classes"]
    if teacher:
        kl = "" if evaluation.kl is None else f"  KL {evaluation.kl:.4f}"
        lines += [f"teacher: {metrics(teacher.metrics, titles)}  {metrics(teacher.metrics, _TITLES)}".rstrip()]
        lines += [f"agreement: {_two_digits(evaluation.agreement)}{kl}"]
    size = f"{network.macs / 1e9:.3f} GMAC, {network.bytes / 1e6:.1f} MB"
    lines += [f"network: {network.model}, {network.parameters:,} parameters, {size}"]
    for speed in evaluation.speed or ():
        spread = f"{speed.latency_ms:.2f} ms ({speed.low_ms:.2f} – {speed.high_ms:.2f})"
        lines += [f"batch of {speed.batch}: {spread}, {speed.images_per_second:,.0f} images/s"]
    return lines


def _describe_classes(evaluation: EvaluationFile, *, of_boxes: bool) -> list[str]:
    """Return a table with the IoU or AP of each class; empty for another task than that of masks or boxes."""
    ours, theirs = evaluation.per_class, evaluation.teacher and evaluation.teacher.per_class
    if ours is None or not (of_boxes or ours.iou):
        return []
    total, measure = max(sum(ours.samples), 1), "AP" if of_boxes else "IoU"
    columns = {
        "class": evaluation.classes,
        "% of objects" if of_boxes else "% of pixels": [f"{100 * each / total:.2f}" for each in ours.samples],
        measure: [_two_digits(value) for value in ours.percent],
    }
    if theirs is not None:
        columns[f"teacher's {measure}"] = [_two_digits(value) for value in theirs.percent]
    return [*aligned([list(columns), *map(list, zip(*columns.values(), strict=True))]).splitlines(), ""]


def _two_digits(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _own_file(subject: Subject) -> Path | None:
    """Return the file in the run folder, None for figures that are not those of the run's own images and settings."""
    arguments, begun = subject.arguments, read_identity(subject.weights.parent)
    if begun is None or arguments.weights not in NAMED_WEIGHTS or arguments.real_labels or arguments.class_map:
        return None
    folder = subject.weights.parent
    if begun.data.manifest != subject.manifest.sha256 or not (folder / RECIPE).is_file():
        return None
    own = load_run(folder, losses=False).recipe
    return folder / EVALUATIONS[subject.weights.name] if _settings(own) == _settings(subject.recipe) else None


def _settings(recipe: Recipe) -> list[Any]:
    """Return what of a recipe the figures depend on."""
    others = {"path", "prepare", "samples", "threads", "prefetch", "views", "validation_batch"}
    data = recipe.data.for_validation.model_dump(exclude=others)
    return [recipe.task, recipe.precision, recipe.student.model, recipe.student.arguments, data]


if __name__ == "__main__":
    entry(main)
