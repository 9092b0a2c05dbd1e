"""A CUDA graph's semantics on a CPU: what a step dispatches is recorded once, and a replay does just that again.

As with a graph, recording leaves no trace; a replay runs no Python of the step's, reads and writes the same tensors,
and draws from the generator as it stands; and what would have the host wait for a GPU is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")
REFUSED = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "lift_fresh")
STATISTICS = slice(3, 5)
"""The arguments that ``native_batch_norm`` writes, which its schema does not say."""


class Recorder(TorchDispatchMode):
    """Keeps every operation, and what the tensors from outside held before it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.made: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.removeprefix("aten::")
        if name in REFUSED:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        kwargs = kwargs or {}
        for x in self._written(function, name, args, kwargs):
            self._keep(x)
        result = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, result))
        if not function.is_view:
            given = {x.untyped_storage()._cdata for x in tree_leaves([args, kwargs]) if isinstance(x, Tensor)}
            made = {x.untyped_storage()._cdata for x in tree_leaves(result) if isinstance(x, Tensor)}
            self.made |= made - given
        return result

    def _written(self, function: Any, name: str, args: Any, kwargs: Any) -> list[Tensor]:
        """Return the tensors that the operation writes into."""
        arguments = function._schema.arguments
        written = [a for i, a in enumerate(args) if arguments[i].alias_info and arguments[i].alias_info.is_write]
        named = {a.name: a for a in arguments}
        written += [x for key, x in kwargs.items() if named[key].alias_info and named[key].alias_info.is_write]
        written += list(args[STATISTICS]) if name == "native_batch_norm" else []
        return [x for x in tree_leaves(written) if isinstance(x, Tensor)]

    def _keep(self, x: Tensor) -> None:
        storage = x.untyped_storage()._cdata
        if storage not in self.made and storage not in self.before:
            whole = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())  # type: ignore[call-overload]
            self.before[storage] = (whole, whole.clone())

    def undo(self) -> None:
        """Put back what the tensors from outside held."""
        for whole, before in self.before.values():
            whole.copy_(before)


class Dispatching(TorchDispatchMode):
    """Does nothing. Under any such mode torch computes some gradients by other formulas, with other last bits."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


class RecordedGraph:
    """Stands for ``pipeline.training.graph.Graph``."""

    replays = 0

    def run(self, function: Callable[[], T]) -> T:
        """Return ``function()``."""
        return function()

    def capture(self, function: Callable[[], T]) -> T:
        """Return what ``function`` returns, with nothing computed."""
        draws = torch.default_generator.get_state()
        with Recorder() as recorder:
            result = function()
        recorder.undo()
        torch.default_generator.set_state(draws)
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                x.fill_(-1)  # what was recorded has computed nothing yet
        self.calls = recorder.calls
        return result

    def replay(self) -> None:
        """Do again what was recorded, into the same tensors."""
        RecordedGraph.replays += 1
        with torch.inference_mode():
            for function, args, kwargs, result in self.calls:
                new = function(*args, **kwargs)
                for x, y in zip(tree_leaves(result), tree_leaves(new), strict=True):
                    if isinstance(x, Tensor) and x.untyped_storage()._cdata != y.untyped_storage()._cdata:
                        x.copy_(y)
