"""Recipes: YAML files under ``configs/`` that define everything about a run.

``load_recipe(path, overrides)`` composes a file, its bases, the overrides ``key=value`` and the constants
(``compose.py``), and validates the result strictly as a typed ``Recipe``. An error is one line: the file, the dotted
key, what was given and what was expected.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from pipeline.config.compose import Origins, compose, find_source, network_sections, read_source, references
from pipeline.config.messages import check_nulls, validation_message
from pipeline.config.source import RecipeSource, find_recipe
from pipeline.config.values import check_numbers, check_switches
from pipeline.data.config import MAX_PEERS
from pipeline.data.config import Config as Data
from pipeline.errors import RecipeError, display_path
from pipeline.frozen_model import FrozenModel
from pipeline.losses._base import Taps
from pipeline.losses._registry import NO_LOSSES, Losses
from pipeline.network_arguments import Arguments
from pipeline.optim.ema import Config as Averaging
from pipeline.optim.optimizer import Config as Optimizer
from pipeline.optim.schedule import Schedule, first_epoch
from pipeline.run_reference import RunReference
from pipeline.tasks._boxes import BOXES
from pipeline.tasks._high import HIGH
from pipeline.tasks._masks import MASK
from pipeline.tasks._registry import TaskName, find_task
from pipeline.teachers.config import Config as TeacherConfig

# The crops of images with such targets, which move with them; other tasks have those of square images.
_CROPS = {MASK: ("scaled",), BOXES: ("keep_ratio",), HIGH: ("patch",)}


class StartConfig(RunReference):
    """The student's initial weights: a weights file, or the student of another run."""

    weights: str | None = None
    """Weights file that the student starts from."""
    weights_key: str | None = None
    """Key of the weights in a file that has several, such as ``model_ema``; default: the raw weights."""
    head: Literal["keep", "new"] = "keep"
    """``new``: the classifier keeps its random initialisation, so the weights may be of other classes."""
    part: Literal["all", "backbone"] = "all"
    """``backbone``: the heads keep their random initialisation, so the weights may be a classification network's."""
    parts: tuple[str, ...] = ()
    """Modules that alone begin with the weights, such as ``[feature_extraction, mapping]``; the others keep their
    random initialisation. The weights may be those of another network that has the same modules. Default: all."""

    @model_validator(mode="after")
    def _one_source(self) -> StartConfig:
        if self.weights is not None and self.recipe is not None:
            raise ValueError("both weights and recipe name the initial weights; set recipe: null, or remove weights")
        if self.weights is None and self.recipe is None:
            raise ValueError("give weights (a file) or recipe (a run's student)")
        if self.part == "backbone" and self.head == "new":
            raise ValueError("part: backbone leaves every head as it is; remove head")
        if self.parts and (self.part == "backbone" or self.head == "new"):
            raise ValueError(
                f"parts names all that begins with the weights; remove {'part' if self.part == 'backbone' else 'head'}"
            )
        return self


Peers = (
    Annotated[int, Field(gt=0, le=MAX_PEERS)]
    | Annotated[tuple[str, ...], Field(min_length=1, max_length=MAX_PEERS)]
    | None
)


