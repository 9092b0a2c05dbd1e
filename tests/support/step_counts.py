"""What a step of the training loop dispatches, sends, keeps and leaves behind: numbers that no busy machine changes."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from sent_bytes import Collectives
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves
from training_on_ranks import train as run_train

from pipeline import train
from pipeline.builders import session
from pipeline.training import session as training_session
from pipeline.training.flops import FlopCounter

EARLY, LATE = 3, 8
"""Steps after which what is alive is compared; the later one is counted."""


class Counts(NamedTuple):
    """Of a rank's share of one step."""

    flops: int
    operators: int
    """Dispatched by torch, from Python or from C++, and no mere views: each is a kernel, or a few, or an allocation."""
    allocations: int
    """Storages that operators have made, whether they lived for a moment or for the step."""
    collectives: int
    sent: int
    """Bytes handed to them."""
    kept: int
    """Bytes that forward keeps for backward besides the weights."""
    alive: int
    """Tensors that steps have made and left."""


class Watch(Collectives):
    """Notes what is dispatched inside it, and by whom the tensors outlive their step."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = self.allocations = 0
        self.made: dict[int, weakref.ref[Tensor]] = {}
        self.own: set[int] = set()
        """Storages of the weights."""
        self.kept: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.operators += not func.is_view
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.made |= {id(x): weakref.ref(x) for x in made}
        if made and not func.is_view:
            given = {x.untyped_storage()._cdata for x in tree_leaves([args, kwargs]) if isinstance(x, Tensor)}
            self.allocations += len({x.untyped_storage()._cdata for x in made} - given)
        return result

    def keep(self, x: Tensor) -> Tensor:
        """Note a tensor that autograd keeps."""
        storage = x.untyped_storage()
        if storage._cdata not in self.own:
            self.kept[storage._cdata] = storage.nbytes()
        return x

    def alive(self) -> int:
        """Return how many of the tensors made so far there still are."""
        gc.collect()
        self.made = {place: reference for place, reference in self.made.items() if reference() is not None}
        return len(self.made)

    def forget(self) -> None:
        """Begin a step."""
        self.operators, self.allocations, self.calls, self.kept = 0, 0, [], {}


class Enough(Exception):
    """Ends a run without a checkpoint, which would take longer than its steps."""


def count(rank: int, world: int, folder: Path, words: list[str]) -> tuple[Counts, int]:
    """Train so for ``LATE`` steps, as the process of that rank; return that step's counts and the earlier ``alive``."""
    watch, flops, alive = Watch(), FlopCounter(), {}
    seed_draws, prepare = train.seed_draws, session.allocate_state

    def next_step(seed: int, step: int) -> None:
        """Stand where a step has ended and the next has not begun."""
        if step in (EARLY, LATE):
            alive[step] = watch.alive()
        if step == LATE:
            raise Enough
        if step == EARLY - 1:
            for context in (only_new_garbage(), saved_tensors_hooks(watch.keep, lambda x: x), watch, flops):
                stack.enter_context(context)
        seed_draws(seed, step)
        watch.forget()
        flops.flops = 0

    def prepared(optimizer: Any) -> None:
        """Stand where the weights are where they will be trained."""
        prepare(optimizer)
        watch.own = {p.untyped_storage()._cdata for group in optimizer.param_groups for p in group["params"]}

    with ExitStack() as stack:
        for module in (train, training_session):  # before the first step, and after each
            stack.enter_context(mock.patch.object(module, "seed_draws", next_step))
        stack.enter_context(mock.patch.object(session, "allocate_state", prepared))
        stack.enter_context(mock.patch.object(session, "image_flops", return_value=None))
        stack.enter_context(suppress(Enough))
        run_train(rank, world, folder, words)
    sent, kept = sum(call.bytes for call in watch.calls), sum(watch.kept.values())
    counts = Counts(flops.flops, watch.operators, watch.allocations, len(watch.calls), sent, kept, alive[LATE])
    return counts, alive[EARLY]


@contextmanager
def only_new_garbage() -> Iterator[None]:
    """Let the collector look at nothing that was there before: it takes a second for all that is imported."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
