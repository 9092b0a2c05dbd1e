"""What the cases spoil: a folder with shards, a teacher, recipes, a finished run, one that stopped, and a cache."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from forks import Done, Fault, Forks
from judge import Result, folder_result, run_result
from shim import STOP

TRAIN, CACHE, EVALUATE = "pipeline/train.py", "pipeline/cache_teacher.py", "pipeline/evaluate.py"
DEMO, VERIFY = "shards/prepare_demo.py", "shards/verify.py"
SMALL = {"path": "small_networks:Small", "stages": {"last": "body"}}
DEMO_WORDS = ("--train", "24", "--val", "8", "--size", "20", "--jobs", "1", "--samples-per-shard", "12")
HALF = 3
"""Steps, of six, after which the half run stopped."""
WITHIN = 0.7
"""Share of its storage calls after which the unfinished preparation was killed."""

CE: dict[str, Any] = {
    "student": {"model": SMALL},
    "losses": {"ce": {}},
    "data": {"path": "shards", "size": 16, "mean": [0.5] * 3, "std": [0.25] * 3, "threads": 1, "views": 2},
    "epochs": 2,
    "batch": 8,
    "optimizer": {"momentum": 0.9},
    "schedule": {"kind": "cosine", "rate": 0.05},
    "clip": 5.0,
    "ema": {"decay": 0.9},
    "checkpoints": {"every_steps": 1, "keep": 2},
    "journal": {"every_steps": 1, "trackers": ["tensorboard"]},
    "folder": "ce",
}
TEACHER = {"model": SMALL, "weights": "teacher.safetensors", "batch": 8}
JOURNAL = {"every_steps": 1, "trackers": []}

WEIGHTS = """
import sys
import torch
from safetensors.torch import save_file
from small_networks import Small
torch.manual_seed(int(sys.argv[2]))
save_file(Small(20).train().state_dict(), sys.argv[1])
"""


@dataclass(frozen=True)
class Job:
    """A command that makes a folder."""

    script: str
    words: tuple[str, ...]
    folder: str
    result: Callable[[Path], Result]


JOBS = {
    "ce": Job(TRAIN, ("ce.yaml", "journal.trackers=[]"), "ce", run_result),
    "ddkd": Job(TRAIN, ("ddkd.yaml",), "ddkd", run_result),
    "cached": Job(TRAIN, ("cached.yaml",), "cached", run_result),
    "prepare": Job(DEMO, ("drawn", *DEMO_WORDS), "drawn", folder_result),
    "cache": Job(CACHE, ("cached.yaml", "teacher.cache=answers", "block=8"), "answers", folder_result),
}

TRACKED = {"tracked": Job(TRAIN, ("ce.yaml",), "ce", run_result)}
"""With a tracker, whose thread writes when it will: not the same calls each time."""


@dataclass
class World:
    """The folder to copy, the process that runs commands, and what they make when nothing is spoilt."""

    forks: Forks
    base: Path
    scratch: Path
    expected: dict[str, Result] = field(default_factory=dict)

    def copy(self) -> Path:
        """Return a fresh copy; the one before is gone."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        return shutil.copytree(self.base, self.scratch)

    def do(self, job: Job, *more: str, folder: Path | None = None, fault: Fault | None = None) -> Done:
        """Run a job."""
        return self.forks.run(job.script, [*job.words, *more], folder or self.base, fault=fault, seconds=60)

    def must(self, script: str, *words: str, learn: bool = False) -> None:
        """Run a command on the base, which is to succeed."""
        done = self.forks.run(script, words, self.base, seconds=120, learn=learn)
        if done.code != 0:
            raise RuntimeError(f"{script} {' '.join(words)}: {done.code} {done.err[-2000:]}")


def make(forks: Forks, folder: Path) -> World:
    """Make the world below ``folder``."""
    world = World(forks, folder / "base", folder / "case")
    world.base.mkdir()
    write_recipes(world.base, forks.root)
    script = folder / "weights.py"
    script.write_text(WEIGHTS)
    world.must(DEMO, "shards", *DEMO_WORDS)
    world.must(str(script), "teacher.safetensors", "1")
    world.must(str(script), "other.safetensors", "2")
    for recipe in ("ce.yaml", "ddkd.yaml"):
        world.must(TRAIN, recipe, "folder=learnt", "stop.steps=1", learn=True)
        shutil.rmtree(world.base / "learnt")
    world.must(CACHE, "cached.yaml", "block=8")
    world.must(TRAIN, "ce.yaml", "journal.trackers=[]", "folder=finished")
    world.must(TRAIN, "ddkd.yaml", "folder=half", f"stop.steps={HALF}")
    place = str(world.base / "unfinished")
    counted = forks.run(DEMO, ("unfinished", *DEMO_WORDS), world.base, fault=(place, 0, 0))
    shutil.rmtree(place)
    forks.run(DEMO, ("unfinished", *DEMO_WORDS), world.base, fault=(place, round(WITHIN * (counted.calls or 0)), STOP))
    return world


def write_recipes(folder: Path, root: Path) -> None:
    """Write a recipe for each of the training jobs."""
    kept = yaml.safe_load((root / "tests" / "runs" / "kept" / "recipe.yaml").read_text())
    ddkd = {**CE, "losses": kept["losses"], "teacher": TEACHER, "journal": JOURNAL, "folder": "ddkd"}
    cached = {**ddkd, "teacher": {**TEACHER, "cache": "cache"}, "folder": "cached"}
    for name, recipe in {"ce": CE, "ddkd": ddkd, "cached": cached}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
