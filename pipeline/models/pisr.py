"""The teacher of PISR, a network of super-resolution that is given the large image.

Lee et al., "Learning with privileged information for efficient image super-resolution", ECCV 2020.   B batch, C
channels, H W space.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

from torch import Tensor, nn

from pipeline.models.super_resolution import FSRCNN

LARGE_IMAGE = "high_BCHW"
"""Name of the targets that are read, which ``pipeline.tasks._high`` explains."""


class PISRTeacher(FSRCNN):
    """An encoder of the large image, and the layers of FSRCNN as a decoder.

    The encoder makes a code as high and wide as the small image, which the decoder enlarges. The decoder's modules have
    the names of FSRCNN's, so that a student can start from them. The small image is not read.
    """

    takes_targets: ClassVar[bool] = True

    def __init__(
        self,
        num_classes: int = 1,
        *,
        scale: int,
        features: int = 56,
        shrunk: int = 12,
        layers: int = 4,
        colours: int = 3,
        residual: bool = False,
    ) -> None:
        sizes = {"features": features, "shrunk": shrunk, "layers": layers, "colours": colours}
        super().__init__(num_classes, scale=scale, residual=residual, **sizes)
        self.encoder = nn.Sequential(
            *(nn.Conv2d(colours, features, 5, padding=2), nn.PReLU()),
            *(nn.Conv2d(features, features, 5, scale, padding=2), nn.PReLU()),
            *(nn.Conv2d(features, shrunk, 3, padding=1), nn.PReLU()),
            nn.Conv2d(shrunk, colours, 3, padding=1),
        )

    def forward(self, images_BCHW: Tensor, targets: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the enlarged code of the large images among ``targets``.

        Without targets the large images are black: a probe of shapes, of operations or of speed needs no content.
        Raises ValueError in training without them.
        """
        if targets:
            # Bytes become values in 0 … 1, those of the small images.
            high_BCHW = targets[LARGE_IMAGE].to(images_BCHW.dtype) / 255
        elif self.training:
            raise ValueError("the teacher of PISR encodes the large images; in training give targets")
        else:
            rows, colours, height, width = images_BCHW.shape
            high_BCHW = images_BCHW.new_zeros(rows, colours, self.scale * height, self.scale * width)
        return super().forward(self.encoder(high_BCHW))

    def tap_paths(self) -> dict[str, str]:
        """Return the module path of each stage; ``code`` is what the encoder makes of the large image."""
        return {**super().tap_paths(), "code": "encoder"}


MODELS: dict[str, Callable[..., nn.Module]] = {"pisr_teacher": PISRTeacher}
"""The networks by name, as functions of the number of classes, which means nothing to them, and of ``scale``."""
