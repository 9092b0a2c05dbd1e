"""The imitation loss of a teacher that encodes the large image, for super-resolution.

Lee et al., "Learning with privileged information for efficient image super-resolution" (PISR), ECCV 2020. It belongs
to the first of PISR's two stages, beside ``l1``: the encoder's code becomes similar to the small image.

B batch, C channels, H W space.
"""

from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.losses._base import Facts, Loss, Taps
from pipeline.losses._stages import channels


class Imitation(Loss):
    """Mean absolute difference of a network's code and the small image, whose values are in 0 … 1."""

    needs_teacher = False
    reads_labels = False

    class Config(Loss.Config):
        """The config of the imitation loss, such as ``{weight: 1.0e-4}``."""

        stage: str = "code"
        """Stage of the network that trains whose map is compared with the small image."""

        def taps(self) -> Taps:
            """Return the tap of the code."""
            return Taps(student=frozenset({self.stage}))

        def reads_head(self) -> bool:
            """Return False: only a map is read."""
            return False

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        if (width := channels(facts.student_shapes, config.stage)) != 3:
            raise ValueError(
                f"imitation: the tap {config.stage!r} has {width} channels, and an image has 3; name a map of colours"
            )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the loss part ``imitation``."""
        code_BCHW = student.features[self.config.stage]
        return {"imitation": (code_BCHW - batch.images_BCHW.to(code_BCHW.dtype)).abs().mean()}
