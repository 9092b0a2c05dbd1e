"""A frozen teacher as a CUDA graph, for runs that share its outputs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from pipeline.batch import Batch, Outputs
from pipeline.teachers.cached import AnyTeacher
from pipeline.training.graph import EAGER_STEPS, Graph, input_tensors


class GraphedTeacher:
    """A teacher that is captured after ``EAGER_STEPS`` batches and replayed from then on; all have the same shape.

    A run that trains alone has the teacher in the graph of its step.
    """

    def __init__(self, teacher: AnyTeacher) -> None:
        self.teacher = teacher
        self.graph = Graph()
        self.calls = 0
        self.inputs: list[Tensor] = []

    def __call__(self, batch: Batch) -> Outputs:
        """Return the outputs for a batch."""
        self.calls += 1
        if self.calls <= EAGER_STEPS:
            return self.graph.run(lambda: self.teacher(batch))
        if not self.inputs:
            static_batch: Batch = tree_map_only(Tensor, torch.clone, batch)
            self.inputs = input_tensors(static_batch)
            self.outputs: Outputs = self.graph.capture(lambda: self.teacher(static_batch))
        torch._foreach_copy_(self.inputs, input_tensors(batch))  # pyright: ignore[reportPrivateImportUsage]
        self.graph.replay()
        # Copies, because the runs may still read them while the next batch is computed.
        return tree_map_only(Tensor, torch.clone, self.outputs)
