"""Contrastive representation distillation, Tian et al., ICLR 2020, arXiv:1910.10699, eq. 11 to 18.

Student and teacher embed their features on a sphere, with a linear layer each. A bank of each network holds what every
training sample was embedded as; each network's embedding of a sample (the anchor) is told from the *other* network's
bank which row is the same sample's and which K are noise, drawn from the samples of other classes:

    L = −mean[ log P₀/(P₀ + κ + ε) + Σ_k log κ/(P_k + κ + ε) ]   for both anchors,   P = exp(e·m/τ)/Z,   κ = K/N

Z, N times the mean of exp(e·m/τ), is that of the first global batch ever after. After a batch its rows of the banks
become μ·m + (1 − μ)·e, normalised.

Memory: two banks of [ids, D] float32 on every rank, 51 MB for CIFAR and 1.31 GB for ImageNet with D = 128, and once in
a checkpoint. A rank's scores are taken against the whole bank (64 rows of CIFAR: 13 MB) or, where that would be more
than LARGEST_MATRIX numbers (256 MB; ImageNet from 53 rows on), against gathered rows: LARGEST_GATHER numbers (64 MB) or
one anchor's at a time, and once more in the backward.

Noise is drawn with replacement, uniformly, on the device. The authors draw without for CIFAR, which leaves the expected
gradient as it is: each sample is as likely; and a class of other samples fewer than K is no special case.

B batch, D embedding, J = 1 + K candidates of a row, N rows of a bank, K (alone) classes.
"""

from math import log, log1p
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from pipeline.batch import Batch, Outputs
from pipeline.distributed.collectives import all_reduce_mean, gather_rows
from pipeline.losses._base import Facts, Loss, Taps
from pipeline.losses._stages import StageChoice, stage_names, stage_taps
from pipeline.precision import checkpointed

_EPS = 1e-7
"""ε of the published form."""
LARGEST_MATRIX = 2**26
LARGEST_GATHER = 2**24


def contrast(scores_BJ: Tensor, normalizer: Tensor, *, samples: int) -> Tensor:
    """Return one anchor's loss from its scores e·m/τ, a row's own sample first, with Z and the number of samples N.

    The published form rewritten, ε included, without its exponentials: P/(P + κ + ε) = σ(log P − log(κ + ε)).
    """
    noise = scores_BJ.shape[1] - 1
    kappa = noise / samples
    logits_BJ = scores_BJ - normalizer.log() - log(kappa + _EPS)
    own_B, noise_B = F.logsigmoid(logits_BJ[:, 0]), F.logsigmoid(-logits_BJ[:, 1:]).sum(1)
    return noise * log1p(_EPS / kappa) - (own_B + noise_B).mean()


def bank_similarities(anchor_BD: Tensor, bank_ND: Tensor, index_BJ: Tensor) -> Tensor:
    """Return e·m of each anchor and its candidates [B, J], by way of what fits in memory."""
    if len(anchor_BD) * len(bank_ND) <= LARGEST_MATRIX:
        return by_matrix(anchor_BD, bank_ND, index_BJ)
    return by_rows(anchor_BD, bank_ND, index_BJ)


def by_matrix(anchor_BD: Tensor, bank_ND: Tensor, index_BJ: Tensor) -> Tensor:
    """Compare with the whole bank and pick: for CIFAR twelve and more times as fast as gathering rows."""
    # What was drawn twice sends two equal gradients, so that a GPU may add them in any order.
    return (anchor_BD @ bank_ND.T).gather(1, index_BJ)


