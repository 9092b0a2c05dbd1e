"""A teacher with weights, its images, and the commands that cache its answers and train from them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import training_on_ranks
import yaml
from caching_on_ranks import BATCH, BLOCK, IMAGES, cache
from methods import losses_of
from safetensors.torch import save_file

from pipeline.models import create_model

ROOT = Path(__file__).resolve().parents[2]
VIEWS = 2


def method(name: str) -> dict:
    return losses_of(name)


@pytest.fixture(scope="session")
def _place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("caching")
    prepare = [sys.executable, str(ROOT / "shards" / "prepare_demo.py"), str(folder / "shards"), "--jobs", "1"]
    words = ["--train", str(IMAGES), "--val", "12", "--size", "24", "--samples-per-shard", "25"]
    subprocess.run([*prepare, *words], check=True, capture_output=True)
    torch.manual_seed(0)
    teacher = create_model("cifar_resnet20", 20)
    teacher(torch.randn(32, 3, 16, 16))  # statistics that fit no other images
    save_file(teacher.state_dict(), folder / "teacher.safetensors")
    data = {"path": "shards", "size": 16, "mean": [0.5] * 3, "std": [0.25] * 3, "scale": [0.5, 1.0], "views": VIEWS}
    recipe = {
        "data": data,
        "student": {"model": "cifar_resnet8"},
        "teacher": {"model": "cifar_resnet20", "weights": "teacher.safetensors", "batch": BATCH},
        "epochs": 2,
        "batch": BATCH,
        "optimizer": {"momentum": 0.9},
        "schedule": {"kind": "cosine", "rate": 0.05},
        "journal": {"every_steps": 1, "trackers": []},
    }
    methods = {name: method(name) for name in ("kd", "dkd", "perception", "ddkd", "ofd")}
    losses = {**methods, "all": {key: value for one in methods.values() for key, value in one.items()}}
    for name, each in losses.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**recipe, "losses": each}))
    return folder


@pytest.fixture
def place(_place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of one's own with ``kd.yaml``, ``ddkd.yaml`` and others, a teacher's weights and 60 images; cwd."""
    for file in _place.glob("*.*"):
        shutil.copy(file, tmp_path)
    (tmp_path / "shards").symlink_to(_place / "shards")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def written(_place: Path) -> Path:
    """The cache of two views of the logits and all that ``all.yaml`` reads."""
    cache(0, 1, _place, ["all.yaml", "teacher.cache=cache", f"block={BLOCK}"])
    return _place / "cache"


@pytest.fixture
def copied(written: Path, place: Path) -> Path:
    """A copy of it, to spoil."""
    shutil.copytree(written, place / "cache")
    return place / "cache"


@pytest.fixture
def run_cache(place: Path) -> Callable[..., None]:
    """``run_cache("kd.yaml", "views=2")`` is the command in this process, in ``place``."""

    def run(*words: str) -> None:
        cache(0, 1, place, list(words))

    return run


@pytest.fixture
def run_train(place: Path) -> Callable[..., None]:
    """``run_train("kd.yaml")`` is the main job in this process, in ``place``."""

    def run(*words: str) -> None:
        training_on_ranks.train(0, 1, place, list(words))

    return run