class StudentConfig(FrozenModel):
    """The network that is trained."""

    model: str
    """Name of a network (``timm/<name>`` for timm's), or of your own factory: ``package.module:factory``."""
    stages: dict[str, str] | None = None
    """Module path by canonical stage name, for a network whose stages the project does not know."""
    arguments: Arguments = None
    """More keyword arguments of the network's factory, such as ``{drop_path_rate: 0.1, img_size: 32}`` of timm's."""
    freeze: tuple[str, ...] = ()
    """Patterns of parameters that do not train, such as ``[conv1, "layer1.*"]``; their BatchNorms stay as they are."""
    train: tuple[str, ...] = ()
    """Stages that alone train: ``stem``, ``stage1`` … ``stage4``, and ``head``, what comes after the last of them. The
    BatchNorms of the others stay as they are. Default: all train."""
    sync_batchnorm: bool = False
    """True to normalise by the statistics of all ranks' rows (SyncBatchNorm), where a rank has few. Several ranks then
    train as one does."""
    start: StartConfig | None = None
    """Initial weights; null is a random initialisation by ``seed``."""
    inherit: tuple[str, ...] = ()
    """Patterns of parameters and buffers that begin as the teacher's, such as ``[backbone.fpn, head]`` of detectors."""
    compile: bool = False
    """True to use torch.compile: a minute or more at the start, faster steps, and different last bits."""
    checkpoint: bool = False
    """True to compute the inside of the network's blocks again in the backward: less memory, with equal numbers."""
    peers: Peers = None
    """Networks that train together and learn from each other, with different initial weights: their number, all being
    ``model``, or their names. null is one network."""
    export: NonNegativeInt = 0
    """``peers``: number of the one whose weights the run leaves, from 0; ``model`` is its network."""
    shared: str | None = None
    """``peers``: stage up to which all have the same modules, such as ``stage2``; null shares nothing."""
    within: Arguments = None
    """Arguments of a wider network, such as ``{features: 256}``, whose first channels are the student. Its other
    arguments are the student's. Both train with one set of weights, and the run leaves the student's part of it."""

    @model_validator(mode="before")
    @classmethod
    def _model_is_the_exported_peer(cls, given: Any) -> Any:
        names = given.get("peers") if isinstance(given, dict) else None
        number = given.get("export", 0) if names else 0
        if given and isinstance(names, list) and given.get("model") is None and isinstance(number, int):
            return {**given, "model": names[number]} if 0 <= number < len(names) else given
        return given

    @model_validator(mode="after")
    def _peers_fit(self) -> StudentConfig:
        models = self.peer_models
        if not models:
            if key := next((key for key in ("export", "shared") if getattr(self, key)), None):
                raise ValueError(f"{key} is for several networks that train together; set peers, or remove it")
            return self
        if self.export >= len(models):
            raise ValueError(f"export: {self.export} is no peer; there are {len(models)}, counted from 0")
        if models[self.export] != self.model:
            raise ValueError(f"model: {self.model} is not peer {self.export}, {models[self.export]}; remove model")
        unlike = {"shared": self.shared, "stages": self.stages, "arguments": self.arguments}
        if len(set(models)) > 1 and (key := next((key for key, value in unlike.items() if value), None)):
            raise ValueError(f"{key} needs peers of one network, got {', '.join(models)}; remove it")
        if self.shared is not None and self.sync_batchnorm:
            raise ValueError("shared does not go with sync_batchnorm; remove one of them")
        untried = ("start", "inherit", "freeze", "train", "compile", "checkpoint")
        if key := next((key for key in untried if getattr(self, key)), None):
            raise ValueError(f"peers do not go with {key}; remove one of them")
        return self

    @model_validator(mode="after")
    def _within_alone(self) -> StudentConfig:
        untried = ("peers", "start", "inherit", "freeze", "train", "compile", "checkpoint", "sync_batchnorm")
        if self.within and (key := next((key for key in untried if getattr(self, key)), None)):
            raise ValueError(f"within does not go with {key}; remove one of them")
        return self

    @property
    def peer_models(self) -> tuple[str, ...]:
        """Return the names of the networks that train together; empty without ``peers``."""
        return (self.model,) * self.peers if isinstance(self.peers, int) else self.peers or ()

    @model_validator(mode="after")
    def _frozen_by_one_key(self) -> StudentConfig:
        if self.train and self.freeze:
            raise ValueError("train and freeze cannot be combined; remove one of them")
        return self

    @model_validator(mode="after")
    def _compiled_or_checkpointed(self) -> StudentConfig:
        if self.compile and self.checkpoint:
            raise ValueError("compile and checkpoint cannot be combined; remove one of them")
        return self


class StopConfig(FrozenModel):
    """The point where this command ends early, to be resumed later; not part of the run's identity."""

    epoch: PositiveInt | None = None
    """Epoch of the run after which the command ends."""
    steps: PositiveInt | None = None
    """Step of the run after which the command ends."""
    minutes: float | None = Field(default=None, gt=0)
    """Minutes of training after which the command ends."""


