"""A frozen network whose features a loss compares images by, and how a recipe names it.

B batch, C channels, H W space.
"""

from __future__ import annotations

import copy
from typing import Any, Self

import torch
from pydantic import model_validator
from torch import Tensor, nn

from pipeline.features.taps import FeatureTaps
from pipeline.frozen_model import FrozenModel
from pipeline.network_arguments import Arguments
from pipeline.precision import autocast

_VGG = "vgg19"
_VGG_LAYERS = {"relu1_1": 1, "relu2_1": 6, "relu3_1": 11, "relu4_1": 20, "relu5_1": 29}
_VGG_STAGES = {**{name: f"features.{layer}" for name, layer in _VGG_LAYERS.items()}, "logits": "classifier"}


class ExtractorConfig(FrozenModel):
    """A network and its weights, which never train and are not saved with the run."""

    model: str = _VGG
    """Name of a network of classes, whose last layer is left out, or your own factory: ``package.module:factory``."""
    weights: str
    """A weights file, or the name of published weights such as IMAGENET1K_V1."""
    weights_key: str | None = None
    """The key of the weights in a file with several; default: the raw weights."""
    arguments: Arguments = None
    """More keyword arguments of the network's factory."""
    stages: dict[str, str] | None = None
    """Module path by stage name, for a network whose stages the project does not know."""
    taps: tuple[str, ...] = ()
    """Stages whose maps are compared, the shallowest first; default: ``relu1_1`` … ``relu5_1`` of VGG19."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean of the images that the network was trained with, one value each for red, green and blue."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Their standard deviation."""

    @model_validator(mode="before")
    @classmethod
    def _vgg_has_known_taps(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("model", _VGG) == _VGG and not given.get("taps"):
            return {**given, "taps": list(_VGG_LAYERS)}
        return given

    @model_validator(mode="after")
    def _names_its_taps(self) -> Self:
        if not self.taps or any(tap.partition(".")[0] == "all" for tap in self.taps):
            raise ValueError(f"taps: name each stage of {self.model} that is compared, such as [stage1, stage2]")
        if len(set(self.taps)) < len(self.taps):
            raise ValueError(f"taps: a stage is named twice in {', '.join(self.taps)}; name it once")
        if not all(self.std):
            raise ValueError(f"std: expected numbers other than 0, got {list(self.std)}")
        return self

    @property
    def paths(self) -> dict[str, str]:
        """Return the module path of each stage that the project does not know by itself."""
        return (_VGG_STAGES if self.model == _VGG else {}) | (self.stages or {})


class FrozenExtractor(nn.Module):
    """The maps of a network's taps, for images of values in 0 … 1.

    Its tensors are neither parameters nor saved, and it stays in evaluation mode. Gradients reach the images alone.
    """

    def __init__(self, network: FeatureTaps, config: ExtractorConfig, *, normalize: bool) -> None:
        super().__init__()
        self.taps = config.taps
        self.network = _without_parameters(copy.deepcopy(network)).eval()
        self.colours = [*zip(config.mean, config.std, strict=True)] if normalize else [(0.0, 1 / 255)] * 3
        """Mean and standard deviation of each colour."""

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode."""
        return super().train(False)

    def forward(self, images_BCHW: Tensor, dtype: torch.dtype | None) -> list[Tensor]:
        """Return the maps in the order of the taps, computed under autocast to ``dtype``, in the images' own dtype."""
        # Numbers, not buffers, which would be rounded with the network's weights.
        pairs = zip(images_BCHW.unbind(1), self.colours, strict=True)
        scaled_BCHW = torch.stack([(colour_BHW - mean) / std for colour_BHW, (mean, std) in pairs], 1)
        with autocast(images_BCHW, dtype):
            features = self.network(scaled_BCHW).features
        return [features[tap].to(images_BCHW.dtype) for tap in self.taps]


def _without_parameters(network: nn.Module) -> nn.Module:
    """Turn all parameters and buffers into buffers that are not saved."""
    for module in network.modules():
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, tensor.detach(), persistent=False)
    return network
