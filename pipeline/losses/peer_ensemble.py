"""An ensemble of the peers as their teacher: peer collaborative learning, Wu and Gong, AAAI 2021, arXiv:2006.04147.

Eq. 5 to 7: a linear layer on the embeddings of all peers side by side learns from the labels, and teaches each peer.

M peers, B batch, D embedding, K classes.
"""

from __future__ import annotations

import torch
from pydantic import PositiveFloat
from torch import Tensor, nn

from pipeline.batch import Batch, Outputs, Progress
from pipeline.losses._base import Facts, Taps
from pipeline.losses._peers import PeersLoss
from pipeline.losses._stages import EMBEDDING, vector_width
from pipeline.losses.ce import label_cross_entropy
from pipeline.losses.kd import kd_loss


class PeerEnsemble(PeersLoss):
    """Cross-entropy of an ensemble's linear layer, and each peer's divergence from the ensemble.

    The layer's gradient reaches the peers. The divergence sends none to the ensemble. ``ramp`` is for the divergence
    alone, because the ensemble learns from the first step on.
    """

    needs_teacher = False
    mixed_labels = "soft"

    class Config(PeersLoss.Config):
        """The config of the ensemble, such as ``{temperature: 3.0, ramp: {gaussian: 80}}``."""

        temperature: PositiveFloat
        """Temperature T of the divergence, by which the logits are divided."""

        def taps(self) -> Taps:
            """Return the embedding of each peer."""
            return Taps(student=frozenset({EMBEDDING}))

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        widths = [vector_width("peer_ensemble", peer.student_shapes, EMBEDDING) for peer in facts.peers]
        self.fc = nn.Linear(sum(widths), facts.num_classes)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the loss parts ``ce``, and ``peer0``, ``peer1`` and so on."""
        embeddings_BD = torch.cat([peer.features[EMBEDDING] for peer in student.peers], 1)
        ensemble_BK = self.autocast_call(self.fc, embeddings_BD)
        parts = {"ce": label_cross_entropy(ensemble_BK, batch, 0.0)}
        for number, peer in enumerate(student.peers):
            parts[f"peer{number}"] = kd_loss(peer.logits_BK, ensemble_BK, temperature=self.config.temperature)
        return parts

    def scaled(self, parts: dict[str, Tensor], progress: Progress) -> dict[str, Tensor]:
        """Return the parts × weight, and the divergences × ramp, too."""
        return super().scaled(parts, progress) | {"ce": self.config.weight * parts["ce"]}
