"""Factor transfer, Kim et al., NeurIPS 2018, arXiv:1802.04977, eq. 2: the second of its two stages.

The teacher's factor is what its paraphraser, which the first stage trained (``ft_paraphraser.py``), makes of its last
map. The student's factor is what a translator, which learns with the student, makes of the student's last map.

The value falls as 1/√(HW), so its weight depends on the size of the maps.

B batch, C D channels, M channels of a factor, H W space.
"""

from collections.abc import Mapping

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pipeline.batch import Batch, Outputs
from pipeline.losses._base import Facts
from pipeline.losses._connectors import ConnectorLoss
from pipeline.losses._functional import l2_normalize, pool_to_smaller
from pipeline.losses._stages import StageChoice, StageConfig, channels, stage_pair
from pipeline.losses.ft_paraphraser import SLOPE, Paraphraser, factor_width
from pipeline.run_reference import RunReference


def ft_loss(student_BMHW: Tensor, teacher_BMHW: Tensor) -> Tensor:
    """Return the mean absolute difference between both factors' directions. No gradient reaches the teacher.

    It is averaged over rows and pixels, and lies between 0 and 2/√(HW). The larger factor is average-pooled.
    """
    student_BMHW, teacher_BMHW = pool_to_smaller(student_BMHW, teacher_BMHW.detach())
    return F.l1_loss(energy(student_BMHW), energy(teacher_BMHW))


def energy(factor_BMHW: Tensor) -> Tensor:
    """Return the mean square over the channels as a vector [B, HW] of length one."""
    return l2_normalize(factor_BMHW.square().mean(1).flatten(1), 1)


class FT(ConnectorLoss):
    """A loss that matches where the factors of both networks' maps are large. The paraphraser does not learn."""

    reads_labels = False

    class Config(StageConfig, ConnectorLoss.Config):
        """The config of FT, such as ``{share: 0.5, paraphraser: {method: ft_init}}``."""

        stage: StageChoice = "last"
        """Stage of both networks whose maps are compared; the teacher's is that of the paraphraser."""
        share: float = Field(gt=0, le=1)
        """Channels of a factor, as a share of the teacher's map; the paraphraser's."""
        paraphraser: RunReference
        """The run that trained the paraphraser."""

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        self.student_tap, self.teacher_tap = stage_pair(config.stage, facts)
        student_C, teacher_C = (
            channels(facts.student_shapes, self.student_tap),
            channels(facts.teacher_shapes, self.teacher_tap),
        )
        narrow = factor_width(teacher_C, config.share)
        layers = [
            layer
            for pair in ((student_C, student_C), (student_C, narrow), (narrow, narrow))
            for layer in (nn.Conv2d(*pair, 3, padding=1), self.norm(pair[1]), nn.LeakyReLU(SLOPE))
        ]
        self.translator = nn.Sequential(*layers)
        # Buffers of the loss itself: equal on every rank, stored once, and trained by nobody.
        for name, value in Paraphraser(teacher_C, config.share).encoder.state_dict().items():
            self.register_buffer(_buffer(name), value)

    def load_auxiliary(self, state: Mapping[str, Tensor]) -> None:
        """Load the paraphraser that another run left. Raises ValueError if it left none of this shape."""
        prefix = "ft_paraphraser.paraphraser.encoder."
        found = {_buffer(key.removeprefix(prefix)): x for key, x in state.items() if key.startswith(prefix)}
        wanted = dict(self.named_buffers(recurse=False))
        if not found:
            raise ValueError("that run left no paraphraser; name one with the loss ft_paraphraser")
        for name, buffer in wanted.items():
            shapes = list(found[name].shape), list(buffer.shape)
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"its paraphraser has a convolution of {shapes[0]}, and {shapes[1]} is needed; give both runs the "
                    "same teacher, stage and share"
                )
            buffer.copy_(found[name])

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the loss part ``ft``."""
        student_BMHW = self.autocast_call(self.translator, student.features[self.student_tap])
        teacher_BMHW = self.autocast_call(self.teacher_factor, teacher.features[self.teacher_tap].detach())
        return {"ft": ft_loss(student_BMHW, teacher_BMHW)}

    def teacher_factor(self, map_BDHW: Tensor) -> Tensor:
        """Return the factor that the paraphraser makes of the teacher's map."""
        for level in (0, 2, 4):  # the encoder's convolutions; leaky ReLUs are between them
            weight, bias = (self.get_buffer(_buffer(f"{level}.{kind}")) for kind in ("weight", "bias"))
            map_BDHW = F.leaky_relu(F.conv2d(map_BDHW, weight, bias, padding=1), SLOPE)
        return map_BDHW


def _buffer(name: str) -> str:
    """Return the name of the buffer for a tensor of the paraphraser's encoder, such as ``0.weight``."""
    level, _, kind = name.partition(".")
    return f"encoder{level}_{kind}"
