"""DDKD: decoupled knowledge distillation based on a diffusion model, Wang and Zhu, 计算机系统应用 33(9), 2024, eq. 10.

The feature map and the logits are denoised as in DiffKD. The distance of the logits is decoupled: it is DKD instead of
the KL divergence.

    L = λ1·(L_diff of both branches) + λ2·L_ae + λ3·(w·MSE(feature) + DKD(logits))

The paper does not say whether the logits have their own diffusion model or come from the denoised features. Here they
have their own, because the text under eq. 8 names a distance of features and one of logits side by side, as DiffKD
does.
"""

from typing import Self

from pydantic import model_validator

from pipeline.losses._registry import InnerLoss
from pipeline.losses.diffkd import DiffKD, LogitBranch, LogitMapBranch


class DDKD(DiffKD):
    """DiffKD with required denoising and comparison of the logits. Its parts and networks are those of DiffKD."""

    class Config(DiffKD.Config):
        """The config of DDKD; ``configs/methods/ddkd.yaml`` has the published values.

        ``logits`` and ``logit_distance`` are required. The distance is DKD, or a loss that wraps it. The branch of the
        feature map may be off.
        """

        logits: LogitBranch | LogitMapBranch | None = None
        """Branch that denoises the logits; required."""
        logit_distance: InnerLoss | None = None
        """Loss between the student's denoised logits and the teacher's: DKD, or a loss that wraps it; required."""

        @model_validator(mode="after")
        def _branches_fit(self) -> Self:
            missing = [key for key in ("logits", "logit_distance") if getattr(self, key) is None]
            if missing:
                raise ValueError(f"{missing[0]} is required, because DDKD denoises and compares logits; or use diffkd")
            return self
