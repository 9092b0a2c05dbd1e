"""The recipe's ``teacher:`` section."""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import Field, PositiveInt, model_validator

from pipeline.data.config import Side
from pipeline.frozen_model import FrozenModel
from pipeline.network_arguments import Arguments
from pipeline.optim.ema import Config as Averaging
from pipeline.run_reference import RunReference

RGBTriple = tuple[float, float, float]
"""One value each for red, green and blue."""


class TeacherNetwork(RunReference):
    """The configuration of one frozen network: architecture, weights and precision.

    Instead of ``model``, ``recipe`` may name the run that provides the network, its last weights, mean and std.
    ``weights`` then replaces the last weights, for example with the file of the run's best weights.
    """

    model: str | None = None
    """Name of a network (``timm/<name>`` for timm's), or of your own factory: ``package.module:factory``."""
    weights: str | None = None
    """A weights file, or the name of published weights: torchvision's, such as IMAGENET1K_V1, or a tag of timm."""
    weights_key: str | None = None
    """The key of the weights in a file with several, such as ``model_ema``; default: the raw weights."""
    stages: dict[str, str] | None = None
    """Module path by canonical stage name, for a network whose stages the project does not know."""
    head: Literal["none"] | None = None
    """``none``: the network's last layer is left out, for losses that read features only; its classes may differ."""
    arguments: Arguments = None
    """More keyword arguments of the network's factory; the network of a ``recipe`` has those of its run."""
    dtype: Literal["auto", "fp16", "bf16", "fp32"] = "auto"
    """Precision of the network; ``auto`` is fp16 on a GPU and fp32 on a CPU.

    Of ``average``, the forward runs under autocast, and ``auto`` is bf16 if the recipe's ``precision`` is not fp32.
    """
    fold: bool = True
    """Whether each BatchNorm is folded into the convolution before it."""
    compile: bool = False
    """Whether torch compiles the network: a minute or more at the start, faster steps, different last bits."""
    mean: RGBTriple | None = None
    """Mean of the teacher's training images; default: that of published weights, or else the recipe's."""
    std: RGBTriple | None = None
    """Standard deviation of the teacher's training images; same default."""
    size: Side | None = None
    """Side in pixels to which the teacher's images are resized: the same crops as the student's, bilinear with
    antialiasing. null leaves them as they are."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        self.check_source()
        return self

    def check_source(self) -> None:
        """Raise ValueError unless the network and its weights have exactly one source."""
        if self.recipe is not None and self.model is not None:
            raise ValueError("both model and recipe name the network; set recipe: null, or remove model")
        by_recipe = self.recipe is not None
        by_model = self.model is not None and self.weights is not None
        if not (by_recipe or by_model):
            raise ValueError("give either model and weights (a file, or a name such as IMAGENET1K_V1), or recipe")
        if by_recipe and self.arguments:
            raise ValueError("arguments are those of the run that recipe names; remove arguments")

    def torch_dtype(self, device: torch.device) -> torch.dtype:
        """Return the dtype in which the network computes on ``device``."""
        if self.dtype == "auto":
            return torch.float16 if device.type == "cuda" else torch.float32
        return {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[self.dtype]


class Route(FrozenModel):
    """The recipe's ``teacher.route``: weights of several epochs of the teacher's own run, one after the other."""

    epochs: tuple[PositiveInt, ...] = Field(min_length=1)
    """Epochs of the teacher's run, counted from 1, whose weights teach in this order. That run keeps them by
    ``checkpoints.export_epochs``."""
    each: PositiveInt
    """Epochs of the student for each of them but the last, which teaches to the end."""

    @model_validator(mode="after")
    def _epochs_rise(self) -> Self:
        if list(self.epochs) != sorted(set(self.epochs)):
            raise ValueError(f"epochs must be in increasing order, got {list(self.epochs)}")
        return self


class Snapshots(FrozenModel):
    """The recipe's ``teacher.snapshots``: the student itself, as it was at the end of its last cycle."""

    cycles: int = Field(ge=2)
    """Number of cycles of equal length in the run; in the first one there is no teacher yet."""


