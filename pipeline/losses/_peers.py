"""Losses of students that train together ("peers", ``student.peers``).

An ordinary loss is built once for each peer, with modules and state of its own. A loss of the peers themselves gets
the outputs of all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from pipeline.batch import Batch, Outputs, Progress
from pipeline.losses._base import Facts, Loss


def mean_over_others(
    logits: Sequence[Tensor], teachers: Sequence[Tensor], distance: Callable[[Tensor, Tensor], Tensor]
) -> list[Tensor]:
    """Return 1/(M − 1)·Σ_{j≠m} ``distance``(logits_m, teachers_j) of each of M peers, from logits [B, K]."""
    return [
        torch.stack([distance(own, teacher) for other, teacher in enumerate(teachers) if other != number]).mean()
        for number, own in enumerate(logits)
    ]


def facts_of_peers(peers: Sequence[Facts], exported: int) -> Facts:
    """Return the facts of several networks that train together. Those of the ``exported`` one come first."""
    return replace(peers[exported], peers=tuple(peers))


class PeersLoss(Loss):
    """A loss between peers. ``student.peers`` are the outputs of all of them, and so are ``teacher.peers``.

    Its parts are those of each peer, ``peer0``, ``peer1`` and so on, whose sum is the loss.
    """

    def __init__(self, config: Loss.Config, facts: Facts) -> None:
        super().__init__(config, facts)
        if len(facts.peers) < 2:
            raise ValueError("it compares several networks that train together; set student.peers")

    def select_features(self, student: Outputs, teacher: Outputs) -> tuple[Outputs, Outputs]:
        """Return this loss's taps and the logits of all peers of both networks, in at least float32."""
        first, of_teacher = super().select_features(student, teacher)
        select = super().select_features
        peers = tuple(select(peer, teacher)[0] for peer in student.peers)
        if self.needs_teacher:
            of_teacher = of_teacher._replace(peers=tuple(select(student, peer)[1] for peer in teacher.peers))
        return first._replace(peers=peers), of_teacher


class EachPeer(Loss):
    """An ordinary loss of each peer, built from ``facts.peers``, with the loss's ``name`` in the recipe.

    Its parts are ``peer0``, ``peer1`` and so on. A part that has not the name of the loss is ``kd_peer0``.
    """

    def __init__(self, name: str, losses: Sequence[Loss], facts: Facts) -> None:
        super().__init__(losses[0].config, facts)
        self.name = name
        self.of_peers = nn.ModuleList(losses)

    @property
    def members(self) -> list[Loss]:
        """Return the loss of each peer."""
        return list(self.of_peers)  # type: ignore[arg-type]

    def parts(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Return the weighted parts of each peer's loss."""
        # Averages of the peers teach one each; any other teacher teaches all.
        teachers = (teacher and teacher.peers) or [teacher] * len(self.members)
        each = zip(self.members, student.peers, teachers, strict=True)
        return self._by_peer([loss.parts(own, of_peer, batch, progress) for loss, own, of_peer in each])

    def metrics(self) -> dict[str, Tensor]:
        """Return what each peer's loss notes of its last forward."""
        return self._by_peer([loss.metrics() for loss in self.members])

    def load_auxiliary(self, state: Mapping[str, Tensor]) -> None:
        """Load the same modules of another run into the loss of each peer."""
        for loss in self.members:
            loss.load_auxiliary(state)

    def _by_peer(self, values: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return {
            f"peer{number}" if key == self.name else f"{key}_peer{number}": value
            for number, found in enumerate(values)
            for key, value in found.items()
        }
