"""Contrastive representation distillation, Tian et al., ICLR 2020, arXiv:1910.10699, eq. 11 to 18.

Student and teacher each have a linear layer that embeds their features on the unit sphere. Each network has a bank with
the embeddings of all training samples. An embedding e of a sample, the anchor, is compared with rows m of the *other*
network's bank. They are the sample's own row (k = 0), and K rows of samples of other classes, the negatives. The loss
classifies which of them is the sample's own:

    L = −mean[ log P₀/(P₀ + κ + ε) + Σ_k log κ/(P_k + κ + ε) ]

    P = exp(e·m/τ)/Z,   κ = K/N,   summed over the student's and the teacher's anchors

Z is N times the mean of exp(e·m/τ) in the first global batch, and stays fixed after it. After each batch, its rows of
the banks become μ·m + (1 − μ)·e, normalised.

Memory: every rank holds two banks of [ids, D] in float32, and a checkpoint holds them once. With D = 128 they take 51
MB for CIFAR and 1.31 GB for ImageNet. Scores are computed against the whole bank, which takes 13 MB for 64 rows of
CIFAR. If that needs more than LARGEST_MATRIX numbers (256 MB; ImageNet from 53 rows on), candidate rows are gathered
instead. They are gathered in chunks of at most LARGEST_GATHER numbers (64 MB) or of one anchor, and again in backward.

Negatives are drawn uniformly with replacement, on the device. The authors draw without replacement for CIFAR. Each
sample is equally likely either way, so the expected gradient is the same. With replacement, fewer than K samples of
other classes need no special case.

B batch, D embedding, J = 1 + K candidates of a row, N rows of a bank. In suffixes, K alone is the number of classes.
"""

from math import log, log1p
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from pipeline.batch import Batch, Outputs
from pipeline.distributed.collectives import all_reduce_mean, gather_rows, world_size
from pipeline.losses._base import Facts, Loss, Taps
from pipeline.losses._stages import StageChoice, stage_pair, stage_taps
from pipeline.precision import checkpointed

_EPS = 1e-7
"""ε of the published loss."""
LARGEST_MATRIX = 2**26
"""Most similarities that are computed against the whole bank at once."""
LARGEST_GATHER = 2**24
"""Most numbers that are gathered from the bank at once."""


def contrast(scores_BJ: Tensor, normalizer: Tensor, *, samples: int) -> Tensor:
    """Return one anchor's loss from its scores e·m/τ, the row's own sample first.

    ``normalizer`` is Z and ``samples`` is N. The published loss is rewritten without its exponentials, ε included:
    P/(P + κ + ε) = σ(log P − log(κ + ε)).
    """
    negatives = scores_BJ.shape[1] - 1
    kappa = negatives / samples
    logits_BJ = scores_BJ - normalizer.log() - log(kappa + _EPS)
    positive_B, negative_B = F.logsigmoid(logits_BJ[:, 0]), F.logsigmoid(-logits_BJ[:, 1:]).sum(1)
    # The first term is constant. It comes from κ/(P + κ + ε), which is κ/(κ + ε) times the sigmoid (κ + ε)/(P + κ + ε).
    return negatives * log1p(_EPS / kappa) - (positive_B + negative_B).mean()


def bank_similarities(anchor_BD: Tensor, bank_ND: Tensor, index_BJ: Tensor) -> Tensor:
    """Return e·m of each anchor and its candidates [B, J], by the fastest way that fits in memory."""
    if len(anchor_BD) * len(bank_ND) <= LARGEST_MATRIX:
        return by_matrix(anchor_BD, bank_ND, index_BJ)
    return by_rows(anchor_BD, bank_ND, index_BJ)


def by_matrix(anchor_BD: Tensor, bank_ND: Tensor, index_BJ: Tensor) -> Tensor:
    """Return the candidates' similarities, picked from those with the whole bank.

    For CIFAR this is at least twelve times as fast as gathering rows.
    """
    # A candidate that was drawn twice sends two equal gradients, so a GPU may add them in any order: still
    # reproducible.
    return (anchor_BD @ bank_ND.T).gather(1, index_BJ)


