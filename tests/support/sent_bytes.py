"""What a process sends the other ranks, counted."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Call(NamedTuple):
    """A collective of torch.distributed, and the bytes of what this rank handed to it."""

    name: str
    bytes: int


class Collectives(TorchDispatchMode):
    """``with Collectives() as sent:`` notes every collective inside it as a ``Call`` in ``sent.calls``.

    They are caught where torch dispatches them: those of a backward on a CPU and of DDP's reducer are among them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            # Where a call fills other tensors than it reads, their argument is named output_….
            arguments = zip(func._schema.arguments, args, strict=False)
            handed = tree_leaves([value for argument, value in arguments if not argument.name.startswith("output")])
            size = sum(x.numel() * x.element_size() for x in handed if isinstance(x, Tensor))
            self.calls.append(Call(func._opname.strip("_"), size))
        return func(*args, **(kwargs or {}))


def forward_and_backward(loss: Any) -> tuple[list[Call], list[Call]]:
    """Return the collectives that ``loss()``, a scalar, takes and those of its backward."""
    with Collectives() as forward:
        total = loss()
    with Collectives() as backward:
        total.backward()
    return forward.calls, backward.calls
