"""Students that train together and learn from each other ("peers").   V views, B batch, C channels, H W space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pipeline.batch import Outputs
from pipeline.features.taps import JOIN, FeatureTaps, evaluating
from pipeline.image_size import Resolution, height_width


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
        outputs = tuple(peer(view_BCHW, targets) for peer, view_BCHW in zip(self.peers, views, strict=True))
        return outputs[self.number]._replace(peers=outputs)


def views_of_peers(images: Tensor, peers: int) -> Sequence[Tensor]:
    """Return the images [B, C, H, W] of each peer: its view of [V, B, C, H, W], or the same for all."""
    return images.unbind() if images.ndim == 5 else [images] * peers


def exported_peer(student: FeatureTaps | Cohort) -> FeatureTaps:
    """Return the network whose weights a run leaves: the student itself, or one of several."""
    return student.exported if isinstance(student, Cohort) else student


def share_modules(peers: Sequence[nn.Module], path: str, image_size: Resolution) -> None:
    """Give all networks the modules of the first one up to the tensor at ``path``, the same objects.

    ``path`` is that of a stage (``pipeline.models.stages``). Raises ValueError if it joins several tensors, or if the
    networks differ up to there.
    """
    first, *others = peers
    shared = modules_before(first, path, image_size)
    for other in others:
        theirs = modules_before(other, path, image_size)
        if [repr(first.get_submodule(name)) for name in shared] != [repr(other.get_submodule(name)) for name in theirs]:
            raise ValueError("the peers differ up to that stage; give equal networks, or remove the key")
        for name in shared:
            parent, _, attribute = name.rpartition(".")
            setattr(other.get_submodule(parent), attribute, first.get_submodule(name))


@torch.no_grad()
def modules_before(model: nn.Module, path: str, image_size: Resolution) -> list[str]:
    """Return the names of the modules with tensors of their own that compute what the tensor at ``path`` needs.

    They are those whose calls end before it, found by a forward of one blank image.
    """
    module, _, ending = path.partition(":")
    if JOIN in path:
        raise ValueError(f"it joins the tensors {path}; name a stage of one tensor")
    events: list[tuple[str, str]] = []
    handles = []
    for name, child in model.named_modules():
        handles.append(child.register_forward_pre_hook(lambda *_, name=name: events.append(("begins", name))))
        handles.append(child.register_forward_hook(lambda *_, name=name: events.append(("ends", name))))
    weight = next(model.parameters())
    with evaluating(model):
        model(torch.zeros(1, 3, *height_width(image_size), dtype=weight.dtype, device=weight.device))
    for handle in handles:
        handle.remove()
    at = "begins" if ending.startswith("in") else "ends"
    cut = max(number for number, event in enumerate(events) if event == (at, module))
    ended = dict.fromkeys(name for kind, name in events[: cut + 1] if kind == "ends")
    return [name for name in ended if name and _has_tensors(model.get_submodule(name))]


def _has_tensors(module: nn.Module) -> bool:
    return any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
