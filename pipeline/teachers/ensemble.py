"""An ensemble of teachers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.batch import Batch, Outputs
from pipeline.features.taps import FeatureTaps
from pipeline.image_size import Resolution
from pipeline.precision import promote_to_float32
from pipeline.teachers._base import TeacherModule
from pipeline.teachers.frozen import Teacher


class TeacherEnsemble(TeacherModule):
    """A teacher that runs several teachers one after the other and mixes their softened outputs.

    Its logits are T·log Σ_m w_m·softmax(z_m/T). So KD at this T has the mixture itself as its target. Its gradient is
    that of the members' KD losses, weighted with w_m. Features come from the first member only. Architectures,
    precisions and normalisations may differ. Source: Hinton et al., 2015, arXiv:1503.02531, section 3; for the weights
    see ``member_weights``.
    """

    def __init__(self, members: list[Teacher], *, combine: str, temperature: float) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.combine = combine
        self.temperature = temperature
        self.norms = members[0].norms
        self.head_KD = None  # the mixed logits are no single layer's
        self.member_logits: list[Tensor] = []
        """The last logits of each member, in its own precision."""

    @property
    def taps(self) -> FeatureTaps:
        """Return the network of the first member, which provides the features."""
        return self.members[0].taps  # type: ignore[return-value]

    def shapes(self, image_size: Resolution) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the first member's taps and logits, without the batch."""
        return self.members[0].shapes(image_size)  # type: ignore[operator]

    def forward(self, batch: Batch) -> Outputs:
        """Return the mixture in at least float32, and the first member's features."""
        first, *others = (member(batch) for member in self.members)
        # Kept before the promotion to float32: the guard reads them to tell which member overflowed.
        self.member_logits = [outputs.logits_BK for outputs in (first, *others)]
        logits_MBK = torch.stack([promote_to_float32(outputs).logits_BK for outputs in (first, *others)])
        weights_MB = member_weights(logits_MBK, batch.labels_B, self.combine)
        log_p_MBK = (logits_MBK / self.temperature).log_softmax(2) + weights_MB.log().unsqueeze(2)
        return Outputs(self.temperature * log_p_MBK.logsumexp(0), first.features)


def member_weights(logits_MBK: Tensor, labels_B: Tensor, combine: str) -> Tensor:
    """Return each member's weight for each row [M, B]. The weights of a row sum to 1 over the members.

    ``mean``: 1/M. ``entropy``: (1 − H_m/ΣH)/(M − 1), H the entropy of the member's prediction (Kwon et al., ICASSP
    2020). ``confidence``: (1 − softmax_m(CE_m))/(M − 1), CE its cross-entropy with the label (CA-MKD, Zhang et al.,
    ICASSP 2022, arXiv:2201.00007, eq. 3). The weights use logits without temperature.
    """
    members = len(logits_MBK)
    if combine == "mean" or members == 1:  # the other formulas divide by M − 1
        return logits_MBK.new_full(logits_MBK.shape[:2], 1 / members)
    log_p_MBK = logits_MBK.log_softmax(2)
    if combine == "entropy":
        entropy_MB = -(log_p_MBK.exp() * log_p_MBK).sum(2)
        total_B = entropy_MB.sum(0)
        share_MB = torch.where(total_B > 0, entropy_MB / total_B, 1 / members)  # equal if all members are certain
    else:
        # A padded row of a validation batch has label −1, which gather would refuse. Its weight is never used.
        label_MB1 = labels_B.clamp(min=0).expand(members, -1).unsqueeze(2)
        share_MB = (-log_p_MBK.gather(2, label_MB1).squeeze(2)).softmax(0)
    return (1 - share_MB) / (members - 1)