class CheckpointConfig(FrozenModel):
    """The intervals at which the run is saved (0: never), and the number of checkpoints to keep."""

    every_steps: NonNegativeInt = 0
    """Steps between two checkpoints; 0 is never."""
    every_epochs: NonNegativeInt = 1
    """Epochs between two checkpoints; 0 is never."""
    keep: PositiveInt = 2
    """Number of the latest checkpoints that are kept."""
    export_epochs: tuple[PositiveInt, ...] = ()
    """Epochs, counted from 1, after which the student's weights are kept in the run's ``route`` folder, for
    ``teacher.route`` of other runs. A run that is shorter keeps those that it reaches."""
    poll_steps: PositiveInt = 50
    """Steps between two checks of whether any rank has received a signal to stop."""


def _check_project(text: str) -> str:
    # Characters that W&B's addresses and MLflow's queries allow.
    if not re.fullmatch(r"\w[\w .-]{0,127}", text):
        raise ValueError("expected up to 128 letters, digits, spaces and . _ -, such as distillation")
    return text


def _check_label(text: str) -> str:
    if not (text.isprintable() and text.strip() and len(text) <= 64):
        raise ValueError("expected one line of text of up to 64 characters")
    return text


class JournalConfig(FrozenModel):
    """The settings of the training journal."""

    every_steps: PositiveInt = 50
    """Steps between two lines of the journal."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """Experiment trackers of Accelerate, by name."""
    project: Annotated[str, AfterValidator(_check_project)] = "distillation"
    """Project of the trackers, MLflow's experiment, to which the run belongs; TensorBoard has none."""
    name: Annotated[str, AfterValidator(_check_label)] | None = None
    """Name of the run in W&B and MLflow; null is that of its default folder, ``<pair>/<method>/seed-<seed>``."""
    tags: tuple[Annotated[str, AfterValidator(_check_label)], ...] = ()
    """Tags of the run in W&B and MLflow, such as ``[baseline, a100]``."""
    report: bool = True
    """True to draw ``report.html`` at the end of the run, and to record what it shows of a loss's own networks."""