def by_rows(anchor_BD: Tensor, bank_ND: Tensor, index_BJ: Tensor) -> Tensor:
    """Gather the candidates, a chunk of anchors at a time; the backward gathers again, and nothing is kept between."""
    rows = max(LARGEST_GATHER // (index_BJ.shape[1] * bank_ND.shape[1]), 1)
    chunks = zip(anchor_BD.split(rows), index_BJ.split(rows), strict=True)
    return torch.cat([checkpointed(_gathered, anchor, bank_ND, index) for anchor, index in chunks])


def _gathered(anchor_BD: Tensor, bank_ND: Tensor, index_BJ: Tensor) -> Tensor:
    return torch.einsum("bd,bjd->bj", anchor_BD, bank_ND[index_BJ])


@torch.no_grad()
def update_bank_(bank_ND: Tensor, ids_B: Tensor, embeddings_BD: Tensor, momentum: float) -> None:
    """Move the bank's rows of those ids towards the embeddings, in place, and back onto the sphere.

    Of an id that comes twice the last row counts, whatever the order of writing: all its rows write the same. A
    row that is not finite changes nothing.
    """
    sorted_B, order_B = ids_B.sort(stable=True)
    last_B = order_B[torch.searchsorted(sorted_B, ids_B, right=True) - 1]
    old_BD = bank_ND[ids_B]
    new_BD = F.normalize(momentum * old_BD + (1 - momentum) * embeddings_BD[last_B].to(bank_ND.dtype))
    bank_ND.index_copy_(0, ids_B, torch.where(new_BD.isfinite().all(1, keepdim=True), new_BD, old_BD))


class NegativeSampler(nn.Module):
    """Draws samples of other classes than a row's own, uniformly and with replacement."""

    ids_N: Tensor
    """The ids that there are, sorted by label."""
    first_K: Tensor
    """Where a class begins in ``ids_N``."""
    count_K: Tensor

    def __init__(self, labels_by_id: np.ndarray, num_classes: int) -> None:
        super().__init__()
        present = labels_by_id >= 0
        count_K = np.bincount(labels_by_id[present], minlength=num_classes)
        if count_K.max(initial=0) == present.sum():
            raise ValueError("crd: its negatives are samples of other classes, and all training samples are of one")
        ids_N = labels_by_id.argsort(kind="stable")[np.count_nonzero(~present) :]
        for name, table in {"ids_N": ids_N, "first_K": count_K.cumsum() - count_K, "count_K": count_K}.items():
            self.register_buffer(name, torch.from_numpy(table.astype(np.int64)), persistent=False)

    def forward(self, labels_B: Tensor, number: int) -> Tensor:
        """Return that many ids for each row [B, number], from torch's default generator of the labels' device."""
        own_B1, first_B1 = self.count_K[labels_B].unsqueeze(1), self.first_K[labels_B].unsqueeze(1)
        # A row's own bound, which randint cannot take; of 2⁶² numbers the remainder is uniform to 13 digits and more.
        place_BJ = torch.randint(2**62, (len(labels_B), number), device=labels_B.device) % (len(self.ids_N) - own_B1)
        return self.ids_N[place_BJ + own_B1 * (place_BJ >= first_B1)]


class Pending(NamedTuple):
    """What a forward leaves for ``commit``."""

    ids_B: Tensor
    embeddings_B2D: Tensor
    """The student's and the teacher's, side by side."""
    normalizers_2: Tensor


class CRD(Loss):
    """The contrast of both anchors. A rank scores its own rows; banks and normalisers are the same on every rank.

    Under gradient accumulation each micro-batch of the first batch is normalised by its own Z, and their mean stays.
    """

    scope = "statistics"

    class Config(Loss.Config):
        """See ``configs/methods/crd.yaml``."""

        stage: StageChoice = "embedding"
        dim: PositiveInt
        """D."""
        negatives: PositiveInt
        """K."""
        temperature: PositiveFloat
        """τ."""
        momentum: float = Field(ge=0, lt=1)
        """μ: how much of a bank's row stays when its sample is seen."""

        def taps(self) -> Taps:
            """Return the tap that is embedded."""
            return stage_taps(self.stage)

    student_bank: Tensor
    teacher_bank: Tensor
    normalizers: Tensor
    """Z of the student's and of the teacher's anchors; 0 before the first batch."""

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        assert facts.labels_by_id is not None
        self.student_tap, self.teacher_tap = stage_names(config.stage)
        self.student_head = nn.Linear(width(facts.student_shapes, self.student_tap), config.dim)
        self.teacher_head = nn.Linear(width(facts.teacher_shapes, self.teacher_tap), config.dim)
        self.others = NegativeSampler(facts.labels_by_id, facts.num_classes)
        self.samples = len(self.others.ids_N)
        for name in ("student_bank", "teacher_bank"):
            # A variance of 1/D: rows of about the length one.
            bank_ND = torch.empty(facts.id_count, config.dim).uniform_(-1, 1) * (3 / config.dim) ** 0.5
            self.register_buffer(name, bank_ND)
        self.register_buffer("normalizers", torch.zeros(2))
        self.settled = False
        self.pending: list[Pending] = []

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return ``student`` and ``teacher``, the losses of their anchors."""
        c = self.config
        student_BD = F.normalize(self.autocast_call(self.student_head, student.features[self.student_tap]))
        teacher_BD = F.normalize(self.autocast_call(self.teacher_head, teacher.features[self.teacher_tap].detach()))
        index_BJ = torch.cat([batch.ids_B.unsqueeze(1), self.others(batch.labels_B, c.negatives)], 1)
        scores = [
            bank_similarities(student_BD, self.teacher_bank, index_BJ) / c.temperature,
            bank_similarities(teacher_BD, self.student_bank, index_BJ) / c.temperature,
        ]
        normalizers_2 = self.normalizers_of(scores)
        if self.training:
            self.pending.append(Pending(batch.ids_B, torch.cat([student_BD, teacher_BD], 1).detach(), normalizers_2))
        of_student, of_teacher = (
            contrast(scores_BJ, z, samples=self.samples) for scores_BJ, z in zip(scores, normalizers_2, strict=True)
        )
        return {"student": of_student, "teacher": of_teacher}

    @torch.no_grad()
    def normalizers_of(self, scores: list[Tensor]) -> Tensor:
        """Return both Z: those that are kept or, before the first commit, those of these scores over all ranks."""
        if self.settled:
            return self.normalizers.clone()
        measured_2 = self.samples * all_reduce_mean(torch.stack([scores_BJ.exp().mean() for scores_BJ in scores]))
        return self.stored_or(measured_2)

    def stored_or(self, measured_2: Tensor) -> Tensor:
        """Return the normalisers that are kept, where there are any. The host need not know."""
        return torch.where(self.normalizers > 0, self.normalizers, measured_2.to(self.normalizers.dtype))

    @torch.no_grad()
    def commit(self) -> None:
        """Fix the normalisers, and put the global batch's embeddings into the banks, on every rank the same."""
        if not self.pending:
            return
        ids_B = gather_rows(torch.cat([seen.ids_B for seen in self.pending]), equal=True)
        of_both_B2D = gather_rows(torch.cat([seen.embeddings_B2D for seen in self.pending]), equal=True)
        of_student_BD, of_teacher_BD = of_both_B2D.chunk(2, 1)
        update_bank_(self.student_bank, ids_B, of_student_BD, self.config.momentum)
        update_bank_(self.teacher_bank, ids_B, of_teacher_BD, self.config.momentum)
        self.normalizers.copy_(self.stored_or(torch.stack([seen.normalizers_2 for seen in self.pending]).mean(0)))
        # Of this process: it spares the sum over the ranks from now on, without asking the device.
        self.settled = True
        self.pending.clear()


def width(shapes: dict[str, tuple[int, ...]], tap: str) -> int:
    """Return the length of a tap that is a vector. Raises ValueError where it is none."""
    if len(shapes[tap]) != 1:
        raise ValueError(f"crd: the tap {tap!r} is shaped {list(shapes[tap])}, and a vector is needed, as embedding is")
    return shapes[tap][0]
