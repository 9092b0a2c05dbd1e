"""DDKD: decoupled knowledge distillation based on a diffusion model, Wang and Zhu, 计算机系统应用 33(9), 2024, eq. 10.

The feature map and the logits are denoised as in DiffKD, and the logits' distance is decoupled: DKD, or DKD on
perception matrices, in place of the KL divergence. The paper leaves open whether the logits have a diffusion of their
own or come from the denoised features. Here they have their own: under eq. 8 it names a distance of features and one of
logits side by side, as DiffKD does.
"""

from pipeline.losses.diffkd import DiffKD


class DDKD(DiffKD):
    """DiffKD with ``logit_distance: {dkd: {…}}``; recipe keys, parts and networks are DiffKD's."""
