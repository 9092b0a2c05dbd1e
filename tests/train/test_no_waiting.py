"""Between two lines of the journal the host never waits for a number that the device computes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline import train
from pipeline.composition import composed

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
METHODS = ("ddkd", "dkd", "perception", "dist", "crd", "rkd", "irg", "pkt", "sp", "review", "ofd", "vid", "nst", "at")
WAITING = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.equal")
ON_THE_HOST = ("tolist", "numpy", "cpu")


class Waits(TorchDispatchMode):
    """Counts what would make the host wait for a GPU, by step; a CPU computes all of it without one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.steps: list[list[str]] = [[]]
        for name in ON_THE_HOST:
            monkeypatch.setattr(Tensor, name, self._noting(name, getattr(Tensor, name)))

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(function).startswith(WAITING):
            self.steps[-1].append(str(function))
        return function(*args, **(kwargs or {}))

    def _noting(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def noted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if threading.current_thread() is threading.main_thread():  # the loader's thread has host tensors alone
                self.steps[-1].append(name)
            return method(tensor, *args, **kwargs)

        return noted


def test_no_step_reads_from_the_device(run_train: Callable[..., None], recipes: Path, monkeypatch: pytest.MonkeyPatch):
    losses = {name: composed(CONFIGS / "methods" / f"{name}.yaml")["losses"][name] for name in METHODS}
    own = {"base": "ddkd.yaml", "losses": {"ce": {}, **losses}, "compare": None, "epochs": 1, "batch": 6}
    clipped = {"clip": 1.0, "ema": {"decay": 0.9}, "accumulation": 2, "folder": "runs/all"}
    (recipes / "all.yaml").write_text(yaml.safe_dump({**own, **clipped}))
    run_train("teacher.yaml")
    waits, seed_draws = Waits(monkeypatch), train.seed_draws

    def next_step(seed: int, step: int) -> None:
        waits.steps.append([])
        seed_draws(seed, step)

    monkeypatch.setattr(train, "seed_draws", next_step)
    with waits:
        run_train("all.yaml", "journal.every_steps=100", "checkpoints.every_epochs=0")
    assert len(waits.steps) == 12  # before the first step, ten steps, and after the last
    between = waits.steps[3:11]  # the first step and the last are written down
    assert between == [[]] * 8
    assert waits.steps[2] != []
    assert waits.steps[0] != []
