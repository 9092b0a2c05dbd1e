"""DiffKD: knowledge diffusion, Huang et al., NeurIPS 2023, arXiv:2305.15712.

A student's tensor is taken for a noisy teacher's, denoised by a diffusion model of the teacher's, and compared with it
only then: the last feature map by mean squared error, the logits by any loss of logits (KD in DiffKD, DKD in DDKD). The
networks that do it are trained with the student and left out at export; the student itself is unchanged.

    L = λ1·(L_diff of both branches) + λ2·L_ae + λ3·(w·MSE(feature) + the logits' distance)

B batch, C channels, H W space, K classes.
"""

from typing import Literal, Self

import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveInt, model_validator
from torch import Tensor

from pipeline.batch import Batch, Outputs, Progress
from pipeline.diffusion.config import Diffusion
from pipeline.diffusion.denoiser import Denoiser
from pipeline.diffusion.networks import Autoencoder, Bottleneck, logit_adapter, logit_predictor, map_predictor
from pipeline.frozen_model import FrozenModel
from pipeline.losses._base import Facts, Loss, Taps
from pipeline.losses._functional import pool_to_smaller
from pipeline.losses._registry import InnerLoss
from pipeline.losses._stages import StageChoice, channels, stage_names, stage_taps
from pipeline.precision import autocast


class FeatureBranch(FrozenModel):
    """The branch of a feature map."""

    stage: StageChoice = "last"
    """Tap of the networks; maps of different size are averaged down to the smaller."""
    latent: PositiveInt | Literal["auto"] | None = None
    """Width of the autoencoder's latent: ``auto`` is half the teacher's, at most 1024; none is no autoencoder."""
    predictor_reduction: PositiveInt
    adapter_reduction: PositiveInt
    weight: NonNegativeFloat = 1.0
    """Weight of the distance, beside λ3; that of the logits stands in ``logit_distance``."""


class LogitBranch(FrozenModel):
    """The branch of the logits, which are a map of K channels and one pixel to it."""

    predictor_expansion: PositiveInt
    adapter_expansion: PositiveInt


class DiffKD(Loss):
    """Distances from the teacher after denoising, and the losses that train the denoiser.

    Its BatchNorms always take the batch's statistics, and over the logits they see one value a row: every rank needs at
    least two rows.
    """

    scope = "statistics"

    class Config(Loss.Config):
        """See ``configs/methods/diffkd.yaml`` and ``ddkd.yaml``. A branch that is not there is off."""

        diffusion: Diffusion
        feature: FeatureBranch | None = None
        logits: LogitBranch | None = None
        logit_distance: InnerLoss | None = None
        """Loss taken of the denoised student's logits and the teacher's; its weight and ramp act beside λ3."""
        diffusion_weight: NonNegativeFloat
        """λ1."""
        autoencoder_weight: NonNegativeFloat
        """λ2."""
        distance_weight: NonNegativeFloat
        """λ3."""

        @model_validator(mode="after")
        def _branches_fit(self) -> Self:
            if (self.logits is None) != (self.logit_distance is None):
                raise ValueError("logits and logit_distance go together: give both or neither")
            if self.feature is None and self.logits is None:
                raise ValueError("there is neither feature nor logits: nothing is distilled")
            return self

        def taps(self) -> Taps:
            """Return the feature branch's tap and those of the logits' distance."""
            own = stage_taps(self.feature.stage) if self.feature else Taps()
            return own.union(self.logit_distance.config.taps() if self.logit_distance else Taps())

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        self.feature_denoiser = feature_denoiser(config, facts)
        self.logit_denoiser = logit_denoiser(config, facts)
        self.logit_distance = config.logit_distance.build(facts) if config.logit_distance else None

    def parts(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Return the branches' parts, × weight × ramp."""
        with autocast(student.logits_BK, None):
            student, teacher = self.select_features(student, teacher)
            parts = self.feature_parts(student, teacher) | self.logit_parts(student, teacher, batch, progress)
            return self.scaled(parts, progress)

    def feature_parts(self, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        """Return ``feature``, ``diffusion_feature`` and, with an autoencoder, ``autoencoder``."""
        if self.feature_denoiser is None:
            return {}
        c = self.config
        of_student, of_teacher = stage_names(c.feature.stage)
        denoised = self.feature_denoiser(*pool_to_smaller(student.features[of_student], teacher.features[of_teacher]))
        distance = F.mse_loss(denoised.student_BCHW, denoised.target_BCHW)
        parts = {
            "feature": c.distance_weight * c.feature.weight * distance,
            "diffusion_feature": c.diffusion_weight * denoised.diffusion_loss,
        }
        if denoised.autoencoder_loss is not None:
            parts["autoencoder"] = c.autoencoder_weight * denoised.autoencoder_loss
        return parts

    def logit_parts(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Return ``diffusion_logit`` and the distance's parts as ``logit_<name>``."""
        if self.logit_denoiser is None or self.logit_distance is None:
            return {}
        c = self.config
        denoised = self.logit_denoiser(student.logits_BK[:, :, None, None], teacher.logits_BK[:, :, None, None])
        seen = student._replace(logits_BK=denoised.student_BCHW[:, :, 0, 0])
        distances = self.logit_distance.parts(seen, teacher, batch, progress)
        parts = {f"logit_{name}": c.distance_weight * value for name, value in distances.items()}
        return parts | {"diffusion_logit": c.diffusion_weight * denoised.diffusion_loss}


def feature_denoiser(config: DiffKD.Config, facts: Facts) -> Denoiser | None:
    """Return the denoiser of the feature map, None where that branch is off."""
    c, norm = config.feature, config.diffusion.norm
    if c is None:
        return None
    student, teacher = stage_names(c.stage)
    student_C, teacher_C = (channels(facts.student_shapes, student), channels(facts.teacher_shapes, teacher))
    latent = min(teacher_C // 2, 1024) if c.latent == "auto" else c.latent or teacher_C
    return Denoiser(
        config.diffusion,
        student_C,
        latent,
        predictor=map_predictor(latent, c.predictor_reduction, norm),
        adapter=Bottleneck(latent, c.adapter_reduction, norm),
        autoencoder=None if c.latent is None else Autoencoder(teacher_C, latent, norm),
        autocast=facts.autocast,
    )


def logit_denoiser(config: DiffKD.Config, facts: Facts) -> Denoiser | None:
    """Return the denoiser of the logits, which has no autoencoder; None where that branch is off."""
    c, norm, classes = config.logits, config.diffusion.norm, facts.num_classes
    if c is None:
        return None
    return Denoiser(
        config.diffusion,
        classes,
        classes,
        predictor=logit_predictor(classes, c.predictor_expansion, norm),
        adapter=logit_adapter(classes, c.adapter_expansion, norm),
        autocast=facts.autocast,
    )
