"""Damaged run folders, checkpoints, caches and shards: what the command that reads them makes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from forks import Done
from grammar import WRONG, places, short, spoil_bytes, spoil_document
from judge import Result, folder_result, names, run_result
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from world import CACHE, DEMO, DEMO_WORDS, EVALUATE, TRAIN, VERIFY, Job, World


def nothing(folder: Path) -> Result:
    """Return the result of a command that only proves: it has none, so that whatever it lets pass is seen."""
    return {}


@dataclass(frozen=True)
class Target:
    """A folder to damage, and the command that reads it."""

    folder: str
    job: Job
    proves: bool = False
    verified: bool = False
    """Whether its own verification comes first, which marks what the command is to mend."""


GOES_ON = Job(TRAIN, ("ddkd.yaml", "folder=half"), "half", run_result)
FROM_CACHE = Job(TRAIN, ("cached.yaml",), "cached", run_result)
FROM_SHARDS = Job(TRAIN, ("ce.yaml", "journal.trackers=[]"), "ce", run_result)
TARGETS = {
    "a run": Target("half", GOES_ON),
    "a checkpoint": Target("half/checkpoints/step-3", GOES_ON),
    "a finished run, evaluated": Target("finished", Job(EVALUATE, ("finished", "speed=no"), "finished", run_result)),
    "a cache, trained from": Target("cache", FROM_CACHE),
    "a cache, verified": Target("cache", Job(CACHE, ("--verify", "cached.yaml"), "cache", nothing), proves=True),
    "a cache, verified and written again": Target(
        "cache", Job(CACHE, ("cached.yaml", "block=8"), "cache", folder_result), verified=True
    ),
    "shards, trained from": Target("shards", FROM_SHARDS),
    "shards, verified": Target("shards", Job(VERIFY, ("shards", "--jobs", "1"), "shards", nothing), proves=True),
    "an unfinished preparation": Target(
        "unfinished", Job(DEMO, ("unfinished", *DEMO_WORDS), "unfinished", folder_result)
    ),
}


def _files(folder: Path, *endings: str) -> list[Path]:
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    return [path for path in found if not endings or path.suffix in endings]


def bytes_of(folder: Path, random: Random) -> str:
    return spoil_bytes(random.choice(_files(folder)), random)


def deleted(folder: Path, random: Random) -> str:
    path = random.choice(_files(folder))
    path.unlink()
    if random.random() < 0.3:
        path.mkdir()
        return f"{path.name} is a folder"
    return f"{path.name} is gone"


def exchanged(folder: Path, random: Random) -> str:
    """Put one file in another's place: of the same ending, where there are two, or what an earlier step left."""
    path = random.choice(_files(folder))
    others = [other for other in _files(folder) if other.suffix == path.suffix and other != path]
    earlier = [folder.parent / "step-2" / path.name] if folder.name == "step-3" else []
    other = random.choice([*others, *earlier, *earlier] or [path])
    content = path.read_bytes()
    if other == path:
        path.write_bytes(content[::-1])
        return f"{path.name} is written backwards"
    path.write_bytes(other.read_bytes())
    if other.parent == folder:
        other.write_bytes(content)
    return f"{path.name} and {other.parent.name}/{other.name} are exchanged"


def values(folder: Path, random: Random) -> str:
    """Change a value so that the file is as whole as before."""
    path = random.choice(_files(folder, ".npy", ".safetensors", ".pt", ".json", ".jsonl") or _files(folder))
    change = {".npy": _npy, ".safetensors": _safetensors, ".pt": _pt, ".json": _json, ".jsonl": _lines}.get(path.suffix)
    return f"{path.name}: {change(path, random)}" if change else spoil_bytes(path, random)


def _npy(path: Path, random: Random) -> str:
    array = np.load(path)
    flat = array.reshape(-1)
    at = random.randrange(flat.size)
    if array.dtype.names:
        flat["label"] = flat["label"][::-1].copy()
        what = "labels in reverse"
    elif random.random() < 0.5:
        flat[:] = 0
        what = "zeros"
    else:
        flat[at] = flat[at] + 1
        what = f"one more at {at}"
    np.save(path, array)
    return what


def _safetensors(path: Path, random: Random) -> str:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    state = load_file(path)
    name = random.choice(sorted(state))
    state[name] = state[name] + 1
    save_file(state, path, metadata)
    return f"{name} is one more"


