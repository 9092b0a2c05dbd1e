"""Between two lines of the journal the host never waits for a number that the device computes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from methods import losses_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline import train
from pipeline.training import session

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
METHODS = (
    *("ddkd", "dkd", "perception", "dist", "crd", "rkd", "irg", "pkt", "sp", "review", "ofd", "vid", "nst", "at"),
    *("cwd", "skd", "mgd", "pkd"),
)
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique", "unique_", "repeat_interleave")
COPYING = ("lift_fresh",)
"""What ``torch.tensor`` ends in: a copy from memory that is not pinned, for which the host waits."""
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")
"""They ask for ``nonzero`` below what is dispatched, if they are given truth values."""
ON_THE_HOST = ("tolist", "numpy", "cpu")


class Waits(TorchDispatchMode):
    """Counts what would make the host wait for a GPU, by step; a CPU computes all of it without one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.steps: list[list[str]] = [[]]
        for name in ON_THE_HOST:
            monkeypatch.setattr(Tensor, name, self._noting(name, getattr(Tensor, name)))

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.removeprefix("aten::")
        masks = [x for x in tree_leaves(args) if isinstance(x, Tensor) and x.dtype == torch.bool]
        if name in COPYING or name.startswith(WAITING) or (name in INDEXING and masks):
            self.steps[-1].append(name)
        return function(*args, **(kwargs or {}))

    def _noting(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def noted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if threading.current_thread() is threading.main_thread():  # the loader's thread has host tensors alone
                self.steps[-1].append(name)
            return method(tensor, *args, **kwargs)

        return noted


@pytest.fixture
def every_method(run_train: Callable[..., None], recipes: Path) -> Callable[[], None]:
    """Trains for ten steps, of which the first and the last are written down."""
    losses = {name: losses_of(name)[name] for name in METHODS}
    own = {"base": "ddkd.yaml", "losses": {"ce": {}, **losses}, "compare": None, "epochs": 1, "batch": 6}
    clipped = {"clip": 1.0, "ema": {"decay": 0.9}, "accumulation": 2, "folder": "runs/all"}
    (recipes / "all.yaml").write_text(yaml.safe_dump({**own, **clipped}))
    run_train("teacher.yaml")
    return partial(run_train, "all.yaml", "journal.every_steps=100", "checkpoints.every_epochs=0")


def at_each_step(monkeypatch: pytest.MonkeyPatch, call: Callable[[int], None]) -> None:
    """Have ``call`` called with a step's number before it begins."""
    seed_draws = train.seed_draws

    def next_step(seed: int, step: int) -> None:
        call(step)
        seed_draws(seed, step)

    for module in (train, session):  # before the first step, and after each
        monkeypatch.setattr(module, "seed_draws", next_step)


def test_no_step_reads_from_the_device(every_method: Callable[[], None], monkeypatch: pytest.MonkeyPatch):
    waits = Waits(monkeypatch)
    at_each_step(monkeypatch, lambda step: waits.steps.append([]))
    with waits:
        every_method()
    assert len(waits.steps) == 12  # before the first step, ten steps, and after the last
    between = waits.steps[3:11]  # the first step and the last are written down
    assert between == [[]] * 8
    assert waits.steps[2] != []
    assert waits.steps[0] != []


WAITED_FOR = {
    "a number": lambda x: x.sum().item(),
    "a mask": lambda x: x[x > 0],
    "filling a mask": lambda x: x.clone().__setitem__(x > 0, x),
    "torch.tensor": lambda x: x * torch.tensor([2.0]),
    "a list": lambda x: x.tolist(),
    "how often": lambda x: x.repeat_interleave(x.abs().long(), dim=0),
    "what is there": lambda x: x.unique(),
}


@pytest.mark.parametrize("way", WAITED_FOR)
def test_what_makes_the_host_wait_is_seen(way: str, monkeypatch: pytest.MonkeyPatch):
    x = torch.ones(4)
    with (waits := Waits(monkeypatch)):
        WAITED_FOR[way](x)
    assert waits.steps != [[]]


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_no_step_waits_for_the_gpu(every_method: Callable[[], None], monkeypatch: pytest.MonkeyPatch):
    at_each_step(monkeypatch, lambda step: torch.cuda.set_sync_debug_mode("error" if 2 <= step < 9 else "default"))
    try:
        every_method()
    finally:
        torch.cuda.set_sync_debug_mode("default")
