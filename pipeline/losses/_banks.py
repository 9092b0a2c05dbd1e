"""Memory banks: the embeddings of all training samples, which losses of contrast compare a batch with.

Student and teacher each have a linear layer that embeds their features on the unit sphere, and a bank [ids, D] in
float32. With D = 128, both banks take 51 MB for CIFAR and 1.31 GB for ImageNet, on every rank and once in a checkpoint.
After each batch its rows of the banks become μ·m + (1 − μ)·e, normalised.

Negatives are drawn uniformly with replacement, on the device, among the samples of other classes.

B batch, D embedding, J = 1 + K candidates of a row, N rows of a bank. In suffixes, K alone is the number of classes.
"""

from __future__ import annotations

from collections.abc import Callable
from math import log, log1p
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from pipeline.batch import Batch, Outputs
from pipeline.distributed.collectives import all_reduce_mean, gather_rows
from pipeline.losses._base import Facts, Loss
from pipeline.losses._rows import in_global_order
from pipeline.losses._stages import StageChoice, StageConfig, stage_pair, vector_width

EPSILON = 1e-7
"""ε of the published losses."""
LARGEST_GATHER = 2**24
"""Most numbers that are gathered from the bank at once."""


def contrast(scores_BJ: Tensor, normalizer: Tensor, *, samples: int, weights_B: Tensor | None = None) -> Tensor:
    """Return one network's loss from the scores of its rows, such as e·m/τ, the row's own sample first.

    It is the mean over the rows, or their sum with ``weights_B``. ``normalizer`` is Z and ``samples`` is N. The
    published loss is rewritten without its exponentials, ε included: P/(P + κ + ε) = σ(log P − log(κ + ε)).
    """
    negatives = scores_BJ.shape[1] - 1
    kappa = negatives / samples
    logits_BJ = scores_BJ - normalizer.log() - log(kappa + EPSILON)
    positive_B, negative_B = F.logsigmoid(logits_BJ[:, 0]), F.logsigmoid(-logits_BJ[:, 1:]).sum(1)
    # The first term is constant. It comes from κ/(P + κ + ε), which is κ/(κ + ε) times the sigmoid (κ + ε)/(P + κ + ε).
    constant = negatives * log1p(EPSILON / kappa)
    if weights_B is not None:
        return ((constant - positive_B - negative_B) * weights_B).sum()
    return constant - (positive_B + negative_B).mean()


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
            raise ValueError("negatives are samples of other classes, but all training samples are of one class")
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


class BankLoss(Loss):
    """A loss that contrasts both networks' embeddings with banks.

    Banks and normalisers are the same on every rank. Under gradient accumulation, each micro-batch of the first batch
    is normalised by its own Z. Their mean is then kept.
    """

    scope = "statistics"

    class Config(StageConfig):
        """The config of a loss with banks; ``configs/methods/crd.yaml`` has values."""

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

    student_bank: Tensor
    teacher_bank: Tensor
    normalizers: Tensor
    """Z of the student's and the teacher's anchors; 0 before the first commit."""

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        assert facts.labels_by_id is not None
        self.student_tap, self.teacher_tap = stage_pair(config.stage, facts)
        name = type(self).__name__.lower()
        self.student_head = nn.Linear(vector_width(name, facts.student_shapes, self.student_tap), config.dim)
        self.teacher_head = nn.Linear(vector_width(name, facts.teacher_shapes, self.teacher_tap), config.dim)
        self.others = NegativeSampler(facts.labels_by_id, facts.num_classes)
        self.samples = len(self.others.ids_N)
        for name in ("student_bank", "teacher_bank"):
            # Uniform with variance 1/D, so that rows have a length of about one, as the embeddings have.
            bank_ND = torch.empty(facts.id_count, config.dim).uniform_(-1, 1) * (3 / config.dim) ** 0.5
            self.register_buffer(name, bank_ND)
        self.register_buffer("normalizers", torch.zeros(2))
        self.settled = False
        self.pending: list[Pending] = []

    def embeddings(self, student: Outputs, teacher: Outputs) -> tuple[Tensor, Tensor]:
        """Return the rows of both networks [B, D] on the unit sphere."""
        student_BD = F.normalize(self.autocast_call(self.student_head, student.features[self.student_tap]))
        teacher_BD = F.normalize(self.autocast_call(self.teacher_head, teacher.features[self.teacher_tap].detach()))
        return student_BD, teacher_BD

    def candidates(self, batch: Batch) -> Tensor:
        """Return the ids of each row's candidates [B, J]: its own, and those of samples of other classes."""
        return torch.cat([batch.ids_B.unsqueeze(1), self.others(batch.labels_B, self.config.negatives)], 1)

    def note(self, ids_B: Tensor, student_BD: Tensor, teacher_BD: Tensor, normalizers_2: Tensor) -> None:
        """Note what ``commit`` needs. ``forward`` changes no bank, so that it gives the same result when run again."""
        if self.training:
            self.pending.append(Pending(ids_B, torch.cat([student_BD, teacher_BD], 1).detach(), normalizers_2))

    @torch.no_grad()
    def fixed_normalizers(self, scores: list[Tensor], mean: Callable[[Tensor], Tensor] = torch.mean) -> Tensor:
        """Return both stored Z or, before the first commit, those of these scores over all ranks.

        ``mean`` averages the scores' exponentials over what counts on this rank.
        """
        if self.settled:
            return self.normalizers.clone()
        measured_2 = self.samples * all_reduce_mean(torch.stack([mean(scores_BJ.exp()) for scores_BJ in scores]))
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
