"""A teacher, its students with images without labels, and the commands of the chain as functions of a rank."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import training_on_ranks
import witness
import yaml

from shards.prepare_unlabelled import main as prepare_unlabelled
from shards.read import SplitReader

ROOT = Path(__file__).resolve().parents[2]
BATCH, RATIO = 12, 2
NETWORK = {"path": "witness:plain", "stages": {"last": "1"}}
SOFT = {"from": "batch", "rows": "unlabelled", "teacher_temperature": 1.0, "weight": float(RATIO)}


def prepare(folder: Path) -> None:
    """Write labelled shards, shards without labels, and the recipes ``supervised``, ``ns1`` and ``ns2``."""
    command = [sys.executable, str(ROOT / "shards" / "prepare_demo.py"), str(folder / "shards"), "--train", "60"]
    subprocess.run([*command, "--val", "12", "--size", "16", "--jobs", "1"], check=True, capture_output=True)
    reader = SplitReader(folder / "shards", "train")
    (folder / "pictures").mkdir()
    for number, encoded in enumerate(reader.bytes(np.arange(50))):
        (folder / "pictures" / f"{number}.jpg").write_bytes(encoded.tobytes())
    for name, more in (("others", []), ("fewer", ["--subset", "45"])):
        words = [str(folder / "pictures"), str(folder / name), "--jobs", "1", "--samples-per-shard", "20"]
        assert prepare_unlabelled([*words, *more]) == 0
    write_recipes(folder)


def write_recipes(folder: Path) -> None:
    data = {"path": "shards", "loader": "memory", "crop": "pad", "size": 16, "mean": [0.5] * 3, "std": [0.25] * 3}
    recipe: dict[str, Any] = {
        "data": data,
        "student": {"model": NETWORK},
        "epochs": 2,
        "batch": BATCH,
        "optimizer": {"momentum": 0.9, "weight_decay": 5e-4},
        "schedule": {"kind": "cosine", "rate": 0.02},
        "journal": {"every_steps": 1, "trackers": []},
    }
    losses = {"ce": {"label_smoothing": 0.1}}
    recipes = {"supervised": {**recipe, "losses": losses, "folder": "runs/supervised"}}
    for name, teacher in (("ns1", "supervised"), ("ns2", "ns1")):
        unlabelled = {"path": "others", "ratio": RATIO, "pseudo": f"pseudo/{name}"}
        recipes[name] = {
            **recipe,
            "data": {**data, "unlabelled": unlabelled},
            "teacher": {"recipe": f"{teacher}.yaml"},
            "losses": {**losses, "soft_ce": SOFT},
            "folder": f"runs/{name}",
        }
    for name, each in recipes.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(each))


def label(rank: int, world: int, folder: Path, words: list[str]) -> None:
    """Run ``pipeline/pseudo_label.py`` with those words in ``folder``, as the process of that rank."""
    from pipeline import pseudo_label

    training_on_ranks.run(pseudo_label.main, rank, world, folder, words)


def train(rank: int, world: int, folder: Path, words: list[str]) -> list[list[int]]:
    """Train as the process of that rank, and return the ids of each of its micro-batches if a loss notes them."""
    witness.SEEN.clear()
    training_on_ranks.train(rank, world, folder, words)
    return list(witness.SEEN)
