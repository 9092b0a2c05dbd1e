"""DiffKD: knowledge diffusion, Huang et al., NeurIPS 2023, arXiv:2305.15712.

The student's tensor is treated as a noisy version of the teacher's. A diffusion model, trained on the teacher's tensor,
denoises it; then it is compared with the teacher's. The last feature map is compared by mean squared error, the logits
by any loss of logits (KD in DiffKD, DKD in DDKD). The networks of the denoiser are trained with the student and left
out at export. The student itself is unchanged.

    L = λ1·(L_diff of both branches) + λ2·L_ae + λ3·(w·MSE(feature) + the logits' distance)

B batch, C channels, H W space, K classes.
"""

from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt, field_validator, model_validator
from torch import Tensor, nn

from pipeline.batch import Batch, Outputs, Progress
from pipeline.diffusion.config import Diffusion
from pipeline.diffusion.denoiser import Denoised, Denoiser
from pipeline.diffusion.networks import Autoencoder, Bottleneck, logit_adapter, logit_predictor, map_predictor
from pipeline.diffusion.observation import observe_denoiser
from pipeline.frozen_model import FrozenModel
from pipeline.losses._base import Facts, Loss, Taps
from pipeline.losses._class_maps import map_rows
from pipeline.losses._functional import pool_to_smaller, sum_levels
from pipeline.losses._registry import InnerLoss
from pipeline.losses._stages import (
    StageChoice,
    StageList,
    channels,
    level_networks,
    pair_stages,
    per_level,
    stage_taps,
)
from pipeline.losses.sigmoid_kd import sigmoid_kd_loss
from pipeline.precision import autocast


class FeatureBranch(FrozenModel):
    """The branch that denoises and compares a feature map."""

    stage: StageChoice | StageList = "last"
    """Stage of both networks, or several: a list, or a group such as ``fpn``. Each stage has its own denoiser. Maps of
    different size are average-pooled to the smaller one."""
    latent: PositiveInt | Literal["auto"] | None = None
    """Channels of the autoencoder's latent; null for no autoencoder.

    ``auto`` is half the teacher's channels, at most 1024.
    """
    predictor_reduction: PositiveInt
    """Factor by which the bottlenecks of the noise predictor reduce the channels."""
    adapter_reduction: PositiveInt
    """Factor by which the bottleneck of the noise adapter reduces the channels."""
    weight: NonNegativeFloat = 1.0
    """Weight of the feature distance, multiplied by λ3. The logits' weight is set in ``logit_distance``."""
    level_weight: Literal["equal", "area"] = "equal"
    """Factor of each of several stages in the distance. ``equal`` is 1; ``area`` is a stage's number of pixels, divided
    by the mean number of all stages."""


class ClassMapBranch(FrozenModel):
    """The branch that denoises and compares a detector's maps of class logits, with a channel per anchor and class."""

    stage: StageChoice | StageList = "head.class"
    """Stages of both networks: a group, a stage or a list. Each stage has its own denoiser."""
    predictor_reduction: PositiveInt
    """Factor by which the bottlenecks of the noise predictor reduce the channels."""
    adapter_reduction: PositiveInt
    """Factor by which the bottleneck of the noise adapter reduces the channels."""
    temperature: PositiveFloat
    """Temperature of the distance, which is KD of every channel's sigmoid, averaged over a map's cells."""
    weight: NonNegativeFloat = 1.0
    """Weight of the distance, multiplied by λ3."""


class LogitBranch(FrozenModel):
    """The branch that denoises and compares the logits, by 1 × 1 convolutions. Logits [B, K] are a map of one pixel."""

    predictor_expansion: PositiveInt
    """Factor by which the blocks of the noise predictor expand the channels."""
    adapter_expansion: PositiveInt
    """Factor by which the block of the noise adapter expands the channels."""


