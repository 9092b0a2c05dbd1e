"""What is learned from: a frozen network, several of them, or the student's own moving average.

M members, B batch, K classes.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline import parallel
from pipeline.batch import Batch, Outputs
from pipeline.ema import EMA
from pipeline.ema import Config as Averaging
from pipeline.losses._base import promoted
from pipeline.models.folding import fold_batchnorms
from pipeline.taps import FeatureTaps, tap_shapes

TOLERANCE = 1e-3
"""Largest change of a tap by folding, relative to its largest value. Rounding changes 1e-6, a wrong fold about 1."""

Triple = tuple[float, float, float]


class Network(BaseModel):
    """A frozen network: which it is, with which weights, and how it computes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = None
    """A name that ``create_model`` knows, or a user's own factory as ``package.module:factory``."""
    weights: str | None = None
    """A ``.pt``, ``.pth`` or ``.safetensors`` file, or the name of torchvision weights, such as IMAGENET1K_V1."""
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
    mean: Triple | None = None
    """What the teacher's training images were normalised with; default: the recipe's own."""
    std: Triple | None = None

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


class Config(Network):
    """The recipe's ``teacher``: a network; or several, ``members``; or the ``average`` of the student's own weights."""

    members: tuple[Network, ...] | None = Field(default=None, min_length=1)
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
    encode: dict[str, PositiveInt] = {}
    """Principal components that ``cache_teacher.py`` keeps of a stage's channels, where it writes the cache."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        kind = next((key for key in _BESIDE if getattr(self, key) is not None), None)
        given = {key for key, field in Config.model_fields.items() if getattr(self, key) != field.default}
        allowed = {kind, *_BESIDE[kind]} if kind else {*Network.model_fields, "batch", "expect_top1", *_CACHE}
        if stray := sorted(given - allowed):
            raise ValueError(f"{', '.join(stray)} cannot stand beside {kind or 'a single network, without members'}")
        if self.cache is None and (self.fallback or self.accept):
            raise ValueError("fallback and accept say something of a cache; name its folder, cache")
        if kind is None:
            if self.cache is None or self.is_asked or self.model or self.recipe:
                self.check_source()
        elif kind == "members" and (self.combine is None or self.temperature is None):
            raise ValueError("members need combine (mean, entropy or confidence) and temperature")
        if self.combine == "confidence" and self.expect_top1 is not None:
            raise ValueError("expect_top1 says nothing beside combine: confidence, which knows the labels")
        return self

    @property
    def is_asked(self) -> bool:
        """Whether training may ask the network itself."""
        return self.cache is None or self.fallback is not None

    @property
    def is_named(self) -> bool:
        """Whether there is a network, and not a cache alone."""
        return self.cache is None or bool(self.model or self.recipe or self.members)

    @property
    def recipes(self) -> list[str]:
        """The recipes whose runs the networks come from."""
        return [network.recipe for network in self.members or (self,) if network.recipe is not None]


_CACHE = ("cache", "fallback", "accept", "encode")
_BESIDE = {"members": ("combine", "temperature", "batch", "expect_top1", *_CACHE), "average": ("dtype", "batch")}
"""What may stand beside a teacher that is no single network of its own."""


class Normalization(NamedTuple):
    """Per-channel mean and standard deviation that images in [0, 1] were brought to zero and one with."""

    mean: Triple
    std: Triple


class Teacher(nn.Module):
    """A network that answers ``Outputs`` for a batch and never changes: frozen, in evaluation mode.

    It runs in chunks of exactly ``batch`` images, the last one padded and cut: the last bits of an answer depend on the
    batch size, and so not on the caller's. ``given`` is the normalisation of the images that come, ``expected`` the one
    it was trained with. Raises ValueError where folding changes more than rounding.
    """

    def __init__(
        self,
        taps: FeatureTaps,
        *,
        batch: int,
        image_size: int,
        dtype: torch.dtype,
        device: torch.device,
        given: Normalization | None = None,
        expected: Normalization | None = None,
        fold: bool = True,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.batch = batch
        self.dtype = dtype
        self.autocast = autocast
        taps.requires_grad_(False).eval()
        self.norms = taps.norms()
        if fold:
            _fold(taps, image_size)
        self.taps = taps.to(device, dtype)
        # The faster layout, on a CPU by a quarter; and always the same one, since the last bits depend on it too.
        self.taps.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.renormalization = None
        if given and expected and given != expected:
            self.renormalization = tuple(x.to(device) for x in _renormalization(given, expected))

    def forward(self, batch: Batch) -> Outputs:
        """Return the answers for ``batch.images_BCHW`` in the teacher's precision, as ordinary tensors."""
        images_BCHW = self._prepared(batch.images_BCHW)
        autocast = torch.autocast(images_BCHW.device.type, self.autocast, enabled=self.autocast is not None)
        with torch.inference_mode(), autocast:
            chunks = [self.taps(chunk) for chunk in images_BCHW.split(self.batch)]
        # Copied outside of inference mode: autograd refuses to save that mode's own tensors for a loss's backward.
        rows = len(batch.images_BCHW)
        features = {name: torch.cat([chunk.features[name] for chunk in chunks])[:rows] for name in chunks[0].features}
        return Outputs(torch.cat([chunk.logits_BK for chunk in chunks])[:rows], features)

    def shapes(self, image_size: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tap and of the logits, without the batch, on images of that size."""
        return tap_shapes(self.taps, image_size)

    def train(self, mode: bool = True) -> Teacher:
        """Stay in evaluation mode, whatever ``mode`` a module around it is put in."""
        return super().train(False)

    def _prepared(self, images_BCHW: Tensor) -> Tensor:
        """Return the images as the network wants them: its normalisation, precision and layout, and whole chunks."""
        if self.renormalization is not None:
            scale_C11, shift_C11 = self.renormalization
            images_BCHW = images_BCHW * scale_C11 + shift_C11
        if lacking := -len(images_BCHW) % self.batch:
            images_BCHW = F.pad(images_BCHW, (0, 0, 0, 0, 0, 0, 0, lacking))
        return images_BCHW.to(self.dtype, memory_format=torch.channels_last)


class TeacherEnsemble(nn.Module):
    """Several teachers, asked one after the other, whose softened answers are mixed.

    Its logits are T·log Σ_m w_m·softmax(z_m/T), so that KD at this T has the mixture itself as its target, and the
    gradient of the members' KD losses weighed with w_m. Only the first one's features are answered. Architectures,
    precisions and normalisations may differ. Hinton et al., 2015, arXiv:1503.02531, section 3, and ``member_weights``.
    """

    def __init__(self, members: list[Teacher], *, combine: str, temperature: float) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.combine = combine
        self.temperature = temperature
        self.norms = members[0].norms

    @property
    def taps(self) -> FeatureTaps:
        """The network whose features are answered."""
        return self.members[0].taps  # type: ignore[return-value]

    def shapes(self, image_size: int) -> dict[str, tuple[int, ...]]:
        """Return those of the first member."""
        return self.members[0].shapes(image_size)  # type: ignore[operator]

    def forward(self, batch: Batch) -> Outputs:
        """Return the mixture in at least float32, and the first member's features."""
        first, *others = (member(batch) for member in self.members)
        logits_MBK = torch.stack([promoted(answer).logits_BK for answer in (first, *others)])
        weights_MB = member_weights(logits_MBK, batch.labels_B, self.combine)
        log_p_MBK = (logits_MBK / self.temperature).log_softmax(2) + weights_MB.log().unsqueeze(2)
        return Outputs(self.temperature * log_p_MBK.logsumexp(0), first.features)


def member_weights(logits_MBK: Tensor, labels_B: Tensor, combine: str) -> Tensor:
    """Return each member's weight for each row [M, B], of sum 1 over the members.

    ``mean``: 1/M. ``entropy``: (1 − H_m/ΣH)/(M − 1), H the entropy of the member's answer (Kwon et al., ICASSP 2020).
    ``confidence``: (1 − softmax_m(CE_m))/(M − 1), CE its cross-entropy with the label (CA-MKD, Zhang et al., ICASSP
    2022, arXiv:2201.00007, eq. 3). The answers are not softened for it.
    """
    members = len(logits_MBK)
    if combine == "mean" or members == 1:
        return logits_MBK.new_full(logits_MBK.shape[:2], 1 / members)
    log_p_MBK = logits_MBK.log_softmax(2)
    if combine == "entropy":
        entropy_MB = -(log_p_MBK.exp() * log_p_MBK).sum(2)
        total_B = entropy_MB.sum(0)
        share_MB = torch.where(total_B > 0, entropy_MB / total_B, 1 / members)  # all of them sure: as one
    else:
        # A padded row of a validation batch has no label, and is not counted.
        place_MB1 = labels_B.clamp(min=0).expand(members, -1).unsqueeze(2)
        share_MB = (-log_p_MBK.gather(2, place_MB1).squeeze(2)).softmax(0)
    return (1 - share_MB) / (members - 1)


class EMATeacher(Teacher):
    """The moving average of the student's weights: mean teacher, Tarvainen and Valpola, NeurIPS 2017, arXiv:1703.01780.

    It answers in evaluation mode, with the student's BatchNorm statistics, which under DDP are the ranks' mean: every
    rank has the same teacher. Weights are float32 and the forward runs under ``autocast``: of the precisions bf16
    rather than fp16, because the first statistics fit no network yet, and deep ones answer with more than 65504.
    """

    def __init__(
        self, taps: FeatureTaps, average: Averaging, *, batch: int, device: torch.device, autocast: torch.dtype | None
    ) -> None:
        super().__init__(
            taps, batch=batch, image_size=0, dtype=torch.float32, device=device, fold=False, autocast=autocast
        )
        self.average = average
        self.norms = {}  # They move, and what a loss takes from them it takes once.

    def follow(self, student: nn.Module) -> None:
        """Begin as that plain network is, and follow it from now on."""
        network = self.taps.model
        network.load_state_dict(student.state_dict())
        self.ema = EMA(self.average, student, into=dict(network.named_parameters()))

    @torch.no_grad()
    def update(self) -> None:
        """Follow the student by one step; every rank calls it."""
        self.ema.update()
        with parallel.averaged_buffers(self.ema.network):
            for own, students in zip(self.taps.model.buffers(), self.ema.network.buffers(), strict=True):
                own.copy_(students)


def _renormalization(given: Normalization, expected: Normalization) -> tuple[Tensor, Tensor]:
    """Return (scale, shift), each [C, 1, 1], that turn images normalised as ``given`` into ``expected`` ones."""
    given_mean, given_std = (torch.tensor(x, dtype=torch.float64).view(-1, 1, 1) for x in given)
    mean, std = (torch.tensor(x, dtype=torch.float64).view(-1, 1, 1) for x in expected)
    return (given_std / std).float(), ((given_mean - mean) / std).float()


@torch.no_grad()
def _fold(taps: FeatureTaps, image_size: int) -> None:
    """Fold the BatchNorms of ``taps.model`` and make sure that every tap and the logits stay what they were."""
    weight = next(taps.parameters())
    image_1CHW = torch.randn(1, 3, image_size, image_size, generator=torch.Generator().manual_seed(0)).to(weight)
    before = taps(image_1CHW)
    fold_batchnorms(taps.model, image_1CHW, spared=taps.tapped_modules())
    after = taps(image_1CHW)
    for name, value in {**before.features, "logits": before.logits_BK}.items():
        new = after.logits_BK if name == "logits" else after.features[name]
        change = ((new - value).abs().max() / value.abs().max().clamp_min(1e-12)).item()
        if not change <= TOLERANCE:
            raise ValueError(f"teacher: folding BatchNorm changes {name} by {change:.0e} of its size; set fold: false")