def _pt(path: Path, random: Random) -> str:
    state = torch.load(path, weights_only=True)
    places_of = [(c, k) for c, k in places(state) if isinstance(c[k], torch.Tensor | float)]
    container, key = random.choice(places_of)
    container[key] = container[key] + 1
    torch.save(state, path)
    return f"{key} is one more"


def _json(path: Path, random: Random) -> str:
    tree = json.loads(path.read_text())
    numbers = [(c, k) for c, k in places(tree) if isinstance(c[k], int | float)]
    container, key = random.choice(numbers or list(places(tree)))
    container[key] = value = container[key] + 1 if numbers else random.choice(WRONG)
    path.write_text(json.dumps(tree))
    return f"{key!r} is {short(value)}"


def _lines(path: Path, random: Random) -> str:
    lines = path.read_text().splitlines(keepends=True)
    at = random.randrange(len(lines))
    lines[at] = random.choice(["", "{}\n", "null\n", lines[at] * 2, "x\n"])
    path.write_text("".join(lines))
    return f"line {at} is {short(lines[at][:40])}"


def document(folder: Path, random: Random) -> str:
    path = random.choice(_files(folder, ".json") or _files(folder))
    return spoil_document(path, random) if path.suffix == ".json" else spoil_bytes(path, random)


def strays(folder: Path, random: Random) -> str:
    """Leave something that nobody wrote there."""
    name = random.choice(
        [
            "step-9",
            "step-x",
            "step-04",
            "left.1234.tmp",
            ".tmp-step-4",
            "view-00.more.npy",
            "x.json",
            "train-000009.tar",
            ".nfs1",
        ]
    )
    below = folder / "checkpoints" if "step" in name and (folder / "checkpoints").is_dir() else folder
    if random.random() < 0.5:
        (below / name).mkdir()
        return f"a folder {name}"
    (below / name).write_bytes(random.randbytes(100))
    return f"a file {name}"


WAYS: dict[str, Callable[[Path, Random], str]] = {
    "bytes": bytes_of,
    "values": values,
    "deleted": deleted,
    "exchanged": exchanged,
    "document": document,
    "strays": strays,
}
# Strays harm nobody, and a command that proves need not see them.
KINDS = {
    f"{target}: {way}": (target, way)
    for way in WAYS
    for target in TARGETS
    if way != "strays" or not TARGETS[target].proves
}
NOTES = ("warning", "note", "left out")


def notes(done: Done) -> set[str]:
    """Return what a command said to be unusual."""
    return {line for line in (done.out + done.err).splitlines() if line.lower().startswith(NOTES)}


@dataclass(frozen=True)
class Outcome:
    """What a job makes when nothing is spoilt."""

    result: Result
    names: set[str]
    notes: set[str]
    out: str
    calls: int


def undamaged(world: World, job: Job) -> Outcome:
    """Return it; a job is run once."""
    key = f"{job.script} {' '.join(job.words)}"
    if key not in world.expected:
        folder = world.copy()
        done = world.do(job, folder=folder, fault=(str(folder / job.folder), 0, 0))
        if done.code != 0:
            raise RuntimeError(f"{key}: {done.code} {done.err[-2000:]}")
        made = folder / job.folder
        world.expected[key] = Outcome(job.result(made), names(made), notes(done), done.out, done.calls or 0)
    return world.expected[key]


def damaged(world: World, random: Random, name: str) -> tuple[str, Done, dict[str, Any]]:
    """Damage a copy of the world, run the command; return what was damaged, its end, and what to judge it by."""
    target, way = KINDS[name]
    of = TARGETS[target]
    expected = undamaged(world, of.job)
    folder = world.copy()
    what = WAYS[way](folder / of.folder, random)
    if of.verified:
        world.do(of.job, "--verify", folder=folder)
    done = world.do(of.job, folder=folder)
    made = folder / of.job.folder
    found = of.job.result(made) if made.is_dir() else {}
    if way == "strays":
        found = {name: content for name, content in found.items() if name in expected.result}
    if of.job.script == EVALUATE:
        expected_result, found = {"out": expected.out.encode()}, {"out": done.out.encode()}
    else:
        expected_result = expected.result
    said = bool(notes(done) - expected.notes)
    return what, done, {"expected": None if of.proves else expected_result, "found": found, "said": said}
