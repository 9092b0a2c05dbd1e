"""Networks whose state is not just a tensor of its own for each name."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pipeline.models import create_model


class Looped(nn.Module):
    """One block of convolution, BatchNorm and ReLU that runs three times, and a head that knows the weights, too."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2)
        block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.Sequential(block, block, block)
        self.fc = nn.Linear(8, num_classes)
        self.tied = self.fc.weight
        self.register_buffer("halves", self.blocks[0][1].running_mean[:4])

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(images)).mean((2, 3)))


class Versioned(nn.Module):
    """A network that loads its own version alone."""

    _version = 3

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.net = create_model("cifar_resnet8", num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: dict[str, Any], *more: Any) -> None:
        if metadata.get("version") != 3:
            raise ValueError(f"version {metadata.get('version')} is too old")
        super()._load_from_state_dict(state, prefix, metadata, *more)


class Remembering(Versioned):
    """A network that saves what is no tensor."""

    def get_extra_state(self) -> Any:
        return {"seen": 3}

    def set_extra_state(self, state: Any) -> None:
        del state


class Forgetful(Versioned):
    """A network that saves what it cannot load back."""

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: dict[str, Any], *more: Any) -> None:
        raise KeyError("weights of my own")


class Hiding(Versioned):
    """A network that leaves weights out of what it saves."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(f"{prefix}scale", None)

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.scale = nn.Parameter(self.net.fc.weight.new_ones(()))

    def forward(self, images: Tensor) -> Tensor:
        return self.scale * self.net(images)