class Recipe(FrozenModel):
    """The complete settings of a run."""

    task: TaskName = "classification"
    """What the images' targets are, and which metrics are measured. In ``classification`` an image has one class, in
    ``multilabel`` any number of them. In ``segmentation`` every pixel has one, and in ``detection`` every box. In
    ``super_resolution`` an image has a smaller copy, which the network enlarges."""
    student: StudentConfig
    """The network that is trained."""
    teacher: TeacherConfig | None = None
    """The teacher: one network, which may have a ``route``, or several ``members``. Or the student itself, by the
    ``average`` of its weights or ``snapshots`` of them."""
    losses: Losses
    """The losses by name, whose weighted sum is the total."""
    data: Data
    """The shards, and the transforms of their images."""
    epochs: int = Field(gt=0, le=10**6)
    """Length of the run in epochs."""
    batch: int = Field(gt=0, le=2**24)
    """Size of the global batch, over all ranks and micro-batches."""
    accumulation: int = Field(default=1, gt=0, le=2**24)
    """Micro-batches per global batch. Batch statistics are those of a micro-batch over all ranks."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of initialisation, sample order and random draws; ``data.seed`` is that of augmentation."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the forward and backward passes, by autocast; the weights are float32."""
    optimizer: Optimizer = Optimizer()
    """The optimizer, without its learning rate."""
    schedule: Schedule
    """The learning rate over the epochs."""
    clip: float | None = Field(default=None, gt=0)
    """Largest norm of the gradient, over all parameters; null is no clipping."""
    compress: Literal["auxiliary", "all"] | None = None
    """Gradients that are sent in bfloat16: those of the losses' own modules, or the student's, too."""
    ema: Averaging | None = None
    """Moving average of the student's weights, which is exported, too; null is off."""
    graph: Literal["auto"] | bool = "auto"
    """True to replay each step as a CUDA graph, with equal numbers. ``auto``: on one GPU, without accumulation."""
    compare: tuple[RunReference, ...] = ()
    """Runs whose results are in the final table; missing ones are trained first."""
    checkpoints: CheckpointConfig = CheckpointConfig()
    """When the run is saved, and the number of checkpoints that are kept."""
    journal: JournalConfig = JournalConfig()
    """The training journal, and the experiment trackers."""
    stop: StopConfig = StopConfig()
    """Where this command ends early; the same command continues the run."""
    folder: str | None = None
    """Run folder; default ``runs/<path of the recipe under configs/>/<method>/seed-<seed>``, and with ``data.holdout``
    that name with ``-holdout``."""

    @model_validator(mode="after")
    def _losses_have_their_teacher(self) -> Recipe:
        names = [name for name, spec in self.losses.items() if spec.loss.needs_teacher]
        if names and self.teacher is None:
            sources = "teacher: {model: …, weights: …} or teacher: {recipe: …}"
            raise ValueError(f"the loss {names[0]!r} needs a teacher; add {sources}")
        return self

    @model_validator(mode="after")
    def _labels_count_once(self) -> Recipe:
        names = [name for name, spec in self.losses.items() if spec.has_label_loss]
        if len(names) > 1:
            both = " and ".join(map(repr, names))
            raise ValueError(
                f"the losses {both} each have the cross-entropy with the labels; remove all but one of them"
            )
        return self

    @model_validator(mode="after")
    def _losses_fit_the_task(self) -> Recipe:
        task = find_task(self.task)
        for name, spec in self.losses.items():
            pixels = task.of_pixels and spec.takes_pixels
            if task.of_pixels and not pixels and spec.config.reads_head():
                own = ", or set its takes_pixels to True" if ":" in name else ""
                raise ValueError(
                    f"the loss {name!r} compares images by their logits, and task: {self.task} has those of pixels; "
                    f"remove the loss{own}"
                )
            if task.of_boxes and not spec.targets and spec.config.reads_head():
                own = ", or let reads_head of its Config return False" if ":" in name else ""
                has_maps = "maps" in type(spec.config).model_fields
                raise ValueError(
                    f"the loss {name!r} compares images by their logits, and task: {self.task} has those of anchors; "
                    f"{'give it maps: [head.class]' if has_maps else f'remove the loss{own}'}"
                )
            if task.of_images and HIGH not in spec.targets and not spec.takes_images and spec.config.reads_head():
                own = ", or set its takes_images to True" if ":" in name else ""
                raise ValueError(
                    f"the loss {name!r} reads logits of classes, and task: {self.task} has images in their place; "
                    f"remove the loss{own}"
                )
            if spec.reads_labels and not task.one_class and not pixels:
                own = ", or set its reads_labels to False" if ":" in name else ""
                raise ValueError(
                    f"the loss {name!r} reads the class of an image, and an image of task: {self.task} has not one; "
                    f"remove the loss{own}"
                )
            if missing := spec.targets - task.targets:
                raise ValueError(
                    f"the loss {name!r} reads the targets {', '.join(sorted(missing))}, which task: {self.task} has "
                    "not; remove the loss, or set task"
                )
        return self

    @model_validator(mode="after")
    def _crop_fits_the_task(self) -> Recipe:
        targets = find_task(self.task).targets
        crops = next((fit for name, fit in _CROPS.items() if name in targets), ("random_resized", "pad"))
        if self.data.crop not in crops:
            other = " or ".join(crops)
            raise ValueError(f"data.crop: {self.data.crop} is not for task: {self.task}; set data.crop: {other}")
        return self

    @model_validator(mode="after")
    def _cache_has_maps_of_one_size(self) -> Recipe:
        if self.data.has_several_sizes and self.teacher is not None and self.teacher.cache is not None:
            raise ValueError(
                "teacher.cache: images of several data.buckets have maps of several sizes, which a cache does not "
                "hold; give one bucket, or remove the cache"
            )
        return self

    @model_validator(mode="after")
    def _cache_has_no_images(self) -> Recipe:
        if find_task(self.task).of_images and self.teacher is not None and self.teacher.cache is not None:
            raise ValueError(
                f"teacher.cache: the answers of task: {self.task} are images, which are larger than the data; remove it"
            )
        return self

    @model_validator(mode="after")
    def _teacher_fits_the_task(self) -> Recipe:
        task = find_task(self.task)
        if self.teacher is None or task.one_class:
            return self
        moved = any(name in task.targets for name in _CROPS)
        if moved and self.teacher.size is not None:  # it makes squares, in which masks and boxes are elsewhere
            raise ValueError(f"teacher.size resizes images to squares, and this is task: {self.task}; remove it")
        if task.of_boxes and self.teacher.expect is not None:
            raise ValueError(
                f"teacher.expect: the teacher of task: {self.task} finds no boxes while it teaches; measure it with "
                "evaluate.py, and remove expect"
            )
        if self.teacher.members:  # their mean is that of a softmax over the classes
            raise ValueError(f"teacher.members needs images of one class, and this is task: {self.task}; remove it")
        return self

    @model_validator(mode="after")
    def _teacher_has_weights_to_inherit(self) -> Recipe:
        teacher = self.teacher
        single = teacher is not None and teacher.has_model and not (teacher.members or teacher.moves)
        if self.student.inherit and not single:
            raise ValueError(
                "student.inherit takes the weights of a teacher that is one network; remove it, or give teacher: "
                "{model: …, weights: …} or teacher: {recipe: …}"
            )
        return self

    @model_validator(mode="after")
    def _losses_need_no_removed_head(self) -> Recipe:
        readers = [name for name, spec in self.losses.items() if spec.reads_teachers_head]
        if readers and self.teacher and self.teacher.head:
            own = ", or let reads_head of its Config return False" if ":" in readers[0] else ""
            raise ValueError(
                f"the loss {readers[0]!r} reads what the teacher's head computes, but teacher.head is none; "
                f"remove the loss or the key{own}"
            )
        return self

    @model_validator(mode="after")
    def _losses_know_the_head(self) -> Recipe:
        readers = [name for name, spec in self.losses.items() if spec.config.reads_head_weights()]
        if readers and self.teacher and not self.teacher.has_one_head:
            kind = self.teacher.kind or "cache"
            advice = "set teacher.fallback: live" if kind == "cache" else f"remove teacher.{kind}"
            raise ValueError(
                f"the loss {readers[0]!r} reads the teacher's last layer, and teacher.{kind} does not give it; {advice}"
            )
        return self

    @model_validator(mode="after")
    def _losses_wait_for_the_first_snapshot(self) -> Recipe:
        snapshots = self.teacher and self.teacher.snapshots
        if not snapshots:
            return self
        cycles = f"teacher.snapshots.cycles: {snapshots.cycles}"
        if self.epochs % snapshots.cycles:
            raise ValueError(f"{cycles} does not divide epochs: {self.epochs}; change one of them")
        first = self.epochs // snapshots.cycles
        for name, spec in self.losses.items():
            if spec.loss.needs_teacher and first_epoch(spec.config.ramp) < first:
                raise ValueError(
                    f"the loss {name!r} needs a teacher before the first snapshot, which epoch {first} has; set "
                    f"losses.{name}.ramp.from: {first}"
                )
        return self

    @model_validator(mode="after")
    def _losses_take_mixed_images(self) -> Recipe:
        if not self.data.mixes:
            return self
        if not find_task(self.task).one_class:
            raise ValueError(f"data.augment mixes images by their class, which those of task: {self.task} have not")
        refusing = [name for name, spec in self.losses.items() if spec.refuses_mixed]
        if refusing:
            own = ", or set mixed_labels of the loss" if ":" in refusing[0] else ""
            raise ValueError(
                f"the loss {refusing[0]!r} reads the class of an image, but data.augment mixes images of two classes; "
                f"remove the loss, or mixup and cutmix{own}"
            )
        return self

    @model_validator(mode="after")
    def _losses_have_their_rows(self) -> Recipe:
        rows = self.batch // self.accumulation
        for name, spec in self.losses.items():
            if (least := spec.config.least_rows()) > rows:
                found = f"{rows}, batch: {self.batch} by accumulation: {self.accumulation}"
                raise ValueError(
                    f"the loss {name!r} compares {least} images of a micro-batch, got {found}; raise batch, or lower "
                    f"the number in losses.{name}"
                )
        return self

    @model_validator(mode="after")
    def _pairs_stay_together(self) -> Recipe:
        needing = [name for name, spec in self.losses.items() if spec.needs_pairs]
        if needing and not self.data.pairs:
            raise ValueError(f"the loss {needing[0]!r} learns from pairs of one class; set data.pairs: true")
        if not self.data.pairs:
            return self
        if not find_task(self.task).one_class:
            raise ValueError(f"data.pairs pairs images of one class, which those of task: {self.task} have not")
        if self.teacher and self.teacher.cache:
            raise ValueError("data.pairs draws partners in views that a cache has not; remove teacher.cache or the key")
        if self.batch // self.accumulation % 2:
            rows = f"{self.batch // self.accumulation} rows, batch: {self.batch} by accumulation: {self.accumulation}"
            raise ValueError(f"data.pairs needs an even micro-batch, got {rows}; change batch")
        return self

    @model_validator(mode="after")
    def _peers_have_what_they_need(self) -> Recipe:
        count, views = len(self.student.peer_models), self.data.views_per_step
        average = self.teacher is not None and self.teacher.average is not None
        for name, spec in self.losses.items():
            if spec.compares_peers and count < 2:
                raise ValueError(f"the loss {name!r} compares networks that train together; set student.peers")
            if spec.compares_peers and spec.loss.needs_teacher and not average:
                raise ValueError(f"the loss {name!r} reads the averages of the peers; set teacher.average")
        if count and self.task != "classification":
            raise ValueError(f"student.peers is for task: classification, and this is task: {self.task}; remove it")
        if count and self.teacher and self.teacher.snapshots:
            raise ValueError("teacher.snapshots follows one student; remove student.peers, or set teacher.average")
        if views > 1 and views != count:
            raise ValueError(f"data.views_per_step: {views} is not the number of student.peers, {count}; set 1 or that")
        if views > 1 and self.teacher and not average:
            raise ValueError("data.views_per_step: a teacher answers for one view of an image; set 1")
        return self

    @model_validator(mode="after")
    def _within_has_another_teacher(self) -> Recipe:
        if self.student.within and not find_task(self.task).of_images:
            raise ValueError(f"student.within is for task: super_resolution, and this is task: {self.task}; remove it")
        if self.student.within and self.teacher and self.teacher.follows_student:
            raise ValueError(f"teacher.{self.teacher.kind} was not tried with student.within; remove one of them")
        return self

    @model_validator(mode="after")
    def _losses_have_their_unlabelled_images(self) -> Recipe:
        unlabelled = self.data.unlabelled
        for name, spec in self.losses.items():
            if spec.config.reads_unlabelled_only() and unlabelled is None:
                raise ValueError(
                    f"the loss {name!r} learns from images without labels, and the recipe has none; set data.unlabelled"
                )
            if spec.config.reads_pseudo_labels() and (unlabelled is None or unlabelled.pseudo is None):
                raise ValueError(
                    f"the loss {name!r} reads pseudo-labels, and the recipe names none; set data.unlabelled.pseudo"
                )
        return self

    @model_validator(mode="after")
    def _unlabelled_images_fit(self) -> Recipe:
        unlabelled, teacher = self.data.unlabelled, self.teacher
        if unlabelled is None:
            return self
        if self.task != "classification":
            raise ValueError(f"data.unlabelled is for task: classification, and this is task: {self.task}; remove it")
        if self.student.peers:
            raise ValueError("data.unlabelled was not tried with student.peers; remove one of them")
        if teacher and teacher.cache:
            raise ValueError("data.unlabelled has images that a cache has not; remove teacher.cache or the key")
        if teacher and teacher.combine == "confidence":
            raise ValueError("data.unlabelled has no labels for combine: confidence; set teacher.combine: mean")
        if unlabelled.pseudo and (teacher is None or teacher.moves or teacher.head):
            raise ValueError(
                "data.unlabelled.pseudo needs the teacher that answered; give teacher: {recipe: …} or teacher: "
                "{model: …, weights: …}"
            )
        return self

    @model_validator(mode="after")
    def _warm_up_ends(self) -> Recipe:
        if self.schedule.warmup_epochs > self.epochs:
            warmup = f"schedule.warmup_epochs: {self.schedule.warmup_epochs:g}"
            raise ValueError(f"{warmup} is longer than the run, epochs: {self.epochs}; give at most {self.epochs}")
        return self

    @property
    def order_seed(self) -> int:
        """Return the seed of the order of the samples."""
        return self.seed if self.data.order_seed is None else self.data.order_seed

    @property
    def rows_per_step(self) -> int:
        """Return the number of images of a global batch, with and without labels."""
        return self.batch * (1 + self.data.unlabelled_ratio)

    @property
    def runs_teacher(self) -> bool:
        """Return whether training runs the teacher, or reads its cache; pseudo-labels are what it answered before."""
        labels = self.data.unlabelled and self.data.unlabelled.pseudo
        return self.teacher is not None and not (labels and not any(spec.runs_teacher for spec in self.losses.values()))

    @property
    def loss_runs(self) -> list[RunReference]:
        """Return the runs whose auxiliary modules the losses start with, in the order of the losses."""
        return [reference for spec in self.losses.values() for reference in spec.runs.values()]

    @property
    def taps(self) -> Taps:
        """Return all taps that the recipe's losses read, and of the student those that its task reads."""
        taps = Taps(student=find_task(self.task).taps)
        for spec in self.losses.values():
            taps = taps.union(spec.config.taps())
        return taps


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe, its source, and the recipes that it names, which are loaded at their first use.

    Every recipe is read once. All use the shards of this recipe, including an override of ``data.path``. Recipes of
    ``student.start`` and of losses also get this recipe's seed; teachers and compared runs keep theirs. All except
    teachers get ``data.holdout``.
    """

    recipe: Recipe
    source: RecipeSource
    overrides: tuple[str, ...] = ()
    """The overrides with which it was loaded; of a recipe that another names, ``data.path`` comes first."""
    loaded: RecipeTree = field(default_factory=dict, repr=False, compare=False)
    """Recipes that this command has loaded so far, shared with those that this one names."""

    @property
    def path(self) -> Path:
        """Return the recipe file."""
        return self.source.path

    @property
    def teachers(self) -> tuple[LoadedRecipe, ...]:
        """Return the recipes of ``recipe.teacher.runs``, in that order."""
        return tuple(map(self._load_named, self.recipe.teacher.runs if self.recipe.teacher else ()))

    @property
    def start(self) -> LoadedRecipe | None:
        """Return the recipe of ``student.start``, None if it names none."""
        start = self.recipe.student.start
        return self._load_named(start) if start and start.recipe else None

    @property
    def of_losses(self) -> tuple[LoadedRecipe, ...]:
        """Return the recipes of ``recipe.loss_runs``, in that order."""
        return tuple(map(self._load_named, self.recipe.loss_runs))

    @property
    def compare(self) -> tuple[LoadedRecipe, ...]:
        """Return the recipes of ``recipe.compare``, in that order, without this one."""
        named = map(self._load_named, self.recipe.compare)
        return tuple(other for other in named if other.source != self.source)

    def _load_named(self, reference: RunReference) -> LoadedRecipe:
        source = find_source(Path(str(reference.recipe)), reference.method, reference.overlays)
        key = (source, tuple(_inherited_overrides(self.recipe, reference)))
        if key not in self.loaded:
            self.loaded[key] = LoadedRecipe(_load_one(*key), *key, self.loaded)
        return self.loaded[key]


RecipeTree = dict[tuple[RecipeSource, tuple[str, ...]], LoadedRecipe]
"""Recipes by source and overrides."""


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, losses: bool = True) -> LoadedRecipe:
    """Return the recipe at ``path`` with its ``method=``, ``with=`` and other overrides ``key=value``.

    Without ``losses`` the recipe has none, and their modules are not imported: what reads a trained network needs no
    loss. Raises RecipeError (one line) for a missing file, bad YAML, an unknown key, a wrong type or a value out of
    range.
    """
    source, others = read_source(Path(path), overrides)
    return LoadedRecipe(_load_one(source, others, losses=losses), source, tuple(others))


def _inherited_overrides(recipe: Recipe, reference: RunReference) -> list[str]:
    """Return the overrides for a run that ``recipe`` depends on; that of ``data.path`` comes first."""
    others = [*(recipe.teacher.runs if recipe.teacher else ()), *recipe.compare]
    # A recipe that is also a teacher or a compared run keeps its seed, so that it has one run and not two.
    first_stages = (recipe.student.start, *recipe.loss_runs)
    is_start = any(reference is stage for stage in first_stages) and not any(
        _same_run(reference, other) for other in others
    )
    overrides = [f"data.path={json.dumps(recipe.data.path)}", *([f"seed={recipe.seed}"] if is_start else [])]
    # A teacher keeps its images, so that a finished one can be used. The same recipe under another key is another run:
    # a student must not start from the images that it is measured on.
    is_teacher = any(reference is teacher for teacher in (recipe.teacher.runs if recipe.teacher else ()))
    if recipe.data.holdout and not is_teacher:
        overrides += [f"data.holdout={recipe.data.holdout.model_dump_json()}"]
    return overrides


def _same_run(a: RunReference, b: RunReference) -> bool:
    return (a.recipe, a.method, a.overlays) == (b.recipe, b.method, b.overlays)


def _load_one(source: RecipeSource, overrides: Sequence[str], *, losses: bool = True) -> Recipe:
    origins: Origins = {}
    path = source.path
    tree = compose(source, overrides, origins)
    if path.name == _SAVED_RECIPE and (path.parent / _BESIDE_IT).is_file():
        _rename_saved_keys(tree, origins)
    if not losses:
        tree["losses"] = {}
    _unpack_models(tree)
    _resolve_references(tree, path)
    check_numbers(tree, origins, display_path(path))
    try:
        recipe = Recipe.model_validate(tree, context=None if losses else NO_LOSSES)
    except ValidationError as error:
        raise RecipeError(validation_message(error, Recipe, tree, origins, display_path(path))) from None
    check_nulls(Recipe, tree, origins, display_path(path))
    # After validation, because pydantic takes true as the number 1; only the typed recipe shows where.
    check_switches(tree, dump_recipe(recipe), origins, display_path(path))
    return recipe


_SAVED_RECIPE, _BESIDE_IT = "recipe.yaml", "identity.json"
_NEW_NAMES = {("teacher", "expect_top1"): "expect"}
"""New names of keys, by section and old name, for the recipes in folders of runs that earlier code began."""


def _rename_saved_keys(tree: dict[str, Any], origins: Origins) -> None:
    """Give the keys of a run's own copy of its recipe the names that they have today."""
    for (section, old), new in _NEW_NAMES.items():
        if isinstance(keys := tree.get(section), dict) and old in keys:
            keys[new] = keys.pop(old)
        if (section, old) in origins:
            origins[section, new] = origins.pop((section, old))


def dump_recipe(recipe: Recipe) -> dict[str, Any]:
    """Return the resolved recipe as plain data that ``load_recipe`` reads back."""
    return recipe.model_dump(mode="json", by_alias=True)


def _unpack_models(tree: dict[str, Any]) -> None:
    """Turn ``model: {path: package.module:factory, stages: {…}}`` into the keys ``model`` and ``stages``."""
    for section in network_sections(tree):
        model = section.get("model")
        if isinstance(model, dict) and model.keys() <= {"path", "stages"}:
            section |= {"model": model.get("path"), "stages": model.get("stages", section.get("stages"))}


def _resolve_references(tree: dict[str, Any], path: Path) -> None:
    """Find the recipe files that the tree names; a method alone is one of the same file."""
    for section in references(tree):
        try:
            section["recipe"] = display_path(find_recipe(Path(str(section.get("recipe", path)))))
        except RecipeError as error:
            raise RecipeError(f"{display_path(path)}: it names a recipe that does not exist: {error}") from None
