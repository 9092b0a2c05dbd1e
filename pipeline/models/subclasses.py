"""Heads whose classes are split into subclasses, Müller et al., 2020, arXiv:2002.03936.

B batch, D embedding, K classes, S all subclasses: those of class k stand together, from k·s on.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pipeline.models.arguments import ArgumentError

SUBCLASSES = "subclasses"
"""Argument of every network with a linear head: the number s of subclasses of each class."""


def class_logits(subclasses_BS: Tensor, number: int) -> Tensor:
    """Return log Σ exp over the ``number`` subclasses of each class: logits whose softmax adds their probabilities."""
    return subclasses_BS.unflatten(-1, (-1, number)).logsumexp(-1)


class SubclassHead(nn.Linear):
    """A linear layer with the weights of ``linear``, which has a row for every subclass, and the logits of classes.

    Its parameters have the names of a linear layer's. The logits of the subclasses are the output of ``scores``.
    """

    def __init__(self, linear: nn.Linear, number: int) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        self.weight, self.bias = linear.weight, linear.bias
        self.number = number
        self.scores = nn.Identity()

    def forward(self, input: Tensor) -> Tensor:
        """Return the logits of the classes [B, K]."""
        return class_logits(self.scores(super().forward(input)), self.number)


def check_number(number: Any) -> int:
    """Return the number of subclasses. Raises ArgumentError unless it is a whole number of 2 or more."""
    if not isinstance(number, int) or number < 2:
        raise ArgumentError(f"{SUBCLASSES}: expected a whole number of at least 2, got {number!r}")
    return number


def split_head(model: nn.Module, path: str | None, number: int) -> nn.Module:
    """Return the model, its last linear layer at ``path`` replaced by a SubclassHead.

    Raises ArgumentError if there is no such layer.
    """
    head = model.get_submodule(path) if path else None
    if path is None or not isinstance(head, nn.Linear):
        raise ArgumentError(
            f"{SUBCLASSES}: no last linear layer of {type(model).__name__} is known, whose classes split"
        )
    model.set_submodule(path, SubclassHead(head, number))
    return model
