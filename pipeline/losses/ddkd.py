"""DDKD: decoupled knowledge distillation based on a diffusion model, Wang and Zhu, 计算机系统应用 33(9), 2024, eq. 10.

The feature map and the logits are denoised as in DiffKD, and the distance of the logits is decoupled: DKD in place of
the KL divergence.

    L = λ1·(L_diff of both branches) + λ2·L_ae + λ3·(w·MSE(feature) + DKD(logits))

The paper leaves open whether the logits have a diffusion of their own or come from the denoised features. Here they
have their own: under eq. 8 it names a distance of features and one of logits side by side, as DiffKD does.
"""

from typing import Self

from pydantic import model_validator

from pipeline.losses.diffkd import DiffKD


class DDKD(DiffKD):
    """DiffKD whose logits are always denoised and compared; parts and networks are DiffKD's."""

    class Config(DiffKD.Config):
        """See ``configs/methods/ddkd.yaml``. ``logits`` and ``logit_distance`` are required: DKD, or a loss around it.

        The branch of the feature map may be off.
        """

        @model_validator(mode="after")
        def _branches_fit(self) -> Self:
            missing = [key for key in ("logits", "logit_distance") if getattr(self, key) is None]
            if missing:
                raise ValueError(f"{missing[0]} is required: DDKD denoises and compares logits; diffkd may do without")
            return self
