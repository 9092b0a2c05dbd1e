"""The recipe's ``teacher:`` section."""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import Field, PositiveInt, model_validator

from pipeline.frozen_model import FrozenModel
from pipeline.optim.ema import Config as Averaging

_Triple = tuple[float, float, float]


class TeacherNetwork(FrozenModel):
    """A frozen network: which it is, with which weights, and how it computes."""

    model: str | None = None
    """A name that ``create_model`` knows, or a user's own factory as ``package.module:factory``."""
    weights: str | None = None
    """A file of weights, or the name of published ones: torchvision's, such as IMAGENET1K_V1, or a tag of timm's."""
    weights_key: str | None = None
    """Which of several weights in the file are meant, such as ``model_ema``; default: the raw ones."""
    recipe: str | None = None
    """Instead of ``model``: the recipe whose finished run gives the network, its last weights, mean and std.

    With ``weights`` these take the place of the last ones: a file, such as the run's best ones.
    """
    stages: dict[str, str] | None = None
    """Module path by canonical stage name, for a network whose stages the project does not know."""
    dtype: Literal["auto", "fp16", "bf16", "fp32"] = "auto"
    """``auto`` is fp16 on a GPU and fp32 on a CPU; for a moving average see ``EMATeacher``."""
    fold: bool = True
    """Whether BatchNorm is folded into the convolution before it."""
    compile: bool = False
    """Whether torch compiles it: a minute or more where a command begins, quicker steps, other last bits."""
    mean: _Triple | None = None
    """What the teacher's training images were normalised with; default: what published weights say, or the recipe's."""
    std: _Triple | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        self.check_source()
        return self

    def check_source(self) -> None:
        """Raise ValueError unless there is one source of the network and its weights."""
        by_recipe = self.recipe is not None and self.model is None
        by_model = self.recipe is None and self.model is not None and self.weights is not None
        if not (by_recipe or by_model):
            raise ValueError("give either model and weights (a file, or a name such as IMAGENET1K_V1), or recipe")

    def torch_dtype(self, device: torch.device) -> torch.dtype:
        """Return the precision the network computes in on ``device``."""
        if self.dtype == "auto":
            return torch.float16 if device.type == "cuda" else torch.float32
        return {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[self.dtype]


class Config(TeacherNetwork):
    """The recipe's ``teacher``: a network; or several, ``members``; or the ``average`` of the student's own weights."""

    members: tuple[TeacherNetwork, ...] | None = Field(default=None, min_length=1)
    """Networks whose softened answers are mixed; features are those of the first."""
    combine: Literal["mean", "entropy", "confidence"] | None = None
    """How the members are weighed, as ``member_weights`` says."""
    temperature: float | None = Field(default=None, gt=0)
    """T of the mixture: the one at which a loss of the logits has exactly it as its target."""
    average: Averaging | None = None
    batch: PositiveInt | None = None
    """Images of one forward, whatever the batch; default: a rank's rows in the run's first start."""
    expect_top1: float | None = Field(default=None, ge=0, le=100)
    """Percent on the validation images below which neither a run nor the writing of a cache begins."""
    cache: str | None = None
    """Folder of answers that ``cache_teacher.py`` wrote; they take the network's place, which is not loaded then."""
    fallback: Literal["live"] | None = None
    """With ``live`` the network is asked for what the cache does not hold, instead of ending the command."""
    accept: tuple[str, ...] = ()
    """Keys, as the error names them, in which the cache may differ from what this run would ask."""
    encode: dict[str, PositiveInt] = Field(default={})
    """Principal components that ``cache_teacher.py`` keeps of a stage's channels, where it writes the cache."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        kind = next((key for key in _BESIDE if getattr(self, key) is not None), None)
        given = {key for key, field in Config.model_fields.items() if getattr(self, key) != field.default}
        allowed = {kind, *_BESIDE[kind]} if kind else {*TeacherNetwork.model_fields, "batch", "expect_top1", *_CACHE}
        if stray := sorted(given - allowed):
            raise ValueError(f"{', '.join(stray)} cannot stand beside {kind or 'a single network, without members'}")
        if self.cache is None and (self.fallback or self.accept):
            raise ValueError("fallback and accept say something of a cache; name its folder, cache")
        if kind is None:
            if self.cache is None or self.uses_live_model or self.model or self.recipe:
                self.check_source()
        elif kind == "members" and (self.combine is None or self.temperature is None):
            raise ValueError("members need combine (mean, entropy or confidence) and temperature")
        if self.combine == "confidence" and self.expect_top1 is not None:
            raise ValueError("expect_top1 says nothing beside combine: confidence, which knows the labels")
        return self

    @property
    def uses_live_model(self) -> bool:
        """Whether training may ask the network itself."""
        return self.cache is None or self.fallback is not None

    @property
    def has_model(self) -> bool:
        """Whether there is a network, and not a cache alone."""
        return self.cache is None or bool(self.model or self.recipe or self.members)

    @property
    def recipes(self) -> list[str]:
        """The recipes whose runs the networks come from."""
        return [network.recipe for network in self.members or (self,) if network.recipe is not None]


_CACHE = ("cache", "fallback", "accept", "encode")
_BESIDE = {"members": ("combine", "temperature", "batch", "expect_top1", *_CACHE), "average": ("dtype", "batch")}
"""What may stand beside a teacher that is no single network of its own."""
