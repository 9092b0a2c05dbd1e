"""Several teachers whose answers are mixed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.batch import Batch, Outputs
from pipeline.features.taps import FeatureTaps
from pipeline.precision import promote_to_float32
from pipeline.teachers.frozen import Teacher


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
        self.member_logits: list[Tensor] = []
        """What each member answered last, in its own precision."""

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
        self.member_logits = [answer.logits_BK for answer in (first, *others)]
        logits_MBK = torch.stack([promote_to_float32(answer).logits_BK for answer in (first, *others)])
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