def by_rows(anchor_BD: Tensor, bank_ND: Tensor, index_BJ: Tensor) -> Tensor:
    """Return the candidates' similarities from gathered rows of the bank, one chunk of anchors at a time.

    Backward gathers the rows again, so that they are not kept in memory until then.
    """
    rows = max(LARGEST_GATHER // (index_BJ.shape[1] * bank_ND.shape[1]), 1)
    chunks = zip(anchor_BD.split(rows), index_BJ.split(rows), strict=True)
    return torch.cat([checkpointed(_gathered, anchor, bank_ND, index) for anchor, index in chunks])


def _gathered(anchor_BD: Tensor, bank_ND: Tensor, index_BJ: Tensor) -> Tensor:
    return torch.einsum("bd,bjd->bj", anchor_BD, bank_ND[index_BJ])


@torch.no_grad()
def update_bank_(bank_ND: Tensor, ids_B: Tensor, embeddings_BD: Tensor, momentum: float) -> None:
    """Move the bank's rows with these ids towards the embeddings, in place, and normalise them.

    If an id occurs twice, its last embedding counts. A row that would not be finite is left unchanged.
    """
    # For each row, the last row with the same id. Repeated ids then write equal values, in whatever order.
    sorted_B, order_B = ids_B.sort(stable=True)
    last_B = order_B[torch.searchsorted(sorted_B, ids_B, right=True) - 1]
    old_BD = bank_ND[ids_B]
    new_BD = F.normalize(momentum * old_BD + (1 - momentum) * embeddings_BD[last_B].to(bank_ND.dtype))
    bank_ND.index_copy_(0, ids_B, torch.where(new_BD.isfinite().all(1, keepdim=True), new_BD, old_BD))


def in_global_order(gathered: Tensor) -> Tensor:
    """Return the rows of all ranks, which are gathered rank by rank, in the order of the global batch.

    A rank has every ``world_size()``-th row. With ``data.repeat``, an id is several times in a batch. The embedding
    that counts must then be the same one for any number of ranks.
    """
    return gathered.unflatten(0, (world_size(), -1)).transpose(0, 1).flatten(0, 1)


class NegativeSampler(nn.Module):
    """A sampler that draws samples of other classes than the row's, uniformly and with replacement."""

    ids_N: Tensor
    """The ids of the training samples, sorted by label."""
    first_K: Tensor
    """Index of each class's first sample in ``ids_N``."""
    count_K: Tensor
    """Number of samples of each class."""

    def __init__(self, labels_by_id: np.ndarray, num_classes: int) -> None:
        super().__init__()
        present = labels_by_id >= 0
        count_K = np.bincount(labels_by_id[present], minlength=num_classes)
        if count_K.max(initial=0) == present.sum():
            raise ValueError("crd: negatives are samples of other classes, but all training samples are of one class")
        ids_N = labels_by_id.argsort(kind="stable")[np.count_nonzero(~present) :]
        for name, table in {"ids_N": ids_N, "first_K": count_K.cumsum() - count_K, "count_K": count_K}.items():
            self.register_buffer(name, torch.from_numpy(table.astype(np.int64)), persistent=False)

    def forward(self, labels_B: Tensor, number: int) -> Tensor:
        """Return ``number`` ids for each row [B, number], from torch's default generator of the labels' device."""
        count_B1, first_B1 = self.count_K[labels_B].unsqueeze(1), self.first_K[labels_B].unsqueeze(1)
        # Each row has its own upper bound, which randint cannot take. The remainder of a number below 2⁶² is uniform to
        # 13 digits and more.
        index_BJ = torch.randint(2**62, (len(labels_B), number), device=labels_B.device) % (len(self.ids_N) - count_B1)
        # Indices from the row's own class on are shifted past that class.
        return self.ids_N[index_BJ + count_B1 * (index_BJ >= first_B1)]


class Pending(NamedTuple):
    """The results of a forward that wait for ``commit``."""

    ids_B: Tensor
    embeddings_B2D: Tensor
    """Embeddings of the student and the teacher, side by side."""
    normalizers_2: Tensor
    """Z of the student's and the teacher's anchors."""


class CRD(Loss):
    """The contrastive loss of both networks' anchors.

    A rank scores its own rows; banks and normalisers are the same on every rank. Under gradient accumulation, each
    micro-batch of the first batch is normalised by its own Z. Their mean is then kept.
    """

    scope = "statistics"

    class Config(Loss.Config):
        """The config of CRD; ``configs/methods/crd.yaml`` has the published values."""

        stage: StageChoice = "embedding"
        """Stage of both networks whose features are embedded."""
        dim: PositiveInt
        """Dimension D of the embeddings."""
        negatives: PositiveInt
        """Number K of negatives for each row."""
        temperature: PositiveFloat
        """Temperature τ of the scores."""
        momentum: float = Field(ge=0, lt=1)
        """Share μ of a bank's old row that is kept in an update."""

        def taps(self) -> Taps:
            """Return the taps that are embedded."""
            return stage_taps(self.stage)

        def reads_head(self) -> bool:
            """Return False: only features are compared."""
            return False

    student_bank: Tensor
    teacher_bank: Tensor
    normalizers: Tensor
    """Z of the student's and the teacher's anchors; 0 before the first commit."""

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        assert facts.labels_by_id is not None
        self.student_tap, self.teacher_tap = stage_pair(config.stage, facts)
        self.student_head = nn.Linear(width(facts.student_shapes, self.student_tap), config.dim)
        self.teacher_head = nn.Linear(width(facts.teacher_shapes, self.teacher_tap), config.dim)
        self.others = NegativeSampler(facts.labels_by_id, facts.num_classes)
        self.samples = len(self.others.ids_N)
        for name in ("student_bank", "teacher_bank"):
            # Uniform with variance 1/D, so that rows have a length of about one, as the embeddings have.
            bank_ND = torch.empty(facts.id_count, config.dim).uniform_(-1, 1) * (3 / config.dim) ** 0.5
            self.register_buffer(name, bank_ND)
        self.register_buffer("normalizers", torch.zeros(2))
        self.settled = False
        self.pending: list[Pending] = []

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the loss parts ``student`` and ``teacher``: the losses of the two networks' anchors."""
        c = self.config
        student_BD = F.normalize(self.autocast_call(self.student_head, student.features[self.student_tap]))
        teacher_BD = F.normalize(self.autocast_call(self.teacher_head, teacher.features[self.teacher_tap].detach()))
        index_BJ = torch.cat([batch.ids_B.unsqueeze(1), self.others(batch.labels_B, c.negatives)], 1)
        scores = [
            bank_similarities(student_BD, self.teacher_bank, index_BJ) / c.temperature,
            bank_similarities(teacher_BD, self.student_bank, index_BJ) / c.temperature,
        ]
        normalizers_2 = self.fixed_normalizers(scores)
        # Only noted here: the banks change in ``commit``, so that ``forward`` gives the same result when run again.
        if self.training:
            self.pending.append(Pending(batch.ids_B, torch.cat([student_BD, teacher_BD], 1).detach(), normalizers_2))
        of_student, of_teacher = (
            contrast(scores_BJ, z, samples=self.samples) for scores_BJ, z in zip(scores, normalizers_2, strict=True)
        )
        return {"student": of_student, "teacher": of_teacher}

    @torch.no_grad()
    def fixed_normalizers(self, scores: list[Tensor]) -> Tensor:
        """Return both stored Z or, before the first commit, those of these scores over all ranks."""
        if self.settled:
            return self.normalizers.clone()
        measured_2 = self.samples * all_reduce_mean(torch.stack([scores_BJ.exp().mean() for scores_BJ in scores]))
        return self.stored_or(measured_2)

    def stored_or(self, measured_2: Tensor) -> Tensor:
        """Return the stored normalisers, or ``measured_2`` if none are stored yet."""
        # Decided on the device: a Python ``if`` would make the host wait for a GPU.
        return torch.where(self.normalizers > 0, self.normalizers, measured_2.to(self.normalizers.dtype))

    @torch.no_grad()
    def commit(self) -> None:
        """Store the normalisers, and update the banks with the global batch's embeddings, equally on every rank."""
        if not self.pending:
            return
        ids_B = in_global_order(gather_rows(torch.cat([micro.ids_B for micro in self.pending]), equal=True))
        both_B2D = torch.cat([micro.embeddings_B2D for micro in self.pending])
        of_both_B2D = in_global_order(gather_rows(both_B2D, equal=True))
        of_student_BD, of_teacher_BD = of_both_B2D.chunk(2, 1)
        update_bank_(self.student_bank, ids_B, of_student_BD, self.config.momentum)
        update_bank_(self.teacher_bank, ids_B, of_teacher_BD, self.config.momentum)
        self.normalizers.copy_(self.stored_or(torch.stack([micro.normalizers_2 for micro in self.pending]).mean(0)))
        # State of this process, not of the checkpoint. From now on it saves the all-reduce, without reading the device.
        self.settled = True
        self.pending.clear()


def width(shapes: dict[str, tuple[int, ...]], tap: str) -> int:
    """Return the length of a tap that is a vector. Raises ValueError if it is not a vector."""
    if len(shapes[tap]) != 1:
        raise ValueError(
            f"crd: the tap {tap!r} is shaped {list(shapes[tap])}, but a vector such as embedding is needed"
        )
    return shapes[tap][0]
