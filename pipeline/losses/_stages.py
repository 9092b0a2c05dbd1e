"""The stages of student and teacher that a loss compares, as a recipe names them.

``last`` is each network's deepest stage, and ``stage2`` the second stage of both. ``{student: stage2, teacher:
stage3}`` names stages with different numbers. ``all`` is every stage, paired from the deepest. If the student has three
stages and the teacher four, the teacher's first stage has no partner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor, nn

from pipeline.batch import Outputs
from pipeline.features.names import levels, numbered
from pipeline.frozen_model import FrozenModel
from pipeline.losses._base import Facts, Loss, Taps


class StagePair(FrozenModel):
    """A stage of the student and the stage of the teacher it is compared with."""

    student: str
    """Stage of the student."""
    teacher: str
    """Stage of the teacher."""


EMBEDDING = "embedding"
"""Name of the tap that the last linear layer reads."""
StageChoice = str | StagePair
StageList = Annotated[tuple[StageChoice, ...], Field(min_length=1)]
StageChoices = Literal["all"] | StageList


def stage_names(stage: StageChoice, kind: str = "") -> tuple[str, str]:
    """Return the student's tap and the teacher's tap. ``kind`` is the ending of a tap's name: "" or ``.preact``."""
    student, teacher = (stage, stage) if isinstance(stage, str) else (stage.student, stage.teacher)
    return student + kind, teacher + kind


def stage_taps(stages: StageChoices | StageChoice, kind: str = "") -> Taps:
    """Return the taps that a loss on these stages reads."""
    several = stages if isinstance(stages, tuple) else (stages,)
    pairs = [stage_names(stage, kind) for stage in several]
    return Taps(frozenset(student for student, _ in pairs), frozenset(teacher for _, teacher in pairs))


def pair_stages(stages: StageChoices | StageChoice, facts: Facts, kind: str = "") -> list[tuple[str, str]]:
    """Return the pairs of (student, teacher) taps that are compared, shallowest first.

    Raises ValueError if ``stages`` is ``all`` and a network has no known stages, or for a group without a pair.
    """
    if stages != "all":
        several = stages if isinstance(stages, tuple) else (stages,)
        return [pair for stage in several for pair in pair_levels(*stage_names(stage, kind), facts)]
    students, teachers = (numbered(shapes, kind) for shapes in (facts.student_shapes, facts.teacher_shapes))
    count = min(len(students), len(teachers))
    if count == 0:
        raise ValueError("stages: all: a network has no known stages; name them under stages: {stage1: <module path>}")
    return list(zip(students[-count:], teachers[-count:], strict=True))


def stage_pair(stage: StageChoice, facts: Facts) -> tuple[str, str]:
    """Return the (student, teacher) taps of one stage. Raises ValueError if it is a group of several levels."""
    pairs = pair_levels(*stage_names(stage), facts)
    if len(pairs) > 1:
        raise ValueError(f"the stage {stage!r} is {len(pairs)} levels; name one of them, such as {pairs[0][0]!r}")
    return pairs[0]


def pair_levels(student: str, teacher: str, facts: Facts) -> list[tuple[str, str]]:
    """Return the pairs of levels that both networks have, if the taps are groups, else the pair of the two taps.

    Raises ValueError if a tap is a group, and no level of it has a partner.
    """
    students, teachers = levels(facts.student_shapes, student), levels(facts.teacher_shapes, teacher)
    if not students and not teachers:
        return [(student, teacher)]
    partners = {name.removeprefix(teacher): name for name in teachers}
    ends = [name.removeprefix(student) for name in students]
    if pairs := [(student + end, partners[end]) for end in ends if end in partners]:
        return pairs
    theirs = [", ".join(names) or name for names, name in ((students, student), (teachers, teacher))]
    raise ValueError(f"no level pairs {theirs[0]} of the student with {theirs[1]} of the teacher; name a level of each")


def channels(shapes: Mapping[str, tuple[int, ...]], tap: str) -> int:
    """Return the number of channels of a map. Raises ValueError if the tap is not a map."""
    if len(shapes[tap]) != 3:
        raise ValueError(f"the tap {tap!r} is shaped {list(shapes[tap])}, but a map [C, H, W] is needed")
    return shapes[tap][0]


def per_level(pairs: Sequence[tuple[str, str]], build: Callable[[str, str], nn.Module]) -> nn.Module:
    """Return what ``build`` makes of a pair of taps; of several pairs, a ModuleDict by the names of the levels.

    Raises ValueError if a pair occurs twice.
    """
    if len(pairs) == 1:
        return build(*pairs[0])
    if again := next((pair for pair in pairs if pairs.count(pair) > 1), None):
        raise ValueError(f"the stage {again[0]!r} is named twice; name it once")
    # A module's name may not hold a dot.
    return nn.ModuleDict({"_".join(dict.fromkeys(pair)).replace(".", "_"): build(*pair) for pair in pairs})


def level_networks(networks: nn.Module) -> list[Any]:
    """Return the network of each level of what ``per_level`` returned."""
    return list(networks.values()) if type(networks) is nn.ModuleDict else [networks]


def vector_width(loss: str, shapes: Mapping[str, tuple[int, ...]], tap: str) -> int:
    """Return the length of a tap that is a vector. Raises ValueError if it is not a vector."""
    if len(shapes[tap]) != 1:
        raise ValueError(
            f"{loss}: the tap {tap!r} is shaped {list(shapes[tap])}, but a vector such as embedding is needed"
        )
    return shapes[tap][0]


def check_equal_widths(loss: str, levels: Iterable[tuple[str, str]], facts: Facts) -> None:
    """Raise ValueError unless student and teacher have maps of equal numbers of channels at every level."""
    for student, teacher in levels:
        widths = channels(facts.student_shapes, student), channels(facts.teacher_shapes, teacher)
        if widths[0] != widths[1]:
            other = "" if student == teacher else f" at {teacher}"
            raise ValueError(
                f"{loss}: {student} has {widths[0]} channels in the student and {widths[1]} in the teacher{other}; "
                "it compares equal widths only"
            )


class StageConfig(Loss.Config):
    """The config of a loss that compares features of one stage alone."""

    stage: StageChoice
    """Stage of both networks whose features are compared."""

    def taps(self) -> Taps:
        """Return the stage's taps."""
        return stage_taps(self.stage)

    def reads_head(self) -> bool:
        """Return False: only features are compared."""
        return False


class StagesConfig(Loss.Config):
    """The config of a loss that compares features of several stages."""

    stages: StageChoices
    """Stages of both networks whose features are compared."""

    def taps(self) -> Taps:
        """Return the stages' taps."""
        return stage_taps(self.stages)

    def reads_head(self) -> bool:
        """Return whether a stage is ``logits``, the map that a segmentation network's head computes."""
        return "logits" in self.taps().teacher


class FeatureMapLoss(Loss):
    """A loss on the maps of several stages. Raises ValueError if a tap is not a map."""

    class Config(StagesConfig):
        """The config of a loss on maps, such as ``{stages: all}``."""

        stages: StageChoices = "all"
        """Stages of both networks whose maps are compared."""

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        self.levels = pair_stages(config.stages, facts)
        # Called for their check only: a tap that is not a map is reported now, not in the first step.
        for student, teacher in self.levels:
            channels(facts.student_shapes, student)
            channels(facts.teacher_shapes, teacher)

    def maps(self, student: Outputs, teacher: Outputs) -> tuple[list[Tensor], list[Tensor]]:
        """Return the maps of the student and the maps of the teacher, level by level."""
        return [student.features[name] for name, _ in self.levels], [teacher.features[name] for _, name in self.levels]
