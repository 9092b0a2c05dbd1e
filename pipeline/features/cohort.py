"""Students that train together and learn from each other ("peers").   V views, B batch, C channels, H W space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from pipeline.batch import Outputs, join_peers
from pipeline.features.stagewise import stages_of_modules
from pipeline.features.taps import FeatureTaps
from pipeline.image_size import Resolution


class Cohort(nn.Module):
    """Peers of one training. Its forward returns the outputs of the exported peer, with those of all in ``peers``.

    ``exported`` is the number of the peer whose weights a run leaves. The peers may share modules.
    """

    def __init__(self, peers: Sequence[FeatureTaps], exported: int) -> None:
        super().__init__()
        self.peers = nn.ModuleList(peers)
        self.number = exported

    @property
    def exported(self) -> FeatureTaps:
        """Return the peer whose weights a run leaves."""
        return self.members[self.number]

    @property
    def model(self) -> nn.ModuleList:
        """Return the plain networks of all peers."""
        return nn.ModuleList(peer.model for peer in self.members)

    @property
    def members(self) -> list[FeatureTaps]:
        """Return the peers."""
        return list(self.peers)  # type: ignore[arg-type]

    def forward(self, images: Tensor, targets: Mapping[str, Tensor] | None = None) -> Outputs:
        """Return the outputs for images [B, C, H, W], or for [V, B, C, H, W], where each peer has views of its own."""
        views = views_of_peers(images, len(self.peers))
        pairs = zip(self.peers, views, strict=True)
        return join_peers([peer(view_BCHW, targets) for peer, view_BCHW in pairs], self.number)


def views_of_peers(images: Tensor, peers: int) -> Sequence[Tensor]:
    """Return the images [B, C, H, W] of each peer: its view of [V, B, C, H, W], or the same for all."""
    return images.unbind() if images.ndim == 5 else [images] * peers


def trained_networks(student: FeatureTaps | Cohort) -> list[FeatureTaps]:
    """Return the networks that train: the student alone, or several."""
    return student.members if isinstance(student, Cohort) else [student]


def exported_peer(student: FeatureTaps | Cohort) -> FeatureTaps:
    """Return the network whose weights a run leaves: the student itself, or one of several."""
    return student.exported if isinstance(student, Cohort) else student


def share_modules(peers: Sequence[FeatureTaps], stage: str, image_size: Resolution) -> None:
    """Give all peers the modules of the first one up to the end of that stage, the same objects.

    Raises ValueError for a stage that they do not have.
    """
    found, (*known, _) = stages_of_modules(peers[0], image_size)
    if stage not in known:
        raise ValueError(f"{stage!r} is no stage of this network; it has {', '.join(known)}")
    up_to = known[: known.index(stage) + 1]
    first, *others = (peer.model for peer in peers)
    for path in (path for path, of in found.items() if of in up_to):
        module = first.get_submodule(path)
        # Modules without tensors of their own may be called before and after the end of the stage, as a ReLU is.
        if any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
            parent, _, attribute = path.rpartition(".")
            for other in others:
                setattr(other.get_submodule(parent), attribute, module)