class LogitMapBranch(FrozenModel):
    """The branch that denoises and compares a map of logits, by networks that see neighbouring pixels."""

    predictor_reduction: PositiveInt
    """Factor by which the bottlenecks of the noise predictor reduce the channels, of which there is one per class."""
    adapter_reduction: PositiveInt
    """Factor by which the bottleneck of the noise adapter reduces the channels."""


class DiffKD(Loss):
    """Distances to the teacher after denoising, and the losses that train the denoiser.

    Its BatchNorms always use the statistics of the batch. On the logits they see one value per row, so every rank needs
    at least two rows.
    """

    scope = "statistics"
    reads_labels = False
    takes_pixels = True

    class Config(Loss.Config):
        """The config of DiffKD; ``configs/methods/diffkd.yaml`` and ``ddkd.yaml`` have the published values.

        A branch that is null is off.
        """

        diffusion: Diffusion
        """Noise schedule and sampler of the denoising, shared by both branches."""
        feature: FeatureBranch | None = None
        """Branch that denoises a feature map; null is off."""
        logits: LogitBranch | LogitMapBranch | None = None
        """Branch that denoises the logits; null is off. A map of logits is denoised pixel by pixel with
        ``predictor_expansion`` and ``adapter_expansion``, or by 3 × 3 convolutions with ``predictor_reduction`` and
        ``adapter_reduction``."""
        logit_distance: InnerLoss | None = None
        """Loss between the student's denoised logits and the teacher's; its weight and ramp are multiplied by λ3."""
        class_maps: ClassMapBranch | None = None
        """Branch that denoises a detector's maps of class logits; null is off."""
        diffusion_weight: NonNegativeFloat
        """λ1, the weight of the losses that train the noise predictors."""
        autoencoder_weight: NonNegativeFloat
        """λ2, the weight of the autoencoder's reconstruction loss."""
        distance_weight: NonNegativeFloat
        """λ3, the weight of the distances between student and teacher."""

        @field_validator("logits", mode="before")
        @classmethod
        def _keys_are_of_one_kind(cls, value: Any) -> Any:
            # Without this, a key of neither kind would be told as an error of both.
            kinds = [list(kind.model_fields) for kind in (LogitBranch, LogitMapBranch)]
            if isinstance(value, dict) and set(value) not in map(set, kinds):
                expected = " or, of a map, ".join(" and ".join(kind) for kind in kinds)
                raise ValueError(f"expected {expected}, got {' and '.join(map(str, value)) or 'nothing'}")
            return value

        @model_validator(mode="after")
        def _branches_fit(self) -> Self:
            if (self.logits is None) != (self.logit_distance is None):
                raise ValueError("logits and logit_distance go together: give both or neither")
            if self.feature is None and self.logits is None and self.class_maps is None:
                raise ValueError("neither feature, logits nor class_maps is set, so nothing is distilled; set one")
            return self

        def taps(self) -> Taps:
            """Return the taps of the branches of maps and of the logits' distance."""
            taps = self.logit_distance.config.taps() if self.logit_distance else Taps()
            for branch in filter(None, (self.feature, self.class_maps)):
                taps = taps.union(stage_taps(branch.stage))
            return taps

        def reads_head(self) -> bool:
            """Return whether the branch of the logits is on."""
            return self.logits is not None

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        self.levels = pair_stages(config.feature.stage, facts) if config.feature else []
        self.feature_denoiser = per_level(self.levels, self.level_denoiser) if self.levels else None
        self.class_levels = pair_stages(config.class_maps.stage, facts) if config.class_maps else []
        self.class_denoiser = per_level(self.class_levels, self.class_map_denoiser) if self.class_levels else None
        self.logit_denoiser = logit_denoiser(config, facts)
        self.logit_distance = config.logit_distance.build(facts) if config.logit_distance else None

    def parts(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Return the parts of both branches × weight × ramp."""
        with autocast(student.logits, None):
            student, teacher = self.select_features(student, teacher)
            parts = self.feature_parts(student, teacher) | self.logit_parts(student, teacher, batch, progress)
            return self.scaled(parts | self.class_parts(student, teacher), progress)

    def level_denoiser(self, student: str, teacher: str) -> Denoiser:
        """Return the denoiser of a pair of taps of the feature branch."""
        c = self.config.feature
        student_C = channels(self.facts.student_shapes, student)
        teacher_C = channels(self.facts.teacher_shapes, teacher)
        latent = min(teacher_C // 2, 1024) if c.latent == "auto" else c.latent or teacher_C
        return self.map_denoiser(c, student_C, latent, None if c.latent is None else teacher_C)

    def class_map_denoiser(self, student: str, teacher: str) -> Denoiser:
        """Return the denoiser of a pair of taps of the branch of class maps, which has no autoencoder."""
        widths = channels(self.facts.student_shapes, student), channels(self.facts.teacher_shapes, teacher)
        return self.map_denoiser(self.config.class_maps, *widths)

    def map_denoiser(
        self, branch: FeatureBranch | ClassMapBranch, width: int, latent: int, encoded: int | None = None
    ) -> Denoiser:
        """Return a denoiser of a student's maps of ``width`` channels, by networks of ``latent`` channels.

        With ``encoded``, an autoencoder brings the teacher's maps of that many channels to those of the latent.
        """
        norm = self.config.diffusion.norm
        return Denoiser(
            self.config.diffusion,
            width,
            latent,
            predictor=map_predictor(latent, branch.predictor_reduction, norm),
            adapter=Bottleneck(latent, branch.adapter_reduction, norm),
            autoencoder=None if encoded is None else Autoencoder(encoded, latent, norm),
            autocast=self.facts.autocast,
        )

    def feature_parts(self, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        """Return the loss parts ``feature``, ``diffusion_feature`` and, with an autoencoder, ``autoencoder``."""
        if self.feature_denoiser is None:
            return {}
        c = self.config
        answers = denoise_levels(self.feature_denoiser, self.levels, student, teacher)
        distances = [F.mse_loss(answer.student_BCHW, answer.target_BCHW) for answer in answers]
        if c.feature.level_weight == "area":
            factors = relative_areas([answer.target_BCHW for answer in answers])
            distances = [factor * distance for factor, distance in zip(factors, distances, strict=True)]
        parts = {
            "feature": c.distance_weight * c.feature.weight * sum_levels(distances),
            "diffusion_feature": c.diffusion_weight * sum_levels([answer.diffusion_loss for answer in answers]),
        }
        if rebuilt := [answer.autoencoder_loss for answer in answers if answer.autoencoder_loss is not None]:
            parts["autoencoder"] = c.autoencoder_weight * sum_levels(rebuilt)
        return parts

    def class_parts(self, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        """Return the loss parts ``classes`` and ``diffusion_classes`` of a detector's maps of class logits."""
        if self.class_denoiser is None:
            return {}
        c, branch = self.config, self.config.class_maps
        answers = denoise_levels(self.class_denoiser, self.class_levels, student, teacher)
        rows = [(map_rows(answer.student_BCHW), map_rows(answer.target_BCHW)) for answer in answers]
        distances = [sigmoid_kd_loss(*both, temperature=branch.temperature) for both in rows]
        return {
            "classes": c.distance_weight * branch.weight * sum_levels(distances),
            "diffusion_classes": c.diffusion_weight * sum_levels([answer.diffusion_loss for answer in answers]),
        }

    def logit_parts(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Return the loss part ``diffusion_logit``, and the parts of the distance as ``logit_<name>``."""
        if self.logit_denoiser is None or self.logit_distance is None:
            return {}
        c = self.config
        denoised = self.logit_denoiser(_as_map(student.logits), _as_map(teacher.logits))
        logits = denoised.student_BCHW
        denoised_student = student._replace(logits=logits if student.logits.ndim == 4 else logits[:, :, 0, 0])
        distances = self.logit_distance.parts(denoised_student, teacher, batch, progress)
        parts = {f"logit_{name}": c.distance_weight * value for name, value in distances.items()}
        return parts | {"diffusion_logit": c.diffusion_weight * denoised.diffusion_loss}

    def observe(self, student: Outputs, teacher: Outputs | None) -> dict[str, Any]:
        """Return ``gamma`` and ``maps`` of the feature branch, and ``gamma_logits``, γ of the branch of the logits.

        Of several feature maps the first is shown. Without a teacher's answers, its map is left out: γ and the denoised
        student do not depend on its values.
        """
        known, seen = teacher is not None, {}
        teacher = teacher or _blank_outputs(self.facts, student.logits)
        with autocast(student.logits, None):
            student, teacher = self.select_features(student, teacher)
            if self.feature_denoiser is not None:
                first = level_networks(self.feature_denoiser)[0]
                observed = observe_denoiser(first, *level_maps(self.levels[0], student, teacher), seed=0)
                seen["gamma"] = observed.gamma
                seen["maps"] = {name: rows for name, rows in observed.maps.items() if known or name != "teacher"}
            if self.logit_denoiser is not None:
                logits = [_as_map(outputs.logits) for outputs in (student, teacher)]
                seen["gamma_logits"] = observe_denoiser(self.logit_denoiser, *logits, seed=0).gamma
        return seen


def level_maps(level: tuple[str, str], student: Outputs, teacher: Outputs) -> tuple[Tensor, Tensor]:
    """Return the maps of both networks at a level, at the smaller of their sizes."""
    return pool_to_smaller(student.features[level[0]], teacher.features[level[1]])


def denoise_levels(
    networks: nn.Module, levels: Sequence[tuple[str, str]], student: Outputs, teacher: Outputs
) -> list[Denoised]:
    """Return each level's answer of its denoiser."""
    pairs = zip(level_networks(networks), levels, strict=True)
    return [network(*level_maps(level, student, teacher)) for network, level in pairs]


def relative_areas(maps: Sequence[Tensor]) -> list[float]:
    """Return each map's number of pixels, divided by the mean number of all maps."""
    areas = [x_BCHW.shape[2] * x_BCHW.shape[3] for x_BCHW in maps]
    return [area * len(areas) / sum(areas) for area in areas]


def _as_map(logits: Tensor) -> Tensor:
    """Return logits [B, K] as a map [B, K, 1, 1], and a map as it is."""
    return logits[:, :, None, None] if logits.ndim == 2 else logits


def _blank_outputs(facts: Facts, like: Tensor) -> Outputs:
    """Return zeros in the shape of a teacher's outputs for as many images, whose logits are of the student's size."""
    zeros = {name: like.new_zeros(len(like), *shape) for name, shape in facts.teacher_shapes.items()}
    return Outputs(torch.zeros_like(like), zeros)  # a map of logits may be a tap, too


def logit_denoiser(config: DiffKD.Config, facts: Facts) -> Denoiser | None:
    """Return the denoiser of the logits, which has no autoencoder, or None if that branch is off."""
    c, norm, classes = config.logits, config.diffusion.norm, facts.num_classes
    if c is None:
        return None
    if isinstance(c, LogitBranch):
        predictor = logit_predictor(classes, c.predictor_expansion, norm)
        adapter: nn.Module = logit_adapter(classes, c.adapter_expansion, norm)
    else:
        if len(facts.student_shapes["logits"]) != 3:
            raise ValueError("logits.predictor_reduction: the logits are no map; give predictor_expansion instead")
        predictor = map_predictor(classes, c.predictor_reduction, norm)
        adapter = Bottleneck(classes, c.adapter_reduction, norm)
    return Denoiser(config.diffusion, classes, classes, predictor=predictor, adapter=adapter, autocast=facts.autocast)