class Config(TeacherNetwork):
    """The recipe's ``teacher``: one network, several ``members``, or the student itself at another time.

    One network may teach by its weights of several epochs, its ``route``. The student itself is the ``average`` of its
    weights, or ``snapshots`` of them.
    """

    members: tuple[TeacherNetwork, ...] | None = Field(default=None, min_length=1)
    """Networks whose softened outputs are mixed, each with the keys above. Features come from the first."""
    combine: Literal["mean", "entropy", "confidence"] | None = None
    """Weights of the members: equal, larger for a surer prediction (``entropy``), or for the label (``confidence``)."""
    temperature: float | None = Field(default=None, gt=0)
    """Temperature T of the mixture. A logit loss at this T has exactly the mixture as its target."""
    average: Averaging | None = None
    """Settings of the moving average of the student's weights, which is then the teacher."""
    route: Route | None = None
    """Epochs of the run that ``recipe`` names, whose weights teach one after the other."""
    snapshots: Snapshots | None = None
    """Settings of the student's snapshots, of which the last is then the teacher."""
    batch: PositiveInt | None = None
    """Images per forward of the teacher, whatever the batch; default: a rank's rows at the first start of the run."""
    expect: float | None = Field(default=None, ge=0, le=100)
    """Smallest value of the task's main metric on the validation images, in percent: top-1, mAP or mIoU. Below it no
    run starts, and no cache is written."""
    cache: str | None = None
    """Folder of outputs written by ``cache_teacher.py``. They replace the network, which is then not loaded."""
    fallback: Literal["live"] | None = None
    """``live``: the network computes the outputs that are not cached; null: missing outputs are an error."""
    accept: tuple[str, ...] = ()
    """Keys, as named by the error, in which the cache may differ from this run."""
    encode: dict[str, PositiveInt] = Field(default={})
    """Number of principal components per stage that ``cache_teacher.py`` stores instead of the stage's channels."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        kind = self.kind
        given = {key for key, field in Config.model_fields.items() if getattr(self, key) != field.default}
        allowed = {kind, *_BESIDE[kind]} if kind else {*TeacherNetwork.model_fields, "batch", "expect", *_CACHE}
        if stray := sorted(given - allowed):
            kind_text = kind or "a single network, without members"
            raise ValueError(f"{', '.join(stray)} cannot be combined with {kind_text}; remove {', '.join(stray)}")
        if self.cache is None and (self.fallback or self.accept):
            raise ValueError("fallback and accept need a cache; set cache to its folder")
        if kind is None:
            if self.cache is None or self.uses_live_model or self.model or self.recipe or self.arguments:
                self.check_source()
        elif kind == "route" and self.recipe is None:
            raise ValueError("route is that of a run; give recipe, which names the run")
        elif kind == "members" and (self.combine is None or self.temperature is None):
            raise ValueError("members need combine (mean, entropy or confidence) and temperature")
        if any(member.head for member in self.members or ()):
            raise ValueError("members: their logits are mixed, and head: none leaves them out; remove head")
        if self.head and self.expect is not None:
            raise ValueError("expect needs the logits, which head: none leaves out; remove expect")
        if self.combine == "confidence" and self.expect is not None:
            raise ValueError("expect has no meaning with combine: confidence, which uses the labels; remove it")
        return self

    @property
    def uses_live_model(self) -> bool:
        """Return whether training may run the network itself."""
        return self.cache is None or self.fallback is not None

    @property
    def follows_student(self) -> bool:
        """Return whether the teacher is the student's own network at another time."""
        return self.average is not None or self.snapshots is not None

    @property
    def moves(self) -> bool:
        """Return whether the teacher's weights change during the run."""
        return self.follows_student or self.route is not None

    @property
    def has_one_head(self) -> bool:
        """Return whether one network with fixed weights computes the logits, and training knows it."""
        return self.uses_live_model and not (self.members or self.moves or self.head)

    @property
    def kind(self) -> str | None:
        """Return the key that makes the teacher another one than a single network, None if there is none."""
        return next((key for key in _BESIDE if getattr(self, key) is not None), None)

    @property
    def has_model(self) -> bool:
        """Return whether the recipe names a network, and not only a cache."""
        return self.cache is None or bool(self.model or self.recipe or self.members)

    @property
    def runs(self) -> list[RunReference]:
        """Return the runs that provide the networks, in the order of ``members``."""
        return [network for network in self.members or (self,) if network.recipe is not None]


_CACHE = ("cache", "fallback", "accept", "encode")
_OF_RUN = ("recipe", "method", "overlays", "stages", "head", "dtype", "fold", "compile", "mean", "std", "size", "batch")
_BESIDE = {
    "members": ("combine", "temperature", "batch", "expect", *_CACHE),
    "average": ("dtype", "batch"),
    "route": _OF_RUN,
    "snapshots": ("dtype", "batch"),
}
"""Keys that may be combined with each kind of teacher that is not a single network."""
